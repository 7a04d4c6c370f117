//! Heads that look at what came after an earlier occurrence of the token: they go on with what was begun once more.
//!
//! ```text
//! keys j with x_(j−1) = x_t,  j − 1 < t
//! ```
//!
//! The prefix-matching score of Olsson et al. 2022, "In-context Learning and Induction Heads", section "Key concepts",
//! <https://arxiv.org/abs/2209.11895>; TransformerLens's `induction_head` (`head_detector.py`).

use tch::Tensor;

use super::tokens::{Target, Tokens};

pub(super) fn targets(tokens: &Tokens) -> Vec<Target> {
    let ids = &tokens.ids;
    // No id is −1: nothing stands before the first token.
    let none = Tensor::full_like(&ids.narrow(1, 0, 1), -1);
    let before = Tensor::cat(&[none, ids.narrow(1, 0, tokens.len() - 1)], 1);
    let follows = before.unsqueeze(1).eq_tensor(&ids.unsqueeze(2)); // [b, q, k]
    let earlier = tokens.offsets().le(0).unsqueeze(0);
    vec![Target::new("induction", tokens, &follows.logical_and(&earlier))]
}
