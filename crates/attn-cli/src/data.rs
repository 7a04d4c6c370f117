//! The rows of a fine-tuning run: which are trained on, which choose the model, which are reported.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use attn_data::{
    dataset::{self, DatasetSpec, Example},
    hub::Hub,
    select::{few_shot, hold_out, hold_out_related},
};

use crate::{
    monitor::grouped,
    scoring::{Asking, Rows, TrainRows, max_prompt_len},
    settings::{Finetune, HoldOutBy, is_nothing},
    texts::{Folder, max_len, no_source, read_split},
};

/// Keeps the rows that are reported on apart from those that choose the model, drawn by the same seed.
pub(crate) const REPORT_STREAM: u64 = 0x7265_706f_7274;

/// Tokenized rows of a run, with their numbers in their split.
pub(crate) struct Data {
    pub(crate) classes: Vec<String>,
    pub(crate) train: TrainRows,
    /// Chooses the model; empty where the last one is taken.
    pub(crate) selection: Rows,
    /// Looked at once before and once after.
    pub(crate) report: Rows,
    /// Their texts, in the same order.
    pub(crate) report_texts: Vec<Example>,
    /// What the reported rows are called.
    pub(crate) report_split: String,
    /// The most frequent class of the rows reported on.
    pub(crate) majority: usize,
    pub(crate) max_len: usize,
}

impl Data {
    pub(crate) fn read(config: &Finetune, folder: &Folder, hub: &Hub) -> Result<Self> {
        let spec = &config.data;
        let asked = config.examples.max_len;
        let max_len = match (&config.prompt, asked) {
            (Some(_), None) => max_prompt_len(folder),
            _ => max_len(asked, &folder.config, &folder.tokenizer, "`examples.max_len`")?,
        };
        let classes = dataset::classes(spec, hub).map_err(|error| {
            let hint = name_column(spec, &error);
            let problem = format!("cannot find the classes of `{}`{hint}", spec.source);
            no_source(error, &spec.source).context(problem)
        })?;
        ensure!(
            classes.len() > 1,
            "`{}` has the classes {classes:?}, expected at least two\nhint: `data.label` names their column; -1 and null \
             mean that a row has no label",
            spec.source
        );
        if spec.classes.is_none() {
            tracing::info!("{} classes: {}", classes.len(), shown(&classes));
        }

        let asking = Asking::new(config.prompt.as_ref(), spec, &classes, &folder.path, max_len)?;

        let train_split = &spec.train_split;
        let rows = read_split(spec, train_split, config.examples.limit, hub)?.rows;
        let mut rest: Vec<usize> =
            (0..rows.len()).filter(|&row| rows[row].label.is_some()).collect();
        if rest.len() < rows.len() {
            tracing::warn!(
                "{} of {} rows of split `{train_split}` have no label and are left out",
                grouped(rows.len() - rest.len()),
                grouped(rows.len())
            );
        }
        let labels = |of: &[usize]| -> Vec<i64> {
            of.iter().map(|&row| rows[row].label.unwrap_or(-1)).collect()
        };
        // Some of `of`, apart from the rest of it.
        let cut = |of: &[usize], part, seed| -> Result<(Vec<usize>, Vec<usize>)> {
            let (kept, held) = match config.examples.hold_out_by {
                HoldOutBy::Row => hold_out(&labels(of), part, seed)?,
                HoldOutBy::Containment => {
                    let texts: Vec<&str> = of.iter().map(|&row| rows[row].text.as_str()).collect();
                    let split = hold_out_related(&texts, &labels(of), part, seed)?;
                    tracing::info!(
                        "held out {} of {} sentences; {} of their phrases are left out of training",
                        grouped(split.held.len()),
                        grouped(split.n_sentences),
                        grouped(split.dropped.len())
                    );
                    (split.rest, split.held)
                }
            };
            Ok((pick(of, &kept), pick(of, &held)))
        };
        let seed = config.train.seed;
        let mut report_from_train = None;
        if let Some(part) = config.examples.report_hold_out {
            let (kept, held) = cut(&rest, part, seed ^ REPORT_STREAM)
                .context("cannot use `examples.report_hold_out`")?;
            warn_of_unused_split(spec, hub);
            report_from_train = Some(held);
            rest = kept;
        }
        let mut selection = Vec::new();
        let train = if let Some(k) = config.examples.few_shot {
            let chosen = few_shot(&labels(&rest), classes.len(), k, seed)
                .context("cannot use `examples.few_shot`")?;
            pick(&rest, &chosen)
        } else if let Some(part) = config.examples.hold_out.filter(|&part| !is_nothing(part)) {
            let (kept, held) = cut(&rest, part, seed).context("cannot use `examples.hold_out`")?;
            selection = held;
            kept
        } else {
            rest
        };
        ensure!(
            !train.is_empty(),
            "split `{train_split}` of `{}` has no labelled row",
            spec.source
        );

        let numbered = |numbers: &[usize]| -> Vec<(usize, &Example)> {
            numbers.iter().map(|&row| (row, &rows[row])).collect()
        };
        let ((report, report_texts), report_split) = match report_from_train {
            Some(numbers) => {
                let texts = numbers.iter().map(|&row| rows[row].clone()).collect();
                (
                    (asking.to_score(folder, &numbered(&numbers), train_split)?, texts),
                    format!("held out of {train_split}"),
                )
            }
            None => {
                (Self::read_report(config, folder, &asking, hub)?, spec.validation_split.clone())
            }
        };
        // Of the rows reported on: no line says one class better than the table's.
        let reported: Vec<i64> =
            report_texts.iter().filter_map(|row: &Example| row.label).collect();
        let majority = majority(&reported, classes.len());
        Ok(Self {
            train: asking.to_train(folder, &numbered(&train), train_split)?,
            selection: asking.to_score(folder, &numbered(&selection), train_split)?,
            report,
            report_texts,
            report_split,
            majority,
            classes,
            max_len,
        })
    }

    fn read_report(
        config: &Finetune,
        folder: &Folder,
        asking: &Asking,
        hub: &Hub,
    ) -> Result<(Rows, Vec<Example>)> {
        let (spec, split) = (&config.data, &config.data.validation_split);
        let split_rows = read_split(spec, split, config.examples.report_limit, hub).map_err(|error| {
            match error.downcast_ref::<attn_data::Error>() {
                Some(attn_data::Error::SplitNotFound { .. }) => error.context(
                    "there is nothing to report on\nhint: set `data.validation_split`, or cut a part off the train \
                     split: --set examples.report_hold_out=0.1"
                ),
                _ => error,
            }
        });
        let rows = split_rows?.rows;
        ensure!(
            rows.iter().all(|row| row.label.is_some()),
            "some rows of split `{split}` have no label, so no accuracy can be reported on it\nhint: set \
             `data.validation_split` to a labelled split"
        );
        let numbered: Vec<(usize, &Example)> = rows.iter().enumerate().collect();
        Ok((asking.to_score(folder, &numbered, split)?, rows))
    }
}

/// A line that says which setting names a column that is not there; empty for other errors.
pub(crate) fn name_column(spec: &DatasetSpec, error: &attn_data::Error) -> String {
    let attn_data::Error::ColumnMissing { column, .. } = error else { return String::new() };
    let settings = [
        ("text", Some(&spec.text)),
        ("text_pair", spec.text_pair.as_ref()),
        ("label", spec.label.as_ref()),
        ("split_column", spec.split_column.as_ref()),
    ];
    let setting = settings.into_iter().find(|(_, name)| *name == Some(column));
    setting.map_or(String::new(), |(key, _)| format!("\nhint: name it: --set data.{key}=COLUMN"))
}

/// The first few of many classes.
fn shown(classes: &[String]) -> String {
    const MOST: usize = 20;
    let names = |classes: &[String]| format!("`{}`", classes.join("`, `"));
    match classes.get(..MOST) {
        Some(first) if classes.len() > MOST => format!("{}, ...", names(first)),
        _ => names(classes),
    }
}

/// Says where rows made to be reported on are passed over.
fn warn_of_unused_split(spec: &DatasetSpec, hub: &Hub) {
    let split = &spec.validation_split;
    // A data set of the Hub is not fetched to find out.
    if Path::new(&spec.source).exists() && dataset::open(spec, split, hub).is_ok() {
        tracing::warn!(
            "`{}` has a split `{split}`, which is not used: `examples.report_hold_out` cuts the rows to report on off \
             `{}`\nhint: --set examples.report_hold_out= reports on `{split}`",
            spec.source,
            spec.train_split
        );
    }
}

fn pick(rows: &[usize], chosen: &[usize]) -> Vec<usize> {
    chosen.iter().map(|&at| rows[at]).collect()
}

/// The most frequent class, the first of several.
fn majority(labels: &[i64], n_classes: usize) -> usize {
    let count = |class: usize| labels.iter().filter(|&&label| label == class as i64).count();
    (0..n_classes).rev().max_by_key(|&class| count(class)).unwrap_or(0)
}
