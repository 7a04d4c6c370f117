//! `attn finetune`: a pretrained model becomes a classifier.

use std::{
    borrow::Borrow,
    fs,
    io::Write,
    sync::{Arc, atomic::AtomicBool},
};

use anyhow::{Context, Result, bail, ensure};
use attn_core::{
    LoadOptions, LoadReport, Model, Variant, WantedHead, config::Head, lora::is_adapter,
};
use attn_data::{
    dataset::{DatasetSpec, tasks},
    prompt::PromptSpec,
};
use attn_eval::{Accuracy, Batching, ClassScore, Error as EvalError};
use attn_train::{
    Classification, Completion, Event, Examples, METRICS_FILE, Metric, Objective, Run, TrainConfig,
    train, trainable,
};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind};

use crate::{
    Outcome,
    args::RunArgs,
    data::Data,
    memory::{self, Foreseen, Training, batch, longest},
    monitor::{Monitor, count_rows, grouped},
    plots,
    run_dir::{self, BEFORE_FILE, RunDir, SUMMARY_FILE, UNTOUCHED_FILE},
    scoring::{Rows, Scores, TrainRows, check_model},
    settings::{Finetune, HeadChoice, SaveAs, WeightsChoice},
    start::{Start, invocation, quoted, tokenizer_files},
    surgery::{changed, crossed, describe, variants},
    texts::{self, Folder, name_padding},
};

/// The folder of a run that holds adapters in place of a model.
const ADAPTER: &str = "adapter";

/// What a run came to, as `summary.json` has it.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Summary {
    /// The version of results/SCHEMA.md; 0 in folders of earlier programs.
    #[serde(default)]
    schema: u32,
    name: String,
    /// The model it began with.
    base_model: String,
    /// Its commit, where it came from the Hub.
    base_model_commit: Option<String>,
    /// The data set.
    source: String,
    /// The rows reported on.
    split: String,
    n_train: usize,
    n_selection: usize,
    n_report: usize,
    max_len: usize,
    seed: u64,
    /// Attention kind of each layer, with its settings.
    attention: Vec<Variant>,
    majority_class: String,
    /// The prompt that a language model answers, where it is no classifier.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    prompt: Option<PromptSpec>,
    /// Accuracy of always saying so on the rows reported on.
    majority_accuracy: f64,
    /// Of the model as it is stored, where its attention was changed and its classifier was not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    untouched: Option<Accuracy>,
    before: Accuracy,
    after: Accuracy,
    /// After training, with the answer taken that is likeliest per byte.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    after_per_byte: Option<Accuracy>,
    /// After training.
    classes: Vec<ClassScore>,
    /// Steps of the model that was chosen; 0 where none was better than the one before training.
    selected_step: u64,
    total_steps: u64,
    /// Values that were trained, and all the model has; adapters count until they are merged. `None` only in runs of
    /// earlier versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    n_trained: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    n_parameters: Option<usize>,
    /// Scores on the rows held out, of the model that was chosen.
    selection: Vec<Metric>,
    train_loss: Option<f64>,
    n_tokens: u64,
    /// Of the last part of a run that was resumed.
    tokens_per_s: f64,
    elapsed_s: f64,
}

impl Summary {
    /// The scores with their names, in the order of time.
    fn scores(&self) -> Vec<(&'static str, &Accuracy)> {
        let untouched = self.untouched.as_ref().map(|score| ("untouched", score));
        untouched.into_iter().chain([("before", &self.before), ("after", &self.after)]).collect()
    }
}

pub(crate) fn run(args: &RunArgs, out: &mut dyn Write) -> Result<Outcome> {
    let start = Start::<Finetune>::new(args)?;
    if let Some(summary) = start.dir.read_json::<Summary>(SUMMARY_FILE)? {
        tracing::info!("the run in `{}` has finished", start.dir.path().display());
        start.dir.remove_checkpoints();
        print(&summary, &start, out)?;
        return Ok(Outcome::Done);
    }
    let config = &start.config;
    let mut folder = Folder::open(
        &config.model,
        config.weights == WeightsChoice::Saved,
        config.revision.as_deref(),
        &start.hub,
    )?;
    if config.prompt.is_some() {
        check_model(&folder.config)
            .with_context(|| format!("cannot use the model `{}`", folder.name))?;
    }
    check_attention(config, &folder)
        .with_context(|| format!("cannot use the model `{}`", folder.name))?;
    let mut data = Data::read(config, &folder, &start.hub)?;
    folder.tokenizer = folder.tokenizer.reaching(data.max_len);
    tracing::info!(
        "`{}`: {} rows to train on, {} to choose the model by, {} to report on",
        config.data.source,
        grouped(data.train.rows.len()),
        grouped(data.selection.len()),
        grouped(data.report.len())
    );
    foresee(config, &folder, &data, start.device)?;
    let (mut model, fresh) = load(config, &folder, &data.classes, start.device)?;
    swap(config, &mut model).with_context(|| format!("cannot use the model `{}`", folder.name))?;
    let attention = variants(&model);
    let training = add_lora(config, &mut model)
        .with_context(|| format!("cannot put adapters into the model `{}`", folder.name))?;
    let is_swapped = !folder.config.layers.iter().map(|layer| &layer.variant).eq(&attention);
    start.record(&model)?;

    let batching = Batching {
        batch_size: config.train.batch_size.max(32),
        pad_id: folder.tokenizer.fill_id(),
        ..Batching::default()
    };
    start.listen()?;
    let mut untouched = None;
    // With a new head there is no figure to compare with: the head has learned nothing.
    if is_swapped && config.head == HeadChoice::Saved {
        let model = || Ok(load(config, &folder, &data.classes, start.device)?.0);
        untouched = score_once(UNTOUCHED_FILE, model, &data.report, &batching, &start)?;
        let Some(untouched) = &untouched else { return Ok(start.interrupted(0)) };
        tracing::info!("untouched: accuracy {:.4} on {}", untouched.accuracy, data.report_split);
    }
    let Some(before) = score_once(BEFORE_FILE, || Ok(&model), &data.report, &batching, &start)?
    else {
        return Ok(start.interrupted(0));
    };
    tracing::info!("before: accuracy {:.4} on {}", before.accuracy, data.report_split);

    let trained_names = trained(&model, &training)?;
    let count = |of: &dyn Fn(&str) -> bool| -> usize {
        let all = model.parameters();
        all.iter().filter(|(name, _)| of(name)).map(|(_, tensor)| tensor.numel()).sum()
    };
    let n_trained = count(&|name| trained_names.iter().any(|other| other == name));
    let n_parameters = count(&|_| true);
    let n_train = data.train.rows.len();
    let train_rows = std::mem::take(&mut data.train);
    let adapters = model.lora().is_some();
    let rows = (train_rows, &data.selection);
    let outcome = fit(&mut model, &training, rows, &folder, &batching, &start)?;
    if outcome.outcome == attn_train::Outcome::Interrupted {
        return Ok(start.interrupted(outcome.step));
    }
    let saves_adapter = config.lora.as_ref().is_some_and(|lora| lora.save == SaveAs::Adapter);
    if adapters && !saves_adapter {
        // What is scored is what is saved.
        model.merge_lora()?;
    }
    let Some(after) = score(&model, &data.report, &batching, &start.stop)? else {
        return Ok(start.interrupted(outcome.step));
    };

    let summary = Summary {
        schema: run_dir::SCHEMA,
        name: config.name.clone(),
        base_model: config.model.clone(),
        base_model_commit: folder.commit(),
        source: config.data.source.clone(),
        split: data.report_split.clone(),
        n_train,
        n_selection: data.selection.len(),
        n_report: data.report.len(),
        max_len: data.max_len,
        seed: config.train.seed,
        attention,
        majority_class: data.classes[data.majority].clone(),
        prompt: config.prompt.as_ref().map(PromptSpec::resolved).transpose()?,
        majority_accuracy: accuracy_of_always(data.majority, after.classes()),
        untouched,
        before,
        after: after.accuracy().context("no row is labelled")?,
        after_per_byte: after.accuracy_per_byte(),
        classes: after.classes().to_vec(),
        selected_step: outcome.selected_step,
        total_steps: outcome.total_steps,
        n_trained: Some(n_trained),
        n_parameters: Some(n_parameters),
        selection: outcome.after,
        train_loss: outcome.train_loss,
        n_tokens: outcome.n_tokens,
        tokens_per_s: outcome.tokens_per_s,
        elapsed_s: outcome.elapsed_s,
    };
    match saves_adapter {
        true => {
            // What was made anew goes along though it be frozen: the base model does not have it.
            let mut whole = trained_names;
            // The head goes along, trained or not: the base model may end in another.
            whole.extend(fresh);
            if matches!(model.config().head, Head::Classifier { .. }) {
                whole.extend(model.head_parameters());
            }
            whole.sort();
            whole.dedup();
            whole.retain(|name| !is_adapter(name));
            let files = tokenizer_files(&folder.tokenizer)?;
            model
                .save_adapter(&start.dir.file(ADAPTER), &config.model, &whole, &files)
                .context("cannot save the adapter")?;
        }
        false => start.save(&model, &folder.tokenizer)?,
    }
    let mut lines = Vec::new();
    for prediction in after.predictions(&data.report_texts)? {
        serde_json::to_writer(&mut lines, &prediction).context("cannot write JSON")?;
        lines.push(b'\n');
    }
    run_dir::write(&start.dir.file(run_dir::PREDICTIONS_FILE), &lines)?;
    draw(&summary, &start.dir)?;
    start.dir.write_json(SUMMARY_FILE, &summary)?;
    start.dir.remove_checkpoints();
    print(&summary, &start, out)?;
    Ok(Outcome::Done)
}

/// What the run will hold, before a model is made.
fn foresee(config: &Finetune, folder: &Folder, data: &Data, device: Device) -> Result<()> {
    let changed = changed(&folder.config, &config.surgery, config.attention.as_ref())?;
    let is_random = config.weights == WeightsChoice::Random;
    let model = Foreseen::model(&changed, Kind::Float, is_random)?;
    let rows = &data.train.rows;
    let n_rows = data.selection.len().max(data.report.len());
    let scored = batch(config.train.batch_size.max(32), Some(8192), data.max_len as u64, n_rows);
    let training = Training {
        config: &config.train,
        lora: config.lora.as_ref().map(|lora| model.adapters(lora.lora().rank.get())),
        len: longest(rows),
        n_rows: rows.len(),
        labelled: 0.25,
        is_language: config.prompt.is_some(),
        scored,
        scored_places: if config.prompt.is_some() { scored.0 * scored.1 / 4 } else { 0 },
    };
    model.training(&training)?.check(device, memory::OF_TRAINING)
}

/// Loads the model with the head that the config asks for, and says what that changed. With it come the names of the
/// parameters that were made anew.
fn load(
    config: &Finetune,
    folder: &Folder,
    classes: &[String],
    device: Device,
) -> Result<(Model, Vec<String>)> {
    let load = || -> Result<(Model, Vec<String>)> {
        let head = match config.head {
            HeadChoice::New => {
                warn_of_lost_head(config, &folder.config, classes);
                WantedHead::NewClassifier(classes.to_vec())
            }
            HeadChoice::Saved if config.prompt.is_some() => WantedHead::AsSaved,
            HeadChoice::Saved => {
                check_saved_head(&folder.config, classes)?;
                WantedHead::AsSaved
            }
        };
        let options = LoadOptions { kind: Kind::Float, device, head, seed: config.train.seed };
        match config.weights {
            WeightsChoice::Saved => {
                ensure!(
                    !texts::is_adapter(&folder.path),
                    "the folder holds an adapter\nhint: train it merged: set `lora.save` to `merged` in the run that \
                     makes it, or name its base model"
                );
                let (model, report) = Model::load(&folder.path, &options)?;
                say(&report);
                Ok((model, report.fresh))
            }
            WeightsChoice::Random => {
                tracing::info!("the whole model has random weights");
                let model = Model::init(folder.config.clone(), &options)?;
                let fresh = model.parameters().into_iter().map(|(name, _)| name).collect();
                Ok((model, fresh))
            }
        }
    };
    let (mut model, fresh) =
        load().with_context(|| format!("cannot use the model `{}`", folder.name))?;
    if config.prompt.is_none() {
        name_padding(&mut model, &folder.tokenizer);
    }
    Ok((model, fresh))
}

/// Refuses attention that does not fit, and such as reads two texts where rows have one, before anything is read.
fn check_attention(config: &Finetune, folder: &Folder) -> Result<()> {
    let changed = changed(&folder.config, &config.surgery, config.attention.as_ref())?;
    if let (Some(layer), None) = (crossed(&changed), &config.data.text_pair) {
        bail!(
            "its layer {layer} is `cross`, which attends to the first of two texts, and `data.text_pair` is not \
             set\nhint: name the column of the second text: --set data.text_pair=COLUMN"
        );
    }
    Ok(())
}

/// Puts the attention that the config asks for into the model.
fn swap(config: &Finetune, model: &mut Model) -> Result<()> {
    let Some(variant) = &config.attention else { return Ok(()) };
    let layers = config.surgery.layers(model.layers().len());
    model.swap(&layers, variant, config.train.seed)?;
    tracing::info!("attention `{}` in layers {layers:?}", variant.name());
    Ok(())
}

/// Puts the adapters that the config asks for into the model, and says how it is then trained: adapters and head alone.
fn add_lora(config: &Finetune, model: &mut Model) -> Result<TrainConfig> {
    let mut training = config.train.clone();
    let Some(lora) = &config.lora else { return Ok(training) };
    model.add_lora(&lora.lora(), config.train.seed)?;
    let mut freeze = vec!["*".to_owned(), "!*.lora_*".to_owned()];
    // A language model's head was trained; it may be the embedding, too.
    let head = if config.prompt.is_none() { model.head_parameters() } else { Vec::new() };
    freeze.extend(head.into_iter().map(|name| format!("!{name}")));
    freeze.append(&mut training.freeze);
    training.freeze = freeze;
    if lora.save == SaveAs::Adapter {
        model.check_export(&trained(model, &training)?)?;
    }
    Ok(training)
}

/// The names of what is trained.
fn trained(model: &Model, training: &TrainConfig) -> Result<Vec<String>> {
    let names: Vec<String> = model.parameters().into_iter().map(|(name, _)| name).collect();
    let trained = trainable(&names, &training.freeze)?;
    Ok(names
        .into_iter()
        .zip(trained)
        .filter(|(_, trained)| *trained)
        .map(|(name, _)| name)
        .collect())
}

/// Says where a new classifier takes the place of one that was trained.
fn warn_of_lost_head(config: &Finetune, model: &attn_core::Config, classes: &[String]) {
    if config.weights == WeightsChoice::Random || !matches!(model.head, Head::Classifier { .. }) {
        return;
    }
    let held = model.classes();
    let names: Vec<String> = held.iter().map(|class| format!("`{class}`")).collect();
    let advice = match held.len() == classes.len() {
        true => "; head = \"saved\" trains it further",
        false => "",
    };
    tracing::warn!("the model's classifier (classes {}) is dropped{advice}", names.join(", "));
}

fn check_saved_head(config: &attn_core::Config, classes: &[String]) -> Result<()> {
    let n_classes = classes.len() as i64;
    ensure!(
        config.head == Head::Classifier { n_classes },
        "`head` is `saved`, and the model ends in {}, where the data has {n_classes} classes\nhint: set `head` to `new`",
        config.head
    );
    Ok(())
}

/// Says what loading did beyond filling each parameter from the file.
fn say(report: &LoadReport) {
    let modules = |names: &[String]| {
        let mut modules: Vec<&str> = names
            .iter()
            .map(|name| name.rsplit_once('.').map_or(&name[..], |(module, _)| module))
            .collect();
        modules.dedup();
        modules.join(", ")
    };
    if !report.fresh.is_empty() {
        tracing::info!("new head, with random weights: {}", modules(&report.fresh));
    }
    if !report.dropped.is_empty() {
        tracing::info!("dropped with the old head: {}", modules(&report.dropped));
    }
}

/// Scores `rows`, or returns `None` where the user stopped it.
fn score(
    model: &Model,
    rows: &Rows,
    batching: &Batching,
    stop: &AtomicBool,
) -> Result<Option<Scores>> {
    match rows.score(model, batching, &mut count_rows(rows.len(), stop)) {
        Ok(scores) => Ok(Some(scores)),
        Err(EvalError::Stopped { .. }) => Ok(None),
        Err(error) => Err(error).context("cannot evaluate"),
    }
}

/// A model that is not trained under the code that scores the trained one; by `file` where that was done already.
fn score_once<M: Borrow<Model>>(
    file: &str,
    model: impl FnOnce() -> Result<M>,
    rows: &Rows,
    batching: &Batching,
    start: &Start<Finetune>,
) -> Result<Option<Accuracy>> {
    if let Some(found) = start.dir.read_json(file)? {
        return Ok(Some(found));
    }
    let model = model()?;
    let Some(scores) = score(model.borrow(), rows, batching, &start.stop)? else { return Ok(None) };
    let accuracy = scores.accuracy().context("no row is labelled")?;
    start.dir.write_json(file, &accuracy)?;
    Ok(Some(accuracy))
}

/// Trains.
fn fit(
    model: &mut Model,
    config: &TrainConfig,
    (rows, selection): (TrainRows, &Rows),
    folder: &Folder,
    batching: &Batching,
    start: &Start<Finetune>,
) -> Result<attn_train::Summary> {
    let mut examples = Examples::new(rows.rows, config.plan()?, batching.pad_id, config.seed);
    let mut objective: &dyn Objective = &Classification;
    if let Some(answers) = rows.answers {
        examples = examples.with_answers(answers);
        objective = &Completion;
    }
    let stop = Arc::clone(&start.stop);
    let evaluate = move |model: &Model| -> Result<Vec<Metric>, attn_train::BoxError> {
        let mut progress = count_rows(selection.len(), &stop);
        let scores = selection.score(model, batching, &mut progress)?;
        let accuracy = scores.accuracy().ok_or("no row is labelled")?;
        Ok(metrics(&accuracy))
    };
    let mut monitor = Monitor::default();
    let run = Run {
        dir: Some(start.dir.path().to_owned()),
        resume: start.has_checkpoint()?,
        files: tokenizer_files(&folder.tokenizer)?,
        stop: Arc::clone(&start.stop),
        evaluate: if selection.is_empty() { None } else { Some(Box::new(evaluate)) },
        observe: Box::new(move |event| {
            if let Event::Step(_) = event {
                start.dir.begin();
            }
            monitor.observe(event);
        }),
        ..Run::new(config, objective, &examples)
    };
    train(model, run).context("training failed")
}

/// The accuracy of always saying `class`: the baseline that counting reaches.
fn accuracy_of_always(class: usize, classes: &[ClassScore]) -> f64 {
    let n_rows: usize = classes.iter().map(|class| class.n_rows).sum();
    classes[class].n_rows as f64 / n_rows.max(1) as f64
}

fn metrics(accuracy: &Accuracy) -> Vec<Metric> {
    let metric = |name: &str, value, unit: &str, higher_is_better| Metric {
        name: name.to_owned(),
        value,
        unit: unit.to_owned(),
        higher_is_better,
    };
    vec![
        metric("accuracy", accuracy.accuracy, "fraction", true),
        metric("loss", accuracy.loss, "nats/example", false),
    ]
}

fn draw(summary: &Summary, dir: &RunDir) -> Result<()> {
    let plots = dir.file("plots");
    fs::create_dir_all(&plots).with_context(|| format!("cannot create `{}`", plots.display()))?;
    plots::loss(
        &dir.file(METRICS_FILE),
        &format!("Fine-tuning on {}", plots::short(&summary.source)),
        &summary.attention,
        if summary.prompt.is_some() { "nats" } else { "nats per example" },
        &plots.join("loss.png"),
    )?;
    plots::accuracy(
        &format!("{}, {}", plots::short(&summary.source), summary.split),
        &summary.attention,
        &summary.scores(),
        summary.majority_accuracy,
        summary.n_report,
        &plots.join("accuracy.png"),
    )
}

/// The table, where things are, and what to try next.
fn print(summary: &Summary, start: &Start<Finetune>, out: &mut dyn Write) -> Result<()> {
    let Summary { source, split, n_report, majority_class, majority_accuracy, .. } = summary;
    writeln!(out, "{source}, {split}: {} rows", grouped(*n_report))?;
    if let Some(attention) = describe(&summary.attention) {
        writeln!(out, "attention: {attention}")?;
    }
    writeln!(out)?;
    writeln!(out, "  {:<24} {:>8}   {:<16} {:>6}", "", "accuracy", "95 % interval", "loss")?;
    writeln!(
        out,
        "  {:<24} {:>7.1}%",
        format!("always `{majority_class}`"),
        100.0 * majority_accuracy
    )?;
    for (label, score) in summary.scores() {
        let [low, high] =
            [score.interval_95.low, score.interval_95.high].map(|bound| 100.0 * bound);
        writeln!(
            out,
            "  {label:<24} {:>7.1}%   {:<16} {:>6.3}",
            100.0 * score.accuracy,
            format!("{low:.1} to {high:.1} %"),
            score.loss
        )?;
    }
    if summary.after.interval_95.low <= *majority_accuracy {
        writeln!(out)?;
        writeln!(
            out,
            "No better than always saying `{majority_class}`, as far as {} rows can tell: it may take more steps, another rate \
             or seed, or a model that was trained further.",
            grouped(*n_report)
        )?;
    }
    if summary.selected_step == 0 && !summary.selection.is_empty() {
        writeln!(out)?;
        writeln!(
            out,
            "No step was better on the rows held out: the model is the one before training."
        )?;
    }
    let dir = start.dir.path();
    let saves_adapter = start.config.lora.as_ref().is_some_and(|lora| lora.save == SaveAs::Adapter);
    let model = dir.join(if saves_adapter { ADAPTER } else { "model" });
    let shown_model = model.display().to_string();
    let config = quoted(&dir.join("config.toml").display().to_string());
    let again = |change: &str| invocation(&format!("finetune {config} {change}"));
    writeln!(out)?;
    let what = if saves_adapter { "adapter " } else { "model   " };
    writeln!(out, "{what}  {}", model.display())?;
    writeln!(out, "pictures  {}", dir.join("plots/accuracy.png").display())?;
    writeln!(out, "          {}", dir.join("plots/loss.png").display())?;
    writeln!(out)?;
    writeln!(out, "what to try next:")?;
    let other = match summary.attention.iter().any(|variant| variant.name() == "window") {
        true => "--set attention.kind=gated",
        false => "--set attention.kind=window --set attention.size=8",
    };
    let tuned = {
        let weights = match start.config.weights {
            WeightsChoice::Saved => "",
            WeightsChoice::Random => " --set weights=saved",
        };
        let model = quoted(&format!("model={shown_model}"));
        format!("--set {model}{weights} --set head=saved {other}")
    };
    // An adapter is saved beside its base model as it is.
    let merged = if saves_adapter { " --set lora.save=merged" } else { "" };
    writeln!(out, "  another attention    {}", again(&format!("{other}{merged}")))?;
    if !saves_adapter {
        writeln!(out, "  swapped when tuned   {}", again(&tuned))?;
    }
    writeln!(out, "  another seed         {}", again(&format!("--seed {}", summary.seed + 1)))?;
    if let Some(evaluation) = evaluation(&start.config, &shown_model) {
        writeln!(out, "  the model again      {}", invocation(&evaluation))?;
    }
    if source.ends_with("sample_data.csv") {
        let real = "finetune configs/finetune/sst2.toml";
        writeln!(out, "  a real data set      {}", invocation(real))?;
    }
    Ok(())
}

/// The `attn eval` that finds the figure of the table again. There is none for rows held out of the train split: no
/// command names them alone.
fn evaluation(config: &Finetune, model: &str) -> Option<String> {
    if config.examples.report_hold_out.is_some() {
        return None;
    }
    let mut text = format!("eval --model {}{}", quoted(model), task(&config.data));
    if let Some(prompt) = &config.prompt {
        let named = PromptSpec { name: prompt.name.clone(), ..PromptSpec::default() };
        let name = prompt.name.as_ref().filter(|_| named == *prompt)?;
        text += &format!(" --prompt {name}");
    }
    if let Some(max_len) = config.examples.max_len {
        text += &format!(" --max-len {max_len}");
    }
    if let Some(limit) = config.examples.report_limit {
        text += &format!(" --limit {limit}");
    }
    Some(text + " --out eval.json")
}

/// The arguments of `attn eval` that name this data.
fn task(data: &DatasetSpec) -> String {
    if let Some(task) = tasks().iter().find(|task| task.spec() == *data) {
        return format!(" --task {}", task.name);
    }
    let mut text = format!(" --task {}", quoted(&data.source));
    let default = DatasetSpec::default();
    let mut set = |key: &str, value: Option<&String>, default: Option<&String>| {
        if let Some(value) = value.filter(|value| Some(*value) != default) {
            text += &format!(" --set {}", quoted(&format!("data.{key}={value}")));
        }
    };
    set("config", data.config.as_ref(), None);
    set("revision", data.revision.as_ref(), None);
    set("text", Some(&data.text), Some(&default.text));
    set("text_pair", data.text_pair.as_ref(), None);
    set("label", data.label.as_ref(), None);
    set("split_column", data.split_column.as_ref(), None);
    set("train_split", Some(&data.train_split), Some(&default.train_split));
    set("validation_split", Some(&data.validation_split), Some(&default.validation_split));
    // Names of classes are taken in alphabetical order otherwise.
    if let Some(classes) = data.classes.as_ref().filter(|classes| !classes.is_sorted()) {
        text += &format!(" --set {}", quoted(&format!("data.classes={classes:?}")));
    }
    text
}
