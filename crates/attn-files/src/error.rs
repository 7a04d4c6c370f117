//! What can be wrong with a model folder.

use std::{borrow::Cow, io, path::PathBuf, str::Utf8Error};

/// What to do about a folder that is not whole.
const AGAIN: &str = "the folder is not whole: download or save it again";

/// What can go wrong while a model folder or a safetensors file is read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The system refused an operation on a file or folder.
    #[error("cannot {doing} `{}`", path.display())]
    Io {
        /// What was tried, as a verb.
        doing: &'static str,
        /// On which file or folder.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },

    /// A JSON file is not JSON, or lacks a field, or holds one of another type.
    #[error(
        "cannot use `{}`, line {}, column {}{}",
        path.display(),
        source.line(),
        source.column(),
        if source.is_eof() { "\nhint: it is cut off: download or save it again" } else { "" }
    )]
    Json {
        /// The file.
        path: PathBuf,
        /// What was wrong where.
        #[source]
        source: serde_json::Error,
    },

    /// A JSON file that is too long to be what its name says.
    #[error("`{}` has {len} bytes, expected at most {limit}", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
        /// Its bytes.
        len: u64,
        /// The most that is read.
        limit: u64,
    },

    /// A file that has changed since its checksum was taken.
    #[error("`{}` is damaged: expected {expected}, found {found}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What was noted of it.
        expected: String,
        /// What it is now.
        found: String,
    },

    /// A folder where a file was expected, a file where a folder was expected, or a device or pipe.
    #[error("`{}` is not a {expected}", path.display())]
    FileType {
        /// What the user named.
        path: PathBuf,
        /// `file` or `folder`.
        expected: &'static str,
    },

    /// No weights under the names that a model folder gives them.
    #[error(
        "`{}` holds neither `model.safetensors` nor `model.safetensors.index.json`{}\n\
         hint: name the folder that a model was saved to",
        dir.display(),
        if found.is_empty() { String::new() } else { format!(", only `{}`", found.join("`, `")) }
    )]
    NoWeights {
        /// The folder.
        dir: PathBuf,
        /// Safetensors files with other names.
        found: Vec<String>,
    },

    /// Weights only in a format that is not read.
    #[error(
        "`{}` holds its weights only as `{file}`, expected safetensors: a pickle can run code when it is read\n\
         hint: convert it once, in Python: `AutoModel.from_pretrained(dir).save_pretrained(dir)` with the model's own \
         class in place of `AutoModel`",
        dir.display()
    )]
    Pickled {
        /// The folder.
        dir: PathBuf,
        /// The file found.
        file: String,
    },

    /// A pointer of Git's large file storage stands in place of the file.
    #[error("`{}` is a Git LFS pointer, not the file itself\nhint: run `git lfs pull` in its folder", path.display())]
    LfsPointer {
        /// The file.
        path: PathBuf,
    },

    /// The header of a safetensors file cannot be as long as its first eight bytes say.
    #[error(
        "`{}` is no safetensors file or is cut off: its header should have {header_len} bytes (at most {limit} are \
         allowed), and the file has {file_len}\nhint: {AGAIN}",
        path.display()
    )]
    HeaderLength {
        /// The file.
        path: PathBuf,
        /// The length that the file claims, 0 if it is too short to claim one.
        header_len: u64,
        /// Bytes in the file.
        file_len: u64,
        /// The format's limit.
        limit: u64,
    },

    /// The header of a safetensors file is not text.
    #[error("the header of `{}` is not UTF-8", path.display())]
    HeaderUtf8 {
        /// The file.
        path: PathBuf,
        /// Where it stops to be.
        #[source]
        source: Utf8Error,
    },

    /// The header of a safetensors file is not the JSON object that the format asks for.
    #[error("the header of `{}` is not a safetensors header", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What was wrong, and in which tensor's entry.
        #[source]
        source: serde_json::Error,
    },

    /// What the header says of one tensor cannot be.
    #[error("tensor `{}` in `{}` {problem}", shown(name), path.display())]
    Tensor {
        /// The tensor.
        name: String,
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: TensorProblem,
    },

    /// Bytes behind the last tensor.
    #[error("`{}` holds {data_len} bytes of data, but its tensors end at byte {end}", path.display())]
    Trailing {
        /// The file.
        path: PathBuf,
        /// Bytes behind the header.
        data_len: u64,
        /// Where the last tensor ends.
        end: u64,
    },

    /// The index names a shard that is not a plain relative path.
    #[error("`{}` puts tensor `{}` in `{}`, which is not a file inside the folder", index.display(), shown(name), shown(shard))]
    ShardPath {
        /// The index file.
        index: PathBuf,
        /// A tensor said to be in it.
        name: String,
        /// The path it gives.
        shard: String,
    },

    /// A shard that the index names is not there.
    #[error("`{}` names the shard `{}`, which is missing\nhint: {AGAIN}", index.display(), shown(shard))]
    MissingShard {
        /// The index file.
        index: PathBuf,
        /// The shard.
        shard: String,
    },

    /// The index and a shard disagree.
    #[error(
        "`{}` puts tensor `{}` in `{}`, which does not hold it\nhint: {AGAIN}",
        index.display(),
        shown(name),
        shown(shard)
    )]
    NotInShard {
        /// The index file.
        index: PathBuf,
        /// The tensor.
        name: String,
        /// The shard named.
        shard: String,
    },

    /// Two shards hold a tensor of the same name.
    #[error(
        "tensor `{}` stands both in `{}` and in `{}`\nhint: {AGAIN}",
        shown(name),
        first.display(),
        second.display()
    )]
    TwoShards {
        /// The tensor.
        name: String,
        /// One shard.
        first: PathBuf,
        /// The other.
        second: PathBuf,
    },

    /// A tensor was asked for that no file holds.
    #[error("`{}` holds no tensor `{}`", path.display(), shown(name))]
    NoSuchTensor {
        /// The folder or file.
        path: PathBuf,
        /// The tensor.
        name: String,
    },

    /// A tensor cannot be written under this name.
    #[error("cannot write a tensor named `{}`: {reason}", shown(name))]
    TensorName {
        /// The name.
        name: String,
        /// Why not.
        reason: &'static str,
    },

    /// A tensor of an element type that is not written.
    #[error(
        "cannot write tensor `{}` of kind {kind}, expected one of {}",
        shown(name),
        known_dtypes()
    )]
    Kind {
        /// The tensor.
        name: String,
        /// Its kind.
        kind: String,
    },

    /// A file of a folder to be written has a name that leads outside of it, or that is taken.
    #[error("cannot write a file named `{}`: {reason}", shown(file))]
    FileName {
        /// The name.
        file: String,
        /// Why not.
        reason: &'static str,
    },

    /// The folder to be replaced is, or holds, the working directory.
    #[error("cannot replace `{}`: the process works in it\nhint: name a folder inside of it", dir.display())]
    WorkingFolder {
        /// The folder.
        dir: PathBuf,
    },

    /// The folder to be replaced is a mount point.
    #[error("cannot replace `{}`: it is a mount point\nhint: name a folder inside of it", dir.display())]
    MountPoint {
        /// The folder.
        dir: PathBuf,
    },

    /// LibTorch refused to make, copy or convert a tensor: out of memory, an unusual layout.
    #[error("LibTorch failed to {doing} tensor `{}`", shown(name))]
    Torch {
        /// `load`, `write` or `read the bytes of`.
        doing: &'static str,
        /// The tensor.
        name: String,
        /// LibTorch's own words.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// What can be wrong with one tensor of a safetensors header.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TensorProblem {
    /// Two entries of one name.
    #[error("is listed twice")]
    Twice,

    /// An element type that is unknown, or that is not read.
    #[error("has dtype `{}`, expected one of {}", shown(.0), known_dtypes())]
    Dtype(String),

    /// More elements than can be counted.
    #[error("has shape {0:?}, which is too large")]
    Shape(Vec<u64>),

    /// The bytes do not hold the shape.
    #[error("has {found} bytes, expected {expected} for its shape and dtype")]
    Bytes {
        /// By shape and dtype.
        expected: u64,
        /// By the offsets.
        found: u64,
    },

    /// The end lies before the start.
    #[error("begins at byte {0} and ends before it, at byte {1}")]
    Backwards(u64, u64),

    /// The tensor overlaps the one before it, or leaves a hole.
    #[error(
        "begins at byte {found} of the data, expected {expected}, where the one before it ends"
    )]
    Begin {
        /// The end of the one before.
        expected: u64,
        /// The start given.
        found: u64,
    },

    /// The file ends too early.
    #[error(
        "ends at byte {end} of the data, and the file holds {data_len}: it is cut off\nhint: fetch it again"
    )]
    CutOff {
        /// The end given.
        end: u64,
        /// Bytes behind the header.
        data_len: u64,
    },
}

impl Error {
    /// What makes the system's refusal an error of this crate: `.map_err(Error::io("read", path))`.
    pub fn io(doing: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { doing, path, source }
    }

    /// What makes LibTorch's refusal an error of this crate: `.map_err(Error::torch("load", name))`.
    pub fn torch<E: std::error::Error + Send + Sync + 'static>(
        doing: &'static str,
        name: &str,
    ) -> impl FnOnce(E) -> Self {
        move |source| Self::Torch { doing, name: name.to_owned(), source: source.into() }
    }
}

/// A name from an untrusted file, fit for a terminal: control characters escaped, not longer than two lines.
fn shown(name: &str) -> String {
    const MOST: usize = 160;
    let short: Cow<'_, str> = match name.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}…", &name[..end]).into(),
        None => name.into(),
    };
    short
        .chars()
        .flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] })
        .collect()
}

fn known_dtypes() -> String {
    crate::DTYPES.map(|dtype| dtype.to_string()).join(", ")
}
