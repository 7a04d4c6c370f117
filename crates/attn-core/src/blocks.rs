//! Attention to chosen blocks of keys, for kinds that choose: choices from scores, and the attention itself, at the
//! cost of what was chosen.
//!
//! ```text
//! z_i = Σ_j softmax_j(scale · q_i·k_j  if query i chose block ⌊j / block⌋ and may see j, else -∞) v_j
//! ```
//!
//! The pairs of query and chosen block are sorted by block and cut into tiles of equally many queries, each against one
//! block of keys: batched products do the rest, and the parts of a query are put together by their sums of exponentials
//! (Dao et al. 2022, "FlashAttention", <https://arxiv.org/abs/2205.14135>, section 3.1). The backward pass makes the
//! scores again, as there, so that memory grows with the number of pairs and not with that of scores.

use attn_torch::{BoxError, Choices, Forward, Function, Seen};
use tch::{Device, Kind, Tensor};

use crate::{
    attention::{Dims, Selection},
    mask::{Mask, hidden_score, to_bias},
    stretches::{self, FEW_QUERIES},
};

/// The scores of what is chosen in any case.
const FORCED: f64 = 1e30;
/// The scores of what must not be chosen.
const BARRED: f64 = -1e30;

/// The best `n` choices of each query, those in `forced` among them and those outside `allowed` never; of equal ones
/// the earlier. All are `[batch, groups, q_len, choices]`, with axes of 1 where they do not matter; `forced` lies within
/// `allowed`.
pub(crate) fn choose(scores: &Tensor, allowed: &Tensor, forced: &Tensor, n: i64) -> Selection {
    tch::no_grad(|| {
        let n_choices = scores.size()[3];
        let scores = scores.masked_fill(forced, FORCED).masked_fill(&allowed.logical_not(), BARRED);
        if n >= n_choices {
            let margin =
                Tensor::full(&scores.size()[..3], f64::INFINITY, (scores.kind(), scores.device()));
            return Selection { chosen: scores.gt(BARRED), margin };
        }
        let (best, _) = scores.topk(n + 1, -1, true, true);
        let (bar, next) = (best.narrow(-1, n - 1, 1), best.narrow(-1, n, 1));
        let above = scores.gt_tensor(&bar);
        let equal = scores.eq_tensor(&bar);
        let room = n - above.sum_dim_intlist([-1i64].as_slice(), true, Kind::Int64);
        let first = equal.logical_and(&equal.cumsum(-1, Kind::Int64).le_tensor(&room));
        let chosen = above.logical_or(&first).logical_and(&scores.gt(BARRED));
        // Where nothing was left out, or what is on in any case filled all places, there was no choice.
        let free = next.eq(BARRED).logical_or(&bar.eq(FORCED));
        let margin = (bar - next).masked_fill(&free, f64::INFINITY).squeeze_dim(-1);
        Selection { chosen, margin }
    })
}

/// The choices of all `q_len` queries of `q`, made by `choose(first query, how many)` piece by piece, so that no more than
/// a few million scores are held at once; `n_scores` is how many a query has.
pub(crate) fn in_pieces(
    q: &Tensor,
    n_scores: i64,
    choose: impl Fn(i64, i64) -> Selection,
) -> Selection {
    let (b, q_len) = (q.size()[0], q.size()[2]);
    let step = piece(q.device(), b * n_scores);
    let pieces: Vec<Selection> = (0..q_len)
        .step_by(step as usize)
        .map(|first| choose(first, step.min(q_len - first)))
        .collect();
    let join =
        |of: fn(&Selection) -> &Tensor| Tensor::cat(&pieces.iter().map(of).collect::<Vec<_>>(), 2);
    Selection { chosen: join(|piece| &piece.chosen), margin: join(|piece| &piece.margin) }
}

/// The choices of [`in_pieces`] as [`ChosenBlocks`] takes them.
pub(crate) fn lists_in_pieces(
    q: &Tensor,
    n_scores: i64,
    n_most: i64,
    choose: impl Fn(i64, i64) -> Selection,
) -> Tensor {
    let (b, q_len) = (q.size()[0], q.size()[2]);
    let step = piece(q.device(), b * n_scores);
    let pieces: Vec<Tensor> = (0..q_len)
        .step_by(step as usize)
        .map(|first| lists(&choose(first, step.min(q_len - first)).chosen, n_most))
        .collect();
    Tensor::cat(&pieces, 2)
}

/// What is `chosen` (bool, `[.., choices]`) as lists, at most `n_most` a query: int32, `[.., n]`, -1 where there are fewer.
pub(crate) fn lists(chosen: &Tensor, n_most: i64) -> Tensor {
    let n_most = n_most.min(chosen.size()[chosen.dim() - 1]);
    let (on, index) = chosen.to_kind(Kind::Int).topk(n_most, -1, true, true);
    index.masked_fill(&on.eq(0), -1).to_kind(Kind::Int)
}

/// How many queries to take at once where each has `n_scores` scores.
pub(crate) fn piece(device: Device, n_scores: i64) -> i64 {
    let at_once = if device == Device::Cpu { 1 << 18 } else { 1 << 26 };
    (at_once / n_scores.max(1)).max(64)
}

/// The kind that sums over positions run in.
pub(crate) fn wide(kind: Kind) -> Kind {
    if kind == Kind::Double { Kind::Double } else { Kind::Float }
}

/// Blocks of `block` keys in `k_len`, the last one perhaps cut short.
pub(crate) fn n_blocks(k_len: i64, block: i64) -> i64 {
    (k_len + block - 1) / block
}

/// The positions of the queries, counted like the keys: the queries are the last tokens.
pub(crate) fn query_positions(q_len: i64, k_len: i64, device: Device) -> Tensor {
    Tensor::arange_start(k_len - q_len, k_len, (Kind::Int64, device))
}

/// Which keys of their chosen blocks queries may see: `chosen` (`[batch, groups, q_len, n_blocks]`) by key, `[batch, groups,
/// q_len, k_len]`. For a few queries: this is as large as it looks.
pub(crate) fn chosen_keys(chosen: &Tensor, block: i64, k_len: i64) -> Tensor {
    let place = Tensor::arange(k_len, (Kind::Int64, chosen.device()));
    chosen.index_select(-1, &place.divide_scalar_mode(block, "floor"))
}

/// `z` (`[batch, n_heads, q_len, head_dim]`) and the logarithms of the sums of exponentials (`[batch, n_heads, q_len]`,
/// in at least `f32`, without gradient) of queries that attend to the blocks `chosen`: int32, `[batch, n_kv_heads or
/// n_heads, q_len, n]`, as `by_head` says, each block once and -1 for none. A query that chose nothing it may see has a
/// finite output.
pub(crate) struct ChosenBlocks<'a> {
    pub(crate) chosen: &'a Tensor,
    pub(crate) by_head: bool,
    /// Keys in a block.
    pub(crate) block: i64,
    pub(crate) mask: &'a Mask,
    pub(crate) dims: &'a Dims,
    pub(crate) dropout: f64,
}

impl ChosenBlocks<'_> {
    pub(crate) fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> (Tensor, Tensor) {
        // Under autocast rotation leaves q and k wider than v; the backward pass runs without autocast.
        let [k, v] = &[k, v].map(|x| x.to_kind(q.kind()));
        let h = self.dims.n_heads;
        // Query heads in the order of the key/value heads that they read, equally many of each.
        let mut order: Vec<i64> = (0..h).collect();
        order.sort_by_key(|&head| self.dims.kv_of_head[head as usize]);
        let count = |kv| self.dims.kv_of_head.iter().filter(|&&read| read == kv).count();
        let is_even = (0..self.dims.n_kv_heads).all(|kv| count(kv) == count(0));
        let take = |x: &Tensor, heads: &[i64]| {
            x.index_select(1, &Tensor::from_slice(heads).to_device(x.device()))
        };
        let run = |q: &Tensor, k: &Tensor, v: &Tensor, chosen: &Tensor| {
            if q.size()[2] <= FEW_QUERIES {
                self.few(q, k, v, chosen) // Tiles would be nearly empty.
            } else if let Some(both) = self.by_kernel(q, [k, v], chosen) {
                both
            } else {
                self.tiled(q, k, v, chosen)
            }
        };
        if !is_even {
            let each = &self.dims.kv_of_head;
            let chosen = if self.by_head { self.chosen } else { &take(self.chosen, each) };
            return run(q, &take(k, each), &take(v, each), chosen);
        }
        if order.is_sorted() {
            return run(q, k, v, self.chosen);
        }
        let chosen = if self.by_head { &take(self.chosen, &order) } else { self.chosen };
        let (z, lse) = run(&take(q, &order), k, v, chosen);
        let mut back = vec![0; order.len()];
        (0..).zip(&order).for_each(|(place, &head)| back[head as usize] = place);
        (take(&z, &back), take(&lse, &back))
    }

    /// Which keys are real, where that is not plain from the triangle.
    fn keep(&self) -> Option<&Tensor> {
        self.mask.keep().filter(|_| !self.mask.is_plain())
    }

    /// By [`stretches`], where it serves. Query heads are in the order of the key/value heads that they read.
    fn by_kernel(
        &self,
        q: &Tensor,
        [k, v]: [&Tensor; 2],
        chosen: &Tensor,
    ) -> Option<(Tensor, Tensor)> {
        if !stretches::serves(q, self.dims, self.dropout) {
            return None;
        }
        let hi = stretches::limits(&self.mask.visible(q.size()[2], k.size()[2], q.device())?);
        let choices = Some(Choices { chosen: chosen.shallow_clone(), block: self.block });
        let seen = Seen { lo: hi.zeros_like(), hi, first: 0, choices };
        let [z, lse] = stretches::attend_evenly(q, [k, v], seen, self.dims.scale);
        Some((z, lse * std::f64::consts::LN_2))
    }

    /// Each query against the keys of its own blocks, gathered.
    fn few(&self, q: &Tensor, k: &Tensor, v: &Tensor, chosen: &Tensor) -> (Tensor, Tensor) {
        let [b, h, q_len, d] = q.size()[..] else { unreachable!("queries have four axes") };
        let ([n_kv, k_len], groups) = ([k.size()[1], k.size()[2]], chosen.size()[1]);
        let device = q.device();
        let place = Tensor::arange(self.block, (Kind::Int64, device));
        let index = chosen.clamp_min(0).to_kind(Kind::Int64); // [b, g, q, n]
        let key = (index.unsqueeze(-1) * self.block + place).flatten(3, 4); // [b, g, q, keys]
        let n_keys = key.size()[3];
        let mut allowed = chosen
            .ge(0)
            .unsqueeze(-1)
            .expand([-1, -1, -1, -1, self.block], true)
            .reshape(key.size())
            .logical_and(&key.lt(k_len));
        if self.mask.causal() {
            let query = query_positions(q_len, k_len, device).unsqueeze(-1);
            allowed = allowed.logical_and(&key.le_tensor(&query));
        }
        let key = key.clamp(0, k_len - 1);
        if let Some(keep) = self.keep() {
            let keep = keep.view([b, 1, 1, k_len]).expand([b, groups, q_len, k_len], true);
            allowed = allowed.logical_and(&keep.gather(3, &key, false));
        }
        let gathered = |x: &Tensor| {
            let index = key.view([b, n_kv, -1, 1]).expand([-1, -1, -1, d], true);
            x.gather(2, &index, false).view([b, groups, q_len, n_keys, d])
        };
        let q = q.reshape([b, groups, h / groups, q_len, d]).transpose(2, 3); // [b, g, q, r, d]
        let scores =
            q.matmul(&gathered(k).transpose(-2, -1)).to_kind(wide(q.kind())) * self.dims.scale;
        let scores = scores + to_bias(&allowed, wide(q.kind())).unsqueeze(3); // [b, g, q, r, keys]
        let lse = scores.logsumexp([-1i64].as_slice(), false);
        let weights = scores.softmax(-1, wide(q.kind())).to_kind(q.kind());
        let z = weights.dropout(self.dropout, self.dropout > 0.0).matmul(&gathered(v));
        (
            z.transpose(2, 3).reshape([b, h, q_len, d]),
            lse.detach().transpose(2, 3).reshape([b, h, q_len]),
        )
    }

    fn tiled(&self, q: &Tensor, k: &Tensor, v: &Tensor, chosen: &Tensor) -> (Tensor, Tensor) {
        let [b, h, q_len, d] = q.size()[..] else { unreachable!("queries have four axes") };
        let (k_len, groups) = (k.size()[2], chosen.size()[1]);
        let n_blocks = n_blocks(k_len, self.block);
        let rows = |x: &Tensor| {
            let x = x.reshape([b * groups, h / groups, q_len, d]).transpose(1, 2);
            x.contiguous() // [b · g, q, r, d]
        };
        let padded = |x: &Tensor| {
            let x = x.constant_pad_nd([0, 0, 0, n_blocks * self.block - k_len]);
            x.reshape([-1, self.block, d]) // [b · kv · blocks, block, d]
        };
        let tiles = Tiles {
            chosen: chosen.reshape([b * groups, q_len, -1]),
            full: self.keep().map(|keep| {
                let keep = keep.constant_pad_nd([0, n_blocks * self.block - k_len]);
                keep.view([b, n_blocks, self.block]).all_dim(-1, false)
            }),
            keep: self.keep().map(|keep| {
                keep.constant_pad_nd([0, n_blocks * self.block - k_len]).view([-1, self.block])
            }),
            causal: self.mask.causal(),
            groups,
            n_kv: k.size()[1],
            k_len,
            block: self.block,
            scale: self.dims.scale,
            dropout: self.dropout,
        };
        let mut both = attn_torch::apply(tiles, &[&rows(q), &padded(k), &padded(v)])
            .expect("shapes and kinds fit, and memory that runs out ends any operation so");
        let lse = both.pop().expect("two outputs").detach();
        let z = both.pop().expect("two outputs");
        (z.transpose(1, 2).reshape([b, h, q_len, d]), lse.transpose(1, 2).reshape([b, h, q_len]))
    }
}

/// The attention of [`ChosenBlocks`] as one operation, with the mask and choices it runs under.
///
/// Inputs: queries `[rows, q_len, r, head_dim]`, where a row is an example and a group of r query heads that choose
/// together, keys and values `[batch · n_kv_heads · n_blocks, block, head_dim]`. Outputs: z like the queries, and the
/// logarithms of the sums of exponentials, `[rows, q_len, r]`.
struct Tiles {
    /// `[rows, q_len, n]`, int32, -1 for none.
    chosen: Tensor,
    /// Blocks whose keys are all real, `[batch, n_blocks]`, bool.
    full: Option<Tensor>,
    /// `[batch · n_blocks, block]`, bool.
    keep: Option<Tensor>,
    causal: bool,
    groups: i64,
    n_kv: i64,
    k_len: i64,
    block: i64,
    scale: f64,
    dropout: f64,
}

/// Some rows' pairs of query and block, in tiles.
struct Part {
    /// First row and how many.
    rows: (i64, i64),
    /// The query of each place, counted within the part's rows; rows · q_len where a tile is not full. `[tiles · tile]`
    query: Tensor,
    /// The block of keys of each tile, `[tiles]`, and the same block among those of the mask.
    key_block: Tensor,
    mask_block: Tensor,
    /// Tiles that need a mask; they come first.
    n_masked: i64,
    /// Queries in a tile.
    tile: i64,
}

/// Some tiles of a part, ready for products.
struct Chunk {
    /// `[tiles · tile]`
    query: Tensor,
    /// `[tiles]`
    key_block: Tensor,
    /// `[tiles, tile · r, d]`
    q: Tensor,
    /// `[tiles, block, d]`
    k: Tensor,
    v: Tensor,
    /// `[tiles, tile · r, block]`, scaled and hidden where need be, in the wide kind.
    scores: Tensor,
}

impl Tiles {
    /// Scores held at once. A processor's cache is to hold them; a GPU wants much at once.
    fn scores_at_once(device: Device) -> i64 {
        if device == Device::Cpu { 1 << 17 } else { 1 << 26 }
    }

    /// The rows in parts whose partial outputs fit in memory side by side.
    fn parts(&self, r: i64, d: i64) -> Vec<Part> {
        let [rows, ..] = self.chosen.size()[..] else { unreachable!("choices have three axes") };
        let n_pairs = self.chosen.ge(0).sum(Kind::Int64).int64_value(&[]);
        let at_once = if self.chosen.device() == Device::Cpu { 1 << 23 } else { 1 << 28 };
        let step = (at_once * rows / (n_pairs * r * d).max(1)).clamp(1, rows);
        (0..rows)
            .step_by(step as usize)
            .map(|first| self.part(first, step.min(rows - first), r))
            .collect()
    }

    fn part(&self, first: i64, n_rows: i64, r: i64) -> Part {
        let [_, q_len, n] = self.chosen.size()[..] else { unreachable!("choices have three axes") };
        let device = self.chosen.device();
        let tile = (64 / r).max(8);
        let n_blocks = n_blocks(self.k_len, self.block);
        let n_lists = n_rows * n_blocks;
        let options = (Kind::Int64, device);

        // A pair goes to the list of its row and block: to the first of two if the query may not see all of the block.
        // Most may, and need no mask. Places without a choice go behind all lists.
        let chosen = self.chosen.narrow(0, first, n_rows).to_kind(Kind::Int64);
        let row = Tensor::arange(n_rows, options).view([-1, 1, 1]);
        let list = self.sees_all(&chosen, first) * n_lists + row * n_blocks + &chosen;
        let list = list.masked_fill(&chosen.lt(0), 2 * n_lists).view([-1]);
        let n_pairs = chosen.ge(0).sum(Kind::Int64).int64_value(&[]);
        let (list, pair) = list.sort_stable(true, 0, false);
        let [list, pair] = [list, pair].map(|x| x.narrow(0, 0, n_pairs));
        let count = list.bincount(None::<Tensor>, 2 * n_lists);
        let n_tiles = (&count + (tile - 1)).divide_scalar_mode(tile, "floor");
        let end = n_tiles.cumsum(0, Kind::Int64);
        let [n_masked, total] = [n_lists - 1, 2 * n_lists - 1].map(|at| end.int64_value(&[at]));
        // Where a list's places begin, less where its pairs begin.
        let shift = (&end - &n_tiles) * tile - (count.cumsum(0, Kind::Int64) - &count);

        let place = Tensor::arange(n_pairs, options) + shift.index_select(0, &list);
        let row = pair.divide_scalar_mode(n, "floor"); // of the queries of all rows
        let query = Tensor::full([total * tile], n_rows * q_len, options).scatter(0, &place, &row);

        let list =
            Tensor::arange(2 * n_lists, options).repeat_interleave_self_tensor(&n_tiles, 0, total);
        let block = list.remainder(n_blocks);
        let row = list.remainder(n_lists).divide_scalar_mode(n_blocks, "floor") + first;
        let example = row.divide_scalar_mode(self.groups, "floor");
        let kv = row.remainder(self.groups).divide_scalar_mode(self.groups / self.n_kv, "floor");
        Part {
            rows: (first, n_rows),
            query,
            key_block: (&example * self.n_kv + kv) * n_blocks + &block,
            mask_block: if self.keep.is_some() { example * n_blocks + block } else { block },
            n_masked,
            tile,
        }
    }

    /// Whether queries may see every key of the blocks that they chose, for the rows from `first` on: as `chosen`, int64.
    fn sees_all(&self, chosen: &Tensor, first: i64) -> Tensor {
        let [n_rows, q_len, n] = chosen.size()[..] else { unreachable!("choices have three axes") };
        let end = (chosen + 1) * self.block;
        let mut whole = end.le(self.k_len);
        if self.causal {
            let position = query_positions(q_len, self.k_len, chosen.device());
            whole = whole.logical_and(&end.le_tensor(&(position + 1).unsqueeze(-1)));
        }
        if let Some(full) = &self.full {
            let row = Tensor::arange_start(first, first + n_rows, (Kind::Int64, chosen.device()));
            let full = full.index_select(0, &row.divide_scalar_mode(self.groups, "floor"));
            let full = full.gather(1, &chosen.clamp_min(0).view([n_rows, -1]), false);
            whole = whole.logical_and(&full.view([n_rows, q_len, n]));
        }
        whole.to_kind(Kind::Int64)
    }

    /// Queries (`[rows · q_len + 1, r · d]`, the last one zeros) of a part.
    fn of_part(x: &Tensor, part: &Part) -> Tensor {
        let (first, n_rows) = part.rows;
        let x = x.narrow(0, first, n_rows).flatten(0, 1).flatten(1, -1);
        Tensor::cat(&[&x, &Tensor::zeros([1, x.size()[1]], (x.kind(), x.device()))], 0)
    }

    /// Calls `f` with one chunk of tiles after the other.
    fn each_chunk(&self, part: &Part, inputs: [&Tensor; 3], r: i64, mut f: impl FnMut(Chunk)) {
        let [q, k, v] = inputs;
        let (total, d) = (part.key_block.size()[0], k.size()[2]);
        let most = (Self::scores_at_once(q.device()) / (part.tile * r * self.block)).max(1);
        let mut first = 0;
        while first < total {
            let is_masked = first < part.n_masked;
            let until = if is_masked { part.n_masked } else { total };
            let n = most.min(until - first);
            let query = part.query.narrow(0, first * part.tile, n * part.tile);
            let key_block = part.key_block.narrow(0, first, n);
            let q = q.index_select(0, &query).view([n, part.tile * r, d]);
            let [k, v] = [k, v].map(|x| x.index_select(0, &key_block));
            let mut scores = q.bmm(&k.transpose(1, 2)).to_kind(wide(q.kind()));
            let _ = scores.g_mul_scalar_(self.scale);
            if is_masked {
                let hidden = self.hidden(part, &query, first, n);
                let at = [n, part.tile, r, self.block];
                let _ = scores.view(at).masked_fill_(&hidden, hidden_score(scores.kind()));
            }
            f(Chunk { query, key_block, q, k, v, scores });
            first += n;
        }
    }

    /// What the queries of `n` tiles from `first` on must not see of their blocks: `[tiles, tile or 1, 1, block]`.
    fn hidden(&self, part: &Part, query: &Tensor, first: i64, n: i64) -> Tensor {
        let (q_len, n_blocks) = (self.chosen.size()[1], n_blocks(self.k_len, self.block));
        let mask_block = part.mask_block.narrow(0, first, n);
        let place = Tensor::arange(self.block, (Kind::Int64, query.device()));
        let start = mask_block.remainder(n_blocks) * self.block;
        let key = (start.unsqueeze(-1) + place).view([n, 1, 1, self.block]);
        let mut hidden = key.ge(self.k_len);
        if self.causal {
            let position = (query.remainder(q_len) + (self.k_len - q_len)).view([n, -1, 1, 1]);
            hidden = hidden.logical_or(&key.gt_tensor(&position));
        }
        if let Some(keep) = &self.keep {
            let keep = keep.index_select(0, &mask_block).view([n, 1, 1, self.block]);
            hidden = hidden.logical_or(&keep.logical_not());
        }
        hidden
    }
}

impl Function for Tiles {
    fn forward(&self, inputs: &[Tensor]) -> Result<Forward, BoxError> {
        let [q, k, v] = inputs else { unreachable!("queries, keys and values") };
        let [_, q_len, r, d] = q.size()[..] else { unreachable!("queries have four axes") };
        let options = (wide(q.kind()), q.device());
        let (mut z, mut lse, mut kept) = (Vec::new(), Vec::new(), Vec::new());
        for part in self.parts(r, d) {
            let n = part.rows.1 * q_len + 1;
            // The largest score of each query, over all of its tiles.
            let mut top = Tensor::full([n, r], hidden_score(options.0), options);
            let mut done = Vec::new();
            self.each_chunk(&part, [&Self::of_part(q, &part), k, v], r, |chunk| {
                let Chunk { query, v, mut scores, .. } = chunk;
                let best = scores.amax([-1i64].as_slice(), true);
                let _ = scores.g_sub_(&best).exp_();
                let total = scores.sum_dim_intlist([-1i64].as_slice(), false, options.0);
                if self.dropout > 0.0 {
                    let mut keep = scores.empty_like();
                    let _ = keep.bernoulli_float_(1.0 - self.dropout);
                    let _ = scores.g_mul_(&(&keep / (1.0 - self.dropout)));
                    kept.push(keep.to_kind(Kind::Bool));
                }
                let mixed = scores.to_kind(v.kind()).bmm(&v).view([-1, r, d]);
                let best = best.view([-1, r]);
                let index = query.unsqueeze(-1).expand([-1, r], true);
                let _ = top.internal_scatter_reduce_(0, &index, &best, "amax", true);
                done.push((query, best, total.view([-1, r]), mixed.to_kind(options.0)));
            });
            let mut sum = Tensor::zeros([n, r], options);
            let mut out = Tensor::zeros([n, r, d], options);
            for (query, best, total, mut mixed) in done {
                let share = (best - top.index_select(0, &query)).exp(); // [tiles · tile, r]
                let _ = mixed.g_mul_(&share.unsqueeze(-1));
                let _ = sum.index_add_(0, &query, &(total * share));
                let _ = out.index_add_(0, &query, &mixed);
            }
            let real = |x: &Tensor| {
                let mut size = x.size();
                size.splice(..1, [part.rows.1, q_len]);
                x.narrow(0, 0, n - 1).view(size.as_slice())
            };
            let sum = sum.clamp_min(f64::from(f32::MIN_POSITIVE)); // A query without keys has an output of 0.
            z.push(real(&(out / sum.unsqueeze(-1))).to_kind(q.kind()));
            lse.push(real(&(top + sum.log())));
        }
        let [z, lse] = [z, lse].map(|x| Tensor::cat(&x, 0));
        let mut saved = inputs.iter().map(Tensor::shallow_clone).collect::<Vec<_>>();
        saved.extend([z.shallow_clone(), lse.shallow_clone()]);
        saved.extend(kept);
        Ok(Forward { outputs: vec![z, lse], saved })
    }

    fn backward(
        &self,
        saved: &[Tensor],
        grads: &[Tensor],
    ) -> Result<Vec<Option<Tensor>>, BoxError> {
        let [q, k, v, z, lse, kept @ ..] = saved else { unreachable!("five tensors were saved") };
        let [_, q_len, r, d] = q.size()[..] else { unreachable!("queries have four axes") };
        let options = (wide(q.kind()), q.device());
        let [grad, z] = [&grads[0], z].map(|x| x.to_kind(options.0));
        let drift = (&grad * z).sum_dim_intlist([-1i64].as_slice(), false, options.0); // [rows, q, r]
        let mut kept = kept.iter();
        let mut grad_q = Vec::new();
        let [mut grad_k, mut grad_v] = [k, v].map(|x| Tensor::zeros(x.size(), options));
        for part in self.parts(r, d) {
            let n = part.rows.1 * q_len + 1;
            let of_part = |x: &Tensor| Self::of_part(x, &part);
            let (q, lse, drift) = (of_part(q), of_part(lse), of_part(&drift));
            let grad = of_part(&grads[0]);
            let mut grad_part = Tensor::zeros([n, r * d], options);
            self.each_chunk(&part, [&q, k, v], r, |chunk| {
                let Chunk { query, key_block, q, k, v, mut scores } = chunk;
                let rows = [key_block.size()[0], part.tile * r, -1];
                let at = |x: &Tensor| x.index_select(0, &query).view(rows);
                let (grad, narrow) = (at(&grad), q.kind());
                let _ = scores.g_sub_(&at(&lse)).exp_(); // the weights
                let mut pull = grad.bmm(&v.transpose(1, 2)).to_kind(options.0);
                let used = if self.dropout > 0.0 {
                    let keep = kept.next().expect("a mask of dropout a chunk").to_kind(options.0);
                    let keep = keep / (1.0 - self.dropout);
                    let _ = pull.g_mul_(&keep);
                    &scores * keep
                } else {
                    scores.shallow_clone()
                };
                let to_v = used.to_kind(narrow).transpose(1, 2).bmm(&grad);
                let _ = grad_v.index_add_(0, &key_block, &to_v.to_kind(options.0));
                let _ = pull.g_sub_(&at(&drift)).g_mul_(&scores).g_mul_scalar_(self.scale);
                let pull = pull.to_kind(narrow);
                let to_q = pull.bmm(&k).to_kind(options.0).view([-1, r * d]);
                let _ = grad_part.index_add_(0, &query, &to_q);
                let to_k = pull.transpose(1, 2).bmm(&q).to_kind(options.0);
                let _ = grad_k.index_add_(0, &key_block, &to_k);
            });
            grad_q.push(grad_part.narrow(0, 0, n - 1).view([part.rows.1, q_len, r, d]));
        }
        let grads = [Tensor::cat(&grad_q, 0), grad_k, grad_v];
        Ok(grads.into_iter().map(|x| Some(x.to_kind(q.kind()))).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Probe, assert_close, naive_attention_of, randn};

    /// Random choices, each query's own block among them.
    fn random_choices(seed: u64, size: [i64; 4], block: i64, k_len: i64) -> Tensor {
        let own = query_positions(size[2], k_len, Device::Cpu).divide_scalar_mode(block, "floor");
        let block = Tensor::arange(size[3], (Kind::Int64, Device::Cpu));
        let own = own.unsqueeze(-1).eq_tensor(&block);
        randn(seed, &size).gt(0.3).logical_or(&own)
    }

    #[test]
    fn matches_the_definition() {
        for (n_heads, n_kv, kv_of_head) in [
            (2, 2, vec![0, 1]),
            (4, 2, vec![0, 0, 1, 1]),
            (4, 2, vec![0, 1, 0, 1]),
            (3, 2, vec![0, 1, 1]),
        ] {
            for (q_len, k_len) in [(1, 1), (1, 7), (7, 7), (63, 63), (12, 70), (80, 80)] {
                for (causal, by_head, padded) in [
                    (true, true, false),
                    (true, false, false),
                    (false, true, true),
                    (false, false, true),
                ] {
                    let block = 8;
                    let mut probe = Probe::new(41, [2, q_len, k_len], n_heads, n_kv, causal);
                    probe.dims.kv_of_head.clone_from(&kv_of_head);
                    let groups = if by_head { n_heads } else { n_kv };
                    let size = [2, groups, q_len, n_blocks(k_len, block)];
                    let chosen = random_choices(42, size, block, k_len);
                    let choices: Vec<bool> = Vec::try_from(chosen.view([-1])).unwrap();
                    let length =
                        |b: i64| if padded && b == 1 { (k_len * 2 / 3).max(1) } else { k_len };
                    let keep = Tensor::arange(k_len, (Kind::Int64, Device::Cpu))
                        .lt_tensor(&Tensor::from_slice(&[length(0), length(1)]).unsqueeze(-1));
                    let mask = Mask::with_keep(causal, &keep);
                    let sees = |b: i64, h: i64, i: i64, j: i64| {
                        let group = if by_head { h } else { kv_of_head[h as usize] };
                        j < length(b)
                            && (!causal || j <= i + k_len - q_len)
                            && choices[(((b * groups + group) * q_len + i) * size[3] + j / block)
                                as usize]
                    };
                    let (expected, weights) = naive_attention_of(&probe, sees);
                    // A query may have chosen padding alone; then anything finite will do.
                    let sees_some = weights.isfinite().all_dim(-1, true); // [b, h, q, 1]
                    let listed = lists(&chosen, size[3]);
                    let blocks = ChosenBlocks {
                        chosen: &listed,
                        by_head,
                        block,
                        mask: &mask,
                        dims: &probe.dims,
                        dropout: 0.0,
                    };
                    let [q, k, v] =
                        [&probe.q, &probe.k, &probe.v].map(|x| x.copy().set_requires_grad(true));
                    let (z, lse) = blocks.attend(&q, &k, &v);
                    assert!(z.isfinite().all().int64_value(&[]) == 1);
                    assert!(lse.isfinite().all().int64_value(&[]) == 1);
                    let name = format!(
                        "{kv_of_head:?}, {q_len}x{k_len}, causal {causal}, by head {by_head}"
                    );
                    let real = |x: &Tensor| x.where_self(&sees_some, &x.zeros_like());
                    assert_close(&name, &real(&z), &real(&expected), 1e-12);

                    // The gradients, and the sums of exponentials, against those of a dense softmax.
                    let dense: [Tensor; 3] =
                        [&q, &k, &v].map(|x| x.detach().set_requires_grad(true));
                    let by_head_choice = if by_head {
                        chosen.shallow_clone()
                    } else {
                        chosen.index_select(1, &Tensor::from_slice(&kv_of_head))
                    };
                    let allowed = mask
                        .allowed(q_len, k_len, Device::Cpu)
                        .logical_and(&chosen_keys(&by_head_choice, block, k_len));
                    let scores = dense[0]
                        .matmul(&probe.dims.expand_kv(&dense[1]).transpose(-2, -1))
                        * probe.dims.scale
                        + to_bias(&allowed, Kind::Double);
                    let sums = scores.logsumexp([-1i64].as_slice(), true);
                    assert_close(&name, &real(&lse.unsqueeze(-1)), &real(&sums), 1e-12);
                    let pull = real(&randn(43, &z.size()));
                    (scores.softmax(-1, Kind::Double).matmul(&probe.dims.expand_kv(&dense[2]))
                        * &pull)
                        .sum(Kind::Double)
                        .backward();
                    (z * &pull).sum(Kind::Double).backward();
                    for (of, fast, slow) in
                        [("q", &q, &dense[0]), ("k", &k, &dense[1]), ("v", &v, &dense[2])]
                    {
                        if slow.grad().abs().max().double_value(&[]) < 1e-12 {
                            continue; // One key a query: the scores do not matter.
                        }
                        assert_close(
                            &format!("{name}, along {of}"),
                            &fast.grad(),
                            &slow.grad(),
                            1e-12,
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn dropped_weights_are_the_same_on_the_way_back() {
        let probe = Probe::new(44, [1, 40, 40], 2, 2, true);
        let mask = Mask::new(true);
        let chosen = random_choices(45, [1, 2, 40, 5], 8, 40);
        let chosen = lists(&chosen, 5);
        let blocks = ChosenBlocks {
            chosen: &chosen,
            by_head: true,
            block: 8,
            mask: &mask,
            dims: &probe.dims,
            dropout: 0.5,
        };
        // z is linear in v: its gradient along v must give back z, whatever was dropped.
        let v = probe.v.copy().set_requires_grad(true);
        let (z, _) = blocks.attend(&probe.q, &probe.k, &v);
        let pull = randn(46, &z.size());
        let value = (&z * &pull).sum(Kind::Double);
        value.backward();
        let back = (v.grad() * v.detach()).sum(Kind::Double);
        assert_close("linear in v", &back, &value.detach(), 1e-12);
    }

    #[test]
    fn equal_scores_go_to_the_earlier_block() {
        let scores = Tensor::from_slice(&[1.0f64, 3.0, 2.0, 2.0, 2.0, 9.0]).view([1, 1, 1, 6]);
        let allowed = Tensor::from_slice(&[1i64, 1, 1, 1, 1, 0]).view([1, 1, 1, 6]).ne(0);
        let forced = Tensor::from_slice(&[1i64, 0, 0, 0, 0, 0]).view([1, 1, 1, 6]).ne(0);
        let choice = |n| {
            let Selection { chosen, margin } = choose(&scores, &allowed, &forced, n);
            let chosen: Vec<bool> = Vec::try_from(chosen.view([-1])).unwrap();
            (chosen.into_iter().map(i32::from).collect::<Vec<_>>(), margin.double_value(&[0, 0, 0]))
        };
        assert_eq!(choice(1), (vec![1, 0, 0, 0, 0, 0], f64::INFINITY));
        assert_eq!(choice(2), (vec![1, 1, 0, 0, 0, 0], 1.0));
        assert_eq!(choice(3), (vec![1, 1, 1, 0, 0, 0], 0.0));
        assert_eq!(choice(4), (vec![1, 1, 1, 1, 0, 0], 0.0));
        assert_eq!(choice(5), (vec![1, 1, 1, 1, 1, 0], f64::INFINITY));
        assert_eq!(choice(6), (vec![1, 1, 1, 1, 1, 0], f64::INFINITY));
    }
}
