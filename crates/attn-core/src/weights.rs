//! Where parameters come from: a checkpoint, or a seed. An architecture asks for each parameter by name and shape,
//! and at the end every tensor of the file has been used and every parameter filled, or loading fails with both lists.

use std::collections::{BTreeMap, BTreeSet};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use tch::{Device, Kind, Tensor};

use crate::{Error, checkpoint::Checkpoint, error::TensorMismatch};

/// How a parameter starts where no checkpoint holds it.
#[derive(Debug)]
pub enum Init {
    /// All zeros.
    Zeros,
    /// All ones.
    Ones,
    /// Normal with mean 0 and this standard deviation.
    Normal(f64),
    /// Uniform between minus this and this.
    Uniform(f64),
    /// This value, copied.
    Value(Tensor),
}

/// Hands out parameters by name.
#[derive(Debug)]
pub struct Weights<'a> {
    file: Option<File<'a>>,
    /// Tensors to hand out as they are.
    given: Option<BTreeMap<String, Tensor>>,
    /// Whether to hand out shapes alone.
    is_hollow: bool,
    seed: u64,
    kind: Kind,
    device: Device,
    /// Prefixes under which parameters are made anew even if a file is there.
    fresh_prefixes: Vec<String>,
    used: BTreeSet<String>,
    fresh: Vec<String>,
    buffers: Vec<String>,
    mismatch: TensorMismatch,
}

#[derive(Debug)]
struct File<'a> {
    checkpoint: &'a Checkpoint,
    /// The base model's prefix (`transformer.`) and whether the file's names carry it.
    prefix: &'static str,
    has_prefix: bool,
}

impl<'a> Weights<'a> {
    /// Parameters drawn from `seed`. Each depends on the seed and its own name alone.
    pub fn from_seed(seed: u64, kind: Kind, device: Device) -> Self {
        Self {
            file: None,
            given: None,
            is_hollow: false,
            seed,
            kind,
            device,
            fresh_prefixes: Vec::new(),
            used: BTreeSet::new(),
            fresh: Vec::new(),
            buffers: Vec::new(),
            mismatch: TensorMismatch::default(),
        }
    }

    /// Parameters without values or memory: what is built of them can only be looked at.
    pub(crate) fn hollow() -> Self {
        Self { is_hollow: true, ..Self::from_seed(0, Kind::Float, Device::Cpu) }
    }

    /// The very tensors `parameters`, shared: what is built of them is a second handle on the same parameters.
    pub(crate) fn shared(parameters: Vec<(String, Tensor)>, kind: Kind, device: Device) -> Self {
        let given = Some(parameters.into_iter().collect());
        Self { given, ..Self::from_seed(0, kind, device) }
    }

    /// Parameters from `checkpoint`; those under one of `fresh_prefixes` from `seed`.
    ///
    /// `prefix` is the base model's (`transformer.`, `model.`): published checkpoints come with and without it.
    pub fn from_checkpoint(
        checkpoint: &'a Checkpoint,
        prefix: &'static str,
        fresh_prefixes: Vec<String>,
        seed: u64,
        kind: Kind,
        device: Device,
    ) -> Self {
        let has_prefix = checkpoint.names().any(|name| name.starts_with(prefix));
        let file = Some(File { checkpoint, prefix, has_prefix });
        Self { file, fresh_prefixes, ..Self::from_seed(seed, kind, device) }
    }

    /// The parameter `name`, of `shape`, on the device and in the kind the model runs in.
    ///
    /// What the file lacks, or holds in another shape, is noted for [`Self::finish`] and filled with zeros meanwhile.
    pub fn get(&mut self, name: &str, shape: &[i64], init: Init) -> Result<Tensor, Error> {
        if shape.iter().any(|&n| n < 0)
            || shape.iter().try_fold(1_i64, |n, &m| n.checked_mul(m)).is_none()
        {
            return Err(Error::Config {
                field: name.to_owned(),
                problem: format!("would have shape {shape:?} by the sizes in the file"),
            });
        }
        if self.is_hollow {
            return Ok(Tensor::zeros([1], (self.kind, self.device)).expand(shape, false));
        }
        if let Some(given) = &self.given {
            return match given.get(name) {
                Some(tensor) => Ok(tensor.shallow_clone()),
                None => unreachable!("a model names every parameter it was built of, `{name}` too"),
            };
        }
        let is_fresh = self.fresh_prefixes.iter().any(|prefix| name.starts_with(prefix.as_str()));
        let Some(file) = self.file.as_ref().filter(|_| !is_fresh) else {
            self.fresh.push(name.to_owned());
            return Ok(self.make(name, shape, init));
        };
        let stored = file.stored_name(name);
        match file.checkpoint.shape(&stored) {
            Some(found) if found == shape => {
                let tensor = file.checkpoint.tensor(&stored, Some(self.kind), self.device)?;
                self.used.insert(stored);
                return Ok(tensor);
            }
            Some(found) => {
                self.mismatch.wrong.push(format!(
                    "{stored}: shape {found:?} in the file, {shape:?} by the config"
                ));
                self.used.insert(stored);
            }
            None => self.mismatch.missing.push(name.to_owned()),
        }
        // Without memory of its own, whatever the config says: loading fails in the end.
        Ok(Tensor::zeros([1], (self.kind, self.device)).expand(shape, false))
    }

    /// Whether [`Self::get`] would make the parameter `name` as it is told to, and not take it from anywhere.
    pub fn makes(&self, name: &str) -> bool {
        let is_fresh =
            || self.fresh_prefixes.iter().any(|prefix| name.starts_with(prefix.as_str()));
        !self.is_hollow && self.given.is_none() && (self.file.is_none() || is_fresh())
    }

    /// A parameter that shares `tied`. Files may hold it all the same; then it must be equal.
    pub fn tied(&mut self, name: &str, tied: &Tensor) -> Result<Tensor, Error> {
        if let Some(file) = &self.file {
            let stored = file.stored_name(name);
            if file.checkpoint.contains(&stored) {
                let copy = file.checkpoint.tensor(&stored, Some(self.kind), self.device)?;
                if copy.size() != tied.size() || !copy.equal(tied) {
                    self.mismatch.wrong.push(format!(
                        "{stored}: differs from the parameter that the config ties it to (`tie_word_embeddings`)"
                    ));
                }
                self.used.insert(stored);
            }
        }
        Ok(tied.shallow_clone())
    }

    /// Notes a tensor that files hold beside a parameter and that nothing is computed from.
    pub fn unread(&mut self, name: &str) {
        let Some(file) = &self.file else { return };
        let stored = file.stored_name(name);
        if file.checkpoint.contains(&stored) && !self.used.contains(&stored) {
            self.used.insert(stored.clone());
            self.buffers.push(stored);
        }
    }

    /// Checks that every tensor of the file was used and every parameter filled.
    ///
    /// `skippable` names tensors that are no parameters (masks and rotary tables that old versions saved);
    /// `other_heads` are the prefixes of heads that were asked to be replaced.
    pub fn finish(
        mut self,
        skippable: &dyn Fn(&str) -> bool,
        other_heads: &[&str],
    ) -> Result<LoadReport, Error> {
        let mut report =
            LoadReport { fresh: self.fresh, buffers: self.buffers, ..LoadReport::default() };
        if let Some(file) = &self.file {
            for name in file.checkpoint.names().filter(|&name| !self.used.contains(name)) {
                if skippable(name) {
                    report.buffers.push(name.to_owned());
                } else if other_heads.iter().any(|head| name.starts_with(head)) {
                    report.dropped.push(name.to_owned());
                } else {
                    self.mismatch.unexpected.push(name.to_owned());
                }
            }
        }
        if self.mismatch.is_empty() { Ok(report) } else { Err(Error::Tensors(self.mismatch)) }
    }

    fn make(&self, name: &str, shape: &[i64], init: Init) -> Tensor {
        let options = (self.kind, self.device);
        match init {
            Init::Zeros => Tensor::zeros(shape, options),
            Init::Ones => Tensor::ones(shape, options),
            Init::Normal(std) => draw(self.seed, name, shape, |rng| {
                std * Distribution::<f64>::sample(&StandardNormal, rng)
            })
            .to_device(self.device)
            .to_kind(self.kind),
            Init::Uniform(bound) => {
                draw(self.seed, name, shape, |rng| rng.random_range(-bound..=bound))
                    .to_device(self.device)
                    .to_kind(self.kind)
            }
            // Laid out in order, as what is updated in place must be.
            Init::Value(value) => {
                value.detach().to_device(self.device).to_kind(self.kind).copy().contiguous()
            }
        }
    }
}

impl File<'_> {
    /// What the file calls the parameter `name`; `name` itself where it has none of the names it could have.
    fn stored_name(&self, name: &str) -> String {
        let stored = self.with_prefix(name);
        // The words of TensorFlow, which Google's BERTs keep for the parameters of their layer norms.
        let words = [("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")];
        let old =
            words.iter().find_map(|(new, old)| Some(format!("{}{old}", stored.strip_suffix(new)?)));
        old.filter(|old| !self.checkpoint.contains(&stored) && self.checkpoint.contains(old))
            .unwrap_or(stored)
    }

    fn with_prefix(&self, name: &str) -> String {
        match (name.strip_prefix(self.prefix), self.has_prefix) {
            (Some(bare), false) => bare.to_owned(),
            (None, true) => {
                // A bare model read from the file of a model with a head.
                let prefixed = format!("{}{name}", self.prefix);
                if self.checkpoint.contains(&prefixed) { prefixed } else { name.to_owned() }
            }
            _ => name.to_owned(),
        }
    }
}

/// What loading did beyond filling each parameter from the file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LoadReport {
    /// Parameters made anew, by request.
    pub fresh: Vec<String>,
    /// Tensors of a head that was replaced by request.
    pub dropped: Vec<String>,
    /// Tensors that nothing is computed from: masks and tables that old versions of transformers saved, copies, and what
    /// BERT's pretraining left beside its masked-LM head.
    pub buffers: Vec<String>,
}

/// Values from `value`, a pure function of `seed` and `name`, in `f32` on the CPU.
fn draw(seed: u64, name: &str, shape: &[i64], value: impl Fn(&mut ChaCha8Rng) -> f64) -> Tensor {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(fnv1a(name));
    let n: i64 = shape.iter().product();
    let mut values: Vec<f32> = Vec::new();
    // As LibTorch fails where it has no room for a tensor, and not with the end of the process.
    if values.try_reserve_exact(n as usize).is_err() {
        panic!("out of memory: `{name}` has {n} values, {shape:?}");
    }
    values.extend((0..n).map(|_| value(&mut rng) as f32));
    Tensor::from_slice(&values).view(shape)
}

/// 64-bit FNV-1a, <http://www.isthe.com/chongo/tech/comp/fnv/>: stable across versions, unlike std's hasher.
pub(crate) fn fnv1a(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_copied_in_order() {
        let value = Tensor::arange(6, (Kind::Float, Device::Cpu)).view([2, 3]).tr();
        let weights = Weights::from_seed(1, Kind::Float, Device::Cpu);
        let made = weights.make("a", &[3, 2], Init::Value(value.shallow_clone()));
        assert!(made.equal(&value) && made.is_contiguous());
        assert_ne!(made.data_ptr(), value.data_ptr());
    }

    #[test]
    fn a_draw_depends_on_seed_and_name_alone() {
        let made = |seed, name, init| {
            Weights::from_seed(seed, Kind::Float, Device::Cpu).make(name, &[50, 40], init)
        };
        let draw = |seed, name| made(seed, name, Init::Normal(0.5));
        assert!(draw(1, "a").equal(&draw(1, "a")));
        assert!(!draw(1, "a").equal(&draw(1, "b")));
        assert!(!draw(1, "a").equal(&draw(2, "a")));
        let uniform = made(1, "a", Init::Uniform(0.5));
        let [low, high] = [uniform.min(), uniform.max()].map(|x| x.double_value(&[]));
        assert!((-0.5..-0.49).contains(&low) && (0.49..0.5).contains(&high), "{low} to {high}");
        let std = draw(3, "c").std(true).double_value(&[]);
        assert!((std - 0.5).abs() < 0.03, "{std}");
    }
}
