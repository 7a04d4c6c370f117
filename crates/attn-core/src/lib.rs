//! Attention variants, pretrained architectures and surgery on them.
//!
//! Start at [`Model`]: it loads a Hugging Face folder, runs it, swaps the attention of its layers and writes it back.
//! [`attention`] is the seam: [`attention::Attention`] takes projected queries, keys and values and returns what each
//! head mixed, before the output projection. [`variants`] holds one file per kind, [`arch`] one per architecture,
//! [`laws`] what each of them owes its callers.

pub mod arch;
pub mod attention;
mod banded;
mod blocks;
pub mod checkpoint;
pub mod config;
mod digest;
mod doing;
mod error;

mod export;
pub mod external;
mod feature_map;
pub mod gate;
pub mod generate;
mod kv_heads;
pub mod laws;
pub mod layer;
mod linear;
pub mod lora;
pub mod mask;
mod model;
pub mod need;
pub mod nn;
mod pairs;
mod refit;
pub mod rotary;
mod running;
mod stretches;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod variants;
pub mod weights;

pub use arch::Vocabulary;
pub use config::Config;
pub use doing::{During, doing};
pub use error::{Error, TensorMismatch};
pub use export::{expanded, save_multi_query};
pub use gate::{Fill, Gate};
pub use kv_heads::{
    Merge, Merged, Moments, begin_merging, check_merge, check_merging, merge_kv, merge_learned,
};
pub use layer::Rows;
pub use lora::Lora;
pub use mask::Mask;
pub use model::{
    Attended, DecodeState, ForwardOptions, LoadOptions, Model, ModelInput, Output, Positions,
    WantedHead,
};
pub use refit::{Refitted, StreamedRefit, refit};
pub use running::Running;
pub use variants::Variant;
pub use weights::LoadReport;
