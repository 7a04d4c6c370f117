//! Language models: how well they predict tokens.

use std::collections::BTreeMap;

use attn_core::{Config, ForwardOptions, Model, config::Head};
use attn_data::batch::{Encoded, IGNORED, Masking, mask_tokens};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tch::{Kind, Tensor};

use crate::{
    error::{Error, Result},
    rows::{Batching, Progress, for_each_batch, to_input},
    stats::{Interval, StatsError, bootstrap_ratio},
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
    /// Its 95 % interval: rows drawn again with replacement (bootstrap, percentiles, 1,000 draws of seed 0). `None`
    /// of a single row, which says nothing of others, and in scores that an earlier version wrote.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_interval_95: Option<Interval>,
    /// `exp(loss_nats_per_token)`.
    pub perplexity: f64,
    /// Share of the tokens that got the largest logit.
    pub top1_accuracy: f64,
    /// Tokens that were predicted.
    pub n_tokens: usize,
    /// Rows they stand in.
    pub n_rows: usize,
    /// Each of these rows, in order.
    #[serde(skip)]
    pub by_row: Vec<RowScore>,
}

/// What a row adds to a [`LanguageScore`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RowScore {
    /// Its place in the text ([`Encoded::index`]).
    pub row: usize,
    /// Σ −ln p(token).
    pub nats: f64,
    /// Tokens that were predicted.
    pub n_tokens: usize,
    /// Which tokens they are, and where in the row: the first 16 hexadecimal digits of the SHA-256 of place and id of each.
    /// Empty in scores that an earlier version wrote.
    #[serde(default)]
    pub tokens: String,
}

/// The 95 % interval of what the loss per token of one model is above that of another over the same rows, drawn again together
/// `n_resamples` times.
///
/// # Errors
///
/// [`StatsError::Unpaired`] where there are other rows or tokens on one side, or nothing says which tokens they are; if there
/// are no rows or resamples.
pub fn loss_difference(
    first: &[RowScore],
    second: &[RowScore],
    n_resamples: usize,
    seed: u64,
) -> Result<Interval, StatsError> {
    let is_same = |(a, b): (&RowScore, &RowScore)| {
        let is_known = !a.tokens.is_empty();
        is_known && (a.row, a.n_tokens, &a.tokens) == (b.row, b.n_tokens, &b.tokens)
    };
    if first.len() != second.len() || !first.iter().zip(second).all(is_same) {
        return Err(StatsError::Unpaired { n_first: first.len(), n_second: second.len() });
    }
    let apart: Vec<f64> = first.iter().zip(second).map(|(a, b)| a.nats - b.nats).collect();
    let counts: Vec<f64> = first.iter().map(|row| row.n_tokens as f64).collect();
    bootstrap_ratio(&apart, &counts, 0.95, n_resamples, seed)
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
    check_decoder(model.config(), "perplexity")?;
    let mut sum = Sum::default();
    for_each_batch(model, rows, batching, progress, |positions, batch| {
        let input = to_input(&batch, model);
        let logits = model.forward(&input, &ForwardOptions::default())?.logits;
        for (row, &at) in (0..).zip(positions) {
            let Encoded { index, ref ids, .. } = rows[at];
            let n_predicted = ids.len() as i64 - 1;
            if n_predicted == 0 {
                continue;
            }
            let targets = input.input_ids.get(row).narrow(0, 1, n_predicted);
            let of_row = logits.get(row).narrow(0, 0, n_predicted);
            sum.add(&of_row, &targets, |target| (index, target + 1))?;
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
    check_masked(model.config(), "the masked-token loss")?;
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
        let logits = model.forward(&to_input(&batch, model), &options)?.logits;
        sum.add(&logits, &targets, |target| {
            let cell = places[target] as usize;
            (rows[positions[cell / batch.cols]].index, cell % batch.cols)
        })
    })?;
    sum.score(Convention::MaskedTokens, "the rows hold special tokens alone")
}

/// Refuses a model that does not predict the next token, which `measure` is about.
///
/// # Errors
///
/// [`Error::Direction`] for an encoder, [`Error::Head`] without a language-model head.
pub fn check_decoder(config: &Config, measure: &'static str) -> Result<()> {
    if !config.is_causal() {
        return Err(Error::Direction {
            model_type: config.base_model_type(),
            what: "the next token: it is an encoder",
            hint: "score it on masked tokens",
        });
    }
    check_head(config, measure)
}

/// Refuses a model that does not predict masked tokens, which `measure` is about.
pub(crate) fn check_masked(config: &Config, measure: &'static str) -> Result<()> {
    if config.is_causal() {
        return Err(Error::Direction {
            model_type: config.base_model_type(),
            what: "masked tokens: it is a decoder",
            hint: "score it on the next token",
        });
    }
    check_head(config, measure)
}

fn check_head(config: &Config, measure: &'static str) -> Result<()> {
    match config.head {
        Head::LanguageModel => Ok(()),
        found => Err(Error::Head {
            measure,
            found,
            expected: "a language-model head",
            hint: "name a folder with a language model, or a task with labels",
        }),
    }
}

/// Draws of the interval of a loss.
pub(crate) const N_RESAMPLES: usize = 1000;

/// Sums in `f64`, whatever the model runs in.
#[derive(Debug, Default)]
pub(crate) struct Sum {
    /// Those that predict anything.
    rows: BTreeMap<usize, OfRow>,
    n_correct: usize,
}

/// What is known of a row so far.
#[derive(Debug, Default)]
struct OfRow {
    nats: f64,
    n_tokens: usize,
    tokens: Sha256,
}

/// A token that was predicted.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Token {
    /// Number of its row, and its place in it.
    pub(crate) row: usize,
    pub(crate) place: usize,
    pub(crate) id: i64,
    pub(crate) loss: f64,
}

impl Sum {
    /// `logits`: `[n, vocab_size]`, `targets`: `[n]`; `at` gives the number of a target's row, and its place there.
    fn add(
        &mut self,
        logits: &Tensor,
        targets: &Tensor,
        at: impl Fn(usize) -> (usize, usize),
    ) -> Result<()> {
        let wide = match logits.kind() {
            Kind::Double => Kind::Double,
            _ => Kind::Float,
        };
        let log_p = logits.log_softmax(-1, wide);
        let of_target = log_p.gather(1, &targets.unsqueeze(1), false).to_kind(Kind::Double);
        let losses: Vec<f64> =
            Vec::try_from(-of_target.view([-1])).expect("a CPU or GPU tensor of f64");
        if let Some(target) = losses.iter().position(|loss| !loss.is_finite()) {
            return Err(Error::NotFinite { index: at(target).0 });
        }
        let n_correct = log_p.argmax(-1, false).eq_tensor(targets).sum(Kind::Int64);
        self.n_correct += n_correct.int64_value(&[]) as usize;
        let ids: Vec<i64> = Vec::try_from(targets).expect("a tensor of i64");
        for (target, (loss, id)) in losses.into_iter().zip(ids).enumerate() {
            let (row, place) = at(target);
            self.add_loss(Token { row, place, id, loss });
        }
        Ok(())
    }

    fn add_loss(&mut self, token: Token) {
        let row = self.rows.entry(token.row).or_default();
        row.nats += token.loss;
        row.n_tokens += 1;
        row.tokens.update((token.place as u64).to_le_bytes());
        row.tokens.update(token.id.to_le_bytes());
    }

    /// Adds a token of which the loss is known, and whether it got the largest logit.
    pub(crate) fn add_token(&mut self, token: Token, is_top: bool) {
        self.add_loss(token);
        self.n_correct += usize::from(is_top);
    }

    pub(crate) fn score(
        self,
        convention: Convention,
        nothing: &'static str,
    ) -> Result<LanguageScore> {
        let Self { rows, n_correct } = self;
        if rows.is_empty() {
            return Err(Error::Nothing(nothing));
        }
        let by_row: Vec<RowScore> = rows.into_iter().map(|(row, of)| of.score(row)).collect();
        let (losses, counts): (Vec<f64>, Vec<f64>) =
            by_row.iter().map(|row| (row.nats, row.n_tokens as f64)).unzip();
        let n_tokens = by_row.iter().map(|row| row.n_tokens).sum();
        let loss_nats_per_token = losses.iter().sum::<f64>() / n_tokens as f64;
        let interval = || {
            bootstrap_ratio(&losses, &counts, 0.95, N_RESAMPLES, 0)
                .expect("losses are finite and each row counts some tokens")
        };
        Ok(LanguageScore {
            convention,
            loss_nats_per_token,
            loss_interval_95: (by_row.len() > 1).then(interval),
            perplexity: loss_nats_per_token.exp(),
            top1_accuracy: n_correct as f64 / n_tokens as f64,
            n_tokens,
            n_rows: by_row.len(),
            by_row,
        })
    }
}

impl OfRow {
    fn score(self, row: usize) -> RowScore {
        let digest = self.tokens.finalize();
        RowScore {
            row,
            nats: self.nats,
            n_tokens: self.n_tokens,
            tokens: digest[..8].iter().map(|byte| format!("{byte:02x}")).collect(),
        }
    }
}
