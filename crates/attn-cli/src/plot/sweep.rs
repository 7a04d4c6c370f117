//! The settings of a sweep side by side.

use anyhow::{Result, bail};
use attn_viz::{Bar, BarChart, Baseline};
use serde::Deserialize;
use serde_json::Value;

use super::{Draw, Drawn, Figure, Kind, Range, Source, bar_size, told_apart};

pub(super) const KIND: Kind = Kind {
    name: "sweep",
    about: "the settings of a sweep with intervals over seeds (sweep.json of attn sweep)",
    reads: |value| {
        value.get("sweep").is_some() && value.get("settings").is_some_and(Value::is_array)
    },
    draw: Draw::Each(draw),
};

#[derive(Deserialize)]
struct Report {
    sweep: String,
    rows: String,
    settings: Vec<Setting>,
}

#[derive(Deserialize)]
struct Setting {
    name: String,
    #[serde(default)]
    runs: Vec<Run>,
    #[serde(flatten)]
    measures: Value,
}

#[derive(Deserialize)]
struct Run {
    /// Of classifiers.
    majority: Option<f64>,
}

/// A measure over the seeds of a setting.
#[derive(Deserialize)]
struct OverSeeds {
    n: usize,
    mean: Option<f64>,
    interval_95: Option<Range>,
}

/// What is drawn, the first that any setting has: its name, factor, label and decimals. `after` is the accuracy of a
/// classifier after training.
const MEASURES: [(&str, f64, &str, usize); 3] = [
    ("after", 100.0, "accuracy (%)", 1),
    ("kl", 1.0, "KL (nats per token)", 3),
    ("loss_nats_per_token", 1.0, "loss (nats per token)", 3),
];

fn draw(source: &Source) -> Result<Vec<Drawn>> {
    let report: Report = source.read()?;
    for (measure, factor, label, decimals) in MEASURES {
        let names: Vec<String> = report.settings.iter().map(|it| it.name.clone()).collect();
        let bars: Vec<Bar> = report
            .settings
            .iter()
            .zip(told_apart(&names))
            .filter_map(|(it, name)| bar(it, name, measure, factor))
            .collect();
        if bars.is_empty() {
            continue;
        }
        let missing = match report.settings.len() - bars.len() {
            0 => String::new(),
            n => format!("; {n} of {} settings have no finished run", report.settings.len()),
        };
        let figure = Figure::Bars(BarChart {
            title: report.sweep,
            subtitle: format!(
                "{}; 95 % intervals over seeds where there are several{missing}",
                report.rows
            ),
            y_label: label.into(),
            size: bar_size(bars.len()),
            bars,
            baselines: majority(&report.settings).into_iter().collect(),
            decimals,
            ..BarChart::default()
        });
        return Ok(vec![Drawn::new("", figure)]);
    }
    bail!("none of its {} settings has a finished run", report.settings.len())
}

/// The accuracy of always saying the most frequent class, where it is the same in all runs.
fn majority(settings: &[Setting]) -> Option<Baseline> {
    let mut all = settings.iter().flat_map(|it| &it.runs).map(|run| run.majority);
    let value = all.next()??;
    let is_same = all.all(|it| it == Some(value));
    is_same.then(|| Baseline { label: "majority class".into(), value: 100.0 * value })
}

fn bar(setting: &Setting, label: String, measure: &str, factor: f64) -> Option<Bar> {
    let found: OverSeeds = serde_json::from_value(setting.measures.get(measure)?.clone()).ok()?;
    Some(Bar {
        label,
        value: factor * found.mean?,
        interval: found
            .interval_95
            .filter(|_| found.n > 1)
            .map(|it| (factor * it.low, factor * it.high)),
        color: 0,
    })
}
