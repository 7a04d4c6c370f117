//! What the libraries that read tables take for granted, and strangers' files do not keep.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read},
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

/// A Parquet file that is no larger than it is. Parquet's reader takes the end for nothing, so that 600 bytes with a list of two
/// thousand million entries keep it for a minute, and makes room for as much as a page says it holds.
pub(crate) struct ParquetFile(pub(crate) File);

impl Length for ParquetFile {
    fn len(&self) -> u64 {
        self.0.len()
    }
}

impl ChunkReader for ParquetFile {
    type T = Ending<BufReader<File>>;

    fn get_read(&self, start: u64) -> Result<Self::T, ParquetError> {
        let mut reader = self.0.get_read(start)?;
        if let Some((claimed, stored)) = page_sizes(reader.fill_buf()?)
            && claimed > PAGE_BYTES.max(stored.saturating_mul(MOST_COMPRESSED))
        {
            return Err(ParquetError::General(format!(
                "the page at byte {start} claims to hold {claimed} bytes in {stored}"
            )));
        }
        Ok(Ending { reader, n_ends: 0 })
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

/// What a page holds and what it takes in the file, where `head` begins with a page's header: in Thrift's compact protocol the
/// fields 1 to 3, its kind and both sizes, whole numbers (Parquet's format, `PageHeader`). One that is longer than any of 32 bits
/// claims the most.
fn page_sizes(mut head: &[u8]) -> Option<(u64, u64)> {
    let mut field = || {
        let (&tag, mut rest) = head.split_first()?;
        let (mut value, mut shift) = (0u64, 0);
        loop {
            if shift == 35 {
                return Some(u64::MAX);
            }
            let (&byte, after) = rest.split_first()?;
            rest = after;
            value |= u64::from(byte & 0x7f) << shift;
            shift += 7;
            if byte & 0x80 == 0 {
                break;
            }
        }
        head = rest;
        // The next field, a whole number, of either sign.
        (tag == 0x15).then_some(if value & 1 == 0 { value >> 1 } else { 0 })
    };
    let (kind, claimed) = (field()?, field()?);
    if kind.max(claimed) == u64::MAX {
        return Some((u64::MAX, 0));
    }
    Some((claimed, field()?))
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
    use super::*;

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
        // A data page of 25 bytes; one of 2 GiB less one in 3; a negative size; one of too many bytes; the metadata at a file's end; cut off.
        let pages: [(&[u8], _); 6] = [
            (&[0x15, 0x06, 0x15, 0x32, 0x15, 0x32, 0x5c], Some((25, 25))),
            (
                &[0x15, 0, 0x15, 0xfe, 0xff, 0xff, 0xff, 0x0f, 0x15, 6, 0],
                Some((i32::MAX as u64, 3)),
            ),
            (&[0x15, 0, 0x15, 1, 0x15, 6, 0], Some((0, 3))),
            (&[0x15, 4, 0x15, 0x8c, 0x8c, 0x8c, 0x8c, 0x8c, 0x8c], Some((u64::MAX, 0))),
            (&[0x15, 0x04, 0x19, 0x3c, 0x35, 0x00], None),
            (&[0x15, 0x06, 0x15, 0xff], None),
        ];
        for (head, sizes) in pages {
            assert_eq!(page_sizes(head), sizes, "{head:x?}");
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
