//! How far the attention of each head moved.

use anyhow::Result;
use attn_viz::HeatMap;
use serde::Deserialize;

use super::{Drawn, Figure, Kind, Range, Source, called, in_cell, layer_head};

pub(super) const KIND: Kind = Kind {
    name: "attention-shift",
    about: "how far the attention of each head moved (attn attention-shift)",
    reads: |value| value.get("shift").is_some_and(|it| it.get("js_distance").is_some()),
    draw,
};

#[derive(Deserialize)]
struct Report {
    model: String,
    after: String,
    heads: Vec<Vec<usize>>,
    n_texts: usize,
    shift: Shift,
}

#[derive(Deserialize)]
struct Shift {
    js_distance: Vec<Vec<f64>>,
    js_distance_interval_95: Vec<Vec<Range>>,
}

fn draw(sources: &[Source]) -> Result<Vec<Drawn>> {
    let chart = |source: &Source| -> Result<Drawn> {
        Ok(Drawn::new("", Figure::Heat(one(&source.read()?)?)))
    };
    sources.iter().map(chart).collect()
}

fn one(report: &Report) -> Result<HeatMap> {
    let Shift { js_distance, js_distance_interval_95 } = &report.shift;
    let map = layer_head(&report.heads, js_distance)?;
    let mut notes = vec![vec![String::new(); map.columns.len()]; map.rows.len()];
    for (layer, heads) in report.heads.iter().enumerate() {
        for (place, &head) in heads.iter().enumerate() {
            let Range { low, high } = js_distance_interval_95[layer][place];
            let value = js_distance[layer][place];
            notes[layer][head] =
                format!("{}\n{} to {}", in_cell(value), in_cell(low), in_cell(high));
        }
    }
    Ok(HeatMap {
        title: format!("Attention of {} and {}", called(&report.model), called(&report.after)),
        subtitle: format!("Jensen-Shannon distance over {} texts, 95 % intervals", report.n_texts),
        value_label: "distance".into(),
        notes,
        ..map
    })
}
