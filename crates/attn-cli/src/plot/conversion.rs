//! Fewer key/value heads: what each way to merge them costs, and what each layer loses.

use anyhow::Result;
use attn_viz::{Axis, Bar, BarChart, LineChart, Series, Stroke};
use serde::Deserialize;
use serde_json::Value;

use super::{Draw, Drawn, Figure, Kind, Range, Source, called};

pub(super) const KIND: Kind = Kind {
    name: "conversion",
    about: "KL by method and by layer of fewer key/value heads (conversion.json of attn convert)",
    reads: |value| {
        value.get("kv_heads_after").is_some()
            && (value.get("compared").is_some() || value.get("sensitivity").is_some())
    },
    draw: Draw::Each(draw),
};

#[derive(Deserialize)]
struct Report {
    model: String,
    kv_heads_before: Vec<usize>,
    kv_heads_after: Vec<usize>,
    #[serde(default)]
    compared: Vec<Compared>,
    #[serde(default)]
    sensitivity: Vec<Layer>,
}

#[derive(Deserialize)]
struct Compared {
    /// A name, or a name and what was drawn by.
    method: Value,
    refit: bool,
    kl_nats_per_token: f64,
    kl_interval_95: Range,
}

#[derive(Deserialize)]
struct Layer {
    layer: usize,
    tried: Vec<Tried>,
}

#[derive(Deserialize)]
struct Tried {
    n_kv_heads: usize,
    kl_nats_per_token: f64,
    kl_interval_95: Option<Range>,
}

fn draw(source: &Source) -> Result<Vec<Drawn>> {
    let report: Report = source.read()?;
    let mut drawn = Vec::new();
    if !report.compared.is_empty() {
        drawn.push(Drawn::new("", Figure::Bars(methods(&report))));
    }
    if !report.sensitivity.is_empty() {
        let name = if drawn.is_empty() { "" } else { "layers" };
        drawn.push(Drawn::new(name, layers(&report)));
    }
    Ok(drawn)
}

/// What became of the heads: `6 to 3`.
fn change(report: &Report) -> String {
    let numbers = |of: &[usize]| {
        let mut all = of.to_vec();
        all.sort_unstable();
        all.dedup();
        match all.as_slice() {
            [one] => one.to_string(),
            _ => of.iter().map(usize::to_string).collect::<Vec<_>>().join(", "),
        }
    };
    format!(
        "key/value heads by layer: {} to {}",
        numbers(&report.kv_heads_before),
        numbers(&report.kv_heads_after)
    )
}

fn methods(report: &Report) -> BarChart {
    let name = |method: &Value| match method {
        Value::Object(fields) => fields.keys().next().cloned().unwrap_or_default(),
        name => name.as_str().unwrap_or_default().replace('_', "-"),
    };
    let bar = |it: &Compared| Bar {
        label: format!("{}{}", name(&it.method), if it.refit { " fitted" } else { "" }),
        value: it.kl_nats_per_token,
        interval: Some((it.kl_interval_95.low, it.kl_interval_95.high)),
        color: usize::from(it.refit),
    };
    BarChart {
        title: format!("Ways to merge the key/value heads of {}", called(&report.model)),
        subtitle: format!("{}; nothing was trained; 95 % intervals", change(report)),
        y_label: "KL (nats per token)".into(),
        bars: report.compared.iter().map(bar).collect(),
        decimals: 4,
        ..BarChart::default()
    }
}

/// Curves over the number of heads, or bars where each layer was tried with one number.
fn layers(report: &Report) -> Figure {
    let title = format!("What each layer of {} loses alone", called(&report.model));
    let most = report.sensitivity.iter().map(|layer| layer.tried.len()).max().unwrap_or(0);
    if most <= 2 {
        let bar = |layer: &Layer| {
            let tried = layer.tried.last()?;
            Some(Bar {
                label: format!("layer {}: {}", layer.layer, tried.n_kv_heads),
                value: tried.kl_nats_per_token,
                interval: tried.kl_interval_95.map(|it| (it.low, it.high)),
                ..Bar::default()
            })
        };
        return Figure::Bars(BarChart {
            title,
            subtitle: "layer: its key/value heads, all others as they were; 95 % intervals".into(),
            y_label: "KL (nats per token)".into(),
            bars: report.sensitivity.iter().filter_map(bar).collect(),
            decimals: 4,
            ..BarChart::default()
        });
    }
    let curve = |layer: &Layer| {
        // A layer as it is loses nothing, which has no logarithm.
        let lost = layer.tried.iter().filter(|it| it.kl_nats_per_token > 0.0);
        let points = lost.map(|it| (it.n_kv_heads as f64, it.kl_nats_per_token));
        Series { stroke: Stroke::Dotted, ..Series::new(format!("layer {}", layer.layer), points) }
    };
    let series: Vec<Series> =
        report.sensitivity.iter().map(curve).filter(|it| !it.points.is_empty()).collect();
    Figure::Lines(LineChart {
        title,
        subtitle: "all others as they were; where nothing is lost there is no point".into(),
        x_label: "key/value heads of the layer".into(),
        y_label: "KL (nats per token)".into(),
        x_axis: Axis::Log,
        y_axis: Axis::Log,
        series,
        ..LineChart::default()
    })
}
