//! Key/value heads on their way into fewer: gates close each head while those that are to take its place learn.
//!
//! ```text
//! k_j' = g_j k_j + (1 − g_j) C_j k̂_G       v_j' likewise, by the same g_j       G: the group of head j
//!
//! by = "matrices"   k̂_G = W_G h + b_G, turned by its position where keys are       v̂_G likewise
//! by = "scalars"    k̂_G = Σ_{j ∈ G} s_j k_j,  C = 1                                v̂_G likewise
//!
//! in training       g = clip(1.2 s − 0.1, 0, 1),  s = σ((ln u − ln(1 − u) + ln α)/β),  u ~ U(0, 1), one draw a pass
//! else              g = clip(1.2 σ(ln α) − 0.1, 0, 1)
//! penalty           price · mean_j P(g_j > 0),  P(g_j > 0) = σ(ln α_j − β ln(0.1/1.1))
//! ```
//!
//! `matrices`: Jin et al. 2024, "Align Attention Heads Before Merging Them", <https://arxiv.org/abs/2412.20677>, section 3.3, with the
//! gates of Louizos, Welling, Kingma 2017, <https://arxiv.org/abs/1712.01312>, β = 0.33. `scalars`: Chinnakonduru and Mohapatra 2024,
//! "Weighted Grouped Query Attention in Transformers", <https://arxiv.org/abs/2407.10855>, section 3.
//!
//! A layer starts as it was, every gate open. [`begin_merging`](crate::begin_merging) starts W and C from a merge in closed form
//! ([`Merge`](crate::Merge)); swapped in by itself, W is the mean of neighbours and C is 1. Trained to predict what the model did, the
//! gates close, and [`merge_learned`](crate::merge_learned) leaves the new heads alone, C folded into the queries and the output
//! projection. Nothing is saved before that.
//!
//! - Deviations: Jin et al. turn the heads first and then share one matrix; here C, which they fold away, stays outside and learns
//!   too. They hold the sum of the gates by a Lagrangian, here an open gate has a price. Chinnakonduru and Mohapatra have no gates.
//! - Scalars: heads can be dropped by whole groups alone, as a sum over a part of one is another head.
//! - Keys that are turned by their positions are read through one complex number a plane, which commutes with that.
//! - The optimizers move a parameter by about their rate a step, and logits have a longer way to go: α is stored as ln α / 100.

use rand::Rng;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use super::softmax::Softmax;
use crate::{
    Error,
    attention::{
        Attention, AttnInput, Dims, KvCache, LearnedHeads, Nature, Own, Param, Projections, State,
    },
    blocks::wide,
    kv_heads::{
        neighbours,
        space::{complex, in_planes},
    },
    nn::Visitor,
    pairs,
    rotary::rotate,
    variants::Variant,
    weights::Init,
};

const KIND: &str = "merging";

/// Settings of [`Merging`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Key/value heads in the end, a divisor of those that the layer has.
    pub kv_heads: u32,
    /// The old heads of each new one; neighbours where not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub groups: Option<Vec<Vec<i64>>>,
    /// What the new heads are made by.
    pub by: By,
    /// What a layer whose heads are all open costs, in nats.
    pub price: f64,
}

impl Default for Config {
    fn default() -> Self {
        Self { kv_heads: 1, groups: None, by: By::Matrices, price: 1.0 }
    }
}

/// What new heads are made by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum By {
    /// Projections of their own, read by each old head's queries through a matrix.
    Matrices,
    /// A weighted sum of the old heads.
    Scalars,
}

/// β of the hard concrete distribution.
const BETA: f64 = 0.33;

/// Where the stretched distribution begins: it ends as far behind 1.
const EPS: f64 = 0.1;

/// ln α of a gate in the beginning: P(g > 0) = 0.98, and g = 1 where nothing is drawn.
const START: f64 = 3.0;

/// ln α over what is stored.
const PACE: f64 = 100.0;

impl Config {
    pub(super) fn build(
        &self,
        dims: &Dims,
        projections: &Projections,
        own: &mut Own<'_, '_>,
    ) -> Result<Box<dyn Attention>, Error> {
        if !(self.price >= 0.0 && self.price.is_finite()) {
            return refuse("price", self.price.to_string(), "expected a number of at least 0");
        }
        let groups = self.groups(dims)?;
        let n = dims.n_kv_heads;
        let start = Tensor::full([n], START / PACE, (Kind::Double, Device::Cpu));
        let gate = own.get("gate.log_alpha", &[n], Init::Value(start))?;
        let mut side = |name: &str, old: &(Tensor, Option<Tensor>), turned: bool| match self.by {
            By::Matrices => {
                Matrices::get(own, name, dims, (old, turned), &groups).map(New::Matrices)
            }
            By::Scalars => {
                let shares = shares(&groups, n);
                own.get(&format!("{name}.share"), &[n], Init::Value(shares)).map(New::Scalars)
            }
        };
        let key = side("key", &projections.k, dims.rotary)?;
        let value = side("value", &projections.v, false)?;
        let softmax = Softmax { dims: dims.clone() };
        Ok(Box::new(Merging { config: self.clone(), groups, gate, key, value, softmax }))
    }

    fn groups(&self, dims: &Dims) -> Result<Vec<Vec<i64>>, Error> {
        let (n, wanted) = (dims.n_kv_heads, i64::from(self.kv_heads));
        let Some(groups) = &self.groups else {
            if wanted < 1 || n % wanted != 0 {
                let problem = format!("expected a divisor of {n}, the layer's key/value heads");
                return refuse("kv_heads", wanted.to_string(), &problem);
            }
            return Ok(neighbours(n, wanted));
        };
        let mut all: Vec<i64> = groups.concat();
        all.sort_unstable();
        if groups.len() as i64 != wanted || groups.contains(&vec![]) || all != Vec::from_iter(0..n)
        {
            let problem = format!(
                "expected `kv_heads` = {wanted} groups, none of them empty, that hold each of the {n} key/value heads once"
            );
            return refuse("groups", format!("{groups:?}"), &problem);
        }
        Ok(groups.clone())
    }
}

fn refuse<T>(field: &'static str, value: String, problem: &str) -> Result<T, Error> {
    Err(Error::Setting { kind: KIND, field, value, problem: problem.into() })
}

/// 1 over the size of each head's group: `[n]`.
fn shares(groups: &[Vec<i64>], n: i64) -> Tensor {
    let mut shares = vec![0.0; n as usize];
    for group in groups {
        group.iter().for_each(|&head| shares[head as usize] = 1.0 / group.len() as f64);
    }
    Tensor::from_slice(&shares)
}

/// The keys, or the values, that take the old ones' place.
#[derive(Debug)]
enum New {
    Matrices(Matrices),
    /// s: `[n_kv_heads]`.
    Scalars(Param),
}

#[derive(Debug)]
struct Matrices {
    /// W: `[groups · head_dim, hidden_size]`.
    weight: Param,
    /// b: `[groups · head_dim]`.
    bias: Option<Param>,
    /// C: `[n_kv_heads, head_dim, head_dim]`; of keys that are turned by their positions the real and the imaginary parts of a number a
    /// plane, `[n_kv_heads, 2, head_dim / 2]`.
    reading: Param,
    /// Whether they are.
    turned: bool,
}

impl Matrices {
    fn get(
        own: &mut Own<'_, '_>,
        name: &str,
        dims: &Dims,
        ((weight, bias), turned): (&(Tensor, Option<Tensor>), bool),
        groups: &[Vec<i64>],
    ) -> Result<Self, Error> {
        let Dims { n_kv_heads: n, head_dim: d, hidden_size, .. } = *dims;
        let rows = groups.len() as i64 * d;
        let mean =
            |x: &Tensor| summed(&x.detach().to_device(Device::Cpu), &shares(groups, n), groups);
        let mut get =
            |part: &str, size: &[i64], init: Init| own.get(&format!("{name}.{part}"), size, init);
        let bias = bias.as_ref().map(|bias| get("bias", &[rows], Init::Value(mean(bias))));
        let options = (Kind::Double, Device::Cpu);
        let (size, one) = match turned {
            true => {
                let half = [1, d / 2];
                let one =
                    Tensor::cat(&[Tensor::ones(half, options), Tensor::zeros(half, options)], 0);
                ([n, 2, d / 2], one)
            }
            false => ([n, d, d], Tensor::eye(d, options)),
        };
        Ok(Self {
            weight: get("weight", &[rows, hidden_size], Init::Value(mean(weight)))?,
            bias: bias.transpose()?,
            reading: get("reading", &size, Init::Value(one.expand(size, false).contiguous()))?,
            turned,
        })
    }

    /// C x̂ of each old head, `[batch, n_kv_heads, len, head_dim]`, where head j reads the new head `new_of[j]`.
    fn make(&self, input: &AttnInput, new_of: &[i64], d: i64) -> Tensor {
        let hidden = input.source.unwrap_or(input.hidden);
        let bias = self.bias.as_ref().map(|bias| &bias.tensor);
        let x = hidden.linear(&self.weight.tensor, bias).unflatten(-1, [-1, d]).transpose(1, 2);
        let x = match input.rotary {
            Some(tables) if self.turned => rotate(&x, tables),
            _ => x,
        };
        let x = x.index_select(1, &Tensor::from_slice(new_of).to_device(x.device()));
        let c = &self.reading.tensor;
        if !self.turned {
            return x.matmul(&c.transpose(1, 2));
        }
        let part = |at: i64| c.select(1, at).unsqueeze(1); // [n, 1, d / 2]
        let (re, im) = (part(0), part(1));
        let halves = x.chunk(2, -1);
        let (a, b) = (&halves[0], &halves[1]);
        Tensor::cat(&[a * &re - b * &im, a * &im + b * &re], -1)
    }

    /// C: `[n_kv_heads, head_dim, head_dim]`.
    fn push(&self) -> Tensor {
        let c = self.reading.tensor.detach();
        if self.turned { in_planes(&[c.select(1, 0), c.select(1, 1)]) } else { c }
    }

    fn params(&self) -> impl Iterator<Item = &Param> {
        [&self.weight].into_iter().chain(&self.bias).chain([&self.reading])
    }
}

/// Lets a new `kind` of matrices start from projections of new keys and values, and from C of either, `[n_kv_heads, head_dim, head_dim]`.
pub(crate) fn start_from(
    kind: &dyn Attention,
    new: &[(Tensor, Option<Tensor>); 2],
    push: &[Tensor; 2],
) {
    let values = |side: usize, part: &str| match part {
        "weight" => Some(new[side].0.shallow_clone()),
        "bias" => new[side].1.as_ref().map(Tensor::shallow_clone),
        "reading" => Some(push[side].shallow_clone()),
        _ => None,
    };
    kind.visit(&mut |name, tensor| {
        let mut parts = name.rsplit('.');
        let part = parts.next().unwrap_or_default();
        let side = match parts.next() {
            Some("key") => 0,
            Some("value") => 1,
            _ => return,
        };
        let Some(value) = values(side, part) else { return };
        let value = match tensor.size() == value.size() {
            true => value,
            false => Tensor::stack(&complex(&value), 1), // numbers a plane
        };
        tch::no_grad(|| tensor.shallow_clone().copy_(&value));
    });
}

/// Adds up the heads of each group along axis `dim`.
fn added(x: &Tensor, groups: &[Vec<i64>], dim: i64) -> Tensor {
    let mut size = x.size();
    size[dim as usize] = groups.len() as i64;
    let group_of = Tensor::from_slice(&group_of(groups)).to_device(x.device());
    Tensor::zeros(&size, (x.kind(), x.device())).index_add(dim, &group_of, x)
}

/// The rows of each group's heads added up, head j by `shares[j]`, in `f64`: `[heads · head_dim, ..] -> [groups · head_dim, ..]`.
fn summed(x: &Tensor, shares: &Tensor, groups: &[Vec<i64>]) -> Tensor {
    let by_head = x.to_kind(Kind::Double).reshape([shares.size()[0], -1]) * shares.unsqueeze(1);
    let size = [&[-1][..], &x.size()[1..]].concat();
    added(&by_head, groups, 0).view(size.as_slice())
}

/// The group of each head.
fn group_of(groups: &[Vec<i64>]) -> Vec<i64> {
    let mut of = vec![0; groups.iter().map(Vec::len).sum()];
    for (g, group) in (0..).zip(groups) {
        group.iter().for_each(|&head| of[head as usize] = g);
    }
    of
}

/// g of s.
fn stretched(s: &Tensor) -> Tensor {
    (s * (1.0 + 2.0 * EPS) - EPS).clamp(0.0, 1.0)
}

/// Softmax attention over heads that others take the place of.
#[derive(Debug)]
pub struct Merging {
    config: Config,
    groups: Vec<Vec<i64>>,
    /// ln α / 100: `[n_kv_heads]`.
    gate: Param,
    key: New,
    value: New,
    softmax: Softmax,
}

impl Merging {
    fn log_alpha(&self) -> Tensor {
        let stored = &self.gate.tensor;
        stored.to_kind(wide(stored.kind())) * PACE
    }

    /// g: `[n_kv_heads]`.
    fn gates(&self, input: &AttnInput) -> Tensor {
        let log_alpha = self.log_alpha();
        let s = match input.train {
            false => log_alpha.sigmoid(),
            true => {
                let mut rng = input.stream.rng();
                // Away from 0 and 1, whose logits are infinite.
                let noise: Vec<f64> = (0..log_alpha.size()[0])
                    .map(|_| rng.random_range(1e-6..1.0 - 1e-6))
                    .map(|u: f64| (u / (1.0 - u)).ln())
                    .collect();
                let noise = Tensor::from_slice(&noise).to_kind(log_alpha.kind());
                ((log_alpha.to_device(noise.device()) + noise) / BETA).sigmoid()
            }
        };
        stretched(&s)
    }

    /// Keys and values as they are attended to, of the tokens that `input` brings.
    fn mixed(&self, input: &AttnInput) -> [Tensor; 2] {
        let g = self.gates(input).to_device(input.k.device()).to_kind(input.k.kind());
        let g = g.view([1, -1, 1, 1]);
        let new_of = group_of(&self.groups);
        let mix = |old: &Tensor, new: &New| {
            let new = match new {
                New::Matrices(matrices) => {
                    matrices.make(input, &new_of, self.softmax.dims.head_dim)
                }
                New::Scalars(share) => {
                    let parts = old * share.tensor.view([1, -1, 1, 1]);
                    let index = Tensor::from_slice(&new_of).to_device(old.device());
                    added(&parts, &self.groups, 1).index_select(1, &index)
                }
            };
            old * &g + new * (1.0 - &g)
        };
        [mix(input.k, &self.key), mix(input.v, &self.value)]
    }
}

impl Attention for Merging {
    fn forward(&self, input: &AttnInput) -> Tensor {
        let [k, v] = self.mixed(input);
        self.softmax.forward(&AttnInput { k: &k, v: &v, ..*input })
    }

    fn weights(&self, input: &AttnInput, rows: &[i64]) -> Tensor {
        let [k, v] = self.mixed(input);
        self.softmax.weights(&AttnInput { k: &k, v: &v, ..*input }, rows)
    }

    /// Softmax attention's, and of each new key and value what makes it: 2 · hidden_size · head_dim · kv_heads · n by its projection and
    /// 2 · head_dim² · n_kv_heads · n by C, 4 · head_dim · n_kv_heads · n where that is a number a plane; 2 · head_dim · n_kv_heads · n by
    /// scalars.
    fn flops(&self, n_tokens: i64) -> i64 {
        let dims = &self.softmax.dims;
        let d = dims.head_dim;
        let one = |new: &New| match new {
            New::Scalars(_) => 2 * d * dims.n_kv_heads * n_tokens,
            New::Matrices(Matrices { turned, .. }) => {
                let reads = if *turned { 4 * d } else { 2 * d * d };
                pairs::projecting(dims, n_tokens, d * self.groups.len() as i64)
                    + reads * dims.n_kv_heads * n_tokens
            }
        };
        self.softmax.flops(n_tokens) + one(&self.key) + one(&self.value)
    }

    super::holds!(1, 8);

    fn nature(&self) -> Nature {
        Nature { reach: 0, chooses: false, reads_coordinates: true, has_own_slopes: false }
    }

    fn has_own_values(&self) -> bool {
        true
    }

    fn cache<'s>(&self, _: &'s mut dyn State) -> Option<&'s KvCache> {
        None // What is kept has been mixed.
    }

    fn step(&self, input: &AttnInput, state: &mut dyn State) -> Tensor {
        let [k, v] = self.mixed(input);
        self.softmax.step(&AttnInput { k: &k, v: &v, ..*input }, state)
    }

    fn penalty(&self) -> Option<Tensor> {
        let is_open = (self.log_alpha() - BETA * (EPS / (1.0 + EPS)).ln()).sigmoid();
        (self.config.price > 0.0).then(|| is_open.mean(None::<Kind>) * self.config.price)
    }

    fn learned_heads(&self, old: &Projections) -> Option<LearnedHeads> {
        let log_alpha = self.log_alpha().detach().to_device(Device::Cpu).to_kind(Kind::Double);
        let open = stretched(&log_alpha.sigmoid());
        let dims = &self.softmax.dims;
        let one = |new: &New, (weight, bias): &(Tensor, Option<Tensor>)| match new {
            New::Matrices(it) => {
                let bias = it.bias.as_ref().map(|bias| bias.tensor.detach());
                ((it.weight.tensor.detach(), bias), it.push())
            }
            New::Scalars(share) => {
                let share = share.tensor.detach().to_kind(Kind::Double);
                let sum = |x: &Tensor| summed(x, &share, &self.groups).to_kind(x.kind());
                let one = Tensor::eye(dims.head_dim, (Kind::Double, weight.device()));
                (
                    (sum(weight), bias.as_ref().map(sum)),
                    one.unsqueeze(0).repeat([dims.n_kv_heads, 1, 1]),
                )
            }
        };
        let (k, push_k) = one(&self.key, &old.k);
        let (v, push_v) = one(&self.value, &old.v);
        let open = Vec::try_from(open).expect("a tensor of f64");
        Some(LearnedHeads { groups: self.groups.clone(), k, v, push: [push_k, push_v], open })
    }

    fn visit(&self, f: &mut Visitor<'_>) {
        f(&self.gate.name, &self.gate.tensor);
        for new in [&self.key, &self.value] {
            match new {
                New::Matrices(it) => it.params().for_each(|param| f(&param.name, &param.tensor)),
                New::Scalars(share) => f(&share.name, &share.tensor),
            }
        }
    }

    fn select_heads(&mut self, heads: &[i64], dims: &Dims) -> Result<(), Error> {
        let d = dims.head_dim;
        let old = &self.softmax.dims;
        let kept = match dims.n_kv_heads == old.n_kv_heads {
            true => Vec::from_iter(0..old.n_kv_heads),
            false => old.kv_heads_of(heads),
        };
        let place = |head: &i64| kept.iter().position(|kept| kept == head).map(|at| at as i64);
        let left: Vec<Vec<i64>> =
            self.groups.iter().map(|group| group.iter().filter_map(place).collect()).collect();
        let is_cut =
            |(old, left): (&Vec<i64>, &Vec<i64>)| !left.is_empty() && left.len() < old.len();
        if self.config.by == By::Scalars && self.groups.iter().zip(&left).any(is_cut) {
            return Err(Error::Refused {
                kind: KIND,
                what: "drop these heads",
                reason: "a new key/value head is the sum of its group, which would change for the heads that are left\nhint: drop \
                         whole groups, or end the merging first (`attn convert --method learned`)"
                    .into(),
            });
        }
        let rows: Vec<i64> = (0..)
            .zip(&left)
            .filter(|(_, group)| !group.is_empty())
            .flat_map(|(g, _)| g * d..(g + 1) * d)
            .collect();
        self.gate.select(0, &kept);
        for new in [&mut self.key, &mut self.value] {
            match new {
                New::Matrices(it) => {
                    it.weight.select(0, &rows);
                    it.bias.iter_mut().for_each(|bias| bias.select(0, &rows));
                    it.reading.select(0, &kept);
                }
                New::Scalars(share) => share.select(0, &kept),
            }
        }
        self.groups = left.into_iter().filter(|group| !group.is_empty()).collect();
        self.softmax.select_heads(heads, dims)
    }

    fn regroup_kv(&mut self, _: &[Vec<i64>], _: &Dims) -> Result<(), Error> {
        Err(Error::Refused {
            kind: KIND,
            what: "have its key/value heads merged",
            reason: "they are being merged: `attn convert --method learned` ends that".into(),
        })
    }

    fn settings(&self) -> Option<Variant> {
        let kv_heads = self.groups.len() as u32;
        let groups = Some(self.groups.clone());
        Some(Variant::Merging(Config { kv_heads, groups, ..self.config.clone() }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        attention::Stream,
        mask::Mask,
        rotary::{Rotary, Scaling},
        testing::{Probe, assert_close, naive_attention, randn},
    };

    fn config(by: By) -> Config {
        Config { kv_heads: 2, groups: Some(vec![vec![0, 3], vec![1, 2]]), by, price: 0.5 }
    }

    /// The kind with numbers in every parameter; the gates half open, closed, open, half open.
    fn built(probe: &Probe, by: By) -> (Box<dyn Attention>, Vec<(String, Tensor)>) {
        let kind = probe.build(&Variant::Merging(config(by)));
        let mut params = Vec::new();
        kind.visit(&mut |name, tensor| params.push((name.to_owned(), tensor.shallow_clone())));
        let logits = Tensor::from_slice(&[0.3, -5.0, 5.0, -0.7]) / PACE;
        tch::no_grad(|| params[0].1.shallow_clone().copy_(&logits));
        (kind, params)
    }

    /// Position, channels of a head -> the same, turned.
    type Turn<'a> = &'a dyn Fn(i64, &[f64]) -> Vec<f64>;

    /// Keys or values as the definition mixes them, number by number.
    fn mixed_by_hand(
        probe: &Probe,
        old: &Tensor,
        params: &[(String, Tensor)],
        side: &str,
        turn: Option<Turn<'_>>,
    ) -> Tensor {
        let [b, heads, n, d] = old.size()[..] else { unreachable!() };
        let param = |part: &str| {
            let name = format!("probe.{side}.{part}");
            params.iter().find(|(own, _)| *own == name).map(|(_, tensor)| tensor)
        };
        let group_of = [0, 1, 1, 0];
        let mixed = old.zeros_like();
        for (example, j, i) in
            (0..b * heads * n).map(|at| (at / (heads * n), at / n % heads, at % n))
        {
            let logit = params[0].1.double_value(&[j]) * 100.0;
            let g = (1.2 / (1.0 + (-logit).exp()) - 0.1).clamp(0.0, 1.0);
            let new: Vec<f64> = match param("share") {
                Some(share) => (0..d)
                    .map(|c| {
                        let of_group = (0..heads)
                            .filter(|&other| group_of[other as usize] == group_of[j as usize]);
                        let part = |other: i64| {
                            share.double_value(&[other]) * old.double_value(&[example, other, i, c])
                        };
                        of_group.map(part).sum()
                    })
                    .collect(),
                None => {
                    let weight = param("weight").unwrap();
                    let made = (0..d).map(|c| {
                        let row = group_of[j as usize] * d + c;
                        let times = |x: i64| {
                            weight.double_value(&[row, x])
                                * probe.hidden.double_value(&[example, i, x])
                        };
                        (0..probe.dims.hidden_size).map(times).sum::<f64>()
                    });
                    let made: Vec<f64> = made.collect();
                    let reading = param("reading").unwrap();
                    match turn {
                        None => (0..d)
                            .map(|c| {
                                (0..d)
                                    .map(|e| reading.double_value(&[j, c, e]) * made[e as usize])
                                    .sum()
                            })
                            .collect(),
                        Some(turn) => {
                            let (made, half) = (turn(i, &made), d / 2);
                            let number =
                                |at: i64, plane: i64| reading.double_value(&[j, at, plane]);
                            let (x, y) = made.split_at(half as usize);
                            let planes = || (0..half).zip(x.iter().zip(y));
                            let re =
                                planes().map(|(p, (x, y))| number(0, p) * x - number(1, p) * y);
                            let im =
                                planes().map(|(p, (x, y))| number(0, p) * y + number(1, p) * x);
                            re.chain(im).collect()
                        }
                    }
                }
            };
            for (c, new) in (0..).zip(new) {
                let value = g * old.double_value(&[example, j, i, c]) + (1.0 - g) * new;
                let _ = mixed.get(example).get(j).get(i).get(c).fill_(value);
            }
        }
        mixed
    }

    #[test]
    fn matches_the_definition() {
        for (by, rotary) in [(By::Matrices, false), (By::Matrices, true), (By::Scalars, true)] {
            let mut probe = Probe::new(41, [2, 7, 7], 4, 4, true);
            probe.dims.rotary = rotary;
            let mask = Mask::new(true);
            let d = probe.dims.head_dim;
            let table = Rotary::new(d, 10_000.0, &Scaling::None);
            let frequencies = table.frequencies();
            let tables = table.tables(&probe.positions, Kind::Double);
            let (kind, params) = built(&probe, by);
            let input = AttnInput { rotary: rotary.then_some(&tables), ..probe.input(&mask) };
            let turn = |i: i64, x: &[f64]| -> Vec<f64> {
                let (a, b) = x.split_at(x.len() / 2);
                let planes =
                    || a.iter().zip(b).zip(frequencies.iter().map(|f| (i as f64 * f).sin_cos()));
                let first = planes().map(|((a, b), (s, c))| a * c - b * s);
                first.chain(planes().map(|((a, b), (s, c))| b * c + a * s)).collect()
            };
            let turn: Option<Turn<'_>> = rotary.then_some(&turn);
            let mixed = Probe {
                k: mixed_by_hand(&probe, &probe.k, &params, "key", turn),
                v: mixed_by_hand(&probe, &probe.v, &params, "value", None),
                ..probe.to(Kind::Double, Device::Cpu)
            };
            let (z, weights) = naive_attention(&mixed, |i, j| j <= i);
            assert_close("z", &kind.forward(&input), &z, 1e-12);
            assert_close(
                "weights",
                &kind.weights(&input, &[0, 3, 6]),
                &weights.index_select(2, &Tensor::from_slice(&[0i64, 3, 6])),
                1e-12,
            );
        }
    }

    #[test]
    fn starts_out_as_softmax() {
        let probe = Probe::new(42, [2, 9, 9], 4, 4, true);
        let mask = Mask::new(true);
        for by in [By::Matrices, By::Scalars] {
            let (kind, params) = built(&probe, by);
            let _ = tch::no_grad(|| params[0].1.shallow_clone().fill_(START / PACE));
            let softmax = Softmax { dims: probe.dims.clone() };
            assert!(
                kind.forward(&probe.input(&mask)).equal(&softmax.forward(&probe.input(&mask))),
                "{by:?}"
            );
        }
    }

    /// Draws open, half open and closed gates as often as the distribution says, and the penalty is the chance that one is not closed.
    #[test]
    fn gates_are_drawn_as_the_penalty_says() {
        let probe = Probe::new(43, [1, 3, 3], 4, 4, true);
        let mask = Mask::new(true);
        let kind = Merging {
            gate: Param {
                name: "gate".into(),
                tensor: Tensor::from_slice(&[0.3, -2.0, 2.0, -0.7]) / PACE,
            },
            config: config(By::Scalars),
            groups: vec![vec![0, 3], vec![1, 2]],
            key: New::Scalars(Param { name: "k".into(), tensor: randn(1, &[4]) }),
            value: New::Scalars(Param { name: "v".into(), tensor: randn(2, &[4]) }),
            softmax: Softmax { dims: probe.dims.clone() },
        };
        let draws: Vec<Tensor> = (0..4000)
            .map(|step| {
                let stream = Stream { seed: 1, step, layer: 0 };
                kind.gates(&AttnInput { train: true, stream, ..probe.input(&mask) })
            })
            .collect();
        let draws = Tensor::stack(&draws, 0);
        assert!(draws.ge(0.0).logical_and(&draws.le(1.0)).all().int64_value(&[]) == 1);
        let is_open =
            draws.gt(0.0).to_kind(Kind::Double).mean_dim([0i64].as_slice(), false, Kind::Double);
        let found = kind.penalty().unwrap().double_value(&[]);
        assert!(
            (is_open.mean(Kind::Double).double_value(&[]) * 0.5 - found).abs() < 0.006,
            "{is_open} {found}"
        );
        let by_hand: f64 = [0.3f64, -2.0, 2.0, -0.7]
            .map(|logit| 1.0 / (1.0 + (-(logit - 0.33 * (0.1f64 / 1.1).ln())).exp()))
            .iter()
            .sum();
        assert!((found - 0.5 * by_hand / 4.0).abs() < 1e-12);
        let open = kind.learned_heads(&Projections {
            q: (randn(1, &[24, 10]), None),
            k: (randn(1, &[24, 10]), None),
            v: (randn(1, &[24, 10]), None),
        });
        let open = Tensor::from_slice(&open.unwrap().open);
        assert_close("open", &open, &kind.gates(&probe.input(&mask)), 1e-12);
    }

    /// Slopes of gates, matrices and scalars in a pass of training, against differences.
    #[test]
    fn gradients_are_those_of_differences() {
        for (by, rotary) in [(By::Matrices, false), (By::Matrices, true), (By::Scalars, false)] {
            let mut probe = Probe::new(44, [2, 5, 5], 4, 4, true);
            probe.dims.rotary = rotary;
            let mask = Mask::new(true);
            let tables =
                Rotary::new(6, 10_000.0, &Scaling::None).tables(&probe.positions, Kind::Double);
            let (kind, params) = built(&probe, by);
            let pull = randn(5, &probe.q.size());
            let loss = || {
                let stream = Stream { seed: 3, step: 8, layer: 1 };
                let rotary = rotary.then_some(&tables);
                let z =
                    kind.forward(&AttnInput { train: true, stream, rotary, ..probe.input(&mask) });
                (z * &pull).sum(Kind::Double) + kind.penalty().unwrap()
            };
            for (_, tensor) in &params {
                let _ = tensor.set_requires_grad(true);
            }
            loss().backward();
            let mut n_slopes = 0;
            for (name, tensor) in &params {
                let (slope, flat) = (tensor.grad().view([-1]), tensor.detach().view([-1]));
                for at in (0..flat.size()[0]).step_by(1 + flat.size()[0] as usize / 8) {
                    let step = if name.ends_with("log_alpha") { 1e-7 } else { 1e-5 };
                    let moved = |by: f64| {
                        let _ = flat.get(at).g_add_scalar_(by);
                        let value = tch::no_grad(|| loss().double_value(&[]));
                        let _ = flat.get(at).g_add_scalar_(-by);
                        value
                    };
                    let expected = (moved(step) - moved(-step)) / (2.0 * step);
                    let found = slope.double_value(&[at]);
                    assert!(
                        (found - expected).abs() <= 1e-5 * (1.0 + expected.abs()),
                        "{by:?} {name} {at}: {found} {expected}"
                    );
                    n_slopes += usize::from(found != 0.0);
                }
            }
            assert!(n_slopes > 10, "a test of nothing: {n_slopes}");
        }
    }

    #[test]
    fn heads_that_go_take_their_gates_and_empty_groups_along() {
        let probe = Probe::new(45, [1, 5, 5], 4, 4, true);
        let mask = Mask::new(true);
        for by in [By::Matrices, By::Scalars] {
            for keep in [vec![0i64, 1, 3], vec![3, 0], vec![2]] {
                let (mut kind, _) = built(&probe, by);
                let index = Tensor::from_slice(&keep);
                let whole = kind.forward(&probe.input(&mask)).index_select(1, &index);
                let mut part = probe.select_heads(&keep);
                part.dims = probe.dims.of_heads(&keep);
                let kv = Tensor::from_slice(&probe.dims.kv_heads_of(&keep));
                (part.k, part.v) = (part.k.index_select(1, &kv), part.v.index_select(1, &kv));
                let followed = kind.select_heads(&keep, &part.dims);
                if by == By::Scalars && keep != [3, 0] {
                    // The sum would be over heads that are gone.
                    assert!(matches!(followed, Err(Error::Refused { .. })), "{keep:?}");
                    let still = kind.forward(&probe.input(&mask)).index_select(1, &index);
                    assert!(still.equal(&whole), "{keep:?}");
                    continue;
                }
                followed.unwrap();
                let found = kind.forward(&part.input(&mask));
                assert_close(&format!("{by:?} {keep:?}"), &found, &whole, 1e-12);
                let Some(Variant::Merging(settings)) = kind.settings() else { panic!() };
                assert_eq!(settings.groups.unwrap().concat().len(), keep.len());
                assert_eq!(settings.kv_heads, if keep == [0, 1, 3] { 2 } else { 1 });
            }
        }
    }

    #[test]
    fn groups_that_do_not_fit_are_refused() {
        let probe = Probe::new(46, [1, 3, 3], 4, 4, true);
        let refused = |config: &Config| match config.groups(&probe.dims) {
            Err(Error::Setting { field, problem, .. }) => (field, problem),
            other => panic!("{other:?}"),
        };
        let (field, problem) = refused(&Config { kv_heads: 3, ..Config::default() });
        assert!(field == "kv_heads" && problem.contains("a divisor of 4"), "{problem}");
        for groups in [
            vec![vec![0, 1], vec![2, 2]],
            vec![vec![0, 1, 2, 3], vec![]],
            vec![vec![0, 1, 2, 3]],
            vec![vec![0, 1], vec![2, 4]],
        ] {
            let (field, problem) =
                refused(&Config { kv_heads: 2, groups: Some(groups), ..Config::default() });
            assert!(
                field == "groups" && problem.contains("each of the 4 key/value heads once"),
                "{problem}"
            );
        }
    }
}
