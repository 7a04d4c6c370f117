//! Asking about CUDA before it is loaded: a process of its own, as the answer sticks.

use attn_torch::{Error, load_cuda};

#[test]
fn cuda_that_is_asked_about_too_early_is_an_error_not_a_wrong_answer() {
    assert!(!tch::Cuda::is_available());

    match load_cuda() {
        Err(Error::NoCuda { .. }) => {}
        other => panic!(
            "an error was expected, as LibTorch has decided that there is no CUDA: {other:?}"
        ),
    }
}
