//! Language models asked for a class: how likely each answer is after a prompt.

use attn_core::{ForwardOptions, Model, config::Head};
use attn_data::{
    batch::Encoded,
    prompt::{Completion, Question},
};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::{
    classify::{Accuracy, ClassScore, Prediction, accuracy, count, first_largest},
    error::{Error, Result},
    rows::{Batching, Progress, for_each_batch, to_input},
};

/// What a language model says of one row.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Choice {
    /// The class whose answer is likeliest. Its `probabilities` are those of the answers among themselves: the softmax of
    /// [`Self::log_likelihoods`].
    #[serde(flatten)]
    pub prediction: Prediction,
    /// ln p(answer | prompt), in nats, the sum over the tokens of the answer; one a class.
    pub log_likelihoods: Vec<f64>,
    /// The class whose answer is likeliest per byte.
    pub predicted_per_byte: i64,
}

/// What [`choices`] found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Choices {
    /// By likelihood, lm-evaluation-harness's `acc`; its loss is −ln of the right answer's share of the probability of all
    /// answers. Absent where no row is labelled.
    pub accuracy: Option<Accuracy>,
    /// By likelihood per byte of the answer, its `acc_norm` where answers are ASCII, as it divides by characters; the loss
    /// is that of the shares by likelihood per byte.
    pub accuracy_per_byte: Option<Accuracy>,
    /// One a class, by likelihood.
    pub classes: Vec<ClassScore>,
    /// One a row, in the order of the rows.
    pub predictions: Vec<Choice>,
}

/// Scores each answer to each of `questions` by its likelihood after the prompt; `answers` and `names` are the text of
/// the answer and the name of each class.
///
/// The first of several equally likely answers is taken. Answers that differ in their last token alone share a pass.
///
/// # Errors
///
/// [`Error::Direction`] for an encoder, [`Error::Head`] for a model without a language-model head, [`Error::Answers`] for a
/// question of another number of answers, [`Error::Label`] for a class without one, [`Error::EmptyRow`] for a prompt
/// without a token, [`Error::NotFinite`], [`Error::Stopped`], and what the model refuses.
pub fn choices(
    model: &Model,
    questions: &[Question],
    answers: &[String],
    names: &[String],
    batching: &Batching,
    progress: &mut Progress<'_>,
) -> Result<Choices> {
    check(model, questions, answers)?;
    let passes = passes(questions);
    let rows: Vec<Encoded> = passes.iter().map(|pass| pass.row.clone()).collect();
    let mut scores = vec![vec![0.0; answers.len()]; questions.len()];
    let n_rows = questions.len();
    let rows_of = |n_passes: usize| n_passes * n_rows / passes.len();
    let mut count = |n_passes| progress(rows_of(n_passes));
    let scored = for_each_batch(model, &rows, batching, &mut count, |at, batch| {
        let (mut places, mut targets, mut owners) = (Vec::new(), Vec::new(), Vec::new());
        for (row, &at) in at.iter().enumerate() {
            let Pass { question, ref answers, .. } = passes[at];
            for &answer in answers {
                let Completion { ids, answer: span } = &questions[question].answers[answer];
                for token in span.clone() {
                    places.push((row * batch.cols + token - 1) as i64);
                    targets.push(i64::from(ids[token]));
                    owners.push((question, answer));
                }
            }
        }
        let [at_places, targets] =
            [&places, &targets].map(|values| Tensor::from_slice(values).to_device(model.device()));
        let options = ForwardOptions { logits_at: Some(&at_places), ..ForwardOptions::default() };
        let logits = model.forward(&to_input(&batch, model), &options)?.logits;
        let wide = if logits.kind() == Kind::Double { Kind::Double } else { Kind::Float };
        let log_p = logits.log_softmax(-1, wide).gather(1, &targets.unsqueeze(1), false);
        let log_p: Vec<f64> =
            Vec::try_from(log_p.view([-1]).to_kind(Kind::Double)).expect("one axis of f64");
        for (log_p, (question, answer)) in log_p.into_iter().zip(owners) {
            if !log_p.is_finite() {
                return Err(Error::NotFinite { index: questions[question].index });
            }
            scores[question][answer] += log_p;
        }
        Ok(())
    });
    scored.map_err(|error| match error {
        Error::Stopped { n_done, .. } => Error::Stopped { n_done: rows_of(n_done), n_rows },
        error => error,
    })?;
    Ok(summarize(questions, answers, names, scores))
}

/// A row that goes through the model, and the answers that are read off it.
struct Pass {
    row: Encoded,
    question: usize,
    answers: Vec<usize>,
}

/// The last token of an answer is predicted and predicts nothing, so it is left out; what is then equal is run once.
fn passes(questions: &[Question]) -> Vec<Pass> {
    let mut passes: Vec<Pass> = Vec::new();
    for (question, Question { answers, index, .. }) in questions.iter().enumerate() {
        let first = passes.len();
        for (answer, Completion { ids, answer: span }) in answers.iter().enumerate() {
            let ids = &ids[..span.end - 1];
            match passes[first..].iter_mut().find(|pass| pass.row.ids == *ids) {
                Some(pass) => pass.answers.push(answer),
                None => {
                    let row = Encoded {
                        ids: ids.to_vec(),
                        label: None,
                        index: *index,
                        second_from: None,
                    };
                    passes.push(Pass { row, question, answers: vec![answer] });
                }
            }
        }
    }
    passes
}

fn check(model: &Model, questions: &[Question], answers: &[String]) -> Result<()> {
    if !model.config().is_causal() {
        return Err(Error::Direction {
            model_type: model.config().base_model_type(),
            what: "an answer after a prompt: it is an encoder",
            hint: "score a classifier, without a prompt",
        });
    }
    match model.config().head {
        Head::LanguageModel => {}
        found => {
            return Err(Error::Head {
                measure: "the likelihood of an answer",
                found,
                expected: "a language-model head",
                hint: "name a folder with a language model, or score it without a prompt",
            });
        }
    }
    let n_classes = answers.len();
    for &Question { answers: ref own, label, index } in questions {
        if own.len() != n_classes {
            return Err(Error::Answers { index, found: own.len(), expected: n_classes });
        }
        if own.iter().any(|one| one.answer.start == 0) {
            return Err(Error::EmptyRow { index });
        }
        if let Some(label) = label.filter(|label| !(0..n_classes as i64).contains(label)) {
            return Err(Error::Label { index, label, n_classes: n_classes as i64 });
        }
    }
    Ok(())
}

fn summarize(
    questions: &[Question],
    answers: &[String],
    names: &[String],
    scores: Vec<Vec<f64>>,
) -> Choices {
    let decided = |per_byte: bool| {
        let (mut predictions, mut losses) = (Vec::new(), Vec::new());
        for (scores, &Question { label, index, .. }) in scores.iter().zip(questions) {
            let scores: Vec<f64> = match per_byte {
                false => scores.clone(),
                true => scores.iter().zip(answers).map(|(s, of)| s / of.len() as f64).collect(),
            };
            let highest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let total = scores.iter().map(|score| (score - highest).exp()).sum::<f64>().ln();
            let log_p: Vec<f64> = scores.iter().map(|score| score - highest - total).collect();
            losses.push(label.map_or(0.0, |label| -log_p[label as usize]));
            let probabilities = log_p.iter().map(|log_p| log_p.exp()).collect();
            let predicted = first_largest(&scores);
            predictions.push(Prediction { index, label, predicted, probabilities });
        }
        (accuracy(&predictions, &losses), predictions)
    };
    let (accuracy_per_byte, per_byte) = decided(true);
    let (accuracy, predictions) = decided(false);
    let classes = count(names, &predictions);
    let both = predictions.into_iter().zip(per_byte).zip(scores);
    let predictions = both
        .map(|((prediction, per_byte), log_likelihoods)| Choice {
            prediction,
            log_likelihoods,
            predicted_per_byte: per_byte.predicted,
        })
        .collect();
    Choices { accuracy, accuracy_per_byte, classes, predictions }
}
