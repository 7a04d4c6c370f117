//! How far a student's predictions are from its teacher's, and the gradient of that, a few rows at a time: the logits of
//! a whole batch never exist.
//!
//! With p the teacher's probabilities, q the student's, both at temperature T, and g = ∂L/∂q, the gradient by the
//! student's logits s is
//!
//! ```text
//! ∂L/∂s_i = (1/T) q_i (g_i − Σ_j q_j g_j)
//! ```
//!
//! Each divergence is multiplied by T², so that its gradient keeps its size as T grows (Hinton et al. 2015, "Distilling
//! the Knowledge in a Neural Network", <https://arxiv.org/abs/1503.02531>, section 2).

use attn_core::Vocabulary;
use attn_torch::{BoxError, Forward, Function};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};

/// What a student is held against its teacher by: the weight of each loss, and their settings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Losses {
    /// KL(teacher ‖ student), in nats per token: `Σ p (log p − log q)`.
    pub forward_kl: f64,
    /// KL(student ‖ teacher): `Σ q (log q − log p)`.
    pub reverse_kl: f64,
    /// Generalized Jensen-Shannon: `β KL(p ‖ m) + (1 − β) KL(q ‖ m)`, `m = β p + (1 − β) q` (Agarwal et al. 2023,
    /// <https://arxiv.org/abs/2306.13649>, section 2).
    pub jensen_shannon: f64,
    /// β of `jensen_shannon`, between 0 and 1, both excluded.
    pub beta: f64,
    /// Total variation: `½ Σ |p − q|`.
    pub total_variation: f64,
    /// KL(teacher ‖ student) over the teacher's `top_k` likeliest tokens and, as one more, all the others together.
    pub top_k_kl: f64,
    /// How many tokens `top_k_kl` tells apart.
    pub top_k: i64,
    /// Cross-entropy of the next token of the text (of the hidden ones, for masked language models), temperature 1; a mean
    /// over the tokens of each batch that have a label, whatever the batch counts among those of a step.
    pub cross_entropy: f64,
    /// Mean squared difference of the hidden states, over the layers.
    pub hidden_mse: f64,
    /// One minus the cosine of the hidden states, over the layers.
    pub hidden_cosine: f64,
    /// Mean squared difference of the heads' outputs in the layers whose attention differs, before gates and output
    /// projection (LoLCATs, Zhang et al. 2024, <https://arxiv.org/abs/2410.10254>, section 3.1).
    pub attention_output: f64,
    /// Cross-entropy of the attention weights in those layers, `−Σ_j a_ij log â_ij` (Hedgehog, Zhang et al. 2024,
    /// <https://arxiv.org/abs/2402.04347>, section 4.2). Takes memory with the square of the length.
    pub attention_weights: f64,
    /// Mean squared difference of what attention layers add to the hidden states, behind the output projection, in the layers that
    /// differ in their attention or in their heads: where heads were merged, turned or removed they cannot be compared one by one.
    /// Not beside the two above.
    pub layer_output: f64,
    /// Whether `attention_output`, `attention_weights` and `layer_output` feed each layer what enters the teacher's, so that its errors
    /// are its own alone.
    pub teacher_forced: bool,
    /// What both models' logits are divided by in the divergences.
    pub temperature: f64,
}

impl Default for Losses {
    fn default() -> Self {
        Self {
            forward_kl: 0.0,
            reverse_kl: 0.0,
            jensen_shannon: 0.0,
            beta: 0.5,
            total_variation: 0.0,
            top_k_kl: 0.0,
            top_k: 64,
            cross_entropy: 0.0,
            hidden_mse: 0.0,
            hidden_cosine: 0.0,
            attention_output: 0.0,
            attention_weights: 0.0,
            layer_output: 0.0,
            teacher_forced: false,
            temperature: 1.0,
        }
    }
}

impl Losses {
    /// Checks every field.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`] with the first field that is out of range, or where all weights are 0.
    pub fn validate(&self) -> Result<()> {
        let refuse = |field: &'static str, value: String, expected: &'static str| {
            Err(Error::Setting { field, value, expected })
        };
        if let Some((field, weight)) =
            self.weights().into_iter().find(|(_, weight)| !(weight.is_finite() && *weight >= 0.0))
        {
            return refuse(field, weight.to_string(), "a number of at least 0");
        }
        if self.weights().iter().all(|(_, weight)| *weight == 0.0) {
            return refuse(
                "forward_kl",
                "0, as is every other weight".into(),
                "a loss to minimize",
            );
        }
        if !(self.beta > 0.0 && self.beta < 1.0) {
            return refuse("beta", self.beta.to_string(), "between 0 and 1, both excluded");
        }
        if self.top_k < 1 {
            return refuse("top_k", self.top_k.to_string(), "at least 1");
        }
        if !(self.temperature.is_finite() && self.temperature > 0.0) {
            return refuse("temperature", self.temperature.to_string(), "a number above 0");
        }
        if self.teacher_forced && !self.reads_attention() {
            return refuse(
                "teacher_forced",
                "true".into(),
                "false, as none of attention_output, attention_weights and layer_output has a weight",
            );
        }
        if self.layer_output > 0.0 && self.reads_heads() {
            return refuse(
                "layer_output",
                self.layer_output.to_string(),
                "0, as attention_output or attention_weights compares heads\nhint: compare heads or layers",
            );
        }
        Ok(())
    }

    fn weights(&self) -> [(&'static str, f64); 11] {
        [
            ("forward_kl", self.forward_kl),
            ("reverse_kl", self.reverse_kl),
            ("jensen_shannon", self.jensen_shannon),
            ("total_variation", self.total_variation),
            ("top_k_kl", self.top_k_kl),
            ("cross_entropy", self.cross_entropy),
            ("hidden_mse", self.hidden_mse),
            ("hidden_cosine", self.hidden_cosine),
            ("attention_output", self.attention_output),
            ("attention_weights", self.attention_weights),
            ("layer_output", self.layer_output),
        ]
    }

    /// Whether any of them compares predictions.
    pub(crate) fn reads_predictions(&self) -> bool {
        self.weights()[..6].iter().any(|(_, weight)| *weight > 0.0)
    }

    /// Whether any of them compares the predictions of every token.
    fn reads_whole_predictions(&self) -> bool {
        self.weights()[..4].iter().any(|(_, weight)| *weight > 0.0)
    }

    /// Those alone that compare the predictions of every token.
    pub(crate) fn of_whole_predictions(&self) -> Self {
        let Self { forward_kl, reverse_kl, jensen_shannon, total_variation, top_k_kl, .. } = *self;
        let (beta, temperature, top_k) = (self.beta, self.temperature, self.top_k);
        Self {
            forward_kl,
            reverse_kl,
            jensen_shannon,
            total_variation,
            top_k_kl,
            top_k,
            beta,
            temperature,
            ..Self::default()
        }
    }

    /// Refuses what gradient checkpointing does not keep: it runs blocks without their heads' outputs and attention weights,
    /// but for those that are run by themselves, on the teacher's inputs.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`].
    pub fn fit_gradient_checkpointing(&self) -> Result<()> {
        match self.reads_attention() && !self.teacher_forced {
            false => Ok(()),
            true => Err(Error::Setting {
                field: "gradient_checkpointing",
                value: "true".into(),
                expected: "false, as attention_output, attention_weights and layer_output compare what is then not kept\nhint: set \
                           `loss.teacher_forced`, or leave it away",
            }),
        }
    }

    /// Whether any of them compares hidden states.
    pub(crate) fn reads_hidden(&self) -> bool {
        self.hidden_mse > 0.0 || self.hidden_cosine > 0.0
    }

    /// Whether any of them compares what attention does.
    pub(crate) fn reads_attention(&self) -> bool {
        self.reads_heads() || self.layer_output > 0.0
    }

    /// Whether any of them compares heads one by one.
    pub(crate) fn reads_heads(&self) -> bool {
        self.attention_output > 0.0 || self.attention_weights > 0.0
    }

    /// Checks that a [`TeacherCache`](crate::TeacherCache) gives all that is asked for: it holds the likeliest tokens'
    /// probabilities at temperature 1 and nothing else of the teacher.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`] with the first loss that it does not give, or with the temperature.
    pub fn fit_cache(&self) -> Result<()> {
        let given = ["top_k_kl", "cross_entropy"];
        let mut beyond = self.weights().into_iter().filter(|(name, _)| !given.contains(name));
        if let Some((field, weight)) = beyond.find(|(_, weight)| *weight > 0.0) {
            let expected = "0 beside a teacher cache, which holds the likeliest tokens alone: `top_k_kl` and \
                            `cross_entropy` can be had from it";
            return Err(Error::Setting { field, value: weight.to_string(), expected });
        }
        if self.temperature != 1.0 {
            return Err(Error::Setting {
                field: "temperature",
                value: self.temperature.to_string(),
                expected: "1 beside a teacher cache, whose tail cannot be heated",
            });
        }
        Ok(())
    }

    /// The losses of rows of logits, `[n, vocab_size]`, with a token for each row to predict or −100: their sum, with the
    /// divergences divided by `n_rows` and the cross-entropy by `n_labels`; and its gradient by the student's logits.
    /// Everything in the logits' kind, at least `f32`.
    pub(crate) fn of_logits(
        &self,
        student: &Tensor,
        teacher: &Target,
        labels: Option<&Tensor>,
        [n_rows, n_labels]: [f64; 2],
    ) -> (Tensor, Tensor) {
        let t = self.temperature;
        let scaled = |x: &Tensor| if t == 1.0 { x.shallow_clone() } else { x / t };
        let log_q = scaled(student).log_softmax(-1, None::<Kind>);
        let q = log_q.exp();
        let share = t * t / n_rows;
        let total = |x: Tensor| x.sum(None::<Kind>);
        let mut loss = Tensor::zeros([], (student.kind(), student.device()));
        let mut grad: Option<Tensor> = None;
        let mut add = |weight: f64, value: Tensor, by_logits: Tensor| {
            loss += value * weight;
            let by_logits = by_logits * weight;
            grad = Some(match grad.take() {
                Some(mut sum) => sum.g_add_(&by_logits),
                None => by_logits,
            });
        };
        // From ∂L/∂q to ∂L/∂s.
        let through_softmax = |g: &Tensor| {
            let qg = &q * g;
            let mean = qg.sum_dim_intlist([-1i64].as_slice(), true, None::<Kind>);
            qg - &q * mean
        };
        if let Target::Logits(teacher) = teacher
            && self.reads_whole_predictions()
        {
            let log_p = scaled(teacher).log_softmax(-1, None::<Kind>);
            let p = log_p.exp();
            if self.forward_kl > 0.0 {
                let value = total(&p * (&log_p - &log_q)) * share;
                add(self.forward_kl, value, (&q - &p) * (share / t));
            }
            if self.reverse_kl > 0.0 {
                let apart = &log_q - &log_p;
                add(
                    self.reverse_kl,
                    total(&q * &apart) * share,
                    through_softmax(&apart) * (share / t),
                );
            }
            if self.jensen_shannon > 0.0 {
                let b = self.beta;
                // Where both are too small for a number, m is, too, and neither counts.
                let m = (&p * b + &q * (1.0 - b)).clamp_min(SMALLEST);
                let log_m = m.log();
                let of_q = &log_q - &log_m;
                let value = total(&p * (&log_p - &log_m)) * b + total(&q * &of_q) * (1.0 - b);
                add(
                    self.jensen_shannon,
                    value * share,
                    through_softmax(&of_q) * ((1.0 - b) * share / t),
                );
            }
            if self.total_variation > 0.0 {
                let apart = &q - &p;
                let value = total(apart.abs()) * (0.5 * share);
                add(
                    self.total_variation,
                    value,
                    through_softmax(&apart.sign()) * (0.5 * share / t),
                );
            }
        }
        if self.top_k_kl > 0.0 {
            let made;
            let likeliest = match teacher {
                Target::Likeliest(given) => given,
                Target::Logits(teacher) => {
                    let log_p = scaled(teacher).log_softmax(-1, None::<Kind>);
                    made = Likeliest::of(&log_p, self.top_k);
                    &made
                }
            };
            let Likeliest { ids, log_p, log_tail } = likeliest;
            let (top_p, tail_p) = (log_p.exp(), log_tail.exp());
            let (top_q, log_top_q) = (q.gather(-1, ids, false), log_q.gather(-1, ids, false));
            let tail_q = sum_of_others(&q, ids).clamp_min(SMALLEST);
            let of_tail = &tail_p * (log_tail - tail_q.log());
            let value = total(&top_p * (log_p - log_top_q)) + total(of_tail);
            // q − p where a token is told apart; where not, the tail's share of it.
            let by_tail: Tensor = &q * (1.0 - &tail_p / &tail_q);
            let by_logits = by_tail.scatter(-1, ids, &(top_q - top_p));
            add(self.top_k_kl, value * share, by_logits * (share / t));
        }
        if self.cross_entropy > 0.0
            && let Some(labels) = labels
        {
            let keep = labels.ge(0).to_kind(student.kind()).unsqueeze(-1); // [n, 1]
            let at = labels.clamp_min(0).unsqueeze(-1);
            let log_q = if t == 1.0 {
                log_q.shallow_clone()
            } else {
                student.log_softmax(-1, None::<Kind>)
            };
            let value = -total(log_q.gather(-1, &at, false) * &keep) / n_labels;
            let one = Tensor::full_like(&keep, -1.0);
            let by_logits = log_q.exp().scatter_add(-1, &at, &one) * keep / n_labels;
            add(self.cross_entropy, value, by_logits);
        }
        let grad = grad.unwrap_or_else(|| student.zeros_like());
        (loss, grad)
    }
}

/// The smallest number whose logarithm is one.
const SMALLEST: f64 = f32::MIN_POSITIVE as f64;

/// What a student's logits are held against.
#[derive(Debug)]
pub(crate) enum Target {
    /// The teacher's logits, `[n, vocab_size]`.
    Logits(Tensor),
    /// What a cache holds of them; of the divergences it gives `top_k_kl` alone, at temperature 1.
    Likeliest(Likeliest),
}

impl Target {
    fn narrow(&self, start: i64, len: i64) -> Self {
        match self {
            Self::Logits(logits) => Self::Logits(logits.narrow(0, start, len)),
            Self::Likeliest(likeliest) => Self::Likeliest(likeliest.narrow(start, len)),
        }
    }
}

/// The likeliest tokens of n predictions.
#[derive(Debug)]
pub(crate) struct Likeliest {
    /// `[n, k]`, likeliest first.
    pub(crate) ids: Tensor,
    /// `[n, k]`: the logarithms of their probabilities.
    pub(crate) log_p: Tensor,
    /// `[n, 1]`: the logarithm of what all others have together.
    pub(crate) log_tail: Tensor,
}

impl Likeliest {
    /// The `k` likeliest tokens, or as many as there are, of `log_p`, `[n, vocab_size]`.
    pub(crate) fn of(log_p: &Tensor, k: i64) -> Self {
        let (top, ids) = log_p.topk(k.min(log_p.size()[1]), -1, true, true);
        let log_tail = sum_of_others(&log_p.exp(), &ids).clamp_min(SMALLEST).log();
        Self { ids, log_p: top, log_tail }
    }

    /// One after another.
    pub(crate) fn cat(parts: &[Self]) -> Self {
        let all =
            |of: fn(&Self) -> &Tensor| Tensor::cat(&parts.iter().map(of).collect::<Vec<_>>(), 0);
        Self { ids: all(|x| &x.ids), log_p: all(|x| &x.log_p), log_tail: all(|x| &x.log_tail) }
    }

    /// On `device`, in kinds to compute with.
    pub(crate) fn on(&self, device: Device) -> Self {
        Self {
            ids: self.ids.to_device(device).to_kind(Kind::Int64),
            log_p: self.log_p.to_device(device),
            log_tail: self.log_tail.to_device(device),
        }
    }

    pub(crate) fn narrow(&self, start: i64, len: i64) -> Self {
        let [ids, log_p, log_tail] =
            [&self.ids, &self.log_p, &self.log_tail].map(|x| x.narrow(0, start, len));
        Self { ids, log_p, log_tail }
    }
}

/// `[n, 1]`: the sum of each row of `p`, `[n, vocab_size]`, without the tokens `ids`, `[n, k]`. One minus the rest would lose
/// all digits where the rest is nearly all.
fn sum_of_others(p: &Tensor, ids: &Tensor) -> Tensor {
    p.scatter_value(-1, ids, 0.0).sum_dim_intlist([-1i64].as_slice(), true, None::<Kind>)
}

/// Bytes that the logits of one chunk of rows may take: enough rows for the matrix products to run at full speed.
pub(crate) const CHUNK_BYTES: i64 = 32 << 20;

/// Bytes of logits that the losses are computed of at a time: few enough that what they compute on the way stays in the
/// processor's cache.
pub(crate) const PART_BYTES: i64 = 1 << 20;

/// [`Losses::of_logits`] of what the vocabulary matrices make of `features`, the gradient computed on the way: inputs are
/// the student's features `[n, hidden]`, its matrix `[vocab, hidden]` and, where there is one, its bias `[vocab]`.
pub(crate) struct OfFeatures {
    pub(crate) losses: Losses,
    pub(crate) teacher: Teacher,
    /// `[n]`, −100 where there is none.
    pub(crate) labels: Option<Tensor>,
    pub(crate) n_labels: f64,
    /// Whether the student's vocabulary has a bias.
    pub(crate) has_bias: bool,
    /// Whether the student's matrix and bias are trained.
    pub(crate) trains: [bool; 2],
    /// [`CHUNK_BYTES`] outside of tests.
    pub(crate) chunk_bytes: i64,
}

/// Where a teacher's predictions come from.
pub(crate) enum Teacher {
    /// Of its features, `[n, hidden]`, and what makes logits of them.
    Features(Tensor, Vocabulary),
    /// They are there, of n rows.
    Likeliest(Likeliest),
}

impl Teacher {
    /// What `len` rows of the student's logits from `start` on are held against.
    fn target(&self, start: i64, len: i64, wide: Kind) -> std::result::Result<Target, BoxError> {
        Ok(match self {
            Self::Features(features, Vocabulary { weight, bias }) => {
                let logits = features.narrow(0, start, len).f_linear(weight, bias.as_ref())?;
                Target::Logits(logits.to_kind(wide))
            }
            Self::Likeliest(likeliest) => Target::Likeliest(likeliest.narrow(start, len)),
        })
    }
}

impl Function for OfFeatures {
    fn forward(&self, inputs: &[Tensor]) -> std::result::Result<Forward, BoxError> {
        let (features, weight, bias) = (&inputs[0], &inputs[1], inputs.get(2));
        let [n, vocab_size] = [features.size()[0], weight.size()[0]];
        let wide = if features.kind() == Kind::Double { Kind::Double } else { Kind::Float };
        let rows_of =
            |bytes: i64| (bytes / (vocab_size * wide.elt_size_in_bytes() as i64)).clamp(1, n);
        let (rows, few) = (rows_of(self.chunk_bytes), rows_of(PART_BYTES));
        let options = (wide, features.device());
        let mut loss = Tensor::zeros([], options);
        let by_features = Tensor::empty_like(features);
        let mut by_weight = self.trains[0].then(|| Tensor::zeros_like(weight));
        let mut by_bias = self.trains[1].then(|| Tensor::zeros([vocab_size], options));
        let mut start = 0;
        while start < n {
            let len = rows.min(n - start);
            let own = features.narrow(0, start, len);
            // Becomes the gradient, part by part.
            let logits = own.f_linear(weight, bias)?.to_kind(wide);
            let target = self.teacher.target(start, len, wide)?;
            let labels = self.labels.as_ref().map(|labels| labels.narrow(0, start, len));
            for first in (0..len).step_by(few as usize) {
                let len = few.min(len - first);
                let mut student = logits.narrow(0, first, len);
                let labels = labels.as_ref().map(|labels| labels.narrow(0, first, len));
                let (part, grad) = self.losses.of_logits(
                    &student,
                    &target.narrow(first, len),
                    labels.as_ref(),
                    [n as f64, self.n_labels],
                );
                loss += part;
                student.copy_(&grad);
            }
            let grad = logits;
            let grad_low = grad.to_kind(features.kind());
            by_features.narrow(0, start, len).copy_(&grad_low.f_matmul(weight)?);
            if let Some(by_weight) = &mut by_weight {
                let _ = by_weight.f_addmm_(&grad_low.tr(), &own)?;
            }
            if let Some(by_bias) = &mut by_bias {
                *by_bias += grad.sum_dim_intlist([0i64].as_slice(), false, None::<Kind>);
            }
            start += len;
        }
        let none = || Tensor::empty([0], options);
        let saved = vec![by_features, by_weight.unwrap_or_else(none), by_bias.unwrap_or_else(none)];
        Ok(Forward { outputs: vec![loss], saved })
    }

    fn backward(
        &self,
        saved: &[Tensor],
        grads: &[Tensor],
    ) -> std::result::Result<Vec<Option<Tensor>>, BoxError> {
        // The loss is nearly always where a backward pass begins, and the matrix's gradient is as large as the matrix.
        let scale = grads[0].double_value(&[]);
        let times = |x: &Tensor| if scale == 1.0 { x.shallow_clone() } else { x * scale };
        let mut all = vec![Some(times(&saved[0]))];
        all.extend((1..=2).map(|i| self.trains[i - 1].then(|| times(&saved[i]))));
        all.truncate(if self.has_bias { 3 } else { 2 });
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use attn_core::testing::{assert_close, randn};
    use attn_torch::{GradOptions, apply, grad};

    use super::*;

    #[test]
    fn chunks_change_neither_the_loss_nor_its_gradients() {
        let (n, hidden, vocab) = (7, 5, 11);
        let losses = Losses {
            forward_kl: 0.7,
            top_k_kl: 0.4,
            top_k: 3,
            cross_entropy: 0.3,
            temperature: 1.5,
            ..Losses::default()
        };
        let labels = Tensor::from_slice(&[3i64, -100, 0, 10, 2, -100, 7]);
        let of = |chunk_bytes: i64| {
            let leaf = |seed, size: &[i64]| randn(seed, size).set_requires_grad(true);
            let inputs = [leaf(1, &[n, hidden]), leaf(2, &[vocab, hidden]), leaf(3, &[vocab])];
            let function = OfFeatures {
                losses: losses.clone(),
                teacher: Teacher::Features(
                    randn(4, &[n, hidden]),
                    Vocabulary {
                        weight: randn(5, &[vocab, hidden]),
                        bias: Some(randn(6, &[vocab])),
                    },
                ),
                has_bias: true,
                labels: Some(labels.shallow_clone()),
                n_labels: 5.0,
                trains: [true, true],
                chunk_bytes,
            };
            // Not one, so that a backward pass that forgets to scale is seen.
            let loss = apply(function, &inputs.each_ref()).unwrap().remove(0) * 2.5;
            let grads = grad(&[&loss], &[] as &[Tensor], &inputs, GradOptions::default()).unwrap();
            (loss, grads)
        };

        let (whole, grads) = of(1 << 20);
        for rows in [1, 2, 3] {
            let (loss, parts) = of(rows * vocab * 8);
            assert_close("loss", &loss, &whole, 1e-13);
            for (part, whole) in parts.iter().zip(&grads) {
                assert_close("gradient", part.as_ref().unwrap(), whole.as_ref().unwrap(), 1e-13);
            }
        }
    }

    #[test]
    fn tokens_that_neither_expects_leave_numbers_numbers() {
        let logits = |values: &[f32]| Tensor::from_slice(values).view([1, 3]);
        let [student, teacher] = [logits(&[0.0, -200.0, 1.0]), logits(&[1.0, -300.0, 0.0])];
        let json = r#"{"forward_kl": 1.0, "reverse_kl": 1.0, "jensen_shannon": 1.0, "total_variation": 1.0,
            "top_k_kl": 1.0, "top_k": 2}"#;
        let losses: Losses = serde_json::from_str(json).unwrap();
        let (loss, grad) = losses.of_logits(&student, &Target::Logits(teacher), None, [1.0, 1.0]);
        assert!(loss.double_value(&[]).is_finite());
        assert_eq!(grad.isfinite().all().int64_value(&[]), 1, "{grad}");
    }

    #[test]
    fn each_field_out_of_range_is_named() {
        let kl = || Losses { forward_kl: 1.0, ..Losses::default() };
        let wrong = [
            ("forward_kl", Losses::default()),
            ("reverse_kl", Losses { reverse_kl: -1.0, ..kl() }),
            ("beta", Losses { beta: 1.0, ..kl() }),
            ("top_k", Losses { top_k: 0, ..kl() }),
            ("temperature", Losses { temperature: 0.0, ..kl() }),
            ("teacher_forced", Losses { teacher_forced: true, ..kl() }),
        ];
        for (name, losses) in wrong {
            match losses.validate() {
                Err(Error::Setting { field, .. }) => assert_eq!(field, name),
                other => panic!("{name}: {other:?}"),
            }
        }
        kl().validate().unwrap();
    }
}
