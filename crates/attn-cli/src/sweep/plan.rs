//! Which runs a sweep is made of, and how far they are.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use attn_data::hub::{Hub, progress_bar};
use attn_eval::Accuracy;
use serde::Deserialize;
use toml::{Table, Value};

use crate::{
    args::{RunArgs, SweepArgs},
    config::Written,
    distill,
    run_dir::{self, CONFIG_FILE, SUMMARY_FILE, read_json},
    settings::{Distill, Finetune},
    start::{self, RunConfig},
};

/// Settings beyond which a sweep is a mistake: nobody waits for so many runs.
const MOST_SETTINGS: usize = 10_000;

/// The file of a sweep.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct SweepFile {
    /// The config that all runs build on, beside this file.
    base: String,
    #[serde(default)]
    seeds: Option<Vec<u64>>,
    /// Lists of values where a config has one.
    #[serde(default)]
    grid: Table,
    /// Settings with a name each, under all of which the grid is run.
    #[serde(default)]
    run: Vec<Table>,
}

/// What a sweep is made of.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) settings: Vec<Setting>,
    pub(super) seeds: Vec<u64>,
    /// Each setting under each seed, setting by setting.
    pub(super) runs: Vec<Planned>,
    /// The rows reported on: data and split.
    pub(super) rows: String,
    /// Whether the runs are distillations.
    pub(super) distills: bool,
}

/// A place in the grid, or a `[[run]]`.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Setting {
    pub(super) name: String,
    /// The `[[run]]` that it is a place of the grid under; empty where there are none.
    pub(super) run: String,
    /// What it sets, by key.
    pub(super) values: Vec<(String, Value)>,
    /// How many of them, the first ones, are the run's.
    n_of_run: usize,
}

/// A setting under a seed.
#[derive(Debug)]
pub(super) struct Planned {
    /// Its place in [`Plan::settings`].
    pub(super) setting: usize,
    pub(super) seed: u64,
    /// Its folder in that of the sweep.
    pub(super) folder: String,
    config: Config,
}

/// The complete settings of a run.
#[derive(Debug, Clone, PartialEq)]
enum Config {
    Finetune(Box<Finetune>),
    Distill(Box<Distill>),
}

impl Config {
    fn read(args: &RunArgs, distills: bool) -> Result<Self> {
        Ok(match distills {
            true => Self::Distill(Box::new(start::read(args)?)),
            false => Self::Finetune(Box::new(start::read(args)?)),
        })
    }

    fn seed(&self) -> u64 {
        match self {
            Self::Finetune(config) => config.train.seed,
            Self::Distill(config) => config.seed,
        }
    }

    /// The rows reported on: data and split.
    fn rows(&self) -> String {
        let (data, examples) = match self {
            Self::Finetune(config) => (&config.data, &config.examples),
            Self::Distill(config) => (&config.data, &config.examples),
        };
        match examples.report_hold_out {
            Some(_) => format!("{}, held out", data.source),
            None => format!("{}, {}", data.source, data.validation_split),
        }
    }
}

/// How far a run is.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Status {
    New,
    /// Steps of the last checkpoint, 0 without one.
    Begun {
        step: u64,
    },
    Finished {
        elapsed_s: f64,
    },
}

impl Status {
    pub(super) fn is_finished(&self) -> bool {
        matches!(self, Self::Finished { .. })
    }
}

/// What a finished run came to, as far as a sweep tells.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Finished {
    pub(super) before: Accuracy,
    pub(super) after: Accuracy,
    pub(super) majority_accuracy: f64,
    pub(super) selected_step: u64,
    pub(super) total_steps: u64,
    pub(super) elapsed_s: f64,
}

impl Finished {
    /// Of the run in `dir`; `None` where it has not finished.
    pub(super) fn read(dir: &Path) -> Result<Option<Self>> {
        read_json(&dir.join(SUMMARY_FILE))
    }
}

/// Tells the settings of the sweep `path`; its runs are not completed. Gives the config that they build on.
pub(crate) fn understand(path: &Path) -> Result<PathBuf> {
    let file: SweepFile = Written::read(path, &[])?.parse()?;
    settings(&file, &[])?;
    Ok(path.with_file_name(&file.base))
}

impl Plan {
    /// Refuses distillations whose model cannot have the attention: not an hour later, when its turn comes.
    pub(super) fn check_models(&self) -> Result<()> {
        let hub = Hub::from_env().with_progress(progress_bar());
        let (mut opened, mut checked) = (distill::Opened::new(), None);
        for run in &self.runs {
            // Seeds of a setting follow each other, and change nothing here.
            if checked.replace(run.setting) == Some(run.setting) {
                continue;
            }
            if let Config::Distill(config) = &run.config {
                distill::check_models(config, &mut opened, &hub)
                    .with_context(|| format!("cannot run `{}`", run.folder))?;
            }
        }
        Ok(())
    }

    /// Reads FILE and checks every run's settings.
    pub(super) fn read(args: &SweepArgs) -> Result<Self> {
        let shown = args.file.display();
        let written = Written::read(&args.file, &[])?;
        let (file, settings) = written.complete(|file: SweepFile| {
            let settings = settings(&file, &args.set)?;
            Ok((file, settings))
        })?;
        let base = args.file.parent().unwrap_or(Path::new("")).join(&file.base);
        // A distillation names its stages.
        let of_base = Written::read(&base, &[]);
        let distills = of_base.is_ok_and(|base| {
            ["transfer", "tune"].iter().any(|key| base.base().contains_key(*key))
        });
        let seeds: Vec<Option<u64>> = match &file.seeds {
            Some(seeds) => seeds.iter().copied().map(Some).collect(),
            None => vec![None],
        };
        let mut runs: Vec<Planned> = Vec::new();
        for (place, setting) in settings.iter().enumerate() {
            for &seed in &seeds {
                let mut set = args.set.clone();
                set.extend(setting.values.iter().map(|(key, value)| format!("{key}={value}")));
                let run_args = RunArgs {
                    config: Some(base.clone()),
                    set,
                    out: None,
                    device: args.device.clone(),
                    seed,
                    resume: false,
                    parent: None,
                };
                let config = Config::read(&run_args, distills).with_context(|| {
                    format!("`{shown}`: cannot make the runs of `{}`", setting.name)
                })?;
                let seed = config.seed();
                let folder = format!("{},seed={seed}", plain(&setting.name));
                let folder = unused(folder, &runs);
                runs.push(Planned { setting: place, seed, folder, config });
            }
        }
        let first = runs.first().context("a sweep has a run")?;
        let rows = first.config.rows();
        let seeds = runs.iter().take(seeds.len()).map(|run| run.seed).collect();
        Ok(Self { settings, seeds, rows, distills, runs })
    }

    /// How far each run in the sweep's folder is.
    pub(super) fn statuses(&self, dir: &Path) -> Result<Vec<Status>> {
        self.runs.iter().map(|run| run.status(&dir.join(&run.folder))).collect()
    }
}

impl Planned {
    /// Its complete config.
    pub(super) fn toml(&self) -> Result<String> {
        let text = match &self.config {
            Config::Finetune(config) => toml::to_string(config),
            Config::Distill(config) => toml::to_string(config),
        };
        text.context("cannot write the config as TOML")
    }

    /// The command that runs it.
    pub(super) fn command(&self) -> &'static str {
        match self.config {
            Config::Finetune(_) => Finetune::COMMAND,
            Config::Distill(_) => Distill::COMMAND,
        }
    }

    fn status(&self, dir: &Path) -> Result<Status> {
        let shown = dir.display();
        if !dir.join(CONFIG_FILE).is_file() {
            let mut left = fs::read_dir(dir).into_iter().flatten().flatten();
            ensure!(
                left.all(|entry| run_dir::is_of_a_start(&entry.path())),
                "`{shown}` holds something that is no run: there is no `{CONFIG_FILE}`\nhint: move it away, or name \
                 another folder: --out DIR"
            );
            return Ok(Status::New);
        }
        let difference = match &self.config {
            Config::Finetune(config) => difference::<Finetune>(dir, config)?,
            Config::Distill(config) => difference::<Distill>(dir, config)?,
        };
        if let Some(difference) = difference {
            bail!(
                "`{shown}` holds a run with other settings: {difference} there\nhint: name another folder: --out DIR, or \
                 remove that run"
            );
        }
        let (elapsed_s, stages) = match self.config {
            Config::Finetune(_) => {
                (Finished::read(dir)?.map(|run| run.elapsed_s), vec![dir.to_owned()])
            }
            Config::Distill(_) => {
                let stages = ["tune", "transfer"].map(|stage| dir.join(stage)).to_vec();
                (distill::Summary::read(dir)?.map(|run| run.elapsed_s), stages)
            }
        };
        if let Some(elapsed_s) = elapsed_s {
            return Ok(Status::Finished { elapsed_s });
        }
        for stage in stages.iter().filter(|stage| stage.is_dir()) {
            if let Some((step, _)) = attn_train::checkpoint::list(stage)?.first() {
                return Ok(Status::Begun { step: *step });
            }
        }
        Ok(Status::Begun { step: 0 })
    }
}

/// How the settings of the run in `dir` differ from `config`, where they do.
fn difference<C: RunConfig>(dir: &Path, config: &C) -> Result<Option<String>> {
    let stored: C = start::stored(dir)?;
    (stored != *config).then(|| start::first_difference(&stored, config)).transpose()
}

/// The seconds that the runs left may take, by those that have finished: of the same setting where there are any.
/// `None` where nothing has.
pub(super) fn seconds_left(plan: &Plan, statuses: &[Status]) -> Option<f64> {
    let mean = |setting: Option<usize>| {
        let of_setting = plan.runs.iter().zip(statuses).filter_map(|(run, status)| match status {
            Status::Finished { elapsed_s } if setting.is_none_or(|place| run.setting == place) => {
                Some(*elapsed_s)
            }
            _ => None,
        });
        let seconds: Vec<f64> = of_setting.collect();
        (!seconds.is_empty()).then(|| seconds.iter().sum::<f64>() / seconds.len() as f64)
    };
    let left = plan.runs.iter().zip(statuses).filter(|(_, status)| !status.is_finished());
    left.map(|(run, _)| mean(Some(run.setting)).or_else(|| mean(None))).sum()
}

/// Every combination of the grid, under each of the runs that have names where there are any. `sets` go to every run.
fn settings(file: &SweepFile, sets: &[String]) -> Result<Vec<Setting>> {
    if let Some(seeds) = &file.seeds {
        ensure!(
            !seeds.is_empty(),
            "`seeds` names no seed\nhint: leave it away for that of the base"
        );
        check_twice("seeds", seeds)?;
    }
    let mut grid = Vec::new();
    flatten_grid("", &file.grid, &mut grid)?;
    let set_keys: Vec<&str> =
        sets.iter().filter_map(|pair| Some(pair.split_once('=')?.0.trim())).collect();
    // What does not vary, `--set` may change as it may any config.
    grid.retain(|(key, values)| values.len() > 1 || !set_keys.contains(&key.as_str()));
    let counts = grid.iter().map(|(_, values)| values.len());
    let places = counts.chain([file.run.len().max(1)]).try_fold(1, usize::checked_mul);
    ensure!(
        places.is_some_and(|places| places <= MOST_SETTINGS),
        "the grid has more than {MOST_SETTINGS} places\nhint: name those that are wanted: a [[run]] each"
    );
    let all = match &file.run[..] {
        [] => product(&grid),
        runs => {
            let named: Vec<Setting> = runs.iter().map(named).collect::<Result<_>>()?;
            named
                .iter()
                .flat_map(|run| product(&grid).into_iter().map(|of| of.under(run)))
                .collect()
        }
    };
    for setting in &all {
        for (key, _) in &setting.values {
            ensure!(
                key != "train.seed" && key != "seed",
                "`{key}` is among the settings\nhint: name the seeds by themselves: seeds = [0, 1, 2]"
            );
            ensure!(
                key != "name",
                "`name` is among the settings, and runs are named by what varies"
            );
            let is_same = |(other, _): &&(String, Value)| other == key;
            ensure!(
                setting.values.iter().filter(is_same).count() == 1,
                "`{key}` is set by the grid and by the `[[run]]` behind `{}`",
                setting.name
            );
            ensure!(
                !set_keys.contains(&key.as_str()),
                "`{key}` is set by the sweep and by `--set`\nhint: leave one away"
            );
        }
    }
    ensure!(
        !set_keys.contains(&"train.seed") && !set_keys.contains(&"seed"),
        "the seed is set for all runs\nhint: name the seeds by themselves: seeds = [0, 1, 2]"
    );
    let names: Vec<&str> = all.iter().map(|setting| &setting.name[..]).collect();
    check_twice("the settings' names", &names)?;
    Ok(all)
}

fn check_twice<T: PartialEq + std::fmt::Display>(what: &str, values: &[T]) -> Result<()> {
    let twice = values.iter().enumerate().find(|(at, value)| values[..*at].contains(value));
    match twice {
        Some((_, value)) => bail!("`{value}` stands twice in `{what}`"),
        None => Ok(()),
    }
}

/// The lists of the grid with their keys.
fn flatten_grid(prefix: &str, table: &Table, into: &mut Vec<(String, Vec<Value>)>) -> Result<()> {
    for (key, value) in table {
        let key = format!("{prefix}{key}");
        match value {
            Value::Table(inner) => flatten_grid(&format!("{key}."), inner, into)?,
            Value::Array(values) => {
                ensure!(!values.is_empty(), "`grid.{key}` lists no value");
                check_twice(&format!("grid.{key}"), values)?;
                into.push((key, values.clone()));
            }
            other => bail!(
                "`grid.{key}` is {other}, expected a list of values\nhint: a list of one sets it for all runs: \
                 {key} = [{other}]"
            ),
        }
    }
    Ok(())
}

/// The name of a setting that changes nothing.
const BASE: &str = "base";

/// Every combination, the first key varying slowest.
fn product(grid: &[(String, Vec<Value>)]) -> Vec<Setting> {
    let mut combinations: Vec<Vec<(String, Value)>> = vec![Vec::new()];
    for (key, values) in grid {
        let with = |before: &Vec<(String, Value)>, value: &Value| {
            let mut values = before.clone();
            values.push((key.clone(), value.clone()));
            values
        };
        combinations = combinations
            .iter()
            .flat_map(|before| values.iter().map(|value| with(before, value)).collect::<Vec<_>>())
            .collect();
    }
    let varying: Vec<&str> =
        grid.iter().filter(|(_, values)| values.len() > 1).map(|(key, _)| &key[..]).collect();
    let last = |key: &str| key.rsplit('.').next().unwrap_or_default().to_owned();
    let label = |key: &str| {
        let is_alone = varying.iter().filter(|other| last(other) == last(key)).count() == 1;
        if is_alone { last(key) } else { key.to_owned() }
    };
    let name = |values: &[(String, Value)]| {
        let parts: Vec<String> = values
            .iter()
            .filter(|(key, _)| varying.contains(&&key[..]))
            .map(|(key, value)| {
                let others = grid.iter().find(|(other, _)| other == key).map(|(_, values)| values);
                let value = match label(key).as_str() {
                    MODEL => end_of(value, others.map_or(&[], |values| &values[..])),
                    _ => in_words(value),
                };
                format!("{}={value}", label(key))
            })
            .collect();
        if parts.is_empty() { BASE.to_owned() } else { parts.join(",") }
    };
    let setting =
        |values: Vec<_>| Setting { name: name(&values), run: String::new(), values, n_of_run: 0 };
    combinations.into_iter().map(setting).collect()
}

/// The key whose values are folders or Hub ids.
const MODEL: &str = "model";

fn in_words(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), ToOwned::to_owned)
}

/// The end of a path, where that tells it from the other `values`.
fn end_of(value: &Value, values: &[Value]) -> String {
    let Some(text) = value.as_str() else { return value.to_string() };
    let end = |text: &str| text.trim_end_matches('/').rsplit('/').next().map(ToOwned::to_owned);
    let ends: BTreeSet<_> = values.iter().map(|value| value.as_str().and_then(end)).collect();
    match end(text) {
        Some(end) if !end.is_empty() && ends.len() == values.len() => end,
        _ => text.to_owned(),
    }
}

impl Setting {
    /// Whether the grid sets `key`, and not the run.
    pub(super) fn is_of_grid(&self, key: &str) -> bool {
        self.values[self.n_of_run..].iter().any(|(other, _)| other == key)
    }

    /// This one of the grid with what `run` sets.
    fn under(mut self, run: &Self) -> Self {
        let name = if self.name == BASE {
            run.name.clone()
        } else {
            format!("{},{}", run.name, self.name)
        };
        self.values.splice(0..0, run.values.iter().cloned());
        Self { name, run: run.name.clone(), n_of_run: run.values.len(), ..self }
    }
}

/// A `[[run]]`.
fn named(table: &Table) -> Result<Setting> {
    let mut table = table.clone();
    let name = match table.remove("name") {
        Some(Value::String(name)) if !name.is_empty() => name,
        Some(other) => bail!("the `name` of a `[[run]]` is {other}, expected a text in quotes"),
        None => {
            return Err(anyhow!(
                "a `[[run]]` has no `name`\nhint: name it by what it tries: name = \"window\""
            ));
        }
    };
    let mut values = Vec::new();
    flatten("", &table, &mut values);
    Ok(Setting { run: name.clone(), name, n_of_run: values.len(), values })
}

fn flatten(prefix: &str, table: &Table, into: &mut Vec<(String, Value)>) {
    for (key, value) in table {
        let key = format!("{prefix}{key}");
        match value {
            Value::Table(inner) => flatten(&format!("{key}."), inner, into),
            other => into.push((key, other.clone())),
        }
    }
}

/// A name as part of a folder's: what a shell or another system may not like becomes `-`.
fn plain(name: &str) -> String {
    let mut text = String::new();
    for c in name.chars() {
        let is_plain = c.is_ascii_alphanumeric() || "-_.=,+".contains(c);
        match is_plain {
            true => text.push(c),
            false if text.ends_with(['-', '=', ',']) => {}
            false => text.push('-'),
        }
    }
    // A file system allows 255 bytes; the seed and a number come behind.
    text.truncate(150);
    text.trim_start_matches('.').trim_end_matches('-').to_owned()
}

fn unused(folder: String, runs: &[Planned]) -> String {
    let is_used = |name: &String| runs.iter().any(|run| run.folder == *name);
    let numbered = (2..).map(|number| format!("{folder}-{number}"));
    std::iter::once(folder.clone()).chain(numbered).find(|name| !is_used(name)).unwrap_or(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Vec<Setting>> {
        let file: SweepFile = toml::from_str(&format!("base = 'b.toml'\n{text}")).unwrap();
        settings(&file, &["train.batch_size=4".into()])
    }

    fn names(text: &str) -> Vec<String> {
        parse(text).unwrap().into_iter().map(|setting| setting.name).collect()
    }

    #[test]
    fn a_grid_is_every_combination_named_by_what_varies() {
        let text = "[grid]\ntrain.lr = [1e-3, 5e-4]\ntrain.epochs = [4]\nattention.kind = ['gated', 'window']";
        assert_eq!(
            names(text),
            [
                "lr=0.001,kind=gated",
                "lr=0.001,kind=window",
                "lr=0.0005,kind=gated",
                "lr=0.0005,kind=window"
            ]
        );
        let first = &parse(text).unwrap()[0].values;
        let pairs: Vec<String> =
            first.iter().map(|(key, value)| format!("{key}={value}")).collect();
        assert_eq!(pairs, ["train.lr=0.001", "train.epochs=4", "attention.kind=\"gated\""]);
        assert_eq!(names("[grid]\ntrain.epochs = [4]"), ["base"]);
        let set = parse("[grid]\ntrain.batch_size = [8]").unwrap();
        assert!(set[0].values.is_empty(), "`--set` comes last");
        assert_eq!(names("[grid]\nmodel = ['a/x', 'b/y']"), ["model=x", "model=y"]);
        assert_eq!(names("[grid]\nmodel = ['a/x', 'b/x']"), ["model=a/x", "model=b/x"]);
        assert_eq!(names("[grid]\na.b = ['good/bad', 'x/y']"), ["b=good/bad", "b=x/y"]);
        assert_eq!(
            names("[grid]\ndata.limit = [1, 2]\nexamples.limit = [3, 4]")[0],
            "data.limit=1,examples.limit=3"
        );
    }

    #[test]
    fn named_runs_go_through_the_grid() {
        let run = "[[run]]\nname = 'w'\nattention = { kind = 'window', size = 4 }\n[[run]]\nname = 'plain'";
        assert_eq!(names(run), ["w", "plain"]);
        assert_eq!(
            names(&format!("{run}\n[grid]\ntrain.lr = [1.0, 2.0]")),
            ["w,lr=1.0", "w,lr=2.0", "plain,lr=1.0", "plain,lr=2.0"]
        );
        let all = parse(&format!("{run}\n[grid]\ntrain.lr = [1.0]")).unwrap();
        let of = |setting: &Setting| -> Vec<String> {
            setting.values.iter().map(|(key, value)| format!("{key}={value}")).collect()
        };
        assert_eq!(all[0].name, "w");
        assert_eq!(of(&all[0]), ["attention.kind=\"window\"", "attention.size=4", "train.lr=1.0"]);
        assert_eq!(of(&all[1]), ["train.lr=1.0"]);
        let [window, plain] = &parse(run).unwrap()[..] else { panic!() };
        assert_eq!(window.values[1], ("attention.size".into(), Value::Integer(4)));
        assert!(plain.values.is_empty());
    }

    /// "Costs 12 runs ...", their headers say.
    #[test]
    fn bundled_sweeps_are_of_as_many_runs_as_they_say() {
        let configs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/sweep");
        let files = fs::read_dir(configs).unwrap().map(|entry| entry.unwrap().path());
        let mut n_files = 0;
        for file in files {
            let text = fs::read_to_string(&file).unwrap();
            let (before, _) = text.split_once(" runs").expect("the header counts the runs");
            let said: usize = before.rsplit(' ').next().unwrap().parse().unwrap();
            let args = SweepArgs {
                file: file.clone(),
                set: Vec::new(),
                out: None,
                device: "cpu".into(),
                dry_run: true,
            };
            let plan = Plan::read(&args).unwrap_or_else(|error| panic!("{error:#}"));
            assert_eq!(plan.runs.len(), said, "{}", file.display());
            n_files += 1;
        }
        assert!(n_files >= 5, "{n_files}");
    }

    #[test]
    fn a_sweep_that_cannot_be_meant_is_refused() {
        let cases = [
            ("[grid]\ntrain.lr = 0.1", "`grid.train.lr` is 0.1, expected a list of values"),
            ("[grid]\ntrain.lr = []", "`grid.train.lr` lists no value"),
            ("[grid]\ntrain.lr = [1, 2, 1]", "`1` stands twice in `grid.train.lr`"),
            ("[grid]\ntrain.seed = [1, 2]", "`train.seed` is among the settings"),
            (
                "[grid]\ntrain.batch_size = [1, 2]",
                "`train.batch_size` is set by the sweep and by `--set`",
            ),
            ("seeds = []", "`seeds` names no seed"),
            ("seeds = [3, 3]", "`3` stands twice in `seeds`"),
            ("[[run]]\ntrain.lr = 1", "a `[[run]]` has no `name`"),
            (
                "[[run]]\nname = 'a'\ntrain.lr = 1.0\n[grid]\ntrain.lr = [1.0, 2.0]",
                "`train.lr` is set by the grid and by the `[[run]]` behind `a,lr=1.0`",
            ),
            (
                "[[run]]\nname = 'a'\n[[run]]\nname = 'a'",
                "`a` stands twice in `the settings' names`",
            ),
        ];
        for (text, message) in cases {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(message), "{text}: {error}");
        }
    }

    #[test]
    fn folders_have_plain_names() {
        assert_eq!(plain("layers=[0, 1],kind=window"), "layers=0,1-,kind=window");
        assert_eq!(plain("../a b"), "-a-b");
        assert_eq!(plain(&"x".repeat(400)).len(), 150);
    }
}
