//! Losses, optimizers, schedules, checkpoints.
//!
//! [`train`] fine-tunes a model: an [`Objective`] says what is minimized, [`Batches`] where the examples come from, a
//! [`TrainConfig`] how. The crate prints nothing and knows no metric: the caller of a [`Run`] passes a callback that
//! evaluates and one that is told of every [`Event`].
//!
//! A run repeats: everything random is a function of the seed and the position, and a [`checkpoint`] holds the rest.
//! A run that was killed and resumed ends bit for bit where an unbroken one does, given the same processor, LibTorch
//! and number of threads.

mod batch;
pub mod checkpoint;
mod config;
mod environment;
mod error;
mod freeze;
mod metrics;
mod non_finite;
mod objective;
mod optimizer;
mod prefetch;
mod progress;
mod schedule;
mod train;

pub use batch::{Batch, Batches, Examples};
pub use config::TrainConfig;
pub use environment::Environment;
pub use error::{BoxError, Error, Place, Result};
pub use freeze::trainable;
pub use metrics::{METRICS_FILE, Metric};
pub use objective::{CausalLm, Classification, MaskedLm, Objective};
pub use progress::{Event, Progress};
pub use schedule::Schedule;
pub use train::{Best, Evaluate, LawCheck, Outcome, Run, Summary, train};
