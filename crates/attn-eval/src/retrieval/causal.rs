//! Whether heads cause what they score for: answers with the best heads masked against as many drawn at random.
//!
//! A difference to the untouched model says little: any heads may be missed. What counts is where the best heads fall among
//! random ones, of which one draw is no measure: [`Band`] holds at least some twenty.

use attn_core::{Fill, Gate, Model};
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::Answered;
use crate::ablate::Head;
use crate::stats::{Interval, below, bootstrap_mean, wilson};

/// What a masked head is left with.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MaskFill {
    /// Nothing: its output is zero.
    #[default]
    Zero,
    /// A query of zeros: it attends to all tokens alike, as Wu et al. 2024 mask heads.
    Uniform,
}

/// Gates that mask `heads` and leave the others.
///
/// # Panics
///
/// For a head that the model does not have.
pub fn closed(model: &Model, heads: &[Head], fill: MaskFill) -> Vec<Option<Gate>> {
    let layers = model.layers();
    assert!(heads.iter().all(|head| head.layer < layers.len()), "{heads:?}");
    let gate = |(at, layer): (usize, &&attn_core::layer::AttnLayer)| {
        let mut open = vec![1.0_f64; layer.dims().n_heads as usize];
        heads.iter().filter(|head| head.layer == at).for_each(|head| open[head.place] = 0.0);
        let is_open = open.iter().all(|&open| open == 1.0);
        (!is_open).then(|| {
            let g = Tensor::from_slice(&open).to_kind(Kind::Float).to_device(model.device());
            let fill = match fill {
                MaskFill::Zero => Fill::Zero,
                MaskFill::Uniform => Fill::ZeroQuery,
            };
            Gate { fill, ..Gate::per_head(&g) }
        })
    };
    layers.iter().enumerate().map(gate).collect()
}

/// Draws `n_draws` sets of `k` heads from `heads` without those in `except`, each without repeats; the same for the same
/// `seed`. `None` where fewer than `k` are left.
pub fn draw_heads(
    heads: &[Head],
    except: &[Head],
    k: usize,
    n_draws: usize,
    seed: u64,
) -> Option<Vec<Vec<Head>>> {
    let others: Vec<Head> = heads.iter().filter(|head| !except.contains(head)).copied().collect();
    if others.len() < k {
        return None;
    }
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut draw = |_| {
        let mut left = others.clone();
        let mut drawn: Vec<Head> =
            (0..k).map(|_| left.swap_remove(below(left.len(), &mut rng))).collect();
        drawn.sort_unstable();
        drawn
    };
    Some((0..n_draws).map(&mut draw).collect())
}

/// How good answers are.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct AnswerScore {
    /// Mean over answers of the share of the words expected that they have.
    pub rouge1_recall: f64,
    /// Its 95 % interval: answers drawn again with replacement (bootstrap, percentiles, 1,000 draws of seed 0).
    pub rouge1_interval_95: Interval,
    /// Share of the answers that have them one after another.
    pub word_match: f64,
    /// Its 95 % interval (Wilson).
    pub word_match_interval_95: Interval,
    /// Answers.
    pub n: usize,
}

impl AnswerScore {
    /// Counts answers; `None` where there are none.
    pub fn of<'a>(answers: impl IntoIterator<Item = &'a Answered>) -> Option<Self> {
        let answers: Vec<&Answered> = answers.into_iter().collect();
        let recalls: Vec<f64> = answers.iter().map(|answer| answer.rouge1_recall).collect();
        let (n, n_matched) =
            (answers.len(), answers.iter().filter(|answer| answer.word_match).count());
        Some(Self {
            rouge1_interval_95: bootstrap_mean(&recalls, 0.95, 1000, 0).ok()?,
            rouge1_recall: recalls.iter().sum::<f64>() / n as f64,
            word_match_interval_95: wilson(n_matched as u64, n as u64, 0.95).ok()?,
            word_match: n_matched as f64 / n as f64,
            n,
        })
    }
}

/// Where a score with the best heads masked falls among scores with random ones masked.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Band {
    /// Mean over the draws.
    pub mean: f64,
    /// The lowest.
    pub low: f64,
    /// The highest.
    pub high: f64,
    /// Draws.
    pub n_draws: usize,
    /// (1 + draws that do as badly or worse) / (1 + draws): what chance explains, of masking random heads. It cannot be lower
    /// than 1 / (1 + draws).
    pub p_value: f64,
}

/// The band of `draws` around `value`; `None` where there is no draw.
pub fn band(value: f64, draws: &[f64]) -> Option<Band> {
    let n_draws = draws.len();
    let n_as_bad = draws.iter().filter(|&&draw| draw <= value).count();
    (n_draws > 0).then(|| Band {
        mean: draws.iter().sum::<f64>() / n_draws as f64,
        low: draws.iter().copied().fold(f64::INFINITY, f64::min),
        high: draws.iter().copied().fold(f64::NEG_INFINITY, f64::max),
        n_draws,
        p_value: (1 + n_as_bad) as f64 / (1 + n_draws) as f64,
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn random_heads_are_others_and_no_two_alike() {
        let of_layer = |layer| (0..4).map(move |place| Head { layer, place });
        let heads: Vec<Head> = (0..3).flat_map(of_layer).collect();
        let best = [Head { layer: 0, place: 1 }, Head { layer: 2, place: 3 }];
        let draws = draw_heads(&heads, &best, 4, 40, 7).unwrap();
        assert_eq!(draws.len(), 40);
        let mut seen = BTreeSet::new();
        for draw in &draws {
            let distinct: BTreeSet<_> = draw.iter().copied().collect();
            assert_eq!((draw.len(), distinct.len()), (4, 4), "{draw:?}");
            assert!(draw.iter().all(|head| heads.contains(head) && !best.contains(head)));
            seen.extend(distinct);
        }
        assert_eq!(seen.len(), 10, "every other head comes up");
        assert_eq!(draw_heads(&heads, &best, 4, 40, 7).unwrap(), draws);
        assert_ne!(draw_heads(&heads, &best, 4, 40, 8).unwrap(), draws);
        assert!(draw_heads(&heads, &best, 10, 1, 0).is_some());
        assert_eq!(draw_heads(&heads, &best, 11, 1, 0), None);
    }

    #[test]
    fn a_value_below_all_draws_has_the_least_p() {
        let draws = [0.5, 0.75, 1.0];
        let found = band(0.25, &draws).unwrap();
        assert_eq!((found.mean, found.low, found.high, found.p_value), (0.75, 0.5, 1.0, 0.25));
        assert_eq!(band(0.5, &draws).unwrap().p_value, 0.5, "as bad counts");
        assert_eq!(band(1.0, &draws).unwrap().p_value, 1.0);
        assert_eq!(band(1.0, &[]), None);
    }

    #[test]
    fn answers_are_counted() {
        let of = |response: &str| Answered::of("a b", response.into()).unwrap();
        let answers = [of("so a b"), of("b a"), of("a c"), of("")];
        let found = AnswerScore::of(&answers).unwrap();
        assert_eq!((found.rouge1_recall, found.word_match, found.n), (0.625, 0.25, 4));
        assert!(found.rouge1_interval_95.low < 0.625 && found.rouge1_interval_95.high > 0.625);
        assert_eq!(AnswerScore::of([]), None);
    }
}
