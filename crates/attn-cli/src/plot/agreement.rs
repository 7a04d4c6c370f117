//! How far scores of heads agree: a file against a file.

use anyhow::{Result, ensure};
use attn_viz::{HeatMap, Shades};
use serde::Deserialize;

use super::{Draw, Drawn, Figure, Kind, Source, in_cell, names, numbers};
use crate::plot::attention::size;

pub(super) const KIND: Kind = Kind {
    name: "agreement",
    about: "how far scores of heads agree, file by file (attn compare-scores)",
    reads: |value| value["pairs"][0].get("spearman").is_some() && value["files"].is_array(),
    draw: Draw::Each(draw),
};

#[derive(Deserialize)]
struct Report {
    files: Vec<std::path::PathBuf>,
    n_heads: usize,
    pairs: Vec<Pair>,
}

#[derive(Deserialize)]
struct Pair {
    files: [usize; 2],
    spearman: Correlation,
}

#[derive(Deserialize)]
struct Correlation {
    #[serde(deserialize_with = "numbers")]
    value: f64,
}

fn draw(source: &Source) -> Result<Vec<Drawn>> {
    let Report { files, n_heads, pairs } = source.read()?;
    let n = files.len();
    let mut values = vec![vec![f64::NAN; n]; n];
    for (i, row) in values.iter_mut().enumerate() {
        row[i] = 1.0;
    }
    for Pair { files: [a, b], spearman } in pairs {
        ensure!(a < n && b < n, "a pair is of file {}, and there are {n}", a.max(b));
        values[a][b] = spearman.value;
        values[b][a] = spearman.value;
    }
    let note = |value: &f64| if value.is_nan() { String::new() } else { in_cell(*value) };
    let names = names(&files, char::is_alphanumeric);
    Ok(vec![Drawn::new(
        "",
        Figure::Heat(HeatMap {
            title: "How far scores of heads agree".into(),
            subtitle: format!(
                "ranks of {n_heads} heads; 1: the same order, \u{2212}1: turned round"
            ),
            value_label: "Spearman's rank correlation".into(),
            notes: values.iter().map(|row| row.iter().map(note).collect()).collect(),
            rows: names.clone(),
            columns: names,
            values,
            shades: Shades::Diverging,
            range: Some((-1.0, 1.0)),
            size: size(2 * n, 4 * n),
            ..HeatMap::default()
        }),
    )])
}
