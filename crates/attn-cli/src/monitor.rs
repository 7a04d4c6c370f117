//! What the user sees of work under way, and how it is stopped.

use std::{
    io,
    ops::ControlFlow,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use attn_train::{Event, Metric, Progress};
use indicatif::{ProgressBar, ProgressStyle};
use signal_hook::{
    consts::{SIGINT, SIGTERM},
    flag,
};

use crate::logging;

/// The exit code after an interruption.
pub(crate) const INTERRUPTED: u8 = 130;

/// Time between lines where no bar can be drawn.
const LINE_EVERY: Duration = Duration::from_secs(15);

/// Characters of a bar.
const BAR_WIDTH: usize = 16;

/// Lets the first Ctrl-C (or SIGTERM) set `stop`. The second one ends the process at once.
pub(crate) fn stop_on_signals(stop: &Arc<AtomicBool>) -> Result<()> {
    for signal in [SIGINT, SIGTERM] {
        let register = || {
            flag::register_conditional_shutdown(signal, INTERRUPTED.into(), Arc::clone(stop))?;
            flag::register(signal, Arc::clone(stop))
        };
        register().context("cannot listen for Ctrl-C")?;
    }
    Ok(())
}

/// Ends this process at once when `parent`, which started it, is gone. What it loses are the steps since the last
/// checkpoint.
pub(crate) fn end_with(parent: i32) -> Result<()> {
    use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};

    set_parent_process_death_signal(Some(Signal::KILL))
        .context("cannot tie this process to the sweep's")?;
    // It may have gone before that.
    let is_there = getppid().map(Pid::as_raw_nonzero).is_some_and(|pid| pid.get() == parent);
    anyhow::ensure!(is_there, "process {parent}, which is to have started this run, is gone");
    Ok(())
}

/// A bar on a terminal, a line now and then elsewhere, nothing with `--quiet`.
struct Meter {
    bar: ProgressBar,
    last_line: Instant,
    what: &'static str,
}

impl Meter {
    fn new(what: &'static str, total: u64, position: u64) -> Self {
        let bar = match tracing::enabled!(tracing::Level::INFO) {
            true => logging::bars().add(ProgressBar::new(total)),
            false => ProgressBar::hidden(),
        };
        let template = format!("{{prefix}} {{bar:{BAR_WIDTH}}} {{pos}}/{{len}} {{wide_msg}}");
        bar.set_style(ProgressStyle::with_template(&template).expect("a valid template"));
        bar.set_prefix(what);
        bar.set_position(position);
        Self { bar, last_line: Instant::now(), what }
    }

    /// Characters that a message may have: what the terminal leaves beside the bar, or no end without one.
    fn room(&self) -> usize {
        if self.bar.is_hidden() {
            return usize::MAX;
        }
        let columns = rustix::termios::tcgetwinsize(io::stderr()).map_or(0, |size| size.ws_col);
        let columns = if columns == 0 { 80 } else { columns.into() };
        let total = self.bar.length().unwrap_or_default().to_string().len();
        let taken = self.what.len() + BAR_WIDTH + 2 * total + "   /".len() + 1;
        usize::saturating_sub(columns, taken)
    }

    fn advance(&mut self, position: u64, message: String) {
        self.bar.set_position(position);
        if self.bar.is_hidden() && self.last_line.elapsed() >= LINE_EVERY {
            self.last_line = Instant::now();
            let total = self.bar.length().unwrap_or_default();
            tracing::info!("{} {position}/{total} {message}", self.what);
        }
        self.bar.set_message(message);
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
        logging::bars().remove(&self.bar);
    }
}

/// Counts rows of an evaluation, until `stop` is set.
pub(crate) fn count_rows(
    total: usize,
    stop: &AtomicBool,
) -> impl FnMut(usize) -> ControlFlow<()> + use<'_> {
    count_rows_of("evaluating", total, stop)
}

/// Counts rows of an evaluation that nothing stops but Ctrl-C, which ends the process.
pub(crate) fn count_every_row(total: usize) -> impl FnMut(usize) -> ControlFlow<()> {
    count_every_row_of("evaluating", total)
}

/// As [`count_every_row`], of `what`.
pub(crate) fn count_every_row_of(
    what: &'static str,
    total: usize,
) -> impl FnMut(usize) -> ControlFlow<()> {
    static NEVER: AtomicBool = AtomicBool::new(false);
    count_rows_of(what, total, &NEVER)
}

/// Counts the rows of `what`, until `stop` is set.
pub(crate) fn count_rows_of<'a>(
    what: &'static str,
    total: usize,
    stop: &'a AtomicBool,
) -> impl FnMut(usize) -> ControlFlow<()> + use<'a> {
    let mut meter = Meter::new(what, total as u64, 0);
    move |n_done| {
        meter.advance(n_done as u64, "rows".to_owned());
        if stop.load(Ordering::Relaxed) {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    }
}

/// Tells of a training run.
#[derive(Default)]
pub(crate) struct Monitor {
    meter: Option<Meter>,
}

impl Monitor {
    /// For [`attn_train::Run::observe`].
    pub(crate) fn observe(&mut self, event: Event<'_>) {
        match event {
            Event::Started { step, total_steps, n_trainable, n_parameters, laws } => {
                for verdict in laws {
                    tracing::debug!("{verdict}");
                }
                if step > 0 {
                    tracing::info!("going on after step {step}");
                }
                let names: Vec<String> =
                    laws.iter().map(|verdict| verdict.law.replace('_', " ")).collect();
                tracing::info!("laws that hold on this model: {}", names.join(", "));
                tracing::info!(
                    "training {} of {} parameters, {total_steps} steps",
                    grouped(n_trainable),
                    grouped(n_parameters)
                );
                self.meter = Some(Meter::new("training", total_steps, step));
            }
            Event::Step(progress) => {
                if let Some(meter) = &mut self.meter {
                    let room = meter.room();
                    meter.advance(progress.step, describe(progress, room));
                }
            }
            Event::Evaluated { step, metrics, is_best } => {
                let best = if is_best && step > 0 { " (the best so far)" } else { "" };
                tracing::info!("step {step}: {}{best}", list(metrics));
            }
            Event::Saved { step, path } => {
                tracing::debug!("step {step} saved to `{}`", path.display());
            }
            _ => {}
        }
    }
}

/// What a step came to, in at most `room` characters: what matters least goes first.
fn describe(progress: &Progress, room: usize) -> String {
    let Progress { loss, lr, tokens_per_s, eta, .. } = progress;
    let seconds = eta.as_secs();
    // With their ranks, 0 the last to go.
    let mut parts = vec![
        (0, format!("loss {loss:.3}")),
        (3, format!("lr {lr:.2e}")),
        (2, format!("{} tokens/s", grouped(*tokens_per_s as usize))),
        (1, format!("{}:{:02} left", seconds / 60, seconds % 60)),
    ];
    loop {
        let shown: Vec<&str> = parts.iter().map(|(_, text)| &text[..]).collect();
        let shown = shown.join(", ");
        if shown.len() <= room || parts.len() == 1 {
            return shown;
        }
        let last = parts.iter().map(|(rank, _)| *rank).max();
        parts.retain(|(rank, _)| Some(*rank) != last);
    }
}

fn list(metrics: &[Metric]) -> String {
    let shown: Vec<String> =
        metrics.iter().map(|metric| format!("{} {:.4}", metric.name, metric.value)).collect();
    shown.join(", ")
}

/// A count with its thousands apart: `67,349`.
pub(crate) fn grouped(count: usize) -> String {
    let digits = count.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_matters_least_goes_first() {
        let progress = Progress {
            step: 1,
            total_steps: 2,
            epoch: 0.5,
            loss: 0.5,
            lr: 5e-4,
            grad_norm: 1.0,
            step_tokens: 100,
            n_tokens: 100,
            tokens_per_s: 12_345.6,
            eta: Duration::from_secs(83),
        };
        let shown = |room| describe(&progress, room);

        assert_eq!(shown(usize::MAX), "loss 0.500, lr 5.00e-4, 12,345 tokens/s, 1:23 left");
        // Beside `training`, a bar and `1234/1234` on a terminal of 80.
        assert_eq!(shown(43), "loss 0.500, 12,345 tokens/s, 1:23 left");
        assert_eq!(shown(30), "loss 0.500, 1:23 left");
        assert_eq!(shown(20), "loss 0.500");
    }

    #[test]
    fn thousands_stand_apart() {
        let shown: Vec<String> = [0, 12, 999, 1000, 67_349, 1_234_567].map(grouped).into();
        assert_eq!(shown, ["0", "12", "999", "1,000", "67,349", "1,234,567"]);
    }
}
