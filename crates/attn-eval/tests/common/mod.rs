//! Small random models, rows, and the loss as it is defined.

#![allow(dead_code, reason = "no test uses all of it")]

use std::ops::ControlFlow;

use attn_core::{
    Config, ForwardOptions, LoadOptions, Model, ModelInput, WantedHead, testing::random_ids,
};
use attn_data::batch::Encoded;
use attn_eval::Batching;
use serde_json::{Map, Value, json};
use tch::{Kind, Tensor};

pub(crate) const VOCAB: i64 = 40;

pub(crate) fn config(base: &str, head: &str) -> Config {
    let value = match base {
        "gpt2" => json!({
            "model_type": "gpt2", "architectures": [format!("GPT2{head}")], "vocab_size": VOCAB, "n_positions": 32,
            "n_embd": 24, "n_layer": 2, "n_head": 4,
        }),
        "bert" => json!({
            "model_type": "bert", "architectures": [format!("Bert{head}")], "vocab_size": VOCAB, "hidden_size": 24,
            "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32,
        }),
        _ => json!({
            "model_type": "distilbert", "architectures": [format!("DistilBert{head}")], "vocab_size": VOCAB,
            "dim": 24, "hidden_dim": 40, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 32,
        }),
    };
    let map: Map<String, Value> = serde_json::from_value(value).unwrap();
    Config::from_json(map).unwrap()
}

/// Large weights: the start's are so small that every prediction is nearly uniform.
pub(crate) fn shaken(model: Model) -> Model {
    for (i, (_, tensor)) in model.parameters().iter().enumerate() {
        let noise = attn_core::testing::randn(i as u64, &tensor.size()) * 0.3;
        tch::no_grad(|| tensor.shallow_clone().copy_(&(tensor + noise)));
    }
    model
}

pub(crate) fn language_model(base: &str, kind: Kind) -> Model {
    let head = if base == "gpt2" { "LMHeadModel" } else { "ForMaskedLM" };
    let options = LoadOptions { kind, seed: 1, ..LoadOptions::default() };
    shaken(Model::init(config(base, head), &options).unwrap())
}

pub(crate) fn classifier(base: &str, n_classes: usize) -> Model {
    let classes = (0..n_classes).map(|class| format!("class {class}")).collect();
    let head = WantedHead::NewClassifier(classes);
    let options = LoadOptions { kind: Kind::Double, seed: 2, head, ..LoadOptions::default() };
    shaken(Model::init(config(base, "Model"), &options).unwrap())
}

/// Rows of 1 to 17 tokens, labelled but for every fifth.
pub(crate) fn rows(n: usize, n_classes: usize) -> Vec<Encoded> {
    (0..n)
        .map(|i| {
            let n_tokens = 1 + (i * 7) % 17;
            let ids = random_ids(i as u64, [1, n_tokens as i64], VOCAB).view([-1]);
            let ids: Vec<i64> = Vec::try_from(ids).unwrap();
            let label = (i % 5 != 4).then_some((i % n_classes) as i64);
            Encoded {
                ids: ids.iter().map(|&id| id as u32).collect(),
                label,
                index: 100 + i,
                second_from: None,
            }
        })
        .collect()
}

pub(crate) fn logits(model: &Model, ids: &[i64]) -> Tensor {
    let input = ModelInput::new(Tensor::from_slice(ids).view([1, -1]));
    model.forward(&input, &ForwardOptions::default()).unwrap().logits.to_kind(Kind::Double).get(0)
}

/// −ln softmax(logits)[class] as it is defined.
pub(crate) fn naive_loss(logits: &Tensor, class: i64) -> f64 {
    let values: Vec<f64> = Vec::try_from(logits.contiguous()).unwrap();
    values.iter().map(|value| value.exp()).sum::<f64>().ln() - values[class as usize]
}

pub(crate) fn ids(row: &Encoded) -> Vec<i64> {
    row.ids.iter().map(|&id| id.into()).collect()
}

pub(crate) fn go_on(_: usize) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

pub(crate) fn batchings() -> [Batching; 4] {
    let plain = Batching::default();
    [
        Batching { batch_size: 1, ..plain },
        Batching { batch_size: 3, pad_id: 5, ..plain },
        Batching { max_tokens: Some(20), ..plain },
        Batching { batch_size: 64, max_tokens: None, pad_id: 39 },
    ]
}
