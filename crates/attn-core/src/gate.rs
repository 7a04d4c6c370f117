//! Gates on the heads' outputs: the one mechanism behind head masks, ablation, patching and importance scores.

use tch::Tensor;

use crate::Error;

/// What stands in for the part of a head's output that is let go: the mode of an ablation.
#[derive(Debug, Default)]
pub enum Fill {
    /// Zero: as if the head's slice of the output projection were not there. Michel et al. 2019, section 2.3,
    /// <https://arxiv.org/abs/1905.10650>.
    #[default]
    Zero,
    /// These values, broadcasting to `[batch, n_heads, q_len, head_dim]`: a mean over a calibration set, another example's.
    Values(Tensor),
    /// What the kind makes of queries that are all zero: the mean of the values in sight, of softmax attention. As the
    /// retrieval-head work masks heads, Wu et al. 2024, <https://arxiv.org/abs/2404.15574>.
    ZeroQuery,
}

/// `z' = g·z + (1 − g)·r`, for the heads of one layer, before the output projection; [`Fill`] says what r is.
#[derive(Debug)]
pub struct Gate {
    /// Broadcasts to `[batch, n_heads, q_len, 1]`: a gate per head, per example, per position, or any mix.
    pub g: Tensor,
    /// r.
    pub fill: Fill,
}

impl Gate {
    /// One gate per head, replaced by zero. `heads`: `[n_heads]`.
    pub fn per_head(heads: &Tensor) -> Self {
        Self { g: heads.view([1, -1, 1, 1]), fill: Fill::Zero }
    }

    /// Gates `z`, `[batch, n_heads, q_len, head_dim]`; `of_zero_queries`: r where the fill is [`Fill::ZeroQuery`], of z's
    /// shape. Gradients flow to `g` and r.
    ///
    /// # Errors
    /// If `g` or r does not broadcast to the shape it must have.
    pub fn apply(&self, z: &Tensor, of_zero_queries: Option<&Tensor>) -> Result<Tensor, Error> {
        let size = z.size();
        self.check(&size)?;
        // In z's kind, whatever the gate was made in: z must not be promoted on its way to the output projection.
        let g = self.g.to_kind(z.kind());
        let kept = z * &g;
        let r = match &self.fill {
            Fill::Zero => return Ok(kept),
            Fill::Values(r) => r,
            Fill::ZeroQuery => of_zero_queries.expect("the caller has made it"),
        };
        check("gate replacement", r, &size)?;
        Ok(kept + (1.0 - g) * r.to_kind(z.kind()))
    }

    /// Refuses a gate that does not fit heads' outputs of `size`.
    pub(crate) fn check(&self, size: &[i64]) -> Result<(), Error> {
        check("gate", &self.g, &[size[0], size[1], size[2], 1])
    }

    /// Whether queries multiplied by `g` are all that it takes.
    pub(crate) fn is_hard_zero_query(&self) -> bool {
        let is_hard = || {
            let open = self.g.eq(1.0).logical_or(&self.g.eq(0.0));
            open.all().int64_value(&[]) == 1
        };
        matches!(self.fill, Fill::ZeroQuery) && !self.g.requires_grad() && is_hard()
    }
}

fn check(name: &'static str, tensor: &Tensor, target: &[i64]) -> Result<(), Error> {
    let size = tensor.size();
    let fits = size.len() == target.len()
        && size.iter().zip(target).all(|(&have, &want)| have == want || have == 1);
    if fits {
        return Ok(());
    }
    Err(Error::Input {
        name,
        problem: format!("has shape {size:?}, which does not broadcast to {target:?}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, randn};

    #[test]
    fn ones_change_no_bit_and_zeros_give_the_replacement() {
        let z = randn(1, &[2, 3, 4, 5]);
        let ones = Gate::per_head(&Tensor::ones([3], (tch::Kind::Float, tch::Device::Cpu)));
        assert!(ones.apply(&z, None).unwrap().equal(&z));
        let r = randn(2, &[1, 3, 1, 5]);
        let zeros =
            Gate { g: z.zeros_like().narrow(3, 0, 1), fill: Fill::Values(r.shallow_clone()) };
        assert!(zeros.apply(&z, None).unwrap().equal(&r.expand([2, 3, 4, 5], false)));
    }

    #[test]
    fn gradients_reach_gate_and_replacement() {
        let z = randn(1, &[2, 3, 4, 5]);
        let r = randn(3, &[1, 3, 1, 5]).set_requires_grad(true);
        let gate = Gate {
            g: randn(2, &[2, 3, 1, 1]).set_requires_grad(true),
            fill: Fill::Values(r.shallow_clone()),
        };
        let pull = randn(4, &[2, 3, 4, 5]);
        (gate.apply(&z, None).unwrap() * &pull).sum(z.kind()).backward();
        // d/dg = Σ pull·(z − r), d/dr = Σ pull·(1 − g).
        let dg = (&pull * (&z - r.detach())).sum_dim_intlist([2i64, 3].as_slice(), true, z.kind());
        let dr = (&pull * (gate.g.detach() * -1.0 + 1.0)).sum_dim_intlist(
            [0i64, 2].as_slice(),
            true,
            z.kind(),
        );
        assert_close("dg", &gate.g.grad(), &dg, 1e-12);
        assert_close("dr", &r.grad(), &dr, 1e-12);
    }

    #[test]
    fn a_gate_of_the_wrong_shape_is_refused() {
        let z = randn(1, &[2, 3, 4, 5]);
        let error = Gate::per_head(&randn(1, &[4])).apply(&z, None).unwrap_err();
        assert!(error.to_string().contains("[1, 4, 1, 1]"), "{error}");
    }
}
