//! Model folders as files, with no number of them read: what a safetensors header and an index say ([`Layout`]), JSON with a bound on
//! its length ([`read_json`]), the section `attn` of a `config.json` ([`section`]), and files and folders that appear whole or not at
//! all ([`write_file`], [`Staging`]).
//!
//! Reading trusts nothing. A file is checked as a whole before anything of it is handed out, what is wrong is refused by name, a name
//! that leads outside of the folder is refused, and a pickle is never opened. Nothing here links LibTorch, so that what strangers
//! wrote meets Rust alone; `fuzz/` of the repository holds these readers to it.
//!
//! ```
//! let folder = tempfile::tempdir()?;
//! std::fs::write(folder.path().join("model.safetensors"), [8, 0, 0, 0, 0, 0, 0, 0])?;
//! let error = attn_files::Layout::open(folder.path()).unwrap_err().to_string();
//! assert!(error.contains("its header should have 8 bytes (at most 100000000 are allowed), and the file has 8"), "{error}");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod atomic;
mod error;
mod header;
mod json;
mod layout;
pub mod section;

use std::path::{Component, Path};

use safetensors::Dtype;

pub use atomic::{Staging, remove_abandoned, reserve, target_of, write_file};
pub use error::{Error, TensorProblem};
pub use header::{MAX_HEADER, METADATA, encode};
pub use json::{MAX_JSON, parse_json, read_json};
pub use layout::{Layout, Opened, Stored};

/// The weights of a model folder that is not sharded.
pub const WEIGHTS_FILE: &str = "model.safetensors";
/// Says which shard holds which tensor.
pub const INDEX_FILE: &str = "model.safetensors.index.json";

/// The element types that both safetensors and LibTorch know, but for `F8_*` and complex ones: 8-bit floats mean
/// nothing without the scales that each quantizer stores in its own way.
pub const DTYPES: [Dtype; 10] = [
    Dtype::F64,
    Dtype::F32,
    Dtype::F16,
    Dtype::BF16,
    Dtype::I64,
    Dtype::I32,
    Dtype::I16,
    Dtype::I8,
    Dtype::U8,
    Dtype::BOOL,
];

/// Whether `file`, joined to a folder, can only lie inside of it: no root, no `..`, nothing empty.
pub fn is_plain(file: &str) -> bool {
    let mut components = Path::new(file).components().peekable();
    components.peek().is_some()
        && !file.contains('\0')
        && components.all(|component| matches!(component, Component::Normal(_)))
}
