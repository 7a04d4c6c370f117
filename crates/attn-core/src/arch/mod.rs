//! Pretrained architectures, one file each.

use serde_json::{Map, Value};
use tch::{Device, Kind, Tensor};

use crate::{
    Error,
    config::{Config, Head, Sizes},
    layer::{AttnLayer, LayerPass},
    lora::Slot,
    mask::Mask,
    nn::{Layout, Visitor},
    rotary::Rotary,
    weights::Weights,
};

pub mod bert;
pub mod distilbert;
pub mod gpt2;
mod heads;
pub mod llama;
mod post_norm;

/// The tokens of a batch, all `[batch, seq_len]` and of 64-bit integers.
#[derive(Debug)]
pub struct Tokens<'a> {
    /// Token ids.
    pub ids: &'a Tensor,
    /// Positions.
    pub positions: &'a Tensor,
    /// Segment of each token (BERT), all 0 where absent.
    pub types: Option<&'a Tensor>,
}

/// Which positions a head reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reads {
    /// All of them.
    Everywhere,
    /// Each row's first real token.
    First,
    /// Each row's last real token. transformers takes the last one that is not the padding token, which is the same where
    /// padding is no text token.
    Last,
}

impl Reads {
    /// The places read, `[batch]`, in the flattened batch (row · seq_len + position); `None` for all. `mask`: of
    /// `[batch, seq_len]` tokens.
    pub(crate) fn places(self, mask: &Mask, size: [i64; 2], device: Device) -> Option<Tensor> {
        let [batch, seq_len] = size;
        let real = mask.keep().map(|keep| keep.to_kind(Kind::Int64));
        let ordinal = Tensor::arange(seq_len, (Kind::Int64, device));
        let position = match (self, real) {
            (Self::Everywhere, _) => return None,
            (Self::First, None) => ordinal.narrow(0, 0, 1),
            (Self::First, Some(real)) => real.argmax(1, false),
            (Self::Last, None) => ordinal.narrow(0, seq_len - 1, 1),
            (Self::Last, Some(real)) => (real * ordinal).argmax(1, false),
        };
        Some(Tensor::arange(batch, (Kind::Int64, device)) * seq_len + position)
    }
}

/// The last step of a language-model head: `logits = x Wᵀ + b`. Views of the model's own.
#[derive(Debug)]
pub struct Vocabulary {
    /// `[vocab_size, hidden_size]`.
    pub weight: Tensor,
    /// `[vocab_size]`.
    pub bias: Option<Tensor>,
}

/// A pretrained architecture: what surrounds its attention layers.
pub trait Architecture: std::fmt::Debug + Send {
    /// `[batch, seq_len] -> [batch, seq_len, hidden_size]`.
    fn embed(&self, tokens: &Tokens<'_>, train: bool) -> Tensor;

    /// One block: attention and feed-forward with their residuals and norms. `[batch, seq_len, hidden_size]`, or
    /// `[n, hidden_size]` where [`LayerPass::at`] names n places.
    ///
    /// # Errors
    /// As [`AttnLayer::forward`].
    fn block(&self, layer: usize, x: &Tensor, pass: &mut LayerPass<'_>) -> Result<Tensor, Error>;

    /// What stands between the last block and the head: the final norm, where there is one.
    fn finish(&self, x: &Tensor) -> Tensor {
        x.shallow_clone()
    }

    /// Which positions the head reads.
    fn reads(&self) -> Reads;

    /// The logits of hidden states that it reads: `[.., hidden_size] -> [.., vocab_size or n_classes]`; `hidden` itself
    /// where there is no head.
    fn head(&self, hidden: &Tensor, train: bool) -> Tensor;

    /// The last matrix of a language-model head; `None` of other heads.
    fn vocabulary(&self) -> Option<Vocabulary> {
        None
    }

    /// What that matrix multiplies: a language-model head but for its last step, `[.., hidden_size] -> [.., hidden_size]`.
    fn before_vocabulary(&self, hidden: &Tensor, _train: bool) -> Tensor {
        hidden.shallow_clone()
    }

    /// The parameter of the embedding that the head shares, where it does.
    fn tied(&self) -> Option<&str>;

    /// The rotation of queries and keys, where there is one.
    fn rotary(&self) -> Option<&Rotary> {
        None
    }

    /// Values of a token that a block keeps for its backward pass beside what goes into its matrices and comes out of them.
    fn kept_beside(&self) -> i64 {
        0
    }

    /// The attention layers.
    fn layers(&self) -> Vec<&AttnLayer>;

    /// One attention layer, to change it.
    fn layer_mut(&mut self, layer: usize) -> &mut AttnLayer;

    /// The matrices of every block, in order: what adapters can be put beside.
    fn linears_mut(&mut self) -> Vec<Slot<'_>>;

    /// Names the parameters; one that is shared (tied) is named once.
    fn visit(&self, f: &mut Visitor<'_>);
}

/// Lists the architectures. To add one: write `<name>.rs` beside this file, then name it here and in the `mod` lines.
macro_rules! architectures {
    ($($name:ident => $module:ident,)*) => {
        /// The architecture's own fields of `config.json`.
        #[derive(Debug, Clone)]
        pub(crate) enum ArchConfig {
            $($name(Box<$module::Config>),)*
        }

        impl ArchConfig {
            pub(crate) fn parse(model_type: &str, raw: &Map<String, Value>) -> Result<Self, Error> {
                $(if model_type == $module::MODEL_TYPE {
                    return Ok(Self::$name(Box::new($module::Config::parse(raw)?)));
                })*
                Err(Error::ModelType {
                    found: model_type.to_owned(),
                    expected: [$($module::MODEL_TYPE),*].join(", "),
                })
            }

            /// transformers' `model_type`.
            pub(crate) fn model_type(&self) -> &'static str {
                match self { $(Self::$name(_) => $module::MODEL_TYPE,)* }
            }

            /// transformers' class of the model with this head.
            pub(crate) fn class_name(&self, head: Head) -> &'static str {
                match self { $(Self::$name(_) => $module::class_name(head),)* }
            }

            /// Whether the architecture predicts the next token.
            pub(crate) fn is_causal(&self) -> bool {
                match self { $(Self::$name(_) => $module::CAUSAL,)* }
            }

            /// What the names of the base model's tensors begin with under a head.
            pub(crate) fn prefix(&self) -> &'static str {
                match self { $(Self::$name(_) => $module::PREFIX,)* }
            }

            /// What the names of heads' tensors begin with.
            pub(crate) fn head_prefixes(&self) -> &'static [&'static str] {
                match self { $(Self::$name(_) => $module::HEAD_PREFIXES,)* }
            }

            /// Whether a tensor is no parameter: a mask or table that old versions of transformers saved.
            pub(crate) fn is_buffer(&self, name: &str) -> bool {
                match self { $(Self::$name(_) => $module::is_buffer(name),)* }
            }

            /// The matrices that PEFT adapts where nothing is named.
            pub(crate) fn lora_targets(&self) -> &'static [&'static str] {
                match self { $(Self::$name(_) => $module::LORA_TARGETS,)* }
            }

            /// The fields that say what is dropped in training.
            pub(crate) fn dropouts(&self) -> &'static [&'static str] {
                match self { $(Self::$name(_) => $module::DROPOUTS,)* }
            }

            /// How the blocks' matrices are stored.
            pub(crate) fn layout(&self) -> Layout {
                match self { $(Self::$name(_) => $module::LAYOUT,)* }
            }

            /// The fields of `config.json` for query heads, key/value heads and channels of a head, where a model may have fewer
            /// heads than fill its hidden size.
            pub(crate) fn head_fields(&self) -> Option<[&'static str; 3]> {
                match self { $(Self::$name(_) => $module::HEAD_FIELDS,)* }
            }

            pub(crate) fn sizes(&self) -> Result<Sizes, Error> {
                match self { $(Self::$name(config) => config.sizes(),)* }
            }

            pub(crate) fn build(
                &self,
                config: &Config,
                weights: &mut Weights<'_>,
            ) -> Result<Box<dyn Architecture>, Error> {
                match self { $(Self::$name(arch) => arch.build(config, weights),)* }
            }
        }
    };
}

architectures! {
    Gpt2 => gpt2,
    DistilBert => distilbert,
    Bert => bert,
    Llama => llama,
}

// What transformers fills in where a `config.json` leaves a field out, as far as architectures agree.
fn yes() -> bool {
    true
}
fn tenth() -> f64 {
    0.1
}
fn initializer_range() -> f64 {
    0.02
}
fn gelu() -> String {
    "gelu".into()
}
fn encoder_positions() -> i64 {
    512
}

/// The base model's tensors carry its prefix under a head, and none without.
fn base_prefix(head: Head, prefix: &'static str) -> &'static str {
    if head == Head::Bare { "" } else { prefix }
}

/// Checks what divides the hidden size into heads.
fn head_dim(hidden_field: &str, hidden_size: i64, n_heads: i64) -> Result<i64, Error> {
    if n_heads < 1 || hidden_size < 1 || hidden_size % n_heads != 0 {
        let problem = format!("{hidden_size} does not divide into {n_heads} heads");
        return Err(Error::Config { field: hidden_field.to_owned(), problem });
    }
    Ok(hidden_size / n_heads)
}

/// Refuses a size that is not positive, and one that no product of two would be a number with.
fn positive(fields: &[(&str, i64)]) -> Result<(), Error> {
    const MOST: i64 = i32::MAX as i64;
    let refuse = |name: &str, problem| Err(Error::Config { field: name.to_owned(), problem });
    match fields.iter().find(|(_, value)| !(1..=MOST).contains(value)) {
        Some((name, value @ ..=0)) => refuse(name, format!("is {value}, expected at least 1")),
        Some((name, value)) => refuse(name, format!("is {value}, expected at most {MOST}")),
        None => Ok(()),
    }
}

/// Parses the fields that an architecture knows; the others are kept but not looked at.
fn parse_fields<T: serde::de::DeserializeOwned>(raw: &Map<String, Value>) -> Result<T, Error> {
    // Null means absent in published configs.
    let present: Map<String, Value> = raw
        .iter()
        .filter(|(_, value)| !value.is_null())
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    serde_path(&present)
}

fn serde_path<T: serde::de::DeserializeOwned>(present: &Map<String, Value>) -> Result<T, Error> {
    T::deserialize(Value::Object(present.clone())).map_err(|error| {
        // serde names missing fields but not mistyped ones: find the field by leaving one out at a time.
        let text = error.to_string();
        let culprit = present.keys().find(|key| {
            let mut without = present.clone();
            without.shift_remove(*key);
            match T::deserialize(Value::Object(without)) {
                Ok(_) => true,
                Err(other) => {
                    other.to_string() != text && other.to_string().contains("missing field")
                }
            }
        });
        let field = culprit.cloned().unwrap_or_else(|| "(object)".into());
        Error::Config { field, problem: text }
    })
}
