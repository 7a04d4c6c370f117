//! The parameters that are trained, and the AdamW state of each.

use std::collections::BTreeMap;

use attn_core::Model;
use attn_torch::{AdamState, AdamW};
use tch::Tensor;

use crate::{
    config::{Group, TrainConfig},
    error::{Error, Result},
    freeze::{matches, no_match, trainable},
};

/// AdamW over the trained parameters of a model. While it lives, these alone require gradients.
#[derive(Debug)]
pub(crate) struct Optimizer {
    names: Vec<String>,
    params: Vec<Tensor>,
    state: AdamState,
    /// Parameters that move alike.
    groups: Vec<Rows>,
    adam: AdamW,
    warned: bool,
}

/// Parameters with one rate and one decay.
#[derive(Debug)]
struct Rows {
    /// Positions in `params`.
    rows: Vec<usize>,
    /// What the step's rate is multiplied by.
    rate: f64,
    weight_decay: f64,
}

impl Optimizer {
    pub(crate) fn new(model: &Model, config: &TrainConfig) -> Result<Self> {
        let all = model.parameters();
        let names: Vec<&String> = all.iter().map(|(name, _)| name).collect();
        let trained = trainable(&names, &config.freeze)?;
        let (mut names, mut params) = (Vec::new(), Vec::new());
        for ((name, tensor), trained) in all.into_iter().zip(trained) {
            let tensor = tensor.set_requires_grad(trained);
            if trained {
                names.push(name);
                params.push(tensor);
            }
        }
        let state = AdamState::zeros(&params)?;
        // Norms' weights and biases have one axis: pulling them to zero would shift what they scale.
        let decays = |row: usize| params[row].dim() > 1;
        let mut groups: Vec<Rows> = Vec::new();
        for (row, (rate, decay)) in rates(&names, config)?.into_iter().enumerate() {
            let weight_decay = if decays(row) { decay } else { 0.0 };
            match groups
                .iter_mut()
                .find(|group| (group.rate, group.weight_decay) == (rate, weight_decay))
            {
                Some(group) => group.rows.push(row),
                None => groups.push(Rows { rows: vec![row], rate, weight_decay }),
            }
        }
        let TrainConfig { lr, betas: [beta1, beta2], eps, weight_decay, .. } = *config;
        let adam = AdamW { lr, betas: (beta1, beta2), eps, weight_decay };
        Ok(Self { names, params, state, groups, adam, warned: false })
    }

    /// One that says nothing of parameters without a gradient.
    pub(crate) fn quiet(mut self) -> Self {
        self.warned = true;
        self
    }

    pub(crate) fn names(&self) -> &[String] {
        &self.names
    }

    pub(crate) fn params(&self) -> &[Tensor] {
        &self.params
    }

    /// How many values are trained.
    pub(crate) fn n_values(&self) -> usize {
        self.params.iter().map(Tensor::numel).sum()
    }

    /// One step at rate `lr`. As in PyTorch, a parameter without a gradient neither moves nor decays.
    pub(crate) fn step(&mut self, grads: &[Option<Tensor>], lr: f64) -> Result<()> {
        self.warn_of_unused(grads);
        for Rows { rows, rate, weight_decay } in &self.groups {
            let rows: Vec<usize> =
                rows.iter().copied().filter(|&row| grads[row].is_some()).collect();
            let pick = |from: &[Tensor]| -> Vec<Tensor> {
                rows.iter().map(|&row| from[row].shallow_clone()).collect()
            };
            // Views of the state: the step writes through them.
            let AdamState { m, v, steps } = &self.state;
            let mut state = AdamState { m: pick(m), v: pick(v), steps: pick(steps) };
            let grads: Vec<&Tensor> = rows.iter().filter_map(|&row| grads[row].as_ref()).collect();
            let adam = AdamW { lr: lr * rate, weight_decay: *weight_decay, ..self.adam };
            adam.step(&pick(&self.params), &grads, &mut state)?;
        }
        Ok(())
    }

    fn warn_of_unused(&mut self, grads: &[Option<Tensor>]) {
        if std::mem::replace(&mut self.warned, true) {
            return;
        }
        let unused: Vec<&str> = self
            .names
            .iter()
            .zip(grads)
            .filter(|(_, grad)| grad.is_none())
            .map(|(name, _)| name.as_str())
            .collect();
        if !unused.is_empty() {
            tracing::warn!("the loss does not depend on {}: it stays as it is", unused.join(", "));
        }
    }

    /// The state under names for a checkpoint.
    pub(crate) fn to_tensors(&self) -> Vec<(String, Tensor)> {
        let AdamState { m, v, steps } = &self.state;
        let parts = [("m", m), ("v", v), ("steps", steps)];
        let named = |(part, tensors): (&str, &Vec<Tensor>)| {
            let name = |name: &String| format!("{part}.{name}");
            let pairs: Vec<(String, Tensor)> = self
                .names
                .iter()
                .zip(tensors)
                .map(|(param, tensor)| (name(param), tensor.shallow_clone()))
                .collect();
            pairs
        };
        parts.into_iter().flat_map(named).collect()
    }

    /// Checks that a checkpoint's tensors are a state of these parameters.
    ///
    /// # Errors
    ///
    /// What is missing or of another shape, as a sentence.
    pub(crate) fn check_tensors(&self, tensors: &BTreeMap<String, Tensor>) -> Result<(), String> {
        for (name, own) in self.to_tensors() {
            let stored = tensors.get(&name).ok_or_else(|| format!("`{name}` is missing"))?;
            if (stored.size(), stored.kind()) != (own.size(), own.kind()) {
                return Err(format!(
                    "`{name}` is {:?} of size {:?}, expected {:?} of size {:?}",
                    stored.kind(),
                    stored.size(),
                    own.kind(),
                    own.size()
                ));
            }
        }
        Ok(())
    }

    /// Takes over what [`Self::check_tensors`] found fitting.
    pub(crate) fn load_tensors(&mut self, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
        for (name, mut own) in self.to_tensors() {
            copy(&mut own, &tensors[&name])?;
        }
        Ok(())
    }
}

/// Of each parameter what the step's rate is multiplied by, and its decay.
fn rates(names: &[String], config: &TrainConfig) -> Result<Vec<(f64, f64)>> {
    let mut rates = vec![(1.0, config.weight_decay); names.len()];
    for Group { parameters, lr, weight_decay, optional } in &config.groups {
        let mut matched = false;
        for (name, rate) in names.iter().zip(&mut rates) {
            if matches(parameters, name) {
                matched = true;
                *rate = (lr / config.lr, weight_decay.unwrap_or(config.weight_decay));
            }
        }
        if !matched && !optional {
            return Err(no_match("groups", parameters, parameters, names));
        }
    }
    Ok(rates)
}

impl Drop for Optimizer {
    fn drop(&mut self) {
        for param in &self.params {
            let _ = param.set_requires_grad(false);
        }
    }
}

/// Overwrites a tensor's values, whatever requires gradients.
pub(crate) fn copy(to: &mut Tensor, from: &Tensor) -> Result<()> {
    let _no_grad = tch::no_grad_guard();
    to.f_copy_(from).map_err(|source| {
        Error::Core(attn_core::Error::Torch { doing: "restoring a tensor".into(), source })
    })
}
