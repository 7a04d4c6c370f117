//! How many times as fast one program was as another, in turns.

use anyhow::Result;
use attn_viz::{Bar, BarChart, Baseline, Size};
use serde::Deserialize;
use serde_json::Value;

use super::{Draw, Drawn, Figure, Kind, Source};

pub(super) const KIND: Kind = Kind {
    name: "benchmark",
    about: "ratios of times with the spread over rounds (what scripts/bench_*.sh write)",
    reads: |value| {
        value.get("machine").is_some()
            && value.get("summary").is_some_and(|it| !ratios(it).is_empty())
    },
    draw: Draw::Each(draw),
};

/// A ratio over rounds.
#[derive(Deserialize)]
struct Ratio {
    /// The ratio of the medians of both: times have none, and are no ratios.
    of_medians: f64,
    /// Of rounds.
    min: f64,
    max: f64,
}

/// All ratios below `value`, each with the way to it.
fn ratios(value: &Value) -> Vec<(String, Ratio)> {
    let mut found = Vec::new();
    for (name, value) in value.as_object().into_iter().flatten() {
        let name = match name.as_str() {
            "s" => "time".to_owned(),
            "cpu_s" => "processor time".to_owned(),
            name => name.replace('_', " "),
        };
        match Ratio::deserialize(value) {
            Ok(ratio) => found.push((name, ratio)),
            Err(_) => {
                let below = ratios(value).into_iter();
                found.extend(below.map(|(rest, ratio)| (format!("{name}, {rest}"), ratio)));
            }
        }
    }
    found
}

fn draw(source: &Source) -> Result<Vec<Drawn>> {
    let title = source.value.get("title").and_then(Value::as_str).unwrap_or(&source.name);
    let bar = |(label, Ratio { of_medians, min, max }): (String, Ratio)| Bar {
        label,
        value: of_medians,
        interval: Some((min, max)),
        color: 0,
    };
    let bars: Vec<Bar> = ratios(&source.value["summary"]).into_iter().map(bar).collect();
    let chart = BarChart {
        title: title.to_owned(),
        subtitle:
            "ratios of medians over rounds in turns; whiskers: from the least round to the most"
                .into(),
        y_label: "ratio".into(),
        size: Size { width: (bars.len() as u32 * 130).clamp(1200, 4000), height: 800 },
        bars,
        baselines: vec![Baseline { label: "as fast".into(), value: 1.0 }],
        decimals: 2,
        ..BarChart::default()
    };
    Ok(vec![Drawn::new("", Figure::Bars(chart))])
}
