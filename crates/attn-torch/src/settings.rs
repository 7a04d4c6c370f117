//! Switches of the whole process, and versions.

use std::path::PathBuf;
use std::ptr;

use crate::error::Result;
use crate::ffi;

/// The LibTorch that tch 0.24 is written for.
pub const LIBTORCH_WANTED: &str = "2.11.0";

/// The LibTorch whose headers this crate was compiled with.
pub const LIBTORCH_BUILT: &str = env!("ATTN_LIBTORCH_BUILT");

/// The LibTorch that is loaded, such as `2.11.0`; another than [`LIBTORCH_BUILT`] where the library was exchanged since.
///
/// # Errors
///
/// [`Error::Torch`](crate::Error::Torch) where the library does not describe itself.
pub fn libtorch_version() -> Result<String> {
    let config = libtorch_config()?;
    Ok(setting(&config, "TORCH_VERSION").unwrap_or("unknown").to_owned())
}

/// What the loaded LibTorch says of itself, in several lines: compiler, math libraries, CPU features in use, and
/// `KEY=value` pairs such as `CUDA_VERSION=13.0`.
///
/// # Errors
///
/// [`Error::Torch`](crate::Error::Torch) where it does not.
pub fn libtorch_config() -> Result<String> {
    let mut out = ptr::null_mut();
    // SAFETY: a place to write to.
    ffi::call("asking LibTorch for its configuration", |err| unsafe {
        ffi::attn_show_config(&mut out, err)
    })?;
    // SAFETY: a successful call gives a string of `strdup` that is ours.
    Ok(unsafe { ffi::take_string(out) }.unwrap_or_default())
}

/// The value of a `KEY=value` pair in LibTorch's description of itself.
fn setting<'a>(config: &'a str, key: &str) -> Option<&'a str> {
    config.split([',', ' ', '\n']).find_map(|pair| pair.strip_prefix(key)?.strip_prefix('='))
}

/// The file that LibTorch's CPU half was loaded from.
pub fn libtorch_path() -> Option<PathBuf> {
    // SAFETY: gives null or a string of `strdup` that is ours.
    unsafe { ffi::take_string(ffi::attn_library_path()) }.map(PathBuf::from)
}

/// Keeps freed memory for reuse, instead of returning each large block to the system at once.
///
/// glibc maps every block of 32 MiB and more anew, and the page faults then dominate operations that are bound by
/// memory: about three times slower, 10–20 % of a training step. Costs about 10 % of peak memory. Call it first thing
/// in `main`; on other systems than Linux with glibc it does nothing. Nothing is given back before the program ends: with a
/// bound on that, work on tensors of several GiB pays for its pages each time.
pub fn tune_allocator() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: sets two numbers of the allocator, which locks itself; a value that it refuses changes nothing.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 30);
        libc::mallopt(libc::M_TRIM_THRESHOLD, -1);
    }
}

/// Whether LibTorch multiplies bf16 matrices on this processor with instructions made for it. Elsewhere it takes them one
/// number at a time, and a product in `f32` of the same values is many times faster.
pub fn multiplies_bf16() -> bool {
    // oneDNN's own condition for its bf16 products.
    #[cfg(target_arch = "x86_64")]
    let has_units = is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512dq");
    #[cfg(not(target_arch = "x86_64"))]
    let has_units = true;
    has_units
}

/// Which kernels `scaled_dot_product_attention` may choose from, in the whole process. All on by default.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SdpFlags {
    /// FlashAttention; on the CPU too.
    pub flash: bool,
    /// The memory-efficient kernel; CUDA.
    pub mem_efficient: bool,
    /// Plain matrix products and a softmax.
    pub math: bool,
    /// cuDNN's kernel; CUDA.
    pub cudnn: bool,
}

impl SdpFlags {
    /// What is set.
    ///
    /// # Errors
    ///
    /// [`Error::Torch`](crate::Error::Torch).
    pub fn get() -> Result<Self> {
        let mut flags = [0; 4];
        // SAFETY: C++ writes four numbers.
        ffi::call("reading attention kernels", |err| unsafe {
            ffi::attn_sdp_get(flags.as_mut_ptr(), err)
        })?;
        let [flash, mem_efficient, math, cudnn] = flags.map(|flag| flag != 0);
        Ok(Self { flash, mem_efficient, math, cudnn })
    }

    /// Sets them.
    ///
    /// # Errors
    ///
    /// [`Error::Torch`](crate::Error::Torch).
    pub fn set(self) -> Result<()> {
        let Self { flash, mem_efficient, math, cudnn } = self;
        // SAFETY: plain numbers.
        ffi::call("choosing attention kernels", |err| unsafe {
            ffi::attn_sdp_set(flash.into(), mem_efficient.into(), math.into(), cudnn.into(), err)
        })
    }
}

/// Makes operations repeat bit for bit, or fail where they cannot, in the whole process.
///
/// On CUDA, matrix products also need `CUBLAS_WORKSPACE_CONFIG=:4096:8` in the environment, set before CUDA is first
/// used; LibTorch says so when one runs without.
///
/// # Errors
///
/// [`Error::Torch`](crate::Error::Torch).
pub fn set_deterministic(on: bool) -> Result<()> {
    // SAFETY: a plain number.
    ffi::call("setting determinism", |err| unsafe { ffi::attn_set_deterministic(on.into(), err) })
}

/// Whether [`set_deterministic`] is on.
pub fn is_deterministic() -> bool {
    // SAFETY: reads a flag.
    unsafe { ffi::attn_is_deterministic() != 0 }
}

/// Lets CUDA round the operands of `f32` matrix products and convolutions to ten bits of mantissa (TF32): faster, and
/// wrong from the fourth digit on. No effect on the CPU.
///
/// # Errors
///
/// [`Error::Torch`](crate::Error::Torch).
pub fn set_tf32(on: bool) -> Result<()> {
    // SAFETY: a plain number.
    ffi::call("setting TF32", |err| unsafe { ffi::attn_set_tf32(on.into(), err) })
}

/// Whether [`set_tf32`] is on, for matrix products and convolutions both.
///
/// # Errors
///
/// [`Error::Torch`](crate::Error::Torch).
pub fn tf32() -> Result<bool> {
    let mut on = 0;
    // SAFETY: a place to write to.
    ffi::call("reading TF32", |err| unsafe { ffi::attn_tf32(&mut on, err) })?;
    Ok(on != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_library_loaded_is_the_one_built_against_and_wanted() {
        assert_eq!(LIBTORCH_BUILT, LIBTORCH_WANTED);
        assert_eq!(libtorch_version().unwrap(), LIBTORCH_WANTED);
        assert!(
            libtorch_path()
                .unwrap()
                .file_name()
                .unwrap()
                .to_string_lossy()
                .starts_with("libtorch_cpu")
        );
    }

    #[test]
    fn a_setting_is_found_by_its_whole_name() {
        let config = "PyTorch built with:\n  - Build settings: XCUDA=1, CUDA=, TORCH_VERSION=2.11.0, USE_MKL=ON, ";

        assert_eq!(setting(config, "TORCH_VERSION"), Some("2.11.0"));
        assert_eq!(setting(config, "CUDA"), Some(""));
        assert_eq!(setting(config, "VERSION"), None);
    }

    // One test: these switches belong to the process.
    #[test]
    fn switches_are_set_and_read_back() {
        let before = SdpFlags::get().unwrap();
        assert_eq!(before, SdpFlags { flash: true, mem_efficient: true, math: true, cudnn: true });
        for flags in [
            SdpFlags { flash: false, ..before },
            SdpFlags { mem_efficient: false, ..before },
            SdpFlags { math: false, ..before },
            SdpFlags { cudnn: false, ..before },
            before,
        ] {
            flags.set().unwrap();
            assert_eq!(SdpFlags::get().unwrap(), flags);
        }

        for on in [true, false] {
            set_deterministic(on).unwrap();
            assert_eq!(is_deterministic(), on);
            set_tf32(on).unwrap();
            assert_eq!(tf32().unwrap(), on);
        }
    }

    #[test]
    fn allocating_works_after_tuning() {
        tune_allocator();

        let large = vec![1u8; 40 << 20];

        assert_eq!(large.iter().map(|&byte| u64::from(byte)).sum::<u64>(), 40 << 20);
    }
}
