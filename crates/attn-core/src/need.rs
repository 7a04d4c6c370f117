//! How much memory a model and a pass take, from the configuration alone.
//!
//! Upper bounds of what tensors hold at once. A block keeps for its backward pass what goes into each of its matrices and what comes
//! out of them, and what its attention kind says ([`Attention::held`](crate::attention::Attention::held)); without gradient the widest
//! of it is held once. `tests/need.rs` holds these numbers against what LibTorch allocates.

use tch::Kind;

use crate::{
    Config, Error,
    arch::Architecture,
    attention::{Dims, Holds},
    weights::Weights,
};

/// Bytes by what they are for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Need {
    parts: Vec<(String, u64)>,
}

impl Need {
    /// Nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// With `bytes` for `what`.
    pub fn with(mut self, what: impl Into<String>, bytes: u64) -> Self {
        if bytes > 0 {
            self.parts.push((what.into(), bytes));
        }
        self
    }

    /// The sum.
    pub fn total(&self) -> u64 {
        self.parts.iter().fold(0, |sum, (_, bytes)| sum.saturating_add(*bytes))
    }

    /// The parts, largest first.
    pub fn largest_first(&self) -> Vec<(&str, u64)> {
        let mut parts: Vec<(&str, u64)> =
            self.parts.iter().map(|(what, bytes)| (what.as_str(), *bytes)).collect();
        parts.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
        parts
    }
}

/// What is kept of a pass for its backward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kept {
    /// Nothing: no gradient is asked for.
    Nothing,
    /// All that gradients are made of.
    All,
    /// What enters each block; the rest is computed again
    /// ([`Model::set_gradient_checkpointing`](crate::Model::set_gradient_checkpointing)).
    Blocks,
}

/// A pass over a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pass {
    /// Texts.
    pub rows: u64,
    /// Tokens of each, padding included.
    pub len: u64,
    /// What is kept.
    pub kept: Kept,
    /// Whether dropout is on.
    pub train: bool,
    /// Whether texts may differ in length.
    pub is_padded: bool,
    /// What activations are in.
    pub kind: Kind,
}

/// The sizes of a model that memory depends on, found without making it.
#[derive(Debug)]
pub struct Extents {
    /// Name and number of values of each parameter; a tied one once.
    pub parameters: Vec<(String, u64)>,
    hidden: u64,
    vocab: u64,
    /// Each block's matrices, by inputs and outputs.
    blocks: Vec<Vec<[u64; 2]>>,
    /// Extents of each layer's attention, and what its kind holds.
    arch: Box<dyn Architecture>,
    /// Whether what a block adds is dropped in training.
    has_dropout: bool,
}

impl Extents {
    /// Those of a model of `config`.
    ///
    /// # Errors
    /// For sizes that do not fit together, and for settings that do not fit the layers.
    pub fn of(config: &Config) -> Result<Self, Error> {
        let mut arch = config.arch.clone().build(config, &mut Weights::hollow())?;
        let mut parameters = Vec::new();
        arch.visit(&mut |name, tensor| {
            let n = tensor.size().iter().fold(1_u64, |n, &m| n.saturating_mul(m as u64));
            parameters.push((name.to_owned(), n));
        });
        let sizes: Vec<[u64; 2]> = arch
            .linears_mut()
            .iter()
            .map(|slot| {
                let size = slot.linear.out_in().size();
                [size[1] as u64, size[0] as u64]
            })
            .collect();
        let n_blocks = config.layers.len().max(1);
        let blocks = sizes.chunks((sizes.len() / n_blocks).max(1)).map(<[_]>::to_vec).collect();
        // Of the block's own outputs. Where a config is silent, transformers' default is a tenth; Llamas have none.
        let rates = ["resid_pdrop", "hidden_dropout_prob", "dropout"];
        let rate = |key: &str| config.raw(key).and_then(serde_json::Value::as_f64);
        let has_dropout = arch.rotary().is_none()
            && rates.into_iter().find_map(rate).is_none_or(|rate| rate > 0.0);
        Ok(Self {
            parameters,
            hidden: config.sizes.hidden_size as u64,
            vocab: config.sizes.vocab_size as u64,
            blocks,
            arch,
            has_dropout,
        })
    }

    /// Values of all parameters.
    pub fn n_parameters(&self) -> u64 {
        self.parameters.iter().fold(0, |sum, (_, n)| sum.saturating_add(*n))
    }

    /// Values of the largest parameter.
    pub fn largest(&self) -> u64 {
        self.parameters.iter().map(|(_, n)| *n).max().unwrap_or(0)
    }

    /// Tokens of the vocabulary.
    pub fn vocab_size(&self) -> u64 {
        self.vocab
    }

    /// Width of the hidden states.
    pub fn hidden_size(&self) -> u64 {
        self.hidden
    }

    /// Blocks.
    pub fn n_layers(&self) -> u64 {
        self.blocks.len() as u64
    }

    /// Bytes of the parameters in `kind`, and what making them takes beside: of random numbers a list and its copies, of a product in
    /// 16 bits, where the processor has no units for it, the widest matrix in `f32`.
    pub fn parameter_bytes(&self, kind: Kind, are_drawn: bool) -> u64 {
        let width = kind.elt_size_in_bytes() as u64;
        let copies = if are_drawn {
            8
        } else if width < 4 {
            4
        } else {
            0
        };
        let own = self.n_parameters().saturating_mul(width);
        own.saturating_add(self.largest().saturating_mul(copies))
    }

    /// Bytes that the blocks hold at once, without what the head makes of them.
    pub fn block_bytes(&self, pass: &Pass) -> u64 {
        let layers = self.arch.layers();
        let tokens = pass.rows.saturating_mul(pass.len);
        let residual = tokens.saturating_mul(self.hidden);
        let mut kept = 0_u64;
        let mut most = 0_u64;
        let train = pass.train && self.has_dropout;
        for (matrices, layer) in self.blocks.iter().zip(layers) {
            let dims = layer.dims();
            let holds = |trains: bool| -> u64 {
                let holds = Holds {
                    n_tokens: pass.len as i64,
                    trains,
                    dropout: pass.train && layer.drops(),
                    is_padded: pass.is_padded,
                };
                (layer.kind().held(dims, holds).max(0) as u64).saturating_mul(pass.rows)
            };
            let widest = matrices.iter().flatten().copied().max().unwrap_or(0);
            let qkv = qkv(dims);
            let once = (2 * qkv).max(2 * widest + 2 * self.arch.kept_beside() as u64);
            let alone = tokens
                .saturating_mul(once)
                .saturating_add(3 * residual)
                .saturating_add(holds(false));
            let through: u64 =
                matrices.iter().flatten().sum::<u64>() + self.arch.kept_beside() as u64;
            let dropped = if train { 2 * self.hidden } else { 0 };
            let all = tokens.saturating_mul(through + dropped).saturating_add(holds(true));
            // A backward pass holds gradients of the widest beside.
            let back = tokens.saturating_mul(2 * widest).saturating_add(holds(false));
            match pass.kept {
                Kept::Nothing => most = most.max(alone),
                Kept::All => {
                    kept = kept.saturating_add(all);
                    most = most.max(back);
                }
                Kept::Blocks => {
                    kept = kept.saturating_add(residual);
                    most = most.max(all.saturating_add(back));
                }
            }
        }
        kept.saturating_add(most)
            .saturating_add(2 * residual)
            .saturating_mul(pass.kind.elt_size_in_bytes() as u64)
    }

    /// Bytes of logits over the vocabulary at `places` positions, `copies` times in `kind`.
    pub fn logit_bytes(&self, places: u64, copies: u64, kind: Kind) -> u64 {
        let one = places.saturating_mul(self.vocab).saturating_mul(kind.elt_size_in_bytes() as u64);
        one.saturating_mul(copies)
    }

    /// Bytes of the attention rows of every query of `rows` texts of `len` tokens in all layers.
    pub fn row_bytes(&self, rows: u64, len: u64, kind: Kind) -> u64 {
        let heads: u64 = self.arch.layers().iter().map(|layer| layer.dims().n_heads as u64).sum();
        let pairs = len.saturating_mul(len).saturating_mul(rows);
        pairs.saturating_mul(heads).saturating_mul(kind.elt_size_in_bytes() as u64)
    }

    /// Bytes that `rows` texts of `len` tokens keep while they are written: keys and values of every token.
    pub fn cache_bytes(&self, rows: u64, len: u64, kind: Kind) -> u64 {
        let width = |dims: &Dims| 2 * (dims.n_kv_heads * dims.head_dim) as u64;
        let values: u64 = self.arch.layers().iter().map(|layer| width(layer.dims())).sum();
        let one = rows.saturating_mul(len).saturating_mul(values);
        one.saturating_mul(kind.elt_size_in_bytes() as u64)
    }

    /// The most values that adapters of this rank have, one beside each matrix of every block.
    pub fn n_adapter_values(&self, rank: u64) -> u64 {
        let matrices = self.blocks.iter().flatten();
        matrices.fold(0, |sum, [n_in, n_out]| sum.saturating_add(rank.saturating_mul(n_in + n_out)))
    }

    /// Values of the second moments of what goes into `n_layers` attention layers: a square matrix each.
    pub fn n_moments(&self, n_layers: u64) -> u64 {
        self.hidden.saturating_mul(self.hidden).saturating_mul(n_layers)
    }
}

fn qkv(dims: &Dims) -> u64 {
    ((dims.n_heads + 2 * dims.n_kv_heads) * dims.head_dim).max(0) as u64
}
