//! Gated attention: each head's output is scaled by a gate that the layer's input sets.
//!
//! ```text
//! z_i = 2σ(w·x_i + b) Σ_j softmax_j(s_ij) v_j      w, b: one a head
//! ```
//!
//! Qiu et al. 2025, "Gated Attention for Large Language Models", <https://arxiv.org/abs/2505.06708>, section 2.2: the
//! head-wise gate after the attention (their position G1). The paper trains from scratch and has no factor 2 and no
//! bias; with both, and w = b = 0, a pretrained layer starts out exactly as it was.

use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::softmax::Softmax;
use crate::{
    Error,
    attention::{Attention, AttnInput, Dims, Nature, Own, Param, Projections},
    nn::Visitor,
    pairs,
    weights::Init,
};

/// Settings of [`Gated`]: none.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {}

impl Config {
    pub(super) fn build(
        &self,
        dims: &Dims,
        _: &Projections,
        own: &mut Own<'_, '_>,
    ) -> Result<Box<dyn Attention>, Error> {
        let weight = own.get("gate.weight", &[dims.n_heads, dims.hidden_size], Init::Zeros)?;
        let bias = own.get("gate.bias", &[dims.n_heads], Init::Zeros)?;
        Ok(Box::new(Gated { weight, bias, softmax: Softmax { dims: dims.clone() } }))
    }
}

/// Softmax attention under gates that read the hidden states.
#[derive(Debug)]
pub struct Gated {
    weight: Param,
    bias: Param,
    softmax: Softmax,
}

impl Gated {
    /// `[b, q, hidden] -> [b, n_heads, q, 1]`.
    fn gate(&self, hidden: &Tensor) -> Tensor {
        let logits = hidden.linear(&self.weight.tensor, Some(&self.bias.tensor)); // [b, q, h]
        logits.sigmoid().transpose(1, 2).unsqueeze(-1) * 2.0
    }
}

impl Attention for Gated {
    fn forward(&self, input: &AttnInput) -> Tensor {
        self.softmax.forward(input) * self.gate(input.hidden)
    }

    fn weights(&self, input: &AttnInput, rows: &[i64]) -> Tensor {
        let rows_at = Tensor::from_slice(rows).to_device(input.hidden.device());
        self.softmax.weights(input, rows) * self.gate(&input.hidden.index_select(1, &rows_at))
    }

    /// Softmax attention's, and 2 · hidden_size · n_heads · n for the gates.
    fn flops(&self, n_tokens: i64) -> i64 {
        let dims = &self.softmax.dims;
        self.softmax.flops(n_tokens) + pairs::projecting(dims, n_tokens, dims.n_heads)
    }

    super::holds!(1, 2);

    fn nature(&self) -> Nature {
        Nature { reach: 0, chooses: false, reads_coordinates: false, has_own_slopes: false }
    }

    fn visit(&self, f: &mut Visitor<'_>) {
        f(&self.weight.name, &self.weight.tensor);
        f(&self.bias.name, &self.bias.tensor);
    }

    fn select_heads(&mut self, heads: &[i64], dims: &Dims) -> Result<(), Error> {
        self.weight.select(0, heads);
        self.bias.select(0, heads);
        self.softmax.select_heads(heads, dims)
    }

    fn regroup_kv(&mut self, groups: &[Vec<i64>], dims: &Dims) -> Result<(), Error> {
        self.softmax.regroup_kv(groups, dims) // Gates belong to query heads.
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        mask::Mask,
        testing::{Probe, assert_close, naive_attention, randn},
    };

    fn gated(probe: &Probe) -> Gated {
        let param = |name: &str, tensor| Param { name: name.into(), tensor };
        Gated {
            weight: param("w", randn(5, &[probe.dims.n_heads, probe.dims.hidden_size])),
            bias: param("b", randn(6, &[probe.dims.n_heads])),
            softmax: Softmax { dims: probe.dims.clone() },
        }
    }

    #[test]
    fn matches_the_definition() {
        let probe = Probe::new(31, [2, 7, 7], 4, 2, true);
        let mask = Mask::new(true);
        let (expected, _) = naive_attention(&probe, |i, j| j <= i);
        let kind = gated(&probe);
        for (b, i, h, c) in probe.each_output() {
            let (weight, bias) = (&kind.weight.tensor, kind.bias.tensor.double_value(&[h]));
            let dot: f64 = (0..probe.dims.hidden_size)
                .map(|x| weight.double_value(&[h, x]) * probe.hidden.double_value(&[b, i, x]))
                .sum();
            let gate = 2.0 / (1.0 + (-dot - bias).exp());
            let _ = expected.get(b).get(h).get(i).get(c).g_mul_scalar_(gate);
        }
        assert_close("gated", &kind.forward(&probe.input(&mask)), &expected, 1e-12);
    }

    #[test]
    fn starts_out_as_softmax() {
        let probe = Probe::new(33, [2, 9, 9], 4, 2, true);
        let mut kind = gated(&probe);
        (kind.weight.tensor, kind.bias.tensor) =
            (kind.weight.tensor.zeros_like(), kind.bias.tensor.zeros_like());
        let mask = Mask::new(true);
        assert!(
            kind.forward(&probe.input(&mask)).equal(&kind.softmax.forward(&probe.input(&mask)))
        );
    }

    #[test]
    fn dropping_a_head_drops_its_gate() {
        let probe = Probe::new(32, [1, 5, 5], 4, 4, true);
        let mask = Mask::new(true);
        let mut kind = gated(&probe);
        let keep = [0i64, 3];
        let whole = kind.forward(&probe.input(&mask)).index_select(1, &Tensor::from_slice(&keep));
        let part = probe.select_heads(&keep);
        kind.select_heads(&keep, &part.dims).unwrap();
        assert_close("two of four heads", &kind.forward(&part.input(&mask)), &whole, 1e-12);
    }
}
