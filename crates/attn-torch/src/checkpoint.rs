//! Activations recomputed in the backward pass instead of kept from the forward pass.

use std::cell::OnceCell;
use std::ffi::c_int;

use tch::{Device, Kind, Tensor};

use crate::autograd::{BoxError, Forward, Function, GradOptions, apply, backward};
use crate::error::{Error, Result};
use crate::ffi;
use crate::guards::{Autocast, AutocastState, GradMode};
use crate::random::{RngReplay, rng_states};

/// Runs `run` on `inputs` without keeping what it computes on the way; the backward pass runs it again.
///
/// Costs one more forward pass and saves the memory of everything between inputs and outputs. (Chen et al. 2016,
/// "Training Deep Nets with Sublinear Memory Cost", <https://arxiv.org/abs/1604.06174>.)
///
/// - The second run draws the same random numbers (dropout) and computes under the same autocast as the first, on the
///   CPU and on the inputs' devices. `run` has to do the same thing both times.
/// - Parameters that `run` captures get their gradients, whether or not an input needs one. Capture leaves only:
///   what was itself computed from parameters belongs in `inputs`.
/// - Under `no_grad` it is a plain call.
///
/// # Errors
///
/// [`Error::Torch`] with `run`'s own message. The backward pass fails where it was asked for the gradients of chosen
/// inputs ([`grad`](crate::grad)) or for a graph of its own, neither of which a nested pass can serve.
pub fn checkpoint<F>(run: F, inputs: &[&Tensor]) -> Result<Vec<Tensor>>
where
    F: Fn(&[Tensor]) -> std::result::Result<Vec<Tensor>, BoxError> + Send + 'static,
{
    // An input that always needs a gradient: the graph would otherwise stop here when no other does, and the
    // captured parameters would silently get none.
    let anchor =
        Tensor::f_zeros([0], (Kind::Float, Device::Cpu)).map_err(Error::tch("checkpointing"))?;
    let anchor = if GradMode::is_enabled() { anchor.set_requires_grad(true) } else { anchor };
    let inputs: Vec<&Tensor> = inputs.iter().copied().chain([&anchor]).collect();
    apply(Checkpoint { run, replay: OnceCell::new() }, &inputs)
}

struct Checkpoint<F> {
    run: F,
    replay: OnceCell<Replay>,
}

/// What the second run has to find as the first did.
struct Replay {
    rng: Vec<(Device, Tensor)>,
    autocast: Vec<(c_int, AutocastState)>,
}

impl Replay {
    fn of(inputs: &[Tensor]) -> Result<Self> {
        let mut devices = vec![Device::Cpu];
        for input in inputs {
            if !devices.contains(&input.device()) {
                devices.push(input.device());
            }
        }
        let mut autocast = Vec::new();
        for device in [Device::Cpu, Device::Cuda(0)] {
            let (code, _) = ffi::device_code("checkpointing", device)?;
            autocast.push((code, AutocastState::get(code)?));
        }
        Ok(Self { rng: rng_states(&devices)?, autocast })
    }

    fn enter_autocast(&self) -> Result<Vec<Autocast>> {
        let mut guards = Vec::new();
        for &(device, state) in &self.autocast {
            guards.insert(0, Autocast::enter(device, state)?); // Dropped from the front: last in, first out.
        }
        Ok(guards)
    }
}

impl<F> Function for Checkpoint<F>
where
    F: Fn(&[Tensor]) -> std::result::Result<Vec<Tensor>, BoxError> + Send + 'static,
{
    fn forward(&self, inputs: &[Tensor]) -> std::result::Result<Forward, BoxError> {
        let inputs = &inputs[..inputs.len() - 1];
        let replay = Replay::of(inputs)?;
        let outputs = {
            let _autocast = replay.enter_autocast()?;
            (self.run)(inputs)?
        };
        let _ = self.replay.set(replay);
        Ok(Forward { outputs, saved: inputs.iter().map(Tensor::shallow_clone).collect() })
    }

    fn backward(
        &self,
        saved: &[Tensor],
        grads: &[Tensor],
    ) -> std::result::Result<Vec<Option<Tensor>>, BoxError> {
        if GradMode::is_enabled() {
            return Err(
                "a checkpoint cannot be differentiated twice: leave `create_graph` off".into()
            );
        }
        let mut allowed = 0;
        // SAFETY: a place to write to.
        ffi::call("checkpointing", |err| unsafe {
            ffi::attn_nested_backward_allowed(&mut allowed, err)
        })?;
        if allowed == 0 {
            return Err("a checkpoint needs a full backward pass: call `backward`, not `grad` of chosen inputs".into());
        }
        let replay =
            self.replay.get().ok_or("a checkpoint's backward pass came before its forward pass")?;

        let inputs: Vec<Tensor> =
            saved.iter().map(|x| x.detach().set_requires_grad(x.requires_grad())).collect();
        let outputs = {
            let _rng = RngReplay::new(&replay.rng)?;
            let _grad = GradMode::new(true);
            let _autocast = replay.enter_autocast()?;
            (self.run)(&inputs)?
        };
        if outputs.len() != grads.len() {
            let (first, second) = (grads.len(), outputs.len());
            return Err(
                format!("a checkpoint gave {first} outputs, then {second} when run again").into()
            );
        }
        let (outputs, grads): (Vec<_>, Vec<_>) =
            outputs.into_iter().zip(grads).filter(|(output, _)| output.requires_grad()).unzip();
        if !outputs.is_empty() {
            backward(&outputs, &grads, GradOptions::default())?;
        }
        let input_grads =
            inputs.iter().map(Tensor::grad).map(|grad| grad.defined().then_some(grad));
        Ok(input_grads.chain([None]).collect())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::autograd::grad;
    use crate::random::seeded;

    type Block = Box<dyn Fn(&[Tensor]) -> std::result::Result<Vec<Tensor>, BoxError> + Send>;

    /// A matrix with no structure, without drawing from LibTorch's stream.
    fn matrix(rows: i64, columns: i64, salt: f64) -> Tensor {
        let count = Tensor::arange(rows * columns, (Kind::Double, Device::Cpu));
        ((count * 12.9898 + salt).sin() * 0.7).view([rows, columns]).to_kind(Kind::Float)
    }

    fn param(salt: f64) -> Tensor {
        matrix(8, 8, salt).set_requires_grad(true)
    }

    /// Two matrix products with dropout between.
    fn block(weight: &Tensor) -> Block {
        let weight = weight.shallow_clone();
        Box::new(move |inputs| {
            let hidden = inputs[0].f_matmul(&weight)?.f_gelu("none")?.f_dropout(0.4, true)?;
            Ok(vec![hidden.f_matmul(&weight)?])
        })
    }

    struct Outcome {
        out: Tensor,
        x: Tensor,
        weight: Tensor,
    }

    impl Outcome {
        fn assert_same(&self, other: &Self) {
            for (name, a, b) in [
                ("out", &self.out, &other.out),
                ("x", &self.x, &other.x),
                ("weight", &self.weight, &other.weight),
            ] {
                assert_eq!(a.defined(), b.defined(), "{name}");
                assert!(!a.defined() || a.equal(b), "{name} differs");
            }
        }
    }

    /// Output and gradients of a block from the same start. Call it with what [`seeded`] returns held.
    fn outcome(checkpointed: bool, x_needs_grad: bool, autocast: Option<Kind>) -> Outcome {
        tch::manual_seed(3);
        let x = matrix(4, 8, 1.).set_requires_grad(x_needs_grad);
        let weight = param(2.);
        let block = block(&weight);
        let out = {
            let _autocast = autocast.map(|kind| Autocast::new(Device::Cpu, kind).unwrap());
            let mut outputs = if checkpointed {
                checkpoint(block, &[&x])
            } else {
                Ok(block(&[x.shallow_clone()]).unwrap())
            };
            outputs.as_mut().unwrap().remove(0)
        };
        out.to_kind(Kind::Float).square().sum(Kind::Float).backward();
        Outcome { out: out.detach(), x: x.grad(), weight: weight.grad() }
    }

    #[test]
    fn nothing_differs_from_a_plain_run_with_dropout() {
        let _stream = seeded(3);

        let plain = outcome(false, true, None);
        let after_plain = Tensor::randn([3], (Kind::Float, Device::Cpu));
        let checkpointed = outcome(true, true, None);
        let after_checkpointed = Tensor::randn([3], (Kind::Float, Device::Cpu));

        plain.assert_same(&checkpointed);
        assert!(after_plain.equal(&after_checkpointed), "the second run moved the stream");
        let zeros = i64::try_from(plain.out.eq(0.).sum(Kind::Int64)).unwrap();
        assert_eq!(zeros, 0, "the test is about dropout between two products");
    }

    #[test]
    fn captured_parameters_get_gradients_though_no_input_needs_one() {
        let _stream = seeded(3);

        let (plain, checkpointed) = (outcome(false, false, None), outcome(true, false, None));

        assert!(checkpointed.weight.defined() && !checkpointed.x.defined());
        plain.assert_same(&checkpointed);
    }

    #[test]
    fn the_second_run_is_under_the_same_autocast() {
        let _stream = seeded(3);

        let (plain, checkpointed) =
            (outcome(false, true, Some(Kind::BFloat16)), outcome(true, true, Some(Kind::BFloat16)));

        assert_eq!(checkpointed.out.kind(), Kind::BFloat16);
        plain.assert_same(&checkpointed);
    }

    #[test]
    fn a_parameter_used_again_under_the_same_autocast_keeps_its_gradient() {
        let _stream = seeded(3);
        let (x, weight) = (matrix(4, 8, 1.), param(2.));
        let _autocast = Autocast::new(Device::Cpu, Kind::BFloat16).unwrap();

        let _ = checkpoint(block(&weight), &[&x]).unwrap();
        let out = x.matmul(&weight);

        assert!(out.requires_grad(), "a cast made without gradients was found again");
    }

    #[test]
    fn the_block_runs_twice_and_checkpoints_nest() {
        let _stream = seeded(3);
        let runs = Arc::new(AtomicUsize::new(0));
        let weight = param(2.);
        let x = matrix(4, 8, 1.);
        let (counter, inner_weight) = (Arc::clone(&runs), weight.shallow_clone());
        let outer = move |inputs: &[Tensor]| -> std::result::Result<Vec<Tensor>, BoxError> {
            let (counter, weight) = (Arc::clone(&counter), inner_weight.shallow_clone());
            let inner = move |inputs: &[Tensor]| {
                counter.fetch_add(1, Ordering::SeqCst);
                Ok(vec![inputs[0].f_matmul(&weight)?.f_tanh()?])
            };
            let hidden = checkpoint(inner, &[&inputs[0]])?.remove(0);
            Ok(vec![hidden.f_matmul(&inner_weight)?])
        };

        let out = checkpoint(outer, &[&x]).unwrap().remove(0);
        assert_eq!(runs.load(Ordering::SeqCst), 1);
        out.square().sum(Kind::Float).backward();
        let found = weight.grad();

        assert_eq!(runs.load(Ordering::SeqCst), 3, "once forward, once in each second run");
        let plain_weight = param(2.);
        x.matmul(&plain_weight).tanh().matmul(&plain_weight).square().sum(Kind::Float).backward();
        assert!(found.allclose(&plain_weight.grad(), 1e-6, 1e-6, false));
    }

    #[test]
    fn gradients_of_chosen_inputs_and_second_derivatives_are_refused() {
        let _stream = seeded(3);
        let (x, weight) = (matrix(4, 8, 1.).set_requires_grad(true), param(2.));
        let loss = || checkpoint(block(&weight), &[&x]).unwrap()[0].sum(Kind::Float);

        let chosen =
            grad::<_, Tensor, _>(&[loss()], &[], &[&x], GradOptions::default()).unwrap_err();
        let twice = GradOptions { create_graph: true, ..GradOptions::default() };
        let twice = backward::<_, Tensor>(&[loss()], &[], twice).unwrap_err();

        assert!(
            chosen.to_string().ends_with("call `backward`, not `grad` of chosen inputs"),
            "{chosen}"
        );
        assert!(twice.to_string().ends_with("leave `create_graph` off"), "{twice}");
        assert!(!weight.grad().defined(), "a refused pass leaves no gradients behind");
    }

    #[test]
    fn a_block_that_fails_says_so_in_either_run() {
        let _stream = seeded(3);
        let x = matrix(4, 8, 1.).set_requires_grad(true);
        let failing = |good_runs: usize| {
            let runs = AtomicUsize::new(0);
            move |inputs: &[Tensor]| match runs.fetch_add(1, Ordering::SeqCst) {
                run if run < good_runs => Ok(vec![inputs[0].f_square()?]),
                _ => Err("out of luck".into()),
            }
        };

        let first = checkpoint(failing(0), &[&x]).unwrap_err();
        let out = checkpoint(failing(1), &[&x]).unwrap().remove(0).sum(Kind::Float);
        let second = backward::<_, Tensor>(&[out], &[], GradOptions::default()).unwrap_err();

        assert_eq!(first.to_string(), "LibTorch failed while applying a function: out of luck");
        assert_eq!(
            second.to_string(),
            "LibTorch failed while running a backward pass: out of luck"
        );
        assert!(GradMode::is_enabled());
    }

    #[test]
    fn it_is_a_plain_call_where_nothing_is_recorded_and_harmless_where_all_is_frozen() {
        let _stream = seeded(3);
        let (x, frozen) = (matrix(4, 8, 1.), matrix(8, 8, 2.));

        let unrecorded = tch::no_grad(|| checkpoint(block(&param(2.)), &[&x]).unwrap().remove(0));
        assert!(!unrecorded.requires_grad());
        {
            let _inference = crate::InferenceMode::new();
            let inside = checkpoint(block(&frozen), &[&x]).unwrap().remove(0);
            assert!(crate::is_inference(&inside));
        }
        let out = checkpoint(block(&frozen), &[&x]).unwrap().remove(0);
        backward::<_, Tensor>(&[out.sum(Kind::Float)], &[], GradOptions::default()).unwrap();

        assert!(!frozen.grad().defined() && !x.grad().defined());
    }
}
