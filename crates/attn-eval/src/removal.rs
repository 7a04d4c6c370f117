//! Models without some of their heads: cut smaller, in the shape they had, and as small as is asked for.

use std::time::Instant;

use attn_core::{ForwardOptions, Model, ModelInput};
use serde::Serialize;
use tch::{Kind, Tensor};

use crate::{
    ablate::Head,
    error::{Error, Result},
    pruning::{Order, Picked, Scope, pick},
    retrieval::{MaskFill, closed},
    stats::{Interval, median},
};

/// Tokens of the random texts that two models are compared on.
const COMPARED_TOKENS: i64 = 32;

/// Most that two models may differ by, relative, and still count as the same: f32 sums in another order.
const SAME: f64 = 1e-4;

/// `whole` without `heads`: their slices of all matrices are gone, a key/value head with its last query head. What is not cut lies in
/// the same memory.
///
/// # Errors
///
/// As [`Model::select_heads`].
pub fn without(whole: &Model, heads: &[Head]) -> Result<Model> {
    let mut model = whole.alias()?;
    for (layer, it) in whole.layers().into_iter().enumerate() {
        let n_heads = it.dims().n_heads;
        let stays = |&place: &i64| !heads.contains(&Head { layer, place: place as usize });
        let kept: Vec<i64> = (0..n_heads).filter(stays).collect();
        if kept.len() < n_heads as usize {
            model.select_heads(layer, &kept)?;
        }
    }
    Ok(model)
}

/// `whole` with the output projections of `cut`, which is without `heads`, and zeros in their columns: the logits of `cut` in the shape
/// of `whole`.
///
/// # Errors
///
/// [`Error::Entangled`] where it computes something else than `cut`, as where heads are made of each other.
pub fn in_full_shape(whole: &Model, cut: &Model, heads: &[Head]) -> Result<Model> {
    let mut full = whole.alias()?;
    full.own(&|_| true);
    tch::no_grad(|| {
        for (layer, (it, of_cut)) in full.layers().into_iter().zip(cut.layers()).enumerate() {
            let d = it.dims().head_dim;
            let kept = (0..it.dims().n_heads)
                .filter(|&place| !heads.contains(&Head { layer, place: place as usize }));
            let columns: Vec<i64> = kept.flat_map(|place| place * d..(place + 1) * d).collect();
            let mut weight = it.out().out_in();
            let _ = weight.zero_();
            let _ = weight.index_copy_(1, &Tensor::from_slice(&columns), &of_cut.out().out_in());
            if let (Some(bias), Some(of_cut)) = (&it.out().bias, &of_cut.out().bias) {
                bias.shallow_clone().copy_(of_cut);
            }
        }
    });
    let input = random_input(whole, [2, COMPARED_TOKENS]);
    let apart = relative_difference(&logits(&full, &input, &[])?, &logits(cut, &input, &[])?);
    match apart <= SAME {
        true => Ok(full),
        false => Err(Error::Entangled { apart }),
    }
}

/// rms(cut − masked)/rms(masked) of what comes out for random tokens: `cut` is without `heads`, and `whole` has them masked.
///
/// # Errors
///
/// What the models refuse.
pub fn against_masked(whole: &Model, cut: &Model, heads: &[Head]) -> Result<f64> {
    let input = random_input(whole, [2, COMPARED_TOKENS]);
    Ok(relative_difference(&logits(cut, &input, &[])?, &logits(whole, &input, heads)?))
}

fn logits(model: &Model, input: &ModelInput, masked: &[Head]) -> Result<Tensor> {
    let gates = closed(model, masked, MaskFill::Zero);
    let options = ForwardOptions { gates: &gates, ..ForwardOptions::default() };
    Ok(tch::no_grad(|| model.forward(input, &options))?.logits.to_kind(Kind::Double))
}

fn relative_difference(x: &Tensor, expected: &Tensor) -> f64 {
    let rms = |x: &Tensor| x.square().mean(Kind::Double).sqrt().double_value(&[]);
    rms(&(x - expected)) / rms(expected)
}

/// `[rows, tokens]` ids that are the same on every machine; fewer tokens where the model has no positions for them.
fn random_input(model: &Model, [rows, tokens]: [i64; 2]) -> ModelInput {
    let sizes = &model.config().sizes;
    let n = tokens.min(sizes.max_positions).max(1);
    let ids: Vec<i64> =
        (0..rows * n).map(|at| (at * 7919 + at * at * 31) % sizes.vocab_size).collect();
    let input =
        || ModelInput::new(Tensor::from_slice(&ids).view([rows, n]).to_device(model.device()));
    match model.needs_source() {
        true => input().attending_to(input()),
        false => input(),
    }
}

/// Values of `model`, shared ones once.
pub fn n_parameters(model: &Model) -> usize {
    model.parameters().iter().map(|(_, tensor)| tensor.numel()).sum()
}

/// Floating point operations of the attention layers of `model` on one text of `n_tokens` tokens, projections included.
pub fn attention_flops(model: &Model, n_tokens: i64) -> i64 {
    model.layers().iter().map(|layer| layer.flops(n_tokens)).sum()
}

/// What of a model is to become less.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Spent {
    /// [`n_parameters`].
    Params,
    /// [`attention_flops`] of a text.
    Flops,
    /// Seconds of a forward pass.
    Latency,
}

impl Spent {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Params, Self::Flops, Self::Latency];

    /// The name in results and on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Params => "params",
            Self::Flops => "flops",
            Self::Latency => "latency",
        }
    }
}

/// What a model without some of its heads has left of what it spent.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Left {
    /// Share; of what is timed the median over turns.
    pub share: f64,
    /// Of what is timed, where the median of such turns lies with 95 % confidence (their order statistics), once there are enough of
    /// them to say so.
    pub interval_95: Option<Interval>,
}

/// How long two models are timed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// Three turns and half a second, at least.
    Short,
    /// Nine turns and four seconds, at least.
    Long,
}

impl Look {
    fn is_over(self, turns: usize, seconds: f64) -> bool {
        let (fewest, least) = match self {
            Self::Short => (3, 0.5),
            Self::Long => (9, 4.0),
        };
        turns >= fewest && seconds >= least
    }
}

/// What `cut` has left of `whole`, on `[rows, tokens]` of input. What is timed is timed in turns of whole, cut, cut, whole: what slows
/// the machine down slows both.
///
/// # Errors
///
/// What the models refuse.
pub fn left(whole: &Model, cut: &Model, spent: Spent, size: [i64; 2], look: Look) -> Result<Left> {
    let exact = |of: &dyn Fn(&Model) -> f64| Left { share: of(cut) / of(whole), interval_95: None };
    Ok(match spent {
        Spent::Params => exact(&|model| n_parameters(model) as f64),
        Spent::Flops => exact(&|model| attention_flops(model, size[1]) as f64),
        Spent::Latency => {
            let input = random_input(whole, size);
            in_turns(look, &mut |is_cut| {
                let model = if is_cut { cut } else { whole };
                let start = Instant::now();
                let logits =
                    tch::no_grad(|| model.forward(&input, &ForwardOptions::default()))?.logits;
                // A device may still be at work: a value of it is there once it is not.
                let _ = logits.view(-1).get(0).double_value(&[]);
                Ok(start.elapsed().as_secs_f64())
            })?
        }
    })
}

/// The median ratio of what `seconds` gives for the cut model (`true`) and for the whole one.
fn in_turns(look: Look, seconds: &mut dyn FnMut(bool) -> Result<f64>) -> Result<Left> {
    // The first pass of a model pays for what later ones find: neither counts.
    seconds(false)?;
    seconds(true)?;
    let mut passed = 0.0;
    let mut ratios = Vec::new();
    while !look.is_over(ratios.len(), passed) {
        let [before, one, two, after] =
            [seconds(false)?, seconds(true)?, seconds(true)?, seconds(false)?];
        passed += before + one + two + after;
        ratios.push((one + two) / (before + after));
    }
    let (share, interval_95) = median(ratios).expect("turns were timed, and times are finite");
    Ok(Left { share, interval_95 })
}

/// What a model is to be cut down to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Target {
    /// Of what.
    pub spent: Spent,
    /// Share that may be left, between 0 and 1.
    pub share: f64,
    /// Rows and tokens of the input that is counted or timed.
    pub size: [i64; 2],
}

/// The fewest heads, in the order of `scores` (layers × heads), without which `whole` has at most the share that `target` allows, with
/// what it then has left; ties, and random heads, are drawn by the seed as [`pick`] does. What is timed is timed again, longer, before it
/// is taken, and more heads go until that holds, too: a few more than were needed, perhaps. What is returned is a third look, which
/// nothing was chosen by and which may miss the target.
///
/// # Errors
///
/// [`Error::Target`] where even without all heads more is left; what the model refuses.
pub fn meet(
    whole: &Model,
    scores: &[Vec<f64>],
    (order, scope, seed): (Order, Scope, u64),
    target: &Target,
) -> Result<(Picked, Left)> {
    let most = match scope {
        Scope::Global => scores.iter().map(Vec::len).sum(),
        Scope::Layer => scores.iter().map(Vec::len).min().unwrap_or(0),
    };
    let picked = |k: usize| pick(scores, k, order, scope, seed);
    let mut look = |k: usize, look: Look| {
        left(whole, &without(whole, &picked(k)?.heads)?, target.spent, target.size, look)
    };
    let k = match fewest(most, target.share, &mut look)? {
        Ok(k) => k,
        Err(left) => {
            let n_heads = picked(most)?.heads.len();
            return Err(Error::Target { n_heads, left, asked: target.share });
        }
    };
    Ok((picked(k)?, look(k, Look::Long)?))
}

/// The lowest number up to `most` at which at most `share` is left; what is left at `most` where that is too much.
fn fewest(
    most: usize,
    share: f64,
    look: &mut dyn FnMut(usize, Look) -> Result<Left>,
) -> Result<std::result::Result<usize, f64>> {
    let at_most = look(most, Look::Long)?.share;
    if at_most > share {
        return Ok(Err(at_most));
    }
    // Each head less costs less: the first that is enough lies between one that is not and one that is.
    let (mut low, mut high) = (0, most);
    while low + 1 < high {
        let middle = low.midpoint(high);
        match look(middle, Look::Short)?.share <= share {
            true => high = middle,
            false => low = middle,
        }
    }
    for k in high..most {
        if look(k, Look::Long)?.share <= share {
            return Ok(Ok(k));
        }
    }
    Ok(Ok(most))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_do_not_see_a_machine_that_slows_down() {
        // Each pass takes a tenth longer than the one before, and the cut model half as long as the whole one.
        let mut slow = 1.0;
        let mut seconds = |is_cut: bool| {
            slow *= 1.1;
            Ok(slow * if is_cut { 0.5 } else { 1.0 })
        };
        let Left { share, interval_95 } = in_turns(Look::Long, &mut seconds).unwrap();
        assert!((share / 0.5 - 1.0).abs() < 0.01, "{share}");
        let Interval { low, high } = interval_95.unwrap();
        assert!(low <= share && share <= high && high - low < 0.01, "{low} {high}");
    }

    #[test]
    fn a_target_that_a_longer_look_denies_takes_more_heads() {
        // Short looks flatter: they see a tenth less than there is.
        let mut seen = |k: usize, look: Look| {
            let share = 1.0 - 0.05 * k as f64;
            let share = if look == Look::Short { share - 0.1 } else { share };
            Ok(Left { share, interval_95: None })
        };
        assert_eq!(fewest(12, 0.62, &mut seen).unwrap(), Ok(8));
        assert!(fewest(12, 0.3, &mut seen).unwrap().is_err_and(|left| (left - 0.4).abs() < 1e-12));
    }
}
