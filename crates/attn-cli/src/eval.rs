//! `attn eval`: a model on the rows of a task.

use std::{io::Write, sync::atomic::AtomicBool};

use anyhow::{Context, Result, bail, ensure};
use attn_core::{LoadOptions, Model, Variant, config::Head};
use attn_data::{
    batch::Encoded,
    dataset::{DatasetSpec, Example},
    hub::{Hub, progress_bar},
    prompt::PromptSpec,
};
use attn_eval::{
    Accuracy, Batching, ClassScore, LanguageScore, masked_token, next_token, stats::Interval,
};
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use crate::{
    args::{EvalArgs, Init, dtype_name},
    config::Written,
    monitor::{count_rows, grouped},
    pretrain::convention,
    run_dir::{SCHEMA, check_writable, device_name, write_json},
    scoring::{Asking, Rows, Scores, check_model, max_prompt_len},
    surgery::variants,
    texts::{
        Folder, Split, blocks, encode, framed_blocks, is_running, load_model, masking, max_len,
        read_split,
    },
};

/// The share of tokens that is hidden from a masked language model.
const MASK_RATE: f64 = 0.15;

/// OUT.json.
#[derive(Serialize)]
struct Report<'a> {
    /// The version of results/SCHEMA.md.
    schema: u32,
    model: &'a str,
    /// Whether the weights were made at random from the config, for comparison.
    random_weights: bool,
    model_type: &'static str,
    /// Attention kind of each layer, with its settings.
    attention: Vec<Variant>,
    task: &'a str,
    data: &'a DatasetSpec,
    split: &'a str,
    limit: Option<usize>,
    max_len: usize,
    n_rows: usize,
    device: String,
    dtype: &'static str,
    libtorch: String,
    attn: &'static str,
    #[serde(flatten)]
    score: Score,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Score {
    Classes {
        /// The prompt that was answered, where the model is no classifier.
        #[serde(skip_serializing_if = "Option::is_none")]
        prompt: Option<PromptSpec>,
        accuracy: Option<Accuracy>,
        /// With the answer taken that is likeliest per byte.
        #[serde(skip_serializing_if = "Option::is_none")]
        accuracy_per_byte: Option<Accuracy>,
        classes: Vec<ClassScore>,
        predictions: Vec<serde_json::Value>,
    },
    Language {
        language: LanguageScore,
        /// How texts were made into rows.
        rows: &'static str,
        /// Of running text that was scored as a whole.
        #[serde(skip_serializing_if = "Option::is_none")]
        per_text: Option<PerText>,
        /// Seed of the tokens that were hidden.
        #[serde(skip_serializing_if = "Option::is_none")]
        mask_seed: Option<u64>,
    },
}

/// The loss by what does not depend on the tokenizer: words, split at white space, and bytes of the text.
///
/// Every token is given the mean loss of those predicted, the few that begin a block included.
#[derive(Serialize)]
struct PerText {
    n_words: usize,
    n_bytes: usize,
    /// `exp(loss · tokens / words)`.
    word_perplexity: f64,
    /// `loss · tokens / bytes / ln 2`.
    bits_per_byte: f64,
}

impl PerText {
    fn new(loss: f64, n_tokens: usize, texts: &[Example]) -> Self {
        let n_words = texts.iter().map(|row| row.text.split_whitespace().count()).sum();
        let n_bytes = texts.iter().map(|row| row.text.len()).sum();
        let total = loss * n_tokens as f64;
        Self {
            n_words,
            n_bytes,
            word_perplexity: (total / n_words as f64).exp(),
            bits_per_byte: total / n_bytes as f64 / std::f64::consts::LN_2,
        }
    }
}

/// What `--set` can reach.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Settings {
    data: DatasetSpec,
    prompt: Option<PromptSpec>,
}

pub(crate) fn run(args: &EvalArgs, out: &mut dyn Write) -> Result<()> {
    let _made = check_writable(&args.out)?;
    ensure!(args.batch_size > 0, "`--batch-size` is 0, expected at least 1");
    let Settings { data, prompt } = settings(args)?;
    let device = attn_torch::device(&args.device)?;
    let hub = Hub::from_env().with_progress(progress_bar());
    let folder = Folder::open(&args.model, args.init.is_none(), None, &hub)?;
    let split = args.split.as_deref().unwrap_or(&data.validation_split);
    if prompt.is_some() {
        check_model(&folder.config)
            .with_context(|| format!("cannot use the model `{}`", args.model))?;
    }
    let found = match prompt {
        Some(_) => read_split(&data, split, args.limit, &hub),
        None => read(&data, split, args.limit, &folder, &hub),
    };
    let Split { rows, classes } = found.map_err(|error| {
        use attn_data::Error::SplitNotFound;
        match error.downcast_ref() {
            Some(SplitNotFound { available, .. })
                if args.split.is_none() && !available.is_empty() =>
            {
                let hint = format!("hint: name the split to score: --split {}", available[0]);
                error.context(format!("`--split` is not given, and `{split}` is not there\n{hint}"))
            }
            _ => error,
        }
    })?;
    let is_classifier = matches!(folder.config.head, Head::Classifier { .. });
    ensure!(
        data.label.is_some() || !is_classifier,
        "`{}` is a classifier, and `data.label` is not set\nhint: name the column of the classes: --set data.label=COLUMN",
        args.model
    );
    let max_len = match (&prompt, args.max_len) {
        (Some(_), None) => max_prompt_len(&folder),
        (_, asked) => max_len(asked, &folder.config, &folder.tokenizer, "`--max-len`")?,
    };
    let asked = match &prompt {
        Some(prompt) => {
            Some(ask(prompt, &data, &rows, classes.as_deref(), &folder, max_len, split)?)
        }
        None => None,
    };
    let options =
        LoadOptions { kind: args.dtype.into(), device, seed: args.seed, ..LoadOptions::default() };
    let model = load(args, &folder, &options, &hub)?;

    let (score, n_rows) = if data.label.is_some() {
        let to_score = match asked {
            Some(asked) => asked,
            None => {
                check_classes(classes.as_deref(), &model)?;
                let numbered: Vec<(usize, &Example)> = rows.iter().enumerate().collect();
                Rows::Classes(encode(&folder.tokenizer, &numbered, max_len, split)?)
            }
        };
        let mut progress = count_rows(to_score.len(), &NEVER);
        let scores = to_score
            .score(&model, &batching(args, &folder), &mut progress)
            .with_context(|| format!("cannot score `{}`", args.model))?;
        drop(progress);
        print_classes(&scores, out)?;
        let score = Score::Classes {
            prompt: prompt.map(|prompt| prompt.resolved()).transpose()?,
            accuracy: scores.accuracy(),
            accuracy_per_byte: scores.accuracy_per_byte(),
            classes: scores.classes().to_vec(),
            predictions: scores.predictions(&rows)?,
        };
        (score, rows.len())
    } else {
        score_language(args, &folder, &model, &rows, max_len, split, out)?
    };
    let report = Report {
        schema: SCHEMA,
        model: &args.model,
        random_weights: args.init == Some(Init::Random),
        model_type: model.config().base_model_type(),
        attention: variants(&model),
        task: &args.task,
        data: &data,
        split,
        limit: args.limit,
        max_len,
        n_rows,
        device: device_name(model.device()),
        dtype: dtype_name(model.kind()),
        libtorch: attn_torch::libtorch_version()?,
        attn: env!("CARGO_PKG_VERSION"),
        score,
    };
    write_json(&args.out, &report)?;
    tracing::info!("wrote `{}`", args.out.display());
    Ok(())
}

/// Nothing stops an evaluation but Ctrl-C, which ends the process.
static NEVER: AtomicBool = AtomicBool::new(false);

/// The rows as questions, which need classes to answer for.
fn ask(
    prompt: &PromptSpec,
    data: &DatasetSpec,
    rows: &[Example],
    classes: Option<&[String]>,
    folder: &Folder,
    max_len: usize,
    split: &str,
) -> Result<Rows> {
    let hint =
        "hint: name the column and its classes: --set data.label=COLUMN --set 'data.classes=[...]'";
    ensure!(
        data.label.is_some(),
        "a prompt is answered by a class, and `data.label` is not set\n{hint}"
    );
    let Some(classes) = classes else {
        bail!("a prompt is answered by a class, and the data does not name its classes\n{hint}");
    };
    let asking = Asking::new(Some(prompt), data, classes, &folder.path, max_len)?;
    let numbered: Vec<(usize, &Example)> = rows.iter().enumerate().collect();
    asking.to_score(folder, &numbered, split)
}

/// What `--task`, `--prompt` and `--set` name.
fn settings(args: &EvalArgs) -> Result<Settings> {
    let mut table = Table::new();
    let source = Table::from_iter([("source".to_owned(), Value::String(args.task.clone()))]);
    table.insert("data".to_owned(), Value::Table(source));
    if let Some(name) = &args.prompt {
        let name = Table::from_iter([("name".to_owned(), Value::String(name.clone()))]);
        table.insert("prompt".to_owned(), Value::Table(name));
    }
    let Settings { data, prompt } = Written::of(table, &args.set)?.parse()?;
    if let Some(prompt) = &prompt {
        prompt.resolved()?;
    }
    Ok(Settings { data: data.resolved(), prompt })
}

fn load(args: &EvalArgs, folder: &Folder, options: &LoadOptions, hub: &Hub) -> Result<Model> {
    load_model(&folder.path, args.init, options, hub)
        .with_context(|| format!("cannot load the model `{}`", args.model))
}

fn batching(args: &EvalArgs, folder: &Folder) -> Batching {
    let pad_id = folder.tokenizer.fill_id();
    Batching { batch_size: args.batch_size, pad_id, ..Batching::default() }
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

fn score_language(
    args: &EvalArgs,
    folder: &Folder,
    model: &Model,
    texts: &[Example],
    max_len: usize,
    split: &str,
    out: &mut dyn Write,
) -> Result<(Score, usize)> {
    let tokenizer = &folder.tokenizer;
    let by_text = |texts: &[Example]| -> Result<Vec<Encoded>> {
        let numbered: Vec<(usize, &Example)> =
            texts.iter().enumerate().filter(|(_, row)| !row.text.trim().is_empty()).collect();
        encode(tokenizer, &numbered, max_len, split)
    };
    let is_causal = model.config().is_causal();
    let packs = !args.by_text && (is_causal || is_running(texts));
    let rows = match (packs, is_causal) {
        (false, _) => by_text(texts)?,
        (true, true) => blocks(tokenizer, texts, max_len)?,
        (true, false) => framed_blocks(tokenizer, texts, max_len)?,
    };
    let batching = batching(args, folder);
    let mut progress = count_rows(rows.len(), &NEVER);
    let scored = match (is_causal, model.config().head) {
        // A classifier gets its own message.
        (false, Head::LanguageModel) => {
            let masking = masking(tokenizer, model.config().sizes.vocab_size, MASK_RATE)?;
            masked_token(model, &rows, &masking, args.seed, &batching, &mut progress)
        }
        _ => next_token(model, &rows, &batching, &mut progress),
    };
    drop(progress);
    let language = scored.with_context(|| format!("cannot score `{}`", args.model))?;
    let interval = language
        .loss_interval_95
        .map(|Interval { low, high }| format!(" (95 % interval {low:.4} to {high:.4})"));
    writeln!(
        out,
        "loss        {:.4} nats per token{}",
        language.loss_nats_per_token,
        interval.unwrap_or_default()
    )?;
    writeln!(out, "perplexity  {:.3}", language.perplexity)?;
    writeln!(out, "top 1       {:.1} %", 100.0 * language.top1_accuracy)?;
    writeln!(
        out,
        "counted     {} tokens of {} rows: {}",
        grouped(language.n_tokens),
        grouped(language.n_rows),
        convention(&language)
    )?;
    // Between separate texts stand tokens that are no part of any word.
    let per_text = (packs && is_causal && is_running(texts)).then(|| {
        let n_tokens = rows.iter().map(|row| row.ids.len()).sum();
        PerText::new(language.loss_nats_per_token, n_tokens, texts)
    });
    if let Some(PerText { word_perplexity, bits_per_byte, .. }) = &per_text {
        writeln!(out, "per word    perplexity {word_perplexity:.2}")?;
        writeln!(out, "per byte    {bits_per_byte:.4} bits")?;
    }
    let rows_are = if packs {
        "joined and cut into blocks of max_len"
    } else {
        "one text each, cut to max_len"
    };
    let mask_seed = (!is_causal).then_some(args.seed);
    Ok((Score::Language { language, rows: rows_are, per_text, mask_seed }, rows.len()))
}

fn print_classes(scores: &Scores, out: &mut dyn Write) -> Result<()> {
    let width =
        scores.classes().iter().map(|class| class.name.chars().count()).max().unwrap_or(0).max(8);
    match &scores.accuracy() {
        Some(score) => {
            let [low, high] =
                [score.interval_95.low, score.interval_95.high].map(|bound| 100.0 * bound);
            writeln!(
                out,
                "accuracy  {:.2} % (95 % interval {low:.2} to {high:.2} %), {} of {} rows",
                100.0 * score.accuracy,
                grouped(score.n_correct),
                grouped(score.n_labelled)
            )?;
            writeln!(out, "loss      {:.4} nats per row", score.loss)?;
        }
        None => writeln!(out, "no row is labelled: predictions alone")?,
    }
    if let Some(per_byte) = &scores.accuracy_per_byte() {
        writeln!(
            out,
            "per byte  {:.2} % by likelihood per byte of the answer",
            100.0 * per_byte.accuracy
        )?;
    }
    writeln!(out)?;
    writeln!(out, "  {:<width$} {:>8} {:>8} {:>10}", "class", "rows", "right", "predicted")?;
    for (index, class) in scores.classes().iter().enumerate() {
        writeln!(
            out,
            "  {:<width$} {:>8} {:>8} {:>10}",
            class.name,
            grouped(class.n_rows),
            grouped(class.predicted_as[index]),
            grouped(class.n_predicted)
        )?;
    }
    Ok(())
}
