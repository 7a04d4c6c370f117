//! The texts that attention is looked at on: no label is needed, and any model can read them.

use anyhow::{Result, ensure};
use attn_data::{
    batch::Encoded,
    dataset::{DatasetSpec, Example},
    hub::Hub,
    tokenizer::{EncodeOptions, Input, TextTokenizer},
};
use attn_eval::{Batching, Known};

use crate::{
    args::RowArgs,
    task::{Which, dataset},
    texts::{Folder, max_len, read_split},
};

/// Most rows of a split whose tokens are counted, to tell rare ones.
const COUNTED_ROWS: usize = 100_000;

/// Texts as tokens, and what is known of these.
pub(crate) struct Attended<'a> {
    args: &'a RowArgs,
    data: DatasetSpec,
    split: String,
    max_len: usize,
    pub(crate) rows: Vec<Encoded>,
    special: Vec<u32>,
    counts: Vec<u64>,
    /// Rows whose tokens were counted.
    pub(crate) n_counted: usize,
}

impl<'a> Attended<'a> {
    /// Reads the rows that `args` names for the model in `folder`: running text as blocks, other texts one by one, but of
    /// decoders joined unless `--by-text`.
    pub(crate) fn read(folder: &Folder, args: &'a RowArgs, hub: &Hub) -> Result<Self> {
        ensure!(args.batch_size > 0, "`--batch-size` is 0, expected at least 1");
        let data = DatasetSpec { label: None, ..dataset(&args.task, &args.set)? };
        let split = args.split.as_deref().unwrap_or(&data.validation_split).to_owned();
        let max_len = max_len(args.max_len, &folder.config, &folder.tokenizer, "`--max-len`")?;
        // Read once: as many as are counted, of which the first are looked at.
        let n_read = args.limit.map(|limit| match limit {
            0 => 0, // refused there
            limit => limit.max(COUNTED_ROWS),
        });
        let all = read_split(&data, &split, n_read, hub)?.rows;
        let texts = &all[..all.len().min(args.limit.unwrap_or(usize::MAX))];
        let rows = folder.read_texts(texts, args.by_text, max_len, &split)?;
        let counted = &all[..all.len().min(COUNTED_ROWS)];
        let counts = count(&folder.tokenizer, counted)?;
        let special = folder.tokenizer.special_ids();
        let n_counted = counted.len();
        Ok(Self { args, data, split, max_len, rows, special, counts, n_counted })
    }

    pub(crate) fn known(&self) -> Known<'_> {
        Known { special: &self.special, counts: &self.counts }
    }

    pub(crate) fn which(&self) -> Which<'_> {
        Which {
            task: &self.args.task,
            data: &self.data,
            split: &self.split,
            limit: self.args.limit,
            max_len: self.max_len,
        }
    }

    /// How rows share a pass.
    pub(crate) fn batching(&self, folder: &Folder) -> Batching {
        let pad_id = folder.tokenizer.fill_id();
        Batching { batch_size: self.args.batch_size, pad_id, ..Batching::default() }
    }
}

/// How often each token occurs in `rows`.
fn count(tokenizer: &TextTokenizer, rows: &[Example]) -> Result<Vec<u64>> {
    let inputs: Vec<Input<'_>> =
        rows.iter().map(|row| Input { text: &row.text, pair: row.pair.as_deref() }).collect();
    let options = EncodeOptions { add_special_tokens: false, ..EncodeOptions::default() };
    let mut counts = vec![0; tokenizer.vocab_size()];
    for id in tokenizer.encode(&inputs, &options)?.ids.into_iter().flatten() {
        counts[id as usize] += 1;
    }
    Ok(counts)
}
