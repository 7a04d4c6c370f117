//! What rows of logits say.

use std::ptr;

use tch::Tensor;

use crate::error::Result;
use crate::ffi::{attn_read_logits, call, take_tensor};

/// What one row of logits x says, all relative to its largest logit m.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Reading {
    /// ln Σ e^(x − m).
    pub log_sum: f64,
    /// x − m of the target; 0 without one.
    pub target: f64,
    /// The place of m, the first of several.
    pub top: i64,
    /// Σ p (x − m); 0 without p.
    pub mean: f64,
}

impl Reading {
    /// −ln softmax(x)\[target\].
    pub fn loss(&self) -> f64 {
        self.log_sum - self.target
    }

    /// KL(p ‖ softmax(x)) of a p that sums to 1, with `neg_entropy` = Σ p ln p.
    pub fn kl(&self, neg_entropy: f64) -> f64 {
        neg_entropy - self.mean + self.log_sum
    }
}

/// Reads `logits` (`[n, vocab_size]`), with `p` of the same shape and `targets` (`[n]`, 64-bit integers) where given: one reading a
/// row. Sums are in `f64`, of terms in `f32`.
///
/// `None` where LibTorch has to do it: off the CPU, on one without AVX2 and FMA, for other kinds than `f32`, for rows that are not
/// contiguous, where a gradient is to be recorded.
///
/// A row is read while it is near: log-probabilities of a whole vocabulary are never written.
///
/// # Errors
///
/// Shapes that do not fit, and a target outside of the vocabulary.
pub fn read_logits(
    logits: &Tensor,
    p: Option<&Tensor>,
    targets: Option<&Tensor>,
) -> Result<Option<Vec<Reading>>> {
    let [p, targets] = [p, targets].map(|x| x.map_or(ptr::null(), Tensor::as_ptr));
    let mut out = ptr::null_mut();
    // SAFETY: the tensors are borrowed for the call, and C++ keeps none of them.
    call("reading logits", |err| unsafe {
        attn_read_logits(logits.as_ptr(), p, targets, &mut out, err)
    })?;
    // SAFETY: a successful call leaves null or a tensor of its own.
    let Some(found) = (unsafe { take_tensor(out) }) else { return Ok(None) };
    let rows = Vec::<Vec<f64>>::try_from(found).expect("two axes of f64");
    let reading = |row: Vec<f64>| Reading {
        log_sum: row[0],
        target: row[1],
        top: row[2] as i64,
        mean: row[3],
    };
    Ok(Some(rows.into_iter().map(reading).collect()))
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::random::seeded;

    #[test]
    fn rows_of_any_length_are_read_as_in_f64() {
        let _stream = seeded(11);
        for n in [1, 7, 15, 16, 17, 1023, 1025, 5000] {
            let logits = Tensor::randn([5, n], (Kind::Float, Device::Cpu)) * 6.0 - 90.0;
            let own = Tensor::randn([5, n], (Kind::Double, Device::Cpu)) * 3.0;
            let log_p = own.log_softmax(-1, Kind::Double);
            let p = log_p.exp().to_kind(Kind::Float);
            let targets = Tensor::randint(n, [5], (Kind::Int64, Device::Cpu));
            let Some(found) = read_logits(&logits, Some(&p), Some(&targets)).unwrap() else {
                return;
            };
            let exact = logits.to_kind(Kind::Double).log_softmax(-1, Kind::Double);
            for (row, found) in (0..).zip(&found) {
                let (exact, log_p) = (exact.get(row), log_p.get(row));
                let target = targets.int64_value(&[row]);
                let loss = -exact.double_value(&[target]);
                assert!((found.loss() - loss).abs() < 1e-5, "{n}: {} {loss}", found.loss());
                let p = log_p.exp();
                let of = |x: &Tensor| (&p * x).sum(Kind::Double).double_value(&[]);
                let kl = of(&(&log_p - &exact));
                let got = found.kl(of(&log_p));
                assert!((got - kl).abs() < 1e-5 * kl.max(1.0), "{n}: {got} {kl}");
                assert_eq!(found.top, logits.get(row).argmax(0, false).int64_value(&[]), "{n}");
            }
            let bare = read_logits(&logits, None, None).unwrap().unwrap();
            assert_eq!((bare[0].target, bare[0].mean), (0.0, 0.0));
            assert_eq!(bare[0].log_sum, found[0].log_sum);
        }
    }

    #[test]
    fn what_is_no_number_stays_none() {
        for bad in [f64::NAN, f64::INFINITY] {
            let logits = Tensor::ones([1, 40], (Kind::Float, Device::Cpu));
            let _ = logits.narrow(1, 33, 1).fill_(bad);
            let Some(found) = read_logits(&logits, None, None).unwrap() else { return };
            assert!(!found[0].log_sum.is_finite(), "{bad}: {found:?}");
        }
    }

    #[test]
    fn what_cannot_be_is_refused_and_other_kinds_are_left_to_libtorch() {
        let logits = Tensor::ones([2, 9], (Kind::Float, Device::Cpu));
        let error = read_logits(&logits, None, Some(&Tensor::from_slice(&[0i64, 9]))).unwrap_err();
        assert!(error.to_string().contains("target 9 of 9"), "{error}");
        assert!(read_logits(&logits, Some(&logits.get(0)), None).is_err());
        let wide = logits.to_kind(Kind::Double);
        assert!(read_logits(&wide, None, None).unwrap().is_none());
        assert!(read_logits(&logits.tr(), None, None).unwrap().is_none());
    }
}
