//! What the libraries that read tables take for granted, and strangers' files do not keep.

use std::{
    fs::File,
    io::{self, BufReader, Cursor, Read},
    panic::{AssertUnwindSafe, catch_unwind},
    str,
};

use bytes::Bytes;
use parquet::{
    errors::ParquetError,
    file::reader::{ChunkReader, Length},
};

use crate::Source;

/// Runs `work` of another library. A panic in it is its error: a damaged file must not end the program of who reads it.
///
/// What `work` changes is not used again after an error.
pub(crate) fn guarded<T, E: Into<Source>>(
    work: impl FnOnce() -> Result<T, E>,
) -> Result<T, Source> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(done) => done.map_err(Into::into),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let said = text.or(panic.downcast_ref::<&str>().copied()).unwrap_or_default();
            let first = said.lines().next().unwrap_or_default();
            Err(format!("it is damaged, or of a form that the library does not know ({first})")
                .into())
        }
    }
}

/// A Parquet file that says nothing that its size does not allow. Parquet's reader goes through lists of two thousand million entries
/// that are not there, for a minute, and makes room for as much as a page says it holds (parquet 60.1).
pub(crate) struct ParquetFile(File);

impl ParquetFile {
    /// # Errors
    ///
    /// Where what stands at the file's end names lists that cannot be, or cannot be read. What is no Parquet is left to its reader.
    pub(crate) fn new(file: File) -> Result<Self, ParquetError> {
        let this = Self(file);
        if let Some(end) = this.len().checked_sub(8) {
            let footer = this.get_bytes(end, 8)?;
            let n = u32::from_le_bytes(footer[..4].try_into().expect("four of eight"));
            if let Some(start) = end.checked_sub(n.into())
                && is_endless(&this.get_bytes(start, n as usize)?)
            {
                return Err(ParquetError::General("its metadata has lists without an end".into()));
            }
        }
        Ok(this)
    }
}

impl Length for ParquetFile {
    fn len(&self) -> u64 {
        self.0.len()
    }
}

impl ChunkReader for ParquetFile {
    type T = Ending<Page>;

    /// From here a page is read, header first, or the file's end, or nothing where the library has the page's header already.
    fn get_read(&self, start: u64) -> Result<Self::T, ParquetError> {
        let reader = self.0.get_read(start)?;
        let is_checked = self.len().checked_sub(8) == Some(start);
        Ok(Ending {
            reader: Page { reader, start, head: Cursor::default(), is_checked },
            n_ends: 0,
        })
    }

    fn get_bytes(&self, start: u64, length: usize) -> Result<Bytes, ParquetError> {
        if start.checked_add(length as u64).is_none_or(|end| end > self.len()) {
            return Err(ParquetError::EOF(format!("{length} bytes at {start} are not there")));
        }
        self.0.get_bytes(start, length)
    }
}

/// What a page may hold whatever it takes in the file: writers aim at 1 MiB.
const PAGE_BYTES: u64 = 32 << 20;

/// Bytes that a larger page may hold for each that it takes: deflate has the largest ratio that text is stored with, 1,032.
const MOST_COMPRESSED: u64 = 1_100;

/// The longest header of a page. It may hold the page's smallest and largest text.
const LONGEST_HEADER: usize = 32 << 20;

/// A page from its header on, which is looked at once it is read.
pub(crate) struct Page {
    reader: BufReader<File>,
    /// Where in the file.
    start: u64,
    /// What was read of it to see what it says.
    head: Cursor<Vec<u8>>,
    is_checked: bool,
}

impl Page {
    fn check(&mut self) -> io::Result<()> {
        let head = self.head.get_mut();
        let header = loop {
            let more = 8192.max(7 * head.len());
            let n = self.reader.by_ref().take(more as u64).read_to_end(head)?;
            let header = header(head);
            // What the file's end cuts off its reader will find.
            if header.is_whole || n < more {
                break header;
            }
            if head.len() > LONGEST_HEADER {
                return Err(self.refused("has a header without an end".into()));
            }
        };
        let Header { claimed, stored, is_countable, .. } = header;
        if !is_countable {
            return Err(self.refused("has lists without an end".into()));
        }
        if claimed > PAGE_BYTES.max(stored.saturating_mul(MOST_COMPRESSED)) {
            return Err(self.refused(format!("claims to hold {claimed} bytes in {stored}")));
        }
        Ok(())
    }

    fn refused(&self, problem: String) -> io::Error {
        let problem = format!("the page at byte {} {problem}", self.start);
        io::Error::new(io::ErrorKind::InvalidData, problem)
    }
}

impl Read for Page {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if !self.is_checked {
            self.check()?;
            self.is_checked = true;
        }
        match self.head.read(buffer)? {
            0 => self.reader.read(buffer),
            n => Ok(n),
        }
    }
}

/// What the header of a page says (Parquet's format, `PageHeader`).
#[derive(Debug, PartialEq)]
struct Header {
    /// Bytes that the page holds, 0 where it does not say.
    claimed: u64,
    /// Bytes that it takes in the file.
    stored: u64,
    /// Whether its lists have no more entries than there are bytes.
    is_countable: bool,
    /// Whether it ends where what was read of it does, or before.
    is_whole: bool,
}

/// That which `head` begins with: the sizes are the whole numbers 2 and 3 of a struct.
fn header(head: &[u8]) -> Header {
    let (mut head, mut sizes, mut is_countable) = (Compact(head), [0; 4], true);
    let mut id = 0;
    let whole = (|| {
        while let Some(kind) = head.field(&mut id)? {
            match (kind, id) {
                // The last bit is the sign.
                (4..=6, 2 | 3) => sizes[id as usize] = head.number()? >> 1,
                // Without an end, there is nothing behind it.
                _ if !head.is_countable(kind, 64)? => {
                    is_countable = false;
                    break;
                }
                _ => {}
            }
        }
        Some(())
    })();
    Header { claimed: sizes[2], stored: sizes[3], is_countable, is_whole: whole.is_some() }
}

/// What is left of bytes in Thrift's compact protocol
/// (<https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md>).
struct Compact<'a>(&'a [u8]);

impl Compact<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (&byte, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(byte)
    }

    fn skip(&mut self, n: u64) -> Option<()> {
        self.0 = self.0.get(usize::try_from(n).ok()?..)?;
        Some(())
    }

    /// A number of 64 bits; the largest in place of one of more.
    fn number(&mut self) -> Option<u64> {
        let (mut value, mut shift) = (0, 0);
        loop {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f).checked_shl(shift).unwrap_or(u64::MAX);
            shift += 7;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
    }

    /// The kind of a struct's next field, and its number in place of the one before; inside `None` at the struct's end.
    fn field(&mut self, id: &mut i64) -> Option<Option<u8>> {
        let head = self.byte()?;
        if head & 15 == 0 {
            return Some(None);
        }
        *id = match head >> 4 {
            0 => {
                let zigzag = self.number()?;
                (zigzag >> 1) as i64 ^ -((zigzag & 1) as i64)
            }
            further => id.checked_add(further.into())?,
        };
        Some(Some(head & 15))
    }

    /// Goes past a value. Whether its lists and tables have no more entries than there are bytes: Parquet's reader goes through truth
    /// values without reading any, two thousand million of them in six bytes. `None` where it is cut off or damaged, as its
    /// reader will find.
    fn is_countable(&mut self, kind: u8, depth: u8) -> Option<bool> {
        let depth = depth.checked_sub(1)?;
        match kind {
            1 | 2 => {}
            3 => self.skip(1)?,
            4..=6 => self.number().map(drop)?,
            7 => self.skip(8)?,
            8 => {
                let n = self.number()?;
                self.skip(n)?;
            }
            9 | 10 => {
                let head = self.byte()?;
                let n = if head >> 4 == 15 { self.number()? } else { u64::from(head >> 4) };
                return self.are_countable(n, &[head & 15], depth);
            }
            11 => {
                let n = self.number()?;
                if n > 0 {
                    let kinds = self.byte()?;
                    return self.are_countable(n, &[kinds >> 4, kinds & 15], depth);
                }
            }
            12 => {
                while let Some(kind) = self.field(&mut 0)? {
                    if !self.is_countable(kind, depth)? {
                        return Some(false);
                    }
                }
            }
            13 => self.skip(16)?,
            _ => return None,
        }
        Some(true)
    }

    fn are_countable(&mut self, n: u64, kinds: &[u8], depth: u8) -> Option<bool> {
        if n > self.0.len() as u64 {
            return Some(false);
        }
        for _ in 0..n {
            for &kind in kinds {
                if !self.is_countable(kind, depth)? {
                    return Some(false);
                }
            }
        }
        Some(true)
    }
}

/// Whether the struct that `bytes` begins with has lists of more entries than bytes.
fn is_endless(bytes: &[u8]) -> bool {
    const STRUCT: u8 = 12;
    Compact(bytes).is_countable(STRUCT, 64) == Some(false)
}

/// Nobody needs to be told more often that there is no more.
const MOST_ENDS: u32 = 100;

/// Refuses who goes on reading behind the end.
pub(crate) struct Ending<R> {
    reader: R,
    n_ends: u32,
}

impl<R: Read> Read for Ending<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.reader.read(buffer)?;
        if n == 0 && !buffer.is_empty() {
            self.n_ends += 1;
            if self.n_ends > MOST_ENDS {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(n)
    }
}

/// Refuses what is not UTF-8. Arrow's reader of CSV looks at the fields without what parts them: a letter that a line's end cuts
/// in two passes, and each half becomes a text that is none (undefined behaviour; arrow-csv 60.1).
pub(crate) struct Utf8<R> {
    reader: R,
    /// The beginning of a letter at the end of what was read.
    open: Vec<u8>,
    n_read: u64,
}

impl<R> Utf8<R> {
    pub(crate) fn new(reader: R) -> Self {
        Self { reader, open: Vec::new(), n_read: 0 }
    }
}

impl<R: Read> Read for Utf8<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.reader.read(buffer)?;
        let begins = self.n_read - self.open.len() as u64;
        let mut unread = std::mem::take(&mut self.open);
        unread.extend_from_slice(&buffer[..n]);
        self.n_read += n as u64;
        if let Err(error) = str::from_utf8(&unread) {
            let valid = error.valid_up_to();
            let at_end = n == 0 && !buffer.is_empty();
            if error.error_len().is_some() || at_end {
                let problem = format!("it is not UTF-8 at byte {}", begins + valid as u64);
                return Err(io::Error::new(io::ErrorKind::InvalidData, problem));
            }
            self.open = unread.split_off(valid);
        }
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, sync::Arc};

    use arrow::{
        array::{Array, Int64Array, ListArray, RecordBatch},
        buffer::OffsetBuffer,
        datatypes::{DataType, Field},
    };
    use parquet::{
        arrow::{ArrowWriter, arrow_reader::ParquetRecordBatchReaderBuilder},
        file::{metadata::KeyValue, properties::WriterProperties},
    };

    use super::*;

    /// A Parquet file of `column`.
    fn parquet(column: Arc<dyn Array>, properties: WriterProperties) -> Vec<u8> {
        let batch = RecordBatch::try_from_iter([("it", column)]).unwrap();
        let mut file = Vec::new();
        let mut writer = ArrowWriter::try_new(&mut file, batch.schema(), Some(properties)).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
        file
    }

    /// Reads all rows of a file, some at a time.
    fn read_all(bytes: &[u8]) -> Result<Vec<RecordBatch>, ParquetError> {
        let path = tempfile::NamedTempFile::new().unwrap();
        fs::write(path.path(), bytes).unwrap();
        let file = ParquetFile::new(File::open(path.path()).unwrap())?;
        let reader = ParquetRecordBatchReaderBuilder::try_new(file)?.with_batch_size(7).build()?;
        reader.map(|batch| batch.map_err(Into::into)).collect()
    }

    #[test]
    fn metadata_of_any_length_is_read() {
        let column: Arc<dyn Array> = Arc::new(Int64Array::from(vec![1, 2, 3]));
        for n in (0..6_000).step_by(13).chain((60_000..64_000).step_by(101)) {
            let padding = KeyValue::new("padding".into(), "x".repeat(n));
            let properties =
                WriterProperties::builder().set_key_value_metadata(Some(vec![padding]));
            let rows = read_all(&parquet(column.clone(), properties.build()));
            assert_eq!(rows.unwrap_or_else(|e| panic!("{n}: {e}"))[0].column(0), &column);
        }
    }

    /// The library looks at the header of each page of a list before it reads the page, and asks for the page where its values begin.
    #[test]
    fn values_are_not_taken_for_a_header() {
        const LIKE_AN_ENDLESS_LIST: [u8; 8] = [0x19, 0xf1, 255, 255, 255, 255, 7, 0];
        let values: Vec<i64> = vec![i64::from_le_bytes(LIKE_AN_ENDLESS_LIST); 400];
        let column: Arc<dyn Array> = Arc::new(ListArray::new(
            Arc::new(Field::new_list_field(DataType::Int64, false)),
            OffsetBuffer::from_repeated_length(4, 100),
            Arc::new(Int64Array::from(values)),
            None,
        ));
        for with_dictionary in [true, false] {
            let properties = WriterProperties::builder()
                .set_dictionary_enabled(with_dictionary)
                .set_write_batch_size(10)
                .set_data_page_row_count_limit(10);
            let rows = read_all(&parquet(column.clone(), properties.build())).unwrap();
            assert_eq!(rows.iter().map(RecordBatch::num_rows).sum::<usize>(), 100);
        }
    }

    #[test]
    fn a_page_is_refused_for_what_it_claims_however_long_its_header_is() {
        // A field 15 of `n` bytes in front of the page's kind and sizes: 2 GiB less one in 3 bytes.
        let page = |n: usize| {
            let number = [n as u8 & 0x7f | 0x80, (n >> 7) as u8 & 0x7f | 0x80, (n >> 14) as u8];
            let sizes = [0x05, 2, 0, 0x15, 254, 255, 255, 255, 15, 0x15, 6, 0];
            [&[0xf8][..], &number, &vec![1; n], &sizes, &[0; 9]].concat()
        };
        for n in [0, 100, 8_180, 9_000, 100_000] {
            let path = tempfile::NamedTempFile::new().unwrap();
            fs::write(path.path(), page(n)).unwrap();
            let file = ParquetFile(File::open(path.path()).unwrap());
            let error = file.get_read(0).unwrap().read(&mut [0]).unwrap_err().to_string();
            assert_eq!(error, "the page at byte 0 claims to hold 2147483647 bytes in 3", "{n}");
        }
    }

    /// Gives a few bytes at a time.
    struct Few<'a>(&'a [u8], usize);

    impl Read for Few<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let n = self.1.min(buffer.len());
            self.0.read(&mut buffer[..n])
        }
    }

    #[test]
    fn utf8_is_what_the_standard_library_says_however_it_is_cut() {
        let texts: [&[u8]; 6] = [
            "Zoë, 日本 \u{1f600}\n".as_bytes(),
            b"",
            b"a,b\n\xc7\n\x82",
            b"ends in \xe6\x97",
            b"\xff at once",
            b"a lone \x82 in it",
        ];
        for text in texts {
            for n in 1..=text.len() + 1 {
                let mut read = Vec::new();
                let done = Utf8::new(Few(text, n)).read_to_end(&mut read);
                match str::from_utf8(text) {
                    Ok(_) => assert_eq!((done.unwrap(), &read[..]), (text.len(), text)),
                    Err(error) => {
                        let said = done.unwrap_err().to_string();
                        let expected = format!("it is not UTF-8 at byte {}", error.valid_up_to());
                        assert_eq!(said, expected, "{n} bytes at a time");
                    }
                }
            }
        }
    }

    #[test]
    fn a_page_says_what_it_holds() {
        // A data page of 25 bytes; one of 2 GiB less one in 3; a negative size; more than ten bytes, of which its reader keeps 32 bits;
        // a field 0 before; no sizes, as at a file's end; cut off; truth values without an end.
        let pages: [(&[u8], [u64; 2], [bool; 2]); 8] = [
            (&[0x15, 6, 0x15, 0x32, 0x15, 0x32, 0], [25, 25], [true, true]),
            (
                &[0x15, 0, 0x15, 254, 255, 255, 255, 15, 0x15, 6, 0],
                [i32::MAX as u64, 3],
                [true, true],
            ),
            (&[0x15, 0, 0x15, 1, 0x15, 6, 0], [0, 3], [true, true]),
            (
                &[&[0x15, 4, 0x15][..], &[0x8c; 12], &[0x0a, 0x15, 14, 0]].concat(),
                [u64::MAX >> 1, 7],
                [true, true],
            ),
            (&[2, 0, 0x15, 4, 0x15, 0x32, 0x15, 0x32, 0], [25, 25], [true, true]),
            (b"\xa4\x03\0\0PAR1", [0, 0], [true, true]),
            (&[0x15, 0x06, 0x15, 0xff], [0, 0], [true, false]),
            (&[0x25, 4, 0x39, 0xf1, 255, 255, 255, 255, 7, 0], [2, 0], [false, true]),
        ];
        for (bytes, [claimed, stored], [is_countable, is_whole]) in pages {
            let expected = Header { claimed, stored, is_countable, is_whole };
            assert_eq!(header(bytes), expected, "{bytes:x?}");
        }
    }

    #[test]
    fn lists_have_no_more_entries_than_there_are_bytes() {
        // A struct of: a list of two bytes; 2^31 - 1 truth values; as many in a list in a list; in a table; a list that is cut off.
        let structs: [(&[u8], bool); 5] = [
            (&[0x19, 0x23, 7, 7, 0], false),
            (&[0x19, 0xf1, 0xff, 0xff, 0xff, 0xff, 7, 0], true),
            (&[0x19, 0x19, 0xf2, 0xff, 0xff, 0xff, 0xff, 7, 0], true),
            (&[0x15, 2, 0x1b, 0xff, 0xff, 0xff, 0xff, 7, 0x11, 0], true),
            (&[0x19, 0x23, 7], true),
        ];
        for (bytes, endless) in structs {
            assert_eq!(is_endless(bytes), endless, "{bytes:x?}");
        }
    }

    #[test]
    fn who_reads_on_behind_the_end_is_refused() {
        let mut ending = Ending { reader: &b"abc"[..], n_ends: 0 };
        let mut read = Vec::new();
        ending.read_to_end(&mut read).unwrap();
        assert_eq!(read, b"abc");
        let refused = (0..=MOST_ENDS).find_map(|_| ending.read(&mut [0; 8]).err());
        assert_eq!(refused.unwrap().kind(), io::ErrorKind::UnexpectedEof);
    }
}
