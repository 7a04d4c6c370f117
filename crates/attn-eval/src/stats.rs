//! How far a number can be trusted: intervals, paired comparisons, rank correlations, spread over seeds. Plain numbers
//! in and out.

mod paired;
mod rank;
mod student;

use std::f64::consts::LN_2;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use serde::{Deserialize, Serialize};

pub use paired::{Discordant, Paired, compare_over_seeds, discordant};
pub use rank::{Correlation, kendall, spearman};
pub use student::mean_interval;

/// Why a statistic could not be computed.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum StatsError {
    /// Nothing was measured.
    #[error("there are no {what}, expected at least one")]
    Empty {
        /// What is missing.
        what: &'static str,
    },

    /// More successes than trials.
    #[error("{correct} of {n} cannot be correct, expected at most {n}")]
    Count {
        /// Successes.
        correct: u64,
        /// Trials.
        n: u64,
    },

    /// A confidence that is no probability, or a certain one.
    #[error("confidence is {0}, expected a number between 0 and 1, such as 0.95")]
    Confidence(f64),

    /// A value that no mean can include.
    #[error("value {index} is {value}, expected a finite number")]
    NotFinite {
        /// Its place, from zero.
        index: usize,
        /// NaN or an infinity.
        value: f64,
    },

    /// A size that nothing can be divided by.
    #[error("value {index} is {value}, expected a number above 0")]
    NotPositive {
        /// Its place, from zero.
        index: usize,
        /// The value.
        value: f64,
    },

    /// Values without an order to compare.
    #[error("all {n} values are {value}, expected different ones: they have no order")]
    Constant {
        /// How many there are.
        n: usize,
        /// What they are.
        value: f64,
    },

    /// Pairs with one side missing.
    #[error("{n_first} values cannot be paired with {n_second}, expected as many")]
    Unpaired {
        /// Values on the first side.
        n_first: usize,
        /// Values on the second side.
        n_second: usize,
    },
}

/// A range that holds the true value with the confidence it was made for.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// The lower end.
    pub low: f64,
    /// The upper end, at least `low`.
    pub high: f64,
}

/// Mean and spread of a few runs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// Number of values.
    pub n: usize,
    /// Their mean.
    pub mean: f64,
    /// Their sample standard deviation (`n − 1` below the line); none for a single value.
    pub std: Option<f64>,
}

/// The Wilson score interval of a proportion, such as accuracy: `correct` of `n`.
///
/// ```text
/// (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n),   p = correct/n,  z = Φ⁻¹((1 + confidence)/2)
/// ```
///
/// Unlike `p ± z √(p(1−p)/n)` it stays within 0 and 1 and does not shrink to a point where everything is correct.
/// Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference",
/// <https://doi.org/10.1080/01621459.1927.10502953>.
///
/// # Errors
///
/// If `n` is 0, `correct` exceeds it, or `confidence` does not lie between 0 and 1.
pub fn wilson(correct: u64, n: u64, confidence: f64) -> Result<Interval, StatsError> {
    let z = normal_quantile((1. + checked(confidence)?) / 2.);
    if n == 0 {
        return Err(StatsError::Empty { what: "trials" });
    }
    if correct > n {
        return Err(StatsError::Count { correct, n });
    }
    let (p, total) = (correct as f64 / n as f64, n as f64);
    let squared = z * z / total;
    let middle = p + squared / 2.;
    let reach = z * (p * (1. - p) / total + squared / (4. * total)).sqrt();
    // At the ends the formula gives 0 and 1 exactly, and its rounding does not.
    let low = if correct == 0 { 0. } else { (middle - reach) / (1. + squared) };
    let high = if correct == n { 1. } else { (middle + reach) / (1. + squared) };
    Ok(Interval { low, high })
}

/// The median of `values`, and where the median of what they were drawn from lies with at least 95 % confidence: between two of them,
/// by their ranks, whatever the distribution. No interval of fewer than six.
///
/// # Errors
///
/// If there are no values, or one is not finite.
pub fn median(mut values: Vec<f64>) -> Result<(f64, Option<Interval>), StatsError> {
    all_finite(&values)?;
    values.sort_by(f64::total_cmp);
    let n = values.len();
    let interval =
        median_ranks(n).map(|[low, high]| Interval { low: values[low], high: values[high] });
    Ok(((values[(n - 1) / 2] + values[n / 2]) / 2., interval))
}

/// The places, from 0, of the sorted values between which the median of what they were drawn from lies with at least 95 % confidence:
/// each value lies below it with probability ½. `None` for fewer than six.
///
/// Conover, Practical Nonparametric Statistics, section 3.2.
fn median_ranks(n: usize) -> Option<[usize; 2]> {
    // P(k of n below the median), as a logarithm: of thousands it is smaller than any f64.
    let mut ln_p = -(n as f64) * LN_2;
    let mut at_most = 0.0;
    let mut low = None;
    for k in 0..n / 2 {
        at_most += ln_p.exp();
        if at_most > 0.025 {
            break;
        }
        low = Some(k);
        ln_p += ((n - k) as f64 / (k + 1) as f64).ln();
    }
    low.map(|low| [low, n - 1 - low])
}

/// The bootstrap interval of a mean: the middle `confidence` of the means of `n_resamples` samples drawn from `values`
/// with replacement (percentile method). Equal seeds give equal intervals on every machine.
///
/// Efron 1979, "Bootstrap Methods: Another Look at the Jackknife", <https://doi.org/10.1214/aos/1176344552>.
///
/// # Errors
///
/// If there are no values or no resamples, a value is not finite, or `confidence` does not lie between 0 and 1.
pub fn bootstrap_mean(
    values: &[f64],
    confidence: f64,
    n_resamples: usize,
    seed: u64,
) -> Result<Interval, StatsError> {
    checked(confidence)?;
    all_finite(values)?;
    if n_resamples == 0 {
        return Err(StatsError::Empty { what: "resamples" });
    }
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut resampled_mean = || {
        let sum: f64 = (0..values.len()).map(|_| values[below(values.len(), &mut rng)]).sum();
        sum / values.len() as f64
    };
    let mut means: Vec<f64> = (0..n_resamples).map(|_| resampled_mean()).collect();
    means.sort_by(f64::total_cmp);
    let tail = (1. - confidence) / 2.;
    Ok(Interval { low: quantile(&means, tail), high: quantile(&means, 1. - tail) })
}

/// [`bootstrap_mean`] of many columns that were measured on the same rows, `rows[row][column]`: one interval a column, the
/// same rows drawn for all. One column has the interval that [`bootstrap_mean`] gives it.
///
/// # Errors
///
/// As [`bootstrap_mean`], and if rows differ in length.
pub fn bootstrap_means(
    rows: &[Vec<f64>],
    confidence: f64,
    n_resamples: usize,
    seed: u64,
) -> Result<Vec<Interval>, StatsError> {
    checked(confidence)?;
    let n_columns = rows.first().ok_or(StatsError::Empty { what: "values" })?.len();
    for row in rows {
        if row.len() != n_columns {
            return Err(StatsError::Unpaired { n_first: n_columns, n_second: row.len() });
        }
        if !row.is_empty() {
            all_finite(row)?;
        }
    }
    if n_resamples == 0 {
        return Err(StatsError::Empty { what: "resamples" });
    }
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut means = vec![Vec::with_capacity(n_resamples); n_columns];
    for _ in 0..n_resamples {
        let mut sums = vec![0.; n_columns];
        for _ in 0..rows.len() {
            let row = &rows[below(rows.len(), &mut rng)];
            sums.iter_mut().zip(row).for_each(|(sum, value)| *sum += value);
        }
        means.iter_mut().zip(sums).for_each(|(means, sum)| means.push(sum / rows.len() as f64));
    }
    let tail = (1. - confidence) / 2.;
    let interval = |mut means: Vec<f64>| {
        means.sort_by(f64::total_cmp);
        Interval { low: quantile(&means, tail), high: quantile(&means, 1. - tail) }
    };
    Ok(means.into_iter().map(interval).collect())
}

/// The bootstrap interval of `Σ numerators / Σ denominators`, pairs drawn together: of a mean per token, say, where the
/// texts, not the tokens, are what was drawn from the world. Method as [`bootstrap_mean`].
///
/// # Errors
///
/// As [`bootstrap_mean`], and if the sides differ in length or a denominator is not positive.
pub fn bootstrap_ratio(
    numerators: &[f64],
    denominators: &[f64],
    confidence: f64,
    n_resamples: usize,
    seed: u64,
) -> Result<Interval, StatsError> {
    let (n_first, n_second) = (numerators.len(), denominators.len());
    if n_first != n_second {
        return Err(StatsError::Unpaired { n_first, n_second });
    }
    checked(confidence)?;
    all_finite(numerators)?;
    all_finite(denominators)?;
    if let Some(index) = denominators.iter().position(|&x| x <= 0.) {
        return Err(StatsError::NotPositive { index, value: denominators[index] });
    }
    if n_resamples == 0 {
        return Err(StatsError::Empty { what: "resamples" });
    }
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut resampled = || {
        let draws = (0..n_first).map(|_| below(n_first, &mut rng));
        let (top, bottom) =
            draws.fold((0., 0.), |(a, b), i| (a + numerators[i], b + denominators[i]));
        top / bottom
    };
    let mut ratios: Vec<f64> = (0..n_resamples).map(|_| resampled()).collect();
    ratios.sort_by(f64::total_cmp);
    let tail = (1. - confidence) / 2.;
    Ok(Interval { low: quantile(&ratios, tail), high: quantile(&ratios, 1. - tail) })
}

/// [`bootstrap_ratio`] of many columns over the same denominators, `Σ rows[row][column] / Σ denominators[row]`: one interval a
/// column, the same rows drawn for all. A row may have a denominator of 0, as a text without a token that counts; a
/// resample of such rows alone is left out.
///
/// # Errors
///
/// As [`bootstrap_ratio`], if rows differ in length, a denominator is negative, or all are 0.
pub fn bootstrap_ratios(
    rows: &[Vec<f64>],
    denominators: &[f64],
    confidence: f64,
    n_resamples: usize,
    seed: u64,
) -> Result<Vec<Interval>, StatsError> {
    checked(confidence)?;
    let n_columns = rows.first().ok_or(StatsError::Empty { what: "values" })?.len();
    let unpaired = |n_first, n_second| StatsError::Unpaired { n_first, n_second };
    if rows.len() != denominators.len() {
        return Err(unpaired(rows.len(), denominators.len()));
    }
    for row in rows {
        if row.len() != n_columns {
            return Err(unpaired(n_columns, row.len()));
        }
        if !row.is_empty() {
            all_finite(row)?;
        }
    }
    all_finite(denominators)?;
    if let Some(index) = denominators.iter().position(|&x| x < 0.) {
        return Err(StatsError::NotPositive { index, value: denominators[index] });
    }
    if denominators.iter().sum::<f64>() == 0. {
        return Err(StatsError::NotPositive { index: 0, value: 0. });
    }
    if n_resamples == 0 {
        return Err(StatsError::Empty { what: "resamples" });
    }
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut ratios = vec![Vec::with_capacity(n_resamples); n_columns];
    for _ in 0..n_resamples {
        let (mut tops, mut bottom) = (vec![0.; n_columns], 0.);
        for _ in 0..rows.len() {
            let at = below(rows.len(), &mut rng);
            tops.iter_mut().zip(&rows[at]).for_each(|(top, value)| *top += value);
            bottom += denominators[at];
        }
        if bottom > 0. {
            ratios.iter_mut().zip(tops).for_each(|(ratios, top)| ratios.push(top / bottom));
        }
    }
    let tail = (1. - confidence) / 2.;
    let interval = |mut ratios: Vec<f64>| -> Result<Interval, StatsError> {
        if ratios.is_empty() {
            return Err(StatsError::Empty { what: "resamples" });
        }
        ratios.sort_by(f64::total_cmp);
        Ok(Interval { low: quantile(&ratios, tail), high: quantile(&ratios, 1. - tail) })
    };
    ratios.into_iter().map(interval).collect()
}

/// The bootstrap interval of the mean of `first − second`, paired by place: two models on the same examples. An interval
/// without zero says that the difference is not one of the examples that happened to be drawn.
///
/// # Errors
///
/// As [`bootstrap_mean`], and if the sides differ in length.
pub fn bootstrap_difference(
    first: &[f64],
    second: &[f64],
    confidence: f64,
    n_resamples: usize,
    seed: u64,
) -> Result<Interval, StatsError> {
    if first.len() != second.len() {
        return Err(StatsError::Unpaired { n_first: first.len(), n_second: second.len() });
    }
    all_finite(first)?;
    all_finite(second)?;
    let differences: Vec<f64> = first.iter().zip(second).map(|(a, b)| a - b).collect();
    bootstrap_mean(&differences, confidence, n_resamples, seed)
}

/// The p-value of McNemar's exact test: how likely two equally good classifiers are to differ at least this much, given
/// the examples that only the first gets right and those that only the second does. Two-sided; 1 if there are none.
///
/// ```text
/// min(1, 2 P(X ≤ min(b, c))),   X ~ Binomial(b + c, 1/2)
/// ```
///
/// McNemar 1947, "Note on the sampling error of the difference between correlated proportions or percentages",
/// <https://doi.org/10.1007/BF02295996>.
pub fn mcnemar(only_first: u64, only_second: u64) -> f64 {
    let (fewer, n) = (only_first.min(only_second), only_first + only_second);
    // ln C(n, fewer) 2⁻ⁿ, the largest term of the sum; each below it is the one before times k/(n − k + 1).
    let log_term: f64 = (1..=fewer).map(|i| ((n - fewer + i) as f64 / i as f64).ln()).sum::<f64>()
        - n as f64 * LN_2;
    let mut ratio = 1.;
    let mut sum = 1.;
    for k in (1..=fewer).rev() {
        ratio *= k as f64 / (n - k + 1) as f64;
        sum += ratio;
        if ratio < sum * f64::EPSILON / 4. {
            break;
        }
    }
    (2. * log_term.exp() * sum).min(1.)
}

/// Mean and spread over seeds.
///
/// # Errors
///
/// If there are no values, or one is not finite.
pub fn spread(values: &[f64]) -> Result<Spread, StatsError> {
    all_finite(values)?;
    let n = values.len();
    let mean = values.iter().sum::<f64>() / n as f64;
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    let std = (n > 1).then(|| (squares / (n - 1) as f64).sqrt());
    Ok(Spread { n, mean, std })
}

fn checked(confidence: f64) -> Result<f64, StatsError> {
    if confidence > 0. && confidence < 1. {
        Ok(confidence)
    } else {
        Err(StatsError::Confidence(confidence))
    }
}

fn all_finite(values: &[f64]) -> Result<(), StatsError> {
    if values.is_empty() {
        return Err(StatsError::Empty { what: "values" });
    }
    match values.iter().position(|value| !value.is_finite()) {
        None => Ok(()),
        Some(index) => Err(StatsError::NotFinite { index, value: values[index] }),
    }
}

/// A number below `n`, each equally likely up to `n` parts in 2⁶⁴. Written out, as a library's way may change with its
/// version and move published intervals.
pub(crate) fn below(n: usize, rng: &mut ChaCha8Rng) -> usize {
    ((u128::from(rng.next_u64()) * n as u128) >> 64) as usize
}

/// The value below which a share `p` of the `sorted` values lies, on a straight line between neighbours.
fn quantile(sorted: &[f64], p: f64) -> f64 {
    let place = p * (sorted.len() - 1) as f64;
    let (below, part) = (place.floor() as usize, place.fract());
    let above = (below + 1).min(sorted.len() - 1);
    sorted[below] + part * (sorted[above] - sorted[below])
}

/// The inverse of the standard normal distribution function, for `p` between 0 and 1, to about 16 digits.
///
/// Wichura 1988, "Algorithm AS 241: The Percentage Points of the Normal Distribution" (PPND16),
/// <https://doi.org/10.2307/2347330>.
fn normal_quantile(p: f64) -> f64 {
    let rational = |above: [f64; 8], below: [f64; 8], r: f64| {
        let polynomial = |c: [f64; 8]| c.iter().rev().fold(0., |sum, c| sum * r + c);
        polynomial(above) / polynomial(below)
    };
    let q = p - 0.5;
    if q.abs() <= 0.425 {
        return q * rational(CENTER.0, CENTER.1, 0.180625 - q * q);
    }
    let r = (-(if q < 0. { p } else { 1. - p }).ln()).sqrt();
    let size =
        if r <= 5. { rational(SIDE.0, SIDE.1, r - 1.6) } else { rational(TAIL.0, TAIL.1, r - 5.) };
    if q < 0. { -size } else { size }
}

/// Coefficients for |p − 1/2| ≤ 0.425, lowest power first: above and below the line.
const CENTER: ([f64; 8], [f64; 8]) = (
    [
        3.3871328727963665,
        133.14166789178438,
        1971.5909503065513,
        13731.69376550946,
        45921.95393154987,
        67265.7709270087,
        33430.57558358813,
        2509.0809287301227,
    ],
    [
        1.0,
        42.31333070160091,
        687.1870074920579,
        5394.196021424751,
        21213.794301586597,
        39307.89580009271,
        28729.085735721943,
        5226.495278852854,
    ],
);

/// Coefficients for the tails down to e⁻²⁵, lowest power first: above and below the line.
const SIDE: ([f64; 8], [f64; 8]) = (
    [
        1.4234371107496835,
        4.630337846156546,
        5.769497221460691,
        3.6478483247632045,
        1.2704582524523684,
        0.2417807251774506,
        0.022723844989269184,
        0.0007745450142783414,
    ],
    [
        1.0,
        2.053191626637759,
        1.6763848301838038,
        0.6897673349851,
        0.14810397642748008,
        0.015198666563616457,
        0.0005475938084995345,
        1.0507500716444169e-09,
    ],
);

/// Coefficients for what lies beyond, lowest power first: above and below the line.
const TAIL: ([f64; 8], [f64; 8]) = (
    [
        6.657904643501103,
        5.463784911164114,
        1.7848265399172913,
        0.29656057182850487,
        0.026532189526576124,
        0.0012426609473880784,
        2.7115555687434876e-05,
        2.0103343992922881e-07,
    ],
    [
        1.0,
        0.599832206555888,
        0.1369298809227358,
        0.014875361290850615,
        0.0007868691311456133,
        1.8463183175100548e-05,
        1.421511758316446e-07,
        2.0442631033899397e-15,
    ],
);

#[cfg(test)]
mod tests {
    use super::*;

    fn assert_close(found: f64, expected: f64, tolerance: f64) {
        let error = (found - expected).abs() / expected.abs().max(f64::MIN_POSITIVE);
        assert!(error <= tolerance, "{found}, expected {expected}");
    }

    #[test]
    fn the_median_lies_between_two_of_the_values() {
        // Conover, table A3 with p = 1/2: 15 values have the fourth and the twelfth, with 96.5 %.
        assert_eq!(median_ranks(15), Some([3, 11]));
        assert_eq!(median_ranks(9), Some([1, 7]));
        assert_eq!(median_ranks(6), Some([0, 5]));
        assert_eq!(median_ranks(5), None);
        assert_eq!(median_ranks(0), None);
        // n/2 - 1.96 sqrt(n)/2 of many.
        let [low, high] = median_ranks(10_000).unwrap();
        assert!((4900..=4902).contains(&low) && low + high == 9_999, "{low} {high}");
    }

    #[test]
    fn the_interval_of_a_ratio_is_that_of_the_mean_where_sizes_are_equal() {
        let values: Vec<f64> = (0..40).map(|i| f64::from(i * 7 % 11)).collect();
        let of = |size: f64| {
            let (sums, sizes): (Vec<f64>, Vec<f64>) =
                values.iter().map(|value| (value * size, size)).unzip();
            bootstrap_ratio(&sums, &sizes, 0.95, 500, 3).unwrap()
        };
        let mean = bootstrap_mean(&values, 0.95, 500, 3).unwrap();
        for size in [1.0, 4.0] {
            let Interval { low, high } = of(size);
            assert!((low - mean.low).abs() < 1e-12 && (high - mean.high).abs() < 1e-12);
        }
        // A large pair weighs more than a small one: 90 of 100 and 0 of 1 are not 45 %.
        let ratio = bootstrap_ratio(&[90.; 30], &[100.; 30], 0.95, 50, 0).unwrap();
        assert_eq!((ratio.low, ratio.high), (0.9, 0.9));
        let error = bootstrap_ratio(&[1., 2.], &[1., 0.], 0.95, 50, 0).unwrap_err();
        assert_eq!(error, StatsError::NotPositive { index: 1, value: 0. });
    }

    /// From scipy 1.17.1, `scipy.stats.norm.ppf`.
    #[test]
    fn normal_quantiles_equal_scipys() {
        let cases = [
            (0.6, 0.2533471031357997),
            (0.9, 1.2815515655446004),
            (0.95, 1.6448536269514722),
            (0.975, 1.959963984540054),
            (0.995, 2.5758293035489004),
            (0.9999995, 4.89163847571478),
            (0.025, -1.9599639845400545),
            (1e-10, -6.361340902404056),
            (1e-300, -37.0470962993612),
        ];
        for (p, expected) in cases {
            assert_close(normal_quantile(p), expected, 1e-14);
        }
        assert_eq!(normal_quantile(0.5), 0.);
    }

    /// From statsmodels 0.15.0, `proportion_confint(…, method="wilson")`.
    #[test]
    fn wilson_intervals_equal_statsmodels() {
        let cases = [
            (0, 10, 0.95, 0., 0.2775327998628892),
            (10, 10, 0.95, 0.7224672001371107, 1.),
            (5, 10, 0.95, 0.236593090512564, 0.7634069094874361),
            (708, 872, 0.95, 0.7846427605831067, 0.8364742172915042),
            (444, 872, 0.9, 0.48134282173236503, 0.5369490481657244),
            (1, 1, 0.95, 0.20654931437723745, 1.),
            (67_000, 67_349, 0.99, 0.9940550247299794, 0.9954835655055262),
            (3, 7, 0.5, 0.3106034777497514, 0.5552572159915451),
        ];
        for (correct, n, confidence, low, high) in cases {
            let found = wilson(correct, n, confidence).unwrap();
            assert_close(found.low, low, 1e-13);
            assert_close(found.high, high, 1e-13);
        }
    }

    #[test]
    fn wilson_intervals_hold_the_proportion_and_stay_within_bounds() {
        for n in [1, 2, 7, 63, 1000] {
            for correct in 0..=n {
                let Interval { low, high } = wilson(correct, n, 0.95).unwrap();
                let p = correct as f64 / n as f64;
                assert!(
                    0. <= low && low <= p && p <= high && high <= 1.,
                    "{correct} of {n}: {low} to {high}"
                );
                assert!(low < high);
            }
        }
    }

    /// From statsmodels 0.15.0, `mcnemar(…, exact=True)`.
    #[test]
    fn mcnemar_equals_statsmodels() {
        let cases = [
            (0, 0, 1.),
            (0, 1, 1.),
            (1, 5, 0.21875),
            (10, 10, 1.),
            (3, 12, 0.03515625),
            (25, 40, 0.08168153394154003),
            (120, 80, 0.005685155996750306),
            (1000, 1100, 0.03072070786424249),
            (0, 60, 1.734723475976807e-18),
            (5000, 5600, 5.902161563805957e-09),
        ];
        for (only_first, only_second, expected) in cases {
            assert_close(mcnemar(only_first, only_second), expected, 1e-10);
            assert_eq!(mcnemar(only_first, only_second), mcnemar(only_second, only_first));
        }
    }

    const FIRST: [f64; 12] = [0.3, 1.7, 2.2, -0.4, 5.1, 0.9, 1.1, 3.3, 2.8, -1.2, 0.0, 4.4];
    const SECOND: [f64; 12] = [0.1, 1.2, 2.5, -0.9, 4.0, 1.0, 0.2, 3.1, 2.0, -1.9, 0.3, 3.9];

    /// From scipy 1.17.1, `scipy.stats.bootstrap(…, method="percentile")` with 2,000,000 resamples. The draws differ, so
    /// the tolerance is a few standard errors of a percentile of 100,000 resamples.
    #[test]
    fn bootstrap_intervals_agree_with_scipys() {
        let found = bootstrap_mean(&FIRST, 0.95, 100_000, 1).unwrap();
        assert!((found.low - 0.6583333).abs() < 0.02, "{found:?}");
        assert!((found.high - 2.7583333).abs() < 0.02, "{found:?}");

        let found = bootstrap_difference(&FIRST, &SECOND, 0.9, 100_000, 1).unwrap();
        assert!((found.low - 0.1833333).abs() < 0.01, "{found:?}");
        assert!((found.high - 0.6).abs() < 0.01, "{found:?}");
    }

    /// The mean of resampled zeros and ones is binomial. From scipy 1.17.1, `scipy.stats.binom.ppf`.
    #[test]
    fn the_bootstrap_of_zeros_and_ones_is_binomial() {
        for (n, n_ones, confidence, low, high) in
            [(872, 708, 0.95, 0.7855504587155964, 0.8371559633027523), (100, 50, 0.9, 0.42, 0.58)]
        {
            let values: Vec<f64> = (0..n).map(|i| f64::from(u8::from(i < n_ones))).collect();
            let found = bootstrap_mean(&values, confidence, 20_000, 7).unwrap();
            // One count more or less, as the draws are random.
            assert!((found.low - low).abs() < 1.5 / n as f64, "{found:?}");
            assert!((found.high - high).abs() < 1.5 / n as f64, "{found:?}");
        }
    }

    #[test]
    fn the_seed_alone_decides_the_bootstrap() {
        let draw = |seed| bootstrap_mean(&FIRST, 0.95, 500, seed).unwrap();
        assert_eq!(draw(3), draw(3));
        assert_ne!(draw(3), draw(4));
    }

    #[test]
    fn columns_are_drawn_together_each_as_if_alone() {
        let rows: Vec<Vec<f64>> = FIRST.iter().zip(SECOND).map(|(&a, b)| vec![a, b]).collect();
        let alone = [FIRST, SECOND].map(|column| bootstrap_mean(&column, 0.9, 500, 3).unwrap());
        assert_eq!(bootstrap_means(&rows, 0.9, 500, 3).unwrap(), alone);

        assert_eq!(bootstrap_means(&[vec![], vec![]], 0.9, 10, 0).unwrap(), []);
        let means = |rows: &[Vec<f64>]| bootstrap_means(rows, 0.9, 10, 0).unwrap_err();
        assert_eq!(means(&[]), StatsError::Empty { what: "values" });
        assert_eq!(
            means(&[vec![1.], vec![1., 2.]]),
            StatsError::Unpaired { n_first: 1, n_second: 2 }
        );
    }

    #[test]
    fn ratios_are_drawn_together_each_as_if_alone() {
        let (x, y): (Vec<f64>, Vec<f64>) =
            (0..20).map(|i| (f64::from(i * i % 7), f64::from(i % 3))).unzip();
        let n: Vec<f64> = (0..20).map(|i| f64::from(1 + i % 5)).collect();
        let rows: Vec<Vec<f64>> = x.iter().zip(&y).map(|(&x, &y)| vec![x, y]).collect();

        let found = bootstrap_ratios(&rows, &n, 0.9, 300, 3).unwrap();

        let alone = [&x, &y].map(|column| bootstrap_ratio(column, &n, 0.9, 300, 3).unwrap());
        assert_eq!(found, alone);
        // A text that has none of what is counted is drawn with the others.
        let with_none = bootstrap_ratios(&[vec![1.0], vec![0.0]], &[2.0, 0.0], 0.9, 50, 0).unwrap();
        assert_eq!(with_none, [Interval { low: 0.5, high: 0.5 }]);
        assert!(bootstrap_ratios(&[vec![1.0]], &[0.0], 0.9, 50, 0).is_err());
        assert!(bootstrap_ratios(&rows, &n[1..], 0.9, 50, 0).is_err());
    }

    #[test]
    fn pairing_matters() {
        let paired = bootstrap_difference(&FIRST, &SECOND, 0.95, 5_000, 0).unwrap();
        assert!(paired.low > 0., "the first is larger nearly everywhere: {paired:?}");
        let mut turned = SECOND;
        turned.reverse();
        let unpaired = bootstrap_difference(&FIRST, &turned, 0.95, 5_000, 0).unwrap();
        assert!(unpaired.low < 0. && unpaired.high > 0., "{unpaired:?}");
    }

    /// From numpy 2.4.6, `numpy.quantile`.
    #[test]
    fn quantiles_equal_numpys() {
        assert_close(quantile(&[1., 2., 3., 4., 10.], 0.3), 2.2, 1e-15);
        assert_eq!(quantile(&[5.], 0.3), 5.);
        assert_eq!(quantile(&[1., 2.], 1.), 2.);
    }

    /// From numpy 2.4.6, `mean` and `std(ddof=1)`.
    #[test]
    fn spread_equals_numpys() {
        let found = spread(&[81.2, 80.7, 82.4, 79.9, 81.8]).unwrap();
        assert_eq!(found.n, 5);
        assert_close(found.mean, 81.20000000000002, 1e-15);
        assert_close(found.std.unwrap(), 0.9669539802906848, 1e-14);
        assert_eq!(spread(&[3.]).unwrap(), Spread { n: 1, mean: 3., std: None });
    }

    #[test]
    fn what_cannot_be_computed_is_refused() {
        let messages = [
            (wilson(0, 0, 0.95).unwrap_err(), "there are no trials, expected at least one"),
            (wilson(3, 2, 0.95).unwrap_err(), "3 of 2 cannot be correct, expected at most 2"),
            (
                wilson(1, 2, 1.).unwrap_err(),
                "confidence is 1, expected a number between 0 and 1, such as 0.95",
            ),
            (
                wilson(1, 2, f64::NAN).unwrap_err(),
                "confidence is NaN, expected a number between 0 and 1, such as 0.95",
            ),
            (
                bootstrap_mean(&[], 0.95, 10, 0).unwrap_err(),
                "there are no values, expected at least one",
            ),
            (
                bootstrap_mean(&[1.], 0.95, 0, 0).unwrap_err(),
                "there are no resamples, expected at least one",
            ),
            (spread(&[1., f64::NAN]).unwrap_err(), "value 1 is NaN, expected a finite number"),
            (
                bootstrap_difference(&[1.], &[1., 2.], 0.95, 10, 0).unwrap_err(),
                "1 values cannot be paired with 2, expected as many",
            ),
        ];
        for (error, message) in messages {
            assert_eq!(error.to_string(), message);
        }
    }
}
