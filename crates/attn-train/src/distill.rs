//! Distillation: a student learns to do what its teacher does.

use attn_core::{Attended, ForwardOptions, Model, Rows, attention::Stream, config::Head};
use attn_data::batch::IGNORED;
use attn_torch::{BoxError, Forward, Function, apply};
use tch::{Kind, Tensor};

use crate::{
    batch::Batch,
    divergence::{CHUNK_BYTES, Losses, OfFeatures, Target, Teacher},
    error::{Error, Result},
    objective::{Objective, wide},
};

/// What a student differs from its teacher by: a mean over the real tokens of a batch, each held against the teacher's at
/// the same position. Of classifiers, a mean over the rows.
///
/// The teacher runs without dropout and without gradients. Logits over the vocabulary are made and used up a few rows at
/// a time.
#[derive(Debug)]
pub struct Distillation<'a> {
    teacher: &'a Model,
    losses: Losses,
    /// The layers whose attention differs.
    layers: Vec<usize>,
}

impl<'a> Distillation<'a> {
    /// Holds `student` against `teacher` by `losses`.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`] for losses out of range, [`Error::Teacher`] for models that cannot be compared.
    pub fn new(teacher: &'a Model, student: &Model, losses: &Losses) -> Result<Self> {
        losses.validate()?;
        let refuse = |problem: String| Err(Error::Teacher { problem });
        let [of, by] = [teacher, student].map(|model| model.config());
        if (of.head, of.is_causal()) != (by.head, by.is_causal()) {
            return refuse(format!(
                "it is a {} with {}, and the student a {} with {}",
                of.base_model_type(),
                of.head,
                by.base_model_type(),
                by.head
            ));
        }
        if of.head == Head::Bare && losses.reads_predictions() {
            return refuse("neither model has a head, so neither predicts anything".into());
        }
        let (vocab, own) = (of.sizes.vocab_size, by.sizes.vocab_size);
        if vocab != own {
            return refuse(format!("its vocabulary has {vocab} tokens, the student's {own}"));
        }
        let sizes = |config: &attn_core::Config| (config.layers.len(), config.sizes.hidden_size);
        if (losses.reads_hidden() || losses.reads_attention()) && sizes(of) != sizes(by) {
            return refuse(format!(
                "it has {} layers of width {}, the student {} of {}, and hidden states are compared layer by layer",
                sizes(of).0,
                sizes(of).1,
                sizes(by).0,
                sizes(by).1
            ));
        }
        let layers: Vec<usize> = (0..by.layers.len().min(of.layers.len()))
            .filter(|&layer| of.layers[layer].variant != by.layers[layer].variant)
            .collect();
        if losses.reads_attention() {
            if layers.is_empty() {
                return refuse(
                    "its attention is the student's in every layer: there is nothing to transfer"
                        .into(),
                );
            }
            let heads = |config: &attn_core::Config, layer: usize| config.layers[layer].n_heads;
            if let Some(layer) = layers.iter().find(|&&layer| heads(of, layer) != heads(by, layer))
            {
                return refuse(format!(
                    "layer {layer} has {} heads, the student's {}, and heads are compared one by one",
                    heads(of, *layer),
                    heads(by, *layer)
                ));
            }
        }
        Ok(Self { teacher, losses: losses.clone(), layers })
    }

    /// The divergence of predictions; `hidden` are what the heads made of both.
    fn predictions(
        &self,
        model: &Model,
        labels: Option<Tensor>,
        student: &Tensor,
        teacher: Tensor,
    ) -> Result<Tensor> {
        let (Some(own), Some(vocabulary)) = (model.vocabulary(), self.teacher.vocabulary()) else {
            // Classes are few: what autograd keeps of them is no matter.
            let [student, teacher] = [student, &teacher].map(wide);
            let n = student.size()[0] as f64;
            return Ok(apply(
                OfLogits { losses: self.losses.clone(), teacher: Target::Logits(teacher), labels, n },
                &[&student],
            )?
            .remove(0));
        };
        let n_labels = labels
            .as_ref()
            .map_or(1, |labels| labels.ge(0).sum(Kind::Int64).int64_value(&[]).max(1));
        let trains =
            [own.weight.requires_grad(), own.bias.as_ref().is_some_and(Tensor::requires_grad)];
        let function = OfFeatures {
            losses: self.losses.clone(),
            teacher: Teacher::Features(teacher, vocabulary),
            has_bias: own.bias.is_some(),
            labels,
            n_labels: n_labels as f64,
            trains,
            chunk_bytes: CHUNK_BYTES,
        };
        let mut inputs = vec![student, &own.weight];
        inputs.extend(own.bias.as_ref());
        Ok(apply(function, &inputs)?.remove(0))
    }

    /// What the heads give in the layers that differ, and their attention weights.
    fn attention(&self, keep: &Tensor, student: &Attended, teacher: &Attended) -> Tensor {
        let by_token = keep.unsqueeze(1).unsqueeze(-1); // [b, 1, n, 1]
        let n_tokens = keep.sum(Kind::Float);
        let mut parts = Vec::new();
        let n_layers = self.layers.len() as f64;
        if self.losses.attention_output > 0.0 {
            for (own, other) in student.z.iter().zip(&teacher.z) {
                let [_, heads, _, width] = own.size()[..] else { unreachable!("z has four axes") };
                let squared = (wide(own) - wide(other)).square() * &by_token;
                let mean = squared.sum(None::<Kind>) / (&n_tokens * (heads * width) as f64);
                parts.push(mean * (self.losses.attention_output / n_layers));
            }
        }
        if self.losses.attention_weights > 0.0 {
            for (own, other) in student.attentions.iter().zip(&teacher.attentions) {
                let heads = own.size()[1];
                let log = wide(own).clamp_min(f64::from(f32::MIN_POSITIVE)).log();
                let crossed =
                    -(wide(other) * log).sum_dim_intlist([-1i64].as_slice(), true, None::<Kind>);
                let mean = (crossed * &by_token).sum(None::<Kind>) / (&n_tokens * heads as f64);
                parts.push(mean * (self.losses.attention_weights / n_layers));
            }
        }
        total(parts)
    }

    /// The mean over the layers of what hidden states differ by, at real tokens.
    fn hidden(&self, keep: &Tensor, student: &[Tensor], teacher: &[Tensor]) -> Tensor {
        let n_tokens = keep.sum(Kind::Float);
        let mut parts = Vec::new();
        // The first is the embedding, which is no layer's doing.
        let pairs = student.iter().zip(teacher).skip(1);
        let n_layers = (student.len() - 1) as f64;
        for (own, other) in pairs {
            let [own, other] = [own, other].map(wide);
            let width = own.size()[2] as f64;
            if self.losses.hidden_mse > 0.0 {
                let squared = (&own - &other).square() * keep.unsqueeze(-1);
                let mean = squared.sum(None::<Kind>) / (&n_tokens * width);
                parts.push(mean * (self.losses.hidden_mse / n_layers));
            }
            if self.losses.hidden_cosine > 0.0 {
                let apart: Tensor =
                    (1.0 - Tensor::cosine_similarity(&own, &other, -1, 1e-8)) * keep;
                let mean = apart.sum(None::<Kind>) / &n_tokens;
                parts.push(mean * (self.losses.hidden_cosine / n_layers));
            }
        }
        total(parts)
    }
}

impl Objective for Distillation<'_> {
    fn name(&self) -> &'static str {
        "distillation"
    }

    fn check(&self, model: &Model) -> Result<()> {
        Self::new(self.teacher, model, &self.losses).map(drop)
    }

    fn n_targets(&self, batch: &Batch) -> usize {
        match self.teacher.config().head {
            Head::Classifier { .. } => batch.rows.rows,
            _ => batch.rows.mask.iter().filter(|&&real| real == 1).count(),
        }
    }

    fn loss(&self, model: &Model, batch: &Batch, stream: Stream) -> Result<Tensor> {
        let losses = &self.losses;
        let input = batch.input(model);
        let cells = [batch.rows.rows as i64, batch.rows.cols as i64];
        let keep = Tensor::from_slice(&batch.rows.mask)
            .view(cells)
            .to_device(model.device())
            .to_kind(Kind::Float);
        let is_classifier = matches!(model.config().head, Head::Classifier { .. });
        // The real tokens, by place in the flattened batch.
        let places = Tensor::from_slice(&batch.rows.mask).nonzero().view([-1]);
        let attends = losses.reads_attention();
        let rows = if losses.attention_weights > 0.0 { Rows::All } else { Rows::None };
        let reads_last = losses.reads_predictions();
        let base = || ForwardOptions {
            // Also where no prediction is compared: the vocabulary is the widest matrix there is.
            before_vocabulary: model.vocabulary().is_some(),
            hidden_states: losses.reads_hidden(),
            logits_at: (!is_classifier && reads_last).then_some(&places),
            ..ForwardOptions::default()
        };
        let forced = attends && losses.teacher_forced;
        let free = attends && !losses.teacher_forced;
        let taught = {
            let _no_grad = tch::no_grad_guard();
            let options = ForwardOptions {
                attentions: if attends { rows.clone() } else { Rows::None },
                z: attends,
                attention_inputs: forced,
                ..base()
            };
            self.teacher.forward(&input, &options)?
        };
        let mut parts = Vec::new();
        let pick = |all: Vec<Tensor>| -> Vec<Tensor> {
            if all.is_empty() {
                all
            } else {
                self.layers.iter().map(|&layer| all[layer].shallow_clone()).collect()
            }
        };
        let teacher =
            Attended { z: pick(taught.z), attentions: pick(taught.attentions), own_loss: None };
        if forced {
            let options = ForwardOptions {
                train: true,
                stream,
                attentions: rows.clone(),
                ..ForwardOptions::default()
            };
            let inputs = pick(taught.attention_inputs);
            let mut own = model.attend(&input, &self.layers, &inputs, &options)?;
            parts.extend(own.own_loss.take());
            parts.push(self.attention(&keep, &own, &teacher));
        }
        if reads_last || losses.reads_hidden() || free {
            let options = ForwardOptions {
                train: true,
                stream,
                attentions: if free { rows } else { Rows::None },
                z: free,
                ..base()
            };
            let mut own = model.forward(&input, &options)?;
            // On the teacher's inputs it was taken above.
            parts.extend(own.own_loss.take().filter(|_| !forced));
            if free {
                let own =
                    Attended { z: pick(own.z), attentions: pick(own.attentions), own_loss: None };
                parts.push(self.attention(&keep, &own, &teacher));
            }
            if losses.reads_hidden() {
                parts.push(self.hidden(&keep, &own.hidden_states, &taught.hidden_states));
            }
            if reads_last {
                let labels = (losses.cross_entropy > 0.0)
                    .then(|| self.labels(batch, &places, is_classifier));
                let labels = labels.map(|labels| labels.to_device(model.device()));
                parts.push(self.predictions(model, labels, &own.logits, taught.logits)?);
            }
        }
        Ok(total(parts))
    }
}

impl Distillation<'_> {
    /// What each of the rows of logits is to predict by the text itself, −100 where nothing.
    fn labels(&self, batch: &Batch, places: &Tensor, is_classifier: bool) -> Tensor {
        if is_classifier {
            return Tensor::from_slice(&batch.rows.labels);
        }
        let by_cell = match (&batch.token_labels, self.teacher.config().is_causal()) {
            (Some(labels), _) => labels.clone(),
            (None, true) => batch.next_tokens(),
            (None, false) => vec![IGNORED; batch.rows.ids.len()],
        };
        Tensor::from_slice(&by_cell).index_select(0, places)
    }
}

/// [`Losses::of_logits`] of logits that are there.
struct OfLogits {
    losses: Losses,
    teacher: Target,
    labels: Option<Tensor>,
    n: f64,
}

impl Function for OfLogits {
    fn forward(&self, inputs: &[Tensor]) -> std::result::Result<Forward, BoxError> {
        let n_labels = self
            .labels
            .as_ref()
            .map_or(1, |labels| labels.ge(0).sum(Kind::Int64).int64_value(&[]).max(1));
        let (loss, grad) = self.losses.of_logits(
            &inputs[0],
            &self.teacher,
            self.labels.as_ref(),
            [self.n, n_labels as f64],
        );
        Ok(Forward { outputs: vec![loss], saved: vec![grad] })
    }

    fn backward(
        &self,
        saved: &[Tensor],
        grads: &[Tensor],
    ) -> std::result::Result<Vec<Option<Tensor>>, BoxError> {
        Ok(vec![Some(&saved[0] * &grads[0])])
    }
}

/// The sum of losses, of which there is at least one.
fn total(parts: Vec<Tensor>) -> Tensor {
    parts.into_iter().reduce(|sum, part| sum + part).expect("some loss has a weight")
}
