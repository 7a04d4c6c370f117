//! A distillation never holds what either model predicts at all places, forward or backward. The only test of its program:
//! tensors are counted in the whole process.

use attn_core::{Config, LoadOptions, Model, attention::Stream, testing::random_ids};
use attn_data::batch::{Encoded, Side, collate};
use attn_train::{Batch, Distillation, Losses, Objective};
use serde_json::{Value, json};
use tch::Tensor;

const VOCAB: i64 = 200_000;
const LEN: i64 = 400;

fn model(seed: u64) -> Model {
    let value = json!({
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": VOCAB, "n_positions": LEN, "n_embd": 8,
        "n_layer": 1, "n_head": 2,
    });
    let Value::Object(map) = value else { unreachable!("written as an object above") };
    Model::init(Config::from_json(map).unwrap(), &LoadOptions { seed, ..LoadOptions::default() })
        .unwrap()
}

#[test]
fn predictions_are_compared_a_few_places_at_a_time() {
    let [teacher, student] = [model(1), model(2)];
    for (_, tensor) in student.parameters() {
        let _ = tensor.set_requires_grad(true);
    }
    let ids = random_ids(3, [2, LEN / 2], VOCAB);
    let rows: Vec<Encoded> = (0..2)
        .map(|row| Encoded {
            ids: Vec::<i64>::try_from(ids.get(row)).unwrap().iter().map(|&id| id as u32).collect(),
            label: None,
            index: 0,
            second_from: None,
        })
        .collect();
    let batch: Batch = collate(&rows.iter().collect::<Vec<_>>(), 0, Side::Right).into();
    let whole = LEN * VOCAB * 4;
    attn_torch::count_cpu_memory().unwrap();
    for loss in [
        "forward_kl",
        "reverse_kl",
        "jensen_shannon",
        "total_variation",
        "top_k_kl",
        "cross_entropy",
    ] {
        let losses: Losses =
            serde_json::from_value(json!({"forward_kl": 0.0, loss: 1.0, "temperature": 2.0}))
                .unwrap();
        let objective = Distillation::new(&teacher, &student, &losses).unwrap();
        attn_torch::reset_peak_cpu_memory();
        let before = attn_torch::cpu_memory().now;

        objective.loss(&student, &batch, Stream::default()).unwrap().backward();

        let peak = attn_torch::cpu_memory().peak - before;
        assert!(peak < whole, "{loss}: {} MiB, and whole logits have {}", peak >> 20, whole >> 20);
        let moved = student.parameters().iter().any(|(_, tensor)| {
            let gradient: Tensor = tensor.grad();
            gradient.defined() && gradient.abs().max().double_value(&[]) > 0.0
        });
        assert!(moved, "{loss} has no gradient");
        for (_, tensor) in student.parameters() {
            tensor.shallow_clone().zero_grad();
        }
    }
}
