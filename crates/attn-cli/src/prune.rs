//! `attn prune`: a model without some of its heads, as a folder of its own.

use std::{io::Write, path::Path};

use anyhow::{Context, Result, bail, ensure};
use attn_core::{
    Config, LoadOptions, Model, ModelInput, Refitted, checkpoint::WriteOptions, refit,
};
use attn_data::{
    batch::{BatchPlan, Encoded, Side, collate},
    hub::{Hub, progress_bar},
};
use attn_eval::{
    Error, Head, Left, Order, Picked, Scope, Spent, Target, against_masked, attention_flops,
    in_full_shape, meet, n_parameters, pick, stats::Interval, to_input, without,
};
use serde::Serialize;
use tch::{Device, Kind};

use crate::{
    args::{PruneArgs, RowArgs, dtype_name},
    head_names::{QUERY_HEAD, name, parse, read_scores},
    memory::{self, Foreseen},
    monitor::grouped,
    origin::Origin,
    plot::draw_result,
    run_dir::SCHEMA,
    save::{Replace, check_free, write_with},
    task::{Task, dataset},
    texts::{Folder, load_model},
};

/// The file in the folder that says what was removed.
const FILE: &str = "pruning.json";

/// Rows of a batch that projections are fitted on.
const ROWS: usize = 32;

/// What a share of time may exceed the one asked for by without a word.
const TOLERANCE: f64 = 0.02;

/// Tokens for each unknown below which a fit is said to be of few.
const FEW_TOKENS: i64 = 10;

/// pruning.json.
#[derive(Serialize)]
struct Report {
    schema: u32,
    #[serde(flatten)]
    origin: Origin,
    model: String,
    /// The file of the scores, as typed.
    #[serde(skip_serializing_if = "Option::is_none")]
    scores: Option<String>,
    /// How heads were picked, where they were not named.
    #[serde(skip_serializing_if = "Option::is_none")]
    picked: Option<ByScore>,
    /// Which heads `removed` names.
    unit: &'static str,
    /// LAYER-HEAD, numbers of the model as it was.
    removed: Vec<String>,
    /// Heads with one score of which some were removed and some not.
    n_tied: usize,
    heads_before: Vec<i64>,
    heads_after: Vec<i64>,
    kv_heads_before: Vec<i64>,
    kv_heads_after: Vec<i64>,
    parameters_before: usize,
    parameters_after: usize,
    /// Of the attention layers, projections included, for one text of `flops_tokens` tokens.
    attention_flops_before: i64,
    attention_flops_after: i64,
    flops_tokens: i64,
    /// rms(removed − masked)/rms(masked) of what the model puts out for random tokens, before anything was fitted.
    removed_against_masked: f64,
    /// Who can load the folder.
    loads_in_transformers: Loads,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    refitted: Vec<Layer>,
    #[serde(skip_serializing_if = "Option::is_none")]
    target: Option<Met>,
}

#[derive(Serialize)]
struct ByScore {
    which: Order,
    per: Scope,
    seed: u64,
}

#[derive(Serialize)]
struct Met {
    what: &'static str,
    /// Rows and tokens of what was counted or timed.
    size: [i64; 2],
    /// Of one operation.
    threads: i32,
    /// As asked for.
    share: f64,
    /// What was reached.
    reached: f64,
    /// Of what is timed.
    #[serde(skip_serializing_if = "Option::is_none")]
    reached_interval_95: Option<Interval>,
}

/// A layer whose output projection was fitted anew.
#[derive(Serialize)]
pub(crate) struct Layer {
    pub(crate) layer: usize,
    pub(crate) n_tokens: i64,
    pub(crate) n_unknowns: i64,
    pub(crate) rank: i64,
    pub(crate) error_before: f64,
    pub(crate) error_after: f64,
}

/// Says that a fit is of few tokens, where it is; `flag` gives more.
pub(crate) fn warn_of_few_tokens(layer: &Layer, flag: &str) {
    let Layer { layer, n_tokens, n_unknowns, .. } = layer;
    if *n_tokens < FEW_TOKENS * n_unknowns {
        tracing::warn!(
            "layer {layer} was fitted to {n_tokens} tokens, with {n_unknowns} unknowns a channel: on other text it may be worse \
             than unfitted\nhint: a larger {flag}, or more text: {} tokens at least",
            FEW_TOKENS * n_unknowns
        );
    }
}

#[derive(Serialize, Clone, Copy, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
enum Loads {
    /// With the same logits.
    Yes,
    /// With the same logits, in the old shape: nothing is saved.
    FullShape,
    /// transformers has no words for such layers.
    No,
}

pub(crate) fn run(args: &PruneArgs, out: &mut dyn Write) -> Result<()> {
    check_free(&args.out)?;
    if let Some(threads) = args.threads {
        tch::set_num_threads(threads.get().into());
    }
    let target = args.target.as_deref().map(wanted).transpose()?;
    let hub = Hub::from_env().with_progress(progress_bar());
    let folder = Folder::open(&args.model, true, None, &hub)?;
    let config = folder.config.clone();
    let size = size(&args.latency_of, config.sizes.max_positions)?;
    // What cannot be is refused before the weights are read.
    let scores = scores(args, &config)?;
    let by_score = (Order::from(args.which), Scope::from(args.per), args.seed);
    let mut picked = match args.remove {
        Some(k) => {
            let (order, scope, seed) = by_score;
            pick(&scores, k, order, scope, seed).context("cannot use `--remove`")?
        }
        None => Picked { heads: named(args, &config)?, n_tied: 0 },
    };
    let refit_args = args.refit.as_ref().map(|task| RowArgs {
        task: task.clone(),
        split: args.split.clone(),
        limit: Some(args.limit),
        set: args.set.clone(),
        max_len: args.max_len,
        by_text: false,
        batch_size: ROWS,
    });
    let calibration = refit_args.as_ref().map(|rows| read_rows(args, rows, &hub)).transpose()?;

    // The model with fewer heads shares what is not theirs, unless what is left is fitted anew.
    let mut foreseen = Foreseen::model(&config, Kind::Float, false)?.copied(
        "the model without heads",
        Kind::Float,
        1,
    );
    if calibration.is_some() {
        let len = args.max_len.map_or(config.sizes.max_positions as u64, |most| most as u64);
        foreseen = foreseen
            .copied("the model without heads, fitted anew", Kind::Float, 1)
            .pass(memory::batch(ROWS, None, len, ROWS))
            .moments(config.layers.len(), 3);
    }
    foreseen.check(Device::Cpu, memory::OF_CHANGING)?;
    let options = LoadOptions { device: Device::Cpu, ..LoadOptions::default() };
    let whole = load_model(&folder.path, None, &options, &hub)
        .with_context(|| format!("cannot load the model `{}`", args.model))?;
    let mut met = None;
    if let Some((spent, share)) = target {
        let target = Target { spent, share, size };
        let found = meet(&whole, &scores, by_score, &target)
            .with_context(|| format!("cannot meet `--target {}={share}`", spent.name()))?;
        let Left { share: reached, interval_95: reached_interval_95 } = found.1;
        picked = found.0;
        let threads = tch::get_num_threads();
        if let Some(it) = reached_interval_95.filter(|it| it.high > share + TOLERANCE) {
            tracing::warn!(
                "a last look finds {reached:.3} left ({:.3} to {:.3}), where {share} was asked for: this machine is too noisy for the \
                 number of heads to mean much\nhint: nothing else running, or a larger --latency-of",
                it.low,
                it.high
            );
        }
        met = Some(Met { what: spent.name(), size, threads, share, reached, reached_interval_95 });
    }
    ensure!(!picked.heads.is_empty(), "no head is to go: there is nothing to write");

    let mut model = without(&whole, &picked.heads).context("cannot remove heads")?;
    let against_masked = against_masked(&whole, &model, &picked.heads)?;
    let mut refitted = Vec::new();
    if let Some(rows) = &calibration {
        model.own(&|_| true);
        let inputs = inputs(rows, &folder, &model)?;
        refitted = refit(&mut model, &whole, &inputs, args.ridge)
            .context("cannot fit the output projections anew (`--refit`)")?;
    }
    let heads =
        |of: &Model| -> Vec<i64> { of.layers().iter().map(|it| it.dims().n_heads).collect() };
    let kv =
        |of: &Model| -> Vec<i64> { of.layers().iter().map(|it| it.dims().n_kv_heads).collect() };
    let (heads_after, kv_heads_after) = (heads(&model), kv(&model));
    let mut written = match args.full_shape {
        true => in_full_shape(&whole, &model, &picked.heads).map_err(hint_full_shape)?,
        false => model,
    };
    let dtype = Kind::from(args.dtype);
    if dtype != written.kind() {
        written.own(&|_| true);
        written.to_kind(dtype);
    }
    let loads = match (args.full_shape, written.config().is_plain()) {
        (_, false) => Loads::No,
        (true, true) => Loads::FullShape,
        (false, true) => Loads::Yes,
    };
    let report = Report {
        unit: QUERY_HEAD,
        schema: SCHEMA,
        origin: Origin::now()?,
        model: args.model.clone(),
        scores: args
            .scores
            .as_ref()
            .filter(|_| by_score.0 != Order::Random)
            .map(|path| path.display().to_string()),
        picked: args.heads.is_empty().then_some(ByScore {
            which: by_score.0,
            per: by_score.1,
            seed: by_score.2,
        }),
        removed: picked.heads.iter().map(|&head| name(&config, head)).collect(),
        n_tied: picked.n_tied,
        heads_before: heads(&whole),
        heads_after,
        kv_heads_before: kv(&whole),
        kv_heads_after,
        parameters_before: n_parameters(&whole),
        parameters_after: n_parameters(&written),
        attention_flops_before: attention_flops(&whole, size[1]),
        attention_flops_after: attention_flops(&written, size[1]),
        flops_tokens: size[1],
        removed_against_masked: against_masked,
        loads_in_transformers: loads,
        refitted: refitted.iter().map(of_layer).collect(),
        target: met,
    };
    let extra = serde_json::to_vec_pretty(&report).context("cannot write JSON")?;
    let save = |draft: &Path| Ok(written.save(draft, &WriteOptions::default())?);
    write_with(&save, &folder.tokenizer, &args.out, &[(FILE, extra)], Replace::Nothing)?;
    let file = args.out.join(FILE);
    draw_result(&file, &file);
    print(&report, args, written.kind(), out)
}

pub(crate) fn of_layer(one: &Refitted) -> Layer {
    let &Refitted { layer, n_tokens, n_unknowns, rank, error_before, error_after } = one;
    Layer { layer, n_tokens, n_unknowns, rank, error_before, error_after }
}

/// Rows and tokens of what is counted or timed.
fn size(typed: &[usize], most: i64) -> Result<[i64; 2]> {
    match *typed {
        [] => Ok([16, most.min(64)]),
        [rows, tokens] if rows > 0 && (1..=most).contains(&(tokens as i64)) => {
            Ok([rows as i64, tokens as i64])
        }
        _ => bail!("`--latency-of` is {typed:?}, expected ROWS,TOKENS, up to {most} tokens"),
    }
}

/// The scores to go by, layers × heads: of random heads any do.
fn scores(args: &PruneArgs, config: &Config) -> Result<Vec<Vec<f64>>> {
    match &args.scores {
        Some(path) => Ok(read_scores(path, &args.model, config)?.scores),
        None if args.heads.is_empty() && Order::from(args.which) != Order::Random => {
            bail!(
                "`--remove` and `--target` go by scores\nhint: --scores SCORES.json, or --which random"
            )
        }
        None => Ok(config.layers.iter().map(|layer| vec![0.0; layer.n_heads as usize]).collect()),
    }
}

/// The heads of `--heads`, each once.
fn named(args: &PruneArgs, config: &Config) -> Result<Vec<Head>> {
    let named = args.heads.iter().map(|text| parse(config, text));
    let mut heads = named.collect::<Result<Vec<_>>>().context("cannot use `--heads`")?.concat();
    heads.sort_unstable();
    heads.dedup();
    Ok(heads)
}

fn hint_full_shape(error: Error) -> anyhow::Error {
    let is_entangled = matches!(error, Error::Entangled { .. });
    let error = anyhow::Error::new(error);
    match is_entangled {
        true => error.context("cannot use `--full-shape`\nhint: leave it out"),
        false => error,
    }
}

/// `flops=0.5`.
fn wanted(text: &str) -> Result<(Spent, f64)> {
    let problem =
        || format!("`--target` is `{text}`\nhint: write params=0.8, flops=0.5 or latency=0.9");
    let (what, share) = text.split_once('=').with_context(problem)?;
    let known = Spent::ALL.into_iter().find(|known| known.name() == what.trim());
    let share: f64 = share.trim().parse().with_context(problem)?;
    ensure!(
        share > 0.0 && share < 1.0,
        "`--target` asks for a share of {share}, expected between 0 and 1"
    );
    Ok((known.with_context(problem)?, share))
}

/// The rows that projections are fitted on.
fn read_rows(args: &PruneArgs, rows: &RowArgs, hub: &Hub) -> Result<Vec<Encoded>> {
    let data = dataset(&rows.task, &rows.set)?;
    let rows = RowArgs {
        split: Some(rows.split.clone().unwrap_or_else(|| data.train_split.clone())),
        ..rows.clone()
    };
    let folder = Folder::open(&args.model, true, None, hub)?;
    let task =
        Task::read(folder, &rows, data, None, hub).context("cannot read the rows of `--refit`")?;
    task.to_read()
}

fn inputs(rows: &[Encoded], folder: &Folder, model: &Model) -> Result<Vec<ModelInput>> {
    let lengths: Vec<usize> = rows.iter().map(|row| row.ids.len()).collect();
    let plan = BatchPlan::new(ROWS)?;
    let pad_id = folder.tokenizer.fill_id();
    let input = |places: Vec<usize>| {
        let batch: Vec<&Encoded> = places.iter().map(|&at| &rows[at]).collect();
        to_input(&collate(&batch, pad_id, Side::Right), model)
    };
    Ok(plan.by_length(&lengths).into_iter().map(input).collect())
}

fn print(report: &Report, args: &PruneArgs, kind: Kind, out: &mut dyn Write) -> Result<()> {
    let share = |before: f64, after: f64| 100.0 * (1.0 - after / before);
    let (params, flops) = (
        share(report.parameters_before as f64, report.parameters_after as f64),
        share(report.attention_flops_before as f64, report.attention_flops_after as f64),
    );
    let all: i64 = report.heads_before.iter().sum();
    let left: i64 = report.heads_after.iter().sum();
    writeln!(
        out,
        "{}: {left} of {all} query heads, {} parameters in {} ({params:.1} % fewer), {flops:.1} % fewer operations of \
         the attention layers",
        args.out.display(),
        grouped(report.parameters_after),
        dtype_name(kind)
    )?;
    writeln!(out, "removed: {}", report.removed.join(" "))?;
    writeln!(
        out,
        "heads by layer: {:?}, key/value heads {:?}",
        report.heads_after, report.kv_heads_after
    )?;
    if report.n_tied > 0 {
        writeln!(out, "{} heads had one score, and the seed chose among them", report.n_tied)?;
    }
    if let Some(Met { what, share, reached, reached_interval_95, .. }) = &report.target {
        let range = reached_interval_95
            .map(|it| format!(" ({:.3} to {:.3}, 95 %)", it.low, it.high))
            .unwrap_or_default();
        writeln!(out, "{what}: {reached:.3}{range} of what it was, {share} asked for")?;
    }
    let bare: Vec<String> = (0..report.heads_after.len())
        .filter(|&layer| report.heads_after[layer] == 0)
        .map(|layer| layer.to_string())
        .collect();
    if left == 0 {
        tracing::warn!("no layer has a head left: no token sees another");
    } else if !bare.is_empty() {
        tracing::info!("without a head: layers {}", bare.join(", "));
    }
    writeln!(
        out,
        "removed against masked: relative difference {:.1e}",
        report.removed_against_masked
    )?;
    for layer in &report.refitted {
        let Layer { layer: at, n_tokens, n_unknowns, rank, error_before, error_after } = layer;
        writeln!(
            out,
            "layer {at} fitted to {} tokens, rank {rank} of {n_unknowns}: error {error_before:.4} -> {error_after:.4} on these",
            grouped(*n_tokens as usize)
        )?;
        warn_of_few_tokens(layer, "--limit");
    }
    writeln!(
        out,
        "{}",
        match report.loads_in_transformers {
            Loads::Yes => "transformers loads the folder, with the same logits",
            Loads::FullShape =>
                "transformers loads the folder, with the same logits; in its full shape nothing is saved",
            Loads::No =>
                "transformers has no words for these layers and refuses the folder; --full-shape writes one that it loads",
        }
    )?;
    Ok(())
}
