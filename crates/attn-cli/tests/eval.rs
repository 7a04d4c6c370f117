//! `attn eval`: the numbers in OUT.json are those of the library, and of their definitions.

mod common;

use attn_core::{LoadOptions, Model, config::Head};
use attn_data::{
    batch::Encoded,
    tokenizer::{Style, TextTokenizer, train_bpe},
};
use attn_eval::{Batching, classify, next_token};
use common::{
    Place, Ran, config, edit_config, model_folder, random_model, rows, save, tokenizer, write_data,
};
use serde_json::{Value, json};

const CLASSES: Head = Head::Classifier { n_classes: 2 };
const DATA: &str =
    "--task data.csv --set data.text=review --set data.label=stars --set data.split_column=part";

fn go_on(_: usize) -> std::ops::ControlFlow<()> {
    std::ops::ControlFlow::Continue(())
}

fn load(place: &Place) -> (Model, TextTokenizer) {
    let (model, _) = Model::load(&place.path("model"), &LoadOptions::default()).unwrap();
    (model, TextTokenizer::from_folder(place.path("model")).unwrap())
}

#[test]
fn a_classifier_gets_accuracy_counts_and_every_prediction() {
    for base in ["distilbert", "gpt2"] {
        let place = Place::new();
        model_folder(&place, "model", base, CLASSES);
        write_data(&place);

        let ran = place.done(&format!("eval --model model {DATA} --out out/o.json"));

        let found = place.json("out/o.json");
        let (model, tokenizer) = load(&place);
        let encoded: Vec<Encoded> = rows(64)[48..]
            .iter()
            .enumerate()
            .map(|(index, (text, label))| Encoded {
                ids: tokenizer.ids(text, true).unwrap(),
                label: Some(*label as i64),
                index,
                second_from: None,
            })
            .collect();
        let expected = classify(&model, &encoded, &Batching::default(), &mut go_on).unwrap();
        let accuracy = expected.accuracy.unwrap();
        assert_eq!(found["accuracy"], serde_json::to_value(accuracy).unwrap(), "{base}");
        assert_eq!(found["classes"], serde_json::to_value(&expected.classes).unwrap());
        let close = |a: &Value, b: f64| (a.as_f64().unwrap() - b).abs() < 1e-6;
        for (found, expected) in
            found["predictions"].as_array().unwrap().iter().zip(&expected.predictions)
        {
            assert_eq!(found["index"], expected.index);
            assert_eq!(found["predicted"], expected.predicted);
            assert_eq!(found["text"], rows(64)[48 + expected.index].0);
            assert!(close(&found["probabilities"][1], expected.probabilities[1]));
        }
        assert_eq!((&found["n_rows"], &found["split"]), (&json!(16), &json!("validation")));
        assert_eq!(found["attention"], json!([{"kind": "softmax"}, {"kind": "softmax"}]));
        assert_eq!((&found["device"], &found["dtype"]), (&json!("cpu"), &json!("f32")));
        assert!(
            ran.stdout.contains(&format!("{} of 16 rows", accuracy.n_correct)),
            "{}",
            ran.stdout
        );
        assert!(ran.stdout.contains("negative") && ran.stdout.contains("95 % interval"));
    }
}

#[test]
fn splits_limits_batches_and_dtypes_do_what_they_say() {
    let place = Place::new();
    model_folder(&place, "model", "distilbert", CLASSES);
    write_data(&place);
    let accuracy = |arguments: &str| {
        place.done(&format!("eval --model model {DATA} --out o.json {arguments}"));
        place.json("o.json")
    };

    let train = accuracy("--split train --limit 10");
    assert_eq!((&train["n_rows"], &train["limit"]), (&json!(10), &json!(10)));
    assert_eq!(train["predictions"][9]["index"], 9);
    let (one, many) = (accuracy("--batch-size 1"), accuracy("--batch-size 64"));
    let loss = |report: &Value| report["accuracy"]["loss"].as_f64().unwrap();
    assert!((loss(&one) / loss(&many) - 1.0).abs() < 1e-5);
    let double = accuracy("--dtype f64");
    assert!((loss(&double) / loss(&one) - 1.0).abs() < 1e-5);
    assert_eq!(double["dtype"], "f64");
    let random = accuracy("--init random --seed 4");
    assert!(random["random_weights"] == true && loss(&random) != loss(&one));
}

#[test]
fn rows_without_labels_get_predictions_alone() {
    let place = Place::new();
    model_folder(&place, "model", "distilbert", CLASSES);
    place.write("test.csv", "text,label\nthe film was good,-1\nthe book was bad,-1\n");

    let ran = place.done(
        "eval --model model --task test.csv --split test --set data.label=label --out o.json",
    );

    let found = place.json("o.json");
    assert_eq!(
        (&found["accuracy"], found["predictions"].as_array().unwrap().len()),
        (&Value::Null, 2)
    );
    assert!(ran.stdout.contains("no row is labelled"), "{}", ran.stdout);
}

#[test]
fn a_decoder_is_scored_on_joined_text_or_text_by_text() {
    let place = Place::new();
    model_folder(&place, "model", "gpt2", Head::LanguageModel);
    let texts: Vec<String> = rows(30).into_iter().map(|(text, _)| text).collect();
    place.write("lines.txt", &texts.join("\n"));
    let (model, tokenizer) = load(&place);
    let eos = tokenizer.eos_id().unwrap();
    let ids: Vec<Vec<u32>> = texts.iter().map(|text| tokenizer.ids(text, true).unwrap()).collect();
    let score = |rows: Vec<Vec<u32>>| {
        let rows: Vec<Encoded> = rows
            .into_iter()
            .map(|ids| Encoded { ids, label: None, index: 0, second_from: None })
            .collect();
        next_token(&model, &rows, &Batching::default(), &mut go_on).unwrap()
    };
    let check = |arguments: &str, expected: attn_eval::LanguageScore| {
        let ran = place.done(&format!(
            "eval --model model --task lines.txt --split train --out o.json {arguments}"
        ));
        let found = &place.json("o.json")["language"];
        assert_eq!(found["n_tokens"], expected.n_tokens);
        let loss = found["loss_nats_per_token"].as_f64().unwrap();
        assert!((loss / expected.loss_nats_per_token - 1.0).abs() < 1e-6, "{loss}");
        assert!((found["perplexity"].as_f64().unwrap() / loss.exp() - 1.0).abs() < 1e-9);
        assert_eq!(found["convention"], "next_token_within_row");
        assert!(ran.stdout.contains("nats per token") && ran.stdout.contains("perplexity"));
    };

    let joined: Vec<u32> = ids.iter().flat_map(|ids| ids.iter().copied().chain([eos])).collect();
    check("--max-len 20", score(joined.chunks(20).map(<[u32]>::to_vec).collect()));
    check("--by-text", score(ids));
}

#[test]
fn an_encoder_is_scored_on_hidden_tokens_by_seed() {
    let place = Place::new();
    model_folder(&place, "model", "distilbert", Head::LanguageModel);
    let texts: Vec<String> = rows(30).into_iter().map(|(text, _)| text).collect();
    place.write("lines.txt", &texts.join("\n"));
    let score = |arguments: &str| {
        let command =
            format!("eval --model model --task lines.txt --split train --out o.json {arguments}");
        place.done(&command);
        place.json("o.json")
    };

    let first = score("");

    assert_eq!(first["language"]["convention"], "masked_tokens");
    assert_eq!((&first["mask_seed"], &first["language"]["n_rows"]), (&json!(0), &json!(30)));
    let close = |a: &Value, b: &Value| {
        let loss = |v: &Value| v["language"]["loss_nats_per_token"].as_f64().unwrap();
        (loss(a) / loss(b) - 1.0).abs() < 1e-5
    };
    assert!(close(&score("--batch-size 3"), &first) && !close(&score("--seed 1"), &first));
}

#[test]
fn running_text_is_scored_in_full_blocks_by_an_encoder_too() {
    let place = Place::new();
    model_folder(&place, "model", "distilbert", Head::LanguageModel);
    let texts: Vec<String> = rows(30).into_iter().map(|(text, _)| text).collect();
    // Lines that keep their ends, as WikiText's do, with empty ones between.
    let lines: Vec<Value> = texts
        .iter()
        .flat_map(|text| [json!({"text": format!("{text}\n")}), json!({"text": ""})])
        .collect();
    let lines: Vec<String> = lines.iter().map(Value::to_string).collect();
    place.write("running.jsonl", &lines.join("\n"));
    let tokenizer = TextTokenizer::from_folder(place.path("model")).unwrap();
    let n_tokens: usize = texts.iter().map(|text| tokenizer.ids(text, false).unwrap().len()).sum();
    let n_rows = |arguments: &str| {
        place.done(&format!(
            "eval --model model --task running.jsonl --split train --out o.json {arguments}"
        ));
        place.json("o.json")["language"]["n_rows"].as_u64().unwrap() as usize
    };

    // A block of 20 has room for 18 tokens between [CLS] and [SEP].
    assert_eq!(n_rows("--max-len 20"), n_tokens.div_ceil(18));
    assert_eq!(n_rows("--by-text"), texts.len());
    place.refused(
        "eval --model model --task running.jsonl --split train --max-len 2 --out o.json",
        &["a block of 2 token(s) has no room for text beside 2 special ones"],
    );
}

#[test]
fn what_cannot_be_scored_is_refused_before_the_long_work() {
    let place = Place::new();
    model_folder(&place, "model", "distilbert", CLASSES);
    model_folder(&place, "lm", "gpt2", Head::LanguageModel);
    write_data(&place);
    let eval = |rest: &str| format!("eval --out deep/down/o.json {rest}");
    let refused = |rest: &str, parts: &[&str]| {
        let stderr = place.refused(&eval(rest), parts);
        assert!(!place.path("deep").exists(), "folders made for the result go with it");
        stderr
    };

    refused(
        &format!("--model none/at/all {DATA}"),
        &["cannot use the model `none/at/all`", "there is no folder"],
    );
    place.write("empty/readme.txt", "");
    refused(
        &format!("--model empty {DATA}"),
        &["cannot use the model `empty`", "no `config.json`", "hint:"],
    );
    refused(
        "--model model --task sst-2",
        &["neither a file or folder `sst-2` nor a data set", "did you mean the task `sst2`?"],
    );
    let far = refused("--model model --task reviews", &["neither a file or folder `reviews`"]);
    assert!(!far.contains("did you mean"), "{far}");
    refused(
        &format!("--model tiny-mlm {DATA}"),
        &["neither a folder `tiny-mlm` nor a model of that id in the Hub's cache"],
    );
    place.write("run/model/config.json", "{}");
    refused(
        &format!("--model run {DATA}"),
        &["that of a run", "hint: the model is in `run/model`"],
    );
    place.write("whole.csv", "text,label\nthe film was good,1\n");
    refused(
        "--model model --task whole.csv --set data.label=label",
        &["`--split` is not given", "hint: name the split to score: --split train"],
    );
    refused("--model model --task none.csv", &["there is no data file or folder `none.csv`"]);
    refused(
        "--model model --task data.csv --set data.text=revew --set data.split_column=part",
        &["no column `revew`", "`review`"],
    );
    refused(&format!("--model model {DATA} --split tset"), &["tset"]);
    refused(
        "--model model --task data.csv --set data.txt=review",
        &["unknown field `txt`", "did you mean `text`?"],
    );
    refused(&format!("--model lm {DATA}"), &["cannot score `lm`", "a classifier", "fine-tune it"]);
    refused(
        "--model model --task data.csv --set data.text=review --set data.split_column=part",
        &["`model` is a classifier", "--set data.label="],
    );
    refused(&format!("--model model {DATA} --max-len 33"), &["`--max-len` is 33", "32 positions"]);
    refused(&format!("--model model {DATA} --limit 0"), &["a limit of 0 rows"]);

    place.write("three.csv", "text,label,part\na,0,train\nc,2,train\nb,2,validation\n");
    refused(
        "--model model --task three.csv --set data.label=label --set data.split_column=part",
        &["classes of the model", "label `2` in row 3", "`negative`, `positive`"],
    );
    let order = format!(r#"--model model {DATA} --set data.classes=["positive","negative"]"#);
    refused(&order, &["the same in another order"]);
    place.write(
        "typo.csv",
        "text,label\nthe film was good,positive\nthe plot,negative\nthe actor,positve\n",
    );
    refused(
        "--model model --task typo.csv --split train --set data.label=label",
        &[
            "the class `positve` (row 2, counted from 0)",
            "[\"negative\", \"positive\"]",
            "data.classes",
        ],
    );
    let names = format!(r#"--model model {DATA} --set data.classes=["bad","good"]"#);
    assert!(place.done(&eval(&names)).stderr.contains("compared by number"));
    std::fs::remove_dir_all(place.path("deep")).unwrap();

    tokenizer(Style::ByteLevel).save(place.path("model")).unwrap();
    refused(
        &format!("--model model {DATA}"),
        &["the tokenizer has ids up to", "`vocab_size` is 88"],
    );
    edit_config(&place, "lm", |config| {
        config.shift_remove("n_head");
        config.insert("n_head".into(), json!("four"));
    });
    refused(&format!("--model lm {DATA}"), &["cannot use the model `lm`", "`n_head`"]);
}

/// By the place in their own list, the single class of a file would be the model's first.
#[test]
fn classes_are_matched_by_name() {
    let place = Place::new();
    model_folder(&place, "model", "distilbert", CLASSES);
    let texts = ["the film was good", "the plot was bad", "the actor hated it"];
    let scored = |name: &str, rows: &[(&str, &str)]| {
        let lines: Vec<String> =
            rows.iter().map(|(text, label)| format!("{text},{label}")).collect();
        place.write(&format!("{name}.csv"), &format!("text,label\n{}\n", lines.join("\n")));
        place.done(&format!(
            "eval --model model --task {name}.csv --split train --set data.label=label --out {name}.json"
        ));
        place.json(&format!("{name}.json"))
    };
    let both =
        scored("both", &[(texts[0], "Negative"), (texts[1], "Positive"), (texts[2], "Positive")]);
    let one = scored("one", &[(texts[1], "Positive"), (texts[2], "Positive")]);

    assert_eq!(one["classes"][1]["n_rows"], 2, "{one}");
    for (of_one, of_both) in [(0, 1), (1, 2)] {
        for field in ["label", "predicted"] {
            assert_eq!(
                one["predictions"][of_one][field], both["predictions"][of_both][field],
                "{field}"
            );
        }
    }
}

#[test]
fn long_texts_are_cut_and_counted() {
    let place = Place::new();
    model_folder(&place, "model", "distilbert", CLASSES);
    write_data(&place);

    let ran = place.done(&format!("eval --model model {DATA} --max-len 6 --out o.json"));

    assert!(ran.stderr.contains("were cut to 6 tokens; the longest has"), "{}", ran.stderr);
    assert_eq!(place.json("o.json")["max_len"], 6);
    place.refused(
        &format!("eval --model model {DATA} --max-len 2 --out p.json"),
        &["`max_len` is 2"],
    );
}

#[test]
fn the_hubs_client_says_nothing_that_we_say() {
    let place = Place::new();
    let mut command = place.command("eval --model owner/name --task sst2 --out o.json");
    // Nobody listens there.
    command.env_remove("HF_HUB_OFFLINE").env("HF_ENDPOINT", "http://127.0.0.1:1");
    command.env("NO_PROXY", "127.0.0.1");
    let ran = common::Ran::of(command.output().unwrap());

    assert_eq!(ran.code, 1);
    assert!(ran.stderr.starts_with("error: cannot use the model `owner/name`"), "{}", ran.stderr);
    assert!(ran.stderr.contains("the Hub cannot be asked"), "{}", ran.stderr);
    assert!(!ran.stderr.contains("retry") && !ran.stderr.contains('\x1b'), "{}", ran.stderr);
}

/// A decoder with room for a prompt, and rows to ask it about.
fn decoder() -> Place {
    let place = Place::new();
    let texts: Vec<String> = rows(80).into_iter().map(|(text, _)| text).collect();
    let tokenizer = train_bpe(&texts, 290, Style::ByteLevel, Some(200)).unwrap();
    let mut config = config("gpt2");
    config.insert("vocab_size".into(), tokenizer.vocab_size().into());
    config.insert("n_positions".into(), 200.into());
    save(&random_model(config, Head::LanguageModel), &place.path("model"));
    tokenizer.save(place.path("model")).unwrap();
    write_data(&place);
    place
}

fn asked(place: &Place, more: &str) -> Value {
    place.done(&format!("eval --model model {DATA} {more} --out p.json"));
    place.json("p.json")
}

/// Some code of Python's, beside the last [`asked`]; `None` without a Python.
fn python(place: &Place, test: &str, code: &str) -> Option<Ran> {
    let mut command = std::process::Command::new(common::python(test, "torch, transformers")?);
    command.args(["-c", code]).current_dir(place.path(""));
    Some(Ran::of(command.output().unwrap()))
}

#[test]
fn a_prompt_gets_the_likelihood_of_each_answer_and_accuracy_by_both_counts() {
    let place = decoder();
    let found = asked(&place, "--prompt sst2");

    assert_eq!(found["prompt"]["answers"], json!(["negative", "positive"]));
    let predictions = found["predictions"].as_array().unwrap();
    let right = |key: &str| predictions.iter().filter(|row| row[key] == row["label"]).count();
    assert_eq!(found["accuracy"]["n_correct"], right("predicted"));
    assert_eq!(found["accuracy_per_byte"]["n_correct"], right("predicted_per_byte"));
    for row in predictions {
        let [a, b] = [0, 1].map(|class| row["log_likelihoods"][class].as_f64().unwrap());
        assert!(a < 0.0 && b < 0.0 && row["text"].is_string(), "{row}");
        assert_eq!(row["predicted"], i64::from(b > a));
    }
    let one = asked(&place, "--prompt sst2 --batch-size 1");
    let first = |report: &Value| report["predictions"][0]["log_likelihoods"][0].as_f64().unwrap();
    assert!((first(&one) - first(&found)).abs() < 1e-4);
    let own = "--set prompt.template={{text}}: --set prompt.answers=[\"bad\",\"fine\"]";
    assert_ne!(first(&asked(&place, own)), first(&found));
}

/// lm-evaluation-harness's way, by transformers: the tokens of the prompt alone are counted, the rest is the answer.
#[test]
fn likelihoods_are_those_of_transformers_by_the_harness_s_rules() {
    let place = decoder();
    asked(&place, "--prompt sst2");
    let code = r#"
import json, torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
model = AutoModelForCausalLM.from_pretrained("model").double().eval()
tokenizer = PreTrainedTokenizerFast(tokenizer_file="model/tokenizer.json")
worst, n = 0.0, 0
for row in json.load(open("p.json"))["predictions"]:
    context = row["text"] + "\nQuestion: Is this sentence positive or negative?\nAnswer:"
    for answer, ours in zip([" negative", " positive"], row["log_likelihoods"]):
        whole, before = tokenizer.encode(context + answer), tokenizer.encode(context)
        with torch.no_grad():
            log_p = model(torch.tensor([whole[:-1]])).logits[0].log_softmax(-1)
        theirs = sum(log_p[i - 1, whole[i]].item() for i in range(len(before), len(whole)))
        worst, n = max(worst, abs(ours / theirs - 1)), n + 1
print(n, worst < 1e-5, worst)
"#;
    let test = "likelihoods_are_those_of_transformers_by_the_harness_s_rules";
    if let Some(ran) = python(&place, test, code) {
        assert!(ran.stdout.starts_with("32 True"), "{}{}", ran.stdout, ran.stderr);
    }
}

#[test]
fn a_chat_is_written_by_the_tokenizers_template_right_or_malformed() {
    let place = decoder();
    let chat = "--set prompt.name=sst2 --set prompt.chat=[{role=\"user\",content=\"{{text}}\"}]";
    place.refused(
        &format!("eval --model model {DATA} {chat} --out p.json"),
        &["cannot use the prompt", "no chat template", "hint: "],
    );
    let template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}\
                    {% if add_generation_prompt %}<assistant>{% endif %}";
    place.write("model/chat_template.jinja", template);
    let score = |more: &str| {
        let found = asked(&place, &format!("{chat} {more}"));
        found["predictions"][0]["log_likelihoods"][0].as_f64().unwrap()
    };

    let plain = "--set prompt.template=<user>{{text}}<assistant> --set prompt.delimiter=\"\"";
    let by_hand = asked(&place, &format!("--set prompt.name=sst2 {plain}"));
    let by_hand = by_hand["predictions"][0]["log_likelihoods"][0].as_f64().unwrap();
    assert!((score("") - by_hand).abs() < 1e-4);
    assert!((score("--set prompt.malformed=true") - by_hand).abs() > 1e-2);

    place.write("model/chat_template.jinja", "{{ raise_exception('tools alone') }}");
    place.refused(
        &format!("eval --model model {DATA} {chat} --out p.json"),
        &["`validation`", "model/chat_template.jinja", "tools alone"],
    );
}

#[test]
fn prompts_that_cannot_be_asked_are_refused_before_the_model_is_read() {
    let place = decoder();
    // The weights would be the next complaint.
    place.write("model/model.safetensors", "torn");
    let ask = |more: &str, parts: &[&str]| {
        place.refused(&format!("eval --model model {DATA} {more} --out p.json"), parts)
    };
    ask("--prompt sst3", &["no prompt `sst3`", "did you mean `sst2`?"]);
    ask("--prompt mnli", &["answers the classes `entailment`"]);
    ask("--prompt sst2 --set prompt.malformed=true", &["`prompt.malformed` is set", "no chat"]);
    ask("--set prompt.template={{review}}{{x}}", &["names `x`", "`text`, `review`"]);
    let long = format!("--prompt sst2 --set prompt.template={}", "word".repeat(300));
    ask(&long, &["row 0", "200 are allowed"]);
    ask("--prompt sst2 --max-len 201", &["`--max-len` is 201", "200 positions"]);
    ask("--prompt sst2", &["model.safetensors"]);

    let place = Place::new();
    write_data(&place);
    model_folder(&place, "model", "distilbert", Head::LanguageModel);
    let ask = |parts: &[&str]| {
        place.refused(&format!("eval --model model {DATA} --prompt sst2 --out p.json"), parts)
    };
    ask(&["a distilbert is an encoder", "hint: a prompt is for a decoder"]);
    model_folder(&place, "model", "gpt2", CLASSES);
    ask(&["a classifier", "a prompt needs a language-model head"]);
}

/// Lines of running text as WikiText's, of two pages.
fn wikitext(place: &Place) {
    let sentences = rows(40).into_iter().map(|(text, _)| format!("{text} , well @-@ made . "));
    let sentences: Vec<String> = sentences.collect();
    let page = |name: &str, of: &[String]| {
        let lines = format!(" = {name} = \n\n {}\n = = Part = = \n {}\n", of[0], of[1..].concat());
        lines
            .lines()
            .map(|line| {
                json!({"text": if line.is_empty() { String::new() } else { format!("{line}\n") }})
                    .to_string()
                    + "\n"
            })
            .collect::<String>()
    };
    place.write("w.jsonl", &(page("One", &sentences[..20]) + &page("Two", &sentences[20..])));
}

#[test]
fn every_convention_of_perplexity_is_told_by_its_name() {
    let place = Place::new();
    model_folder(&place, "model", "gpt2", Head::LanguageModel);
    wikitext(&place);
    let eval = "eval --model model --task w.jsonl --split train --max-len 16 --out o.json";

    let ran = place.done(&format!("{eval} --conventions"));

    let found = place.json("o.json");
    let all = found["conventions"].as_array().unwrap();
    let named: Vec<(&str, &str)> = all
        .iter()
        .map(|one| (one["text"].as_str().unwrap(), one["windows"].as_str().unwrap()))
        .collect();
    let windows = ["context", "half_context", "lm_eval"];
    let expected: Vec<(&str, &str)> =
        ["raw", "detokenized"].into_iter().flat_map(|text| windows.map(|of| (text, of))).collect();
    assert_eq!(named, expected);
    let number = |at: usize, key: &str| all[at][key].as_f64().unwrap();
    // The first is what the command tells anyway.
    let loss = found["language"]["loss_nats_per_token"].as_f64().unwrap();
    assert!((number(0, "loss_nats_per_token") / loss - 1.0).abs() < 1e-5);
    // Words and bytes of the pages as they stand, by the harness's own definition.
    let lines = place.read("w.jsonl");
    let lines: Vec<String> = lines
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["text"].as_str().unwrap().into())
        .collect();
    let pages = attn_data::wikitext::pages(lines.iter().map(String::as_str));
    assert_eq!(pages.len(), 2);
    // len(re.split(r"\s+", page)): one more than there are runs of white space.
    let n_words = |page: &String| {
        let mut before = 'x';
        let begins_a_run =
            |c: char| !std::mem::replace(&mut before, c).is_whitespace() && c.is_whitespace();
        1 + page.chars().map(begins_a_run).filter(|begins| *begins).count()
    };
    let n_words = pages.iter().map(n_words).sum::<usize>() as f64;
    let n_bytes = pages.iter().map(String::len).sum::<usize>() as f64;
    for at in 0..6 {
        assert_eq!((number(at, "n_words"), number(at, "n_bytes")), (n_words, n_bytes), "{at}");
        let nats = number(at, "loss_nats_per_token") * number(at, "n_tokens");
        for (key, value) in [
            ("word_perplexity", (nats / n_words).exp()),
            ("byte_perplexity", (nats / n_bytes).exp()),
            ("bits_per_byte", nats / n_bytes / std::f64::consts::LN_2),
        ] {
            assert!((number(at, key) / value - 1.0).abs() < 1e-9, "{at}: {key}");
        }
    }
    assert_eq!(number(1, "n_scored"), number(1, "n_tokens") - 1.0);
    assert_eq!(number(2, "n_scored"), number(2, "n_tokens"));
    // Marks that are undone are fewer tokens.
    assert!(number(5, "n_tokens") < number(2, "n_tokens"));
    assert!(ran.stdout.contains("detokenised, lm-evaluation-harness"), "{}", ran.stdout);

    place.write(
        "plain.txt",
        &rows(30).iter().map(|(text, _)| format!("{text}\n")).collect::<String>(),
    );
    place.done("eval --model model --task plain.txt --split train --conventions --out p.json");
    let plain = place.json("p.json");
    assert_eq!(plain["conventions"].as_array().unwrap().len(), 3, "nothing to detokenise");
    place.refused(&format!("{eval} --conventions --by-text"), &["`--conventions`", "hint: "]);
}

#[test]
fn blimp_counts_the_pairs_whose_good_sentence_is_likelier() {
    let place = Place::new();
    model_folder(&place, "model", "gpt2", Head::LanguageModel);
    let (model, tokenizer) = load(&place);
    let pair = |i: usize| (format!("{} .", rows(60)[i].0), format!("{} .", rows(60)[i + 7].0));
    for (at, paradigm) in attn_data::blimp::paradigms().enumerate() {
        let lines = (0..3).map(|i| {
            let (good, bad) = pair((at + 5 * i) % 50);
            json!({"sentence_good": good, "sentence_bad": bad}).to_string() + "\n"
        });
        place.write(&format!("blimp/{}/train.jsonl", paradigm.name), &lines.collect::<String>());
    }

    let eval = "eval --model model --task blimp --set data.source=blimp --out o.json";
    let ran = place.done(&format!("{eval} --limit 2"));
    assert_eq!(&place.bytes("o.png")[1..4], b"PNG");

    // Σ ln p over the tokens of a sentence, one after another.
    let log_p = |sentence: &str| -> f64 {
        let mut ids = vec![i64::from(tokenizer.bos_id().or(tokenizer.eos_id()).unwrap())];
        ids.extend(
            tokenizer.ids(&format!(" {sentence}"), false).unwrap().iter().map(|&id| i64::from(id)),
        );
        let input = attn_core::ModelInput::new(tch::Tensor::from_slice(&ids).view([1, -1]));
        let logits = model.forward(&input, &attn_core::ForwardOptions::default()).unwrap().logits;
        let log_p = logits.to_kind(tch::Kind::Double).log_softmax(-1, tch::Kind::Double).get(0);
        (1..ids.len()).map(|at| log_p.double_value(&[at as i64 - 1, ids[at]])).sum()
    };
    let mut n_right = 0;
    let found = place.json("o.json");
    for (at, paradigm) in attn_data::blimp::paradigms().enumerate() {
        let right = |i: &usize| {
            let (good, bad) = pair((at + 5 * i) % 50);
            log_p(&good) > log_p(&bad)
        };
        let right = (0..2).filter(right).count();
        n_right += right;
        let of =
            found["paradigms"].as_array().unwrap().iter().find(|one| one["name"] == paradigm.name);
        assert_eq!(of.unwrap()["accuracy"].as_f64(), Some(right as f64 / 2.0), "{}", paradigm.name);
    }
    assert!(0 < n_right && n_right < 134, "a test of nothing");
    assert_eq!(found["accuracy"].as_f64(), Some(n_right as f64 / 134.0));
    assert_eq!((&found["n_pairs"], found["fields"].as_array().unwrap().len()), (&json!(134), 4));
    assert!(ran.stdout.contains("island_effects"), "{}", ran.stdout);
    place.refused(&format!("{eval} --by-text"), &["`--by-text`", "pairs of sentences"]);

    // What says where the sentences stand is heard, be it the usual word, and what says nothing is refused.
    for paradigm in attn_data::blimp::paradigms() {
        let file = format!("blimp/{}/train.jsonl", paradigm.name);
        let renamed = place.read(&file).replace("sentence_good", "text").replace("_bad", "");
        place.write(&file.replace("blimp/", "other/").replace("/train.", "/test."), &renamed);
    }
    let columns = "--set data.text=text --set data.text_pair=sentence";
    let other = eval.replace("source=blimp", "source=other").replace("o.json", "p.json");
    place.done(&format!("{other} --limit 2 {columns} --set data.validation_split=test"));
    let again = place.json("p.json");
    for key in ["accuracy", "n_pairs", "paradigms"] {
        assert_eq!(again[key], found[key]);
    }
    assert_eq!((&again["split"], &again["data"]["text"]), (&json!("test"), &json!("text")));
    for (set, parts) in [
        ("data.label=stars", ["`data.label`", "pairs of sentences"]),
        ("data.classes=[\"a\",\"b\"]", ["`data.classes`", "pairs of sentences"]),
        ("data.config=wh_island", ["`data.config`", "each paradigm"]),
        ("data.train_split=x", ["`data.train_split`", "`--split`"]),
        ("prompt.name=sst2", ["a prompt means nothing", "hint: "]),
        ("data.txt=a", ["txt", "data"]),
    ] {
        place.refused(&format!("{eval} --set {set}"), &parts);
    }
}
