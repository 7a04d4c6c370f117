//! What heads add of each token, against what the layer computes.

mod common;

use attn_core::{ForwardOptions, Rows};
use attn_data::batch::{Side, collate};
use attn_eval::{norms, to_input};
use common::{language_model, rows};
use tch::{Kind, Tensor};

/// The vectors whose lengths are told add up to what the layer adds: of one token that is attended to alone, the length is that of
/// the layer's output for the head by itself.
#[test]
fn lengths_are_those_of_what_a_head_adds() {
    for model in ["gpt2", "llama"] {
        let model = language_model(model, Kind::Double);
        let rows = rows(1, 2);
        let batch = collate(&[&rows[0]], 0, Side::Right);
        let input = to_input(&batch, &model);
        let options = ForwardOptions {
            attentions: Rows::All,
            attention_inputs: true,
            z: true,
            ..ForwardOptions::default()
        };
        let found = tch::no_grad(|| model.forward(&input, &options)).unwrap();
        for (index, layer) in model.layers().into_iter().enumerate() {
            let weights = found.attentions[index].get(0);
            let lengths =
                tch::no_grad(|| norms(layer, &weights, &found.attention_inputs[index].get(0)));
            assert_eq!(lengths.size(), weights.size());
            // The first token sees itself alone: what a head adds there is all of z through its slice of the output projection.
            let z = &found.z[index];
            let nothing = layer.put_out(&z.zeros_like(), false);
            for head in 0..layer.dims().n_heads {
                let alone = z.zeros_like();
                alone.select(1, head).copy_(&z.select(1, head));
                let added: Tensor = layer.put_out(&alone, false) - &nothing;
                let expected = added.select(1, 0).norm().double_value(&[]);
                let own = lengths.double_value(&[head, 0, 0]);
                assert!(
                    (own - expected).abs() < 1e-9,
                    "layer {index}, head {head}: {own} {expected}"
                );
            }
        }
    }
}
