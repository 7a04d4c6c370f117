//! The encoder block that BERT and DistilBERT share: each sublayer's output is added to its input and normalized.

use tch::Tensor;

use crate::{
    Error,
    attention::Dims,
    config::{LayerSpec, Sizes},
    layer::{AttnLayer, LayerPass, Naming},
    lora::Slot,
    nn::{Activation, LayerNorm, Layout, Linear, Visitor},
    weights::Weights,
};

/// What the two call the parts of a block, and where they drop.
#[derive(Debug)]
pub(super) struct Parts {
    pub(super) qkv: [String; 3],
    pub(super) out: String,
    pub(super) kind: String,
    pub(super) attn_norm: String,
    pub(super) up: String,
    pub(super) down: String,
    pub(super) norm: String,
    pub(super) inner: i64,
    pub(super) eps: f64,
    pub(super) act: Activation,
    /// Dropout of the attention weights, of the attention's output, of the feed-forward's output.
    pub(super) dropout: [f64; 3],
}

#[derive(Debug)]
pub(super) struct Block {
    pub(super) attn: AttnLayer,
    attn_norm: LayerNorm,
    up: Linear,
    down: Linear,
    norm: LayerNorm,
    act: Activation,
    dropout: [f64; 3],
}

impl Block {
    pub(super) fn new(
        weights: &mut Weights<'_>,
        parts: Parts,
        spec: &LayerSpec,
        sizes: &Sizes,
    ) -> Result<Self, Error> {
        let (hidden, std) = (sizes.hidden_size, sizes.initializer_range);
        let dims = Dims {
            hidden_size: hidden,
            n_heads: spec.n_heads,
            n_kv_heads: spec.n_kv_heads,
            head_dim: sizes.head_dim,
            kv_of_head: spec.kv_of_head.clone(),
            scale: (sizes.head_dim as f64).powf(-0.5),
            causal: false,
            rotary: false,
            max_len: Some(sizes.max_positions),
        };
        let naming = Naming {
            qkv: &parts.qkv,
            qkv_bias: true,
            out: parts.out,
            out_bias: true,
            layout: Layout::OutIn,
            std: [std, std],
            kind: parts.kind,
        };
        let mut linear =
            |name, widths| Linear::new(weights, name, widths, true, Layout::OutIn, std);
        let up = linear(parts.up, [hidden, parts.inner])?;
        let down = linear(parts.down, [parts.inner, hidden])?;
        Ok(Self {
            attn: AttnLayer::new(weights, naming, spec, dims, parts.dropout[0])?,
            attn_norm: LayerNorm::new(weights, parts.attn_norm, hidden, parts.eps)?,
            up,
            down,
            norm: LayerNorm::new(weights, parts.norm, hidden, parts.eps)?,
            act: parts.act,
            dropout: parts.dropout,
        })
    }

    pub(super) fn forward(&self, x: &Tensor, pass: &mut LayerPass<'_>) -> Result<Tensor, Error> {
        let attended = self.attn.forward(x, pass)?.dropout(self.dropout[1], pass.train);
        let x = self.attn_norm.forward(&(pass.wanted(x) + attended));
        let inner = self.act.forward(&self.up.forward(&x, pass.train));
        let fed = self.down.forward(&inner, pass.train);
        Ok(self.norm.forward(&(&x + fed.dropout(self.dropout[2], pass.train))))
    }

    pub(super) fn linears_mut(&mut self) -> Vec<Slot<'_>> {
        let mut slots = self.attn.linears_mut();
        slots.extend([&mut self.up, &mut self.down].map(Slot::from));
        slots
    }

    pub(super) fn visit(&self, f: &mut Visitor<'_>) {
        self.attn.visit(f);
        self.attn_norm.visit(f);
        self.up.visit(f);
        self.down.visit(f);
        self.norm.visit(f);
    }
}
