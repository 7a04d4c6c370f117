//! Where the tensors of a model folder lie, before a byte of them is read.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use safetensors::Dtype;
use serde::Deserialize;

use crate::{
    Error, INDEX_FILE, TensorProblem, WEIGHTS_FILE,
    header::{self, Pairs},
    is_plain,
    json::{parse_json, regular_len},
};

/// The files that hold the weights of a model folder, and where in them each tensor lies. Every tensor lies inside its file, no two
/// overlap, and every byte behind a header belongs to one.
#[derive(Debug)]
pub struct Layout {
    /// The files, still open.
    pub files: Vec<Opened>,
    /// All tensors, by name.
    pub tensors: BTreeMap<String, Stored>,
}

/// A safetensors file whose header was read.
#[derive(Debug)]
pub struct Opened {
    /// Where it stands.
    pub path: PathBuf,
    /// The very file whose header was read.
    pub file: File,
    /// Its length in bytes.
    pub len: u64,
    /// The free text of its header.
    pub metadata: BTreeMap<String, String>,
}

/// Where a tensor lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// Position in [`Layout::files`].
    pub file: usize,
    /// One of [`crate::DTYPES`].
    pub dtype: Dtype,
    /// Its axes.
    pub shape: Vec<i64>,
    /// Its first byte, from the file's first.
    pub begin: usize,
    /// Its bytes.
    pub len: usize,
}

#[derive(Deserialize)]
struct Index {
    weight_map: Pairs<String>,
}

impl Layout {
    /// Reads where the weights of the model folder `dir` lie: `model.safetensors`, or else the shards that
    /// `model.safetensors.index.json` names, the order in which transformers looks for them.
    ///
    /// Symbolic links are followed, as the Hub's cache is made of them. A tensor that stands in a shard but not in
    /// the index counts as present.
    ///
    /// # Errors
    ///
    /// If no weights are found, or if anything in a header or the index is wrong.
    pub fn open(dir: &Path) -> Result<Self, Error> {
        if !fs::metadata(dir).map_err(Error::io("open", dir))?.is_dir() {
            return Err(Error::FileType { path: dir.into(), expected: "folder" });
        }
        // A link that leads nowhere counts as there: opening it gives the better message.
        let holds = |file: &str| dir.join(file).symlink_metadata().is_ok();
        if holds(WEIGHTS_FILE) {
            Self::open_file(&dir.join(WEIGHTS_FILE))
        } else if holds(INDEX_FILE) {
            Self::open_shards(dir)
        } else {
            Err(no_weights(dir))
        }
    }

    /// Reads where the tensors of a single safetensors file lie.
    ///
    /// # Errors
    ///
    /// If anything in its header is wrong.
    pub fn open_file(path: &Path) -> Result<Self, Error> {
        let mut layout = Self { files: Vec::new(), tensors: BTreeMap::new() };
        layout.add(path)?;
        Ok(layout)
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
        let mut layout = Self { files: Vec::new(), tensors: BTreeMap::new() };
        for shard in shards.keys() {
            layout.add(&dir.join(shard)).map_err(|error| match error {
                Error::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                    Error::MissingShard { index: index.clone(), shard: (*shard).to_owned() }
                }
                other => other,
            })?;
        }
        for (name, shard) in weight_map {
            let stored = layout.tensors.get(&name);
            if stored.is_none_or(|stored| layout.files[stored.file].path != dir.join(&shard)) {
                return Err(Error::NotInShard { index, name, shard });
            }
        }
        Ok(layout)
    }

    fn add(&mut self, path: &Path) -> Result<(), Error> {
        // Before opening, as opening a pipe waits for its other end.
        let len = regular_len(path)?;
        let mut file = File::open(path).map_err(Error::io("open", path))?;
        let header = header::read(&mut file, len, path)?;
        for (name, stored) in header.tensors {
            if let Some(first) = self.tensors.get(&name) {
                let first = self.files[first.file].path.clone();
                return Err(Error::TwoShards { name, first, second: path.into() });
            }
            self.tensors.insert(name, Stored { file: self.files.len(), ..stored });
        }
        self.files.push(Opened { path: path.into(), file, len, metadata: header.metadata });
        Ok(())
    }
}

/// The tensors and shards that the index names, sorted by tensor.
fn read_index(path: &Path) -> Result<BTreeMap<String, String>, Error> {
    let Index { weight_map: Pairs(pairs) } = parse_json(path)?;
    let mut weight_map = BTreeMap::new();
    for (name, shard) in pairs {
        if weight_map.contains_key(&name) {
            let problem = TensorProblem::Twice;
            return Err(Error::Tensor { name, path: path.into(), problem });
        }
        weight_map.insert(name, shard);
    }
    Ok(weight_map)
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
