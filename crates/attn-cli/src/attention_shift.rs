//! `attn attention-shift`: what tuning does to the attention of each head.

use std::{fs, io::Write, path::Path};

use anyhow::{Context, Result, ensure};
use attn_core::{ForwardOptions, LoadOptions, Model, Rows};
use attn_data::{
    batch::{Encoded, Side, collate},
    hub::{Hub, progress_bar},
};
use attn_eval::{AttentionShift, Head, attention_shift, stats::Interval, to_input};
use attn_viz::{HeatMap, Picture};
use serde::Serialize;
use tch::Kind;

use crate::{
    args::AttentionShiftArgs,
    attended::Attended,
    head_names::warn_of_few,
    heatmap::names,
    memory::{self, Foreseen, scored},
    monitor::{count_every_row, grouped},
    plot::attention::size,
    plot::write_result,
    run_dir::check_writable,
    subject::Subject,
    task::Which,
    texts::{Folder, load_model, read_alike},
};

/// Heads that are shown.
const N_SHOWN: usize = 10;

/// Most tokens of the text that is drawn.
const DRAWN_TOKENS: usize = 32;

/// OUT.json.
#[derive(Serialize)]
struct Report<'a> {
    #[serde(flatten)]
    subject: Subject<'a>,
    after: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    control_model: Option<&'a str>,
    #[serde(flatten)]
    which: Which<'a>,
    #[serde(flatten)]
    found: AttentionShift,
}

pub(crate) fn run(args: &AttentionShiftArgs, out: &mut dyn Write) -> Result<()> {
    let _made = check_writable(&args.out)?;
    ensure!(
        args.compute.init.is_none(),
        "`--init` would make the same weights for every model\nhint: leave it away"
    );
    ensure!(args.drawn > 0, "`--drawn` is 0, expected at least 1\nhint: leave `--plots` away");
    let device = args.compute.device()?;
    let hub = Hub::from_env().with_progress(progress_bar());
    let open = |name: &String| Folder::open(name, true, None, &hub);
    let before = open(&args.before)?;
    let after = open(&args.after)?;
    let control = args.control.as_ref().map(open).transpose()?;
    let others: Vec<&Folder> = [Some(&after), control.as_ref()].into_iter().flatten().collect();
    same_attention(&before, &others)?;
    let texts = Attended::read(&before, &args.rows, &hub)?;
    if let Some(dir) = &args.plots {
        fs::create_dir_all(dir).with_context(|| format!("cannot make `{}`", dir.display()))?;
    }
    let extent = scored(&texts.batching(&before), &texts.rows);
    let mut foreseen = Foreseen::computing(&before.config, &args.compute)?;
    for other in &others {
        let name = format!("`{}`", other.name);
        foreseen = foreseen.beside(&name, &other.config, args.compute.dtype.into())?;
    }
    let n_models = 1 + others.len() as u64;
    foreseen
        .pass(extent)
        .bounded_attention(extent, 3 * n_models)
        .check(device, memory::OF_SCORING)?;
    let options = LoadOptions { kind: args.compute.dtype.into(), device, ..LoadOptions::default() };
    let load = |folder: &Folder| {
        load_model(&folder.path, None, &options, &hub)
            .with_context(|| format!("cannot load the model `{}`", folder.name))
    };
    let models = [load(&before)?, load(&after)?];
    let control = control.as_ref().map(load).transpose()?;

    let mut progress = count_every_row(texts.rows.len());
    let found = attention_shift(
        &models[0],
        &models[1],
        control.as_ref(),
        &texts.rows,
        &texts.known(),
        &texts.batching(&before),
        &mut progress,
    );
    drop(progress);
    let found = found.with_context(|| {
        format!("cannot compare the attention of `{}` with that of `{}`", args.after, args.before)
    })?;
    warn_of_few(found.n_texts);
    print(&found, args.control.is_some(), out)?;
    if let Some(dir) = &args.plots {
        draw(&found, args.drawn, &models, &texts.rows, &before, dir)?;
    }
    let report = Report {
        subject: Subject::new(&args.before, &args.compute, &models[0])?,
        after: &args.after,
        control_model: args.control.as_deref(),
        which: texts.which(),
        found,
    };
    write_result(&args.out, &report, None)?;
    Ok(())
}

/// Refuses models whose attention cannot be compared head by head and token by token. What they end in may differ.
fn same_attention(before: &Folder, others: &[&Folder]) -> Result<()> {
    const HINT: &str = "name a model and what it was tuned to";
    let heads = |of: &Folder| -> Vec<Vec<i64>> {
        of.config.layers.iter().map(|layer| layer.kept_heads.clone()).collect()
    };
    let shape = |of: &Folder| {
        let counts: Vec<usize> = heads(of).iter().map(Vec::len).collect();
        format!("`{}` is a {} with {counts:?} heads", of.name, of.config.base_model_type())
    };
    let all = heads(before);
    let mut common = all.clone();
    for other in others {
        let is_alike = heads(other).len() == all.len()
            && other.config.base_model_type() == before.config.base_model_type();
        for (common, other) in common.iter_mut().zip(heads(other)) {
            common.retain(|head| other.contains(head));
        }
        ensure!(
            is_alike && !common.iter().all(Vec::is_empty),
            "{}, {}: their heads are not the same ones\nhint: {HINT}",
            shape(before),
            shape(other)
        );
        read_alike(before, other, HINT)?;
    }
    let n = |of: &[Vec<i64>]| of.iter().map(Vec::len).sum::<usize>();
    if n(&common) < n(&all) {
        tracing::info!(
            "{} of {} heads are in all models: the others are left out",
            n(&common),
            n(&all)
        );
    }
    Ok(())
}

fn print(found: &AttentionShift, has_control: bool, out: &mut dyn Write) -> Result<()> {
    writeln!(
        out,
        "{} texts, {} tokens; Jensen-Shannon distance 0 to 0.833, changes after less before\n",
        grouped(found.n_texts),
        grouped(found.n_tokens)
    )?;
    write!(out, "{:>6} {:>9}   {:<15}", "head", "distance", "95 %")?;
    if has_control {
        write!(out, " {:>9}   {:<17}", "less seed", "95 %")?;
    }
    for change in &found.shift.changes {
        write!(out, " {:>17}", change.measure)?;
    }
    writeln!(out)?;
    for Head { layer, place: at } in found.ranked().into_iter().take(N_SHOWN) {
        let range = |Interval { low, high }: Interval| format!("{low:.3} to {high:.3}");
        write!(
            out,
            "{:>6} {:>9.3}   {:<15}",
            format!("{layer}-{}", found.heads[layer][at]),
            found.shift.js_distance[layer][at],
            range(found.shift.js_distance_interval_95[layer][at])
        )?;
        if let Some(control) = &found.control {
            write!(
                out,
                " {:>+9.3}   {:<17}",
                control.excess[layer][at],
                range(control.excess_interval_95[layer][at])
            )?;
        }
        for change in &found.shift.changes {
            write!(out, " {:>+17.3}", change.change[layer][at])?;
        }
        writeln!(out)?;
    }
    let n_heads: usize = found.heads.iter().map(Vec::len).sum();
    if n_heads > N_SHOWN {
        writeln!(out, "{:>6}", "...")?;
    }
    if let Some(control) = &found.control {
        let n_moved = control
            .excess_interval_95
            .iter()
            .flatten()
            .filter(|interval| interval.low > 0.0)
            .count();
        writeln!(
            out,
            "\n{n_moved} of {n_heads} heads moved further from before to after than the two seeds are apart (interval \
             above 0)."
        )?;
    }
    Ok(())
}

/// Heat maps of the heads that changed most, on the first text or its beginning.
fn draw(
    found: &AttentionShift,
    n_drawn: usize,
    models: &[Model; 2],
    rows: &[Encoded],
    folder: &Folder,
    dir: &Path,
) -> Result<()> {
    let first = &rows[0];
    let ids = first.ids[..first.ids.len().min(DRAWN_TOKENS)].to_vec();
    let row = Encoded { ids, second_from: None, ..first.clone() };
    let batch = collate(&[&row], folder.tokenizer.fill_id(), Side::Right);
    let mut weights = Vec::new();
    let mut tokens = Vec::new();
    for model in models {
        let input = to_input(&batch, model);
        let options = ForwardOptions { attentions: Rows::All, ..ForwardOptions::default() };
        weights.push(tch::no_grad(|| model.forward(&input, &options))?.attentions);
        tokens = names(&folder.tokenizer, &input.input_ids)?;
    }
    for Head { layer, place: at } in found.ranked().into_iter().take(n_drawn) {
        let number = found.heads[layer][at];
        let values = |side: usize| -> Result<Vec<Vec<f64>>> {
            let kept = models[side].layers()[layer].spec().kept_heads;
            let place = kept.iter().position(|&kept| kept == number).context("a common head")?;
            let head = weights[side][layer].get(0).get(place as i64);
            Ok(Vec::try_from(head.to_device(tch::Device::Cpu).to_kind(Kind::Double).contiguous())?)
        };
        let both = [values(0)?, values(1)?];
        // One scale for both.
        let highest = both.iter().flatten().flatten().copied().fold(f64::MIN_POSITIVE, f64::max);
        let distance = found.shift.js_distance[layer][at];
        for (side, values) in ["before", "after"].into_iter().zip(both) {
            let map = HeatMap {
                title: format!("Layer {layer}, head {number}, {side}"),
                subtitle: format!("Jensen-Shannon distance over all texts {distance:.3}"),
                x_label: "attended to".into(),
                y_label: "token".into(),
                value_label: "weight".into(),
                range: Some((0.0, highest)),
                values,
                size: size(tokens.len(), tokens.len()),
                rows: tokens.clone(),
                columns: tokens.clone(),
                ..HeatMap::default()
            };
            let path = dir.join(format!("layer-{layer}-head-{number}-{side}.png"));
            map.png(&path)?;
            tracing::info!("wrote `{}`", path.display());
        }
    }
    Ok(())
}
