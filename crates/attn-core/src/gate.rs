//! Gates on the heads' outputs: the one mechanism behind head masks, ablation, patching and importance scores.

use tch::Tensor;

use crate::Error;

/// `z' = g·z + (1 − g)·r`, for the heads of one layer, before the output projection.
#[derive(Debug)]
pub struct Gate {
    /// Broadcasts to `[batch, n_heads, q_len, 1]`: a gate per head, per example, per position, or any mix.
    pub g: Tensor,
    /// What stands in for the part of z that is let go, broadcasting to `[batch, n_heads, q_len, head_dim]`; zero
    /// where absent.
    pub r: Option<Tensor>,
}

impl Gate {
    /// One gate per head, replaced by zero. `heads`: `[n_heads]`.
    pub fn per_head(heads: &Tensor) -> Self {
        Self { g: heads.view([1, -1, 1, 1]), r: None }
    }

    /// Gates `z`, `[batch, n_heads, q_len, head_dim]`. Gradients flow to `g` and `r`.
    ///
    /// # Errors
    /// If `g` or `r` does not broadcast to the shape it must have.
    pub fn apply(&self, z: &Tensor) -> Result<Tensor, Error> {
        let size = z.size();
        check("gate", &self.g, &[size[0], size[1], size[2], 1])?;
        // In z's kind, whatever the gate was made in: z must not be promoted on its way to the output projection.
        let g = self.g.to_kind(z.kind());
        let kept = z * &g;
        match &self.r {
            None => Ok(kept),
            Some(r) => {
                check("gate replacement", r, &size)?;
                Ok(kept + (1.0 - g) * r.to_kind(z.kind()))
            }
        }
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
        assert!(ones.apply(&z).unwrap().equal(&z));
        let r = randn(2, &[1, 3, 1, 5]);
        let zeros = Gate { g: z.zeros_like().narrow(3, 0, 1), r: Some(r.shallow_clone()) };
        assert!(zeros.apply(&z).unwrap().equal(&r.expand([2, 3, 4, 5], false)));
    }

    #[test]
    fn gradients_reach_gate_and_replacement() {
        let z = randn(1, &[2, 3, 4, 5]);
        let gate = Gate {
            g: randn(2, &[2, 3, 1, 1]).set_requires_grad(true),
            r: Some(randn(3, &[1, 3, 1, 5]).set_requires_grad(true)),
        };
        let pull = randn(4, &[2, 3, 4, 5]);
        (gate.apply(&z).unwrap() * &pull).sum(z.kind()).backward();
        // d/dg = Σ pull·(z − r), d/dr = Σ pull·(1 − g).
        let r = gate.r.as_ref().unwrap().detach();
        let dg = (&pull * (&z - &r)).sum_dim_intlist([2i64, 3].as_slice(), true, z.kind());
        let dr = (&pull * (gate.g.detach() * -1.0 + 1.0)).sum_dim_intlist(
            [0i64, 2].as_slice(),
            true,
            z.kind(),
        );
        assert_close("dg", &gate.g.grad(), &dg, 1e-12);
        assert_close("dr", &gate.r.unwrap().grad(), &dr, 1e-12);
    }

    #[test]
    fn a_gate_of_the_wrong_shape_is_refused() {
        let z = randn(1, &[2, 3, 4, 5]);
        let error = Gate::per_head(&randn(1, &[4])).apply(&z).unwrap_err();
        assert!(error.to_string().contains("[1, 4, 1, 1]"), "{error}");
    }
}
