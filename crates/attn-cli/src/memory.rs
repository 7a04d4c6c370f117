//! Whether there is room for a model, before it is loaded.

use std::path::Path;

use anyhow::{Result, ensure};
use attn_core::{LoadOptions, checkpoint::Checkpoint};
use tch::Device;

/// Bytes of a GiB.
const GIB: f64 = (1u64 << 30) as f64;

/// Refuses a model whose parameters alone are more than the memory that is free. On a GPU, and where the system does not say, nothing
/// is known.
pub(crate) fn check_room(path: &Path, options: &LoadOptions) -> Result<()> {
    let (Device::Cpu, Some(free)) = (options.device, free_bytes()) else { return Ok(()) };
    let n_values = Checkpoint::open(path)?.total_elements();
    fits(n_values, options.kind.elt_size_in_bytes() as u64, free)
}

fn fits(n_values: u64, width: u64, free: u64) -> Result<()> {
    let needed = n_values.saturating_mul(width);
    ensure!(
        needed <= free,
        "its {:.1} billion parameters take {:.1} GiB in {} bits, and {:.1} GiB are free\nhint: --dtype bf16 takes half of what f32 \
         does; training takes four times the parameters and more",
        n_values as f64 / 1e9,
        needed as f64 / GIB,
        8 * width,
        free as f64 / GIB
    );
    Ok(())
}

/// What programs may still take, where the system says it.
fn free_bytes() -> Option<u64> {
    let told = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = told.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_that_is_larger_than_what_is_free_is_refused_with_both_sizes() {
        let gib = 1 << 30;
        assert!(fits(gib, 4, 4 * gib).is_ok());
        let error = fits(8 * gib, 4, 16 * gib).unwrap_err().to_string();
        assert!(error.starts_with("its 8.6 billion parameters take 32.0 GiB in 32 bits, and 16.0"));
        assert!(error.contains("hint: --dtype bf16"), "{error}");
        assert!(fits(u64::MAX, 8, u64::MAX - 1).is_err(), "and no product that wraps");
    }

    #[test]
    fn this_machine_says_what_is_free() {
        let is_linux = cfg!(target_os = "linux");
        assert_eq!(free_bytes().is_some_and(|free| free > 1 << 20), is_linux);
    }
}
