//! How far a download is.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicU64, Ordering},
};

use hf_hub::progress::{DownloadEvent, ProgressEvent, ProgressHandler};
use indicatif::{ProgressBar, ProgressStyle};

/// How far the download of one file is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    /// Path within the repository.
    pub file: String,
    /// Bytes that have arrived.
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
            bar.set_style(ProgressStyle::with_template(style).expect("a valid template"));
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

/// Turns the client's events into ours.
pub(super) struct Reporter {
    file: String,
    report: Option<Report>,
    n_bytes: AtomicU64,
    total: AtomicU64,
}

impl Reporter {
    pub(super) fn new(file: &str, report: Option<Report>) -> Self {
        Self { file: file.into(), report, n_bytes: AtomicU64::new(0), total: AtomicU64::new(0) }
    }

    /// The size the Hub announced before the first byte, 0 where it did not.
    pub(super) fn announced(&self) -> u64 {
        self.total.load(Ordering::Relaxed)
    }

    pub(super) fn finish(&self) {
        self.send(true);
    }

    fn send(&self, finished: bool) {
        if let Some(report) = &self.report {
            let (n_bytes, total) = (self.n_bytes.load(Ordering::Relaxed), self.announced());
            report(&Progress { file: self.file.clone(), n_bytes, total, finished });
        }
    }
}

impl ProgressHandler for Reporter {
    fn on_progress(&self, event: &ProgressEvent) {
        let ProgressEvent::Download(event) = event else { return };
        match event {
            DownloadEvent::Start { total_bytes, .. } => {
                self.total.store(*total_bytes, Ordering::Relaxed)
            }
            DownloadEvent::Progress { files } => {
                if let Some(file) = files.iter().find(|file| file.filename == self.file) {
                    self.n_bytes.store(file.bytes_completed, Ordering::Relaxed);
                }
            }
            DownloadEvent::AggregateProgress { bytes_completed, .. } => {
                self.n_bytes.store(*bytes_completed, Ordering::Relaxed);
            }
            // Ours is sent once the content has been checked.
            DownloadEvent::Complete => return,
        }
        self.send(false);
    }
}
