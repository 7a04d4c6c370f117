//! How spread the attention of each head is.

use anyhow::Result;
use attn_viz::HeatMap;
use serde::{Deserialize, Serialize};

use super::{Draw, Drawn, Figure, Kind, called, in_cell, layer_head, numbers};

pub(super) const KIND: Kind = Kind {
    name: "entropy",
    about: "how spread the attention of each head is (entropy.json of attn heatmap --measure entropy)",
    reads: |value| value.get("entropy").is_some_and(|it| it[0].is_array()),
    draw: Draw::Each(|source| Ok(vec![Drawn::new("", figure(&source.read()?)?)])),
};

/// entropy.json.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Entropy {
    pub(crate) schema: u32,
    pub(crate) model: String,
    pub(crate) n_tokens: i64,
    pub(crate) layers: Vec<usize>,
    /// Of each layer, by their numbers.
    pub(crate) heads: Vec<Vec<usize>>,
    /// In nats, the mean over tokens; NaN of coefficients that are no distribution.
    #[serde(deserialize_with = "numbers")]
    pub(crate) entropy: Vec<Vec<f64>>,
}

/// A map of layers and heads.
pub(crate) fn figure(found: &Entropy) -> Result<Figure> {
    let Entropy { model, n_tokens, layers, heads, entropy, .. } = found;
    let map = layer_head(heads, entropy)?;
    let note = |value: &f64| if value.is_nan() { String::new() } else { in_cell(*value) };
    Ok(Figure::Heat(HeatMap {
        title: format!("Entropy of attention in {}", called(model)),
        subtitle: format!(
            "mean over {n_tokens} tokens of one text; ln n for n tokens seen alike; none where coefficients are no distribution"
        ),
        value_label: "nats".into(),
        rows: layers.iter().map(usize::to_string).collect(),
        notes: map.values.iter().map(|row| row.iter().map(note).collect()).collect(),
        ..map
    }))
}
