//! What goes into attention layers, as second moments: all that alignment needs of a text, whatever its length.

use std::collections::BTreeMap;

use tch::{Device, Kind, Tensor};

use super::no_moments;
use crate::{
    Error, Model, ModelInput,
    config::Head,
    model::{ForwardOptions, real_rows},
};

/// Mean h̃ h̃ᵀ of what goes into layers, h̃ = [h, 1]: those of keys, values and queries follow, as they are linear in h̃. Streamed and
/// in `f64`: a square matrix a layer is held, however long the text.
#[derive(Debug)]
pub struct Moments {
    /// Sums, `[hidden_size + 1, hidden_size + 1]`, by layer.
    sums: BTreeMap<usize, Tensor>,
    n_tokens: i64,
    max_len: i64,
}

impl Moments {
    /// Of nothing yet.
    pub fn of_layers(layers: &[usize]) -> Self {
        let empty = || Tensor::zeros([0], (Kind::Double, Device::Cpu));
        Self {
            sums: layers.iter().map(|&layer| (layer, empty())).collect(),
            n_tokens: 0,
            max_len: 1,
        }
    }

    /// Adds what goes into the layers when `model` reads `input`, of its real tokens.
    ///
    /// # Errors
    /// As [`Model::forward`]; [`Error::Index`] for a layer that the model does not have.
    pub fn add(&mut self, model: &Model, input: &ModelInput) -> Result<(), Error> {
        let count = model.layers().len();
        if let Some(&layer) = self.sums.keys().find(|&&layer| layer >= count) {
            return Err(Error::Index { what: "layer", index: layer as i64, count: count as i64 });
        }
        let inputs = attention_inputs(model, input, false)?.0;
        for (&layer, sum) in &mut self.sums {
            let h = real_rows(&inputs[layer], input).to_kind(Kind::Double);
            let h = Tensor::cat(&[&h, &h.ones_like().narrow(1, 0, 1)], 1);
            let moment = h.tr().matmul(&h).to_device(Device::Cpu);
            *sum = if sum.numel() == 0 { moment } else { &*sum + moment };
        }
        self.n_tokens += input.n_real();
        self.max_len = self.max_len.max(input.input_ids.size()[1]);
        Ok(())
    }

    /// Tokens so far.
    pub fn n_tokens(&self) -> i64 {
        self.n_tokens
    }

    /// Tokens of the longest row so far, padding included.
    pub(super) fn max_len(&self) -> i64 {
        self.max_len
    }

    /// The mean of one layer: `[hidden_size + 1, hidden_size + 1]`.
    pub(super) fn of(&self, layer: usize, hidden_size: i64) -> Result<Tensor, Error> {
        let Some(sum) = self.sums.get(&layer).filter(|sum| sum.numel() > 0) else {
            return Err(no_moments(layer, "there are none"));
        };
        if self.n_tokens < hidden_size {
            return Err(no_moments(
                layer,
                &format!(
                    "they are of {} tokens, and a hidden state has {hidden_size} channels\nhint: give more text",
                    self.n_tokens
                ),
            ));
        }
        if sum.size() != [hidden_size + 1; 2] {
            return Err(no_moments(layer, "they are of a model of another width"));
        }
        if !sum.isfinite().all().int64_value(&[]).eq(&1) {
            return Err(no_moments(layer, "some are not finite\nhint: compute in f32"));
        }
        Ok(sum / self.n_tokens)
    }
}

/// What goes into each attention layer and, if asked for, z: the head of the model is spared where it can be.
pub(crate) fn attention_inputs(
    model: &Model,
    input: &ModelInput,
    z: bool,
) -> Result<(Vec<Tensor>, Vec<Tensor>), Error> {
    let nowhere = Tensor::zeros([1], (Kind::Int64, Device::Cpu));
    let is_language_model = model.config().head == Head::LanguageModel;
    let options = ForwardOptions {
        attention_inputs: true,
        z,
        logits_at: is_language_model.then_some(&nowhere),
        before_vocabulary: is_language_model,
        ..ForwardOptions::default()
    };
    let output = tch::no_grad(|| model.forward(input, &options))?;
    Ok((output.attention_inputs, output.z))
}
