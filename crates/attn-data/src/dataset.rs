//! Rows of text.

/// Endings of the files that can be read, the preferred first.
pub(crate) const EXTENSIONS: [&str; 6] = [".parquet", ".jsonl", ".json", ".csv", ".tsv", ".txt"];
