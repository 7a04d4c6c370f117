//! Faults of notebooks and programs, planted one by one in what `attn verify` is given, in what training tries before its first step, and
//! in what documents with needles are checked by; and the law that names each. Those of attention kinds and of heads are planted in
//! `attn-core/tests/model_laws.rs` (attending to the future, masks of the wrong polarity, rows in place of heads, slices behind the output
//! projection), those of a step in `attn-train/src/probe.rs`.

mod common;

use std::{
    fs,
    path::{Path, PathBuf},
};

use attn_core::{
    ForwardOptions, LoadOptions, Model,
    attention::{Projections, Stream},
    checkpoint::{WriteOptions, read_tensors, write_tensors},
};
use attn_data::{
    needle::{Haystack, NeedleKind, Recipe},
    tokenizer::TextTokenizer,
};
use attn_train::{Batch, Distillation, Losses, Objective, a_loss_is_what_it_is_called};
use common::Place;
use serde_json::{Value, json};
use tch::{Kind, Tensor};

fn bundled(model: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../results/models").join(model)
}

fn load(model: &str) -> Model {
    Model::load(&bundled(model), &LoadOptions::default()).unwrap().0
}

/// Saves `model` as the folder `to`, with the tokenizer of the bundled model `of`.
fn save(model: &Model, of: &str, place: &Place, to: &str) {
    model.save(&place.path(to), &WriteOptions::default()).unwrap();
    TextTokenizer::from_folder(bundled(of)).unwrap().save(place.path(to)).unwrap();
}

/// The bundled GPT-2 as `faulty`, once `change` has been at each parameter.
fn changed(place: &Place, change: impl Fn(&str, &mut Tensor)) {
    let model = load("wikitext-gpt2");
    for (name, mut tensor) in model.parameters() {
        tch::no_grad(|| change(&name, &mut tensor));
    }
    save(&model, "wikitext-gpt2", place, "faulty");
}

/// The bundled GPT-2 as `faulty`, once `change` has been at a JSON file of it.
fn with_json(place: &Place, file: &str, change: impl Fn(&mut Value)) {
    save(&load("wikitext-gpt2"), "wikitext-gpt2", place, "faulty");
    let mut value = place.json(&format!("faulty/{file}"));
    change(&mut value);
    place.write(&format!("faulty/{file}"), &value.to_string());
}

/// The bundled GPT-2 as `faulty`, once `change` has been at the tensors of its file.
fn with_tensors(place: &Place, change: impl Fn(&mut Vec<(String, Tensor)>)) {
    save(&load("wikitext-gpt2"), "wikitext-gpt2", place, "faulty");
    let path = place.path("faulty").join("model.safetensors");
    let mut tensors = read_tensors(&path).unwrap();
    change(&mut tensors);
    fs::remove_file(&path).unwrap();
    write_tensors(&path, &tensors, &Default::default()).unwrap();
}

/// Two models that look up words alone, `teacher` the one that is read and `faulty` the one before it.
fn one_late(place: &Place) {
    let model = load("wikitext-gpt2");
    let width = model.config().sizes.hidden_size;
    let one = Tensor::eye(width, (Kind::Float, model.device()));
    for (name, mut tensor) in model.parameters() {
        tch::no_grad(|| {
            if name.contains("c_proj") || name.contains("wpe") || name.contains("c_attn") {
                let _ = tensor.zero_();
            }
            if name.ends_with("h.0.attn.c_attn.weight") {
                tensor.narrow(1, 2 * width, width).copy_(&one);
            }
            if name.ends_with("h.0.attn.c_proj.weight") {
                tensor.copy_(&(&one * 1000.0));
            }
        });
    }
    save(&model, "wikitext-gpt2", place, "words");
    for (basis, to) in [("shift:0", "teacher"), ("shift:1", "faulty")] {
        let set = format!(r#"--set basis=["{basis}"]"#);
        place.done(&format!(
            "swap --model words --attention mask_mixture {set} --layers 0 --out {to}"
        ));
    }
}

/// Twice the key/value heads of the bundled Llama, copies one behind the other where each should stand beside its own.
fn tiled(place: &Place) {
    let mut model = load("needle-llama");
    for layer in 0..model.layers().len() {
        let of = model.layers()[layer];
        let n = of.dims().n_kv_heads;
        let twice = |(weight, bias): (Tensor, Option<Tensor>)| {
            (weight.repeat([2, 1]), bias.map(|bias| bias.repeat([2])))
        };
        let Projections { q, k, v } = of.projections();
        let groups: Vec<Vec<i64>> = (0..2 * n).map(|head| vec![head / 2]).collect();
        let out = of.out().out_in();
        model
            .regroup_kv(layer, &groups, Projections { q, k: twice(k), v: twice(v) }, &out)
            .unwrap();
    }
    save(&model, "needle-llama", place, "faulty");
}

/// A fault of a folder.
struct Fault {
    what: &'static str,
    plant: fn(&Place),
    /// What `verify` is told beside the model.
    flags: &'static str,
    /// The law that it breaks, and what is said of the place.
    law: &'static str,
    place: &'static str,
}

const FAULTS: &[Fault] = &[
    Fault {
        what: "one module in the place of all layers",
        plant: |place| {
            let model = load("wikitext-gpt2");
            let all = model.parameters();
            changed(place, |name, tensor| {
                let first = name.replace("h.2.", "h.1.");
                if name.contains("h.2.attn.c_attn") {
                    tensor.copy_(&all.iter().find(|it| it.0 == first).unwrap().1);
                }
            });
        },
        flags: "--quick",
        law: "every_layer_has_an_attention_of_its_own",
        place: "layers 1 and 2 are one",
    },
    Fault {
        what: "an embedding that was never copied",
        plant: |place| {
            changed(place, |name, tensor| {
                if name.ends_with("wte.weight") {
                    let noise = Tensor::randn(tensor.size(), (Kind::Float, tensor.device()));
                    tensor.copy_(&(noise * 0.02));
                }
            });
        },
        flags: "--quick",
        law: "predictions_are_of_the_next_token",
        place: "nats for the token itself",
    },
    Fault {
        what: "a value that is no number",
        plant: |place| {
            changed(place, |name, tensor| {
                if name.ends_with("h.3.mlp.c_fc.weight") {
                    let _ = tensor.view([-1]).get(7).fill_(f64::NAN);
                }
            });
        },
        flags: "--quick",
        law: "every_parameter_is_finite",
        place: "h.3.mlp.c_fc.weight",
    },
    Fault {
        what: "a tensor that is missing",
        plant: |place| with_tensors(place, |all| all.retain(|it| !it.0.ends_with("h.0.ln_1.bias"))),
        flags: "--quick",
        law: "every_tensor_is_used_and_every_parameter_filled",
        place: "h.0.ln_1.bias",
    },
    Fault {
        what: "names that no parameter has",
        plant: |place| {
            with_tensors(place, |all| {
                let (_, tensor) = all.iter().find(|it| it.0.ends_with("h.0.ln_1.bias")).unwrap();
                all.push(("transformer.layer_norm.bias".into(), tensor.copy()));
            });
        },
        flags: "--quick",
        law: "every_tensor_is_used_and_every_parameter_filled",
        place: "layer_norm.bias",
    },
    Fault {
        what: "an output matrix of its own, where the config ties it",
        plant: |place| {
            with_tensors(place, |all| {
                let (_, tensor) = all.iter().find(|it| it.0.ends_with("wte.weight")).unwrap();
                let other = tensor + 0.1;
                all.push(("lm_head.weight".into(), other));
            });
        },
        flags: "--quick",
        law: "every_tensor_is_used_and_every_parameter_filled",
        place: "tie_word_embeddings",
    },
    Fault {
        what: "tokens that have no embedding",
        plant: |place| {
            with_json(place, "tokenizer.json", |json| {
                let token = json!({
                    "id": 6000, "content": "<new>", "single_word": false, "lstrip": false, "rstrip": false,
                    "normalized": false, "special": true,
                });
                json["added_tokens"].as_array_mut().unwrap().push(token);
            });
        },
        flags: "--quick",
        law: "config_tokenizer_and_embedding_fit",
        place: "ids up to 6000",
    },
    Fault {
        what: "a tokenizer that drops letters",
        plant: |place| {
            with_json(place, "tokenizer.json", |json| {
                json["normalizer"] =
                    json!({"type": "Replace", "pattern": {"String": "e"}, "content": ""});
            });
        },
        flags: "--quick",
        law: "letters_and_digits_come_back_from_tokens",
        place: "from letter",
    },
    Fault {
        what: "a tokenizer that does not put text together again",
        plant: |place| with_json(place, "tokenizer.json", |json| json["decoder"] = Value::Null),
        flags: "--quick",
        law: "what_is_decoded_has_the_same_tokens",
        place: "tokens of text",
    },
    Fault {
        what: "a config that ends texts by another token",
        plant: |place| with_json(place, "config.json", |json| json["eos_token_id"] = 17.into()),
        flags: "--quick",
        law: "config_and_tokenizer_name_the_same_special_tokens",
        place: "eos_token_id",
    },
    Fault {
        what: "a student that learned what the teacher says one token before",
        plant: one_late,
        flags: "--quick --against teacher",
        law: "predictions_are_nearest_where_they_are_aligned",
        place: "-1: 1e−8",
    },
    Fault {
        what: "copied key/value heads in the wrong order",
        plant: tiled,
        flags: "--quick --against needle-llama",
        law: "copied_key_value_heads_compute_the_same",
        place: "layer ",
    },
];

#[test]
fn every_fault_of_a_folder_is_named() {
    for Fault { what, plant, flags, law, place: at } in FAULTS {
        let place = Place::new();
        plant(&place);
        let flags = flags.replace("needle-llama", &bundled("needle-llama").display().to_string());
        let ran = place.attn(&format!("verify --model faulty {flags} --out v.json"));
        assert_eq!(ran.code, 1, "{what}: {}{}", ran.stdout, ran.stderr);
        let report = place.json("v.json");
        let is_broken = |line: &&Value| line["found"] == "broken" && line["law"] == **law;
        let broken = report["laws"].as_array().unwrap().iter().find(is_broken);
        let found = broken.unwrap_or_else(|| panic!("{what}: {}", ran.stdout));
        let said = found["place"].as_str().unwrap();
        assert!(said.contains(at), "{what}: {said}");
        assert!(ran.stdout.contains(&format!("BROKEN   {}", law.replace('_', " "))), "{what}");
    }
}

/// What a run of distillation tries before its first step, on the bundled GPT-2 and one with another attention.
#[test]
fn every_fault_of_a_distillation_is_named() {
    let (teacher, mut student) = (load("wikitext-gpt2"), load("wikitext-gpt2"));
    let window = serde_json::from_value(json!({"kind": "window", "size": 1})).unwrap();
    student.swap(&[0, 1, 2, 3], &window, 0).unwrap();
    let ids = Tensor::from_slice(&[11i64, 205, 340, 12, 77, 900, 13, 45]).view([1, 8]);
    let losses = Losses { forward_kl: 1.0, ..Losses::default() };
    let of = |teacher: &Model, student: &Model, batch: &Batch| {
        Distillation::new(teacher, student, &losses)?.loss(student, batch, Stream::default())
    };
    let late = |teacher: &Model, student: &Model, batch: &Batch| {
        let log_p = |model: &Model| -> Tensor {
            let options = ForwardOptions::default();
            let logits = model.forward(&batch.input(model), &options).unwrap().logits;
            logits.log_softmax(-1, Kind::Double)
        };
        let (p, q) = (log_p(teacher).roll([1], [1]), log_p(student));
        let kl: Tensor = p.exp() * (p - q);
        Ok(kl.sum_dim_intlist([-1i64].as_slice(), false, Kind::Double).mean(Kind::Double))
    };
    type Loss<'a> = &'a dyn Fn(&Model, &Model, &Batch) -> attn_train::Result<Tensor>;
    let cases: [(&str, bool, Loss<'_>); 3] = [
        ("as it should be", true, &of),
        ("KL from the student to the teacher", false, &|teacher, student, batch| {
            of(student, &teacher.alias_without_dropout()?, batch)
        }),
        ("the teacher's predictions of the token before", false, &late),
    ];
    for (what, holds, loss) in cases {
        let verdict = a_loss_is_what_it_is_called(&losses, &teacher, &student, &ids, loss);
        let verdict = verdict.unwrap().expect("the two are far apart");
        assert_eq!(verdict.held(), holds, "{what}: {verdict}");
    }
}

/// As in the notebook that looked for full stops by the ids of another tokenizer, and found none.
#[test]
fn a_needle_in_front_of_a_text_without_borders_is_refused() {
    let text = fs::read_to_string(
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../data/sample_text.txt"),
    );
    let text = text.unwrap();
    let tokenizer = TextTokenizer::from_folder(bundled("needle-llama")).unwrap();
    let document = |text: &str, depth: f64| {
        let recipe = Recipe {
            kinds: vec![NeedleKind::Passkey],
            words: None,
            most_needles: 1,
            asks: 1,
            fill: 1.0,
            depth: Some(depth),
            distractors: 0,
            max_len: 1000,
        };
        let haystack = Haystack::new(&[text], &tokenizer).unwrap();
        haystack.document(&recipe, &tokenizer, 0, 0).unwrap()
    };
    document(&text, 0.5).check_depth(0, 0.5, &tokenizer).unwrap();
    let error = document(&text, 0.0).check_depth(0, 0.5, &tokenizer).unwrap_err().to_string();
    assert!(error.contains("was to stand at 0.50 of its document and stands at 0.00"), "{error}");

    let place = Place::new();
    let words: Vec<&str> = text.split_whitespace().take(6000).collect();
    place.write("endless.txt", &words.join(" ").replace(['.', '!', '?'], ""));
    let model = bundled("needle-llama").display().to_string();
    place.refused(
        &format!("needle --model {model} --haystack endless.txt --lengths 200 --depths 3 --trials 1 --out n.json"),
        &["a needle was to stand at 0.50", "hint: needles are put between sentences"],
    );
}
