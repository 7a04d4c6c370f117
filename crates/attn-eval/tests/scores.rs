//! Scores of small random models against their definitions, one row and one token at a time in `f64`.

mod common;

use std::{num::NonZeroU32, ops::ControlFlow};

use attn_core::{
    ForwardOptions, Model, ModelInput, Variant,
    attention::{Attention, AttnInput, Dims, Nature},
    generate::{Limits, Sampling, generate},
    testing::plant,
    variants::window,
};
use attn_data::{
    batch::{BatchPlan, Encoded, IGNORED, Masking, Side, collate, mask_tokens},
    prompt::{Completion, Question},
};
use attn_eval::{
    Batching, Choices, Convention, Document, Error, Recall, RowScore, Verdict, Window, Windows,
    Writing, choices, classify, decoding_tokens_per_s, divergence, explain, log_likelihoods,
    loss_difference, masked_token, next_token, perplexity, recall, state_bytes,
    stats::{Interval, StatsError},
};
use common::{VOCAB, batchings, classifier, go_on, ids, language_model, logits, naive_loss, rows};
use tch::{Kind, Tensor};

#[test]
fn a_classification_matches_its_definition_whatever_the_batch() {
    for base in ["gpt2", "distilbert"] {
        let model = classifier(base, 3);
        let rows = rows(33, 3);
        for batching in batchings() {
            let result = classify(&model, &rows, &batching, &mut go_on).unwrap();

            let (mut n_correct, mut n_labelled, mut loss) = (0, 0, 0.0);
            let mut confusion = vec![vec![0; 3]; 3];
            for (row, prediction) in rows.iter().zip(&result.predictions) {
                let logits = logits(&model, &ids(row));
                let predicted = logits.argmax(-1, false).int64_value(&[]);
                assert_eq!(
                    (prediction.index, prediction.label, prediction.predicted),
                    (row.index, row.label, predicted)
                );
                for class in 0..3 {
                    let p = (-naive_loss(&logits, class)).exp();
                    assert!((prediction.probabilities[class as usize] - p).abs() < 1e-9);
                }
                if let Some(label) = row.label {
                    n_correct += usize::from(predicted == label);
                    n_labelled += 1;
                    loss += naive_loss(&logits, label);
                    confusion[label as usize][predicted as usize] += 1;
                }
            }

            let accuracy = result.accuracy.unwrap();
            assert_eq!((accuracy.n_correct, accuracy.n_labelled), (n_correct, n_labelled));
            assert!(0 < n_correct && n_correct < n_labelled, "a test of nothing: {n_correct}");
            assert_eq!(accuracy.accuracy, n_correct as f64 / n_labelled as f64);
            let Interval { low, high } = accuracy.interval_95;
            assert!(0.0 < low && low < accuracy.accuracy && accuracy.accuracy < high && high < 1.0);
            assert!((accuracy.loss - loss / n_labelled as f64).abs() < 1e-9);
            for (class, expected) in result.classes.iter().zip(confusion) {
                assert_eq!(class.n_rows, expected.iter().sum::<usize>());
                assert_eq!(class.predicted_as, expected);
            }
            assert_eq!(result.classes.iter().map(|class| class.n_predicted).sum::<usize>(), 33);
            let always = result.accuracy_of_always(1).unwrap();
            assert_eq!(always, result.classes[1].n_rows as f64 / n_labelled as f64);
        }
    }
}

#[test]
fn rows_without_labels_get_predictions_and_no_accuracy() {
    let model = classifier("distilbert", 2);
    let rows: Vec<Encoded> =
        rows(6, 2).into_iter().map(|row| Encoded { label: None, ..row }).collect();

    let result = classify(&model, &rows, &Batching::default(), &mut go_on).unwrap();

    assert_eq!((result.accuracy, result.predictions.len()), (None, 6));
    assert_eq!(result.accuracy_of_always(0), None);
}

/// BERT alone has a table for it; what others were given is the same row.
#[test]
fn a_second_text_is_read_as_the_second_segment() {
    let row = rows(5, 3).swap_remove(2); // 15 tokens
    let pair = Encoded { second_from: Some(6), ..row.clone() };
    for base in ["bert", "distilbert"] {
        let model = classifier(base, 3);
        let both = [row.clone(), pair.clone(), rows(2, 3).swap_remove(1)];
        let scored = classify(&model, &both, &Batching::default(), &mut go_on).unwrap();
        let [single, of_pair] = [0, 1].map(|at| scored.predictions[at].probabilities.clone());

        let segments: Vec<i64> = (0..row.ids.len()).map(|at| i64::from(at >= 6)).collect();
        let input = ModelInput {
            token_type_ids: (base == "bert").then(|| Tensor::from_slice(&segments).view([1, -1])),
            ..ModelInput::new(Tensor::from_slice(&ids(&row)).view([1, -1]))
        };
        let logits = model.forward(&input, &ForwardOptions::default()).unwrap().logits;
        let expected = Vec::<f64>::try_from(logits.softmax(-1, Kind::Double).view([-1])).unwrap();
        for (found, expected) in of_pair.iter().zip(&expected) {
            assert!((found - expected).abs() < 1e-12, "{base}: {of_pair:?} against {expected:?}");
        }
        let gap = (single[0] - of_pair[0]).abs();
        assert!(if base == "bert" { gap > 1e-3 } else { gap < 1e-12 }, "{base}: {gap}");
    }
}

#[test]
fn next_tokens_match_their_definition_whatever_the_batch() {
    let model = language_model("gpt2", Kind::Double);
    let rows = rows(19, 2);
    let (mut loss, mut n_correct, mut n_tokens, mut n_rows) = (0.0, 0, 0, 0);
    for row in &rows {
        let ids = ids(row);
        for at in 1..ids.len() {
            let logits = logits(&model, &ids[..at]).get(-1);
            loss += naive_loss(&logits, ids[at]);
            n_correct += usize::from(logits.argmax(-1, false).int64_value(&[]) == ids[at]);
            n_tokens += 1;
        }
        n_rows += usize::from(ids.len() > 1);
    }
    let expected = loss / n_tokens as f64;
    for batching in batchings() {
        let score = next_token(&model, &rows, &batching, &mut go_on).unwrap();

        assert_eq!(score.convention, Convention::NextTokenWithinRow);
        assert_eq!((score.n_tokens, score.n_rows), (n_tokens, n_rows));
        assert!((score.loss_nats_per_token - expected).abs() < 1e-9 * expected);
        assert!((score.perplexity - expected.exp()).abs() < 1e-8 * expected.exp());
        assert_eq!(score.top1_accuracy, n_correct as f64 / n_tokens as f64);
    }

    for (kind, tolerance) in [(Kind::Float, 1e-5), (Kind::BFloat16, 2e-2)] {
        let model = language_model("gpt2", kind);
        let score = next_token(&model, &rows, &Batching::default(), &mut go_on).unwrap();
        assert!((score.loss_nats_per_token / expected - 1.0).abs() < tolerance, "{kind:?}");
    }
}

#[test]
fn masked_tokens_match_their_definition_whatever_the_batch() {
    let model = language_model("distilbert", Kind::Double);
    let rows = rows(19, 2);
    let masking =
        Masking { mask_id: 4, vocab_size: VOCAB as usize, special: vec![0, 1, 2, 3, 4], rate: 0.3 };
    let (mut loss, mut n_tokens) = (0.0, 0);
    for row in &rows {
        let masked = mask_tokens(&collate(&[row], 0, Side::Right), &masking, 9, 0).unwrap();
        let logits = logits(&model, &masked.ids);
        for (pos, &label) in (0..).zip(&masked.labels) {
            if label != IGNORED {
                loss += naive_loss(&logits.get(pos), label);
                n_tokens += 1;
            }
        }
    }
    let expected = loss / f64::from(n_tokens);
    for batching in batchings() {
        let batching = Batching { pad_id: 0, ..batching };
        let score = masked_token(&model, &rows, &masking, 9, &batching, &mut go_on).unwrap();

        assert_eq!(score.convention, Convention::MaskedTokens);
        assert_eq!(score.n_tokens, n_tokens as usize);
        assert!((score.loss_nats_per_token - expected).abs() < 1e-9 * expected);
    }
    let other = masked_token(&model, &rows, &masking, 10, &Batching::default(), &mut go_on);
    assert_ne!(other.unwrap().loss_nats_per_token, expected);
}

#[test]
fn scoring_drops_nothing_and_records_nothing() {
    let model = classifier("distilbert", 2);
    model.parameters().iter().for_each(|(_, tensor)| {
        let _ = tensor.set_requires_grad(true);
    });
    let rows = rows(8, 2);
    let run = || classify(&model, &rows, &Batching::default(), &mut go_on).unwrap();

    let (first, second) = (run(), run());

    assert_eq!(first, second, "dropout would make them differ");
    assert!(model.parameters().iter().all(|(_, tensor)| !tensor.grad().defined()));
    let again = model.parameters()[0].1.square().sum(Kind::Double);
    assert!(again.requires_grad(), "recording is on again afterwards");
}

#[test]
fn what_cannot_be_scored_is_refused_by_name() {
    let batching = Batching::default();
    let (gpt2, bert) =
        (language_model("gpt2", Kind::Float), language_model("distilbert", Kind::Float));
    let model = classifier("gpt2", 2);
    let masking = Masking { mask_id: 4, vocab_size: 40, special: vec![4], rate: 0.3 };
    let some = rows(4, 2);
    let text = |error: Error| error.to_string();

    let no_classes = text(classify(&gpt2, &some, &batching, &mut go_on).unwrap_err());
    assert!(no_classes.contains("a language-model head") && no_classes.contains("fine-tune"));
    let no_text = text(next_token(&model, &some, &batching, &mut go_on).unwrap_err());
    assert!(no_text.contains("a classifier of 2 classes"), "{no_text}");
    let encoder = text(next_token(&bert, &some, &batching, &mut go_on).unwrap_err());
    assert!(encoder.contains("distilbert") && encoder.contains("masked tokens"), "{encoder}");
    let decoder = text(masked_token(&gpt2, &some, &masking, 0, &batching, &mut go_on).unwrap_err());
    assert!(decoder.contains("gpt2") && decoder.contains("next token"), "{decoder}");

    let far = [Encoded { label: Some(2), ..some[0].clone() }];
    let far = text(classify(&model, &far, &batching, &mut go_on).unwrap_err());
    assert!(far.contains("row 100 has label 2") && far.contains("0 to 1"), "{far}");
    let empty = [Encoded { ids: vec![], ..some[1].clone() }];
    let empty = text(classify(&model, &empty, &batching, &mut go_on).unwrap_err());
    assert!(empty.contains("row 101 has no tokens"), "{empty}");
    assert!(matches!(classify(&model, &[], &batching, &mut go_on), Err(Error::Nothing(_))));
    let single = [Encoded { ids: vec![3], ..some[0].clone() }];
    assert!(matches!(next_token(&gpt2, &single, &batching, &mut go_on), Err(Error::Nothing(_))));

    let (_, weight) = &model.parameters()[0];
    let _ = tch::no_grad(|| weight.shallow_clone().fill_(f64::NAN));
    let broken = text(classify(&model, &some, &batching, &mut go_on).unwrap_err());
    assert!(broken.contains("not finite"), "{broken}");
}

#[test]
fn the_caller_is_told_of_progress_and_can_stop() {
    let model = classifier("gpt2", 2);
    let rows = rows(10, 2);
    let batching = Batching { batch_size: 4, max_tokens: None, pad_id: 0 };
    assert_eq!(BatchPlan::new(4).unwrap().by_length(&[1; 10]).len(), 3);

    let mut seen = Vec::new();
    classify(&model, &rows, &batching, &mut |n| {
        seen.push(n);
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!(seen, [4, 8, 10]);

    let stopped = classify(&model, &rows, &batching, &mut |_| ControlFlow::Break(()));
    assert!(matches!(stopped, Err(Error::Stopped { n_done: 4, n_rows: 10 })));
}

/// Questions of 1 to 14 tokens before answers of 1 to 3, some of which share a beginning.
#[test]
fn an_answer_is_recalled_where_greedy_decoding_gives_it() {
    let model = language_model("gpt2", Kind::Double);
    let mut rows: Vec<Encoded> = rows(30, 2).into_iter().filter(|row| row.ids.len() > 6).collect();
    let mut answers = Vec::new();
    for (i, row) in rows.iter_mut().enumerate() {
        // Every other row ends in what the model goes on with; the first answer of each is as it comes.
        let start = row.ids.len() - 3;
        if i % 2 == 0 {
            let prompt: Vec<i64> = row.ids[..start].iter().map(|&id| id.into()).collect();
            let limits = Limits { max_new_tokens: 3, stop_ids: vec![] };
            let greedy = generate(&model, &[prompt], &Sampling::default(), &limits, &mut |_, _| {
                ControlFlow::Continue(())
            });
            let ids = &greedy.unwrap()[0].ids;
            row.ids.splice(start.., ids.iter().map(|&id| id as u32));
        }
        answers.push(vec![1..3, start..start + 3]);
    }
    assert!(rows.len() > 10, "{}", rows.len());
    let mut all = Vec::new();
    for batching in batchings() {
        let found = recall(&model, &rows, &answers, &batching, &mut go_on).unwrap();
        for (i, (row, found)) in rows.iter().zip(&found).enumerate() {
            let logits = logits(&model, &ids(row));
            for (answer, found) in answers[i].iter().zip(found) {
                let surprise =
                    |token: usize| naive_loss(&logits.get(token as i64 - 1), row.ids[token].into());
                let log_p: f64 = answer.clone().map(|token| -surprise(token)).sum();
                assert!((found.log_likelihood - log_p).abs() < 1e-10, "{i}: {found:?} {log_p}");
                let is_first =
                    |token: usize| logits.get(token as i64 - 1).argmax(-1, false).int64_value(&[]);
                let right =
                    answer.clone().filter(|&token| is_first(token) == i64::from(row.ids[token]));
                assert_eq!(found.token_accuracy, right.count() as f64 / answer.len() as f64);
                assert_eq!(found.exact, found.token_accuracy == 1.0);
            }
            assert!(i % 2 == 1 || found[1].exact, "{i}: the model's own words");
        }
        all = found.concat();
    }
    let n_exact = all.iter().filter(|answer| answer.exact).count();
    assert!(n_exact < all.len() * 3 / 4, "not every answer is the model's: {n_exact}");
    let counted = Recall::of(&all).unwrap();
    assert_eq!((counted.n, counted.exact_match), (all.len(), n_exact as f64 / all.len() as f64));
    assert!(counted.interval_95.low < counted.exact_match);
    assert_eq!(Recall::of([]), None);

    let nothing = recall(&model, &rows, &vec![vec![]; rows.len()], &batchings()[0], &mut go_on);
    assert!(nothing.unwrap_err().to_string().contains("a row has no answer"));
    let encoder = language_model("distilbert", Kind::Double);
    assert!(recall(&encoder, &rows, &answers, &batchings()[0], &mut go_on).is_err());
}

fn questions(n: usize) -> Vec<Question> {
    let answers: [&[u32]; 3] = [&[7], &[8, 9, 5], &[8, 9]];
    let question = |row: &Encoded| {
        let ids = row.ids[..row.ids.len().min(14)].to_vec();
        let answer = |answer: &&[u32]| Completion {
            ids: [&ids[..], answer].concat(),
            answer: ids.len()..ids.len() + answer.len(),
        };
        let answers = answers.iter().map(answer).collect();
        Question { answers, label: row.label, index: row.index }
    };
    rows(n, 3).iter().map(question).collect()
}

/// The texts of the answers: their bytes alone count.
fn answers() -> Vec<String> {
    ["so", "neither nor", "not"].map(Into::into).into()
}

fn choose(model: &Model, questions: &[Question], batch_size: usize) -> attn_eval::Result<Choices> {
    let batching = Batching { batch_size, ..Batching::default() };
    let names = ["yes", "maybe", "no"].map(String::from);
    choices(model, questions, &answers(), &names, &batching, &mut go_on)
}

#[test]
fn an_answer_is_as_likely_as_its_tokens_one_after_another() {
    let model = language_model("gpt2", Kind::Double);
    let questions = questions(40);

    let found = choose(&model, &questions, 7).unwrap();

    let (mut n_correct, mut n_per_byte, mut loss) = (0, 0, 0.0);
    for (question, choice) in questions.iter().zip(&found.predictions) {
        let of = |Completion { ids, answer }: &Completion| -> f64 {
            let ids: Vec<i64> = ids.iter().map(|&id| id.into()).collect();
            answer.clone().map(|at| -naive_loss(&logits(&model, &ids[..at]).get(-1), ids[at])).sum()
        };
        let naive: Vec<f64> = question.answers.iter().map(of).collect();
        for (score, naive) in choice.log_likelihoods.iter().zip(&naive) {
            assert!((score - naive).abs() < 1e-10 * naive.abs(), "{score} is not {naive}");
        }
        let best = |scores: &[f64]| {
            (0..3).max_by(|&a, &b| scores[a].total_cmp(&scores[b])).unwrap() as i64
        };
        let per_byte: Vec<f64> = naive.iter().zip([2., 11., 3.]).map(|(s, n)| s / n).collect();
        assert_eq!(choice.prediction.predicted, best(&naive));
        assert_eq!(choice.predicted_per_byte, best(&per_byte));
        let shares: f64 = naive.iter().map(|score| score.exp()).sum();
        if let Some(label) = question.label {
            n_correct += usize::from(best(&naive) == label);
            n_per_byte += usize::from(best(&per_byte) == label);
            loss -= naive[label as usize] - shares.ln();
        }
        for (share, naive) in choice.prediction.probabilities.iter().zip(&naive) {
            assert!((share - naive.exp() / shares).abs() < 1e-12);
        }
    }
    let accuracy = found.accuracy.unwrap();
    assert_eq!((accuracy.n_correct, accuracy.n_labelled), (n_correct, 32));
    assert!((accuracy.loss - loss / 32.).abs() < 1e-10);
    let per_byte = found.accuracy_per_byte.unwrap();
    assert_eq!(per_byte.n_correct, n_per_byte);
    assert!(found.predictions.iter().any(|c| c.predicted_per_byte != c.prediction.predicted));
    assert_eq!(found.classes.iter().map(|class| class.n_rows).sum::<usize>(), 32);
}

#[test]
fn likelihoods_do_not_depend_on_the_batches() {
    let model = language_model("gpt2", Kind::Double);
    let questions = questions(23);

    let [one, many] = [1, 16].map(|size| choose(&model, &questions, size).unwrap());

    for (a, b) in one.predictions.iter().zip(&many.predictions) {
        assert_eq!(
            (a.prediction.index, a.prediction.predicted),
            (b.prediction.index, b.prediction.predicted)
        );
        for (a, b) in a.log_likelihoods.iter().zip(&b.log_likelihoods) {
            assert!((a - b).abs() < 1e-12 * b.abs(), "{a} is not {b}");
        }
    }
}

#[test]
fn progress_counts_rows_not_answers() {
    let model = language_model("gpt2", Kind::Double);
    let questions = questions(9);
    let mut seen = Vec::new();
    let names = ["yes", "maybe", "no"].map(String::from);
    let batching = Batching { batch_size: 4, ..Batching::default() };
    let mut count = |n| {
        seen.push(n);
        ControlFlow::Continue(())
    };

    choices(&model, &questions, &answers(), &names, &batching, &mut count).unwrap();
    assert!(seen.is_sorted() && seen.last() == Some(&9), "{seen:?}");

    let stop = &mut |_| ControlFlow::Break(());
    let error = choices(&model, &questions, &answers(), &names, &batching, stop).unwrap_err();
    assert!(matches!(error, Error::Stopped { n_rows: 9, .. }), "{error}");
}

#[test]
fn models_that_answer_nothing_are_refused() {
    let error = choose(&language_model("distilbert", Kind::Double), &questions(2), 2).unwrap_err();
    assert!(error.to_string().contains("it is an encoder\nhint: "), "{error}");
    let error = choose(&classifier("gpt2", 3), &questions(2), 2).unwrap_err();
    assert!(error.to_string().contains("the likelihood of an answer needs a language"), "{error}");

    let model = language_model("gpt2", Kind::Double);
    let mut short = questions(3);
    short[1].answers.pop();
    let error = choose(&model, &short, 2).unwrap_err();
    assert_eq!(error.to_string(), "row 101 has 2 answers, expected 3");
    let mut outside = questions(3);
    outside[2].label = Some(3);
    let error = choose(&model, &outside, 2).unwrap_err();
    assert_eq!(error.to_string(), "row 102 has label 3, and the model has classes 0 to 2");
    let mut bare = questions(3);
    bare[0].answers[0].answer.start = 0;
    assert!(matches!(choose(&model, &bare, 2), Err(Error::EmptyRow { index: 100 })));
}

#[test]
fn a_divergence_matches_its_definition_whatever_the_batch() {
    let masking =
        Masking { mask_id: 1, vocab_size: VOCAB as usize, special: vec![0, 1], rate: 0.3 };
    for base in ["gpt2", "distilbert"] {
        let baseline = language_model(base, Kind::Double);
        let model = common::shaken(
            baseline
                .alias()
                .map(|mut model| {
                    model.own(&|_| true);
                    model
                })
                .unwrap(),
        );
        let rows = rows(30, 2);
        let masking = (base == "distilbert").then_some((&masking, 7));
        // Every prediction by itself: the row, how many tokens stand before, both log-probabilities, the target.
        let mut tokens: Vec<(usize, Tensor, Tensor, i64)> = Vec::new();
        for row in &rows {
            let mut text = ids(row);
            let targets: Vec<(i64, i64)> = match masking {
                None => (0..text.len() as i64 - 1).map(|at| (at, text[at as usize + 1])).collect(),
                Some((masking, seed)) => {
                    let masked =
                        mask_tokens(&collate(&[row], 0, Side::Right), masking, seed, 0).unwrap();
                    text = masked.ids;
                    let labels = (0..).zip(masked.labels);
                    labels.filter(|(_, label)| *label != IGNORED).collect()
                }
            };
            let [own, other] =
                [&model, &baseline].map(|of| logits(of, &text).log_softmax(-1, Kind::Double));
            for (at, target) in targets {
                tokens.push((at as usize + 1, own.get(at), other.get(at), target));
            }
        }
        let n = tokens.len() as f64;
        let sum = |x: Tensor| x.sum(Kind::Double).double_value(&[]);
        let mean = |of: &dyn Fn(&Tensor, &Tensor, i64) -> f64| {
            tokens.iter().map(|(_, q, p, target)| of(q, p, *target)).sum::<f64>() / n
        };
        let top = |x: &Tensor| x.argmax(-1, false).int64_value(&[]);
        for batching in batchings() {
            let found =
                divergence(&model, &baseline, &rows, masking, &batching, &mut go_on).unwrap();
            let near = |name: &str, actual: f64, expected: f64| {
                assert!(
                    (actual - expected).abs() < 1e-9,
                    "{base}, {name}: {actual}, not {expected}"
                );
            };
            let kl = mean(&|q, p, _| sum(p.exp() * (p - q)));
            assert!(kl > 0.01, "a test of nothing: {kl}");
            near("kl", found.kl_nats_per_token, kl);
            near(
                "reverse",
                found.reverse_kl_nats_per_token,
                mean(&|q, p, _| sum(q.exp() * (q - p))),
            );
            near(
                "agreement",
                found.top1_agreement,
                mean(&|q, p, _| f64::from(u8::from(top(q) == top(p)))),
            );
            near("entropy", found.entropy_nats, mean(&|q, _, _| -sum(q.exp() * q)));
            near(
                "baseline entropy",
                found.baseline_entropy_nats,
                mean(&|_, p, _| -sum(p.exp() * p)),
            );
            near("loss", found.model.loss_nats_per_token, mean(&|q, _, t| -q.double_value(&[t])));
            near(
                "baseline loss",
                found.baseline.loss_nats_per_token,
                mean(&|_, p, t| -p.double_value(&[t])),
            );
            let Interval { low, high } = found.kl_interval_95;
            assert!(low < kl && kl < high);
            assert_eq!(found.model.n_tokens, tokens.len());
            for at in &found.by_position {
                let within: Vec<f64> = tokens
                    .iter()
                    .filter(|(before, ..)| (at.first..=at.last).contains(before))
                    .map(|(_, q, p, _)| sum(p.exp() * (p - q)))
                    .collect();
                assert_eq!(within.len(), at.n_tokens, "{at:?}");
                near(
                    "by position",
                    at.kl_nats_per_token,
                    within.iter().sum::<f64>() / within.len() as f64,
                );
            }
            let counted: usize = found.by_position.iter().map(|at| at.n_tokens).sum();
            assert_eq!(counted, if base == "gpt2" { tokens.len() } else { 0 });
        }
    }
}

#[test]
fn tests_name_what_is_wrong_and_pass_what_is_not() {
    let baseline = language_model("gpt2", Kind::Double);
    let rows: Vec<Encoded> = rows(40, 2).into_iter().filter(|row| row.ids.len() > 5).collect();
    let decode = |ids: &[i64]| Ok(ids.iter().map(|id| format!("{id} ")).collect());
    let writing = Writing {
        n_prompts: 1000,
        prompt_len: 5,
        max_new_tokens: 12,
        seed: 3,
        stop_ids: &[],
        decode: &decode,
    };
    let of = |model: &Model| {
        let batching = Batching::default();
        let found = explain(model, &baseline, &rows, None, &writing, &batching, &mut go_on);
        let found = found.unwrap();
        let failed: Vec<String> = found
            .checks
            .iter()
            .filter(|check| check.verdict != Verdict::Passed)
            .map(|check| check.test.clone())
            .collect();
        (found, failed)
    };

    // The same model passes everything, and writes the same.
    let (same, failed) = of(&baseline.alias().unwrap());
    assert_eq!(failed, [""; 0]);
    for written in &same.written {
        assert!(written.kl_free_running.abs() < 1e-12);
        assert!(written.samples.iter().all(|sample| sample.model == sample.baseline));
        assert_eq!((written.samples.len(), &written.model), (rows.len(), &written.baseline));
    }

    // A sharper head has less entropy: the last norm's gain scales every logit.
    let mut sharp = baseline.alias().unwrap();
    sharp.own(&|_| true);
    for (name, tensor) in sharp.parameters() {
        if name.contains("ln_f") {
            tch::no_grad(|| tensor.shallow_clone().copy_(&(&tensor * 8.0)));
        }
    }
    let (found, failed) = of(&sharp);
    assert!(failed.contains(&"entropy_ratio".to_owned()), "{:?}", found.checks);
    assert!(!failed.contains(&"future_leak".to_owned()), "{:?}", found.checks);
    // What it writes is less likely to the baseline than what the baseline writes, or as likely.
    assert!(found.divergence.kl_nats_per_token > 0.1, "{found:?}");

    let none = Writing { prompt_len: 100, ..writing };
    let batching = Batching::default();
    let refused = explain(&baseline, &baseline, &rows, None, &none, &batching, &mut go_on);
    assert!(matches!(refused, Err(Error::Nothing(_))), "{refused:?}");
}

/// A kind that is given, as each token's value, that of the second token after it.
#[derive(Debug)]
struct Leaky(Box<dyn Attention>);

impl Attention for Leaky {
    fn forward(&self, input: &AttnInput) -> Tensor {
        self.0.forward(&AttnInput { v: &input.v.roll([-2], [2]), ..*input })
    }

    fn weights(&self, input: &AttnInput, rows: &[i64]) -> Tensor {
        self.0.weights(input, rows)
    }

    fn flops(&self, n_tokens: i64) -> i64 {
        self.0.flops(n_tokens)
    }

    fn nature(&self) -> Nature {
        self.0.nature()
    }

    fn select_heads(&mut self, heads: &[i64], dims: &Dims) -> Result<(), attn_core::Error> {
        self.0.select_heads(heads, dims)
    }

    fn regroup_kv(&mut self, groups: &[Vec<i64>], dims: &Dims) -> Result<(), attn_core::Error> {
        self.0.regroup_kv(groups, dims)
    }
}

#[test]
fn a_model_that_sees_the_future_is_told() {
    let baseline = language_model("gpt2", Kind::Double);
    let mut leaky = baseline.alias().unwrap();
    plant(&mut leaky, 1, |kind| Box::new(Leaky(kind)));
    let rows: Vec<Encoded> = rows(40, 2).into_iter().filter(|row| row.ids.len() > 5).collect();
    let decode = |_: &[i64]| Ok(String::new());
    let writing = Writing {
        n_prompts: 4,
        prompt_len: 5,
        max_new_tokens: 8,
        seed: 3,
        stop_ids: &[],
        decode: &decode,
    };

    let batching = Batching::default();
    let found = explain(&leaky, &baseline, &rows, None, &writing, &batching, &mut go_on).unwrap();

    let leak = &found.checks[0];
    assert_eq!((leak.test.as_str(), leak.verdict), ("future_leak", Verdict::Failed), "{leak:?}");
    assert!(leak.value.unwrap() > 1e-3, "{leak:?}");
}

/// By the definition: one token at a time, in f64.
#[test]
fn likelihoods_of_windows_match_their_definition() {
    let model = language_model("gpt2", Kind::Double);
    let text: Vec<u32> = rows(40, 2).into_iter().flat_map(|row| row.ids).take(61).collect();
    for windows in [Windows::Context, Windows::HalfContext, Windows::LmEval] {
        let windows = windows.of(&text, 16, 7);
        let expected: Vec<f64> = windows
            .iter()
            .map(|Window { ids, n_scored }| {
                let ids: Vec<i64> = ids.iter().map(|&id| id.into()).collect();
                let loss = |at: usize| naive_loss(&logits(&model, &ids[..at]).get(-1), ids[at]);
                -(ids.len() - n_scored..ids.len()).map(loss).sum::<f64>()
            })
            .collect();
        for batching in batchings() {
            let found = log_likelihoods(&model, &windows, &batching, &mut go_on).unwrap();
            for (found, expected) in found.iter().zip(&expected) {
                assert!((found - expected).abs() < 1e-9, "{found} against {expected}");
            }
        }
    }

    let document = Document { ids: text, n_words: 20, n_bytes: 90 };
    let batching = Batching::default();
    let score = perplexity(
        &model,
        &[document.clone(), document],
        Windows::Context,
        16,
        7,
        &batching,
        &mut go_on,
    )
    .unwrap();
    let nats = score.loss_nats_per_token * 122.0;
    assert_eq!((score.n_tokens, score.n_scored, score.n_words, score.n_bytes), (122, 114, 40, 180));
    assert!((score.word_perplexity.ln() - nats / 40.0).abs() < 1e-12);
    assert!((score.byte_perplexity.ln() - nats / 180.0).abs() < 1e-12);
    assert!((score.bits_per_byte - nats / 180.0 / 2f64.ln()).abs() < 1e-12);
}

#[test]
fn states_take_what_decoding_keeps() {
    let mut model = language_model("gpt2", Kind::Float);
    let per_token = 2 * 24 * 4; // k and v of a layer, f32
    assert_eq!(state_bytes(&model, 1024).unwrap(), 2 * 1024 * per_token);
    assert_eq!(state_bytes(&model, 16384).unwrap(), 2 * 16384 * per_token);
    let window = Variant::Window(window::Config { size: NonZeroU32::new(8).unwrap() });
    model.swap(&[1], &window, 0).unwrap();
    assert_eq!(state_bytes(&model, 16384).unwrap(), (16384 + 8) * per_token);

    // As the whole model counts it, where it has positions.
    for variant in attn_core::testing::kinds() {
        if matches!(variant, Variant::Cross(_)) {
            continue; // refuses decoders
        }
        let mut model = language_model("gpt2", Kind::Float);
        model.swap(&[0, 1], &variant, 0).unwrap();
        let mut state = model.start();
        let ids = attn_core::testing::random_ids(1, [1, 30], VOCAB);
        let _no_grad = tch::no_grad_guard();
        model.step(&ModelInput::new(ids), &mut state, &ForwardOptions::default()).unwrap();
        assert_eq!(state_bytes(&model, 30).unwrap(), state.bytes(), "{variant:?}");
    }
    assert!(decoding_tokens_per_s(&model, &[1, 2, 3], 8).unwrap() > 0.0);
}

/// Rows are the same where the same tokens stand at the same places, whatever counts they have.
#[test]
fn losses_are_paired_by_the_tokens_themselves() {
    let model = language_model("gpt2", Kind::Double);
    let score = |rows: &[Encoded]| {
        next_token(&model, rows, &Batching::default(), &mut go_on).unwrap().by_row
    };
    let paired = |a: &[RowScore], b: &[RowScore]| loss_difference(a, b, 100, 0);
    let rows: Vec<Encoded> = (0..4)
        .map(|i| Encoded { index: i, ids: vec![2, 3 + i as u32, 5, 7], ..rows(1, 2)[0].clone() })
        .collect();
    let own = score(&rows);
    assert!(own.iter().all(|row| row.tokens.len() == 16));
    assert!(paired(&own, &score(&rows)).is_ok());

    let unpaired = |other: &[RowScore]| {
        let counts = |rows: &[RowScore]| -> Vec<_> {
            rows.iter().map(|row| (row.row, row.n_tokens)).collect()
        };
        assert_eq!(counts(&own), counts(other));
        matches!(paired(&own, other), Err(StatsError::Unpaired { .. }))
    };
    // Another tokenizer that cuts as many tokens.
    let mut other = rows.clone();
    other[2].ids = vec![2, 5, 6, 7];
    assert!(unpaired(&score(&other)));
    // The same tokens at other places, and texts in another order.
    other[2].ids = vec![2, 5, 7, 5];
    assert!(unpaired(&score(&other)));
    let mut moved = rows.clone();
    moved.iter_mut().zip(&rows[1..]).for_each(|(row, next)| row.ids = next.ids.clone());
    assert!(unpaired(&score(&moved)));
    // Nothing says which they are.
    let mut old = own.clone();
    old.iter_mut().for_each(|row| row.tokens.clear());
    assert!(unpaired(&old) && matches!(paired(&old, &old), Err(StatsError::Unpaired { .. })));
    assert!(matches!(paired(&[], &[]), Err(StatsError::Empty { .. })));

    // The divergence's scores know them alike.
    let found = divergence(&model, &model, &rows, None, &Batching::default(), &mut go_on).unwrap();
    assert!(paired(&own, &found.model.by_row).is_ok());
    let masking =
        Masking { mask_id: 1, vocab_size: VOCAB as usize, special: vec![0, 1], rate: 0.6 };
    let model = language_model("distilbert", Kind::Double);
    let own = masked_token(&model, &rows, &masking, 7, &Batching::default(), &mut go_on).unwrap();
    let masking = Some((&masking, 7));
    let found =
        divergence(&model, &model, &rows, masking, &Batching::default(), &mut go_on).unwrap();
    assert!(paired(&own.by_row, &found.model.by_row).is_ok());
}

#[test]
fn a_single_row_has_no_interval() {
    let model = language_model("gpt2", Kind::Double);
    let rows = rows(6, 2);
    let score = |rows: &[Encoded]| next_token(&model, rows, &Batching::default(), &mut go_on);
    assert_eq!(score(&rows[1..2]).unwrap().loss_interval_95, None);
    assert!(score(&rows).unwrap().loss_interval_95.is_some());
}
