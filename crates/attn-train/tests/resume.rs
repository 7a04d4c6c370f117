//! A run that was interrupted, killed or damaged ends bit for bit where an unbroken one does.
//!
//! LibTorch's random streams belong to the process, so these tests take turns.

mod common;

use std::{
    fs,
    num::NonZeroU32,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use attn_core::{LoadOptions, Lora, Model, Variant, testing, variants};
use attn_train::{
    CausalLm, Classification, Error, Event, Examples, METRICS_FILE, MaskedLm, Metric, Objective,
    Outcome, Run, Schedule, Summary, TrainConfig, checkpoint, train,
};
use common::*;
use tch::{Device, Kind, Tensor};

static TURN: Mutex<()> = Mutex::new(());

fn turn() -> MutexGuard<'static, ()> {
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    // Models this small are slower on several threads, far slower where other tests use the processor too. The number
    // belongs to the process as well.
    tch::set_num_threads(1);
    turn
}

/// One kind of run, small but with everything that could go astray: dropout, accumulation, uneven last steps of an
/// epoch, frozen parameters, selection, swapped attention.
struct Case {
    base: &'static str,
    head: &'static str,
    objective: &'static dyn Objective,
    config: TrainConfig,
    dropout: f64,
    /// Whether low-rank adapters are trained in place of the matrices.
    adapters: bool,
    kind: Kind,
    device: Device,
}

fn case(name: &str) -> Case {
    let config = TrainConfig {
        lr: 3e-3,
        schedule: Schedule::Cosine,
        warmup_ratio: 0.2,
        epochs: 3,
        batch_size: 4,
        accumulation: 2,
        weight_decay: 0.1,
        eval_every: 3,
        checkpoint_every: 4,
        log_every: 5,
        seed: 11,
        ..TrainConfig::default()
    };
    let (base, head, objective, config): (_, _, &'static dyn Objective, _) = match name {
        "classifier" => {
            let select = Some("score".into());
            let config = TrainConfig { select, freeze: vec!["*wte*".into()], ..config };
            ("gpt2", "classifier", &Classification, config)
        }
        "adapters" => {
            let freeze = ["*", "!*.lora_*", "!score*"].map(str::to_owned).into();
            let select = Some("score".into());
            let config = TrainConfig { select, freeze, gradient_checkpointing: true, ..config };
            ("gpt2", "classifier", &Classification, config)
        }
        "causal" => ("llama", "lm", &CausalLm, TrainConfig { eval_every: 0, ..config }),
        "masked" => ("distilbert", "lm", &MaskedLm, TrainConfig { checkpoint_every: 1, ..config }),
        other => unreachable!("{other}"),
    };
    let (kind, device) = (Kind::Float, Device::Cpu);
    let adapters = name == "adapters";
    Case { base, head, objective, config, dropout: 0.2, adapters, kind, device }
}

const CASES: [&str; 3] = ["classifier", "causal", "masked"];

impl Case {
    /// Gated attention below, a window shorter than the texts above.
    fn model(&self, seed: u64) -> Model {
        let Self { kind, device, .. } = *self;
        // Checkpoints leave the base model out: it is the same whenever it is loaded.
        let (seed, adapter_seed) = if self.adapters { (1, seed) } else { (seed, 0) };
        let options = LoadOptions { seed, kind, device, ..LoadOptions::default() };
        let mut model = Model::init(config(self.base, self.head, self.dropout), &options).unwrap();
        model.swap(&[0], &Variant::Gated(variants::gated::Config::default()), seed).unwrap();
        let size = const { NonZeroU32::new(3).unwrap() };
        model.swap(&[1], &Variant::Window(variants::window::Config { size }), seed).unwrap();
        if self.adapters {
            let lora = Lora { dropout: 0.1, ..Lora::default() };
            model.add_lora(&lora, adapter_seed).unwrap();
        }
        model
    }

    /// 27 texts in 7 batches: three full steps and one of a single batch an epoch, 12 steps in all.
    fn data(&self) -> Examples {
        let data = examples(27, &self.config);
        if self.objective.name() == MaskedLm.name() { data.with_masking(masking()) } else { data }
    }

    fn run(&self, model: &mut Model, dir: &Path, options: Options) -> attn_train::Result<Summary> {
        let data = self.data();
        let stop = Arc::new(AtomicBool::new(false));
        let stopper = Arc::clone(&stop);
        let in_evaluation = Arc::clone(&stop);
        let mut n_evaluations = 0;
        let run = Run {
            dir: Some(dir.to_owned()),
            resume: options.resume,
            files: vec![("tokenizer.json".into(), b"{}".to_vec())],
            stop,
            evaluate: Some(Box::new(move |model| {
                n_evaluations += 1;
                if options.stop_in_evaluation == Some(n_evaluations) {
                    in_evaluation.store(true, Ordering::Relaxed);
                    return Err("stopped".into());
                }
                // As careless as a callback can be with the streams.
                let _ = Tensor::rand([17], (Kind::Float, Device::Cpu));
                Ok(score(model))
            })),
            observe: Box::new(move |event| {
                if let Event::Step(progress) = event
                    && options.stop_at == Some(progress.step)
                {
                    stopper.store(true, Ordering::Relaxed);
                }
            }),
            ..Run::new(&self.config, self.objective, &data)
        };
        train(model, run)
    }
}

#[derive(Debug, Clone, Copy, Default)]
struct Options {
    resume: bool,
    stop_at: Option<u64>,
    stop_in_evaluation: Option<u64>,
}

const RESUME: Options = Options { resume: true, stop_at: None, stop_in_evaluation: None };

/// A number that changes with every weight, up and down.
fn score(model: &Model) -> Vec<Metric> {
    let sum: f64 =
        model.parameters().iter().map(|(_, t)| t.sum(Kind::Double).double_value(&[])).sum();
    let metric = |name: &str, value| Metric {
        name: name.into(),
        value,
        unit: "1".into(),
        higher_is_better: true,
    };
    vec![metric("score", (sum * 10.0).sin()), metric("sum", sum)]
}

/// Everything of a finished run that an interruption could have changed.
#[derive(Debug)]
struct Trace {
    weights: std::collections::BTreeMap<String, Tensor>,
    state: std::collections::BTreeMap<String, Tensor>,
    json: serde_json::Value,
    metrics: String,
    summary: Summary,
}

impl Trace {
    fn of(dir: &Path, model: &Model, summary: Summary) -> Self {
        let (step, newest) = checkpoint::list(dir).unwrap().remove(0);
        assert_eq!(step, summary.total_steps);
        let text = fs::read_to_string(newest.join("train_state.json")).unwrap();
        Self {
            weights: weights(model),
            state: tensors(&newest.join("train_state.safetensors")),
            json: without_clock(&text),
            metrics: fs::read_to_string(dir.join(METRICS_FILE)).unwrap(),
            summary,
        }
    }

    #[track_caller]
    fn assert_same(&self, other: &Self) {
        assert_eq!(self.metrics, other.metrics);
        assert_eq!(self.json, other.json);
        assert_same(&self.state, &other.state);
        assert_same(&self.weights, &other.weights);
        let (a, b) = (&self.summary, &other.summary);
        assert_eq!((a.outcome, a.step, a.n_tokens), (b.outcome, b.step, b.n_tokens));
        assert_eq!((&a.before, &a.after, &a.best), (&b.before, &b.after, &b.best));
        assert_eq!(a.train_loss, b.train_loss);
    }
}

/// A `train_state.json` without the seconds, the one field that no two runs share.
fn without_clock(text: &str) -> serde_json::Value {
    let mut json: serde_json::Value = serde_json::from_str(text).unwrap();
    assert!(json.as_object_mut().unwrap().remove("elapsed_s").unwrap().as_f64().unwrap() > 0.0);
    json
}

fn unbroken(case: &Case) -> Trace {
    let dir = tempfile::tempdir().unwrap();
    let mut model = case.model(1);
    let summary = case.run(&mut model, dir.path(), Options::default()).unwrap();
    assert_eq!((summary.outcome, summary.step, summary.total_steps), (Outcome::Finished, 12, 12));
    Trace::of(dir.path(), &model, summary)
}

/// Moves the streams and forgets the seed, as another process would.
fn forget() {
    tch::manual_seed(987_654);
    let _ = Tensor::randn([5], (Kind::Float, Device::Cpu));
}

#[test]
fn a_run_repeats_itself() {
    let _turn = turn();
    let case = case("classifier");
    let first = unbroken(&case);
    forget();
    first.assert_same(&unbroken(&case));
}

/// Stops the run after each of a few steps: on a line of the log, on an evaluation, at the end of an epoch, on none of
/// these, and one before the end.
fn stop_and_resume(case: &Case) {
    let _turn = turn();
    let expected = unbroken(case);
    assert!(expected.metrics.lines().count() > 10, "{}", expected.metrics);
    for stop_at in [1, 3, 4, 5, 7, 11] {
        let dir = tempfile::tempdir().unwrap();
        let options = Options { stop_at: Some(stop_at), ..Options::default() };
        let summary = case.run(&mut case.model(1), dir.path(), options).unwrap();
        assert_eq!((summary.outcome, summary.step), (Outcome::Interrupted, stop_at));
        assert!(summary.checkpoint.is_some());

        forget();
        let mut model = case.model(77);
        let summary = case.run(&mut model, dir.path(), RESUME).unwrap();

        assert_eq!(summary.resumed_from, Some(stop_at));
        Trace::of(dir.path(), &model, summary).assert_same(&expected);
    }
}

#[test]
fn a_resumed_classifier_equals_an_unbroken_one() {
    stop_and_resume(&case("classifier"));
}

#[test]
fn a_resumed_decoder_equals_an_unbroken_one() {
    stop_and_resume(&case("causal"));
}

#[test]
fn a_resumed_encoder_equals_an_unbroken_one() {
    stop_and_resume(&case("masked"));
}

#[test]
fn a_resumed_run_with_adapters_equals_an_unbroken_one() {
    let case = case("adapters");
    stop_and_resume(&case);
    let _turn = turn();
    let dir = tempfile::tempdir().unwrap();
    let mut model = case.model(1);
    let before = weights(&model);
    case.run(&mut model, dir.path(), Options::default()).unwrap();

    let (_, newest) = checkpoint::list(dir.path()).unwrap().remove(0);
    let stored = tensors(&newest.join("trained.safetensors"));
    assert!(stored.keys().all(|name| name.contains(".lora_") || name.starts_with("score")));
    assert_eq!(stored.len(), 2 * 2 + 1, "two factors a layer, and the classifier");
    for (name, after) in weights(&model) {
        assert_eq!(stored.contains_key(&name), !after.equal(&before[&name]), "{name}");
    }
}

#[test]
fn adapters_go_on_beside_the_base_and_the_settings_they_began_with() {
    let _turn = turn();
    let case = case("adapters");
    let dir = tempfile::tempdir().unwrap();
    let options = Options { stop_at: Some(3), ..Options::default() };
    case.run(&mut case.model(1), dir.path(), options).unwrap();

    let mut other = case.model(1);
    let (_, norm) = other.parameters().into_iter().find(|(n, _)| n.ends_with("ln_f.bias")).unwrap();
    let _ = tch::no_grad(|| norm.shallow_clone().g_add_scalar_(0.5));
    let refused = |model: &mut Model| match case.run(model, dir.path(), RESUME).unwrap_err() {
        Error::Changed { field, .. } => field,
        error => panic!("{error}"),
    };
    assert_eq!(refused(&mut other), "base model");

    let mut other = case.model(1);
    other.merge_lora().unwrap();
    other.add_lora(&Lora { alpha: 3.0, dropout: 0.1, ..Lora::default() }, 1).unwrap();
    assert_eq!(refused(&mut other), "adapters: lora");
}

#[test]
fn recomputed_activations_train_the_same_model() {
    let _turn = turn();
    let mut case = case("adapters");
    let mut trained = || {
        let dir = tempfile::tempdir().unwrap();
        let mut model = case.model(1);
        case.run(&mut model, dir.path(), Options::default()).unwrap();
        case.config.gradient_checkpointing = false;
        weights(&model)
    };
    let (recomputed, kept) = (trained(), trained());
    assert_same(&recomputed, &kept);
}

#[test]
fn a_run_stopped_before_its_first_step_or_many_times_ends_the_same() {
    let _turn = turn();
    let case = case("masked");
    let expected = unbroken(&case);
    let dir = tempfile::tempdir().unwrap();
    let mut resume = false;
    // The evaluation of step 0, then every second step, then the evaluations of steps 3, 6 and 9.
    for (stop_at, stop_in_evaluation) in [
        (None, Some(1)),
        (Some(2), None),
        (None, Some(1)),
        (Some(4), None),
        (None, Some(1)),
        (None, Some(2)),
    ] {
        let options = Options { resume, stop_at, stop_in_evaluation };
        let summary = case.run(&mut case.model(1), dir.path(), options).unwrap();
        assert_eq!(summary.outcome, Outcome::Interrupted);
        forget();
        resume = true;
    }
    let mut model = case.model(3);
    let summary = case.run(&mut model, dir.path(), RESUME).unwrap();

    assert_eq!(summary.resumed_from, Some(9));
    Trace::of(dir.path(), &model, summary).assert_same(&expected);
}

#[test]
fn a_step_stopped_between_its_batches_is_done_again_as_a_whole() {
    /// Stops in the second batch of step 3.
    struct Stopping(Arc<AtomicBool>, Mutex<usize>);
    impl Objective for Stopping {
        fn name(&self) -> &'static str {
            Classification.name()
        }
        fn check(&self, model: &Model) -> attn_train::Result<()> {
            Classification.check(model)
        }
        fn n_targets(&self, batch: &attn_train::Batch) -> usize {
            Classification.n_targets(batch)
        }
        fn loss(
            &self,
            model: &Model,
            batch: &attn_train::Batch,
            stream: attn_core::attention::Stream,
        ) -> attn_train::Result<Tensor> {
            let mut n = self.1.lock().unwrap();
            *n += 1;
            if *n == 5 {
                self.0.store(true, Ordering::Relaxed);
            }
            Classification.loss(model, batch, stream)
        }
    }
    let _turn = turn();
    let case = case("classifier");
    let expected = unbroken(&case);
    let dir = tempfile::tempdir().unwrap();
    let data = case.data();
    let stop = Arc::new(AtomicBool::new(false));
    let objective = Stopping(Arc::clone(&stop), Mutex::new(0));
    let run = Run {
        dir: Some(dir.path().to_owned()),
        stop,
        evaluate: Some(Box::new(|model| Ok(score(model)))),
        ..Run::new(&case.config, &objective, &data)
    };
    let summary = train(&mut case.model(1), run).unwrap();
    assert_eq!((summary.outcome, summary.step), (Outcome::Interrupted, 2));

    forget();
    let mut model = case.model(5);
    let summary = case.run(&mut model, dir.path(), RESUME).unwrap();

    // A checkpoint of a run with the tokenizer differs in nothing else.
    Trace::of(dir.path(), &model, summary).assert_same(&expected);
}

/// Operations on tensors as small as those of the other tests run on one thread whatever is allowed.
#[test]
fn several_threads_are_exact_too() {
    let _turn = turn();
    tch::set_num_threads(2);
    let json = serde_json::json!({
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 2000, "n_positions": 64,
        "n_embd": 64, "n_layer": 1, "n_head": 4, "attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1,
    });
    let serde_json::Value::Object(json) = json else { unreachable!("written as an object above") };
    let model = |seed| {
        let config = attn_core::Config::from_json(json.clone()).unwrap();
        Model::init(config, &LoadOptions { seed, ..LoadOptions::default() }).unwrap()
    };
    let rows: Vec<_> = (0..96_u32)
        .map(|row| {
            let ids: Vec<u32> =
                (0..33 + row % 31).map(|i| (row * 97 + i * i * 31) % 2000).collect();
            encoded(&ids, 0, row as usize)
        })
        .collect();
    let config = TrainConfig { batch_size: 16, log_every: 2, ..quick(3) };
    let data = Examples::new(rows, config.plan().unwrap(), 0, 1);
    let run = |dir: &Path, seed, resume, stop_at| {
        let stop = Arc::new(AtomicBool::new(false));
        let stopper = Arc::clone(&stop);
        let mut model = model(seed);
        let run = Run {
            dir: Some(dir.to_owned()),
            resume,
            stop,
            observe: Box::new(move |event| {
                if let Event::Step(progress) = event
                    && progress.step == stop_at
                {
                    stopper.store(true, Ordering::Relaxed);
                }
            }),
            ..Run::new(&config, &CausalLm, &data)
        };
        let summary = train(&mut model, run).unwrap();
        (model, summary)
    };
    let dir = tempfile::tempdir().unwrap();
    let (whole, summary) = run(dir.path(), 1, false, 0);
    let expected = Trace::of(dir.path(), &whole, summary);
    assert_eq!(expected.json["environment"]["threads"], 2);

    let dir = tempfile::tempdir().unwrap();
    run(dir.path(), 1, false, 1);
    forget();
    let (resumed, summary) = run(dir.path(), 2, true, 0);

    Trace::of(dir.path(), &resumed, summary).assert_same(&expected);
}

#[test]
fn a_finished_run_resumes_to_what_it_was() {
    let _turn = turn();
    let case = case("classifier");
    let dir = tempfile::tempdir().unwrap();
    let mut model = case.model(1);
    let summary = case.run(&mut model, dir.path(), Options::default()).unwrap();
    let expected = Trace::of(dir.path(), &model, summary);

    let mut model = case.model(2);
    let summary = case.run(&mut model, dir.path(), RESUME).unwrap();

    assert_eq!(summary.resumed_from, Some(12));
    Trace::of(dir.path(), &model, summary).assert_same(&expected);
}

#[test]
fn the_best_model_is_left_and_kept() {
    let _turn = turn();
    let case = case("classifier");
    for in_folder in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let data = case.data();
        // Steps 0, 3, 6, 9, 12: the first of equals wins.
        let mut script = [0.5, 0.4, 0.6, 0.6, 0.5].into_iter();
        let mut at_6 = None;
        let mut model = case.model(1);
        let run = Run {
            dir: in_folder.then(|| dir.path().to_owned()),
            evaluate: Some(Box::new(|model| {
                let value = script.next().unwrap();
                if value == 0.6 && at_6.is_none() {
                    at_6 = Some(weights(model));
                }
                let mut metrics = score(model);
                metrics[0].value = value;
                Ok(metrics)
            })),
            ..Run::new(&case.config, &Classification, &data)
        };

        let summary = train(&mut model, run).unwrap();

        assert_eq!((summary.step, summary.selected_step), (12, 6));
        let values = |metrics: &[Metric]| metrics[0].value;
        assert_eq!((values(&summary.before), values(&summary.after)), (0.5, 0.6));
        assert_same(&weights(&model), &at_6.unwrap());
        if in_folder {
            let best = checkpoint::best_folder(dir.path(), 6);
            let (loaded, _) = Model::load(&best, &LoadOptions::default()).unwrap();
            assert_same(&weights(&loaded), &weights(&model));
            assert_eq!(kept(dir.path()), ["best-000006", "step-000008", "step-000012"]);
        }
    }
}

#[test]
fn a_best_model_that_is_gone_or_damaged_ends_no_run() {
    let _turn = turn();
    let case = case("classifier");
    let data = case.data();
    for damage in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        // Steps 0, 3, 6, 9, 12.
        let run = |script: Vec<f64>, resume: bool| {
            let mut values = script.into_iter();
            let run = Run {
                dir: Some(dir.path().to_owned()),
                resume,
                evaluate: Some(Box::new(move |model| {
                    let mut metrics = score(model);
                    metrics[0].value = values.next().unwrap();
                    Ok(metrics)
                })),
                ..Run::new(&case.config, &Classification, &data)
            };
            train(&mut case.model(1), run).unwrap()
        };
        assert_eq!(run(vec![0.5, 0.4, 0.6, 0.6, 0.5], false).selected_step, 6);
        let best = checkpoint::best_folder(dir.path(), 6);
        if damage {
            let file = best.join("model.safetensors");
            let mut bytes = fs::read(&file).unwrap();
            *bytes.last_mut().unwrap() ^= 1;
            fs::write(&file, bytes).unwrap();
        } else {
            fs::remove_dir_all(&best).unwrap();
        }
        let summary = run(Vec::new(), true);
        assert_eq!((summary.resumed_from, summary.selected_step), (Some(12), 12), "{damage}");
    }
}

#[test]
fn a_model_that_no_step_improved_is_left_as_it_was() {
    let _turn = turn();
    let case = case("classifier");
    let data = case.data();
    // Steps 0, 3, 6, 9, 12. A trained model that is as good as the untrained one is taken before it.
    for (script, selected) in [([0.9, 0.4, 0.6, 0.8, 0.5], 0), ([0.9, 0.4, 0.9, 0.9, 0.5], 6)] {
        for in_folder in [true, false] {
            let dir = tempfile::tempdir().unwrap();
            let mut values = script.into_iter();
            let mut bests = Vec::new();
            let mut model = case.model(1);
            let untrained = weights(&model);
            let run = Run {
                dir: in_folder.then(|| dir.path().to_owned()),
                evaluate: Some(Box::new(|model| {
                    let mut metrics = score(model);
                    metrics[0].value = values.next().unwrap();
                    Ok(metrics)
                })),
                observe: Box::new(|event| {
                    if let Event::Evaluated { step, is_best: true, .. } = event {
                        bests.push(step);
                    }
                }),
                ..Run::new(&case.config, &Classification, &data)
            };

            let summary = train(&mut model, run).unwrap();

            assert_eq!((summary.step, summary.selected_step), (12, selected));
            assert_eq!(summary.after[0].value, 0.9);
            assert_eq!(bests, if selected == 0 { vec![0] } else { vec![0, selected] });
            if selected == 0 {
                assert_same(&weights(&model), &untrained);
            }
        }
    }
}

#[test]
fn seconds_add_up_over_the_processes_of_a_run() {
    let _turn = turn();
    let case = case("classifier");
    let dir = tempfile::tempdir().unwrap();
    let options = Options { stop_at: Some(4), ..Options::default() };
    let first = case.run(&mut case.model(1), dir.path(), options).unwrap();
    // As if the first part had taken an hour.
    let path = first.checkpoint.unwrap().join("train_state.json");
    let mut state: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    let saved = state["elapsed_s"].as_f64().unwrap();
    assert!(saved > 0.0 && saved <= first.elapsed_s, "{saved} {}", first.elapsed_s);
    state["elapsed_s"] = 3600.0.into();
    fs::write(&path, state.to_string()).unwrap();
    fs::remove_file(path.with_file_name("SHA256SUMS")).unwrap(); // as in one of an older version

    let summary = case.run(&mut case.model(1), dir.path(), RESUME).unwrap();

    assert!((3600.0..3700.0).contains(&summary.elapsed_s), "{}", summary.elapsed_s);
}

/// The folders of checkpoints, sorted.
fn kept(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir.join(checkpoint::FOLDER))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .filter(|name| name != ".lock")
        .collect();
    names.sort();
    names
}

#[test]
fn a_best_model_stays_as_long_as_a_kept_checkpoint_knows_of_it() {
    let _turn = turn();
    let mut case = case("classifier");
    case.config.checkpoint_every = 2;
    let dir = tempfile::tempdir().unwrap();
    let data = case.data();
    let mut value = 0.0;
    let mut seen = Vec::new();
    let run = Run {
        dir: Some(dir.path().to_owned()),
        evaluate: Some(Box::new(|model| {
            value += 0.1; // Always better.
            let mut metrics = score(model);
            metrics[0].value = value;
            Ok(metrics)
        })),
        observe: Box::new(|event| {
            if let Event::Saved { step, .. } = event {
                seen.push((step, kept(dir.path())));
            }
        }),
        ..Run::new(&case.config, &Classification, &data)
    };
    train(&mut case.model(1), run).unwrap();

    // After step 8: step 6 knows of the best of step 6, and step 4, the best of 3, is gone.
    let at_8 = seen.iter().find(|(step, _)| *step == 8).unwrap();
    assert_eq!(at_8.1, ["best-000006", "step-000006", "step-000008"]);
    // After the best of step 9, that of step 6 stays: both checkpoints know of it.
    let at_9 = seen.iter().find(|(step, _)| *step == 9).unwrap();
    assert_eq!(at_9.1, ["best-000006", "best-000009", "step-000006", "step-000008"]);
    let at_10 = seen.iter().find(|(step, _)| *step == 10).unwrap();
    assert_eq!(at_10.1, ["best-000006", "best-000009", "step-000008", "step-000010"]);
    assert_eq!(kept(dir.path()), ["best-000009", "best-000012", "step-000010", "step-000012"]);
}

#[test]
fn a_checkpoint_is_a_model_folder() {
    let _turn = turn();
    let case = case("causal");
    let dir = tempfile::tempdir().unwrap();
    let mut model = case.model(1);
    let summary = case.run(&mut model, dir.path(), Options::default()).unwrap();

    let path = summary.checkpoint.unwrap();
    let (loaded, report) = Model::load(&path, &LoadOptions::default()).unwrap();

    assert_eq!(path, dir.path().join("checkpoints/step-000012"));
    assert_eq!(report, attn_core::LoadReport::default());
    assert_same(&weights(&loaded), &weights(&model));
    assert_eq!(fs::read(path.join("tokenizer.json")).unwrap(), b"{}");
}

#[test]
fn a_torn_checkpoint_is_passed_over() {
    let _turn = turn();
    let case = case("classifier");
    let expected = unbroken(&case);
    let truncate = |path: PathBuf| {
        let len = fs::metadata(&path).unwrap().len();
        fs::File::options().write(true).open(path).unwrap().set_len(len / 2).unwrap();
    };
    // One that no header tells of.
    let flip = |path: PathBuf| {
        let mut bytes = fs::read(&path).unwrap();
        let at = bytes.len() - 5;
        bytes[at] ^= 1;
        fs::write(path, bytes).unwrap();
    };
    type Damage<'a> = &'a dyn Fn(&Path);
    let damages: [(&str, Damage<'_>); 9] = [
        ("a bit of the weights", &|dir| flip(dir.join("model.safetensors"))),
        ("a bit of the state", &|dir| flip(dir.join("train_state.safetensors"))),
        ("weights cut", &|dir| truncate(dir.join("model.safetensors"))),
        ("state cut", &|dir| truncate(dir.join("train_state.safetensors"))),
        ("json cut", &|dir| truncate(dir.join("train_state.json"))),
        ("another model's state", &|dir| {
            let path = dir.join("train_state.safetensors");
            let mut all = tensors(&path);
            assert!(all.remove("m.score.weight").is_some());
            let all: Vec<_> = all.into_iter().collect();
            attn_core::checkpoint::write_tensors(&path, &all, &Default::default()).unwrap();
        }),
        ("weights gone", &|dir| fs::remove_file(dir.join("model.safetensors")).unwrap()),
        ("config gone", &|dir| fs::remove_file(dir.join("config.json")).unwrap()),
        ("empty", &|dir| {
            fs::remove_dir_all(dir).unwrap();
            fs::create_dir(dir).unwrap();
        }),
    ];
    for (what, damage) in damages {
        let dir = tempfile::tempdir().unwrap();
        let options = Options { stop_at: Some(10), ..Options::default() };
        case.run(&mut case.model(1), dir.path(), options).unwrap();
        let steps: Vec<u64> = checkpoint::list(dir.path()).unwrap().iter().map(|c| c.0).collect();
        assert_eq!(steps, [10, 8]);
        damage(&dir.path().join("checkpoints/step-000010"));

        forget();
        let mut model = case.model(9);
        let summary = case.run(&mut model, dir.path(), RESUME).unwrap();

        assert_eq!(summary.resumed_from, Some(8), "{what}");
        Trace::of(dir.path(), &model, summary).assert_same(&expected);
    }
}

#[test]
fn without_a_good_checkpoint_nothing_is_resumed() {
    let _turn = turn();
    let case = case("masked");
    let dir = tempfile::tempdir().unwrap();
    let error = case.run(&mut case.model(1), dir.path(), RESUME).unwrap_err();
    assert!(matches!(error, Error::NoCheckpoint { .. }), "{error}");

    let options = Options { stop_at: Some(3), ..Options::default() };
    case.run(&mut case.model(1), dir.path(), options).unwrap();
    for (_, path) in checkpoint::list(dir.path()).unwrap() {
        fs::remove_file(path.join("train_state.json")).unwrap();
    }
    let mut model = case.model(9);
    let before = weights(&model);
    let error = case.run(&mut model, dir.path(), RESUME).unwrap_err();

    let Error::NoGoodCheckpoint { reasons, .. } = &error else { panic!("{error}") };
    assert_eq!(reasons.len(), 2);
    assert!(reasons[0].contains("train_state.json`: No such file"), "{error}");
    assert_same(&weights(&model), &before);
}

#[test]
fn a_new_run_does_not_write_over_an_old_one() {
    let _turn = turn();
    let case = case("masked");
    let dir = tempfile::tempdir().unwrap();
    let options = Options { stop_at: Some(1), ..Options::default() };
    case.run(&mut case.model(1), dir.path(), options).unwrap();

    let error = case.run(&mut case.model(1), dir.path(), Options::default()).unwrap_err();

    assert!(matches!(error, Error::RunExists { .. }), "{error}");
}

#[test]
fn two_runs_do_not_share_a_folder() {
    let _turn = turn();
    let case = case("masked");
    let dir = tempfile::tempdir().unwrap();
    let data = case.data();
    let mut refused = 0;
    let run = Run {
        dir: Some(dir.path().to_owned()),
        observe: Box::new(|event| {
            if let Event::Step(progress) = event
                && progress.step == 2
            {
                let error = case.run(&mut case.model(1), dir.path(), RESUME).unwrap_err();
                assert!(matches!(error, Error::RunInUse { .. }), "{error}");
                refused += 1;
            }
        }),
        ..Run::new(&case.config, case.objective, &data)
    };

    train(&mut case.model(1), run).unwrap();

    assert_eq!(refused, 1);
}

#[test]
fn settings_that_matter_cannot_change_on_the_way() {
    let _turn = turn();
    let original = case("classifier");
    let dir = tempfile::tempdir().unwrap();
    let options = Options { stop_at: Some(5), ..Options::default() };
    original.run(&mut original.model(1), dir.path(), options).unwrap();

    type Change = fn(&mut TrainConfig);
    let changes: [(&str, Change); 9] = [
        ("lr", |c| c.lr = 1e-3),
        ("schedule", |c| c.schedule = Schedule::Linear),
        ("epochs", |c| c.epochs = 4),
        ("max_steps", |c| c.max_steps = Some(12)),
        ("batch_size", |c| c.batch_size = 5),
        ("freeze", |c| c.freeze = Vec::new()),
        ("betas", |c| c.betas = [0.9, 0.99]),
        ("seed", |c| c.seed = 12),
        ("select", |c| c.select = Some("sum".into())),
    ];
    for (name, change) in changes {
        let mut case = case("classifier");
        change(&mut case.config);
        let mut model = case.model(2);
        let before = weights(&model);
        match case.run(&mut model, dir.path(), RESUME).unwrap_err() {
            Error::Changed { field, .. } => assert_eq!(field, name),
            other => panic!("{name}: {other}"),
        }
        assert_same(&weights(&model), &before);
    }

    let mut plain = original.model(2);
    plain.swap(&[0, 1], &Variant::default(), 0).unwrap();
    match original.run(&mut plain, dir.path(), RESUME).unwrap_err() {
        Error::Changed { field, .. } => assert_eq!(field, "config.json: model_type"),
        other => panic!("{other}"),
    }

    // The folder is untouched by all this, and what does not matter may change.
    let mut case = case("classifier");
    case.config.checkpoint_every = 1;
    case.config.keep_last = 5;
    let summary = case.run(&mut case.model(2), dir.path(), RESUME).unwrap();
    assert_eq!((summary.resumed_from, summary.step), (Some(5), 12));
    assert_eq!(checkpoint::list(dir.path()).unwrap().len(), 5);
}

#[test]
fn other_data_is_noticed() {
    let _turn = turn();
    let case = case("causal");
    let dir = tempfile::tempdir().unwrap();
    let options = Options { stop_at: Some(5), ..Options::default() };
    case.run(&mut case.model(1), dir.path(), options).unwrap();
    let data = Examples::new(texts(27, 6), case.config.plan().unwrap(), 0, case.config.seed);

    let run = Run {
        dir: Some(dir.path().to_owned()),
        resume: true,
        ..Run::new(&case.config, case.objective, &data)
    };
    let error = train(&mut case.model(1), run).unwrap_err();

    assert!(matches!(&error, Error::Changed { field, .. } if field == "training data"), "{error}");
}

/// What the child process of the next test does. The model is large enough that writing it takes a while.
fn long_run(dir: &Path, resume: bool) -> (Model, Summary) {
    let mut case = case("masked");
    case.config.keep_last = 1;
    case.config.max_steps = Some(40);
    let mut model = case.model(1);
    let options = Options { resume, ..Options::default() };
    let summary = case.run(&mut model, dir, options).unwrap();
    (model, summary)
}

const CHILD_DIR: &str = "ATTN_TRAIN_TEST_DIR";

#[test]
#[ignore = "is run by the next test, in a process of its own"]
fn child_process() {
    let Some(dir) = std::env::var_os(CHILD_DIR) else {
        skipped("child_process", "it is run by `a_killed_run_leaves_the_last_good_checkpoint`");
        return;
    };
    let _turn = turn();
    let dir = PathBuf::from(dir);
    let resume = !checkpoint::list(&dir).unwrap().is_empty();
    long_run(&dir, resume);
}

/// Whether a checkpoint is being written.
fn is_writing(dir: &Path) -> bool {
    let Ok(entries) = fs::read_dir(dir.join(checkpoint::FOLDER)) else { return false };
    entries.flatten().any(|entry| entry.file_name().to_string_lossy().contains(".attn-tmp-"))
}

#[test]
fn a_killed_run_leaves_the_last_good_checkpoint() {
    let _turn = turn();
    let reference = tempfile::tempdir().unwrap();
    let (model, summary) = long_run(reference.path(), false);
    let expected = Trace::of(reference.path(), &model, summary);

    let dir = tempfile::tempdir().unwrap();
    let mut half_written = 0;
    let mut last = 0;
    for kill in 1..=4 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_process", "--ignored", "--test-threads", "1"])
            .env(CHILD_DIR, dir.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let newest = || checkpoint::list(dir.path()).unwrap().first().map_or(0, |c| c.0);
        let begun = Instant::now();
        // Some steps further, in the middle of writing.
        while newest() < last + 4 || !is_writing(dir.path()) {
            assert!(child.try_wait().unwrap().is_none(), "the child ended before kill {kill}");
            assert!(begun.elapsed() < Duration::from_secs(60), "the child writes no checkpoint");
        }
        child.kill().unwrap();
        child.wait().unwrap();

        half_written += u32::from(is_writing(dir.path()));
        last = newest();
        assert!(last >= 4);
    }
    assert!(half_written > 0, "no kill hit a checkpoint that was being written");
    assert!(last < 40);

    forget();
    let (model, summary) = long_run(dir.path(), true);

    assert_eq!(summary.resumed_from, Some(last));
    Trace::of(dir.path(), &model, summary).assert_same(&expected);
    assert!(!is_writing(dir.path()), "what the kills left is cleared away");
    assert_eq!(kept(dir.path()), ["step-000040"]);
}

/// Kernels on CUDA may sum in any order, so bits are not promised there; in `f64` little comes of it.
#[test]
fn a_run_on_cuda_resumes_and_agrees_with_the_cpu() {
    let _turn = turn();
    if let Err(error) = attn_torch::cuda_device_count() {
        skipped("a_run_on_cuda_resumes_and_agrees_with_the_cpu", &error.to_string());
        return;
    }
    let assert_close = |actual: &Trace, expected: &Trace| {
        for (name, expected) in &expected.weights {
            let actual = actual.weights[name].to_device(Device::Cpu);
            let name = format!("{name} on {:?}", expected.device());
            testing::assert_close(&name, &actual, &expected.to_device(Device::Cpu), 1e-9);
        }
    };
    for name in CASES {
        let on = |device, dropout| Case { kind: Kind::Double, device, dropout, ..case(name) };
        let cuda = on(Device::Cuda(0), 0.2);
        let dir = tempfile::tempdir().unwrap();
        let options = Options { stop_at: Some(5), ..Options::default() };
        cuda.run(&mut cuda.model(1), dir.path(), options).unwrap();
        forget();
        let mut model = cuda.model(77);
        let summary = cuda.run(&mut model, dir.path(), RESUME).unwrap();
        assert_close(&Trace::of(dir.path(), &model, summary), &unbroken(&cuda));

        // The streams of the two devices draw other numbers, so nothing is dropped here.
        assert_close(&unbroken(&on(Device::Cuda(0), 0.0)), &unbroken(&on(Device::Cpu, 0.0)));
    }
}
