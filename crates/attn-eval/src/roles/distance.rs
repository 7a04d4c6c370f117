//! How far away a head looks.
//!
//! ```text
//! Σ_j p_j |t − j|,   p_j = a_j / Σ a      (tokens)
//! ```
//!
//! Clark et al. 2019 look at relative positions one by one; the mean distance is that of Vig and Belinkov 2019, "Analyzing the
//! Structure of Attention in a Transformer Language Model", section 3.4, <https://arxiv.org/abs/1906.04284>.

use tch::Tensor;

use super::tokens::Tokens;

/// `[b, h, q, k] -> [b, h, q]`.
pub(crate) fn per_query(weights: &Tensor, tokens: &Tokens) -> Tensor {
    let kind = weights.kind();
    let sum_of = |x: &Tensor| x.sum_dim_intlist([-1i64].as_slice(), false, kind);
    let sum = sum_of(weights);
    sum_of(&(weights * tokens.offsets().abs())) / sum.masked_fill(&sum.eq(0.0), 1.0)
}
