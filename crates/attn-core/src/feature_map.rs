//! What kinds that learn or draw their feature maps share: orthonormal rows.

use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

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

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use tch::Tensor;

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
