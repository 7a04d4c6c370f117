//! `attn prune`: a model without some of its heads, as a folder of its own.

use std::{io::Write, time::Instant};

use anyhow::{Context, Result, bail, ensure};
use attn_core::{
    ForwardOptions, LoadOptions, Model, ModelInput, Refitted, checkpoint::WriteOptions, refit,
};
use attn_data::{
    batch::{BatchPlan, Encoded, Side, collate},
    hub::{Hub, progress_bar},
};
use attn_eval::{Head, MaskFill, Order, Picked, Scope, closed, pick, to_input};
use serde::Serialize;
use tch::{Device, Kind, Tensor};

use crate::{
    args::{PruneArgs, RowArgs, dtype_name},
    head_names::{QUERY_HEAD, name, parse, read_scores},
    monitor::grouped,
    run_dir::SCHEMA,
    save::{check_free, write_with},
    task::{Task, dataset},
    texts::{Folder, load_model},
};

/// The file in the folder that says what was removed.
const FILE: &str = "pruning.json";

/// Rows of a batch that projections are fitted on.
const ROWS: usize = 32;

/// Tokens for each unknown below which a fit is said to be of few.
const FEW_TOKENS: i64 = 10;

/// Passes of which the fastest counts.
const N_PASSES: usize = 7;

/// pruning.json.
#[derive(Serialize)]
struct Report {
    schema: u32,
    attn: &'static str,
    model: String,
    /// The file of the scores, as typed.
    #[serde(skip_serializing_if = "Option::is_none")]
    scores: Option<String>,
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
    target: Option<Target>,
}

#[derive(Serialize)]
struct Target {
    what: &'static str,
    /// As asked for.
    share: f64,
    /// What was reached.
    reached: f64,
}

/// A layer whose output projection was fitted anew.
#[derive(Serialize)]
struct Layer {
    layer: usize,
    n_tokens: i64,
    n_unknowns: i64,
    rank: i64,
    error_before: f64,
    error_after: f64,
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
    let &[rows, tokens] = args.latency_of.as_slice() else {
        bail!("`--latency-of` is {:?}, expected ROWS,TOKENS", args.latency_of);
    };
    ensure!(rows > 0 && tokens > 0, "`--latency-of` is {rows},{tokens}, expected at least 1,1");
    let hub = Hub::from_env().with_progress(progress_bar());
    let folder = Folder::open(&args.model, true, None, &hub)?;
    let config = folder.config.clone();
    let scores =
        args.scores.as_deref().map(|path| read_scores(path, &args.model, &config)).transpose()?;
    // What cannot be is refused before the weights are read.
    let mut picked = match (&scores, args.remove) {
        (Some(scores), Some(k)) => by_scores(&scores.scores, k, args)?,
        (Some(_), None) => Picked { heads: Vec::new(), n_tied: 0 },
        (None, _) => {
            let named = args.heads.iter().map(|text| parse(&config, text));
            let mut heads =
                named.collect::<Result<Vec<_>>>().context("cannot use `--heads`")?.concat();
            heads.sort_unstable();
            heads.dedup();
            Picked { heads, n_tied: 0 }
        }
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

    let options = LoadOptions { device: Device::Cpu, ..LoadOptions::default() };
    let whole = load_model(&folder.path, None, &options, &hub)
        .with_context(|| format!("cannot load the model `{}`", args.model))?;
    let flops_tokens = (tokens as i64).min(config.sizes.max_positions);
    let mut reached = None;
    if let (Some((what, share)), Some(scores)) = (target, &scores) {
        let measure = |model: &Model| cost(model, what, [rows as i64, flops_tokens]);
        let (found, got) = meet(&whole, &scores.scores, (what, share), args, &measure)?;
        picked = found;
        reached = Some(Target { what, share, reached: got });
    }
    ensure!(!picked.heads.is_empty(), "no head is to go: there is nothing to write");

    let mut model = without(&whole, &picked.heads)?;
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
        true => in_full_shape(&whole, &model, &picked.heads)?,
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
        attn: env!("CARGO_PKG_VERSION"),
        model: args.model.clone(),
        scores: args.scores.as_ref().map(|path| path.display().to_string()),
        removed: picked.heads.iter().map(|&head| name(&config, head)).collect(),
        n_tied: picked.n_tied,
        heads_before: heads(&whole),
        heads_after,
        kv_heads_before: kv(&whole),
        kv_heads_after,
        parameters_before: n_parameters(&whole),
        parameters_after: n_parameters(&written),
        attention_flops_before: attention_flops(&whole, flops_tokens),
        attention_flops_after: attention_flops(&written, flops_tokens),
        flops_tokens,
        removed_against_masked: against_masked,
        loads_in_transformers: loads,
        refitted: refitted.iter().map(of_layer).collect(),
        target: reached,
    };
    let extra = serde_json::to_vec_pretty(&report).context("cannot write JSON")?;
    write_with(&written, &folder.tokenizer, &args.out, &WriteOptions::default(), &[(FILE, extra)])?;
    print(&report, args, written.kind(), out)
}

fn of_layer(one: &Refitted) -> Layer {
    let &Refitted { layer, n_tokens, n_unknowns, rank, error_before, error_after } = one;
    Layer { layer, n_tokens, n_unknowns, rank, error_before, error_after }
}

fn by_scores(scores: &[Vec<f64>], k: usize, args: &PruneArgs) -> Result<Picked> {
    pick(scores, k, Order::from(args.which), Scope::from(args.per), args.seed)
        .context("cannot use `--remove`")
}

/// `flops=0.5`.
fn wanted(text: &str) -> Result<(&'static str, f64)> {
    let problem =
        || format!("`--target` is `{text}`\nhint: write params=0.8, flops=0.5 or latency=0.9");
    let (what, share) = text.split_once('=').with_context(problem)?;
    let known = ["params", "flops", "latency"];
    let what = known.into_iter().find(|known| *known == what.trim()).with_context(problem)?;
    let share: f64 = share.trim().parse().with_context(problem)?;
    ensure!(
        share > 0.0 && share < 1.0,
        "`--target` asks for a share of {share}, expected between 0 and 1"
    );
    Ok((what, share))
}

/// What a model costs: values, operations of its attention layers, or seconds of a pass over `size` random tokens.
fn cost(model: &Model, what: &str, size: [i64; 2]) -> Result<f64> {
    Ok(match what {
        "params" => n_parameters(model) as f64,
        "flops" => attention_flops(model, size[1]) as f64,
        _ => {
            let input = random_input(model, size);
            let mut fastest = f64::INFINITY;
            for _ in 0..N_PASSES {
                let start = Instant::now();
                tch::no_grad(|| model.forward(&input, &ForwardOptions::default()))?;
                fastest = fastest.min(start.elapsed().as_secs_f64());
            }
            fastest
        }
    })
}

/// The fewest heads, those of the lowest scores first, without which the model costs at most the share that is asked for.
fn meet(
    whole: &Model,
    scores: &[Vec<f64>],
    (what, share): (&str, f64),
    args: &PruneArgs,
    measure: &dyn Fn(&Model) -> Result<f64>,
) -> Result<(Picked, f64)> {
    let full = measure(whole)?;
    let most = match Scope::from(args.per) {
        Scope::Global => scores.iter().map(Vec::len).sum(),
        Scope::Layer => scores.iter().map(Vec::len).min().unwrap_or(0),
    };
    let at = |k: usize| -> Result<(Picked, f64)> {
        let picked = by_scores(scores, k, args)?;
        let left = measure(&without(whole, &picked.heads)?)? / full;
        Ok((picked, left))
    };
    let (least, left) = at(most)?;
    ensure!(
        left <= share,
        "`--target` {what}={share} cannot be met: without {} heads {:.3} is left\nhint: the rest of the model is not \
         made of heads",
        least.heads.len(),
        left
    );
    // Each head less costs less: the first that is enough lies between one that is not and one that is.
    let (mut low, mut high, mut best) = (0, most, (least, left));
    while low + 1 < high {
        let middle = low.midpoint(high);
        let found = at(middle)?;
        if found.1 <= share {
            (high, best) = (middle, found);
        } else {
            low = middle;
        }
    }
    Ok(best)
}

fn n_parameters(model: &Model) -> usize {
    model.parameters().iter().map(|(_, tensor)| tensor.numel()).sum()
}

/// Operations of the attention layers on one text of `n` tokens.
fn attention_flops(model: &Model, n: i64) -> i64 {
    model.layers().iter().map(|layer| layer.flops(n)).sum()
}

/// `whole` without `heads`; what is not cut lies in the same memory.
fn without(whole: &Model, heads: &[Head]) -> Result<Model> {
    let mut model = whole.alias()?;
    for layer in 0..whole.layers().len() {
        let goes = |place: i64| heads.contains(&Head { layer, place: place as usize });
        let all = whole.layers()[layer].dims().n_heads;
        let kept: Vec<i64> = (0..all).filter(|&place| !goes(place)).collect();
        if kept.len() < all as usize {
            model
                .select_heads(layer, &kept)
                .with_context(|| format!("cannot remove heads of layer {layer}"))?;
        }
    }
    Ok(model)
}

fn random_input(model: &Model, [rows, n]: [i64; 2]) -> ModelInput {
    // Any ids do; a fixed pattern is the same on every machine.
    let vocab_size = model.config().sizes.vocab_size;
    let ids: Vec<i64> = (0..rows * n).map(|at| (at * 7919 + at * at * 31) % vocab_size).collect();
    let input = |ids: &[i64]| {
        ModelInput::new(Tensor::from_slice(ids).view([rows, n]).to_device(model.device()))
    };
    match model.needs_source() {
        true => input(&ids).attending_to(input(&ids)),
        false => input(&ids),
    }
}

/// How far what is left puts out something else than the whole model with these heads masked.
fn against_masked(whole: &Model, cut: &Model, heads: &[Head]) -> Result<f64> {
    let input = random_input(whole, [2, whole.config().sizes.max_positions.clamp(1, 32)]);
    let places: Vec<(usize, usize)> = heads.iter().map(|head| (head.layer, head.place)).collect();
    let gates = closed(whole, &places, MaskFill::Zero);
    let masked = ForwardOptions { gates: &gates, ..ForwardOptions::default() };
    let (masked, removed) = tch::no_grad(|| -> Result<_> {
        let removed = cut.forward(&input, &ForwardOptions::default())?.logits;
        Ok((whole.forward(&input, &masked)?.logits, removed))
    })?;
    let rms =
        |x: Tensor| x.to_kind(Kind::Double).square().mean(Kind::Double).sqrt().double_value(&[]);
    Ok(rms(&removed - &masked) / rms(masked))
}

/// `whole` with the output projections of `cut`, those of the heads that are gone at zero.
fn in_full_shape(whole: &Model, cut: &Model, heads: &[Head]) -> Result<Model> {
    let mut full = whole.alias()?;
    full.own(&|_| true);
    tch::no_grad(|| {
        for (layer, (it, of_cut)) in full.layers().into_iter().zip(cut.layers()).enumerate() {
            let d = it.dims().head_dim;
            let kept = (0..it.dims().n_heads)
                .filter(|&place| !heads.contains(&Head { layer, place: place as usize }));
            let columns: Vec<i64> = kept.flat_map(|place| place * d..(place + 1) * d).collect();
            let mut weight = it.out().out_in();
            let _ = weight.zero_();
            let _ = weight.index_copy_(1, &Tensor::from_slice(&columns), &of_cut.out().out_in());
            if let (Some(bias), Some(of_cut)) = (&it.out().bias, &of_cut.out().bias) {
                bias.shallow_clone().copy_(of_cut);
            }
        }
    });
    // A kind whose heads are not each other's business alone computes something else without them.
    let input = random_input(whole, [2, whole.config().sizes.max_positions.clamp(1, 32)]);
    let logits = |of: &Model| -> Result<Tensor> {
        Ok(tch::no_grad(|| of.forward(&input, &ForwardOptions::default()))?
            .logits
            .to_kind(Kind::Double))
    };
    let (here, there) = (logits(&full)?, logits(cut)?);
    let apart = (&here - &there).square().mean(Kind::Double).sqrt().double_value(&[]);
    let size = there.square().mean(Kind::Double).sqrt().double_value(&[]);
    ensure!(
        apart <= 1e-4 * size,
        "the model in its full shape computes something else than the one without the heads (relative {:.1e}): the heads \
         of its attention depend on each other\nhint: leave out `--full-shape`",
        apart / size
    );
    Ok(full)
}

/// The rows that projections are fitted on.
fn read_rows(args: &PruneArgs, rows: &RowArgs, hub: &Hub) -> Result<Vec<Encoded>> {
    let data = dataset(&rows.task, &rows.set)?;
    let rows = RowArgs {
        split: Some(rows.split.clone().unwrap_or_else(|| data.train_split.clone())),
        ..rows.clone()
    };
    let folder = Folder::open(&args.model, true, None, hub)?;
    let has_label = data.label.is_some();
    let task =
        Task::read(folder, &rows, data, None, hub).context("cannot read the rows of `--refit`")?;
    match has_label && !task.packs() {
        true => task.encoded(),
        false => task.unlabelled(),
    }
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
    if let Some(Target { what, share, reached }) = &report.target {
        writeln!(out, "{what}: {reached:.3} of what it was, {share} asked for")?;
    }
    writeln!(
        out,
        "removed against masked: relative difference {:.1e}",
        report.removed_against_masked
    )?;
    for Layer { layer, n_tokens, n_unknowns, rank, error_before, error_after } in &report.refitted {
        writeln!(
            out,
            "layer {layer} fitted to {} tokens, rank {rank} of {n_unknowns}: error {error_before:.4} -> {error_after:.4} on these",
            grouped(*n_tokens as usize)
        )?;
        if *n_tokens < FEW_TOKENS * n_unknowns {
            tracing::warn!(
                "layer {layer} was fitted to {n_tokens} tokens, with {n_unknowns} unknowns a channel: on other text it may be worse \
                 than unfitted\nhint: a larger --limit, or more rows: {} tokens at least",
                FEW_TOKENS * n_unknowns
            );
        }
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
