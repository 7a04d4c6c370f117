//! `attn plot`: pictures of result files. A kind of result is one file in `plot/` and one line in [`KINDS`].

mod ablation;
mod agreement;
pub(crate) mod attention;
mod benchmark;
mod blimp;
mod choice;
mod comparison;
mod conversion;
mod curves;
mod divergence;
pub(crate) mod entropy;
mod explanation;
mod heads;
mod leaderboard;
pub(crate) mod masks;
mod measures;
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
use attn_viz::{BarChart, HeatMap, Histogram, LineChart, Panels, Picture, Shades, Size, Theme};
use clap::builder::PossibleValue;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Value, json};

use crate::{
    args::{PlotArgs, ThemeChoice},
    haystack::short_name,
    run_dir::{SUMMARY_FILE, check_writable, result_in, write_json},
};

/// A result file, or the folder of a run.
pub(crate) struct Source {
    /// Where it is.
    path: PathBuf,
    /// What it is called in pictures of several: the shortest end of its path that no other has.
    pub(crate) name: String,
    pub(crate) value: Value,
}

impl Source {
    /// The result as a kind needs it.
    fn read<'a, T: Deserialize<'a>>(&'a self) -> Result<T> {
        T::deserialize(&self.value)
            .with_context(|| format!("`{}` is damaged, or of another version", self.path.display()))
    }

    /// A picture of it, or an error that says of what.
    fn drawn<T>(&self, picture: Result<T>) -> Result<T> {
        picture.with_context(|| format!("cannot draw `{}`", self.path.display()))
    }

    #[cfg(test)]
    fn of(name: &str, value: Value) -> Self {
        Self { path: name.into(), name: name.into(), value }
    }
}

/// The shortest end of each path that tells it from the others, and has a sign that says something.
pub(crate) fn names(paths: &[PathBuf], says: fn(char) -> bool) -> Vec<String> {
    let end = |path: &Path, n: usize| -> String {
        let parts: Vec<_> = path.components().map(|it| it.as_os_str().to_string_lossy()).collect();
        parts[parts.len().saturating_sub(n)..].join("/")
    };
    let name = |path: &PathBuf| {
        let longest = path.components().count();
        let fits = |n: &usize| {
            let name = end(path, *n);
            let n_alike = paths.iter().filter(|other| end(other, *n) == name).count();
            n_alike == 1 && name.chars().any(says)
        };
        end(path, (1..=longest).find(fits).unwrap_or(longest))
    };
    paths.iter().map(name).collect()
}

/// Numbers as result files have them, `null` where one is not finite.
trait Numbers: Sized {
    fn read<'de, D: Deserializer<'de>>(from: D) -> Result<Self, D::Error>;
}

impl Numbers for f64 {
    fn read<'de, D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        Ok(Option::deserialize(from)?.unwrap_or(Self::NAN))
    }
}

impl Numbers for f32 {
    fn read<'de, D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        Ok(Option::deserialize(from)?.unwrap_or(Self::NAN))
    }
}

impl<T: Numbers> Numbers for Vec<T> {
    fn read<'de, D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct One<T>(T);
        impl<'de, T: Numbers> Deserialize<'de> for One<T> {
            fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                T::read(from).map(Self)
            }
        }
        Ok(Vec::<One<T>>::deserialize(from)?.into_iter().map(|it| it.0).collect())
    }
}

/// Reads `null` as NaN.
fn numbers<'de, D: Deserializer<'de>, T: Numbers>(from: D) -> Result<T, D::Error> {
    T::read(from)
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
    pub(crate) fn maps(&self) -> &[HeatMap] {
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
    pub(crate) name: String,
    pub(crate) figure: Figure,
}

/// How a kind draws several files.
enum Draw {
    /// In the same pictures.
    Together(fn(&[Source]) -> Result<Vec<Drawn>>),
    /// Each in pictures of its own.
    Each(fn(&Source) -> Result<Vec<Drawn>>),
}

impl Drawn {
    fn new(name: impl Into<String>, figure: Figure) -> Self {
        // It becomes part of a file's name, and some are names of a result file.
        let name = name.into().replace(['/', '\\', '\0'], "-");
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
    /// Pictures of files of it.
    draw: Draw,
}

impl Kind {
    /// Sets of pictures, each with the place of the source after which it is named.
    fn draw(&self, sources: &[Source]) -> Result<Vec<(usize, Vec<Drawn>)>> {
        let some = |drawn: Vec<Drawn>| {
            ensure!(
                !drawn.is_empty(),
                "it holds nothing that `{}` draws ({})",
                self.name,
                self.about
            );
            Ok(drawn)
        };
        match (&self.draw, sources) {
            (Draw::Together(draw), [one]) => {
                Ok(vec![(0, one.drawn(draw(sources).and_then(some))?)])
            }
            (Draw::Together(draw), _) => Ok(vec![(0, draw(sources).and_then(some)?)]),
            (Draw::Each(draw), _) => sources
                .iter()
                .enumerate()
                .map(|(at, source)| Ok((at, source.drawn(draw(source).and_then(some))?)))
                .collect(),
        }
    }
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
    choice::KIND,
    explanation::KIND,
    divergence::KIND,
    scaling::KIND,
    roles::KIND,
    pruning::KIND,
    agreement::KIND,
    benchmark::KIND,
    blimp::KIND,
    comparison::KIND,
    entropy::KIND,
    leaderboard::KIND,
    masks::KIND,
    measures::KIND,
];

/// All kinds with what is drawn of each, for the command line.
pub(crate) fn kinds() -> Vec<PossibleValue> {
    KINDS.iter().map(|kind| PossibleValue::new(kind.name).help(kind.about)).collect()
}

/// An interval as results have it.
#[derive(Debug, Clone, Copy, Deserialize)]
struct Range {
    #[serde(deserialize_with = "numbers")]
    low: f64,
    #[serde(deserialize_with = "numbers")]
    high: f64,
}

/// A number with its interval.
#[derive(Debug, Clone, Copy, Deserialize)]
struct Measured {
    #[serde(deserialize_with = "numbers")]
    value: f64,
    /// None of a single row.
    interval_95: Option<Range>,
}

pub(crate) fn run(args: &PlotArgs, out: &mut dyn Write) -> Result<()> {
    let mut sources: Vec<Source> =
        args.files.iter().map(|path| open(path)).collect::<Result<_>>()?;
    for (source, name) in sources.iter_mut().zip(names(&args.files, char::is_alphanumeric)) {
        source.name = name;
    }
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
            source.path.display(),
            kind.name,
            kind.about
        );
    }
    let sets = kind.draw(&sources)?;
    if args.text {
        let all: Vec<&Drawn> = sets.iter().flat_map(|set| &set.1).collect();
        return show(&all, out);
    }
    let theme = args.theme.into();
    let all = paths(args, &sources, &sets)?;
    // What cannot be drawn is found before anything is written.
    for (_, source, drawn) in &all {
        source.drawn(drawn.figure.on(theme).svg().map_err(Into::into))?;
    }
    for (path, source, drawn) in all {
        let _made = check_writable(&path)?;
        source.drawn(drawn.figure.on(theme).save(&path).map_err(Into::into))?;
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
fn show(drawn: &[&Drawn], out: &mut dyn Write) -> Result<()> {
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

/// Where each picture goes, and what it is of.
fn paths<'a>(
    args: &PlotArgs,
    sources: &'a [Source],
    sets: &'a [(usize, Vec<Drawn>)],
) -> Result<Vec<(PathBuf, &'a Source, &'a Drawn)>> {
    let bases: Vec<PathBuf> = args
        .files
        .iter()
        .map(|file| if file.is_dir() { file.join("plot") } else { file.with_extension("") })
        .collect();
    // What tells the pictures of one file from those of another, in one folder.
    let ends: Vec<String> =
        names(&bases, char::is_alphanumeric).iter().map(|name| name.replace('/', "-")).collect();
    let n_pictures: usize = sets.iter().map(|set| set.1.len()).sum();
    let ending = args.out.as_ref().and_then(|out| out.extension());
    let ending = ending.map(|it| it.to_string_lossy().to_lowercase()).unwrap_or_default();
    let is_picture = ending == "png" || ending == "svg";
    if let Some(out) = &args.out
        && !is_picture
    {
        ensure!(
            !OTHERS.contains(&&ending[..]),
            "`{}` ends in neither .png nor .svg, the two kinds of pictures that are written\nhint: .svg is turned into \
             others without loss",
            out.display()
        );
        fs::create_dir_all(out).with_context(|| format!("cannot make `{}`", out.display()))?;
    }
    let extension = if ending == "svg" || args.svg { "svg" } else { "png" };
    let mut all: Vec<(PathBuf, &Source, &Drawn)> = Vec::new();
    for (at, drawn) in sets {
        let base = match &args.out {
            None => bases[*at].clone(),
            Some(out) if is_picture && sets.len() == 1 => out.with_extension(""),
            Some(out) if is_picture => {
                let stem = out.file_stem().unwrap_or_default().to_string_lossy();
                out.with_file_name(format!("{stem}-{}", ends[*at]))
            }
            Some(folder) if sets.len() == 1 => {
                folder.join(bases[*at].file_name().context("a result has a name")?)
            }
            Some(folder) => folder.join(&ends[*at]),
        };
        for one in drawn {
            let path = match &args.out {
                Some(out) if is_picture && n_pictures == 1 => out.clone(),
                _ => beside(&base, one, extension),
            };
            if let Some((_, other, _)) = all.iter().find(|it| it.0 == path) {
                bail!(
                    "pictures of `{}` and `{}` would both be `{}`\nhint: draw them one by one, each with an --out of its own",
                    other.path.display(),
                    sources[*at].path.display(),
                    path.display()
                );
            }
            all.push((path, &sources[*at], one));
        }
    }
    Ok(all)
}

fn beside(base: &Path, drawn: &Drawn, extension: &str) -> PathBuf {
    let name = base.file_name().unwrap_or_default().to_string_lossy();
    let name = match &drawn.name[..] {
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
    let is_svg = picture.extension().is_some_and(|it| it.eq_ignore_ascii_case("svg"));
    let extension = if is_svg { "svg" } else { "png" };
    for drawn in kind.draw(&[source])?.into_iter().flat_map(|set| set.1) {
        let path = beside(&picture.with_extension(""), &drawn, extension);
        drawn.figure.on(Theme::Light).save(&path)?;
        tracing::info!("wrote `{}`", path.display());
    }
    Ok(())
}

/// All pictures of a result or run, none where no kind draws it.
pub(crate) fn pictures(path: &Path) -> Result<Vec<Drawn>> {
    let mut sources = vec![open(path)?];
    // Of a run there is also what it came to.
    if let Some(result) = result_in(path).filter(|_| path.is_dir()) {
        sources.push(open(&result)?);
    }
    let mut drawn: Vec<(&str, Vec<Drawn>)> = Vec::new();
    for source in sources {
        if let Ok(kind) = kind_of(&source)
            && drawn.iter().all(|it| it.0 != kind.name)
        {
            let sets = kind.draw(&[source])?;
            drawn.push((kind.name, sets.into_iter().flat_map(|set| set.1).collect()));
        }
    }
    Ok(drawn.into_iter().flat_map(|it| it.1).collect())
}

fn kind_of(source: &Source) -> Result<&'static Kind> {
    let Some(kind) = KINDS.iter().find(|kind| (kind.reads)(&source.value)) else {
        bail!(
            "`{}` is no result that can be drawn\nhint: `attn plot --help` lists what is, under --kind",
            source.path.display()
        );
    };
    Ok(kind)
}

/// Whether a folder is that of a run, in stages or in one.
pub(crate) fn is_run(path: &Path) -> bool {
    let is_stage = |stage: &&str| path.join(stage).join(METRICS_FILE).exists();
    path.join(SUMMARY_FILE).exists() || STAGES.iter().any(is_stage)
}

/// Reads a result file, the metrics of a run, or a table of timings.
pub(crate) fn open(path: &Path) -> Result<Source> {
    let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
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
        // Predictions and the like are lines, too.
        let is_metrics = lines.iter().all(|line| line.get("metric").is_some());
        Ok(json!({ if is_metrics { "metrics" } else { "lines" }: lines }))
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
            let result = result_in(path);
            if all.is_empty() {
                // Of a sweep, and of runs whose metrics were not kept, there is what they came to.
                let result = result.with_context(|| {
                    format!(
                        "`{}` is no run: it has no `{METRICS_FILE}` with a line in it, and no result\nhint: name a run, or a result file; `attn report` takes folders of results",
                        path.display()
                    )
                })?;
                return Ok(Source {
                    path: path.to_owned(),
                    name,
                    value: parse(&read(&result)?, &result)?,
                });
            }
            if let Some(summary) = result {
                value["summary"] = parse(&read(&summary)?, &summary)?;
            }
            value
        }
        Some("jsonl") => lines(path)?,
        Some("csv") => table(&read(path)?, path)?,
        _ => parse(&read(path)?, path)?,
    };
    Ok(Source { path: path.to_owned(), name, value })
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

/// Holds that there is something for each head of each layer.
fn check_shape<T>(what: &str, heads: &[Vec<usize>], found: &[Vec<T>]) -> Result<()> {
    ensure!(
        heads.len() == found.len(),
        "there are heads of {} layers, and {what} of {}",
        heads.len(),
        found.len()
    );
    for (layer, (heads, found)) in heads.iter().zip(found).enumerate() {
        ensure!(
            heads.len() == found.len(),
            "layer {layer} has {} heads and {} {what}",
            heads.len(),
            found.len()
        );
    }
    Ok(())
}

/// The range of the colours of maps that compare by colour, none where all cells are alike.
fn common_range(maps: &[&HeatMap]) -> Option<(f64, f64)> {
    let cells = maps.iter().flat_map(|map| map.values.iter().flatten());
    let (low, high) = cells
        .filter(|it| it.is_finite())
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), &it| (low.min(it), high.max(it)));
    (low < high).then_some((low, high))
}

/// What the second map has more than the first, cell by cell.
fn difference(first: &HeatMap, second: &HeatMap, names: [&str; 2]) -> HeatMap {
    let rows = first.values.iter().zip(&second.values);
    HeatMap {
        title: "second \u{2212} first".into(),
        subtitle: format!("{} \u{2212} {}", names[1], names[0]),
        values: rows.map(|(a, b)| a.iter().zip(b).map(|(a, b)| b - a).collect()).collect(),
        notes: Vec::new(),
        shades: Shades::Diverging,
        range: None,
        ..first.clone()
    }
}

/// Letters of a part of a setting's name that fit on a line.
const LONG_PART: usize = 20;

/// The names of settings without what all of them have in common: `few_shot=8` of `model=m,few_shot=8` and `model=m,few_shot=32`.
fn told_apart(names: &[String]) -> Vec<String> {
    let parts: Vec<Vec<&str>> = names.iter().map(|name| name.split(',').collect()).collect();
    let is_common = |part: &&str| parts.len() > 1 && parts.iter().all(|of| of.contains(part));
    let own = |(name, parts): (&String, &Vec<&str>)| {
        let own: Vec<&str> = parts.iter().filter(|part| !is_common(part)).copied().collect();
        // Lines are broken at blanks.
        let broken = |part: &&str| match part.len() > LONG_PART {
            true => part.replace('=', "= "),
            false => (*part).to_owned(),
        };
        match own.is_empty() {
            true => name.clone(),
            false => own.iter().map(broken).collect::<Vec<_>>().join(", "),
        }
    };
    names.iter().zip(&parts).map(own).collect()
}

/// Room for the label of each bar.
fn bar_size(n_bars: usize) -> Size {
    let width = u32::try_from(n_bars).unwrap_or(u32::MAX).saturating_mul(150);
    Size { width: width.saturating_add(100).clamp(1200, 6000), ..Size::default() }
}

/// A number and its interval in a cell.
fn with_interval(value: f64, interval: Option<Range>) -> String {
    match interval {
        Some(Range { low, high }) => {
            format!("{}\n{} to {}", in_cell(value), in_cell(low), in_cell(high))
        }
        None => in_cell(value),
    }
}

/// A layer x head map: a row a layer, a column a head, nothing where a head was removed.
pub(crate) fn layer_head(heads: &[Vec<usize>], values: &[Vec<f64>]) -> Result<HeatMap> {
    check_shape("values", heads, values)?;
    let n_heads = heads.iter().flatten().max().map_or(0, |head| head + 1);
    let mut cells = vec![vec![f64::NAN; n_heads]; heads.len()];
    for (layer, (heads, values)) in heads.iter().zip(values).enumerate() {
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
