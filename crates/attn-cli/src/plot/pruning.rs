//! Heads that are left in each layer of a pruned model.

use anyhow::{Result, ensure};
use attn_viz::{Bar, BarChart};
use serde::Deserialize;

use super::{Draw, Drawn, Figure, Kind, Source, called};

pub(super) const KIND: Kind = Kind {
    name: "pruning",
    about: "heads left in each layer (pruning.json of attn prune)",
    reads: |value| value.get("heads_after").is_some() && value.get("removed").is_some(),
    draw: Draw::Each(draw),
};

#[derive(Deserialize)]
struct Report {
    model: String,
    heads_before: Vec<u32>,
    heads_after: Vec<u32>,
    parameters_before: u64,
    parameters_after: u64,
    attention_flops_before: u64,
    attention_flops_after: u64,
}

/// Height of the picture, as a share of the tallest bar: above it stands its number.
const ROOM: f64 = 1.08;

fn draw(source: &Source) -> Result<Vec<Drawn>> {
    Ok(vec![Drawn::new("", one(&source.read()?)?)])
}

fn one(report: &Report) -> Result<Figure> {
    let Report { heads_before, heads_after, .. } = report;
    ensure!(
        heads_before.len() == heads_after.len(),
        "{} layers before and {} after",
        heads_before.len(),
        heads_after.len()
    );
    let bar = |(layer, (&after, &before)): (usize, (&u32, &u32))| Bar {
        label: format!("layer {layer} (of {before})"),
        value: f64::from(after),
        ..Bar::default()
    };
    let share = |after: u64, before: u64| 100.0 * after as f64 / before.max(1) as f64;
    let most = heads_before.iter().copied().max().unwrap_or(1).max(1);
    Ok(Figure::Bars(BarChart {
        title: format!("Heads left of {}", called(&report.model)),
        subtitle: format!(
            "{} of {} heads; {:.1} % of its parameters, {:.1} % of the operations of its attention",
            heads_after.iter().sum::<u32>(),
            heads_before.iter().sum::<u32>(),
            share(report.parameters_after, report.parameters_before),
            share(report.attention_flops_after, report.attention_flops_before)
        ),
        y_label: "query heads".into(),
        y_range: Some((0.0, ROOM * f64::from(most))),
        bars: heads_after.iter().zip(heads_before).enumerate().map(bar).collect(),
        decimals: 0,
        ..BarChart::default()
    }))
}
