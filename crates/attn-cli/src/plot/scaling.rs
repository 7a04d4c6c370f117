//! Time and memory against length, with fitted exponents.

use anyhow::{Result, ensure};
use attn_viz::{Axis, LineChart, PowerLaw, Series, Stroke};
use serde::Deserialize;

use super::{Draw, Drawn, Figure, Kind, Source};

pub(super) const KIND: Kind = Kind {
    name: "scaling",
    about: "time and memory by length with fitted exponents (the table of scripts/bench_attention.sh)",
    reads: |value| {
        let has = |name: &str| {
            value["columns"].as_array().is_some_and(|it| it.iter().any(|it| it == name))
        };
        has("kind") && has("n") && has("ms")
    },
    draw: Draw::Each(draw),
};

#[derive(Deserialize)]
struct Table {
    columns: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    fn column(&self, name: &str) -> Option<usize> {
        self.columns.iter().position(|it| it == name)
    }
}

fn draw(source: &Source) -> Result<Vec<Drawn>> {
    let table: Table = source.read()?;
    for row in &table.rows {
        let (n, found) = (table.columns.len(), row.len());
        ensure!(found == n, "a row has {found} cells, and the table {n} columns");
    }
    let mut drawn = Vec::new();
    for (name, column, label) in
        [("", "ms", "time (ms)"), ("memory", "peak_mib", "most memory (MiB)")]
    {
        let pass = if name.is_empty() { "forward" } else { "forward+backward" };
        if let Some(chart) = chart(&table, column, label, pass, &source.name) {
            drawn.push(Drawn::new(name, Figure::Lines(chart)));
        }
    }
    ensure!(!drawn.is_empty(), "the table has no kind with two lengths");
    Ok(drawn)
}

fn chart(table: &Table, column: &str, label: &str, pass: &str, name: &str) -> Option<LineChart> {
    let [kind, n, value] = [table.column("kind")?, table.column("n")?, table.column(column)?];
    let of_pass = table.column("pass");
    let has_pass =
        |wanted: &str| table.rows.iter().any(|row| of_pass.is_some_and(|at| row[at] == wanted));
    let pass = if has_pass(pass) { pass } else { "forward" };
    let mut kinds: Vec<&str> = Vec::new();
    for row in &table.rows {
        if !kinds.contains(&&row[kind][..]) {
            kinds.push(&row[kind]);
        }
    }
    let mut series = Vec::new();
    let mut n_left_out = 0;
    for (color, name) in kinds.into_iter().enumerate() {
        let rows: Vec<_> = table
            .rows
            .iter()
            .filter(|row| row[kind] == name && of_pass.is_none_or(|at| row[at] == pass))
            .collect();
        let mut points: Vec<(f64, f64)> = rows
            .iter()
            .filter_map(|row| Some((row[n].parse().ok()?, row[value].parse().ok()?)))
            .filter(|(n, value): &(f64, f64)| {
                *n > 0.0 && *value > 0.0 && n.is_finite() && value.is_finite()
            })
            .collect();
        n_left_out += rows.len() - points.len();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        let Some(fit) = PowerLaw::fit(&points) else { continue };
        let lengths: Vec<f64> = points.iter().map(|point| point.0).collect();
        series.push(Series {
            stroke: Stroke::Dotted,
            color: Some(color),
            ..Series::new("", points)
        });
        series.push(fit.line(name, &lengths, color));
    }
    let left_out = match n_left_out {
        0 => String::new(),
        n => format!("; rows without a number, left out: {n}"),
    };
    (!series.is_empty()).then(|| LineChart {
        title: format!(
            "{}, {pass} pass",
            if column == "ms" { "Time by length" } else { "Memory by length" }
        ),
        subtitle: format!("{name}; dashed: fitted powers of n, \u{B1} a standard error{left_out}"),
        x_label: "tokens".into(),
        y_label: label.into(),
        x_axis: Axis::Log,
        y_axis: Axis::Log,
        series,
        ..LineChart::default()
    })
}
