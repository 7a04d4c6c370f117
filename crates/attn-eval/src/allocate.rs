//! One candidate a layer under a budget: the choice whose summed divergence is least.
//!
//! ```text
//! min Σ_l kl(l, c_l)   over one candidate c_l a layer, with   Σ_l cost(l, c_l) ≤ budget
//! ```
//!
//! A knapsack with a choice in each layer (Kellerer, Pferschy and Pisinger 2004, "Knapsack Problems", chapter 11). Solved
//! exactly: layer by layer, the sums that no other beats in both divergence and cost go on, but for those that cannot
//! come below the best choice known so far whatever follows. What can follow is bounded by the same problem with mixtures
//! of candidates allowed, which taking the steepest descents first solves.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// What attention costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cost {
    /// Floating point operations of a pass: [`Attention::flops`](attn_core::attention::Attention::flops).
    Flops,
    /// Bytes kept between tokens in decoding: [`state_bytes`](crate::state_bytes).
    StateBytes,
}

impl std::fmt::Display for Cost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Flops => "floating point operations",
            Self::StateBytes => "bytes of decoding state",
        })
    }
}

/// The most that all layers may cost together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Budget {
    /// Of what.
    pub cost: Cost,
    /// At most so much.
    pub most: u64,
}

/// A candidate of a layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Offer {
    /// What it takes from the model's likeness to what it was; any finite number.
    pub kl: f64,
    /// What it costs, in the budget's units.
    pub cost: u64,
}

/// How much further a bound must be off than sums are rounded before anything is left out, of numbers around 1; more by as much
/// as they are larger.
const SLACK: f64 = 1e-9;

/// The place of the candidate chosen in each of `layers`.
///
/// # Errors
///
/// [`Error::Budget`] where the cheapest candidates cost more, [`Error::Nothing`] for a layer without one.
pub fn allocate(layers: &[Vec<Offer>], budget: Budget) -> Result<Vec<usize>> {
    let Budget { cost, most } = budget;
    let fronts: Vec<Vec<Placed>> = layers.iter().map(|offers| front(offers)).collect();
    if fronts.iter().any(Vec::is_empty) {
        return Err(Error::Nothing("a layer has no candidate"));
    }
    let least = fronts.iter().map(|front| front[0].offer.cost).sum();
    if least > most {
        return Err(Error::Budget { cost, most, least });
    }
    // Behind each layer, and behind the last: nothing.
    let rests: Vec<Rest> = (1..=fronts.len()).map(|next| Rest::of(&fronts[next..])).collect();
    let size = layers.iter().flatten().map(|offer| offer.kl.abs()).fold(1.0, f64::max);
    let mut best = f64::INFINITY;
    let mut reached = vec![vec![Sum { kl: 0.0, cost: 0, from: 0, chosen: 0 }]];
    for (front, rest) in fronts.iter().zip(&rests) {
        let before = reached.last().expect("there is one more than layers done");
        let mut sums = Vec::new();
        for (from, sum) in before.iter().enumerate() {
            for &Placed { chosen, offer } in front {
                let (kl, cost) = (sum.kl + offer.kl, sum.cost + offer.cost);
                let Some(left) = most.checked_sub(cost + rest.least) else { break };
                let [low, high] = rest.bounds(left);
                if kl + low <= best + SLACK * size {
                    best = best.min(kl + high);
                    sums.push(Sum { kl, cost, from, chosen });
                }
            }
        }
        sums.sort_by(|a, b| a.cost.cmp(&b.cost).then(a.kl.total_cmp(&b.kl)));
        let mut lowest = f64::INFINITY;
        sums.retain(|sum| {
            let is_better = sum.kl < lowest;
            lowest = lowest.min(sum.kl);
            is_better
        });
        reached.push(sums);
    }
    // Of the sums that are left the dearest is the lowest.
    let mut at = reached[fronts.len()].len() - 1;
    let mut choice: Vec<usize> = reached[1..]
        .iter()
        .rev()
        .map(|sums| {
            let Sum { from, chosen, .. } = sums[at];
            at = from;
            chosen
        })
        .collect();
    choice.reverse();
    Ok(choice)
}

/// Candidates of the layers so far, added up.
struct Sum {
    kl: f64,
    cost: u64,
    /// The sum one layer before.
    from: usize,
    chosen: usize,
}

/// A candidate and its place in its layer.
#[derive(Clone, Copy)]
struct Placed {
    chosen: usize,
    offer: Offer,
}

/// The candidates that no other beats in both, by rising cost and falling divergence.
fn front(offers: &[Offer]) -> Vec<Placed> {
    let mut placed: Vec<Placed> =
        (0..).zip(offers).map(|(chosen, &offer)| Placed { chosen, offer }).collect();
    placed.sort_by(|a, b| {
        let (a, b) = (a.offer, b.offer);
        a.cost.cmp(&b.cost).then(a.kl.total_cmp(&b.kl))
    });
    let mut lowest = f64::INFINITY;
    placed.retain(|Placed { offer, .. }| {
        let is_better = offer.kl < lowest;
        lowest = lowest.min(offer.kl);
        is_better
    });
    placed
}

/// What the layers that are left can come to.
struct Rest {
    /// The cheapest candidates' cost.
    least: u64,
    /// Cost above the cheapest, and divergence, after each step down from them, steepest first.
    steps: Vec<(u64, f64)>,
}

impl Rest {
    fn of(fronts: &[Vec<Placed>]) -> Self {
        let mut descents: Vec<(u64, f64)> = fronts.iter().flat_map(|front| hull(front)).collect();
        let slope = |&(cost, kl): &(u64, f64)| kl / cost as f64;
        // Those of a layer stay in order: its slopes flatten.
        descents.sort_by(|a, b| slope(a).total_cmp(&slope(b)));
        let first = fronts.iter().map(|front| front[0].offer.kl).sum();
        let mut steps = vec![(0, first)];
        for (cost, kl) in descents {
            let (before_cost, before_kl) = steps[steps.len() - 1];
            steps.push((before_cost + cost, before_kl + kl));
        }
        Self { least: fronts.iter().map(|front| front[0].offer.cost).sum(), steps }
    }

    /// What the layers come to at least with `left` to spend above the cheapest, and what they come to if the steps that fit
    /// whole are taken.
    fn bounds(&self, left: u64) -> [f64; 2] {
        let n_fit = self.steps.partition_point(|&(cost, _)| cost <= left);
        let (cost, high) = self.steps[n_fit - 1]; // The first costs nothing.
        let low = self.steps.get(n_fit).map_or(high, |&(next_cost, next)| {
            high + (next - high) * (left - cost) as f64 / (next_cost - cost) as f64
        });
        [low, high]
    }
}

/// The steps from candidate to candidate along the lower convex hull of a front: cost more, and divergence less.
fn hull(front: &[Placed]) -> Vec<(u64, f64)> {
    let mut corners: Vec<Offer> = Vec::new();
    let step = |a: Offer, b: Offer| ((b.cost - a.cost), b.kl - a.kl);
    for &Placed { offer, .. } in front {
        while let [.., a, b] = corners[..] {
            let ((first_cost, first), (cost, kl)) = (step(a, b), step(b, offer));
            if first * cost as f64 >= kl * first_cost as f64 {
                corners.pop(); // Steeper behind than before: not on the hull.
            } else {
                break;
            }
        }
        corners.push(offer);
    }
    corners.windows(2).map(|pair| step(pair[0], pair[1])).collect()
}

#[cfg(test)]
mod tests {
    use rand_chacha::{
        ChaCha8Rng,
        rand_core::{RngCore, SeedableRng},
    };

    use super::*;

    fn total(layers: &[Vec<Offer>], choice: &[usize]) -> (f64, u64) {
        let chosen = layers.iter().zip(choice).map(|(offers, &at)| offers[at]);
        chosen.fold((0.0, 0), |(kl, cost), offer| (kl + offer.kl, cost + offer.cost))
    }

    /// Every choice there is.
    fn by_trying(layers: &[Vec<Offer>], most: u64) -> Option<f64> {
        let mut all = vec![(0.0, 0)];
        for offers in layers {
            all = all
                .iter()
                .flat_map(|(kl, cost)| offers.iter().map(move |o| (kl + o.kl, cost + o.cost)))
                .collect();
        }
        let within = all.into_iter().filter(|(_, cost)| *cost <= most).map(|(kl, _)| kl);
        within.min_by(f64::total_cmp)
    }

    /// Layers with costs below `dearest`; divergences of a few values, so that there are ties, or of many.
    fn drawn(
        rng: &mut ChaCha8Rng,
        n_layers: usize,
        n_offers: u64,
        dearest: u64,
    ) -> Vec<Vec<Offer>> {
        let few = rng.next_u64().is_multiple_of(2);
        let mut below = |n: u64| rng.next_u64() % n;
        let mut offer = || Offer {
            kl: if few { below(5) as f64 } else { below(1 << 40) as f64 / 1e10 - 10.0 },
            cost: below(dearest),
        };
        let mut layer = |n: u64| (0..n).map(|_| offer()).collect();
        (0..n_layers).map(|at| layer(1 + (at as u64 * 7 + n_offers) % n_offers)).collect()
    }

    const COST: Cost = Cost::StateBytes;

    #[test]
    fn the_choice_is_the_best_of_all() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let mut n_unmet = 0;
        for round in 0..4000 {
            let n_layers = 1 + round % 6;
            let dearest = [3, 10, 1000, 1 << 40][round % 4];
            let layers = drawn(&mut rng, n_layers, 5, dearest);
            let most = rng.next_u64() % (dearest * n_layers as u64);
            match (allocate(&layers, Budget { cost: COST, most }), by_trying(&layers, most)) {
                (Ok(choice), Some(expected)) => {
                    let (kl, cost) = total(&layers, &choice);
                    assert!(cost <= most, "{cost} of {most}: {layers:?}");
                    assert!((kl - expected).abs() < 1e-9, "{kl} for {expected}: {layers:?}");
                }
                (Err(Error::Budget { least, .. }), None) => {
                    assert!(by_trying(&layers, least).is_some() && least > most);
                    assert!(by_trying(&layers, least - 1).is_none());
                    n_unmet += 1;
                }
                (found, expected) => panic!("{found:?} for {expected:?}: {layers:?}"),
            }
        }
        assert!((200..2000).contains(&n_unmet), "{n_unmet}");
    }

    #[test]
    fn the_steepest_descent_is_not_taken_where_it_is_in_the_way() {
        // Greedy by divergence a byte takes the second of the first layer, and then nothing else fits.
        let layer = |offers: &[(f64, u64)]| -> Vec<Offer> {
            offers.iter().map(|&(kl, cost)| Offer { kl, cost }).collect()
        };
        let layers = [
            layer(&[(1.0, 0), (0.4, 6)]),
            layer(&[(1.0, 0), (0.55, 5)]),
            layer(&[(1.0, 0), (0.55, 5)]),
        ];
        let choice = allocate(&layers, Budget { cost: COST, most: 10 }).unwrap();
        assert_eq!(choice, [0, 1, 1]);
    }

    #[test]
    fn a_hundred_layers_of_twenty_candidates_are_done() {
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        let mut slowest = std::time::Duration::ZERO;
        for round in 0..6 {
            let dearest = [1 << 20, 1 << 40, 50][round % 3];
            let mut layers = drawn(&mut rng, 100, 20, dearest);
            // As measured: dearer is better, by less and less, and not quite.
            for offer in layers.iter_mut().flatten() {
                let share = offer.cost as f64 / dearest as f64;
                offer.kl = (1.0 - share).powi(2) + 0.1 * offer.kl.abs().min(1.0);
            }
            let least: u64 = layers.iter().map(|l| l.iter().map(|o| o.cost).min().unwrap()).sum();
            let most = least + dearest * 20;
            let started = std::time::Instant::now();
            let (kl, cost) =
                total(&layers, &allocate(&layers, Budget { cost: COST, most }).unwrap());
            slowest = slowest.max(started.elapsed());

            let fronts: Vec<Vec<Placed>> = layers.iter().map(|offers| front(offers)).collect();
            let [low, high] = Rest::of(&fronts).bounds(most - least);
            assert!(cost <= most && low - 1e-9 <= kl && kl <= high + 1e-9, "{low} {kl} {high}");
        }
        assert!(slowest.as_secs() < 5, "{slowest:?}");
    }

    #[test]
    fn what_cannot_be_chosen_is_said() {
        let layers = [vec![Offer { kl: 1.0, cost: 3 }], vec![Offer { kl: 1.0, cost: 4 }]];
        let refused = allocate(&layers, Budget { cost: COST, most: 6 }).unwrap_err().to_string();
        assert!(refused.contains("6 bytes of decoding state") && refused.contains("costs 7"));
        let none = allocate(&[Vec::new()], Budget { cost: COST, most: 6 });
        assert!(matches!(none, Err(Error::Nothing(_))));
        assert_eq!(allocate(&[], Budget { cost: COST, most: 0 }).unwrap(), [0usize; 0]);
    }
}
