//! Treebanks: sentences in words, and the word that each hangs on.
//!
//! Universal Dependencies as the Hub has them (`universal-dependencies/universal_dependencies`): parquet with the lists
//! `tokens`, `head` (from 1, 0 for the root) and `deprel`, an entry a word. Nivre et al. 2016, "Universal Dependencies v1",
//! <https://aclanthology.org/L16-1262>.

use std::{fs::File, ops::Range, path::Path};

use arrow::{
    array::{Array, AsArray, RecordBatch},
    compute::cast,
    datatypes::DataType,
    error::ArrowError,
};
use parquet::arrow::{ProjectionMask, arrow_reader::ParquetRecordBatchReaderBuilder};

use crate::{
    batch::Encoded,
    dataset::{DatasetSpec, files_of},
    error::{Error, Result},
    guard::{ParquetFile, guarded},
    hub::Hub,
    tokenizer::TextTokenizer,
};

const COLUMNS: [&str; 3] = ["tokens", "head", "deprel"];

/// A sentence, an entry a word.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sentence {
    /// The words.
    pub words: Vec<String>,
    /// The word that each hangs on, from 0; none of the root.
    pub heads: Vec<Option<usize>>,
    /// How it hangs on it: `nsubj`, `obl:tmod`.
    pub relations: Vec<String>,
}

/// A sentence as tokens, each word a run of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tree {
    /// The tokens, special ones included.
    pub row: Encoded,
    /// The tokens of each word, at least one.
    pub words: Vec<Range<usize>>,
    /// As in [`Sentence`].
    pub heads: Vec<Option<usize>>,
    /// As in [`Sentence`].
    pub relations: Vec<String>,
}

/// Reads the first `limit` sentences of a split of the folder, file or Hub id `source`.
///
/// # Errors
///
/// Those of finding the split's files; [`Error::FileKind`] for another format than parquet, [`Error::ColumnMissing`] and
/// [`Error::ColumnType`] for columns that are not as above, [`Error::Tree`] for a sentence that is no tree.
pub fn sentences(
    source: &str,
    split: &str,
    limit: Option<usize>,
    hub: &Hub,
) -> Result<Vec<Sentence>> {
    let spec = DatasetSpec { source: source.to_owned(), ..DatasetSpec::default() };
    let mut found = Vec::new();
    for path in files_of(&spec, split, hub)? {
        if path.extension().is_none_or(|ending| ending != "parquet") {
            return Err(Error::FileKind { path });
        }
        read(&path, limit.unwrap_or(usize::MAX), &mut found)?;
    }
    match found.is_empty() {
        true => Err(Error::EmptySplit { source_name: source.into(), split: split.into() }),
        false => Ok(found),
    }
}

fn read(path: &Path, limit: usize, into: &mut Vec<Sentence>) -> Result<()> {
    let unreadable = |source: crate::Source| Error::Unreadable {
        path: path.into(),
        format: "Parquet",
        row: None,
        source,
    };
    let file = File::open(path).map_err(Error::io("read", path))?;
    let builder = guarded(|| ParquetRecordBatchReaderBuilder::try_new(ParquetFile::new(file)?));
    let builder = builder.map_err(unreadable)?;
    let schema = builder.schema().clone();
    let mut roots = Vec::new();
    for column in COLUMNS {
        let (at, field) = schema.column_with_name(column).ok_or_else(|| Error::ColumnMissing {
            path: path.into(),
            column: column.into(),
            available: schema.fields().iter().map(|field| field.name().clone()).collect(),
        })?;
        let (DataType::List(_) | DataType::LargeList(_)) = field.data_type() else {
            return Err(Error::ColumnType {
                path: path.into(),
                column: column.into(),
                expected: "a list, an entry a word",
                found: field.data_type().to_string(),
            });
        };
        roots.push(at);
    }
    let mask = ProjectionMask::roots(builder.parquet_schema(), roots);
    let mut batches = guarded(|| builder.with_projection(mask).build()).map_err(unreadable)?;
    let mut next = || {
        let Some(batch) = batches.next().transpose()? else { return Ok(None) };
        let [words, heads, relations] = COLUMNS.map(|column| lists(&batch, column));
        Ok::<_, ArrowError>(Some((words?, heads?, relations?)))
    };
    let mut row = 0;
    while let Some((words, heads, relations)) = guarded(&mut next).map_err(unreadable)? {
        for ((words, heads), relations) in words.into_iter().zip(heads).zip(relations) {
            if into.len() == limit {
                return Ok(());
            }
            row += 1;
            let refused = |problem| Error::Tree { path: path.into(), row, problem };
            into.push(tree(words, &heads, relations).map_err(refused)?);
        }
    }
    Ok(())
}

/// The texts of each row's list; none is an empty text.
fn lists(batch: &RecordBatch, column: &str) -> Result<Vec<Vec<String>>, ArrowError> {
    let array = batch.column_by_name(column).expect("looked up before");
    let texts = DataType::new_list(DataType::Utf8, true);
    let array = cast(array, &texts)?;
    let array = array.as_list::<i32>();
    let row = |at: usize| -> Vec<String> {
        if array.is_null(at) {
            return Vec::new();
        }
        let row = array.value(at);
        row.as_string::<i32>().iter().map(|text| text.unwrap_or_default().to_owned()).collect()
    };
    Ok((0..array.len()).map(row).collect())
}

/// The sentence that the lists describe, or what is wrong with it.
fn tree(words: Vec<String>, heads: &[String], relations: Vec<String>) -> Result<Sentence, String> {
    let n = words.len();
    if n == 0 || heads.len() != n || relations.len() != n {
        return Err(format!(
            "has {n} `tokens`, {} `head` and {} `deprel`, expected as many of each, and at least one",
            heads.len(),
            relations.len()
        ));
    }
    if let Some(at) = words.iter().position(|word| word.trim().is_empty()) {
        return Err(format!("has an empty word, `tokens[{at}]`"));
    }
    let head = |(at, text): (usize, &String)| match text.trim().parse::<usize>() {
        Ok(0) => Ok(None),
        Ok(head) if head <= n && head != at + 1 => Ok(Some(head - 1)),
        _ => Err(format!(
            "has `head[{at}]` = `{text}`, expected 0 or the number of another of its {n} words, from 1"
        )),
    };
    let heads = heads.iter().enumerate().map(head).collect::<Result<_, _>>()?;
    Ok(Sentence { words, heads, relations })
}

impl Sentence {
    /// The words with a blank between two, and where each stands in it, in bytes.
    pub fn text(&self) -> (String, Vec<Range<usize>>) {
        let mut text = String::new();
        let mut places = Vec::new();
        for word in &self.words {
            if !text.is_empty() {
                text.push(' ');
            }
            let start = text.len();
            text.push_str(word);
            places.push(start..text.len());
        }
        (text, places)
    }

    /// The sentence as tokens, `number` its number; none where a word is left without a token, as the tokenizer drops its
    /// characters. Which tokens are whose is known by the bytes that they stand for, not searched. A token that stands for
    /// blanks alone is no word's.
    ///
    /// # Errors
    ///
    /// [`Error::Straddles`] for a tokenizer that makes one token of parts of two words; [`Error::Tokenizer`].
    pub fn tokenized(&self, tokenizer: &TextTokenizer, number: usize) -> Result<Option<Tree>> {
        let (text, places) = self.text();
        let (ids, offsets) = tokenizer.offsets(&text, true)?;
        let mut words: Vec<Option<Range<usize>>> = vec![None; self.words.len()];
        for (at, bytes) in offsets.iter().enumerate().filter(|(_, bytes)| !bytes.is_empty()) {
            let overlaps =
                |place: &Range<usize>| place.start < bytes.end && bytes.start < place.end;
            let first = places.partition_point(|place| place.end <= bytes.start);
            let Some(word) = places.get(first).filter(|place| overlaps(place)) else { continue };
            if places.get(first + 1).is_some_and(overlaps) {
                return Err(Error::Straddles {
                    sentence: number,
                    word: text[word.clone()].to_owned(),
                    token: tokenizer.token(ids[at]).unwrap_or_default(),
                });
            }
            match &mut words[first] {
                Some(tokens) => tokens.end = at + 1,
                none => *none = Some(at..at + 1),
            }
        }
        let words: Option<Vec<Range<usize>>> = words.into_iter().collect();
        Ok(words.map(|words| Tree {
            row: Encoded { ids, label: None, index: number, second_from: None },
            words,
            heads: self.heads.clone(),
            relations: self.relations.clone(),
        }))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{ArrayRef, ListBuilder, StringBuilder};
    use parquet::arrow::ArrowWriter;

    use super::*;
    use crate::tokenizer::{Style, train_bpe};

    fn write(path: &Path, columns: [&[&[&str]]; 3]) {
        let list = |rows: &[&[&str]]| -> ArrayRef {
            let mut lists = ListBuilder::new(StringBuilder::new());
            for row in rows {
                row.iter().for_each(|text| lists.values().append_value(text));
                lists.append(true);
            }
            Arc::new(lists.finish())
        };
        let columns = COLUMNS.iter().zip(columns).map(|(name, rows)| (*name, list(rows)));
        let batch = RecordBatch::try_from_iter(columns).unwrap();
        let mut writer =
            ArrowWriter::try_new(File::create(path).unwrap(), batch.schema(), None).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
    }

    fn refused(columns: [&[&[&str]]; 3]) -> String {
        let folder = tempfile::tempdir().unwrap();
        write(&folder.path().join("test.parquet"), columns);
        let source = folder.path().to_str().unwrap();
        sentences(source, "test", None, &Hub::from_env()).unwrap_err().to_string()
    }

    #[test]
    fn sentences_are_read_and_trees_that_are_none_refused() {
        let folder = tempfile::tempdir().unwrap();
        let (words, relations): (&[&str], &[&str]) = (&["cats", "sleep"], &["nsubj", "root"]);
        write(
            &folder.path().join("test.parquet"),
            [&[words, words], &[&["2", "0"], &["0", "1"]], &[relations, relations]],
        );
        let source = folder.path().to_str().unwrap();
        let found = sentences(source, "test", None, &Hub::from_env()).unwrap();
        assert_eq!(found[0].heads, [Some(1), None]);
        assert_eq!(found[1].heads, [None, Some(0)]);
        assert_eq!(found[0].relations, relations);
        assert_eq!(sentences(source, "test", Some(1), &Hub::from_env()).unwrap().len(), 1);
        assert!(sentences(source, "validation", None, &Hub::from_env()).is_err());

        for (heads, problem) in [(["3", "0"], "`head[0]` = `3`"), (["1", "0"], "`head[0]` = `1`")] {
            let error = refused([&[words], &[&heads], &[relations]]);
            assert!(error.contains("row 1") && error.contains(problem), "{error}");
        }
        let error = refused([&[words], &[&["0"]], &[relations]]);
        assert!(error.contains("2 `tokens`, 1 `head`"), "{error}");
    }

    #[test]
    fn each_token_belongs_to_the_word_whose_bytes_it_stands_for() {
        let sentence = Sentence {
            words: ["Cafés", "aren't", "an", "a", "n"].map(str::to_owned).to_vec(),
            heads: vec![None; 5],
            relations: vec![String::new(); 5],
        };
        let (text, places) = sentence.text();
        for style in [Style::ByteLevel, Style::WordPiece] {
            let tokenizer = train_bpe(&["Cafés aren't an a n"], 280, style, None).unwrap();
            let tree = sentence.tokenized(&tokenizer, 3).unwrap().unwrap();
            let (ids, offsets) = tokenizer.offsets(&text, true).unwrap();
            assert_eq!((tree.row.ids, tree.row.index), (ids.clone(), 3));
            // Naively: a token is a word's where they share a byte.
            for (word, place) in tree.words.iter().zip(&places) {
                let shares = |bytes: &Range<usize>| bytes.clone().any(|at| place.contains(&at));
                let own: Vec<usize> = (0..ids.len()).filter(|&at| shares(&offsets[at])).collect();
                assert_eq!(word.clone().collect::<Vec<_>>(), own, "{style:?}");
                assert!(!own.is_empty());
            }
        }
    }
}
