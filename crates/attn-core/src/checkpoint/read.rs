//! Reading model folders and safetensors files.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    ops::Range,
    path::{Path, PathBuf},
};

use attn_files::{Error, Layout, Stored};
use attn_torch::Bytes;
use tch::{Device, Kind, TchError, Tensor};

use super::kind_of;

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
        Self::map(dir, Layout::open(dir)?)
    }

    /// Opens a single safetensors file.
    ///
    /// # Errors
    ///
    /// If anything in its header is wrong.
    pub fn open_file(path: &Path) -> Result<Self, Error> {
        Self::map(path, Layout::open_file(path)?)
    }

    fn map(path: &Path, Layout { files, tensors }: Layout) -> Result<Self, Error> {
        let mut has_data = vec![false; files.len()];
        tensors.values().for_each(|stored| has_data[stored.file] |= stored.len > 0);
        let mapped = files.into_iter().zip(has_data).map(|(opened, has_data)| {
            let data = has_data.then(|| map(&opened.file, opened.len)).transpose();
            let data = data.map_err(Error::io("map", &opened.path))?;
            Ok(Mapped { path: opened.path, data, metadata: opened.metadata })
        });
        Ok(Self { path: path.into(), files: mapped.collect::<Result<_, _>>()?, tensors })
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
        self.tensors.get(name).map(|stored| kind_of(stored.dtype))
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
            .map(|stored| (stored.len / kind_of(stored.dtype).elt_size_in_bytes()) as u64)
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
        self.copy(stored, kind.unwrap_or(kind_of(stored.dtype)), device)
            .map_err(Error::torch("load", name))
    }

    fn copy(&self, stored: &Stored, kind: Kind, device: Device) -> Result<Tensor, TchError> {
        let Some(bytes) = self.files[stored.file].data.as_ref().filter(|_| stored.len > 0) else {
            return Tensor::f_empty(&stored.shape, (kind, device));
        };
        // A byte other than 0 and 1 is no valid `bool` in C++, so such bytes are converted, not copied.
        let stored_kind = match kind_of(stored.dtype) {
            Kind::Bool => Kind::Uint8,
            kind => kind,
        };
        let element = stored_kind.elt_size_in_bytes();
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

/// Maps `len` bytes. They are only ever copied, as numbers of which every bit pattern is valid.
fn map(file: &File, len: u64) -> io::Result<Bytes> {
    let bytes = Bytes::map_file(file)?;
    if bytes.len() as u64 == len { Ok(bytes) } else { Err(io::Error::other("its length changed")) }
}

/// `n` elements over `range`, which is aligned for `kind`, not copied.
fn view(bytes: &Bytes, range: Range<usize>, n: i64, kind: Kind) -> Result<Tensor, TchError> {
    bytes.tensor(range, &[n], kind).map_err(|error| TchError::Torch(error.to_string()))
}
