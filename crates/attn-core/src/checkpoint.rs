//! Hugging Face model folders in and out: `config.json` beside one `model.safetensors`, or beside shards and their
//! `model.safetensors.index.json`.
//!
//! Reading trusts nothing: a file is checked as a whole before a tensor of it is handed out, and what is wrong is
//! refused by name. Weights are memory-mapped and copied piece by piece into the kind and onto the device they run
//! in, so that loading takes the memory of the loaded weights and at most 16 MiB.
//!
//! Writing is atomic: a reader, or the next run after a kill at any moment, finds the old folder or the new one.
//!
//! The format: <https://huggingface.co/docs/safetensors>. Its byte order, little-endian, is taken to be the machine's.

mod atomic;
mod error;
mod header;
mod read;
mod sums;
mod write;

use std::path::{Component, Path};

use safetensors::Dtype;
use tch::Kind;

pub use error::{Error, TensorProblem};
pub use read::{Checkpoint, read_json, read_metadata, read_tensors};
pub use sums::{SUMS_FILE, check_sums};
pub(crate) use write::for_each_piece;
pub use write::{
    FolderDraft, FolderWriter, WriteOptions, check_folder, write_file, write_folder, write_tensors,
};

/// The configuration of a model folder.
pub const CONFIG_FILE: &str = "config.json";
/// The weights of a model folder that is not sharded.
pub const WEIGHTS_FILE: &str = "model.safetensors";
/// Says which shard holds which tensor.
pub const INDEX_FILE: &str = "model.safetensors.index.json";

/// The element types that both safetensors and LibTorch know, but for `F8_*` and complex ones: 8-bit floats mean
/// nothing without the scales that each quantizer stores in its own way.
const KINDS: [(Dtype, Kind); 10] = [
    (Dtype::F64, Kind::Double),
    (Dtype::F32, Kind::Float),
    (Dtype::F16, Kind::Half),
    (Dtype::BF16, Kind::BFloat16),
    (Dtype::I64, Kind::Int64),
    (Dtype::I32, Kind::Int),
    (Dtype::I16, Kind::Int16),
    (Dtype::I8, Kind::Int8),
    (Dtype::U8, Kind::Uint8),
    (Dtype::BOOL, Kind::Bool),
];

fn kind_named(dtype: &str) -> Option<Kind> {
    KINDS.iter().find(|(known, _)| known.to_string() == dtype).map(|&(_, kind)| kind)
}

fn dtype_of(kind: Kind) -> Option<Dtype> {
    KINDS.iter().find(|&&(_, known)| known == kind).map(|&(dtype, _)| dtype)
}

/// Whether `file`, joined to a folder, can only lie inside of it: no root, no `..`, nothing empty.
fn is_plain(file: &str) -> bool {
    let mut components = Path::new(file).components().peekable();
    components.peek().is_some()
        && !file.contains('\0')
        && components.all(|component| matches!(component, Component::Normal(_)))
}
