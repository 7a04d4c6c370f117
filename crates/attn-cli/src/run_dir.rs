//! The folder of a run: what it is called, what it may hold, and the files that every run writes.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process,
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, bail, ensure};
use attn_core::Model;
use attn_train::Environment;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::json;
use tch::Device;

use crate::args::dtype_name;

/// Where runs stand that name no folder.
const RUNS: &str = "runs";

/// The complete config of a run.
pub(crate) const CONFIG_FILE: &str = "config.toml";

/// What a finished run came to.
pub(crate) const SUMMARY_FILE: &str = "summary.json";

/// The folder of a run. Dropped while it is empty, it disappears: a run that never began leaves nothing.
#[derive(Debug)]
pub(crate) struct RunDir {
    path: PathBuf,
}

impl RunDir {
    /// Makes the folder of a new run: `out`, which must be new or empty, or the first free `runs/<date>-<name>`.
    pub(crate) fn create(out: Option<&Path>, name: &str) -> Result<Self> {
        if let Some(out) = out {
            let shown = out.display();
            match fs::read_dir(out) {
                Ok(mut entries) => ensure!(
                    entries.next().is_none(),
                    "`{shown}` holds something already\nhint: name a new folder, or go on with the run in it: --resume"
                ),
                Err(_) if out.exists() => bail!("`{shown}` is not a folder\nhint: name a new one"),
                Err(_) => {
                    fs::create_dir_all(out).with_context(|| format!("cannot create `{shown}`"))?
                }
            }
            return Ok(Self { path: out.to_owned() });
        }
        fs::create_dir_all(RUNS)
            .with_context(|| format!("cannot create `{RUNS}`\nhint: name a folder: --out DIR"))?;
        let (date, _) = utc(SystemTime::now());
        for number in 1.. {
            let suffix = if number == 1 { String::new() } else { format!("-{number}") };
            let path = Path::new(RUNS).join(format!("{date}-{name}{suffix}"));
            // Taken by whoever creates it first, also where two runs start at once.
            match fs::create_dir(&path) {
                Ok(()) => return Ok(Self { path }),
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
        Ok(Self { path: out.to_owned() })
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
        let path = self.file(name);
        let shown = path.display();
        match fs::read(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("cannot read `{shown}`")),
            Ok(text) => {
                let value = serde_json::from_slice(&text);
                value.map(Some).with_context(|| format!("`{shown}` is damaged"))
            }
        }
    }

    /// Writes where the run takes place.
    pub(crate) fn write_environment(&self, model: &Model) -> Result<()> {
        let Environment { libtorch, threads, cpu, device } = Environment::of(model)?;
        let (date, time) = utc(SystemTime::now());
        let arguments: Vec<String> =
            std::env::args_os().map(|arg| arg.to_string_lossy().into_owned()).collect();
        self.write_json(
            "env.json",
            &json!({
                "started_utc": format!("{date}T{time}Z"),
                "arguments": arguments[1..],
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
        // Only succeeds while it is empty.
        let _ = fs::remove_dir(&self.path);
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
    let write = || -> std::io::Result<()> {
        let mut builder = tempfile::Builder::new();
        // A temporary file is private by default; results are shared like any other file.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let mut file = builder.tempfile_in(parent_of(path))?;
        file.write_all(content)?;
        file.as_file().sync_all()?;
        file.persist(path)?;
        Ok(())
    };
    write().with_context(|| format!("cannot write `{}`", path.display()))
}

/// Finds out whether a file can be written, before the work that fills it.
pub(crate) fn check_writable(path: &Path) -> Result<()> {
    let shown = path.display();
    ensure!(!path.is_dir(), "`{shown}` is a folder, expected the name of a file to write");
    let parent = parent_of(path);
    fs::create_dir_all(parent).with_context(|| format!("cannot create `{}`", parent.display()))?;
    tempfile::tempfile_in(parent)
        .with_context(|| format!("cannot write to `{}`", parent.display()))?;
    Ok(())
}

/// The name of a device as `--device` has it.
pub(crate) fn device_name(device: Device) -> String {
    match device {
        Device::Cuda(index) => format!("cuda:{index}"),
        other => format!("{other:?}").to_lowercase(),
    }
}

fn parent_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// The commit of the sources this program was built from, `-dirty` where they were changed since; `None` outside of a
/// repository.
fn commit() -> Option<String> {
    let git = |arguments: &[&str]| {
        let sources = ["-C", env!("CARGO_MANIFEST_DIR")];
        let output = process::Command::new("git").args(sources).args(arguments).output().ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| text.trim().to_owned())
    };
    let commit = git(&["rev-parse", "HEAD"])?;
    let changes = git(&["status", "--porcelain", "--untracked-files=no"])?;
    Some(if changes.is_empty() { commit } else { format!("{commit}-dirty") })
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

        drop(RunDir::create(Some(&out), "x").unwrap());
        assert!(!out.exists());

        let run = RunDir::create(Some(&out), "x").unwrap();
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
    fn what_cannot_be_written_shows_beforehand() {
        let dir = tempfile::tempdir().unwrap();
        check_writable(&dir.path().join("new/out.json")).unwrap();
        assert!(check_writable(dir.path()).unwrap_err().to_string().contains("is a folder"));
        fs::write(dir.path().join("file"), "").unwrap();
        assert!(check_writable(&dir.path().join("file/out.json")).is_err());
    }
}
