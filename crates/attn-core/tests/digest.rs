//! A model's digest tells it from every other that computes something else.

use std::path::{Path, PathBuf};

use attn_core::{
    Config, LoadOptions, Model, Variant,
    checkpoint::{WriteOptions, read_json},
};
use serde_json::{Map, Value, json};
use tch::Kind;

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn load(name: &str) -> Model {
    Model::load(&folder(name), &LoadOptions::default()).unwrap().0
}

fn digest(model: &Model) -> String {
    model.digest().unwrap()
}

#[test]
fn every_byte_of_every_parameter_counts() {
    let model = load("gpt2_lm_tied");
    let before = digest(&model);
    assert_eq!(before.len(), 64, "{before}");
    assert_eq!(digest(&load("gpt2_lm_tied")), before, "the same folder");
    assert_eq!(digest(&model.alias().unwrap()), before, "the same memory");
    for (name, tensor) in model.parameters() {
        let flat = tch::no_grad(|| tensor.view([-1]));
        // Beyond the first columns of the first rows.
        for at in 0..flat.size()[0].min(42) {
            let mut one = flat.get(at);
            let value = one.double_value(&[]) as f32;
            // The next number there is.
            let _ = tch::no_grad(|| one.fill_(f64::from(f32::from_bits(value.to_bits() ^ 1))));
            assert_ne!(digest(&model), before, "{name}, value {at}");
            let _ = tch::no_grad(|| one.fill_(f64::from(value)));
        }
    }
    assert_eq!(digest(&model), before);
    let mut other = load("gpt2_lm_tied");
    other.to_kind(Kind::Double);
    assert_ne!(digest(&other), before, "the same weights in another kind");
}

#[test]
fn what_changes_the_results_counts_and_what_names_the_origin_does_not() {
    let of = |change: &dyn Fn(&mut Map<String, Value>)| {
        let mut raw = read_json(&folder("llama_biases"), "config.json").unwrap();
        change(&mut raw);
        digest(&Model::init(Config::from_json(raw).unwrap(), &LoadOptions::default()).unwrap())
    };
    let set = |field: &'static str, value: Value| {
        of(&move |raw| {
            raw.insert(field.to_owned(), value.clone());
        })
    };
    let before = of(&|_| {});
    let theta = json!({"rope_theta": 5000.0, "rope_type": "default"});
    for (field, value) in [
        ("rms_norm_eps", json!(1e-5)),
        ("rope_parameters", theta),
        ("hidden_act", json!("gelu")),
        ("num_key_value_heads", json!(1)),
    ] {
        assert_ne!(set(field, value), before, "{field}");
    }
    assert_eq!(set("_name_or_path", json!("elsewhere")), before);
    assert_eq!(set("transformers_version", json!("4.0.0")), before);

    let model = load("llama_biases");
    let mut swapped = model.alias().unwrap();
    let window: Variant = serde_json::from_value(json!({"kind": "window", "size": 2})).unwrap();
    swapped.swap(&[1], &window, 0).unwrap();
    assert_ne!(digest(&swapped), digest(&model), "another attention");
}

#[test]
fn a_folder_written_again_is_the_same_model() {
    let model = load("gpt2_lm_tied");
    let dir = tempfile::tempdir().unwrap();
    model.save(dir.path(), &WriteOptions::default()).unwrap();
    let again = Model::load(dir.path(), &LoadOptions::default()).unwrap().0;
    assert_eq!(digest(&again), digest(&model));
}
