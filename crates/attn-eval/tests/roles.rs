//! What heads do, through real models: batches change nothing, gates leave heads out, bad input is refused.

mod common;

use attn_core::{ForwardOptions, Gate, Model, ModelInput, Rows};
use attn_data::{batch::Encoded, treebank::Tree};
use attn_eval::{
    Batching, Error, Known, Window, attention_shift, head_roles, n_passes, phenomena, repeats,
    syntax,
};
use common::{VOCAB, batchings, classifier, go_on, ids, language_model, naive_loss, rows};
use tch::{Kind, Tensor};

const SPECIAL: [u32; 2] = [0, 1];

fn counts() -> Vec<u64> {
    (0..VOCAB as u64).map(|id| id * id % 17).collect()
}

#[test]
fn roles_are_means_over_the_tokens_of_all_texts_whatever_the_batch() {
    tch::set_num_threads(1);
    let counts = counts();
    let known = Known { special: &SPECIAL, counts: &counts };
    let texts = rows(9, 3);
    let vocabulary: Vec<u32> = (2..VOCAB as u32).collect();
    for model in [language_model("gpt2", Kind::Double), classifier("distilbert", 3)] {
        let repeated = match model.config().is_causal() {
            true => repeats(&vocabulary, Some(0), 8, 4, 3),
            false => Vec::new(),
        };
        let found = |batching: &Batching| {
            head_roles(&model, &texts, &repeated, &known, batching, &mut go_on).unwrap()
        };
        let [one, others @ ..] = batchings().map(|batching| found(&batching));
        for other in &others {
            for (a, b) in one.roles.iter().zip(&other.roles) {
                assert_eq!((a.role, a.offset, a.n_tokens), (b.role, b.offset, b.n_tokens));
                let (a, b) = (a.mass.concat(), b.mass.concat());
                a.iter().zip(&b).for_each(|(a, b)| assert!((a - b).abs() < 1e-12, "{a} {b}"));
            }
        }
        // The weight on the previous token, a text and a token at a time.
        let previous = one.roles.iter().find(|role| role.role == "previous_token").unwrap();
        let (mut sum, mut n) = (0.0, 0);
        for row in &texts {
            let input = ModelInput::new(Tensor::from_slice(&ids(row)).view([1, -1]));
            let options = ForwardOptions { attentions: Rows::All, ..ForwardOptions::default() };
            let weights = model.forward(&input, &options).unwrap().attentions;
            for t in 1..row.ids.len() {
                if !SPECIAL.contains(&row.ids[t]) {
                    sum += weights[1].double_value(&[0, 2, t as i64, t as i64 - 1]);
                    n += 1;
                }
            }
        }
        assert_eq!(previous.n_tokens, n);
        assert!((previous.mass[1][2] - sum / n as f64).abs() < 1e-12);
        let interval = previous.mass_interval_95[1][2];
        assert!(interval.low < previous.mass[1][2] && previous.mass[1][2] < interval.high);
        let has = |name: &str| one.roles.iter().any(|role| role.role == name);
        assert_eq!(has("induction"), model.config().is_causal());
        assert_eq!(has("next_token"), !model.config().is_causal());
    }
}

#[test]
fn a_model_has_no_shift_against_itself_and_one_against_another() {
    tch::set_num_threads(1);
    let counts = counts();
    let known = Known { special: &SPECIAL, counts: &counts };
    let texts = rows(8, 3);
    // A language model before, a classifier after: what they end in is nothing to attention.
    let (before, after) = (language_model("distilbert", Kind::Double), classifier("distilbert", 2));
    let found = |control: Option<&Model>, batching: &Batching| {
        attention_shift(&before, &after, control, &texts, &known, batching, &mut go_on).unwrap()
    };
    let one = found(Some(&before), &batchings()[0]);
    let control = one.control.clone().unwrap();
    assert!(one.shift.js_distance.iter().flatten().all(|&distance| distance > 0.01));
    // The control is the model before: it has not moved, and all that is between it and after is the shift.
    assert!(control.shift.js_distance.iter().flatten().all(|&distance| distance == 0.0));
    assert_eq!(control.between.js_distance, one.shift.js_distance);
    assert!(control.excess.iter().flatten().all(|&excess| excess == 0.0));
    for batching in &batchings()[1..] {
        let other = found(None, batching);
        assert!(other.control.is_none());
        let (a, b) = (one.shift.js_distance.concat(), other.shift.js_distance.concat());
        a.iter().zip(&b).for_each(|(a, b)| assert!((a - b).abs() < 1e-10, "{a} {b}"));
    }
    // Heads that one of them no longer has are left out; what is behind them has moved.
    let mut cut = language_model("distilbert", Kind::Double);
    cut.select_heads(0, &[1, 3]).unwrap();
    cut.select_heads(1, &[0, 2, 3]).unwrap();
    let less =
        attention_shift(&before, &cut, None, &texts, &known, &Batching::default(), &mut go_on)
            .unwrap();
    assert_eq!(less.heads, [vec![1, 3], vec![0, 2, 3]]);
    let [unmoved, moved] = &less.shift.js_distance[..] else { panic!("two layers") };
    assert!(unmoved.len() == 2 && unmoved.iter().all(|&distance| distance < 1e-6), "{unmoved:?}");
    assert!(moved.len() == 3 && moved.iter().all(|&distance| distance > 1e-3), "{moved:?}");
    let of_before = |at: usize| {
        less.shift.changes[0].before[0][at] - one.shift.changes[0].before[0][[1, 3][at]]
    };
    assert!(of_before(0).abs() < 1e-10 && of_before(1).abs() < 1e-10, "the heads of these numbers");
    let decoder = language_model("gpt2", Kind::Double);
    let refused =
        attention_shift(&before, &decoder, None, &texts, &known, &Batching::default(), &mut go_on);
    assert!(matches!(refused, Err(Error::Heads { .. })), "{refused:?}");
    // Heads that do not run for every token have no mean over all of them.
    let mut routed = language_model("distilbert", Kind::Double);
    let kind = serde_json::from_value(serde_json::json!({"kind": "routed"})).unwrap();
    routed.swap(&[1], &kind, 0).unwrap();
    let refused =
        attention_shift(&before, &routed, None, &texts, &known, &Batching::default(), &mut go_on);
    assert!(matches!(refused, Err(Error::Routed { .. })), "{refused:?}");
}

#[test]
fn a_head_at_zero_is_left_out_of_the_likelihoods() {
    tch::set_num_threads(1);
    let model = language_model("gpt2", Kind::Double);
    // Pairs that differ in their last token, so that little decides.
    let of_row = |row: Encoded| {
        let other = [&row.ids[..row.ids.len() - 1], &[(row.ids[0] + 7) % VOCAB as u32]].concat();
        [row.ids, other].map(|ids| Window { n_scored: ids.len() - 1, ids })
    };
    let windows: Vec<Window> =
        rows(60, 2).into_iter().filter(|row| row.ids.len() > 2).flat_map(of_row).collect();
    let of: Vec<&str> = (0..windows.len() / 2).map(|at| ["a", "b"][at % 2]).collect();

    let mut n_done = 0;
    let mut count = |n| {
        n_done = n;
        go_on(n)
    };
    let batching = Batching { batch_size: 3, ..Batching::default() };
    let found = phenomena(&model, &windows, &of, &batching, &mut count).unwrap();

    assert_eq!((n_done, found.n_tested), (n_passes(&model) * windows.len(), 8 * 3));
    let accuracy = |gates: &[Option<Gate>]| {
        let log_p = |window: &Window| -> f64 {
            let all: Vec<i64> = window.ids.iter().map(|&id| id.into()).collect();
            let input = ModelInput::new(Tensor::from_slice(&all).view([1, -1]));
            let options = ForwardOptions { gates, ..ForwardOptions::default() };
            let logits = model.forward(&input, &options).unwrap().logits.get(0);
            (1..all.len()).map(|at| -naive_loss(&logits.get(at as i64 - 1), all[at])).sum()
        };
        let right = |pair: &[Window]| log_p(&pair[0]) > log_p(&pair[1]);
        let pairs: Vec<bool> = windows.chunks(2).map(right).collect();
        pairs.iter().filter(|right| **right).count() as f64 / pairs.len() as f64
    };
    let all = &found.phenomena[0];
    assert_eq!(all.accuracy, accuracy(&[]));
    let mut n_moved = 0;
    for layer in 0..2 {
        for head in 0..4 {
            let g = Tensor::ones([4], (Kind::Double, tch::Device::Cpu));
            let _ = g.get(head).fill_(0.0);
            let gates: Vec<Option<Gate>> =
                (0..2).map(|at| (at == layer).then(|| Gate::per_head(&g))).collect();
            let effect = accuracy(&gates) - all.accuracy;
            assert!((all.effect[layer][head as usize] - effect).abs() < 1e-12, "{layer} {head}");
            n_moved += usize::from(effect != 0.0);
        }
    }
    assert!(n_moved > 0, "these pairs test nothing");
}

#[test]
fn syntax_needs_relations_that_occur() {
    let model = language_model("distilbert", Kind::Double);
    let tree = |index| Tree {
        row: Encoded { ids: vec![0, 4, 5, 6, 1], label: None, index, second_from: None },
        words: vec![1..2, 2..3, 3..4],
        heads: vec![Some(1), None, Some(1)],
        relations: ["a", "root", "b"].map(str::to_owned).to_vec(),
    };
    let trees: Vec<Tree> = (0..60).map(tree).collect();
    let batching = Batching { batch_size: 7, ..Batching::default() };
    let few = syntax(&model, &trees[..40], &trees, &batching, &mut go_on);
    assert!(matches!(few, Err(Error::Nothing(_))), "{few:?}");
    let found = syntax(&model, &trees, &trees, &batching, &mut go_on).unwrap();
    assert_eq!((found.n_test, found.relations.len(), found.n_tested), (60, 4, 4 * 8));
    // The same sentence again and again: a head is right always or never, and so is a distance.
    for relation in &found.relations {
        assert_eq!(relation.baseline, 1.0);
        assert!(relation.accuracy == 0.0 || relation.accuracy == 1.0);
    }
}
