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
use tch::{Kind, Tensor};

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
    frequencies: Vec<f64>,
}

impl Rotary {
    /// For heads of `head_dim` channels (even) and base `theta`.
    pub fn new(head_dim: i64, theta: f64, scaling: &Scaling) -> Self {
        let plain = (0..head_dim / 2).map(|i| theta.powf(-2.0 * i as f64 / head_dim as f64));
        Self { frequencies: plain.map(|frequency| scale(frequency, scaling)).collect() }
    }

    /// `(cos, sin)` for `positions` (`[batch, seq_len]`): each `[batch, 1, seq_len, head_dim]` in `kind`.
    ///
    /// Angles are taken in `f32`, as the published models were trained; in `f64` where `kind` is `f64`.
    pub fn tables(&self, positions: &Tensor, kind: Kind) -> (Tensor, Tensor) {
        let wide = if kind == Kind::Double { Kind::Double } else { Kind::Float };
        let frequencies =
            Tensor::from_slice(&self.frequencies).to_kind(wide).to_device(positions.device());
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

fn scale(frequency: f64, scaling: &Scaling) -> f64 {
    match *scaling {
        Scaling::None => frequency,
        Scaling::Linear { factor } => frequency / factor,
        Scaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
            let wavelength = 2.0 * std::f64::consts::PI / frequency;
            if wavelength < original_context / high_freq_factor {
                frequency
            } else if wavelength > original_context / low_freq_factor {
                frequency / factor
            } else {
                let keep = (original_context / wavelength - low_freq_factor)
                    / (high_freq_factor - low_freq_factor);
                (1.0 - keep) * frequency / factor + keep * frequency
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

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
        assert_eq!(scale(1.0, &scaling), 1.0);
        assert_eq!(scale(1e-5, &scaling), 1e-5 / 8.0);
        let middle = 2.0 * std::f64::consts::PI / 4096.0; // wavelength 8192 / 2
        let between = scale(middle, &scaling);
        assert!(between > middle / 8.0 && between < middle);
    }

    #[test]
    fn device_of_the_positions_is_kept() {
        let (cos, _) = Rotary::new(4, 1e4, &Scaling::None)
            .tables(&Tensor::zeros([1, 2], (Kind::Int64, Device::Cpu)), Kind::Half);
        assert_eq!((cos.kind(), cos.size()), (Kind::Half, vec![1, 1, 2, 4]));
    }
}
