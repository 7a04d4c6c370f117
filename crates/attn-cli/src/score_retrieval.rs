//! `attn score-heads` by needles: which heads look up facts in long texts.

use std::io::Write;

use anyhow::{Context, Result, bail, ensure};
use attn_core::Model;
use attn_data::{
    dataset::DatasetSpec,
    hub::{Hub, progress_bar},
    needle::Document,
};
use attn_eval::{
    Answered, HeadScores, Query, RetrievalScore, Trial, check_decoder, over_trials, query_focused,
    retrieval,
};
use serde::Serialize;

use crate::{
    args::RetrievalArgs,
    haystack::{Hiding, Place, answering},
    head_names::{QUERY_HEAD, numbered, range},
    memory::{self, Foreseen},
    monitor::{count_every_row, grouped},
    plot::write_result,
    run_dir::check_writable,
    subject::{Subject, shared_kv},
    texts::Folder,
};

/// Fewer trials than this are said to be few.
const FEW_TRIALS: usize = 10;

/// Heads that are shown.
const N_SHOWN: usize = 10;

/// A question that asks nothing.
const NULL_QUESTION: &str = "N/A";

/// OUT.json.
#[derive(Serialize)]
struct Report<'a> {
    #[serde(flatten)]
    subject: Subject<'a>,
    haystack: &'a DatasetSpec,
    split: Option<&'a str>,
    seed: u64,
    method: RetrievalScore,
    /// Which heads are meant.
    unit: &'static str,
    /// The key/value head that each reads, where heads share one.
    #[serde(skip_serializing_if = "Option::is_none")]
    kv_of_head: Option<Vec<Vec<i64>>>,
    /// Above it a head counts as a retrieval head.
    threshold: f64,
    n_retrieval_heads: usize,
    share_retrieval_heads: f64,
    n_zero: usize,
    /// Share of the words expected that an answer must exceed for its trial to count; null: all count.
    min_rouge1_recall: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_new_tokens: Option<usize>,
    /// Trials that count are `n_rows`.
    #[serde(flatten)]
    scores: HeadScores,
    trials: Vec<Scored>,
}

/// One document.
#[derive(Serialize)]
struct Scored {
    #[serde(flatten)]
    place: Place,
    #[serde(flatten)]
    answered: Option<Answered>,
    counts: bool,
}

pub(crate) fn run(args: &RetrievalArgs, out: &mut dyn Write) -> Result<()> {
    let _made = check_writable(&args.out)?;
    let needles = &args.needles;
    let _made_too = needles.picture.as_deref().map(check_writable).transpose()?;
    let method = args.method;
    let writes = method != RetrievalScore::QueryFocused;
    ensure!(
        !writes || needles.documents.max_new_tokens > 0,
        "`--max-new-tokens` is 0, and heads are scored while an answer is written"
    );
    ensure!(
        (0.0..100.0).contains(&needles.min_recall),
        "`--min-recall` is {}, expected a percentage from 0 up to, and without, 100",
        needles.min_recall
    );
    ensure!(needles.threshold.is_finite(), "`--threshold` is {}", needles.threshold);
    args.compute.device()?;
    let hub = Hub::from_env().with_progress(progress_bar());
    let folder = Folder::open(&args.model, args.compute.init.is_none(), None, &hub)?;
    check_decoder(&folder.config, "answers")
        .with_context(|| format!("cannot score `{}`", args.model))?;
    let source = (needles.haystack.as_str(), args.split.as_deref(), args.set.as_slice());
    let hiding = Hiding::open(source, &needles.documents, &folder, &hub)?;
    let documents = hiding.documents(&needles.documents, &folder.tokenizer, args.seed)?;
    let longest =
        documents.iter().map(|(_, document)| document.ids.len() as u64).max().unwrap_or(1);
    let extent = (1, longest + needles.documents.max_new_tokens as u64);
    Foreseen::computing(&folder.config, &args.compute)?
        .pass(extent)
        .cache(extent)
        .inputs(extent)
        .logits(64, 3)
        .check(args.compute.device()?, memory::OF_NEEDLES)?;
    let model = folder.load(&args.compute, args.seed, &hub)?;

    let min_recall = (writes && !needles.keep_failures).then_some(needles.min_recall / 100.0);
    let (values, answers) = match writes {
        true => by_writing(args, method, &documents, &folder, &model),
        false => by_asking(&documents, &folder, &model),
    }
    .with_context(|| format!("cannot score the heads of `{}`", args.model))?;
    let mut trials: Vec<Scored> = Vec::new();
    for ((place, _), answered) in documents.into_iter().zip(answers) {
        let succeeds =
            |answered: &Answered| min_recall.is_none_or(|least| answered.rouge1_recall > least);
        let counts = answered.as_ref().is_none_or(succeeds);
        trials.push(Scored { place, answered, counts });
    }
    let values = values.into_iter().zip(&trials).filter(|(_, trial)| trial.counts);
    let values: Vec<Vec<f64>> = values.map(|(values, _)| values).collect();
    if values.is_empty() {
        bail!(
            "none of {} trials counts: no answer of `{}` has more than {} % of the words expected (ROUGE-1 recall)\nhint: \
             give shorter --lengths, or --keep-failures to score heads whatever is answered",
            grouped(trials.len()),
            args.model,
            needles.min_recall
        );
    }
    let scores = over_trials(&model, &values)?;
    let flat: Vec<f64> = scores.scores.iter().flatten().copied().collect();
    let n_retrieval_heads = flat.iter().filter(|&&score| score > needles.threshold).count();
    let report = Report {
        unit: QUERY_HEAD,
        kv_of_head: shared_kv(&model),
        subject: Subject::new(&args.model, &args.compute, &model)?,
        haystack: &hiding.data,
        split: hiding.split.as_deref(),
        seed: args.seed,
        method,
        threshold: needles.threshold,
        n_retrieval_heads,
        share_retrieval_heads: n_retrieval_heads as f64 / flat.len() as f64,
        n_zero: flat.iter().filter(|&&score| score == 0.0).count(),
        min_rouge1_recall: min_recall,
        max_new_tokens: writes.then_some(needles.documents.max_new_tokens),
        scores,
        trials,
    };
    print(&report, out)?;
    write_result(&args.out, &report, needles.picture.as_deref())?;
    Ok(())
}

/// What heads are worth in each trial, and what was answered in it.
type Found = (Vec<Vec<f64>>, Vec<Option<Answered>>);

/// Scores heads while the model answers.
fn by_writing(
    args: &RetrievalArgs,
    method: RetrievalScore,
    documents: &[(Place, Document)],
    folder: &Folder,
    model: &Model,
) -> Result<Found> {
    let trial = |(place, document): &(Place, Document)| Trial {
        prompt: document.ids[..place.answer[0]].to_vec(),
        needle: document.needles[0].tokens.clone(),
        told: document.needles[0].told.clone(),
        answer: place.expected.clone(),
    };
    let trials: Vec<Trial> = documents.iter().map(trial).collect();
    let mut progress = count_every_row(trials.len());
    let reads = answering(folder, args.needles.documents.max_new_tokens, |answering| {
        let read = retrieval(model, &trials, answering, &mut progress);
        match read {
            Err(attn_eval::Error::Model(attn_core::Error::Refused { kind, what, .. })) => bail!(
                "`{kind}` cannot {what}\nhint: `--method query_focused` reads the whole text at once, with any attention"
            ),
            read => Ok(read?),
        }
    })?;
    let values = |read: attn_eval::Read| {
        let values = match method {
            RetrievalScore::Retrieval => read.set,
            RetrievalScore::RetrievalRepeats => read.repeats,
            RetrievalScore::RetrievalMass => read.mass,
            RetrievalScore::QueryFocused => unreachable!("it writes nothing"),
        };
        (values, Some(read.answered))
    };
    Ok(reads.into_iter().map(values).unzip())
}

/// Scores heads by what the question attends to.
fn by_asking(documents: &[(Place, Document)], folder: &Folder, model: &Model) -> Result<Found> {
    let mut progress = count_every_row(documents.len());
    let mut found = Found::default();
    for (place, document) in documents {
        let asked = Query {
            ids: document.ids[..place.answer[0]].to_vec(),
            needle: document.needles[0].tokens.clone(),
            asked: document.answers[0].question.clone(),
        };
        let null = document.asking(0, NULL_QUESTION, &folder.tokenizer)?;
        let null = Query { ids: null.ids, needle: null.needle, asked: null.question };
        found.0.push(query_focused(model, &asked, &null)?);
        found.1.push(None);
        // Nobody stops it.
        let _ = progress(found.0.len());
    }
    Ok(found)
}

/// The best heads, and what cannot be ranked.
fn print(report: &Report<'_>, out: &mut dyn Write) -> Result<()> {
    let Report { scores, threshold, n_retrieval_heads, n_zero, trials, .. } = report;
    let ranked = scores.ranked();
    writeln!(
        out,
        "{} of {} heads score above {threshold} ({:.1} %), {} score 0; {} of {} trials count\n",
        grouped(*n_retrieval_heads),
        grouped(ranked.len()),
        100.0 * report.share_retrieval_heads,
        grouped(*n_zero),
        grouped(scores.n_rows),
        grouped(trials.len()),
    )?;
    if scores.n_rows < FEW_TRIALS && scores.n_rows < trials.len() {
        tracing::warn!(
            "the model answered {} of {} trials: scores and intervals of so few say little\nhint: give needles that it finds, \
             shorter --lengths or more --trials",
            scores.n_rows,
            trials.len()
        );
    }
    if *n_zero == ranked.len() {
        writeln!(out, "every head scores 0: there is nothing to rank")?;
        return Ok(());
    }
    writeln!(out, "{:>12} {:>8}   95 % interval", "layer-head", "score")?;
    for &head in ranked.iter().take(N_SHOWN) {
        writeln!(
            out,
            "{:>12} {:>8.3}   {}",
            numbered(&scores.heads, head),
            head.of(&scores.scores),
            range(scores.interval_of(head), |x| format!("{x:.3}"))
        )?;
    }
    let n_tied = scores.n_tied();
    if n_tied > 0 {
        writeln!(out, "\n{n_tied} heads have the very score of another: their order says nothing")?;
    }
    Ok(())
}
