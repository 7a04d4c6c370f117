//! The attention that a head pays to the needle while the model answers.
//!
//! ```text
//! score_h = mean_t Σ_{j within the needle} a_h(t, j)
//! ```
//!
//! over the tokens t that were written, 0 where none was. Unlike a count of copies it tells heads apart that never attend most
//! to the needle, and does not ask whether what they attend to is what is written. The whole needle counts, not the answer
//! alone. HeadKV (Fu et al. 2024, <https://arxiv.org/abs/2410.19258>) weighs heads in this way, by the largest weights alone.

use super::Step;

/// A score a head.
pub(super) fn scores(steps: &[Step], n_heads: usize) -> Vec<f64> {
    let n = steps.len().max(1) as f64;
    (0..n_heads).map(|head| steps.iter().map(|step| step.mass[head]).sum::<f64>() / n).collect()
}
