//! How an error looks.

use std::{error::Error, fmt::Write as _, io};

use crate::logging;

/// Writes the chain of causes to stderr.
pub(crate) fn print(error: &anyhow::Error) {
    logging::eprint(&render(error));
}

/// ```text
/// error: cannot use `configs/top_k.toml`
///   caused by: unknown field `kk`, expected `k` in `attention`
/// ```
/// Lines that begin with `hint:` come last, wherever they stand in the chain.
fn render(error: &anyhow::Error) -> String {
    let mut text = String::new();
    let mut hints: Vec<String> = Vec::new();
    let mut before = String::new();
    for (depth, cause) in error.chain().enumerate() {
        let message = message(cause);
        // Wrappers that only pass on what they hold repeat it.
        if message == before {
            continue;
        }
        let prefix = if depth == 0 { "error: " } else { "  caused by: " };
        let mut lines = message.lines().filter(|line| match line.trim().strip_prefix("hint: ") {
            Some(hint) => {
                hints.push(hint.to_owned());
                false
            }
            None => true,
        });
        let _ = writeln!(text, "{prefix}{}", lines.next().unwrap_or("no message"));
        let indent = if depth == 0 { "  " } else { "    " };
        lines.for_each(|line| {
            let _ = writeln!(text, "{indent}{line}");
        });
        before = message;
    }
    hints.dedup();
    if hints.is_empty()
        && let Some(hint) = advice(error)
    {
        hints.push(hint.to_owned());
    }
    for hint in hints {
        let _ = writeln!(text, "  hint: {hint}");
    }
    text
}

/// What to do about what the system refused.
fn advice(error: &anyhow::Error) -> Option<&'static str> {
    let mut refused = error.chain().filter_map(|cause| cause.downcast_ref::<io::Error>());
    Some(match refused.next()?.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "the disk is full: make room there, or name another place; what was written is whole, and a run goes on with --resume"
        }
        io::ErrorKind::FileTooLarge => {
            "files may not grow that large there: look at `ulimit -f`; what was written is whole, and a run goes on with --resume"
        }
        io::ErrorKind::ReadOnlyFilesystem => "nothing can be written there: name another place",
        io::ErrorKind::PermissionDenied => {
            "you may not do this there: look at the permissions, or name another place"
        }
        io::ErrorKind::NotFound => "it is not there, or no longer: look at the name",
        _ => return None,
    })
}

fn message(cause: &(dyn Error + 'static)) -> String {
    match cause.downcast_ref::<tch::TchError>() {
        Some(error) => attn_torch::brief(error),
        None => cause.to_string(),
    }
}

/// Whether stdout was closed by who read it.
pub(crate) fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<io::Error>())
        .any(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use anyhow::{Context, anyhow};

    use super::*;

    #[test]
    fn causes_are_indented_and_hints_come_last() {
        let error = Err::<(), _>(anyhow!("two lists\n  missing:\n    a.weight\nhint: look there"))
            .context("cannot load `m`")
            .context("cannot evaluate")
            .unwrap_err();

        assert_eq!(
            render(&error),
            "error: cannot evaluate\n  caused by: cannot load `m`\n  caused by: two lists\n      missing:\n        \
             a.weight\n  hint: look there\n"
        );
    }

    #[test]
    fn what_the_system_refuses_comes_with_advice_unless_there_is_some() {
        let full = || Err::<(), _>(io::Error::from(io::ErrorKind::StorageFull));
        let text = render(&full().context("cannot write `x`").unwrap_err());
        assert!(text.contains("\n  hint: the disk is full: "), "{text}");
        let text = render(&full().context("cannot write `x`\nhint: own").unwrap_err());
        assert!(text.ends_with("hint: own\n") && !text.contains("make room"), "{text}");
    }

    #[test]
    fn a_message_is_not_repeated() {
        #[derive(Debug, thiserror::Error)]
        #[error(transparent)]
        struct Wrapper(anyhow::Error);

        let error = anyhow::Error::from(Wrapper(anyhow!("inner"))).context("outer");

        assert_eq!(render(&error), "error: outer\n  caused by: inner\n");
    }
}
