//! Layers whose heads are closed for whole texts, which then do less work: they must put out what they would with all of it.

use attn_core::{
    Config, Fill, ForwardOptions, Gate, LoadOptions, Model, ModelInput, Variant,
    layer::AttnLayer,
    testing::{assert_close, randn, random_ids},
};
use serde_json::{Value, json};
use tch::{Kind, Tensor};

fn model(base: &str, kind: Kind) -> Model {
    let value = match base {
        "bert" => json!({
            "model_type": "bert", "architectures": ["BertForMaskedLM"], "vocab_size": 50, "hidden_size": 24,
            "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 48,
        }),
        "distilbert" => json!({
            "model_type": "distilbert", "architectures": ["DistilBertForMaskedLM"], "vocab_size": 50, "dim": 24,
            "hidden_dim": 40, "n_layers": 3, "n_heads": 4, "max_position_embeddings": 48,
        }),
        other => unreachable!("{other}"),
    };
    let Value::Object(map) = value else { unreachable!("written as an object above") };
    let options = LoadOptions { kind, seed: 3, ..LoadOptions::default() };
    let mut model = Model::init(Config::from_json(map).unwrap(), &options).unwrap();
    let by_text: Variant = serde_json::from_str(r#"{"kind": "routed", "by": "text"}"#).unwrap();
    model.swap(&[0, 1, 2], &by_text, 1).unwrap();
    model
}

/// Routers that close about half of the heads, other ones for other texts.
fn shake(model: &Model) {
    for (i, (name, tensor)) in model.parameters().iter().enumerate() {
        let drawn = randn(1000 + i as u64, &tensor.size());
        let value = match (name.contains("router.weight"), name.contains("router.bias")) {
            (true, _) => drawn * 3.0,
            (_, true) => drawn - 0.3,
            _ => drawn * 0.2 + tensor.to_kind(Kind::Double),
        };
        tch::no_grad(|| tensor.shallow_clone().copy_(&value));
    }
}

/// Texts, enough of them to have the same heads now and then.
const ROWS: i64 = 120;

/// Rows of 47 tokens, some of them padded.
fn input() -> ModelInput {
    let lengths: Vec<i64> = (0..ROWS).map(|row| [47, 20, 47, 33, 47][row as usize % 5]).collect();
    let keep = Tensor::from_slice(&lengths).unsqueeze(1);
    let keep = keep.gt_tensor(&Tensor::arange(47, (Kind::Int64, tch::Device::Cpu)));
    ModelInput::masked(random_ids(4, [ROWS, 47], 50), keep.to_kind(Kind::Int64))
}

/// The share of pairs of text and head that are open, by layer.
fn open(model: &Model) -> Vec<f64> {
    let options = ForwardOptions { attention_inputs: true, ..ForwardOptions::default() };
    let input = input();
    let mask = attn_core::Mask::with_keep(false, input.attention_mask.as_ref().unwrap());
    let inputs = model.forward(&input, &options).unwrap().attention_inputs;
    let share = |(layer, hidden): (&&AttnLayer, &Tensor)| {
        let gates = layer.kind().routes().unwrap().open(hidden, &mask);
        assert_eq!(gates.size(), [ROWS, layer.dims().n_heads, 1]);
        gates.gt(0.0).to_kind(Kind::Double).mean(Kind::Double).double_value(&[])
    };
    model.layers().iter().zip(&inputs).map(share).collect()
}

#[test]
fn heads_that_do_not_run_are_not_missed() {
    for (kind, tolerance) in [(Kind::Double, 1e-12), (Kind::Float, 1e-5)] {
        for base in ["bert", "distilbert"] {
            let mut model = model(base, kind);
            shake(&model);
            let compare = |model: &Model, name: &str| {
                let shares = open(model);
                assert!(
                    shares.iter().any(|share| (0.2..0.8).contains(share)),
                    "{name}: {shares:?}"
                );
                let sparse = model.forward(&input(), &ForwardOptions::default()).unwrap().logits;
                // Whoever asks for the heads' outputs has them all made.
                let options = ForwardOptions { z: true, ..ForwardOptions::default() };
                let dense = model.forward(&input(), &options).unwrap().logits;
                let real = input().attention_mask.unwrap().ne(0).unsqueeze(-1);
                let cut = |x: &Tensor| x.masked_fill(&real.logical_not(), 0.0);
                assert_close(name, &cut(&sparse), &cut(&dense), tolerance);
                // Gates on heads of their own: other ones for other rows, and ones, which change no bit.
                let gates = |value: &dyn Fn(i64) -> Tensor| -> Vec<Option<Gate>> {
                    let of = |layer: &&AttnLayer| {
                        Some(Gate { g: value(layer.dims().n_heads), fill: Fill::Zero })
                    };
                    model.layers().iter().map(of).collect()
                };
                let drawn = gates(&|heads| randn(8, &[ROWS, heads, 1, 1]).to_kind(kind));
                let options = ForwardOptions { gates: &drawn, ..ForwardOptions::default() };
                let sparse_gated = model.forward(&input(), &options).unwrap().logits;
                let options = ForwardOptions { z: true, ..options };
                let dense_gated = model.forward(&input(), &options).unwrap().logits;
                assert_close(name, &cut(&sparse_gated), &cut(&dense_gated), tolerance);
                let ones = gates(&|heads| Tensor::ones([1, heads, 1, 1], (kind, tch::Device::Cpu)));
                let options = ForwardOptions { gates: &ones, ..ForwardOptions::default() };
                assert!(model.forward(&input(), &options).unwrap().logits.equal(&sparse));

                let at = Tensor::from_slice(&[3i64, 150, 2000]);
                let options = ForwardOptions { logits_at: Some(&at), ..ForwardOptions::default() };
                let some = model.forward(&input(), &options).unwrap().logits;
                let expected = dense.flatten(0, 1).index_select(0, &at);
                assert_close(name, &some, &expected, tolerance);
            };
            compare(&model, base);
            // Without one of the heads.
            model.select_heads(1, &[0, 2, 3]).unwrap();
            compare(&model, &format!("{base} without a head"));
        }
    }
}

#[test]
fn nothing_is_made_of_a_closed_head() {
    let model = model("distilbert", Kind::Double);
    let poison = |part: &str, rows: i64, value: f64| {
        for (name, tensor) in model.parameters() {
            if name.contains(part) {
                let _ = tch::no_grad(|| tensor.narrow(0, rows, tensor.size()[0] / 4).fill_(value));
            }
        }
    };
    poison("router.bias", 1, -1.0); // the second of four heads is closed for every text
    poison("q_lin", 6, f64::NAN);
    poison("v_lin", 6, f64::NAN);
    let is_finite = |z: bool| {
        let options = ForwardOptions { z, ..ForwardOptions::default() };
        let logits = model.forward(&input(), &options).unwrap().logits;
        logits.isfinite().all().int64_value(&[]) == 1
    };
    assert!(is_finite(false), "the short way is taken");
    assert!(!is_finite(true), "all heads are made where their outputs are asked for");
}

#[test]
fn a_model_all_of_whose_heads_are_closed_still_runs() {
    let model = model("bert", Kind::Double);
    for (name, tensor) in model.parameters() {
        if name.contains("router.bias") {
            let _ = tch::no_grad(|| tensor.shallow_clone().fill_(-9.0));
        }
    }
    assert!(open(&model).iter().all(|&share| share == 0.0));
    let sparse = model.forward(&input(), &ForwardOptions::default()).unwrap().logits;
    let options = ForwardOptions { z: true, ..ForwardOptions::default() };
    assert_close(
        "nothing runs",
        &sparse,
        &model.forward(&input(), &options).unwrap().logits,
        1e-12,
    );
}

#[test]
fn gradients_are_those_of_all_the_work() {
    let model = model("distilbert", Kind::Double);
    shake(&model);
    let gradients = |z: bool| {
        let parameters = model.parameters();
        for (_, tensor) in &parameters {
            let mut tensor = tensor.set_requires_grad(true);
            tensor.zero_grad();
        }
        let options = ForwardOptions { z, ..ForwardOptions::default() };
        let real = input().attention_mask.unwrap().ne(0).unsqueeze(-1);
        let logits = model.forward(&input(), &options).unwrap().logits;
        logits.masked_fill(&real.logical_not(), 0.0).square().sum(Kind::Double).backward();
        let of = |(name, tensor): (String, Tensor)| {
            let gradient = tensor.grad();
            (name, gradient.defined().then(|| gradient.copy()))
        };
        parameters.into_iter().map(of).collect::<Vec<_>>()
    };
    for ((name, dense), (_, sparse)) in gradients(true).into_iter().zip(gradients(false)) {
        // The bias of keys moves all scores of a query alike, and no weight: what is left is rounding. A step has no slope.
        if name.ends_with("k_lin.bias") || name.contains("router.") {
            continue;
        }
        let dense = dense.unwrap_or_else(|| panic!("{name} takes part"));
        let sparse = sparse.unwrap_or_else(|| dense.zeros_like());
        assert_close(&name, &sparse, &dense, 1e-10);
    }
}

#[test]
fn a_choice_for_whole_texts_is_refused_where_it_would_see_the_future() {
    let gpt2 = json!({
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 50, "n_positions": 48, "n_embd": 24,
        "n_layer": 1, "n_head": 4,
    });
    let Value::Object(map) = gpt2 else { unreachable!("written as an object above") };
    let mut model = Model::init(Config::from_json(map).unwrap(), &LoadOptions::default()).unwrap();
    for (settings, field) in [
        (r#"{"kind": "routed", "by": "text"}"#, "may not know how their text goes on"),
        (r#"{"kind": "routed", "budget": 0.0}"#, "over 0 and at most 1"),
        (r#"{"kind": "routed", "budget": 1.5}"#, "over 0 and at most 1"),
        (r#"{"kind": "routed", "price": -1.0}"#, "at least 0"),
    ] {
        let variant: Variant = serde_json::from_str(settings).unwrap();
        let error = model.swap(&[0], &variant, 1).unwrap_err().to_string();
        assert!(error.contains(field), "{error}");
    }
}
