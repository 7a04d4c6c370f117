//! Heads that look at the rarest token of the text.
//!
//! Voita et al. 2019, "Analyzing Multi-Head Self-Attention", section 5.3, <https://arxiv.org/abs/1905.09418>: there of a
//! sentence. Here of the row, and of a decoder of what it sees of it. Special tokens are none; of several that are equally
//! rare each will do, and the share by chance grows with them.

use tch::Kind;

use super::tokens::{Target, Tokens};

pub(super) fn targets(tokens: &Tokens) -> Vec<Target> {
    let plain = tokens.special.logical_not().unsqueeze(1).logical_and(&tokens.seen); // [b, q, k]
    let counts = tokens.n_occurrences.unsqueeze(1).masked_fill(&plain.logical_not(), i64::MAX);
    let fewest = counts.amin([-1i64].as_slice(), true);
    let several = plain.sum_dim_intlist([-1i64].as_slice(), false, Kind::Int64).ge(2);
    let role = Target::new("rare_token", tokens, &counts.eq_tensor(&fewest).logical_and(&plain));
    vec![Target { counted: role.counted.logical_and(&several), ..role }]
}
