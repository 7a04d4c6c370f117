//! `attn compare`: what runs came to, side by side, and whether they differ by more than the rows that happened to be drawn.

use std::{
    fmt::Write as _,
    io::Write,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use attn_eval::{
    RowScore, loss_difference,
    stats::{Interval, StatsError, bootstrap_difference, discordant},
};
use serde::Serialize;
use serde_json::Value;

use crate::{
    args::{CompareArgs, TableFormat},
    origin::Origin,
    plot::draw_result,
    run_dir::{self, PREDICTIONS_FILE, SCHEMA, SUMMARY_FILE},
    sweep::{Answers, Line},
};

/// Resamples of the bootstrap of any difference, and their seed.
pub(crate) const N_RESAMPLES: usize = 10_000;
const SEED: u64 = 0;

/// Rows below which an interval over rows says little.
const FEW_ROWS: usize = 10;

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
    pub(crate) decimals: usize,
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
            // Earlier versions drew a single row again and again.
            let n_rows =
                [at(summary, folder), Some(summary)].into_iter().find_map(|it| it?.get("n_rows"));
            let is_single = n_rows.is_some_and(|n| n == 1);
            let interval_95 = interval_95.filter(|it| !is_single || it.low < it.high);
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
    #[serde(flatten)]
    origin: Origin,
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
    let _made = args.out.as_deref().map(run_dir::check_writable).transpose()?;
    let runs: Vec<Read> = args.runs.iter().map(|path| read(path)).collect::<Result<_>>()?;
    let known = |measure: &&Measure| runs.iter().any(|run| measure.find(&run.summary).is_some());
    let measures: Vec<&Measure> = MEASURES.iter().filter(known).collect();
    ensure!(
        !measures.is_empty(),
        "`{}` holds no figure that runs are compared by\nhint: name the folders of runs, or OUT.json of attn eval",
        runs[0].name
    );
    let mut report = Report { schema: SCHEMA, origin: Origin::now()?, runs: Vec::new() };
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
    let table = Table::of(&report.runs, &measures);
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
            let is_tested = report.runs.iter().any(|run| {
                run.against_first.as_ref().is_some_and(|against| against.difference.is_some())
            });
            if args.format == TableFormat::Json && is_tested {
                draw_result(path, path);
            }
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
    if a.rows.is_empty() {
        return Ok(none("no row has a label".into()));
    }
    // Kept predictions may be without their text: the same numbers and labels are not the same rows yet.
    if let Some(field) = differing(&first.summary, &other.summary) {
        return Ok(none(format!("they differ in `{field}`")));
    }
    let counts = discordant(&b.right, &a.right)?;
    let numbers = |right: &[bool]| -> Vec<f64> {
        right.iter().map(|&right| if right { 100.0 } else { 0.0 }).collect()
    };
    let (ours, theirs) = (numbers(&b.right), numbers(&a.right));
    let interval = match a.right.len() {
        1 => None,
        _ => Some(bootstrap_difference(&ours, &theirs, 0.95, N_RESAMPLES, SEED)?),
    };
    let more = counts.only_first as f64 - counts.only_second as f64;
    Ok(Against {
        of: "accuracy",
        why_not: None,
        n_rows: Some(a.right.len()),
        difference: Some(100.0 * more / a.right.len() as f64),
        difference_interval_95: interval,
        mcnemar_p: Some(counts.mcnemar_p),
    })
}

/// What summaries say of the rows that they report on: the field in which two differ, of those that both have.
fn differing(first: &Value, other: &Value) -> Option<&'static str> {
    // A run calls `source` what an evaluation calls `task`.
    let fields: [(&str, &[&str]); 5] = [
        ("source", &["source", "task"]),
        ("data", &["data"]),
        ("split", &["split"]),
        ("n_rows", &["n_report", "n_rows"]),
        ("max_len", &["max_len"]),
    ];
    fields.into_iter().find_map(|(field, names)| {
        let of =
            |value: &Value| names.iter().find_map(|&name| Some((name, value.get(name)?.clone())));
        let (a, b) = (of(first)?, of(other)?);
        (a.1 != b.1).then(|| if a.0 == b.0 { a.0 } else { field })
    })
}

/// Losses of tokens, row by row; why not, where rows are others.
fn losses(first: &Read, other: &Read, a: &[RowScore], b: &[RowScore]) -> Result<Against, String> {
    // Rows of the same place are the same where the text, and what of it is hidden, is.
    let is_same = |field: &&str| first.summary.get(*field) == other.summary.get(*field);
    let of_text = ["task", "data", "split", "limit", "max_len", "rows", "mask_seed"];
    if let Some(field) = of_text.iter().find(|field| !is_same(field)) {
        return Err(format!("they differ in `{field}`"));
    }
    for (read, rows) in [(first, a), (other, b)] {
        if rows.is_empty() {
            return Err(format!("`{}` has no rows", read.name));
        }
        if rows.iter().any(|row| row.tokens.is_empty()) {
            return Err(format!(
                "`{}` does not say which tokens its rows hold: run attn eval again",
                read.name
            ));
        }
    }
    let interval = loss_difference(b, a, N_RESAMPLES, SEED).map_err(|error| match error {
        StatsError::Unpaired { .. } => {
            "their rows hold other tokens: another text, or tokenizers that cut it in other ways"
                .to_owned()
        }
        error => error.to_string(),
    })?;
    let apart: f64 = b.iter().zip(a).map(|(b, a)| b.nats - a.nats).sum();
    let n_tokens: usize = a.iter().map(|row| row.n_tokens).sum();
    Ok(Against {
        of: "loss",
        why_not: None,
        n_rows: Some(a.len()),
        difference: Some(apart / n_tokens as f64),
        difference_interval_95: (a.len() > 1).then_some(interval),
        mcnemar_p: None,
    })
}

/// The report as cells.
struct Table {
    columns: Vec<String>,
    rows: Vec<Vec<Cell>>,
    /// What is to be said of each row; empty for nothing.
    of_rows: Vec<String>,
    /// What is to be said of all.
    notes: Vec<String>,
}

#[derive(Debug, Clone, PartialEq)]
enum Cell {
    Empty,
    Text(String),
    Number {
        /// With its interval, as it is read.
        shown: String,
        /// As a program reads it, and the ends of its interval.
        value: String,
        ends: Option<[String; 2]>,
    },
}

impl Cell {
    fn shown(&self) -> &str {
        match self {
            Self::Empty => "",
            Self::Text(text) | Self::Number { shown: text, .. } => text,
        }
    }
}

impl Table {
    fn of(runs: &[Run], measures: &[&Measure]) -> Self {
        let mut columns = vec!["run".to_owned()];
        columns.extend(measures.iter().map(|measure| measure.heading()));
        let is_of_loss = |run: &Run| run.against_first.as_ref().is_some_and(|it| it.of == "loss");
        let of_loss = runs.iter().any(is_of_loss);
        let unit = if of_loss { "nats per token" } else { "points" };
        columns.extend([format!("less the first ({unit})"), "p".to_owned()]);
        let rows = runs.iter().map(|run| {
            let mut row = vec![Cell::Text(run.run.clone())];
            row.extend(measures.iter().map(|measure| measure.cell(run)));
            let against = run.against_first.as_ref();
            row.push(against.map_or(Cell::Empty, |it| it.cell(if of_loss { 4 } else { 1 })));
            row.push(against.and_then(|it| it.mcnemar_p).map_or(Cell::Empty, |p| Cell::Number {
                shown: if p < 0.001 { "< 0.001".into() } else { format!("{p:.3}") },
                value: p.to_string(),
                ends: None,
            }));
            row
        });
        let rows: Vec<Vec<Cell>> = rows.collect();
        let of_row = |run: &Run| {
            let against = run.against_first.as_ref();
            match against.map(|it| (&it.why_not, it.n_rows)) {
                Some((Some(why), _)) => format!("no test, {why}"),
                Some((None, Some(1))) => "one row has no interval".into(),
                Some((None, Some(n))) if n < FEW_ROWS => {
                    format!("an interval over {n} rows says little")
                }
                _ => String::new(),
            }
        };
        let mut notes = Vec::new();
        let n_rows = |run: &Run| run.against_first.as_ref().and_then(|it| it.n_rows);
        if runs.iter().any(|run| n_rows(run).is_some()) {
            let of_p = " p: McNemar's exact test, one seed of each run.";
            notes.push(format!(
                "Intervals: 95 %; of differences by the paired bootstrap over rows.{}",
                if of_loss { "" } else { of_p }
            ));
        }
        // A column that says nothing of any run is left out.
        let says = |&at: &usize| rows.iter().any(|row| row[at] != Cell::Empty);
        let left: Vec<usize> = (0..columns.len()).filter(says).collect();
        Self {
            columns: left.iter().map(|&at| columns[at].clone()).collect(),
            rows: rows.iter().map(|row| left.iter().map(|&at| row[at].clone()).collect()).collect(),
            of_rows: runs.iter().map(of_row).collect(),
            notes,
        }
        .on_one_line()
    }

    /// Without what would begin another line, or steer a terminal.
    fn on_one_line(mut self) -> Self {
        let texts = self.columns.iter_mut().chain(&mut self.of_rows).chain(&mut self.notes);
        let cells = self.rows.iter_mut().flatten().filter_map(|cell| match cell {
            Cell::Text(text) => Some(text),
            _ => None,
        });
        for text in texts.chain(cells) {
            let breaks = |c: char| c.is_control() || matches!(c, '\u{2028}' | '\u{2029}');
            *text = text.replace(breaks, " ");
        }
        self
    }

    /// All cells, and all notes, as `escape` writes them.
    fn escaped(&self, escape: impl Fn(&str) -> String) -> (Vec<Vec<String>>, Vec<String>) {
        let mut lines = vec![self.columns.iter().map(|name| escape(name)).collect::<Vec<_>>()];
        let line = |row: &Vec<Cell>| row.iter().map(|cell| escape(cell.shown())).collect();
        lines.extend(self.rows.iter().map(line));
        let of_rows = self.rows.iter().zip(&self.of_rows).filter(|(_, note)| !note.is_empty());
        let of_rows = of_rows.map(|(row, note)| format!("{}: {note}", row[0].shown()));
        let notes = of_rows.chain(self.notes.iter().cloned()).map(|note| escape(&note)).collect();
        (lines, notes)
    }

    fn text(&self) -> String {
        let (lines, notes) = self.escaped(ToOwned::to_owned);
        let width = |at: usize| lines.iter().map(|cells| cells[at].chars().count()).max();
        let widths: Vec<usize> = (0..self.columns.len()).map(|at| width(at).unwrap_or(0)).collect();
        let line = |cells: &Vec<String>| {
            let cells = cells.iter().zip(&widths).map(|(cell, &width)| format!("{cell:<width$}"));
            cells.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
        };
        with_notes(lines.iter().map(line).collect(), &notes, "")
    }

    fn markdown(&self) -> String {
        let (lines, notes) = self.escaped(in_markdown);
        let line = |cells: &Vec<String>| format!("| {} |\n", cells.join(" | "));
        let mut text = line(&lines[0]);
        text += &format!("| {} |\n", vec!["---"; self.columns.len()].join(" | "));
        lines[1..].iter().for_each(|cells| text += &line(cells));
        with_notes(text, &notes, "")
    }

    /// Numbers and the ends of their intervals in columns of their own, and what is to be said of a row in the last.
    fn csv(&self) -> Result<String> {
        let ends = |cell: &Cell| matches!(cell, Cell::Number { ends: Some(_), .. });
        let has_ends: Vec<bool> =
            (0..self.columns.len()).map(|at| self.rows.iter().any(|row| ends(&row[at]))).collect();
        let has_notes = self.of_rows.iter().any(|note| !note.is_empty());
        let mut writer = csv::Writer::from_writer(Vec::new());
        let mut record = Vec::new();
        for (name, &has_ends) in self.columns.iter().zip(&has_ends) {
            record.push(no_formula(name));
            if has_ends {
                record.extend(["low", "high"].map(|end| no_formula(&format!("{name}, {end}"))));
            }
        }
        record.extend(has_notes.then(|| "note".to_owned()));
        writer.write_record(&record)?;
        for (row, note) in self.rows.iter().zip(&self.of_rows) {
            record.clear();
            for (cell, &has_ends) in row.iter().zip(&has_ends) {
                let (text, of_cell) = match cell {
                    Cell::Empty => (String::new(), None),
                    Cell::Text(text) => (no_formula(text), None),
                    Cell::Number { value, ends, .. } => (value.clone(), ends.clone()),
                };
                record.push(text);
                if has_ends {
                    record.extend(of_cell.unwrap_or_default());
                }
            }
            record.extend(has_notes.then(|| no_formula(note)));
            writer.write_record(&record)?;
        }
        Ok(String::from_utf8(writer.into_inner()?)?)
    }

    /// For the package `booktabs`.
    fn latex(&self) -> String {
        let (lines, notes) = self.escaped(in_latex);
        let line = |cells: &Vec<String>| format!("{} \\\\\n", cells.join(" & "));
        let mut text =
            format!("\\begin{{tabular}}{{l{}}}\n\\toprule\n", "r".repeat(self.columns.len() - 1));
        text += &line(&lines[0]);
        text += "\\midrule\n";
        lines[1..].iter().for_each(|cells| text += &line(cells));
        text += "\\bottomrule\n\\end{tabular}\n";
        with_notes(text, &notes, "% ")
    }
}

impl Measure {
    fn cell(&self, run: &Run) -> Cell {
        let Some(found) = run.measures.get(self.name) else { return Cell::Empty };
        let Some(value) = found["value"].as_f64() else { return Cell::Empty };
        let interval_95 = found
            .get("interval_95")
            .and_then(|it| Some(Interval { low: it["low"].as_f64()?, high: it["high"].as_f64()? }));
        let number = |value: f64| format!("{value:.*}", self.decimals);
        Cell::Number {
            shown: self.show(Found { value, interval_95 }),
            value: number(value),
            ends: interval_95.map(|it| [it.low, it.high].map(number)),
        }
    }
}

impl Against {
    /// The difference with its sign, which a program reads without.
    fn cell(&self, places: usize) -> Cell {
        let Some(value) = self.difference else { return Cell::Empty };
        let number = |value: f64| format!("{value:.places$}");
        let interval = self.difference_interval_95;
        let range = interval
            .map(|Interval { low, high }| format!(" ({low:+.places$} to {high:+.places$})"));
        Cell::Number {
            shown: format!("{value:+.places$}{}", range.unwrap_or_default()),
            value: number(value),
            ends: interval.map(|it| [it.low, it.high].map(number)),
        }
    }
}

fn with_notes(mut text: String, notes: &[String], before: &str) -> String {
    if !notes.is_empty() {
        text.push('\n');
    }
    for note in notes {
        let _ = writeln!(text, "{before}{note}");
    }
    text
}

/// Text that a spreadsheet takes for no formula.
fn no_formula(text: &str) -> String {
    match text.starts_with(['=', '+', '-', '@']) {
        true => format!("'{text}"),
        false => text.to_owned(),
    }
}

/// Text as Markdown takes it, in a cell and in a paragraph.
fn in_markdown(text: &str) -> String {
    let mut escaped = String::new();
    for (at, c) in text.char_indices() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '\\' | '|' | '`' | '*' | '[' | ']' | '#' => escaped.extend(['\\', c]),
            '-' | '+' | '=' | '~' if at == 0 && text.len() > 1 && !is_number(text) => {
                escaped.extend(['\\', c]);
            }
            c => escaped.push(c),
        }
    }
    escaped
}

/// Whether text begins with a number and its sign.
fn is_number(text: &str) -> bool {
    text[1..].starts_with(|c: char| c.is_ascii_digit())
}

/// Text as LaTeX takes it.
fn in_latex(text: &str) -> String {
    let mut escaped = String::new();
    for c in text.chars() {
        match c {
            '&' | '%' | '$' | '#' | '_' | '{' | '}' => escaped.extend(['\\', c]),
            // Behind the end of a line it would be an option of that.
            '[' | ']' => escaped.extend(['{', c, '}']),
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

    fn number(shown: &str, value: &str, ends: Option<[&str; 2]>) -> Cell {
        let ends = ends.map(|ends| ends.map(ToOwned::to_owned));
        Cell::Number { shown: shown.into(), value: value.into(), ends }
    }

    #[test]
    fn a_table_is_safe_in_every_format() {
        let table = Table {
            columns: vec!["run".into(), "accuracy (%)".into()],
            rows: vec![vec![Cell::Text("a|b_c,\"d\"".into()), number("80.0", "80.0", None)]],
            of_rows: vec![String::new()],
            notes: Vec::new(),
        };
        assert!(table.markdown().contains("a\\|b_c"));
        assert!(table.latex().contains("a|b\\_c") && table.latex().contains("accuracy (\\%)"));
        assert_eq!(table.csv().unwrap(), "run,accuracy (%)\n\"a|b_c,\"\"d\"\"\",80.0\n");
    }

    #[test]
    fn a_name_of_any_signs_stays_text_in_cells_and_notes() {
        let name = "=x\r\n\\input{y}\u{2028}<img onerror=z>|`[&%\u{1b}[2J";
        let table = Table {
            columns: vec!["run".into(), "less the first".into()],
            rows: vec![
                vec![Cell::Text(name.into()), Cell::Empty],
                vec![
                    Cell::Text("b".into()),
                    number("+1.0 (-2.0 to +3.0)", "1.0", Some(["-2.0", "3.0"])),
                ],
            ],
            of_rows: vec!["no test, why\nnot".into(), String::new()],
            notes: vec!["All.".into()],
        }
        .on_one_line();
        let all = [table.text(), table.markdown(), table.latex(), table.csv().unwrap()];
        for (text, n_lines) in all.iter().zip([6, 7, 11, 3]) {
            assert_eq!(text.lines().count(), n_lines, "{text}");
            assert!(!text.contains(['\r', '\u{1b}', '\u{2028}']), "{text}");
        }
        let [text, markdown, latex, csv] = all;
        assert!(text.contains(": no test, why not\n"));
        assert!(markdown.contains("&lt;img onerror=z&gt;\\|\\`\\[&amp;%"), "{markdown}");
        assert!(markdown.contains("\\\\input") && !markdown.contains("<img"));
        assert!(markdown.contains("| +1.0 (-2.0 to +3.0) |"), "{markdown}");
        let escaped = "=x  \\textbackslash{}input\\{y\\} \\textless{}img";
        assert_eq!(latex.matches(escaped).count(), 2, "in the cell and in the note: {latex}");
        assert!(latex.lines().all(|line| !line.starts_with("\\input")));
        let lines: Vec<&str> = csv.lines().collect();
        assert_eq!(
            lines[0],
            "run,less the first,\"less the first, low\",\"less the first, high\",note"
        );
        assert!(
            lines[1].starts_with("'=x") && lines[1].ends_with(",,,,\"no test, why not\""),
            "{csv}"
        );
        assert_eq!(lines[2], "b,1.0,-2.0,3.0,");
    }

    #[test]
    fn few_rows_are_said_and_one_has_no_interval() {
        let answers = |right: &[bool]| {
            let rows = (0..right.len()).map(|i| (i, 0, String::new(), None)).collect();
            Some(Kept::Answers(Answers { rows, right: right.to_vec() }))
        };
        let read = |right: &[bool], summary: Value| Read {
            name: "r".into(),
            summary,
            kept: answers(right),
        };
        let compared =
            |a: &[bool], b: &[bool]| against(&read(a, json!({})), &read(b, json!({}))).unwrap();
        let one = compared(&[true], &[false]);
        assert_eq!(one.difference, Some(-100.0));
        assert!(one.difference_interval_95.is_none());
        let few = compared(&[true, false, true], &[false, false, true]);
        assert!(few.difference_interval_95.is_some());
        let shown = |against: Against| {
            let run = |against_first| Run {
                run: "r".into(),
                measures: serde_json::Map::new(),
                against_first,
            };
            Table::of(&[run(None), run(Some(against))], &[]).text()
        };
        assert!(shown(one).contains("r: one row has no interval"));
        assert!(shown(few).contains("r: an interval over 3 rows says little"));
        assert!(!shown(compared(&[true; 10], &[false; 10])).contains("says little"));

        let single = json!({"language": {"loss_nats_per_token": 2.0, "n_rows": 1,
            "loss_interval_95": {"low": 2.0, "high": 2.0}}});
        let loss = MEASURES.iter().find(|it| it.name == "loss").unwrap();
        assert!(loss.find(&single).unwrap().interval_95.is_none());
    }

    #[test]
    fn accuracies_are_paired_where_they_are_of_the_same_data() {
        let read = |summary: Value| {
            let rows = vec![(0, 1, String::new(), None), (1, 0, String::new(), None)];
            let kept = Some(Kept::Answers(Answers { rows, right: vec![true, false] }));
            Read { name: "r".into(), summary, kept }
        };
        let run = json!({"source": "sst2", "split": "test", "n_report": 2, "max_len": 64});
        let compared = |other: Value| against(&read(run.clone()), &read(other)).unwrap();
        assert_eq!(compared(run.clone()).of, "accuracy");
        assert_eq!(compared(json!({"task": "sst2", "n_rows": 2})).of, "accuracy");
        for (field, value) in [
            ("source", json!("other")),
            ("split", json!("train")),
            ("n_report", json!(3)),
            ("max_len", json!(32)),
        ] {
            let mut other = run.clone();
            other[field] = value;
            let found = compared(other);
            assert_eq!(found.why_not.unwrap(), format!("they differ in `{field}`"));
        }
        let found = compared(json!({"task": "mnli"}));
        assert_eq!(found.why_not.unwrap(), "they differ in `source`");
    }
}
