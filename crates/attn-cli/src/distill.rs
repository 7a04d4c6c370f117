//! `attn distill`: a language model with another attention learns to predict what it did before.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    io::Write,
    path::Path,
    sync::{Arc, atomic::AtomicBool},
    time::Instant,
};

use anyhow::{Context, Result, bail, ensure};
use attn_core::{
    LoadOptions, Model, Variant,
    checkpoint::{Checkpoint, write_tensors},
    config::Head,
};
use attn_data::{
    batch::{Encoded, Masking},
    dataset::Example,
    hub::Hub,
    select::hold_out,
    tokenizer::TextTokenizer,
};
use attn_eval::{
    Batching, Divergence, Error as EvalError, LanguageScore, divergence, n_parameters,
};
use attn_train::{
    Distillation, Event, Examples, METRICS_FILE, Metric, Run, TeacherCache, train, trainable,
};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind};

use crate::{
    Outcome,
    args::RunArgs,
    data::REPORT_STREAM,
    memory::{self, Foreseen, Training, longest, scored},
    monitor::{Monitor, count_rows, count_rows_of, grouped},
    plot::draw_result,
    plots,
    run_dir::{BEFORE_FILE, SUMMARY_FILE, TEACHER_FILE, peak_memory_mib, write_json},
    settings::{Distill, KIND_PARAMETERS, Stage, is_nothing},
    start::{Start, invocation, quoted, tokenizer_files},
    surgery::{changed, describe, refuse_two_texts, variants},
    texts::{
        Folder, blocks, encode, framed_blocks, is_running, load_model, masking, max_len,
        read_split, same_tokens,
    },
};

/// What a stage that has finished leaves: what it came to, and the parameters that it trained.
const STAGE_FILE: &str = "stage.json";
const TRAINED_FILE: &str = "trained.safetensors";

/// What a run came to, as `summary.json` has it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Summary {
    /// The version of results/SCHEMA.md.
    schema: u32,
    name: String,
    /// Empty in folders of earlier programs, where it was the teacher's.
    #[serde(default)]
    model: String,
    pub(crate) teacher: String,
    teacher_commit: Option<String>,
    model_type: String,
    n_parameters: usize,
    /// Those that the attention kind adds.
    pub(crate) n_added: usize,
    source: String,
    split: String,
    n_train: usize,
    n_report: usize,
    max_len: usize,
    seed: u64,
    /// Attention kind of each layer, with its settings.
    attention: Vec<Variant>,
    /// Against the teacher, before anything was trained.
    pub(crate) at_swap: Divergence,
    pub(crate) stages: Vec<Finished>,
    /// Most memory that the process held, in MiB; of the last part of a run that was resumed.
    pub(crate) peak_memory_mib: Option<u64>,
    pub(crate) elapsed_s: f64,
}

impl Summary {
    /// Of the run in `dir`; `None` where it has not finished.
    pub(crate) fn read(dir: &Path) -> Result<Option<Self>> {
        crate::run_dir::read_json(&dir.join(SUMMARY_FILE))
    }
}

/// A stage that was trained.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Finished {
    pub(crate) stage: String,
    pub(crate) n_trained: usize,
    selected_step: u64,
    pub(crate) total_steps: u64,
    n_tokens: u64,
    train_loss: Option<f64>,
    /// Of the last part of a stage that was resumed.
    pub(crate) tokens_per_s: f64,
    pub(crate) elapsed_s: f64,
    /// Against the teacher, after the stage.
    pub(crate) after: Divergence,
}

/// What scores the student.
struct Scorer {
    rows: Vec<Encoded>,
    batching: Batching,
    masking: Option<Masking>,
    seed: u64,
    stop: Arc<AtomicBool>,
}

/// Rows of the text.
struct Rows {
    train: Vec<Encoded>,
    /// Chooses the model; empty where the last one is taken.
    selection: Vec<Encoded>,
    report: Vec<Encoded>,
}

pub(crate) fn run(args: &RunArgs, out: &mut dyn Write) -> Result<Outcome> {
    let began = Instant::now();
    let start = Start::<Distill>::new(args)?;
    if let Some(summary) = start.dir.read_json::<Summary>(SUMMARY_FILE)? {
        tracing::info!("the run in `{}` has finished", start.dir.path().display());
        // A kill may have come between the summary and its pictures.
        draw_curves(&start);
        print(&summary, &start, out)?;
        return Ok(Outcome::Done);
    }
    let config = &start.config;
    let folder = Folder::open(&config.model, true, config.revision.as_deref(), &start.hub)?;
    let other = match &config.teacher {
        Some(name) => Some(Folder::open(name, true, None, &start.hub)?),
        None => None,
    };
    check(config, &folder, other.as_ref())?;
    let max_len =
        max_len(config.examples.max_len, &folder.config, &folder.tokenizer, "`examples.max_len`")?;
    for (name, stage) in config.stages() {
        let n_kept = stage.on_policy.map_or(0, |on_policy| on_policy.prompt_tokens);
        ensure!(
            n_kept < max_len,
            "`{name}.on_policy.prompt_tokens` is {n_kept}, and rows have {max_len} tokens: nothing is left for the student \
             to write"
        );
    }
    let tokenizer = folder.tokenizer.clone().reaching(max_len);
    let masking = match folder.config.is_causal() {
        true => None,
        false => Some(masking(&tokenizer, folder.config.sizes.vocab_size, config.mask_rate)?),
    };
    let Rows { train: train_rows, selection, report } =
        read(config, &start, &tokenizer, folder.config.is_causal(), max_len)?;
    let (n_train, n_report) = (train_rows.len(), report.len());
    tracing::info!(
        "`{}`: {} rows to train on, {} to report on",
        config.data.source,
        grouped(n_train),
        grouped(n_report)
    );

    foresee(config, &folder, other.as_ref(), [&train_rows, &report], start.device)?;
    let options = LoadOptions { device: start.device, seed: config.seed, ..LoadOptions::default() };
    let load = |folder: &Folder| {
        load_model(&folder.path, None, &options, &start.hub)
            .with_context(|| format!("cannot load the model `{}`", folder.name))
    };
    let (teacher, mut student) = match &other {
        Some(other) => (load(other)?, load(&folder)?),
        None => {
            let teacher = load(&folder)?;
            let student = teacher.alias()?;
            (teacher, student)
        }
    };
    if let Some(variant) = &config.attention {
        let layers = config.surgery.layers(student.layers().len());
        student.swap(&layers, variant, config.seed)?;
    }
    let attention = variants(&student);
    if let Some(text) = describe(&attention) {
        tracing::info!("attention: {text}");
    }
    // Before anything is written: a stage with a cache may be the last.
    for (name, stage) in config.stages() {
        if let Some(cache) = &stage.teacher_cache {
            TeacherCache::check(cache, &teacher, &train_rows, stage.loss.top_k)
                .with_context(|| format!("cannot use `{name}.teacher_cache`"))?;
        }
    }
    start.record(&student)?;
    check_teacher(&teacher, &start)?;
    start.listen()?;
    let scorer = |rows| Scorer {
        rows,
        batching: Batching { pad_id: tokenizer.fill_id(), ..Batching::default() },
        masking: masking.clone(),
        seed: config.seed,
        stop: Arc::clone(&start.stop),
    };
    let (chooser, reporter) = (scorer(selection), scorer(report));
    let at_swap = match start.dir.read_json(BEFORE_FILE)? {
        Some(found) => found,
        None => {
            let Some(found) = reporter.score(&student, &teacher)? else {
                return Ok(start.interrupted(0));
            };
            start.dir.write_json(BEFORE_FILE, &found)?;
            found
        }
    };
    say("at the swap", &at_swap);

    let mut stages = Vec::new();
    for (name, stage) in config.stages() {
        let mut data = Examples::new(
            train_rows.clone(),
            stage.train.plan()?,
            tokenizer.fill_id(),
            stage.train.seed,
        );
        if let Some(masking) = &masking {
            data = data.with_masking(masking.clone());
        }
        if let Some(on_policy) = stage.on_policy {
            data = data.with_on_policy(on_policy);
        }
        let work = Work { name, stage, teacher: &teacher, data: &data, tokenizer: &tokenizer };
        match work.run(&mut student, &chooser, &reporter, &start)? {
            StageEnd::Finished(finished) => {
                say(&format!("after `{name}`"), &finished.after);
                stages.push(*finished);
            }
            StageEnd::Nothing => {}
            StageEnd::Stopped(step) => return Ok(start.interrupted(step)),
        }
    }

    let summary = Summary {
        schema: crate::run_dir::SCHEMA,
        name: config.name.clone(),
        model: config.model.clone(),
        teacher: config.teacher.clone().unwrap_or_else(|| config.model.clone()),
        teacher_commit: other.as_ref().unwrap_or(&folder).commit(),
        model_type: student.config().base_model_type().to_owned(),
        n_parameters: n_parameters(&student),
        n_added: added(&student),
        source: config.data.source.clone(),
        split: match config.examples.report_hold_out {
            Some(_) => format!("held out of {}", config.data.train_split),
            None => config.data.validation_split.clone(),
        },
        n_train,
        n_report,
        max_len,
        seed: config.seed,
        attention,
        at_swap,
        elapsed_s: stages
            .iter()
            .map(|stage| stage.elapsed_s)
            .sum::<f64>()
            .max(began.elapsed().as_secs_f64()),
        stages,
        peak_memory_mib: peak_memory_mib(),
    };
    start.save(&student, &tokenizer)?;
    draw(&summary, &start)?;
    start.dir.write_json(SUMMARY_FILE, &summary)?;
    draw_curves(&start);
    print(&summary, &start, out)?;
    Ok(Outcome::Done)
}

/// Draws what the summary holds, beside the other pictures.
fn draw_curves(start: &Start<Distill>) {
    draw_result(&start.dir.file(SUMMARY_FILE), &start.dir.file("plots").join("by-position.png"));
}

/// What the run will hold, before a model is loaded: of the stages the one that takes most.
fn foresee(
    config: &Distill,
    folder: &Folder,
    other: Option<&Folder>,
    [train, report]: [&[Encoded]; 2],
    device: Device,
) -> Result<()> {
    let changed = changed(&folder.config, &config.surgery, config.attention.as_ref())?;
    let scored = scored(&Batching::default(), report);
    let mut most: Option<Foreseen> = None;
    for (_, stage) in config.stages() {
        let model = Foreseen::model(&changed, Kind::Float, false)?;
        let training = Training {
            config: &stage.train,
            lora: stage.lora.as_ref().map(|lora| model.adapters(lora.lora().rank.get())),
            len: longest(train),
            n_rows: train.len(),
            labelled: 0.0,
            is_language: false,
            scored,
            scored_places: 0,
        };
        // The teacher's memory is the student's but for what is trained: copied as that begins.
        let teacher = other.map_or(&folder.config, |other| &other.config);
        let (rows, len) = memory::batch(
            stage.train.batch_size,
            stage.train.max_tokens,
            training.len,
            train.len(),
        );
        let mut all = model
            .training(&training)?
            .beside("the teacher", teacher, Kind::Float)?
            .pass((rows, len))
            .with("predictions of both, in pieces", memory::PIECES);
        if stage.loss.attention_weights > 0.0 {
            all = all.attention((rows, len), 4);
        }
        if stage.loss.attention_output > 0.0 || stage.loss.layer_output > 0.0 {
            all = all.inputs((rows, len));
        }
        if most.as_ref().is_none_or(|most| most.total() < all.total()) {
            most = Some(all);
        }
    }
    match most {
        Some(most) => most.check(device, memory::OF_TRAINING),
        None => Ok(()),
    }
}

/// How many values the attention kinds of a model have of their own.
fn added(model: &Model) -> usize {
    let all = model.parameters();
    all.iter().filter(|(name, _)| name.contains(".kind.")).map(|(_, tensor)| tensor.numel()).sum()
}

/// Model folders by name and revision: runs of a sweep share them, and a tokenizer may take a second to read.
pub(crate) type Opened = HashMap<(String, Option<String>), Folder>;

/// Refuses a model, a teacher and an attention that do not go together; no rows and no weights are read.
pub(crate) fn check_models(config: &Distill, opened: &mut Opened, hub: &Hub) -> Result<()> {
    let own = (config.model.clone(), config.revision.clone());
    let other = config.teacher.clone().map(|teacher| (teacher, None));
    for key in [&own].into_iter().chain(&other) {
        if !opened.contains_key(key) {
            opened.insert(key.clone(), Folder::open(&key.0, true, key.1.as_deref(), hub)?);
        }
    }
    check(config, &opened[&own], other.as_ref().map(|key| &opened[key]))
}

/// Refuses what cannot be before the weights are read.
fn check(config: &Distill, folder: &Folder, other: Option<&Folder>) -> Result<()> {
    ensure!(
        folder.config.head == Head::LanguageModel,
        "`model` is `{}`, which ends in {}, and a distillation compares predictions of tokens\nhint: name a language model",
        folder.name,
        folder.config.head
    );
    for (name, stage) in config.stages().filter(|_| !folder.config.is_causal()) {
        let refuse = |setting: &str, why: &str| {
            bail!(
                "`{name}.{setting}` is set, and `{}` is a masked language model, which {why}\nhint: leave it away",
                folder.name
            )
        };
        if stage.teacher_cache.is_some() {
            refuse("teacher_cache", "has other tokens hidden in each epoch")?;
        }
        if stage.on_policy.is_some() {
            refuse("on_policy", "writes no text")?;
        }
    }
    ensure!(
        !matches!(config.attention, Some(Variant::Cross(_))),
        "`attention.kind` is `cross`, which reads two texts, and the teacher reads one\nhint: `attn finetune` trains it, \
         on rows with `data.text_pair`"
    );
    let changed = changed(&folder.config, &config.surgery, config.attention.as_ref())?;
    let (setting, teacher) = match other {
        Some(other) => ("`teacher`", other),
        None => ("`model`", folder),
    };
    for (setting, of, name) in
        [(setting, &teacher.config, &teacher.name), ("`model`", &changed, &folder.name)]
    {
        refuse_two_texts(of, &format!("{setting}, `{name}`,"), "a distillation")?;
    }
    match other {
        Some(other) => same_tokens(folder, other)
            .with_context(|| format!("cannot use `teacher`, `{}`", other.name)),
        None => {
            ensure!(
                changed.layers != folder.config.layers,
                "the student would be its teacher: `[attention]` changes nothing of `model`\nhint: `attn list` shows the \
                 kinds; where `model` was swapped or has lost heads, name the model it was made of: --set teacher=DIR"
            );
            Ok(())
        }
    }
}

/// Holds the teacher against the one that the run began with: its predictions are in the folder's figures, and in the
/// stages that have finished.
fn check_teacher(teacher: &Model, start: &Start<Distill>) -> Result<()> {
    let now = teacher.digest()?;
    match start.dir.read_json::<String>(TEACHER_FILE)? {
        Some(then) if then.len() != now.len() => bail!(
            "cannot go on: `{TEACHER_FILE}` holds `{then}`, expected the SHA-256 of a model: the run was begun by an earlier \
             version of this program, which did not tell all teachers apart\nhint: begin a new run"
        ),
        Some(then) => ensure!(
            then == now,
            "cannot go on: the teacher is another model than when the run began (SHA-256 {now}, which was {then})\n\
             hint: put its folder back as it was, or begin a new run"
        ),
        None => start.dir.write_json(TEACHER_FILE, &now)?,
    }
    Ok(())
}

/// The text as blocks: to train on, to choose by, to report on.
fn read(
    config: &Distill,
    start: &Start<Distill>,
    tokenizer: &TextTokenizer,
    is_causal: bool,
    max_len: usize,
) -> Result<Rows> {
    let (spec, examples) = (&config.data, &config.examples);
    let split = |name: &str, limit| -> Result<Vec<Example>> {
        Ok(read_split(spec, name, limit, &start.hub)?.rows)
    };
    let cut =
        |rows: Vec<Example>, part, stream, setting: &str| -> Result<(Vec<Example>, Vec<Example>)> {
            let (kept, held) = hold_out(&vec![-1; rows.len()], part, config.seed ^ stream)
                .with_context(|| format!("cannot use `{setting}`"))?;
            let take = |chosen: Vec<usize>| chosen.iter().map(|&row| rows[row].clone()).collect();
            Ok((take(kept), take(held)))
        };
    let rows = split(&spec.train_split, examples.limit)?;
    let (rows, held) = match examples.report_hold_out {
        Some(part) => {
            let (rows, mut held) = cut(rows, part, REPORT_STREAM, "examples.report_hold_out")?;
            held.truncate(examples.report_limit.unwrap_or(usize::MAX));
            (rows, held)
        }
        None => {
            let held = split(&spec.validation_split, examples.report_limit).context(
                "there is nothing to report on\nhint: set `data.validation_split`, or cut a part off the train split: \
                 examples.report_hold_out = 0.02",
            )?;
            (rows, held)
        }
    };
    let (train, selection) = match examples.hold_out.filter(|&part| !is_nothing(part)) {
        None => (rows, Vec::new()),
        Some(part) => cut(rows, part, 0, "examples.hold_out")?,
    };
    let make = |rows: &[Example], split: &str| {
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        if is_causal {
            return blocks(tokenizer, rows, max_len);
        }
        if is_running(rows) {
            return framed_blocks(tokenizer, rows, max_len);
        }
        let numbered: Vec<(usize, &Example)> = rows.iter().enumerate().collect();
        encode(tokenizer, &numbered, max_len, split)
    };
    Ok(Rows {
        train: make(&train, "train")?,
        selection: make(&selection, "held out")?,
        report: make(&held, "to report on")?,
    })
}

/// A stage to do.
struct Work<'a> {
    name: &'a str,
    stage: &'a Stage,
    teacher: &'a Model,
    data: &'a Examples,
    tokenizer: &'a TextTokenizer,
}

enum StageEnd {
    Finished(Box<Finished>),
    /// The attention kind has no parameters for it.
    Nothing,
    /// After as many steps.
    Stopped(u64),
}

impl Work<'_> {
    /// Trains the student, or takes over what the stage left when it finished.
    fn run(
        &self,
        student: &mut Model,
        chooser: &Scorer,
        reporter: &Scorer,
        start: &Start<Distill>,
    ) -> Result<StageEnd> {
        let Self { name, stage, .. } = self;
        let dir = start.dir.file(name);
        let mut training = stage.train.clone();
        let adds = student.parameters().iter().any(|(name, _)| name.contains(".kind."));
        if let Some(lora) = &stage.lora {
            student.add_lora(&lora.lora(), training.seed)?;
            let mut freeze = vec!["*".to_owned(), "!*.lora_*".to_owned()];
            if adds {
                freeze.push(format!("!{KIND_PARAMETERS}"));
            }
            freeze.append(&mut training.freeze);
            training.freeze = freeze;
        } else if !adds && training.freeze == ["*".to_owned(), format!("!{KIND_PARAMETERS}")] {
            ensure!(
                stage.loss.layer_output == 0.0,
                "`{name}.loss.layer_output` is set, and `{name}` trains what the attention adds, which is nothing\nhint: set \
                 tune.loss.layer_output, or {name}.train.freeze"
            );
            tracing::info!("`{name}` has nothing to train: the attention adds no parameters");
            return Ok(StageEnd::Nothing);
        }
        let parameters = student.parameters();
        let names: Vec<&str> = parameters.iter().map(|(name, _)| name.as_str()).collect();
        let picked = trainable(&names, &training.freeze)?;
        let trained: Vec<(String, usize)> = parameters
            .iter()
            .zip(picked)
            .filter(|(_, trained)| *trained)
            .map(|((name, tensor), _)| (name.clone(), tensor.numel()))
            .collect();
        drop(parameters);
        let is_trained = |name: &str| trained.iter().any(|(other, _)| other == name);
        student.own(&is_trained);

        let finished = match crate::run_dir::read_json::<Finished>(&dir.join(STAGE_FILE))? {
            Some(finished) => {
                take_over(student, &dir.join(TRAINED_FILE))?;
                merge(student, stage)?;
                finished
            }
            None => {
                let Some(outcome) = self.fit(student, &training, chooser, &dir, start)? else {
                    return Ok(StageEnd::Stopped(0));
                };
                if outcome.outcome == attn_train::Outcome::Interrupted {
                    return Ok(StageEnd::Stopped(outcome.step));
                }
                let kept: Vec<(String, tch::Tensor)> =
                    student.parameters().into_iter().filter(|(name, _)| is_trained(name)).collect();
                // Before adapters are merged, which they are again where the run goes on from this file.
                write_tensors(&dir.join(TRAINED_FILE), &kept, &BTreeMap::new())?;
                drop(kept);
                merge(student, stage)?;
                let Some(after) = reporter.score(student, self.teacher)? else {
                    return Ok(StageEnd::Stopped(outcome.step));
                };
                let finished = Finished {
                    stage: (*name).to_owned(),
                    n_trained: trained.iter().map(|(_, n)| n).sum(),
                    selected_step: outcome.selected_step,
                    total_steps: outcome.total_steps,
                    n_tokens: outcome.n_tokens,
                    train_loss: outcome.train_loss,
                    tokens_per_s: outcome.tokens_per_s,
                    elapsed_s: outcome.elapsed_s,
                    after,
                };
                write_json(&dir.join(STAGE_FILE), &finished)?;
                finished
            }
        };
        attn_train::checkpoint::remove_all(&dir);
        Ok(StageEnd::Finished(Box::new(finished)))
    }

    fn fit(
        &self,
        student: &mut Model,
        training: &attn_train::TrainConfig,
        chooser: &Scorer,
        dir: &Path,
        start: &Start<Distill>,
    ) -> Result<Option<attn_train::Summary>> {
        let Self { name, stage, teacher, data, tokenizer } = self;
        let cache;
        let mut objective = Distillation::new(teacher, student, &stage.loss)
            .with_context(|| format!("cannot use `[{name}]`"))?;
        if let Some(folder) = &stage.teacher_cache {
            let Some(found) = self.cache(folder, start)? else { return Ok(None) };
            cache = found;
            objective = objective.with_cache(&cache)?;
        }
        fs::create_dir_all(dir).with_context(|| format!("cannot create `{}`", dir.display()))?;
        let evaluate = |model: &Model| -> Result<Vec<Metric>, attn_train::BoxError> {
            Ok(metrics(&chooser.try_score(model, teacher)?))
        };
        let resume = start.resume && !attn_train::checkpoint::list(dir)?.is_empty();
        let mut monitor = Monitor::default();
        let run = Run {
            dir: Some(dir.to_owned()),
            resume,
            files: tokenizer_files(tokenizer)?,
            stop: Arc::clone(&start.stop),
            evaluate: if chooser.rows.is_empty() { None } else { Some(Box::new(evaluate)) },
            observe: Box::new(move |event| {
                if let Event::Step(_) = event {
                    start.dir.begin();
                }
                monitor.observe(event);
            }),
            ..Run::new(training, &objective, *data)
        };
        train(student, run).map(Some).with_context(|| format!("`{name}` failed"))
    }

    /// The teacher's predictions in `folder`; `None` where the user stopped their making.
    fn cache(&self, folder: &Path, start: &Start<Distill>) -> Result<Option<TeacherCache>> {
        let Self { name, stage, teacher, data, .. } = self;
        let (rows, top_k) = (data.examples(), stage.loss.top_k);
        let n_rows = rows.len();
        tracing::info!(
            "`{name}`: the teacher's predictions of {} rows, {} MiB, in `{}`",
            grouped(n_rows),
            grouped(TeacherCache::bytes(rows, top_k) >> 20),
            folder.display()
        );
        let config = &stage.train;
        let n_read =
            config.max_steps.map(|steps| steps as usize * config.batch_size * config.accumulation);
        if let Some(n_read) = n_read.filter(|&n_read| n_read < n_rows) {
            tracing::warn!(
                "the stage reads at most {} of them\nhint: `examples.limit` makes them fewer",
                grouped(n_read)
            );
        }
        let mut progress = count_rows_of("the teacher", rows.len(), &start.stop);
        TeacherCache::open_or_make(folder, teacher, rows, top_k, &start.stop, &mut |n_done| {
            // What was set to stop it, it looks at itself.
            let _ = progress(n_done);
        })
        .with_context(|| format!("cannot use `{name}.teacher_cache`"))
    }
}

/// Adds the adapters to their matrices, which get memory of their own: the teacher keeps its own.
fn merge(student: &mut Model, stage: &Stage) -> Result<()> {
    if stage.lora.is_some() {
        student.own(&|_| true);
        student.merge_lora()?;
    }
    Ok(())
}

/// Puts the tensors of a file into the parameters of their names.
fn take_over(student: &Model, file: &Path) -> Result<()> {
    let checkpoint = Checkpoint::open_file(file)?;
    for (name, tensor) in student.parameters() {
        if checkpoint.contains(&name) {
            let stored = checkpoint.tensor(&name, Some(tensor.kind()), tensor.device())?;
            ensure!(
                stored.size() == tensor.size(),
                "`{}`: `{name}` has shape {:?}, expected {:?}",
                file.display(),
                stored.size(),
                tensor.size()
            );
            tch::no_grad(|| tensor.shallow_clone().copy_(&stored));
        }
    }
    Ok(())
}

impl Scorer {
    fn try_score(&self, student: &Model, teacher: &Model) -> attn_eval::Result<Divergence> {
        let Self { rows, batching, masking, seed, stop } = self;
        let masking = masking.as_ref().map(|masking| (masking, *seed));
        divergence(student, teacher, rows, masking, batching, &mut count_rows(rows.len(), stop))
    }

    /// Scores the student, or returns `None` where the user stopped it.
    fn score(&self, student: &Model, teacher: &Model) -> Result<Option<Divergence>> {
        match self.try_score(student, teacher) {
            Ok(score) => Ok(Some(score)),
            Err(EvalError::Stopped { .. }) => Ok(None),
            Err(error) => Err(error).context("cannot evaluate"),
        }
    }
}

fn metrics(score: &Divergence) -> Vec<Metric> {
    let metric = |name: &str, value, unit: &str, higher_is_better| Metric {
        name: name.to_owned(),
        value,
        unit: unit.to_owned(),
        higher_is_better,
    };
    vec![
        metric("kl", score.kl_nats_per_token, "nats/token", false),
        metric("reverse_kl", score.reverse_kl_nats_per_token, "nats/token", false),
        metric("agreement", score.top1_agreement, "fraction", true),
        metric("loss", score.model.loss_nats_per_token, "nats/token", false),
        metric("perplexity", score.model.perplexity, "1", false),
    ]
}

fn say(when: &str, score: &Divergence) {
    tracing::info!(
        "{when}: KL {:.4} nats per token, agreement {:.1} %, perplexity {:.2}",
        score.kl_nats_per_token,
        100.0 * score.top1_agreement,
        score.model.perplexity
    );
}

fn draw(summary: &Summary, start: &Start<Distill>) -> Result<()> {
    let plots = start.dir.file("plots");
    fs::create_dir_all(&plots).with_context(|| format!("cannot create `{}`", plots.display()))?;
    for Finished { stage, .. } in &summary.stages {
        let metrics = start.dir.file(stage).join(METRICS_FILE);
        let title = format!("{stage} on {}", plots::short(&summary.source));
        let out = plots.join(format!("{stage}.png"));
        plots::loss(&metrics, &title, &summary.attention, "as the config weighs it", &out)?;
    }
    Ok(())
}

fn print(summary: &Summary, start: &Start<Distill>, out: &mut dyn Write) -> Result<()> {
    let Summary { source, n_report, n_parameters, n_added, model_type, .. } = summary;
    writeln!(
        out,
        "{model_type}, {} parameters, {} of them new, {} rows of {source} ({})",
        grouped(*n_parameters),
        grouped(*n_added),
        grouped(*n_report),
        summary.split
    )?;
    if let Some(attention) = describe(&summary.attention) {
        writeln!(out, "attention: {attention}")?;
    }
    writeln!(out)?;
    writeln!(
        out,
        "  {:<16} {:>9}  {:<18} {:>10} {:>10} {:>11} {:>12}",
        "", "KL", "95 % interval", "reverse KL", "agreement", "nats/token", "perplexity"
    )?;
    let row = |out: &mut dyn Write, label: &str, score: &Divergence| {
        let LanguageScore { loss_nats_per_token, perplexity, .. } = &score.model;
        let interval =
            format!("{:.4} to {:.4}", score.kl_interval_95.low, score.kl_interval_95.high);
        writeln!(
            out,
            "  {label:<16} {:>9.4}  {interval:<18} {:>10.4} {:>9.1}% {loss_nats_per_token:>11.4} {perplexity:>12.3}",
            score.kl_nats_per_token,
            score.reverse_kl_nats_per_token,
            100.0 * score.top1_agreement
        )
    };
    let LanguageScore { loss_nats_per_token, perplexity, .. } = &summary.at_swap.baseline;
    writeln!(
        out,
        "  {:<16} {:>9}  {:<18} {:>10} {:>10} {loss_nats_per_token:>11.4} {perplexity:>12.3}",
        "teacher", "", "", "", ""
    )?;
    row(out, "at the swap", &summary.at_swap)?;
    for Finished { stage, after, .. } in &summary.stages {
        row(out, &format!("after {stage}"), after)?;
    }
    let (first, last) = (&summary.at_swap, summary.stages.last().map(|stage| &stage.after));
    if let Some(last) = last.filter(|last| last.kl_nats_per_token > first.kl_nats_per_token) {
        tracing::warn!(
            "the student is farther from the teacher than at the swap: KL {:.4} against {:.4}\nhint: a lower `train.lr`, or more steps",
            last.kl_nats_per_token,
            first.kl_nats_per_token
        );
    }
    let dir = start.dir.path();
    let model = dir.join("model");
    writeln!(out)?;
    writeln!(
        out,
        "KL is that of the teacher's predictions against the student's, in nats per token."
    )?;
    writeln!(out)?;
    writeln!(out, "model     {}", model.display())?;
    writeln!(out, "pictures  {}", dir.join("plots").display())?;
    writeln!(out)?;
    writeln!(out, "what to try next:")?;
    let generate =
        format!("generate --model {} \"Once upon a time\"", quoted(&model.display().to_string()));
    writeln!(out, "  let it write         {}", invocation(&generate))?;
    Ok(())
}
