//! Who attends to whom in one text: every head of a layer, a model, or two models.

use anyhow::{Result, ensure};
use attn_viz::{HeatMap, Panels, Size};
use serde::{Deserialize, Serialize};

use super::{Draw, Drawn, Figure, Kind, Source, called, common_range, difference, numbers};

pub(super) const KIND: Kind = Kind {
    name: "attention",
    about: "who attends to whom in a text (attention.json of attn heatmap), of two files also the difference",
    reads: |value| value.get("layers").is_some_and(|it| it[0].get("weights").is_some()),
    draw: Draw::Together(draw),
};

/// attention.json.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Attention {
    pub(crate) schema: u32,
    pub(crate) model: String,
    /// What the numbers are.
    pub(crate) measure: String,
    pub(crate) unit: String,
    pub(crate) layers: Vec<OfLayer>,
}

/// The maps of one layer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct OfLayer {
    pub(crate) layer: usize,
    /// The attention kind.
    pub(crate) kind: String,
    /// What is to be said of its numbers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) note: Option<String>,
    /// Tokens that attend.
    pub(crate) rows: Vec<String>,
    /// Tokens that are attended to.
    pub(crate) columns: Vec<String>,
    /// What the maps are of: heads by their numbers, or `mean`.
    pub(crate) heads: Vec<String>,
    /// `[head][row][column]`.
    #[serde(deserialize_with = "numbers")]
    pub(crate) weights: Vec<Vec<Vec<f32>>>,
}

/// Maps in a picture up to which each has names of its own.
const FEW: usize = 6;

fn draw(sources: &[Source]) -> Result<Vec<Drawn>> {
    let all: Vec<Attention> = sources.iter().map(Source::read).collect::<Result<_>>()?;
    for (source, attention) in sources.iter().zip(&all) {
        source.drawn(check(attention))?;
    }
    let maps: Vec<Vec<HeatMap>> = all.iter().map(maps).collect();
    let figure = match &maps[..] {
        [_] => figure(&all[0]),
        [before, after] => {
            let same = |(a, b): (&HeatMap, &HeatMap)| a.rows == b.rows && a.columns == b.columns;
            ensure!(
                before.len() == after.len() && before.iter().zip(after).all(same),
                "`{}` and `{}` have other layers, heads or tokens\nhint: attn heatmap with the same text, --layers and --heads",
                sources[0].path.display(),
                sources[1].path.display()
            );
            for (field, of) in [
                ("measure", [&all[0].measure, &all[1].measure]),
                ("unit", [&all[0].unit, &all[1].unit]),
            ] {
                ensure!(
                    of[0] == of[1],
                    "`{field}` of `{}` is `{}`, and of `{}` `{}`: their difference says nothing\nhint: attn heatmap with the same --measure",
                    sources[0].path.display(),
                    of[0],
                    sources[1].path.display(),
                    of[1]
                );
            }
            Figure::Panels(compared(sources, before, after))
        }
        _ => anyhow::bail!(
            "attention of {} files is too much for a picture\nhint: name one, or two to compare",
            maps.len()
        ),
    };
    Ok(vec![Drawn::new("", figure)])
}

/// Holds that each head has its map, and each map its tokens.
fn check(attention: &Attention) -> Result<()> {
    for layer in &attention.layers {
        let (n, heads, maps) = (layer.layer, layer.heads.len(), layer.weights.len());
        ensure!(heads == maps, "layer {n} has {heads} heads and {maps} maps");
        for (head, map) in layer.heads.iter().zip(&layer.weights) {
            ensure!(
                map.len() == layer.rows.len()
                    && map.iter().all(|row| row.len() == layer.columns.len()),
                "the map of layer {n}, head {head} is not of {} rows and {} columns",
                layer.rows.len(),
                layer.columns.len()
            );
        }
    }
    Ok(())
}

/// All maps in one picture.
pub(crate) fn figure(attention: &Attention) -> Figure {
    let mut maps = maps(attention);
    match maps.len() {
        1 => Figure::Heat(maps.remove(0)),
        _ => Figure::Panels(panels(attention, maps)),
    }
}

/// A map for each head, layer by layer.
pub(crate) fn maps(attention: &Attention) -> Vec<HeatMap> {
    let mut maps = Vec::new();
    for layer in &attention.layers {
        for (head, weights) in layer.heads.iter().zip(&layer.weights) {
            let which = if head == "mean" {
                "mean of its heads".to_owned()
            } else {
                format!("head {head}")
            };
            let note = layer.note.as_ref().map_or(String::new(), |note| format!("; {note}"));
            maps.push(HeatMap {
                title: format!("Layer {}, {which}", layer.layer),
                subtitle: format!("{}, {}{note}", called(&attention.model), layer.kind),
                x_label: "attended to".into(),
                y_label: "token".into(),
                value_label: attention.unit.clone(),
                rows: layer.rows.clone(),
                columns: layer.columns.clone(),
                values: weights
                    .iter()
                    .map(|row| row.iter().map(|&it| f64::from(it)).collect())
                    .collect(),
                size: size(layer.rows.len(), layer.columns.len()),
                ..HeatMap::default()
            });
        }
    }
    maps
}

fn panels(attention: &Attention, mut maps: Vec<HeatMap>) -> Panels {
    // Layers below each other where each has as many heads.
    let counts: Vec<usize> = attention.layers.iter().map(|layer| layer.heads.len()).collect();
    let alike = counts.windows(2).all(|two| two[0] == two[1]);
    let columns = if alike && counts.len() > 1 && counts[0] > 1 { counts[0] } else { 0 };
    let across = if columns > 0 { columns } else { (maps.len() as f64).sqrt().ceil() as usize };
    let down = maps.len().div_ceil(across);
    let each = if maps.len() <= FEW { 460 } else { 200 };
    let extent = |n: usize, around: u32| (n as u32 * each + around).clamp(640, 4000);
    // What holds of every map is said once.
    let told = maps.first().map_or(String::new(), |map| map.subtitle.clone());
    let is_of_all = maps.iter().all(|map| map.subtitle == told);
    if is_of_all {
        maps.iter_mut().for_each(|map| map.subtitle.clear());
    }
    Panels {
        title: format!("{} of {}", attention.measure, called(&attention.model)),
        subtitle: if is_of_all { told } else { String::new() },
        columns,
        shared: true,
        size: Size { width: extent(across, 140), height: extent(down, 110) },
        maps,
        ..Panels::default()
    }
}

fn compared(sources: &[Source], before: &[HeatMap], after: &[HeatMap]) -> Panels {
    let mut maps = Vec::new();
    for (a, b) in before.iter().zip(after) {
        let range = common_range(&[a, b]);
        let titled = |map: &HeatMap, source: &Source| HeatMap {
            title: format!("{}: {}", source.name, map.title),
            range,
            ..map.clone()
        };
        maps.push(titled(a, &sources[0]));
        maps.push(titled(b, &sources[1]));
        maps.push(difference(a, b, [&sources[0].name, &sources[1].name]));
    }
    Panels {
        title: format!("{} and {}", sources[0].name, sources[1].name),
        columns: 3,
        size: Size { width: 1800, height: (before.len() as u32 * 520 + 120).min(8000) },
        maps,
        ..Panels::default()
    }
}

/// Room for every name, within reason.
pub(crate) fn size(n_rows: usize, n_columns: usize) -> Size {
    let extent = |n: usize, around: u32, least: u32| {
        u32::try_from(n)
            .unwrap_or(u32::MAX)
            .saturating_mul(24)
            .saturating_add(around)
            .clamp(least, 2400)
    };
    Size { width: extent(n_columns, 340, 640), height: extent(n_rows, 280, 480) }
}
