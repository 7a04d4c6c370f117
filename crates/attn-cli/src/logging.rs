//! What is said on stderr: log lines, and progress bars below them.

use std::{
    fmt,
    io::{self, IsTerminal, Write},
    sync::OnceLock,
};

use indicatif::MultiProgress;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::{
    EnvFilter,
    fmt::{FmtContext, FormatEvent, FormatFields, MakeWriter, format::Writer},
    registry::LookupSpan,
};

/// Sends the log to stderr: notices and warnings, more with `verbose`, errors alone with `quiet`. `RUST_LOG` wins.
pub(crate) fn init(verbose: u8, quiet: bool) {
    let default = match (quiet, verbose) {
        // The client of the Hub logs what it then returns, and we say.
        (true, _) => "error,hf_hub=off",
        (false, 0) => "warn,attn=info,hf_hub=off", // a prefix: our libraries too
        (false, 1) => "info,attn=debug",
        (false, _) => "trace",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| default.into());
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(Stderr)
        .with_ansi(io::stderr().is_terminal());
    if verbose > 0 {
        builder.init();
    } else {
        builder.event_format(Plain).init();
    }
}

/// The arguments that make another of our processes say as much.
pub(crate) fn flags(verbose: u8, quiet: bool) -> Vec<&'static str> {
    let verbose = std::iter::repeat_n("-v", verbose.into());
    verbose.chain(quiet.then_some("-q")).collect()
}

/// The progress bars of this process. Log lines are written above them.
pub(crate) fn bars() -> &'static MultiProgress {
    static BARS: OnceLock<MultiProgress> = OnceLock::new();
    BARS.get_or_init(MultiProgress::new)
}

/// Writes `text` to stderr as it is. Nobody is left to be told where that fails.
pub(crate) fn eprint(text: &str) {
    bars().suspend(|| {
        let _ = io::stderr().lock().write_all(text.as_bytes());
    });
}

/// A message without time and place, for people: `warning: …`, or the bare message of a notice.
struct Plain;

impl<S, N> FormatEvent<S, N> for Plain
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        match *event.metadata().level() {
            Level::ERROR => write!(writer, "error: ")?,
            Level::WARN => write!(writer, "warning: ")?,
            Level::INFO => {}
            _ => write!(writer, "{}: ", event.metadata().target())?,
        }
        context.field_format().format_fields(writer.by_ref(), event)?;
        writeln!(writer)
    }
}

struct Stderr;

/// One log line, written when it is complete.
struct Line(Vec<u8>);

impl<'a> MakeWriter<'a> for Stderr {
    type Writer = Line;

    fn make_writer(&'a self) -> Line {
        Line(Vec::new())
    }
}

impl Write for Line {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        eprint(&String::from_utf8_lossy(&self.0));
    }
}
