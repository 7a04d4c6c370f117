//! `attn explain`: why a model that is near to another by one figure may not write like it.

use std::io::Write;

use anyhow::{Context, Result, ensure};
use attn_core::{LoadOptions, config::Head};
use attn_data::{
    dataset::DatasetSpec,
    hub::{Hub, progress_bar},
};
use attn_eval::{Check, Explanation, Texts, Verdict, Way, Writing, Written, explain};
use serde::Serialize;

use crate::{
    Outcome,
    args::ExplainArgs,
    generate::stop_ids,
    memory::{self, Foreseen},
    monitor::{count_every_row, grouped},
    plot::write_result,
    run_dir::check_writable,
    subject::Subject,
    task::{Task, Which, dataset},
    texts::{Folder, load_model, same_tokens},
};

/// Tokens of a prompt and of what is written, where nothing says otherwise.
const USUAL_PROMPT: usize = 32;
const USUAL_LENGTH: usize = 64;

/// OUT.json.
#[derive(Serialize)]
struct Report<'a> {
    #[serde(flatten)]
    subject: Subject<'a>,
    #[serde(flatten)]
    which: Which<'a>,
    against: &'a str,
    n_rows: usize,
    prompt_len: usize,
    max_new_tokens: usize,
    seed: u64,
    #[serde(flatten)]
    explanation: Explanation,
}

pub(crate) fn run(args: &ExplainArgs, out: &mut dyn Write) -> Result<Outcome> {
    let _made = check_writable(&args.out)?;
    ensure!(args.prompts > 0, "`--prompts` is 0, expected at least 1");
    for (name, value) in
        [("--prompt-len", args.prompt_len), ("--max-new-tokens", args.max_new_tokens)]
    {
        ensure!(value != Some(0), "`{name}` is 0, expected at least 1");
    }
    // Text alone is wanted, whatever else a data set has.
    let data = dataset(&args.rows.task, &args.rows.set)?;
    let data = DatasetSpec { label: None, text_pair: None, classes: None, ..data };
    let device = args.compute.device()?;
    let hub = Hub::from_env().with_progress(progress_bar());
    let task = Task::open(&args.model, &args.rows, data, None, &args.compute, &hub)?;
    ensure!(
        task.folder.config.head == Head::LanguageModel,
        "`{}` ends in {}, and `explain` compares predictions of tokens\nhint: name a language model",
        args.model,
        task.folder.config.head
    );
    let against = Folder::open(&args.against, true, None, &hub)?;
    same_tokens(&task.folder, &against)?;
    let rows = task.unlabelled()?;
    let masking = task.masking()?;
    let extent = task.extent();
    let kind = args.compute.dtype.into();
    Foreseen::computing(&task.folder.config, &args.compute)?
        .beside("the other model", &against.config, kind)?
        .pass(extent)
        .pass(extent)
        .cache((args.prompts as u64, task.max_len as u64))
        .with("predictions of both, in pieces", memory::PIECES)
        .check(device, memory::OF_SCORING)?;
    let model = task.load(&args.compute, args.seed, &hub)?;
    let options = LoadOptions { kind: model.kind(), device, ..LoadOptions::default() };
    let baseline = load_model(&against.path, None, &options, &hub)
        .with_context(|| format!("cannot load the model `{}`", args.against))?;

    let prompt_len = args.prompt_len.unwrap_or(USUAL_PROMPT.min(task.max_len / 4).max(1));
    let max_new_tokens = args.max_new_tokens.unwrap_or_else(|| {
        // The last one is predicted, never read.
        let fits = |rows: i64| (rows as usize + 1).saturating_sub(prompt_len).max(1);
        model.config().sizes.position_table.map_or(USUAL_LENGTH, |n| USUAL_LENGTH.min(fits(n)))
    });
    let tokenizer = &task.folder.tokenizer;
    let stop_ids = stop_ids(&task.folder.path, tokenizer)?;
    let decode = |ids: &[i64]| {
        let ids: Vec<u32> = ids.iter().map(|&id| id as u32).collect();
        tokenizer.decode(&ids, true)
    };
    let writing = Writing {
        n_prompts: args.prompts,
        prompt_len,
        max_new_tokens,
        seed: args.seed,
        stop_ids: &stop_ids,
        decode: &decode,
    };
    let mut progress = count_every_row(rows.len());
    let masking = masking.as_ref().map(|masking| (masking, args.seed));
    let explanation =
        explain(&model, &baseline, &rows, masking, &writing, &task.batching(), &mut progress)
            .with_context(|| format!("cannot hold `{}` against `{}`", args.model, args.against))?;
    drop(progress);

    print(&explanation, args, out)?;
    let failed = explanation.checks.iter().any(|check| check.verdict == Verdict::Failed);
    let report = Report {
        subject: Subject::new(&args.model, &args.compute, &model)?,
        which: task.which(),
        against: &args.against,
        n_rows: rows.len(),
        prompt_len,
        max_new_tokens,
        seed: args.seed,
        explanation,
    };
    write_result(&args.out, &report, None)?;
    Ok(if failed { Outcome::Failed } else { Outcome::Done })
}

fn print(found: &Explanation, args: &ExplainArgs, out: &mut dyn Write) -> Result<()> {
    let Explanation { checks, kl_by_shift, divergence, written } = found;
    writeln!(out, "{} against {}", args.model, args.against)?;
    writeln!(
        out,
        "KL {:.4} nats per token, reverse {:.4}, agreement {:.1} %, over {} tokens",
        divergence.kl_nats_per_token,
        divergence.reverse_kl_nats_per_token,
        100.0 * divergence.top1_agreement,
        grouped(divergence.model.n_tokens)
    )?;
    writeln!(out)?;
    writeln!(out, "  {:<34} {:>10}  {:<18} verdict", "test", "value", "passes")?;
    for Check { test, value, bounds: [low, high], verdict, meaning } in checks {
        let value = value.map_or("-".into(), number);
        let (bounds, verdict) = match verdict {
            Verdict::Passed => (format!("{} to {}", number(*low), number(*high)), "passed"),
            Verdict::Failed => (format!("{} to {}", number(*low), number(*high)), "FAILED"),
            Verdict::NotRun => ("-".into(), "not run"),
        };
        writeln!(out, "  {test:<34} {value:>10}  {bounds:<18} {verdict}")?;
        writeln!(out, "      {meaning}")?;
    }
    if !kl_by_shift.is_empty() {
        let shifts: Vec<String> =
            kl_by_shift.iter().map(|(shift, kl)| format!("{shift:+}: {kl:.4}")).collect();
        writeln!(out)?;
        writeln!(out, "KL by shift of the baseline's predictions  {}", shifts.join("  "))?;
    }
    if written.is_empty() {
        return Ok(());
    }
    writeln!(out)?;
    writeln!(
        out,
        "  {:<20} {:>7} {:>10} {:>10} {:>10} {:>11} {:>13}",
        "texts", "rep-4", "distinct-1", "distinct-2", "distinct-3", "perplexity*", "entities kept"
    )?;
    for Written { way, model, baseline, .. } in written {
        let way = match way {
            Way::Greedy => "greedy",
            Way::Drawn => "drawn",
        };
        for (of, texts) in [("model", model), ("baseline", baseline)] {
            let Texts { wording, perplexity_by_baseline, entities_kept } = texts;
            let [rep_4, one, two, three] = match wording {
                Some(found) => [found.rep_4, found.distinct_1, found.distinct_2, found.distinct_3]
                    .map(|share| format!("{share:.4}")),
                None => ["-"; 4].map(str::to_owned),
            };
            let kept = entities_kept.map_or("-".into(), |kept| format!("{:.1} %", 100.0 * kept));
            writeln!(
                out,
                "  {:<20} {rep_4:>7} {one:>10} {two:>10} {three:>10} {perplexity_by_baseline:>11.2} {kept:>13}",
                format!("{way}, {of}")
            )?;
        }
    }
    writeln!(out, "* of the texts, by the baseline")?;
    for Written { way, samples, .. } in written {
        let shown: Vec<_> = samples.iter().take(args.samples).collect();
        for sample in shown {
            let way = match way {
                Way::Greedy => "greedy",
                Way::Drawn => "drawn",
            };
            writeln!(out)?;
            writeln!(out, "{way}, row {}", sample.index)?;
            writeln!(out, "  prompt    {:?}", sample.prompt)?;
            writeln!(out, "  model     {:?}", sample.model)?;
            writeln!(out, "  baseline  {:?}", sample.baseline)?;
        }
    }
    Ok(())
}

/// Few digits of a figure of any size.
fn number(value: impl std::borrow::Borrow<f64>) -> String {
    match *value.borrow() {
        value if value == value.round() && value.abs() < 1e4 => format!("{value:.0}"),
        value if value.abs() < 1e-3 => format!("{value:.0e}"),
        value => format!("{value:.4}"),
    }
}
