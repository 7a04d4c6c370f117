//! Attention to the keys that a small indexer likes best, the same ones for all heads.
//!
//! ```text
//! z_t  = Σ_s softmax_s(scale · q_t·k_s  if I_ts is among the top_k of I_t, else -∞) v_s
//! I_ts = Σ_j w_tj ReLU(q^I_tj · k^I_s),   q^I = W_q x, k^I = W_k x, w = W_w x / √(n_index_heads · index_dim)
//! ```
//!
//! DeepSeek-AI 2025, "DeepSeek-V3.2", <https://arxiv.org/abs/2512.02556>, section 2.1 (the lightning indexer). The
//! indexer reads the hidden states detached: no gradient leaves it, and none of z's enters it through the choice. It learns
//! from a loss of its own (section 2.1.1), added in every training pass:
//!
//! ```text
//! mean_t Σ_s p_ts (ln p_ts − ln softmax_s(I_ts)),   p_ts = mean over heads of softmax_s(scale · q_t·k_s)
//! ```
//!
//! over all keys that t sees. The paper does so in its first stage and compares the chosen keys alone afterwards; here all
//! count throughout, which costs as much as dense attention. Of equal scores the earlier key wins. As in the released code, q^I and
//! k^I are turned by their positions where the layer's queries and keys are (as many channels as a head has, at most); it
//! also normalizes k^I, which is left out here.
//!
//! Scoring costs n² products of `n_index_heads · index_dim`, piece by piece, as in the paper. The chosen keys are gathered
//! where the text is much longer than what is chosen; below that, all keys of a piece are scored and the others hidden,
//! which is faster.

use std::{any::Any, num::NonZeroU32};

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::softmax::Softmax;
use crate::{
    Error,
    attention::{
        Attention, AttnInput, Dims, Holds, KvCache, Nature, Own, Param, Projections, Selection,
        State,
    },
    blocks::{choose, piece, wide},
    mask::to_bias,
    nn::{self, Visitor},
    pairs,
    rotary::rotate,
    weights::Init,
};

/// Settings of [`Indexed`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Heads of the indexer; the paper's model has 64 beside 128 query heads.
    pub n_index_heads: NonZeroU32,
    /// Channels of an index head; the paper's model has 128.
    pub index_dim: NonZeroU32,
    /// Keys that a query attends to; fewer where fewer are visible.
    pub top_k: NonZeroU32,
}

impl Default for Config {
    fn default() -> Self {
        // For models of a hundred million parameters; the number of keys is the paper's.
        Self {
            n_index_heads: const { NonZeroU32::new(4).unwrap() },
            index_dim: const { NonZeroU32::new(32).unwrap() },
            top_k: const { NonZeroU32::new(2048).unwrap() },
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
        dims.check_choices("indexed", ("top_k", self.top_k.get()), "no more keys", |n| n)?;
        let (heads, width) = (self.n_index_heads.get().into(), self.index_dim.get().into());
        let mut random = |name: &str, n: i64| {
            let spread = (dims.hidden_size as f64).powf(-0.5);
            own.get(name, &[n, dims.hidden_size], Init::Normal(spread))
        };
        Ok(Box::new(Indexed {
            queries: random("index_q.weight", heads * width)?,
            keys: random("index_k.weight", width)?,
            weights: random("index_w.weight", heads)?,
            top_k: self.top_k.get().into(),
            softmax: Softmax { dims: dims.clone() },
        }))
    }
}

/// Softmax over the keys that the indexer chose.
#[derive(Debug)]
pub struct Indexed {
    /// `[n_index_heads · index_dim, hidden_size]`
    queries: Param,
    /// `[index_dim, hidden_size]`
    keys: Param,
    /// `[n_index_heads, hidden_size]`
    weights: Param,
    top_k: i64,
    softmax: Softmax,
}

/// Turns the first channels of `x` (`[b, n, heads, width]`) by the tables of a layer, `[b, 1, n, head_dim]` each.
fn turned(x: Tensor, tables: Option<&(Tensor, Tensor)>) -> Tensor {
    let Some((cos, sin)) = tables else { return x };
    let width = x.size()[3];
    let n_turned = width.min(cos.size()[3]) / 2 * 2;
    let of_heads = |table: &Tensor| {
        let half = table.transpose(1, 2).narrow(3, 0, n_turned / 2); // [b, n, 1, half]
        Tensor::cat(&[&half, &half], 3)
    };
    let front = rotate(&x.narrow(3, 0, n_turned), &(of_heads(cos), of_heads(sin)));
    Tensor::cat(&[front, x.narrow(3, n_turned, width - n_turned)], 3)
}

/// Texts up to so many times `top_k` are scored whole: a gathered key costs about as much as this many scored ones.
const DENSE_UP_TO: i64 = 16;

impl Indexed {
    /// The indexer's scores of every key, `[batch, q_len, k_len]` in at least `f32`, with gradients of its own parameters;
    /// nothing is hidden.
    pub fn index_scores(&self, input: &AttnInput) -> Tensor {
        self.scores(input.hidden, input.rotary, &self.index_keys(input))
    }

    /// `[b, k, index_dim]`
    fn index_keys(&self, input: &AttnInput) -> Tensor {
        let hidden = input.source.unwrap_or(input.hidden).detach();
        turned(nn::product(&hidden, &self.keys.tensor, None).unsqueeze(2), input.rotary)
            .squeeze_dim(2)
    }

    /// The scores that the queries of `hidden` (`[b, rows, hidden]`), turned by `tables`, give to `keys`
    /// (`[b, k, index_dim]`): `[b, rows, k]`.
    fn scores(&self, hidden: &Tensor, tables: Option<&(Tensor, Tensor)>, keys: &Tensor) -> Tensor {
        let hidden = hidden.detach();
        let [b, rows, _] = hidden.size()[..] else { unreachable!("hidden states have three axes") };
        let (k_len, width) = (keys.size()[1], keys.size()[2]);
        let n_heads = self.weights.tensor.size()[0];
        let kind = wide(hidden.kind());
        let q = nn::product(&hidden, &self.queries.tensor, None).view([b, rows, n_heads, width]);
        let q = turned(q, tables).reshape([b, rows * n_heads, width]);
        let w = nn::product(&hidden, &self.weights.tensor, None).to_kind(kind);
        let w = w * ((n_heads * width) as f64).powf(-0.5);
        let products = q.matmul(&keys.transpose(1, 2)).to_kind(kind).relu(); // [b, rows · heads, k]
        let products = products.view([b, rows, n_heads, k_len]);
        w.unsqueeze(2).matmul(&products).squeeze_dim(2)
    }

    /// The choices of the queries `rows` (a run of them) among the first `n` keys, and what they may see of those.
    fn choices(
        &self,
        input: &AttnInput,
        index_keys: &Tensor,
        rows: &[i64],
        n: i64,
    ) -> (Selection, Tensor) {
        let (q_len, k_len, device) = (input.q.size()[2], input.k.size()[2], input.q.device());
        let index = Tensor::from_slice(rows).to_device(device);
        let allowed = input.mask.allowed_rows(rows, q_len, k_len, device).narrow(3, 0, n);
        let scores = tch::no_grad(|| {
            let hidden = input.hidden.index_select(1, &index);
            let of_rows = |x: &Tensor| x.index_select(2, &index);
            let tables = input.rotary.map(|(cos, sin)| (of_rows(cos), of_rows(sin)));
            self.scores(&hidden, tables.as_ref(), &index_keys.narrow(1, 0, n)).unsqueeze(1)
        });
        let forced = Tensor::zeros([1, 1, 1, 1], (Kind::Bool, device));
        (choose(&scores, &allowed, &forced, self.top_k), allowed)
    }

    /// Whether each of the queries `rows` attends to each of the first `n` keys, `[b, 1, rows, n]`.
    fn attended(&self, input: &AttnInput, index_keys: &Tensor, rows: &[i64], n: i64) -> Tensor {
        match input.selection {
            Some(chosen) => {
                let (q_len, k_len, device) =
                    (input.q.size()[2], input.k.size()[2], input.q.device());
                let index = Tensor::from_slice(rows).to_device(device);
                let allowed = input.mask.allowed_rows(rows, q_len, k_len, device);
                chosen.index_select(2, &index).logical_and(&allowed).narrow(3, 0, n)
            }
            None => self.choices(input, index_keys, rows, n).0.chosen,
        }
    }

    /// Queries in runs with the keys that there are for them: `(rows, keys)`.
    fn runs(&self, input: &AttnInput, step: i64) -> Vec<(Vec<i64>, i64)> {
        let (q_len, k_len) = (input.q.size()[2], input.k.size()[2]);
        (0..q_len)
            .step_by(step as usize)
            .map(|first| {
                let end = (first + step).min(q_len);
                let n = if input.mask.causal() { k_len - q_len + end } else { k_len };
                ((first..end).collect(), n)
            })
            .collect()
    }

    /// z, with the keys of the indexer for all of `input.k`.
    fn attend(&self, input: &AttnInput, index_keys: &Tensor) -> Tensor {
        let dims = &self.softmax.dims;
        let (b, k_len) = (input.q.size()[0], input.k.size()[2]);
        if self.top_k >= k_len && input.selection.is_none() {
            return self.softmax.forward(input);
        }
        let is_gathered = k_len > DENSE_UP_TO * self.top_k || input.q.size()[2] == 1;
        let n_scores = b * k_len * self.weights.tensor.size()[0].max(dims.n_heads);
        let mut step = piece(input.q.device(), n_scores);
        if is_gathered {
            let n_gathered = b * dims.n_heads * self.top_k * dims.head_dim;
            step = step.min((4 * piece(input.q.device(), n_gathered) / 64).max(1));
        }
        let z = self.runs(input, step).into_iter().map(|(rows, n)| {
            let chosen = self.attended(input, index_keys, &rows, n);
            let q = input.q.narrow(2, rows[0], rows.len() as i64);
            if is_gathered {
                self.gathered(input, &q, &chosen)
            } else {
                let [k, v] = [input.k, input.v].map(|x| dims.expand_kv(&x.narrow(2, 0, n)));
                let bias = Some(to_bias(&chosen, q.kind()));
                let scale = dims.scale;
                Tensor::scaled_dot_product_attention(
                    &q,
                    &k,
                    &v,
                    bias,
                    input.dropout,
                    false,
                    scale,
                    false,
                )
            }
        });
        Tensor::cat(&z.collect::<Vec<_>>(), 2)
    }

    /// The queries `q` (`[b, n_heads, rows, head_dim]`) against the keys that they chose, and no others.
    fn gathered(&self, input: &AttnInput, q: &Tensor, chosen: &Tensor) -> Tensor {
        let dims = &self.softmax.dims;
        let [b, h, rows, d] = q.size()[..] else { unreachable!("queries have four axes") };
        let n_most = self.top_k.min(chosen.size()[3]);
        let (on, index) = chosen.to_kind(Kind::Int).topk(n_most, -1, true, true); // [b, 1, rows, most]
        let is_even = dims.is_evenly_grouped();
        let taken = |x: &Tensor| {
            let x = if is_even { x.shallow_clone() } else { dims.expand_kv(x) };
            let n_kv = x.size()[1];
            let index = index.view([b, 1, -1, 1]).expand([b, n_kv, rows * n_most, d], true);
            x.gather(2, &index, false).view([b, n_kv, rows, n_most, d])
        };
        let (k, v) = (taken(input.k), taken(input.v));
        let n_kv = k.size()[1];
        let q = q.reshape([b, n_kv, h / n_kv, rows, d]).transpose(2, 3); // [b, kv, rows, r, d]
        let kind = wide(q.kind());
        let scores = q.matmul(&k.transpose(-2, -1)).to_kind(kind) * dims.scale;
        let scores = scores + to_bias(&on.ne(0).unsqueeze(3), kind); // [b, kv, rows, r, most]
        let weights = scores.softmax(-1, kind).to_kind(q.kind());
        let z = weights.dropout(input.dropout, input.dropout > 0.0).matmul(&v);
        z.transpose(2, 3).reshape([b, h, rows, d])
    }
}

impl Attention for Indexed {
    fn forward(&self, input: &AttnInput) -> Tensor {
        self.attend(input, &self.index_keys(input))
    }

    fn weights(&self, input: &AttnInput, rows: &[i64]) -> Tensor {
        let dims = &self.softmax.dims;
        let index = Tensor::from_slice(rows).to_device(input.q.device());
        let attended = self.attended(input, &self.index_keys(input), rows, input.k.size()[2]);
        let q = input.q.index_select(2, &index);
        let scores = q.matmul(&dims.expand_kv(input.k).transpose(-2, -1)) * dims.scale;
        (scores + to_bias(&attended, q.kind())).softmax(-1, q.kind())
    }

    /// 4 · head_dim · n_heads · pairs of a query with its `top_k` keys; for the indexer 2 · hidden_size · index_dim · n, and
    /// where keys are left out 2 · hidden_size · n_index_heads · (index_dim + 1) · n and 2 · n_index_heads · (index_dim + 1) for
    /// each pair that the mask shows.
    fn flops(&self, n_tokens: i64) -> i64 {
        let dims = &self.softmax.dims;
        let (n_heads, width) = (self.weights.tensor.size()[0], self.keys.tensor.size()[0]);
        let n_seen = pairs::n_seen(n_tokens, dims.causal);
        let keys = pairs::projecting(dims, n_tokens, width);
        if self.top_k >= n_tokens {
            return pairs::weighing(dims, n_seen) + keys;
        }
        let n_kept = match dims.causal {
            true => pairs::n_pairs(n_tokens, true, 0, |distance| distance < self.top_k),
            false => n_tokens * self.top_k,
        };
        pairs::weighing(dims, n_kept)
            + keys
            + pairs::projecting(dims, n_tokens, n_heads * (width + 1))
            + 2 * n_heads * (width + 1) * n_seen
    }

    /// In training the index is held against the attention of every pair (`tests/need.rs`).
    fn held(&self, dims: &Dims, pass: Holds) -> i64 {
        let pairs = if pass.trains { 10 * pass.n_tokens * pass.n_tokens } else { 0 };
        let channels = if pass.trains { 12 } else { 4 };
        channels * dims.n_heads * dims.head_dim * pass.n_tokens
            + pairs
            + pass.dropped_pairs(dims)
            + pass.masked_pairs()
    }

    fn nature(&self) -> Nature {
        Nature { reach: self.top_k, chooses: true, reads_coordinates: false, has_own_slopes: true }
    }

    fn selection(&self, input: &AttnInput) -> Option<Selection> {
        let k_len = input.k.size()[2];
        let keys = self.index_keys(input);
        let n_scores = input.q.size()[0] * k_len * self.weights.tensor.size()[0];
        let runs = self.runs(input, piece(input.q.device(), n_scores));
        let all: Vec<Selection> =
            runs.into_iter().map(|(rows, _)| self.choices(input, &keys, &rows, k_len).0).collect();
        let join =
            |of: fn(&Selection) -> &Tensor| Tensor::cat(&all.iter().map(of).collect::<Vec<_>>(), 2);
        Some(Selection { chosen: join(|run| &run.chosen), margin: join(|run| &run.margin) })
    }

    fn own_loss(&self, input: &AttnInput) -> Option<Tensor> {
        let own = [&self.queries, &self.keys, &self.weights];
        if !own.iter().any(|param| param.tensor.requires_grad()) {
            return None;
        }
        let (b, q_len, k_len) = (input.q.size()[0], input.q.size()[2], input.k.size()[2]);
        let (device, kind) = (input.q.device(), wide(input.q.kind()));
        let real = match input.mask.keep() {
            Some(keep) => keep.narrow(1, k_len - q_len, q_len).to_kind(kind),
            None => Tensor::ones([b, q_len], (kind, device)),
        };
        let keys = self.index_keys(input);
        let n_scores = b * k_len * self.softmax.dims.n_heads.max(self.weights.tensor.size()[0]);
        let mut sum = Tensor::zeros([], (kind, device));
        for (rows, n) in self.runs(input, piece(device, n_scores)) {
            let index = Tensor::from_slice(&rows).to_device(device);
            let dense = tch::no_grad(|| {
                let weights = self.softmax.weights(input, &rows).narrow(3, 0, n).to_kind(kind);
                weights.mean_dim([1i64].as_slice(), false, None::<Kind>) // [b, rows, n]
            });
            let tables = input
                .rotary
                .map(|(cos, sin)| (cos.index_select(2, &index), sin.index_select(2, &index)));
            let hidden = input.hidden.index_select(1, &index);
            let scores = self.scores(&hidden, tables.as_ref(), &keys.narrow(1, 0, n));
            let allowed = input.mask.allowed_rows(&rows, q_len, k_len, device).narrow(3, 0, n);
            let log = (scores + to_bias(&allowed.squeeze_dim(1), kind)).log_softmax(-1, kind);
            let each = (dense.xlogy(&dense) - &dense * log).sum_dim_intlist(
                [-1i64].as_slice(),
                false,
                None::<Kind>,
            ); // [b, rows]
            sum += (each * real.index_select(1, &index)).sum(None::<Kind>);
        }
        Some(sum / real.sum(None::<Kind>).clamp_min(1.0))
    }

    fn start(&self) -> Box<dyn State> {
        Box::new(Decoding { tokens: KvCache::new(None), index_keys: KvCache::new(None) })
    }

    fn step(&self, input: &AttnInput, state: &mut dyn State) -> Tensor {
        let state: &mut Decoding = state
            .as_any_mut()
            .downcast_mut()
            .expect("a decoding state belongs to the kind that started it");
        let (k, v) = state.tokens.append(input.k, input.v);
        let new = self.index_keys(input).unsqueeze(1);
        let (index_keys, _) = state.index_keys.append(&new, &new.narrow(3, 0, 0));
        let input = AttnInput { k: &k, v: &v, mask: &input.mask.tail(k.size()[2]), ..*input };
        self.attend(&input, &index_keys.squeeze_dim(1))
    }

    fn visit(&self, f: &mut Visitor<'_>) {
        for param in [&self.queries, &self.keys, &self.weights] {
            f(&param.name, &param.tensor);
        }
    }

    fn select_heads(&mut self, heads: &[i64], dims: &Dims) -> Result<(), Error> {
        self.softmax.select_heads(heads, dims) // The indexer's heads are its own.
    }

    fn regroup_kv(&mut self, groups: &[Vec<i64>], dims: &Dims) -> Result<(), Error> {
        self.softmax.regroup_kv(groups, dims)
    }
}

/// What decoding keeps: keys and values, and the indexer's keys.
#[derive(Debug)]
struct Decoding {
    tokens: KvCache,
    index_keys: KvCache,
}

impl State for Decoding {
    fn bytes(&self) -> usize {
        self.tokens.bytes() + self.index_keys.bytes()
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        mask::Mask,
        testing::{Probe, assert_close, naive_attention, naive_attention_of, partly_hidden, randn},
    };

    const WIDTH: i64 = 3;

    fn indexed(probe: &Probe, n_heads: i64, top_k: i64) -> Indexed {
        let hidden = probe.dims.hidden_size;
        let param =
            |name: &str, seed, n| Param { name: name.into(), tensor: randn(seed, &[n, hidden]) };
        Indexed {
            queries: param("q", 1, n_heads * WIDTH),
            keys: param("k", 2, WIDTH),
            weights: param("w", 3, n_heads),
            top_k,
            softmax: Softmax { dims: probe.dims.clone() },
        }
    }

    /// I from the definition.
    fn naive_scores(probe: &Probe, kind: &Indexed) -> Vec<Vec<Vec<f64>>> {
        let [b, n, width] = probe.hidden.size()[..] else { unreachable!() };
        let n_heads = kind.weights.tensor.size()[0];
        let row = |param: &Param, at: i64, e: i64, t: i64| -> f64 {
            (0..width)
                .map(|c| {
                    param.tensor.double_value(&[at, c]) * probe.hidden.double_value(&[e, t, c])
                })
                .sum()
        };
        let all = |param: &Param, size: i64, e: i64| -> Vec<Vec<f64>> {
            (0..n).map(|t| (0..size).map(|at| row(param, at, e, t)).collect()).collect()
        };
        (0..b)
            .map(|e| {
                let q = all(&kind.queries, n_heads * WIDTH, e);
                let (k, w) = (all(&kind.keys, WIDTH, e), all(&kind.weights, n_heads, e));
                let score = |t: usize, s: usize| -> f64 {
                    (0..n_heads as usize)
                        .map(|j| {
                            let of_head = &q[t][j * WIDTH as usize..(j + 1) * WIDTH as usize];
                            let dot: f64 = of_head.iter().zip(&k[s]).map(|(q, k)| q * k).sum();
                            w[t][j] * dot.max(0.0) / ((n_heads * WIDTH) as f64).sqrt()
                        })
                        .sum()
                };
                (0..n as usize).map(|t| (0..n as usize).map(|s| score(t, s)).collect()).collect()
            })
            .collect()
    }

    #[test]
    fn matches_the_definition() {
        for (n_index_heads, top_k) in [(1, 1), (2, 3), (3, 9)] {
            for n in [1, 7, 63] {
                for (causal, n_heads) in [(true, 4), (false, 4), (true, 3)] {
                    let mut probe = Probe::new(81, [2, n, n], n_heads, 2, causal);
                    if n_heads == 3 {
                        probe.dims.kv_of_head = vec![0, 1, 1];
                    }
                    let kind = indexed(&probe, n_index_heads, top_k);
                    let scores = naive_scores(&probe, &kind);
                    let mask = Mask::new(causal);
                    let input = probe.input(&mask);
                    let flat: Vec<f64> = scores.iter().flatten().flatten().copied().collect();
                    let flat = Tensor::from_slice(&flat).view([2, n, n]);
                    let name = format!("{top_k} of {n} keys, causal {causal}, {n_heads} heads");
                    assert_close(&name, &kind.index_scores(&input), &flat, 1e-12);

                    let (z, weights) = naive_attention_of(&probe, |b, _, i, j| {
                        let row = &scores[b as usize][i as usize];
                        let end = if causal { i + 1 } else { n };
                        // Its place among the visible keys; equal ones come in their order.
                        let before = (0..end).filter(|&other| {
                            let (mine, theirs) = (row[j as usize], row[other as usize]);
                            theirs > mine || (theirs == mine && other < j)
                        });
                        j < end && (before.count() as i64) < top_k
                    });
                    let rows: Vec<i64> = (0..n).collect();
                    assert_close(&name, &kind.forward(&input), &z, 1e-12);
                    assert_close(&name, &kind.weights(&input, &rows), &weights, 1e-12);
                    // Both ways to attend, whichever the sizes call for.
                    let chosen = kind.selection(&input).unwrap().chosen;
                    assert_close(&name, &kind.gathered(&input, &probe.q, &chosen), &z, 1e-12);
                }
            }
        }
    }

    #[test]
    fn all_keys_are_softmax() {
        for causal in [false, true] {
            let probe = Probe::new(82, [2, 63, 63], 4, 2, causal);
            let kind = indexed(&probe, 2, 63);
            let (z, _) = naive_attention(&probe, |i, j| !causal || j <= i);
            let mask = Mask::new(causal);
            assert_close("all keys", &kind.forward(&probe.input(&mask)), &z, 1e-12);
            let chosen = kind.selection(&probe.input(&mask)).unwrap().chosen;
            let imposed = AttnInput { selection: Some(&chosen), ..probe.input(&mask) };
            assert_close("all keys, imposed", &kind.forward(&imposed), &z, 1e-12);
        }
    }

    #[test]
    fn its_own_loss_is_the_divergence_from_dense_attention() {
        for (causal, n) in [(true, 9), (false, 9), (true, 1)] {
            let probe = Probe::new(84, [2, n, n], 4, 2, causal);
            let kind = indexed(&probe, 2, 3);
            let mask = partly_hidden(causal, 2, n);
            let input = probe.input(&mask);
            assert!(kind.own_loss(&input).is_none(), "nothing is trained");
            let mut own = Vec::new();
            kind.visit(&mut |_, tensor| own.push(tensor.set_requires_grad(true)));

            let scores = naive_scores(&probe, &kind);
            let allowed = mask.allowed(n, n, tch::Device::Cpu);
            let sees = |b: i64, i: i64, j: i64| {
                allowed.int64_value(&[b.min(allowed.size()[0] - 1), 0, i, j]) == 1
            };
            let (_, dense) = naive_attention_of(&probe, |b, _, i, j| sees(b, i, j));
            let (mut total, mut n_real) = (0.0, 0);
            for (b, i) in (0..2).flat_map(|b| (0..n).map(move |i| (b, i))) {
                if mask.keep().is_some_and(|keep| keep.int64_value(&[b, i]) == 0) {
                    continue;
                }
                n_real += 1;
                let row = &scores[b as usize][i as usize];
                let seen: Vec<i64> = (0..n).filter(|&j| sees(b, i, j)).collect();
                let normalizer: f64 = seen.iter().map(|&j| row[j as usize].exp()).sum();
                for &j in &seen {
                    let p: f64 =
                        (0..4).map(|head| dense.double_value(&[b, head, i, j]) / 4.0).sum();
                    total += p * (p.ln() - (row[j as usize].exp() / normalizer).ln());
                }
            }
            let loss = kind.own_loss(&input).unwrap();
            let expected = Tensor::from(total / f64::from(n_real));
            assert_close("own loss", &(&loss + 1.0), &(expected + 1.0), 1e-12);

            loss.backward();
            for tensor in &own {
                let direction = randn(5, &tensor.size());
                let promised = (tensor.grad() * &direction).sum(Kind::Double).double_value(&[]);
                let start = tensor.detach().copy();
                let at = |by: f64| {
                    tch::no_grad(|| tensor.shallow_clone().copy_(&(&start + &direction * by)));
                    kind.own_loss(&input).unwrap().double_value(&[])
                };
                let seen = (at(1e-6) - at(-1e-6)) / 2e-6;
                let _ = at(0.0);
                assert!((promised - seen).abs() < 1e-7, "{promised} promised, {seen} seen");
            }
        }
    }

    #[test]
    fn its_own_loss_teaches_the_indexer_what_dense_attention_reads() {
        let probe = Probe::new(85, [4, 24, 24], 1, 1, true);
        let kind = indexed(&probe, 2, 4);
        let mut own = Vec::new();
        kind.visit(&mut |_, tensor| own.push(tensor.set_requires_grad(true)));
        // Queries and keys that are functions of the hidden states, as a layer's are.
        let project = |seed: u64| {
            let weight = randn(seed, &[6, probe.dims.hidden_size]);
            probe.hidden.matmul(&weight.transpose(0, 1)).unsqueeze(1)
        };
        let (q, k) = (project(1), project(2));
        let mask = Mask::new(true);
        let input = AttnInput { q: &q, k: &k, ..probe.input(&mask) };
        let mass = || {
            // The share of the dense weights that falls on the keys chosen.
            let chosen = kind.selection(&input).unwrap().chosen.to_kind(Kind::Double);
            let dense = kind.softmax.weights(&input, &(0..24).collect::<Vec<_>>());
            (dense * chosen).sum(Kind::Double).double_value(&[]) / (4.0 * 24.0)
        };
        let (before, loss) = (mass(), kind.own_loss(&input).unwrap().double_value(&[]));
        for _ in 0..200 {
            kind.own_loss(&input).unwrap().backward();
            for tensor in &mut own {
                tch::no_grad(|| {
                    let step = tensor.grad() * 0.1;
                    let _ = tensor.g_sub_(&step);
                });
                tensor.zero_grad();
            }
        }
        let (after, learnt) = (mass(), kind.own_loss(&input).unwrap().double_value(&[]));
        assert!(learnt < 0.5 * loss, "{loss} before, {learnt} after");
        assert!(after > before + 0.1, "{before} of the weights chosen before, {after} after");
    }

    #[test]
    fn the_indexer_learns_and_leaves_the_hidden_states_alone() {
        let probe = Probe::new(83, [1, 12, 12], 2, 2, true);
        let kind = indexed(&probe, 2, 4);
        kind.visit(&mut |_, tensor| {
            let _ = tensor.set_requires_grad(true);
        });
        let hidden = probe.hidden.copy().set_requires_grad(true);
        let mask = Mask::new(true);
        let input = AttnInput { hidden: &hidden, ..probe.input(&mask) };
        kind.index_scores(&input).square().sum(Kind::Double).backward();
        assert!(!hidden.grad().defined());
        kind.visit(&mut |name, tensor| {
            assert!(tensor.grad().abs().max().double_value(&[]) > 0.0, "{name}");
        });
    }
}
