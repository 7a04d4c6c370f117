//! Attention sinks: each query weighs the first few tokens and the last few, and drops what lies between before the
//! softmax.
//!
//! ```text
//! z_i = Σ_j softmax_j(scale · q_i·k_j  if j < n_sinks or |i − j| < window, else -∞) v_j
//! ```
//!
//! Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks" (StreamingLLM),
//! <https://arxiv.org/abs/2309.17453>, section 3.2: pretrained models give the first tokens a large weight that means
//! nothing, and break down where a window drops them. The paper numbers positions within the cache, so that a text may
//! go on beyond the length the model was trained for; here every key keeps the position that it has in the text, in
//! decoding as in a full pass, and a text is as long as the model's positions. Decoding keeps `n_sinks` + `window`
//! tokens. In a bidirectional layer the window reaches to both sides.

use std::num::NonZeroU32;

use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::softmax::Softmax;
use crate::{
    Error,
    attention::{Attention, AttnInput, Dims, Masks, Nature, Own, Projections, State},
    banded::{self, Band, FirstAndLast},
    pairs,
};

/// Settings of [`Sinks`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Tokens at the beginning that every query sees; 0 is a plain window.
    pub n_sinks: u32,
    /// Keys seen on each side, the query's own among them.
    pub window: NonZeroU32,
}

impl Default for Config {
    fn default() -> Self {
        Self { n_sinks: 4, window: const { NonZeroU32::new(32).unwrap() } }
    }
}

impl Config {
    pub(super) fn build(
        &self,
        dims: &Dims,
        _: &Projections,
        _: &mut Own<'_, '_>,
    ) -> Result<Box<dyn Attention>, Error> {
        let band = Band::around(self.window.get().into(), 1, self.n_sinks.into());
        Ok(Box::new(Sinks { band, dims: dims.clone() }))
    }
}

/// Softmax over the first and the nearest keys.
#[derive(Debug)]
pub struct Sinks {
    pub(super) band: Band,
    pub(super) dims: Dims,
}

impl Attention for Sinks {
    fn forward(&self, input: &AttnInput) -> Tensor {
        let (q_len, k_len) = (input.q.size()[2], input.k.size()[2]);
        if self.band.is_everything(k_len, input.mask.causal()) {
            return Softmax { dims: self.dims.clone() }.forward(input);
        }
        if q_len == k_len {
            return banded::attend(input, &self.dims, &self.band);
        }
        let weights = self.weights(input, &(0..q_len).collect::<Vec<_>>());
        weights.dropout(input.dropout, input.dropout > 0.0).matmul(&self.dims.expand_kv(input.v))
    }

    fn weights(&self, input: &AttnInput, rows: &[i64]) -> Tensor {
        let (query, key) = banded::places(input, rows);
        banded::dense_weights(input, &self.dims, rows, &self.band.sees(&query, &key))
    }

    /// 4 · head_dim · n_heads · pairs less than `window` apart or with a sink.
    fn flops(&self, n_tokens: i64) -> i64 {
        pairs::weighing(&self.dims, self.band.n_pairs(n_tokens, self.dims.causal))
    }

    super::holds!(1, 2);

    fn nature(&self) -> Nature {
        Nature {
            reach: self.band.reach().max(self.band.first),
            chooses: false,
            reads_coordinates: false,
            has_own_slopes: false,
        }
    }

    fn masks(&self) -> Masks {
        Masks::Contiguous // The first tokens are those of the text, and distances are counted in it.
    }

    fn start(&self) -> Box<dyn State> {
        Box::new(FirstAndLast::new(self.band.first, Some(self.band.reach())))
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
        for (n_sinks, window) in [(0, 3), (1, 1), (3, 5), (20, 2), (4, 63), (100, 1)] {
            for n in [1, 7, 63, 100] {
                for causal in [false, true] {
                    let probe = Probe::new(71, [2, n, n], 4, 2, causal);
                    let kind =
                        Sinks { band: Band::around(window, 1, n_sinks), dims: probe.dims.clone() };
                    let (z, weights) = naive_attention(&probe, |i, j| {
                        let seen = j < n_sinks as usize || i.abs_diff(j) < window as usize;
                        seen && (!causal || j <= i)
                    });
                    let name = format!("{n_sinks} sinks, {window} near, {n}, causal {causal}");
                    let mask = Mask::new(causal);
                    assert_close(&name, &kind.forward(&probe.input(&mask)), &z, 1e-12);
                    let rows: Vec<i64> = (0..n).collect();
                    assert_close(&name, &kind.weights(&probe.input(&mask), &rows), &weights, 1e-12);
                }
            }
        }
    }

    #[test]
    fn the_decoding_state_holds_the_first_and_the_last_tokens() {
        let probe = Probe::new(72, [1, 40, 40], 2, 2, true);
        let kind = Sinks { band: Band::around(8, 1, 3), dims: probe.dims.clone() };
        let mask = Mask::new(true);
        let full = kind.forward(&probe.input(&mask));
        // Pieces that end among the sinks, beyond them, and beyond the window.
        for lengths in [vec![1; 40], vec![2, 2, 1, 20, 15], vec![39, 1]] {
            let mut state = kind.start();
            let mut at = 0;
            for len in lengths {
                let cut = |x: &Tensor, dim| x.narrow(dim, at, len);
                let (hidden, q, k, v) =
                    (cut(&probe.hidden, 1), cut(&probe.q, 2), cut(&probe.k, 2), cut(&probe.v, 2));
                let piece =
                    AttnInput { hidden: &hidden, q: &q, k: &k, v: &v, ..probe.input(&mask) };
                let z = kind.step(&piece, state.as_mut());
                assert_close("a piece", &z, &full.narrow(2, at, len), 1e-12);
                at += len;
            }
            let per_token = 2 * 2 * probe.dims.head_dim as usize * 8; // k and v, two heads, f64
            assert_eq!(state.bytes(), (3 + 8) * per_token);
        }
    }
}
