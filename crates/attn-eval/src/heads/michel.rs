//! Head importance by the gradient of the loss at each head's gate.
//!
//! ```text
//! I_h = E_x |∂L(x)/∂ξ_h| = E_x |Σ_t z_h(t)ᵀ ∂L(x)/∂z_h(t)|        at ξ_h = 1, z'_h = ξ_h z_h
//! ```
//!
//! z_h is the head's output before the output projection, so that the sum is that over its own slice of W_O; the absolute
//! value is taken of each row, inside the mean: signs would cancel. One forward and one backward pass.
//!
//! Michel, Levy, Neubig 2019, "Are Sixteen Heads Really Better than One?", section 4.1,
//! <https://arxiv.org/abs/1905.10650>. They divide by the ℓ2 norm of each layer, which is
//! [`Normalize::Layer`](super::Normalize::Layer) here.

use attn_core::{Fill, Gate, Model};
use attn_data::batch::Batch;
use tch::{Kind, Tensor};

use super::rows_of;
use crate::{error::Result, row_loss::RowLoss};

/// |∂L/∂ξ| of each row for every head, layer after layer; `None` for rows without a loss.
pub(super) fn of_batch(
    model: &Model,
    loss: &RowLoss<'_>,
    batch: Batch,
) -> Result<Vec<Option<Vec<f64>>>> {
    let n_rows = batch.rows;
    let kind = if model.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    // A gate of its own for each row and head: no row's gradient meets another's.
    let gate = |n_heads: i64| {
        let ones = Tensor::ones([n_rows as i64, n_heads, 1, 1], (kind, model.device()));
        Some(Gate { g: ones.set_requires_grad(true), fill: Fill::Zero })
    };
    let n_heads: Vec<i64> = model.layers().iter().map(|layer| layer.dims().n_heads).collect();
    // A layer without heads has nothing to gate.
    let gates: Vec<Option<Gate>> =
        n_heads.iter().map(|&n| (n > 0).then_some(n).and_then(gate)).collect();
    let Some(losses) = tch::with_grad(|| loss.of_batch(model, batch, &gates))? else {
        return Ok(vec![None; n_rows]);
    };
    let leaves: Vec<&Tensor> = gates.iter().flatten().map(|gate| &gate.g).collect();
    let total = tch::with_grad(|| losses.per_row.sum(None::<Kind>));
    let gradients = Tensor::run_backward(&[total], &leaves, false, false);
    let layers: Vec<Tensor> =
        gradients.iter().map(|gradient| gradient.abs().flatten(1, -1)).collect();
    let with_loss = losses.has_one.iter().zip(rows_of(&layers));
    Ok(with_loss.map(|(&has_one, values)| has_one.then_some(values)).collect())
}
