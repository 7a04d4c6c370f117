//! What can go wrong in this crate.

use std::path::PathBuf;

use attn_files::section::Field;

use crate::checkpoint;

/// What can go wrong in `attn-core`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A model folder could not be read or written.
    #[error(transparent)]
    Checkpoint(#[from] checkpoint::Error),

    /// `config.json` has no `model_type`, or one that no architecture here has.
    #[error("config.json: `model_type` is `{found}`, expected one of {expected}")]
    ModelType {
        /// What the file says.
        found: String,
        /// The known types.
        expected: String,
    },

    /// A field of `config.json` is absent, of the wrong type, or has a value that is not supported.
    #[error("config.json: `{field}`: {problem}")]
    Config {
        /// The field's path.
        field: String,
        /// What is wrong, what was expected, and a hint.
        problem: String,
    },

    /// The tensors of the checkpoint are not exactly the parameters of the model.
    #[error("{0}")]
    Tensors(TensorMismatch),

    /// A head that the checkpoint does not hold.
    #[error(
        "the checkpoint holds {held}, not {wanted}\nhint: ask for a new head (fine-tuning does), or load the head that is there"
    )]
    Head {
        /// The head in the folder.
        held: String,
        /// The head that was asked for.
        wanted: String,
    },

    /// An input tensor does not fit the model.
    #[error("input `{name}`: {problem}")]
    Input {
        /// Which input: `input_ids`, `attention_mask`, ...
        name: &'static str,
        /// What is wrong and what was expected.
        problem: String,
    },

    /// A layer, head or other index out of range.
    #[error("{what} {index} is out of range: there are {count}, counted from 0")]
    Index {
        /// What is counted.
        what: &'static str,
        /// The index given.
        index: i64,
        /// How many there are.
        count: i64,
    },

    /// A setting of an attention kind does not fit the layer.
    #[error("attention kind `{kind}`: `{field}` = {value}: {problem}")]
    Setting {
        /// The kind.
        kind: &'static str,
        /// The setting.
        field: &'static str,
        /// Its value.
        value: String,
        /// What was expected.
        problem: String,
    },

    /// An attention kind of another crate cannot be registered.
    #[error("attention kind `{name}` {problem}")]
    Kind {
        /// Its name.
        name: String,
        /// What is wrong with it.
        problem: &'static str,
    },

    /// Adapters cannot be made, changed or read as asked.
    #[error("LoRA: `{field}` {problem}")]
    Lora {
        /// The setting or file.
        field: &'static str,
        /// What is wrong and what was expected.
        problem: String,
    },

    /// An adapter belongs to another model.
    #[error(
        "`{}` is no adapter of this model:\n  {}\nhint: it was trained beside `{base}`, as that was then",
        path.display(),
        problems.join("\n  ")
    )]
    Adapter {
        /// The file of its tensors.
        path: PathBuf,
        /// The model it names.
        base: String,
        /// What does not fit.
        problems: Vec<String>,
    },

    /// A prediction that nothing can be chosen by.
    #[error(
        "row {row}, new token {token} (both counted from 0): the logits are not finite\nhint: compute in f32, or look for \
         broken weights"
    )]
    NotFinite {
        /// The prompt.
        row: usize,
        /// The token that was to be chosen.
        token: usize,
    },

    /// A setting of text generation is out of range.
    #[error("`{field}` is {value}, expected {expected}")]
    Sampling {
        /// The setting.
        field: &'static str,
        /// Its value.
        value: String,
        /// What was expected.
        expected: &'static str,
    },

    /// An attention kind refuses what was asked of it.
    #[error("attention kind `{kind}` cannot {what}: {reason}")]
    Refused {
        /// The kind.
        kind: &'static str,
        /// What was asked.
        what: &'static str,
        /// Why not, and a hint.
        reason: String,
    },

    /// LibTorch, or what it called back, failed.
    #[error(transparent)]
    Shim(#[from] attn_torch::Error),

    /// LibTorch refused an operation.
    #[error("LibTorch failed while {doing}")]
    Torch {
        /// What was being done.
        doing: String,
        /// LibTorch's own words.
        #[source]
        source: tch::TchError,
    },
}

/// The two lists of strict loading, and tensors of the wrong shape.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TensorMismatch {
    /// Parameters of the model that the file lacks.
    pub missing: Vec<String>,
    /// Tensors of the file that the model has no place for.
    pub unexpected: Vec<String>,
    /// Tensors of another shape or content than the config says.
    pub wrong: Vec<String>,
}

impl TensorMismatch {
    pub(crate) fn is_empty(&self) -> bool {
        self.missing.is_empty() && self.unexpected.is_empty() && self.wrong.is_empty()
    }
}

impl std::fmt::Display for TensorMismatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the checkpoint does not fit its config")?;
        let lists = [
            ("missing (parameters the file lacks)", &self.missing),
            ("unexpected (tensors without a place in the model)", &self.unexpected),
            ("wrong", &self.wrong),
        ];
        for (title, names) in lists {
            if !names.is_empty() {
                write!(f, "\n  {title}, {}:", names.len())?;
                names.iter().try_for_each(|name| write!(f, "\n    {name}"))?;
            }
        }
        let is_tie = |name: &String| name.contains("`tie_word_embeddings`");
        let hint = match self.missing.is_empty()
            && self.unexpected.is_empty()
            && self.wrong.iter().all(is_tie)
        {
            true => {
                "`tie_word_embeddings` is to be false in config.json if the two were trained apart; else leave the tensor out"
            }
            false => {
                "`architectures` and the sizes in config.json must be those the weights were saved with"
            }
        };
        write!(f, "\nhint: {hint}")
    }
}

impl From<Field> for Error {
    fn from(Field { field, problem }: Field) -> Self {
        Self::Config { field, problem }
    }
}
