//! Heads turned onto each other before they are merged.
//!
//! ```text
//! R = argmax over orthogonal R of Σ_{i<j} w_i w_j tr(R_i X_ij R_jᵀ)        P_j = w_j R_j / Σ w,  C_j = R_jᵀ,  w_j ∝ tr T_j
//! ```
//!
//! X_ij = E x_i x_jᵀ over a text: generalized Procrustes analysis (Gower 1975), solved head by head. Scores and outputs do not change when
//! keys and queries, or values and the output projection, are turned together, but turned heads have means. Keys that are turned by
//! their positions may only be turned within their rotary planes, which commutes with that.
//!
//! Jin et al. 2024, "Align Attention Heads Before Merging Them", <https://arxiv.org/abs/2412.20677>, section 3. They weigh all heads
//! alike; here a head counts by what an error of it costs.

use tch::{Device, Kind, Tensor};

use super::{
    Maps,
    space::{Space, complex, in_planes, numbers, rows, traces},
};

/// Rounds of turning every head of a group once, at most.
const N_ROUNDS: usize = 500;

/// What merging two heads costs once they are turned onto each other, as a share of all that there is to lose.
pub(super) fn pair_costs(space: &Space) -> Vec<Vec<f64>> {
    costs_by(space, &space.weights(), |cross| turn(space, cross).1)
}

/// What merging two heads costs as they stand, all heads alike.
pub(super) fn pair_costs_as_they_stand(space: &Space) -> Vec<Vec<f64>> {
    costs_by(space, &vec![1.0; space.n() as usize], |cross| traces(cross).double_value(&[]))
}

/// w_i w_j/(w_i + w_j) · E‖x_i − x_j‖², where `agreement` says what E x_i·x_j comes to, relative to Σ w E‖x‖².
fn costs_by(space: &Space, w: &[f64], agreement: impl Fn(&Tensor) -> f64) -> Vec<Vec<f64>> {
    let n = w.len();
    let energy: Vec<f64> =
        (0..n as i64).map(|j| traces(&space.moment(j, j)).double_value(&[])).collect();
    let total: f64 = energy.iter().zip(w).map(|(energy, w)| energy * w).sum();
    let mut costs = vec![vec![0.0; n]; n];
    for i in 0..n {
        for j in 0..i {
            let apart = energy[i] + energy[j] - 2.0 * agreement(&space.moment(j as i64, i as i64));
            let cost = w[i] * w[j] / (w[i] + w[j]) * apart.max(0.0) / total.max(f64::MIN_POSITIVE);
            (costs[i][j], costs[j][i]) = (cost, cost);
        }
    }
    costs
}

/// The maps of each group.
pub(super) fn maps(space: &Space, groups: &[Vec<i64>]) -> Maps {
    let n = space.n();
    let d = space.gains.size()[1];
    let w = space.weights();
    let turns = Tensor::zeros([n, d, d], (Kind::Double, Device::Cpu));
    let mut share = vec![0.0; n as usize];
    for group in groups {
        let of_group: Vec<f64> = group.iter().map(|&head| w[head as usize]).collect();
        let all: f64 = of_group.iter().sum();
        for ((&head, turn), w) in group.iter().zip(turned(space, group, &of_group)).zip(of_group) {
            turns.get(head).copy_(&turn);
            share[head as usize] = w / all;
        }
    }
    let share = Tensor::from_slice(&share).view([n, 1, 1]);
    Maps { pull: share * &turns, push: turns.transpose(1, 2) }
}

/// R of each head of a group, the first one's 1.
fn turned(space: &Space, group: &[i64], w: &[f64]) -> Vec<Tensor> {
    let moments = space.among(group);
    let d = moments.size()[2];
    let weights = Tensor::from_slice(w).view([-1, 1, 1]);
    // Each begins turned onto the first.
    let mut turns: Vec<Tensor> = (0..group.len() as i64)
        .map(|place| match place {
            0 => Tensor::eye(d, (Kind::Double, Device::Cpu)),
            _ => turn(space, &moments.get(place).get(0)).0,
        })
        .collect();
    let mut before = f64::NEG_INFINITY;
    for _ in 0..N_ROUNDS {
        let mut agreement = 0.0;
        for place in 1..group.len() {
            let others: Vec<i64> =
                (0..group.len() as i64).filter(|&at| at != place as i64).collect();
            let stacked = rows(&(Tensor::stack(&turns, 0) * &weights), &others); // w_i R_i
            let cross = rows(&moments.get(place as i64), &others).matmul(&stacked.transpose(1, 2));
            let cross = cross.sum_dim_intlist([0i64].as_slice(), false, Kind::Double);
            let (best, reached) = turn(space, &cross);
            turns[place] = best;
            agreement += w[place] * reached;
        }
        if agreement <= before + 1e-12 * agreement.abs() {
            break;
        }
        before = agreement;
    }
    turns
}

/// The orthogonal R with the largest tr(R `cross`), of rotations within planes where these are all that may be, and that trace.
fn turn(space: &Space, cross: &Tensor) -> (Tensor, f64) {
    if !space.rotary {
        let (u, s, v) = cross.svd(true, true);
        return (v.matmul(&u.tr()), s.sum(Kind::Double).double_value(&[]));
    }
    // R = [[c, −s], [s, c]] in the plane (i, i + d/2): c (x_ii + x_jj) + s (x_ij − x_ji), j = i + d/2.
    let [same, across] = complex(cross).map(|part| numbers(&part));
    let mut reached = 0.0;
    let mut turns = Vec::new();
    for (same, across) in same.into_iter().zip(across) {
        let (c, s) = (2.0 * same, -2.0 * across);
        let size = c.hypot(s);
        reached += size;
        turns.push(if size > 0.0 { [c / size, s / size] } else { [1.0, 0.0] });
    }
    let parts = [0, 1].map(|at| {
        let part: Vec<f64> = turns.iter().map(|turn: &[f64; 2]| turn[at]).collect();
        Tensor::from_slice(&part)
    });
    (in_planes(&parts), reached)
}
