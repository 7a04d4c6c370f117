//! How far a language model is from another: the one that it was made of.

use attn_core::{ForwardOptions, Model, Vocabulary};
use attn_data::batch::{Encoded, IGNORED, Masking, mask_tokens};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::{
    error::{Error, Result},
    language::{Convention, LanguageScore, N_RESAMPLES, Sum, Token, check_decoder, check_masked},
    rows::{Batching, Progress, for_each_batch, to_input},
    stats::{Interval, bootstrap_ratio},
};

/// What a changed model predicts, held against its baseline's predictions of the same tokens from the same text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Divergence {
    /// KL(baseline ‖ model), mean over tokens, in nats.
    pub kl_nats_per_token: f64,
    /// Its 95 % interval: rows drawn again with replacement (bootstrap, percentiles, 1,000 draws of seed 0).
    pub kl_interval_95: Interval,
    /// Sum of KL(baseline ‖ model), in nats, and number of tokens of each row, in their order: to be compared row by row with another
    /// model's. Not in files.
    #[serde(skip)]
    pub kl_by_row: Vec<(f64, f64)>,
    /// KL(model ‖ baseline), mean over tokens, in nats.
    pub reverse_kl_nats_per_token: f64,
    /// Share of the tokens for which both give the largest logit to the same one.
    pub top1_agreement: f64,
    /// Mean entropy of the model's predictions, in nats.
    pub entropy_nats: f64,
    /// Of the baseline's.
    pub baseline_entropy_nats: f64,
    /// The model on the tokens of the text.
    pub model: LanguageScore,
    /// The baseline on them.
    pub baseline: LanguageScore,
    /// By how many tokens of the row stand before the one predicted; of causal models alone.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub by_position: Vec<AtPositions>,
}

/// Tokens with about as much text before them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AtPositions {
    /// Fewest tokens before one of them in its row.
    pub first: usize,
    /// Most.
    pub last: usize,
    /// How many there are.
    pub n_tokens: usize,
    /// KL(baseline ‖ model), in nats per token.
    pub kl_nats_per_token: f64,
    /// −ln p of the model.
    pub loss_nats_per_token: f64,
    /// Of the baseline.
    pub baseline_loss_nats_per_token: f64,
}

/// Bytes that the logits of one chunk of tokens may take.
const CHUNK_BYTES: i64 = 32 << 20;

/// Holds `model` against `baseline` on `rows`: the next token of causal models, by
/// [`Convention::NextTokenWithinRow`]; the tokens that a masking hides by a seed of masked ones.
///
/// Logits are made and used up a few tokens at a time.
///
/// # Errors
///
/// [`Error::Baseline`] for models of other vocabularies or directions, and as
/// [`next_token`](crate::next_token) and [`masked_token`](crate::masked_token).
pub fn divergence(
    model: &Model,
    baseline: &Model,
    rows: &[Encoded],
    masking: Option<(&Masking, u64)>,
    batching: &Batching,
    progress: &mut Progress<'_>,
) -> Result<Divergence> {
    let convention = match masking {
        None => Convention::NextTokenWithinRow,
        Some(_) => Convention::MaskedTokens,
    };
    for of in [model, baseline] {
        match masking {
            None => check_decoder(of.config(), "the divergence of two models")?,
            Some(_) => check_masked(of.config(), "the divergence of two models")?,
        }
    }
    let [own, other] = [model, baseline].map(|of| of.config().sizes.vocab_size);
    if own != other {
        return Err(Error::Baseline { own, other });
    }
    let mut totals = Totals::default();
    for_each_batch(model, rows, batching, progress, |positions, mut batch| {
        let mut places = Vec::new(); // in the flattened batch
        let mut targets = Vec::new();
        match masking {
            None => {
                for cell in 0..batch.ids.len() {
                    let is_last = (cell + 1) % batch.cols == 0;
                    if !is_last && batch.mask[cell + 1] == 1 {
                        places.push(cell as i64);
                        targets.push(batch.ids[cell + 1]);
                    }
                }
            }
            Some((masking, seed)) => {
                let masked = mask_tokens(&batch, masking, seed, 0)?;
                batch.ids = masked.ids;
                for (cell, &label) in masked.labels.iter().enumerate() {
                    if label != IGNORED {
                        places.push(cell as i64);
                        targets.push(label);
                    }
                }
            }
        }
        if places.is_empty() {
            return Ok(());
        }
        let at = Tensor::from_slice(&places);
        let options = ForwardOptions {
            logits_at: Some(&at),
            before_vocabulary: true,
            ..ForwardOptions::default()
        };
        let [own, other] = [model, baseline].map(|of| -> Result<_> {
            let features = of.forward(&to_input(&batch, of), &options)?.logits; // [n, hidden]
            Ok((features, of.vocabulary().expect("it ends in a language-model head")))
        });
        let (own, other) = (own?, other?);
        let targets = Tensor::from_slice(&targets).to_device(model.device());
        let n = places.len() as i64;
        let rows_at_once = rows_at_once(&own.1).min(n);
        let mut start = 0;
        while start < n {
            let len = rows_at_once.min(n - start);
            let of = |(features, vocabulary): &(Tensor, Vocabulary)| {
                log_p(&features.narrow(0, start, len), vocabulary)
            };
            let tokens = Tokens::of(&of(&own), &of(&other), &targets.narrow(0, start, len));
            for token in 0..len as usize {
                let place = places[start as usize + token] as usize;
                let (row, col) = (positions[place / batch.cols], place % batch.cols);
                let of_token = col + usize::from(masking.is_none());
                totals.add(rows[row].index, [col, of_token], &tokens, token)?;
            }
            start += len;
        }
        Ok(())
    })?;
    totals.finish(convention)
}

/// How many tokens make a chunk of logits.
pub(crate) fn rows_at_once(vocabulary: &Vocabulary) -> i64 {
    (CHUNK_BYTES / (4 * vocabulary.weight.size()[0])).max(1)
}

/// Log-probabilities of `features` (`[n, hidden_size]`), in f32 at least: `[n, vocab_size]`.
pub(crate) fn log_p(features: &Tensor, vocabulary: &Vocabulary) -> Tensor {
    let logits = features.linear(&vocabulary.weight, vocabulary.bias.as_ref());
    let wide = if logits.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    logits.log_softmax(-1, wide)
}

/// What is known of each of a few tokens.
struct Tokens {
    kl: Vec<f64>,
    reverse_kl: Vec<f64>,
    /// Of the model and of the baseline.
    loss: [Vec<f64>; 2],
    entropy: [Vec<f64>; 2],
    top: [Vec<i64>; 2],
    target: Vec<i64>,
}

impl Tokens {
    /// `own`, `other`: log-probabilities of the model and of the baseline, `[n, vocab_size]`; `targets`: `[n]`.
    fn of(own: &Tensor, other: &Tensor, targets: &Tensor) -> Self {
        let numbers = |x: Tensor| -> Vec<f64> {
            Vec::try_from(x.to_kind(Kind::Double).view([-1])).expect("a tensor of f64")
        };
        let ids = |x: Tensor| -> Vec<i64> { Vec::try_from(x.view([-1])).expect("a tensor of i64") };
        // In the logits' own kind: a copy of all of them in f64 would cost more than the sums.
        let total = |x: Tensor| numbers(x.sum_dim_intlist([-1i64].as_slice(), false, None::<Kind>));
        let [q, p] = [own.exp(), other.exp()];
        let apart = other - own;
        let loss = [own, other].map(|log| numbers(-log.gather(-1, &targets.unsqueeze(-1), false)));
        Self {
            kl: total(&p * &apart),
            reverse_kl: total(-(&q * &apart)),
            loss,
            entropy: [total(-(&q * own)), total(-(&p * other))],
            top: [own, other].map(|log| ids(log.argmax(-1, false))),
            target: ids(targets.shallow_clone()),
        }
    }
}

#[derive(Default)]
struct Totals {
    /// KL and tokens of each row, by its index.
    rows: std::collections::BTreeMap<usize, (f64, f64)>,
    reverse_kl: f64,
    n_agreed: usize,
    entropy: [f64; 2],
    sums: [Sum; 2],
    /// KL, losses and count by the number of tokens before: 0, 1, 2-3, 4-7, ...
    by_position: Vec<([f64; 3], usize)>,
}

impl Totals {
    /// `col`: where the prediction stands, `place`: the token that is predicted.
    fn add(
        &mut self,
        row: usize,
        [col, place]: [usize; 2],
        tokens: &Tokens,
        token: usize,
    ) -> Result<()> {
        let Tokens { kl, reverse_kl, loss, entropy, top, target } = tokens;
        let all = [kl[token], reverse_kl[token], loss[0][token], loss[1][token]];
        if all.iter().any(|value| !value.is_finite()) {
            return Err(Error::NotFinite { index: row });
        }
        let (sum, count) = self.rows.entry(row).or_default();
        *sum += kl[token];
        *count += 1.0;
        self.reverse_kl += reverse_kl[token];
        self.n_agreed += usize::from(top[0][token] == top[1][token]);
        for of in 0..2 {
            self.entropy[of] += entropy[of][token];
            let is_top = top[of][token] == target[token];
            self.sums[of]
                .add_token(Token { row, place, id: target[token], loss: loss[of][token] }, is_top);
        }
        // Of a causal model, the token at `col` is the last of those that the prediction knows.
        let bucket = (usize::BITS - col.leading_zeros()) as usize;
        if self.by_position.len() <= bucket {
            self.by_position.resize(bucket + 1, ([0.0; 3], 0));
        }
        let (sums, n) = &mut self.by_position[bucket];
        for (sum, value) in sums.iter_mut().zip([kl[token], loss[0][token], loss[1][token]]) {
            *sum += value;
        }
        *n += 1;
        Ok(())
    }

    fn finish(self, convention: Convention) -> Result<Divergence> {
        let Self { rows, reverse_kl, n_agreed, entropy, sums, by_position } = self;
        let [model, baseline] = sums
            .map(|sum| sum.score(convention, "no row has two tokens, or none that can be hidden"));
        let (model, baseline) = (model?, baseline?);
        let n = model.n_tokens as f64;
        let kl_by_row: Vec<(f64, f64)> = rows.into_values().collect();
        let (kl, counts): (Vec<f64>, Vec<f64>) = kl_by_row.iter().copied().unzip();
        let kl_interval_95 = bootstrap_ratio(&kl, &counts, 0.95, N_RESAMPLES, 0)
            .expect("divergences are finite and each row counts some tokens");
        let at = |(bucket, (sums, n_tokens)): (usize, ([f64; 3], usize))| {
            let mean = |at: usize| sums[at] / n_tokens as f64;
            AtPositions {
                first: if bucket == 0 { 1 } else { (1 << (bucket - 1)) + 1 },
                last: 1 << bucket,
                n_tokens,
                kl_nats_per_token: mean(0),
                loss_nats_per_token: mean(1),
                baseline_loss_nats_per_token: mean(2),
            }
        };
        let by_position = match convention {
            Convention::NextTokenWithinRow => {
                by_position.into_iter().enumerate().filter(|(_, (_, n))| *n > 0).map(at).collect()
            }
            Convention::MaskedTokens => Vec::new(),
        };
        Ok(Divergence {
            kl_nats_per_token: kl.iter().sum::<f64>() / n,
            kl_interval_95,
            kl_by_row,
            reverse_kl_nats_per_token: reverse_kl / n,
            top1_agreement: n_agreed as f64 / n,
            entropy_nats: entropy[0] / n,
            baseline_entropy_nats: entropy[1] / n,
            model,
            baseline,
            by_position,
        })
    }
}
