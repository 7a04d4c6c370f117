//! `attn needle`: what a model finds in long texts, by length and depth.

use std::{collections::BTreeMap, io::Write, iter, ops::Range};

use anyhow::{Context, Result, ensure};
use attn_core::LoadOptions;
use attn_data::{
    batch::Encoded,
    dataset::DatasetSpec,
    hub::{Hub, progress_bar},
    needle::{Haystack, NeedleKind, Recipe},
};
use attn_eval::{Batching, Recall, Recalled, check_decoder, recall, stats::Interval};
use serde::Serialize;

use crate::{
    args::NeedleArgs,
    monitor::{count_every_row, grouped},
    run_dir::{check_writable, write_json},
    subject::Subject,
    task::dataset,
    texts::{Folder, load_model, max_len, read_split},
};

/// Turns the seed of the documents into one that no training run draws its own with.
const DOCUMENTS: u64 = 0x0066_6f75_6e64;

/// OUT.json.
#[derive(Serialize)]
struct Report<'a> {
    #[serde(flatten)]
    subject: Subject<'a>,
    haystack: &'a DatasetSpec,
    split: &'a str,
    seed: u64,
    cells: Vec<Cell>,
    trials: Vec<Trial>,
}

/// The trials of one kind at one length and depth.
#[derive(Serialize)]
struct Cell {
    kind: NeedleKind,
    /// Most tokens of a document.
    length: usize,
    /// Where the needle was to stand; `None` for all depths together.
    depth: Option<f64>,
    #[serde(flatten)]
    recall: Recall,
}

/// One document.
#[derive(Serialize)]
struct Trial {
    kind: NeedleKind,
    length: usize,
    /// Where the needle was to stand.
    wanted_depth: f64,
    /// Where it stands, as it is put between sentences: tokens before it over those of the text around it.
    depth: f64,
    n_tokens: usize,
    /// First token of the needle, and the one behind its last.
    needle: [usize; 2],
    /// The same of the answer.
    answer: [usize; 2],
    #[serde(flatten)]
    recalled: Recalled,
}

pub(crate) fn run(args: &NeedleArgs, out: &mut dyn Write) -> Result<()> {
    let _made = check_writable(&args.out)?;
    ensure!(args.batch_size > 0, "`--batch-size` is 0, expected at least 1");
    ensure!(args.depths > 0, "`--depths` is 0, expected at least 1");
    ensure!(args.trials > 0, "`--trials` is 0, expected at least 1");
    // Text alone is wanted, whatever else a data set has.
    let data = dataset(&args.haystack, &args.set)?;
    let data = DatasetSpec { label: None, text_pair: None, classes: None, ..data };
    let device = args.compute.device()?;
    let hub = Hub::from_env().with_progress(progress_bar());
    let folder = Folder::open(&args.model, args.compute.init.is_none(), None, &hub)?;
    check_decoder(&folder.config, "answers")
        .with_context(|| format!("cannot score `{}`", args.model))?;
    for &length in &args.lengths {
        max_len(Some(length), &folder.config, &folder.tokenizer, "`--lengths`")?;
    }
    let split = args.split.as_deref().unwrap_or(&data.validation_split);
    let rows = read_split(&data, split, None, &hub)?.rows;
    let texts: Vec<&str> = rows.iter().map(|row| row.text.as_str()).collect();
    let haystack = Haystack::new(&texts, &folder.tokenizer)
        .with_context(|| format!("cannot hide needles in split `{split}` of `{}`", data.source))?;
    let (mut trials, rows) = documents(args, &haystack, &folder)?;
    let options = LoadOptions {
        kind: args.compute.dtype.into(),
        device,
        seed: args.seed,
        ..LoadOptions::default()
    };
    let model = load_model(&folder.path, args.compute.init, &options, &hub)
        .with_context(|| format!("cannot load the model `{}`", args.model))?;

    let pad_id = folder.tokenizer.fill_id();
    let batching = Batching { batch_size: args.batch_size, pad_id, ..Batching::default() };
    let answer = |trial: &Trial| iter::once(trial.answer[0]..trial.answer[1]).collect();
    let answers: Vec<Vec<Range<usize>>> = trials.iter().map(answer).collect();
    let mut progress = count_every_row(rows.len());
    let found = recall(&model, &rows, &answers, &batching, &mut progress)
        .with_context(|| format!("cannot score `{}`", args.model))?;
    drop(progress);
    for (trial, mut recalled) in trials.iter_mut().zip(found) {
        trial.recalled = recalled.remove(0);
    }
    let cells = cells(&trials);
    print(&cells, args.depths, out)?;
    let report = Report {
        subject: Subject::new(&args.model, &args.compute, &model)?,
        haystack: &data,
        split,
        seed: args.seed,
        cells,
        trials,
    };
    write_json(&args.out, &report)?;
    tracing::info!("wrote `{}`", args.out.display());
    Ok(())
}

/// The documents of every cell, one needle each, with nothing recalled yet.
fn documents(
    args: &NeedleArgs,
    haystack: &Haystack,
    folder: &Folder,
) -> Result<(Vec<Trial>, Vec<Encoded>)> {
    let (mut trials, mut rows) = (Vec::new(), Vec::new());
    for kind in &args.kinds {
        let kind = NeedleKind::from(*kind);
        for &length in &args.lengths {
            for step in 0..args.depths {
                let depth = match args.depths {
                    1 => 0.5,
                    n => step as f64 / (n - 1) as f64,
                };
                let recipe = Recipe {
                    kinds: vec![kind],
                    words: None,
                    most_needles: 1,
                    asks: 1,
                    fill: 1.0,
                    depth: Some(depth),
                    max_len: length,
                };
                for _ in 0..args.trials {
                    let index = rows.len();
                    let seed = args.seed ^ DOCUMENTS;
                    let document =
                        haystack.document(&recipe, &folder.tokenizer, seed, index as u64)?;
                    let (needle, answer) = (&document.needles[0], &document.answers[0]);
                    trials.push(Trial {
                        kind,
                        length,
                        wanted_depth: depth,
                        depth: needle.depth,
                        n_tokens: document.ids.len(),
                        needle: [needle.tokens.start, needle.tokens.end],
                        answer: [answer.tokens.start, answer.tokens.end],
                        recalled: Recalled {
                            exact: false,
                            token_accuracy: 0.0,
                            log_likelihood: 0.0,
                        },
                    });
                    rows.push(Encoded { ids: document.ids, label: None, index, second_from: None });
                }
            }
        }
    }
    Ok((trials, rows))
}

/// Each kind at each length: all depths together, then one by one.
fn cells(trials: &[Trial]) -> Vec<Cell> {
    // A depth as a key: depths are equal bit for bit or not at all, and no smaller than 0.
    let mut groups: BTreeMap<(NeedleKind, usize, Option<u64>), Vec<&Recalled>> = BTreeMap::new();
    for Trial { kind, length, wanted_depth, recalled, .. } in trials {
        for depth in [None, Some(wanted_depth.to_bits())] {
            groups.entry((*kind, *length, depth)).or_default().push(recalled);
        }
    }
    let cell = |((kind, length, depth), of): ((NeedleKind, usize, Option<u64>), Vec<&Recalled>)| {
        let recall = Recall::of(of).expect("a group has trials");
        Cell { kind, length, depth: depth.map(f64::from_bits), recall }
    };
    groups.into_iter().map(cell).collect()
}

fn print(cells: &[Cell], n_depths: usize, out: &mut dyn Write) -> Result<()> {
    let mut kind = None;
    for cell in cells {
        if kind != Some(cell.kind) {
            if kind.is_some() {
                writeln!(out)?;
            }
            kind = Some(cell.kind);
            writeln!(out, "{}, exact match in % by length and depth", cell.kind.name())?;
            write!(out, "{:>8} {:>21}", "tokens", "all")?;
            let depths = cells.iter().filter_map(|cell| cell.depth).take(n_depths);
            for depth in depths {
                write!(out, " {:>6}", format!("{:.0}%", 100.0 * depth))?;
            }
        }
        let Recall { exact_match, interval_95: Interval { low, high }, .. } = cell.recall;
        match cell.depth {
            None => {
                let interval = format!("({:.1} to {:.1})", 100.0 * low, 100.0 * high);
                write!(
                    out,
                    "\n{:>8} {:>6.1} {interval:>14}",
                    grouped(cell.length),
                    100.0 * exact_match
                )?;
            }
            Some(_) => write!(out, " {:>6.0}", 100.0 * exact_match)?,
        }
    }
    writeln!(out)?;
    Ok(())
}
