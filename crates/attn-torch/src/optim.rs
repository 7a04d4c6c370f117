//! Whole lists of parameters updated in one call.

use std::borrow::Borrow;
use std::fmt;

use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};
use crate::ffi::{self, List};

/// Adam with weight decay kept apart from the gradient, fused: one pass over each parameter.
///
/// ```text
/// p ← p − lr · weight_decay · p
/// m ← β₁ m + (1 − β₁) g          v ← β₂ v + (1 − β₂) g²
/// p ← p − lr · (m / (1 − β₁ᵗ)) / (√(v / (1 − β₂ᵗ)) + eps)
/// ```
///
/// Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization", <https://arxiv.org/abs/1711.05101>; as in
/// PyTorch, the decay is scaled by the learning rate. tch's own `nn::AdamW` goes parameter by parameter, and its state
/// cannot be saved.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// The learning rate of this step.
    pub lr: f64,
    /// β₁ and β₂: how much of the moments stays from step to step.
    pub betas: (f64, f64),
    /// Added to the root, so that parameters with next to no gradient stay put.
    pub eps: f64,
    /// How much of each parameter decays, times `lr`.
    pub weight_decay: f64,
}

impl Default for AdamW {
    /// PyTorch's defaults.
    fn default() -> Self {
        Self { lr: 1e-3, betas: (0.9, 0.999), eps: 1e-8, weight_decay: 0.01 }
    }
}

/// What [`AdamW`] remembers, one tensor per parameter: save these, and training goes on as if it had not stopped.
#[derive(Debug, Default)]
pub struct AdamState {
    /// Running mean of the gradient; size, kind and device of the parameter.
    pub m: Vec<Tensor>,
    /// Running mean of its square; size, kind and device of the parameter.
    pub v: Vec<Tensor>,
    /// Steps taken: one `f32` without dimensions, on the parameter's device.
    pub steps: Vec<Tensor>,
}

impl AdamState {
    /// The state before the first step.
    ///
    /// # Errors
    ///
    /// [`Error::Torch`] where memory runs out.
    pub fn zeros<T: Borrow<Tensor>>(params: &[T]) -> Result<Self> {
        let failed = Error::tch("making an optimizer's state");
        let mut state = Self::default();
        for param in params {
            // Not `zeros_like`, which keeps strides: the update below walks memory in order.
            let param = param.borrow();
            let options = (param.f_kind().map_err(&failed)?, param.device());
            let zeros = || Tensor::f_zeros(param.size(), options).map_err(&failed);
            state.m.push(zeros()?);
            state.v.push(zeros()?);
            state.steps.push(Tensor::f_zeros([], (Kind::Float, param.device())).map_err(&failed)?);
        }
        Ok(state)
    }
}

impl AdamW {
    /// Updates every parameter in place, and the state with it.
    ///
    /// Nothing is changed if the lists do not fit each other. A gradient that is not finite is used as it is; see
    /// [`clip_grad_norm`], whose result tells.
    ///
    /// # Errors
    ///
    /// [`Error::Length`] and [`Error::Mismatch`] where the lists do not fit, [`Error::NotContiguous`],
    /// [`Error::Number`] for a setting out of range.
    pub fn step<P, G>(&self, params: &[P], grads: &[G], state: &mut AdamState) -> Result<()>
    where
        P: Borrow<Tensor>,
        G: Borrow<Tensor>,
    {
        self.check()?;
        let rows = rows(params, grads, state)?;
        // The fused operation takes one device and one kind at a time.
        let key = |row: &Row| (row[0].device(), row[0].kind());
        let mut groups: Vec<Vec<Row>> = Vec::new();
        for row in rows {
            match groups.iter_mut().find(|group| key(&group[0]) == key(&row)) {
                Some(group) => group.push(row),
                None => groups.push(vec![row]),
            }
        }
        groups.iter().try_for_each(|group| self.step_group(group))
    }

    fn step_group(&self, rows: &[Row]) -> Result<()> {
        let list =
            |column: usize| List::of(&rows.iter().map(|row| &row[column]).collect::<Vec<_>>());
        let (mut params, mut grads, mut m, mut v, mut steps) =
            (list(0)?, list(1)?, list(2)?, list(3)?, list(4)?);
        let Self { lr, betas: (beta1, beta2), eps, weight_decay } = *self;
        // SAFETY: lists of equal length, checked by `rows`; they are ours, and so is the order of the arguments.
        ffi::call("taking an AdamW step", |err| unsafe {
            let [params, grads, m, v, steps] =
                [&mut params, &mut grads, &mut m, &mut v, &mut steps].map(List::as_mut_ptr);
            ffi::attn_fused_adamw(
                params,
                grads,
                m,
                v,
                steps,
                lr,
                beta1,
                beta2,
                weight_decay,
                eps,
                err,
            )
        })
    }

    fn check(&self) -> Result<()> {
        let not_negative = |x: f64| x >= 0. && x.is_finite();
        let fraction = |x: f64| (0. ..1.).contains(&x);
        let checks = [
            ("lr", self.lr, not_negative(self.lr), "a number of at least 0"),
            ("betas.0", self.betas.0, fraction(self.betas.0), "at least 0 and below 1"),
            ("betas.1", self.betas.1, fraction(self.betas.1), "at least 0 and below 1"),
            ("eps", self.eps, not_negative(self.eps), "a number of at least 0"),
            (
                "weight_decay",
                self.weight_decay,
                not_negative(self.weight_decay),
                "a number of at least 0",
            ),
        ];
        match checks.into_iter().find(|check| !check.2) {
            Some((name, value, _, expected)) => Err(Error::Number { name, value, expected }),
            None => Ok(()),
        }
    }
}

/// Parameter, gradient, m, v and steps of one parameter.
type Row = [Tensor; 5];

/// The rows of all parameters, each checked to fit together.
fn rows<P, G>(params: &[P], grads: &[G], state: &AdamState) -> Result<Vec<Row>>
where
    P: Borrow<Tensor>,
    G: Borrow<Tensor>,
{
    let expected = params.len();
    let AdamState { m, v, steps } = state;
    let lengths = [
        ("gradients", grads.len()),
        ("first moments", m.len()),
        ("second moments", v.len()),
        ("steps", steps.len()),
    ];
    if let Some(&(what, actual)) = lengths.iter().find(|(_, len)| *len != expected) {
        return Err(Error::Length { what, expected, actual });
    }
    let mut rows = Vec::with_capacity(expected);
    for (index, param) in params.iter().enumerate() {
        let (param, grad) = (param.borrow(), grads[index].borrow());
        if !param.is_contiguous() {
            return Err(Error::NotContiguous { index, size: param.size() });
        }
        let like = Like::of(param)?;
        let scalar = Like { kind: Kind::Float, size: Vec::new(), ..like };
        like.check("gradient", index, grad, false)?;
        like.check("first moment", index, &m[index], true)?;
        like.check("second moment", index, &v[index], true)?;
        scalar.check("step", index, &steps[index], true)?;
        // The CPU's kernel walks memory in order whatever the strides; gradients of transposed uses have others.
        let grad = grad.f_contiguous().map_err(Error::tch("ordering a gradient"))?;
        rows.push([
            param.shallow_clone(),
            grad,
            m[index].shallow_clone(),
            v[index].shallow_clone(),
            steps[index].shallow_clone(),
        ]);
    }
    Ok(rows)
}

/// What the tensors that belong to a parameter have to share with it.
#[derive(Debug, PartialEq)]
struct Like {
    kind: Kind,
    size: Vec<i64>,
    device: Device,
    sparse: bool,
}

impl Like {
    fn of(tensor: &Tensor) -> Result<Self> {
        let kind = tensor.f_kind().map_err(Error::tch("asking for a tensor's kind"))?;
        Ok(Self { kind, size: tensor.size(), device: tensor.device(), sparse: tensor.is_sparse() })
    }

    fn check(
        &self,
        what: &'static str,
        index: usize,
        tensor: &Tensor,
        contiguous: bool,
    ) -> Result<()> {
        let refuse = |actual: String| {
            Err(Error::Mismatch { what, index, expected: self.to_string(), actual })
        };
        if !tensor.defined() {
            return refuse("undefined".to_owned());
        }
        let actual = Self::of(tensor)?;
        if actual != *self {
            return refuse(actual.to_string());
        }
        if contiguous && !tensor.is_contiguous() {
            return refuse(format!("{actual}, but not contiguous"));
        }
        Ok(())
    }
}

impl fmt::Display for Like {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sparse = if self.sparse { "sparse " } else { "" };
        write!(f, "{sparse}{:?} of size {:?} on {:?}", self.kind, self.size, self.device)
    }
}

/// Scales all gradients by one factor, so that the norm of all of them together is at most `max_norm`, and returns
/// what it was before.
///
/// The norm is the root of the sum of the squares of every element. As in PyTorch, the factor is
/// `max_norm / (norm + 1e-6)`, and none where that is above 1. If the norm is not finite, the gradients are left alone:
/// scaling would turn all of them into zeros or NaN, and hide which one was at fault.
///
/// # Errors
///
/// [`Error::Number`] unless `max_norm` is above 0 (infinity only measures), [`Error::Torch`] for gradients without a
/// norm (integers, undefined).
pub fn clip_grad_norm<T: Borrow<Tensor>>(grads: &[T], max_norm: f64) -> Result<f64> {
    if max_norm.is_nan() || max_norm <= 0. {
        return Err(Error::Number {
            name: "max_norm",
            value: max_norm,
            expected: "a number above 0",
        });
    }
    let doing = "measuring gradients";
    let mut list = List::of(grads)?;
    let mut norms = List::new();
    // SAFETY: both lists are alive; the second is ours alone to write.
    ffi::call(doing, |err| unsafe { ffi::attn_norms(list.as_ptr(), norms.as_mut_ptr(), err) })?;
    let norms = norms.to_defined(doing)?;

    let norm = total_norm(&norms)?;
    let factor = max_norm / (norm + 1e-6);
    if norm.is_finite() && factor < 1. {
        // SAFETY: the list is ours; its tensors are the caller's, who asked for them to be changed.
        ffi::call("scaling gradients", |err| unsafe {
            ffi::attn_scale(list.as_mut_ptr(), factor, err)
        })?;
    }
    Ok(norm)
}

/// The norm of norms, in f64; fetched from each device in one transfer.
fn total_norm(norms: &[Tensor]) -> Result<f64> {
    let failed = Error::tch("measuring gradients");
    let mut by_device: Vec<(Device, Vec<&Tensor>)> = Vec::new();
    for norm in norms {
        match by_device.iter_mut().find(|(device, _)| *device == norm.device()) {
            Some((_, group)) => group.push(norm),
            None => by_device.push((norm.device(), vec![norm])),
        }
    }
    let mut squares = 0.;
    for (_, group) in by_device {
        let group: Vec<Tensor> = group
            .iter()
            .map(|norm| norm.f_to_kind(Kind::Double))
            .collect::<std::result::Result<_, _>>()
            .map_err(&failed)?;
        let sum =
            Tensor::f_stack(&group, 0).and_then(|norms| norms.f_square()?.f_sum(Kind::Double));
        squares += sum.and_then(|sum| sum.f_double_value(&[])).map_err(&failed)?;
    }
    Ok(squares.sqrt())
}

#[cfg(test)]
mod tests {
    use tch::nn::{self, OptimizerConfig};

    use super::*;

    /// Numbers with no structure, without drawing from LibTorch's stream.
    fn numbers(size: &[i64], salt: f64, kind: Kind) -> Tensor {
        let count = Tensor::arange(size.iter().product::<i64>(), (Kind::Double, Device::Cpu));
        (count * 12.9898 + salt).sin().view(size).to_kind(kind)
    }

    fn values(tensor: &Tensor) -> Vec<f64> {
        Vec::try_from(tensor.to_kind(Kind::Double).reshape([-1])).unwrap()
    }

    fn rms(tensor: &Tensor) -> f64 {
        tensor.to_kind(Kind::Double).square().mean(Kind::Double).sqrt().double_value(&[])
    }

    /// The definition, one number at a time.
    struct Reference {
        p: Vec<f64>,
        m: Vec<f64>,
        v: Vec<f64>,
        t: i32,
    }

    impl Reference {
        fn step(&mut self, settings: &AdamW, grads: &[f64]) {
            let AdamW { lr, betas: (beta1, beta2), eps, weight_decay } = *settings;
            self.t += 1;
            for (i, g) in grads.iter().enumerate() {
                self.p[i] -= lr * weight_decay * self.p[i];
                self.m[i] = beta1 * self.m[i] + (1. - beta1) * g;
                self.v[i] = beta2 * self.v[i] + (1. - beta2) * g * g;
                let m = self.m[i] / (1. - beta1.powi(self.t));
                let v = self.v[i] / (1. - beta2.powi(self.t));
                self.p[i] -= lr * m / (v.sqrt() + eps);
            }
        }
    }

    #[test]
    fn it_matches_the_definition_in_f64_and_f32() {
        let settings = AdamW { lr: 0.03, betas: (0.8, 0.95), eps: 1e-6, weight_decay: 0.2 };
        for (kind, tolerance) in [(Kind::Double, 1e-12), (Kind::Float, 1e-6)] {
            let params = [numbers(&[7, 3], 0., kind), numbers(&[63], 1., kind)];
            let mut state = AdamState::zeros(&params).unwrap();
            let mut reference: Vec<Reference> = params
                .iter()
                .map(|p| {
                    let p = values(p);
                    Reference { m: vec![0.; p.len()], v: vec![0.; p.len()], p, t: 0 }
                })
                .collect();

            for step in 0..7 {
                let grads =
                    params.each_ref().map(|p| numbers(&p.size(), f64::from(step) + 2., kind));
                settings.step(&params, &grads, &mut state).unwrap();
                for (reference, grad) in reference.iter_mut().zip(&grads) {
                    reference.step(&settings, &values(grad));
                }
            }

            for (i, reference) in reference.iter().enumerate() {
                let pairs = [
                    (&params[i], &reference.p),
                    (&state.m[i], &reference.m),
                    (&state.v[i], &reference.v),
                ];
                for (actual, expected) in pairs {
                    let expected = Tensor::from_slice(expected).view_as(actual);
                    let error = rms(&(actual.to_kind(Kind::Double) - &expected)) / rms(&expected);
                    assert!(error < tolerance, "{kind:?} {i}: {error}");
                }
                assert_eq!(state.steps[i].double_value(&[]), 7.);
            }
        }
    }

    #[test]
    fn it_matches_the_optimizer_of_tch() {
        let vs = nn::VarStore::new(Device::Cpu);
        let theirs = vs.root().var_copy("w", &numbers(&[32, 32], 0., Kind::Float));
        let ours = [theirs.detach().copy()];
        let mut state = AdamState::zeros(&ours).unwrap();
        let mut optimizer = nn::AdamW { wd: 0.1, ..Default::default() }.build(&vs, 1e-2).unwrap();
        let settings = AdamW { lr: 1e-2, weight_decay: 0.1, ..AdamW::default() };

        for step in 0..5 {
            let x = numbers(&[4, 32], f64::from(step), Kind::Float);
            let loss = x.matmul(&theirs).square().mean(Kind::Float);
            optimizer.zero_grad();
            loss.backward();
            let grad = theirs.grad().copy();
            optimizer.step();
            settings.step(&ours, &[grad], &mut state).unwrap();
        }

        let error = rms(&(&ours[0] - &theirs)) / rms(&theirs);
        assert!(error < 1e-6, "{error}");
    }

    #[test]
    fn a_transposed_gradient_and_parameters_of_several_kinds_are_served() {
        let plain = numbers(&[4, 6], 1., Kind::Float);
        let transposed = plain.tr().contiguous().tr();
        assert!(!transposed.is_contiguous());
        let step = |grad: &Tensor| {
            let params = [
                numbers(&[4, 6], 0., Kind::Float),
                numbers(&[5], 0., Kind::Double),
                numbers(&[5], 0., Kind::BFloat16),
            ];
            let grads = [
                grad.shallow_clone(),
                numbers(&[5], 1., Kind::Double),
                numbers(&[5], 1., Kind::BFloat16),
            ];
            let mut state = AdamState::zeros(&params).unwrap();
            AdamW { lr: 0.5, ..AdamW::default() }.step(&params, &grads, &mut state).unwrap();
            params
        };

        let (expected, actual) = (step(&plain), step(&transposed));

        for (expected, actual) in expected.iter().zip(&actual) {
            assert!(expected.equal(actual));
            assert!(
                rms(&(actual - numbers(&actual.size(), 0., actual.kind()))) > 0.1,
                "{:?} moved",
                actual.kind()
            );
        }
    }

    #[test]
    fn a_state_that_is_saved_and_read_goes_on_bit_for_bit() {
        let start = || [numbers(&[9], 0., Kind::Float)];
        let grad = |step: i32| [numbers(&[9], f64::from(step), Kind::Float)];
        let settings = AdamW::default();
        let (whole, mut whole_state) = (start(), AdamState::zeros(&start()).unwrap());
        (0..4).for_each(|step| settings.step(&whole, &grad(step), &mut whole_state).unwrap());

        let (part, mut state) = (start(), AdamState::zeros(&start()).unwrap());
        (0..2).for_each(|step| settings.step(&part, &grad(step), &mut state).unwrap());
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.safetensors");
        let named =
            [("m", &state.m[0]), ("v", &state.v[0]), ("step", &state.steps[0]), ("p", &part[0])];
        Tensor::write_safetensors(&named, &path).unwrap();
        let read = Tensor::read_safetensors(&path).unwrap();
        let find = |name: &str| read.iter().find(|(other, _)| other == name).unwrap().1.copy();
        let (part, mut state) = (
            [find("p")],
            AdamState { m: vec![find("m")], v: vec![find("v")], steps: vec![find("step")] },
        );
        (2..4).for_each(|step| settings.step(&part, &grad(step), &mut state).unwrap());

        assert!(whole[0].equal(&part[0]));
    }

    #[test]
    fn parameters_that_require_gradients_are_updated_unrecorded() {
        let params = [numbers(&[3], 0., Kind::Float).set_requires_grad(true)];
        let mut state = AdamState::zeros(&params).unwrap();
        params[0].square().sum(Kind::Float).backward();
        let grads = [params[0].grad()];

        AdamW::default().step(&params, &grads, &mut state).unwrap();

        assert!(params[0].is_leaf() && params[0].requires_grad());
        assert!(!state.m[0].requires_grad());
    }

    #[test]
    fn lists_that_do_not_fit_change_nothing() {
        let params = [numbers(&[2, 3], 0., Kind::Float), numbers(&[4], 0., Kind::Float)];
        let before = params.each_ref().map(Tensor::copy);
        let refusal = |params: &[Tensor], grads: &[Tensor]| {
            let mut state = AdamState::zeros(params).unwrap();
            AdamW::default().step(params, grads, &mut state).unwrap_err().to_string()
        };
        let good = || numbers(&[2, 3], 1., Kind::Float);

        assert_eq!(refusal(&params, &[good()]), "gradients: 1 given, 2 expected");
        assert_eq!(
            refusal(&params, &[good(), numbers(&[5], 1., Kind::Float)]),
            "gradient 1 is Float of size [5] on Cpu, Float of size [4] on Cpu expected"
        );
        assert_eq!(
            refusal(&params, &[good(), numbers(&[4], 1., Kind::Double)]),
            "gradient 1 is Double of size [4] on Cpu, Float of size [4] on Cpu expected"
        );
        assert_eq!(
            refusal(&params, &[good(), Tensor::new()]),
            "gradient 1 is undefined, Float of size [4] on Cpu expected"
        );
        let sparse = numbers(&[4], 1., Kind::Float).to_sparse_sparse_dim(1);
        assert!(refusal(&params, &[good(), sparse]).starts_with("gradient 1 is sparse Float"));
        let holes = [numbers(&[2, 3], 0., Kind::Float).tr()];
        assert!(
            refusal(&holes, &[numbers(&[3, 2], 0., Kind::Float)])
                .starts_with("parameter 0 of size [3, 2] is not")
        );

        let mut state = AdamState::zeros(&params).unwrap();
        let grads = [good(), numbers(&[4], 1., Kind::Float)];
        let settings = AdamW { betas: (0.9, 1.), ..AdamW::default() };
        let error = settings.step(&params, &grads, &mut state).unwrap_err();
        assert_eq!(error.to_string(), "`betas.1` is 1, at least 0 and below 1 expected");
        assert!(params.iter().zip(&before).all(|(now, before)| now.equal(before)));
    }

    #[test]
    fn clipping_scales_all_gradients_by_one_factor() {
        let grads = [Tensor::from_slice(&[3f32, 0.]), Tensor::from_slice(&[4f64]).view([1, 1])];

        let norm = clip_grad_norm(&grads, 1.).unwrap();

        assert!((norm - 5.).abs() < 1e-12, "{norm}");
        assert!((grads[0].double_value(&[0]) - 0.6).abs() < 1e-6);
        assert!((grads[1].double_value(&[0, 0]) - 0.8).abs() < 1e-6);
    }

    #[test]
    fn small_gradients_and_an_infinite_limit_change_nothing() {
        let grads = [Tensor::from_slice(&[3f32, 4.])];

        assert_eq!(clip_grad_norm(&grads, 5.1).unwrap(), 5.);
        assert_eq!(clip_grad_norm(&grads, f64::INFINITY).unwrap(), 5.);
        assert_eq!(clip_grad_norm::<Tensor>(&[], 1.).unwrap(), 0.);

        assert_eq!(values(&grads[0]), [3., 4.]);
    }

    #[test]
    fn a_norm_that_is_not_finite_is_returned_and_leaves_the_gradients() {
        for bad in [f32::NAN, f32::INFINITY] {
            let grads = [Tensor::from_slice(&[3f32, 4.]), Tensor::from_slice(&[bad])];

            let norm = clip_grad_norm(&grads, 1.).unwrap();

            assert!(!norm.is_finite());
            assert_eq!(values(&grads[0]), [3., 4.]);
        }
    }

    #[test]
    fn half_precision_norms_are_accumulated_wide() {
        // The squares add up to 16384 · 16², past the largest f16; the root is 2048.
        let grads = [Tensor::full([1 << 14], 16., (Kind::Half, Device::Cpu))];

        let norm = clip_grad_norm(&grads, 1024.).unwrap();

        assert!((norm - 2048.).abs() < 1e-2, "{norm}");
        assert_eq!(grads[0].double_value(&[0]), 8.);
    }

    #[test]
    fn limits_that_mean_nothing_are_refused() {
        for limit in [0., -1., f64::NAN] {
            let error = clip_grad_norm(&[Tensor::from_slice(&[1f32])], limit).unwrap_err();
            assert!(matches!(error, Error::Number { name: "max_norm", .. }));
        }
        assert!(clip_grad_norm(&[Tensor::new()], 1.).is_err());
        assert!(clip_grad_norm(&[Tensor::from_slice(&[1i64])], 1.).is_err());
    }
}
