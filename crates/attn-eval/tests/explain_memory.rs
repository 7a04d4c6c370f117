//! Tests of a model never hold its predictions at all places of a row. The only test of its program: tensors are counted in
//! the whole process.

use std::ops::ControlFlow;

use attn_core::{
    Config, ForwardOptions, LoadOptions, Model, ModelInput,
    testing::{randn, random_ids},
};
use attn_data::batch::Encoded;
use attn_eval::{Batching, Writing, explain};
use serde_json::{Value, json};
use tch::{Kind, Tensor};

const VOCAB: i64 = 100_000;
const LEN: i64 = 800;

fn model(seed: u64) -> Model {
    let value = json!({
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": VOCAB, "n_positions": LEN, "n_embd": 8,
        "n_layer": 1, "n_head": 2,
    });
    let Value::Object(map) = value else { unreachable!("written as an object above") };
    let model = Model::init(Config::from_json(map).unwrap(), &LoadOptions::default()).unwrap();
    for (i, (_, tensor)) in model.parameters().iter().enumerate() {
        let noise = randn(seed + i as u64, &tensor.size()).to_kind(Kind::Float) * 0.3;
        tch::no_grad(|| tensor.shallow_clone().copy_(&(tensor + noise)));
    }
    model
}

#[test]
fn predictions_are_made_a_few_places_at_a_time() {
    let [own, other] = [model(10), model(50)];
    let ids = random_ids(3, [1, LEN], VOCAB);
    let row = Encoded {
        ids: Vec::<i64>::try_from(ids.view([-1])).unwrap().iter().map(|&id| id as u32).collect(),
        label: None,
        index: 0,
        second_from: None,
    };
    let decode = |ids: &[i64]| Ok(format!("{ids:?}"));
    let writing = Writing {
        n_prompts: 1,
        prompt_len: LEN as usize - 9,
        max_new_tokens: 8,
        seed: 0,
        stop_ids: &[],
        decode: &decode,
    };
    let mut go_on = |_: usize| ControlFlow::Continue(());
    attn_torch::count_cpu_memory().unwrap();
    attn_torch::reset_peak_cpu_memory();
    let before = attn_torch::cpu_memory().now;

    let found =
        explain(&own, &other, &[row], None, &writing, &Batching::default(), &mut go_on).unwrap();

    let peak = attn_torch::cpu_memory().peak - before;
    let whole = LEN * VOCAB * 4;
    assert!(peak < whole, "{} MiB, and whole logits have {}", peak >> 20, whole >> 20);

    // The definition, on whole rows.
    let log_p = |of: &Model| {
        let logits = tch::no_grad(|| {
            of.forward(&ModelInput::new(ids.shallow_clone()), &ForwardOptions::default())
        });
        logits.unwrap().logits.get(0).log_softmax(-1, Kind::Float)
    };
    let (q, p) = (log_p(&own), log_p(&other));
    assert_eq!(found.kl_by_shift.len(), 5);
    for (shift, kl) in found.kl_by_shift {
        let len = LEN - shift.abs();
        let (q, p) = (q.narrow(0, (-shift).max(0), len), p.narrow(0, shift.max(0), len));
        let each: Tensor = (p.exp() * (&p - q)).sum_dim_intlist([-1i64].as_slice(), false, None);
        let expected = each.mean(Kind::Double).double_value(&[]);
        assert!((kl - expected).abs() < 1e-5 * expected, "shift {shift}: {kl} is not {expected}");
    }
}
