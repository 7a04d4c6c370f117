//! Distillation from a teacher's predictions on disk, and on what the student writes itself.

mod common;

use std::{
    fs,
    ops::ControlFlow,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use attn_core::{
    ForwardOptions, Model,
    attention::Stream,
    generate::{Limits, Sampling, generate},
    testing::relative_rms,
};
use attn_data::batch::{Encoded, Side, collate};
use attn_torch::{GradOptions, grad};
use attn_train::{
    Batch, Batches, Distillation, Error, Losses, Objective, OnPolicy, Result, TeacherCache,
};
use common::*;
use rand::Rng;
use tch::{Kind, Tensor};

const TOP_K: i64 = 5;

fn losses(text: &str) -> Losses {
    serde_json::from_str(text).unwrap()
}

fn cache(dir: &Path, teacher: &Model, rows: &[Encoded], top_k: i64) -> Result<TeacherCache> {
    let made = TeacherCache::open_or_make(
        dir,
        teacher,
        rows,
        top_k,
        &AtomicBool::new(false),
        &mut |_| {},
    )?;
    Ok(made.expect("nothing stops it"))
}

fn batch_of(rows: &[Encoded], chosen: &[usize]) -> Batch {
    collate(&chosen.iter().map(|&row| &rows[row]).collect::<Vec<_>>(), 0, Side::Right).into()
}

#[test]
fn a_cached_teacher_gives_the_loss_and_the_gradients_of_a_live_one() {
    let text = r#"{"top_k_kl": 0.7, "top_k": 5, "cross_entropy": 0.4}"#;
    for (base, kind, bound) in
        [("gpt2", Kind::Double, 1e-12), ("llama", Kind::Double, 1e-12), ("gpt2", Kind::Float, 1e-6)]
    {
        let teacher = model(base, "lm", 0.0, kind, 1);
        let mut student = model(base, "lm", 0.0, kind, 2);
        if base == "llama" {
            // It learns from a loss of its own, too.
            let indexed = serde_json::json!({"kind": "indexed", "index_dim": 4, "top_k": 2});
            student.swap(&[1], &serde_json::from_value(indexed).unwrap(), 0).unwrap();
        }
        let rows = texts(300, 3);
        let dir = tempfile::tempdir().unwrap();
        let cache = cache(dir.path(), &teacher, &rows, TOP_K).unwrap();
        let parameters: Vec<Tensor> = student
            .parameters()
            .into_iter()
            .map(|(_, tensor)| tensor.set_requires_grad(true))
            .collect();
        // Of both shards, out of order.
        let batch = batch_of(&rows, &[270, 3, 255, 256, 41]);
        let of = |objective: Distillation<'_>| {
            let loss = objective.loss(&student, &batch, Stream::default()).unwrap();
            let none: &[Tensor] = &[];
            let grads = grad(&[&loss], none, &parameters, GradOptions::default()).unwrap();
            (loss.detach(), grads)
        };
        let losses = losses(text);
        let live = || Distillation::new(&teacher, &student, &losses).unwrap();
        let (expected, naive) = of(live());
        let (actual, own) = of(live().with_cache(&cache).unwrap());

        assert!(expected.double_value(&[]) > 0.1);
        let error = relative_rms(&actual, &expected);
        assert!(error < bound, "{base} in {kind:?}: {error:e}");
        for (own, naive) in own.iter().zip(&naive) {
            let (own, naive) = (own.as_ref().unwrap(), naive.as_ref().unwrap());
            // Keys' biases move every score of a row alike: their gradient is rounding.
            if naive.abs().max().double_value(&[]) > bound {
                let error = relative_rms(own, naive);
                assert!(error < 10.0 * bound, "{base} in {kind:?}: a gradient is off by {error:e}");
            }
        }
    }
}

#[test]
fn a_cache_is_gone_on_with_where_it_was_left() {
    let teacher = model("gpt2", "lm", 0.0, Kind::Float, 1);
    let rows = texts(600, 3);
    let [whole, broken] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    cache(whole.path(), &teacher, &rows, TOP_K).unwrap();

    let stop = AtomicBool::new(false);
    let mut seen = Vec::new();
    let mut observe = |n_rows| {
        seen.push(n_rows);
        stop.store(n_rows >= 256, Ordering::Relaxed);
    };
    let dir = broken.path();
    let open = TeacherCache::open_or_make(dir, &teacher, &rows, TOP_K, &stop, &mut observe);
    assert!(open.unwrap().is_none());
    assert!(seen.starts_with(&[8, 16, 24]) && seen.ends_with(&[256]), "{seen:?}");
    let shard = |number: usize| format!("shard-{number:05}.safetensors");
    let written = |name: &str| fs::metadata(dir.join(name)).unwrap().modified().unwrap();
    let first = written(&shard(0));
    // As a kill between a shard and its checksum leaves it.
    fs::write(dir.join(shard(1)), b"half of it").unwrap();

    cache(dir, &teacher, &rows, TOP_K).unwrap();

    assert_eq!(written(&shard(0)), first, "what was there is kept");
    for number in 0..3 {
        let of = |dir: &Path| fs::read(dir.join(shard(number))).unwrap();
        assert!(of(dir) == of(whole.path()), "shard {number}");
    }
}

#[test]
fn who_waits_for_a_cache_can_be_stopped_and_comes_next() {
    let teacher = model("gpt2", "lm", 0.0, Kind::Float, 1);
    let rows = texts(20, 3);
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let other = fs::File::create(dir.join(".lock")).unwrap();
    other.lock().unwrap();
    let (stop, after) = (AtomicBool::new(false), Duration::from_millis(300));
    let open = || TeacherCache::open_or_make(dir, &teacher, &rows, TOP_K, &stop, &mut |_| {});

    thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(after);
            stop.store(true, Ordering::Relaxed);
        });
        let began = Instant::now();
        assert!(open().unwrap().is_none());
        assert!(began.elapsed() >= after, "it did not wait");
    });
    assert!(!dir.join("manifest.json").exists(), "the folder is another run's");

    stop.store(false, Ordering::Relaxed);
    thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(after);
            other.unlock().unwrap();
        });
        assert!(open().unwrap().is_some(), "it is there once the other has let go");
    });
}

#[test]
fn a_cache_of_something_else_and_a_damaged_one_are_refused_by_name() {
    let teacher = model("gpt2", "lm", 0.0, Kind::Float, 1);
    let rows = texts(40, 3);
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    cache(dir, &teacher, &rows, TOP_K).unwrap();
    let refused = |teacher: &Model, rows: &[Encoded], top_k| {
        cache(dir, teacher, rows, top_k).unwrap_err().to_string()
    };

    let error = refused(&model("gpt2", "lm", 0.0, Kind::Float, 2), &rows, TOP_K);
    assert!(error.contains("its `teacher` is"), "{error}");
    let mut swapped = teacher.alias().unwrap();
    let window = serde_json::from_value(serde_json::json!({"kind": "window", "size": 2})).unwrap();
    swapped.swap(&[1], &window, 0).unwrap();
    assert!(refused(&swapped, &rows, TOP_K).contains("its `teacher` is"));
    // One value that is neither in the first column nor the first row, by the least there is.
    let near = model("gpt2", "lm", 0.0, Kind::Float, 1);
    for (name, tensor) in near.parameters() {
        if name.ends_with("c_attn.weight") {
            let _ = tch::no_grad(|| tensor.get(3).get(5).g_add_scalar_(1e-6));
        }
    }
    assert!(refused(&near, &rows, TOP_K).contains("its `teacher` is"));
    // The same weights, computed otherwise.
    let mut otherwise = teacher.config().to_json(Kind::Float);
    otherwise.insert("layer_norm_epsilon".into(), serde_json::json!(1e-3));
    let config = attn_core::Config::from_json(otherwise).unwrap();
    let otherwise = Model::init(config, &attn_core::LoadOptions::default()).unwrap();
    for ((_, own), (_, other)) in otherwise.parameters().iter().zip(teacher.parameters()) {
        tch::no_grad(|| own.shallow_clone().copy_(&other));
    }
    assert!(refused(&otherwise, &rows, TOP_K).contains("its `teacher` is"));
    assert!(cache(dir, &model("gpt2", "lm", 0.0, Kind::Float, 1), &rows, TOP_K).is_ok());
    assert!(refused(&teacher, &rows, 6).contains("its `top_k` is 5, and this run's is 6"));
    let mut other = rows.clone();
    other[7].ids[0] ^= 1;
    assert!(refused(&teacher, &other, TOP_K).contains("its `data` is"));
    assert!(refused(&teacher, &rows[..39], TOP_K).contains("its `n_rows` is 40"));

    let manifest = dir.join("manifest.json");
    let text = fs::read_to_string(&manifest).unwrap();
    let old = text.replace("\"format_version\": 2", "\"format_version\": 1");
    assert_ne!(old, text);
    fs::write(&manifest, old).unwrap();
    let error = refused(&teacher, &rows, TOP_K);
    assert!(error.contains("its `format_version` is 1, and this run's is 2"), "{error}");
    assert!(error.contains("manifest.json") && error.contains("hint: "), "{error}");
    fs::write(&manifest, text).unwrap();

    let shard = dir.join("shard-00000.safetensors");
    let mut bytes = fs::read(&shard).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&shard, &bytes).unwrap();
    let error = refused(&teacher, &rows, TOP_K);
    assert!(error.contains("shard-00000.safetensors") && error.contains("SHA-256"), "{error}");
    assert!(error.contains("made again"), "{error}");

    let encoder = model("distilbert", "lm", 0.0, Kind::Float, 1);
    let error = cache(&dir.join("x"), &encoder, &rows, TOP_K).unwrap_err().to_string();
    assert!(error.contains("masked language model") && !dir.join("x").exists(), "{error}");
}

#[test]
fn losses_that_a_cache_does_not_give_are_refused() {
    for (text, name) in [
        (r#"{"forward_kl": 1.0, "top_k_kl": 1.0}"#, "forward_kl"),
        (r#"{"top_k_kl": 1.0, "hidden_mse": 0.5}"#, "hidden_mse"),
        (r#"{"attention_output": 1.0, "teacher_forced": true}"#, "attention_output"),
        (r#"{"top_k_kl": 1.0, "temperature": 2.0}"#, "temperature"),
    ] {
        match losses(text).fit_cache() {
            Err(Error::Setting { field, .. }) => assert_eq!(field, name),
            other => panic!("{name}: {other:?}"),
        }
    }
    let teacher = model("gpt2", "lm", 0.0, Kind::Float, 1);
    let dir = tempfile::tempdir().unwrap();
    let cache = cache(dir.path(), &teacher, &texts(4, 3), TOP_K).unwrap();
    let other = losses(r#"{"top_k_kl": 1.0, "top_k": 6}"#);
    let objective = Distillation::new(&teacher, &teacher, &other).unwrap();
    let error = objective.with_cache(&cache).unwrap_err().to_string();
    assert_eq!(error, "`top_k` is 6, expected that of the teacher cache");
}

#[test]
fn a_students_own_words_are_drawn_by_seed_and_step_and_compared_where_they_stand() {
    for base in ["gpt2", "llama"] {
        let teacher = model(base, "lm", 0.0, Kind::Double, 1);
        let student = model(base, "lm", 0.0, Kind::Double, 2);
        let rows: Vec<Encoded> = [9, 4, 6]
            .into_iter()
            .enumerate()
            .map(|(index, n)| encoded(&(0..n).map(|i| 4 + 3 * i).collect::<Vec<_>>(), 0, index))
            .collect();
        let mut batch = batch_of(&rows, &[0, 1, 2]);
        batch.prompts = Some(vec![3, 0, 3]);
        let losses = losses(r#"{"forward_kl": 1.0, "cross_entropy": 1.0}"#);
        let objective = Distillation::new(&teacher, &student, &losses).unwrap();
        let stream = |step| Stream { seed: 11, step, layer: 0 };
        let loss = |step| objective.loss(&student, &batch, stream(step)).unwrap().double_value(&[]);
        // The tokens that the student writes, 6 and 3, and the row that is taken as it is.
        assert_eq!(objective.n_targets(&batch), 6 + 4 + 3);
        assert_eq!(loss(5), loss(5));
        assert_ne!(loss(5), loss(6));

        let seed = Stream { layer: u64::MAX, ..stream(5) }.rng().random();
        let sampling = Sampling { temperature: 1.0, seed, ..Sampling::default() };
        let limits = Limits { max_new_tokens: 6, stop_ids: Vec::new() };
        let prompt = vec![4, 7, 10];
        let go_on = &mut |_, _| ControlFlow::Continue(());
        let written =
            generate(&student, &[prompt.clone(), prompt], &sampling, &limits, go_on).unwrap();
        let mut ids = batch.rows.ids.clone();
        ids[3..9].copy_from_slice(&written[0].ids);
        ids[21..24].copy_from_slice(&written[1].ids[..3]);
        let of = |model: &Model| {
            let plain = Batch {
                rows: attn_data::batch::Batch { ids: ids.clone(), ..batch.rows.clone() },
                prompts: None,
                ..batch.clone()
            };
            let output = model.forward(&plain.input(model), &ForwardOptions::default()).unwrap();
            output.logits.flatten(0, 1).log_softmax(-1, Kind::Double)
        };
        let (p, q) = (of(&teacher), of(&student));
        let mut expected = 0.0;
        for cell in [2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 20, 21, 22] {
            let (p, q) = (p.get(cell), q.get(cell));
            expected += (p.exp() * (&p - &q)).sum(Kind::Double).double_value(&[]) / 13.0;
        }
        // Of the text itself, that of the second row alone.
        for cell in 9..12 {
            expected -= q.get(cell).double_value(&[ids[cell as usize + 1]]) / 3.0;
        }
        assert!((loss(5) - expected).abs() < 1e-12 * expected, "{base}: {} {expected}", loss(5));
    }
}

#[test]
fn a_share_of_the_rows_is_the_students_by_seed_and_epoch() {
    let config = quick(1);
    let data = |share| examples(400, &config).with_on_policy(OnPolicy { share, prompt_tokens: 4 });
    let count = |share, epoch| {
        let data = data(share);
        let plan = data.plan(0);
        let of = |rows: &Vec<usize>| data.batch(epoch, rows).unwrap().prompts.unwrap();
        let all: Vec<usize> = plan.iter().flat_map(of).collect();
        assert!(all.iter().all(|&n| n == 0 || n == 4));
        (all.iter().filter(|&&n| n > 0).count(), all)
    };
    let longer = texts(400, 5).iter().filter(|row| row.ids.len() > 4).count();
    assert_eq!(count(0.0, 0).0, 0);
    assert_eq!(count(1.0, 0).0, longer, "a row without a token beyond its prompt stays as it is");
    let share = count(0.3, 0).0 as f64 / longer as f64;
    assert!((share - 0.3).abs() < 0.08, "{share}");
    assert_eq!(count(0.3, 2), count(0.3, 2));
    assert_ne!(count(0.3, 2).1, count(0.3, 3).1);
}

#[test]
fn a_masked_language_model_writes_nothing() {
    let teacher = model("distilbert", "lm", 0.0, Kind::Float, 1);
    let student = teacher.alias().unwrap();
    let mut batch = batch_of(&texts(2, 3), &[0, 1]);
    batch.prompts = Some(vec![2, 0]);
    let losses = losses(r#"{"forward_kl": 1.0}"#);
    let objective = Distillation::new(&teacher, &student, &losses).unwrap();
    let error = objective.loss(&student, &batch, Stream::default()).unwrap_err().to_string();
    assert!(error.contains("is an encoder, it has no next token"), "{error}");
}
