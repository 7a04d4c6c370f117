//! Heads that look at special tokens behind the first one: `[SEP]`, or the ends of texts in a row of several.
//!
//! Clark et al. 2019, "What Does BERT Look At?", section 3.2, <https://arxiv.org/abs/1906.04341>. Tokens count that see
//! such a one.

use super::tokens::{Target, Tokens};

pub(super) fn targets(tokens: &Tokens) -> Vec<Target> {
    let special = tokens.special.copy();
    let _ = special.narrow(1, 0, 1).fill_(0);
    vec![Target::new("separator", tokens, &special.unsqueeze(1))]
}
