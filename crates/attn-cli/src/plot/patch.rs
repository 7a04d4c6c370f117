//! What a head brings back of a difference between two prompts.

use anyhow::Result;
use attn_viz::{HeatMap, Shades};
use serde::Deserialize;

use super::{Drawn, Figure, Kind, Source, layer_head};

pub(super) const KIND: Kind = Kind {
    name: "patch",
    about: "what each head brings back of the difference between two prompts (attn patch)",
    reads: |value| value.get("denoising").is_some() && value.get("clean_prompt").is_some(),
    draw,
};

#[derive(Deserialize)]
struct Report {
    clean_prompt: String,
    corrupted_prompt: String,
    tokens: Vec<String>,
    by: String,
    heads: Vec<Vec<usize>>,
    /// By layer, head and, where heads were patched position by position, position.
    denoising: Vec<Vec<Vec<f64>>>,
}

fn draw(sources: &[Source]) -> Result<Vec<Drawn>> {
    let chart = |source: &Source| -> Result<Drawn> {
        Ok(Drawn::new("", Figure::Heat(one(&source.read()?)?)))
    };
    sources.iter().map(chart).collect()
}

fn one(report: &Report) -> Result<HeatMap> {
    let map = match report.by.as_str() {
        "positions" => by_position(report),
        _ => {
            let of_layer = |layer: &Vec<Vec<f64>>| layer.iter().map(|head| head[0]).collect();
            let values: Vec<Vec<f64>> = report.denoising.iter().map(of_layer).collect();
            layer_head(&report.heads, &values)?
        }
    };
    Ok(HeatMap {
        title: "Share of the difference that a head brings back".into(),
        subtitle: format!("{:?} in {:?}", report.clean_prompt, report.corrupted_prompt),
        value_label: "denoising".into(),
        shades: Shades::Diverging,
        ..map
    })
}

fn by_position(report: &Report) -> HeatMap {
    let mut rows = Vec::new();
    let mut values = Vec::new();
    for (layer, heads) in report.heads.iter().enumerate() {
        for (place, head) in heads.iter().enumerate() {
            rows.push(format!("{layer}-{head}"));
            values.push(report.denoising[layer][place].clone());
        }
    }
    HeatMap {
        x_label: "position".into(),
        y_label: "layer-head".into(),
        columns: report.tokens.clone(),
        rows,
        values,
        ..HeatMap::default()
    }
}
