//! `attn needle`: what a model finds in long texts, by length and depth, and without which heads it does not.

use std::{
    collections::BTreeMap,
    fs,
    io::Write,
    iter,
    ops::Range,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use attn_core::{Config, Gate};
use attn_data::{
    batch::Encoded,
    dataset::DatasetSpec,
    hub::{Hub, progress_bar},
    needle::NeedleKind,
};
use attn_eval::{
    AnswerScore, Answered, Band, Batching, Head, MaskFill, Recall, Recalled, answer, band,
    check_decoder, closed, draw_heads, recall, stats::Interval,
};
use serde::Serialize;

use crate::{
    args::NeedleArgs,
    haystack::{Hiding, Place, answering, draw_grid, short_name},
    head_names::{QUERY_HEAD, read_scores},
    memory::{self, Foreseen},
    monitor::{count_every_row, grouped},
    plot::write_result,
    run_dir::check_writable,
    subject::Subject,
    texts::Folder,
};

/// Draws random heads apart from the documents.
const RANDOM_HEADS: u64 = 0x6865_6164;

/// OUT.json.
#[derive(Serialize)]
struct Report<'a> {
    #[serde(flatten)]
    subject: Subject<'a>,
    haystack: &'a DatasetSpec,
    split: Option<&'a str>,
    seed: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_new_tokens: Option<usize>,
    cells: Vec<Cell>,
    #[serde(skip_serializing_if = "Option::is_none")]
    masked: Option<Masked<'a>>,
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
    /// Of the answers that were written.
    answers: Option<AnswerScore>,
}

/// One document.
#[derive(Serialize)]
struct Trial {
    #[serde(flatten)]
    place: Place,
    #[serde(flatten)]
    recalled: Recalled,
    #[serde(flatten)]
    answered: Option<Answered>,
}

/// What the model answers without some of its heads.
#[derive(Serialize)]
struct Masked<'a> {
    /// Whose best heads were masked.
    scores: &'a Path,
    fill: MaskFill,
    /// Which heads are meant.
    unit: &'static str,
    n_heads: usize,
    /// The best, `[layer, head]`, by their numbers in the pretrained layers.
    top: Vec<[i64; 2]>,
    /// The whole grid: untouched, without the best, and as it is with random heads masked.
    untouched: AnswerScore,
    without_top: AnswerScore,
    rouge1_recall_band: Band,
    word_match_band: Band,
    cells: Vec<MaskedCell>,
    random: Vec<RandomHeads>,
}

/// One kind at one length and depth, as in [`Cell`].
#[derive(Serialize)]
struct MaskedCell {
    kind: NeedleKind,
    length: usize,
    depth: Option<f64>,
    untouched: AnswerScore,
    without_top: AnswerScore,
    rouge1_recall_band: Band,
    word_match_band: Band,
}

/// A draw.
#[derive(Serialize)]
struct RandomHeads {
    /// `[layer, head]`, by their numbers in the pretrained layers.
    heads: Vec<[i64; 2]>,
    answers: AnswerScore,
}

/// Random draws below which they are said to be few.
const FEW_DRAWS: usize = 20;

/// Heads to mask.
struct Choice {
    /// By their numbers in the pretrained layers.
    numbers: Vec<Vec<i64>>,
    top: Vec<Head>,
    random: Vec<Vec<Head>>,
}

pub(crate) fn run(args: &NeedleArgs, out: &mut dyn Write) -> Result<()> {
    let _made = check_writable(&args.out)?;
    ensure!(args.batch_size > 0, "`--batch-size` is 0, expected at least 1");
    let writes = args.documents.max_new_tokens > 0;
    ensure!(
        writes || (args.mask_heads.is_none() && args.pictures.is_none()),
        "`--max-new-tokens` is 0, and `--mask-heads` and `--pictures` go by the answers that are written"
    );
    args.compute.device()?;
    let hub = Hub::from_env().with_progress(progress_bar());
    let folder = Folder::open(&args.model, args.compute.init.is_none(), None, &hub)?;
    check_decoder(&folder.config, "answers")
        .with_context(|| format!("cannot score `{}`", args.model))?;
    let source = (args.haystack.as_str(), args.split.as_deref(), args.set.as_slice());
    let hiding = Hiding::open(source, &args.documents, &folder, &hub)?;
    let choice = choose(args, &folder.config)?;
    let documents = hiding.documents(&args.documents, &folder.tokenizer, args.seed)?;
    let pictures = args.pictures.as_deref();
    if let Some(dir) = pictures {
        fs::create_dir_all(dir).with_context(|| format!("cannot make `{}`", dir.display()))?;
    }
    let longest =
        documents.iter().map(|(_, document)| document.ids.len() as u64).max().unwrap_or(1);
    let extent = memory::batch(args.batch_size, Some(8192), longest, documents.len());
    let written = longest + args.documents.max_new_tokens as u64;
    Foreseen::computing(&folder.config, &args.compute)?
        .pass(extent)
        .cache((extent.0, written))
        .logits(extent.0 * 64, 3)
        .check(args.compute.device()?, memory::OF_NEEDLES)?;
    let model = folder.load(&args.compute, args.seed, &hub)?;

    let pad_id = folder.tokenizer.fill_id();
    let batching = Batching { batch_size: args.batch_size, pad_id, ..Batching::default() };
    let (places, rows): (Vec<Place>, Vec<Encoded>) = documents
        .into_iter()
        .enumerate()
        .map(|(index, (place, document))| {
            (place, Encoded { ids: document.ids, label: None, index, second_from: None })
        })
        .unzip();
    let told = |place: &Place| iter::once(place.answer[0]..place.answer[1]).collect();
    let answers: Vec<Vec<Range<usize>>> = places.iter().map(told).collect();
    let mut progress = count_every_row(rows.len());
    let recalled = recall(&model, &rows, &answers, &batching, &mut progress)
        .with_context(|| format!("cannot score `{}`", args.model))?;
    drop(progress);

    let prompts: Vec<Vec<u32>> =
        places.iter().zip(&rows).map(|(place, row)| row.ids[..place.answer[0]].to_vec()).collect();
    let expected: Vec<String> = places.iter().map(|place| place.expected.clone()).collect();
    let answered = |gates: &[Option<Gate>]| -> Result<Vec<Answered>> {
        let mut progress = count_every_row(prompts.len());
        answering(&folder, args.documents.max_new_tokens, |how| {
            Ok(answer(&model, &prompts, &expected, gates, how, &batching, &mut progress)?)
        })
        .with_context(|| format!("`{}` cannot answer", args.model))
    };
    let untouched = if writes { Some(answered(&[])?) } else { None };
    let masked = match (&choice, &untouched) {
        (Some(choice), Some(untouched)) => {
            let without = |heads: &[Head]| answered(&closed(&model, heads, args.mask.into()));
            let top = without(&choice.top)?;
            let mut random = Vec::with_capacity(choice.random.len());
            for (draw, heads) in choice.random.iter().enumerate() {
                tracing::info!("random heads, draw {} of {}", draw + 1, choice.random.len());
                random.push(without(heads)?);
            }
            Some(compare(args, choice, &places, [untouched, &top], &random, pictures)?)
        }
        _ => None,
    };
    if let (Some(dir), Some(untouched)) = (pictures, &untouched) {
        picture(args, &picture_path(dir, &args.model, "0"), "untouched", &places, &[untouched])?;
    }
    let mut untouched = untouched.map(Vec::into_iter);
    let trials: Vec<Trial> = places
        .into_iter()
        .zip(recalled)
        .map(|(place, mut recalled)| Trial {
            place,
            recalled: recalled.remove(0),
            answered: untouched.as_mut().and_then(Iterator::next),
        })
        .collect();
    let cells = cells(&trials);
    print(&cells, args.documents.depths, out)?;
    if let Some(masked) = &masked {
        print_masked(masked, out)?;
    }
    let report = Report {
        subject: Subject::new(&args.model, &args.compute, &model)?,
        haystack: &hiding.data,
        split: hiding.split.as_deref(),
        seed: args.seed,
        max_new_tokens: writes.then_some(args.documents.max_new_tokens),
        cells,
        masked,
        trials,
    };
    write_result(&args.out, &report, None)?;
    Ok(())
}

/// The heads to mask, where some are to be; checked against the model that the scores are to be of.
fn choose(args: &NeedleArgs, config: &Config) -> Result<Option<Choice>> {
    let (Some(path), Some(k)) = (&args.mask_heads, args.top) else { return Ok(None) };
    let shown = path.display();
    let scores = read_scores(path, &args.model, config).context("cannot use `--mask-heads`")?;
    let ranked = scores.ranked();
    ensure!(
        k > 0 && 2 * k <= ranked.len(),
        "`--top` is {k}, and the model has {} heads, expected 1 to half of them: as many others are drawn",
        ranked.len()
    );
    ensure!(args.random_draws > 0, "`--random-draws` is 0, expected at least 1 (20 make a band)");
    if args.random_draws < FEW_DRAWS {
        tracing::warn!(
            "{} random draws make no band: the least p they can give is {:.2}\nhint: --random-draws {FEW_DRAWS}",
            args.random_draws,
            1.0 / (1 + args.random_draws) as f64
        );
    }
    let score = |head: Head| *head.of(&scores.scores);
    if score(ranked[k - 1]) == score(ranked[k]) {
        bail!(
            "the best {k} heads of `--mask-heads {shown}` are not to be told from others: heads {k} and {} both score {}\n             hint: give another `--top`",
            k + 1,
            score(ranked[k])
        );
    }
    let top = ranked[..k].to_vec();
    let seed = args.seed ^ RANDOM_HEADS;
    let random = draw_heads(&ranked, &top, k, args.random_draws, seed).expect("half are others");
    Ok(Some(Choice { numbers: scores.heads, top, random }))
}

/// The grid untouched, without the best heads, and without random ones.
fn compare<'a>(
    args: &'a NeedleArgs,
    choice: &Choice,
    places: &[Place],
    [untouched, top]: [&[Answered]; 2],
    random: &[Vec<Answered>],
    pictures: Option<&Path>,
) -> Result<Masked<'a>> {
    let of = |answers: &[Answered], at: &[usize]| {
        AnswerScore::of(at.iter().map(|&at| &answers[at])).expect("a group has trials")
    };
    let bands = |without_top: &AnswerScore, at: &[usize]| {
        let draws: Vec<AnswerScore> = random.iter().map(|answers| of(answers, at)).collect();
        let each = |score: fn(&AnswerScore) -> f64| {
            let draws: Vec<f64> = draws.iter().map(score).collect();
            band(score(without_top), &draws).expect("checked: there are draws")
        };
        (each(|score| score.rouge1_recall), each(|score| score.word_match))
    };
    let cell = |((kind, length, depth), at): (Key, Vec<usize>)| {
        let (untouched, without_top) = (of(untouched, &at), of(top, &at));
        let (rouge1_recall_band, word_match_band) = bands(&without_top, &at);
        let depth = depth.map(f64::from_bits);
        MaskedCell {
            kind,
            length,
            depth,
            untouched,
            without_top,
            rouge1_recall_band,
            word_match_band,
        }
    };
    let all: Vec<usize> = (0..places.len()).collect();
    let without_top = of(top, &all);
    let (rouge1_recall_band, word_match_band) = bands(&without_top, &all);
    let names = |heads: &[Head]| {
        heads.iter().map(|head| [head.layer as i64, *head.of(&choice.numbers)]).collect()
    };
    if let Some(dir) = pictures {
        let k = choice.top.len();
        let file = |what: &str| picture_path(dir, &args.model, &format!("{what}{k}"));
        picture(args, &file("_top"), &format!("the best {k} heads masked"), places, &[top])?;
        let draws: Vec<&[Answered]> = random.iter().map(Vec::as_slice).collect();
        let which = format!("{k} random heads masked, mean of {} draws", draws.len());
        picture(args, &file("_random"), &which, places, &draws)?;
    }
    Ok(Masked {
        unit: QUERY_HEAD,
        scores: args.mask_heads.as_deref().expect("heads were chosen by it"),
        fill: args.mask.into(),
        n_heads: choice.numbers.iter().map(Vec::len).sum(),
        top: names(&choice.top),
        untouched: of(untouched, &all),
        without_top,
        rouge1_recall_band,
        word_match_band,
        cells: groups(places).into_iter().map(cell).collect(),
        random: choice
            .random
            .iter()
            .zip(random)
            .map(|(heads, answers)| RandomHeads { heads: names(heads), answers: of(answers, &all) })
            .collect(),
    })
}

fn picture_path(dir: &Path, model: &str, which: &str) -> PathBuf {
    dir.join(format!("{}_block{which}.png", short_name(model)))
}

/// Draws the ROUGE-1 recall of answers, the mean over all kinds and over `answers`.
fn picture(
    args: &NeedleArgs,
    path: &Path,
    which: &str,
    places: &[Place],
    answers: &[&[Answered]],
) -> Result<()> {
    let mut depths: Vec<f64> = places.iter().map(|place| place.wanted_depth).collect();
    depths.sort_by(f64::total_cmp);
    depths.dedup();
    let percent = |length: usize, depth: f64| {
        let is_in = |place: &Place| place.length == length && place.wanted_depth == depth;
        let of = |answers: &&[Answered]| -> Vec<Answered> {
            let cell = places.iter().zip(*answers).filter(|(place, _)| is_in(place));
            cell.map(|(_, answered)| answered.clone()).collect()
        };
        let all: Vec<Answered> = answers.iter().flat_map(of).collect();
        100.0 * AnswerScore::of(&all).expect("a cell has trials").rouge1_recall
    };
    let subtitle = format!("{}, {which}; ROUGE-1 recall in %", short_name(&args.model));
    draw_grid(path, subtitle, &args.documents.lengths, &depths, percent)
}

/// Kind, length, and depth as a key: depths are equal bit for bit or not at all, and no smaller than 0.
type Key = (NeedleKind, usize, Option<u64>);

/// The trials of each kind at each length: all depths together, then one by one.
fn groups<'a>(places: impl IntoIterator<Item = &'a Place>) -> BTreeMap<Key, Vec<usize>> {
    let mut groups: BTreeMap<Key, Vec<usize>> = BTreeMap::new();
    for (at, Place { kind, length, wanted_depth, .. }) in places.into_iter().enumerate() {
        for depth in [None, Some(wanted_depth.to_bits())] {
            groups.entry((*kind, *length, depth)).or_default().push(at);
        }
    }
    groups
}

fn cells(trials: &[Trial]) -> Vec<Cell> {
    let cell = |((kind, length, depth), at): (Key, Vec<usize>)| {
        let recall = Recall::of(at.iter().map(|&at| &trials[at].recalled));
        let answers = AnswerScore::of(at.iter().filter_map(|&at| trials[at].answered.as_ref()));
        let recall = recall.expect("a group has trials");
        Cell { kind, length, depth: depth.map(f64::from_bits), recall, answers }
    };
    groups(trials.iter().map(|trial| &trial.place)).into_iter().map(cell).collect()
}

/// The untouched model, the best heads masked, and random ones.
fn print_masked(masked: &Masked<'_>, out: &mut dyn Write) -> Result<()> {
    let names: Vec<String> =
        masked.top.iter().map(|[layer, head]| format!("{layer}-{head}")).collect();
    writeln!(
        out,
        "\nROUGE-1 recall of answers in %, {} of {} heads masked; best: {}",
        masked.top.len(),
        masked.n_heads,
        names.join(" ")
    )?;
    let percent = |share: f64| 100.0 * share;
    for (name, AnswerScore { rouge1_recall, rouge1_interval_95: Interval { low, high }, .. }) in
        [("untouched", masked.untouched), ("without the best", masked.without_top)]
    {
        let (low, high) = (percent(low), percent(high));
        writeln!(out, "{name:>20} {:>6.1} ({low:.1} to {high:.1})", percent(rouge1_recall))?;
    }
    let Band { mean, low, high, n_draws, p_value } = masked.rouge1_recall_band;
    let (low, high) = (percent(low), percent(high));
    writeln!(
        out,
        "{:>20} {:>6.1} ({low:.1} to {high:.1} over {n_draws} draws), p {p_value:.3}",
        "without random heads",
        percent(mean)
    )?;
    Ok(())
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
