//! The coefficients of layers that add up masks, and the masks that they make.

use anyhow::{Result, ensure};
use attn_viz::HeatMap;
use serde::{Deserialize, Serialize};

use super::{Draw, Drawn, Figure, Kind, called, in_cell, numbers};

pub(super) const KIND: Kind = Kind {
    name: "masks",
    about: "what each mask of a sum counts, and the mask they make (masks.json of attn heatmap --measure masks)",
    reads: |value| value["layers"][0].get("coefficients").is_some(),
    draw: Draw::Each(|source| draw(&source.read()?)),
};

/// masks.json.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Masks {
    pub(crate) schema: u32,
    pub(crate) model: String,
    pub(crate) layers: Vec<OfLayer>,
}

/// The masks of one layer.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct OfLayer {
    pub(crate) layer: usize,
    /// The numbers of its heads; absent where one sum holds for all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) heads: Vec<i64>,
    /// What the masks are called.
    pub(crate) names: Vec<String>,
    /// `[head][mask]`, or `[1][mask]`.
    #[serde(deserialize_with = "numbers")]
    pub(crate) coefficients: Vec<Vec<f32>>,
    /// `[head][position][position]`, or one for all heads.
    #[serde(deserialize_with = "numbers")]
    pub(crate) masks: Vec<Vec<Vec<f32>>>,
}

impl OfLayer {
    /// The head that the sum at `at` is of, none where it is of all.
    fn head(&self, at: usize) -> Option<i64> {
        self.heads.get(at).copied()
    }
}

/// The coefficients of all layers, then each mask.
pub(crate) fn draw(found: &Masks) -> Result<Vec<Drawn>> {
    let mut names: Vec<String> = Vec::new();
    for name in found.layers.iter().flat_map(|it| &it.names) {
        if !names.contains(name) {
            names.push(name.clone());
        }
    }
    let (mut rows, mut values) = (Vec::new(), Vec::new());
    for it in &found.layers {
        for (at, of_head) in it.coefficients.iter().enumerate() {
            ensure!(
                of_head.len() == it.names.len(),
                "layer {} has {} masks and {} coefficients",
                it.layer,
                it.names.len(),
                of_head.len()
            );
            let place = |name: &String| it.names.iter().position(|own| own == name);
            let value = |name: &String| place(name).map_or(f64::NAN, |at| f64::from(of_head[at]));
            rows.push(match it.head(at) {
                None => format!("layer {}", it.layer),
                Some(head) => format!("{}-{head}", it.layer),
            });
            values.push(names.iter().map(value).collect::<Vec<f64>>());
        }
    }
    let note = |value: &f64| if value.is_nan() { String::new() } else { in_cell(*value) };
    let coefficients = HeatMap {
        title: format!("What each mask counts in {}", called(&found.model)),
        subtitle: "coefficients of the sum of masks; 0 leaves a mask out, 1 takes it whole".into(),
        x_label: "mask".into(),
        value_label: "coefficient".into(),
        notes: values.iter().map(|row: &Vec<f64>| row.iter().map(note).collect()).collect(),
        columns: names,
        rows,
        values,
        range: Some((0.0, 1.0)),
        ..HeatMap::default()
    };
    let mut drawn = vec![Drawn::new("coefficients", Figure::Heat(coefficients))];
    for it in &found.layers {
        for (at, mask) in it.masks.iter().enumerate() {
            let (which, name) = match it.head(at) {
                None => (String::new(), format!("layer-{}", it.layer)),
                Some(head) => (format!(", head {head}"), format!("layer-{}-head-{head}", it.layer)),
            };
            let places = |n: usize| (0..n).map(|place| place.to_string()).collect::<Vec<_>>();
            let map = HeatMap {
                title: format!("The mask of layer {}{which}", it.layer),
                subtitle:
                    "the sum of masks before the model's own is applied (a causal one sees no future)"
                        .into(),
                x_label: "attended to".into(),
                y_label: "position".into(),
                value_label: "M".into(),
                rows: places(mask.len()),
                columns: places(mask.first().map_or(0, Vec::len)),
                values: mask
                    .iter()
                    .map(|row| row.iter().map(|&it| it.into()).collect())
                    .collect(),
                ..HeatMap::default()
            };
            drawn.push(Drawn::new(name, Figure::Heat(map)));
        }
    }
    Ok(drawn)
}
