//! What can be had without understanding: rules and linear models that see words but not how they hang together.

use std::collections::{HashMap, HashSet};

use super::{Row, opinions, words};

/// The share of correct labels that a shortcut gets.
#[derive(Debug, Clone)]
pub(crate) struct Score {
    pub(crate) name: &'static str,
    pub(crate) train: f64,
    pub(crate) validation: f64,
    pub(crate) test: f64,
}

/// Scores every shortcut; what learns does so from train.
pub(crate) fn scores(rows: &[Row]) -> Vec<Score> {
    let opinions = opinions();
    let signs = |text: &str| -> Vec<i32> {
        words(text).filter_map(|word| opinions.get(word.as_str()).copied()).collect()
    };
    let [unigrams, bigrams] =
        [1, 2].map(|n| LogisticRegression::fit(rows.iter().filter(|row| row.split == "train"), n));
    vec![
        // Where good and bad words are equally many, half of the guesses are right.
        score("always the same label", rows, |_| 0.5),
        score("count good and bad words", rows, |text| step(signs(text).iter().sum())),
        score("first good or bad word", rows, |text| {
            step(signs(text).first().copied().unwrap_or(0))
        }),
        score("last good or bad word", rows, |text| step(signs(text).last().copied().unwrap_or(0))),
        score("logistic regression on words", rows, |text| unigrams.guess(text)),
        score("logistic regression on words and pairs", rows, |text| bigrams.guess(text)),
    ]
}

/// 1 for positive, 0 for negative, one half for neither.
fn step(sign: i32) -> f64 {
    f64::from(sign.signum() + 1) / 2.
}

/// `guess` gives 1 for positive and 0 for negative, or something between the two when it does not know.
fn score(name: &'static str, rows: &[Row], guess: impl Fn(&str) -> f64) -> Score {
    let share = |split| {
        let rows: Vec<&Row> = rows.iter().filter(|row| row.split == split).collect();
        let credit = |row: &&Row| 1. - (row.label as f64 - guess(&row.text)).abs();
        rows.iter().map(credit).sum::<f64>() / rows.len() as f64
    };
    Score { name, train: share("train"), validation: share("validation"), test: share("test") }
}

/// A linear classifier over the set of words, or of words and neighbouring pairs.
#[derive(Debug)]
struct LogisticRegression {
    n: usize,
    bias: f64,
    weights: HashMap<String, f64>,
}

impl LogisticRegression {
    const EPOCHS: usize = 40;
    const DECAY: f64 = 1e-4;

    /// Stochastic gradient descent with a falling rate and a little weight decay.
    fn fit<'a>(rows: impl Iterator<Item = &'a Row>, n: usize) -> Self {
        let examples: Vec<(HashSet<String>, f64)> =
            rows.map(|row| (features(&row.text, n), row.label as f64)).collect();
        let mut model = Self { n, bias: 0., weights: HashMap::new() };
        for epoch in 0..Self::EPOCHS {
            let rate = 0.3 / (1. + epoch as f64);
            for (features, label) in &examples {
                let error = label - 1. / (1. + (-model.logit(features)).exp());
                model.bias += rate * error;
                for feature in features {
                    let weight = model.weights.entry(feature.clone()).or_insert(0.);
                    *weight += rate * (error - Self::DECAY * *weight);
                }
            }
        }
        model
    }

    fn logit(&self, features: &HashSet<String>) -> f64 {
        // Sorted, as a sum of floats depends on its order and a hash set's order is not fixed.
        let mut weights: Vec<f64> =
            features.iter().filter_map(|feature| self.weights.get(feature).copied()).collect();
        weights.sort_by(f64::total_cmp);
        self.bias + weights.iter().sum::<f64>()
    }

    fn guess(&self, text: &str) -> f64 {
        f64::from(u8::from(self.logit(&features(text, self.n)) > 0.))
    }
}

/// Runs of one to `n` words.
fn features(text: &str, n: usize) -> HashSet<String> {
    let words: Vec<String> = words(text).collect();
    (1..=n).flat_map(|length| words.windows(length)).map(|run| run.join(" ")).collect()
}
