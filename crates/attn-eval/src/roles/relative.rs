//! Heads that look a fixed number of tokens away: the previous token, the next one, positional heads.
//!
//! ```text
//! key t + o of query t,   o = −3 … 3 (encoders),  −3 … 0 (decoders)
//! ```
//!
//! A head is positional where at least 90 % of the tokens have their largest weight on one relative position: Voita et al. 2019,
//! "Analyzing Multi-Head Self-Attention", section 5.1, <https://arxiv.org/abs/1905.09418>. Here tokens count that have
//! such a neighbour. The heads that look at `t − 1` are TransformerLens's `previous_token_head` (`head_detector.py`).

use super::tokens::{Target, Tokens};

/// The farthest that is looked at.
const REACH: i64 = 3;

pub(super) fn targets(tokens: &Tokens) -> Vec<Target> {
    let last = if tokens.causal { 0 } else { REACH };
    let offsets = tokens.offsets().unsqueeze(0);
    let of = |offset: i64| {
        let role = match offset {
            -1 => "previous_token",
            1 => "next_token",
            _ => "relative_position",
        };
        Target { offset: Some(offset), ..Target::new(role, tokens, &offsets.eq(offset)) }
    };
    (-REACH..=last).map(of).collect()
}
