//! Models that read two sequences, one attending to the other.

use attn_core::{
    Config, Error, ForwardOptions, LoadOptions, Model, ModelInput, Rows, Variant, WantedHead,
    checkpoint::WriteOptions,
    testing::{Probe, assert_close, naive_attention_of, randn, random_ids},
    variants::cross,
};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

const HIDDEN: i64 = 24;
/// Of the second row's source.
const N_REAL: i64 = 4;

fn model(base: &str) -> Model {
    let value = match base {
        "bert" => json!({
            "model_type": "bert", "architectures": ["BertModel"], "vocab_size": 50, "hidden_size": HIDDEN,
            "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
            "max_position_embeddings": 48, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        }),
        "distilbert" => json!({
            "model_type": "distilbert", "architectures": ["DistilBertModel"], "vocab_size": 50, "dim": HIDDEN,
            "hidden_dim": 40, "n_layers": 3, "n_heads": 4, "max_position_embeddings": 48, "dropout": 0.0,
            "attention_dropout": 0.0, "seq_classif_dropout": 0.0,
        }),
        "gpt2" => json!({
            "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 50, "n_positions": 48,
            "n_embd": HIDDEN, "n_layer": 3, "n_head": 4,
        }),
        other => unreachable!("{other}"),
    };
    let Value::Object(map) = value else { unreachable!("written as an object above") };
    let classes = WantedHead::NewClassifier(vec!["no".into(), "yes".into()]);
    let head = if base == "gpt2" { WantedHead::AsSaved } else { classes };
    let options = LoadOptions { kind: Kind::Double, seed: 3, head, ..LoadOptions::default() };
    let model = Model::init(Config::from_json(map).unwrap(), &options).unwrap();
    for (i, (_, tensor)) in model.parameters().iter().enumerate() {
        let noise = randn(1000 + i as u64, &tensor.size()) * 0.2;
        tch::no_grad(|| tensor.shallow_clone().copy_(&(tensor + noise)));
    }
    model
}

fn crossed(base: &str, layers: &[usize]) -> Model {
    let mut model = model(base);
    model.swap(layers, &Variant::Cross(cross::Config {}), 1).unwrap();
    model
}

/// Two rows of seven tokens, the second of which has [`N_REAL`] real ones.
fn source() -> ModelInput {
    let keep = Tensor::from_slice(&[1i64, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0]).view([2, 7]);
    ModelInput::masked(random_ids(2, [2, 7], 50), keep)
}

fn input() -> ModelInput {
    ModelInput::new(random_ids(1, [2, 5], 50))
}

fn logits(model: &Model, input: &ModelInput) -> Tensor {
    model.forward(input, &ForwardOptions::default()).unwrap().logits
}

#[test]
fn a_layer_attends_to_the_source_as_it_comes_into_that_layer() {
    for base in ["bert", "distilbert"] {
        // What comes into each layer where a sequence attends to itself.
        let inputs = ForwardOptions { attention_inputs: true, ..ForwardOptions::default() };
        let plain = model(base);
        let of_source = plain.forward(&source(), &inputs).unwrap().attention_inputs;
        for layers in [vec![0], vec![1], vec![0, 2]] {
            let model = crossed(base, &layers);
            let tapped = ForwardOptions { z: true, attentions: Rows::All, ..inputs };
            let output = model.forward(&input().attending_to(source()), &tapped).unwrap();
            for &layer in &layers {
                let dims = model.layers()[layer].dims().clone();
                let projections = model.layers()[layer].projections();
                let heads = |x: &Tensor, (weight, bias): &(Tensor, Option<Tensor>)| {
                    x.linear(weight, bias.as_ref())
                        .view([2, -1, dims.n_heads, dims.head_dim])
                        .transpose(1, 2)
                        .contiguous()
                };
                let probe = Probe {
                    hidden: output.attention_inputs[layer].shallow_clone(),
                    q: heads(&output.attention_inputs[layer], &projections.q),
                    k: heads(&of_source[layer], &projections.k),
                    v: heads(&of_source[layer], &projections.v),
                    positions: Tensor::zeros([2, 5], (Kind::Int64, Device::Cpu)),
                    dims,
                };
                let sees = |row: i64, j: i64| row == 0 || j < N_REAL;
                let (z, weights) = naive_attention_of(&probe, |row, _, _, j| sees(row, j));
                let name = format!("{base}, layer {layer} of {layers:?}");
                assert_close(&name, &output.z[layer], &z, 1e-12);
                assert_close(&name, &output.attentions[layer], &weights, 1e-12);
            }
        }
    }
}

#[test]
fn padding_and_neighbours_change_nothing() {
    for base in ["bert", "distilbert"] {
        let model = crossed(base, &[0, 1]);
        let together = logits(&model, &input().attending_to(source()));
        for (row, n_real) in [(0, 7), (1, N_REAL)] {
            let own = ModelInput::new(input().input_ids.narrow(0, row, 1));
            let alone = source().input_ids.narrow(0, row, 1).narrow(1, 0, n_real);
            let alone = logits(&model, &own.attending_to(ModelInput::new(alone)));
            assert_close(base, &alone, &together.narrow(0, row, 1), 1e-12);
        }
        let other =
            Tensor::cat(&[random_ids(9, [2, 1], 50), source().input_ids.narrow(1, 1, 6)], 1);
        let moved = ModelInput { input_ids: other, ..source() };
        let moved = logits(&model, &input().attending_to(moved));
        assert!((moved - together).abs().min().double_value(&[]) > 1e-6, "the source is read");
    }
}

#[test]
fn gradients_flow_through_both_sequences() {
    let pull = randn(7, &[2, 2]);
    let value = |model: &Model| {
        let options = ForwardOptions { train: true, ..ForwardOptions::default() };
        let logits = model.forward(&input().attending_to(source()), &options).unwrap().logits;
        (logits * &pull).sum(Kind::Double)
    };
    for base in ["bert", "distilbert"] {
        let mut model = crossed(base, &[0, 1]);
        let parameters = model.parameters();
        for (_, tensor) in &parameters {
            let _ = tensor.set_requires_grad(true);
        }
        value(&model).backward();
        let gradients: Vec<Tensor> =
            parameters.iter().map(|(_, tensor)| tensor.grad().copy()).collect();
        for ((name, tensor), gradient) in parameters.iter().zip(&gradients) {
            let direction = randn(8, &tensor.size());
            let promised = if gradient.defined() {
                (gradient * &direction).sum(Kind::Double).double_value(&[])
            } else {
                0.0
            };
            let start = tensor.detach().copy();
            let at = |by: f64| {
                tch::no_grad(|| {
                    tensor.shallow_clone().copy_(&(&start + &direction * by));
                    value(&model).double_value(&[])
                })
            };
            let seen = (at(1e-5) - at(-1e-5)) / 2e-5;
            let _ = at(0.0);
            let error = (promised - seen).abs() / promised.abs().max(seen.abs()).max(1.0);
            assert!(error < 1e-6, "{base}, {name}: {promised} promised, {seen} seen");
        }

        // The same where the blocks are run again for the backward pass.
        model.set_gradient_checkpointing(true).unwrap();
        for (_, tensor) in &parameters {
            tensor.shallow_clone().zero_grad();
        }
        value(&model).backward();
        for ((name, tensor), gradient) in parameters.iter().zip(&gradients) {
            assert_close(name, &tensor.grad(), gradient, 1e-12);
        }
    }
}

#[test]
fn what_a_kind_learns_from_on_the_source_is_part_of_the_loss() {
    let indexed: Variant =
        serde_json::from_value(json!({"kind": "indexed", "index_dim": 4, "top_k": 2})).unwrap();
    for base in ["bert", "distilbert"] {
        let mut plain = model(base);
        plain.swap(&[0], &indexed, 1).unwrap();
        let mut both = plain.alias().unwrap();
        both.swap(&[1], &Variant::Cross(cross::Config {}), 1).unwrap();
        for (_, tensor) in plain.parameters().into_iter().chain(both.parameters()) {
            let _ = tensor.set_requires_grad(true);
        }
        let own = |model: &Model, input: &ModelInput| {
            let options = ForwardOptions { train: true, ..ForwardOptions::default() };
            model.forward(input, &options).unwrap().own_loss.unwrap().double_value(&[])
        };
        let apart = [own(&plain, &input()), own(&plain, &source())];
        assert!(apart.iter().all(|&loss| loss > 1e-3), "{apart:?}");
        for recompute in [false, true] {
            both.set_gradient_checkpointing(recompute).unwrap();
            let together = own(&both, &input().attending_to(source()));
            let off = (together - apart.iter().sum::<f64>()).abs();
            assert!(off < 1e-12, "{base}: {together} of both, {apart:?} of each");
        }
    }
}

#[test]
fn a_folder_of_it_is_read_again() {
    let dir = tempfile::tempdir().unwrap();
    let model = crossed("distilbert", &[1]);
    model.save(dir.path(), &WriteOptions::default()).unwrap();
    let options = LoadOptions { kind: Kind::Double, ..LoadOptions::default() };
    let (again, _) = Model::load(dir.path(), &options).unwrap();
    assert!(again.needs_source());
    let both = input().attending_to(source());
    assert!(logits(&again, &both).equal(&logits(&model, &both)));
}

#[test]
fn what_cannot_be_is_refused() {
    let mut decoder = model("gpt2");
    let error = decoder.swap(&[1], &Variant::Cross(cross::Config {}), 1).unwrap_err();
    assert!(matches!(error, Error::Refused { kind: "cross", .. }), "{error}");
    assert!(error.to_string().contains("distilbert"), "{error}");

    let model = crossed("bert", &[1]);
    let options = ForwardOptions::default();
    let problem = |input: ModelInput| match model.forward(&input, &options) {
        Err(Error::Input { name: "source", problem }) => problem,
        other => panic!("{other:?}"),
    };
    assert!(problem(input()).contains("layer 1"));
    let one = ModelInput::new(random_ids(1, [1, 5], 50));
    assert!(problem(input().attending_to(one)).contains("1 rows, expected 2"));
    let twice = source().attending_to(source());
    assert!(problem(input().attending_to(twice)).contains("source of its own"));
    let inputs = [randn(1, &[2, 5, HIDDEN])];
    let error = model.attend(&input(), &[1], &inputs, &options).unwrap_err();
    assert!(matches!(error, Error::Refused { kind: "cross", .. }), "{error}");

    let plain = self::model("bert").forward(&input().attending_to(source()), &options).unwrap_err();
    assert!(plain.to_string().contains("no layer attends"), "{plain}");
}
