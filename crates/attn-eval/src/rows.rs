//! Rows through a model, batch by batch.

use std::ops::ControlFlow;

use attn_core::{Model, ModelInput, config::Head};
use attn_data::batch::{Batch, BatchPlan, Encoded, Side, collate};
use tch::Tensor;

use crate::error::{Error, Result};

/// How rows share a forward pass. Changes the speed and the memory, not the results.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Batching {
    /// Most rows in a batch.
    pub batch_size: usize,
    /// Most positions in a batch, padding included. A row longer than that stands alone.
    pub max_tokens: Option<usize>,
    /// What fills padding; no result depends on it.
    pub pad_id: u32,
}

impl Default for Batching {
    fn default() -> Self {
        Self { batch_size: 32, max_tokens: Some(8192), pad_id: 0 }
    }
}

/// Is told how many rows are done, after each batch, and says whether to go on.
pub type Progress<'a> = dyn FnMut(usize) -> ControlFlow<()> + 'a;

/// A batch as `model` takes it: for one that attends to another sequence, the first text of each row is that.
pub fn to_input(batch: &Batch, model: &Model) -> ModelInput {
    // The tokens that a language model predicts are counted in the whole row.
    let apart = (model.needs_source() && model.config().head != Head::LanguageModel)
        .then(|| batch.apart())
        .flatten();
    match apart {
        Some([source, own]) => as_it_is(&own, model).attending_to(as_it_is(&source, model)),
        None => as_it_is(batch, model),
    }
}

fn as_it_is(batch: &Batch, model: &Model) -> ModelInput {
    let size = [batch.rows as i64, batch.cols as i64];
    let tensor = |values: &[i64]| Tensor::from_slice(values).view(size).to_device(model.device());
    let segments = batch.segments.as_deref().filter(|_| model.config().has_segments());
    ModelInput {
        token_type_ids: segments.map(tensor),
        ..ModelInput::masked(tensor(&batch.ids), tensor(&batch.mask))
    }
}

/// Calls `score` with the positions in `rows` and the padded batch of each batch, longest rows first.
pub(crate) fn for_each_batch(
    model: &Model,
    rows: &[Encoded],
    batching: &Batching,
    progress: &mut Progress<'_>,
    mut score: impl FnMut(&[usize], Batch) -> Result<()>,
) -> Result<()> {
    if rows.is_empty() {
        return Err(Error::Nothing("no row was given"));
    }
    if let Some(row) = rows.iter().find(|row| row.ids.is_empty()) {
        return Err(Error::EmptyRow { index: row.index });
    }
    let plan =
        BatchPlan { max_tokens: batching.max_tokens, ..BatchPlan::new(batching.batch_size)? };
    let lengths: Vec<usize> = rows.iter().map(|row| row.ids.len()).collect();
    let _no_grad = tch::no_grad_guard();
    let mut n_done = 0;
    for positions in plan.by_length(&lengths) {
        let batch: Vec<&Encoded> = positions.iter().map(|&at| &rows[at]).collect();
        score(&positions, collate(&batch, batching.pad_id, Side::Right))?;
        n_done += positions.len();
        if progress(n_done).is_break() {
            return Err(Error::Stopped { n_done, n_rows: rows.len() });
        }
    }
    tracing::debug!(n_rows = rows.len(), device = ?model.device(), "scored");
    Ok(())
}
