//! Modes that hold on one thread for as long as a value lives.

use std::ffi::{c_int, c_void};
use std::marker::PhantomData;

use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};
use crate::ffi;

const DOING: &str = "setting autocast";

/// Lets matrix products and the like run in half precision on this thread, until dropped. What loses too much by it
/// (losses, say) runs in `f32`, by PyTorch's lists, <https://docs.pytorch.org/docs/2.11/amp.html>; the CPU's and CUDA's
/// differ: a softmax of half-precision scores stays in half precision on the CPU.
/// (tch's own `autocast` does nothing on the CPU and knows only `f16`.)
///
/// Guards nest, and have to go in the reverse order in which they came.
#[derive(Debug)]
#[must_use = "autocast ends when the guard is dropped"]
pub struct Autocast {
    device: c_int,
    before: AutocastState,
    // The mode belongs to a thread, so the guard stays there.
    _not_send: PhantomData<*const ()>,
}

impl Autocast {
    /// Computes in `kind` on `device`.
    ///
    /// # Errors
    ///
    /// [`Error::Kind`] unless `kind` is `BFloat16` or `Half`, [`Error::Device`] for neither CPU nor CUDA.
    pub fn new(device: Device, kind: Kind) -> Result<Self> {
        let code = match kind {
            Kind::BFloat16 | Kind::Half => ffi::kind_code(kind).map(|(code, _)| code),
            _ => None,
        };
        let kind =
            code.ok_or(Error::Kind { doing: "autocast", kind, expected: "BFloat16 and Half" })?;
        let (device, _) = ffi::device_code("autocast", device)?;
        Self::enter(device, AutocastState { enabled: true, kind })
    }

    /// Computes in the operands' own kinds on `device`: an island inside another guard.
    ///
    /// # Errors
    ///
    /// [`Error::Device`] for neither CPU nor CUDA.
    pub fn off(device: Device) -> Result<Self> {
        let (device, _) = ffi::device_code("autocast", device)?;
        Self::enter(device, AutocastState { enabled: false, ..AutocastState::get(device)? })
    }

    pub(crate) fn enter(device: c_int, state: AutocastState) -> Result<Self> {
        let before = AutocastState::get(device)?;
        state.set(device)?;
        // SAFETY: counts on this thread; `drop` counts back.
        unsafe { ffi::attn_autocast_enter() };
        Ok(Self { device, before, _not_send: PhantomData })
    }
}

impl Drop for Autocast {
    fn drop(&mut self) {
        // SAFETY: pairs with `enter`, on the same thread.
        unsafe { ffi::attn_autocast_exit() };
        let restored = self.before.set(self.device);
        debug_assert!(restored.is_ok(), "what was read before can be set again: {restored:?}");
    }
}

/// How autocast stands for one type of device on this thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct AutocastState {
    pub(crate) enabled: bool,
    pub(crate) kind: c_int,
}

impl AutocastState {
    pub(crate) fn get(device: c_int) -> Result<Self> {
        let (mut enabled, mut kind) = (0, 0);
        // SAFETY: two places to write to.
        ffi::call(DOING, |err| unsafe {
            ffi::attn_autocast_get(device, &mut enabled, &mut kind, err)
        })?;
        Ok(Self { enabled: enabled != 0, kind })
    }

    fn set(self, device: c_int) -> Result<()> {
        // SAFETY: plain numbers; the kind came from LibTorch or from `kind_code`.
        ffi::call(DOING, |err| unsafe {
            ffi::attn_autocast_set(device, self.enabled.into(), self.kind, err)
        })
    }
}

/// Records nothing for gradients on this thread, until dropped, and makes tensors that never can: faster than
/// `no_grad`, for evaluation.
///
/// What is computed inside may not take part in training outside. Guards nest, and have to go in the reverse order in
/// which they came.
#[derive(Debug)]
#[must_use = "inference mode ends when the guard is dropped"]
pub struct InferenceMode {
    // A C++ guard that restores this thread's state, so it stays on the thread.
    raw: *mut c_void,
}

impl InferenceMode {
    /// Enters inference mode.
    #[expect(clippy::new_without_default, reason = "entering a mode should be seen at the call")]
    pub fn new() -> Self {
        // SAFETY: makes a guard, which `drop` frees on this thread.
        Self { raw: unsafe { ffi::attn_inference_enter() } }
    }
}

impl Drop for InferenceMode {
    fn drop(&mut self) {
        // SAFETY: from `attn_inference_enter` on this thread, freed once.
        unsafe { ffi::attn_inference_exit(self.raw) }
    }
}

/// Whether `tensor` was made under [`InferenceMode`].
pub fn is_inference(tensor: &Tensor) -> bool {
    // SAFETY: a borrowed tensor that is only asked.
    unsafe { ffi::attn_is_inference(tensor.as_ptr()) != 0 }
}

/// Records gradients, or does not, on this thread, until dropped. tch has closures, which a panic leaves half-way.
#[derive(Debug)]
pub(crate) struct GradMode {
    before: c_int,
    _not_send: PhantomData<*const ()>,
}

impl GradMode {
    pub(crate) fn new(enabled: bool) -> Self {
        // SAFETY: sets a flag of this thread and returns what it was.
        let before = unsafe { torch_sys::at_grad_set_enabled(enabled.into()) };
        Self { before, _not_send: PhantomData }
    }

    /// Whether operations are recorded on this thread.
    pub(crate) fn is_enabled() -> bool {
        Self::new(true).before != 0
    }
}

impl Drop for GradMode {
    fn drop(&mut self) {
        // SAFETY: as in `new`.
        unsafe { torch_sys::at_grad_set_enabled(self.before) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn square() -> Tensor {
        Tensor::arange(16, (Kind::Float, Device::Cpu)).view([4, 4])
    }

    #[test]
    fn matrix_products_run_in_the_kind_asked_for_and_losses_in_f32() {
        let x = square();
        let product = || x.matmul(&x).kind();

        for kind in [Kind::BFloat16, Kind::Half] {
            let _autocast = Autocast::new(Device::Cpu, kind).unwrap();
            assert_eq!(product(), kind);
            assert_eq!(x.matmul(&x).mse_loss(&x, tch::Reduction::Mean).kind(), Kind::Float);
            {
                let _off = Autocast::off(Device::Cpu).unwrap();
                assert_eq!(product(), Kind::Float);
            }
            assert_eq!(product(), kind);
        }

        assert_eq!(product(), Kind::Float);
    }

    #[test]
    fn a_parameter_used_without_gradients_first_gets_them_later_under_the_same_guard() {
        let (x, weight) = (square(), square().set_requires_grad(true));
        let _autocast = Autocast::new(Device::Cpu, Kind::BFloat16).unwrap();

        let unrecorded = tch::no_grad(|| x.matmul(&weight));
        let recorded = x.matmul(&weight);

        assert!(!unrecorded.requires_grad() && recorded.requires_grad());
    }

    #[test]
    fn autocast_ends_when_the_thread_unwinds_and_stays_on_its_thread() {
        let panicked = std::panic::catch_unwind(|| {
            let _autocast = Autocast::new(Device::Cpu, Kind::BFloat16).unwrap();
            let elsewhere =
                std::thread::spawn(|| square().matmul(&square()).kind()).join().unwrap();
            assert_eq!(elsewhere, Kind::Float);
            panic!("on purpose");
        });

        assert!(panicked.is_err());
        assert_eq!(square().matmul(&square()).kind(), Kind::Float);
    }

    #[test]
    fn other_kinds_and_devices_are_refused() {
        let kind = Autocast::new(Device::Cpu, Kind::Float).unwrap_err().to_string();
        let device = Autocast::new(Device::Mps, Kind::Half).unwrap_err().to_string();

        assert_eq!(kind, "autocast does not serve Float, only BFloat16 and Half");
        assert_eq!(device, "autocast does not serve Mps, only the CPU and CUDA");
    }

    #[test]
    fn inference_mode_makes_tensors_that_take_no_gradient() {
        let x = square().set_requires_grad(true);

        let inside = {
            let _inference = InferenceMode::new();
            &x * 2.
        };

        assert!(is_inference(&inside) && !inside.requires_grad());
        let outside = &x * 2.;
        assert!(!is_inference(&outside) && outside.requires_grad());
    }

    #[test]
    fn recording_can_be_switched_and_comes_back() {
        {
            let _off = GradMode::new(false);
            assert!(!GradMode::is_enabled());
            let _on = GradMode::new(true);
            assert!(GradMode::is_enabled());
        }
        assert!(GradMode::is_enabled());
    }
}
