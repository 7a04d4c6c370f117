//! Whether the laws that training relies on hold of a model, tried on a little of the real data.

use attn_core::{
    ForwardOptions, Model, ModelInput, Output,
    laws::{Verdict, with_source},
};
use attn_data::batch::{Encoded, Side, collate};
use tch::{Kind, Tensor};

use crate::{
    batch::Batch,
    config::TrainConfig,
    divergence::Losses,
    error::{Error, Result},
    objective::Objective,
    optimizer::Optimizer,
    run::LawCheck,
};

/// Fewer tokens than this say little; a shorter text is repeated.
const MIN_PROBE_LEN: usize = 8;

/// Tries the laws of the model and of the loss on the two longest texts of a batch and returns the verdicts if all hold.
pub(crate) fn check_laws(
    laws: LawCheck,
    objective: &dyn Objective,
    model: &Model,
    batch: &Batch,
) -> Result<Vec<Verdict>> {
    let ids = probe(batch, model.config().sizes.position_table);
    let mut verdicts = laws(model, &ids.to_device(model.device()))?;
    verdicts.extend(objective.laws(&ids)?);
    let (held, broken): (Vec<_>, Vec<_>) = verdicts.into_iter().partition(Verdict::held);
    if broken.is_empty() { Ok(held) } else { Err(Error::Laws { broken }) }
}

/// Tokens of a row that a loss is tried on: all their logits are made at once.
const FEW: i64 = 16;

/// A loss below which nothing is told by it.
const TOO_NEAR: f64 = 1e-3;

/// A model that predicts something else than `model`, on the same memory but for vectors: norms and biases halved.
pub(crate) fn another(model: &Model) -> Result<Model> {
    let mut other = model.alias()?;
    let all = other.parameters();
    let vectors = || all.iter().filter(|(_, tensor)| tensor.dim() == 1);
    other.own(&|name| vectors().any(|it| it.0 == name));
    for (_, tensor) in other.parameters().iter().filter(|(_, tensor)| tensor.dim() == 1) {
        let _ = tch::no_grad(|| tensor.shallow_clone().g_mul_scalar_(0.5));
    }
    Ok(other)
}

/// The loss that `loss` makes of a teacher, a student and a batch is the one that `losses` name, worked out from the logits of both in
/// `f64`: from the teacher to the student and not the other way round, and each token against the teacher's at the same place. `ids`:
/// `[batch, seq_len]`; the divergences of whole predictions count alone. `None` where the two are so near on these tokens that the loss
/// either way round, and no loss at all, would look the same.
///
/// # Errors
///
/// Where a model cannot run on `ids`.
pub fn a_loss_is_what_it_is_called(
    losses: &Losses,
    teacher: &Model,
    student: &Model,
    ids: &Tensor,
    loss: &dyn Fn(&Model, &Model, &Batch) -> Result<Tensor>,
) -> Result<Option<Verdict>> {
    let student = student.alias_without_dropout()?;
    let ids = ids.narrow(1, 0, FEW.min(ids.size()[1]));
    let rows: Vec<Vec<i64>> = Vec::try_from(&ids).expect("ids have two axes");
    let rows: Vec<Encoded> = rows
        .into_iter()
        .enumerate()
        .map(|(index, ids)| Encoded {
            ids: ids.into_iter().map(|id| id as u32).collect(), // of the vocabulary
            label: None,
            index,
            second_from: None,
        })
        .collect();
    let batch: Batch = collate(&rows.iter().collect::<Vec<_>>(), 0, Side::Right).into();
    let found = tch::no_grad(|| loss(teacher, &student, &batch))?.double_value(&[]);
    let expected = tch::no_grad(|| -> Result<f64> {
        let taught = teacher.forward(&batch.input(teacher), &ForwardOptions::default())?.logits;
        let training = ForwardOptions { train: true, ..ForwardOptions::default() };
        let Output { logits, own_loss, .. } = student.forward(&batch.input(&student), &training)?;
        let own = own_loss.map_or(0.0, |it| it.double_value(&[]));
        Ok(by_definition(losses, &taught, &logits) + own)
    })?;
    if found.abs() < TOO_NEAR && expected.abs() < TOO_NEAR {
        return Ok(None);
    }
    let tolerance = match student.kind() {
        Kind::Half | Kind::BFloat16 => 2e-2,
        _ => 1e-4,
    };
    Ok(Some(Verdict {
        law: "a_loss_is_what_it_is_called",
        error: (found - expected).abs() / expected.abs().max(1e-2),
        tolerance,
        place: format!("{found:.6}, and by its definition {expected:.6}"),
    }))
}

/// The mean over tokens of the divergences of `student` from `teacher`, `[.., choices]` logits.
fn by_definition(losses: &Losses, teacher: &Tensor, student: &Tensor) -> f64 {
    let log = |x: &Tensor| (x.to_kind(Kind::Double) / losses.temperature).log_softmax(-1, None);
    let (log_p, log_q): (Tensor, Tensor) = (log(teacher), log(student));
    let (p, q) = (log_p.exp(), log_q.exp());
    let m = &p * losses.beta + &q * (1.0 - losses.beta);
    let log_m = m.log();
    let mean =
        |x: Tensor| x.sum_dim_intlist([-1i64].as_slice(), false, Kind::Double).mean(Kind::Double);
    let kl =
        |p: &Tensor, log_p: &Tensor, log_q: &Tensor| mean(p * (log_p - log_q)).double_value(&[]);
    let js = losses.beta * kl(&p, &log_p, &log_m) + (1.0 - losses.beta) * kl(&q, &log_q, &log_m);
    // The teacher's likeliest tokens, as it tells them apart itself, and all the others as one.
    let coarse = |x: &Tensor, ids: &Tensor| {
        let others = x.scatter_value(-1, ids, 0.0);
        let others = others.sum_dim_intlist([-1i64].as_slice(), true, Kind::Double);
        Tensor::cat(&[x.gather(-1, ids, false), others], -1)
    };
    let top_k_kl = || {
        let told = (teacher.to_kind(Kind::Float) / losses.temperature).log_softmax(-1, None);
        let n: i64 = told.size().last().copied().unwrap_or_default();
        let (_, ids) = told.topk(losses.top_k.min(n), -1, true, true);
        let [p, q] = [&p, &q].map(|it| coarse(it, &ids));
        let [log_p, log_q] = [&p, &q].map(|it| it.clamp_min(f64::MIN_POSITIVE).log());
        kl(&p, &log_p, &log_q)
    };
    let top_k_kl = if losses.top_k_kl > 0.0 { losses.top_k_kl * top_k_kl() } else { 0.0 };
    let all = top_k_kl
        + losses.forward_kl * kl(&p, &log_p, &log_q)
        + losses.reverse_kl * kl(&q, &log_q, &log_p)
        + losses.jensen_shannon * js
        + losses.total_variation * 0.5 * mean((&p - &q).abs()).double_value(&[]);
    all * losses.temperature.powi(2)
}

/// A step of AdamW on `ids` (`[batch, seq_len]`) moves every parameter that the loss depends on, and leaves those that are frozen as
/// they were to the bit: every second one, then the others. The model is then put back to `before`, its parameters as they are.
///
/// # Errors
///
/// Where the model cannot run on `ids`.
pub fn a_step_moves_what_is_trained_alone(
    model: &Model,
    before: &[Tensor],
    ids: &Tensor,
) -> Result<Verdict> {
    moves_what_is_trained_alone(model, before, ids, &|optimizer, slopes, lr| {
        optimizer.step(slopes, lr)
    })
}

/// A step by slopes at a rate.
type Stepping<'a> = &'a dyn Fn(&mut Optimizer, &[Option<Tensor>], f64) -> Result<()>;

fn moves_what_is_trained_alone(
    model: &Model,
    before: &[Tensor],
    ids: &Tensor,
    step: Stepping<'_>,
) -> Result<Verdict> {
    let all = model.parameters();
    let mut wrong = Vec::new();
    for parity in [0, 1] {
        let found = after_a_step(model, before, ids, parity, step);
        for ((_, now), before) in all.iter().zip(before) {
            let mut now = now.set_requires_grad(false);
            tch::no_grad(|| now.copy_(before));
        }
        wrong.extend(found?);
    }
    Ok(Verdict {
        law: "a_step_moves_what_is_trained_alone",
        error: wrong.len() as f64,
        tolerance: 0.0,
        place: match wrong.first() {
            None => format!("{} parameters, half of them at a time", all.len()),
            Some(first) => first.clone(),
        },
    })
}

/// What is wrong after a step in which each parameter at an odd place behind `parity` was frozen.
fn after_a_step(
    model: &Model,
    before: &[Tensor],
    ids: &Tensor,
    parity: usize,
    step: Stepping<'_>,
) -> Result<Vec<String>> {
    let all = model.parameters();
    let frozen = all.iter().skip(1 - parity).step_by(2).map(|it| it.0.clone()).collect();
    // A step that is not lost in rounding: a weight of 1 has neighbours 0.008 away in bf16.
    let lr = if model.kind() == Kind::Float || model.kind() == Kind::Double { 1e-3 } else { 0.1 };
    let config = TrainConfig { lr, freeze: frozen, ..TrainConfig::default() };
    let mut optimizer = Optimizer::new(model, &config)?.quiet();
    let input = with_source(model, ModelInput::new(ids.shallow_clone()));
    // Any loss that every output has a part in.
    let loss = tch::with_grad(|| -> Result<Tensor> {
        let output = model.forward(&input, &ForwardOptions::default())?;
        Ok(output.logits.to_kind(Kind::Float).square().mean(Kind::Float))
    })?;
    let slopes = Tensor::run_backward(&[&loss], optimizer.params(), false, false);
    let slopes: Vec<Option<Tensor>> =
        slopes.into_iter().map(|it| it.defined().then_some(it)).collect();
    step(&mut optimizer, &slopes, config.lr)?;
    let mut wrong = Vec::new();
    for ((name, now), before) in all.iter().zip(before) {
        let row = optimizer.names().iter().position(|it| it == name);
        let slope = row.and_then(|row| slopes[row].as_ref());
        // A slope of rounding, as that of keys' biases, moves nothing to speak of.
        let moves = slope.is_some_and(|it| it.abs().max().double_value(&[]) > 1e-6);
        match (moves, now.equal(before)) {
            (true, true) => wrong.push(format!("{name} has a gradient and did not move")),
            (false, false) if row.is_none() => wrong.push(format!("{name} is frozen and moved")),
            _ => {}
        }
    }
    Ok(wrong)
}

/// `[2, len]` real tokens, as many as the second longest text has (`[1, len]` of a batch of one).
fn probe(batch: &Batch, position_table: Option<i64>) -> Tensor {
    let rows = &batch.rows;
    let mut texts: Vec<Vec<i64>> = (0..rows.rows)
        .map(|row| {
            let cells = row * rows.cols..(row + 1) * rows.cols;
            cells.filter(|&cell| rows.mask[cell] == 1).map(|cell| rows.ids[cell]).collect()
        })
        .filter(|text: &Vec<i64>| !text.is_empty())
        .collect();
    texts.sort_by_key(|text| std::cmp::Reverse(text.len()));
    texts.truncate(2);
    if texts.is_empty() {
        texts.push(vec![0]);
    }
    let room = position_table.map_or(usize::MAX, |table| table as usize);
    let shortest = texts.last().map_or(0, Vec::len);
    let len = shortest.max(MIN_PROBE_LEN).min(room);
    let ids: Vec<i64> =
        texts.iter().flat_map(|text| text.iter().copied().cycle().take(len)).collect();
    Tensor::from_slice(&ids).view([texts.len() as i64, len as i64])
}

#[cfg(test)]
mod tests {
    use attn_core::{
        Config, LoadOptions,
        attention::Stream,
        testing::{randn, random_ids},
    };
    use serde_json::{Value, json};

    use super::*;
    use crate::distill::Distillation;

    /// A small random GPT-2, far from its start, with dropout.
    fn model() -> Model {
        let Value::Object(map) = json!({
            "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 50, "n_positions": 48,
            "n_embd": 24, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.3, "attn_pdrop": 0.3, "embd_pdrop": 0.3,
        }) else {
            unreachable!("written as an object above")
        };
        let model = Model::init(Config::from_json(map).unwrap(), &LoadOptions::default()).unwrap();
        for (i, (_, tensor)) in model.parameters().iter().enumerate() {
            let noise = randn(1000 + i as u64, &tensor.size()).to_kind(Kind::Float) * 0.2;
            tch::no_grad(|| tensor.shallow_clone().copy_(&(tensor + noise)));
        }
        model
    }

    fn copies(model: &Model) -> Vec<Tensor> {
        model.parameters().iter().map(|it| it.1.copy()).collect()
    }

    #[test]
    fn every_fault_of_a_step_is_named() {
        let ids = random_ids(5, [2, 12], 50);
        let verdict = |model: &Model, step: Stepping<'_>| {
            let before = copies(model);
            let found = moves_what_is_trained_alone(model, &before, &ids, step).unwrap();
            assert!(model.parameters().iter().zip(&before).all(|((_, now), it)| now.equal(it)));
            found
        };
        let plain: Stepping<'_> = &|optimizer, slopes, lr| optimizer.step(slopes, lr);
        let sound = model();
        assert!(verdict(&sound, plain).held());

        // Decay of all that there is, frozen or not.
        let decaying = verdict(&sound, &|optimizer, slopes, lr| {
            for (_, tensor) in sound.parameters() {
                let _ = tch::no_grad(|| tensor.shallow_clone().g_mul_scalar_(0.99));
            }
            optimizer.step(slopes, lr)
        });
        assert!(decaying.place.ends_with("is frozen and moved"), "{decaying}");
        // No step at all.
        let idle = verdict(&sound, &|_, _, _| Ok(()));
        assert!(idle.place.ends_with("has a gradient and did not move"), "{idle}");
    }

    #[test]
    fn every_fault_of_a_divergence_is_named() {
        let teacher = model();
        let student = another(&teacher).unwrap();
        let ids = random_ids(5, [2, 20], 50);
        for losses in [
            Losses { forward_kl: 1.0, ..Losses::default() },
            Losses { reverse_kl: 0.5, temperature: 2.0, ..Losses::default() },
            Losses { jensen_shannon: 1.0, beta: 0.3, total_variation: 0.7, ..Losses::default() },
            Losses { top_k_kl: 1.0, top_k: 8, temperature: 2.0, ..Losses::default() },
            Losses { top_k_kl: 1.0, top_k: 1_000, ..Losses::default() },
        ] {
            let plain = |teacher: &Model, student: &Model, batch: &Batch| {
                let distillation = Distillation::new(teacher, student, &losses)?;
                distillation.loss(student, batch, Stream::default())
            };
            let verdict = |loss: &dyn Fn(&Model, &Model, &Batch) -> Result<Tensor>| {
                let told = a_loss_is_what_it_is_called(&losses, &teacher, &student, &ids, loss);
                told.unwrap().expect("the two are far apart")
            };
            let right = verdict(&plain);
            assert!(right.held(), "{right}");
            // From the student to the teacher. Of a teacher that drops nothing, else it would be another for that alone.
            let reversed = verdict(&|teacher, student, batch| {
                plain(student, &teacher.alias_without_dropout()?, batch)
            });
            assert!(!reversed.held(), "{losses:?}: {reversed}");
            // The teacher one token late.
            let shifted = verdict(&|teacher, student, batch| {
                let of = |model: &Model| -> Result<Tensor> {
                    Ok(model.forward(&batch.input(model), &ForwardOptions::default())?.logits)
                };
                let late = of(teacher)?.roll([1], [1]);
                Ok(Tensor::from(by_definition(&losses, &late, &of(student)?)))
            });
            assert!(!shifted.held(), "{losses:?}: {shifted}");
        }
        // What training tries before its first step.
        let losses = Losses { forward_kl: 1.0, cross_entropy: 1.0, ..Losses::default() };
        let found = Distillation::new(&teacher, &student, &losses).unwrap().laws(&ids).unwrap();
        assert!(found.len() == 1 && found[0].held(), "{found:?}");
    }

    fn ids(texts: &[&[u32]], position_table: Option<i64>) -> (Vec<i64>, Vec<i64>) {
        let rows: Vec<Encoded> = texts
            .iter()
            .map(|ids| Encoded { ids: ids.to_vec(), label: None, index: 0, second_from: None })
            .collect();
        let batch = collate(&rows.iter().collect::<Vec<_>>(), 0, Side::Left).into();
        let probe = probe(&batch, position_table);
        (probe.size(), Vec::try_from(probe.view([-1])).unwrap())
    }

    #[test]
    fn the_longest_texts_are_taken_without_padding() {
        let long: Vec<u32> = (1..=30).collect();
        let (size, values) = ids(&[&[7], &long, &long[..9]], None);
        assert_eq!(size, [2, 9]);
        assert_eq!(values[..9], [1, 2, 3, 4, 5, 6, 7, 8, 9]);
        assert_eq!(values[..9], values[9..]);
        assert_eq!(ids(&[&long, &long], None).0, [2, 30]);
        assert_eq!(ids(&[&long, &long], Some(12)).0, [2, 12]);
    }

    #[test]
    fn short_texts_are_repeated() {
        let (size, values) = ids(&[&[5, 6, 7]], None);
        assert_eq!((size, values), (vec![1, 8], vec![5, 6, 7, 5, 6, 7, 5, 6]));
        assert_eq!(ids(&[&[]], None).0, [1, 8]);
    }
}
