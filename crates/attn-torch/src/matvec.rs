//! One row times a matrix.

use std::ptr;

use tch::Tensor;

use crate::error::Result;
use crate::ffi::{attn_matvec, call, take_tensor};

/// `matrix · x + bias`: `[out, in]` times `[in]`, plus `[out]`, is `[out]`, all `f32` or all `bf16`, accumulated in `f32`.
///
/// `None` where LibTorch has to do it: off the CPU, on one without AVX2 and FMA, for other kinds, where a gradient is to
/// be recorded, under autocast, and for a matrix that is contiguous neither as it is nor transposed.
///
/// A token is decoded by reading every matrix once, so that its time is that of memory. LibTorch reaches it on processors
/// with AVX-512 alone: its `f32` product is MKL's baseline on an AMD processor, and its `bf16` one takes one number at a time.
///
/// # Errors
///
/// Shapes that do not fit, and what LibTorch refuses.
pub fn matvec(matrix: &Tensor, x: &Tensor, bias: Option<&Tensor>) -> Result<Option<Tensor>> {
    let bias = bias.map_or(ptr::null(), Tensor::as_ptr);
    let mut out = ptr::null_mut();
    // SAFETY: the tensors are borrowed for the call, and C++ keeps none of them.
    call("multiplying a matrix and a row", |err| unsafe {
        attn_matvec(matrix.as_ptr(), x.as_ptr(), bias, &mut out, err)
    })?;
    // SAFETY: a successful call leaves null or a tensor of its own.
    Ok(unsafe { take_tensor(out) })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use tch::{Device, Kind};

    use super::*;
    use crate::random::seeded;

    /// The largest error of `got`, in units of what rounding the exact sums to `kind` may cost.
    fn error(got: &Tensor, matrix: &Tensor, x: &Tensor, bias: Option<&Tensor>) -> f64 {
        let exact = |t: &Tensor| t.to_kind(Kind::Double);
        let mut want = exact(matrix).mv(&exact(x));
        // Rounding grows with the terms of a sum, not with the sum.
        let mut size = exact(matrix).abs().mv(&exact(x).abs());
        if let Some(bias) = bias {
            want += exact(bias);
            size += exact(bias).abs();
        }
        // Sums of both kinds are taken in f32; bf16 then keeps 8 bits.
        let kept_bits = if got.kind() == Kind::BFloat16 { 8 } else { 24 };
        let allowed = size * 8.0 * 2f64.powi(-24) + want.abs() * 2f64.powi(-kept_bits);
        f64::try_from(((exact(got) - want).abs() / (allowed + 1e-30)).max()).unwrap()
    }

    fn random(size: &[i64], kind: Kind) -> Tensor {
        Tensor::randn(size, (Kind::Float, Device::Cpu)).to_kind(kind)
    }

    fn is_served(matrix: &Tensor, x: &Tensor) -> bool {
        matvec(matrix, x, None).unwrap().is_some()
    }

    #[test]
    fn sums_are_those_of_f64_to_their_rounding() {
        if !is_served(&random(&[2, 2], Kind::Float), &random(&[2], Kind::Float)) {
            // Past the test runner, which keeps what passing tests print.
            let line = "\nSKIPPED sums_are_those_of_f64_to_their_rounding: no AVX2 here\n";
            std::io::stderr().write_all(line.as_bytes()).unwrap();
            return;
        }
        let _stream = seeded(0);
        for kind in [Kind::Float, Kind::BFloat16] {
            // Sizes around the width of a register, of a row block, of a thread's share; nothing, as of a layer without heads.
            for (n_out, n_in) in [
                (3, 0),
                (1, 1),
                (3, 7),
                (8, 8),
                (64, 33),
                (65, 64),
                (100, 31),
                (768, 257),
                (1000, 3072),
            ] {
                let x = random(&[n_in], kind);
                let bias = random(&[n_out], kind);
                let matrix = random(&[n_out, n_in], kind);
                let transposed = matrix.tr().contiguous();
                for (matrix, bias) in [
                    (&matrix, None),
                    (&matrix, Some(&bias)),
                    (&transposed.tr(), None),
                    (&transposed.tr(), Some(&bias)),
                ] {
                    let got = matvec(matrix, &x, bias).unwrap().unwrap();
                    assert_eq!((got.size(), got.kind()), (vec![n_out], kind));
                    let error = error(&got, matrix, &x, bias);
                    assert!(error < 1.0, "{kind:?} {n_out} x {n_in}: {error}");
                }
            }
        }
    }

    #[test]
    fn what_it_does_not_do_is_left_to_libtorch() {
        let _stream = seeded(11);
        let matrix = random(&[4, 6], Kind::Float);
        let x = random(&[6], Kind::Float);
        let kinds = [Kind::Double, Kind::Half];
        for kind in kinds {
            assert!(!is_served(&matrix.to_kind(kind), &x.to_kind(kind)), "{kind:?}");
        }
        assert!(!is_served(&matrix, &x.to_kind(Kind::BFloat16)), "mixed kinds");
        assert!(!is_served(&random(&[4, 12], Kind::Float).slice(1, 0, 12, 2), &x), "strides");
        let learned = matrix.copy().set_requires_grad(true);
        assert!(!is_served(&learned, &x), "a gradient is to be recorded");
        assert_eq!(tch::no_grad(|| is_served(&learned, &x)), is_served(&matrix, &x));

        let short = matvec(&matrix, &random(&[5], Kind::Float), None).unwrap_err().to_string();
        assert!(short.contains("[4, 6]") && short.contains("[5]"), "{short}");
        assert!(matvec(&matrix, &x, Some(&random(&[6], Kind::Float))).is_err());
    }
}
