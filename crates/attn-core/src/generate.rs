//! Text generation: one token after another, each chosen from the model's prediction.
//!
//! The order of operations and their edge cases are those of transformers' `generate`, so that greedy output equals
//! its, token for token: repetition penalty, temperature, top-k, top-p, then a draw.

use std::{collections::BTreeSet, ops::ControlFlow};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::{
    Error,
    attention::Stream,
    gate::Gate,
    model::{ForwardOptions, Model, ModelInput},
};

/// How the next token is chosen from the logits.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sampling {
    /// What logits are divided by before the softmax; 0 takes the likeliest token (greedy).
    pub temperature: f64,
    /// The likeliest tokens that are kept, those as likely as the last of them included; absent: all.
    pub top_k: Option<usize>,
    /// The share of probability that the kept tokens, likeliest first, must reach; 1 keeps all.
    ///
    /// Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", <https://arxiv.org/abs/1904.09751>.
    pub top_p: f64,
    /// Logits of tokens that have occurred, the prompt's included, are divided by this where positive and multiplied
    /// where negative; 1 changes nothing.
    ///
    /// Keskar et al. 2019, "CTRL", <https://arxiv.org/abs/1909.05858>, section 4.1; for negative logits as transformers.
    pub repetition_penalty: f64,
    /// Seed of the draws.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: None, top_p: 1.0, repetition_penalty: 1.0, seed: 0 }
    }
}

impl Sampling {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::Sampling`] with the first one out of range.
    pub fn validate(&self) -> Result<(), Error> {
        let refuse = |field, value: f64, expected| {
            Err(Error::Sampling { field, value: value.to_string(), expected })
        };
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return refuse("temperature", self.temperature, "a number of at least 0 (0: greedy)");
        }
        if self.top_k == Some(0) {
            return refuse("top_k", 0.0, "at least 1");
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return refuse("top_p", self.top_p, "a share above 0, at most 1");
        }
        // As it is used: logits are of f32.
        let penalty = self.repetition_penalty as f32;
        if !(penalty.is_finite() && penalty > 0.0) {
            return refuse("repetition_penalty", self.repetition_penalty, "a number above 0");
        }
        Ok(())
    }

    /// Chooses from `logits`, one a token of the vocabulary, given the ids that have occurred.
    fn choose(&self, logits: &mut [f32], seen: &[i64], rng: &mut ChaCha8Rng) -> i64 {
        self.penalize(logits, seen);
        if self.temperature == 0.0 {
            return likeliest(logits);
        }
        draw(&self.kept(logits), rng)
    }

    fn penalize(&self, logits: &mut [f32], seen: &[i64]) {
        if self.repetition_penalty == 1.0 {
            return;
        }
        let penalty = self.repetition_penalty as f32;
        let mut seen = seen.to_vec();
        seen.sort_unstable();
        seen.dedup();
        for id in seen {
            let logit = &mut logits[id as usize];
            *logit = if *logit < 0.0 { *logit * penalty } else { *logit / penalty };
        }
    }

    /// The tokens that may be drawn with their weights (not normalized), likeliest first.
    fn kept(&self, logits: &[f32]) -> Vec<(i64, f64)> {
        let mut ranked: Vec<(i64, f32)> = (0..).zip(logits.iter().copied()).collect();
        // Stable: among equals the smaller id comes first.
        ranked.sort_by(|a, b| b.1.total_cmp(&a.1));
        if let Some(k) = self.top_k.filter(|&k| k < ranked.len()) {
            let bar = ranked[k - 1].1;
            ranked.retain(|&(_, logit)| logit >= bar);
        }
        let highest = ranked[0].1;
        // Below the highest first: no temperature is then too low.
        let weight = |logit: f32| (f64::from(logit - highest) / self.temperature).exp();
        let mut weighted: Vec<(i64, f64)> =
            ranked.iter().map(|&(id, logit)| (id, weight(logit))).collect();
        if self.top_p < 1.0 {
            let total: f64 = weighted.iter().map(|(_, weight)| weight).sum();
            let mut before = 0.0;
            // The token that crosses the bar is kept.
            weighted.retain(|(_, weight)| {
                let keep = before < self.top_p * total;
                before += weight;
                keep
            });
        }
        weighted
    }
}

/// The index of the largest logit, the first of several.
fn likeliest(logits: &[f32]) -> i64 {
    let mut best = 0;
    for (id, &logit) in logits.iter().enumerate() {
        if logit > logits[best] {
            best = id;
        }
    }
    best as i64
}

/// Draws one of `weighted` in proportion to its weight.
fn draw(weighted: &[(i64, f64)], rng: &mut ChaCha8Rng) -> i64 {
    let total: f64 = weighted.iter().map(|(_, weight)| weight).sum();
    let mut left = rng.random::<f64>() * total;
    for &(id, weight) in weighted {
        left -= weight;
        if left < 0.0 {
            return id;
        }
    }
    // Rounding may leave a trace: the last one with any weight.
    weighted.iter().rev().find(|(_, weight)| *weight > 0.0).unwrap_or(&weighted[0]).0
}

/// When generation ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Most tokens to generate for a row.
    pub max_new_tokens: usize,
    /// A row ends with the first of these; it is part of the row.
    pub stop_ids: Vec<i64>,
}

/// How a row ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Ending {
    /// One of the stop ids came.
    StopId,
    /// All tokens allowed were generated.
    Length,
    /// The caller said so.
    Caller,
}

/// One generated row, without its prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Generated {
    /// The new tokens.
    pub ids: Vec<i64>,
    /// Why there are no more.
    pub ending: Ending,
}

/// Goes on from `prompts`, ids each; `on_token` sees each new token of each row (row, id) and may end that row.
///
/// All rows are one batch, shorter ones padded on the left; where an attention kind cannot decode a padded batch, rows of one
/// length are. Row r draws from its own stream of random numbers, (seed, r), so
/// that a row does not depend on its neighbours. Keys and values are kept between steps as each layer's attention kind
/// does it.
///
/// # Errors
/// [`Error::Input`] for an empty prompt, an encoder, or a model whose position table is too short for prompt and new
/// tokens together; [`Error::Sampling`].
pub fn generate(
    model: &Model,
    prompts: &[Vec<i64>],
    sampling: &Sampling,
    limits: &Limits,
    on_token: &mut dyn FnMut(usize, i64) -> ControlFlow<()>,
) -> Result<Vec<Generated>, Error> {
    generate_gated(model, prompts, sampling, limits, &[], on_token)
}

/// As [`generate`], with `gates` at the heads in every step, the reading of the prompt included: as
/// [`ForwardOptions::gates`], the same for each row.
///
/// # Errors
/// As [`generate`]; [`Error::Input`] for gates that do not fit.
pub fn generate_gated(
    model: &Model,
    prompts: &[Vec<i64>],
    sampling: &Sampling,
    limits: &Limits,
    gates: &[Option<Gate>],
    on_token: &mut dyn FnMut(usize, i64) -> ControlFlow<()>,
) -> Result<Vec<Generated>, Error> {
    sampling.validate()?;
    check(model, prompts, limits)?;
    let _no_grad = tch::no_grad_guard();
    let mut rows: Vec<Row> =
        prompts.iter().enumerate().map(|(i, prompt)| Row::new(i, prompt, sampling)).collect();
    if model.layers().iter().all(|layer| layer.decodes_padded()) {
        write_on(model, rows.iter_mut().collect(), sampling, limits, gates, on_token)?;
    } else {
        let lengths: BTreeSet<usize> = prompts.iter().map(Vec::len).collect();
        for length in lengths {
            let alike = rows.iter_mut().filter(|row| row.n_prompt == length).collect();
            write_on(model, alike, sampling, limits, gates, on_token)?;
        }
    }
    Ok(rows.into_iter().map(Row::finish).collect())
}

/// Writes `rows` on as one batch.
fn write_on(
    model: &Model,
    mut rows: Vec<&mut Row>,
    sampling: &Sampling,
    limits: &Limits,
    gates: &[Option<Gate>],
    on_token: &mut dyn FnMut(usize, i64) -> ControlFlow<()>,
) -> Result<(), Error> {
    let mut state = model.start();
    let mut next = padded(&rows.iter().map(|row| row.ids.as_slice()).collect::<Vec<_>>());
    for n_done in 0..limits.max_new_tokens {
        let places = last_places(&next.input_ids);
        let options = ForwardOptions {
            logits_at: Some(&places),
            gates,
            stream: Stream { seed: sampling.seed, step: n_done as u64, layer: 0 },
            ..ForwardOptions::default()
        };
        let logits = model.step(&next, &mut state, &options)?.logits; // [rows, vocab_size]
        let mut logits = to_vec(&logits);
        let vocab_size = logits.len() / rows.len();
        for (row, logits) in rows.iter_mut().zip(logits.chunks_mut(vocab_size)) {
            if row.ending.is_some() {
                continue;
            }
            // One of no use is -inf; where all are, or one is no number, there is nothing to choose by.
            if logits.iter().any(|logit| logit.is_nan() || *logit == f32::INFINITY)
                || logits.iter().all(|logit| *logit == f32::NEG_INFINITY)
            {
                return Err(Error::NotFinite { row: row.number, token: n_done });
            }
            let id = sampling.choose(logits, &row.ids, &mut row.rng);
            row.ids.push(id);
            let ended = on_token(row.number, id).is_break();
            row.ending = if limits.stop_ids.contains(&id) {
                Some(Ending::StopId)
            } else {
                ended.then_some(Ending::Caller)
            };
        }
        if rows.iter().all(|row| row.ending.is_some()) {
            break;
        }
        // A row that has ended repeats its last token, which nobody reads.
        let last: Vec<i64> = rows.iter().map(|row| row.ids[row.ids.len() - 1]).collect();
        next = ModelInput::new(Tensor::from_slice(&last).unsqueeze(1));
    }
    Ok(())
}

struct Row {
    number: usize,
    /// The prompt's, then the new ones.
    ids: Vec<i64>,
    n_prompt: usize,
    ending: Option<Ending>,
    rng: ChaCha8Rng,
}

impl Row {
    fn new(number: usize, prompt: &[i64], sampling: &Sampling) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(sampling.seed);
        rng.set_stream(number as u64);
        Self { number, ids: prompt.to_vec(), n_prompt: prompt.len(), ending: None, rng }
    }

    fn finish(self) -> Generated {
        Generated {
            ids: self.ids[self.n_prompt..].to_vec(),
            ending: self.ending.unwrap_or(Ending::Length),
        }
    }
}

fn check(model: &Model, prompts: &[Vec<i64>], limits: &Limits) -> Result<(), Error> {
    let refuse = |problem: String| Err(Error::Input { name: "prompt", problem });
    if !model.config().is_causal() {
        let base = model.config().base_model_type();
        return refuse(format!(
            "nothing can be written on from it: a {base} is an encoder, it has no next token\nhint: name a decoder, such as \
             GPT-2 or Llama"
        ));
    }
    if prompts.is_empty() {
        return refuse("there is none".into());
    }
    if let Some(row) = prompts.iter().position(Vec::is_empty) {
        return refuse(format!(
            "row {row} has no token\nhint: begin with the tokenizer's start or end-of-text token"
        ));
    }
    if model.config().head != crate::config::Head::LanguageModel {
        return refuse(format!(
            "the model ends in {}, which predicts no token",
            model.config().head
        ));
    }
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
    // The last token is predicted, never read.
    let n_read = longest.saturating_add(limits.max_new_tokens.saturating_sub(1));
    match model.config().sizes.position_table {
        Some(rows) if i64::try_from(n_read).is_ok_and(|n| n <= rows) => Ok(()),
        Some(rows) => refuse(format!(
            "{longest} tokens and {} new ones do not fit the model's {rows} positions\nhint: at most {} new tokens",
            limits.max_new_tokens,
            (rows - longest as i64 + 1).max(0)
        )),
        None => Ok(()),
    }
}

/// The prompts as one batch, shorter ones padded on the left.
fn padded(prompts: &[&[i64]]) -> ModelInput {
    let longest = prompts.iter().map(|prompt| prompt.len()).max().unwrap_or(0);
    let fill = |prompt: &[i64], value: &dyn Fn(i64) -> i64| -> Vec<i64> {
        let padding = std::iter::repeat_n(0, longest - prompt.len());
        padding.chain(prompt.iter().map(|&id| value(id))).collect()
    };
    let matrix = |value: &dyn Fn(i64) -> i64| {
        let values: Vec<i64> = prompts.iter().flat_map(|prompt| fill(prompt, value)).collect();
        Tensor::from_slice(&values).view([prompts.len() as i64, longest as i64])
    };
    let ids = matrix(&|id| id);
    match prompts.iter().all(|prompt| prompt.len() == longest) {
        true => ModelInput::new(ids),
        false => ModelInput::masked(ids, matrix(&|_| 1)),
    }
}

/// The flat places of each row's last token.
fn last_places(ids: &Tensor) -> Tensor {
    let [rows, cols] = ids.size()[..] else { unreachable!("ids have two axes") };
    Tensor::arange(rows, (Kind::Int64, Device::Cpu)) * cols + (cols - 1)
}

fn to_vec(logits: &Tensor) -> Vec<f32> {
    let flat = logits.to_device(Device::Cpu).to_kind(Kind::Float).contiguous().view(-1);
    let mut values = vec![0.0; flat.numel()];
    flat.copy_data(&mut values, flat.numel());
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(sampling: &Sampling, logits: &[f32]) -> Vec<i64> {
        sampling.kept(logits).into_iter().map(|(id, _)| id).collect()
    }

    #[test]
    fn greedy_takes_the_likeliest_and_the_first_of_several() {
        assert_eq!(likeliest(&[0.0, 3.0, 3.0, -1.0]), 1);
    }

    #[test]
    fn top_k_keeps_what_is_as_likely_as_the_last() {
        let top = |k| Sampling { temperature: 1.0, top_k: Some(k), ..Sampling::default() };
        let logits = [1.0, 4.0, 2.0, 2.0, 0.0];
        assert_eq!(kept(&top(1), &logits), [1]);
        assert_eq!(kept(&top(2), &logits), [1, 2, 3]);
        assert_eq!(kept(&top(9), &logits), [1, 2, 3, 0, 4]);
    }

    #[test]
    fn top_p_keeps_the_token_that_crosses_the_bar() {
        let top = |p| Sampling { temperature: 1.0, top_p: p, ..Sampling::default() };
        // Probabilities 0.5, 0.3, 0.2.
        let logits = [0.2_f32.ln(), 0.5_f32.ln(), 0.3_f32.ln()];
        assert_eq!(kept(&top(0.45), &logits), [1]);
        assert_eq!(kept(&top(0.55), &logits), [1, 2]);
        assert_eq!(kept(&top(0.79), &logits), [1, 2]);
        assert_eq!(kept(&top(0.81), &logits), [1, 2, 0]);
        assert_eq!(kept(&top(1e-9), &logits), [1], "one token is always kept");
    }

    #[test]
    fn what_has_occurred_becomes_less_likely_once() {
        let sampling = Sampling { repetition_penalty: 2.0, ..Sampling::default() };
        let mut logits = [3.0, -3.0, 1.0];
        sampling.penalize(&mut logits, &[0, 1, 0]);
        assert_eq!(logits, [1.5, -6.0, 1.0]);
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let weighted = [(7, 6.0), (3, 3.0), (9, 0.0), (1, 1.0)];
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        let n = 20_000;
        let mut counts = std::collections::BTreeMap::new();
        for _ in 0..n {
            *counts.entry(draw(&weighted, &mut rng)).or_insert(0) += 1;
        }
        assert!(!counts.contains_key(&9));
        for (id, share) in [(7, 0.6), (3, 0.3), (1, 0.1)] {
            let found = f64::from(counts[&id]) / f64::from(n);
            assert!((found - share).abs() < 0.015, "{id}: {found}"); // four standard errors
        }
    }

    #[test]
    fn settings_out_of_range_are_named() {
        let d = Sampling::default;
        let wrong = [
            ("temperature", Sampling { temperature: -1.0, ..d() }),
            ("temperature", Sampling { temperature: f64::NAN, ..d() }),
            ("top_k", Sampling { top_k: Some(0), ..d() }),
            ("top_p", Sampling { top_p: 0.0, ..d() }),
            ("top_p", Sampling { top_p: 1.1, ..d() }),
            ("repetition_penalty", Sampling { repetition_penalty: 0.0, ..d() }),
            ("repetition_penalty", Sampling { repetition_penalty: 1e-300, ..d() }),
        ];
        for (name, sampling) in wrong {
            match sampling.validate() {
                Err(Error::Sampling { field, .. }) => assert_eq!(field, name),
                other => panic!("{name}: {other:?}"),
            }
        }
        d().validate().unwrap();
    }
}
