//! `attn sweep`: the runs of a grid, what they say together, and what a stop or a kill leaves of them.

mod common;

use std::{
    fs,
    process::{Child, Stdio},
    thread,
    time::{Duration, Instant},
};

use attn_core::config::Head;
use common::{FINETUNE, Place, Ran, model_folder, write_data};
use rustix::process::{Pid, Signal, kill_process};

const SWEEP: &str = "\
base = 'run.toml'
seeds = [3, 4]
[grid]
train.lr = [1e-2, 1e-4]
train.epochs = [5]
";

/// The folders of [`SWEEP`].
const FOLDERS: [&str; 4] =
    ["lr=0.01,seed=3", "lr=0.01,seed=4", "lr=0.0001,seed=3", "lr=0.0001,seed=4"];

fn place() -> Place {
    let place = Place::new();
    model_folder(&place, "model", "distilbert", Head::LanguageModel);
    write_data(&place);
    place.write("run.toml", FINETUNE);
    place.write("rates.toml", SWEEP);
    place
}

fn start(place: &Place, arguments: &str) -> Child {
    place.command(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Waits until `is_so`.
#[track_caller]
fn wait(is_so: impl Fn() -> bool) {
    let started = Instant::now();
    while !is_so() {
        assert!(started.elapsed() < Duration::from_secs(120), "waited in vain");
        thread::sleep(Duration::from_millis(2));
    }
}

fn ended(child: Child) -> Ran {
    Ran::of(child.wait_with_output().unwrap())
}

#[test]
fn every_setting_is_run_under_every_seed_and_compared_on_the_same_rows() {
    let place = place();

    let ran = place.done("sweep rates.toml --out out");

    for folder in FOLDERS {
        assert!(place.path(&format!("out/{folder}/model/config.json")).is_file(), "{folder}");
    }
    let json = place.json("out/sweep.json");
    let settings = json["settings"].as_array().unwrap();
    assert_eq!(settings.len(), 2);
    for setting in settings {
        let after: Vec<f64> = setting["runs"]
            .as_array()
            .unwrap()
            .iter()
            .map(|run| {
                let folder = run["folder"].as_str().unwrap();
                let summary = place.json(&format!("out/{folder}/summary.json"));
                assert_eq!(run["after"], summary["after"]["accuracy"]);
                assert_eq!(run["before"], summary["before"]["accuracy"]);
                assert_eq!(run["seed"], summary["seed"]);
                run["after"].as_f64().unwrap()
            })
            .collect();
        let mean = setting["after"]["mean"].as_f64().unwrap();
        assert!((mean - (after[0] + after[1]) / 2.).abs() < 1e-12);
    }
    let pair = &json["comparisons"][0];
    assert_eq!((&pair["first"], &pair["second"]), (&settings[0]["name"], &settings[1]["name"]));
    // By hand, from the predictions.
    let right = |folder: &str| -> Vec<bool> {
        let text = place.read(&format!("out/{folder}/predictions.jsonl"));
        let lines =
            text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        lines.map(|line| line["label"] == line["predicted"]).collect()
    };
    let (a, b) = (right(FOLDERS[0]), right(FOLDERS[2]));
    let only_first = a.iter().zip(&b).filter(|(a, b)| **a && !**b).count();
    assert_eq!(pair["seeds"][0]["only_first"], only_first);
    assert_eq!(pair["seeds"].as_array().unwrap().len(), 2);
    assert!(only_first > 0 && pair["difference"].as_f64().unwrap() > 0., "{pair}");

    for part in ["data.csv, validation: 16 rows", "lr=0.01 − lr=0.0001", "McNemar's p", " ± "] {
        assert!(ran.stdout.contains(part), "no `{part}` in\n{}", ran.stdout);
    }
    let csv = place.read("out/sweep.csv");
    assert!(csv.starts_with("setting,seed,train.lr,train.epochs,before_accuracy,"), "{csv}");
    assert_eq!(csv.lines().count(), 5);

    // Finished ones are kept, and the table comes again.
    let again = place.done("sweep rates.toml --out out");
    assert_eq!(again.stdout, ran.stdout);
    assert!(!again.stderr.contains("run 1 of"), "{}", again.stderr);
}

#[test]
fn a_run_of_a_sweep_is_the_run_that_the_command_makes_alone() {
    let place = place();
    place.done("sweep rates.toml --out out");

    place.done("finetune run.toml --set train.lr=1e-4 --set train.epochs=5 --seed 4 --out alone");

    for file in ["model/model.safetensors", "predictions.jsonl", "metrics.jsonl"] {
        assert_eq!(
            place.bytes(&format!("alone/{file}")),
            place.bytes(&format!("out/{}/{file}", FOLDERS[3])),
            "{file}"
        );
    }
}

#[test]
fn a_dry_run_lists_the_runs_and_writes_nothing() {
    let place = place();

    let before = place.done("sweep rates.toml --out out --dry-run").stdout;

    assert!(
        before.contains("out: 4 runs, 0 finished") && before.contains("time unknown"),
        "{before}"
    );
    assert!(FOLDERS.iter().all(|folder| before.contains(folder)), "{before}");
    assert!(!place.path("out").exists());

    place.write("one.toml", &SWEEP.replace("[3, 4]", "[3]"));
    place.done("sweep one.toml --out out");
    let after = place.done("sweep rates.toml --out out --dry-run").stdout;
    assert!(after.contains("4 runs, 2 finished"), "{after}");
    assert!(after.contains(" for the 2 left, by the mean of those finished"), "{after}");
}

#[test]
fn a_kill_loses_no_more_than_the_steps_since_the_last_checkpoint() {
    let place = place();
    let long = "--set train.epochs=40 --set train.checkpoint_every=20";
    place.write("rates.toml", &SWEEP.replace("[1e-2, 1e-4]", "[1e-2]").replace("[3, 4]", "[3]"));
    place.done(&format!("sweep rates.toml {long} --out whole"));

    let child = start(&place, &format!("sweep rates.toml {long} --out out"));
    wait(|| place.path("out/base,seed=3/checkpoints/step-000040").exists());
    kill_process(Pid::from_child(&child), Signal::KILL).unwrap();
    assert_eq!(ended(child).code, -1);
    assert!(!place.path("out/base,seed=3/summary.json").exists());
    let dry = place.done(&format!("sweep rates.toml {long} --out out --dry-run")).stdout;
    assert!(dry.contains("begun, step "), "{dry}");

    // At once: the run that was under way has gone with the sweep.
    let ran = place.done(&format!("sweep rates.toml {long} --out out"));

    assert!(ran.stderr.contains("going on after step "), "{}", ran.stderr);
    for file in ["model/model.safetensors", "predictions.jsonl", "metrics.jsonl"] {
        assert_eq!(
            place.bytes(&format!("whole/base,seed=3/{file}")),
            place.bytes(&format!("out/base,seed=3/{file}")),
            "{file}"
        );
    }
}

#[test]
fn a_kill_at_any_time_can_be_gone_on_from() {
    let place = place();
    place.write("rates.toml", &SWEEP.replace("[1e-2, 1e-4]", "[1e-2]").replace("[3, 4]", "[3]"));
    for ms in [30, 150, 300, 450, 600, 750, 900, 1100, 1400] {
        let child = start(&place, "sweep rates.toml --out out");
        thread::sleep(Duration::from_millis(ms));
        // It may have finished.
        let _ = kill_process(Pid::from_child(&child), Signal::KILL);
        ended(child);
    }
    place.done("sweep rates.toml --out out");
    assert!(place.path("out/sweep.json").is_file());
}

/// Reading a large model takes minutes, and a kill meanwhile leaves the lock of the run's folder.
#[test]
fn a_run_that_was_killed_while_it_loaded_is_begun_again() {
    let place = place();
    place.write("rates.toml", &SWEEP.replace("[1e-2, 1e-4]", "[1e-2]").replace("[3, 4]", "[3]"));
    place.done("sweep rates.toml --out out");
    let environment = place.read("out/base,seed=3/env.json");
    for left in [&[(".lock", "")][..], &[(".lock", ""), ("env.json", &environment)]] {
        std::fs::remove_dir_all(place.path("out/base,seed=3")).unwrap();
        for (file, text) in left {
            place.write(&format!("out/base,seed=3/{file}"), text);
        }
        place.done("sweep rates.toml --out out");
        assert!(place.path("out/base,seed=3/summary.json").is_file(), "{left:?}");
    }
    // Another program's file of that name is not removed.
    std::fs::remove_dir_all(place.path("out/base,seed=3")).unwrap();
    place.write("out/base,seed=3/env.json", "{}");
    place.refused("sweep rates.toml --out out", &["base,seed=3", "holds something that is no run"]);
    assert_eq!(place.read("out/base,seed=3/env.json"), "{}");
    // A run's folder is no sweep's.
    place.write("killed/.lock", "");
    place.write("killed/config.toml", "");
    place.refused("sweep rates.toml --out killed", &["holds something that is no sweep"]);
}

#[test]
fn ctrl_c_saves_a_checkpoint_and_says_how_to_go_on() {
    let place = place();
    let long = "sweep rates.toml --set train.epochs=400 --set train.checkpoint_every=20 --out out";
    let child = start(&place, long);
    wait(|| place.path("out/lr=0.01,seed=3/checkpoints/step-000020").exists());
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();

    let ran = ended(child);

    assert_eq!((ran.code, ran.stdout.as_str()), (130, ""), "{}", ran.stderr);
    assert!(ran.stderr.contains("stopped with 4 of 4 runs left"), "{}", ran.stderr);
    let advice = ran.stderr.lines().last().unwrap().trim();
    assert!(
        advice.starts_with("attn sweep rates.toml --out out --set train.epochs=400"),
        "{advice}"
    );
    // As advised, up to the listing.
    let dry = place.shell(&format!("{advice} --dry-run"));
    assert!(dry.stdout.contains("begun, step "), "{}\n{}", dry.stdout, dry.stderr);
    assert!(!place.path("out/sweep.json").exists());
}

#[test]
fn a_run_that_fails_is_told_of_and_the_others_go_on() {
    let place = place();
    let file = "base = 'run.toml'\n[[run]]\nname = 'broken'\nmodel = 'nowhere'\n[[run]]\nname = 'good'\ntrain.max_steps = 2";
    place.write("some.toml", file);

    let ran = place.attn("sweep some.toml --out out");

    assert_eq!(ran.code, 1, "{}", ran.stderr);
    assert!(ran.stderr.contains("the run `broken,seed=3` failed (exit code 1)"), "{}", ran.stderr);
    let json = place.json("out/sweep.json");
    assert_eq!(json["failed"][0]["folder"], "broken,seed=3");
    assert_eq!(json["settings"][1]["runs"].as_array().unwrap().len(), 1);
    assert!(ran.stdout.contains("good"), "{}", ran.stdout);
}

#[test]
fn a_base_that_changes_meanwhile_changes_no_run() {
    let place = place();
    let child = start(&place, "sweep rates.toml --set train.epochs=20 --out out");
    wait(|| place.path("out/lr=0.01,seed=3/config.toml").exists());
    place.write("run.toml", &FINETUNE.replace("batch_size = 8", "batch_size = 4"));

    assert_eq!(ended(child).code, 0);

    for folder in FOLDERS {
        let config = place.read(&format!("out/{folder}/config.toml"));
        assert!(config.contains("batch_size = 8"), "{folder}: {config}");
    }
    place.refused(
        "sweep rates.toml --set train.epochs=20 --out out",
        &["`train.batch_size` is 4 now and 8 there"],
    );
}

#[test]
fn two_sweeps_in_one_folder_exclude_each_other() {
    let place = place();
    let child = start(&place, "sweep rates.toml --set train.epochs=4000 --out out");
    wait(|| place.path("out/lr=0.01,seed=3/config.toml").exists());

    place.refused("sweep rates.toml --out out", &["another sweep is at work in `out`", "hint: "]);

    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    assert_eq!(ended(child).code, 130);
}

#[test]
fn what_cannot_be_meant_is_refused_before_the_first_run() {
    let place = place();
    let refused = |text: &str, parts: &[&str]| {
        place.write("wrong.toml", text);
        place.refused("sweep wrong.toml --out out", parts);
        assert!(!place.path("out").exists(), "{text}");
    };
    refused("base = 'nowhere.toml'", &["cannot read `nowhere.toml`"]);
    refused(
        "base = 'run.toml'\ngird.train.lr = [1]",
        &["`wrong.toml`", "unknown field `gird`", "`grid`"],
    );
    refused(
        "base = 'run.toml'\ngrid.train.lr = [1e-3, 'fast']",
        &["wrong.toml", "lr=fast", "--set train.lr=\"fast\"", "expected a number"],
    );
    refused("base = 'run.toml'\ngrid.train.lr = 1", &["`grid.train.lr` is 1", "hint: "]);

    place.write("own/notes.txt", "mine");
    place.refused(
        "sweep rates.toml --out own",
        &["`own` holds something that is no sweep", "hint: "],
    );
    place.done("sweep rates.toml --out out --set train.max_steps=1");
    place.refused(
        "sweep rates.toml --out out --set train.max_steps=2",
        &[
            "lr=0.01,seed=3` holds a run with other settings",
            "`train.max_steps` is 2 now and 1 there",
        ],
    );
    fs::create_dir(place.path("out/lr=0.5,seed=3")).unwrap();
    place.write("out/lr=0.5,seed=3/notes.txt", "mine");
    place.write("rates.toml", &SWEEP.replace("1e-4]", "0.5]"));
    place.refused(
        "sweep rates.toml --out out --set train.max_steps=1",
        &["lr=0.5,seed=3` holds something that is no run"],
    );
}
