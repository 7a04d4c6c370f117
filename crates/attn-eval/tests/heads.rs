//! Scores of heads against their definitions, one row and one head at a time in `f64`.

mod common;

use attn_core::{ForwardOptions, Gate, Model, ModelInput};
use attn_data::batch::{Encoded, IGNORED, Masking, Side, collate, mask_tokens};
use attn_eval::{Batching, Error, HeadScores, Method, Normalize, RowLoss, score_heads};
use common::{VOCAB, batchings, classifier, go_on, ids, language_model, naive_loss, rows};
use tch::{Kind, Tensor};

/// What is hidden of the rows of an encoder.
fn masking() -> Masking {
    Masking { mask_id: 3, vocab_size: VOCAB as usize, special: vec![0, 1], rate: 0.4 }
}

/// The loss of one row alone with the head `head` of `layer` gated by `gate`; none where it predicts nothing.
fn loss(
    model: &Model,
    row: &Encoded,
    kind: &RowLoss<'_>,
    layer: usize,
    head: i64,
    gate: f64,
) -> Option<f64> {
    let gates: Vec<Option<Gate>> = (0..model.layers().len())
        .map(|at| {
            let g = Tensor::ones([4], (Kind::Double, tch::Device::Cpu));
            if at == layer {
                let _ = g.get(head).fill_(gate);
            }
            Some(Gate::per_head(&g))
        })
        .collect();
    let options = ForwardOptions { gates: &gates, ..ForwardOptions::default() };
    let logits = |ids: &[i64]| {
        let input = ModelInput::new(Tensor::from_slice(ids).view([1, -1]));
        tch::no_grad(|| model.forward(&input, &options)).unwrap().logits.get(0)
    };
    let mean = |losses: Vec<f64>| losses.iter().sum::<f64>() / losses.len() as f64;
    let ids = ids(row);
    match kind {
        RowLoss::Label => Some(naive_loss(&logits(&ids), row.label?)),
        RowLoss::NextToken => {
            let logits = logits(&ids);
            let of = |at: usize| naive_loss(&logits.get(at as i64 - 1), ids[at]);
            (ids.len() > 1).then(|| mean((1..ids.len()).map(of).collect()))
        }
        RowLoss::MaskedTokens { masking, seed } => {
            let masked = mask_tokens(&collate(&[row], 0, Side::Right), masking, *seed, 0).unwrap();
            let logits = logits(&masked.ids);
            let hidden = (0..).zip(masked.labels).filter(|(_, label)| *label != IGNORED);
            let losses: Vec<f64> =
                hidden.map(|(at, label)| naive_loss(&logits.get(at), label)).collect();
            (!losses.is_empty()).then(|| mean(losses))
        }
    }
}

/// ∂L/∂gate of every row that has a loss, by central differences.
fn slopes(
    model: &Model,
    rows: &[Encoded],
    kind: &RowLoss<'_>,
    layer: usize,
    head: i64,
) -> Vec<f64> {
    const STEP: f64 = 1e-4;
    let at = |row, gate| loss(model, row, kind, layer, head, gate);
    rows.iter()
        .filter_map(|row| Some((at(row, 1.0 + STEP)? - at(row, 1.0 - STEP)?) / (2.0 * STEP)))
        .collect()
}

fn scored(model: &Model, rows: &[Encoded], kind: &RowLoss<'_>, batching: &Batching) -> HeadScores {
    score_heads(model, rows, Method::Michel, kind, batching, &mut go_on).unwrap()
}

#[test]
fn importance_is_the_mean_size_of_the_slope_of_each_row_whatever_the_batch() {
    // Thousands of tiny passes, in which threads would only wait for each other.
    tch::set_num_threads(1);
    let masking = masking();
    let masked = RowLoss::MaskedTokens { masking: &masking, seed: 4 };
    let double = |base| language_model(base, Kind::Double);
    let cases = [
        (classifier("distilbert", 3), RowLoss::Label),
        (classifier("gpt2", 3), RowLoss::Label),
        (double("gpt2"), RowLoss::NextToken),
        (double("distilbert"), masked),
    ];
    let mut signs_mattered = false;
    for (model, kind) in cases {
        let rows = rows(9, 3);
        let all: Vec<HeadScores> =
            batchings().iter().map(|batching| scored(&model, &rows, &kind, batching)).collect();
        for layer in 0..2 {
            for head in 0..4 {
                let slopes = slopes(&model, &rows, &kind, layer, head);
                let n = slopes.len() as f64;
                let expected = slopes.iter().map(|slope| slope.abs()).sum::<f64>() / n;
                signs_mattered |= (slopes.iter().sum::<f64>() / n).abs() < 0.5 * expected;
                for scores in &all {
                    let found = scores.scores[layer][head as usize];
                    assert!(
                        (found - expected).abs() < 1e-6 * expected.max(1e-3),
                        "{} {layer}-{head}: {found} against {expected}",
                        kind.name()
                    );
                    let interval = scores.interval_95[layer][head as usize];
                    assert!(interval.low <= found && found <= interval.high, "{interval:?}");
                    assert_eq!(scores.n_rows, slopes.len());
                }
            }
        }
    }
    assert!(
        signs_mattered,
        "rows whose slopes cancel, or the order of mean and size is not tested"
    );
}

#[test]
fn a_head_that_adds_nothing_scores_zero_and_removed_heads_keep_the_others_numbers() {
    let mut model = classifier("distilbert", 3);
    let out = model.layers()[1].out().weight.shallow_clone(); // [hidden, heads · head_dim]
    tch::no_grad(|| {
        let _ = out.narrow(1, 2 * 6, 6).zero_();
    });
    let rows = rows(12, 3);
    let before = scored(&model, &rows, &RowLoss::Label, &Batching::default());
    assert_eq!(before.scores[1][2], 0.0);
    assert_eq!(before.n_tied(), 0, "a single zero is no tie");
    assert_eq!(*before.ranked().last().unwrap(), (1, 2));

    model.select_heads(1, &[0, 1, 3]).unwrap();
    let after = scored(&model, &rows, &RowLoss::Label, &Batching::default());
    assert_eq!(after.heads, [vec![0, 1, 2, 3], vec![0, 1, 3]]);
    for (place, &head) in after.heads[1].iter().enumerate() {
        let (found, expected) = (after.scores[1][place], before.scores[1][head as usize]);
        assert!((found - expected).abs() < 1e-12, "{head}: {found} against {expected}");
    }

    model.select_heads(1, &[]).unwrap();
    let none = scored(&model, &rows, &RowLoss::Label, &Batching::default());
    assert_eq!((none.scores[0].len(), none.scores[1].len()), (4, 0));

    model.select_heads(0, &[]).unwrap();
    let batching = Batching::default();
    let refused =
        score_heads(&model, &rows, Method::Michel, &RowLoss::Label, &batching, &mut go_on);
    assert!(matches!(refused.unwrap_err(), Error::Nothing(_)));
}

#[test]
fn a_layer_is_divided_by_its_norm_and_one_of_zeros_stays() {
    let mut model = classifier("gpt2", 2);
    let rows = rows(8, 2);
    let plain = scored(&model, &rows, &RowLoss::Label, &Batching::default());
    let divided = plain.clone().normalized(Normalize::Layer);
    for (layer, scores) in divided.scores.iter().enumerate() {
        let norm = scores.iter().map(|score| score * score).sum::<f64>();
        assert!((norm - 1.0).abs() < 1e-12, "{norm}");
        let factor = plain.scores[layer][0] / scores[0];
        for (head, interval) in divided.interval_95[layer].iter().enumerate() {
            let expected = plain.interval_95[layer][head];
            assert!((factor * interval.high - expected.high).abs() < 1e-12);
        }
    }
    assert_eq!(plain.clone().normalized(Normalize::None), plain);

    let out = model.layers()[0].out().weight.shallow_clone();
    tch::no_grad(|| {
        let _ = out.shallow_clone().zero_();
    });
    let zeros = scored(&model, &rows, &RowLoss::Label, &Batching::default());
    let zeros = zeros.normalized(Normalize::Layer);
    assert_eq!(zeros.scores[0], [0.0; 4]);
    assert_eq!(zeros.n_tied(), 4);
    model.select_heads(0, &[1, 2]).unwrap();
}

#[test]
fn a_model_or_a_row_that_has_no_such_loss_is_refused() {
    let unlabelled: Vec<Encoded> =
        rows(4, 2).into_iter().map(|row| Encoded { label: None, ..row }).collect();
    let run = |model: &Model, rows: &[Encoded], kind: &RowLoss<'_>| {
        score_heads(model, rows, Method::Michel, kind, &Batching::default(), &mut go_on)
            .unwrap_err()
    };
    let gpt2 = language_model("gpt2", Kind::Float);
    let bert = language_model("distilbert", Kind::Float);
    assert!(matches!(run(&gpt2, &rows(4, 2), &RowLoss::Label), Error::Head { .. }));
    assert!(matches!(run(&bert, &rows(4, 2), &RowLoss::NextToken), Error::Direction { .. }));
    let classifier = classifier("gpt2", 2);
    assert!(matches!(run(&classifier, &unlabelled, &RowLoss::Label), Error::Nothing(_)));
    assert!(matches!(run(&classifier, &rows(9, 4), &RowLoss::Label), Error::Label { .. }));
    assert!(matches!(run(&classifier, &[], &RowLoss::Label), Error::Nothing(_)));
}
