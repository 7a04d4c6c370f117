//! Which of two sentences a language model holds for the likelier one, by phenomenon.

use anyhow::Result;
use attn_viz::{Bar, BarChart, Baseline, Size};
use serde::Deserialize;

use super::{Draw, Drawn, Figure, Kind, Range, Source, called};

pub(super) const KIND: Kind = Kind {
    name: "blimp",
    about: "the share of pairs told right, by phenomenon (attn eval --task blimp)",
    reads: |value| value["terms"][0].get("n_pairs").is_some(),
    draw: Draw::Each(draw),
};

#[derive(Deserialize)]
struct Report {
    model: String,
    split: String,
    #[serde(flatten)]
    all: Share,
    terms: Vec<Term>,
}

#[derive(Deserialize)]
struct Term {
    name: String,
    #[serde(flatten)]
    share: Share,
}

#[derive(Deserialize)]
struct Share {
    accuracy: f64,
    interval_95: Range,
    n_pairs: usize,
}

fn draw(source: &Source) -> Result<Vec<Drawn>> {
    let Report { model, split, all, terms } = source.read()?;
    let n_pairs = all.n_pairs;
    let bar = |name: &str, share: &Share, color| Bar {
        label: name.replace('_', " "),
        value: 100.0 * share.accuracy,
        interval: Some((100.0 * share.interval_95.low, 100.0 * share.interval_95.high)),
        color,
    };
    let of_terms = terms.iter().map(|term| bar(&term.name, &term.share, 0));
    let chart = BarChart {
        title: format!("Sentences that {} tells right", called(&model)),
        subtitle: format!("BLiMP, {split}, {n_pairs} pairs; 95 % intervals (Wilson) over pairs"),
        y_label: "pairs told right (%)".into(),
        y_range: Some((0.0, 100.0)),
        bars: [bar("all", &all, 1)].into_iter().chain(of_terms).collect(),
        baselines: vec![Baseline { label: "chance".into(), value: 50.0 }],
        size: Size { width: 1600, height: 800 },
        ..BarChart::default()
    };
    Ok(vec![Drawn::new("", Figure::Bars(chart))])
}
