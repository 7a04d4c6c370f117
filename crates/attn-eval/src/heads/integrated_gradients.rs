//! Integrated gradients over the gates: what each head contributes on the way from no head at all to all of them.
//!
//! ```text
//! I_h = −E_x ∫_0^1 ∂L(x)/∂ξ_h |_{ξ = α·1} dα                       Σ_h I_h = E_x [L(x; ξ = 0) − L(x; ξ = 1)]
//! ```
//!
//! Sundararajan, Taly, Yan 2017, "Axiomatic Attribution for Deep Networks", <https://arxiv.org/abs/1703.01365>, section 3, with
//! the gates of all heads as the input and zeros as its baseline. The integral is a sum over the [`N_STEPS`] nodes of Gauss and
//! Legendre, each one forward and one backward pass. Positive where the head lowers the loss.

use attn_core::Model;
use attn_data::batch::Batch;

use super::gradient;
use crate::{error::Result, row_loss::RowLoss};

/// Nodes of the integral.
const N_STEPS: usize = 16;

pub(super) fn of_batch(
    model: &Model,
    loss: &RowLoss<'_>,
    batch: Batch,
) -> Result<Vec<Option<Vec<f64>>>> {
    let mut total: Vec<Option<Vec<f64>>> = vec![None; batch.rows];
    for (at, weight) in nodes(N_STEPS) {
        let slopes = gradient::of_batch(model, loss, batch.clone(), at)?;
        for (total, slopes) in total.iter_mut().zip(slopes) {
            let Some(slopes) = slopes else { continue };
            let total = total.get_or_insert_with(|| vec![0.0; slopes.len()]);
            for (total, slope) in total.iter_mut().zip(slopes) {
                *total -= weight * slope;
            }
        }
    }
    Ok(total)
}

/// Nodes and weights of Gauss and Legendre on [0, 1]: the roots of the Legendre polynomial P_n by Newton's method.
fn nodes(n: usize) -> Vec<(f64, f64)> {
    // P_n(x) and its slope, by the recurrence k P_k = (2k − 1) x P_{k−1} − (k − 1) P_{k−2}.
    let legendre = |x: f64| {
        let (mut before, mut here) = (1.0, x);
        for k in 2..=n {
            let k = k as f64;
            (before, here) = (here, ((2.0 * k - 1.0) * x * here - (k - 1.0) * before) / k);
        }
        (here, n as f64 * (x * here - before) / (x * x - 1.0))
    };
    let node = |i: usize| {
        let mut x = (std::f64::consts::PI * (i as f64 + 0.75) / (n as f64 + 0.5)).cos();
        for _ in 0..8 {
            let (value, slope) = legendre(x);
            x -= value / slope;
        }
        let slope = legendre(x).1;
        ((1.0 - x) / 2.0, 1.0 / ((1.0 - x * x) * slope * slope))
    };
    (0..n).map(node).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn polynomials_are_integrated_exactly() {
        for n in [2, 5, N_STEPS] {
            let nodes = nodes(n);
            for power in 0..2 * n as i32 {
                let found: f64 = nodes.iter().map(|(x, weight)| weight * x.powi(power)).sum();
                let expected = 1.0 / f64::from(power + 1);
                assert!((found - expected).abs() < 1e-13, "{n} nodes, x^{power}: {found}");
            }
        }
    }
}
