//! What a model loses without a head, or without groups of heads.

use anyhow::Result;
use attn_viz::{Bar, BarChart, HeatMap, Shades};
use serde::Deserialize;

use super::{Draw, Drawn, Figure, Kind, Measured, Source, called, layer_head, with_interval};

pub(super) const KIND: Kind = Kind {
    name: "ablation",
    about: "what leaving each head or group out does to the loss (attn ablate)",
    reads: |value| value.get("ablations").is_some_and(serde_json::Value::is_array),
    draw: Draw::Each(draw),
};

#[derive(Deserialize)]
struct Report {
    model: String,
    task: Option<String>,
    replace: String,
    n_rows: usize,
    ablations: Vec<Ablation>,
}

#[derive(Deserialize)]
struct Ablation {
    without: String,
    heads: Vec<String>,
    loss: Measured,
}

fn draw(source: &Source) -> Result<Vec<Drawn>> {
    Ok(vec![Drawn::new("", one(&source.read()?)?)])
}

fn one(report: &Report) -> Result<Figure> {
    let title = format!("{} without heads", called(&report.model));
    let subtitle = format!(
        "{}{} rows; {} in their place; rise of the loss with 95 % intervals",
        report.task.as_ref().map_or(String::new(), |task| format!("{task}, ")),
        report.n_rows,
        report.replace
    );
    let label = "rise of the loss".to_owned();
    let place = |name: &str| -> Option<(usize, usize)> {
        let (layer, head) = name.split_once('-')?;
        Some((layer.parse().ok()?, head.parse().ok()?))
    };
    let single = |it: &Ablation| if it.heads.len() == 1 { place(&it.heads[0]) } else { None };
    let places: Option<Vec<(usize, usize)>> = report.ablations.iter().map(single).collect();
    let Some(places) = places.filter(|places| !places.is_empty()) else {
        let bar = |it: &Ablation| Bar {
            label: it.without.clone(),
            value: it.loss.value,
            interval: it.loss.interval_95.map(|it| (it.low, it.high)),
            ..Bar::default()
        };
        let bars = report.ablations.iter().map(bar).collect();
        return Ok(Figure::Bars(BarChart {
            title,
            subtitle,
            y_label: label,
            bars,
            decimals: 3,
            ..BarChart::default()
        }));
    };
    let n_layers = places.iter().map(|place| place.0 + 1).max().unwrap_or(0);
    let mut heads = vec![Vec::new(); n_layers];
    let mut values = vec![Vec::new(); n_layers];
    for (&(layer, head), it) in places.iter().zip(&report.ablations) {
        heads[layer].push(head);
        values[layer].push(it.loss.value);
    }
    let map = layer_head(&heads, &values)?;
    let mut notes = vec![vec![String::new(); map.columns.len()]; map.rows.len()];
    for (&(layer, head), it) in places.iter().zip(&report.ablations) {
        notes[layer][head] = with_interval(it.loss.value, it.loss.interval_95);
    }
    Ok(Figure::Heat(HeatMap {
        title,
        subtitle,
        value_label: label,
        notes,
        shades: Shades::Diverging,
        ..map
    }))
}
