//! What a run's last bits depend on beside its settings.

use attn_core::Model;
use attn_torch::{libtorch_config, libtorch_version, rng_state, set_rng_state};
use serde::{Deserialize, Serialize};
use tch::{Device, Tensor};

use crate::error::Result;

/// Where a run takes place. Sums are split by thread and by vector width, so each of these moves their last bits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Environment {
    /// LibTorch's version.
    pub libtorch: String,
    /// Threads of one operation.
    pub threads: i32,
    /// The processor, and which of its instructions LibTorch uses.
    pub cpu: String,
    /// Where the model is.
    pub device: String,
}

impl Environment {
    /// That of this process, for `model`.
    ///
    /// # Errors
    ///
    /// Where LibTorch does not describe itself.
    pub fn of(model: &Model) -> Result<Self> {
        Ok(Self {
            libtorch: libtorch_version()?,
            threads: tch::get_num_threads(),
            cpu: cpu()?,
            device: device_name(model.device()),
        })
    }

    /// The fields in which `other` differs: name, here, there.
    pub fn differences(&self, other: &Self) -> Vec<(&'static str, String, String)> {
        let fields = [
            ("LibTorch", self.libtorch.clone(), other.libtorch.clone()),
            ("number of threads", self.threads.to_string(), other.threads.to_string()),
            ("processor", self.cpu.clone(), other.cpu.clone()),
            ("device", self.device.clone(), other.device.clone()),
        ];
        fields.into_iter().filter(|(_, here, there)| here != there).collect()
    }
}

/// The processor, and which of its instructions LibTorch uses.
///
/// # Errors
///
/// Where LibTorch does not describe itself.
pub fn cpu() -> Result<String> {
    let config = libtorch_config()?;
    let instructions = config
        .lines()
        .find_map(|line| line.trim().strip_prefix("- CPU capability usage: "))
        .unwrap_or("unknown instructions");
    let model_name = std::fs::read_to_string("/proc/cpuinfo").ok().and_then(|info| {
        let line = info.lines().find(|line| line.starts_with("model name"))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    });
    let name = model_name.unwrap_or_else(|| std::env::consts::ARCH.to_owned());
    Ok(format!("{name}, {instructions}"))
}

fn device_name(device: Device) -> String {
    match device {
        Device::Cpu => "cpu".into(),
        Device::Cuda(index) => format!("cuda:{index}"),
        other => format!("{other:?}").to_lowercase(),
    }
}

/// The state of LibTorch's random streams that a model on a device draws from.
#[derive(Debug)]
pub(crate) struct RngState {
    /// Name in a checkpoint, device, state.
    streams: Vec<(&'static str, Device, Tensor)>,
}

impl RngState {
    /// The streams' names and devices for a model on `device`.
    fn names(device: Device) -> Vec<(&'static str, Device)> {
        let own = (device != Device::Cpu).then_some(("rng.device", device));
        std::iter::once(("rng.cpu", Device::Cpu)).chain(own).collect()
    }

    /// As they are now.
    pub(crate) fn now(device: Device) -> Result<Self> {
        let streams = Self::names(device)
            .into_iter()
            .map(|(name, device)| Ok((name, device, rng_state(device)?)))
            .collect::<Result<_>>()?;
        Ok(Self { streams })
    }

    /// Puts the streams back to where they were.
    pub(crate) fn restore(&self) -> Result<()> {
        for (_, device, state) in &self.streams {
            set_rng_state(*device, state)?;
        }
        Ok(())
    }

    /// For a checkpoint.
    pub(crate) fn to_tensors(&self) -> Vec<(String, Tensor)> {
        let named =
            |(name, _, state): &(&str, Device, Tensor)| ((*name).to_owned(), state.shallow_clone());
        self.streams.iter().map(named).collect()
    }

    /// From a checkpoint; `None` where it was made on another kind of device.
    pub(crate) fn from_tensors(
        device: Device,
        mut take: impl FnMut(&str) -> Option<Tensor>,
    ) -> Option<Self> {
        let streams = Self::names(device)
            .into_iter()
            .map(|(name, device)| Some((name, device, take(name)?)))
            .collect::<Option<_>>()?;
        Some(Self { streams })
    }
}
