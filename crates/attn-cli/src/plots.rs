//! The pictures of a run.

use std::{fs, path::Path};

use anyhow::{Context, Result};
use attn_core::Variant;
use attn_eval::{Accuracy, stats::Interval};
use attn_viz::{Bar, BarChart, Baseline, LineChart, Picture, Series, Stroke};
use serde::Deserialize;

use crate::surgery::describe;

/// A line of `metrics.jsonl`, as far as it is drawn.
#[derive(Deserialize)]
struct Line {
    step: u64,
    metric: String,
    value: Option<f64>,
}

/// Points of the curve whose mean is drawn in front of it.
const SMOOTHED_OVER: usize = 9;

/// Draws the losses in `metrics` over the steps: the training loss, and that of rows held out where there are any.
pub(crate) fn loss(
    metrics: &Path,
    title: &str,
    attention: &[Variant],
    unit: &str,
    out: &Path,
) -> Result<()> {
    let text = fs::read_to_string(metrics)
        .with_context(|| format!("cannot read `{}`", metrics.display()))?;
    let lines: Vec<Line> = text
        .lines()
        .map(serde_json::from_str)
        .collect::<Result<_, _>>()
        .with_context(|| format!("`{}` is damaged", metrics.display()))?;
    let chart = LineChart {
        title: title.to_owned(),
        subtitle: subtitle(attention).unwrap_or_default(),
        x_label: "step".into(),
        y_label: format!("loss ({unit})"),
        series: curves(&lines),
        ..LineChart::default()
    };
    Ok(chart.png(out)?)
}

/// The curves of a loss picture.
fn curves(lines: &[Line]) -> Vec<Series> {
    let points = |name: &str| -> Vec<(f64, f64)> {
        let of_name = lines.iter().filter(|line| line.metric == name);
        of_name.filter_map(|line| Some((line.step as f64, line.value?))).collect()
    };
    let (train, held_out) = (points("train_loss"), points("loss"));
    let mut series = Vec::new();
    if train.len() > 2 * SMOOTHED_OVER {
        let raw =
            Series { stroke: Stroke::Faint, color: Some(0), ..Series::new("training", train) };
        let smooth = raw.smoothed(SMOOTHED_OVER);
        series.push(raw);
        let name = format!("training, mean of {SMOOTHED_OVER} points");
        series.push(Series { name, stroke: Stroke::Solid, ..smooth });
    } else if !train.is_empty() {
        series.push(Series { color: Some(0), ..Series::new("training", train) });
    }
    if !held_out.is_empty() {
        let color = Some(1);
        series.push(Series { stroke: Stroke::Dotted, color, ..Series::new("held out", held_out) });
    }
    series
}

/// Draws accuracies and their 95 % intervals in percent, against always saying the most frequent class.
pub(crate) fn accuracy(
    title: &str,
    attention: &[Variant],
    bars: &[(&str, &Accuracy)],
    majority: f64,
    n_rows: usize,
    out: &Path,
) -> Result<()> {
    let bar = |&(label, score): &(&str, &Accuracy)| {
        let Interval { low, high } = score.interval_95;
        Bar {
            label: label.to_owned(),
            value: 100.0 * score.accuracy,
            interval: Some((100.0 * low, 100.0 * high)),
            color: 0,
        }
    };
    let chart = BarChart {
        title: title.to_owned(),
        subtitle: [Some(format!("{n_rows} rows, 95 % intervals (Wilson)")), subtitle(attention)]
            .into_iter()
            .flatten()
            .collect::<Vec<_>>()
            .join("; "),
        y_label: "accuracy (%)".into(),
        y_range: Some((0.0, 100.0)),
        bars: bars.iter().map(bar).collect(),
        baselines: vec![Baseline { label: "majority class".into(), value: 100.0 * majority }],
        ..BarChart::default()
    };
    Ok(chart.png(out)?)
}

/// The attention, where it is not that of plain transformers.
fn subtitle(attention: &[Variant]) -> Option<String> {
    describe(attention).map(|text| format!("attention: {text}"))
}

/// What a data source is called in a picture: a file by its name.
pub(crate) fn short(source: &str) -> String {
    let path = Path::new(source);
    match path.file_name() {
        Some(name) if path.exists() => name.to_string_lossy().into_owned(),
        _ => source.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_name_a_changed_attention() {
        let window: Variant = serde_json::from_str(r#"{"kind": "window", "size": 4}"#).unwrap();

        assert_eq!(subtitle(&[Variant::default()]), None);
        assert_eq!(subtitle(&[window]).unwrap(), "attention: window (size 4) in all layers");
    }

    #[test]
    fn every_curve_is_in_the_legend() {
        let line = |step, metric: &str| Line { step, metric: metric.into(), value: Some(0.5) };
        let lines: Vec<Line> =
            (1..=40).map(|step| line(step, "train_loss")).chain([line(40, "loss")]).collect();
        let names = |lines: &[Line]| -> Vec<String> {
            curves(lines).into_iter().map(|series| series.name).collect()
        };

        assert_eq!(names(&lines), ["training", "training, mean of 9 points", "held out"]);
        assert_eq!(names(&lines[..18]), ["training"], "too few to smooth");
    }
}
