//! One file, whatever its format, as rows of the columns that matter.

use std::{
    fs::File,
    io::{BufRead, BufReader, Read, Seek, SeekFrom},
    path::{Path, PathBuf},
    sync::Arc,
};

use arrow::{
    array::{Array, ArrayRef, AsArray, RecordBatch},
    compute::{CastOptions, cast_with_options},
    csv,
    datatypes::{DataType, Field, Float64Type, Int64Type, Schema},
    error::ArrowError,
};
use parquet::arrow::{
    ProjectionMask,
    arrow_reader::{ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReaderBuilder},
};
use serde_json::Value;

use super::files::{EXTENSIONS, extension};
use crate::{
    error::{Error, Result, Source},
    guard::{ParquetFile, Utf8, guarded},
};

/// Rows decoded at a time.
const BATCH_ROWS: usize = 1024;

/// Names of the columns to read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Columns {
    pub(super) text: Option<String>,
    pub(super) pair: Option<String>,
    pub(super) label: Option<String>,
    pub(super) split: Option<String>,
}

impl Columns {
    fn names(&self) -> impl Iterator<Item = &String> {
        [&self.text, &self.pair, &self.label, &self.split].into_iter().flatten()
    }
}

/// The columns of one row. What was not asked for is absent, as is null.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct RawRow {
    pub(super) text: Option<String>,
    pub(super) pair: Option<String>,
    pub(super) label: RawLabel,
    pub(super) split: Option<String>,
}

/// A label as the file has it.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum RawLabel {
    None,
    Int(i64),
    Float(f64),
    Text(String),
}

impl std::fmt::Display for RawLabel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::None => f.write_str("null"),
            Self::Int(number) => number.fmt(f),
            Self::Float(number) => number.fmt(f),
            Self::Text(text) => text.fmt(f),
        }
    }
}

/// The rows of one file.
pub(super) type FileRows = Box<dyn Iterator<Item = Result<RawRow>> + Send>;

/// Opens a file by its ending.
pub(super) fn open(path: &Path, columns: &Columns) -> Result<FileRows> {
    let kind = extension(&path.to_string_lossy()).map(|kind| EXTENSIONS[kind]);
    let file = || File::open(path).map_err(Error::io("read", path));
    match kind {
        Some(".parquet") => parquet_rows(path, file()?, columns),
        Some(".jsonl" | ".json") => json_rows(path, file()?, columns),
        Some(".csv") => delimited_rows(path, file()?, columns, &CSV),
        Some(".tsv") => delimited_rows(path, file()?, columns, &TSV),
        Some(".txt") => text_rows(path, file()?, columns),
        _ => Err(Error::FileKind { path: path.into() }),
    }
}

fn missing(path: &Path, column: &str, available: Vec<String>) -> Error {
    Error::ColumnMissing { path: path.into(), column: column.into(), available }
}

fn unreadable(
    path: &Path,
    format: &'static str,
    row: Option<u64>,
    source: impl Into<Source>,
) -> Error {
    Error::Unreadable { path: path.into(), format, row, source: source.into() }
}

// Parquet.

/// The class names that the Hub's own writer stores beside an integer column.
pub(super) fn classes_in_metadata(path: &Path, label: &str) -> Option<Vec<String>> {
    if extension(&path.to_string_lossy()).map(|kind| EXTENSIONS[kind]) != Some(".parquet") {
        return None;
    }
    let file = File::open(path).ok()?;
    let metadata = guarded(|| {
        ArrowReaderMetadata::load(&ParquetFile::new(file)?, ArrowReaderOptions::default())
    })
    .ok()?;
    let description: Value =
        serde_json::from_str(metadata.schema().metadata().get("huggingface")?).ok()?;
    let names = description["info"]["features"][label]["names"].as_array()?;
    names.iter().map(|name| Some(name.as_str()?.to_string())).collect()
}

fn parquet_rows(path: &Path, file: File, columns: &Columns) -> Result<FileRows> {
    let refused = |source: Source| unreadable(path, "Parquet", None, source);
    let builder = guarded(|| ParquetRecordBatchReaderBuilder::try_new(ParquetFile::new(file)?));
    let builder = builder.map_err(refused)?;
    let schema = Arc::clone(builder.schema());
    let available = || schema.fields().iter().map(|field| field.name().clone()).collect();
    let find = |name: &String| schema.index_of(name).map_err(|_| missing(path, name, available()));
    let roots = columns.names().map(find).collect::<Result<Vec<usize>>>()?;

    for (column, expected) in
        [(&columns.text, "text"), (&columns.pair, "text"), (&columns.split, "text")]
    {
        check_type(path, &schema, column, expected, is_text)?;
    }
    let label = |kind: &DataType| is_text(kind) || is_number(kind);
    check_type(path, &schema, &columns.label, "whole numbers or text", label)?;

    let mask = ProjectionMask::roots(builder.parquet_schema(), roots);
    let builder = builder.with_projection(mask).with_batch_size(BATCH_ROWS);
    let batches = guarded(|| builder.build()).map_err(refused)?;
    Ok(Box::new(BatchRows::new(path, "Parquet", batches, columns)))
}

fn check_type(
    path: &Path,
    schema: &Schema,
    column: &Option<String>,
    expected: &'static str,
    fits: impl Fn(&DataType) -> bool,
) -> Result<()> {
    let Some(column) = column else { return Ok(()) };
    let found = schema.field_with_name(column).expect("looked up before").data_type();
    // A column without a single value has no type of its own.
    if *found == DataType::Null || fits(found) {
        return Ok(());
    }
    Err(Error::ColumnType {
        path: path.into(),
        column: column.clone(),
        expected,
        found: found.to_string(),
    })
}

fn is_text(kind: &DataType) -> bool {
    match kind {
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => true,
        DataType::Dictionary(_, values) => is_text(values),
        _ => false,
    }
}

fn is_number(kind: &DataType) -> bool {
    match kind {
        DataType::Boolean => true,
        DataType::Dictionary(_, values) => is_number(values),
        _ => kind.is_integer() || kind.is_floating(),
    }
}

/// The rows of record batches, the columns of each batch converted at once.
struct BatchRows<I> {
    path: PathBuf,
    format: &'static str,
    batches: I,
    columns: Columns,
    current: Option<Converted>,
    row: usize,
    n_before: u64,
}

/// A batch, its texts plain and its labels of one of three types.
struct Converted {
    n_rows: usize,
    text: Option<ArrayRef>,
    pair: Option<ArrayRef>,
    label: Option<ArrayRef>,
    split: Option<ArrayRef>,
}

impl<I: Iterator<Item = Result<RecordBatch, ArrowError>> + Send + 'static> BatchRows<I> {
    fn new(path: &Path, format: &'static str, batches: I, columns: &Columns) -> Self {
        let (path, columns) = (path.to_path_buf(), columns.clone());
        Self { path, format, batches, columns, current: None, row: 0, n_before: 0 }
    }

    fn convert(&self, batch: &RecordBatch) -> Result<Converted, ArrowError> {
        // What cannot be converted is an error, not a null that would pass for "no label".
        let strict = CastOptions { safe: false, ..CastOptions::default() };
        let cast = |column: &Option<String>, to: fn(&DataType) -> DataType| {
            let array = column.as_ref().map(|name| batch.column_by_name(name).expect("projected"));
            array.map(|array| cast_with_options(array, &to(array.data_type()), &strict)).transpose()
        };
        let text = |_: &DataType| DataType::Utf8;
        Ok(Converted {
            n_rows: batch.num_rows(),
            text: cast(&self.columns.text, text)?,
            pair: cast(&self.columns.pair, text)?,
            label: cast(&self.columns.label, label_type)?,
            split: cast(&self.columns.split, text)?,
        })
    }
}

fn label_type(kind: &DataType) -> DataType {
    match kind {
        DataType::Dictionary(_, values) => label_type(values),
        kind if is_text(kind) => DataType::Utf8,
        kind if kind.is_floating() => DataType::Float64,
        _ => DataType::Int64,
    }
}

impl<I: Iterator<Item = Result<RecordBatch, ArrowError>> + Send + 'static> Iterator
    for BatchRows<I>
{
    type Item = Result<RawRow>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(batch) = &self.current {
                if self.row < batch.n_rows {
                    let row = batch.row(self.row);
                    self.row += 1;
                    return Some(Ok(row));
                }
                self.n_before += batch.n_rows as u64;
                (self.current, self.row) = (None, 0);
            }
            let next = guarded(|| {
                let batch = self.batches.next().transpose()?;
                batch.map(|batch| self.convert(&batch)).transpose()
            });
            match next.transpose()? {
                Ok(batch) => self.current = Some(batch),
                Err(error) => {
                    return Some(Err(unreadable(
                        &self.path,
                        self.format,
                        Some(self.n_before + 1),
                        error,
                    )));
                }
            }
        }
    }
}

impl Converted {
    fn row(&self, row: usize) -> RawRow {
        let text = |column: &Option<ArrayRef>| {
            let array = column.as_ref().filter(|array| array.is_valid(row))?;
            Some(array.as_string::<i32>().value(row).to_string())
        };
        let label = match self.label.as_ref().filter(|array| array.is_valid(row)) {
            None => RawLabel::None,
            Some(array) => match array.data_type() {
                DataType::Utf8 => named(array.as_string::<i32>().value(row)),
                DataType::Float64 => floating(array.as_primitive::<Float64Type>().value(row)),
                _ => RawLabel::Int(array.as_primitive::<Int64Type>().value(row)),
            },
        };
        RawRow { text: text(&self.text), pair: text(&self.pair), label, split: text(&self.split) }
    }
}

fn named(label: &str) -> RawLabel {
    if label.is_empty() { RawLabel::None } else { RawLabel::Text(label.into()) }
}

/// Not a number is how pandas writes a null among integers.
fn floating(label: f64) -> RawLabel {
    if label.is_nan() { RawLabel::None } else { RawLabel::Float(label) }
}

// Comma- and tab-separated values.

struct Dialect {
    name: &'static str,
    delimiter: u8,
    quote: u8,
}

const CSV: Dialect = Dialect { name: "CSV", delimiter: b',', quote: b'"' };

/// The reader cannot be told that nothing quotes, so it is given a byte that no text holds.
const TSV: Dialect = Dialect { name: "TSV", delimiter: b'\t', quote: 0 };

fn delimited_rows(
    path: &Path,
    mut file: File,
    columns: &Columns,
    dialect: &Dialect,
) -> Result<FileRows> {
    let start = after_byte_order_mark(path, &mut file)?;
    let refused = |source: ArrowError| unreadable(path, dialect.name, None, source);
    let format = || {
        let format = csv::reader::Format::default().with_header(true);
        format.with_delimiter(dialect.delimiter).with_quote(dialect.quote)
    };
    // Types are not guessed: a text that looks like a number is a text.
    let (header, _) = format().infer_schema(Utf8::new(&mut file), Some(0)).map_err(refused)?;
    file.seek(SeekFrom::Start(start)).map_err(Error::io("read", path))?;
    let fields: Vec<Field> = header
        .fields()
        .iter()
        .map(|field| Field::new(field.name(), DataType::Utf8, true))
        .collect();
    let available = || header.fields().iter().map(|field| field.name().clone()).collect();
    let find = |name: &String| header.index_of(name).map_err(|_| missing(path, name, available()));
    let mut projection = columns.names().map(find).collect::<Result<Vec<usize>>>()?;
    projection.sort_unstable();
    projection.dedup();

    let reader = csv::ReaderBuilder::new(Arc::new(Schema::new(fields)))
        .with_format(format())
        .with_batch_size(BATCH_ROWS)
        .with_projection(projection);
    let batches = reader.build(Utf8::new(file)).map_err(refused)?;
    // An empty field is the reader's null; a text may be empty, though.
    let rows = BatchRows::new(path, dialect.name, batches, columns);
    let (has_text, has_pair) = (columns.text.is_some(), columns.pair.is_some());
    Ok(Box::new(rows.map(move |row| {
        row.map(|row| RawRow {
            text: row.text.or_else(|| has_text.then(String::new)),
            pair: row.pair.or_else(|| has_pair.then(String::new)),
            ..row
        })
    })))
}

/// Moves past the mark that some editors put before UTF-8, which would become part of the first column's name.
fn after_byte_order_mark(path: &Path, file: &mut File) -> Result<u64> {
    let mut mark = Vec::new();
    let mut read = || {
        file.take(3).read_to_end(&mut mark)?;
        file.seek(SeekFrom::Start(if mark == b"\xef\xbb\xbf" { 3 } else { 0 }))
    };
    read().map_err(Error::io("read", path))
}

// JSON, one object per line.

fn json_rows(path: &Path, mut file: File, columns: &Columns) -> Result<FileRows> {
    after_byte_order_mark(path, &mut file)?;
    let (path, columns) = (path.to_path_buf(), columns.clone());
    let mut number = 0;
    let mut seen = false;
    let rows = Lines::new(path.clone(), "JSON lines", file).filter_map(move |line| {
        number += 1;
        match line {
            Ok(line) if line.trim().is_empty() => None,
            Ok(line) => {
                let row = json_row(&path, &columns, &line, number, !seen);
                seen = true;
                Some(row)
            }
            Err(error) => Some(Err(error)),
        }
    });
    Ok(Box::new(rows))
}

fn json_row(
    path: &Path,
    columns: &Columns,
    line: &str,
    number: u64,
    first: bool,
) -> Result<RawRow> {
    let refused = |source: Source| unreadable(path, "JSON lines", Some(number), source);
    if first && line.trim_start().starts_with('[') {
        return Err(refused(
            "it holds a JSON array\nhint: write one object per line: `jq -c '.[]'`".into(),
        ));
    }
    let value: Value = serde_json::from_str(line).map_err(|error| refused(error.into()))?;
    let Value::Object(mut object) = value else {
        return Err(refused(format!("expected an object, found {}", json_kind(&value)).into()));
    };
    // A key may be absent from a later row, which then is null; absent from the first, its name is wrong.
    if let Some(column) = columns.names().find(|&name| first && !object.contains_key(name)) {
        return Err(missing(path, column, object.keys().cloned().collect()));
    }
    let wrong = |column: &str, expected, value: &Value| Error::ColumnType {
        path: path.into(),
        column: column.into(),
        expected,
        found: format!("{} in row {number}", json_kind(value)),
    };
    let mut text = |column: &Option<String>| {
        // Not removed: two roles may name one column.
        let Some(column) = column else { return Ok(None) };
        match object.get_mut(column) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.clone())),
            Some(other) => Err(wrong(column, "text", other)),
        }
    };
    let (own, pair, split) = (text(&columns.text)?, text(&columns.pair)?, text(&columns.split)?);
    let label = match columns.label.as_ref().and_then(|column| Some((column, object.get(column)?)))
    {
        None | Some((_, Value::Null)) => RawLabel::None,
        Some((_, Value::String(label))) => self::named(label),
        Some((_, Value::Bool(label))) => RawLabel::Int((*label).into()),
        Some((column, value @ Value::Number(label))) => match (label.as_i64(), label.as_f64()) {
            (Some(label), _) => RawLabel::Int(label),
            (None, Some(label)) => floating(label),
            (None, None) => return Err(wrong(column, "whole numbers or text", value)),
        },
        Some((column, value)) => return Err(wrong(column, "whole numbers or text", value)),
    };
    Ok(RawRow { text: own, pair, label, split })
}

fn json_kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a truth value",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

// Plain text, one row per line.

fn text_rows(path: &Path, mut file: File, columns: &Columns) -> Result<FileRows> {
    after_byte_order_mark(path, &mut file)?;
    if let Some(column) = columns.names().find(|&name| name != "text") {
        return Err(missing(path, column, vec!["text".into()]));
    }
    let rows = Lines::new(path.to_path_buf(), "text", file).map(|line| {
        let text = Some(line?);
        Ok(RawRow { text, pair: None, label: RawLabel::None, split: None })
    });
    Ok(Box::new(rows))
}

/// Lines without their ends, checked to be UTF-8.
struct Lines {
    path: PathBuf,
    format: &'static str,
    reader: BufReader<File>,
    number: u64,
}

impl Lines {
    fn new(path: PathBuf, format: &'static str, file: File) -> Self {
        Self { path, format, reader: BufReader::new(file), number: 0 }
    }
}

impl Iterator for Lines {
    type Item = Result<String>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut line = Vec::new();
        self.number += 1;
        match self.reader.read_until(b'\n', &mut line) {
            Ok(0) => return None,
            Ok(_) => {}
            Err(error) => return Some(Err(Error::io("read", &self.path)(error))),
        }
        if line.last() == Some(&b'\n') {
            line.pop();
            if line.last() == Some(&b'\r') {
                line.pop();
            }
        }
        let text = String::from_utf8(line);
        Some(text.map_err(|error| unreadable(&self.path, self.format, Some(self.number), error)))
    }
}
