//! What was measured over the steps of runs.

use anyhow::{Result, ensure};
use attn_viz::{LineChart, Series, Stroke};
use serde::Deserialize;

use super::{Drawn, Figure, Kind, Source};

pub(super) const KIND: Kind = Kind {
    name: "curves",
    about: "loss, KL, perplexity and what else was measured over steps (a run's folder or metrics.jsonl), several runs in one",
    reads: |value| value.get("metrics").is_some_and(serde_json::Value::is_array),
    draw,
};

#[derive(Deserialize)]
struct Run {
    metrics: Vec<Line>,
}

/// A line of `metrics.jsonl`.
#[derive(Deserialize)]
struct Line {
    step: u64,
    metric: String,
    value: Option<f64>,
    unit: String,
    /// Part of a run in stages.
    #[serde(default)]
    stage: Option<String>,
}

/// What is drawn, and under which name: the first is the picture of a run.
const METRICS: [(&str, &[&str]); 6] = [
    ("", &["train_loss", "loss"]),
    ("kl", &["kl", "kl_nats_per_token"]),
    ("perplexity", &["perplexity"]),
    ("accuracy", &["accuracy"]),
    ("rate", &["lr"]),
    ("gradient", &["grad_norm"]),
];

/// Points of a curve whose mean is drawn in front of it.
const SMOOTHED_OVER: usize = 9;

fn draw(sources: &[Source]) -> Result<Vec<Drawn>> {
    let runs: Vec<Run> = sources.iter().map(Source::read).collect::<Result<_>>()?;
    let mut drawn = Vec::new();
    for (name, metrics) in METRICS {
        let (mut series, mut unit) = (Vec::new(), String::new());
        for (at, (source, run)) in sources.iter().zip(&runs).enumerate() {
            for metric in metrics {
                let alone = (sources.len() == 1).then_some(*metric);
                let color = if alone.is_some() { series.len() } else { at };
                series.extend(curves(run, metric, alone, &source.name, color));
                unit = run
                    .metrics
                    .iter()
                    .find(|line| line.metric == *metric)
                    .map_or(unit, |it| it.unit.clone());
            }
        }
        if series.is_empty() {
            continue;
        }
        let label = metrics[metrics.len() - 1].replace('_', " ");
        drawn.push(Drawn::new(
            name,
            Figure::Lines(LineChart {
                title: match sources {
                    [one] => one.name.clone(),
                    _ => format!("{} runs", sources.len()),
                },
                subtitle: match (name, sources.len()) {
                    ("", n) if n > 1 => "pale: training; dots: held out".into(),
                    _ => String::new(),
                },
                x_label: "step".into(),
                y_label: if unit == "1" { label } else { format!("{label} ({unit})") },
                series,
                ..LineChart::default()
            }),
        ));
    }
    ensure!(
        !drawn.is_empty(),
        "nothing that can be drawn was measured in `{}`\nhint: a run writes its metrics at its first report",
        sources[0].name
    );
    Ok(drawn)
}

/// The curves of one metric of one run: raw values behind their mean where there are many, dots where there are few.
fn curves(run: &Run, metric: &str, alone: Option<&str>, name: &str, color: usize) -> Vec<Series> {
    let mut stages: Vec<Option<&str>> = Vec::new();
    for line in run.metrics.iter().filter(|line| line.metric == metric) {
        if !stages.contains(&line.stage.as_deref()) {
            stages.push(line.stage.as_deref());
        }
    }
    let mut series = Vec::new();
    for (i, stage) in stages.iter().enumerate() {
        let of = run
            .metrics
            .iter()
            .filter(|line| line.metric == metric && line.stage.as_deref() == *stage);
        let points: Vec<(f64, f64)> =
            of.filter_map(|line| Some((line.step as f64, line.value?))).collect();
        if points.is_empty() {
            continue;
        }
        let what = alone.map_or(name.to_owned(), |metric| match metric {
            "train_loss" => "training".to_owned(),
            "loss" => "held out".to_owned(),
            other => other.replace('_', " "),
        });
        let name = stage.map_or(what.clone(), |stage| format!("{what}, {stage}"));
        let color = Some(color + if alone.is_some() { 2 * i } else { 0 });
        let is_held_out = metric != "train_loss" && metric != "lr" && metric != "grad_norm";
        if is_held_out {
            series.push(Series { stroke: Stroke::Dotted, color, ..Series::new(name, points) });
        } else if points.len() > 2 * SMOOTHED_OVER && metric == "train_loss" {
            let raw = Series { stroke: Stroke::Faint, color, ..Series::new("", points) };
            let smooth = Series { name, stroke: Stroke::Solid, ..raw.smoothed(SMOOTHED_OVER) };
            series.extend(match alone {
                Some(_) => vec![raw, smooth],
                // Of several runs the held-out curve has the name.
                None => vec![Series { name: String::new(), stroke: Stroke::Faint, ..smooth }],
            });
        } else {
            let (name, stroke) = match (alone, metric) {
                (None, "train_loss") => (String::new(), Stroke::Faint),
                _ => (name, Stroke::Solid),
            };
            series.push(Series { stroke, color, ..Series::new(name, points) });
        }
    }
    series
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn source(name: &str, shift: f64) -> Source {
        let line = |step: usize, metric: &str, value: f64, unit: &str| json!({"step": step, "metric": metric, "value": value, "unit": unit, "seed": 0});
        let mut lines: Vec<_> = (1..=40)
            .map(|step| line(step, "train_loss", shift + 1.0 / step as f64, "nats"))
            .collect();
        lines.push(line(40, "loss", shift + 0.5, "nats"));
        lines.push(line(40, "accuracy", 0.9, "fraction"));
        Source { name: name.into(), value: json!({"metrics": lines}) }
    }

    #[test]
    fn a_run_has_a_picture_a_metric() {
        let drawn = draw(&[source("a", 0.0)]).unwrap();
        assert_eq!(drawn.iter().map(|it| it.name).collect::<Vec<_>>(), ["", "accuracy"]);
        let Figure::Lines(chart) = &drawn[0].figure else { panic!("{drawn:?}") };
        let names: Vec<&str> = chart.series.iter().map(|it| &it.name[..]).collect();
        assert_eq!(names, ["", "training", "held out"]);
        assert_eq!(chart.y_label, "loss (nats)");
        assert_eq!(chart.series[2].points, [(40.0, 0.5)]);
    }

    #[test]
    fn several_runs_share_a_picture_each_in_its_colour() {
        let drawn = draw(&[source("a", 0.0), source("b", 1.0)]).unwrap();
        let Figure::Lines(chart) = &drawn[0].figure else { panic!("{drawn:?}") };
        let named: Vec<(&str, Option<usize>)> = chart
            .series
            .iter()
            .filter(|it| !it.name.is_empty())
            .map(|it| (&it.name[..], it.color))
            .collect();
        assert_eq!(named, [("a", Some(0)), ("b", Some(1))]);
    }
}
