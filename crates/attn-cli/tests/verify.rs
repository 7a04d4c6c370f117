//! `attn verify`: sound models pass. That what is planted in one is named, `faults.rs` shows.

mod common;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use common::Place;
use serde_json::Value;
use tch::Tensor;

fn bundled(model: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../results/models").join(model)
}

/// Laws of `file` by what came of them: their names, and where.
fn found(place: &Place, file: &str, what: &str) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let report = place.json(file);
    let all = report["laws"].as_array().unwrap().iter();
    let of: Vec<_> = all
        .filter(|line| line["found"] == what)
        .map(|line| (text(&line["law"]), text(&line["place"])))
        .collect();
    assert_eq!(report[format!("n_{what}")], of.len(), "the count is that of the lines");
    of
}

#[test]
fn the_bundled_models_keep_every_law() {
    let place = Place::new();
    for (model, n_held, not_run) in [
        ("wikitext-gpt2", 28, &["repeated_key_value_heads_change_nothing"][..]),
        ("needle-llama", 29, &[]),
        (
            "wikitext-mlm",
            23,
            &["a_causal_model_ignores_the_future", "repeated_key_value_heads_change_nothing"],
        ),
    ] {
        let folder = bundled(model).display().to_string();
        let ran = place.done(&format!("verify --model {folder} --out v.json"));
        assert!(found(&place, "v.json", "broken").is_empty(), "{}", ran.stdout);
        let missing: Vec<String> =
            found(&place, "v.json", "not_run").into_iter().map(|it| it.0).collect();
        assert_eq!(missing, not_run, "{model}");
        assert_eq!(found(&place, "v.json", "held").len(), n_held, "{model}");
        let last = format!("{n_held} held, 0 broken, {} not run", not_run.len());
        assert!(ran.stdout.ends_with(&format!("{last}\n")), "{}", ran.stdout);
        // Less is tried, and more of it.
        place.done(&format!("verify --model {folder} --quick --out quick.json"));
        assert!(found(&place, "quick.json", "held").len() < n_held);
        // What is left out is said to be.
        let laws = |file: &str| {
            let all = ["held", "broken", "not_run"].map(|it| found(&place, file, it)).concat();
            all.into_iter().map(|it| it.0).collect::<BTreeSet<String>>()
        };
        assert_eq!(laws("quick.json"), laws("v.json"), "{model}");
    }
    let folder = bundled("needle-llama").display().to_string();
    let ran = place.done(&format!("verify --model {folder} --full --against {folder}"));
    assert!(ran.stdout.contains("hidden states are those of"), "{}", ran.stdout);
    assert!(ran.stdout.contains("held     predictions are nearest where they are aligned"));
    // Another precision has other numbers, and the same laws.
    let ran = place.done(&format!("verify --model {folder} --dtype bf16 --out half.json"));
    assert!(ran.stdout.contains("16 bits round them anew"), "{}", ran.stdout);
}

#[test]
fn swapped_attention_keeps_the_laws_too() {
    let place = Place::new();
    let folder = bundled("wikitext-gpt2").display().to_string();
    for (kind, set) in [
        ("window", ""),
        (
            "nsa",
            "--set n_selected=4 --set select_block=16 --set compress_block=16 --set compress_stride=8 --set window=64",
        ),
        ("performer", ""),
        ("single_head", ""),
        ("mask_mixture", ""),
    ] {
        place.done(&format!(
            "swap --model {folder} --attention {kind} {set} --layers 1,3 --out {kind}"
        ));
        let ran = place.done(&format!("verify --model {kind} --against {folder} --out v.json"));
        let held = found(&place, "v.json", "held");
        let own = format!("{kind}_keeps_the_laws_of_kinds");
        assert!(held.iter().any(|it| it.0 == own), "{}", ran.stdout);
        let apart = place.json("v.json")["apart_by_layer"].clone();
        assert_eq!((apart[0].as_f64(), apart[1].as_f64()), (Some(0.0), Some(0.0)), "{kind}");
        if kind != "mask_mixture" {
            assert!(ran.stdout.contains("leave those of"), "{}", ran.stdout);
        }
    }
}

#[test]
fn what_a_broken_law_means_is_told_of_each() {
    let place = Place::new();
    let folder = bundled("wikitext-gpt2").display().to_string();
    place.done(&format!("verify --model {folder} --against {folder} --out v.json"));
    let documents = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/Methodology.md");
    let text = std::fs::read_to_string(documents).unwrap();
    let table = text.split_once("what to do about it:").unwrap().1;
    let table = table.split_once("What it does not say").unwrap().0;
    let all = ["held", "broken", "not_run"].map(|word| found(&place, "v.json", word)).concat();
    assert!(all.len() > 25);
    for (law, _) in all.iter().filter(|it| !it.0.ends_with("_keeps_the_laws_of_kinds")) {
        assert!(table.contains(&format!("`{law}`")), "{law}");
    }
}

#[test]
fn what_differs_from_another_model_is_named() {
    let place = Place::new();
    let folder = bundled("wikitext-gpt2").display().to_string();
    // Of the text that --quick reads a window as long as it hides nothing.
    place.done(&format!("swap --model {folder} --attention window --out window"));
    let ran = place.done(&format!("verify --model window --against {folder} --quick --out v.json"));
    assert!(ran.stdout.contains("no wonder: `window` reaches 32 tokens"), "{}", ran.stdout);
    assert!(ran.stdout.contains("tensors that both have are the same to the bit"));
    assert_eq!(place.json("v.json")["weights"]["n_differ"], 0);
    let differs = place.json("v.json")["config_differs"].to_string();
    assert!(differs.contains("model_type"), "{differs}");
    // Other numbers in one matrix, which the config knows nothing of.
    place.done(&format!("save --model {folder} --out turned"));
    let weights = place.path("turned/model.safetensors");
    let mut tensors: BTreeMap<String, Tensor> =
        Tensor::read_safetensors(&weights).unwrap().into_iter().collect();
    let key = "transformer.h.2.mlp.c_fc.weight";
    let wrong = tensors.remove(key).unwrap() * 1.5;
    tensors.insert(key.into(), wrong);
    let tensors: Vec<(String, Tensor)> = tensors.into_iter().collect();
    attn_core::checkpoint::write_tensors(&weights, &tensors, &Default::default()).unwrap();
    let ran = place.done(&format!("verify --model turned --against {folder} --quick --out v.json"));
    let told =
        "1 of 52 tensors that both have differ, most of all\n    5.0e-1  transformer.h.2.mlp";
    assert!(ran.stdout.contains(told), "{}", ran.stdout);
    assert!(ran.stdout.contains("in block 2") && ran.stdout.contains("breaks no law"));
    assert_eq!(place.json("v.json")["weights"]["furthest"][0]["name"], key);
    // Nothing is worth trying of numbers that are none.
    let (_, tensor) = tensors.iter().find(|it| it.0 == key).unwrap();
    let _ = tensor.view([-1]).get(3).fill_(f64::NAN);
    attn_core::checkpoint::write_tensors(&weights, &tensors, &Default::default()).unwrap();
    let ran = place.attn(&format!("verify --model turned --against {folder} --out v.json"));
    assert_ne!(ran.code, 0);
    let broken = found(&place, "v.json", "broken");
    assert!(broken.len() == 1 && broken[0].0 == "every_parameter_is_finite", "{broken:?}");
}

#[test]
fn what_cannot_be_verified_is_refused() {
    let place = Place::new();
    let folder = bundled("wikitext-gpt2").display().to_string();
    let mlm = bundled("wikitext-mlm").display().to_string();
    place.write("short.txt", "a few words");
    place.refused(
        &format!("verify --model {folder} --text short.txt"),
        &["`short.txt` has ", "expected at least 24", "hint: "],
    );
    place.refused(&format!("verify --model {folder} --text no.txt"), &["cannot read `no.txt`"]);
    place.refused(&format!("verify --model {folder} --against {mlm}"), &["gpt2", "distilbert"]);
    // What was found before an error is kept.
    place.done(&format!("save --model {folder} --out half"));
    let weights = place.path("half/model.safetensors");
    let whole = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &whole[..whole.len() / 2]).unwrap();
    let ended = format!("verify --model {folder} --quick --against half --out half.json");
    let ended = place.attn(&ended);
    assert!(ended.code != 0 && ended.stderr.contains("cannot load the model `half`"));
    assert!(found(&place, "half.json", "broken").is_empty());
    let left_out = found(&place, "half.json", "not_run");
    let why = left_out.iter().find(|(law, _)| law == "every_law_can_be_tried").expect("told");
    assert!(why.1.contains("model.safetensors"), "{why:?}");
    assert!(found(&place, "half.json", "held").len() > 10);
    let both = place.attn(&format!("verify --model {folder} --quick --full"));
    assert!(both.code != 0 && both.stderr.contains("--full"), "{}", both.stderr);
}
