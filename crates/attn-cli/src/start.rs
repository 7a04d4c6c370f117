//! What finetune and pretrain have in common: from arguments to a run that can begin or go on.

use std::{
    fs,
    num::NonZeroU16,
    path::{Path, PathBuf},
    sync::{Arc, atomic::AtomicBool},
};

use anyhow::{Context, Result, anyhow, bail};
use attn_core::{Model, Variant, checkpoint::WriteOptions};
use attn_data::{
    hub::{Hub, progress_bar},
    tokenizer::TextTokenizer,
};
use attn_train::{Precision, TrainConfig};
use serde::{Serialize, de::DeserializeOwned};
use tch::Device;
use toml::{Table, Value};

use crate::{
    Outcome,
    args::RunArgs,
    config::{self, Written},
    doctor, monitor,
    run_dir::{self, CONFIG_FILE, RunDir},
    settings::{Distill, Finetune, Pretrain},
    surgery::run_name,
};

/// The config of a command that makes runs.
pub(crate) trait RunConfig: Serialize + DeserializeOwned + PartialEq {
    /// The command.
    const COMMAND: &'static str;
    /// The config of a run that names none, below `configs/`.
    const BUNDLED: Option<&'static str>;

    /// As the type's own `complete`.
    fn complete(self, name: &str) -> Result<Self>;

    /// Finds the paths in it.
    fn find_paths(&mut self, root: Option<&Path>);

    fn name(&self) -> &str;

    /// What the attention is changed to.
    fn attention(&self) -> Option<&Variant>;

    /// Processor threads of one operation.
    fn threads(&self) -> Option<NonZeroU16>;

    /// The stages of training.
    fn training(&self) -> Vec<&TrainConfig>;

    /// The setting that `--seed` is short for.
    const SEED: &'static str = "train.seed";
}

impl RunConfig for Finetune {
    const COMMAND: &'static str = "finetune";
    const BUNDLED: Option<&'static str> = Some("configs/finetune/default.toml");

    fn complete(self, name: &str) -> Result<Self> {
        self.complete(name)
    }

    fn find_paths(&mut self, root: Option<&Path>) {
        self.model = config::find_path(&self.model, root);
        self.data.source = config::find_path(&self.data.source, root);
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn attention(&self) -> Option<&Variant> {
        self.attention.as_ref()
    }

    fn threads(&self) -> Option<NonZeroU16> {
        self.threads
    }

    fn training(&self) -> Vec<&TrainConfig> {
        vec![&self.train]
    }
}

impl RunConfig for Distill {
    const COMMAND: &'static str = "distill";
    const BUNDLED: Option<&'static str> = None;
    const SEED: &'static str = "seed";

    fn complete(self, name: &str) -> Result<Self> {
        self.complete(name)
    }

    fn find_paths(&mut self, root: Option<&Path>) {
        self.model = config::find_path(&self.model, root);
        self.teacher = self.teacher.take().map(|teacher| config::find_path(&teacher, root));
        self.data.source = config::find_path(&self.data.source, root);
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn attention(&self) -> Option<&Variant> {
        self.attention.as_ref()
    }

    fn threads(&self) -> Option<NonZeroU16> {
        self.threads
    }

    fn training(&self) -> Vec<&TrainConfig> {
        self.stages().map(|(_, stage)| &stage.train).collect()
    }
}

impl RunConfig for Pretrain {
    const COMMAND: &'static str = "pretrain";
    const BUNDLED: Option<&'static str> = None;

    fn complete(self, name: &str) -> Result<Self> {
        self.complete(name)
    }

    fn find_paths(&mut self, root: Option<&Path>) {
        self.data.source = config::find_path(&self.data.source, root);
        if let Some(from) = &mut self.tokenizer.from {
            *from = config::find_path(from, root);
        }
        if let Some(model) = &mut self.model {
            *model = config::find_path(model, root);
        }
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn attention(&self) -> Option<&Variant> {
        self.attention.as_ref()
    }

    fn threads(&self) -> Option<NonZeroU16> {
        self.threads
    }

    fn training(&self) -> Vec<&TrainConfig> {
        vec![&self.train]
    }
}

/// A run that can begin.
pub(crate) struct Start<C> {
    pub(crate) config: C,
    pub(crate) dir: RunDir,
    pub(crate) device: Device,
    pub(crate) hub: Hub,
    /// Set by Ctrl-C, once [`Self::listen`] was called.
    pub(crate) stop: Arc<AtomicBool>,
    /// Whether the folder holds a run that was begun.
    pub(crate) resume: bool,
}

impl<C: RunConfig> Start<C> {
    /// Reads and checks the config, chooses the device, and makes the run's folder or opens that of the run to go on
    /// with.
    pub(crate) fn new(args: &RunArgs) -> Result<Self> {
        if let Some(parent) = args.parent {
            monitor::end_with(parent)?;
        }
        let (config, dir) = if args.resume {
            resumed(args)?
        } else {
            let config = read::<C>(args)?;
            let name = match is_named(args, config.name()) {
                true => config.name().to_owned(),
                false => run_name(config.name(), config.attention()),
            };
            let dir = RunDir::create(args.out.as_deref(), &name)?;
            (config, dir)
        };
        if let Some(threads) = config.threads() {
            tch::set_num_threads(threads.get().into());
        }
        let device = attn_torch::device(&args.device)?;
        let bf16 = config.training().iter().any(|train| train.precision == Precision::Bf16);
        if bf16 && device == Device::Cpu && !doctor::has_bf16_units() {
            tracing::warn!(
                "`train.precision` is `bf16`, and this processor has no units for it (amx_bf16): expect a tenth of the \
                 speed of f32"
            );
        }
        let hub = Hub::from_env().with_progress(progress_bar());
        Ok(Self { config, dir, device, hub, stop: Arc::default(), resume: args.resume })
    }

    /// Writes where a run that begins takes place, and then its complete config: a folder with a config holds all that a run is gone on
    /// with by.
    pub(crate) fn record(&self, model: &Model) -> Result<()> {
        if self.resume {
            return Ok(());
        }
        self.dir.write_environment(model)?;
        self.write_config()
    }

    fn write_config(&self) -> Result<()> {
        let path = self.dir.file(CONFIG_FILE);
        let text = toml::to_string(&self.config).context("cannot write the config as TOML")?;
        let header = format!(
            "# The complete config of a run, defaults filled in. This repeats it:\n#   {}\n\n",
            invocation(&format!("{} {}", C::COMMAND, path.display()))
        );
        run_dir::write(&path, (header + &text).as_bytes())
    }
}

/// Whether the user chose the run's name. A run's own config names it too, and is no choice.
fn is_named(args: &RunArgs, name: &str) -> bool {
    let is_set = |pair: &String| pair.split_once('=').is_some_and(|(key, _)| key.trim() == "name");
    let by_file = |path: &PathBuf| !path.ends_with(CONFIG_FILE) && name_of(path) != name;
    args.set.iter().any(is_set) || args.config.as_ref().is_some_and(by_file)
}

/// The config that `args` name, complete.
pub(crate) fn read<C: RunConfig>(args: &RunArgs) -> Result<C> {
    let path = match (&args.config, C::BUNDLED) {
        (Some(path), _) => path.clone(),
        (None, Some(bundled)) => config::bundled(bundled)?,
        (None, None) => bail!(
            "`{}` needs a config\nhint: the ones in `configs/{}` show how",
            C::COMMAND,
            C::COMMAND
        ),
    };
    let mut overrides = args.set.clone();
    overrides.extend(args.seed.map(|seed| format!("{}={seed}", C::SEED)));
    let written = Written::read(&path, &overrides)?;
    let root = config::root_of(&path);
    complete(&written, &path, &name_of(&path), root.as_deref())
}

fn complete<C: RunConfig>(
    written: &Written,
    path: &Path,
    name: &str,
    root: Option<&Path>,
) -> Result<C> {
    // Each command has its own tables; the error would name the first one that the other lacks.
    let names = |keys: &[&str]| keys.iter().any(|key| written.base().contains_key(*key));
    let others = [
        (Pretrain::COMMAND, names(&["init", "objective"])),
        (Distill::COMMAND, names(&["transfer", "tune"])),
        // A distillation names its stages, which may come by `--set`.
        (Finetune::COMMAND, names(&["model"]) && (C::COMMAND != "distill" || names(&["train"]))),
    ];
    let is_of = others.into_iter().find_map(|(command, is_of)| is_of.then_some(command));
    if let Some(other) = is_of.filter(|&other| other != C::COMMAND) {
        let hint = match C::COMMAND {
            "pretrain" => {
                "\nhint: one that goes on from a model says what it predicts: objective = \"causal\""
            }
            _ => "",
        };
        let problem = anyhow!("this is a config for `{other}`, not for `{}`{hint}", C::COMMAND);
        return Err(problem.context(format!("cannot use `{}`", path.display())));
    }
    let mut config = written.complete(|config: C| config.complete(name))?;
    config.find_paths(root);
    Ok(config)
}

/// The run in `--out`, whose settings must be those given, if any are.
fn resumed<C: RunConfig>(args: &RunArgs) -> Result<(C, RunDir)> {
    let Some(out) = &args.out else {
        bail!(
            "`--resume` does not say which run\nhint: name its folder: --out runs/<date>-<name> --resume"
        );
    };
    let dir = RunDir::reopen(out)?;
    let path = dir.file(CONFIG_FILE);
    let stored: C = stored(out)?;
    if args.config.is_some() || !args.set.is_empty() || args.seed.is_some() {
        let given: C = match &args.config {
            Some(_) => read(args)?,
            None => read(&RunArgs { config: Some(path.clone()), ..args.clone() })?,
        };
        if given != stored {
            bail!(
                "cannot go on: {} by `{}`\nhint: leave CONFIG, --set and --seed away to go on as the run began, or \
                 begin a new one",
                first_difference(&stored, &given)?,
                path.display()
            );
        }
    }
    Ok((stored, dir))
}

/// The config of the run in the folder `out`.
pub(crate) fn stored<C: RunConfig>(out: &Path) -> Result<C> {
    let path = out.join(CONFIG_FILE);
    complete(&Written::read(&path, &[])?, &path, "resumed", None)
}

/// How the settings of a run that was begun differ from those `given` now.
pub(crate) fn first_difference<C: RunConfig>(stored: &C, given: &C) -> Result<String> {
    let [stored, given] = [Table::try_from(stored)?, Table::try_from(given)?];
    Ok(difference("", &stored, &given).unwrap_or_else(|| "the settings differ".into()))
}

/// The first setting that differs.
fn difference(prefix: &str, stored: &Table, given: &Table) -> Option<String> {
    let keys = stored.keys().chain(given.keys().filter(|key| !stored.contains_key(*key)));
    keys.filter(|key| stored.get(*key) != given.get(*key)).find_map(|key| {
        let name = format!("{prefix}{key}");
        match (stored.get(key), given.get(key)) {
            (Some(Value::Table(stored)), Some(Value::Table(given))) => {
                difference(&format!("{name}."), stored, given)
            }
            (stored, given) => {
                let shown =
                    |value: Option<&Value>| value.map_or("not set".into(), Value::to_string);
                Some(format!("`{name}` is {} now and {}", shown(given), shown(stored)))
            }
        }
    })
}

/// A run's name by its config: `sst2` of `configs/finetune/sst2.toml`, and the run's own of `runs/x/config.toml`.
pub(crate) fn name_of(path: &Path) -> String {
    let text =
        |name: Option<&std::ffi::OsStr>| name.map(|name| name.to_string_lossy().into_owned());
    let stem = text(path.file_stem()).unwrap_or_default();
    let plain = |c: char| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '-' };
    stem.trim_start_matches('.').chars().map(plain).collect()
}

/// How the user starts this program: as cargo does, where it was started by cargo.
pub(crate) fn invocation(arguments: &str) -> String {
    let by_cargo =
        std::env::var_os("CARGO").is_some() && std::env::var_os("CARGO_PKG_NAME").is_some();
    let program = if by_cargo { "cargo run -p attn-cli --" } else { "attn" };
    format!("{program} {arguments}")
}

/// The files of a tokenizer, for folders that are written in one step.
pub(crate) fn tokenizer_files(tokenizer: &TextTokenizer) -> Result<Vec<(String, Vec<u8>)>> {
    let dir = tempfile::tempdir().context("cannot create a temporary folder")?;
    tokenizer.save(dir.path())?;
    let mut files = Vec::new();
    for entry in fs::read_dir(dir.path()).context("cannot read a temporary folder")? {
        let path: PathBuf = entry.context("cannot read a temporary folder")?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        files.push((name, fs::read(&path).context("cannot read a temporary file")?));
    }
    files.sort();
    Ok(files)
}

impl<C: RunConfig> Start<C> {
    /// From here on Ctrl-C stops the run in an orderly way. Before, there is nothing to save, and it ends the process.
    pub(crate) fn listen(&self) -> Result<()> {
        monitor::stop_on_signals(&self.stop)
    }

    /// Whether there is a checkpoint to go on from. A run that was stopped before its first one begins anew.
    pub(crate) fn has_checkpoint(&self) -> Result<bool> {
        let found = self.resume && !attn_train::checkpoint::list(self.dir.path())?.is_empty();
        if self.resume && !found {
            tracing::info!("there is no checkpoint yet: training begins at the first step");
        }
        Ok(found)
    }

    /// Says that the user stopped the run after `step` steps, and how it goes on.
    pub(crate) fn interrupted(&self, step: u64) -> Outcome {
        self.dir.begin();
        let dir = self.dir.path().display();
        tracing::warn!(
            "stopped after {step} steps; to go on:\n  {}",
            invocation(&format!("{} --out {dir} --resume", C::COMMAND))
        );
        Outcome::Interrupted
    }

    /// Writes the trained model with its tokenizer.
    pub(crate) fn save(&self, model: &Model, tokenizer: &TextTokenizer) -> Result<()> {
        // Through a folder of another name, so that a kill leaves none without a tokenizer.
        let (draft, folder) = (self.dir.file(".model"), self.dir.file("model"));
        let save = || -> Result<()> {
            model.save(&draft, &WriteOptions::default())?;
            tokenizer.save(&draft)?;
            if folder.exists() {
                fs::remove_dir_all(&folder)?; // Of a run that was killed before its summary.
            }
            Ok(fs::rename(&draft, &folder)?)
        };
        save().context("cannot save the model")
    }
}

/// `text` as one word of a shell.
pub(crate) fn quoted(text: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@".contains(c);
    match !text.is_empty() && text.chars().all(is_plain) {
        true => text.to_owned(),
        false => format!("'{}'", text.replace('\'', r"'\''")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_reads_a_quoted_word_as_it_is() {
        assert_eq!(quoted("data.label=stars"), "data.label=stars");
        assert_eq!(quoted("a b"), "'a b'");
        assert_eq!(quoted("it's"), r"'it'\''s'");
        assert_eq!(quoted(r#"data.classes=["a"]"#), r#"'data.classes=["a"]'"#);
    }
}
