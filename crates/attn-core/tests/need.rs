//! Memory foreseen against memory taken. The only test of its program: tensors are counted in the whole process.

use attn_core::{
    Config, ForwardOptions, LoadOptions, Model, ModelInput, Variant,
    need::{Extents, Kept, Pass},
    testing::random_ids,
};
use serde_json::{Value, json};
use tch::{Kind, Tensor};

const VOCAB: i64 = 50;

/// Models that every kind is put into.
const ALL_KINDS: [&str; 3] = ["gpt2", "bert", "gpt2 with dropout"];

fn configs() -> Vec<(&'static str, Value)> {
    let gpt2 = |rate: f64| {
        json!({
            "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": VOCAB, "n_embd": 128, "n_layer": 2,
            "n_head": 4, "n_positions": 2048, "resid_pdrop": rate, "embd_pdrop": rate, "attn_pdrop": rate,
        })
    };
    let bert = |rate: f64| {
        json!({
            "model_type": "bert", "architectures": ["BertForMaskedLM"], "vocab_size": VOCAB, "hidden_size": 128,
            "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512, "max_position_embeddings": 2048,
            "hidden_dropout_prob": rate, "attention_probs_dropout_prob": rate,
        })
    };
    let distilbert = json!({
        "model_type": "distilbert", "architectures": ["DistilBertForMaskedLM"], "vocab_size": VOCAB, "dim": 128,
        "n_layers": 2, "n_heads": 4, "hidden_dim": 512, "max_position_embeddings": 2048,
    });
    let llama = json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": VOCAB, "hidden_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 384,
        "max_position_embeddings": 2048,
    });
    vec![
        ("gpt2", gpt2(0.0)),
        ("gpt2 with dropout", gpt2(0.1)),
        ("bert", bert(0.0)),
        ("bert with dropout", bert(0.1)),
        ("distilbert", distilbert),
        ("llama", llama),
    ]
}

/// The most bytes held at once by `run` beyond what was there.
fn peak(run: impl FnOnce()) -> u64 {
    let before = attn_torch::cpu_memory().now;
    attn_torch::reset_peak_cpu_memory();
    run();
    (attn_torch::cpu_memory().peak - before) as u64
}

/// Foreseen and taken bytes of a pass of `rows` texts of `len` tokens, gradients of parameters apart.
fn pair(model: &mut Model, [rows, len]: [i64; 2], kept: Kept) -> [u64; 2] {
    let extents = Extents::of(model.config()).unwrap();
    let trains = kept != Kept::Nothing;
    let pass = Pass {
        rows: rows as u64,
        len: len as u64,
        kept,
        train: trains,
        is_padded: true,
        kind: Kind::Float,
    };
    let logits = extents.logit_bytes((rows * len) as u64, 3, Kind::Float);
    let gradients = if trains { extents.n_parameters() * 4 } else { 0 };
    let foreseen = extents.block_bytes(&pass) + logits + gradients;
    model.set_gradient_checkpointing(kept == Kept::Blocks).unwrap();
    let ids = random_ids(3, [rows, len], VOCAB);
    // The first text is half as long as the others.
    let mask = Tensor::ones([rows, len], (Kind::Int64, tch::Device::Cpu));
    let _ = mask.get(0).narrow(0, len / 2, len / 2).fill_(0);
    let input = ModelInput::masked(ids, mask);
    let mut options = ForwardOptions { train: trains, ..ForwardOptions::default() };
    options.stream.seed = 1;
    let taken = match trains {
        false => peak(|| drop(tch::no_grad(|| model.forward(&input, &options).unwrap()))),
        true => {
            let leaves: Vec<Tensor> =
                model.parameters().into_iter().map(|(_, tensor)| tensor).collect();
            let taken = peak(|| {
                let output = model.forward(&input, &options).unwrap();
                let loss = output.logits.flatten(0, -2).cross_entropy_loss::<Tensor>(
                    &random_ids(4, [rows, len], VOCAB).view([-1]),
                    None,
                    tch::Reduction::Mean,
                    -100,
                    0.0,
                );
                drop(output.logits);
                loss.backward();
            });
            for mut leaf in leaves {
                leaf.zero_grad();
            }
            taken
        }
    };
    [foreseen, taken]
}

#[test]
fn no_pass_takes_more_than_is_foreseen() {
    attn_torch::count_cpu_memory().unwrap();
    let mut failed = Vec::new();
    for (name, value) in configs() {
        let Value::Object(map) = value else { unreachable!("written as an object above") };
        let config = Config::from_json(map).unwrap();
        for variant in Variant::all() {
            let is_plain = variant == Variant::default();
            if variant.name() == "cross" || (!is_plain && !ALL_KINDS.contains(&name)) {
                continue;
            }
            let mut changed = config.clone();
            let all: Vec<usize> = (0..config.layers.len()).collect();
            if changed.set_attention(&all, &variant).is_err() {
                continue;
            }
            let mut model = Model::init(changed, &LoadOptions::default()).unwrap();
            for (_, tensor) in model.parameters() {
                let _ = tensor.set_requires_grad(true);
            }
            // Blocks computed again hold of a kind what one of them does.
            let all = [Kept::All, Kept::Nothing, Kept::Blocks];
            for &kept in &all[..if is_plain { 3 } else { 2 }] {
                // Long texts for what grows with their square.
                let long = is_plain || variant.name() == "indexed";
                for extent in if long { vec![[8, 64], [2, 384]] } else { vec![[4, 128]] } {
                    let [foreseen, taken] = pair(&mut model, extent, kept);
                    let ratio = foreseen as f64 / taken as f64;
                    let line = format!(
                        "{name}, {}, {kept:?}, {extent:?}: {:.1} MiB foreseen, {:.1} taken, {ratio:.2}",
                        variant.name(),
                        foreseen as f64 / 1048576.0,
                        taken as f64 / 1048576.0
                    );
                    #[expect(clippy::print_stderr, reason = "shown with --nocapture alone")]
                    {
                        eprintln!("{line}");
                    }
                    if ratio < 1.0 || (is_plain && ratio > 2.0) {
                        failed.push(line);
                    }
                }
            }
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}
