//! Small random models of every architecture, two layers of four heads.

use attn_core::{
    Config, ForwardOptions, LoadOptions, Model, ModelInput, WantedHead, testing::randn,
};
use serde_json::{Value, json};
use tch::{Kind, Tensor};

pub(crate) const BASES: [&str; 4] = ["gpt2", "llama", "distilbert", "bert"];

pub(crate) fn config(base: &str) -> Config {
    let value = match base {
        "gpt2" => json!({
            "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 50, "n_positions": 48,
            "n_embd": 24, "n_layer": 2, "n_head": 4, "activation_function": "gelu_new", "our_note": "kept",
        }),
        "llama" => json!({
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 50, "hidden_size": 24,
            "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 8, "max_position_embeddings": 64, "rope_theta": 10000.0, "tie_word_embeddings": false,
        }),
        "distilbert" => json!({
            "model_type": "distilbert", "architectures": ["DistilBertForMaskedLM"], "vocab_size": 50, "dim": 24,
            "hidden_dim": 40, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 48,
        }),
        "bert" => json!({
            "model_type": "bert", "architectures": ["BertForMaskedLM"], "vocab_size": 50, "hidden_size": 24,
            "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 48,
        }),
        other => unreachable!("{other}"),
    };
    let Value::Object(map) = value else { unreachable!("written as an object above") };
    Config::from_json(map).unwrap()
}

/// A random model in `f64` whose parameters are far from their start: zero biases hide mistakes.
pub(crate) fn model(base: &str) -> Model {
    ending_in(WantedHead::LanguageModel, base)
}

pub(crate) fn ending_in(head: WantedHead, base: &str) -> Model {
    let options = LoadOptions { kind: Kind::Double, seed: 3, head, ..LoadOptions::default() };
    let mut model = Model::init(config(base), &options).unwrap();
    shake(&mut model);
    model
}

pub(crate) fn shake(model: &mut Model) {
    for (i, (_, tensor)) in model.parameters().iter().enumerate() {
        let noise = randn(1000 + i as u64, &tensor.size()) * 0.2;
        tch::no_grad(|| tensor.shallow_clone().copy_(&(tensor + noise)));
    }
}

pub(crate) fn logits(model: &Model, input: &ModelInput) -> Tensor {
    model.forward(input, &ForwardOptions::default()).unwrap().logits
}
