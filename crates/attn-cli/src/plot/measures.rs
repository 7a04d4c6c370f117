//! What runs and evaluations came to, side by side: what has no other picture.

use anyhow::Result;
use attn_viz::{Bar, BarChart, Baseline};

use super::{Draw, Drawn, Figure, Kind, Source, bar_size, called};
use crate::compare::{MEASURES, Measure};

pub(super) const KIND: Kind = Kind {
    name: "measures",
    about: "accuracy, KL, loss and perplexity with intervals, of several side by side (attn eval, a run's summary.json)",
    reads: |value| MEASURES.iter().any(|measure| measure.find(value).is_some()),
    draw: Draw::Together(draw),
};

/// What is drawn: the name of a picture, and its measures with what each is called beside the others.
const PICTURES: [(&str, &[(&str, &str)]); 4] = [
    ("accuracy", &[("accuracy_before", "before"), ("accuracy", "after")]),
    ("kl", &[("kl_before", "before"), ("kl", "after")]),
    ("loss", &[("loss_untouched", "before"), ("loss", "after")]),
    ("perplexity", &[("perplexity_untouched", "before"), ("perplexity", "after")]),
];

fn draw(sources: &[Source]) -> Result<Vec<Drawn>> {
    let mut drawn = Vec::new();
    for (name, measures) in PICTURES {
        let measures: Vec<(&Measure, &str)> = measures
            .iter()
            .filter_map(|&(name, role)| Some((MEASURES.iter().find(|it| it.name == name)?, role)))
            .collect();
        let mut bars = Vec::new();
        for source in sources {
            let mut of_source: Vec<(&str, Bar)> = Vec::new();
            for (color, (measure, role)) in measures.iter().enumerate() {
                let Some(found) = measure.find(&source.value) else { continue };
                let interval = found.interval_95.map(|it| (it.low, it.high));
                let bar = Bar { label: source.name.clone(), value: found.value, interval, color };
                of_source.push((role, bar));
            }
            // One figure alone is neither before nor after anything.
            let is_pair = of_source.len() > 1;
            bars.extend(of_source.into_iter().map(|(role, bar)| match is_pair {
                true => Bar { label: format!("{}: {role}", bar.label), ..bar },
                false => Bar { color: 0, ..bar },
            }));
        }
        let Some((measure, _)) = measures.iter().find(|it| !bars.is_empty() && it.1 == "after")
        else {
            continue;
        };
        let has_interval = bars.iter().any(|bar| bar.interval.is_some());
        let is_share = measure.unit == "%";
        let figure = Figure::Bars(BarChart {
            title: of_what(sources),
            subtitle: if has_interval { "95 % intervals over rows".into() } else { String::new() },
            size: bar_size(bars.len()),
            y_label: measure.heading(),
            y_range: is_share.then_some((0.0, 100.0)),
            baselines: if is_share { majority(sources) } else { Vec::new() },
            decimals: measure.decimals,
            bars,
            ..BarChart::default()
        });
        drawn.push(Drawn::new(if drawn.is_empty() { "" } else { name }, figure));
    }
    Ok(drawn)
}

/// The model, and the rows where they are named, of one source.
fn of_what(sources: &[Source]) -> String {
    let [one] = sources else { return format!("{} results", sources.len()) };
    let text = |names: &[&str]| {
        names.iter().find_map(|name| one.value.get(*name)?.as_str()).map(str::to_owned)
    };
    let model = text(&["name", "model"]).map(|name| called(&name).to_owned());
    let rows = text(&["task", "source"]);
    let parts: Vec<String> = [model, rows].into_iter().flatten().collect();
    if parts.is_empty() { one.name.clone() } else { parts.join(", ") }
}

/// The accuracy of always saying the most frequent class, where all sources have the same.
fn majority(sources: &[Source]) -> Vec<Baseline> {
    let of = |source: &Source| source.value.get("majority_accuracy")?.as_f64();
    let Some(value) = of(&sources[0]) else { return Vec::new() };
    let is_same = sources.iter().all(|it| of(it) == Some(value));
    let line = Baseline { label: "majority class".into(), value: 100.0 * value };
    if is_same { vec![line] } else { Vec::new() }
}
