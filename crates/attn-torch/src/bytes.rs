//! Tensors laid over bytes that somebody else owns, without a copy.

use std::ffi::{c_int, c_void};
use std::fs::File;
use std::io;
use std::ops::{DerefMut, Range};
use std::path::Path;
use std::ptr;
use std::sync::Arc;

use memmap2::{MmapMut, MmapOptions, UncheckedAdvice};
use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::ffi;

/// Bytes that tensors can be laid over: each tensor keeps them alive.
///
/// The owner is handed over for good, and has to give *writable* bytes: a tensor can be written in place
/// (`fill_`, an optimizer's step), so bytes that anybody else reads would change under that reader.
/// [`Bytes::map`] satisfies this for a file by copying a page when it is first written: the file never changes.
///
/// ```
/// use attn_torch::Bytes;
/// use tch::Kind;
///
/// let bytes = Bytes::new(vec![1u8, 2, 3, 4]);
/// let tensor = bytes.tensor(1..4, &[3], Kind::Uint8)?;
/// drop(bytes); // the tensor keeps the vector
/// assert_eq!(Vec::<u8>::try_from(&tensor).unwrap(), [2, 3, 4]);
/// # Ok::<(), attn_torch::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Bytes(Arc<Region>);

struct Region {
    data: *mut u8,
    len: usize,
    // From `Box::into_raw`: a `Box` may not move while `data` points into what it holds.
    owner: *mut (dyn Send + 'static),
    // The same box where it is a file's mapping, whose pages can be given back.
    map: Option<*const MmapMut>,
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: from `Box::into_raw`, taken back once; no tensor points into it any more, as each holds the region.
        drop(unsafe { Box::from_raw(self.owner) });
    }
}

// SAFETY: the owner is `Send`, is never used again but to be dropped, and the pointer is into what it owns.
unsafe impl Send for Region {}
// SAFETY: a shared region gives out its length and copies of the pointer; it reads and writes nothing. Advice on a
// mapping is a system call, which threads may make at the same time.
unsafe impl Sync for Region {}

impl std::fmt::Debug for Region {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Region").field("len", &self.len).finish_non_exhaustive()
    }
}

impl Bytes {
    /// Takes over an owner of bytes: a `Vec<u8>`, a `Box<[u8]>`, a `memmap2::MmapMut`.
    pub fn new<O>(owner: O) -> Self
    where
        O: DerefMut + Send + 'static,
        O::Target: AsMut<[u8]>,
    {
        let owner = Box::into_raw(Box::new(owner));
        // SAFETY: just made and ours alone. It is not touched again before it is freed, so this borrow may last
        // until then, and with it the slice: safe code cannot move or free what it has lent out.
        let bytes = unsafe { &mut *owner }.deref_mut().as_mut();
        let (data, len) = (bytes.as_mut_ptr(), bytes.len());
        Self(Arc::new(Region { data, len, owner, map: None }))
    }

    /// Maps a whole file privately: pages are read when first used, and copied when first written.
    ///
    /// Nobody may shorten the file while it is mapped: reading past its new end kills the process (`SIGBUS`).
    /// Replacing it by renaming another over it is harmless.
    ///
    /// # Errors
    ///
    /// [`Error::Map`] where the file cannot be opened or mapped.
    pub fn map(path: &Path) -> Result<Self> {
        let failed = |source| Error::Map { path: path.to_owned(), source };
        Self::map_file(&File::open(path).map_err(failed)?).map_err(failed)
    }

    /// As [`Bytes::map`] for a file that is open, so that what was read of it before and what is mapped are one file.
    ///
    /// # Errors
    ///
    /// Those of the system.
    pub fn map_file(file: &File) -> io::Result<Self> {
        if file.metadata()?.len() == 0 {
            return Ok(Self::new(Vec::new())); // A mapping of no bytes is refused by some systems.
        }
        // SAFETY: the mapping is private, so our writes stay here. That others do not shorten or rewrite the file
        // cannot be had from the system; it is what the doc comment asks for, as every memory-mapping loader does.
        // No swap is reserved: most weights are only read, and a model may be larger than memory.
        let mut map = unsafe { MmapOptions::new().no_reserve_swap().map_copy(file) }?;
        let (data, len) = (map.as_mut_ptr(), map.len());
        let owner = Box::into_raw(Box::new(map));
        Ok(Self(Arc::new(Region { data, len, owner, map: Some(owner) })))
    }

    /// Gives the pages around `range` of a mapped file back to the system: they stay in its cache and come back when
    /// they are read again, but no longer count as memory of this process.
    ///
    /// What was written to them is lost: the file's content is read again. Bytes that are no mapped file stay as they
    /// are, and so do pages that the system will not take.
    pub fn give_back(&self, range: Range<usize>) {
        // A page fault maps a few pages to both sides as well (64 KiB on Linux).
        const AROUND: usize = 1 << 18;
        let Some(map) = self.0.map else { return };
        let begin = range.start.saturating_sub(AROUND).min(self.0.len);
        let end = range.end.saturating_add(AROUND).min(self.0.len);
        if begin >= end {
            return;
        }
        // SAFETY: the mapping lives as long as the region, and the range lies inside it. No Rust reference to its
        // bytes is left, so that none can see them change: tensors hold the bare pointer.
        let _ =
            unsafe { (*map).unchecked_advise_range(UncheckedAdvice::DontNeed, begin, end - begin) };
    }

    /// How many bytes there are.
    pub fn len(&self) -> usize {
        self.0.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.len == 0
    }

    /// A contiguous tensor of `size` over the bytes of `range`, on the CPU, in the machine's byte order.
    ///
    /// Tensors over overlapping ranges share their elements, as views do.
    ///
    /// # Errors
    ///
    /// [`Error::ByteRange`] where the range lies outside or does not hold exactly `size`,
    /// [`Error::Alignment`] where an element would not start at a multiple of its width,
    /// [`Error::Kind`] for kinds whose bytes can be invalid or are not plain numbers (`Bool`, complex, quantized).
    pub fn tensor(&self, range: Range<usize>, size: &[i64], kind: Kind) -> Result<Tensor> {
        let doing = "laying a tensor over bytes";
        let expected = "integers and floating-point numbers";
        let (code, width) = ffi::kind_code(kind).ok_or(Error::Kind { doing, kind, expected })?;
        let needed = size
            .iter()
            .try_fold(width, |bytes, &n| bytes.checked_mul(usize::try_from(n).ok()?))
            .filter(|&bytes| isize::try_from(bytes).is_ok());
        let available = self.0.len;
        let inside = range.start <= range.end && range.end <= available;
        if !inside || needed != Some(range.end - range.start) {
            return Err(Error::ByteRange {
                start: range.start,
                end: range.end,
                available,
                kind,
                size: size.to_vec(),
                needed: needed.map_or_else(|| "too many".to_owned(), |n| n.to_string()),
            });
        }
        // SAFETY: `range.start` is at most the length of the region.
        let data = unsafe { self.0.data.add(range.start) };
        if data.addr() % width != 0 {
            return Err(Error::Alignment { start: range.start, kind, align: width });
        }
        self.lay(data, size, code)
    }

    fn lay(&self, data: *mut u8, size: &[i64], kind: c_int) -> Result<Tensor> {
        let owner = Arc::into_raw(Arc::clone(&self.0)).cast_mut().cast();
        let mut out = ptr::null_mut();
        ffi::call("laying a tensor over bytes", |err| {
            // SAFETY: `data` holds `size` elements of this kind, aligned (checked above), for as long as the region
            // lives, which `owner` sees to; `release` gives that reference back exactly once, on failure too.
            unsafe {
                ffi::attn_from_blob(
                    data.cast(),
                    size.as_ptr(),
                    size.len(),
                    kind,
                    owner,
                    release,
                    &mut out,
                    err,
                )
            }
        })?;
        // SAFETY: a successful call gives a handle of its own.
        let tensor = unsafe { ffi::take_tensor(out) };
        tensor.ok_or(Error::Torch {
            doing: "laying a tensor over bytes",
            message: "no tensor came back".to_owned(),
        })
    }
}

extern "C" fn release(owner: *mut c_void) {
    // SAFETY: from `Arc::into_raw` in `lay`; C++ calls this once for each.
    drop(unsafe { Arc::from_raw(owner.cast::<Region>().cast_const()) });
}

#[cfg(test)]
mod tests {
    use std::ops::Deref;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    /// Bytes that say when they are dropped.
    struct Watched(Vec<u8>, Arc<AtomicBool>);

    impl Deref for Watched {
        type Target = [u8];
        fn deref(&self) -> &[u8] {
            &self.0
        }
    }

    impl DerefMut for Watched {
        fn deref_mut(&mut self) -> &mut [u8] {
            &mut self.0
        }
    }

    impl Drop for Watched {
        fn drop(&mut self) {
            self.1.store(true, Ordering::SeqCst);
        }
    }

    fn floats(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|value| value.to_ne_bytes()).collect()
    }

    #[test]
    fn a_tensor_keeps_its_owner_and_copies_nothing() {
        let dropped = Arc::new(AtomicBool::new(false));
        let owner = Watched(floats(&[0., 1., 2., 3., 4., 5.]), Arc::clone(&dropped));
        let address = owner.as_ptr().addr();
        let bytes = Bytes::new(owner);

        let tensor = bytes.tensor(0..24, &[2, 3], Kind::Float).unwrap();
        let row = tensor.get(1);
        drop(bytes);
        assert_eq!(tensor.data_ptr().addr(), address);
        drop(tensor);
        assert!(!dropped.load(Ordering::SeqCst), "a view is still alive");
        assert_eq!(Vec::<f32>::try_from(&row).unwrap(), [3., 4., 5.]);
        drop(row);

        assert!(dropped.load(Ordering::SeqCst));
    }

    #[test]
    fn a_refused_tensor_does_not_keep_the_owner() {
        let dropped = Arc::new(AtomicBool::new(false));
        let bytes = Bytes::new(Watched(vec![0; 8], Arc::clone(&dropped)));

        assert!(bytes.tensor(0..8, &[3], Kind::Float).is_err());
        drop(bytes);

        assert!(dropped.load(Ordering::SeqCst));
    }

    #[test]
    fn wrong_ranges_sizes_and_kinds_are_refused() {
        let bytes = Bytes::new(vec![0u8; 64]);
        let refusal =
            |range, size: &[i64], kind| bytes.tensor(range, size, kind).unwrap_err().to_string();

        assert_eq!(
            refusal(60..72, &[3], Kind::Float),
            "bytes 60..72 of 64 cannot hold Float of size [3], which takes 12 bytes"
        );
        assert!(refusal(0..8, &[3], Kind::Float).contains("takes 12 bytes"));
        assert!(refusal(0..8, &[-2], Kind::Float).contains("takes too many bytes"));
        assert!(refusal(0..8, &[i64::MAX, 2], Kind::Float).contains("takes too many bytes"));
        #[expect(clippy::reversed_empty_ranges, reason = "the mistake under test")]
        let reversed = refusal(8..0, &[0], Kind::Float);
        assert!(reversed.contains("bytes 8..0"));
        assert!(refusal(0..8, &[8], Kind::Bool).contains("does not serve Bool"));

        let start = (0..8).find(|start| (bytes.0.data.addr() + start) % 4 == 1).unwrap();
        let misaligned = refusal(start..start + 8, &[2], Kind::Float);
        assert!(misaligned.contains("is not aligned to 4 bytes\nhint: copy"), "{misaligned}");
    }

    #[test]
    fn no_elements_and_no_dimensions_work() {
        let bytes = Bytes::new(floats(&[7.]));

        assert_eq!(bytes.tensor(4..4, &[0, 5], Kind::Float).unwrap().size(), [0, 5]);
        assert_eq!(bytes.tensor(0..4, &[], Kind::Float).unwrap().double_value(&[]), 7.);
        assert!(Bytes::new(Vec::new()).is_empty());
    }

    #[test]
    fn writing_to_a_mapped_tensor_leaves_the_file_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weights");
        let before = floats(&[1., 2., 3., 4.]);
        std::fs::write(&path, &before).unwrap();

        let bytes = Bytes::map(&path).unwrap();
        let mut tensor = bytes.tensor(4..16, &[3], Kind::Float).unwrap();
        assert_eq!(Vec::<f32>::try_from(&tensor).unwrap(), [2., 3., 4.]);
        let _ = tensor.fill_(9.);

        assert_eq!(Vec::<f32>::try_from(&tensor).unwrap(), [9., 9., 9.]);
        assert_eq!(std::fs::read(&path).unwrap(), before);
    }

    #[test]
    fn pages_given_back_are_read_again_and_what_was_written_is_lost() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weights");
        std::fs::write(&path, [7; 1 << 20]).unwrap();
        let bytes = Bytes::map(&path).unwrap();
        let mut tensor = bytes.tensor(0..1 << 20, &[1 << 20], Kind::Uint8).unwrap();
        let _ = tensor.fill_(9);

        bytes.give_back((1 << 19)..(1 << 19) + 1);

        assert_eq!(tensor.int64_value(&[1 << 19]), 7);
        assert_eq!(tensor.int64_value(&[0]), 9, "far from the range");
        bytes.give_back(usize::MAX - 1..usize::MAX); // beyond the end: nothing to give
        let own = Bytes::new(vec![5u8; 1 << 20]);
        own.give_back(0..1 << 20);
        assert_eq!(own.tensor(0..1, &[1], Kind::Uint8).unwrap().int64_value(&[0]), 5);
    }

    #[test]
    fn a_missing_file_is_named_and_an_empty_one_is_no_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weights");

        let error = Bytes::map(&path).unwrap_err().to_string();
        std::fs::write(&path, []).unwrap();

        assert!(error.starts_with("cannot map `") && error.ends_with("weights`"), "{error}");
        assert_eq!(Bytes::map(&path).unwrap().len(), 0);
    }
}
