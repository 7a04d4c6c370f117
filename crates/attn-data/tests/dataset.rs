//! Rows out of every format, and what is said about those that cannot be read.

mod common;

use std::{
    collections::HashMap,
    fs::{self, File},
    path::{Path, PathBuf},
    sync::Arc,
};

use arrow::{
    array::{
        ArrayRef, BooleanArray, DictionaryArray, Float64Array, Int8Array, Int64Array,
        LargeStringArray, ListArray, RecordBatch, StringArray, StringViewArray, UInt64Array,
    },
    datatypes::{Int32Type, Schema},
};
use attn_data::{
    Error,
    dataset::{DatasetSpec, Example, classes, open, splits, tasks},
    hub::{Hub, HubConfig},
};
use common::Server;
use parquet::{arrow::ArrowWriter, file::properties::WriterProperties};
use tempfile::TempDir;

fn hub() -> Hub {
    Hub::new(HubConfig { offline: true, cache: "no/such/cache".into(), ..HubConfig::default() })
}

fn folder() -> TempDir {
    tempfile::tempdir().unwrap()
}

fn write(folder: &TempDir, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
    let path = folder.path().join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(&path, content).unwrap();
    path
}

fn spec(source: impl AsRef<Path>) -> DatasetSpec {
    DatasetSpec {
        source: source.as_ref().to_str().unwrap().into(),
        label: Some("label".into()),
        ..DatasetSpec::default()
    }
}

fn rows(spec: &DatasetSpec, split: &str) -> Result<Vec<Example>, Error> {
    open(spec, split, &hub())?.collect()
}

fn example(text: &str, label: impl Into<Option<i64>>) -> Example {
    Example { text: text.into(), pair: None, label: label.into() }
}

fn parquet(folder: &TempDir, name: &str, columns: Vec<(&str, ArrayRef)>) -> PathBuf {
    parquet_with(folder, name, columns, WriterProperties::default(), None)
}

fn parquet_with(
    folder: &TempDir,
    name: &str,
    columns: Vec<(&str, ArrayRef)>,
    properties: WriterProperties,
    huggingface: Option<&str>,
) -> PathBuf {
    let batch = RecordBatch::try_from_iter(columns).unwrap();
    let metadata: HashMap<_, _> =
        huggingface.map(|text| ("huggingface".to_string(), text.to_string())).into_iter().collect();
    let schema = Arc::new(Schema::clone(&batch.schema()).with_metadata(metadata));
    let batch = batch.with_schema(Arc::clone(&schema)).unwrap();
    let path = write(folder, name, "");
    let mut writer =
        ArrowWriter::try_new(File::create(&path).unwrap(), schema, Some(properties)).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
    path
}

fn text(values: &[&str]) -> ArrayRef {
    Arc::new(StringArray::from(values.to_vec()))
}

#[test]
fn every_format_gives_the_same_rows() {
    let folder = folder();
    let files = [
        ("a.csv", "label,text\n0,bad\n1,\"good, really \"\"good\"\"\nindeed\"\n-1,?\n".to_string()),
        ("a.jsonl", {
            let good = r#"{"text": "good, really \"good\"\nindeed", "label": 1, "more": [1]}"#;
            format!(
                "{{\"text\": \"bad\", \"label\": 0}}\n{good}\n\n{{\"text\": \"?\", \"label\": -1}}\n"
            )
        }),
    ];
    let expected =
        [example("bad", 0), example("good, really \"good\"\nindeed", 1), example("?", None)];

    for (name, content) in files {
        let path = write(&folder, name, &content);
        assert_eq!(rows(&spec(path), "train").unwrap(), expected, "{name}");
        let path = write(&folder, &format!("bom-{name}"), format!("\u{feff}{content}"));
        assert_eq!(rows(&spec(path), "train").unwrap(), expected, "{name} with a byte order mark");
    }
    let labels: ArrayRef = Arc::new(Int64Array::from(vec![0, 1, -1]));
    let path = parquet(
        &folder,
        "a.parquet",
        vec![("label", labels), ("text", text(&["bad", "good, really \"good\"\nindeed", "?"]))],
    );
    assert_eq!(rows(&spec(path), "train").unwrap(), expected);
}

#[test]
fn tabs_separate_and_quotes_are_ordinary() {
    let folder = folder();
    let path = write(&folder, "a.tsv", "text\tlabel\n\"unbalanced\t1\nit's 5\" wide\t0\n");

    assert_eq!(
        rows(&spec(path), "train").unwrap(),
        [example("\"unbalanced", 1), example("it's 5\" wide", 0)]
    );
}

#[test]
fn lines_of_text_are_rows_and_empty_ones_too() {
    let folder = folder();
    let path = write(&folder, "a.txt", "one\r\n\n three \nlast");
    let spec = DatasetSpec { label: None, ..spec(path) };

    let texts: Vec<String> =
        rows(&spec, "train").unwrap().into_iter().map(|row| row.text).collect();

    assert_eq!(texts, ["one", "", " three ", "last"]);
}

#[test]
fn columns_of_every_text_type_are_read() {
    let folder = folder();
    let values = ["a", "longer than the twelve bytes of a view", ""];
    let dictionary: DictionaryArray<Int32Type> = values.into_iter().collect();
    let columns: [ArrayRef; 4] = [
        text(&values),
        Arc::new(LargeStringArray::from(values.to_vec())),
        Arc::new(StringViewArray::from(values.to_vec())),
        Arc::new(dictionary),
    ];
    for column in columns {
        let kind = column.data_type().clone();
        let path = parquet(&folder, "a.parquet", vec![("text", column)]);
        let spec = DatasetSpec { label: None, ..spec(path) };

        let texts: Vec<String> =
            rows(&spec, "train").unwrap().into_iter().map(|row| row.text).collect();

        assert_eq!(texts, values, "{kind}");
    }
}

#[test]
fn labels_of_every_type_are_classes() {
    let folder = folder();
    let classes = Some(vec!["no".to_string(), "yes".to_string()]);
    let dictionary: DictionaryArray<Int32Type> = ["no", "yes", "-1"].into_iter().collect();
    let columns: Vec<(ArrayRef, [Option<i64>; 3])> = vec![
        (Arc::new(Int8Array::from(vec![0, 1, -1])), [Some(0), Some(1), None]),
        (Arc::new(UInt64Array::from(vec![Some(0), Some(1), None])), [Some(0), Some(1), None]),
        (Arc::new(Float64Array::from(vec![0., 1., f64::NAN])), [Some(0), Some(1), None]),
        (
            Arc::new(BooleanArray::from(vec![Some(false), Some(true), None])),
            [Some(0), Some(1), None],
        ),
        (text(&["no", "yes", ""]), [Some(0), Some(1), None]),
        (text(&["0", "1.0", "-1"]), [Some(0), Some(1), None]),
        (Arc::new(dictionary), [Some(0), Some(1), None]),
    ];
    for (column, expected) in columns {
        let kind = column.data_type().clone();
        let path = parquet(
            &folder,
            "a.parquet",
            vec![("text", text(&["a", "b", "c"])), ("label", column)],
        );
        let spec = DatasetSpec { classes: classes.clone(), ..spec(path) };

        let labels: Vec<_> =
            rows(&spec, "train").unwrap().into_iter().map(|row| row.label).collect();

        assert_eq!(labels, expected, "{kind}");
    }
}

#[test]
fn rows_do_not_depend_on_how_parquet_is_cut() {
    let folder = folder();
    let n = 5000;
    let values: Vec<String> = (0..n).map(|i| format!("row {i}")).collect();
    let values: Vec<&str> = values.iter().map(String::as_str).collect();
    for rows_per_group in [1, 63, 1024, 100_000] {
        let properties =
            WriterProperties::builder().set_max_row_group_row_count(Some(rows_per_group)).build();
        let labels: ArrayRef = Arc::new(Int64Array::from_iter_values((0..n).map(|i| i % 3)));
        let columns = vec![("text", text(&values)), ("label", labels)];
        let path = parquet_with(&folder, "a.parquet", columns, properties, None);

        let rows = rows(&spec(path), "train").unwrap();

        assert_eq!(rows.len(), n as usize);
        assert!(
            (0..)
                .zip(&rows)
                .all(|(i, row)| row.text == format!("row {i}") && row.label == Some(i % 3))
        );
    }
}

#[test]
fn pairs_have_two_texts() {
    let folder = folder();
    let path = write(
        &folder,
        "a.csv",
        "premise,hypothesis,label\nA man sleeps.,He is awake.,contradiction\n",
    );
    let spec = DatasetSpec {
        text: "premise".into(),
        text_pair: Some("hypothesis".into()),
        classes: Some(["entailment", "neutral", "contradiction"].map(Into::into).to_vec()),
        ..spec(path)
    };

    let rows = rows(&spec, "train").unwrap();

    assert_eq!(
        rows[0],
        Example { text: "A man sleeps.".into(), pair: Some("He is awake.".into()), label: Some(2) }
    );
}

#[test]
fn names_get_the_numbers_that_the_train_split_gives_them() {
    let folder = folder();
    write(&folder, "train.csv", "text,label\na,spam\nb,ham\nc,eggs\n");
    write(&folder, "validation.csv", "text,label\nd,spam\n");
    write(&folder, "test.csv", "text,label\nd,bacon\n");
    let spec = spec(folder.path());

    assert_eq!(classes(&spec, &hub()).unwrap(), ["eggs", "ham", "spam"]);
    // Alone, the validation split would number its one class 0.
    assert_eq!(rows(&spec, "validation").unwrap(), [example("d", 2)]);
    assert_eq!(
        open(&spec, "validation", &hub()).unwrap().classes().unwrap(),
        ["eggs", "ham", "spam"]
    );
    let error = rows(&spec, "test").unwrap_err();
    assert!(matches!(&error, Error::Label { label, row: 1, .. } if label == "bacon"), "{error:?}");
    assert!(error.to_string().contains("`eggs`, `ham`, `spam`"), "{error}");
}

#[test]
fn a_first_row_without_a_label_does_not_hide_that_labels_are_names() {
    let folder = folder();
    write(&folder, "train.csv", "text,label\na,\nb,ham\nc,spam\n");
    write(&folder, "test.csv", "text,label\nd,\n");

    assert_eq!(
        rows(&spec(folder.path()), "train").unwrap(),
        [example("a", None), example("b", 0), example("c", 1)]
    );
    assert_eq!(rows(&spec(folder.path()), "test").unwrap(), [example("d", None)]);
}

#[test]
fn names_without_a_train_split_ask_for_the_classes() {
    let folder = folder();
    write(&folder, "test.csv", "text,label\na,spam\n");

    let error = rows(&spec(folder.path()), "test").unwrap_err();

    assert!(matches!(error, Error::ClassesNeeded { .. }), "{error:?}");
    assert!(error.to_string().contains("hint: set `classes`"));
}

#[test]
fn numbers_in_text_are_numbers() {
    let folder = folder();
    let path = write(&folder, "a.csv", "text,label\n1,2\n2.0,0\n,1\n");

    assert_eq!(classes(&spec(&path), &hub()).unwrap(), ["0", "1", "2"]);
    assert_eq!(
        rows(&spec(path), "train").unwrap(),
        [example("1", 2), example("2.0", 0), example("", 1)]
    );
}

#[test]
fn numbers_that_occur_are_the_classes_in_every_format() {
    let folder = folder();
    let csv = write(&folder, "a.csv", "text,label\na,5\nb,10\nc,2\nd,5.0\ne,-1\n");
    let stars: ArrayRef = Arc::new(Int64Array::from(vec![5, 10, 2, 5, -1]));
    let texts = text(&["a", "b", "c", "d", "e"]);
    let parquet = parquet(&folder, "a.parquet", vec![("text", texts), ("label", stars)]);
    let expected =
        [example("a", 1), example("b", 2), example("c", 0), example("d", 1), example("e", None)];
    for path in [&csv, &parquet] {
        assert_eq!(classes(&spec(path), &hub()).unwrap(), ["2", "5", "10"], "{path:?}");
        assert_eq!(rows(&spec(path), "train").unwrap(), expected, "{path:?}");
        let names = ["2", "5", "10", "11"].map(String::from).to_vec();
        let named = DatasetSpec { classes: Some(names), ..spec(path) };
        assert_eq!(rows(&named, "train").unwrap(), expected, "{path:?}: not places in the list");
        let names = ["10", "5"].map(String::from).to_vec();
        let error = rows(&DatasetSpec { classes: Some(names), ..spec(path) }, "train").unwrap_err();
        let Error::Label { row: 3, label, .. } = &error else { panic!("{error:?}") };
        assert_eq!(label, "2");
        assert!(error.to_string().contains("`10`, `5` (or -1 for none)\nhint: "), "{error}");
    }
}

#[test]
fn numbers_keep_the_classes_of_the_train_split() {
    let folder = folder();
    let labels = |numbers: Vec<i64>| -> ArrayRef { Arc::new(Int64Array::from(numbers)) };
    let column = |numbers| vec![("text", text(&["a", "b"])), ("label", labels(numbers))];
    parquet(&folder, "train.parquet", column(vec![4, 1]));
    parquet(&folder, "validation.parquet", column(vec![4, 4]));

    assert_eq!(
        rows(&spec(folder.path()), "validation").unwrap(),
        [example("a", 1), example("b", 1)]
    );
}

#[test]
fn numbers_beside_names_that_are_numbers_in_the_metadata_are_places() {
    let folder = folder();
    let labels: ArrayRef = Arc::new(Int64Array::from(vec![1, 0]));
    let metadata =
        r#"{"info": {"features": {"label": {"names": ["1", "2"], "_type": "ClassLabel"}}}}"#;
    let columns = vec![("text", text(&["a", "b"])), ("label", labels)];
    let path =
        parquet_with(&folder, "a.parquet", columns, WriterProperties::default(), Some(metadata));

    assert_eq!(rows(&spec(&path), "train").unwrap(), [example("a", 1), example("b", 0)]);
}

#[test]
fn a_header_in_one_piece_says_what_separates_it() {
    let folder = folder();
    for (file, header, hint) in [
        ("a.csv", "text;label", "`;` separates its columns"),
        ("a.csv", "text\tlabel", "name the file `.tsv`"),
        ("a.tsv", "text,label", "name the file `.csv`"),
    ] {
        let path = write(&folder, file, format!("{header}\nx\n"));
        let error = rows(&spec(path), "train").unwrap_err().to_string();
        assert!(error.contains("hint: ") && error.contains(hint), "{error}");
    }
    let path = write(&folder, "a.csv", "txet\nx\n");
    let error = rows(&spec(path), "train").unwrap_err().to_string();
    assert!(!error.contains("separates"), "{error}");
}

#[test]
fn class_names_come_from_the_metadata_that_the_hub_writes() {
    let folder = folder();
    let labels: ArrayRef = Arc::new(Int64Array::from(vec![1, 0]));
    let metadata = r#"{"info": {"features": {"label": {"names": ["negative", "positive"], "_type": "ClassLabel"}}}}"#;
    let columns = vec![("text", text(&["a", "b"])), ("label", labels)];
    let path =
        parquet_with(&folder, "a.parquet", columns, WriterProperties::default(), Some(metadata));

    assert_eq!(classes(&spec(&path), &hub()).unwrap(), ["negative", "positive"]);
    assert_eq!(
        open(&spec(path), "train", &hub()).unwrap().classes().unwrap(),
        ["negative", "positive"]
    );
}

#[test]
fn a_column_can_tell_the_splits_apart() {
    let folder = folder();
    let path = write(&folder, "all.csv", "part,text,label\ntrain,a,0\nvalidation,b,1\ntrain,c,1\n");
    let spec = DatasetSpec { split_column: Some("part".into()), ..spec(path) };

    assert_eq!(rows(&spec, "train").unwrap(), [example("a", 0), example("c", 1)]);
    assert_eq!(rows(&spec, "validation").unwrap(), [example("b", 1)]);
    assert_eq!(splits(&spec, &hub()).unwrap(), ["train", "validation"]);
    let error = rows(&spec, "test").unwrap_err();
    assert!(error.to_string().contains("no split `test`; it has `train`, `validation`"), "{error}");
}

#[test]
fn one_file_does_not_pass_for_two_splits() {
    let folder = folder();
    let path = write(&folder, "reviews.csv", "text,label\na,0\n");
    let test = write(&folder, "test.csv", "text,label\na,0\n");

    let error = rows(&spec(&path), "validation").unwrap_err();

    assert!(matches!(error, Error::SplitNotFound { .. }), "{error:?}");
    assert!(error.to_string().contains("set `split_column`"), "{error}");
    assert_eq!(rows(&spec(test), "test").unwrap(), [example("a", 0)]);
}

#[test]
fn a_folder_joins_the_pieces_of_a_split() {
    let folder = folder();
    for (i, value) in ["a", "b", "c"].into_iter().enumerate() {
        parquet(
            &folder,
            &format!("data/train-0000{i}-of-00003.parquet"),
            vec![("text", text(&[value]))],
        );
    }
    let spec = DatasetSpec { label: None, ..spec(folder.path()) };

    let rows = open(&spec, "train", &hub()).unwrap();

    assert_eq!(rows.files().len(), 3);
    assert_eq!(rows.map(|row| row.unwrap().text).collect::<Vec<_>>(), ["a", "b", "c"]);
    assert_eq!(splits(&spec, &hub()).unwrap(), ["train"]);
}

#[test]
fn a_wrong_column_lists_those_there_are() {
    let folder = folder();
    let labels: ArrayRef = Arc::new(Int64Array::from(vec![0]));
    let files = [
        parquet(&folder, "a.parquet", vec![("sentence", text(&["a"])), ("label", labels)]),
        write(&folder, "a.csv", "sentence,label\na,0\n"),
        write(&folder, "a.jsonl", "{\"sentence\": \"a\", \"label\": 0}\n"),
    ];
    for path in files {
        let spec = DatasetSpec { text: "sentense".into(), ..spec(&path) };
        let error = rows(&spec, "train").unwrap_err();

        assert!(
            matches!(&error, Error::ColumnMissing { available, .. } if available.len() == 2),
            "{error:?}"
        );
        let expected = format!(
            "`{}` has no column `sentense`; it has `sentence`, `label`\nhint: did you mean `sentence`?",
            path.display()
        );
        assert_eq!(error.to_string(), expected);
    }
    let path = write(&folder, "a.txt", "a\n");
    assert!(matches!(rows(&spec(path), "train"), Err(Error::ColumnMissing { .. })));
}

#[test]
fn a_column_of_another_type_is_named() {
    let folder = folder();
    let numbers = || -> ArrayRef { Arc::new(Int64Array::from(vec![0])) };
    let lists: ArrayRef =
        Arc::new(ListArray::from_iter_primitive::<Int32Type, _, _>([Some([Some(1)])]));
    let files = [
        (
            parquet(&folder, "a.parquet", vec![("text", numbers()), ("label", numbers())]),
            "holds Int64, expected text",
        ),
        (
            parquet(&folder, "b.parquet", vec![("text", text(&["a"])), ("label", lists)]),
            "expected whole numbers or text",
        ),
        (
            write(&folder, "a.jsonl", "{\"text\": 5, \"label\": 0}"),
            "holds a number in row 1, expected text",
        ),
        (
            write(&folder, "b.jsonl", "{\"text\": \"a\", \"label\": [0]}"),
            "holds an array in row 1, expected whole",
        ),
    ];
    for (path, expected) in files {
        let error = rows(&spec(path), "train").unwrap_err();
        assert!(matches!(error, Error::ColumnType { .. }), "{error:?}");
        assert!(error.to_string().contains(expected), "{error}");
    }
}

#[test]
fn a_row_without_text_is_named() {
    let folder = folder();
    let values: ArrayRef = Arc::new(StringArray::from(vec![Some("a"), None]));
    let files = [
        parquet(&folder, "a.parquet", vec![("text", values)]),
        write(&folder, "a.jsonl", "{\"text\": \"a\"}\n{\"text\": null}\n"),
        write(&folder, "b.jsonl", "{\"text\": \"a\"}\n{\"txt\": \"b\"}\n"),
    ];
    for path in files {
        let error = rows(&DatasetSpec { label: None, ..spec(&path) }, "train").unwrap_err();
        let expected = format!("column `text` of `{}` is null in row 2\nhint: ", path.display());
        assert!(error.to_string().starts_with(&expected), "{error}");
    }
}

#[test]
fn a_label_outside_the_classes_names_file_and_row() {
    let folder = folder();
    let classes = Some(vec!["no".to_string(), "yes".to_string()]);
    let csv = |label: &str| format!("text,label\na,0\nb,{label}\n");
    for (label, classes) in
        [("2", classes.clone()), ("maybe", classes), ("-2", None), ("0.5", Some(vec!["x".into()]))]
    {
        let path = write(&folder, "a.csv", csv(label));
        let error = rows(&DatasetSpec { classes, ..spec(&path) }, "train").unwrap_err();

        let Error::Label { row: 2, label: found, .. } = &error else { panic!("{error:?}") };
        assert_eq!(found, label);
        assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
    }
}

#[test]
fn numbers_too_large_for_a_class_are_an_error_and_not_unlabelled() {
    let folder = folder();
    let labels: ArrayRef = Arc::new(UInt64Array::from(vec![u64::MAX]));
    let path = parquet(&folder, "a.parquet", vec![("text", text(&["a"])), ("label", labels)]);

    let error = rows(&spec(path), "train").unwrap_err();

    assert!(matches!(error, Error::Unreadable { .. }), "{error:?}");
}

#[test]
fn a_split_without_rows_is_an_error() {
    let folder = folder();
    let none: Vec<&str> = Vec::new();
    let files = [
        parquet(&folder, "a.parquet", vec![("text", text(&none))]),
        write(&folder, "a.csv", "text\n"),
        write(&folder, "a.jsonl", "\n\n"),
        write(&folder, "a.txt", ""),
    ];
    for path in files {
        let error = rows(&DatasetSpec { label: None, ..spec(path) }, "train").unwrap_err();
        assert!(matches!(error, Error::EmptySplit { .. }), "{error:?}");
    }
}

#[test]
fn a_file_cut_off_or_damaged_is_an_error() {
    let folder = folder();
    let values: Vec<String> =
        (0..20_000).map(|i| format!("row number {}", i * 7919 % 20_000)).collect();
    let values: Vec<&str> = values.iter().map(String::as_str).collect();
    let whole = fs::read(parquet(&folder, "whole.parquet", vec![("text", text(&values))])).unwrap();
    let mut flipped = whole.clone();
    let middle = whole.len() / 3;
    flipped[middle..middle + 64].iter_mut().for_each(|byte| *byte = !*byte);
    let bad: Vec<(PathBuf, usize)> = vec![
        (write(&folder, "half.parquet", &whole[..whole.len() / 2]), 0),
        (write(&folder, "start.parquet", &whole[..10]), 0),
        (write(&folder, "text.parquet", "text,label\na,0\n"), 0),
        (write(&folder, "flipped.parquet", flipped), 0),
        (write(&folder, "ragged.csv", "text,label\na,0\nb\n"), 2),
        (write(&folder, "latin.csv", b"text,label\ncaf\xe9,0\n"), 1),
        (write(&folder, "cut.jsonl", "{\"text\": \"a\"}\n{\"text\": \"b"), 2),
        (write(&folder, "array.json", "[{\"text\": \"a\"}]"), 1),
        (write(&folder, "value.jsonl", "5\n"), 1),
        (write(&folder, "latin.txt", b"ok\ncaf\xe9\n"), 2),
    ];
    for (path, row) in bad {
        let error = rows(&DatasetSpec { label: None, ..spec(&path) }, "train").unwrap_err();

        let Error::Unreadable { path: named, row: found, .. } = &error else {
            panic!("{}: {error:?}", path.display())
        };
        assert_eq!(*named, path);
        assert!(
            row == 0 || found.is_none_or(|found| found <= row as u64),
            "{}: {found:?}",
            path.display()
        );
        assert!(std::error::Error::source(&error).is_some());
    }
}

#[test]
fn nothing_follows_an_error() {
    let folder = folder();
    let path = write(&folder, "a.jsonl", "{\"text\": \"a\"}\nnot json\n{\"text\": \"c\"}\n");
    let mut rows = open(&DatasetSpec { label: None, ..spec(path) }, "train", &hub()).unwrap();

    assert!(rows.next().unwrap().is_ok());
    assert!(rows.next().unwrap().is_err());
    assert!(rows.next().is_none());
    assert_eq!(rows.n_read(), 1);
}

#[test]
fn sources_that_are_nothing_say_so() {
    let folder = folder();
    let file = write(&folder, "a.xlsx", "");
    let cases = [
        (String::new(), "hint: set `source`"),
        ("./none".into(), "there is no data file or folder `./none`"),
        ("none.csv".into(), "there is no data file or folder `none.csv`"),
        (file.to_str().unwrap().to_string(), "expected a file ending in `.parquet`"),
        ("owner/name".into(), "is not in the cache"),
        ("not an id".into(), "expected `owner/name`"),
    ];
    for (source, expected) in cases {
        let error = rows(&DatasetSpec { source, ..DatasetSpec::default() }, "train").unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
}

#[test]
fn a_task_fills_in_what_was_not_said() {
    let own =
        DatasetSpec { source: "mnli".into(), label: Some("gold".into()), ..DatasetSpec::default() };

    let resolved = own.resolved();

    assert_eq!(
        (resolved.source.as_str(), resolved.text.as_str()),
        ("nyu-mll/multi_nli", "premise")
    );
    assert_eq!(resolved.label.as_deref(), Some("gold"));
    assert_eq!(resolved.validation_split, "validation_matched");
    assert_eq!(resolved.classes.unwrap().len(), 3);
    let error = DatasetSpec::known("sst-2").unwrap_err().to_string();
    assert!(error.contains("`sst2`, `mnli`") && error.contains("did you mean `sst2`?"), "{error}");
    for task in tasks() {
        let spec = DatasetSpec::known(task.name).unwrap();
        assert_eq!(
            DatasetSpec { source: task.name.into(), ..DatasetSpec::default() }.resolved(),
            spec
        );
        let text = serde_json::to_string(&spec).unwrap();
        assert_eq!(serde_json::from_str::<DatasetSpec>(&text).unwrap(), spec);
    }
}

#[test]
fn unknown_settings_are_refused() {
    let error =
        serde_json::from_str::<DatasetSpec>(r#"{"source": "x", "lable": "y"}"#).unwrap_err();

    assert!(error.to_string().contains("unknown field `lable`"), "{error}");
}

#[test]
fn a_repository_is_read_like_a_folder() {
    let (server, cache, folder) = (Server::start(), folder(), folder());
    let bytes = |value: &str| {
        fs::read(parquet(&folder, "a.parquet", vec![("text", text(&[value]))])).unwrap()
    };
    let repo = "datasets/o/d";
    server
        .put(repo, "README.md", "")
        .put_large(repo, "data/train-00000-of-00002.parquet", bytes("a"))
        .put_large(repo, "data/train-00001-of-00002.parquet", bytes("b"))
        .put_large(repo, "data/test-00000-of-00001.parquet", bytes("c"));
    let spec = DatasetSpec { source: "o/d".into(), ..DatasetSpec::default() };
    let read = |hub: &Hub, split| -> Vec<String> {
        open(&spec, split, hub).unwrap().map(|row| row.unwrap().text).collect()
    };

    assert_eq!(read(&server.hub(cache.path()), "train"), ["a", "b"]);

    // Only what was asked for has been fetched, and offline that is all there is.
    let offline = Hub::new(HubConfig { offline: true, ..server.config(cache.path()) });
    assert_eq!(read(&offline, "train"), ["a", "b"]);
    let error = open(&spec, "test", &offline).unwrap_err();
    assert!(error.to_string().contains("no split `test`; it has `train`"), "{error}");
}

#[test]
fn a_repository_of_a_script_is_read_from_its_conversion() {
    let (server, cache, folder) = (Server::start(), folder(), folder());
    let bytes = fs::read(parquet(&folder, "a.parquet", vec![("text", text(&["a"]))])).unwrap();
    server.put("datasets/o/script", "script.py", "");
    server.put_at(
        "datasets/o/script",
        "refs/convert/parquet",
        "default/train/0000.parquet",
        bytes,
        true,
    );
    let spec = DatasetSpec { source: "o/script".into(), ..DatasetSpec::default() };

    let rows = open(&spec, "train", &server.hub(cache.path())).unwrap();

    assert_eq!(rows.map(|row| row.unwrap().text).collect::<Vec<_>>(), ["a"]);
}

#[test]
fn half_a_split_in_the_cache_is_not_taken_for_the_whole() {
    let (server, cache, folder) = (Server::start(), folder(), folder());
    let bytes = fs::read(parquet(&folder, "a.parquet", vec![("text", text(&["a"]))])).unwrap();
    server.put_large("datasets/o/d", "data/train-00001-of-00002.parquet", bytes);
    let kind = attn_data::hub::RepoKind::Dataset;
    server.hub(cache.path()).file(kind, "o/d", "data/train-00001-of-00002.parquet", None).unwrap();
    let offline = Hub::new(HubConfig { offline: true, ..server.config(cache.path()) });
    let spec = DatasetSpec { source: "o/d".into(), ..DatasetSpec::default() };

    let error = open(&spec, "train", &offline).unwrap_err();

    assert!(matches!(error, Error::MissingShard { found: 1, expected: 2, .. }), "{error:?}");
}
