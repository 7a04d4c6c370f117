//! What each layer loses under another attention, and what it saves.
//!
//! ```text
//! kl(l, c) = mean over tokens of KL(p ‖ p_lc)
//! ```
//!
//! p are the model's predictions, p_lc those of the model in which layer l alone has attention c, weights as they are.
//! [`allocate`](crate::allocate()) adds these numbers up, as if what layers lose did not meet: where a mixture really is,
//! [`divergence()`] says.

use std::ops::ControlFlow;

use attn_core::{Model, Variant};
use attn_data::batch::{Encoded, Masking};
use serde::{Deserialize, Serialize};

use crate::{
    allocate::{Budget, Cost},
    cost::StateBytes,
    divergence::divergence,
    error::{Error, Result},
    rows::{Batching, Progress},
    stats::Interval,
};

/// How layers are tried.
#[derive(Debug, Clone, Copy)]
pub struct Probing<'a> {
    /// Text that predictions are compared on.
    pub rows: &'a [Encoded],
    /// What is hidden from a masked language model, and the seed of it.
    pub masking: Option<(&'a Masking, u64)>,
    /// The length, in tokens, at which cost is counted.
    pub n_tokens: i64,
    /// Seed of what a kind adds and draws.
    pub seed: u64,
    /// How rows share a pass.
    pub batching: Batching,
    /// What the cheapest candidates have to meet, or nothing is measured.
    pub budget: Option<Budget>,
}

/// One layer under one attention, all others as they were.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Swapped {
    /// The layer's attention.
    pub attention: Variant,
    /// KL(model ‖ swapped), mean over tokens, in nats; 0 for the layer as it was.
    pub kl_nats_per_token: f64,
    /// Its 95 % interval, as [`Divergence::kl_interval_95`](crate::Divergence::kl_interval_95).
    pub kl_interval_95: Interval,
    /// Floating point operations of the layer's attention over [`Probing::n_tokens`] tokens, from q, k and v to z.
    pub flops: u64,
    /// Bytes that the layer keeps in decoding after so many tokens; of causal models alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state_bytes: Option<u64>,
}

impl Swapped {
    /// What it costs.
    ///
    /// # Errors
    ///
    /// [`Error::Direction`] for a decoding state of an encoder.
    pub fn cost(&self, cost: Cost) -> Result<u64> {
        match cost {
            Cost::Flops => Ok(self.flops),
            Cost::StateBytes => self.state_bytes.ok_or(Error::Direction {
                model_type: "masked language model",
                what: "token by token: there is no decoding state to be cut",
                hint: "give a budget of flops",
            }),
        }
    }
}

/// Tries each of `candidates[layer]` in that layer of `model`, the others untouched. In the result the layer as it is comes
/// first, and then its candidates in their order.
///
/// `progress` is told of rows, [`Probing::rows`] a candidate and layer.
///
/// # Errors
///
/// [`Error::Model`] where a layer refuses a candidate, [`Error::Budget`] where even the cheapest do not meet
/// [`Probing::budget`], and as [`divergence()`].
///
/// # Panics
///
/// Where there are not as many lists of candidates as layers.
pub fn sensitivity(
    model: &Model,
    candidates: &[Vec<Variant>],
    probing: &Probing<'_>,
    progress: &mut Progress<'_>,
) -> Result<Vec<Vec<Swapped>>> {
    assert_eq!(candidates.len(), model.layers().len(), "a list of candidates a layer");
    // What cannot be, or costs too much, is refused before anything is measured.
    let mut known = StateBytes::new(probing.n_tokens);
    let mut layers = candidates
        .iter()
        .enumerate()
        .map(|(layer, candidates)| priced(model, layer, candidates, probing, &mut known))
        .collect::<Result<Vec<_>>>()?;
    if let Some(Budget { cost, most }) = probing.budget {
        let mut least = 0;
        for layer in &layers {
            let costs = layer.iter().map(|one| one.cost(cost)).collect::<Result<Vec<_>>>()?;
            least += costs.into_iter().min().unwrap_or(0);
        }
        if least > most {
            return Err(Error::Budget { cost, most, least });
        }
    }
    let mut n_done = 0;
    for (layer, swapped) in layers.iter_mut().enumerate() {
        for one in &mut swapped[1..] {
            let student = with(model, layer, &one.attention, probing)?;
            let mut count = |n: usize| -> ControlFlow<()> { progress(n_done + n) };
            let Probing { rows, masking, batching, .. } = probing;
            let found = divergence(&student, model, rows, *masking, batching, &mut count)?;
            n_done += rows.len();
            one.kl_nats_per_token = found.kl_nats_per_token;
            one.kl_interval_95 = found.kl_interval_95;
        }
    }
    Ok(layers)
}

/// The layer as it is and under each candidate, nothing measured yet.
fn priced(
    model: &Model,
    layer: usize,
    candidates: &[Variant],
    probing: &Probing<'_>,
    known: &mut StateBytes,
) -> Result<Vec<Swapped>> {
    let mut of = |model: &Model| -> Result<Swapped> {
        let it = model.layers()[layer];
        let bytes = model.config().is_causal().then(|| known.of(model, it)).transpose()?;
        Ok(Swapped {
            attention: it.variant().clone(),
            kl_nats_per_token: 0.0,
            kl_interval_95: Interval { low: 0.0, high: 0.0 },
            flops: it.kind().flops(probing.n_tokens).unsigned_abs(),
            state_bytes: bytes.map(|bytes| bytes as u64),
        })
    };
    let mut all = vec![of(model)?];
    for attention in candidates {
        all.push(of(&with(model, layer, attention, probing)?)?);
    }
    Ok(all)
}

/// `model` with another attention in one layer.
fn with(model: &Model, layer: usize, attention: &Variant, probing: &Probing<'_>) -> Result<Model> {
    let mut student = model.alias()?;
    student.swap(&[layer], attention, probing.seed)?;
    Ok(student)
}
