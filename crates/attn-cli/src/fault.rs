//! A panic, ours or LibTorch's, as an error: what went wrong in one line, and what to do about it.

use std::{
    panic::{self, AssertUnwindSafe, PanicHookInfo},
    sync::Mutex,
};

use anyhow::{Result, anyhow};

use crate::memory;

/// What the last panic said, where it was, and what its thread was at.
static LAST: Mutex<Option<Said>> = Mutex::new(None);

struct Said {
    message: String,
    place: String,
    doing: Option<String>,
}

/// Runs `work`, called `what`. A panic in it is an error like any other; RUST_BACKTRACE shows it whole beside.
pub(crate) fn caught<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let usual = panic::take_hook();
    let is_wanted = std::env::var_os("RUST_BACKTRACE").is_some_and(|it| it != "0");
    panic::set_hook(Box::new(move |info| {
        keep(info);
        if is_wanted {
            usual(info);
        }
    }));
    let done = panic::catch_unwind(AssertUnwindSafe(work));
    drop(panic::take_hook());
    let done = done.map(|done| {
        done.map_err(|error| {
            // What LibTorch hands back as an error, not as a panic.
            let ran_out = error.chain().any(|cause| is_memory(&cause.to_string()));
            let is_told = error.chain().any(|cause| cause.to_string().contains("hint: "));
            if ran_out && !is_told {
                error.context(format!("{what} broke off\nhint: {}", of_memory()))
            } else {
                error
            }
        })
    });
    done.unwrap_or_else(|_| {
        let last = LAST.lock().ok().and_then(|mut last| last.take());
        let nothing =
            || Said { message: "no message".into(), place: "nowhere".into(), doing: None };
        Err(error(what, &last.unwrap_or_else(nothing)))
    })
}

fn keep(info: &PanicHookInfo<'_>) {
    let payload = info.payload();
    let message = payload
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no message".into());
    let place = info.location().map_or("nowhere".into(), ToString::to_string);
    if let Ok(mut last) = LAST.lock() {
        *last = Some(Said { message, place, doing: attn_core::doing() });
    }
}

/// Whether LibTorch says that memory ran out, on the processor or on a GPU.
fn is_memory(line: &str) -> bool {
    ["allocate memory", "out of memory"].iter().any(|it| line.contains(it))
}

fn of_memory() -> String {
    format!(
        "memory ran out: lower what is large: {}; what was written is whole, and a run that trained goes on from its last \
         checkpoint with --resume",
        memory::to_lower()
    )
}

fn error(what: &str, Said { message, place, doing }: &Said) -> anyhow::Error {
    // Of `called Result::unwrap() on an Err value: Torch("…")`, as tch panics, what LibTorch said.
    let said = message.split_once("Torch(\"").map(|(_, said)| said);
    let line = said.map_or(message.as_str(), |said| said.split("\\n").next().unwrap_or(said));
    let line = line.lines().next().unwrap_or("no message").trim_end_matches("\")");
    let of = if said.is_some() { "LibTorch: " } else { "" };
    let hint = match is_memory(line) {
        true => of_memory(),
        false => format!(
            "this is a fault of the program, at {place}: please report it with the command; RUST_BACKTRACE=1 shows more"
        ),
    };
    let at = doing.as_ref().map_or(String::new(), |doing| format!(" {doing}"));
    anyhow!("{what} broke off{at}\n{of}{line}\nhint: {hint}")
}

#[cfg(test)]
mod tests {
    use attn_core::During;

    use super::*;

    // One test of all that catches: the hook is the process's.
    #[test]
    fn what_is_caught_is_an_error_with_one_line_of_what_was_said() {
        let ones = || tch::Tensor::ones([2, 3], (tch::Kind::Float, tch::Device::Cpu));
        let error = caught("attn eval", || Ok(ones().matmul(&ones()).size())).unwrap_err();
        let text = error.to_string();
        assert!(
            text.starts_with(
                "attn eval broke off\nLibTorch: mat1 and mat2 shapes cannot be multiplied (2x3 and 2x3)\nhint: "
            ),
            "{text}"
        );
        assert!(text.contains("please report it") && text.contains("tch-0.24.0"), "{text}");
        let error = caught("attn eval", || {
            let x = ones();
            let _doing = During::of("layer", Some(3), "hidden states", &x);
            Ok(x.matmul(&ones()).size())
        });
        let text = error.unwrap_err().to_string();
        assert!(
            text.starts_with(
                "attn eval broke off in layer 3, of hidden states [2, 3]\nLibTorch: mat1"
            ),
            "{text}"
        );
        let own = caught("attn eval", || -> Result<()> { panic!("{} is odd\nand more", 3) });
        let text = own.unwrap_err().to_string();
        assert!(text.starts_with("attn eval broke off\n3 is odd\nhint: this is a fault"), "{text}");
        assert_eq!(caught("attn eval", || Ok(4)).unwrap(), 4);
        assert_eq!(caught::<()>("x", || Err(anyhow!("plain"))).unwrap_err().to_string(), "plain");
        let handed = || -> Result<()> {
            Err(anyhow!("LibTorch failed while adding: CUDA out of memory")
                .context("training failed"))
        };
        let text = format!("{:?}", caught("attn finetune", handed).unwrap_err());
        assert!(
            text.contains("training failed") && text.contains("hint: memory ran out"),
            "{text}"
        );
    }

    #[test]
    fn memory_that_ran_out_has_a_hint_of_its_own() {
        let said = r#"called `Result::unwrap()` on an `Err` value: Torch("CUDA out of memory. Tried to allocate 2.00 GiB\nframes")"#;
        let said = Said { message: said.into(), place: "x.rs:1:2".into(), doing: None };
        let text = error("attn finetune", &said).to_string();
        assert_eq!(
            text.lines().nth(1).unwrap(),
            "LibTorch: CUDA out of memory. Tried to allocate 2.00 GiB"
        );
        assert!(text.contains("hint: memory ran out") && text.contains("--resume"), "{text}");
    }
}
