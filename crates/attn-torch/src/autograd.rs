//! Gradients: operations with a backward pass written in Rust, and gradients for given output gradients.

use std::any::Any;
use std::borrow::Borrow;
use std::ffi::{CString, c_char, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;

use tch::Tensor;

use crate::error::{Error, Result, first_line};
use crate::ffi::{self, Callbacks, ErrorSlot, List, RawList};

/// Any error that a [`Function`] may return; it reaches the caller as the message of an [`Error::Torch`].
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// What a forward pass gives.
#[derive(Debug, Default)]
pub struct Forward {
    /// The results.
    pub outputs: Vec<Tensor>,
    /// What the backward pass needs: inputs, outputs, anything computed on the way.
    ///
    /// LibTorch refuses the backward pass if one of these was changed in place in between.
    pub saved: Vec<Tensor>,
}

/// An operation whose backward pass is written here, instead of derived from what the forward pass called.
///
/// ```
/// use attn_torch::{BoxError, Forward, Function, apply};
/// use tch::{Device, Kind, Tensor};
///
/// /// `x ↦ x²`.
/// struct Square;
///
/// impl Function for Square {
///     fn forward(&self, inputs: &[Tensor]) -> Result<Forward, BoxError> {
///         let x = &inputs[0];
///         Ok(Forward { outputs: vec![x.f_square()?], saved: vec![x.shallow_clone()] })
///     }
///
///     fn backward(&self, saved: &[Tensor], grads: &[Tensor]) -> Result<Vec<Option<Tensor>>, BoxError> {
///         Ok(vec![Some(&grads[0] * &saved[0] * 2.)])
///     }
/// }
///
/// let x = Tensor::from_slice(&[3.0f64]).set_requires_grad(true);
/// let y = apply(Square, &[&x])?.remove(0);
/// y.backward();
/// assert_eq!(x.grad().double_value(&[0]), 6.);
/// # Ok::<(), attn_torch::Error>(())
/// ```
pub trait Function: Send + 'static {
    /// Runs without recording gradients; autocast stays as the caller has it.
    ///
    /// # Errors
    ///
    /// Any; [`apply`] returns its message.
    fn forward(&self, inputs: &[Tensor]) -> std::result::Result<Forward, BoxError>;

    /// One gradient per input, `None` where there is none, from one gradient per output, zeros where none came.
    ///
    /// Operations are recorded only under [`GradOptions::create_graph`]. LibTorch may run this on a thread of its own,
    /// but never twice at a time.
    ///
    /// # Errors
    ///
    /// Any; the call that started the backward pass fails with its message.
    fn backward(
        &self,
        saved: &[Tensor],
        grads: &[Tensor],
    ) -> std::result::Result<Vec<Option<Tensor>>, BoxError>;
}

/// Runs `function` on `inputs` and records it for the backward pass.
///
/// The function is dropped with the last output that remembers it. Outputs that are no floating-point numbers
/// take no gradient.
///
/// # Errors
///
/// [`Error::Torch`] with the function's own message, that of its panic, or LibTorch's.
pub fn apply<F: Function>(function: F, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
    let doing = "applying a function";
    let inputs = List::of(inputs)?;
    let mut outputs = List::new();
    let callbacks = Callbacks {
        data: Box::into_raw(Box::new(function)).cast(),
        forward: forward_callback::<F>,
        backward: backward_callback::<F>,
        drop: drop_callback::<F>,
    };
    // SAFETY: the lists are alive; `data` is a box of `F`, which the callbacks expect, and C++ owns it from here.
    ffi::call(doing, |err| unsafe {
        ffi::attn_apply(inputs.as_ptr(), callbacks, outputs.as_mut_ptr(), err)
    })?;
    outputs.to_defined(doing)
}

/// What becomes of the graph in a backward pass.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GradOptions {
    /// Keep it for another backward pass.
    pub keep_graph: bool,
    /// Record the backward pass itself, for gradients of gradients; keeps the graph too.
    pub create_graph: bool,
}

impl GradOptions {
    fn flags(self) -> (c_int, c_int) {
        ((self.keep_graph || self.create_graph).into(), self.create_graph.into())
    }
}

/// Adds to `.grad()` of every leaf behind `outputs` what it contributes to `Σ outputs · grads`.
///
/// `grads` has the sizes of `outputs`; empty, it stands for ones, and every output has to be one number.
///
/// # Errors
///
/// [`Error::Length`] or [`Error::Mismatch`] where `grads` does not fit `outputs`, [`Error::Torch`] where nothing
/// requires a gradient, the graph is gone, or a [`Function`] fails.
pub fn backward<T, G>(outputs: &[T], grads: &[G], options: GradOptions) -> Result<()>
where
    T: Borrow<Tensor>,
    G: Borrow<Tensor>,
{
    check_grads(outputs, grads)?;
    let (outputs, grads) = (List::of(outputs)?, List::of(grads)?);
    let (keep, create) = options.flags();
    // SAFETY: both lists are alive and only read.
    ffi::call("running a backward pass", |err| unsafe {
        ffi::attn_backward(outputs.as_ptr(), grads.as_ptr(), keep, create, err)
    })
}

/// The gradients of `Σ outputs · grads` by each of `inputs`, `None` where an input plays no part. Leaves' `.grad()`
/// stays as it is.
///
/// `grads` has the sizes of `outputs`; empty, it stands for ones, and every output has to be one number.
///
/// # Errors
///
/// As [`backward`], and where an input does not require a gradient.
pub fn grad<T, G, I>(
    outputs: &[T],
    grads: &[G],
    inputs: &[I],
    options: GradOptions,
) -> Result<Vec<Option<Tensor>>>
where
    T: Borrow<Tensor>,
    G: Borrow<Tensor>,
    I: Borrow<Tensor>,
{
    check_grads(outputs, grads)?;
    if inputs.is_empty() {
        return Ok(Vec::new()); // LibTorch reads an empty list as "all leaves".
    }
    let (outputs, grads, inputs) = (List::of(outputs)?, List::of(grads)?, List::of(inputs)?);
    let mut input_grads = List::new();
    let (keep, create) = options.flags();
    // SAFETY: the lists are alive; the last is ours alone to write.
    ffi::call("computing gradients", |err| unsafe {
        let (outputs, grads, inputs) = (outputs.as_ptr(), grads.as_ptr(), inputs.as_ptr());
        ffi::attn_grad(outputs, grads, inputs, keep, create, input_grads.as_mut_ptr(), err)
    })?;
    input_grads.to_tensors()
}

/// The gradients that [`backward`] left in `leaves`, `None` where there is none. The leaves have none afterwards.
///
/// # Errors
///
/// [`Error::Torch`] where LibTorch refuses.
pub fn take_grads<T: Borrow<Tensor>>(leaves: &[T]) -> Result<Vec<Option<Tensor>>> {
    let leaves = List::of(leaves)?;
    let mut grads = List::new();
    // SAFETY: both lists are alive; the second is ours alone to write.
    ffi::call("taking gradients", |err| unsafe {
        ffi::attn_take_grads(leaves.as_ptr(), grads.as_mut_ptr(), err)
    })?;
    grads.to_tensors()
}

fn check_grads<T: Borrow<Tensor>, G: Borrow<Tensor>>(outputs: &[T], grads: &[G]) -> Result<()> {
    if grads.is_empty() {
        return Ok(()); // LibTorch itself refuses outputs of several numbers then.
    }
    if grads.len() != outputs.len() {
        return Err(Error::Length {
            what: "output gradients",
            expected: outputs.len(),
            actual: grads.len(),
        });
    }
    for (index, (out, grad)) in outputs.iter().zip(grads).enumerate() {
        let (out, grad) = (out.borrow().size(), grad.borrow().size());
        if out != grad {
            let (expected, actual) = (format!("size {out:?}"), format!("of size {grad:?}"));
            return Err(Error::Mismatch { what: "output gradient", index, expected, actual });
        }
    }
    Ok(())
}

extern "C" fn forward_callback<F: Function>(
    data: *mut c_void,
    inputs: *const RawList,
    outputs: *mut RawList,
    saved: *mut RawList,
    err: ErrorSlot,
) -> c_int {
    guarded(err, || {
        // SAFETY: `data` is the box of `F` made in `apply`, alive until `drop_callback`; only shared here.
        let function = unsafe { &*data.cast::<F>() };
        // SAFETY: C++ lends the list for this call and does not write to it.
        let inputs = defined(unsafe { ffi::tensors(inputs) }?)?;
        let result = function.forward(&inputs)?;
        for (list, tensors) in [(outputs, result.outputs), (saved, result.saved)] {
            for tensor in &tensors {
                // SAFETY: C++ lends the list for this call, to nobody else.
                unsafe { ffi::push(list, Some(tensor)) }?;
            }
        }
        Ok(())
    })
}

extern "C" fn backward_callback<F: Function>(
    data: *mut c_void,
    saved: *const RawList,
    grads: *const RawList,
    input_grads: *mut RawList,
    err: ErrorSlot,
) -> c_int {
    guarded(err, || {
        // SAFETY: `data` is the box of `F` made in `apply`, alive until `drop_callback`. `F` is `Send`, and LibTorch
        // holds the node's lock during its backward pass, so no other thread uses it meanwhile.
        let function = unsafe { &*data.cast::<F>() };
        // SAFETY: C++ lends both lists for this call and does not write to them.
        let (saved, grads) = unsafe { (ffi::tensors(saved)?, ffi::tensors(grads)?) };
        for grad in function.backward(&defined(saved)?, &defined(grads)?)? {
            // SAFETY: C++ lends the list for this call, to nobody else.
            unsafe { ffi::push(input_grads, grad.as_ref()) }?;
        }
        Ok(())
    })
}

extern "C" fn drop_callback<F: Function>(data: *mut c_void) {
    // SAFETY: the box made in `apply`; C++ calls this once, after every other callback.
    let function = unsafe { Box::from_raw(data.cast::<F>()) };
    // A panic may not unwind into C++, and a destructor has nobody to report to.
    let _ = catch_unwind(AssertUnwindSafe(|| drop(function)));
}

fn defined(tensors: Vec<Option<Tensor>>) -> std::result::Result<Vec<Tensor>, BoxError> {
    tensors
        .into_iter()
        .map(|tensor| tensor.ok_or_else(|| "an undefined tensor arrived".into()))
        .collect()
}

/// Turns an error or a panic into a message for C++.
fn guarded(err: ErrorSlot, run: impl FnOnce() -> std::result::Result<(), BoxError>) -> c_int {
    // A function that panicked half-way may be used again; it has only shared access to itself.
    let message = match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(())) => return 0,
        Ok(Err(error)) => chain(&*error),
        Err(panic) => format!("panicked: {}", panic_message(&*panic)),
    };
    // SAFETY: the slot is C++'s, valid for this call; the copy is from `malloc`, as C++ expects.
    unsafe { *err = malloc_string(&message) };
    1
}

/// An error and its causes, on one line: C++ carries one string.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(|cause| cause.to_string().replace('\n', "; ")).collect::<Vec<_>>().join(": ")
}

fn panic_message(panic: &(dyn Any + Send)) -> &str {
    let text = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied());
    first_line(text.unwrap_or_default())
}

fn malloc_string(text: &str) -> *mut c_char {
    match CString::new(text.replace('\0', " ")) {
        // SAFETY: a terminated string.
        Ok(text) => unsafe { libc::strdup(text.as_ptr()) },
        Err(_) => ptr::null_mut(), // C++ has a message of its own for null.
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    use tch::{Device, Kind};

    use super::*;

    /// `a² b` and, beside it, which elements of `a` are positive.
    struct SquareTimes;

    impl Function for SquareTimes {
        fn forward(&self, inputs: &[Tensor]) -> std::result::Result<Forward, BoxError> {
            let [a, b] = inputs else { return Err("two inputs expected".into()) };
            assert!(!crate::guards::GradMode::is_enabled());
            let outputs = vec![a.f_square()?.f_mul(b)?, a.f_gt(0)?];
            Ok(Forward { outputs, saved: vec![a.shallow_clone(), b.shallow_clone()] })
        }

        fn backward(
            &self,
            saved: &[Tensor],
            grads: &[Tensor],
        ) -> std::result::Result<Vec<Option<Tensor>>, BoxError> {
            let (a, b, grad) = (&saved[0], &saved[1], &grads[0]);
            Ok(vec![Some(grad * a * b * 2.), Some(grad * a.f_square()?)])
        }
    }

    fn leaf(values: &[f64]) -> Tensor {
        Tensor::from_slice(values).set_requires_grad(true)
    }

    fn values(tensor: &Tensor) -> Vec<f64> {
        Vec::try_from(tensor.reshape([-1])).unwrap()
    }

    #[test]
    fn gradients_are_taken_and_leave_none_behind() {
        let [x, y] = [2.0, 3.0].map(|value| Tensor::from(value).set_requires_grad(true));
        let none: &[Tensor] = &[];
        backward(&[&x * 5.0], none, GradOptions::default()).unwrap();

        let taken = take_grads(&[&x, &y]).unwrap();

        assert_eq!(taken[0].as_ref().unwrap().double_value(&[]), 5.0);
        assert!(taken[1].is_none() && !x.grad().defined());
    }

    #[test]
    fn gradients_match_finite_differences() {
        let (a, b) = (leaf(&[0.3, -1.2, 2.]), leaf(&[1.5, 0.7, -0.4]));
        let loss = |a: &Tensor, b: &Tensor| {
            apply(SquareTimes, &[a, b]).unwrap()[0].sin().sum(Kind::Double)
        };

        let analytic =
            grad::<_, Tensor, _>(&[loss(&a, &b)], &[], &[&a, &b], GradOptions::default()).unwrap();

        let step = 1e-6;
        for (which, analytic) in analytic.iter().enumerate() {
            for (i, analytic) in values(analytic.as_ref().unwrap()).into_iter().enumerate() {
                let shifted = |delta: f64| {
                    let inputs = [a.detach().copy(), b.detach().copy()];
                    let _ = inputs[which].get(i as i64).g_add_scalar_(delta);
                    loss(&inputs[0], &inputs[1]).double_value(&[])
                };
                let numeric = (shifted(step) - shifted(-step)) / (2. * step);
                assert!(
                    (numeric - analytic).abs() < 1e-7,
                    "input {which}, element {i}: {numeric} {analytic}"
                );
            }
        }
    }

    #[test]
    fn gradients_of_gradients_go_through_the_rust_backward() {
        let (a, b) = (leaf(&[3.]), leaf(&[5.]));
        let out = apply(SquareTimes, &[&a, &b]).unwrap().remove(0);
        let options = GradOptions { create_graph: true, ..GradOptions::default() };

        let first = grad::<_, Tensor, _>(&[out], &[], &[&a], options).unwrap().remove(0).unwrap(); // 2ab
        let second =
            grad::<_, Tensor, _>(&[first], &[], &[&a, &b], GradOptions::default()).unwrap();

        let second: Vec<f64> =
            second.iter().map(|grad| grad.as_ref().unwrap().double_value(&[0])).collect();
        assert_eq!(second, [10., 6.]); // 2b and 2a
    }

    #[test]
    fn outputs_that_are_no_numbers_take_no_gradient() {
        let (a, b) = (leaf(&[1., -1.]), leaf(&[1., 1.]));

        let outputs = apply(SquareTimes, &[&a, &b]).unwrap();

        assert!(outputs[0].requires_grad() && !outputs[1].requires_grad());
        assert_eq!(outputs[1].kind(), Kind::Bool);
    }

    #[test]
    fn explicit_output_gradients_weigh_the_outputs() {
        let x = leaf(&[1., 2.]);
        let unused = leaf(&[1.]);
        let (y, z) = (&x * 3., x.square());

        let grads = [Tensor::from_slice(&[1f64, 10.]), Tensor::from_slice(&[100f64, 1000.])];
        let found = grad(&[&y, &z], &grads, &[&x, &unused], GradOptions::default()).unwrap();

        assert_eq!(values(found[0].as_ref().unwrap()), [3. + 200., 30. + 4000.]);
        assert!(found[1].is_none());
        assert!(!x.grad().defined(), "`grad` leaves `.grad()` alone");
    }

    #[test]
    fn backward_accumulates_and_a_kept_graph_runs_again() {
        let x = leaf(&[1., 2.]);
        let y = x.square();
        let ones = Tensor::ones([2], (Kind::Double, Device::Cpu));

        backward(&[&y], &[&ones], GradOptions { keep_graph: true, ..GradOptions::default() })
            .unwrap();
        backward(&[&y], &[&ones], GradOptions::default()).unwrap();
        let gone = backward(&[&y], &[&ones], GradOptions::default()).unwrap_err();

        assert_eq!(values(&x.grad()), [4., 8.]);
        assert!(gone.to_string().contains("a second time"), "{gone}");
    }

    #[test]
    fn output_gradients_that_do_not_fit_are_refused() {
        let x = leaf(&[1., 2.]);
        let ones = Tensor::ones([3], (Kind::Double, Device::Cpu));

        let size = backward(&[x.square()], &[&ones], GradOptions::default()).unwrap_err();
        let count = backward(&[x.square()], &[&x, &x], GradOptions::default()).unwrap_err();
        let many = backward::<_, Tensor>(&[x.square()], &[], GradOptions::default()).unwrap_err();
        let leafless =
            grad::<_, Tensor, _>(&[x.sum(Kind::Double)], &[], &[ones], GradOptions::default())
                .unwrap_err();

        assert_eq!(size.to_string(), "output gradient 0 is of size [3], size [2] expected");
        assert_eq!(count.to_string(), "output gradients: 2 given, 1 expected");
        assert!(many.to_string().contains("scalar outputs"), "{many}");
        assert!(leafless.to_string().contains("does not require grad"), "{leafless}");
        assert_eq!(many.to_string().lines().count(), 1);
    }

    enum Fails {
        Forward,
        ForwardPanic,
        Backward,
        BackwardPanic,
        TooFew,
    }

    impl Function for Fails {
        fn forward(&self, inputs: &[Tensor]) -> std::result::Result<Forward, BoxError> {
            match self {
                Self::Forward => Err(Error::Number { name: "k", value: 0., expected: "1" }.into()),
                Self::ForwardPanic => panic!("forward went {}", "wrong"),
                _ => Ok(Forward { outputs: vec![&inputs[0] + 1.], saved: Vec::new() }),
            }
        }

        fn backward(
            &self,
            _: &[Tensor],
            _: &[Tensor],
        ) -> std::result::Result<Vec<Option<Tensor>>, BoxError> {
            match self {
                Self::Backward => Err("no way\nback".into()),
                Self::BackwardPanic => panic!("backward went wrong\nin detail"),
                _ => Ok(Vec::new()),
            }
        }
    }

    #[test]
    fn errors_and_panics_come_back_as_errors() {
        let x = leaf(&[1.]);
        let forward = |fails| apply(fails, &[&x]).map(|mut outputs| outputs.remove(0));
        let backward = |fails| {
            let out = forward(fails).unwrap();
            backward::<_, Tensor>(&[&out], &[], GradOptions::default()).unwrap_err().to_string()
        };
        let failed = "LibTorch failed while running a backward pass: ";

        let error = forward(Fails::Forward).unwrap_err().to_string();
        assert_eq!(error, "LibTorch failed while applying a function: `k` is 0, 1 expected");
        let error = forward(Fails::ForwardPanic).unwrap_err().to_string();
        assert_eq!(
            error,
            "LibTorch failed while applying a function: panicked: forward went wrong"
        );
        assert_eq!(backward(Fails::Backward), format!("{failed}no way; back"));
        assert_eq!(
            backward(Fails::BackwardPanic),
            format!("{failed}panicked: backward went wrong")
        );
        assert_eq!(
            backward(Fails::TooFew),
            format!("{failed}backward gave 0 gradients for 1 inputs")
        );

        let through_tch = forward(Fails::Backward).unwrap().f_backward().unwrap_err();
        assert_eq!(crate::brief(&through_tch), "no way; back");
    }

    #[test]
    fn a_saved_tensor_that_changed_is_refused() {
        let (a, mut b) = (leaf(&[1.]), Tensor::from_slice(&[2.0f64]));
        let out = apply(SquareTimes, &[&a, &b]).unwrap().remove(0);
        let _ = b.fill_(7.);

        let error = backward::<_, Tensor>(&[out], &[], GradOptions::default()).unwrap_err();

        assert!(error.to_string().contains("modified by an inplace operation"), "{error}");
    }

    /// Counts how many of it are dropped.
    struct Dropped(Arc<AtomicUsize>, Arc<AtomicBool>);

    impl Drop for Dropped {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::SeqCst);
            assert!(!self.1.load(Ordering::SeqCst), "a destructor that panics");
        }
    }

    impl Function for Dropped {
        fn forward(&self, inputs: &[Tensor]) -> std::result::Result<Forward, BoxError> {
            Ok(Forward { outputs: vec![&inputs[0] * 2.], saved: Vec::new() })
        }

        fn backward(
            &self,
            _: &[Tensor],
            grads: &[Tensor],
        ) -> std::result::Result<Vec<Option<Tensor>>, BoxError> {
            Ok(vec![Some(&grads[0] * 2.)])
        }
    }

    #[test]
    fn a_function_goes_with_its_graph() {
        let (count, panics) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let function = || Dropped(Arc::clone(&count), Arc::clone(&panics));
        let dropped = || count.load(Ordering::SeqCst);
        let (x, constant) = (leaf(&[1.]), Tensor::from_slice(&[1.0f64]));

        let out = apply(function(), &[&x]).unwrap();
        assert_eq!(dropped(), 0, "the graph holds it");
        drop(out);
        assert_eq!(dropped(), 1);
        let _out = apply(function(), &[&constant]).unwrap();
        assert_eq!(dropped(), 2, "nothing needs a gradient");
        assert!(apply(function(), &[]).is_err(), "indexing no inputs panics");
        assert_eq!(dropped(), 3);
        panics.store(true, Ordering::SeqCst);
        drop(apply(function(), &[&x]).unwrap());
        assert_eq!(dropped(), 4);
    }
}
