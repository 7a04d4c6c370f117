//! What each attention kind would cost each layer, and which one it got.

use anyhow::{Context, Result};
use attn_core::Variant;
use attn_viz::{Group, HeatMap};
use serde::Deserialize;
use serde_json::Value;

use super::{
    Draw, Drawn, Figure, Kind, Range, Source, attention::size, called, in_cell, with_interval,
};
use crate::surgery::with_own_settings;

pub(super) const KIND: Kind = Kind {
    name: "choice",
    about: "KL of each layer under each attention kind, and what it got (choice.json of attn choose)",
    reads: |value| {
        value.get("choice").is_some_and(|it| it[0].is_u64()) && value["layers"][0].is_array()
    },
    draw: Draw::Each(draw),
};

#[derive(Deserialize)]
struct Report {
    model: String,
    task: String,
    n_rows: usize,
    layers: Vec<Vec<Swapped>>,
    choice: Vec<usize>,
    #[serde(default)]
    budget: Value,
    divergence: Mixture,
}

/// The chosen mixture against the model as it was.
#[derive(Deserialize)]
struct Mixture {
    kl_nats_per_token: f64,
}

#[derive(Deserialize)]
struct Swapped {
    attention: Value,
    kl_nats_per_token: f64,
    kl_interval_95: Option<Range>,
}

fn draw(source: &Source) -> Result<Vec<Drawn>> {
    let Report { model, task, n_rows, layers, choice, budget, divergence } = source.read()?;
    let variant = |it: &Swapped| Variant::deserialize(&it.attention).ok();
    let all: Vec<Variant> = layers.iter().flatten().filter_map(variant).collect();
    let name = |place: usize, one: &Swapped| match (place, variant(one)) {
        (0, _) => "as it is".to_owned(),
        (_, Some(variant)) => with_own_settings(&variant, all.iter()),
        // A kind of a crate that this program was built without.
        (_, None) => one.attention["kind"].as_str().unwrap_or("unknown").to_owned(),
    };
    let budget = match (budget["cost"].as_str(), budget["most"].as_u64()) {
        (Some(cost), Some(most)) => format!(" within {cost} = {most}"),
        _ => String::new(),
    };
    // Layers may have other heads, and so other candidates.
    let mut rows: Vec<String> = Vec::new();
    for (place, one) in layers.iter().flat_map(|layer| layer.iter().enumerate()) {
        let name = name(place, one);
        if !rows.contains(&name) {
            rows.push(name);
        }
    }
    let mut values = vec![vec![f64::NAN; layers.len()]; rows.len()];
    let mut notes = vec![vec![String::new(); layers.len()]; rows.len()];
    let mut groups = Vec::new();
    for (at, layer) in layers.iter().enumerate() {
        let chosen = *choice.get(at).context("there are more layers than choices")?;
        for (place, one) in layer.iter().enumerate() {
            let name = name(place, one);
            let row = rows.iter().position(|it| *it == name).expect("gathered above");
            values[row][at] = one.kl_nats_per_token;
            notes[row][at] = with_interval(one.kl_nats_per_token, one.kl_interval_95);
            if place == chosen {
                groups.push(Group { rows: row..row + 1, columns: at..at + 1 });
            }
        }
    }
    Ok(vec![Drawn::new(
        "",
        Figure::Heat(HeatMap {
            title: format!("What each attention kind costs each layer of {}", called(&model)),
            subtitle: format!(
                "{task}, {n_rows} rows; the other layers as they are; 95 % intervals; framed: what the layer got{budget}, \
                 together {} nats",
                in_cell(divergence.kl_nats_per_token)
            ),
            x_label: "layer".into(),
            value_label: "KL (nats per token)".into(),
            columns: (0..layers.len()).map(|layer| layer.to_string()).collect(),
            size: size(3 * rows.len(), 8 * layers.len()),
            rows,
            values,
            notes,
            groups,
            ..HeatMap::default()
        }),
    )])
}
