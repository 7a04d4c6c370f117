//! Dilated sliding-window attention: each query weighs every `dilation`-th key near it, and drops the rest before the
//! softmax.
//!
//! ```text
//! z_i = Σ_j softmax_j(scale · q_i·k_j  if i − j = m·dilation with |m| < size, else -∞) v_j
//! ```
//!
//! Beltagy et al. 2020, "Longformer", <https://arxiv.org/abs/2004.05150>, section 3.1, "Dilated Sliding Window". The
//! paper gives each head a dilation of its own; here all heads of a layer share one, and `size` counts the query itself
//! and one side, so that a causal layer sees `size` keys and a bidirectional one 2·size − 1. Tokens `dilation` apart
//! form classes of their own, and within a class this is a window: time and memory grow with n·size.

use std::num::NonZeroU32;

use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::{
    Error,
    attention::{Attention, AttnInput, Dims, Masks, Nature, Own, Projections, State},
    banded::{self, Band, FirstAndLast},
    pairs,
};

/// Settings of [`Dilated`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Keys seen on each side, the query's own among them.
    pub size: NonZeroU32,
    /// Tokens from one key to the next; 1 is a plain window.
    pub dilation: NonZeroU32,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            size: const { NonZeroU32::new(32).unwrap() },
            dilation: const { NonZeroU32::new(2).unwrap() },
        }
    }
}

impl Config {
    pub(super) fn build(
        &self,
        dims: &Dims,
        _: &Projections,
        _: &mut Own<'_, '_>,
    ) -> Result<Box<dyn Attention>, Error> {
        let band = Band::around(self.size.get().into(), self.dilation.get().into(), 0);
        Ok(Box::new(Dilated { band, dims: dims.clone() }))
    }
}

/// Softmax over every `dilation`-th of the nearest keys.
#[derive(Debug)]
pub struct Dilated {
    band: Band,
    dims: Dims,
}

impl Attention for Dilated {
    fn forward(&self, input: &AttnInput) -> Tensor {
        let q_len = input.q.size()[2];
        if q_len == input.k.size()[2] {
            return banded::attend(input, &self.dims, &self.band);
        }
        let weights = self.weights(input, &(0..q_len).collect::<Vec<_>>());
        weights.dropout(input.dropout, input.dropout > 0.0).matmul(&self.dims.expand_kv(input.v))
    }

    fn weights(&self, input: &AttnInput, rows: &[i64]) -> Tensor {
        let (query, key) = banded::places(input, rows);
        banded::dense_weights(input, &self.dims, rows, &self.band.sees(&query, &key))
    }

    /// 4 · head_dim · n_heads · pairs m · dilation apart, m less than `size`.
    fn flops(&self, n_tokens: i64) -> i64 {
        pairs::weighing(&self.dims, self.band.n_pairs(n_tokens, self.dims.causal))
    }

    super::holds!(1, 2);

    fn nature(&self) -> Nature {
        Nature {
            reach: self.band.reach(),
            chooses: false,
            reads_coordinates: false,
            has_own_slopes: false,
        }
    }

    fn masks(&self) -> Masks {
        Masks::Contiguous // A distance across a hole is not a distance between tokens.
    }

    fn start(&self) -> Box<dyn State> {
        // Between the keys of one query lie those of the next ones.
        Box::new(FirstAndLast::new(0, Some(self.band.reach())))
    }

    fn step(&self, input: &AttnInput, state: &mut dyn State) -> Tensor {
        banded::step(input, &self.dims, &self.band, state)
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
        for (size, dilation) in [(1, 3), (3, 2), (5, 7), (40, 1), (4, 63), (2, 100)] {
            for n in [1, 7, 63, 150] {
                for causal in [false, true] {
                    let probe = Probe::new(61, [2, n, n], 4, 2, causal);
                    let kind =
                        Dilated { band: Band::around(size, dilation, 0), dims: probe.dims.clone() };
                    let (z, weights) = naive_attention(&probe, |i, j| {
                        let (apart, r) = (i.abs_diff(j), dilation as usize);
                        apart % r == 0 && apart / r < size as usize && (!causal || j <= i)
                    });
                    let name = format!("{size} keys {dilation} apart, {n} tokens, causal {causal}");
                    let mask = Mask::new(causal);
                    assert_close(&name, &kind.forward(&probe.input(&mask)), &z, 1e-12);
                    let rows: Vec<i64> = (0..n).collect();
                    assert_close(&name, &kind.weights(&probe.input(&mask), &rows), &weights, 1e-12);
                }
            }
        }
    }

    #[test]
    fn padding_on_the_right_is_not_seen() {
        for n_real in [[100, 63], [7, 1]] {
            let probe = Probe::new(62, [2, 100, 100], 4, 2, false);
            let kind = Dilated { band: Band::around(4, 5, 0), dims: probe.dims.clone() };
            let keep = Tensor::from_slice(&n_real).unsqueeze(-1).gt_tensor(&probe.positions);
            let z = kind.forward(&probe.input(&Mask::with_keep(false, &keep)));
            for (row, n) in (0..).zip(n_real) {
                let part = probe.narrowed(row, n);
                let (expected, _) =
                    naive_attention(&part, |i, j| i.abs_diff(j) % 5 == 0 && i.abs_diff(j) < 20);
                let real = z.narrow(0, row, 1).narrow(2, 0, n);
                assert_close(&format!("{n} of 100 tokens"), &real, &expected, 1e-12);
            }
        }
    }
}
