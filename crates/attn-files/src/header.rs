//! The header of a safetensors file: eight bytes of length, then JSON, then the tensors without gaps.
//!
//! The `safetensors` crate parses it too, but keeps the last of two equal names and does not say which tensor is
//! wrong.

use std::{
    collections::{BTreeMap, HashSet},
    fmt,
    fs::File,
    io::Read,
    marker::PhantomData,
    path::Path,
};

use safetensors::{Dtype, tensor::TensorInfo};
use serde::{
    Deserialize, Deserializer, Serializer,
    de::{self, MapAccess, SeqAccess, Visitor},
    ser::SerializeMap,
};

use crate::{DTYPES, Error, Stored, TensorProblem};

/// The most bytes of a header, the format's own limit.
pub const MAX_HEADER: u64 = 100_000_000;

/// LibTorch's iterators hold no more axes.
const MAX_AXES: usize = 64;

/// The name that the format keeps for the free text of a header.
pub const METADATA: &str = "__metadata__";

/// What a file says about itself.
#[derive(Debug)]
pub(crate) struct Header {
    pub(crate) metadata: BTreeMap<String, String>,
    /// In the order of the data, as tensors of a first file.
    pub(crate) tensors: Vec<(String, Stored)>,
}

/// Reads the header of `file`, all of which must fit: once this returns, every tensor lies inside the file, no two
/// overlap, and every byte belongs to one.
pub(crate) fn read(file: &mut File, file_len: u64, path: &Path) -> Result<Header, Error> {
    let bad_len = |header_len| Error::HeaderLength {
        path: path.into(),
        header_len,
        file_len,
        limit: MAX_HEADER,
    };
    let mut len = [0; 8];
    if file_len < len.len() as u64 {
        return Err(bad_len(0));
    }
    file.read_exact(&mut len).map_err(Error::io("read", path))?;
    if &len == b"version " {
        return Err(Error::LfsPointer { path: path.into() });
    }
    let header_len = u64::from_le_bytes(len);
    let n_rest = file_len - len.len() as u64;
    if header_len > MAX_HEADER || header_len > n_rest {
        return Err(bad_len(header_len));
    }
    // Read, not mapped: text that another process may change under us is no `str`.
    let mut text = vec![0; header_len as usize];
    file.read_exact(&mut text).map_err(Error::io("read", path))?;
    parse(&text, n_rest - header_len, path)
}

fn parse(text: &[u8], data_len: u64, path: &Path) -> Result<Header, Error> {
    let text = std::str::from_utf8(text)
        .map_err(|source| Error::HeaderUtf8 { path: path.into(), source })?;
    let Raw { metadata, mut tensors } =
        serde_json::from_str(text).map_err(|source| Error::Header { path: path.into(), source })?;
    let wrong =
        |name: &str, problem| Error::Tensor { name: name.into(), path: path.into(), problem };

    let mut names = HashSet::with_capacity(tensors.len());
    if let Some((twice, _)) = tensors.iter().find(|(name, _)| !names.insert(name.as_str())) {
        return Err(wrong(twice, TensorProblem::Twice));
    }

    tensors.sort_by_key(|(_, info)| info.data_offsets);
    let data_begin = 8 + text.len();
    let mut end = 0;
    let mut stored = Vec::with_capacity(tensors.len());
    for (name, info) in tensors {
        let (dtype, shape) =
            check(&info, end, data_len).map_err(|problem| wrong(&name, problem))?;
        let (begin, stop) = info.data_offsets;
        end = stop;
        // Both fit: they lie inside the file, which is about to be mapped.
        let (begin, len) = (data_begin + begin as usize, (stop - begin) as usize);
        stored.push((name, Stored { file: 0, dtype, shape, begin, len }));
    }
    if end != data_len {
        return Err(Error::Trailing { path: path.into(), data_len, end });
    }
    Ok(Header { metadata, tensors: stored })
}

/// The element type and shape of a tensor that begins where the one before it ended.
fn check(
    info: &Info,
    expected_begin: u64,
    data_len: u64,
) -> Result<(Dtype, Vec<i64>), TensorProblem> {
    let dtype = DTYPES
        .into_iter()
        .find(|known| known.to_string() == info.dtype)
        .ok_or_else(|| TensorProblem::Dtype(info.dtype.clone()))?;
    let too_large = || TensorProblem::Shape(info.shape.0.clone());
    let shape: Vec<i64> = info
        .shape
        .0
        .iter()
        .map(|&n| n.try_into())
        .collect::<Result<_, _>>()
        .map_err(|_| too_large())?;
    // The strides of an empty tensor are computed as if its empty axes had one element; they must not overflow.
    let element = (dtype.bitsize() / 8) as i64;
    shape
        .iter()
        .try_fold(element, |bytes, &n| bytes.checked_mul(n.max(1)))
        .ok_or_else(too_large)?;
    let expected = shape.iter().product::<i64>() as u64 * element as u64;

    let (begin, end) = info.data_offsets;
    if end < begin {
        return Err(TensorProblem::Backwards(begin, end));
    }
    if end - begin != expected {
        return Err(TensorProblem::Bytes { expected, found: end - begin });
    }
    if begin != expected_begin {
        return Err(TensorProblem::Begin { expected: expected_begin, found: begin });
    }
    if end > data_len {
        return Err(TensorProblem::CutOff { end, data_len });
    }
    Ok((dtype, shape))
}

/// The bytes before the data: length, and JSON padded with spaces so that the data begins at a multiple of eight.
///
/// # Errors
///
/// None that a map of text can give.
pub fn encode(
    metadata: &BTreeMap<String, String>,
    tensors: &[(&str, TensorInfo)],
) -> Result<Vec<u8>, serde_json::Error> {
    let mut text = Vec::new();
    let mut serializer = serde_json::Serializer::new(&mut text);
    let mut map = serializer.serialize_map(None)?;
    if !metadata.is_empty() {
        map.serialize_entry(METADATA, metadata)?;
    }
    for (name, info) in tensors {
        map.serialize_entry(name, info)?;
    }
    map.end()?;
    text.resize(text.len().next_multiple_of(8), b' ');
    Ok([&(text.len() as u64).to_le_bytes()[..], &text].concat())
}

/// The header as it stands, with equal names kept apart.
struct Raw {
    metadata: BTreeMap<String, String>,
    tensors: Vec<(String, Info)>,
}

#[derive(Deserialize)]
struct Info {
    dtype: String,
    shape: Shape,
    data_offsets: (u64, u64),
}

struct Shape(Vec<u64>);

impl<'de> Deserialize<'de> for Raw {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct RawVisitor;

        impl<'de> Visitor<'de> for RawVisitor {
            type Value = Raw;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object that maps tensor names to dtype, shape and data_offsets")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Raw, A::Error> {
                let (mut metadata, mut tensors) = (None, Vec::new());
                while let Some(name) = map.next_key::<String>()? {
                    let in_entry =
                        |e: A::Error| de::Error::custom(format!("in the entry `{name}`: {e}"));
                    if name != METADATA {
                        let info = map.next_value().map_err(in_entry)?;
                        tensors.push((name, info));
                    } else if metadata.replace(map.next_value().map_err(in_entry)?).is_some() {
                        return Err(de::Error::duplicate_field(METADATA));
                    }
                }
                Ok(Raw { metadata: metadata.unwrap_or_default(), tensors })
            }
        }

        deserializer.deserialize_map(RawVisitor)
    }
}

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ShapeVisitor;

        impl<'de> Visitor<'de> for ShapeVisitor {
            type Value = Shape;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a list of at most {MAX_AXES} sizes")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Shape, A::Error> {
                let mut sizes = Vec::new();
                while let Some(size) = seq.next_element()? {
                    if sizes.len() == MAX_AXES {
                        return Err(de::Error::invalid_length(MAX_AXES + 1, &self));
                    }
                    sizes.push(size);
                }
                Ok(Shape(sizes))
            }
        }

        deserializer.deserialize_seq(ShapeVisitor)
    }
}

/// A JSON object as a list of pairs, so that a key that stands twice is seen.
pub(crate) struct Pairs<V>(pub(crate) Vec<(String, V)>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for Pairs<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PairsVisitor<V>(PhantomData<V>);

        impl<'de, V: Deserialize<'de>> Visitor<'de> for PairsVisitor<V> {
            type Value = Pairs<V>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pairs<V>, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Pairs(pairs))
            }
        }

        deserializer.deserialize_map(PairsVisitor(PhantomData))
    }
}
