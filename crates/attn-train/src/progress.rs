//! What a run tells while it goes.

use std::{
    collections::VecDeque,
    path::Path,
    time::{Duration, Instant},
};

use attn_core::laws::Verdict;

use crate::metrics::Metric;

/// Something that happened in a run.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// The run is about to begin, or to go on.
    Started {
        /// Steps done, 0 unless the run was resumed.
        step: u64,
        /// Steps of the whole run.
        total_steps: u64,
        /// Values that are trained.
        n_trainable: usize,
        /// Values of the whole model.
        n_parameters: usize,
        /// The laws that hold of the model.
        laws: &'a [Verdict],
    },
    /// A step was done.
    Step(&'a Progress),
    /// An evaluation begins.
    Evaluating {
        /// Steps done.
        step: u64,
    },
    /// An evaluation has ended.
    Evaluated {
        /// Steps done.
        step: u64,
        /// What it gave.
        metrics: &'a [Metric],
        /// Whether this is the best model so far by the metric that selects.
        is_best: bool,
    },
    /// A checkpoint, or the best model so far, was saved.
    Saved {
        /// Steps done.
        step: u64,
        /// The folder.
        path: &'a Path,
    },
}

/// How far a run is.
#[derive(Debug, Clone, PartialEq)]
pub struct Progress {
    /// Steps done.
    pub step: u64,
    /// Steps of the whole run.
    pub total_steps: u64,
    /// Epochs done, the current one as a fraction.
    pub epoch: f64,
    /// Loss of this step, mean over its targets.
    pub loss: f64,
    /// Learning rate of this step.
    pub lr: f64,
    /// Norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Tokens of this step, without padding.
    pub step_tokens: u64,
    /// Tokens so far, without padding.
    pub n_tokens: u64,
    /// Tokens trained on per second over the last steps, evaluations and checkpoints left out.
    pub tokens_per_s: f64,
    /// Time until the last step at the pace of the last ones, evaluations and checkpoints left out.
    pub eta: Duration,
}

/// Steps that the pace is taken over.
const WINDOW: usize = 50;

/// Measures pace.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    recent: VecDeque<(u64, Duration)>,
    /// Time in steps, and their tokens, since this process began.
    total: (u64, Duration),
}

impl Meter {
    /// Notes a step of `tokens` that began at `start`.
    pub(crate) fn step(&mut self, tokens: u64, start: Instant) {
        let took = start.elapsed();
        self.recent.push_back((tokens, took));
        if self.recent.len() > WINDOW {
            self.recent.pop_front();
        }
        self.total.0 += tokens;
        self.total.1 += took;
    }

    pub(crate) fn tokens_per_s(&self) -> f64 {
        let (tokens, took) = self
            .recent
            .iter()
            .fold((0, Duration::ZERO), |sum, step| (sum.0 + step.0, sum.1 + step.1));
        rate(tokens, took)
    }

    /// Over all steps of this process.
    pub(crate) fn mean_tokens_per_s(&self) -> f64 {
        rate(self.total.0, self.total.1)
    }

    pub(crate) fn eta(&self, steps_left: u64) -> Duration {
        let took: Duration = self.recent.iter().map(|step| step.1).sum();
        let per_step = took.as_secs_f64() / self.recent.len().max(1) as f64;
        Duration::try_from_secs_f64(per_step * steps_left as f64).unwrap_or(Duration::MAX)
    }
}

fn rate(tokens: u64, took: Duration) -> f64 {
    if took.is_zero() { 0.0 } else { tokens as f64 / took.as_secs_f64() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pace_is_that_of_the_last_steps() {
        let mut meter = Meter::default();
        let ago = |ms| Instant::now().checked_sub(Duration::from_millis(ms)).unwrap();
        for _ in 0..10 {
            meter.step(1, ago(1000)); // Slow ones that leave the window.
        }
        for _ in 0..WINDOW {
            meter.step(100, ago(100));
        }

        assert!((meter.tokens_per_s() / 1000.0 - 1.0).abs() < 0.1, "{}", meter.tokens_per_s());
        assert!((meter.eta(20).as_secs_f64() / 2.0 - 1.0).abs() < 0.1, "{:?}", meter.eta(20));
        let mean = meter.mean_tokens_per_s();
        assert!((mean / (5010.0 / 15.0) - 1.0).abs() < 0.1, "{mean}");
        assert_eq!(Meter::default().eta(3), Duration::ZERO);
    }
}
