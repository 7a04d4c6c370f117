//! `attn leaderboard`: what stands in one table was measured alike, against one teacher.

mod common;

use attn_core::config::Head;
use common::{Place, edit_config, model_folder, rows};

const BOARD: &str = "leaderboard runs --against model --task text.txt --split train --max-len 24 --rows 1000 --prompts 2 \
                     --max-new-tokens 4 --blimp-pairs 0 --out board.csv";

/// `runs/a` and `runs/b`, taught by `model`, a small language model.
fn place() -> Place {
    let place = Place::new();
    let texts: Vec<String> = rows(80).into_iter().map(|(text, _)| text).collect();
    place.write("text.txt", &texts.join("\n"));
    model_folder(&place, "model", "gpt2", Head::LanguageModel);
    place.write(
        "distill.toml",
        "model = 'model'\n[data]\nsource = 'text.txt'\n[examples]\nmax_len = 24\nreport_hold_out = 5\n[attention]\nkind = \
         'window'\nsize = 1\n[tune.train]\nmax_steps = 2\n",
    );
    place.done("distill distill.toml --out runs/a");
    place.done("distill distill.toml --set attention.size=2 --out runs/b");
    place
}

/// A cell of `board.csv`; the first line is the teacher's.
fn cell(place: &Place, line: usize, column: &str) -> String {
    let board = place.read("board.csv");
    let at = board.lines().next().unwrap().split(',').position(|name| name == column).unwrap();
    board.lines().nth(line + 1).unwrap().split(',').nth(at).unwrap().to_owned()
}

#[test]
fn all_are_measured_on_the_same_rows() {
    let place = place();

    let ran = place.done(BOARD);

    let summary = place.json("runs/a/summary.json");
    for (line, model) in ["model", "runs/a/model", "runs/b/model"].into_iter().enumerate() {
        place.done(&format!(
            "eval --model {model} --against model --task text.txt --split train --max-len 24 --out e.json"
        ));
        let found = place.json("e.json");
        let divergence = &found["divergence"];
        for (column, expected) in [
            ("perplexity", &found["language"]["perplexity"]),
            ("kl", &divergence["kl_nats_per_token"]),
            ("agreement", &divergence["top1_agreement"]),
        ] {
            let (here, expected) =
                (cell(&place, line, column).parse::<f64>().unwrap(), expected.as_f64().unwrap());
            assert!((here - expected).abs() < 1e-5 * expected.max(1.0), "{model}: {column} {here}");
        }
        assert_eq!(cell(&place, line, "teacher"), "same");
    }
    // The run's own rows are others, and tell of the run.
    let own = &summary["stages"][0]["after"];
    let kl = cell(&place, 1, "kl_after_tune").parse::<f64>().unwrap();
    assert_eq!(Some(kl), own["kl_nats_per_token"].as_f64());
    assert_ne!(cell(&place, 1, "perplexity"), own["model"]["perplexity"].to_string());
    assert_eq!(ran.stdout.lines().count(), 1 + 3, "{}", ran.stdout);
}

#[test]
fn a_student_of_another_teacher_is_no_part_of_the_table() {
    let place = place();
    // The same weights, which another norm makes another model of.
    model_folder(&place, "other", "gpt2", Head::LanguageModel);
    edit_config(&place, "other", |config| {
        config.insert("layer_norm_epsilon".into(), 0.1.into());
    });
    place.done("distill distill.toml --set model=other --out runs/c");

    let said = place.refused(BOARD, &["hint: name their teacher", "teacher.json"]);
    assert!(said.contains("`c` (taught by `other`)") && !said.contains("`a`"), "{said}");
    assert!(!place.path("board.csv").exists());

    // Of runs that do not say who taught them the table does not either.
    std::fs::remove_dir_all(place.path("runs/c")).unwrap();
    std::fs::remove_file(place.path("runs/a/teacher.json")).unwrap();
    place.write("runs/b/teacher.json", "\"0123456789abcdef-0123456789abcdef\"");
    let ran = place.done(BOARD);
    assert!(ran.stderr.contains("`unknown`") && ran.stderr.contains("`a`"), "{}", ran.stderr);
    let of = [0, 1, 2].map(|line| cell(&place, line, "teacher"));
    assert_eq!(of, ["same", "unknown", "unknown"]);
    place.done(&BOARD.replace("--rows", "--dtype bf16 --rows"));
}

#[test]
fn weights_made_anew_are_no_students() {
    let place = Place::new();
    place.refused(&format!("{BOARD} --init random"), &["`--init`", "hint: "]);
}
