//! Which heads to do without, by their scores, and what that costs against chance.
//!
//! Best, worst and random heads are taken on equal terms: as many of all heads, or as many of each layer. Michel et al. 2019
//! take them of all heads, <https://arxiv.org/abs/1905.10650>, section 4.

use attn_core::Model;
use attn_data::batch::Encoded;
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use serde::{Deserialize, Serialize};

use crate::{
    ablate::{Ablated, Effect, Estimate, Head, Outcome, Replacement, ablate},
    error::{Error, Result},
    heads::{HeadScores, Method, score_heads},
    row_loss::RowLoss,
    rows::{Batching, Progress},
    stats::{Discordant, below, discordant},
};

/// Which heads go first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// Those with the highest scores.
    Top,
    /// Those with the lowest.
    Bottom,
    /// Any.
    Random,
}

/// What heads are counted in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// K of all heads of the model.
    #[default]
    Global,
    /// K of each layer.
    Layer,
}

/// Heads that were picked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Picked {
    /// In the order of the model.
    pub heads: Vec<Head>,
    /// Heads with one score of which some were picked and some not: nothing but the seed tells them apart.
    pub n_tied: usize,
}

/// Picks `k` heads by `scores`, layers × heads: of the model or of each layer, as `scope` says. Ties, and random heads, are drawn by `seed`.
///
/// # Errors
///
/// [`Error::TooMany`] where there are fewer.
pub fn pick(
    scores: &[Vec<f64>],
    k: usize,
    order: Order,
    scope: Scope,
    seed: u64,
) -> Result<Picked> {
    let of_layer = |layer: usize| {
        (0..scores[layer].len()).map(move |place| Head { layer, place }).collect::<Vec<_>>()
    };
    let pools: Vec<Vec<Head>> = match scope {
        Scope::Global => vec![(0..scores.len()).flat_map(of_layer).collect()],
        Scope::Layer => (0..scores.len()).map(of_layer).collect(),
    };
    let mut picked = Picked { heads: Vec::new(), n_tied: 0 };
    for (at, mut pool) in pools.into_iter().enumerate() {
        if k > pool.len() {
            let layer = (scope == Scope::Layer).then_some(at);
            return Err(Error::TooMany { k, n: pool.len(), layer });
        }
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(at as u64);
        for left in (1..pool.len()).rev() {
            pool.swap(left, below(left + 1, &mut rng));
        }
        let score = |head: &Head| scores[head.layer][head.place];
        match order {
            Order::Top => pool.sort_by(|a, b| score(b).total_cmp(&score(a))),
            Order::Bottom => pool.sort_by(|a, b| score(a).total_cmp(&score(b))),
            Order::Random => {}
        }
        if order != Order::Random
            && (1..pool.len()).contains(&k)
            && score(&pool[k - 1]) == score(&pool[k])
        {
            let last = score(&pool[k]);
            picked.n_tied += pool.iter().filter(|head| score(head) == last).count();
        }
        picked.heads.extend(&pool[..k]);
    }
    picked.heads.sort_unstable();
    Ok(picked)
}

/// Heads by what is left of them as they go: `share` of all heads at a step, those with the lowest scores, scores made anew by `method`
/// after each. The score of a head is the step at which it goes, from 0, with its place among those that go with it behind the point:
/// a head with a higher one goes later. Heads that tie go together, with one score, so that a step may be larger than asked for. There are
/// no intervals.
///
/// Michel et al. 2019, section 4.2, remove a tenth of all heads at a step.
///
/// # Errors
///
/// As [`score_heads`]; [`Error::Share`] for a share outside of (0, 1].
pub fn score_iteratively(
    model: &Model,
    rows: &[Encoded],
    method: Method,
    share: f64,
    loss: &RowLoss<'_>,
    batching: &Batching,
    progress: &mut Progress<'_>,
) -> Result<HeadScores> {
    if !(share > 0.0 && share <= 1.0) {
        return Err(Error::Share { share });
    }
    let mut left: Vec<Vec<usize>> =
        model.layers().iter().map(|layer| (0..layer.dims().n_heads as usize).collect()).collect();
    let n_heads: usize = left.iter().map(Vec::len).sum();
    let per_step = ((share * n_heads as f64).round() as usize).max(1);
    let mut steps: Vec<Vec<f64>> = left.iter().map(|layer| vec![0.0; layer.len()]).collect();
    let mut rest = model.alias()?;
    let mut first = None;
    for step in 0.. {
        let scores = score_heads(&rest, rows, &[method], loss, batching, progress)?.remove(0);
        let mut going = scores.ranked();
        going.reverse();
        let score = |head: &Head| *head.of(&scores.scores);
        let last = going[per_step.min(going.len()) - 1];
        going.retain(|head| score(head) <= score(&last));
        for head in &going {
            let at = going.partition_point(|other| score(other) < score(head));
            steps[head.layer][left[head.layer][head.place]] =
                f64::from(step) + at as f64 / going.len() as f64;
        }
        for (layer, of_layer) in left.iter_mut().enumerate() {
            let stays = |place: &usize| !going.contains(&Head { layer, place: *place });
            let kept: Vec<usize> = (0..of_layer.len()).filter(stays).collect();
            if kept.len() < of_layer.len() {
                let places: Vec<i64> = kept.iter().map(|&place| place as i64).collect();
                rest.select_heads(layer, &places)?;
                *of_layer = kept.into_iter().map(|place| of_layer[place]).collect();
            }
        }
        first.get_or_insert(scores);
        if left.iter().all(Vec::is_empty) {
            break;
        }
    }
    Ok(first.expect("there was a first step").with_scores(steps))
}

/// How many heads are left out, and of which scores.
#[derive(Debug, Clone, Copy)]
pub struct Grid<'a> {
    /// Scores, layers × heads each.
    pub scores: &'a [Vec<Vec<f64>>],
    /// Heads left out, of the model or of each layer.
    pub ks: &'a [usize],
    /// Which of the two.
    pub scope: Scope,
    /// Random choices for each k.
    pub n_draws: usize,
    /// Seed of them.
    pub seed: u64,
}

/// Loss and accuracy over random choices of heads.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct RandomBand {
    /// Choices drawn.
    pub n_draws: usize,
    /// Mean loss, in nats, and the lowest and highest of a choice.
    pub loss: [f64; 3],
    /// Mean share of right predictions, and the lowest and highest of a choice.
    pub accuracy: [f64; 3],
}

/// One choice of heads by a score.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ByScore {
    /// Which of [`Grid::scores`].
    pub score: usize,
    /// Top or bottom.
    pub order: Order,
    /// The heads.
    pub heads: Vec<Head>,
    /// As [`Picked::n_tied`].
    pub n_tied: usize,
    /// Loss without them.
    pub loss: f64,
    /// Share of right predictions without them.
    pub accuracy: f64,
    /// Against the model as it is, on the same rows.
    pub effect: Effect,
    /// Rows that the untouched model (first) or the one without these heads (second) alone gets right; `None` where a row has several
    /// predictions.
    pub discordant: Option<Discordant>,
    /// How likely a random choice is to raise the loss at least as much: (1 + choices that do)/(1 + choices).
    pub p_random_worse: f64,
    /// How likely one is to raise it at most as much.
    pub p_random_better: f64,
}

/// All choices of one size.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CurvePoint {
    /// Heads left out, of the model or of each layer.
    pub k: usize,
    /// Of the model.
    pub n_heads: usize,
    /// Random choices.
    pub random: RandomBand,
    /// Top and bottom of each score.
    pub by_score: Vec<ByScore>,
}

/// What it costs to leave out more and more heads.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Curve {
    /// Rows that count.
    pub n_rows: usize,
    /// Loss of the model as it is.
    pub loss: Estimate,
    /// Share of its predictions that are right.
    pub accuracy: Estimate,
    /// One a k.
    pub points: Vec<CurvePoint>,
    /// Of each score the mean rise of the loss over all k: bottom first, and top first. The lower the first and the higher the second,
    /// the more the score knows.
    pub areas: Vec<[f64; 2]>,
    /// The same of random choices.
    pub random_area: f64,
}

/// Leaves out the heads that `grid` names, each choice once, on `rows`.
///
/// # Errors
///
/// [`Error::TooMany`] for a k beyond the heads, [`Error::Scores`] for scores of another model, and as [`ablate`].
pub fn curve(
    model: &Model,
    rows: &[Encoded],
    grid: &Grid<'_>,
    replacement: Replacement<'_>,
    loss: &RowLoss<'_>,
    batching: &Batching,
    progress: &mut Progress<'_>,
) -> Result<Curve> {
    let n_heads: Vec<usize> =
        model.layers().iter().map(|layer| layer.dims().n_heads as usize).collect();
    for scores in grid.scores {
        let of: Vec<usize> = scores.iter().map(Vec::len).collect();
        if of != n_heads {
            return Err(Error::Scores { found: of, expected: n_heads });
        }
    }
    let shape: Vec<Vec<f64>> = n_heads.iter().map(|&n| vec![0.0; n]).collect();
    let mut choices: Vec<Vec<Head>> = Vec::new();
    let mut ties = Vec::new();
    for &k in grid.ks {
        for scores in grid.scores {
            for order in [Order::Top, Order::Bottom] {
                let Picked { heads, n_tied } = pick(scores, k, order, grid.scope, grid.seed)?;
                choices.push(heads);
                ties.push(n_tied);
            }
        }
        for draw in 0..grid.n_draws as u64 {
            // Another seed for each size and draw, and for each seed others.
            let own = grid.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let seed = own ^ ((k as u64) << 32) ^ (draw << 1) ^ 1;
            choices.push(pick(&shape, k, Order::Random, grid.scope, seed)?.heads);
            ties.push(0);
        }
    }
    let found = ablate(model, rows, &choices, replacement, loss, batching, progress)?;
    Ok(summarize(grid, &found, &choices, &ties))
}

fn summarize(grid: &Grid<'_>, found: &Ablated, choices: &[Vec<Head>], ties: &[usize]) -> Curve {
    let effects = found.effects();
    let [loss, accuracy] = found.baseline();
    let n_rows = found.rows.len() as f64;
    let mean = |at: usize| {
        let all = &found.without[at];
        let [loss, hits] = [|it: &Outcome| it.loss, |it: &Outcome| it.accuracy]
            .map(|of| all.iter().map(of).sum::<f64>() / n_rows);
        (loss, hits)
    };
    // A row with one prediction gets it right or wrong.
    let is_right = |hits: f64| hits == 0.0 || hits == 1.0;
    let all_one = found
        .untouched
        .iter()
        .chain(found.without.iter().flatten())
        .all(|it| is_right(it.accuracy));
    let right =
        |all: &[Outcome]| -> Vec<bool> { all.iter().map(|it| it.accuracy == 1.0).collect() };
    let before = right(&found.untouched);

    let per_k = 2 * grid.scores.len() + grid.n_draws;
    let mut points = Vec::with_capacity(grid.ks.len());
    for (at, &k) in grid.ks.iter().enumerate() {
        let first = at * per_k;
        let random: Vec<(f64, f64)> =
            (first + 2 * grid.scores.len()..first + per_k).map(mean).collect();
        let band = |of: fn(&(f64, f64)) -> f64| {
            let values = || random.iter().map(of);
            let low = values().fold(f64::INFINITY, f64::min);
            let high = values().fold(f64::NEG_INFINITY, f64::max);
            [values().sum::<f64>() / random.len() as f64, low, high]
        };
        let by_score = (0..2 * grid.scores.len()).map(|one| {
            let (loss, accuracy) = mean(first + one);
            let share = |n: usize| (1 + n) as f64 / (1 + random.len()) as f64;
            let chosen = first + one;
            ByScore {
                score: one / 2,
                order: if one % 2 == 0 { Order::Top } else { Order::Bottom },
                heads: choices[chosen].clone(),
                n_tied: ties[chosen],
                loss,
                accuracy,
                effect: effects[chosen],
                discordant: all_one.then(|| {
                    discordant(&before, &right(&found.without[chosen]))
                        .expect("both are of the same rows, of which there is one")
                }),
                p_random_worse: share(random.iter().filter(|it| it.0 >= loss).count()),
                p_random_better: share(random.iter().filter(|it| it.0 <= loss).count()),
            }
        });
        points.push(CurvePoint {
            k,
            n_heads: choices[first..].first().map_or(0, Vec::len),
            by_score: by_score.collect(),
            random: RandomBand {
                n_draws: grid.n_draws,
                loss: band(|it| it.0),
                accuracy: band(|it| it.1),
            },
        });
    }
    let n = points.len() as f64;
    let area = |score: usize, order: Order| {
        let of = |point: &CurvePoint| {
            let mut found = point.by_score.iter();
            let one = found.find(|it| it.score == score && it.order == order);
            one.expect("each score has both").effect.loss.value
        };
        points.iter().map(of).sum::<f64>() / n
    };
    let areas = (0..grid.scores.len())
        .map(|score| [area(score, Order::Bottom), area(score, Order::Top)])
        .collect();
    let random_area = points.iter().map(|it| it.random.loss[0] - loss.value).sum::<f64>() / n;
    Curve { n_rows: found.rows.len(), loss, accuracy, points, areas, random_area }
}

impl HeadScores {
    /// Scores of the heads of `model` that come without intervals.
    pub fn learned(model: &Model, scores: Vec<Vec<f64>>, n_rows: usize) -> Self {
        let heads = model.layers().iter().map(|layer| layer.spec().kept_heads).collect();
        Self { heads, scores, interval_95: None, n_rows }
    }

    /// The same heads with other scores and no intervals.
    pub fn with_scores(&self, scores: Vec<Vec<f64>>) -> Self {
        Self { scores, interval_95: None, ..self.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heads(of: &[(usize, usize)]) -> Vec<Head> {
        of.iter().map(|&(layer, place)| Head { layer, place }).collect()
    }

    #[test]
    fn heads_are_picked_on_equal_terms() {
        let scores = vec![vec![5.0, 1.0, 3.0], vec![0.0, 9.0, 8.0]];
        let of = |k, order, scope| pick(&scores, k, order, scope, 0).unwrap().heads;
        assert_eq!(of(3, Order::Top, Scope::Global), heads(&[(0, 0), (1, 1), (1, 2)]));
        assert_eq!(of(3, Order::Bottom, Scope::Global), heads(&[(0, 1), (0, 2), (1, 0)]));
        assert_eq!(of(1, Order::Top, Scope::Layer), heads(&[(0, 0), (1, 1)]));
        assert_eq!(of(2, Order::Bottom, Scope::Layer), heads(&[(0, 1), (0, 2), (1, 0), (1, 2)]));
        assert_eq!(of(6, Order::Random, Scope::Global).len(), 6);
        let error = pick(&scores, 7, Order::Top, Scope::Global, 0).unwrap_err().to_string();
        assert!(error.contains("7") && error.contains("6"), "{error}");
        let error = pick(&scores, 4, Order::Top, Scope::Layer, 0).unwrap_err().to_string();
        assert!(error.contains("layer 0"), "{error}");
    }

    #[test]
    fn ties_are_drawn_and_counted() {
        let scores = vec![vec![0.0; 8], vec![1.0; 2]];
        let tied = |seed| pick(&scores, 3, Order::Bottom, Scope::Global, seed).unwrap();
        assert_eq!(tied(0).n_tied, 8);
        assert_eq!(pick(&scores, 8, Order::Bottom, Scope::Global, 0).unwrap().n_tied, 0);
        let drawn: std::collections::HashSet<Vec<Head>> =
            (0..40).map(|seed| tied(seed).heads).collect();
        assert!(drawn.len() > 10, "another seed, other heads");
    }

    #[test]
    fn random_heads_are_all_equally_likely() {
        let scores = vec![vec![7.0, 1.0, 3.0], vec![0.0, 9.0]];
        for (scope, k, expected) in [(Scope::Global, 2, 0.4), (Scope::Layer, 1, 1.0 / 3.0)] {
            let n = 3000;
            let picked = (0..n).filter(|&seed| {
                let picked = pick(&scores, k, Order::Random, scope, seed).unwrap();
                picked.heads.contains(&Head { layer: 0, place: 1 })
            });
            let share = picked.count() as f64 / n as f64;
            assert!((share - expected).abs() < 0.04, "{scope:?}: {share}"); // four standard errors
        }
    }
}
