//! Runs compared, and reported on one page.

mod common;

use attn_core::config::Head;
use common::{FINETUNE, Place, model_folder, write_data};

/// Two runs of the same task that differ in their seed.
fn two_runs() -> Place {
    let place = Place::new();
    model_folder(&place, "model", "distilbert", Head::LanguageModel);
    write_data(&place);
    place.write("tune.toml", &FINETUNE.replace("epochs = 6", "epochs = 1"));
    for seed in [0, 1] {
        place.done(&format!("finetune tune.toml --seed {seed} --out run-{seed}"));
    }
    place
}

#[test]
fn runs_on_the_same_rows_are_tested_against_the_first() {
    let place = two_runs();
    place.done("compare run-0 run-1 --format json --out both.json");
    let found = place.json("both.json");
    let against = &found["runs"][1]["against_first"];
    assert_eq!(against["of"], "accuracy", "{against}");

    // By hand, from the predictions.
    let right = |run: &str| -> Vec<bool> {
        let text = String::from_utf8(place.bytes(&format!("{run}/predictions.jsonl"))).unwrap();
        let line = |line: &str| -> bool {
            let row: serde_json::Value = serde_json::from_str(line).unwrap();
            row["label"] == row["predicted"]
        };
        text.lines().map(line).collect()
    };
    let (first, second) = (right("run-0"), right("run-1"));
    let count = |side: &[bool]| side.iter().filter(|it| **it).count() as f64;
    let expected = 100.0 * (count(&second) - count(&first)) / first.len() as f64;
    let difference = against["difference"].as_f64().unwrap();
    assert!((difference - expected).abs() < 1e-9, "{difference} {expected}");
    let interval = &against["difference_interval_95"];
    assert!(interval["low"].as_f64().unwrap() <= difference + 1e-9);
    assert!(interval["high"].as_f64().unwrap() >= difference - 1e-9);
    let only = |a: &[bool], b: &[bool]| a.iter().zip(b).filter(|(a, b)| **a && !**b).count() as u64;
    let p = attn_eval::stats::mcnemar(only(&second, &first), only(&first, &second));
    assert!((against["mcnemar_p"].as_f64().unwrap() - p).abs() < 1e-12);

    let summary = place.json("run-1/summary.json");
    let accuracy = 100.0 * summary["after"]["accuracy"].as_f64().unwrap();
    let table = place.done("compare run-0 run-1").stdout;
    assert!(table.contains(&format!("{accuracy:.1} (")), "{table}");
    for (format, sign) in [("csv", "run,accuracy"), ("markdown", "| --- |"), ("latex", "\\toprule")]
    {
        let table = place.done(&format!("compare run-0 run-1 --format {format}")).stdout;
        assert!(table.contains(sign), "{table}");
    }

    // Other rows have no test, and it is said.
    place.done("finetune tune.toml --set examples.report_limit=10 --out fewer");
    let table = place.done("compare run-0 fewer").stdout;
    assert!(table.contains("fewer: no test, they report on other rows"), "{table}");
    place.refused("compare run-0 nowhere", &["nowhere", "summary.json"]);
    place.write("x.json", "{\"a\": 1}");
    place.refused("compare x.json x.json", &["`x.json` holds no figure that runs are compared by"]);
}

#[test]
fn evaluations_are_tested_by_their_own_rows() {
    let place = Place::new();
    for (name, seed) in [("a", 0), ("b", 1)] {
        model_folder(&place, name, "gpt2", Head::LanguageModel);
        let random = format!("--init random --seed {seed}");
        place.write("text.txt", "the film was good\nthe plot was bad and the film long\nbad\n");
        let text = "--task text.txt --split train --max-len 32";
        place.done(&format!("eval --model {name} {text} {random} --out {name}.json"));
    }
    let rows = |name: &str| -> Vec<[f64; 2]> {
        let found = place.json(&format!("{name}.json"));
        let row = |row: &serde_json::Value| {
            [row["nats"].as_f64().unwrap(), row["n_tokens"].as_f64().unwrap()]
        };
        found["loss_by_row"].as_array().unwrap().iter().map(row).collect()
    };
    let (a, b) = (rows("a"), rows("b"));
    let sum = |rows: &[[f64; 2]], at: usize| rows.iter().map(|row| row[at]).sum::<f64>();
    let loss = place.json("a.json")["language"]["loss_nats_per_token"].as_f64().unwrap();
    assert!((sum(&a, 0) / sum(&a, 1) - loss).abs() < 1e-12, "the rows are what the loss is of");

    place.done("compare a.json b.json --format json --out both.json");
    let found = place.json("both.json");
    let against = &found["runs"][1]["against_first"];
    assert_eq!(against["of"], "loss", "{against}");
    let expected = (sum(&b, 0) - sum(&a, 0)) / sum(&a, 1);
    assert!((against["difference"].as_f64().unwrap() - expected).abs() < 1e-12, "{against}");
    assert!(expected.abs() > 1e-3);
    let table = place.done("compare a.json b.json").stdout;
    assert!(table.contains("less the first (nats per token)"), "{table}");
    assert!(table.contains(&format!("{expected:+.4} (")), "{table}");
    assert!(!table.contains("McNemar"), "{table}");

    // Other texts, or other cuts, are no pair.
    place.done("eval --model b --task text.txt --split train --max-len 8 --out cut.json");
    let table = place.done("compare a.json cut.json").stdout;
    assert!(table.contains("cut.json: no test, they differ in `max_len`"), "{table}");
}

#[test]
fn a_report_holds_runs_pictures_and_attention_and_runs_nothing_of_theirs() {
    let place = two_runs();
    let ran = place.shell(
        "attn heatmap --model run-0/model --text '<script>alert(1)</script> good' --grid --out a",
    );
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let ran = place.shell(
        "attn heatmap --model run-1/model --text '<script>alert(1)</script> good' --grid --out b",
    );
    assert_eq!(ran.code, 0, "{}", ran.stderr);

    let ran = place
        .done("report run-0 run-1 a/attention.json b/attention.json --title <b>Both --out r.html");

    assert_eq!(ran.stdout.trim(), "r.html");
    let page = String::from_utf8(place.bytes("r.html")).unwrap();
    assert!(page.starts_with("<!DOCTYPE html>") && page.contains("<h1>&lt;b&gt;Both</h1>"));
    assert!(!page.contains("<script>alert") && !page.contains("src=\"http"));
    for heading in
        ["run-0", "run-1", "a/attention.json", "b/attention.json", "Figures", "Attention"]
    {
        assert!(page.contains(&format!(">{heading}</h2>")), "{heading}");
    }
    let accuracy = 100.0 * place.json("run-1/summary.json")["after"]["accuracy"].as_f64().unwrap();
    assert!(page.contains(&format!("{accuracy:.1} (")), "the run's own figure");
    assert!(
        page.contains("batch_size") && page.contains("data:image/svg+xml;base64,"),
        "config and pictures"
    );
    assert!(page.len() < 5 << 20, "{} bytes", page.len());

    place.refused("report run-0 --out r.txt", &["r.txt", ".html"]);
    place.refused("report nowhere --out n.html", &["nowhere", "a run that has ended"]);
    assert!(!place.path("n.html").exists());
}
