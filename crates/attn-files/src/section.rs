//! The section `attn` of a `config.json`: what was changed in each layer.

use std::fmt;

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Map, Value};

/// Version of the section.
pub const FORMAT_VERSION: u32 = 1;

/// What is wrong with a field of a `config.json`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Field {
    /// The field's path.
    pub field: String,
    /// What is wrong, what was expected, and a hint.
    pub problem: String,
}

impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "config.json: `{}`: {}", self.field, self.problem)
    }
}

impl std::error::Error for Field {}

/// The section.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Section {
    /// [`FORMAT_VERSION`].
    pub format_version: u32,
    /// transformers' name of the architecture that was changed.
    pub base_model_type: String,
    /// Each layer, from the first.
    pub layers: Vec<Layer>,
}

/// The attention of one layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Layer {
    /// The attention kind.
    pub kind: String,
    /// Its settings, which only the kind understands.
    pub settings: Map<String, Value>,
    /// Query heads.
    pub n_heads: i64,
    /// Key/value heads.
    pub n_kv_heads: i64,
    /// The base model's head that each query head was, each once.
    pub kept_heads: Vec<i64>,
    /// The key/value head that each query head reads.
    pub kv_of_head: Vec<i64>,
}

/// The architecture that a `config.json` is of, by transformers' name, and its section `attn` where it has one. A config with a section
/// has a `model_type` that begins with `attn_`, and one without has none.
///
/// # Errors
///
/// Where the two do not go together, or the section is not understood.
pub fn read(raw: &Map<String, Value>) -> Result<(&str, Option<Section>), Field> {
    let model_type = raw.get("model_type").and_then(Value::as_str).unwrap_or("nothing");
    let section: Option<Section> = field(raw, "attn")?;
    match (model_type.strip_prefix("attn_"), section) {
        (Some(base), Some(section)) => {
            section.is_of(base)?;
            Ok((base, Some(section)))
        }
        (Some(_), None) => {
            Err(problem("attn", "is missing, while `model_type` says that layers were changed"))
        }
        (None, Some(_)) => Err(problem(
            "model_type",
            format!(
                "is `{model_type}`, expected `attn_{model_type}`: the section `attn` says that layers were changed"
            ),
        )),
        (None, None) => Ok((model_type, None)),
    }
}

impl Section {
    fn is_of(&self, base: &str) -> Result<(), Field> {
        if self.format_version != FORMAT_VERSION {
            return Err(problem(
                "attn.format_version",
                format!(
                    "is {}, expected {FORMAT_VERSION}\nhint: the folder was written by another version of this program",
                    self.format_version
                ),
            ));
        }
        if self.base_model_type != base {
            return Err(problem(
                "attn.base_model_type",
                format!("is `{}`, while `model_type` is `attn_{base}`", self.base_model_type),
            ));
        }
        Ok(())
    }

    /// Checks that the section is of a model with `n_layers` layers, which had `n_heads` query heads each.
    ///
    /// # Errors
    ///
    /// For another number of layers, and for heads that are not there, stand twice, or are read by none.
    pub fn check(&self, n_layers: i64, n_heads: i64) -> Result<(), Field> {
        if self.layers.len() as i64 != n_layers {
            return Err(problem(
                "attn.layers",
                format!("describes {} layers, while the model has {n_layers}", self.layers.len()),
            ));
        }
        self.layers.iter().enumerate().try_for_each(|(index, layer)| layer.check(index, n_heads))
    }
}

impl Layer {
    fn check(&self, index: usize, n_base: i64) -> Result<(), Field> {
        let Self { n_heads, n_kv_heads, kept_heads, kv_of_head, .. } = self;
        let at = |name: &str| format!("attn.layers[{index}].{name}");
        if !(0..=n_base).contains(n_heads) {
            let expected = format!("is {n_heads}, expected 0 to {n_base}");
            return Err(problem(at("n_heads"), expected));
        }
        let mut sorted = kept_heads.clone();
        sorted.sort_unstable();
        let each_once = sorted.is_sorted_by(|a, b| a < b);
        let in_range = kept_heads.iter().all(|head| (0..n_base).contains(head));
        if kept_heads.len() as i64 != *n_heads || !each_once || !in_range {
            return Err(problem(
                at("kept_heads"),
                format!("is {kept_heads:?}, expected {n_heads} heads below {n_base}, each once"),
            ));
        }
        let in_range = kv_of_head.iter().all(|kv| (0..*n_kv_heads).contains(kv));
        let mut read = kv_of_head.clone();
        read.sort_unstable();
        read.dedup();
        if kv_of_head.len() as i64 != *n_heads || !in_range || read.len() as i64 != *n_kv_heads {
            return Err(problem(
                at("kv_of_head"),
                format!(
                    "is {kv_of_head:?}, expected {n_heads} entries that name each of {n_kv_heads} key/value heads"
                ),
            ));
        }
        Ok(())
    }
}

/// Reads the field `name`, absent and null being `None`.
///
/// # Errors
///
/// Where it is there and no `T`.
pub fn field<T: DeserializeOwned>(
    raw: &Map<String, Value>,
    name: &str,
) -> Result<Option<T>, Field> {
    match raw.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => {
            T::deserialize(value).map(Some).map_err(|error| problem(name, error.to_string()))
        }
    }
}

/// That `field` is wrong.
pub fn problem(field: impl Into<String>, problem: impl Into<String>) -> Field {
    Field { field: field.into(), problem: problem.into() }
}
