//! Against real data sets and tokenizers, which the repository does not hold.
//!
//! `ATTN_TEST_SHARED` names a folder with `hub/`, a Hub cache of SST-2, MultiNLI, WikiText-2 and the files of GPT-2 and
//! DistilBERT other than weights, and `models/`, small trained models. Without it every test here says that it is
//! skipped.

#![allow(clippy::print_stderr, reason = "timings, shown with --nocapture")]

use std::{collections::BTreeMap, io::Write, path::PathBuf, time::Instant};

use attn_data::{
    batch::{BatchPlan, Encoded, Side, collate, pack},
    dataset::{DatasetSpec, Example, classes, open, splits},
    hub::{Hub, HubConfig, resolve_config},
    select::few_shot,
    tokenizer::{EncodeOptions, Input, Style, TextTokenizer, train_bpe},
};

fn shared(test: &str) -> Option<(PathBuf, Hub)> {
    let Some(folder) = std::env::var_os("ATTN_TEST_SHARED").map(PathBuf::from) else {
        // Not `eprintln!`, which the test harness hides where a test passes.
        let line =
            format!("SKIPPED {test}: set ATTN_TEST_SHARED to the folder with the real data\n");
        let _ = std::io::stderr().write_all(line.as_bytes());
        return None;
    };
    let config = HubConfig { cache: folder.join("hub"), offline: true, ..HubConfig::default() };
    Some((folder, Hub::new(config)))
}

fn read(task: &str, split: &str, hub: &Hub) -> Vec<Example> {
    let spec = DatasetSpec { source: task.into(), ..DatasetSpec::default() };
    open(&spec, split, hub).unwrap().collect::<Result<_, _>>().unwrap()
}

fn count(rows: &[Example]) -> BTreeMap<Option<i64>, usize> {
    rows.iter().fold(BTreeMap::new(), |mut counts, row| {
        *counts.entry(row.label).or_default() += 1;
        counts
    })
}

#[test]
fn sst2_has_its_rows_and_labels() {
    let Some((_, hub)) = shared("sst2_has_its_rows_and_labels") else { return };
    let begun = Instant::now();

    let train = read("sst2", "train", &hub);

    eprintln!("read {} rows in {:.3} s", train.len(), begun.elapsed().as_secs_f64());
    assert_eq!(count(&train), BTreeMap::from([(Some(0), 29_780), (Some(1), 37_569)]));
    assert_eq!(train[0].text, "hide new secretions from the parental units ");
    assert_eq!(
        count(&read("sst2", "validation", &hub)),
        BTreeMap::from([(Some(0), 428), (Some(1), 444)])
    );
    assert_eq!(count(&read("sst2", "test", &hub)), BTreeMap::from([(None, 1_821)]));
    let labels: Vec<i64> = train.iter().map(|row| row.label.unwrap()).collect();
    assert_eq!(few_shot(&labels, 2, 32, 0).unwrap().len(), 64);
}

#[test]
fn multi_nli_has_its_pairs() {
    let Some((_, hub)) = shared("multi_nli_has_its_pairs") else { return };

    let matched = read("mnli", "validation_matched", &hub);
    let mismatched = read("mnli", "validation_mismatched", &hub);

    assert_eq!((matched.len(), mismatched.len()), (9_815, 9_832));
    assert!(matched.iter().all(|row| row.pair.is_some() && (0..3).contains(&row.label.unwrap())));
    let bare = DatasetSpec {
        source: "nyu-mll/multi_nli".into(),
        text: "premise".into(),
        label: Some("label".into()),
        ..DatasetSpec::default()
    };
    assert_eq!(classes(&bare, &hub).unwrap(), ["entailment", "neutral", "contradiction"]);
}

#[test]
fn wikitext_has_its_lines() {
    let Some((_, hub)) = shared("wikitext_has_its_lines") else { return };

    let [train, validation, test] =
        ["train", "validation", "test"].map(|split| read("wikitext-2", split, &hub));

    assert_eq!([train.len(), validation.len(), test.len()], [36_718, 3_760, 4_358]);
    let n_bytes: usize = train.iter().map(|row| row.text.len()).sum();
    assert_eq!(n_bytes, 10_918_118 - 4 * 36_718); // the Hub's card counts 4 bytes a row beside the text
    let spec = DatasetSpec { source: "wikitext-2-raw".into(), ..DatasetSpec::default() };
    assert_eq!(splits(&spec, &hub).unwrap(), ["test", "validation"]);
    let error = open(&spec, "train", &hub).unwrap_err().to_string();
    assert!(error.contains("it has `test`, `validation`"), "{error}");
}

#[test]
fn published_ids_come_out() {
    let Some((folder, hub)) = shared("published_ids_come_out") else { return };
    let load =
        |name: &str| TextTokenizer::from_folder(resolve_config(&hub, name, None).unwrap()).unwrap();
    let (gpt2, bert) = (load("openai-community/gpt2"), load("distilbert/distilbert-base-uncased"));
    let stories = TextTokenizer::from_folder(folder.join("models/llama-stories260k")).unwrap();

    assert_eq!(gpt2.ids("Hello world", true).unwrap(), [15496, 995]);
    assert_eq!((gpt2.vocab_size(), gpt2.eos_id(), gpt2.pad_id()), (50_257, Some(50_256), None));
    assert_eq!(bert.ids("Hello world!", true).unwrap(), [101, 7592, 2088, 999, 102]);
    assert_eq!((bert.vocab_size(), bert.pad_id(), bert.mask_id()), (30_522, Some(0), Some(103)));
    assert_eq!(bert.special_ids(), [0, 100, 101, 102, 103]);
    assert_eq!(
        (stories.bos_id(), stories.eos_id(), stories.max_length()),
        (Some(1), Some(2), Some(512))
    );
    assert_eq!(stories.ids("Once", true).unwrap()[0], 1);
    for (tokenizer, text) in [(&gpt2, "naïve café 漢字 🎬\n"), (&stories, "Once upon a time, é.")]
    {
        let ids = tokenizer.ids(text, false).unwrap();
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
    }
}

#[test]
fn the_older_files_of_a_tokenizer_give_the_same_ids() {
    let Some((_, hub)) = shared("the_older_files_of_a_tokenizer_give_the_same_ids") else { return };
    let texts = read("sst2", "validation", &hub);
    let inputs: Vec<Input<'_>> = texts.iter().map(|row| Input::from(row.text.as_str())).collect();
    for (name, files) in [
        ("openai-community/gpt2", &["vocab.json", "merges.txt"][..]),
        ("distilbert/distilbert-base-uncased", &["vocab.txt"]),
    ] {
        let folder = resolve_config(&hub, name, None).unwrap();
        let older = tempfile::tempdir().unwrap();
        for file in files {
            std::fs::copy(folder.join(file), older.path().join(file)).unwrap();
        }
        let encode = |folder: &std::path::Path| {
            TextTokenizer::from_folder(folder)
                .unwrap()
                .encode(&inputs, &EncodeOptions::default())
                .unwrap()
        };
        assert_eq!(encode(older.path()), encode(&folder), "{name}");
    }
}

#[test]
fn all_of_sst2_becomes_batches() {
    let Some((_, hub)) = shared("all_of_sst2_becomes_batches") else { return };
    let rows = read("sst2", "train", &hub);
    let inputs: Vec<Input<'_>> = rows.iter().map(|row| Input::from(row.text.as_str())).collect();
    let options = EncodeOptions { max_len: Some(64), ..EncodeOptions::default() };
    for name in ["distilbert/distilbert-base-uncased", "openai-community/gpt2"] {
        let begun = Instant::now();
        let tokenizer =
            TextTokenizer::from_folder(resolve_config(&hub, name, None).unwrap()).unwrap();
        let loaded = begun.elapsed().as_secs_f64();
        let encodings = tokenizer.encode(&inputs, &options).unwrap();
        let encoded = begun.elapsed().as_secs_f64() - loaded;

        let examples: Vec<Encoded> = (0..)
            .zip(encodings.ids.into_iter().zip(&rows))
            .map(|(index, (ids, row))| Encoded { ids, label: row.label, index, second_from: None })
            .collect();
        let lengths: Vec<usize> = examples.iter().map(|example| example.ids.len()).collect();
        let begun = Instant::now();
        let plan = BatchPlan::new(32).unwrap().bucketed(&lengths, 0, 0);
        let padded: usize = plan
            .iter()
            .map(|batch| {
                let rows: Vec<&Encoded> = batch.iter().map(|&row| &examples[row]).collect();
                collate(&rows, tokenizer.fill_id(), Side::Right).ids.len()
            })
            .sum();
        let n_tokens: usize = lengths.iter().sum();
        eprintln!(
            "{name}: loaded in {loaded:.2} s, {n_tokens} tokens in {encoded:.2} s, {} cut, longest {}; {} batches in \
             {:.2} s, {:.1} % padding",
            encodings.n_truncated,
            encodings.longest,
            plan.len(),
            begun.elapsed().as_secs_f64(),
            100. * (padded - n_tokens) as f64 / padded as f64,
        );
        assert_eq!(plan.len(), 67_349_usize.div_ceil(32));
        assert!(
            padded as f64 <= n_tokens as f64 * 1.05,
            "buckets should pad little: {padded} for {n_tokens}"
        );
    }
}

#[test]
fn wikitext_becomes_blocks() {
    let Some((_, hub)) = shared("wikitext_becomes_blocks") else { return };
    let tokenizer =
        TextTokenizer::from_folder(resolve_config(&hub, "openai-community/gpt2", None).unwrap())
            .unwrap();
    let rows = read("wikitext-2", "test", &hub);
    let inputs: Vec<Input<'_>> = rows.iter().map(|row| Input::from(row.text.as_str())).collect();
    let ids = tokenizer.encode(&inputs, &EncodeOptions::default()).unwrap().ids;
    let n_tokens: usize = ids.iter().map(Vec::len).sum();

    let mut packed = pack(ids, 128, None).unwrap();
    let n_blocks = packed.by_ref().inspect(|block| assert_eq!(block.len(), 128)).count();

    assert_eq!(n_blocks, n_tokens / 128);
    assert_eq!(packed.n_tokens() + packed.n_dropped(), n_tokens);
}

#[test]
fn a_vocabulary_trained_on_sst2_is_the_same_twice() {
    let Some((_, hub)) = shared("a_vocabulary_trained_on_sst2_is_the_same_twice") else { return };
    let texts: Vec<String> = read("sst2", "train", &hub).into_iter().map(|row| row.text).collect();
    for style in [Style::ByteLevel, Style::WordPiece] {
        let files = [(); 2].map(|()| {
            let folder = tempfile::tempdir().unwrap();
            let begun = Instant::now();
            let tokenizer = train_bpe(&texts, 8_000, style, Some(64)).unwrap();
            eprintln!(
                "{style:?}: {} tokens in {:.2} s",
                tokenizer.vocab_size(),
                begun.elapsed().as_secs_f64()
            );
            tokenizer.save(folder.path()).unwrap();
            std::fs::read_to_string(folder.path().join("tokenizer.json")).unwrap()
        });
        assert!(files[0] == files[1], "{style:?}: two trainings gave two vocabularies");
    }
}
