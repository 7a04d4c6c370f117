//! DistilBERT: an encoder of half of BERT's layers, without segments.
//!
//! Sanh et al. 2019, "DistilBERT, a distilled version of BERT", <https://arxiv.org/abs/1910.01108>.

use serde::Deserialize;
use serde_json::{Map, Value};
use tch::Tensor;

use super::{
    Architecture, Tokens, base_prefix, head_dim,
    heads::first_token,
    parse_fields, positive,
    post_norm::{Block, Parts},
};
use crate::{
    Error,
    config::{self, Head, Sizes},
    layer::{AttnLayer, LayerPass},
    lora::Slot,
    mask::Mask,
    nn::{Activation, Embedding, LayerNorm, Layout, Linear, Visitor},
    weights::{Init, Weights},
};

pub(super) const MODEL_TYPE: &str = "distilbert";
pub(super) const CAUSAL: bool = false;
pub(super) const PREFIX: &str = "distilbert.";
pub(super) const HEAD_PREFIXES: &[&str] = &[
    "vocab_transform.",
    "vocab_layer_norm.",
    "vocab_projector.",
    "pre_classifier.",
    "classifier.",
];
pub(super) const LORA_TARGETS: &[&str] = &["q_lin", "v_lin"];
pub(super) const LAYOUT: Layout = Layout::OutIn;

pub(super) fn class_name(head: Head) -> &'static str {
    match head {
        Head::Bare => "DistilBertModel",
        Head::LanguageModel => "DistilBertForMaskedLM",
        Head::Classifier { .. } => "DistilBertForSequenceClassification",
    }
}

/// The list of positions, which early checkpoints hold.
pub(super) fn is_buffer(name: &str) -> bool {
    name.ends_with("embeddings.position_ids")
}

/// The fields of `config.json`.
#[derive(Debug, Clone, Deserialize)]
pub struct Config {
    vocab_size: i64,
    #[serde(default = "max_positions")]
    max_position_embeddings: i64,
    n_layers: i64,
    n_heads: i64,
    dim: i64,
    hidden_dim: i64,
    #[serde(default = "tenth")]
    dropout: f64,
    #[serde(default = "tenth")]
    attention_dropout: f64,
    #[serde(default = "gelu")]
    activation: String,
    #[serde(default = "initializer_range")]
    initializer_range: f64,
    #[serde(default = "fifth")]
    seq_classif_dropout: f64,
    #[serde(default = "yes")]
    tie_word_embeddings: bool,
}

fn max_positions() -> i64 {
    512
}
fn tenth() -> f64 {
    0.1
}
fn fifth() -> f64 {
    0.2
}
fn gelu() -> String {
    "gelu".into()
}
fn initializer_range() -> f64 {
    0.02
}
fn yes() -> bool {
    true
}

impl Config {
    pub(super) fn parse(raw: &Map<String, Value>) -> Result<Self, Error> {
        parse_fields(raw)
    }

    pub(super) fn sizes(&self) -> Result<Sizes, Error> {
        positive(&[
            ("n_layers", self.n_layers),
            ("max_position_embeddings", self.max_position_embeddings),
            ("vocab_size", self.vocab_size),
            ("hidden_dim", self.hidden_dim),
        ])?;
        Ok(Sizes {
            hidden_size: self.dim,
            n_layers: self.n_layers,
            n_heads: self.n_heads,
            n_kv_heads: self.n_heads,
            head_dim: head_dim("dim", self.dim, self.n_heads)?,
            vocab_size: self.vocab_size,
            position_table: Some(self.max_position_embeddings),
            max_positions: self.max_position_embeddings,
            initializer_range: self.initializer_range,
        })
    }

    pub(super) fn build(
        &self,
        config: &config::Config,
        weights: &mut Weights<'_>,
    ) -> Result<Box<dyn Architecture>, Error> {
        const EPS: f64 = 1e-12; // Fixed in the published code, not a field of the config.
        let p = base_prefix(config.head, PREFIX);
        let (dim, std) = (self.dim, self.initializer_range);
        let act = Activation::parse("activation", &self.activation)?;

        let embed = |part: &str| format!("{p}embeddings.{part}");
        let tokens =
            Embedding::new(weights, embed("word_embeddings"), [self.vocab_size, dim], std)?;
        let table = [self.max_position_embeddings, dim];
        let positions = Embedding::new(weights, embed("position_embeddings"), table, std)?;
        let norm = LayerNorm::new(weights, embed("LayerNorm"), dim, EPS)?;
        let mut block = |(layer, spec): (usize, &config::LayerSpec)| {
            let name = |part: &str| format!("{p}transformer.layer.{layer}.{part}");
            let parts = Parts {
                qkv: ["q_lin", "k_lin", "v_lin"].map(|part| name(&format!("attention.{part}"))),
                out: name("attention.out_lin"),
                kind: name("attention.kind"),
                attn_norm: name("sa_layer_norm"),
                up: name("ffn.lin1"),
                down: name("ffn.lin2"),
                norm: name("output_layer_norm"),
                inner: self.hidden_dim,
                eps: EPS,
                act,
                dropout: [self.attention_dropout, 0.0, self.dropout],
            };
            Block::new(weights, parts, spec, &config.sizes)
        };
        let blocks = config.layers.iter().enumerate().map(&mut block).collect::<Result<_, _>>()?;
        let mut linear =
            |name: &str, n_out| Linear::new(weights, name, [dim, n_out], true, Layout::OutIn, std);
        let head = match config.head {
            Head::Bare => EncoderHead::Bare,
            Head::Classifier { n_classes } => EncoderHead::Classifier {
                pre: linear("pre_classifier", dim)?,
                out: linear("classifier", n_classes)?,
                dropout: self.seq_classif_dropout,
            },
            Head::LanguageModel => EncoderHead::Vocabulary {
                transform: linear("vocab_transform", dim)?,
                act,
                norm: LayerNorm::new(weights, "vocab_layer_norm", dim, EPS)?,
                projector: VocabProjector::new(
                    weights,
                    ["vocab_projector.weight", "vocab_projector.bias"],
                    self.tie_word_embeddings,
                    &tokens,
                    std,
                )?,
            },
        };
        Ok(Box::new(DistilBert { tokens, positions, norm, dropout: self.dropout, blocks, head }))
    }
}

/// From hidden states to the vocabulary, the matrix usually the token embedding's.
#[derive(Debug)]
pub(super) struct VocabProjector {
    names: [&'static str; 2],
    weight: Tensor,
    bias: Tensor,
    tied: bool,
}

impl VocabProjector {
    pub(super) fn new(
        weights: &mut Weights<'_>,
        names: [&'static str; 2],
        tied: bool,
        tokens: &Embedding,
        std: f64,
    ) -> Result<Self, Error> {
        let size = tokens.weight.size();
        let weight = if tied {
            weights.tied(names[0], &tokens.weight)?
        } else {
            weights.get(names[0], &size, Init::Normal(std))?
        };
        let bias = weights.get(names[1], &size[..1], Init::Zeros)?;
        Ok(Self { names, weight, bias, tied })
    }

    pub(super) fn forward(&self, x: &Tensor) -> Tensor {
        x.linear(&self.weight, Some(&self.bias))
    }

    /// `[vocab_size]`.
    pub(super) fn bias(&self) -> &Tensor {
        &self.bias
    }

    pub(super) fn visit(&self, f: &mut Visitor<'_>) {
        if !self.tied {
            f(self.names[0], &self.weight);
        }
        f(self.names[1], &self.bias);
    }
}

#[derive(Debug)]
enum EncoderHead {
    Bare,
    Classifier { pre: Linear, out: Linear, dropout: f64 },
    Vocabulary { transform: Linear, act: Activation, norm: LayerNorm, projector: VocabProjector },
}

#[derive(Debug)]
struct DistilBert {
    tokens: Embedding,
    positions: Embedding,
    norm: LayerNorm,
    dropout: f64,
    blocks: Vec<Block>,
    head: EncoderHead,
}

impl Architecture for DistilBert {
    fn embed(&self, tokens: &Tokens<'_>, train: bool) -> Tensor {
        let sum = self.tokens.forward(tokens.ids) + self.positions.forward(tokens.positions);
        self.norm.forward(&sum).dropout(self.dropout, train)
    }

    fn block(&self, layer: usize, x: &Tensor, pass: &mut LayerPass<'_>) -> Result<Tensor, Error> {
        self.blocks[layer].forward(x, pass)
    }

    fn head(&self, hidden: &Tensor, mask: &Mask, train: bool) -> Tensor {
        match &self.head {
            EncoderHead::Bare => hidden.shallow_clone(),
            EncoderHead::Classifier { pre, out, dropout } => {
                let pooled = pre.forward(&first_token(hidden, mask), train).relu();
                out.forward(&pooled.dropout(*dropout, train), train)
            }
            EncoderHead::Vocabulary { transform, act, norm, projector } => {
                projector.forward(&norm.forward(&act.forward(&transform.forward(hidden, train))))
            }
        }
    }

    fn layers(&self) -> Vec<&AttnLayer> {
        self.blocks.iter().map(|block| &block.attn).collect()
    }

    fn layer_mut(&mut self, layer: usize) -> &mut AttnLayer {
        &mut self.blocks[layer].attn
    }

    fn linears_mut(&mut self) -> Vec<Slot<'_>> {
        self.blocks.iter_mut().flat_map(Block::linears_mut).collect()
    }

    fn visit(&self, f: &mut Visitor<'_>) {
        self.tokens.visit(f);
        self.positions.visit(f);
        self.norm.visit(f);
        self.blocks.iter().for_each(|block| block.visit(f));
        match &self.head {
            EncoderHead::Bare => {}
            EncoderHead::Classifier { pre, out, .. } => {
                pre.visit(f);
                out.visit(f);
            }
            EncoderHead::Vocabulary { transform, norm, projector, .. } => {
                transform.visit(f);
                norm.visit(f);
                projector.visit(f);
            }
        }
    }
}
