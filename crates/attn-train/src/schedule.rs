//! How the learning rate moves over a run.

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

/// The course of the learning rate after the warm-up.
///
/// With s steps done of T, and w of warm-up, the next step runs at `lr` times
///
/// ```text
/// (s + 1) / w                          while s < w
/// linear:    (T − s) / (T − w)
/// cosine:    ½ (1 + cos(π (s − w) / (T − w)))
/// constant:  1
/// ```
///
/// transformers begins its warm-up with a step at rate 0, which moves nothing; here the first step runs at `lr / w`.
/// Neither decay reaches 0 within the run. Cosine: Loshchilov & Hutter 2016, <https://arxiv.org/abs/1608.03983>,
/// without restarts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// Falls in a straight line.
    #[default]
    Linear,
    /// Falls along half a cosine.
    Cosine,
    /// Stays.
    Constant,
}

impl Schedule {
    /// What the learning rate is multiplied by in the step after `step` steps.
    pub fn factor(self, step: u64, warmup_steps: u64, total_steps: u64) -> f64 {
        if step < warmup_steps {
            return (step + 1) as f64 / warmup_steps as f64;
        }
        // A run of warm-up alone has no decay; a step past the end stays at the end.
        let n_decay = total_steps.saturating_sub(warmup_steps).max(1) as f64;
        let done = ((step - warmup_steps) as f64 / n_decay).min(1.0);
        match self {
            Self::Linear => 1.0 - done,
            Self::Cosine => 0.5 * (1.0 + (PI * done).cos()),
            Self::Constant => 1.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn factors(schedule: Schedule, warmup: u64, total: u64) -> Vec<f64> {
        (0..total).map(|step| schedule.factor(step, warmup, total)).collect()
    }

    #[track_caller]
    fn assert_near(actual: &[f64], expected: &[f64]) {
        assert_eq!(actual.len(), expected.len());
        for (actual, expected) in actual.iter().zip(expected) {
            assert!((actual - expected).abs() < 1e-15, "{actual} is not {expected}");
        }
    }

    #[test]
    fn each_course_has_the_values_worked_out_by_hand() {
        assert_near(&factors(Schedule::Linear, 2, 6), &[0.5, 1.0, 1.0, 0.75, 0.5, 0.25]);
        assert_near(&factors(Schedule::Linear, 0, 4), &[1.0, 0.75, 0.5, 0.25]);
        assert_near(&factors(Schedule::Constant, 4, 6), &[0.25, 0.5, 0.75, 1.0, 1.0, 1.0]);
        let root = 0.5_f64.sqrt();
        assert_near(
            &factors(Schedule::Cosine, 1, 5),
            &[1.0, 1.0, 0.5 * (1.0 + root), 0.5, 0.5 * (1.0 - root)],
        );
    }

    #[test]
    fn no_step_of_a_run_is_wasted_at_rate_zero() {
        for schedule in [Schedule::Linear, Schedule::Cosine, Schedule::Constant] {
            for (warmup, total) in [(0, 1), (1, 1), (5, 5), (3, 100), (0, 7)] {
                assert!(factors(schedule, warmup, total).iter().all(|&factor| factor > 0.0));
            }
        }
    }
}
