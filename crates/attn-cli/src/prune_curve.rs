//! `attn prune-curve`: what it costs to leave out more and more heads.

use std::io::Write;

use anyhow::{Context, Result, ensure};
use attn_data::hub::{Hub, progress_bar};
use attn_eval::{ByScore, Curve, Grid, Order, RandomBand, RowLoss, Scope, curve};
use serde::Serialize;

use crate::{
    args::PruneCurveArgs,
    head_names::{QUERY_HEAD, calibration, loss_and_rows, read_scores, replacement, warn_of_few},
    memory::{self, Foreseen},
    monitor::count_every_row,
    plot::write_result,
    run_dir::check_writable,
    subject::Subject,
    task::{Task, Which, dataset},
};

/// Fewest random choices: a band of fewer says little.
const FEWEST_DRAWS: usize = 20;

/// OUT.json.
#[derive(Serialize)]
struct Report<'a> {
    #[serde(flatten)]
    subject: Subject<'a>,
    #[serde(flatten)]
    which: Which<'a>,
    /// The files of the scores, as typed.
    scores: Vec<String>,
    /// Which heads are meant.
    unit: &'static str,
    replace: &'static str,
    scope: Scope,
    loss_kind: &'static str,
    seed: u64,
    #[serde(flatten)]
    curve: Curve,
}

pub(crate) fn run(args: &PruneCurveArgs, out: &mut dyn Write) -> Result<()> {
    let _made = check_writable(&args.out)?;
    let _made_too = args.plot.as_deref().map(check_writable).transpose()?;
    ensure!(
        args.draws >= FEWEST_DRAWS,
        "`--draws` is {}, expected at least {FEWEST_DRAWS}",
        args.draws
    );
    let data = dataset(&args.rows.task, &args.rows.set)?;
    args.compute.device()?;
    let hub = Hub::from_env().with_progress(progress_bar());
    let task = Task::open(&args.model, &args.rows, data, None, &args.compute, &hub)?;
    let config = &task.folder.config;
    let scores = args.scores.iter().map(|path| Ok(read_scores(path, &args.model, config)?.scores));
    let scores = scores.collect::<Result<Vec<_>>>()?;
    let scope = Scope::from(args.per);
    let n_heads = config.layers.iter().map(|layer| layer.n_heads as usize);
    let most = match scope {
        Scope::Global => n_heads.sum(),
        Scope::Layer => n_heads.min().unwrap_or(0),
    };
    let ks: Vec<usize> =
        if args.remove.is_empty() { (1..=most).collect() } else { args.remove.clone() };
    let unit = if scope == Scope::Global { "the model has" } else { "every layer has at least" };
    if let Some(k) = ks.iter().find(|&&k| k > most) {
        anyhow::bail!("`--remove` is {k}, and {unit} {most} heads");
    }
    Foreseen::branching(&task.folder.config, &args.compute, task.extent())?
        .check(args.compute.device()?, memory::OF_SCORING)?;
    let model = task.load(&args.compute, args.seed, &hub)?;
    let masking = task.masking()?;
    let (of, rows) = loss_and_rows(&task, &model, masking.as_ref(), args.seed)?;
    let own = RowLoss::Own { of: &of, seed: args.seed };
    let loss = if args.own_output { own } else { of };
    let donors = calibration(&model, &args.model, &args.rows, &args.replace, &args.compute, &hub)?;
    let replacement = replacement(args.replace.replace, &donors, args.seed);
    let grid = Grid { scores: &scores, ks: &ks, scope, n_draws: args.draws, seed: args.seed };
    let mut progress = count_every_row(rows.len());
    let found = curve(&model, &rows, &grid, replacement, &loss, &task.batching(), &mut progress)
        .with_context(|| format!("cannot leave heads of `{}` out", args.model))?;
    drop(progress);

    warn_of_few(found.n_rows);
    let files: Vec<String> = args.scores.iter().map(|path| path.display().to_string()).collect();
    let shown = if task.data.label.is_some() { ACCURACY } else { LOSS };
    print(&found, &files, scope, shown, out)?;
    let report = Report {
        unit: QUERY_HEAD,
        subject: Subject::new(&args.model, &args.compute, &model)?,
        which: task.which(),
        scores: files,
        replace: replacement.name(),
        scope,
        loss_kind: loss.name(),
        seed: args.seed,
        curve: found,
    };
    write_result(&args.out, &report, args.plot.as_deref())?;
    Ok(())
}

/// What is shown of each choice of heads: accuracy where rows are classified, the loss of a language model.
#[derive(Clone, Copy)]
struct Shown {
    name: &'static str,
    of_choice: fn(&ByScore) -> f64,
    of_band: fn(&RandomBand) -> [f64; 3],
}

const ACCURACY: Shown =
    Shown { name: "accuracy", of_choice: |it| it.accuracy, of_band: |it| it.accuracy };

const LOSS: Shown = Shown { name: "loss", of_choice: |it| it.loss, of_band: |it| it.loss };

fn print(
    curve: &Curve,
    files: &[String],
    scope: Scope,
    shown: Shown,
    out: &mut dyn Write,
) -> Result<()> {
    let per = if scope == Scope::Global { "heads" } else { "heads a layer" };
    writeln!(
        out,
        "{} rows; untouched: loss {:.4}, accuracy {:.4}",
        curve.n_rows, curve.loss.value, curve.accuracy.value
    )?;
    for (at, file) in files.iter().enumerate() {
        writeln!(out, "\n{file}, {} without K {per}", shown.name)?;
        writeln!(
            out,
            "{:>5} {:>8} {:>8}   random (lowest to highest)      ties",
            "K", "top", "bottom"
        )?;
        for point in &curve.points {
            let of =
                |order: Order| point.by_score.iter().find(|it| it.score == at && it.order == order);
            let (Some(top), Some(bottom)) = (of(Order::Top), of(Order::Bottom)) else { continue };
            let [mean, low, high] = (shown.of_band)(&point.random);
            writeln!(
                out,
                "{:>5} {:>8.4} {:>8.4}   {mean:.4} ({low:.4} to {high:.4})    {:>8}",
                point.k,
                (shown.of_choice)(top),
                (shown.of_choice)(bottom),
                match top.n_tied + bottom.n_tied {
                    0 => String::new(),
                    n => n.to_string(),
                }
            )?;
        }
        let [bottom, top] = curve.areas[at];
        writeln!(
            out,
            "mean rise of the loss: bottom first {bottom:+.4}, top first {top:+.4}, random {:+.4}",
            curve.random_area
        )?;
    }
    Ok(())
}
