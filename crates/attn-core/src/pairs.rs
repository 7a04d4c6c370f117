//! How many pairs of query and key attention has to weigh, and what that costs: what [`Attention::flops`] of kinds that
//! compare queries with keys is made of.
//!
//! [`Attention::flops`]: crate::attention::Attention::flops

use crate::attention::Dims;

/// Pairs of n queries and n keys that the layer's own mask shows: n(n + 1)/2 causally, else n².
pub(crate) fn n_seen(n: i64, causal: bool) -> i64 {
    if causal { n * (n + 1) / 2 } else { n * n }
}

/// Those of them whose key is one of the `first`, or at a distance (query − key) that `near` names.
pub(crate) fn n_pairs(n: i64, causal: bool, first: i64, near: impl Fn(i64) -> bool) -> i64 {
    let furthest_ahead = if causal { 0 } else { 1 - n };
    let mut by_distance = 0;
    let mut n_near = vec![0]; // how many of the distances are near, up to each
    for distance in furthest_ahead..n {
        let is_near = near(distance);
        by_distance += if is_near { n - distance.abs() } else { 0 };
        n_near.push(n_near[n_near.len() - 1] + i64::from(is_near));
    }
    let up_to = |distance: i64| n_near[(distance - furthest_ahead + 1) as usize];
    let by_place = |key: i64| {
        let (lo, hi) = (if causal { 0 } else { -key }, n - 1 - key); // the queries of this key
        hi - lo + 1 - (up_to(hi) - up_to(lo - 1))
    };
    by_distance + (0..first.min(n)).map(by_place).sum::<i64>()
}

/// Pairs of n queries with the keys of at most `n_chosen` blocks of `block`, a causal query's own among them. Whole blocks
/// are counted in a bidirectional layer, where the last one may be cut short and be chosen or not.
pub(crate) fn n_in_blocks(n: i64, causal: bool, block: i64, n_chosen: i64) -> i64 {
    if !causal {
        return n * n.min(n_chosen.saturating_mul(block));
    }
    (0..n).map(|query| (query / block).min(n_chosen - 1) * block + query % block + 1).sum()
}

/// Operations of weighing `n_pairs` for each query head: a product of q and k, and one of a weight and v.
pub(crate) fn weighing(dims: &Dims, n_pairs: i64) -> i64 {
    4 * dims.head_dim * dims.n_heads * n_pairs
}

/// Operations of a matrix `[out, hidden_size]` times the hidden states of n tokens.
pub(crate) fn projecting(dims: &Dims, n: i64, out: i64) -> i64 {
    2 * dims.hidden_size * out * n
}
