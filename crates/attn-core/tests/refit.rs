//! Output projections fitted anew, against the definition.

use attn_core::{
    Config, ForwardOptions, Gate, LoadOptions, Model, ModelInput, refit,
    testing::{assert_close, randn, random_ids, relative_rms},
};
use serde_json::{Value, json};
use tch::{Kind, Tensor};

fn model(base: &str) -> Model {
    let value = match base {
        "gpt2" => json!({
            "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 50, "n_positions": 48,
            "n_embd": 24, "n_layer": 2, "n_head": 4,
        }),
        "distilbert" => json!({
            "model_type": "distilbert", "architectures": ["DistilBertForMaskedLM"], "vocab_size": 50, "dim": 24,
            "hidden_dim": 40, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 48,
        }),
        _ => json!({
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 50, "hidden_size": 24,
            "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        }),
    };
    let Value::Object(map) = value else { unreachable!("written as an object above") };
    let options = LoadOptions { kind: Kind::Double, seed: 3, ..LoadOptions::default() };
    let model = Model::init(Config::from_json(map).unwrap(), &options).unwrap();
    for (i, (_, tensor)) in model.parameters().iter().enumerate() {
        let noise = randn(1000 + i as u64, &tensor.size()) * 0.2;
        tch::no_grad(|| tensor.shallow_clone().copy_(&(tensor + noise)));
    }
    model
}

/// A copy with memory of its own, without some heads of the layers.
fn without(whole: &Model, kept: [&[i64]; 2]) -> Model {
    let mut cut = whole.alias().unwrap();
    cut.own(&|_| true);
    for (layer, kept) in kept.iter().enumerate() {
        if kept.len() < 4 {
            cut.select_heads(layer, kept).unwrap();
        }
    }
    cut
}

/// Two padded batches.
fn inputs() -> Vec<ModelInput> {
    let keep = |n: i64| {
        let keep = Tensor::ones([4, 12], (Kind::Int64, tch::Device::Cpu));
        let _ = keep.get(1).narrow(0, n, 12 - n).fill_(0);
        keep
    };
    (0..3).map(|i| ModelInput::masked(random_ids(i, [4, 12], 50), keep(5 + i as i64))).collect()
}

/// z and what the attention puts out at each real token of a batch in `layer`, one row at a time.
fn outputs(model: &Model, layer: usize) -> (Vec<Tensor>, Vec<Tensor>) {
    let (mut z, mut y) = (Vec::new(), Vec::new());
    for input in inputs() {
        let mask = input.attention_mask.as_ref().unwrap();
        for row in 0..4 {
            let n = mask.get(row).sum(Kind::Int64).int64_value(&[]);
            let ids = input.input_ids.get(row).narrow(0, 0, n).unsqueeze(0);
            let options = ForwardOptions { z: true, ..ForwardOptions::default() };
            let out = model.forward(&ModelInput::new(ids), &options).unwrap();
            let heads = out.z[layer].get(0); // [n_heads, n, d]
            let flat = heads.transpose(0, 1).reshape([n, -1]);
            y.push(model.layers()[layer].out().forward(&flat, false));
            z.push(flat);
        }
    }
    (z, y)
}

fn error(model: &Model, whole: &Model, layer: usize) -> f64 {
    let ((z, y), (_, target)) = (outputs(model, layer), outputs(whole, layer));
    assert_eq!(z.len(), y.len());
    let all = |of: &[Tensor]| Tensor::cat(of, 0);
    relative_rms(&all(&y), &all(&target)).powi(2)
}

#[test]
fn no_small_change_of_the_fitted_projection_is_better() {
    const RIDGE: f64 = 1e-3;
    for base in ["gpt2", "distilbert", "llama"] {
        let whole = model(base);
        let mut cut = without(&whole, [&[0, 2, 3], &[0, 1, 2, 3]]);
        let start = cut.layers()[0].out().out_in().copy();
        let before = error(&cut, &whole, 0);
        let found = refit(&mut cut, &whole, &inputs(), RIDGE).unwrap();
        assert_eq!(found.iter().map(|one| one.layer).collect::<Vec<_>>(), [0, 1], "{base}");
        let has_bias = base != "llama";
        assert_eq!(found[0].n_unknowns, 18 + i64::from(has_bias));
        assert_eq!(found[0].n_tokens, 3 * 36 + 5 + 6 + 7);
        assert!((found[0].error_before - before).abs() < 1e-9, "{base}");
        assert!((found[0].error_after - error(&cut, &whole, 0)).abs() < 1e-9, "{base}");
        assert!(found[0].error_after < found[0].error_before, "{base}: {found:?}");
        assert!(found[1].error_after <= found[1].error_before, "{base}: {found:?}");

        // The gradient of what is made as small as can be is zero: 2 Σ (W z + b − y) zᵀ + 2 ridge m (W − W₀).
        let ((z, y), (_, target)) = (outputs(&cut, 0), outputs(&whole, 0));
        let [z, y, target] = [z, y, target].map(|of| Tensor::cat(&of, 0));
        let m = z.square().sum(Kind::Double).double_value(&[]) / 18.0;
        let weight = cut.layers()[0].out().out_in();
        let slope =
            (y.shallow_clone() - &target).tr().matmul(&z) + (&weight - &start) * (RIDGE * m);
        let scale = target.tr().matmul(&z);
        assert!(relative_rms(&(slope + &scale), &scale) < 1e-9, "{base}");
        if has_bias {
            let mean = (y - &target).mean_dim([0i64].as_slice(), false, Kind::Double);
            assert!(mean.abs().max().double_value(&[]) < 1e-9, "{base}: the bias");
        }
        // The whole model has not been touched.
        assert!(error(&whole, &model(base), 0) == 0.0);
    }
}

#[test]
fn a_head_that_repeats_another_is_made_up_for() {
    let whole = model("distilbert");
    // Head 1 of the first layer is head 0 over again.
    tch::no_grad(|| {
        for (name, tensor) in whole.parameters() {
            let part = ["q_lin", "k_lin", "v_lin"];
            if name.contains("layer.0.attention") && part.iter().any(|part| name.contains(part)) {
                tensor.narrow(0, 6, 6).copy_(&tensor.narrow(0, 0, 6));
            }
        }
    });
    let input = || ModelInput::new(random_ids(77, [2, 9], 50));
    let logits = |of: &Model| of.forward(&input(), &ForwardOptions::default()).unwrap().logits;
    let mut cut = without(&whole, [&[0, 2, 3], &[0, 1, 2, 3]]);
    assert!(relative_rms(&logits(&cut), &logits(&whole)) > 1e-2);
    let found = refit(&mut cut, &whole, &inputs(), 1e-12).unwrap();
    assert_eq!(found[0].rank, found[0].n_unknowns);
    assert_close("on other text", &logits(&cut), &logits(&whole), 1e-6);
    let g = Tensor::from_slice(&[1.0, 0.0, 1.0, 1.0]);
    let gates = [Some(Gate::per_head(&g)), None];
    let options = ForwardOptions { gates: &gates, ..ForwardOptions::default() };
    let masked = whole.forward(&input(), &options).unwrap().logits;
    assert!(relative_rms(&masked, &logits(&whole)) > 1e-2, "the head mattered");
}

#[test]
fn too_little_text_is_refused_with_its_rank_before_anything_changes() {
    let whole = model("gpt2");
    let mut cut = without(&whole, [&[0], &[0, 1, 2, 3]]);
    let before = cut.layers()[0].out().weight.copy();
    let few = [ModelInput::new(random_ids(1, [2, 12], 50))];
    let error = refit(&mut cut, &whole, &few, 1e-3).unwrap_err().to_string();
    assert!(error.contains("24 real tokens") && error.contains("layer 1 25 unknowns"), "{error}");
    assert!(cut.layers()[0].out().weight.equal(&before));
    let error = refit(&mut cut, &whole, &inputs(), 0.0).unwrap_err().to_string();
    assert!(error.contains("ridge"), "{error}");
    let mut same = without(&whole, [&[0, 1, 2, 3], &[0, 1, 2, 3]]);
    assert!(refit(&mut same, &whole, &inputs(), 1.0).unwrap().is_empty(), "nothing was removed");
}
