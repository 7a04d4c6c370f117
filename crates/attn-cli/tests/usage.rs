//! What the program says of itself.

mod common;

use attn_core::Variant;
use common::Place;

/// Every command, by the program's own list.
fn commands(place: &Place) -> Vec<String> {
    let help = place.done("--help").stdout;
    let (_, list) = help.split_once("Commands:\n").unwrap();
    let lines = list.lines().take_while(|line| !line.trim().is_empty());
    let names = lines.filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    let names = names.map(|line| line.split_whitespace().next().unwrap().to_owned());
    names.filter(|name| name != "help").collect()
}

#[test]
fn help_tells_a_newcomer_what_to_type() {
    let place = Place::new();
    let help = place.done("--help").stdout;
    let commands = commands(&place);
    for known in
        ["finetune", "pretrain", "eval", "sweep", "forward", "tokenize", "generate", "doctor"]
    {
        assert!(commands.iter().any(|command| command == known), "{known}: {commands:?}");
    }
    let mut texts = vec![help.clone()];
    for command in &commands {
        let own = place.done(&format!("{command} --help")).stdout;
        assert!(own.contains("Usage: attn ") && own.lines().count() > 5, "{own}");
        let is_plain = ["doctor", "list", "completions"].contains(&command.as_str());
        assert_eq!(own.contains("Example"), !is_plain, "{command}");
        texts.push(own);
    }
    assert!(help.contains("Examples:\n  attn finetune "), "{help}");
    for text in texts {
        let longest = text.lines().map(|line| line.chars().count()).max().unwrap();
        assert!(longest <= 100, "a line of {longest} characters: {text}");
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

/// The examples that begin with a download, which these tests do not make: they end where the Hub is asked.
const OF_THE_HUB: [&str; 23] = [
    "attn ablate --model runs/sst2/model --task sst2 --out ablation.json",
    "attn convert --config configs/gqa/half.toml",
    "attn distill configs/distill/window.toml --set attention.size=4",
    "attn eval --model gpt2-window --task wikitext-2 --against openai-community/gpt2 --out kl.json",
    "attn eval --model openai-community/gpt2 --task blimp --limit 100 --out blimp.json",
    "attn eval --model openai-community/gpt2 --task sst2 --prompt sst2 --out prompt.json",
    "attn eval --model openai-community/gpt2 --task wikitext-2-raw --out gpt2.json",
    "attn eval --model runs/2026-01-31-default/model --task sst2 --out eval.json",
    "attn eval --model runs/sst2/model --task sst2 --out eval.json",
    "attn explain --model runs/mine/model --against runs/mine/model --task wikitext-2 --out e.json",
    "attn finetune configs/finetune/kshot.toml --set examples.few_shot=8",
    "attn finetune configs/finetune/sst2.toml",
    "attn finetune configs/finetune/sst2.toml --out runs/sst2",
    "attn generate --model openai-community/gpt2 \"Once upon a time\"",
    "attn head-roles --model results/models/wikitext-gpt2 --task wikitext-2 --limit 500 --blimp 20 --treebank \
     ud_english_ewt --out roles.json",
    "attn needle --model runs/mine/model --haystack wikitext-2 --lengths 128,256 --mask-heads heads.json --top 2 --out masked.json",
    "attn needle --model runs/mine/model --haystack wikitext-2 --lengths 128,256 --out needle.json",
    "attn prune --model runs/sst2/model --scores heads.json --remove 6 --refit sst2 --out smaller",
    "attn prune-curve --model runs/sst2/model --scores heads.json --task sst2 --out c.json --plot c.png",
    "attn score-heads --config configs/heads/importance.toml",
    "attn score-heads --model runs/mine/model --method retrieval --haystack wikitext-2 --lengths 128,256 --out heads.json",
    "attn score-heads --model runs/sst2/model --task sst2 --out heads.json",
    "attn swap --model openai-community/gpt2 --attention window --set size=128 --out gpt2-window",
];

/// A step of distillation, of which a table can be made.
const TEACH: &str = "model = 'DIR'\n[data]\nsource = 'notes.txt'\n[examples]\nmax_len = 24\nlimit = \
                     200\nreport_hold_out = 20\n[attention]\nkind = 'window'\n[tune.train]\nmax_steps = 1\n";

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

    common::model_folder(&place, "DIR", "gpt2", attn_core::config::Head::LanguageModel);
    place.write("prompt.txt", "the film was");
    let own = r#"{"needle": "The best of all is cake.", "question": "What is best?", "real_needle": "cake"}"#;
    place.write("needles.jsonl", own);

    let mut of_the_hub = Vec::new();
    let helps = commands(&place).into_iter().chain([String::new()]);
    let mut all: Vec<String> = helps
        .map(|of| place.done(&format!("{of} --help")).stdout)
        .filter(|help| help.contains("Example"))
        .flat_map(|help| examples(&help))
        .collect();
    assert!(all.len() >= 18, "{all:?}");
    // Only a run that was begun goes on.
    all.sort_by_key(|example| example.contains("--resume"));
    for example in all {
        // Shortened, and with the model of the run that this place has.
        let mut command = example
            .replace("runs/sst2/model", "short/model")
            .replace("runs/mine/model", "short/model")
            .replace("runs/2026-01-31-default/model", "short/model");
        if example.contains(" distill") && !example.contains("--resume") {
            command += " --set tune.train.max_steps=2 --set examples.limit=600";
        }
        if example.contains(" finetune") || example.contains(" pretrain") {
            command += " --set train.max_steps=2 --set examples.limit=600";
        }
        if example.contains("reviews.csv") && example.contains(" finetune") {
            command += " --out short";
        }
        if example.contains(" sweep ") && !example.contains("max_steps") {
            command += " --set train.max_steps=2";
        }
        if example.contains(" generate") {
            command += " --max-new-tokens 8"; // The model has 32 positions.
        }
        if example.contains("finetune") && example.contains("--resume") {
            command = "attn finetune --out short --resume".into();
        }
        if example.contains(" leaderboard") {
            place.write("teach.toml", TEACH);
            place.done("distill teach.toml --out runs/attention/window");
            command = example.replace("wikitext-2", "notes.txt --split train");
            command += " --rows 4 --prompts 2 --blimp-pairs 0";
        }
        if example.contains(" attention-shift") {
            command = example.replace("DIR2", "DIR"); // Nothing has been tuned here.
        }
        if example.contains("--haystack") {
            let decoder = "results/models/wikitext-gpt2";
            command = example.replace("runs/mine/model", decoder).replace("DIR", decoder);
        }
        let ran = place.shell(&command);
        let needs_the_hub = ran.stderr.contains("offline mode forbids");
        assert!(ran.code == 0 || needs_the_hub, "{command}\n{}", ran.stderr);
        if needs_the_hub {
            of_the_hub.push(example);
        }
    }
    of_the_hub.sort();
    assert_eq!(of_the_hub, OF_THE_HUB);
}

/// The folders of `results/` that hold a run.
fn kept_runs() -> Vec<std::path::PathBuf> {
    let mut left = vec![std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../results")];
    let mut runs = Vec::new();
    while let Some(folder) = left.pop() {
        let entries = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path());
        left.extend(entries.filter(|path| path.is_dir()));
        if folder.join("summary.json").exists() {
            runs.push(folder);
        }
    }
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

        let command = match () {
            () if config.contains("objective = ") => "pretrain",
            () if config.contains("[tune.train]") => "distill",
            () => "finetune",
        };
        let ran = place.done(&format!("{command} --out {name} --resume"));

        assert!(ran.stderr.contains("has finished"), "{name}: {}", ran.stderr);
        let summary = place.json(&format!("{name}/summary.json"));
        let after = &summary["after"];
        let shown = match (command, after["accuracy"].as_f64()) {
            ("distill", _) => {
                let last = summary["stages"].as_array().unwrap().last().unwrap();
                format!("{:.4}", last["after"]["kl_nats_per_token"].as_f64().unwrap())
            }
            (_, Some(accuracy)) => format!("{:.1}%", 100.0 * accuracy),
            (_, None) => format!("{:.4}", after["loss_nats_per_token"].as_f64().unwrap()),
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
