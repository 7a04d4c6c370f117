//! How far the attention of each head moved.

use anyhow::Result;
use attn_viz::HeatMap;
use serde::Deserialize;

use super::{
    Draw, Drawn, Figure, Kind, Range, Source, called, check_shape, layer_head, numbers,
    with_interval,
};

pub(super) const KIND: Kind = Kind {
    name: "attention-shift",
    about: "how far the attention of each head moved (attn attention-shift)",
    reads: |value| value.get("shift").is_some_and(|it| it.get("js_distance").is_some()),
    draw: Draw::Each(draw),
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
    #[serde(deserialize_with = "numbers")]
    js_distance: Vec<Vec<f64>>,
    js_distance_interval_95: Vec<Vec<Option<Range>>>,
}

fn draw(source: &Source) -> Result<Vec<Drawn>> {
    Ok(vec![Drawn::new("", Figure::Heat(one(&source.read()?)?))])
}

fn one(report: &Report) -> Result<HeatMap> {
    let Shift { js_distance, js_distance_interval_95 } = &report.shift;
    let map = layer_head(&report.heads, js_distance)?;
    check_shape("intervals", &report.heads, js_distance_interval_95)?;
    let mut notes = vec![vec![String::new(); map.columns.len()]; map.rows.len()];
    for (layer, heads) in report.heads.iter().enumerate() {
        for (place, &head) in heads.iter().enumerate() {
            let interval = js_distance_interval_95[layer][place];
            notes[layer][head] = with_interval(js_distance[layer][place], interval);
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
