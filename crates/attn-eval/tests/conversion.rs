//! Fewer key/value heads, against merges made by hand.

mod common;

use attn_core::{Merge, Moments, merge_kv};
use attn_data::batch::{Side, collate};
use attn_eval::{
    Batching, Error, SetApart, Text, against, cache_bytes, choose_kv_heads, convert, kl_difference,
    kv_sensitivity, moments, to_input,
};
use common::{go_on, language_model, rows};
use tch::Kind;

fn text(rows: &[attn_data::batch::Encoded]) -> Text<'_> {
    Text { rows, masking: None, batching: Batching { batch_size: 3, ..Batching::default() } }
}

fn set_apart(
    rows: Vec<attn_data::batch::Encoded>,
    tokens: [usize; 2],
    seed: u64,
) -> [Vec<attn_data::batch::Encoded>; 2] {
    let mut drawn = SetApart::new(tokens, seed);
    rows.into_iter().for_each(|row| drawn.add(row));
    drawn.finish()
}

#[test]
fn rows_set_apart_are_the_same_for_every_seed_and_read_by_none() {
    let all = rows(40, 2);
    let index = |rows: &[attn_data::batch::Encoded]| -> Vec<usize> {
        rows.iter().map(|row| row.index).collect()
    };
    let n_tokens = |rows: &[attn_data::batch::Encoded]| -> usize {
        rows.iter().map(|row| row.ids.len()).sum()
    };
    let [apart, read] = set_apart(all.clone(), [60, 100], 0);
    assert!((40..=60).contains(&n_tokens(&apart)) && (80..=100).contains(&n_tokens(&read)));
    assert!(index(&apart).iter().all(|row| !index(&read).contains(row)));
    let [again, other] = set_apart(all.clone(), [60, 100], 1);
    assert_eq!(index(&again), index(&apart));
    assert_ne!(index(&other), index(&read));
    assert!(index(&other).iter().all(|row| !index(&apart).contains(row)));
    // A quarter at most, and one row to read if there is any.
    let [apart, read] = set_apart(all.clone(), [usize::MAX, usize::MAX], 0);
    assert!(n_tokens(&apart) <= n_tokens(&all) / 4);
    assert_eq!(apart.len() + read.len(), 40);
    let [apart, read] = set_apart(rows(1, 2), [5, 0], 0);
    assert_eq!((apart.len(), read.len()), (0, 1));
}

#[test]
fn what_is_drawn_is_spread_over_the_text_and_no_more_of_it_is_held() {
    let row = |index| attn_data::batch::Encoded {
        ids: vec![7; 10],
        label: None,
        index,
        second_from: None,
    };
    let mut drawn = SetApart::new([200, 300], 5);
    for index in 0..2000 {
        drawn.add(row(index));
        let n_held = format!("{drawn:?}").matches("Encoded").count();
        assert!(n_held <= 20 + 30 + 2, "{n_held} rows held");
    }
    let [apart, read] = drawn.finish();
    assert_eq!((apart.len(), read.len()), (20, 30));
    for rows in [apart, read] {
        // The mean of n numbers drawn evenly from 0 to 2000 is within four standard errors, 577 / sqrt(n), of 1000.
        let mean = rows.iter().map(|row| row.index as f64).sum::<f64>() / rows.len() as f64;
        assert!((mean - 1000.0).abs() < 4.0 * 577.0 / (rows.len() as f64).sqrt(), "{mean}");
    }
}

#[test]
fn a_layer_loses_what_the_model_merged_there_alone_does() {
    let model = language_model("gpt2", Kind::Double);
    let rows = rows(24, 2);
    let text = text(&rows);
    let of = moments(&model, &[0, 1], &text, &mut go_on).unwrap();
    // All rows at once say the same.
    let mut whole = Moments::of_layers(&[0, 1]);
    let batch = collate(&rows.iter().collect::<Vec<_>>(), 0, Side::Right);
    whole.add(&model, &to_input(&batch, &model)).unwrap();
    assert_eq!(of.n_tokens(), whole.n_tokens());
    let candidates = [(0, vec![2, 1]), (1, vec![1])];
    let mut seen = Vec::new();
    let found = {
        let mut progress = |n: usize| {
            seen.push(n);
            std::ops::ControlFlow::Continue(())
        };
        kv_sensitivity(&model, &candidates, (Merge::LowRank, Some(&of)), &text, 2, &mut progress)
            .unwrap()
    };
    assert_eq!(seen.last(), Some(&(3 * rows.len())));
    assert!(seen.is_sorted());
    for ((layer, numbers), tried) in candidates.iter().zip(&found) {
        assert_eq!((tried[0].n_kv_heads, tried[0].kl_nats_per_token), (4, 0.0));
        assert_eq!(tried[0].cache_bytes, 2 * 24 * 2);
        for (n, one) in numbers.iter().zip(&tried[1..]) {
            let mut merged = model.alias().unwrap();
            merge_kv(&mut merged, &[(*layer, *n)], Merge::LowRank, Some(&whole)).unwrap();
            let expected = against(&model, &merged, &text, &mut go_on).unwrap().kl_nats_per_token;
            assert!(
                (one.kl_nats_per_token - expected).abs() < 1e-9 * expected,
                "{one:?} {expected}"
            );
            assert_eq!(one.cache_bytes, cache_bytes(*n, 6, 2));
        }
    }
    // Both layers whole, one halved, and what cannot be met.
    let all = cache_bytes(4, 6, 2);
    assert_eq!(choose_kv_heads(&found, 2 * all).unwrap(), [4, 4]);
    assert!(choose_kv_heads(&found, 2 * all - 1).unwrap().iter().any(|&n| n < 4));
    assert_eq!(choose_kv_heads(&found, all / 2).unwrap(), [1, 1]);
    assert!(matches!(choose_kv_heads(&found, all / 2 - 1), Err(Error::Budget { .. })));
}

#[test]
fn a_fit_brings_every_method_nearer_and_leaves_the_model_as_it_was() {
    let model = language_model("gpt2", Kind::Double);
    let rows = rows(200, 2);
    let text = text(&rows);
    let of = moments(&model, &[0, 1], &text, &mut go_on).unwrap();
    let before: Vec<_> = model.parameters().into_iter().map(|(_, x)| x.copy()).collect();
    for method in Merge::ALL {
        let by = (method, Some(&of));
        let plain = convert(&model, &[(0, 2), (1, 1)], by, None, &mut go_on).unwrap();
        let fitted =
            convert(&model, &[(0, 2), (1, 1)], by, Some((1e-6, &text)), &mut go_on).unwrap();
        assert_eq!((plain.refitted.len(), fitted.refitted.len()), (0, 2));
        let kl = |of| against(&model, of, &text, &mut go_on).unwrap();
        let (plain, fitted) = (kl(&plain.model), kl(&fitted.model));
        assert!(fitted.kl_nats_per_token < plain.kl_nats_per_token, "{method:?}");
        let less = kl_difference(&fitted.kl_by_row, &plain.kl_by_row).unwrap();
        assert!(less.high < 0.0, "{method:?} {less:?}");
    }
    for ((name, after), before) in model.parameters().iter().zip(&before) {
        assert_eq!(after, before, "{name}");
    }
    // Copies are not fitted.
    let more =
        convert(&model, &[(0, 4)], (Merge::Mean, None), Some((1e-6, &text)), &mut go_on).unwrap();
    assert!(more.merged.is_empty() && more.refitted.is_empty());
    assert!(kl_difference(&[(1.0, 2.0)], &[]).is_err());
}
