//! Softmax over a sliding window and linear attention over the rest, under one normalizer.
//!
//! ```text
//!       Σ_near γ e^(s_ij − c_i) v_j + Σ_far φ_q(q_i)·φ_k(k_j) v_j      near: |i − j| < window, far: the other keys
//! z_i = ─────────────────────────────────────────────────────────      s_ij = scale · q_i·k_j,  c_i = max_near s_ij
//!       Σ_near γ e^(s_ij − c_i)     + Σ_far φ_q(q_i)·φ_k(k_j)          φ(x) = softmax(xW) ⊕ softmax(−xW)
//! ```
//!
//! Zhang et al. 2024, "LoLCATs", <https://arxiv.org/abs/2410.10254>, section 3.2: a factor γ and maps W for each head,
//! after rotary, learned against the softmax attention that they replace. The formula is the published one, window
//! terms divided by e^(c_i) and far terms not: φ learns to be relative to the query's best near score. The paper is
//! causal; a bidirectional layer sees a window on both sides and the rest of either side linearly. γ is the sigmoid of
//! a parameter; the published code starts it at 0.1, here it starts near 1, where the layer is closer to the
//! pretrained one. A text no longer than the window is softmax attention, whatever γ.
//!
//! Queries are taken in blocks, each against the keys of its own block and those beside it, near keys and far ones
//! alike; what lies further is a state `[features, head_dim + 1]` for each block. Time and memory grow with n. Attention
//! dropout has no effect.

use std::{any::Any, num::NonZeroU32};

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::{
    Error,
    attention::{Attention, AttnInput, Dims, Masks, Nature, Own, Param, Projections, State},
    banded::Band,
    feature_map::{Activation, HeadMaps, project},
    linear::{pad_rows, wide, with_ones},
    mask::{Mask, hidden_score},
    nn::Visitor,
    pairs,
    weights::Init,
};

/// Settings of [`WindowLinear`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Keys under the softmax on each side, the query's own among them.
    pub window: NonZeroU32,
    /// Columns of W; a query or key has twice as many features.
    pub feature_dim: NonZeroU32,
    /// Where γ starts, between 0 and 1.
    pub gamma: f64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            window: const { NonZeroU32::new(64).unwrap() },
            feature_dim: const { NonZeroU32::new(64).unwrap() },
            gamma: 0.9,
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
        if !(self.gamma > 0.0 && self.gamma < 1.0) {
            let (field, value) = ("gamma", self.gamma.to_string());
            let problem = "must lie between 0 and 1, both excluded".into();
            return Err(Error::Setting { kind: "window_linear", field, value, problem });
        }
        let maps = HeadMaps::near_identity(own, dims, self.feature_dim.get().into())?;
        let logit = (self.gamma / (1.0 - self.gamma)).ln();
        let start = Tensor::full([dims.n_heads], logit, (Kind::Double, Device::Cpu));
        let factor = own.get("window_factor", &[dims.n_heads], Init::Value(start))?;
        Ok(Box::new(WindowLinear {
            window: self.window.get().into(),
            maps,
            factor,
            dims: dims.clone(),
        }))
    }
}

/// Softmax near by, linear attention further off.
#[derive(Debug)]
pub struct WindowLinear {
    window: i64,
    maps: HeadMaps,
    /// γ before the sigmoid: `[n_heads]`.
    factor: Param,
    dims: Dims,
}

/// Queries, keys and values for every query head, in at least `f32`.
struct Mapped {
    /// Times the layer's scale.
    q: Tensor,
    k: Tensor,
    /// With ones: `[b, h, k_len, d + 1]`.
    v: Tensor,
    /// `[b, h, len, m]`, those of hidden keys 0.
    features: [Tensor; 2],
}

/// The fewest queries of a block: states are kept for each, and small products are slow.
const MIN_BLOCK: i64 = 32;

impl WindowLinear {
    fn mapped(&self, q: &Tensor, k: &Tensor, v: &Tensor, keep: Option<&Tensor>) -> Mapped {
        let [q, k, v] = [q, k, v].map(wide);
        let [k, v] = [&k, &v].map(|x| self.dims.expand_kv(x));
        let features = Activation::Softmax.features(&project(&q, &self.maps.q.tensor)).values;
        let features = [features, self.key_features(&k, keep)];
        Mapped { features, v: with_ones(&v), q: q * self.dims.scale, k }
    }

    fn key_features(&self, k: &Tensor, keep: Option<&Tensor>) -> Tensor {
        let features = Activation::Softmax.features(&project(k, &self.maps.k.tensor)).values;
        match keep {
            Some(keep) => features.masked_fill(&hides(keep), 0.0),
            None => features,
        }
    }

    /// What v is summed with, before the common divisor, from scores and products of features, both
    /// `[b, h, .., queries, keys]` and used up, and where keys are near and far.
    fn coefficients(
        &self,
        mut scores: Tensor,
        mut products: Tensor,
        near: &Tensor,
        far: &Tensor,
    ) -> Tensor {
        let least = hidden_score(scores.kind());
        let mut shape = vec![1; scores.dim()];
        shape[1] = self.dims.n_heads;
        // γ e^x is e^(x + ln γ): one pass less over what is largest.
        let log_gamma = self.factor.tensor.to_kind(scores.kind()).log_sigmoid().view(&shape[..]);
        let scores = scores.masked_fill_(&near.logical_not(), least);
        let best = scores.amax([-1i64].as_slice(), true);
        (scores - (best - log_gamma)).exp_() + products.masked_fill_(&far.logical_not(), 0.0)
    }

    /// Whether keys are near and far; `seen` says which the query may see at all.
    fn split(&self, query: &Tensor, key: &Tensor, seen: &Tensor) -> (Tensor, Tensor) {
        let near = (query.unsqueeze(-1) - key.unsqueeze(-2)).abs().lt(self.window);
        (near.logical_and(seen), near.logical_not().logical_and(seen))
    }

    /// For few queries, the last ones of the keys: `[b, h, rows, k_len]`, before the common divisor. `rows` counts
    /// queries.
    fn dense(&self, mapped: &Mapped, rows: &[i64], seen: &Tensor, q_len: i64) -> Tensor {
        let (device, k_len) = (mapped.q.device(), mapped.k.size()[2]);
        let index = Tensor::from_slice(rows).to_device(device);
        let key = Tensor::arange(k_len, (Kind::Int64, device));
        let (near, far) = self.split(&(&index + (k_len - q_len)), &key, seen);
        let [q, features] = [&mapped.q, &mapped.features[0]].map(|x| x.index_select(2, &index));
        let scores = q.matmul(&mapped.k.transpose(-2, -1));
        let products = features.matmul(&mapped.features[1].transpose(-2, -1));
        self.coefficients(scores, products, &near, &far)
    }

    /// Sums for every query, `[b, h, n, d + 1]`. Needs q_len = k_len.
    fn blocked(&self, mapped: &Mapped, causal: bool, keep: Option<&Tensor>) -> Tensor {
        let [b, h, n, _] = mapped.q.size()[..] else { unreachable!("queries have four axes") };
        let c = self.window.max(MIN_BLOCK).min(n);
        let n_blocks = (n + c - 1) / c;
        let pad = n_blocks * c - n;
        let sides = if causal { 1 } else { 2 };

        let own = |x: &Tensor| pad_rows(x, pad).reshape([b, h, n_blocks, c, -1]);
        // Keys: one block of nothing before, and one behind where queries look ahead. `[b, h, blocks, x, (1 + sides)·c]`
        let around = |x: &Tensor| {
            x.constant_pad_nd([0, 0, c, pad + c * (sides - 1)]).unfold(2, (1 + sides) * c, c)
        };
        let features = own(&mapped.features[0]);
        let scores = own(&mapped.q).matmul(&around(&mapped.k));
        let products = features.matmul(&around(&mapped.features[1]));

        let options = (Kind::Int64, mapped.q.device());
        let start = Tensor::arange(n_blocks, options).unsqueeze(-1) * c;
        let query = &start + Tensor::arange(c, options); // [blocks, c]
        let key = &start + Tensor::arange_start(-c, sides * c, options); // [blocks, (1 + sides)·c]
        let mut seen = key.ge(0).logical_and(&key.lt(n)).unsqueeze(1); // [blocks, 1 or c, keys]
        if causal {
            seen = seen.logical_and(&key.unsqueeze(1).le_tensor(&query.unsqueeze(-1)));
        }
        if let Some(keep) = keep {
            let index = key.clamp(0, n - 1);
            let keep = keep.index_select(1, &index.view([-1])).view([b, 1, n_blocks, 1, -1]);
            seen = seen.logical_and(&keep);
        }
        let (near, far) = self.split(&query, &key, &seen);
        let coefficients = self.coefficients(scores, products, &near, &far);
        let mut sums = coefficients.matmul(&around(&mapped.v).transpose(-2, -1)); // [b, h, blocks, c, d + 1]

        // Blocks further off: sums of those up to the last but one, and from the next but one on.
        if n_blocks > 2 {
            let states = own(&mapped.features[1]).transpose(-2, -1).matmul(&own(&mapped.v));
            let n_far = n_blocks - 2;
            let nothing = Tensor::zeros_like(&states.narrow(2, 0, 2));
            let before = states.narrow(2, 0, n_far).cumsum(2, states.kind());
            let mut far = Tensor::cat(&[&nothing, &before], 2);
            if !causal {
                let behind = states.narrow(2, 2, n_far).flip([2]).cumsum(2, states.kind());
                far += Tensor::cat(&[&behind.flip([2]), &nothing], 2);
            }
            sums += features.matmul(&far);
        }
        sums.view([b, h, n_blocks * c, -1]).narrow(2, 0, n)
    }
}

/// Where keys are hidden, from `[b, k]`: `[b, 1, k, 1]`.
fn hides(keep: &Tensor) -> Tensor {
    keep.logical_not().unsqueeze(1).unsqueeze(-1)
}

fn divided(sums: &Tensor) -> Tensor {
    let d = sums.size()[3] - 1;
    sums.narrow(-1, 0, d) / sums.narrow(-1, d, 1) // The best near key alone has γ.
}

/// What [`WindowLinear`] keeps between steps.
#[derive(Debug, Default)]
struct Held {
    /// Keys and values of the last window − 1 tokens: all that the next query's window holds beside its own.
    near: Option<(Tensor, Tensor)>,
    /// Σ φ_k(k) [v, 1]ᵀ over the tokens before: `[b, n_heads, m, head_dim + 1]`.
    far: Option<Tensor>,
}

impl State for Held {
    fn bytes(&self) -> usize {
        let size = |x: &Tensor| x.numel() * x.kind().elt_size_in_bytes();
        self.near.as_ref().map_or(0, |(k, v)| size(k) + size(v)) + self.far.as_ref().map_or(0, size)
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}

impl Attention for WindowLinear {
    fn forward(&self, input: &AttnInput) -> Tensor {
        let AttnInput { q, k, v, mask, .. } = *input;
        let (q_len, k_len) = (q.size()[2], k.size()[2]);
        let keep = mask.keep().filter(|_| !mask.is_plain());
        let mapped = self.mapped(q, k, v, keep);
        let sums = if q_len == k_len {
            self.blocked(&mapped, mask.causal(), keep)
        } else {
            let rows: Vec<i64> = (0..q_len).collect();
            let seen = mask.allowed_rows(&rows, q_len, k_len, q.device());
            self.dense(&mapped, &rows, &seen, q_len).matmul(&mapped.v)
        };
        divided(&sums).to_kind(q.kind())
    }

    fn weights(&self, input: &AttnInput, rows: &[i64]) -> Tensor {
        let AttnInput { q, k, v, mask, .. } = *input;
        let (q_len, k_len) = (q.size()[2], k.size()[2]);
        let mapped = self.mapped(q, k, v, mask.keep());
        let seen = mask.allowed_rows(rows, q_len, k_len, q.device());
        let weights = self.dense(&mapped, rows, &seen, q_len);
        let total = weights.sum_dim_intlist([-1i64].as_slice(), true, weights.kind());
        (weights / total).to_kind(q.kind())
    }

    /// 4 · head_dim · n_heads · pairs less than `window` apart; 4 · head_dim · feature_dim · n_heads · n for the maps; and for each
    /// of the tokens that are far from another 4 · m · (head_dim + 1) · n_heads, m = 2 · feature_dim: into the sums as a key, and
    /// against them as a query.
    fn flops(&self, n_tokens: i64) -> i64 {
        let Dims { n_heads, head_dim, causal, .. } = self.dims;
        let n_columns = self.maps.q.tensor.size()[2];
        let near = Band::around(self.window, 1, 0).n_pairs(n_tokens, causal);
        let n_one_side = (n_tokens - self.window).max(0);
        let n_far = if causal { n_one_side } else { n_tokens.min(2 * n_one_side) };
        pairs::weighing(&self.dims, near)
            + 4 * head_dim * n_columns * n_heads * n_tokens
            + 4 * (2 * n_columns) * (head_dim + 1) * n_heads * n_far
    }

    super::holds_features!(|it| it.maps.q.tensor.size()[2], 17, 34);

    fn nature(&self) -> Nature {
        Nature {
            reach: self.window,
            chooses: false,
            reads_coordinates: true,
            has_own_slopes: false,
        }
    }

    fn masks(&self) -> Masks {
        Masks::Contiguous // A distance across a hole is not a distance between tokens.
    }

    fn start(&self) -> Box<dyn State> {
        Box::new(Held::default())
    }

    fn step(&self, input: &AttnInput, state: &mut dyn State) -> Tensor {
        let held: &mut Held = state
            .as_any_mut()
            .downcast_mut()
            .expect("a decoding state belongs to the kind that started it");
        let new = input.k.size()[2];
        let n_pieces = (new + self.window - 1) / self.window;
        if held.near.is_some() && n_pieces > 1 {
            // Each new token against all others would cost n².
            let pieces: Vec<Tensor> = (0..n_pieces)
                .map(|piece| {
                    let (at, len) =
                        (piece * self.window, self.window.min(new - piece * self.window));
                    let cut = |x: &Tensor| x.narrow(2, at, len);
                    let mask = match input.mask.keep() {
                        Some(keep) => {
                            let n_seen = keep.size()[1] - new + at + len;
                            Mask::with_keep(input.mask.causal(), &keep.narrow(1, 0, n_seen))
                        }
                        None => input.mask.clone(),
                    };
                    let (q, k, v) = (cut(input.q), cut(input.k), cut(input.v));
                    self.step(&AttnInput { q: &q, k: &k, v: &v, mask: &mask, ..*input }, held)
                })
                .collect();
            return Tensor::cat(&pieces, 2);
        }

        let (k, v) = match &held.near {
            Some((k, v)) => (Tensor::cat(&[k, input.k], 2), Tensor::cat(&[v, input.v], 2)),
            None => (input.k.shallow_clone(), input.v.shallow_clone()),
        };
        let k_len = k.size()[2];
        let mask = input.mask.tail(k_len);
        let mapped = self.mapped(input.q, &k, &v, mask.keep());
        let mut sums = if held.near.is_none() {
            self.blocked(&mapped, true, mask.keep())
        } else {
            let rows: Vec<i64> = (0..new).collect();
            let seen = mask.allowed_rows(&rows, new, k_len, k.device());
            self.dense(&mapped, &rows, &seen, new).matmul(&mapped.v)
        };
        if let Some(far) = &held.far {
            sums += mapped.features[0].matmul(far);
        }

        let n_near = (self.window - 1).min(k_len);
        let n_gone = k_len - n_near;
        if n_gone > 0 {
            let [features, v] = [&mapped.features[1], &mapped.v].map(|x| x.narrow(2, 0, n_gone));
            let gone = features.transpose(-2, -1).matmul(&v);
            held.far = Some(match held.far.take() {
                Some(far) => far + gone,
                None => gone,
            });
        }
        // Copies: the text before them must go.
        held.near = Some((k.narrow(2, n_gone, n_near).copy(), v.narrow(2, n_gone, n_near).copy()));
        divided(&sums).to_kind(input.q.kind())
    }

    fn visit(&self, f: &mut Visitor<'_>) {
        self.maps.visit(f);
        f(&self.factor.name, &self.factor.tensor);
    }

    fn select_heads(&mut self, heads: &[i64], dims: &Dims) -> Result<(), Error> {
        self.maps.select_heads(heads);
        self.factor.select(0, heads);
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
    use crate::testing::{Probe, assert_close, naive_attention, partly_hidden, randn};

    fn window_linear(probe: &Probe, window: i64) -> WindowLinear {
        let param =
            |seed: u64, size: &[i64]| Param { name: seed.to_string(), tensor: randn(seed, size) };
        let (h, d) = (probe.dims.n_heads, probe.dims.head_dim);
        WindowLinear {
            window,
            maps: HeadMaps { q: param(5, &[h, d, 5]), k: param(6, &[h, d, 5]) },
            factor: param(7, &[h]),
            dims: probe.dims.clone(),
        }
    }

    /// The formula, one query at a time.
    fn naive(probe: &Probe, kind: &WindowLinear, mask: &Mask) -> (Tensor, Tensor) {
        let [b, h, n, d] = probe.q.size()[..] else { unreachable!("queries have four axes") };
        let values = |x: Tensor| Vec::<f64>::try_from(x.contiguous().view([-1])).unwrap();
        let phi = |x: &[f64], map: &[f64]| -> Vec<f64> {
            let u: Vec<f64> = (0..5)
                .map(|f| x.iter().enumerate().map(|(c, x)| x * map[c * 5 + f]).sum())
                .collect();
            let half = |sign: f64| -> Vec<f64> {
                let total: f64 = u.iter().map(|u| (sign * u).exp()).sum();
                u.iter().map(|u| (sign * u).exp() / total).collect()
            };
            [half(1.0), half(-1.0)].concat()
        };
        let dot = |x: &[f64], y: &[f64]| -> f64 { x.iter().zip(y).map(|(x, y)| x * y).sum() };
        let allowed = mask.allowed(n, n, Device::Cpu).expand([b, 1, n, n], false);
        let allowed = values(allowed.to_kind(Kind::Double));
        let (mut z, mut all_weights) = (Vec::new(), Vec::new());
        for (example, head) in (0..b * h).map(|at| (at / h, at % h)) {
            let kv = probe.dims.kv_of_head[head as usize];
            let row = |x: &Tensor, head, i| values(x.get(example).get(head).get(i));
            let gamma = 1.0 / (1.0 + (-kind.factor.tensor.double_value(&[head])).exp());
            let keys: Vec<Vec<f64>> = (0..n).map(|j| row(&probe.k, kv, j)).collect();
            let v: Vec<Vec<f64>> = (0..n).map(|j| row(&probe.v, kv, j)).collect();
            let maps = [&kind.maps.q, &kind.maps.k].map(|map| values(map.tensor.get(head)));
            let key_features: Vec<Vec<f64>> = keys.iter().map(|k| phi(k, &maps[1])).collect();
            for i in 0..n {
                let q = row(&probe.q, head, i);
                let sees = |j: i64| allowed[((example * n + i) * n + j) as usize] > 0.0;
                let is_near = |j: i64| (i - j).abs() < kind.window;
                let score = |j: i64| dot(&q, &keys[j as usize]) * probe.dims.scale;
                let best = (0..n)
                    .filter(|&j| sees(j) && is_near(j))
                    .map(score)
                    .fold(f64::NEG_INFINITY, f64::max);
                let features = phi(&q, &maps[0]);
                let terms: Vec<f64> = (0..n)
                    .map(|j| match (sees(j), is_near(j)) {
                        (false, _) => 0.0,
                        (true, true) => gamma * (score(j) - best).exp(),
                        (true, false) => dot(&features, &key_features[j as usize]),
                    })
                    .collect();
                let total: f64 = terms.iter().sum();
                let weights: Vec<f64> = terms.iter().map(|term| term / total).collect();
                z.extend(
                    (0..d as usize)
                        .map(|c| weights.iter().zip(&v).map(|(w, v)| w * v[c]).sum::<f64>()),
                );
                all_weights.extend(weights);
            }
        }
        (
            Tensor::from_slice(&z).view([b, h, n, d]),
            Tensor::from_slice(&all_weights).view([b, h, n, n]),
        )
    }

    #[test]
    fn matches_the_definition() {
        for window in [1, 5, 40] {
            for n in [1, 7, 63, 150] {
                for causal in [false, true] {
                    let probe = Probe::new(71, [1, n, n], 2, 1, causal);
                    let kind = window_linear(&probe, window);
                    let mask = Mask::new(causal);
                    let (z, weights) = naive(&probe, &kind, &mask);
                    let name = format!("window {window}, {n} tokens, causal {causal}");
                    assert_close(&name, &kind.forward(&probe.input(&mask)), &z, 1e-12);
                    let rows: Vec<i64> = (0..n).collect();
                    assert_close(&name, &kind.weights(&probe.input(&mask), &rows), &weights, 1e-12);
                }
            }
        }
    }

    #[test]
    fn padding_behind_is_not_seen() {
        let probe = Probe::new(72, [2, 100, 100], 2, 1, false);
        let kind = window_linear(&probe, 5);
        let mask = partly_hidden(false, 2, 100);
        let (z, _) = naive(&probe, &kind, &mask);
        let found = kind.forward(&probe.input(&mask));
        assert_close("whole row", &found.get(0), &z.get(0), 1e-12);
        let real = |z: &Tensor| z.get(1).narrow(1, 0, 67);
        assert_close("real tokens", &real(&found), &real(&z), 1e-12);
    }

    #[test]
    fn a_text_no_longer_than_the_window_is_softmax_attention() {
        for causal in [false, true] {
            for n in [1, 7, 63] {
                let probe = Probe::new(73, [2, n, n], 4, 2, causal);
                let kind = window_linear(&probe, n);
                let (z, _) = naive_attention(&probe, |i, j| !causal || j <= i);
                let found = kind.forward(&probe.input(&Mask::new(causal)));
                assert_close(&format!("{n} tokens, causal {causal}"), &found, &z, 1e-12);
            }
        }
    }

    #[test]
    fn pieces_of_any_length_decode_alike_and_the_state_stays_small() {
        let probe = Probe::new(74, [1, 90, 90], 2, 2, true);
        let mask = Mask::new(true);
        for window in [1, 4, 200] {
            let kind = window_linear(&probe, window);
            let full = kind.forward(&probe.input(&mask));
            let mut state = kind.start();
            let mut at = 0;
            for len in [3, 40, 1, 1, 45] {
                let cut = |x: &Tensor| x.narrow(2, at, len);
                let (q, k, v) = (cut(&probe.q), cut(&probe.k), cut(&probe.v));
                let input = AttnInput { q: &q, k: &k, v: &v, ..probe.input(&mask) };
                let z = kind.step(&input, state.as_mut());
                assert_close(&format!("window {window} from {at}"), &z, &cut(&full), 1e-12);
                at += len;
            }
            // Two heads in f64: keys and values of 6 channels, and 10 features times 7.
            let near = 2 * (window - 1).min(90) as usize * 2 * 6 * 8;
            let far = if window < 90 { 2 * 10 * 7 * 8 } else { 0 };
            assert_eq!(state.bytes(), near + far, "window {window}");
        }
    }

    #[test]
    fn a_factor_out_of_range_is_refused() {
        let probe = Probe::new(75, [1, 2, 2], 2, 2, true);
        let options = (Kind::Double, Device::Cpu);
        let none = || (Tensor::zeros([1, 1], options), None);
        let projections = Projections { q: none(), k: none(), v: none() };
        for gamma in [0.0, 1.0, f64::NAN] {
            let mut weights = crate::weights::Weights::from_seed(7, options.0, options.1);
            let config = Config { gamma, ..Config::default() };
            let error = config
                .build(&probe.dims, &projections, &mut Own::new(&mut weights, "x"))
                .unwrap_err()
                .to_string();
            assert!(error.contains("`gamma`") && error.contains("between 0 and 1"), "{error}");
        }
    }
}
