//! Writes a report of made-up numbers: `cargo run -p attn-viz --example report FILE.html`.

use std::error::Error;
use std::path::Path;

use attn_viz::report::{
    AttentionViewer, Block, Cell, Column, Figure, Head, Layer, ModelAttention, Report, Sample,
    Section, Table,
};
use attn_viz::{Bar, BarChart};

fn main() -> Result<(), Box<dyn Error>> {
    let file = std::env::args_os().nth(1).ok_or("usage: report FILE.html")?;
    let rows = [("as published", 0.41), ("window of 32", 0.52), ("linear", 0.67)];
    let bar = |(label, value): &(&str, f64)| Bar {
        label: (*label).into(),
        value: *value,
        ..Bar::default()
    };
    let bars: Vec<Bar> = rows.iter().map(bar).collect();
    let figure = Figure::draw("Loss by attention", |theme| BarChart {
        title: "Loss by attention".into(),
        y_label: "loss (nats)".into(),
        bars: bars.clone(),
        theme,
        ..BarChart::default()
    })?;
    let row = |(name, loss): &(&str, f64)| {
        vec![Cell::text(*name), Cell::number(format!("{loss:.2}"), *loss)]
    };
    let table = Table {
        caption: "Loss by attention".into(),
        columns: vec![Column::text("attention"), Column::number("loss (nats)")],
        rows: rows.iter().map(row).collect(),
    };
    let sample =
        Sample { name: "a fox".into(), models: vec![model("before", 2.), model("after", 5.)] };
    let section = |title: &str, blocks| Section { title: title.into(), blocks };
    let report = Report {
        title: "Two models compared".into(),
        subtitle: "made-up numbers".into(),
        sections: vec![
            section("Loss", vec![Block::Table(table), Block::Figure(figure)]),
            section("Attention", vec![Block::Attention(AttentionViewer { samples: vec![sample] })]),
        ],
    };
    Ok(report.save(Path::new(&file))?)
}

/// Three layers of four heads, each of which looks farther back than the one before.
fn model(name: &str, far: f64) -> ModelAttention {
    let tokens: Vec<String> =
        "The quick brown fox jumps over the lazy dog .".split(' ').map(Into::into).collect();
    let n = tokens.len();
    let weight =
        |i: usize, j: usize, far: f64| if j > i { 0. } else { (-((i - j) as f64) / far).exp() };
    let row = |i: usize, far: f64| {
        let total: f64 = (0..n).map(|j| weight(i, j, far)).sum();
        (0..n).map(move |j| (weight(i, j, far) / total) as f32)
    };
    let weights = |at: usize| (0..n).flat_map(|i| row(i, far * (1 + at) as f64 / 4.)).collect();
    let head = |layer: usize, head: usize| Head {
        name: format!("head {head}"),
        weights: weights(4 * layer + head),
    };
    let heads = |layer: usize| (0..4).map(|it| head(layer, it)).collect();
    let layer =
        |it: usize| Layer { name: format!("layer {it}"), heads: heads(it), note: String::new() };
    ModelAttention {
        model: name.into(),
        rows: tokens.clone(),
        columns: tokens,
        layers: (0..3).map(layer).collect(),
    }
}
