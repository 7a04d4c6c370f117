//! `attn eval`: a model on the rows of a task.

use std::io::Write;

use anyhow::{Context, Result, bail, ensure};
use attn_core::{LoadOptions, Model, config::Head};
use attn_data::{
    dataset::{DatasetSpec, Example},
    hub::{Hub, progress_bar},
    prompt::PromptSpec,
};
use attn_eval::{
    Accuracy, ClassScore, Divergence, LanguageScore, RowScore, divergence, masked_token,
    next_token, stats::Interval,
};
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use crate::{
    args::EvalArgs,
    blimp,
    config::Written,
    memory::{self, Foreseen},
    monitor::{count_every_row, grouped},
    perplexity::{self, Labelled},
    plot::write_result,
    pretrain::convention,
    run_dir::check_writable,
    scoring::{Asking, Rows, Scores},
    subject::Subject,
    task::{Task, Which},
    texts::{Folder, is_running, load_model, same_tokens},
};

/// OUT.json.
#[derive(Serialize)]
struct Report<'a> {
    #[serde(flatten)]
    subject: Subject<'a>,
    #[serde(flatten)]
    which: Which<'a>,
    n_rows: usize,
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
        /// With `--conventions`.
        #[serde(skip_serializing_if = "Option::is_none")]
        conventions: Option<Vec<Labelled>>,
        /// The loss of each row, for paired comparisons.
        loss_by_row: Vec<RowScore>,
        /// Seed of the tokens that were hidden.
        #[serde(skip_serializing_if = "Option::is_none")]
        mask_seed: Option<u64>,
        /// The model that it was held against, and how far they are apart.
        #[serde(skip_serializing_if = "Option::is_none")]
        against: Option<String>,
        #[serde(skip_serializing_if = "Option::is_none")]
        divergence: Option<Box<Divergence>>,
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
    let written = written(args)?;
    let Settings { data, prompt } = written.parse()?;
    if let Some(prompt) = &prompt {
        prompt.resolved()?;
    }
    let data = data.resolved();
    if args.rows.task == blimp::TASK {
        ensure!(
            prompt.is_none(),
            "a prompt means nothing to pairs of sentences\nhint: leave `--prompt` and `--set prompt.*` away"
        );
        return blimp::run(args, &blimp::data(&written, data.source)?, out);
    }
    // A device that is not there is said before anything is read.
    args.compute.device()?;
    let hub = Hub::from_env().with_progress(progress_bar());
    let task = Task::open(&args.model, &args.rows, data, prompt.as_ref(), &args.compute, &hub)?;
    if args.conventions {
        perplexity::check(&task)?;
    }
    let asked = prompt.as_ref().map(|prompt| ask(prompt, &task)).transpose()?;
    let baseline = match &args.against {
        None => None,
        Some(name) => {
            ensure!(
                task.data.label.is_none(),
                "`--against` compares predictions of tokens, and the task has labels\nhint: name a task of text, such as \
                 wikitext-2"
            );
            let folder = Folder::open(name, true, None, &hub)?;
            same_tokens(&task.folder, &folder)?;
            Some(folder)
        }
    };
    let (rows, len) = task.extent();
    let is_language = task.folder.config.head == Head::LanguageModel;
    let mut foreseen = Foreseen::computing(&task.folder.config, &args.compute)?.pass((rows, len));
    if let Some(baseline) = &baseline {
        let kind = args.compute.dtype.into();
        foreseen = foreseen
            .beside("the other model", &baseline.config, kind)?
            .pass((rows, len))
            .with("predictions of both, in pieces", memory::PIECES);
    } else if is_language {
        foreseen = match (&prompt, task.folder.config.is_causal()) {
            // Of answers, which are short.
            (Some(_), _) => foreseen.logits(rows * len.min(32), 3),
            // All at once, and those of a row as probabilities.
            (None, true) => foreseen.logits(rows * len, 1).logits(len, 3),
            // Of hidden tokens, of which some batches have more.
            (None, false) => foreseen.logits(rows * len / 5 + 16, 3),
        };
    }
    foreseen.check(args.compute.device()?, memory::OF_SCORING)?;
    let model = task.load(&args.compute, args.seed, &hub)?;

    let (score, n_rows) = if task.data.label.is_some() {
        let to_score = match asked {
            Some(asked) => asked,
            None => Rows::Classes(task.labelled(&model)?),
        };
        let mut progress = count_every_row(to_score.len());
        let scores = to_score
            .score(&model, &task.batching(), &mut progress)
            .with_context(|| format!("cannot score `{}`", args.model))?;
        drop(progress);
        print_classes(&scores, out)?;
        let score = Score::Classes {
            prompt: prompt.map(|prompt| prompt.resolved()).transpose()?,
            accuracy: scores.accuracy(),
            accuracy_per_byte: scores.accuracy_per_byte(),
            classes: scores.classes().to_vec(),
            predictions: scores.predictions(&task.texts)?,
        };
        (score, task.texts.len())
    } else {
        score_language(args, &task, &model, baseline.as_ref(), &hub, out)?
    };
    let report = Report {
        subject: Subject::new(&args.model, &args.compute, &model)?,
        which: task.which(),
        n_rows,
        score,
    };
    write_result(&args.out, &report, None)?;
    Ok(())
}

/// The rows as questions, which need classes to answer for.
fn ask(prompt: &PromptSpec, task: &Task<'_>) -> Result<Rows> {
    let hint =
        "hint: name the column and its classes: --set data.label=COLUMN --set 'data.classes=[...]'";
    ensure!(
        task.data.label.is_some(),
        "a prompt is answered by a class, and `data.label` is not set\n{hint}"
    );
    let Some(classes) = &task.classes else {
        bail!("a prompt is answered by a class, and the data does not name its classes\n{hint}");
    };
    let asking = Asking::new(Some(prompt), &task.data, classes, &task.folder.path, task.max_len)?;
    let numbered: Vec<(usize, &Example)> = task.texts.iter().enumerate().collect();
    asking.to_score(&task.folder, &numbered, &task.split)
}

/// What `--task`, `--prompt` and `--set` name.
fn written(args: &EvalArgs) -> Result<Written> {
    let mut table = Table::new();
    let source = Table::from_iter([("source".to_owned(), Value::String(args.rows.task.clone()))]);
    table.insert("data".to_owned(), Value::Table(source));
    if let Some(name) = &args.prompt {
        let name = Table::from_iter([("name".to_owned(), Value::String(name.clone()))]);
        table.insert("prompt".to_owned(), Value::Table(name));
    }
    Written::of(table, &args.rows.set)
}

fn score_language(
    args: &EvalArgs,
    task: &Task<'_>,
    model: &Model,
    baseline: Option<&Folder>,
    hub: &Hub,
    out: &mut dyn Write,
) -> Result<(Score, usize)> {
    let rows = task.unlabelled()?;
    let masking = task.masking()?;
    let batching = task.batching();
    let mut progress = count_every_row(rows.len());
    let (language, divergence) = match baseline {
        None => {
            let scored = match &masking {
                Some(masking) => {
                    masked_token(model, &rows, masking, args.seed, &batching, &mut progress)
                }
                None => next_token(model, &rows, &batching, &mut progress),
            };
            (scored.with_context(|| format!("cannot score `{}`", args.model))?, None)
        }
        Some(folder) => {
            let options = LoadOptions {
                kind: model.kind(),
                device: model.device(),
                ..LoadOptions::default()
            };
            let baseline = load_model(&folder.path, None, &options, hub)
                .with_context(|| format!("cannot load the model `{}`", folder.name))?;
            let masking = masking.as_ref().map(|masking| (masking, args.seed));
            let found = divergence(model, &baseline, &rows, masking, &batching, &mut progress)
                .with_context(|| {
                    format!("cannot hold `{}` against `{}`", args.model, folder.name)
                })?;
            (found.model.clone(), Some((found, folder)))
        }
    };
    drop(progress);
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
    let is_causal = model.config().is_causal();
    let per_text = (task.packs() && is_causal && is_running(&task.texts)).then(|| {
        let n_tokens = rows.iter().map(|row| row.ids.len()).sum();
        PerText::new(language.loss_nats_per_token, n_tokens, &task.texts)
    });
    if let Some(PerText { word_perplexity, bits_per_byte, .. }) = &per_text {
        writeln!(out, "per word    perplexity {word_perplexity:.2}")?;
        writeln!(out, "per byte    {bits_per_byte:.4} bits")?;
    }
    let rows_are = if task.packs() {
        "joined and cut into blocks of max_len"
    } else {
        "one text each, cut to max_len"
    };
    let n_rows = rows.len();
    let conventions = match args.conventions {
        true => {
            let stream = rows.into_iter().flat_map(|row| row.ids).collect();
            Some(perplexity::conventions(model, task, stream)?)
        }
        false => None,
    };
    perplexity::print(conventions.as_deref().unwrap_or_default(), out)?;
    if let Some((found, folder)) = &divergence {
        print_divergence(found, &folder.name, out)?;
    }
    let divergence = divergence.map(|(found, _)| Box::new(found));
    let mask_seed = masking.map(|_| args.seed);
    let against = args.against.clone();
    let score = Score::Language {
        loss_by_row: language.by_row.clone(),
        language,
        rows: rows_are,
        per_text,
        conventions,
        mask_seed,
        against,
        divergence,
    };
    Ok((score, n_rows))
}

fn print_divergence(found: &Divergence, against: &str, out: &mut dyn Write) -> Result<()> {
    let Divergence { kl_nats_per_token, kl_interval_95: Interval { low, high }, .. } = found;
    writeln!(out)?;
    writeln!(out, "against     {against}")?;
    writeln!(
        out,
        "KL          {kl_nats_per_token:.4} nats per token (95 % interval {low:.4} to {high:.4}), of its predictions \
         against this model's"
    )?;
    writeln!(out, "reverse KL  {:.4} nats per token", found.reverse_kl_nats_per_token)?;
    writeln!(out, "agreement   {:.1} % of the likeliest tokens", 100.0 * found.top1_agreement)?;
    writeln!(
        out,
        "entropy     {:.4} nats, where it has {:.4}",
        found.entropy_nats, found.baseline_entropy_nats
    )?;
    writeln!(
        out,
        "its loss    {:.4} nats per token, perplexity {:.3}",
        found.baseline.loss_nats_per_token, found.baseline.perplexity
    )?;
    Ok(())
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
