//! How much memory tensors on the CPU take.

use crate::error::Result;
use crate::ffi::{attn_count_memory, attn_counted_memory, attn_reset_peak_memory, call};

/// Bytes of tensors on the CPU, of those made since [`count_cpu_memory`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuMemory {
    /// Held now.
    pub now: i64,
    /// The most that was held at once since [`reset_peak_cpu_memory`].
    pub peak: i64,
}

/// Counts the tensors that are made on the CPU from here on, in the whole process, for tests and benchmarks. What
/// operations take without making a tensor of it is not counted. For the start of a program: nothing may run beside this call.
///
/// # Errors
///
/// What LibTorch refuses.
pub fn count_cpu_memory() -> Result<()> {
    // SAFETY: takes nothing but the slot; the allocator lives as long as the process.
    call("counting memory", |err| unsafe { attn_count_memory(err) })
}

/// What tensors hold.
pub fn cpu_memory() -> CpuMemory {
    let (mut now, mut peak) = (0, 0);
    // SAFETY: writes both numbers.
    unsafe { attn_counted_memory(&mut now, &mut peak) };
    CpuMemory { now, peak }
}

/// Begins [`CpuMemory::peak`] anew.
pub fn reset_peak_cpu_memory() {
    // SAFETY: sets a number.
    unsafe { attn_reset_peak_memory() }
}
