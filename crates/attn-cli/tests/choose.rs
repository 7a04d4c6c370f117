//! `attn choose`: what it gives each layer is what it measured to be nearest, and a model like any other.

mod common;

use attn_core::config::Head;
use common::{Place, model_folder, rows};
use serde_json::Value;

const CANDIDATES: &str = "[[candidate]]\nattention = { kind = 'window', size = 2 }\n[[candidate]]\nattention.kind = \
                          'sinks'\nattention.n_sinks = 1\nattention.window = 3\n[[candidate]]\nattention = { kind = \
                          'single_head', from = 'best' }\n";

const TASK: &str = "--model m --task notes.txt --split train --max-len 24";

fn place(base: &str) -> Place {
    let place = Place::new();
    let lines: Vec<String> = rows(60).into_iter().map(|(text, _)| text).collect();
    place.write("notes.txt", &lines.join("\n"));
    place.write("candidates.toml", CANDIDATES);
    model_folder(&place, "m", base, Head::LanguageModel);
    place
}

fn list(value: &Value) -> &Vec<Value> {
    value.as_array().unwrap()
}

fn kl(value: &Value) -> f64 {
    value["kl_nats_per_token"].as_f64().unwrap()
}

#[test]
fn each_layer_gets_a_candidate_and_the_budget_holds() {
    let place = place("gpt2");
    let budget = "--budget state_bytes=50% --tokens 16";

    let ran = place.done(&format!("choose candidates.toml {TASK} {budget} --out out"));

    let found = place.json("out/choice.json");
    let (layers, choice) = (list(&found["layers"]), list(&found["choice"]));
    let n_heads = list(&layers[0]).len() - 3; // itself, a window, sinks, and the heads
    assert!(n_heads > 1, "{found}");
    let at = |layer: usize, place: u64| &layers[layer][place as usize];
    for layer in layers {
        assert_eq!(list(layer).len(), 3 + n_heads);
        assert_eq!(kl(&layer[0]), 0.0);
        for head in 0..n_heads {
            assert_eq!(layer[3 + head]["attention"]["head"], head);
        }
    }
    let whole = found["dense"]["state_bytes"].as_u64().unwrap();
    assert_eq!(found["budget"]["most"], whole / 2);
    assert!(found["spent"]["state_bytes"].as_u64().unwrap() <= whole / 2);

    // Of all mixtures within the budget none adds up to less.
    let mut sums = vec![(0.0, 0)];
    for layer in layers {
        let more = |&(sum, bytes): &(f64, u64)| -> Vec<(f64, u64)> {
            let add = |one: &Value| (sum + kl(one), bytes + one["state_bytes"].as_u64().unwrap());
            list(layer).iter().map(add).collect()
        };
        sums = sums.iter().flat_map(more).collect();
    }
    let within = sums.into_iter().filter(|(_, bytes)| *bytes <= whole / 2).map(|(sum, _)| sum);
    let least = within.min_by(f64::total_cmp).unwrap();
    let sum = found["kl_of_layers"].as_f64().unwrap();
    assert!((sum - least).abs() < 1e-12, "{sum} for {least}");

    // The folder is the mixture that was measured, and other commands take it.
    let same = "--model out/model --task notes.txt --split train --max-len 24";
    place.done(&format!("eval {same} --against m --out kl.json"));
    let again = kl(&place.json("kl.json")["divergence"]);
    let measured = kl(&found["divergence"]);
    assert!((again - measured).abs() < 1e-6 * measured, "{again} for {measured}");
    place.done("generate --model out/model --max-new-tokens 3 the");
    for (layer, place) in choice.iter().enumerate() {
        let shown = format!(" {:>8.4}*", kl(at(layer, place.as_u64().unwrap())));
        assert!(ran.stdout.contains(&shown), "no `{shown}` in {}", ran.stdout);
    }
    assert!(ran.stdout.contains("single_head (from best, head 1)"), "{}", ran.stdout);
}

#[test]
fn without_a_budget_each_layer_gets_its_best_head() {
    let place = place("gpt2");
    place.write(
        "heads.toml",
        "[[candidate]]\nattention = { kind = 'single_head', from = 'best' }\n",
    );
    place.done(&format!("choose heads.toml {TASK} --out out"));

    let found = place.json("out/choice.json");
    assert_eq!(found.get("budget"), None);
    for (layer, place) in list(&found["layers"]).iter().zip(list(&found["choice"])) {
        let chosen = kl(&layer[place.as_u64().unwrap() as usize]);
        let heads = &list(layer)[1..];
        assert!(heads.iter().all(|head| kl(head) >= chosen) && chosen > 0.0, "{layer}");
    }
    // A head that is named is one candidate.
    place.write(
        "heads.toml",
        "[[candidate]]\nattention = { kind = 'single_head', from = 'best', head = 0 }\n",
    );
    place.done(&format!("choose heads.toml {TASK} --out first"));
    let first = place.json("first/choice.json");
    assert!(list(&first["layers"]).iter().all(|layer| list(layer).len() == 2));
    let of = |found: &Value| found["kl_of_layers"].as_f64().unwrap();
    assert!(of(&found) <= of(&first), "{} and {}", of(&found), of(&first));
}

#[test]
fn an_encoder_is_held_to_operations() {
    let place = place("distilbert");
    place.write("window.toml", "[[candidate]]\nattention = { kind = 'window', size = 2 }\n");
    place.done(&format!("choose window.toml {TASK} --budget flops=60% --out out"));
    let found = place.json("out/choice.json");
    let [spent, most] = [&found["spent"]["flops"], &found["budget"]["most"]].map(Value::as_u64);
    assert!(spent <= most && list(&found["choice"]).contains(&0.into()), "{found}");
    place.refused(
        &format!("choose window.toml {TASK} --budget state_bytes=60% --out no"),
        &["encoder", "hint: "],
    );
    assert!(!place.path("no").exists());
}

#[test]
fn what_cannot_be_is_said_once_with_the_way_out() {
    let place = place("gpt2");
    let refused = |candidates: &str, more: &str, parts: &[&str]| {
        place.write("wrong.toml", candidates);
        place.refused(&format!("choose wrong.toml {TASK} {more} --out no"), parts);
        assert!(!place.path("no").exists(), "nothing is left behind");
    };
    let good = CANDIDATES;
    refused(good, "--budget state_bytes=1", &["1 bytes", "cheapest choice costs", "hint: "]);
    refused(good, "--budget 25%", &["`--budget` is `25%`", "state_bytes"]);
    refused(good, "--tokens 0", &["`--tokens` is 0"]);
    refused("", "", &["candidate"]);
    refused("candidate = []", "", &["[[candidate]]"]);
    let sise = "[[candidate]]\nattention = { kind = 'window', sise = 3 }\n";
    refused(sise, "", &["sise", "size", "wrong.toml"]);
    let kind = "[[candidate]]\nattention = { kind = 'windo' }\n";
    refused(kind, "", &["windo", "window"]);
    let head = "[[candidate]]\nattention = { kind = 'single_head', from = 'best', head = 99 }\n";
    refused(head, "", &["`head`", "99", "expected 0 to"]);
    place.write("m/x", "");
    place.refused(&format!("choose candidates.toml {TASK} --out m"), &["is there already"]);
}
