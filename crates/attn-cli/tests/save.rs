//! `attn save`: the same model in another folder, precision and number of files.

mod common;

use attn_core::{LoadOptions, Model, config::Head};
use common::{FINETUNE, Place, model_folder, write_data};
use tch::Kind;

fn load(place: &Place, name: &str) -> Model {
    Model::load(&place.path(name), &LoadOptions::default()).unwrap().0
}

/// The largest difference between parameters of the same name, over the size of the larger one.
fn difference(a: &Model, b: &Model) -> f64 {
    let (a, b) = (a.parameters(), b.parameters());
    assert_eq!(a.len(), b.len());
    let each = a.iter().zip(&b).map(|((name, x), (other, y))| {
        assert_eq!((name, x.size()), (other, y.size()));
        let relative = (x - y).abs() / (x.abs() + 1e-3);
        f64::try_from(relative.max()).unwrap()
    });
    each.fold(0.0, f64::max)
}

#[test]
fn a_saved_model_is_the_same_to_the_precision_asked_for() {
    let place = Place::new();
    model_folder(&place, "model", "gpt2", Head::LanguageModel);
    let model = load(&place, "model");
    let n_bytes: i64 = model.parameters().iter().map(|(_, x)| x.numel() as i64 * 4).sum();

    let ran = place.done("save --model model --out deep/same");

    assert!(ran.stdout.contains("deep/same") && ran.stdout.contains("in f32"), "{}", ran.stdout);
    assert_eq!(difference(&model, &load(&place, "deep/same")), 0.0);
    for file in ["config.json", "tokenizer.json"] {
        assert!(place.path(&format!("deep/same/{file}")).exists(), "{file}");
    }
    let parts: Vec<_> = std::fs::read_dir(place.path("deep")).unwrap().collect();
    assert_eq!(parts.len(), 1, "nothing beside it: {parts:?}");

    place.done("save --model model --dtype f16 --out half");
    assert_eq!(place.json("half/config.json")["dtype"], "float16");
    let half = load(&place, "half");
    assert_eq!(half.kind(), Kind::Float, "computes in what the reader asks for");
    let rounding = difference(&model, &half);
    assert!(0.0 < rounding && rounding < 1e-3, "{rounding}");
    let size = std::fs::metadata(place.path("half/model.safetensors")).unwrap().len() as i64;
    assert!(size < n_bytes / 2 + 8192, "{size} of {n_bytes}");
}

#[test]
fn files_are_as_small_as_asked() {
    let place = Place::new();
    place.write("wide.toml", &format!(
        "objective = 'causal'\n[init]\nmodel_type = 'gpt2'\nn_embd = 256\nn_layer = 2\nn_head = 4\nn_positions = 64\n\
         [tokenizer]\nvocab_size = 300\n[data]\nsource = '{}/../../data/sample_text.txt'\n[examples]\nmax_len = 16\n\
         limit = 100\nhold_out = 10\n[train]\nmax_steps = 1\n",
        env!("CARGO_MANIFEST_DIR")
    ));
    place.done("pretrain wide.toml --out wide");

    place.done("save --model wide/model --max-shard-mib 2 --out shards");

    let index = place.json("shards/model.safetensors.index.json");
    let files: std::collections::BTreeSet<&str> = index["weight_map"]
        .as_object()
        .unwrap()
        .values()
        .map(|file| file.as_str().unwrap())
        .collect();
    assert!(files.len() > 2, "{files:?}");
    for file in files {
        let size = std::fs::metadata(place.path(&format!("shards/{file}"))).unwrap().len();
        assert!(size < (2 << 20) + 8192, "{file}: {size}");
    }
    assert_eq!(difference(&load(&place, "wide/model"), &load(&place, "shards")), 0.0);
}

#[test]
fn an_adapter_is_merged_into_its_base_model() {
    let place = Place::new();
    model_folder(&place, "model", "distilbert", Head::Classifier { n_classes: 2 });
    write_data(&place);
    place.write("run.toml", FINETUNE);
    for save in ["adapter", "merged"] {
        place.done(&format!(
            "finetune run.toml --out {save} --set lora.rank=4 --set lora.save={save} --set train.max_steps=3"
        ));
    }

    place.done("save --model adapter/adapter --out whole");

    assert!(!place.path("whole/adapter_config.json").exists());
    let apart = difference(&load(&place, "merged/model"), &load(&place, "whole"));
    assert!(apart < 1e-5, "{apart}");
    assert!(difference(&load(&place, "model"), &load(&place, "whole")) > 1e-3, "it was trained");
}

#[test]
fn what_stands_there_stays() {
    let place = Place::new();
    model_folder(&place, "model", "gpt2", Head::LanguageModel);
    place.write("mine/notes.txt", "mine");
    place.write("file", "mine");
    std::fs::create_dir(place.path("empty")).unwrap();

    place.done("save --model model --out empty");
    place.refused("save --model model --out mine", &["`mine` is there already", "new or empty"]);
    place.refused("save --model model --out file", &["`file`"]);
    place.refused("save --model model --out model", &["`model` is there already"]);
    place.refused("save --model model --max-shard-mib 0 --out a", &["`--max-shard-mib` is 0"]);
    place.refused("save --model none --out a", &["cannot use the model `none`"]);

    assert_eq!(place.read("mine/notes.txt") + &place.read("file"), "minemine");
    assert!(!place.path("a").exists());
}
