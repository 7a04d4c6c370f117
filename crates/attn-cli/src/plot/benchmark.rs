//! How many times as fast one program was as another, in turns.

use anyhow::Result;
use attn_viz::{Bar, BarChart, Baseline};
use serde::Deserialize;
use serde_json::Value;

use super::{Draw, Drawn, Figure, Kind, Source, bar_size};

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
    median: f64,
    min: f64,
    max: f64,
    /// Ratios have it, times do not.
    #[serde(rename = "of_medians")]
    _of_medians: f64,
}

/// All ratios of times below `value`, each with the way to it. Above 1 ours took less.
fn ratios(value: &Value) -> Vec<(String, Ratio)> {
    let mut found = Vec::new();
    for (name, value) in value.as_object().into_iter().flatten() {
        let name = match name.as_str() {
            "s" => "time".to_owned(),
            "cpu_s" => "processor time".to_owned(),
            "ratio" | "against" => "against theirs".to_owned(),
            "faster" => "against all heads".to_owned(),
            // Of what the bytes that are spared allow: no ratio of two programs.
            "share" => continue,
            name => name.replace('_', " ").replace(" / ", " against "),
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
    let stem = source.path.file_stem().map(|it| it.to_string_lossy().into_owned());
    let title = source.value.get("title").and_then(Value::as_str).map(str::to_owned);
    let title = title.or(stem).unwrap_or_default();
    let bar = |(label, Ratio { median, min, max, .. }): (String, Ratio)| Bar {
        label,
        value: median,
        // One round has no spread.
        interval: (min < max).then_some((min, max)),
        color: 0,
    };
    let bars: Vec<Bar> = ratios(&source.value["summary"]).into_iter().map(bar).collect();
    let chart = BarChart {
        title,
        subtitle: "medians over rounds in turns; whiskers: from the least round to the most; above 1 ours took less"
            .into(),
        y_label: "times as fast".into(),
        size: bar_size(bars.len()),
        bars,
        baselines: vec![Baseline { label: "as fast".into(), value: 1.0 }],
        decimals: 2,
        ..BarChart::default()
    };
    Ok(vec![Drawn::new("", Figure::Bars(chart))])
}
