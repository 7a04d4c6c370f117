//! Global and local attention: a window, and a few tokens at the beginning that every token sees and that see every
//! token.
//!
//! ```text
//! z_i = Σ_j softmax_j(scale · q_i·k_j  if |i − j| < window or j < n_global or i < n_global, else -∞) v_j
//! ```
//!
//! Beltagy et al. 2020, "Longformer", <https://arxiv.org/abs/2004.05150>, section 3.1, "Global Attention", and Zaheer
//! et al. 2020, "Big Bird", <https://arxiv.org/abs/2007.14062>, section 2. Longformer chooses the global tokens by task
//! and gives them projections of their own; here they are the first ones (a classifier's token is) and the pretrained
//! projections serve all. BigBird also draws random blocks and works in blocks of tokens, as [`super::big_bird`] does; here
//! tokens are counted. In a causal layer the global tokens see their past alone, so that this is [`super::sinks`]. `window`
//! counts the query itself and one side.

use std::num::NonZeroU32;

use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::sinks::Sinks;
use crate::{
    Error,
    attention::{Attention, AttnInput, Dims, Masks, Nature, Own, Projections, State},
    banded::{self, Band},
    pairs,
};

/// Settings of [`GlobalLocal`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Tokens at the beginning that see and are seen by every token; 0 is a plain window.
    pub n_global: u32,
    /// Keys seen on each side, the query's own among them.
    pub window: NonZeroU32,
}

impl Default for Config {
    fn default() -> Self {
        Self { n_global: 1, window: const { NonZeroU32::new(32).unwrap() } }
    }
}

impl Config {
    pub(super) fn build(
        &self,
        dims: &Dims,
        _: &Projections,
        _: &mut Own<'_, '_>,
    ) -> Result<Box<dyn Attention>, Error> {
        let band = Band::around(self.window.get().into(), 1, self.n_global.into());
        Ok(Box::new(GlobalLocal { local: Sinks { band, dims: dims.clone() } }))
    }
}

/// Softmax over the global and the nearest keys; over all keys for global queries.
#[derive(Debug)]
pub struct GlobalLocal {
    /// All but what global queries see.
    local: Sinks,
}

impl Attention for GlobalLocal {
    fn forward(&self, input: &AttnInput) -> Tensor {
        let z = self.local.forward(input);
        let (q_len, k_len) = (input.q.size()[2], input.k.size()[2]);
        let n_global = self.local.band.first.min(q_len);
        // In a causal layer all that a global query may see is global; decoding, which is causal, has few queries.
        if input.mask.causal() || n_global == 0 || q_len != k_len {
            return z;
        }
        let rest = z.narrow(2, n_global, q_len - n_global);
        Tensor::cat(&[banded::first_see_all(input, &self.local.dims, n_global), rest], 2)
    }

    fn weights(&self, input: &AttnInput, rows: &[i64]) -> Tensor {
        let (query, key) = banded::places(input, rows);
        let band = self.local.band;
        let is_global = query.lt(band.first).unsqueeze(-1);
        let sees = band.sees(&query, &key).logical_or(&is_global);
        banded::dense_weights(input, &self.local.dims, rows, &sees)
    }

    /// 4 · head_dim · n_heads · pairs less than `window` apart or with a global token, as key or (in a bidirectional layer)
    /// as query.
    fn flops(&self, n_tokens: i64) -> i64 {
        let Sinks { band, dims } = &self.local;
        let mut n_pairs = band.n_pairs(n_tokens, dims.causal);
        if !dims.causal {
            // Global queries see as many keys far off as see global keys; those between two global tokens are in already.
            let near = Band { first: 0, ..*band };
            let n_global = band.first.min(n_tokens);
            let n_far = |n: i64, with: i64| with - near.n_pairs(n, false);
            n_pairs += n_far(n_tokens, n_pairs) - n_far(n_global, n_global * n_global);
        }
        pairs::weighing(dims, n_pairs)
    }

    super::holds!(1, 2);

    fn nature(&self) -> Nature {
        Nature {
            reach: self.local.nature().reach,
            chooses: false,
            reads_coordinates: false,
            has_own_slopes: false,
        }
    }

    fn masks(&self) -> Masks {
        self.local.masks()
    }

    fn start(&self) -> Box<dyn State> {
        self.local.start()
    }

    fn step(&self, input: &AttnInput, state: &mut dyn State) -> Tensor {
        self.local.step(input, state)
    }

    fn select_heads(&mut self, heads: &[i64], dims: &Dims) -> Result<(), Error> {
        self.local.select_heads(heads, dims)
    }

    fn regroup_kv(&mut self, groups: &[Vec<i64>], dims: &Dims) -> Result<(), Error> {
        self.local.regroup_kv(groups, dims)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        mask::Mask,
        testing::{Probe, assert_close, naive_attention},
    };

    fn kind(n_global: i64, window: i64, probe: &Probe) -> GlobalLocal {
        GlobalLocal {
            local: Sinks { band: Band::around(window, 1, n_global), dims: probe.dims.clone() },
        }
    }

    fn sees(n_global: usize, window: usize, i: usize, j: usize) -> bool {
        i < n_global || j < n_global || i.abs_diff(j) < window
    }

    #[test]
    fn matches_the_definition() {
        for (n_global, window) in [(0, 3), (1, 1), (3, 5), (20, 2), (4, 63), (100, 1)] {
            for n in [1, 7, 63, 100] {
                for causal in [false, true] {
                    let probe = Probe::new(81, [2, n, n], 4, 2, causal);
                    let kind = kind(n_global, window, &probe);
                    let (z, weights) = naive_attention(&probe, |i, j| {
                        sees(n_global as usize, window as usize, i, j) && (!causal || j <= i)
                    });
                    let name = format!("{n_global} global, {window} near, {n}, causal {causal}");
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
        let n_real = [63, 2];
        let probe = Probe::new(82, [2, 100, 100], 4, 2, false);
        let keep = Tensor::from_slice(&n_real).unsqueeze(-1).gt_tensor(&probe.positions);
        let z = kind(3, 4, &probe).forward(&probe.input(&Mask::with_keep(false, &keep)));
        for (row, n) in (0..).zip(n_real) {
            let (expected, _) = naive_attention(&probe.narrowed(row, n), |i, j| sees(3, 4, i, j));
            let real = z.narrow(0, row, 1).narrow(2, 0, n);
            assert_close(&format!("{n} of 100 tokens"), &real, &expected, 1e-12);
        }
    }
}
