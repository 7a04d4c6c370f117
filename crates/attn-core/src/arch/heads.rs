//! What decoders end in: GPT-2 and Llama differ in names alone.

use tch::{Kind, Tensor};

use crate::{
    Error,
    config::Head,
    mask::Mask,
    nn::{Embedding, Layout, Linear, Visitor},
    weights::Weights,
};

/// A decoder's head.
#[derive(Debug)]
pub(super) enum DecoderHead {
    Bare,
    /// Shares the token embedding's matrix, `[vocab_size, hidden_size]`.
    Tied(Tensor),
    Untied(Linear),
    Classifier(Linear),
}

impl DecoderHead {
    pub(super) fn new(
        weights: &mut Weights<'_>,
        head: Head,
        tied: bool,
        tokens: &Embedding,
        std: f64,
    ) -> Result<Self, Error> {
        let [vocab_size, hidden] = tokens.weight.size()[..] else {
            unreachable!("an embedding has two axes")
        };
        Ok(match head {
            Head::Bare => Self::Bare,
            Head::LanguageModel if tied => {
                Self::Tied(weights.tied("lm_head.weight", &tokens.weight)?)
            }
            Head::LanguageModel => Self::Untied(Linear::new(
                weights,
                "lm_head",
                [hidden, vocab_size],
                false,
                Layout::OutIn,
                std,
            )?),
            Head::Classifier { n_classes } => Self::Classifier(Linear::new(
                weights,
                "score",
                [hidden, n_classes],
                false,
                Layout::OutIn,
                std,
            )?),
        })
    }

    pub(super) fn forward(&self, hidden: &Tensor, mask: &Mask, train: bool) -> Tensor {
        match self {
            Self::Bare => hidden.shallow_clone(),
            Self::Tied(weight) => hidden.linear(weight, None::<&Tensor>),
            Self::Untied(linear) => linear.forward(hidden, train),
            Self::Classifier(linear) => linear.forward(&last_token(hidden, mask), train),
        }
    }

    pub(super) fn visit(&self, f: &mut Visitor<'_>) {
        if let Self::Untied(linear) | Self::Classifier(linear) = self {
            linear.visit(f);
        }
    }
}

/// The hidden state of each row's last real token: `[batch, seq_len, hidden] -> [batch, hidden]`.
///
/// transformers takes the last token that is not the padding token, which is the same where padding is no text token.
fn last_token(hidden: &Tensor, mask: &Mask) -> Tensor {
    let [_, seq_len, size] = hidden.size()[..] else {
        unreachable!("hidden states have three axes")
    };
    let Some(keep) = mask.keep() else { return hidden.select(1, seq_len - 1) };
    let place = Tensor::arange(seq_len, (Kind::Int64, keep.device()));
    let last = (keep.to_kind(Kind::Int64) * place).argmax(1, true); // [b, 1]
    hidden.gather(1, &last.unsqueeze(-1).expand([-1, 1, size], false), false).squeeze_dim(1)
}

/// The hidden state of each row's first real token: `[batch, seq_len, hidden] -> [batch, hidden]`.
pub(super) fn first_token(hidden: &Tensor, mask: &Mask) -> Tensor {
    let size = hidden.size()[2];
    let Some(keep) = mask.keep() else { return hidden.select(1, 0) };
    let first = keep.to_kind(Kind::Int64).argmax(1, true); // [b, 1]
    hidden.gather(1, &first.unsqueeze(-1).expand([-1, 1, size], false), false).squeeze_dim(1)
}
