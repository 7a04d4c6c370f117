//! How often a head runs, in layers that choose their heads by the input (`routed`).
//!
//! ```text
//! I_h = E_x mean_t [g_h(x, t) > 0],  t over the real tokens of x
//! ```
//!
//! The heads of other layers always run. What a layer reads is made with the heads chosen before it.

use attn_core::{ForwardOptions, Mask, Model};
use attn_data::batch::Batch;
use tch::{Kind, Tensor};

use super::rows_of;
use crate::{error::Result, rows::to_input};

pub(super) fn of_batch(model: &Model, batch: Batch) -> Result<Vec<Option<Vec<f64>>>> {
    let size = [batch.rows as i64, batch.cols as i64];
    let real = Tensor::from_slice(&batch.mask).view(size).to_device(model.device());
    let n_real = real.sum_dim_intlist([1i64].as_slice(), true, Kind::Int64); // [rows, 1]
    let mask = Mask::with_keep(model.config().is_causal(), &real);
    let options = ForwardOptions { attention_inputs: true, ..ForwardOptions::default() };
    let output = model.forward(&to_input(&batch, model), &options)?;
    let share =
        |(layer, hidden): (&&attn_core::layer::AttnLayer, &Tensor)| match layer.kind().routes() {
            Some(routes) => {
                let open = routes.open(hidden, &mask).gt(0.0).logical_and(&real.ne(0).unsqueeze(1)); // [rows, h, cols]
                open.sum_dim_intlist([2i64].as_slice(), false, Kind::Double) / &n_real
            }
            None => Tensor::ones([size[0], layer.dims().n_heads], (Kind::Float, model.device())),
        };
    let layers: Vec<Tensor> =
        model.layers().iter().zip(&output.attention_inputs).map(share).collect();
    Ok(rows_of(&layers).into_iter().map(Some).collect())
}
