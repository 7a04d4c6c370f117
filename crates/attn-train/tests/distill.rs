//! Distillation against its definitions, and what would go wrong unseen.

mod common;

use attn_core::{
    ForwardOptions, Model, Rows, Variant,
    attention::Stream,
    testing::{random_ids, relative_rms},
};
use attn_data::batch::{Side, collate};
use attn_torch::{GradOptions, grad};
use attn_train::{Batch, Batches, Distillation, Error, Losses, Objective, Run, TrainConfig, train};
use common::*;
use tch::{Kind, Tensor};

fn batch(side: Side) -> Batch {
    let rows = [
        encoded(&[7, 12, 9, 31, 5, 5, 22], 1, 0),
        encoded(&[3, 8, 2], 0, 1),
        encoded(&[30, 4, 17, 6], 1, 2),
    ];
    collate(&rows.iter().collect::<Vec<_>>(), 0, side).into()
}

fn window(size: u32) -> Variant {
    serde_json::from_value(serde_json::json!({"kind": "window", "size": size})).unwrap()
}

/// A student that begins as its teacher but for the attention of its layers.
fn student_of(teacher: &Model, layers: &[usize]) -> Model {
    let mut student = teacher.alias().unwrap();
    student.own(&|_| true);
    student.swap(layers, &window(2), 0).unwrap();
    student
}

fn loss(losses: &Losses, teacher: &Model, student: &Model, batch: &Batch) -> Tensor {
    let objective = Distillation::new(teacher, student, losses).unwrap();
    objective.loss(student, batch, Stream::default()).unwrap()
}

/// Log-probabilities at the real tokens, `[n, vocab]`, from logits that are all there.
fn log_probabilities(model: &Model, batch: &Batch, temperature: f64) -> Tensor {
    let logits = model.forward(&batch.input(model), &ForwardOptions::default()).unwrap().logits;
    let places = Tensor::from_slice(&batch.rows.mask).nonzero().view([-1]);
    let real = logits.flatten(0, 1).index_select(0, &places);
    (real / temperature).log_softmax(-1, Kind::Double)
}

type Divergence = fn(&Tensor, &Tensor) -> Tensor; // of log p and log q, `[n, vocab]`: the sum

fn kl(p: &Tensor, q: &Tensor) -> Tensor {
    (p.exp() * (p - q)).sum(Kind::Double)
}

const DIVERGENCES: [(&str, Divergence); 5] = [
    ("forward_kl", |p, q| kl(p, q)),
    ("reverse_kl", |p, q| kl(q, p)),
    ("jensen_shannon", |p, q| {
        let m = (p.exp() * 0.3 + q.exp() * 0.7).log();
        kl(p, &m) * 0.3 + kl(q, &m) * 0.7
    }),
    ("total_variation", |p, q| (p.exp() - q.exp()).abs().sum(Kind::Double) * 0.5),
    ("top_k_kl", |p, q| {
        let mut sum = Tensor::from(0.0);
        for row in 0..p.size()[0] {
            let (p, q) = (p.get(row), q.get(row));
            let (_, order) = p.sort(-1, true);
            let (top, rest) = (order.narrow(0, 0, 5), order.narrow(0, 5, p.size()[0] - 5));
            let tail =
                |x: &Tensor| x.index_select(0, &rest).exp().sum(Kind::Double).log().view([1]);
            let lumped = |x: &Tensor| Tensor::cat(&[x.index_select(0, &top), tail(x)], 0);
            sum += kl(&lumped(&p), &lumped(&q));
        }
        sum
    }),
];

fn only(name: &str, temperature: f64) -> Losses {
    let json = serde_json::json!({name: 1.0, "temperature": temperature, "beta": 0.3, "top_k": 5});
    serde_json::from_value(json).unwrap()
}

#[test]
fn divergences_and_their_gradients_are_those_of_the_definitions() {
    for (base, side) in [("gpt2", Side::Right), ("llama", Side::Left), ("distilbert", Side::Right)]
    {
        let teacher = model(base, "lm", 0.0, Kind::Double, 1);
        let student = model(base, "lm", 0.0, Kind::Double, 2);
        let batch = batch(side);
        let n = batch.rows.mask.iter().sum::<i64>() as f64;
        assert_eq!(n, 14.0);
        let parameters: Vec<Tensor> = student
            .parameters()
            .into_iter()
            .map(|(_, tensor)| tensor.set_requires_grad(true))
            .collect();
        for temperature in [1.0, 2.5] {
            for (name, definition) in DIVERGENCES {
                let losses = only(name, temperature);
                let actual = loss(&losses, &teacher, &student, &batch);
                let p = log_probabilities(&teacher, &batch, temperature).detach();
                let q = log_probabilities(&student, &batch, temperature);
                let expected = definition(&p, &q) * (temperature * temperature / n);
                let label = format!("{base}, {name}, T {temperature}");
                let error = relative_rms(&actual.detach(), &expected.detach());
                assert!(error < 1e-12, "{label}: {error:e}");

                let of = |loss: &Tensor| {
                    grad(&[loss], &[] as &[Tensor], &parameters, GradOptions::default()).unwrap()
                };
                for (own, naive) in of(&actual).iter().zip(of(&expected)) {
                    let (Some(own), Some(naive)) = (own, naive) else {
                        // A sliver of the table of positions is read, all of it has a gradient.
                        panic!("{label}: a parameter without a gradient");
                    };
                    // Keys' biases move every score of a row alike: their gradient is rounding.
                    if naive.abs().max().double_value(&[]) < 1e-12 {
                        assert!(own.abs().max().double_value(&[]) < 1e-12, "{label}");
                        continue;
                    }
                    let error = relative_rms(own, &naive);
                    assert!(error < 1e-9, "{label}: a gradient is off by {error:e}");
                }
            }
        }
    }
}

#[test]
fn a_shift_a_counted_padding_token_and_a_reversed_direction_are_other_numbers() {
    let teacher = model("gpt2", "lm", 0.0, Kind::Double, 1);
    let student = model("gpt2", "lm", 0.0, Kind::Double, 2);
    let batch = batch(Side::Right);
    let actual = loss(&only("forward_kl", 1.0), &teacher, &student, &batch).double_value(&[]);

    let full = |model: &Model| {
        let logits = model.forward(&batch.input(model), &ForwardOptions::default()).unwrap().logits;
        logits.log_softmax(-1, Kind::Double)
    };
    let (p, q) = (full(&teacher), full(&student));
    let cols = batch.rows.cols as i64;
    // Each position of the student against the next one of the teacher, within the text.
    let mut shifted = (0.0, 0.0);
    for row in 0..batch.rows.rows {
        for col in 0..cols - 1 {
            if batch.rows.mask[row * batch.rows.cols + col as usize + 1] == 1 {
                let at = |x: &Tensor, col| x.get(row as i64).get(col);
                shifted.0 += kl(&at(&p, col + 1), &at(&q, col)).double_value(&[]);
                shifted.1 += 1.0;
            }
        }
    }
    let padded = kl(&p, &q).double_value(&[]) / batch.rows.mask.len() as f64;
    let reversed = loss(&only("reverse_kl", 1.0), &teacher, &student, &batch).double_value(&[]);
    for (wrong, value) in
        [("shifted", shifted.0 / shifted.1), ("padded", padded), ("reversed", reversed)]
    {
        assert!((value - actual).abs() > 1e-3 * actual, "{wrong}: {value} is {actual}");
    }
}

#[test]
fn a_student_that_is_its_teacher_has_nothing_to_learn() {
    for base in ["gpt2", "distilbert"] {
        let teacher = model(base, "lm", 0.0, Kind::Double, 1);
        let student = teacher.alias().unwrap();
        let mut losses: Losses = only("forward_kl", 1.0);
        (losses.hidden_mse, losses.hidden_cosine) = (1.0, 1.0);
        let value = loss(&losses, &teacher, &student, &batch(Side::Right)).double_value(&[]);
        assert!(value.abs() < 1e-14, "{base}: {value:e}");
    }
}

#[test]
fn classifiers_are_held_against_each_other_row_by_row() {
    let [teacher, student] =
        [1, 2].map(|seed| model("distilbert", "classifier", 0.0, Kind::Double, seed));
    let batch = batch(Side::Right);
    let of = |model: &Model| {
        let logits = model.forward(&batch.input(model), &ForwardOptions::default()).unwrap().logits;
        logits.log_softmax(-1, Kind::Double)
    };
    let mut losses = only("forward_kl", 1.0);
    losses.cross_entropy = 0.5;
    let labels = Tensor::from_slice(&batch.rows.labels).unsqueeze(1);
    let surprise = -of(&student).gather(1, &labels, false).mean(Kind::Double) * 0.5;
    let expected = kl(&of(&teacher), &of(&student)) / 3.0 + surprise;
    let error = relative_rms(&loss(&losses, &teacher, &student, &batch), &expected);
    assert!(error < 1e-12, "{error:e}");
}

#[test]
fn cross_entropy_counts_as_causal_language_modelling_does() {
    let [teacher, student] = [1, 2].map(|seed| model("gpt2", "lm", 0.0, Kind::Double, seed));
    for side in [Side::Left, Side::Right] {
        let batch = batch(side);
        let ours = loss(&only("cross_entropy", 1.0), &teacher, &student, &batch);
        let plain = attn_train::CausalLm.loss(&student, &batch, Stream::default()).unwrap();
        assert!(relative_rms(&ours, &plain) < 1e-12);
    }
}

#[test]
fn attention_is_compared_in_the_layers_that_differ_at_real_tokens() {
    for base in ["gpt2", "llama", "distilbert"] {
        let teacher = model(base, "lm", 0.0, Kind::Double, 1);
        let student = student_of(&teacher, &[1]);
        let batch = batch(Side::Right);
        let options =
            ForwardOptions { z: true, attentions: Rows::All, ..ForwardOptions::default() };
        let of = |model: &Model| model.forward(&batch.input(model), &options).unwrap();
        let (own, other) = (of(&student), of(&teacher));
        let keep = Tensor::from_slice(&batch.rows.mask).view([3, 1, 7, 1]).to_kind(Kind::Double);
        let [_, heads, _, width] = own.z[1].size()[..] else { panic!() };
        let squared = ((&own.z[1] - &other.z[1]).square() * &keep).sum(Kind::Double);
        let outputs = squared.double_value(&[]) / (14 * heads * width) as f64;
        let log = own.attentions[1].clamp_min(f64::from(f32::MIN_POSITIVE)).log();
        let crossed = -(&other.attentions[1] * log) * &keep;
        let weights = crossed.sum(Kind::Double).double_value(&[]) / (14 * heads) as f64;

        for (name, expected) in [("attention_output", outputs), ("attention_weights", weights)] {
            let mut losses = only(name, 1.0);
            // Layer 0 is the teacher's own, so layer 1 sees what the teacher's sees either way.
            for forced in [false, true] {
                losses.teacher_forced = forced;
                let actual = loss(&losses, &teacher, &student, &batch).double_value(&[]);
                assert!(
                    (actual - expected).abs() < 1e-12 * expected,
                    "{base}, {name}, forced {forced}"
                );
            }
        }

        // With both layers changed, the second sees the first one's errors only where it is not forced.
        let both = student_of(&teacher, &[0, 1]);
        let mut losses = only("attention_output", 1.0);
        let free = loss(&losses, &teacher, &both, &batch).double_value(&[]);
        losses.teacher_forced = true;
        let forced = loss(&losses, &teacher, &both, &batch).double_value(&[]);
        assert!((free - forced).abs() > 1e-6 * free, "{base}: {free} is {forced}");
    }
}

/// Heads that were merged, turned and put in another order, and heads that were removed: layers are compared behind the output
/// projection.
#[test]
fn layers_whose_heads_were_merged_are_compared_by_what_they_add() {
    for base in ["gpt2", "llama", "distilbert"] {
        let teacher = model(base, "lm", 0.0, Kind::Double, 1);
        let mut student = teacher.alias().unwrap();
        let mut moments = attn_core::Moments::of_layers(&[1]);
        moments.add(&teacher, &attn_core::ModelInput::new(random_ids(5, [9, 12], 40))).unwrap();
        attn_core::merge_kv(&mut student, &[(1, 1)], attn_core::Merge::LowRank, Some(&moments))
            .unwrap();
        let batch = batch(Side::Right);
        let options = ForwardOptions { z: true, ..ForwardOptions::default() };
        let added = |model: &Model| {
            let z = &model.forward(&batch.input(model), &options).unwrap().z[1];
            let [rows, heads, n, width] = z.size()[..] else { panic!() };
            let z = z.transpose(1, 2).reshape([rows, n, heads * width]);
            model.layers()[1].out().forward(&z, false)
        };
        let keep = Tensor::from_slice(&batch.rows.mask).view([3, 7, 1]).to_kind(Kind::Double);
        let apart = added(&student) - added(&teacher);
        let width = apart.size()[2];
        let expected =
            (apart.square() * keep).sum(Kind::Double).double_value(&[]) / (14 * width) as f64;
        let mut losses = only("layer_output", 1.0);
        for forced in [false, true] {
            losses.teacher_forced = forced;
            let actual = loss(&losses, &teacher, &student, &batch).double_value(&[]);
            assert!((actual - expected).abs() < 1e-10 * expected, "{base} {actual} {expected}");
        }
        let same = teacher.alias().unwrap();
        assert!(
            Distillation::new(&teacher, &same, &losses)
                .unwrap_err()
                .to_string()
                .contains("nothing to transfer")
        );
        // Heads would be compared in coordinates that they no longer have.
        let mut swapped = student.alias().unwrap();
        swapped.swap(&[1], &window(2), 0).unwrap();
        let error =
            Distillation::new(&teacher, &swapped, &only("attention_output", 1.0)).unwrap_err();
        assert!(error.to_string().contains("other key/value heads"), "{error}");
        assert!(Distillation::new(&teacher, &swapped, &losses).is_ok());
        let mut cut = teacher.alias().unwrap();
        cut.select_heads(0, &[1]).unwrap();
        assert!(loss(&losses, &teacher, &cut, &batch).double_value(&[]) > 0.0);
    }
    let both = Losses { attention_output: 1.0, ..only("layer_output", 1.0) };
    assert!(both.validate().unwrap_err().to_string().contains("heads or layers"));
}

#[test]
fn training_brings_a_student_nearer_and_leaves_its_teacher_alone() {
    let teacher = model("gpt2", "lm", 0.0, Kind::Float, 1);
    let before = weights(&teacher);
    let mut student = teacher.alias().unwrap();
    student.swap(&[0, 1], &window(1), 0).unwrap();
    let trained = |name: &str| !name.contains("wte") && !name.contains("wpe");
    student.own(&trained);
    let shared = |name: &str| {
        let of = |model: &Model| {
            let all = model.parameters();
            all.iter().find(|(own, _)| own == name).expect("both have it").1.data_ptr() as usize
        };
        of(&teacher) == of(&student)
    };
    assert!(shared("transformer.wte.weight"), "what is frozen exists once");
    assert!(!shared("transformer.h.0.mlp.c_fc.weight"));

    let mut config = TrainConfig { lr: 2e-3, ..quick(80) };
    config.freeze = vec!["*wte*".into(), "*wpe*".into()];
    let losses = only("forward_kl", 1.0);
    let objective = Distillation::new(&teacher, &student, &losses).unwrap();
    let data = examples(64, &config);
    let seen = data.batch(0, &data.plan(0)[0]).unwrap();
    let start = loss(&losses, &teacher, &student, &seen).double_value(&[]);
    train(&mut student, Run::new(&config, &objective, &data)).unwrap();
    let end = loss(&losses, &teacher, &student, &seen).double_value(&[]);
    assert!(end < 0.7 * start, "{start} to {end}");
    assert_same(&before, &weights(&teacher));
}

#[test]
fn models_that_cannot_be_compared_are_refused() {
    let gpt2 = model("gpt2", "lm", 0.0, Kind::Float, 1);
    let refused = |teacher: &Model, student: &Model, name: &str| match Distillation::new(
        teacher,
        student,
        &only(name, 1.0),
    ) {
        Err(Error::Teacher { problem }) => problem,
        other => panic!("{other:?}"),
    };
    assert!(
        refused(&model("distilbert", "lm", 0.0, Kind::Float, 1), &gpt2, "forward_kl")
            .contains("distilbert")
    );
    assert!(
        refused(&model("gpt2", "classifier", 0.0, Kind::Float, 1), &gpt2, "forward_kl")
            .contains("classifier")
    );
    assert!(
        refused(&gpt2, &gpt2.alias().unwrap(), "attention_output").contains("nothing to transfer")
    );
    let mut wider = config("gpt2", "lm", 0.0).to_json(Kind::Float);
    wider.insert("vocab_size".into(), 41.into());
    let options = attn_core::LoadOptions::default();
    let wider = Model::init(attn_core::Config::from_json(wider).unwrap(), &options).unwrap();
    assert!(refused(&wider, &gpt2, "forward_kl").contains("vocabulary has 41 tokens"));
}

#[test]
fn what_a_kind_asks_for_is_part_of_the_loss() {
    let teacher = model("gpt2", "lm", 0.0, Kind::Float, 1);
    let mixture = |l1: f64| -> Variant {
        let json =
            serde_json::json!({"kind": "mask_mixture", "basis": ["shift:0", "window:8"], "l1": l1});
        serde_json::from_value(json).unwrap()
    };
    // Trains the coefficients alone, and sums up what they come to.
    let trained = |l1: f64| {
        let mut student = teacher.alias().unwrap();
        student.swap(&[0, 1], &mixture(l1), 0).unwrap();
        let mut config = quick(30);
        config.freeze = vec!["*".into(), "!*.kind.*".into()];
        let losses = only("forward_kl", 1.0);
        let objective = Distillation::new(&teacher, &student, &losses).unwrap();
        let data = examples(64, &config);
        train(&mut student, Run::new(&config, &objective, &data)).unwrap();
        let all = student.parameters();
        let own = all.iter().filter(|(name, _)| name.contains(".kind."));
        own.map(|(_, alpha)| alpha.sigmoid().sum(Kind::Double).double_value(&[])).sum::<f64>()
    };
    let (free, pulled) = (trained(0.0), trained(10.0));
    assert!(pulled < 0.9 * free, "coefficients of {free} and of {pulled}");
}

#[test]
fn a_router_learns_to_keep_its_budget() {
    for (base, by) in [("gpt2", "token"), ("distilbert", "text")] {
        let teacher = model(base, "lm", 0.0, Kind::Float, 1);
        let routed = serde_json::json!({"kind": "routed", "by": by, "budget": 0.5});
        let mut student = teacher.alias().unwrap();
        student.swap(&[0, 1], &serde_json::from_value(routed).unwrap(), 0).unwrap();
        let mut config = quick(120);
        config.freeze = vec!["*".into(), "!*.kind.*".into()];
        config.lr = 3e-2;
        let objective = Distillation::new(&teacher, &student, &only("forward_kl", 1.0)).unwrap();
        let data = examples(64, &config);
        let open = |student: &Model| {
            let batch = data.batch(0, &data.plan(0)[0]).unwrap();
            let options = ForwardOptions { attention_inputs: true, ..ForwardOptions::default() };
            let input = batch.input(student);
            let is_causal = student.config().is_causal();
            let mask = match &input.attention_mask {
                Some(keep) => attn_core::Mask::with_keep(is_causal, keep),
                None => attn_core::Mask::new(is_causal),
            };
            let inputs =
                tch::no_grad(|| student.forward(&input, &options)).unwrap().attention_inputs;
            let of = |(layer, hidden): (&&attn_core::layer::AttnLayer, &Tensor)| {
                let gates = layer.kind().routes().unwrap().open(hidden, &mask);
                gates.mean(Kind::Double).double_value(&[])
            };
            student.layers().iter().zip(&inputs).map(of).sum::<f64>() / 2.0
        };
        assert_eq!(open(&student), 1.0, "{base}: every head runs at first");
        train(&mut student, Run::new(&config, &objective, &data)).unwrap();
        let share = open(&student);
        assert!((0.2..0.7).contains(&share), "{base}: {share} of the heads run");
    }
}

#[test]
fn what_a_kind_learns_from_by_itself_is_part_of_the_loss() {
    let teacher = model("gpt2", "lm", 0.0, Kind::Float, 1);
    let indexed = serde_json::json!({"kind": "indexed", "index_dim": 4, "top_k": 2});
    // On the teacher's inputs and on its own: no other loss reaches the indexer.
    for (loss, forced) in [("attention_output", true), ("forward_kl", false)] {
        let mut student = teacher.alias().unwrap();
        student.swap(&[0, 1], &serde_json::from_value(indexed.clone()).unwrap(), 0).unwrap();
        let mut config = quick(60);
        config.freeze = vec!["*".into(), "!*.kind.*".into()];
        let losses = Losses { teacher_forced: forced, ..only(loss, 1.0) };
        let objective = Distillation::new(&teacher, &student, &losses).unwrap();
        let data = examples(64, &config);
        let own = |student: &Model| {
            let batch = data.batch(0, &data.plan(0)[0]).unwrap();
            for (name, tensor) in student.parameters() {
                let _ = tensor.set_requires_grad(name.contains(".kind."));
            }
            let options = ForwardOptions { train: true, ..ForwardOptions::default() };
            let output = student.forward(&batch.input(student), &options).unwrap();
            output.own_loss.unwrap().double_value(&[])
        };
        let before = own(&student);
        train(&mut student, Run::new(&config, &objective, &data)).unwrap();
        let after = own(&student);
        assert!(after < 0.9 * before, "{loss}: {before} before, {after} after");
        assert!(
            student
                .forward(
                    &data.batch(0, &data.plan(0)[0]).unwrap().input(&student),
                    &ForwardOptions::default()
                )
                .unwrap()
                .own_loss
                .is_none(),
            "outside of training"
        );

        // And no other where activations are computed again.
        let trained = |gradient_checkpointing: bool| {
            let mut student = teacher.alias().unwrap();
            student.swap(&[0, 1], &serde_json::from_value(indexed.clone()).unwrap(), 0).unwrap();
            let config = TrainConfig { gradient_checkpointing, ..config.clone() };
            let objective = Distillation::new(&teacher, &student, &losses).unwrap();
            train(&mut student, Run::new(&config, &objective, &data)).unwrap();
            let all = student.parameters().into_iter();
            all.filter(|(name, _)| name.contains(".kind.")).collect::<Vec<_>>()
        };
        let (kept, recomputed) = (trained(false), trained(true));
        assert_eq!(kept.len(), 6);
        for ((name, kept), (_, recomputed)) in kept.iter().zip(&recomputed) {
            let error = relative_rms(recomputed, kept);
            assert!(error < 1e-6, "{loss}: {name} is off by {error:e}");
        }
    }
}

#[test]
fn a_stage_that_reaches_nothing_it_trains_is_refused_by_name() {
    let teacher = model("gpt2", "lm", 0.0, Kind::Float, 1);
    let mut student = teacher.alias().unwrap();
    let window = serde_json::json!({"kind": "window", "size": 2});
    student.swap(&[0, 1], &serde_json::from_value(window).unwrap(), 0).unwrap();
    let mut config = quick(3);
    config.freeze = vec!["*".into(), "!*ln_f*".into()];
    let losses = only("attention_output", 1.0);
    let objective = Distillation::new(&teacher, &student, &losses).unwrap();
    let data = examples(16, &config);
    let error = train(&mut student, Run::new(&config, &objective, &data)).unwrap_err().to_string();
    assert!(
        error.contains("does not depend on anything that is trained") && error.contains("ln_f"),
        "{error}"
    );
}
