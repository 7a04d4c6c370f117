//! Whether the laws that training relies on hold of a model, tried on a little of the real data.

use attn_core::{
    ForwardOptions, Model, ModelInput,
    laws::{Verdict, with_source},
};
use tch::{Kind, Tensor};

use crate::{
    batch::Batch,
    config::TrainConfig,
    error::{Error, Result},
    optimizer::Optimizer,
    run::LawCheck,
};

/// Fewer tokens than this say little; a shorter text is repeated.
const MIN_PROBE_LEN: usize = 8;

/// Tries the laws on the two longest texts of a batch and returns the verdicts if all hold.
pub(crate) fn check_laws(laws: LawCheck, model: &Model, batch: &Batch) -> Result<Vec<Verdict>> {
    let ids = probe(batch, model.config().sizes.position_table);
    let verdicts = laws(model, &ids.to_device(model.device()))?;
    let (held, broken): (Vec<_>, Vec<_>) = verdicts.into_iter().partition(Verdict::held);
    if broken.is_empty() { Ok(held) } else { Err(Error::Laws { broken }) }
}

/// A step of AdamW on `ids` (`[batch, seq_len]`) moves every parameter that the loss depends on, and leaves those that are frozen as
/// they were to the bit: every second one, then the others. The model is then put back.
///
/// # Errors
///
/// Where the model cannot run on `ids`.
pub fn a_step_moves_what_is_trained_alone(model: &Model, ids: &Tensor) -> Result<Verdict> {
    let all = model.parameters();
    let before: Vec<Tensor> = all.iter().map(|it| it.1.detach().copy()).collect();
    let mut wrong = Vec::new();
    for parity in [0, 1] {
        let found = after_a_step(model, ids, parity, &before);
        for ((_, now), before) in all.iter().zip(&before) {
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
    ids: &Tensor,
    parity: usize,
    before: &[Tensor],
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
    optimizer.step(&slopes, config.lr)?;
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
    use attn_data::batch::{Encoded, Side, collate};

    use super::*;

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
