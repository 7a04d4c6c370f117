//! `attn leaderboard`: what each distilled student of a folder of runs came to and costs, beside its teacher, as one table.

use std::{
    io::Write,
    path::{Path, PathBuf},
    sync::atomic::AtomicBool,
};

use anyhow::{Context, Result, ensure};
use attn_core::{LoadOptions, Model};
use attn_data::{
    batch::Encoded,
    dataset::DatasetSpec,
    hub::{Hub, progress_bar},
};
use attn_eval::{
    Batching, Divergence, Texts, Verdict, Way, Writing, decoding_tokens_per_s, explain, state_bytes,
};

use crate::{
    args::LeaderboardArgs,
    blimp,
    distill::{Finished, Summary},
    generate::stop_ids,
    monitor::count_rows,
    run_dir,
    surgery::{describe, variants},
    sweep::csv_line,
    texts::{Folder, blocks, load_model, max_len, read_split, same_tokens},
};

/// Tokens that a prompt has, of short rows a quarter.
const PROMPT: usize = 32;

/// The columns, as results/SCHEMA.md has them.
const COLUMNS: [&str; 27] = [
    "run",
    "attention",
    "kl_at_swap",
    "kl_after_transfer",
    "kl_after_tune",
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

/// Nothing stops it but Ctrl-C, which ends the process.
static NEVER: AtomicBool = AtomicBool::new(false);

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
    let runs = finished(&args.dir)?;
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
    let options = LoadOptions { kind: args.compute.dtype.into(), device, ..LoadOptions::default() };
    let teacher = load_model(&folder.path, None, &options, &hub)
        .with_context(|| format!("cannot load the model `{}`", args.against))?;
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
    let names: Vec<Option<&(String, PathBuf, Summary)>> =
        std::iter::once(None).chain(runs.iter().map(Some)).collect();
    for one in names {
        let cells = match one {
            None => measure.cells("untouched", &untouched, None)?,
            Some((name, dir, summary)) => {
                let path = dir.join("model");
                let own = Folder::open(&path.display().to_string(), true, None, &hub)?;
                same_tokens(&own, &measure.folder)?;
                let model = load_model(&path, None, &options, &hub)
                    .with_context(|| format!("cannot load the model `{}`", path.display()))?;
                measure.cells(name, &model, Some(summary))?
            }
        };
        show(&cells, out)?;
        add(cells)?;
    }
    tracing::info!("wrote `{}`", args.out.display());
    Ok(())
}

/// The finished distillations in `dir`, by name.
fn finished(dir: &Path) -> Result<Vec<(String, PathBuf, Summary)>> {
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
        runs.extend(summary.map(|summary| (name, path, summary)));
    }
    ensure!(
        !runs.is_empty(),
        "no run in `{}` has finished: no folder in it holds `summary.json` and `model`\nhint: name the folder of a \
         sweep of distillations",
        dir.display()
    );
    runs.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(runs)
}

impl Measure<'_> {
    fn cells(&self, name: &str, model: &Model, summary: Option<&Summary>) -> Result<Vec<String>> {
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
        let mut progress = count_rows(rows.len(), &NEVER);
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

        // The run's own figures, of all rows that it reports on; of the teacher those of the rows here.
        let last: &Divergence = summary
            .map(|summary| summary.stages.last().map_or(&summary.at_swap, |stage| &stage.after))
            .unwrap_or(&told.divergence);
        let stage = |name: &str| -> Option<&Finished> {
            summary?.stages.iter().find(|stage| stage.stage == name)
        };
        let kl_after = |name| stage(name).map(|stage| stage.after.kl_nats_per_token);
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
            text(summary.map(|summary| summary.at_swap.kl_nats_per_token)),
            text(kl_after("transfer")),
            text(kl_after("tune")),
            text(Some(last.model.perplexity)),
            text(Some(last.top1_agreement)),
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
    let kl = ["kl_after_tune", "kl_after_transfer", "kl_at_swap"];
    let kl = kl.into_iter().find(|name| !cell(name).is_empty()).unwrap_or("kl_at_swap");
    writeln!(
        out,
        "  {:<28} {:>8} {:>8} {:>8} {:>7} {:>7} {:>9} {:>10} {:>10}  {}",
        cell("run"),
        number(kl, 1.0, 4),
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
