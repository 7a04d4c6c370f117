//! Labelled rows as a model is scored on them: by a classifier, or as questions to a language model.

use std::{ops::Range, path::Path};

use anyhow::{Context, Result, bail, ensure};
use attn_core::{Config, Model, config::Head};
use attn_data::{
    batch::Encoded,
    chat::ChatTemplate,
    dataset::{DatasetSpec, Example},
    prompt::{Prompt, PromptSpec, Prompted, Question},
};
use attn_eval::{
    Accuracy, Batching, Choices, ClassScore, Classification, Progress, choices, classify,
};
use serde::Serialize;

use crate::texts::{Cut, Folder, encode, with_texts};

/// Rows to score.
pub(crate) enum Rows {
    Classes(Vec<Encoded>),
    Questions { questions: Vec<Question>, answers: Vec<String>, classes: Vec<String> },
}

/// Rows to train on.
#[derive(Default)]
pub(crate) struct TrainRows {
    pub(crate) rows: Vec<Encoded>,
    /// The tokens of each that are the answer, where they are prompts.
    pub(crate) answers: Option<Vec<Range<usize>>>,
}

/// What became of [`Rows`].
pub(crate) enum Scores {
    Classes(Classification),
    Choices(Choices),
}

/// How texts become rows.
pub(crate) struct Asking {
    prompt: Option<Prompt>,
    classes: Vec<String>,
    max_len: usize,
}

impl Asking {
    /// By `spec`, where there is one.
    pub(crate) fn new(
        spec: Option<&PromptSpec>,
        data: &DatasetSpec,
        classes: &[String],
        folder: &Path,
        max_len: usize,
    ) -> Result<Self> {
        let make = |spec| Prompt::new(spec, data, classes, || ChatTemplate::from_folder(folder));
        let prompt = spec.map(make).transpose().context("cannot use the prompt")?;
        Ok(Self { prompt, classes: classes.to_vec(), max_len })
    }

    pub(crate) fn to_score(
        &self,
        folder: &Folder,
        rows: &[(usize, &Example)],
        split: &str,
    ) -> Result<Rows> {
        let Some(prompt) = &self.prompt else {
            return Ok(Rows::Classes(encode(&folder.tokenizer, rows, self.max_len, split)?));
        };
        let questions = prompt
            .questions(&folder.tokenizer, rows, self.max_len)
            .with_context(|| problem(split))?;
        let Prompted { rows: questions, n_truncated, longest } = questions;
        Cut { n_cut: n_truncated, n_rows: rows.len(), longest }.say(self.max_len, split);
        let answers = prompt.answers().to_vec();
        Ok(Rows::Questions { questions, answers, classes: self.classes.clone() })
    }

    pub(crate) fn to_train(
        &self,
        folder: &Folder,
        rows: &[(usize, &Example)],
        split: &str,
    ) -> Result<TrainRows> {
        let Some(prompt) = &self.prompt else {
            let rows = encode(&folder.tokenizer, rows, self.max_len, split)?;
            return Ok(TrainRows { rows, answers: None });
        };
        let both = prompt
            .completions(&folder.tokenizer, rows, self.max_len)
            .with_context(|| problem(split))?;
        let Prompted { rows: both, n_truncated, longest } = both;
        Cut { n_cut: n_truncated, n_rows: rows.len(), longest }.say(self.max_len, split);
        if let Some((first, answer)) = both.first() {
            let text = folder.tokenizer.decode(&first.ids[..answer.start], false)?;
            let word = folder.tokenizer.decode(&first.ids[answer.clone()], false)?;
            tracing::debug!("the first prompt is {text:?}, its answer {word:?}");
        }
        let (rows, answers) = both.into_iter().unzip();
        Ok(TrainRows { rows, answers: Some(answers) })
    }
}

fn problem(split: &str) -> String {
    format!("cannot put the rows of split `{split}` as prompts")
}

/// The most tokens of a prompt with its answer that model and tokenizer allow. Time is saved only where that is asked
/// for: whatever is cut off, the model does not know of.
pub(crate) fn max_prompt_len(folder: &Folder) -> usize {
    let positions = folder.config.sizes.max_positions.max(1) as usize;
    positions.min(folder.tokenizer.max_length().unwrap_or(usize::MAX))
}

/// Refuses a model that cannot be asked.
pub(crate) fn check_model(config: &Config) -> Result<()> {
    const HINT: &str = "hint: a prompt is for a decoder such as `openai-community/gpt2`; without one a classifier is used";
    if !config.is_causal() {
        bail!(
            "a {} is an encoder: it writes no answer to a prompt\n{HINT}",
            config.base_model_type()
        );
    }
    ensure!(
        config.head == Head::LanguageModel,
        "the model ends in {}, and a prompt needs a language-model head\n{HINT}",
        config.head
    );
    Ok(())
}

impl Rows {
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Classes(rows) => rows.len(),
            Self::Questions { questions, .. } => questions.len(),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(crate) fn score(
        &self,
        model: &Model,
        batching: &Batching,
        progress: &mut Progress<'_>,
    ) -> attn_eval::Result<Scores> {
        Ok(match self {
            Self::Classes(rows) => Scores::Classes(classify(model, rows, batching, progress)?),
            Self::Questions { questions, answers, classes } => {
                Scores::Choices(choices(model, questions, answers, classes, batching, progress)?)
            }
        })
    }
}

impl Scores {
    pub(crate) fn accuracy(&self) -> Option<Accuracy> {
        match self {
            Self::Classes(scores) => scores.accuracy,
            Self::Choices(scores) => scores.accuracy,
        }
    }

    /// By likelihood per byte, of a language model alone.
    pub(crate) fn accuracy_per_byte(&self) -> Option<Accuracy> {
        match self {
            Self::Classes(_) => None,
            Self::Choices(scores) => scores.accuracy_per_byte,
        }
    }

    pub(crate) fn classes(&self) -> &[ClassScore] {
        match self {
            Self::Classes(scores) => &scores.classes,
            Self::Choices(scores) => &scores.classes,
        }
    }

    /// Each prediction beside its row, as JSON.
    pub(crate) fn predictions(&self, rows: &[Example]) -> Result<Vec<serde_json::Value>> {
        fn json<T: Serialize>(
            predictions: &[T],
            rows: &[Example],
        ) -> Result<Vec<serde_json::Value>> {
            let both = with_texts(predictions, rows);
            both.iter().map(|one| serde_json::to_value(one).context("cannot write JSON")).collect()
        }
        match self {
            Self::Classes(scores) => json(&scores.predictions, rows),
            Self::Choices(scores) => json(&scores.predictions, rows),
        }
    }
}
