//! GPT-2: a decoder with learned positions, norms before each sublayer, and q, k, v in one matrix.
//!
//! Radford et al. 2019, "Language Models are Unsupervised Multitask Learners",
//! <https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf>.

use serde::Deserialize;
use serde_json::{Map, Value};
use tch::Tensor;

use super::{
    Architecture, Reads, Tokens, Vocabulary, base_prefix, head_dim, heads::DecoderHead,
    parse_fields, positive,
};
use crate::{
    Error,
    attention::Dims,
    config::{self, Head, Sizes},
    layer::{AttnLayer, LayerPass, Naming},
    lora::Slot,
    nn::{Activation, Embedding, LayerNorm, Layout, Linear, Visitor},
    weights::Weights,
};

pub(super) const MODEL_TYPE: &str = "gpt2";
pub(super) const CAUSAL: bool = true;
pub(super) const PREFIX: &str = "transformer.";
pub(super) const HEAD_PREFIXES: &[&str] = &["lm_head.", "score."];
pub(super) const LORA_TARGETS: &[&str] = &["c_attn"];
pub(super) const LAYOUT: Layout = Layout::InOut;
pub(super) const DROPOUTS: &[&str] = &["resid_pdrop", "embd_pdrop", "attn_pdrop"];

/// A layer's heads fill the hidden size.
pub(super) const HEAD_FIELDS: Option<[&str; 3]> = None;

pub(super) fn class_name(head: Head) -> &'static str {
    match head {
        Head::Bare => "GPT2Model",
        Head::LanguageModel => "GPT2LMHeadModel",
        Head::Classifier { .. } => "GPT2ForSequenceClassification",
    }
}

/// The causal triangle and its value, which early checkpoints hold a layer.
pub(super) fn is_buffer(name: &str) -> bool {
    name.ends_with(".attn.bias") || name.ends_with(".attn.masked_bias")
}

/// The fields of `config.json`.
#[derive(Debug, Clone, Deserialize)]
pub struct Config {
    vocab_size: i64,
    n_positions: i64,
    n_embd: i64,
    n_layer: i64,
    n_head: i64,
    n_inner: Option<i64>,
    #[serde(default = "gelu_new")]
    activation_function: String,
    #[serde(default = "super::tenth")]
    resid_pdrop: f64,
    #[serde(default = "super::tenth")]
    embd_pdrop: f64,
    #[serde(default = "super::tenth")]
    attn_pdrop: f64,
    #[serde(default = "layer_norm_epsilon")]
    layer_norm_epsilon: f64,
    #[serde(default = "super::initializer_range")]
    initializer_range: f64,
    #[serde(default = "super::yes")]
    scale_attn_weights: bool,
    #[serde(default)]
    scale_attn_by_inverse_layer_idx: bool,
    #[serde(default)]
    add_cross_attention: bool,
    #[serde(default = "super::yes")]
    tie_word_embeddings: bool,
}

fn gelu_new() -> String {
    "gelu_new".into()
}
fn layer_norm_epsilon() -> f64 {
    1e-5
}

impl Config {
    pub(super) fn parse(raw: &Map<String, Value>) -> Result<Self, Error> {
        let config: Self = parse_fields(raw)?;
        if config.add_cross_attention {
            return Err(config::problem(
                "add_cross_attention",
                "is true, which is not supported, expected false",
            ));
        }
        Ok(config)
    }

    pub(super) fn sizes(&self) -> Result<Sizes, Error> {
        positive(&[
            ("n_layer", self.n_layer),
            ("n_positions", self.n_positions),
            ("vocab_size", self.vocab_size),
            ("n_inner", self.n_inner.unwrap_or(1)),
        ])?;
        Ok(Sizes {
            hidden_size: self.n_embd,
            n_layers: self.n_layer,
            n_heads: self.n_head,
            n_kv_heads: self.n_head,
            head_dim: head_dim("n_embd", self.n_embd, self.n_head)?,
            vocab_size: self.vocab_size,
            position_table: Some(self.n_positions),
            max_positions: self.n_positions,
            initializer_range: self.initializer_range,
        })
    }

    pub(super) fn build(
        &self,
        config: &config::Config,
        weights: &mut Weights<'_>,
    ) -> Result<Box<dyn Architecture>, Error> {
        let p = base_prefix(config.head, PREFIX);
        let (hidden, eps, std) = (self.n_embd, self.layer_norm_epsilon, self.initializer_range);
        // Projections into the residual stream start smaller, the deeper the model (section 2.3 of the paper).
        let residual_std = std / (2.0 * self.n_layer as f64).sqrt();
        let inner = self.n_inner.unwrap_or(4 * hidden);
        let act = Activation::parse("activation_function", &self.activation_function)?;

        let tokens = Embedding::new(weights, format!("{p}wte"), [self.vocab_size, hidden], std)?;
        let positions =
            Embedding::new(weights, format!("{p}wpe"), [self.n_positions, hidden], std)?;
        let mut block = |(layer, spec): (usize, &config::LayerSpec)| -> Result<Block, Error> {
            let name = |part: &str| format!("{p}h.{layer}.{part}");
            let mut scale = if self.scale_attn_weights {
                (config.sizes.head_dim as f64).powf(-0.5)
            } else {
                1.0
            };
            if self.scale_attn_by_inverse_layer_idx {
                scale /= layer as f64 + 1.0;
            }
            let dims = Dims {
                hidden_size: hidden,
                n_heads: spec.n_heads,
                n_kv_heads: spec.n_kv_heads,
                head_dim: config.sizes.head_dim,
                kv_of_head: spec.kv_of_head.clone(),
                scale,
                causal: CAUSAL,
                rotary: false,
                max_len: Some(config.sizes.max_positions),
            };
            let naming = Naming {
                qkv: &[name("attn.c_attn")],
                qkv_bias: true,
                out: name("attn.c_proj"),
                out_bias: true,
                layout: Layout::InOut,
                std: [std, residual_std],
                kind: name("attn.kind"),
            };
            let up = [hidden, inner];
            let down = [inner, hidden];
            Ok(Block {
                ln_1: LayerNorm::new(weights, name("ln_1"), hidden, eps)?,
                attn: AttnLayer::new(weights, naming, spec, dims, self.attn_pdrop)?,
                ln_2: LayerNorm::new(weights, name("ln_2"), hidden, eps)?,
                up: Linear::new(weights, name("mlp.c_fc"), up, true, Layout::InOut, std)?,
                down: Linear::new(
                    weights,
                    name("mlp.c_proj"),
                    down,
                    true,
                    Layout::InOut,
                    residual_std,
                )?,
                act,
                dropout: self.resid_pdrop,
            })
        };
        let blocks = config.layers.iter().enumerate().map(&mut block).collect::<Result<_, _>>()?;
        let norm = LayerNorm::new(weights, format!("{p}ln_f"), hidden, eps)?;
        let head = DecoderHead::new(weights, config.head, self.tie_word_embeddings, &tokens, std)?;
        Ok(Box::new(Gpt2 { tokens, positions, dropout: self.embd_pdrop, blocks, norm, head }))
    }
}

#[derive(Debug)]
struct Gpt2 {
    tokens: Embedding,
    positions: Embedding,
    dropout: f64,
    blocks: Vec<Block>,
    norm: LayerNorm,
    head: DecoderHead,
}

#[derive(Debug)]
struct Block {
    ln_1: LayerNorm,
    attn: AttnLayer,
    ln_2: LayerNorm,
    up: Linear,
    down: Linear,
    act: Activation,
    dropout: f64,
}

impl Architecture for Gpt2 {
    fn embed(&self, tokens: &Tokens<'_>, train: bool) -> Tensor {
        (self.tokens.forward(tokens.ids) + self.positions.forward(tokens.positions))
            .dropout(self.dropout, train)
    }

    fn block(&self, layer: usize, x: &Tensor, pass: &mut LayerPass<'_>) -> Result<Tensor, Error> {
        let block = &self.blocks[layer];
        let attended = block.attn.forward(&block.ln_1.forward(x), pass)?;
        let x = pass.wanted(x) + attended.dropout(block.dropout, pass.train);
        let inner = block.act.forward(&block.up.forward(&block.ln_2.forward(&x), pass.train));
        let fed = block.down.forward(&inner, pass.train);
        Ok(x + fed.dropout(block.dropout, pass.train))
    }

    fn finish(&self, x: &Tensor) -> Tensor {
        self.norm.forward(x)
    }

    fn tied(&self) -> Option<&str> {
        matches!(self.head, DecoderHead::Tied(_)).then(|| self.tokens.name())
    }

    fn reads(&self) -> Reads {
        self.head.reads()
    }

    fn head(&self, hidden: &Tensor, train: bool) -> Tensor {
        self.head.forward(hidden, train)
    }

    fn vocabulary(&self) -> Option<Vocabulary> {
        self.head.vocabulary()
    }

    fn layers(&self) -> Vec<&AttnLayer> {
        self.blocks.iter().map(|block| &block.attn).collect()
    }

    fn layer_mut(&mut self, layer: usize) -> &mut AttnLayer {
        &mut self.blocks[layer].attn
    }

    fn linears_mut(&mut self) -> Vec<Slot<'_>> {
        let mut slots = Vec::new();
        for Block { attn, up, down, .. } in &mut self.blocks {
            slots.extend(attn.linears_mut());
            slots.extend([up, down].map(Slot::from));
        }
        slots
    }

    fn visit(&self, f: &mut Visitor<'_>) {
        self.tokens.visit(f);
        self.positions.visit(f);
        for block in &self.blocks {
            block.ln_1.visit(f);
            block.attn.visit(f);
            block.ln_2.visit(f);
            block.up.visit(f);
            block.down.visit(f);
        }
        self.norm.visit(f);
        self.head.visit(f);
    }
}
