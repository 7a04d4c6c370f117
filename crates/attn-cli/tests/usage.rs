//! What the program says of itself.

mod common;

use attn_core::Variant;
use common::Place;

#[test]
fn help_tells_a_newcomer_what_to_type() {
    let place = Place::new();
    let help = place.done("--help").stdout;
    for command in [
        "finetune",
        "pretrain",
        "sweep",
        "eval",
        "forward",
        "tokenize",
        "doctor",
        "list",
        "completions",
    ] {
        assert!(help.contains(command), "{command}");
        let own = place.done(&format!("{command} --help")).stdout;
        assert!(own.contains("Usage: attn ") && own.lines().count() > 5, "{own}");
        let takes_settings =
            ["finetune", "pretrain", "sweep", "eval", "forward", "tokenize"].contains(&command);
        assert_eq!(own.contains("Example"), takes_settings, "{command}");
    }
    assert!(help.contains("Examples:\n  attn finetune "), "{help}");
    let own = ["finetune", "pretrain", "sweep", "eval", "forward"]
        .map(|command| place.done(&format!("{command} --help")).stdout);
    for text in own.into_iter().chain([help]) {
        let longest = text.lines().map(|line| line.chars().count()).max().unwrap();
        assert!(longest <= 100, "a line of {longest} characters");
    }
}

/// The commands that a help text shows, one line each.
fn examples(help: &str) -> Vec<String> {
    let (_, shown) = help.split_once("Example").unwrap();
    let joined = shown.split("\\\n").map(str::trim_start).collect::<String>();
    let commands = joined
        .lines()
        .skip(1)
        .map(str::trim)
        .filter(|line| line.starts_with("attn ") || line.starts_with("echo "));
    // What stands behind a command and says what it does is set off by spaces.
    commands
        .map(|line| line.split_once("    ").map_or(line, |(command, _)| command))
        .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
        .collect()
}

#[test]
fn every_example_of_every_help_text_runs() {
    let place = Place::new();
    let repository = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    for folder in ["configs", "results"] {
        std::os::unix::fs::symlink(repository.join(folder), place.path(folder)).unwrap();
    }
    let rows: Vec<String> =
        common::rows(64).iter().map(|(text, stars)| format!("{text},{stars}")).collect();
    place.write("reviews.csv", &format!("review,stars\n{}\n", rows.join("\n")));
    let text = std::fs::read_to_string(repository.join("data/sample_text.txt")).unwrap();
    place.write("notes.txt", &text.lines().take(2000).collect::<Vec<_>>().join("\n"));

    let mut n_hub = 0;
    let mut n_run = 0;
    let helps = ["finetune", "pretrain", "sweep", "eval", "forward", ""];
    let mut all: Vec<String> =
        helps.iter().flat_map(|of| examples(&place.done(&format!("{of} --help")).stdout)).collect();
    // Only a run that was begun goes on.
    all.sort_by_key(|example| example.contains("--resume"));
    for example in all {
        // Shortened, and with the model of the run that this place has.
        let mut command = example
            .replace("runs/sst2/model", "short/model")
            .replace("runs/mine/model", "short/model")
            .replace("runs/2026-01-31-default/model", "short/model");
        if example.contains(" finetune") || example.contains(" pretrain") {
            command += " --set train.max_steps=2 --set examples.limit=600";
        }
        if example.contains("reviews.csv") && example.contains(" finetune") {
            command += " --out short";
        }
        if example.contains(" sweep ") && !example.contains("max_steps") {
            command += " --set train.max_steps=2";
        }
        if example.contains("--resume") {
            command = "attn finetune --out short --resume".into();
        }
        let ran = place.shell(&command);
        let needs_the_hub = ran.stderr.contains("offline mode forbids");
        assert!(ran.code == 0 || needs_the_hub, "{command}\n{}", ran.stderr);
        n_hub += usize::from(needs_the_hub);
        n_run += 1;
    }
    assert!(n_run >= 15 && n_hub <= 7, "{n_hub} of {n_run} need the Hub");
}

/// The folders of `results/` that hold a run.
fn kept_runs() -> Vec<std::path::PathBuf> {
    let results = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../results");
    let entries = std::fs::read_dir(results).unwrap().map(|entry| entry.unwrap().path());
    let runs: Vec<_> = entries.filter(|path| path.join("summary.json").exists()).collect();
    assert!(runs.len() >= 7, "{runs:?}");
    runs
}

#[test]
fn no_kept_run_holds_texts_of_others() {
    let mut n_files = 0;
    for kept in kept_runs() {
        let read = |file: &str| std::fs::read_to_string(kept.join(file)).unwrap();
        let summary: serde_json::Value = serde_json::from_str(&read("summary.json")).unwrap();
        if summary["source"].as_str().unwrap().starts_with("data/")
            || !kept.join("predictions.jsonl").exists()
        {
            continue;
        }
        for line in read("predictions.jsonl").lines() {
            let row: serde_json::Value = serde_json::from_str(line).unwrap();
            let held = ["text", "pair"].map(|key| row.get(key));
            assert_eq!(held, [None, None], "{}: see results/README.md", kept.display());
        }
        n_files += 1;
    }
    assert!(n_files > 0);
}

#[test]
fn every_kept_run_can_be_read_again() {
    let place = Place::new();
    for kept in kept_runs() {
        let name = kept.file_name().unwrap().to_string_lossy().into_owned();
        let read = |file: &str| std::fs::read_to_string(kept.join(file)).unwrap();
        let config = read("config.toml");
        place.write(&format!("{name}/config.toml"), &config);
        place.write(&format!("{name}/summary.json"), &read("summary.json"));

        let command = if config.contains("[init]") { "pretrain" } else { "finetune" };
        let ran = place.done(&format!("{command} --out {name} --resume"));

        assert!(ran.stderr.contains("has finished"), "{name}: {}", ran.stderr);
        let after = &place.json(&format!("{name}/summary.json"))["after"];
        let shown = match after["accuracy"].as_f64() {
            Some(accuracy) => format!("{:.1}%", 100.0 * accuracy),
            None => format!("{:.4}", after["loss_nats_per_token"].as_f64().unwrap()),
        };
        assert!(ran.stdout.contains(&shown), "{name}: no `{shown}` in {}", ran.stdout);
    }
}

#[test]
fn nothing_typed_is_a_question_and_a_mistake_is_usage() {
    let place = Place::new();
    let nothing = place.attn("");
    assert_eq!((nothing.code, nothing.stdout.as_str()), (2, ""));
    assert!(nothing.stderr.contains("Usage: attn"), "{}", nothing.stderr);
    for wrong in [
        "finetunee",
        "eval --model m",
        "finetune --resume",
        "forward --model m --input-ids i --out o --dtype f8",
        "list -q -v",
        "tokenize --model m",
    ] {
        assert_eq!(place.attn(wrong).code, 2, "{wrong}");
    }
    assert!(place.attn("finetunee").stderr.contains("'finetune'"));
}

#[test]
fn the_list_names_every_kind_with_its_settings_and_every_task() {
    let list = Place::new().done("list").stdout;
    for variant in Variant::all() {
        assert!(list.contains(variant.name()), "{list}");
    }
    assert!(list.contains("window           size = 32"), "{list}");
    for task in attn_data::dataset::tasks() {
        assert!(list.contains(task.name) && list.contains(task.about), "{list}");
    }
}

#[test]
fn completions_are_scripts_of_each_shell() {
    let place = Place::new();
    for (shell, part) in [
        ("bash", "complete -F _attn"),
        ("zsh", "#compdef attn"),
        ("fish", "complete -c attn"),
        ("powershell", "Register-ArgumentCompleter"),
        ("elvish", "edit:completion:arg-completer[attn]"),
    ] {
        let script = place.done(&format!("completions {shell}")).stdout;
        assert!(script.contains(part) && script.contains("finetune"), "{shell}");
    }
}

#[test]
fn doctor_finds_this_machine_fit() {
    let ran = Place::new().done("doctor");
    assert!(ran.stdout.contains("LibTorch") && ran.stdout.contains("2.11.0"), "{}", ran.stdout);
    assert_eq!(ran.stderr, "");
}

#[test]
fn doctor_fails_with_the_fix_where_something_is_off() {
    let place = Place::new();
    std::fs::write(place.path("file"), "no folder").unwrap();
    let mut command = place.command("doctor");
    command.env_remove("HF_HUB_OFFLINE").env("HF_HUB_CACHE", place.path("file").join("hub"));
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{said}");
    let line = said.lines().find(|line| line.contains("hub cache")).unwrap();
    assert!(line.contains("FAIL") && line.contains("set HF_HOME or HF_HUB_CACHE"), "{line}");
}

#[test]
fn a_reader_that_leaves_early_is_no_error() {
    use std::process::Stdio;

    let place = Place::new();
    let mut child = place
        .command("completions bash")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8(output.stderr).unwrap(), "");
    assert!(output.status.success());
}
