//! Whether a language model gives answers word for word.

use std::ops::Range;

use attn_core::{ForwardOptions, Gate, Model};
use attn_data::batch::Encoded;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::{
    error::{Error, Result},
    language::check_decoder,
    rows::{Batching, Progress, for_each_batch, to_input},
    stats::{Interval, wilson},
};

/// What a model makes of one answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Recalled {
    /// Whether each token of it is the likeliest after those before it: whether greedy decoding gives the answer.
    pub exact: bool,
    /// Share of its tokens that are.
    pub token_accuracy: f64,
    /// ln p(answer | what stands before it), in nats.
    pub log_likelihood: f64,
}

/// How many answers a model gives.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Recall {
    /// Share of the answers that are given word for word.
    pub exact_match: f64,
    /// Its 95 % interval (Wilson).
    pub interval_95: Interval,
    /// Mean over the answers of the share of their tokens that are the likeliest after those before them.
    pub token_accuracy: f64,
    /// Answers asked for.
    pub n: usize,
}

impl Recall {
    /// Counts answers; `None` where there are none.
    pub fn of<'a>(answers: impl IntoIterator<Item = &'a Recalled>) -> Option<Self> {
        let answers: Vec<&Recalled> = answers.into_iter().collect();
        let (n, n_exact) = (answers.len(), answers.iter().filter(|answer| answer.exact).count());
        let interval_95 = wilson(n_exact as u64, n as u64, 0.95).ok()?;
        let mean = |sum: f64| sum / n as f64;
        let token_accuracy = mean(answers.iter().map(|answer| answer.token_accuracy).sum());
        Some(Self { exact_match: mean(n_exact as f64), interval_95, token_accuracy, n })
    }
}

/// Reads the model's prediction of each token of each answer; `answers[i]` are those of `rows[i]`, as ranges of its
/// tokens.
///
/// What comes before a token is always right, so that one pass tells of all answers of a row what greedy decoding would
/// give: until its first mistake it sees the same.
///
/// # Errors
///
/// [`Error::Direction`] for an encoder, [`Error::Head`] for a model without a language-model head, [`Error::Nothing`]
/// where there is no row or a row has no answer, [`Error::EmptyRow`], [`Error::NotFinite`], [`Error::Stopped`], and what
/// the model refuses.
///
/// # Panics
///
/// Unless there is one list an answer, each range holds a token, lies within its row, and begins behind its first token.
pub fn recall(
    model: &Model,
    rows: &[Encoded],
    answers: &[Vec<Range<usize>>],
    batching: &Batching,
    progress: &mut Progress<'_>,
) -> Result<Vec<Vec<Recalled>>> {
    recall_gated(model, rows, answers, &[], batching, progress)
}

/// As [`recall`], with `gates` at the heads ([`ForwardOptions::gates`]; none: an empty slice).
///
/// # Errors
///
/// As [`recall`].
///
/// # Panics
///
/// As [`recall`].
pub fn recall_gated(
    model: &Model,
    rows: &[Encoded],
    answers: &[Vec<Range<usize>>],
    gates: &[Option<Gate>],
    batching: &Batching,
    progress: &mut Progress<'_>,
) -> Result<Vec<Vec<Recalled>>> {
    assert_eq!(rows.len(), answers.len(), "one list of answers a row");
    check_decoder(model.config(), "answers")?;
    if answers.iter().any(Vec::is_empty) {
        return Err(Error::Nothing("a row has no answer"));
    }
    let mut found: Vec<Vec<Recalled>> = vec![Vec::new(); rows.len()];
    for_each_batch(model, rows, batching, progress, |at, batch| {
        let (mut places, mut targets) = (Vec::new(), Vec::new());
        for (row, &at) in at.iter().enumerate() {
            let Encoded { ids, .. } = &rows[at];
            for token in answers[at].iter().cloned().flatten() {
                assert!(token > 0 && token < ids.len(), "token {token} of row {at}");
                places.push((row * batch.cols + token - 1) as i64);
                targets.push(i64::from(ids[token]));
            }
        }
        let [places, targets] =
            [&places, &targets].map(|values| Tensor::from_slice(values).to_device(model.device()));
        let options =
            ForwardOptions { logits_at: Some(&places), gates, ..ForwardOptions::default() };
        let logits = model.forward(&to_input(&batch, model), &options)?.logits;
        let wide = if logits.kind() == Kind::Double { Kind::Double } else { Kind::Float };
        let log_p = logits.log_softmax(-1, wide);
        let right: Vec<bool> = Vec::try_from(log_p.argmax(-1, false).eq_tensor(&targets))
            .expect("one axis of booleans");
        let log_p = log_p.gather(1, &targets.unsqueeze(1), false);
        let log_p: Vec<f64> =
            Vec::try_from(log_p.view([-1]).to_kind(Kind::Double)).expect("one axis of f64");
        let mut tokens = right.into_iter().zip(log_p);
        for &at in at {
            for answer in &answers[at] {
                let (right, log_p): (Vec<bool>, Vec<f64>) =
                    tokens.by_ref().take(answer.len()).unzip();
                let log_likelihood = log_p.iter().sum::<f64>();
                if !log_likelihood.is_finite() {
                    return Err(Error::NotFinite { index: rows[at].index });
                }
                let n_right = right.iter().filter(|right| **right).count();
                found[at].push(Recalled {
                    exact: n_right == right.len(),
                    token_accuracy: n_right as f64 / right.len() as f64,
                    log_likelihood,
                });
            }
        }
        Ok(())
    })?;
    Ok(found)
}
