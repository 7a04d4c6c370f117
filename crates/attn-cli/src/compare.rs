//! `attn compare`: what runs came to, side by side, and whether they differ by more than the rows that happened to be drawn.

use std::{
    fmt::Write as _,
    io::Write,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use attn_eval::{
    RowScore, loss_difference,
    stats::{Interval, bootstrap_difference, discordant},
};
use serde::Serialize;
use serde_json::Value;

use crate::{
    args::{CompareArgs, TableFormat},
    run_dir::{self, PREDICTIONS_FILE, SCHEMA, SUMMARY_FILE},
    sweep::{Answers, Line},
};

/// Resamples of the bootstrap, and their seed.
const N_RESAMPLES: usize = 10_000;
const SEED: u64 = 0;

/// A figure of a run that can be told from another's.
pub(crate) struct Measure {
    /// Its name in tables and files.
    pub(crate) name: &'static str,
    /// Where it stands in a summary or an evaluation, by preference.
    paths: &'static [&'static str],
    /// Where its interval stands beside it.
    interval: &'static str,
    /// What it is multiplied by, its unit then, and its decimals.
    factor: f64,
    pub(crate) unit: &'static str,
    decimals: usize,
}

/// What runs are compared by.
pub(crate) const MEASURES: [Measure; 8] = [
    Measure {
        name: "accuracy",
        paths: &["after.accuracy", "accuracy.accuracy"],
        interval: "interval_95",
        factor: 100.0,
        unit: "%",
        decimals: 1,
    },
    Measure {
        name: "accuracy_before",
        paths: &["before.accuracy"],
        interval: "interval_95",
        factor: 100.0,
        unit: "%",
        decimals: 1,
    },
    Measure {
        name: "kl",
        paths: &[
            "stages.last.after.kl_nats_per_token",
            "divergence.kl_nats_per_token",
            "measured.kl_nats_per_token",
        ],
        interval: "kl_interval_95",
        factor: 1.0,
        unit: "nats a token",
        decimals: 4,
    },
    Measure {
        name: "kl_before",
        paths: &["at_swap.kl_nats_per_token"],
        interval: "kl_interval_95",
        factor: 1.0,
        unit: "nats a token",
        decimals: 4,
    },
    Measure {
        name: "loss",
        paths: &[
            "stages.last.after.model.loss_nats_per_token",
            "after.loss_nats_per_token",
            "language.loss_nats_per_token",
            "after.loss",
        ],
        interval: "loss_interval_95",
        factor: 1.0,
        unit: "nats",
        decimals: 4,
    },
    Measure {
        name: "loss_untouched",
        paths: &[
            "at_swap.baseline.loss_nats_per_token",
            "before.loss_nats_per_token",
            "before.loss",
        ],
        interval: "loss_interval_95",
        factor: 1.0,
        unit: "nats",
        decimals: 4,
    },
    Measure {
        name: "perplexity_untouched",
        paths: &["at_swap.baseline.perplexity", "measured.perplexity_before", "before.perplexity"],
        interval: "perplexity_interval_95",
        factor: 1.0,
        unit: "",
        decimals: 2,
    },
    Measure {
        name: "perplexity",
        paths: &[
            "stages.last.after.model.perplexity",
            "after.perplexity",
            "language.perplexity",
            "measured.perplexity",
        ],
        interval: "perplexity_interval_95",
        factor: 1.0,
        unit: "",
        decimals: 2,
    },
];

/// A figure that was found.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Found {
    pub(crate) value: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) interval_95: Option<Interval>,
}

impl Measure {
    pub(crate) fn find(&self, summary: &Value) -> Option<Found> {
        self.paths.iter().find_map(|path| {
            let (folder, _) = path.rsplit_once('.')?;
            let value = at(summary, path)?.as_f64()?;
            let interval = at(summary, folder)?.get(self.interval);
            let interval_95 = interval.and_then(|it| {
                let bound = |name: &str| Some(self.factor * it.get(name)?.as_f64()?);
                Some(Interval { low: bound("low")?, high: bound("high")? })
            });
            Some(Found { value: self.factor * value, interval_95 })
        })
    }

    pub(crate) fn heading(&self) -> String {
        let name = self.name.replace('_', " ").replace("kl", "KL");
        if self.unit.is_empty() { name } else { format!("{name} ({})", self.unit) }
    }

    pub(crate) fn show(&self, found: Found) -> String {
        let number = |value: f64| format!("{value:.*}", self.decimals);
        match found.interval_95 {
            None => number(found.value),
            Some(Interval { low, high }) => {
                format!("{} ({} to {})", number(found.value), number(low), number(high))
            }
        }
    }
}

/// What stands at `a.b.last.c`: fields, and the last of a list.
fn at<'a>(value: &'a Value, path: &str) -> Option<&'a Value> {
    path.split('.').try_fold(value, |value, key| match (key, value) {
        ("last", Value::Array(all)) => all.last(),
        (key, value) => value.get(key),
    })
}

/// OUT.json.
#[derive(Serialize)]
struct Report {
    schema: u32,
    attn: &'static str,
    runs: Vec<Run>,
}

#[derive(Serialize)]
struct Run {
    run: String,
    measures: serde_json::Map<String, Value>,
    /// Against the first run.
    #[serde(skip_serializing_if = "Option::is_none")]
    against_first: Option<Against>,
}

/// A run against the first, on the rows that both report on.
#[derive(Debug, Serialize)]
struct Against {
    /// What the comparison is of: `accuracy` or `loss` by rows, or `none` where rows differ or were not kept.
    of: &'static str,
    /// Why there is no test.
    #[serde(skip_serializing_if = "Option::is_none")]
    why_not: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    n_rows: Option<usize>,
    /// Less what the first has: accuracy in points, loss in nats per token.
    #[serde(skip_serializing_if = "Option::is_none")]
    difference: Option<f64>,
    /// By the paired bootstrap over rows.
    #[serde(skip_serializing_if = "Option::is_none")]
    difference_interval_95: Option<Interval>,
    /// McNemar's exact test.
    #[serde(skip_serializing_if = "Option::is_none")]
    mcnemar_p: Option<f64>,
}

/// A run as it was read.
struct Read {
    name: String,
    summary: Value,
    kept: Option<Kept>,
}

/// What a run kept of each row.
enum Kept {
    Answers(Answers),
    Losses(Vec<RowScore>),
}

pub(crate) fn run(args: &CompareArgs, out: &mut dyn Write) -> Result<()> {
    let runs: Vec<Read> = args.runs.iter().map(|path| read(path)).collect::<Result<_>>()?;
    let known = |measure: &&Measure| runs.iter().any(|run| measure.find(&run.summary).is_some());
    let measures: Vec<&Measure> = MEASURES.iter().filter(known).collect();
    ensure!(
        !measures.is_empty(),
        "`{}` holds no figure that runs are compared by\nhint: name the folders of runs, or OUT.json of attn eval",
        runs[0].name
    );
    let mut report = Report { schema: SCHEMA, attn: env!("CARGO_PKG_VERSION"), runs: Vec::new() };
    for (place, one) in runs.iter().enumerate() {
        let mut found = serde_json::Map::new();
        for measure in &measures {
            if let Some(it) = measure.find(&one.summary) {
                found.insert(measure.name.into(), serde_json::to_value(it)?);
            }
        }
        let against_first = match place {
            0 => None,
            _ => Some(against(&runs[0], one)?),
        };
        report.runs.push(Run { run: one.name.clone(), measures: found, against_first });
    }
    let table = Table::of(&report, &measures);
    let text = match args.format {
        TableFormat::Text => table.text(),
        TableFormat::Csv => table.csv()?,
        TableFormat::Markdown => table.markdown(),
        TableFormat::Latex => table.latex(),
        TableFormat::Json => serde_json::to_string_pretty(&report)? + "\n",
    };
    match &args.out {
        None => out.write_all(text.as_bytes())?,
        Some(path) => {
            run_dir::write(path, text.as_bytes())?;
            tracing::info!("wrote `{}`", path.display());
        }
    }
    Ok(())
}

fn read(path: &Path) -> Result<Read> {
    let file: PathBuf = if path.is_dir() { path.join(SUMMARY_FILE) } else { path.to_owned() };
    let text = std::fs::read_to_string(&file).with_context(|| {
        format!(
            "cannot read `{}`\nhint: a run that has ended has a `{SUMMARY_FILE}`",
            file.display()
        )
    })?;
    let summary: Value =
        serde_json::from_str(&text).with_context(|| format!("`{}` is not JSON", file.display()))?;
    let damaged = || format!("`{}` is damaged", file.display());
    let kept = if path.is_dir() {
        let kept = path.join(PREDICTIONS_FILE).exists();
        kept.then(|| Answers::read(path)).transpose()?.map(Kept::Answers)
    } else if let Some(rows) = summary.get("predictions") {
        let lines: Vec<Line> = serde_json::from_value(rows.clone()).with_context(damaged)?;
        Some(Kept::Answers(Answers::of(lines)))
    } else if let Some(rows) = summary.get("loss_by_row") {
        Some(Kept::Losses(serde_json::from_value(rows.clone()).with_context(damaged)?))
    } else {
        None
    };
    Ok(Read { name: path.display().to_string(), summary, kept })
}

fn against(first: &Read, other: &Read) -> Result<Against> {
    let none = |why: String| Against {
        of: "none",
        why_not: Some(why),
        n_rows: None,
        difference: None,
        difference_interval_95: None,
        mcnemar_p: None,
    };
    let (Some(a), Some(b)) = (&first.kept, &other.kept) else {
        let without = if first.kept.is_none() { first } else { other };
        return Ok(none(format!("`{}` kept nothing of its rows", without.name)));
    };
    let (a, b) = match (a, b) {
        (Kept::Answers(a), Kept::Answers(b)) => (a, b),
        (Kept::Losses(a), Kept::Losses(b)) => {
            return Ok(losses(first, other, a, b).unwrap_or_else(none));
        }
        _ => return Ok(none("one classifies, the other predicts tokens".into())),
    };
    if a.rows != b.rows {
        return Ok(none("they report on other rows".into()));
    }
    let counts = discordant(&b.right, &a.right)?;
    let numbers = |right: &[bool]| -> Vec<f64> {
        right.iter().map(|&right| if right { 100.0 } else { 0.0 }).collect()
    };
    let (ours, theirs) = (numbers(&b.right), numbers(&a.right));
    let interval = bootstrap_difference(&ours, &theirs, 0.95, N_RESAMPLES, SEED)?;
    let more = counts.only_first as f64 - counts.only_second as f64;
    Ok(Against {
        of: "accuracy",
        why_not: None,
        n_rows: Some(a.right.len()),
        difference: Some(100.0 * more / a.right.len() as f64),
        difference_interval_95: Some(interval),
        mcnemar_p: Some(counts.mcnemar_p),
    })
}

/// Losses of tokens, row by row; why not, where rows are others.
fn losses(first: &Read, other: &Read, a: &[RowScore], b: &[RowScore]) -> Result<Against, String> {
    // Rows of the same place and as many tokens are the same where the text, and what of it is hidden, is.
    let is_same = |field: &&str| first.summary.get(*field) == other.summary.get(*field);
    let of_text = ["task", "data", "split", "limit", "max_len", "rows", "mask_seed"];
    if let Some(field) = of_text.iter().find(|field| !is_same(field)) {
        return Err(format!("they differ in `{field}`"));
    }
    let interval = loss_difference(b, a)
        .map_err(|_| "their tokenizers cut the text into other tokens".to_owned())?;
    let apart: f64 = b.iter().zip(a).map(|(b, a)| b.nats - a.nats).sum();
    let n_tokens: usize = a.iter().map(|row| row.n_tokens).sum();
    Ok(Against {
        of: "loss",
        why_not: None,
        n_rows: Some(a.len()),
        difference: Some(apart / n_tokens as f64),
        difference_interval_95: Some(interval),
        mcnemar_p: None,
    })
}

/// The report as cells.
struct Table {
    columns: Vec<String>,
    rows: Vec<Vec<String>>,
    /// What is to be said below it.
    notes: Vec<String>,
}

impl Table {
    fn of(report: &Report, measures: &[&Measure]) -> Self {
        let mut columns = vec!["run".to_owned()];
        columns.extend(measures.iter().map(|measure| measure.heading()));
        let is_of_loss = |run: &Run| run.against_first.as_ref().is_some_and(|it| it.of == "loss");
        let of_loss = report.runs.iter().any(is_of_loss);
        let unit = if of_loss { "nats per token" } else { "points" };
        columns.extend([format!("less the first ({unit})"), "p".to_owned()]);
        let mut notes = Vec::new();
        let mut rows = Vec::new();
        for run in &report.runs {
            let mut row = vec![run.run.clone()];
            for measure in measures {
                let found = run.measures.get(measure.name).map(|found| {
                    let interval = found.get("interval_95").and_then(|it| {
                        Some(Interval { low: it["low"].as_f64()?, high: it["high"].as_f64()? })
                    });
                    Found {
                        value: found["value"].as_f64().unwrap_or(f64::NAN),
                        interval_95: interval,
                    }
                });
                row.push(found.map_or(String::new(), |found| measure.show(found)));
            }
            let against = run.against_first.as_ref();
            let difference =
                against.and_then(|it| Some((it.difference?, it.difference_interval_95?)));
            row.push(difference.map_or(String::new(), |(value, Interval { low, high })| {
                let places = if of_loss { 4 } else { 1 };
                format!("{value:+.places$} ({low:+.places$} to {high:+.places$})")
            }));
            let p = against.and_then(|it| it.mcnemar_p);
            row.push(p.map_or(String::new(), |p| match p {
                p if p < 0.001 => "< 0.001".into(),
                p => format!("{p:.3}"),
            }));
            if let Some(why) = against.and_then(|it| it.why_not.as_ref()) {
                notes.push(format!("{}: no test, {why}", run.run));
            }
            rows.push(row);
        }
        if report
            .runs
            .iter()
            .any(|run| run.against_first.as_ref().is_some_and(|it| it.n_rows.is_some()))
        {
            let of_p = " p: McNemar's exact test, one seed of each run.";
            notes.push(format!(
                "Intervals: 95 %; of differences by the paired bootstrap over rows.{}",
                if of_loss { "" } else { of_p }
            ));
        }
        // A column that says nothing of any run is left out.
        let mut columns_left: Vec<usize> = (0..columns.len()).collect();
        columns_left.retain(|&at| rows.iter().any(|row: &Vec<String>| !row[at].is_empty()));
        let keep = |cells: &[String]| columns_left.iter().map(|&at| cells[at].clone()).collect();
        Self { columns: keep(&columns), rows: rows.iter().map(|row| keep(row)).collect(), notes }
    }

    fn text(&self) -> String {
        let width = |at: usize| {
            let cells = self.rows.iter().map(|row| &row[at]).chain([&self.columns[at]]);
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.columns.len()).map(width).collect();
        let line = |cells: &[String]| {
            let cells = cells.iter().zip(&widths).map(|(cell, &width)| format!("{cell:<width$}"));
            cells.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
        };
        let mut text = line(&self.columns);
        self.rows.iter().for_each(|row| text += &line(row));
        self.with_notes(text, "")
    }

    fn markdown(&self) -> String {
        let line = |cells: &[String]| {
            let cells: Vec<String> = cells.iter().map(|cell| cell.replace('|', "\\|")).collect();
            format!("| {} |\n", cells.join(" | "))
        };
        let mut text = line(&self.columns);
        text += &format!("| {} |\n", vec!["---"; self.columns.len()].join(" | "));
        self.rows.iter().for_each(|row| text += &line(row));
        self.with_notes(text, "")
    }

    fn csv(&self) -> Result<String> {
        let mut writer = csv::Writer::from_writer(Vec::new());
        writer.write_record(&self.columns)?;
        self.rows.iter().try_for_each(|row| writer.write_record(row))?;
        Ok(String::from_utf8(writer.into_inner()?)?)
    }

    /// For the package `booktabs`.
    fn latex(&self) -> String {
        let line = |cells: &[String]| {
            let cells: Vec<String> = cells.iter().map(|cell| escaped(cell)).collect();
            format!("{} \\\\\n", cells.join(" & "))
        };
        let mut text =
            format!("\\begin{{tabular}}{{l{}}}\n\\toprule\n", "r".repeat(self.columns.len() - 1));
        text += &line(&self.columns);
        text += "\\midrule\n";
        self.rows.iter().for_each(|row| text += &line(row));
        text += "\\bottomrule\n\\end{tabular}\n";
        self.with_notes(text, "% ")
    }

    fn with_notes(&self, mut text: String, before: &str) -> String {
        if !self.notes.is_empty() {
            text.push('\n');
        }
        for note in &self.notes {
            let _ = writeln!(text, "{before}{note}");
        }
        text
    }
}

/// Text as LaTeX takes it.
fn escaped(text: &str) -> String {
    let mut escaped = String::new();
    for c in text.chars() {
        match c {
            '&' | '%' | '$' | '#' | '_' | '{' | '}' => {
                escaped.push('\\');
                escaped.push(c);
            }
            '\\' => escaped.push_str("\\textbackslash{}"),
            '~' => escaped.push_str("\\textasciitilde{}"),
            '^' => escaped.push_str("\\textasciicircum{}"),
            '<' => escaped.push_str("\\textless{}"),
            '>' => escaped.push_str("\\textgreater{}"),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn figures_are_found_where_each_command_writes_them() {
        let find = |name: &str, value: &Value| {
            MEASURES.iter().find(|it| it.name == name).unwrap().find(value)
        };
        let tuned = json!({"after": {"accuracy": 0.8, "interval_95": {"low": 0.7, "high": 0.9}, "loss": 0.4}});
        let found = find("accuracy", &tuned).unwrap();
        assert!((found.value - 80.0).abs() < 1e-9);
        assert!((found.interval_95.unwrap().low - 70.0).abs() < 1e-9);
        assert_eq!(find("loss", &tuned).unwrap().value, 0.4);
        let taught = json!({"at_swap": {"kl_nats_per_token": 0.5}, "stages": [
            {"after": {"kl_nats_per_token": 0.3}}, {"after": {"kl_nats_per_token": 0.1, "model": {"perplexity": 50.0}}}]});
        assert_eq!(find("kl", &taught).unwrap().value, 0.1, "the last stage's");
        assert_eq!(find("kl_before", &taught).unwrap().value, 0.5);
        assert_eq!(find("perplexity", &taught).unwrap().value, 50.0);
        assert!(find("accuracy", &taught).is_none());
    }

    #[test]
    fn a_table_is_safe_in_every_format() {
        let table = Table {
            columns: vec!["run".into(), "accuracy (%)".into()],
            rows: vec![vec!["a|b_c,\"d\"".into(), "80.0".into()]],
            notes: Vec::new(),
        };
        assert!(table.markdown().contains("a\\|b_c"));
        assert!(table.latex().contains("a|b\\_c") && table.latex().contains("accuracy (\\%)"));
        assert_eq!(table.csv().unwrap(), "run,accuracy (%)\n\"a|b_c,\"\"d\"\"\",80.0\n");
    }
}
