//! Scores of retrieval heads against their definitions: full passes, one head and one token at a time in `f64`, and a model
//! whose copying head is known.

mod common;

use std::{collections::BTreeSet, ops::ControlFlow, ops::Range};

use attn_core::{
    Config, Error as CoreError, ForwardOptions, Gate, LoadOptions, Model, ModelInput, Rows, Variant,
};
use attn_eval::{
    Answering, Batching, Error, Query, Trial, answer, over_trials, query_focused, retrieval,
};
use common::{go_on, language_model, shaken};
use serde_json::json;
use tch::{IndexOp, Kind, Tensor};

const VOCAB: i64 = 6;

/// A Llama of two layers, whose few tokens are copied by chance.
fn small(n_layers: usize) -> Model {
    let config = json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": VOCAB, "hidden_size": 16,
        "intermediate_size": 24, "num_hidden_layers": n_layers, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64
    });
    let config = Config::from_json(config.as_object().unwrap().clone()).unwrap();
    let options = LoadOptions { kind: Kind::Double, seed: 3, ..LoadOptions::default() };
    shaken(Model::init(config, &options).unwrap())
}

fn words(ids: &[i64]) -> attn_data::Result<String> {
    Ok(ids.iter().map(|id| format!("w{id}")).collect::<Vec<_>>().join(" "))
}

fn answering(max_new_tokens: usize, stop_ids: &[i64]) -> Answering<'_> {
    Answering { max_new_tokens, stop_ids, decode: &words }
}

fn prompt(seed: u64, n: i64) -> Vec<u32> {
    let ids = attn_core::testing::random_ids(seed, [1, n], VOCAB).view([-1]);
    Vec::<i64>::try_from(ids).unwrap().into_iter().map(|id| id as u32).collect()
}

/// Attention of every query to every key, `[head][query][key]`, layer after layer, and the last token predicted.
fn full(model: &Model, ids: &[u32]) -> (Vec<Vec<Vec<f64>>>, u32) {
    let ids: Vec<i64> = ids.iter().map(|&id| id.into()).collect();
    let input = ModelInput::new(Tensor::from_slice(&ids).unsqueeze(0));
    let options = ForwardOptions { attentions: Rows::All, ..ForwardOptions::default() };
    let output = tch::no_grad(|| model.forward(&input, &options)).unwrap();
    let layer = |rows: &Tensor| Vec::<Vec<Vec<f64>>>::try_from(rows.get(0)).unwrap();
    let next = output.logits.i((0, -1)).argmax(-1, false).int64_value(&[]);
    (output.attentions.iter().flat_map(layer).collect(), next as u32)
}

fn close(found: &[f64], expected: &[f64]) {
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        assert!((found - expected).abs() < 1e-12, "{found} {expected}");
    }
}

#[test]
fn scores_of_copying_match_their_definitions() {
    let model = small(2);
    let trials: Vec<Trial> = (0..6)
        .map(|seed| Trial {
            prompt: prompt(seed, 14 + seed as i64),
            needle: 3..11,
            told: if seed % 2 == 0 { std::iter::once(4..9).collect() } else { vec![3..6, 8..11] },
            answer: "w1 w2 w3".into(),
        })
        .collect();
    let mut n_copies = 0;

    let reads = retrieval(&model, &trials, &answering(9, &[]), &mut go_on).unwrap();

    for (trial, read) in trials.iter().zip(&reads) {
        let mut ids = trial.prompt.clone();
        let mut written = Vec::new();
        let mut copied: Vec<BTreeSet<u32>> = vec![BTreeSet::new(); 8];
        let (mut counts, mut mass) = (vec![0.0; 8], vec![0.0; 8]);
        for _ in 0..9 {
            let (attention, next) = full(&model, &ids);
            for (head, rows) in attention.iter().enumerate() {
                let row = rows.last().unwrap();
                mass[head] += row[trial.needle.clone()].iter().sum::<f64>() / 9.0;
                let most = (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap();
                let is_told = trial.told.iter().any(|told: &Range<usize>| told.contains(&most));
                if is_told && ids[most] == next {
                    copied[head].insert(next);
                    counts[head] += 1.0;
                    n_copies += 1;
                }
            }
            ids.push(next);
            written.push(i64::from(next));
        }
        let told: BTreeSet<u32> = ids[trial.told[0].clone()].iter().copied().collect();
        let share = |copied: &BTreeSet<u32>| {
            copied.iter().filter(|id| told.contains(id)).count() as f64 / told.len() as f64
        };
        close(&read.set, &copied.iter().map(share).collect::<Vec<_>>());
        let n_told = trial.told[0].len() as f64;
        close(&read.repeats, &counts.iter().map(|count| count / n_told).collect::<Vec<_>>());
        close(&read.mass, &mass);
        assert_eq!(read.answered.response, words(&written).unwrap());
    }
    assert!(n_copies > 20, "a test of nothing: {n_copies} copies");
    assert!(reads.iter().any(|read| read.set != read.repeats));
}

#[test]
fn the_score_by_the_question_matches_its_definition() {
    let model = small(2);
    let text = prompt(9, 20);
    let query = Query { ids: [&text[..], &[1, 2, 3, 4]].concat(), needle: 5..12, asked: 20..24 };
    let null = Query { ids: [&text[..], &[0, 5]].concat(), asked: 20..22, ..query.clone() };

    let found = query_focused(&model, &query, &null).unwrap();

    let mean = |query: &Query| -> Vec<Vec<f64>> {
        let of_head = |rows: &Vec<Vec<f64>>| {
            let of_key = |key: usize| {
                query.asked.clone().map(|at| rows[at][key]).sum::<f64>() / query.asked.len() as f64
            };
            query.needle.clone().map(of_key).collect()
        };
        full(&model, &query.ids).0.iter().map(of_head).collect()
    };
    let mut n_left_out = 0;
    let expected: Vec<f64> = mean(&query)
        .iter()
        .zip(mean(&null))
        .map(|(asked, unasked)| {
            let c: Vec<f64> = asked.iter().zip(unasked).map(|(a, b)| a - b).collect();
            let n = c.len() as f64;
            let mean = c.iter().sum::<f64>() / n;
            let std = (c.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1.0)).sqrt();
            n_left_out += c.iter().filter(|&&x| x <= mean - 2.0 * std).count();
            c.iter().filter(|&&x| x > mean - 2.0 * std).sum()
        })
        .collect();
    close(&found, &expected);
    assert!(n_left_out > 0, "no token was left out");
    close(&query_focused(&model, &query, &query).unwrap(), &[0.0; 8]);
}

/// One layer of two heads without positions. Head 0 looks for the token that follows the current one in 3 5 9 12 7 15 and
/// writes it; head 1 looks for the current one and writes nothing. The feed-forward part is off.
fn copier() -> Model {
    let config = json!({
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 16, "n_positions": 64, "n_embd": 32,
        "n_layer": 1, "n_head": 2
    });
    let config = Config::from_json(config.as_object().unwrap().clone()).unwrap();
    let options = LoadOptions { kind: Kind::Double, ..LoadOptions::default() };
    let model = Model::init(config, &options).unwrap();
    let _no_grad = tch::no_grad_guard();
    for (name, tensor) in model.parameters() {
        let mut tensor = tensor;
        if name.contains("ln_") && name.ends_with("weight") {
            continue;
        }
        let _ = tensor.zero_();
        let one = |at: [i64; 2], value: f64| drop(tensor.i((at[0], at[1])).fill_(value));
        if name.ends_with("wte.weight") {
            (0..16).for_each(|id| one([id, id], 1.0));
        } else if name.ends_with("c_attn.weight") {
            for pair in [3, 5, 9, 12, 7, 15].windows(2) {
                one([pair[0], pair[1]], 2.0); // queries of head 0
            }
            for id in 0..16 {
                one([id, 32 + id], 2.0); // its keys
                one([id, 64 + id], 1.0); // its values
                one([id, 16 + id], 2.0); // queries and keys of head 1
                one([id, 48 + id], 2.0);
            }
        } else if name.ends_with("attn.c_proj.weight") {
            (0..16).for_each(|channel| one([channel, channel], 1.0));
        }
    }
    model
}

#[test]
fn the_head_that_copies_is_found_and_without_it_nothing_is() {
    let model = copier();
    let prompts =
        [vec![1, 2, 1, 2, 4, 5, 9, 12, 7, 15, 1, 2, 3], vec![4, 5, 9, 12, 7, 15, 1, 2, 1, 2, 1, 3]];
    let trials: Vec<Trial> = [4, 0]
        .into_iter()
        .zip(&prompts)
        .map(|(start, prompt)| Trial {
            prompt: prompt.clone(),
            needle: start..start + 6,
            told: std::iter::once(start + 1..start + 5).collect(),
            answer: "w5 w9 w12 w7".into(),
        })
        .collect();
    let answering = answering(20, &[15]);

    let reads = retrieval(&model, &trials, &answering, &mut go_on).unwrap();

    for read in &reads {
        assert_eq!(read.answered.response, "w5 w9 w12 w7");
        assert!(read.answered.word_match && read.answered.rouge1_recall == 1.0);
        assert_eq!((read.set[0], read.repeats[0]), (1.0, 1.0));
        assert_eq!((read.set[1], read.repeats[1]), (0.0, 0.0));
        assert!(read.mass[0] > 0.99, "{:?}", read.mass);
    }
    let scores = over_trials(&model, &reads.into_iter().map(|read| read.set).collect::<Vec<_>>());
    let scores = scores.unwrap();
    assert_eq!((scores.scores, scores.n_rows), (vec![vec![1.0, 0.0]], 2));

    let gate = |open: [f64; 2]| [Some(Gate::per_head(&Tensor::from_slice(&open)))];
    let expected = vec!["w5 w9 w12 w7".to_owned(); 2];
    let ask = |gates: &[Option<Gate>], batch_size| {
        let batching = Batching { batch_size, ..Batching::default() };
        answer(&model, &prompts, &expected, gates, &answering, &batching, &mut go_on).unwrap()
    };
    for batch_size in [1, 2] {
        assert!(ask(&[], batch_size).iter().all(|answered| answered.word_match));
        assert!(ask(&gate([1.0, 0.0]), batch_size).iter().all(|answered| answered.word_match));
        let without = ask(&gate([0.0, 1.0]), batch_size);
        assert!(without.iter().all(|answered| answered.rouge1_recall == 0.0), "{without:?}");
    }
}

#[test]
fn what_cannot_be_scored_is_refused() {
    let trial = |answer: &str| Trial {
        prompt: prompt(1, 9),
        needle: 2..5,
        told: std::iter::once(3..4).collect(),
        answer: answer.into(),
    };
    let refusal = |model: &Model, trials: &[Trial], n| {
        retrieval(model, trials, &answering(n, &[]), &mut go_on).unwrap_err()
    };
    let model = small(1);
    assert!(matches!(refusal(&model, &[], 5), Error::Nothing(_)));
    assert!(matches!(refusal(&model, &[trial("w1")], 0), Error::Nothing(_)));
    let wordless = refusal(&model, &[trial(" . ")], 5).to_string();
    assert!(wordless.contains("has no words"), "{wordless}");
    assert!(matches!(over_trials(&model, &[]).unwrap_err(), Error::Nothing(_)));
    let encoder = language_model("distilbert", Kind::Double);
    assert!(matches!(refusal(&encoder, &[trial("w1")], 5), Error::Direction { .. }));

    let mut local = small(2);
    local
        .swap(&[1], &serde_json::from_str::<Variant>(r#"{"kind": "window"}"#).unwrap(), 0)
        .unwrap();
    let refused = refusal(&local, &[trial("w1")], 5);
    assert!(
        matches!(refused, Error::Model(CoreError::Refused { kind: "window", .. })),
        "{refused}"
    );

    let model = small(1);
    let stopped = retrieval(&model, &vec![trial("w1"); 3], &answering(2, &[]), &mut |_| {
        ControlFlow::Break(())
    });
    assert!(matches!(stopped, Err(Error::Stopped { n_done: 1, n_rows: 3 })));
}
