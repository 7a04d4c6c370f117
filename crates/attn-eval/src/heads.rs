//! Which heads matter: a score for each head of each layer, with its interval.
//!
//! A method gives every row of the data a value for each head; the score is the mean over rows. To add a method: write
//! `heads/<name>.rs`, then name it in [`Method`].

mod michel;

use attn_core::Model;
use attn_data::batch::Encoded;
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::{
    error::{Error, Result},
    row_loss::RowLoss,
    rows::{Batching, Progress, for_each_batch},
    stats::{Interval, bootstrap_means},
};

/// How heads are scored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// Mean over rows of |∂L(row)/∂ξ|, ξ the head's gate: Michel et al. 2019.
    #[default]
    Michel,
}

/// What scores are divided by.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Normalize {
    /// Nothing.
    #[default]
    None,
    /// The ℓ2 norm of the scores of a layer. Layers can then no longer be compared by size.
    Layer,
}

/// Scores of all heads, layers × heads.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HeadScores {
    /// The number of each head in the pretrained layer, as others may have been removed.
    pub heads: Vec<Vec<i64>>,
    /// Mean over rows.
    pub scores: Vec<Vec<f64>>,
    /// Its 95 % interval: rows drawn again with replacement (bootstrap, percentiles, 1,000 draws of seed 0, the same for
    /// all heads).
    pub interval_95: Vec<Vec<Interval>>,
    /// Rows that counted.
    pub n_rows: usize,
}

/// Draws of the intervals.
const N_RESAMPLES: usize = 1000;

/// Scores the query heads of `model` on `rows`, by the loss that it has on them.
///
/// A gradient pass keeps all activations: [`Batching::max_tokens`] bounds them.
///
/// # Errors
///
/// [`Error::Head`] and [`Error::Direction`] for a model without this loss, [`Error::Label`] for a class that it does not
/// have, [`Error::Nothing`] where no row has a loss, [`Error::EmptyRow`], [`Error::NotFinite`], [`Error::Stopped`], and
/// what the model refuses.
pub fn score_heads(
    model: &Model,
    rows: &[Encoded],
    method: Method,
    loss: &RowLoss<'_>,
    batching: &Batching,
    progress: &mut Progress<'_>,
) -> Result<HeadScores> {
    loss.check(model, rows, "a score of heads by its loss")?;
    let heads: Vec<Vec<i64>> = model.layers().iter().map(|layer| layer.spec().kept_heads).collect();
    if heads.iter().all(Vec::is_empty) {
        return Err(Error::Nothing("no layer of the model has a head"));
    }
    // Of each row that counts, in the order of the rows: a value a head, layer after layer.
    let mut values: Vec<Option<Vec<f64>>> = vec![None; rows.len()];
    for_each_batch(model, rows, batching, progress, |positions, batch| {
        let scored = match method {
            Method::Michel => michel::of_batch(model, loss, batch)?,
        };
        for (value, &at) in scored.into_iter().zip(positions) {
            if value.as_ref().is_some_and(|value| !value.iter().all(|value| value.is_finite())) {
                return Err(Error::NotFinite { index: rows[at].index });
            }
            values[at] = value;
        }
        Ok(())
    })?;
    let values: Vec<Vec<f64>> = values.into_iter().flatten().collect();
    if values.is_empty() {
        return Err(Error::Nothing("no row has a label, or a token to predict"));
    }
    let n_rows = values.len();
    let n_heads = values[0].len();
    let mean = |head: usize| values.iter().map(|value| value[head]).sum::<f64>() / n_rows as f64;
    let means: Vec<f64> = (0..n_heads).map(mean).collect();
    let intervals = bootstrap_means(&values, 0.95, N_RESAMPLES, 0)
        .expect("there are rows, and their values are finite");
    Ok(HeadScores {
        scores: by_layer(&means, &heads),
        interval_95: by_layer(&intervals, &heads),
        heads,
        n_rows,
    })
}

/// Values of all heads, layer after layer, as layers × heads.
pub(crate) fn by_layer<T: Clone>(values: &[T], heads: &[Vec<i64>]) -> Vec<Vec<T>> {
    let mut rest = values;
    let take = |layer: &Vec<i64>| {
        let (own, behind) = rest.split_at(layer.len());
        rest = behind;
        own.to_vec()
    };
    heads.iter().map(take).collect()
}

impl HeadScores {
    /// The scores divided as `normalize` says, intervals with them. A layer whose scores are all 0 stays as it is.
    pub fn normalized(mut self, normalize: Normalize) -> Self {
        if normalize == Normalize::Layer {
            for (scores, intervals) in self.scores.iter_mut().zip(&mut self.interval_95) {
                let norm = scores.iter().map(|score| score * score).sum::<f64>().sqrt();
                if norm > 0.0 {
                    scores.iter_mut().for_each(|score| *score /= norm);
                    for Interval { low, high } in intervals {
                        (*low, *high) = (*low / norm, *high / norm);
                    }
                }
            }
        }
        self
    }

    /// The heads, `(layer, place in the layer)`, by falling score; ties in the order of the model.
    pub fn ranked(&self) -> Vec<(usize, usize)> {
        let layers = self.scores.iter().enumerate();
        let mut heads: Vec<(usize, usize)> =
            layers.flat_map(|(layer, row)| (0..row.len()).map(move |head| (layer, head))).collect();
        let score = |(layer, head): (usize, usize)| self.scores[layer][head];
        heads.sort_by(|&a, &b| score(b).total_cmp(&score(a)));
        heads
    }

    /// How many heads have the very score of another: their order says nothing.
    pub fn n_tied(&self) -> usize {
        let ranked: Vec<f64> =
            self.ranked().into_iter().map(|(layer, head)| self.scores[layer][head]).collect();
        ranked.chunk_by(|a, b| a == b).map(<[f64]>::len).filter(|&n| n > 1).sum()
    }
}

/// Per row the values of all heads, layer after layer, from `[rows, n_heads]` a layer.
fn rows_of(layers: &[Tensor]) -> Vec<Vec<f64>> {
    let all = Tensor::cat(layers, 1).to_device(tch::Device::Cpu).to_kind(tch::Kind::Double);
    Vec::try_from(all).expect("two axes of f64")
}
