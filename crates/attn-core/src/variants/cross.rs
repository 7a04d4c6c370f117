//! Cross-attention: queries from one sequence, keys and values from another.
//!
//! ```text
//! z_i = Σ_j softmax_j(scale · q_i·k_j) v_j,   q = W_q x,   k = W_k s,   v = W_v s
//! ```
//!
//! x are the layer's hidden states of the sequence that attends, s those of its source; padding of the source is hidden.
//! Vaswani et al. 2017, "Attention Is All You Need", <https://arxiv.org/abs/1706.03762>, section 3.2.3.
//!
//! The paper's decoder blocks attend to the encoder's last output, between a self-attention and a feed-forward layer. Here
//! the kind takes the place of a pretrained layer's self-attention: one model reads both sequences, and a layer's keys and
//! values are made of the source as it comes into the same layer, which is what the pretrained W_k and W_v were trained
//! on. While the source itself is read, the layer attends to that sequence. A sequence whose every layer attends to
//! another never mixes its own tokens: leave the last layer to self-attention where the head reads a single token.
//!
//! A decoder has no source to be given, and rotations place queries and keys in one sequence: both are refused.

use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::softmax::Softmax;
use crate::{
    Error,
    attention::{Attention, AttnInput, Dims, Nature, Own, Projections},
};

/// Settings of [`Cross`]: none.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {}

impl Config {
    pub(super) fn build(
        &self,
        dims: &Dims,
        _: &Projections,
        _: &mut Own<'_, '_>,
    ) -> Result<Box<dyn Attention>, Error> {
        if dims.causal || dims.rotary {
            let reason = if dims.causal {
                "a decoder predicts the text that it reads, and has no other to attend to"
            } else {
                "rotations place queries and keys in one sequence"
            };
            return Err(Error::Refused {
                kind: "cross",
                what: "serve this model",
                reason: format!(
                    "{reason}\nhint: `kind` = \"cross\" is for encoders (bert, distilbert) and rows of two texts"
                ),
            });
        }
        Ok(Box::new(Cross(Softmax { dims: dims.clone() })))
    }
}

/// Dense attention to another sequence.
#[derive(Debug)]
pub struct Cross(Softmax);

impl Attention for Cross {
    fn forward(&self, input: &AttnInput) -> Tensor {
        self.0.forward(input)
    }

    fn weights(&self, input: &AttnInput, rows: &[i64]) -> Tensor {
        self.0.weights(input, rows)
    }

    /// As softmax attention to a source of as many tokens: 4 · head_dim · n_heads · n².
    fn flops(&self, n_tokens: i64) -> i64 {
        self.0.flops(n_tokens)
    }

    super::holds!(1, 1);

    fn nature(&self) -> Nature {
        Nature { reach: 0, chooses: false, reads_coordinates: false, has_own_slopes: false }
    }

    fn needs_source(&self) -> bool {
        true
    }

    fn select_heads(&mut self, heads: &[i64], dims: &Dims) -> Result<(), Error> {
        self.0.select_heads(heads, dims)
    }

    fn regroup_kv(&mut self, groups: &[Vec<i64>], dims: &Dims) -> Result<(), Error> {
        self.0.regroup_kv(groups, dims)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        mask::Mask,
        testing::{Probe, assert_close, naive_attention_of, randn},
    };

    #[test]
    fn matches_the_definition_between_two_sequences() {
        for (q_len, k_len) in [(1, 1), (7, 7), (7, 3), (3, 63), (63, 1)] {
            for (n_heads, n_kv_heads) in [(2, 2), (4, 2), (3, 1)] {
                let probe = Probe::new(91, [2, q_len, k_len], n_heads, n_kv_heads, false);
                let kind = Cross(Softmax { dims: probe.dims.clone() });
                // The second source is shorter.
                let n_real = (k_len - k_len / 3) as usize;
                let keep: Vec<i64> = (0..2 * k_len)
                    .map(|at| i64::from(at < k_len || at - k_len < n_real as i64))
                    .collect();
                let mask = Mask::with_keep(false, &Tensor::from_slice(&keep).view([2, k_len]));
                let source = randn(92, &[2, k_len, probe.dims.hidden_size]);
                let input = AttnInput { source: Some(&source), ..probe.input(&mask) };

                let (z, weights) = naive_attention_of(&probe, |example, _, _, j| {
                    example == 0 || j < n_real as i64
                });
                let name = format!("{q_len}x{k_len}, {n_heads}/{n_kv_heads} heads");
                assert_close(&name, &kind.forward(&input), &z, 1e-12);
                let rows: Vec<i64> = (0..q_len).collect();
                assert_close(&name, &kind.weights(&input, &rows), &weights, 1e-12);
            }
        }
    }

    #[test]
    fn decoders_and_rotations_are_refused() {
        for (causal, rotary, word) in [(true, false, "decoder"), (false, true, "rotations")] {
            let mut dims = Probe::new(93, [1, 2, 2], 2, 2, causal).dims;
            dims.rotary = rotary;
            let projection =
                || (Tensor::zeros([12, 10], (tch::Kind::Double, tch::Device::Cpu)), None);
            let projections = Projections { q: projection(), k: projection(), v: projection() };
            let mut weights =
                crate::weights::Weights::from_seed(0, tch::Kind::Double, tch::Device::Cpu);
            let error = Config {}
                .build(&dims, &projections, &mut Own::new(&mut weights, "x"))
                .unwrap_err()
                .to_string();
            assert!(error.contains("`cross`") && error.contains(word), "{error}");
        }
    }
}
