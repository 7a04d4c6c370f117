//! Rotary position embeddings in the half-split layout of Hugging Face's Llama.
//!
//! ```text
//! q'_(i)        = q_(i) cos(p·f_i) − q_(i+d/2) sin(p·f_i)
//! q'_(i+d/2)    = q_(i+d/2) cos(p·f_i) + q_(i) sin(p·f_i),   f_i = θ^(−2i/d), i < d/2
//! ```
//!
//! Su et al. 2021, "RoFormer", <https://arxiv.org/abs/2104.09864>, section 3.2.2. The paper rotates neighbouring
//! pairs (2i, 2i+1); the checkpoints on the Hub are permuted so that pairs lie half a head apart.

use serde::Deserialize;
use tch::{Device, Kind, Tensor};

use crate::Error;

/// How the frequencies are changed for contexts longer than the model was first trained on.
#[derive(Debug, Clone, PartialEq)]
pub enum Scaling {
    /// Not at all.
    None,
    /// Positions divided by a factor (Chen et al. 2023, <https://arxiv.org/abs/2306.15595>).
    Linear {
        /// The factor.
        factor: f64,
    },
    /// Llama 3's: low frequencies divided by a factor, high ones kept, those between interpolated
    /// (Llama Team 2024, <https://arxiv.org/abs/2407.21783>; as in Meta's released code).
    Llama3 {
        /// What low frequencies are divided by.
        factor: f64,
        /// Wavelengths above `original_context / low_freq_factor` are low.
        low_freq_factor: f64,
        /// Wavelengths below `original_context / high_freq_factor` are high.
        high_freq_factor: f64,
        /// Tokens of context before scaling.
        original_context: f64,
    },
}

/// `rope_scaling` or `rope_parameters` of a `config.json`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct RopeConfig {
    #[serde(alias = "type")]
    rope_type: Option<String>,
    pub(crate) rope_theta: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<f64>,
    partial_rotary_factor: Option<f64>,
}

impl RopeConfig {
    /// `field` is where in `config.json` it stands.
    pub(crate) fn scaling(&self, field: &str) -> Result<Scaling, Error> {
        let at = |name: &str| format!("{field}.{name}");
        let need = |name: &str, value: Option<f64>| match value {
            Some(value) if value.is_finite() && value > 0.0 => Ok(value),
            Some(value) => Err(Error::Config {
                field: at(name),
                problem: format!("is {value}, expected a positive number"),
            }),
            None => Err(Error::Config {
                field: at(name),
                problem: "is missing, expected a positive number".into(),
            }),
        };
        if self.partial_rotary_factor.is_some_and(|factor| factor != 1.0) {
            return Err(Error::Config {
                field: at("partial_rotary_factor"),
                problem: "rotating only a part of each head is not supported, expected 1".into(),
            });
        }
        match self.rope_type.as_deref() {
            None | Some("default") => Ok(Scaling::None),
            Some("linear") => Ok(Scaling::Linear { factor: need("factor", self.factor)? }),
            Some("llama3") => Ok(Scaling::Llama3 {
                factor: need("factor", self.factor)?,
                low_freq_factor: need("low_freq_factor", self.low_freq_factor)?,
                high_freq_factor: need("high_freq_factor", self.high_freq_factor)?,
                original_context: need(
                    "original_max_position_embeddings",
                    self.original_max_position_embeddings,
                )?,
            }),
            Some(other) => Err(Error::Config {
                field: at("rope_type"),
                problem: format!("`{other}` is not supported, expected default, linear or llama3"),
            }),
        }
    }
}

/// The rotation frequencies of one head.
#[derive(Debug)]
pub struct Rotary {
    /// Computed in `f32` from the start.
    single: Vec<f32>,
    double: Vec<f64>,
}

impl Rotary {
    /// For heads of `head_dim` channels (even) and base `theta`.
    pub fn new(head_dim: i64, theta: f64, scaling: &Scaling) -> Self {
        let frequencies = |kind| {
            let steps = Tensor::arange_start_step(0, head_dim, 2, (kind, Device::Cpu));
            scale(&Tensor::pow_scalar(theta, &(steps / head_dim)).reciprocal(), scaling)
        };
        let (single, double) = (frequencies(Kind::Float), frequencies(Kind::Double));
        Self {
            single: Vec::try_from(single).expect("one axis of f32"),
            double: Vec::try_from(double).expect("one axis of f64"),
        }
    }

    /// Radians a position of each plane, `head_dim / 2`.
    pub(crate) fn frequencies(&self) -> &[f64] {
        &self.double
    }

    /// `(cos, sin)` for `positions` (`[batch, seq_len]`): each `[batch, 1, seq_len, head_dim]` in `kind`.
    ///
    /// Frequencies and angles are taken in `f32`, operation by operation as transformers takes them; in `f64` where
    /// `kind` is `f64`. Far from 0 the two differ: at position 8191 an `f32` angle is 2e-4 off.
    pub fn tables(&self, positions: &Tensor, kind: Kind) -> (Tensor, Tensor) {
        let (wide, frequencies) = match kind {
            Kind::Double => (Kind::Double, Tensor::from_slice(&self.double)),
            _ => (Kind::Float, Tensor::from_slice(&self.single)),
        };
        let frequencies = frequencies.to_device(positions.device());
        let angles = positions.to_kind(wide).unsqueeze(-1) * frequencies; // [b, s, d/2]
        let angles = Tensor::cat(&[&angles, &angles], -1).unsqueeze(1); // [b, 1, s, d]
        (angles.cos().to_kind(kind), angles.sin().to_kind(kind))
    }
}

/// Rotates `x` (`[batch, n_heads, seq_len, head_dim]`) by tables of [`Rotary::tables`].
pub fn rotate(x: &Tensor, (cos, sin): &(Tensor, Tensor)) -> Tensor {
    let halves = x.chunk(2, -1);
    let turned = Tensor::cat(&[&halves[1].neg(), &halves[0]], -1);
    x * cos + turned * sin
}

/// Changes frequencies for longer contexts, in their own kind.
fn scale(frequencies: &Tensor, scaling: &Scaling) -> Tensor {
    match *scaling {
        Scaling::None => frequencies.shallow_clone(),
        Scaling::Linear { factor } => frequencies / factor,
        Scaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
            let wavelengths = frequencies.reciprocal() * (2.0 * std::f64::consts::PI);
            let divided = frequencies / factor;
            let keep = (wavelengths.reciprocal() * original_context - low_freq_factor)
                / (high_freq_factor - low_freq_factor);
            let between = (1.0 - &keep) * frequencies / factor + &keep * frequencies;
            let scaled =
                divided.where_self(&wavelengths.gt(original_context / low_freq_factor), &between);
            frequencies.where_self(&wavelengths.lt(original_context / high_freq_factor), &scaled)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, randn};

    #[test]
    fn scores_depend_on_the_distance_alone() {
        let rotary = Rotary::new(8, 10_000.0, &Scaling::None);
        let (q, k) = (randn(1, &[1, 1, 1, 8]), randn(2, &[1, 1, 1, 8]));
        let score = |at_q: i64, at_k: i64| {
            let turn = |x: &Tensor, at: i64| {
                rotate(x, &rotary.tables(&Tensor::from_slice(&[at]).view([1, 1]), Kind::Double))
            };
            (turn(&q, at_q) * turn(&k, at_k)).sum(Kind::Double)
        };
        assert_close("shifted", &score(105, 100), &score(5, 0), 1e-12);
        assert!((score(6, 0) - score(5, 0)).abs().double_value(&[]) > 1e-3);
    }

    #[test]
    fn llama3_keeps_high_frequencies_and_divides_low_ones() {
        let scaling = Scaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 8192.0,
        };
        let middle = 2.0 * std::f64::consts::PI / 4096.0; // wavelength 8192 / 2
        let scaled = scale(&Tensor::from_slice(&[1.0, middle, 1e-5]), &scaling);
        let [high, between, low] = Vec::try_from(scaled).unwrap()[..] else {
            panic!("three in, three out")
        };
        assert_eq!((high, low), (1.0, 1e-5 / 8.0));
        assert!(between > middle / 8.0 && between < middle);
    }

    #[test]
    fn device_of_the_positions_is_kept() {
        let (cos, _) = Rotary::new(4, 1e4, &Scaling::None)
            .tables(&Tensor::zeros([1, 2], (Kind::Int64, Device::Cpu)), Kind::Half);
        assert_eq!((cos.kind(), cos.size()), (Kind::Half, vec![1, 1, 2, 4]));
    }
}
