//! Rank correlations: whether two scores of the same things put them in the same order.

use std::cmp::Ordering;

use serde::{Deserialize, Serialize};

use super::{StatsError, all_finite, student::two_sided};

/// A rank correlation.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Correlation {
    /// Number of pairs.
    pub n: usize,
    /// From −1, the order turned round, to 1, the same order.
    pub value: f64,
    /// How likely a correlation at least as far from 0 is where there is none. Approximate, and not to be relied on for
    /// a dozen pairs or fewer; `None` for two pairs.
    pub p: Option<f64>,
}

/// Spearman's ρ: Pearson's correlation of the ranks, ties taking the mean of theirs. p by Student's t with n − 2 degrees
/// of freedom, t = ρ √((n − 2)/(1 − ρ²)).
///
/// Spearman 1904, "The Proof and Measurement of Association between Two Things", <https://doi.org/10.2307/1412159>.
///
/// # Errors
///
/// If the sides differ in length, there are fewer than two pairs, a value is not finite, or all of one side are equal.
pub fn spearman(first: &[f64], second: &[f64]) -> Result<Correlation, StatsError> {
    check(first, second)?;
    let n = first.len();
    let middle = (n as f64 + 1.) / 2.;
    let [a, b] = [ranks(first), ranks(second)];
    let product = |a: &[f64], b: &[f64]| -> f64 {
        a.iter().zip(b).map(|(a, b)| (a - middle) * (b - middle)).sum()
    };
    // Below the line in one root, so that equal orders give 1 and nothing beside it.
    let value = (product(&a, &b) / (product(&a, &a) * product(&b, &b)).sqrt()).clamp(-1., 1.);
    let df = n as f64 - 2.;
    let t = value * (df / ((1. - value) * (1. + value))).sqrt();
    let p = (n > 2).then(|| if t.is_finite() { two_sided(t, df) } else { 0. });
    Ok(Correlation { n, value, p })
}

/// Kendall's τ-b: pairs of pairs in the same order less those in the opposite one, over the root of those that are not
/// tied on the first side times those not tied on the second. Time grows with n².
///
/// Kendall 1945, "The Treatment of Ties in Ranking Problems", <https://doi.org/10.1093/biomet/33.3.239>.
///
/// # Errors
///
/// As [`spearman`].
pub fn kendall(first: &[f64], second: &[f64]) -> Result<f64, StatsError> {
    check(first, second)?;
    let (mut balance, mut untied) = (0i64, [0i64; 2]);
    for i in 0..first.len() {
        for j in 0..i {
            let [a, b] = [first, second].map(|side| match side[i].partial_cmp(&side[j]) {
                Some(Ordering::Greater) => 1,
                Some(Ordering::Less) => -1,
                _ => 0,
            });
            balance += a * b;
            untied[0] += a.abs();
            untied[1] += b.abs();
        }
    }
    Ok(balance as f64 / (untied[0] as f64 * untied[1] as f64).sqrt())
}

fn check(first: &[f64], second: &[f64]) -> Result<(), StatsError> {
    if first.len() != second.len() {
        return Err(StatsError::Unpaired { n_first: first.len(), n_second: second.len() });
    }
    for side in [first, second] {
        all_finite(side)?;
        if side.iter().all(|value| *value == side[0]) {
            return Err(StatsError::Constant { n: side.len(), value: side[0] });
        }
    }
    Ok(())
}

/// The rank of each value from 1, ties taking the mean of theirs.
fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[a].partial_cmp(&values[b]).expect("the values are finite"));
    let mut ranks = vec![0.; values.len()];
    let mut start = 0;
    for tied in order.chunk_by(|&a, &b| values[a] == values[b]) {
        let rank = start as f64 + (tied.len() as f64 + 1.) / 2.;
        tied.iter().for_each(|&at| ranks[at] = rank);
        start += tied.len();
    }
    ranks
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAIRS: [(&[f64], &[f64]); 5] = [
        (
            &[0.3, 1.7, 2.2, -0.4, 5.1, 0.9, 1.1, 3.3, 2.8, -1.2, 0.0, 4.4],
            &[0.1, 1.2, 2.5, -0.9, 4.0, 1.0, 0.2, 3.1, 2.0, -1.9, 0.3, 3.9],
        ),
        (&[1., 2., 2., 3., 3., 3., 4., 5., 5., 6.], &[2., 1., 2., 2., 5., 3., 3., 3., 6., 6.]),
        (
            &[3., 1., 4., 1., 5., 9., 2., 6., 5., 3., 5., 8., 9., 7., 9.],
            &[2., 7., 1., 8., 2., 8., 1., 8., 2., 8., 4., 5., 9., 0., 4.],
        ),
        (&[1., 2., 3.], &[1., 3., 2.]),
        (&[0.0, -0.0, 1.0, 2.0], &[-1.0, -1.0, -2.0, -3.0]),
    ];

    /// From scipy 1.17.1, `scipy.stats.spearmanr(x, y)`.
    #[test]
    fn spearman_equals_scipys() {
        let expected = [
            (0.9580419580419581, 9.543581826838402e-07),
            (0.8159100194340878, 0.003997500327044157),
            (0.17916174391114706, 0.5228912570529161),
            (0.5, 0.6666666666666666),
            (-1., 0.),
        ];
        for ((first, second), (value, p)) in PAIRS.iter().zip(expected) {
            let found = spearman(first, second).unwrap();
            assert!((found.value - value).abs() < 1e-14, "{found:?}, expected {value}");
            assert!((found.p.unwrap() - p).abs() <= 1e-12 * p, "{found:?}, expected {p}");
            assert_eq!(found, spearman(second, first).unwrap());
        }
        assert_eq!(spearman(&[1., 2.], &[5., 6.]).unwrap().p, None);
    }

    /// From scipy 1.17.1, `scipy.stats.kendalltau(x, y)`, which is τ-b.
    #[test]
    fn kendall_equals_scipys() {
        let expected =
            [0.8787878787878787, 0.692535387657479, 0.1570874410539306, 0.33333333333333337, -1.];
        for ((first, second), value) in PAIRS.iter().zip(expected) {
            let found = kendall(first, second).unwrap();
            assert!((found - value).abs() < 1e-14, "{found}, expected {value}");
        }
    }

    #[test]
    fn what_has_no_order_is_refused() {
        let message = spearman(&[2., 2., 2.], &[1., 2., 3.]).unwrap_err().to_string();
        assert_eq!(message, "all 3 values are 2, expected different ones: they have no order");
        assert!(kendall(&[1., 2.], &[1.]).is_err() && spearman(&[], &[]).is_err());
        assert!(kendall(&[1., 2.], &[f64::NAN, 1.]).is_err());
    }
}
