//! `attn pretrain`: a language model from random weights, or one that goes on.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::Write,
    ops::Range,
    sync::{Arc, atomic::AtomicBool},
};

use anyhow::{Context, Result, ensure};
use attn_core::{Config, LoadOptions, Model, Variant, config::Head};
use attn_data::{
    batch::{Encoded, Masking},
    dataset::Example,
    hub::Hub,
    needle::{Haystack, NeedleKind, Recipe},
    select::hold_out,
    tokenizer::{TextTokenizer, train_bpe},
};
use attn_eval::{
    Batching, Error as EvalError, LanguageScore, Recall, masked_token, next_token, recall,
};
use attn_train::{
    CausalLm, Event, Examples, METRICS_FILE, MaskedLm, Metric, Needles, Objective, Run, train,
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tch::{Device, Kind};

use crate::{
    Outcome,
    args::RunArgs,
    memory::{self, Foreseen, Training, longest, scored},
    monitor::{Monitor, count_rows, grouped},
    plots,
    run_dir::{BEFORE_FILE, SUMMARY_FILE, TOKENIZER_DIR},
    settings::{NeedleChoice, ObjectiveChoice, Pretrain, is_nothing},
    start::{Start, invocation, quoted, tokenizer_files},
    surgery::{changed, describe, refuse_two_texts, variants},
    texts::{
        Folder, blocks, check_vocabulary, encode, framed_blocks, is_running, load_model, masking,
        max_len, open_tokenizer, read_split,
    },
};

/// Seeds of the documents that runs are scored on begin here: far from those that runs are given.
const HELD_OUT: u64 = 0x6865_6c64_0000;

/// What a run came to, as `summary.json` has it.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Summary {
    /// The version of results/SCHEMA.md; 0 in folders of earlier programs.
    #[serde(default)]
    schema: u32,
    name: String,
    model_type: String,
    n_parameters: usize,
    vocab_size: usize,
    source: String,
    n_train: usize,
    n_held_out: usize,
    max_len: usize,
    seed: u64,
    /// Attention kind of each layer, with its settings.
    attention: Vec<Variant>,
    before: Score,
    after: Score,
    selected_step: u64,
    total_steps: u64,
    train_loss: Option<f64>,
    n_tokens: u64,
    /// Of the last part of a run that was resumed.
    tokens_per_s: f64,
    elapsed_s: f64,
}

/// What a model is worth on what is held out.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Score {
    #[serde(flatten)]
    language: LanguageScore,
    /// Answers given word for word to questions at the end of documents, by what is hidden in them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    needles: BTreeMap<NeedleKind, Recall>,
}

/// Documents with their answers.
#[derive(Debug, Default)]
struct Documents {
    kinds: Vec<NeedleKind>,
    rows: Vec<Encoded>,
    answers: Vec<Vec<Range<usize>>>,
}

/// What scores the model.
struct Scorer {
    held_out: Vec<Encoded>,
    documents: Documents,
    batching: Batching,
    masking: Option<Masking>,
    seed: u64,
    stop: Arc<AtomicBool>,
}

pub(crate) fn run(args: &RunArgs, out: &mut dyn Write) -> Result<Outcome> {
    let start = Start::<Pretrain>::new(args)?;
    if let Some(summary) = start.dir.read_json::<Summary>(SUMMARY_FILE)? {
        tracing::info!("the run in `{}` has finished", start.dir.path().display());
        start.dir.remove_checkpoints();
        print(&summary, &start, out)?;
        return Ok(Outcome::Done);
    }
    let config = &start.config;
    // Before the data, which may take long: sizes that do not fit show at once.
    let base = match &config.model {
        Some(name) => Some(Folder::open(name, true, None, &start.hub)?),
        None => None,
    };
    match &base {
        Some(base) => {
            check_base(base, config)?;
            check_attention(&base.config, &format!("`model`, `{}`,", base.name), config)?;
        }
        None => check_attention(&model_config(config, None)?, "the model in `[init]`", config)?,
    }
    let (train_rows, held_rows) = read(config, &start.hub)?;
    let tokenizer = match &base {
        Some(base) => base.tokenizer.clone(),
        None => tokenizer(&start, &train_rows)?,
    };
    let model_config = match &base {
        Some(base) => base.config.clone(),
        None => model_config(config, Some(&tokenizer))?,
    };
    let max_len =
        max_len(config.examples.max_len, &model_config, &tokenizer, "`examples.max_len`")?;
    let tokenizer = tokenizer.reaching(max_len);
    let is_cut = config.objective == ObjectiveChoice::Causal || is_running(&train_rows);
    let make = |rows: &[Example], split: &str| match config.objective {
        ObjectiveChoice::Causal => blocks(&tokenizer, rows, max_len),
        ObjectiveChoice::Masked if is_running(rows) => framed_blocks(&tokenizer, rows, max_len),
        ObjectiveChoice::Masked => {
            let numbered: Vec<(usize, &Example)> = rows.iter().enumerate().collect();
            encode(&tokenizer, &numbered, max_len, split)
        }
    };
    let (needles, documents) = match &config.needles {
        None => (None, Documents::default()),
        Some(choice) => {
            let hidden_in = |rows: &[Example], which| -> Result<Haystack> {
                let texts: Vec<&str> = rows.iter().map(|row| row.text.as_str()).collect();
                Haystack::new(&texts, &tokenizer)
                    .with_context(|| format!("cannot hide needles in the rows {which}"))
            };
            let haystack = hidden_in(&train_rows, "to train on")?;
            let held_out = hidden_in(&held_rows, "held out")?;
            let documents = Documents::new(choice, &held_out, &tokenizer, max_len)
                .context("cannot make documents of the rows held out")?;
            let needles = Needles {
                haystack,
                recipe: choice.recipe(max_len),
                tokenizer: tokenizer.clone(),
                n: 0,
                answer_weight: choice.answer_weight.get().into(),
            };
            (Some(needles), documents)
        }
    };
    let (train_rows, held_out) = (make(&train_rows, "train")?, make(&held_rows, "held out")?);
    let n_train = train_rows.len();
    let needles = needles.zip(config.needles.as_ref()).map(|(needles, choice)| {
        let n = choice.n_documents(n_train);
        tracing::info!("{} documents with needles beside them", grouped(n));
        Needles { n, ..needles }
    });
    tracing::info!(
        "`{}`: {} {} to train on, {} to score",
        config.data.source,
        grouped(n_train),
        if is_cut { "blocks" } else { "texts" },
        grouped(held_out.len())
    );

    let masking = match config.objective {
        ObjectiveChoice::Causal => None,
        ObjectiveChoice::Masked => {
            Some(masking(&tokenizer, model_config.sizes.vocab_size, config.mask_rate)?)
        }
    };
    let batching = Batching {
        batch_size: config.train.batch_size,
        pad_id: tokenizer.fill_id(),
        ..Batching::default()
    };
    foresee(
        config,
        &model_config,
        base.is_none(),
        [&train_rows, &held_out],
        &batching,
        start.device,
    )?;
    let mut model = init(config, base.as_ref(), model_config, &start)?;
    start.record(&model)?;
    keep(&tokenizer, &start)?;
    let scorer = Scorer {
        held_out,
        documents,
        batching,
        masking: masking.clone(),
        seed: config.train.seed,
        stop: Arc::clone(&start.stop),
    };
    start.listen()?;
    let before = match start.dir.read_json(BEFORE_FILE)? {
        Some(before) => before,
        None => {
            let Some(before) = scorer.score(&model)? else { return Ok(start.interrupted(0)) };
            start.dir.write_json(BEFORE_FILE, &before)?;
            before
        }
    };

    let plan = config.train.plan()?;
    let mut examples = Examples::new(train_rows, plan, tokenizer.fill_id(), config.train.seed);
    if let Some(masking) = masking {
        examples = examples.with_masking(masking);
    }
    if let Some(needles) = needles {
        examples = examples.with_needles(needles);
    }
    let outcome = fit(&mut model, &examples, &tokenizer, &scorer, &start)?;
    if outcome.outcome == attn_train::Outcome::Interrupted {
        return Ok(start.interrupted(outcome.step));
    }
    let Some(after) = scorer.score(&model)? else { return Ok(start.interrupted(outcome.step)) };

    let summary = Summary {
        schema: crate::run_dir::SCHEMA,
        name: config.name.clone(),
        model_type: model.config().base_model_type().to_owned(),
        n_parameters: model.parameters().iter().map(|(_, tensor)| tensor.numel()).sum(),
        vocab_size: tokenizer.vocab_size(),
        source: config.data.source.clone(),
        n_train,
        n_held_out: scorer.held_out.len(),
        max_len,
        seed: config.train.seed,
        attention: variants(&model),
        before,
        after,
        selected_step: outcome.selected_step,
        total_steps: outcome.total_steps,
        train_loss: outcome.train_loss,
        n_tokens: outcome.n_tokens,
        tokens_per_s: outcome.tokens_per_s,
        elapsed_s: outcome.elapsed_s,
    };
    start.save(&model, &tokenizer)?;
    let plots = start.dir.file("plots");
    fs::create_dir_all(&plots).with_context(|| format!("cannot create `{}`", plots.display()))?;
    plots::loss(
        &start.dir.file(METRICS_FILE),
        &format!("Pre-training on {}", plots::short(&summary.source)),
        &summary.attention,
        "nats per token",
        &plots.join("loss.png"),
    )?;
    start.dir.write_json(SUMMARY_FILE, &summary)?;
    start.dir.remove_checkpoints();
    print(&summary, &start, out)?;
    Ok(Outcome::Done)
}

/// The rows to train on and the rows to score.
fn read(config: &Pretrain, hub: &Hub) -> Result<(Vec<Example>, Vec<Example>)> {
    let (spec, examples) = (&config.data, &config.examples);
    let rows = read_split(spec, &spec.train_split, examples.limit, hub)?.rows;
    match examples.hold_out {
        Some(part) if is_nothing(part) => {
            anyhow::bail!(
                "`examples.hold_out` is 0, and nothing would be left to score the model on"
            )
        }
        Some(part) => {
            let (kept, held) = hold_out(&vec![-1; rows.len()], part, config.train.seed)
                .context("cannot use `examples.hold_out`")?;
            let take = |chosen: Vec<usize>| chosen.iter().map(|&row| rows[row].clone()).collect();
            Ok((take(kept), take(held)))
        }
        None => {
            let held = read_split(spec, &spec.validation_split, examples.report_limit, hub).context(
                "there is nothing to score the model on\nhint: set `data.validation_split`, or cut a part off the \
                 train split: examples.hold_out = 0.02",
            )?;
            Ok((rows, held.rows))
        }
    }
}

/// The tokenizer that the config names, or one trained on `rows`.
fn tokenizer(start: &Start<Pretrain>, rows: &[Example]) -> Result<TextTokenizer> {
    let dir = start.dir.file(TOKENIZER_DIR);
    if dir.is_dir() {
        return Ok(TextTokenizer::from_folder(&dir)?);
    }
    let choice = &start.config.tokenizer;
    if let Some(from) = &choice.from {
        return open_tokenizer(from, &start.hub);
    }
    let texts: Vec<&str> = rows.iter().map(|row| row.text.as_str()).collect();
    let max_length = start.config.examples.max_len;
    let (style, vocab_size) = choice.trained(start.config.objective);
    let tokenizer =
        train_bpe(&texts, vocab_size, style, max_length).context("cannot train a tokenizer")?;
    tracing::info!("trained a vocabulary of {} tokens", grouped(tokenizer.vocab_size()));
    Ok(tokenizer)
}

/// Puts the tokenizer into the run's folder.
fn keep(tokenizer: &TextTokenizer, start: &Start<Pretrain>) -> Result<()> {
    let dir = start.dir.file(TOKENIZER_DIR);
    if dir.is_dir() {
        return Ok(());
    }
    // Through a folder of another name, so that a kill leaves none that is half written.
    let draft = start.dir.file(".tokenizer");
    if draft.exists() {
        let shown = draft.display();
        fs::remove_dir_all(&draft).with_context(|| format!("cannot remove `{shown}`"))?;
    }
    tokenizer.save(&draft)?;
    fs::rename(&draft, &dir).with_context(|| format!("cannot create `{}`", dir.display()))
}

/// The config of the model to make: `[init]`, the vocabulary's size and special tokens, the head of the objective.
fn model_config(config: &Pretrain, tokenizer: Option<&TextTokenizer>) -> Result<Config> {
    let make = || -> Result<Config> {
        let value = serde_json::to_value(&config.init).context("not JSON")?;
        let Value::Object(mut raw) = value else { unreachable!("a table is an object") };
        raw.shift_remove("architectures"); // The objective's business.
        match tokenizer {
            Some(tokenizer) => name_tokens(&mut raw, tokenizer)?,
            None => {
                raw.entry("vocab_size")
                    .or_insert(Value::from(config.tokenizer.trained(config.objective).1));
            }
        }
        let mut made = Config::from_json(raw)?;
        made.set_head(Head::LanguageModel);
        let wanted = config.objective == ObjectiveChoice::Causal;
        ensure!(
            made.is_causal() == wanted,
            "`objective` is `{}`, and a {} {}",
            if wanted { "causal" } else { "masked" },
            made.base_model_type(),
            if wanted {
                "sees both sides\nhint: set it to `masked`"
            } else {
                "is a decoder\nhint: set it to `causal`"
            }
        );
        if let Some(layers) = &config.surgery.layers
            && let Some(layer) = layers.iter().find(|&&layer| layer >= made.layers.len())
        {
            anyhow::bail!(
                "`surgery.layers` names layer {layer}, and the model has {}",
                made.layers.len()
            );
        }
        Ok(made)
    };
    make().context("cannot use `[init]`")
}

fn name_tokens(raw: &mut Map<String, Value>, tokenizer: &TextTokenizer) -> Result<()> {
    match raw.get("vocab_size").and_then(Value::as_i64) {
        Some(vocab_size) => check_vocabulary(tokenizer, vocab_size)?,
        None => {
            raw.insert("vocab_size".into(), tokenizer.vocab_size().into());
        }
    }
    let ids = [
        ("pad_token_id", tokenizer.pad_id()),
        ("bos_token_id", tokenizer.bos_id()),
        ("eos_token_id", tokenizer.eos_id()),
    ];
    // Null where there is none: transformers' defaults are ids of other vocabularies.
    for (key, id) in ids {
        raw.entry(key).or_insert(id.map_or(Value::Null, Value::from));
    }
    Ok(())
}

/// Refuses a model to go on from that does not predict what the run is to teach.
fn check_base(base: &Folder, config: &Pretrain) -> Result<()> {
    let fits = base.config.is_causal() == (config.objective == ObjectiveChoice::Causal);
    ensure!(
        fits && base.config.head == Head::LanguageModel,
        "`model` is `{}`, {} {}, and `objective` is `{}`\nhint: name {} with a language-model head",
        base.name,
        base.config.base_model_type(),
        base.config.head,
        if config.objective == ObjectiveChoice::Causal { "causal" } else { "masked" },
        if config.objective == ObjectiveChoice::Causal { "a decoder" } else { "an encoder" },
    );
    Ok(())
}

/// Refuses attention that does not fit, and such as reads more than the text.
fn check_attention(made: &Config, name: &str, config: &Pretrain) -> Result<()> {
    ensure!(
        !matches!(config.attention, Some(Variant::Cross(_))),
        "`attention.kind` is `cross`, which reads two texts, and pre-training reads one\nhint: `attn finetune` trains it, \
         on rows with `data.text_pair`"
    );
    let changed = changed(made, &config.surgery, config.attention.as_ref())?;
    refuse_two_texts(&changed, name, "pre-training")
}

/// What the run will hold, before a model is made.
fn foresee(
    config: &Pretrain,
    made: &Config,
    is_random: bool,
    [train, held]: [&[Encoded]; 2],
    batching: &Batching,
    device: Device,
) -> Result<()> {
    let changed = changed(made, &config.surgery, config.attention.as_ref())?;
    let model = Foreseen::model(&changed, Kind::Float, is_random)?;
    let scored = scored(batching, held);
    let share = match config.objective {
        ObjectiveChoice::Causal => 1.0,
        // Drawn: some batches hide more.
        ObjectiveChoice::Masked => (1.3 * config.mask_rate).min(1.0),
    };
    let training = Training {
        config: &config.train,
        lora: None,
        // Documents with needles are as long as rows may be.
        len: match &config.needles {
            Some(_) => config.examples.max_len.map_or(longest(train), |most| most as u64),
            None => longest(train),
        },
        n_rows: train.len(),
        labelled: share,
        is_language: true,
        scored,
        scored_places: ((scored.0 * scored.1) as f64 * share) as u64,
    };
    model.training(&training)?.check(device, memory::OF_TRAINING)
}

fn init(
    config: &Pretrain,
    base: Option<&Folder>,
    model_config: Config,
    start: &Start<Pretrain>,
) -> Result<Model> {
    let seed = config.train.seed;
    let device = start.device;
    let options = LoadOptions { kind: Kind::Float, device, seed, ..LoadOptions::default() };
    let mut model = match base {
        Some(base) => load_model(&base.path, None, &options, &start.hub)
            .with_context(|| format!("cannot load the model `{}`", base.name))?,
        None => Model::init(model_config, &options).context("cannot use `[init]`")?,
    };
    if let Some(variant) = &config.attention {
        let layers = config.surgery.layers(model.layers().len());
        model.swap(&layers, variant, seed)?;
        tracing::info!("attention `{}` in layers {layers:?}", variant.name());
    }
    Ok(model)
}

impl Documents {
    /// As many of each kind as the config says, of one needle each, made of all words.
    fn new(
        choice: &NeedleChoice,
        haystack: &Haystack,
        tokenizer: &TextTokenizer,
        max_len: usize,
    ) -> Result<Self> {
        let mut all = Self::default();
        // A kind that is named twice to come up more often is scored once.
        for &kind in &BTreeSet::from_iter(&choice.kinds) {
            let recipe = Recipe {
                kinds: vec![*kind],
                words: None,
                most_needles: 1,
                asks: 1,
                ..choice.recipe(max_len)
            };
            for index in 0..choice.hold_out.get() {
                // The seed is no part of it: runs are scored on the same documents.
                let document =
                    haystack.document(&recipe, tokenizer, HELD_OUT + *kind as u64, index as u64)?;
                all.kinds.push(*kind);
                all.rows.push(Encoded {
                    ids: document.ids,
                    label: None,
                    index: all.rows.len(),
                    second_from: None,
                });
                let tokens = document.answers.into_iter().map(|answer| answer.tokens);
                all.answers.push(tokens.collect());
            }
        }
        Ok(all)
    }

    fn score(
        &self,
        model: &Model,
        batching: &Batching,
        progress: &mut attn_eval::Progress<'_>,
    ) -> attn_eval::Result<BTreeMap<NeedleKind, Recall>> {
        if self.rows.is_empty() {
            return Ok(BTreeMap::new());
        }
        let found = recall(model, &self.rows, &self.answers, batching, progress)?;
        let of = |kind| {
            let of_kind = self.kinds.iter().zip(&found).filter(|(of, _)| **of == kind);
            Recall::of(of_kind.flat_map(|(_, answers)| answers))
        };
        Ok(self.kinds.iter().filter_map(|&kind| Some((kind, of(kind)?))).collect())
    }
}

impl Scorer {
    fn try_score(&self, model: &Model) -> attn_eval::Result<Score> {
        let Self { held_out, documents, batching, masking, seed, stop } = self;
        let mut progress = count_rows(held_out.len(), stop);
        let language = match masking {
            None => next_token(model, held_out, batching, &mut progress),
            Some(masking) => masked_token(model, held_out, masking, *seed, batching, &mut progress),
        }?;
        drop(progress);
        let mut progress = count_rows(documents.rows.len(), stop);
        let needles = documents.score(model, batching, &mut progress)?;
        Ok(Score { language, needles })
    }

    /// Scores what is held out, or returns `None` where the user stopped it.
    fn score(&self, model: &Model) -> Result<Option<Score>> {
        match self.try_score(model) {
            Ok(score) => Ok(Some(score)),
            Err(EvalError::Stopped { .. }) => Ok(None),
            Err(error) => Err(error).context("cannot evaluate"),
        }
    }
}

fn fit(
    model: &mut Model,
    examples: &Examples,
    tokenizer: &TextTokenizer,
    scorer: &Scorer,
    start: &Start<Pretrain>,
) -> Result<attn_train::Summary> {
    let config = &start.config.train;
    let objective: &dyn Objective = if scorer.masking.is_none() { &CausalLm } else { &MaskedLm };
    let evaluate = |model: &Model| -> Result<Vec<Metric>, attn_train::BoxError> {
        Ok(metrics(&scorer.try_score(model)?))
    };
    // A validation split is looked at for the report alone, before and after.
    let holds_out = start.config.examples.hold_out.is_some();
    let mut monitor = Monitor::default();
    let run = Run {
        dir: Some(start.dir.path().to_owned()),
        resume: start.has_checkpoint()?,
        files: tokenizer_files(tokenizer)?,
        stop: Arc::clone(&start.stop),
        evaluate: if holds_out { Some(Box::new(evaluate)) } else { None },
        observe: Box::new(move |event| {
            if let Event::Step(_) = event {
                start.dir.begin();
            }
            monitor.observe(event);
        }),
        ..Run::new(config, objective, examples)
    };
    train(model, run).context("training failed")
}

fn metrics(score: &Score) -> Vec<Metric> {
    let metric = |name: &str, value, unit: &str, higher_is_better| Metric {
        name: name.to_owned(),
        value,
        unit: unit.to_owned(),
        higher_is_better,
    };
    let Score { language, needles } = score;
    let recalled = needles.iter().flat_map(|(kind, recall)| {
        let values =
            [("exact_match", recall.exact_match), ("token_accuracy", recall.token_accuracy)];
        values.map(|(of, value)| metric(&format!("{of}_{}", kind.name()), value, "fraction", true))
    });
    let mut metrics = vec![
        metric("loss", language.loss_nats_per_token, "nats/token", false),
        metric("perplexity", language.perplexity, "1", false),
        metric("top1_accuracy", language.top1_accuracy, "fraction", true),
    ];
    metrics.extend(recalled);
    metrics
}

fn print(summary: &Summary, start: &Start<Pretrain>, out: &mut dyn Write) -> Result<()> {
    let Summary { source, n_held_out, n_parameters, model_type, .. } = summary;
    writeln!(
        out,
        "{model_type}, {} parameters, {} held-out rows of {source}: {}",
        grouped(*n_parameters),
        grouped(*n_held_out),
        convention(&summary.after.language)
    )?;
    if let Some(attention) = describe(&summary.attention) {
        writeln!(out, "attention: {attention}")?;
    }
    writeln!(out)?;
    writeln!(
        out,
        "  {:<10} {:>10} {:>12} {:>8} {:>10}",
        "", "nats/token", "perplexity", "top 1", "tokens"
    )?;
    let scores = [("before", &summary.before), ("after", &summary.after)];
    for (label, Score { language: score, .. }) in scores {
        writeln!(
            out,
            "  {label:<10} {:>10.4} {:>12.3} {:>7.1}% {:>10}",
            score.loss_nats_per_token,
            score.perplexity,
            100.0 * score.top1_accuracy,
            grouped(score.n_tokens)
        )?;
    }
    for kind in summary.after.needles.keys() {
        writeln!(out)?;
        writeln!(
            out,
            "  {:<22} {:>11}  95 % interval",
            format!("needles: {}", kind.name()),
            "exact match"
        )?;
        for (label, score) in scores {
            let Some(Recall { exact_match, interval_95, n, .. }) = score.needles.get(kind) else {
                continue;
            };
            writeln!(
                out,
                "  {label:<22} {:>10.1}%  {:.1} to {:.1} of {n} documents",
                100.0 * exact_match,
                100.0 * interval_95.low,
                100.0 * interval_95.high
            )?;
        }
    }
    let dir = start.dir.path();
    let model = dir.join("model");
    writeln!(out)?;
    writeln!(out, "model     {}", model.display())?;
    writeln!(out, "picture   {}", dir.join("plots/loss.png").display())?;
    writeln!(out)?;
    writeln!(out, "what to try next:")?;
    let finetune = format!("finetune --set {}", quoted(&format!("model={}", model.display())));
    writeln!(out, "  fine-tune it         {}", invocation(&finetune))?;
    Ok(())
}

/// Which tokens a score counts, in a few words.
pub(crate) fn convention(score: &LanguageScore) -> &'static str {
    match score.convention {
        attn_eval::Convention::NextTokenWithinRow => {
            "each token after the first of its row, from those before it"
        }
        attn_eval::Convention::MaskedTokens => "hidden tokens, from those on both sides",
    }
}
