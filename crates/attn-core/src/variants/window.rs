//! Sliding-window attention: each query weighs the keys at most `size − 1` away, and drops the rest before the softmax.
//!
//! ```text
//! z_i = Σ_j softmax_j(scale · q_i·k_j  if |i − j| < size, else -∞) v_j
//! ```
//!
//! Beltagy et al. 2020, "Longformer", <https://arxiv.org/abs/2004.05150>, section 3.1, whose window of w tokens counts
//! both sides; here `size` counts the query itself and one side, so that a causal window sees `size` keys and a
//! bidirectional one 2·size − 1. Queries are taken in blocks of `size`, each against the blocks beside it: time and
//! memory grow with n·size, not n².

use std::num::NonZeroU32;

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::softmax::Softmax;
use crate::{
    Error,
    attention::{Attention, AttnInput, Dims, KvCache, Masks, Own, Projections, State},
    mask::to_bias,
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
    size: i64,
    dims: Dims,
}

impl Window {
    /// Whether query i (counted like the keys) is near enough to key j.
    fn near(&self, query: &Tensor, key: &Tensor) -> Tensor {
        (query.unsqueeze(-1) - key.unsqueeze(-2)).abs().lt(self.size)
    }

    /// One block of queries after the other against a few blocks of keys. Needs q_len = k_len.
    fn blocked(&self, input: &AttnInput) -> Tensor {
        let AttnInput { q, k, v, mask, dropout, .. } = *input;
        let [b, _, n, d] = q.size()[..] else { unreachable!("queries have four axes") };
        let (w, h) = (self.size, self.dims.n_heads);
        let n_blocks = (n + w - 1) / w;
        let padded = n_blocks * w;
        let sides = if mask.causal() { 1 } else { 2 };

        // Keys: one block of nothing before, and one behind where queries look ahead.
        let blocks = |x: &Tensor| {
            let x = self.dims.expand_kv(x).constant_pad_nd([0, 0, w, padded - n + w * (sides - 1)]);
            let x = x.unfold(2, (1 + sides) * w, w); // [b, h, blocks, d, (1 + sides)·w]
            x.transpose(-2, -1)
        };
        let queries = q.constant_pad_nd([0, 0, 0, padded - n]).view([b, h, n_blocks, w, d]);

        let device = q.device();
        let start = Tensor::arange(n_blocks, (Kind::Int64, device)).unsqueeze(-1) * w;
        let query = &start + Tensor::arange(w, (Kind::Int64, device)); // [blocks, w]
        let key = &start + Tensor::arange_start(-w, sides * w, (Kind::Int64, device)); // [blocks, (1 + sides)·w]
        let real = key.ge(0).logical_and(&key.lt(n));
        let mut allowed = self.near(&query, &key).logical_and(&real.unsqueeze(1)); // [blocks, w, keys]
        if mask.causal() {
            allowed = allowed.logical_and(&key.unsqueeze(1).le_tensor(&query.unsqueeze(-1)));
        }
        let mut allowed = allowed.unsqueeze(0).unsqueeze(0); // [1, 1, blocks, w, keys]
        if let Some(keep) = mask.keep().filter(|_| !mask.is_plain()) {
            let index = key.clamp(0, n - 1);
            let keep = keep.index_select(1, &index.view([-1])).view([b, 1, n_blocks, 1, -1]);
            allowed = allowed.logical_and(&keep);
        }

        let fold = |x: Tensor| {
            let [.., rows, d] = x.size()[..] else { unreachable!("blocks have five axes") };
            x.expand([b, -1, -1, -1, -1], true).reshape([b * x.size()[1], n_blocks, rows, d])
        };
        // Heads join the batch, blocks take the place of heads: the fused kernel serves every block at once.
        let bias = to_bias(&allowed, q.kind()); // [1 or b, 1, blocks, w, keys]
        let bias = bias.expand([b, h, -1, -1, -1], true).reshape([b * h, n_blocks, w, -1]);
        let z = Tensor::scaled_dot_product_attention(
            &fold(queries),
            &fold(blocks(k)),
            &fold(blocks(v)),
            Some(bias),
            dropout,
            false,
            self.dims.scale,
            false,
        );
        z.view([b, h, padded, d]).narrow(2, 0, n)
    }

    /// The plain form, for few queries: all scores, those out of reach hidden. `[b, h, rows, k]`.
    fn dense_weights(&self, input: &AttnInput, rows: &[i64]) -> Tensor {
        let (q_len, k_len) = (input.q.size()[2], input.k.size()[2]);
        let device = input.q.device();
        let index = Tensor::from_slice(rows).to_device(device);
        let near =
            self.near(&(&index + (k_len - q_len)), &Tensor::arange(k_len, (Kind::Int64, device)));
        let allowed = input.mask.allowed_rows(rows, q_len, k_len, device).logical_and(&near);
        let q = input.q.index_select(2, &index);
        let scores = q.matmul(&self.dims.expand_kv(input.k).transpose(-2, -1)) * self.dims.scale;
        (scores + to_bias(&allowed, q.kind())).softmax(-1, q.kind())
    }
}

impl Attention for Window {
    fn forward(&self, input: &AttnInput) -> Tensor {
        let (q_len, k_len) = (input.q.size()[2], input.k.size()[2]);
        if self.size >= k_len {
            return Softmax { dims: self.dims.clone() }.forward(input);
        }
        if q_len == k_len {
            return self.blocked(input);
        }
        let weights = self.dense_weights(input, &(0..q_len).collect::<Vec<_>>());
        weights.dropout(input.dropout, input.dropout > 0.0).matmul(&self.dims.expand_kv(input.v))
    }

    fn weights(&self, input: &AttnInput, rows: &[i64]) -> Tensor {
        self.dense_weights(input, rows)
    }

    fn masks(&self) -> Masks {
        Masks::Contiguous // A distance across a hole is not a distance between tokens.
    }

    fn start(&self) -> Box<dyn State> {
        Box::new(KvCache::new(Some(self.size)))
    }

    fn select_heads(&mut self, _: &[i64], dims: &Dims) -> Result<(), Error> {
        self.dims = dims.clone();
        Ok(())
    }

    fn regroup_kv(&mut self, _: &[Vec<i64>], dims: &Dims) -> Result<(), Error> {
        self.dims = dims.clone();
        Ok(())
    }
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
