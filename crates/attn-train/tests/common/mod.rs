//! Tiny random models and data for the test files of this folder.
#![allow(dead_code, reason = "each test file uses its own part")]

use std::{collections::BTreeMap, io::Write, path::Path};

use attn_core::{Config, LoadOptions, Model, checkpoint::read_tensors};
use attn_data::batch::{Encoded, IGNORED, Masking};
use attn_train::{Batch, Batches, BoxError, Examples, TrainConfig};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

pub(crate) const VOCAB: u32 = 40;

/// A configuration of `base` with a head: `lm` or `classifier` (of two classes), and this share of everything dropped.
pub(crate) fn config(base: &str, head: &str, dropout: f64) -> Config {
    let class = match (base, head) {
        ("gpt2", "lm") => "GPT2LMHeadModel",
        ("gpt2", "classifier") => "GPT2ForSequenceClassification",
        ("llama", "lm") => "LlamaForCausalLM",
        ("distilbert", "lm") => "DistilBertForMaskedLM",
        ("distilbert", "classifier") => "DistilBertForSequenceClassification",
        other => unreachable!("{other:?}"),
    };
    let value = match base {
        "gpt2" => json!({
            "model_type": "gpt2", "architectures": [class], "vocab_size": VOCAB, "n_positions": 32, "n_embd": 32,
            "n_layer": 2, "n_head": 4, "activation_function": "gelu_new", "pad_token_id": 0, "initializer_range": 0.1,
            "attn_pdrop": dropout, "embd_pdrop": dropout, "resid_pdrop": dropout,
        }),
        "llama" => json!({
            "model_type": "llama", "architectures": [class], "vocab_size": VOCAB, "hidden_size": 32,
            "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 64, "rope_theta": 10000.0, "tie_word_embeddings": false,
            "initializer_range": 0.1, "attention_dropout": dropout,
        }),
        "distilbert" => json!({
            "model_type": "distilbert", "architectures": [class], "vocab_size": VOCAB, "dim": 32, "hidden_dim": 64,
            "n_layers": 2, "n_heads": 4, "max_position_embeddings": 32, "initializer_range": 0.1, "dropout": dropout,
            "attention_dropout": dropout, "seq_classif_dropout": dropout,
        }),
        other => unreachable!("{other}"),
    };
    let Value::Object(map) = value else { unreachable!("written as an object above") };
    Config::from_json(map).unwrap()
}

pub(crate) fn model(base: &str, head: &str, dropout: f64, kind: Kind, seed: u64) -> Model {
    // Models this small are slower on several threads, far slower where other tests use the processor too.
    tch::set_num_threads(1);
    let options = LoadOptions { kind, seed, ..LoadOptions::default() };
    Model::init(config(base, head, dropout), &options).unwrap()
}

/// `n` texts of 3 to 12 tokens whose first one, 2 or 3, tells their class; 0 and 1 never occur.
pub(crate) fn texts(n: usize, seed: u64) -> Vec<Encoded> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..n)
        .map(|index| {
            let mut ids: Vec<u32> =
                (0..rng.random_range(3..=12)).map(|_| rng.random_range(4..VOCAB)).collect();
            let class = rng.random_range(0..2);
            ids[0] = 2 + class;
            Encoded { ids, label: Some(class.into()), index, second_from: None }
        })
        .collect()
}

pub(crate) fn masking() -> Masking {
    Masking { mask_id: 1, vocab_size: VOCAB as usize, special: vec![0, 1], rate: 0.3 }
}

pub(crate) fn examples(n: usize, config: &TrainConfig) -> Examples {
    Examples::new(texts(n, 5), config.plan().unwrap(), 0, config.seed)
}

/// These batches in this order, each epoch.
pub(crate) struct Fixed(pub(crate) Vec<Batch>);

impl Batches for Fixed {
    fn plan(&self, _: u64) -> Vec<Vec<usize>> {
        (0..self.0.len()).map(|batch| vec![batch]).collect()
    }

    fn batch(&self, _: u64, rows: &[usize]) -> Result<Batch, BoxError> {
        Ok(self.0[rows[0]].clone())
    }
}

/// Settings under which a few steps move a tiny model far.
pub(crate) fn quick(max_steps: u64) -> TrainConfig {
    TrainConfig {
        lr: 1e-2,
        warmup_steps: Some(0),
        schedule: attn_train::Schedule::Constant,
        max_steps: Some(max_steps),
        batch_size: 8,
        weight_decay: 0.0,
        log_every: 1,
        ..TrainConfig::default()
    }
}

/// Copies of all parameters by name.
pub(crate) fn weights(model: &Model) -> BTreeMap<String, Tensor> {
    let copy = |(name, tensor): (String, Tensor)| (name, tensor.detach().copy());
    model.parameters().into_iter().map(copy).collect()
}

/// The tensors of a file by name.
pub(crate) fn tensors(path: &Path) -> BTreeMap<String, Tensor> {
    read_tensors(path).unwrap().into_iter().collect()
}

/// Panics at the first tensor that differs in a bit, or is in one map alone.
#[track_caller]
pub(crate) fn assert_same(a: &BTreeMap<String, Tensor>, b: &BTreeMap<String, Tensor>) {
    assert!(!a.is_empty());
    assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
    for (name, a) in a {
        let b = &b[name];
        assert!(a.kind() == b.kind() && a.equal(b), "{name} differs:\n{a}\n{b}");
    }
}

/// The values of a tensor as `f64`.
pub(crate) fn values(tensor: &Tensor) -> Vec<f64> {
    let flat = tensor.detach().to_device(Device::Cpu).to_kind(Kind::Double).contiguous();
    Vec::try_from(flat.view([-1])).unwrap()
}

/// −log of the softmax of `logits` at `target`, from the definition.
pub(crate) fn surprise(logits: &[f64], target: usize) -> f64 {
    let total: f64 = logits.iter().map(|x| x.exp()).sum();
    total.ln() - logits[target]
}

/// A row as the data crate pads it; `label` of −100 is none.
pub(crate) fn encoded(ids: &[u32], label: i64, index: usize) -> Encoded {
    Encoded {
        ids: ids.to_vec(),
        label: (label != IGNORED).then_some(label),
        index,
        second_from: None,
    }
}

/// Says that something was not tested, and why. Written past the test runner, which keeps what passing tests print.
pub(crate) fn skipped(what: &str, why: &str) {
    let line = format!("\nSKIPPED {what}: {why}\n");
    std::io::stderr().write_all(line.as_bytes()).expect("standard error takes a line");
}
