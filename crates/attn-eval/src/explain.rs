//! Why a model that is near to another by one figure may not be: tests, each with its value, its bounds and a verdict.

use std::ops::{ControlFlow, Range};

use attn_core::{
    ForwardOptions, Model, Vocabulary,
    generate::{Limits, Sampling, generate},
    laws,
};
use attn_data::batch::{Encoded, Masking};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::{
    divergence::{Divergence, divergence, log_p, rows_at_once},
    error::{Error, Result},
    rows::{Batching, Progress, for_each_batch, to_input},
    text::{Wording, entities_kept},
};

/// How a model and its baseline are made to write.
#[derive(Clone, Copy)]
pub struct Writing<'a> {
    /// Texts to write, from rows that are spread evenly over those long enough.
    pub n_prompts: usize,
    /// Tokens of a row that are the prompt.
    pub prompt_len: usize,
    /// Most new tokens.
    pub max_new_tokens: usize,
    /// Seed of what is drawn.
    pub seed: u64,
    /// Tokens that end a text.
    pub stop_ids: &'a [i64],
    /// Makes text of tokens.
    pub decode: &'a dyn Fn(&[i64]) -> attn_data::Result<String>,
}

/// What came of a test.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The value is within its bounds.
    Passed,
    /// It is not, or it is no number.
    Failed,
    /// The test says nothing of such a model.
    NotRun,
}

/// One test.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Check {
    /// What is tested, in snake case.
    pub test: String,
    /// What was found; absent where it could not be measured.
    pub value: Option<f64>,
    /// The least and the most that pass.
    pub bounds: [f64; 2],
    /// Whether it is within.
    pub verdict: Verdict,
    /// What the value is; of a test that was not run, why.
    pub meaning: String,
}

impl Check {
    fn new(test: &str, value: f64, bounds: [f64; 2], meaning: String) -> Self {
        let verdict = match (bounds[0]..=bounds[1]).contains(&value) {
            true => Verdict::Passed,
            false => Verdict::Failed,
        };
        let value = Some(value).filter(|value| value.is_finite());
        Self { test: test.to_owned(), value, bounds, verdict, meaning }
    }

    fn not_run(test: &str, bounds: [f64; 2], why: &str) -> Self {
        let meaning = why.to_owned();
        Self { test: test.to_owned(), value: None, bounds, verdict: Verdict::NotRun, meaning }
    }
}

/// How tokens were chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Way {
    /// The likeliest each time: where a model repeats itself, it shows here.
    Greedy,
    /// By their probabilities, nothing cut off: what the model holds for text.
    Drawn,
}

/// Texts of both models from the same prompts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Written {
    /// How the tokens were chosen.
    pub way: Way,
    /// KL(baseline ‖ model), in nats per token, on what the model wrote.
    pub kl_free_running: f64,
    /// What the model wrote.
    pub model: Texts,
    /// What the baseline wrote.
    pub baseline: Texts,
    /// The texts side by side.
    pub samples: Vec<Sample>,
}

/// Figures of the texts of one model, prompts left out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Texts {
    /// Repetition and variety; absent where texts are shorter than four tokens.
    pub wording: Option<Wording>,
    /// Perplexity by the baseline.
    pub perplexity_by_baseline: f64,
    /// Share of what a prompt names that the text names again ([`entities_kept`]), mean over the prompts that name
    /// anything; absent where none does.
    pub entities_kept: Option<f64>,
}

/// What both wrote from one prompt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    /// [`Encoded::index`] of the row that it begins.
    pub index: usize,
    /// What stood there.
    pub prompt: String,
    /// What the model wrote.
    pub model: String,
    /// What the baseline wrote.
    pub baseline: String,
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Explanation {
    /// The tests.
    pub checks: Vec<Check>,
    /// KL(baseline ‖ model) in nats per token, the model's predictions at t against the baseline's at t + shift; nothing of
    /// masked language models.
    pub kl_by_shift: Vec<(i64, f64)>,
    /// How far the two are apart on the rows.
    pub divergence: Divergence,
    /// What they wrote; nothing of masked language models.
    pub written: Vec<Written>,
}

/// Shifts that are tried.
const SHIFTS: [i64; 5] = [-2, -1, 0, 1, 2];

/// Below this a KL is no more than rounding, in nats.
const NO_KL: f64 = 1e-6;

const ALONE: [f64; 2] = [0.0, 0.0];
const TWICE: [f64; 2] = [0.0, 2.0];
const ENTROPY: [f64; 2] = [0.7, 1.4];

/// Tests `model` against `baseline` on `rows`, of which those longer than the prompt are written on from.
///
/// - `future_leak`: [`laws::model_causality`] on a row.
/// - `best_shift`: where in −2 … 2 the baseline's predictions are nearest to the model's, 0 unless it was trained on shifted
///   ones.
/// - `free_running_over_teacher_forced`: KL on what the model wrote (drawn) over KL on the rows, at most 2: more, and its
///   errors feed on each other.
/// - `rep_4`: repeated 4-grams of what it wrote (greedy), at most twice those of what the baseline wrote; not run where
///   half of the baseline's or more are, as nothing could fail it.
/// - `entropy_ratio`: entropy of its predictions over the baseline's on the rows, 0.7 to 1.4.
///
/// The bounds are rules of thumb: a test that fails says where to look. Masked language models, of which `masking` says
/// what is hidden, have an entropy alone: they read both sides, predict no neighbours, and write nothing.
///
/// Logits are made and used up a few tokens at a time.
///
/// # Errors
///
/// [`Error::Nothing`] where no row is longer than the prompt, and as [`divergence`] and [`generate`].
pub fn explain(
    model: &Model,
    baseline: &Model,
    rows: &[Encoded],
    masking: Option<(&Masking, u64)>,
    writing: &Writing<'_>,
    batching: &Batching,
    progress: &mut Progress<'_>,
) -> Result<Explanation> {
    let forced = divergence(model, baseline, rows, masking, batching, progress)?;
    let entropy = Check::new(
        "entropy_ratio",
        forced.entropy_nats / forced.baseline_entropy_nats,
        ENTROPY,
        format!(
            "entropy of {:.4} nats, where the baseline has {:.4}",
            forced.entropy_nats, forced.baseline_entropy_nats
        ),
    );
    if masking.is_some() {
        let none = |test, bounds, why| Check::not_run(test, bounds, why);
        const WRITES: &str = "a masked language model writes no text";
        let checks = vec![
            none("future_leak", ALONE, "a masked language model reads both sides"),
            none(
                "best_shift",
                ALONE,
                "a masked language model predicts hidden tokens, and their neighbours are shown to it",
            ),
            none("free_running_over_teacher_forced", TWICE, WRITES),
            none("rep_4", TWICE, WRITES),
            entropy,
        ];
        let (kl_by_shift, written) = (Vec::new(), Vec::new());
        return Ok(Explanation { checks, kl_by_shift, divergence: forced, written });
    }
    let kl_by_shift = self::kl_by_shift(model, baseline, rows, batching)?;
    let nearest = kl_by_shift
        .iter()
        .min_by(|a, b| a.1.total_cmp(&b.1))
        .map_or(f64::NAN, |&(shift, _)| shift as f64);
    let shift = Check::new(
        "best_shift",
        nearest,
        ALONE,
        "places by which the baseline's predictions are nearest to the model's".into(),
    );

    let usable: Vec<&Encoded> =
        rows.iter().filter(|row| row.ids.len() > writing.prompt_len).collect();
    let Some(first) = usable.first() else {
        return Err(Error::Nothing("no row is longer than the prompt"));
    };
    let ids: Vec<i64> = first.ids.iter().map(|&id| id.into()).collect();
    let ids = Tensor::from_slice(&ids).view([1, -1]).to_device(model.device());
    let leak = tch::no_grad(|| laws::model_causality(model, &ids))?;

    let n = usable.len().min(writing.n_prompts);
    let begun: Vec<&Encoded> = (0..n).map(|i| usable[i * usable.len() / n]).collect();
    let work = Work { model, baseline, rows: &begun, writing, batching };
    let (greedy, drawn) = (work.write(Way::Greedy)?, work.write(Way::Drawn)?);

    let (kl, free) = (forced.kl_nats_per_token, drawn.kl_free_running);
    let growth = if kl > NO_KL { free / kl } else { 1.0 };
    let rep_4 = match (&greedy.model.wording, &greedy.baseline.wording) {
        (Some(_), Some(other)) if other.rep_4 >= 0.5 => Check::not_run(
            "rep_4",
            TWICE,
            &format!(
                "no text repeats twice as much as the baseline's, of whose 4-grams {:.4} are repeated",
                other.rep_4
            ),
        ),
        (Some(own), Some(other)) => Check::new(
            "rep_4",
            own.rep_4,
            [0.0, 2.0 * other.rep_4],
            format!("repeated 4-grams of its greedy texts; the baseline's have {:.4}", other.rep_4),
        ),
        _ => Check::not_run("rep_4", TWICE, "no text of four tokens was written"),
    };
    let checks = vec![
        Check::new(
            "future_leak",
            leak.error,
            [0.0, leak.tolerance],
            format!("how far outputs move when a later token changes; {}", leak.place),
        ),
        shift,
        Check::new(
            "free_running_over_teacher_forced",
            growth,
            TWICE,
            format!("KL of {free:.4} nats on text it drew itself, {kl:.4} on the rows"),
        ),
        rep_4,
        entropy,
    ];
    Ok(Explanation { checks, kl_by_shift, divergence: forced, written: vec![greedy, drawn] })
}

/// Two models and the rows that they write on from.
struct Work<'a> {
    model: &'a Model,
    baseline: &'a Model,
    rows: &'a [&'a Encoded],
    writing: &'a Writing<'a>,
    batching: &'a Batching,
}

impl Work<'_> {
    fn write(&self, way: Way) -> Result<Written> {
        let Self { model, baseline, rows, writing, batching } = *self;
        let decode = writing.decode;
        let temperature = match way {
            Way::Greedy => 0.0,
            Way::Drawn => 1.0,
        };
        let sampling = Sampling { temperature, seed: writing.seed, ..Sampling::default() };
        let prompts: Vec<Vec<i64>> = rows
            .iter()
            .map(|row| row.ids[..writing.prompt_len].iter().map(|&id| id.into()).collect())
            .collect();
        let texts = |of: &Model| write(of, &prompts, &sampling, writing, batching);
        let (own, other) = (texts(model)?, texts(baseline)?);
        let judged = |texts: &[Vec<i64>]| {
            let joined = prompts.iter().zip(texts).zip(rows);
            let whole: Vec<Encoded> = joined
                .map(|((prompt, text), row)| Encoded {
                    ids: prompt.iter().chain(text).map(|&id| id as u32).collect(),
                    label: None,
                    index: row.index,
                    second_from: None,
                })
                .collect();
            written(model, baseline, &whole, writing.prompt_len, batching)
        };
        let ((kl_free_running, loss), (_, baseline_loss)) = (judged(&own)?, judged(&other)?);
        let samples = (rows.iter().zip(&prompts))
            .zip(own.iter().zip(&other))
            .map(|((row, prompt), (model, baseline))| {
                Ok(Sample {
                    index: row.index,
                    prompt: decode(prompt)?,
                    model: decode(model)?,
                    baseline: decode(baseline)?,
                })
            })
            .collect::<Result<Vec<Sample>>>()?;
        let figures = |texts: &[Vec<i64>], loss: f64, text: &dyn Fn(&Sample) -> &str| Texts {
            wording: Wording::of(texts),
            perplexity_by_baseline: loss.exp(),
            entities_kept: mean(
                samples.iter().filter_map(|one| entities_kept(&one.prompt, text(one))),
            ),
        };
        Ok(Written {
            way,
            kl_free_running,
            model: figures(&own, loss, &|sample| &sample.model),
            baseline: figures(&other, baseline_loss, &|sample| &sample.baseline),
            samples,
        })
    }
}

/// `None` of nothing.
fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (n, sum) = values.fold((0usize, 0.0), |(n, sum), value| (n + 1, sum + value));
    (n > 0).then(|| sum / n as f64)
}

/// New tokens for each prompt. All prompts are of one length, so that rows share a pass without padding.
fn write(
    model: &Model,
    prompts: &[Vec<i64>],
    sampling: &Sampling,
    writing: &Writing<'_>,
    batching: &Batching,
) -> Result<Vec<Vec<i64>>> {
    let limits =
        Limits { max_new_tokens: writing.max_new_tokens, stop_ids: writing.stop_ids.to_vec() };
    let mut texts = Vec::with_capacity(prompts.len());
    for (batch, prompts) in (0..).zip(prompts.chunks(batching.batch_size.max(1))) {
        let seed = sampling.seed.wrapping_add(batch);
        let sampling = Sampling { seed, ..sampling.clone() };
        let rows =
            generate(model, prompts, &sampling, &limits, &mut |_, _| ControlFlow::Continue(()))?;
        texts.extend(rows.into_iter().map(|row| row.ids));
    }
    Ok(texts)
}

/// What a model makes its predictions of at a run of places of a row: the predictions themselves are as wide as the
/// vocabulary, and made of a few places at a time.
struct Places {
    /// `[n, hidden_size]`.
    features: Tensor,
    vocabulary: Vocabulary,
}

impl Places {
    /// Of the only row of `batch`.
    fn of(model: &Model, batch: &attn_data::batch::Batch, places: Range<i64>) -> Result<Self> {
        let at = Tensor::arange_start(places.start, places.end, (Kind::Int64, Device::Cpu));
        let options = ForwardOptions {
            logits_at: Some(&at),
            before_vocabulary: true,
            ..ForwardOptions::default()
        };
        let features = model.forward(&to_input(batch, model), &options)?.logits;
        let vocabulary = model.vocabulary().expect("it ends in a language-model head");
        Ok(Self { features, vocabulary })
    }

    /// Runs of places that make a chunk.
    fn chunks(&self) -> impl Iterator<Item = Range<i64>> + use<> {
        let (n, step) = (self.features.size()[0], rows_at_once(&self.vocabulary));
        (0..n).step_by(step as usize).map(move |start| start..n.min(start + step))
    }

    /// Log-probabilities, `[places, vocab_size]`.
    fn log_p(&self, places: &Range<i64>) -> Tensor {
        log_p(&self.features.narrow(0, places.start, places.end - places.start), &self.vocabulary)
    }
}

/// A sum of all elements: of each row in the tensor's own kind, of those in f64.
fn total(x: Tensor) -> f64 {
    x.sum_dim_intlist([-1i64].as_slice(), false, None::<Kind>).sum(Kind::Double).double_value(&[])
}

/// Few rows at a time: these figures need all places of a row together.
fn narrow(batching: &Batching) -> Batching {
    Batching { batch_size: 1, ..*batching }
}

/// KL(baseline at t + shift ‖ model at t) by shift, nats per token, the mean over the places of the first 16 rows where both have a
/// prediction. Of a model that is near its baseline, and aligned with it, the least is at shift 0.
///
/// # Errors
///
/// Where a model cannot run on the rows.
pub fn kl_by_shift(
    model: &Model,
    baseline: &Model,
    rows: &[Encoded],
    batching: &Batching,
) -> Result<Vec<(i64, f64)>> {
    let mut sums = SHIFTS.map(|shift| (shift, 0.0, 0.0));
    let mut go_on = |_: usize| ControlFlow::Continue(());
    // The first rows say enough.
    let rows = &rows[..rows.len().min(16)];
    let reach = SHIFTS.iter().map(|shift| shift.abs()).max().unwrap_or(0);
    for_each_batch(model, rows, &narrow(batching), &mut go_on, |_, batch| {
        let n = batch.cols as i64;
        let [own, other] = [model, baseline].map(|of| Places::of(of, &batch, 0..n));
        let (own, other) = (own?, other?);
        for chunk in own.chunks() {
            // The baseline's as far beyond both ends as shifts go.
            let around = (chunk.start - reach).max(0)..n.min(chunk.end + reach);
            let (q, p) = (own.log_p(&chunk), other.log_p(&around)); // [places, vocab]
            let weights = p.exp();
            for (shift, sum, count) in &mut sums {
                // Those whose shifted place is in the row.
                let (from, to) = (chunk.start.max(-*shift), chunk.end.min(n - *shift));
                let len = to - from;
                if len <= 0 {
                    continue;
                }
                let q = q.narrow(0, from - chunk.start, len);
                let at = from + *shift - around.start;
                let [p, weights] = [&p, &weights].map(|of| of.narrow(0, at, len));
                *sum += total(weights * (p - q));
                *count += len as f64;
            }
        }
        Ok(())
    })?;
    Ok(sums.iter().filter(|(.., n)| *n > 0.0).map(|(shift, sum, n)| (*shift, sum / n)).collect())
}

/// KL(baseline ‖ model) and the baseline's loss on the tokens of `rows` after their prompts, nats per token.
fn written(
    model: &Model,
    baseline: &Model,
    rows: &[Encoded],
    prompt_len: usize,
    batching: &Batching,
) -> Result<(f64, f64)> {
    let (mut kl, mut loss, mut n) = (0.0, 0.0, 0.0);
    let mut go_on = |_: usize| ControlFlow::Continue(());
    // The last token is predicted, never read: there may be no position for it.
    let read: Vec<Encoded> = rows
        .iter()
        .map(|row| Encoded { ids: row.ids[..row.ids.len() - 1].to_vec(), ..row.clone() })
        .collect();
    for_each_batch(model, &read, &narrow(batching), &mut go_on, |at, batch| {
        let new: Vec<i64> = rows[at[0]].ids[prompt_len..].iter().map(|&id| i64::from(id)).collect();
        if new.is_empty() {
            return Ok(());
        }
        // The place before each new token predicts it.
        let (from, n_new) = (prompt_len as i64 - 1, new.len() as i64);
        let [own, other] = [model, baseline].map(|of| Places::of(of, &batch, from..from + n_new));
        let (own, other) = (own?, other?);
        let targets = Tensor::from_slice(&new).to_device(model.device()).unsqueeze(1);
        for chunk in own.chunks() {
            let (q, p) = (own.log_p(&chunk), other.log_p(&chunk));
            let targets = targets.narrow(0, chunk.start, chunk.end - chunk.start);
            loss -= total(p.gather(1, &targets, false));
            kl += total(p.exp() * (&p - q));
        }
        n += n_new as f64;
        Ok(())
    })?;
    if n == 0.0 {
        return Err(Error::Nothing("nothing was written"));
    }
    Ok((kl / n, loss / n))
}
