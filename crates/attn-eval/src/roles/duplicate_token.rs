//! Heads that look at earlier occurrences of the token itself.
//!
//! ```text
//! keys j < t with x_j = x_t
//! ```
//!
//! Wang et al. 2022, "Interpretability in the Wild", section 3, <https://arxiv.org/abs/2211.00593>; TransformerLens's
//! `duplicate_token_head` (`head_detector.py`).

use super::tokens::{Target, Tokens};

pub(super) fn targets(tokens: &Tokens) -> Vec<Target> {
    let same = tokens.ids.unsqueeze(1).eq_tensor(&tokens.ids.unsqueeze(2)); // [b, q, k]
    let earlier = tokens.offsets().lt(0).unsqueeze(0);
    vec![Target::new("duplicate_token", tokens, &same.logical_and(&earlier))]
}
