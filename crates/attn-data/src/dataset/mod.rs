//! Rows of text, from the Hub or from files.
//!
//! A [`DatasetSpec`] says where the rows are and which columns matter; [`open`] gives them one by one. Parquet is
//! read page by page, the other formats block by block: a split larger than memory is no problem.
//!
//! | ending | read as |
//! | --- | --- |
//! | `.parquet` | columns of text (plain, large, view or dictionary), labels of any integer, float or text type |
//! | `.jsonl`, `.json` | one JSON object per line |
//! | `.csv` | comma-separated with a header, RFC 4180 quotes |
//! | `.tsv` | tab-separated with a header; quotes are ordinary characters, as in the GLUE files |
//! | `.txt` | one row per line, in a column `text` |

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result, list},
    hub::{Hub, RepoKind, looks_like_path},
};

mod files;
mod read;
mod tasks;

pub(crate) use files::EXTENSIONS;
use read::{Columns, FileRows, RawLabel, RawRow};
pub use tasks::{Task, tasks};

/// Where rows are and what their columns are called.
///
/// ```
/// use attn_data::dataset::DatasetSpec;
///
/// let spec: DatasetSpec = serde_json::from_str(
///     r#"{"source": "reviews.csv", "text": "review", "label": "stars", "split_column": "part"}"#,
/// )?;
/// assert_eq!(spec.train_split, "train");
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DatasetSpec {
    /// A folder, a file, a Hub id such as `stanfordnlp/sst2`, or a name from [`tasks`], whose columns then apply
    /// where none are given here. What exists on disk wins over the Hub.
    pub source: String,
    /// The configuration, where a data set has several: the folder its files stand in.
    pub config: Option<String>,
    /// Branch, tag or commit on the Hub; `main` where absent.
    pub revision: Option<String>,
    /// Column of the text.
    pub text: String,
    /// Column of the second text, for tasks on pairs.
    pub text_pair: Option<String>,
    /// Column of the label: class names, or numbers. -1 and null mean "no label".
    pub label: Option<String>,
    /// Class names in the order of their numbers, which count from 0. Where absent: those a parquet file from the Hub
    /// carries, else the values that occur in the train split, sorted. Names that are whole numbers themselves, such as
    /// 1 to 5 stars, are what the column holds, whatever their place in this list.
    pub classes: Option<Vec<String>>,
    /// Name of the split to train on.
    pub train_split: String,
    /// Name of the split to report on.
    pub validation_split: String,
    /// Column that names each row's split, where one file holds them all.
    pub split_column: Option<String>,
}

impl Default for DatasetSpec {
    fn default() -> Self {
        Self {
            source: String::new(),
            config: None,
            revision: None,
            text: "text".into(),
            text_pair: None,
            label: None,
            classes: None,
            train_split: "train".into(),
            validation_split: "validation".into(),
            split_column: None,
        }
    }
}

impl DatasetSpec {
    /// The specification of a task in [`tasks`].
    ///
    /// # Errors
    ///
    /// [`Error::UnknownTask`], with the names there are.
    pub fn known(name: &str) -> Result<Self> {
        tasks::find(name).map(Task::spec).ok_or_else(|| Error::UnknownTask {
            name: name.into(),
            known: tasks().iter().map(|task| task.name.into()).collect(),
        })
    }

    /// The same, with a task's name replaced by what it stands for.
    ///
    /// Settings that differ from their defaults stay; a folder or file of that name wins.
    pub fn resolved(&self) -> Self {
        let Some(task) = tasks::find(&self.source).filter(|_| !Path::new(&self.source).exists())
        else {
            return self.clone();
        };
        let (task, default) = (task.spec(), Self::default());
        let set = |own: &String, default: &String, task: String| {
            if own == default { task } else { own.clone() }
        };
        Self {
            source: task.source,
            config: self.config.clone().or(task.config),
            revision: self.revision.clone().or(task.revision),
            text: set(&self.text, &default.text, task.text),
            text_pair: self.text_pair.clone().or(task.text_pair),
            label: self.label.clone().or(task.label),
            classes: self.classes.clone().or(task.classes),
            train_split: set(&self.train_split, &default.train_split, task.train_split),
            validation_split: set(
                &self.validation_split,
                &default.validation_split,
                task.validation_split,
            ),
            split_column: self.split_column.clone().or(task.split_column),
        }
    }
}

/// One row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    /// The text, or the first of two.
    pub text: String,
    /// The second text, for tasks on pairs.
    pub pair: Option<String>,
    /// The class, from 0; absent where the row is not labelled.
    pub label: Option<i64>,
}

/// Opens a split.
///
/// The first row is read at once, so that a wrong column, a damaged file or an empty split shows here and not later.
///
/// # Errors
///
/// Whatever keeps the files from being found ([`Error::SplitNotFound`], [`Error::ConfigNeeded`],
/// [`Error::MissingShard`], those of [`Hub`]) or the first row from being read (those of [`Rows`]).
pub fn open(spec: &DatasetSpec, split: &str, hub: &Hub) -> Result<Rows> {
    let spec = spec.resolved();
    let files = split_files(&spec, split, hub)?;
    let columns = Columns {
        text: Some(spec.text.clone()),
        pair: spec.text_pair.clone(),
        label: spec.label.clone(),
        split: spec.split_column.clone(),
    };
    let mut raw = RawRows::new(&spec.source, split, files, columns);
    let first = raw.first()?;

    let classes = match (&spec.label, &spec.classes) {
        (None, _) => None,
        (_, Some(names)) => Some(Classes::named(names.clone())),
        (Some(label), None) => {
            match (read::classes_in_metadata(&raw.files[0], label), &first.row.label) {
                (Some(names), _) => Some(Classes::numbered(names)),
                (None, RawLabel::Text(_)) => Some(values_in_train_split(&spec, hub)?),
                // Numbers may be their own classes; without a label in the first row, the column may hold names.
                (None, _) => match values_in_train_split(&spec, hub) {
                    Err(Error::NoLabels { .. } | Error::ClassesNeeded { .. }) => None,
                    classes => Some(classes?),
                },
            }
        }
    };
    let first = Some(to_example(&spec, classes.as_ref(), first)?);
    Ok(Rows { spec, classes, raw, first, n_read: 0 })
}

/// The classes of a labelled data set, in the order of their numbers.
///
/// Those of the specification, else those a parquet file from the Hub carries, else the values that occur in the train
/// split, by one pass over its labels: names sorted, or whole numbers in their order.
///
/// # Errors
///
/// [`Error::NoLabel`] where the specification names no label column, [`Error::ClassesNeeded`] where there is no train
/// split to look at, and those of [`open`].
pub fn classes(spec: &DatasetSpec, hub: &Hub) -> Result<Vec<String>> {
    let spec = spec.resolved();
    let Some(label) = &spec.label else {
        return Err(Error::NoLabel { source_name: spec.source });
    };
    if let Some(classes) = &spec.classes {
        return Ok(classes.clone());
    }
    let files = train_files(&spec, label, hub)?;
    match read::classes_in_metadata(&files[0], label) {
        Some(classes) => Ok(classes),
        None => Ok(scan_classes(&spec, label, files)?.names),
    }
}

/// Names of the splits that can be opened.
///
/// # Errors
///
/// Those of [`Hub::list_files`], and [`Error::Io`] for a folder that cannot be listed.
pub fn splits(spec: &DatasetSpec, hub: &Hub) -> Result<Vec<String>> {
    let spec = spec.resolved();
    match &spec.split_column {
        Some(column) => {
            let files = split_files(&spec, &spec.train_split, hub)?;
            let columns = Columns { split: Some(column.clone()), ..Columns::default() };
            let mut names = BTreeSet::new();
            for row in RawRows::everything(&spec.source, files, columns) {
                names.extend(row?.row.split);
            }
            Ok(names.into_iter().collect())
        }
        None => Ok(match locate(&spec)? {
            Located::File(path) => vec![files::split_of_file(&path).unwrap_or(spec.train_split)],
            Located::Folder(folder) => {
                files::splits(&files::walk(&folder)?, spec.config.as_deref())
            }
            Located::Hub => {
                let files =
                    hub.list_files(RepoKind::Dataset, &spec.source, spec.revision.as_deref())?;
                files::splits(&files, spec.config.as_deref())
            }
        }),
    }
}

/// The rows of one split, in the order of the files.
///
/// # Errors
///
/// An item is an error for a file that cannot be read ([`Error::Unreadable`]), a column that is absent or of a wrong
/// type, a row without text, and a label outside the classes; each names the file and the row. Nothing follows it.
pub struct Rows {
    spec: DatasetSpec,
    classes: Option<Classes>,
    raw: RawRows,
    first: Option<Example>,
    n_read: usize,
}

impl Rows {
    /// Class names in the order of their numbers, where they are known.
    pub fn classes(&self) -> Option<&[String]> {
        self.classes.as_ref().map(|classes| &classes.names[..])
    }

    /// The files the rows come from.
    pub fn files(&self) -> &[PathBuf] {
        &self.raw.files
    }

    /// The specification in full, a task's name replaced by what it stands for.
    pub fn spec(&self) -> &DatasetSpec {
        &self.spec
    }

    /// Rows given so far.
    pub fn n_read(&self) -> usize {
        self.n_read
    }
}

impl Iterator for Rows {
    type Item = Result<Example>;

    fn next(&mut self) -> Option<Self::Item> {
        let example = match self.first.take() {
            Some(example) => Ok(example),
            None => {
                self.raw.next()?.and_then(|row| to_example(&self.spec, self.classes.as_ref(), row))
            }
        };
        match &example {
            Ok(_) => self.n_read += 1,
            Err(_) => self.raw.stop(),
        }
        Some(example)
    }
}

impl std::fmt::Debug for Rows {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let files = &self.raw.files;
        f.debug_struct("Rows")
            .field("spec", &self.spec)
            .field("files", files)
            .finish_non_exhaustive()
    }
}

/// A row as the file has it, and where it stands.
struct RowAt {
    path: PathBuf,
    number: u64,
    row: RawRow,
}

fn to_example(spec: &DatasetSpec, classes: Option<&Classes>, located: RowAt) -> Result<Example> {
    let RowAt { path, number, row } = located;
    let null =
        |column: &str| Error::NullText { path: path.clone(), column: column.into(), row: number };
    let text = row.text.ok_or_else(|| null(&spec.text))?;
    let pair = match &spec.text_pair {
        Some(column) => Some(row.pair.ok_or_else(|| null(column))?),
        None => None,
    };
    let label = to_class(&row.label, classes).ok_or_else(|| Error::Label {
        path: path.clone(),
        row: number,
        label: row.label.to_string(),
        expected: expected_label(classes),
    })?;
    Ok(Example { text, pair, label })
}

/// The classes, and what a number in the label column says.
#[derive(Debug, Clone)]
struct Classes {
    names: Vec<String>,
    /// The class of each number where the names are numbers themselves; a number else is a place in `names`.
    of_number: Option<HashMap<i64, i64>>,
}

impl Classes {
    /// Numbers are places in `names`.
    fn numbered(names: Vec<String>) -> Self {
        Self { names, of_number: None }
    }

    /// The same, but for `names` that are all whole numbers, which stand for themselves.
    fn named(names: Vec<String>) -> Self {
        let of_number = (0..).zip(&names).map(|(class, name)| Some((name.parse().ok()?, class)));
        let of_number = of_number.collect::<Option<HashMap<i64, i64>>>();
        Self { names, of_number }
    }

    fn of(&self, number: i64) -> Option<i64> {
        match &self.of_number {
            Some(classes) => classes.get(&number).copied(),
            None => (0..self.names.len() as i64).contains(&number).then_some(number),
        }
    }
}

fn expected_label(classes: Option<&Classes>) -> String {
    match classes {
        Some(Classes { names, of_number: None }) => {
            format!("{} (or their numbers from 0, or -1 for none)", list(names))
        }
        Some(Classes { names, .. }) => format!("{} (or -1 for none)", list(names)),
        None => "the whole numbers from 0, or -1 for none".into(),
    }
}

/// The class of a label, or of no label; nothing where the label is neither.
fn to_class(label: &RawLabel, classes: Option<&Classes>) -> Option<Option<i64>> {
    if let (RawLabel::Text(text), Some(classes)) = (label, classes)
        && let Some(class) = classes.names.iter().position(|name| name == text)
    {
        return Some(Some(class as i64));
    }
    match (whole_number(label)?, classes) {
        (-1, _) => Some(None),
        (number, Some(classes)) => classes.of(number).map(Some),
        (number, None) => (number >= 0).then_some(Some(number)),
    }
}

/// The number a label is, -1 where there is no label.
fn whole_number(label: &RawLabel) -> Option<i64> {
    match label {
        RawLabel::None => Some(-1),
        RawLabel::Int(number) => Some(*number),
        RawLabel::Float(number) => whole(*number),
        RawLabel::Text(text) => {
            let text = text.trim();
            text.parse().ok().or_else(|| whole(text.parse().ok()?))
        }
    }
}

fn whole(number: f64) -> Option<i64> {
    (number.fract() == 0. && number.abs() < 9e15).then_some(number as i64)
}

fn values_in_train_split(spec: &DatasetSpec, hub: &Hub) -> Result<Classes> {
    let label = spec.label.as_ref().expect("only asked for where a label column is set");
    scan_classes(spec, label, train_files(spec, label, hub)?)
}

fn train_files(spec: &DatasetSpec, label: &str, hub: &Hub) -> Result<Vec<PathBuf>> {
    split_files(spec, &spec.train_split, hub).map_err(|error| match error {
        Error::SplitNotFound { source_name, split, .. } => {
            Error::ClassesNeeded { source_name, column: label.into(), split }
        }
        other => other,
    })
}

fn scan_classes(spec: &DatasetSpec, label: &str, files: Vec<PathBuf>) -> Result<Classes> {
    let columns = Columns {
        label: Some(label.into()),
        split: spec.split_column.clone(),
        ..Columns::default()
    };
    let (mut names, mut numbers) = (BTreeSet::new(), BTreeSet::new());
    let mut n_examples = 0;
    let mut all_numbers = true;
    let mut outside = None;
    for row in RawRows::new(&spec.source, &spec.train_split, files, columns) {
        let RowAt { path, number, row } = row?;
        n_examples += 1;
        match (whole_number(&row.label), row.label) {
            (_, RawLabel::None) => {}
            (Some(value @ -1..), label) => {
                names.insert(label.to_string());
                if value >= 0 {
                    numbers.insert(value);
                }
            }
            (None, RawLabel::Text(name)) => {
                all_numbers = false;
                names.insert(name);
            }
            // A number that is no class, unless it turns out that the column holds names.
            (_, label) => {
                names.insert(label.to_string());
                outside.get_or_insert((path, number, label.to_string()));
            }
        }
    }
    match (all_numbers, outside) {
        (false, _) => Ok(Classes::numbered(names.into_iter().collect())),
        (true, Some((path, row, label))) => {
            Err(Error::Label { path, row, label, expected: expected_label(None) })
        }
        (true, None) if n_examples == 0 => Err(Error::EmptySplit {
            source_name: spec.source.clone(),
            split: spec.train_split.clone(),
        }),
        (true, None) if numbers.is_empty() => Err(Error::NoLabels { n_examples }),
        (true, None) => Ok(Classes::named(numbers.iter().map(ToString::to_string).collect())),
    }
}

enum Located {
    File(PathBuf),
    Folder(PathBuf),
    Hub,
}

fn locate(spec: &DatasetSpec) -> Result<Located> {
    if spec.source.trim().is_empty() {
        return Err(Error::NoSource {
            known: tasks().iter().map(|task| task.name.into()).collect(),
        });
    }
    let path = Path::new(&spec.source);
    if path.is_dir() {
        Ok(Located::Folder(path.into()))
    } else if path.is_file() {
        Ok(Located::File(path.into()))
    } else if looks_like_path(&spec.source) || files::extension(&spec.source).is_some() {
        Err(Error::NoSuchData { path: spec.source.clone() })
    } else {
        Ok(Located::Hub)
    }
}

/// The files of a split, in order: for data that are no rows of text and label.
///
/// # Errors
///
/// As [`open`], for files that cannot be found.
pub fn files_of(spec: &DatasetSpec, split: &str, hub: &Hub) -> Result<Vec<PathBuf>> {
    split_files(&spec.resolved(), split, hub)
}

fn split_files(spec: &DatasetSpec, split: &str, hub: &Hub) -> Result<Vec<PathBuf>> {
    // With a split column, every file may hold rows of every split.
    let wanted = if spec.split_column.is_some() { None } else { Some(split) };
    let find = |files: &[String]| {
        files::find(&spec.source, files, spec.config.as_deref(), wanted, &spec.train_split)
    };
    match locate(spec)? {
        Located::File(path) => {
            if files::extension(&spec.source).is_none() {
                return Err(Error::FileKind { path });
            }
            let own = files::split_of_file(&path);
            if wanted.is_none() || split == spec.train_split || own.as_deref() == Some(split) {
                return Ok(vec![path]);
            }
            Err(Error::SplitNotFound {
                source_name: spec.source.clone(),
                split: split.into(),
                available: vec![spec.train_split.clone()],
                hint: "\nhint: a file is one split; set `split_column` where a column tells them apart, or name a \
                       folder with one file per split"
                    .into(),
            })
        }
        Located::Folder(folder) => {
            let names = find(&files::walk(&folder)?)?;
            Ok(names.into_iter().map(|name| folder.join(name)).collect())
        }
        Located::Hub => {
            const CONVERTED: &str = "refs/convert/parquet";
            let own = spec.revision.as_deref();
            let list = |revision| hub.list_files(RepoKind::Dataset, &spec.source, revision);
            let (names, revision) = match find(&list(own)?) {
                // A data set made by a script has no rows of its own; the Hub keeps a converted copy beside it.
                Err(Error::SplitNotFound { available, source_name, split, hint })
                    if available.is_empty() && own.is_none() =>
                {
                    let original = Error::SplitNotFound { available, source_name, split, hint };
                    let Ok(converted) = list(Some(CONVERTED)) else { return Err(original) };
                    (find(&converted)?, Some(CONVERTED))
                }
                names => (names?, own),
            };
            names
                .iter()
                .map(|name| hub.file(RepoKind::Dataset, &spec.source, name, revision))
                .collect()
        }
    }
}

/// The rows of several files, one after the other, with those of other splits left out.
struct RawRows {
    source_name: String,
    /// The split to keep, where a column tells.
    split: String,
    files: Vec<PathBuf>,
    waiting: VecDeque<PathBuf>,
    current: Option<(PathBuf, FileRows, u64)>,
    columns: Columns,
    /// Whether rows of other splits are dropped.
    filters: bool,
    /// Other splits met on the way.
    seen: BTreeSet<String>,
}

impl RawRows {
    fn new(source: &str, split: &str, files: Vec<PathBuf>, columns: Columns) -> Self {
        Self {
            source_name: source.into(),
            split: split.into(),
            waiting: files.iter().cloned().collect(),
            files,
            current: None,
            filters: columns.split.is_some(),
            columns,
            seen: BTreeSet::new(),
        }
    }

    fn everything(source: &str, files: Vec<PathBuf>, columns: Columns) -> Self {
        Self { filters: false, ..Self::new(source, "", files, columns) }
    }

    /// The first row, which must exist.
    fn first(&mut self) -> Result<RowAt> {
        if let Some(row) = self.next() {
            return row;
        }
        let (source_name, split) = (self.source_name.clone(), self.split.clone());
        if self.seen.is_empty() {
            return Err(Error::EmptySplit { source_name, split });
        }
        let available = self.seen.iter().cloned().collect();
        Err(Error::SplitNotFound { source_name, split, available, hint: String::new() })
    }

    fn stop(&mut self) {
        self.waiting.clear();
        self.current = None;
    }
}

impl Iterator for RawRows {
    type Item = Result<RowAt>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let (path, rows, number) = match &mut self.current {
                Some(current) => current,
                None => {
                    let path = self.waiting.pop_front()?;
                    match read::open(&path, &self.columns) {
                        Ok(rows) => self.current.insert((path, rows, 0)),
                        Err(error) => {
                            self.stop();
                            return Some(Err(error));
                        }
                    }
                }
            };
            match rows.next() {
                None => self.current = None,
                Some(Err(error)) => {
                    self.stop();
                    return Some(Err(error));
                }
                Some(Ok(row)) => {
                    *number += 1;
                    if self.filters && row.split.as_deref() != Some(&self.split) {
                        if let Some(other) = row.split.filter(|_| self.seen.len() < 100) {
                            self.seen.insert(other);
                        }
                        continue;
                    }
                    return Some(Ok(RowAt { path: path.clone(), number: *number, row }));
                }
            }
        }
    }
}
