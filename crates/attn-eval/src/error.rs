//! What can go wrong in this crate.

use attn_core::config::Head;

use crate::allocate::Cost;

/// What the functions of this crate return.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong in `attn-eval`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The model refused a batch.
    #[error(transparent)]
    Model(#[from] attn_core::Error),

    /// A batch could not be planned or masked.
    #[error(transparent)]
    Data(#[from] attn_data::Error),

    /// A model that ends in another head than the measure needs.
    #[error("the model ends in {found}, and {measure} needs {expected}\nhint: {hint}")]
    Head {
        /// What was to be measured.
        measure: &'static str,
        /// The head that is there.
        found: Head,
        /// The head that is needed.
        expected: &'static str,
        /// A way out.
        hint: &'static str,
    },

    /// A baseline that predicts other tokens.
    #[error(
        "the model's vocabulary has {own} tokens, the baseline's {other}\nhint: name the model that it was made of"
    )]
    Baseline {
        /// The model's tokens.
        own: i64,
        /// The baseline's.
        other: i64,
    },

    /// An encoder asked for the next token, or a decoder for a masked one.
    #[error("a {model_type} does not predict {what}\nhint: {hint}")]
    Direction {
        /// The architecture.
        model_type: &'static str,
        /// What was asked of it.
        what: &'static str,
        /// A way out.
        hint: &'static str,
    },

    /// Attention between two sequences, where that within one is asked for.
    #[error(
        "some layers of the model attend to another sequence, and {measure} is told of attention within one text\nhint: \
         name a model without `cross` layers"
    )]
    Source {
        /// What was to be measured.
        measure: &'static str,
    },

    /// Values that no projection of the layer is.
    #[error(
        "layer {layer} is `{kind}`, which weighs values of its own making, and the length of what a head takes is told of the \
         layer's value projection\nhint: leave the layer out, or draw `--measure weights`"
    )]
    OwnValues {
        /// The layer, from 0.
        layer: usize,
        /// Its attention kind.
        kind: String,
    },

    /// Weights that are no shares of what is attended to.
    #[error(
        "layer {layer} is `{kind}`, whose rows sum to {low:.3} to {high:.3}, and a rollout is told of rows that sum to 1\nhint: \
         draw `--measure weights`"
    )]
    NoShares {
        /// The layer, from 0.
        layer: usize,
        /// Its attention kind.
        kind: String,
        /// The least sum of a row.
        low: f64,
        /// The greatest.
        high: f64,
    },

    /// Heads that do not attend from every token.
    #[error(
        "heads of some layers run for some tokens alone, and {measure} is a mean over all tokens\nhint: `attn score-heads \
         --method open` says how often each runs"
    )]
    Routed {
        /// What was to be measured.
        measure: &'static str,
    },

    /// Models whose heads cannot be paired.
    #[error(
        "the models have other layers, no head in common, or only one of them sees later tokens: layers have {own:?} and \
         {other:?}\nhint: name a model and what it was tuned to"
    )]
    Heads {
        /// Numbers of the heads of each layer.
        own: Vec<Vec<i64>>,
        /// The other's.
        other: Vec<Vec<i64>>,
    },

    /// A budget below the cheapest choice.
    #[error(
        "a budget of {most} {cost} cannot be met: the cheapest choice costs {least}\nhint: give at least that, or name \
         cheaper candidates"
    )]
    Budget {
        /// What was to be spent.
        cost: Cost,
        /// At most so much.
        most: u64,
        /// What the cheapest candidates of all layers cost together.
        least: u64,
    },

    /// A head that the model does not have.
    #[error(
        "there is no head {layer}-{place}: {}",
        match n_heads {
            None => format!("the model has layers 0 to {}", n_layers - 1),
            Some(0) => format!("layer {layer} has none"),
            Some(n) => format!("layer {layer} has heads 0 to {}", n - 1),
        }
    )]
    NoHead {
        /// Its layer, from 0.
        layer: usize,
        /// Its place in the layer, from 0.
        place: usize,
        /// Layers of the model.
        n_layers: usize,
        /// Heads of the layer, where there is one.
        n_heads: Option<usize>,
    },

    /// More heads than there are.
    #[error(
        "{k} heads are to go, and {} has {n}\nhint: name fewer",
        match layer { Some(layer) => format!("layer {layer}"), None => "the model".to_owned() }
    )]
    TooMany {
        /// Heads wanted.
        k: usize,
        /// Heads that there are.
        n: usize,
        /// The layer, where heads are counted by layer.
        layer: Option<usize>,
    },

    /// Scores of a model with other heads.
    #[error(
        "the scores are of layers with {found:?} heads, and the model has {expected:?}\nhint: score the heads of this very \
         model"
    )]
    Scores {
        /// Heads of each layer that have a score.
        found: Vec<usize>,
        /// Heads of each layer of the model.
        expected: Vec<usize>,
    },

    /// Heads that cannot be taken out by zeros.
    #[error(
        "the model in its full shape computes something else than the one without the heads (relative {apart:.1e}): the \
         heads of its attention depend on each other"
    )]
    Entangled {
        /// Relative difference of the logits.
        apart: f64,
    },

    /// A target out of reach.
    #[error(
        "a share of {asked} cannot be met: without {n_heads} heads {left:.3} is left\nhint: the rest of the model is not made of \
         heads"
    )]
    Target {
        /// Heads left out at most.
        n_heads: usize,
        /// Share that is left without them.
        left: f64,
        /// Share that was asked for.
        asked: f64,
    },

    /// Prompts that cannot be patched; said without the subject.
    #[error("the prompts {0}")]
    Prompts(String),

    /// A share that is none.
    #[error("a share of {share} of the heads, expected more than 0 and at most 1")]
    Share {
        /// As given.
        share: f64,
    },

    /// Too few rows to take another one's heads from.
    #[error(
        "there is no other row to take heads' outputs from: {n} given\nhint: give two rows at least, or replace heads by \
         zero or a mean"
    )]
    Donors {
        /// The rows given.
        n: usize,
    },

    /// No row was given, or no token that could be predicted.
    #[error("there is nothing to score: {0}")]
    Nothing(&'static str),

    /// A row without a token.
    #[error(
        "row {index} has no tokens\nhint: leave the row out, or use a tokenizer that puts special tokens around a text"
    )]
    EmptyRow {
        /// Number of the row in its split, from 0.
        index: usize,
    },

    /// A label that the classifier has no class for.
    #[error("row {index} has label {label}, and the model has classes 0 to {}", n_classes - 1)]
    Label {
        /// Number of the row in its split, from 0.
        index: usize,
        /// The label.
        label: i64,
        /// Classes of the model.
        n_classes: i64,
    },

    /// A question with more or fewer answers than classes.
    #[error("row {index} has {found} answers, expected {expected}")]
    Answers {
        /// Number of the row in its split, from 0.
        index: usize,
        /// Its answers.
        found: usize,
        /// One a class.
        expected: usize,
    },

    /// A logit that is infinite or not a number.
    #[error(
        "row {index} gets logits that are not finite\nhint: the weights may be damaged, or too large for half precision: evaluate in f32"
    )]
    NotFinite {
        /// Number of the row in its split, from 0.
        index: usize,
    },

    /// The caller asked to stop.
    #[error("stopped after {n_done} of {n_rows} rows")]
    Stopped {
        /// Rows that were scored.
        n_done: usize,
        /// Rows that were asked for.
        n_rows: usize,
    },
}
