//! Losses, optimizers, schedules, checkpoints.
//!
//! [`train`] fine-tunes a model: an [`Objective`] says what is minimized, [`Batches`] where the examples come from, a
//! [`TrainConfig`] how. The crate prints nothing and knows no metric: the caller of a [`Run`] passes a callback that
//! evaluates and one that is told of every [`Event`].
//!
//! A run repeats: everything random is a function of the seed and the position, and a [`checkpoint`] holds the rest.
//! A run that was killed and resumed ends bit for bit where an unbroken one does, given the same processor, LibTorch
//! and number of threads.
//!
//! ```
//! use attn_core::{Config, LoadOptions, Model};
//! use attn_data::batch::Encoded;
//! use attn_train::{Classification, Examples, Outcome, Run, TrainConfig, train};
//!
//! let json = r#"{"model_type": "distilbert", "architectures": ["DistilBertForSequenceClassification"],
//!     "vocab_size": 10, "dim": 8, "hidden_dim": 16, "n_layers": 1, "n_heads": 2, "max_position_embeddings": 16}"#;
//! let config = Config::from_json(serde_json::from_str(json)?)?;
//! let mut model = Model::init(config, &LoadOptions::default())?;
//!
//! let text = |ids: &[u32], label, index| Encoded { ids: ids.to_vec(), label: Some(label), index, second_from: None };
//! let texts = vec![text(&[1, 5, 2], 0, 0), text(&[1, 6, 7, 2], 1, 1), text(&[1, 8, 2], 1, 2)];
//! let settings = TrainConfig { epochs: 4, batch_size: 2, lr: 1e-3, ..TrainConfig::default() };
//! let data = Examples::new(texts, settings.plan()?, 0, settings.seed);
//!
//! let summary = train(&mut model, Run::new(&settings, &Classification, &data))?;
//!
//! assert_eq!((summary.outcome, summary.step), (Outcome::Finished, 8)); // Two batches an epoch.
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod batch;
pub mod checkpoint;
mod config;
mod distill;
mod divergence;
mod environment;
mod error;
mod freeze;
mod metrics;
mod non_finite;
mod objective;
mod optimizer;
mod prefetch;
mod probe;
mod progress;
mod run;
mod schedule;
mod teacher_cache;
mod tensorboard;
mod train;

pub use batch::{Batch, Batches, Examples, Needles, OnPolicy};
pub use config::{Group, Precision, TrainConfig};
pub use distill::Distillation;
pub use divergence::Losses;
pub use environment::{Environment, cpu};
pub use error::{BoxError, Error, Place, Result};
pub use freeze::trainable;
pub use metrics::{METRICS_FILE, Metric};
pub use objective::{CausalLm, Classification, Completion, MaskedLm, Objective};
pub use probe::{a_loss_is_what_it_is_called, a_step_moves_what_is_trained_alone};
pub use progress::{Event, Progress};
pub use run::{Best, Evaluate, LawCheck, Outcome, Run, Summary};
pub use schedule::Schedule;
pub use teacher_cache::TeacherCache;
pub use tensorboard::TENSORBOARD_FOLDER;
pub use train::train;
