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

mod read;
mod sums;
mod write;

use safetensors::Dtype;
use tch::Kind;

pub use attn_files::{Error, INDEX_FILE, TensorProblem, WEIGHTS_FILE, read_json};
pub use read::{Checkpoint, read_metadata, read_tensors};
pub use sums::{SUMS_FILE, check_sums};
pub(crate) use write::for_each_piece;
pub use write::{
    FolderDraft, FolderWriter, WriteOptions, check_folder, write_file, write_folder, write_tensors,
};

/// The configuration of a model folder.
pub const CONFIG_FILE: &str = "config.json";
/// LibTorch's words for [`attn_files::DTYPES`].
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

fn kind_of(dtype: Dtype) -> Kind {
    let known = KINDS.iter().find(|&&(known, _)| known == dtype);
    known.expect("no other dtype is read").1
}

fn dtype_of(kind: Kind) -> Option<Dtype> {
    KINDS.iter().find(|&&(_, known)| known == kind).map(|&(dtype, _)| dtype)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_dtype_that_is_read_has_a_kind_of_its_width() {
        for dtype in attn_files::DTYPES {
            assert_eq!(kind_of(dtype).elt_size_in_bytes() * 8, dtype.bitsize(), "{dtype}");
        }
    }
}
