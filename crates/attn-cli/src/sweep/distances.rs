//! What the runs of a sweep of distillations say together: how near each student came to its teacher.

use std::{io::Write, path::Path};

use anyhow::{Context, Result};
use attn_eval::{AtPositions, Divergence, LanguageScore};
use serde::Serialize;
use serde_json::{Map, Value};

use super::{
    Failure,
    plan::Plan,
    report::{Environment, Failed, Figure, keys, line, values},
};
use crate::{
    distill::{Finished, Summary},
    monitor::grouped,
    plot::write_result,
    run_dir,
};

/// `sweep.json` of distillations.
#[derive(Debug, Serialize)]
struct Report<'a> {
    schema: u32,
    /// The file.
    sweep: &'a Path,
    attn: &'static str,
    /// The rows reported on.
    rows: &'a str,
    seeds: &'a [u64],
    n_runs: usize,
    /// The teacher on the rows reported on, where any run has finished.
    teacher: Option<LanguageScore>,
    settings: Vec<Scored>,
    failed: Vec<Failed>,
}

/// A setting over its seeds.
#[derive(Debug, Serialize)]
struct Scored {
    name: String,
    /// What it sets.
    set: Map<String, Value>,
    /// KL(teacher ‖ student) in nats per token: at the swap, and after each stage. Absent where no run has finished, or
    /// none had the stage.
    kl_at_swap: Option<Figure>,
    kl_after_transfer: Option<Figure>,
    kl_after_tune: Option<Figure>,
    /// Of the students as they were left.
    kl: Option<Figure>,
    reverse_kl: Option<Figure>,
    agreement: Option<Figure>,
    loss_nats_per_token: Option<Figure>,
    entropy_ratio: Option<Figure>,
    runs: Vec<Run>,
}

/// A finished run.
#[derive(Debug, Serialize)]
struct Run {
    folder: String,
    seed: u64,
    kl_at_swap: f64,
    kl_after_transfer: Option<f64>,
    kl_after_tune: Option<f64>,
    kl: f64,
    reverse_kl: f64,
    agreement: f64,
    loss_nats_per_token: f64,
    perplexity: f64,
    /// Of the student's predictions, as a share of the teacher's.
    entropy_ratio: f64,
    by_position: Vec<AtPositions>,
    /// What the attention adds.
    n_added: usize,
    n_trained: Vec<usize>,
    /// Of each stage.
    tokens_per_s: Vec<f64>,
    /// Of each stage, evaluation left in.
    s_per_step: Vec<f64>,
    peak_memory_mib: Option<u64>,
    elapsed_s: f64,
    /// Of the program that ran it.
    commit: Option<String>,
}

impl Run {
    fn new(folder: String, seed: u64, summary: &Summary, commit: Option<String>) -> Self {
        let Summary { at_swap, stages, .. } = summary;
        let after = |name: &str| -> Option<f64> {
            let stage: &Finished = stages.iter().find(|stage| stage.stage == name)?;
            Some(stage.after.kl_nats_per_token)
        };
        let last: &Divergence = stages.last().map_or(at_swap, |stage| &stage.after);
        Self {
            folder,
            seed,
            kl_at_swap: at_swap.kl_nats_per_token,
            kl_after_transfer: after("transfer"),
            kl_after_tune: after("tune"),
            kl: last.kl_nats_per_token,
            reverse_kl: last.reverse_kl_nats_per_token,
            agreement: last.top1_agreement,
            loss_nats_per_token: last.model.loss_nats_per_token,
            perplexity: last.model.perplexity,
            entropy_ratio: last.entropy_nats / last.baseline_entropy_nats,
            by_position: last.by_position.clone(),
            n_added: summary.n_added,
            n_trained: stages.iter().map(|stage| stage.n_trained).collect(),
            tokens_per_s: stages.iter().map(|stage| stage.tokens_per_s).collect(),
            s_per_step: stages
                .iter()
                .map(|stage| stage.elapsed_s / stage.total_steps.max(1) as f64)
                .collect(),
            peak_memory_mib: summary.peak_memory_mib,
            elapsed_s: summary.elapsed_s,
            commit,
        }
    }
}

/// Writes `sweep.json` and `sweep.csv`, and prints the table.
pub(super) fn tell(
    plan: &Plan,
    dir: &Path,
    file: &Path,
    failures: &[Failure],
    out: &mut dyn Write,
) -> Result<()> {
    let mut settings = Vec::new();
    let mut teacher = None;
    for (place, setting) in plan.settings.iter().enumerate() {
        let mut runs = Vec::new();
        for planned in plan.runs.iter().filter(|run| run.setting == place) {
            let run_dir = dir.join(&planned.folder);
            let Some(summary) = Summary::read(&run_dir)? else { continue };
            let environment =
                run_dir::read_json::<Environment>(&run_dir.join(run_dir::ENVIRONMENT_FILE))?;
            let commit = environment.and_then(|environment| environment.commit);
            runs.push(Run::new(planned.folder.clone(), planned.seed, &summary, commit));
            teacher.get_or_insert(summary.at_swap.baseline);
        }
        let value = |value: &toml::Value| serde_json::to_value(value).context("cannot write JSON");
        let set = setting.values.iter().map(|(key, of)| Ok((key.clone(), value(of)?)));
        let figure = |of: &dyn Fn(&Run) -> Option<f64>| Figure::of(runs.iter().filter_map(of));
        settings.push(Scored {
            name: setting.name.clone(),
            set: set.collect::<Result<_>>()?,
            kl_at_swap: figure(&|run| Some(run.kl_at_swap))?,
            kl_after_transfer: figure(&|run| run.kl_after_transfer)?,
            kl_after_tune: figure(&|run| run.kl_after_tune)?,
            kl: figure(&|run| Some(run.kl))?,
            reverse_kl: figure(&|run| Some(run.reverse_kl))?,
            agreement: figure(&|run| Some(run.agreement))?,
            loss_nats_per_token: figure(&|run| Some(run.loss_nats_per_token))?,
            entropy_ratio: figure(&|run| Some(run.entropy_ratio))?,
            runs,
        });
    }
    let failed = failures
        .iter()
        .map(|Failure { folder, how }| Failed { folder: folder.clone(), how: how.clone() });
    let report = Report {
        schema: run_dir::SCHEMA,
        sweep: file,
        attn: env!("CARGO_PKG_VERSION"),
        rows: &plan.rows,
        seeds: &plan.seeds,
        n_runs: plan.runs.len(),
        teacher,
        settings,
        failed: failed.collect(),
    };
    write_result(&dir.join(run_dir::SWEEP_RESULT), &report, None)?;
    run_dir::write(&dir.join(run_dir::SWEEP_TABLE), report.csv().as_bytes())?;
    report.print(out)
}

impl Report<'_> {
    /// A line a finished run.
    fn csv(&self) -> String {
        const FIGURES: [&str; 14] = [
            "kl_at_swap",
            "kl_after_transfer",
            "kl_after_tune",
            "kl",
            "reverse_kl",
            "agreement",
            "loss_nats_per_token",
            "perplexity",
            "entropy_ratio",
            "n_added",
            "n_trained",
            "s_per_step",
            "peak_memory_mib",
            "elapsed_s",
        ];
        let keys = keys(self.settings.iter().map(|setting| &setting.set));
        let head = ["setting", "seed"].into_iter().chain(keys.iter().map(|key| key.as_str()));
        let mut text = line(head.chain(FIGURES).chain(["folder"]).map(str::to_owned));
        let or_none = |value: Option<f64>| value.map_or(String::new(), |value| value.to_string());
        for setting in &self.settings {
            for run in &setting.runs {
                let figures = [
                    or_none(Some(run.kl_at_swap)),
                    or_none(run.kl_after_transfer),
                    or_none(run.kl_after_tune),
                    or_none(Some(run.kl)),
                    or_none(Some(run.reverse_kl)),
                    or_none(Some(run.agreement)),
                    or_none(Some(run.loss_nats_per_token)),
                    or_none(Some(run.perplexity)),
                    or_none(Some(run.entropy_ratio)),
                    run.n_added.to_string(),
                    run.n_trained.iter().max().map_or(String::new(), ToString::to_string),
                    or_none(run.s_per_step.last().copied()),
                    run.peak_memory_mib.map_or(String::new(), |mib| mib.to_string()),
                    or_none(Some(run.elapsed_s)),
                ];
                let head = [setting.name.clone(), run.seed.to_string()].into_iter();
                let cells = head.chain(values(&keys, &setting.set)).chain(figures);
                text += &line(cells.chain([run.folder.clone()]));
            }
        }
        text
    }

    fn print(&self, out: &mut dyn Write) -> Result<()> {
        if let Some(LanguageScore { loss_nats_per_token, perplexity, n_tokens, .. }) = &self.teacher
        {
            writeln!(
                out,
                "{}: {} tokens; the teacher has {loss_nats_per_token:.4} nats per token, perplexity {perplexity:.2}",
                self.rows,
                grouped(*n_tokens)
            )?;
        }
        writeln!(out)?;
        let names = self.settings.iter().map(|setting| setting.name.chars().count());
        let width = names.max().unwrap_or(0).max("setting".len());
        writeln!(
            out,
            "  {:<width$}  seeds  {:>10}  {:>14}  {:<17} {:>9}  {:>10}  {:>10}",
            "setting",
            "KL at swap",
            "after transfer",
            "after tune",
            "agreement",
            "nats/token",
            "new values"
        )?;
        // The nearest first; what has not finished last.
        let mut order: Vec<&Scored> = self.settings.iter().collect();
        let kl = |setting: &Scored| setting.kl.as_ref().map_or(f64::INFINITY, |figure| figure.mean);
        order.sort_by(|a, b| kl(a).total_cmp(&kl(b)));
        for setting in order {
            let mean = |figure: &Option<Figure>, scale: f64, digits: usize| match figure {
                Some(figure) => format!("{:.digits$}", figure.mean * scale),
                None => "-".into(),
            };
            let spread = match &setting.kl_after_tune {
                Some(Figure { mean, std: Some(std), .. }) => format!("{mean:.4} ± {std:.4}"),
                other => mean(other, 1.0, 4),
            };
            let added = setting.runs.first().map_or("-".into(), |run| grouped(run.n_added));
            writeln!(
                out,
                "  {:<width$}  {:>5}  {:>10}  {:>14}  {spread:<17} {:>8}%  {:>10}  {added:>10}",
                setting.name,
                setting.runs.len(),
                mean(&setting.kl_at_swap, 1.0, 4),
                mean(&setting.kl_after_transfer, 1.0, 4),
                mean(&setting.agreement, 100.0, 1),
                mean(&setting.loss_nats_per_token, 1.0, 4),
            )?;
        }
        writeln!(out)?;
        writeln!(
            out,
            "KL is that of the teacher's predictions against the student's, in nats per token; ± is the standard deviation \
             over seeds."
        )?;
        Ok(())
    }
}
