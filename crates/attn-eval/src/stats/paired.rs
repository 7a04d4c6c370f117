//! Two settings on the same rows, each trained under the same seeds.

use serde::{Deserialize, Serialize};

use super::{Interval, StatsError, bootstrap_difference, mcnemar};

/// How two settings differ in accuracy.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Paired {
    /// Mean over seeds of the accuracy of the first less that of the second.
    pub difference: f64,
    /// Of `difference`, by the paired bootstrap over rows: an interval without zero says that these very models differ
    /// on other rows of the kind, too. The seeds stay as they are; their spread is another question.
    pub interval: Interval,
    /// One a seed.
    pub seeds: Vec<Discordant>,
}

/// Two models on the same rows.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Discordant {
    /// Rows that the first alone gets right.
    pub only_first: u64,
    /// Rows that the second alone gets right.
    pub only_second: u64,
    /// McNemar's exact p-value.
    pub mcnemar_p: f64,
}

/// Compares two settings by which rows each got right: `first[s][i]` for row `i` under the s-th seed, and `second`
/// alike.
///
/// The test is made for each seed by itself. McNemar's test takes its pairs for independent, and with the seeds in one
/// pool a row would stand there once a seed: models of one setting err on the same rows, so that the pooled p-value
/// comes out too small. The interval keeps the seeds together by the mean over them for each row, and draws rows.
///
/// # Errors
///
/// If there are no seeds or no rows, or the sides differ in seeds or rows; and as [`bootstrap_difference`].
pub fn compare_over_seeds(
    first: &[Vec<bool>],
    second: &[Vec<bool>],
    confidence: f64,
    n_resamples: usize,
    seed: u64,
) -> Result<Paired, StatsError> {
    let n_rows = first.first().ok_or(StatsError::Empty { what: "seeds" })?.len();
    let unpaired = |n_first, n_second| StatsError::Unpaired { n_first, n_second };
    if first.len() != second.len() {
        return Err(unpaired(first.len(), second.len()));
    }
    if let Some(other) = first.iter().chain(second).find(|rows| rows.len() != n_rows) {
        return Err(unpaired(n_rows, other.len()));
    }
    let means = |side: &[Vec<bool>]| -> Vec<f64> {
        let n_right = |row: usize| side.iter().filter(|rows| rows[row]).count();
        (0..n_rows).map(|row| n_right(row) as f64 / side.len() as f64).collect()
    };
    let [a, b] = [means(first), means(second)];
    let interval = bootstrap_difference(&a, &b, confidence, n_resamples, seed)?;
    let difference = a.iter().zip(&b).map(|(a, b)| a - b).sum::<f64>() / n_rows as f64;
    let seeds = first.iter().zip(second).map(|(first, second)| discordant(first, second));
    Ok(Paired { difference, interval, seeds: seeds.collect::<Result<_, _>>()? })
}

/// Compares two models by which of the same rows each got right: `first[i]` and `second[i]` for row `i`.
///
/// # Errors
///
/// If there are no rows, or more on one side.
pub fn discordant(first: &[bool], second: &[bool]) -> Result<Discordant, StatsError> {
    if first.is_empty() {
        return Err(StatsError::Empty { what: "rows" });
    }
    if first.len() != second.len() {
        return Err(StatsError::Unpaired { n_first: first.len(), n_second: second.len() });
    }
    let count = |wanted: (bool, bool)| {
        first.iter().zip(second).filter(|&(a, b)| (*a, *b) == wanted).count() as u64
    };
    let (only_first, only_second) = (count((true, false)), count((false, true)));
    Ok(Discordant { only_first, only_second, mcnemar_p: mcnemar(only_first, only_second) })
}

#[cfg(test)]
mod tests {
    use std::slice::from_ref;

    use super::*;

    /// Which of `n` rows are right: those whose number leaves a rest below `below` when divided by `by`.
    fn right(n: usize, by: usize, below: usize) -> Vec<bool> {
        (0..n).map(|row| row % by < below).collect()
    }

    /// Counts and difference by numpy 2.4.6; p by statsmodels 0.15.0, `mcnemar([[0, b], [c, 0]], exact=True)`; the
    /// interval by scipy 1.17.1, `bootstrap((mean(first) - mean(second),), mean, n_resamples=200_000,
    /// method="percentile")`, from which ours may differ by a row, as the draws differ.
    #[test]
    fn two_settings_under_two_seeds_compare_as_in_scipy_and_statsmodels() {
        let first = [right(200, 10, 8), right(200, 7, 6)];
        let second = [right(200, 9, 6), right(200, 5, 4)];

        let found = compare_over_seeds(&first, &second, 0.95, 20_000, 0).unwrap();

        assert!((found.difference - 0.095).abs() < 1e-12, "{found:?}");
        assert!((found.interval.low - 0.045).abs() < 0.005, "{found:?}");
        assert!((found.interval.high - 0.145).abs() < 0.005, "{found:?}");
        let seeds = [(53, 27, 0.004868154149559423), (35, 23, 0.14800580076020603)];
        for (found, (only_first, only_second, p)) in found.seeds.iter().zip(seeds) {
            assert_eq!((found.only_first, found.only_second), (only_first, only_second));
            assert!((found.mcnemar_p / p - 1.).abs() < 1e-12, "{found:?}");
        }
    }

    #[test]
    fn sides_that_cannot_be_paired_are_refused() {
        let compare = |first: &[Vec<bool>], second: &[Vec<bool>]| {
            compare_over_seeds(first, second, 0.95, 10, 0)
        };
        let [two, three] = [vec![true; 2], vec![true; 3]];
        let error = compare(from_ref(&two), from_ref(&three)).unwrap_err().to_string();
        assert_eq!(error, "2 values cannot be paired with 3, expected as many");
        assert!(compare(&[two.clone(), two.clone()], &[two]).is_err());
        assert!(compare(&[], &[]).is_err() && compare(&[vec![]], &[vec![]]).is_err());
    }
}
