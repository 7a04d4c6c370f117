//! What decoding with a model costs: time a token, and what is kept between tokens.

use std::{ops::ControlFlow, time::Instant};

use attn_core::{
    Mask, Model,
    attention::Stream,
    config::LayerSpec,
    generate::{Limits, Sampling, generate},
    layer::{AttnLayer, LayerPass, Tap},
};
use tch::{Kind, Tensor};

use crate::error::Result;

/// Tokens that a layer is given at a time.
const CHUNK: i64 = 1024;

/// Bytes that the layers of `model` keep for one row after `n_tokens` tokens.
///
/// Each layer is fed by itself, with random hidden states: what is kept depends on their number alone, and a table of
/// positions does not end it. Buffers that grow by doubling are counted as they are: fed a thousand tokens at a time they
/// have room for no more than came, up to twice that token by token.
///
/// # Errors
///
/// As [`AttnLayer::forward`].
pub fn state_bytes(model: &Model, n_tokens: i64) -> Result<usize> {
    let mut known = StateBytes::new(n_tokens);
    model.layers().iter().map(|layer| known.of(model, layer)).sum()
}

/// [`layer_state_bytes`] of layers many of which are alike: each sort is tried once.
pub(crate) struct StateBytes {
    n_tokens: i64,
    known: Vec<(LayerSpec, usize)>,
}

impl StateBytes {
    pub(crate) fn new(n_tokens: i64) -> Self {
        Self { n_tokens, known: Vec::new() }
    }

    pub(crate) fn of(&mut self, model: &Model, layer: &AttnLayer) -> Result<usize> {
        let spec = layer.spec();
        if let Some((_, bytes)) = self.known.iter().find(|(other, _)| *other == spec) {
            return Ok(*bytes);
        }
        let bytes = layer_state_bytes(model, layer, self.n_tokens)?;
        self.known.push((spec, bytes));
        Ok(bytes)
    }
}

/// What one layer of `model` has of [`state_bytes`].
///
/// # Errors
///
/// As [`AttnLayer::forward`].
pub fn layer_state_bytes(model: &Model, layer: &AttnLayer, n_tokens: i64) -> Result<usize> {
    let _no_grad = tch::no_grad_guard();
    let mut state = layer.kind().start();
    let width = model.config().sizes.hidden_size;
    for start in (0..n_tokens).step_by(CHUNK as usize) {
        let len = CHUNK.min(n_tokens - start);
        let hidden = Tensor::rand([1, len, width], (model.kind(), model.device())) - 0.5;
        let positions = Tensor::arange_start(start, start + len, (Kind::Int64, model.device()));
        let _z = layer.forward(
            &hidden,
            &mut LayerPass {
                mask: &Mask::new(true),
                positions: &positions.unsqueeze(0),
                rotary: None,
                gate: None,
                fan: 1,
                train: false,
                stream: Stream::default(),
                source: None,
                state: Some(state.as_mut()),
                at: None,
                tap: &mut Tap::default(),
            },
        )?;
    }
    Ok(state.bytes())
}

/// Tokens a second that `model` writes behind `prompt`, greedily, one row, the first left out: the median of three runs
/// after one that does not count.
///
/// # Errors
///
/// As [`generate`].
pub fn decoding_tokens_per_s(model: &Model, prompt: &[i64], n_new: usize) -> Result<f64> {
    let limits = Limits { max_new_tokens: n_new.max(2), stop_ids: Vec::new() };
    let mut rates = Vec::new();
    for _ in 0..4 {
        let mut first = None;
        let mut last = Instant::now();
        generate(model, &[prompt.to_vec()], &Sampling::default(), &limits, &mut |_, _| {
            last = Instant::now();
            first.get_or_insert(last);
            ControlFlow::Continue(())
        })?;
        let began = first.expect("two tokens were asked for");
        rates.push((limits.max_new_tokens - 1) as f64 / (last - began).as_secs_f64());
    }
    let mut counted = rates.split_off(1);
    counted.sort_by(f64::total_cmp);
    Ok(counted[counted.len() / 2])
}
