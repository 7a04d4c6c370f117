//! `attn verify`: sound models pass, and what is planted in one is named.

mod common;

use std::path::{Path, PathBuf};

use attn_core::{LoadOptions, Model, checkpoint::WriteOptions};
use attn_data::tokenizer::TextTokenizer;
use common::Place;
use serde_json::Value;
use tch::{Kind, Tensor};

fn bundled(model: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../results/models").join(model)
}

/// The bundled GPT-2 as `name`, once `change` has been at a parameter.
fn changed(place: &Place, name: &str, change: impl Fn(&str, &Tensor)) {
    let from = bundled("wikitext-gpt2");
    let (model, _) = Model::load(&from, &LoadOptions::default()).unwrap();
    for (parameter, tensor) in model.parameters() {
        tch::no_grad(|| change(&parameter, &tensor));
    }
    model.save(&place.path(name), &WriteOptions::default()).unwrap();
    TextTokenizer::from_folder(from).unwrap().save(place.path(name)).unwrap();
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
        ("wikitext-gpt2", 25, &["repeated_key_value_heads_change_nothing"][..]),
        ("needle-llama", 26, &[]),
        (
            "wikitext-mlm",
            19,
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
        ("nsa", "--set n_selected=4 --set window=64"),
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
fn what_is_planted_in_a_model_is_named() {
    let place = Place::new();
    let original = bundled("wikitext-gpt2").display().to_string();
    let broken = |model: &str, more: &str| -> (Vec<(String, String)>, String) {
        let ran = place.attn(&format!("verify --model {model} {more} --out v.json"));
        assert_eq!(ran.code, 1, "{}{}", ran.stdout, ran.stderr);
        assert!(ran.stdout.contains("BROKEN"), "{}", ran.stdout);
        (found(&place, "v.json", "broken"), ran.stdout)
    };

    // One module in the place of two layers.
    let (model, _) = Model::load(&bundled("wikitext-gpt2"), &LoadOptions::default()).unwrap();
    let first: Vec<(String, Tensor)> =
        model.parameters().into_iter().filter(|it| it.0.contains("h.1.attn.c_attn")).collect();
    assert_eq!(first.len(), 2);
    changed(&place, "one", |name, tensor| {
        let of_first = name.replace("h.2.", "h.1.");
        if let Some((_, from)) = first.iter().find(|it| of_first == it.0 && name != it.0) {
            tensor.shallow_clone().copy_(from);
        }
    });
    let (laws, _) = broken("one", "--quick");
    let law = "every_layer_has_an_attention_of_its_own".to_owned();
    assert_eq!(laws, [(law, "layers 1 and 2 are one".to_owned())]);

    // A value that is no number.
    changed(&place, "nan", |name, tensor| {
        if name.ends_with("h.3.mlp.c_fc.weight") {
            let _ = tensor.view([-1]).get(7).fill_(f64::NAN);
        }
    });
    let (laws, _) = broken("nan", "--quick");
    let finite = laws.iter().find(|it| it.0 == "every_parameter_is_finite").unwrap();
    assert!(finite.1.contains("h.3.mlp.c_fc.weight"), "{finite:?}");

    // An embedding that was never copied.
    changed(&place, "embedding", |name, tensor| {
        if name.ends_with("wte.weight") {
            let noise = Tensor::randn(tensor.size(), (Kind::Float, tensor.device())) * 0.02;
            tensor.shallow_clone().copy_(&noise);
        }
    });
    let (laws, said) = broken("embedding", &format!("--against {original}"));
    assert!(laws.iter().any(|it| it.0 == "predictions_are_of_the_next_token"), "{laws:?}");
    assert!(said.contains("in the embeddings"), "{said}");

    // Predictions of a place beside.
    let swap = |basis: &str, of: &str, name: &str| {
        let set = format!(r#"--set basis=["{basis}"]"#);
        place.done(&format!("swap --attention mask_mixture {set} --model {of} --out {name}"));
    };
    swap("shift:0", &original, "teacher");
    swap("shift:1", &original, "student");
    let ran = place.attn("verify --model student --against teacher --quick --out v.json");
    assert!(ran.stdout.contains("KL by shift"), "{}", ran.stdout);

    // A tensor that the file lacks is an error of its own.
    let weights = place.path("one").join("model.safetensors");
    let mut tensors = attn_core::checkpoint::read_tensors(&weights).unwrap();
    tensors.retain(|it| !it.0.ends_with("h.0.ln_1.bias"));
    attn_core::checkpoint::write_tensors(&weights, &tensors, &Default::default()).unwrap();
    place.refused("verify --model one", &["h.0.ln_1.bias"]);
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
    let both = place.attn(&format!("verify --model {folder} --quick --full"));
    assert!(both.code != 0 && both.stderr.contains("--full"), "{}", both.stderr);
}
