//! Llama: a decoder with rotary positions, root-mean-square norms, grouped queries and a gated feed-forward.
//!
//! Touvron et al. 2023, <https://arxiv.org/abs/2302.13971>; Llama Team 2024, <https://arxiv.org/abs/2407.21783>.

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
    nn::{Activation, Embedding, Layout, Linear, RmsNorm, Visitor},
    rotary::{RopeConfig, Rotary},
    weights::Weights,
};

pub(super) const MODEL_TYPE: &str = "llama";
pub(super) const CAUSAL: bool = true;
pub(super) const PREFIX: &str = "model.";
pub(super) const HEAD_PREFIXES: &[&str] = &["lm_head.", "score."];
pub(super) const LORA_TARGETS: &[&str] = &["q_proj", "v_proj"];
pub(super) const LAYOUT: Layout = Layout::OutIn;
pub(super) const DROPOUTS: &[&str] = &["attention_dropout"];

/// The fields that say how many query and key/value heads a layer has, and how wide they are, where any number of them may be
/// said.
pub(super) const HEAD_FIELDS: Option<[&str; 3]> =
    Some(["num_attention_heads", "num_key_value_heads", "head_dim"]);

pub(super) fn class_name(head: Head) -> &'static str {
    match head {
        Head::Bare => "LlamaModel",
        Head::LanguageModel => "LlamaForCausalLM",
        Head::Classifier { .. } => "LlamaForSequenceClassification",
    }
}

/// The rotary frequencies, which early checkpoints hold.
pub(super) fn is_buffer(name: &str) -> bool {
    name.ends_with(".rotary_emb.inv_freq")
}

/// The fields of `config.json`.
#[derive(Debug, Clone, Deserialize)]
pub struct Config {
    vocab_size: i64,
    hidden_size: i64,
    intermediate_size: i64,
    num_hidden_layers: i64,
    num_attention_heads: i64,
    num_key_value_heads: Option<i64>,
    head_dim: Option<i64>,
    #[serde(default = "silu")]
    hidden_act: String,
    #[serde(default = "max_positions")]
    max_position_embeddings: i64,
    #[serde(default = "super::initializer_range")]
    initializer_range: f64,
    #[serde(default = "rms_norm_eps")]
    rms_norm_eps: f64,
    #[serde(default)]
    tie_word_embeddings: bool,
    rope_theta: Option<f64>,
    rope_scaling: Option<RopeConfig>,
    rope_parameters: Option<RopeConfig>,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    attention_dropout: f64,
    #[serde(default)]
    mlp_bias: bool,
}

fn silu() -> String {
    "silu".into()
}
fn max_positions() -> i64 {
    2048
}
fn rms_norm_eps() -> f64 {
    1e-6
}

impl Config {
    pub(super) fn parse(raw: &Map<String, Value>) -> Result<Self, Error> {
        parse_fields(raw)
    }

    fn n_kv_heads(&self) -> i64 {
        self.num_key_value_heads.unwrap_or(self.num_attention_heads)
    }

    pub(super) fn sizes(&self) -> Result<Sizes, Error> {
        positive(&[
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.n_kv_heads()),
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
        ])?;
        if self.num_attention_heads % self.n_kv_heads() != 0 {
            let problem = format!(
                "{} does not divide {} query heads",
                self.n_kv_heads(),
                self.num_attention_heads
            );
            return Err(config::problem("num_key_value_heads", &problem));
        }
        let head_dim = match self.head_dim {
            Some(head_dim) => head_dim,
            None => head_dim("hidden_size", self.hidden_size, self.num_attention_heads)?,
        };
        if head_dim < 2 || head_dim % 2 != 0 {
            return Err(config::problem(
                "head_dim",
                &format!("is {head_dim}, expected an even number for rotations"),
            ));
        }
        Ok(Sizes {
            hidden_size: self.hidden_size,
            n_layers: self.num_hidden_layers,
            n_heads: self.num_attention_heads,
            n_kv_heads: self.n_kv_heads(),
            head_dim,
            vocab_size: self.vocab_size,
            position_table: None,
            max_positions: self.max_position_embeddings,
            initializer_range: self.initializer_range,
        })
    }

    fn rotary(&self, head_dim: i64) -> Result<Rotary, Error> {
        // transformers 5 keeps theta with the scaling, earlier versions beside it.
        let (field, rope) = match (&self.rope_parameters, &self.rope_scaling) {
            (Some(rope), _) => ("rope_parameters", rope),
            (None, Some(rope)) => ("rope_scaling", rope),
            (None, None) => ("rope_scaling", &RopeConfig::default()),
        };
        let theta = rope.rope_theta.or(self.rope_theta).unwrap_or(10_000.0);
        Ok(Rotary::new(head_dim, theta, &rope.scaling(field)?))
    }

    pub(super) fn build(
        &self,
        config: &config::Config,
        weights: &mut Weights<'_>,
    ) -> Result<Box<dyn Architecture>, Error> {
        let p = base_prefix(config.head, PREFIX);
        let (hidden, inner, std) =
            (self.hidden_size, self.intermediate_size, self.initializer_range);
        let head_dim = config.sizes.head_dim;
        let act = Activation::parse("hidden_act", &self.hidden_act)?;

        let tokens =
            Embedding::new(weights, format!("{p}embed_tokens"), [self.vocab_size, hidden], std)?;
        let mut block = |(layer, spec): (usize, &config::LayerSpec)| -> Result<Block, Error> {
            let name = |part: &str| format!("{p}layers.{layer}.{part}");
            let dims = Dims {
                hidden_size: hidden,
                n_heads: spec.n_heads,
                n_kv_heads: spec.n_kv_heads,
                head_dim,
                kv_of_head: spec.kv_of_head.clone(),
                scale: (head_dim as f64).powf(-0.5),
                causal: CAUSAL,
                rotary: true,
                max_len: Some(config.sizes.max_positions),
            };
            let naming = Naming {
                qkv: &["q_proj", "k_proj", "v_proj"].map(|part| name(&format!("self_attn.{part}"))),
                qkv_bias: self.attention_bias,
                out: name("self_attn.o_proj"),
                out_bias: self.attention_bias,
                layout: Layout::OutIn,
                std: [std, std],
                kind: name("self_attn.kind"),
            };
            let mut mlp = |part: &str, widths| {
                Linear::new(
                    weights,
                    name(&format!("mlp.{part}")),
                    widths,
                    self.mlp_bias,
                    Layout::OutIn,
                    std,
                )
            };
            Ok(Block {
                gate: mlp("gate_proj", [hidden, inner])?,
                up: mlp("up_proj", [hidden, inner])?,
                down: mlp("down_proj", [inner, hidden])?,
                attn: AttnLayer::new(weights, naming, spec, dims, self.attention_dropout)?,
                attn_norm: RmsNorm::new(
                    weights,
                    name("input_layernorm"),
                    hidden,
                    self.rms_norm_eps,
                )?,
                mlp_norm: RmsNorm::new(
                    weights,
                    name("post_attention_layernorm"),
                    hidden,
                    self.rms_norm_eps,
                )?,
                act,
            })
        };
        let blocks = config.layers.iter().enumerate().map(&mut block).collect::<Result<_, _>>()?;
        let norm = RmsNorm::new(weights, format!("{p}norm"), hidden, self.rms_norm_eps)?;
        let head = DecoderHead::new(weights, config.head, self.tie_word_embeddings, &tokens, std)?;
        Ok(Box::new(Llama { tokens, rotary: self.rotary(head_dim)?, blocks, norm, head }))
    }
}

#[derive(Debug)]
struct Llama {
    tokens: Embedding,
    rotary: Rotary,
    blocks: Vec<Block>,
    norm: RmsNorm,
    head: DecoderHead,
}

#[derive(Debug)]
struct Block {
    attn_norm: RmsNorm,
    attn: AttnLayer,
    mlp_norm: RmsNorm,
    gate: Linear,
    up: Linear,
    down: Linear,
    act: Activation,
}

impl Architecture for Llama {
    fn embed(&self, tokens: &Tokens<'_>, _: bool) -> Tensor {
        self.tokens.forward(tokens.ids)
    }

    fn block(&self, layer: usize, x: &Tensor, pass: &mut LayerPass<'_>) -> Result<Tensor, Error> {
        let block = &self.blocks[layer];
        let x = pass.wanted(x) + block.attn.forward(&block.attn_norm.forward(x), pass)?;
        let normed = block.mlp_norm.forward(&x);
        let [gate, up] = [&block.gate, &block.up].map(|part| part.forward(&normed, pass.train));
        Ok(x + block.down.forward(&(block.act.forward(&gate) * up), pass.train))
    }

    fn finish(&self, x: &Tensor) -> Tensor {
        self.norm.forward(x)
    }

    /// What each norm scales, and the activated half of the feed-forward layer.
    fn kept_beside(&self) -> i64 {
        let inner = |block: &Block| block.gate.out_in().size()[0];
        2 * self.tokens.weight.size()[1] + self.blocks.first().map_or(0, inner)
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

    fn rotary(&self) -> Option<&Rotary> {
        Some(&self.rotary)
    }

    fn layers(&self) -> Vec<&AttnLayer> {
        self.blocks.iter().map(|block| &block.attn).collect()
    }

    fn layer_mut(&mut self, layer: usize) -> &mut AttnLayer {
        &mut self.blocks[layer].attn
    }

    fn linears_mut(&mut self) -> Vec<Slot<'_>> {
        let mut slots = Vec::new();
        for Block { attn, gate, up, down, .. } in &mut self.blocks {
            slots.extend(attn.linears_mut());
            slots.extend([gate, up, down].map(Slot::from));
        }
        slots
    }

    fn visit(&self, f: &mut Visitor<'_>) {
        self.tokens.visit(f);
        for block in &self.blocks {
            block.attn_norm.visit(f);
            block.attn.visit(f);
            block.mlp_norm.visit(f);
            block.gate.visit(f);
            block.up.visit(f);
            block.down.visit(f);
        }
        self.norm.visit(f);
        self.head.visit(f);
    }
}
