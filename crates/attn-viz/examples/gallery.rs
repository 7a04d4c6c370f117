//! Draws pictures of made-up numbers, of each kind and in each theme: `cargo run -p attn-viz --example gallery FOLDER`.

use std::error::Error;
use std::path::PathBuf;

use attn_viz::{Bar, BarChart, Baseline, LineChart, Picture, Series, Stroke, Theme};

fn main() -> Result<(), Box<dyn Error>> {
    let folder = std::env::args_os().nth(1).map(PathBuf::from).ok_or("usage: gallery FOLDER")?;
    for (theme, suffix) in [(Theme::Light, "light"), (Theme::Dark, "dark")] {
        loss(theme).png(folder.join(format!("loss-{suffix}.png")))?;
        seeds(theme).png(folder.join(format!("seeds-{suffix}.png")))?;
        accuracy(theme).png(folder.join(format!("accuracy-{suffix}.png")))?;
    }
    Ok(())
}

/// A noise that needs no generator: the fractional parts of a fixed sequence.
fn noise(i: usize) -> f64 {
    ((i as f64 * 12.9898).sin() * 43_758.545_3).fract()
}

fn loss(theme: Theme) -> LineChart {
    let curve = |step: f64| 0.18 + 0.52 * (-step / 900.).exp();
    let raw = Series {
        name: "train, each step".into(),
        points: (0..4000).map(|i| (i as f64, curve(i as f64) * (1. + 0.35 * noise(i)))).collect(),
        stroke: Stroke::Faint,
        color: Some(0),
        ..Series::default()
    };
    let smooth =
        Series { name: "train, mean of 101".into(), stroke: Stroke::Solid, ..raw.smoothed(101) };
    let validation = Series {
        name: "validation".into(),
        points: (0..=8)
            .map(|i| {
                (f64::from(i) * 500., curve(f64::from(i) * 500.) + 0.02 + 0.004 * f64::from(i))
            })
            .collect(),
        stroke: Stroke::Dotted,
        color: Some(1),
        ..Series::default()
    };
    LineChart {
        title: "Fine-tuning on the sample task".into(),
        subtitle: "made-up numbers".into(),
        x_label: "step".into(),
        y_label: "cross-entropy (nats)".into(),
        series: vec![raw, smooth, validation],
        theme,
        ..LineChart::default()
    }
}

fn seeds(theme: Theme) -> LineChart {
    let series = |name: &str, top: f64, rate: f64| {
        let points: Vec<(f64, f64)> = (0..=20)
            .map(|i| (f64::from(i) * 5e3, top - (top - 50.) * (-f64::from(i) * rate).exp()))
            .collect();
        let band = points.iter().map(|(x, y)| (y - 1.5 - x / 1e5, y + 1.5 + x / 1e5)).collect();
        Series { name: name.into(), points, band: Some(band), ..Series::default() }
    };
    LineChart {
        title: "Accuracy by training examples".into(),
        subtitle: "made-up numbers; band: one standard deviation".into(),
        x_label: "training examples".into(),
        y_label: "accuracy (%)".into(),
        series: vec![
            series("softmax", 92., 0.3),
            series("linear", 88., 0.2),
            series("window 32", 84., 0.35),
        ],
        baselines: vec![Baseline { label: "majority class".into(), value: 50.9 }],
        theme,
        ..LineChart::default()
    }
}

fn accuracy(theme: Theme) -> BarChart {
    let bar = |label: &str, value: f64, interval, color| Bar {
        label: label.into(),
        value,
        interval: Some(interval),
        color,
    };
    BarChart {
        title: "Validation accuracy before and after fine-tuning".into(),
        subtitle: "made-up numbers; whiskers: 95 % interval".into(),
        y_label: "accuracy (%)".into(),
        y_range: Some((0., 100.)),
        bars: vec![
            bar("before", 50.9, (47.6, 54.2), 0),
            bar("after one epoch", 76.3, (73.3, 79.0), 1),
            bar("after three epochs, best checkpoint", 81.2, (78.5, 83.7), 1),
        ],
        baselines: vec![Baseline { label: "majority class".into(), value: 50.9 }],
        theme,
        ..BarChart::default()
    }
}
