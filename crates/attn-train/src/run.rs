//! What a run is made of, and what comes of it.

use std::{
    path::PathBuf,
    sync::{Arc, atomic::AtomicBool},
};

use attn_core::{
    Model,
    laws::{self, Verdict},
};
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::{
    batch::Batches, config::TrainConfig, error::BoxError, metrics::Metric, objective::Objective,
    progress::Event,
};

/// Evaluates a model, before, during and after a run. Called without gradients; what it draws from LibTorch's random
/// streams does not move the run's.
pub type Evaluate<'a> = dyn FnMut(&Model) -> Result<Vec<Metric>, BoxError> + 'a;

/// Judges a model on a few ids, `[batch, seq_len]`.
pub type LawCheck = fn(&Model, &Tensor) -> Result<Vec<Verdict>, attn_core::Error>;

/// A run: what [`train`](crate::train) needs beside the model.
pub struct Run<'a> {
    /// The settings.
    pub config: &'a TrainConfig,
    /// What is minimized.
    pub objective: &'a dyn Objective,
    /// What on.
    pub data: &'a dyn Batches,
    /// The run's folder, for `metrics.jsonl` and checkpoints; without one nothing is written.
    pub dir: Option<PathBuf>,
    /// Whether to go on from the newest good checkpoint in `dir`.
    pub resume: bool,
    /// Files that make a checkpoint a whole model folder, such as the tokenizer: name and content.
    pub files: Vec<(String, Vec<u8>)>,
    /// Set it to stop: after the batch under way a checkpoint of the last whole step is saved, and
    /// [`train`](crate::train) returns [`Outcome::Interrupted`].
    pub stop: Arc<AtomicBool>,
    /// Evaluates the model. An error it returns after `stop` was set counts as an interruption.
    pub evaluate: Option<Box<Evaluate<'a>>>,
    /// Is told of everything that happens.
    pub observe: Box<dyn FnMut(Event<'_>) + 'a>,
    /// What has to hold of the model before the first step: [`laws::for_model`] unless replaced.
    pub laws: LawCheck,
}

impl<'a> Run<'a> {
    /// A run in memory that nobody watches: set the other fields to change that.
    pub fn new(
        config: &'a TrainConfig,
        objective: &'a dyn Objective,
        data: &'a dyn Batches,
    ) -> Self {
        Self {
            config,
            objective,
            data,
            dir: None,
            resume: false,
            files: Vec::new(),
            stop: Arc::default(),
            evaluate: None,
            observe: Box::new(|_| {}),
            laws: laws::for_model,
        }
    }
}

impl std::fmt::Debug for Run<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { config, dir, resume, stop, .. } = self;
        f.debug_struct("Run")
            .field("config", config)
            .field("objective", &self.objective.name())
            .field("dir", dir)
            .field("resume", resume)
            .field("stop", stop)
            .finish_non_exhaustive()
    }
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// All steps were done.
    Finished,
    /// It was stopped; a checkpoint was saved where the run has a folder.
    Interrupted,
}

/// The best model of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Best {
    /// Steps it was trained for.
    pub step: u64,
    /// What its evaluation gave.
    pub metrics: Vec<Metric>,
}

/// What a run came to.
#[derive(Debug, Clone, PartialEq)]
pub struct Summary {
    /// How it ended.
    pub outcome: Outcome,
    /// Steps done.
    pub step: u64,
    /// Steps of the whole run.
    pub total_steps: u64,
    /// Steps done when it was resumed, if it was.
    pub resumed_from: Option<u64>,
    /// Steps of the model that [`train`](crate::train) leaves: those of the best one where a finished run selects, else
    /// all. 0 where no step was better than none.
    pub selected_step: u64,
    /// The evaluation before the first step; empty without one.
    pub before: Vec<Metric>,
    /// The evaluation of the model that is left; empty without one. After an interruption the last one there was.
    pub after: Vec<Metric>,
    /// The best model, where the run selects.
    pub best: Option<Best>,
    /// The mean loss in the last line of `metrics.jsonl`.
    pub train_loss: Option<f64>,
    /// Tokens trained on, without padding.
    pub n_tokens: u64,
    /// Tokens per second in this process, evaluations and checkpoints left out.
    pub tokens_per_s: f64,
    /// Seconds of the run, everything included: those of earlier processes up to the checkpoint that was resumed, and
    /// all of this one.
    pub elapsed_s: f64,
    /// The last checkpoint saved, or resumed from.
    pub checkpoint: Option<PathBuf>,
}
