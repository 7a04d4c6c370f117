//! What stops a run, and what it says.

mod common;

use std::sync::atomic::{AtomicUsize, Ordering};

use attn_core::{Model, attention::Stream, laws::Verdict};
use attn_train::{
    Batch, Batches, BoxError, CausalLm, Classification, Completion, Error, MaskedLm, Metric,
    Objective, Run, TrainConfig, train,
};
use common::*;
use tch::{Kind, Tensor};

fn classifier() -> Model {
    model("gpt2", "classifier", 0.1, Kind::Float, 1)
}

/// Overwrites the first value of a parameter.
fn plant(model: &Model, name: &str, value: f64) {
    let (_, tensor) = model.parameters().into_iter().find(|(n, _)| n == name).unwrap();
    let _ = tch::no_grad(|| tensor.view([-1]).narrow(0, 0, 1).fill_(value));
}

fn accuracy(value: f64) -> Vec<Metric> {
    let name = "accuracy".to_owned();
    vec![Metric { name, value, unit: "fraction".into(), higher_is_better: true }]
}

#[test]
fn a_weight_that_is_not_a_number_is_named_before_the_first_step() {
    let mut model = classifier();
    plant(&model, "transformer.h.1.mlp.c_fc.weight", f64::NAN);
    let config = quick(5);
    let data = examples(20, &config);

    let error = train(&mut model, Run::new(&config, &Classification, &data)).unwrap_err();

    let text = error.to_string();
    let expected = "step 0: parameter `transformer.h.1.mlp.c_fc.weight` (1 of 4096 values NaN) is not finite\nhint: the weights";
    assert!(text.starts_with(expected), "{text}");
}

#[test]
fn a_weight_broken_on_the_way_is_named_with_step_and_batch() {
    let mut model = classifier();
    let config = TrainConfig { eval_every: 1, ..quick(9) };
    let data = examples(16, &config);
    let mut n = 0;
    let run = Run {
        evaluate: Some(Box::new(|model| {
            n += 1;
            if n == 4 {
                plant(model, "transformer.ln_f.bias", f64::INFINITY);
            }
            Ok(accuracy(0.5))
        })),
        ..Run::new(&config, &Classification, &data)
    };

    let error = train(&mut model, run).unwrap_err();

    let Error::NonFinite { place, tensor, .. } = &error else { panic!("{error}") };
    assert_eq!((place.step, place.epoch, place.batch), (4, 1, Some(1)), "{error}");
    assert_eq!(place.examples.len(), 8);
    assert_eq!(tensor, "parameter `transformer.ln_f.bias` (1 of 32 values infinite)");
}

#[test]
fn an_activation_that_overflows_is_named_by_layer() {
    let mut model = classifier();
    // Each is finite, their sum in the residual stream is not.
    for name in ["transformer.h.0.mlp.c_proj.bias", "transformer.h.1.mlp.c_proj.bias"] {
        let (_, tensor) = model.parameters().into_iter().find(|(n, _)| n == name).unwrap();
        let _ = tch::no_grad(|| tensor.shallow_clone().fill_(3e38));
    }
    let config = quick(5);
    let data = examples(20, &config);

    let laws = |_: &Model, _: &Tensor| Ok(Vec::new());
    let run = Run { laws, ..Run::new(&config, &Classification, &data) };
    let error = train(&mut model, run).unwrap_err();

    let Error::NonFinite { place, tensor, .. } = &error else { panic!("{error}") };
    assert_eq!((place.step, place.batch), (1, Some(0)));
    assert!(
        tensor.starts_with("activation `hidden_states.2`, what layer 1 and the final norm give"),
        "{tensor}"
    );
}

/// Classification, plus something whose value is 0 and whose gradient is not a number, at one example.
struct BadGradient(usize);

impl Objective for BadGradient {
    fn name(&self) -> &'static str {
        Classification.name()
    }

    fn check(&self, model: &Model) -> attn_train::Result<()> {
        Classification.check(model)
    }

    fn n_targets(&self, batch: &Batch) -> usize {
        Classification.n_targets(batch)
    }

    fn loss(&self, model: &Model, batch: &Batch, stream: Stream) -> attn_train::Result<Tensor> {
        let loss = Classification.loss(model, batch, stream)?;
        if !batch.rows.indices.contains(&self.0) {
            return Ok(loss);
        }
        let find = |end: &str| {
            model.parameters().into_iter().find(|(name, _)| name.ends_with(end)).unwrap().1
        };
        // ∂√x at 0 is infinite, times 0.
        let bad = |x: Tensor| (x * 0.0).sqrt().sum(Kind::Float);
        Ok(loss + bad(find("h.0.attn.c_proj.weight")) + bad(find("h.1.ln_1.bias")))
    }
}

#[test]
fn a_gradient_is_named_with_the_batch_it_came_from() {
    for gradient_checkpointing in [false, true] {
        let config = TrainConfig { accumulation: 3, gradient_checkpointing, ..quick(20) };
        names_the_batch(&config);
    }
}

fn names_the_batch(config: &TrainConfig) {
    let mut model = classifier();
    let data = examples(48, config); // Two steps of three batches each an epoch.
    let plan = data.plan(0);
    let culprit = plan[4][2];

    let error = train(&mut model, Run::new(config, &BadGradient(culprit), &data)).unwrap_err();

    let Error::NonFinite { place, tensor, .. } = &error else { panic!("{error}") };
    assert_eq!((place.step, place.epoch, place.batch), (2, 0, Some(4)), "{error}");
    assert!(place.examples.contains(&culprit));
    // The backward pass meets the later layer first.
    assert!(
        tensor.starts_with("gradient of `transformer.h.1.ln_1.bias` (32 of 32 values NaN)"),
        "{tensor}"
    );
}

#[test]
fn a_run_that_ends_in_broken_weights_fails() {
    let mut model = classifier();
    let config = TrainConfig { eval_every: 1, ..quick(2) };
    let data = examples(16, &config);
    let mut n = 0;
    let run = Run {
        evaluate: Some(Box::new(|model| {
            n += 1;
            if n == 3 {
                plant(model, "score.weight", f64::NAN);
            }
            Ok(accuracy(0.5))
        })),
        ..Run::new(&config, &Classification, &data)
    };

    let error = train(&mut model, run).unwrap_err().to_string();

    assert!(error.starts_with("step 2: parameter `score.weight` (1 of 64 values NaN)"), "{error}");
}

#[test]
fn a_model_that_breaks_a_law_is_not_trained() {
    static SEEN: AtomicUsize = AtomicUsize::new(0);
    let mut model = model("gpt2", "lm", 0.1, Kind::Float, 1);
    let before = weights(&model);
    let config = quick(5);
    let data = examples(20, &config);
    let verdict =
        |law, error| Verdict { law, error, tolerance: 1e-5, place: "token 3 of 9".into() };
    let run = Run {
        laws: |model, ids| {
            SEEN.store((ids.size()[0] * 100 + ids.size()[1]) as usize, Ordering::Relaxed);
            let held = attn_core::laws::for_model(model, ids)?;
            assert!(held.iter().all(Verdict::held) && held.len() == 3, "{held:?}");
            let place = "token 3 of 9".to_owned();
            let law = "a_causal_model_ignores_the_future";
            Ok([held, vec![Verdict { law, error: 0.5, tolerance: 1e-5, place }]].concat())
        },
        ..Run::new(&config, &CausalLm, &data)
    };

    let error = train(&mut model, run).unwrap_err();

    let Error::Laws { broken } = &error else { panic!("{error}") };
    assert_eq!(*broken, [verdict("a_causal_model_ignores_the_future", 0.5)]);
    assert_eq!(
        error.to_string(),
        "the model breaks 1 law(s), so training it would mean nothing\n  a_causal_model_ignores_the_future BROKEN: \
         error 5.00e-1, allowed 1e-5, token 3 of 9"
    );
    assert_same(&weights(&model), &before);
    // Two rows of real tokens.
    let seen = SEEN.load(Ordering::Relaxed);
    assert!((208..=212).contains(&seen), "{seen}");
}

#[test]
fn the_head_has_to_fit_the_objective() {
    let config = quick(1);
    let data = examples(20, &config);
    let cases: [(&dyn Objective, &str, &str, &str); 5] = [
        (&Completion, "distilbert", "lm", "a decoder with a language-model head"),
        (&Classification, "gpt2", "lm", "a classifier"),
        (&CausalLm, "gpt2", "classifier", "a decoder with a language-model head"),
        (&CausalLm, "distilbert", "lm", "a decoder with a language-model head"),
        (&MaskedLm, "llama", "lm", "an encoder with a language-model head"),
    ];
    for (objective, base, head, wanted) in cases {
        let mut model = model(base, head, 0.0, Kind::Float, 1);
        match train(&mut model, Run::new(&config, objective, &data)).unwrap_err() {
            Error::Head { expected, .. } => assert_eq!(expected, wanted),
            other => panic!("{other}"),
        }
    }
    let mut encoder = model("distilbert", "lm", 0.0, Kind::Float, 1);
    let error = train(&mut encoder, Run::new(&config, &MaskedLm, &data)).unwrap_err();
    assert!(matches!(error, Error::NoTargets { .. }), "unmasked data: {error}");
    let mut decoder = model("gpt2", "lm", 0.0, Kind::Float, 1);
    let error = train(&mut decoder, Run::new(&config, &Completion, &data)).unwrap_err();
    assert!(matches!(error, Error::NoTargets { .. }), "data without answers: {error}");
}

#[test]
fn weights_in_half_precision_are_not_trained() {
    let config = quick(1);
    let data = examples(20, &config);
    let mut model = model("gpt2", "classifier", 0.0, Kind::BFloat16, 1);

    let error = train(&mut model, Run::new(&config, &Classification, &data)).unwrap_err();

    assert!(matches!(error, Error::Precision { kind: Kind::BFloat16 }), "{error}");
}

#[test]
fn settings_are_checked_first() {
    let data = examples(20, &quick(1));
    let refused = |config: TrainConfig| {
        train(&mut classifier(), Run::new(&config, &Classification, &data)).unwrap_err().to_string()
    };

    assert_eq!(
        refused(TrainConfig { lr: -1.0, ..quick(1) }),
        "`lr` is -1, expected a number above 0"
    );
    assert_eq!(
        refused(TrainConfig { select: Some("accuracy".into()), ..quick(1) }),
        "`select` is `accuracy`, expected nothing, as the run has no evaluation"
    );
    let text = refused(TrainConfig { freeze: vec!["transformer.h.7.*".into()], ..quick(1) });
    assert!(
        text.starts_with("`freeze`: `transformer.h.7.*` matches no parameter\nhint: "),
        "{text}"
    );
    let text = refused(TrainConfig { freeze: vec!["*".into()], ..quick(1) });
    assert!(text.starts_with("`freeze`: `*` leave none of "), "{text}");
    let config = TrainConfig { warmup_steps: Some(9), max_steps: None, epochs: 1, ..quick(1) };
    assert_eq!(refused(config), "`warmup_steps` is 9, expected at most the steps of the run");
}

#[test]
fn a_metric_that_is_not_given_is_refused_before_training() {
    let config = TrainConfig { select: Some("acuracy".into()), ..quick(3) };
    let data = examples(20, &config);
    let mut model = classifier();
    let before = weights(&model);
    let run = Run {
        evaluate: Some(Box::new(|_| Ok(accuracy(0.5)))),
        ..Run::new(&config, &Classification, &data)
    };

    let error = train(&mut model, run).unwrap_err().to_string();

    assert_eq!(
        error,
        "`select` is `acuracy`, which the evaluation does not give; it gives `accuracy`"
    );
    assert_same(&weights(&model), &before);
}

#[test]
fn the_callers_own_errors_come_back_with_their_place() {
    struct Broken;
    impl Batches for Broken {
        fn plan(&self, _: u64) -> Vec<Vec<usize>> {
            vec![vec![0], vec![1], vec![2]]
        }
        fn batch(&self, epoch: u64, rows: &[usize]) -> Result<Batch, BoxError> {
            match (epoch, rows[0]) {
                (1, 1) => Err("the disk is gone".into()),
                _ => examples(20, &quick(1)).batch(epoch, rows),
            }
        }
    }
    struct Empty;
    impl Batches for Empty {
        fn plan(&self, _: u64) -> Vec<Vec<usize>> {
            Vec::new()
        }
        fn batch(&self, _: u64, _: &[usize]) -> Result<Batch, BoxError> {
            unreachable!("no batch is planned")
        }
    }
    let config = quick(9);
    let data = examples(20, &config);

    let error = train(&mut classifier(), Run::new(&config, &Classification, &Broken)).unwrap_err();
    assert_eq!(error.to_string(), "cannot make batch 1 of epoch 1");
    assert_eq!(std::error::Error::source(&error).unwrap().to_string(), "the disk is gone");

    let error = train(&mut classifier(), Run::new(&config, &Classification, &Empty)).unwrap_err();
    assert!(matches!(error, Error::NoBatches { epoch: 0 }), "{error}");

    let run = Run {
        evaluate: Some(Box::new(|_| Err("no such split".into()))),
        ..Run::new(&config, &Classification, &data)
    };
    let error = train(&mut classifier(), run).unwrap_err();
    assert_eq!(error.to_string(), "the evaluation at step 0 failed");
}
