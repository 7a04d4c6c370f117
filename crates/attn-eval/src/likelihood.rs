//! How likely a causal language model holds texts, and what follows: perplexity by the conventions in use, and which of
//! two sentences it prefers.

use attn_core::{ForwardOptions, Gate, Model};
use attn_data::batch::Encoded;
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::{
    divergence::{log_p, rows_at_once},
    error::{Error, Result},
    language::check_decoder,
    rows::{Batching, Progress, for_each_batch, to_input},
    stats::{Interval, wilson},
};

/// Tokens of which the last few are scored, each from all before it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Window {
    /// Token ids, the scored ones last.
    pub ids: Vec<u32>,
    /// How many are scored; fewer than there are.
    pub n_scored: usize,
}

/// Σ ln p of the scored tokens of each window, in nats. Logits are made and used up a few tokens at a time.
///
/// # Errors
///
/// [`Error::Direction`] for an encoder, [`Error::Head`] for a model without a language-model head, [`Error::Nothing`]
/// where there is no window, [`Error::NotFinite`] and [`Error::EmptyRow`] with the number of the window,
/// [`Error::Stopped`], and what the model refuses.
///
/// # Panics
///
/// Where a window scores its first token.
pub fn log_likelihoods(
    model: &Model,
    windows: &[Window],
    batching: &Batching,
    progress: &mut Progress<'_>,
) -> Result<Vec<f64>> {
    gated_log_likelihoods(model, windows, &[], batching, progress)
}

/// [`log_likelihoods`] with the heads' outputs gated.
///
/// # Errors
///
/// As [`log_likelihoods`].
///
/// # Panics
///
/// As [`log_likelihoods`].
pub fn gated_log_likelihoods(
    model: &Model,
    windows: &[Window],
    gates: &[Option<Gate>],
    batching: &Batching,
    progress: &mut Progress<'_>,
) -> Result<Vec<f64>> {
    check_decoder(model.config(), "the likelihood of a text")?;
    // The last token is predicted, never read.
    let read = |(index, window): (usize, &Window)| Encoded {
        ids: window.ids[..window.ids.len().saturating_sub(1)].to_vec(),
        label: None,
        index,
        second_from: None,
    };
    let rows: Vec<Encoded> = windows.iter().enumerate().map(read).collect();
    let mut sums = vec![0.0; windows.len()];
    for_each_batch(model, &rows, batching, progress, |at, batch| {
        let (mut places, mut targets, mut owners) = (Vec::new(), Vec::new(), Vec::new());
        for (row, &at) in at.iter().enumerate() {
            let Window { ids, n_scored } = &windows[at];
            assert!(*n_scored < ids.len(), "window {at} scores its first token");
            for (token, &id) in ids.iter().enumerate().skip(ids.len() - n_scored) {
                places.push((row * batch.cols + token - 1) as i64);
                targets.push(i64::from(id));
                owners.push(at);
            }
        }
        if places.is_empty() {
            return Ok(());
        }
        let at = Tensor::from_slice(&places);
        let options = ForwardOptions {
            logits_at: Some(&at),
            before_vocabulary: true,
            gates,
            ..ForwardOptions::default()
        };
        let features = model.forward(&to_input(&batch, model), &options)?.logits; // [n, hidden]
        let vocabulary = model.vocabulary().expect("it ends in a language-model head");
        let targets = Tensor::from_slice(&targets).to_device(model.device()).unsqueeze(1);
        let n = places.len() as i64;
        let step = rows_at_once(&vocabulary).min(n);
        for start in (0..n).step_by(step as usize) {
            let len = step.min(n - start);
            let log_p = log_p(&features.narrow(0, start, len), &vocabulary);
            let log_p = log_p.gather(1, &targets.narrow(0, start, len), false);
            let log_p: Vec<f64> = Vec::try_from(log_p.to_kind(tch::Kind::Double).view([-1]))
                .expect("one axis of f64");
            for (log_p, &at) in log_p.iter().zip(&owners[start as usize..]) {
                if !log_p.is_finite() {
                    return Err(Error::NotFinite { index: at });
                }
                sums[at] += log_p;
            }
        }
        Ok(())
    })?;
    Ok(sums)
}

/// Which tokens of a text are scored, and from how much before them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Windows {
    /// Windows of the context's length side by side; the first token of each is not scored, and the next ones are scored
    /// from little. Transformers' guide to perplexity with its stride at the context's length.
    Context,
    /// Windows that move by half of the context, of which the tokens are scored that no earlier window did: after the first
    /// window each from at least half a context. The first token of the text is not scored. Transformers' guide,
    /// <https://huggingface.co/docs/transformers/perplexity>.
    HalfContext,
    /// Every token is scored, the first from a token that begins texts; windows side by side, each with the one token before
    /// it. The last window reaches back to be full. lm-evaluation-harness's `loglikelihood_rolling`
    /// (`get_rolling_token_windows` with a context of one token).
    LmEval,
}

impl Windows {
    /// The windows of a text. `begins` is the token that begins texts, which [`Self::LmEval`] alone reads.
    ///
    /// # Panics
    ///
    /// For a context of less than two tokens.
    pub fn of(self, text: &[u32], context: usize, begins: u32) -> Vec<Window> {
        assert!(context >= 2, "a context of {context} tokens");
        match self {
            Self::Context => strided(text, context, context),
            Self::HalfContext => strided(text, context, context / 2),
            Self::LmEval => rolling(text, context, begins),
        }
    }
}

fn strided(text: &[u32], context: usize, stride: usize) -> Vec<Window> {
    let mut windows = Vec::new();
    let mut scored_to = 0;
    for start in (0..text.len()).step_by(stride) {
        let end = text.len().min(start + context);
        let n_scored = (end - scored_to).min(end - start - 1);
        if n_scored > 0 {
            windows.push(Window { ids: text[start..end].to_vec(), n_scored });
        }
        scored_to = end;
        if end == text.len() {
            break;
        }
    }
    windows
}

fn rolling(text: &[u32], context: usize, begins: u32) -> Vec<Window> {
    let whole: Vec<u32> = [&[begins], text].concat();
    let mut windows = Vec::new();
    let mut n_done = 0;
    while n_done < text.len() {
        let n_scored = context.min(text.len() - n_done);
        let end = 1 + n_done + n_scored;
        // One token more than the context: the last is predicted, never read.
        windows
            .push(Window { ids: whole[end.saturating_sub(context + 1)..end].to_vec(), n_scored });
        n_done += n_scored;
    }
    windows
}

/// A text that is scored as one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Words of the text that its perplexity is told by, which may be another than was tokenized.
    pub n_words: usize,
    /// Its bytes.
    pub n_bytes: usize,
}

/// How well a model predicts texts, by one convention. Figures of different conventions are not comparable.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Perplexity {
    /// Which tokens were scored.
    pub windows: Windows,
    /// Tokens of a window.
    pub context: usize,
    /// Tokens of the texts.
    pub n_tokens: usize,
    /// Those that were scored.
    pub n_scored: usize,
    /// Words of the texts.
    pub n_words: usize,
    /// Bytes of the texts.
    pub n_bytes: usize,
    /// Mean of −ln p over the tokens scored.
    pub loss_nats_per_token: f64,
    /// exp(loss).
    pub token_perplexity: f64,
    /// exp(loss · tokens / words): tokens that were not scored get the mean loss of those that were.
    pub word_perplexity: f64,
    /// exp(loss · tokens / bytes).
    pub byte_perplexity: f64,
    /// loss · tokens / bytes / ln 2.
    pub bits_per_byte: f64,
}

/// Scores `documents` by `windows` of `context` tokens; `begins` as in [`Windows::of`].
///
/// # Errors
///
/// As [`log_likelihoods`].
pub fn perplexity(
    model: &Model,
    documents: &[Document],
    windows: Windows,
    context: usize,
    begins: u32,
    batching: &Batching,
    progress: &mut Progress<'_>,
) -> Result<Perplexity> {
    let all: Vec<Window> =
        documents.iter().flat_map(|document| windows.of(&document.ids, context, begins)).collect();
    let log_p: f64 = log_likelihoods(model, &all, batching, progress)?.iter().sum();
    let n_scored: usize = all.iter().map(|window| window.n_scored).sum();
    let total = |of: fn(&Document) -> usize| documents.iter().map(of).sum::<usize>();
    let [n_tokens, n_words, n_bytes] =
        [total(|one| one.ids.len()), total(|one| one.n_words), total(|one| one.n_bytes)];
    let loss = -log_p / n_scored as f64;
    let nats = loss * n_tokens as f64;
    let nats_per_byte = nats / n_bytes as f64;
    Ok(Perplexity {
        windows,
        context,
        n_tokens,
        n_scored,
        n_words,
        n_bytes,
        loss_nats_per_token: loss,
        token_perplexity: loss.exp(),
        word_perplexity: (nats / n_words as f64).exp(),
        byte_perplexity: nats_per_byte.exp(),
        bits_per_byte: nats_per_byte / std::f64::consts::LN_2,
    })
}

/// How often the better of two texts is the likelier one.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Preference {
    /// Share of the pairs of which the better text is likelier, as a sum over its tokens. A tie is none.
    pub accuracy: f64,
    /// Its 95 % interval (Wilson).
    pub interval_95: Interval,
    /// Pairs.
    pub n_pairs: usize,
}

impl Preference {
    /// Of pairs of ln p, the better text's first; `None` where there is none.
    pub fn of(pairs: impl IntoIterator<Item = (f64, f64)>) -> Option<Self> {
        let (n, n_right) = pairs
            .into_iter()
            .fold((0, 0), |(n, right), (good, bad)| (n + 1, right + u64::from(good > bad)));
        let interval_95 = wilson(n_right, n, 0.95).ok()?;
        Some(Self { accuracy: n_right as f64 / n as f64, interval_95, n_pairs: n as usize })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of each token that is scored, how many stand before it in its window.
    fn before(windows: &[Window]) -> Vec<(u32, usize)> {
        let of = |window: &Window| {
            let from = window.ids.len() - window.n_scored;
            (from..window.ids.len()).map(|at| (window.ids[at], at)).collect::<Vec<_>>()
        };
        windows.iter().flat_map(of).collect()
    }

    #[test]
    fn each_convention_scores_what_it_says() {
        let text: Vec<u32> = (0..11).collect();
        let of = |windows: Windows| before(&windows.of(&text, 4, 99));
        assert_eq!(
            of(Windows::Context),
            [(1, 1), (2, 2), (3, 3), (5, 1), (6, 2), (7, 3), (9, 1), (10, 2)]
        );
        assert_eq!(
            of(Windows::HalfContext),
            [(1, 1), (2, 2), (3, 3), (4, 2), (5, 3), (6, 2), (7, 3), (8, 2), (9, 3), (10, 2)]
        );
        // The last window is filled up from before.
        assert_eq!(
            of(Windows::LmEval),
            [
                (0, 1),
                (1, 2),
                (2, 3),
                (3, 4),
                (4, 1),
                (5, 2),
                (6, 3),
                (7, 4),
                (8, 2),
                (9, 3),
                (10, 4)
            ]
        );
        let first = &Windows::LmEval.of(&text, 4, 99)[0];
        assert_eq!(first.ids, [99, 0, 1, 2, 3]);
        assert_eq!(before(&Windows::LmEval.of(&text[..2], 4, 99)), [(0, 1), (1, 2)]);
        assert!(Windows::Context.of(&text[..1], 4, 99).is_empty());
    }

    #[test]
    fn a_tie_is_no_preference() {
        let found = Preference::of([(-1.0, -2.0), (-2.0, -1.0), (-3.0, -3.0), (-1.0, -4.0)]);
        let found = found.expect("there are pairs");
        assert_eq!((found.accuracy, found.n_pairs), (0.5, 4));
        assert_eq!(Preference::of([]), None);
    }
}
