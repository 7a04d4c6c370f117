//! Numbers to pixels, and round numbers to write beside an axis.

/// How numbers are laid out along an axis.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Axis {
    /// Equal differences are equally far apart.
    #[default]
    Linear,
    /// Equal ratios are equally far apart; numbers must be above 0.
    Log,
}

/// A stretch of numbers and its round values.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Scale {
    pub(crate) low: f64,
    pub(crate) high: f64,
    /// Distance between two round values: a difference, or a number of decades.
    step: f64,
    axis: Axis,
    by_decades: bool,
}

/// Round values that an axis of decades has, below which it has those of a linear one.
const LEAST_TICKS: usize = 3;

impl Scale {
    /// Covers `low` to `high` with about `n_ticks` round values, never more than two above that.
    pub(crate) fn new(low: f64, high: f64, n_ticks: usize) -> Self {
        let (low, high) = widened(low, high);
        let rough = (high - low) / n_ticks.max(1) as f64;
        let power = 10_f64.powf(rough.log10().floor());
        let step = [1., 2., 5.].map(|digit| digit * power).into_iter().find(|step| *step >= rough);
        Self { low, high, step: step.unwrap_or(10. * power), axis: Axis::Linear, by_decades: false }
    }

    /// As [`Scale::new`] along such an axis. A logarithmic one has two round values at least, and three where it spans less than
    /// a decade.
    pub(crate) fn along(axis: Axis, low: f64, high: f64, n_ticks: usize) -> Self {
        match axis {
            Axis::Linear => Self::new(low, high, n_ticks),
            Axis::Log => {
                let (low, high) =
                    if high > low * (1. + 1e-9) { (low, high) } else { (low / 2., high * 2.) };
                let decades = (high / low).log10();
                let step = (decades / n_ticks.max(1) as f64).ceil().max(1.);
                let mut scale = Self { low, high, step, axis, by_decades: true };
                while scale.step > 1. && scale.ticks().len() < 2 {
                    scale.step -= 1.;
                }
                if scale.ticks().len() >= LEAST_TICKS || scale.step > 1. {
                    return scale;
                }
                (n_ticks.max(LEAST_TICKS)..)
                    .map(|n_ticks| Self { axis, ..Self::new(low, high, n_ticks) })
                    .find(|scale| scale.ticks().len() >= LEAST_TICKS)
                    .expect("enough of them are within any range")
            }
        }
    }

    /// The same with no round value between two whole numbers.
    pub(crate) fn whole(self) -> Self {
        Self { step: self.step.max(1.), ..self }
    }

    /// The round values within the scale.
    pub(crate) fn ticks(&self) -> Vec<f64> {
        // A tick may miss its bound by rounding alone: 0.1 * 3 is above 0.3.
        let slack = 1e-9;
        if self.by_decades {
            let digits: &[f64] = match (self.high / self.low).log10() {
                decades if decades < 1.2 => &[1., 2., 3., 5., 7.],
                decades if decades < 3. => &[1., 2., 5.],
                _ => &[1.],
            };
            let first = self.low.log10().floor() as i32;
            let last = self.high.log10().ceil() as i32;
            return (first..=last)
                .step_by(self.step as usize)
                .flat_map(|power| digits.iter().map(move |digit| digit * 10_f64.powi(power)))
                .filter(|tick| (self.low * (1. - slack)..=self.high * (1. + slack)).contains(tick))
                .collect();
        }
        let first = (self.low / self.step - slack).ceil() as i64;
        let last = (self.high / self.step + slack).floor() as i64;
        (first..=last).map(|i| i as f64 * self.step).collect()
    }

    /// `value` as it stands beside the axis: `20k` rather than `20000`, `3e-5` rather than `0.00003`.
    pub(crate) fn label(&self, value: f64) -> String {
        if self.by_decades {
            return brief(value);
        }
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
        match self.axis {
            Axis::Linear => (value - self.low) / (self.high - self.low),
            Axis::Log => (value / self.low).ln() / (self.high / self.low).ln(),
        }
    }
}

/// A number by itself, to three digits: `0.0123`, `16.4k`, `1.2e−5`.
pub(crate) fn brief(value: f64) -> String {
    if value == 0. || !value.is_finite() {
        return if value == 0. { "0".into() } else { value.to_string() };
    }
    let (unit, suffix) = match value.abs() {
        x if !(1e-4..1e12).contains(&x) => {
            let power = x.log10().floor();
            (10_f64.powf(power), format!("e{power}"))
        }
        x if x >= 999.5e6 => (1e9, "G".into()),
        x if x >= 999.5e3 => (1e6, "M".into()),
        x if x >= 9999.5 => (1e3, "k".into()),
        _ => (1., String::new()),
    };
    let number = value / unit;
    let decimals = (2. - number.abs().log10().floor()).clamp(0., 9.) as usize;
    let text = format!("{number:.decimals$}");
    let text = match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.'),
        false => &text,
    };
    format!("{text}{suffix}").replace('-', "\u{2212}")
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
    fn decades_are_equally_far_apart() {
        let scale = Scale::along(Axis::Log, 1., 10_000., 5);
        assert_eq!(scale.ticks(), [1., 10., 100., 1000., 10_000.]);
        assert!((scale.fraction(100.) - 0.5).abs() < 1e-12);
        let scale = Scale::along(Axis::Log, 500., 16_000., 5);
        let labels: Vec<String> = scale.ticks().into_iter().map(|it| scale.label(it)).collect();
        assert_eq!(labels, ["500", "1000", "2000", "5000", "10k"]);
        assert!(!Scale::along(Axis::Log, 3., 3., 5).ticks().is_empty());
    }

    #[test]
    fn every_logarithmic_axis_has_numbers() {
        let labels = |low: f64, high: f64, n_ticks| -> Vec<String> {
            let scale = Scale::along(Axis::Log, low, high, n_ticks);
            let ticks = scale.ticks();
            assert!(ticks.iter().all(|it| (-1e-6..1. + 1e-6).contains(&scale.fraction(*it))));
            ticks.into_iter().map(|tick| scale.label(tick)).collect()
        };
        assert_eq!(labels(3.13, 4.83, 5), ["3.5", "4.0", "4.5"]);
        assert_eq!(labels(1020., 1031., 4), ["1020", "1025", "1030"]);
        for power in [-7, -3, 0, 2, 4, 6, 9] {
            for start in 0..90 {
                let low = (1. + f64::from(start) / 10.) * 10_f64.powi(power);
                for ratio in
                    [1.002, 1.01, 1.07, 1.3, 1.5, 2., 3., 4.9, 7., 12., 40., 900., 5e3, 3e6]
                {
                    for n_ticks in [2, 5, 8] {
                        let mut found = labels(low, low * ratio, n_ticks);
                        let n = found.len();
                        found.dedup();
                        assert!((2..=17).contains(&n), "{low} x {ratio}: {found:?}");
                        assert_eq!(found.len(), n, "{low} x {ratio}: {found:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_number_by_itself_has_three_digits() {
        let found = [0., 0.012345, -1.5, 16384., 1234., 2.5e6, 1.23e-5, 0.5].map(brief);
        let expected =
            ["0", "0.0123", "\u{2212}1.5", "16.4k", "1234", "2.5M", "1.23e\u{2212}5", "0.5"];
        assert_eq!(found, expected);
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
