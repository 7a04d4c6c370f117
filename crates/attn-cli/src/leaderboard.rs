//! `attn leaderboard`: what each distilled student of a folder of runs came to and costs, beside its teacher, as one table.

use std::{
    io::Write,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use attn_core::{LoadOptions, Model};
use attn_data::{
    batch::Encoded,
    dataset::DatasetSpec,
    hub::{Hub, progress_bar},
};
use attn_eval::{
    Batching, Texts, Verdict, Way, Writing, decoding_tokens_per_s, explain, state_bytes,
};
use tch::Kind;

use crate::{
    args::LeaderboardArgs,
    blimp,
    distill::Summary,
    generate::stop_ids,
    memory::{self, Foreseen, scored},
    monitor::count_every_row,
    run_dir::{self, TEACHER_FILE},
    surgery::{describe, variants},
    sweep::csv_line,
    texts::{Folder, blocks, load_model, max_len, read_split, same_tokens},
};

/// Tokens that a prompt has, of short rows a quarter.
const PROMPT: usize = 32;

/// The columns, as results/SCHEMA.md has them.
const COLUMNS: [&str; 29] = [
    "run",
    "attention",
    "teacher",
    "kl_at_swap",
    "kl_after_transfer",
    "kl_after_tune",
    "kl",
    "perplexity",
    "agreement",
    "kl_free_running",
    "free_running_ratio",
    "entropy_ratio",
    "rep_4",
    "rep_4_teacher",
    "distinct_2",
    "drawn_perplexity",
    "drawn_perplexity_teacher",
    "entities_kept",
    "entities_kept_teacher",
    "failed_tests",
    "blimp",
    "blimp_low",
    "blimp_high",
    "n_trained",
    "s_per_step",
    "decode_tokens_per_s",
    "state_bytes_1k",
    "state_bytes_16k",
    "peak_memory_mib",
];

/// What all models are measured with.
struct Measure<'a> {
    args: &'a LeaderboardArgs,
    folder: Folder,
    teacher: Model,
    rows: Vec<Encoded>,
    pairs: Option<blimp::Pairs>,
    max_len: usize,
}

pub(crate) fn run(args: &LeaderboardArgs, out: &mut dyn Write) -> Result<()> {
    let _made = run_dir::check_writable(&args.out)?;
    ensure!(args.prompts > 0, "`--prompts` is 0, expected at least 1");
    ensure!(args.rows > 0, "`--rows` is 0, expected at least 1");
    ensure!(
        args.compute.init.is_none(),
        "`--init` makes weights anew, and the table is of students as their runs left them\nhint: `attn eval --init \
         random` says what a model comes to that has learnt nothing"
    );
    let mut runs = finished(&args.dir)?;
    let device = args.compute.device()?;
    let hub = Hub::from_env().with_progress(progress_bar());
    let folder = Folder::open(&args.against, true, None, &hub)?;
    ensure!(
        folder.config.is_causal(),
        "`{}` is an encoder, and the table is of models that write\nhint: `attn eval --against` compares masked \
         language models",
        args.against
    );
    let source = DatasetSpec { source: args.task.clone(), ..DatasetSpec::default() };
    let data = DatasetSpec { label: None, text_pair: None, classes: None, ..source.resolved() };
    let split = args.split.as_deref().unwrap_or(&data.validation_split);
    let max_len = max_len(args.max_len, &folder.config, &folder.tokenizer, "`--max-len`")?;
    let texts = read_split(&data, split, None, &hub)?.rows;
    let mut rows = blocks(&folder.tokenizer, &texts, max_len)?;
    rows.truncate(args.rows);
    let pairs = match args.blimp_pairs {
        0 => None,
        limit => {
            let spec = DatasetSpec::known(blimp::TASK)?;
            Some(blimp::read(&spec, &spec.validation_split, Some(limit), &folder, &hub)?)
        }
    };
    let extent = scored(&Batching::default(), &rows);
    // The teacher is read in f32.
    Foreseen::model(&folder.config, Kind::Float, false)?
        .beside("a student", &folder.config, Kind::Float)?
        .pass(extent)
        .pass(extent)
        .cache((args.prompts as u64, max_len as u64))
        .with("predictions of both, in pieces", memory::PIECES)
        .check(device, memory::OF_SCORING)?;
    let options = LoadOptions { kind: args.compute.dtype.into(), device, ..LoadOptions::default() };
    // As it taught: in f32.
    let as_taught = LoadOptions { kind: Kind::Float, ..options.clone() };
    let mut teacher = load_model(&folder.path, None, &as_taught, &hub)
        .with_context(|| format!("cannot load the model `{}`", args.against))?;
    check_teachers(&mut runs, &teacher, &args.against)?;
    teacher.to_kind(options.kind);
    let measure = Measure { args, folder, teacher, rows, pairs, max_len };

    let mut table = csv_line(COLUMNS.map(str::to_owned).into_iter());
    let mut add = |cells: Vec<String>| -> Result<()> {
        assert_eq!(cells.len(), COLUMNS.len(), "a cell a column");
        table += &csv_line(cells.into_iter());
        // Whole after each run: what has been measured is kept where the next one fails.
        run_dir::write(&args.out, table.as_bytes())
    };
    writeln!(
        out,
        "  {:<28} {:>8} {:>8} {:>8} {:>7} {:>7} {:>9} {:>10} {:>10}  failed tests",
        "run", "KL", "ppl", "agree", "rep-4", "BLiMP", "tokens/s", "bytes 1k", "bytes 16k"
    )?;
    let untouched = measure.teacher.alias()?;
    for run in std::iter::once(None).chain(runs.iter().map(Some)) {
        let cells = match run {
            None => measure.cells("untouched", &untouched, None)?,
            Some(run) => {
                let path = run.dir.join("model");
                let own = Folder::open(&path.display().to_string(), true, None, &hub)?;
                same_tokens(&own, &measure.folder)?;
                let model = load_model(&path, None, &options, &hub)
                    .with_context(|| format!("cannot load the model `{}`", path.display()))?;
                measure.cells(&run.name, &model, Some(run))?
            }
        };
        show(&cells, out)?;
        add(cells)?;
    }
    tracing::info!("wrote `{}`", args.out.display());
    Ok(())
}

/// A distillation that has finished.
struct Finished {
    name: String,
    dir: PathBuf,
    summary: Summary,
    /// The SHA-256 of who taught, where the run's folder holds it.
    teacher: Option<String>,
}

/// Refuses students of another teacher, and says of which nothing is known.
fn check_teachers(runs: &mut [Finished], teacher: &Model, against: &str) -> Result<()> {
    let digest = teacher.digest()?;
    // Runs of earlier programs hold what tells fewer teachers apart.
    for run in runs.iter_mut() {
        run.teacher = run.teacher.take().filter(|found| found.len() == digest.len());
    }
    let named = |is_wanted: &dyn Fn(Option<&str>) -> bool| -> Vec<String> {
        let wanted = runs.iter().filter(|run| is_wanted(run.teacher.as_deref()));
        wanted.map(|run| format!("`{}` (taught by `{}`)", run.name, run.summary.teacher)).collect()
    };
    let others = named(&|found| found.is_some_and(|found| found != digest));
    if !others.is_empty() {
        bail!(
            "`--against` is `{against}`, which is not the teacher of {}: their `{TEACHER_FILE}` holds another SHA-256 than \
             its own, {digest}\nhint: name their teacher, or a folder without these runs",
            others.join(", ")
        );
    }
    let unknown = named(&|found| found.is_none());
    if !unknown.is_empty() {
        tracing::warn!(
            "no `{TEACHER_FILE}` says whether `{against}` is the teacher of {}: the column `teacher` is `unknown` there",
            unknown.join(", ")
        );
    }
    Ok(())
}

/// The finished distillations in `dir`, by name.
fn finished(dir: &Path) -> Result<Vec<Finished>> {
    let entries = std::fs::read_dir(dir)
        .with_context(|| format!("cannot read the folder of runs `{}`", dir.display()))?;
    let mut runs = Vec::new();
    for entry in entries {
        let path = entry.with_context(|| format!("cannot read `{}`", dir.display()))?.path();
        if !path.join("model").is_dir() {
            continue;
        }
        let summary = Summary::read(&path).with_context(|| {
            format!(
                "`{}` is no run of `attn distill`\nhint: name a folder of such runs",
                path.display()
            )
        })?;
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let Some(summary) = summary else { continue };
        let teacher = run_dir::read_json(&path.join(TEACHER_FILE))?;
        runs.push(Finished { name, dir: path, summary, teacher });
    }
    ensure!(
        !runs.is_empty(),
        "no run in `{}` has finished: no folder in it holds `summary.json` and `model`\nhint: name the folder of a \
         sweep of distillations",
        dir.display()
    );
    runs.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(runs)
}

impl Measure<'_> {
    fn cells(&self, name: &str, model: &Model, run: Option<&Finished>) -> Result<Vec<String>> {
        let Self { args, folder, teacher, rows, pairs, max_len } = self;
        tracing::info!("measuring `{name}`");
        let tokenizer = &folder.tokenizer;
        let batching = Batching { pad_id: tokenizer.fill_id(), ..Batching::default() };
        let prompt_len = PROMPT.min(max_len / 4).max(1);
        let n_new = (max_len - prompt_len).min(args.max_new_tokens).max(2);
        let decode = |ids: &[i64]| {
            tokenizer.decode(&ids.iter().map(|&id| id as u32).collect::<Vec<_>>(), true)
        };
        let stop_ids = stop_ids(&folder.path, tokenizer)?;
        let writing = Writing {
            n_prompts: args.prompts,
            prompt_len,
            max_new_tokens: n_new,
            seed: 0,
            stop_ids: &stop_ids,
            decode: &decode,
        };
        let mut progress = count_every_row(rows.len());
        let told = explain(model, teacher, rows, None, &writing, &batching, &mut progress)
            .with_context(|| format!("cannot measure `{name}`"))?;
        drop(progress);
        let of = |way: Way| told.written.iter().find(|written| written.way == way);
        let (greedy, drawn) = of(Way::Greedy).zip(of(Way::Drawn)).context("nothing was written")?;
        let check = |test: &str| told.checks.iter().find(|check| check.test == test);
        let failed: Vec<&str> = told
            .checks
            .iter()
            .filter(|check| check.verdict == Verdict::Failed)
            .map(|check| check.test.as_str())
            .collect();
        let blimp = match pairs {
            Some(pairs) => Some(blimp::score(model, pairs, &batching)?.all),
            None => None,
        };
        let prompt: Vec<i64> = rows[0].ids[..prompt_len].iter().map(|&id| id.into()).collect();
        let rate = decoding_tokens_per_s(model, &prompt, n_new)?;

        // The run's own figures, of the rows that it reports on; everything else is measured here, on the same rows for all.
        let summary = run.map(|run| &run.summary);
        let kl_after = |name: &str| {
            let stage = summary?.stages.iter().find(|stage| stage.stage == name);
            stage.map(|stage| stage.after.kl_nats_per_token)
        };
        let here = &told.divergence;
        let is_known = run.is_none_or(|run| run.teacher.is_some());
        let text = |value: Option<f64>| value.map_or(String::new(), |value| value.to_string());
        let rep_4 = |of: &Texts| of.wording.map(|found| found.rep_4);
        let n_trained = summary
            .map(|summary| summary.stages.iter().map(|stage| stage.n_trained).max().unwrap_or(0));
        let per_step = summary
            .and_then(|summary| summary.stages.last())
            .filter(|stage| stage.total_steps > 0)
            .map(|stage| stage.elapsed_s / stage.total_steps as f64);
        let attention = variants(model);
        Ok(vec![
            name.to_owned(),
            describe(&attention).unwrap_or_else(|| "softmax".into()),
            if is_known { "same" } else { "unknown" }.to_owned(),
            text(summary.map(|summary| summary.at_swap.kl_nats_per_token)),
            text(kl_after("transfer")),
            text(kl_after("tune")),
            text(Some(here.kl_nats_per_token)),
            text(Some(here.model.perplexity)),
            text(Some(here.top1_agreement)),
            text(Some(drawn.kl_free_running)),
            text(check("free_running_over_teacher_forced").and_then(|check| check.value)),
            text(check("entropy_ratio").and_then(|check| check.value)),
            text(rep_4(&greedy.model)),
            text(rep_4(&greedy.baseline)),
            text(drawn.model.wording.map(|found| found.distinct_2)),
            text(Some(drawn.model.perplexity_by_baseline)),
            text(Some(drawn.baseline.perplexity_by_baseline)),
            text(drawn.model.entities_kept),
            text(drawn.baseline.entities_kept),
            failed.join(" "),
            text(blimp.map(|score| score.accuracy)),
            text(blimp.map(|score| score.interval_95.low)),
            text(blimp.map(|score| score.interval_95.high)),
            n_trained.map_or(String::new(), |n| n.to_string()),
            text(per_step),
            text(Some(rate)),
            state_bytes(model, 1 << 10)?.to_string(),
            state_bytes(model, 1 << 14)?.to_string(),
            summary
                .and_then(|summary| summary.peak_memory_mib)
                .map_or(String::new(), |mib| mib.to_string()),
        ])
    }
}

fn show(cells: &[String], out: &mut dyn Write) -> Result<()> {
    let cell = |name: &str| {
        let at = COLUMNS.iter().position(|column| *column == name).expect("a name of a column");
        cells[at].as_str()
    };
    let number = |name: &str, scale: f64, digits: usize| match cell(name).parse::<f64>() {
        Ok(value) => format!("{:.digits$}", value * scale),
        Err(_) => "-".into(),
    };
    writeln!(
        out,
        "  {:<28} {:>8} {:>8} {:>8} {:>7} {:>7} {:>9} {:>10} {:>10}  {}",
        cell("run"),
        number("kl", 1.0, 4),
        number("perplexity", 1.0, 2),
        number("agreement", 100.0, 1),
        number("rep_4", 1.0, 3),
        number("blimp", 100.0, 1),
        number("decode_tokens_per_s", 1.0, 0),
        cell("state_bytes_1k"),
        cell("state_bytes_16k"),
        cell("failed_tests")
    )?;
    out.flush()?;
    Ok(())
}
