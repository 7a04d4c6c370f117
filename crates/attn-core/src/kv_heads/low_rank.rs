//! The directions that a group's heads need most, read by each through a matrix of its own.
//!
//! ```text
//! min over P, C of Σ_j E (x_j − C_j x̂)ᵀ T_j (x_j − C_j x̂),   x̂ = Σ_j P_j x_j,  of head_dim channels
//! S = T^½ X T^½ = U Λ Uᵀ      P = U_dᵀ T^½      C = X Pᵀ (P X Pᵀ)⁺ = X T^½ U_d Λ_d⁺        (x, P, C stacked over the group)
//! ```
//!
//! The best linear code of the group's keys (values) in as many channels as one head has, errors counted by what they do to scores
//! (outputs): principal components of a weighted second moment, in closed form (Eckart and Young 1936). What the latent of multi-head latent
//! attention does for all heads of a layer (DeepSeek-AI 2024, <https://arxiv.org/abs/2405.04434>, section 2.1.2), and its conversion from
//! activations (Meng et al. 2025, "TransMLA", <https://arxiv.org/abs/2502.07864>), kept here to what a grouped-query layer can hold.
//! Orthogonal maps ([`super::aligned`]) are a special case. Keys that positions turn have one complex number a plane in place of each
//! matrix, which commutes with that: the same problem plane by plane, over ℂ.

use tch::{Device, Kind, Tensor};

use super::{
    Maps,
    space::{Space, complex, in_planes, rows, traces},
};

/// Eigenvalues below this share of the largest are none.
pub(super) const RANK: f64 = 1e-12;

/// What two heads in one lose, as a share of all that there is to lose.
pub(super) fn pair_costs(space: &Space) -> Vec<Vec<f64>> {
    let n = space.n();
    let total = space.total().max(f64::MIN_POSITIVE);
    let mut costs = vec![vec![0.0; n as usize]; n as usize];
    for i in 0..n {
        for j in 0..i {
            let spectrum = match space.rotary {
                true => Planes::of(space, &[i, j]).values, // [planes, 2]
                false => weighted(space, &[i, j]).1.linalg_eigvalsh("L").unsqueeze(0),
            };
            // Ascending: the first half is what does not fit.
            let lost = spectrum.narrow(1, 0, spectrum.size()[1] / 2).clamp_min(0.0);
            let cost = lost.sum(Kind::Double).double_value(&[]) / total;
            (costs[i as usize][j as usize], costs[j as usize][i as usize]) = (cost, cost);
        }
    }
    costs
}

/// The maps of each group.
pub(super) fn maps(space: &Space, groups: &[Vec<i64>]) -> Maps {
    let d = space.gains.size()[1];
    let [pull, push] =
        [(); 2].map(|()| Tensor::zeros([space.n(), d, d], (Kind::Double, Device::Cpu)));
    for group in groups {
        let (p, c) = match space.rotary {
            true => Planes::of(space, group).maps(),
            false => of_group(space, group),
        };
        // Any scale of x̂ does: the heads' own.
        let old: Vec<Tensor> = group.iter().map(|&j| space.moment(j, j)).collect();
        let old = traces(&Tensor::stack(&old, 0)).mean(Kind::Double).double_value(&[]);
        let new =
            p.unsqueeze(1).matmul(&space.among(group)).matmul(&p.transpose(1, 2).unsqueeze(0));
        let new = traces(&new).sum(Kind::Double).double_value(&[]);
        let scale = if new > 0.0 && old > 0.0 { (old / new).sqrt() } else { 1.0 };
        for (place, &head) in (0..).zip(group) {
            pull.get(head).copy_(&(p.get(place) * scale));
            push.get(head).copy_(&(c.get(place) / scale));
        }
    }
    Maps { pull, push }
}

/// T^½ and S of a group: `[g · d, g · d]` each.
fn weighted(space: &Space, group: &[i64]) -> (Tensor, Tensor) {
    let moments = space.among(group);
    let [g, _, d, _] = moments.size()[..] else { unreachable!("a matrix a pair") };
    let roots = roots(&rows(&space.gains, group));
    let blocks: Vec<Tensor> = (0..g).map(|at| roots.get(at)).collect();
    let root = Tensor::block_diag(&blocks);
    let x = moments.transpose(1, 2).reshape([g * d, g * d]);
    let s = root.matmul(&x).matmul(&root);
    (root, (&s + s.tr()) / 2.0)
}

/// The roots of positive matrices, `[.., d, d]`.
pub(super) fn roots(x: &Tensor) -> Tensor {
    let (values, vectors) = x.linalg_eigh("L");
    (&vectors * values.clamp_min(0.0).sqrt().unsqueeze(-2)).matmul(&vectors.transpose(-2, -1))
}

/// P and C of a group: `[g, d, d]` each.
fn of_group(space: &Space, group: &[i64]) -> (Tensor, Tensor) {
    let (root, s) = weighted(space, group);
    let (g, d) = (group.len() as i64, space.gains.size()[1]);
    let (values, vectors) = s.linalg_eigh("L");
    let (top, best) = (values.narrow(0, (g - 1) * d, d), vectors.narrow(1, (g - 1) * d, d)); // ascending
    let p = best.tr().matmul(&root); // [d, g·d]
    let x = space.among(group).transpose(1, 2).reshape([g * d, g * d]);
    let bar = top.max().double_value(&[]) * RANK;
    let inverse = top.reciprocal().where_scalarother(&top.gt(bar.max(f64::MIN_POSITIVE)), 0.0);
    let c = x.matmul(&root).matmul(&best) * inverse.unsqueeze(0); // [g·d, d]
    (p.view([d, g, d]).transpose(0, 1), c.view([g, d, d]))
}

/// A group's keys as one complex number a plane and head.
struct Planes {
    /// X: mean x_i x̄_j, `[planes, g, g]`.
    moments: Tensor,
    /// T^½ of each, `[planes, g]`, real.
    roots: Tensor,
    /// Λ ascending, `[planes, g]`, and U, `[planes, g, g]`.
    values: Tensor,
    vectors: Tensor,
}

impl Planes {
    fn of(space: &Space, group: &[i64]) -> Self {
        let moments = space.among(group);
        let [re, im] = complex(&moments); // [g, g, planes]
        let moments = Tensor::complex(&(re * 2.0), &(im * 2.0)).permute([2, 0, 1]);
        // Over positions a plane is turned all ways: its two directions count alike.
        let [gains, _] = complex(&rows(&space.gains, group));
        let roots = gains.clamp_min(0.0).sqrt().tr();
        let s = roots.unsqueeze(2) * &moments * roots.unsqueeze(1);
        let (values, vectors) = s.linalg_eigh("L");
        Self { moments, roots, values, vectors }
    }

    /// P and C: `[g, d, d]` each.
    fn maps(&self) -> (Tensor, Tensor) {
        let g = self.values.size()[1];
        let top = self.values.select(1, g - 1); // [planes]
        let best = self.vectors.select(2, g - 1); // [planes, g]
        let p = best.conj().resolve_conj() * &self.roots;
        let bar = top.max().double_value(&[]) * RANK;
        let inverse = top.reciprocal().where_scalarother(&top.gt(bar.max(f64::MIN_POSITIVE)), 0.0);
        let c = self.moments.matmul(&(&self.roots * &best).unsqueeze(2)).squeeze_dim(2)
            * inverse.unsqueeze(1);
        let of = |x: &Tensor| in_planes(&[x.real(), x.imag()].map(|part| part.tr())); // [g, d, d]
        (of(&p), of(&c))
    }
}
