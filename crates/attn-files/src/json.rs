//! JSON of a length that has a bound.

use std::{
    fs::{self, File},
    io::Read,
    path::Path,
};

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::Error;

/// The most that is read of a JSON file. The index of a model with a million tensors is about as long.
pub const MAX_JSON: u64 = 100_000_000;

/// Reads the JSON object `dir/file`, such as `config.json`.
///
/// # Errors
///
/// If there is no such file, or it is not an object; the error names the file, the line and the column.
pub fn read_json(dir: &Path, file: &str) -> Result<Map<String, Value>, Error> {
    parse_json(&dir.join(file))
}

/// Reads the JSON file `path`, of at most [`MAX_JSON`] bytes.
///
/// # Errors
///
/// If there is no such file, it is too long, or no `T`; the error names the file, the line and the column.
pub fn parse_json<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<T, Error> {
    let len = regular_len(path)?;
    if len > MAX_JSON {
        return Err(Error::TooLong { path: path.into(), len, limit: MAX_JSON });
    }
    let mut text = Vec::new();
    let file = File::open(path).map_err(Error::io("open", path))?;
    file.take(MAX_JSON).read_to_end(&mut text).map_err(Error::io("read", path))?;
    serde_json::from_slice(&text).map_err(|source| Error::Json { path: path.into(), source })
}

/// The length of the file that `path` leads to.
pub(crate) fn regular_len(path: &Path) -> Result<u64, Error> {
    let metadata = fs::metadata(path).map_err(Error::io("open", path))?;
    if metadata.is_file() {
        Ok(metadata.len())
    } else {
        Err(Error::FileType { path: path.into(), expected: "file" })
    }
}
