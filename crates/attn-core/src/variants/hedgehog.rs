//! Hedgehog: linear attention with a small learned feature map that can be as spiky as softmax attention.
//!
//! ```text
//! z_i  = Σ_j φ_q(q_i)·φ_k(k_j) v_j / Σ_j φ_q(q_i)·φ_k(k_j)
//! φ(x) = softmax(xW) ⊕ softmax(−xW)   or   exp(xW) ⊕ exp(−xW)      W: one a head, for queries and for keys
//! ```
//!
//! Zhang et al. 2024, "The Hedgehog & the Porcupine", <https://arxiv.org/abs/2402.04347>, section 4 (the exponential
//! map and its version with a softmax over the features); the softmax one as in LoLCATs, Zhang et al. 2024,
//! <https://arxiv.org/abs/2410.10254>, section 3. Features below 1e-12 of the largest are raised to that, as in the
//! published code. That code divides the exponential map of each key by its largest feature; here that factor stays,
//! as a logarithm, and the map is the paper's. Queries and keys are mapped as they come, after rotary. W starts as the
//! identity, or as a random orthogonal matrix where features are not as many as channels. Weights are never made, so
//! attention dropout has no effect.

use std::num::NonZeroU32;

use serde::{Deserialize, Serialize};
use tch::Tensor;

pub use crate::feature_map::Activation;
use crate::{
    Error,
    attention::{Attention, AttnInput, Dims, Nature, Own, Projections, State, Stream},
    feature_map::{HeadMaps, project},
    linear::{self, Features, Kernel, LinearState},
    nn::Visitor,
};

/// Settings of [`Hedgehog`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Columns of W; a query or key has twice as many features.
    pub feature_dim: NonZeroU32,
    /// What becomes of xW.
    pub activation: Activation,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            feature_dim: const { NonZeroU32::new(64).unwrap() },
            activation: Activation::default(),
        }
    }
}

impl Config {
    pub(super) fn build(
        &self,
        dims: &Dims,
        _: &Projections,
        own: &mut Own<'_, '_>,
    ) -> Result<Box<dyn Attention>, Error> {
        let maps = HeadMaps::near_identity(own, dims, self.feature_dim.get().into())?;
        Ok(Box::new(Hedgehog { maps, activation: self.activation, dims: dims.clone() }))
    }
}

/// Linear attention over learned features.
#[derive(Debug)]
pub struct Hedgehog {
    maps: HeadMaps,
    activation: Activation,
    dims: Dims,
}

impl Kernel for Hedgehog {
    fn dims(&self) -> &Dims {
        &self.dims
    }

    fn n_features(&self) -> i64 {
        2 * self.maps.q.tensor.size()[2]
    }

    fn queries(&self, q: &Tensor, _: Stream) -> Tensor {
        self.activation.features(&project(q, &self.maps.q.tensor)).values
    }

    fn keys(&self, k: &Tensor, _: Stream) -> Features {
        self.activation.features(&project(&self.dims.expand_kv(k), &self.maps.k.tensor))
    }
}

impl Attention for Hedgehog {
    fn forward(&self, input: &AttnInput) -> Tensor {
        linear::forward(self, input)
    }

    fn weights(&self, input: &AttnInput, rows: &[i64]) -> Tensor {
        linear::weights(self, input, rows)
    }

    /// 2 · n_heads · n · (2 · head_dim · feature_dim + 2 · m · (head_dim + 1)), m = 2 · feature_dim: maps, then sums of keys and
    /// values, and queries against them.
    fn flops(&self, n_tokens: i64) -> i64 {
        linear::flops(self, n_tokens, self.maps.q.tensor.size()[2])
    }

    super::holds_features!(|it| it.maps.q.tensor.size()[2], 7, 18);

    fn nature(&self) -> Nature {
        Nature { reach: 0, chooses: false, reads_coordinates: true, has_own_slopes: false }
    }

    fn start(&self) -> Box<dyn State> {
        Box::new(LinearState::default())
    }

    fn step(&self, input: &AttnInput, state: &mut dyn State) -> Tensor {
        linear::step(self, input, state)
    }

    fn visit(&self, f: &mut Visitor<'_>) {
        self.maps.visit(f);
    }

    fn select_heads(&mut self, heads: &[i64], dims: &Dims) -> Result<(), Error> {
        self.maps.select_heads(heads);
        self.dims = dims.clone();
        Ok(())
    }

    fn regroup_kv(&mut self, _: &[Vec<i64>], dims: &Dims) -> Result<(), Error> {
        self.dims = dims.clone(); // Maps belong to query heads, those of keys too.
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Variant,
        mask::Mask,
        testing::{Probe, assert_close, naive_linear, partly_hidden, randn},
    };

    fn hedgehog(probe: &Probe, feature_dim: i64, activation: Activation) -> Hedgehog {
        let param = |seed: u64| {
            let tensor = randn(seed, &[probe.dims.n_heads, probe.dims.head_dim, feature_dim]);
            crate::attention::Param { name: seed.to_string(), tensor }
        };
        let maps = HeadMaps { q: param(5), k: param(6) };
        Hedgehog { maps, activation, dims: probe.dims.clone() }
    }

    /// φ of one head's vector by the formula; `weight` is `[6, 5]`.
    fn phi(x: &[f64], weight: &[f64], activation: Activation) -> Vec<f64> {
        let half = |sign: f64| -> Vec<f64> {
            let exp: Vec<f64> = (0..5)
                .map(|f| x.iter().enumerate().map(|(c, x)| x * weight[c * 5 + f]).sum::<f64>())
                .map(|u| (sign * u).exp())
                .collect();
            let total: f64 = match activation {
                Activation::Softmax => exp.iter().sum(),
                Activation::Exp => 1.0,
            };
            exp.iter().map(|e| e / total).collect()
        };
        [half(1.0), half(-1.0)].concat()
    }

    #[test]
    fn matches_the_definition() {
        for activation in [Activation::Softmax, Activation::Exp] {
            for n in [1, 7, 63] {
                for causal in [false, true] {
                    let probe = Probe::new(41, [2, n, n], 4, 2, causal);
                    let kind = hedgehog(&probe, 5, activation);
                    let maps = [&kind.maps.q, &kind.maps.k]
                        .map(|map| Vec::<Vec<f64>>::try_from(map.tensor.view([4, 30])).unwrap());
                    let masks = [Mask::new(causal), partly_hidden(causal, 2, n)];
                    for mask in &masks {
                        let (z, weights) = naive_linear(
                            &probe,
                            mask,
                            |head, x| phi(x, &maps[0][head as usize], activation),
                            |head, x| phi(x, &maps[1][head as usize], activation),
                        );
                        let name = format!("{activation:?}, {n} tokens, {:?}", mask.padding());
                        assert_close(&name, &kind.forward(&probe.input(mask)), &z, 1e-12);
                        let rows: Vec<i64> = (0..n).collect();
                        let found = kind.weights(&probe.input(mask), &rows);
                        assert_close(&name, &found, &weights, 1e-12);
                    }
                }
            }
        }
    }

    #[test]
    fn starts_as_the_identity_where_it_can() {
        let probe = Probe::new(42, [1, 5, 5], 4, 2, true);
        for (feature_dim, is_eye) in [(6, true), (4, false), (9, false)] {
            let config =
                Config { feature_dim: NonZeroU32::new(feature_dim).unwrap(), ..Config::default() };
            let mut weights =
                crate::weights::Weights::from_seed(7, tch::Kind::Double, tch::Device::Cpu);
            let none = || (Tensor::zeros([1, 1], (tch::Kind::Double, tch::Device::Cpu)), None);
            let projections = Projections { q: none(), k: none(), v: none() };
            let kind = Variant::Hedgehog(config)
                .build(&probe.dims, &projections, &mut Own::new(&mut weights, "probe"))
                .unwrap();
            kind.visit(&mut |name, map| {
                assert_eq!(map.size(), [4, 6, i64::from(feature_dim)], "{name}");
                let gram = map.get(0).tr().matmul(&map.get(0));
                let small =
                    if feature_dim > 6 { map.get(0).matmul(&map.get(0).tr()) } else { gram };
                let eye = Tensor::eye(small.size()[0], (tch::Kind::Double, tch::Device::Cpu));
                assert_close(name, &small, &eye, 1e-12);
                assert_eq!(is_eye, map.get(0).size() == eye.size() && map.get(0).equal(&eye));
            });
        }
    }

    #[test]
    fn exponentials_too_large_for_a_float_cancel() {
        let probe = Probe::new(43, [1, 9, 9], 2, 2, true);
        let mut kind = hedgehog(&probe, 6, Activation::Exp);
        kind.maps.k.tensor *= 300.0;
        let z = kind.forward(&probe.input(&Mask::new(true)));
        assert_eq!(z.isfinite().all().int64_value(&[]), 1);
    }

    #[test]
    fn dropping_a_head_drops_its_maps() {
        let probe = Probe::new(44, [1, 5, 5], 4, 4, true);
        let mask = Mask::new(true);
        let mut kind = hedgehog(&probe, 5, Activation::Softmax);
        let keep = [0i64, 3];
        let whole = kind.forward(&probe.input(&mask)).index_select(1, &Tensor::from_slice(&keep));
        let part = probe.select_heads(&keep);
        kind.select_heads(&keep, &part.dims).unwrap();
        assert_close("two of four heads", &kind.forward(&part.input(&mask)), &whole, 1e-12);
    }
}
