//! `config.json`: what the folder says it is.
//!
//! If plain transformers computes the same logits from a folder, its `model_type` is transformers' own. Otherwise
//! (swapped attention, uneven heads) it is `attn_<base>`, which `AutoModel` refuses, and a section `attn` describes
//! each layer.

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Map, Value, json};
use tch::Kind;

use crate::{Error, arch::ArchConfig, variants::Variant, weights::Weights};

/// Version of the `attn` section.
pub const FORMAT_VERSION: u32 = 1;

/// What a model ends in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Head {
    /// Nothing: the output is the last hidden state.
    Bare,
    /// Logits over the vocabulary, of the next token or of masked ones as the architecture goes.
    LanguageModel,
    /// Logits over classes, one vector a sequence.
    Classifier {
        /// Number of classes.
        n_classes: i64,
    },
}

impl std::fmt::Display for Head {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Bare => f.write_str("no head"),
            Self::LanguageModel => f.write_str("a language-model head"),
            Self::Classifier { n_classes } => write!(f, "a classifier of {n_classes} classes"),
        }
    }
}

/// The attention of one layer.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerSpec {
    /// Attention kind and settings.
    pub variant: Variant,
    /// Query heads.
    pub n_heads: i64,
    /// Key/value heads.
    pub n_kv_heads: i64,
    /// The base model's head that each query head was, each once.
    pub kept_heads: Vec<i64>,
    /// The key/value head that each query head reads.
    pub kv_of_head: Vec<i64>,
}

impl LayerSpec {
    /// The places of the layer's query heads by rising number: in their own order, unless heads were merged that are no neighbours.
    pub fn places_by_number(&self) -> Vec<usize> {
        let mut places: Vec<usize> = (0..self.kept_heads.len()).collect();
        places.sort_by_key(|&place| self.kept_heads[place]);
        places
    }

    /// The key/value head that each query head reads; of a code, of which each reads a key and a value of its own, its place.
    pub fn kv_readers(&self) -> Vec<i64> {
        match self.variant {
            Variant::Latent(_) => (0..self.n_heads).collect(),
            _ => self.kv_of_head.clone(),
        }
    }

    /// A layer as plain transformers has it.
    pub fn plain(n_heads: i64, n_kv_heads: i64) -> Self {
        Self {
            variant: Variant::default(),
            n_heads,
            n_kv_heads,
            kept_heads: (0..n_heads).collect(),
            kv_of_head: (0..n_heads).map(|head| head * n_kv_heads / n_heads).collect(),
        }
    }
}

/// The sizes that every architecture has.
#[derive(Debug, Clone, PartialEq)]
pub struct Sizes {
    /// Width of the hidden states.
    pub hidden_size: i64,
    /// Blocks.
    pub n_layers: i64,
    /// Query heads of a plain layer.
    pub n_heads: i64,
    /// Key/value heads of a plain layer.
    pub n_kv_heads: i64,
    /// Channels of a head.
    pub head_dim: i64,
    /// Rows of the token embedding.
    pub vocab_size: i64,
    /// Longest sequence that the position table serves; `None` where positions are rotations.
    pub position_table: Option<i64>,
    /// Longest sequence that the model was made for.
    pub max_positions: i64,
    /// Standard deviation of random weights.
    pub initializer_range: f64,
}

/// A model's configuration.
#[derive(Debug, Clone)]
pub struct Config {
    raw: Map<String, Value>,
    /// The architecture's own fields.
    pub(crate) arch: ArchConfig,
    /// What the model ends in.
    pub head: Head,
    /// The sizes.
    pub sizes: Sizes,
    /// The attention of each layer.
    pub layers: Vec<LayerSpec>,
}

/// The field of a plain config that names the heads of each layer in their order, where that is not their own. It makes no difference
/// to what they compute, and transformers keeps it unread.
const HEAD_ORDER: &str = "attn_head_order";

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct AttnSection {
    format_version: u32,
    base_model_type: String,
    layers: Vec<LayerSection>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct LayerSection {
    kind: String,
    settings: Map<String, Value>,
    n_heads: i64,
    n_kv_heads: i64,
    kept_heads: Vec<i64>,
    kv_of_head: Vec<i64>,
}

impl Config {
    /// Understands the object in a `config.json`.
    ///
    /// # Errors
    /// For a field that is missing, of the wrong type, or has a value that would change the logits and that this crate
    /// does not compute: each by name.
    pub fn from_json(raw: Map<String, Value>) -> Result<Self, Error> {
        let model_type =
            raw.get("model_type").and_then(Value::as_str).unwrap_or("nothing").to_owned();
        let section: Option<AttnSection> = field(&raw, "attn")?;
        let base = match (model_type.strip_prefix("attn_"), &section) {
            (Some(base), Some(section)) => {
                check_section(section, base)?;
                base
            }
            (Some(_), None) => {
                return Err(problem(
                    "attn",
                    "is missing, while `model_type` says that layers were changed",
                ));
            }
            (None, Some(_)) => {
                return Err(problem(
                    "model_type",
                    &format!(
                        "is `{model_type}`, expected `attn_{model_type}`: the section `attn` says that layers were changed"
                    ),
                ));
            }
            (None, None) => model_type.as_str(),
        };
        let arch = ArchConfig::parse(base, &raw)?;
        let sizes = arch.sizes()?;
        check_sizes(&sizes)?;
        let head = read_head(&raw, &arch)?;
        let layers = match section {
            None => read_plain_layers(&raw, &sizes)?,
            Some(section) => read_layers(section, &sizes)?,
        };
        Ok(Self { raw, arch, head, sizes, layers })
    }

    /// transformers' name of the architecture: `gpt2`, `distilbert`, `bert` or `llama`.
    pub fn base_model_type(&self) -> &'static str {
        self.arch.model_type()
    }

    /// Whether the model predicts the next token and so must not see the future.
    pub fn is_causal(&self) -> bool {
        self.arch.is_causal()
    }

    /// Whether the model tells a second text from the first by segments (`token_type_ids`), as BERT does.
    pub fn has_segments(&self) -> bool {
        self.n_segments() > 1
    }

    /// The segments that the model has a table of; 0 without one.
    pub(crate) fn n_segments(&self) -> i64 {
        match self.base_model_type() {
            "bert" => self.raw("type_vocab_size").and_then(Value::as_i64).unwrap_or(2),
            _ => 0,
        }
    }

    /// Whether plain transformers computes the same logits.
    pub fn is_plain(&self) -> bool {
        self.plain_heads().is_some()
    }

    /// Query and key/value heads of every layer, where plain transformers can be told of them and computes the same logits.
    fn plain_heads(&self) -> Option<[i64; 2]> {
        let Sizes { n_heads, n_kv_heads, .. } = self.sizes;
        let first = self.layers.first()?;
        let heads = [first.n_heads, first.n_kv_heads];
        let may_differ =
            self.arch.head_fields().is_some() && heads[1] > 0 && heads[0] % heads[1] == 0;
        if heads != [n_heads, n_kv_heads] && !may_differ {
            return None;
        }
        let plain = LayerSpec::plain(heads[0], heads[1]);
        // Which of the old heads they are makes no difference to what they compute.
        let is_plain = |layer: &LayerSpec| {
            let numbered = LayerSpec { kept_heads: plain.kept_heads.clone(), ..layer.clone() };
            numbered == plain
        };
        self.layers.iter().all(is_plain).then_some(heads)
    }

    /// Puts `variant` into the layers `layers`, and checks that a model can be made of it, without making one.
    ///
    /// # Errors
    /// [`Error::Index`] for a layer that is not there, [`Error::Setting`] where the settings do not fit; the
    /// configuration is then as it was.
    pub fn set_attention(&mut self, layers: &[usize], variant: &Variant) -> Result<(), Error> {
        let mut changed = self.clone();
        let count = self.layers.len();
        for &layer in layers {
            let index = Error::Index { what: "layer", index: layer as i64, count: count as i64 };
            changed.layers.get_mut(layer).ok_or(index)?.variant = variant.clone();
        }
        changed.arch.clone().build(&changed, &mut Weights::hollow())?;
        *self = changed;
        Ok(())
    }

    /// The names of the classes, in the order of the logits; `LABEL_0`, ... where the config names none.
    pub fn classes(&self) -> Vec<String> {
        let Head::Classifier { n_classes } = self.head else { return Vec::new() };
        let named = self.raw.get("id2label").and_then(Value::as_object);
        (0..n_classes)
            .map(|class| {
                let name =
                    named.and_then(|named| named.get(&class.to_string())).and_then(Value::as_str);
                name.map_or_else(|| format!("LABEL_{class}"), str::to_owned)
            })
            .collect()
    }

    /// The token that pads, where one is named.
    pub fn pad_token_id(&self) -> Option<i64> {
        self.raw.get("pad_token_id").and_then(Value::as_i64)
    }

    /// Names the token that pads. transformers' decoder classifiers need one to find the last real token of a row.
    pub fn set_pad_token_id(&mut self, id: i64) {
        self.raw.insert("pad_token_id".into(), id.into());
    }

    /// A field of `config.json` as it was read.
    pub fn raw(&self, key: &str) -> Option<&Value> {
        self.raw.get(key)
    }

    /// Ends the model in a classifier of `classes`.
    pub fn set_classes(&mut self, classes: &[String]) {
        self.head = Head::Classifier { n_classes: classes.len() as i64 };
        let names = |(id, name): (usize, &String)| (id.to_string(), json!(name));
        let ids = |(id, name): (usize, &String)| (name.clone(), json!(id));
        self.raw.insert(
            "id2label".into(),
            Value::Object(classes.iter().enumerate().map(names).collect()),
        );
        self.raw.insert(
            "label2id".into(),
            Value::Object(classes.iter().enumerate().map(ids).collect()),
        );
        self.raw.insert("problem_type".into(), json!("single_label_classification"));
        self.raw.shift_remove("num_labels");
    }

    /// Ends the model in a language-model head, or in none.
    pub fn set_head(&mut self, head: Head) {
        match head {
            Head::Classifier { n_classes } => {
                let classes: Vec<String> =
                    (0..n_classes).map(|class| format!("LABEL_{class}")).collect();
                self.set_classes(&classes);
            }
            Head::Bare | Head::LanguageModel => self.head = head,
        }
    }

    /// The object to write as `config.json` for weights stored in `kind`. Fields that this crate does not know are
    /// those that were read.
    pub fn to_json(&self, kind: Kind) -> Map<String, Value> {
        let mut raw = self.raw.clone();
        let base = self.base_model_type();
        raw.insert("architectures".into(), json!([self.arch.class_name(self.head)]));
        let dtype = match kind {
            Kind::Half => "float16",
            Kind::BFloat16 => "bfloat16",
            Kind::Double => "float64",
            _ => "float32",
        };
        raw.shift_remove("torch_dtype"); // transformers 5 reads both, and `dtype` is its own word.
        raw.insert("dtype".into(), json!(dtype));
        if let Some([n_heads, n_kv_heads]) = self.plain_heads() {
            raw.insert("model_type".into(), json!(base));
            raw.shift_remove("attn");
            raw.shift_remove(HEAD_ORDER);
            let order: Vec<Vec<i64>> =
                self.layers.iter().map(|layer| ranks(&layer.kept_heads)).collect();
            if order.iter().any(|layer| !layer.is_sorted()) {
                raw.insert(HEAD_ORDER.into(), json!(order));
            }
            if let Some(fields) = self.arch.head_fields()
                && [n_heads, n_kv_heads] != [self.sizes.n_heads, self.sizes.n_kv_heads]
            {
                for (field, value) in
                    fields.into_iter().zip([n_heads, n_kv_heads, self.sizes.head_dim])
                {
                    raw.insert(field.into(), value.into());
                }
            }
        } else {
            raw.shift_remove(HEAD_ORDER);
            let section = AttnSection {
                format_version: FORMAT_VERSION,
                base_model_type: base.to_owned(),
                layers: self.layers.iter().map(write_layer).collect(),
            };
            raw.insert("model_type".into(), json!(format!("attn_{base}")));
            raw.insert(
                "attn".into(),
                serde_json::to_value(section).expect("names and numbers are JSON"),
            );
        }
        raw
    }
}

/// The place of each number among all: heads that are left are counted anew, as those of any ordinary folder.
fn ranks(numbers: &[i64]) -> Vec<i64> {
    let rank = |number: &i64| numbers.iter().filter(|other| *other < number).count() as i64;
    numbers.iter().map(rank).collect()
}

/// Reads the field `name`, absent and null being `None`.
pub(crate) fn field<T: DeserializeOwned>(
    raw: &Map<String, Value>,
    name: &str,
) -> Result<Option<T>, Error> {
    match raw.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => {
            T::deserialize(value).map(Some).map_err(|error| problem(name, &error.to_string()))
        }
    }
}

/// Refuses what no model has, before lists as long as it are made: everything else about a size is the memory it takes.
fn check_sizes(sizes: &Sizes) -> Result<(), Error> {
    let Sizes { hidden_size, n_layers, n_heads, vocab_size, .. } = *sizes;
    let most = [
        ("the number of layers", n_layers, 1 << 16),
        ("the number of heads", n_heads, 1 << 20),
        ("the hidden size", hidden_size, 1 << 24),
        ("vocab_size", vocab_size, 1 << 32),
    ];
    match most.into_iter().find(|(_, n, most)| n > most) {
        Some((field, n, most)) => Err(problem(field, &format!("is {n}, expected at most {most}"))),
        None => Ok(()),
    }
}

pub(crate) fn problem(field: &str, problem: &str) -> Error {
    Error::Config { field: field.to_owned(), problem: problem.to_owned() }
}

fn check_section(section: &AttnSection, base: &str) -> Result<(), Error> {
    if section.format_version != FORMAT_VERSION {
        return Err(problem(
            "attn.format_version",
            &format!(
                "is {}, expected {FORMAT_VERSION}\nhint: the folder was written by another version of this program",
                section.format_version
            ),
        ));
    }
    if section.base_model_type != base {
        return Err(problem(
            "attn.base_model_type",
            &format!("is `{}`, while `model_type` is `attn_{base}`", section.base_model_type),
        ));
    }
    Ok(())
}

fn read_head(raw: &Map<String, Value>, arch: &ArchConfig) -> Result<Head, Error> {
    let architectures: Vec<String> = field(raw, "architectures")?.unwrap_or_default();
    let n_classes = || -> Result<i64, Error> {
        let named: Option<Map<String, Value>> = field(raw, "id2label")?;
        let counted: Option<i64> = field(raw, "num_labels")?;
        Ok(counted.or(named.map(|named| named.len() as i64)).unwrap_or(2))
    };
    let Some(name) = architectures.first() else { return Ok(Head::Bare) };
    let heads = [Head::Bare, Head::LanguageModel, Head::Classifier { n_classes: n_classes()? }];
    heads.into_iter().find(|&head| arch.class_name(head) == name).ok_or_else(|| {
        let known = heads.map(|head| arch.class_name(head)).join(", ");
        problem("architectures", &format!("`{name}` is not supported, expected one of {known}"))
    })
}

/// Layers that plain transformers computes, with the numbers of their heads where these are in another order.
fn read_plain_layers(raw: &Map<String, Value>, sizes: &Sizes) -> Result<Vec<LayerSpec>, Error> {
    let plain = LayerSpec::plain(sizes.n_heads, sizes.n_kv_heads);
    let Some(order) = field::<Vec<Vec<i64>>>(raw, HEAD_ORDER)? else {
        return Ok(vec![plain; sizes.n_layers as usize]);
    };
    let is_order = |layer: &Vec<i64>| {
        let mut sorted = layer.clone();
        sorted.sort_unstable();
        sorted == plain.kept_heads
    };
    if order.len() as i64 != sizes.n_layers || !order.iter().all(is_order) {
        let expected = format!(
            "expected a list of the heads 0 to {}, each once, for each of {} layers",
            sizes.n_heads - 1,
            sizes.n_layers
        );
        return Err(problem(HEAD_ORDER, &expected));
    }
    Ok(order.into_iter().map(|kept_heads| LayerSpec { kept_heads, ..plain.clone() }).collect())
}

fn read_layers(section: AttnSection, sizes: &Sizes) -> Result<Vec<LayerSpec>, Error> {
    if section.layers.len() as i64 != sizes.n_layers {
        return Err(problem(
            "attn.layers",
            &format!(
                "describes {} layers, while the model has {}",
                section.layers.len(),
                sizes.n_layers
            ),
        ));
    }
    let read = |(index, layer): (usize, LayerSection)| {
        let at = |name: &str| format!("attn.layers[{index}].{name}");
        let mut tagged = layer.settings;
        tagged.insert("kind".into(), json!(layer.kind));
        let variant = Variant::deserialize(Value::Object(tagged))
            .map_err(|error| problem(&at("kind"), &format!("`{}`: {error}", layer.kind)))?;
        let (n_heads, n_kv) = (layer.n_heads, layer.n_kv_heads);
        if !(0..=sizes.n_heads).contains(&n_heads) {
            return Err(problem(
                &at("n_heads"),
                &format!("is {n_heads}, expected 0 to {}", sizes.n_heads),
            ));
        }
        let mut sorted = layer.kept_heads.clone();
        sorted.sort_unstable();
        let each_once = sorted.is_sorted_by(|a, b| a < b);
        let in_range = layer.kept_heads.iter().all(|head| (0..sizes.n_heads).contains(head));
        if layer.kept_heads.len() as i64 != n_heads || !each_once || !in_range {
            return Err(problem(
                &at("kept_heads"),
                &format!(
                    "is {:?}, expected {n_heads} heads below {}, each once",
                    layer.kept_heads, sizes.n_heads
                ),
            ));
        }
        let all_read = (0..n_kv).all(|kv| layer.kv_of_head.contains(&kv));
        let in_range = layer.kv_of_head.iter().all(|kv| (0..n_kv).contains(kv));
        if layer.kv_of_head.len() as i64 != n_heads || !all_read || !in_range {
            return Err(problem(
                &at("kv_of_head"),
                &format!(
                    "is {:?}, expected {n_heads} entries that name each of {n_kv} key/value heads",
                    layer.kv_of_head
                ),
            ));
        }
        Ok(LayerSpec {
            variant,
            n_heads,
            n_kv_heads: n_kv,
            kept_heads: layer.kept_heads,
            kv_of_head: layer.kv_of_head,
        })
    };
    section.layers.into_iter().enumerate().map(read).collect()
}

fn write_layer(layer: &LayerSpec) -> LayerSection {
    let tagged = serde_json::to_value(&layer.variant).expect("settings are JSON");
    let Value::Object(mut settings) = tagged else { unreachable!("a tagged enum is an object") };
    settings.shift_remove("kind");
    LayerSection {
        kind: layer.variant.name().to_owned(),
        settings,
        n_heads: layer.n_heads,
        n_kv_heads: layer.n_kv_heads,
        kept_heads: layer.kept_heads.clone(),
        kv_of_head: layer.kv_of_head.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_that_no_model_has_are_refused_before_anything_is_made() {
        let of = |key: &str, value: i64| {
            let mut raw = json!({
                "model_type": "gpt2", "vocab_size": 9, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8,
            });
            raw[key] = json!(value);
            let Value::Object(raw) = raw else { unreachable!("an object") };
            Config::from_json(raw).map_err(|error| error.to_string())
        };
        assert!(of("n_layer", 2).is_ok());
        for (key, value) in [
            ("n_layer", i64::MAX),
            ("n_embd", 1 << 60),
            ("vocab_size", 1 << 62),
            ("n_layer", 1 << 17),
        ] {
            let error = of(key, value).unwrap_err();
            assert!(error.contains(&format!("is {value}, expected at most")), "{error}");
        }
    }
}
