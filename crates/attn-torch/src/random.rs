//! The state of LibTorch's random streams.

use std::ptr;

use tch::{Device, Tensor};

use crate::error::{Error, Result};
use crate::ffi;

/// The state of `device`'s random stream, as bytes on the CPU: save it to repeat what is drawn next.
///
/// Each device has one stream for the whole process: another thread that draws meanwhile moves it.
///
/// # Errors
///
/// [`Error::Device`] for neither CPU nor CUDA, [`Error::Torch`] where CUDA is not loaded or has no such device.
pub fn rng_state(device: Device) -> Result<Tensor> {
    let doing = "reading the random state";
    let (kind, index) = ffi::device_code(doing, device)?;
    let mut out = ptr::null_mut();
    // SAFETY: a place to write to.
    ffi::call(doing, |err| unsafe { ffi::attn_rng_get(kind, index, &mut out, err) })?;
    // SAFETY: a successful call gives a handle of its own.
    unsafe { ffi::take_tensor(out) }
        .ok_or(Error::Torch { doing, message: "no state came back".to_owned() })
}

/// Puts `device`'s random stream where [`rng_state`] found it.
///
/// # Errors
///
/// As [`rng_state`], and [`Error::Torch`] where `state` is no state of such a device.
pub fn set_rng_state(device: Device, state: &Tensor) -> Result<()> {
    let doing = "setting the random state";
    let (kind, index) = ffi::device_code(doing, device)?;
    // SAFETY: a borrowed tensor, which C++ checks and copies from.
    ffi::call(doing, |err| unsafe { ffi::attn_rng_set(kind, index, state.as_ptr(), err) })
}

/// Puts the streams of `devices` elsewhere, and back when dropped.
#[derive(Debug)]
pub(crate) struct RngReplay {
    after: Vec<(Device, Tensor)>,
}

impl RngReplay {
    /// Goes to `states`, which [`rng_states`] read.
    pub(crate) fn new(states: &[(Device, Tensor)]) -> Result<Self> {
        let devices: Vec<Device> = states.iter().map(|(device, _)| *device).collect();
        let replay = Self { after: rng_states(&devices)? };
        for (device, state) in states {
            set_rng_state(*device, state)?;
        }
        Ok(replay)
    }
}

impl Drop for RngReplay {
    fn drop(&mut self) {
        for (device, state) in &self.after {
            let restored = set_rng_state(*device, state);
            debug_assert!(restored.is_ok(), "what was read before can be set again: {restored:?}");
        }
    }
}

/// The states of several devices.
pub(crate) fn rng_states(devices: &[Device]) -> Result<Vec<(Device, Tensor)>> {
    devices.iter().map(|&device| Ok((device, rng_state(device)?))).collect()
}

/// Seeds LibTorch's stream of the CPU and keeps it from the other tests of this process, which run on threads: every
/// test that draws holds what this returns.
#[cfg(test)]
pub(crate) fn seeded(seed: i64) -> std::sync::MutexGuard<'static, ()> {
    static STREAM: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let stream = STREAM.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    tch::manual_seed(seed);
    stream
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    fn draw() -> Vec<f32> {
        Vec::try_from(Tensor::randn([7], (Kind::Float, Device::Cpu))).unwrap()
    }

    #[test]
    fn a_state_put_back_repeats_what_was_drawn() {
        let _stream = seeded(5);
        let _ = draw(); // An odd number of normals leaves half a pair in the state.

        let state = rng_state(Device::Cpu).unwrap();
        let first = draw();
        let other = draw();
        set_rng_state(Device::Cpu, &state).unwrap();

        assert_eq!(draw(), first);
        assert_ne!(first, other);
        assert_eq!((state.kind(), state.device()), (Kind::Uint8, Device::Cpu));
    }

    #[test]
    fn a_replay_ends_where_it_began() {
        let _stream = seeded(6);
        let before = rng_states(&[Device::Cpu]).unwrap();
        let first = draw();
        let after = rng_state(Device::Cpu).unwrap();

        let replayed = {
            let _replay = RngReplay::new(&before).unwrap();
            draw()
        };

        assert_eq!(replayed, first);
        assert!(rng_state(Device::Cpu).unwrap().equal(&after));
    }

    #[test]
    fn what_is_no_state_is_refused() {
        let short = Tensor::zeros([8], (Kind::Uint8, Device::Cpu));
        let floats = Tensor::zeros([8], (Kind::Float, Device::Cpu));

        for wrong in [short, floats] {
            let error = set_rng_state(Device::Cpu, &wrong).unwrap_err().to_string();
            assert!(
                error.starts_with("LibTorch failed while setting the random state: "),
                "{error}"
            );
        }
        assert!(matches!(rng_state(Device::Vulkan), Err(Error::Device { .. })));
    }
}
