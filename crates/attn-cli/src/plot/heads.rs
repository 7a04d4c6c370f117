//! Scores of heads: a map of layers and heads, and how the scores are spread.

use anyhow::Result;
use attn_viz::{Group, HeatMap, Histogram, Panels, Shades, Size, Values};
use serde::Deserialize;

use super::{Drawn, Figure, Kind, Range, Source, called, in_cell, layer_head};

pub(super) const KIND: Kind = Kind {
    name: "heads",
    about: "scores of heads by layer and head (attn score-heads), of two files the difference, and their histogram",
    reads: |value| {
        value.get("scores").is_some_and(|it| it[0][0].is_number()) && value.get("heads").is_some()
    },
    draw,
};

#[derive(Deserialize)]
struct Scores {
    model: String,
    method: String,
    heads: Vec<Vec<usize>>,
    scores: Vec<Vec<f64>>,
    /// Absent, or none, where they are of one trial.
    interval_95: Option<Vec<Vec<Range>>>,
    /// The key/value head of each head, where heads share one.
    #[serde(default)]
    kv_of_head: Vec<Vec<usize>>,
    task: Option<String>,
    n_rows: Option<usize>,
    threshold: Option<f64>,
}

fn draw(sources: &[Source]) -> Result<Vec<Drawn>> {
    let all: Vec<Scores> = sources.iter().map(Source::read).collect::<Result<_>>()?;
    let maps: Vec<HeatMap> = all.iter().map(map).collect::<Result<_>>()?;
    let figure = match (&maps[..], &all[..]) {
        ([one], _) => Figure::Heat(one.clone()),
        ([before, after], [one, other]) if one.heads == other.heads => {
            let difference = before.values.iter().zip(&after.values);
            let difference = HeatMap {
                title: "second \u{2212} first".into(),
                values: difference
                    .map(|(a, b)| a.iter().zip(b).map(|(a, b)| b - a).collect())
                    .collect(),
                notes: Vec::new(),
                shades: Shades::Diverging,
                ..before.clone()
            };
            Figure::Panels(Panels {
                title: "Scores of heads".into(),
                subtitle: format!("{} against {}", sources[0].name, sources[1].name),
                maps: vec![titled(before, sources, 0), titled(after, sources, 1), difference],
                columns: 3,
                size: Size { width: 1800, height: 640 },
                ..Panels::default()
            })
        }
        _ => Figure::Panels(Panels {
            title: "Scores of heads".into(),
            maps: maps.iter().enumerate().map(|(i, map)| titled(map, sources, i)).collect(),
            size: Size { width: 1600, height: 1000 },
            ..Panels::default()
        }),
    };
    let set = |(source, scores): (&Source, &Scores)| Values {
        name: if sources.len() == 1 { String::new() } else { source.name.clone() },
        values: scores.scores.concat(),
    };
    let histogram = Histogram {
        title: format!("Scores of the heads of {}", called(&all[0].model)),
        subtitle: conditions(&all[0]),
        x_label: all[0].method.replace('_', " "),
        y_label: "heads".into(),
        sets: sources.iter().zip(&all).map(set).collect(),
        ..Histogram::default()
    };
    Ok(vec![Drawn::new("", figure), Drawn::new("histogram", Figure::Histogram(histogram))])
}

fn titled(map: &HeatMap, sources: &[Source], at: usize) -> HeatMap {
    HeatMap { title: sources[at].name.clone(), ..map.clone() }
}

fn conditions(scores: &Scores) -> String {
    let mut parts = Vec::new();
    parts.extend(scores.task.clone());
    parts.extend(scores.n_rows.map(|n| format!("{n} rows")));
    parts.extend(scores.threshold.map(|it| format!("threshold {it}")));
    parts.join(", ")
}

fn map(scores: &Scores) -> Result<HeatMap> {
    let map = layer_head(&scores.heads, &scores.scores)?;
    let mut notes = vec![vec![String::new(); map.columns.len()]; map.rows.len()];
    for (layer, heads) in scores.heads.iter().enumerate() {
        for (place, &head) in heads.iter().enumerate() {
            notes[layer][head] = in_cell(scores.scores[layer][place]);
            let range = scores.interval_95.as_ref().map(|all| all[layer][place]);
            if let Some(Range { low, high }) = range {
                notes[layer][head] += &format!("\n{} to {}", in_cell(low), in_cell(high));
            }
        }
    }
    let mut subtitle = conditions(scores);
    if scores.interval_95.is_some() {
        subtitle += "; 95 % intervals";
    }
    let groups = groups(&scores.heads, &scores.kv_of_head);
    if !groups.is_empty() {
        subtitle += "; heads that share keys and values are framed";
    }
    Ok(HeatMap {
        title: format!("{}: heads by {}", called(&scores.model), scores.method.replace('_', " ")),
        subtitle: subtitle.trim_start_matches("; ").to_owned(),
        value_label: scores.method.replace('_', " "),
        notes,
        groups,
        ..map
    })
}

/// Neighbours that share a key/value head.
fn groups(heads: &[Vec<usize>], kv_of_head: &[Vec<usize>]) -> Vec<Group> {
    let mut groups = Vec::new();
    for (layer, (heads, kv)) in heads.iter().zip(kv_of_head).enumerate() {
        let of: Vec<(usize, usize)> = heads.iter().copied().zip(kv.iter().copied()).collect();
        for run in of.chunk_by(|a, b| a.1 == b.1 && a.0 + 1 == b.0) {
            groups.push(Group {
                rows: layer..layer + 1,
                columns: run[0].0..run[run.len() - 1].0 + 1,
            });
        }
    }
    groups
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn source(name: &str, scores: [[f64; 2]; 2]) -> Source {
        let range = json!({"low": 0.0, "high": 1.0});
        let value = json!({
            "model": "runs/m/model", "method": "michel", "heads": [[0, 1], [0, 2]], "scores": scores,
            "interval_95": [[range, range], [range, range]],
            "kv_of_head": [[0, 0], [0, 1]], "task": "sst2", "n_rows": 872,
        });
        Source { name: name.into(), value }
    }

    #[test]
    fn a_head_that_was_removed_leaves_its_cell_empty() {
        let drawn = draw(&[source("a", [[0.1, 0.2], [0.3, 0.4]])]).unwrap();
        let Figure::Heat(map) = &drawn[0].figure else { panic!("{drawn:?}") };
        assert_eq!(map.values[0][..2], [0.1, 0.2]);
        assert!(map.values[0][2].is_nan() && map.values[1][1].is_nan());
        assert_eq!((map.values[1][0], map.values[1][2]), (0.3, 0.4));
        assert_eq!(map.notes[1][2], "0.400\n0 to 1.00");
        assert_eq!(map.groups.len(), 3, "two that share, and two alone that are not neighbours");
    }

    #[test]
    fn of_two_files_the_difference_is_second_less_first() {
        let drawn =
            draw(&[source("a", [[0.1, 0.2], [0.3, 0.4]]), source("b", [[0.2, 0.2], [0.0, 1.4]])])
                .unwrap();
        let Figure::Panels(panels) = &drawn[0].figure else { panic!("{drawn:?}") };
        let difference = &panels.maps[2];
        assert_eq!(difference.shades, Shades::Diverging);
        assert!(
            (difference.values[0][0] - 0.1).abs() < 1e-12
                && (difference.values[1][2] - 1.0).abs() < 1e-12
        );
        assert!((difference.values[1][0] + 0.3).abs() < 1e-12);
    }
}
