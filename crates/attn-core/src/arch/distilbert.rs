//! DistilBERT: an encoder of half of BERT's layers, without segments.
//!
//! Sanh et al. 2019, "DistilBERT, a distilled version of BERT", <https://arxiv.org/abs/1910.01108>.

use serde::Deserialize;
use serde_json::{Map, Value};
use tch::Tensor;

use super::{
    Architecture, Reads, Tokens, Vocabulary, base_prefix, head_dim,
    heads::{VocabHead, VocabParts},
    parse_fields, positive,
    post_norm::{Block, Parts},
};
use crate::{
    Error,
    config::{self, Head, Sizes},
    layer::{AttnLayer, LayerPass},
    lora::Slot,
    nn::{Activation, Embedding, LayerNorm, Layout, Linear, Visitor},
    weights::Weights,
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
pub(super) const DROPOUTS: &[&str] = &["dropout", "attention_dropout", "seq_classif_dropout"];

/// A layer's heads fill the hidden size.
pub(super) const HEAD_FIELDS: Option<[&str; 3]> = None;

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
    #[serde(default = "super::encoder_positions")]
    max_position_embeddings: i64,
    n_layers: i64,
    n_heads: i64,
    dim: i64,
    hidden_dim: i64,
    #[serde(default = "super::tenth")]
    dropout: f64,
    #[serde(default = "super::tenth")]
    attention_dropout: f64,
    #[serde(default = "super::gelu")]
    activation: String,
    #[serde(default = "super::initializer_range")]
    initializer_range: f64,
    #[serde(default = "fifth")]
    seq_classif_dropout: f64,
    #[serde(default = "super::yes")]
    tie_word_embeddings: bool,
}

fn fifth() -> f64 {
    0.2
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
            Head::LanguageModel => {
                let parts = VocabParts {
                    transform: "vocab_transform",
                    norm: "vocab_layer_norm",
                    weight: "vocab_projector.weight",
                    bias: "vocab_projector.bias",
                    tied: self.tie_word_embeddings,
                    act,
                    eps: EPS,
                    std,
                };
                EncoderHead::Vocabulary(VocabHead::new(weights, parts, &tokens)?)
            }
        };
        Ok(Box::new(DistilBert { tokens, positions, norm, dropout: self.dropout, blocks, head }))
    }
}

#[derive(Debug)]
enum EncoderHead {
    Bare,
    Classifier { pre: Linear, out: Linear, dropout: f64 },
    Vocabulary(VocabHead),
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

    fn tied(&self) -> Option<&str> {
        matches!(&self.head, EncoderHead::Vocabulary(head) if head.is_tied())
            .then(|| self.tokens.name())
    }

    fn reads(&self) -> Reads {
        match &self.head {
            EncoderHead::Classifier { .. } => Reads::First,
            EncoderHead::Bare | EncoderHead::Vocabulary(_) => Reads::Everywhere,
        }
    }

    fn head(&self, hidden: &Tensor, train: bool) -> Tensor {
        match &self.head {
            EncoderHead::Bare => hidden.shallow_clone(),
            EncoderHead::Classifier { pre, out, dropout } => {
                let pooled = pre.forward(hidden, train).relu();
                out.forward(&pooled.dropout(*dropout, train), train)
            }
            EncoderHead::Vocabulary(head) => head.forward(hidden, train),
        }
    }

    fn vocabulary(&self) -> Option<Vocabulary> {
        match &self.head {
            EncoderHead::Vocabulary(head) => Some(head.vocabulary()),
            _ => None,
        }
    }

    fn before_vocabulary(&self, hidden: &Tensor, train: bool) -> Tensor {
        match &self.head {
            EncoderHead::Vocabulary(head) => head.before_vocabulary(hidden, train),
            _ => hidden.shallow_clone(),
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
            EncoderHead::Vocabulary(head) => head.visit(f),
        }
    }
}
