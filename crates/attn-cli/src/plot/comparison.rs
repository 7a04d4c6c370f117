//! How far runs are from the first of them, on the rows that both report on.

use anyhow::{Result, ensure};
use attn_viz::{Bar, BarChart, Baseline};
use serde::Deserialize;

use super::{Draw, Drawn, Figure, Kind, Range, Source};

pub(super) const KIND: Kind = Kind {
    name: "comparison",
    about: "how far runs are from the first, on the same rows (attn compare --format json)",
    reads: |value| value["runs"][1].get("against_first").is_some(),
    draw: Draw::Each(draw),
};

#[derive(Deserialize)]
struct Report {
    runs: Vec<Run>,
}

#[derive(Deserialize)]
struct Run {
    run: String,
    against_first: Option<Against>,
}

#[derive(Deserialize)]
struct Against {
    of: String,
    difference: Option<f64>,
    difference_interval_95: Option<Range>,
}

/// What differences are of, each a picture: as results name it, the label of its axis, and decimals.
const OF: [(&str, &str, usize); 2] = [
    ("accuracy", "accuracy less the first's (points)", 1),
    ("loss", "loss less the first's (nats per token)", 4),
];

fn draw(source: &Source) -> Result<Vec<Drawn>> {
    let Report { runs } = source.read()?;
    let mut drawn = Vec::new();
    for (of, label, decimals) in OF {
        let bar = |run: &Run| {
            let against = run.against_first.as_ref().filter(|it| it.of == of)?;
            Some(Bar {
                label: run.run.clone(),
                value: against.difference?,
                interval: against.difference_interval_95.map(|it| (it.low, it.high)),
                ..Bar::default()
            })
        };
        let bars: Vec<Bar> = runs.iter().filter_map(bar).collect();
        if bars.is_empty() {
            continue;
        }
        let chart = BarChart {
            title: format!("Against {}", runs[0].run),
            subtitle: "on the same rows; 95 % intervals by the paired bootstrap over rows".into(),
            y_label: label.into(),
            bars,
            decimals,
            baselines: vec![Baseline { label: "no difference".into(), value: 0.0 }],
            ..BarChart::default()
        };
        drawn.push(Drawn::new(if drawn.is_empty() { "" } else { of }, Figure::Bars(chart)));
    }
    ensure!(
        !drawn.is_empty(),
        "no run was tested against the first: their rows differ, or were not kept"
    );
    Ok(drawn)
}
