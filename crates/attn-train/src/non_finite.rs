//! Finds where numbers stopped being numbers.

use attn_core::{ForwardOptions, Model, attention::Stream};
use attn_torch::{GradOptions, grad};
use tch::{Kind, Tensor};

use crate::{
    batch::Batch,
    environment::RngState,
    error::{Error, Place, Result},
    objective::Objective,
    optimizer::Optimizer,
    prefetch::StepBatches,
};

const BROKEN_WEIGHTS: &str = "the weights were broken before this step: begin with others, or resume an earlier checkpoint \
                              with a lower `lr`";
const DIVERGED: &str =
    "lower `lr`, lengthen the warm-up, or set `clip_norm`; these examples may also be at fault";

/// The first parameter with a value that is not finite.
pub(crate) fn broken_parameter(model: &Model) -> Option<String> {
    let _no_grad = tch::no_grad_guard();
    let broken = |(name, tensor): (String, Tensor)| {
        Some(format!("parameter `{name}` ({})", not_finite(&tensor)?))
    };
    model.parameters().into_iter().find_map(broken)
}

/// The error for weights that are broken at `step`, if they are.
pub(crate) fn check_parameters(model: &Model, step: u64) -> Result<()> {
    match broken_parameter(model) {
        None => Ok(()),
        Some(tensor) => {
            let place = Place { step, epoch: 0, batch: None, examples: Vec::new() };
            Err(Error::NonFinite { place, tensor, hint: BROKEN_WEIGHTS })
        }
    }
}

/// Repeats a step whose loss or gradient was not finite, batch by batch, and says where it began. The parameters are
/// still those that the step began with, `rng` is where the random streams stood then.
pub(crate) fn find(
    model: &Model,
    objective: &dyn Objective,
    optimizer: &Optimizer,
    step: &StepBatches,
    streams: &[Stream],
    rng: &RngState,
    step_number: u64,
) -> Result<Error> {
    let place = |batch: Option<usize>| Place {
        step: step_number,
        epoch: step.at.epoch,
        batch: batch.map(|batch| step.at.batch + batch),
        examples: batch.map_or_else(Vec::new, |batch| step.batches[batch].rows.indices.clone()),
    };
    if let Some(tensor) = broken_parameter(model) {
        return Ok(Error::NonFinite { place: place(Some(0)), tensor, hint: BROKEN_WEIGHTS });
    }
    rng.restore()?;
    for (index, (batch, &stream)) in step.batches.iter().zip(streams).enumerate() {
        if objective.n_targets(batch) == 0 {
            continue;
        }
        if let Some(tensor) = broken_in_batch(model, objective, optimizer, batch, stream)? {
            return Ok(Error::NonFinite { place: place(Some(index)), tensor, hint: DIVERGED });
        }
    }
    let tensor = "the norm of the whole gradient (each batch's is finite by itself)".to_owned();
    Ok(Error::NonFinite { place: place(None), tensor, hint: DIVERGED })
}

/// Looks at what a batch computes in the order in which it is computed.
fn broken_in_batch(
    model: &Model,
    objective: &dyn Objective,
    optimizer: &Optimizer,
    batch: &Batch,
    stream: Stream,
) -> Result<Option<String>> {
    let before = RngState::now(model.device())?;
    {
        let _no_grad = tch::no_grad_guard();
        let options = ForwardOptions {
            train: true,
            hidden_states: true,
            stream,
            ..ForwardOptions::default()
        };
        let output = model.forward(&batch.input(model), &options)?;
        let last = output.hidden_states.len() - 1;
        for (layer, hidden) in output.hidden_states.iter().enumerate() {
            if let Some(found) = not_finite(hidden) {
                let from = match layer {
                    0 => "what the embedding gives".to_owned(),
                    // The last state is taken after the final norm, where there is one.
                    _ if layer == last => {
                        format!("what layer {} and the final norm give", layer - 1)
                    }
                    _ => format!("what layer {} gives", layer - 1),
                };
                return Ok(Some(format!("activation `hidden_states.{layer}`, {from} ({found})")));
            }
        }
        if let Some(found) = not_finite(&output.logits) {
            return Ok(Some(format!("activation `logits` ({found})")));
        }
    }
    before.restore()?;
    let loss = objective.loss(model, batch, stream)?;
    if let Some(found) = not_finite(&loss) {
        return Ok(Some(format!("the loss ({found})")));
    }
    let grads = grad(&[loss], &[] as &[Tensor], optimizer.params(), GradOptions::default())?;
    // The backward pass runs from the head to the embedding.
    let named = optimizer.names().iter().zip(&grads).rev();
    Ok(named
        .filter_map(|(name, grad)| Some((name, grad.as_ref()?)))
        .find_map(|(name, grad)| Some(format!("gradient of `{name}` ({})", not_finite(grad)?))))
}

/// How many values of `tensor` are not finite, and of which sort; `None` where all are.
fn not_finite(tensor: &Tensor) -> Option<String> {
    if tensor.numel() == 0 {
        return None;
    }
    // One pass over weights that are all right: NaN is the least and the largest of whatever it stands among.
    let (low, high) = tensor.aminmax(None, false);
    if low.double_value(&[]).is_finite() && high.double_value(&[]).is_finite() {
        return None;
    }
    let count = |mask: Tensor| mask.sum(Kind::Int64).int64_value(&[]);
    let n_nan = count(tensor.isnan());
    let n_inf = count(tensor.isinf());
    let n = tensor.numel();
    match (n_nan, n_inf) {
        (0, 0) => None,
        (n_nan, 0) => Some(format!("{n_nan} of {n} values NaN")),
        (0, n_inf) => Some(format!("{n_inf} of {n} values infinite")),
        (n_nan, n_inf) => Some(format!("{n_nan} of {n} values NaN, {n_inf} infinite")),
    }
}
