//! The folder of a run: what it is called, what it may hold, and the files that every run writes.

use std::{
    cell::Cell,
    fs::{self, File, TryLockError},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process,
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, bail, ensure};
use attn_core::Model;
use attn_train::{Environment, checkpoint};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::json;
use tch::Device;

use crate::{args::dtype_name, sources};

/// Where runs stand that name no folder.
const RUNS: &str = "runs";

/// The version of what results/SCHEMA.md describes. It grows when a field changes its meaning or goes; new fields leave
/// it alone.
pub(crate) const SCHEMA: u32 = 1;

/// The complete config of a run.
pub(crate) const CONFIG_FILE: &str = "config.toml";

/// What it was run with.
pub(crate) const ENVIRONMENT_FILE: &str = "env.json";

/// What a finished run came to.
pub(crate) const SUMMARY_FILE: &str = "summary.json";

/// What a sweep came to.
pub(crate) const SWEEP_RESULT: &str = "sweep.json";

/// The same as a table, a line a run.
pub(crate) const SWEEP_TABLE: &str = "sweep.csv";

/// What the model says of each row that is reported on.
pub(crate) const PREDICTIONS_FILE: &str = "predictions.jsonl";

/// What a run writes before its first step.
pub(crate) const FIRST_FILES: [&str; 6] = [
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    BEFORE_FILE,
    UNTOUCHED_FILE,
    TEACHER_FILE,
    attn_train::METRICS_FILE,
];
pub(crate) const FIRST_FOLDERS: [&str; 6] = [
    checkpoint::FOLDER,
    TOKENIZER_DIR,
    ".tokenizer",
    attn_train::TENSORBOARD_FOLDER,
    "transfer",
    "tune",
];

/// What tells the teacher of a distillation from others, as text.
pub(crate) const TEACHER_FILE: &str = "teacher.json";

/// The score before training, kept so that a run that is resumed does not look again.
pub(crate) const BEFORE_FILE: &str = "before.json";

/// The score before the attention was changed.
pub(crate) const UNTOUCHED_FILE: &str = "untouched.json";

/// The tokenizer of a pre-training run, kept so that a run that is resumed does not train another.
pub(crate) const TOKENIZER_DIR: &str = "tokenizer";

/// Locked by the process that a run's folder belongs to.
pub(crate) const LOCK_FILE: &str = ".lock";

/// Folders made for something that may come to nothing, outermost first. Dropped while they are empty, they disappear.
#[derive(Debug, Default)]
pub(crate) struct Made(Vec<PathBuf>);

impl Made {
    /// Makes a folder and those above it that are missing.
    fn make(path: &Path) -> std::io::Result<Self> {
        let mut made = Self::default();
        let is_missing = |path: &&Path| !path.as_os_str().is_empty() && !path.exists();
        let missing: Vec<&Path> = path.ancestors().take_while(is_missing).collect();
        for dir in missing.into_iter().rev() {
            match fs::create_dir(dir) {
                Ok(()) => made.0.push(dir.to_owned()),
                // Another process was first.
                Err(_) if dir.is_dir() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(made)
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        for dir in self.0.iter().rev() {
            // Only succeeds while it is empty.
            let _ = fs::remove_dir(dir);
        }
    }
}

/// Keeps other processes out of a run's folder until it is dropped.
#[derive(Debug)]
struct Lock {
    path: PathBuf,
    /// `None` where the file system has no locks, as some network file systems: nobody is kept out.
    file: Option<File>,
}

impl Lock {
    fn take(dir: &Path) -> Result<Self> {
        let path = dir.join(LOCK_FILE);
        let shown = path.display();
        loop {
            let file = File::create(&path).with_context(|| format!("cannot write `{shown}`"))?;
            match file.try_lock() {
                // The one before removes the file when it ends; the name may lead to another one by now.
                Ok(()) if !is_same(&file, &path) => {}
                Ok(()) => return Ok(Self { path, file: Some(file) }),
                Err(TryLockError::WouldBlock) => bail!(
                    "another process is running in `{}`\nhint: name another folder, or wait until it has ended",
                    dir.display()
                ),
                Err(TryLockError::Error(error)) => {
                    tracing::warn!("cannot lock `{shown}`: {error}; start no second run there");
                    return Ok(Self { path, file: None });
                }
            }
        }
    }

    fn is_held(&self) -> bool {
        self.file.is_some()
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        if self.is_held() {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Whether `path` still leads to `file`.
fn is_same(file: &File, path: &Path) -> bool {
    let place = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    match (file.metadata(), fs::metadata(path)) {
        (Ok(file), Ok(path)) => place(file) == place(path),
        _ => false,
    }
}

/// The folder of a run, locked. A run that ends before its first step leaves nothing, unless it was interrupted.
#[derive(Debug)]
pub(crate) struct RunDir {
    path: PathBuf,
    began: Cell<bool>,
    // Dropped in this order: the folders that were made are empty once the lock is gone.
    lock: Lock,
    _made: Made,
}

impl RunDir {
    /// Makes the folder of a new run: `out`, which must be new or empty, or the first free `runs/<date>-<name>`.
    pub(crate) fn create(out: Option<&Path>, name: &str) -> Result<Self> {
        if let Some(out) = out {
            if out.join(LOCK_FILE).exists() {
                // Who is running there is worth more to know than that something stands there.
                drop(Lock::take(out)?);
            }
            check_empty(out)?;
            let made =
                Made::make(out).with_context(|| format!("cannot create `{}`", out.display()))?;
            let lock = Lock::take(out)?;
            // Another run may have come and gone since.
            check_empty(out)?;
            if lock.is_held() {
                clear_start(out)?;
            }
            return Ok(Self::new(out.to_owned(), lock, made));
        }
        let mut made = Made::make(Path::new(RUNS))
            .with_context(|| format!("cannot create `{RUNS}`\nhint: name a folder: --out DIR"))?;
        let (date, _) = utc(SystemTime::now());
        for number in 1.. {
            let suffix = if number == 1 { String::new() } else { format!("-{number}") };
            let path = Path::new(RUNS).join(format!("{date}-{name}{suffix}"));
            // Taken by whoever creates it first, also where two runs start at once.
            match fs::create_dir(&path) {
                Ok(()) => {
                    made.0.push(path.clone());
                    let lock = Lock::take(&path)?;
                    return Ok(Self::new(path, lock, made));
                }
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(error) => {
                    return Err(error)
                        .with_context(|| format!("cannot create `{}`", path.display()));
                }
            }
        }
        unreachable!("there is always another number")
    }

    /// The folder of a run that was begun.
    pub(crate) fn reopen(out: &Path) -> Result<Self> {
        let shown = out.display();
        ensure!(
            out.join(CONFIG_FILE).is_file(),
            "`{shown}` holds no run: there is no `{CONFIG_FILE}`\nhint: begin one without --resume"
        );
        let dir = Self::new(out.to_owned(), Lock::take(out)?, Made::default());
        dir.begin();
        Ok(dir)
    }

    fn new(path: PathBuf, lock: Lock, made: Made) -> Self {
        Self { path, began: Cell::new(false), lock, _made: made }
    }

    /// From here on there is something to go on with.
    pub(crate) fn begin(&self) {
        self.began.set(true);
    }

    /// Removes the checkpoints: a run that has finished needs none.
    pub(crate) fn remove_checkpoints(&self) {
        checkpoint::remove_all(&self.path);
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The path of a file in it.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    pub(crate) fn write_json(&self, name: &str, value: &impl Serialize) -> Result<()> {
        write_json(&self.file(name), value)
    }

    /// What an earlier part of the run wrote, where it did.
    pub(crate) fn read_json<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>> {
        read_json(&self.file(name))
    }

    /// Writes where the run takes place.
    pub(crate) fn write_environment(&self, model: &Model) -> Result<()> {
        let Environment { libtorch, threads, cpu, device } = Environment::of(model)?;
        let (date, time) = utc(SystemTime::now());
        self.write_json(
            ENVIRONMENT_FILE,
            &json!({
                "schema": SCHEMA,
                "started_utc": format!("{date}T{time}Z"),
                "arguments": crate::origin::arguments(),
                "attn": env!("CARGO_PKG_VERSION"),
                "commit": commit(),
                "libtorch": libtorch,
                "device": device,
                "dtype": dtype_name(model.kind()),
                "threads": threads,
                "cpu": cpu,
            }),
        )
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        // The folder was empty when it was locked: what has these names is of this run. Without a lock it may be of
        // another.
        if self.began.get() || !self.lock.is_held() {
            return;
        }
        // By name: somebody may have put something of his own beside them.
        for name in FIRST_FILES {
            let _ = fs::remove_file(self.file(name));
        }
        for name in FIRST_FOLDERS {
            let _ = fs::remove_dir_all(self.file(name));
        }
    }
}

/// Refuses a folder for a new run that is there and holds something.
fn check_empty(out: &Path) -> Result<()> {
    let shown = out.display();
    match fs::read_dir(out) {
        Ok(entries) => ensure!(
            entries.flatten().all(|entry| is_of_a_start(&entry.path())),
            "`{shown}` holds something already\nhint: name a new folder, or go on with the run in it: --resume"
        ),
        Err(_) if out.exists() => bail!("`{shown}` is not a folder\nhint: name a new one"),
        Err(_) => {}
    }
    Ok(())
}

/// Whether a file of this name was being written when a run was killed.
pub(crate) fn is_draft(name: &str) -> bool {
    name.starts_with('.') && name.contains(".attn-tmp-")
}

/// Whether a run writes this file before its config: a folder without one that holds nothing else is of a run that was killed as it
/// began. A lock that it left is taken by the next.
pub(crate) fn is_of_a_start(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default();
    name == LOCK_FILE
        || is_draft(&name.to_string_lossy())
        || name == ENVIRONMENT_FILE && is_environment(path)
}

/// Whether a file is what [`RunDir::write_environment`] writes, and no other program's.
fn is_environment(path: &Path) -> bool {
    let value: Option<serde_json::Value> = read_json(path).ok().flatten();
    value.is_some_and(|it| it["started_utc"].is_string() && it["libtorch"].is_string())
}

/// Removes what a run that was killed before it had a config left in a folder.
pub(crate) fn clear_start(dir: &Path) -> Result<()> {
    if !dir.exists() {
        return Ok(());
    }
    let entries = fs::read_dir(dir).with_context(|| format!("cannot read `{}`", dir.display()))?;
    for path in entries.flatten().map(|entry| entry.path()) {
        if is_of_a_start(&path) && !path.ends_with(LOCK_FILE) {
            fs::remove_file(&path)
                .with_context(|| format!("cannot remove `{}`", path.display()))?;
        }
    }
    Ok(())
}

/// What the run or sweep in a folder came to, where it has ended.
pub(crate) fn result_in(dir: &Path) -> Option<PathBuf> {
    [SUMMARY_FILE, SWEEP_RESULT].map(|name| dir.join(name)).into_iter().find(|it| it.exists())
}

/// Reads a JSON file; `None` where there is none.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    let shown = path.display();
    match fs::read(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot read `{shown}`")),
        Ok(text) => {
            let value = serde_json::from_slice(&text);
            value.map(Some).with_context(|| format!("`{shown}` is damaged"))
        }
    }
}

/// Writes a JSON file, indented, whole or not at all.
pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let mut text = serde_json::to_vec_pretty(value).context("cannot write JSON")?;
    text.push(b'\n');
    write(path, &text)
}

/// Writes a file whole or not at all.
pub(crate) fn write(path: &Path, content: &[u8]) -> Result<()> {
    attn_core::checkpoint::write_file(path, content)
        .with_context(|| format!("cannot write `{}`", path.display()))
}

/// Finds out whether a file can be written, before the work that fills it. Makes folders that are missing; keep what is
/// returned until the file is there.
pub(crate) fn check_writable(path: &Path) -> Result<Made> {
    let shown = path.display();
    ensure!(!path.is_dir(), "`{shown}` is a folder, expected the name of a file to write");
    let parent = parent_of(path);
    let made =
        Made::make(parent).with_context(|| format!("cannot create `{}`", parent.display()))?;
    tempfile::tempfile_in(parent)
        .with_context(|| format!("cannot write to `{}`", parent.display()))?;
    Ok(made)
}

/// The most memory that this process has held, in MiB, where the system says it.
pub(crate) fn peak_memory_mib() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib / 1024)
}

/// The name of a device as `--device` has it.
pub(crate) fn device_name(device: Device) -> String {
    match device {
        Device::Cuda(index) => format!("cuda:{index}"),
        other => format!("{other:?}").to_lowercase(),
    }
}

pub(crate) fn parent_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Commits of all branches in which [`commit`] looks for the program's sources, newest first.
const MOST_COMMITS: &str = "--max-count=30";

/// The commit that has the sources this program was built from, whatever was checked out since; of several the newest.
/// Where none of the last ones has them, the one checked out with `-dirty`; `None` where there is no repository or no git.
fn commit() -> Option<String> {
    let built_from = Some(env!("ATTN_SOURCES")).filter(|digest| !digest.is_empty())?;
    let git = |arguments: &[&str]| {
        let sources = ["-C", concat!(env!("CARGO_MANIFEST_DIR"), "/../..")];
        let output = process::Command::new("git").args(sources).args(arguments).output().ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| text.trim().to_owned())
    };
    let head = git(&["rev-parse", "HEAD"])?;
    let commits = git(&["rev-list", MOST_COMMITS, "--all", "HEAD"])?;
    let has_sources = |commit: &&str| {
        let listed = git(&["ls-tree", "-r", commit, "--", "Cargo.lock", "Cargo.toml", "crates"]);
        // `MODE blob HASH<tab>PATH`
        let files = listed
            .unwrap_or_default()
            .lines()
            .filter_map(|line| {
                let (about, path) = line.split_once('\t')?;
                Some((about.rsplit(' ').next()?.to_owned(), path.to_owned()))
            })
            .filter(|(_, path)| sources::is_source(path))
            .collect();
        sources::digest(files) == built_from
    };
    let found = commits.lines().find(has_sources).map(str::to_owned);
    found.or_else(|| Some(format!("{head}-dirty")))
}

/// Date and time in UTC, `2026-01-31` and `08:30:00`.
fn utc(time: SystemTime) -> (String, String) {
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (days, rest) = ((seconds / 86_400) as i64, seconds % 86_400);
    // Howard Hinnant's civil_from_days, <https://howardhinnant.github.io/date_algorithms.html>: years begin in March.
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    (
        format!("{year:04}-{month:02}-{day:02}"),
        format!("{:02}:{:02}:{:02}", rest / 3600, rest / 60 % 60, rest % 60),
    )
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        let at = |seconds| utc(UNIX_EPOCH + Duration::from_secs(seconds));

        assert_eq!(at(0), ("1970-01-01".into(), "00:00:00".into()));
        assert_eq!(at(951_782_399), ("2000-02-28".into(), "23:59:59".into()));
        assert_eq!(at(951_782_400).0, "2000-02-29");
        assert_eq!(at(951_868_800).0, "2000-03-01");
        assert_eq!(at(1_767_225_599), ("2025-12-31".into(), "23:59:59".into()));
        assert_eq!(at(4_107_542_400).0, "2100-03-01", "2100 is no leap year");
    }

    #[test]
    fn a_folder_that_holds_something_is_refused_and_an_unused_one_disappears() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("a/b");

        let run = RunDir::create(Some(&out), "x").unwrap();
        run.write_json(BEFORE_FILE, &1).unwrap();
        fs::create_dir(run.file(checkpoint::FOLDER)).unwrap();
        drop(run);
        assert!(!dir.path().join("a").exists(), "folders made on the way go too");
        fs::create_dir(dir.path().join("own")).unwrap();
        drop(RunDir::create(Some(&dir.path().join("own")), "x").unwrap());
        assert!(dir.path().join("own").exists(), "what was there before stays");

        let run = RunDir::create(Some(&out), "x").unwrap();
        run.begin();
        run.write_json("x.json", &json!({"a": 1})).unwrap();
        drop(run);
        assert_eq!(fs::read_to_string(out.join("x.json")).unwrap(), "{\n  \"a\": 1\n}\n");
        let error = RunDir::create(Some(&out), "x").unwrap_err().to_string();
        assert!(error.contains("holds something") && error.contains("--resume"), "{error}");
        let error = RunDir::create(Some(&out.join("x.json")), "x").unwrap_err().to_string();
        assert!(error.contains("not a folder"), "{error}");
        let error = RunDir::reopen(&out).unwrap_err().to_string();
        assert!(error.contains("holds no run"), "{error}");
    }

    #[test]
    fn the_folder_of_a_run_is_its_own_until_it_ends() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let run = RunDir::create(Some(&out), "x").unwrap();

        let refused = |result: Result<RunDir>| {
            let error = result.unwrap_err().to_string();
            assert!(error.contains("another process is running in"), "{error}");
        };
        refused(RunDir::create(Some(&out), "x"));
        run.write_json(CONFIG_FILE, &1).unwrap();
        refused(RunDir::reopen(&out));
        assert!(out.join(CONFIG_FILE).exists(), "who is refused removes nothing");

        run.begin();
        drop(run);
        assert!(!out.join(LOCK_FILE).exists());
        drop(RunDir::reopen(&out).unwrap());

        // As a kill leaves it.
        let killed = dir.path().join("killed");
        fs::create_dir(&killed).unwrap();
        fs::write(killed.join(LOCK_FILE), "").unwrap();
        fs::write(killed.join(".config.toml.attn-tmp-Ab1"), "half").unwrap();
        let run = RunDir::create(Some(&killed), "x").unwrap();
        assert!(!killed.join(".config.toml.attn-tmp-Ab1").exists());
        drop(run);
        // Between the environment and the config; one that is of something else is left alone.
        fs::create_dir_all(&killed).unwrap();
        let environment = r#"{"libtorch": "2.11.0", "device": "cpu", "threads": 1, "cpu": "x", "started_utc": "x"}"#;
        fs::write(killed.join(ENVIRONMENT_FILE), environment).unwrap();
        let run = RunDir::create(Some(&killed), "x").unwrap();
        assert!(!killed.join(ENVIRONMENT_FILE).exists());
        drop(run);
        fs::create_dir_all(&killed).unwrap();
        fs::write(killed.join(ENVIRONMENT_FILE), r#"{"PATH": "x"}"#).unwrap();
        assert!(RunDir::create(Some(&killed), "x").is_err());
        fs::remove_file(killed.join(ENVIRONMENT_FILE)).unwrap();
        fs::write(killed.join(".own"), "").unwrap();
        assert!(RunDir::create(Some(&killed), "x").is_err(), "only what is ours is no matter");
    }

    #[test]
    fn without_a_lock_nothing_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_owned();
        fs::write(path.join(CONFIG_FILE), "of another run").unwrap();
        let lock = Lock { path: path.join(LOCK_FILE), file: None };
        drop(RunDir::new(path.clone(), lock, Made::default()));
        assert!(path.join(CONFIG_FILE).exists());
    }

    #[test]
    fn what_cannot_be_written_shows_beforehand() {
        let dir = tempfile::tempdir().unwrap();
        let made = check_writable(&dir.path().join("new/deep/out.json")).unwrap();
        assert!(dir.path().join("new/deep").is_dir());
        drop(made);
        assert!(!dir.path().join("new").exists(), "nothing was written");
        assert!(check_writable(dir.path()).unwrap_err().to_string().contains("is a folder"));
        fs::write(dir.path().join("file"), "").unwrap();
        assert!(check_writable(&dir.path().join("file/out.json")).is_err());
    }
}
