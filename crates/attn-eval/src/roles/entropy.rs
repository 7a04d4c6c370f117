//! How evenly a head spreads its attention.
//!
//! ```text
//! H = −Σ_j p_j ln p_j,   p_j = a_j / Σ a      (nats; 0 where all is on one key)
//! ```
//!
//! Weights that do not add up to 1, as some attention kinds have them, are divided by their sum. Clark et al. 2019, "What
//! Does BERT Look At?", section 3.3, <https://arxiv.org/abs/1906.04341>.

use tch::Tensor;

use super::tokens::Tokens;

/// `[b, h, q, k] -> [b, h, q]`.
pub(crate) fn per_query(weights: &Tensor, _: &Tokens) -> Tensor {
    let kind = weights.kind();
    let sum = weights.sum_dim_intlist([-1i64].as_slice(), true, kind);
    // A query that attends to nothing has no spread.
    let p = weights / sum.masked_fill(&sum.eq(0.0), 1.0);
    -p.xlogy(&p).sum_dim_intlist([-1i64].as_slice(), false, kind)
}
