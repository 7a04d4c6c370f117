//! Facts found in long texts: a grid of lengths and depths.

use anyhow::Result;
use attn_viz::{HeatMap, Panels, Shades, Size};
use serde::Deserialize;

use super::{Draw, Drawn, Figure, Kind, Source, called, numbers};
use crate::monitor::grouped;

pub(super) const KIND: Kind = Kind {
    name: "needle",
    about: "needles found by length and depth (attn needle), several models side by side",
    reads: |value| value.get("cells").is_some_and(|it| it[0].get("length").is_some()),
    draw: Draw::Together(draw),
};

#[derive(Deserialize)]
struct Report {
    model: String,
    cells: Vec<Cell>,
}

#[derive(Deserialize)]
struct Cell {
    kind: String,
    length: usize,
    /// Absent of all depths together.
    depth: Option<f64>,
    #[serde(deserialize_with = "numbers")]
    exact_match: f64,
    #[serde(default)]
    n: usize,
}

fn draw(sources: &[Source]) -> Result<Vec<Drawn>> {
    let mut maps = Vec::new();
    for source in sources {
        let report: Report = source.read()?;
        let mut kinds: Vec<&str> = report.cells.iter().map(|cell| &cell.kind[..]).collect();
        kinds.dedup();
        kinds.sort_unstable();
        kinds.dedup();
        for kind in kinds {
            let of = if sources.len() == 1 { called(&report.model) } else { &source.name };
            maps.push(grid(&report, kind, of));
        }
    }
    let figure = match maps.len() {
        1 => Figure::Heat(maps.remove(0)),
        n => Figure::Panels(Panels {
            title: "Fact retrieval across context lengths (needle in a haystack)".into(),
            subtitle: "exact answers in %".into(),
            columns: n.min(2),
            shared: true,
            size: Size { width: 1600, height: 160 + 460 * n.div_ceil(2) as u32 },
            maps,
            ..Panels::default()
        }),
    };
    Ok(vec![Drawn::new("", figure)])
}

fn grid(report: &Report, kind: &str, of: &str) -> HeatMap {
    let cells = || report.cells.iter().filter(|cell| cell.kind == kind);
    let mut lengths: Vec<usize> = cells().map(|cell| cell.length).collect();
    lengths.sort_unstable();
    lengths.dedup();
    let mut depths: Vec<f64> = cells().filter_map(|cell| cell.depth).collect();
    depths.sort_by(f64::total_cmp);
    depths.dedup();
    let trials: usize =
        cells().filter(|cell| cell.depth.is_some()).map(|cell| cell.n).max().unwrap_or(0);
    // A row a depth, from the beginning of the text down.
    let value = |depth: f64, length: usize| {
        let mut of = cells().filter(|cell| cell.length == length && cell.depth == Some(depth));
        of.next().map_or(f64::NAN, |cell| 100.0 * cell.exact_match)
    };
    HeatMap {
        title: format!("{of}, {kind}"),
        subtitle: format!("exact answers; trials a cell: {trials}"),
        x_label: "tokens".into(),
        y_label: "depth in %".into(),
        value_label: "found in %".into(),
        columns: lengths.iter().map(|&length| grouped(length)).collect(),
        rows: depths.iter().map(|depth| format!("{:.0}", 100.0 * depth)).collect(),
        values: depths
            .iter()
            .map(|&depth| lengths.iter().map(|&length| value(depth, length)).collect())
            .collect(),
        range: Some((0.0, 100.0)),
        shades: Shades::TrafficLight,
        size: Size { width: 1400, height: 640 },
        ..HeatMap::default()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn depth_goes_down_and_length_to_the_right() {
        let cell = |length: usize, depth: Option<f64>, found: f64| json!({"kind": "passkey", "length": length, "depth": depth, "exact_match": found, "n": 1});
        let value = json!({"model": "m", "cells": [
            cell(256, None, 0.5), cell(256, Some(0.0), 1.0), cell(256, Some(1.0), 0.0),
            cell(128, None, 0.5), cell(128, Some(0.0), 0.25), cell(128, Some(1.0), 0.75),
        ]});
        let drawn = draw(&[Source::of("n.json", value)]).unwrap();
        let Figure::Heat(map) = &drawn[0].figure else { panic!("{drawn:?}") };
        assert_eq!(
            (map.rows.clone(), map.columns.clone()),
            (vec!["0".into(), "100".into()], vec!["128".into(), "256".into()])
        );
        assert_eq!(map.values, [[25.0, 100.0], [75.0, 0.0]]);
        assert_eq!(map.range, Some((0.0, 100.0)));
    }
}
