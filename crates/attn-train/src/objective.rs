//! What a run minimizes.

use attn_core::{ForwardOptions, Model, Output, attention::Stream, config::Head, laws::Verdict};
use attn_data::batch::IGNORED;
use tch::{Kind, Reduction, Tensor};

use crate::{
    batch::Batch,
    error::{Error, Result},
};

/// What a run minimizes: a mean over the targets of a batch.
pub trait Objective {
    /// The name in messages and checkpoints.
    fn name(&self) -> &'static str;

    /// Whether `model` ends in what the loss needs.
    ///
    /// # Errors
    ///
    /// [`Error::Head`] where it does not.
    fn check(&self, model: &Model) -> Result<()>;

    /// How many targets [`Self::loss`] is the mean over. Batches that make one step together are weighted by it.
    fn n_targets(&self, batch: &Batch) -> usize;

    /// The mean loss over the targets, one number of at least `f32` on the model's device, dropout on. `stream` is for
    /// attention kinds that draw.
    ///
    /// # Errors
    ///
    /// Where the model cannot run on the batch, or the batch lacks labels.
    fn loss(&self, model: &Model, batch: &Batch, stream: Stream) -> Result<Tensor>;

    /// What has to hold of the loss itself before the first step, tried on a few tokens, `[batch, seq_len]`. Nothing unless it says so.
    ///
    /// # Errors
    ///
    /// Where a model cannot run on `ids`.
    fn laws(&self, _ids: &Tensor) -> Result<Vec<Verdict>> {
        Ok(Vec::new())
    }
}

/// Cross-entropy of the right class, mean over the labelled rows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Classification;

impl Objective for Classification {
    fn name(&self) -> &'static str {
        "classification"
    }

    fn check(&self, model: &Model) -> Result<()> {
        let fits = matches!(model.config().head, Head::Classifier { .. });
        check_head(self.name(), fits, "a classifier", model)
    }

    fn n_targets(&self, batch: &Batch) -> usize {
        count(&batch.rows.labels)
    }

    fn loss(&self, model: &Model, batch: &Batch, stream: Stream) -> Result<Tensor> {
        let options = ForwardOptions { train: true, stream, ..ForwardOptions::default() };
        let Output { logits, own_loss, .. } = model.forward(&batch.input(model), &options)?; // [b, classes]
        let n_classes = logits.size()[1];
        let labelled = batch.rows.labels.iter().zip(&batch.rows.indices);
        for (&label, &example) in labelled.filter(|(label, _)| **label != IGNORED) {
            // LibTorch would read past the end of the row's logits, on CUDA without saying so at once.
            if !(0..n_classes).contains(&label) {
                return Err(Error::Label { example, label, n_classes });
            }
        }
        Ok(with_own(cross_entropy(&logits, &batch.rows.labels), own_loss))
    }
}

/// Cross-entropy of the next token, mean over those that are no padding, each as often as the batch's
/// [`weights`](Batch::weights) say: the logits at position t are held against the token at t + 1.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CausalLm;

impl Objective for CausalLm {
    fn name(&self) -> &'static str {
        "causal language modelling"
    }

    fn check(&self, model: &Model) -> Result<()> {
        check_decoder(self.name(), model)
    }

    fn n_targets(&self, batch: &Batch) -> usize {
        let labels = batch.next_tokens();
        match &batch.weights {
            None => count(&labels),
            Some(weights) => {
                let of_targets = labels.iter().zip(weights).filter(|(label, _)| **label != IGNORED);
                of_targets.map(|(_, &weight)| weight as usize).sum()
            }
        }
    }

    fn loss(&self, model: &Model, batch: &Batch, stream: Stream) -> Result<Tensor> {
        token_loss(model, batch, &batch.next_tokens(), batch.weights.as_deref(), stream)
    }
}

/// Cross-entropy of the hidden tokens, mean over those with a label.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MaskedLm;

impl Objective for MaskedLm {
    fn name(&self) -> &'static str {
        "masked language modelling"
    }

    fn check(&self, model: &Model) -> Result<()> {
        let fits = model.config().head == Head::LanguageModel && !model.config().is_causal();
        check_head(self.name(), fits, "an encoder with a language-model head", model)
    }

    fn n_targets(&self, batch: &Batch) -> usize {
        batch.token_labels.as_deref().map_or(0, count)
    }

    fn loss(&self, model: &Model, batch: &Batch, stream: Stream) -> Result<Tensor> {
        marked_loss(self.name(), model, batch, stream)
    }
}

/// Cross-entropy of the tokens of an answer after its prompt, mean over all such tokens of the batch; the prompt itself
/// is not learnt. A batch says which they are: [`Batch::answered`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Completion;

impl Objective for Completion {
    fn name(&self) -> &'static str {
        "completion"
    }

    fn check(&self, model: &Model) -> Result<()> {
        check_decoder(self.name(), model)
    }

    fn n_targets(&self, batch: &Batch) -> usize {
        batch.token_labels.as_deref().map_or(0, count)
    }

    fn loss(&self, model: &Model, batch: &Batch, stream: Stream) -> Result<Tensor> {
        marked_loss(self.name(), model, batch, stream)
    }
}

/// [`token_loss`] at the labels that the batch brings.
fn marked_loss(
    objective: &'static str,
    model: &Model,
    batch: &Batch,
    stream: Stream,
) -> Result<Tensor> {
    let labels = batch.token_labels.as_ref().ok_or(Error::NoTokenLabels { objective })?;
    token_loss(model, batch, labels, None, stream)
}

/// Cross-entropy over the vocabulary at the positions that have a label, each as often as `weights` say; `labels` and
/// `weights` are `[rows · cols]`. The others' logits are never computed: they are the largest tensor of a language
/// model.
fn token_loss(
    model: &Model,
    batch: &Batch,
    labels: &[i64],
    weights: Option<&[u32]>,
    stream: Stream,
) -> Result<Tensor> {
    let labelled = (0_i64..).zip(labels).filter(|(_, label)| **label != IGNORED);
    let (places, labels): (Vec<i64>, Vec<i64>) = labelled.unzip();
    let at = Tensor::from_slice(&places);
    let options =
        ForwardOptions { train: true, stream, logits_at: Some(&at), ..ForwardOptions::default() };
    let Output { logits, own_loss, .. } = model.forward(&batch.input(model), &options)?; // [places, vocab]
    let Some(weights) = weights else {
        return Ok(with_own(cross_entropy(&logits, &labels), own_loss));
    };
    let weights: Vec<f32> = places.iter().map(|&place| weights[place as usize] as f32).collect();
    let weights = Tensor::from_slice(&weights).to_device(logits.device());
    let labels = Tensor::from_slice(&labels).to_device(logits.device());
    let each =
        wide(&logits).cross_entropy_loss::<Tensor>(&labels, None, Reduction::None, IGNORED, 0.0);
    let mean = (each * &weights).sum(None::<Kind>) / weights.sum(None::<Kind>);
    Ok(with_own(mean, own_loss))
}

/// `loss` with what attention kinds learn from beside it.
pub(crate) fn with_own(loss: Tensor, own: Option<Tensor>) -> Tensor {
    match own {
        Some(own) => loss + own,
        None => loss,
    }
}

/// `[b, n]` logits against one label each, mean over the labels that are not [`IGNORED`].
fn cross_entropy(logits: &Tensor, labels: &[i64]) -> Tensor {
    let labels = Tensor::from_slice(labels).to_device(logits.device());
    let mean = Reduction::Mean;
    wide(logits).cross_entropy_loss::<Tensor>(&labels, None, mean, IGNORED, 0.0)
}

/// Sums run in at least `f32`.
pub(crate) fn wide(x: &Tensor) -> Tensor {
    match x.kind() {
        Kind::Half | Kind::BFloat16 => x.to_kind(Kind::Float),
        _ => x.shallow_clone(),
    }
}

fn count(labels: &[i64]) -> usize {
    labels.iter().filter(|&&label| label != IGNORED).count()
}

fn check_decoder(objective: &'static str, model: &Model) -> Result<()> {
    let fits = model.config().head == Head::LanguageModel && model.config().is_causal();
    check_head(objective, fits, "a decoder with a language-model head", model)
}

fn check_head(
    objective: &'static str,
    fits: bool,
    expected: &'static str,
    model: &Model,
) -> Result<()> {
    if fits {
        return Ok(());
    }
    let side = if model.config().is_causal() { "a decoder" } else { "an encoder" };
    let found = format!("{} ({side}, {})", model.config().head, model.config().base_model_type());
    Err(Error::Head { objective, expected, found })
}
