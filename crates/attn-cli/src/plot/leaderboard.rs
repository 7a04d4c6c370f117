//! Students side by side: how near they are, what they keep, what they know.

use anyhow::{Context, Result, ensure};
use attn_viz::{Bar, BarChart};
use serde::Deserialize;

use super::{Draw, Drawn, Figure, Kind, Source, bar_size, told_apart};

pub(super) const KIND: Kind = Kind {
    name: "leaderboard",
    about: "students by KL, BLiMP and bytes kept (the table of attn leaderboard)",
    reads: |value| {
        let has = |name: &str| {
            value["columns"].as_array().is_some_and(|it| it.iter().any(|it| it == name))
        };
        has("run") && has("kl_after_tune") && has("state_bytes_16k")
    },
    draw: Draw::Each(draw),
};

#[derive(Deserialize)]
struct Table {
    columns: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    fn cell<'a>(&'a self, row: &'a [String], name: &str) -> Result<&'a str> {
        let at = self.columns.iter().position(|it| it == name);
        let at = at.with_context(|| format!("there is no column `{name}`"))?;
        Ok(row.get(at).map_or("", String::as_str))
    }

    /// The number in a cell, none where there is nothing to say.
    fn number(&self, row: &[String], name: &str) -> Result<Option<f64>> {
        match self.cell(row, name)? {
            "" => Ok(None),
            text => {
                let number: f64 = text
                    .parse()
                    .with_context(|| format!("`{name}` is `{text}`, expected a number"))?;
                Ok(number.is_finite().then_some(number))
            }
        }
    }
}

/// What is drawn: the name of the picture, the columns that may hold it, its interval's, a factor, label and decimals.
type Column =
    (&'static str, &'static [&'static str], Option<[&'static str; 2]>, f64, &'static str, usize);

const COLUMNS: [Column; 3] = [
    ("", &["kl", "kl_after_tune"], None, 1.0, "KL (nats per token)", 3),
    (
        "blimp",
        &["blimp"],
        Some(["blimp_low", "blimp_high"]),
        100.0,
        "BLiMP, pairs told right (%)",
        1,
    ),
    (
        "state",
        &["state_bytes_16k"],
        None,
        1.0 / (1 << 20) as f64,
        "kept after 16,384 tokens (MiB)",
        1,
    ),
];

fn draw(source: &Source) -> Result<Vec<Drawn>> {
    let table: Table = source.read()?;
    ensure!(!table.rows.is_empty(), "there is no line in it");
    let mut drawn = Vec::new();
    for (name, columns, interval, factor, label, decimals) in COLUMNS {
        // Earlier tables lack one, or have nothing in it.
        let has_number = |name: &&&str| {
            table.columns.iter().any(|own| own == **name)
                && table.rows.iter().any(|row| matches!(table.number(row, name), Ok(Some(_))))
        };
        let Some(column) = columns.iter().find(has_number) else { continue };
        let names: Vec<String> = table
            .rows
            .iter()
            .map(|row| table.cell(row, "run").map(str::to_owned))
            .collect::<Result<_>>()?;
        let mut bars = Vec::new();
        for (row, name) in table.rows.iter().zip(told_apart(&names)) {
            let Some(value) = table.number(row, column)? else { continue };
            let bounds = match interval {
                Some([low, high]) => table.number(row, low)?.zip(table.number(row, high)?),
                None => None,
            };
            bars.push(Bar {
                color: usize::from(name == "untouched"),
                label: match &name[..] {
                    "untouched" => "the teacher".into(),
                    _ => name,
                },
                value: factor * value,
                interval: bounds.map(|(low, high)| (factor * low, factor * high)),
            });
        }
        if bars.is_empty() {
            continue;
        }
        // Nor has the teacher a distance from itself.
        let is_teacher =
            |row: &&Vec<String>| table.cell(row, "run").is_ok_and(|it| it == "untouched");
        let has_none = |row: &&Vec<String>| matches!(table.number(row, column), Ok(None));
        let missing = table.rows.iter().filter(|row| !is_teacher(row) && has_none(row)).count();
        bars.sort_by(|a, b| a.value.total_cmp(&b.value));
        let figure = Figure::Bars(BarChart {
            title: "Students side by side".into(),
            subtitle: match (missing, interval) {
                (0, None) => String::new(),
                (0, Some(_)) => "95 % intervals".into(),
                (n, _) => format!("{n} of {} have no such figure", table.rows.len()),
            },
            y_label: label.into(),
            size: bar_size(bars.len()),
            bars,
            decimals,
            ..BarChart::default()
        });
        drawn.push(Drawn::new(name, figure));
    }
    Ok(drawn)
}
