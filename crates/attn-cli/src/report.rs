//! `attn report`: runs and results as one page that opens from disk.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use attn_viz::{
    HeatMap,
    report::{
        AttentionViewer, Block, Cell, Column, Figure as Shown, Head, Layer, ModelAttention, Report,
        Sample, Section, Table,
    },
};
use serde_json::Value;

use crate::{
    args::ReportArgs,
    compare::MEASURES,
    monitor::grouped,
    plot::{
        Drawn, Figure,
        attention::{Attention, OfLayer},
        in_cell, is_run, names, open, pictures,
    },
    run_dir::{
        CONFIG_FILE, ENVIRONMENT_FILE, FIRST_FILES, FIRST_FOLDERS, SUMMARY_FILE, SWEEP_RESULT,
        SWEEP_TABLE, check_writable, parent_of, result_in,
    },
};

/// Cells of a picture up to which its numbers stand behind it.
const MOST_CELLS: usize = 20_000;

/// Characters of a text by which a sample is called.
const NAME: usize = 80;

/// What is told of a run or result beside its figures, where it has it.
const FACTS: [&str; 30] = [
    "model",
    "base_model",
    "teacher",
    "after",
    "model_type",
    "task",
    "source",
    "split",
    "method",
    "replace",
    "scope",
    "form",
    "kv_heads_before",
    "kv_heads_after",
    "cache_bytes_per_token_before",
    "cache_bytes_per_token_after",
    "n_rows",
    "n_train",
    "n_report",
    "max_len",
    "seed",
    "seeds",
    "majority_accuracy",
    "n_parameters",
    "n_trained",
    "device",
    "dtype",
    "libtorch",
    "attn",
    "elapsed_s",
];

/// What is told of where a run took place.
const ENVIRONMENT: [&str; 7] =
    ["started_utc", "commit", "libtorch", "device", "dtype", "threads", "cpu"];

/// A run or result, read.
struct Read {
    name: String,
    path: PathBuf,
    /// A run's summary, or the result itself.
    summary: Value,
    /// Its pictures.
    drawn: Vec<Drawn>,
}

pub(crate) fn run(args: &ReportArgs, out: &mut dyn Write) -> Result<()> {
    ensure!(
        args.out.extension().is_some_and(|it| it == "html"),
        "`--out` is `{}`, expected a name that ends in .html",
        args.out.display()
    );
    let _made = check_writable(&args.out)?;
    let mut found = Found::default();
    for path in &args.results {
        found.add(path)?;
    }
    let Found { mut all, left_out } = found;
    let paths: Vec<PathBuf> = all.iter().map(|one| one.path.clone()).collect();
    for (one, name) in all.iter_mut().zip(names(&paths, char::is_alphabetic)) {
        one.name = name;
    }
    let mut sections = Vec::new();
    if let Some(table) = overview(&all) {
        let words = "Each run or result with its figures, 95 % intervals in brackets; where a file has the model as it was, that stands \
                     beside. Click on a heading to sort.";
        sections.push(Section {
            title: "Figures".into(),
            blocks: vec![Block::Text(words.into()), Block::Table(table)],
        });
    }
    let samples = samples(&all)?;
    if !samples.is_empty() {
        let words = "Attention weights, token by token. Weights alone mislead: a head may look at a token whose value is small. \
                     attn heatmap --measure norm tells how much it takes.";
        sections.push(Section {
            title: "Attention".into(),
            blocks: vec![Block::Text(words.into()), Block::Attention(AttentionViewer { samples })],
        });
    }
    for one in &all {
        sections.push(section(one)?);
    }
    if !left_out.is_empty() {
        let file = |(path, why): &(PathBuf, String)| match &why[..] {
            "" => path.display().to_string(),
            why => format!("{} ({why})", path.display()),
        };
        let files: Vec<String> = left_out.iter().map(file).collect();
        let words = format!("nothing that a report shows is in {}", files.join(", "));
        tracing::warn!("{words}");
        sections.push(Section {
            title: "Left out".into(),
            blocks: vec![Block::Text(format!("N{}.", &words[1..]))],
        });
    }
    let report = Report {
        title: args
            .title
            .clone()
            .unwrap_or_else(|| names(&args.results, char::is_alphabetic).join(", ")),
        subtitle: match all.len() {
            1 => format!("attn {}; one run or result", env!("CARGO_PKG_VERSION")),
            n => format!("attn {}; {n} runs or results", env!("CARGO_PKG_VERSION")),
        },
        sections,
    };
    report.save(&args.out)?;
    writeln!(out, "{}", args.out.display())?;
    Ok(())
}

/// What there is to report on.
#[derive(Default)]
struct Found {
    all: Vec<Read>,
    /// Files of a folder in which nothing is shown.
    left_out: Vec<(PathBuf, String)>,
}

impl Found {
    /// A result, a run, or all of those in a folder that is no run.
    fn add(&mut self, path: &Path) -> Result<()> {
        if !path.is_dir() {
            self.all.push(read(path)?);
            return Ok(());
        }
        let before = self.all.len();
        if is_run(path) {
            self.all.push(read(path)?);
        }
        self.gather(path)?;
        ensure!(
            self.all.len() > before,
            "there is no run or result in `{}`\nhint: name the folder that a command was given as --out, or a result file",
            path.display()
        );
        Ok(())
    }

    /// All of a folder. What cannot be read or shown of it is named in the end, with the reason.
    fn gather(&mut self, folder: &Path) -> Result<()> {
        let entries = fs::read_dir(folder).and_then(Iterator::collect::<Result<Vec<_>, _>>);
        let entries = entries.with_context(|| format!("cannot read `{}`", folder.display()))?;
        // A link may lead back to where it stands.
        let is_link = |it: &fs::DirEntry| it.file_type().is_ok_and(|it| it.is_symlink());
        let mut paths: Vec<PathBuf> =
            entries.into_iter().filter(|it| !is_link(it)).map(|it| it.path()).collect();
        paths.sort();
        let told_with_it = match is_run(folder) || folder.join(SWEEP_RESULT).exists() {
            true => OF_RUNS.concat(),
            false => Vec::new(),
        };
        for path in paths {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if name.starts_with('.') || told_with_it.contains(&&name[..]) {
                continue;
            }
            if path.is_dir() {
                // A model is what results are of.
                if path.join("config.json").exists() {
                    continue;
                }
                if is_run(&path) {
                    self.keep(&path);
                }
                self.gather(&path)?;
            } else if path.extension().is_some_and(|it| it == "json" || it == "csv") {
                self.keep(&path);
            }
        }
        Ok(())
    }

    /// Takes what can be shown.
    fn keep(&mut self, path: &Path) {
        match read(path) {
            Ok(one) if is_shown(&one) => self.all.push(one),
            Ok(_) => self.left_out.push((path.to_owned(), String::new())),
            Err(error) => {
                let why = error.chain().map(ToString::to_string).collect::<Vec<_>>().join(": ");
                let first = why.lines().next().unwrap_or_default().to_owned();
                self.left_out.push((path.to_owned(), first));
            }
        }
    }
}

/// What stands in the folder of a run and is told with it, or tells nothing of what came of it.
const OF_RUNS: [&[&str]; 3] = [
    &[SUMMARY_FILE, SWEEP_TABLE, "model", "best", "plots", "configs"],
    &FIRST_FILES,
    &FIRST_FOLDERS,
];

/// Whether a report has figures, pictures or a table of a file.
fn is_shown(one: &Read) -> bool {
    MEASURES.iter().any(|it| it.find(&one.summary).is_some())
        || tables(&one.summary).next().is_some()
        || one.path.file_name().is_some_and(|it| it == ENVIRONMENT_FILE)
        || !one.drawn.is_empty()
}

fn read(path: &Path) -> Result<Read> {
    let file = match path.is_dir() {
        true => result_in(path).unwrap_or_else(|| path.join(SUMMARY_FILE)),
        false => path.to_owned(),
    };
    let text = fs::read_to_string(&file).with_context(|| {
        format!(
            "cannot read `{}`\nhint: name the folder of a run that has ended, or a result file",
            file.display()
        )
    })?;
    let summary = match file.extension().is_some_and(|it| it == "csv") {
        true => open(&file)?.value,
        false => serde_json::from_str(&text)
            .with_context(|| format!("`{}` is not JSON", file.display()))?,
    };
    let drawn = match path.file_name().is_some_and(|it| it == ENVIRONMENT_FILE) {
        true => Vec::new(),
        false => pictures(path).with_context(|| format!("cannot draw `{}`", path.display()))?,
    };
    Ok(Read { name: String::new(), path: path.to_owned(), summary, drawn })
}

/// A line a run with the figures that any of them has.
fn overview(all: &[Read]) -> Option<Table> {
    let has_any = |one: &&Read| MEASURES.iter().any(|it| it.find(&one.summary).is_some());
    let all: Vec<&Read> = all.iter().filter(has_any).collect();
    let measures: Vec<_> = MEASURES
        .iter()
        .filter(|measure| all.iter().any(|one| measure.find(&one.summary).is_some()))
        .collect();
    if measures.is_empty() {
        return None;
    }
    let mut columns =
        vec![Column::text("result"), Column::text("model"), Column::text("attention")];
    columns.extend(measures.iter().map(|measure| Column::number(measure.heading())));
    let row = |one: &&Read| {
        let model =
            ["model", "base_model", "name"].iter().find_map(|key| one.summary.get(*key)?.as_str());
        let mut cells = vec![
            Cell::text(&one.name),
            Cell::text(model.unwrap_or_default()),
            Cell::text(attention(&one.summary).unwrap_or_default()),
        ];
        cells.extend(measures.iter().map(|measure| match measure.find(&one.summary) {
            Some(found) => Cell::number(measure.show(found), found.value),
            None => Cell::text(""),
        }));
        cells
    };
    Some(Table { caption: "Runs and results".into(), columns, rows: all.iter().map(row).collect() })
}

/// The attention kinds of a model, once where all layers have one.
fn attention(summary: &Value) -> Option<String> {
    // Of `attn choose` what each layer got.
    let chosen = summary.get("choice").and_then(Value::as_array).map(|choice| {
        let layers = choice.iter().enumerate();
        layers
            .map(|(layer, at)| {
                at.as_u64().map_or(Value::Null, |at| {
                    summary["layers"][layer][at as usize]["attention"].clone()
                })
            })
            .collect::<Vec<_>>()
    });
    let layers = match &chosen {
        Some(layers) => layers,
        None => summary.get("attention")?.as_array()?,
    };
    let mut kinds: Vec<String> =
        layers.iter().filter_map(|it| Some(it.get("kind")?.as_str()?.to_owned())).collect();
    kinds.dedup();
    Some(kinds.join(", "))
}

fn section(one: &Read) -> Result<Section> {
    let mut blocks = Vec::new();
    if one.path.file_name().is_some_and(|it| it == ENVIRONMENT_FILE) {
        return Ok(Section { title: one.name.clone(), blocks: vec![environment(&one.summary)] });
    }
    let facts = facts(&one.summary, &FACTS);
    if !facts.is_empty() {
        blocks.push(Block::Facts(facts));
    }
    blocks.extend(tables(&one.summary).map(Block::Table));
    let n_cells =
        one.drawn.iter().flat_map(|it| it.figure.maps()).map(|it| it.values.len().pow(2)).sum();
    let is_viewed = is_attention(&one.summary) && MOST_CELLS < n_cells;
    if is_viewed {
        let words = "Its maps are in the viewer above; attn plot draws them as a picture.";
        blocks.push(Block::Text(words.into()));
    }
    for drawn in one.drawn.iter().filter(|_| !is_viewed) {
        let svg = |theme| drawn.figure.on(theme).svg();
        let (data, left_out) = match data(&drawn.figure) {
            Ok(data) => (data, None),
            Err(why) => (None, Some(why)),
        };
        blocks.push(Block::Figure(Shown {
            light: svg(attn_viz::Theme::Light)?,
            dark: svg(attn_viz::Theme::Dark)?,
            caption: caption(&drawn.figure),
            data,
        }));
        blocks.extend(left_out.map(Block::Text));
    }
    // Of a sweep what it came to is a file in its folder.
    let home = match one.path.file_name().is_some_and(|it| it == SWEEP_RESULT) {
        true => parent_of(&one.path),
        false => &one.path,
    };
    if home.is_dir() {
        let file = home.join(ENVIRONMENT_FILE);
        if file.exists() {
            let text = fs::read_to_string(&file)
                .with_context(|| format!("cannot read `{}`", file.display()))?;
            let value: Value = serde_json::from_str(&text)
                .with_context(|| format!("`{}` is not JSON", file.display()))?;
            blocks.push(environment(&value));
        }
        for name in [CONFIG_FILE, "sweep.toml"] {
            let config = home.join(name);
            if config.exists() {
                let text = fs::read_to_string(&config)
                    .with_context(|| format!("cannot read `{}`", config.display()))?;
                blocks.push(Block::Code { name: format!("{name} of {}", one.name), text });
            }
        }
    }
    ensure!(
        !blocks.is_empty(),
        "`{}` holds nothing that a report shows: no figure, no picture, no setting\nhint: name the folder of a run that \
         has ended, or a result file; results/SCHEMA.md tells what they hold",
        one.path.display()
    );
    Ok(Section { title: one.name.clone(), blocks })
}

/// Where a run took place, and by which command.
fn environment(value: &Value) -> Block {
    let mut all = facts(value, &ENVIRONMENT);
    if let Some(arguments) = value.get("arguments").and_then(Value::as_array) {
        let words: Vec<&str> = arguments.iter().filter_map(Value::as_str).collect();
        all.push(("command".into(), words.join(" ")));
    }
    Block::Facts(all)
}

/// Whether a result is of attention weights, which the viewer shows.
fn is_attention(summary: &Value) -> bool {
    summary["layers"][0].get("weights").is_some()
}

/// What is best read as a table.
fn tables(summary: &Value) -> impl Iterator<Item = Table> {
    [settings(summary), laws(summary), rows(summary), cells(summary)].into_iter().flatten()
}

/// A list of results, one a line: their texts and numbers.
fn rows(summary: &Value) -> Option<Table> {
    let all: Vec<_> = summary.as_array()?.iter().filter_map(Value::as_object).collect();
    let is_shown = |value: &Value| value.is_number() || value.is_string() || value.is_boolean();
    let mut names: Vec<&String> = Vec::new();
    for (name, _) in all.iter().flat_map(|row| row.iter().filter(|it| is_shown(it.1))) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let cell = |value: Option<&Value>| match value {
        Some(Value::Number(number)) => {
            let value = number.as_f64().unwrap_or(f64::NAN);
            Cell::number(number.to_string(), value)
        }
        Some(Value::String(text)) => Cell::text(text),
        Some(Value::Bool(it)) => Cell::text(it.to_string()),
        _ => Cell::text(""),
    };
    let columns = names.iter().map(|name| {
        let is_number = all.iter().filter_map(|row| row.get(*name)).all(Value::is_number);
        if is_number { Column::number(*name) } else { Column::text(*name) }
    });
    let lines = all.iter().map(|row| names.iter().map(|name| cell(row.get(*name))).collect());
    let caption = "One a line".into();
    (!names.is_empty() && names.len() * all.len() <= MOST_CELLS).then(|| Table {
        caption,
        columns: columns.collect(),
        rows: lines.collect(),
    })
}

/// A table that was written as one.
fn cells(summary: &Value) -> Option<Table> {
    let names: Vec<&str> =
        summary.get("columns")?.as_array()?.iter().filter_map(Value::as_str).collect();
    let all = summary.get("rows")?.as_array()?;
    let cell = |value: &Value| {
        let text = value.as_str().unwrap_or_default();
        match text.parse::<f64>() {
            Ok(number) => Cell::number(text, number),
            Err(_) => Cell::text(text),
        }
    };
    let lines: Vec<Vec<Cell>> =
        all.iter().map(|row| row.as_array().into_iter().flatten().map(cell).collect()).collect();
    let is_number =
        |at: usize| lines.iter().any(|row| row.get(at).is_some_and(|it| it.key.is_some()));
    let columns = names.iter().enumerate().map(|(at, name)| match is_number(at) {
        true => Column::number(*name),
        false => Column::text(*name),
    });
    (!lines.is_empty() && names.len() * lines.len() <= MOST_CELLS).then(|| Table {
        caption: "The table".into(),
        columns: columns.collect(),
        rows: lines.clone(),
    })
}

/// What a sweep has of each setting, over its seeds: a field, its factor, heading and decimals.
const OF_SETTINGS: [(&str, f64, &str, usize); 8] = [
    ("before", 100.0, "accuracy before (%)", 1),
    ("after", 100.0, "after (%)", 1),
    ("kl_at_swap", 1.0, "KL at the swap (nats a token)", 4),
    ("kl_after_transfer", 1.0, "after transfer", 4),
    ("kl_after_tune", 1.0, "after tune", 4),
    ("agreement", 100.0, "same likeliest token (%)", 1),
    ("loss_nats_per_token", 1.0, "loss (nats a token)", 4),
    ("entropy_ratio", 1.0, "entropy, of the teacher's", 3),
];

/// The settings of a sweep, each with its means over seeds.
fn settings(summary: &Value) -> Option<Table> {
    let settings = summary.get("settings")?.as_array()?;
    let mean = |setting: &Value, field: &str| setting.get(field)?.get("mean")?.as_f64();
    let shown: Vec<_> = OF_SETTINGS
        .iter()
        .filter(|it| settings.iter().any(|setting| mean(setting, it.0).is_some()))
        .collect();
    let mut columns = vec![Column::text("setting"), Column::number("seeds")];
    columns.extend(shown.iter().map(|it| Column::number(it.2)));
    let row = |setting: &Value| {
        let n_runs = setting.get("runs").and_then(Value::as_array).map_or(0, Vec::len);
        let name = setting.get("name").and_then(Value::as_str).unwrap_or_default();
        let mut cells = vec![Cell::text(name), Cell::number(n_runs.to_string(), n_runs as f64)];
        cells.extend(shown.iter().map(|&&(field, factor, _, decimals)| {
            let Some(mean) = mean(setting, field) else { return Cell::text("") };
            let value = format!("{:.decimals$}", factor * mean);
            let std = setting[field].get("std").and_then(Value::as_f64);
            let spread = std.map_or(String::new(), |it| format!(" ± {:.decimals$}", factor * it));
            Cell::number(value + &spread, factor * mean)
        }));
        cells
    };
    let caption = "Settings, means over seeds ± their standard deviation".into();
    (!shown.is_empty()).then(|| Table {
        caption,
        columns,
        rows: settings.iter().map(row).collect(),
    })
}

/// What `attn verify` and `attn explain` found, a line a law or test.
fn laws(summary: &Value) -> Option<Table> {
    let all = ["laws", "checks"].iter().find_map(|it| summary.get(*it)?.as_array())?;
    let text = |one: &Value, names: [&str; 2]| {
        let found = names.iter().find_map(|it| one.get(*it)?.as_str()).unwrap_or_default();
        Cell::text(found.replace('_', " "))
    };
    let number = |value: Option<&Value>| match value.and_then(Value::as_f64) {
        None => Cell::text(""),
        Some(value) => Cell::number(in_cell(value), value),
    };
    let row = |one: &Value| {
        let most = one.get("tolerance").or_else(|| one.get("bounds")?.get(1));
        let place = ["place", "meaning"].iter().find_map(|it| one.get(*it)?.as_str());
        vec![
            text(one, ["law", "test"]),
            text(one, ["found", "verdict"]),
            number(one.get("error").or_else(|| one.get("value"))),
            number(most),
            Cell::text(place.unwrap_or_default()),
        ]
    };
    let columns = vec![
        Column::text("law"),
        Column::text("found"),
        Column::number("value"),
        Column::number("at most"),
        Column::text("where"),
    ];
    let caption = "Laws and tests".into();
    (!all.is_empty()).then(|| Table { caption, columns, rows: all.iter().map(row).collect() })
}

fn facts(value: &Value, names: &[&str]) -> Vec<(String, String)> {
    let told = |name: &&str| {
        let text = match value.get(*name)? {
            Value::String(text) => text.clone(),
            Value::Number(number) => match number.as_f64() {
                Some(it) if it.fract() != 0.0 => format!("{it:.3}"),
                _ => number.to_string(),
            },
            Value::Bool(it) => it.to_string(),
            list @ Value::Array(all) if all.iter().all(Value::is_number) => list.to_string(),
            _ => return None,
        };
        Some((name.replace('_', " "), text))
    };
    let mut facts: Vec<(String, String)> = names.iter().filter_map(told).collect();
    if let Some(kinds) = attention(value) {
        facts.push(("attention".into(), kinds));
    }
    facts
}

fn caption(figure: &Figure) -> String {
    let (title, subtitle) = match figure {
        Figure::Heat(it) => (&it.title, &it.subtitle),
        Figure::Panels(it) => (&it.title, &it.subtitle),
        Figure::Lines(it) => (&it.title, &it.subtitle),
        Figure::Bars(it) => (&it.title, &it.subtitle),
        Figure::Histogram(it) => (&it.title, &it.subtitle),
    };
    match (title.as_str(), subtitle.as_str()) {
        (title, "") => format!("{title}."),
        (title, subtitle) => format!("{title}: {subtitle}."),
    }
}

/// The numbers behind a picture; where there are so many that nobody reads them, or they make no one table, that.
fn data(figure: &Figure) -> Result<Option<Table>, String> {
    let number = |value: f64| match value.is_nan() {
        true => Cell::text(""),
        false => Cell::number(value.to_string(), value),
    };
    let of_map = |map: &HeatMap, name: Option<&str>| -> Vec<Vec<Cell>> {
        let row = |(row, values): (&String, &Vec<f64>)| {
            let mut cells: Vec<Cell> = name.into_iter().map(Cell::text).collect();
            cells.push(Cell::text(row));
            cells.extend(values.iter().map(|&value| number(value)));
            cells
        };
        map.rows.iter().zip(&map.values).map(row).collect()
    };
    let numbers = |names: &[String]| names.iter().map(Column::number).collect::<Vec<_>>();
    let (columns, rows) = match figure {
        Figure::Heat(map) => {
            let columns = [vec![Column::text(heading(map))], numbers(&map.columns)].concat();
            (columns, of_map(map, None))
        }
        Figure::Panels(panels) => {
            let Some(first) = panels.maps.first() else { return Ok(None) };
            if panels.maps.iter().any(|map| map.columns != first.columns) {
                return Err("The maps of this picture have other columns each: their numbers stand in the result's \
                            file, not here."
                    .into());
            }
            let columns =
                [vec![Column::text("map"), Column::text(heading(first))], numbers(&first.columns)];
            (
                columns.concat(),
                panels.maps.iter().flat_map(|map| of_map(map, Some(&map.title))).collect(),
            )
        }
        Figure::Lines(chart) => {
            let mut rows = Vec::new();
            for series in &chart.series {
                for (i, (x, y)) in series.points.iter().enumerate() {
                    let band = series.band.as_ref().map_or((f64::NAN, f64::NAN), |band| band[i]);
                    let name = if series.name.is_empty() { "raw" } else { &series.name };
                    rows.push(vec![
                        Cell::text(name),
                        number(*x),
                        number(*y),
                        number(band.0),
                        number(band.1),
                    ]);
                }
            }
            let columns = [chart.x_label.as_str(), chart.y_label.as_str(), "low", "high"];
            ([vec![Column::text("curve")], columns.map(Column::number).to_vec()].concat(), rows)
        }
        Figure::Bars(chart) => {
            let row = |bar: &attn_viz::Bar| {
                let (low, high) = bar.interval.unwrap_or((f64::NAN, f64::NAN));
                vec![Cell::text(&bar.label), number(bar.value), number(low), number(high)]
            };
            let columns = [chart.y_label.as_str(), "low", "high"].map(Column::number).to_vec();
            ([vec![Column::text("of")], columns].concat(), chart.bars.iter().map(row).collect())
        }
        Figure::Histogram(chart) => {
            let mut rows = Vec::new();
            for set in &chart.sets {
                rows.extend(
                    set.values.iter().map(|&value| vec![Cell::text(&set.name), number(value)]),
                );
            }
            (vec![Column::text("set"), Column::number(&chart.x_label)], rows)
        }
    };
    let n_cells = columns.len() * rows.len();
    if n_cells > MOST_CELLS {
        return Err(format!(
            "The table of this picture would have {} cells, and {} are the most that are shown: its numbers stand in the \
             result's file, not here.",
            grouped(n_cells),
            grouped(MOST_CELLS)
        ));
    }
    Ok((n_cells > 0).then(|| Table { caption: caption(figure), columns, rows }))
}

/// What rows and columns of a map are.
fn heading(map: &HeatMap) -> String {
    match (map.y_label.as_str(), map.x_label.as_str()) {
        ("", "") => "row".into(),
        (y, "") => y.into(),
        (y, x) => format!("{y} \\ {x}"),
    }
}

/// What attends to what in a sample, and what the numbers are.
#[derive(PartialEq)]
struct Which {
    rows: Vec<String>,
    columns: Vec<String>,
    measure: String,
}

impl Which {
    /// The text, the one that it attends to where that is another, and the measure.
    fn name(&self) -> String {
        // Tokens that say where a word begins need no blanks between them.
        let text = |tokens: &[String]| -> String {
            let text = match tokens.iter().any(|token| token.starts_with('▁')) {
                true => tokens.concat().replace('▁', " "),
                false => tokens.join(" ").replace(" ##", ""),
            };
            text.trim().chars().take(NAME).collect()
        };
        let Self { rows, columns, measure } = self;
        match rows == columns {
            true => format!("{} ({measure})", text(rows)),
            false => format!("{} \u{2192} {} ({measure})", text(rows), text(columns)),
        }
    }
}

/// The texts of all attention files, each with the models that read it.
fn samples(all: &[Read]) -> Result<Vec<Sample>> {
    let mut samples: Vec<(Which, Vec<ModelAttention>)> = Vec::new();
    for one in all.iter().filter(|one| is_attention(&one.summary)) {
        let file: Attention = serde_json::from_value(one.summary.clone()).with_context(|| {
            format!("`{}` is damaged, or of another version", one.path.display())
        })?;
        // Layers that attend to another text than others are a sample of their own.
        let mut of_file: Vec<(Which, ModelAttention)> = Vec::new();
        for layer in &file.layers {
            let OfLayer { rows, columns, .. } = layer;
            let same =
                of_file.iter().position(|(it, _)| it.rows == *rows && it.columns == *columns);
            let at = same.unwrap_or_else(|| {
                let (rows, columns) = (rows.clone(), columns.clone());
                let model = ModelAttention {
                    model: file.model.clone(),
                    rows: rows.clone(),
                    columns: columns.clone(),
                    layers: Vec::new(),
                };
                of_file.push((Which { rows, columns, measure: file.measure.clone() }, model));
                of_file.len() - 1
            });
            of_file[at].1.layers.push(shown_layer(layer));
        }
        for (which, model) in of_file {
            match samples.iter_mut().find(|(it, _)| *it == which) {
                Some((_, models)) => models.push(model),
                None => samples.push((which, vec![model])),
            }
        }
    }
    let sample = |(which, models): (Which, _)| Sample { name: which.name(), models };
    Ok(samples.into_iter().map(sample).collect())
}

fn shown_layer(layer: &OfLayer) -> Layer {
    let head = |(name, weights): (&String, &Vec<Vec<f32>>)| Head {
        name: match &name[..] {
            "mean" => "mean of its heads".into(),
            name => format!("head {name}"),
        },
        weights: weights.concat(),
    };
    Layer {
        name: format!("layer {}", layer.layer),
        heads: layer.heads.iter().zip(&layer.weights).map(head).collect(),
        note: layer.note.clone().unwrap_or_default(),
    }
}
