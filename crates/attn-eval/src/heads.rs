//! Which heads matter: a score for each head of each layer, with its interval.
//!
//! A method gives every row of the data a value for each head; the score is the mean over rows. To add a method: write
//! `heads/<name>.rs`, then name it in [`Method`].

mod confidence;
mod gradient;
mod integrated_gradients;
mod learned;
mod open;
mod plain_gradient;

pub use learned::{Goal, Learning, learn_gates};

use attn_core::Model;
use attn_data::batch::{Batch, Encoded};
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::{
    ablate::{Head, Replacement, ablate, all_heads, estimates},
    error::{Error, Result},
    roles::routes,
    row_loss::RowLoss,
    rows::{Batching, Progress, for_each_batch},
    stats::Interval,
};

/// Lists the methods: how heads are scored. To add one: write `heads/<name>.rs`, then name it here and in `values`.
macro_rules! methods {
    ($($(#[$doc:meta])* $name:ident => $text:literal,)*) => {
        /// How heads are scored.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum Method {
            $($(#[$doc])* $name,)*
        }

        impl Method {
            /// Every method.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// The name in results and on the command line.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
        }
    };
}

methods! {
    /// Mean over rows of |∂L(row)/∂ξ|, ξ the head's gate: Michel et al. 2019.
    #[default]
    Michel => "michel",
    /// Mean over rows of −∂L(row)/∂ξ: what the loss would rise by without the head, to first order.
    Taylor => "taylor",
    /// Mean over rows of (∂L(row)/∂ξ)²: the diagonal of Fisher's information.
    Fisher => "fisher",
    /// Fisher's information of the head with those of its layer that go before it, in a greedy order.
    FisherBlock => "fisher_block",
    /// Mean size of the gradient at the head's output, whatever that output is: for comparison.
    PlainGradient => "plain_gradient",
    /// Integrated gradients over the gates of all heads, from none to all.
    IntegratedGradients => "integrated_gradients",
    /// Mean over tokens of the largest attention weight; no task is asked about.
    Confidence => "confidence",
    /// Mean over tokens of whether the head runs, where layers choose their heads by the input; no task is asked about.
    Open => "open",
    /// What the loss rises by without the head: the truth that the others estimate.
    LeaveOneOut => "leave_one_out",
}

impl Method {
    /// Whether it is the mean of a value that every row has by itself, made of the slopes at the gates.
    fn is_of_slopes(self) -> bool {
        matches!(self, Self::Michel | Self::Taylor | Self::Fisher | Self::FisherBlock)
    }
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
    /// all heads). `None` where nothing was drawn: of a single row, and of scores that are no mean over rows.
    pub interval_95: Option<Vec<Vec<Interval>>>,
    /// Rows that counted.
    pub n_rows: usize,
}

impl HeadScores {
    /// The scores with the heads of each layer in the order of `heads`; `None` where these are others.
    pub fn in_order(&self, heads: &[Vec<i64>]) -> Option<Self> {
        if heads.len() != self.heads.len() {
            return None;
        }
        let of_layer = |(wanted, own): (&Vec<i64>, &Vec<i64>)| -> Option<Vec<usize>> {
            let place = |head: &i64| own.iter().position(|it| it == head);
            (wanted.len() == own.len()).then(|| wanted.iter().map(place).collect())?
        };
        let places: Vec<Vec<usize>> =
            heads.iter().zip(&self.heads).map(of_layer).collect::<Option<_>>()?;
        fn ordered<T: Copy>(table: &[Vec<T>], places: &[Vec<usize>]) -> Vec<Vec<T>> {
            let of_layer = |(row, places): (&Vec<T>, &Vec<usize>)| {
                places.iter().map(|&place| row[place]).collect()
            };
            table.iter().zip(places).map(of_layer).collect()
        }
        Some(Self {
            heads: heads.to_vec(),
            scores: ordered(&self.scores, &places),
            interval_95: self.interval_95.as_ref().map(|table| ordered(table, &places)),
            n_rows: self.n_rows,
        })
    }
}

/// Scores the query heads of `model` on `rows`, by the loss that it has on them, by each of `methods`. Those that are made of the
/// slopes at the gates share a pass.
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
    methods: &[Method],
    loss: &RowLoss<'_>,
    batching: &Batching,
    progress: &mut Progress<'_>,
) -> Result<Vec<HeadScores>> {
    loss.check(model, rows, "a score of heads by its loss")?;
    let heads: Vec<Vec<i64>> = model.layers().iter().map(|layer| layer.spec().kept_heads).collect();
    if heads.iter().all(Vec::is_empty) {
        return Err(Error::Nothing("no layer of the model has a head"));
    }
    if methods.contains(&Method::Open) && !routes(model) {
        return Err(Error::Nothing("every head runs whatever the input: no layer is `routed`"));
    }
    if methods.contains(&Method::Confidence) && routes(model) {
        return Err(Error::Routed { measure: "confidence" });
    }
    let run = Run { model, rows, loss, batching };
    let slopes = match methods.iter().any(|method| method.is_of_slopes()) {
        true => run.values(progress, |batch| gradient::of_batch(model, loss, batch, 1.0))?,
        false => Vec::new(),
    };
    let n_heads: Vec<usize> = heads.iter().map(Vec::len).collect();
    let each = |value: fn(f64) -> f64| -> Vec<Vec<f64>> {
        slopes.iter().map(|row| row.iter().map(|&slope| value(slope)).collect()).collect()
    };
    let score = |&method: &Method| -> Result<HeadScores> {
        let values = match method {
            Method::Michel => each(f64::abs),
            Method::Taylor => each(|slope| -slope),
            Method::Fisher => each(|slope| slope * slope),
            Method::FisherBlock => gradient::in_blocks(&slopes, &n_heads),
            Method::PlainGradient => {
                run.values(progress, |batch| plain_gradient::of_batch(model, loss, batch))?
            }
            Method::IntegratedGradients => {
                run.values(progress, |batch| integrated_gradients::of_batch(model, loss, batch))?
            }
            Method::Confidence => {
                run.values(progress, |batch| confidence::of_batch(model, batch))?
            }
            Method::Open => run.values(progress, |batch| open::of_batch(model, batch))?,
            Method::LeaveOneOut => run.leave_one_out(progress)?,
        };
        Ok(HeadScores::of(&values, &heads))
    };
    methods.iter().map(score).collect()
}

/// What is scored, and on what.
struct Run<'a> {
    model: &'a Model,
    rows: &'a [Encoded],
    loss: &'a RowLoss<'a>,
    batching: &'a Batching,
}

impl Run<'_> {
    /// A value a head, layer after layer, of each row that counts, in the order of the rows.
    fn values(
        &self,
        progress: &mut Progress<'_>,
        mut of_batch: impl FnMut(Batch) -> Result<Vec<Option<Vec<f64>>>>,
    ) -> Result<Vec<Vec<f64>>> {
        let mut values: Vec<Option<Vec<f64>>> = vec![None; self.rows.len()];
        for_each_batch(self.model, self.rows, self.batching, progress, |positions, batch| {
            for (value, &at) in of_batch(batch)?.into_iter().zip(positions) {
                if value.as_ref().is_some_and(|value| !value.iter().all(|it| it.is_finite())) {
                    return Err(Error::NotFinite { index: self.rows[at].index });
                }
                values[at] = value;
            }
            Ok(())
        })?;
        let values: Vec<Vec<f64>> = values.into_iter().flatten().collect();
        match values.is_empty() {
            true => Err(Error::Nothing("no row has a label, or a token to predict")),
            false => Ok(values),
        }
    }

    fn leave_one_out(&self, progress: &mut Progress<'_>) -> Result<Vec<Vec<f64>>> {
        let Self { model, rows, loss, batching } = self;
        let choices: Vec<Vec<Head>> = all_heads(model).into_iter().map(|head| vec![head]).collect();
        let found = ablate(model, rows, &choices, Replacement::Zero, loss, batching, progress)?;
        let rise = |row: usize| {
            found.without.iter().map(|all| all[row].loss - found.untouched[row].loss).collect()
        };
        Ok((0..found.rows.len()).map(rise).collect())
    }
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

/// The heads by falling value of `values`, layers × heads; ties in the order of the model.
pub fn ranked(values: &[Vec<f64>]) -> Vec<Head> {
    let of_layer =
        |(layer, row): (usize, &Vec<f64>)| (0..row.len()).map(move |place| Head { layer, place });
    let mut heads: Vec<Head> = values.iter().enumerate().flat_map(of_layer).collect();
    heads.sort_by(|a, b| b.of(values).total_cmp(a.of(values)));
    heads
}

impl HeadScores {
    /// Scores from `values[row][head]`, heads layer after layer; `heads` are their numbers. There is a row.
    pub(crate) fn of(values: &[Vec<f64>], heads: &[Vec<i64>]) -> Self {
        let all = estimates(values);
        let means: Vec<f64> = all.iter().map(|it| it.value).collect();
        let intervals: Option<Vec<Interval>> = all.iter().map(|it| it.interval_95).collect();
        Self {
            scores: by_layer(&means, heads),
            interval_95: intervals.map(|intervals| by_layer(&intervals, heads)),
            heads: heads.to_vec(),
            n_rows: values.len(),
        }
    }

    /// The scores divided as `normalize` says, intervals with them. A layer whose scores are all 0 stays as it is.
    pub fn normalized(mut self, normalize: Normalize) -> Self {
        if normalize == Normalize::None {
            return self;
        }
        for (layer, scores) in self.scores.iter_mut().enumerate() {
            let norm = scores.iter().map(|score| score * score).sum::<f64>().sqrt();
            if norm > 0.0 {
                scores.iter_mut().for_each(|score| *score /= norm);
                for Interval { low, high } in
                    self.interval_95.iter_mut().flat_map(|all| &mut all[layer])
                {
                    (*low, *high) = (*low / norm, *high / norm);
                }
            }
        }
        self
    }

    /// The interval of a head, where there are any.
    ///
    /// # Panics
    ///
    /// For a head without a score.
    pub fn interval_of(&self, head: Head) -> Option<Interval> {
        self.interval_95.as_ref().map(|all| *head.of(all))
    }

    /// The heads by falling score; ties in the order of the model.
    pub fn ranked(&self) -> Vec<Head> {
        ranked(&self.scores)
    }

    /// How many heads score exactly 0.
    pub fn n_zero(&self) -> usize {
        self.scores.iter().flatten().filter(|&&score| score == 0.0).count()
    }

    /// How many heads have the very score of another: their order says nothing.
    pub fn n_tied(&self) -> usize {
        let ranked: Vec<f64> =
            self.ranked().into_iter().map(|head| *head.of(&self.scores)).collect();
        ranked.chunk_by(|a, b| a == b).map(<[f64]>::len).filter(|&n| n > 1).sum()
    }
}

/// Per row the values of all heads, layer after layer, from `[rows, n_heads]` a layer.
fn rows_of(layers: &[Tensor]) -> Vec<Vec<f64>> {
    let all = Tensor::cat(layers, 1).to_device(tch::Device::Cpu).to_kind(tch::Kind::Double);
    Vec::try_from(all).expect("two axes of f64")
}
