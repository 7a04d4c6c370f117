//! The share of the needle that a head copied.
//!
//! ```text
//! score_h = |g_h ∩ k| / |k|
//! g_h = { x_j : j = argmax a_h, j within the needle, x_j = w, for a token w that was written }
//! ```
//!
//! k are the tokens of the needle, a_h the head's attention from the token before w. Both are sets: a token that is copied
//! twice, or stands twice in the needle, counts once.
//!
//! Wu et al. 2024, <https://arxiv.org/abs/2404.15574>, section 2. k is here the answer as the needle tells it (`told`), not
//! the whole sentence, whose beginning the question says already and no answer repeats; the paper's code takes the answer, too.
//! Where a needle tells it twice, a copy of either is one, and k are the tokens of the first.

use std::collections::BTreeSet;

use super::{Step, Trial};

/// A score a head.
pub(super) fn scores(trial: &Trial, steps: &[Step], n_heads: usize) -> Vec<f64> {
    let all: BTreeSet<u32> = trial.prompt[trial.told[0].clone()].iter().copied().collect();
    let score = |head: usize| {
        let copied: BTreeSet<u32> =
            steps.iter().filter(|step| copies(trial, step, head)).map(|step| step.id).collect();
        copied.intersection(&all).count() as f64 / all.len() as f64
    };
    (0..n_heads).map(score).collect()
}

/// Whether the token that was written is the one in the needle that the head attends to most.
pub(super) fn copies(trial: &Trial, step: &Step, head: usize) -> bool {
    let at = step.most[head];
    trial.told.iter().any(|told| told.contains(&at)) && trial.prompt[at] == step.id
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A text of nine tokens whose needle tells 7 8 7, and two heads.
    pub(crate) fn case() -> (Trial, Vec<Step>) {
        let trial = Trial {
            prompt: vec![1, 2, 5, 7, 8, 7, 3, 7, 4],
            needle: 2..6,
            told: std::iter::once(3..6).collect(),
            answer: String::new(),
        };
        let step = |id, most: [usize; 2]| Step { id, most: most.to_vec(), mass: vec![0.25, 0.5] };
        // The second head looks at the 7 behind the needle, at another token, and at what was written before.
        let steps = vec![step(7, [3, 7]), step(8, [4, 3]), step(7, [5, 9]), step(7, [3, 5])];
        (trial, steps)
    }

    #[test]
    fn a_token_counts_once() {
        let (trial, steps) = case();
        assert_eq!(scores(&trial, &steps, 2), [1.0, 0.5]);
        assert_eq!(scores(&trial, &steps[..1], 2), [0.5, 0.0]);
        assert_eq!(scores(&trial, &[], 2), [0.0, 0.0]);
    }

    #[test]
    fn a_copy_of_any_telling_is_one() {
        let (trial, steps) = case();
        let twice = Trial { needle: 2..8, told: vec![3..5, 7..8], ..trial };
        assert_eq!(scores(&twice, &steps, 2), [1.0, 0.5]);
    }
}
