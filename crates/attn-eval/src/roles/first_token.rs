//! Heads that look at the first token of the text, special or not: where a head goes that finds nothing.
//!
//! Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks", section 3.1,
//! <https://arxiv.org/abs/2309.17453>; for `[CLS]` Clark et al. 2019, "What Does BERT Look At?", section 3.2,
//! <https://arxiv.org/abs/1906.04341>. The first token itself asks nothing.

use super::tokens::{Target, Tokens};

pub(crate) fn targets(tokens: &Tokens) -> Vec<Target> {
    let offsets = tokens.offsets(); // key − query
    let key = &offsets - offsets.narrow(1, 0, 1); // its position
    let role = Target::new("first_token", tokens, &key.eq(0).unsqueeze(0));
    let is_first = tokens.ids.zeros_like().ne(0);
    let _ = is_first.narrow(1, 0, 1).fill_(1);
    vec![Target { counted: role.counted.logical_and(&is_first.logical_not()), ..role }]
}
