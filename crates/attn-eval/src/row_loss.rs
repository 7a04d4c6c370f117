//! What each row costs a model, as a tensor that gradients flow through.

use attn_core::{ForwardOptions, Gate, Model};
use attn_data::batch::{Batch, Encoded, IGNORED, Masking, mask_tokens};
use tch::{Kind, Tensor};

use crate::{
    classify::check_classifier,
    error::Result,
    language::{check_decoder, check_masked},
    rows::to_input,
};

/// The loss of a row, in nats.
#[derive(Debug, Clone, Copy)]
pub enum RowLoss<'a> {
    /// −ln p(label), of a classifier. Rows without a label have none.
    Label,
    /// Mean of −ln p(token) over the tokens of a row but the first, each from those before it, of a decoder. Rows of one
    /// token have none.
    NextToken,
    /// Mean of −ln p(token) over the tokens that are hidden, of an encoder. Rows of special tokens alone have none.
    MaskedTokens {
        /// What is hidden.
        masking: &'a Masking,
        /// Seed of which tokens are: a row's depend on it and on [`Encoded::index`].
        seed: u64,
    },
}

/// The losses of a batch.
pub(crate) struct Losses {
    /// `[rows]`, in `f32` or `f64`; 0 where a row has none.
    pub(crate) per_row: Tensor,
    /// Whether each row has one.
    pub(crate) has_one: Vec<bool>,
}

impl RowLoss<'_> {
    /// The name in results.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Label => "label",
            Self::NextToken => "next_token_within_row",
            Self::MaskedTokens { .. } => "masked_tokens",
        }
    }

    /// Refuses a model that has no such loss, and labels that it has no class for.
    pub(crate) fn check(
        &self,
        model: &Model,
        rows: &[Encoded],
        measure: &'static str,
    ) -> Result<()> {
        match self {
            Self::Label => check_classifier(model.config(), rows, measure),
            Self::NextToken => check_decoder(model.config(), measure),
            Self::MaskedTokens { .. } => check_masked(model.config(), measure),
        }
    }

    /// Runs a batch with the heads' outputs gated. `None` where no row of it has a loss.
    pub(crate) fn of_batch(
        &self,
        model: &Model,
        mut batch: Batch,
        gates: &[Option<Gate>],
    ) -> Result<Option<Losses>> {
        // What is to be predicted where, in the flattened batch.
        let labels = match self {
            Self::Label => batch.labels.clone(),
            Self::NextToken => next_tokens(&batch),
            Self::MaskedTokens { masking, seed } => {
                let masked = mask_tokens(&batch, masking, *seed, 0)?;
                batch.ids = masked.ids;
                masked.labels
            }
        };
        let predicted = (0_i64..).zip(labels).filter(|(_, label)| *label != IGNORED);
        let (places, labels): (Vec<i64>, Vec<i64>) = predicted.unzip();
        if places.is_empty() {
            return Ok(None);
        }
        let on_device = |values: &[i64]| Tensor::from_slice(values).to_device(model.device());
        let (input, at) = (to_input(&batch, model), on_device(&places));
        let options = ForwardOptions { gates, ..ForwardOptions::default() };
        let (logits, per_row) = match self {
            Self::Label => (model.forward(&input, &options)?.logits.index_select(0, &at), 1),
            _ => {
                let options = ForwardOptions { logits_at: Some(&at), ..options };
                (model.forward(&input, &options)?.logits, batch.cols as i64)
            }
        };
        let wide = if logits.kind() == Kind::Double { Kind::Double } else { Kind::Float };
        let losses =
            -logits.log_softmax(-1, wide).gather(1, &on_device(&labels).unsqueeze(1), false);
        let rows: Vec<i64> = places.iter().map(|place| place / per_row).collect();
        let mut counts = vec![0_i64; batch.rows];
        rows.iter().for_each(|&row| counts[row as usize] += 1);
        let sums = Tensor::zeros([batch.rows as i64], (wide, model.device())).index_add(
            0,
            &on_device(&rows),
            &losses.view([-1]),
        );
        let has_one = counts.iter().map(|&count| count > 0).collect();
        Ok(Some(Losses { per_row: sums / on_device(&counts).clamp_min(1), has_one }))
    }
}

/// The token after each of a batch that is padded on the right, [`IGNORED`] where there is none.
fn next_tokens(batch: &Batch) -> Vec<i64> {
    let next = |place: usize| match (place + 1) % batch.cols {
        0 => IGNORED,
        _ if batch.mask[place + 1] == 0 => IGNORED,
        _ => batch.ids[place + 1],
    };
    (0..batch.ids.len()).map(next).collect()
}
