//! `attn explain`: what is wrong with a model is told, and what is not is not.

mod common;

use attn_core::{Model, config::Head};
use attn_data::tokenizer::Style;
use common::{Place, config, model_folder, random_model, rows, save, tokenizer};
use serde_json::Value;

const TASK: &str = "--task notes.txt --split train --prompts 4 --out o.json";

fn place() -> Place {
    let place = Place::new();
    let lines: Vec<String> = rows(60).into_iter().map(|(text, _)| text).collect();
    place.write("notes.txt", &lines.join("\n"));
    place
}

/// Test, value and verdict of each check of `o.json`.
fn checks(place: &Place) -> Vec<(String, Option<f64>, String)> {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let found = place.json("o.json");
    let all = found["checks"].as_array().unwrap().iter();
    all.map(|one| (text(&one["test"]), one["value"].as_f64(), text(&one["verdict"]))).collect()
}

#[test]
fn a_model_is_no_different_from_itself() {
    for base in ["gpt2", "llama"] {
        let place = place();
        model_folder(&place, "m", base, Head::LanguageModel);

        let ran = place.done(&format!("explain --model m --against m {TASK}"));

        let found = place.json("o.json");
        let repeated = found["written"][0]["baseline"]["wording"]["rep_4"].as_f64().unwrap();
        assert_eq!(checks(&place).len(), 5);
        for (test, value, verdict) in checks(&place) {
            // A baseline of random weights repeats itself, and nothing repeats twice as much.
            let cannot_fail = test == "rep_4" && repeated >= 0.5;
            let expected = if cannot_fail { (None, "not_run") } else { (value, "passed") };
            assert_eq!((value, verdict.as_str()), expected, "{test}: {}", ran.stdout);
        }
        for written in found["written"].as_array().unwrap() {
            assert_eq!(written["model"], written["baseline"], "{base}");
            let samples = written["samples"].as_array().unwrap();
            assert_eq!(samples.len(), 4);
            assert!(samples.iter().all(|sample| sample["model"] == sample["baseline"]));
            let prompt = samples[0]["prompt"].as_str().unwrap();
            assert!(place.read("notes.txt").contains(prompt.trim()), "{prompt}");
        }
        assert!(ran.stdout.contains("free_running_over_teacher_forced"), "{}", ran.stdout);
    }
}

#[test]
fn what_does_not_apply_to_a_masked_language_model_is_said() {
    let place = place();
    model_folder(&place, "m", "distilbert", Head::LanguageModel);

    let ran = place.done(&format!("explain --model m --against m {TASK}"));

    let verdicts: Vec<String> = checks(&place).into_iter().map(|(.., verdict)| verdict).collect();
    assert_eq!(verdicts, ["not_run", "not_run", "not_run", "not_run", "passed"]);
    assert!(ran.stdout.contains("reads both sides"), "{}", ran.stdout);
    assert!(ran.stdout.contains("neighbours are shown to it"), "{}", ran.stdout);
    assert!(!ran.stdout.contains("KL by shift"), "{}", ran.stdout);
    assert_eq!(place.json("o.json")["kl_by_shift"], serde_json::json!([]));
    assert_eq!(place.json("o.json")["written"], serde_json::json!([]));
    assert_eq!(&place.bytes("o.png")[1..4], b"PNG", "KL by position is drawn all the same");
}

/// A model whose prediction depends on the token that its attention reads, and on little else.
fn reader(place: &Place) {
    let tokenizer = tokenizer(Style::ByteLevel);
    let mut config = config("gpt2");
    config.insert("vocab_size".into(), tokenizer.vocab_size().into());
    let model: Model = random_model(config, Head::LanguageModel);
    for (name, tensor) in model.parameters() {
        let scale = match name.as_str() {
            name if name.ends_with("wpe.weight") => 0.0,
            name if name.ends_with("wte.weight") => 0.05,
            name if name.ends_with("ln_f.weight") => 60.0,
            _ => continue,
        };
        tch::no_grad(|| tensor.shallow_clone().copy_(&(&tensor * scale)));
    }
    save(&model, &place.path("base"));
    tokenizer.save(place.path("base")).unwrap();
}

#[test]
fn a_shift_that_was_planted_is_found() {
    let place = place();
    reader(&place);
    let swap = "swap --attention mask_mixture --set";
    place.done(&format!(r#"{swap} basis=["shift:0"] --model base --out teacher"#));
    place.done(&format!(r#"{swap} basis=["shift:1"] --layers 0 --model teacher --out student"#));

    let ran = place.attn(&format!("explain --model student --against teacher {TASK}"));

    assert_eq!(ran.code, 1, "{}", ran.stderr);
    let shift = checks(&place).into_iter().find(|(test, ..)| test == "best_shift").unwrap();
    assert_eq!((shift.1, shift.2.as_str()), (Some(-1.0), "failed"), "{}", ran.stdout);
    assert!(ran.stdout.contains("FAILED"), "{}", ran.stdout);
}

#[test]
fn what_cannot_be_explained_is_refused() {
    let place = place();
    model_folder(&place, "m", "gpt2", Head::LanguageModel);
    model_folder(&place, "c", "gpt2", Head::Classifier { n_classes: 2 });
    model_folder(&place, "b", "distilbert", Head::LanguageModel);
    let refused = |arguments: &str, parts: &[&str]| {
        place.refused(
            &format!("explain --task notes.txt --split train --out o.json {arguments}"),
            parts,
        )
    };
    refused("--model m --against b", &["`m` is a gpt2", "`b` a distilbert"]);
    refused("--model c --against m", &["`c`", "hint: "]);
    refused("--model m --against m --prompts 0", &["`--prompts` is 0"]);
    refused("--model m --against m --prompt-len 32", &["no row is longer than the prompt"]);
}
