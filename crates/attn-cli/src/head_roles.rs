//! `attn head-roles`: what each head does.

use std::io::Write;

use anyhow::{Context, Result, ensure};
use attn_core::Model;
use attn_data::{
    dataset::DatasetSpec,
    hub::{Hub, progress_bar},
    tokenizer::TextTokenizer,
    treebank::{Tree, sentences},
};
use attn_eval::{
    Batching, Direction, Head, HeadRoles, MIN_CASES, Phenomena, Phenomenon, Syntax, check_decoder,
    head_roles, n_passes, n_relations, phenomena, ranked, repeats, stats::Interval, syntax,
};
use serde::Serialize;

use crate::{
    args::HeadRolesArgs,
    attended::Attended,
    blimp::{self, Pairs},
    head_names::{numbered, warn_of_few},
    memory::{self, Foreseen, scored},
    monitor::{count_every_row, grouped},
    plot::write_result,
    run_dir::check_writable,
    subject::Subject,
    task::Which,
    texts::Folder,
};

/// Different tokens of a row of repeated ones, where model and vocabulary have room.
const N_DISTINCT: usize = 50;

/// Rows of repeated tokens.
const N_REPEATS: usize = 32;

/// Heads that are shown of each role.
const N_SHOWN: usize = 2;

/// Relations and effects that are shown.
const N_LINES: usize = 10;

/// The split that syntactic heads are chosen on, and the one that they are reported on.
const SPLITS: [&str; 2] = ["validation", "test"];

/// OUT.json.
#[derive(Serialize)]
struct Report<'a> {
    #[serde(flatten)]
    subject: Subject<'a>,
    #[serde(flatten)]
    which: Which<'a>,
    /// Rows of the split whose tokens were counted.
    n_counted_rows: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    repeats: Option<Repeats>,
    #[serde(flatten)]
    found: HeadRoles,
    #[serde(skip_serializing_if = "Option::is_none")]
    syntax: Option<OfTreebank<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    blimp: Option<OfPairs>,
}

/// The rows of repeated tokens.
#[derive(Serialize)]
struct Repeats {
    n_distinct: usize,
    n_rows: usize,
    seed: u64,
}

#[derive(Serialize)]
struct OfTreebank<'a> {
    treebank: &'a str,
    /// Most sentences of a split.
    limit: Option<usize>,
    /// Sentences too long for the model, or with a word that its tokenizer drops.
    n_left_out: usize,
    #[serde(flatten)]
    found: Syntax,
}

#[derive(Serialize)]
struct OfPairs {
    data: DatasetSpec,
    split: String,
    /// Most pairs of a paradigm.
    limit: usize,
    #[serde(flatten)]
    found: Phenomena,
}

pub(crate) fn run(args: &HeadRolesArgs, out: &mut dyn Write) -> Result<()> {
    let _made = check_writable(&args.out)?;
    for (name, is_zero) in
        [("--treebank-limit", args.treebank_limit == Some(0)), ("--blimp", args.blimp == Some(0))]
    {
        ensure!(!is_zero, "`{name}` is 0, expected at least 1\nhint: leave it away");
    }
    args.compute.device()?;
    let hub = Hub::from_env().with_progress(progress_bar());
    let folder = Folder::open(&args.model, args.compute.init.is_none(), None, &hub)?;
    if args.blimp.is_some() {
        check_decoder(&folder.config, "the likelihood of a sentence").with_context(|| {
            format!("cannot score `{}` on pairs of sentences (`--blimp`)", args.model)
        })?;
    }
    let texts = Attended::read(&folder, &args.rows, &hub)?;
    let trees = args
        .treebank
        .as_deref()
        .map(|source| Trees::read(source, args, &folder, &hub))
        .transpose()?;
    let pairs = args.blimp.map(|limit| read_pairs(limit, args, &folder, &hub)).transpose()?;
    // Texts are read few enough at a time for their attention to fit.
    let extent = scored(&texts.batching(&folder), &texts.rows);
    Foreseen::computing(&folder.config, &args.compute)?
        .pass(extent)
        .bounded_attention(extent, 4)
        .check(args.compute.device()?, memory::OF_SCORING)?;
    let model = folder.load(&args.compute, args.seed, &hub)?;

    let batching = texts.batching(&folder);
    let (repeated, rows) = repeated(&folder, args.seed);
    let measure = || -> Result<(HeadRoles, Option<Syntax>, Option<Phenomena>)> {
        let mut progress = count_every_row(texts.rows.len());
        let known = texts.known();
        let found = head_roles(&model, &texts.rows, &rows, &known, &batching, &mut progress)?;
        drop(progress);
        let of_trees = trees.as_ref().map(|trees| trees.score(&model, &batching)).transpose()?;
        let of_pairs = pairs.as_ref().map(|(_, pairs)| of_pairs(&model, pairs, &batching));
        Ok((found, of_trees, of_pairs.transpose()?))
    };
    let (found, of_trees, of_pairs) =
        measure().with_context(|| format!("cannot say what the heads of `{}` do", args.model))?;
    print(&found, &texts.which(), out)?;
    of_trees.as_ref().map(|found| print_syntax(found, out)).transpose()?;
    of_pairs.as_ref().map(|found| print_phenomena(found, &model, out)).transpose()?;
    let report = Report {
        subject: Subject::new(&args.model, &args.compute, &model)?,
        which: texts.which(),
        n_counted_rows: texts.n_counted,
        repeats: repeated,
        found,
        syntax: of_trees.zip(trees.as_ref()).map(|(found, trees)| OfTreebank {
            treebank: args.treebank.as_deref().unwrap_or_default(),
            limit: args.treebank_limit,
            n_left_out: trees.n_left_out,
            found,
        }),
        blimp: of_pairs.zip(pairs).map(|(found, (data, _))| OfPairs {
            split: data.validation_split.clone(),
            data,
            limit: args.blimp.unwrap_or_default(),
            found,
        }),
    };
    write_result(&args.out, &report, None)?;
    Ok(())
}

/// Random tokens said twice, for decoders: an encoder sees the second half before it is said.
fn repeated(folder: &Folder, seed: u64) -> (Option<Repeats>, Vec<attn_data::batch::Encoded>) {
    if !folder.config.is_causal() {
        return (None, Vec::new());
    }
    let tokenizer = &folder.tokenizer;
    let vocabulary = plain_ids(tokenizer);
    let begins = tokenizer.bos_id().or(tokenizer.eos_id());
    let room =
        (folder.config.sizes.max_positions.max(1) as usize - usize::from(begins.is_some())) / 2;
    let n_distinct = N_DISTINCT.min(room).min(vocabulary.len());
    if n_distinct < 2 {
        tracing::warn!(
            "no two tokens can be repeated: duplicate-token and induction heads are left out"
        );
        return (None, Vec::new());
    }
    let rows = repeats(&vocabulary, begins, n_distinct, N_REPEATS, seed);
    (Some(Repeats { n_distinct, n_rows: N_REPEATS, seed }), rows)
}

/// All ids that stand for text.
fn plain_ids(tokenizer: &TextTokenizer) -> Vec<u32> {
    let special = tokenizer.special_ids();
    let ids = 0..tokenizer.vocab_size() as u32;
    ids.filter(|id| tokenizer.token(*id).is_some() && special.binary_search(id).is_err()).collect()
}

/// The sentences of both splits as tokens.
struct Trees {
    splits: [Vec<Tree>; 2],
    n_left_out: usize,
}

impl Trees {
    fn read(source: &str, args: &HeadRolesArgs, folder: &Folder, hub: &Hub) -> Result<Self> {
        let mut n_left_out = 0;
        let mut split = |split: &str| -> Result<Vec<Tree>> {
            let most = folder.config.sizes.max_positions.max(1) as usize;
            let mut trees = Vec::new();
            for (number, sentence) in
                sentences(source, split, args.treebank_limit, hub)?.iter().enumerate()
            {
                let tree = sentence.tokenized(&folder.tokenizer, number)?;
                match tree.filter(|tree| tree.row.ids.len() <= most) {
                    Some(tree) => trees.push(tree),
                    None => n_left_out += 1,
                }
            }
            ensure!(
                !trees.is_empty(),
                "no sentence of split `{split}` fits the model, which reads {most} tokens, all of whose words its \
                 tokenizer knows"
            );
            Ok(trees)
        };
        let mut read = || -> Result<[Vec<Tree>; 2]> { Ok([split(SPLITS[0])?, split(SPLITS[1])?]) };
        let splits = read().with_context(|| format!("cannot use the treebank `{source}`"))?;
        ensure!(
            n_relations(&splits[0], &splits[1], folder.config.is_causal()) > 0,
            "the treebank `{source}` is too small: no relation occurs {MIN_CASES} times in each of `{}` and `{}`\nhint: \
             name a larger one, or leave `--treebank-limit` away",
            SPLITS[0],
            SPLITS[1]
        );
        Ok(Self { splits, n_left_out })
    }

    fn score(&self, model: &Model, batching: &Batching) -> Result<Syntax> {
        let [validation, test] = &self.splits;
        let mut progress = count_every_row(validation.len() + test.len());
        Ok(syntax(model, validation, test, batching, &mut progress)?)
    }
}

fn read_pairs(
    limit: usize,
    args: &HeadRolesArgs,
    folder: &Folder,
    hub: &Hub,
) -> Result<(DatasetSpec, Pairs)> {
    let known = DatasetSpec::known(blimp::TASK)?;
    let data = match &args.blimp_data {
        Some(source) => DatasetSpec { source: source.clone(), ..known },
        None => known,
    };
    let pairs = blimp::read(&data, &data.validation_split, Some(limit), folder, hub)?;
    Ok((data, pairs))
}

fn of_pairs(model: &Model, pairs: &Pairs, batching: &Batching) -> Result<Phenomena> {
    let terms: Vec<&str> = pairs.of.iter().map(|paradigm| paradigm.term).collect();
    let mut progress = count_every_row(pairs.sentences.len() * n_passes(model));
    Ok(phenomena(model, &pairs.sentences, &terms, batching, &mut progress)?)
}

/// As a range in percent.
fn percent(Interval { low, high }: Interval) -> String {
    format!("{:.1} to {:.1}", 100.0 * low, 100.0 * high)
}

fn print(found: &HeadRoles, which: &Which<'_>, out: &mut dyn Write) -> Result<()> {
    let HeadRoles { heads, n_texts, roles, measures, positional } = found;
    let n_heads: usize = heads.iter().map(Vec::len).sum();
    warn_of_few(*n_texts);
    writeln!(
        out,
        "{} query heads on {} texts, {} {}\n",
        grouped(n_heads),
        grouped(*n_texts),
        which.task,
        which.split
    )?;
    writeln!(
        out,
        "{:<24} {:>7} {:>9}   {:<15} {:>8} {:>7}",
        "largest weight on", "head", "tokens", "95 %", "chance", "mass"
    )?;
    for role in roles {
        let name = match role.offset {
            Some(offset) => format!("{} ({offset:+})", role.role),
            None => role.role.to_owned(),
        };
        // Over many heads and roles some pass chance by chance: those that it does not explain are at twice of it.
        let plays = |head: &Head| head.of(&role.share_interval_95).low > 2.0 * role.chance;
        let shown: Vec<Head> =
            ranked(&role.share).into_iter().take(N_SHOWN).filter(plays).collect();
        if shown.is_empty() {
            writeln!(out, "{name:<24} {:>7} {:>34.1} %", "none", 100.0 * role.chance)?;
        }
        for (at, head) in shown.into_iter().enumerate() {
            writeln!(
                out,
                "{:<24} {:>7} {:>7.1} %   {:<15} {:>6.1} % {:>7.3}",
                if at == 0 { &name } else { "" },
                numbered(heads, head),
                100.0 * head.of(&role.share),
                percent(*head.of(&role.share_interval_95)),
                100.0 * role.chance,
                head.of(&role.mass)
            )?;
        }
    }
    writeln!(out, "\n{:<24} {:>7} {:>9}   {:<15} {:>8}", "mean", "head", "", "95 %", "uniform")?;
    for measure in measures {
        let all = ranked(&measure.mean);
        let ends = [all.first(), all.last()].into_iter().flatten();
        for (shown, head) in ends.enumerate() {
            let name = match shown {
                0 => format!("{} ({})", measure.measure, measure.unit),
                _ => String::new(),
            };
            let Interval { low, high } = head.of(&measure.interval_95);
            writeln!(
                out,
                "{name:<24} {:>7} {:>9.3}   {:<15} {:>8.3}",
                numbered(heads, *head),
                head.of(&measure.mean),
                format!("{low:.3} to {high:.3}"),
                measure.uniform
            )?;
        }
    }
    writeln!(out)?;
    match positional.is_empty() {
        true => writeln!(out, "No head looks at one relative position from 90 % of the tokens.")?,
        false => {
            let named = positional
                .iter()
                .map(|one| format!("{}-{} ({:+})", one.layer, one.head, one.offset))
                .collect::<Vec<_>>();
            writeln!(out, "Positional heads, from 90 % of the tokens on: {}", named.join(", "))?;
        }
    }
    Ok(())
}

fn print_syntax(found: &Syntax, out: &mut dyn Write) -> Result<()> {
    writeln!(
        out,
        "\n{:<34} {:>6} {:>8}   {:<13} {:>15} {:>8} {:>7}   95 %",
        "relation (head chosen on", "head", "right", "95 %", "fixed distance", "chance", "above"
    )?;
    writeln!(out, "validation, shown on test)")?;
    for one in found.relations.iter().take(N_LINES) {
        let way = match one.direction {
            Direction::HeadToDependent => "head to dependent",
            Direction::DependentToHead => "dependent to head",
        };
        writeln!(
            out,
            "{:<34} {:>6} {:>6.1} %   {:<13} {:>8.1} % ({:+}) {:>6.1} % {:>7.1}   {}",
            format!("{}, {way}", one.relation),
            format!("{}-{}", one.layer, one.head),
            100.0 * one.accuracy,
            percent(one.interval_95),
            100.0 * one.baseline,
            one.baseline_offset,
            100.0 * one.chance,
            100.0 * one.above_baseline,
            percent(one.above_baseline_interval_95)
        )?;
    }
    let n_above = found.relations.iter().filter(|one| one.is_syntactic).count();
    writeln!(
        out,
        "{n_above} of {} relations and directions have a head 10 points above a fixed distance. Heads that are syntactic in both \
         splits: {}. {} pairs of head and relation were tried.",
        found.relations.len(),
        found.n_syntactic_heads,
        grouped(found.n_tested)
    )?;
    Ok(())
}

fn print_phenomena(found: &Phenomena, model: &Model, out: &mut dyn Write) -> Result<()> {
    let layers = model.layers();
    let effects = found
        .phenomena
        .iter()
        .flat_map(|one| ranked(&one.effect).into_iter().map(move |head| (one, head)));
    let mut all: Vec<(&Phenomenon, Head)> = effects.collect();
    let p = |(one, head): &(&Phenomenon, Head)| *head.of(&one.mcnemar_p);
    all.sort_by(|a, b| p(a).total_cmp(&p(b)));
    let bar = 0.05 / found.n_tested as f64;
    writeln!(
        out,
        "\n{:<28} {:>6} {:>10} {:>13}   {:<15} p (McNemar)",
        "pairs of sentences", "head", "accuracy", "head at zero", "95 %"
    )?;
    for case in all.iter().take(N_LINES) {
        let (one, head) = case;
        writeln!(
            out,
            "{:<28} {:>6} {:>8.1} % {:>+11.1}     {:<15} {:.1e}",
            one.phenomenon,
            format!("{}-{}", head.layer, layers[head.layer].spec().kept_heads[head.place]),
            100.0 * one.accuracy,
            100.0 * head.of(&one.effect),
            percent(*head.of(&one.effect_interval_95)),
            p(case)
        )?;
    }
    let n_below = all.iter().filter(|case| p(case) < bar).count();
    writeln!(
        out,
        "{n_below} of {} effects have p < 0.05 / {0} (Bonferroni).",
        grouped(found.n_tested)
    )?;
    Ok(())
}
