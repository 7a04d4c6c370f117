//! `attn convert`.

mod common;

use attn_core::{LoadOptions, Model, checkpoint::WriteOptions, config::Head};
use common::{Place, model_folder};

const ROWS: &str = "--task notes.txt --split train --max-len 24";

fn place(base: &str) -> Place {
    let place = Place::new();
    model_folder(&place, "m", base, Head::LanguageModel);
    let lines: Vec<String> = common::rows(40).into_iter().map(|(text, _)| text).collect();
    place.write("notes.txt", &lines.join("\n"));
    place
}

#[test]
fn a_converted_folder_is_a_model_like_any_other() {
    for base in ["gpt2", "llama", "distilbert"] {
        let place = place(base);
        let ran = place.done("convert --model m --kv-heads 1 --layers 1 --method mean --out one");
        assert!(ran.stdout.contains("key/value heads by layer"), "{}", ran.stdout);
        let report = place.json("one/conversion.json");
        let heads =
            |name: &str| -> Vec<i64> { serde_json::from_value(report[name].clone()).unwrap() };
        let (before, after) = (heads("kv_heads_before"), heads("kv_heads_after"));
        assert_eq!(after, [before[0], 1]);
        let bytes = |name: &str| report[name].as_i64().unwrap();
        assert_eq!(
            bytes("cache_bytes_per_token_after") * before.iter().sum::<i64>(),
            bytes("cache_bytes_per_token_before") * after.iter().sum::<i64>(),
            "bytes go with heads"
        );
        assert_eq!(report["loads_in_transformers"], false);
        place.done(&format!("eval --model one {ROWS} --against m --out kl.json"));
        let kl = place.json("kl.json")["divergence"]["kl_nats_per_token"].as_f64().unwrap();
        assert!(kl > 1e-6, "{base}: {kl}");
        if base != "distilbert" {
            place.done("generate --model one --max-new-tokens 3 the");
        }
    }
}

#[test]
fn more_heads_compute_what_there_was_and_a_whole_llama_stays_ordinary() {
    let place = place("llama");
    let ran = place.done("convert --model m --kv-heads 4 --refit --out more");
    assert!(ran.stdout.contains("not compared"), "copies need no text: {}", ran.stdout);
    assert_eq!(place.json("more/conversion.json")["loads_in_transformers"], true);
    assert_eq!(place.json("more/config.json")["num_key_value_heads"], 4);
    assert_eq!(place.json("more/config.json")["model_type"], "llama");
    place.done(&format!("eval --model more {ROWS} --against m --dtype f64 --out kl.json"));
    let kl = place.json("kl.json")["divergence"]["kl_nats_per_token"].as_f64().unwrap();
    assert!(kl.abs() < 1e-12, "{kl}");
}

#[test]
fn every_method_is_compared_on_blocks_set_apart() {
    for base in ["gpt2", "llama", "distilbert"] {
        let place = place(base);
        let flags = "--calibration notes.txt --max-len 24 --test-tokens 200 --refit --compare";
        let ran = place.done(&format!("convert --model m --kv-heads 1 {flags} --out c"));
        let report = place.json("c/conversion.json");
        let compared = report["compared"].as_array().unwrap();
        // Where positions turn keys there is no code of them, and it is said.
        let n_methods = if base == "llama" { 6 } else { 7 };
        assert_eq!(compared.len(), 2 * n_methods, "{base}: each with and without a fit");
        assert_eq!(ran.stderr.contains("`latent` is left out"), base == "llama", "{}", ran.stderr);
        let kl = |of: &serde_json::Value| of["kl_nats_per_token"].as_f64().unwrap();
        let of = |method: &str, refit: bool| {
            let is = |one: &&serde_json::Value| {
                (one["method"] == method || one["method"].get(method).is_some())
                    && one["refit"] == refit
            };
            compared.iter().find(is).unwrap()
        };
        // The model that is written, again.
        assert_eq!(kl(of("low_rank", true)), kl(&report["measured"]), "{base}");
        assert_eq!(of("low_rank", true)["kl_more"], 0.0);
        let more = &of("mean", false)["kl_more_interval_95"];
        let apart = kl(of("mean", false)) - kl(&report["measured"]);
        let range = |at: &str| more[at].as_f64().unwrap();
        assert!(range("low") <= apart && apart <= range("high"), "{base} {more} {apart}");
        let n_kv = report["kv_heads_before"][0].as_i64().unwrap();
        for layer in report["merged"].as_array().unwrap() {
            assert_eq!(layer["groups"][0].as_array().unwrap().len() as i64, n_kv);
        }
        assert_eq!(report["refitted"].as_array().unwrap().len(), 2);
        assert_eq!(report["sensitivity"].as_array().unwrap().len(), 2);
        for said in
            ["low_rank     yes", "similarity   no", "layer 1 alone", "fitted to", "set apart"]
        {
            assert!(ran.stdout.contains(said), "{base}: {said} in {}", ran.stdout);
        }
        // What was compared is what the folder is.
        let text = &report["text"];
        let n = |name: &str| text[name].as_i64().unwrap();
        assert!(n("n_test_tokens") <= 200 && n("n_test_tokens") < n("n_tokens"), "{text}");
        let again = place.done(
            "convert --model m --kv-heads 1 --calibration notes.txt --max-len 24 --test-tokens 200 --seed 1 --out d",
        );
        assert!(!again.stdout.contains("fitted"), "{}", again.stdout);
        let other = place.json("d/conversion.json");
        assert_eq!(other["text"]["n_test_tokens"], text["n_test_tokens"]);
        assert_eq!(
            other["measured"]["perplexity_before"], report["measured"]["perplexity_before"],
            "the same blocks"
        );
    }
}

/// 24 channels of hidden states, and of two heads' keys and values.
#[test]
fn a_code_is_written_read_expanded_and_tuned() {
    let place = place("gpt2");
    let text = "--calibration notes.txt --max-len 24";
    place.done(&format!("convert --model m --kv-heads 2 --method latent {text} --out coded"));
    let report = place.json("coded/conversion.json");
    assert_eq!(report["method"], "latent");
    assert_eq!(report["loads_in_transformers"], false);
    let bytes = |name: &str| report[name].as_u64().unwrap();
    assert_eq!(2 * bytes("cache_bytes_per_token_after"), bytes("cache_bytes_per_token_before"));
    assert_eq!(place.json("coded/config.json")["attn"]["layers"][1]["kind"], "latent");
    let against = |model: &str| {
        place.done(&format!("eval --model {model} {ROWS} --against m --out kl.json"));
        place.json("kl.json")["divergence"]["kl_nats_per_token"].as_f64().unwrap()
    };
    assert!(against("coded").abs() < 1e-6);
    assert_eq!(
        place.done("generate --model coded --max-new-tokens 4 the").stdout,
        place.done("generate --model m --max-new-tokens 4 the").stdout
    );
    // Of a model that is coded, or coded and written out at once.
    place.done("convert --model coded --kv-heads 2 --as expanded --out full");
    place.done(&format!(
        "convert --model m --kv-heads 1 --method latent {text} --as expanded --out one"
    ));
    place.done(&format!("convert --model m --kv-heads 1 --method latent {text} --out twin"));
    let twin = against("twin");
    for (model, expected) in [("full", 0.0), ("one", twin)] {
        assert_eq!(place.json(&format!("{model}/conversion.json"))["loads_in_transformers"], true);
        assert_eq!(place.json(&format!("{model}/config.json"))["model_type"], "gpt2");
        assert!((against(model) - expected).abs() < 1e-6, "{model}");
    }
    let lost = place.json("one/conversion.json")["measured"]["kl_nats_per_token"].as_f64().unwrap();
    assert!(lost > 1e-6, "{lost}");
    for (flags, said) in [
        ("--method latent --as multi-query", ["--as multi-query", "--as expanded"]),
        ("--method latent --as merging", ["cannot use `--as merging`", "then distill"]),
    ] {
        place.refused(&format!("convert --model m --kv-heads 1 {flags} --out x"), &said);
    }
    model_folder(&place, "turned", "llama", Head::LanguageModel);
    place.refused(
        &format!("convert --model turned --kv-heads 1 --method latent {text} --out x"),
        &["cannot use `--kv-heads` with `--method latent`", "positions turn", "low_rank"],
    );
    place.refused(
        &format!("convert --model coded --kv-heads 1 {text} --out x"),
        &["made narrower", "by fewer"],
    );
}

#[test]
fn a_budget_is_met_by_a_number_of_heads_for_each_layer() {
    let place = place("gpt2");
    place.done("convert --model m --cache 60% --calibration notes.txt --max-len 24 --method first --out half");
    let report = place.json("half/conversion.json");
    let number = |name: &str| report[name].as_u64().unwrap();
    assert_eq!(number("budget_bytes"), number("cache_bytes_per_token_before") * 6 / 10);
    assert!(number("cache_bytes_per_token_after") <= number("budget_bytes"));
    // The choice, by hand: each layer 4, 2 or 1 of four heads, at most 4.8 together.
    let layers = report["sensitivity"].as_array().unwrap();
    let kl = |layer: usize, n: i64| {
        let tried = layers[layer]["tried"].as_array().unwrap();
        let one = tried.iter().find(|one| one["n_kv_heads"] == n).unwrap();
        one["kl_nats_per_token"].as_f64().unwrap()
    };
    let pairs = [(1, 1), (1, 2), (2, 1), (2, 2)];
    let least = pairs
        .into_iter()
        .min_by(|a, b| (kl(0, a.0) + kl(1, a.1)).total_cmp(&(kl(0, b.0) + kl(1, b.1))));
    let after: Vec<i64> = serde_json::from_value(report["kv_heads_after"].clone()).unwrap();
    assert_eq!((after[0], after[1]), least.unwrap());
    place.refused("convert --model m --cache 0% --out x", &["--cache", "more than 0"]);
    place.refused("convert --model m --cache 100% --out x", &["--cache", "expected less"]);
    place.refused("convert --model m --cache much --out x", &["--cache", "50%"]);
    place.refused(
        "convert --model m --cache 1 --calibration notes.txt --max-len 24 --out x",
        &["--cache", "bytes"],
    );
}

/// Of flags in a file those give way that cannot stand beside what was typed, whichever side says so.
#[test]
fn a_number_that_is_typed_takes_the_place_of_a_budget_in_a_file() {
    let place = place("gpt2");
    place.write("half.toml", "model = 'm'\ncache = '50%'\nmethod = 'first'\n");
    place.done("convert --config half.toml --kv-heads 2 --out two");
    assert_eq!(place.json("two/conversion.json")["kv_heads_after"], serde_json::json!([2, 2]));
}

#[test]
fn folders_are_written_in_the_form_that_is_asked_for() {
    let place = place("gpt2");
    let text = "--calibration notes.txt --max-len 24";
    place.done(&format!("convert --model m --kv-heads 2 {text} --as expanded --out whole"));
    assert_eq!(place.json("whole/config.json")["model_type"], "gpt2");
    place.done(&format!("convert --model m --kv-heads 2 {text} --out small"));
    place.done(&format!("eval --model whole {ROWS} --against small --dtype f64 --out kl.json"));
    let kl = place.json("kl.json")["divergence"]["kl_nats_per_token"].as_f64().unwrap();
    assert!(kl.abs() < 1e-12, "{kl}");
    place.done(&format!("convert --model m --kv-heads 1 {text} --as multi-query --out mq"));
    let config = place.json("mq/config.json");
    assert_eq!(
        (config["model_type"].as_str(), config["multi_query"].as_bool()),
        (Some("gpt_bigcode"), Some(true))
    );
    assert!(config.get("attn").is_none() && config["architectures"][0] == "GPTBigCodeForCausalLM");
    place.refused(
        "convert --model m --kv-heads 2 --as multi-query --out x",
        &["multi-query", "layer 0"],
    );
    let llama = Place::new();
    model_folder(&llama, "m", "llama", Head::LanguageModel);
    llama.refused(
        "convert --model m --kv-heads 1 --as multi-query --out x",
        &["multi-query", "is a llama"],
    );
}

#[test]
fn a_classifier_reads_text_with_and_without_labels() {
    for base in ["gpt2", "distilbert"] {
        let place = place(base);
        model_folder(&place, "k", base, Head::Classifier { n_classes: 2 });
        let rows: Vec<String> = common::rows(40)
            .into_iter()
            .map(|(text, label)| format!("\"{text}\",{label}"))
            .collect();
        place.write("rows.csv", &format!("text,label\n{}", rows.join("\n")));
        for text in ["notes.txt", "rows.csv --set data.text=text --set data.label=label"] {
            let flags = format!("--calibration {text} --max-len 24");
            let ran = place
                .done(&format!("convert --model k --kv-heads 1 --refit {flags} --force --out c"));
            assert!(ran.stdout.contains("not compared"), "{}", ran.stdout);
            assert_eq!(place.json("c/conversion.json")["refitted"].as_array().unwrap().len(), 2);
        }
        for flag in ["--kv-heads 1 --compare", "--cache 50%"] {
            let of = format!("convert --model k {flag} --calibration notes.txt --out x");
            place.refused(&of, &["compares predictions of tokens", "--kv-heads"]);
        }
    }
}

/// Heads 0 and 2 are the same, and 1 and 3: query heads change places, and every command goes on by number.
#[test]
fn masks_and_scores_mean_the_heads_that_they_meant() {
    let place = place("gpt2");
    let options = LoadOptions::default();
    let (model, _) = Model::load(&place.path("m"), &options).unwrap();
    for layer in model.layers() {
        let d = layer.dims().head_dim;
        let projections = layer.projections();
        for (weight, bias) in [&projections.k, &projections.v] {
            for of in [Some(weight), bias.as_ref()].into_iter().flatten() {
                tch::no_grad(|| of.narrow(0, 2 * d, 2 * d).copy_(&of.narrow(0, 0, 2 * d)));
            }
        }
    }
    model.save(&place.path("m"), &WriteOptions::default()).unwrap();
    place.done("convert --model m --kv-heads 2 --calibration notes.txt --max-len 24 --method similarity --out c");
    assert_eq!(
        place.json("c/config.json")["attn"]["layers"][1]["kept_heads"],
        serde_json::json!([0, 2, 1, 3])
    );
    place.write("ids.json", r#"{"input_ids": [[5, 6, 7, 8, 9]]}"#);
    place.write("mask.json", r#"{"mask": [[1, 0, 1, 1], [1, 1, 1, 0]]}"#);
    let forward = |model: &str| {
        place.done(&format!(
            "forward --model {model} --input-ids ids.json --head-mask mask.json --attentions --out {model}.safetensors"
        ));
        let path = place.path(&format!("{model}.safetensors"));
        let tensors = tch::Tensor::read_safetensors(path).unwrap();
        tensors.into_iter().collect::<std::collections::HashMap<_, _>>()
    };
    let (before, after) = (forward("m"), forward("c"));
    assert_eq!(before.len(), 3);
    for (name, before) in &before {
        let apart = (before - &after[name]).abs().max().double_value(&[]);
        assert!(apart < 1e-5, "{name}: {apart}");
    }
    for of in ["m", "c"] {
        let rows = "--task notes.txt --split train --max-len 24";
        place.done(&format!("score-heads --model {of} {rows} --out {of}.scores.json"));
    }
    place.done("compare-scores m.scores.json c.scores.json --out agree.json");
    let agree = place.json("agree.json")["pairs"][0]["spearman"]["value"].as_f64();
    assert!(agree.is_some_and(|rho| rho > 0.99), "{}", place.json("agree.json"));
    place.done("prune --model c --scores m.scores.json --remove 2 --out p");
    let (one, other) = (place.json("m.scores.json"), place.json("c.scores.json"));
    assert_ne!(one["heads"], other["heads"]);
    place.done("prune --model m --scores m.scores.json --remove 2 --out q");
    assert_eq!(place.json("p/pruning.json")["removed"], place.json("q/pruning.json")["removed"]);
}

#[test]
fn a_folder_is_replaced_by_force_alone_and_as_a_whole() {
    let place = place("gpt2");
    place.done("convert --model m --kv-heads 2 --method mean --out c");
    place.write("c/notes.md", "mine");
    let two = "convert --model m --kv-heads 1 --out c";
    place.refused(two, &["is there already"]);
    assert_eq!(place.json("c/conversion.json")["kv_heads_after"][0], 2);
    place.done(&format!("{two} --force --method mean"));
    assert_eq!(place.json("c/conversion.json")["kv_heads_after"][0], 1);
    assert!(!place.path("c/notes.md").exists(), "all that was in it");
    place.write("other/notes.md", "mine");
    place.refused(&two.replace("--out c", "--out other --force"), &["no model's folder"]);
    place.write("other/config.json", r#"{"name": "of a website"}"#);
    place.write("other/model.safetensors", "");
    place.refused(&two.replace("--out c", "--out other --force"), &["no model's folder"]);
    place.refused(&two.replace("--out c", "--out m --force"), &["holds", "which is read"]);
    place.write("c/mine.txt", "text");
    place.refused(
        &format!("{two} --force --calibration c/mine.txt"),
        &["mine.txt", "which is read"],
    );
    // Nothing that was written before is taken over, whatever a kill left.
    place.write(".c.part/stale.json", "{}");
    place.write(".c.attn-tmp-dead/stale.json", "{}");
    place.done(&format!("{two} --force --method first"));
    assert!(!place.path("c/stale.json").exists() && !place.path("c/mine.txt").exists());
    std::fs::remove_dir_all(place.path(".c.part")).unwrap();
    // What fails leaves it as it was.
    place.refused("convert --model m --kv-heads 3 --out c --force", &["neither divides"]);
    assert_eq!(place.json("c/conversion.json")["kv_heads_after"][0], 1);
    let left: Vec<_> =
        std::fs::read_dir(place.path(".")).unwrap().flatten().map(|it| it.file_name()).collect();
    assert!(left.iter().all(|name| !name.to_string_lossy().starts_with('.')), "{left:?}");
}

/// Gates on a model's heads, a teacher, and the new heads alone in the end.
#[test]
fn heads_are_merged_by_learning() {
    let place = place("llama");
    let text = "--calibration notes.txt --max-len 24 --test-tokens 100";
    let begun = place.done(&format!(
        "convert --model m --kv-heads 1 --method mean {text} --as merging --price 3 --out begun"
    ));
    assert!(begun.stdout.contains("nothing is merged yet"), "{}", begun.stdout);
    let report = place.json("begun/conversion.json");
    assert_eq!(
        (&report["form"], &report["loads_in_transformers"]),
        (&"merging".into(), &false.into())
    );
    assert_eq!(report["kv_heads_after"], report["kv_heads_before"]);
    let kl = |path: &str| {
        place.done(&format!("eval --model {path} {ROWS} --against m --dtype f64 --out kl.json"));
        place.json("kl.json")["divergence"]["kl_nats_per_token"].as_f64().unwrap()
    };
    assert!(kl("begun").abs() < 1e-12);

    place.write(
        "teach.toml",
        "model = 'begun'\nteacher = 'm'\n[data]\nsource = 'notes.txt'\n[examples]\nmax_len = 24\nreport_hold_out = 20\n\
         [tune.train]\nlr = 3e-3\nbatch_size = 8\nmax_steps = 80\n",
    );
    place.done("distill teach.toml --out taught");
    let ended =
        place.done(&format!("convert --model taught/model --method learned {text} --out ended"));
    assert!(ended.stdout.contains("layer 1: 0 of 2 old heads still in use"), "{}", ended.stdout);
    let report = place.json("ended/conversion.json");
    assert_eq!(
        (&report["method"], &report["kv_heads_after"]),
        (&"learned".into(), &serde_json::json!([1, 1]))
    );
    assert_eq!(report["loads_in_transformers"], true);
    assert!(
        report["measured"]["kl_nats_per_token"].as_f64().unwrap() < 1e-5,
        "closed gates are no loss"
    );
    // Better than the mean that it began with.
    place.done("convert --model m --kv-heads 1 --method mean --out mean");
    let (learned, mean) = (kl("ended"), kl("mean"));
    assert!(learned < 0.5 * mean, "{learned} {mean}");

    // Nothing to train before that: a loss of layers there is no silent skip.
    let skipped = "distill teach.toml --set model=mean --set transfer.loss.layer_output=1 --out no";
    place.refused(skipped, &["transfer.loss.layer_output", "tune.loss.layer_output"]);

    // Ended too soon, it says so.
    let early = place.done("convert --model begun --method learned --out early");
    assert!(
        early.stdout.contains("layer 0: 2 of 2 old heads still in use, at most to 1.00"),
        "{}",
        early.stdout
    );
    assert!(early.stderr.contains("4 old heads were still in use"), "{}", early.stderr);
}

#[test]
fn what_cannot_be_is_refused_and_nothing_is_written() {
    let place = place("gpt2");
    place.write("short.txt", "the film was good");
    place.done("swap --model m --attention window --layers 0 --out w");
    place.done("convert --model m --kv-heads 1 --layers 1 --method mean --out one");
    for (arguments, parts) in [
        ("convert --model m --kv-heads 3 --out x", ["--kv-heads", "neither divides the other"]),
        ("convert --model m --kv-heads 8 --out x", ["--kv-heads", "expected 1 to 4"]),
        ("convert --model m --kv-heads 4 --out x", ["--kv-heads", "nothing would change"]),
        ("convert --model m --kv-heads 2 --layers 5 --out x", ["--layers", "no layer 5"]),
        ("convert --model m --kv-heads 2 --out m", ["m", "is there already"]),
        ("convert --model m --out x", ["how many key/value heads", "--kv-heads N"]),
        ("convert --model m --method learned --out x", ["--method learned", "--as merging"]),
        (
            "convert --model m --method learned --kv-heads 2 --out x",
            ["--method learned", "no use for `--kv-heads`"],
        ),
        (
            "convert --model m --kv-heads 2 --as merging --refit --out x",
            ["--as merging", "no use for `--refit`"],
        ),
        (
            "convert --model m --kv-heads 2 --as merging --price=-1 --out x",
            ["--price", "at least 0"],
        ),
        ("convert --model w --cache 50% --layers 0 --out x", ["--cache", "--method low-rank"]),
        ("convert --model m --kv-heads 2 --price 2 --out x", ["--price", "--as merging"]),
        (
            "convert --model w --kv-heads 2 --method mean --as merging --out x",
            ["--as merging", "first, then swap"],
        ),
        ("convert --model m --kv-heads 8 --as merging --out x", ["--kv-heads", "expected 1 to 4"]),
        ("convert --model m --cache 60 --layers 1 --out x", ["--cache", "comes to"]),
        (
            "convert --model one --kv-heads 2 --out x",
            ["layers [1] have fewer already", "--layers 0"],
        ),
        (
            "convert --model m --kv-heads 2 --calibration short.txt --out x",
            ["--calibration", "more --calibration-tokens"],
        ),
        (
            "convert --model m --kv-heads 2 --calibration none.txt --out x",
            ["--calibration", "none.txt"],
        ),
        (
            "convert --model m --kv-heads 2 --method mean --refit --ridge 0 --out x",
            ["ridge", "positive"],
        ),
    ] {
        place.refused(arguments, &parts);
        assert!(!place.path("x").exists(), "{arguments}");
    }
}
