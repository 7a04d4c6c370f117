//! Activations computed again are not kept, of neither sequence. The only test of its program: tensors are counted in the
//! whole process.

use attn_core::{
    Config, ForwardOptions, LoadOptions, Model, ModelInput, Variant, testing::random_ids,
    variants::cross,
};
use serde_json::{Value, json};

const LAYERS: usize = 6;

#[test]
fn a_block_keeps_what_enters_it_and_no_more() {
    let value = json!({
        "model_type": "bert", "architectures": ["BertModel"], "vocab_size": 50, "hidden_size": 32,
        "intermediate_size": 128, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
        "max_position_embeddings": 256, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    });
    let Value::Object(map) = value else { unreachable!("written as an object above") };
    let config = Config::from_json(map).unwrap();
    let mut model = Model::init(config, &LoadOptions::default()).unwrap();
    model.swap(&[LAYERS - 1], &Variant::Cross(cross::Config {}), 1).unwrap();
    for (_, tensor) in model.parameters() {
        let _ = tensor.set_requires_grad(true);
    }
    attn_torch::count_cpu_memory().unwrap();
    let ids = |n: i64| ModelInput::new(random_ids(1, [4, n], 50));
    let held = |model: &Model, lengths: [i64; 2]| {
        let [own, source] = lengths.map(ids);
        let input = own.attending_to(source);
        let options = ForwardOptions { train: true, ..ForwardOptions::default() };
        let before = attn_torch::cpu_memory().now;
        let output = model.forward(&input, &options).unwrap();
        let held = attn_torch::cpu_memory().now - before;
        drop(output);
        held
    };
    for lengths in [[256, 8], [8, 256]] {
        model.set_gradient_checkpointing(false).unwrap();
        let kept = held(&model, lengths);
        model.set_gradient_checkpointing(true).unwrap();
        let recomputed = held(&model, lengths);
        assert!(
            4 * recomputed < kept,
            "of {lengths:?} tokens {recomputed} bytes where {kept} are kept otherwise"
        );
    }
}
