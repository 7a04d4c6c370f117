//! What layers lose under candidates, against swaps made by hand.

mod common;

use attn_core::{Model, Variant};
use attn_data::batch::{Encoded, Masking};
use attn_eval::{
    Batching, Budget, Cost, Error, Offer, Probing, Swapped, allocate, divergence, sensitivity,
    state_bytes,
};
use common::{VOCAB, go_on, language_model, rows};
use tch::Kind;

fn variant(json: &str) -> Variant {
    serde_json::from_str(json).unwrap()
}

fn candidates() -> Vec<Variant> {
    let mut all: Vec<Variant> = [
        r#"{"kind": "window", "size": 2}"#,
        r#"{"kind": "performer", "n_features": 16}"#,
        r#"{"kind": "sinks", "n_sinks": 1, "window": 3}"#,
    ]
    .map(variant)
    .into();
    let head = |head| format!(r#"{{"kind": "single_head", "from": "best", "head": {head}}}"#);
    all.extend((0..4).map(|of| variant(&head(of))));
    all
}

fn probing<'a>(rows: &'a [Encoded], masking: Option<(&'a Masking, u64)>) -> Probing<'a> {
    Probing { rows, masking, n_tokens: 12, seed: 3, batching: Batching::default(), budget: None }
}

fn measured(model: &Model, probing: &Probing<'_>) -> Vec<Vec<Swapped>> {
    let each = vec![candidates(); model.layers().len()];
    sensitivity(model, &each, probing, &mut go_on).unwrap()
}

#[test]
fn a_layer_loses_what_the_model_swapped_there_alone_does() {
    let model = language_model("gpt2", Kind::Double);
    let rows = rows(12, 2);
    let before = state_bytes(&model, 12).unwrap();
    let mut seen = Vec::new();

    let layers = {
        let each = vec![candidates(); 2];
        let mut progress = |n: usize| {
            seen.push(n);
            std::ops::ControlFlow::Continue(())
        };
        sensitivity(&model, &each, &probing(&rows, None), &mut progress).unwrap()
    };

    assert_eq!(seen.last(), Some(&(12 * 2 * 7)), "rows, layers, candidates");
    assert!(seen.is_sorted());
    for (layer, swapped) in layers.iter().enumerate() {
        assert_eq!(swapped.len(), 8);
        assert_eq!(swapped[0].kl_nats_per_token, 0.0);
        assert_eq!(swapped[0].attention, Variant::default());
        assert_eq!(swapped[0].state_bytes, Some(before as u64 / 2));
        // 4 heads of 6 channels, 78 pairs of 12 tokens.
        assert_eq!(swapped[0].flops, 4 * 4 * 6 * 78);
        for (found, candidate) in swapped[1..].iter().zip(candidates()) {
            let mut student = model.alias().unwrap();
            student.swap(&[layer], &candidate, 3).unwrap();
            let by_hand =
                divergence(&student, &model, &rows, None, &Batching::default(), &mut go_on)
                    .unwrap();
            assert_eq!(found.attention, candidate);
            assert_eq!(found.kl_nats_per_token, by_hand.kl_nats_per_token);
            assert!(found.kl_nats_per_token > 1e-6, "{found:?}");
            let others = swapped[0].state_bytes.unwrap();
            let all = state_bytes(&student, 12).unwrap() as u64;
            assert_eq!(found.state_bytes.unwrap() + others, all);
        }
        // Two of twelve tokens, keys and values of 24 channels in f64.
        assert_eq!(swapped[1].state_bytes, Some(2 * 2 * 24 * 8));
        assert_eq!(swapped[1].flops, 4 * 4 * 6 * 23);
    }
    assert_eq!(model.layers()[0].variant(), &Variant::default(), "the model is left as it was");
}

#[test]
fn a_choice_within_a_budget_is_the_best_of_all_mixtures_by_the_sum() {
    let model = language_model("gpt2", Kind::Double);
    let rows = rows(12, 2);
    let layers = measured(&model, &probing(&rows, None));
    let offers: Vec<Vec<Offer>> = layers
        .iter()
        .map(|layer| {
            let offer = |one: &Swapped| Offer {
                kl: one.kl_nats_per_token,
                cost: one.cost(Cost::StateBytes).unwrap(),
            };
            layer.iter().map(offer).collect()
        })
        .collect();
    let whole = offers[0][0].cost + offers[1][0].cost;
    for most in [whole, whole * 3 / 4, whole / 2, whole / 3] {
        let choice = allocate(&offers, Budget { cost: Cost::StateBytes, most }).unwrap();
        let of = |choice: [usize; 2]| {
            let [a, b] = [offers[0][choice[0]], offers[1][choice[1]]];
            (a.kl + b.kl, a.cost + b.cost)
        };
        let best = (0..8)
            .flat_map(|a| (0..8).map(move |b| of([a, b])))
            .filter(|(_, cost)| *cost <= most)
            .map(|(kl, _)| kl)
            .min_by(f64::total_cmp)
            .unwrap();
        assert_eq!(of([choice[0], choice[1]]).0, best, "{most} bytes");
        assert_eq!(choice == [0, 0], most == whole);
    }
}

#[test]
fn an_encoder_has_no_decoding_state_to_save() {
    let model = language_model("distilbert", Kind::Double);
    let rows = rows(12, 2);
    let masking =
        Masking { mask_id: 3, vocab_size: VOCAB as usize, special: vec![0, 1], rate: 0.4 };
    let window = [vec![variant(r#"{"kind": "window", "size": 2}"#)], Vec::new()];
    let probing = probing(&rows, Some((&masking, 5)));
    let layers = sensitivity(&model, &window, &probing, &mut go_on).unwrap();
    assert_eq!((layers[0].len(), layers[1].len()), (2, 1));
    assert!(layers[0][1].kl_nats_per_token > 0.0);
    // A window of 2 on both sides: 12 + 2 · 11 pairs.
    assert_eq!(layers[0][1].cost(Cost::Flops).unwrap(), 4 * 4 * 6 * 34);
    let refused = layers[0][1].cost(Cost::StateBytes);
    assert!(matches!(refused, Err(Error::Direction { .. })), "{refused:?}");
}

#[test]
fn what_a_layer_refuses_is_said_before_anything_is_measured() {
    let model = language_model("gpt2", Kind::Double);
    let rows = rows(12, 2);
    let fifth = variant(r#"{"kind": "single_head", "from": "best", "head": 4}"#);
    let each = [vec![variant(r#"{"kind": "window"}"#)], vec![fifth]];
    let mut n_told = 0;
    let mut progress = |_: usize| {
        n_told += 1;
        std::ops::ControlFlow::Continue(())
    };
    let refused = sensitivity(&model, &each, &probing(&rows, None), &mut progress);
    let message = refused.unwrap_err().to_string();
    assert!(message.contains("`head`") && message.contains("expected 0 to 3"), "{message}");
    assert_eq!(n_told, 0);
}
