//! Writing model folders and safetensors files.

use std::{
    collections::{BTreeMap, HashSet},
    ffi::OsStr,
    fs::File,
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};

use attn_files::{
    Error, INDEX_FILE, MAX_HEADER, METADATA, Staging, WEIGHTS_FILE, encode, reserve, target_of,
};
use safetensors::tensor::TensorInfo;
use serde_json::{Map, Value, json};
use tch::{Device, TchError, Tensor};

use super::{CONFIG_FILE, dtype_of, sums};

/// Bytes copied from a tensor at a time.
const PIECE: usize = 4 << 20;

/// How [`write_folder`] lays the weights out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WriteOptions {
    /// The most bytes of tensors in one file; more make shards. A tensor that is larger gets a file of its own.
    pub max_shard_bytes: Option<u64>,
    /// Free text for the header of each file, beside `format = "pt"`, which transformers asks for.
    pub metadata: BTreeMap<String, String>,
}

/// Writes the model folder `dir` in one step: weights, `config.json` and `extra_files`, of which each has a plain
/// relative path.
///
/// Other files that an existing `dir` holds (a tokenizer, a model card) stay, except weights of a former model. See
/// [`FolderWriter`] for what happens on the way.
///
/// # Errors
///
/// If `dir` is a file, a name is taken or leads outside, a tensor has a kind that safetensors lacks, or the system
/// refuses (disk full, no permission). `dir` is then as it was.
pub fn write_folder(
    dir: &Path,
    tensors: &[(String, Tensor)],
    config: &Map<String, Value>,
    extra_files: &[(String, Vec<u8>)],
    options: &WriteOptions,
) -> Result<(), Error> {
    let folder = FolderWriter::create(dir)?;
    folder.weights(tensors, options)?;
    folder.json(CONFIG_FILE, config)?;
    for (file, content) in extra_files {
        folder.file(file, content)?;
    }
    folder.commit()
}

/// Writes the safetensors file `path` in one step, with `metadata` and `format = "pt"` in its header.
///
/// Tensors may lie on any device and in any layout, and are streamed: at most one of them is copied at a time.
///
/// # Errors
///
/// If `path` is no file, two tensors share a name, a tensor has a kind that safetensors lacks, or the system refuses.
/// `path` is then as it was.
pub fn write_tensors(
    path: &Path,
    tensors: &[(String, Tensor)],
    metadata: &BTreeMap<String, String>,
) -> Result<(), Error> {
    let plan = plan(tensors)?;
    attn_files::write_file(path, |file| {
        stream(file, path, &plan.iter().collect::<Vec<_>>(), metadata)
    })
}

/// Checks that a folder can be written as `dir`, or take the place of the one that is there, before there is work to lose.
///
/// # Errors
///
/// If `dir` is a file, a place where a file system is mounted, or a folder that the working directory lies in.
pub fn check_folder(dir: &Path) -> Result<(), Error> {
    target_of(dir).map(drop)
}

/// A folder that several write to, and that appears whole: what [`Self::path`] becomes, as [`FolderWriter`] does. Of a folder that is
/// there already nothing is kept. Dropped without a commit, nothing is left.
#[derive(Debug)]
#[must_use = "the folder appears with `commit`"]
pub struct FolderDraft {
    staging: Staging,
}

impl FolderDraft {
    /// Begins to write `dir`, which may exist. Missing folders above it are made.
    ///
    /// # Errors
    ///
    /// As [`check_folder`], and if the folder above it cannot be written to.
    pub fn create(dir: &Path) -> Result<Self, Error> {
        Ok(Self { staging: Staging::new(dir)? })
    }

    /// Where to write: nothing is there yet.
    pub fn path(&self) -> PathBuf {
        self.staging.inner()
    }

    /// Puts the folder in its place, in one step.
    ///
    /// # Errors
    ///
    /// If nothing was written, or the system refuses; what was there is then as it was.
    pub fn commit(self) -> Result<(), Error> {
        self.staging.commit_inner()
    }
}

/// Writes a small file in one step.
///
/// # Errors
///
/// If `path` is no file, or the system refuses. `path` is then as it was.
pub fn write_file(path: &Path, content: &[u8]) -> Result<(), Error> {
    attn_files::write_file(path, |mut file| {
        file.write_all(content).map_err(Error::io("write", path))
    })
}

/// A folder that is written file by file and appears in one step.
///
/// Everything goes into a hidden folder beside the final one and is brought to the disk there; [`Self::commit`] then
/// swaps the two. A kill at any moment leaves the old folder or the new one (and the hidden one, which the next writer
/// of the same folder removes). Where the file system cannot swap (NFS), two renames take its place, and a kill between
/// them leaves the old folder whole under the name `.<name>.attn-old-…`.
///
/// Dropped without a commit, nothing is left.
#[derive(Debug)]
#[must_use = "the folder appears with `commit`"]
pub struct FolderWriter {
    staging: Staging,
}

impl FolderWriter {
    /// Begins to write `dir`, which may exist. Missing folders above it are made.
    ///
    /// # Errors
    ///
    /// If `dir` is a file, or the working directory lies in it, or the folder above it cannot be written to.
    pub fn create(dir: &Path) -> Result<Self, Error> {
        Ok(Self { staging: Staging::new(dir)? })
    }

    /// Writes the weights of a model, under the names that the Hub uses: `model.safetensors`, or shards
    /// `model-00001-of-00003.safetensors` and their index.
    ///
    /// # Errors
    ///
    /// As [`write_tensors`].
    pub fn weights(
        &self,
        tensors: &[(String, Tensor)],
        options: &WriteOptions,
    ) -> Result<(), Error> {
        let plan = plan(tensors)?;
        let shards = shards(&plan, options.max_shard_bytes);
        if let [tensors] = shards.as_slice() {
            return self.stream(WEIGHTS_FILE, tensors, &options.metadata);
        }
        let mut weight_map = BTreeMap::new();
        for (i, tensors) in shards.iter().enumerate() {
            let file = format!("model-{:05}-of-{:05}.safetensors", i + 1, shards.len());
            self.stream(&file, tensors, &options.metadata)?;
            weight_map.extend(tensors.iter().map(|planned| (planned.name, file.clone())));
        }
        let total_size: usize = plan.iter().map(|planned| planned.len).sum();
        let total_parameters: usize = plan.iter().map(|planned| planned.tensor.numel()).sum();
        self.write_json(
            INDEX_FILE,
            &json!({
                "metadata": { "total_parameters": total_parameters, "total_size": total_size },
                "weight_map": weight_map,
            }),
        )
    }

    /// Writes `tensors` to the one safetensors file `file`.
    ///
    /// # Errors
    ///
    /// As [`write_tensors`].
    pub fn tensors(
        &self,
        file: &str,
        tensors: &[(String, Tensor)],
        metadata: &BTreeMap<String, String>,
    ) -> Result<(), Error> {
        self.stream(file, &plan(tensors)?.iter().collect::<Vec<_>>(), metadata)
    }

    /// Writes a JSON object, such as `config.json`, indented, its fields in the order of `map`.
    ///
    /// # Errors
    ///
    /// If `file` is not a plain relative path, is there already, or the system refuses.
    pub fn json(&self, file: &str, map: &Map<String, Value>) -> Result<(), Error> {
        self.write_json(file, map)
    }

    /// Writes any other file.
    ///
    /// # Errors
    ///
    /// If `file` is not a plain relative path, is there already, or the system refuses.
    pub fn file(&self, file: &str, content: &[u8]) -> Result<(), Error> {
        self.staging.write(file, |mut opened| {
            opened.write_all(content).map_err(Error::io("write", self.staging.shown(file)))
        })
    }

    /// Writes the checksums of all files so far, for [`check_sums`](super::check_sums).
    ///
    /// # Errors
    ///
    /// If they are there already, or the system refuses.
    pub fn sums(&self) -> Result<(), Error> {
        self.file(sums::SUMS_FILE, sums::of(self.staging.path())?.as_bytes())
    }

    /// Lets the folder appear in its place, together with the files that the old one holds and this one does not.
    ///
    /// Weights of the old folder are left out if new ones were written. Files are kept by hard link where possible.
    ///
    /// # Errors
    ///
    /// If the old folder cannot be read, is a mount point or holds one, or the system refuses.
    pub fn commit(self) -> Result<(), Error> {
        let has_weights = [WEIGHTS_FILE, INDEX_FILE].iter().any(|file| self.staging.contains(file));
        self.staging.commit(|file| has_weights && is_weights(file))
    }

    fn write_json<T: serde::Serialize + ?Sized>(&self, file: &str, value: &T) -> Result<(), Error> {
        let mut text = serde_json::to_vec_pretty(value)
            .map_err(|source| Error::Json { path: self.staging.shown(file), source })?;
        text.push(b'\n');
        self.file(file, &text)
    }

    fn stream(
        &self,
        file: &str,
        tensors: &[&Planned],
        metadata: &BTreeMap<String, String>,
    ) -> Result<(), Error> {
        self.staging
            .write(file, |opened| stream(opened, &self.staging.shown(file), tensors, metadata))
    }
}

/// Whether a file of an old folder holds weights, or says where they are.
fn is_weights(file: &OsStr) -> bool {
    file.to_str().is_some_and(|file| {
        let rest = file.strip_prefix("model").filter(|rest| rest.starts_with(['.', '-']));
        rest.is_some_and(|rest| {
            rest.ends_with(".safetensors") || rest.ends_with(".safetensors.index.json")
        })
    })
}

/// A tensor, and what the header will say of it.
#[derive(Debug)]
struct Planned<'a> {
    name: &'a str,
    tensor: &'a Tensor,
    info: TensorInfo,
    len: usize,
}

fn plan(tensors: &[(String, Tensor)]) -> Result<Vec<Planned<'_>>, Error> {
    let mut names = HashSet::new();
    tensors
        .iter()
        .map(|(name, tensor)| {
            let refuse = |reason| Error::TensorName { name: name.clone(), reason };
            if name == METADATA {
                return Err(refuse("the format keeps this name for the metadata"));
            }
            if !names.insert(name) {
                return Err(refuse("two tensors share it"));
            }
            let kind = tensor.f_kind().map_err(Error::torch("write", name))?;
            let dtype = dtype_of(kind)
                .ok_or_else(|| Error::Kind { name: name.clone(), kind: format!("{kind:?}") })?;
            let shape = tensor.size().iter().map(|&n| n as usize).collect();
            let len = tensor.numel() * kind.elt_size_in_bytes();
            Ok(Planned {
                name,
                tensor,
                info: TensorInfo { dtype, shape, data_offsets: (0, len) },
                len,
            })
        })
        .collect()
}

/// Cuts the list where `max_bytes` would be exceeded, as the Hub's libraries do. There is always one shard.
fn shards<'a>(plan: &'a [Planned<'a>], max_bytes: Option<u64>) -> Vec<Vec<&'a Planned<'a>>> {
    let mut shards = vec![Vec::new()];
    let mut filled = 0;
    for planned in plan {
        let len = planned.len as u64;
        let is_full = max_bytes.is_some_and(|most| filled + len > most);
        match shards.last_mut() {
            Some(shard) if shard.is_empty() || !is_full => shard.push(planned),
            _ => {
                shards.push(vec![planned]);
                filled = 0;
            }
        }
        filled += len;
    }
    shards
}

/// Writes header and data to the empty `file`, which the user knows as `path`.
fn stream(
    file: &File,
    path: &Path,
    tensors: &[&Planned],
    metadata: &BTreeMap<String, String>,
) -> Result<(), Error> {
    // The order of the `safetensors` crate: wide elements first, so that each tensor is aligned for its kind.
    let mut tensors = tensors.to_vec();
    tensors.sort_by(|a, b| b.info.dtype.cmp(&a.info.dtype).then(a.name.cmp(b.name)));

    let mut end = 0;
    let infos: Vec<_> = tensors
        .iter()
        .map(|planned| {
            let begin = end;
            end += planned.len;
            (planned.name, TensorInfo { data_offsets: (begin, end), ..planned.info.clone() })
        })
        .collect();
    let mut metadata = metadata.clone();
    metadata.entry("format".to_owned()).or_insert_with(|| "pt".to_owned());
    let header =
        encode(&metadata, &infos).map_err(|source| Error::Header { path: path.into(), source })?;
    if header.len() as u64 > MAX_HEADER {
        let len = header.len() as u64;
        return Err(Error::TooLong { path: path.into(), len, limit: MAX_HEADER });
    }

    reserve(file, (header.len() + end) as u64).map_err(Error::io("write", path))?;
    let mut out = BufWriter::with_capacity(PIECE, file);
    out.write_all(&header).map_err(Error::io("write", path))?;
    for planned in tensors {
        for_each_piece(planned.name, planned.tensor, |piece| {
            out.write_all(piece).map_err(Error::io("write", path))
        })?;
    }
    out.flush().map_err(Error::io("write", path))
}

/// Hands the bytes of a tensor on, [`PIECE`] of them at a time, wherever it lies and however it is laid out.
pub(crate) fn for_each_piece(
    name: &str,
    tensor: &Tensor,
    mut hand_on: impl FnMut(&[u8]) -> Result<(), Error>,
) -> Result<(), Error> {
    let n_elements = tensor.numel();
    if n_elements == 0 {
        return Ok(());
    }
    let torch = |e: TchError| Error::torch("read the bytes of", name)(e);
    let flat = tensor.f_detach().and_then(|t| t.f_contiguous()?.f_view(-1)).map_err(torch)?;
    let element = tensor.f_kind().map_err(torch)?.elt_size_in_bytes();
    let n_per_piece = PIECE / element;
    let mut buffer = vec![0; (n_per_piece.min(n_elements)) * element];
    for first in (0..n_elements).step_by(n_per_piece) {
        let n = n_per_piece.min(n_elements - first);
        let bytes = &mut buffer[..n * element];
        flat.f_narrow(0, first as i64, n as i64)
            .and_then(|piece| piece.f_to_device(Device::Cpu)?.f_copy_data_u8(bytes, n))
            .map_err(torch)?;
        hand_on(bytes)?;
    }
    Ok(())
}
