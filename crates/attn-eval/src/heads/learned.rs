//! Gates that are learned: each head's chance to stay, where closed heads are worth something, or where K of them stay.
//!
//! ```text
//! hard_concrete   g = clip(1.2 s − 0.1, 0, 1),  s = σ((ln u − ln(1 − u) + ln α)/β),  u ~ U(0, 1)
//!                 min_α E_x E_u L(x; g) + λ Σ_h P(g_h > 0),  P(g_h > 0) = σ(ln α_h − β ln(0.1/1.1))
//!                 score: P(g_h > 0)
//! subset          g = the K largest of w + Gumbel noise, backwards as if it were the relaxed top-K of it
//!                 min_w E_x E_noise L(x; g);  score: w_h
//! ```
//!
//! `hard_concrete`: Louizos, Welling, Kingma 2017, <https://arxiv.org/abs/1712.01312>; of heads Voita et al. 2019, "Analyzing
//! Multi-Head Self-Attention", section 5.1, <https://arxiv.org/abs/1905.09418>, β = 0.33 as their code has it. `subset`: Li,
//! Cotterell, Sachan 2021, "Differentiable Subset Pruning of Transformer Heads", <https://arxiv.org/abs/2108.04657>, section 3, the
//! top-K relaxed as by Xie and Ermon 2019, <https://arxiv.org/abs/1901.10517>, at temperature 1.
//!
//! Deviations: the model stays as it is, where both papers train it along with the gates; a gate is drawn once a batch for all its
//! rows. Adam, Kingma and Ba 2014, <https://arxiv.org/abs/1412.6980>.

use attn_core::{Fill, Gate, Model};
use attn_data::batch::{Batch, Encoded, Side, collate};
use rand_chacha::{
    ChaCha8Rng,
    rand_core::{RngCore, SeedableRng},
};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::{
    error::{Error, Result},
    row_loss::RowLoss,
    rows::{Batching, Progress},
    stats::below,
};

/// What the gates are to become.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Goal {
    /// Closed where the loss allows it: λ, in nats a head.
    HardConcrete {
        /// What an open head costs.
        lambda: f64,
    },
    /// Open for K heads of the model.
    Subset {
        /// K.
        keep: usize,
    },
}

/// How gates are learned.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Learning {
    /// What for.
    pub goal: Goal,
    /// Steps, a batch each.
    pub steps: usize,
    /// Adam's rate.
    pub lr: f64,
    /// Seed of batches and noise.
    pub seed: u64,
}

/// β of the hard concrete distribution.
const BETA: f64 = 0.33;

/// Where the stretched distribution begins: it ends as far behind 1.
const EPS: f64 = 0.1;

/// Learns a gate for every head of `model`, which stays as it is: layers × heads, P(open) or w as [`Goal`] says.
///
/// `progress` is told of rows, [`Learning::steps`] batches.
///
/// # Errors
///
/// As [`score_heads`](crate::score_heads); [`Error::TooMany`] for more heads to keep than there are.
pub fn learn_gates(
    model: &Model,
    rows: &[Encoded],
    learning: &Learning,
    loss: &RowLoss<'_>,
    batching: &Batching,
    progress: &mut Progress<'_>,
) -> Result<Vec<Vec<f64>>> {
    loss.check(model, rows, "a score of heads by its loss")?;
    if rows.is_empty() {
        return Err(Error::Nothing("no row was given"));
    }
    if let Some(row) = rows.iter().find(|row| row.ids.is_empty()) {
        return Err(Error::EmptyRow { index: row.index });
    }
    let n_heads: Vec<usize> =
        model.layers().iter().map(|layer| layer.dims().n_heads as usize).collect();
    let n: usize = n_heads.iter().sum();
    if let Goal::Subset { keep } = learning.goal
        && keep > n
    {
        return Err(Error::TooMany { k: keep, n, layer: None });
    }
    let mut rng = ChaCha8Rng::seed_from_u64(learning.seed);
    let start = match learning.goal {
        // Open: P = 0.98.
        Goal::HardConcrete { .. } => 3.0,
        Goal::Subset { .. } => 0.0,
    };
    let mut values = vec![start; n];
    let mut adam = Adam::new(n, learning.lr);
    let mut n_rows_done = 0;
    let mut n_batches = 0;
    for _ in 0..learning.steps {
        let batch = draw(rows, batching, &mut rng);
        n_rows_done += batch.rows;
        let noise: Vec<f64> = (0..n).map(|_| uniform(&mut rng)).collect();
        let Some(slopes) = slopes(model, &n_heads, batch, loss, learning.goal, &values, &noise)?
        else {
            continue;
        };
        if slopes.iter().any(|slope| !slope.is_finite()) {
            return Err(Error::NotFinite { index: 0 });
        }
        n_batches += 1;
        adam.step(&mut values, &slopes);
        if progress(n_rows_done).is_break() {
            let n_rows = learning.steps * batching.batch_size;
            return Err(Error::Stopped { n_done: n_rows_done, n_rows });
        }
    }
    if n_batches == 0 {
        return Err(Error::Nothing("no row has a label, or a token to predict"));
    }
    let score = |value: f64| match learning.goal {
        Goal::HardConcrete { .. } => p_open(value),
        Goal::Subset { .. } => value,
    };
    let mut rest = values.as_slice();
    let of_layer = |&n: &usize| {
        let (own, behind) = rest.split_at(n);
        rest = behind;
        own.iter().map(|&value| score(value)).collect()
    };
    Ok(n_heads.iter().map(of_layer).collect())
}

/// P(g > 0) of a gate with this ln α.
fn p_open(log_alpha: f64) -> f64 {
    1.0 / (1.0 + (-(log_alpha - BETA * (EPS / (1.0 + EPS)).ln())).exp())
}

/// Rows that are drawn at random, as many as share a pass.
fn draw(rows: &[Encoded], batching: &Batching, rng: &mut ChaCha8Rng) -> Batch {
    let pick = |rng: &mut ChaCha8Rng| &rows[below(rows.len(), rng)];
    let mut batch: Vec<&Encoded> = (0..batching.batch_size.max(1)).map(|_| pick(rng)).collect();
    let longest = batch.iter().map(|row| row.ids.len()).max().unwrap_or(1);
    let most = batching.max_tokens.unwrap_or(usize::MAX) / longest;
    batch.truncate(most.max(1));
    collate(&batch, batching.pad_id, Side::Right)
}

/// Between 0 and 1, neither of them.
fn uniform(rng: &mut ChaCha8Rng) -> f64 {
    ((rng.next_u64() >> 12) as f64 + 0.5) / (1_u64 << 52) as f64
}

/// The gates of these values under this noise, `[n]`; gradients flow to `values`.
fn gates_of(goal: Goal, values: &Tensor, noise: &Tensor) -> Tensor {
    match goal {
        Goal::HardConcrete { .. } => {
            let logit = noise.log() - (-noise + 1.0).log();
            let s = ((logit + values) / BETA).sigmoid();
            (s * (1.0 + 2.0 * EPS) - EPS).clamp(0.0, 1.0)
        }
        Goal::Subset { keep } => {
            let noisy = values - (-noise.log()).log();
            // One softmax for each head kept: what an earlier one took is left to no later one.
            let mut left = noisy.shallow_clone();
            let mut relaxed = values.zeros_like();
            for _ in 0..keep {
                let taken = left.softmax(-1, None::<Kind>);
                left = left.g_add(&(-&taken + 1.0).clamp_min(1e-12).log()); // a new tensor: it is the noisy one at first
                relaxed = relaxed.g_add(&taken);
            }
            let (_, best) = noisy.topk(keep as i64, -1, true, true);
            let hard = values.zeros_like().index_fill(0, &best, 1.0);
            hard.detach() + &relaxed - relaxed.detach()
        }
    }
}

/// The gradient of the goal at `values`; `None` where no row of the batch has a loss.
fn slopes(
    model: &Model,
    n_heads: &[usize],
    batch: Batch,
    loss: &RowLoss<'_>,
    goal: Goal,
    values: &[f64],
    noise: &[f64],
) -> Result<Option<Vec<f64>>> {
    let values = Tensor::from_slice(values).set_requires_grad(true);
    let noise = Tensor::from_slice(noise);
    tch::with_grad(|| {
        let all = gates_of(goal, &values, &noise);
        let kind = if model.kind() == Kind::Double { Kind::Double } else { Kind::Float };
        let mut first = 0;
        let of_layer = |&n: &usize| {
            let own = all.narrow(0, first, n as i64).to_kind(kind).to_device(model.device());
            first += n as i64;
            (n > 0).then(|| Gate { g: own.view([1, -1, 1, 1]), fill: Fill::Zero })
        };
        let gates: Vec<Option<Gate>> = n_heads.iter().map(of_layer).collect();
        let Some((asked, losses)) = loss.of_batch(model, batch, &gates)? else { return Ok(None) };
        let n_counted = asked.counts.iter().filter(|&&count| count > 0).count();
        let mut total = losses.sum(None::<Kind>).to_kind(Kind::Double) / n_counted as f64;
        if let Goal::HardConcrete { lambda } = goal {
            let shift = BETA * (EPS / (1.0 + EPS)).ln();
            let open = (&values - shift).sigmoid().sum(Kind::Double);
            total = total.to_device(tch::Device::Cpu) + open * lambda;
        }
        let gradient = Tensor::run_backward(&[total], &[&values], false, false).remove(0);
        Ok(Some(Vec::try_from(gradient).expect("one axis of f64")))
    })
}

/// Adam with its usual constants.
struct Adam {
    lr: f64,
    step: i32,
    mean: Vec<f64>,
    square: Vec<f64>,
}

impl Adam {
    fn new(n: usize, lr: f64) -> Self {
        Self { lr, step: 0, mean: vec![0.0; n], square: vec![0.0; n] }
    }

    fn step(&mut self, values: &mut [f64], slopes: &[f64]) {
        const DECAY: [f64; 2] = [0.9, 0.999];
        self.step += 1;
        let [mean_left, square_left] = DECAY.map(|decay| 1.0 - decay.powi(self.step));
        for (at, (value, slope)) in values.iter_mut().zip(slopes).enumerate() {
            self.mean[at] = DECAY[0] * self.mean[at] + (1.0 - DECAY[0]) * slope;
            self.square[at] = DECAY[1] * self.square[at] + (1.0 - DECAY[1]) * slope * slope;
            let scale = (self.square[at] / square_left).sqrt() + 1e-8;
            *value -= self.lr * self.mean[at] / mean_left / scale;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(tensor: &Tensor) -> Vec<f64> {
        Vec::try_from(tensor.to_kind(Kind::Double)).unwrap()
    }

    #[test]
    fn gates_are_open_as_often_as_their_probability_says() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let goal = Goal::HardConcrete { lambda: 0.0 };
        for log_alpha in [-2.0, -0.5, 1.0] {
            let noise: Vec<f64> = (0..20_000).map(|_| uniform(&mut rng)).collect();
            let gates = gates_of(
                goal,
                &Tensor::full([20_000], log_alpha, (Kind::Double, tch::Device::Cpu)),
                &Tensor::from_slice(&noise),
            );
            let open = values(&gates).iter().filter(|&&gate| gate > 0.0).count() as f64 / 20_000.0;
            assert!((open - p_open(log_alpha)).abs() < 0.015, "{log_alpha}: {open}"); // four standard errors
            let whole = values(&gates).iter().filter(|&&gate| gate == 1.0).count();
            assert!(whole > 100, "the ends have mass");
        }
    }

    #[test]
    fn a_subset_has_exactly_k_heads_and_a_gradient_of_its_own() {
        let weights = Tensor::from_slice(&[0.5, -1.0, 2.0, 0.1]).set_requires_grad(true);
        let noise = Tensor::from_slice(&[0.4, 0.6, 0.3, 0.9]);
        let gates = gates_of(Goal::Subset { keep: 2 }, &weights, &noise);
        let mut found = values(&gates.detach());
        found.sort_by(f64::total_cmp);
        assert!(found.iter().zip([0.0, 0.0, 1.0, 1.0]).all(|(a, b)| (a - b).abs() < 1e-12));
        // What is pulled is drawn up: the slope of the relaxed top-K, whose sum is K whatever the weights.
        (&gates * Tensor::from_slice(&[1.0, 0.0, 0.0, 0.0])).sum(Kind::Double).backward();
        let slopes = values(&weights.grad());
        assert!(slopes[0] > 0.0 && slopes[1..].iter().all(|&slope| slope < 0.0), "{slopes:?}");
        assert!(slopes.iter().sum::<f64>().abs() < 1e-9, "{slopes:?}");
    }

    #[test]
    fn adam_finds_the_lowest_point() {
        let mut adam = Adam::new(2, 0.1);
        let mut at = [3.0, -2.0];
        for _ in 0..500 {
            let slopes = [2.0 * (at[0] - 1.0), 20.0 * (at[1] - 0.5)];
            adam.step(&mut at, &slopes);
        }
        assert!((at[0] - 1.0).abs() < 1e-2 && (at[1] - 0.5).abs() < 1e-2, "{at:?}");
    }
}
