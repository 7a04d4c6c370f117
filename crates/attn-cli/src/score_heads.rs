//! `attn score-heads`: what each head does for a task.

use std::{
    collections::HashMap,
    io::Write,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context, Result, bail, ensure};
use arrow::{
    array::{ArrayRef, Float64Array, Int32Array, RecordBatch},
    datatypes::{DataType, Field, Schema},
};
use attn_data::hub::{Hub, progress_bar};
use attn_eval::{
    Batching, Goal, Head, HeadScores, Learning, Method, Normalize, RowLoss, learn_gates,
    score_heads, score_iteratively, stats::Interval,
};
use parquet::arrow::ArrowWriter;
use serde::Serialize;
use serde_json::Value;

use crate::{
    args::{Gates, ScoreHeadsArgs, ScoreMethod, ScoreNormalize},
    head_names::{QUERY_HEAD, loss_and_rows, numbered, range, warn_of_few},
    memory::{self, Foreseen, batch},
    monitor::{count_every_row, grouped},
    plot::write_result,
    run_dir::{self, check_writable},
    subject::{Subject, shared_kv},
    task::{Task, Which, dataset},
};

/// Most positions of a batch: a gradient pass keeps all that it computed for the way back.
const MAX_TOKENS: usize = 2048;

/// Heads that are shown at either end of the ranking.
const N_SHOWN: usize = 5;

/// Up to so many heads are all shown.
const NEARLY_ALL: usize = 2 * N_SHOWN;

/// OUT.json.
#[derive(Serialize)]
struct Report<'a> {
    #[serde(flatten)]
    subject: Subject<'a>,
    #[serde(flatten)]
    which: Which<'a>,
    method: &'static str,
    /// Which heads are meant.
    unit: &'static str,
    /// The key/value head that each reads, where heads share one.
    #[serde(skip_serializing_if = "Option::is_none")]
    kv_of_head: Option<Vec<Vec<i64>>>,
    /// How gates were learned.
    #[serde(skip_serializing_if = "Option::is_none")]
    learning: Option<Gating>,
    normalize: Normalize,
    /// Share of all heads that goes at a step, where a score is the step.
    #[serde(skip_serializing_if = "Option::is_none")]
    iterative: Option<f64>,
    /// Whose gradient it was.
    loss: &'static str,
    /// Seed of the tokens that were hidden.
    #[serde(skip_serializing_if = "Option::is_none")]
    mask_seed: Option<u64>,
    /// Heads that score exactly 0.
    n_zero: usize,
    /// Heads with the very score of another.
    n_tied: usize,
    #[serde(flatten)]
    scores: HeadScores,
}

/// How gates were learned.
#[derive(Serialize)]
struct Gating {
    gate_cost: f64,
    /// Heads that stay; null: half of them.
    keep: Option<usize>,
    steps: usize,
    lr: f64,
}

impl Gating {
    fn of(args: &ScoreHeadsArgs) -> Self {
        let &ScoreHeadsArgs { gate_cost, keep, gate_steps: steps, gate_lr: lr, .. } = args;
        Self { gate_cost, keep, steps, lr }
    }
}

pub(crate) fn run(args: &ScoreHeadsArgs, out: &mut dyn Write) -> Result<()> {
    let many = args.method.len() > 1;
    let paths: Vec<PathBuf> =
        args.method.iter().map(|method| of_method(&args.out, many, *method)).collect();
    let tables: Option<Vec<PathBuf>> = args
        .table
        .as_ref()
        .map(|table| args.method.iter().map(|method| of_method(table, many, *method)).collect());
    let all = paths.iter().chain(tables.iter().flatten());
    let _made = all.map(|path| check_writable(path)).collect::<Result<Vec<_>>>()?;
    if let Some(share) = args.iterative {
        ensure!(
            share > 0.0 && share <= 1.0,
            "`--iterative` is {share}, expected more than 0 and at most 1"
        );
        ensure!(
            args.normalize == ScoreNormalize::None,
            "`--normalize` divides scores, and those of `--iterative` are steps\nhint: leave one of them out"
        );
        let is_by_rows = |method: &ScoreMethod| matches!(method, ScoreMethod::Rows(_));
        ensure!(
            args.method.iter().all(is_by_rows),
            "`--iterative` scores what is left anew, and gates are learned for all heads at once\nhint: leave one of them out"
        );
    }
    let data = dataset(&args.rows.task, &args.rows.set)?;
    args.compute.device()?;
    let hub = Hub::from_env().with_progress(progress_bar());
    let task = Task::open(&args.model, &args.rows, data, None, &args.compute, &hub)?;
    let n_heads: i64 = task.folder.config.layers.iter().map(|layer| layer.n_heads).sum();
    if let Some(keep) = args.keep.filter(|&keep| keep as i64 > n_heads) {
        bail!(
            "`--keep` is {keep}, and the model has {n_heads} heads\nhint: heads that stay, fewer than all"
        );
    }
    let (most, len) = task.extent();
    let (rows, len) = batch(most as usize, Some(MAX_TOKENS), len, usize::MAX);
    let of = &task.folder.config;
    Foreseen::computing(of, &args.compute)?
        .backward((rows, len))
        .row_loss((rows, len), of, 4)
        .check(args.compute.device()?, memory::OF_SCORING)?;
    let model = task.load(&args.compute, args.seed, &hub)?;

    let masking = task.masking()?;
    let (of, rows) = loss_and_rows(&task, &model, masking.as_ref(), args.seed)?;
    let own = RowLoss::Own { of: &of, seed: args.seed };
    let loss = if args.own_output { own } else { of };
    let batching = Batching { max_tokens: Some(MAX_TOKENS), ..task.batching() };
    let mut progress = count_every_row(rows.len());
    let context = || format!("cannot score the heads of `{}`", args.model);
    // Those by rows share passes, but where what is left is scored anew at each step.
    let by_rows = |method: &ScoreMethod| match method {
        ScoreMethod::Rows(method) => Some(*method),
        ScoreMethod::Learned(_) | ScoreMethod::Needles(_) => None,
    };
    let of_rows: Vec<Method> = args.method.iter().filter_map(by_rows).collect();
    let found = match args.iterative {
        None => score_heads(&model, &rows, &of_rows, &loss, &batching, &mut progress),
        Some(share) => {
            let mut by_steps = |&method: &Method| {
                score_iteratively(&model, &rows, method, share, &loss, &batching, &mut progress)
            };
            of_rows.iter().map(&mut by_steps).collect()
        }
    };
    let mut found = found.with_context(context)?.into_iter();
    let mut all = Vec::new();
    for method in &args.method {
        let ScoreMethod::Learned(gates) = method else {
            all.push(found.next().expect("one of each method by rows"));
            continue;
        };
        let goal = match gates {
            Gates::HardConcrete => Goal::HardConcrete { lambda: args.gate_cost },
            Gates::Subset => Goal::Subset { keep: args.keep.unwrap_or(n_heads as usize / 2) },
        };
        let learning = Learning { goal, steps: args.gate_steps, lr: args.gate_lr, seed: args.seed };
        let learned = learn_gates(&model, &rows, &learning, &loss, &batching, &mut progress);
        all.push(HeadScores::learned(&model, learned.with_context(context)?, rows.len()));
    }
    drop(progress);
    for (at, (scores, &method)) in all.into_iter().zip(&args.method).enumerate() {
        let scores = scores.normalized(args.normalize.into());
        if at > 0 {
            writeln!(out)?;
        }
        print(&scores, &loss, method.name(), out)?;
        let report = Report {
            unit: QUERY_HEAD,
            kv_of_head: shared_kv(&model),
            subject: Subject::new(&args.model, &args.compute, &model)?,
            which: task.which(),
            method: method.name(),
            learning: matches!(method, ScoreMethod::Learned(_)).then_some(args).map(Gating::of),
            normalize: args.normalize.into(),
            iterative: args.iterative,
            loss: loss.name(),
            mask_seed: masking.is_some().then_some(args.seed),
            n_zero: scores.n_zero(),
            n_tied: scores.n_tied(),
            scores,
        };
        if let Some(tables) = &tables {
            write_table(&tables[at], &report)?;
            tracing::info!("wrote `{}`", tables[at].display());
        }
        write_result(&paths[at], &report, None)?;
    }
    Ok(())
}

/// The file of one of several methods: `scores.json` as `scores.michel.json`.
fn of_method(path: &Path, many: bool, method: ScoreMethod) -> PathBuf {
    let extension =
        path.extension().map_or_else(String::new, |it| it.to_string_lossy().into_owned());
    match many {
        true => path.with_extension(format!("{}.{extension}", method.name()).trim_end_matches('.')),
        false => path.to_owned(),
    }
}

/// The ends of the ranking, and what cannot be ranked.
fn print(scores: &HeadScores, loss: &RowLoss<'_>, method: &str, out: &mut dyn Write) -> Result<()> {
    let ranked = scores.ranked();
    let n_heads = ranked.len();
    if scores.interval_95.is_some() {
        warn_of_few(scores.n_rows);
    }
    writeln!(
        out,
        "{}: {} query heads by {} rows, loss {}\n",
        method,
        grouped(n_heads),
        grouped(scores.n_rows),
        loss.name()
    )?;
    writeln!(out, "{:>12} {:>11}   95 % interval", "layer-head", "score")?;
    let (first, last) = match n_heads {
        0..=NEARLY_ALL => (&ranked[..], &ranked[n_heads..]),
        _ => (&ranked[..N_SHOWN], &ranked[n_heads - N_SHOWN..]),
    };
    let show = |heads: &[Head], out: &mut dyn Write| -> Result<()> {
        for &head in heads {
            writeln!(
                out,
                "{:>12} {:>11.3e}   {}",
                numbered(&scores.heads, head),
                head.of(&scores.scores),
                range(scores.interval_of(head), |x| format!("{x:.2e}"))
            )?;
        }
        Ok(())
    };
    show(first, out)?;
    if !last.is_empty() {
        writeln!(out, "{:>12}", "...")?;
        show(last, out)?;
    }
    if method == Method::Open.name() {
        let shares: Vec<f64> = scores.scores.concat();
        let mean = shares.iter().sum::<f64>() / shares.len() as f64;
        writeln!(out, "\non average {:.1} % of the heads run", 100.0 * mean)?;
    }
    let n_zero = scores.n_zero();
    if n_zero > 0 {
        writeln!(out, "\n{n_zero} of {n_heads} heads score exactly 0")?;
    }
    let n_tied = scores.n_tied();
    if n_tied > 0 {
        writeln!(out, "\n{n_tied} heads have the very score of another: their order says nothing")?;
    }
    Ok(())
}

/// A row a head, as results/SCHEMA.md describes it.
fn write_table(path: &Path, report: &Report<'_>) -> Result<()> {
    let HeadScores { heads, scores, interval_95, n_rows } = &report.scores;
    let int = |name| Field::new(name, DataType::Int32, false);
    let float = |name| Field::new(name, DataType::Float64, false);
    let bound = |name| Field::new(name, DataType::Float64, true);
    let fields = vec![int("layer"), int("head"), float("score"), bound("low"), bound("high")];
    let text = |value: Result<Value, serde_json::Error>| -> Result<String> {
        let value = value?;
        Ok(value.as_str().map_or_else(|| value.to_string(), str::to_owned))
    };
    let metadata = HashMap::from([
        ("schema".to_owned(), run_dir::SCHEMA.to_string()),
        ("attn".to_owned(), env!("CARGO_PKG_VERSION").to_owned()),
        ("model".to_owned(), report.subject.model().to_owned()),
        ("task".to_owned(), report.which.task.to_owned()),
        ("split".to_owned(), report.which.split.to_owned()),
        ("method".to_owned(), report.method.to_owned()),
        ("normalize".to_owned(), text(serde_json::to_value(report.normalize))?),
        ("loss".to_owned(), report.loss.to_owned()),
        ("n_rows".to_owned(), n_rows.to_string()),
    ]);
    let schema = Arc::new(Schema::new_with_metadata(fields, metadata));
    let n_heads = heads.iter().flatten().count();
    let layers = heads.iter().enumerate().flat_map(|(layer, of)| vec![layer as i32; of.len()]);
    let heads = heads.iter().flatten().map(|&head| head as i32);
    let bound = |bound: fn(&Interval) -> f64| -> ArrayRef {
        let all = interval_95.as_ref().map(|all| all.iter().flatten().map(bound).collect());
        Arc::new(all.unwrap_or_else(|| Float64Array::new_null(n_heads)))
    };
    let columns: Vec<ArrayRef> = vec![
        Arc::new(Int32Array::from_iter_values(layers)),
        Arc::new(Int32Array::from_iter_values(heads)),
        Arc::new(Float64Array::from_iter_values(scores.iter().flatten().copied())),
        bound(|interval| interval.low),
        bound(|interval| interval.high),
    ];
    let table = || -> Result<Vec<u8>> {
        let mut writer = ArrowWriter::try_new(Vec::new(), Arc::clone(&schema), None)?;
        writer.write(&RecordBatch::try_new(schema, columns)?)?;
        Ok(writer.into_inner()?)
    };
    run_dir::write(path, &table().context("cannot make a table of the scores")?)
}
