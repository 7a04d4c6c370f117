//! `attn forward`, file in and file out.

mod common;

use attn_core::{
    ForwardOptions, Gate, LoadOptions, Model, ModelInput, Output, Rows,
    checkpoint::{read_metadata, read_tensors},
    config::Head,
    testing::{assert_close, relative_rms},
};
use attn_data::tokenizer::TextTokenizer;
use common::{Place, Ran, config, model_folder, random_model, save};
use serde_json::json;
use tch::{Kind, Tensor};

const IDS: &str = r#"{"input_ids": [[5, 6, 7, 8, 9], [0, 0, 3, 4, 2]], "attention_mask": [[1,1,1,1,1], [0,0,1,1,1]]}"#;

fn input() -> ModelInput {
    let tensor = |values: [[i64; 5]; 2]| Tensor::from_slice2(&values);
    ModelInput::masked(
        tensor([[5, 6, 7, 8, 9], [0, 0, 3, 4, 2]]),
        tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]),
    )
}

fn place(base: &str, head: Head) -> Place {
    let place = Place::new();
    save(&random_model(config(base), head), &place.path("m"));
    place.write("ids.json", IDS);
    place
}

fn library(place: &Place, options: &ForwardOptions<'_>) -> Output {
    // As the program is run here: several threads may round the last bit differently.
    tch::set_num_threads(1);
    let (model, _) = Model::load(&place.path("m"), &LoadOptions::default()).unwrap();
    tch::no_grad(|| model.forward(&input(), options).unwrap())
}

fn tensors(place: &Place, file: &str) -> Vec<(String, Tensor)> {
    read_tensors(&place.path(file)).unwrap()
}

fn logits(place: &Place, arguments: &str) -> Tensor {
    place.done(&format!("forward --model m --input-ids ids.json --out o.safetensors {arguments}"));
    let mut tensors = tensors(place, "o.safetensors");
    assert_eq!(tensors.len(), 1);
    tensors.remove(0).1
}

#[test]
fn segments_are_for_bert_alone() {
    let with = IDS.replace("]]}", "]], \"token_type_ids\": [[0,0,1,1,1], [0,0,0,1,1]]}");
    let place = place("bert", Head::LanguageModel);
    let plain = logits(&place, "");
    place.write("ids.json", &with);
    let types = Tensor::from_slice2(&[[0_i64, 0, 1, 1, 1], [0, 0, 0, 1, 1]]);
    let (model, _) = Model::load(&place.path("m"), &LoadOptions::default()).unwrap();
    let input = ModelInput { token_type_ids: Some(types), ..input() };
    let expected =
        tch::no_grad(|| model.forward(&input, &ForwardOptions::default())).unwrap().logits;
    let found = logits(&place, "");
    assert_close("logits", &found, &expected, 1e-6);
    assert!(relative_rms(&plain, &found) > 1e-4, "segments matter");

    let place = self::place("gpt2", Head::LanguageModel);
    place.write("ids.json", &with);
    let ran = place.attn("forward --model m --input-ids ids.json --out o.safetensors");
    assert_eq!(ran.code, 1);
    assert!(
        ran.stderr.contains("token_type_ids") && ran.stderr.contains("a gpt2 has none"),
        "{}",
        ran.stderr
    );
}

#[test]
fn every_tensor_is_the_librarys_in_f32() {
    for (base, head) in [
        ("gpt2", Head::LanguageModel),
        ("llama", Head::Classifier { n_classes: 3 }),
        ("distilbert", Head::LanguageModel),
        ("distilbert", Head::Bare),
    ] {
        let place = place(base, head);

        let ran = place.done(
            "forward --model m --input-ids ids.json --attentions --hidden-states --out deep/o.safetensors",
        );

        assert_eq!(ran.stdout, "");
        assert!(ran.stderr.contains("wrote 6 tensors to `deep/o.safetensors`"), "{}", ran.stderr);
        let options = ForwardOptions {
            attentions: Rows::All,
            hidden_states: true,
            ..ForwardOptions::default()
        };
        let Output { logits, attentions, hidden_states, .. } = library(&place, &options);
        let found = tensors(&place, "deep/o.safetensors");
        let named = |name: &str| {
            let (_, tensor) =
                found.iter().find(|(found, _)| found == name).unwrap_or_else(|| panic!("{name}"));
            assert_eq!(tensor.kind(), Kind::Float, "{name}");
            tensor
        };
        assert!(named("logits").equal(&logits), "{base}");
        for (layer, weights) in attentions.iter().enumerate() {
            assert_eq!(weights.size(), [2, 4, 5, 5]);
            assert!(named(&format!("attentions.{layer}")).equal(weights));
        }
        for (i, states) in hidden_states.iter().enumerate() {
            assert_eq!(states.size(), [2, 5, 16]);
            assert!(named(&format!("hidden_states.{i}")).equal(states));
        }
        assert_eq!((attentions.len(), hidden_states.len(), found.len()), (2, 3, 6));
        assert_eq!(read_metadata(&place.path("deep/o.safetensors")).unwrap()["computed_in"], "f32");
    }
}

#[test]
fn a_head_mask_removes_heads_and_ones_change_no_bit() {
    let place = place("gpt2", Head::LanguageModel);
    place.write("ones.json", r#"{"mask": [[1, 1, 1, 1], [1, 1, 1, 1]]}"#);
    place.write("some.json", r#"{"mask": [[1, 0, 1, 1], [0, 1, 1, 0]]}"#);

    let plain = logits(&place, "");
    let masked = logits(&place, "--head-mask some.json");

    assert!(logits(&place, "--head-mask ones.json").equal(&plain));
    let heads = |row: [f32; 4]| Some(Gate::per_head(&Tensor::from_slice(&row)));
    let gates = [heads([1., 0., 1., 1.]), heads([0., 1., 1., 0.])];
    let expected = library(&place, &ForwardOptions { gates: &gates, ..ForwardOptions::default() });
    assert!(masked.equal(&expected.logits));
    assert!(relative_rms(&masked, &plain) > 1e-3);
}

#[test]
fn positions_are_counted_unless_asked_otherwise_or_given() {
    let place = place("gpt2", Head::LanguageModel);
    let last = |logits: Tensor| logits.get(1).narrow(0, 2, 3);
    let counted = last(logits(&place, ""));
    let arange = last(logits(&place, "--positions arange"));

    assert!(relative_rms(&arange, &counted) > 1e-3, "padding is in front");
    let given = IDS.replace("}", r#", "position_ids": [[0,1,2,3,4], [9,9,0,1,2]]}"#);
    place.write("ids.json", &given);
    assert!(last(logits(&place, "--positions arange")).equal(&counted));

    // Rows alone, without padding.
    place.write("ids.json", r#"{"input_ids": [[3, 4, 2]], "attention_mask": null}"#);
    assert_close("alone", &logits(&place, "").get(0), &counted, 1e-5);
}

#[test]
fn other_dtypes_compute_the_same_to_their_precision() {
    let place = place("llama", Head::LanguageModel);
    let exact = logits(&place, "--dtype f64");
    // Real tokens alone: what a padded query outputs is unspecified.
    let real = |logits: Tensor| Tensor::cat(&[logits.get(0), logits.get(1).narrow(0, 2, 3)], 0);
    let exact = real(exact);
    for (dtype, tolerance, at_least) in
        [("f32", 1e-5, 1e-9), ("bf16", 2e-2, 1e-4), ("f16", 5e-3, 1e-5)]
    {
        let found = real(logits(&place, &format!("--dtype {dtype}")));
        assert_eq!(found.kind(), Kind::Float);
        let error = relative_rms(&found, &exact);
        assert!((at_least..tolerance).contains(&error), "{dtype}: {error:.2e}");
    }
}

#[test]
fn a_config_alone_makes_random_weights_by_seed() {
    let place = place("distilbert", Head::LanguageModel);
    std::fs::remove_file(place.path("m/model.safetensors")).unwrap();

    let first = logits(&place, "--init random --seed 1");

    assert!(logits(&place, "--init random --seed 1").equal(&first));
    assert!(!logits(&place, "--init random --seed 2").equal(&first));
    place.refused(
        "forward --model m --input-ids ids.json --out x.safetensors",
        &["cannot load the model `m`", "model.safetensors"],
    );
    let usage = place.attn("forward --model m --input-ids ids.json --out o --seed 1");
    assert_eq!(usage.code, 2, "a seed without --init would do nothing");
}

#[test]
fn wrong_ids_are_refused_with_file_field_and_hint() {
    let place = place("gpt2", Head::LanguageModel);
    for (text, parts) in [
        (
            r#"{"input_ids": [[1, 2], [3]]}"#,
            &["`input_ids`", "2 in row 0, 1 in row 1", "attention_mask"][..],
        ),
        (r#"{"input_ids": [1, 2]}"#, &["`input_ids[0]` is 1", "[[5, 6, 7]]"]),
        (
            r#"{"input_ids": [["a"]]}"#,
            &["`input_ids[0][0]` is the text \"a\"", "a whole number from 0"],
        ),
        (r#"{"input_ids": [[1.5]]}"#, &["`input_ids[0][0]` is 1.5"]),
        (r#"{"input_ids": [[-1]]}"#, &["`input_ids[0][0]` is -1"]),
        (r#"{"input_ids": "1 2"}"#, &["`input_ids` is the text"]),
        (r#"{"input_ids": []}"#, &["`input_ids` is empty"]),
        (r#"{"input_ids": [[]]}"#, &["`input_ids[0]` is empty"]),
        (r#"{}"#, &["has no `input_ids`", "hint:"]),
        (r#"{"input_ids": [[1]], "atention_mask": [[1]]}"#, &["unknown field `atention_mask`"]),
        (
            r#"{"input_ids": [[1, 2]], "attention_mask": [[1, 2]]}"#,
            &["`attention_mask[0][1]` is 2", "0 or 1"],
        ),
        (
            r#"{"input_ids": [[1, 2]], "attention_mask": [[1]]}"#,
            &["`attention_mask` is 1 x 1, expected 1 x 2"],
        ),
        (r#"{"input_ids": [[1, 2]], "position_ids": [[0, -1]]}"#, &["`position_ids[0][1]` is -1"]),
        (r#"{"input_ids": [[1, 2]], "position_ids": [[0, 32]]}"#, &["position 32", "table of 32"]),
        (r#"{"input_ids": [[1, 40]]}"#, &["holds 40, expected 0 to 39"]),
        (r#"[[1, 2]]"#, &["holds a list, expected an object with `input_ids`"]),
        (r#"{"input_ids": "#, &["is not JSON"]),
    ] {
        place.write("bad.json", text);
        let stderr =
            place.refused("forward --model m --input-ids bad.json --out o.safetensors", parts);
        assert!(stderr.contains("`bad.json`"), "{stderr}");
        assert!(!place.path("o.safetensors").exists());
    }
    place.refused("forward --model m --input-ids none.json --out o", &["cannot read `none.json`"]);
    let long = format!(r#"{{"input_ids": [{:?}]}}"#, [1; 33]);
    place.write("bad.json", &long);
    place.refused(
        "forward --model m --input-ids bad.json --out o",
        &["position 32", "shorten the sequences to 32 tokens"],
    );
}

#[test]
fn wrong_head_masks_are_refused_with_file_field_and_hint() {
    let place = place("gpt2", Head::LanguageModel);
    for (text, parts) in [
        (r#"{"mask": [[1, 1, 1, 1]]}"#, &["`mask` has 1 rows, expected 2, one a layer"][..]),
        (
            r#"{"mask": [[1, 1, 1, 1], [1, 1]]}"#,
            &["`mask[1]` has 2 values, expected 4, one a head of layer 1"],
        ),
        (r#"{"mask": [[1, 1, 1, 1], [1, 1, 1, 3]]}"#, &["`mask[1][3]` is 3, expected 0 or 1"]),
        (r#"{"mask": 1}"#, &["`mask` is 1"]),
        (r#"{"heads": [[1]]}"#, &["unknown field `heads`, expected `mask`"]),
        (r#"{}"#, &["has no `mask`", "layers x heads"]),
    ] {
        place.write("bad.json", text);
        let stderr = place.refused(
            "forward --model m --input-ids ids.json --head-mask bad.json --out o.safetensors",
            parts,
        );
        assert!(stderr.contains("`bad.json`"), "{stderr}");
        assert!(!place.path("o.safetensors").exists());
    }
}

#[test]
fn wrong_places_are_refused() {
    let place = place("gpt2", Head::LanguageModel);
    place.refused(
        "forward --model ./none --input-ids ids.json --out o",
        &["cannot load the model `./none`", "there is no folder `./none`"],
    );
    place.refused(
        "forward --model owner/name --input-ids ids.json --out o",
        &["owner/name", "offline mode forbids"],
    );
    std::fs::create_dir(place.path("run")).unwrap();
    std::fs::rename(place.path("m"), place.path("run/model")).unwrap();
    for init in ["", "--init random"] {
        place.refused(
            &format!("forward --model run --input-ids ids.json --out deep/o {init}"),
            &["cannot load the model `run`", "that of a run", "hint: the model is in `run/model`"],
        );
    }
    assert!(!place.path("deep").exists(), "folders made for the result go with it");
    std::fs::rename(place.path("run/model"), place.path("m")).unwrap();
    place.refused("forward --model hf --input-ids ids.json --out m", &["`m` is a folder"]);
    place.refused("forward --model m --input-ids ids.json --out ids.json/o", &["ids.json"]);
    place.refused("forward --model m --input-ids ids.json --out o --device gpu", &["`gpu`", "cpu"]);
}

#[test]
fn tokenized_texts_are_what_forward_reads() {
    let place = Place::new();
    model_folder(&place, "m", "distilbert", Head::LanguageModel);
    place.write("texts.txt", "the film I saw yesterday was dull\nthe song was fine\n");

    let mut command = place.command("tokenize --model m --file texts.txt");
    let ran = Ran::of(command.arg("the meal was good").output().unwrap());

    assert_eq!((ran.code, ran.stderr.as_str()), (0, ""));
    let tokenizer = TextTokenizer::from_folder(place.path("m")).unwrap();
    let texts = ["the meal was good", "the film I saw yesterday was dull", "the song was fine"];
    let ids = texts.map(|text| tokenizer.ids(text, true).unwrap());
    let cols = ids.iter().map(Vec::len).max().unwrap();
    let padded = |ids: &[u32], fill: u32| [ids, &vec![fill; cols - ids.len()]].concat();
    let found: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    let pad = tokenizer.pad_id().unwrap();
    assert_eq!(found["input_ids"], json!(ids.each_ref().map(|ids| padded(ids, pad))));
    let ones = ids.each_ref().map(|ids| padded(&vec![1; ids.len()], 0));
    assert_eq!(found["attention_mask"], json!(ones));
    assert_eq!(found.as_object().unwrap().len(), 2);

    place.write("ids.json", &ran.stdout);
    place.done("forward --model m --input-ids ids.json --out o.safetensors");
    assert_eq!(tensors(&place, "o.safetensors")[0].1.size()[..2], [3, cols as i64]);
    let words = place.done("tokenize --model m --tokens good");
    assert_eq!(words.stderr, "[CLS] good [SEP]\n");
    assert!(place.done("tokenize --model m good -v").stderr.contains("[CLS] good [SEP]"));
}

#[test]
fn texts_that_make_no_ids_are_refused() {
    let place = Place::new();
    model_folder(&place, "m", "gpt2", Head::LanguageModel);
    place.write("texts.txt", &format!("good\n{}\n", "bad ".repeat(33)));
    place.write("blank.txt", "good\n\nbad\n");
    place.write("empty.txt", "");

    place.refused(
        "tokenize --model m --file texts.txt",
        &["text 1 (counted from 0) has", "the model has 32 positions"],
    );
    place
        .refused("tokenize --model m --file blank.txt", &["text 1 (counted from 0) has no tokens"]);
    place.refused("tokenize --model m --file empty.txt", &["`empty.txt` is empty"]);
    place.refused("tokenize --model m --file none.txt", &["cannot read `none.txt`"]);
    place.refused("tokenize --model none good", &["neither a folder `none` nor a model"]);
}

/// Runs scripts/compare_forward.py in a Python that may have nothing but its own library.
fn compare(place: &Place, python: &str, arguments: &str) -> Ran {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../scripts/compare_forward.py");
    let mut command = std::process::Command::new(python);
    command.arg(script).args(arguments.split_whitespace()).current_dir(place.path(""));
    Ran::of(command.output().unwrap())
}

#[test]
fn the_comparison_says_in_one_line_what_it_cannot_compare() {
    let place = place("gpt2", Head::LanguageModel);
    std::fs::create_dir(place.path("run")).unwrap();
    save(&random_model(config("gpt2"), Head::Bare), &place.path("run/model"));
    place.write("swapped/config.json", r#"{"model_type": "attn_gpt2"}"#);
    place.write("empty/readme", "");
    place.write("far.json", r#"{"input_ids": [[5, 40]]}"#);
    place.write("text.json", "no");
    for (arguments, part) in [
        ("--model none --input-ids ids.json", "there is no folder `none`"),
        ("--model empty --input-ids ids.json", "no model folder"),
        ("--model run --input-ids ids.json", "the model is in `run/model`"),
        ("--model swapped --input-ids ids.json", "transformers has no such model"),
        ("--model m --input-ids far.json", "holds the id 40, and the model has ids from 0 to 39"),
        ("--model m --input-ids text.json", "`text.json` is not JSON"),
        ("--model m --input-ids none.json", "cannot read `none.json`"),
        ("--model m --input-ids ids.json", "there is no file `o.safetensors`"),
    ] {
        let ran = compare(&place, "python3", &format!("{arguments} --ours o.safetensors"));
        assert_eq!((ran.code, ran.stdout.as_str()), (2, ""), "{arguments}\n{}", ran.stderr);
        assert!(ran.stderr.starts_with("error: ") && ran.stderr.contains(part), "{}", ran.stderr);
        assert_eq!(ran.stderr.lines().count(), 1, "{}", ran.stderr);
    }
}

#[test]
fn transformers_computes_the_same() {
    let test = "transformers_computes_the_same";
    let Some(python) = common::python(test, "torch, transformers") else { return };
    let place = place("gpt2", Head::LanguageModel);
    place.done(
        "forward --model m --input-ids ids.json --attentions --hidden-states --out o.safetensors",
    );
    let arguments = "--model m --ours o.safetensors --input-ids";

    let ran = compare(&place, &python, &format!("{arguments} ids.json"));
    assert_eq!(ran.code, 0, "{}{}", ran.stdout, ran.stderr);
    assert!(ran.stdout.contains("0 of 6 tensors differ"), "{}", ran.stdout);
    place.write("other.json", r#"{"input_ids": [[5, 6, 7]]}"#);
    let ran = compare(&place, &python, &format!("{arguments} other.json"));
    assert_eq!(ran.code, 2, "{}{}", ran.stdout, ran.stderr);
    assert!(ran.stderr.contains("other ids or another model"), "{}", ran.stderr);
    place.write("o.safetensors", "torn");
    let ran = compare(&place, &python, &format!("{arguments} ids.json"));
    assert_eq!(ran.code, 2, "{}{}", ran.stdout, ran.stderr);
}

#[test]
fn a_swapped_layer_reads_the_sequence_under_source() {
    let place = Place::new();
    model_folder(&place, "m", "distilbert", Head::LanguageModel);
    place.done("swap --model m --attention cross --layers 1 --out x");
    let pair = r#"{"input_ids": [[5, 6, 7]], "source": {"input_ids": [[8, 9, 3, 4, 2]]}}"#;
    place.write("ids.json", pair);
    place.done(
        "forward --model x --input-ids ids.json --attentions --out o.safetensors --attention-table t.arrow",
    );
    let (model, _) = Model::load(&place.path("x"), &LoadOptions::default()).unwrap();
    let row = |ids: &[i64]| ModelInput::new(Tensor::from_slice(ids).unsqueeze(0));
    let input = row(&[5, 6, 7]).attending_to(row(&[8, 9, 3, 4, 2]));
    let expected = model.forward(&input, &ForwardOptions::default()).unwrap().logits;
    for (name, tensor) in tensors(&place, "o.safetensors") {
        match name.as_str() {
            "logits" => assert_close("logits", &tensor, &expected, 1e-6),
            "attentions.0" => assert_eq!(tensor.size(), [1, 4, 3, 3]),
            "attentions.1" => assert_eq!(tensor.size(), [1, 4, 3, 5]),
            other => panic!("{other}"),
        }
    }

    let run = "forward --model x --input-ids ids.json --out o.safetensors";
    for (text, parts) in [
        (r#"{"input_ids": [[5, 6, 7]]}"#, ["input `source`", "layer 1 attends"]),
        (r#"{"input_ids": [[5]], "source": [[5]]}"#, ["`source` is a list", "`input_ids`"]),
        (r#"{"input_ids": [[5]], "source": {"ids": [[5]]}}"#, ["`source.ids`", "`input_ids`"]),
        (r#"{"input_ids": [[5]], "source": {"input_ids": [[5], [6]]}}"#, ["2 rows", "expected 1"]),
    ] {
        place.write("ids.json", text);
        place.refused(run, &parts);
    }
    place.write("ids.json", pair);
    let plain = run.replace("--model x", "--model m");
    place.refused(&plain, &["input `source`", "no layer attends to another sequence"]);
}

#[test]
fn who_attends_to_whom_is_drawn() {
    let place = Place::new();
    model_folder(&place, "m", "distilbert", Head::LanguageModel);
    place.done("swap --model m --attention cross --layers 1 --out x");
    let ran = place.shell("attn heatmap --model m --text 'a good film' --heads 0,3 --out maps");
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let drawn: Vec<&str> = ran.stdout.lines().collect();
    let expected = [
        "maps/layer-0-head-0.png",
        "maps/layer-0-head-3.png",
        "maps/layer-1-head-0.png",
        "maps/layer-1-head-3.png",
    ];
    assert_eq!(drawn, expected);
    for file in expected {
        assert_eq!(&place.bytes(file)[1..4], b"PNG", "{file}");
    }
    let ran = place.shell(
        "attn heatmap --model x --text 'a good film' --text-pair 'a film' --layers 1 --out maps",
    );
    assert_eq!((ran.code, ran.stdout.trim()), (0, "maps/layer-1.png"), "{}", ran.stderr);
    place.refused("heatmap --model x --text a --out maps", &["layer 1 attends", "two texts"]);
    place.refused(
        "heatmap --model m --text a --heads 4 --out maps",
        &["head 4", "layer 0 has the heads [0, 1, 2, 3]"],
    );
    place.refused("heatmap --model m --text a --layers 2 --out maps", &["no layer 2"]);
}
