//! The rows of a task, as a model is scored on them.

use anyhow::{Context, Result, bail, ensure};
use attn_core::{Model, config::Head};
use attn_data::{
    batch::{Encoded, Masking},
    dataset::{DatasetSpec, Example},
    hub::Hub,
    prompt::PromptSpec,
};
use attn_eval::Batching;
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use crate::{
    args::{ComputeArgs, RowArgs},
    config::Written,
    memory::batch,
    scoring::{check_model, max_prompt_len},
    texts::{Folder, Split, encode, max_len, read_split},
};

/// Rows that were read, beside the model that they are for, which is not loaded yet.
pub(crate) struct Task<'a> {
    args: &'a RowArgs,
    pub(crate) folder: Folder,
    pub(crate) data: DatasetSpec,
    pub(crate) split: String,
    pub(crate) texts: Vec<Example>,
    /// The names of the classes by number, where they are known.
    pub(crate) classes: Option<Vec<String>>,
    /// Most tokens of a row.
    pub(crate) max_len: usize,
}

/// Which rows they are, for the files of results.
#[derive(Serialize)]
pub(crate) struct Which<'a> {
    pub(crate) task: &'a str,
    pub(crate) data: &'a DatasetSpec,
    pub(crate) split: &'a str,
    pub(crate) limit: Option<usize>,
    pub(crate) max_len: usize,
}

/// Where the rows of `source` are: what an option names for itself, and `set` more of, as in a config's `[data]`.
pub(crate) fn dataset(source: &str, set: &[String]) -> Result<DatasetSpec> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Settings {
        data: DatasetSpec,
    }
    let source = Table::from_iter([("source".to_owned(), Value::String(source.to_owned()))]);
    let table = Table::from_iter([("data".to_owned(), Value::Table(source))]);
    let Settings { data } = Written::of(table, set)?.parse()?;
    Ok(data.resolved())
}

impl<'a> Task<'a> {
    pub(crate) fn which(&self) -> Which<'_> {
        Which {
            task: &self.args.task,
            data: &self.data,
            split: &self.split,
            limit: self.args.limit,
            max_len: self.max_len,
        }
    }

    /// Reads the rows that `args` names of `data`, for the model `model`, which answers a `prompt` or has classes or
    /// predicts tokens.
    pub(crate) fn open(
        model: &str,
        args: &'a RowArgs,
        data: DatasetSpec,
        prompt: Option<&PromptSpec>,
        compute: &ComputeArgs,
        hub: &Hub,
    ) -> Result<Self> {
        let folder = Folder::open(model, compute.init.is_none(), None, hub)?;
        Self::read(folder, args, data, prompt, hub)
    }

    /// As [`Self::open`], for the model in `folder`.
    pub(crate) fn read(
        folder: Folder,
        args: &'a RowArgs,
        data: DatasetSpec,
        prompt: Option<&PromptSpec>,
        hub: &Hub,
    ) -> Result<Self> {
        ensure!(args.batch_size > 0, "`--batch-size` is 0, expected at least 1");
        let model = folder.name.clone();
        let split = args.split.as_deref().unwrap_or(&data.validation_split).to_owned();
        if prompt.is_some() {
            check_model(&folder.config)
                .with_context(|| format!("cannot use the model `{model}`"))?;
        }
        let found = match prompt {
            Some(_) => read_split(&data, &split, args.limit, hub),
            None => read(&data, &split, args.limit, &folder, hub),
        };
        let mut found = found.map_err(|error| {
            use attn_data::Error::SplitNotFound;
            match error.downcast_ref() {
                Some(SplitNotFound { available, .. })
                    if args.split.is_none() && !available.is_empty() =>
                {
                    let hint = format!("hint: name the split to score: --split {}", available[0]);
                    error.context(format!(
                        "`--split` is not given, and `{split}` is not there\n{hint}"
                    ))
                }
                _ => error,
            }
        })?;
        let is_classifier = matches!(folder.config.head, Head::Classifier { .. });
        // Who names the classes says what their numbers mean.
        let are_named = args.set.iter().any(|pair| pair.trim_start().starts_with("data.classes"));
        if prompt.is_none() && is_classifier && !are_named {
            by_name(&mut found, &folder.config.classes())
                .with_context(|| format!("cannot score `{model}` on split `{split}`"))?;
        }
        let Split { rows: texts, classes } = found;
        ensure!(
            data.label.is_some() || !is_classifier,
            "`{model}` is a classifier, and `data.label` is not set\nhint: name the column of the classes: --set \
             data.label=COLUMN"
        );
        let max_len = match (prompt, args.max_len) {
            (Some(_), None) => max_prompt_len(&folder),
            (_, asked) => max_len(asked, &folder.config, &folder.tokenizer, "`--max-len`")?,
        };
        Ok(Self { args, folder, data, split, texts, classes, max_len })
    }

    /// Loads the model, or makes its weights anew.
    pub(crate) fn load(&self, compute: &ComputeArgs, seed: u64, hub: &Hub) -> Result<Model> {
        self.folder.load(compute, seed, hub)
    }

    /// The most rows and tokens that share a pass.
    pub(crate) fn extent(&self) -> (u64, u64) {
        let batching = self.batching();
        // Texts that are joined are as long as they may be, others perhaps shorter: a token is a byte at least.
        let longest = self
            .texts
            .iter()
            .map(|text| text.text.len() + text.pair.as_ref().map_or(0, String::len))
            .max();
        let bytes = if self.packs() { usize::MAX } else { longest.unwrap_or(0) + 16 };
        let len = self.max_len.min(bytes) as u64;
        let n_rows = if self.packs() { usize::MAX } else { self.texts.len() };
        batch(batching.batch_size, batching.max_tokens, len, n_rows)
    }

    /// How rows share a pass.
    pub(crate) fn batching(&self) -> Batching {
        let pad_id = self.folder.tokenizer.fill_id();
        Batching { batch_size: self.args.batch_size, pad_id, ..Batching::default() }
    }

    /// Each row for a classifier.
    pub(crate) fn labelled(&self, model: &Model) -> Result<Vec<Encoded>> {
        check_classes(self.classes.as_deref(), model)?;
        self.encoded()
    }

    /// Each row by itself, whatever its label.
    pub(crate) fn encoded(&self) -> Result<Vec<Encoded>> {
        let numbered: Vec<(usize, &Example)> = self.texts.iter().enumerate().collect();
        encode(&self.folder.tokenizer, &numbered, self.max_len, &self.split)
    }

    /// Texts as a model of this kind reads them, whether or not their labels are of use.
    pub(crate) fn to_read(&self) -> Result<Vec<Encoded>> {
        match self.data.label.is_some() && !self.packs() {
            true => self.encoded(),
            false => self.unlabelled(),
        }
    }

    /// Whether texts are joined and cut into blocks for a language model.
    pub(crate) fn packs(&self) -> bool {
        self.folder.packs(&self.texts, self.args.by_text)
    }

    /// The texts for a language model.
    pub(crate) fn unlabelled(&self) -> Result<Vec<Encoded>> {
        self.folder.read_texts(&self.texts, self.args.by_text, self.max_len, &self.split)
    }

    /// What is hidden from the model where it is a masked language model. A classifier hears why it is none elsewhere.
    pub(crate) fn masking(&self) -> Result<Option<Masking>> {
        self.folder.masking()
    }
}

/// Reads the split. Where the data does not say what its classes are, they are the model's: no label tells, or labels
/// are numbers, of which some may not occur.
fn read(
    data: &DatasetSpec,
    split: &str,
    limit: Option<usize>,
    folder: &Folder,
    hub: &Hub,
) -> Result<Split> {
    use attn_data::Error::{ClassesNeeded, NoLabels};
    let found = read_split(data, split, limit, hub);
    let of_model = folder.config.classes();
    let is_the_models = match &found {
        Err(error) => matches!(
            error.downcast_ref::<attn_data::Error>(),
            Some(NoLabels { .. } | ClassesNeeded { .. })
        ),
        Ok(Split { classes: None, .. }) => data.label.is_some(),
        Ok(Split { classes: Some(classes), .. }) => {
            data.classes.is_none()
                && *classes != of_model
                && classes.iter().all(|class| class.parse::<u64>().is_ok())
        }
    };
    if is_the_models && !of_model.is_empty() {
        let data = DatasetSpec { classes: Some(of_model), ..data.clone() };
        return read_split(&data, split, limit, hub).context(
            "cannot read the labels as classes of the model, which the data does not name",
        );
    }
    found
}

/// Numbers the labels as the model does, by the names of the classes, which may stand in another order or be fewer.
///
/// Left alone where a side has no names: numbers, or transformers' `LABEL_0`.
fn by_name(found: &mut Split, of_model: &[String]) -> Result<()> {
    let is_no_name =
        |class: &String| class.strip_prefix("LABEL_").unwrap_or(class).parse::<u64>().is_ok();
    let Some(of_data) = &found.classes else { return Ok(()) };
    if of_data.iter().all(is_no_name) || of_model.iter().all(is_no_name) {
        return Ok(());
    }
    let place = |class: &String| {
        of_model.iter().position(|other| other.to_lowercase() == class.to_lowercase())
    };
    let places: Vec<Option<usize>> = of_data.iter().map(place).collect();
    if let Some(unknown) = places.iter().position(Option::is_none) {
        let row = found.rows.iter().position(|row| row.label == Some(unknown as i64));
        let row = row.map_or(String::new(), |row| format!(" (row {row}, counted from 0)"));
        bail!(
            "the data has the class `{}`{row}, and the model's are {of_model:?}\nhint: correct the label, or, where the \
             classes only have other names, name them in the order of the model's: --set 'data.classes=[...]'",
            of_data[unknown]
        );
    }
    for row in &mut found.rows {
        let label = row.label.and_then(|label| places.get(usize::try_from(label).ok()?).copied());
        row.label = label.flatten().map(|place| place as i64);
    }
    found.classes = Some(of_model.to_vec());
    Ok(())
}

/// Refuses a model whose classes stand in another order than the data's: every number would be wrong.
fn check_classes(of_data: Option<&[String]>, model: &Model) -> Result<()> {
    let (Some(of_data), Head::Classifier { .. }) = (of_data, model.config().head) else {
        return Ok(());
    };
    // Classes that have numbers alone say nothing about their order.
    if of_data.iter().all(|class| class.parse::<u32>().is_ok()) {
        return Ok(());
    }
    let of_model = model.config().classes();
    let lower = |names: &[String]| names.iter().map(|name| name.to_lowercase()).collect::<Vec<_>>();
    let (a, b) = (lower(of_data), lower(&of_model));
    if a == b {
        return Ok(());
    }
    let sorted = |names: &[String]| {
        let mut names = names.to_vec();
        names.sort();
        names
    };
    if sorted(&a) == sorted(&b) {
        bail!(
            "the model's classes are {of_model:?}, and the data's {of_data:?}: the same in another order\nhint: name \
             the data's classes in the order of their numbers: --set 'data.classes=[...]'"
        );
    }
    tracing::warn!(
        "the model's classes are {of_model:?}, the data's {of_data:?}; they are compared by number"
    );
    Ok(())
}
