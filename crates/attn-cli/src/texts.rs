//! Models with their tokenizers, and text made into what they take.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use attn_core::{
    Config, LoadOptions, Model, WantedHead, checkpoint::read_json, config::Head, lora::ADAPTER_FILE,
};
use attn_data::{
    Error as DataError,
    batch::{Encoded, Masking},
    dataset::{self, DatasetSpec, Example, tasks},
    hub::{Hub, resolve_config, resolve_model},
    tokenizer::{EncodeOptions, Input, TextTokenizer},
};

use serde::Serialize;
use serde_json::Value;
use tch::Kind;

use crate::{
    args::{ComputeArgs, Init},
    config::find_path,
    data::name_column,
    monitor::grouped,
};

/// The share of tokens that is hidden from a masked language model.
const MASK_RATE: f64 = 0.15;

/// Rows of a text that is streamed that are in memory at a time.
const ROWS_AT_ONCE: usize = 1024;

/// The most tokens of a text where nothing says otherwise.
const USUAL_MAX_LEN: usize = 512;

/// A model folder, looked at but not loaded.
pub(crate) struct Folder {
    /// What the user called it.
    pub(crate) name: String,
    pub(crate) path: PathBuf,
    pub(crate) config: Config,
    pub(crate) tokenizer: TextTokenizer,
}

impl Folder {
    /// Finds the folder `name`, on disk or on the Hub (there with its weights only if `weights`), and checks that its
    /// tokenizer is the model's.
    pub(crate) fn open(
        name: &str,
        weights: bool,
        revision: Option<&str>,
        hub: &Hub,
    ) -> Result<Self> {
        let open = || -> Result<Self> {
            let path = find_folder(name, weights, revision, hub)?;
            let config = Config::from_json(read_json(&path, "config.json")?)?;
            let tokenizer = TextTokenizer::from_folder(&path)?;
            check_vocabulary(&tokenizer, config.sizes.vocab_size)?;
            Ok(Self { name: name.to_owned(), path, config, tokenizer })
        };
        open().with_context(|| format!("cannot use the model `{name}`"))
    }
}

impl Folder {
    /// Loads the model, or makes its weights anew, as `compute` says.
    pub(crate) fn load(&self, compute: &ComputeArgs, seed: u64, hub: &Hub) -> Result<Model> {
        let device = compute.device()?;
        let options =
            LoadOptions { kind: compute.dtype.into(), device, seed, ..LoadOptions::default() };
        load_model(&self.path, compute.init, &options, hub)
            .with_context(|| format!("cannot load the model `{}`", self.name))
    }

    /// Texts for a model of attention to them: running text as blocks, other texts one by one, but those of decoders joined
    /// unless `by_text`.
    pub(crate) fn read_texts(
        &self,
        texts: &[Example],
        by_text: bool,
        max_len: usize,
        split: &str,
    ) -> Result<Vec<Encoded>> {
        match (self.packs(texts, by_text), self.config.is_causal()) {
            (false, _) => {
                let numbered: Vec<(usize, &Example)> = texts
                    .iter()
                    .enumerate()
                    .filter(|(_, row)| !row.text.trim().is_empty())
                    .collect();
                encode(&self.tokenizer, &numbered, max_len, split)
            }
            (true, true) => blocks(&self.tokenizer, texts, max_len),
            (true, false) => framed_blocks(&self.tokenizer, texts, max_len),
        }
    }

    /// As [`Self::read_texts`] of a split, or its first `limit` rows, of which a few at a time are in memory: hands `each` what a pass
    /// takes. The first of them say whether the text is running.
    pub(crate) fn stream_texts(
        &self,
        (spec, split, limit): (&DatasetSpec, &str, Option<usize>),
        by_text: bool,
        max_len: usize,
        hub: &Hub,
        each: &mut dyn FnMut(Encoded),
    ) -> Result<()> {
        let mut joined: Option<Joined<'_>> = None;
        let mut cut = Cut::default();
        for_each_rows(spec, split, limit, hub, &mut |first, rows| {
            if joined.is_none() && self.packs(rows, by_text) {
                joined = Some(match self.config.is_causal() {
                    true => Joined::new(&self.tokenizer, is_running(rows), max_len)?,
                    false => Joined::framed(&self.tokenizer, max_len)?,
                });
            }
            if let Some(joined) = &mut joined {
                return joined.add(rows, each);
            }
            let numbered: Vec<(usize, &Example)> =
                (first..).zip(rows).filter(|(_, row)| !row.text.trim().is_empty()).collect();
            let (encoded, found) = encode_counting(&self.tokenizer, &numbered, max_len, split)?;
            cut.add(&found);
            encoded.into_iter().for_each(&mut *each);
            Ok(())
        })?;
        cut.say(max_len, split);
        joined.map_or(Ok(()), |joined| joined.finish(each))
    }

    /// What is hidden from the model where it is a masked language model.
    pub(crate) fn masking(&self) -> Result<Option<Masking>> {
        let is_masked = !self.config.is_causal() && self.config.head == Head::LanguageModel;
        let make = || masking(&self.tokenizer, self.config.sizes.vocab_size, MASK_RATE);
        is_masked.then(make).transpose()
    }

    /// Whether [`Self::read_texts`] joins texts and cuts them into blocks.
    pub(crate) fn packs(&self, texts: &[Example], by_text: bool) -> bool {
        !by_text && (self.config.is_causal() || is_running(texts))
    }

    /// The commit of a folder in the Hub's cache.
    pub(crate) fn commit(&self) -> Option<String> {
        let is_snapshot = self.path.parent()?.file_name()? == "snapshots";
        is_snapshot
            .then(|| self.path.file_name().map(|name| name.to_string_lossy().into_owned()))?
    }
}

/// Loads the model in `path`, or makes its weights anew where `init` says so. An adapter is merged into its base model.
pub(crate) fn load_model(
    path: &Path,
    init: Option<Init>,
    options: &LoadOptions,
    hub: &Hub,
) -> Result<Model> {
    let config = || -> Result<Config> { Ok(Config::from_json(read_json(path, "config.json")?)?) };
    if init == Some(Init::Random) {
        return Ok(Model::init(config()?, options)?);
    }
    if !is_adapter(path) {
        return Ok(Model::load(path, options)?.0);
    }
    let adapter = read_json(path, ADAPTER_FILE)?;
    let Some(base) = adapter.get("base_model_name_or_path").and_then(Value::as_str) else {
        bail!(
            "`{ADAPTER_FILE}` names no `base_model_name_or_path`\nhint: write the base model's folder or Hub id there"
        );
    };
    let load = || -> Result<Model> {
        let base_path = find_folder(&find_base(base, path), true, None, hub).with_context(|| {
            format!(
                "it was looked for as seen from the working directory, from the folders above `{}`, and on the \
                 Hub\nhint: write where it is, or its Hub id, into `{ADAPTER_FILE}` as `base_model_name_or_path`",
                path.display()
            )
        })?;
        // The head it was trained with takes the place of the base model's.
        let config = config()?;
        let head = match config.head {
            Head::Classifier { .. } => WantedHead::NewClassifier(config.classes()),
            _ => WantedHead::AsSaved,
        };
        // Its base is told from others, and it is added up, in f32.
        let kind = match options.kind {
            Kind::Half | Kind::BFloat16 => Kind::Float,
            other => other,
        };
        let with_head = LoadOptions { head, kind, ..options.clone() };
        let (mut model, report) = Model::load(&base_path, &with_head)?;
        let held = model.load_adapter(path)?;
        // A head made anew that the adapter does not bring is nobody's.
        if let Some(name) = report.fresh.iter().find(|name| !held.contains(name)) {
            let of_base = Config::from_json(read_json(&base_path, "config.json")?)?;
            ensure!(
                of_base.head == config.head,
                "the adapter holds no `{name}`, and the base model ends in another head\nhint: save the adapter with the \
                 modules it was trained with (`modules_to_save`)"
            );
            // Trained beside the base model's own head.
            (model, _) = Model::load(&base_path, &LoadOptions { kind, ..options.clone() })?;
            model.load_adapter(path)?;
        }
        model.merge_lora()?;
        if kind != options.kind {
            model.to_kind(options.kind);
        }
        tracing::info!("adapter `{}` merged into `{base}`", path.display());
        Ok(model)
    };
    load().with_context(|| format!("cannot put the adapter beside its base model `{base}`"))
}

/// The base model of the adapter in `dir`, as `find_path` finds what a config names: as seen from here, else from one
/// of the folders above the adapter, the nearest first. What is in none may be a Hub id and stays as it is.
fn find_base(name: &str, dir: &Path) -> String {
    let dir = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
    let mut found = dir.ancestors().skip(1).map(|above| find_path(name, Some(above)));
    found.find(|path| Path::new(path).exists()).unwrap_or_else(|| name.to_owned())
}

/// Whether a folder holds an adapter in place of a whole model.
pub(crate) fn is_adapter(path: &Path) -> bool {
    path.join(ADAPTER_FILE).exists()
}

/// Finds a model folder, on disk or on the Hub, there with its weights only if `weights`.
pub(crate) fn find_folder(
    name: &str,
    weights: bool,
    revision: Option<&str>,
    hub: &Hub,
) -> Result<PathBuf> {
    let resolve = if weights { resolve_model } else { resolve_config };
    let path = resolve(hub, name, revision)
        .map_err(|error| neither(error, "folder", "model", name, ""))?;
    if path.join("config.json").exists() {
        return Ok(path);
    }
    ensure!(
        !is_adapter(&path),
        "the folder holds an adapter and no `config.json`\nhint: copy the base model's config.json and tokenizer.json \
         beside it, with the classes that it was trained for"
    );
    for (what, inner) in [("model", path.join("model")), ("adapter", path.join("adapter"))] {
        ensure!(
            !inner.join("config.json").exists(),
            "the folder is that of a run\nhint: the {what} is in `{}`",
            inner.display()
        );
    }
    bail!(
        "the folder has no `config.json`, so it is not a model's\nhint: a model folder holds config.json, \
         model.safetensors and tokenizer.json"
    )
}

/// Says of a name that nothing answers to that it is neither on disk nor on the Hub.
fn neither(error: DataError, on_disk: &str, kind: &str, name: &str, hint: &str) -> anyhow::Error {
    let there = |place: &str| {
        format!("there is neither a {on_disk} `{name}` nor a {kind} of that id {place}{hint}")
    };
    let problem = match &error {
        DataError::RepoNotFound { .. } | DataError::RepoId { .. } => there("on the Hub"),
        // Where another file is not cached, the repository is.
        DataError::NotCached { file, .. }
            if ["its list of files", "config.json"].contains(&&file[..]) =>
        {
            there("in the Hub's cache")
        }
        DataError::Unreachable { .. } => format!(
            "there is no {on_disk} `{name}`, and the Hub cannot be asked for a {kind} of that id{hint}"
        ),
        _ => return error.into(),
    };
    anyhow::Error::from(error).context(problem)
}

/// As [`neither`] of a data source, with the task that may have been meant.
pub(crate) fn no_source(error: DataError, source: &str) -> anyhow::Error {
    let hint = match nearest_task(source) {
        Some(task) => format!("\nhint: did you mean the task `{task}`?"),
        None => String::new(),
    };
    neither(error, "file or folder", "data set", source, &hint)
}

/// The task that a mistyped name comes nearest to, punctuation and case apart.
fn nearest_task(name: &str) -> Option<&'static str> {
    let plain = |name: &str| -> String {
        name.chars().filter(|c| c.is_alphanumeric()).flat_map(char::to_lowercase).collect()
    };
    let name = plain(name);
    let distance = |task: &str| strsim::damerau_levenshtein(&name, &plain(task));
    let nearest = tasks().iter().map(|task| (distance(task.name), task.name)).min()?;
    (nearest.0 <= name.len() / 3).then_some(nearest.1)
}

/// The tokenizer of a folder or Hub repository that need not hold weights.
pub(crate) fn open_tokenizer(name: &str, hub: &Hub) -> Result<TextTokenizer> {
    let open = || -> Result<_> { Ok(TextTokenizer::from_folder(find_tokenizer(name, hub)?)?) };
    open().with_context(|| format!("cannot use the tokenizer `{name}`"))
}

/// The folder of a tokenizer, which may be all that it holds.
fn find_tokenizer(name: &str, hub: &Hub) -> Result<PathBuf> {
    match Path::new(name).join("tokenizer.json").exists() {
        true => Ok(name.into()),
        false => find_folder(name, false, None, hub),
    }
}

pub(crate) fn check_vocabulary(tokenizer: &TextTokenizer, vocab_size: i64) -> Result<()> {
    let n_ids = tokenizer.vocab_size();
    ensure!(
        n_ids as i64 <= vocab_size,
        "the tokenizer has ids up to {}, and the model's `vocab_size` is {vocab_size}\nhint: the tokenizer must be \
         the one the model was trained with",
        n_ids - 1
    );
    Ok(())
}

/// Refuses two models whose predictions cannot be compared: of other tokens, of another kind.
pub(crate) fn same_tokens(folder: &Folder, baseline: &Folder) -> Result<()> {
    let sides = |of: &Folder| (of.config.head, of.config.is_causal(), of.config.sizes.vocab_size);
    ensure!(
        sides(folder) == sides(baseline),
        "`{}` is a {} with {} and a vocabulary of {}, the baseline `{}` a {} with {} and one of {}: they do not predict \
         the same\nhint: name the model that this one was made of",
        folder.name,
        folder.config.base_model_type(),
        folder.config.head,
        folder.config.sizes.vocab_size,
        baseline.name,
        baseline.config.base_model_type(),
        baseline.config.head,
        baseline.config.sizes.vocab_size
    );
    read_alike(folder, baseline, "name the model that this one was made of")
}

/// Refuses two models whose tokenizers read a text as other tokens, with that hint.
pub(crate) fn read_alike(one: &Folder, other: &Folder, hint: &str) -> Result<()> {
    let text = "The 3 quick brown foxes, née Øystein, jumped over 1,024 lazy dogs.\n";
    let [own, others] = [one, other].map(|of| of.tokenizer.ids(text, true));
    ensure!(
        own? == others?,
        "`{}` and `{}` read the same text as other tokens\nhint: {hint}",
        one.name,
        other.name
    );
    Ok(())
}

/// The most tokens a text may have: as asked for, else what model and tokenizer allow.
pub(crate) fn max_len(
    asked: Option<usize>,
    config: &Config,
    tokenizer: &TextTokenizer,
    setting: &str,
) -> Result<usize> {
    let positions = config.sizes.max_positions.max(1) as usize;
    match asked {
        None => Ok(USUAL_MAX_LEN.min(positions).min(tokenizer.max_length().unwrap_or(usize::MAX))),
        Some(asked) if asked > positions => {
            ensure!(
                config.sizes.position_table.is_none(),
                "{setting} is {asked}, and the model has {positions} positions\nhint: set it to {positions} at most"
            );
            tracing::warn!(
                "{setting} is {asked}, and the model was trained on {positions} positions: expect it to get worse \
                 beyond them"
            );
            Ok(asked)
        }
        Some(asked) => Ok(asked),
    }
}

/// Rows of a split in memory.
pub(crate) struct Split {
    pub(crate) rows: Vec<Example>,
    /// The names of the classes by number, where they are known.
    pub(crate) classes: Option<Vec<String>>,
}

/// Reads a split, or its first `limit` rows.
pub(crate) fn read_split(
    spec: &DatasetSpec,
    split: &str,
    limit: Option<usize>,
    hub: &Hub,
) -> Result<Split> {
    leaves_something(limit, split)?;
    let read = || -> attn_data::Result<Split> {
        let rows = dataset::open(spec, split, hub)?;
        let classes = rows.classes().map(<[String]>::to_vec);
        let rows = rows.take(limit.unwrap_or(usize::MAX)).collect::<attn_data::Result<_>>()?;
        Ok(Split { rows, classes })
    };
    read().map_err(|error| unread(error, spec, split))
}

/// Reads a split, or its first `limit` rows, and hands `each` a stretch of them at a time, with the number of the first.
fn for_each_rows(
    spec: &DatasetSpec,
    split: &str,
    limit: Option<usize>,
    hub: &Hub,
    each: &mut dyn FnMut(usize, &[Example]) -> Result<()>,
) -> Result<()> {
    leaves_something(limit, split)?;
    let opened = dataset::open(spec, split, hub).map_err(|error| unread(error, spec, split))?;
    let mut rows = opened.take(limit.unwrap_or(usize::MAX));
    let mut n_rows = 0;
    loop {
        let stretch: attn_data::Result<Vec<Example>> = rows.by_ref().take(ROWS_AT_ONCE).collect();
        let stretch = stretch.map_err(|error| unread(error, spec, split))?;
        if stretch.is_empty() {
            return Ok(());
        }
        each(n_rows, &stretch)?;
        n_rows += stretch.len();
    }
}

fn leaves_something(limit: Option<usize>, split: &str) -> Result<()> {
    ensure!(limit != Some(0), "a limit of 0 rows leaves nothing of split `{split}`");
    Ok(())
}

fn unread(error: DataError, spec: &DatasetSpec, split: &str) -> anyhow::Error {
    let hint = name_column(spec, &error);
    let problem = format!("cannot read split `{split}` of `{}`{hint}", spec.source);
    no_source(error, &spec.source).context(problem)
}

/// Tokenizes rows of the split `split`, numbered by `numbers`, and says how many were cut.
pub(crate) fn encode(
    tokenizer: &TextTokenizer,
    rows: &[(usize, &Example)],
    max_len: usize,
    split: &str,
) -> Result<Vec<Encoded>> {
    let (encoded, cut) = encode_counting(tokenizer, rows, max_len, split)?;
    cut.say(max_len, split);
    Ok(encoded)
}

/// As [`encode`], which leaves it to the caller to say how many were cut.
fn encode_counting(
    tokenizer: &TextTokenizer,
    rows: &[(usize, &Example)],
    max_len: usize,
    split: &str,
) -> Result<(Vec<Encoded>, Cut)> {
    let inputs: Vec<Input<'_>> =
        rows.iter().map(|(_, row)| Input { text: &row.text, pair: row.pair.as_deref() }).collect();
    let options = EncodeOptions { max_len: Some(max_len), ..EncodeOptions::default() };
    let encodings = tokenizer
        .encode(&inputs, &options)
        .with_context(|| format!("cannot tokenize split `{split}`"))?;
    let cut = Cut { n_cut: encodings.n_truncated, n_rows: rows.len(), longest: encodings.longest };
    let encoded = rows.iter().zip(encodings.ids.into_iter().zip(encodings.second_from));
    let encoded = encoded
        .map(|((index, row), (ids, second_from))| {
            ensure!(
                !ids.is_empty(),
                "row {index} of split `{split}` (counted from 0) has no tokens\nhint: remove the row: there is nothing \
                 to go by"
            );
            Ok(Encoded { ids, label: row.label, index: *index, second_from })
        })
        .collect::<Result<_>>()?;
    Ok((encoded, cut))
}

/// How many of how many texts had more tokens than they may, and how many the longest has.
#[derive(Clone, Copy, Default)]
pub(crate) struct Cut {
    pub(crate) n_cut: usize,
    pub(crate) n_rows: usize,
    pub(crate) longest: usize,
}

impl Cut {
    fn add(&mut self, other: &Self) {
        self.n_cut += other.n_cut;
        self.n_rows += other.n_rows;
        self.longest = self.longest.max(other.longest);
    }

    pub(crate) fn say(self, max_len: usize, split: &str) {
        let Self { n_cut, n_rows, longest } = self;
        if n_cut > 0 {
            tracing::warn!(
                "{} of {} texts of split `{split}` were cut to {max_len} tokens; the longest has {longest}",
                grouped(n_cut),
                grouped(n_rows)
            );
        }
    }
}

/// Joins texts and cuts them into blocks of `block` tokens, the last one shorter, for causal language models.
///
/// Rows that end in a line break, as WikiText's, are lines of one running text and are joined as they are. Other rows
/// are texts of their own, set apart by what the tokenizer puts around each; where that is nothing, by its end-of-text
/// token; where it has none, by a line break.
pub(crate) fn blocks(
    tokenizer: &TextTokenizer,
    rows: &[Example],
    block: usize,
) -> Result<Vec<Encoded>> {
    Joined::new(tokenizer, is_running(rows), block)?.all(rows)
}

/// Whether rows are lines of one running text, as WikiText's, which end in a line break.
pub(crate) fn is_running(rows: &[Example]) -> bool {
    rows.iter().all(|row| row.text.is_empty() || row.text.ends_with('\n'))
}

/// Cuts lines of one running text into blocks of `block` tokens, the last one shorter, for masked language models: what
/// the tokenizer puts around a text stands around each block, and counts.
pub(crate) fn framed_blocks(
    tokenizer: &TextTokenizer,
    rows: &[Example],
    block: usize,
) -> Result<Vec<Encoded>> {
    Joined::framed(tokenizer, block)?.all(rows)
}

/// Texts joined and cut into blocks as they come.
struct Joined<'a> {
    tokenizer: &'a TextTokenizer,
    /// Whether each text is given what the tokenizer puts around one.
    is_set_apart: bool,
    /// What a text without words becomes: it is left out.
    nothing: Vec<u32>,
    /// What stands behind each text.
    between: Vec<u32>,
    /// What stands before and behind each block.
    frame: [Vec<u32>; 2],
    /// Tokens of a block in its frame, and how many the last one must have.
    block: usize,
    least: usize,
    /// Tokens that make no block yet.
    left: Vec<u32>,
    n_blocks: usize,
}

impl<'a> Joined<'a> {
    /// As [`blocks`].
    fn new(tokenizer: &'a TextTokenizer, is_running: bool, block: usize) -> Result<Self> {
        ensure!(
            block >= 2,
            "a block of {block} token(s) has nothing to predict\nhint: expected at least 2"
        );
        let nothing = tokenizer.ids("", !is_running)?;
        let between = match tokenizer.eos_id() {
            _ if is_running || !nothing.is_empty() => Vec::new(),
            Some(eos) => vec![eos],
            None => tokenizer.ids("\n", false)?,
        };
        Ok(Self {
            tokenizer,
            is_set_apart: !is_running,
            nothing,
            between,
            frame: [Vec::new(), Vec::new()],
            block,
            least: 2,
            left: Vec::new(),
            n_blocks: 0,
        })
    }

    /// As [`framed_blocks`].
    fn framed(tokenizer: &'a TextTokenizer, block: usize) -> Result<Self> {
        let frame = tokenizer.ids("", true)?;
        let around_one = tokenizer.ids("a", true)?;
        let n_before = frame.iter().zip(&around_one).take_while(|(a, b)| a == b).count();
        ensure!(
            block > frame.len(),
            "a block of {block} token(s) has no room for text beside {} special ones",
            frame.len()
        );
        let (before, behind) = frame.split_at(n_before);
        Ok(Self {
            tokenizer,
            is_set_apart: false,
            nothing: Vec::new(),
            between: Vec::new(),
            frame: [before.to_vec(), behind.to_vec()],
            block: block - frame.len(),
            least: 1,
            left: Vec::new(),
            n_blocks: 0,
        })
    }

    /// Hands `each` the blocks that these texts fill.
    fn add(&mut self, rows: &[Example], each: &mut dyn FnMut(Encoded)) -> Result<()> {
        let inputs: Vec<Input<'_>> = rows.iter().map(|row| row.text.as_str().into()).collect();
        let options =
            EncodeOptions { add_special_tokens: self.is_set_apart, ..EncodeOptions::default() };
        let texts = self.tokenizer.encode(&inputs, &options).context("cannot tokenize")?;
        for ids in texts.ids.iter().filter(|ids| **ids != self.nothing) {
            self.left.extend_from_slice(ids);
            self.left.extend_from_slice(&self.between);
        }
        let left = std::mem::take(&mut self.left);
        let full = left.chunks_exact(self.block);
        self.left = full.remainder().to_vec();
        full.for_each(|ids| each(self.cut(ids)));
        Ok(())
    }

    /// Hands `each` the last block.
    fn finish(mut self, each: &mut dyn FnMut(Encoded)) -> Result<()> {
        let ids = std::mem::take(&mut self.left);
        if ids.len() >= self.least {
            each(self.cut(&ids));
        }
        ensure!(
            self.n_blocks > 0,
            "the text has no {}",
            if self.least == 1 { "tokens" } else { "two tokens" }
        );
        Ok(())
    }

    fn cut(&mut self, ids: &[u32]) -> Encoded {
        let [before, behind] = &self.frame;
        let ids = [before, ids, behind].concat();
        self.n_blocks += 1;
        Encoded { ids, label: None, index: self.n_blocks - 1, second_from: None }
    }

    fn all(mut self, rows: &[Example]) -> Result<Vec<Encoded>> {
        let mut blocks = Vec::new();
        let mut each = |block| blocks.push(block);
        self.add(rows, &mut each)?;
        self.finish(&mut each)?;
        Ok(blocks)
    }
}

/// What is hidden for a masked language model with this tokenizer.
pub(crate) fn masking(tokenizer: &TextTokenizer, vocab_size: i64, rate: f64) -> Result<Masking> {
    let Some(mask_id) = tokenizer.mask_id() else {
        bail!(
            "the tokenizer has no mask token, so it was not made for masked language models\nhint: a decoder is \
             trained and scored on the next token"
        );
    };
    // The model may have rows beyond the tokenizer's ids: they stand for nothing.
    let vocab_size = tokenizer.vocab_size().min(vocab_size as usize);
    Ok(Masking { mask_id, vocab_size, special: tokenizer.special_ids(), rate })
}

/// A prediction beside what it is of.
#[derive(Debug, Serialize)]
pub(crate) struct PredictionOf<'a, P> {
    #[serde(flatten)]
    prediction: &'a P,
    text: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pair: Option<&'a str>,
}

/// Puts `predictions` beside their `rows`, which stand in the same order.
pub(crate) fn with_texts<'a, P>(
    predictions: &'a [P],
    rows: &'a [Example],
) -> Vec<PredictionOf<'a, P>> {
    let of = |(prediction, row): (&'a P, &'a Example)| PredictionOf {
        prediction,
        text: &row.text,
        pair: row.pair.as_deref(),
    };
    predictions.iter().zip(rows).map(of).collect()
}

/// Names the padding token in the config of a decoder, as transformers' classifiers need one to find the last real
/// token of a row.
pub(crate) fn name_padding(model: &mut Model, tokenizer: &TextTokenizer) {
    if !model.config().is_causal() || model.config().pad_token_id().is_some() {
        return;
    }
    let (id, why) = match (tokenizer.pad_id(), tokenizer.eos_id()) {
        (Some(pad), _) => (pad, "the tokenizer's padding token"),
        (None, Some(eos)) => (eos, "the end-of-text token, as the tokenizer has no padding token"),
        // [`Model::save`] then looks at the config, and says what it finds.
        (None, None) => return,
    };
    tracing::info!("the config names no padding token; it now names {id}, {why}");
    model.config_mut().set_pad_token_id(id.into());
}

#[cfg(test)]
mod tests {
    use attn_data::tokenizer::{Style, train_bpe};

    use super::*;

    fn stream(style: Style, texts: &[&str], block: usize) -> (TextTokenizer, Vec<Vec<u32>>) {
        let tokenizer = train_bpe(&["a b c a b c"], 300, style, None).unwrap();
        let row = |text: &&str| Example { text: (*text).to_owned(), pair: None, label: None };
        let rows: Vec<Example> = texts.iter().map(row).collect();
        let blocks = blocks(&tokenizer, &rows, block).unwrap();
        assert!(blocks.iter().enumerate().all(|(i, row)| row.index == i && row.label.is_none()));
        (tokenizer, blocks.into_iter().map(|row| row.ids).collect())
    }

    #[test]
    fn texts_are_set_apart_and_lines_of_running_text_are_not() {
        let (tokenizer, blocks) = stream(Style::ByteLevel, &["a b", "", "c"], 100);
        let eos = tokenizer.eos_id().unwrap();
        let [ab, c] = ["a b", "c"].map(|text| tokenizer.ids(text, false).unwrap());
        assert_eq!(blocks, [[ab, vec![eos], c, vec![eos]].concat()]);

        let (tokenizer, blocks) = stream(Style::ByteLevel, &["a b\n", "", "c\n"], 100);
        assert_eq!(blocks.concat(), tokenizer.ids("a b\nc\n", false).unwrap());

        let (tokenizer, blocks) = stream(Style::WordPiece, &["a b", "", "c"], 100);
        let [ab, c] = ["a b", "c"].map(|text| tokenizer.ids(text, true).unwrap());
        assert_eq!(blocks, [[ab, c].concat()], "what stands around a text sets it apart");
    }

    #[test]
    fn framed_blocks_hold_the_text_once_and_in_order() {
        let texts = ["a b c\n", "", "c a\n"];
        let tokenizer = train_bpe(&["a b c a b c"], 300, Style::WordPiece, None).unwrap();
        let row = |text: &&str| Example { text: (*text).to_owned(), pair: None, label: None };
        let rows: Vec<Example> = texts.iter().map(row).collect();
        assert!(is_running(&rows));

        let framed = framed_blocks(&tokenizer, &rows, 4).unwrap();

        let ends = tokenizer.ids("", true).unwrap();
        let text = tokenizer.ids("a b c c a", false).unwrap();
        assert_eq!(framed.len(), 3);
        for (index, row) in framed.iter().enumerate() {
            let part = &text[2 * index..text.len().min(2 * index + 2)];
            assert_eq!(row.ids, [&ends[..1], part, &ends[1..]].concat());
            assert_eq!((row.index, row.label), (index, None));
        }
        assert!(framed_blocks(&tokenizer, &rows, 2).is_err(), "no room");
    }

    #[test]
    fn a_block_of_one_token_predicts_nothing_and_is_left_out() {
        let (_, blocks) = stream(Style::WordPiece, &["a b c", "a"], 4);

        assert_eq!(blocks.iter().map(Vec::len).collect::<Vec<_>>(), [4, 4]);
        let (_, blocks) = stream(Style::WordPiece, &["a b c", "a b"], 4);
        assert_eq!(
            blocks.iter().map(Vec::len).collect::<Vec<_>>(),
            [4, 4],
            "the ninth stands alone"
        );
    }
}
