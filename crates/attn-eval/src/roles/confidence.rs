//! How sure a head is: its largest weight.
//!
//! ```text
//! mean over tokens of max_j a_tj,   special tokens neither asking nor attended to
//! ```
//!
//! Voita et al. 2019, "Analyzing Multi-Head Self-Attention", section 4, <https://arxiv.org/abs/1905.09418>, where the end of
//! sentence is left out. A first token that is no special one counts: a head that rests there looks sure.

use tch::Tensor;

use super::tokens::Tokens;

/// `[b, h, q, k] -> [b, h, q]`.
pub(super) fn per_query(weights: &Tensor, tokens: &Tokens) -> Tensor {
    let plain = tokens.special.logical_not().unsqueeze(1).logical_and(&tokens.seen); // [b, q, k]
    let hidden = plain.logical_not().unsqueeze(1);
    let max = weights.masked_fill(&hidden, f64::NEG_INFINITY).amax([-1i64].as_slice(), false);
    // Of padding, which sees nothing.
    max.masked_fill(&max.isinf(), 0.0)
}
