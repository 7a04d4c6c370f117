//! What kinds that learn or draw their feature maps share: one matrix a head, and orthonormal rows.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::{
    Error,
    attention::{Dims, Own, Param},
    linear::Features,
    nn::Visitor,
    weights::Init,
};

/// Random orthonormal rows, `n_rows` times `width` values, distributed evenly over the sphere: Gaussian rows, each made
/// orthogonal to those before. (A QR decomposition fixes signs by a rule of its own, and its rows lean to one side.)
pub(crate) fn orthonormal_rows(rng: &mut ChaCha8Rng, n_rows: usize, width: usize) -> Vec<f64> {
    assert!(n_rows <= width, "there are no {n_rows} orthonormal rows of {width} values");
    let mut rows: Vec<f64> = Vec::with_capacity(n_rows * width);
    for _ in 0..n_rows {
        let mut row: Vec<f64> = (0..width).map(|_| StandardNormal.sample(rng)).collect();
        // Twice: where rows are nearly dependent once leaves a rest.
        for _ in 0..2 {
            for other in rows.chunks(width) {
                let dot: f64 = row.iter().zip(other).map(|(x, y)| x * y).sum();
                row.iter_mut().zip(other).for_each(|(x, y)| *x -= dot * y);
            }
        }
        let norm = row.iter().map(|x| x * x).sum::<f64>().sqrt();
        rows.extend(row.iter().map(|x| x / norm));
    }
    rows
}

/// For each head a random matrix `[n_in, n_out]` with orthonormal columns, or rows where there are fewer of those:
/// `[n_heads, n_in, n_out]`. The same for every layer.
pub(crate) fn orthogonal_start(n_heads: i64, n_in: i64, n_out: i64) -> Tensor {
    let matrices: Vec<Tensor> = (0..n_heads)
        .map(|head| {
            let mut rng = ChaCha8Rng::seed_from_u64(0);
            rng.set_stream(head as u64);
            let (n_rows, width) = (n_in.min(n_out), n_in.max(n_out));
            let rows = orthonormal_rows(&mut rng, n_rows as usize, width as usize);
            let rows = Tensor::from_slice(&rows).view([n_rows, width]);
            if n_in <= n_out { rows } else { rows.tr() }
        })
        .collect();
    Tensor::stack(&matrices, 0)
}

/// A learned linear map of queries and another of keys for each query head.
///
/// Keys have a map for each query head, not for each key/value head, as in the published LoLCATs code: what a kind
/// learned survives a regrouping.
#[derive(Debug)]
pub(crate) struct HeadMaps {
    /// `[n_heads, head_dim, feature_dim]`.
    pub(crate) q: Param,
    /// `[n_heads, head_dim, feature_dim]`.
    pub(crate) k: Param,
}

impl HeadMaps {
    /// `q_map.weight` and `k_map.weight`, both starting at `start`, `[n_heads, head_dim, feature_dim]`.
    pub(crate) fn new(own: &mut Own<'_, '_>, start: &Tensor) -> Result<Self, Error> {
        let mut get = |name| own.get(name, &start.size(), Init::Value(start.shallow_clone()));
        Ok(Self { q: get("q_map.weight")?, k: get("k_map.weight")? })
    }

    /// Maps that start as the identity where features are as many as channels, else as a random orthogonal matrix.
    pub(crate) fn near_identity(
        own: &mut Own<'_, '_>,
        dims: &Dims,
        feature_dim: i64,
    ) -> Result<Self, Error> {
        let Dims { n_heads, head_dim, .. } = *dims;
        let start = if feature_dim == head_dim {
            Tensor::eye(head_dim, (tch::Kind::Double, tch::Device::Cpu))
                .expand([n_heads, head_dim, head_dim], false)
        } else {
            orthogonal_start(n_heads, head_dim, feature_dim)
        };
        Self::new(own, &start)
    }

    pub(crate) fn visit(&self, f: &mut Visitor<'_>) {
        f(&self.q.name, &self.q.tensor);
        f(&self.k.name, &self.k.tensor);
    }

    pub(crate) fn select_heads(&mut self, heads: &[i64]) {
        self.q.select(0, heads);
        self.k.select(0, heads);
    }
}

/// `[b, n_heads, n, head_dim] -> [b, n_heads, n, feature_dim]`, by a matrix for each head.
pub(crate) fn project(x: &Tensor, weight: &Tensor) -> Tensor {
    x.matmul(&weight.to_kind(x.kind()))
}

/// What becomes of the mapped channels u = xW.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// softmax(u) ⊕ softmax(−u), each over the features.
    #[default]
    Softmax,
    /// exp(u) ⊕ exp(−u).
    Exp,
}

/// The least a feature may be, relative to the largest, as in the published code: products stay above 0 in `f32`.
const LEAST: f64 = 1e-12;

impl Activation {
    /// Hedgehog's features, `[.., feature_dim] -> [.., 2·feature_dim]`, with a log factor where they may be too large
    /// for a float.
    pub(crate) fn features(self, u: &Tensor) -> Features {
        match self {
            Self::Softmax => {
                let both = [u.softmax(-1, u.kind()), (-u).softmax(-1, u.kind())];
                Features { values: Tensor::cat(&both, -1).clamp_min(LEAST), log_scale: None }
            }
            Self::Exp => {
                let both = Tensor::cat(&[u.shallow_clone(), -u], -1);
                let largest = both.amax([-1i64].as_slice(), true);
                Features {
                    values: (both - &largest).exp().clamp_min(LEAST),
                    log_scale: Some(largest.squeeze_dim(-1)),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::assert_close;

    #[test]
    fn rows_are_orthonormal_and_lean_to_no_side() {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let mut mean = 0.0;
        for _ in 0..2000 {
            let rows = orthonormal_rows(&mut rng, 3, 4);
            mean += rows[0] / 2000.0;
            let rows = Tensor::from_slice(&rows).view([3, 4]);
            let eye = Tensor::eye(3, (tch::Kind::Double, tch::Device::Cpu));
            assert_close("Gram", &rows.matmul(&rows.tr()), &eye, 1e-12);
        }
        // One coordinate of a random direction in four has variance 1/4.
        assert!(mean.abs() < 4.0 * 0.5 / 2000f64.sqrt(), "{mean}");
    }
}
