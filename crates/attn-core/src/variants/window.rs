//! Sliding-window attention: each query weighs the keys at most `size − 1` away, and drops the rest before the softmax.
//!
//! ```text
//! z_i = Σ_j softmax_j(scale · q_i·k_j  if |i − j| < size, else -∞) v_j
//! ```
//!
//! Beltagy et al. 2020, "Longformer", <https://arxiv.org/abs/2004.05150>, section 3.1, whose window of w tokens counts
//! both sides; here `size` counts the query itself and one side, so that a causal window sees `size` keys and a
//! bidirectional one 2·size − 1. Queries are taken in blocks, each against the keys near it: time and memory grow with
//! n·size, not n².

use std::num::NonZeroU32;

use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::softmax::Softmax;
use crate::{
    Error,
    attention::{Attention, AttnInput, Dims, KvCache, Masks, Nature, Own, Projections, State},
    banded::{self, Band},
    pairs,
};

/// Settings of [`Window`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Keys seen on each side, the query's own among them.
    pub size: NonZeroU32,
}

impl Default for Config {
    fn default() -> Self {
        Self { size: const { NonZeroU32::new(32).unwrap() } }
    }
}

impl Config {
    pub(super) fn build(
        &self,
        dims: &Dims,
        _: &Projections,
        _: &mut Own<'_, '_>,
    ) -> Result<Box<dyn Attention>, Error> {
        Ok(Box::new(Window { size: self.size.get().into(), dims: dims.clone() }))
    }
}

/// Softmax over the nearest keys.
#[derive(Debug)]
pub struct Window {
    pub(super) size: i64,
    pub(super) dims: Dims,
}

impl Window {
    pub(super) fn band(&self) -> Band {
        Band::around(self.size, 1, 0)
    }

    /// The plain form, for few queries: all scores, those out of reach hidden. `[b, h, rows, k]`.
    fn dense_weights(&self, input: &AttnInput, rows: &[i64]) -> Tensor {
        let (query, key) = banded::places(input, rows);
        banded::dense_weights(input, &self.dims, rows, &self.band().sees(&query, &key))
    }
}

impl Attention for Window {
    fn forward(&self, input: &AttnInput) -> Tensor {
        let (q_len, k_len) = (input.q.size()[2], input.k.size()[2]);
        if self.size >= k_len {
            return Softmax { dims: self.dims.clone() }.forward(input);
        }
        if q_len == k_len {
            return banded::attend(input, &self.dims, &self.band());
        }
        let weights = self.dense_weights(input, &(0..q_len).collect::<Vec<_>>());
        weights.dropout(input.dropout, input.dropout > 0.0).matmul(&self.dims.expand_kv(input.v))
    }

    fn weights(&self, input: &AttnInput, rows: &[i64]) -> Tensor {
        self.dense_weights(input, rows)
    }

    /// 4 · head_dim · n_heads · pairs less than `size` apart.
    fn flops(&self, n_tokens: i64) -> i64 {
        pairs::weighing(&self.dims, self.band().n_pairs(n_tokens, self.dims.causal))
    }

    super::holds!(1, 2);

    fn nature(&self) -> Nature {
        Nature { reach: self.size, chooses: false, reads_coordinates: false, has_own_slopes: false }
    }

    fn masks(&self) -> Masks {
        Masks::Contiguous // A distance across a hole is not a distance between tokens.
    }

    fn start(&self) -> Box<dyn State> {
        Box::new(KvCache::new(Some(self.size)))
    }

    super::follows_dims!();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        mask::Mask,
        testing::{Probe, assert_close, naive_attention},
    };

    #[test]
    fn matches_the_definition() {
        for size in [1, 3, 8, 63] {
            for n in [1, 7, 16, 63] {
                for causal in [false, true] {
                    let probe = Probe::new(21, [2, n, n], 4, 2, causal);
                    let kind = Window { size, dims: probe.dims.clone() };
                    let (z, weights) = naive_attention(&probe, |i, j| {
                        i.abs_diff(j) < size as usize && (!causal || j <= i)
                    });
                    let name = format!("window {size}, {n} tokens, causal {causal}");
                    let mask = Mask::new(causal);
                    assert_close(&name, &kind.forward(&probe.input(&mask)), &z, 1e-12);
                    let rows: Vec<i64> = (0..n).collect();
                    assert_close(&name, &kind.weights(&probe.input(&mask), &rows), &weights, 1e-12);
                }
            }
        }
    }

    #[test]
    fn the_decoding_state_stays_within_the_window() {
        let probe = Probe::new(22, [1, 40, 40], 2, 2, true);
        let kind = Window { size: 8, dims: probe.dims.clone() };
        let mut state = kind.start();
        let mask = Mask::new(true);
        let input = probe.input(&mask);
        for at in 0..40 {
            let cut = |x: &Tensor, dim| x.narrow(dim, at, 1);
            let (hidden, q, k, v) =
                (cut(input.hidden, 1), cut(input.q, 2), cut(input.k, 2), cut(input.v, 2));
            let _ = kind.step(
                &AttnInput { hidden: &hidden, q: &q, k: &k, v: &v, ..probe.input(&mask) },
                state.as_mut(),
            );
        }
        let per_token = 2 * 2 * probe.dims.head_dim as usize * 8; // k and v, two heads, f64
        assert_eq!(state.bytes(), 8 * per_token);
    }
}
