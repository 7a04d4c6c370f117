//! Generated text is transformers', token for token, and a row does not depend on its batch.

use std::{fs, ops::ControlFlow, path::Path};

use attn_core::{
    Config, Error, ForwardOptions, Gate, LoadOptions, Model, ModelInput, Rows, Variant,
    generate::{Ending, Generated, Limits, Sampling, generate, generate_gated},
    testing::{assert_close, random_ids},
};
use serde::Deserialize;
use serde_json::json;
use tch::{IndexOp, Kind, Tensor};

#[derive(Deserialize)]
struct Golden {
    runs: Vec<Run>,
}

#[derive(Deserialize)]
struct Run {
    prompt: Vec<i64>,
    repetition_penalty: f64,
    expected: Vec<i64>,
}

/// The golden cases that hold generated text, with their models.
fn goldens() -> Vec<(String, Model, Vec<Run>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut cases = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let dir = entry.unwrap().path();
        let Ok(text) = fs::read_to_string(dir.join("generated.json")) else { continue };
        let golden: Golden = serde_json::from_str(&text).unwrap();
        let (model, _) = Model::load(&dir, &LoadOptions::default()).unwrap();
        cases.push((dir.file_name().unwrap().to_string_lossy().into_owned(), model, golden.runs));
    }
    assert_eq!(cases.len(), 5);
    cases
}

fn limits(max_new_tokens: usize) -> Limits {
    Limits { max_new_tokens, stop_ids: Vec::new() }
}

fn all(model: &Model, prompts: &[Vec<i64>], sampling: &Sampling, n: usize) -> Vec<Generated> {
    generate(model, prompts, sampling, &limits(n), &mut |_, _| ControlFlow::Continue(())).unwrap()
}

#[test]
fn greedy_output_is_transformers_token_for_token() {
    for (name, model, runs) in goldens() {
        for Run { prompt, repetition_penalty, expected } in runs {
            let sampling = Sampling { repetition_penalty, ..Sampling::default() };
            let prompts = [prompt];
            let out = all(&model, &prompts, &sampling, expected.len());
            assert_eq!(out[0].ids, expected, "{name}: {prompts:?}, penalty {repetition_penalty}");
            assert_eq!(out[0].ending, Ending::Length);
        }
    }
}

#[test]
fn rows_of_several_lengths_do_not_depend_on_each_other() {
    for (name, model, runs) in goldens() {
        let prompts: Vec<Vec<i64>> = runs.into_iter().map(|run| run.prompt).collect();
        let sampling = Sampling {
            temperature: 0.9,
            top_k: Some(12),
            top_p: 0.95,
            seed: 3,
            ..Sampling::default()
        };
        let batch = all(&model, &prompts[..2], &Sampling::default(), 8);
        for (row, prompt) in prompts[..2].iter().enumerate() {
            let alone = all(&model, std::slice::from_ref(prompt), &Sampling::default(), 8);
            assert_eq!(batch[row], alone[0], "{name}, row {row}");
        }
        let alone = all(&model, &prompts[..1], &sampling, 8);
        let drawn = all(&model, &prompts[..3], &sampling, 8);
        assert_eq!(alone[0], drawn[0], "{name}: drawn with the same seed");
    }
}

/// Two layers of four heads on two key/value heads, in `f64`.
fn small_llama() -> Model {
    let config = Config::from_json(
        json!({
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 31, "hidden_size": 16,
            "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "initializer_range": 0.3
        })
        .as_object()
        .unwrap()
        .clone(),
    )
    .unwrap();
    let options = LoadOptions { kind: Kind::Double, ..LoadOptions::default() };
    Model::init(config, &options).unwrap()
}

#[test]
fn each_kind_decodes_as_a_full_pass_would() {
    for variant in attn_core::testing::kinds() {
        if matches!(variant, Variant::Cross(_)) {
            continue; // refuses decoders
        }
        let mut model = small_llama();
        model.swap(&[0, 1], &variant, 1).unwrap();
        let mut ids = vec![5, 9, 2];
        let out = all(&model, &[ids.clone()], &Sampling::default(), 10);
        for &id in &out[0].ids {
            let input = ModelInput::new(Tensor::from_slice(&ids).unsqueeze(0));
            let logits = tch::no_grad(|| model.forward(&input, &ForwardOptions::default()));
            let expected = logits.unwrap().logits.i((0, -1)).argmax(-1, false).int64_value(&[]);
            assert_eq!(id, expected, "{}, after {ids:?}", variant.name());
            ids.push(id);
        }
    }
}

#[test]
fn each_kind_decodes_rows_of_several_lengths() {
    let (_, plain, _) = goldens().swap_remove(0);
    let vocab_size = plain.config().sizes.vocab_size;
    let prompt =
        |seed: i64, n: i64| (0..n).map(|i| (seed + i * i) % vocab_size).collect::<Vec<_>>();
    let prompts = [prompt(1, 4), prompt(2, 9), prompt(3, 4)];
    let drawn = Sampling { temperature: 0.8, seed: 5, ..Sampling::default() };
    for variant in attn_core::testing::kinds() {
        if matches!(variant, Variant::Cross(_)) {
            continue; // refuses decoders
        }
        let (_, mut model, _) = goldens().swap_remove(0);
        model.swap(&[0], &variant, 1).unwrap();
        model.to_kind(Kind::Double);
        let mut seen = vec![Vec::new(); 3];
        let both = generate(&model, &prompts, &drawn, &limits(5), &mut |row, id| {
            seen[row].push(id);
            ControlFlow::Continue(())
        });
        for (row, out) in both.unwrap().into_iter().enumerate() {
            assert_eq!(out.ids, seen[row], "{}, row {row}", variant.name());
            let alone = all(&model, &prompts[row..=row], &Sampling::default(), 5);
            let among = all(&model, &prompts, &Sampling::default(), 5).swap_remove(row);
            assert_eq!(among, alone[0], "{}, row {row}", variant.name());
        }
    }
}

#[test]
fn a_row_ends_at_a_stop_id_or_where_the_caller_says_so() {
    let (_, model, runs) = goldens().swap_remove(0);
    let Run { prompt, expected, .. } = &runs[0];
    let first_of = |id: i64| expected.iter().position(|&x| x == id).unwrap() + 1;
    let stop = expected[2];
    let limits = Limits { max_new_tokens: 12, stop_ids: vec![stop] };
    let prompts = [prompt.clone()];
    let greedy = Sampling::default();

    let mut seen = Vec::new();
    let out = generate(&model, &prompts, &greedy, &limits, &mut |row, id| {
        assert_eq!(row, 0);
        seen.push(id);
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!(out[0].ids, expected[..first_of(stop)]);
    assert_eq!((out[0].ending, &seen), (Ending::StopId, &out[0].ids));

    let limits = Limits { stop_ids: Vec::new(), ..limits };
    let out =
        generate(&model, &prompts, &greedy, &limits, &mut |_, _| ControlFlow::Break(())).unwrap();
    assert_eq!((out[0].ids.len(), out[0].ending), (1, Ending::Caller));
}

#[test]
fn no_temperature_is_too_low_and_broken_logits_are_no_text() {
    let (_, model, runs) = goldens().swap_remove(0);
    let prompts = [runs[0].prompt.clone()];
    let greedy = all(&model, &prompts, &Sampling::default(), 8);
    let cold = Sampling { temperature: 1e-300, ..Sampling::default() };
    assert_eq!(all(&model, &prompts, &cold, 8), greedy);

    let _ = tch::no_grad(|| model.parameters()[0].1.get(0).fill_(f64::NAN));
    let ids = [vec![0]];
    let never = &mut |_: usize, _: i64| ControlFlow::Continue(());
    for sampling in [Sampling::default(), cold] {
        let error = generate(&model, &ids, &sampling, &limits(3), never).unwrap_err();
        assert!(matches!(error, Error::NotFinite { row: 0, token: 0 }), "{error}");
    }
}

#[test]
fn a_state_serves_its_own_batch() {
    let (_, model, _) = goldens().swap_remove(0);
    let mut state = model.start();
    let input =
        |rows: i64| ModelInput::new(Tensor::ones([rows, 2], (Kind::Int64, tch::Device::Cpu)));
    let options = ForwardOptions::default();
    model.step(&input(2), &mut state, &options).unwrap();
    let error = model.step(&input(3), &mut state, &options).unwrap_err().to_string();
    assert!(error.contains("has 3 rows, and the state was begun with 2"), "{error}");
}

#[test]
fn attention_rows_of_decoding_are_those_of_a_full_pass() {
    let mut shown = Vec::new();
    for variant in attn_core::testing::kinds() {
        if matches!(variant, Variant::Cross(_)) {
            continue; // refuses decoders
        }
        let (name, mut model) = (variant.name(), small_llama());
        model.swap(&[0, 1], &variant, 1).unwrap();
        let ids = random_ids(3, [2, 19], 31);
        let all = ForwardOptions { attentions: Rows::All, ..ForwardOptions::default() };
        let last = |n: i64| ForwardOptions {
            attentions: Rows::Some(vec![n - 1]),
            ..ForwardOptions::default()
        };
        let full = tch::no_grad(|| model.forward(&ModelInput::new(ids.shallow_clone()), &all));
        let full = full.unwrap().attentions;
        let mut state = model.start();
        let mut at = 0;
        // The prompt in two pieces, then token by token.
        for n in [7, 5].into_iter().chain([1; 7]) {
            let input = ModelInput::new(ids.narrow(1, at, n));
            let step = tch::no_grad(|| model.step(&input, &mut state, &last(n)));
            at += n;
            let rows = match step {
                Ok(output) => output.attentions,
                Err(error) => {
                    assert!(
                        matches!(error, Error::Refused { kind, .. } if kind == name),
                        "{error}"
                    );
                    assert!(error.to_string().contains("hint: run the whole text"), "{error}");
                    break;
                }
            };
            for (layer, rows) in rows.iter().enumerate() {
                let expected = full[layer].narrow(2, at - 1, 1).narrow(3, 0, at);
                assert_close(&format!("{name}, layer {layer}, {at}"), rows, &expected, 1e-12);
            }
            if at == ids.size()[1] {
                shown.push(name);
            }
        }
    }
    assert_eq!(
        shown,
        ["softmax", "gated", "routed", "big_bird", "moba"],
        "kinds that keep all keys"
    );
}

#[test]
fn attention_rows_of_a_padded_batch_are_those_of_each_row() {
    let model = small_llama();
    let rows = ForwardOptions { attentions: Rows::Some(vec![0]), ..ForwardOptions::default() };
    let ids = random_ids(4, [2, 9], 31);
    let (keep, n_pad) = (Tensor::ones([2, 9], (Kind::Int64, tch::Device::Cpu)), 3);
    let _ = keep.i((1, ..n_pad)).fill_(0);
    let mut state = model.start();
    let prompt = ModelInput::masked(ids.narrow(1, 0, 8), keep.narrow(1, 0, 8));
    model.step(&prompt, &mut state, &ForwardOptions::default()).unwrap();
    let both = model.step(&ModelInput::new(ids.narrow(1, 8, 1)), &mut state, &rows).unwrap();
    for (row, from) in [(0, 0), (1, n_pad)] {
        let alone = ModelInput::new(ids.narrow(0, row, 1).narrow(1, from, 9 - from));
        let last =
            ForwardOptions { attentions: Rows::Some(vec![8 - from]), ..ForwardOptions::default() };
        let expected = model.forward(&alone, &last).unwrap().attentions;
        for (layer, expected) in expected.iter().enumerate() {
            let found = both.attentions[layer].narrow(0, row, 1);
            let name = format!("row {row}, layer {layer}");
            assert_close(&name, &found.narrow(3, from, 9 - from), expected, 1e-12);
            assert_eq!(found.narrow(3, 0, from).abs().sum(Kind::Double).double_value(&[]), 0.0);
        }
    }
}

#[test]
fn gates_hold_while_decoding() {
    let model = small_llama();
    let gate = |closed: &[f64]| Some(Gate::per_head(&Tensor::from_slice(closed)));
    let gates = [gate(&[1.0, 0.0, 1.0, 1.0]), gate(&[0.0, 1.0, 1.0, 0.0])];
    let greedy = Sampling::default();
    let go_on = &mut |_: usize, _: i64| ControlFlow::Continue(());
    let mut ids = vec![5, 9, 2];
    let prompts = [ids.clone()];
    let out = generate_gated(&model, &prompts, &greedy, &limits(10), &gates, go_on).unwrap();
    let open = all(&model, &prompts, &greedy, 10);
    assert_ne!(out, open, "a test of nothing");
    for &id in &out[0].ids {
        let input = ModelInput::new(Tensor::from_slice(&ids).unsqueeze(0));
        let options = ForwardOptions { gates: &gates, ..ForwardOptions::default() };
        let logits = tch::no_grad(|| model.forward(&input, &options)).unwrap().logits;
        assert_eq!(id, logits.i((0, -1)).argmax(-1, false).int64_value(&[]), "after {ids:?}");
        ids.push(id);
    }
    let error = generate_gated(&model, &prompts, &greedy, &limits(1), &gates[..1], go_on);
    assert!(error.unwrap_err().to_string().contains("expected one for each of 2 layers"));
}

#[test]
fn what_cannot_be_generated_is_refused_by_name() {
    let (_, model, _) = goldens().into_iter().find(|(name, ..)| name == "gpt2_lm_tied").unwrap();
    let rows = model.config().sizes.position_table.unwrap() as usize;
    let refusal = |prompts: &[Vec<i64>], n: usize| -> String {
        let never = &mut |_: usize, _: i64| ControlFlow::Continue(());
        let error = generate(&model, prompts, &Sampling::default(), &limits(n), never).unwrap_err();
        assert!(matches!(error, Error::Input { .. }), "{error}");
        error.to_string()
    };
    assert!(refusal(&[], 1).contains("there is none"));
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/distilbert_mlm_tied");
    let (encoder, _) = Model::load(&folder, &LoadOptions::default()).unwrap();
    let never = &mut |_: usize, _: i64| ControlFlow::Continue(());
    let greedy = Sampling::default();
    let error = generate(&encoder, &[vec![1; 99]], &greedy, &limits(99), never).unwrap_err();
    assert!(error.to_string().contains("distilbert is an encoder"), "{error}");
    assert!(refusal(&[vec![1], vec![]], 1).contains("row 1 has no token"));
    let long = refusal(&[vec![1; 4]], rows - 2);
    assert!(long.contains(&format!("at most {} new tokens", rows - 3)), "{long}");
    assert_eq!(all(&model, &[vec![1; 4]], &Sampling::default(), rows - 3)[0].ids.len(), rows - 3);
    assert!(refusal(&[vec![99]], 1).contains("input_ids"), "an id beyond the vocabulary");
}
