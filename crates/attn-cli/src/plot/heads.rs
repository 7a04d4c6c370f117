//! Scores of heads: a map of layers and heads, and how the scores are spread.

use std::collections::BTreeMap;

use anyhow::Result;
use attn_viz::{Group, HeatMap, Histogram, Panels, Size, Values};
use serde::Deserialize;
use serde_json::Value;

use super::{
    Draw, Drawn, Figure, Kind, Range, Source, called, check_shape, common_range, difference,
    layer_head, numbers, with_interval,
};

pub(super) const KIND: Kind = Kind {
    name: "heads",
    about: "scores of heads by layer and head (attn score-heads), of two files the difference, and their histogram",
    reads: |value| {
        let is_score = |it: &Value| it.is_number() || it.is_null();
        value.get("scores").is_some_and(|it| it[0].is_array() && is_score(&it[0][0]))
            && value.get("heads").is_some()
    },
    draw: Draw::Together(draw),
};

#[derive(Deserialize)]
struct Scores {
    model: String,
    method: String,
    heads: Vec<Vec<usize>>,
    #[serde(deserialize_with = "numbers")]
    scores: Vec<Vec<f64>>,
    /// Absent, or none, where they are of one trial.
    interval_95: Option<Vec<Vec<Option<Range>>>>,
    /// The key/value head of each head, where heads share one.
    #[serde(default)]
    kv_of_head: Vec<Vec<usize>>,
    normalize: Option<String>,
    iterative: Option<f64>,
    loss: Option<String>,
    task: Option<String>,
    n_rows: Option<usize>,
    threshold: Option<f64>,
}

fn draw(sources: &[Source]) -> Result<Vec<Drawn>> {
    let all: Vec<Scores> = sources.iter().map(Source::read).collect::<Result<_>>()?;
    let maps: Vec<HeatMap> = sources
        .iter()
        .zip(&all)
        .map(|(source, scores)| source.drawn(map(scores)))
        .collect::<Result<_>>()?;
    let measures: Vec<_> = all.iter().map(measure).collect();
    let is_alike = measures.iter().all(|it| *it == measures[0]);
    let figure = match &maps[..] {
        [one] => Figure::Heat(one.clone()),
        _ => Figure::Panels(side_by_side(sources, &all, &maps)),
    };
    let mut drawn = vec![Drawn::new("", figure)];
    // Scores of two measures have no axis in common.
    if is_alike {
        let set = |(source, scores): (&Source, &Scores)| Values {
            name: if sources.len() == 1 { String::new() } else { source.name.clone() },
            values: scores.scores.concat(),
        };
        let same = all.iter().all(|it| conditions(it) == conditions(&all[0]));
        let histogram = Histogram {
            title: format!("Scores of the heads of {}", called(&all[0].model)),
            subtitle: if same { conditions(&all[0]) } else { String::new() },
            x_label: all[0].method.replace('_', " "),
            y_label: "heads".into(),
            sets: sources.iter().zip(&all).map(set).collect(),
            ..Histogram::default()
        };
        drawn.push(Drawn::new("histogram", Figure::Histogram(histogram)));
    }
    Ok(drawn)
}

/// What the numbers are, and of what, by name.
fn measure(scores: &Scores) -> [(&'static str, String); 5] {
    let text = |it: &Option<String>| it.clone().unwrap_or_else(|| "none".into());
    [
        ("method", scores.method.clone()),
        ("normalize", text(&scores.normalize)),
        ("iterative", text(&scores.iterative.map(|it| it.to_string()))),
        ("loss", text(&scores.loss)),
        ("task", text(&scores.task)),
    ]
}

/// Several maps with one scale, of two also the difference; where they measure unlike things, each by itself.
fn side_by_side(sources: &[Source], all: &[Scores], maps: &[HeatMap]) -> Panels {
    let measures: Vec<_> = all.iter().map(measure).collect();
    let unlike = (0..measures[0].len())
        .find_map(|i| measures.iter().find(|it| it[i] != measures[0][i]).map(|it| (i, it)));
    let range = match unlike {
        None => common_range(&maps.iter().collect::<Vec<_>>()),
        Some(_) => None,
    };
    let titled = |(source, map): (&Source, &HeatMap)| HeatMap {
        title: source.name.clone(),
        range,
        ..map.clone()
    };
    let mut panels = Panels {
        title: "Scores of heads".into(),
        maps: sources.iter().zip(maps).map(titled).collect(),
        size: Size { width: 1600, height: 1000 },
        ..Panels::default()
    };
    if let Some((i, other)) = unlike {
        let (field, first) = &measures[0][i];
        panels.subtitle = format!(
            "`{field}` is `{first}` and `{}`: no difference, and each map has its own colours",
            other[i].1
        );
    } else if let ([before, after], [one, other]) = (maps, all)
        && one.heads == other.heads
    {
        let names = [&sources[0].name[..], &sources[1].name];
        panels.subtitle = format!("{} against {}", names[0], names[1]);
        panels.maps.push(difference(before, after, names));
        panels.columns = 3;
        panels.size = Size { width: 1800, height: 640 };
    }
    panels
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
    if let Some(intervals) = &scores.interval_95 {
        check_shape("intervals", &scores.heads, intervals)?;
    }
    let shared = match &scores.kv_of_head[..] {
        [] => Shared::default(),
        kv => {
            check_shape("key/value heads", &scores.heads, kv)?;
            shared(&scores.heads, kv)
        }
    };
    let mut notes = vec![vec![String::new(); map.columns.len()]; map.rows.len()];
    for (layer, heads) in scores.heads.iter().enumerate() {
        for (place, &head) in heads.iter().enumerate() {
            let range = scores.interval_95.as_ref().and_then(|all| all[layer][place]);
            notes[layer][head] = with_interval(scores.scores[layer][place], range);
        }
    }
    for &(layer, head, kv) in &shared.apart {
        notes[layer][head] += &format!("\nkv {kv}");
    }
    let mut subtitle = conditions(scores);
    if scores.interval_95.is_some() {
        subtitle += "; 95 % intervals";
    }
    if !shared.framed.is_empty() {
        subtitle += "; heads that share keys and values are framed";
    }
    if !shared.apart.is_empty() {
        subtitle += "; kv: the key/value head of heads that share one and are not neighbours";
    }
    Ok(HeatMap {
        title: format!("{}: heads by {}", called(&scores.model), scores.method.replace('_', " ")),
        subtitle: subtitle.trim_start_matches("; ").to_owned(),
        value_label: scores.method.replace('_', " "),
        notes,
        groups: shared.framed,
        ..map
    })
}

/// Heads that share a key/value head with others.
#[derive(Default)]
struct Shared {
    /// All of a key/value head, where they are neighbours.
    framed: Vec<Group>,
    /// Layer, head and key/value head of the others.
    apart: Vec<(usize, usize, usize)>,
}

fn shared(heads: &[Vec<usize>], kv_of_head: &[Vec<usize>]) -> Shared {
    let mut found = Shared::default();
    for (layer, (heads, kv_of_head)) in heads.iter().zip(kv_of_head).enumerate() {
        let mut of: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for (&head, &kv) in heads.iter().zip(kv_of_head) {
            of.entry(kv).or_default().push(head);
        }
        for (kv, mut heads) in of {
            heads.sort_unstable();
            let (first, end) = (heads[0], heads[heads.len() - 1] + 1);
            if heads.len() == 1 {
                continue;
            } else if end - first == heads.len() {
                found.framed.push(Group { rows: layer..layer + 1, columns: first..end });
            } else {
                found.apart.extend(heads.into_iter().map(|head| (layer, head, kv)));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use attn_viz::Shades;
    use serde_json::json;

    use super::*;

    fn source(name: &str, scores: [[f64; 2]; 2]) -> Source {
        let range = json!({"low": 0.0, "high": 1.0});
        let value = json!({
            "model": "runs/m/model", "method": "michel", "heads": [[0, 1], [0, 2]], "scores": scores,
            "interval_95": [[range, range], [range, range]],
            "kv_of_head": [[0, 0], [0, 1]], "task": "sst2", "n_rows": 872,
        });
        Source::of(name, value)
    }

    #[test]
    fn a_head_that_was_removed_leaves_its_cell_empty() {
        let drawn = draw(&[source("a", [[0.1, 0.2], [0.3, 0.4]])]).unwrap();
        let Figure::Heat(map) = &drawn[0].figure else { panic!("{drawn:?}") };
        assert_eq!(map.values[0][..2], [0.1, 0.2]);
        assert!(map.values[0][2].is_nan() && map.values[1][1].is_nan());
        assert_eq!((map.values[1][0], map.values[1][2]), (0.3, 0.4));
        assert_eq!(map.notes[1][2], "0.400\n0 to 1.00");
        let framed = Group { rows: 0..1, columns: 0..2 };
        assert_eq!(map.groups, [framed], "two that share, and none alone");
    }

    #[test]
    fn heads_that_share_and_are_no_neighbours_have_a_word_in_place_of_a_frame() {
        let mut one = source("a", [[0.1, 0.2], [0.3, 0.4]]);
        one.value["kv_of_head"] = json!([[0, 1], [7, 7]]);
        let drawn = draw(&[one]).unwrap();
        let Figure::Heat(map) = &drawn[0].figure else { panic!("{drawn:?}") };
        assert!(map.groups.is_empty());
        assert_eq!(map.notes[1][0], "0.300\n0 to 1.00\nkv 7");
        assert_eq!(map.notes[1][2], "0.400\n0 to 1.00\nkv 7");
        assert_eq!(map.notes[0][0], "0.100\n0 to 1.00");
        assert!(map.subtitle.contains("not neighbours") && !map.subtitle.contains("framed"));
    }

    #[test]
    fn what_is_measured_otherwise_is_not_subtracted() {
        let sources = |field: &str, other: &str| {
            let mut two = [1.0, 2.0].map(|it| source("a", [[it, 0.0], [0.0, 0.0]]));
            two[1].value[field] = other.into();
            two
        };
        for field in ["method", "normalize", "task"] {
            let drawn = draw(&sources(field, "other")).unwrap();
            let [Drawn { figure: Figure::Panels(panels), .. }] = &drawn[..] else {
                panic!("{drawn:?}")
            };
            assert_eq!(panels.maps.len(), 2);
            assert!(panels.subtitle.contains(&format!("`{field}` is `")), "{}", panels.subtitle);
            assert!(panels.maps.iter().all(|map| map.range.is_none()));
        }
        let drawn = draw(&sources("task", "sst2")).unwrap();
        let Figure::Panels(panels) = &drawn[0].figure else { panic!("{drawn:?}") };
        let ranges: Vec<_> = panels.maps.iter().map(|map| map.range).collect();
        assert_eq!(ranges, [Some((0.0, 2.0)), Some((0.0, 2.0)), None]);
        assert_eq!(panels.maps[2].subtitle, "a \u{2212} a");
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
