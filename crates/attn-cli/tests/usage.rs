//! What the program says of itself.

mod common;

use attn_core::Variant;
use common::Place;

#[test]
fn help_tells_a_newcomer_what_to_type() {
    let place = Place::new();
    let help = place.done("--help").stdout;
    for command in
        ["finetune", "pretrain", "eval", "forward", "tokenize", "doctor", "list", "completions"]
    {
        assert!(help.contains(command), "{command}");
        let own = place.done(&format!("{command} --help")).stdout;
        assert!(own.contains("Usage: attn ") && own.lines().count() > 5, "{own}");
        let takes_settings =
            ["finetune", "pretrain", "eval", "forward", "tokenize"].contains(&command);
        assert_eq!(own.contains("Example"), takes_settings, "{command}");
    }
    assert!(help.contains("Examples:\n  attn finetune "), "{help}");
    for text in [help, place.done("eval --help").stdout, place.done("forward --help").stdout] {
        let longest = text.lines().map(|line| line.chars().count()).max().unwrap();
        assert!(longest <= 100, "a line of {longest} characters");
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
