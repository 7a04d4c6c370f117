//! What leaving ever more heads out does, against leaving heads out at random.

use anyhow::Result;
use attn_viz::{Baseline, LineChart, Series, Stroke};
use serde::Deserialize;

use super::{Draw, Drawn, Figure, Kind, Measured, Source, called};

pub(super) const KIND: Kind = Kind {
    name: "prune-curve",
    about: "accuracy or loss by heads left out, with the band of random choices (attn prune-curve)",
    reads: |value| value.get("points").is_some_and(|it| it[0].get("by_score").is_some()),
    draw: Draw::Each(draw),
};

#[derive(Deserialize)]
struct Report {
    model: String,
    scores: Vec<String>,
    scope: String,
    n_rows: usize,
    data: Data,
    loss: Measured,
    accuracy: Measured,
    points: Vec<Point>,
}

#[derive(Deserialize)]
struct Data {
    label: Option<String>,
}

#[derive(Deserialize)]
struct Point {
    k: usize,
    random: Random,
    by_score: Vec<Choice>,
}

/// Mean, lowest and highest of the draws.
#[derive(Deserialize)]
struct Random {
    n_draws: usize,
    loss: [f64; 3],
    accuracy: [f64; 3],
}

#[derive(Deserialize)]
struct Choice {
    score: usize,
    order: String,
    loss: f64,
    accuracy: f64,
}

fn draw(source: &Source) -> Result<Vec<Drawn>> {
    Ok(vec![Drawn::new("", Figure::Lines(one(&source.read()?)))])
}

fn one(report: &Report) -> LineChart {
    // Rows that are classified have an accuracy, running text a loss.
    let by_accuracy = report.data.label.is_some();
    let band = |it: &Random| if by_accuracy { it.accuracy } else { it.loss };
    let random: Vec<_> =
        report.points.iter().map(|point| (point.k as f64, band(&point.random))).collect();
    let mut series = vec![Series {
        band: Some(random.iter().map(|&(_, [_, low, high])| (low, high)).collect()),
        ..Series::new("random", random.iter().map(|&(k, [mean, ..])| (k, mean)))
    }];
    for (score, file) in report.scores.iter().enumerate() {
        for (order, stroke) in [("top", Stroke::Solid), ("bottom", Stroke::Dashed)] {
            let of = |point: &Point| {
                let found =
                    point.by_score.iter().find(|it| it.score == score && it.order == order)?;
                Some((point.k as f64, if by_accuracy { found.accuracy } else { found.loss }))
            };
            let points: Vec<(f64, f64)> = report.points.iter().filter_map(of).collect();
            if points.is_empty() {
                continue;
            }
            let name = match report.scores.len() {
                1 => format!("{order} first"),
                _ => format!("{order} of {} first", called(file)),
            };
            series.push(Series { stroke, color: Some(score + 1), ..Series::new(name, points) });
        }
    }
    let n_draws = report.points.first().map_or(0, |point| point.random.n_draws);
    let untouched = if by_accuracy { report.accuracy } else { report.loss };
    LineChart {
        title: format!("{} without heads", called(&report.model)),
        subtitle: format!(
            "{} rows, nothing was trained; band: lowest to highest of {n_draws} random choices",
            report.n_rows
        ),
        x_label: match report.scope.as_str() {
            "layer" => "heads left out of each layer".into(),
            _ => "heads left out".into(),
        },
        y_label: if by_accuracy { "accuracy".into() } else { "loss (nats)".into() },
        series,
        baselines: vec![Baseline { label: "untouched".into(), value: untouched.value }],
        ..LineChart::default()
    }
}
