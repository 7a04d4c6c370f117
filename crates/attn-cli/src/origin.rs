//! What the last bits of a result depend on beside the model, the rows and the settings.

use anyhow::Result;
use serde::Serialize;

/// The program, the library, the machine, and what was typed.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Origin {
    pub(crate) attn: &'static str,
    pub(crate) libtorch: String,
    /// Threads of one operation.
    pub(crate) threads: i32,
    /// The processor, and which of its instructions LibTorch uses.
    pub(crate) cpu: String,
    pub(crate) arguments: Vec<String>,
}

impl Origin {
    /// That of this process. Ask once the threads are set.
    pub(crate) fn now() -> Result<Self> {
        Ok(Self {
            attn: env!("CARGO_PKG_VERSION"),
            libtorch: attn_torch::libtorch_version()?,
            threads: tch::get_num_threads(),
            cpu: attn_train::cpu()?,
            arguments: arguments(),
        })
    }

    /// As the metadata of a safetensors file has it, which is text: without what was typed, as that names the file itself.
    pub(crate) fn as_metadata(&self) -> [(String, String); 4] {
        [
            ("attn".into(), self.attn.into()),
            ("libtorch".into(), self.libtorch.clone()),
            ("threads".into(), self.threads.to_string()),
            ("cpu".into(), self.cpu.clone()),
        ]
    }
}

/// A result with its origin.
#[derive(Serialize)]
pub(crate) struct Recorded<T> {
    #[serde(flatten)]
    value: T,
    #[serde(flatten)]
    origin: Origin,
}

impl<T> Recorded<T> {
    pub(crate) fn now(value: T) -> Result<Self> {
        Ok(Self { value, origin: Origin::now()? })
    }
}

/// What was typed, without the program's own name.
pub(crate) fn arguments() -> Vec<String> {
    std::env::args_os().skip(1).map(|arg| arg.to_string_lossy().into_owned()).collect()
}
