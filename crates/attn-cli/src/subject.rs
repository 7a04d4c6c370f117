//! What was measured, and in what: the fields that all measurements of a model have in common.

use anyhow::Result;
use attn_core::{Model, Variant};
use serde::Serialize;

use crate::{
    args::{ComputeArgs, Init, dtype_name},
    origin::Origin,
    run_dir::{SCHEMA, device_name},
    surgery::variants,
};

/// A model, and what it was run with.
#[derive(Serialize)]
pub(crate) struct Subject<'a> {
    /// The version of results/SCHEMA.md.
    schema: u32,
    model: &'a str,
    /// Whether the weights were made at random from the config, for comparison.
    random_weights: bool,
    /// Absent of a model that could not be loaded, as the next.
    model_type: Option<&'static str>,
    /// Attention kind of each layer, with its settings.
    attention: Option<Vec<Variant>>,
    device: String,
    dtype: &'static str,
    #[serde(flatten)]
    origin: Origin,
}

impl<'a> Subject<'a> {
    /// `name` is what the user called it.
    pub(crate) fn new(name: &'a str, compute: &ComputeArgs, model: &Model) -> Result<Self> {
        Ok(Self {
            model_type: Some(model.config().base_model_type()),
            attention: Some(variants(model)),
            ..Self::unloaded(name, compute)?
        })
    }

    /// A model that could not be loaded.
    pub(crate) fn unloaded(name: &'a str, compute: &ComputeArgs) -> Result<Self> {
        Ok(Self {
            schema: SCHEMA,
            model: name,
            random_weights: compute.init == Some(Init::Random),
            model_type: None,
            attention: None,
            device: device_name(compute.device()?),
            dtype: dtype_name(compute.dtype.into()),
            origin: Origin::now()?,
        })
    }

    /// What the user called the model.
    pub(crate) fn model(&self) -> &'a str {
        self.model
    }
}

/// The key/value head that each query head reads, layers × heads; `None` where no two read the same one.
pub(crate) fn shared_kv(model: &Model) -> Option<Vec<Vec<i64>>> {
    let readers: Vec<Vec<i64>> =
        model.layers().iter().map(|layer| layer.spec().kv_readers()).collect();
    let shares = |layer: &Vec<i64>| (1..layer.len()).any(|at| layer[..at].contains(&layer[at]));
    readers.iter().any(shares).then_some(readers)
}
