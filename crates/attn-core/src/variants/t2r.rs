//! T2R: linear attention whose features are one learned layer with a ReLU.
//!
//! ```text
//! z_i  = Σ_j φ_q(q_i)·φ_k(k_j) v_j / (eps + Σ_j φ_q(q_i)·φ_k(k_j))
//! φ(x) = ReLU(xW + b)      W, b: one a head, for queries and for keys
//! ```
//!
//! Kasai et al. 2021, "Finetuning Pretrained Transformers into RNNs", <https://arxiv.org/abs/2103.13076>, section 2.2.
//! Where no key shares a feature with the query the sums vanish; `eps`, which the paper does not have, lets z go to 0
//! there. The paper starts from random maps. Ours start as W = α [A, −A], b = 1 with orthonormal A and
//! α² = feature_dim·scale/2: as long as no feature is cut off φ(q)·φ(k) is proportional to 1 + scale·(qA)·(kA), which
//! to first order is exp(scale·q·k), for the whole of q and k from feature_dim = 2·head_dim on. Weights are never made,
//! so attention dropout has no effect.

use std::num::NonZeroU32;

use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::{
    Error,
    attention::{Attention, AttnInput, Dims, Nature, Own, Param, Projections, State, Stream},
    feature_map::{HeadMaps, orthogonal_start, project},
    linear::{self, Features, Kernel, LinearState},
    nn::Visitor,
    weights::Init,
};

/// Settings of [`T2r`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Features of a query or key.
    pub feature_dim: NonZeroU32,
    /// Added to what sums are divided by; above 0.
    pub eps: f64,
}

impl Default for Config {
    fn default() -> Self {
        Self { feature_dim: const { NonZeroU32::new(64).unwrap() }, eps: 1e-6 }
    }
}

impl Config {
    pub(super) fn build(
        &self,
        dims: &Dims,
        _: &Projections,
        own: &mut Own<'_, '_>,
    ) -> Result<Box<dyn Attention>, Error> {
        linear::check_eps("t2r", self.eps)?;
        let n_features = i64::from(self.feature_dim.get());
        let half = (n_features + 1) / 2;
        let alpha = (n_features as f64 * dims.scale.abs() / 2.0).sqrt();
        let start = orthogonal_start(dims.n_heads, dims.head_dim, half) * alpha;
        let start = Tensor::cat(&[start.shallow_clone(), -start], -1).narrow(-1, 0, n_features);
        let maps = HeadMaps::new(own, &start)?;
        let shape = [dims.n_heads, n_features];
        let biases = [
            own.get("q_map.bias", &shape, Init::Ones)?,
            own.get("k_map.bias", &shape, Init::Ones)?,
        ];
        Ok(Box::new(T2r { maps, biases, eps: self.eps, dims: dims.clone() }))
    }
}

/// Linear attention over rectified features.
#[derive(Debug)]
pub struct T2r {
    maps: HeadMaps,
    /// Of queries and of keys, `[n_heads, feature_dim]`.
    biases: [Param; 2],
    eps: f64,
    dims: Dims,
}

fn phi(x: &Tensor, weight: &Param, bias: &Param) -> Tensor {
    (project(x, &weight.tensor) + bias.tensor.to_kind(x.kind()).unsqueeze(1)).relu()
}

impl Kernel for T2r {
    fn dims(&self) -> &Dims {
        &self.dims
    }

    fn n_features(&self) -> i64 {
        self.maps.q.tensor.size()[2]
    }

    fn queries(&self, q: &Tensor, _: Stream) -> Tensor {
        phi(q, &self.maps.q, &self.biases[0])
    }

    fn keys(&self, k: &Tensor, _: Stream) -> Features {
        let values = phi(&self.dims.expand_kv(k), &self.maps.k, &self.biases[1]);
        Features { values, log_scale: None }
    }

    fn normalizer(&self, total: &Tensor) -> Tensor {
        total + self.eps
    }
}

impl Attention for T2r {
    fn forward(&self, input: &AttnInput) -> Tensor {
        linear::forward(self, input)
    }

    fn weights(&self, input: &AttnInput, rows: &[i64]) -> Tensor {
        linear::weights(self, input, rows)
    }

    /// 2 · n_heads · n · (2 · head_dim · feature_dim + 2 · feature_dim · (head_dim + 1)): maps, then sums of keys and values, and
    /// queries against them.
    fn flops(&self, n_tokens: i64) -> i64 {
        linear::flops(self, n_tokens, self.n_features())
    }

    super::holds_features!(|it| it.maps.q.tensor.size()[2], 5, 7);

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
        self.biases.iter().for_each(|bias| f(&bias.name, &bias.tensor));
    }

    fn select_heads(&mut self, heads: &[i64], dims: &Dims) -> Result<(), Error> {
        self.maps.select_heads(heads);
        self.biases.iter_mut().for_each(|bias| bias.select(0, heads));
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
        mask::Mask,
        testing::{Probe, assert_close, naive_attention, naive_linear, partly_hidden, randn},
        weights::Weights,
    };

    fn t2r(probe: &Probe, n_features: i64) -> T2r {
        let param =
            |seed: u64, size: &[i64]| Param { name: seed.to_string(), tensor: randn(seed, size) };
        let (h, d) = (probe.dims.n_heads, probe.dims.head_dim);
        let map = |seed| param(seed, &[h, d, n_features]);
        T2r {
            maps: HeadMaps { q: map(5), k: map(6) },
            biases: [param(7, &[h, n_features]), param(8, &[h, n_features])],
            eps: 1e-300, // The definition has none.
            dims: probe.dims.clone(),
        }
    }

    #[test]
    fn matches_the_definition() {
        for n in [1, 7, 63] {
            for causal in [false, true] {
                let probe = Probe::new(51, [2, n, n], 4, 2, causal);
                let kind = t2r(&probe, 9);
                let rows = |x: &Param, width| {
                    Vec::<Vec<f64>>::try_from(x.tensor.view([4, width])).unwrap()
                };
                let maps = [&kind.maps.q, &kind.maps.k].map(|map| rows(map, 6 * 9));
                let biases = [&kind.biases[0], &kind.biases[1]].map(|bias| rows(bias, 9));
                let phi = |which: usize, head: i64, x: &[f64]| -> Vec<f64> {
                    let (map, bias) = (&maps[which][head as usize], &biases[which][head as usize]);
                    (0..9)
                        .map(|f| {
                            let u: f64 =
                                x.iter().enumerate().map(|(c, x)| x * map[c * 9 + f]).sum();
                            (u + bias[f]).max(0.0)
                        })
                        .collect()
                };
                for mask in [Mask::new(causal), partly_hidden(causal, 2, n)] {
                    let (z, weights) = naive_linear(
                        &probe,
                        &mask,
                        |head, x| phi(0, head, x),
                        |head, x| phi(1, head, x),
                    );
                    let name = format!("{n} tokens, {:?}", mask.padding());
                    assert_close(&name, &kind.forward(&probe.input(&mask)), &z, 1e-12);
                    let rows: Vec<i64> = (0..n).collect();
                    let found = kind.weights(&probe.input(&mask), &rows);
                    assert_close(&name, &found, &weights, 1e-12);
                }
            }
        }
    }

    #[test]
    fn starts_as_softmax_to_first_order() {
        let mut probe = Probe::new(52, [1, 20, 20], 2, 2, true);
        let options = (tch::Kind::Double, tch::Device::Cpu);
        let none = || (Tensor::zeros([1, 1], options), None);
        let projections = Projections { q: none(), k: none(), v: none() };
        let mut weights = Weights::from_seed(7, options.0, options.1);
        let config =
            Config { feature_dim: const { NonZeroU32::new(12).unwrap() }, ..Config::default() };
        let kind =
            config.build(&probe.dims, &projections, &mut Own::new(&mut weights, "x")).unwrap();
        (probe.q, probe.k) = (probe.q * 0.1, probe.k * 0.1);
        let (_, expected) = naive_attention(&probe, |i, j| j <= i);
        let rows: Vec<i64> = (0..20).collect();
        let found = kind.weights(&probe.input(&Mask::new(true)), &rows);
        // Scores are about 0.02: the second order is 2e-4.
        assert_close("first order", &found, &expected, 5e-4);
    }

    #[test]
    fn sums_that_vanish_give_zero() {
        let probe = Probe::new(53, [1, 5, 5], 2, 2, true);
        let mut kind = t2r(&probe, 4);
        kind.eps = 1e-6;
        kind.biases[1].tensor = kind.biases[1].tensor.full_like(-1e3);
        let z = kind.forward(&probe.input(&Mask::new(true)));
        assert_eq!(z.abs().max().double_value(&[]), 0.0);
    }
}
