//! Really trained models do what they were trained for.
//!
//! They are not in this repository. Where `ATTN_TEST_SHARED` names a folder that holds `models/` and `text/`, these
//! tests run; elsewhere each says that it was skipped. Losses are in nats per predicted token, and the expected ones
//! were computed by transformers 5.23 in f32 on the same tokens.

use std::{
    env, fs,
    path::{Path, PathBuf},
};

use attn_core::{Config, ForwardOptions, LoadOptions, Model, ModelInput, checkpoint::read_json};
use parquet::{
    file::reader::{FileReader, SerializedFileReader},
    record::RowAccessor,
};
use serde::Deserialize;
use tch::{IndexOp, Kind, Tensor};
use tokenizers::Tokenizer;

mod common;

const VARIABLE: &str = "ATTN_TEST_SHARED";

#[test]
fn stories260k_writes_its_sample_word_for_word() {
    #[derive(Deserialize)]
    struct Sample {
        greedy_ids: Vec<i64>,
        greedy_from_bos: String,
    }

    let Some(shared) = shared("stories260k_writes_its_sample_word_for_word") else { return };
    let dir = shared.join("models/llama-stories260k");
    let sample: Sample =
        serde_json::from_str(&fs::read_to_string(dir.join("sample.json")).unwrap()).unwrap();
    let tokenizer = Tokenizer::from_file(dir.join("tokenizer.json")).unwrap();
    let expected = encode(&tokenizer, &sample.greedy_from_bos);
    let (model, bos) = (load(&dir), expected[0]);

    let cached = greedy_by_steps(&model, bos, expected.len());
    assert_eq!(cached[..sample.greedy_ids.len()], sample.greedy_ids);
    assert_eq!(cached, expected);
    let text =
        tokenizer.decode(&cached.iter().map(|&id| id as u32).collect::<Vec<_>>(), true).unwrap();
    assert_eq!(text, sample.greedy_from_bos);

    // One pass over the whole text predicts each of its tokens, as the steps did.
    let logits = logits(&model, &Tensor::from_slice(&expected).unsqueeze(0));
    let predicted = Vec::<i64>::try_from(logits.argmax(-1, false).i(0)).unwrap();
    assert_eq!(predicted[..expected.len() - 1], expected[1..]);
}

#[test]
fn stories260k_knows_tiny_stories() {
    let Some(shared) = shared("stories260k_knows_tiny_stories") else { return };
    let dir = shared.join("models/llama-stories260k");
    let tokenizer = Tokenizer::from_file(dir.join("tokenizer.json")).unwrap();
    let stories: Vec<Tensor> =
        first_stories(&shared.join("text/tinystories/train-00000-of-00001.parquet"), 20)
            .iter()
            .map(|story| {
                let ids = encode(&tokenizer, story);
                Tensor::from_slice(&ids[..ids.len().min(512)]).unsqueeze(0)
            })
            .collect();

    let (trained, n_predicted) = mean_loss(&load(&dir), &stories);
    let (control, _) = mean_loss(&untrained(&dir), &stories);

    assert_eq!(n_predicted, 6405);
    assert!((trained - 1.272_922).abs() < 1e-4, "{trained}");
    assert!((6.0..6.6).contains(&control), "{control}"); // ln 512 = 6.238: it knows nothing.
}

#[test]
fn nano_sort_sorts_every_input() {
    let Some(shared) = shared("nano_sort_sorts_every_input") else { return };
    let dir = shared.join("models/gpt2-nano-sort");
    // Every row of six letters out of A, B, C: the numbers below 3⁶ in base 3.
    let letters = |number: i64| (0..6).map(move |place| number / 3_i64.pow(place) % 3);
    let inputs = Tensor::from_slice(&(0..729).flat_map(letters).collect::<Vec<_>>()).view([729, 6]);
    let (sorted, _) = inputs.sort(-1, false);

    let n_sorted = |model: &Model| {
        let mut ids = inputs.shallow_clone();
        for _ in 0..6 {
            let next = logits(model, &ids).i((.., -1)).argmax(-1, true);
            ids = Tensor::cat(&[ids, next], 1);
        }
        let right = ids.narrow(1, 6, 6).eq_tensor(&sorted).all_dim(-1, false);
        right.sum(Kind::Int64).int64_value(&[])
    };

    assert_eq!(n_sorted(&load(&dir)), 729);
    assert!(n_sorted(&untrained(&dir)) < 30);
}

#[test]
fn char_shakespeare_reaches_its_stated_loss() {
    let Some(shared) = shared("char_shakespeare_reaches_its_stated_loss") else { return };
    let dir = shared.join("models/gpt2-char-shakespeare");
    let tokenizer = Tokenizer::from_file(dir.join("tokenizer.json")).unwrap();
    let text = fs::read_to_string(shared.join("text/tinyshakespeare/input.txt")).unwrap();
    // One character is one token, and all characters of the text are known.
    let ids = encode(&tokenizer, &text[500_000..500_000 + 937 * 64]);
    let windows = Tensor::from_slice(&ids).view([937, 64]);
    let batches: Vec<Tensor> = windows.split(128, 0);

    let (trained, n_predicted) = mean_loss(&load(&dir), &batches);
    let (control, _) = mean_loss(&untrained(&dir), &batches);

    assert_eq!(n_predicted, 59_031);
    assert!((trained - 1.289_022).abs() < 1e-4, "{trained}");
    assert!((4.1..4.5).contains(&control), "{control}"); // ln 65 = 4.174.
}

/// The folder of models and texts; where there is none, says so.
fn shared(test: &str) -> Option<PathBuf> {
    let Some(shared) = env::var_os(VARIABLE).map(PathBuf::from) else {
        common::skipped(test, &format!("{VARIABLE} names no folder with models/ and text/"));
        return None;
    };
    assert!(
        shared.join("models").is_dir(),
        "{VARIABLE}: there is no models/ in `{}`",
        shared.display()
    );
    Some(shared)
}

fn load(dir: &Path) -> Model {
    Model::load(dir, &LoadOptions::default())
        .unwrap_or_else(|error| panic!("{}: {error}", dir.display()))
        .0
}

/// The control: the same architecture with random weights.
fn untrained(dir: &Path) -> Model {
    let config = Config::from_json(read_json(dir, "config.json").unwrap()).unwrap();
    Model::init(config, &LoadOptions { seed: 7, ..LoadOptions::default() }).unwrap()
}

/// Ids with the special tokens that the tokenizer adds (the start token, for stories260k).
fn encode(tokenizer: &Tokenizer, text: &str) -> Vec<i64> {
    tokenizer.encode(text, true).unwrap().get_ids().iter().map(|&id| id.into()).collect()
}

fn first_stories(path: &Path, n: usize) -> Vec<String> {
    let reader = SerializedFileReader::new(fs::File::open(path).unwrap()).unwrap();
    let rows = reader.get_row_iter(None).unwrap();
    rows.take(n).map(|row| row.unwrap().get_string(0).unwrap().clone()).collect()
}

fn logits(model: &Model, ids: &Tensor) -> Tensor {
    let input = ModelInput::new(ids.shallow_clone());
    tch::no_grad(|| model.forward(&input, &ForwardOptions::default())).unwrap().logits
}

/// `n` tokens from `first` on, each the likeliest, with a decoding state.
fn greedy_by_steps(model: &Model, first: i64, n: usize) -> Vec<i64> {
    let (mut ids, mut state) = (vec![first], model.start());
    while ids.len() < n {
        let last = Tensor::from_slice(&ids[ids.len() - 1..]).unsqueeze(0);
        let out = tch::no_grad(|| {
            model.step(&ModelInput::new(last), &mut state, &ForwardOptions::default())
        });
        ids.push(out.unwrap().logits.i((0, -1)).argmax(-1, false).int64_value(&[]));
    }
    ids
}

/// The mean loss of predicting each token from those before it, and the number of predictions.
fn mean_loss(model: &Model, batches: &[Tensor]) -> (f64, i64) {
    let (mut total, mut count) = (0.0, 0);
    for ids in batches {
        let log_probs = logits(model, ids).log_softmax(-1, Kind::Double);
        let seq_len = ids.size()[1];
        let targets = ids.narrow(1, 1, seq_len - 1);
        let picked = log_probs.narrow(1, 0, seq_len - 1).gather(-1, &targets.unsqueeze(-1), false);
        total -= picked.sum(Kind::Double).double_value(&[]);
        count += targets.numel() as i64;
    }
    (total / count as f64, count)
}
