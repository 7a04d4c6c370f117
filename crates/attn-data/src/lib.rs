//! Text, tokenizers and batches of token ids.
//!
//! From a name to numbers: [`hub`] finds and fetches files, [`dataset`] reads rows out of them, [`tokenizer`] turns
//! text into ids, [`batch`] puts ids into rows of one length, and [`select`] says which rows are used. Nothing here
//! knows a model, a loss or a metric, and nothing links LibTorch: ids and masks come out as plain vectors.

pub mod batch;
pub mod dataset;
mod error;
pub mod hub;
pub mod select;
pub mod tokenizer;

pub use error::{Error, Result, Source};
