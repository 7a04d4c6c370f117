//! A panic, ours or LibTorch's, as an error: what went wrong in one line, and what to do about it.

use std::{
    panic::{self, AssertUnwindSafe, PanicHookInfo},
    sync::Mutex,
};

use anyhow::{Result, anyhow};

/// What the last panic said, and where it was.
static LAST: Mutex<Option<(String, String)>> = Mutex::new(None);

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
    done.unwrap_or_else(|_| {
        let last = LAST.lock().ok().and_then(|mut last| last.take());
        let (message, place) = last.unwrap_or_else(|| ("no message".into(), "nowhere".into()));
        Err(error(what, &message, &place))
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
        *last = Some((message, place));
    }
}

fn error(what: &str, message: &str, place: &str) -> anyhow::Error {
    // Of `called Result::unwrap() on an Err value: Torch("…")`, as tch panics, what LibTorch said.
    let said = message.split_once("Torch(\"").map(|(_, said)| said);
    let line = said.map_or(message, |said| said.split("\\n").next().unwrap_or(said));
    let line = line.lines().next().unwrap_or("no message").trim_end_matches("\")");
    let of = if said.is_some() { "LibTorch: " } else { "" };
    let is_memory = ["allocate memory", "out of memory"].iter().any(|it| line.contains(it));
    let hint = match is_memory {
        true => {
            "memory ran out: a smaller batch (--batch-size, train.batch_size), shorter rows (--max-len, examples.max_len), or \
             another --device; what was written is whole, and a run goes on with --resume"
                .to_owned()
        }
        false => format!(
            "this is a fault of the program, at {place}: please report it with the command; RUST_BACKTRACE=1 shows more"
        ),
    };
    anyhow!("{what} broke off\n{of}{line}\nhint: {hint}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_an_error_with_one_line_of_what_was_said() {
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
        let own = caught("attn eval", || -> Result<()> { panic!("{} is odd\nand more", 3) });
        let text = own.unwrap_err().to_string();
        assert!(text.starts_with("attn eval broke off\n3 is odd\nhint: this is a fault"), "{text}");
        assert_eq!(caught("attn eval", || Ok(4)).unwrap(), 4);
        assert_eq!(caught::<()>("x", || Err(anyhow!("plain"))).unwrap_err().to_string(), "plain");
    }

    #[test]
    fn memory_that_ran_out_has_a_hint_of_its_own() {
        let said = r#"called `Result::unwrap()` on an `Err` value: Torch("CUDA out of memory. Tried to allocate 2.00 GiB\nframes")"#;
        let text = error("attn finetune", said, "x.rs:1:2").to_string();
        assert_eq!(
            text.lines().nth(1).unwrap(),
            "LibTorch: CUDA out of memory. Tried to allocate 2.00 GiB"
        );
        assert!(text.contains("hint: memory ran out") && text.contains("--resume"), "{text}");
    }
}
