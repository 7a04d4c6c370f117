//! `attn finetune`, from a model and a table of rows to a trained model, and what it refuses.

mod common;

use std::{
    fs,
    process::Stdio,
    thread,
    time::{Duration, Instant},
};

use attn_core::{LoadOptions, Model, config::Head};
use attn_data::tokenizer::{Style, TextTokenizer, train_bpe};
use common::{
    FINETUNE, Place, Ran, config, edit_config, model_folder, random_model, rows, save, tokenizer,
    write_data,
};
use serde_json::{Value, json};

const WEIGHTS: &str = "model/model.safetensors";

/// A model, data and a config that belong together.
fn place(base: &str) -> Place {
    let place = Place::new();
    model_folder(&place, "model", base, Head::LanguageModel);
    write_data(&place);
    place.write("run.toml", FINETUNE);
    place
}

fn accuracy(summary: &Value, when: &str) -> f64 {
    summary[when]["accuracy"].as_f64().unwrap()
}

/// Lines of a JSONL file.
fn lines(place: &Place, name: &str) -> Vec<Value> {
    place.read(name).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn a_run_trains_reports_and_leaves_a_model_that_can_be_used() {
    for base in ["distilbert", "gpt2"] {
        let place = place(base);

        let ran = place.done("finetune run.toml --out out");

        for part in [
            "new head, with random weights",
            "step 0: accuracy",
            "the best so far",
            "laws that hold on this model: padding changes nothing, open gates change no bit",
        ] {
            assert!(ran.stderr.contains(part), "{base}: no `{part}` in {}", ran.stderr);
        }
        for part in ["before", "after", "95 % interval", "always `negative`", "what to try next"] {
            assert!(ran.stdout.contains(part), "{base}: no `{part}` in {}", ran.stdout);
        }
        let summary = place.json("out/summary.json");
        assert!(accuracy(&summary, "before") < 0.8, "{base}: {summary}");
        assert!(accuracy(&summary, "after") >= 0.9, "{base}: {summary}");
        assert_eq!(summary["majority_accuracy"], 0.5);
        assert_eq!(
            [&summary["n_train"], &summary["n_selection"], &summary["n_report"]],
            [&json!(40), &json!(8), &json!(16)]
        );
        let predictions = lines(&place, "out/predictions.jsonl");
        let right = predictions.iter().filter(|p| p["label"] == p["predicted"]).count();
        assert_eq!((predictions.len(), json!(right)), (16, summary["after"]["n_correct"].clone()));
        let texts: Vec<String> = common::rows(64).into_iter().map(|(text, _)| text).collect();
        assert!(predictions.iter().zip(&texts[48..]).all(|(p, text)| p["text"] == **text));
        assert!(predictions[0].get("pair").is_none());
        assert!(!place.path("out/checkpoints").exists(), "a finished run needs none");
        assert!(!ran.stdout.contains("attention:"), "{}", ran.stdout);
        for picture in ["loss", "accuracy"] {
            let bytes = place.bytes(&format!("out/plots/{picture}.png"));
            assert!(bytes.starts_with(b"\x89PNG") && bytes.len() > 5000);
        }
        let env = place.json("out/env.json");
        for field in ["commit", "libtorch", "device", "dtype", "threads", "cpu"] {
            assert!(env.get(field).is_some(), "{field}");
        }
        assert_eq!(env["dtype"], "f32");

        // The one evaluated is the one saved, and it can be scored as the run says.
        let again = hint(&ran, "the model again");
        assert!(!again.contains('\''), "no word needs a shell: {again}");
        place.done(&again);
        let eval = place.json("eval.json");
        assert_eq!(eval["accuracy"]["n_correct"], summary["after"]["n_correct"], "{base}");
        let (model, report) =
            Model::load(&place.path("out/model"), &LoadOptions::default()).unwrap();
        assert!(report.fresh.is_empty() && report.dropped.is_empty());
        assert_eq!(model.config().classes(), ["negative", "positive"]);
        TextTokenizer::from_folder(place.path("out/model")).unwrap();
    }
}

#[test]
fn metrics_hold_every_evaluation_and_selection_leaves_the_report_alone() {
    let place = place("distilbert");
    place.done("finetune run.toml --out out --set train.eval_every=10");

    let metrics = lines(&place, "out/metrics.jsonl");
    let steps = |name: &str| -> Vec<u64> {
        let of_name = metrics.iter().filter(|line| line["metric"] == name);
        of_name.map(|line| line["step"].as_u64().unwrap()).collect()
    };
    assert_eq!(steps("accuracy"), [0, 10, 20, 30]);
    assert_eq!(steps("train_loss"), (1..=30).collect::<Vec<_>>());
    assert!(metrics.iter().all(|line| line["seed"] == 3 && line.get("unit").is_some()));
    // Eighths are the rows held out; the sixteen reported rows would give sixteenths.
    for line in metrics.iter().filter(|line| line["metric"] == "accuracy") {
        assert_eq!((line["value"].as_f64().unwrap() * 8.0).fract(), 0.0, "{line}");
    }
}

#[test]
fn the_written_config_repeats_the_run_bit_for_bit() {
    let place = place("distilbert");
    place.done(
        "finetune run.toml --out a --set train.epochs=2 --set attention.kind=window --seed 9",
    );

    let config = place.read("a/config.toml");
    for line in [
        "seed = 9",
        "epochs = 2",
        "hold_out = 8",
        "select = \"accuracy\"",
        "kind = \"window\"",
        "size = 32",
        "warmup_ratio = 0.1",
    ] {
        assert!(config.contains(line), "no `{line}` in {config}");
    }
    place.done("finetune a/config.toml --out b");
    assert_eq!(place.bytes(&format!("a/{WEIGHTS}")), place.bytes(&format!("b/{WEIGHTS}")));
    assert_eq!(place.read("a/metrics.jsonl"), place.read("b/metrics.jsonl"));
    assert_eq!(place.read("a/predictions.jsonl"), place.read("b/predictions.jsonl"));
    let after_header = |text: String| text.split_once("\n\n").unwrap().1.to_owned();
    assert_eq!(after_header(config), after_header(place.read("b/config.toml")));

    place.done("finetune a/config.toml --out c --seed 10");
    assert_ne!(place.bytes(&format!("a/{WEIGHTS}")), place.bytes(&format!("c/{WEIGHTS}")));
}

#[test]
fn surgery_reaches_the_layers_it_names_and_the_folder_says_so() {
    let place = place("gpt2");
    let ran = place.done(
        "finetune run.toml --out out --set train.epochs=1 --set attention.kind=window --set attention.size=4 --set \
         surgery.layers=[1]",
    );

    assert!(ran.stderr.contains("attention `window` in layers [1]"), "{}", ran.stderr);
    let config = place.json("out/model/config.json");
    assert_eq!(config["model_type"], "attn_gpt2");
    assert_eq!(config["attn"]["layers"][0]["kind"], "softmax");
    assert_eq!(config["attn"]["layers"][1]["settings"], json!({"size": 4}));
    assert_eq!(
        place.json("out/summary.json")["attention"],
        json!([{"kind": "softmax"}, {"kind": "window", "size": 4}])
    );
    let title = "16 rows\nattention: window (size 4) in layer 1, softmax elsewhere\n";
    assert!(ran.stdout.contains(title), "{}", ran.stdout);
    assert!(!ran.stdout.contains("untouched"), "a new head has no figure: {}", ran.stdout);
    assert!(hint(&ran, "another attention").ends_with("--set attention.kind=gated"));
}

#[test]
fn a_decoders_config_names_a_padding_token() {
    let place = place("gpt2");
    assert!(place.json("model/config.json").get("pad_token_id").is_none());

    let ran = place.done("finetune run.toml --out out --set train.epochs=1");

    assert!(
        ran.stderr.contains("the config names no padding token; it now names 1"),
        "{}",
        ran.stderr
    );
    assert_eq!(place.json("out/model/config.json")["pad_token_id"], 1);
    assert!(
        !place
            .done("finetune run.toml --out b --set model=out/model --set train.epochs=1")
            .stderr
            .contains("padding token")
    );
}

#[test]
fn few_shots_take_the_last_model_and_hold_nothing_out() {
    let place = place("distilbert");
    place.write(
        "few.toml",
        "extends = 'run.toml'\n[examples]\nfew_shot = 4\nhold_out = 0\n[train]\nmax_steps = 5\n",
    );

    place.done("finetune few.toml --out out");

    let summary = place.json("out/summary.json");
    assert_eq!([&summary["n_train"], &summary["n_selection"]], [&json!(8), &json!(0)]);
    assert_eq!([&summary["selected_step"], &summary["total_steps"]], [&json!(5), &json!(5)]);
    assert!(lines(&place, "out/metrics.jsonl").iter().all(|line| line["metric"] != "accuracy"));
}

#[test]
fn data_without_a_validation_split_can_be_cut() {
    let place = place("distilbert");
    let rows: Vec<String> =
        common::rows(40).iter().map(|(text, label)| format!("{text},{label}")).collect();
    place.write("one.csv", &format!("text,label\n{}\n", rows.join("\n")));
    place.write(
        "own.toml",
        "model = 'model'\n[data]\nsource = 'one.csv'\nlabel = 'label'\n[train]\nepochs = 1\n",
    );

    place.refused(
        "finetune own.toml --out out",
        &["there is nothing to report on", "report_hold_out"],
    );
    place.done("finetune own.toml --out out --set examples.report_hold_out=0.25 --set examples.hold_out=0.1");

    let summary = place.json("out/summary.json");
    assert_eq!(
        [&summary["n_train"], &summary["n_selection"], &summary["n_report"]],
        [&json!(27), &json!(3), &json!(10)]
    );
    assert_eq!(summary["split"], "held out of train");
    assert_eq!(summary["classes"][1]["name"], "1");
}

#[test]
fn sentences_are_held_out_with_their_phrases_when_asked() {
    let place = place("distilbert");
    let of = |(text, label): &(String, usize)| {
        format!("{text},{label},train\n{text} in the end,{label},train\n")
    };
    let train: String = common::rows(20).iter().map(of).collect();
    let report = "the film was good,1,validation\nthe film was bad,0,validation\n";
    place.write("data.csv", &format!("review,stars,part\n{train}{report}"));

    let ran = place.done(
        "finetune run.toml --out out --set examples.hold_out_by=containment --set \
         examples.hold_out=4 --set train.max_steps=1",
    );

    let said = "held out 4 of 20 sentences; 4 of their phrases are left out of training";
    assert!(ran.stderr.contains(said), "{}", ran.stderr);
    let summary = place.json("out/summary.json");
    assert_eq!([&summary["n_train"], &summary["n_selection"]], [&json!(32), &json!(4)]);
    assert!(place.read("out/config.toml").contains("hold_out_by = \"containment\""));
}

#[test]
fn numbers_that_occur_are_the_classes_and_stay_so() {
    let place = place("distilbert");
    let file = |stars: [usize; 2], n: usize| {
        let rows = common::rows(n);
        let lines: Vec<String> =
            rows.iter().map(|(text, label)| format!("{text},{}", stars[*label])).collect();
        format!("review,stars\n{}\n", lines.join("\n"))
    };
    place.write("own.csv", &(file([2, 5], 64) + "the film was so so,4\nthe book was so so,4\n"));

    let ran = place.done(
        "finetune run.toml --set data.label=stars --set data.text=review --set examples.report_hold_out=0.2 --set \
         data.source=own.csv --out out",
    );

    assert!(ran.stderr.contains("3 classes: `2`, `4`, `5`"), "{}", ran.stderr);
    let config = place.json("out/model/config.json");
    assert_eq!(config["id2label"], json!({"0": "2", "1": "4", "2": "5"}));

    // Some of the classes alone, as a file of their own would number them anew.
    place.write("some.csv", &file([5, 5], 10));
    place.done(
        "eval --model out/model --task some.csv --split train --set data.text=review --set data.label=stars --out \
         eval.json",
    );
    let eval = place.json("eval.json");
    assert_eq!(eval["classes"][2]["n_rows"], 10, "{eval}");
    place.write("more.csv", &file([2, 3], 10));
    place.refused(
        "eval --model out/model --task more.csv --split train --set data.text=review --set data.label=stars --out \
         eval.json",
        &["label `3`", "`2`, `4`, `5`"],
    );
}

#[test]
fn a_saved_head_is_trained_further_when_asked() {
    let place = place("distilbert");
    place.done("finetune run.toml --out a");
    let ran = place.done(
        "finetune run.toml --out b --set model=a/model --set head=saved --set train.epochs=1",
    );

    assert!(!ran.stderr.contains("new head"), "{}", ran.stderr);
    let [a, b] = ["a", "b"].map(|run| place.json(&format!("{run}/summary.json")));
    assert_eq!(b["before"]["n_correct"], a["after"]["n_correct"]);
    place.refused(
        "finetune run.toml --out c --set head=saved",
        &["`head` is `saved`", "a language-model head", "2 classes"],
    );
}

#[test]
fn a_swap_in_a_tuned_classifier_is_compared_with_the_untouched_one() {
    let place = place("distilbert");
    let tuned = place.done("finetune run.toml --out a");

    // As the run itself advises.
    let advice = hint(&tuned, "swapped when tuned");
    assert!(
        advice.ends_with(
            "finetune a/config.toml --set model=a/model --set head=saved --set attention.kind=window --set attention.size=8"
        ),
        "{advice}"
    );
    let ran = place.done(&format!("{advice} --set attention.size=1 --out b"));

    let [a, b] = ["a", "b"].map(|run| place.json(&format!("{run}/summary.json")));
    assert_eq!(b["untouched"]["n_correct"], a["after"]["n_correct"]);
    assert!((accuracy(&b, "untouched") - accuracy(&b, "before")).abs() > 0.05, "{b}");
    for part in ["  untouched  ", "attention: window (size 1) in all layers"] {
        assert!(ran.stdout.contains(part), "{}", ran.stdout);
    }
    // Without a swap there is nothing to compare with.
    let same = place.done(
        "finetune a/config.toml --set model=a/model --set head=saved --set train.max_steps=1 --out c",
    );
    assert!(!same.stdout.contains("untouched"), "{}", same.stdout);
    assert!(place.json("c/summary.json").get("untouched").is_none());
}

#[test]
fn a_classifier_that_is_dropped_is_warned_of() {
    let place = place("distilbert");
    let first = place.done("finetune run.toml --out a --set train.max_steps=1");
    assert!(!first.stderr.contains("is dropped"), "{}", first.stderr);

    let ran = place.done("finetune run.toml --set model=a/model --out b --set train.max_steps=1");

    assert!(
        ran.stderr.contains(
            "warning: the model's classifier (classes `negative`, `positive`) is dropped; head = \"saved\" trains it \
             further"
        ),
        "{}",
        ran.stderr
    );
}

#[test]
fn a_run_that_makes_nothing_better_keeps_the_model_and_says_so() {
    let place = place("distilbert");
    place.done("finetune run.toml --out a");

    // A rate that undoes what was learned.
    let ran = place.done(
        "finetune run.toml --set model=a/model --set head=saved --set train.lr=3 --set train.warmup_ratio=0 --set \
         train.clip_norm=0 --out b",
    );

    let summary = place.json("b/summary.json");
    assert_eq!(summary["selected_step"], 0, "{}", ran.stderr);
    assert_eq!(summary["before"], summary["after"]);
    assert!(ran.stdout.contains("the model is the one before training"), "{}", ran.stdout);
    assert_eq!(place.bytes(&format!("a/{WEIGHTS}")), place.bytes(&format!("b/{WEIGHTS}")));
}

#[test]
fn what_to_try_next_finds_the_figure_again_or_is_not_offered() {
    let place = place("distilbert");
    let ran = place.done(
        "finetune run.toml --out out --set train.max_steps=3 --set examples.max_len=6 --set examples.report_limit=9",
    );

    let again = hint(&ran, "the model again");
    place.done(&again);

    let (summary, eval) = (place.json("out/summary.json"), place.json("eval.json"));
    assert_eq!(eval["accuracy"]["n_labelled"], 9);
    assert_eq!(eval["accuracy"]["n_correct"], summary["after"]["n_correct"]);
    let [a, b] = [&eval["accuracy"], &summary["after"]].map(|v| v["loss"].as_f64().unwrap());
    assert!((a / b - 1.0).abs() < 1e-5, "{a} {b}");
    let ran = place.done(
        "finetune run.toml --out cut --set train.max_steps=1 --set examples.report_hold_out=0.25",
    );
    assert!(!ran.stdout.contains("the model again"), "{}", ran.stdout);
}

/// A command of "what to try next", without the program.
fn hint(ran: &Ran, what: &str) -> String {
    let line = ran.stdout.lines().find(|line| line.trim_start().starts_with(what));
    let line = line.unwrap_or_else(|| panic!("no `{what}` in {}", ran.stdout));
    line.split_once("attn ").unwrap().1.to_owned()
}

/// Starts a run and interrupts it once the file or folder `until` is there.
fn interrupt(place: &Place, arguments: &str, until: &str) -> Ran {
    let child =
        place.command(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let started = Instant::now();
    while !place.path(until).exists() {
        assert!(started.elapsed() < Duration::from_secs(120), "`{until}` did not appear");
        thread::sleep(Duration::from_millis(2));
    }
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    Ran::of(child.wait_with_output().unwrap())
}

#[test]
fn an_interrupted_run_goes_on_to_the_very_same_end() {
    let place = place("distilbert");
    let config = "finetune run.toml --set train.epochs=30 --set train.checkpoint_every=20 --set train.eval_every=50";
    place.done(&format!("{config} --out whole"));

    let stopped =
        interrupt(&place, &format!("{config} --out parts"), "parts/checkpoints/step-000020");

    assert_eq!((stopped.code, stopped.stdout.as_str()), (130, ""), "{}", stopped.stderr);
    assert!(stopped.stderr.contains("finetune --out parts --resume"), "{}", stopped.stderr);
    assert!(!place.path("parts/summary.json").exists());
    let again = place.done("finetune --out parts --resume");
    assert!(again.stderr.contains("going on after step"), "{}", again.stderr);
    for file in [WEIGHTS, "metrics.jsonl", "predictions.jsonl", "before.json"] {
        assert!(
            place.bytes(&format!("whole/{file}")) == place.bytes(&format!("parts/{file}")),
            "{file} differs"
        );
    }
    let [whole, parts] = ["whole", "parts"].map(|run| place.json(&format!("{run}/summary.json")));
    for field in ["before", "after", "selected_step", "n_tokens", "train_loss", "selection"] {
        assert_eq!(whole[field], parts[field], "{field}");
    }

    assert!(!place.path("parts/checkpoints").exists());

    // Once more is no more than the table.
    let weights =
        fs::metadata(place.path(&format!("parts/{WEIGHTS}"))).unwrap().modified().unwrap();
    let finished = place.done("finetune --out parts --resume");
    assert!(finished.stderr.contains("has finished"), "{}", finished.stderr);
    assert_eq!(finished.stdout, again.stdout);
    let after = fs::metadata(place.path(&format!("parts/{WEIGHTS}"))).unwrap().modified().unwrap();
    assert_eq!(weights, after);
}

#[test]
fn a_run_is_resumed_with_its_own_settings_alone() {
    let place = place("distilbert");
    let stopped = interrupt(
        &place,
        "finetune run.toml --set train.epochs=200 --set train.checkpoint_every=5 --out out",
        "out/checkpoints/step-000005",
    );
    assert_eq!(stopped.code, 130, "{}", stopped.stderr);

    place.refused(
        "finetune run.toml --set train.epochs=200 --set train.checkpoint_every=5 --set train.lr=1e-3 --out out --resume",
        &["`train.lr` is 0.001 now and 0.01 by `out/config.toml`", "begin a new one"],
    );
    place.refused("finetune --seed 4 --out out --resume", &["`train.seed` is 4 now and 3"]);
    place.refused("finetune run.toml --out out", &["`out` holds something already", "--resume"]);
    place.refused("finetune --out none --resume", &["`none` holds no run"]);
    place.write(
        "out/config.toml",
        &place.read("out/config.toml").replace("epochs = 200", "epochs = 1"),
    );
    let stderr =
        place.refused("finetune --out out --resume", &["cannot resume", "`epochs` was 200"]);
    assert!(stderr.contains("training failed"), "{stderr}");
}

#[test]
fn two_runs_never_share_a_folder() {
    let place = place("distilbert");
    // Many rows: the config is written once they are read.
    let row = |i: usize| {
        let part = if i < 16 { "validation" } else { "train" };
        format!("the film was {},{},{part}\n", ["bad", "good"][i % 2], i % 2)
    };
    let rows: String = (0..20_000).map(row).collect();
    place.write("data.csv", &format!("review,stars,part\n{rows}"));
    let first = place
        .command("finetune run.toml --out out --set train.max_steps=400")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let started = Instant::now();
    while !place.path("out/.lock").exists() {
        assert!(started.elapsed() < Duration::from_secs(60), "the first run does not start");
        thread::sleep(Duration::from_millis(1));
    }
    assert!(!place.path("out/config.toml").exists(), "the first run is still reading");

    for way in ["run.toml", "--resume"] {
        let second = place.attn(&format!("finetune {way} --out out --set train.max_steps=400"));
        assert_eq!((second.code, second.stdout.as_str()), (1, ""), "{}", second.stderr);
        assert_eq!(second.stderr.matches("error: ").count(), 1, "{}", second.stderr);
        let is_early = second.stderr.contains("`out` holds no run");
        let is_refused = second.stderr.contains("another process is running in `out`");
        assert!(is_refused || way == "--resume" && is_early, "{}", second.stderr);
    }

    let first = Ran::of(first.wait_with_output().unwrap());
    assert_eq!(first.code, 0, "{}", first.stderr);
    for file in ["config.toml", "env.json", "before.json", "metrics.jsonl", "summary.json", WEIGHTS]
    {
        assert!(place.path(&format!("out/{file}")).exists(), "{file}");
    }
    assert!(!place.path("out/.lock").exists());
}

#[test]
fn runs_without_a_folder_get_one_by_date_and_name() {
    let place = place("distilbert");
    place.done("finetune run.toml --set train.max_steps=1");
    place.done("finetune run.toml --set train.max_steps=1");

    let mut names: Vec<String> = fs::read_dir(place.path("runs"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    assert_eq!(names.len(), 2);
    assert!(names[0].starts_with("20") && names[0].ends_with("-run"), "{names:?}");
    assert_eq!(names[1], format!("{}-2", names[0]));

    let made = |arguments: &str| {
        let ran = place.done(&format!("finetune {arguments} --set train.max_steps=1"));
        let line = ran.stdout.lines().find(|line| line.starts_with("model ")).unwrap();
        let folder = line.split_whitespace().nth(1).unwrap().strip_suffix("/model").unwrap();
        folder.to_owned()
    };
    let swapped = made("run.toml --set attention.kind=window");
    assert!(swapped.ends_with("-run-window"), "{swapped}");
    let again = made(&format!("{swapped}/config.toml --set attention.kind=gated"));
    assert!(again.ends_with("-run-gated"), "{again}");
    let named = made("run.toml --set attention.kind=window --set name=mine");
    assert!(named.ends_with("-mine"), "{named}");
}

#[test]
fn mistakes_in_the_config_show_at_once_and_leave_nothing() {
    let place = place("distilbert");
    let refused = |arguments: &str, parts: &[&str]| {
        let stderr = place.refused(&format!("finetune {arguments} --out out"), parts);
        assert!(!place.path("out").exists(), "{stderr}");
    };

    refused(
        "run.toml --set train.lrr=1",
        &[
            "cannot use `--set train.lrr=1`",
            "unknown field `lrr`",
            "in `train`",
            "did you mean `lr`?",
        ],
    );
    refused(
        "run.toml --set train.lr=0 --set train.epochs=2",
        &["cannot use `--set train.lr=0`", "`lr` is 0, expected a number above 0"],
    );
    refused("run.toml --set train.select=f1", &["`train.select` is `f1`", "`accuracy`, `loss`"]);
    refused("run.toml --set train.schedule=square", &["unknown variant `square`", "`cosine`"]);
    refused("run.toml --set train", &["cannot apply `--set train`", "there is no `=`"]);
    refused(
        "run.toml --set attention.kind=windw",
        &["unknown variant `windw`", "did you mean `window`?"],
    );
    refused("run.toml --set surgery.layers=[0]", &["nothing says what to put there", "attn list"]);
    refused("run.toml --set name=a/b", &["`name` is `a/b`"]);
    refused(
        "run.toml --set examples.few_shot=2",
        &["`examples.few_shot` and `examples.hold_out` are both set"],
    );
    refused(
        "run.toml --set examples.hold_out=0 --set train.select=accuracy",
        &["no rows are held out to choose by"],
    );
    refused("run.toml --device gpu", &["`gpu`"]);
    refused("none.toml", &["cannot read `none.toml`"]);
    place.write("no.toml", "model =");
    refused("no.toml", &["`no.toml` is not TOML", "line 1"]);
    place.write("no.toml", "[data]\nsource = 'data.csv'\nlabel = 'stars'");
    refused("no.toml", &["`model` is not set", "hint:"]);
    place.write("no.toml", "objective = 'causal'\n[init]\nmodel_type = 'gpt2'");
    refused("no.toml", &["a config for `pretrain`, not for `finetune`"]);
    place.refused("pretrain run.toml --out out", &["a config for `finetune`, not for `pretrain`"]);
}

#[test]
fn what_model_and_data_lack_is_refused_by_name_before_training() {
    let place = place("distilbert");
    let refused = |arguments: &str, parts: &[&str]| {
        place.refused(&format!("finetune run.toml --out out {arguments}"), parts);
        assert!(!place.path("out").exists(), "{arguments}");
    };

    refused("--set model=none/at/all", &["cannot use the model `none/at/all`"]);
    refused("--set model=owner/name", &["owner/name", "offline mode forbids"]);
    place.write("one.csv", "review,stars\nthe film was good,1\nthe film was bad,-1\n");
    refused("--set data.source=none.csv --set data.label=stars", &["`none.csv`"]);
    refused(
        "--set data.text=revew",
        &["no column `revew`", "did you mean `review`?", "hint: name it: --set data.text=COLUMN"],
    );
    refused("--set data.label=rating", &["no column `rating`", "--set data.label=COLUMN"]);
    refused(
        "--set data.source=data.csv --set data.split_column=splt",
        &["no column `splt`", "it has `review`, `stars`", "--set data.split_column=COLUMN"],
    );
    place.write("semicolons.csv", "review;stars\nthe film was good;1\n");
    refused(
        "--set data.source=semicolons.csv --set data.text=review --set data.label=stars",
        &["hint: `;` separates its columns, not commas"],
    );
    refused(
        "--set data.source=one.csv --set data.text=review --set data.label=stars",
        &["the classes [\"1\"], expected at least two", "-1 and null"],
    );
    refused("--set data.validation_split=tset", &["tset", "report_hold_out"]);
    refused("--set data.train_split=tain", &["tain"]);
    refused(
        r#"--set data.classes=["only"]"#,
        &["has the classes [\"only\"], expected at least two"],
    );
    refused(
        r#"--set data.classes=["a","b"] --set data.label=review"#,
        &["label `the film", "`a`, `b`"],
    );
    refused("--set examples.max_len=33", &["`examples.max_len` is 33", "32 positions"]);
    refused(
        "--set examples.hold_out=48",
        &["cannot use `examples.hold_out`", "cannot hold out 48 of 48"],
    );
    refused(
        "--set examples.hold_out=0 --set examples.few_shot=25",
        &["cannot use `examples.few_shot`", "fewer than the 25 per class"],
    );
    place.write("empty.csv", "review,stars,part\n");
    refused(
        "--set data.source=empty.csv",
        &["cannot use `--set data.source=empty.csv`", "`data.label` is not set"],
    );
    refused(
        "--set data.source=empty.csv --set data.text=review --set data.label=stars",
        &["no rows"],
    );

    tokenizer(Style::ByteLevel).save(place.path("model")).unwrap();
    refused("", &["the tokenizer has ids up to", "`vocab_size`"]);
    tokenizer(Style::WordPiece).save(place.path("model")).unwrap();

    // What shows when the model is there, or when training is about to begin.
    let later = |arguments: &str, parts: &[&str]| {
        place.refused(&format!("finetune run.toml --out deep/out {arguments}"), parts);
        assert!(!place.path("deep").exists(), "{arguments}");
        place.refused(&format!("finetune run.toml {arguments}"), parts);
        assert!(!place.path("runs").exists(), "{arguments}");
    };
    later("--set attention.kind=window --set surgery.layers=[2]", &["layer 2 is out of range"]);
    later("--set train.freeze=[\"*.nothing\"]", &["`*.nothing` matches no parameter"]);
    later("--set model=owner", &["neither a folder `owner` nor a model"]);
    fs::write(place.path("model/model.safetensors"), b"torn").unwrap();
    later("", &["cannot use the model `model`", "model.safetensors"]);
    edit_config(&place, "model", |config| {
        config.insert("model_type".into(), json!("t5"));
    });
    later("", &["`model_type` is `t5`"]);
}

#[test]
fn what_reads_two_texts_is_refused_before_the_data_is_read() {
    let place = place("distilbert");
    place.done("swap --model model --attention cross --layers 1 --out crossed");
    for model in ["model", "crossed"] {
        place.write(&format!("{model}/model.safetensors"), "no weights");
    }
    let refused = |arguments: &str, parts: &[&str]| {
        let nothing = "--set data.source=none.csv --set data.label=l --out out";
        place.refused(&format!("finetune run.toml {nothing} {arguments}"), parts);
        assert!(!place.path("out").exists());
    };
    let hint = "hint: name the column of the second text: --set data.text_pair=COLUMN";
    refused(
        "--set model=crossed",
        &["its layer 1 is `cross`", "`data.text_pair` is not set", hint],
    );
    refused("--set model=crossed --set data.text_pair=b", &["`none.csv`"]);
    refused("--set model=crossed --set attention.kind=softmax", &["`none.csv`"]);
    refused("--set attention.kind=cross", &["`attention.kind` is `cross`", hint]);
    let place = self::place("gpt2");
    place.write("model/model.safetensors", "no weights");
    let cross = "--set data.source=none.csv --set data.label=l --set data.text_pair=b --set attention.kind=cross";
    place.refused(&format!("finetune run.toml {cross} --out out"), &["cross", "distilbert"]);
}

#[test]
fn random_weights_are_the_control_of_pretrained_ones() {
    let place = place("distilbert");
    fs::remove_file(place.path("model/model.safetensors")).unwrap();

    place.refused(
        "finetune run.toml --out out",
        &["cannot use the model `model`", "model.safetensors"],
    );
    let ran = place.done("finetune run.toml --out b --set weights=random --set train.max_steps=2");

    assert!(ran.stderr.contains("the whole model has random weights"), "{}", ran.stderr);
    assert!(place.path("b/model/model.safetensors").exists());
}

#[test]
fn unlabelled_rows_and_cut_texts_are_counted_and_said() {
    let place = place("distilbert");
    let text = place.read("data.csv").replacen(",0,train", ",-1,train", 3);
    place.write("data.csv", &text);

    let ran =
        place.done("finetune run.toml --out out --set examples.max_len=6 --set train.max_steps=1");

    assert!(ran.stderr.contains("3 of 48 rows of split `train` have no label"), "{}", ran.stderr);
    assert!(ran.stderr.contains("were cut to 6 tokens"), "{}", ran.stderr);
    let summary = place.json("out/summary.json");
    assert_eq!([&summary["n_train"], &summary["max_len"]], [&json!(37), &json!(6)]);
}

#[test]
fn data_goes_to_stdout_and_quiet_silences_the_rest() {
    let place = place("distilbert");
    let ran = place.done("finetune run.toml --out out --set train.max_steps=2 -q");
    assert_eq!(ran.stderr, "");
    assert!(ran.stdout.contains("accuracy"));
    let loud = place.done("finetune run.toml --out b --set train.max_steps=2 -v");
    assert!(loud.stderr.contains("padding_changes_nothing held"), "{}", loud.stderr);
}

#[test]
fn adapters_are_saved_merged_or_alone_and_both_score_what_the_table_says() {
    for base in ["distilbert", "gpt2"] {
        let place = place(base);
        let lora = "--set lora.rank=4 --set lora.dropout=0.1 --set train.lr=0.02 --set train.epochs=30 --set lora.targets=[\"all-linear\"]";
        for save in ["merged", "adapter"] {
            let out = format!("out-{save}");
            let ran =
                place.done(&format!("finetune run.toml --out {out} {lora} --set lora.save={save}"));
            let summary = place.json(&format!("{out}/summary.json"));
            assert!(accuracy(&summary, "after") >= 0.8, "{base}, {save}: {summary}");
            let [trained, all] =
                ["n_trained", "n_parameters"].map(|n| summary[n].as_u64().unwrap());
            assert!(trained < all / 2, "{base}: {trained} of {all} are trained");

            let folder = if save == "merged" { "model" } else { "adapter" };
            assert!(ran.stdout.contains(&format!("{out}/{folder}")), "{}", ran.stdout);
            assert_eq!(place.path(&format!("{out}/model")).exists(), save == "merged");
            place.done(&hint(&ran, "the model again"));
            let eval = place.json("eval.json");
            assert_eq!(
                eval["accuracy"]["n_correct"], summary["after"]["n_correct"],
                "{base}, {save}"
            );
        }
        let adapter = place.json("out-adapter/adapter/adapter_config.json");
        assert_eq!(adapter["base_model_name_or_path"], "model");
        assert_eq!(adapter["fan_in_fan_out"], base == "gpt2");
        let whole =
            if base == "gpt2" { json!(["score"]) } else { json!(["classifier", "pre_classifier"]) };
        assert_eq!(adapter["modules_to_save"], whole);
    }
}

#[test]
fn a_new_head_that_is_frozen_is_saved_with_the_adapter() {
    let place = place("distilbert");
    let ran = place.done(
        "finetune run.toml --out out --set lora.rank=4 --set lora.save=adapter --set train.freeze=[\"pre_classifier*\"]",
    );

    let adapter = place.json("out/adapter/adapter_config.json");
    assert_eq!(adapter["modules_to_save"], json!(["classifier", "pre_classifier"]));
    let summary = place.json("out/summary.json");
    place.done(&hint(&ran, "the model again"));
    assert_eq!(place.json("eval.json")["accuracy"]["n_correct"], summary["after"]["n_correct"]);
    // A seed of its own would draw another head.
    let dir = place.path("out/adapter/adapter_model.safetensors");
    let file = attn_core::checkpoint::Checkpoint::open_file(&dir).unwrap();
    let is_there = |name: &str| file.names().any(|stored| stored.ends_with(name));
    assert!(is_there("pre_classifier.weight") && is_there("pre_classifier.bias"));
}

#[test]
fn an_adapter_finds_its_base_model_from_anywhere() {
    let place = place("distilbert");
    place.done("finetune run.toml --out deep/out --set lora.rank=4 --set lora.save=adapter --set train.max_steps=2");
    fs::create_dir(place.path("elsewhere")).unwrap();
    let eval = |adapter: &str| {
        let mut command = place.command("eval --split validation --out eval.json --model");
        let data = place.path("data.csv").display().to_string();
        command.args([adapter, "--task", &data, "--set", "data.text=review"]);
        command.args(["--set", "data.label=stars", "--set", "data.split_column=part"]);
        Ran::of(command.current_dir(place.path("elsewhere")).output().unwrap())
    };

    let ran = eval("../deep/out/adapter");
    assert_eq!(ran.code, 0, "{}", ran.stderr);

    fs::rename(place.path("model"), place.path("moved")).unwrap();
    let ran = eval("../deep/out/adapter");
    assert_eq!(ran.code, 1, "{}", ran.stderr);
    for part in ["its base model `model`", "from the working directory", "folders above", "hint: "]
    {
        assert!(ran.stderr.contains(part), "no `{part}` in {}", ran.stderr);
    }
}

#[test]
fn a_run_with_adapters_resumes_where_it_was_stopped() {
    let lora = "--set lora.rank=4 --set train.gradient_checkpointing=true --set train.epochs=30";
    is_killed_and_resumed(&place("gpt2"), lora);
}

#[test]
fn a_run_with_a_prompt_resumes_where_it_was_stopped_with_adapters_or_without() {
    let prompt = "--set prompt.template={{text}}: --set train.epochs=30";
    is_killed_and_resumed(&decoder(), prompt);
    let place = decoder();
    is_killed_and_resumed(&place, &format!("{prompt} --set lora.rank=2"));
    let bits = place.bytes("model/model.safetensors");
    assert_ne!(place.bytes(&format!("whole/{WEIGHTS}")), bits, "something was trained");
}

/// A run that is killed between two checkpoints and goes on ends as one that was left alone.
#[track_caller]
fn is_killed_and_resumed(place: &Place, settings: &str) {
    let settings = format!("{settings} --set train.checkpoint_every=5");
    place.done(&format!("finetune run.toml --out whole {settings}"));
    let mut child = place
        .command(&format!("finetune run.toml --out broken {settings}"))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while !place.path("broken/checkpoints/step-000005").exists() {
        assert!(Instant::now() < deadline && child.try_wait().unwrap().is_none());
        thread::sleep(Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!place.path("broken/summary.json").exists(), "it was killed before its end");
    let resumed = place.done("finetune --out broken --resume");
    assert!(resumed.stderr.contains("going on after step"), "{}", resumed.stderr);
    assert_eq!(place.bytes(&format!("broken/{WEIGHTS}")), place.bytes(&format!("whole/{WEIGHTS}")));
    assert_eq!(place.read("broken/metrics.jsonl"), place.read("whole/metrics.jsonl"));
}

#[test]
fn adapters_that_cannot_be_are_refused_before_the_run() {
    let place = place("gpt2");
    let refused = |set: &str, parts: &[&str]| {
        place.refused(&format!("finetune run.toml --out out {set}"), parts);
        assert!(!place.path("out").exists());
    };
    refused("--set lora.targets=[\"q_proj\"]", &["`q_proj` matches no matrix", "c_attn"]);
    refused("--set lora.rank=0", &["lora.rank", "at least 1"]);
    refused("--set lora.dropout=1", &["dropout"]);
    refused("--set lora.save=adapter --set attention.kind=window", &["lora.save", "merged"]);
    refused("--set lora.save=adapter --set lora.qkv_ranks=[2,0,2]", &["PEFT", "merge"]);

    let place = decoder();
    let tied = "--set lora.save=adapter --set prompt.template={{text}}: --set train.freeze=[\"!transformer.wte*\"]";
    place.refused(&format!("finetune run.toml --out out {tied}"), &["transformer.wte", "merge"]);
    assert!(!place.path("out").exists());
}

/// A decoder with room for a prompt.
fn decoder() -> Place {
    let place = Place::new();
    let texts: Vec<String> = rows(80).into_iter().map(|(text, _)| text).collect();
    let tokenizer = train_bpe(&texts, 290, Style::ByteLevel, Some(200)).unwrap();
    let mut config = config("gpt2");
    config.insert("vocab_size".into(), tokenizer.vocab_size().into());
    config.insert("n_positions".into(), 200.into());
    save(&random_model(config, Head::LanguageModel), &place.path("model"));
    tokenizer.save(place.path("model")).unwrap();
    write_data(&place);
    place.write("run.toml", FINETUNE);
    place
}

#[test]
fn a_language_model_learns_to_answer_a_prompt() {
    let place = decoder();
    let short = "--set prompt.template={{text}}:";

    let ran = place.done(&format!("finetune run.toml {short} --set train.epochs=30 --out out"));

    let summary = place.json("out/summary.json");
    assert!(accuracy(&summary, "before") < 0.8, "{summary}");
    assert!(accuracy(&summary, "after") >= 0.9, "{summary}");
    assert_eq!(summary["prompt"]["delimiter"], " ");
    assert!(summary["after_per_byte"]["accuracy"].is_number());
    let rows = lines(&place, "out/predictions.jsonl");
    assert_eq!(rows[0]["log_likelihoods"].as_array().unwrap().len(), 2);
    let saved: Value = place.json("out/model/config.json");
    assert_eq!(saved["architectures"], json!(["GPT2LMHeadModel"]));
    assert!(!ran.stdout.contains("the model again"), "no name stands for the template");

    // What it learnt is the answer and not the text before it.
    let eval = "--task data.csv --set data.text=review --set data.label=stars --set data.split_column=part";
    let classes = "--set data.classes=[\"negative\",\"positive\"]";
    place.done(&format!("eval --model out/model {eval} {classes} {short} --out e.json"));
    assert_eq!(place.json("e.json")["accuracy"], summary["after"]);

    place.done("finetune out/config.toml --out again");
    let again = place.json("again/summary.json");
    assert_eq!(again["after"], summary["after"], "the written config repeats the run");
}

#[test]
fn what_to_try_next_asks_the_prompt_that_has_a_name() {
    let place = decoder();
    let few = "--set examples.few_shot=2 --set examples.hold_out= --set train.max_steps=1";

    let ran = place.done(&format!("finetune run.toml --set prompt.name=sst2 {few} --out out"));

    let again = hint(&ran, "the model again");
    assert!(again.contains(" --prompt sst2"), "{again}");
    place.done(&again);
    assert_eq!(place.json("eval.json")["accuracy"], place.json("out/summary.json")["after"]);
}

#[test]
fn prompts_that_cannot_be_trained_are_refused_before_the_run() {
    let place = place("distilbert");
    let refused = |place: &Place, more: &str, parts: &[&str]| {
        place.refused(&format!("finetune run.toml {more} --out out"), parts);
        assert!(!place.path("out/config.toml").exists(), "{more}");
    };
    refused(&place, "--set prompt.name=sst2", &["a distilbert is an encoder", "hint: "]);
    refused(&place, "--set prompt.name=sts2", &["no prompt `sts2`", "did you mean `sst2`?"]);
    refused(&place, "--set prompt.nam=sst2", &["unknown field `nam`", "did you mean `name`?"]);
    let place = decoder();
    refused(&place, "--set prompt.name=mnli", &["answers the classes `entailment`"]);
    let chat = "--set prompt.name=sst2 --set prompt.chat=[{role=\"user\",content=\"{{text}}\"}]";
    refused(&place, chat, &["no chat template"]);
    refused(
        &place,
        "--set prompt.name=sst2 --set examples.max_len=20",
        &["split `", "20 are allowed"],
    );
}

#[test]
fn what_was_not_learned_or_not_used_is_said() {
    let place = place("distilbert");
    let nothing = "--set train.max_steps=1 --set train.lr=1e-9";
    let ran = place.done(&format!("finetune run.toml --out a {nothing}"));
    assert!(ran.stdout.contains("No better than always saying"), "{}", ran.stdout);
    assert!(!ran.stderr.contains("is not used"), "{}", ran.stderr);

    let ran = place
        .done(&format!("finetune run.toml --out b {nothing} --set examples.report_hold_out=0.25"));
    for part in ["has a split `validation`, which is not used", "--set examples.report_hold_out="] {
        assert!(ran.stderr.contains(part), "no `{part}` in {}", ran.stderr);
    }

    let ran = place.done("finetune run.toml --out c");
    assert!(!ran.stdout.contains("No better than"), "{}", ran.stdout);
    place.refused("finetune rum.toml", &["cannot read `rum.toml`", "hint: `.` holds run.toml"]);
}

/// Three of four rows reported on are positive, and as many of each class are trained on.
#[test]
fn always_means_the_class_that_most_rows_reported_on_have() {
    let place = place("distilbert");
    let mut text = "review,stars,part\n".to_owned();
    for (i, (review, label)) in common::rows(64).into_iter().enumerate() {
        let part = if i < 48 { "train" } else { "validation" };
        let label = if i >= 48 { usize::from(i % 4 != 0) } else { label };
        text += &format!("{review},{label},{part}\n");
    }
    place.write("data.csv", &text);
    let few = "--set examples.few_shot=4 --set examples.hold_out= --set train.max_steps=1";
    place.done(&format!("finetune run.toml --out out {few}"));
    let summary = place.json("out/summary.json");
    assert_eq!(
        (&summary["majority_class"], &summary["majority_accuracy"]),
        (&json!("positive"), &json!(0.75))
    );
}

/// A classifier that was tuned goes along with the adapter even where it stayed as it was; an adapter that PEFT would
/// have saved without it stands beside the base model's own.
#[test]
fn an_adapter_beside_a_frozen_classifier_scores_what_the_table_says() {
    let place = place("distilbert");
    place.done("finetune run.toml --out a");
    let frozen = "--set model=a/model --set head=saved --set lora.save=adapter --set train.freeze=[\"*classifier*\"]";
    let ran = place.done(&format!("finetune run.toml --out b {frozen}"));
    let summary = place.json("b/summary.json");
    let scores_as_the_table = || {
        place.done(&hint(&ran, "the model again"));
        let [eval, table] = [&place.json("eval.json")["accuracy"], &summary["after"]]
            .map(|score| score["loss"].as_f64().unwrap());
        // What was trained beside the matrix is added to it here.
        assert!((eval - table).abs() < 1e-6, "{eval} {table}");
    };
    scores_as_the_table();

    let file = place.path("b/adapter/adapter_model.safetensors");
    let mut tensors = attn_core::checkpoint::read_tensors(&file).unwrap();
    tensors.retain(|(name, _)| name.contains("lora_"));
    attn_core::checkpoint::write_tensors(&file, &tensors, &Default::default()).unwrap();
    scores_as_the_table();
}
