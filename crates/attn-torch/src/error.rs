//! The error type, and how LibTorch's page-long messages are cut.

use std::path::PathBuf;

use tch::{Device, Kind, TchError};

/// What the functions of this crate return.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// LibTorch refused an operation, or a [`Function`](crate::Function) failed in its backward pass.
    #[error("LibTorch failed while {doing}: {message}")]
    Torch {
        /// What was asked of it.
        doing: &'static str,
        /// The first line of its message; frames of the C++ stack follow in the original.
        message: String,
    },

    /// Two lists that go together differ in length.
    #[error("{what}: {actual} given, {expected} expected")]
    Length {
        /// The list.
        what: &'static str,
        /// How long it has to be.
        expected: usize,
        /// How long it is.
        actual: usize,
    },

    /// Two tensors that go together differ in size, kind or device.
    #[error("{what} {index} is {actual}, {expected} expected")]
    Mismatch {
        /// The list.
        what: &'static str,
        /// Which of the list.
        index: usize,
        /// Size, kind and device that it has to have.
        expected: String,
        /// Those it has.
        actual: String,
    },

    /// A parameter that is updated in place has holes or overlaps.
    #[error(
        "parameter {index} of size {size:?} is not contiguous, so it cannot be updated in place\nhint: make it with `contiguous()`"
    )]
    NotContiguous {
        /// Which of the list.
        index: usize,
        /// Its size.
        size: Vec<i64>,
    },

    /// A number is outside its range.
    #[error("`{name}` is {value}, {expected} expected")]
    Number {
        /// The argument.
        name: &'static str,
        /// What was given.
        value: f64,
        /// The range.
        expected: &'static str,
    },

    /// A kind that the operation does not serve.
    #[error("{doing} does not serve {kind:?}, only {expected}")]
    Kind {
        /// The operation.
        doing: &'static str,
        /// What was given.
        kind: Kind,
        /// What it serves.
        expected: &'static str,
    },

    /// A range of bytes lies outside the bytes, or does not hold as much as the size says.
    #[error(
        "bytes {start}..{end} of {available} cannot hold {kind:?} of size {size:?}, which takes {needed} bytes"
    )]
    ByteRange {
        /// First byte.
        start: usize,
        /// One past the last byte.
        end: usize,
        /// How many bytes there are.
        available: usize,
        /// The tensor's kind.
        kind: Kind,
        /// The tensor's size.
        size: Vec<i64>,
        /// What that takes; `too many` where it does not fit a number.
        needed: String,
    },

    /// Elements would start at addresses that the processor may refuse.
    #[error(
        "{kind:?} at byte {start} is not aligned to {align} bytes\nhint: copy this tensor instead"
    )]
    Alignment {
        /// First byte.
        start: usize,
        /// The tensor's kind.
        kind: Kind,
        /// What the address has to divide by.
        align: usize,
    },

    /// A file could not be mapped.
    #[error("cannot map `{}`", path.display())]
    Map {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },

    /// A device's name is none that we know.
    #[error("`{name}` is no device, expected `cpu`, `cuda`, `cuda:N` or `auto`")]
    DeviceName {
        /// What was given.
        name: String,
    },

    /// A device that the operation does not serve.
    #[error("{doing} does not serve {device:?}, only the CPU and CUDA")]
    Device {
        /// The operation.
        doing: &'static str,
        /// What was given.
        device: Device,
    },

    /// A GPU was asked for by a number that none has.
    #[error(
        "there is no `cuda:{index}`: this machine has {n_devices} CUDA device(s), counted from 0"
    )]
    CudaIndex {
        /// What was given.
        index: usize,
        /// How many there are.
        n_devices: usize,
    },

    /// CUDA cannot be used.
    #[error("CUDA cannot be used: {reason}\nhint: {hint}")]
    NoCuda {
        /// What is missing.
        reason: String,
        /// What to do about it.
        hint: &'static str,
    },
}

impl Error {
    /// For `map_err`: a tch call that failed while `doing` something.
    pub(crate) fn tch(doing: &'static str) -> impl Fn(TchError) -> Self {
        move |error| Self::Torch { doing, message: brief(&error) }
    }
}

/// The first line of a tch error: LibTorch's own messages go on with dozens of stack frames.
pub fn brief(error: &TchError) -> String {
    let shown = error.to_string();
    first_line(shown.strip_prefix("Internal torch error: ").unwrap_or(&shown)).to_owned()
}

pub(crate) fn first_line(message: &str) -> &str {
    let line = message.trim_start().lines().next().unwrap_or_default().trim_end();
    if line.is_empty() { "no message" } else { line }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind, Tensor};

    use super::*;

    #[test]
    fn only_the_first_line_of_an_exception_is_shown() {
        let ones = Tensor::ones([2, 3], (Kind::Float, Device::Cpu));

        let error = ones.f_matmul(&ones).expect_err("2x3 does not multiply 2x3");

        assert!(error.to_string().lines().count() > 1, "the original has frames: {error}");
        assert_eq!(brief(&error), "mat1 and mat2 shapes cannot be multiplied (2x3 and 2x3)");
        assert_eq!(first_line("\n"), "no message");
    }
}
