//! Low-rank adapters: a frozen matrix W learns a correction of low rank.
//!
//! ```text
//! y = W x + s · B A dropout(x)      A: [rank, in], B: [out, rank], s = alpha / rank
//! ```
//!
//! Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", <https://arxiv.org/abs/2106.09685>, section
//! 4.1. As in PEFT, A starts uniform in ±1/√in and B at zero, so that an adapter begins as no change at all, and
//! dropout falls on the adapter's input alone. The paper draws A from a normal distribution instead.
//!
//! An adapter can be merged into its matrix (`W + s·B A`, nothing remains to compute) or written in PEFT's format.

use std::{
    collections::{BTreeMap, BTreeSet},
    num::NonZeroUsize,
    path::Path,
};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use tch::{Kind, Tensor};

use crate::{
    Error, Model,
    checkpoint::{CONFIG_FILE, Checkpoint, FolderWriter, read_json, read_metadata},
    config::Head,
    nn::{Layout, Linear, Visitor},
    weights::{Init, Weights},
};

/// PEFT's names of the two files of an adapter.
pub const ADAPTER_FILE: &str = "adapter_config.json";
const TENSORS_FILE: &str = "adapter_model.safetensors";

/// Where the file of tensors says which base it belongs to.
const BASE_KEY: &str = "attn_base_sha256";
/// Where it did before, by a few values of each parameter.
const OLD_BASE_KEY: &str = "attn_base";

/// What PEFT puts in front of a base model's names.
const PEFT_PREFIX: &str = "base_model.model.";

/// Target that stands for every matrix of every block.
const ALL_LINEAR: &str = "all-linear";

/// Settings of adapters, under PEFT's names where it has them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Lora {
    /// Rank of each correction.
    pub rank: NonZeroUsize,
    /// The correction is scaled by `alpha / rank`.
    pub alpha: f64,
    /// Share of an adapter's inputs dropped in training.
    pub dropout: f64,
    /// Matrices to adapt: names in the checkpoint, whole or their last parts (`c_attn`, `mlp.c_proj`), or `all-linear`.
    /// Empty: those PEFT takes for the architecture (`c_attn`; query and value where they are apart).
    pub targets: Vec<String>,
    /// Ranks of the corrections of the query, key and value projections, 0 for none, in place of `rank`; `targets` then
    /// names the other matrices, and may be empty. Where q, k and v are one matrix (GPT-2's `c_attn`) each correction
    /// reaches its own outputs alone, which PEFT has no format for: such an adapter can be merged but not exported.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub qkv_ranks: Option<[usize; 3]>,
}

impl Default for Lora {
    fn default() -> Self {
        Self {
            rank: const { NonZeroUsize::new(8).unwrap() },
            alpha: 16.0,
            dropout: 0.0,
            targets: Vec::new(),
            qkv_ranks: None,
        }
    }
}

impl Lora {
    /// Checks what needs no model.
    ///
    /// # Errors
    /// [`Error::Lora`] with the first setting out of range.
    pub fn validate(&self) -> Result<(), Error> {
        if !(self.alpha.is_finite() && self.alpha > 0.0) {
            return Err(problem("alpha", format!("is {}, expected a number above 0", self.alpha)));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            let found = self.dropout;
            return Err(problem(
                "dropout",
                format!("is {found}, expected a share of at least 0 and below 1"),
            ));
        }
        if self.qkv_ranks == Some([0; 3]) && self.targets.is_empty() {
            return Err(problem("qkv_ranks", "are all 0, and `targets` names nothing else".into()));
        }
        Ok(())
    }
}

fn problem(field: &'static str, problem: String) -> Error {
    Error::Lora { field, problem }
}

/// A correction of one matrix, or one for some of its outputs.
#[derive(Debug)]
struct Part {
    /// `""` for the whole matrix, else `.q`, `.k`, `.v`.
    suffix: &'static str,
    /// `[rank, in]`.
    a: Tensor,
    /// `[outputs, rank]`.
    b: Tensor,
    scale: f64,
    /// The first output it reaches.
    start: i64,
}

/// What a [`Linear`] adds to its output.
#[derive(Debug)]
pub(crate) struct Adapter {
    /// By their first output; they do not overlap.
    parts: Vec<Part>,
    dropout: f64,
}

impl Adapter {
    /// `[.., in] -> [.., out]`, `out` being the width of the matrix.
    pub(crate) fn forward(&self, x: &Tensor, out: i64, train: bool) -> Tensor {
        let x = x.dropout(self.dropout, train);
        let correction = |part: &Part| {
            (x.linear(&part.a, None::<&Tensor>) * part.scale).linear(&part.b, None::<&Tensor>)
        };
        if let [part] = &self.parts[..]
            && part.b.size()[0] == out
        {
            return correction(part);
        }
        let mut shape = x.size();
        let mut zeros = |width: i64| {
            *shape.last_mut().expect("an input has axes") = width;
            Tensor::zeros(&shape, (x.kind(), x.device()))
        };
        let (mut pieces, mut at) = (Vec::new(), 0);
        for part in &self.parts {
            if part.start > at {
                pieces.push(zeros(part.start - at));
            }
            pieces.push(correction(part));
            at = part.start + part.b.size()[0];
        }
        if at < out {
            pieces.push(zeros(out - at));
        }
        Tensor::cat(&pieces, -1)
    }

    /// Adds the corrections to `weight`, `[out, in]`, in place, computed in at least `f32`.
    fn merge(&self, weight: &Tensor) {
        for Part { a, b, scale, start, .. } in &self.parts {
            let wide = |x: &Tensor| match x.kind() {
                Kind::Double => x.shallow_clone(),
                _ => x.to_kind(Kind::Float),
            };
            let mut rows = weight.narrow(0, *start, b.size()[0]);
            let sum = wide(&rows) + wide(b).matmul(&wide(a)) * *scale;
            rows.copy_(&sum);
        }
    }

    /// Another handle on the same factors.
    pub(crate) fn share(&self) -> Self {
        let share = |part: &Part| Part {
            suffix: part.suffix,
            a: part.a.shallow_clone(),
            b: part.b.shallow_clone(),
            scale: part.scale,
            start: part.start,
        };
        Self { parts: self.parts.iter().map(share).collect(), dropout: self.dropout }
    }

    pub(crate) fn visit(&self, name: &str, f: &mut Visitor<'_>) {
        for Part { suffix, a, b, .. } in &self.parts {
            f(&format!("{name}.lora_A{suffix}.weight"), a);
            f(&format!("{name}.lora_B{suffix}.weight"), b);
        }
    }
}

/// Whether a parameter of [`Model::parameters`](crate::Model::parameters) belongs to an adapter.
pub fn is_adapter(name: &str) -> bool {
    name.contains(".lora_A") || name.contains(".lora_B")
}

/// A matrix of a block, and which of its outputs are q, k and v.
#[derive(Debug)]
pub struct Slot<'a> {
    /// The matrix.
    pub linear: &'a mut Linear,
    /// `(0, 1 or 2 for q, k, v; first output; number of outputs)`; empty where it is none of them.
    pub qkv: Vec<(usize, i64, i64)>,
}

impl<'a> From<&'a mut Linear> for Slot<'a> {
    fn from(linear: &'a mut Linear) -> Self {
        Self { linear, qkv: Vec::new() }
    }
}

/// Puts adapters into the matrices that `lora` names.
///
/// # Errors
/// [`Error::Lora`] for a target that matches nothing; nothing is then changed.
pub(crate) fn attach(
    slots: Vec<Slot<'_>>,
    lora: &Lora,
    defaults: &[&str],
    weights: &mut Weights<'_>,
) -> Result<(), Error> {
    lora.validate()?;
    let defaults: Vec<String> = defaults.iter().map(|&name| name.to_owned()).collect();
    let targets = match lora.qkv_ranks {
        None if lora.targets.is_empty() => &defaults,
        _ => &lora.targets,
    };
    let names: Vec<&str> = slots.iter().map(|slot| slot.linear.name.as_str()).collect();
    let unmatched = |target: &&String| !names.iter().any(|name| matches(target, name));
    if let Some(target) = targets.iter().find(unmatched) {
        let mut known: Vec<&str> = names.iter().map(|name| last_part(name)).collect();
        known.sort_unstable();
        known.dedup();
        return Err(problem(
            "targets",
            format!(
                "`{target}` matches no matrix of a block\nhint: those there are: {}, or `{ALL_LINEAR}`",
                known.join(", ")
            ),
        ));
    }
    if let Some(target) = lora.qkv_ranks.and_then(|_| {
        let rules = |target: &&String| {
            let ruled =
                |slot: &Slot<'_>| !slot.qkv.is_empty() && matches(target, &slot.linear.name);
            **target != ALL_LINEAR && slots.iter().any(ruled)
        };
        targets.iter().find(rules)
    }) {
        return Err(problem(
            "targets",
            format!(
                "names `{target}`, whose ranks `qkv_ranks` gives\nhint: leave one of the two away"
            ),
        ));
    }
    for slot in slots {
        let rank = targets.iter().any(|target| matches(target, &slot.linear.name));
        let rank = if rank { lora.rank.get() } else { 0 };
        let [n_out, _] = slot.linear.out_in().size()[..] else {
            unreachable!("a matrix has two axes")
        };
        // (suffix, rank, first output, outputs)
        let wanted: Vec<(&'static str, usize, i64, i64)> = match (lora.qkv_ranks, &slot.qkv[..]) {
            (Some(ranks), [(which, start, len)]) => vec![("", ranks[*which], *start, *len)],
            (Some(ranks), [_, _, ..]) => {
                let part = |&(which, start, len): &(usize, i64, i64)| {
                    ([".q", ".k", ".v"][which], ranks[which], start, len)
                };
                slot.qkv.iter().map(part).collect()
            }
            _ => vec![("", rank, 0, n_out)],
        };
        let parts = wanted
            .into_iter()
            .filter(|&(_, rank, ..)| rank > 0)
            .map(|(suffix, rank, start, len)| {
                Part::new(slot.linear, lora, (suffix, rank, start, len), weights)
            })
            .collect::<Result<Vec<_>, _>>()?;
        slot.linear.adapter =
            (!parts.is_empty()).then_some(Adapter { parts, dropout: lora.dropout });
    }
    Ok(())
}

impl Part {
    fn new(
        linear: &Linear,
        lora: &Lora,
        (suffix, rank, start, len): (&'static str, usize, i64, i64),
        weights: &mut Weights<'_>,
    ) -> Result<Self, Error> {
        let (name, n_in) = (&linear.name, linear.out_in().size()[1]);
        let (r, bound) = (rank as i64, (n_in as f64).powf(-0.5));
        let a = format!("{name}.lora_A{suffix}.weight");
        let b = format!("{name}.lora_B{suffix}.weight");
        Ok(Self {
            suffix,
            a: weights.get(&a, &[r, n_in], Init::Uniform(bound))?,
            b: weights.get(&b, &[len, r], Init::Zeros)?,
            scale: lora.alpha / rank as f64,
            start,
        })
    }
}

/// Adds each adapter to its matrix and removes it.
pub(crate) fn merge(slots: Vec<Slot<'_>>) {
    let _no_grad = tch::no_grad_guard();
    for Slot { linear, .. } in slots {
        if let Some(adapter) = linear.adapter.take() {
            adapter.merge(&linear.out_in());
        }
    }
}

/// What each whole correction is scaled by, by the name of its matrix.
fn scales(slots: Vec<Slot<'_>>) -> BTreeMap<String, f64> {
    let of = |slot: Slot<'_>| match slot.linear.adapter.as_ref().map(|adapter| &adapter.parts[..]) {
        Some([part]) => Some((slot.linear.name.clone(), part.scale)),
        _ => None,
    };
    slots.into_iter().filter_map(of).collect()
}

/// Whether `target` is `name` or what it ends in, as PEFT has it.
fn matches(target: &str, name: &str) -> bool {
    let is_end = || name.strip_suffix(target).is_some_and(|start| start.ends_with('.'));
    target == ALL_LINEAR || target == name || is_end()
}

fn last_part(name: &str) -> &str {
    name.rsplit_once('.').map_or(name, |(_, last)| last)
}

impl Model {
    /// Puts an adapter beside each matrix that `lora` names, A drawn from `seed`. The model computes what it did
    /// before. Which parameters are trained is the caller's to say: see [`is_adapter`].
    ///
    /// # Errors
    /// [`Error::Lora`] for a setting out of range, a target that matches nothing, or where there are adapters already.
    pub fn add_lora(&mut self, lora: &Lora, seed: u64) -> Result<(), Error> {
        self.refuse_lora("add adapters")?;
        let mut weights = Weights::from_seed(seed, self.kind, self.device);
        let defaults = self.config.arch.lora_targets();
        attach(self.arch.linears_mut(), lora, defaults, &mut weights)?;
        self.lora = Some(lora.clone());
        self.lora_scales = scales(self.arch.linears_mut());
        self.structure_changed()
    }

    /// The settings of the adapters, where there are any.
    pub fn lora(&self) -> Option<&Lora> {
        self.lora.as_ref()
    }

    /// Adds each adapter to its matrix, after which there is none. A model without adapters stays as it is.
    ///
    /// # Errors
    /// None that a model in working order gives.
    pub fn merge_lora(&mut self) -> Result<(), Error> {
        merge(self.arch.linears_mut());
        self.lora = None;
        self.lora_scales.clear();
        self.structure_changed()
    }

    /// Whether the adapters, and the parameters `trained` that were trained whole, fit PEFT's format.
    ///
    /// # Errors
    /// [`Error::Lora`] where they do not, or where there are no adapters.
    pub fn check_export(&self, trained: &[String]) -> Result<(), Error> {
        let names = self.parameters();
        if self.lora.is_none() {
            return Err(problem("save", "there are no adapters to save".into()));
        }
        self.refuse_tied(trained.iter().map(String::as_str), "save")?;
        match names.iter().find(|(name, _)| is_adapter(name) && is_partial(name)) {
            Some((name, _)) => Err(problem(
                "qkv_ranks",
                format!(
                    "`{name}` reaches some outputs of its matrix alone, which PEFT has no format for\nhint: merge it \
                     (save = \"merged\"), or give the whole matrix one rank"
                ),
            )),
            None => Ok(()),
        }
    }

    /// Writes the adapters as PEFT does: `adapter_config.json`, `adapter_model.safetensors`. `base` is what the base
    /// model is called, a path or Hub id; `trained` names parameters that were trained whole (a new classifier) and go
    /// along. The model's own `config.json`, which names its classes, and `files` stand beside them.
    ///
    /// # Errors
    /// As [`Self::check_export`]; if it cannot be written.
    pub fn save_adapter(
        &self,
        dir: &Path,
        base: &str,
        trained: &[String],
        files: &[(String, Vec<u8>)],
    ) -> Result<(), Error> {
        self.check_export(trained)?;
        let lora = self.lora.as_ref().expect("checked above");
        let is_kept = |name: &str| is_adapter(name) || trained.iter().any(|other| other == name);
        let tensors: Vec<(String, Tensor)> = self
            .parameters()
            .into_iter()
            .filter(|(name, _)| is_kept(name))
            .map(|(name, tensor)| (format!("{PEFT_PREFIX}{name}"), tensor))
            .collect();
        let saved: BTreeSet<&str> = trained.iter().map(|name| module_of(name)).collect();
        let adapted: BTreeMap<&str, i64> = tensors
            .iter()
            .filter_map(|(name, a)| {
                let module = name.strip_suffix(".lora_A.weight")?;
                Some((module.strip_prefix(PEFT_PREFIX)?, a.size()[0]))
            })
            .collect();
        // Ranks and alphas of their own only where a matrix has others than the rest.
        let rank = lora.rank.get() as i64;
        let ranks: BTreeMap<&str, i64> =
            adapted.iter().filter(|&(_, &r)| r != rank).map(|(&name, &r)| (name, r)).collect();
        let alphas: BTreeMap<&str, f64> = adapted
            .iter()
            .map(|(&name, &r)| (name, self.lora_scales[name] * r as f64))
            .filter(|(_, alpha)| *alpha != lora.alpha)
            .collect();
        let task = match self.config.head {
            Head::Classifier { .. } => Some("SEQ_CLS"),
            Head::LanguageModel if self.config.is_causal() => Some("CAUSAL_LM"),
            Head::LanguageModel => None,
            Head::Bare => Some("FEATURE_EXTRACTION"),
        };
        let config = json!({
            "peft_type": "LORA",
            "task_type": task,
            "base_model_name_or_path": base,
            "r": rank,
            "lora_alpha": lora.alpha,
            "lora_dropout": lora.dropout,
            "target_modules": adapted.keys().collect::<Vec<_>>(),
            "rank_pattern": ranks,
            "alpha_pattern": alphas,
            "use_rslora": false,
            "fan_in_fan_out": self.config.arch.layout() == Layout::InOut,
            "bias": "none",
            "modules_to_save": saved,
            "inference_mode": true,
        });
        let mut metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        if self.kind != Kind::Half {
            let is_base = |name: &str| !is_adapter(name) && !is_kept(name);
            metadata.insert(BASE_KEY.to_owned(), self.fingerprint(&is_base)?);
        }
        let writer = FolderWriter::create(dir)?;
        writer.tensors(TENSORS_FILE, &tensors, &metadata)?;
        writer.json(ADAPTER_FILE, config.as_object().expect("an object"))?;
        writer.json(CONFIG_FILE, &self.config.to_json(self.kind))?;
        for (file, content) in files {
            writer.file(file, content)?;
        }
        Ok(writer.commit()?)
    }

    /// Reads adapters that [`Self::save_adapter`] or PEFT wrote for this base model: matrices get their corrections,
    /// modules trained whole (`modules_to_save`) are replaced. The head must be the one the adapter was trained with.
    ///
    /// # Errors
    /// [`Error::Lora`] where the folder holds something else than LoRA or an option of it that is not supported;
    /// [`Error::Adapter`] where it is for another model. The model is then unchanged.
    ///
    /// Returns the names of the parameters that were replaced whole.
    pub fn load_adapter(&mut self, dir: &Path) -> Result<Vec<String>, Error> {
        self.refuse_lora("load an adapter")?;
        let settings = Settings::read(dir)?;
        let path = dir.join(TENSORS_FILE);
        let file = Checkpoint::open_file(&path)?;
        let (mut found, mut whole, mut misfits) = (BTreeMap::new(), Vec::new(), Vec::new());
        let own: BTreeMap<String, Tensor> = self.parameters().into_iter().collect();
        for stored in file.names() {
            let name = stored.strip_prefix(PEFT_PREFIX).unwrap_or(stored);
            if name.ends_with(".lora_A.weight") || name.ends_with(".lora_B.weight") {
                found.insert(name.to_owned(), stored.to_owned());
            } else if own.get(name).is_some_and(|own| file.shape(stored) == Some(&own.size())) {
                whole.push((name.to_owned(), stored.to_owned()));
            } else {
                let shape = own.get(name).map(Tensor::size);
                misfits.push(misfit(stored, file.shape(stored), shape.as_deref()));
            }
        }
        let mut parts = Vec::new();
        for slot in self.arch.linears_mut() {
            let name = &slot.linear.name;
            let [a, b] = ["A", "B"].map(|part| found.remove(&format!("{name}.lora_{part}.weight")));
            let [n_out, n_in] = slot.linear.out_in().size()[..] else { unreachable!("two axes") };
            match (a, b) {
                (None, None) => {}
                (Some(a), Some(b)) => {
                    let rank = file.shape(&a).and_then(|shape| shape.first().copied()).unwrap_or(0);
                    for (stored, expected) in [(&a, [rank, n_in]), (&b, [n_out, rank])] {
                        if file.shape(stored) != Some(&expected[..]) {
                            misfits.push(misfit(stored, file.shape(stored), Some(&expected)));
                        }
                    }
                    parts.push((name.clone(), a, b, settings.scale(name, rank)));
                }
                (Some(stored), None) | (None, Some(stored)) => {
                    misfits.push(format!("{stored}: its other half is missing"));
                }
            }
        }
        self.refuse_tied(whole.iter().map(|(name, _)| name.as_str()), "modules_to_save")?;
        let strangers =
            found.values().map(|stored| format!("{stored}: no such matrix in the model"));
        misfits.extend(strangers);
        if parts.is_empty() && misfits.is_empty() {
            misfits.push("it holds no adapter".into());
        }
        let is_base = |name: &str| whole.iter().all(|(other, _)| other != name);
        let metadata = read_metadata(&path)?;
        if metadata.contains_key(OLD_BASE_KEY) && !metadata.contains_key(BASE_KEY) {
            tracing::warn!(
                "`{}` was written by an earlier version, whose mark of the base model is no longer read: see to it that the \
                 adapter stands beside the weights it was trained with",
                path.display()
            );
        }
        if let Some(base) = metadata.get(BASE_KEY)
            && misfits.is_empty()
            && *base != self.fingerprint(&is_base)?
        {
            let mut misfit =
                "the weights it was trained beside are others than the model's".to_owned();
            if self.kind == Kind::Half {
                misfit += ", as they are in f16: load the model in f32, the adapter, then convert";
            }
            misfits.push(misfit);
        }
        if !misfits.is_empty() {
            return Err(Error::Adapter { path, base: settings.base, problems: misfits });
        }
        let tensor = |stored: &str| file.tensor(stored, Some(self.kind), self.device);
        let mut adapters = BTreeMap::new();
        for (name, a, b, scale) in parts {
            let part = Part { suffix: "", a: tensor(&a)?, b: tensor(&b)?, scale, start: 0 };
            adapters.insert(name, Adapter { parts: vec![part], dropout: settings.dropout });
        }
        let _no_grad = tch::no_grad_guard();
        let mut replaced = Vec::new();
        for (name, stored) in whole {
            own[&name].shallow_clone().copy_(&tensor(&stored)?);
            replaced.push(name);
        }
        for Slot { linear, .. } in self.arch.linears_mut() {
            linear.adapter = adapters.remove(&linear.name);
        }
        self.lora = Some(settings.lora());
        self.lora_scales = scales(self.arch.linears_mut());
        self.structure_changed()?;
        Ok(replaced)
    }

    /// Refuses what cannot be done beside adapters.
    pub(crate) fn refuse_lora(&self, what: &str) -> Result<(), Error> {
        match self.lora {
            Some(_) => Err(problem(
                "adapters",
                format!("are in place, cannot {what}\nhint: merge them first"),
            )),
            None => Ok(()),
        }
    }

    /// Refuses a parameter trained whole that the head shares: PEFT keeps a copy, and the head the old one.
    fn refuse_tied<'a>(
        &self,
        mut trained: impl Iterator<Item = &'a str>,
        field: &'static str,
    ) -> Result<(), Error> {
        let Some(tied) = self.arch.tied().filter(|&tied| trained.any(|name| name == tied)) else {
            return Ok(());
        };
        Err(problem(
            field,
            format!(
                "`{tied}` was trained whole and is the head's matrix as well, which PEFT takes apart\nhint: merge the \
                 adapters (save = \"merged\"), or leave it frozen"
            ),
        ))
    }
}

fn is_partial(name: &str) -> bool {
    !name.ends_with(".lora_A.weight") && !name.ends_with(".lora_B.weight")
}

/// The module of a parameter: its name without the last part.
fn module_of(name: &str) -> &str {
    name.rsplit_once('.').map_or(name, |(module, _)| module)
}

fn misfit(stored: &str, found: Option<&[i64]>, expected: Option<&[i64]>) -> String {
    let shape = |shape: Option<&[i64]>| shape.map_or("no such tensor".into(), |s| format!("{s:?}"));
    format!("{stored}: {} in the adapter, {} in the model", shape(found), shape(expected))
}

/// What of `adapter_config.json` changes the computation.
#[derive(Debug)]
struct Settings {
    base: String,
    rank: NonZeroUsize,
    alpha: f64,
    alphas: Map<String, Value>,
    dropout: f64,
    targets: Vec<String>,
    rank_stabilized: bool,
}

impl Settings {
    fn read(dir: &Path) -> Result<Self, Error> {
        let json = read_json(dir, ADAPTER_FILE)?;
        let refuse = |field: &str, expected: &str| {
            let found = json.get(field).map_or("absent".into(), Value::to_string);
            Err(problem(
                "adapter_config.json",
                format!("`{field}` is {found}, expected {expected}"),
            ))
        };
        let text = |field: &str| json.get(field).and_then(Value::as_str);
        let is_set = |field: &str| {
            let off = [Value::Null, json!(false), json!({}), json!([])];
            json.get(field).is_some_and(|value| !off.contains(value))
        };
        if text("peft_type") != Some("LORA") {
            return refuse("peft_type", "\"LORA\"");
        }
        // Each would change the logits.
        const UNSUPPORTED: [&str; 12] = [
            "use_dora",
            "use_bdlora",
            "alora_invocation_tokens",
            "arrow_config",
            "kasa_config",
            "monteclora_config",
            "velora_config",
            "layer_replication",
            "trainable_token_indices",
            "target_parameters",
            "use_qalora",
            "lora_bias",
        ];
        for field in UNSUPPORTED {
            if is_set(field) {
                return refuse(field, "it not to be set: it is not supported");
            }
        }
        // The others change the base model when they are loaded.
        if let Some(Value::String(init)) = json.get("init_lora_weights")
            && !matches!(init.as_str(), "gaussian" | "orthogonal" | "eva")
        {
            return refuse("init_lora_weights", "true, false, \"gaussian\" or absent");
        }
        if !matches!(text("bias"), None | Some("none")) {
            return refuse("bias", "\"none\"");
        }
        let rank =
            json.get("r").and_then(Value::as_u64).and_then(|r| NonZeroUsize::new(r as usize));
        let Some(rank) = rank else { return refuse("r", "a rank of at least 1") };
        let Some(alpha) = json.get("lora_alpha").and_then(Value::as_f64) else {
            return refuse("lora_alpha", "a number");
        };
        // PEFT reads these keys as regular expressions; plain names mean the same to both.
        for field in ["rank_pattern", "alpha_pattern"] {
            let keys = json.get(field).and_then(Value::as_object).into_iter().flatten();
            for (key, value) in keys {
                if key.contains(|c| "^$*+?()[]{}|\\".contains(c)) || value.as_f64().is_none() {
                    let expected = "names of modules with a number each, no regular expressions";
                    return refuse(field, expected);
                }
            }
        }
        let targets = match json.get("target_modules") {
            Some(Value::Array(names)) => {
                names.iter().filter_map(Value::as_str).map(str::to_owned).collect()
            }
            Some(Value::String(name)) => vec![name.clone()],
            _ => Vec::new(),
        };
        Ok(Self {
            base: text("base_model_name_or_path").unwrap_or("not named").to_owned(),
            rank,
            alpha,
            alphas: json
                .get("alpha_pattern")
                .and_then(Value::as_object)
                .cloned()
                .unwrap_or_default(),
            dropout: json.get("lora_dropout").and_then(Value::as_f64).unwrap_or(0.0),
            targets,
            rank_stabilized: is_set("use_rslora"),
        })
    }

    /// What PEFT multiplies the correction of the matrix `name` by.
    fn scale(&self, name: &str, rank: i64) -> f64 {
        let own = self.alphas.iter().find(|(target, _)| matches(target, name));
        let alpha = own.and_then(|(_, value)| value.as_f64()).unwrap_or(self.alpha);
        let rank = rank as f64;
        alpha / if self.rank_stabilized { rank.sqrt() } else { rank }
    }

    fn lora(self) -> Lora {
        Lora {
            rank: self.rank,
            alpha: self.alpha,
            dropout: self.dropout,
            targets: self.targets,
            qkv_ranks: None,
        }
    }
}
