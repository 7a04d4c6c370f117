//! Attention along a band: keys at a bounded distance from the query, one after the other or with strides, and the
//! first few keys of the sequence. What kinds share that attend to few keys: time and memory grow with n·keys, not n².
//!
//! Queries are taken in blocks, each against one stretch of keys that holds what any of its queries may see. With a
//! stride r the tokens are first dealt into r classes, token t into class t mod r: keys r apart are neighbours there,
//! and the band is dense again.

use attn_torch::Seen;
use tch::{Kind, Tensor};

use crate::{
    attention::{AttnInput, Dims, KvCache, State},
    mask::{Mask, to_bias},
    pairs, stretches,
};

/// Fewest and most queries of a block: below, products are too small to be fast; above, much of what a block computes
/// is hidden, and nothing is won.
const ROWS: [i64; 2] = [32, 128];

/// Which keys a query sees: the first `first`, and those at a distance `query − key` of `stride · m`, `lo ≤ m ≤ hi`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Band {
    /// Negative where queries look ahead.
    pub(crate) lo: i64,
    /// The furthest back, in strides.
    pub(crate) hi: i64,
    /// Tokens from one key to the next, at least 1.
    pub(crate) stride: i64,
    /// Keys of the beginning that every query sees; 0 unless `stride` is 1.
    pub(crate) first: i64,
}

impl Band {
    /// The keys less than `size` strides away, on both sides.
    pub(crate) fn around(size: i64, stride: i64, first: i64) -> Self {
        Self { lo: 1 - size, hi: size - 1, stride, first }
    }

    /// Whether `distance` (query − key, any shape) is one of the band's. Says nothing of the first keys.
    pub(crate) fn has(&self, distance: &Tensor) -> Tensor {
        let near =
            distance.ge(self.lo * self.stride).logical_and(&distance.le(self.hi * self.stride));
        match self.stride {
            1 => near,
            stride => near.logical_and(&distance.remainder(stride).eq(0)),
        }
    }

    /// Whether the queries at `query` (`[q]`) see the keys at `key` (`[k]`), hidden ones among them: `[q, k]`.
    pub(crate) fn sees(&self, query: &Tensor, key: &Tensor) -> Tensor {
        self.has(&(query.unsqueeze(-1) - key)).logical_or(&key.lt(self.first))
    }

    /// Whether nothing of n tokens is out of reach.
    pub(crate) fn is_everything(&self, n: i64, causal: bool) -> bool {
        let reach = if causal { self.hi } else { self.hi.min(-self.lo) };
        self.first >= n || (self.stride == 1 && reach >= n - 1 && (!causal || self.lo <= 0))
    }

    /// Pairs of n queries and n keys that this shows, in a causal layer or not.
    pub(crate) fn n_pairs(&self, n: i64, causal: bool) -> i64 {
        let (lo, hi) = (self.lo * self.stride, self.hi * self.stride);
        pairs::n_pairs(n, causal, self.first, |distance| {
            (lo..=hi).contains(&distance) && distance % self.stride == 0
        })
    }

    /// Tokens back to the furthest key of the band, the query's own among them: what decoding must keep. At least 1.
    pub(crate) fn reach(&self) -> i64 {
        (self.hi * self.stride + 1).max(1)
    }

    /// The band as far as n tokens go; `None` where no key is within.
    pub(crate) fn within(&self, n: i64, causal: bool) -> Option<Self> {
        let furthest = (n - 1) / self.stride;
        let lo = self.lo.max(if causal { 0 } else { -furthest });
        let hi = self.hi.min(furthest);
        (lo <= hi).then_some(Self { lo, hi, first: self.first.min(n), ..*self })
    }
}

/// Queries in blocks, and beside each the keys that any of them sees.
#[derive(Debug)]
pub(crate) struct Blocks {
    /// `[batch, blocks, heads, rows, head_dim]`.
    pub(crate) q: Tensor,
    /// `[batch, blocks, heads, keys, head_dim]`: the first keys, then the stretch.
    pub(crate) k: Tensor,
    /// As `k`.
    pub(crate) v: Tensor,
    /// Whether a query may see a key, once whichever way: `[1 or batch, blocks, rows, keys]`.
    pub(crate) allowed: Tensor,
    /// query − key within the stretch, alike in every block, in tokens: `[rows, keys − first]`.
    pub(crate) distance: Tensor,
    /// Where the keys are in the sequence, `[blocks, keys]`; outside of it where a stretch overhangs.
    pub(crate) key: Tensor,
    n: i64,
    stride: i64,
}

impl Blocks {
    /// Takes `q`, `k` and `v` (each `[batch, heads, n, head_dim]`) apart. `band` is [`Band::within`] n.
    pub(crate) fn new(q: &Tensor, [k, v]: [&Tensor; 2], mask: &Mask, band: &Band) -> Self {
        let [b, h, n, _] = q.size()[..] else { unreachable!("queries have four axes") };
        let Band { lo, hi, stride, first } = *band;
        let class = (n + stride - 1) / stride; // tokens of a class
        let rows = (hi - lo + 1).clamp(ROWS[0], ROWS[1]).min(class);
        let n_blocks = (class + rows - 1) / rows;
        let len = n_blocks * rows;
        let stretch = rows + hi - lo;

        let fold_queries = |x: &Tensor| {
            let d = x.size()[3];
            let x = if len * stride == n {
                x.shallow_clone()
            } else {
                x.constant_pad_nd([0, 0, 0, len * stride - n])
            };
            let x = x.reshape([b, h, n_blocks, rows, stride, d]).permute([0, 4, 2, 1, 3, 5]);
            x.reshape([b, stride * n_blocks, h, rows, d])
        };
        let fold_keys = |x: &Tensor| {
            let d = x.size()[3];
            let own = x.constant_pad_nd([0, 0, hi * stride, (len - lo) * stride - n]);
            let own = own.reshape([b, h, len + hi - lo, stride, d]).unfold(2, stretch, rows);
            // [b, h, blocks, stride, d, keys] -> [b, stride, blocks, h, keys, d]
            let own =
                own.permute([0, 3, 2, 1, 5, 4]).reshape([b, stride * n_blocks, h, stretch, d]);
            if first == 0 {
                return own;
            }
            let shared =
                x.narrow(2, 0, first).unsqueeze(1).expand([-1, n_blocks, -1, -1, -1], true);
            Tensor::cat(&[shared, own], 3)
        };

        // Distances are alike in every block; only where the sequence ends differs.
        let options = (Kind::Int64, q.device());
        let row = Tensor::arange(rows, options);
        let column = Tensor::arange_start(-hi, rows - lo, options);
        let steps = row.unsqueeze(-1) - &column; // [rows, stretch]
        let near = steps.ge(lo).logical_and(&steps.le(hi)); // never ahead in a causal layer: lo is then 0 or more
        let start = (Tensor::arange(n_blocks, options) * rows).view([1, -1, 1]);
        let residue = Tensor::arange(stride, options).view([-1, 1, 1]);
        let place = |at: &Tensor| ((&start + at) * stride + &residue).view([-1, at.size()[0]]);
        let (query, mut key) = (place(&row), place(&column)); // [blocks, rows], [blocks, stretch]
        let real = key.ge(0).logical_and(&key.lt(n)).unsqueeze(1);
        let mut allowed = near.logical_and(&real); // [blocks, rows, stretch]
        if first > 0 {
            let shared = Tensor::arange(first, options);
            let distance = query.unsqueeze(-1) - &shared; // [blocks, rows, first]
            let mut seen = band.has(&distance).logical_not();
            if mask.causal() {
                seen = seen.logical_and(&distance.ge(0));
            }
            allowed = Tensor::cat(&[seen, allowed], -1);
            key = Tensor::cat(&[shared.expand([n_blocks, -1], true), key], -1);
        }
        let mut allowed = allowed.unsqueeze(0);
        if let Some(keep) = mask.keep().filter(|_| !mask.is_plain()) {
            let keep = keep.index_select(1, &key.clamp(0, n - 1).view([-1]));
            allowed = allowed.logical_and(&keep.view([b, key.size()[0], 1, -1]));
        }
        Self {
            q: fold_queries(q),
            k: fold_keys(k),
            v: fold_keys(v),
            allowed,
            distance: steps * stride,
            key,
            n,
            stride,
        }
    }

    /// Puts what was computed for each query back in order: `[batch, blocks, heads, rows, x] -> [batch, heads, n, x]`.
    pub(crate) fn unfold(&self, x: &Tensor) -> Tensor {
        let [b, blocks, h, rows, d] = x.size()[..] else { unreachable!("blocks have five axes") };
        let x = x.view([b, self.stride, blocks / self.stride, h, rows, d]);
        x.permute([0, 3, 2, 4, 1, 5]).reshape([b, h, blocks * rows, d]).narrow(2, 0, self.n)
    }
}

/// Softmax attention of n queries to the keys of `band` among n, in blocks: `[batch, n_heads, n, head_dim]`.
///
/// `k` and `v` have the layer's key/value heads; masks are plain or padded on the right.
pub(crate) fn attend(input: &AttnInput, dims: &Dims, band: &Band) -> Tensor {
    let AttnInput { q, k, v, mask, dropout, .. } = *input;
    let n = q.size()[2];
    let band = band.within(n, mask.causal()).expect("a query is within its own band");
    if stretches::serves(q, dims, dropout)
        && let Some(visible) = mask.visible(n, n, q.device())
    {
        return in_stretches([q, k, v], dims, &band, &visible);
    }
    let (k, v) = (dims.expand_kv(k), dims.expand_kv(v));
    let blocks = Blocks::new(q, [&k, &v], mask, &band);
    let [b, n_blocks, h, rows, d] = blocks.q.size()[..] else {
        unreachable!("blocks have five axes")
    };
    // Blocks join the batch: the fused kernel serves all of them at once.
    let bias = to_bias(&blocks.allowed, q.kind());
    let bias = bias.expand([b, -1, -1, -1], true).reshape([b * n_blocks, 1, rows, -1]);
    let z = Tensor::scaled_dot_product_attention(
        &blocks.q.flatten(0, 1),
        &blocks.k.flatten(0, 1),
        &blocks.v.flatten(0, 1),
        Some(bias),
        dropout,
        false,
        dims.scale,
        false,
    );
    blocks.unfold(&z.view([b, n_blocks, h, rows, d]))
}

/// [`attend`] by a kernel, class by class; `visible` is [`Mask::visible`], and `band` within n.
fn in_stretches(qkv: [&Tensor; 3], dims: &Dims, band: &Band, visible: &Tensor) -> Tensor {
    let [b, h, n, d] = qkv[0].size()[..] else { unreachable!("queries have four axes") };
    let stride = band.stride;
    let class = |residue: i64| {
        let [q, k, v] = qkv.map(|x| x.slice(2, residue, n, stride));
        let at = Tensor::arange(q.size()[2], (Kind::Int64, q.device()));
        // Of the keys before `visible` those of the class.
        let visible = visible.slice(1, residue, n, stride);
        let visible = (visible - residue + (stride - 1)).divide_scalar_mode(stride, "floor");
        // The first keys are seen whatever the band's far end.
        let hi = (&at - (band.lo - 1)).clamp_min(band.first).minimum(&visible);
        let lo = (at - band.hi).clamp_min(0).expand_as(&hi);
        let seen = Seen {
            lo: stretches::limits(&lo),
            hi: stretches::limits(&hi),
            first: band.first,
            choices: None,
        };
        let [z, _] = stretches::attend(&q, [&k, &v], seen, dims);
        z
    };
    if stride == 1 {
        return class(0);
    }
    let longest = (n + stride - 1) / stride;
    let classes: Vec<Tensor> = (0..stride.min(n))
        .map(|residue| {
            let z = class(residue);
            z.constant_pad_nd([0, 0, 0, longest - z.size()[2]])
        })
        .collect();
    Tensor::stack(&classes, 3).view([b, h, -1, d]).narrow(2, 0, n)
}

/// The positions of the queries `rows` among the keys, and of the keys, where the queries are the last ones: `[rows]`,
/// `[k_len]`.
pub(crate) fn places(input: &AttnInput, rows: &[i64]) -> (Tensor, Tensor) {
    let (q_len, k_len, device) = (input.q.size()[2], input.k.size()[2], input.q.device());
    let query = Tensor::from_slice(rows).to_device(device) + (k_len - q_len);
    (query, Tensor::arange(k_len, (Kind::Int64, device)))
}

/// The weights of softmax attention for the queries `rows`, where they see the keys that `sees` (`[rows, k_len]`) says
/// (or `[1 or batch, 1, rows, k_len]`) and the mask allows: all scores of a row are made. `[batch, n_heads, rows, k_len]`.
pub(crate) fn dense_weights(input: &AttnInput, dims: &Dims, rows: &[i64], sees: &Tensor) -> Tensor {
    let (q_len, k_len, device) = (input.q.size()[2], input.k.size()[2], input.q.device());
    let allowed = input.mask.allowed_rows(rows, q_len, k_len, device).logical_and(sees);
    let q = input.q.index_select(2, &Tensor::from_slice(rows).to_device(device));
    let scores = q.matmul(&dims.expand_kv(input.k).transpose(-2, -1)) * dims.scale;
    (scores + to_bias(&allowed, q.kind())).softmax(-1, q.kind())
}

/// The first `n` queries against all keys, as many of them as queries: `[batch, n_heads, n, head_dim]`.
pub(crate) fn first_see_all(input: &AttnInput, dims: &Dims, n: i64) -> Tensor {
    let AttnInput { q, k, v, mask, dropout, .. } = *input;
    let rows: Vec<i64> = (0..n).collect();
    let allowed = mask.allowed_rows(&rows, q.size()[2], k.size()[2], q.device());
    Tensor::scaled_dot_product_attention(
        &q.narrow(2, 0, n),
        &dims.expand_kv(k),
        &dims.expand_kv(v),
        Some(to_bias(&allowed, q.kind())),
        dropout,
        false,
        dims.scale,
        false,
    )
}

/// The next tokens' attention along `band`, with what `state` ([`FirstAndLast`]) holds.
pub(crate) fn step(input: &AttnInput, dims: &Dims, band: &Band, state: &mut dyn State) -> Tensor {
    let cache = FirstAndLast::of(state);
    let is_new = cache.n_tokens() == 0;
    let held = cache.append(input.k, input.v);
    if is_new && input.q.size()[2] > 1 {
        let z = attend(input, dims, band);
        cache.trim();
        return z;
    }
    let (mut k, mut v, mut key) = (held.k, held.v, held.key);
    if band.stride > 1 && input.q.size()[2] == 1 {
        // One query's keys are every r-th back from itself: nothing else need be read.
        let of_class = |x: &Tensor, dim: i64| {
            let len = x.size()[dim as usize];
            x.slice(dim, (len - 1) % band.stride, len, band.stride)
        };
        (k, v, key) = (of_class(&k, 2), of_class(&v, 2), of_class(&key, 0));
    }
    let past = key.le_tensor(&held.query.unsqueeze(-1)); // [q, k]
    let bias = to_bias(&band.sees(&held.query, &key).logical_and(&past), input.q.kind());
    let z = Tensor::scaled_dot_product_attention(
        input.q,
        &dims.expand_kv(&k),
        &dims.expand_kv(&v),
        Some(bias.unsqueeze(0).unsqueeze(0)),
        input.dropout,
        false,
        dims.scale,
        false,
    );
    cache.trim();
    z
}

/// Keys and values of the first tokens and of the last ones.
#[derive(Debug)]
pub(crate) struct FirstAndLast {
    n_first: i64,
    /// `[batch, n_kv_heads, up to n_first, head_dim]` each.
    first: Option<(Tensor, Tensor)>,
    last: KvCache,
    n_tokens: i64,
}

/// What [`FirstAndLast`] holds while new tokens are served.
#[derive(Debug)]
pub(crate) struct Held {
    /// `[batch, n_kv_heads, k_len, head_dim]`.
    pub(crate) k: Tensor,
    /// As `k`.
    pub(crate) v: Tensor,
    /// Where the keys are in the sequence: `[k_len]`.
    pub(crate) key: Tensor,
    /// Where the new tokens are: `[q_len]`.
    pub(crate) query: Tensor,
}

impl FirstAndLast {
    /// An empty cache that keeps the first `n_first` tokens and the last `n_last`, or all.
    pub(crate) fn new(n_first: i64, n_last: Option<i64>) -> Self {
        Self { n_first, first: None, last: KvCache::new(n_last), n_tokens: 0 }
    }

    /// The cache behind `state`.
    pub(crate) fn of(state: &mut dyn State) -> &mut Self {
        state
            .as_any_mut()
            .downcast_mut()
            .expect("a decoding state belongs to the kind that started it")
    }

    /// Tokens seen so far, kept or not.
    pub(crate) fn n_tokens(&self) -> i64 {
        self.n_tokens
    }

    /// Adds keys and values of new tokens and returns all that are held, each token once.
    pub(crate) fn append(&mut self, k: &Tensor, v: &Tensor) -> Held {
        let (new, before) = (k.size()[2], self.n_tokens);
        let start = before - self.last.n_tokens(); // where the last tokens begin
        let (mut all_k, mut all_v) = self.last.append(k, v);
        self.n_tokens += new;

        let options = (Kind::Int64, k.device());
        let mut key = Tensor::arange_start(start, self.n_tokens, options);
        if let Some((first_k, first_v)) = &self.first
            && start > 0
        {
            let apart = start.min(first_k.size()[2]);
            let with =
                |first: &Tensor, x: &Tensor| Tensor::cat(&[&first.narrow(2, 0, apart), x], 2);
            (all_k, all_v) = (with(first_k, &all_k), with(first_v, &all_v));
            key = Tensor::cat(&[Tensor::arange(apart, options), key], 0);
        }
        let missing = (self.n_first - before).clamp(0, new);
        if missing > 0 {
            let grown = |first: Option<&Tensor>, x: &Tensor| {
                let x = x.narrow(2, 0, missing).detach();
                first.map_or_else(|| x.copy(), |first| Tensor::cat(&[first, &x], 2))
            };
            let (first_k, first_v) =
                self.first.as_ref().map_or((None, None), |(k, v)| (Some(k), Some(v)));
            self.first = Some((grown(first_k, k), grown(first_v, v)));
        }
        let query = Tensor::arange_start(before, self.n_tokens, options);
        Held { k: all_k, v: all_v, key, query }
    }

    /// Forgets what is neither first nor last.
    pub(crate) fn trim(&mut self) {
        self.last.trim();
    }
}

impl State for FirstAndLast {
    fn bytes(&self) -> usize {
        let size = |x: &Tensor| x.numel() * x.kind().elt_size_in_bytes();
        self.last.bytes() + self.first.as_ref().map_or(0, |(k, v)| size(k) + size(v))
    }

    fn as_any_mut(&mut self) -> &mut dyn std::any::Any {
        self
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::testing::{Probe, assert_close, naive_attention, randn};

    /// Kinds take a short cut there, which this leaves out.
    #[test]
    fn a_band_as_long_as_the_text_is_softmax() {
        for n in [1, 40, 131] {
            for causal in [true, false] {
                let probe = Probe::new(91, [2, n, n], 4, 2, causal);
                let (expected, _) = naive_attention(&probe, |i, j| !causal || j <= i);
                let (mask, band) = (Mask::new(causal), Band::around(n, 1, 0));
                for (kind, tolerance) in [(Kind::Double, 1e-12), (Kind::Float, 1e-5)] {
                    let probe = probe.to(kind, Device::Cpu);
                    let z = attend(&probe.input(&mask), &probe.dims, &band);
                    let name = format!("{n} tokens, causal {causal}, {kind:?}");
                    assert_close(&name, &z, &expected, tolerance);
                }
            }
        }
    }

    #[test]
    fn kernels_find_what_f64_finds() {
        for (size, stride, first) in
            [(1, 1, 0), (9, 1, 0), (9, 1, 4), (3, 1, 40), (70, 1, 2), (5, 3, 0), (2, 50, 0)]
        {
            for (n, causal, n_kv) in [(9, true, 4), (131, true, 2), (131, false, 2), (90, false, 4)]
            {
                let probe = Probe::new(92, [2, n, n], 4, n_kv, causal);
                let keep =
                    Tensor::from_slice(&[n, n * 2 / 3]).unsqueeze(-1).gt_tensor(&probe.positions);
                let mask = Mask::with_keep(causal, &keep);
                let real = keep.view([2, 1, n, 1]);
                let pull = randn(93, &probe.q.size()) * &real;
                let band = Band::around(size, stride, first);
                let run = |kind| {
                    let probe = probe.to(kind, Device::Cpu);
                    let [q, k, v] =
                        [&probe.q, &probe.k, &probe.v].map(|x| x.detach().set_requires_grad(true));
                    let z = attend(
                        &AttnInput { q: &q, k: &k, v: &v, ..probe.input(&mask) },
                        &probe.dims,
                        &band,
                    );
                    (&z * pull.to_kind(kind)).sum(kind).backward();
                    [z.detach() * &real, q.grad(), k.grad(), v.grad()]
                };
                for ((name, found), expected) in
                    ["z", "dq", "dk", "dv"].iter().zip(run(Kind::Float)).zip(run(Kind::Double))
                {
                    let name =
                        format!("{name}, {band:?}, {n} tokens, causal {causal}, {n_kv} key heads");
                    if expected.abs().max().double_value(&[]) > 1e-9 {
                        assert_close(&name, &found, &expected, 1e-5);
                    }
                }
            }
        }
    }
}
