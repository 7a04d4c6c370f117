//! CUDA on machines with and without it. What a process asks of CUDA first decides the rest, so these have a process
//! of their own; a `Once` puts the loading first.

use std::io::Write;

use attn_torch::{Autocast, Error, cuda_device_count, device, load_cuda};
use tch::{Device, Kind, Tensor};

/// The first GPU, or `None` after saying why there is none.
fn gpu() -> Option<Device> {
    match cuda_device_count() {
        Ok(_) => Some(Device::Cuda(0)),
        Err(error) => {
            // Not by `eprintln`, which the test harness hides.
            let message = format!("\nSKIPPED for want of a GPU: {error}\n");
            let _ = std::io::stderr().write_all(message.as_bytes());
            None
        }
    }
}

#[test]
fn names_of_devices_are_parsed() {
    assert_eq!(device("cpu").unwrap(), Device::Cpu);
    for name in [
        "",
        "gpu",
        "CPU",
        "cuda:",
        "cuda:x",
        "cuda:-1",
        "cuda:+1",
        "cuda: 1",
        "mps",
        "cuda:99999999999999999999",
    ] {
        let error = device(name).unwrap_err().to_string();
        assert_eq!(
            error,
            format!("`{name}` is no device, expected `cpu`, `cuda`, `cuda:N` or `auto`")
        );
    }
}

#[test]
fn cuda_that_is_missing_is_an_error_with_a_way_out() {
    match cuda_device_count() {
        Err(error) => {
            assert!(matches!(error, Error::NoCuda { .. }), "{error}");
            let message = error.to_string();
            assert!(
                message.starts_with("CUDA cannot be used: ") && message.contains("\nhint: "),
                "{message}"
            );
            assert_eq!(message.lines().count(), 2);
            assert_eq!(device("cuda").unwrap_err().to_string(), message);
            assert_eq!(device("cuda:7").unwrap_err().to_string(), message);
            assert_eq!(device("auto").unwrap(), Device::Cpu);
            assert!(attn_torch::cuda_memory(0).is_err());
            assert!(attn_torch::rng_state(Device::Cuda(0)).is_err());
        }
        Ok(n_devices) => {
            assert_eq!(device("cuda").unwrap(), Device::Cuda(0));
            assert_eq!(device("auto").unwrap(), Device::Cuda(0));
            let beyond = device(&format!("cuda:{n_devices}")).unwrap_err();
            assert!(matches!(beyond, Error::CudaIndex { .. }), "{beyond}");
        }
    }
}

#[test]
fn loading_twice_gives_the_same_answer() {
    let answer = |loaded: attn_torch::Result<()>| loaded.map_err(|error| error.to_string());

    assert_eq!(answer(load_cuda()), answer(load_cuda()));
}

#[test]
fn drivers_and_devices_agree() {
    match attn_torch::cuda_driver_version() {
        Ok(driver) => assert!(driver.major >= 11, "{driver}"),
        Err(error) => assert!(matches!(error, Error::NoCuda { .. }), "{error}"),
    }
    if gpu().is_none() {
        return;
    }
    let devices = attn_torch::cuda_devices().unwrap();
    assert_eq!(devices.len(), cuda_device_count().unwrap());
    assert!(
        !devices[0].name.is_empty()
            && devices[0].total_bytes > 1 << 30
            && devices[0].compute_capability.0 >= 5
    );
    assert!(
        attn_torch::cuda_runtime_version().unwrap() <= attn_torch::cuda_driver_version().unwrap()
    );
}

#[test]
fn memory_random_state_and_autocast_work_on_a_gpu() {
    let Some(device) = gpu() else { return };
    let before = attn_torch::cuda_memory(0).unwrap();
    let x = Tensor::ones([1024, 1024], (Kind::Float, device));
    let after = attn_torch::cuda_memory(0).unwrap();
    assert!(after.allocated >= before.allocated + (4 << 20) && after.total > after.free);

    let state = attn_torch::rng_state(device).unwrap();
    let first = Tensor::randn([9], (Kind::Float, device));
    attn_torch::set_rng_state(device, &state).unwrap();
    assert!(Tensor::randn([9], (Kind::Float, device)).equal(&first));

    let _autocast = Autocast::new(device, Kind::BFloat16).unwrap();
    assert_eq!(x.matmul(&x).kind(), Kind::BFloat16);
}

#[test]
fn an_adamw_step_on_a_gpu_equals_that_on_the_cpu() {
    let Some(device) = gpu() else { return };
    let numbers =
        |salt: f64| (Tensor::arange(63, (Kind::Double, Device::Cpu)) * 12.9898 + salt).sin();
    let step = |device: Device, kind: Kind| {
        let params = [numbers(0.).to_kind(kind).to_device(device)];
        let mut state = attn_torch::AdamState::zeros(&params).unwrap();
        for salt in 1..4 {
            let grads = [numbers(f64::from(salt)).to_kind(kind).to_device(device)];
            attn_torch::clip_grad_norm(&grads, 1.).unwrap();
            attn_torch::AdamW { lr: 0.1, ..Default::default() }
                .step(&params, &grads, &mut state)
                .unwrap();
        }
        let [param] = params;
        param.to_device(Device::Cpu).to_kind(Kind::Double)
    };

    let (expected, actual) = (step(Device::Cpu, Kind::Double), step(device, Kind::Float));

    assert!(actual.allclose(&expected, 1e-5, 1e-6, false));
}
