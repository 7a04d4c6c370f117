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
    for hint in hints {
        let _ = writeln!(text, "  hint: {hint}");
    }
    text
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
    fn a_message_is_not_repeated() {
        #[derive(Debug, thiserror::Error)]
        #[error(transparent)]
        struct Wrapper(anyhow::Error);

        let error = anyhow::Error::from(Wrapper(anyhow!("inner"))).context("outer");

        assert_eq!(render(&error), "error: outer\n  caused by: inner\n");
    }
}
