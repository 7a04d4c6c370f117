//! What the runs of a sweep say together: `sweep.json`, `sweep.csv` and the table.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use attn_eval::stats::{
    Discordant, Interval, Paired, compare_over_seeds, discordant, mean_interval, spread,
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{
    Failure,
    plan::{Finished, Plan},
};
use crate::{compare::N_RESAMPLES, monitor::grouped, plot::write_result, run_dir};

/// Seed of the bootstrap.
const BOOTSTRAP_SEED: u64 = 0;

/// Pairs of settings up to which all are compared; of more, neighbours, and each with the best.
const MOST_PAIRS: usize = 15;

/// `sweep.json`.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    schema: u32,
    /// The file.
    sweep: PathBuf,
    attn: &'static str,
    /// The rows reported on.
    rows: String,
    seeds: Vec<u64>,
    n_runs: usize,
    settings: Vec<Scored>,
    comparisons: Vec<Comparison>,
    /// Pairs of settings that are not among them.
    #[serde(skip)]
    comparisons_left: usize,
    failed: Vec<Failed>,
}

/// A setting over its seeds.
#[derive(Debug, Serialize)]
struct Scored {
    name: String,
    /// The `[[run]]` that it belongs to, and what that does not set: where it lies in the grid.
    #[serde(skip)]
    place: (String, Map<String, Value>),
    /// What it sets.
    set: Map<String, Value>,
    /// Absent where no run has finished.
    before: Option<Figure>,
    after: Option<Figure>,
    runs: Vec<Run>,
}

/// A figure over seeds.
#[derive(Debug, Serialize)]
pub(super) struct Figure {
    pub(super) n: usize,
    pub(super) mean: f64,
    pub(super) std: Option<f64>,
    interval_95: Option<Interval>,
}

/// A finished run.
#[derive(Debug, Serialize)]
struct Run {
    folder: String,
    seed: u64,
    before: f64,
    after: f64,
    after_loss: f64,
    /// The accuracy of always saying the most frequent class of its rows.
    majority: f64,
    n_labelled: usize,
    selected_step: u64,
    total_steps: u64,
    elapsed_s: f64,
    /// Of the program that ran it.
    commit: Option<String>,
}

/// What `env.json` says, as far as it is told.
#[derive(Deserialize)]
pub(super) struct Environment {
    pub(super) commit: Option<String>,
}

/// Two settings on the same rows.
#[derive(Debug, Serialize)]
struct Comparison {
    first: String,
    second: String,
    /// Mean over seeds of the accuracy after training, first less second.
    difference: f64,
    /// Absent where each seed reports on rows of its own.
    interval_95: Option<Interval>,
    seeds: Vec<OfSeed>,
}

#[derive(Debug, Serialize)]
struct OfSeed {
    seed: u64,
    #[serde(flatten)]
    counts: Discordant,
}

#[derive(Debug, Serialize)]
pub(super) struct Failed {
    pub(super) folder: String,
    pub(super) how: String,
}

/// A line of `predictions.jsonl`, as far as it is compared.
#[derive(Debug, Deserialize)]
pub(crate) struct Line {
    index: usize,
    label: Option<i64>,
    predicted: i64,
    #[serde(default)]
    text: String,
    #[serde(default)]
    pair: Option<String>,
}

/// The labelled rows that a run reports on, and which it got right.
pub(crate) struct Answers {
    pub(crate) rows: Vec<(usize, i64, String, Option<String>)>,
    pub(crate) right: Vec<bool>,
}

impl Report {
    pub(super) fn new(plan: &Plan, dir: &Path, file: &Path, failures: &[Failure]) -> Result<Self> {
        let mut settings = Vec::new();
        let mut answers: Vec<Vec<(u64, Answers)>> = Vec::new();
        for (place, setting) in plan.settings.iter().enumerate() {
            let (mut runs, mut of_setting) = (Vec::new(), Vec::new());
            for planned in plan.runs.iter().filter(|run| run.setting == place) {
                let run_dir = dir.join(&planned.folder);
                let Some(finished) = Finished::read(&run_dir)? else { continue };
                of_setting.push((planned.seed, Answers::read(&run_dir)?));
                let environment =
                    run_dir::read_json::<Environment>(&run_dir.join(run_dir::ENVIRONMENT_FILE))?;
                let commit = environment.and_then(|environment| environment.commit);
                runs.push(Run::new(planned.folder.clone(), planned.seed, &finished, commit));
            }
            let value =
                |value: &toml::Value| serde_json::to_value(value).context("cannot write JSON");
            let set = setting.values.iter().map(|(key, of)| Ok((key.clone(), value(of)?)));
            let set: Map<String, Value> = set.collect::<Result<_>>()?;
            let of_grid = set.iter().filter(|(key, _)| setting.is_of_grid(key));
            let of_grid = of_grid.map(|(key, value)| (key.clone(), value.clone())).collect();
            settings.push(Scored {
                name: setting.name.clone(),
                place: (setting.run.clone(), of_grid),
                set,
                before: Figure::of(runs.iter().map(|run| run.before))?,
                after: Figure::of(runs.iter().map(|run| run.after))?,
                runs,
            });
            answers.push(of_setting);
        }
        let mut comparisons = Vec::new();
        let (chosen, comparisons_left) = pairs(&settings);
        for (first, second) in chosen {
            let names = [first, second].map(|place| settings[place].name.clone());
            match Comparison::of(&names, &answers[first], &answers[second])? {
                Some(comparison) => comparisons.push(comparison),
                None => tracing::warn!(
                    "`{}` and `{}` report on different rows, or share no seed: there is no paired test",
                    names[0],
                    names[1]
                ),
            }
        }
        let failed = failures
            .iter()
            .map(|Failure { folder, how }| Failed { folder: folder.clone(), how: how.clone() });
        Ok(Self {
            schema: run_dir::SCHEMA,
            sweep: file.to_owned(),
            attn: env!("CARGO_PKG_VERSION"),
            rows: plan.rows.clone(),
            seeds: plan.seeds.clone(),
            n_runs: plan.runs.len(),
            settings,
            comparisons,
            comparisons_left,
            failed: failed.collect(),
        })
    }

    /// Writes `sweep.json` and `sweep.csv`.
    pub(super) fn write(&self, dir: &Path) -> Result<()> {
        write_result(&dir.join(run_dir::SWEEP_RESULT), self, None)?;
        run_dir::write(&dir.join(run_dir::SWEEP_TABLE), self.csv().as_bytes())
    }

    /// A line a finished run.
    fn csv(&self) -> String {
        let keys = keys(self.settings.iter().map(|setting| &setting.set));
        let mut text = line(
            ["setting", "seed"]
                .into_iter()
                .map(ToOwned::to_owned)
                .chain(keys.iter().map(|key| (*key).clone()))
                .chain(
                    [
                        "before_accuracy",
                        "after_accuracy",
                        "after_loss",
                        "majority_accuracy",
                        "n_labelled",
                        "selected_step",
                        "total_steps",
                        "elapsed_s",
                        "folder",
                    ]
                    .map(ToOwned::to_owned),
                ),
        );
        for setting in &self.settings {
            for run in &setting.runs {
                let head = [setting.name.clone(), run.seed.to_string()];
                let tail = [
                    run.before.to_string(),
                    run.after.to_string(),
                    run.after_loss.to_string(),
                    run.majority.to_string(),
                    run.n_labelled.to_string(),
                    run.selected_step.to_string(),
                    run.total_steps.to_string(),
                    run.elapsed_s.to_string(),
                    run.folder.clone(),
                ];
                text += &line(head.into_iter().chain(values(&keys, &setting.set)).chain(tail));
            }
        }
        text
    }

    pub(super) fn print(&self, out: &mut dyn Write) -> Result<()> {
        let n_rows = self.settings.iter().flat_map(|setting| &setting.runs).next();
        let (n_rows, majority) = n_rows.map_or((0, 0.), |run| (run.n_labelled, run.majority));
        writeln!(
            out,
            "{}: {n_rows} rows, {:.1} % of them of the most frequent class",
            self.rows,
            100. * majority
        )?;
        writeln!(out)?;
        let names = self.settings.iter().map(|setting| setting.name.chars().count());
        let width = names.max().unwrap_or(0).max("setting".len());
        writeln!(
            out,
            "  {:<width$}  seeds  {:<16}  {:<16}  95 % interval of the mean",
            "setting", "accuracy before", "after"
        )?;
        for setting in &self.settings {
            let shown = |figure: &Option<Figure>| figure.as_ref().map_or("-".into(), Figure::show);
            let interval = setting.after.as_ref().and_then(|figure| figure.interval_95);
            let row = format!(
                "  {:<width$}  {:>5}  {:<16}  {:<16}  {}",
                setting.name,
                setting.runs.len(),
                shown(&setting.before),
                shown(&setting.after),
                interval.map_or("-".into(), |interval| range(interval, false)),
            );
            writeln!(out, "{}", row.trim_end())?;
        }
        if self.settings.iter().any(|setting| setting.runs.len() > 1) {
            writeln!(out)?;
            writeln!(
                out,
                "± is the standard deviation over seeds, the interval Student's t over seeds."
            )?;
        }
        if self.comparisons.is_empty() {
            return Ok(());
        }
        let label = |pair: &Comparison| format!("{} − {}", pair.first, pair.second);
        let width = self.comparisons.iter().map(|pair| label(pair).chars().count()).max();
        let width = width.unwrap_or(0).max("after, on the same rows".len());
        writeln!(out)?;
        writeln!(
            out,
            "  {:<width$}  {:>10}  {:<16}  McNemar's p, by seed",
            "after, on the same rows", "difference", "95 % interval"
        )?;
        for pair in &self.comparisons {
            let tests =
                pair.seeds.iter().map(|of| format!("{} ({})", p(of.counts.mcnemar_p), of.seed));
            writeln!(
                out,
                "  {:<width$}  {:>9}%  {:<16}  {}",
                label(pair),
                signed(100. * pair.difference),
                pair.interval_95.map_or("-".into(), |interval| range(interval, true)),
                tests.collect::<Vec<_>>().join("  ")
            )?;
        }
        writeln!(out)?;
        writeln!(
            out,
            "The interval is the paired bootstrap over rows of the mean over seeds; p is one for each seed, as"
        )?;
        writeln!(
            out,
            "a pool would count each row once a seed, and is not corrected for the number of pairs."
        )?;
        if self.comparisons.iter().any(|pair| pair.interval_95.is_none()) {
            writeln!(
                out,
                "Where seeds report on rows of their own there is no interval over rows."
            )?;
        }
        if self.comparisons_left > 0 {
            writeln!(
                out,
                "Of many pairs only those that differ in one key or in the run alone, and each with the best: which is \
                 the best was seen on these rows. {} left out.",
                grouped(self.comparisons_left)
            )?;
        }
        Ok(())
    }
}

impl Run {
    fn new(folder: String, seed: u64, finished: &Finished, commit: Option<String>) -> Self {
        Self {
            folder,
            seed,
            before: finished.before.accuracy,
            after: finished.after.accuracy,
            after_loss: finished.after.loss,
            majority: finished.majority_accuracy,
            n_labelled: finished.after.n_labelled,
            selected_step: finished.selected_step,
            total_steps: finished.total_steps,
            elapsed_s: finished.elapsed_s,
            commit,
        }
    }
}

impl Figure {
    pub(super) fn of(values: impl Iterator<Item = f64>) -> Result<Option<Self>> {
        let values: Vec<f64> = values.collect();
        if values.is_empty() {
            return Ok(None);
        }
        let found = spread(&values)?;
        let interval_95 = mean_interval(&values, 0.95)?;
        Ok(Some(Self { n: found.n, mean: found.mean, std: found.std, interval_95 }))
    }

    fn show(&self) -> String {
        match self.std {
            Some(std) => format!("{:.1} ± {:.1} %", 100. * self.mean, 100. * std),
            None => format!("{:.1} %", 100. * self.mean),
        }
    }
}

impl Comparison {
    /// Of two settings under the seeds that both have; `None` where there is none, or under one of them the two report
    /// on different rows.
    fn of(
        [first, second]: &[String; 2],
        a: &[(u64, Answers)],
        b: &[(u64, Answers)],
    ) -> Result<Option<Self>> {
        let under = |seed: u64| b.iter().find(|(other, _)| *other == seed);
        let common: Vec<(u64, &Answers, &Answers)> =
            a.iter().filter_map(|(seed, a)| Some((*seed, a, &under(*seed)?.1))).collect();
        let Some((_, model, _)) = common.first() else { return Ok(None) };
        if common.iter().any(|(_, a, b)| a.rows != b.rows) {
            return Ok(None);
        }
        let (difference, interval_95, counts) = match common
            .iter()
            .all(|(_, a, _)| a.rows == model.rows)
        {
            true => {
                let right = |side: fn(&(u64, &Answers, &Answers)) -> Vec<bool>| -> Vec<Vec<bool>> {
                    common.iter().map(side).collect()
                };
                let (a, b) =
                    (right(|(_, a, _)| a.right.clone()), right(|(_, _, b)| b.right.clone()));
                let Paired { difference, interval, seeds } =
                    compare_over_seeds(&a, &b, 0.95, N_RESAMPLES, BOOTSTRAP_SEED)?;
                // One row drawn again and again is no interval.
                (difference, (model.right.len() > 1).then_some(interval), seeds)
            }
            false => {
                let counts = common.iter().map(|(_, a, b)| discordant(&a.right, &b.right));
                let counts = counts.collect::<Result<Vec<_>, _>>()?;
                let of_seed = |(counts, (_, a, _)): (&Discordant, &(u64, &Answers, &Answers))| {
                    (counts.only_first as f64 - counts.only_second as f64) / a.right.len() as f64
                };
                let sum: f64 = counts.iter().zip(&common).map(of_seed).sum();
                (sum / common.len() as f64, None, counts)
            }
        };
        let seeds = common.iter().map(|(seed, ..)| *seed).zip(counts);
        Ok(Some(Self {
            first: first.clone(),
            second: second.clone(),
            difference,
            interval_95,
            seeds: seeds.map(|(seed, counts)| OfSeed { seed, counts }).collect(),
        }))
    }
}

impl Answers {
    pub(crate) fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(run_dir::PREDICTIONS_FILE);
        let shown = path.display();
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read `{shown}`"))?;
        let lines = text.lines().map(serde_json::from_str).collect::<Result<_, _>>();
        Ok(Self::of(lines.with_context(|| format!("`{shown}` is damaged"))?))
    }

    /// Of predictions as a run, or an evaluation, keeps them.
    pub(crate) fn of(lines: Vec<Line>) -> Self {
        let labelled = lines.into_iter().filter_map(|line| {
            let Line { index, label, predicted, text, pair } = line;
            label.map(|label| ((index, label, text, pair), label == predicted))
        });
        let (rows, right) = labelled.unzip();
        Self { rows, right }
    }
}

/// The pairs of settings to compare, and how many are left out.
fn pairs(settings: &[Scored]) -> (Vec<(usize, usize)>, usize) {
    let mean = |place: &usize| settings[*place].after.as_ref().map(|figure| figure.mean);
    let scored: Vec<usize> = (0..settings.len()).filter(|place| mean(place).is_some()).collect();
    let all: Vec<(usize, usize)> = scored
        .iter()
        .enumerate()
        .flat_map(|(at, &first)| scored[at + 1..].iter().map(move |&second| (first, second)))
        .collect();
    if all.len() <= MOST_PAIRS {
        return (all, 0);
    }
    let best = scored
        .iter()
        .copied()
        .max_by(|a, b| mean(a).unwrap_or_default().total_cmp(&mean(b).unwrap_or_default()));
    let chosen: Vec<(usize, usize)> = all
        .iter()
        .copied()
        .filter(|&(first, second)| {
            [first, second].map(Some).contains(&best)
                || are_neighbours(&settings[first], &settings[second])
        })
        // The best stands first.
        .map(|(first, second)| if best == Some(second) { (second, first) } else { (first, second) })
        .collect();
    let left = all.len() - chosen.len();
    (chosen, left)
}

/// Whether two settings differ in one key, or are the same place of the grid under two runs.
fn are_neighbours(first: &Scored, second: &Scored) -> bool {
    let ((run, of_grid), (other, of_other)) = (&first.place, &second.place);
    n_differing(of_grid, of_other) + usize::from(run != other) == 1
        || n_differing(&first.set, &second.set) == 1
}

/// How many keys have other values, or stand on one side alone.
fn n_differing(first: &Map<String, Value>, second: &Map<String, Value>) -> usize {
    let differing = first.iter().filter(|(key, value)| second.get(*key) != Some(value)).count();
    differing + second.keys().filter(|key| !first.contains_key(*key)).count()
}

/// What any setting of a sweep sets, in order.
pub(super) fn keys<'a>(sets: impl Iterator<Item = &'a Map<String, Value>>) -> Vec<&'a String> {
    let mut keys: Vec<&String> = Vec::new();
    for key in sets.flat_map(Map::keys) {
        if !keys.contains(&key) {
            keys.push(key);
        }
    }
    keys
}

/// The cells of `keys` for a setting.
pub(super) fn values(keys: &[&String], set: &Map<String, Value>) -> impl Iterator<Item = String> {
    keys.iter().map(|key| match set.get(*key) {
        None => String::new(),
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    })
}

/// A line of a CSV file.
pub(crate) fn line(cells: impl Iterator<Item = String>) -> String {
    let cells = cells.map(|cell| match cell.contains([',', '"', '\n']) {
        true => format!("\"{}\"", cell.replace('"', "\"\"")),
        false => cell,
    });
    cells.collect::<Vec<_>>().join(",") + "\n"
}

/// A percentage with its sign.
fn signed(percent: f64) -> String {
    // Not `-0.0`, which says that there is a sign.
    let rounded = (10. * percent).round() / 10. + 0.;
    match rounded {
        0. => "0.0".into(),
        _ => format!("{rounded:+.1}").replace('-', "−"),
    }
}

fn range(Interval { low, high }: Interval, has_signs: bool) -> String {
    let [low, high] = [low, high].map(|bound| 100. * bound);
    match has_signs {
        true => format!("{} to {} %", signed(low), signed(high)),
        false => format!("{low:.1} to {high:.1} %"),
    }
}

fn p(value: f64) -> String {
    if value < 0.001 { "<0.001".into() } else { format!("{value:.3}") }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_cell_with_a_comma_is_quoted() {
        let cells = ["lr=1,kind=x", "plain", "a \"b\""].map(ToOwned::to_owned);
        assert_eq!(line(cells.into_iter()), "\"lr=1,kind=x\",plain,\"a \"\"b\"\"\"\n");
    }

    fn scored(name: &str, set: Value, mean: f64) -> Scored {
        let Value::Object(set) = set else { panic!("{set}") };
        let after = Some(Figure { n: 1, mean, std: None, interval_95: None });
        let place = (String::new(), set.clone());
        Scored { name: name.into(), place, set, before: None, after, runs: Vec::new() }
    }

    #[test]
    fn a_run_is_the_neighbour_of_another_whatever_it_sets() {
        let of = |run: &str, set: Value, k: i64| Scored {
            place: (run.into(), Map::from_iter([("k".to_owned(), k.into())])),
            ..scored(run, set, 0.5)
        };
        let head = |k| of("head", json!({"model": "m", "k": k}), k);
        let asked =
            |k| of("asked", json!({"model": "m", "prompt.name": "p", "max_len": 9, "k": k}), k);
        assert!(are_neighbours(&head(1), &asked(1)));
        assert!(are_neighbours(&head(1), &head(2)));
        assert!(!are_neighbours(&head(1), &asked(2)));
    }

    #[test]
    fn of_many_settings_neighbours_and_the_best_are_compared() {
        let settings: Vec<Scored> = [("a", 1), ("a", 2), ("a", 3), ("b", 1), ("b", 2), ("b", 3)]
            .into_iter()
            .map(|(model, k)| {
                let mean = if (model, k) == ("a", 3) { 0.9 } else { 0.5 };
                scored("x", json!({"model": model, "k": k}), mean)
            })
            .collect();
        assert_eq!(pairs(&settings[..4]).0.len(), 6, "few are all compared");
        assert_eq!(pairs(&settings[..4]).1, 0);
        let more: Vec<Scored> =
            settings.into_iter().chain([scored("y", json!({"lr": 1.0}), 0.4)]).collect();
        let (chosen, left) = pairs(&more);
        let expected = [
            (0, 1),
            (2, 0),
            (0, 3),
            (2, 1),
            (1, 4),
            (2, 3),
            (2, 4),
            (2, 5),
            (2, 6),
            (3, 4),
            (3, 5),
            (4, 5),
        ];
        assert_eq!((chosen.as_slice(), left), (&expected[..], 21 - expected.len()));
    }

    #[test]
    fn seeds_with_rows_of_their_own_are_tested_one_by_one() {
        let answers = |first_row: usize, right: &[bool]| Answers {
            rows: (0..right.len()).map(|i| (first_row + i, 0, String::new(), None)).collect(),
            right: right.to_vec(),
        };
        let names = ["a".to_owned(), "b".to_owned()];
        let a = [(0, answers(0, &[true, true, true, false])), (1, answers(9, &[true, false]))];
        let b = [(0, answers(0, &[true, false, false, true])), (1, answers(9, &[true, true]))];
        let apart = Comparison::of(&names, &a, &b).unwrap().unwrap();
        assert!(apart.interval_95.is_none());
        let counts: Vec<(u64, u64)> =
            apart.seeds.iter().map(|of| (of.counts.only_first, of.counts.only_second)).collect();
        assert_eq!(counts, [(2, 1), (0, 1)]);
        assert!((apart.difference - (0.25 - 0.5) / 2.).abs() < 1e-12, "{}", apart.difference);

        let together = Comparison::of(&names, &a[..1], &b[..1]).unwrap().unwrap();
        assert!(together.interval_95.is_some());
        let moved = [(0, answers(3, &[true; 4]))];
        assert!(Comparison::of(&names, &a[..1], &moved).unwrap().is_none());
        assert!(Comparison::of(&names, &a[..1], &b[1..]).unwrap().is_none(), "no seed in common");
    }

    #[test]
    fn numbers_are_shown_with_their_sign_and_nothing_has_none() {
        assert_eq!([1.25, -0.33, -0.04].map(signed), ["+1.3", "−0.3", "0.0"]);
        assert_eq!([0.2, 0.0004].map(p), ["0.200", "<0.001"]);
    }
}
