//! `attn pretrain`: language models from random weights, and what becomes of them.

mod common;

use attn_core::{LoadOptions, Model, config::Head};
use attn_data::tokenizer::TextTokenizer;
use common::{FINETUNE, Place, config, rows, write_data};
use serde_json::Value;

fn place(base: &str) -> Place {
    let place = Place::new();
    let texts: Vec<String> = rows(80).into_iter().map(|(text, _)| text).collect();
    place.write("text.txt", &texts.join("\n"));
    let mut init = config(base);
    init.remove("vocab_size");
    let init = toml::to_string(&init).unwrap();
    let causal = base != "distilbert";
    let (objective, vocab_size) = if causal { ("causal", 290) } else { ("masked", 90) };
    place.write(
        "lm.toml",
        &format!(
            "objective = '{objective}'\n[init]\n{init}\n[tokenizer]\nvocab_size = {vocab_size}\n[data]\nsource = \
             'text.txt'\n[examples]\nmax_len = 24\nhold_out = 10\n[train]\nlr = 1e-2\nepochs = 8\nbatch_size = 8\n\
             weight_decay = 0.0\n"
        ),
    );
    place
}

fn loss(summary: &Value, when: &str) -> f64 {
    summary[when]["loss_nats_per_token"].as_f64().unwrap()
}

#[test]
fn a_model_of_each_kind_learns_its_text_and_can_be_fine_tuned() {
    for (base, convention) in [
        ("gpt2", "next_token_within_row"),
        ("llama", "next_token_within_row"),
        ("distilbert", "masked_tokens"),
    ] {
        let place = place(base);

        let ran = place.done("pretrain lm.toml --out lm");

        assert!(ran.stderr.contains("trained a vocabulary of"), "{}", ran.stderr);
        assert!(
            ran.stdout.contains("nats/token") && ran.stdout.contains("fine-tune it"),
            "{}",
            ran.stdout
        );
        let summary = place.json("lm/summary.json");
        assert!(loss(&summary, "after") < 0.7 * loss(&summary, "before"), "{base}: {summary}");
        assert_eq!(summary["after"]["convention"], convention);
        assert!(place.bytes("lm/plots/loss.png").starts_with(b"\x89PNG"));
        assert_eq!(place.json("lm/env.json")["dtype"], "f32");
        assert!(!place.path("lm/checkpoints").exists());
        let (model, _) = Model::load(&place.path("lm/model"), &LoadOptions::default()).unwrap();
        let tokenizer = TextTokenizer::from_folder(place.path("lm/model")).unwrap();
        assert_eq!(model.config().head, Head::LanguageModel);
        assert_eq!(model.config().sizes.vocab_size, tokenizer.vocab_size() as i64);
        assert_eq!(model.config().pad_token_id(), tokenizer.pad_id().map(i64::from));

        // The rows held out cannot be named; all of the text, most of it trained on, is as well known.
        place.done(
            "eval --model lm/model --task text.txt --split train --max-len 24 --out eval.json",
        );
        let eval = place.json("eval.json")["language"]["loss_nats_per_token"].as_f64().unwrap();
        assert!(eval < 0.7 * loss(&summary, "before"), "{base}: {eval} {summary}");

        write_data(&place);
        place.write("run.toml", FINETUNE);
        place.done("finetune run.toml --set model=lm/model --out ft --set train.epochs=1");
    }
}

#[test]
fn the_written_config_repeats_the_run_bit_for_bit_and_a_tokenizer_can_be_taken_over() {
    let place = place("distilbert");
    place.done("pretrain lm.toml --out a --set train.epochs=1 --seed 5");
    place.done("pretrain a/config.toml --out b");

    for file in ["model/model.safetensors", "model/tokenizer.json", "metrics.jsonl"] {
        assert_eq!(place.bytes(&format!("a/{file}")), place.bytes(&format!("b/{file}")), "{file}");
    }
    place
        .write("other.toml", &place.read("lm.toml").replace("vocab_size = 90", "from = 'a/model'"));
    let ran = place.done("pretrain other.toml --out c --set train.epochs=1 --seed 5");
    assert!(!ran.stderr.contains("trained a vocabulary"), "{}", ran.stderr);
    assert_eq!(place.bytes("a/model/tokenizer.json"), place.bytes("c/model/tokenizer.json"));
    assert_eq!(place.bytes("a/model/model.safetensors"), place.bytes("c/model/model.safetensors"));
}

#[test]
fn a_validation_split_is_scored_before_and_after_where_nothing_is_held_out() {
    let place = place("gpt2");
    let text = place.read("text.txt");
    place.write("folder/train.txt", &text);
    place.write("folder/validation.txt", text.lines().next().unwrap());
    let config = place.read("lm.toml").replace("hold_out = 10\n", "");
    place.write("lm.toml", &config);

    place.refused(
        "pretrain lm.toml --out out",
        &["there is nothing to score the model on", "hold_out"],
    );
    assert!(!place.path("out").exists());
    place.done("pretrain lm.toml --set data.source=folder --out out --set train.epochs=1");
    let summary = place.json("out/summary.json");
    assert_eq!(summary["n_held_out"], 1);
    assert!(loss(&summary, "after") < loss(&summary, "before"), "{summary}");
    let metrics = place.read("out/metrics.jsonl");
    assert!(metrics.contains("train_loss") && !metrics.contains("perplexity"), "{metrics}");
    place.refused(
        "pretrain lm.toml --set data.source=folder --out b --set train.select=loss",
        &["`train.select` is `loss`", "no rows are held out", "examples.hold_out"],
    );
    place.done(
        "pretrain lm.toml --out b --set train.epochs=1 --set examples.hold_out=10 --set train.select=loss",
    );
    assert!(place.read("b/metrics.jsonl").contains("perplexity"));
}

#[test]
fn what_reads_two_texts_is_refused_before_the_data_is_read() {
    let place = place("distilbert");
    let refused = |arguments: &str, parts: &[&str]| {
        let nothing = "--set data.source=none.txt --out out";
        place.refused(&format!("pretrain lm.toml {nothing} {arguments}"), parts);
        assert!(!place.path("out").exists());
    };
    let hint = "hint: `attn finetune` trains it";
    refused("--set attention.kind=cross", &["`attention.kind` is `cross`", hint]);
    refused("--set attention.kind=window --set attention.size=0", &["`attention.size`"]);
    place.done("pretrain lm.toml --set train.max_steps=1 --out lm");
    place.done("swap --model lm/model --attention cross --layers 1 --out crossed");
    place.write("crossed/model.safetensors", "no weights");
    let go_on = "--set model=crossed --set init= --set tokenizer=";
    refused(go_on, &["layer 1 of `model`, `crossed`, is `cross`", hint]);
    // A layer that is given another attention reads one text.
    refused(&format!("{go_on} --set attention.kind=softmax"), &["`none.txt`"]);
}

#[test]
fn what_does_not_fit_together_is_refused_at_once() {
    let place = place("distilbert");
    let refused = |arguments: &str, parts: &[&str]| {
        place.refused(&format!("pretrain lm.toml --out out {arguments}"), parts);
        assert!(!place.path("out").exists(), "{arguments}");
    };

    refused(
        "--set objective=causal",
        &["`objective` is `causal`", "distilbert", "set it to `masked`"],
    );
    refused("--set init.n_heads=5", &["cannot use `[init]`", "16 does not divide into 5 heads"]);
    refused("--set init.model_type=t5", &["cannot use `[init]`", "t5"]);
    refused("--set mask_rate=1.5", &["`mask_rate` is 1.5"]);
    refused("--set tokenizer.vocab_size=10", &["cannot train a vocabulary of 10"]);
    refused("--set tokenizer.from=model", &["`tokenizer.from` takes a tokenizer as it is"]);
    refused("--set examples.few_shot=3", &["`examples.few_shot` is for fine-tuning"]);
    refused("--set examples.hold_out=0", &["`examples.hold_out` is 0"]);
    refused("--set data.source=none.txt", &["`none.txt`"]);
    refused("--set attention.kind=window --set surgery.layers=[7]", &["layer 7", "has 2"]);
    let usage = place.attn("pretrain --out out");
    assert_eq!(usage.code, 1);
    assert!(usage.stderr.contains("needs a config"), "{}", usage.stderr);
}
