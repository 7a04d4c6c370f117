//! What models end in. Decoders differ from each other in names alone, and so do the masked-LM heads of encoders.

use tch::Tensor;

use super::{Reads, Vocabulary};
use crate::{
    Error,
    config::Head,
    nn::{Activation, Embedding, LayerNorm, Layout, Linear, Visitor, product},
    weights::{Init, Weights},
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

    pub(super) fn reads(&self) -> Reads {
        match self {
            Self::Classifier(_) => Reads::Last,
            Self::Bare | Self::Tied(_) | Self::Untied(_) => Reads::Everywhere,
        }
    }

    pub(super) fn vocabulary(&self) -> Option<Vocabulary> {
        match self {
            Self::Bare | Self::Classifier(_) => None,
            Self::Tied(weight) => Some(Vocabulary { weight: weight.shallow_clone(), bias: None }),
            Self::Untied(linear) => Some(Vocabulary {
                weight: linear.out_in(),
                bias: linear.bias.as_ref().map(Tensor::shallow_clone),
            }),
        }
    }

    pub(super) fn forward(&self, hidden: &Tensor, train: bool) -> Tensor {
        match self {
            Self::Bare => hidden.shallow_clone(),
            Self::Tied(weight) => product(hidden, weight, None),
            Self::Untied(linear) | Self::Classifier(linear) => linear.forward(hidden, train),
        }
    }

    pub(super) fn visit(&self, f: &mut Visitor<'_>) {
        if let Self::Untied(linear) | Self::Classifier(linear) = self {
            linear.visit(f);
        }
    }
}

/// What encoders call the parts of their masked-LM head.
#[derive(Debug)]
pub(super) struct VocabParts {
    pub(super) transform: &'static str,
    pub(super) norm: &'static str,
    pub(super) weight: &'static str,
    pub(super) bias: &'static str,
    /// Whether `weight` is the token embedding's matrix.
    pub(super) tied: bool,
    pub(super) act: Activation,
    pub(super) eps: f64,
    pub(super) std: f64,
}

/// An encoder's masked-LM head: `[.., hidden_size] -> [.., vocab_size]`.
#[derive(Debug)]
pub(super) struct VocabHead {
    transform: Linear,
    act: Activation,
    norm: LayerNorm,
    projector: VocabProjector,
}

impl VocabHead {
    pub(super) fn new(
        weights: &mut Weights<'_>,
        parts: VocabParts,
        tokens: &Embedding,
    ) -> Result<Self, Error> {
        let VocabParts { transform, norm, weight, bias, tied, act, eps, std } = parts;
        let hidden = tokens.weight.size()[1];
        let square = [hidden, hidden];
        Ok(Self {
            transform: Linear::new(weights, transform, square, true, Layout::OutIn, std)?,
            act,
            norm: LayerNorm::new(weights, norm, hidden, eps)?,
            projector: VocabProjector::new(weights, [weight, bias], tied, tokens, std)?,
        })
    }

    pub(super) fn forward(&self, hidden: &Tensor, train: bool) -> Tensor {
        self.projector.forward(&self.before_vocabulary(hidden, train))
    }

    pub(super) fn before_vocabulary(&self, hidden: &Tensor, train: bool) -> Tensor {
        self.norm.forward(&self.act.forward(&self.transform.forward(hidden, train)))
    }

    pub(super) fn vocabulary(&self) -> Vocabulary {
        let VocabProjector { weight, bias, .. } = &self.projector;
        Vocabulary { weight: weight.shallow_clone(), bias: Some(bias.shallow_clone()) }
    }

    pub(super) fn is_tied(&self) -> bool {
        self.projector.tied
    }

    /// `[vocab_size]`.
    pub(super) fn bias(&self) -> &Tensor {
        &self.projector.bias
    }

    pub(super) fn visit(&self, f: &mut Visitor<'_>) {
        self.transform.visit(f);
        self.norm.visit(f);
        self.projector.visit(f);
    }
}

/// From hidden states to the vocabulary, the matrix usually the token embedding's.
#[derive(Debug)]
struct VocabProjector {
    names: [&'static str; 2],
    weight: Tensor,
    bias: Tensor,
    tied: bool,
}

impl VocabProjector {
    fn new(
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

    fn forward(&self, x: &Tensor) -> Tensor {
        product(x, &self.weight, Some(&self.bias))
    }

    fn visit(&self, f: &mut Visitor<'_>) {
        if !self.tied {
            f(self.names[0], &self.weight);
        }
        f(self.names[1], &self.bias);
    }
}
