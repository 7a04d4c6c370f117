//! The size of the gradient at a head's output, whatever that output is: for comparison.
//!
//! ```text
//! I_h = E_x mean_{t,d} |∂L(x)/∂z_h(t)_d|,  t over the real tokens of x
//! ```
//!
//! What a course project called importance, <https://github.com/yuvi07k/Attention-Mechanisms-Exploration>, there of slices of the
//! layer's output behind the output projection, which are no heads. A head whose output is zero, and whose removal changes
//! nothing, can have the largest.

use attn_core::Model;
use attn_data::batch::Batch;
use tch::{Kind, Tensor};

use super::rows_of;
use crate::{error::Result, row_loss::RowLoss};

pub(super) fn of_batch(
    model: &Model,
    loss: &RowLoss<'_>,
    batch: Batch,
) -> Result<Vec<Option<Vec<f64>>>> {
    let size = [batch.rows as i64, 1, batch.cols as i64, 1];
    let real = Tensor::from_slice(&batch.mask).view(size).to_device(model.device());
    let n_rows = batch.rows;
    let Some(asked) = loss.ask(model, batch)? else { return Ok(vec![None; n_rows]) };
    let (z, total) = tch::with_grad(|| -> Result<_> {
        let mut running = model.begin(&asked.input, &asked.options())?;
        running.track_gradients();
        let n_layers = model.layers().len();
        let z = (0..n_layers).map(|_| running.advance_with_z(None));
        let z = z.collect::<std::result::Result<Vec<Tensor>, _>>()?;
        let total = asked.losses(&running.finish()?).sum(None::<Kind>);
        Ok((z, total))
    })?;
    // A layer without heads has no output to take a gradient at.
    let with_heads: Vec<&Tensor> = z.iter().filter(|z| z.size()[1] > 0).collect();
    let gradients = Tensor::run_backward(&[total], &with_heads, false, false);
    let mean = |gradient: &Tensor| {
        let head_dim = gradient.size()[3];
        let sizes =
            (gradient.abs() * &real).sum_dim_intlist([2i64, 3].as_slice(), false, None::<Kind>);
        let n_tokens = real.sum_dim_intlist([1i64, 2, 3].as_slice(), false, Kind::Int64);
        sizes / (n_tokens * head_dim).unsqueeze(1)
    };
    let layers: Vec<Tensor> = gradients.iter().map(mean).collect();
    let with_loss = asked.counts.iter().zip(rows_of(&layers));
    Ok(with_loss.map(|(&count, values)| (count > 0).then_some(values)).collect())
}
