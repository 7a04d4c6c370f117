//! What was measured over the steps of runs.

use anyhow::{Result, ensure};
use attn_viz::{LineChart, Series, Stroke};
use serde::Deserialize;

use super::{Draw, Drawn, Figure, Kind, Source};
use crate::plots::stretches;

pub(super) const KIND: Kind = Kind {
    name: "curves",
    about: "loss, KL, perplexity and what else was measured over steps (a run's folder or metrics.jsonl), several runs in one",
    reads: |value| value.get("metrics").is_some_and(serde_json::Value::is_array),
    draw: Draw::Together(draw),
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

impl Run {
    /// Whether any number of it was measured.
    fn has(&self, metric: &str) -> bool {
        self.metrics.iter().any(|line| line.metric == metric && line.value.is_some())
    }
}

fn draw(sources: &[Source]) -> Result<Vec<Drawn>> {
    let runs: Vec<Run> = sources.iter().map(Source::read).collect::<Result<_>>()?;
    let mut drawn = Vec::new();
    for (name, metrics) in METRICS {
        let (mut series, mut unit) = (Vec::new(), String::new());
        let held_out: Vec<bool> =
            runs.iter().map(|run| metrics[1..].iter().any(|it| run.has(it))).collect();
        for (at, (source, run)) in sources.iter().zip(&runs).enumerate() {
            for metric in metrics {
                let alone = (sources.len() == 1).then_some(*metric);
                let color = if alone.is_some() { series.len() } else { at };
                series.extend(curves(run, metric, alone, &source.name, color, held_out[at]));
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
        let missing = missing(&runs, metrics);
        let label = metrics[metrics.len() - 1].replace('_', " ");
        drawn.push(Drawn::new(
            name,
            Figure::Lines(LineChart {
                title: match sources {
                    [one] => one.name.clone(),
                    _ => format!("{} runs", sources.len()),
                },
                subtitle: [
                    match (name, sources.len()) {
                        ("", n) if n > 1 && held_out.contains(&true) => {
                            "pale: training; dots: held out".into()
                        }
                        _ => String::new(),
                    },
                    missing,
                ]
                .into_iter()
                .filter(|it| !it.is_empty())
                .collect::<Vec<_>>()
                .join("; "),
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

/// How many values are no numbers, where any are.
fn missing(runs: &[Run], metrics: &[&str]) -> String {
    let count = |metric: &&str| {
        let lines = runs.iter().flat_map(|run| &run.metrics).filter(|line| line.metric == **metric);
        let (n, n_missing) = lines.fold((0, 0), |(n, missing), line| {
            (n + 1, missing + usize::from(line.value.is_none()))
        });
        (n_missing > 0).then(|| {
            format!("{}: {n_missing} of {n} values are no number", metric.replace('_', " "))
        })
    };
    metrics.iter().filter_map(count).collect::<Vec<_>>().join("; ")
}

/// The curves of one metric of one run: raw values behind their mean where there are many, dots where there are few.
fn curves(
    run: &Run,
    metric: &str,
    alone: Option<&str>,
    name: &str,
    color: usize,
    has_held_out: bool,
) -> Vec<Series> {
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
            of.map(|line| (line.step as f64, line.value.unwrap_or(f64::NAN))).collect();
        let what = alone.map_or(name.to_owned(), |metric| match metric {
            "train_loss" => "training".to_owned(),
            "loss" => "held out".to_owned(),
            other => other.replace('_', " "),
        });
        let name = stage.map_or(what.clone(), |stage| format!("{what}, {stage}"));
        let color = Some(color + if alone.is_some() { 2 * i } else { 0 });
        let is_held_out = metric != "train_loss" && metric != "lr" && metric != "grad_norm";
        // Of several runs the held-out curve has the name, where there is one.
        let is_named = alone.is_some() || metric != "train_loss" || !has_held_out;
        let is_smoothed = metric == "train_loss" && points.len() > 2 * SMOOTHED_OVER;
        for (i, stretch) in stretches(&points).into_iter().enumerate() {
            let name = if is_named && i == 0 { name.clone() } else { String::new() };
            let raw = Series { color, ..Series::new(name, stretch) };
            if is_held_out {
                series.push(Series { stroke: Stroke::Dotted, ..raw });
            } else if is_smoothed {
                let smooth = raw.smoothed(SMOOTHED_OVER);
                if is_named {
                    series.push(Series { name: String::new(), stroke: Stroke::Faint, ..raw });
                    series.push(Series { stroke: Stroke::Solid, ..smooth });
                } else {
                    series.push(Series { stroke: Stroke::Faint, ..smooth });
                }
            } else {
                let stroke = if is_named { Stroke::Solid } else { Stroke::Faint };
                series.push(Series { stroke, ..raw });
            }
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
        Source::of(name, json!({"metrics": lines}))
    }

    #[test]
    fn a_run_has_a_picture_a_metric() {
        let drawn = draw(&[source("a", 0.0)]).unwrap();
        assert_eq!(drawn.iter().map(|it| &it.name[..]).collect::<Vec<_>>(), ["", "accuracy"]);
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

    #[test]
    fn runs_with_nothing_held_out_are_named_by_their_training() {
        let trained = |name: &str| {
            let lines: Vec<_> = (1..=40)
                .map(|step| json!({"step": step, "metric": "train_loss", "value": 1.0, "unit": "nats"}))
                .collect();
            Source::of(name, json!({"metrics": lines}))
        };
        let drawn = draw(&[trained("a"), trained("b")]).unwrap();
        let Figure::Lines(chart) = &drawn[0].figure else { panic!("{drawn:?}") };
        let names: Vec<&str> = chart.series.iter().map(|it| &it.name[..]).collect();
        assert_eq!(names, ["", "a", "", "b"]);
        assert_eq!(chart.subtitle, "");
    }

    #[test]
    fn a_curve_breaks_where_a_run_diverged() {
        let mut run = source("a", 0.0);
        for at in [4, 38, 39] {
            run.value["metrics"][at]["value"] = json!(null);
        }
        let drawn = draw(&[run]).unwrap();
        let Figure::Lines(chart) = &drawn[0].figure else { panic!("{drawn:?}") };
        let lengths: Vec<usize> = chart.series.iter().map(|it| it.points.len()).collect();
        assert_eq!(lengths, [4, 4, 33, 33, 1], "raw and mean on either side of the gap, held out");
        assert_eq!(chart.subtitle, "train loss: 3 of 40 values are no number");
        assert!(chart.series.iter().flat_map(|it| &it.points).all(|point| point.1.is_finite()));
    }
}
