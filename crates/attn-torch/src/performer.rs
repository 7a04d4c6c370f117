//! Causal linear attention by positive random features: kernels for `f32` on the CPU.

use std::ptr;

use tch::Tensor;

use crate::attend;
use crate::autograd::{self, BoxError, Forward, Function};
use crate::error::{Error, Result};
use crate::ffi::{List, attn_performer, attn_performer_backward, call};
use crate::guards::GradMode;

/// How queries and keys are mapped, and which keys are seen.
#[derive(Debug)]
pub struct PositiveFeatures<'a> {
    /// ω_1 … ω_m, `[m, head_dim]`, `f32`; takes no gradient.
    pub omega: &'a Tensor,
    /// What q·k is multiplied by.
    pub scale: f64,
    /// Added to the features of a query or key, relative to the largest of them: from 0 to 1, and small, as gradients are found
    /// from the features with it.
    pub eps: f64,
    /// The keys that are seen, bool `[batch, n]`; absent: all.
    pub keep: Option<&'a Tensor>,
}

/// Linear attention of the queries `[batch, n_heads, n, head_dim]` to the keys and values `[batch, n_kv_heads, n, head_dim]`
/// at and before each, z like the queries. Query head h reads key/value head ⌊h·n_kv_heads/n_heads⌋.
///
/// ```text
/// z_i = Σ_{j ≤ i} φ(q_i)·φ(k_j) v_j / Σ_{j ≤ i} φ(q_i)·φ(k_j)
/// φ(x) = e^(−s‖x‖²/2) [e^(√s ω·x) + eps · the largest of them],   s = scale
/// ```
///
/// Choromanski et al. 2020, "Rethinking Attention with Performers", <https://arxiv.org/abs/2009.14794>, sections 2.3 to 2.5.
/// Features are never kept: time grows with n, memory with the queries and keys, in the backward pass too. There is no second
/// derivative. What a query that sees no key gets is unspecified but finite.
///
/// # Errors
///
/// Where [`attends`](crate::attends) says no, for shapes that do not fit, for a `scale` that is not above 0, and for an `eps`
/// outside of 0 to 1.
pub fn performer(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    features: &PositiveFeatures,
) -> Result<Tensor> {
    attend::check(q, features.scale)?;
    if !(0.0..=1.0).contains(&features.eps) {
        let message = format!("`eps` is {}, from 0 to 1 expected", features.eps);
        return Err(Error::Torch { doing: "attending by positive features", message });
    }
    let function = Performer {
        omega: features.omega.detach(),
        scale: features.scale,
        eps: features.eps,
        keep: features.keep.map(Tensor::shallow_clone),
    };
    let mut z = autograd::apply(function, &[q, k, v])?;
    Ok(z.pop().expect("one output"))
}

struct Performer {
    omega: Tensor,
    scale: f64,
    eps: f64,
    keep: Option<Tensor>,
}

impl Performer {
    fn keep(&self) -> *const torch_sys::C_tensor {
        self.keep.as_ref().map_or(ptr::null(), Tensor::as_ptr)
    }
}

impl Function for Performer {
    fn forward(&self, inputs: &[Tensor]) -> std::result::Result<Forward, BoxError> {
        let [q, k, v] = inputs else { unreachable!("queries, keys and values") };
        let (mut out, doing) = (List::new(), "attending by positive features");
        // SAFETY: the tensors are borrowed for the call, C++ keeps none of them, and the list is ours alone.
        call(doing, |err| unsafe {
            let (q, k, v, list) = (q.as_ptr(), k.as_ptr(), v.as_ptr(), out.as_mut_ptr());
            let (omega, keep) = (self.omega.as_ptr(), self.keep());
            attn_performer(q, k, v, omega, keep, self.scale, self.eps, list, err)
        })?;
        let [whole, total] = <[Tensor; 2]>::try_from(out.to_defined(doing)?).expect("two results");
        let z = whole.narrow(3, 0, q.size()[3]);
        let saved = [q, k, v, &whole, &total].map(Tensor::shallow_clone).into();
        Ok(Forward { outputs: vec![z], saved })
    }

    fn backward(
        &self,
        saved: &[Tensor],
        grads: &[Tensor],
    ) -> std::result::Result<Vec<Option<Tensor>>, BoxError> {
        if GradMode::is_enabled() {
            return Err("attention by positive features has no second derivative in f32 on the CPU\nhint: use f64".into());
        }
        let [q, k, v, z, total] = saved else { unreachable!("five tensors were saved") };
        let (mut out, doing) = (List::new(), "going back through attention by positive features");
        // SAFETY: as in `forward`.
        call(doing, |err| unsafe {
            let (q, k, v, list) = (q.as_ptr(), k.as_ptr(), v.as_ptr(), out.as_mut_ptr());
            let (omega, keep) = (self.omega.as_ptr(), self.keep());
            let (z, total, grad) = (z.as_ptr(), total.as_ptr(), grads[0].as_ptr());
            attn_performer_backward(
                q, k, v, omega, keep, self.scale, self.eps, z, total, grad, list, err,
            )
        })?;
        Ok(out.to_tensors()?)
    }
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;
    use crate::attend::tests::{error, random, served};
    use crate::random::seeded;

    /// z and the gradients of q, k and v under `grad`, from the definition in `f64`, every weight made.
    fn naive(qkv: [&Tensor; 3], features: &PositiveFeatures, grad: &Tensor) -> [Tensor; 4] {
        let exact = qkv.map(|x| x.detach().to_kind(Kind::Double).set_requires_grad(true));
        let [q, k, v] = &exact;
        let n = q.size()[2];
        let [k, v] =
            [k, v].map(|x| x.repeat_interleave_self_int(q.size()[1] / x.size()[1], 1, None::<i64>));
        let log = |x: &Tensor| {
            let u = x.matmul(&features.omega.to_kind(Kind::Double).tr()) * features.scale.sqrt();
            let half = x.square().sum_dim_intlist([-1i64].as_slice(), true, Kind::Double) / 2.0;
            let largest = u.amax([-1i64].as_slice(), true);
            ((&u - &largest).exp() + features.eps, largest - half * features.scale)
        };
        let ((query, _), (key, factor)) = (log(q), log(&k));
        let mut allowed = Tensor::ones([n, n], (Kind::Bool, q.device())).tril(0);
        if let Some(keep) = features.keep {
            allowed = allowed.logical_and(&keep.view([-1, 1, 1, n]));
        }
        let factor = factor.transpose(-2, -1).masked_fill(&allowed.logical_not(), -1e300); // [b, h, q, k]
        let factor = (&factor - factor.detach().amax([-1i64].as_slice(), true)).exp();
        let weights = query.matmul(&key.transpose(-2, -1)) * factor * &allowed;
        let total = weights.sum_dim_intlist([-1i64].as_slice(), true, Kind::Double);
        let z = (weights / (&total + total.eq(0.0))).matmul(&v);
        (&z * grad).sum(Kind::Double).backward();
        let [dq, dk, dv] = exact.each_ref().map(Tensor::grad);
        [z.detach(), dq, dk, dv]
    }

    fn check(name: &str, qkv: [&Tensor; 3], features: &PositiveFeatures, grad: &Tensor) {
        let expected = naive(qkv, features, grad);
        let leaves = qkv.map(|x| x.detach().set_requires_grad(true));
        let z = performer(&leaves[0], &leaves[1], &leaves[2], features).unwrap();
        (&z * grad).sum(Kind::Float).backward();
        let found = [z.detach(), leaves[0].grad(), leaves[1].grad(), leaves[2].grad()];
        for (what, (found, expected)) in
            ["z", "dq", "dk", "dv"].into_iter().zip(found.iter().zip(&expected))
        {
            assert_eq!(found.size(), expected.size(), "{name}: {what}");
            let error = error(found, expected);
            assert!(error < 1e-5, "{name}: {what} is off by {error:.1e}");
        }
    }

    #[test]
    fn kernels_find_what_the_definition_says() {
        if !served("kernels_find_what_the_definition_says") {
            return;
        }
        let _stream = seeded(4);
        // Sizes around a group of rows, a panel, a chunk.
        for (n, m, d) in
            [(1, 1, 6), (5, 7, 3), (32, 40, 16), (33, 64, 6), (100, 256, 64), (300, 33, 80)]
        {
            for (h, n_kv) in [(2, 2), (4, 1)] {
                let [q, k, v] = [h, n_kv, n_kv].map(|h| random(&[2, h, n, d]));
                let omega = random(&[1, 1, m, d]).view([m, d]);
                let keep = Tensor::rand([2, n], (Kind::Float, q.device())).gt(0.3);
                let _ = keep.narrow(1, 0, 1).fill_(1); // every query sees a key
                for keep in [None, Some(&keep)] {
                    for eps in [1e-6, 1e-2] {
                        let scale = (d as f64).powf(-0.5);
                        let features = PositiveFeatures { omega: &omega, scale, eps, keep };
                        let name = format!(
                            "{n} tokens, {m} features, {d} channels, {h}/{n_kv}, eps {eps}, some hidden {}",
                            keep.is_some()
                        );
                        let grad = random(&[2, h, n, d]);
                        check(&name, [&q, &k, &v], &features, &grad);
                    }
                }
            }
        }
    }

    #[test]
    fn hidden_keys_at_the_beginning_leave_no_trace() {
        if !served("hidden_keys_at_the_beginning_leave_no_trace") {
            return;
        }
        let _stream = seeded(5);
        let (n, hidden, d) = (90, 41, 8);
        let [q, k, v] = [0; 3].map(|_| random(&[1, 2, n, d]));
        let omega = random(&[1, 1, 16, d]).view([16, d]);
        let keep = Tensor::arange(n, (Kind::Int64, q.device())).ge(hidden).unsqueeze(0);
        let features = PositiveFeatures { omega: &omega, scale: 0.3, eps: 1e-6, keep: Some(&keep) };
        let z = performer(&q, &k, &v, &features).unwrap();
        assert_eq!(z.isfinite().all().int64_value(&[]), 1);
        let [q, k, v] = [q, k, v].map(|x| x.narrow(2, hidden, n - hidden));
        let expected = performer(&q, &k, &v, &PositiveFeatures { keep: None, ..features }).unwrap();
        let error = error(&z.narrow(2, hidden, n - hidden), &expected.to_kind(Kind::Double));
        assert!(error < 1e-5, "{error}");
    }

    #[test]
    fn long_keys_come_through_and_the_future_does_not() {
        if !served("long_keys_come_through_and_the_future_does_not") {
            return;
        }
        let _stream = seeded(6);
        let (n, d) = (70, 8);
        let qkv = [0; 3].map(|_| random(&[1, 1, n, d]));
        let omega = random(&[1, 1, 16, d]).view([16, d]);
        let features = PositiveFeatures { omega: &omega, scale: 0.35, eps: 1e-6, keep: None };
        let long = qkv.each_ref().map(|x| x * 30.0);
        let z = performer(&long[0], &long[1], &long[2], &features).unwrap();
        let [expected, ..] = naive(long.each_ref(), &features, &random(&[1, 1, n, d]));
        let error = error(&z, &expected);
        assert!(error < 1e-3, "{error}"); // exponents of thousands, in f32
        let [q, k, v] = qkv;
        let before = performer(&q, &k, &v, &features).unwrap();
        for at in [0, 31, 32, 40, 69] {
            let [k, v] = [&k, &v].map(|x| {
                let x = x.copy();
                let _ = x.narrow(2, at, 1).g_mul_scalar_(-3.0);
                x
            });
            let after = performer(&q, &k, &v, &features).unwrap();
            assert!(after.narrow(2, 0, at).equal(&before.narrow(2, 0, at)), "token {at}");
            assert!(!after.narrow(2, at, 1).equal(&before.narrow(2, at, 1)), "token {at}");
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        if !served("what_does_not_fit_is_refused") {
            return;
        }
        let _stream = seeded(11);
        let (x, omega) = (random(&[1, 2, 5, 8]), random(&[1, 1, 4, 8]).view([4, 8]));
        let run = |x: &Tensor, omega: &Tensor, scale: f64, keep: Option<&Tensor>| {
            performer(x, x, x, &PositiveFeatures { omega, scale, eps: 1e-6, keep })
                .unwrap_err()
                .to_string()
        };
        assert!(run(&x, &omega.narrow(1, 0, 7), 1.0, None).contains("projections [4, 7]"));
        assert!(run(&x.to_kind(Kind::Double), &omega, 1.0, None).contains("Double"));
        assert!(run(&x, &omega, 0.0, None).contains("`scale` is 0"));
        for eps in [-1e-6, 2.0, f64::NAN] {
            let features = PositiveFeatures { omega: &omega, scale: 1.0, eps, keep: None };
            let error = performer(&x, &x, &x, &features).unwrap_err().to_string();
            assert!(error.contains("`eps` is"), "{error}");
        }
        let keep = Tensor::ones([1, 4], (Kind::Bool, x.device()));
        assert!(run(&x, &omega, 1.0, Some(&keep)).contains("kept keys [1, 4]"));
    }
}
