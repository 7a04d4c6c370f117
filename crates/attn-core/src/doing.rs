//! What a thread is at: LibTorch names shapes where it fails, and neither the layer nor the pass.

use std::{cell::RefCell, fmt};

use tch::Tensor;

thread_local! {
    static NOW: RefCell<Option<Doing>> = const { RefCell::new(None) };
}

#[derive(Debug, Clone)]
struct Doing {
    what: &'static str,
    layer: Option<usize>,
    of: &'static str,
    shape: Vec<i64>,
}

impl fmt::Display for Doing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, layer, of, shape } = self;
        write!(f, "in {what}")?;
        layer.map_or(Ok(()), |layer| write!(f, " {layer}"))?;
        write!(f, ", of {of} {shape:?}")
    }
}

/// What this thread is at, in words, as `in layer 3, of hidden states [8, 256, 768]`; `None` outside of any pass. For who has to say
/// where LibTorch failed: a hook for panics runs before what is said here ends.
pub fn doing() -> Option<String> {
    NOW.with_borrow(|now| now.as_ref().map(Doing::to_string))
}

/// Says what the thread is at, until it is dropped: then what it was at before.
#[derive(Debug)]
#[must_use = "it ends where it is dropped"]
pub struct During(Option<Doing>);

impl During {
    /// In `what`, which has `layer` as its number, of the tensor `x`, called `of`.
    pub fn of(what: &'static str, layer: Option<usize>, of: &'static str, x: &Tensor) -> Self {
        let now = Doing { what, layer, of, shape: x.size() };
        Self(NOW.replace(Some(now)))
    }
}

impl Drop for During {
    fn drop(&mut self) {
        NOW.set(self.0.take());
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    #[test]
    fn what_is_done_inside_is_told_and_then_what_was_done_before() {
        let x = Tensor::zeros([2, 3], (Kind::Float, Device::Cpu));
        assert_eq!(doing(), None);
        let outer = During::of("the backward pass", None, "a loss", &x.sum(Kind::Float));
        {
            let _inner = During::of("layer", Some(3), "hidden states", &x);
            assert_eq!(doing().unwrap(), "in layer 3, of hidden states [2, 3]");
        }
        assert_eq!(doing().unwrap(), "in the backward pass, of a loss []");
        drop(outer);
        assert_eq!(doing(), None);
    }
}
