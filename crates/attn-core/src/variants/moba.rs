//! Mixture of block attention: each query picks the blocks of keys whose mean key it likes best, and attends to them.
//!
//! ```text
//! z_i     = Σ_j softmax_j(scale · q_i·k_j  if block(j) is chosen by i, else -∞) v_j
//! score_b = q_i · mean_{j in b} k_j
//! ```
//!
//! Lu et al. 2025, "MoBA: Mixture of Block Attention for Long-Context LLMs", <https://arxiv.org/abs/2502.13189>, section
//! 2.2. Every query head chooses for itself. The query's own block is always chosen, causally, and is one of the `top_k`; of
//! the others a causal query has those that end before its own begins, so that no mean holds a key that it must not see.
//! The paper is about causal models; in a bidirectional layer every block is to be had, and means run over real tokens. Of
//! equal scores the earlier block wins. A text of at most `top_k` blocks is attended to as by softmax.

use std::num::NonZeroU32;

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::softmax::Softmax;
use crate::{
    Error,
    attention::{Attention, AttnInput, Dims, Masks, Nature, Own, Projections, Selection},
    blocks::{self, ChosenBlocks, choose, chosen_keys, n_blocks, query_positions, wide},
    mask::to_bias,
    pairs,
};

/// Settings of [`Moba`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Keys in a block.
    pub block: NonZeroU32,
    /// Blocks that a query attends to, its own among them.
    pub top_k: NonZeroU32,
}

impl Default for Config {
    fn default() -> Self {
        // The paper's, section 3.1.
        Self {
            block: const { NonZeroU32::new(512).unwrap() },
            top_k: const { NonZeroU32::new(3).unwrap() },
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
        let (block, top_k) = (self.block.get().into(), self.top_k.get().into());
        let (wanted, what) = (("top_k", self.top_k.get()), format!("no more blocks of {block}"));
        dims.check_choices("moba", wanted, &what, |n| n_blocks(n, block))?;
        Ok(Box::new(Moba { block, top_k, dims: dims.clone() }))
    }
}

/// Softmax over the keys of the best blocks.
#[derive(Debug)]
pub struct Moba {
    block: i64,
    top_k: i64,
    dims: Dims,
}

impl Moba {
    /// The mean key of every block, in at least `f32`: `[b, n_kv_heads, n_blocks, head_dim]`. The last block of a causal
    /// layer may be unfinished, and nobody chooses by it.
    fn means(&self, input: &AttnInput) -> Tensor {
        let [b, n_kv, k_len, d] = input.k.size()[..] else { unreachable!("keys have four axes") };
        let n_blocks = n_blocks(k_len, self.block);
        let kind = wide(input.k.kind());
        let padded = |x: Tensor| x.constant_pad_nd([0, 0, 0, n_blocks * self.block - k_len]);
        let sum = |x: Tensor, d: i64| {
            let x = padded(x).reshape([-1, n_blocks, self.block, d]);
            x.sum_dim_intlist([2i64].as_slice(), false, kind)
        };
        match input.mask.keep().filter(|_| !input.mask.is_plain()) {
            Some(keep) => {
                let keep = keep.view([b, 1, k_len, 1]).to_kind(kind);
                let count = sum(keep.shallow_clone(), 1).view([b, 1, n_blocks, 1]);
                let keys = (input.k.to_kind(kind) * keep).reshape([b * n_kv, 1, k_len, d]);
                sum(keys, d).reshape([b, n_kv, n_blocks, d]) / count.clamp_min(1.0)
            }
            None => {
                let first = Tensor::arange(n_blocks, (Kind::Int64, input.k.device())) * self.block;
                let count = (k_len - first).clamp_max(self.block).view([n_blocks, 1]);
                let keys = input.k.reshape([b * n_kv, 1, k_len, d]);
                sum(keys, d).reshape([b, n_kv, n_blocks, d]) / count
            }
        }
    }

    /// The choices of the queries `q` (`[b, n_heads, rows, head_dim]`) at the positions `at` (`[rows]`).
    fn choices(&self, input: &AttnInput, q: &Tensor, at: &Tensor, means: &Tensor) -> Selection {
        let (kind, device) = (means.kind(), means.device());
        let k_len = input.k.size()[2];
        let n_blocks = means.size()[2];
        let scores = q.to_kind(kind).matmul(&self.dims.expand_kv(means).transpose(-2, -1));
        let block = Tensor::arange(n_blocks, (Kind::Int64, device));
        let own = at.divide_scalar_mode(self.block, "floor").unsqueeze(-1);
        let forced = block.eq_tensor(&own).view([1, 1, -1, n_blocks]);
        let allowed = if input.mask.causal() {
            block.le_tensor(&own).view([1, 1, -1, n_blocks])
        } else if let Some(keep) = input.mask.keep() {
            let padded = keep.constant_pad_nd([0, n_blocks * self.block - k_len]);
            padded.view([-1, 1, 1, n_blocks, self.block]).any_dim(-1, false)
        } else {
            block.ge(0).view([1, 1, 1, n_blocks])
        };
        choose(&scores, &allowed, &forced, self.top_k)
    }

    /// Calls `gather` with how many scores a query has and a function that chooses for some of the queries.
    fn choose_with<T>(
        &self,
        input: &AttnInput,
        gather: impl FnOnce(i64, &dyn Fn(i64, i64) -> Selection) -> T,
    ) -> T {
        tch::no_grad(|| {
            let means = self.means(input);
            let at = query_positions(input.q.size()[2], input.k.size()[2], input.q.device());
            gather(self.dims.n_heads * means.size()[2], &|first, n| {
                self.choices(input, &input.q.narrow(2, first, n), &at.narrow(0, first, n), &means)
            })
        })
    }

    /// The choices of all queries, some queries after the others, as lists.
    fn chosen(&self, input: &AttnInput) -> Tensor {
        match input.selection {
            Some(chosen) => blocks::lists(chosen, chosen.size()[3]),
            None => self.choose_with(input, |n_scores, choose| {
                blocks::lists_in_pieces(input.q, n_scores, self.top_k, choose)
            }),
        }
    }
}

impl Attention for Moba {
    fn forward(&self, input: &AttnInput) -> Tensor {
        if input.selection.is_none() && n_blocks(input.k.size()[2], self.block) <= self.top_k {
            return Softmax { dims: self.dims.clone() }.forward(input);
        }
        let blocks = ChosenBlocks {
            chosen: &self.chosen(input),
            by_head: true,
            block: self.block,
            mask: input.mask,
            dims: &self.dims,
            dropout: input.dropout,
        };
        blocks.attend(input.q, input.k, input.v).0
    }

    fn weights(&self, input: &AttnInput, rows: &[i64]) -> Tensor {
        let (q_len, k_len) = (input.q.size()[2], input.k.size()[2]);
        let index = Tensor::from_slice(rows).to_device(input.q.device());
        let q = input.q.index_select(2, &index);
        let chosen = match input.selection {
            Some(chosen) => chosen.index_select(2, &index),
            None => {
                let at = query_positions(q_len, k_len, q.device()).index_select(0, &index);
                tch::no_grad(|| self.choices(input, &q, &at, &self.means(input)).chosen)
            }
        };
        let allowed = input
            .mask
            .allowed_rows(rows, q_len, k_len, q.device())
            .logical_and(&chosen_keys(&chosen, self.block, k_len));
        let scores = q.matmul(&self.dims.expand_kv(input.k).transpose(-2, -1)) * self.dims.scale;
        (scores + to_bias(&allowed, q.kind())).softmax(-1, q.kind())
    }

    /// 4 · head_dim · n_heads · pairs of a query with the keys of its blocks (`top_k`, fewer at the start), and where there are
    /// more 2 · head_dim · n_heads for each mean key that a query is held against: those of the blocks before its own, and in a
    /// bidirectional layer of those behind.
    fn flops(&self, n_tokens: i64) -> i64 {
        let Self { block, top_k, dims } = self;
        let n_blocks = n_blocks(n_tokens, *block);
        let n_compared = match (n_blocks <= *top_k, dims.causal) {
            (true, _) => 0,
            (false, true) => (0..n_tokens).map(|query| query / block).sum(),
            (false, false) => n_tokens * (n_blocks - 1),
        };
        pairs::weighing(dims, pairs::n_in_blocks(n_tokens, dims.causal, *block, *top_k))
            + 2 * dims.head_dim * dims.n_heads * n_compared
    }

    super::holds!(1, 1);

    fn nature(&self) -> Nature {
        Nature {
            reach: self.block * self.top_k,
            chooses: true,
            reads_coordinates: false,
            has_own_slopes: false,
        }
    }

    fn masks(&self) -> Masks {
        Masks::Contiguous // Blocks count from the first real token.
    }

    fn selection(&self, input: &AttnInput) -> Option<Selection> {
        Some(
            self.choose_with(input, |n_scores, choose| {
                blocks::in_pieces(input.q, n_scores, choose)
            }),
        )
    }

    super::follows_dims!();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        mask::Mask,
        testing::{Probe, assert_close, naive_attention, naive_attention_of},
    };

    /// The blocks of each query from the definition: `[b][h][i]`, a list each.
    fn naive_choices(probe: &Probe, kind: &Moba, lengths: [i64; 2]) -> Vec<Vec<Vec<Vec<i64>>>> {
        let [_, h, n, d] = probe.q.size()[..] else { unreachable!() };
        let choose = |b: i64, head: i64, i: i64| {
            let length = lengths[b as usize];
            let kv = probe.dims.kv_of_head[head as usize];
            let own = i / kind.block;
            let mut scored: Vec<(f64, i64)> = (0..)
                .take_while(|block| block * kind.block < length)
                .filter(|&block| block != own && (!probe.dims.causal || block < own))
                .map(|block| {
                    let keys = block * kind.block..((block + 1) * kind.block).min(length);
                    let count = (keys.end - keys.start) as f64;
                    let score = keys
                        .flat_map(|j| (0..d).map(move |c| (j, c)))
                        .map(|(j, c)| {
                            probe.q.double_value(&[b, head, i, c])
                                * probe.k.double_value(&[b, kv, j, c])
                        })
                        .sum::<f64>();
                    (score / count, block)
                })
                .collect();
            scored.sort_by(|a, b| b.0.total_cmp(&a.0));
            let others = scored.into_iter().map(|(_, block)| block).take(kind.top_k as usize - 1);
            std::iter::once(own).chain(others).collect::<Vec<_>>()
        };
        (0..2)
            .map(|b| (0..h).map(|head| (0..n).map(|i| choose(b, head, i)).collect()).collect())
            .collect()
    }

    #[test]
    fn matches_the_definition() {
        for (block, top_k) in [(1, 1), (4, 1), (4, 3), (5, 2)] {
            for n in [1, 7, 63] {
                for causal in [false, true] {
                    let probe = Probe::new(51, [2, n, n], 4, 2, causal);
                    let kind = Moba { block, top_k, dims: probe.dims.clone() };
                    let lengths = [n, if causal { n } else { (n * 2 / 3).max(1) }];
                    let choices = naive_choices(&probe, &kind, lengths);
                    let (z, weights) = naive_attention_of(&probe, |b, h, i, j| {
                        j < lengths[b as usize]
                            && (!causal || j <= i)
                            && choices[b as usize][h as usize][i as usize].contains(&(j / block))
                    });
                    let keep = Tensor::arange(n, (Kind::Int64, tch::Device::Cpu))
                        .lt_tensor(&Tensor::from_slice(&lengths).unsqueeze(-1));
                    let mask = Mask::with_keep(causal, &keep);
                    let name = format!("{top_k} blocks of {block}, {n} tokens, causal {causal}");
                    let rows: Vec<i64> = (0..n).collect();
                    let (own, own_weights) = (
                        kind.forward(&probe.input(&mask)),
                        kind.weights(&probe.input(&mask), &rows),
                    );
                    for b in 0..2 {
                        let real = |x: &Tensor| x.get(b).narrow(1, 0, lengths[b as usize]);
                        assert_close(&name, &real(&own), &real(&z), 1e-12);
                        assert_close(&name, &real(&own_weights), &real(&weights), 1e-12);
                    }
                }
            }
        }
    }

    #[test]
    fn all_blocks_are_softmax() {
        for causal in [false, true] {
            let probe = Probe::new(52, [2, 63, 63], 4, 2, causal);
            let kind = Moba { block: 4, top_k: 16, dims: probe.dims.clone() };
            let (z, _) = naive_attention(&probe, |i, j| !causal || j <= i);
            let mask = Mask::new(causal);
            assert_close("all blocks", &kind.forward(&probe.input(&mask)), &z, 1e-12);
            let chosen = kind.selection(&probe.input(&mask)).unwrap().chosen;
            let imposed = AttnInput { selection: Some(&chosen), ..probe.input(&mask) };
            assert_close("block by block", &kind.forward(&imposed), &z, 1e-12);
        }
    }
}
