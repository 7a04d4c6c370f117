//! Slopes of the loss at the heads' gates, and the scores that are made of them in one forward and one backward pass.
//!
//! ```text
//! s_h(x) = ∂L(x)/∂ξ_h = Σ_t z_h(t)ᵀ ∂L(x)/∂z_h(t)                  at ξ_h = 1, z'_h = ξ_h z_h
//!
//! michel        E_x |s_h(x)|
//! taylor        −E_x s_h(x)
//! fisher        E_x s_h(x)²
//! fisher_block  E_x (Σ_{g ∈ S} s_g(x))²,  S: h and the heads of its layer that would go before it
//! ```
//!
//! z_h is the head's output before the output projection, so that the sum is that over its own slice of W_O. The size of a
//! slope is taken of each row, inside the mean: signs would cancel.
//!
//! - `michel`: Michel, Levy, Neubig 2019, "Are Sixteen Heads Really Better than One?", section 4.1,
//!   <https://arxiv.org/abs/1905.10650>. They divide by the ℓ2 norm of each layer, which is
//!   [`Normalize::Layer`](super::Normalize::Layer) here.
//! - `taylor`: what the loss would rise by without the head, to first order (ξ: 1 → 0). Molchanov et al. 2017,
//!   <https://arxiv.org/abs/1611.06440>, take the size of it; here the sign is kept, as it says whether the head helps.
//! - `fisher`: twice what the loss would rise by, to second order, where L = −ln p and the first order vanishes. Kwon et al.
//!   2022, "A Fast Post-Training Pruning Framework for Transformers", <https://arxiv.org/abs/2204.09656>, section 4.1.
//! - `fisher_block`: the same of the head together with those of its layer that go before it, in a greedy order: at each step the
//!   head goes that raises the sum least (there section 4.2, which rearranges what the diagonal chose). Where a head goes and takes
//!   away from what those before it cost, it has their score: a later head never scores less.

use attn_core::{Fill, Gate, Model};
use attn_data::batch::Batch;
use tch::{Kind, Tensor};

use super::rows_of;
use crate::{error::Result, row_loss::RowLoss};

/// ∂L/∂ξ of each row for every head, layer after layer, where all gates stand at `at`; `None` for rows without a loss.
pub(super) fn of_batch(
    model: &Model,
    loss: &RowLoss<'_>,
    batch: Batch,
    at: f64,
) -> Result<Vec<Option<Vec<f64>>>> {
    let n_rows = batch.rows;
    let gates = gates(model, n_rows, at);
    let Some((asked, losses)) = tch::with_grad(|| loss.of_batch(model, batch, &gates))? else {
        return Ok(vec![None; n_rows]);
    };
    let leaves: Vec<&Tensor> = gates.iter().flatten().map(|gate| &gate.g).collect();
    let total = tch::with_grad(|| losses.sum(None::<Kind>));
    let gradients = Tensor::run_backward(&[total], &leaves, false, false);
    let layers: Vec<Tensor> = gradients.iter().map(|gradient| gradient.flatten(1, -1)).collect();
    let with_loss = asked.counts.iter().zip(rows_of(&layers));
    Ok(with_loss.map(|(&count, values)| (count > 0).then_some(values)).collect())
}

/// A gate of its own for each row and head, all at `at`: no row's gradient meets another's. A layer without heads has none.
pub(super) fn gates(model: &Model, n_rows: usize, at: f64) -> Vec<Option<Gate>> {
    let kind = if model.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let gate = |n_heads: i64| {
        let g = Tensor::full([n_rows as i64, n_heads, 1, 1], at, (kind, model.device()));
        Gate { g: g.set_requires_grad(true), fill: Fill::Zero }
    };
    let layers = model.layers();
    let n_heads = layers.iter().map(|layer| layer.dims().n_heads);
    n_heads.map(|n| (n > 0).then(|| gate(n))).collect()
}

/// `fisher_block` of each row: `slopes[row][head]`, layer after layer, of layers with `n_heads` heads.
pub(super) fn in_blocks(slopes: &[Vec<f64>], n_heads: &[usize]) -> Vec<Vec<f64>> {
    let mut values = vec![vec![0.0; n_heads.iter().sum()]; slopes.len()];
    let mut first = 0;
    for &n in n_heads {
        let mut left: Vec<usize> = (first..first + n).collect();
        // Of each row, the sum over the heads that are gone.
        let mut gone = vec![0.0; slopes.len()];
        let mut least = 0.0_f64;
        while !left.is_empty() {
            let cost = |head: usize| -> f64 {
                slopes.iter().zip(&gone).map(|(row, gone)| (gone + row[head]).powi(2)).sum()
            };
            let costs: Vec<f64> = left.iter().map(|&head| cost(head)).collect();
            let next = (0..left.len()).min_by(|&a, &b| costs[a].total_cmp(&costs[b]));
            let next = next.expect("some head is left");
            let head = left.remove(next);
            let (sum, before) = (costs[next], least);
            least = least.max(sum);
            for ((value, row), gone) in values.iter_mut().zip(slopes).zip(&mut gone) {
                *gone += row[head];
                // Rows share what those before cost beyond this sum.
                value[head] = gone.powi(2) + (before - sum).max(0.0) / slopes.len() as f64;
            }
        }
        first += n;
    }
    values
}
