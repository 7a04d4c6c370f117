//! Laws of a whole model on a user's own text.

use std::path::Path;

use tch::{Kind, Tensor};

use super::{NOWHERE, Verdict, Worst, normals, relative_rms};
use crate::{
    Error, ForwardOptions, Gate, LoadOptions, Model, ModelInput, attention::Projections,
    checkpoint::WriteOptions, config::Head, kv_heads::space::in_planes, layer::AttnLayer,
};

/// How exact a law of a whole model can be in `kind`.
fn model_tolerance(kind: Kind) -> f64 {
    match kind {
        Kind::Double => 1e-12,
        Kind::Half => 5e-3,
        Kind::BFloat16 => 2e-2,
        _ => 1e-5,
    }
}

/// Tokens that suffice for the laws of padding and gates. Choices may tip over where what is compared to a tolerance is
/// computed at another place, the more often the more there are: short texts have none.
const SHORT: i64 = 24;

/// The laws of a whole model that are cheap enough for every start: the future is not seen, padding changes nothing,
/// open gates change nothing. `ids`: `[batch, seq_len]`, a few rows of real text as long as the model is used on: a kind
/// that leaves out what is far, or works by chunks, can see the future of a long text alone.
///
/// # Errors
/// Where the model cannot run on `ids`.
pub fn for_model(model: &Model, ids: &Tensor) -> Result<Vec<Verdict>, Error> {
    tch::no_grad(|| {
        let short = ids.narrow(1, 0, SHORT.min(ids.size()[1]));
        let mut verdicts = vec![model_padding(model, &short)?, open_gates(model, &short)?];
        if model.config().is_causal() {
            verdicts.push(model_causality(model, ids)?);
        }
        Ok(verdicts)
    })
}

/// `input`, attending to itself where `model` needs another sequence.
pub fn with_source(model: &Model, input: ModelInput) -> ModelInput {
    if !model.needs_source() {
        return input;
    }
    let source = ModelInput {
        attention_mask: input.attention_mask.as_ref().map(Tensor::shallow_clone),
        ..ModelInput::new(input.input_ids.shallow_clone())
    };
    input.attending_to(source)
}

fn last_hidden(model: &Model, input: ModelInput) -> Result<Tensor, Error> {
    Ok(outputs(model, input)?.0)
}

/// The last hidden states, and the logits of a classifier.
fn outputs(model: &Model, input: ModelInput) -> Result<(Tensor, Option<Tensor>), Error> {
    let mut output = model.forward(&with_source(model, input), &hidden_alone(model))?;
    let hidden = output.hidden_states.pop().expect("hidden states were asked for");
    let classifies = matches!(model.config().head, Head::Classifier { .. });
    Ok((hidden, classifies.then_some(output.logits)))
}

/// The largest error of a place along `dim`, rms of the difference over that of what is expected there, and the place.
fn worst_place(actual: &Tensor, expected: &Tensor, dim: i64) -> (f64, i64) {
    let wide = |x: &Tensor| x.detach().to_kind(Kind::Double);
    let others: Vec<i64> = (0..actual.dim() as i64).filter(|&it| it != dim).collect();
    let rms = |x: Tensor| x.square().mean_dim(&others[..], false, Kind::Double).sqrt();
    let scale = rms(wide(expected)).clamp_min(f64::MIN_POSITIVE.sqrt());
    let errors = rms(wide(actual) - wide(expected)) / scale; // [places]
    let at = errors.argmax(0, false).int64_value(&[]);
    (errors.double_value(&[at]), at)
}

/// Hidden states, and no logits over the vocabulary: over a whole text these are wider than all else.
fn hidden_alone(model: &Model) -> ForwardOptions<'static> {
    let before_vocabulary = model.config().head == Head::LanguageModel;
    ForwardOptions { hidden_states: true, before_vocabulary, ..ForwardOptions::default() }
}

/// Changes each token in turn: hidden states before it must not move.
///
/// # Errors
/// Where the model cannot run on `ids`.
pub fn model_causality(model: &Model, ids: &Tensor) -> Result<Verdict, Error> {
    let n = ids.size()[1];
    let before = last_hidden(model, ModelInput::new(ids.shallow_clone()))?;
    let mut worst = Worst::new();
    let mut moved = false;
    for t in [n / 3, n / 2, n - 1].into_iter().filter(|&t| t > 0) {
        let changed = ids.copy();
        let token = changed.narrow(1, t, 1);
        let other = (&token + 1).remainder(model.config().sizes.vocab_size);
        token.shallow_clone().copy_(&other);
        let after = last_hidden(model, ModelInput::new(changed))?;
        let past = |x: &Tensor| x.narrow(1, 0, t);
        let (error, at) = worst_place(&past(&after), &past(&before), 1);
        worst.see(error, || format!("token {at} when token {t} of {n} changes"));
        moved |= relative_rms(&after.narrow(1, t, 1), &before.narrow(1, t, 1)) > 0.0;
    }
    if !moved {
        // Else the law would hold of a model that ignores its input.
        worst.see(f64::NAN, || "no output moves when a token changes".into());
    }
    Ok(worst.verdict("a_causal_model_ignores_the_future", model_tolerance(model.kind())))
}

/// Pads in front and behind: hidden states of real tokens must not move.
///
/// # Errors
/// Where the model cannot run on `ids`.
pub fn model_padding(model: &Model, ids: &Tensor) -> Result<Verdict, Error> {
    let room = model.config().sizes.position_table.unwrap_or(i64::MAX);
    let pad = 3.min(room - ids.size()[1]).max(0);
    let ids =
        if pad == 0 { ids.narrow(1, 0, (ids.size()[1] - 3).max(1)) } else { ids.shallow_clone() };
    let pad = if pad == 0 { 3.min(room - ids.size()[1]) } else { pad };
    let [b, n] = ids.size()[..] else { unreachable!("ids have two axes") };
    let (plain, plain_classes) = outputs(model, ModelInput::new(ids.shallow_clone()))?;
    let filler =
        Tensor::full([b, pad], model.config().sizes.vocab_size - 1, (Kind::Int64, ids.device()));
    let ones = Tensor::ones([b, n], (Kind::Int64, ids.device()));
    let zeros = filler.zeros_like();
    let mut worst = Worst::new();
    for (side, start, order) in [("left", pad, [&filler, &ids]), ("right", 0, [&ids, &filler])] {
        let keep = if start > 0 { [&zeros, &ones] } else { [&ones, &zeros] };
        let input = ModelInput::masked(Tensor::cat(&order, 1), Tensor::cat(&keep, 1));
        let (real, classes) = outputs(model, input)?;
        worst.see(relative_rms(&real.narrow(1, start, n), &plain), || {
            format!("{pad} tokens of padding on the {side}")
        });
        if let (Some(classes), Some(plain)) = (classes, &plain_classes) {
            worst.see(relative_rms(&classes, plain), || {
                format!("the classes, {pad} tokens of padding on the {side}")
            });
        }
    }
    Ok(worst.verdict("padding_changes_nothing", model_tolerance(model.kind())))
}

/// Gates of one must change no bit.
///
/// # Errors
/// Where the model cannot run on `ids`.
pub fn open_gates(model: &Model, ids: &Tensor) -> Result<Verdict, Error> {
    let input = with_source(model, ModelInput::new(ids.shallow_clone()));
    let options = (model.kind(), model.device());
    let gates: Vec<Option<Gate>> = model
        .layers()
        .iter()
        .map(|layer| Some(Gate::per_head(&Tensor::ones([layer.dims().n_heads], options))))
        .collect();
    let plain = model.forward(&input, &ForwardOptions::default())?.logits;
    let gated = model
        .forward(&input, &ForwardOptions { gates: &gates, ..ForwardOptions::default() })?
        .logits;
    // A model that gives no numbers gives none either way.
    let is_other = plain.ne_tensor(&gated).logical_and(&plain.isnan().logical_not());
    let n_moved = is_other.sum(Kind::Int64).double_value(&[]);
    Ok(Verdict {
        law: "open_gates_change_no_bit",
        error: n_moved,
        tolerance: 0.0,
        place: if n_moved > 0.0 { "logits that moved".into() } else { NOWHERE.into() },
    })
}

/// Decodes token by token and compares with the full pass, logits for logits.
///
/// # Errors
/// Where the model cannot run on `ids`, or does not decode.
pub fn model_decoding(model: &Model, ids: &Tensor) -> Result<Verdict, Error> {
    let options = hidden_alone(model);
    let full = last_hidden(model, ModelInput::new(ids.shallow_clone()))?;
    let mut state = model.start();
    let mut worst = Worst::new();
    for t in 0..ids.size()[1] {
        let input = ModelInput::new(ids.narrow(1, t, 1));
        let hidden = model
            .step(&input, &mut state, &options)?
            .hidden_states
            .pop()
            .expect("hidden states were asked for");
        worst.see(relative_rms(&hidden, &full.narrow(1, t, 1)), || {
            format!("token {t} of {}, rows {}", ids.size()[1], ids.size()[0])
        });
    }
    Ok(worst.verdict("steps_equal_a_full_pass", model_tolerance(model.kind())))
}

/// A text that is read at once but for its end, and then token by token, is what it is as a whole.
///
/// # Errors
/// Where the model cannot run on `ids`, or does not decode.
pub fn model_prefill(model: &Model, ids: &Tensor) -> Result<Verdict, Error> {
    let n = ids.size()[1];
    let first = (n - n / 4).max(1);
    let full = last_hidden(model, ModelInput::new(ids.shallow_clone()))?;
    let mut state = model.start();
    let mut worst = Worst::new();
    let starts = std::iter::once((0, first)).chain((first..n).map(|t| (t, 1)));
    for (t, len) in starts {
        let input = ModelInput::new(ids.narrow(1, t, len));
        let output = model.step(&input, &mut state, &hidden_alone(model))?;
        let hidden = output.hidden_states.last().expect("hidden states were asked for");
        worst.see(relative_rms(hidden, &full.narrow(1, t, len)), || format!("token {t} of {n}"));
    }
    Ok(worst.verdict("a_beginning_and_steps_equal_a_full_pass", model_tolerance(model.kind())))
}

/// A language model fits a text better than one that finds all tokens equally likely: where its embedding was never filled, it
/// does not. `mask_id` hides every seventh token from a model that reads both sides.
///
/// # Errors
/// Where the model cannot run on `ids`; [`Error::Refused`] for a model that predicts no tokens, and for one that reads both sides
/// without `mask_id`.
pub fn better_than_chance(
    model: &Model,
    ids: &Tensor,
    mask_id: Option<i64>,
) -> Result<Verdict, Error> {
    if model.config().head != Head::LanguageModel {
        return Err(says_nothing(model, "it predicts no tokens"));
    }
    let ids = ids.narrow(0, 0, 1);
    let n = ids.size()[1];
    let (read, at, wanted) = match (model.config().is_causal(), mask_id) {
        (true, _) => (ids.shallow_clone(), (0..n - 1).collect(), ids.narrow(1, 1, n - 1)),
        (false, None) => return Err(says_nothing(model, "its tokenizer has no mask token")),
        (false, Some(mask_id)) => {
            let at: Vec<i64> = (0..n).filter(|place| place % 7 == 3).collect();
            let places = Tensor::from_slice(&at).to_device(ids.device());
            let read = ids.copy().index_fill(1, &places, mask_id);
            (read, at, ids.index_select(1, &places))
        }
    };
    let places = Tensor::from_slice(&at).to_device(ids.device());
    let options = ForwardOptions { logits_at: Some(&places), ..ForwardOptions::default() };
    let logits = model.forward(&with_source(model, ModelInput::new(read)), &options)?.logits;
    let log_p = logits.log_softmax(-1, Kind::Float); // [places, vocab_size]
    let loss = log_p.gather(1, &wanted.view([-1, 1]), false).mean(Kind::Double);
    let (loss, chance) = (-loss.double_value(&[]), (model.config().sizes.vocab_size as f64).ln());
    Ok(Verdict {
        law: "predictions_are_better_than_chance",
        error: loss - chance,
        tolerance: 0.0,
        place: format!("{loss:.3} nats a token, where all alike have {chance:.3}"),
    })
}

/// No value of a parameter is infinite or no number.
pub fn finite_parameters(model: &Model) -> Verdict {
    let mut worst = Worst::new();
    for (name, tensor) in model.parameters() {
        let n = tensor.isfinite().logical_not().sum(Kind::Int64).double_value(&[]);
        worst.see(n, || format!("values of {name} that are no finite numbers"));
    }
    worst.verdict("every_parameter_is_finite", 0.0)
}

/// No two layers have the same queries, or a parameter in common: one module in the place of all.
pub fn layers_of_their_own(model: &Model) -> Verdict {
    let layers = model.layers();
    let mut worst = Worst::new();
    for (j, later) in layers.iter().enumerate() {
        for (i, earlier) in layers[..j].iter().enumerate() {
            let is_one = f64::from(u8::from(are_one(earlier, later)));
            worst.see(is_one, || format!("layers {i} and {j} are one"));
        }
    }
    worst.verdict("every_layer_has_an_attention_of_its_own", 0.0)
}

fn are_one(a: &AttnLayer, b: &AttnLayer) -> bool {
    let memory = |layer: &AttnLayer| {
        let mut all = Vec::new();
        layer.visit(&mut |_, tensor| {
            if tensor.numel() > 0 {
                all.push(tensor.data_ptr());
            }
        });
        all
    };
    let (own, other) = (memory(a), memory(b));
    let [q, other_q] = [a, b].map(|layer| layer.projections().q.0);
    own.iter().any(|it| other.contains(it))
        || (q.numel() > 0 && q.size() == other_q.size() && q.equal(&other_q))
}

/// Changes what goes into each causal layer from a token on: what its heads make of the tokens before must not move.
/// [`model_causality`] says whether a model sees the future, this in which layer.
///
/// # Errors
/// Where the model cannot run on `ids`.
pub fn layer_causality(model: &Model, ids: &Tensor) -> Result<Verdict, Error> {
    let n = ids.size()[1];
    let input = with_source(model, ModelInput::new(ids.shallow_clone()));
    let options = ForwardOptions { attention_inputs: true, ..hidden_alone(model) };
    let inputs = model.forward(&input, &options)?.attention_inputs;
    let mut worst = Worst::new();
    let mut moved = false;
    for (layer, x) in inputs.iter().enumerate() {
        let of = model.layers()[layer];
        if of.kind().needs_source() || !of.dims().causal || of.dims().n_heads == 0 {
            continue;
        }
        let z = |x: Tensor| -> Result<Tensor, Error> {
            let found = model.attend(&input, &[layer], &[x], &ForwardOptions::default())?;
            Ok(found.z.into_iter().next().expect("an output a layer"))
        };
        let before = z(x.shallow_clone())?;
        for t in [n / 3, n / 2, n - 1].into_iter().filter(|&t| t > 0) {
            let changed = x.copy();
            let later = changed.narrow(1, t, n - t);
            later.shallow_clone().copy_(&(&later * -2.0 + 0.5));
            let after = z(changed)?;
            let past = |z: &Tensor| z.narrow(2, 0, t);
            let (error, at) = worst_place(&past(&after), &past(&before), 2);
            let kind = of.variant().name();
            worst.see(error, || {
                format!("layer {layer} ({kind}), token {at} when those from {t} of {n} change")
            });
            moved |= relative_rms(&after.narrow(2, t, 1), &before.narrow(2, t, 1)) > 0.0;
        }
    }
    if !moved {
        return Err(says_nothing(model, "no layer of its own text is causal, or none moves"));
    }
    Ok(worst.verdict("no_layer_sees_the_future", model_tolerance(model.kind())))
}

/// Rows of different lengths in one batch, padded behind or in front, each by another amount, are what each is alone. `ids`:
/// `[batch, seq_len]`, of at least two rows.
///
/// # Errors
/// Where the model cannot run on `ids`.
pub fn model_batch(model: &Model, ids: &Tensor) -> Result<Verdict, Error> {
    let [b, n] = ids.size()[..] else { unreachable!("ids have two axes") };
    let lengths: Vec<i64> = (0..b).map(|row| (n - row * n / (b + 1)).max(1)).collect();
    let row_of = |x: &Tensor, row: usize| x.narrow(0, row as i64, 1);
    let alone = lengths
        .iter()
        .enumerate()
        .map(|(row, &len)| outputs(model, ModelInput::new(row_of(ids, row).narrow(1, 0, len))));
    let alone: Vec<_> = alone.collect::<Result<_, _>>()?;
    let mut worst = Worst::new();
    for side in ["behind", "in front"] {
        let start = |len: i64| if side == "behind" { 0 } else { n - len };
        let read = ids.zeros_like();
        let keep = ids.zeros_like();
        for (row, &len) in lengths.iter().enumerate() {
            let place = |x: &Tensor| row_of(x, row).narrow(1, start(len), len);
            place(&read).copy_(&row_of(ids, row).narrow(1, 0, len));
            let _ = place(&keep).fill_(1);
        }
        let (whole, classes) = outputs(model, ModelInput::masked(read, keep))?;
        for (row, (&len, (hidden, own_classes))) in lengths.iter().zip(&alone).enumerate() {
            let real = row_of(&whole, row).narrow(1, start(len), len);
            worst.see(relative_rms(&real, hidden), || {
                format!("row {row} of {b}, {len} tokens of {n}, padded {side}")
            });
            if let (Some(all), Some(own)) = (&classes, own_classes) {
                worst.see(relative_rms(&row_of(all, row), own), || {
                    format!("the classes of row {row} of {b}, padded {side}")
                });
            }
        }
    }
    Ok(worst.verdict("a_batch_equals_its_rows", model_tolerance(model.kind())))
}

/// A model is in its own precision what it is in `wide`, `f64`, ten times the tolerance of other laws allowed.
///
/// # Errors
/// Where the models cannot run on `ids`.
pub fn model_precision(model: &Model, wide: &Model, ids: &Tensor) -> Result<Verdict, Error> {
    let run = |model: &Model| last_hidden(model, ModelInput::new(ids.shallow_clone()));
    let mut worst = Worst::new();
    worst.see(relative_rms(&run(model)?, &run(wide)?), || "the last hidden states".into());
    Ok(worst.verdict("rounding_stays_small", 10.0 * model_tolerance(model.kind())))
}

/// How many nats decide between tokens.
const DECIDES: f64 = 0.05;

/// The logits at a token are of the next one: they fit it better than the token itself, and better than the one after.
///
/// # Errors
/// Where the model cannot run on `ids`; [`Error::Input`] for fewer than three tokens; [`Error::Refused`] where the three fit alike:
/// the text says nothing to the model, or it was not trained.
///
/// # Panics
/// For a model that does not end in logits over the vocabulary.
pub fn next_token(model: &Model, ids: &Tensor) -> Result<Verdict, Error> {
    assert!(model.config().head == Head::LanguageModel, "a language model");
    let n = ids.size()[1];
    if n < 3 {
        return Err(Error::Input { name: "ids", problem: format!("{n} tokens, expected 3") });
    }
    let input = with_source(model, ModelInput::new(ids.shallow_clone()));
    let logits = model.forward(&input, &ForwardOptions::default())?.logits;
    let log_p = logits.narrow(1, 0, n - 2).log_softmax(-1, Kind::Float);
    let [own, next, after] = [0, 1, 2].map(|shift| {
        let tokens = ids.narrow(1, shift, n - 2).unsqueeze(-1);
        -log_p.gather(2, &tokens, false).mean(Kind::Double).double_value(&[])
    });
    if (next - own.min(after)).abs() < DECIDES {
        return Err(says_nothing(model, "it predicts no token of this text better than others"));
    }
    Ok(Verdict {
        law: "predictions_are_of_the_next_token",
        error: next - own.min(after),
        tolerance: 0.0,
        place: format!(
            "nats for the token itself {own:.3}, the next {next:.3}, the one after {after:.3}"
        ),
    })
}

/// Why a law says nothing of a model.
fn says_nothing(model: &Model, reason: &str) -> Error {
    let kind = model.layers().first().map_or("softmax", |layer| layer.variant().name());
    Error::Refused { kind, what: "be held to this law", reason: reason.into() }
}

/// The last hidden states with the gate of each of `heads` closed in turn: layers and places in them. [`removed_heads`] and
/// [`head_slices`] say whether that leaves the head out.
///
/// # Errors
/// Where the model cannot run on `ids`.
pub fn closed_heads(
    model: &Model,
    ids: &Tensor,
    heads: &[(usize, i64)],
) -> Result<Vec<Tensor>, Error> {
    let layers = model.layers();
    let input = with_source(model, ModelInput::new(ids.shallow_clone()));
    let closed = |&(layer, head): &(usize, i64)| {
        let gate = Tensor::ones([layers[layer].dims().n_heads], (model.kind(), model.device()));
        let _ = gate.get(head).fill_(0.0);
        let gates: Vec<Option<Gate>> =
            (0..layers.len()).map(|at| (at == layer).then(|| Gate::per_head(&gate))).collect();
        let options = ForwardOptions { gates: &gates, ..hidden_alone(model) };
        let found = model.forward(&input, &options)?.hidden_states;
        Ok(found.into_iter().next_back().expect("hidden states were asked for"))
    };
    heads.iter().map(closed).collect()
}

/// A model that a head was removed from computes what the whole one does with that head left out: `left_out`, as [`closed_heads`] makes
/// them of the same `heads`. Those that others attend by
/// ([`Attention::couples_heads`](crate::attention::Attention::couples_heads)) are passed over.
///
/// # Errors
/// Where the model cannot run on `ids`; [`Error::Refused`] where the kind at work cannot lose a head, or none is left.
pub fn removed_heads(
    model: &Model,
    ids: &Tensor,
    heads: &[(usize, i64)],
    left_out: &[Tensor],
) -> Result<Verdict, Error> {
    let mut worst = Worst::new();
    let mut is_tried = false;
    for (&(layer, head), left_out) in heads.iter().zip(left_out) {
        let n_heads = model.layers()[layer].dims().n_heads;
        if n_heads < 2 || model.layers()[layer].kind().couples_heads() {
            continue;
        }
        let kept: Vec<i64> = (0..n_heads).filter(|&it| it != head).collect();
        let mut smaller = model.alias()?;
        match smaller.select_heads(layer, &kept) {
            // A layer that cannot follow says nothing of the others.
            Err(Error::Refused { .. }) => continue,
            selected => selected?,
        }
        let removed = last_hidden(&smaller, ModelInput::new(ids.shallow_clone()))?;
        worst.see(relative_rms(&removed, left_out), || format!("head {layer}-{head}"));
        is_tried = true;
    }
    if !is_tried {
        return Err(says_nothing(model, "no layer has two heads that attend each for itself"));
    }
    Ok(worst.verdict("a_removed_head_is_a_masked_one", model_tolerance(model.kind())))
}

/// The columns of the output projection that belong to a head are that head's: zeros in their place, put there by hand, do what
/// leaving it out does, `left_out` as in [`removed_heads`].
///
/// # Errors
/// Where the model cannot run on `ids`.
///
/// # Panics
/// Where a layer's output projection is no parameter of the model.
pub fn head_slices(
    model: &Model,
    ids: &Tensor,
    heads: &[(usize, i64)],
    left_out: &[Tensor],
) -> Result<Verdict, Error> {
    if heads.is_empty() {
        return Err(says_nothing(model, "it has no heads"));
    }
    let mut worst = Worst::new();
    for (&(layer, head), left_out) in heads.iter().zip(left_out) {
        let name = format!("{}.weight", model.layers()[layer].out().name);
        let mut changed = model.alias()?;
        changed.own(&|it| it.ends_with(&name));
        let of = changed.layers()[layer];
        let weight = of.out().out_in(); // [hidden_size, n_heads · head_dim]
        let shared = model.layers()[layer].out().out_in();
        assert_ne!(weight.data_ptr(), shared.data_ptr(), "the model itself stays as it is");
        let d = of.dims().head_dim;
        let _ = weight.narrow(1, head * d, d).fill_(0.0);
        let by_hand = last_hidden(&changed, ModelInput::new(ids.shallow_clone()))?;
        worst.see(relative_rms(&by_hand, left_out), || format!("head {layer}-{head}"));
    }
    Ok(worst.verdict("the_output_columns_of_a_head_are_its_own", model_tolerance(model.kind())))
}

/// Turns the queries and keys of each key/value head by one random rotation, and every query head that reads it alike: their products stay.
/// Where positions turn them, too, a rotation of each plane by an angle of its own, which comes to the same before and after. Layers whose
/// kind looks at coordinates are passed over.
///
/// # Errors
/// Where the model cannot run on `ids`; [`Error::Refused`] where every kind at work looks at coordinates.
pub fn turned_queries_and_keys(
    model: &Model,
    ids: &Tensor,
    layers: &[usize],
) -> Result<Verdict, Error> {
    let mut draw = normals(14);
    let fits = |of: &AttnLayer| !of.kind().nature().reads_coordinates;
    let changed = changed_layers(model, layers, fits, |of, projections| {
        let dims = of.dims();
        let [n_kv, d] = [dims.n_kv_heads, dims.head_dim];
        let turns = if dims.rotary {
            let angles = draw(&[n_kv, d / 2]);
            in_planes(&[angles.cos(), angles.sin()])
        } else {
            Tensor::linalg_qr(&draw(&[n_kv, d, d]), "reduced").0
        };
        let turned = |of: &(Tensor, Option<Tensor>), turn_of_head: &[i64]| {
            let by =
                turns.index_select(0, &Tensor::from_slice(turn_of_head)).to_device(of.0.device());
            let turn = |x: &Tensor| {
                let heads = x.to_kind(Kind::Double).view([turn_of_head.len() as i64, d, -1]);
                by.matmul(&heads).view_as(x).to_kind(x.kind())
            };
            (turn(&of.0), of.1.as_ref().map(turn))
        };
        let own: Vec<i64> = (0..n_kv).collect();
        let new = Projections {
            q: turned(&projections.q, &dims.kv_of_head),
            k: turned(&projections.k, &own),
            v: projections.v,
        };
        (own.iter().map(|&head| vec![head]).collect(), new, of.out().out_in())
    })?;
    same_hidden(model, &changed, ids, "turned_queries_and_keys_change_nothing", layers)
}

/// Gives layers of a model so many key/value heads.
pub type Merging<'a> = &'a dyn Fn(&mut Model, &[(usize, i64)]) -> Result<(), Error>;

/// Makes key/value heads alike two by two, and has `merge` make one of each two, as [`merge_kv`](crate::merge_kv) does: how many heads the
/// layers are to have is what it is given. Layers of another number of heads than an even one, and those whose kind has values of its own,
/// are passed over.
///
/// # Errors
/// Where the model cannot run on `ids`, and as `merge`; [`Error::Refused`] where no layer is left.
pub fn merged_twins(
    model: &Model,
    ids: &Tensor,
    layers: &[usize],
    merge: Merging<'_>,
) -> Result<Verdict, Error> {
    let mut twins = model.alias()?;
    let mut tried = Vec::new();
    for &layer in layers {
        let of = model.layers()[layer];
        let [n_kv, d] = [of.dims().n_kv_heads, of.dims().head_dim];
        if n_kv == 0 || n_kv % 2 != 0 || of.kind().has_own_values() {
            continue;
        }
        let rows: Vec<i64> =
            (0..n_kv).flat_map(|head| (0..d).map(move |c| head / 2 * 2 * d + c)).collect();
        let alike = |(weight, bias): (Tensor, Option<Tensor>)| {
            let rows = Tensor::from_slice(&rows).to_device(weight.device());
            (weight.index_select(0, &rows), bias.map(|bias| bias.index_select(0, &rows)))
        };
        let Projections { q, k, v } = of.projections();
        let new = Projections { q, k: alike(k), v: alike(v) };
        let own: Vec<Vec<i64>> = (0..n_kv).map(|head| vec![head]).collect();
        match twins.regroup_kv(layer, &own, new, &of.out().out_in()) {
            Err(Error::Refused { .. }) => {}
            regrouped => {
                regrouped?;
                tried.push(layer);
            }
        }
    }
    let mut merged = twins.alias()?;
    let mut is_merged = false;
    for &layer in &tried {
        match merge(&mut merged, &[(layer, model.layers()[layer].dims().n_kv_heads / 2)]) {
            Err(Error::Refused { .. }) => {}
            done => {
                done?;
                is_merged = true;
            }
        }
    }
    if !is_merged {
        return Err(says_nothing(
            model,
            "no layer has key/value heads that could be merged by two",
        ));
    }
    same_hidden(&twins, &merged, ids, "heads_that_are_alike_merge_into_one", &tried)
}

/// Turns the values of each key/value head by a random orthogonal matrix, and the output projection of its readers back. Layers whose
/// kind has values of its own are passed over.
///
/// # Errors
/// Where the model cannot run on `ids`; [`Error::Refused`] where the kind at work has values of its own.
pub fn turned_values(model: &Model, ids: &Tensor, layers: &[usize]) -> Result<Verdict, Error> {
    let mut draw = normals(13);
    let fits = |of: &AttnLayer| !of.kind().has_own_values();
    let changed = changed_layers(model, layers, fits, |of, projections| {
        let dims = of.dims();
        let [n_kv, d, hidden] = [dims.n_kv_heads, dims.head_dim, dims.hidden_size];
        let (turns, _) = Tensor::linalg_qr(&draw(&[n_kv, d, d]), "reduced");
        let turns = turns.to_device(projections.v.0.device());
        let kind = projections.v.0.kind();
        let turned = |x: &Tensor, width: i64| {
            turns.matmul(&x.to_kind(Kind::Double).view([n_kv, d, width])).to_kind(kind)
        };
        let weight = turned(&projections.v.0, hidden).reshape([n_kv * d, hidden]);
        let bias = projections.v.1.as_ref().map(|bias| turned(bias, 1).reshape([n_kv * d]));
        let of_head =
            turns.index_select(0, &Tensor::from_slice(&dims.kv_of_head).to_device(turns.device())); // [n_heads, d, d]
        let out = of.out().out_in().to_kind(Kind::Double);
        let out = out.reshape([hidden, dims.n_heads, 1, d]); // W' = W Rᵀ, as z' = R z
        let out = out.matmul(&of_head.transpose(1, 2)).reshape([hidden, dims.n_heads * d]);
        let groups = (0..n_kv).map(|head| vec![head]).collect();
        (groups, Projections { v: (weight, bias), ..projections }, out.to_kind(kind))
    })?;
    same_hidden(model, &changed, ids, "turned_values_change_nothing", layers)
}

/// Gives each query head a key/value head of its own, a copy of the one that it shared. Layers whose kind has values of its own are
/// passed over.
///
/// # Errors
/// Where the model cannot run on `ids`; [`Error::Refused`] where no layer shares any, and by kinds that cannot follow.
pub fn repeated_kv_heads(model: &Model, ids: &Tensor, layers: &[usize]) -> Result<Verdict, Error> {
    let shares = |layer: &&usize| {
        let dims = model.layers()[**layer].dims();
        dims.n_kv_heads < dims.n_heads
    };
    let layers: Vec<usize> = layers.iter().filter(shares).copied().collect();
    if layers.is_empty() {
        return Err(says_nothing(model, "every query head has keys and values of its own"));
    }
    let fits = |of: &AttnLayer| !of.kind().has_own_values();
    let changed = changed_layers(model, &layers, fits, |of, projections| {
        let dims = of.dims();
        let readers = |kv: i64| dims.kv_of_head.iter().filter(|&&it| it == kv).count();
        let old: Vec<i64> =
            (0..dims.n_kv_heads).flat_map(|kv| std::iter::repeat_n(kv, readers(kv))).collect();
        let d = dims.head_dim;
        let rows: Vec<i64> = old.iter().flat_map(|kv| kv * d..(kv + 1) * d).collect();
        let repeated = |(weight, bias): &(Tensor, Option<Tensor>)| {
            let rows = Tensor::from_slice(&rows).to_device(weight.device());
            let pick = |x: &Tensor| x.index_select(0, &rows);
            (pick(weight), bias.as_ref().map(pick))
        };
        let new = Projections {
            k: repeated(&projections.k),
            v: repeated(&projections.v),
            q: projections.q,
        };
        (old.iter().map(|&kv| vec![kv]).collect(), new, of.out().out_in())
    })?;
    same_hidden(model, &changed, ids, "repeated_key_value_heads_change_nothing", &layers)
}

/// What goes into a layer in place of what is there: which old key/value heads each new one is made of, the projections, and the
/// output matrix.
type Regrouped = (Vec<Vec<i64>>, Projections, Tensor);

/// A second model with other heads in those of `layers` that `fits` holds of.
fn changed_layers(
    model: &Model,
    layers: &[usize],
    fits: impl Fn(&AttnLayer) -> bool,
    mut change: impl FnMut(&AttnLayer, Projections) -> Regrouped,
) -> Result<Model, Error> {
    let mut changed = model.alias()?;
    let mut is_tried = false;
    for &layer in layers {
        let of = model.layers()[layer];
        if of.dims().n_heads > 0 && fits(of) {
            let (groups, new, out) = change(of, of.projections());
            match changed.regroup_kv(layer, &groups, new, &out) {
                Err(Error::Refused { .. }) => {}
                regrouped => {
                    regrouped?;
                    is_tried = true;
                }
            }
        }
    }
    if !is_tried {
        return Err(says_nothing(
            model,
            "the layers' kinds look at more than products, or cannot follow",
        ));
    }
    Ok(changed)
}

fn same_hidden(
    model: &Model,
    other: &Model,
    ids: &Tensor,
    law: &'static str,
    layers: &[usize],
) -> Result<Verdict, Error> {
    let run = |model: &Model| last_hidden(model, ModelInput::new(ids.shallow_clone()));
    let mut worst = Worst::new();
    worst.see(relative_rms(&run(other)?, &run(model)?), || format!("layers {layers:?}"));
    Ok(worst.verdict(law, model_tolerance(model.kind())))
}

/// Saves the model in `dir`, a folder that is not there yet, and loads it again.
///
/// # Errors
/// Where it cannot be saved or loaded.
pub fn saved(model: &Model, dir: &Path) -> Result<Model, Error> {
    model.save(dir, &WriteOptions::default())?;
    let options =
        LoadOptions { kind: model.kind(), device: model.device(), ..LoadOptions::default() };
    Ok(Model::load(dir, &options)?.0)
}

/// A model that was saved and loaded, `again`, is the same to the bit: its parameters and its logits on `ids`.
///
/// # Errors
/// Where a model cannot run on `ids`.
pub fn saved_and_loaded(model: &Model, again: &Model, ids: &Tensor) -> Result<Verdict, Error> {
    let mut worst = Worst::new();
    let (own, loaded) = (model.parameters(), again.parameters());
    if own.len() != loaded.len() {
        let [own, loaded] = [own.len(), loaded.len()];
        worst.see(f64::NAN, || format!("{own} parameters were saved and {loaded} loaded"));
    }
    let configs = [model, again].map(|it| it.config().to_json(it.kind()));
    worst.see(f64::from(u8::from(configs[0] != configs[1])), || "config.json".into());
    for ((name, saved), (other, found)) in own.iter().zip(&loaded) {
        let is_same = name == other && saved.size() == found.size() && saved.equal(found);
        worst.see(f64::from(u8::from(!is_same)), || format!("{name} came back as another"));
    }
    let input = with_source(model, ModelInput::new(ids.shallow_clone()));
    let logits =
        |model: &Model| Ok::<_, Error>(model.forward(&input, &ForwardOptions::default())?.logits);
    let n_moved = logits(model)?.ne_tensor(&logits(again)?).sum(Kind::Int64).double_value(&[]);
    worst.see(n_moved, || "logits that moved".into());
    Ok(worst.verdict("what_is_saved_is_loaded_again", 0.0))
}

/// Where `config.json` ties the output matrix to the embedding, the two are one: of each of `models`, by a name for it.
///
/// # Errors
/// [`Error::Refused`] where nothing is tied.
pub fn tied_weights(models: &[(&str, &Model)]) -> Result<Verdict, Error> {
    let mut worst = Worst::new();
    for (name, model) in models {
        let (Some(tied), Some(head)) = (model.arch.tied(), model.vocabulary()) else {
            return Err(says_nothing(model, "its config ties no matrix to its embedding"));
        };
        let all = model.parameters();
        let (_, embedding) = all.iter().find(|it| it.0 == tied).expect("it names a parameter");
        let is_one = embedding.data_ptr() == head.weight.data_ptr();
        worst.see(f64::from(u8::from(!is_one)), || {
            format!("{name}: the output matrix is not {tied}, to which the config ties it")
        });
    }
    Ok(worst.verdict("tied_weights_are_one", 0.0))
}

/// Entries of a parameter along which its gradient is tried: those where it is steepest, and as many spread over all of it.
const ENTRIES: i64 = 32;

/// The gradients of `loss` by `n` parameters, spread evenly over all of them, are those of finite differences. `model` is in `f64`, and
/// `loss`, one number, the same each time that it is called; `ids` are tokens that it reads. The parameters are as they were afterwards.
///
/// # Errors
/// As `loss`; [`Error::Refused`] for a model in less than `f64`, whose differences are rounding.
pub fn model_gradients<E: From<Error>>(
    model: &Model,
    ids: &Tensor,
    n: usize,
    loss: impl Fn(&Model) -> Result<Tensor, E>,
) -> Result<Verdict, E> {
    // Where a choice or a kink lies between two points a smaller step passes it by. A wrong gradient is wrong at every step.
    const STEPS: [f64; 5] = [1e-3, 1e-4, 1e-5, 1e-6, 1e-7];
    const TOLERANCE: f64 = 1e-5;
    const FLOOR: f64 = 1e-3;
    if model.kind() != Kind::Double {
        return Err(says_nothing(model, "differences of numbers below f64 are rounding").into());
    }
    let all = model.parameters();
    let n = n.min(all.len());
    let sampled: Vec<&(String, Tensor)> = (0..n).map(|i| &all[i * all.len() / n]).collect();
    let leaves: Vec<Tensor> = sampled.iter().map(|(_, it)| it.set_requires_grad(true)).collect();
    let value = tch::with_grad(|| loss(model));
    let slopes = value.map(|value| Tensor::run_backward(&[value], &leaves, false, false));
    leaves.iter().for_each(|it| {
        let _ = it.set_requires_grad(false);
    });
    let slopes = slopes?;
    let vocab_size = model.config().sizes.vocab_size;
    let device = model.device();
    let mut tried = Vec::new();
    for ((name, tensor), slope) in sampled.into_iter().zip(slopes) {
        let n = tensor.numel() as i64;
        let slope =
            if slope.defined() { slope.reshape([n]) } else { tensor.zeros_like().view([n]) };
        let (_, steepest) = slope.abs().topk(ENTRIES.min(n), 0, true, false);
        let spread: Vec<i64> = (0..ENTRIES.min(n)).map(|i| i * n / ENTRIES.min(n)).collect();
        let mut at = vec![steepest, Tensor::from_slice(&spread).to_device(device)];
        if tensor.dim() == 2 && tensor.size()[0] == vocab_size {
            // Rows of tokens that are there, whatever their slopes are said to be.
            let width = tensor.size()[1];
            let rows = ids.reshape([-1]);
            let rows = rows.narrow(0, 0, rows.size()[0].min(ENTRIES));
            let columns = Tensor::arange(rows.size()[0], (Kind::Int64, device)).remainder(width);
            at.push(rows * width + columns);
        }
        let (at, ..) = Tensor::cat(&at, 0).unique_dim(0, true, false, false);
        let direction = normals(12)(&at.size()).to_device(device);
        let promised =
            (slope.index_select(0, &at) * &direction).sum(Kind::Double).double_value(&[]);
        let start = tensor.take(&at);
        let moved = |by: f64| {
            tch::no_grad(|| {
                let _ = tensor.shallow_clone().put_(&at, &(&start + &direction * by), false);
                Ok::<_, E>(loss(model)?.double_value(&[]))
            })
        };
        // Of fourth order: deep norms bend too much for less.
        let seen = |step: f64| {
            let apart = |by: f64| Ok::<_, E>(moved(by)? - moved(-by)?);
            Ok::<_, E>((8.0 * apart(step)? - apart(2.0 * step)?) / (12.0 * step))
        };
        let mut found = Vec::new();
        let tries = STEPS.iter().try_for_each(|&step| {
            let is_same = |seen: f64| (promised - seen).abs() <= TOLERANCE * promised.abs();
            // One that agrees says all.
            if !found.last().copied().is_some_and(is_same) {
                found.push(seen(step)?);
            }
            Ok::<_, E>(())
        });
        let _ = tch::no_grad(|| tensor.shallow_clone().put_(&at, &start, false));
        tries?;
        tried.push((name, promised, found));
    }
    // Below a share of the steepest a difference is rounding: a bias of keys moves no softmax.
    let steepest = tried.iter().map(|it| it.1.abs()).fold(0.0, f64::max);
    let mut worst = Worst::new();
    for (name, promised, found) in tried {
        let error = |seen: &f64| {
            (promised - seen).abs() / promised.abs().max(seen.abs()).max(FLOOR * steepest)
        };
        worst.see(found.iter().map(error).fold(f64::NAN, f64::min), || format!("along {name}"));
    }
    if steepest == 0.0 {
        worst.see(f64::NAN, || "no gradient at all".into());
    }
    Ok(worst.verdict("gradients_are_those_of_finite_differences", TOLERANCE))
}

/// Where one of two models has more key/value heads in a layer than the other, and each is a copy of one of the other's, the layer makes the
/// same of the same input: copies stand beside each other, where the query heads look for them. `ids`: what the other reads.
///
/// # Errors
/// Where a model cannot run on `ids`; [`Error::Refused`] where no layer has more heads than the other's, or they are no copies.
pub fn copied_kv_heads(model: &Model, other: &Model, ids: &Tensor) -> Result<Verdict, Error> {
    let heads = |of: &AttnLayer| {
        let Projections { k, v, .. } = of.projections();
        let n = of.dims().n_kv_heads;
        let parts = [Some(k.0), k.1, Some(v.0), v.1].into_iter().flatten();
        Tensor::cat(&parts.map(|x| x.reshape([n, -1])).collect::<Vec<_>>(), 1) // [n, all of a head]
    };
    let are_copies = |more: &AttnLayer, fewer: &AttnLayer| {
        let (more, fewer) = (heads(more), heads(fewer));
        let is_one_of =
            |head: i64| (0..fewer.size()[0]).any(|old| more.get(head).equal(&fewer.get(old)));
        more.size()[1] == fewer.size()[1] && (0..more.size()[0]).all(is_one_of)
    };
    let (own, others) = (model.layers(), other.layers());
    let input = with_source(other, ModelInput::new(ids.shallow_clone()));
    let options = ForwardOptions { attention_inputs: true, ..hidden_alone(other) };
    let mut inputs = None;
    let mut worst = Worst::new();
    for (layer, (&a, &b)) in own.iter().zip(&others).enumerate() {
        let n = [a, b].map(|it| it.dims().n_kv_heads);
        let copies = if n[0] > n[1] { are_copies(a, b) } else { are_copies(b, a) };
        if n[0] == n[1] || n.contains(&0) || a.variant() != b.variant() || !copies {
            continue;
        }
        let read = match &inputs {
            Some(read) => read,
            None => inputs.insert(other.forward(&input, &options)?.attention_inputs),
        };
        let made = |of: &Model| -> Result<Tensor, Error> {
            let x = [read[layer].shallow_clone()];
            let found = of.attend(&input, &[layer], &x, &ForwardOptions::default())?;
            Ok(of.layers()[layer].put_out(&found.z[0], false))
        };
        worst.see(relative_rms(&made(model)?, &made(other)?), || {
            format!("layer {layer}, {} key/value heads in place of {}", n[0], n[1])
        });
    }
    if inputs.is_none() {
        return Err(says_nothing(model, "no layer has more key/value heads that are all copies"));
    }
    Ok(worst.verdict("copied_key_value_heads_compute_the_same", model_tolerance(model.kind())))
}

/// How far the hidden states of two models are apart on the same ids, relative rms: what enters the first block, then what leaves
/// each.
///
/// # Errors
/// Where a model cannot run on `ids`; [`Error::Input`] where they have other numbers of layers or widths.
pub fn apart_by_layer(model: &Model, other: &Model, ids: &Tensor) -> Result<Vec<f64>, Error> {
    let run = |model: &Model| {
        let input = with_source(model, ModelInput::new(ids.shallow_clone()));
        Ok::<_, Error>(model.forward(&input, &hidden_alone(model))?.hidden_states)
    };
    let (own, others) = (run(model)?, run(other)?);
    let shape = |all: &[Tensor]| (all.len(), all[0].size());
    if shape(&own) != shape(&others) {
        let problem = format!(
            "of the one model are {} of {:?}, of the other {} of {:?}",
            own.len(),
            own[0].size(),
            others.len(),
            others[0].size()
        );
        return Err(Error::Input { name: "hidden states", problem });
    }
    Ok(own.iter().zip(&others).map(|(a, b)| relative_rms(a, b)).collect())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::{
        Config,
        arch::{Architecture, Reads, Tokens, Vocabulary},
        layer::LayerPass,
        lora::Slot,
        nn::Visitor,
    };

    /// An architecture whose output matrix is a copy of the embedding that it should be.
    #[derive(Debug)]
    struct Copying(Box<dyn Architecture>);

    impl Architecture for Copying {
        fn embed(&self, tokens: &Tokens<'_>, train: bool) -> Tensor {
            self.0.embed(tokens, train)
        }

        fn block(&self, at: usize, x: &Tensor, pass: &mut LayerPass<'_>) -> Result<Tensor, Error> {
            self.0.block(at, x, pass)
        }

        fn reads(&self) -> Reads {
            self.0.reads()
        }

        fn head(&self, hidden: &Tensor, train: bool) -> Tensor {
            self.0.head(hidden, train)
        }

        fn vocabulary(&self) -> Option<Vocabulary> {
            let Vocabulary { weight, bias } = self.0.vocabulary()?;
            Some(Vocabulary { weight: weight.copy(), bias })
        }

        fn tied(&self) -> Option<&str> {
            self.0.tied()
        }

        fn layers(&self) -> Vec<&AttnLayer> {
            self.0.layers()
        }

        fn layer_mut(&mut self, layer: usize) -> &mut AttnLayer {
            self.0.layer_mut(layer)
        }

        fn linears_mut(&mut self) -> Vec<Slot<'_>> {
            self.0.linears_mut()
        }

        fn visit(&self, f: &mut Visitor<'_>) {
            self.0.visit(f);
        }
    }

    #[test]
    fn a_copy_in_the_place_of_what_is_tied_is_named() {
        let config = |tied: bool| {
            let Value::Object(map) = json!({
                "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 50,
                "n_positions": 48, "n_embd": 24, "n_layer": 1, "n_head": 4,
                "tie_word_embeddings": tied,
            }) else {
                unreachable!("written as an object above")
            };
            Config::from_json(map).unwrap()
        };
        let model = |tied| Model::init(config(tied), &LoadOptions::default()).unwrap();
        assert!(tied_weights(&[("it", &model(true))]).unwrap().held());
        assert!(matches!(tied_weights(&[("it", &model(false))]), Err(Error::Refused { .. })));
        let mut copying = model(true);
        copying.arch = Box::new(Copying(model(true).arch));
        let verdict = tied_weights(&[("one", &model(true)), ("other", &copying)]).unwrap();
        assert!(!verdict.held() && verdict.place.starts_with("other: "), "{verdict}");
    }
}
