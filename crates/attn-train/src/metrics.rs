//! `metrics.jsonl`: one object a line, nothing in it that depends on the clock, so that the file of a resumed run
//! equals that of an unbroken one byte for byte.

use std::{
    fs::{File, OpenOptions},
    io::{Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    tensorboard::{EventFile, Scalar},
};

/// The file's name in a run's folder.
pub const METRICS_FILE: &str = "metrics.jsonl";

/// A number that an evaluation gives.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Metric {
    /// The name, such as `accuracy`.
    pub name: String,
    /// The value; JSON writes one that is not finite as `null`, which reads as NaN.
    #[serde(deserialize_with = "number_or_null")]
    pub value: f64,
    /// The unit, such as `fraction` or `nats/token`.
    pub unit: String,
    /// Whether more is better, for choosing a model by it.
    pub higher_is_better: bool,
}

impl Metric {
    /// Whether this value is better than `other`. A value that is not a number is never better.
    pub fn is_better_than(&self, other: f64) -> bool {
        if other.is_nan() {
            return !self.value.is_nan();
        }
        if self.higher_is_better { self.value > other } else { self.value < other }
    }
}

fn number_or_null<'de, D: serde::Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(from)?.unwrap_or(f64::NAN))
}

/// A line of the file.
#[derive(Debug, Serialize)]
struct Line<'a> {
    step: u64,
    metric: &'a str,
    value: f64,
    unit: &'a str,
    seed: u64,
}

/// A line that was written earlier.
#[derive(Debug, Deserialize)]
struct Written {
    step: u64,
    metric: String,
    #[serde(deserialize_with = "number_or_null")]
    value: f64,
}

/// The file, open at its end, and TensorBoard's beside it, which holds the same.
#[derive(Debug)]
pub(crate) struct MetricsFile {
    path: PathBuf,
    file: File,
    events: EventFile,
    len: u64,
    seed: u64,
}

impl MetricsFile {
    /// Starts the file of a run in `dir`, or goes on after its first `keep` bytes: what a later, lost part of the run
    /// wrote behind them is cut off.
    pub(crate) fn open(dir: &Path, keep: u64, seed: u64) -> Result<Self> {
        let path = dir.join(METRICS_FILE);
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(&path)
            .map_err(Error::io("open", &path))?;
        let found = file.metadata().map_err(Error::io("read", &path))?.len();
        let len = keep.min(found);
        if len < keep {
            tracing::warn!(
                "`{}` has {found} bytes, fewer than the {keep} it had when the checkpoint was saved: lines of the \
                 first part of the run are missing",
                path.display()
            );
        }
        file.set_len(len).map_err(Error::io("cut", &path))?;
        let text = std::fs::read_to_string(&path).map_err(Error::io("read", &path))?;
        // A line that something else cut is no number.
        let lines: Vec<Written> =
            text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        let scalars: Vec<Scalar<'_>> = lines
            .iter()
            .map(|line| Scalar { step: line.step, name: &line.metric, value: line.value })
            .collect();
        let events = EventFile::open(dir, &scalars)?;
        let mut metrics = Self { path, file, events, len, seed };
        metrics.end_line()?;
        Ok(metrics)
    }

    /// Where the next line begins.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Adds a line for each of `values` (name, value, unit), in one write.
    pub(crate) fn append<'a>(
        &mut self,
        step: u64,
        values: impl IntoIterator<Item = (&'a str, f64, &'a str)>,
    ) -> Result<()> {
        let mut text = String::new();
        let mut scalars = Vec::new();
        for (metric, value, unit) in values {
            scalars.push(Scalar { step, name: metric, value });
            let line = Line { step, metric, value, unit, seed: self.seed };
            text += &serde_json::to_string(&line).expect("names and numbers are JSON");
            text.push('\n');
        }
        self.file.write_all(text.as_bytes()).map_err(Error::io("write", &self.path))?;
        self.len += text.len() as u64;
        self.events.append(&scalars)
    }

    /// Brings the lines to the disk, so that a checkpoint never knows of lines that a power cut took.
    pub(crate) fn sync(&self) -> Result<()> {
        self.file.sync_data().map_err(Error::io("write", &self.path))
    }

    /// Ends a line that something else cut, so that the next one does not continue it.
    fn end_line(&mut self) -> Result<()> {
        let failed = || Error::io("read", self.path.clone());
        let mut last = [b'\n'];
        if self.len > 0 {
            self.file.seek(SeekFrom::Start(self.len - 1)).map_err(failed())?;
            self.file.read_exact(&mut last).map_err(failed())?;
        }
        self.file.seek(SeekFrom::Start(self.len)).map_err(failed())?;
        if last != [b'\n'] {
            self.file.write_all(b"\n").map_err(Error::io("write", &self.path))?;
            self.len += 1;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn what_a_lost_part_of_a_run_wrote_is_cut_off() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(METRICS_FILE);
        let mut metrics = MetricsFile::open(dir.path(), 0, 7).unwrap();
        metrics.append(1, [("accuracy", 0.5, "fraction")]).unwrap();
        let saved = metrics.len();
        metrics.append(2, [("accuracy", 0.75, "fraction"), ("loss", f64::NAN, "nats")]).unwrap();
        drop(metrics);
        let first = r#"{"step":1,"metric":"accuracy","value":0.5,"unit":"fraction","seed":7}"#;
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(text.lines().next(), Some(first));
        assert_eq!(
            text.lines().last(),
            Some(r#"{"step":2,"metric":"loss","value":null,"unit":"nats","seed":7}"#)
        );

        let mut metrics = MetricsFile::open(dir.path(), saved, 7).unwrap();
        metrics.append(2, [("accuracy", 0.25, "fraction")]).unwrap();

        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(
            text,
            format!("{first}\n{}\n", first.replace("0.5", "0.25").replace(":1,", ":2,"))
        );
    }

    #[test]
    fn a_torn_line_is_not_continued() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(METRICS_FILE);
        fs::write(&path, "{\"step\":").unwrap();

        let mut metrics = MetricsFile::open(dir.path(), 1000, 0).unwrap();
        metrics.append(3, [("a", 1.0, "")]).unwrap();

        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(text.lines().count(), 2);
        assert!(text.lines().nth(1).unwrap().starts_with("{\"step\":3"), "{text}");
    }

    #[test]
    fn a_value_that_is_no_number_is_never_better() {
        let metric = |value, higher_is_better| Metric {
            name: "m".into(),
            value,
            unit: String::new(),
            higher_is_better,
        };
        assert!(metric(0.2, true).is_better_than(0.1));
        assert!(!metric(0.1, true).is_better_than(0.1));
        assert!(metric(0.1, false).is_better_than(0.2));
        assert!(metric(0.1, false).is_better_than(f64::NAN));
        assert!(!metric(f64::NAN, false).is_better_than(f64::NAN));
        assert!(!metric(f64::NAN, true).is_better_than(0.1));
        let text = serde_json::to_string(&metric(f64::NAN, true)).unwrap();
        assert!(serde_json::from_str::<Metric>(&text).unwrap().value.is_nan());
    }
}
