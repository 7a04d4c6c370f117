//! Scores of heads, what leaving heads out costs, and models without them, as a user sees it.

mod common;

use attn_core::config::Head;
use common::{Place, model_folder, rows};
use serde_json::Value;

const ROWS: &str = "--task notes.txt --split train --max-len 24";

/// A folder with a language model `m` of two layers of four heads, and a text.
fn place(base: &str) -> Place {
    let place = Place::new();
    let lines: Vec<String> = rows(60).into_iter().map(|(text, _)| text).collect();
    place.write("notes.txt", &lines.join("\n"));
    model_folder(&place, "m", base, Head::LanguageModel);
    place
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap()
}

fn list(value: &Value) -> &Vec<Value> {
    value.as_array().unwrap()
}

#[test]
fn flags_come_from_a_file_and_what_is_typed_goes_before_them() {
    let place = place("gpt2");
    place.write(
        "flags.toml",
        "model = 'm'\ntask = 'notes.txt'\nsplit = 'train'\nmax_len = 24\nmethod = ['michel', 'fisher']\n\
         own_output = false\nout = 'file.json'\nlimit = 5\n",
    );
    place.done("score-heads --config flags.toml");
    place.done(&format!("score-heads --model m {ROWS} --limit 5 --method michel --out flags.json"));
    place.done("score-heads --config=flags.toml --limit=3 --out typed.json");
    let scores = |file: &str| place.json(file)["scores"].clone();
    assert_eq!(scores("file.michel.json"), scores("flags.json"));
    assert_ne!(scores("typed.michel.json"), scores("flags.json"));
    assert!(place.path("typed.fisher.json").exists());

    for (text, parts) in [
        (
            "modell = 'm'",
            ["cannot use `bad.toml`", "`modell` is no flag of `attn score-heads`", "hint:"],
        ),
        (
            "own_output = 'yes'",
            ["cannot use `bad.toml`", "`own_output` is", "expected true or false"],
        ),
        ("method = []", ["cannot use `bad.toml`", "`method` is empty", "hint:"]),
        ("set = [['a']]", ["cannot use `bad.toml`", "`set` holds", "a list of them"]),
        ("model = ", ["cannot use `bad.toml`", "line 1", "model"]),
    ] {
        place.write("bad.toml", text);
        place.refused("score-heads --config bad.toml", &parts);
    }
    place.refused("score-heads --config none.toml", &["cannot use `none.toml`"]);
}

/// The loss of a model on the rows.
fn loss(place: &Place, model: &str) -> f64 {
    place.done(&format!("eval --model {model} {ROWS} --out eval.json"));
    number(&place.json("eval.json")["language"]["loss_nats_per_token"])
}

fn entry<'a>(report: &'a Value, without: &str) -> &'a Value {
    list(&report["ablations"]).iter().find(|one| one["without"] == without).unwrap()
}

#[test]
fn what_ablation_says_a_head_costs_is_what_its_removal_costs() {
    for base in ["gpt2", "llama"] {
        let place = place(base);
        // One row: means over rows and over tokens are then the same.
        let one = "--limit 1 --by-text";
        place.done(&format!("ablate --model m {ROWS} {one} --out a.json"));
        place.done(&format!("ablate --model m {ROWS} {one} --groups --out g.json"));
        let (heads, groups) = (place.json("a.json"), place.json("g.json"));
        assert_eq!(
            (&heads["unit"], &groups["unit"]),
            (&"query_head".into(), &"key_value_group".into())
        );
        let measure = |model: &str| {
            place.done(&format!("eval --model {model} {ROWS} {one} --out eval.json"));
            number(&place.json("eval.json")["language"]["loss_nats_per_token"])
        };
        let whole = measure("m");
        for (report, without) in [(&heads, "0-1"), (&heads, "1-3"), (&groups, "1-g0")] {
            let out = format!("without-{without}");
            let ran = place.done(&format!("prune --model m --heads {without} --out {out}"));
            assert!(ran.stdout.contains("transformers"), "{}", ran.stdout);
            let rise = measure(&out) - whole;
            let found = number(&entry(report, without)["loss"]["value"]);
            assert!(
                (rise - found).abs() < 1e-5,
                "{base} without {without}: {rise} against {found}"
            );
        }
    }
}

#[test]
fn removed_heads_are_gone_from_the_matrices_and_zeros_stand_in_the_full_shape() {
    let place = place("llama"); // two query heads a key/value head
    let all = number(&place.json("m/config.json")["num_attention_heads"]) as i64;
    assert_eq!(all, 4);
    let whole = loss(&place, "m");

    place.done("prune --model m --heads 0-g1,1-g1 --out a");
    place.done("prune --model m --heads 0-g1,1-g1 --full-shape --out b");
    place.done("prune --model m --heads 0-0,0-1,0-2,0-3 --out none");

    let said = place.json("a/pruning.json");
    assert_eq!(said["removed"], serde_json::json!(["0-2", "0-3", "1-2", "1-3"]));
    assert_eq!(said["loads_in_transformers"], "yes");
    let config = place.json("a/config.json");
    assert_eq!(
        (&config["model_type"], &config["num_attention_heads"]),
        (&"llama".into(), &2.into())
    );
    assert_eq!(config["num_key_value_heads"], 1);
    assert!(number(&said["parameters_after"]) < number(&said["parameters_before"]));
    assert!(number(&said["removed_against_masked"]) < 1e-5);
    let full = place.json("b/pruning.json");
    assert_eq!(full["loads_in_transformers"], "full_shape");
    assert_eq!(full["parameters_after"], full["parameters_before"]);
    let (a, b) = (loss(&place, "a"), loss(&place, "b"));
    assert!((a - b).abs() < 1e-5 && (a - whole).abs() > 1e-4, "{a} {b} {whole}");
    // A layer with none left, the other as it was.
    let none = place.json("none/pruning.json");
    assert_eq!(none["heads_after"], serde_json::json!([0, 4]));
    assert_eq!(none["loads_in_transformers"], "no");
    assert!(loss(&place, "none").is_finite());
    // What is left can lose more, by its own numbers.
    place.done("prune --model none --heads 1-2 --out fewer");
    place.refused("prune --model fewer --heads 1-2 --out x", &["1-2", "[0, 1, 3]"]);
}

#[test]
fn transformers_loads_what_the_report_says_it_loads() {
    let test = "transformers_loads_what_the_report_says_it_loads";
    let Some(python) = common::python(test, "transformers, torch, safetensors") else { return };
    for (base, how, class) in [
        ("llama", "--heads 0-0,1-3", "refused"),
        ("llama", "--heads 0-g1,1-g0", "AutoModelForCausalLM"),
        ("gpt2", "--heads 0-1,1-0,1-1 --full-shape", "AutoModelForCausalLM"),
        ("distilbert", "--heads 0-1,1-0 --full-shape", "AutoModelForMaskedLM"),
        ("gpt2", "--heads 0-1", "refused"),
    ] {
        let place = place(base);
        place.done(&format!("prune --model m {how} --out cut"));
        place.write("ids.json", r#"{"input_ids": [[4, 9, 3, 11, 5, 4], [7, 7, 2, 6, 12, 8]]}"#);
        place.done("forward --model cut --input-ids ids.json --out out.safetensors");
        let script = format!(
            "import sys, json, torch, transformers\nfrom safetensors.torch import load_file\n\
             ids = torch.tensor(json.load(open('ids.json'))['input_ids'])\n\
             try:\n    model = transformers.{}.from_pretrained('cut').eval()\nexcept (KeyError, ValueError):\n    print('refused'); sys.exit()\n\
             ours = load_file('out.safetensors')['logits']\nwith torch.no_grad():\n    theirs = model(ids).logits\n\
             print(((ours - theirs).pow(2).mean() / theirs.pow(2).mean()).sqrt().item())\n",
            if class == "refused" { "AutoModelForCausalLM" } else { class }
        );
        place.write("compare.py", &script);
        let ran = std::process::Command::new(&python)
            .arg("compare.py")
            .current_dir(place.path(""))
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&ran.stdout).trim().to_owned();
        let shown = String::from_utf8_lossy(&ran.stderr);
        match class {
            "refused" => assert_eq!(said, "refused", "{base} {how}: {shown}"),
            _ => assert!(said.parse::<f64>().unwrap() < 1e-5, "{base} {how}: {said} {shown}"),
        }
    }
}

#[test]
fn several_methods_go_to_a_file_each_and_agree_with_one_alone() {
    let place = place("gpt2");
    place.done(&format!("score-heads --model m {ROWS} --method michel,fisher,leave_one_out --out s.json --table s.parquet"));
    place.done(&format!("score-heads --model m {ROWS} --method fisher --out one.json"));
    let (many, one) = (place.json("s.fisher.json"), place.json("one.json"));
    assert_eq!((&many["scores"], &many["method"]), (&one["scores"], &"fisher".into()));
    assert!(place.path("s.leave_one_out.parquet").exists() && !place.path("s.json").exists());

    // Without labels; and step by step, each head once.
    place.done(&format!(
        "score-heads --model m {ROWS} --own-output --method leave_one_out --out kl.json"
    ));
    let kl = place.json("kl.json");
    assert_eq!(kl["loss"], "own_output");
    let all: Vec<f64> = list(&kl["scores"]).iter().flat_map(list).map(number).collect();
    assert!(all.iter().all(|&score| score > 0.0), "a divergence is positive: {all:?}");
    place.done(&format!("score-heads --model m {ROWS} --iterative 0.25 --out steps.json"));
    let mut steps: Vec<f64> =
        list(&place.json("steps.json")["scores"]).iter().flat_map(list).map(number).collect();
    steps.sort_by(f64::total_cmp);
    assert_eq!(steps, [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5], "two of eight heads at a step");

    let ran = place.done("compare-scores s.fisher.json one.json kl.json --out agreement.json");
    assert!(ran.stdout.contains("spearman"), "{}", ran.stdout);
    let agreement = place.json("agreement.json");
    let of = |a: i64, b: i64| {
        let found =
            list(&agreement["pairs"]).iter().find(|one| one["files"] == serde_json::json!([a, b]));
        number(&found.unwrap()["spearman"]["value"])
    };
    assert!(of(0, 1) == 1.0 && of(0, 2) < 1.0);
}

#[test]
fn the_curve_ends_where_every_choice_is_the_same_and_begins_with_single_heads() {
    let place = place("gpt2");
    place.done(&format!("score-heads --model m {ROWS} --out s.json"));
    place.done(&format!("ablate --model m {ROWS} --out a.json"));
    let ran = place
        .done(&format!("prune-curve --model m --scores s.json {ROWS} --out c.json --plot c.png"));
    assert!(ran.stdout.contains("bottom first"), "{}", ran.stdout);
    let (scores, curve, ablation) =
        (place.json("s.json"), place.json("c.json"), place.json("a.json"));
    let points = list(&curve["points"]);
    assert_eq!(points.len(), 8);
    // All heads gone: no choice is left.
    let last = &points[7];
    let [top, bottom] = [0, 1].map(|at| number(&last["by_score"][at]["loss"]));
    let random = list(&last["random"]["loss"]).iter().map(number).collect::<Vec<_>>();
    assert!((top - bottom).abs() < 1e-9 && random.iter().all(|loss| (loss - top).abs() < 1e-9));
    // One head gone: the best by its score, and what ablation says of it.
    let best = (0..8)
        .max_by(|&a, &b| {
            let score = |at: usize| number(&scores["scores"][at / 4][at % 4]);
            score(a).total_cmp(&score(b))
        })
        .unwrap();
    let first = &points[0]["by_score"][0];
    assert_eq!(first["heads"], serde_json::json!([{"layer": best / 4, "place": best % 4}]));
    let single = entry(&ablation, &format!("{}-{}", best / 4, best % 4));
    assert!(
        (number(&first["effect"]["loss"]["value"]) - number(&single["loss"]["value"])).abs() < 1e-6
    );
    assert_eq!(points[0]["random"]["n_draws"], 20);
    assert!(place.path("c.png").exists());
}

#[test]
fn fitted_projections_are_nearer_to_the_model_as_it_was() {
    let place = place("gpt2");
    place.done(&format!("score-heads --model m {ROWS} --out s.json"));
    let cut = "prune --model m --scores s.json --remove 1 --per layer";
    place.done(&format!("{cut} --out cut"));
    let ran = place.done(&format!("{cut} --refit notes.txt --out fitted"));
    assert!(ran.stdout.contains("layer 0 fitted to"), "{}", ran.stdout);
    let against = |model: &str| {
        place.done(&format!("eval --model {model} --against m {ROWS} --out kl.json"));
        number(&place.json("kl.json")["divergence"]["kl_nats_per_token"])
    };
    let (plain, fitted) = (against("cut"), against("fitted"));
    assert!(fitted < plain, "{fitted} {plain}");
    for layer in list(&place.json("fitted/pruning.json")["refitted"]) {
        assert!(number(&layer["error_after"]) < number(&layer["error_before"]), "{layer}");
    }
    // Fewer operations than asked for, and no fewer heads than it takes.
    place.done("prune --model m --scores s.json --target flops=0.6 --latency-of 1,24 --out half");
    let half = place.json("half/pruning.json");
    let reached = number(&half["target"]["reached"]);
    assert!(reached <= 0.6 && list(&half["removed"]).len() == 4, "{half}");
    // What is timed is a median of turns, with its interval: how fast this machine is, is not asked here.
    let ran = place.done("prune --model m --which random --target latency=0.999 --out fast");
    let fast = place.json("fast/pruning.json");
    let [reached, low, high] = [
        &fast["target"]["reached"],
        &fast["target"]["reached_interval_95"]["low"],
        &fast["target"]["reached_interval_95"]["high"],
    ]
    .map(number);
    assert!(low <= reached && reached <= high, "{fast}");
    assert!(ran.stdout.contains("95 %"), "{}", ran.stdout);
}

#[test]
fn random_heads_need_no_scores() {
    let place = place("llama");
    let removed = |seed: u64| {
        let out = format!("r{seed}");
        place.done(&format!("prune --model m --which random --remove 3 --seed {seed} --out {out}"));
        list(&place.json(&format!("{out}/pruning.json"))["removed"]).to_vec()
    };
    let drawn: Vec<_> = (0..6).map(removed).collect();
    assert!(drawn.iter().all(|heads| heads.len() == 3), "{drawn:?}");
    assert!(drawn.iter().any(|heads| *heads != drawn[0]), "another seed, other heads");
    let ran = place.done("prune --model m --which random --remove 8 --out none");
    assert!(ran.stderr.contains("no layer has a head left"), "{}", ran.stderr);
}

#[test]
fn what_cannot_be_is_refused_by_name_and_nothing_is_written() {
    let place = place("gpt2");
    place.done(&format!("score-heads --model m {ROWS} --out s.json"));
    model_folder(&place, "other", "llama", Head::LanguageModel);
    place.done("prune --model m --heads 0-0 --out cut");
    place.write("few.txt", "a b");
    for (arguments, parts) in [
        ("prune --model m --heads 5-0 --out x", ["5-0", "no layer 5"]),
        ("prune --model m --heads 0-9 --out x", ["0-9", "[0, 1, 2, 3]"]),
        ("prune --model m --remove 2 --out x", ["go by scores", "hint: --scores"]),
        ("prune --model m --heads nine --out x", ["nine", "hint: write LAYER-HEAD"]),
        ("prune --model m --scores s.json --remove 9 --out x", ["9 heads", "has 8"]),
        ("prune --model m --scores s.json --remove 5 --per layer --out x", ["5 heads", "layer 0"]),
        ("prune --model m --scores s.json --remove 0 --out x", ["no head is to go", "nothing"]),
        ("prune --model cut --scores s.json --remove 1 --out x", ["s.json", "this very model"]),
        (
            "prune --model m --scores m/config.json --remove 1 --out x",
            ["config.json", "score-heads"],
        ),
        (
            "prune --model m --scores s.json --target params=0.01 --out x",
            ["params=0.01", "cannot be met"],
        ),
        ("prune --model m --scores s.json --target weight=0.5 --out x", ["weight", "hint: write"]),
        (
            "prune --model m --heads 0-1 --refit few.txt --out x",
            ["unknowns", "hint: give more text"],
        ),
        (
            "prune-curve --model m --scores s.json --task notes.txt --split train --draws 3 --out x",
            ["--draws", "20"],
        ),
        (
            "prune-curve --model m --scores s.json --task notes.txt --split train --remove 9 --out x",
            ["9", "8 heads"],
        ),
        ("ablate --model m --task notes.txt --split train --pairs 9 --out x", ["9", "there are 8"]),
        (
            "score-heads --model m --task notes.txt --split train --iterative 2 --out x",
            ["--iterative", "at most 1"],
        ),
        ("compare-scores s.json nowhere.json --out x", ["nowhere.json", "cannot read"]),
    ] {
        place.refused(arguments, &parts);
        assert!(!place.path("x").exists(), "{arguments}");
    }
}
