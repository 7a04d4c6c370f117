//! BERT: the encoder with segments and, under a classifier, a pooler.
//!
//! Devlin et al. 2018, "BERT: Pre-training of Deep Bidirectional Transformers", <https://arxiv.org/abs/1810.04805>.

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

pub(super) const MODEL_TYPE: &str = "bert";
pub(super) const CAUSAL: bool = false;
pub(super) const PREFIX: &str = "bert.";
/// The pooler serves the classifier alone; published checkpoints hold one, and the next-sentence head, beside the
/// masked-LM head.
pub(super) const HEAD_PREFIXES: &[&str] = &["cls.", "classifier.", "bert.pooler.", "pooler."];
pub(super) const LORA_TARGETS: &[&str] = &["query", "value"];
pub(super) const LAYOUT: Layout = Layout::OutIn;
pub(super) const DROPOUTS: &[&str] =
    &["hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"];

/// A layer's heads fill the hidden size.
pub(super) const HEAD_FIELDS: Option<[&str; 3]> = None;

pub(super) fn class_name(head: Head) -> &'static str {
    match head {
        Head::Bare => "BertModel",
        Head::LanguageModel => "BertForMaskedLM",
        Head::Classifier { .. } => "BertForSequenceClassification",
    }
}

/// What published checkpoints hold beside the model: the list of positions and, next to the masked-LM head, the pooler
/// and the next-sentence head of the same pretraining.
pub(super) fn is_buffer(name: &str) -> bool {
    name.ends_with("embeddings.position_ids")
        || name.starts_with("cls.seq_relationship.")
        || name.starts_with("bert.pooler.")
}

/// The fields of `config.json`.
#[derive(Debug, Clone, Deserialize)]
pub struct Config {
    vocab_size: i64,
    hidden_size: i64,
    num_hidden_layers: i64,
    num_attention_heads: i64,
    intermediate_size: i64,
    #[serde(default = "super::gelu")]
    hidden_act: String,
    #[serde(default = "super::tenth")]
    hidden_dropout_prob: f64,
    #[serde(default = "super::tenth")]
    attention_probs_dropout_prob: f64,
    classifier_dropout: Option<f64>,
    #[serde(default = "super::encoder_positions")]
    max_position_embeddings: i64,
    #[serde(default = "type_vocab_size")]
    type_vocab_size: i64,
    #[serde(default = "super::initializer_range")]
    initializer_range: f64,
    #[serde(default = "layer_norm_eps")]
    layer_norm_eps: f64,
    #[serde(default = "super::yes")]
    tie_word_embeddings: bool,
    #[serde(default)]
    is_decoder: bool,
    #[serde(default = "absolute")]
    position_embedding_type: String,
}

fn type_vocab_size() -> i64 {
    2
}
fn layer_norm_eps() -> f64 {
    1e-12
}
fn absolute() -> String {
    "absolute".into()
}

impl Config {
    pub(super) fn parse(raw: &Map<String, Value>) -> Result<Self, Error> {
        let config: Self = parse_fields(raw)?;
        if config.is_decoder {
            return Err(config::problem(
                "is_decoder",
                "is true, which is not supported, expected false",
            ));
        }
        if config.position_embedding_type != "absolute" {
            let problem = format!(
                "is `{}`, which is not supported, expected absolute",
                config.position_embedding_type
            );
            return Err(config::problem("position_embedding_type", &problem));
        }
        Ok(config)
    }

    pub(super) fn sizes(&self) -> Result<Sizes, Error> {
        positive(&[
            ("num_hidden_layers", self.num_hidden_layers),
            ("max_position_embeddings", self.max_position_embeddings),
            ("vocab_size", self.vocab_size),
            ("intermediate_size", self.intermediate_size),
            ("type_vocab_size", self.type_vocab_size),
        ])?;
        Ok(Sizes {
            hidden_size: self.hidden_size,
            n_layers: self.num_hidden_layers,
            n_heads: self.num_attention_heads,
            n_kv_heads: self.num_attention_heads,
            head_dim: head_dim("hidden_size", self.hidden_size, self.num_attention_heads)?,
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
        let p = base_prefix(config.head, PREFIX);
        let (hidden, eps, std) = (self.hidden_size, self.layer_norm_eps, self.initializer_range);
        let act = Activation::parse("hidden_act", &self.hidden_act)?;

        let mut table = |part: &str, rows| {
            Embedding::new(weights, format!("{p}embeddings.{part}"), [rows, hidden], std)
        };
        let tokens = table("word_embeddings", self.vocab_size)?;
        let positions = table("position_embeddings", self.max_position_embeddings)?;
        let types = table("token_type_embeddings", self.type_vocab_size)?;
        let norm = LayerNorm::new(weights, format!("{p}embeddings.LayerNorm"), hidden, eps)?;
        let drop = self.hidden_dropout_prob;
        let mut block = |(layer, spec): (usize, &config::LayerSpec)| {
            let name = |part: &str| format!("{p}encoder.layer.{layer}.{part}");
            let parts = Parts {
                qkv: ["query", "key", "value"].map(|part| name(&format!("attention.self.{part}"))),
                out: name("attention.output.dense"),
                kind: name("attention.self.kind"),
                attn_norm: name("attention.output.LayerNorm"),
                up: name("intermediate.dense"),
                down: name("output.dense"),
                norm: name("output.LayerNorm"),
                inner: self.intermediate_size,
                eps,
                act,
                dropout: [self.attention_probs_dropout_prob, drop, drop],
            };
            Block::new(weights, parts, spec, &config.sizes)
        };
        let blocks = config.layers.iter().enumerate().map(&mut block).collect::<Result<_, _>>()?;
        let mut linear = |name: String, n_out| {
            Linear::new(weights, name, [hidden, n_out], true, Layout::OutIn, std)
        };
        let head = match config.head {
            Head::Bare => BertHead::Bare { pooler: linear("pooler.dense".into(), hidden)? },
            Head::Classifier { n_classes } => BertHead::Classifier {
                pooler: linear(format!("{p}pooler.dense"), hidden)?,
                out: linear("classifier".into(), n_classes)?,
                dropout: self.classifier_dropout.unwrap_or(drop),
            },
            Head::LanguageModel => {
                // transformers keeps the bias under two names, one parameter unless the model is untied. It computes
                // with the decoder's.
                let [tied_bias, bias] = ["cls.predictions.bias", "cls.predictions.decoder.bias"];
                let tied = self.tie_word_embeddings;
                let parts = VocabParts {
                    transform: "cls.predictions.transform.dense",
                    norm: "cls.predictions.transform.LayerNorm",
                    weight: "cls.predictions.decoder.weight",
                    bias: if tied { tied_bias } else { bias },
                    tied,
                    act,
                    eps,
                    std,
                };
                let head = VocabHead::new(weights, parts, &tokens)?;
                if tied {
                    let _shared = weights.tied(bias, head.bias())?;
                } else {
                    weights.unread(tied_bias);
                }
                BertHead::Vocabulary(head)
            }
        };
        Ok(Box::new(Bert { tokens, positions, types, norm, dropout: drop, blocks, head }))
    }
}

#[derive(Debug)]
enum BertHead {
    /// The pooler is kept, as the checkpoint holds it, but the output is the hidden states.
    Bare {
        pooler: Linear,
    },
    Classifier {
        pooler: Linear,
        out: Linear,
        dropout: f64,
    },
    Vocabulary(VocabHead),
}

#[derive(Debug)]
struct Bert {
    tokens: Embedding,
    positions: Embedding,
    types: Embedding,
    norm: LayerNorm,
    dropout: f64,
    blocks: Vec<Block>,
    head: BertHead,
}

impl Architecture for Bert {
    fn embed(&self, tokens: &Tokens<'_>, train: bool) -> Tensor {
        let types = match tokens.types {
            Some(types) => self.types.forward(types),
            None => self.types.weight.get(0),
        };
        let sum =
            self.tokens.forward(tokens.ids) + types + self.positions.forward(tokens.positions);
        self.norm.forward(&sum).dropout(self.dropout, train)
    }

    fn block(&self, layer: usize, x: &Tensor, pass: &mut LayerPass<'_>) -> Result<Tensor, Error> {
        self.blocks[layer].forward(x, pass)
    }

    fn tied(&self) -> Option<&str> {
        matches!(&self.head, BertHead::Vocabulary(head) if head.is_tied())
            .then(|| self.tokens.name())
    }

    fn reads(&self) -> Reads {
        match &self.head {
            BertHead::Classifier { .. } => Reads::First,
            BertHead::Bare { .. } | BertHead::Vocabulary(_) => Reads::Everywhere,
        }
    }

    fn head(&self, hidden: &Tensor, train: bool) -> Tensor {
        match &self.head {
            BertHead::Bare { .. } => hidden.shallow_clone(),
            BertHead::Classifier { pooler, out, dropout } => {
                let pooled = pooler.forward(hidden, train).tanh();
                out.forward(&pooled.dropout(*dropout, train), train)
            }
            BertHead::Vocabulary(head) => head.forward(hidden, train),
        }
    }

    fn vocabulary(&self) -> Option<Vocabulary> {
        match &self.head {
            BertHead::Vocabulary(head) => Some(head.vocabulary()),
            _ => None,
        }
    }

    fn before_vocabulary(&self, hidden: &Tensor, train: bool) -> Tensor {
        match &self.head {
            BertHead::Vocabulary(head) => head.before_vocabulary(hidden, train),
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
        [&self.tokens, &self.positions, &self.types].iter().for_each(|table| table.visit(f));
        self.norm.visit(f);
        self.blocks.iter().for_each(|block| block.visit(f));
        match &self.head {
            BertHead::Bare { pooler } => pooler.visit(f),
            BertHead::Classifier { pooler, out, .. } => {
                pooler.visit(f);
                out.visit(f);
            }
            BertHead::Vocabulary(head) => head.visit(f),
        }
    }
}
