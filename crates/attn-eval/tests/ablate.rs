//! The effect of heads against its definition: one row and one choice of heads at a time, in `f64`.

mod common;

use attn_core::{Fill, ForwardOptions, Gate, LoadOptions, Model, ModelInput, WantedHead};
use attn_data::batch::{Encoded, IGNORED, Masking, Side, collate, mask_tokens};
use attn_eval::{
    Batching, Error, Head, Outcome, Replacement, RowLoss, ablate, all_groups, all_heads, mean_z,
    stats::Interval,
};
use common::{VOCAB, batchings, classifier, go_on, ids, language_model, naive_loss, rows, shaken};
use serde_json::json;
use tch::{Kind, Tensor};

fn masking() -> Masking {
    Masking { mask_id: 3, vocab_size: VOCAB as usize, special: vec![0, 1], rate: 0.4 }
}

fn head(layer: usize, place: usize) -> Head {
    Head { layer, place }
}

/// Single heads, pairs within and across layers, none, all.
fn choices(model: &Model) -> Vec<Vec<Head>> {
    let mut all: Vec<Vec<Head>> = all_heads(model).into_iter().map(|head| vec![head]).collect();
    all.extend([
        vec![],
        vec![head(1, 2), head(0, 1)],
        vec![head(1, 0), head(1, 3)],
        all_heads(model),
        vec![head(0, 0), head(0, 3), head(1, 1)],
    ]);
    all
}

/// The logits of one row alone without `choice`, where `r` stands in for them: `[n, classes]` and what is predicted there.
fn predictions(
    model: &Model,
    row: &Encoded,
    kind: &RowLoss<'_>,
    choice: &[Head],
    fill: impl Fn(usize) -> Fill,
) -> Option<(Tensor, Vec<i64>)> {
    let gates: Vec<Option<Gate>> = (0..model.layers().len())
        .map(|layer| {
            let g = Tensor::ones([1, 4, 1, 1], (Kind::Double, tch::Device::Cpu));
            for head in choice.iter().filter(|head| head.layer == layer) {
                let _ = g.narrow(1, head.place as i64, 1).fill_(0.0);
            }
            Some(Gate { g, fill: fill(layer) })
        })
        .collect();
    let options = ForwardOptions { gates: &gates, ..ForwardOptions::default() };
    let logits = |ids: &[i64]| {
        let input = ModelInput::new(Tensor::from_slice(ids).view([1, -1]));
        tch::no_grad(|| model.forward(&input, &options)).unwrap().logits
    };
    let own = ids(row);
    match kind {
        RowLoss::Label => row.label.map(|label| (logits(&own), vec![label])),
        RowLoss::NextToken => (own.len() > 1).then(|| {
            let n = own.len() as i64 - 1;
            (logits(&own).get(0).narrow(0, 0, n), own[1..].to_vec())
        }),
        RowLoss::MaskedTokens { masking, seed } => {
            let masked = mask_tokens(&collate(&[row], 0, Side::Right), masking, *seed, 0).unwrap();
            let hidden = (0_i64..).zip(masked.labels).filter(|(_, label)| *label != IGNORED);
            let (at, labels): (Vec<i64>, Vec<i64>) = hidden.unzip();
            let picked = logits(&masked.ids).get(0).index_select(0, &Tensor::from_slice(&at));
            (!labels.is_empty()).then_some((picked, labels))
        }
        RowLoss::Own { of: RowLoss::Label, .. } => Some((logits(&own), vec![0])),
        RowLoss::Own { of, .. } => predictions(model, row, of, choice, fill),
    }
}

fn expected(own: &Tensor, other: &Tensor, targets: &[i64], is_own: bool) -> Outcome {
    let rows = |x: &Tensor| -> Vec<Vec<f64>> { Vec::try_from(x.contiguous()).unwrap() };
    let softmax = |row: &[f64]| -> Vec<f64> {
        let total: f64 = row.iter().map(|x| x.exp()).sum();
        row.iter().map(|x| x.exp() / total).collect()
    };
    let top =
        |row: &[f64]| (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap() as i64;
    let (mut loss, mut hits, mut kl) = (0.0, 0.0, 0.0);
    let n = targets.len() as f64;
    for (at, (p, q)) in rows(own).iter().zip(rows(other)).enumerate() {
        let (own_p, own_q) = (softmax(p), softmax(&q));
        let one: f64 = own_p.iter().zip(&own_q).map(|(p, q)| p * (p / q).ln()).sum();
        kl += one / n;
        loss += if is_own { one } else { naive_loss(&other.get(at as i64), targets[at]) } / n;
        let wanted = if is_own { top(p) } else { targets[at] };
        hits += f64::from(u8::from(top(&q) == wanted)) / n;
    }
    Outcome { loss, accuracy: hits, kl }
}

fn assert_same(found: &Outcome, expected: &Outcome, name: &str) {
    for (found, expected) in
        [(found.loss, expected.loss), (found.accuracy, expected.accuracy), (found.kl, expected.kl)]
    {
        assert!((found - expected).abs() < 1e-9, "{name}: {found} against {expected}");
    }
}

/// Every choice, row and batching against `fill`, which stands in for heads of a row and layer.
fn check(
    model: &Model,
    kind: &RowLoss<'_>,
    replacement: Replacement<'_>,
    fill: impl Fn(&Encoded, usize) -> Fill,
) {
    let rows = rows(7, 3);
    let choices = choices(model);
    for batching in batchings() {
        let found =
            ablate(model, &rows, &choices, replacement, kind, &batching, &mut go_on).unwrap();
        let mut at = 0;
        for (place, row) in rows.iter().enumerate() {
            let none = predictions(model, row, kind, &[], |_| Fill::Zero);
            let Some((own, targets)) = none else {
                assert!(!found.rows.contains(&place));
                continue;
            };
            assert_eq!(found.rows[at], place);
            let name = format!("{} by {}, row {place}", replacement.name(), kind.name());
            assert_same(
                &found.untouched[at],
                &expected(&own, &own, &targets, kind.is_own()),
                &name,
            );
            for (choice, all) in choices.iter().zip(&found.without) {
                let (other, _) =
                    predictions(model, row, kind, choice, |layer| fill(row, layer)).unwrap();
                let expected = expected(&own, &other, &targets, kind.is_own());
                assert_same(&all[at], &expected, &format!("{name}, {choice:?}"));
            }
            at += 1;
        }
        assert_eq!(found.rows.len(), at);
    }
}

#[test]
fn heads_left_out_cost_what_a_pass_without_them_does() {
    tch::set_num_threads(1);
    let masking = masking();
    let masked = RowLoss::MaskedTokens { masking: &masking, seed: 4 };
    let double = |base| language_model(base, Kind::Double);
    for (model, kind) in [
        (classifier("distilbert", 3), RowLoss::Label),
        (classifier("gpt2", 3), RowLoss::Own { of: &RowLoss::Label, seed: 1 }),
        (double("gpt2"), RowLoss::NextToken),
        (double("gpt2"), RowLoss::Own { of: &RowLoss::NextToken, seed: 1 }),
        (double("distilbert"), masked),
        (double("distilbert"), RowLoss::Own { of: &masked, seed: 1 }),
    ] {
        check(&model, &kind, Replacement::Zero, |_, _| Fill::Zero);
    }
}

#[test]
fn means_stand_in_for_heads() {
    tch::set_num_threads(1);
    let model = language_model("gpt2", Kind::Double);
    let calibration = &rows(11, 3)[6..];
    // The mean over tokens, not over rows.
    let mut sums = [0, 1].map(|_| Tensor::zeros([4, 6], (Kind::Double, tch::Device::Cpu)));
    let mut n = 0;
    for row in calibration {
        let input = ModelInput::new(Tensor::from_slice(&ids(row)).view([1, -1]));
        let options = ForwardOptions { z: true, ..ForwardOptions::default() };
        let z = tch::no_grad(|| model.forward(&input, &options)).unwrap().z;
        for (sum, z) in sums.iter_mut().zip(z) {
            *sum += z.get(0).sum_dim_intlist([1i64].as_slice(), false, Kind::Double);
        }
        n += row.ids.len() as i64;
    }
    let means = sums.map(|sum| (sum / n).view([1, 4, 1, 6]));
    for (mean, found) in means.iter().zip(mean_z(&model, calibration, &batchings()[1]).unwrap()) {
        attn_core::testing::assert_close("mean", &found, mean, 1e-12);
    }
    check(&model, &RowLoss::NextToken, Replacement::Mean(calibration), |_, layer| {
        Fill::Values(means[layer].shallow_clone())
    });
}

#[test]
fn queries_of_zeros_stand_in_for_heads() {
    tch::set_num_threads(1);
    let model = language_model("gpt2", Kind::Double);
    check(&model, &RowLoss::NextToken, Replacement::Uniform, |_, _| Fill::ZeroQuery);
}

/// The donor is not known from outside: of two rows it is the other one.
#[test]
fn another_row_stands_in_for_heads() {
    tch::set_num_threads(1);
    let model = language_model("gpt2", Kind::Double);
    let rows = rows(7, 3);
    let pair = &rows[1..3]; // of 8 and of 15 tokens: the shorter one begins again
    assert_eq!([pair[0].ids.len(), pair[1].ids.len()], [8, 15]);
    let z = |row: &Encoded| {
        let input = ModelInput::new(Tensor::from_slice(&ids(row)).view([1, -1]));
        let options = ForwardOptions { z: true, ..ForwardOptions::default() };
        tch::no_grad(|| model.forward(&input, &options)).unwrap().z
    };
    for batching in batchings() {
        let replacement = Replacement::Resample { from: pair, seed: 3 };
        let choices = choices(&model);
        let kind = RowLoss::NextToken;
        let found =
            ablate(&model, pair, &choices, replacement, &kind, &batching, &mut go_on).unwrap();
        for (at, row) in pair.iter().enumerate() {
            let other = &pair[1 - at];
            let n = other.ids.len() as i64;
            let place: Vec<i64> = (0..row.ids.len() as i64).map(|at| at % n).collect();
            let donated: Vec<Tensor> =
                z(other).iter().map(|z| z.index_select(2, &Tensor::from_slice(&place))).collect();
            let fill = |layer: usize| Fill::Values(donated[layer].shallow_clone());
            let (own, targets) = predictions(&model, row, &kind, &[], fill).unwrap();
            for (choice, all) in choices.iter().zip(&found.without) {
                let (without, _) = predictions(&model, row, &kind, choice, fill).unwrap();
                let expected = expected(&own, &without, &targets, false);
                assert_same(&all[at], &expected, &format!("{choice:?}"));
            }
        }
    }
    let few = &rows[..1];
    let lone = Replacement::Resample { from: few, seed: 0 };
    let error =
        ablate(&model, &rows, &[], lone, &RowLoss::NextToken, &Batching::default(), &mut go_on);
    assert!(matches!(error, Err(Error::Donors { n: 1 })));
}

#[test]
fn effects_are_differences_on_the_same_rows() {
    let model = classifier("distilbert", 3);
    let rows = rows(9, 3);
    let choices = [vec![head(0, 0)], vec![]];
    let found = ablate(
        &model,
        &rows,
        &choices,
        Replacement::Zero,
        &RowLoss::Label,
        &Batching::default(),
        &mut go_on,
    )
    .unwrap();
    let effects = found.effects();
    let n = found.rows.len() as f64;
    let rise = found.without[0].iter().zip(&found.untouched).map(|(a, b)| a.loss - b.loss);
    assert!((effects[0].loss.value - rise.sum::<f64>() / n).abs() < 1e-12);
    let interval = effects[0].loss.interval_95.unwrap();
    assert!(interval.low < effects[0].loss.value && effects[0].loss.value < interval.high);
    // Nothing is left out: nothing changes, on any rows.
    let none = effects[1].loss;
    assert_eq!((none.value, none.interval_95), (0.0, Some(Interval { low: 0.0, high: 0.0 })));
    assert_eq!(effects[1].kl.value, 0.0);
}

#[test]
fn interactions_are_what_both_do_beyond_each() {
    let model = classifier("gpt2", 3);
    let rows = rows(9, 3);
    let left_out = |choices: &[Vec<Head>]| {
        let (zero, batching) = (Replacement::Zero, Batching::default());
        ablate(&model, &rows, choices, zero, &RowLoss::Label, &batching, &mut go_on).unwrap()
    };
    let alone = [vec![head(0, 0)], vec![head(0, 2)], vec![head(1, 1)]];
    let pairs = [[0, 2], [1, 0]];
    let found = left_out(&alone);
    let together = left_out(&pairs.map(|[a, b]| [&alone[a][..], &alone[b]].concat()));
    let all = found.interactions(&pairs, &together);
    let mean = |all: &[Outcome]| all.iter().map(|it| it.loss).sum::<f64>() / all.len() as f64;
    for ((found_one, [a, b]), both) in all.iter().zip(pairs).zip(&together.without) {
        let expected =
            mean(both) + mean(&found.untouched) - mean(&found.without[a]) - mean(&found.without[b]);
        assert!((found_one.value - expected).abs() < 1e-12, "{} {expected}", found_one.value);
        assert!(expected.abs() > 1e-6, "layers are not linear");
        let Interval { low, high } = found_one.interval_95.unwrap();
        assert!(low < found_one.value && found_one.value < high);
    }
    let [loss, _] = left_out(&[]).baseline();
    assert!(loss.interval_95.is_some());
    let lone = ablate(
        &model,
        &rows[..1],
        &alone,
        Replacement::Zero,
        &RowLoss::Label,
        &Batching::default(),
        &mut go_on,
    );
    assert_eq!(lone.unwrap().effects()[0].loss.interval_95, None, "one row has no spread");
}

#[test]
fn heads_that_are_not_there_are_refused_by_name() {
    let mut model = classifier("gpt2", 3);
    model.select_heads(1, &[0, 2]).unwrap();
    let rows = rows(3, 3);
    for (wanted, said) in [
        (head(2, 0), "there is no head 2-0: the model has layers 0 to 1"),
        (head(1, 2), "there is no head 1-2: layer 1 has heads 0 to 1"),
    ] {
        let error = ablate(
            &model,
            &rows,
            &[vec![wanted]],
            Replacement::Zero,
            &RowLoss::Label,
            &Batching::default(),
            &mut go_on,
        );
        assert_eq!(error.unwrap_err().to_string(), said);
    }
}

#[test]
fn a_group_is_the_query_heads_that_read_one_key_value_head() {
    let config = json!({
        "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
    });
    let config = attn_core::Config::from_json(serde_json::from_value(config).unwrap()).unwrap();
    let options = LoadOptions { head: WantedHead::AsSaved, ..LoadOptions::default() };
    let mut model = shaken(Model::init(config, &options).unwrap());
    let places = |model: &Model| -> Vec<Vec<usize>> {
        all_groups(model)
            .iter()
            .map(|group| group.iter().map(|head| head.place).collect())
            .collect()
    };
    assert_eq!(places(&model), [vec![0, 1], vec![2, 3]]);
    model.select_heads(0, &[1, 2, 3]).unwrap();
    assert_eq!(places(&model), [vec![0], vec![1, 2]]);
}

/// In `f32` on the CPU logits are read by a kernel: the same to rounding, KL of nothing left out included.
#[test]
fn f32_is_read_as_f64_to_rounding() {
    for base in ["gpt2", "distilbert"] {
        let models = [Kind::Double, Kind::Float].map(|kind| language_model(base, kind));
        let masking = masking();
        let kind = match base {
            "gpt2" => RowLoss::NextToken,
            _ => RowLoss::MaskedTokens { masking: &masking, seed: 4 },
        };
        let rows = rows(9, 3);
        let [wide, narrow] = models.map(|model| {
            let (zero, batching) = (Replacement::Zero, Batching::default());
            let choices = choices(&model);
            ablate(&model, &rows, &choices, zero, &kind, &batching, &mut go_on).unwrap()
        });
        for (a, b) in wide.without.iter().flatten().zip(narrow.without.iter().flatten()) {
            assert!((a.loss - b.loss).abs() < 1e-4 && (a.kl - b.kl).abs() < 1e-4, "{a:?} {b:?}");
            assert_eq!(a.accuracy, b.accuracy);
        }
        let nothing = &narrow.without[8]; // the empty choice
        assert!(nothing.iter().all(|it| it.kl.abs() < 1e-6), "{nothing:?}");
    }
}
