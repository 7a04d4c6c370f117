//! Why a model that is near to another by one figure may not be: tests, each with its value, its bounds and a verdict.

use std::ops::ControlFlow;

use attn_core::{
    ForwardOptions, Model,
    generate::{Limits, Sampling, generate},
    laws,
};
use attn_data::batch::Encoded;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::{
    divergence::divergence,
    error::{Error, Result},
    language::check_decoder,
    rows::{Batching, Progress, for_each_batch, to_input},
    text::Wording,
};

/// How a model and its baseline are made to write.
#[derive(Debug, Clone, PartialEq)]
pub struct Writing {
    /// Tokens of a row that are the prompt.
    pub prompt_len: usize,
    /// Most new tokens.
    pub max_new_tokens: usize,
    /// How they are drawn, by both alike.
    pub sampling: Sampling,
    /// Tokens that end a text.
    pub stop_ids: Vec<i64>,
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
    /// Whether it is within; false where nothing was measured.
    pub passed: bool,
    /// In words.
    pub meaning: String,
}

impl Check {
    fn new(test: &str, value: Option<f64>, bounds: [f64; 2], meaning: String) -> Self {
        let passed = value.is_some_and(|value| (bounds[0]..=bounds[1]).contains(&value));
        Self { test: test.to_owned(), value, bounds, passed, meaning }
    }
}

/// What both wrote from one prompt.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// [`Encoded::index`] of the row that it begins.
    pub index: usize,
    /// Token ids.
    pub prompt: Vec<i64>,
    /// What the model wrote.
    pub model: Vec<i64>,
    /// What the baseline wrote.
    pub baseline: Vec<i64>,
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Explanation {
    /// The tests.
    pub checks: Vec<Check>,
    /// KL(baseline ‖ model) in nats per token, the model's predictions at t against the baseline's at t + shift.
    pub kl_by_shift: Vec<(i64, f64)>,
    /// KL(baseline ‖ model) on the rows.
    pub kl_teacher_forced: f64,
    /// On what the model wrote itself.
    pub kl_free_running: f64,
    /// Perplexity, by the baseline, of what the model wrote, and of what the baseline wrote.
    pub perplexity_by_baseline: [f64; 2],
    /// Of what the model wrote, and of what the baseline wrote; absent where texts are shorter than four tokens.
    pub wording: [Option<Wording>; 2],
    /// The texts.
    pub samples: Vec<Sample>,
}

/// Shifts that are tried.
const SHIFTS: [i64; 5] = [-2, -1, 0, 1, 2];

/// Tests `model` against `baseline` on `rows`, of which those longer than the prompt are written on from.
///
/// - `future_leak`: [`laws::model_causality`] on a row.
/// - `best_shift`: where in −2 … 2 the baseline's predictions are nearest to the model's, 0 unless it was trained on shifted
///   ones.
/// - `free_running_over_teacher_forced`: KL on what the model wrote over KL on the rows, at most 2: more, and its errors
///   feed on each other.
/// - `rep_4_over_baseline`: rep-4 of what it wrote over that of what the baseline wrote, at most 2.
/// - `entropy_ratio`: entropy of its predictions over the baseline's on the rows, 0.7 to 1.4.
///
/// The bounds are rules of thumb: a test that fails says where to look.
///
/// # Errors
///
/// [`Error::Nothing`] where no row is longer than the prompt, and as [`divergence`] and [`generate`].
pub fn explain(
    model: &Model,
    baseline: &Model,
    rows: &[Encoded],
    writing: &Writing,
    batching: &Batching,
    progress: &mut Progress<'_>,
) -> Result<Explanation> {
    check_decoder(model.config(), "explaining what a model writes")?;
    let forced = divergence(model, baseline, rows, None, batching, progress)?;
    let usable: Vec<&Encoded> =
        rows.iter().filter(|row| row.ids.len() > writing.prompt_len).collect();
    let Some(first) = usable.first() else {
        return Err(Error::Nothing("no row is longer than the prompt"));
    };
    let ids: Vec<i64> = first.ids.iter().take(48).map(|&id| id.into()).collect();
    let ids = Tensor::from_slice(&ids).view([1, -1]).to_device(model.device());
    let leak = tch::no_grad(|| laws::model_causality(model, &ids))?;

    let kl_by_shift = by_shift(model, baseline, rows, batching)?;
    let nearest =
        kl_by_shift.iter().min_by(|a, b| a.1.total_cmp(&b.1)).map(|&(shift, _)| shift as f64);

    let prompts: Vec<Vec<i64>> = usable
        .iter()
        .map(|row| row.ids[..writing.prompt_len].iter().map(|&id| id.into()).collect())
        .collect();
    let texts = |of: &Model| write(of, &prompts, writing, batching);
    let (own, other) = (texts(model)?, texts(baseline)?);
    let whole = |texts: &[Vec<i64>]| -> Vec<Encoded> {
        let joined = prompts.iter().zip(texts).zip(&usable);
        joined
            .map(|((prompt, text), row)| Encoded {
                ids: prompt.iter().chain(text).map(|&id| id as u32).collect(),
                label: None,
                index: row.index,
                second_from: None,
            })
            .collect()
    };
    let of_new =
        |texts: &[Vec<i64>]| written(model, baseline, &whole(texts), writing.prompt_len, batching);
    let ((free, loss), (_, baseline_loss)) = (of_new(&own)?, of_new(&other)?);
    let wording = [Wording::of(&own), Wording::of(&other)];
    let rep_4 = match &wording {
        [Some(own), Some(other)] if other.rep_4 > 0.0 => Some(own.rep_4 / other.rep_4),
        [Some(own), Some(_)] if own.rep_4 == 0.0 => Some(1.0),
        [Some(_), Some(_)] => Some(f64::INFINITY),
        _ => None,
    };
    let kl = forced.kl_nats_per_token;
    // Of two models that are the same, neither figure is more than rounding.
    let growth = if kl > 1e-6 { free / kl } else { 1.0 };
    let checks = vec![
        Check::new(
            "future_leak",
            Some(leak.error).filter(|error| error.is_finite()),
            [0.0, leak.tolerance],
            format!("how far outputs move when a later token changes; {}", leak.place),
        ),
        Check::new(
            "best_shift",
            nearest,
            [0.0, 0.0],
            "places by which the baseline's predictions are nearest to the model's".into(),
        ),
        Check::new(
            "free_running_over_teacher_forced",
            Some(growth),
            [0.0, 2.0],
            format!("KL of {free:.4} nats on its own text, {kl:.4} on the rows"),
        ),
        Check::new(
            "rep_4_over_baseline",
            rep_4.filter(|ratio| ratio.is_finite()),
            [0.0, 2.0],
            "repeated 4-grams of its texts, over those of the baseline's texts".into(),
        ),
        Check::new(
            "entropy_ratio",
            Some(forced.entropy_nats / forced.baseline_entropy_nats),
            [0.7, 1.4],
            format!(
                "entropy of {:.4} nats, where the baseline has {:.4}",
                forced.entropy_nats, forced.baseline_entropy_nats
            ),
        ),
    ];
    let samples = usable
        .iter()
        .zip(prompts)
        .zip(own.into_iter().zip(other))
        .map(|((row, prompt), (model, baseline))| Sample {
            index: row.index,
            prompt,
            model,
            baseline,
        })
        .collect();
    Ok(Explanation {
        checks,
        kl_by_shift,
        kl_teacher_forced: kl,
        kl_free_running: free,
        perplexity_by_baseline: [loss.exp(), baseline_loss.exp()],
        wording,
        samples,
    })
}

/// New tokens for each prompt. All prompts are of one length, so that rows share a pass without padding.
fn write(
    model: &Model,
    prompts: &[Vec<i64>],
    writing: &Writing,
    batching: &Batching,
) -> Result<Vec<Vec<i64>>> {
    let limits =
        Limits { max_new_tokens: writing.max_new_tokens, stop_ids: writing.stop_ids.clone() };
    let mut texts = Vec::with_capacity(prompts.len());
    for (batch, prompts) in (0..).zip(prompts.chunks(batching.batch_size.max(1))) {
        let seed = writing.sampling.seed.wrapping_add(batch);
        let sampling = Sampling { seed, ..writing.sampling.clone() };
        let rows =
            generate(model, prompts, &sampling, &limits, &mut |_, _| ControlFlow::Continue(()))?;
        texts.extend(rows.into_iter().map(|row| row.ids));
    }
    Ok(texts)
}

/// Log-probabilities of both models at every place of a batch, `[rows, cols, vocab_size]`.
fn log_p(model: &Model, batch: &attn_data::batch::Batch) -> Result<Tensor> {
    let logits = model.forward(&to_input(batch, model), &ForwardOptions::default())?.logits;
    let wide = if logits.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    Ok(logits.log_softmax(-1, wide))
}

/// Few rows at a time: these figures need all places of a row together.
fn narrow(batching: &Batching) -> Batching {
    Batching { batch_size: 1, ..*batching }
}

/// KL(baseline ‖ model), mean over the places where both have a prediction.
fn by_shift(
    model: &Model,
    baseline: &Model,
    rows: &[Encoded],
    batching: &Batching,
) -> Result<Vec<(i64, f64)>> {
    let mut sums = SHIFTS.map(|shift| (shift, 0.0, 0.0));
    let mut go_on = |_: usize| ControlFlow::Continue(());
    // The first rows say enough.
    let rows = &rows[..rows.len().min(16)];
    for_each_batch(model, rows, &narrow(batching), &mut go_on, |_, batch| {
        let [q, p] = [model, baseline].map(|of| log_p(of, &batch));
        let (q, p) = (q?.get(0), p?.get(0)); // [cols, vocab]
        let n = batch.cols as i64;
        for (shift, sum, count) in &mut sums {
            let len = n - shift.abs();
            if len <= 0 {
                continue;
            }
            let q = q.narrow(0, (-*shift).max(0), len);
            let p = p.narrow(0, (*shift).max(0), len);
            *sum += (p.exp() * (p - q)).sum(Kind::Double).double_value(&[]);
            *count += len as f64;
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
    for_each_batch(model, rows, &narrow(batching), &mut go_on, |_, batch| {
        let n_new = (batch.cols - prompt_len) as i64;
        if n_new == 0 {
            return Ok(());
        }
        // The place before each new token predicts it.
        let at = prompt_len as i64 - 1;
        let [q, p] = [model, baseline].map(|of| log_p(of, &batch));
        let (q, p) = (q?.get(0).narrow(0, at, n_new), p?.get(0).narrow(0, at, n_new));
        let targets = Tensor::from_slice(&batch.ids[prompt_len..]).to_device(p.device());
        kl += (p.exp() * (&p - q)).sum(Kind::Double).double_value(&[]);
        loss -= p.gather(1, &targets.unsqueeze(1), false).sum(Kind::Double).double_value(&[]);
        n += n_new as f64;
        Ok(())
    })?;
    if n == 0.0 {
        return Err(Error::Nothing("nothing was written"));
    }
    Ok((kl / n, loss / n))
}
