//! Activation patching: which heads carry what tells two prompts apart.
//!
//! ```text
//! m(p)          ln p(right) − ln p(wrong) at the place asked about, prompt p
//! denoising_h   [m(corrupted, z_h of clean) − m(corrupted)] / [m(clean) − m(corrupted)]
//! noising_h     [m(clean) − m(clean, z_h of corrupted)]     / [m(clean) − m(corrupted)]
//! ```
//!
//! 1 where the head alone brings all of the difference back (denoising) or takes it away (noising), 0 where it does nothing.
//! Heimersheim and Nanda 2024, "How to use and interpret activation patching", <https://arxiv.org/abs/2404.15255>; Wang et al. 2022,
//! <https://arxiv.org/abs/2211.00593>. z_h is the head's output before the output projection, of all positions or of one; both
//! prompts have the same number of tokens, position for position.

use attn_core::{Fill, ForwardOptions, Gate, Model, ModelInput, Running, config};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::error::{Error, Result};

/// What is patched.
#[derive(Debug, Clone)]
pub struct Prompts<'a> {
    /// Token ids of the prompt that has the right answer.
    pub clean: &'a [u32],
    /// As many ids of the one that has the wrong answer.
    pub corrupted: &'a [u32],
    /// Where the answer is asked for: the place whose logits predict it.
    pub at: usize,
    /// The token that is right in the clean prompt.
    pub right: i64,
    /// The one that is right in the corrupted prompt.
    pub wrong: i64,
}

/// What is patched at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Patching {
    /// A head at all positions.
    Heads,
    /// A head at one position.
    Positions,
}

/// What patching found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Patched {
    /// ln p(right) − ln p(wrong) of the clean prompt, in nats.
    pub clean: f64,
    /// Of the corrupted one.
    pub corrupted: f64,
    /// Layers × heads × positions (one where heads are patched whole): share of the difference that the clean head brings back.
    pub denoising: Vec<Vec<Vec<f64>>>,
    /// Share of it that the corrupted head takes away.
    pub noising: Vec<Vec<Vec<f64>>>,
}

/// Most positions of a pass.
const MAX_TOKENS: usize = 4096;

/// Patches every head of `model` between two prompts, both ways.
///
/// # Errors
///
/// [`Error::Head`] for a model without a vocabulary to answer in, [`Error::Prompts`] for prompts of other lengths, an answer that is
/// asked for behind them, tokens that are not there, or prompts between which there is nothing to tell; what the model refuses.
pub fn patch(model: &Model, prompts: &Prompts<'_>, patching: Patching) -> Result<Patched> {
    let config = model.config();
    if config.head != config::Head::LanguageModel {
        return Err(Error::Head {
            measure: "an answer to a prompt",
            found: config.head,
            expected: "a language-model head",
            hint: "patch the language model that the classifier was made of",
        });
    }
    let Prompts { clean, corrupted, at, right, wrong } = *prompts;
    let refuse = |problem: String| Err(Error::Prompts(problem));
    if clean.len() != corrupted.len() {
        return refuse(format!(
            "have {} and {} tokens, expected as many: positions are patched one for one\nhint: swap names or words for others of as \
             many tokens",
            clean.len(),
            corrupted.len()
        ));
    }
    if at >= clean.len() {
        return refuse(format!(
            "have {} tokens, and the answer is asked for at place {at}",
            clean.len()
        ));
    }
    let vocab_size = config.sizes.vocab_size;
    if let Some(id) = [right, wrong].into_iter().find(|id| !(0..vocab_size).contains(id)) {
        return refuse(format!("have the answer {id}, and the vocabulary {vocab_size} tokens"));
    }
    if right == wrong {
        return refuse(format!("have one answer, token {right}: there is nothing to tell apart"));
    }
    let _no_grad = tch::no_grad_guard();
    let place = Tensor::from_slice(&[at as i64]);
    let options = ForwardOptions { logits_at: Some(&place), ..ForwardOptions::default() };
    let input = |ids: &[u32]| {
        let ids: Vec<i64> = ids.iter().map(|&id| id.into()).collect();
        ModelInput::new(Tensor::from_slice(&ids).view([1, -1]))
    };
    let way = |ids: &[u32]| -> Result<Way<'_>> {
        let mut running = model.begin(&input(ids), &options)?;
        let (mut before, mut z) = (Vec::new(), Vec::new());
        for _ in model.layers() {
            before.push(running.fork());
            z.push(running.advance_with_z(None)?);
        }
        let measured = measure(&running.finish()?, [right, wrong])[0];
        Ok(Way { before, z, measured })
    };
    let (one, other) = (way(clean)?, way(corrupted)?);
    let difference = one.measured - other.measured;
    if !difference.is_finite() {
        return Err(Error::NotFinite { index: 0 });
    }
    if difference == 0.0 {
        return refuse(
            "are all the same to the model: there is no difference to bring back".into(),
        );
    }
    let run = |base: &Way<'_>, donor: &Way<'_>| -> Result<Vec<Vec<Vec<f64>>>> {
        let layers = 0..model.layers().len();
        layers.map(|layer| of_layer(base, donor, layer, patching, [right, wrong])).collect()
    };
    let share = |all: Vec<Vec<Vec<f64>>>, of: &dyn Fn(f64) -> f64| -> Vec<Vec<Vec<f64>>> {
        let heads = |layer: Vec<Vec<f64>>| {
            layer.into_iter().map(|head| head.into_iter().map(of).collect()).collect()
        };
        all.into_iter().map(heads).collect()
    };
    let denoised = run(&other, &one)?;
    let noised = run(&one, &other)?;
    Ok(Patched {
        clean: one.measured,
        corrupted: other.measured,
        denoising: share(denoised, &|m| (m - other.measured) / difference),
        noising: share(noised, &|m| (one.measured - m) / difference),
    })
}

/// A prompt through the model.
struct Way<'m> {
    /// In front of each layer.
    before: Vec<Running<'m>>,
    /// `[1, n_heads, n, head_dim]` a layer.
    z: Vec<Tensor>,
    measured: f64,
}

/// The measure of `base` with each head of `layer` taken from `donor`: heads × positions.
fn of_layer(
    base: &Way<'_>,
    donor: &Way<'_>,
    layer: usize,
    patching: Patching,
    answers: [i64; 2],
) -> Result<Vec<Vec<f64>>> {
    let [_, n_heads, n, _] = donor.z[layer].size()[..] else { unreachable!("z has four axes") };
    let per_head = match patching {
        Patching::Heads => 1,
        Patching::Positions => n,
    };
    let mut found = Vec::new();
    let all: Vec<i64> = (0..n_heads * per_head).collect();
    for some in all.chunks((MAX_TOKENS / n as usize).max(1)) {
        let fan = some.len() as i64;
        let z = &donor.z[layer];
        let open = Tensor::ones([fan, n_heads, n, 1], (z.kind(), z.device()));
        for (copy, &one) in (0..).zip(some) {
            let of_head = open.get(copy).get(one / per_head);
            let _ = match patching {
                Patching::Heads => of_head,
                Patching::Positions => of_head.narrow(0, one % per_head, 1),
            }
            .fill_(0.0);
        }
        let gate = Gate { g: open, fill: Fill::Values(z.shallow_clone()) };
        let logits = base.before[layer].branch(fan, &gate)?.finish()?;
        found.extend(measure(&logits, answers));
    }
    Ok(found.chunks(per_head as usize).map(<[f64]>::to_vec).collect())
}

/// ln p(right) − ln p(wrong) of each row of `[n, vocab_size]`: what all logits share cancels.
fn measure(logits: &Tensor, [right, wrong]: [i64; 2]) -> Vec<f64> {
    let logits = logits.to_kind(Kind::Double);
    Vec::try_from(logits.select(1, right) - logits.select(1, wrong)).expect("one axis of f64")
}
