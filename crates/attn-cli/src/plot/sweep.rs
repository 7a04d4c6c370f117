//! The settings of a sweep side by side.

use anyhow::Result;
use attn_viz::{Bar, BarChart};
use serde::Deserialize;
use serde_json::Value;

use super::{Draw, Drawn, Figure, Kind, Range, Source};

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
    #[serde(flatten)]
    measures: Value,
}

/// A measure over the seeds of a setting.
#[derive(Deserialize)]
struct OverSeeds {
    n: usize,
    mean: Option<f64>,
    interval_95: Option<Range>,
}

/// What is drawn, the first that all settings have: its name, factor, label and decimals.
const MEASURES: [(&str, f64, &str, usize); 3] = [
    ("accuracy", 100.0, "accuracy (%)", 1),
    ("kl", 1.0, "KL (nats per token)", 3),
    ("loss_nats_per_token", 1.0, "loss (nats per token)", 3),
];

fn draw(source: &Source) -> Result<Vec<Drawn>> {
    let report: Report = source.read()?;
    for (measure, factor, label, decimals) in MEASURES {
        let bars: Vec<Bar> =
            report.settings.iter().filter_map(|it| bar(it, measure, factor)).collect();
        if bars.is_empty() {
            continue;
        }
        let figure = Figure::Bars(BarChart {
            title: report.sweep,
            subtitle: format!("{}; 95 % intervals over seeds where there are several", report.rows),
            y_label: label.into(),
            bars,
            decimals,
            ..BarChart::default()
        });
        return Ok(vec![Drawn::new("", figure)]);
    }
    Ok(Vec::new())
}

fn bar(setting: &Setting, measure: &str, factor: f64) -> Option<Bar> {
    let found: OverSeeds = serde_json::from_value(setting.measures.get(measure)?.clone()).ok()?;
    Some(Bar {
        label: setting.name.replace(',', ", "),
        value: factor * found.mean?,
        interval: found
            .interval_95
            .filter(|_| found.n > 1)
            .map(|it| (factor * it.low, factor * it.high)),
        color: 0,
    })
}
