//! `attn plot`: pictures of result files. A kind of result is one file in `plot/` and one line in [`KINDS`].

mod ablation;
pub(crate) mod attention;
mod conversion;
mod curves;
mod divergence;
mod heads;
mod needle;
mod patch;
mod prune_curve;
mod pruning;
mod roles;
mod scaling;
mod shift;
mod sweep;

use std::{
    fs,
    io::{IsTerminal, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use attn_train::METRICS_FILE;
use attn_viz::{BarChart, HeatMap, Histogram, LineChart, Panels, Picture, Theme};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Value, json};

use crate::{
    args::{PlotArgs, ThemeChoice},
    haystack::short_name,
    plots::short,
    run_dir::{SUMMARY_FILE, write_json},
};

/// A result file, or the folder of a run.
pub(crate) struct Source {
    /// What it is called in pictures of several.
    pub(crate) name: String,
    pub(crate) value: Value,
}

impl Source {
    /// The result as a kind needs it.
    fn read<T: DeserializeOwned>(&self) -> Result<T> {
        serde_json::from_value(self.value.clone())
            .with_context(|| format!("`{}` is damaged, or of another version", self.name))
    }
}

/// A picture, before it is known what for.
#[derive(Debug, Clone)]
pub(crate) enum Figure {
    Heat(HeatMap),
    Panels(Panels),
    Lines(LineChart),
    Bars(BarChart),
    Histogram(Histogram),
}

impl Figure {
    /// The picture on such a ground.
    pub(crate) fn on(&self, theme: Theme) -> Box<dyn Picture> {
        match self.clone() {
            Self::Heat(it) => Box::new(HeatMap { theme, ..it }),
            Self::Panels(it) => Box::new(Panels { theme, ..it }),
            Self::Lines(it) => Box::new(LineChart { theme, ..it }),
            Self::Bars(it) => Box::new(BarChart { theme, ..it }),
            Self::Histogram(it) => Box::new(Histogram { theme, ..it }),
        }
    }

    /// The heat maps in it.
    fn maps(&self) -> &[HeatMap] {
        match self {
            Self::Heat(map) => std::slice::from_ref(map),
            Self::Panels(panels) => &panels.maps,
            Self::Lines(_) | Self::Bars(_) | Self::Histogram(_) => &[],
        }
    }
}

/// A picture of results.
#[derive(Debug)]
pub(crate) struct Drawn {
    /// What sets it apart from other pictures of the same results; empty for the first.
    pub(crate) name: &'static str,
    pub(crate) figure: Figure,
}

impl Drawn {
    fn new(name: &'static str, figure: Figure) -> Self {
        Self { name, figure }
    }
}

/// A kind of result.
pub(crate) struct Kind {
    /// Its name on the command line.
    pub(crate) name: &'static str,
    /// What is drawn of it.
    pub(crate) about: &'static str,
    /// Whether a file is of this kind.
    reads: fn(&Value) -> bool,
    /// Pictures of one or more files of it.
    draw: fn(&[Source]) -> Result<Vec<Drawn>>,
}

/// Where a run's metrics are: in its folder, or in those of its stages.
const STAGES: [&str; 3] = ["", "transfer", "tune"];

/// All kinds; the first that reads a file draws it.
pub(crate) const KINDS: &[Kind] = &[
    heads::KIND,
    ablation::KIND,
    needle::KIND,
    prune_curve::KIND,
    patch::KIND,
    shift::KIND,
    conversion::KIND,
    attention::KIND,
    sweep::KIND,
    curves::KIND,
    divergence::KIND,
    scaling::KIND,
    roles::KIND,
    pruning::KIND,
];

/// The names of all kinds, for the command line.
pub(crate) fn kinds() -> Vec<&'static str> {
    KINDS.iter().map(|kind| kind.name).collect()
}

/// An interval as results have it.
#[derive(Debug, Clone, Copy, Deserialize)]
struct Range {
    low: f64,
    high: f64,
}

/// A number with its interval.
#[derive(Debug, Clone, Copy, Deserialize)]
struct Measured {
    value: f64,
    interval_95: Range,
}

pub(crate) fn run(args: &PlotArgs, out: &mut dyn Write) -> Result<()> {
    let sources: Vec<Source> = args.files.iter().map(|path| open(path)).collect::<Result<_>>()?;
    let kind = match &args.kind {
        Some(name) => {
            KINDS.iter().find(|kind| kind.name == name).context("clap knows the names")?
        }
        None => kind_of(&sources[0])?,
    };
    for source in &sources {
        ensure!(
            (kind.reads)(&source.value),
            "`{}` is no result that `{}` draws ({})\nhint: results of one kind share a picture; draw others by themselves",
            source.name,
            kind.name,
            kind.about
        );
    }
    let drawn = (kind.draw)(&sources)?;
    if args.text {
        return show(&drawn, out);
    }
    let theme = args.theme.into();
    for (drawn, path) in drawn.iter().zip(paths(args, &drawn)?) {
        drawn.figure.on(theme).save(&path)?;
        writeln!(out, "{}", path.display())?;
    }
    Ok(())
}

impl From<ThemeChoice> for Theme {
    fn from(choice: ThemeChoice) -> Self {
        match choice {
            ThemeChoice::Light => Self::Light,
            ThemeChoice::Dark => Self::Dark,
        }
    }
}

/// Characters of a line where stdout is no terminal.
const WIDTH: usize = 100;

/// Prints heat maps: in colours on a terminal, as signs elsewhere.
fn show(drawn: &[Drawn], out: &mut dyn Write) -> Result<()> {
    let stdout = std::io::stdout();
    let colors = stdout.is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let columns = rustix::termios::tcgetwinsize(&stdout).map_or(0, |size| size.ws_col.into());
    let width = if columns > 0 { columns } else { WIDTH };
    let maps: Vec<&HeatMap> = drawn.iter().flat_map(|drawn| drawn.figure.maps()).collect();
    ensure!(
        !maps.is_empty(),
        "these results are drawn as curves or bars, which `--text` has no way to show\nhint: leave --text out, and look at the file"
    );
    for map in maps {
        writeln!(out, "{}", map.text(width, colors)?)?;
    }
    Ok(())
}

/// Endings of pictures that are not written: no folder is meant.
const OTHERS: [&str; 8] = ["pdf", "jpg", "jpeg", "gif", "webp", "eps", "tiff", "html"];

/// Where each picture goes.
fn paths(args: &PlotArgs, drawn: &[Drawn]) -> Result<Vec<PathBuf>> {
    let first = &args.files[0];
    let base = match first.is_dir() {
        true => first.join("plot"),
        false => first.with_extension(""),
    };
    let base = match &args.out {
        None => base,
        Some(out) if out.extension().is_some_and(|it| it == "png" || it == "svg") => {
            if let [_] = drawn {
                return Ok(vec![out.clone()]);
            }
            out.with_extension("")
        }
        Some(out) if out.extension().is_some_and(|it| OTHERS.iter().any(|other| it == *other)) => {
            bail!(
                "`{}` ends in neither .png nor .svg, the two kinds of pictures that are written\nhint: .svg is turned into \
                 others without loss",
                out.display()
            )
        }
        Some(folder) => {
            fs::create_dir_all(folder)
                .with_context(|| format!("cannot make `{}`", folder.display()))?;
            folder.join(base.file_name().context("a result has a name")?)
        }
    };
    let is_svg = args.out.as_ref().and_then(|out| out.extension()).is_some_and(|it| it == "svg");
    let extension = if is_svg || args.svg { "svg" } else { "png" };
    Ok(drawn.iter().map(|drawn| beside(&base, drawn, extension)).collect())
}

fn beside(base: &Path, drawn: &Drawn, extension: &str) -> PathBuf {
    let name = base.file_name().unwrap_or_default().to_string_lossy();
    let name = match drawn.name {
        "" => format!("{name}.{extension}"),
        of => format!("{name}-{of}.{extension}"),
    };
    base.with_file_name(name)
}

/// Writes a result and draws it beside the file, where there is a picture of its kind. Says where both are.
///
/// The first picture goes to `picture`, where that is given.
pub(crate) fn write_result(
    path: &Path,
    value: &impl Serialize,
    picture: Option<&Path>,
) -> Result<()> {
    write_json(path, value)?;
    tracing::info!("wrote `{}`", path.display());
    draw_result(path, picture.unwrap_or(path));
    Ok(())
}

/// Draws a result that has been written, where there is a picture of its kind, into `picture`, its ending apart, and says where.
pub(crate) fn draw_result(path: &Path, picture: &Path) {
    // The result is safe; a picture can be drawn again.
    if let Err(error) = draw_beside(path, picture) {
        tracing::warn!(
            "cannot draw `{}`: {error:#}\nhint: attn plot draws it again",
            path.display()
        );
    }
}

fn draw_beside(path: &Path, picture: &Path) -> Result<()> {
    let source = open(path)?;
    let Ok(kind) = kind_of(&source) else { return Ok(()) };
    let extension = if picture.extension().is_some_and(|it| it == "svg") { "svg" } else { "png" };
    for drawn in (kind.draw)(&[source])? {
        let path = beside(&picture.with_extension(""), &drawn, extension);
        drawn.figure.on(Theme::Light).save(&path)?;
        tracing::info!("wrote `{}`", path.display());
    }
    Ok(())
}

/// All pictures of a result or run, none where no kind draws it.
pub(crate) fn pictures(path: &Path) -> Result<Vec<Drawn>> {
    if path.is_dir() && !STAGES.iter().any(|stage| path.join(stage).join(METRICS_FILE).exists()) {
        return Ok(Vec::new());
    }
    let source = open(path)?;
    match kind_of(&source) {
        Ok(kind) => (kind.draw)(&[source]),
        Err(_) => Ok(Vec::new()),
    }
}

fn kind_of(source: &Source) -> Result<&'static Kind> {
    let Some(kind) = KINDS.iter().find(|kind| (kind.reads)(&source.value)) else {
        let known: Vec<String> =
            KINDS.iter().map(|kind| format!("{}: {}", kind.name, kind.about)).collect();
        bail!("`{}` is no result that can be drawn\nhint: {}", source.name, known.join("; "));
    };
    Ok(kind)
}

/// Reads a result file, the metrics of a run, or a table of timings.
pub(crate) fn open(path: &Path) -> Result<Source> {
    let name = short(&path.display().to_string());
    let read = |path: &Path| {
        fs::read_to_string(path).with_context(|| format!("cannot read `{}`", path.display()))
    };
    let parse = |text: &str, path: &Path| -> Result<Value> {
        serde_json::from_str(text).with_context(|| format!("`{}` is not JSON", path.display()))
    };
    let lines = |path: &Path| -> Result<Value> {
        let text = read(path)?;
        // A run that goes on may have written half a line.
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        let lines = whole.lines().map(|line| parse(line, path)).collect::<Result<Vec<_>>>()?;
        Ok(json!({ "metrics": lines }))
    };
    let extension = path.extension().map(|it| it.to_string_lossy().to_lowercase());
    let value = match extension.as_deref() {
        _ if path.is_dir() => {
            let mut value = json!({ "metrics": [] });
            let all = value["metrics"].as_array_mut().expect("made above");
            for stage in &STAGES {
                let metrics = path.join(stage).join(METRICS_FILE);
                if !metrics.exists() {
                    continue;
                }
                let found = lines(&metrics)?;
                for mut line in found["metrics"].as_array().into_iter().flatten().cloned() {
                    if !stage.is_empty() {
                        line["stage"] = (*stage).into();
                    }
                    all.push(line);
                }
            }
            ensure!(
                !all.is_empty(),
                "`{}` is no run: it has no `{METRICS_FILE}`\nhint: name the folder that a command was given as --out, or a result file",
                path.display()
            );
            let summary = path.join(SUMMARY_FILE);
            if summary.exists() {
                value["summary"] = parse(&read(&summary)?, &summary)?;
            }
            value
        }
        Some("jsonl") => lines(path)?,
        Some("csv") => table(&read(path)?, path)?,
        _ => parse(&read(path)?, path)?,
    };
    Ok(Source { name, value })
}

/// A table as the names of its columns and its rows.
fn table(text: &str, path: &Path) -> Result<Value> {
    let mut reader = csv::Reader::from_reader(text.as_bytes());
    let damaged = || format!("`{}` is no table", path.display());
    let columns: Vec<String> =
        reader.headers().with_context(damaged)?.iter().map(str::to_owned).collect();
    let mut rows = Vec::new();
    for record in reader.records() {
        let record = record.with_context(damaged)?;
        rows.push(record.iter().map(str::to_owned).collect::<Vec<_>>());
    }
    Ok(json!({ "columns": columns, "rows": rows }))
}

/// What a model or file is called in a picture: the last part of its path that is no `model`.
pub(crate) fn called(path: &str) -> &str {
    let path = path.trim_end_matches('/');
    let parent = path.strip_suffix("/model").filter(|it| !it.is_empty()).unwrap_or(path);
    short_name(parent)
}

/// A layer x head map: a row a layer, a column a head, nothing where a head was removed.
pub(crate) fn layer_head(heads: &[Vec<usize>], values: &[Vec<f64>]) -> Result<HeatMap> {
    let n_heads = heads.iter().flatten().max().map_or(0, |head| head + 1);
    let mut cells = vec![vec![f64::NAN; n_heads]; heads.len()];
    for (layer, (heads, values)) in heads.iter().zip(values).enumerate() {
        ensure!(
            heads.len() == values.len(),
            "layer {layer} has {} heads and {} values",
            heads.len(),
            values.len()
        );
        for (&head, &value) in heads.iter().zip(values) {
            cells[layer][head] = value;
        }
    }
    Ok(HeatMap {
        x_label: "head".into(),
        y_label: "layer".into(),
        rows: (0..heads.len()).map(|layer| layer.to_string()).collect(),
        columns: (0..n_heads).map(|head| head.to_string()).collect(),
        values: cells,
        ..HeatMap::default()
    })
}

/// A number in a cell.
pub(crate) fn in_cell(value: f64) -> String {
    match value.abs() {
        0.0 => "0".into(),
        x if x < 1e-3 => format!("{value:.0e}"),
        x if x < 1.0 => format!("{value:.3}"),
        x if x < 100.0 => format!("{value:.2}"),
        _ => format!("{value:.0}"),
    }
    .replace('-', "\u{2212}")
}
