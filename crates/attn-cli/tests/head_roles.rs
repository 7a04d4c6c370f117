//! `attn head-roles` and `attn attention-shift`.

mod common;

use attn_core::config::Head;
use common::{Place, model_folder, rows, treebank};
use serde_json::Value;

fn place() -> Place {
    let place = Place::new();
    model_folder(&place, "decoder", "gpt2", Head::LanguageModel);
    model_folder(&place, "encoder", "distilbert", Head::LanguageModel);
    model_folder(&place, "classifier", "distilbert", Head::Classifier { n_classes: 2 });
    model_folder(&place, "llama", "llama", Head::LanguageModel);
    let lines: Vec<String> = rows(40).into_iter().map(|(text, _)| text).collect();
    place.write("notes.txt", &lines.join("\n"));
    for paradigm in attn_data::blimp::paradigms() {
        let line = r#"{"sentence_good": "the film was good", "sentence_bad": "film the was good"}"#;
        place.write(&format!("pairs/{}/train.jsonl", paradigm.name), &format!("{line}\n"));
    }
    treebank(&place, "trees", 60, &["2", "4", "4", "0"]);
    place
}

/// Layers × heads of a table.
fn shape(table: &Value) -> Vec<usize> {
    table.as_array().unwrap().iter().map(|layer| layer.as_array().unwrap().len()).collect()
}

const TEXTS: &str = "--task notes.txt --split train --max-len 16";

#[test]
fn heads_are_given_roles_relations_and_phenomena() {
    let place = place();
    let more = "--treebank trees --blimp 1 --blimp-data pairs";

    let ran = place.done(&format!("head-roles --model decoder {TEXTS} {more} --out out.json"));

    for part in ["previous_token (-1)", "induction", "entropy (nats)", "nsubj, ", "Bonferroni"] {
        assert!(ran.stdout.contains(part), "no `{part}` in {}", ran.stdout);
    }
    let json = place.json("out.json");
    for role in json["roles"].as_array().unwrap() {
        for name in ["mass", "mass_interval_95", "share", "share_interval_95"] {
            assert_eq!(shape(&role[name]), [4, 4], "{role}");
        }
        let chance = role["chance"].as_f64().unwrap();
        assert!(chance > 0.0 && chance < 1.0, "{role}");
    }
    let relations = json["syntax"]["relations"].as_array().unwrap();
    let named = |name: &str| relations.iter().any(|one| one["relation"] == name);
    assert!(named("nsubj") && named("cop"), "{relations:?}");
    // `the` lies before `film`, which alone is in sight: nothing is chosen.
    assert!(!named("det"));
    assert_eq!(json["syntax"]["n_tested"], relations.len() * 8);
    let phenomena = json["blimp"]["phenomena"].as_array().unwrap();
    assert_eq!((phenomena.len(), json["blimp"]["n_tested"].as_u64()), (14, Some(14 * 8)));

    place.done(&format!("head-roles --model decoder {TEXTS} {more} --out b.json --batch-size 3"));
    let close = |a: &Value, b: &Value| (a.as_f64().unwrap() - b.as_f64().unwrap()).abs() < 1e-5;
    let other = place.json("b.json");
    for (a, b) in json["roles"].as_array().unwrap().iter().zip(other["roles"].as_array().unwrap()) {
        assert!(close(&a["mass"][1][2], &b["mass"][1][2]), "the batch size changes nothing");
    }
    place.done(&format!("head-roles --model llama {TEXTS} --out llama.json"));
    assert_eq!(shape(&place.json("llama.json")["roles"][0]["mass"]), [4, 4], "query heads");
    place.done(&format!("head-roles --model classifier {TEXTS} --out classifier.json"));
    let json = place.json("classifier.json");
    let has =
        |name: &str| json["roles"].as_array().unwrap().iter().any(|role| role["role"] == name);
    assert!(has("next_token") && has("separator") && !has("induction"));
    let random = format!("head-roles --model encoder {TEXTS} --out random.json --init random");
    place.done(&random);
    assert_eq!(place.json("random.json")["random_weights"], true);
}

#[test]
fn what_tells_nothing_of_heads_is_refused_before_the_work() {
    let place = place();
    treebank(&place, "crooked", 60, &["2", "4", "9", "0"]);
    treebank(&place, "small", 5, &["2", "4", "4", "0"]);
    let refused = |command: &str, parts: &[&str]| {
        place.refused(&format!("{command} --out no.json"), parts);
        assert!(!place.path("no.json").exists(), "{command}");
    };
    let roles = format!("head-roles --model encoder {TEXTS}");
    refused(&format!("{roles} --blimp 1 --blimp-data pairs"), &["encoder", "`--blimp`"]);
    refused(&format!("{roles} --treebank nowhere"), &["nowhere"]);
    refused(
        &format!("{roles} --treebank crooked"),
        &["`crooked`", "row 1", "`head[2]` = `9`", "hint:"],
    );
    refused(&format!("{roles} --treebank small"), &["50 times"]);
    refused(&format!("{roles} --treebank trees --treebank-limit 0"), &["`--treebank-limit` is 0"]);
    refused(&format!("{roles} --batch-size 0"), &["`--batch-size` is 0"]);
    let shift = |before: &str, after: &str| {
        format!("attention-shift --before {before} --after {after} {TEXTS}")
    };
    refused(&shift("encoder", "decoder"), &["`encoder`", "`decoder`", "heads"]);
    refused(
        &shift("decoder", "llama"),
        &["`decoder`", "`llama`", "heads are not the same", "hint:"],
    );
    refused(&format!("{} --init random", shift("encoder", "classifier")), &["`--init`"]);
}

#[test]
fn the_attention_of_a_language_model_is_compared_with_that_of_a_classifier() {
    let place = place();
    let ran = place.done(&format!(
        "attention-shift --before encoder --after classifier --control encoder {TEXTS} --plots plots --drawn 2 --out \
         out.json"
    ));
    assert!(ran.stdout.contains("first_token_mass"), "{}", ran.stdout);
    assert!(ran.stdout.contains("8 of 8 heads moved") || ran.stdout.contains("0 of 8"));
    let json = place.json("out.json");
    assert_eq!(shape(&json["shift"]["js_distance"]), [4, 4]);
    assert_eq!(shape(&json["control"]["excess"]), [4, 4]);
    assert_eq!((&json["model"], &json["after"]), (&"encoder".into(), &"classifier".into()));
    let drawn = std::fs::read_dir(place.path("plots")).unwrap().count();
    assert_eq!(drawn, 4, "before and after of two heads");
}
