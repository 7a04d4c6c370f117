//! Integrated gradients over the gates: what each head contributes on the way from no head at all to all of them.
//!
//! ```text
//! I_h = −E_x ∫_0^1 ∂L(x)/∂ξ_h |_{ξ = α·1} dα                       Σ_h I_h = E_x [L(x; ξ = 0) − L(x; ξ = 1)]
//! ```
//!
//! Sundararajan, Taly, Yan 2017, "Axiomatic Attribution for Deep Networks", <https://arxiv.org/abs/1703.01365>, section 3, with
//! the gates of all heads as the input and zeros as its baseline. The integral is a sum over nodes of Gauss and Legendre on
//! equal parts of the way, each node one forward and one backward pass: 16 of them, and twice as many until the equation on the
//! right holds to a hundredth of what rows differ by. Positive where the head lowers the loss.

use attn_core::Model;
use attn_data::batch::Batch;

use super::{gradient, rows_of};
use crate::{error::Result, row_loss::RowLoss};

/// Nodes of a part.
const N_NODES: usize = 8;

/// Parts to begin with, and the most.
const N_PARTS: [usize; 2] = [2, 32];

/// How far the sum over heads may be from what all heads are worth, as a share of what single rows are.
const GAP: f64 = 0.01;

pub(super) fn of_batch(
    model: &Model,
    loss: &RowLoss<'_>,
    batch: Batch,
) -> Result<Vec<Option<Vec<f64>>>> {
    let worth = worth(model, loss, &batch)?;
    let mut n_parts = N_PARTS[0];
    loop {
        let found = integral(model, loss, &batch, n_parts)?;
        let rows = found.iter().zip(&worth).filter_map(|(row, worth)| Some((row.as_ref()?, worth)));
        let (mut gap, mut size) = (0.0, 0.0);
        for (row, worth) in rows {
            gap += row.iter().sum::<f64>() - worth;
            size += worth.abs();
        }
        if gap.abs() <= GAP * size {
            return Ok(found);
        }
        if n_parts == N_PARTS[1] {
            let share = 100.0 * gap.abs() / size;
            tracing::warn!(
                "integrated gradients miss {share:.1} % of what all heads are worth: the loss is not smooth on the way there"
            );
            return Ok(found);
        }
        n_parts *= 2;
    }
}

/// L without any head, less L with all of them, of each row.
fn worth(model: &Model, loss: &RowLoss<'_>, batch: &Batch) -> Result<Vec<f64>> {
    let at = |gate: f64| -> Result<Vec<f64>> {
        let _no_grad = tch::no_grad_guard();
        let gates = gradient::gates(model, batch.rows, gate);
        let found = loss.of_batch(model, batch.clone(), &gates)?;
        let Some((_, losses)) = found else { return Ok(vec![0.0; batch.rows]) };
        Ok(rows_of(&[losses.unsqueeze(1)]).into_iter().map(|row| row[0]).collect())
    };
    Ok(at(0.0)?.into_iter().zip(at(1.0)?).map(|(none, all)| none - all).collect())
}

fn integral(
    model: &Model,
    loss: &RowLoss<'_>,
    batch: &Batch,
    n_parts: usize,
) -> Result<Vec<Option<Vec<f64>>>> {
    let mut total: Vec<Option<Vec<f64>>> = vec![None; batch.rows];
    let part = 1.0 / n_parts as f64;
    for at_part in 0..n_parts {
        for (node, weight) in nodes(N_NODES) {
            let at = (at_part as f64 + node) * part;
            let slopes = gradient::of_batch(model, loss, batch.clone(), at)?;
            for (total, slopes) in total.iter_mut().zip(slopes) {
                let Some(slopes) = slopes else { continue };
                let total = total.get_or_insert_with(|| vec![0.0; slopes.len()]);
                for (total, slope) in total.iter_mut().zip(slopes) {
                    *total -= weight * part * slope;
                }
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
        for n in [2, 5, N_NODES, 16] {
            let nodes = nodes(n);
            for power in 0..2 * n as i32 {
                let found: f64 = nodes.iter().map(|(x, weight)| weight * x.powi(power)).sum();
                let expected = 1.0 / f64::from(power + 1);
                assert!((found - expected).abs() < 1e-13, "{n} nodes, x^{power}: {found}");
            }
        }
    }
}
