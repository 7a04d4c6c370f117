//! Why a model that is near to another may not write like it.

use anyhow::Result;
use attn_viz::{Bar, BarChart, LineChart, Series, Stroke};
use serde::Deserialize;

use super::{Draw, Drawn, Figure, Kind, Source, called};

pub(super) const KIND: Kind = Kind {
    name: "explanation",
    about: "KL by shift, and how a model's texts are worded (attn explain, of language models that write)",
    reads: |value| value["kl_by_shift"].get(0).is_some(),
    draw: Draw::Each(draw),
};

#[derive(Deserialize)]
struct Report {
    model: String,
    against: String,
    kl_by_shift: Vec<(f64, f64)>,
    written: Vec<Written>,
}

#[derive(Deserialize)]
struct Written {
    way: String,
    model: Texts,
    baseline: Texts,
}

#[derive(Deserialize)]
struct Texts {
    /// Absent of texts that are too short.
    wording: Option<Wording>,
}

#[derive(Deserialize)]
struct Wording {
    rep_4: f64,
    distinct_1: f64,
    distinct_2: f64,
    distinct_3: f64,
}

fn draw(source: &Source) -> Result<Vec<Drawn>> {
    let report: Report = source.read()?;
    let [model, against] = [&report.model, &report.against].map(|it| called(it));
    let shifts = LineChart {
        title: format!("Whether {model} is aligned with {against}"),
        subtitle:
            "aligned: the least at 0; least at another shift: one of the two sees a token too far"
                .into(),
        x_label: "the baseline's predictions are moved by (tokens)".into(),
        y_label: "KL (nats per token)".into(),
        series: vec![Series {
            stroke: Stroke::Dotted,
            ..Series::new("", report.kl_by_shift.iter().copied())
        }],
        ..LineChart::default()
    };
    let mut drawn = vec![Drawn::new("", Figure::Lines(shifts))];
    let mut bars = Vec::new();
    for written in &report.written {
        let texts = [(&written.model, model, 0), (&written.baseline, against, 1)];
        for (texts, name, color) in texts {
            let Some(Wording { rep_4, distinct_1, distinct_2, distinct_3 }) = texts.wording else {
                continue;
            };
            for (of, value) in [
                ("rep-4", rep_4),
                ("distinct-1", distinct_1),
                ("distinct-2", distinct_2),
                ("distinct-3", distinct_3),
            ] {
                let label = format!("{name}, {}, {of}", written.way);
                bars.push(Bar { label, value, color, interval: None });
            }
        }
    }
    if !bars.is_empty() {
        let texts = BarChart {
            title: format!("How {model} and {against} write"),
            subtitle: "rep-4: share of 4-grams that were there before; distinct-n: share of n-grams that are new".into(),
            y_label: "share".into(),
            y_range: Some((0.0, 1.0)),
            bars,
            decimals: 2,
            size: attn_viz::Size { width: 2000, height: 800 },
            ..BarChart::default()
        };
        drawn.push(Drawn::new("texts", Figure::Bars(texts)));
    }
    Ok(drawn)
}
