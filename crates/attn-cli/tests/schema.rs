//! results/SCHEMA.md against what real runs write, and what reads them.

mod common;

use std::{collections::BTreeMap, fs, path::Path, process::Command};

use attn_core::{checkpoint::read_tensors, config::Head};
use common::{FINETUNE, Place, Ran, config, model_folder, rows, write_data};
use serde_json::Value;

fn repository() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// The fields of the section `title` with their types.
fn fields(title: &str) -> BTreeMap<String, String> {
    let text = fs::read_to_string(repository().join("results/SCHEMA.md")).unwrap();
    let (_, section) =
        text.split_once(&format!("\n## {title}\n")).unwrap_or_else(|| panic!("{title}"));
    let section = section.split("\n## ").next().unwrap();
    let rows = section.lines().filter_map(|line| line.strip_prefix("| `"));
    rows.map(|row| {
        let mut cells = row.split(" | ");
        let name = cells.next().unwrap().trim_end_matches('`').to_owned();
        (name, cells.next().unwrap().to_owned())
    })
    .collect()
}

/// Whether all of a field's content is described in its own row.
fn is_whole(name: &str, title: &str) -> bool {
    let of_eval = [
        "accuracy",
        "accuracy_per_byte",
        "classes",
        "predictions",
        "language",
        "per_text",
        "data",
        "prompt",
        "divergence",
        "conventions",
    ];
    let of_distances = [
        "set",
        "kl_at_swap",
        "kl_after_transfer",
        "kl_after_tune",
        "kl",
        "reverse_kl",
        "agreement",
        "loss_nats_per_token",
        "entropy_ratio",
        "runs[].by_position",
    ];
    let of_sweep = ["settings[].set", "settings[].after", "settings[].before.interval_95"];
    match title {
        "OUT.json of `eval`" => name == "attention" || of_eval.contains(&name),
        "`sweep.json`" => of_sweep.contains(&name),
        "`sweep.json` of distillations" => {
            name == "teacher"
                || name.strip_prefix("settings[].").is_some_and(|of| of_distances.contains(&of))
        }
        "`summary.json` of `distill`" => [
            "attention",
            "at_swap.model",
            "at_swap.baseline",
            "at_swap.by_position",
            "stages[].after",
        ]
        .contains(&name),
        "OUT.json of `eval --task blimp`" => {
            ["attention", "data", "interval_95", "fields", "terms", "paradigms"].contains(&name)
        }
        "OUT.json of `explain`" => ["attention", "data", "divergence", "written"].contains(&name),
        "OUT.json of `needle`" => {
            let whole =
                ["attention", "haystack", "cells[].answers", "masked.cells", "masked.random"];
            let of_masked = ["untouched", "without_top", "rouge1_recall_band", "word_match_band"];
            let inner = name.strip_prefix("masked.");
            whole.contains(&name) || inner.is_some_and(|name| of_masked.contains(&name))
        }
        "OUT.json of `score-heads --haystack`" => {
            ["attention", "haystack", "interval_95"].contains(&name)
        }
        "OUT.json of `score-heads`" => ["attention", "data", "learning"].contains(&name),
        "OUT.json of `ablate`" => {
            let of_effect =
                |name: &str| ["loss", "accuracy", "kl", "interaction_interval_95"].contains(&name);
            let inside = |list: &str| name.strip_prefix(list).is_some_and(of_effect);
            ["attention", "data", "baseline_loss", "baseline_accuracy"].contains(&name)
                || inside("ablations[].")
                || inside("pairs[].")
        }
        "OUT.json of `prune-curve`" => {
            let whole = ["attention", "data", "loss", "accuracy", "points[].random"];
            whole.contains(&name) || name == "points[].by_score"
        }
        "OUT.json of `compare-scores`" => name == "pairs[].spearman",
        "OUT.json of `patch`" | "OUT.json of `verify`" => name == "attention",
        "`pruning.json` of `prune`" => ["target", "picked"].contains(&name),
        "`conversion.json` of `convert`" => {
            let last = name.rsplit('.').next().unwrap_or(name);
            last == "method" || last.ends_with("interval_95")
        }
        "OUT.json of `head-roles`" => {
            let last = name.rsplit('.').next().unwrap_or(name);
            ["attention", "data", "positional"].contains(&last) || last.ends_with("interval_95")
        }
        "OUT.json of `attention-shift`" => {
            ["attention", "data", "control.shift", "control.between"].contains(&name)
        }
        "`choice.json` of `choose`" => ["attention", "data", "divergence"].contains(&name),
        _ => ["attention", "untouched", "before.needles", "after", "prompt", "after_per_byte"]
            .contains(&name),
    }
}

/// The fields of `value`, as the tables name them.
fn found(prefix: &str, value: &Value, title: &str, into: &mut Vec<String>) {
    let Value::Object(object) = value else { return };
    for (key, value) in object {
        let name = format!("{prefix}{key}");
        match value {
            _ if is_whole(&name, title) => into.push(name),
            Value::Object(_) => {
                into.push(name.clone());
                found(&format!("{name}."), value, title, into);
            }
            Value::Array(items) if items.iter().any(Value::is_object) => {
                items.iter().for_each(|item| found(&format!("{name}[]."), item, title, into));
            }
            // None of them, as where nothing failed.
            Value::Array(items) if items.is_empty() => {}
            _ => into.push(name),
        }
    }
}

/// Holds `value` to the section: nothing that is not described, and all that is not optional.
#[track_caller]
fn check(value: &Value, title: &str) {
    let described = fields(title);
    let mut names = Vec::new();
    found("", value, title, &mut names);
    for name in &names {
        // The row of an object is optional where its fields have rows.
        let has_rows = described.keys().any(|key| key.starts_with(&format!("{name}.")));
        assert!(described.contains_key(name) || has_rows, "{title}: `{name}` is not described");
    }
    for (name, kind) in &described {
        let inside_empty = name.split_once("[].").is_some_and(|(list, _)| {
            value.get(list).and_then(Value::as_array).is_some_and(Vec::is_empty)
        });
        assert!(
            names.contains(name) || kind.ends_with('?') || inside_empty,
            "{title}: `{name}` is described and not there"
        );
    }
    if let Some(schema) = described.get("schema") {
        assert_eq!((schema.as_str(), &value["schema"]), ("integer", &Value::from(1)), "{title}");
    }
}

fn place() -> Place {
    let place = Place::new();
    model_folder(&place, "model", "distilbert", Head::LanguageModel);
    write_data(&place);
    place.write("run.toml", FINETUNE);
    place
}

fn lines(place: &Place, name: &str) -> Vec<Value> {
    place.read(name).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn a_fine_tuning_run_and_its_evaluation_have_the_fields_of_the_schema() {
    let place = place();
    place.done("finetune run.toml --out a --set train.max_steps=4");
    let swap =
        "--set model=a/model --set head=saved --set attention.kind=window --set attention.size=1";
    place.done(&format!("finetune run.toml --out b --set train.max_steps=4 {swap}"));
    place.done("eval --model a/model --task data.csv --split validation --set data.text=review --set data.label=stars --set data.split_column=part --out eval.json");

    for run in ["a", "b"] {
        check(&place.json(&format!("{run}/summary.json")), "`summary.json` of `finetune`");
        check(&place.json(&format!("{run}/env.json")), "`env.json`");
        for line in lines(&place, &format!("{run}/metrics.jsonl")) {
            check(&line, "`metrics.jsonl`");
        }
        for line in lines(&place, &format!("{run}/predictions.jsonl")) {
            check(&line, "`predictions.jsonl`");
        }
    }
    check(&place.json("eval.json"), "OUT.json of `eval`");
    for prediction in place.json("eval.json")["predictions"].as_array().unwrap() {
        check(prediction, "`predictions.jsonl`");
    }
}

#[test]
fn a_pre_training_run_and_its_evaluation_have_the_fields_of_the_schema() {
    let place = Place::new();
    let texts: Vec<String> = rows(80).into_iter().map(|(text, _)| text).collect();
    place.write("text.txt", &texts.join("\n"));
    let mut init = config("gpt2");
    init.remove("vocab_size");
    place.write(
        "lm.toml",
        &format!(
            "objective = 'causal'\n[init]\n{}\n[tokenizer]\nvocab_size = 290\n[data]\nsource = 'text.txt'\n\
             [examples]\nmax_len = 24\nhold_out = 10\n[train]\nmax_steps = 4\n",
            toml::to_string(&init).unwrap()
        ),
    );
    place.done("pretrain lm.toml --out out");
    place.done("eval --model out/model --task text.txt --split train --out eval.json");

    check(&place.json("out/summary.json"), "`summary.json` of `pretrain`");
    check(&place.json("out/env.json"), "`env.json`");
    lines(&place, "out/metrics.jsonl").iter().for_each(|line| check(line, "`metrics.jsonl`"));
    check(&place.json("eval.json"), "OUT.json of `eval`");
}

#[test]
fn a_distillation_and_a_sweep_of_them_have_the_fields_of_the_schema() {
    let place = Place::new();
    let texts: Vec<String> = rows(80).into_iter().map(|(text, _)| text).collect();
    place.write("text.txt", &texts.join("\n"));
    model_folder(&place, "model", "gpt2", Head::LanguageModel);
    place.write(
        "distill.toml",
        "model = 'model'\n[data]\nsource = 'text.txt'\n[examples]\nmax_len = 24\nreport_hold_out = 20\n[attention]\nkind = \
         'gated'\n[transfer.train]\nmax_steps = 2\n[tune.train]\nmax_steps = 2\n",
    );
    place.write(
        "sweep.toml",
        "base = 'distill.toml'\nseeds = [1, 2]\n[[run]]\nname = 'gates'\n[[run]]\nname = 'near'\nattention.kind = \
         'window'\nattention.size = 2\n[[run]]\nname = 'no'\ndata.source = 'nowhere.txt'",
    );

    assert_eq!(place.attn("-q sweep sweep.toml --out out").code, 1);

    for run in ["gates,seed=1", "near,seed=2"] {
        check(&place.json(&format!("out/{run}/summary.json")), "`summary.json` of `distill`");
    }
    let json = place.json("out/sweep.json");
    check(&json, "`sweep.json` of distillations");
    let settings = json["settings"].as_array().unwrap();
    assert_eq!(settings[1]["kl_after_transfer"], Value::Null, "a window has nothing to train");
    assert_eq!(settings[0]["kl_after_transfer"]["n"], 2);
    assert_eq!(json["failed"].as_array().unwrap().len(), 2);
    let base = "eval --model out/near,seed=1/model --task text.txt --split train --max-len 24";
    place.done(&format!("{base} --against model --conventions --out eval.json"));
    check(&place.json("eval.json"), "OUT.json of `eval`");
    place.attn("verify --model model --against model --text text.txt --out verify.json");
    check(&place.json("verify.json"), "OUT.json of `verify`");
    let explain = base.replace("eval", "explain");
    place.attn(&format!("{explain} --against model --prompts 2 --out explain.json"));
    check(&place.json("explain.json"), "OUT.json of `explain`");

    // A line a run, and of the table one more, of the teacher.
    let csv = place.read("out/sweep.csv");
    assert_eq!(csv.lines().count(), 1 + 4, "{csv}");
    place.done("leaderboard out --against model --task text.txt --split train --max-len 24 --rows 8 --prompts 4 --blimp-pairs 0 --out board.csv");
    let board = place.read("board.csv");
    assert_eq!(board.lines().count(), 1 + 1 + 4, "{board}");
    assert!(board.lines().nth(1).unwrap().starts_with("untouched,softmax,same,,,,"), "{board}");
    let described = fs::read_to_string(repository().join("results/SCHEMA.md")).unwrap();
    for header in [csv.lines().next().unwrap(), board.lines().next().unwrap()] {
        for column in header.split(',').filter(|column| !column.contains('.')) {
            assert!(described.contains(&format!("`{column}`")), "{column}");
        }
    }
    // Of 2 layers of 16 channels, k and v in f32; the window keeps 2 tokens.
    let cell = |line: usize, column: &str| -> f64 {
        let at = board.lines().next().unwrap().split(',').position(|name| name == column).unwrap();
        // The name of a run has a comma, and stands in quotes.
        let line = board.lines().nth(line).unwrap().replace(",seed", " seed");
        line.split(',').nth(at).unwrap().parse().unwrap()
    };
    assert_eq!(cell(1, "state_bytes_16k"), 16384.0 * 2.0 * 2.0 * 16.0 * 4.0);
    assert_eq!(cell(4, "state_bytes_16k"), 2.0 * 2.0 * 2.0 * 16.0 * 4.0);
    assert_eq!(cell(4, "state_bytes_1k"), cell(4, "state_bytes_16k"));
    assert!(cell(4, "decode_tokens_per_s") > 0.0 && cell(4, "kl_at_swap") > 0.0);
}

#[test]
fn pairs_of_sentences_have_the_fields_of_the_schema() {
    let place = Place::new();
    model_folder(&place, "model", "gpt2", Head::LanguageModel);
    for paradigm in attn_data::blimp::paradigms() {
        let line = r#"{"sentence_good": "the film was good", "sentence_bad": "film the was good"}"#;
        place.write(&format!("pairs/{}/train.jsonl", paradigm.name), &format!("{line}\n"));
    }
    place.done("eval --model model --task blimp --set data.source=pairs --out eval.json");
    check(&place.json("eval.json"), "OUT.json of `eval --task blimp`");
}

#[test]
fn what_is_found_of_needles_has_the_fields_of_the_schema() {
    let place = Place::new();
    let text = fs::read_to_string(repository().join("data/sample_text.txt")).unwrap();
    place.write("text.txt", &text.lines().take(3000).collect::<Vec<_>>().join("\n"));
    let repository = repository();
    let init = "model_type = 'gpt2'\nn_embd = 8\nn_layer = 1\nn_head = 2\nn_positions = 256";
    place.write(
        "lm.toml",
        &format!(
            "objective = 'causal'\n[init]\n{init}\n[tokenizer]\nvocab_size = 500\n[data]\nsource = \
             '{}'\n[examples]\nmax_len = 128\nlimit = 2000\nhold_out = 0.5\n[needles]\nhold_out = 3\n\
             [train]\nmax_steps = 1\n",
            repository.join("data/sample_text.txt").display()
        ),
    );
    place.done("pretrain lm.toml --out lm");
    place.done("needle --model lm/model --haystack text.txt --split train --lengths 128 --depths 2 --trials 1 --out out.json");

    check(&place.json("lm/summary.json"), "`summary.json` of `pretrain`");
    check(&place.json("out.json"), "OUT.json of `needle`");

    let documents =
        "--model lm/model --haystack text.txt --split train --lengths 128 --trials 1 --depths 2";
    let methods = [
        "retrieval --keep-failures",
        "retrieval_repeats --keep-failures",
        "retrieval_mass --keep-failures",
        "query_focused",
    ];
    for method in methods {
        place.done(&format!(
            "score-heads {documents} --max-new-tokens 4 --method {method} --out heads.json"
        ));
        check(&place.json("heads.json"), "OUT.json of `score-heads --haystack`");
    }
    let masked = "--mask-heads heads.json --top 1 --random-draws 2 --max-new-tokens 4";
    place.done(&format!("needle {documents} {masked} --out masked.json"));
    check(&place.json("masked.json"), "OUT.json of `needle`");
    place.done(&format!("needle {documents} --max-new-tokens 0 --out unwritten.json"));
    check(&place.json("unwritten.json"), "OUT.json of `needle`");
}

/// A sweep of two named settings with two rates each, one of which fails.
fn sweep(place: &Place) {
    place.write(
        "sweep.toml",
        "base = 'run.toml'\nseeds = [1, 2]\n[grid]\ntrain.lr = [1e-2, 1e-3]\ntrain.max_steps = [4]\n[[run]]\nname = 'yes'\n[[run]]\nname = 'no'\nmodel = 'nowhere'",
    );
    assert_eq!(place.attn("-q sweep sweep.toml --out out").code, 1);
}

#[test]
fn a_sweep_has_the_fields_of_the_schema() {
    let place = place();
    sweep(&place);

    let json = place.json("out/sweep.json");
    check(&json, "`sweep.json`");
    assert_eq!(
        (json["settings"][2]["after"].clone(), json["failed"].as_array().unwrap().len()),
        (Value::Null, 4)
    );
    let described = fs::read_to_string(repository().join("results/SCHEMA.md")).unwrap();
    let header = place.read("out/sweep.csv").lines().next().unwrap().to_owned();
    for column in header.split(',').filter(|column| !column.contains('.')) {
        assert!(described.contains(&format!("`{column}`")), "{column}");
    }
}

fn script(place: &Place, python: &str, arguments: &[&str]) -> Ran {
    Ran::of(Command::new(python).args(arguments).current_dir(place.path("")).output().unwrap())
}

#[test]
fn the_script_and_the_notebook_read_a_folder_of_runs() {
    let Some(python) =
        common::python("the_script_and_the_notebook_read_a_folder_of_runs", "pandas, pyarrow")
    else {
        return;
    };
    let place = place();
    sweep(&place);
    let reader = repository().join("scripts/read_results.py").canonicalize().unwrap();
    let reader = reader.to_str().unwrap();

    let ran = script(&place, &python, &[reader, "out"]);

    assert_eq!(ran.code, 0, "{}", ran.stderr);
    for setting in place.json("out/sweep.json")["settings"].as_array().unwrap() {
        for run in setting["runs"].as_array().unwrap() {
            let line =
                ran.stdout.lines().find(|line| line.contains(run["folder"].as_str().unwrap()));
            let after = (1000. * run["after"].as_f64().unwrap()).round() / 10.;
            assert!(line.unwrap().contains(&format!("{after:.1}")), "{}", ran.stdout);
        }
    }
    let counts = "import sys; sys.path.insert(0, sys.argv[1]); import read_results as r; m = r.metrics('out'); \
        p = r.predictions('out'); print(len(m), m.run.nunique(), len(p), len(p.probabilities[0]), len(r.sweeps('out')))";
    let folder = Path::new(reader).parent().unwrap().to_str().unwrap();
    let ran = script(&place, &python, &["-c", counts, folder]);
    let n_lines: usize = ["0.01,seed=1", "0.01,seed=2", "0.001,seed=1", "0.001,seed=2"]
        .map(|run| lines(&place, &format!("out/yes,lr={run}/metrics.jsonl")).len())
        .iter()
        .sum();
    assert_eq!(ran.stdout.trim(), format!("{n_lines} 4 64 2 4"), "{}", ran.stderr);

    // The notebook's cells, as they stand, on this folder.
    let cells = "import json, os, sys; os.environ['RUNS'] = os.path.abspath('out'); os.chdir(sys.argv[1]); \
        cells = json.load(open('read_results.ipynb'))['cells']; display = print; \
        [exec(''.join(cell['source']), globals()) for cell in cells if cell['cell_type'] == 'code']";
    let ran = script(&place, &python, &["-c", cells, folder]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert!(ran.stdout.contains("yes,lr=0.01,seed=1"), "{}", ran.stdout);

    // A file of a later version is not read as if it were ours.
    let summary =
        place.read("out/yes,lr=0.01,seed=1/summary.json").replace("\"schema\": 1", "\"schema\": 2");
    place.write("out/yes,lr=0.01,seed=1/summary.json", &summary);
    let ran = script(&place, &python, &[reader, "out"]);
    assert!(
        ran.code == 1 && ran.stderr.contains("has schema 2, expected at most 1"),
        "{}",
        ran.stderr
    );
}

#[test]
fn attention_is_read_as_a_table() {
    let Some(python) = common::python("attention_is_read_as_a_table", "pandas, pyarrow") else {
        return;
    };
    let place = place();
    place.write(
        "ids.json",
        r#"{"input_ids": [[5, 6, 7], [8, 9, 5]], "attention_mask": [[1, 1, 1], [1, 1, 0]]}"#,
    );
    place.done(
        "forward --model model --input-ids ids.json --attentions --out o.safetensors --attention-table a/a.arrow",
    );
    let tensors = read_tensors(&place.path("o.safetensors")).unwrap();
    let layers: Vec<Vec<f32>> = tensors
        .iter()
        .filter(|(name, _)| name.starts_with("attentions."))
        .map(|(_, tensor)| tensor.flatten(0, -1).try_into().unwrap())
        .collect();

    let code = "import sys, json; sys.path.insert(0, sys.argv[1]); import read_results as r; t = r.attention('a/a.arrow'); \
        t = t.sort_values(['layer', 'row', 'head', 'query']); \
        print(json.dumps([t[t.layer == i].weights.map(list).sum() for i in sorted(set(t.layer))], default=float)); \
        print(t.row.nunique(), t['head'].nunique(), t['query'].nunique(), len(t))";
    let folder = repository().join("scripts");
    let ran = script(&place, &python, &["-c", code, folder.to_str().unwrap()]);

    let (weights, counts) = ran.stdout.split_once('\n').unwrap_or_else(|| panic!("{}", ran.stderr));
    let weights: Vec<Vec<f32>> = serde_json::from_str(weights).unwrap();
    assert_eq!(weights, layers, "in the order of the tensors");
    let n_heads = layers[0].len() / (2 * 3 * 3);
    assert_eq!(counts.trim(), format!("2 {n_heads} 3 {}", layers.len() * 2 * n_heads * 3));
}

#[test]
fn choices_have_the_fields_of_the_schema() {
    let place = Place::new();
    model_folder(&place, "m", "gpt2", Head::LanguageModel);
    let lines: Vec<String> = rows(40).into_iter().map(|(text, _)| text).collect();
    place.write("notes.txt", &lines.join("\n"));
    place.write("c.toml", "[[candidate]]\nattention = { kind = 'window', size = 2 }\n");
    for more in ["--budget flops=80%", ""] {
        let out = if more.is_empty() { "a" } else { "b" };
        place.done(&format!(
            "choose c.toml --model m --task notes.txt --split train {more} --out {out}"
        ));
        check(&place.json(&format!("{out}/choice.json")), "`choice.json` of `choose`");
    }
}

#[test]
fn scores_of_heads_have_the_fields_of_the_schema() {
    let place = place();
    place.done("finetune run.toml --out a --set train.max_steps=4");
    place.done("score-heads --model a/model --task data.csv --split validation --set data.text=review --set data.label=stars --set data.split_column=part --out a.json --table t/a.parquet");
    place.done("score-heads --model model --task data.csv --split validation --set data.text=review --set data.split_column=part --normalize layer --seed 3 --out b.json");

    place.done("score-heads --model model --task data.csv --split validation --set data.text=review --set data.split_column=part --iterative 0.5 --out c.json --table t/c.parquet");

    let [a, b, c] = ["a.json", "b.json", "c.json"].map(|name| place.json(name));
    check(&c, "OUT.json of `score-heads`");
    assert_eq!(c["interval_95"], Value::Null, "steps have no intervals");
    for json in [&a, &b] {
        check(json, "OUT.json of `score-heads`");
        for (layer, heads) in json["heads"].as_array().unwrap().iter().enumerate() {
            let n = heads.as_array().unwrap().len();
            for name in ["scores", "interval_95"] {
                assert_eq!(json[name][layer].as_array().unwrap().len(), n, "{name}");
            }
        }
    }
    assert_eq!((&a["loss"], &a["mask_seed"]), (&"label".into(), &Value::Null));
    assert_eq!((&b["loss"], &b["mask_seed"]), (&"masked_tokens".into(), &3.into()));
    let norm = |json: &Value| -> f64 {
        let of = json["scores"][0].as_array().unwrap().iter();
        of.map(|score| score.as_f64().unwrap().powi(2)).sum()
    };
    assert!((norm(&b) - 1.0).abs() < 1e-12 && (norm(&a) - 1.0).abs() > 1e-3, "{}", norm(&a));

    let Some(python) =
        common::python("scores_of_heads_have_the_fields_of_the_schema", "pandas, pyarrow")
    else {
        return;
    };
    let code = "import sys; sys.path.insert(0, sys.argv[1]); import read_results as r; a = r.scores('a.json'); \
        t = r.scores('t/a.parquet'); c = r.scores('c.json'); u = r.scores('t/c.parquet'); \
        print(len(a), (a.values == t.values).all(), list(a) == list(t), a.score.sum(), \
        (c.score == u.score).all(), c.low.isna().all() and u.high.isna().all())";
    let folder = repository().join("scripts");
    let ran = script(&place, &python, &["-c", code, folder.to_str().unwrap()]);
    let layers = a["scores"].as_array().unwrap();
    let scores: Vec<f64> = layers
        .iter()
        .flat_map(|layer| layer.as_array().unwrap())
        .map(|score| score.as_f64().unwrap())
        .collect();
    let words: Vec<&str> = ran.stdout.split_whitespace().collect();
    assert_eq!(words[..3], [&scores.len().to_string(), "True", "True"], "{}", ran.stderr);
    let sum: f64 = words[3].parse().unwrap();
    assert!((sum - scores.iter().sum::<f64>()).abs() < 1e-12 * sum, "{sum}");
    assert_eq!(words[4..], ["True", "True"], "{}", ran.stderr);
}

#[test]
fn roles_of_heads_and_shifts_of_attention_have_the_fields_of_the_schema() {
    let place = Place::new();
    model_folder(&place, "m", "gpt2", Head::LanguageModel);
    let lines: Vec<String> = rows(40).into_iter().map(|(text, _)| text).collect();
    place.write("notes.txt", &lines.join("\n"));
    for paradigm in attn_data::blimp::paradigms() {
        let line = r#"{"sentence_good": "the film was good", "sentence_bad": "film the was good"}"#;
        place.write(&format!("pairs/{}/train.jsonl", paradigm.name), &format!("{line}\n"));
    }
    common::treebank(&place, "trees", 60, &["2", "4", "4", "0"]);
    let texts = "--task notes.txt --split train";
    let more = "--treebank trees --blimp 1 --blimp-data pairs";
    place.done(&format!("head-roles --model m {texts} {more} --out all.json"));
    place.done(&format!("head-roles --model m {texts} --out some.json"));
    for name in ["all.json", "some.json"] {
        check(&place.json(name), "OUT.json of `head-roles`");
    }
    assert_eq!(place.json("some.json").get("syntax"), None);
    place.done(&format!("attention-shift --before m --after m --control m {texts} --out a.json"));
    place.done(&format!("attention-shift --before m --after m {texts} --out b.json"));
    for name in ["a.json", "b.json"] {
        check(&place.json(name), "OUT.json of `attention-shift`");
    }
}

#[test]
fn tensorboard_reads_what_metrics_hold() {
    let Some(python) = common::python("tensorboard_reads_what_metrics_hold", "tensorboard") else {
        return;
    };
    let place = place();
    place.done("finetune run.toml --out out --set train.max_steps=6");

    let code = "from tensorboard.backend.event_processing.event_accumulator import EventAccumulator as E\n\
        e = E('out/tensorboard'); e.Reload()\n\
        [print(t, v.step, v.value) for t in e.Tags()['scalars'] for v in e.Scalars(t)]";
    let ran = script(&place, &python, &["-c", code]);

    let mut read: Vec<(String, u64, f32)> = Vec::new();
    for line in ran.stdout.lines() {
        let [tag, step, value] = line.split(' ').collect::<Vec<_>>()[..] else { panic!("{line}") };
        read.push((tag.into(), step.parse().unwrap(), value.parse().unwrap()));
    }
    let mut written: Vec<(String, u64, f32)> = lines(&place, "out/metrics.jsonl")
        .iter()
        .map(|line| {
            let value = line["value"].as_f64().unwrap() as f32;
            (line["metric"].as_str().unwrap().into(), line["step"].as_u64().unwrap(), value)
        })
        .collect();
    for side in [&mut read, &mut written] {
        side.sort_by(|a, b| (&a.0, a.1).cmp(&(&b.0, b.1)));
    }
    assert_eq!(read, written, "{}", ran.stderr);
    for tag in ["train_loss", "lr", "grad_norm", "accuracy", "loss"] {
        assert!(read.iter().any(|(name, ..)| name == tag), "{tag}");
    }
}

#[test]
fn what_is_said_of_heads_has_the_fields_of_the_schema() {
    let place = Place::new();
    model_folder(&place, "m", "gpt2", Head::LanguageModel);
    let lines: Vec<String> = rows(40).into_iter().map(|(text, _)| text).collect();
    place.write("notes.txt", &lines.join("\n"));
    let of = "--model m --task notes.txt --split train --max-len 24";
    place.done(&format!(
        "score-heads {of} --method michel,leave_one_out --iterative 0.5 --out s.json"
    ));
    check(&place.json("s.michel.json"), "OUT.json of `score-heads`");
    let gates = "--method hard_concrete,subset --gate-steps 5";
    place.done(&format!("score-heads {of} {gates} --out l.json"));
    check(&place.json("l.subset.json"), "OUT.json of `score-heads`");
    place.done(&format!("ablate {of} --pairs 3 --out a.json"));
    check(&place.json("a.json"), "OUT.json of `ablate`");
    place.done(&format!("prune-curve {of} --scores s.michel.json --remove 1,3 --out c.json"));
    check(&place.json("c.json"), "OUT.json of `prune-curve`");
    place.done("compare-scores s.michel.json s.leave_one_out.json --out g.json");
    check(&place.json("g.json"), "OUT.json of `compare-scores`");
    for by in ["head", "position"] {
        let prompts = "'a b' 'b b' --answer a --wrong b";
        place.shell(&format!("attn patch --model m {prompts} --by {by} --out t.json --plot t.png"));
        check(&place.json("t.json"), "OUT.json of `patch`");
    }
    place.shell("attn heatmap --model m --text 'a b' --grid --out w");
    check(&place.json("w/attention.json"), "`attention.json` of `heatmap`");
    place.done("heatmap --model m --text word --measure entropy --out w");
    check(&place.json("w/entropy.json"), "`entropy.json` of `heatmap`");
    place.done("swap --model m --attention mask_mixture --layers 1 --out mixed");
    place.done("heatmap --model mixed --text word --measure masks --out w");
    check(&place.json("w/masks.json"), "`masks.json` of `heatmap`");
    place.done("prune --model m --heads 0-1,1-0 --out p --refit notes.txt");
    check(&place.json("p/pruning.json"), "`pruning.json` of `prune`");
    let text = "--calibration notes.txt --max-len 24 --test-tokens 100";
    place.done(&format!("convert --model m --kv-heads 2 {text} --refit --compare --out k"));
    check(&place.json("k/conversion.json"), "`conversion.json` of `convert`");
    place.done(&format!("convert --model m --cache 60% {text} --method first --out l"));
    check(&place.json("l/conversion.json"), "`conversion.json` of `convert`");
    place.done(&format!("convert --model m --kv-heads 1 {text} --as merging --out n"));
    check(&place.json("n/conversion.json"), "`conversion.json` of `convert`");
    place.done(&format!("convert --model n --method learned {text} --out o"));
    check(&place.json("o/conversion.json"), "`conversion.json` of `convert`");
    place.done("prune --model m --scores s.michel.json --target flops=0.6 --out q");
    check(&place.json("q/pruning.json"), "`pruning.json` of `prune`");
}
