//! Language models: how well they predict tokens.

use std::collections::HashSet;

use attn_core::{ForwardOptions, Model, config::Head};
use attn_data::batch::{Encoded, IGNORED, Masking, mask_tokens};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::{
    error::{Error, Result},
    rows::{Batching, Progress, for_each_batch, to_input},
};

/// Which tokens a [`LanguageScore`] counts. Scores of different conventions are not comparable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Convention {
    /// Each token of a row but the first, from those before it in the row. Rows do not overlap and know nothing of
    /// each other, so that the first tokens of a row are predicted from little: shorter rows score worse.
    NextTokenWithinRow,
    /// A seeded choice of the tokens that are not special, from all others of the row. Not a perplexity of the text:
    /// the model sees both sides.
    MaskedTokens,
}

/// How well a language model predicts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LanguageScore {
    /// What was counted.
    pub convention: Convention,
    /// Mean of −ln p(token).
    pub loss_nats_per_token: f64,
    /// `exp(loss_nats_per_token)`.
    pub perplexity: f64,
    /// Share of the tokens that got the largest logit.
    pub top1_accuracy: f64,
    /// Tokens that were predicted.
    pub n_tokens: usize,
    /// Rows they stand in.
    pub n_rows: usize,
}

/// Scores a causal language model on the next tokens of `rows`, by [`Convention::NextTokenWithinRow`].
///
/// A row of one token predicts nothing. The logits of a batch take 4 · positions · `vocab_size` bytes in `f32`, twice:
/// [`Batching::max_tokens`] bounds them.
///
/// # Errors
///
/// [`Error::Direction`] for an encoder, [`Error::Head`] for a model without a language-model head, [`Error::Nothing`]
/// where no row has two tokens, [`Error::EmptyRow`], [`Error::NotFinite`], [`Error::Stopped`], and what the model
/// refuses.
pub fn next_token(
    model: &Model,
    rows: &[Encoded],
    batching: &Batching,
    progress: &mut Progress<'_>,
) -> Result<LanguageScore> {
    if !model.config().is_causal() {
        return Err(Error::Direction {
            model_type: model.config().base_model_type(),
            what: "the next token: it is an encoder",
            hint: "score it on masked tokens",
        });
    }
    check_head(model, "perplexity")?;
    let mut sum = Sum::default();
    for_each_batch(model, rows, batching, progress, |positions, batch| {
        let input = to_input(&batch, model.device());
        let logits = model.forward(&input, &ForwardOptions::default())?.logits;
        for (row, &at) in (0..).zip(positions) {
            let Encoded { index, ref ids, .. } = rows[at];
            let n_predicted = ids.len() as i64 - 1;
            if n_predicted == 0 {
                continue;
            }
            let targets = input.input_ids.get(row).narrow(0, 1, n_predicted);
            sum.add(&logits.get(row).narrow(0, 0, n_predicted), &targets, |_| index)?;
            sum.n_rows += 1;
        }
        Ok(())
    })?;
    sum.score(Convention::NextTokenWithinRow, "no row has two tokens")
}

/// Scores a masked language model on tokens that `masking` hides by `seed`, by [`Convention::MaskedTokens`].
///
/// Which tokens of a row are hidden depends on the seed and on [`Encoded::index`], not on the batch.
///
/// # Errors
///
/// [`Error::Direction`] for a decoder, [`Error::Head`] for a model without a language-model head, [`Error::Nothing`]
/// where rows hold special tokens alone, [`Error::EmptyRow`], [`Error::NotFinite`], [`Error::Stopped`], and what
/// [`mask_tokens`] and the model refuse.
pub fn masked_token(
    model: &Model,
    rows: &[Encoded],
    masking: &Masking,
    seed: u64,
    batching: &Batching,
    progress: &mut Progress<'_>,
) -> Result<LanguageScore> {
    if model.config().is_causal() {
        return Err(Error::Direction {
            model_type: model.config().base_model_type(),
            what: "masked tokens: it is a decoder",
            hint: "score it on the next token",
        });
    }
    check_head(model, "the masked-token loss")?;
    let mut sum = Sum::default();
    for_each_batch(model, rows, batching, progress, |positions, mut batch| {
        let masked = mask_tokens(&batch, masking, seed, 0)?;
        batch.ids = masked.ids;
        let (mut places, mut targets) = (Vec::new(), Vec::new());
        for (place, &label) in (0..).zip(&masked.labels) {
            if label != IGNORED {
                places.push(place);
                targets.push(label);
            }
        }
        if places.is_empty() {
            return Ok(());
        }
        let [at, targets] =
            [&places, &targets].map(|values| Tensor::from_slice(values).to_device(model.device()));
        let options = ForwardOptions { logits_at: Some(&at), ..ForwardOptions::default() };
        let logits = model.forward(&to_input(&batch, model.device()), &options)?.logits;
        let row = |target: usize| places[target] as usize / batch.cols;
        sum.n_rows += (0..places.len()).map(row).collect::<HashSet<_>>().len();
        sum.add(&logits, &targets, |target| rows[positions[row(target)]].index)
    })?;
    sum.score(Convention::MaskedTokens, "the rows hold special tokens alone")
}

fn check_head(model: &Model, measure: &'static str) -> Result<()> {
    match model.config().head {
        Head::LanguageModel => Ok(()),
        found => Err(Error::Head {
            measure,
            found,
            expected: "a language-model head",
            hint: "name a folder with a language model, or a task with labels",
        }),
    }
}

/// Sums in `f64`, whatever the model runs in.
#[derive(Debug, Default)]
struct Sum {
    loss: f64,
    n_correct: usize,
    n_tokens: usize,
    n_rows: usize,
}

impl Sum {
    /// `logits`: `[n, vocab_size]`, `targets`: `[n]`; `row` numbers the row of a target, for messages.
    fn add(
        &mut self,
        logits: &Tensor,
        targets: &Tensor,
        row: impl Fn(usize) -> usize,
    ) -> Result<()> {
        let wide = match logits.kind() {
            Kind::Double => Kind::Double,
            _ => Kind::Float,
        };
        let log_p = logits.log_softmax(-1, wide);
        let of_target = log_p.gather(1, &targets.unsqueeze(1), false).to_kind(Kind::Double);
        let loss = -of_target.sum(Kind::Double).double_value(&[]);
        if !loss.is_finite() {
            let is_finite = of_target.view([-1]).isfinite().to_kind(Kind::Int64);
            let target = is_finite.argmin(0, false).int64_value(&[]) as usize;
            return Err(Error::NotFinite { index: row(target) });
        }
        let n_correct = log_p.argmax(-1, false).eq_tensor(targets).sum(Kind::Int64);
        self.loss += loss;
        self.n_correct += n_correct.int64_value(&[]) as usize;
        self.n_tokens += targets.size()[0] as usize;
        Ok(())
    }

    fn score(self, convention: Convention, nothing: &'static str) -> Result<LanguageScore> {
        let Self { loss, n_correct, n_tokens, n_rows } = self;
        if n_tokens == 0 {
            return Err(Error::Nothing(nothing));
        }
        let loss_nats_per_token = loss / n_tokens as f64;
        Ok(LanguageScore {
            convention,
            loss_nats_per_token,
            perplexity: loss_nats_per_token.exp(),
            top1_accuracy: n_correct as f64 / n_tokens as f64,
            n_tokens,
            n_rows,
        })
    }
}
