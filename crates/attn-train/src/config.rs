//! The settings of a run.

use attn_data::batch::BatchPlan;
use attn_torch::Autocast;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind};

use crate::{
    error::{Error, Result},
    schedule::Schedule,
};

/// How to train. Every field has a default; unknown ones are refused.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainConfig {
    /// The highest learning rate, reached after the warm-up.
    pub lr: f64,
    /// How the rate moves after the warm-up: `linear`, `cosine` or `constant`.
    pub schedule: Schedule,
    /// The share of all steps over which the rate rises, rounded up; 0 for none.
    pub warmup_ratio: f64,
    /// The steps over which the rate rises, in place of `warmup_ratio`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warmup_steps: Option<u64>,
    /// Passes over the data.
    pub epochs: u64,
    /// Optimizer steps, in place of `epochs`: the data is passed over as often as that takes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_steps: Option<u64>,
    /// Most examples in a batch.
    pub batch_size: usize,
    /// Most positions in a batch, padding included; a longer example stands alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<usize>,
    /// Batches whose gradients make one step, each weighted by what it predicts, as in one large batch.
    pub accumulation: usize,
    /// How much of each matrix decays per step, times the rate. Biases and norms (one axis or none) do not decay.
    pub weight_decay: f64,
    /// AdamW's β₁ and β₂.
    pub betas: [f64; 2],
    /// AdamW's ε.
    pub eps: f64,
    /// The norm that the gradient is cut back to; 0 leaves it alone.
    pub clip_norm: f64,
    /// Whether activations between blocks alone are kept and the rest computed again in the backward pass: a third more
    /// work for a fraction of the memory.
    pub gradient_checkpointing: bool,
    /// What matrix products are computed in while training: `f32`, or `bf16` on f32 weights (autocast), for machines with
    /// units for it. Losses, norms and the optimizer stay in f32, and so does evaluation.
    pub precision: Precision,
    /// Parameters that stay as they are: names as in the checkpoint, `*` standing for any characters. A pattern that
    /// begins with `!` takes back what earlier ones froze: `["*", "!classifier*"]` trains the classifier alone.
    pub freeze: Vec<String>,
    /// Parameters with a rate of their own. Of several groups that name one the last counts.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<Group>,
    /// Steps between evaluations; 0: after each epoch. The first and last step are evaluated in any case.
    pub eval_every: u64,
    /// Steps between checkpoints; 0: after each epoch. The last step is saved in any case.
    pub checkpoint_every: u64,
    /// Steps whose mean loss makes one line in `metrics.jsonl`.
    pub log_every: u64,
    /// Checkpoints kept while the run goes, at least 1. The best model is kept beside them.
    pub keep_last: usize,
    /// The metric by which the model is chosen among those evaluated, the one before the first step included: a run
    /// leaves nothing worse than it began with. Of equals the first is taken, a trained one before the untrained.
    /// Without it the last one is taken, as few-shot runs, which have no data to choose by, must.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub select: Option<String>,
    /// Seed of dropout and of attention kinds that draw.
    pub seed: u64,
}

/// Parameters that learn at another rate than the others.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Group {
    /// Their names as in the checkpoint, `*` standing for any characters.
    pub parameters: String,
    /// The highest learning rate, in place of [`TrainConfig::lr`]; the schedule is the same.
    pub lr: f64,
    /// In place of [`TrainConfig::weight_decay`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight_decay: Option<f64>,
    /// Whether it may name no parameter, as where one config serves attention kinds with parameters and without.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub optional: bool,
}

/// What matrix products are computed in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// As the weights are.
    #[default]
    F32,
    /// bfloat16, 8 bits of mantissa with the range of f32, so that no loss has to be scaled. Micikevicius et al. 2017,
    /// <https://arxiv.org/abs/1710.03740>; Kalamkar et al. 2019, <https://arxiv.org/abs/1905.12322>.
    Bf16,
}

impl Precision {
    /// The mode in which losses are computed, until it is dropped.
    pub(crate) fn enter(self, device: Device) -> Result<Option<Autocast>> {
        Ok(match self {
            Self::F32 => None,
            Self::Bf16 => Some(Autocast::new(device, Kind::BFloat16)?),
        })
    }
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            lr: 5e-5,
            schedule: Schedule::Linear,
            warmup_ratio: 0.1,
            warmup_steps: None,
            epochs: 3,
            max_steps: None,
            batch_size: 32,
            max_tokens: None,
            accumulation: 1,
            weight_decay: 0.01,
            betas: [0.9, 0.999],
            eps: 1e-8,
            clip_norm: 1.0,
            gradient_checkpointing: false,
            precision: Precision::F32,
            freeze: Vec::new(),
            groups: Vec::new(),
            eval_every: 0,
            checkpoint_every: 0,
            log_every: 10,
            keep_last: 2,
            select: None,
            seed: 0,
        }
    }
}

impl TrainConfig {
    /// Checks every field, so that a mistake shows before anything slow.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`] with the first field that is out of range.
    pub fn validate(&self) -> Result<()> {
        let refuse = |field: &'static str, value: String, expected: &'static str| {
            Err(Error::Setting { field, value, expected })
        };
        let finite_from_0 = |x: f64| x.is_finite() && x >= 0.0;
        let not_negative = "a number of at least 0";
        let at_least_1 = "at least 1";
        if !(self.lr.is_finite() && self.lr > 0.0) {
            return refuse("lr", self.lr.to_string(), "a number above 0");
        }
        for Group { lr, weight_decay, .. } in &self.groups {
            if !finite_from_0(*lr) {
                return refuse("groups.lr", lr.to_string(), not_negative);
            }
            if let Some(decay) = weight_decay.filter(|decay| !finite_from_0(*decay)) {
                return refuse("groups.weight_decay", decay.to_string(), not_negative);
            }
        }
        if !(0.0..=1.0).contains(&self.warmup_ratio) {
            return refuse(
                "warmup_ratio",
                self.warmup_ratio.to_string(),
                "a share between 0 and 1",
            );
        }
        if self.epochs == 0 && self.max_steps.is_none() {
            return refuse("epochs", "0".into(), at_least_1);
        }
        if self.max_steps == Some(0) {
            return refuse("max_steps", "0".into(), at_least_1);
        }
        if let (Some(warmup), Some(total)) = (self.warmup_steps, self.max_steps)
            && warmup > total
        {
            return refuse("warmup_steps", warmup.to_string(), "at most `max_steps`");
        }
        if self.batch_size == 0 {
            return refuse("batch_size", "0".into(), at_least_1);
        }
        if self.max_tokens == Some(0) {
            return refuse("max_tokens", "0".into(), at_least_1);
        }
        if self.accumulation == 0 {
            return refuse("accumulation", "0".into(), at_least_1);
        }
        if !finite_from_0(self.weight_decay) {
            return refuse("weight_decay", self.weight_decay.to_string(), not_negative);
        }
        if let Some(beta) = self.betas.iter().find(|beta| !(0.0..1.0).contains(*beta)) {
            return refuse("betas", beta.to_string(), "two numbers of at least 0 and below 1");
        }
        if !finite_from_0(self.eps) {
            return refuse("eps", self.eps.to_string(), not_negative);
        }
        if !finite_from_0(self.clip_norm) {
            return refuse(
                "clip_norm",
                self.clip_norm.to_string(),
                "above 0, or 0 for no clipping",
            );
        }
        if self.log_every == 0 {
            return refuse("log_every", "0".into(), at_least_1);
        }
        if self.keep_last == 0 {
            return refuse("keep_last", "0".into(), at_least_1);
        }
        Ok(())
    }

    /// How examples are put into batches.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`] for a batch size of 0.
    pub fn plan(&self) -> Result<BatchPlan> {
        self.validate()?;
        Ok(BatchPlan { batch_size: self.batch_size, max_tokens: self.max_tokens })
    }

    /// The steps of warm-up in a run of `total_steps`.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`] where there are more than that.
    pub fn warmup(&self, total_steps: u64) -> Result<u64> {
        match self.warmup_steps {
            Some(steps) if steps > total_steps => Err(Error::Setting {
                field: "warmup_steps",
                value: steps.to_string(),
                expected: "at most the steps of the run",
            }),
            Some(steps) => Ok(steps),
            None => Ok((self.warmup_ratio * total_steps as f64).ceil() as u64),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group() -> Group {
        Group { parameters: "*.kind.*".into(), lr: 1e-2, weight_decay: None, optional: false }
    }

    #[test]
    fn each_field_out_of_range_is_named() {
        let d = TrainConfig::default;
        let wrong = [
            ("lr", TrainConfig { lr: 0.0, ..d() }),
            ("lr", TrainConfig { lr: f64::NAN, ..d() }),
            ("warmup_ratio", TrainConfig { warmup_ratio: 1.5, ..d() }),
            ("warmup_steps", TrainConfig { warmup_steps: Some(5), max_steps: Some(4), ..d() }),
            ("epochs", TrainConfig { epochs: 0, ..d() }),
            ("max_steps", TrainConfig { max_steps: Some(0), ..d() }),
            ("batch_size", TrainConfig { batch_size: 0, ..d() }),
            ("max_tokens", TrainConfig { max_tokens: Some(0), ..d() }),
            ("accumulation", TrainConfig { accumulation: 0, ..d() }),
            ("weight_decay", TrainConfig { weight_decay: -0.1, ..d() }),
            ("groups.lr", TrainConfig { groups: vec![Group { lr: -1.0, ..group() }], ..d() }),
            (
                "groups.weight_decay",
                TrainConfig {
                    groups: vec![Group { weight_decay: Some(f64::NAN), ..group() }],
                    ..d()
                },
            ),
            ("betas", TrainConfig { betas: [0.9, 1.0], ..d() }),
            ("eps", TrainConfig { eps: f64::INFINITY, ..d() }),
            ("clip_norm", TrainConfig { clip_norm: -1.0, ..d() }),
            ("log_every", TrainConfig { log_every: 0, ..d() }),
            ("keep_last", TrainConfig { keep_last: 0, ..d() }),
        ];
        for (name, config) in wrong {
            match config.validate() {
                Err(Error::Setting { field, .. }) => assert_eq!(field, name),
                other => panic!("{name}: {other:?}"),
            }
        }
        d().validate().unwrap();
        TrainConfig { epochs: 0, max_steps: Some(1), ..d() }.validate().unwrap();
    }

    #[test]
    fn it_survives_toml_and_refuses_what_it_does_not_know() {
        let config = TrainConfig {
            max_steps: Some(7),
            select: Some("accuracy".into()),
            freeze: vec!["*".into(), "!classifier*".into()],
            groups: vec![group()],
            ..TrainConfig::default()
        };

        let text = toml::to_string(&config).unwrap();

        assert_eq!(toml::from_str::<TrainConfig>(&text).unwrap(), config);
        let error = toml::from_str::<TrainConfig>("learning_rate = 1.0").unwrap_err().to_string();
        assert!(error.contains("unknown field `learning_rate`"), "{error}");
    }

    #[test]
    fn warm_up_is_a_share_rounded_up_or_a_number_of_steps() {
        let config = TrainConfig { warmup_ratio: 0.1, ..TrainConfig::default() };
        assert_eq!(config.warmup(25).unwrap(), 3);
        let config = TrainConfig { warmup_steps: Some(4), ..config };
        assert_eq!(config.warmup(25).unwrap(), 4);
        assert!(matches!(config.warmup(3), Err(Error::Setting { field: "warmup_steps", .. })));
    }
}
