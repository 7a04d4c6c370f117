//! The bundled sample task: the committed files are what the generator makes, and counting words does not solve it.

#[path = "../examples/sample_grammar/mod.rs"]
mod sample_grammar;

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use arrow::array::{Array, AsArray, RecordBatch};
use arrow::datatypes::Int64Type;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use sample_grammar::{
    N_LINES, Row, SEED, SPLITS, Sample, is_held_out, n_patterns, opinions, shortcuts, words,
};

static SAMPLE: LazyLock<Sample> = LazyLock::new(|| sample_grammar::generate(SEED));

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../data").join(name)
}

fn split(name: &str) -> impl Iterator<Item = &'static Row> + Clone {
    SAMPLE.rows.iter().filter(move |row| row.split == name)
}

/// Panics at the first line that differs, as a whole file is no message.
fn assert_same_lines(name: &str, expected: &str) {
    let found = fs::read_to_string(data(name))
        .unwrap_or_else(|error| panic!("cannot read `{name}`: {error}"));
    for (i, (found, expected)) in found.lines().zip(expected.lines()).enumerate() {
        assert_eq!(
            found,
            expected,
            "line {} of `{name}`; run the example `make_sample_data`",
            i + 1
        );
    }
    assert_eq!(
        found.len(),
        expected.len(),
        "length of `{name}`; run the example `make_sample_data`"
    );
}

#[test]
fn the_csv_is_what_the_generator_makes() {
    assert_same_lines("sample_data.csv", &sample_grammar::csv(&SAMPLE.rows));
}

#[test]
fn the_text_is_what_the_generator_makes() {
    assert_same_lines("sample_text.txt", &sample_grammar::text(&SAMPLE.lines));
}

/// Compares rows, not bytes: another version of the writer may compress otherwise.
#[test]
fn the_parquet_file_holds_the_same_rows() {
    let file = File::open(data("sample_data.parquet")).unwrap();
    let reader = ParquetRecordBatchReaderBuilder::try_new(file).unwrap().build().unwrap();
    let mut found = Vec::new();
    for batch in reader {
        let batch = batch.unwrap();
        assert_eq!(column_names(&batch), ["text", "label", "split", "kind", "template"]);
        let columns = ["text", "split", "kind", "template"];
        let columns =
            columns.map(|name| batch.column_by_name(name).unwrap().as_string::<i32>().clone());
        let labels = batch.column_by_name("label").unwrap().as_primitive::<Int64Type>();
        assert_eq!(labels.null_count(), 0);
        for i in 0..batch.num_rows() {
            let cells = columns.each_ref().map(|column| column.value(i).to_owned());
            found.push((cells, labels.value(i)));
        }
    }

    let cells = |row: &Row| {
        [row.text.clone(), row.split.to_owned(), row.kind.to_owned(), row.template.clone()]
    };
    let expected: Vec<([String; 4], i64)> =
        SAMPLE.rows.iter().map(|row| (cells(row), row.label)).collect();
    assert_eq!(found.len(), expected.len());
    for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
        assert_eq!(
            found, expected,
            "row {i} of `sample_data.parquet`; run the example `make_sample_data`"
        );
    }
}

fn column_names(batch: &RecordBatch) -> Vec<String> {
    batch.schema().fields().iter().map(|field| field.name().clone()).collect()
}

#[test]
fn splits_have_their_sizes_and_balanced_labels() {
    for (name, n_rows) in SPLITS {
        assert_eq!(split(name).count(), n_rows, "{name}");
        assert_eq!(split(name).filter(|row| row.label == 1).count() * 2, n_rows, "{name}");
    }
}

#[test]
fn no_sentence_occurs_twice() {
    let distinct: HashSet<String> = SAMPLE.rows.iter().map(|row| row.text.to_lowercase()).collect();
    assert_eq!(distinct.len(), SAMPLE.rows.len());
}

#[test]
fn train_shows_no_held_out_pattern_and_validation_and_test_do() {
    let share = |name| {
        let n_held_out = split(name).filter(|row| is_held_out(&row.template)).count();
        n_held_out as f64 / split(name).count() as f64
    };
    assert_eq!(share("train"), 0.);
    for name in ["validation", "test"] {
        assert!((share(name) - 0.2).abs() < 0.001, "{name}: {}", share(name));
    }
    let in_train: HashSet<&str> = split("train").map(|row| row.template.as_str()).collect();
    assert_eq!(in_train.len(), n_patterns().0, "train shows every other pattern");
}

/// A sentence may end another one ("Unlike my wife, I enjoyed it."); it must not stand there on its own.
#[test]
fn the_text_holds_no_sentence_of_validation_or_test() {
    assert_eq!(SAMPLE.lines.len(), N_LINES);
    let joined = SAMPLE.lines.join("\n");
    for row in split("validation").chain(split("test")) {
        for (start, _) in joined.match_indices(&row.text) {
            let before = &joined[..start];
            let ends = ["\n", ". ", "? ", "! "];
            let begins = before.is_empty() || ends.iter().any(|end| before.ends_with(end));
            assert!(!begins, "`{}` stands in `sample_text.txt`", row.text);
        }
    }
}

/// How often each word of train stands under the negative and the positive label.
fn counts() -> HashMap<String, [usize; 2]> {
    let mut counts: HashMap<String, [usize; 2]> = HashMap::new();
    for row in split("train") {
        for word in words(&row.text) {
            counts.entry(word).or_default()[usize::try_from(row.label).unwrap()] += 1;
        }
    }
    counts
}

/// `not`, `never` and `but` included. Only the article depends on the word that follows it.
#[test]
fn neutral_words_stand_equally_often_under_both_labels() {
    let opinions = opinions();
    let mut n_checked = 0;
    for (word, [negative, positive]) in counts() {
        if !opinions.contains_key(word.as_str()) && !["a", "an"].contains(&word.as_str()) {
            assert_eq!(negative, positive, "`{word}`");
            n_checked += 1;
        }
    }
    assert!(n_checked > 250, "{n_checked}");
}

/// They lean to their own side, for a learner has to begin somewhere, but each stands on the other side too.
#[test]
fn no_frequent_opinion_word_gives_the_label_away() {
    let opinions = opinions();
    let mut clearest = Vec::new();
    for (word, [negative, positive]) in counts() {
        let n = negative + positive;
        if n >= 30 && opinions.contains_key(word.as_str()) {
            let share = negative.max(positive) as f64 / n as f64;
            assert!(share < 1., "`{word}` is positive in {positive} of {n}");
            clearest.push(share);
        }
    }
    let mean = clearest.iter().sum::<f64>() / clearest.len() as f64;
    assert!(clearest.len() > 80 && mean < 0.72, "{mean} over {} words", clearest.len());
}

#[test]
fn every_pattern_serves_both_labels_equally() {
    let mut leads: HashMap<(&str, &str), i64> = HashMap::new();
    for row in &SAMPLE.rows {
        *leads.entry((row.split, &row.template)).or_default() += 2 * row.label - 1;
    }
    assert!(leads.values().all(|lead| *lead == 0));
}

#[test]
fn shortcuts_do_not_solve_it() {
    for score in shortcuts::scores(&SAMPLE.rows) {
        let limit = if score.name.contains("pairs") { 0.85 } else { 0.75 };
        assert!(score.validation < limit && score.test < limit, "{score:?}");
    }
}

/// Shows that the labels follow the words, and that the counter above can count: where nothing turns a word around,
/// its opinion is the label.
#[test]
fn words_solve_the_plain_statements() {
    let plain: Vec<Row> = SAMPLE.rows.iter().filter(|row| row.kind == "plain").cloned().collect();
    let scores = shortcuts::scores(&plain);
    let count = scores.iter().find(|score| score.name == "count good and bad words").unwrap();
    assert_eq!((count.train, count.validation, count.test), (1., 1., 1.));
}

/// And the other way round: a plain denial means the contrary of its only opinion word.
#[test]
fn words_mislead_in_every_denial() {
    let denials: Vec<Row> =
        SAMPLE.rows.iter().filter(|row| row.kind == "negation").cloned().collect();
    let scores = shortcuts::scores(&denials);
    let count = scores.iter().find(|score| score.name == "count good and bad words").unwrap();
    assert_eq!((count.train, count.validation, count.test), (0., 0., 0.));
}
