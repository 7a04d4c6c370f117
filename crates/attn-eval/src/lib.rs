//! What a model is worth on rows of token ids, as numbers.
//!
//! [`classify()`] scores a classifier: accuracy with its interval, counts per class, every prediction. [`next_token()`]
//! and [`masked_token()`] score language models in nats per token and perplexity, [`choices()`] by the answers they
//! choose, [`recall()`] by those they give word for word, [`perplexity()`] by the conventions in use. [`divergence()`] says how far one is from another that it was made of. [`score_heads()`] says which heads matter to any of these losses, [`ablate()`] what is lost without them, [`retrieval()`] which look up facts in long texts, [`head_roles()`] where each
//! looks and [`syntax()`] along which relations, [`attention_shift()`] how that differs between models,
//! [`sensitivity()`] what each layer loses under another attention, and [`allocate()`] which it should have under a budget;
//! [`convert()`] gives a model fewer key/value heads, fitted to a text, and [`kv_sensitivity()`] says how many each layer needs.
//! [`stats`] says how far a number can be trusted. Nothing here knows how a model was trained: training calls these as any other caller does.
//!
//! Rows run in batches of similar length and come back in the order they were given. Dropout is off, no gradient is
//! recorded, and the batch size changes nothing beyond rounding.

mod ablate;
mod allocate;
mod attended;
mod attention_shift;
mod choices;
mod classify;
mod conversion;
mod cost;
mod divergence;
mod error;
mod explain;
mod heads;
mod language;
mod likelihood;
mod patch;
mod pruning;
mod recall;
mod removal;
mod retrieval;
mod roles;
mod rouge;
mod row_loss;
mod rows;
mod sensitivity;
pub mod stats;
mod text;

pub use ablate::{
    Ablated, Effect, Estimate, Head, Outcome, Replacement, ablate, all_groups, all_heads, mean_z,
};
pub use allocate::{Budget, Cost, Offer, allocate};
pub use attended::{entropy, norms, rollout};
pub use attention_shift::{AttentionShift, Change, Control, Shift, Table, attention_shift};
pub use choices::{Choice, Choices, choices};
pub use classify::{Accuracy, ClassScore, Classification, Prediction, classify};
pub use conversion::{
    Converted, SetApart, Text, WithHeads, against, cache_bytes, choose_kv_heads, convert,
    kl_difference, kv_sensitivity, moments,
};
pub use cost::{decoding_tokens_per_s, layer_state_bytes, state_bytes};
pub use divergence::{AtPositions, Divergence, divergence};
pub use error::{Error, Result};
pub use explain::{
    Check, Explanation, Sample, Texts, Verdict, Way, Writing, Written, explain, kl_by_shift,
};
pub use heads::{Goal, HeadScores, Learning, Method, Normalize, learn_gates, ranked, score_heads};
pub use language::{
    Convention, LanguageScore, RowScore, check_decoder, loss_difference, masked_token, next_token,
};
pub use likelihood::{
    Document, Perplexity, Preference, Window, Windows, gated_log_likelihoods, log_likelihoods,
    perplexity,
};
pub use patch::{Patched, Patching, Prompts, patch};
pub use pruning::{
    ByScore, Curve, CurvePoint, Grid, Order, Picked, RandomBand, Scope, curve, pick,
    score_iteratively,
};
pub use recall::{Recall, Recalled, recall, recall_gated};
pub use removal::{
    Left, Look, Spent, Target, against_masked, attention_flops, in_full_shape, left, meet,
    n_parameters, without,
};
pub use retrieval::{
    AnswerScore, Answered, Answering, Band, MaskFill, Query, Read, RetrievalScore, Trial, answer,
    band, closed, draw_heads, over_trials, query_focused, retrieval,
};
pub use roles::{
    HeadRoles, Known, MAX_WEIGHTS, Measure, POSITIONAL, Positional, RoleScore, head_roles,
    phenomena::{Phenomena, Phenomenon, n_passes, phenomena},
    repeats,
    syntax::{Direction, MIN_CASES, Relation, Syntax, n_relations, syntax},
};
pub use rouge::{rouge1_recall, says};
pub use row_loss::RowLoss;
pub use rows::{Batching, Progress, to_input};
pub use sensitivity::{Probing, Swapped, sensitivity};
pub use text::{Wording, entities, entities_kept};
