//! What tch lacks of LibTorch, behind a safe interface.
//!
//! - gradients: operations with a backward pass written in Rust ([`Function`]), gradients for given output gradients
//!   ([`grad`], [`backward`]), activations recomputed instead of kept ([`checkpoint`]);
//! - training: [`AdamW`] over lists of parameters with a state that can be saved, [`clip_grad_norm`];
//! - decoding: a matrix times one row ([`matvec`]), and single queries over a cache ([`decode`]), at the speed of memory;
//! - attention in which a query sees a few stretches of keys ([`attend`], [`choose_blocks`]), and by positive random features
//!   ([`performer`()]), in `f32` on the CPU;
//! - predictions: what rows of logits say, in one reading ([`read_logits`]);
//! - process state: [`rng_state`], [`Autocast`], [`InferenceMode`], [`set_deterministic`], [`set_tf32`], [`SdpFlags`];
//! - memory: tensors laid over a file or any other bytes without a copy ([`Bytes`]), [`tune_allocator`], counted
//!   ([`count_cpu_memory`]);
//! - machines: CUDA loaded at run time, so that one binary serves machines with and without it ([`device`]).
//!
//! A C++ exception arrives as [`Error::Torch`], a panic in a callback as an error of the pass it ran in.
//! This is the only crate of the workspace with C++ in it.
#![allow(unsafe_code, reason = "calls C++; every block says why it is sound")]

mod attend;
mod autograd;
mod bytes;
mod checkpoint;
mod cuda;
mod decode;
mod error;
mod ffi;
mod guards;
mod matvec;
mod memory;
mod optim;
mod performer;
mod random;
mod settings;
mod vocabulary;

pub use attend::{BlockChoice, Choices, Seen, attend, attends, choose_blocks};
pub use autograd::{BoxError, Forward, Function, GradOptions, apply, backward, grad, take_grads};
pub use bytes::Bytes;
pub use checkpoint::checkpoint;
pub use cuda::{
    CudaDevice, CudaMemory, CudaVersion, cuda_device_count, cuda_devices, cuda_driver_version,
    cuda_memory, cuda_runtime_version, device, load_cuda, reset_peak_cuda_memory,
};
pub use decode::decode;
pub use error::{Error, Result, brief};
pub use guards::{Autocast, InferenceMode, is_inference};
pub use matvec::matvec;
pub use memory::{CpuMemory, count_cpu_memory, cpu_memory, reset_peak_cpu_memory};
pub use optim::{AdamState, AdamW, clip_grad_norm};
pub use performer::{PositiveFeatures, performer};
pub use random::{rng_state, set_rng_state};
pub use settings::{
    LIBTORCH_BUILT, LIBTORCH_WANTED, SdpFlags, is_deterministic, libtorch_config, libtorch_path,
    libtorch_version, multiplies_bf16, set_deterministic, set_tf32, tf32, tune_allocator,
};
pub use vocabulary::{Reading, read_logits};
