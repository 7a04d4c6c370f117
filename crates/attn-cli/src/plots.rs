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
        subtitle: [subtitle(attention), missing(&lines)]
            .into_iter()
            .flatten()
            .collect::<Vec<_>>()
            .join("; "),
        x_label: "step".into(),
        y_label: format!("loss ({unit})"),
        series: curves(&lines),
        ..LineChart::default()
    };
    Ok(chart.png(out)?)
}

/// How many losses are no numbers, where any are.
fn missing(lines: &[Line]) -> Option<String> {
    let losses = || lines.iter().filter(|line| ["train_loss", "loss"].contains(&&line.metric[..]));
    let n_missing = losses().filter(|line| line.value.is_none()).count();
    (n_missing > 0).then(|| format!("{n_missing} of {} losses are no number", losses().count()))
}

/// The points between those whose value is no number.
pub(crate) fn stretches(points: &[(f64, f64)]) -> Vec<Vec<(f64, f64)>> {
    let all = points.split(|point| point.1.is_nan());
    all.filter(|stretch| !stretch.is_empty()).map(<[_]>::to_vec).collect()
}

/// The curves of a loss picture.
fn curves(lines: &[Line]) -> Vec<Series> {
    let points = |name: &str| -> Vec<(f64, f64)> {
        let of_name = lines.iter().filter(|line| line.metric == name);
        of_name.map(|line| (line.step as f64, line.value.unwrap_or(f64::NAN))).collect()
    };
    let (train, held_out) = (points("train_loss"), points("loss"));
    let mut series = Vec::new();
    let is_smoothed = train.len() > 2 * SMOOTHED_OVER;
    let named = |i: usize, name: &str| if i == 0 { name.to_owned() } else { String::new() };
    for (i, stretch) in stretches(&train).into_iter().enumerate() {
        let raw = Series { color: Some(0), ..Series::new(named(i, "training"), stretch) };
        if is_smoothed {
            let smooth = raw.smoothed(SMOOTHED_OVER);
            series.push(Series { stroke: Stroke::Faint, ..raw });
            let name = named(i, &format!("training, mean of {SMOOTHED_OVER} points"));
            series.push(Series { name, stroke: Stroke::Solid, ..smooth });
        } else {
            series.push(raw);
        }
    }
    for (i, stretch) in stretches(&held_out).into_iter().enumerate() {
        let (stroke, color) = (Stroke::Dotted, Some(1));
        series.push(Series { stroke, color, ..Series::new(named(i, "held out"), stretch) });
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

    #[test]
    fn a_loss_that_is_no_number_breaks_its_curve() {
        let value = |step| if step == 5 { None } else { Some(0.5) };
        let lines: Vec<Line> = (1..=10)
            .map(|step| Line { step, metric: "train_loss".into(), value: value(step) })
            .collect();
        let found: Vec<_> =
            curves(&lines).into_iter().map(|it| (it.name, it.points.len())).collect();
        assert_eq!(found, [("training".into(), 4), (String::new(), 5)]);
        assert_eq!(missing(&lines).unwrap(), "1 of 10 losses are no number");
    }
}
