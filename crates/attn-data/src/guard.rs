//! Libraries that panic on some of what strangers wrote.

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::Source;

/// Runs `work` of another library. A panic in it is its error: a damaged file must not end the program of who reads it.
///
/// What `work` changes is not used again after an error.
pub(crate) fn guarded<T, E: Into<Source>>(
    work: impl FnOnce() -> Result<T, E>,
) -> Result<T, Source> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(done) => done.map_err(Into::into),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let said = text.or(panic.downcast_ref::<&str>().copied()).unwrap_or_default();
            let first = said.lines().next().unwrap_or_default();
            Err(format!("it is damaged, or of a form that the library does not know ({first})")
                .into())
        }
    }
}
