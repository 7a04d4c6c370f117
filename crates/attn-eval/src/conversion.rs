//! Fewer key/value heads in a whole model: calibrated on a text, refitted, and measured against what it was.
//!
//! The surgery itself is [`merge_kv`]'s. Here are the text that it reads, batch by batch, the fit of the output projections
//! ([`StreamedRefit`]), what each layer loses by a number of heads of its own, and the numbers that a cache of so many bytes can hold
//! at the least loss by these.

use std::collections::BTreeMap;

use attn_core::{Merge, Merged, Model, Moments, Refitted, StreamedRefit, merge_kv};
use attn_data::batch::{Encoded, Masking};
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use crate::{
    allocate::{Budget, Cost, Offer, allocate},
    divergence::{Divergence, divergence},
    error::Result,
    language::N_RESAMPLES,
    rows::{Batching, Progress, for_each_batch, to_input},
    stats::{Interval, StatsError, bootstrap_ratio},
};

/// Text, and how it is read.
#[derive(Debug, Clone, Copy)]
pub struct Text<'a> {
    /// Its rows.
    pub rows: &'a [Encoded],
    /// What is hidden from a masked language model where predictions are compared, and the seed of it.
    pub masking: Option<(&'a Masking, u64)>,
    /// How rows share a pass.
    pub batching: Batching,
}

/// What goes into the layers `layers` of `model` over the text.
///
/// # Errors
///
/// As [`Moments::add`], and [`Error::Stopped`](crate::Error::Stopped) where `progress` says so.
pub fn moments(
    model: &Model,
    layers: &[usize],
    text: &Text<'_>,
    progress: &mut Progress<'_>,
) -> Result<Moments> {
    let mut moments = Moments::of_layers(layers);
    for_each_batch(model, text.rows, &text.batching, progress, |_, batch| {
        Ok(moments.add(model, &to_input(&batch, model))?)
    })?;
    Ok(moments)
}

/// A model with other key/value heads, and what became of its layers.
#[derive(Debug)]
pub struct Converted {
    /// The model; what was not changed shares its memory with the one it was made of.
    pub model: Model,
    /// The layers that have fewer or more heads.
    pub merged: Vec<Merged>,
    /// Their output projections, where they were fitted anew.
    pub refitted: Vec<Refitted>,
}

/// `whole` with so many key/value heads in each of the layers `wanted`, by `method`; with a `ridge`, the output projections of layers
/// that have lost heads are fitted to the text.
///
/// # Errors
///
/// As [`merge_kv`], [`StreamedRefit::add`] and [`StreamedRefit::finish`].
pub fn convert(
    whole: &Model,
    wanted: &[(usize, i64)],
    (method, moments): (Merge, Option<&Moments>),
    refit: Option<(f64, &Text<'_>)>,
    progress: &mut Progress<'_>,
) -> Result<Converted> {
    let mut model = whole.alias()?;
    let merged = merge_kv(&mut model, wanted, method, moments)?;
    let fewer: Vec<usize> = merged
        .iter()
        .map(|it| it.layer)
        .filter(|&layer| n_kv_heads(&model, layer) < n_kv_heads(whole, layer))
        .collect();
    let mut refitted = Vec::new();
    if let Some((ridge, text)) = refit.filter(|_| !fewer.is_empty()) {
        let mut fit = StreamedRefit::new(&model, &fewer);
        for_each_batch(whole, text.rows, &text.batching, progress, |_, batch| {
            Ok(fit.add(&model, whole, &to_input(&batch, whole))?)
        })?;
        refitted = fit.finish(&model, ridge)?;
    }
    Ok(Converted { model, merged, refitted })
}

/// Draws rows of a text while it goes by: some to compare models on and others to read, and holds no more of it than these.
#[derive(Debug)]
pub struct SetApart {
    /// The most tokens of both.
    most: [usize; 2],
    n_tokens: usize,
    apart: Drawn,
    read: Drawn,
}

impl SetApart {
    /// For rows of `tokens` each at most: to compare on, a quarter of the text at most and the same rows whatever the seed; and to read,
    /// one at least if there is one, drawn from the rest by the seed.
    pub fn new(tokens: [usize; 2], seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(1); // other numbers than those of the rows set apart
        let apart = Drawn::new(ChaCha8Rng::seed_from_u64(0));
        Self { most: tokens, n_tokens: 0, apart, read: Drawn::new(rng) }
    }

    /// Takes the next row.
    pub fn add(&mut self, row: Encoded) {
        self.n_tokens += row.ids.len();
        // Each has its place in both orders, wherever it ends.
        let places = [self.apart.rng.next_u64(), self.read.rng.next_u64()];
        self.apart.put(places, row);
        while let Some((places, row)) = self.apart.pop_beyond(self.most[0]) {
            self.read.put([places[1], places[0]], row);
        }
        while self.read.pop_beyond(self.most[1]).is_some() {}
    }

    /// The rows to compare on, and the rows to read.
    pub fn finish(mut self) -> [Vec<Encoded>; 2] {
        let quarter = self.most[0].min(self.n_tokens / 4);
        while self.apart.n_tokens > quarter {
            let Some((places, row)) = self.apart.pop() else { break };
            self.read.put([places[1], places[0]], row);
        }
        while self.read.n_tokens > self.most[1] && self.read.rows.len() > 1 {
            self.read.pop();
        }
        [self.apart, self.read].map(|drawn| drawn.rows.into_values().collect())
    }
}

/// Rows in an order drawn at random: by their first number, then by another.
#[derive(Debug)]
struct Drawn {
    rng: ChaCha8Rng,
    rows: BTreeMap<[u64; 2], Encoded>,
    n_tokens: usize,
}

impl Drawn {
    fn new(rng: ChaCha8Rng) -> Self {
        Self { rng, rows: BTreeMap::new(), n_tokens: 0 }
    }

    fn put(&mut self, places: [u64; 2], row: Encoded) {
        self.n_tokens += row.ids.len();
        self.rows.insert(places, row);
    }

    /// Takes the last row.
    fn pop(&mut self) -> Option<([u64; 2], Encoded)> {
        let last = self.rows.pop_last()?;
        self.n_tokens -= last.1.ids.len();
        Some(last)
    }

    /// Takes the last row if those before it are of `most` tokens or more, so that it can be none of the first `most`.
    fn pop_beyond(&mut self, most: usize) -> Option<([u64; 2], Encoded)> {
        let (_, last) = self.rows.last_key_value()?;
        let is_beyond = self.rows.len() > 1 && self.n_tokens - last.ids.len() >= most;
        if is_beyond { self.pop() } else { None }
    }
}

/// The 95 % interval of what the KL of one model is above that of another, over the same rows ([`Divergence::kl_by_row`]), drawn again
/// together.
///
/// # Errors
///
/// If there are no rows, or other rows on one side.
pub fn kl_difference(first: &[(f64, f64)], second: &[(f64, f64)]) -> Result<Interval, StatsError> {
    if first.len() != second.len() {
        return Err(StatsError::Unpaired { n_first: first.len(), n_second: second.len() });
    }
    let apart: Vec<f64> = first.iter().zip(second).map(|(a, b)| a.0 - b.0).collect();
    let counts: Vec<f64> = first.iter().map(|row| row.1).collect();
    bootstrap_ratio(&apart, &counts, 0.95, N_RESAMPLES, 0)
}

/// One layer with another number of key/value heads, all others as they were.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct WithHeads {
    /// Key/value heads of the layer.
    pub n_kv_heads: i64,
    /// KL(model ‖ changed), mean over tokens, in nats; 0 for the layer as it is.
    pub kl_nats_per_token: f64,
    /// Its 95 % interval, as [`Divergence::kl_interval_95`]. Absent where nothing was measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kl_interval_95: Option<Interval>,
    /// Bytes that the layer keeps of a token.
    pub cache_bytes: u64,
}

/// What each of the layers `layers` loses by each of its `candidates`, and as it is first. Nothing is fitted.
///
/// `progress` is told of rows, those of the text a candidate.
///
/// # Errors
///
/// As [`convert`] and [`divergence()`].
pub fn kv_sensitivity(
    whole: &Model,
    candidates: &[(usize, Vec<i64>)],
    (method, moments): (Merge, Option<&Moments>),
    text: &Text<'_>,
    bytes_per_value: usize,
    progress: &mut Progress<'_>,
) -> Result<Vec<Vec<WithHeads>>> {
    let mut n_done = 0;
    let mut of_layer = |(layer, candidates): &(usize, Vec<i64>)| -> Result<Vec<WithHeads>> {
        let dims = whole.layers()[*layer].dims();
        let bytes = |n: i64| cache_bytes(n, dims.head_dim, bytes_per_value);
        let n_kv_heads = dims.n_kv_heads;
        let mut all = vec![WithHeads {
            n_kv_heads,
            kl_nats_per_token: 0.0,
            kl_interval_95: None,
            cache_bytes: bytes(n_kv_heads),
        }];
        for &n_kv_heads in candidates {
            let (changed, mut silent) =
                ([(*layer, n_kv_heads)], |_| std::ops::ControlFlow::Continue(()));
            let made = convert(whole, &changed, (method, moments), None, &mut silent)?;
            let found = against(whole, &made.model, text, &mut |n| progress(n_done + n))?;
            n_done += text.rows.len();
            all.push(WithHeads {
                n_kv_heads,
                kl_nats_per_token: found.kl_nats_per_token,
                kl_interval_95: Some(found.kl_interval_95),
                cache_bytes: bytes(n_kv_heads),
            });
        }
        Ok(all)
    };
    candidates.iter().map(&mut of_layer).collect()
}

/// How far `model` is from `whole` on a text.
///
/// # Errors
///
/// As [`divergence()`].
pub fn against(
    whole: &Model,
    model: &Model,
    text: &Text<'_>,
    progress: &mut Progress<'_>,
) -> Result<Divergence> {
    divergence(model, whole, text.rows, text.masking, &text.batching, progress)
}

/// The numbers of heads, one of each layer's, that cost at most so many bytes a token and lose the least, as if what layers lose added up.
///
/// # Errors
///
/// As [`allocate`].
pub fn choose_kv_heads(layers: &[Vec<WithHeads>], most_bytes: u64) -> Result<Vec<i64>> {
    let offers: Vec<Vec<Offer>> = layers
        .iter()
        .map(|layer| {
            let offer = |it: &WithHeads| Offer { kl: it.kl_nats_per_token, cost: it.cache_bytes };
            layer.iter().map(offer).collect()
        })
        .collect();
    let chosen = allocate(&offers, Budget { cost: Cost::StateBytes, most: most_bytes })?;
    Ok(layers.iter().zip(chosen).map(|(layer, at)| layer[at].n_kv_heads).collect())
}

/// Bytes of the keys and values of one token.
pub fn cache_bytes(n_kv_heads: i64, head_dim: i64, bytes_per_value: usize) -> u64 {
    2 * (n_kv_heads * head_dim).unsigned_abs() * bytes_per_value as u64
}

fn n_kv_heads(model: &Model, layer: usize) -> i64 {
    model.layers()[layer].dims().n_kv_heads
}
