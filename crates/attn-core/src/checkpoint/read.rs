//! Reading model folders and safetensors files.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read},
    ops::Range,
    path::{Path, PathBuf},
};

use attn_torch::Bytes;
use serde::Deserialize;
use serde_json::{Map, Value};
use tch::{Device, Kind, TchError, Tensor};

use super::{
    INDEX_FILE, WEIGHTS_FILE,
    error::Error,
    header::{self, Pairs},
    is_plain,
};

/// The most that is read of a JSON file. The index of a model with a million tensors is about as long.
const MAX_JSON: u64 = 100_000_000;

/// Bytes of a file that are mapped in at a time. LibTorch's threads meet after each piece, which takes milliseconds on
/// a busy machine: with pieces of 1 MiB, loading took up to eight times as long.
const PIECE: usize = 16 << 20;

/// The weights of a model folder, or a safetensors file: all names, shapes and kinds, and the tensors on request.
///
/// The files are mapped and must not be cut short while this is alive; replacing them, as everything here writes
/// files, is fine.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    files: Vec<Mapped>,
    tensors: BTreeMap<String, Stored>,
}

#[derive(Debug)]
struct Mapped {
    path: PathBuf,
    /// None where the file holds no byte of data.
    data: Option<Bytes>,
    metadata: BTreeMap<String, String>,
}

#[derive(Debug)]
struct Stored {
    /// Position in `files`.
    file: usize,
    kind: Kind,
    shape: Vec<i64>,
    begin: usize,
    len: usize,
}

impl Checkpoint {
    /// Opens the weights of the model folder `dir`: `model.safetensors`, or else the shards that
    /// `model.safetensors.index.json` names, the order in which transformers looks for them.
    ///
    /// Symbolic links are followed, as the Hub's cache is made of them. A tensor that stands in a shard but not in
    /// the index counts as present.
    ///
    /// # Errors
    ///
    /// If no weights are found, or if anything in a header or the index is wrong. The data itself is not looked at.
    pub fn open(dir: &Path) -> Result<Self, Error> {
        if !fs::metadata(dir).map_err(Error::io("open", dir))?.is_dir() {
            return Err(Error::FileType { path: dir.into(), expected: "folder" });
        }
        // A link that leads nowhere counts as there: opening it gives the better message.
        let holds = |file: &str| dir.join(file).symlink_metadata().is_ok();
        if holds(WEIGHTS_FILE) {
            Ok(Self { path: dir.into(), ..Self::open_file(&dir.join(WEIGHTS_FILE))? })
        } else if holds(INDEX_FILE) {
            Self::open_shards(dir)
        } else {
            Err(no_weights(dir))
        }
    }

    /// Opens a single safetensors file.
    ///
    /// # Errors
    ///
    /// If anything in its header is wrong.
    pub fn open_file(path: &Path) -> Result<Self, Error> {
        let mut checkpoint =
            Self { path: path.into(), files: Vec::new(), tensors: BTreeMap::new() };
        checkpoint.add(path)?;
        Ok(checkpoint)
    }

    fn open_shards(dir: &Path) -> Result<Self, Error> {
        let index = dir.join(INDEX_FILE);
        let weight_map = read_index(&index)?;
        let mut shards = BTreeMap::<&str, &str>::new();
        for (name, shard) in &weight_map {
            if !is_plain(shard) {
                return Err(Error::ShardPath { index, name: name.clone(), shard: shard.clone() });
            }
            shards.entry(shard).or_insert(name);
        }
        let mut checkpoint = Self { path: dir.into(), files: Vec::new(), tensors: BTreeMap::new() };
        for shard in shards.keys() {
            checkpoint.add(&dir.join(shard)).map_err(|error| match error {
                Error::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                    Error::MissingShard { index: index.clone(), shard: (*shard).to_owned() }
                }
                other => other,
            })?;
        }
        for (name, shard) in weight_map {
            let stored = checkpoint.tensors.get(&name);
            if stored.is_none_or(|stored| checkpoint.files[stored.file].path != dir.join(&shard)) {
                return Err(Error::NotInShard { index, name, shard });
            }
        }
        Ok(checkpoint)
    }

    fn add(&mut self, path: &Path) -> Result<(), Error> {
        // Before opening, as opening a pipe waits for its other end.
        let file_len = regular_len(path)?;
        let mut file = File::open(path).map_err(Error::io("open", path))?;
        let header = header::read(&mut file, file_len, path)?;
        let has_data = header.entries.iter().any(|entry| entry.len > 0);
        let data = if has_data {
            Some(map(&file, file_len).map_err(Error::io("map", path))?)
        } else {
            None
        };

        for entry in header.entries {
            let stored = Stored {
                file: self.files.len(),
                kind: entry.kind,
                shape: entry.shape,
                begin: entry.begin,
                len: entry.len,
            };
            if let Some(first) = self.tensors.get(&entry.name) {
                let first = self.files[first.file].path.clone();
                return Err(Error::TwoShards { name: entry.name, first, second: path.into() });
            }
            self.tensors.insert(entry.name, stored);
        }
        self.files.push(Mapped { path: path.into(), data, metadata: header.metadata });
        Ok(())
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// How many tensors there are.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Whether there is no tensor at all.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// Whether there is a tensor `name`.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The shape of tensor `name`.
    pub fn shape(&self, name: &str) -> Option<&[i64]> {
        self.tensors.get(name).map(|stored| stored.shape.as_slice())
    }

    /// The kind that tensor `name` is stored in.
    pub fn dtype(&self, name: &str) -> Option<Kind> {
        self.tensors.get(name).map(|stored| stored.kind)
    }

    /// The file that holds tensor `name`.
    pub fn file(&self, name: &str) -> Option<&Path> {
        self.tensors.get(name).map(|stored| self.files[stored.file].path.as_path())
    }

    /// Bytes of all tensors as they are stored.
    pub fn total_bytes(&self) -> u64 {
        self.tensors.values().map(|stored| stored.len as u64).sum()
    }

    /// Elements of all tensors.
    pub fn total_elements(&self) -> u64 {
        self.tensors
            .values()
            .map(|stored| (stored.len / stored.kind.elt_size_in_bytes()) as u64)
            .sum()
    }

    /// Copies tensor `name` to `device`, converted to `kind` unless that is `None`.
    ///
    /// The pages of the file are given back while it is copied, so this takes the memory of the result and at most
    /// 16 MiB, whatever the kind stored.
    ///
    /// # Errors
    ///
    /// If there is no such tensor, or LibTorch has no memory for it.
    pub fn tensor(&self, name: &str, kind: Option<Kind>, device: Device) -> Result<Tensor, Error> {
        let stored = self.tensors.get(name).ok_or_else(|| Error::NoSuchTensor {
            path: self.path.clone(),
            name: name.to_owned(),
        })?;
        self.copy(stored, kind.unwrap_or(stored.kind), device).map_err(Error::torch("load", name))
    }

    fn copy(&self, stored: &Stored, kind: Kind, device: Device) -> Result<Tensor, TchError> {
        let Some(bytes) = self.files[stored.file].data.as_ref().filter(|_| stored.len > 0) else {
            return Tensor::f_empty(&stored.shape, (kind, device));
        };
        // A byte other than 0 and 1 is no valid `bool` in C++, so such bytes are converted, not copied.
        let stored_kind = if stored.kind == Kind::Bool { Kind::Uint8 } else { stored.kind };
        let element = stored.kind.elt_size_in_bytes();
        // Files whose header is not padded hold tensors that are not aligned for their kind; those go by way of this.
        // It is made before the result, so that the hole it leaves in the heap fits that of the next tensor.
        let is_aligned = stored.begin.is_multiple_of(element); // A mapping begins with a page.
        let bounce = match is_aligned {
            true => None,
            false => {
                Some(Tensor::f_empty([PIECE.min(stored.len) as i64], (Kind::Uint8, Device::Cpu))?)
            }
        };

        let tensor = Tensor::f_empty(&stored.shape, (kind, device))?;
        let flat = tensor.f_view(-1)?;
        for begin in (0..stored.len).step_by(PIECE) {
            let len = PIECE.min(stored.len - begin);
            let range = stored.begin + begin..stored.begin + begin + len;
            let piece = |n, kind| view(bytes, range.clone(), n, kind);
            let n_elements = (len / element) as i64;
            let mut to = flat.f_narrow(0, (begin / element) as i64, n_elements)?;
            match &bounce {
                None => to.f_copy_(&piece(n_elements, stored_kind)?)?,
                Some(bounce) => {
                    let mut bounce = bounce.f_narrow(0, 0, len as i64)?;
                    bounce.f_copy_(&piece(len as i64, Kind::Uint8)?)?;
                    to.f_copy_(&bounce.f_view_dtype(stored_kind)?)?;
                }
            }
            bytes.give_back(range);
        }
        Ok(tensor)
    }
}

/// Reads all tensors of a safetensors file onto the CPU in the kinds they are stored in, sorted by name.
///
/// # Errors
///
/// If anything in the header is wrong, or memory runs out.
pub fn read_tensors(path: &Path) -> Result<Vec<(String, Tensor)>, Error> {
    let file = Checkpoint::open_file(path)?;
    file.names().map(|name| Ok((name.to_owned(), file.tensor(name, None, Device::Cpu)?))).collect()
}

/// Reads the free text entries (`__metadata__`) of a safetensors file.
///
/// # Errors
///
/// If anything in the header is wrong.
pub fn read_metadata(path: &Path) -> Result<BTreeMap<String, String>, Error> {
    let mut checkpoint = Checkpoint::open_file(path)?;
    Ok(checkpoint.files.remove(0).metadata)
}

/// Reads the JSON object `dir/file`, such as `config.json`.
///
/// # Errors
///
/// If there is no such file, or it is not an object; the error names the file, the line and the column.
pub fn read_json(dir: &Path, file: &str) -> Result<Map<String, Value>, Error> {
    parse_json(&dir.join(file))
}

#[derive(Deserialize)]
struct Index {
    weight_map: Pairs<String>,
}

/// The tensors and shards that the index names, sorted by tensor.
fn read_index(path: &Path) -> Result<BTreeMap<String, String>, Error> {
    let Index { weight_map: Pairs(pairs) } = parse_json(path)?;
    let mut weight_map = BTreeMap::new();
    for (name, shard) in pairs {
        if weight_map.contains_key(&name) {
            let problem = super::TensorProblem::Twice;
            return Err(Error::Tensor { name, path: path.into(), problem });
        }
        weight_map.insert(name, shard);
    }
    Ok(weight_map)
}

fn parse_json<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<T, Error> {
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
fn regular_len(path: &Path) -> Result<u64, Error> {
    let metadata = fs::metadata(path).map_err(Error::io("open", path))?;
    if metadata.is_file() {
        Ok(metadata.len())
    } else {
        Err(Error::FileType { path: path.into(), expected: "file" })
    }
}

fn no_weights(dir: &Path) -> Error {
    let mut files: Vec<String> = fs::read_dir(dir)
        .map(|entries| {
            entries
                .flatten()
                .map(|entry| entry.file_name().to_string_lossy().into_owned())
                .collect()
        })
        .unwrap_or_default();
    files.sort();
    let pickled = |file: &String| {
        file.starts_with("pytorch_model")
            || [".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack"]
                .iter()
                .any(|end| file.ends_with(end))
    };
    let found: Vec<String> =
        files.iter().filter(|file| file.ends_with(".safetensors")).cloned().collect();
    match files.into_iter().find(pickled) {
        Some(file) if found.is_empty() => Error::Pickled { dir: dir.into(), file },
        _ => Error::NoWeights { dir: dir.into(), found },
    }
}

/// Maps `len` bytes. They are only ever copied, as numbers of which every bit pattern is valid.
fn map(file: &File, len: u64) -> io::Result<Bytes> {
    let bytes = Bytes::map_file(file)?;
    if bytes.len() as u64 == len { Ok(bytes) } else { Err(io::Error::other("its length changed")) }
}

/// `n` elements over `range`, which is aligned for `kind`, not copied.
fn view(bytes: &Bytes, range: Range<usize>, n: i64, kind: Kind) -> Result<Tensor, TchError> {
    bytes.tensor(range, &[n], kind).map_err(|error| TchError::Torch(error.to_string()))
}
