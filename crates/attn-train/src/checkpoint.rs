//! Checkpoints of a run: what it takes to go on as if nothing had happened.
//!
//! ```text
//! <run>/checkpoints/step-000120/   a model folder, with beside it
//!     train_state.safetensors      AdamW's moments and steps, the state of the random streams
//!     train_state.json             a TrainState: position, settings, metrics, environment
//!     SHA256SUMS                   checksums of all of these
//! <run>/checkpoints/best-000080/   a model folder, with beside it
//!     best.json                    a Best: its step and metrics
//!     SHA256SUMS
//! ```
//!
//! With adapters ([`attn_core::lora`]) the folder holds the trained parameters alone, in `trained.safetensors`: the others
//! are the base model's, which may be a thousand times larger, and must be those the run began with.
//!
//! A folder is written under another name, brought to the disk, and renamed: a kill at any moment leaves the last good
//! one. Old ones are removed after that. A `best` folder stays as long as a checkpoint that is kept refers to it, so
//! that falling back to an older checkpoint finds the best model of its time.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File, TryLockError},
    io,
    path::{Path, PathBuf},
};

use attn_core::{
    Lora, Model,
    checkpoint::{
        CONFIG_FILE, Checkpoint, FolderWriter, WriteOptions, check_sums, read_json, read_tensors,
    },
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Map, Value};
use tch::{Device, Tensor};

use crate::{
    config::TrainConfig,
    environment::{Environment, RngState},
    error::{Error, Result},
    metrics::Metric,
    optimizer::{Optimizer, copy},
    run::Best,
};

/// Version of the format described above.
pub const FORMAT_VERSION: u32 = 1;

/// The folder of a run that holds its checkpoints.
pub const FOLDER: &str = "checkpoints";

const TENSORS_FILE: &str = "train_state.safetensors";
const TRAINED_FILE: &str = "trained.safetensors";
const STATE_FILE: &str = "train_state.json";
const BEST_FILE: &str = "best.json";
const STEP: &str = "step-";
const BEST: &str = "best-";

/// Settings that change neither weights nor metrics, and so may differ when a run is resumed.
const FREE_SETTINGS: [&str; 3] = ["checkpoint_every", "keep_last", "log_every"];

/// Where a run stands.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainState {
    /// [`FORMAT_VERSION`].
    pub format_version: u32,
    /// Steps done.
    pub step: u64,
    /// Steps of the whole run.
    pub total_steps: u64,
    /// The epoch of the next step, from 0.
    pub epoch: u64,
    /// The first batch of the next step within its epoch, from 0.
    pub batch: usize,
    /// Tokens so far, without padding.
    pub n_tokens: u64,
    /// Seconds so far, over all processes; 0 where an older version saved it.
    #[serde(default)]
    pub elapsed_s: f64,
    /// The step after which the model was last evaluated.
    pub evaluated_at: Option<u64>,
    /// What the evaluation before the first step gave.
    pub before: Vec<Metric>,
    /// What the last one gave.
    pub latest: Vec<Metric>,
    /// The best model so far.
    pub best: Option<Best>,
    /// The part of the next line of `metrics.jsonl` that has been seen.
    pub log: LogPart,
    /// The mean loss in the last line.
    pub train_loss: Option<f64>,
    /// Bytes of `metrics.jsonl`.
    pub metrics_bytes: u64,
    /// What is minimized.
    pub objective: String,
    /// A hash of the order of the examples and of the first batch.
    pub data: String,
    /// The settings.
    pub config: TrainConfig,
    /// What is trained beside the base model, where that is left as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapters: Option<Adapters>,
    /// Where the run takes place.
    pub environment: Environment,
}

/// Adapters and what they stand beside.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Adapters {
    /// Their settings.
    pub lora: Lora,
    /// [`Model::fingerprint`] of the parameters that are not trained: the checkpoint does not hold them.
    pub base: String,
}

/// Sums since the last line of `metrics.jsonl`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LogPart {
    /// Loss times targets.
    pub loss: f64,
    /// Targets.
    pub n_targets: f64,
    /// Norm of the gradient.
    pub grad_norm: f64,
    /// Steps.
    pub n_steps: u64,
}

/// The checkpoints of the run in `run_dir`, newest first, good or not.
///
/// # Errors
///
/// If the folder cannot be read; that there is none is no error.
pub fn list(run_dir: &Path) -> Result<Vec<(u64, PathBuf)>> {
    numbered(&run_dir.join(FOLDER), STEP)
}

/// Where the best model of a run in `run_dir` stands, if it was made at `step`.
pub fn best_folder(run_dir: &Path, step: u64) -> PathBuf {
    run_dir.join(FOLDER).join(format!("{BEST}{step:06}"))
}

fn step_folder(run_dir: &Path, step: u64) -> PathBuf {
    run_dir.join(FOLDER).join(format!("{STEP}{step:06}"))
}

/// Keeps other processes from training in the same folder, until dropped.
#[derive(Debug)]
pub(crate) struct RunLock {
    _file: File,
}

impl RunLock {
    /// Takes the run's folder, which is made if need be, and clears away what a kill left half written.
    pub(crate) fn take(run_dir: &Path) -> Result<Self> {
        let folder = run_dir.join(FOLDER);
        fs::create_dir_all(&folder).map_err(Error::io("create", &folder))?;
        let path = folder.join(".lock");
        let file = File::create(&path).map_err(Error::io("create", &path))?;
        match file.try_lock() {
            Ok(()) => remove_half_written(&folder),
            Err(TryLockError::WouldBlock) => {
                return Err(Error::RunInUse { dir: run_dir.to_owned() });
            }
            // Some network file systems have no locks.
            Err(TryLockError::Error(error)) => {
                tracing::warn!("cannot lock `{}`: {error}", path.display());
            }
        }
        Ok(Self { _file: file })
    }
}

/// Removes the folders that a killed process was writing to: nobody else can be, as the run is locked.
fn remove_half_written(folder: &Path) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let is_ours = [STEP, BEST].iter().any(|kind| name.starts_with(&format!(".{kind}")));
        if is_ours && name.contains(".attn-tmp-") {
            match fs::remove_dir_all(entry.path()) {
                Ok(()) => tracing::info!("removed `{name}`, left by a run that was killed"),
                Err(error) => {
                    tracing::warn!("cannot remove `{name}`, left by a killed run: {error}")
                }
            }
        }
    }
}

/// Writes a checkpoint and returns its folder; removes what is then no longer needed.
pub(crate) fn save(
    run_dir: &Path,
    model: &Model,
    optimizer: &Optimizer,
    state: &TrainState,
    files: &[(String, Vec<u8>)],
) -> Result<PathBuf> {
    let dir = step_folder(run_dir, state.step);
    let mut tensors = optimizer.to_tensors();
    tensors.extend(RngState::now(model.device())?.to_tensors());

    let writer = model_folder(&dir, model, files)?;
    writer.tensors(TENSORS_FILE, &tensors, &BTreeMap::new())?;
    writer.json(STATE_FILE, &to_map(state))?;
    writer.sums()?;
    writer.commit()?;

    remove_old(run_dir, state);
    Ok(dir)
}

/// Writes the best model so far and returns its folder.
pub(crate) fn save_best(
    run_dir: &Path,
    model: &Model,
    best: &Best,
    files: &[(String, Vec<u8>)],
) -> Result<PathBuf> {
    let dir = best_folder(run_dir, best.step);
    let writer = model_folder(&dir, model, files)?;
    writer.json(BEST_FILE, &to_map(best))?;
    writer.sums()?;
    writer.commit()?;
    Ok(dir)
}

fn model_folder(dir: &Path, model: &Model, files: &[(String, Vec<u8>)]) -> Result<FolderWriter> {
    let writer = FolderWriter::create(dir)?;
    let kept = kept_parameters(model);
    match model.lora() {
        None => writer.weights(&kept, &WriteOptions::default())?,
        // Under another name: nobody takes a part for the whole.
        Some(_) => writer.tensors(TRAINED_FILE, &kept, &BTreeMap::new())?,
    }
    writer.json(CONFIG_FILE, &model.config().to_json(model.kind()))?;
    for (file, content) in files {
        writer.file(file, content)?;
    }
    Ok(writer)
}

/// What a checkpoint of `model` holds while it is being trained.
fn kept_parameters(model: &Model) -> Vec<(String, Tensor)> {
    let mut all = model.parameters();
    if model.lora().is_some() {
        all.retain(|(_, tensor)| tensor.requires_grad());
    }
    all
}

/// Reads the newest good checkpoint into model, optimizer and random streams. Those that are torn are skipped with a
/// warning; one that was made with other settings is refused.
///
/// Nothing is changed unless a checkpoint fits as a whole.
pub(crate) fn resume(
    run_dir: &Path,
    model: &mut Model,
    optimizer: &mut Optimizer,
    now: &TrainState,
) -> Result<(TrainState, PathBuf)> {
    let found = list(run_dir)?;
    if found.is_empty() {
        return Err(Error::NoCheckpoint { dir: run_dir.join(FOLDER) });
    }
    let mut reasons = Vec::new();
    for (_, dir) in found {
        let problem = match Stored::read(&dir) {
            Ok(stored) => {
                let stored = stored.with_whole_best(run_dir);
                stored.check(model, now)?;
                match stored.check_tensors(model, optimizer) {
                    Ok(()) => {
                        stored.load(model, optimizer)?;
                        return Ok((stored.state, dir));
                    }
                    Err(problem) => problem,
                }
            }
            Err(problem) => problem,
        };
        tracing::warn!("skipping the checkpoint `{}`: {problem}", dir.display());
        reasons.push(format!("`{}`: {problem}", dir.display()));
    }
    Err(Error::NoGoodCheckpoint { dir: run_dir.join(FOLDER), reasons })
}

/// Puts the best model's weights into `model`.
pub(crate) fn load_best(run_dir: &Path, model: &Model, best: &Best) -> Result<()> {
    let dir = best_folder(run_dir, best.step);
    check_sums(&dir)?;
    load_weights(&open_weights(&dir)?, model)
}

/// A checkpoint that was found whole.
#[derive(Debug)]
struct Stored {
    state: TrainState,
    config: Map<String, Value>,
    weights: Checkpoint,
    tensors: BTreeMap<String, Tensor>,
}

impl Stored {
    /// Reads a checkpoint but for the weights' values. Every byte is held against the checksums; a checkpoint of an older
    /// version has none, and its weights' header alone is checked (it knows the file's length).
    fn read(dir: &Path) -> Result<Self, String> {
        let has_sums = check_sums(dir).map_err(|error| chain(&error))?;
        if !has_sums {
            tracing::info!("`{}` has no checksums", dir.display());
        }
        let state: TrainState = from_file(dir, STATE_FILE)?;
        if state.format_version != FORMAT_VERSION {
            return Err(format!(
                "`{STATE_FILE}` is of format {}, expected {FORMAT_VERSION}",
                state.format_version
            ));
        }
        let config = read_json(dir, CONFIG_FILE).map_err(|error| chain(&error))?;
        let weights = open_weights(dir).map_err(|error| chain(&error))?;
        let tensors = read_tensors(&dir.join(TENSORS_FILE)).map_err(|error| chain(&error))?;
        Ok(Self { state, config, weights, tensors: tensors.into_iter().collect() })
    }

    /// Itself; without its best model where that is gone or damaged, so that a later one takes its place.
    fn with_whole_best(mut self, run_dir: &Path) -> Self {
        let Some(best) = &self.state.best else { return self };
        let dir = best_folder(run_dir, best.step);
        let problem = match (dir.is_dir(), check_sums(&dir)) {
            (true, Ok(_)) => return self,
            (false, _) => "it is not there".to_owned(),
            (true, Err(error)) => chain(&error),
        };
        tracing::warn!(
            "the best model so far, `{}`, cannot be used ({problem}): the best of what follows takes its place, or the last model",
            dir.display()
        );
        self.state.best = None;
        self
    }

    /// Refuses what would make another run of it.
    fn check(&self, model: &Model, now: &TrainState) -> Result<()> {
        let then = &self.state;
        let shown = |value: Option<&Value>| value.map_or("not set".into(), Value::to_string);
        let changed = |field: &str, before: String, now: String| {
            Err(Error::Changed { field: field.to_owned(), before, now })
        };
        if then.objective != now.objective {
            return changed("objective", then.objective.clone(), now.objective.clone());
        }
        let (old, new) = (to_map(&then.config), to_map(&now.config));
        for key in union(&old, &new).filter(|key| !FREE_SETTINGS.contains(&key.as_str())) {
            if old.get(key) != new.get(key) {
                return changed(key, shown(old.get(key)), shown(new.get(key)));
            }
        }
        let (old, new) = (&self.config, &model.config().to_json(model.kind()));
        for key in union(old, new) {
            if old.get(key) != new.get(key) {
                let field = format!("config.json: {key}");
                return changed(&field, shown(old.get(key)), shown(new.get(key)));
            }
        }
        let (old, new) = (to_map(&then.adapters), to_map(&now.adapters));
        for key in union(&old, &new) {
            if old.get(key) != new.get(key) {
                let field =
                    if key == "base" { "base model".into() } else { format!("adapters: {key}") };
                return changed(&field, shown(old.get(key)), shown(new.get(key)));
            }
        }
        if then.data != now.data {
            return changed("training data", then.data.clone(), now.data.clone());
        }
        if then.total_steps != now.total_steps {
            let [old, new] = [then, now].map(|state| state.total_steps.to_string());
            return changed("number of steps", old, new);
        }
        Ok(())
    }

    /// Finds tensors that do not fit, though the settings do: the checkpoint was damaged.
    fn check_tensors(&self, model: &Model, optimizer: &Optimizer) -> Result<(), String> {
        for (name, tensor) in kept_parameters(model) {
            match self.weights.shape(&name) {
                Some(shape) if shape == tensor.size() => {}
                Some(shape) => {
                    let expected = tensor.size();
                    return Err(format!("`{name}` is of size {shape:?}, expected {expected:?}"));
                }
                None => return Err(format!("`{name}` is missing")),
            }
        }
        optimizer.check_tensors(&self.tensors)
    }

    fn load(&self, model: &mut Model, optimizer: &mut Optimizer) -> Result<()> {
        load_weights(&self.weights, model)?;
        optimizer.load_tensors(&self.tensors)?;
        let take = |name: &str| Some(self.tensors.get(name)?.shallow_clone());
        match RngState::from_tensors(model.device(), take) {
            Some(rng) => rng.restore()?,
            None => tracing::warn!(
                "the checkpoint holds no random state of this device: dropout will not be that of an unbroken run"
            ),
        }
        Ok(())
    }
}

/// An error and its causes, in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(|cause| cause.to_string().replace('\n', "; ")).collect::<Vec<_>>().join(": ")
}

fn open_weights(dir: &Path) -> Result<Checkpoint, attn_core::checkpoint::Error> {
    let trained = dir.join(TRAINED_FILE);
    if trained.exists() { Checkpoint::open_file(&trained) } else { Checkpoint::open(dir) }
}

fn load_weights(weights: &Checkpoint, model: &Model) -> Result<()> {
    for (name, mut parameter) in kept_parameters(model) {
        copy(&mut parameter, &weights.tensor(&name, None, Device::Cpu)?)?;
    }
    Ok(())
}

/// Removes checkpoints before the last `keep_last`, and best models that none of those refers to.
fn remove_old(run_dir: &Path, state: &TrainState) {
    let folder = run_dir.join(FOLDER);
    let (Ok(steps), Ok(bests)) = (numbered(&folder, STEP), numbered(&folder, BEST)) else { return };
    // One with a higher step is torn, or this run would not have begun before it; it will be overwritten.
    let done = steps.into_iter().filter(|(step, _)| *step <= state.step);
    let (kept, old): (Vec<_>, Vec<_>) =
        done.enumerate().partition(|(rank, _)| *rank < state.config.keep_last);
    let wanted: BTreeSet<u64> = kept
        .iter()
        .filter_map(|(_, (_, dir))| from_file::<TrainState>(dir, STATE_FILE).ok()?.best)
        .map(|best| best.step)
        .collect();
    let unwanted = bests.into_iter().filter(|(step, _)| !wanted.contains(step));
    for (_, dir) in old.into_iter().map(|(_, entry)| entry).chain(unwanted) {
        if let Err(error) = remove(&dir) {
            tracing::warn!("cannot remove the old checkpoint `{}`: {error}", dir.display());
        }
    }
}

/// Removes the checkpoints of a run that has finished, and what a kill left of an earlier removal.
pub fn remove_all(run_dir: &Path) {
    let folder = run_dir.join(FOLDER);
    if let Err(error) = remove(&folder) {
        tracing::warn!("cannot remove `{}`: {error}", folder.display());
    }
}

/// Removes a folder, if it is there, under another name: a kill leaves no part of it under its own.
fn remove(folder: &Path) -> io::Result<()> {
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    let hidden = folder.with_file_name(format!(".{name}.attn-tmp-removed"));
    let gone = |result: io::Result<()>| match result {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    };
    gone(fs::remove_dir_all(&hidden))?;
    gone(fs::rename(folder, &hidden))?;
    gone(fs::remove_dir_all(&hidden))
}

/// The folders `<prefix><number>` in `dir`, highest number first.
fn numbered(dir: &Path, prefix: &str) -> Result<Vec<(u64, PathBuf)>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(Error::io("read", dir))?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(Error::io("read", dir))?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if let Some(Ok(number)) = name.strip_prefix(prefix).map(str::parse) {
            found.push((number, path));
        }
    }
    found.sort_unstable_by(|a, b| b.cmp(a));
    Ok(found)
}

fn from_file<T: DeserializeOwned>(dir: &Path, file: &str) -> Result<T, String> {
    let path = dir.join(file);
    let text = fs::read(&path).map_err(|error| format!("cannot read `{file}`: {error}"))?;
    serde_json::from_slice(&text).map_err(|error| format!("`{file}`: {error}"))
}

fn to_map<T: Serialize>(value: &T) -> Map<String, Value> {
    match serde_json::to_value(value).expect("names and numbers are JSON") {
        Value::Null => Map::new(),
        Value::Object(map) => map,
        other => unreachable!("a struct is an object, not {other}"),
    }
}

fn union<'a>(
    a: &'a Map<String, Value>,
    b: &'a Map<String, Value>,
) -> impl Iterator<Item = &'a String> {
    a.keys().chain(b.keys().filter(|key| !a.contains_key(*key)))
}
