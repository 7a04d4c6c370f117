//! Performer: linear attention whose random features estimate the softmax kernel (FAVOR+).
//!
//! ```text
//! z_i = Σ_j φ(q_i)·φ(k_j) v_j / Σ_j φ(q_i)·φ(k_j),   with x = √scale·q or √scale·k and ω_1 … ω_m ~ N(0, I):
//! positive       φ(x) = e^(−‖x‖²/2) [e^(ω·x)]
//! hyperbolic     φ(x) = e^(−‖x‖²/2) [e^(ω·x), e^(−ω·x)]
//! trigonometric  φ(x) = e^(+‖x‖²/2) [sin ω·x, cos ω·x]
//! relu           φ(x) = [ReLU(ω·x)]
//! ```
//!
//! Choromanski et al. 2020, "Rethinking Attention with Performers", <https://arxiv.org/abs/2009.14794>, sections 2.3
//! and 2.4; the first three estimate exp(x·y) without bias (Lemma 1), the last is the paper's generalized kernel.
//! `orthogonal` takes ω in blocks of head_dim orthogonal vectors with the norms of Gaussian ones. As in the published
//! code the heads of a layer share one draw. Weights are never made, so attention dropout has no effect.
//!
//! The published code divides the features of keys by their largest over features *and positions* and then adds a
//! constant. Under a causal mask that lets later keys change earlier outputs, as the constant is not divided along.
//! Here each key's features are divided by their own largest, `eps` is added, and the factor comes back in the sums,
//! which are kept relative to the largest factor so far (`linear.rs`): φ(k) = e^(ω·k − ‖k‖²/2) + eps · the largest of
//! them, a function of the key alone. Queries are treated so in the published code, too. Draws differ in one more
//! point: blocks are orthogonalized without the QR decomposition's rule for signs, by which the first vectors of all
//! blocks would lie in one half of space and positive features would be biased.
//!
//! In `f32` on the CPU a kernel takes positive features under a causal mask (`attn_torch::performer`): features are not kept,
//! neither for later nor for the backward pass.
//!
//! Trigonometric features are here to show why not: their sums are signed, and where they cancel z is far off. What is
//! divided by is kept `eps` away from 0, in units of the largest e^(‖k‖²/2) so far.

use std::{
    num::NonZeroU32,
    sync::{Mutex, PoisonError},
};

use attn_torch::PositiveFeatures;
use rand_distr::{Distribution, StandardNormal};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::{
    Error,
    attention::{Attention, AttnInput, Dims, Nature, Own, Projections, State, Stream},
    feature_map::orthonormal_rows,
    linear::{self, Kernel, LinearState},
    stretches,
};

/// Which features; the formulas stand above.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Features {
    /// One for each projection, all above 0.
    #[default]
    Positive,
    /// Two for each projection, all above 0; a lower variance.
    Hyperbolic,
    /// One for each projection, of another kernel than softmax attention's.
    Relu,
    /// Two for each projection, of either sign.
    Trigonometric,
}

/// Settings of [`Performer`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Random projections, m above.
    pub n_features: NonZeroU32,
    /// What is made of them.
    pub features: Features,
    /// Whether projections come in orthogonal blocks.
    pub orthogonal: bool,
    /// Training batches between draws (`train.accumulation` of them are a step); 0 keeps the first, which is also what runs
    /// outside of training use.
    pub redraw_every: u64,
    /// Added to features, relative to the largest of a query or key (of `relu` as it is); above 0. Absent: 1e-3 for
    /// `relu` and 1e-6 otherwise, as in the published code (one of whose two defaults is 1e-4, which drowns the small
    /// features of spiky heads).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eps: Option<f64>,
    /// Of the draws.
    pub seed: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            n_features: const { NonZeroU32::new(256).unwrap() },
            features: Features::default(),
            orthogonal: true,
            redraw_every: 0,
            eps: None,
            seed: 0,
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
        linear::check_eps("performer", self.eps())?;
        // √scale goes to queries and keys.
        if dims.scale < 0.0 {
            let (field, value) = ("scale", dims.scale.to_string());
            let problem = "the layer's scale must not be negative".into();
            return Err(Error::Setting { kind: "performer", field, value, problem });
        }
        Ok(Box::new(Performer::new(self.clone(), dims.clone())))
    }

    fn eps(&self) -> f64 {
        self.eps.unwrap_or(if self.features == Features::Relu { 1e-3 } else { 1e-6 })
    }

    /// The number of the draw that the step uses.
    fn draw(&self, stream: Stream) -> u64 {
        stream.step.checked_div(self.redraw_every).unwrap_or(0)
    }

    /// ω_1 … ω_m of a layer: `[n_features, head_dim]`, `f64`.
    fn projections(&self, draw: u64, layer: u64, head_dim: i64) -> Tensor {
        let (m, d) = (self.n_features.get() as usize, head_dim as usize);
        let mut rng = Stream { seed: self.seed, step: draw, layer }.rng();
        let mut rows: Vec<f64> = Vec::with_capacity(m * d);
        if self.orthogonal {
            while rows.len() < m * d {
                rows.extend(orthonormal_rows(&mut rng, d.min(m - rows.len() / d), d));
            }
            for row in rows.chunks_mut(d) {
                let square: f64 =
                    (0..d).map(|_| StandardNormal.sample(&mut rng)).map(|x: f64| x * x).sum();
                row.iter_mut().for_each(|x| *x *= square.sqrt());
            }
        } else {
            rows.extend((0..m * d).map(|_| -> f64 { StandardNormal.sample(&mut rng) }));
        }
        Tensor::from_slice(&rows).view([m as i64, head_dim])
    }
}

/// What a draw depends on, and what it is converted to.
type DrawKey = (u64, u64, Kind, Device);

/// Linear attention over random features.
#[derive(Debug)]
pub struct Performer {
    config: Config,
    dims: Dims,
    /// The last draw used.
    drawn: Mutex<Option<(DrawKey, Tensor)>>,
}

impl Performer {
    fn new(config: Config, dims: Dims) -> Self {
        Self { config, dims, drawn: Mutex::new(None) }
    }

    /// Features of a query or key.
    fn n_features(&self) -> i64 {
        let times = match self.config.features {
            Features::Positive | Features::Relu => 1,
            Features::Hyperbolic | Features::Trigonometric => 2,
        };
        times * i64::from(self.config.n_features.get())
    }

    /// The projections as `[head_dim, n_features]`, in the kind of `x` and on its device.
    fn drawn(&self, x: &Tensor, stream: Stream) -> Tensor {
        let key = (self.config.draw(stream), stream.layer, x.kind(), x.device());
        let mut drawn = self.drawn.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((found, projections)) = drawn.as_ref()
            && *found == key
        {
            return projections.shallow_clone();
        }
        let projections = self.config.projections(key.0, key.1, self.dims.head_dim);
        let projections = projections.tr().contiguous().to_device(key.3).to_kind(key.2);
        *drawn = Some((key, projections.shallow_clone()));
        projections
    }

    /// φ of queries or keys, `[b, heads, n, head_dim]`, as features and the logarithm of their factor.
    fn features(&self, x: &Tensor, stream: Stream) -> linear::Features {
        let x = x * self.dims.scale.sqrt();
        let u = x.matmul(&self.drawn(&x, stream)); // [b, heads, n, m]
        let half_square = || x.square().sum_dim_intlist([-1i64].as_slice(), false, x.kind()) / 2.0;
        let positive = |u: Tensor| {
            let largest = u.amax([-1i64].as_slice(), true);
            let values = if u.requires_grad() {
                (u - &largest).exp_() + self.config.eps()
            } else {
                // The largest tensor by far: no other is made of it.
                let mut u = u;
                u.g_sub_(&largest).exp_().g_add_scalar_(self.config.eps())
            };
            linear::Features { values, log_scale: Some(largest.squeeze_dim(-1) - half_square()) }
        };
        match self.config.features {
            Features::Positive => positive(u),
            Features::Hyperbolic => positive(Tensor::cat(&[u.shallow_clone(), -u], -1)),
            Features::Relu => {
                linear::Features { values: u.relu() + self.config.eps(), log_scale: None }
            }
            Features::Trigonometric => linear::Features {
                // With the usual 1/m, here for the divisor's sake: φ(q)·φ(k) is at most 1.
                values: Tensor::cat(&[u.sin(), u.cos()], -1)
                    / f64::from(self.config.n_features.get()).sqrt(),
                log_scale: Some(half_square()),
            },
        }
    }
}

impl Kernel for Performer {
    fn dims(&self) -> &Dims {
        &self.dims
    }

    fn n_features(&self) -> i64 {
        let m = i64::from(self.config.n_features.get());
        match self.config.features {
            Features::Positive | Features::Relu => m,
            Features::Hyperbolic | Features::Trigonometric => 2 * m,
        }
    }

    fn queries(&self, q: &Tensor, stream: Stream) -> Tensor {
        self.features(q, stream).values
    }

    fn keys(&self, k: &Tensor, stream: Stream) -> linear::Features {
        if self.maps_kv_heads() {
            self.features(k, stream)
        } else {
            self.features(&self.dims.expand_kv(k), stream)
        }
    }

    fn maps_kv_heads(&self) -> bool {
        self.dims.is_evenly_grouped()
    }

    fn normalizer(&self, total: &Tensor) -> Tensor {
        if self.config.features != Features::Trigonometric {
            return total + total.eq(0.0);
        }
        let eps = self.config.eps();
        let least = total.ge(0.0).to_kind(total.kind()) * (2.0 * eps) - eps; // eps, with the sign of the total
        total.where_self(&total.abs().ge(eps), &least)
    }
}

impl Performer {
    /// z by a kernel, where there is one.
    fn by_kernel(&self, input: &AttnInput) -> Option<Tensor> {
        let AttnInput { q, k, v, mask, .. } = *input;
        let n = q.size()[2];
        // Beside a larger eps features are lost to f32's rounding on the way back.
        let serves = self.config.features == Features::Positive
            && self.config.eps() <= 0.1
            && mask.causal()
            && n == k.size()[2]
            && stretches::serves(q, &self.dims, 0.0);
        serves.then(|| {
            let omega = self.drawn(q, input.stream).tr();
            let keep = mask.keep().filter(|_| !mask.is_plain());
            let (scale, eps) = (self.dims.scale, self.config.eps());
            let features = PositiveFeatures { omega: &omega, scale, eps, keep };
            let [k, v] = stretches::by_head([k, v], q, &self.dims);
            stretches::served(attn_torch::performer(q, &k, &v, &features))
        })
    }
}

impl Attention for Performer {
    fn forward(&self, input: &AttnInput) -> Tensor {
        self.by_kernel(input).unwrap_or_else(|| linear::forward(self, input))
    }

    fn weights(&self, input: &AttnInput, rows: &[i64]) -> Tensor {
        linear::weights(self, input, rows)
    }

    /// (n_heads + heads of keys) · n · (2 · head_dim · n_features + 2 · m · (head_dim + 1)), m features of a vector: projections,
    /// then sums of keys and values, and queries against them. Keys have n_kv_heads where the layer is evenly grouped.
    fn flops(&self, n_tokens: i64) -> i64 {
        linear::flops(self, n_tokens, i64::from(self.config.n_features.get()))
    }

    super::holds_features!(Self::n_features, 3, 8);

    fn nature(&self) -> Nature {
        Nature { reach: 0, chooses: false, reads_coordinates: true, has_own_slopes: false }
    }

    fn start(&self) -> Box<dyn State> {
        Box::new(LinearState::default())
    }

    fn step(&self, input: &AttnInput, state: &mut dyn State) -> Tensor {
        linear::step(self, input, state)
    }

    super::follows_dims!();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        mask::Mask,
        testing::{
            Probe, assert_close, naive_attention, naive_linear, partly_hidden, randn, relative_rms,
        },
    };

    const ALL: [Features; 4] =
        [Features::Positive, Features::Hyperbolic, Features::Relu, Features::Trigonometric];

    fn config(features: Features, n_features: u32) -> Config {
        let n_features = NonZeroU32::new(n_features).unwrap();
        Config { n_features, features, ..Config::default() }
    }

    /// φ of one vector by the formulas above, `eps` relative to the largest feature where features are exponentials.
    fn phi(config: &Config, x: &[f64], scale: f64, omega: &[Vec<f64>]) -> Vec<f64> {
        let x: Vec<f64> = x.iter().map(|x| x * scale.sqrt()).collect();
        let half_square = x.iter().map(|x| x * x).sum::<f64>() / 2.0;
        let dots: Vec<f64> =
            omega.iter().map(|w| w.iter().zip(&x).map(|(w, x)| w * x).sum()).collect();
        let of = |f: &dyn Fn(f64) -> f64| dots.iter().map(|&u| f(u)).collect::<Vec<f64>>();
        let raised = |features: Vec<f64>| {
            let largest = features.iter().copied().fold(0.0, f64::max);
            features.iter().map(|f| f + config.eps() * largest).collect()
        };
        match config.features {
            Features::Positive => raised(of(&|u| (u - half_square).exp())),
            Features::Hyperbolic => raised(
                [of(&|u| (u - half_square).exp()), of(&|u| (-u - half_square).exp())].concat(),
            ),
            Features::Relu => of(&|u| u.max(0.0) + config.eps()),
            Features::Trigonometric => {
                [of(&|u| half_square.exp() * u.sin()), of(&|u| half_square.exp() * u.cos())]
                    .concat()
            }
        }
    }

    fn rows(x: &Tensor) -> Vec<Vec<f64>> {
        Vec::<Vec<f64>>::try_from(x).unwrap()
    }

    #[test]
    fn matches_the_definition() {
        for features in ALL {
            for (n_heads, n_kv_heads) in [(4, 2), (3, 1)] {
                for n in [1, 7, 63] {
                    for causal in [false, true] {
                        let probe = Probe::new(61, [2, n, n], n_heads, n_kv_heads, causal);
                        let config = config(features, 40);
                        let omega = rows(&config.projections(0, 0, 6));
                        let kind = Performer::new(config.clone(), probe.dims.clone());
                        let phi = |_, x: &[f64]| phi(&config, x, probe.dims.scale, &omega);
                        for mask in [Mask::new(causal), partly_hidden(causal, 2, n)] {
                            let (z, weights) = naive_linear(&probe, &mask, phi, phi);
                            let name = format!("{features:?}, {n} tokens, {:?}", mask.padding());
                            assert_close(&name, &kind.forward(&probe.input(&mask)), &z, 1e-11);
                            let rows: Vec<i64> = (0..n).collect();
                            let found = kind.weights(&probe.input(&mask), &rows);
                            assert_close(&name, &found, &weights, 1e-11);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn uneven_heads_read_their_own_keys() {
        let mut probe = Probe::new(62, [1, 9, 9], 3, 2, true);
        probe.dims.kv_of_head = vec![0, 1, 1];
        let config = config(Features::Positive, 40);
        let omega = rows(&config.projections(0, 0, 6));
        let phi = |_, x: &[f64]| phi(&config, x, probe.dims.scale, &omega);
        let mask = Mask::new(true);
        let (z, _) = naive_linear(&probe, &mask, phi, phi);
        let kind = Performer::new(config.clone(), probe.dims.clone());
        assert_close("uneven", &kind.forward(&probe.input(&mask)), &z, 1e-12);
    }

    #[test]
    fn features_estimate_the_softmax_kernel_without_bias() {
        const DRAWS: u64 = 4000;
        let mut probe = Probe::new(63, [1, 2, 2], 1, 1, false);
        let unit = |x: Tensor, norm: f64| {
            let square = x.square().sum_dim_intlist([-1i64].as_slice(), true, Kind::Double);
            x / square.sqrt() * norm
        };
        (probe.q, probe.k) = (unit(probe.q, 1.0), unit(probe.k, 0.8));
        // A scale of 1, so that the norms are those of x: the harder case.
        probe.dims.scale = 1.0;
        let expected = probe.q.matmul(&probe.k.transpose(-2, -1)).exp().view([-1]);
        for features in [Features::Positive, Features::Hyperbolic, Features::Trigonometric] {
            for orthogonal in [false, true] {
                let config = Config {
                    orthogonal,
                    redraw_every: 1,
                    // What is left of 0, as far as 4,000 draws can tell.
                    eps: Some(1e-300),
                    ..config(features, 9)
                };
                let kind = Performer::new(config, probe.dims.clone());
                let estimates: Vec<Tensor> = (0..DRAWS)
                    .map(|step| {
                        let stream = Stream { seed: 0, step, layer: 0 };
                        let [x, y] = [&probe.q, &probe.k].map(|x| {
                            let found = kind.features(x, stream);
                            let factor = found.log_scale.unwrap().exp().unsqueeze(-1);
                            found.values * factor
                        });
                        let n = match features {
                            Features::Positive => 9.0,
                            Features::Hyperbolic => 18.0,
                            _ => 1.0, // is within the features
                        };
                        (x.matmul(&y.transpose(-2, -1)) / n).view([-1])
                    })
                    .collect();
                let estimates = Tensor::stack(&estimates, 0); // [draws, pairs]
                let mean = estimates.mean_dim([0i64].as_slice(), false, Kind::Double);
                let error =
                    estimates.std_dim([0i64].as_slice(), true, false) / (DRAWS as f64).sqrt();
                let off = ((mean - &expected) / error).abs().max().double_value(&[]);
                assert!(off < 4.0, "{features:?}, orthogonal {orthogonal}: {off} standard errors");
            }
        }
    }

    #[test]
    fn the_error_falls_with_the_root_of_the_number_of_features() {
        let probe = Probe::new(64, [1, 16, 16], 4, 4, false);
        let [q, k] = [&probe.q, &probe.k]
            .map(|x| x / x.square().sum_dim_intlist([-1i64].as_slice(), true, Kind::Double).sqrt());
        let probe = Probe { q, k, ..probe };
        let mask = Mask::new(false);
        let (expected, _) = naive_attention(&probe, |_, _| true);
        for features in [Features::Positive, Features::Hyperbolic] {
            for orthogonal in [false, true] {
                // Least squares on (log m, log error).
                let points: Vec<(f64, f64)> = [64u32, 256, 1024, 4096]
                    .into_iter()
                    .map(|m| {
                        let square: f64 = (0..16)
                            .map(|seed| {
                                let config = Config { orthogonal, seed, ..config(features, m) };
                                let kind = Performer::new(config, probe.dims.clone());
                                relative_rms(&kind.forward(&probe.input(&mask)), &expected).powi(2)
                            })
                            .sum();
                        (f64::from(m).ln(), (square / 16.0).ln() / 2.0)
                    })
                    .collect();
                let n = points.len() as f64;
                let [mean_x, mean_y] = [0, 1].map(|axis| {
                    points.iter().map(|&(x, y)| if axis == 0 { x } else { y }).sum::<f64>() / n
                });
                let slope = points.iter().map(|(x, y)| (x - mean_x) * (y - mean_y)).sum::<f64>()
                    / points.iter().map(|(x, _)| (x - mean_x).powi(2)).sum::<f64>();
                assert!(
                    (slope + 0.5).abs() < 0.1,
                    "{features:?}, orthogonal {orthogonal}: error ∝ m^{slope:.3}, {points:?}"
                );
            }
        }
    }

    /// Positive features with the published code's stabilizer: the largest over features, heads' positions included,
    /// and a constant after it.
    fn published(probe: &Probe, omega: &Tensor) -> Tensor {
        let eps = 1e-4;
        let [q, k] = [&probe.q, &probe.k].map(|x| x * probe.dims.scale.sqrt());
        let logs = |x: &Tensor| {
            let half = x.square().sum_dim_intlist([-1i64].as_slice(), true, Kind::Double) / 2.0;
            (x.matmul(&omega.tr()), half)
        };
        let (u, half) = logs(&q);
        let q = (&u - half - u.amax([-1i64].as_slice(), true)).exp() + eps;
        let (u, half) = logs(&k);
        let k = (&u - half - u.amax([-1i64, -2].as_slice(), true)).exp() + eps;
        let scores = q.matmul(&k.transpose(-2, -1)).tril(0);
        let total = scores.sum_dim_intlist([-1i64].as_slice(), true, Kind::Double);
        (scores / total).matmul(&probe.v)
    }

    #[test]
    fn the_published_stabilizer_leaks_and_ours_does_not() {
        let config = config(Features::Positive, 40);
        let before = Probe::new(65, [1, 12, 12], 2, 2, true);
        let after = before.to(Kind::Double, Device::Cpu);
        let last = after.k.copy();
        let _ = last.narrow(2, 11, 1).g_mul_scalar_(6.0);
        let after = Probe { k: last, ..after };
        let omega = config.projections(0, 0, 6);
        let past = |z: Tensor| z.narrow(2, 0, 11);
        let leak =
            relative_rms(&past(published(&after, &omega)), &past(published(&before, &omega)));
        assert!(leak > 1e-4, "{leak}");
        let kind = Performer::new(config, before.dims.clone());
        let mask = Mask::new(true);
        let [before, after] = [before, after].map(|probe| past(kind.forward(&probe.input(&mask))));
        assert_close("ours", &after, &before, 1e-12);
    }

    #[test]
    fn signed_sums_that_cancel_stay_finite() {
        let probe = Probe::new(66, [1, 30, 30], 2, 2, true);
        let probe = Probe { q: &probe.q * 20.0, k: &probe.k * 20.0, ..probe };
        let kind = Performer::new(config(Features::Trigonometric, 2), probe.dims.clone());
        let z = kind.forward(&probe.input(&Mask::new(true)));
        assert_eq!(z.isfinite().all().int64_value(&[]), 1);
        let totals = Tensor::from_slice(&[0.0, 1e-9, -1e-9, 0.5, -0.5]);
        let expected = Tensor::from_slice(&[1e-6, 1e-6, -1e-6, 0.5, -0.5]);
        assert_close("divisors", &kind.normalizer(&totals), &expected, 1e-15);
    }

    #[test]
    fn draws_change_with_steps_and_layers_and_stay_in_a_state() {
        let probe = Probe::new(67, [1, 6, 6], 2, 2, true);
        let mask = Mask::new(true);
        let kind = Performer::new(
            Config { redraw_every: 10, ..config(Features::Positive, 8) },
            probe.dims.clone(),
        );
        let z = |step, layer| {
            let stream = Stream { seed: 0, step, layer };
            kind.forward(&AttnInput { stream, ..probe.input(&mask) })
        };
        assert!(z(0, 0).equal(&z(9, 0)), "the same draw");
        assert!(!z(0, 0).equal(&z(10, 0)), "another draw");
        assert!(!z(0, 0).equal(&z(0, 1)), "another layer");
        assert!(z(0, 0).equal(&z(0, 0)), "the first again");

        let mut state = kind.start();
        let mut pieces = Vec::new();
        for at in 0..6 {
            let cut = |x: &Tensor, dim| x.narrow(dim, at, 1);
            let (hidden, q, k, v) =
                (cut(&probe.hidden, 1), cut(&probe.q, 2), cut(&probe.k, 2), cut(&probe.v, 2));
            let stream = Stream { seed: 0, step: 5 * at as u64, layer: 0 };
            let input =
                AttnInput { hidden: &hidden, q: &q, k: &k, v: &v, stream, ..probe.input(&mask) };
            pieces.push(kind.step(&input, state.as_mut()));
        }
        assert_close("decoded", &Tensor::cat(&pieces, 2), &z(0, 0), 1e-12);
        // Two heads: 8 features times 6 channels and the total, and the largest factor, in f64.
        assert_eq!(state.bytes(), 2 * (8 * 7 + 1) * 8);
    }

    #[test]
    fn long_keys_neither_overflow_nor_vanish() {
        let probe = Probe::new(68, [1, 40, 40], 2, 2, true).to(Kind::Float, Device::Cpu);
        let probe = Probe { q: &probe.q * 30.0, k: &probe.k * 30.0, ..probe };
        for features in [Features::Positive, Features::Hyperbolic] {
            let kind = Performer::new(config(features, 64), probe.dims.clone());
            for causal in [true, false] {
                let z = kind.forward(&probe.input(&Mask::new(causal)));
                assert_eq!(z.isfinite().all().int64_value(&[]), 1, "{features:?}");
            }
        }
    }

    #[test]
    fn segments_of_a_long_text_add_up() {
        // 8 heads of 2,048 features: segments of 128 tokens.
        let probe = Probe::new(70, [2, 300, 300], 4, 2, true);
        let kind = Performer::new(config(Features::Positive, 2048), probe.dims.clone());
        for mask in [Mask::new(true), partly_hidden(true, 2, 300)] {
            let gradients = |forward: &dyn Fn(&AttnInput) -> Tensor| {
                let [q, k] = [&probe.q, &probe.k].map(|x| x.copy().set_requires_grad(true));
                let z = forward(&AttnInput { q: &q, k: &k, ..probe.input(&mask) });
                (&z * randn(1, &z.size())).sum(Kind::Double).backward();
                [z.detach(), q.grad(), k.grad()]
            };
            let found = gradients(&|input| kind.forward(input));
            let all: Vec<i64> = (0..300).collect();
            let v = probe.dims.expand_kv(&probe.v);
            let expected = gradients(&|input| kind.weights(input, &all).matmul(&v));
            for (name, (found, expected)) in
                ["z", "dq", "dk"].iter().zip(found.iter().zip(&expected))
            {
                assert_close(name, found, expected, 1e-11);
            }
        }
    }

    #[test]
    fn the_kernel_finds_what_f64_finds() {
        for (n, n_kv, uneven) in [(40, 4, false), (131, 2, false), (90, 2, true)] {
            let mut probe = Probe::new(71, [2, n, n], 4, n_kv, true);
            if uneven {
                probe.dims.kv_of_head = vec![0, 1, 1, 1];
            }
            let kind = Performer::new(config(Features::Positive, 40), probe.dims.clone());
            let pull = randn(72, &probe.q.size());
            for mask in [Mask::new(true), partly_hidden(true, 2, n)] {
                let run = |to: Kind| {
                    let probe = probe.to(to, Device::Cpu);
                    let [q, k, v] =
                        [&probe.q, &probe.k, &probe.v].map(|x| x.detach().set_requires_grad(true));
                    let input = AttnInput { q: &q, k: &k, v: &v, ..probe.input(&mask) };
                    let is_kernel = kind.by_kernel(&input).is_some();
                    assert_eq!(is_kernel, attn_torch::attends(&q), "{to:?}");
                    let z = kind.forward(&input);
                    // What a query gets that sees no key is nobody's concern.
                    let rows: Vec<i64> = (0..n).collect();
                    let seen = mask.allowed_rows(&rows, n, n, Device::Cpu).any_dim(-1, true);
                    (&z * pull.to_kind(to) * &seen).sum(to).backward();
                    [z.detach() * &seen, q.grad(), k.grad(), v.grad()]
                };
                let (found, expected) = (run(Kind::Float), run(Kind::Double));
                for ((name, found), expected) in
                    ["z", "dq", "dk", "dv"].iter().zip(found).zip(expected)
                {
                    let name =
                        format!("{name}, {n} tokens, {n_kv} key heads, {:?}", mask.padding());
                    assert_close(&name, &found, &expected, 1e-5);
                }
            }
        }
    }

    #[test]
    fn settings_that_make_no_sense_are_refused() {
        for eps in [0.0, -1.0, f64::NAN] {
            let config = Config { eps: Some(eps), ..Config::default() };
            let error = linear::check_eps("performer", config.eps()).unwrap_err().to_string();
            assert!(error.contains("`performer`") && error.contains("above 0"), "{error}");
        }
    }
}
