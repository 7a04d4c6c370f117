//! Text, tokenizers and batches of token ids.
//!
//! From a name to numbers: [`hub`] finds and fetches files, [`dataset`] reads rows out of them, [`tokenizer`] turns
//! text into ids, [`batch`] puts ids into rows of one length, and [`select`] says which rows are used. [`prompt`]
//! puts a row as a question to a language model, [`chat`] writes it as a conversation, [`needle`] hides facts in long texts and
//! asks for them; [`wikitext`], [`blimp`] and [`treebank`] know what is particular to these data sets. Nothing here knows a model, a loss
//! or a metric, and nothing links LibTorch: ids and masks come out as plain vectors.
//!
//! ```
//! use attn_data::{
//!     batch::{BatchPlan, Encoded, Side, collate},
//!     dataset::{DatasetSpec, Example, open},
//!     hub::Hub,
//!     tokenizer::{EncodeOptions, Input, Style, train_bpe},
//! };
//!
//! # let folder = tempfile::tempdir()?;
//! # let path = folder.path().join("reviews.csv").to_str().unwrap().to_string();
//! std::fs::write(&path, "text,label\na fine film,1\na dull film,0\na film,-1\n")?;
//! let spec = DatasetSpec { source: path, label: Some("label".into()), ..DatasetSpec::default() };
//! let rows = open(&spec, "train", &Hub::from_env())?.collect::<Result<Vec<Example>, _>>()?;
//!
//! let texts: Vec<&str> = rows.iter().map(|row| row.text.as_str()).collect();
//! let tokenizer = train_bpe(&texts, 300, Style::ByteLevel, None)?;
//! let inputs: Vec<Input> = texts.iter().copied().map(Input::from).collect();
//! let ids = tokenizer.encode(&inputs, &EncodeOptions::default())?.ids;
//!
//! let examples: Vec<Encoded> = (0..)
//!     .zip(ids.into_iter().zip(&rows))
//!     .map(|(index, (ids, row))| Encoded { ids, label: row.label, index, second_from: None })
//!     .collect();
//! let lengths: Vec<usize> = examples.iter().map(|example| example.ids.len()).collect();
//! for rows in BatchPlan::new(2)?.bucketed(&lengths, 0, 0) {
//!     let rows: Vec<&Encoded> = rows.iter().map(|&row| &examples[row]).collect();
//!     let batch = collate(&rows, tokenizer.fill_id(), Side::Right);
//!     assert_eq!(batch.ids.len(), batch.rows * batch.cols);
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod batch;
pub mod blimp;
pub mod chat;
pub mod dataset;
mod error;
mod guard;
pub mod hub;
pub mod needle;
pub mod prompt;
pub mod select;
pub mod tokenizer;
pub mod treebank;
pub mod wikitext;

pub use error::{Error, Result, Source};
