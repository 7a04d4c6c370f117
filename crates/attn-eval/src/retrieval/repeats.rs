//! How often a head copied from the needle, as the code of the paper on retrieval heads counts it.
//!
//! ```text
//! score_h = Σ_w [ j = argmax a_h within the needle, x_j = w ] / n
//! ```
//!
//! over the tokens w that were written, n the tokens of the answer in the needle. A token that is copied twice counts twice:
//! unlike the paper's definition, which is [`set`](super::set), a model that repeats itself gets scores above 1.
//!
//! <https://github.com/nightdessert/Retrieval_Head>, `retrieval_head_detection.py`.

use super::{Step, Trial, set::copies};

/// A score a head.
pub(super) fn scores(trial: &Trial, steps: &[Step], n_heads: usize) -> Vec<f64> {
    let n = trial.told[0].len() as f64;
    let count = |head: usize| steps.iter().filter(|step| copies(trial, step, head)).count();
    (0..n_heads).map(|head| count(head) as f64 / n).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeats_count_again() {
        let trial = Trial {
            prompt: vec![1, 7, 8, 3],
            needle: 1..3,
            told: std::iter::once(1..3).collect(),
            answer: String::new(),
        };
        let step = |id, most: [usize; 2]| Step { id, most: most.to_vec(), mass: vec![] };
        let steps = [step(7, [1, 0]), step(8, [2, 1]), step(7, [1, 1])];
        assert_eq!(scores(&trial, &steps, 2), [1.5, 0.5]);
    }
}
