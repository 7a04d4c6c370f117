//! `attn convert`.

mod common;

use attn_core::config::Head;
use common::{Place, model_folder};

const ROWS: &str = "--task notes.txt --split train --max-len 24";

fn place(base: &str) -> Place {
    let place = Place::new();
    model_folder(&place, "m", base, Head::LanguageModel);
    let lines: Vec<String> = common::rows(40).into_iter().map(|(text, _)| text).collect();
    place.write("notes.txt", &lines.join("\n"));
    place
}

#[test]
fn a_converted_folder_is_a_model_like_any_other() {
    for base in ["gpt2", "llama", "distilbert"] {
        let place = place(base);
        let ran = place.done("convert --model m --kv-heads 1 --layers 1 --out one");
        assert!(ran.stdout.contains("key/value heads by layer"), "{}", ran.stdout);
        let report = place.json("one/conversion.json");
        let heads =
            |name: &str| -> Vec<i64> { serde_json::from_value(report[name].clone()).unwrap() };
        let (before, after) = (heads("kv_heads_before"), heads("kv_heads_after"));
        assert_eq!(after, [before[0], 1]);
        let bytes = |name: &str| report[name].as_i64().unwrap();
        assert_eq!(
            bytes("cache_bytes_per_token_after") * before.iter().sum::<i64>(),
            bytes("cache_bytes_per_token_before") * after.iter().sum::<i64>(),
            "bytes go with heads"
        );
        assert_eq!(report["loads_in_transformers"], false);
        place.done(&format!("eval --model one {ROWS} --against m --out kl.json"));
        let kl = place.json("kl.json")["divergence"]["kl_nats_per_token"].as_f64().unwrap();
        assert!(kl > 1e-6, "{base}: {kl}");
        if base != "distilbert" {
            place.done("generate --model one --max-new-tokens 3 the");
        }
    }
}

#[test]
fn more_heads_compute_what_there_was_and_a_whole_llama_stays_ordinary() {
    let place = place("llama");
    place.done("convert --model m --kv-heads 4 --out more");
    assert_eq!(place.json("more/conversion.json")["loads_in_transformers"], true);
    assert_eq!(place.json("more/config.json")["num_key_value_heads"], 4);
    assert_eq!(place.json("more/config.json")["model_type"], "llama");
    place.done(&format!("eval --model more {ROWS} --against m --out kl.json"));
    let kl = place.json("kl.json")["divergence"]["kl_nats_per_token"].as_f64().unwrap();
    assert!(kl.abs() < 1e-9, "{kl}");
}

#[test]
fn what_cannot_be_is_refused_and_nothing_is_written() {
    let place = place("gpt2");
    for (arguments, parts) in [
        ("convert --model m --kv-heads 3 --out x", ["--kv-heads", "neither divides the other"]),
        ("convert --model m --kv-heads 8 --out x", ["--kv-heads", "expected 1 to 4"]),
        ("convert --model m --kv-heads 4 --out x", ["--kv-heads", "nothing would change"]),
        ("convert --model m --kv-heads 2 --layers 5 --out x", ["--layers", "no layer 5"]),
        ("convert --model m --kv-heads 2 --out m", ["m", "is there already"]),
    ] {
        place.refused(arguments, &parts);
        assert!(!place.path("x").exists(), "{arguments}");
    }
}
