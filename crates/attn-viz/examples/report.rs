//! Writes a report of made-up numbers: `cargo run -p attn-viz --example report FILE.html`.

use std::error::Error;
use std::path::Path;

use attn_viz::report::*;
use attn_viz::{Bar, BarChart};

fn main() -> Result<(), Box<dyn Error>> {
    let file = std::env::args_os().nth(1).ok_or("usage: report FILE.html")?;
    let losses = [("as published", 0.41), ("window of 32", 0.52), ("linear", 0.67)];
    let figure = Figure::draw("Loss by attention", |theme| BarChart {
        y_label: "loss (nats)".into(),
        bars: losses
            .map(|(label, value)| Bar { label: label.into(), value, ..Bar::default() })
            .into(),
        theme,
        ..BarChart::default()
    })?;
    let row = |(name, loss)| vec![Cell::text(name), Cell::number(format!("{loss:.2}"), loss)];
    let table = Table {
        caption: "Loss by attention".into(),
        columns: vec![Column::text("attention"), Column::number("loss (nats)")],
        rows: losses.map(row).into(),
    };
    let sample = |name: &str, text: &str| Sample {
        name: name.into(),
        models: vec![model("before", text, 2.), model("after", text, 5.)],
    };
    let fox = sample("a fox", "The quick brown fox jumps over the lazy dog .");
    let dog = sample("a dog", "It does not wake .");
    let viewer = AttentionViewer { samples: vec![fox, dog] };
    let section = |title: &str, blocks| Section { title: title.into(), blocks };
    let report = Report {
        title: "Two models compared".into(),
        subtitle: "made-up numbers".into(),
        sections: vec![
            section("Loss", vec![Block::Table(table), Block::Figure(figure)]),
            section("Attention", vec![Block::Attention(viewer)]),
        ],
    };
    Ok(report.save(Path::new(&file))?)
}

/// Three layers of four heads, each of which looks farther back than the one before.
fn model(name: &str, text: &str, far: f64) -> ModelAttention {
    let tokens: Vec<String> = text.split(' ').map(Into::into).collect();
    let n = tokens.len();
    let row = |i: usize, far: f64| {
        let weight = move |j: usize| if j > i { 0. } else { (-((i - j) as f64) / far).exp() };
        let total: f64 = (0..n).map(weight).sum();
        (0..n).map(move |j| (weight(j) / total) as f32)
    };
    let weights = |at: usize| (0..n).flat_map(|i| row(i, far * (1 + at) as f64 / 4.)).collect();
    let head = |at| Head { name: format!("head {}", at % 4), weights: weights(at) };
    let heads = |layer: usize| (4 * layer..4 * layer + 4).map(head).collect();
    let layer = |it| Layer { name: format!("layer {it}"), heads: heads(it), ..Layer::default() };
    let layers = (0..3).map(layer).collect();
    ModelAttention { model: name.into(), rows: tokens.clone(), columns: tokens, layers }
}
