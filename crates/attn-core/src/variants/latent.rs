//! Latent attention: what is kept of a token is one code, from which each head's keys and values are read.
//!
//! ```text
//! c_j = [k_1, v_1, .., k_m, v_m]_j       the layer's own key/value heads, as a cache keeps them: r = 2 · m · head_dim channels
//! K_hj = A_h c_j      V_hj = B_h c_j + β_h      z_i = Σ_j softmax_j(scale · q_i·K_hj) V_hj
//!
//! a single query     q' = A_hᵀ q      z = B_h Σ_j softmax_j(scale · q'·c_j) c_j + β_h
//! ```
//!
//! Multi-head latent attention: DeepSeek-AI 2024, "DeepSeek-V2", <https://arxiv.org/abs/2405.04434>, section 2.1.2, equations 9 to 11; the
//! second line is how it is decoded there, A and B taken to the query's side, so that keys and values are never made. A layer starts out
//! reading its own heads, and computes what it did; [`Merge::Latent`](crate::Merge) codes the heads of a pretrained layer.
//!
//! - Deviations: no latent of queries, which saves activations in training and nothing of the cache. β is what values have in common: it
//!   need not be coded. No keys apart for positions (section 2.1.3): where positions turn keys, the code holds turned keys.
//! - Costs: the full pass makes every head's keys and values from the code, 4 · r · head_dim · n_heads a token, and decoding weighs r
//!   channels a head where multi-head attention weighs head_dim.

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use super::softmax::Softmax;
use crate::{
    Error,
    attention::{Attention, AttnInput, Dims, KvCache, Nature, Own, Param, Projections, State},
    mask::Mask,
    nn::Visitor,
    weights::Init,
};

pub(crate) const KIND: &str = "latent";

/// Settings of [`Latent`]: none. The layer's key/value heads are the code.
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
        let shape = [dims.n_heads, dims.head_dim, width(dims)];
        let [of_keys, of_values] = own_heads(dims);
        let key = own.get("key", &shape, Init::Value(of_keys))?;
        let value = own.get("value", &shape, Init::Value(of_values))?;
        let value_bias = own.get("value_bias", &[dims.n_heads * dims.head_dim], Init::Zeros)?;
        let [heads, code] = [of_heads(dims), of_code(dims)].map(|dims| Softmax { dims });
        Ok(Box::new(Latent { dims: dims.clone(), key, value, value_bias, heads, code }))
    }
}

/// r: channels of the code.
fn width(dims: &Dims) -> i64 {
    2 * dims.n_kv_heads * dims.head_dim
}

/// The extents of attention over keys and values that each query head has for itself.
fn of_heads(dims: &Dims) -> Dims {
    let n = dims.n_heads;
    Dims { n_kv_heads: n, kv_of_head: (0..n).collect(), ..dims.clone() }
}

/// The extents of attention over the code, which all heads read.
fn of_code(dims: &Dims) -> Dims {
    let kv_of_head = vec![0; dims.n_heads as usize];
    Dims { n_kv_heads: 1, kv_of_head, head_dim: width(dims), ..dims.clone() }
}

/// A and B that read the key, and the value, of each query head's own key/value head: `[n_heads, head_dim, r]` each.
fn own_heads(dims: &Dims) -> [Tensor; 2] {
    let one = Tensor::eye(dims.head_dim, (Kind::Double, Device::Cpu));
    [0, 1].map(|side| {
        let options = (Kind::Double, Device::Cpu);
        let read = Tensor::zeros([dims.n_heads, dims.head_dim, width(dims)], options);
        for (head, &kv) in (0..).zip(&dims.kv_of_head) {
            let at = (2 * kv + side) * dims.head_dim;
            read.get(head).narrow(1, at, dims.head_dim).copy_(&one);
        }
        read
    })
}

/// Attention whose heads read one code.
#[derive(Debug)]
pub struct Latent {
    dims: Dims,
    /// A: `[n_heads, head_dim, r]`.
    key: Param,
    /// B: `[n_heads, head_dim, r]`.
    value: Param,
    /// β: `[n_heads · head_dim]`.
    value_bias: Param,
    /// Over the heads that are read from the code.
    heads: Softmax,
    /// Over the code itself, one key/value head of r channels.
    code: Softmax,
}

impl Latent {
    fn follow(&mut self, dims: &Dims) {
        let [heads, code] = [of_heads(dims), of_code(dims)].map(|dims| Softmax { dims });
        (self.dims, self.heads, self.code) = (dims.clone(), heads, code);
    }

    /// The keys and the values of all heads, `[batch, n_heads, k_len, head_dim]` each, of a code `[batch, 1, k_len, r]`.
    fn read(&self, code: &Tensor) -> [Tensor; 2] {
        let code = code.squeeze_dim(1);
        [(&self.key, None), (&self.value, Some(&self.value_bias.tensor))].map(|(from, bias)| {
            let all = code.linear(&from.tensor.flatten(0, 1), bias);
            all.unflatten(-1, [self.dims.n_heads, self.dims.head_dim]).transpose(1, 2)
        })
    }

    /// z of a code.
    fn mix(&self, q: &Tensor, code: &Tensor, mask: &Mask, dropout: f64) -> Tensor {
        if q.size()[2] == 1 && dropout == 0.0 {
            let q = by_head(q, &self.key.tensor); // [b, h, 1, r]
            let found = self.code.mix([&q, code, code], mask, 0.0);
            let bias = self.value_bias.tensor.view([-1, 1, self.dims.head_dim]);
            return by_head(&found, &self.value.tensor.transpose(1, 2)) + bias;
        }
        let [k, v] = self.read(code);
        self.heads.mix([q, &k, &v], mask, dropout)
    }
}

/// A row of each head by a matrix of its own: `[batch, heads, 1, a] × [heads, a, b] -> [batch, heads, 1, b]`. Head by head, as a product over
/// the batch would copy the matrices for every row.
fn by_head(x: &Tensor, matrices: &Tensor) -> Tensor {
    x.squeeze_dim(2).transpose(0, 1).bmm(matrices).transpose(0, 1).unsqueeze(2)
}

/// The code of the tokens that `input` brings: `[batch, 1, k_len, r]`.
fn code_of(input: &AttnInput) -> Tensor {
    let heads = Tensor::cat(&[input.k, input.v], -1); // [b, m, n, 2 · head_dim]
    heads.transpose(1, 2).flatten(2, 3).unsqueeze(1)
}

impl Attention for Latent {
    fn forward(&self, input: &AttnInput) -> Tensor {
        self.mix(input.q, &code_of(input), input.mask, input.dropout)
    }

    fn weights(&self, input: &AttnInput, rows: &[i64]) -> Tensor {
        let [k, v] = self.read(&code_of(input));
        self.heads.weights(&AttnInput { k: &k, v: &v, ..*input }, rows)
    }

    /// Softmax attention's, and 4 · r · head_dim · n_heads · n for what makes its keys and values.
    fn flops(&self, n_tokens: i64) -> i64 {
        let of_matrices = 4 * self.dims.n_heads * self.dims.head_dim * width(&self.dims) * n_tokens;
        self.heads.flops(n_tokens) + of_matrices
    }

    super::holds!(1, 6);

    fn nature(&self) -> Nature {
        Nature { reach: 0, chooses: false, reads_coordinates: true, has_own_slopes: false }
    }

    fn has_own_values(&self) -> bool {
        true // of keys as well
    }

    fn cache<'s>(&self, _: &'s mut dyn State) -> Option<&'s KvCache> {
        None // A code is kept, not keys.
    }

    fn step(&self, input: &AttnInput, state: &mut dyn State) -> Tensor {
        let new = code_of(input);
        let (code, _) = KvCache::of(state).append(&new, &new.narrow(3, 0, 0));
        self.mix(input.q, &code, &input.mask.tail(code.size()[2]), input.dropout)
    }

    fn full_heads(&self, own: &Projections) -> Option<[(Tensor, Option<Tensor>); 2]> {
        let Dims { n_kv_heads, head_dim, rotary, .. } = self.dims;
        if rotary || (own.v.1.is_none() && self.value_bias.tensor.any().int64_value(&[]) != 0) {
            return None;
        }
        let wide = |x: &Tensor| x.to_kind(Kind::Double);
        // Rows in the order of the code.
        let both = |k: &Tensor, v: &Tensor| {
            let by_head = [k, v].map(|x| wide(x).reshape([n_kv_heads, head_dim, -1]));
            Tensor::cat(&by_head, 1).flatten(0, 1) // [r, ..]
        };
        let weight = both(&own.k.0, &own.v.0);
        let bias = match (&own.k.1, &own.v.1) {
            (Some(k), Some(v)) => Some(both(k, v)),
            _ => None,
        };
        let kind = own.k.0.kind();
        let side = |from: &Param, added: Option<&Tensor>| {
            let from = wide(&from.tensor).flatten(0, 1);
            let bias = bias.as_ref().map(|bias| {
                let bias = from.matmul(bias).squeeze_dim(-1);
                added.map_or_else(|| bias.shallow_clone(), |added| &bias + wide(added))
            });
            (from.matmul(&weight).to_kind(kind), bias.map(|bias| bias.to_kind(kind)))
        };
        Some([side(&self.key, None), side(&self.value, Some(&self.value_bias.tensor))])
    }

    fn visit(&self, f: &mut Visitor<'_>) {
        for param in [&self.key, &self.value, &self.value_bias] {
            f(&param.name, &param.tensor);
        }
    }

    fn select_heads(&mut self, heads: &[i64], dims: &Dims) -> Result<(), Error> {
        let (d, old) = (dims.head_dim, &self.dims);
        let kept = match dims.n_kv_heads == old.n_kv_heads {
            true => Vec::from_iter(0..old.n_kv_heads),
            false => old.kv_heads_of(heads),
        };
        let channels = |is_kept: bool| -> Vec<i64> {
            (0..old.n_kv_heads)
                .filter(|kv| kept.contains(kv) == is_kept)
                .flat_map(|kv| 2 * kv * d..2 * (kv + 1) * d)
                .collect()
        };
        let (left, gone) = (channels(true), channels(false));
        let at = Tensor::from_slice(heads).to_device(self.key.tensor.device());
        for from in [&self.key, &self.value] {
            let of_gone = crate::nn::select(&from.tensor.index_select(0, &at), 2, &gone);
            if of_gone.count_nonzero(None::<i64>).int64_value(&[]) > 0 {
                return Err(Error::Refused {
                    kind: KIND,
                    what: "drop these heads",
                    reason: "the heads that are left read the whole code, and a part of it would go\nhint: remove heads first, then \
                             code the others (`attn convert --method latent`), or mask them"
                        .into(),
                });
            }
        }
        for from in [&mut self.key, &mut self.value] {
            from.select(0, heads);
            from.select(2, &left);
        }
        let rows: Vec<i64> = heads.iter().flat_map(|head| head * d..(head + 1) * d).collect();
        self.value_bias.select(0, &rows);
        self.follow(dims);
        Ok(())
    }

    fn regroup_kv(&mut self, groups: &[Vec<i64>], dims: &Dims) -> Result<(), Error> {
        let d = dims.head_dim;
        // Of several copies each is read in part.
        let n_copies = |head: &i64| groups.iter().filter(|group| group.contains(head)).count();
        for from in [&mut self.key, &mut self.value] {
            let old = from.tensor.detach();
            let of_head =
                |head: &i64| old.narrow(2, 2 * head * d, 2 * d) / n_copies(head).max(1) as f64;
            let of_group = |group: &Vec<i64>| {
                let all: Vec<Tensor> = group.iter().map(of_head).collect();
                Tensor::stack(&all, 0).sum_dim_intlist([0i64].as_slice(), false, None::<Kind>)
            };
            let new: Vec<Tensor> = groups.iter().map(of_group).collect();
            let trains = from.tensor.requires_grad();
            from.tensor = tch::no_grad(|| Tensor::cat(&new, 2)).set_requires_grad(trains);
        }
        self.follow(dims);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        testing::{Probe, assert_close, naive_attention, randn},
        weights::Weights,
    };

    /// The kind with numbers in every parameter.
    fn drawn(dims: &Dims) -> Latent {
        let shape = [dims.n_heads, dims.head_dim, width(dims)];
        let param = |name: &str, tensor| Param { name: name.into(), tensor };
        let [heads, code] = [of_heads(dims), of_code(dims)].map(|dims| Softmax { dims });
        Latent {
            dims: dims.clone(),
            key: param("key", randn(41, &shape) * 0.4),
            value: param("value", randn(42, &shape) * 0.4),
            value_bias: param("value_bias", randn(43, &[dims.n_heads * dims.head_dim])),
            heads,
            code,
        }
    }

    /// What each head reads, number by number, as keys and values of as many heads.
    fn by_hand(kind: &Latent, probe: &Probe) -> Probe {
        let Dims { n_heads, head_dim: d, n_kv_heads, .. } = probe.dims;
        let [b, _, n, _] = probe.k.size()[..] else { unreachable!() };
        let code = |row: i64, j: i64, channel: i64| {
            let (kv, at) = (channel / (2 * d), channel % (2 * d));
            let of = if at < d { &probe.k } else { &probe.v };
            of.double_value(&[row, kv, j, at % d])
        };
        let made = |from: &Tensor, bias: Option<&Tensor>| {
            let mut all = Vec::new();
            for (row, head) in (0..b).flat_map(|row| (0..n_heads).map(move |head| (row, head))) {
                for (j, c) in (0..n).flat_map(|j| (0..d).map(move |c| (j, c))) {
                    let of_code: f64 = (0..2 * n_kv_heads * d)
                        .map(|at| from.double_value(&[head, c, at]) * code(row, j, at))
                        .sum();
                    all.push(of_code + bias.map_or(0.0, |bias| bias.double_value(&[head * d + c])));
                }
            }
            Tensor::from_slice(&all).view([b, n_heads, n, d])
        };
        let k = made(&kind.key.tensor, None);
        let v = made(&kind.value.tensor, Some(&kind.value_bias.tensor));
        Probe { k, v, dims: of_heads(&probe.dims), ..probe.to(Kind::Double, Device::Cpu) }
    }

    #[test]
    fn matches_the_definition() {
        for (n_heads, n_kv_heads) in [(4, 2), (3, 1), (2, 2)] {
            for (q_len, k_len) in [(5, 5), (1, 6), (3, 6)] {
                let probe = Probe::new(61, [2, q_len, k_len], n_heads, n_kv_heads, true);
                let kind = drawn(&probe.dims);
                let sees = |i: usize, j: usize| j <= i + (k_len - q_len) as usize;
                let (z, weights) = naive_attention(&by_hand(&kind, &probe), sees);
                let mask = Mask::new(true);
                let input = probe.input(&mask);
                let name = format!("{n_heads}/{n_kv_heads} heads, {q_len} of {k_len}");
                assert_close(&name, &kind.forward(&input), &z, 1e-12);
                let rows: Vec<i64> = (0..q_len).collect();
                assert_close(&name, &kind.weights(&input, &rows), &weights, 1e-12);
            }
        }
    }

    #[test]
    fn a_new_layer_computes_what_it_did() {
        for (n_heads, n_kv_heads) in [(4, 2), (3, 1), (2, 2)] {
            let probe = Probe::new(62, [2, 7, 7], n_heads, n_kv_heads, true);
            let mask = Mask::new(true);
            let mut weights = Weights::from_seed(7, Kind::Double, Device::Cpu);
            let none = || (Tensor::zeros([0], (Kind::Double, Device::Cpu)), None);
            let unread = Projections { q: none(), k: none(), v: none() };
            let mut own = Own::new(&mut weights, "probe");
            let kind = Config {}.build(&probe.dims, &unread, &mut own).unwrap();
            let softmax = Softmax { dims: probe.dims.clone() };
            let expected = softmax.forward(&probe.input(&mask));
            assert_close("as it was", &kind.forward(&probe.input(&mask)), &expected, 1e-12);
        }
    }

    #[test]
    fn what_is_kept_of_a_token_is_its_code() {
        let probe = Probe::new(63, [2, 1, 1], 4, 2, true);
        let kind = drawn(&probe.dims);
        let mut state = kind.start();
        let mask = Mask::new(true);
        let _ = kind.step(&probe.input(&mask), state.as_mut());
        let numbers = 2 * 2 * 2 * probe.dims.head_dim as usize; // rows, sides, heads
        assert_eq!(state.bytes(), 8 * numbers);
        assert!(kind.cache(state.as_mut()).is_none());
    }

    #[test]
    fn heads_are_dropped_where_the_others_do_not_read_what_goes() {
        let probe = Probe::new(64, [2, 5, 5], 4, 2, true);
        let mask = Mask::new(true);
        for keep in [vec![3, 0], vec![1]] {
            let part = probe.select_heads(&keep);
            let mut kind = drawn(&probe.dims);
            let whole = kind.forward(&probe.input(&mask));
            let goes = part.dims.n_kv_heads < 2;
            match kind.select_heads(&keep, &part.dims) {
                Err(Error::Refused { kind: KIND, .. }) => {
                    assert!(goes);
                    assert_eq!(kind.forward(&probe.input(&mask)), whole, "unchanged");
                    // Unread, it goes.
                    for from in [&kind.key, &kind.value] {
                        let _ = from
                            .tensor
                            .narrow(2, 2 * probe.dims.head_dim, 2 * probe.dims.head_dim)
                            .fill_(0.0);
                    }
                    let whole = kind.forward(&probe.input(&mask));
                    kind.select_heads(&keep, &part.dims).unwrap();
                    let whole = whole.index_select(1, &Tensor::from_slice(&keep));
                    assert_close("cut", &kind.forward(&part.input(&mask)), &whole, 1e-12);
                }
                found => {
                    found.unwrap();
                    assert!(!goes);
                    let whole = whole.index_select(1, &Tensor::from_slice(&keep));
                    assert_close("kept", &kind.forward(&part.input(&mask)), &whole, 1e-12);
                }
            }
        }
    }

    /// Merged heads that are equal, and copies, change nothing of what is read.
    #[test]
    fn new_heads_are_read_as_the_old_ones_were() {
        let probe = Probe::new(65, [2, 5, 5], 4, 2, true);
        let mask = Mask::new(true);
        let copied = |x: &Tensor| x.index_select(1, &Tensor::from_slice(&[0i64, 0, 1, 1]));
        let wide = Dims { n_kv_heads: 4, kv_of_head: vec![0, 1, 2, 3], ..probe.dims.clone() };
        let four = Probe {
            k: copied(&probe.k),
            v: copied(&probe.v),
            dims: wide.clone(),
            ..probe.to(Kind::Double, Device::Cpu)
        };
        let mut kind = drawn(&probe.dims);
        let expected = kind.forward(&probe.input(&mask));
        kind.regroup_kv(&[vec![0], vec![0], vec![1], vec![1]], &wide).unwrap();
        assert_close("copies", &kind.forward(&four.input(&mask)), &expected, 1e-12);
        let mut kind = drawn(&wide);
        let expected = kind.forward(&four.input(&mask));
        kind.regroup_kv(&[vec![0, 1], vec![2, 3]], &probe.dims).unwrap();
        assert_close("equal heads", &kind.forward(&probe.input(&mask)), &expected, 1e-12);
    }
}
