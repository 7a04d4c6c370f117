//! What can go wrong in this crate.

use std::{fmt, io, path::PathBuf};

use attn_core::{checkpoint, laws::Verdict};
use tch::Kind;

/// What the functions of this crate return.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Any error of the caller's own code.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// What can go wrong in `attn-train`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting is out of range.
    #[error("`{field}` is {value}, expected {expected}")]
    Setting {
        /// The field of [`TrainConfig`](crate::TrainConfig).
        field: &'static str,
        /// What was given.
        value: String,
        /// The range.
        expected: &'static str,
    },

    /// A pattern of `freeze` or `groups` matches no parameter.
    #[error("`{field}`: `{pattern}` matches no parameter\nhint: the nearest are {}", list(near))]
    NoMatch {
        /// The setting.
        field: &'static str,
        /// The pattern.
        pattern: String,
        /// The parameters whose names are most like it.
        near: Vec<String>,
    },

    /// The patterns of `freeze` leave nothing to train.
    #[error("`freeze`: {} leave none of {n_parameters} parameters to train", list(patterns))]
    AllFrozen {
        /// The patterns.
        patterns: Vec<String>,
        /// How many parameters there are.
        n_parameters: usize,
    },

    /// The model is in a kind whose steps would be lost to rounding.
    #[error(
        "the weights are in {kind:?}, where a small step is lost to rounding\nhint: load the model in f32 to train it"
    )]
    Precision {
        /// What the weights are in.
        kind: Kind,
    },

    /// The model does not end in what the objective needs.
    #[error("{objective} needs {expected}, but the model has {found}")]
    Head {
        /// The objective.
        objective: &'static str,
        /// What it needs.
        expected: &'static str,
        /// What the model has.
        found: String,
    },

    /// A teacher and a student that cannot be compared.
    #[error("the teacher does not fit the student: {problem}")]
    Teacher {
        /// What does not fit.
        problem: String,
    },

    /// A teacher's predictions on disk that cannot stand in for it.
    #[error("cannot use the teacher cache `{}`: {problem}\nhint: {hint}", path.display())]
    TeacherCache {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
        /// What to do.
        hint: &'static str,
    },

    /// A class that the model does not have.
    #[error("example {example} is of class {label}, but the model has {n_classes}, counted from 0")]
    Label {
        /// The example's row in its split.
        example: usize,
        /// Its label.
        label: i64,
        /// The model's classes.
        n_classes: i64,
    },

    /// The batch lacks what the objective predicts.
    #[error(
        "{objective} needs a label for each position, and the batch has none\nhint: mask the batch first, or say where its answers stand"
    )]
    NoTokenLabels {
        /// The objective.
        objective: &'static str,
    },

    /// There is nothing to train on.
    #[error("epoch {epoch} has no batch\nhint: is the training split empty?")]
    NoBatches {
        /// The epoch, from 0.
        epoch: u64,
    },

    /// Nothing that is trained plays a part in the loss.
    #[error(
        "{objective} does not depend on anything that is trained: {}\nhint: train something else, or leave this stage away",
        list(trained)
    )]
    NothingLearns {
        /// The objective.
        objective: &'static str,
        /// The first few of the trained parameters.
        trained: Vec<String>,
    },

    /// All batches of a step have nothing to predict.
    #[error(
        "{place}: there is nothing to predict\nhint: do these examples have labels, and more than one token?"
    )]
    NoTargets {
        /// Where.
        place: Place,
    },

    /// A batch could not be made.
    #[error("cannot make batch {batch} of epoch {epoch}")]
    Batch {
        /// The epoch, from 0.
        epoch: u64,
        /// The batch within it, from 0.
        batch: usize,
        /// Why.
        #[source]
        source: BoxError,
    },

    /// The evaluation failed.
    #[error("the evaluation at step {step} failed")]
    Evaluate {
        /// Steps done.
        step: u64,
        /// Why.
        #[source]
        source: BoxError,
    },

    /// The model is to be chosen by a metric that the evaluation does not give.
    #[error("`select` is `{metric}`, which the evaluation does not give; it gives {}", list(given))]
    NoMetric {
        /// The metric asked for.
        metric: String,
        /// Those there are.
        given: Vec<String>,
    },

    /// The model breaks a law that training relies on.
    #[error("the model breaks {} law(s), so training it would mean nothing{}", broken.len(), lines(broken))]
    Laws {
        /// The verdicts of the laws that do not hold.
        broken: Vec<Verdict>,
    },

    /// A number that is not finite turned up.
    #[error("{place}: {tensor} is not finite\nhint: {hint}")]
    NonFinite {
        /// Where in the run.
        place: Place,
        /// The first tensor that holds such a number, and how it was found.
        tensor: String,
        /// What to try.
        hint: &'static str,
    },

    /// A new run was to begin where one stands already.
    #[error(
        "`{}` holds the checkpoints of a run already\nhint: resume it, or choose another folder",
        dir.display()
    )]
    RunExists {
        /// The run's folder.
        dir: PathBuf,
    },

    /// Another process trains in the same folder.
    #[error("another process is training in `{}`\nhint: wait for it, or choose another folder", dir.display())]
    RunInUse {
        /// The run's folder.
        dir: PathBuf,
    },

    /// There is nothing to resume.
    #[error("there is no checkpoint in `{}`\nhint: begin the run without resuming", dir.display())]
    NoCheckpoint {
        /// Where they would be.
        dir: PathBuf,
    },

    /// None of the checkpoints can be used.
    #[error(
        "none of the checkpoints in `{}` can be used{}\nhint: bring back what is missing, or begin again in another folder",
        dir.display(),
        lines(reasons)
    )]
    NoGoodCheckpoint {
        /// Where they are.
        dir: PathBuf,
        /// What is wrong with each.
        reasons: Vec<String>,
    },

    /// A run was to be resumed as another than it was.
    #[error(
        "cannot resume: `{field}` was {before} when the run began and is {now}\nhint: put it back, or begin a new run"
    )]
    Changed {
        /// What differs.
        field: String,
        /// What it was.
        before: String,
        /// What it is.
        now: String,
    },

    /// A file of the run could not be read or written.
    #[error("cannot {doing} `{}`", path.display())]
    Io {
        /// What was tried.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },

    /// The model, or one of its files.
    #[error(transparent)]
    Core(#[from] attn_core::Error),

    /// LibTorch refused an operation.
    #[error(transparent)]
    Torch(#[from] attn_torch::Error),
}

impl Error {
    pub(crate) fn io(
        doing: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { doing, path, source }
    }
}

impl From<checkpoint::Error> for Error {
    fn from(error: checkpoint::Error) -> Self {
        Self::Core(error.into())
    }
}

/// Where in a run something happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The step under way, from 1; 0 before the first.
    pub step: u64,
    /// The epoch, from 0.
    pub epoch: u64,
    /// The batch within the epoch, from 0; `None` where no single one is meant.
    pub batch: Option<usize>,
    /// The examples in it, by their row in the split.
    pub examples: Vec<usize>,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { step, epoch, batch, examples } = self;
        write!(f, "step {step}")?;
        if let Some(batch) = batch {
            write!(f, ", epoch {epoch}, batch {batch}")?;
        }
        if !examples.is_empty() {
            let shown: Vec<String> = examples.iter().take(16).map(usize::to_string).collect();
            let rest = examples.len().saturating_sub(shown.len());
            write!(f, " (examples {}", shown.join(", "))?;
            if rest > 0 {
                write!(f, " and {rest} more")?;
            }
            f.write_str(")")?;
        }
        Ok(())
    }
}

fn list(names: &[String]) -> String {
    names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}

fn lines<T: fmt::Display>(items: &[T]) -> String {
    items.iter().map(|item| format!("\n  {item}")).collect()
}
