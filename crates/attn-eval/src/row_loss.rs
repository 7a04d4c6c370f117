//! What each row costs a model, as a tensor that gradients flow through.

use attn_core::{ForwardOptions, Gate, Model, ModelInput};
use attn_data::batch::{Batch, Encoded, IGNORED, Masking, mask_tokens};
use rand_chacha::{
    ChaCha8Rng,
    rand_core::{RngCore, SeedableRng},
};
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
    /// How far predictions are from the model's own, without labels, where `of` would ask for one (rows without a label
    /// included). Where heads are let go it is KL(model as it is ‖ model without them). At the model as it is that has no slope: where
    /// a gradient is wanted it is −ln p(y), y drawn from the model's own prediction p, whose squared slope is on average the
    /// curvature of KL (Fisher's information).
    Own {
        /// Where predictions are looked at.
        of: &'a RowLoss<'a>,
        /// Seed of what is drawn: a row's draws depend on it and on [`Encoded::index`].
        seed: u64,
    },
}

/// What is asked of a model about a batch.
pub(crate) struct Asked {
    pub(crate) input: ModelInput,
    /// `[n]`: rows of a classifier, places in the flattened batch of a language model.
    pub(crate) at: Tensor,
    /// What is to be predicted there, `[n]`; `None` where that is the model's own prediction.
    pub(crate) targets: Option<Tensor>,
    /// The row of each.
    pub(crate) rows: Vec<usize>,
    /// How many each row has.
    pub(crate) counts: Vec<usize>,
    is_classifier: bool,
    /// Chance that picks the model's own answer at each, from 0 to 1, `[n]`.
    chance: Option<Tensor>,
}

impl<'a> RowLoss<'a> {
    /// The name in results.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Label => "label",
            Self::NextToken => "next_token_within_row",
            Self::MaskedTokens { .. } => "masked_tokens",
            Self::Own { .. } => "own_output",
        }
    }

    /// Whether it is held against the model's own predictions.
    pub fn is_own(&self) -> bool {
        matches!(self, Self::Own { .. })
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
            Self::Own { of, .. } => of.check(model, rows, measure),
        }
    }

    /// What is to be predicted where. `None` where no row of the batch has a loss.
    pub(crate) fn ask(&self, model: &Model, mut batch: Batch) -> Result<Option<Asked>> {
        let (labels, draw) = match self {
            Self::Label => (batch.labels.clone(), None),
            Self::NextToken => (next_tokens(&batch), None),
            Self::MaskedTokens { masking, seed } => (hide(&mut batch, masking, *seed)?, None),
            Self::Own { of, seed } => {
                let labels = match of {
                    Self::Label => vec![0; batch.rows],
                    Self::NextToken => next_tokens(&batch),
                    Self::MaskedTokens { masking, seed } => hide(&mut batch, masking, *seed)?,
                    Self::Own { .. } => unreachable!("predictions are not looked at twice"),
                };
                (labels, Some(*seed))
            }
        };
        let is_classifier = matches!(self, Self::Label | Self::Own { of: Self::Label, .. });
        let per_row = if is_classifier { 1 } else { batch.cols };
        let predicted = (0_i64..).zip(labels).filter(|(_, label)| *label != IGNORED);
        let (places, targets): (Vec<i64>, Vec<i64>) = predicted.unzip();
        if places.is_empty() {
            return Ok(None);
        }
        let rows: Vec<usize> = places.iter().map(|&place| place as usize / per_row).collect();
        let mut counts = vec![0; batch.rows];
        rows.iter().for_each(|&row| counts[row] += 1);
        let chance = draw.map(|seed| {
            let mut rng: Vec<ChaCha8Rng> =
                batch.indices.iter().map(|&at| of_row(seed, at)).collect();
            // 53 bits: a number from 0 to 1, 1 left out.
            let draws: Vec<f64> = rows
                .iter()
                .map(|&row| (rng[row].next_u64() >> 11) as f64 / (1_u64 << 53) as f64)
                .collect();
            Tensor::from_slice(&draws).to_device(model.device())
        });
        let on_device = |values: &[i64]| Tensor::from_slice(values).to_device(model.device());
        Ok(Some(Asked {
            input: to_input(&batch, model),
            at: on_device(&places),
            targets: (!self.is_own()).then(|| on_device(&targets)),
            rows,
            counts,
            is_classifier,
            chance,
        }))
    }

    /// Runs a batch with the heads' outputs gated: `[rows]`, in `f32` or `f64`, 0 where a row has none. `None` where no row of it has
    /// a loss.
    pub(crate) fn of_batch(
        &self,
        model: &Model,
        batch: Batch,
        gates: &[Option<Gate>],
    ) -> Result<Option<(Asked, Tensor)>> {
        let Some(asked) = self.ask(model, batch)? else { return Ok(None) };
        let options = ForwardOptions { gates, ..asked.options() };
        let logits = model.forward(&asked.input, &options)?.logits;
        let losses = asked.losses(&logits);
        Ok(Some((asked, losses)))
    }
}

impl Asked {
    /// How to run the model for it.
    pub(crate) fn options(&self) -> ForwardOptions<'_> {
        let logits_at = (!self.is_classifier).then_some(&self.at);
        ForwardOptions { logits_at, ..ForwardOptions::default() }
    }

    /// The logits asked for, `[n, classes]`, of what the model gave.
    pub(crate) fn pick(&self, logits: &Tensor) -> Tensor {
        match self.is_classifier {
            true => logits.index_select(0, &self.at),
            false => logits.shallow_clone(),
        }
    }

    /// The loss of each row, `[rows]`.
    pub(crate) fn losses(&self, logits: &Tensor) -> Tensor {
        let logits = self.pick(logits);
        let wide = if logits.kind() == Kind::Double { Kind::Double } else { Kind::Float };
        let log_p = logits.log_softmax(-1, wide);
        let targets = match &self.targets {
            Some(targets) => targets.shallow_clone(),
            None => self.draw(&log_p),
        };
        let losses = -log_p.gather(1, &targets.unsqueeze(1), false);
        self.by_row(&losses.view([-1]))
    }

    /// Values at the places asked about, `[n]`, as means of rows, `[rows]`.
    pub(crate) fn by_row(&self, values: &Tensor) -> Tensor {
        let rows: Vec<i64> = self.rows.iter().map(|&row| row as i64).collect();
        let counts: Vec<i64> = self.counts.iter().map(|&count| count as i64).collect();
        let on_device = |values: &[i64]| Tensor::from_slice(values).to_device(self.at.device());
        let sums = Tensor::zeros([counts.len() as i64], (values.kind(), values.device()));
        sums.index_add(0, &on_device(&rows), values) / on_device(&counts).clamp_min(1)
    }

    /// An answer of each prediction, by the row's chance.
    fn draw(&self, log_p: &Tensor) -> Tensor {
        let chance = self.chance.as_ref().expect("answers are drawn where there are no targets");
        let up_to = log_p.detach().exp().cumsum(-1, Kind::Double); // [n, classes]
        let last = up_to.size()[1] - 1;
        let total = up_to.narrow(1, last, 1);
        let below = up_to.le_tensor(&(chance.unsqueeze(1) * total));
        below.sum_dim_intlist([1i64].as_slice(), false, Kind::Int64).clamp_max(last)
    }
}

/// Random numbers of a row.
pub(crate) fn of_row(seed: u64, index: usize) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed ^ 0x0064_7261_776e);
    rng.set_stream(index as u64);
    rng
}

/// Hides tokens and returns them, [`IGNORED`] where nothing is hidden.
fn hide(batch: &mut Batch, masking: &Masking, seed: u64) -> Result<Vec<i64>> {
    let masked = mask_tokens(batch, masking, seed, 0)?;
    batch.ids = masked.ids;
    Ok(masked.labels)
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
