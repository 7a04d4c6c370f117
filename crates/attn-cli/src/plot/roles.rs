//! What heads attend to: a map of layers and heads for each role.

use anyhow::Result;
use attn_viz::{HeatMap, Panels, Size};
use serde::Deserialize;

use super::{Draw, Drawn, Figure, Kind, Source, called, in_cell, layer_head, numbers};

pub(super) const KIND: Kind = Kind {
    name: "roles",
    about: "what heads attend to by layer and head, a map for each role (attn head-roles)",
    reads: |value| value["roles"][0].get("mass").is_some(),
    draw: Draw::Each(draw),
};

#[derive(Deserialize)]
struct Report {
    model: String,
    heads: Vec<Vec<usize>>,
    roles: Vec<Role>,
}

#[derive(Deserialize)]
struct Role {
    role: String,
    offset: Option<i64>,
    on: String,
    n_tokens: u64,
    #[serde(deserialize_with = "numbers")]
    chance: f64,
    #[serde(deserialize_with = "numbers")]
    mass: Vec<Vec<f64>>,
}

/// Maps side by side.
const COLUMNS: usize = 4;

fn draw(source: &Source) -> Result<Vec<Drawn>> {
    Ok(vec![Drawn::new("", one(&source.read()?)?)])
}

fn one(report: &Report) -> Result<Figure> {
    let maps: Vec<HeatMap> =
        report.roles.iter().map(|role| map(role, &report.heads)).collect::<Result<_>>()?;
    let rows = maps.len().div_ceil(COLUMNS) as u32;
    Ok(Figure::Panels(Panels {
        title: format!("What the heads of {} attend to", called(&report.model)),
        subtitle: "mean weight on the keys that a role names, over tokens that have one".into(),
        maps,
        columns: COLUMNS,
        size: Size { width: 2000, height: 160 + 480 * rows },
        ..Panels::default()
    }))
}

fn map(role: &Role, heads: &[Vec<usize>]) -> Result<HeatMap> {
    let name = role.role.replace('_', " ");
    let map = layer_head(heads, &role.mass)?;
    let note = |row: &Vec<f64>| -> Vec<String> {
        let shown = |value: &f64| if value.is_nan() { String::new() } else { in_cell(*value) };
        row.iter().map(shown).collect()
    };
    Ok(HeatMap {
        title: match role.offset {
            Some(offset) => format!("{name} {offset:+}"),
            None => name,
        },
        subtitle: format!(
            "{} tokens of {}; by chance {}",
            role.n_tokens,
            role.on,
            in_cell(role.chance)
        ),
        value_label: "weight".into(),
        notes: map.values.iter().map(note).collect(),
        range: Some((0.0, 1.0)),
        ..map
    })
}
