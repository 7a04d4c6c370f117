//! Student's t: what a mean of few values, such as a figure under a few seeds, can be trusted for.

use std::f64::consts::PI;

use super::{Interval, StatsError, all_finite, checked, spread};

/// The t interval of a mean: where the mean under all seeds may lie, by that of a few.
///
/// ```text
/// mean ± t s/√n,   s² = Σ (value − mean)²/(n − 1),  t the (1 + confidence)/2 quantile of Student's t, n − 1 degrees
/// ```
///
/// `None` for a single value, which says nothing of its spread. Student 1908, "The Probable Error of a Mean",
/// <https://doi.org/10.1093/biomet/6.1.1>.
///
/// # Errors
///
/// If there are no values, one is not finite, or `confidence` does not lie between 0 and 1.
pub fn mean_interval(values: &[f64], confidence: f64) -> Result<Option<Interval>, StatsError> {
    checked(confidence)?;
    all_finite(values)?;
    let spread = spread(values)?;
    let Some(std) = spread.std else { return Ok(None) };
    let n = spread.n as f64;
    let reach = quantile((1. + confidence) / 2., n - 1.) * std / n.sqrt();
    Ok(Some(Interval { low: spread.mean - reach, high: spread.mean + reach }))
}

/// How likely a value of Student's t with `df` degrees of freedom is to lie at least as far from 0 as `t`.
pub(super) fn two_sided(t: f64, df: f64) -> f64 {
    incomplete_beta(df / 2., 0.5, df / (df + t * t), t * t / (df + t * t))
}

/// The value below which a share `p`, at least a half, of Student's t lies.
fn quantile(p: f64, df: f64) -> f64 {
    let tail = 2. * (1. - p);
    let (mut low, mut high) = (0., 1.);
    while two_sided(high, df) > tail {
        (low, high) = (high, 2. * high);
    }
    // Halved until the neighbours among the numbers are met.
    loop {
        let middle = low + (high - low) / 2.;
        if middle <= low || middle >= high {
            return middle;
        }
        if two_sided(middle, df) > tail { low = middle } else { high = middle }
    }
}

/// The regularized incomplete beta function I_x(a, b), with `y` = 1 − x given, as it may be too small to be told from
/// the difference.
///
/// The continued fraction of DLMF 8.17.22, <https://dlmf.nist.gov/8.17.E22>, by Lentz's method.
fn incomplete_beta(a: f64, b: f64, x: f64, y: f64) -> f64 {
    if x <= 0. {
        return 0.;
    }
    if y <= 0. {
        return 1.;
    }
    // Where it converges fast.
    if x > (a + 1.) / (a + b + 2.) {
        return 1. - incomplete_beta(b, a, y, x);
    }
    let log_x = if y < 0.5 { (-y).ln_1p() } else { x.ln() };
    let log_y = if x < 0.5 { (-x).ln_1p() } else { y.ln() };
    let log_front = ln_gamma(a + b) - ln_gamma(a) - ln_gamma(b) + a * log_x + b * log_y;
    let away_from_0 = |value: f64| if value.abs() < 1e-300 { 1e-300 } else { value };
    let (mut c, mut d) = (1., 1. / away_from_0(1. - (a + b) * x / (a + 1.)));
    let mut fraction = d;
    for m in 1..100_000 {
        let m = f64::from(m);
        let even = m * (b - m) * x / ((a + 2. * m - 1.) * (a + 2. * m));
        let odd = -(a + m) * (a + b + m) * x / ((a + 2. * m) * (a + 2. * m + 1.));
        let mut change = 1.;
        for term in [even, odd] {
            d = 1. / away_from_0(1. + term * d);
            c = away_from_0(1. + term / c);
            change *= c * d;
        }
        fraction *= change;
        if (change - 1.).abs() < f64::EPSILON {
            break;
        }
    }
    log_front.exp() * fraction / a
}

/// ln Γ(x) for positive `x`, to about 15 digits: Lanczos' approximation with g = 7 and the nine coefficients of
/// Godfrey 2001, <https://www.numericana.com/answer/info/godfrey.htm>.
fn ln_gamma(x: f64) -> f64 {
    const COEFFICIENTS: [f64; 9] = [
        0.999_999_999_999_809_9,
        676.520_368_121_885_1,
        -1_259.139_216_722_402_8,
        771.323_428_777_653_1,
        -176.615_029_162_140_6,
        12.507_343_278_686_905,
        -0.138_571_095_265_720_12,
        9.984_369_578_019_572e-6,
        1.505_632_735_149_311_6e-7,
    ];
    if x < 0.5 {
        return (PI / (PI * x).sin()).ln() - ln_gamma(1. - x);
    }
    let x = x - 1.;
    let terms = COEFFICIENTS.iter().enumerate().skip(1);
    let sum = COEFFICIENTS[0] + terms.map(|(i, c)| c / (x + i as f64)).sum::<f64>();
    let t = x + 7.5;
    (2. * PI).ln() / 2. + (x + 0.5) * t.ln() - t + sum.ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assert_close(found: f64, expected: f64, tolerance: f64) {
        let error = (found - expected).abs() / expected.abs().max(f64::MIN_POSITIVE);
        assert!(error <= tolerance, "{found}, expected {expected}");
    }

    /// From scipy 1.17.1, `scipy.stats.t.ppf(p, df)`.
    #[test]
    fn quantiles_equal_scipys() {
        let cases = [
            (1., 0.975, 12.706204736174694),
            (2., 0.975, 4.302652729749462),
            (4., 0.975, 2.7764451051977934),
            (9., 0.95, 1.833112932656237),
            (30., 0.995, 2.7499956535672254),
            (1000., 0.975, 1.9623390808264083),
            (2., 0.9995, 31.599054576445365),
        ];
        for (df, p, expected) in cases {
            assert_close(quantile(p, df), expected, 1e-11);
        }
    }

    /// From scipy 1.17.1, `2 * scipy.stats.t.sf(t, df)`.
    #[test]
    fn tails_equal_scipys() {
        let cases = [
            (0.5, 1., 0.7048327646991335, 1e-13),
            (2.0, 3., 0.13932596855884305, 1e-13),
            (4.3, 7., 0.0035666016877670356, 1e-13),
            (12.0, 10., 2.921408824769984e-07, 1e-12),
            (40.0, 50., 1.2412423784372691e-39, 1e-11),
            // Logarithms of large factorials cancel.
            (1.96, 1e6, 0.04999606758526985, 1e-8),
            (0.0, 4., 1.0, 0.),
        ];
        for (t, df, expected, tolerance) in cases {
            assert_close(two_sided(t, df), expected, tolerance);
        }
    }

    /// From scipy 1.17.1, `scipy.stats.t.interval(confidence, n - 1, loc=mean(v), scale=scipy.stats.sem(v))`.
    #[test]
    fn intervals_of_a_mean_equal_scipys() {
        let five = [81.2, 80.7, 82.4, 79.9, 81.8];
        let cases = [
            (&five[..], 0.95, 79.99936805475325, 82.40063194524679),
            (&five[..], 0.99, 79.2090283898857, 83.19097161011433),
            (&[0.9, 0.91, 0.95][..], 0.95, 0.8542758939227157, 0.9857241060772841),
        ];
        for (values, confidence, low, high) in cases {
            let found = mean_interval(values, confidence).unwrap().unwrap();
            assert_close(found.low, low, 1e-12);
            assert_close(found.high, high, 1e-12);
        }
    }

    #[test]
    fn a_single_value_has_no_interval() {
        assert_eq!(mean_interval(&[0.9], 0.95).unwrap(), None);
        assert_eq!(mean_interval(&[], 0.95).unwrap_err(), StatsError::Empty { what: "values" });
        assert_eq!(mean_interval(&[1., 2.], 1.).unwrap_err(), StatsError::Confidence(1.));
    }
}
