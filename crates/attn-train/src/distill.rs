//! Distillation: a student learns to do what its teacher does.

use std::ops::{ControlFlow, Range};

use attn_core::{
    Attended, ForwardOptions, Model, Output, Rows, Vocabulary,
    attention::Stream,
    config::Head,
    generate::{Limits, Sampling, generate},
    laws::Verdict,
};
use attn_data::batch::IGNORED;
use attn_torch::{BoxError, Forward, Function, apply};
use rand::Rng;
use tch::{Kind, Tensor};

use crate::{
    batch::Batch,
    divergence::{CHUNK_BYTES, Losses, OfFeatures, Target, Teacher},
    error::{Error, Result},
    objective::{Objective, wide, with_own},
    probe::{a_loss_is_what_it_is_called, another},
    teacher_cache::TeacherCache,
};

/// What a student differs from its teacher by: a mean over the real tokens of a batch, each held against the teacher's at
/// the same position. Of classifiers, a mean over the rows.
///
/// The teacher runs without dropout and without gradients. Logits over the vocabulary are made and used up a few rows at
/// a time.
#[derive(Debug)]
pub struct Distillation<'a> {
    teacher: &'a Model,
    /// What the teacher predicts, where it is not asked itself.
    cache: Option<&'a TeacherCache>,
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
        let differs = |layer: &usize| {
            let (of, by) = (&of.layers[*layer], &by.layers[*layer]);
            of.variant != by.variant || (losses.layer_output > 0.0 && of != by)
        };
        let layers: Vec<usize> =
            (0..by.layers.len().min(of.layers.len())).filter(differs).collect();
        if losses.reads_attention() && layers.is_empty() {
            let hint = match losses.layer_output > 0.0 {
                true => "",
                false => {
                    "\nhint: `loss.layer_output` compares layers whose heads were merged or removed"
                }
            };
            return refuse(format!(
                "its attention is the student's in every layer: there is nothing to transfer{hint}"
            ));
        }
        if losses.reads_heads() {
            let merged = |&&layer: &&usize| {
                let (of, by) = (&of.layers[layer], &by.layers[layer]);
                of.n_heads == by.n_heads
                    && (&of.kept_heads, &of.kv_of_head) != (&by.kept_heads, &by.kv_of_head)
            };
            if let Some(layer) = layers.iter().find(merged) {
                return refuse(format!(
                    "layer {layer} has its heads in another order, or other key/value heads, than the student's, and heads are \
                     compared one by one\nhint: `loss.layer_output` compares layers"
                ));
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
        Ok(Self { teacher, cache: None, losses: losses.clone(), layers })
    }

    /// Takes the teacher's predictions from `cache`; the teacher does not run.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`] for losses that a cache does not give ([`Losses::fit_cache`]), and for another `top_k` than that
    /// of the cache.
    pub fn with_cache(self, cache: &'a TeacherCache) -> Result<Self> {
        self.losses.fit_cache()?;
        if self.losses.top_k != cache.top_k() {
            return Err(Error::Setting {
                field: "top_k",
                value: self.losses.top_k.to_string(),
                expected: "that of the teacher cache",
            });
        }
        Ok(Self { cache: Some(cache), ..self })
    }

    /// The divergence of classes; the logits of both, `[n, n_classes]`.
    fn classes(
        &self,
        labels: Option<Tensor>,
        student: &Tensor,
        teacher: &Tensor,
    ) -> Result<Tensor> {
        // Classes are few: what autograd keeps of them is no matter.
        let [student, teacher] = [student, teacher].map(wide);
        let n = student.size()[0] as f64;
        let teacher = Target::Logits(teacher);
        let function = OfLogits { losses: self.losses.clone(), teacher, labels, n };
        Ok(apply(function, &[&student])?.remove(0))
    }

    /// The divergence of predictions over the vocabulary; `student` is what the student makes them of, `[n, hidden]`.
    fn predictions(
        &self,
        own: &Vocabulary,
        labels: Option<Tensor>,
        student: &Tensor,
        teacher: Teacher,
    ) -> Result<Tensor> {
        let n_labels = labels
            .as_ref()
            .map_or(1, |labels| labels.ge(0).sum(Kind::Int64).int64_value(&[]).max(1));
        let trains =
            [own.weight.requires_grad(), own.bias.as_ref().is_some_and(Tensor::requires_grad)];
        let function = OfFeatures {
            losses: self.losses.clone(),
            teacher,
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

    /// What the heads of `model` give in the layers that differ, their attention weights, and what these layers make of them.
    fn attention(
        &self,
        model: &Model,
        keep: &Tensor,
        student: &Attended,
        teacher: &Attended,
    ) -> Tensor {
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
        if self.losses.layer_output > 0.0 {
            let [own, other] = [model, self.teacher].map(Model::layers);
            for ((&layer, z), taught) in self.layers.iter().zip(&student.z).zip(&teacher.z) {
                let train = true; // as the forward pass: dropout of adapters
                let apart = wide(&own[layer].put_out(z, train))
                    - wide(&other[layer].put_out(taught, false));
                let width = apart.size()[2] as f64;
                let squared = apart.square() * keep.unsqueeze(-1);
                let mean = squared.sum(None::<Kind>) / (&n_tokens * width);
                parts.push(mean * (self.losses.layer_output / n_layers));
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
            _ => compared(batch).iter().filter(|&&is_compared| is_compared == 1).count(),
        }
    }

    /// Of the divergences of whole predictions, where the teacher runs and attends to nothing but its own text.
    fn laws(&self, ids: &Tensor) -> Result<Vec<Verdict>> {
        let losses = self.losses.of_whole_predictions();
        // An adapter cannot be on two models.
        let is_alone = self.teacher.lora().is_none() && !self.teacher.needs_source();
        if !is_alone || losses.validate().is_err() {
            tracing::info!(
                "the loss is not held against its definition: it compares no predictions, or the teacher has an adapter or \
                 another text to attend to"
            );
            return Ok(Vec::new());
        }
        let student = another(self.teacher)?;
        let loss = |teacher: &Model, student: &Model, batch: &Batch| {
            Distillation::new(teacher, student, &losses)?.loss(student, batch, Stream::default())
        };
        let verdict = a_loss_is_what_it_is_called(&losses, self.teacher, &student, ids, &loss)?;
        Ok(verdict.into_iter().collect())
    }

    fn loss(&self, model: &Model, batch: &Batch, stream: Stream) -> Result<Tensor> {
        let losses = &self.losses;
        let continued = continued(model, batch, stream)?;
        let batch = continued.as_ref().unwrap_or(batch);
        let input = batch.input(model);
        let cells = [batch.rows.rows as i64, batch.rows.cols as i64];
        let compared = Tensor::from_slice(&compared(batch));
        let keep = compared.view(cells).to_device(model.device()).to_kind(Kind::Float);
        let is_classifier = matches!(model.config().head, Head::Classifier { .. });
        // By place in the flattened batch.
        let places = compared.nonzero().view([-1]);
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
        if let Some(cache) = self.cache {
            if continued.is_some() {
                let problem = "its cache holds the data's rows, not what the student makes of them";
                return Err(Error::Teacher { problem: problem.into() });
            }
            let Some(vocabulary) = model.vocabulary() else {
                unreachable!(
                    "a cache is of a model with a vocabulary, and the student has the same head"
                )
            };
            let options = ForwardOptions { train: true, stream, ..base() };
            let Output { logits: own, own_loss, .. } = model.forward(&input, &options)?;
            let labels = (losses.cross_entropy > 0.0)
                .then(|| self.labels(batch, &places, false).to_device(model.device()));
            let likeliest = cache.likeliest(batch, model.device())?;
            let teacher = Teacher::Likeliest(likeliest);
            return Ok(with_own(self.predictions(&vocabulary, labels, &own, teacher)?, own_loss));
        }
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
            parts.push(self.attention(model, &keep, &own, &teacher));
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
                parts.push(self.attention(model, &keep, &own, &teacher));
            }
            if losses.reads_hidden() {
                parts.push(self.hidden(&keep, &own.hidden_states, &taught.hidden_states));
            }
            if reads_last {
                let labels = (losses.cross_entropy > 0.0)
                    .then(|| self.labels(batch, &places, is_classifier));
                let labels = labels.map(|labels| labels.to_device(model.device()));
                parts.push(match (model.vocabulary(), self.teacher.vocabulary()) {
                    (Some(vocabulary), Some(of_teacher)) => {
                        let teacher = Teacher::Features(taught.logits, of_teacher);
                        self.predictions(&vocabulary, labels, &own.logits, teacher)?
                    }
                    _ => self.classes(labels, &own.logits, &taught.logits)?,
                });
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
        let mut by_cell = match (&batch.token_labels, self.teacher.config().is_causal()) {
            (Some(labels), _) => labels.clone(),
            (None, true) => batch.next_tokens(),
            (None, false) => vec![IGNORED; batch.rows.ids.len()],
        };
        // What a student wrote itself is no text to learn by heart.
        for (row, _) in batch.prompts.iter().flatten().enumerate().filter(|(_, n)| **n > 0) {
            by_cell[row * batch.rows.cols..(row + 1) * batch.rows.cols].fill(IGNORED);
        }
        Tensor::from_slice(&by_cell).index_select(0, places)
    }
}

/// Where models are compared, `[rows · cols]`, 1 or 0: at the real tokens, and in rows that the student goes on with where
/// the next token is its own.
fn compared(batch: &Batch) -> Vec<i64> {
    let mut all = batch.rows.mask.clone();
    for (row, &n_prompt) in batch.prompts.iter().flatten().enumerate().filter(|(_, n)| **n > 0) {
        let tokens = tokens_of(batch, row);
        let before_own = tokens.start + n_prompt - 1..tokens.end - 1;
        for cell in tokens.filter(|cell| !before_own.contains(cell)) {
            all[cell] = 0;
        }
    }
    all
}

/// The cells of a row's real tokens.
fn tokens_of(batch: &Batch, row: usize) -> Range<usize> {
    let cols = batch.rows.cols;
    let mut real = (row * cols..(row + 1) * cols).filter(|&cell| batch.rows.mask[cell] == 1);
    let first = real.next().expect("a row has a token");
    first..real.next_back().unwrap_or(first) + 1
}

/// The batch with what the student writes in the rows that it goes on with, drawn at temperature 1; `None` where it is to
/// go on with none. End-of-text tokens end nothing, as in the blocks that it learns from.
fn continued(model: &Model, batch: &Batch, stream: Stream) -> Result<Option<Batch>> {
    let rows: Vec<(Range<usize>, usize)> = (0..)
        .zip(batch.prompts.iter().flatten())
        .filter(|(_, n_prompt)| **n_prompt > 0)
        .map(|(row, &n_prompt)| (tokens_of(batch, row), n_prompt))
        .collect();
    if rows.is_empty() {
        return Ok(None);
    }
    let prompts: Vec<Vec<i64>> = rows
        .iter()
        .map(|(tokens, n)| batch.rows.ids[tokens.start..tokens.start + n].to_vec())
        .collect();
    let n_new = |(tokens, n): &(Range<usize>, usize)| tokens.len() - n;
    // A sequence that no layer has.
    let seed = Stream { layer: u64::MAX, ..stream }.rng().random();
    let sampling = Sampling { temperature: 1.0, seed, ..Sampling::default() };
    let limits =
        Limits { max_new_tokens: rows.iter().map(n_new).max().unwrap_or(0), stop_ids: Vec::new() };
    let go_on = &mut |_, _| ControlFlow::Continue(());
    let written = generate(model, &prompts, &sampling, &limits, go_on)?;
    let mut continued = batch.clone();
    for ((tokens, n_prompt), written) in rows.into_iter().zip(written) {
        let own = tokens.start + n_prompt..tokens.end;
        let n_own = own.len();
        continued.rows.ids[own].copy_from_slice(&written.ids[..n_own]);
    }
    Ok(Some(continued))
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
