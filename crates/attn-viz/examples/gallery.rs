//! Draws pictures of made-up numbers, of each kind and in each theme: `cargo run -p attn-viz --example gallery FOLDER`.

use std::error::Error;
use std::path::PathBuf;

use attn_viz::{
    Axis, Bar, BarChart, Baseline, Group, HeatMap, Histogram, LineChart, Panels, Picture, PowerLaw,
    Series, Shades, Stroke, Theme, Values,
};

fn main() -> Result<(), Box<dyn Error>> {
    let folder = std::env::args_os().nth(1).map(PathBuf::from).ok_or("usage: gallery FOLDER")?;
    std::fs::create_dir_all(&folder)?;
    for (theme, suffix) in [(Theme::Light, "light"), (Theme::Dark, "dark")] {
        for (name, picture) in pictures(theme) {
            for extension in ["png", "svg"] {
                picture.save(&folder.join(format!("{name}-{suffix}.{extension}")))?;
            }
        }
    }
    Ok(())
}

/// One of each kind, by name.
pub(crate) fn pictures(theme: Theme) -> Vec<(&'static str, Box<dyn Picture>)> {
    vec![
        ("loss", Box::new(loss(theme))),
        ("seeds", Box::new(seeds(theme))),
        ("accuracy", Box::new(accuracy(theme))),
        ("heads", Box::new(heads(theme))),
        ("change", Box::new(change(theme))),
        ("model", Box::new(model(theme))),
        ("long", Box::new(long(theme))),
        ("time", Box::new(time(theme))),
        ("scores", Box::new(scores(theme))),
        ("needle", Box::new(needle(theme))),
        ("pair", Box::new(pair(theme))),
    ]
}

pub(crate) fn heads(theme: Theme) -> HeatMap {
    let score = |layer: usize, head: usize| 0.4 + 0.3 * noise(layer * 12 + head);
    let cells = |of: &dyn Fn(usize, usize) -> f64| -> Vec<Vec<f64>> {
        (0..6).map(|layer| (0..12).map(|head| of(layer, head)).collect()).collect()
    };
    let mut values = cells(&score);
    values[2][3] = f64::NAN;
    let note = |value: &f64| format!("{value:.2}\n\u{B1}0.03");
    HeatMap {
        title: "Importance of heads".into(),
        subtitle: "made-up numbers; 95 % intervals; heads that share keys are framed".into(),
        x_label: "head".into(),
        y_label: "layer".into(),
        value_label: "score".into(),
        rows: (0..6).map(|layer| layer.to_string()).collect(),
        columns: (0..12).map(|head| head.to_string()).collect(),
        notes: values.iter().map(|row| row.iter().map(note).collect()).collect(),
        groups: (0..6)
            .flat_map(|layer| {
                (0..4).map(move |group| Group {
                    rows: layer..layer + 1,
                    columns: 3 * group..3 * group + 3,
                })
            })
            .collect(),
        values,
        theme,
        ..HeatMap::default()
    }
}

/// Attention of a token to those before it, near ones above far ones.
fn causal(n: usize, far: f64) -> Vec<Vec<f64>> {
    let row = |i: usize| -> Vec<f64> {
        let weight = |j: usize| if j > i { 0. } else { (-((i - j) as f64) / far).exp() };
        let total: f64 = (0..n).map(weight).sum();
        (0..n).map(|j| weight(j) / total).collect()
    };
    (0..n).map(row).collect()
}

fn tokens(n: usize) -> Vec<String> {
    let words = [
        "The",
        "\u{120}quick",
        "\u{120}\u{5D7}\u{5D5}\u{5DD}",
        "\u{120}fox",
        "\n",
        "<script>",
        "\u{1F98A}",
        "\u{120}jumps",
    ];
    (0..n).map(|i| words[i % words.len()].to_owned()).collect()
}

fn attention(title: &str, n: usize, far: f64) -> HeatMap {
    HeatMap {
        title: title.into(),
        x_label: "attended to".into(),
        y_label: "token".into(),
        value_label: "weight".into(),
        rows: tokens(n),
        columns: tokens(n),
        values: causal(n, far),
        ..HeatMap::default()
    }
}

fn change(theme: Theme) -> Panels {
    let (before, after) = (attention("before", 16, 2.), attention("after", 16, 5.));
    let apart = |a: &[f64], b: &[f64]| b.iter().zip(a).map(|(b, a)| b - a).collect();
    let values = before.values.iter().zip(&after.values).map(|(a, b)| apart(a, b)).collect();
    let difference = HeatMap {
        title: "after \u{2212} before".into(),
        shades: Shades::Diverging,
        values,
        ..before.clone()
    };
    Panels {
        title: "Attention before and after".into(),
        subtitle: "made-up numbers".into(),
        maps: vec![before, after, difference],
        columns: 3,
        theme,
        size: attn_viz::Size { width: 1800, height: 640 },
        ..Panels::default()
    }
}

fn model(theme: Theme) -> Panels {
    let map = |i: usize| attention(&format!("{}-{}", i / 12, i % 12), 128, 1. + i as f64 / 3.);
    Panels {
        title: "All heads of a model".into(),
        subtitle: "made-up numbers; layer-head".into(),
        maps: (0..144).map(map).collect(),
        columns: 12,
        shared: true,
        theme,
        size: attn_viz::Size { width: 1600, height: 1600 },
    }
}

fn long(theme: Theme) -> HeatMap {
    HeatMap { theme, ..attention("Many tokens", 2000, 60.) }
}

pub(crate) fn time(theme: Theme) -> LineChart {
    let lengths = [256., 512., 1024., 2048., 4096., 8192.];
    let full: Vec<(f64, f64)> =
        lengths.map(|n| (n, 2e-6 * n * n * (1. + 0.1 * noise(n as usize)))).into();
    let linear: Vec<(f64, f64)> = lengths.map(|n| (n, 6e-3 * n)).into();
    let fits = [("softmax", &full), ("linear", &linear)];
    let fits = fits
        .iter()
        .enumerate()
        .filter_map(|(i, (name, points))| Some(PowerLaw::fit(points)?.line(name, &lengths, i)));
    let mut series: Vec<Series> = [&full, &linear]
        .iter()
        .map(|points| Series { stroke: Stroke::Dotted, ..Series::new("", points.iter().copied()) })
        .collect();
    series.extend(fits);
    LineChart {
        title: "Time by length".into(),
        subtitle: "made-up numbers".into(),
        x_label: "tokens".into(),
        y_label: "ms".into(),
        x_axis: Axis::Log,
        y_axis: Axis::Log,
        series,
        theme,
        ..LineChart::default()
    }
}

/// Facts found in long texts, from red (none) to green (all), depth downward.
pub(crate) fn needle(theme: Theme) -> Panels {
    let lengths = [1024, 2048, 4096, 8192, 16_384];
    let map = |title: &str, reach: f64| {
        let found = |depth: usize, length: usize| {
            let lost = (length as f64 / reach) * (0.3 + depth as f64 / 10.);
            (110. - 100. * lost).clamp(0., 100.)
        };
        let row = |depth| lengths.iter().map(|&length| found(depth, length)).collect();
        HeatMap {
            title: title.into(),
            subtitle: "exact answers; trials a cell: 8".into(),
            x_label: "tokens".into(),
            y_label: "depth in %".into(),
            value_label: "found in %".into(),
            rows: (0..=10).map(|depth| format!("{}", 10 * depth)).collect(),
            columns: lengths.iter().map(usize::to_string).collect(),
            values: (0..=10).map(row).collect(),
            range: Some((0., 100.)),
            shades: Shades::TrafficLight,
            ..HeatMap::default()
        }
    };
    let mut maps = vec![map("softmax", 24_000.), map("window 4096", 6000.)];
    maps[1].values[9][4] = f64::NAN;
    Panels {
        title: "Fact retrieval across context lengths".into(),
        subtitle: "made-up numbers".into(),
        maps,
        columns: 2,
        shared: true,
        theme,
        size: attn_viz::Size { width: 1600, height: 620 },
    }
}

/// From the words of one text to those of another.
fn pair(theme: Theme) -> HeatMap {
    let words = |text: &str| -> Vec<String> { text.split(' ').map(str::to_owned).collect() };
    let rows = words("[CLS] A man plays a guitar on stage . [SEP]");
    let columns = words("[CLS] Some ##one makes music . [SEP]");
    let at = |i: usize| noise(3 * i + 1).abs().powi(3);
    let row = |row: usize| -> Vec<f64> {
        let total: f64 = (0..columns.len()).map(|column| at(7 * row + column)).sum();
        (0..columns.len()).map(|column| at(7 * row + column) / total).collect()
    };
    HeatMap {
        title: "From premise to hypothesis".into(),
        subtitle: "made-up numbers; layer 5, head 2".into(),
        x_label: "hypothesis".into(),
        y_label: "premise".into(),
        value_label: "weight".into(),
        values: (0..rows.len()).map(row).collect(),
        rows,
        columns,
        theme,
        ..HeatMap::default()
    }
}

fn scores(theme: Theme) -> Histogram {
    let values = |shift: f64| (0..144).map(|i| shift + noise(i) * noise(i + 7)).collect();
    Histogram {
        title: "Scores of heads".into(),
        subtitle: "made-up numbers".into(),
        x_label: "score".into(),
        y_label: "heads".into(),
        sets: vec![
            Values { name: "before".into(), values: values(0.) },
            Values { name: "after".into(), values: values(0.2) },
        ],
        theme,
        ..Histogram::default()
    }
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

pub(crate) fn accuracy(theme: Theme) -> BarChart {
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
