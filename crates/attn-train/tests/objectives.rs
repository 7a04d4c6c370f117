//! Losses against their definitions, gradients against one large batch, steps against AdamW by hand.

mod common;

use std::collections::BTreeMap;

use attn_core::{ForwardOptions, Model, Variant, attention::Stream, testing::relative_rms};
use attn_data::batch::{IGNORED, Side, collate, mask_tokens};
use attn_train::{
    Batch, Batches, CausalLm, Classification, Completion, Error, Event, MaskedLm, Objective,
    Precision, Run, Schedule, TrainConfig, train,
};
use common::*;
use tch::{Kind, Tensor};

/// A batch of uneven rows, padded on `side`, with one row that has no label.
fn batch(side: Side) -> Batch {
    let rows = [
        encoded(&[7, 12, 9, 31, 5, 5, 22], 1, 0),
        encoded(&[3, 8, 2], 0, 1),
        encoded(&[30, 4, 17, 6], IGNORED, 2),
        encoded(&[11, 39, 4], 1, 3),
    ];
    collate(&rows.iter().collect::<Vec<_>>(), 0, side).into()
}

fn logits(model: &Model, batch: &Batch) -> Vec<f64> {
    values(&model.forward(&batch.input(model), &ForwardOptions::default()).unwrap().logits)
}

fn loss(objective: &dyn Objective, model: &Model, batch: &Batch) -> f64 {
    objective.loss(model, batch, Stream::default()).unwrap().double_value(&[])
}

#[track_caller]
fn assert_near(actual: f64, expected: f64, tolerance: f64) {
    assert!((actual - expected).abs() <= tolerance * expected.abs(), "{actual} is not {expected}");
}

#[test]
fn the_causal_loss_is_the_mean_surprise_at_the_next_token() {
    for (base, side) in [("gpt2", Side::Right), ("llama", Side::Left), ("gpt2", Side::Left)] {
        let model = model(base, "lm", 0.0, Kind::Double, 1);
        let batch = batch(side);
        let (logits, cols, vocab) = (logits(&model, &batch), batch.rows.cols, VOCAB as usize);
        // The mean over what stands `shift` places after a real token within the same text.
        let naive = |shift: usize| {
            let (mut total, mut n) = (0.0, 0);
            for row in 0..batch.rows.rows {
                for col in 0..cols - shift {
                    let (from, to) = (row * cols + col, row * cols + col + shift);
                    if batch.rows.mask[from] == 1 && batch.rows.mask[to] == 1 {
                        let at = &logits[from * vocab..(from + 1) * vocab];
                        total += surprise(at, batch.rows.ids[to] as usize);
                        n += 1;
                    }
                }
            }
            (total / f64::from(n), n as usize)
        };

        let actual = loss(&CausalLm, &model, &batch);

        assert_near(actual, naive(1).0, 1e-12);
        assert_eq!(CausalLm.n_targets(&batch), naive(1).1);
        assert_eq!(naive(1).1, 6 + 2 + 3 + 2);
        for wrong in [0, 2] {
            let off = (naive(wrong).0 - actual).abs();
            assert!(off > 1e-3, "{base}: a shift of {wrong} is off by {off:e} alone");
        }
    }
}

#[test]
fn a_weighted_causal_loss_counts_each_target_as_often_as_it_says() {
    let model = model("gpt2", "lm", 0.0, Kind::Double, 1);
    for side in [Side::Right, Side::Left] {
        let mut batch = batch(side);
        let plain = loss(&CausalLm, &model, &batch);
        let (logits, vocab) = (logits(&model, &batch), VOCAB as usize);
        let weights: Vec<u32> = (0..batch.rows.ids.len() as u32).map(|cell| cell * 5 % 4).collect();
        let (mut total, mut n) = (0.0, 0);
        for (cell, &target) in batch.next_tokens().iter().enumerate() {
            if target != IGNORED {
                let at = &logits[cell * vocab..(cell + 1) * vocab];
                total += f64::from(weights[cell]) * surprise(at, target as usize);
                n += weights[cell] as usize;
            }
        }
        batch.weights = Some(weights);

        let weighted = loss(&CausalLm, &model, &batch);

        assert_near(weighted, total / n as f64, 1e-6);
        assert_eq!(CausalLm.n_targets(&batch), n);
        assert!((weighted - plain).abs() > 1e-3, "the weights do nothing: {weighted} and {plain}");
        batch.weights = Some(vec![3; batch.rows.ids.len()]);
        assert_near(loss(&CausalLm, &model, &batch), plain, 1e-6);
    }
}

#[test]
fn the_completion_loss_is_the_mean_surprise_at_the_answers_alone() {
    for (base, side) in [("gpt2", Side::Right), ("llama", Side::Left)] {
        let model = model(base, "lm", 0.0, Kind::Double, 1);
        let rows = batch(side).rows;
        let answers = [4..7, 1..3, 2..4, 2..3];
        let logits = logits(&model, &rows.clone().into());
        let (cols, vocab) = (rows.cols, VOCAB as usize);
        // The mean over the answers' tokens, each held against the logits `shift` places before it.
        let naive = |shift: usize| {
            let (mut total, mut n) = (0.0, 0);
            for (row, answer) in answers.iter().enumerate() {
                let n_tokens = rows.mask[row * cols..][..cols].iter().sum::<i64>() as usize;
                let first = if side == Side::Left { cols - n_tokens } else { 0 };
                for token in answer.clone().filter(|&token| token >= shift) {
                    let to = row * cols + first + token;
                    let at = &logits[(to - shift) * vocab..][..vocab];
                    total += surprise(at, rows.ids[to] as usize);
                    n += 1;
                }
            }
            total / f64::from(n)
        };
        let batch = Batch::answered(rows.clone(), &answers);

        let actual = loss(&Completion, &model, &batch);

        assert_near(actual, naive(1), 1e-12);
        assert_eq!(Completion.n_targets(&batch), 3 + 2 + 2 + 1);
        for wrong in [0, 2] {
            let off = (naive(wrong) - actual).abs();
            assert!(off > 1e-3, "{base}: a shift of {wrong} is off by {off:e} alone");
        }
        let whole = loss(&CausalLm, &model, &batch);
        assert!((whole - actual).abs() > 1e-3, "the prompts count too: {whole}");
    }
}

#[test]
fn the_masked_loss_is_the_mean_surprise_at_the_hidden_tokens() {
    let model = model("distilbert", "lm", 0.0, Kind::Double, 1);
    let rows = batch(Side::Right).rows;
    let masked = mask_tokens(&rows, &masking(), 3, 0).unwrap();
    let labels = masked.labels.clone();
    let batch = Batch::masked(rows, masked);
    let logits = logits(&model, &batch);
    let surprises: Vec<f64> = (0..labels.len())
        .filter(|&cell| labels[cell] != IGNORED)
        .map(|cell| surprise(&logits[cell * 40..(cell + 1) * 40], labels[cell] as usize))
        .collect();

    let actual = loss(&MaskedLm, &model, &batch);

    assert!(surprises.len() >= 4 && surprises.len() < batch.rows.n_tokens());
    assert_eq!(MaskedLm.n_targets(&batch), surprises.len());
    assert_near(actual, surprises.iter().sum::<f64>() / surprises.len() as f64, 1e-12);
}

#[test]
fn the_classification_loss_is_the_mean_surprise_at_the_class() {
    for base in ["gpt2", "distilbert"] {
        let model = model(base, "classifier", 0.0, Kind::Double, 1);
        let batch = batch(Side::Right);
        let logits = logits(&model, &batch);
        let expected: f64 = [(0, 1), (1, 0), (3, 1)]
            .map(|(row, class)| surprise(&logits[row * 2..][..2], class))
            .iter()
            .sum();

        assert_near(loss(&Classification, &model, &batch), expected / 3.0, 1e-12);
        assert_eq!(Classification.n_targets(&batch), 3);
    }
}

#[test]
fn losses_of_half_precision_logits_are_summed_in_f32() {
    let batch = batch(Side::Right);
    let exact = loss(&CausalLm, &model("gpt2", "lm", 0.0, Kind::Double, 1), &batch);
    let half = model("gpt2", "lm", 0.0, Kind::BFloat16, 1);

    let actual = CausalLm.loss(&half, &batch, Stream::default()).unwrap();

    assert_eq!(actual.kind(), Kind::Float);
    assert_near(actual.double_value(&[]), exact, 2e-2);
}

#[test]
fn a_class_that_the_model_does_not_have_names_the_example() {
    let model = model("gpt2", "classifier", 0.0, Kind::Float, 1);
    for label in [2, -1] {
        let rows = [encoded(&[5, 6], 1, 70), encoded(&[7, 8], label, 71)];
        let batch = collate(&rows.iter().collect::<Vec<_>>(), 0, Side::Right).into();
        let error = Classification.loss(&model, &batch, Stream::default()).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("example 71 is of class {label}, but the model has 2, counted from 0")
        );
    }
}

/// Trains with `accumulation` on `batches` for a step and returns AdamW's first moments, which are the gradient times
/// 1 − β₁.
fn gradient(
    objective: &dyn Objective,
    mut model: Model,
    batches: Vec<Batch>,
) -> (BTreeMap<String, Tensor>, f64) {
    let dir = tempfile::tempdir().unwrap();
    let config = TrainConfig { accumulation: batches.len(), clip_norm: 0.0, ..quick(1) };
    let data = Fixed(batches);
    let mut loss = 0.0;
    let run = Run {
        dir: Some(dir.path().to_owned()),
        observe: Box::new(|event| {
            if let Event::Step(progress) = event {
                loss = progress.loss;
            }
        }),
        ..Run::new(&config, objective, &data)
    };
    let summary = train(&mut model, run).unwrap();
    let mut all = tensors(&summary.checkpoint.unwrap().join("train_state.safetensors"));
    all.retain(|name, _| name.starts_with("m."));
    (all, loss)
}

#[test]
fn accumulated_batches_give_the_gradient_of_one_large_batch() {
    let split = |batch: &Batch, at: usize| -> Vec<Batch> {
        let rows: Vec<_> = (0..batch.rows.rows)
            .map(|row| {
                let cells = row * batch.rows.cols..(row + 1) * batch.rows.cols;
                let ids: Vec<u32> = cells
                    .filter(|&cell| batch.rows.mask[cell] == 1)
                    .map(|cell| batch.rows.ids[cell] as u32)
                    .collect();
                encoded(&ids, batch.rows.labels[row], batch.rows.indices[row])
            })
            .collect();
        let part = |rows: &[attn_data::batch::Encoded]| {
            collate(&rows.iter().collect::<Vec<_>>(), 0, Side::Right)
        };
        [&rows[..at], &rows[at..]].map(|rows| part(rows).into()).into()
    };
    let masked = |batch: &Batch| {
        let masked = mask_tokens(&batch.rows, &masking(), 1, 0).unwrap();
        Batch::masked(batch.rows.clone(), masked)
    };
    let whole = batch(Side::Right);
    let parts = split(&whole, 1);
    let answered = |batch: &Batch| {
        // The example with the number 0 has two tokens more than the others.
        let answer = |&example: &usize| if example == 0 { 4..7 } else { 1..3 };
        let answers: Vec<_> = batch.rows.indices.iter().map(answer).collect();
        Batch::answered(batch.rows.clone(), &answers)
    };
    let cases: [(&dyn Objective, &str, &str); 5] = [
        (&Completion, "llama", "lm"),
        (&CausalLm, "gpt2", "lm"),
        (&CausalLm, "llama", "lm"),
        (&MaskedLm, "distilbert", "lm"),
        (&Classification, "distilbert", "classifier"),
    ];
    for (objective, base, head) in cases {
        let (whole, parts) = match objective.name() {
            name if name == MaskedLm.name() => (masked(&whole), parts.iter().map(masked).collect()),
            name if name == Completion.name() => {
                (answered(&whole), parts.iter().map(answered).collect())
            }
            _ => (whole.clone(), parts.clone()),
        };
        let counts: Vec<usize> = parts.iter().map(|part| objective.n_targets(part)).collect();
        assert_ne!(counts[0], counts[1], "equal counts would not tell a mean of means");
        for (kind, tolerance) in [(Kind::Float, 1e-6), (Kind::Double, 1e-13)] {
            let model = || model(base, head, 0.0, kind, 1);
            let (expected, whole_loss) = gradient(objective, model(), vec![whole.clone()]);
            let (actual, loss) = gradient(objective, model(), parts.clone());

            assert_near(loss, whole_loss, tolerance);
            let flat = |of: &BTreeMap<String, Tensor>| {
                Tensor::cat(&of.values().map(|m| m.view([-1])).collect::<Vec<_>>(), 0)
            };
            let error = relative_rms(&flat(&actual), &flat(&expected));
            assert!(error <= tolerance, "{}, {base}, {kind:?}: {error:e}", objective.name());
        }
    }
}

#[test]
fn a_batch_without_targets_weighs_nothing_in_a_step() {
    let with = batch(Side::Right);
    let without: Batch = collate(&[&encoded(&[5, 6], IGNORED, 9)], 0, Side::Right).into();
    let model = || model("distilbert", "classifier", 0.0, Kind::Double, 1);

    let (expected, _) = gradient(&Classification, model(), vec![with.clone()]);
    let (actual, _) = gradient(&Classification, model(), vec![without, with]);

    assert_same(&actual, &expected);
}

#[test]
fn a_step_without_any_target_names_its_examples() {
    let mut model = model("distilbert", "classifier", 0.0, Kind::Float, 1);
    let data = Fixed(vec![collate(&[&encoded(&[5, 6], IGNORED, 9)], 0, Side::Right).into()]);

    let config = quick(1);
    let error = train(&mut model, Run::new(&config, &Classification, &data)).unwrap_err();

    let Error::NoTargets { place } = &error else { panic!("{error}") };
    assert_eq!((place.step, place.examples.as_slice()), (1, [9].as_slice()));
    assert!(error.to_string().starts_with("step 1, epoch 0, batch 0 (examples 9): "), "{error}");
}

/// AdamW from its definition, one number at a time, on one parameter.
struct Reference {
    p: Vec<f64>,
    m: Vec<f64>,
    v: Vec<f64>,
    decays: bool,
}

#[test]
fn steps_equal_adamw_worked_out_by_hand() {
    let mut trained = model("distilbert", "classifier", 0.0, Kind::Double, 1);
    let by_hand = model("distilbert", "classifier", 0.0, Kind::Double, 1);
    let config = TrainConfig {
        lr: 3e-3,
        schedule: Schedule::Cosine,
        warmup_steps: Some(2),
        weight_decay: 0.2,
        betas: [0.8, 0.95],
        eps: 1e-6,
        clip_norm: 1.3,
        ..quick(6)
    };
    let data = Fixed(vec![batch(Side::Right)]);
    let mut seen = Vec::new();
    let run = Run {
        observe: Box::new(|event| {
            if let Event::Step(progress) = event {
                seen.push((progress.lr, progress.grad_norm));
            }
        }),
        ..Run::new(&config, &Classification, &data)
    };
    train(&mut trained, run).unwrap();

    let mut params: Vec<(String, Tensor, Reference)> = by_hand
        .parameters()
        .into_iter()
        .map(|(name, tensor)| {
            let p = values(&tensor);
            let zeros = vec![0.0; p.len()];
            let decays = tensor.dim() == 2;
            // Every matrix here is named a weight, and every bias and norm is a vector.
            let is_norm = name.contains("norm") || name.contains("Norm");
            assert_eq!(decays, name.ends_with("weight") && !is_norm, "{name}");
            (name, tensor, Reference { p, m: zeros.clone(), v: zeros, decays })
        })
        .collect();
    let mut clipped = 0;
    for t in 1..=6 {
        let tensors: Vec<Tensor> =
            params.iter().map(|(_, tensor, _)| tensor.set_requires_grad(true)).collect();
        let loss = Classification.loss(&by_hand, &data.0[0], Stream::default()).unwrap();
        let grads =
            attn_torch::grad(&[loss], &[] as &[Tensor], &tensors, Default::default()).unwrap();
        let grads: Vec<Vec<f64>> =
            grads.iter().map(|grad| values(grad.as_ref().unwrap())).collect();
        let norm = grads.iter().flatten().map(|g| g * g).sum::<f64>().sqrt();
        let factor = (1.3 / (norm + 1e-6)).min(1.0);
        clipped += u32::from(factor < 1.0);
        let lr = 3e-3
            * match t {
                1 => 0.5,
                2 => 1.0,
                t => 0.5 * (1.0 + (std::f64::consts::PI * f64::from(t - 3) / 4.0).cos()),
            };
        assert_near(seen[t as usize - 1].0, lr, 1e-14);
        assert_near(seen[t as usize - 1].1, norm, 1e-9);
        for ((_, tensor, reference), grads) in params.iter_mut().zip(grads) {
            let Reference { p, m, v, decays } = reference;
            for (i, g) in grads.iter().enumerate() {
                let g = g * factor;
                p[i] -= if *decays { lr * 0.2 * p[i] } else { 0.0 };
                m[i] = 0.8 * m[i] + 0.2 * g;
                v[i] = 0.95 * v[i] + 0.05 * g * g;
                let m = m[i] / (1.0 - 0.8_f64.powi(t));
                let v = v[i] / (1.0 - 0.95_f64.powi(t));
                p[i] -= lr * m / (v.sqrt() + 1e-6);
            }
            let new = Tensor::from_slice(p).view(tensor.size().as_slice());
            tch::no_grad(|| tensor.shallow_clone().copy_(&new));
        }
    }
    assert!(
        (1..6).contains(&clipped),
        "clipping should happen in some steps, not in {clipped}: {seen:?}"
    );
    let expected: BTreeMap<String, Tensor> =
        params.iter().map(|(name, tensor, _)| (name.clone(), tensor.detach())).collect();
    for (name, actual) in weights(&trained) {
        let rms = |x: Tensor| x.square().mean(Kind::Double).sqrt().double_value(&[]);
        // Keys' biases start at 0 and cancel in the softmax: they are moved by rounding alone, so the rate is the scale.
        let scale = rms(expected[&name].shallow_clone()).max(config.lr);
        let error = rms(actual - &expected[&name]) / scale;
        // Six steps feed rounding back through the gradient.
        assert!(error <= 1e-10, "{name}: {error:e}");
    }
}

#[test]
fn one_batch_can_be_learnt_by_heart() {
    let masked = {
        let rows = batch(Side::Right).rows;
        let masked = mask_tokens(&rows, &masking(), 3, 0).unwrap();
        Batch::masked(rows, masked)
    };
    let plain = batch(Side::Right);
    let cases: [(&dyn Objective, &str, &str, &Batch); 5] = [
        (&CausalLm, "gpt2", "lm", &plain),
        (&CausalLm, "llama", "lm", &plain),
        (&MaskedLm, "distilbert", "lm", &masked),
        (&Classification, "gpt2", "classifier", &plain),
        (&Classification, "distilbert", "classifier", &plain),
    ];
    for (objective, base, head, batch) in cases {
        let mut model = model(base, head, 0.0, Kind::Float, 2);
        let before = loss(objective, &model, batch);
        let config = quick(60);
        let data = Fixed(vec![batch.clone()]);

        let summary = train(&mut model, Run::new(&config, objective, &data)).unwrap();

        let after = loss(objective, &model, batch);
        assert!(before > 0.4 && after < 0.02, "{}, {base}: {before} -> {after}", objective.name());
        assert_eq!(summary.step, 60);
        assert!(!model.parameters()[0].1.requires_grad(), "a trained model runs without a graph");
    }
}

/// Trains, and gives the loss of each step.
fn trained(
    model: &mut Model,
    config: &TrainConfig,
    objective: &dyn Objective,
    data: &dyn Batches,
) -> Vec<f64> {
    let mut losses = Vec::new();
    let run = Run {
        observe: Box::new(|event| {
            if let Event::Step(progress) = event {
                losses.push(progress.loss);
            }
        }),
        ..Run::new(config, objective, data)
    };
    train(model, run).unwrap();
    losses
}

#[test]
fn products_in_bf16_train_weights_in_f32() {
    let plain = batch(Side::Right);
    let cases: [(&dyn Objective, &str, &str); 3] = [
        (&CausalLm, "llama", "lm"),
        (&Classification, "gpt2", "classifier"),
        (&Classification, "distilbert", "classifier"),
    ];
    for (objective, base, head) in cases {
        let data = Fixed(vec![plain.clone()]);
        let losses = |precision: Precision, gradient_checkpointing: bool| {
            let mut model = model(base, head, 0.0, Kind::Float, 2);
            let config = TrainConfig { precision, gradient_checkpointing, ..quick(60) };
            let mut losses = trained(&mut model, &config, objective, &data);
            assert!(model.parameters().iter().all(|(_, tensor)| tensor.kind() == Kind::Float));
            losses.push(loss(objective, &model, &plain));
            losses
        };
        let exact = losses(Precision::F32, false);
        let rounded = losses(Precision::Bf16, false);
        let gap = (rounded[0] - exact[0]).abs() / exact[0];
        assert!(gap > 1e-7 && gap < 0.02, "{base}: {} and {}", exact[0], rounded[0]);
        assert!(rounded[60] < 0.05, "{base}: {}", rounded[60]);
        // That what is recomputed is rounded alike is tested where it is recomputed (attn-torch, `checkpoint.rs`).
        let recomputed = losses(Precision::Bf16, true);
        assert!(recomputed[60] < 0.05, "{base}: {}", recomputed[60]);
    }
}

/// Rotation leaves queries and keys wider than values there.
#[test]
fn every_attention_kind_trains_in_bf16_beside_rotations() {
    // Long enough for blocks to be chosen and summed up.
    let ids: Vec<u32> = (0..48).map(|i| 3 + i * 7 % 30).collect();
    let plain: Batch = collate(&[&encoded(&ids, 0, 0)], 0, Side::Right).into();
    for variant in attn_core::testing::kinds() {
        let losses = |precision: Precision| {
            let mut model = model("llama", "lm", 0.0, Kind::Float, 2);
            if model.swap(&[0, 1], &variant, 1).is_err() {
                assert!(matches!(variant, Variant::Cross(_)), "{variant:?}");
                return None;
            }
            let config = TrainConfig { precision, ..quick(3) };
            let data = Fixed(vec![plain.clone()]);
            Some(trained(&mut model, &config, &CausalLm, &data))
        };
        let (Some(exact), Some(rounded)) = (losses(Precision::F32), losses(Precision::Bf16)) else {
            continue;
        };
        let gap = (rounded[0] - exact[0]).abs() / exact[0];
        assert!(gap < 0.02, "{variant:?}: {} and {}", exact[0], rounded[0]);
        assert!(rounded.iter().all(|loss| loss.is_finite()), "{variant:?}: {rounded:?}");
    }
}

#[test]
fn the_loss_falls_in_twenty_steps() {
    let cases: [(&dyn Objective, &str, &str); 3] = [
        (&CausalLm, "llama", "lm"),
        (&MaskedLm, "distilbert", "lm"),
        (&Classification, "gpt2", "classifier"),
    ];
    for (objective, base, head) in cases {
        let mut model = model(base, head, 0.1, Kind::Float, 2);
        let config = TrainConfig { lr: 4e-3, ..quick(20) };
        let mut data = examples(160, &config);
        if objective.name() == MaskedLm.name() {
            data = data.with_masking(masking());
        }

        let losses = trained(&mut model, &config, objective, &data);

        let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
        let (first, last) = (mean(&losses[..5]), mean(&losses[15..]));
        assert!(last < first - 0.02, "{}: {first} -> {last}", objective.name());
    }
}

#[test]
fn frozen_parameters_keep_every_bit_and_the_others_move() {
    let mut model = model("distilbert", "classifier", 0.1, Kind::Float, 2);
    let before = weights(&model);
    let config = TrainConfig {
        freeze: vec![
            "*".into(),
            "!*classifier*".into(),
            "!*layer.1.*".into(),
            "*layer.1.*.bias".into(),
        ],
        weight_decay: 0.1,
        ..quick(5)
    };
    let data = examples(40, &config);

    train(&mut model, Run::new(&config, &Classification, &data)).unwrap();

    let mut counts = [0, 0];
    for (name, after) in weights(&model) {
        let is_trained =
            name.contains("classifier") || (name.contains("layer.1.") && !name.ends_with("bias"));
        counts[usize::from(is_trained)] += 1;
        assert_eq!(!after.equal(&before[&name]), is_trained, "{name}");
    }
    assert!(counts[0] > 20 && counts[1] > 8, "{counts:?}");
}

#[test]
fn a_parameter_that_the_loss_does_not_reach_stays() {
    /// Reads the first layer's output alone.
    struct HiddenNorm;
    impl Objective for HiddenNorm {
        fn name(&self) -> &'static str {
            "the size of the hidden states"
        }
        fn check(&self, _: &Model) -> attn_train::Result<()> {
            Ok(())
        }
        fn n_targets(&self, batch: &Batch) -> usize {
            batch.rows.rows
        }
        fn loss(&self, model: &Model, batch: &Batch, stream: Stream) -> attn_train::Result<Tensor> {
            let options = ForwardOptions { hidden_states: true, stream, ..Default::default() };
            let hidden = model.forward(&batch.input(model), &options)?.hidden_states;
            Ok(hidden[1].square().mean(Kind::Float))
        }
    }
    let mut model = model("gpt2", "classifier", 0.0, Kind::Float, 2);
    let before = weights(&model);
    let config = TrainConfig { weight_decay: 0.5, accumulation: 2, ..quick(3) };
    let data = examples(40, &config);

    train(&mut model, Run::new(&config, &HiddenNorm, &data)).unwrap();

    for (name, after) in weights(&model) {
        let is_reached = name.contains(".wte.") || name.contains(".wpe.") || name.contains(".h.0.");
        assert_eq!(!after.equal(&before[&name]), is_reached, "{name}");
    }
}
