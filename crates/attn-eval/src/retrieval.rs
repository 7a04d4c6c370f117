//! Heads that look up and copy: which of them attend to the needle while a model answers from a long text.
//!
//! A trial is a long text in which a fact is hidden, and a question at its end. The text is read once with the fused
//! kernels; while the model writes its answer, greedily, each head's attention from the newest token to all others is looked
//! at: one row a head and step, so that time and memory grow with the length and not with its square. From the same rows
//! come the scores of [`Read`]; the query-focused score ([`query_focused()`]) looks at the question instead and writes nothing.
//!
//! To add a score: write `retrieval/<name>.rs`, then name it in [`RetrievalScore`].
//!
//! Wu et al. 2024, "Retrieval Head Mechanistically Explains Long-Context Factuality", <https://arxiv.org/abs/2404.15574>,
//! section 2.

mod causal;
mod mass;
mod query_focused;
mod repeats;
mod set;

use std::{ops::ControlFlow, ops::Range};

use attn_core::{
    ForwardOptions, Gate, Model, ModelInput, Rows,
    generate::{Limits, Sampling, generate_gated},
};
use attn_data::batch::BatchPlan;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::{
    error::{Error, Result},
    heads::HeadScores,
    language::check_decoder,
    rouge::{rouge1_recall, says},
    rows::{Batching, Progress},
};

pub use causal::{AnswerScore, Band, MaskFill, band, closed, draw_heads};
pub use query_focused::{Query, query_focused};

/// How heads are scored by what they do with a needle.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RetrievalScore {
    /// The share of the needle's tokens that the head copied, as the paper defines it.
    #[default]
    Retrieval,
    /// How many tokens it copied over those of the needle, repeats counted again: as the paper's code computes it.
    RetrievalRepeats,
    /// The attention that the head pays to the needle while the model answers.
    RetrievalMass,
    /// The attention that the question pays to the needle, less that of a question that asks nothing.
    QueryFocused,
}

/// A question at the end of a long text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trial {
    /// The text and the question, up to the answer.
    pub prompt: Vec<u32>,
    /// The needle's tokens.
    pub needle: Range<usize>,
    /// Where within the needle the answer stands: each place that tells it.
    pub told: Vec<Range<usize>>,
    /// What is expected, as text.
    pub answer: String,
}

/// How answers are written.
#[derive(Clone, Copy)]
pub struct Answering<'a> {
    /// Most tokens of an answer; fewer where a model's table of positions ends before.
    pub max_new_tokens: usize,
    /// Tokens that end one. The first line break behind its first word does, too.
    pub stop_ids: &'a [i64],
    /// Makes text of tokens.
    pub decode: &'a dyn Fn(&[i64]) -> attn_data::Result<String>,
}

/// What a model wrote.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Answered {
    /// Its first line.
    pub response: String,
    /// Share of the words expected that it has ([`rouge1_recall`]).
    pub rouge1_recall: f64,
    /// Whether it has them one after another ([`says`]).
    pub word_match: bool,
}

impl Answered {
    /// Compares what was written with what was expected.
    ///
    /// # Errors
    ///
    /// [`Error::Nothing`] for an expected answer without words.
    pub fn of(expected: &str, response: String) -> Result<Self> {
        let Some(rouge1_recall) = rouge1_recall(expected, &response) else {
            return Err(Error::Nothing("an expected answer has no words"));
        };
        Ok(Self { word_match: says(expected, &response), response, rouge1_recall })
    }
}

/// What heads did while a model answered: a value a head, layer after layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Read {
    /// What was written.
    pub answered: Answered,
    /// [`RetrievalScore::Retrieval`].
    pub set: Vec<f64>,
    /// [`RetrievalScore::RetrievalRepeats`].
    pub repeats: Vec<f64>,
    /// [`RetrievalScore::RetrievalMass`].
    pub mass: Vec<f64>,
}

/// A token that was written, and where heads looked to write it.
#[derive(Debug, Clone, PartialEq)]
struct Step {
    /// The token.
    id: u32,
    /// The token of the text that each head attended to most, layer after layer.
    most: Vec<usize>,
    /// The attention that each paid to the needle.
    mass: Vec<f64>,
}

/// Has `model` answer each of `trials` and scores its heads; one after another, as texts are long.
///
/// What ends an answer is no part of it and scores nothing. Of several tokens that are attended to alike, which one counts as
/// the most is open.
///
/// # Errors
///
/// [`Error::Direction`] for an encoder, [`Error::Head`] for a model without a language-model head, [`Error::Nothing`]
/// where there is no trial, no new token is allowed or an answer has no words, [`Error::Stopped`], and what the model refuses:
/// attention kinds that do not keep the keys of all tokens among it.
///
/// # Panics
///
/// Unless a trial's needle lies within its prompt and each of its places within the needle, none of them empty.
pub fn retrieval(
    model: &Model,
    trials: &[Trial],
    answering: &Answering<'_>,
    progress: &mut Progress<'_>,
) -> Result<Vec<Read>> {
    check_decoder(model.config(), "answers")?;
    if trials.is_empty() || answering.max_new_tokens == 0 {
        return Err(Error::Nothing("no trial was given, or no new token allowed"));
    }
    trials.iter().for_each(check);
    let _no_grad = tch::no_grad_guard();
    let mut reads = Vec::with_capacity(trials.len());
    for trial in trials {
        let (response, steps) = write(model, trial, answering)?;
        let n_heads = n_heads(model);
        reads.push(Read {
            answered: Answered::of(&trial.answer, response)?,
            set: set::scores(trial, &steps, n_heads),
            repeats: repeats::scores(trial, &steps, n_heads),
            mass: mass::scores(&steps, n_heads),
        });
        if progress(reads.len()).is_break() {
            return Err(Error::Stopped { n_done: reads.len(), n_rows: trials.len() });
        }
    }
    Ok(reads)
}

fn check(Trial { prompt, needle, told, .. }: &Trial) {
    assert!(!needle.is_empty() && needle.end <= prompt.len(), "needle {needle:?}");
    let is_within =
        |at: &Range<usize>| !at.is_empty() && needle.start <= at.start && at.end <= needle.end;
    assert!(!told.is_empty() && told.iter().all(is_within), "told at {told:?} in {needle:?}");
}

fn n_heads(model: &Model) -> usize {
    model.layers().iter().map(|layer| layer.dims().n_heads as usize).sum()
}

/// The tokens that may be written behind a prompt. The last one is predicted, never read.
fn room(model: &Model, n_prompt: usize, answering: &Answering<'_>) -> usize {
    let table = model.config().sizes.position_table;
    let fits = table.map_or(usize::MAX, |rows| (rows as usize + 1).saturating_sub(n_prompt));
    answering.max_new_tokens.min(fits.max(1))
}

/// Writes an answer, and says where heads looked for each of its tokens.
fn write(model: &Model, trial: &Trial, answering: &Answering<'_>) -> Result<(String, Vec<Step>)> {
    let mut state = model.start();
    let mut next: Vec<i64> = trial.prompt.iter().map(|&id| id.into()).collect();
    let (mut ids, mut steps) = (Vec::new(), Vec::new());
    for _ in 0..room(model, trial.prompt.len(), answering) {
        let last = next.len() as i64 - 1;
        let at = Tensor::from_slice(&[last]);
        let options = ForwardOptions {
            attentions: Rows::Some(vec![last]),
            logits_at: Some(&at),
            ..ForwardOptions::default()
        };
        let input = ModelInput::new(Tensor::from_slice(&next).unsqueeze(0));
        let output = model.step(&input, &mut state, &options)?;
        if output.logits.isfinite().all().int64_value(&[]) == 0 {
            return Err(attn_core::Error::NotFinite { row: 0, token: ids.len() }.into());
        }
        let id = output.logits.argmax(-1, false).int64_value(&[0]);
        ids.push(id);
        if ends(&ids, answering)? {
            ids.pop();
            break;
        }
        steps.push(looked(id as u32, &output.attentions, &trial.needle));
        next = vec![id];
    }
    Ok((line(&(answering.decode)(&ids)?).to_owned(), steps))
}

/// Where heads looked, from one row a head: `[1, n_heads, 1, k_len]` a layer.
fn looked(id: u32, attentions: &[Tensor], needle: &Range<usize>) -> Step {
    let (start, n) = (needle.start as i64, (needle.end - needle.start) as i64);
    let (mut most, mut mass) = (Vec::new(), Vec::new());
    for rows in attentions.iter().filter(|rows| rows.numel() > 0) {
        let rows = rows.view([rows.size()[1], -1]); // [h, k]
        let layer: Vec<i64> = Vec::try_from(rows.argmax(-1, false)).expect("one axis of integers");
        most.extend(layer.into_iter().map(|at| at as usize));
        let paid = rows.narrow(1, start, n).sum_dim_intlist([1i64].as_slice(), false, Kind::Double);
        mass.extend(Vec::<f64>::try_from(paid).expect("one axis of f64"));
    }
    Step { id, most, mass }
}

/// Whether the last of `ids` ends an answer.
fn ends(ids: &[i64], answering: &Answering<'_>) -> Result<bool> {
    let is_stop = ids.last().is_some_and(|id| answering.stop_ids.contains(id));
    Ok(is_stop || (answering.decode)(ids)?.trim_start().contains('\n'))
}

/// The first line of what was written.
fn line(text: &str) -> &str {
    text.trim_start().lines().next().unwrap_or("").trim_end()
}

/// Has `model` answer questions greedily with `gates` at its heads ([`ForwardOptions::gates`]; none: an empty slice), several
/// at a time: `prompts[i]` ends before the answer `expected[i]`.
///
/// # Errors
///
/// As [`retrieval`], but that any attention kind will do.
///
/// # Panics
///
/// Unless there is one expected answer a prompt.
pub fn answer(
    model: &Model,
    prompts: &[Vec<u32>],
    expected: &[String],
    gates: &[Option<Gate>],
    answering: &Answering<'_>,
    batching: &Batching,
    progress: &mut Progress<'_>,
) -> Result<Vec<Answered>> {
    assert_eq!(prompts.len(), expected.len(), "one answer a prompt");
    check_decoder(model.config(), "answers")?;
    if prompts.is_empty() || answering.max_new_tokens == 0 {
        return Err(Error::Nothing("no question was given, or no new token allowed"));
    }
    let plan =
        BatchPlan { max_tokens: batching.max_tokens, ..BatchPlan::new(batching.batch_size)? };
    let lengths: Vec<usize> = prompts.iter().map(Vec::len).collect();
    let mut found: Vec<Option<Answered>> = vec![None; prompts.len()];
    let mut n_done = 0;
    for at in plan.by_length(&lengths) {
        let wide = |ids: &Vec<u32>| ids.iter().map(|&id| id.into()).collect();
        let batch: Vec<Vec<i64>> = at.iter().map(|&at| wide(&prompts[at])).collect();
        let mut written: Vec<Vec<i64>> = vec![Vec::new(); batch.len()];
        let mut failure = None;
        let mut on_token = |row: usize, id: i64| {
            written[row].push(id);
            match ends(&written[row], answering) {
                Ok(false) => ControlFlow::Continue(()),
                Ok(true) => {
                    written[row].pop();
                    ControlFlow::Break(())
                }
                Err(error) => {
                    failure = Some(error);
                    ControlFlow::Break(())
                }
            }
        };
        let greedy = Sampling::default();
        let longest = batch.iter().map(Vec::len).max().unwrap_or(0);
        let limits = Limits {
            max_new_tokens: room(model, longest, answering),
            stop_ids: answering.stop_ids.to_vec(),
        };
        generate_gated(model, &batch, &greedy, &limits, gates, &mut on_token)?;
        if let Some(error) = failure {
            return Err(error);
        }
        for (&at, ids) in at.iter().zip(&written) {
            let response = line(&(answering.decode)(ids)?).to_owned();
            found[at] = Some(Answered::of(&expected[at], response)?);
        }
        n_done += at.len();
        if progress(n_done).is_break() {
            return Err(Error::Stopped { n_done, n_rows: prompts.len() });
        }
    }
    Ok(found.into_iter().map(|one| one.expect("a plan has every row")).collect())
}

/// The mean over trials of the values of all heads, layer after layer, with its interval: trials drawn again with
/// replacement.
///
/// # Errors
///
/// [`Error::Nothing`] where there is no trial, or the model has no head.
pub fn over_trials(model: &Model, values: &[Vec<f64>]) -> Result<HeadScores> {
    let heads: Vec<Vec<i64>> = model.layers().iter().map(|layer| layer.spec().kept_heads).collect();
    if values.is_empty() || n_heads(model) == 0 {
        return Err(Error::Nothing("no trial counts, or no layer of the model has a head"));
    }
    Ok(HeadScores::of(values, &heads))
}
