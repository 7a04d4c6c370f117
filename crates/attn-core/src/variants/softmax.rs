//! Softmax attention: every query weighs all keys it may see.
//!
//! ```text
//! z_i  = Σ_j softmax_j(s_ij) v_j
//! s_ij = scale · q_i·k_j
//! ```
//!
//! Vaswani et al. 2017, "Attention Is All You Need", <https://arxiv.org/abs/1706.03762>, section 3.2; with fewer
//! key/value heads than query heads: Shazeer 2019, <https://arxiv.org/abs/1911.02150> (one), and Ainslie et al. 2023,
//! <https://arxiv.org/abs/2305.13245> (groups). Runs LibTorch's fused kernel, and for single queries one that reads keys and
//! values once for a group ([`attn_torch::decode`]); the weights are made only on request.

use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::{
    Error,
    attention::{Attention, AttnInput, Dims, Holds, Nature, Own, Projections},
    mask::{Mask, to_bias},
    pairs,
};

/// Settings of [`Softmax`]: none.
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
        Ok(Box::new(Softmax { dims: dims.clone() }))
    }
}

/// Dense attention; multi-head, multi-query or grouped as the layer's heads are.
#[derive(Debug)]
pub struct Softmax {
    pub(super) dims: Dims,
}

impl Softmax {
    /// z of q, k and v as [`AttnInput`] has them.
    pub(super) fn mix(&self, [q, k, v]: [&Tensor; 3], mask: &Mask, dropout: f64) -> Tensor {
        let (q_len, k_len) = (q.size()[2], k.size()[2]);
        if q_len == 1
            && dropout == 0.0
            && self.dims.is_evenly_grouped()
            && let Some(z) = attn_torch::decode(q, k, v, mask.keep(), self.dims.scale)
                .expect("queries, keys and mask are of one layer")
        {
            return z;
        }
        // The kernel's own triangle counts from the first key, so it serves only queries that begin with the keys;
        // a single query is the last one and sees every key.
        let triangle = mask.causal() && q_len == k_len;
        let is_plain = mask.is_plain() && (triangle || !mask.causal() || q_len == 1);
        let bias = (!is_plain).then(|| mask.bias(q_len, k_len, (q.kind(), q.device())));

        let grouped = self.dims.n_kv_heads != self.dims.n_heads && self.dims.is_evenly_grouped();
        if grouped && q_len == 1 {
            // The heads of a group are queries of one head: LibTorch's kernel would read the keys once for each of them.
            let shape = q.size();
            let group = self.dims.n_heads / self.dims.n_kv_heads;
            let q = q.reshape([shape[0], self.dims.n_kv_heads, group, shape[3]]);
            let scale = self.dims.scale;
            let z =
                Tensor::scaled_dot_product_attention(&q, k, v, bias, dropout, false, scale, false);
            return z.reshape(shape.as_slice());
        }
        let [k, v] = if grouped {
            [k, v].map(Tensor::shallow_clone)
        } else {
            [k, v].map(|x| self.dims.expand_kv(x))
        };
        let scale = self.dims.scale;
        Tensor::scaled_dot_product_attention(
            q,
            &k,
            &v,
            bias,
            dropout,
            is_plain && triangle,
            scale,
            grouped,
        )
    }
}

impl Attention for Softmax {
    fn forward(&self, input: &AttnInput) -> Tensor {
        let AttnInput { q, k, v, mask, dropout, .. } = *input; // hidden states, positions, source: unused here
        self.mix([q, k, v], mask, dropout)
    }

    fn weights(&self, input: &AttnInput, rows: &[i64]) -> Tensor {
        let (q_len, k_len) = (input.q.size()[2], input.k.size()[2]);
        let q = input.q.index_select(2, &Tensor::from_slice(rows).to_device(input.q.device()));
        let k = self.dims.expand_kv(input.k);
        let allowed = input.mask.allowed_rows(rows, q_len, k_len, q.device());
        let scores = q.matmul(&k.transpose(-2, -1)) * self.dims.scale + to_bias(&allowed, q.kind()); // [b, h, rows, k]
        scores.softmax(-1, q.kind())
    }

    /// 4 · head_dim · n_heads · pairs that the mask shows.
    fn flops(&self, n_tokens: i64) -> i64 {
        pairs::weighing(&self.dims, pairs::n_seen(n_tokens, self.dims.causal))
    }

    /// The fused kernel holds a sum for each query, and a mask of padding; with dropout every weight is made.
    fn held(&self, dims: &Dims, pass: Holds) -> i64 {
        dims.n_heads * pass.n_tokens + pass.dropped_pairs(dims) + pass.masked_pairs()
    }

    fn nature(&self) -> Nature {
        Nature { reach: 0, chooses: false, reads_coordinates: false, has_own_slopes: false }
    }

    super::follows_dims!();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        mask::Mask,
        testing::{Probe, assert_close, naive_attention},
    };

    #[test]
    fn matches_the_definition() {
        for (n_heads, n_kv_heads) in [(2, 2), (4, 2), (3, 1)] {
            for (q_len, k_len) in [(1, 1), (7, 7), (63, 63), (1, 7), (3, 7)] {
                for causal in [false, true] {
                    let probe = Probe::new(11, [2, q_len, k_len], n_heads, n_kv_heads, causal);
                    let kind = Softmax { dims: probe.dims.clone() };
                    let mask = Mask::new(causal);
                    let (z, weights) = naive_attention(&probe, |i, j| {
                        !causal || j <= i + (k_len - q_len) as usize
                    });
                    let name =
                        format!("{n_heads}/{n_kv_heads} heads, {q_len}x{k_len}, causal {causal}");
                    assert_close(&name, &kind.forward(&probe.input(&mask)), &z, 1e-12);
                    let rows: Vec<i64> = (0..q_len).collect();
                    assert_close(&name, &kind.weights(&probe.input(&mask), &rows), &weights, 1e-12);
                }
            }
        }
    }

    /// As decoding asks: the heads of a group go through the kernel as queries of one head.
    #[test]
    fn single_queries_of_groups_see_what_is_not_hidden() {
        for (n_heads, n_kv_heads) in [(4, 2), (6, 2), (4, 1)] {
            let probe = Probe::new(13, [3, 1, 9], n_heads, n_kv_heads, true);
            let keep: Vec<i64> =
                (0..27).map(|at| i64::from(at % 9 >= at / 9 && at != 22)).collect();
            let mask = Mask::with_keep(true, &Tensor::from_slice(&keep).view([3, 9]));
            let kind = Softmax { dims: probe.dims.clone() };
            let input = probe.input(&mask);
            let weights = kind.weights(&input, &[0]);
            let z = weights.matmul(&probe.dims.expand_kv(input.v));
            assert_close("z", &kind.forward(&input), &z, 1e-12);
        }
    }

    /// In f32 and with heads wide enough single queries go through a kernel of our own.
    #[test]
    fn single_queries_in_f32_see_what_is_not_hidden() {
        let one = Tensor::ones([1, 1, 1, 32], (tch::Kind::Float, tch::Device::Cpu));
        if attn_torch::decode(&one, &one, &one, None, 1.0).unwrap().is_none() {
            let line = "SKIPPED single_queries_in_f32_see_what_is_not_hidden: no kernel for this processor\n";
            std::io::Write::write_all(&mut std::io::stderr(), line.as_bytes()).unwrap();
            return;
        }
        for (n_heads, n_kv_heads) in [(4, 4), (4, 2), (6, 2), (4, 1)] {
            for n in [9, 70] {
                let dims = Dims {
                    head_dim: 32,
                    scale: 32f64.powf(-0.5),
                    ..Probe::new(1, [1, 1, 1], n_heads, n_kv_heads, true).dims
                };
                let exact = Probe::with_dims(14, [3, 1, n], dims.clone());
                let probe = exact.to(tch::Kind::Float, tch::Device::Cpu);
                let keep: Vec<i64> = (0..3 * n).map(|at| i64::from(at % n >= at / n * 3)).collect();
                let keep = Tensor::from_slice(&keep).view([3, n]);
                for mask in [Mask::new(true), Mask::with_keep(true, &keep)] {
                    let kind = Softmax { dims: dims.clone() };
                    let input = exact.input(&mask);
                    let z = kind.weights(&input, &[0]).matmul(&dims.expand_kv(input.v));
                    let name = format!("{n_heads}/{n_kv_heads} heads, {n} keys");
                    assert_close(&name, &kind.forward(&probe.input(&mask)), &z, 1e-6);
                }
            }
        }
    }

    #[test]
    fn uneven_heads_read_their_own_keys() {
        let mut probe = Probe::new(12, [1, 5, 5], 3, 2, true);
        probe.dims.kv_of_head = vec![0, 1, 1]; // ⌊h·2/3⌋ would be 0, 0, 1
        let (z, _) = naive_attention(&probe, |i, j| j <= i);
        let kind = Softmax { dims: probe.dims.clone() };
        assert_close("uneven", &kind.forward(&probe.input(&Mask::new(true))), &z, 1e-12);
    }
}
