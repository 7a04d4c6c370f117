//! What a head brings back of a difference between two prompts.

use anyhow::{Result, ensure};
use attn_viz::{HeatMap, Shades};
use serde::Deserialize;

use super::{Draw, Drawn, Figure, Kind, Source, check_shape, layer_head, numbers};

pub(super) const KIND: Kind = Kind {
    name: "patch",
    about: "what each head brings back of the difference between two prompts (attn patch)",
    reads: |value| value.get("denoising").is_some() && value.get("clean_prompt").is_some(),
    draw: Draw::Each(draw),
};

#[derive(Deserialize)]
struct Report {
    clean_prompt: String,
    corrupted_prompt: String,
    tokens: Vec<String>,
    by: String,
    heads: Vec<Vec<usize>>,
    /// By layer, head and, where heads were patched position by position, position.
    #[serde(deserialize_with = "numbers")]
    denoising: Vec<Vec<Vec<f64>>>,
}

fn draw(source: &Source) -> Result<Vec<Drawn>> {
    Ok(vec![Drawn::new("", Figure::Heat(one(&source.read()?)?))])
}

fn one(report: &Report) -> Result<HeatMap> {
    check_shape("results", &report.heads, &report.denoising)?;
    let n = if report.by == "positions" { report.tokens.len() } else { 1 };
    for head in report.denoising.iter().flatten() {
        ensure!(head.len() == n, "a head has {} results in place of {n}", head.len());
    }
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
