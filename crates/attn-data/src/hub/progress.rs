//! How far a download is.

use std::sync::{Arc, Mutex, PoisonError};

use indicatif::{ProgressBar, ProgressStyle};

/// How far the download of one file is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    /// Path within the repository.
    pub file: String,
    /// Bytes that have arrived, those of earlier runs included.
    pub n_bytes: u64,
    /// Bytes of the whole file, 0 where the Hub does not say.
    pub total: u64,
    /// The file is complete and its content checked.
    pub finished: bool,
}

/// Who is told.
pub(super) type Report = Arc<dyn Fn(&Progress) + Send + Sync>;

/// Draws a bar for each file on stderr, and nothing where stderr is no terminal. For [`Hub::with_progress`].
///
/// [`Hub::with_progress`]: super::Hub::with_progress
pub fn progress_bar() -> impl Fn(&Progress) + Send + Sync + 'static {
    let current: Mutex<Option<(String, ProgressBar)>> = Mutex::new(None);
    move |progress| {
        let mut current = current.lock().unwrap_or_else(PoisonError::into_inner);
        if current.as_ref().is_none_or(|(file, _)| *file != progress.file) {
            let style = "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
            let bar = ProgressBar::new(progress.total).with_message(progress.file.clone());
            let bar = bar.with_position(progress.n_bytes); // goes on where an earlier run stopped
            bar.set_style(ProgressStyle::with_template(style).expect("a valid template"));
            bar.reset_eta(); // what is there already says nothing about the rate
            *current = Some((progress.file.clone(), bar));
        }
        let (_, bar) = current.as_ref().expect("set above");
        bar.set_length(progress.total.max(progress.n_bytes));
        bar.set_position(progress.n_bytes);
        if progress.finished {
            bar.finish_and_clear();
            *current = None;
        }
    }
}

/// Tells of one file.
pub(super) struct Reporter<'a> {
    pub(super) file: &'a str,
    /// Bytes of the whole file, 0 where the Hub does not say.
    pub(super) total: u64,
    pub(super) report: Option<&'a Report>,
}

impl Reporter<'_> {
    pub(super) fn send(&self, n_bytes: u64, finished: bool) {
        if let Some(report) = self.report {
            report(&Progress { file: self.file.into(), n_bytes, total: self.total, finished });
        }
    }
}
