//! Scores of heads against their definitions, one row and one head at a time in `f64`.

mod common;

use attn_core::testing::randn;
use attn_core::{Fill, ForwardOptions, Gate, Model, ModelInput, Rows};
use attn_data::batch::{Encoded, IGNORED, Masking, Side, collate, mask_tokens};
use attn_eval::{
    Batching, Error, Goal, Head, HeadScores, Learning, Method, Normalize, Order, Replacement,
    RowLoss, Scope, ablate, learn_gates, pick, score_heads, score_iteratively,
};
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
        RowLoss::Own { .. } => unreachable!("it is held against draws below"),
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

fn by(
    method: Method,
    model: &Model,
    rows: &[Encoded],
    kind: &RowLoss<'_>,
    batching: &Batching,
) -> HeadScores {
    let mut found = score_heads(model, rows, &[method], kind, batching, &mut go_on).unwrap();
    found.remove(0)
}

fn scored(model: &Model, rows: &[Encoded], kind: &RowLoss<'_>, batching: &Batching) -> HeadScores {
    by(Method::Michel, model, rows, kind, batching)
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
                    let interval = scores.interval_95.as_ref().unwrap()[layer][head as usize];
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
    assert_eq!(*before.ranked().last().unwrap(), Head { layer: 1, place: 2 });

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
        score_heads(&model, &rows, &[Method::Michel], &RowLoss::Label, &batching, &mut go_on);
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
        for place in 0..scores.len() {
            let of = |scores: &HeadScores| scores.interval_of(Head { layer, place }).unwrap();
            let (interval, expected) = (of(&divided), of(&plain));
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
fn heads_that_tie_go_in_one_step() {
    let model = classifier("gpt2", 2);
    let steps = |model: &Model| {
        let (loss, batching) = (RowLoss::Label, Batching::default());
        let rows = rows(8, 2);
        score_iteratively(model, &rows, Method::Michel, 0.25, &loss, &batching, &mut go_on).unwrap()
    };
    // Two of eight at a step, each with a place of its own.
    let apart = steps(&model);
    let mut all = apart.scores.concat();
    all.sort_by(f64::total_cmp);
    assert_eq!(all, [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5]);
    assert_eq!((apart.n_tied(), &apart.interval_95), (0, &None));
    tch::no_grad(|| {
        let _ = model.layers()[0].out().weight.shallow_clone().zero_();
    });
    let tied = steps(&model);
    assert_eq!(tied.scores[0], [0.0; 4], "none of them is said to matter less than another");
    assert_eq!(tied.n_tied(), 4);
    assert!(tied.scores[1].iter().all(|&step| step >= 1.0), "{:?}", tied.scores);
}

#[test]
fn a_model_or_a_row_that_has_no_such_loss_is_refused() {
    let unlabelled: Vec<Encoded> =
        rows(4, 2).into_iter().map(|row| Encoded { label: None, ..row }).collect();
    let run = |model: &Model, rows: &[Encoded], kind: &RowLoss<'_>| {
        score_heads(model, rows, &[Method::Michel], kind, &Batching::default(), &mut go_on)
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

/// Every method whose value of a row follows from the slopes at the gates.
#[test]
fn the_slopes_make_four_scores() {
    tch::set_num_threads(1);
    let model = classifier("gpt2", 3);
    let (rows, kind) = (rows(9, 3), RowLoss::Label);
    let all: Vec<Vec<f64>> =
        (0..8).map(|at| slopes(&model, &rows, &kind, at / 4, at as i64 % 4)).collect();
    let n = all[0].len() as f64;
    let mean = |of: &dyn Fn(usize) -> f64| (0..all[0].len()).map(of).sum::<f64>() / n;
    let close = |found: f64, expected: f64, name: &str| {
        assert!(
            (found - expected).abs() < 1e-6 * expected.abs().max(1e-3),
            "{name}: {found} {expected}"
        );
    };
    let methods = [Method::Taylor, Method::Fisher, Method::FisherBlock];
    let found =
        score_heads(&model, &rows, &methods, &kind, &Batching::default(), &mut go_on).unwrap();
    for (at, slopes) in all.iter().enumerate() {
        let (layer, head) = (at / 4, at % 4);
        close(found[0].scores[layer][head], mean(&|row| -slopes[row]), "taylor");
        close(found[1].scores[layer][head], mean(&|row| slopes[row].powi(2)), "fisher");
    }
    for layer in 0..2 {
        // Every order is tried: the greedy one takes the least at each step, and its scores never fall.
        let sum = |set: &[usize]| {
            mean(&|row| set.iter().map(|&head| all[4 * layer + head][row]).sum::<f64>().powi(2))
        };
        let mut gone: Vec<usize> = Vec::new();
        let mut least = 0.0_f64;
        while gone.len() < 4 {
            let with = |head: usize| -> Vec<usize> { gone.iter().copied().chain([head]).collect() };
            let next = (0..4)
                .filter(|head| !gone.contains(head))
                .min_by(|&a, &b| sum(&with(a)).total_cmp(&sum(&with(b))))
                .unwrap();
            gone.push(next);
            least = least.max(sum(&gone));
            close(found[2].scores[layer][next], least, "fisher_block");
        }
    }
}

#[test]
fn leaving_one_out_is_the_loss_without_less_that_with() {
    tch::set_num_threads(1);
    let masking = masking();
    for (model, kind) in [
        (classifier("gpt2", 3), RowLoss::Label),
        (
            language_model("distilbert", Kind::Double),
            RowLoss::MaskedTokens { masking: &masking, seed: 4 },
        ),
    ] {
        let rows = rows(9, 3);
        let found = by(Method::LeaveOneOut, &model, &rows, &kind, &Batching::default());
        for layer in 0..2 {
            for head in 0..4 {
                let at = |row, gate| loss(&model, row, &kind, layer, head, gate);
                let rises: Vec<f64> =
                    rows.iter().filter_map(|row| Some(at(row, 0.0)? - at(row, 1.0)?)).collect();
                let expected = rises.iter().sum::<f64>() / rises.len() as f64;
                let score = found.scores[layer][head as usize];
                assert!((score - expected).abs() < 1e-9, "{layer}-{head}: {score}, {expected}");
            }
        }
    }
}

#[test]
fn integrated_gradients_add_up_to_what_all_heads_are_worth() {
    tch::set_num_threads(1);
    for base in ["gpt2", "distilbert"] {
        let model = classifier(base, 3);
        let (rows, kind) = (rows(9, 3), RowLoss::Label);
        let found = by(Method::IntegratedGradients, &model, &rows, &kind, &Batching::default());
        let at = |row: &Encoded, gate: f64| {
            let g = Tensor::full([4], gate, (Kind::Double, tch::Device::Cpu));
            let gates = [Some(Gate::per_head(&g)), Some(Gate::per_head(&g))];
            let options = ForwardOptions { gates: &gates, ..ForwardOptions::default() };
            let input = ModelInput::new(Tensor::from_slice(&ids(row)).view([1, -1]));
            let logits = tch::no_grad(|| model.forward(&input, &options)).unwrap().logits.get(0);
            Some(naive_loss(&logits, row.label?))
        };
        let worth: Vec<f64> =
            rows.iter().filter_map(|row| Some(at(row, 0.0)? - at(row, 1.0)?)).collect();
        let expected = worth.iter().sum::<f64>() / worth.len() as f64;
        let total: f64 = found.scores.iter().flatten().sum();
        // What the sum over nodes may leave, of what rows are worth.
        let size = worth.iter().map(|worth| worth.abs()).sum::<f64>() / worth.len() as f64;
        assert!((total - expected).abs() <= 0.01 * size, "{base}: {total}, {expected} of {size}");
    }
}

/// The loss with one element of one head's output moved, by central differences; every head output element of one row.
#[test]
fn the_plain_gradient_is_that_of_each_element_of_a_heads_output() {
    tch::set_num_threads(1);
    const STEP: f64 = 1e-4;
    let model = classifier("gpt2", 3);
    let rows: Vec<Encoded> = rows(6, 3).into_iter().filter(|row| row.ids.len() < 9).collect();
    let kind = RowLoss::Label;
    let found = by(Method::PlainGradient, &model, &rows, &kind, &Batching::default());
    let labelled: Vec<&Encoded> = rows.iter().filter(|row| row.label.is_some()).collect();
    assert!(labelled.len() > 1);
    for (layer, head) in [(0, 1), (1, 3)] {
        let mut sum = 0.0;
        for row in &labelled {
            let input = || ModelInput::new(Tensor::from_slice(&ids(row)).view([1, -1]));
            let options = ForwardOptions { z: true, ..ForwardOptions::default() };
            let z = tch::no_grad(|| model.forward(&input(), &options)).unwrap().z;
            let z = z[layer].shallow_clone();
            let n = row.ids.len() as i64;
            let moved = |pos: i64, channel: i64, by: f64| {
                let r = z.copy();
                let mut cell = r.get(0).get(head).get(pos).get(channel);
                cell += by;
                let g = Tensor::ones([1, 4, n, 1], (Kind::Double, tch::Device::Cpu));
                let _ = g.get(0).get(head).get(pos).fill_(0.0);
                let mut gates = vec![None, None];
                gates[layer] = Some(Gate { g, fill: Fill::Values(r) });
                let options = ForwardOptions { gates: &gates, ..ForwardOptions::default() };
                let logits =
                    tch::no_grad(|| model.forward(&input(), &options)).unwrap().logits.get(0);
                naive_loss(&logits, row.label.unwrap())
            };
            let cells = (0..n).flat_map(|pos| (0..6).map(move |channel| (pos, channel)));
            let total: f64 = cells
                .map(|(pos, channel)| {
                    let rise = moved(pos, channel, STEP) - moved(pos, channel, -STEP);
                    (rise / (2.0 * STEP)).abs()
                })
                .sum();
            sum += total / (n * 6) as f64;
        }
        let expected = sum / labelled.len() as f64;
        let score = found.scores[layer][head as usize];
        assert!((score - expected).abs() < 1e-6 * expected, "{layer}-{head}: {score}, {expected}");
    }
}

#[test]
fn confidence_is_the_mean_of_the_largest_weights() {
    let model = language_model("distilbert", Kind::Double);
    let rows = rows(7, 3);
    for batching in batchings() {
        let masking = masking();
        let kind = RowLoss::MaskedTokens { masking: &masking, seed: 0 };
        let found = by(Method::Confidence, &model, &rows, &kind, &batching);
        let mut expected = [0.0; 8];
        for row in &rows {
            let input = ModelInput::new(Tensor::from_slice(&ids(row)).view([1, -1]));
            let options = ForwardOptions { attentions: Rows::All, ..ForwardOptions::default() };
            let weights = tch::no_grad(|| model.forward(&input, &options)).unwrap().attentions;
            for (at, expected) in expected.iter_mut().enumerate() {
                let weights = weights[at / 4].get(0).get(at as i64 % 4);
                let rows: Vec<Vec<f64>> = Vec::try_from(weights).unwrap();
                let largest = rows.iter().map(|row| row.iter().fold(0.0, |a: f64, &b| a.max(b)));
                *expected += largest.sum::<f64>() / rows.len() as f64;
            }
        }
        for (at, expected) in expected.iter().enumerate() {
            let score = found.scores[at / 4][at % 4];
            assert!((score - expected / 7.0).abs() < 1e-12, "{at}: {score}");
        }
    }
}

/// A model whose second layer chooses its heads.
fn routed(base: &str, by: &str) -> Model {
    let mut model = language_model(base, Kind::Double);
    let variant = serde_json::json!({"kind": "routed", "by": by});
    model.swap(&[1], &serde_json::from_value(variant).unwrap(), 0).unwrap();
    for (name, tensor) in model.parameters() {
        if name.contains("router.") {
            let value = randn(9, &tensor.size()) * 1.5 - if tensor.dim() == 1 { 0.3 } else { 0.0 };
            tch::no_grad(|| tensor.shallow_clone().copy_(&value));
        }
    }
    model
}

#[test]
fn open_is_the_share_of_tokens_that_a_head_runs_for() {
    for (base, by_what) in [("gpt2", "token"), ("distilbert", "token"), ("distilbert", "text")] {
        let model = routed(base, by_what);
        let rows = rows(9, 3);
        let masking = masking();
        let kind = match base {
            "gpt2" => RowLoss::NextToken,
            _ => RowLoss::MaskedTokens { masking: &masking, seed: 0 },
        };
        let parameter = |part: &str| {
            let found = model.parameters().into_iter().find(|(name, _)| name.ends_with(part));
            found.unwrap().1
        };
        let (weight, bias) = (parameter("router.weight"), parameter("router.bias"));
        for batching in batchings() {
            let found = by(Method::Open, &model, &rows, &kind, &batching);
            assert_eq!(found.n_rows, 9);
            let mut expected = [0.0; 4];
            for row in &rows {
                let input = ModelInput::new(Tensor::from_slice(&ids(row)).view([1, -1]));
                let options =
                    ForwardOptions { attention_inputs: true, ..ForwardOptions::default() };
                let hidden = tch::no_grad(|| model.forward(&input, &options)).unwrap();
                let hidden = hidden.attention_inputs[1].get(0); // [n, hidden]
                let read = match by_what {
                    "text" => {
                        hidden.mean_dim([0i64].as_slice(), true, Kind::Double).expand_as(&hidden)
                    }
                    _ => hidden,
                };
                for token in 0..read.size()[0] {
                    for (h, expected) in (0..).zip(expected.iter_mut()) {
                        let dot =
                            (read.get(token) * weight.get(h)).sum(Kind::Double).double_value(&[]);
                        let is_open = dot + bias.double_value(&[h]) > 0.0;
                        *expected += f64::from(u8::from(is_open)) / read.size()[0] as f64 / 9.0;
                    }
                }
            }
            assert!(found.scores[0].iter().all(|&score| score == 1.0), "they always run");
            for (score, expected) in found.scores[1].iter().zip(expected) {
                assert!((score - expected).abs() < 1e-12, "{base} {by_what}: {score}, {expected}");
            }
            let total: f64 = expected.iter().sum();
            assert!((0.3..3.7).contains(&total), "some run and some do not: {expected:?}");
        }
    }
    let plain = language_model("gpt2", Kind::Double);
    let methods = [Method::Open];
    let error = score_heads(
        &plain,
        &rows(3, 3),
        &methods,
        &RowLoss::NextToken,
        &batchings()[0],
        &mut go_on,
    );
    assert!(error.unwrap_err().to_string().contains("no layer is `routed`"));
}

/// Without labels: the slope of KL to the model's own output is zero, so answers are drawn from it.
#[test]
fn own_answers_are_drawn_whatever_the_batch() {
    let model = classifier("distilbert", 3);
    let rows = rows(40, 3);
    let kind = RowLoss::Own { of: &RowLoss::Label, seed: 5 };
    let all: Vec<HeadScores> = batchings()
        .iter()
        .map(|batching| by(Method::Fisher, &model, &rows, &kind, batching))
        .collect();
    assert_eq!(all[0].n_rows, 40, "rows without a label have predictions, too");
    for other in &all[1..] {
        for (a, b) in all[0].scores.iter().flatten().zip(other.scores.iter().flatten()) {
            assert!((a - b).abs() < 1e-9 * a.abs(), "{a} {b}");
        }
    }
    // On average over draws it is the curvature of KL: half of it times the square of a small step is what KL comes to.
    let draws = (0..400).map(|seed| {
        let kind = RowLoss::Own { of: &RowLoss::Label, seed };
        by(Method::Fisher, &model, &rows, &kind, &Batching::default()).scores[1][2]
    });
    let fisher = draws.sum::<f64>() / 400.0;
    const STEP: f64 = 1e-2;
    let probabilities = |row: &Encoded, gate: f64| -> Vec<f64> {
        let g = Tensor::from_slice(&[1.0, 1.0, gate, 1.0]);
        let gates = [None, Some(Gate::per_head(&g))];
        let options = ForwardOptions { gates: &gates, ..ForwardOptions::default() };
        let input = ModelInput::new(Tensor::from_slice(&ids(row)).view([1, -1]));
        let logits = tch::no_grad(|| model.forward(&input, &options)).unwrap().logits.get(0);
        Vec::try_from(logits.softmax(-1, Kind::Double)).unwrap()
    };
    let kl = rows.iter().map(|row| {
        let (p, q) = (probabilities(row, 1.0), probabilities(row, 1.0 - STEP));
        p.iter().zip(q).map(|(p, q)| p * (p / q).ln()).sum::<f64>()
    });
    let expected = 2.0 * kl.sum::<f64>() / 40.0 / (STEP * STEP);
    assert!((fisher / expected - 1.0).abs() < 0.15, "{fisher} against {expected}");
}

/// A head of noise, which the loss is better without, closes; those that the classes are read from stay.
#[test]
fn learned_gates_close_what_does_harm_and_keep_what_the_task_needs() {
    tch::set_num_threads(1);
    let model = classifier("distilbert", 2);
    // Labels are what the model says itself, with all heads of the second layer but one: that one can only do harm.
    let g = Tensor::from_slice(&[1.0, 1.0, 0.0, 1.0]);
    let gates = [None, Some(Gate::per_head(&g))];
    let rows: Vec<Encoded> = rows(60, 2)
        .into_iter()
        .map(|row| {
            let input = ModelInput::new(Tensor::from_slice(&ids(&row)).view([1, -1]));
            let options = ForwardOptions { gates: &gates, ..ForwardOptions::default() };
            let logits = tch::no_grad(|| model.forward(&input, &options)).unwrap().logits;
            Encoded { label: Some(logits.get(0).argmax(0, false).int64_value(&[])), ..row }
        })
        .collect();
    let learn = |goal| {
        let learning = Learning { goal, steps: 150, lr: 0.1, seed: 1 };
        let kind = RowLoss::Label;
        learn_gates(&model, &rows, &learning, &kind, &Batching::default(), &mut go_on).unwrap()
    };
    let open = learn(Goal::HardConcrete { lambda: 0.005 });
    assert!(open.iter().flatten().all(|p| (0.0..=1.0).contains(p)));
    assert!(open[1][2] < 0.5, "{open:?}");
    assert!(open.iter().flatten().any(|&p| p > 0.9), "{open:?}");
    // The dearer a head, the fewer stay.
    let dear = learn(Goal::HardConcrete { lambda: 1.0 });
    let total = |of: &[Vec<f64>]| of.iter().flatten().sum::<f64>();
    assert!(total(&dear) < 0.5 * total(&open), "{dear:?} {open:?}");

    // The half that is kept is worth more than the half that goes.
    let kept = learn(Goal::Subset { keep: 4 });
    let half = |order| pick(&kept, 4, order, Scope::Global, 0).unwrap().heads;
    let choices = [half(Order::Top), half(Order::Bottom)];
    let (zero, kind) = (Replacement::Zero, RowLoss::Label);
    let batching = Batching::default();
    let found = ablate(&model, &rows, &choices, zero, &kind, &batching, &mut go_on).unwrap();
    let [without_best, without_rest] = [0, 1].map(|at| found.effects()[at].loss.value);
    assert!(without_best > without_rest + 0.1, "{without_best} {without_rest}");
}
