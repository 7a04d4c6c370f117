//! Native sparse attention: three branches, one over summaries of blocks, one over the blocks that those show to matter,
//! and one over the nearest keys, summed under gates.
//!
//! ```text
//! z_t = Σ_c g_t^c softmax(scale · q_t·K^c) V^c,   c: compressed, selected, window,   g_t = σ(W x_t + b)
//! K^compressed_i = φ(k_{id} … k_{id+l−1}),   V^compressed_i alike
//! p^sel[j] = Σ_{heads of the group} Σ_{m<l'/d} Σ_{n<l/d} p^cmp[(l'/d)·j + m − n],   zero-based, out of range dropped
//! K^selected: the tokens of the blocks of l' with the n largest p^sel
//! ```
//!
//! Yuan et al. 2025, "Native Sparse Attention", <https://arxiv.org/abs/2502.11089>, section 3. What differs, and what the
//! paper leaves open:
//!
//! * Equation 9 prints −m − n, by which block j would be scored by compressed blocks that lie before it; with +m − n they are
//!   those that share tokens with it.
//! * The paper trains from scratch and gives each branch keys and values of its own. Here they start from the pretrained
//!   ones: the compressed and the window branch add a linear map of the hidden states, zero at a swap, to the layer's keys and
//!   values (turned by their positions where the layer rotates), which is the same as a projection of their own that starts
//!   as the pretrained one. The selected branch reads the layer's.
//! * φ is the mean of the block plus a two-layer perceptron of the block's tokens, to each of which a vector of its place in
//!   the block is added and which are divided by √l; one for keys and one for values, the same for all heads. Its last matrix
//!   is zero at a swap.
//! * Gates are linear in the layer's input, one a branch and query head, and sum to 1 at a swap.
//! * A query before the end of the first compressed block sees none: the branch then gives 0, under its gate.
//! * The query's own block is the last of the `n_local`. In a bidirectional layer those behind it count too, and a query sees
//!   all compressed blocks that lie within the real tokens, and a window on both sides.
//! * Of equal scores the earlier block wins.
//!
//! [`weights`](Attention::weights) are the coefficients of the layer's v: what a compressed block gets is spread evenly over
//! its tokens, and what φ's perceptron and the branches' own maps add is left out.
//!
//! Memory grows with n; under attention dropout the compressed branch's mask takes n²/d numbers for all heads together. In
//! `f32` on the CPU kernels do the work (`stretches.rs`): of near scores they may choose another block than the plain form.

use std::{any::Any, num::NonZeroU32};

use attn_torch::{BlockChoice, BoxError, Forward, Function, Seen as Stretches};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::{softmax::Softmax, window::Window};
use crate::{
    Error,
    attention::{
        Attention, AttnInput, Dims, Holds, KvCache, Masks, Nature, Own, Param, Projections,
        Selection, State,
    },
    blocks::{self, ChosenBlocks, choose, chosen_keys, n_blocks, query_positions, wide},
    mask::{Mask, to_bias},
    nn::{self, Visitor},
    pairs,
    rotary::rotate,
    stretches,
    weights::Init,
};

/// Settings of [`Nsa`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Tokens that a compressed key stands for (l); at most `select_block`.
    pub compress_block: NonZeroU32,
    /// Tokens from one compressed key to the next (d); divides `compress_block` and `select_block`.
    pub compress_stride: NonZeroU32,
    /// Tokens in a block that is chosen or not (l').
    pub select_block: NonZeroU32,
    /// Blocks chosen (n), those that are always on among them.
    pub n_selected: NonZeroU32,
    /// Blocks at the start of the text that are always on.
    pub n_initial: u32,
    /// Blocks up to the query's own that are always on; in a bidirectional layer as many behind it too.
    pub n_local: NonZeroU32,
    /// Nearest keys of the window branch (w), the query's own among them; in a bidirectional layer on each side.
    pub window: NonZeroU32,
    /// The gates at a swap, of the compressed, the selected and the window branch; they sum to 1. The default leans on the
    /// branch that is nearest to dense attention: it has the first token, which many heads rest on, the nearest ones and the
    /// best of the others, all with their pretrained keys, while the window has the nearest alone and the means of blocks are
    /// no tokens at all. None is so small that it could not learn.
    pub gates: [f64; 3],
}

impl Default for Config {
    fn default() -> Self {
        // The paper's, section 4.1, but for the gates.
        Self {
            compress_block: const { NonZeroU32::new(32).unwrap() },
            compress_stride: const { NonZeroU32::new(16).unwrap() },
            select_block: const { NonZeroU32::new(64).unwrap() },
            n_selected: const { NonZeroU32::new(16).unwrap() },
            n_initial: 1,
            n_local: const { NonZeroU32::new(2).unwrap() },
            window: const { NonZeroU32::new(512).unwrap() },
            gates: [0.05, 0.8, 0.15],
        }
    }
}

impl Config {
    fn check(&self, dims: &Dims) -> Result<(), Error> {
        let refuse = |field, value: &dyn std::fmt::Debug, problem: String| {
            Err(Error::Setting { kind: "nsa", field, value: format!("{value:?}"), problem })
        };
        let [l, stride, block] =
            [self.compress_block, self.compress_stride, self.select_block].map(NonZeroU32::get);
        if !l.is_multiple_of(stride) || !block.is_multiple_of(stride) {
            let problem = format!(
                "expected a divisor of `compress_block`, {l}, and of `select_block`, {block}"
            );
            return refuse("compress_stride", &stride, problem);
        }
        if l > block {
            return refuse(
                "compress_block",
                &l,
                format!("expected at most `select_block`, {block}"),
            );
        }
        let local = u64::from(self.n_local.get());
        let around = if dims.causal { local } else { 2 * local - 1 };
        let fixed = around + u64::from(self.n_initial);
        if fixed > self.n_selected.get().into() {
            let problem = format!(
                "expected at least {fixed}, the blocks that are always on: {} initial and {around} local ones",
                self.n_initial
            );
            return refuse("n_selected", &self.n_selected.get(), problem);
        }
        let wanted = ("n_selected", self.n_selected.get());
        let what = format!("no more blocks of {block}");
        dims.check_choices("nsa", wanted, &what, |n| n_blocks(n, block.into()))?;
        let is_fit = self.gates.iter().all(|&gate| gate > 0.0 && gate < 1.0)
            && (self.gates.iter().sum::<f64>() - 1.0).abs() < 1e-6;
        if !is_fit {
            let problem = "expected three numbers between 0 and 1 that sum to 1".into();
            return refuse("gates", &self.gates, problem);
        }
        Ok(())
    }

    pub(super) fn build(
        &self,
        dims: &Dims,
        _: &Projections,
        own: &mut Own<'_, '_>,
    ) -> Result<Box<dyn Attention>, Error> {
        self.check(dims)?;
        let (d, hidden) = (dims.head_dim, dims.hidden_size);
        let l = i64::from(self.compress_block.get());
        let logits = Tensor::from_slice(&self.gates.map(|gate| (gate / (1.0 - gate)).ln()));
        let logits = logits.view([3, 1]).expand([3, dims.n_heads], false).contiguous();
        let mut summary = |of: &str| -> Result<Summary, Error> {
            Ok(Summary {
                place: own.get(&format!("{of}.place"), &[l, d], Init::Normal(0.02))?,
                inner: own.get(
                    &format!("{of}.inner.weight"),
                    &[d, l * d],
                    Init::Normal((d as f64).powf(-0.5)),
                )?,
                outer: own.get(&format!("{of}.outer.weight"), &[d, d], Init::Zeros)?,
            })
        };
        Ok(Box::new(Nsa {
            summaries: [summary("compress_k")?, summary("compress_v")?],
            gate_weight: own.get("gate.weight", &[3, dims.n_heads, hidden], Init::Zeros)?,
            gate_bias: own.get("gate.bias", &[3, dims.n_heads], Init::Value(logits))?,
            branch: own.get("branch.weight", &[4, dims.n_kv_heads, d, hidden], Init::Zeros)?,
            length: l,
            stride: self.compress_stride.get().into(),
            block: self.select_block.get().into(),
            n_selected: self.n_selected.get().into(),
            n_initial: self.n_initial.into(),
            n_local: self.n_local.get().into(),
            window: Window { size: self.window.get().into(), dims: dims.clone() },
            dims: dims.clone(),
        }))
    }
}

/// φ: a block of keys or values in one.
#[derive(Debug)]
struct Summary {
    /// Added to the tokens of a block, `[length, head_dim]`.
    place: Param,
    /// `[head_dim, length · head_dim]`
    inner: Param,
    /// `[head_dim, head_dim]`
    outer: Param,
}

impl Summary {
    /// `[b, n_kv_heads, n, head_dim] -> [b, n_kv_heads, n_compressed, head_dim]`, one every `stride` tokens.
    fn of(&self, x: &Tensor, stride: i64) -> Tensor {
        let [b, n_kv, n, d] = x.size()[..] else { unreachable!("keys and values have four axes") };
        let length = self.place.tensor.size()[0];
        if n < length {
            return x.narrow(2, 0, 0);
        }
        let blocks = x.unfold(2, length, stride).transpose(-2, -1); // [b, kv, c, length, d]
        let mean = blocks.mean_dim([3i64].as_slice(), false, wide(x.kind())).to_kind(x.kind());
        // Divided by √length, so that one learning rate suits blocks of any length.
        let placed = (blocks + &self.place.tensor) * (length as f64).powf(-0.5);
        let placed = placed.reshape([b, n_kv, -1, length * d]);
        let inner = nn::product(&placed, &self.inner.tensor, None).gelu("none");
        mean + nn::product(&inner, &self.outer.tensor, None)
    }

    fn params(&self) -> [&Param; 3] {
        [&self.place, &self.inner, &self.outer]
    }
}

/// Gated sum of attention to block summaries, to chosen blocks and to the nearest keys.
#[derive(Debug)]
pub struct Nsa {
    /// Of keys and of values.
    summaries: [Summary; 2],
    /// `[3, n_heads, hidden_size]` and `[3, n_heads]`: compressed, selected, window.
    gate_weight: Param,
    gate_bias: Param,
    /// What is added to the layer's keys and values, `[4, n_kv_heads, head_dim, hidden_size]`: compressed keys and values,
    /// window keys and values.
    branch: Param,
    length: i64,
    stride: i64,
    block: i64,
    n_selected: i64,
    n_initial: i64,
    n_local: i64,
    window: Window,
    dims: Dims,
}

/// Keys and values of one branch, `[b, n_kv_heads, len, head_dim]`.
struct Pair {
    k: Tensor,
    v: Tensor,
}

impl Nsa {
    /// `[b, q, hidden] -> [3, b, n_heads, q, 1]`
    fn gates(&self, hidden: &Tensor) -> Tensor {
        let [b, n, _] = hidden.size()[..] else { unreachable!("hidden states have three axes") };
        let weight = self.gate_weight.tensor.flatten(0, 1);
        let logits = nn::product(hidden, &weight, Some(&self.gate_bias.tensor.flatten(0, 1)));
        logits.sigmoid().view([b, n, 3, self.dims.n_heads, 1]).permute([2, 0, 3, 1, 4])
    }

    /// The tokens' keys and values of the compressed and the window branch.
    fn own_pairs(&self, input: &AttnInput) -> [Pair; 2] {
        let [b, n, _] = input.hidden.size()[..] else {
            unreachable!("hidden states have three axes")
        };
        let added = nn::product(input.hidden, &self.branch.tensor.flatten(0, 2), None);
        let added = added.view([b, n, 4, self.dims.n_kv_heads, self.dims.head_dim]);
        let added = added.permute([2, 0, 3, 1, 4]); // [4, b, kv, n, d]
        let turned = |x: Tensor| match input.rotary {
            Some(tables) => rotate(&x, tables),
            None => x,
        };
        [0, 2].map(|at| Pair { k: input.k + turned(added.get(at)), v: input.v + added.get(at + 1) })
    }

    fn summarize(&self, tokens: &Pair) -> Pair {
        let [of_keys, of_values] = &self.summaries;
        Pair { k: of_keys.of(&tokens.k, self.stride), v: of_values.of(&tokens.v, self.stride) }
    }

    /// How many compressed keys lie within the first `n_tokens`.
    fn n_compressed(&self, n_tokens: i64) -> i64 {
        if n_tokens < self.length { 0 } else { (n_tokens - self.length) / self.stride + 1 }
    }

    /// Whether queries at the positions `at` (`[rows]`) see each of the first `n` compressed keys: `[1 or b, 1, rows, n]`.
    fn sees(&self, mask: &Mask, at: &Tensor, n: i64) -> Tensor {
        sees([self.length, self.stride], mask, at, n)
    }

    /// The weights of compressed keys, in at least `f32`: `[b, n_heads, rows, n]`, zeros where a query sees none.
    fn compressed_weights(&self, q: &Tensor, k: &Tensor, sees: &Tensor) -> Tensor {
        weights_of(q, &self.dims.expand_kv(k), sees, self.dims.scale)
    }

    /// The compressed branch of queries at the positions `at`, of which the last is `last`: the keys that no query of a
    /// piece sees are left out.
    fn compressed(&self, input: &AttnInput, summaries: &Pair, at: &Tensor, k_len: i64) -> Tensor {
        let (q, mask) = (input.q, input.mask);
        let (b, q_len) = (q.size()[0], q.size()[2]);
        let total = summaries.k.size()[2];
        // Rotation under autocast leaves q and k wider than v.
        let [k, v] = [&summaries.k, &summaries.v].map(|x| self.dims.expand_kv(x).to_kind(q.kind()));
        let step = blocks::piece(q.device(), b * self.dims.n_heads * total);
        let pieces = (0..q_len).step_by(step as usize).map(|first| {
            let n_queries = step.min(q_len - first);
            let until = k_len - q_len + first + n_queries;
            let n = if mask.causal() { self.n_compressed(until).min(total) } else { total };
            Piece { first, n_queries, n }
        });
        if input.dropout == 0.0 && [q, &k, &v].iter().any(|x| x.requires_grad()) {
            let function = Summarized {
                pieces: pieces.collect(),
                blocks: [self.length, self.stride],
                at: at.shallow_clone(),
                mask: mask.clone(),
                scale: self.dims.scale,
            };
            return attn_torch::apply(function, &[q, &k, &v])
                .expect("shapes and kinds fit, and memory that runs out ends any operation so")
                .remove(0);
        }
        let pieces = pieces.map(|Piece { first, n_queries, n }| {
            let q = q.narrow(2, first, n_queries);
            if n == 0 {
                return q.zeros_like();
            }
            let sees = self.sees(mask, &at.narrow(0, first, n_queries), n);
            let z = Tensor::scaled_dot_product_attention(
                &q,
                &k.narrow(2, 0, n),
                &v.narrow(2, 0, n),
                Some(to_bias(&sees, q.kind())),
                input.dropout,
                false,
                self.dims.scale,
                false,
            );
            z * sees.any_dim(-1, true)
        });
        Tensor::cat(&pieces.collect::<Vec<_>>(), 2)
    }

    /// The scores of the blocks from the weights of compressed keys, `[b, n_heads, rows, n] -> [b, n_kv_heads, rows,
    /// n_blocks]`.
    fn importance(&self, weights: &Tensor, n_blocks: i64) -> Tensor {
        let [b, h, rows, n] = weights.size()[..] else { unreachable!("weights have four axes") };
        let n_kv = self.dims.n_kv_heads;
        let shared = if self.dims.is_evenly_grouped() {
            let grouped = weights.view([b, n_kv, h / n_kv, rows, n]);
            grouped.sum_dim_intlist([2i64].as_slice(), false, weights.kind())
        } else {
            let kv = Tensor::from_slice(&self.dims.kv_of_head).to_device(weights.device());
            let zeros = Tensor::zeros([b, n_kv, rows, n], (weights.kind(), weights.device()));
            zeros.index_add(1, &kv, weights)
        };
        // Σ_n p[i − n] for every i, then Σ_m over the block's own i.
        let (reach, per_block) = (self.length / self.stride, self.block / self.stride);
        let total = n_blocks * per_block;
        let padded = shared.constant_pad_nd([reach - 1, total - n]);
        let sums = (1..reach).fold(padded.narrow(3, reach - 1, total), |sum, back| {
            sum + padded.narrow(3, reach - 1 - back, total)
        });
        sums.reshape([b, n_kv, rows, n_blocks, per_block]).sum_dim_intlist(
            [-1i64].as_slice(),
            false,
            weights.kind(),
        )
    }

    /// The choices of the queries `q` (`[b, n_heads, rows, head_dim]`) at the positions `at` (`[rows]`), all before `until`.
    fn choices(&self, q: &Tensor, at: &Tensor, until: i64, seen: Seen) -> Selection {
        let Seen { summaries, mask, k_len } = seen;
        let total = summaries.size()[2];
        let n = if mask.causal() { self.n_compressed(until).min(total) } else { total };
        let n_blocks = n_blocks(k_len, self.block);
        let sees = self.sees(mask, at, n);
        let weights = self.compressed_weights(q, &summaries.narrow(2, 0, n), &sees);
        let scores = self.importance(&weights, n_blocks);

        let block = Tensor::arange(n_blocks, (Kind::Int64, q.device()));
        let own = at.divide_scalar_mode(self.block, "floor").unsqueeze(-1); // [rows, 1]
        let near = (&own - &block).abs().lt(self.n_local);
        let forced = near.logical_or(&block.lt(self.n_initial)).view([1, 1, -1, n_blocks]);
        let allowed = if mask.causal() {
            block.le_tensor(&own).view([1, 1, -1, n_blocks])
        } else if let Some(keep) = mask.keep() {
            let n_real = keep.sum_dim_intlist([1i64].as_slice(), true, Kind::Int64); // [b, 1]
            (block * self.block).lt_tensor(&n_real).view([-1, 1, 1, n_blocks])
        } else {
            block.ge(0).view([1, 1, 1, n_blocks])
        };
        choose(&scores, &allowed, &forced, self.n_selected)
    }

    /// Calls `gather` with how many scores a query has and a function that chooses for some of the queries.
    fn choose_with<T>(
        &self,
        q: &Tensor,
        seen: Seen,
        gather: impl FnOnce(i64, &dyn Fn(i64, i64) -> Selection) -> T,
    ) -> T {
        tch::no_grad(|| {
            let q_len = q.size()[2];
            let before = seen.k_len - q_len;
            let at = query_positions(q_len, seen.k_len, q.device());
            let n_scores = self.dims.n_heads * (seen.summaries.size()[2] + 1);
            gather(n_scores, &|first, n| {
                let (q, at) = (q.narrow(2, first, n), at.narrow(0, first, n));
                self.choices(&q, &at, before + first + n, seen)
            })
        })
    }

    /// Whether a text of `k_len` tokens has no block to leave out.
    fn takes_all(&self, k_len: i64) -> bool {
        n_blocks(k_len, self.block) <= self.n_selected
    }

    /// The choices of all queries as lists.
    fn choose_lists(&self, q: &Tensor, seen: Seen) -> Tensor {
        self.choose_with(q, seen, |n_scores, choose| {
            blocks::lists_in_pieces(q, n_scores, self.n_selected, choose)
        })
    }

    /// [`Self::compressed`] by a kernel where one serves, and by another the choices that the weights make, if any are to
    /// be made.
    fn compressed_by_kernel(
        &self,
        input: &AttnInput,
        summaries: &Pair,
    ) -> Option<(Tensor, Option<Tensor>)> {
        let q = input.q;
        let (q_len, k_len, n) = (q.size()[2], input.k.size()[2], summaries.k.size()[2]);
        if n == 0
            || !self.dims.is_evenly_grouped()
            || !stretches::serves(q, &self.dims, input.dropout)
        {
            return None;
        }
        let visible = input.mask.visible(q_len, k_len, q.device())?; // [1 or b, q]
        let hi = (&visible - self.length).divide_scalar_mode(self.stride, "floor") + 1;
        let hi = stretches::limits(&hi.clamp(0, n));
        let seen =
            Stretches { lo: hi.zeros_like(), hi: hi.shallow_clone(), first: 0, choices: None };
        let [z, lse] = stretches::attend(q, [&summaries.k, &summaries.v], seen, &self.dims);
        let to_choose = input.selection.is_none() && !self.takes_all(k_len);
        let chosen = to_choose.then(|| {
            let at = query_positions(q_len, k_len, q.device());
            let last = (visible - 1).clamp_min(0).divide_scalar_mode(self.block, "floor");
            let choice = BlockChoice {
                hi: &hi,
                lse: &lse,
                own: &at.divide_scalar_mode(self.block, "floor").to_kind(Kind::Int),
                end: &stretches::limits(&(last + 1)),
                scale: self.dims.scale,
                reach: self.length / self.stride,
                per_block: self.block / self.stride,
                n_blocks: n_blocks(k_len, self.block),
                n_initial: self.n_initial,
                n_local: self.n_local,
                n_chosen: self.n_selected,
            };
            attn_torch::choose_blocks(q, &summaries.k, &choice).expect("as for the attention")
        });
        Some((z, chosen))
    }

    /// The selected branch, of the blocks `chosen` if they are known. Where every block is chosen it is softmax attention.
    fn selected(&self, input: &AttnInput, summaries: &Tensor, chosen: Option<Tensor>) -> Tensor {
        let k_len = input.k.size()[2];
        let chosen = match (input.selection, chosen) {
            (Some(imposed), _) => blocks::lists(imposed, imposed.size()[3]),
            (None, Some(chosen)) => chosen,
            (None, None) if self.takes_all(k_len) => {
                return Softmax { dims: self.dims.clone() }.forward(input);
            }
            (None, None) => self.choose_lists(input.q, Seen { summaries, mask: input.mask, k_len }),
        };
        let blocks = ChosenBlocks {
            chosen: &chosen,
            by_head: false,
            block: self.block,
            mask: input.mask,
            dims: &self.dims,
            dropout: input.dropout,
        };
        blocks.attend(input.q, input.k, input.v).0
    }

    /// z, from the keys and values of each branch. `window_mask` is the mask of the window's, where they are fewer.
    fn mix(
        &self,
        input: &AttnInput,
        summaries: &Pair,
        window: &Pair,
        window_mask: &Mask,
    ) -> Tensor {
        let (q_len, k_len) = (input.q.size()[2], input.k.size()[2]);
        let (compressed, chosen) =
            self.compressed_by_kernel(input, summaries).unwrap_or_else(|| {
                let at = query_positions(q_len, k_len, input.q.device());
                (self.compressed(input, summaries, &at, k_len), None)
            });

        let selected = self.selected(input, &summaries.k, chosen);

        let window = AttnInput { k: &window.k, v: &window.v, mask: window_mask, ..*input };
        let window = self.window.forward(&window);

        let gates = self.gates(input.hidden);
        compressed * gates.get(0) + selected * gates.get(1) + window * gates.get(2)
    }
}

/// Whether queries at the positions `at` (`[rows]`) see each of the first `n` compressed keys, of `length` tokens one every
/// `stride`: `[1 or b, 1, rows, n]`.
fn sees([length, stride]: [i64; 2], mask: &Mask, at: &Tensor, n: i64) -> Tensor {
    let last = Tensor::arange(n, (Kind::Int64, at.device())) * stride + (length - 1);
    if mask.causal() {
        return last.le_tensor(&at.unsqueeze(-1)).view([1, 1, at.size()[0], n]);
    }
    match mask.keep() {
        Some(keep) => {
            let n_real = keep.sum_dim_intlist([1i64].as_slice(), true, Kind::Int64); // [b, 1]
            let inside = last.lt_tensor(&n_real).unsqueeze(1).unsqueeze(1); // [b, 1, 1, n]
            inside.expand([-1, 1, at.size()[0], n], true)
        }
        None => last.ge(0).view([1, 1, 1, n]).expand([1, 1, at.size()[0], n], true),
    }
}

/// The weights of compressed keys, of as many heads as queries: see [`Nsa::compressed_weights`].
fn weights_of(q: &Tensor, k: &Tensor, sees: &Tensor, scale: f64) -> Tensor {
    let kind = wide(q.kind());
    let mut scores = (q * scale).matmul(&k.transpose(-2, -1)).to_kind(kind);
    let weights = scores.g_add_(&to_bias(sees, kind)).softmax(-1, kind);
    weights * sees.any_dim(-1, true)
}

/// Queries that are taken together, and how many compressed keys the last of them sees.
struct Piece {
    first: i64,
    n_queries: i64,
    n: i64,
}

/// The compressed branch as one operation, which makes weights and masks again on the way back: kept, they would grow with
/// n². Inputs: queries, and compressed keys and values of as many heads.
struct Summarized {
    pieces: Vec<Piece>,
    /// Length and stride.
    blocks: [i64; 2],
    /// The queries' positions.
    at: Tensor,
    mask: Mask,
    scale: f64,
}

impl Summarized {
    /// The queries of a piece, the keys and values that they see, and their weights.
    fn of(&self, piece: &Piece, [q, k, v]: [&Tensor; 3]) -> ([Tensor; 3], Tensor) {
        let q = q.narrow(2, piece.first, piece.n_queries);
        let [k, v] = [k, v].map(|x| x.narrow(2, 0, piece.n));
        let at = self.at.narrow(0, piece.first, piece.n_queries);
        let weights = weights_of(&q, &k, &sees(self.blocks, &self.mask, &at, piece.n), self.scale);
        ([q, k, v], weights)
    }
}

impl Function for Summarized {
    fn forward(&self, inputs: &[Tensor]) -> Result<Forward, BoxError> {
        let [q, k, v] = inputs else { unreachable!("queries, keys and values") };
        let z = q.zeros_like();
        for piece in self.pieces.iter().filter(|piece| piece.n > 0) {
            let ([_, _, v], weights) = self.of(piece, [q, k, v]);
            let mixed = weights.to_kind(v.kind()).matmul(&v);
            z.narrow(2, piece.first, piece.n_queries).copy_(&mixed);
        }
        let saved = inputs.iter().map(Tensor::shallow_clone).collect();
        Ok(Forward { outputs: vec![z], saved })
    }

    fn backward(
        &self,
        saved: &[Tensor],
        grads: &[Tensor],
    ) -> Result<Vec<Option<Tensor>>, BoxError> {
        let [q, k, v] = saved else { unreachable!("queries, keys and values") };
        let kind = wide(q.kind());
        let [dq, dk, dv] = [q, k, v].map(|x| Tensor::zeros(x.size(), (kind, x.device())));
        for piece in self.pieces.iter().filter(|piece| piece.n > 0) {
            let ([q, k, v], weights) = self.of(piece, [q, k, v]);
            let grad = grads[0].narrow(2, piece.first, piece.n_queries);
            let narrow = weights.to_kind(q.kind());
            let _ = dv
                .narrow(2, 0, piece.n)
                .g_add_(&narrow.transpose(-2, -1).matmul(&grad).to_kind(kind));
            let pull = grad.matmul(&v.transpose(-2, -1)).to_kind(kind) * &weights;
            let own = pull.sum_dim_intlist([-1i64].as_slice(), true, kind);
            let pull = ((pull - weights * own) * self.scale).to_kind(q.kind());
            let _ =
                dq.narrow(2, piece.first, piece.n_queries).g_add_(&pull.matmul(&k).to_kind(kind));
            let _ =
                dk.narrow(2, 0, piece.n).g_add_(&pull.transpose(-2, -1).matmul(&q).to_kind(kind));
        }
        Ok([dq, dk, dv].into_iter().map(|x| Some(x.to_kind(q.kind()))).collect())
    }
}

/// What choices are made by.
#[derive(Clone, Copy)]
struct Seen<'a> {
    /// Compressed keys, `[b, n_kv_heads, n_compressed, head_dim]`.
    summaries: &'a Tensor,
    mask: &'a Mask,
    /// Tokens that there are.
    k_len: i64,
}

impl Attention for Nsa {
    fn forward(&self, input: &AttnInput) -> Tensor {
        let [compressed, window] = self.own_pairs(input);
        self.mix(input, &self.summarize(&compressed), &window, input.mask)
    }

    fn weights(&self, input: &AttnInput, rows: &[i64]) -> Tensor {
        let (q_len, k_len) = (input.q.size()[2], input.k.size()[2]);
        let device = input.q.device();
        let kind = input.q.kind();
        let [compressed, window] = self.own_pairs(input);
        let summaries = self.summarize(&compressed).k;
        let index = Tensor::from_slice(rows).to_device(device);
        let q = input.q.index_select(2, &index);
        let at = query_positions(q_len, k_len, device).index_select(0, &index);

        let n = summaries.size()[2];
        let by_summary = self.compressed_weights(&q, &summaries, &self.sees(input.mask, &at, n)); // [b, h, rows, n]
        let first = Tensor::arange(n, (Kind::Int64, device)).unsqueeze(-1) * self.stride;
        let from_first = Tensor::arange(k_len, (Kind::Int64, device)) - first; // [n, k]
        let covers = from_first.ge(0).logical_and(&from_first.lt(self.length));
        let share = covers.to_kind(by_summary.kind()) / self.length as f64;
        let compressed = by_summary.matmul(&share).to_kind(kind);

        let chosen = match input.selection {
            Some(chosen) => chosen.index_select(2, &index),
            None => {
                let seen = Seen { summaries: &summaries, mask: input.mask, k_len };
                tch::no_grad(|| self.choices(&q, &at, k_len, seen).chosen)
            }
        };
        let by_head = Tensor::from_slice(&self.dims.kv_of_head).to_device(device);
        let allowed = chosen_keys(&chosen.index_select(1, &by_head), self.block, k_len)
            .logical_and(&input.mask.allowed_rows(rows, q_len, k_len, device));
        let scores = q.matmul(&self.dims.expand_kv(input.k).transpose(-2, -1)) * self.dims.scale;
        let selected = (scores + to_bias(&allowed, kind)).softmax(-1, kind);

        let window = self.window.weights(&AttnInput { k: &window.k, v: &window.v, ..*input }, rows);
        let gates = self.gates(&input.hidden.index_select(1, &index));
        compressed * gates.get(0) + selected * gates.get(1) + window * gates.get(2)
    }

    /// 4 · head_dim · n_heads · pairs: with summaries, with the keys of chosen blocks, and within the window; 2 · hidden_size · (3 ·
    /// n_heads + 4 · n_kv_heads · head_dim) · n for gates and the branches' own keys and values; and for each summary 4 ·
    /// (compress_block + 1) · head_dim² · n_kv_heads. Choices are made of the summaries' weights, and cost no product more.
    fn flops(&self, n_tokens: i64) -> i64 {
        let Dims { n_heads, n_kv_heads, head_dim, causal, .. } = self.dims;
        let n_summaries = self.n_compressed(n_tokens);
        let n_summarized = match causal {
            true => (1..=n_tokens).map(|n| self.n_compressed(n)).sum(),
            false => n_tokens * n_summaries,
        };
        let n_selected = pairs::n_in_blocks(n_tokens, causal, self.block, self.n_selected);
        let n_near = self.window.band().n_pairs(n_tokens, causal);
        pairs::weighing(&self.dims, n_summarized + n_selected + n_near)
            + pairs::projecting(&self.dims, n_tokens, 3 * n_heads + 4 * n_kv_heads * head_dim)
            + 4 * (self.length + 1) * head_dim * head_dim * n_kv_heads * n_summaries
    }

    /// As three kinds: each branch makes its own weights where some are dropped.
    fn held(&self, dims: &Dims, pass: Holds) -> i64 {
        let channels = if pass.trains { 13 } else { 4 };
        channels * dims.n_heads * dims.head_dim * pass.n_tokens
            + 3 * pass.dropped_pairs(dims)
            + pass.masked_pairs()
    }

    fn nature(&self) -> Nature {
        let chosen = self.n_selected * self.block;
        Nature {
            reach: self.window.size.max(self.length).max(chosen),
            chooses: true,
            reads_coordinates: true,
            has_own_slopes: false,
        }
    }

    fn masks(&self) -> Masks {
        Masks::Contiguous // Blocks and distances count from the first real token.
    }

    fn selection(&self, input: &AttnInput) -> Option<Selection> {
        let [compressed, _] = self.own_pairs(input);
        let summaries = self.summarize(&compressed).k;
        let k_len = input.k.size()[2];
        let seen = Seen { summaries: &summaries, mask: input.mask, k_len };
        Some(self.choose_with(input.q, seen, |n_scores, choose| {
            blocks::in_pieces(input.q, n_scores, choose)
        }))
    }

    fn has_own_values(&self) -> bool {
        true
    }

    fn couples_heads(&self) -> bool {
        // Those of a group choose their blocks together.
        self.dims.n_heads > self.dims.n_kv_heads
    }

    fn start(&self) -> Box<dyn State> {
        Box::new(Decoding {
            tokens: KvCache::new(None),
            unsummarized: KvCache::new(Some(self.length - 1)),
            summaries: KvCache::new(None),
            window: KvCache::new(Some(self.window.size)),
        })
    }

    fn step(&self, input: &AttnInput, state: &mut dyn State) -> Tensor {
        let state: &mut Decoding = state
            .as_any_mut()
            .downcast_mut()
            .expect("a decoding state belongs to the kind that started it");
        let [compressed, window] = self.own_pairs(input);
        let (k, v) = state.tokens.append(input.k, input.v);
        let k_len = k.size()[2];

        // The blocks that the new tokens complete begin where the next summary's does.
        let first = state.summaries.n_tokens() * self.stride;
        let (pending_k, pending_v) = state.unsummarized.append(&compressed.k, &compressed.v);
        let n_pending = (k_len - first).max(0);
        let cut = |x: &Tensor| x.narrow(2, x.size()[2] - n_pending, n_pending);
        let new = self.summarize(&Pair { k: cut(&pending_k), v: cut(&pending_v) });
        let summaries = state.summaries.append(&new.k, &new.v);
        state.unsummarized.trim();

        let window = state.window.append(&window.k, &window.v);
        let window_mask = input.mask.tail(window.0.size()[2]);
        let z = self.mix(
            &AttnInput { k: &k, v: &v, ..*input },
            &Pair { k: summaries.0, v: summaries.1 },
            &Pair { k: window.0, v: window.1 },
            &window_mask,
        );
        state.window.trim();
        z
    }

    fn visit(&self, f: &mut Visitor<'_>) {
        let summaries = self.summaries.iter().flat_map(Summary::params);
        for param in summaries.chain([&self.gate_weight, &self.gate_bias, &self.branch]) {
            f(&param.name, &param.tensor);
        }
    }

    fn select_heads(&mut self, heads: &[i64], dims: &Dims) -> Result<(), Error> {
        self.branch.select(1, &self.dims.kv_heads_of(heads));
        self.gate_weight.select(1, heads);
        self.gate_bias.select(1, heads);
        self.dims = dims.clone();
        self.window.select_heads(heads, dims)
    }

    fn regroup_kv(&mut self, groups: &[Vec<i64>], dims: &Dims) -> Result<(), Error> {
        // As the layer's own projections: the mean over a group.
        let old = &self.branch.tensor;
        let merged = tch::no_grad(|| {
            let mean = |group: &Vec<i64>| {
                let members = Tensor::from_slice(group).to_device(old.device());
                old.index_select(1, &members).mean_dim([1i64].as_slice(), true, old.kind())
            };
            Tensor::cat(&groups.iter().map(mean).collect::<Vec<_>>(), 1)
        });
        self.branch.tensor = merged.set_requires_grad(old.requires_grad());
        self.dims = dims.clone();
        self.window.regroup_kv(groups, dims)
    }
}

/// What decoding keeps: all keys and values of the selected branch, the summaries, and of the other branches' own keys and
/// values those that are still to be read.
#[derive(Debug)]
struct Decoding {
    tokens: KvCache,
    unsummarized: KvCache,
    summaries: KvCache,
    window: KvCache,
}

impl State for Decoding {
    fn bytes(&self) -> usize {
        [&self.tokens, &self.unsummarized, &self.summaries, &self.window]
            .into_iter()
            .map(State::bytes)
            .sum()
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        attention::Projections,
        testing::{Probe, assert_close, naive_attention, randn},
        weights::Weights,
    };

    const SMALL: [(u32, u32, u32, u32, u32); 4] =
        [(4, 2, 8, 3, 5), (4, 4, 4, 4, 7), (6, 2, 6, 3, 4), (1, 1, 2, 3, 1)];

    fn small((l, stride, block, n_selected, window): (u32, u32, u32, u32, u32)) -> Config {
        let positive = |n| NonZeroU32::new(n).unwrap();
        Config {
            compress_block: positive(l),
            compress_stride: positive(stride),
            select_block: positive(block),
            n_selected: positive(n_selected),
            n_initial: 1,
            n_local: positive(1),
            window: positive(window),
            ..Config::default()
        }
    }

    /// The kind for a probe as it starts, or with its parameters drawn at random.
    fn nsa(config: &Config, probe: &Probe, is_random: bool) -> Nsa {
        let mut weights = Weights::from_seed(3, Kind::Double, tch::Device::Cpu);
        let nothing = || (Tensor::zeros([1], (Kind::Double, tch::Device::Cpu)), None);
        let projections = Projections { q: nothing(), k: nothing(), v: nothing() };
        let mut own = Own::new(&mut weights, "probe");
        let built = config.build(&probe.dims, &projections, &mut own).unwrap();
        drop(built); // The same parameters again, by name: the trait object hides the type.
        let param =
            |own: &mut Own, name: &str, size: &[i64], init| own.get(name, size, init).unwrap();
        let (d, hidden) = (probe.dims.head_dim, probe.dims.hidden_size);
        let l = i64::from(config.compress_block.get());
        let mut summary = |of: &str| Summary {
            place: param(&mut own, &format!("{of}.place"), &[l, d], Init::Normal(0.02)),
            inner: param(&mut own, &format!("{of}.inner.weight"), &[d, l * d], Init::Normal(0.1)),
            outer: param(&mut own, &format!("{of}.outer.weight"), &[d, d], Init::Zeros),
        };
        let summaries = [summary("compress_k"), summary("compress_v")];
        let logits = config.gates.map(|gate| (gate / (1.0 - gate)).ln());
        let logits = Tensor::from_slice(&logits).view([3, 1]).repeat([1, probe.dims.n_heads]);
        let heads = probe.dims.n_heads;
        let kind = Nsa {
            summaries,
            gate_weight: param(&mut own, "gate.weight", &[3, heads, hidden], Init::Zeros),
            gate_bias: param(&mut own, "gate.bias", &[3, heads], Init::Value(logits)),
            branch: param(
                &mut own,
                "branch.weight",
                &[4, probe.dims.n_kv_heads, d, hidden],
                Init::Zeros,
            ),
            length: l,
            stride: config.compress_stride.get().into(),
            block: config.select_block.get().into(),
            n_selected: config.n_selected.get().into(),
            n_initial: config.n_initial.into(),
            n_local: config.n_local.get().into(),
            window: Window { size: config.window.get().into(), dims: probe.dims.clone() },
            dims: probe.dims.clone(),
        };
        if is_random {
            kind.visit(&mut |name, tensor| {
                let value = randn(crate::weights::fnv1a(name), &tensor.size()) * 0.3;
                tensor.shallow_clone().copy_(&value);
            });
        }
        kind
    }

    /// Reads a tensor by index.
    struct Values(Vec<f64>, Vec<i64>);

    impl Values {
        fn of(x: &Tensor) -> Self {
            Self(Vec::try_from(x.contiguous().view([-1])).unwrap(), x.size())
        }

        fn at(&self, index: &[i64]) -> f64 {
            assert_eq!(index.len(), self.1.len());
            self.0[index.iter().zip(&self.1).fold(0, |at, (i, size)| at * size + i) as usize]
        }
    }

    fn softmax(scores: &[f64]) -> Vec<f64> {
        let total: f64 = scores.iter().map(|s| s.exp()).sum();
        scores.iter().map(|s| s.exp() / total).collect()
    }

    fn gelu(x: f64) -> f64 {
        Tensor::from(x).gelu("none").double_value(&[])
    }

    /// z, weights and choices (`[b][kv][t]`, a list of blocks each) from the definition, one query at a time.
    fn naive(probe: &Probe, kind: &Nsa, lengths: &[i64]) -> (Tensor, Tensor, Vec<Vec<i64>>) {
        let [b, h, n, d] = probe.q.size()[..] else { unreachable!() };
        let (n_kv, width) = (probe.dims.n_kv_heads, probe.dims.hidden_size);
        let [q, k, v, x] = [&probe.q, &probe.k, &probe.v, &probe.hidden].map(Values::of);
        let [branch, gate_weight, gate_bias] =
            [&kind.branch, &kind.gate_weight, &kind.gate_bias].map(|p| Values::of(&p.tensor));
        let (l, stride, block) = (kind.length, kind.stride, kind.block);
        let causal = probe.dims.causal;
        let (mut z, mut all_weights, mut all_choices) = (Vec::new(), Vec::new(), Vec::new());
        for e in 0..b {
            let length = lengths[e as usize];
            let branch_of = |of: &Values, part: i64, kv: i64, j: i64| -> Vec<f64> {
                (0..d)
                    .map(|c| {
                        let own: f64 = (0..width)
                            .map(|w| branch.at(&[part, kv, c, w]) * x.at(&[e, j, w]))
                            .sum();
                        of.at(&[e, kv, j, c]) + own
                    })
                    .collect()
            };
            let dot = |head: i64, t: i64, key: &[f64]| -> f64 {
                let product: f64 = (0..d).map(|c| q.at(&[e, head, t, c]) * key[c as usize]).sum();
                product * probe.dims.scale
            };
            // Compressed keys (part 0) and values (part 1).
            let n_compressed = (0..).take_while(|i| i * stride + l <= length).count() as i64;
            let compressed = |of: &Values, part: usize, kv: i64, i: i64| -> Vec<f64> {
                let summary = &kind.summaries[part];
                let [place, inner, outer] = summary.params().map(|p| Values::of(&p.tensor));
                let tokens: Vec<Vec<f64>> =
                    (0..l).map(|o| branch_of(of, part as i64, kv, i * stride + o)).collect();
                let hidden: Vec<f64> = (0..d)
                    .map(|u| {
                        gelu(
                            (0..l)
                                .flat_map(|o| (0..d).map(move |c| (o, c)))
                                .map(|(o, c)| {
                                    let token = tokens[o as usize][c as usize] + place.at(&[o, c]);
                                    inner.at(&[u, o * d + c]) * token / (l as f64).sqrt()
                                })
                                .sum(),
                        )
                    })
                    .collect();
                (0..d)
                    .map(|c| {
                        let mean = tokens.iter().map(|t| t[c as usize]).sum::<f64>() / l as f64;
                        mean + (0..d).map(|u| outer.at(&[c, u]) * hidden[u as usize]).sum::<f64>()
                    })
                    .collect()
            };
            let of_kv = |of: &Values, part| -> Vec<Vec<Vec<f64>>> {
                (0..n_kv)
                    .map(|kv| (0..n_compressed).map(|i| compressed(of, part, kv, i)).collect())
                    .collect()
            };
            let (ck, cv) = (of_kv(&k, 0), of_kv(&v, 1));
            let seen = |t: i64| {
                (0..n_compressed).filter(|i| !causal || i * stride + l - 1 <= t).count() as i64
            };
            let by_summary = |head: i64, t: i64| {
                let kv = probe.dims.kv_of_head[head as usize] as usize;
                softmax(
                    &(0..seen(t)).map(|i| dot(head, t, &ck[kv][i as usize])).collect::<Vec<_>>(),
                )
            };
            let choose = |kv: i64, t: i64| -> Vec<i64> {
                let heads = (0..h).filter(|&head| probe.dims.kv_of_head[head as usize] == kv);
                let weights: Vec<Vec<f64>> = heads.map(|head| by_summary(head, t)).collect();
                let own = t / block;
                let mut scored: Vec<(f64, i64)> = (0..)
                    .take_while(|j| j * block < length && (!causal || j * block <= t))
                    .map(|j| {
                        let is_on = j < kind.n_initial || (own - j).abs() < kind.n_local;
                        let mut score = if is_on { f64::INFINITY } else { 0.0 };
                        for m in 0..block / stride {
                            for o in 0..l / stride {
                                let i = block / stride * j + m - o;
                                if (0..seen(t)).contains(&i) {
                                    score += weights.iter().map(|w| w[i as usize]).sum::<f64>();
                                }
                            }
                        }
                        (score, j)
                    })
                    .collect();
                scored.sort_by(|a, b| b.0.total_cmp(&a.0)); // stable: the earlier of equal ones
                let mut chosen: Vec<i64> =
                    scored.into_iter().take(kind.n_selected as usize).map(|(_, j)| j).collect();
                chosen.sort_unstable();
                chosen
            };
            let choices: Vec<Vec<Vec<i64>>> =
                (0..n_kv).map(|kv| (0..n).map(|t| choose(kv, t)).collect()).collect();
            for head in 0..h {
                let kv = probe.dims.kv_of_head[head as usize];
                for t in 0..n {
                    let gate = |part: i64| {
                        let logit: f64 = (0..width)
                            .map(|w| gate_weight.at(&[part, head, w]) * x.at(&[e, t, w]))
                            .sum();
                        1.0 / (1.0 + (-logit - gate_bias.at(&[part, head])).exp())
                    };
                    let mut out = vec![0.0; d as usize];
                    let mut weights = vec![0.0; n as usize];
                    for (i, p) in by_summary(head, t).into_iter().enumerate() {
                        for c in 0..d as usize {
                            out[c] += gate(0) * p * cv[kv as usize][i][c];
                        }
                        for o in 0..l {
                            weights[(i as i64 * stride + o) as usize] += gate(0) * p / l as f64;
                        }
                    }
                    let chosen = &choices[kv as usize][t as usize];
                    for part in [1, 2] {
                        let is_seen = |j: &i64| {
                            *j < length
                                && (!causal || *j <= t)
                                && if part == 1 {
                                    chosen.contains(&(j / block))
                                } else {
                                    (t - j).abs() < kind.window.size
                                }
                        };
                        let own = |of: &Values, which: i64, j: i64| -> Vec<f64> {
                            if part == 1 {
                                (0..d).map(|c| of.at(&[e, kv, j, c])).collect()
                            } else {
                                branch_of(of, which, kv, j)
                            }
                        };
                        let keys: Vec<i64> = (0..n).filter(is_seen).collect();
                        let scores: Vec<f64> =
                            keys.iter().map(|&j| dot(head, t, &own(&k, 2, j))).collect();
                        for (&j, p) in keys.iter().zip(softmax(&scores)) {
                            let value = own(&v, 3, j);
                            (0..d as usize).for_each(|c| out[c] += gate(part) * p * value[c]);
                            weights[j as usize] += gate(part) * p;
                        }
                    }
                    z.extend(out);
                    all_weights.extend(weights);
                }
            }
            all_choices.extend(choices.into_iter().flatten());
        }
        (
            Tensor::from_slice(&z).view([b, h, n, d]),
            Tensor::from_slice(&all_weights).view([b, h, n, n]),
            all_choices,
        )
    }

    #[test]
    fn matches_the_definition() {
        for (at, sizes) in SMALL.into_iter().enumerate() {
            for n in [1, 7, 63] {
                for (causal, n_heads) in [(true, 4), (false, 4), (true, 2)] {
                    let probe = Probe::new(61 + at as u64, [2, n, n], n_heads, 2, causal);
                    let kind = nsa(&small(sizes), &probe, true);
                    // Padding matters where nothing hides it from real queries.
                    let lengths = [n, if causal { n } else { (n * 2 / 3).max(1) }];
                    let (z, weights, choices) = naive(&probe, &kind, &lengths);
                    let keep = Tensor::arange(n, (Kind::Int64, tch::Device::Cpu))
                        .lt_tensor(&Tensor::from_slice(&lengths).unsqueeze(-1));
                    let mask = Mask::with_keep(causal, &keep);
                    let input = probe.input(&mask);
                    let rows: Vec<i64> = (0..n).collect();
                    let own = [kind.forward(&input), kind.weights(&input, &rows)];
                    let name = format!("{sizes:?}, {n} tokens, causal {causal}");
                    for b in 0..2 {
                        let real = |x: &Tensor| x.get(b).narrow(1, 0, lengths[b as usize]);
                        assert_close(&name, &real(&own[0]), &real(&z), 1e-12);
                        assert_close(&name, &real(&own[1]), &real(&weights), 1e-12);
                    }
                    let chosen = kind.selection(&input).unwrap().chosen;
                    for (i, expected) in (0..).zip(choices) {
                        let (b, kv, t) = (i / (2 * n), i / n % 2, i % n);
                        if t < lengths[b as usize] {
                            let found = chosen.get(b).get(kv).get(t).nonzero().view([-1]);
                            assert_eq!(Vec::<i64>::try_from(found).unwrap(), expected, "{name}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn weights_are_the_coefficients_of_v_at_a_swap() {
        for sizes in SMALL {
            for causal in [true, false] {
                let probe = Probe::new(71, [2, 63, 63], 4, 2, causal);
                let kind = nsa(&small(sizes), &probe, false);
                let mask = Mask::new(causal);
                let input = probe.input(&mask);
                let weights = kind.weights(&input, &(0..63).collect::<Vec<_>>());
                let z = weights.matmul(&probe.dims.expand_kv(&probe.v));
                assert_close("weights", &z, &kind.forward(&input), 1e-12);
                if sizes.0 == 1 {
                    let total = weights.sum_dim_intlist([-1i64].as_slice(), false, Kind::Double);
                    assert_close("gates", &total, &total.ones_like(), 1e-12);
                }
            }
        }
    }

    #[test]
    fn blocks_are_scored_by_the_summaries_that_share_tokens_with_them() {
        for sizes in [(32, 16, 64, 16, 512), (4, 2, 8, 3, 5), (4, 4, 4, 4, 7), (6, 2, 6, 3, 4)] {
            let probe = Probe::new(72, [1, 1, 1], 1, 1, true);
            let kind = nsa(&small(sizes), &probe, false);
            let n_tokens = 5 * kind.block + 3;
            let n = kind.n_compressed(n_tokens);
            let one_each = Tensor::eye(n, (Kind::Double, tch::Device::Cpu)).view([1, 1, n, n]);
            let scores = kind.importance(&one_each, n_blocks(n_tokens, kind.block));
            for i in 0..n {
                for j in 0..scores.size()[3] {
                    let (first, last) = (i * kind.stride, i * kind.stride + kind.length - 1);
                    let shares = first < (j + 1) * kind.block && last >= j * kind.block;
                    assert_eq!(
                        scores.double_value(&[0, 0, i, j]) > 0.0,
                        shares,
                        "{sizes:?}: {i}, {j}"
                    );
                }
            }
        }
    }

    #[test]
    fn the_selected_branch_alone_with_all_blocks_is_softmax() {
        for (n_heads, causal) in [(4, true), (4, false), (2, true)] {
            let probe = Probe::new(73, [2, 63, 63], n_heads, 2, causal);
            let kind = nsa(&small((4, 2, 8, 8, 5)), &probe, true);
            let bias = Tensor::from_slice(&[-1e4, 1e4, -1e4]).view([3, 1]);
            kind.gate_bias.tensor.shallow_clone().copy_(&bias.expand([3, n_heads], false));
            let (z, weights) = naive_attention(&probe, |i, j| !causal || j <= i);
            let mask = Mask::new(causal);
            assert_close("z", &kind.forward(&probe.input(&mask)), &z, 1e-12);
            let chosen = kind.selection(&probe.input(&mask)).unwrap().chosen;
            let imposed = AttnInput { selection: Some(&chosen), ..probe.input(&mask) };
            assert_close("z, block by block", &kind.forward(&imposed), &z, 1e-12);
            let rows: Vec<i64> = (0..63).collect();
            assert_close("weights", &kind.weights(&probe.input(&mask), &rows), &weights, 1e-12);
        }
    }

    #[test]
    fn own_keys_are_turned_like_the_layers() {
        let probe = Probe::new(74, [2, 9, 9], 4, 2, true);
        let kind = nsa(&small(SMALL[0]), &probe, true);
        let rotary = crate::rotary::Rotary::new(6, 1e4, &crate::rotary::Scaling::None);
        let tables = rotary.tables(&probe.positions, Kind::Double);
        let mask = Mask::new(true);
        let turned = rotate(&probe.k, &tables);
        let plain = kind.own_pairs(&probe.input(&mask));
        let rotated =
            kind.own_pairs(&AttnInput { k: &turned, rotary: Some(&tables), ..probe.input(&mask) });
        for (plain, rotated) in plain.iter().zip(&rotated) {
            assert_close("keys", &rotated.k, &rotate(&plain.k, &tables), 1e-12);
            assert_close("values", &rotated.v, &plain.v, 1e-12);
        }
    }

    #[test]
    fn dropping_heads_drops_their_parameters() {
        let probe = Probe::new(75, [1, 30, 30], 4, 2, true);
        let mask = Mask::new(true);
        let mut kind = nsa(&small(SMALL[0]), &probe, true);
        let keep = [2i64, 3]; // all that read the second key/value head
        let whole = kind.forward(&probe.input(&mask)).narrow(1, 2, 2);
        let mut part = probe.select_heads(&keep);
        (part.k, part.v) = (part.k.narrow(1, 1, 1), part.v.narrow(1, 1, 1));
        (part.dims.n_kv_heads, part.dims.kv_of_head) = (1, vec![0, 0]);
        kind.select_heads(&keep, &part.dims).unwrap();
        assert_close("two of four heads", &kind.forward(&part.input(&mask)), &whole, 1e-12);
    }

    #[test]
    fn merged_heads_have_the_mean_of_their_maps() {
        let probe = Probe::new(76, [1, 5, 5], 4, 4, true);
        let mut kind = nsa(&small(SMALL[0]), &probe, true);
        let old = kind.branch.tensor.copy();
        let dims = Dims { n_kv_heads: 2, kv_of_head: vec![0, 1, 0, 1], ..probe.dims.clone() };
        kind.regroup_kv(&[vec![0, 2], vec![1, 3]], &dims).unwrap();
        let expected = (old.select(1, 1) + old.select(1, 3)) / 2.0;
        assert_close("merged", &kind.branch.tensor.select(1, 1), &expected, 1e-12);
    }

    #[test]
    fn settings_that_do_not_fit_are_refused() {
        let dims = Probe::new(77, [1, 1, 1], 1, 1, false).dims;
        let causal = Dims { causal: true, ..dims.clone() };
        let refused = |sizes, dims: &Dims| match small(sizes).check(dims) {
            Ok(()) => "nothing",
            Err(Error::Setting { field, .. }) => field,
            Err(other) => panic!("{other}"),
        };
        assert_eq!(refused((4, 3, 8, 3, 5), &dims), "compress_stride");
        assert_eq!(refused((8, 4, 4, 3, 5), &dims), "compress_block");
        assert_eq!(refused((4, 2, 8, 1, 5), &dims), "n_selected");
        assert_eq!(refused((4, 2, 8, 2, 5), &dims), "nothing");
        let local = NonZeroU32::new(2).unwrap();
        let wide = Config { n_local: local, ..small((4, 2, 8, 3, 5)) };
        assert!(wide.check(&causal).is_ok() && wide.check(&dims).is_err());
        for gates in [[0.5, 0.4, 0.2], [0.0, 0.5, 0.5], [f64::NAN, 0.5, 0.5]] {
            assert!(Config { gates, ..Config::default() }.check(&dims).is_err(), "{gates:?}");
        }
    }

    #[test]
    fn decoding_keeps_what_is_still_to_be_read() {
        let probe = Probe::new(78, [1, 40, 40], 2, 2, true);
        let kind = nsa(&small((4, 2, 8, 3, 5)), &probe, true);
        let mut state = kind.start();
        let mask = Mask::new(true);
        for at in 0..40 {
            let cut = |x: &Tensor, dim| x.narrow(dim, at, 1);
            let (hidden, q, k, v) =
                (cut(&probe.hidden, 1), cut(&probe.q, 2), cut(&probe.k, 2), cut(&probe.v, 2));
            let _ = kind.step(
                &AttnInput { hidden: &hidden, q: &q, k: &k, v: &v, ..probe.input(&mask) },
                state.as_mut(),
            );
        }
        let per_token = 2 * 2 * probe.dims.head_dim as usize * 8; // k and v, two heads, f64
        let state: &mut Decoding = state.as_any_mut().downcast_mut().unwrap();
        assert_eq!(state.window.bytes(), 5 * per_token);
        assert_eq!(state.unsummarized.bytes(), 3 * per_token);
        assert_eq!(state.summaries.n_tokens(), 19);
        assert_eq!(state.tokens.n_tokens(), 40);
    }

    #[test]
    fn kernels_find_what_f64_finds() {
        let config = small((4, 2, 8, 3, 5));
        for (n, causal, padded) in [(70, true, false), (131, true, true), (90, false, true)] {
            for n_kv in [4, 2] {
                let probe = Probe::new(35, [2, n, n], 4, n_kv, causal);
                let keep = Tensor::from_slice(&[n, if padded { n * 2 / 3 } else { n }]);
                let keep = keep.unsqueeze(-1).gt_tensor(&probe.positions);
                let mask = Mask::with_keep(causal, &keep);
                let variant = crate::Variant::Nsa(config.clone());
                let chosen = probe.build(&variant).selection(&probe.input(&mask)).unwrap().chosen;
                let pull = randn(36, &probe.q.size()) * keep.view([2, 1, n, 1]);
                // z of real queries, and the gradients of what they were made from.
                let run = |kind| {
                    let probe = probe.to(kind, tch::Device::Cpu);
                    let attention = probe.build(&variant);
                    let leaf = |x: &Tensor| x.detach().set_requires_grad(true);
                    let (q, k, v) = (leaf(&probe.q), leaf(&probe.k), leaf(&probe.v));
                    let hidden = leaf(&probe.hidden);
                    let input = AttnInput {
                        q: &q,
                        k: &k,
                        v: &v,
                        hidden: &hidden,
                        selection: Some(&chosen),
                        ..probe.input(&mask)
                    };
                    let z = attention.forward(&input);
                    (&z * pull.to_kind(kind)).sum(kind).backward();
                    [
                        z.detach() * keep.view([2, 1, n, 1]),
                        q.grad(),
                        k.grad(),
                        v.grad(),
                        hidden.grad(),
                    ]
                };
                let names = ["z", "dq", "dk", "dv", "dhidden"];
                for ((name, found), expected) in
                    names.iter().zip(run(Kind::Float)).zip(run(Kind::Double))
                {
                    let name = format!("{name} of {n} tokens, causal {causal}, {n_kv} key heads");
                    assert_close(&name, &found, &expected, 1e-5);
                }
                let own = probe.to(Kind::Float, tch::Device::Cpu);
                let attention = own.build(&variant);
                let imposed = AttnInput { selection: Some(&chosen), ..own.input(&mask) };
                let [chosen_by_kernel, imposed] =
                    [own.input(&mask), imposed].map(|input| attention.forward(&input));
                let differ =
                    (&chosen_by_kernel - &imposed).abs().amax([-1i64].as_slice(), false).gt(1e-4);
                let share = differ.to_kind(Kind::Double).mean(Kind::Double).double_value(&[]);
                assert!(share < 0.01, "{share} of the queries chose other blocks than f64");
            }
        }
    }
}
