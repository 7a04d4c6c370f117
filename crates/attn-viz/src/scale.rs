//! Numbers to pixels, and round numbers to write beside an axis.

/// A stretch of numbers and its round values.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Scale {
    pub(crate) low: f64,
    pub(crate) high: f64,
    /// Distance between two round values.
    step: f64,
}

impl Scale {
    /// Covers `low` to `high` with about `n_ticks` round values, never more than two above that.
    pub(crate) fn new(low: f64, high: f64, n_ticks: usize) -> Self {
        let (low, high) = widened(low, high);
        let rough = (high - low) / n_ticks.max(1) as f64;
        let power = 10_f64.powf(rough.log10().floor());
        let step = [1., 2., 5.].map(|digit| digit * power).into_iter().find(|step| *step >= rough);
        Self { low, high, step: step.unwrap_or(10. * power) }
    }

    /// The same with no round value between two whole numbers.
    pub(crate) fn whole(self) -> Self {
        Self { step: self.step.max(1.), ..self }
    }

    /// The round values within the scale.
    pub(crate) fn ticks(&self) -> Vec<f64> {
        // A tick may miss its bound by rounding alone: 0.1 * 3 is above 0.3.
        let slack = 1e-9;
        let first = (self.low / self.step - slack).ceil() as i64;
        let last = (self.high / self.step + slack).floor() as i64;
        (first..=last).map(|i| i as f64 * self.step).collect()
    }

    /// `value` as it stands beside the axis: `20k` rather than `20000`, `3e-5` rather than `0.00003`.
    pub(crate) fn label(&self, value: f64) -> String {
        let largest = self.low.abs().max(self.high.abs());
        let (unit, suffix) = match largest {
            x if !(1e-3..1e12).contains(&x) => {
                let power = x.log10().floor();
                (10_f64.powf(power), format!("e{power}"))
            }
            x if x >= 1e9 => (1e9, "G".into()),
            x if x >= 1e6 => (1e6, "M".into()),
            x if x >= 1e4 => (1e3, "k".into()),
            _ => (1., String::new()),
        };
        let decimals = (-(self.step / unit).log10() - 1e-9).ceil().clamp(0., 9.) as usize;
        let number = (value / unit * 10_f64.powi(decimals as i32)).round();
        if number == 0. {
            return "0".into();
        }
        // A true minus sign is as wide as the digits.
        let sign = if number < 0. { "\u{2212}" } else { "" };
        format!("{sign}{:.decimals$}{suffix}", (value / unit).abs()).replace("e-", "e\u{2212}")
    }

    /// Where `value` stands, 0 at `low` and 1 at `high`.
    pub(crate) fn fraction(&self, value: f64) -> f64 {
        (value - self.low) / (self.high - self.low)
    }
}

/// Gives a stretch without extent one, so that a constant is drawn through the middle.
fn widened(low: f64, high: f64) -> (f64, f64) {
    let size = low.abs().max(high.abs());
    if high - low > size * 1e-9 {
        (low, high)
    } else {
        let half = if size == 0. { 1. } else { size * 0.1 };
        (low - half, high + half)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(low: f64, high: f64, n_ticks: usize) -> Vec<String> {
        let scale = Scale::new(low, high, n_ticks);
        scale.ticks().into_iter().map(|tick| scale.label(tick)).collect()
    }

    #[test]
    fn ticks_are_round_and_within_bounds() {
        assert_eq!(labels(0., 1., 5), ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]);
        assert_eq!(labels(0.13, 0.71, 6), ["0.2", "0.3", "0.4", "0.5", "0.6", "0.7"]);
        assert_eq!(labels(-1., 1., 4), ["\u{2212}1.0", "\u{2212}0.5", "0", "0.5", "1.0"]);
        assert_eq!(labels(0., 468., 6), ["0", "100", "200", "300", "400"]);
    }

    #[test]
    fn large_and_small_numbers_stay_short() {
        assert_eq!(labels(0., 20_000., 4), ["0", "5k", "10k", "15k", "20k"]);
        assert_eq!(labels(1.0e6, 2.0e6, 4), ["1.0M", "1.5M", "2.0M"]);
        assert_eq!(
            labels(0., 5e-5, 5),
            ["0", "1e\u{2212}5", "2e\u{2212}5", "3e\u{2212}5", "4e\u{2212}5", "5e\u{2212}5"]
        );
    }

    #[test]
    fn a_count_has_no_tick_between_whole_numbers() {
        let labels = |low, high| {
            let scale = Scale::new(low, high, 8).whole();
            scale.ticks().into_iter().map(|tick| scale.label(tick)).collect::<Vec<_>>()
        };
        assert_eq!(labels(0.97, 3.03), ["1", "2", "3"]);
        assert_eq!(labels(3., 3.), ["3"]);
        assert_eq!(labels(0., 700.), ["0", "100", "200", "300", "400", "500", "600", "700"]);
    }

    #[test]
    fn a_constant_stands_in_the_middle() {
        for value in [0., 3., -2e-7, 1e15] {
            let scale = Scale::new(value, value, 5);
            assert!((scale.fraction(value) - 0.5).abs() < 1e-9, "{value}");
            assert!(!scale.ticks().is_empty(), "{value}");
        }
    }

    #[test]
    fn the_number_of_ticks_follows_what_was_asked_for() {
        for n_ticks in 3..12 {
            for high in [0.017, 0.3, 1., 7.3, 98.6, 12_345.] {
                let found = Scale::new(0., high, n_ticks).ticks().len();
                assert!(
                    (n_ticks / 3 + 1..=n_ticks + 2).contains(&found),
                    "{found} of {n_ticks} up to {high}"
                );
            }
        }
    }
}
