//! `attn eval --task blimp`: of two sentences, which does a language model hold for the likelier one?

use std::{collections::BTreeMap, io::Write};

use anyhow::{Context, Result, ensure};
use attn_core::Model;
use attn_data::{
    blimp::{Paradigm, paradigms},
    dataset::DatasetSpec,
    hub::{Hub, progress_bar},
};
use attn_eval::{Batching, Preference, Window, check_decoder, log_likelihoods, stats::Interval};
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use crate::{
    args::EvalArgs,
    config::Written,
    memory::{self, Foreseen, batch},
    monitor::{count_every_row, grouped},
    perplexity::begins,
    plot::write_result,
    subject::Subject,
    texts::{Folder, read_split},
};

/// The name of the task.
pub(crate) const TASK: &str = "blimp";

/// OUT.json.
#[derive(Serialize)]
struct Report<'a> {
    #[serde(flatten)]
    subject: Subject<'a>,
    task: &'a str,
    data: &'a DatasetSpec,
    split: &'a str,
    /// Most pairs of a paradigm.
    limit: Option<usize>,
    #[serde(flatten)]
    found: Blimp,
}

/// What was found.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Blimp {
    /// All pairs.
    #[serde(flatten)]
    pub(crate) all: Preference,
    fields: Vec<Named>,
    terms: Vec<Named>,
    paradigms: Vec<Named>,
}

#[derive(Debug, Clone, Serialize)]
struct Named {
    name: &'static str,
    #[serde(flatten)]
    score: Preference,
}

pub(crate) fn run(args: &EvalArgs, data: &DatasetSpec, out: &mut dyn Write) -> Result<()> {
    for (name, is_given) in [
        ("--against", args.against.is_some()),
        ("--by-text", args.rows.by_text),
        ("--max-len", args.rows.max_len.is_some()),
        ("--conventions", args.conventions),
    ] {
        ensure!(!is_given, "`{name}` means nothing to pairs of sentences\nhint: leave it away");
    }
    ensure!(args.rows.limit != Some(0), "`--limit` is 0, expected at least 1 pair a paradigm");
    ensure!(args.rows.batch_size > 0, "`--batch-size` is 0, expected at least 1");
    let hub = Hub::from_env().with_progress(progress_bar());
    args.compute.device()?;
    let folder = Folder::open(&args.model, args.compute.init.is_none(), None, &hub)?;
    check_decoder(&folder.config, "the likelihood of a sentence")
        .with_context(|| format!("cannot score `{}`", args.model))?;
    let split = args.rows.split.as_deref().unwrap_or(&data.validation_split);
    let pairs = read(data, split, args.rows.limit, &folder, &hub)?;
    // Sentences: what a pair takes in tokens is little beside the model.
    let extent = batch(args.rows.batch_size, Some(8192), 64, usize::MAX);
    Foreseen::computing(&folder.config, &args.compute)?
        .pass(extent)
        .with("predictions, in pieces", memory::PIECES)
        .check(args.compute.device()?, memory::OF_SCORING)?;
    let model = folder.load(&args.compute, args.seed, &hub)?;
    let batching = Batching {
        batch_size: args.rows.batch_size,
        pad_id: folder.tokenizer.fill_id(),
        ..Batching::default()
    };
    let found = score(&model, &pairs, &batching)
        .with_context(|| format!("cannot score `{}`", args.model))?;
    print(&found, out)?;
    let report = Report {
        subject: Subject::new(&args.model, &args.compute, &model)?,
        task: TASK,
        data,
        split,
        limit: args.rows.limit,
        found,
    };
    write_result(&args.out, &report, None)?;
    Ok(())
}

/// What `--set` says of the data, as it is written.
#[derive(Deserialize)]
struct Given {
    data: Table,
}

/// Where the pairs are: what is `written`, and else the task's own. `source` is known to be there.
///
/// # Errors
///
/// For settings that pairs of sentences have no use for.
pub(crate) fn data(written: &Written, source: String) -> Result<DatasetSpec> {
    let known =
        Table::try_from(DatasetSpec::known(TASK)?).context("cannot write the task as TOML")?;
    let Given { data } = written.parse()?;
    for (name, why) in [
        ("label", "the good sentence of a pair is `data.text`"),
        ("classes", "the good sentence of a pair is `data.text`"),
        ("config", "each paradigm is a configuration of its own"),
        ("train_split", "nothing is trained, and `--split` says which pairs"),
    ] {
        ensure!(
            !data.contains_key(name),
            "`data.{name}` means nothing to pairs of sentences: {why}\nhint: leave it away"
        );
    }
    let mut all = known;
    all.extend(data);
    all.insert("source".to_owned(), Value::String(source));
    DatasetSpec::deserialize(all).context("cannot use `data`")
}

/// The paradigm of each pair, and the two sentences, the good one first.
pub(crate) struct Pairs {
    pub(crate) of: Vec<Paradigm>,
    pub(crate) sentences: Vec<Window>,
}

/// Sentences as lm-evaluation-harness puts them: behind the token that begins texts, and a blank.
pub(crate) fn read(
    data: &DatasetSpec,
    split: &str,
    limit: Option<usize>,
    folder: &Folder,
    hub: &Hub,
) -> Result<Pairs> {
    let begins = begins(folder)?;
    let mut pairs = Pairs { of: Vec::new(), sentences: Vec::new() };
    for paradigm in paradigms() {
        for row in read_split(&paradigm.data(data), split, limit, hub)?.rows {
            let bad = row.pair.as_deref().context("a pair has no second sentence")?;
            pairs.of.push(paradigm);
            for sentence in [row.text.as_str(), bad] {
                let ids = folder.tokenizer.ids(&format!(" {sentence}"), false)?;
                let n_scored = ids.len();
                pairs.sentences.push(Window { ids: [&[begins], &ids[..]].concat(), n_scored });
            }
        }
    }
    Ok(pairs)
}

pub(crate) fn score(model: &Model, pairs: &Pairs, batching: &Batching) -> Result<Blimp> {
    let mut progress = count_every_row(pairs.sentences.len());
    let log_p = log_likelihoods(model, &pairs.sentences, batching, &mut progress)?;
    drop(progress);
    let scores: Vec<(f64, f64)> = log_p.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect();
    let by = |part: fn(&Paradigm) -> &'static str| -> Vec<Named> {
        let mut groups: BTreeMap<&str, Vec<(f64, f64)>> = BTreeMap::new();
        for (paradigm, &score) in pairs.of.iter().zip(&scores) {
            groups.entry(part(paradigm)).or_default().push(score);
        }
        let named = |(name, scores)| Some(Named { name, score: Preference::of(scores)? });
        groups.into_iter().filter_map(named).collect()
    };
    Ok(Blimp {
        fields: by(|paradigm| paradigm.field),
        terms: by(|paradigm| paradigm.term),
        paradigms: by(|paradigm| paradigm.name),
        all: Preference::of(scores).context("there is no pair to score")?,
    })
}

fn print(found: &Blimp, out: &mut dyn Write) -> Result<()> {
    let line = |out: &mut dyn Write, name: &str, score: &Preference| {
        let Preference { accuracy, interval_95: Interval { low, high }, n_pairs } = score;
        let interval = format!("{:.1} to {:.1}", 100.0 * low, 100.0 * high);
        writeln!(
            out,
            "  {name:<28} {:>5.1} %  {interval:<13} {:>7}",
            100.0 * accuracy,
            grouped(*n_pairs)
        )
    };
    writeln!(
        out,
        "{:<30} {:>7}  {:<13} {:>7}",
        "likelier sentence is English", "", "95 %", "pairs"
    )?;
    line(out, "all", &found.all)?;
    for named in [&found.fields, &found.terms] {
        writeln!(out)?;
        for Named { name, score } in named {
            line(out, name, score)?;
        }
    }
    writeln!(out)?;
    writeln!(out, "Chance is 50 %. The {} paradigms stand in the result.", found.paradigms.len())?;
    Ok(())
}
