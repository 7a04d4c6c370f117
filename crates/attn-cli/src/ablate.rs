//! `attn ablate`: what each head is worth.

use std::io::Write;

use anyhow::{Context, Result, ensure};
use attn_data::hub::{Hub, progress_bar};
use attn_eval::{Effect, Estimate, Head, RowLoss, ablate, all_groups, all_heads, stats::Interval};
use serde::Serialize;

use crate::{
    args::AblateArgs,
    head_names::{QUERY_HEAD, calibration, loss_and_rows, name, range, replacement, warn_of_few},
    memory::{self, Foreseen},
    monitor::{count_every_row, grouped},
    plot::write_result,
    run_dir::check_writable,
    subject::Subject,
    task::{Task, Which, dataset},
};

/// Heads that are shown.
const N_SHOWN: usize = 12;

/// OUT.json.
#[derive(Serialize)]
struct Report<'a> {
    #[serde(flatten)]
    subject: Subject<'a>,
    #[serde(flatten)]
    which: Which<'a>,
    replace: &'static str,
    /// What is named in `without`.
    unit: &'static str,
    loss: &'static str,
    n_rows: usize,
    baseline_loss: Estimate,
    baseline_accuracy: Estimate,
    ablations: Vec<Entry>,
    pairs: Vec<Pair>,
}

/// What was left out, and what that did.
#[derive(Serialize)]
struct Entry {
    /// Query heads, or a key/value group.
    without: String,
    /// Query heads that went.
    heads: Vec<String>,
    #[serde(flatten)]
    effect: Effect,
}

#[derive(Serialize)]
struct Pair {
    without: [String; 2],
    #[serde(flatten)]
    effect: Effect,
    /// What the loss rises by beyond the sum of both alone.
    interaction: f64,
    interaction_interval_95: Option<Interval>,
}

pub(crate) fn run(args: &AblateArgs, out: &mut dyn Write) -> Result<()> {
    let _made = check_writable(&args.out)?;
    ensure!(
        args.pairs.is_none_or(|n| n > 1),
        "`--pairs` is {}, expected at least 2",
        args.pairs.unwrap_or(0)
    );
    let data = dataset(&args.rows.task, &args.rows.set)?;
    args.compute.device()?;
    let hub = Hub::from_env().with_progress(progress_bar());
    let task = Task::open(&args.model, &args.rows, data, None, &args.compute, &hub)?;
    let config = task.folder.config.clone();
    Foreseen::branching(&task.folder.config, &args.compute, task.extent())?
        .check(args.compute.device()?, memory::OF_SCORING)?;
    let model = task.load(&args.compute, args.seed, &hub)?;
    let masking = task.masking()?;
    let (of, rows) = loss_and_rows(&task, &model, masking.as_ref(), args.seed)?;
    let own = RowLoss::Own { of: &of, seed: args.seed };
    let loss = if args.own_output { own } else { of };
    let donors = calibration(&model, &args.model, &args.rows, &args.replace, &args.compute, &hub)?;
    let replacement = replacement(args.replace.replace, &donors, args.seed);

    let units: Vec<Vec<Head>> = match args.groups {
        true => all_groups(&model),
        false => all_heads(&model).into_iter().map(|head| vec![head]).collect(),
    };
    if let Some(n) = args.pairs {
        ensure!(n <= units.len(), "`--pairs` is {n}, and there are {} to be left out", units.len());
    }
    let groups = |of: usize| -> String {
        let layer = units[of][0].layer;
        let place = (0..of).rev().take_while(|&other| units[other][0].layer == layer).count();
        format!("{layer}-g{place}")
    };
    let named = |of: usize| match args.groups {
        true => groups(of),
        false => name(&config, units[of][0]),
    };
    let mut progress = count_every_row(rows.len());
    let context = || format!("cannot leave heads of `{}` out", args.model);
    let mut leave_out = |choices: &[Vec<Head>]| {
        ablate(&model, &rows, choices, replacement, &loss, &task.batching(), &mut progress)
            .with_context(context)
    };
    let found = leave_out(&units)?;
    let effects = found.effects();
    let mut order: Vec<usize> = (0..units.len()).collect();
    order.sort_by(|&a, &b| effects[b].loss.value.total_cmp(&effects[a].loss.value));
    let mut best = order[..args.pairs.unwrap_or(0)].to_vec();
    best.sort_unstable();
    let pairs: Vec<[usize; 2]> = (0..best.len())
        .flat_map(|b| (0..b).map(move |a| [a, b]))
        .map(|[a, b]| [best[a], best[b]])
        .collect();
    let together: Vec<Vec<Head>> =
        pairs.iter().map(|[a, b]| [units[*a].as_slice(), &units[*b]].concat()).collect();
    let of_pairs = match together.is_empty() {
        true => Vec::new(),
        false => {
            let together = leave_out(&together)?;
            together.effects().into_iter().zip(found.interactions(&pairs, &together)).collect()
        }
    };
    drop(progress);

    warn_of_few(found.rows.len());
    let [baseline_loss, baseline_accuracy] = found.baseline();
    let report = Report {
        subject: Subject::new(&args.model, &args.compute, &model)?,
        which: task.which(),
        replace: replacement.name(),
        unit: if args.groups { "key_value_group" } else { QUERY_HEAD },
        loss: loss.name(),
        n_rows: found.rows.len(),
        baseline_loss,
        baseline_accuracy,
        ablations: (0..units.len())
            .map(|of| Entry {
                without: named(of),
                heads: units[of].iter().map(|&head| name(&config, head)).collect(),
                effect: effects[of],
            })
            .collect(),
        pairs: pairs
            .iter()
            .zip(&of_pairs)
            .map(|(&[a, b], &(effect, interaction))| Pair {
                without: [named(a), named(b)],
                effect,
                interaction: interaction.value,
                interaction_interval_95: interaction.interval_95,
            })
            .collect(),
    };
    print(&report, &order, out)?;
    write_result(&args.out, &report, None)?;
    Ok(())
}

fn print(report: &Report<'_>, order: &[usize], out: &mut dyn Write) -> Result<()> {
    let what = if report.unit == "query_head" { "query heads" } else { "key/value groups" };
    writeln!(
        out,
        "{} {what}, {} rows, loss {} {:.4}, accuracy {:.4}; left out: {}\n",
        grouped(order.len()),
        grouped(report.n_rows),
        report.loss,
        report.baseline_loss.value,
        report.baseline_accuracy.value,
        report.replace
    )?;
    writeln!(out, "{:>8} {:>10}   95 % interval          accuracy         KL", "without", "loss")?;
    let signed = |x: f64| format!("{x:>+8.4}");
    let line = |at: usize, out: &mut dyn Write| -> Result<()> {
        let Entry { without, effect: Effect { loss, accuracy, kl }, .. } = &report.ablations[at];
        Ok(writeln!(
            out,
            "{without:>8} {:>+10.4}   {:<20}   {:>+8.4} {:>10.2e}",
            loss.value,
            range(loss.interval_95, signed),
            accuracy.value,
            kl.value
        )?)
    };
    order.iter().take(N_SHOWN).try_for_each(|&at| line(at, out))?;
    if order.len() > N_SHOWN {
        writeln!(out, "{:>8}", "...")?;
        line(order[order.len() - 1], out)?;
    }
    if !report.pairs.is_empty() {
        writeln!(out, "\n{:>14} {:>10} {:>12}   95 % interval", "pair", "loss", "interaction")?;
        for Pair { without: [a, b], effect, interaction, interaction_interval_95 } in &report.pairs
        {
            writeln!(
                out,
                "{:>14} {:>+10.4} {:>+12.4}   {}",
                format!("{a} {b}"),
                effect.loss.value,
                interaction,
                range(*interaction_interval_95, signed)
            )?;
        }
    }
    Ok(())
}
