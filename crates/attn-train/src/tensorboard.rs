//! TensorBoard's event file beside `metrics.jsonl`: the same numbers, a record a line, so that the file of a resumed run
//! names no step twice.
//!
//! A record is its length, a checksum of that, an `Event`, and a checksum of the event:
//! `u64 length | u32 crc(length) | bytes | u32 crc(bytes)`, little-endian, CRC-32C rotated and shifted. The messages are
//! TensorFlow's `event.proto` and `summary.proto`, of which a scalar needs six fields. Both are too little to take a
//! dependency for. Format: <https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details>.

use std::{
    fs::{self, File, OpenOptions},
    io::{Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use crate::error::{Error, Result};

/// The folder of the event file in that of a run.
pub const TENSORBOARD_FOLDER: &str = "tensorboard";

/// How TensorBoard knows an event file.
const PREFIX: &str = "events.out.tfevents.";

/// What the first record of a file says of the others.
const VERSION: &str = "brain.Event:2";

/// A number under a name at a step.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Scalar<'a> {
    pub(crate) step: u64,
    pub(crate) name: &'a str,
    pub(crate) value: f64,
}

/// The file, open at its end.
#[derive(Debug)]
pub(crate) struct EventFile {
    path: PathBuf,
    file: File,
}

impl EventFile {
    /// Starts the file of a run in `dir`, or goes on with it: its first records are those of `kept`, in order, with the
    /// time they were written at; what stands behind them is cut off, what is missing is added.
    pub(crate) fn open(dir: &Path, kept: &[Scalar<'_>]) -> Result<Self> {
        let folder = dir.join(TENSORBOARD_FOLDER);
        fs::create_dir_all(&folder).map_err(Error::io("create", &folder))?;
        let path = match found(&folder)? {
            Some(path) => path,
            None => folder.join(format!("{PREFIX}{}.attn", now() as u64)),
        };
        let old = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(Error::io("read", &path)(error)),
        };
        // The version, then one a scalar.
        let ends: Vec<usize> = ends(&old).take(1 + kept.len()).collect();
        let len = ends.last().copied().unwrap_or(0);
        let mut options = OpenOptions::new();
        let file = options.create(true).truncate(false).write(true).open(&path);
        let mut file = file.map_err(Error::io("open", &path))?;
        file.set_len(len as u64).map_err(Error::io("cut", &path))?;
        file.seek(SeekFrom::End(0)).map_err(Error::io("open", &path))?;
        let mut events = Self { path, file };
        if ends.is_empty() {
            events.write(&record(&version(now())))?;
        }
        events.append(&kept[ends.len().saturating_sub(1)..])?;
        Ok(events)
    }

    /// Adds a record for each scalar, in one write.
    pub(crate) fn append(&mut self, scalars: &[Scalar<'_>]) -> Result<()> {
        let time = now();
        let bytes: Vec<u8> =
            scalars.iter().flat_map(|scalar| record(&event(time, scalar))).collect();
        self.write(&bytes)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(Error::io("write", &self.path))
    }
}

/// The event file in `folder`.
fn found(folder: &Path) -> Result<Option<PathBuf>> {
    let entries = fs::read_dir(folder).map_err(Error::io("read", folder))?;
    let is_one = |path: &PathBuf| {
        path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(PREFIX))
    };
    Ok(entries.flatten().map(|entry| entry.path()).filter(is_one).min())
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0., |since| since.as_secs_f64())
}

/// `Event { wall_time, file_version }`.
fn version(time: f64) -> Vec<u8> {
    let mut bytes = wall_time(time);
    put_bytes(3, VERSION.as_bytes(), &mut bytes);
    bytes
}

/// `Event { wall_time, step, summary: Summary { value: [Value { tag, simple_value }] } }`.
fn event(time: f64, scalar: &Scalar<'_>) -> Vec<u8> {
    let mut value = Vec::new();
    put_bytes(1, scalar.name.as_bytes(), &mut value);
    value.push(2 << 3 | 5);
    value.extend((scalar.value as f32).to_le_bytes());
    let mut summary = Vec::new();
    put_bytes(1, &value, &mut summary);
    let mut bytes = wall_time(time);
    bytes.push(2 << 3);
    put_number(scalar.step, &mut bytes);
    put_bytes(5, &summary, &mut bytes);
    bytes
}

fn wall_time(time: f64) -> Vec<u8> {
    let mut bytes = vec![1 << 3 | 1];
    bytes.extend(time.to_le_bytes());
    bytes
}

/// A field of bytes, text or a message.
fn put_bytes(field: u8, content: &[u8], into: &mut Vec<u8>) {
    into.push(field << 3 | 2);
    put_number(content.len() as u64, into);
    into.extend(content);
}

/// A number in groups of seven bits, the lowest first.
fn put_number(mut number: u64, into: &mut Vec<u8>) {
    while number > 0x7f {
        into.push(number as u8 | 0x80);
        number >>= 7;
    }
    into.push(number as u8);
}

fn record(event: &[u8]) -> Vec<u8> {
    let length = (event.len() as u64).to_le_bytes();
    [&length[..], &checksum(&length).to_le_bytes(), event, &checksum(event).to_le_bytes()].concat()
}

/// Where each whole record of `bytes` ends, up to the first that is damaged.
fn ends(bytes: &[u8]) -> impl Iterator<Item = usize> {
    let mut start = 0;
    std::iter::from_fn(move || {
        let rest = &bytes[start..];
        let (length, rest) = rest.split_first_chunk::<8>()?;
        let (sum, rest) = rest.split_first_chunk::<4>()?;
        let n = usize::try_from(u64::from_le_bytes(*length)).ok()?;
        if u32::from_le_bytes(*sum) != checksum(length) || rest.len() < n.checked_add(4)? {
            return None;
        }
        let (event, sum) = rest[..n + 4].split_at(n);
        start += 8 + 4 + n + 4;
        (sum == checksum(event).to_le_bytes()).then_some(start)
    })
}

/// CRC-32C (Castagnoli), masked as in a record: a checksum of data with checksums would be a weak one.
fn checksum(bytes: &[u8]) -> u32 {
    crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// Bit by bit: a run writes a few dozen bytes a step.
fn crc32c(bytes: &[u8]) -> u32 {
    let step = |crc: u32, _: u32| crc >> 1 ^ (0x82f6_3b78 & (crc & 1).wrapping_neg());
    !bytes.iter().fold(u32::MAX, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), step))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scalars(steps: std::ops::RangeInclusive<u64>) -> Vec<Scalar<'static>> {
        steps.map(|step| Scalar { step, name: "loss", value: 1. / step as f64 }).collect()
    }

    /// Time, step, tag and value of each record behind the version, from the bytes.
    fn read(dir: &Path) -> Vec<(f64, u64, String, f32)> {
        let bytes = fs::read(found(&dir.join(TENSORBOARD_FOLDER)).unwrap().unwrap()).unwrap();
        let ends: Vec<usize> = ends(&bytes).collect();
        assert_eq!(*ends.last().unwrap(), bytes.len(), "every record is whole");
        let events: Vec<&[u8]> =
            ends.windows(2).map(|pair| &bytes[pair[0] + 12..pair[1] - 4]).collect();
        let parse = |event: &[u8]| {
            // Steps below 128 are one byte: 09 time 10 step 2a n 0a n 0a n tag 15 value.
            let n = event[16] as usize;
            let tag = String::from_utf8(event[17..17 + n].to_vec()).unwrap();
            let [time, value] = [&event[1..9], &event[18 + n..22 + n]];
            (
                f64::from_le_bytes(time.try_into().unwrap()),
                u64::from(event[10]),
                tag,
                f32::from_le_bytes(value.try_into().unwrap()),
            )
        };
        events.into_iter().map(parse).collect()
    }

    fn steps(dir: &Path) -> Vec<u64> {
        read(dir).into_iter().map(|(_, step, ..)| step).collect()
    }

    /// RFC 3720, B.4.
    #[test]
    fn checksums_are_those_of_the_standard() {
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(crc32c(&(0..32).collect::<Vec<u8>>()), 0x46dd_794e);
    }

    /// From tensorboard 2.21.0: `Event(wall_time=1.5, step=300, summary=Summary(value=[Summary.Value(tag="lr",
    /// simple_value=0.25)])).SerializeToString()`, and the same written by its `RecordWriter`.
    #[test]
    fn a_record_equals_tensorboards_byte_for_byte() {
        let scalar = Scalar { step: 300, name: "lr", value: 0.25 };
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        assert_eq!(
            hex(&record(&event(1.5, &scalar))),
            "19000000000000008bf1082809000000000000f83f10ac022a0b0a090a026c72150000803e45fb0cd9"
        );
    }

    #[test]
    fn a_scalar_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let mut events = EventFile::open(dir.path(), &[]).unwrap();
        events.append(&[Scalar { step: 7, name: "grad_norm", value: 2.5 }]).unwrap();

        let [(time, step, tag, value)] = &read(dir.path())[..] else { panic!() };

        assert_eq!((*step, tag.as_str(), *value), (7, "grad_norm", 2.5));
        assert!((now() - time).abs() < 60.);
    }

    #[test]
    fn what_is_gone_on_from_stands_there_once_with_its_time() {
        let dir = tempfile::tempdir().unwrap();
        EventFile::open(dir.path(), &[]).unwrap().append(&scalars(1..=5)).unwrap();
        let before = read(dir.path());

        let mut events = EventFile::open(dir.path(), &scalars(1..=3)).unwrap();
        assert_eq!(read(dir.path()), before[..3]);
        events.append(&scalars(4..=6)).unwrap();

        assert_eq!(steps(dir.path()), [1, 2, 3, 4, 5, 6]);
    }

    #[test]
    fn what_a_power_cut_took_is_added_again() {
        let dir = tempfile::tempdir().unwrap();
        EventFile::open(dir.path(), &[]).unwrap().append(&scalars(1..=3)).unwrap();
        let path = found(&dir.path().join(TENSORBOARD_FOLDER)).unwrap().unwrap();
        let len = fs::metadata(&path).unwrap().len();
        OpenOptions::new().write(true).open(&path).unwrap().set_len(len - 5).unwrap();

        EventFile::open(dir.path(), &scalars(1..=4)).unwrap();
        assert_eq!(steps(dir.path()), [1, 2, 3, 4]);

        fs::write(&path, b"torn").unwrap();
        EventFile::open(dir.path(), &scalars(1..=2)).unwrap();
        assert_eq!(steps(dir.path()), [1, 2]);
    }
}
