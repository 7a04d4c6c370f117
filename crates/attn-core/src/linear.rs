//! What linear attention kinds share: sums of φ(k_j) v_jᵀ instead of weights.
//!
//! ```text
//! z_i = φ(q_i)ᵀ Σ_j φ(k_j) v_jᵀ  /  φ(q_i)ᵀ Σ_j φ(k_j)
//! ```
//!
//! Katharopoulos et al. 2020, "Transformers are RNNs", <https://arxiv.org/abs/2006.16236>, section 3. Values carry a
//! one in a channel of their own, so that both sums are one product. Under a causal mask the sums run over the keys up
//! to i: within a chunk of positions as masked products, over the chunks before as a state `[m, head_dim + 1]`, so that
//! time and memory grow with n, forward and backward (the states, n/[`CHUNK`] of them, are what autograd keeps).
//!
//! Keys may leave out a factor of their features and give its logarithm instead ([`Features::log_scale`]): sums are then
//! kept relative to the largest factor **so far**, as the future must not reach the past, not even by rounding. The
//! factor that is left out of a query cancels.

use std::any::Any;

use tch::{Device, Kind, Tensor};

use crate::{
    Error,
    attention::{AttnInput, Dims, State, Stream},
    mask::hidden_score,
};

/// Positions of a chunk. Within it work grows with its length, between chunks memory with its inverse.
const CHUNK: i64 = 64;

/// What keys are mapped to.
#[derive(Debug)]
pub(crate) struct Features {
    /// `[b, heads, k_len, m]`, heads being query heads or key/value heads.
    pub(crate) values: Tensor,
    /// Logarithm of what `values` are to be multiplied by: `[b, heads, k_len]`.
    pub(crate) log_scale: Option<Tensor>,
}

/// A linear attention kind: how it maps queries and keys. [`forward`], [`weights`] and [`step`] do the rest.
pub(crate) trait Kernel {
    /// The layer's extents.
    fn dims(&self) -> &Dims;

    /// Features of a query or key.
    fn n_features(&self) -> i64;

    /// Features of queries: `[b, n_heads, q_len, head_dim] -> [b, n_heads, q_len, m]`, up to a factor for each query.
    fn queries(&self, q: &Tensor, stream: Stream) -> Tensor;

    /// Features of keys, `[b, n_kv_heads, k_len, head_dim]`, for each query head, or for each key/value head where the
    /// layer is evenly grouped.
    fn keys(&self, k: &Tensor, stream: Stream) -> Features;

    /// Whether [`Self::keys`] are those of key/value heads.
    fn maps_kv_heads(&self) -> bool {
        false
    }

    /// What sums are divided by, given Σ_j φ(q_i)·φ(k_j) relative to the largest key factor: finite and not 0.
    fn normalizer(&self, total: &Tensor) -> Tensor {
        // A query that sees no key has sums of 0 and stays there.
        total + total.eq(0.0)
    }
}

/// Sums over the keys so far.
#[derive(Debug)]
pub(crate) struct Sums {
    /// Σ φ(k) [v, 1]ᵀ: `[b, heads, m, head_dim + 1]`.
    sums: Tensor,
    /// The largest log factor so far, which `sums` are relative to: `[b, heads]`.
    log_scale: Option<Tensor>,
}

/// Decoding state of a linear kind: as large after a million tokens as after one.
#[derive(Debug, Default)]
pub(crate) struct LinearState {
    sums: Option<Sums>,
    /// The first step's: features that are drawn must stay what they were.
    stream: Option<Stream>,
}

impl State for LinearState {
    fn bytes(&self) -> usize {
        let size = |x: &Tensor| x.numel() * x.kind().elt_size_in_bytes();
        self.sums
            .as_ref()
            .map_or(0, |Sums { sums, log_scale }| size(sums) + log_scale.as_ref().map_or(0, size))
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}

/// Refuses an `eps` that does not keep a divisor above 0.
pub(crate) fn check_eps(kind: &'static str, eps: f64) -> Result<(), Error> {
    if eps.is_finite() && eps > 0.0 {
        return Ok(());
    }
    let problem = "must be a number above 0".into();
    Err(Error::Setting { kind, field: "eps", value: eps.to_string(), problem })
}

/// At least `f32`: sums over a sequence and exponentials do not fit into half the bits.
pub(crate) fn wide(x: &Tensor) -> Tensor {
    match x.kind() {
        Kind::Half | Kind::BFloat16 => x.to_kind(Kind::Float),
        _ => x.shallow_clone(),
    }
}

/// `[.., d] -> [.., d + 1]`, a one behind.
pub(crate) fn with_ones(v: &Tensor) -> Tensor {
    v.pad([0, 1], "constant", 1.0)
}

/// Zeros behind the positions, `[b, h, n, x] -> [b, h, n + pad, x]`.
pub(crate) fn pad_rows(x: &Tensor, pad: i64) -> Tensor {
    // LibTorch copies even where there is nothing to add.
    if pad == 0 { x.shallow_clone() } else { x.constant_pad_nd([0, 0, 0, pad]) }
}

/// `z` of a linear kind.
pub(crate) fn forward(kernel: &impl Kernel, input: &AttnInput) -> Tensor {
    let AttnInput { q, k, v, mask, .. } = *input;
    let (q_len, k_len) = (q.size()[2], k.size()[2]);
    let keep = mask.keep().filter(|_| !mask.is_plain());
    if !mask.causal() || q_len < k_len {
        let (mut q, keys, v) = mapped(kernel, input, input.stream);
        let keys = hidden(keys, keep);
        let sums = if mask.causal() {
            // The queries are the last ones.
            q = q.constant_pad_nd([0, 0, k_len - q_len, 0]);
            causal(&q, &keys, &v, None, false).0.narrow(2, k_len - q_len, q_len)
        } else {
            bidirectional(&q, &keys, &v)
        };
        return divided(kernel, &sums).to_kind(input.q.kind());
    }
    let segment = segment(kernel, q);
    let mut before = None;
    let mut pieces = Vec::new();
    for at in (0..k_len).step_by(segment as usize) {
        let len = segment.min(k_len - at);
        let [q, k, v] = [q, k, v].map(|x| x.narrow(2, at, len));
        let part = AttnInput { q: &q, k: &k, v: &v, ..*input };
        let (q, keys, v) = mapped(kernel, &part, input.stream);
        let keys = hidden(keys, keep.map(|keep| keep.narrow(1, at, len)).as_ref());
        let (sums, after) = causal(&q, &keys, &v, before.as_ref(), at + len < k_len);
        before = after;
        pieces.push(divided(kernel, &sums).to_kind(input.q.kind()));
    }
    if pieces.len() == 1 { pieces.remove(0) } else { Tensor::cat(&pieces, 2) }
}

/// Positions to take at a time, whole chunks. A processor waits for memory, whose new pages are slow, when features are
/// larger than its cache; a GPU wants all of them at once.
fn segment(kernel: &impl Kernel, q: &Tensor) -> i64 {
    const N_FEATURES: i64 = 1 << 21;
    let [b, h, n, _] = q.size()[..] else { unreachable!("queries have four axes") };
    if q.device() != Device::Cpu {
        return n.max(1);
    }
    (N_FEATURES / (b * h * kernel.n_features()) / CHUNK * CHUNK).max(CHUNK)
}

/// Operations of [`forward`] over n tokens, where a query or key is mapped by a matrix of `n_columns`: sums go from token to
/// token, whatever chunks they are taken in.
pub(crate) fn flops(kernel: &impl Kernel, n: i64, n_columns: i64) -> i64 {
    let dims = kernel.dims();
    let key_heads = if kernel.maps_kv_heads() { dims.n_kv_heads } else { dims.n_heads };
    let per_vector = 2 * dims.head_dim * n_columns + 2 * kernel.n_features() * (dims.head_dim + 1);
    (dims.n_heads + key_heads) * per_vector * n
}

/// The coefficients of v, `[b, n_heads, rows, k_len]`.
pub(crate) fn weights(kernel: &impl Kernel, input: &AttnInput, rows: &[i64]) -> Tensor {
    let (q_len, k_len, device) = (input.q.size()[2], input.k.size()[2], input.q.device());
    let index = Tensor::from_slice(rows).to_device(device);
    let q = kernel.queries(&wide(&input.q.index_select(2, &index)), input.stream);
    let keys = kernel.keys(&wide(input.k), input.stream);
    let per_head = |x: &Tensor| {
        let [b, g, ..] = x.size()[..] else { unreachable!("features have heads") };
        let h = q.size()[1];
        let mut size = vec![b, g, h / g];
        size.extend(&x.size()[2..]);
        let mut merged = vec![b, h];
        merged.extend(&x.size()[2..]);
        x.unsqueeze(2).expand(size, false).reshape(merged)
    };
    let sees_not = input.mask.allowed_rows(rows, q_len, k_len, device).logical_not();
    let mut scores = q.matmul(&per_head(&keys.values).transpose(-2, -1));
    if let Some(log_scale) = &keys.log_scale {
        let log_scale = per_head(log_scale).unsqueeze(2); // [b, h, 1, k]
        let log_scale = log_scale.masked_fill(&sees_not, hidden_score(log_scale.kind()));
        let largest = log_scale.detach().amax([-1i64].as_slice(), true);
        scores *= (log_scale - largest).exp();
    }
    let scores = scores.masked_fill(&sees_not, 0.0);
    let total = scores.sum_dim_intlist([-1i64].as_slice(), true, scores.kind());
    (scores / kernel.normalizer(&total)).to_kind(input.q.kind())
}

/// `z` of the next tokens, which go into `state`.
///
/// # Panics
/// If the state was made by another kind.
pub(crate) fn step(kernel: &impl Kernel, input: &AttnInput, state: &mut dyn State) -> Tensor {
    let state: &mut LinearState = state
        .as_any_mut()
        .downcast_mut()
        .expect("a decoding state belongs to the kind that started it");
    let stream = *state.stream.get_or_insert(input.stream);
    let (q, keys, v) = mapped(kernel, input, stream);
    let keys = hidden(keys, input.mask.tail(input.k.size()[2]).keep());
    let (sums, after) = causal(&q, &keys, &v, state.sums.as_ref(), true);
    state.sums = after;
    divided(kernel, &sums).to_kind(input.q.kind())
}

/// Features of the queries and keys, and the values with their ones, for as many heads as the keys.
fn mapped(kernel: &impl Kernel, input: &AttnInput, stream: Stream) -> (Tensor, Features, Tensor) {
    let q = kernel.queries(&wide(input.q), stream);
    let keys = kernel.keys(&wide(input.k), stream);
    let v = wide(input.v);
    let by_group = keys.values.size()[1] == v.size()[1] && kernel.dims().is_evenly_grouped();
    let v = if by_group { v } else { kernel.dims().expand_kv(&v) };
    (q, keys, with_ones(&v))
}

/// Keys that are not kept (`[b, k_len]`) leave the sums.
fn hidden(keys: Features, keep: Option<&Tensor>) -> Features {
    let Some(keep) = keep else { return keys };
    let keep = keep.unsqueeze(1); // [b, 1, k]
    match keys.log_scale {
        Some(log_scale) => {
            let gone = hidden_score(log_scale.kind());
            let log_scale = Some(log_scale.masked_fill(&keep.logical_not(), gone));
            Features { log_scale, ..keys }
        }
        None => {
            let values = keys.values.masked_fill(&keep.logical_not().unsqueeze(-1), 0.0);
            Features { values, log_scale: None }
        }
    }
}

fn divided(kernel: &impl Kernel, sums: &Tensor) -> Tensor {
    let d = sums.size()[3] - 1;
    sums.narrow(-1, 0, d) / kernel.normalizer(&sums.narrow(-1, d, 1))
}

/// Sums over all keys: `[b, n_heads, q_len, head_dim + 1]`.
fn bidirectional(q: &Tensor, keys: &Features, v: &Tensor) -> Tensor {
    let [b, h, q_len, m] = q.size()[..] else { unreachable!("features have four axes") };
    let g = v.size()[1];
    let k = match &keys.log_scale {
        Some(log_scale) => {
            let largest = log_scale.detach().amax([-1i64].as_slice(), true);
            &keys.values * (log_scale - largest).exp().unsqueeze(-1)
        }
        None => keys.values.shallow_clone(),
    };
    let sums = k.transpose(-2, -1).matmul(v); // [b, g, m, d + 1]
    q.reshape([b, g, h / g * q_len, m]).matmul(&sums).view([b, h, q_len, -1])
}

/// The scales of [`causal`], all relative to the largest factor at and before a position.
struct Scales {
    /// Of key j as query i of its chunk sees it, 0 where j is later: `[b, g, chunks, 1, c, c]`.
    within: Tensor,
    /// Of the state before the chunk, as its query i sees it: `[b, g, chunks, 1, c, 1]`.
    before: Tensor,
    /// Of key j in the state after its chunk: `[b, g, chunks, c, 1]`.
    after: Tensor,
    /// Of the state before a chunk in the state after it: `[b, g, chunks]`.
    decay: Tensor,
    /// The largest log factor after the last chunk: `[b, g]`.
    last: Tensor,
}

impl Scales {
    fn new(log_scale: &Tensor, n_chunks: i64, c: i64, first: Option<&Tensor>) -> Self {
        let [b, g, n] = log_scale.size()[..] else { unreachable!("log factors have three axes") };
        let least = hidden_score(log_scale.kind());
        let log_scale = log_scale.pad([0, n_chunks * c - n], "constant", least);
        let first = first.map_or_else(
            || Tensor::full([b, g], least, (log_scale.kind(), log_scale.device())),
            Tensor::shallow_clone,
        );
        // What sums are relative to cancels, and takes no gradient.
        let largest = log_scale.detach().cummax(-1).0.maximum(&first.unsqueeze(-1));
        let own = log_scale.view([b, g, n_chunks, c]);
        let largest = largest.view([b, g, n_chunks, c]);
        let ends = largest.select(-1, c - 1); // [b, g, chunks]
        let starts = Tensor::cat(&[first.unsqueeze(-1), ends.narrow(2, 0, n_chunks - 1)], 2);
        let later = Tensor::ones([c, c], (Kind::Bool, own.device())).triu(1);
        let within = (own.unsqueeze(-2) - largest.unsqueeze(-1)).masked_fill(&later, least).exp();
        Self {
            within: within.unsqueeze(3),
            before: (starts.unsqueeze(-1) - &largest).exp().view([b, g, n_chunks, 1, c, 1]),
            after: (own - ends.unsqueeze(-1)).exp().unsqueeze(-1),
            decay: (&starts - &ends).exp(),
            last: ends.select(2, n_chunks - 1),
        }
    }
}

/// Sums over the keys at and before each query, `[b, n_heads, n, head_dim + 1]`, and those over all keys if
/// `keep_state`; `before` are the sums over earlier tokens. Query head h reads the keys of head ⌊h·g/n_heads⌋.
fn causal(
    q: &Tensor,
    keys: &Features,
    v: &Tensor,
    before: Option<&Sums>,
    keep_state: bool,
) -> (Tensor, Option<Sums>) {
    let [b, g, n, m] = keys.values.size()[..] else { unreachable!("features have four axes") };
    let (h, d) = (q.size()[1], v.size()[3]);
    let r = h / g;
    let c = CHUNK.min(n);
    let n_chunks = (n + c - 1) / c;
    let pad = n_chunks * c - n;

    let chunks = |x: &Tensor| pad_rows(x, pad).reshape([b, g, n_chunks, c, -1]);
    let (k, v) = (chunks(&keys.values), chunks(v));
    // The queries of a group are rows against the same keys.
    let q = pad_rows(q, pad).reshape([b, g, r, n_chunks, c, m]);
    let q = q.transpose(2, 3).reshape([b, g, n_chunks, r * c, m]);
    let scales = keys.log_scale.as_ref().map(|log_scale| {
        Scales::new(log_scale, n_chunks, c, before.and_then(|sums| sums.log_scale.as_ref()))
    });

    let scores = q.matmul(&k.transpose(-2, -1)).view([b, g, n_chunks, r, c, c]);
    let scores = match &scales {
        Some(scales) => scores * &scales.within,
        None => scores.tril(0),
    };
    let mut sums = scores.view([b, g, n_chunks, r * c, c]).matmul(&v); // [b, g, chunks, r·c, d]

    // The state before each chunk, and at the end the one after the last.
    let n_states = if keep_state { n_chunks } else { n_chunks - 1 };
    let mut after = None;
    if n_states > 0 || before.is_some() {
        let k = scales.as_ref().map_or_else(|| k.shallow_clone(), |scales| &k * &scales.after);
        let own = k.narrow(2, 0, n_states).transpose(-2, -1).matmul(&v.narrow(2, 0, n_states));
        let first = before.map_or_else(
            || Tensor::zeros([b, g, m, d], (v.kind(), v.device())),
            |before| before.sums.shallow_clone(),
        );
        let states = match &scales {
            Some(scales) => {
                let mut states = vec![first];
                for chunk in 0..n_states {
                    let decay = scales.decay.select(2, chunk).view([b, g, 1, 1]);
                    let next = &states[chunk as usize] * decay + own.select(2, chunk);
                    states.push(next);
                }
                Tensor::stack(&states, 2)
            }
            None => Tensor::cat(&[first.unsqueeze(2), own], 2).cumsum(2, v.kind()),
        };
        let far = q.matmul(&states.narrow(2, 0, n_chunks)); // [b, g, chunks, r·c, d]
        sums += match &scales {
            Some(scales) => {
                let far = far.view([b, g, n_chunks, r, c, d]) * &scales.before;
                far.view([b, g, n_chunks, r * c, d])
            }
            None => far,
        };
        after = keep_state.then(|| Sums {
            sums: states.select(2, n_chunks).copy(),
            log_scale: scales.map(|scales| scales.last.copy()),
        });
    }
    let sums = sums.view([b, g, n_chunks, r, c, d]).transpose(2, 3);
    (sums.reshape([b, h, n_chunks * c, d]).narrow(2, 0, n), after)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, randn};

    /// The definition, one product at a time.
    fn naive(q: &Tensor, keys: &Features, v: &Tensor, causal: bool) -> Tensor {
        let [b, h, n, m] = q.size()[..] else { unreachable!("features have four axes") };
        let (g, d) = (v.size()[1], v.size()[3]);
        let values = |x: &Tensor| Vec::<f64>::try_from(x.contiguous().view([-1])).unwrap();
        let scale = keys
            .log_scale
            .as_ref()
            .map_or(vec![1.0; (b * g * n) as usize], |log_scale| values(&log_scale.exp()));
        let [q, k, v] = [q, &keys.values, v].map(values);
        let row =
            |x: &[f64], at: i64, width: i64| x[(at * width) as usize..][..width as usize].to_vec();
        let mut out = Vec::new();
        for (head, i) in (0..b * h * n).map(|at| (at / n, at % n)) {
            let group = head / (h / g);
            let mut sums = vec![0.0; d as usize];
            for j in 0..if causal { i + 1 } else { n } {
                let (query, key) = (row(&q, head * n + i, m), row(&k, group * n + j, m));
                let dot: f64 = query.iter().zip(&key).map(|(x, y)| x * y).sum();
                let weight = dot * scale[(group * n + j) as usize];
                sums.iter_mut()
                    .zip(row(&v, group * n + j, d))
                    .for_each(|(sum, v)| *sum += weight * v);
            }
            out.extend(sums);
        }
        Tensor::from_slice(&out).view([b, h, n, d])
    }

    /// A ratio, as what sums are relative to cancels there alone.
    fn ratio(sums: &Tensor) -> Tensor {
        let d = sums.size()[3] - 1;
        sums.narrow(-1, 0, d) / sums.narrow(-1, d, 1)
    }

    #[test]
    fn chunks_add_up_to_the_definition() {
        for n in [1, 7, CHUNK, CHUNK + 9, 2 * CHUNK + 63] {
            for (h, g) in [(2, 2), (4, 2)] {
                for scaled in [false, true] {
                    let q = randn(1, &[1, h, n, 3]).exp();
                    let keys = Features {
                        values: randn(2, &[1, g, n, 3]).exp(),
                        log_scale: scaled.then(|| randn(3, &[1, g, n]) * 5.0),
                    };
                    let v = with_ones(&randn(4, &[1, g, n, 2]));
                    let name = format!("{n} tokens, {h}/{g} heads, scaled {scaled}");
                    let (sums, _) = causal(&q, &keys, &v, None, false);
                    let expected = ratio(&naive(&q, &keys, &v, true));
                    assert_close(&name, &ratio(&sums), &expected, 1e-12);
                    let expected = ratio(&naive(&q, &keys, &v, false));
                    assert_close(&name, &ratio(&bidirectional(&q, &keys, &v)), &expected, 1e-12);
                }
            }
        }
    }

    #[test]
    fn sums_go_on_where_they_stopped() {
        let n = 2 * CHUNK + 40;
        for scaled in [false, true] {
            let q = randn(1, &[1, 2, n, 3]).exp();
            let (values, log_scale) = (randn(2, &[1, 2, n, 3]).exp(), randn(3, &[1, 2, n]) * 5.0);
            let v = with_ones(&randn(4, &[1, 2, n, 2]));
            let cut = |at: i64, len: i64| Features {
                values: values.narrow(2, at, len),
                log_scale: scaled.then(|| log_scale.narrow(2, at, len)),
            };
            let (whole, _) = causal(&q, &cut(0, n), &v, None, false);
            let mut before = None;
            for (at, len) in [(0, CHUNK + 5), (CHUNK + 5, 1), (CHUNK + 6, n - CHUNK - 6)] {
                let [q, v] = [&q, &v].map(|x| x.narrow(2, at, len));
                let (sums, after) = causal(&q, &cut(at, len), &v, before.as_ref(), true);
                before = after;
                let expected = ratio(&whole.narrow(2, at, len));
                assert_close(&format!("from {at}"), &ratio(&sums), &expected, 1e-12);
            }
        }
    }

    #[test]
    fn factors_too_large_for_any_float_cancel() {
        // exp(±2000) is no number; only ratios to the largest so far are formed.
        let n = CHUNK + 30;
        let keys = |shift: f64| Features {
            values: randn(2, &[1, 1, n, 3]).exp(),
            log_scale: Some(randn(3, &[1, 1, n]) * 5.0 + shift),
        };
        let (q, v) = (randn(1, &[1, 1, n, 3]).exp(), with_ones(&randn(4, &[1, 1, n, 2])));
        let plain = ratio(&causal(&q, &keys(0.0), &v, None, false).0);
        for shift in [-2000.0, 2000.0] {
            let shifted = ratio(&causal(&q, &keys(shift), &v, None, false).0);
            assert_close(&format!("e^{shift}"), &shifted, &plain, 1e-11);
        }
    }
}
