//! How sure a head is of where it looks, whatever the task.
//!
//! ```text
//! I_h = E_x mean_t max_j a_h(t, j),  t over the real tokens of x
//! ```
//!
//! Voita et al. 2019, "Analyzing Multi-Head Self-Attention", section 3.2, <https://arxiv.org/abs/1905.09418>, who leave the last
//! token of a text out. All attention weights are made: memory grows with the square of the length.

use attn_core::{ForwardOptions, Model, Rows};
use attn_data::batch::Batch;
use tch::{Kind, Tensor};

use super::rows_of;
use crate::{error::Result, rows::to_input};

pub(super) fn of_batch(model: &Model, batch: Batch) -> Result<Vec<Option<Vec<f64>>>> {
    let size = [batch.rows as i64, 1, batch.cols as i64];
    let real = Tensor::from_slice(&batch.mask).view(size).to_device(model.device());
    let n_real = real.sum_dim_intlist([2i64].as_slice(), false, Kind::Int64); // [rows, 1]
    let options = ForwardOptions { attentions: Rows::All, ..ForwardOptions::default() };
    let output = model.forward(&to_input(&batch, model), &options)?;
    let mean = |weights: &Tensor| {
        // A layer without heads has no largest weight.
        if weights.size()[1] == 0 {
            return weights.sum_dim_intlist([2i64, 3].as_slice(), false, None::<Kind>);
        }
        let largest = weights.amax([-1i64].as_slice(), false); // [rows, n_heads, seq_len]
        (largest * &real).sum_dim_intlist([2i64].as_slice(), false, None::<Kind>) / &n_real
    };
    let layers: Vec<Tensor> = output.attentions.iter().map(mean).collect();
    Ok(rows_of(&layers).into_iter().map(Some).collect())
}
