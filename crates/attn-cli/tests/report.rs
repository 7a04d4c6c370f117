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

    assert_eq!(&place.bytes("both.png")[1..4], b"PNG");
    place.done("plot both.json --svg --out drawn.svg");
    let svg = String::from_utf8(place.bytes("drawn.svg")).unwrap();
    assert!(svg.contains("Against run-0") && svg.contains("points"), "{svg}");

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
        let text = "the film was good\nthe plot was bad and the film long\nbad\n".repeat(12);
        place.write("text.txt", &text);
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

    // The same rows in another order, of as many tokens, and what does not say which tokens they are.
    let evaluated = |name: &str| {
        place.done(&format!(
            "eval --model b --task text.txt --split train --max-len 32 --out {name}"
        ));
    };
    place.write("text.txt", "the film was good\nthe plot was bad\nthe film was long\n");
    evaluated("in-order.json");
    place.write("text.txt", "the plot was bad\nthe film was long\nthe film was good\n");
    evaluated("reordered.json");
    evaluated("again.json");
    let table = place.done("compare in-order.json reordered.json").stdout;
    assert!(table.contains("reordered.json: no test, their rows hold other tokens"), "{table}");
    let table = place.done("compare reordered.json again.json").stdout;
    assert!(table.contains("+0.0000"), "{table}");
    let mut old = place.json("again.json");
    for row in old["loss_by_row"].as_array_mut().unwrap() {
        row.as_object_mut().unwrap().remove("tokens");
    }
    place.write("old.json", &old.to_string());
    let table = place.done("compare reordered.json old.json").stdout;
    assert!(table.contains("`old.json` does not say which tokens its rows hold"), "{table}");
    old["loss_by_row"] = serde_json::json!([]);
    place.write("empty.json", &old.to_string());
    let table = place.done("compare empty.json empty.json").stdout;
    assert!(table.contains("no test, `empty.json` has no rows"), "{table}");
}

/// An attention file of layers that are given by what attends and what is attended to.
fn attention(model: &str, measure: &str, layers: &[(&[&str], &[&str], &str)]) -> String {
    let layer = |(at, (rows, columns, note)): (usize, &(&[&str], &[&str], &str))| {
        let weights = vec![vec![1.0 / columns.len() as f64; columns.len()]; rows.len()];
        serde_json::json!({
            "layer": at, "kind": "softmax", "note": note, "rows": rows, "columns": columns,
            "heads": ["mean"], "weights": [weights],
        })
    };
    let layers: Vec<_> = layers.iter().enumerate().map(layer).collect();
    serde_json::json!({
        "schema": 1, "model": model, "measure": measure, "unit": "weight", "layers": layers,
    })
    .to_string()
}

/// What the attention viewer of a page is given.
fn viewer(page: &str) -> serde_json::Value {
    let start = "<script type=\"application/json\">";
    let from = page.find(start).expect("a viewer") + start.len();
    serde_json::from_str(&page[from..from + page[from..].find("</script>").unwrap()]).unwrap()
}

#[test]
fn attention_is_shown_together_where_it_is_of_the_same_texts() {
    let place = Place::new();
    let (one, other) = (&["a", "b"][..], &["p", "q", "r"][..]);
    place.write("a.json", &attention("m", "weights", &[(one, one, "own note"), (one, other, "")]));
    place.write("b.json", &attention("n", "weights", &[(one, one, "another"), (one, other, "")]));
    place.write("c.json", &attention("n", "norms", &[(one, one, "")]));
    place.write("d.json", &attention("m", "weights", &[(one, &["x", "y"], "")]));
    place.done("report a.json b.json c.json d.json --out r.html");

    let found = viewer(&place.read("r.html"));
    let samples: Vec<(String, Vec<String>, Vec<String>)> = found["samples"]
        .as_array()
        .unwrap()
        .iter()
        .map(|sample| {
            let models = sample["models"].as_array().unwrap();
            let text = |it: &serde_json::Value| it.as_str().unwrap().to_owned();
            let layers = models[0]["layers"].as_array().unwrap();
            (
                text(&sample["name"]),
                models.iter().map(|it| text(&it["name"])).collect(),
                layers.iter().map(|it| text(&it["name"])).collect(),
            )
        })
        .collect();
    let expected = [
        ("a b (weights)", vec!["m", "n"], "layer 0"),
        ("a b \u{2192} p q r (weights)", vec!["m", "n"], "layer 1"),
        ("a b (norms)", vec!["n"], "layer 0"),
        ("a b \u{2192} x y (weights)", vec!["m"], "layer 0"),
    ];
    let expected = expected.map(|(name, models, layer)| {
        let models = models.into_iter().map(ToOwned::to_owned).collect();
        (name.to_owned(), models, vec![layer.to_owned()])
    });
    assert_eq!(samples, expected);
    let notes = &found["samples"][0]["models"];
    assert_eq!(notes[0]["layers"][0]["note"], "own note");
    assert_eq!(notes[1]["layers"][0]["note"], "another");
    let page = place.read("r.html");
    assert!(page.contains("notesOf(models)"), "the page shows the notes of both");
    assert!(page.contains("their numbers stand in the result&#39;s file"), "self and cross");

    // A table of too many numbers is left out with a word.
    let names: Vec<String> = (0..150).map(|i| format!("t{i}")).collect();
    let names: Vec<&str> = names.iter().map(|it| &it[..]).collect();
    place.write("long.json", &attention("m", "weights", &[(&names, &names, "")]));
    place.done("report long.json --out long.html");
    let page = place.read("long.html");
    assert!(page.contains("Its maps are in the viewer above"), "and so is the picture");
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

#[test]
fn a_folder_is_reported_with_all_that_is_in_it_and_what_shows_nothing_is_named() {
    let place = two_runs();
    std::fs::create_dir_all(place.path("all/of/sweep")).unwrap();
    let results = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../results");
    for (from, to) in [
        ("2026-11-21-sst2/sweep.json", "all/of/sweep/sweep.json"),
        ("2026-11-22-patch/bracket-position.json", "all/of/bracket.json"),
    ] {
        std::fs::copy(results.join(from), place.path(to)).unwrap();
    }
    std::fs::rename(place.path("run-0"), place.path("all/run-0")).unwrap();
    place.write("all/junk.json", "{\"a\": 1}");

    let ran = place.done("report all --out new/r.html");

    assert!(
        ran.stderr.contains("nothing that a report shows is in all/junk.json"),
        "{}",
        ran.stderr
    );
    let page = place.read("new/r.html");
    for heading in ["run-0", "bracket.json", "sweep.json", "Left out"] {
        assert!(page.contains(&format!(">{heading}</h2>")), "{heading}");
    }
    // A setting of the sweep, and its mean over seeds.
    assert!(page.contains("79.4 ± 1.0") && page.contains("model=wikitext-mlm,weights=saved"));
    assert!(!page.contains(">predictions"), "what a run keeps is told with it");

    place.refused(
        "report all/junk.json --out j.html",
        &["`all/junk.json` holds nothing that a report shows", "results/SCHEMA.md"],
    );
    place.write("none/notes.txt", "a");
    place.refused("report none --out j.html", &["there is no run or result in `none`"]);
    assert!(!place.path("j.html").exists());
}
