//! Pictures of result files.

mod common;

use std::path::{Path, PathBuf};

use attn_core::config::Head;
use common::{Place, model_folder};
use serde_json::{Value, json};

fn results(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../results").join(file)
}

/// A stored result of each kind, and how many pictures it has.
const STORED: [(&str, &str, usize); 20] = [
    ("heads", "2026-11-21-score-heads/gpt2.json", 2),
    ("ablation", "2026-11-23-ablation/ablate-zero.json", 1),
    ("needle", "2026-11-23-gqa/retrieval/whole.needle.json", 1),
    ("prune-curve", "2026-11-22-heads-sst2/curve-layer.json", 1),
    ("patch", "2026-11-22-patch/bracket-position.json", 1),
    ("attention-shift", "2026-11-22-head-roles/gpt2-shift.json", 1),
    ("conversion", "2026-11-23-gqa/gpt2-12/6-0.json", 2),
    ("sweep", "2026-11-22-attention-contexts/sweep.json", 1),
    ("sweep", "2026-11-21-sst2/sweep.json", 1),
    ("benchmark", "2026-11-21-bench-finetune/train-1.json", 1),
    ("agreement", "2026-11-22-heads-sst2/agreement.json", 1),
    ("choice", "2026-11-22-choose/choice.json", 1),
    ("measures", "2026-11-21-needle-llama/eval-test-random.json", 2),
    ("leaderboard", "2026-11-22-attention-quality/table.csv", 3),
    ("divergence", "2026-11-23-gqa/learned/direct-low-rank.json", 1),
    ("curves", "2026-11-21-needle-llama/9", 4),
    ("divergence", "2026-11-22-dynamic-heads/gpt2-05.json", 1),
    ("scaling", "2026-11-22-bench-attention/table.csv", 2),
    ("heads", "2026-11-23-gqa/retrieval/low-rank-2.scores.json", 2),
    ("roles", "2026-11-22-head-roles/gpt2.json", 1),
];

#[test]
fn every_kind_of_stored_result_is_drawn() {
    let place = Place::new();
    for (at, (kind, file, n)) in STORED.iter().enumerate() {
        let file = results(file).display().to_string();
        for (given, ending) in [("", "png"), ("--svg --theme dark", "svg")] {
            let ran = place.done(&format!("plot {file} --kind {kind} --out d{at} {given}"));
            let drawn: Vec<&str> = ran.stdout.lines().collect();
            assert_eq!(drawn.len(), *n, "{file}: {drawn:?}");
            for path in drawn {
                assert!(path.ends_with(ending), "{path}");
                let bytes = place.bytes(path);
                match ending {
                    "png" => assert_eq!(&bytes[1..4], b"PNG", "{path}"),
                    _ => assert!(bytes.starts_with(b"<svg "), "{path}"),
                }
            }
        }
        // The kind is known by what the file holds.
        let plain = place.done(&format!("plot {file} --out known{at}"));
        assert_eq!(plain.stdout.lines().count(), *n, "{file}");
    }
}

#[test]
fn what_is_measured_is_drawn_beside_its_file() {
    let place = Place::new();
    model_folder(&place, "m", "gpt2", Head::LanguageModel);
    place.write("notes.txt", &"a b c a b c\n".repeat(60));
    let ran = place.done("score-heads --model m --task notes.txt --split train --limit 20 --max-len 16 --own-output --out s/heads.json");
    for file in ["s/heads.png", "s/heads-histogram.png"] {
        assert_eq!(&place.bytes(file)[1..4], b"PNG");
        assert!(ran.stderr.contains(&format!("wrote `{file}`")), "{}", ran.stderr);
    }
    // Drawn again, it is the same picture.
    place.done("plot s/heads.json --out again.png");
    assert_eq!(place.bytes("again.png"), place.bytes("s/heads.png"));
    place.done("prune --model m --scores s/heads.json --remove 2 --out p");
    assert_eq!(&place.bytes("p/pruning.png")[1..4], b"PNG");
}

#[test]
fn heads_that_share_keys_and_values_are_framed() {
    let place = Place::new();
    model_folder(&place, "m", "gpt2", Head::LanguageModel);
    place.done("convert --model m --kv-heads 1 --method mean --out one");
    place.write("notes.txt", &"a b c a b c\n".repeat(60));
    let text = "--task notes.txt --split train --limit 20 --max-len 16 --own-output";
    for model in ["m", "one"] {
        place.done(&format!("score-heads --model {model} {text} --out {model}.json"));
        place.done(&format!("plot {model}.json --svg --out {model}-drawn"));
    }
    assert!(place.json("m.json").get("kv_of_head").is_none());
    let kv: Vec<Vec<i64>> =
        serde_json::from_value(place.json("one.json")["kv_of_head"].clone()).unwrap();
    assert!(kv.iter().flatten().all(|kv| *kv == 0) && !kv.is_empty());
    let said = |file: &str| String::from_utf8(place.bytes(file)).unwrap().contains("are framed");
    assert!(said("one-drawn/one.svg"));
    let text = std::fs::read_to_string(results("2026-11-21-score-heads/gpt2.json")).unwrap();
    let mut value: Value = serde_json::from_str(&text).unwrap();
    let layers = value["heads"].as_array().unwrap().len();
    value["kv_of_head"] = vec![json!([0, 1, 0, 2, 1, 2]); layers].into();
    place.write("apart.json", &value.to_string());
    place.done("plot apart.json --svg --out apart-drawn");
    assert!(!said("apart-drawn/apart.svg"));
    let svg = String::from_utf8(place.bytes("apart-drawn/apart.svg")).unwrap();
    assert!(svg.contains("kv 1") && svg.contains("not neighbours"));
    assert!(!said("m-drawn/m.svg"));
}

#[test]
fn two_models_attention_is_compared_and_printed() {
    let place = Place::new();
    model_folder(&place, "m", "gpt2", Head::LanguageModel);
    place.done("swap --model m --attention window --set size=2 --out w");
    for model in ["m", "w"] {
        let ran = place.shell(&format!(
            "attn heatmap --model {model} --text 'a b c a' --grid --out of-{model}"
        ));
        assert_eq!(ran.code, 0, "{}", ran.stderr);
    }
    let both = place.done("plot of-m/attention.json of-w/attention.json --svg --out both.svg");
    assert_eq!(both.stdout.trim(), "both.svg");
    let svg = String::from_utf8(place.bytes("both.svg")).unwrap();
    assert!(svg.contains("second \u{2212} first"));
    let text = place.done("plot of-m/attention.json --text");
    assert!(
        text.stdout.contains("Layer 0, head 0") && !text.stdout.contains('\u{1B}'),
        "no terminal, no colours"
    );
    place.done("heatmap --model m --text word --measure rollout --out other");
    place.refused(
        "plot of-m/attention.json other/rollout-attention.json --out x.png",
        &["have other layers, heads or tokens", "the same text"],
    );
}

#[test]
fn measures_of_attention_are_drawn_and_refused_where_they_mean_nothing() {
    let place = Place::new();
    model_folder(&place, "m", "gpt2", Head::LanguageModel);
    let names = |measure: &str, model: &str| -> Vec<String> {
        let ran = place.shell(&format!(
            "attn heatmap --model {model} --text 'a b c' --measure {measure} --out {measure}"
        ));
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        ran.stdout.lines().map(str::to_owned).collect()
    };
    assert_eq!(names("norm", "m"), ["norm/norm-layer-0.png", "norm/norm-layer-1.png"]);
    assert_eq!(
        names("rollout", "m"),
        ["rollout/rollout-layer-0.png", "rollout/rollout-layer-1.png"]
    );
    assert_eq!(names("entropy", "m"), ["entropy/entropy.png"]);
    place.refused(
        "heatmap --model m --text a --measure masks --out x",
        &["no layer of `m` adds up masks", "mask_mixture"],
    );
    place.done("swap --model m --attention mask_mixture --layers 1 --out mixed");
    assert_eq!(
        names("masks", "mixed"),
        ["masks/masks-coefficients.png", "masks/masks-layer-1.png"]
    );

    // Their numbers stand beside them, from which they are drawn again.
    for (file, pictures) in [
        ("entropy/entropy", &["entropy"][..]),
        ("masks/masks", &["masks-coefficients", "masks-layer-1"]),
        ("norm/norm-attention", &["norm-attention"]),
    ] {
        let drawn = place.done(&format!("plot {file}.json --out again")).stdout;
        let expected: Vec<String> = pictures.iter().map(|it| format!("again/{it}.png")).collect();
        assert_eq!(drawn.lines().collect::<Vec<_>>(), expected);
    }
    for name in ["entropy/entropy.png", "masks/masks-coefficients.png", "masks/masks-layer-1.png"] {
        let file = name.split_once('/').unwrap().1;
        assert_eq!(place.bytes(name), place.bytes(&format!("again/{file}")), "{name}");
    }

    // Rows of a rollout are shares of the text.
    let rolled = place.json("rollout/rollout-attention.json");
    for row in rolled["layers"][1]["weights"][0].as_array().unwrap() {
        let sum: f64 = row.as_array().unwrap().iter().map(|it| it.as_f64().unwrap()).sum();
        assert!((sum - 1.0).abs() < 1e-5, "{sum}");
    }
}

#[test]
fn what_cannot_be_drawn_is_refused_by_name() {
    let place = Place::new();
    place.write("other.json", "{\"a\": 1}");
    place.write("broken.json", "{\"scores\":");
    place.refused(
        "plot other.json",
        &["`other.json` is no result that can be drawn", "attn plot --help"],
    );
    let help = place.done("plot --help").stdout;
    assert!(help.contains("- heads:") && help.contains("scores of heads by layer"), "{help}");
    place.write("lines.jsonl", "{\"index\": 0, \"predicted\": 1}\n");
    place.refused("plot lines.jsonl", &["`lines.jsonl` is no result that can be drawn"]);
    let unfinished = json!({
        "sweep": "s", "rows": "r", "settings": [{"name": "a", "after": null, "runs": []}]
    });
    place.write("unfinished.json", &unfinished.to_string());
    place.refused(
        "plot unfinished.json",
        &["`unfinished.json`", "none of its 1 settings has a finished run"],
    );
    place.refused("plot broken.json", &["`broken.json` is not JSON"]);
    place.refused("plot nowhere.json", &["cannot read `nowhere.json`"]);
    std::fs::create_dir(place.path("empty")).unwrap();
    place.refused("plot empty", &["`empty` is no run", "metrics.jsonl"]);
    let heads = results("2026-11-21-score-heads/gpt2.json").display().to_string();
    let curves = results("2026-11-21-needle-llama/9").display().to_string();
    place.refused(&format!("plot {heads} {curves} --out x"), &["is no result that `heads` draws"]);
    place.refused(&format!("plot {curves} --text"), &["curves or bars"]);
    place.refused(&format!("plot {heads} --out x.pdf"), &["x.pdf"]);
    // A layer with fewer scores than heads.
    let text = std::fs::read_to_string(results("2026-11-21-score-heads/gpt2.json")).unwrap();
    let mut value: Value = serde_json::from_str(&text).unwrap();
    value["scores"][1].as_array_mut().unwrap().pop();
    place.write("short.json", &value.to_string());
    place.refused("plot short.json", &["layer 1 has 6 heads and 5 values"]);
}

/// What `attn prune` writes, of a layer that keeps every head.
fn pruning() -> Value {
    json!({
        "model": "m", "heads_before": [4, 4], "heads_after": [4, 2], "removed": [[], [0, 1]],
        "parameters_before": 10, "parameters_after": 9, "attention_flops_before": 10, "attention_flops_after": 8,
    })
}

#[test]
fn each_of_several_files_has_pictures_of_its_own() {
    let place = Place::new();
    let together = ["heads", "needle", "curves", "divergence", "measures"];
    let mut all: Vec<(&str, String, usize)> = vec![("pruning", pruning().to_string(), 1)];
    for (kind, file, n) in STORED {
        if !together.contains(&kind) {
            all.push((kind, std::fs::read_to_string(results(file)).unwrap(), n));
        }
    }
    for (kind, text, n) in all {
        let ending = if ["scaling", "leaderboard"].contains(&kind) { "csv" } else { "json" };
        let files = ["a", "b"].map(|folder| format!("{kind}/{folder}/x.{ending}"));
        files.iter().for_each(|file| place.write(file, &text));
        let [a, b] = files;
        for (given, parts) in [
            (String::new(), [format!("{kind}/a/x"), format!("{kind}/b/x")]),
            (format!("--out {kind}/d"), [format!("{kind}/d/a-x"), format!("{kind}/d/b-x")]),
            (format!("--out {kind}/p.png"), [format!("{kind}/p-a-x"), format!("{kind}/p-b-x")]),
        ] {
            let ran = place.done(&format!("plot {a} {b} --kind {kind} {given}"));
            let drawn: Vec<&str> = ran.stdout.lines().collect();
            assert_eq!(drawn.len(), 2 * n, "{kind}: {drawn:?}");
            for (at, path) in drawn.iter().enumerate() {
                assert!(path.starts_with(&parts[at / n]), "{path} is not of {}", parts[at / n]);
                assert_eq!(drawn.iter().filter(|it| *it == path).count(), 1, "{path}");
                assert_eq!(&place.bytes(path)[1..4], b"PNG");
            }
        }
        place.refused(&format!("plot {a} {a} --kind {kind}"), &["would both be", "one by one"]);
    }
}

#[test]
fn a_picture_is_known_by_its_ending_in_capitals_too() {
    let place = Place::new();
    place.write("p.json", &pruning().to_string());
    assert_eq!(place.done("plot p.json --out x.PNG").stdout.trim(), "x.PNG");
    assert_eq!(&place.bytes("x.PNG")[1..4], b"PNG");
    place.refused("plot p.json --out x.PDF", &["x.PDF"]);
}

#[test]
fn runs_of_one_name_are_told_apart() {
    let place = Place::new();
    let file = results("2026-11-22-dynamic-heads/gpt2-05.json");
    let text = std::fs::read_to_string(file).unwrap();
    ["s/x/summary.json", "s/y/summary.json"].iter().for_each(|file| place.write(file, &text));
    place.done("plot s/x/summary.json s/y/summary.json --out both.svg");
    let svg = String::from_utf8(place.bytes("both.svg")).unwrap();
    for name in ["x/summary.json, at the swap", "y/summary.json, at the swap"] {
        assert!(svg.contains(name), "no `{name}`");
    }
}

fn attention(measure: &str, weights: &Value) -> String {
    json!({
        "schema": 1, "model": "m", "measure": measure, "unit": "weight",
        "layers": [{
            "layer": 0, "kind": "softmax", "rows": ["a", "b"], "columns": ["a", "b"], "heads": ["0"],
            "weights": weights,
        }],
    })
    .to_string()
}

#[test]
fn cells_without_a_number_are_drawn_grey() {
    let place = Place::new();
    place.write("a.json", &attention("weights", &json!([[[null, 0.25], [0.5, 0.5]]])));
    let heads = json!({
        "model": "m", "method": "michel", "heads": [[0, 1]], "scores": [[null, 1.0]],
        "interval_95": [[null, {"low": null, "high": 2.0}]],
    });
    place.write("h.json", &heads.to_string());
    for file in ["a", "h"] {
        place.done(&format!("plot {file}.json --out {file}.svg"));
        let svg = String::from_utf8(place.bytes(&format!("{file}.svg"))).unwrap();
        assert!(svg.contains("hold no number (grey)"), "{file}");
    }
}

#[test]
fn unlike_attention_is_not_subtracted_and_ragged_files_are_refused_by_name() {
    let place = Place::new();
    let weights = json!([[[1.0, 0.0], [0.5, 0.5]]]);
    place.write("w.json", &attention("weights", &weights));
    place.write("d/n.json", &attention("norms", &weights));
    place.refused(
        "plot w.json d/n.json --out x.png",
        &["`measure` of `w.json` is `weights`, and of `d/n.json` `norms`"],
    );
    place.write("d/few.json", &attention("weights", &json!([])));
    place.refused("plot w.json d/few.json", &["`d/few.json`", "layer 0 has 1 heads and 0 maps"]);
    place.write("d/short.json", &attention("weights", &json!([[[1.0], [0.5]]])));
    place.refused("plot d/short.json", &["`d/short.json`", "is not of 2 rows and 2 columns"]);

    let broken = |file: &str, of: &str, edit: &dyn Fn(&mut Value)| {
        let text = std::fs::read_to_string(results(of)).unwrap();
        let mut value: Value = serde_json::from_str(&text).unwrap();
        edit(&mut value);
        place.write(file, &value.to_string());
        place.refused(&format!("plot {file}"), &["cannot draw `d/", file, "layer"]);
    };
    let pop = |value: &mut Value| {
        value.as_array_mut().unwrap().pop();
    };
    broken(
        "d/heads.json",
        "2026-11-21-score-heads/gpt2.json",
        &|it| pop(&mut it["interval_95"][0]),
    );
    broken("d/patch.json", "2026-11-22-patch/bracket-position.json", &|it| {
        pop(&mut it["denoising"]);
    });
    broken("d/shift.json", "2026-11-22-head-roles/gpt2-shift.json", &|it| {
        pop(&mut it["shift"]["js_distance_interval_95"][0]);
    });
}

#[test]
fn rows_of_a_table_that_are_no_numbers_are_counted() {
    let place = Place::new();
    place.write("t.csv", "kind,n,ms\nsoftmax,64,1\nsoftmax,128,2\nsoftmax,256,OOM\n");
    place.done("plot t.csv --out t.svg");
    let svg = String::from_utf8(place.bytes("t.svg")).unwrap();
    assert!(svg.contains("rows without a number, left out: 1"));
}

#[test]
fn a_sweep_says_what_each_setting_came_to() {
    let place = Place::new();
    let sweep = results("2026-11-21-sst2/sweep.json");
    place.done(&format!("plot {} --out sweep.svg", sweep.display()));
    let svg = String::from_utf8(place.bytes("sweep.svg")).unwrap();
    let found: Value = serde_json::from_str(&std::fs::read_to_string(sweep).unwrap()).unwrap();
    let settings = found["settings"].as_array().unwrap();
    assert!(settings.len() > 2);
    for setting in settings {
        let mean = format!("{:.1}", 100.0 * setting["after"]["mean"].as_f64().unwrap());
        assert!(svg.contains(&format!(">{mean}<")), "{mean}");
    }
    assert!(svg.contains("majority class") && svg.contains("accuracy (%)"));
}

#[test]
fn the_folder_of_a_sweep_is_drawn_by_what_it_came_to() {
    let place = Place::new();
    let text = std::fs::read(results("2026-11-21-sst2/sweep.json")).unwrap();
    std::fs::create_dir(place.path("s")).unwrap();
    std::fs::write(place.path("s/sweep.json"), text).unwrap();
    assert_eq!(place.done("plot s --out new/picture.png").stdout.trim(), "new/picture.png");
    assert_eq!(&place.bytes("new/picture.png")[1..4], b"PNG");
}
