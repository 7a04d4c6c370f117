//! How a model stands to another beside the laws: what of config and weights is another, and where hidden states part.

use std::{collections::BTreeMap, io::Write};

use anyhow::Result;
use attn_core::Model;
use serde::Serialize;
use serde_json::Value;
use tch::{Kind, Tensor};

/// Hidden states nearer than this, as relative rms, are the same but for rounding.
const SAME: f64 = 1e-6;

/// Tensors and fields that are named; the others are counted.
const NAMED: usize = 5;

/// Fields of a config that say nothing of what is computed.
const BESIDE: [&str; 4] = ["transformers_version", "_name_or_path", "dtype", "architectures"];

#[derive(Debug, Serialize)]
pub(super) struct Apart {
    /// How far hidden states are from those of the other, relative rms: what enters the first block, then what leaves each. `None` where
    /// they cannot be compared.
    #[serde(rename = "apart_by_layer", skip_serializing_if = "Option::is_none")]
    by_layer: Option<Vec<f64>>,
    /// The fields of `config.json` that differ.
    config_differs: Vec<String>,
    weights: Weights,
    /// Kinds of attention that see all of the text, where the two differ in kinds.
    #[serde(skip)]
    sees_all: Vec<String>,
    #[serde(skip)]
    fields: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Weights {
    /// Tensors that both have, the same to the bit.
    n_same: usize,
    /// Tensors that both have, with other numbers or of another shape.
    n_differ: usize,
    /// Those that differ most.
    furthest: Vec<Differing>,
    only_here: Vec<String>,
    only_there: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Differing {
    name: String,
    /// The rms of the difference by that of the other's; `None` where shapes differ, or numbers are none.
    relative_rms: Option<f64>,
}

impl Apart {
    /// That of `model` from `other`, whose hidden states are `by_layer` apart on texts of `n_tokens`.
    pub(super) fn of(
        model: &Model,
        other: &Model,
        by_layer: Option<Vec<f64>>,
        n_tokens: usize,
    ) -> Self {
        let (here, there) = (super::kinds(model), super::kinds(other));
        let sees_all = here
            .iter()
            .chain(&there)
            .filter(|it| !(here.contains(it) && there.contains(it)))
            .filter(|(_, reach)| *reach >= n_tokens as i64)
            .map(|(variant, reach)| format!("`{}` reaches {reach} tokens", variant.name()))
            .collect();
        let [own, its] = [model, other].map(|it| it.config().to_json(it.kind()));
        let is_known = |field: &&String| !BESIDE.contains(&field.as_str());
        let mut config_differs: Vec<String> =
            own.keys().chain(its.keys()).filter(is_known).cloned().collect();
        config_differs.sort();
        config_differs.dedup();
        config_differs.retain(|field| own.get(field) != its.get(field));
        let fields = config_differs
            .iter()
            .map(|field| format!("{field} {} ({})", shown(own.get(field)), shown(its.get(field))))
            .collect();
        Self { by_layer, config_differs, weights: weights(model, other), sees_all, fields }
    }

    /// Writes it in words; `name` is the other's.
    pub(super) fn tell(&self, name: &str, out: &mut dyn Write) -> Result<()> {
        if let Some(by_layer) = &self.by_layer {
            let place = |at: usize| match at {
                0 => "in the embeddings".to_owned(),
                block => format!("in block {}", block - 1),
            };
            let parted = by_layer.iter().position(|&it| it > SAME || it.is_nan());
            match parted {
                None => writeln!(out, "hidden states are those of {name}, all to {SAME:.0e}")?,
                Some(at) => writeln!(out, "hidden states leave those of {name} {}", place(at))?,
            }
            let told: Vec<String> = by_layer.iter().map(|it| format!("{it:.1e}")).collect();
            writeln!(out, "  relative rms by layer  {}", told.join("  "))?;
            if parted.is_none() && !self.sees_all.is_empty() {
                writeln!(
                    out,
                    "  no wonder: {}, as many as the text has; a longer one may tell them apart (without --quick, or --text)",
                    self.sees_all.join(", ")
                )?;
            }
        }
        if !self.fields.is_empty() {
            writeln!(out, "config.json differs, here (there): {}", some(&self.fields))?;
        }
        let Weights { n_same, n_differ, furthest, only_here, only_there } = &self.weights;
        let n_shared = n_same + n_differ;
        match n_differ {
            0 => writeln!(out, "all {n_shared} tensors that both have are the same to the bit")?,
            _ => {
                writeln!(
                    out,
                    "{n_differ} of {n_shared} tensors that both have differ, most of all"
                )?;
                for Differing { name, relative_rms } in furthest {
                    let rms = relative_rms.map_or("-".into(), |it| format!("{it:.1e}"));
                    writeln!(out, "  {rms:>8}  {name}")?;
                }
            }
        }
        for (whose, names) in [("here", only_here), ("there", only_there)] {
            if !names.is_empty() {
                writeln!(out, "only {whose}: {}", some(names))?;
            }
        }
        writeln!(out, "that two models differ breaks no law: the exit code does not tell")?;
        writeln!(out)?;
        Ok(())
    }
}

fn shown(value: Option<&Value>) -> String {
    match value {
        None => "not there".into(),
        Some(value @ (Value::Array(_) | Value::Object(_))) => {
            let text = value.to_string();
            if text.len() > 40 { "...".into() } else { text }
        }
        Some(value) => value.to_string(),
    }
}

/// The first of `names`, and how many more there are.
fn some(names: &[String]) -> String {
    let mut text = names.iter().take(NAMED).cloned().collect::<Vec<_>>().join(", ");
    if names.len() > NAMED {
        text += &format!(" and {} more", names.len() - NAMED);
    }
    text
}

fn weights(model: &Model, other: &Model) -> Weights {
    let by_name =
        |model: &Model| -> BTreeMap<String, Tensor> { model.parameters().into_iter().collect() };
    let (here, mut there) = (by_name(model), by_name(other));
    let (mut n_same, mut differing, mut only_here) = (0, Vec::new(), Vec::new());
    for (name, own) in here {
        let Some(its) = there.remove(&name) else {
            only_here.push(name);
            continue;
        };
        if own.size() == its.size() && own.equal(&its) {
            n_same += 1;
            continue;
        }
        let rms = |x: &Tensor| {
            x.to_kind(Kind::Float).square().mean(Kind::Double).sqrt().double_value(&[])
        };
        let relative_rms = (own.size() == its.size())
            .then(|| rms(&(&own - &its)) / rms(&its).max(f64::MIN_POSITIVE))
            .filter(|it| it.is_finite());
        differing.push(Differing { name, relative_rms });
    }
    let n_differ = differing.len();
    // What is no number is furthest.
    let size = |it: &Differing| it.relative_rms.unwrap_or(f64::INFINITY);
    differing.sort_by(|a, b| size(b).total_cmp(&size(a)));
    differing.truncate(NAMED);
    Weights {
        n_same,
        n_differ,
        furthest: differing,
        only_here,
        only_there: there.into_keys().collect(),
    }
}
