//! Recovery without training: the output projections of a model that has lost heads, fitted anew in closed form.
//!
//! ```text
//! W', b' = argmin Σ_t ‖W' z'_t + b' − y_t‖² + ridge · m ‖W' − W‖²,     m = mean_i Σ_t z'_ti²
//! ```
//!
//! y_t is what the layer's attention put out at token t in the model as it was, z'_t the outputs of the heads that are left, on the
//! hidden states of the model as it has become: layer by layer from the first, so that a layer makes up for those before it, too.
//! W is the projection as it stands, so that what the tokens do not determine stays as it was. b' stands only where the layer has a
//! bias, and is not drawn to the old one.
//!
//! After Kwon et al. 2022, "A Fast Post-Training Pruning Framework for Transformers", <https://arxiv.org/abs/2204.09656>, section 4.3,
//! who fit one factor a head; here the whole projection is fitted, as Frantar and Alistarh 2022 do of pruned matrices,
//! <https://arxiv.org/abs/2208.11580>.

use std::collections::BTreeMap;

use tch::{Kind, Tensor};

use crate::{
    Error,
    kv_heads::attention_inputs,
    layer::{AttnLayer, joined},
    model::{ForwardOptions, Model, ModelInput, real_rows},
    running::Running,
};

/// What became of one layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Refitted {
    /// The layer.
    pub layer: usize,
    /// Tokens that it was fitted to.
    pub n_tokens: i64,
    /// Unknowns of an output channel: channels of the heads left, and the bias where there is one.
    pub n_unknowns: i64,
    /// How many of them the tokens determine: the rank of Σ z' z'ᵀ, to a relative 1e-10.
    pub rank: i64,
    /// Σ ‖ŷ − y‖² / Σ ‖y‖² with the projection as it stood.
    pub error_before: f64,
    /// With the new one, on the same tokens.
    pub error_after: f64,
}

/// Fits the output projections of `model`, made of `whole` by removing heads, to what those of `whole` put out on `inputs`. Layers
/// that have lost nothing follow, too, from the first on that has. Sums are in `f64`, and streamed: beside the hidden states of all
/// inputs, twice, a square matrix of one layer is held.
///
/// # Errors
/// [`Error::Input`] for a ridge that is not positive, without inputs, where the models differ in layers or hidden size, and where there
/// are fewer real tokens than unknowns, before anything is changed; and what either model refuses.
pub fn refit(
    model: &mut Model,
    whole: &Model,
    inputs: &[ModelInput],
    ridge: f64,
) -> Result<Vec<Refitted>, Error> {
    let refuse = |name, problem: String| Err(Error::Input { name, problem });
    check_ridge(ridge)?;
    let sizes = |of: &Model| (of.layers().len(), of.config().sizes.hidden_size);
    if sizes(model) != sizes(whole) {
        return refuse(
            "whole",
            "is no model that the other was made of: layers or hidden size differ".into(),
        );
    }
    let heads =
        |of: &Model| -> Vec<i64> { of.layers().iter().map(|layer| layer.dims().n_heads).collect() };
    let Some(first) = heads(model).iter().zip(heads(whole)).position(|(&left, all)| left < all)
    else {
        return Ok(Vec::new());
    };
    let n_tokens: i64 = inputs.iter().map(ModelInput::n_real).sum();
    for (layer, it) in model.layers().iter().enumerate().skip(first) {
        check_tokens(n_tokens, it, layer)?;
    }
    let _no_grad = tch::no_grad_guard();
    // Where each input stands in front of the layer, in both models; `model` is changed in between.
    let options = ForwardOptions::default();
    let begin = |of: &Model| -> Result<Vec<Tensor>, Error> {
        let start = |input: &ModelInput| -> Result<Tensor, Error> {
            let mut running = of.begin(input, &options)?;
            running.narrows = false;
            (0..first).try_for_each(|_| running.advance(None))?;
            Ok(running.x)
        };
        inputs.iter().map(start).collect()
    };
    let mut here = begin(model)?;
    let mut there = begin(whole)?;
    let mut all = Vec::new();
    for layer in first..whole.layers().len() {
        all.push(fit_layer(model, whole, inputs, [&here, &there], layer, ridge)?);
        for (of, x) in [(&*model, &mut here), (whole, &mut there)] {
            for (input, x) in inputs.iter().zip(x.iter_mut()) {
                let mut running = at(of, input, x, layer)?;
                running.advance(None)?;
                *x = running.x;
            }
        }
    }
    Ok(all)
}

/// A pass in front of `layer`, with the hidden states `x`.
fn at<'m>(
    model: &'m Model,
    input: &ModelInput,
    x: &Tensor,
    layer: usize,
) -> Result<Running<'m>, Error> {
    let mut running = model.begin(input, &ForwardOptions::default())?;
    running.narrows = false;
    running.resume(x, layer);
    Ok(running)
}

fn fit_layer(
    model: &Model,
    whole: &Model,
    inputs: &[ModelInput],
    [here, there]: [&Vec<Tensor>; 2],
    layer: usize,
    ridge: f64,
) -> Result<Refitted, Error> {
    let (own, old) = (model.layers()[layer], whole.layers()[layer]);
    let mut sums = Sums::of(own);
    for ((input, x), y) in inputs.iter().zip(here).zip(there) {
        let z = at(model, input, x, layer)?.advance_with_z(None)?;
        let y = at(whole, input, y, layer)?.advance_with_z(None)?;
        sums.add(&real_rows(&joined(&z), input), &put_out(old, &y, input));
    }
    sums.fit(own, layer, ridge)
}

/// What a layer whose heads put out `z` adds at the real tokens: `[n, hidden_size]`.
fn put_out(layer: &AttnLayer, z: &Tensor, input: &ModelInput) -> Tensor {
    real_rows(&layer.put_out(z, false), input)
}

/// Output projections of layers, fitted each by itself, on what goes into the layers of the whole model: one pass over a text of any
/// length, however many layers. Sums are in `f64`: beside them, two square matrices a layer, a batch is held.
///
/// Against [`refit()`], which lets each layer make up for those before it, the layers' inputs are those of the model as it was.
#[derive(Debug)]
pub struct StreamedRefit {
    sums: BTreeMap<usize, Sums>,
    n_tokens: i64,
}

impl StreamedRefit {
    /// Of the layers `layers` of `model`.
    ///
    /// # Panics
    /// For a layer that is not there.
    pub fn new(model: &Model, layers: &[usize]) -> Self {
        let all = model.layers();
        Self { sums: layers.iter().map(|&at| (at, Sums::of(all[at]))).collect(), n_tokens: 0 }
    }

    /// Adds what the layers of `whole` and of `model`, made of it, put out where the real tokens of `input` go into `whole`.
    ///
    /// # Errors
    /// As [`Model::forward`] of either.
    pub fn add(&mut self, model: &Model, whole: &Model, input: &ModelInput) -> Result<(), Error> {
        let layers: Vec<usize> = self.sums.keys().copied().collect();
        let (inputs, y) = attention_inputs(whole, input, true)?;
        let inputs: Vec<Tensor> = layers.iter().map(|&at| inputs[at].shallow_clone()).collect();
        let _no_grad = tch::no_grad_guard();
        let z = model.attend(input, &layers, &inputs, &ForwardOptions::default())?.z;
        for (z, (&layer, sums)) in z.iter().zip(&mut self.sums) {
            sums.add(
                &real_rows(&joined(z), input),
                &put_out(whole.layers()[layer], &y[layer], input),
            );
        }
        self.n_tokens += input.n_real();
        Ok(())
    }

    /// Puts the fitted projections into `model`, in place.
    ///
    /// # Errors
    /// [`Error::Input`] for a ridge that is not positive, and where there were fewer tokens than a layer has unknowns, before anything is
    /// changed.
    pub fn finish(self, model: &Model, ridge: f64) -> Result<Vec<Refitted>, Error> {
        check_ridge(ridge)?;
        let all = model.layers();
        for &layer in self.sums.keys() {
            check_tokens(self.n_tokens, all[layer], layer)?;
        }
        let _no_grad = tch::no_grad_guard();
        self.sums.into_iter().map(|(layer, sums)| sums.fit(all[layer], layer, ridge)).collect()
    }
}

fn check_ridge(ridge: f64) -> Result<(), Error> {
    if ridge > 0.0 && ridge.is_finite() {
        return Ok(());
    }
    let problem = format!("is {ridge}, expected a positive number");
    Err(Error::Input { name: "ridge", problem })
}

/// Refuses fewer tokens than there are unknowns.
fn check_tokens(n_tokens: i64, it: &AttnLayer, layer: usize) -> Result<(), Error> {
    let n_unknowns = n_unknowns(it);
    if n_tokens >= n_unknowns {
        return Ok(());
    }
    let problem = format!(
        "has {n_tokens} real tokens, and layer {layer} {n_unknowns} unknowns: the rank can be {n_tokens} at most\nhint: give more text"
    );
    Err(Error::Input { name: "calibration set", problem })
}

/// What a layer's projection is fitted by, z̃ being z with a 1 behind it if there is a bias.
#[derive(Debug)]
struct Sums {
    /// Σ z̃ z̃ᵀ.
    gram: Tensor,
    /// Σ z̃ yᵀ.
    cross: Tensor,
    /// Σ ‖y‖².
    energy: f64,
    n_tokens: i64,
}

impl Sums {
    /// Of nothing yet.
    fn of(it: &AttnLayer) -> Self {
        let n = n_unknowns(it);
        let wide = (Kind::Double, it.out().weight.device());
        Self {
            gram: Tensor::zeros([n; 2], wide),
            cross: Tensor::zeros([n, it.dims().hidden_size], wide),
            energy: 0.0,
            n_tokens: 0,
        }
    }

    /// Adds tokens: z `[n, n_heads · head_dim]`, y `[n, hidden_size]`.
    fn add(&mut self, z: &Tensor, y: &Tensor) {
        let (mut z, y) = (z.to_kind(Kind::Double), y.to_kind(Kind::Double));
        self.n_tokens += z.size()[0];
        if self.gram.size()[0] > z.size()[1] {
            z = z.pad([0, 1], "constant", 1.0);
        }
        self.energy += y.square().sum(Kind::Double).double_value(&[]);
        self.gram += z.tr().matmul(&z);
        self.cross += z.tr().matmul(&y);
    }

    /// Fits the projection of `it` in place.
    fn fit(&self, it: &AttnLayer, layer: usize, ridge: f64) -> Result<Refitted, Error> {
        let Self { gram, cross, energy, n_tokens } = self;
        let out = it.out();
        let (weight, bias) = (out.out_in().to_kind(Kind::Double), out.bias.as_ref());
        let n_unknowns = gram.size()[0];
        let wide = (Kind::Double, weight.device());
        // Rows of unknowns: [n_unknowns, hidden_size].
        let start = match bias {
            Some(bias) => Tensor::cat(&[weight.tr(), bias.to_kind(Kind::Double).unsqueeze(0)], 0),
            None => weight.tr(),
        };
        // Σ ‖ŷ − y‖² = tr(Wᵀ G W) − 2 tr(Wᵀ C) + Σ ‖y‖².
        let error = |w: &Tensor| {
            let fit = (w * gram.matmul(w)).sum(Kind::Double) - (w * cross).sum(Kind::Double) * 2.0;
            ((fit.double_value(&[]) + energy) / energy).max(0.0)
        };
        let n_z = n_unknowns - i64::from(bias.is_some());
        let mut refitted = Refitted {
            layer,
            n_tokens: *n_tokens,
            n_unknowns,
            rank: 0,
            error_before: error(&start),
            error_after: 0.0,
        };
        if n_unknowns == 0 {
            refitted.error_after = refitted.error_before;
            return Ok(refitted);
        }
        let values = gram.linalg_eigvalsh("L");
        let bar = values.max().double_value(&[]) * 1e-10;
        refitted.rank = values.gt(bar).sum(Kind::Int64).int64_value(&[]);
        let size = gram.diagonal(0, 0, 1).narrow(0, 0, n_z).sum(Kind::Double).double_value(&[]);
        let pull = if n_z > 0 { ridge * size / n_z as f64 } else { 0.0 };
        let mut drawn = Tensor::full([n_unknowns], pull, wide);
        if bias.is_some() {
            let _ = drawn.narrow(0, n_z, 1).fill_(0.0);
        }
        drawn = drawn.unsqueeze(1);
        let left = gram + drawn.squeeze().view([n_unknowns]).diag(0);
        let right = cross + drawn * &start;
        let solved =
            Tensor::f_linalg_solve(&left, &right, true).map_err(|source| Error::Torch {
                doing: format!("fitting the output projection of layer {layer}"),
                source,
            })?;
        refitted.error_after = error(&solved);
        out.out_in().copy_(&solved.narrow(0, 0, n_z).tr());
        if let Some(bias) = bias {
            bias.shallow_clone().copy_(&solved.get(n_z));
        }
        Ok(refitted)
    }
}

fn n_unknowns(layer: &AttnLayer) -> i64 {
    layer.dims().n_heads * layer.dims().head_dim + i64::from(layer.out().bias.is_some())
}
