//! How far a model is from what it was, position by position, before and after training.

use anyhow::Result;
use attn_viz::{LineChart, Series, Stroke};
use serde::Deserialize;
use serde_json::Value;

use super::{Draw, Drawn, Figure, Kind, Source, called};

pub(super) const KIND: Kind = Kind {
    name: "divergence",
    about: "KL by position in the row, at the swap and after training (summary.json of attn distill; attn eval --against)",
    reads: |value| has_positions(value, "at_swap") || has_positions(value, "divergence"),
    draw: Draw::Together(draw),
};

fn has_positions(value: &Value, field: &str) -> bool {
    value.get(field).is_some_and(|it| it.get("by_position").is_some_and(|it| it.get(0).is_some()))
}

#[derive(Deserialize)]
struct Summary {
    /// Of a run.
    name: Option<String>,
    /// Of an evaluation.
    model: Option<String>,
    #[serde(alias = "divergence")]
    at_swap: Distance,
    #[serde(default)]
    stages: Vec<Stage>,
}

#[derive(Deserialize)]
struct Stage {
    stage: String,
    after: Value,
}

#[derive(Deserialize)]
struct Distance {
    by_position: Vec<Positions>,
}

#[derive(Deserialize)]
struct Positions {
    first: usize,
    last: usize,
    kl_nats_per_token: f64,
}

fn draw(sources: &[Source]) -> Result<Vec<Drawn>> {
    let mut series = Vec::new();
    let mut title = String::new();
    for (at, source) in sources.iter().enumerate() {
        let summary: Summary = source.read()?;
        let of = |name: &str| match sources.len() {
            1 => name.to_owned(),
            _ => format!("{}, {name}", source.name),
        };
        let first = match summary.name {
            Some(_) => (of("at the swap"), Stroke::Dashed),
            None => (source.name.clone(), Stroke::Dotted),
        };
        series.push(curve(first.0, &summary.at_swap, first.1, at));
        for (i, stage) in summary.stages.iter().enumerate() {
            let Ok(after) = Distance::deserialize(&stage.after) else { continue };
            let color = if sources.len() == 1 { i + 1 } else { at };
            series.push(curve(
                of(&format!("after {}", stage.stage)),
                &after,
                Stroke::Dotted,
                color,
            ));
        }
        let name = summary.name.as_deref().or(summary.model.as_deref());
        title = called(name.unwrap_or(&source.name)).to_owned();
    }
    Ok(vec![Drawn::new(
        "",
        Figure::Lines(LineChart {
            title: match sources {
                [_] => format!("{title}: how far from the model it was"),
                _ => format!("How far {} models are from what they were", sources.len()),
            },
            subtitle: "mean over the tokens of each stretch of positions".into(),
            x_label: "position in the row".into(),
            y_label: "KL (nats per token)".into(),
            series,
            ..LineChart::default()
        }),
    )])
}

/// A point in the middle of each stretch of positions.
fn curve(name: String, distance: &Distance, stroke: Stroke, color: usize) -> Series {
    let middle = |it: &Positions| ((it.first + it.last) as f64 / 2.0, it.kl_nats_per_token);
    let points = distance.by_position.iter().map(middle);
    Series { stroke, color: Some(color), ..Series::new(name, points) }
}
