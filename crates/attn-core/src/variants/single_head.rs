//! Single-head attention: one attention distribution over the whole width, shared by the values of all heads.
//!
//! ```text
//! z_hi = Σ_j softmax_j(s_ij) v_hj      for every head h
//!
//! from = "sum"      s_ij = c Σ_h q_hi·k_hj                    one head of width n_heads·head_dim
//! from = "best"     s_ij = scale · q_gi·k_gj                  g = `head`
//! from = "svd"      s_ij = c x̃_iᵀ B_r x̃_j                     x̃ = [x, 1], B_r the best approximation of rank r to
//!                                                             B = Σ_h [W_Q,h b_Q,h]ᵀ [W_K,h b_K,h]
//! from = "random"   s_ij = c Σ_h q'_hi·k'_hj                  q', k' of new, random projections
//!
//! c = scale/√n_heads (`scale = "width"`, 1/√(n_heads·head_dim)) or scale (`scale = "head"`, 1/√head_dim)
//! ```
//!
//! After a course project, <https://github.com/yuvi07k/Attention-Mechanisms-Exploration>, which put one head of the full
//! width in the place of twelve. What it got wrong: the new head's projections were random, so that the comparison was
//! between pretrained and untrained weights, not between many heads and one; and in its DistilBERT the mask was read the
//! wrong way round, so that queries attended to padding alone (accuracy 0.53 at every epoch, which is chance). Here
//! `sum`, `best` and `svd` start from the pretrained weights, and `random` is the control.
//!
//! - Values and output projection keep their heads: z has its usual shape, and gates and scores of heads act on it.
//! - `best` keeps the head that `head` names, and is refused without it: which head is the best for a layer, `attn choose`
//!   finds. A candidate that names none stands for every head there, and the one under which the model's predictions move
//!   least is written down.
//! - `svd` has matrices of its own, `[rank, hidden_size]` with a bias, c among them from the start. At full rank it is
//!   `sum`. It is refused where queries and keys are rotated: a rotation stands between W_Q and W_K then, another one
//!   for each distance, and B does not exist.
//! - `random` has projections as wide as the layer's query heads, drawn as PyTorch's `Linear` draws (uniform within
//!   1/√hidden_size). Where the layer rotates, each slice of `head_dim` is rotated as a head's would be.
//! - Dropping heads: `sum` and `random` add up the heads that are left, and c is that of the width left, so that the
//!   attention of all heads changes. `svd` keeps its scores. `best` refuses to lose its head, or to have it move.

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use super::softmax::Softmax;
use crate::{
    Error,
    attention::{Attention, AttnInput, Dims, KvCache, Nature, Own, Param, Projections, State},
    nn::Visitor,
    pairs,
    rotary::rotate,
    weights::Init,
};

const KIND: &str = "single_head";

/// Settings of [`SingleHead`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Where the one distribution comes from.
    pub from: From,
    /// What the scores of `sum`, `svd` and `random` are multiplied by.
    pub scale: Scale,
    /// The head whose scores `best` keeps, counted from 0 among those the layer has. No default: the first is as good
    /// as any.
    pub head: Option<u32>,
    /// The rank of `svd`, from 1 to hidden_size + 1.
    pub rank: u32,
}

impl Default for Config {
    fn default() -> Self {
        Self { from: From::Sum, scale: Scale::Width, head: None, rank: 64 }
    }
}

/// Where scores come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum From {
    /// All heads' scores, added up.
    Sum,
    /// One head's.
    Best,
    /// An approximation of the sum, of low rank.
    Svd,
    /// New projections.
    Random,
}

/// The scale of scores over the whole width.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scale {
    /// 1/√(n_heads·head_dim), as one head of that width has.
    Width,
    /// 1/√head_dim: the sum of the heads' scores as they were.
    Head,
}

impl Scale {
    fn of(self, dims: &Dims) -> f64 {
        match self {
            Self::Width => dims.scale * (dims.n_heads as f64).powf(-0.5),
            Self::Head => dims.scale,
        }
    }
}

impl Config {
    pub(super) fn build(
        &self,
        dims: &Dims,
        projections: &Projections,
        own: &mut Own<'_, '_>,
    ) -> Result<Box<dyn Attention>, Error> {
        let refuse = |field, value: String, problem: String| {
            Err(Error::Setting { kind: KIND, field, value, problem })
        };
        let scores = match self.from {
            From::Sum => Scores::Sum,
            From::Best => {
                let last = dims.n_heads - 1;
                let Some(head) = self.head else {
                    let problem =
                        format!("expected a head, 0 to {last}; `attn choose` finds the best");
                    return refuse("head", "none".into(), problem);
                };
                if i64::from(head) > last {
                    let problem = format!("expected 0 to {last}, a head of the layer");
                    return refuse("head", head.to_string(), problem);
                }
                Scores::Best(i64::from(head))
            }
            From::Svd => {
                let (rank, most) = (i64::from(self.rank), dims.hidden_size + 1);
                if !(1..=most).contains(&rank) {
                    let problem = format!("expected 1 to {most}, which is hidden_size + 1");
                    return refuse("rank", rank.to_string(), problem);
                }
                if dims.rotary {
                    let problem = "rotations stand between this layer's projections: expected `sum`, `best` or `random`";
                    return refuse("from", "svd".into(), problem.into());
                }
                Scores::Own(Pair::truncated(dims, projections, rank, self.scale.of(dims), own)?)
            }
            From::Random => Scores::Wide(Pair::random(dims, own)?),
        };
        Ok(Box::new(SingleHead { scores, scale: self.scale, dims: dims.clone() }))
    }
}

/// What scores are made of.
#[derive(Debug)]
enum Scores {
    Sum,
    Best(i64),
    /// Matrices of any width, the scale among them.
    Own(Pair),
    /// Matrices as wide as the query heads.
    Wide(Pair),
}

/// Projections to queries and keys.
#[derive(Debug)]
struct Pair {
    /// `[width, hidden_size]`, and its bias.
    q: [Param; 2],
    /// As `q`.
    k: [Param; 2],
}

impl Pair {
    /// The factors of B, the summed bilinear form of the pretrained projections, cut to `rank`, times `scale`.
    fn truncated(
        dims: &Dims,
        projections: &Projections,
        rank: i64,
        scale: f64,
        own: &mut Own<'_, '_>,
    ) -> Result<Self, Error> {
        let size = [rank, dims.hidden_size];
        let factors = own
            .makes("query.weight")
            .then(|| Self::factors(dims, projections, rank, scale))
            .map_or([None, None], |sides| sides.map(Some));
        let mut side = |name: &str, rows: &Option<Tensor>| {
            Self::params(own, name, size, |width| match rows {
                Some(rows) => {
                    (Init::Value(rows.narrow(1, 0, width)), Init::Value(rows.select(1, width)))
                }
                None => (Init::Zeros, Init::Zeros),
            })
        };
        Ok(Self { q: side("query", &factors[0])?, k: side("key", &factors[1])? })
    }

    /// Both sides of [`Self::truncated`], `[rank, hidden_size + 1]` each.
    fn factors(dims: &Dims, projections: &Projections, rank: i64, scale: f64) -> [Tensor; 2] {
        let augmented = |(weight, bias): &(Tensor, Option<Tensor>)| {
            let weight = weight.detach().to_device(Device::Cpu).to_kind(Kind::Double);
            let bias = match bias {
                Some(bias) => bias.detach().to_device(Device::Cpu).to_kind(Kind::Double),
                None => Tensor::zeros([weight.size()[0]], (Kind::Double, Device::Cpu)),
            };
            Tensor::cat(&[weight, bias.unsqueeze(-1)], 1) // [heads · d, hidden + 1]
        };
        let by_head = |x: Tensor| {
            x.view([1, -1, dims.head_dim, dims.hidden_size + 1]) // an axis for the batch, as summed wants it
        };
        let q = sum_by_kv_head(dims, &by_head(augmented(&projections.q)))
            .view([-1, dims.hidden_size + 1]);
        let form = q.tr().matmul(&augmented(&projections.k)); // [hidden + 1, hidden + 1]
        let (left, values, right) = form.svd(true, true);
        let root = (values.narrow(0, 0, rank) * scale).sqrt().unsqueeze(-1);
        [left.tr(), right.tr()].map(|rows| rows.narrow(0, 0, rank) * &root)
    }

    fn random(dims: &Dims, own: &mut Own<'_, '_>) -> Result<Self, Error> {
        let bound = (dims.hidden_size as f64).powf(-0.5);
        let size = [dims.n_heads * dims.head_dim, dims.hidden_size];
        let mut side = |name: &str| {
            Self::params(own, name, size, |_| (Init::Uniform(bound), Init::Uniform(bound)))
        };
        Ok(Self { q: side("query")?, k: side("key")? })
    }

    fn params(
        own: &mut Own<'_, '_>,
        name: &str,
        size: [i64; 2],
        init: impl Fn(i64) -> (Init, Init),
    ) -> Result<[Param; 2], Error> {
        let (weight, bias) = init(size[1]);
        let weight = own.get(&format!("{name}.weight"), &size, weight)?;
        Ok([weight, own.get(&format!("{name}.bias"), &size[..1], bias)?])
    }

    /// `[batch, len, hidden_size] -> [batch, 1, len, width]`.
    fn project([weight, bias]: &[Param; 2], hidden: &Tensor) -> Tensor {
        hidden.linear(&weight.tensor, Some(&bias.tensor)).unsqueeze(1)
    }

    /// Channels of a query or key.
    fn width(&self) -> i64 {
        self.q[0].tensor.size()[0]
    }

    fn each(&self) -> impl Iterator<Item = &Param> {
        self.q.iter().chain(&self.k)
    }
}

/// One attention distribution for all heads.
#[derive(Debug)]
pub struct SingleHead {
    scores: Scores,
    scale: Scale,
    dims: Dims,
}

impl SingleHead {
    /// The one head's queries: `[batch, 1, q_len, width]`.
    fn queries(&self, input: &AttnInput) -> Tensor {
        match &self.scores {
            // Heads that share keys: Σ_h q_h·k is (Σ_h q_h)·k.
            Scores::Sum => merged(&sum_by_kv_head(&self.dims, input.q)),
            Scores::Best(head) => input.q.narrow(1, *head, 1),
            Scores::Own(pair) => Pair::project(&pair.q, input.hidden),
            Scores::Wide(pair) => self.turned(Pair::project(&pair.q, input.hidden), input),
        }
    }

    /// The one head's keys of the tokens that `input` brings: `[batch, 1, len, width]`.
    fn keys(&self, input: &AttnInput) -> Tensor {
        let hidden = input.source.unwrap_or(input.hidden);
        match &self.scores {
            Scores::Sum => merged(input.k),
            Scores::Best(head) => input.k.narrow(1, self.dims.kv_of_head[*head as usize], 1),
            Scores::Own(pair) => Pair::project(&pair.k, hidden),
            Scores::Wide(pair) => self.turned(Pair::project(&pair.k, hidden), input),
        }
    }

    /// Rotates each head's slice of `x` (`[batch, 1, len, n_heads · head_dim]`) where the layer rotates.
    fn turned(&self, x: Tensor, input: &AttnInput) -> Tensor {
        let Some(tables) = input.rotary else { return x };
        let by_head = x.squeeze_dim(1).unflatten(-1, [self.dims.n_heads, self.dims.head_dim]);
        merged(&rotate(&by_head.transpose(1, 2), tables))
    }

    /// The layer as the one head sees it.
    fn single(&self) -> Softmax {
        let scale = match &self.scores {
            Scores::Best(_) => self.dims.scale,
            Scores::Own(_) => 1.0,
            Scores::Sum | Scores::Wide(_) => self.scale.of(&self.dims),
        };
        let dims =
            Dims { n_heads: 1, n_kv_heads: 1, kv_of_head: vec![0], scale, ..self.dims.clone() };
        Softmax { dims }
    }

    /// z of all heads from the one head's keys and from merged values, each `[batch, 1, k_len, width]`.
    fn mix(&self, input: &AttnInput, k: &Tensor, v: &Tensor) -> Tensor {
        let q = self.queries(input);
        let z = self.single().forward(&AttnInput { q: &q, k, v, ..*input });
        let z = z.squeeze_dim(1).unflatten(-1, [self.dims.n_kv_heads, self.dims.head_dim]);
        // Heads that share values have the same z.
        self.dims.expand_kv(&z.transpose(1, 2))
    }
}

impl Attention for SingleHead {
    fn couples_heads(&self) -> bool {
        true
    }

    fn forward(&self, input: &AttnInput) -> Tensor {
        self.mix(input, &self.keys(input), &merged(input.v))
    }

    fn weights(&self, input: &AttnInput, rows: &[i64]) -> Tensor {
        let (q, k) = (self.queries(input), self.keys(input));
        let weights = self.single().weights(&AttnInput { q: &q, k: &k, ..*input }, rows);
        weights.expand([-1, self.dims.n_heads, -1, -1], true)
    }

    /// 2 · (width of the scores + n_kv_heads · head_dim) · pairs that the mask shows, the width n_kv_heads · head_dim (`sum`),
    /// head_dim (`best`), rank (`svd`) or n_heads · head_dim (`random`); 4 · hidden_size · width · n for projections of its own.
    fn flops(&self, n_tokens: i64) -> i64 {
        let Dims { n_heads, n_kv_heads, head_dim, causal, .. } = self.dims;
        let (width, own) = match &self.scores {
            Scores::Sum => (n_kv_heads * head_dim, 0),
            Scores::Best(_) => (head_dim, 0),
            Scores::Own(pair) => (pair.width(), pair.width()),
            Scores::Wide(_) => (n_heads * head_dim, n_heads * head_dim),
        };
        let n_pairs = pairs::n_seen(n_tokens, causal);
        2 * (width + n_kv_heads * head_dim) * n_pairs
            + pairs::projecting(&self.dims, n_tokens, 2 * own)
    }

    super::holds!(1, 1);

    fn nature(&self) -> Nature {
        Nature { reach: 0, chooses: false, reads_coordinates: false, has_own_slopes: false }
    }

    fn cache<'s>(&self, _: &'s mut dyn State) -> Option<&'s KvCache> {
        None // What is kept are the one head's keys.
    }

    fn step(&self, input: &AttnInput, state: &mut dyn State) -> Tensor {
        // Kept as they are used: the one head's keys, and the values side by side.
        let (k, v) = KvCache::of(state).append(&self.keys(input), &merged(input.v));
        self.mix(&AttnInput { mask: &input.mask.tail(k.size()[2]), ..*input }, &k, &v)
    }

    fn visit(&self, f: &mut Visitor<'_>) {
        if let Scores::Own(pair) | Scores::Wide(pair) = &self.scores {
            pair.each().for_each(|param| f(&param.name, &param.tensor));
        }
    }

    fn reads_queries(&self) -> bool {
        false
    }

    fn select_heads(&mut self, heads: &[i64], dims: &Dims) -> Result<(), Error> {
        match &mut self.scores {
            Scores::Best(head) if heads.get(*head as usize) != Some(head) => {
                let reason = format!(
                    "the scores are those of head {head}, and its number is a setting\nhint: keep all heads up to it, or \
                     drop heads before the swap"
                );
                return Err(Error::Refused { kind: KIND, what: "drop these heads", reason });
            }
            Scores::Wide(pair) => {
                let d = self.dims.head_dim;
                let channels: Vec<i64> =
                    heads.iter().flat_map(|head| head * d..(head + 1) * d).collect();
                pair.q.iter_mut().chain(&mut pair.k).for_each(|param| param.select(0, &channels));
            }
            Scores::Sum | Scores::Best(_) | Scores::Own(_) => {}
        }
        self.dims = dims.clone();
        Ok(())
    }

    fn regroup_kv(&mut self, _: &[Vec<i64>], dims: &Dims) -> Result<(), Error> {
        self.dims = dims.clone(); // Own projections read the hidden states, not the heads.
        Ok(())
    }
}

/// Heads side by side: `[batch, heads, len, d] -> [batch, 1, len, heads · d]`.
fn merged(x: &Tensor) -> Tensor {
    x.transpose(1, 2).flatten(2, 3).unsqueeze(1)
}

/// Adds up the query heads that read the same key/value head:
/// `[batch, n_heads, len, d] -> [batch, n_kv_heads, len, d]`.
fn sum_by_kv_head(dims: &Dims, q: &Tensor) -> Tensor {
    if dims.n_heads == dims.n_kv_heads && dims.is_evenly_grouped() {
        return q.shallow_clone();
    }
    let mut size = q.size();
    size[1] = dims.n_kv_heads;
    let kv = Tensor::from_slice(&dims.kv_of_head).to_device(q.device());
    Tensor::zeros(&size, (q.kind(), q.device())).index_add(1, &kv, q)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        mask::Mask,
        rotary::{Rotary, Scaling},
        testing::{Probe, assert_close, naive_attention, randn},
        variants::Variant,
        weights::Weights,
    };

    fn config(from: From) -> Config {
        Config { from, head: Some(0), ..Config::default() }
    }

    /// The definition of one shared distribution: scores summed by a plain loop, `c` times.
    fn naive(
        probe: &Probe,
        heads: &[i64],
        c: f64,
        sees: impl Fn(i64, i64) -> bool,
    ) -> (Tensor, Tensor) {
        let [b, h, n, d] = probe.q.size()[..] else { unreachable!() };
        let k_len = probe.k.size()[2];
        let (mut z, mut all_weights) = (Vec::new(), Vec::new());
        let values = |x: &Tensor| Vec::<f64>::try_from(x.contiguous().view([-1])).unwrap();
        let (q, k, v) = (values(&probe.q), values(&probe.k), values(&probe.v));
        let kv = |head: i64| probe.dims.kv_of_head[head as usize];
        let n_kv = probe.dims.n_kv_heads;
        for example in 0..b {
            for head in 0..h {
                for i in 0..n {
                    let score = |j: i64| -> f64 {
                        let term = |g: i64, c: i64| {
                            q[(((example * h + g) * n + i) * d + c) as usize]
                                * k[(((example * n_kv + kv(g)) * k_len + j) * d + c) as usize]
                        };
                        heads
                            .iter()
                            .flat_map(|&g| (0..d).map(move |c| (g, c)))
                            .map(|(g, c)| term(g, c))
                            .sum()
                    };
                    let exp: Vec<f64> = (0..k_len)
                        .map(|j| if sees(i, j) { (c * score(j)).exp() } else { 0.0 })
                        .collect();
                    let total: f64 = exp.iter().sum();
                    let weights: Vec<f64> = exp.iter().map(|e| e / total).collect();
                    z.extend((0..d).map(|c| {
                        let value = |j: i64| {
                            v[(((example * n_kv + kv(head)) * k_len + j) * d + c) as usize]
                        };
                        (0..k_len).map(|j| weights[j as usize] * value(j)).sum::<f64>()
                    }));
                    all_weights.extend(weights);
                }
            }
        }
        let tensor = |x: &[f64], last| Tensor::from_slice(x).view([b, h, n, last]);
        (tensor(&z, d), tensor(&all_weights, k_len))
    }

    #[test]
    fn sums_and_single_heads_match_the_definition() {
        for (n_heads, n_kv_heads) in [(4, 2), (3, 3), (3, 1), (1, 1)] {
            for (q_len, k_len) in [(1, 1), (7, 7), (63, 63), (3, 7)] {
                for causal in [false, true] {
                    let probe = Probe::new(51, [2, q_len, k_len], n_heads, n_kv_heads, causal);
                    let d = probe.dims.head_dim as f64;
                    let all: Vec<i64> = (0..n_heads).collect();
                    let last = [n_heads - 1];
                    let cases = [
                        (config(From::Sum), &all[..], (n_heads as f64 * d).powf(-0.5)),
                        (Config { scale: Scale::Head, ..config(From::Sum) }, &all, d.powf(-0.5)),
                        (
                            Config { head: Some(last[0] as u32), ..config(From::Best) },
                            &last,
                            d.powf(-0.5),
                        ),
                    ];
                    for (config, heads, c) in cases {
                        let kind = probe.build(&Variant::SingleHead(config.clone()));
                        let (z, weights) =
                            naive(&probe, heads, c, |i, j| !causal || j <= i + k_len - q_len);
                        let mask = Mask::new(causal);
                        let name = format!(
                            "{config:?}, {n_heads}/{n_kv_heads}, {q_len}x{k_len}, {causal}"
                        );
                        assert_close(&name, &kind.forward(&probe.input(&mask)), &z, 1e-12);
                        let rows: Vec<i64> = (0..q_len).collect();
                        assert_close(
                            &name,
                            &kind.weights(&probe.input(&mask), &rows),
                            &weights,
                            1e-12,
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn padding_on_the_right_is_not_seen() {
        let probe = Probe::new(52, [1, 20, 20], 4, 2, false);
        let mask = Mask::with_keep(false, &probe.positions.lt(13));
        for from in [From::Sum, From::Best] {
            let kind = probe.build(&Variant::SingleHead(config(from)));
            let heads: &[i64] = if from == From::Sum { &[0, 1, 2, 3] } else { &[0] };
            let c = if from == From::Sum { 24_f64.powf(-0.5) } else { probe.dims.scale };
            let (z, _) = naive(&probe, heads, c, |_, j| j < 13);
            assert_close(&format!("{from:?}"), &kind.forward(&probe.input(&mask)), &z, 1e-12);
        }
    }

    /// A probe whose q and k are made by projections, and these.
    fn projected(seed: u64, n_kv_heads: i64, biased: bool) -> (Probe, Projections) {
        let mut probe = Probe::new(seed, [2, 21, 21], 4, n_kv_heads, true);
        let project = |i: u64, heads: i64| {
            let weight = randn(seed * 100 + 50 + i, &[heads * 6, 10]) * 0.5;
            let bias = biased.then(|| randn(seed * 100 + 60 + i, &[heads * 6]));
            let x = probe.hidden.linear(&weight, bias.as_ref());
            ((weight, bias), x.view([2, 21, heads, 6]).transpose(1, 2))
        };
        let ((q, q_heads), (k, k_heads), (v, v_heads)) =
            (project(1, 4), project(2, n_kv_heads), project(3, n_kv_heads));
        (probe.q, probe.k, probe.v) = (q_heads, k_heads, v_heads);
        (probe, Projections { q, k, v })
    }

    fn built(
        config: &Config,
        probe: &Probe,
        projections: &Projections,
    ) -> Result<Box<dyn Attention>, Error> {
        let mut weights = Weights::from_seed(7, Kind::Double, Device::Cpu);
        config.build(&probe.dims, projections, &mut Own::new(&mut weights, "probe"))
    }

    #[test]
    fn the_full_rank_is_the_sum() {
        for (n_kv_heads, biased) in [(4, true), (2, true), (1, true), (2, false)] {
            let (probe, projections) = projected(53, n_kv_heads, biased);
            let mask = Mask::new(true);
            for scale in [Scale::Width, Scale::Head] {
                let z = |from, rank| {
                    let config = Config { scale, rank, ..config(from) };
                    built(&config, &probe, &projections).unwrap().forward(&probe.input(&mask))
                };
                let sum = z(From::Sum, 1);
                assert_close("rank 11", &z(From::Svd, 11), &sum, 1e-12);
                // One key/value head has six channels, and B no more.
                let error = crate::testing::relative_rms(&z(From::Svd, 6), &sum);
                assert_eq!(error < 1e-12, n_kv_heads == 1, "rank 6: {error:.1e}");
                let error = crate::testing::relative_rms(&z(From::Svd, 1), &sum);
                assert!(error > 1e-3, "rank 1: {error:.1e}");
            }
        }
    }

    #[test]
    fn own_projections_match_the_definition() {
        for (from, rotary) in [(From::Svd, false), (From::Random, false), (From::Random, true)] {
            let mut probe = Probe::new(54, [2, 21, 21], 4, 2, true);
            probe.dims.rotary = rotary;
            let config = Config { from, rank: 5, ..Config::default() };
            let kind = probe.build(&Variant::SingleHead(config));
            let mut own = Vec::new();
            kind.visit(&mut |_, tensor| own.push(tensor.shallow_clone()));
            let [q_weight, q_bias, k_weight, k_bias] = &own[..] else { panic!("four parameters") };
            let tables = rotary.then(|| {
                Rotary::new(6, 10_000.0, &Scaling::None).tables(&probe.positions, Kind::Double)
            });
            // As a layer whose heads had these projections; those of svd are one head of their own width.
            let heads = |weight: &Tensor, bias: &Tensor| {
                let x = probe.hidden.matmul(&weight.tr()) + bias;
                let h = if from == From::Svd { 1 } else { 4 };
                let x = x.view([2, 21, h, -1]).transpose(1, 2);
                tables.as_ref().map_or_else(|| x.shallow_clone(), |tables| rotate(&x, tables))
            };
            let (q, k) = (heads(q_weight, q_bias), heads(k_weight, k_bias));
            let scores = q.matmul(&k.transpose(-2, -1)).sum_dim_intlist(
                [1i64].as_slice(),
                true,
                Kind::Double,
            );
            let c = if from == From::Svd { 1.0 } else { 24_f64.powf(-0.5) };
            let mask = Mask::new(true);
            let scores = scores * c + mask.bias(21, 21, (Kind::Double, Device::Cpu));
            let weights = scores.softmax(-1, Kind::Double).expand([-1, 4, -1, -1], true);
            let z = weights.matmul(&probe.dims.expand_kv(&probe.v));
            let input = AttnInput { rotary: tables.as_ref(), ..probe.input(&mask) };
            assert_close(&format!("{from:?}"), &kind.forward(&input), &z, 1e-12);
            let rows = [0, 11, 20];
            let expected = weights.index_select(2, &Tensor::from_slice(&rows));
            assert_close(&format!("{from:?}"), &kind.weights(&input, &rows), &expected, 1e-12);
        }
    }

    #[test]
    fn one_head_is_softmax() {
        let probe = Probe::new(55, [2, 9, 9], 1, 1, true);
        let (z, _) = naive_attention(&probe, |i, j| j <= i);
        for from in [From::Sum, From::Best] {
            let kind = probe.build(&Variant::SingleHead(config(from)));
            assert_close("one head", &kind.forward(&probe.input(&Mask::new(true))), &z, 1e-12);
        }
    }

    #[test]
    fn dropping_heads_leaves_the_kind_of_the_rest() {
        let keep = [0i64, 2];
        for from in [From::Sum, From::Random] {
            let probe = Probe::new(56, [1, 9, 9], 4, 4, true);
            let mut kind = probe.build(&Variant::SingleHead(config(from)));
            let mut part = probe.select_heads(&keep);
            kind.select_heads(&keep, &part.dims).unwrap();
            let fresh = part.build(&Variant::SingleHead(config(from)));
            let shapes = |kind: &dyn Attention| {
                let mut shapes = Vec::new();
                kind.visit(&mut |name, tensor| shapes.push((name.to_owned(), tensor.size())));
                shapes
            };
            assert_eq!(
                shapes(kind.as_ref()),
                shapes(fresh.as_ref()),
                "a saved layer is built anew"
            );
            if from == From::Sum {
                let mask = Mask::new(true);
                let (z, _) = naive(&part, &[0, 1], 12_f64.powf(-0.5), |i, j| j <= i);
                assert_close("two heads", &kind.forward(&part.input(&mask)), &z, 1e-12);
            }
            part.dims.n_heads = 2;
        }
    }

    #[test]
    fn the_best_head_stays_where_it_is() {
        let probe = Probe::new(57, [1, 9, 9], 4, 4, true);
        let best = Variant::SingleHead(Config { head: Some(1), ..config(From::Best) });
        for (keep, is_served) in [(vec![0i64, 1], true), (vec![0, 2], false), (vec![1, 2], false)] {
            let part = probe.select_heads(&keep);
            let mut kind = probe.build(&best);
            let result = kind.select_heads(&keep, &part.dims);
            assert_eq!(result.is_ok(), is_served, "{keep:?}");
            if is_served {
                let (z, _) = naive(&part, &[1], part.dims.scale, |i, j| j <= i);
                assert_close("best", &kind.forward(&part.input(&Mask::new(true))), &z, 1e-12);
            }
        }
    }

    #[test]
    fn settings_that_do_not_fit_are_refused() {
        let (mut probe, projections) = projected(58, 2, true);
        let mut refused = |config: Config, rotary: bool, field: &str| {
            probe.dims.rotary = rotary;
            let error = built(&config, &probe, &projections).unwrap_err().to_string();
            assert!(error.contains(&format!("`{field}`")), "{error}");
        };
        refused(Config { head: Some(4), ..config(From::Best) }, false, "head");
        refused(Config { head: None, ..config(From::Best) }, false, "head");
        refused(Config { rank: 0, ..config(From::Svd) }, false, "rank");
        refused(Config { rank: 12, ..config(From::Svd) }, false, "rank");
        refused(Config { rank: 5, ..config(From::Svd) }, true, "from");
    }
}
