//! What heads add of each token, against what the layer computes.

mod common;

use attn_core::{ForwardOptions, Rows, Variant};
use attn_data::batch::{Side, collate};
use attn_eval::{Error, norms, rollout, to_input};
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
            let inputs = found.attention_inputs[index].get(0);
            let lengths = tch::no_grad(|| norms(index, layer, &weights, &inputs)).unwrap();
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

/// What a measure is not told of is refused by the layer and its kind.
#[test]
fn kinds_without_the_values_or_the_shares_are_refused_by_name() {
    let rows = rows(3, 2);
    let batch = collate(&[&rows[2]], 0, Side::Right);
    let of = |variant: &str| {
        let mut model = language_model("gpt2", Kind::Double);
        let variant: Variant = serde_json::from_str(variant).unwrap();
        model.swap(&[1], &variant, 0).unwrap();
        if matches!(variant, Variant::Gated(_)) {
            // As trained: rows that sum to something else.
            model.layers()[1].kind().visit(&mut |_, tensor| {
                let _ = tch::no_grad(|| tensor.shallow_clone().fill_(0.3));
            });
        }
        let options =
            ForwardOptions { attentions: Rows::All, attention_inputs: true, ..Default::default() };
        let found = tch::no_grad(|| model.forward(&to_input(&batch, &model), &options)).unwrap();
        let layers = model.layers();
        let lengths: Vec<_> = (0..2)
            .map(|at| {
                let [weights, inputs] =
                    [&found.attentions[at], &found.attention_inputs[at]].map(|it| it.get(0));
                tch::no_grad(|| norms(at, layers[at], &weights, &inputs))
            })
            .collect();
        let weights: Vec<_> =
            (0..2).map(|at| (layers[at].variant().name(), found.attentions[at].get(0))).collect();
        (lengths, rollout(&weights))
    };

    // Values that a branch makes of its own, and a code of keys and values.
    let nsa = r#"{"kind": "nsa", "compress_block": 4, "compress_stride": 2, "select_block": 4, "n_selected": 3,
        "n_local": 1, "window": 3}"#;
    for variant in [nsa, r#"{"kind": "latent"}"#] {
        let (lengths, _) = of(variant);
        assert!(matches!(lengths[1], Err(Error::OwnValues { layer: 1, .. })), "{variant}");
    }
    let (lengths, _) = of(nsa);
    assert!(lengths[0].is_ok());
    let refused = lengths[1].as_ref().unwrap_err();
    assert!(matches!(refused, Error::OwnValues { layer: 1, .. }));
    let said = refused.to_string();
    assert!(said.contains("layer 1 is `nsa`") && said.contains("--measure weights"), "{said}");

    let (lengths, rolled) = of(r#"{"kind": "single_head", "from": "sum"}"#);
    assert!(lengths[1].is_ok() && rolled.is_ok());
    let (lengths, rolled) = of(r#"{"kind": "gated"}"#);
    assert!(lengths[1].is_ok());
    let said = rolled.unwrap_err().to_string();
    assert!(said.contains("layer 1 is `gated`") && said.contains("sum to 1"), "{said}");
}
