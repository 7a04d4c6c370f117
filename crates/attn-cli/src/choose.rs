//! `attn choose`: the attention of each layer by what the layer loses under it, within a budget.

use std::io::Write;

use anyhow::{Context, Result, anyhow, ensure};
use attn_core::{Config, Model, Variant, checkpoint::WriteOptions, variants::single_head};
use attn_data::hub::{Hub, progress_bar};
use attn_eval::{
    Budget, Cost, Divergence, Offer, Probing, Swapped, allocate, divergence, sensitivity,
    stats::Interval,
};
use serde::{Deserialize, Serialize};

use crate::{
    args::ChooseArgs,
    config::Written,
    memory::{self, Foreseen},
    monitor::{count_every_row, grouped},
    run_dir::{check_writable, write_json},
    save::{check_free, write},
    subject::Subject,
    surgery::{describe, refuse_two_texts, variants, with_own_settings},
    task::{Task, Which, dataset},
    texts::Folder,
};

/// Layers that stand side by side in the table.
const N_COLUMNS: usize = 12;

/// CANDIDATES.toml.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Candidates {
    candidate: Vec<Candidate>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Candidate {
    attention: Variant,
}

/// DIR/choice.json.
#[derive(Serialize)]
struct Report<'a> {
    #[serde(flatten)]
    subject: Subject<'a>,
    #[serde(flatten)]
    which: Which<'a>,
    n_rows: usize,
    /// Seed of what kinds add and draw, and of tokens that were hidden.
    seed: u64,
    /// The length at which cost was counted.
    n_tokens: i64,
    #[serde(skip_serializing_if = "Option::is_none")]
    budget: Option<Budget>,
    /// What the budget is a share of: the model with softmax attention in every layer.
    dense: Spent,
    /// Each layer as it is, then under each candidate.
    layers: &'a [Vec<Swapped>],
    /// The place in its list of what each layer got.
    choice: &'a [usize],
    spent: Spent,
    /// The sum over layers, as if swaps did not meet.
    kl_of_layers: f64,
    /// The chosen mixture against the model.
    divergence: &'a Divergence,
}

/// What all layers cost.
#[derive(Debug, Clone, Copy, Serialize)]
struct Spent {
    flops: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    state_bytes: Option<u64>,
}

impl Spent {
    fn of<'a>(layers: impl Iterator<Item = &'a Swapped>) -> Self {
        let nothing = Self { flops: 0, state_bytes: Some(0) };
        layers.fold(nothing, |sum, layer| Self {
            flops: sum.flops + layer.flops,
            state_bytes: sum.state_bytes.zip(layer.state_bytes).map(|(sum, own)| sum + own),
        })
    }
}

pub(crate) fn run(args: &ChooseArgs, out: &mut dyn Write) -> Result<()> {
    let written = Written::read(&args.config, &[])?;
    let candidates = written.complete(|Candidates { candidate }| {
        ensure!(
            !candidate.is_empty(),
            "there is no `[[candidate]]` table\nhint: write one for each attention to try: \
             [[candidate]] and below it attention = {{ kind = \"window\", size = 32 }}"
        );
        Ok(candidate.into_iter().map(|one| one.attention).collect::<Vec<_>>())
    })?;
    let wanted = args.budget.as_deref().map(Wanted::parse).transpose()?;
    ensure!(
        args.tokens != Some(0),
        "`--tokens` is 0, expected at least 1: the length at which cost is counted"
    );
    check_free(&args.out)?;
    let file = args.out.join("choice.json");
    let _made = check_writable(&file)?;
    args.compute.device()?;

    let data = dataset(&args.rows.task, &args.rows.set)?;
    let hub = Hub::from_env().with_progress(progress_bar());
    // What cannot be is refused before rows and weights are read.
    let folder = Folder::open(&args.model, args.compute.init.is_none(), None, &hub)?;
    let candidates = by_layer(&candidates, &folder.config);
    check(&folder.config, &candidates, wanted).with_context(|| {
        format!("cannot try the candidates of `{}` in `{}`", args.config.display(), args.model)
    })?;
    let task = Task::read(folder, &args.rows, data, None, &hub)?;
    ensure!(
        task.data.label.is_none(),
        "candidates are compared by predictions of tokens, and the task has labels\nhint: name a task of text, such as \
         wikitext-2"
    );
    let extent = task.extent();
    let of = &task.folder.config;
    // Every candidate's own parameters are made beside the model's, and thrown away.
    let mut all = of.clone();
    for (layer, tried) in candidates.iter().enumerate() {
        if let Some(last) = tried.last() {
            all.set_attention(&[layer], last)?;
        }
    }
    Foreseen::computing(&all, &args.compute)?
        .pass(extent)
        .inputs(extent)
        .with("predictions of both, in pieces", memory::PIECES)
        .check(args.compute.device()?, memory::OF_SCORING)?;
    let mut model = task.load(&args.compute, args.seed, &hub)?;
    let subject = Subject::new(&args.model, &args.compute, &model)?;
    let rows = task.unlabelled()?;
    let masking = task.masking()?;
    let n_tokens = match args.tokens {
        Some(n_tokens) => i64::from(n_tokens),
        None => task.max_len as i64,
    };
    let probing = Probing {
        rows: &rows,
        masking: masking.as_ref().map(|masking| (masking, args.seed)),
        n_tokens,
        seed: args.seed,
        batching: task.batching(),
        budget: None,
    };
    let dense = dense(&model, &probing)?;
    let budget = wanted.map(|wanted| wanted.of(dense)).transpose()?;
    let probing = Probing { budget, ..probing };

    let n_passes: usize = candidates.iter().map(Vec::len).sum();
    let mut progress = count_every_row(n_passes * rows.len());
    let layers = sensitivity(&model, &candidates, &probing, &mut progress)
        .with_context(|| format!("cannot try the candidates in `{}`", args.model))?;
    drop(progress);
    let choice = choose(&layers, budget)?;

    let teacher = model.alias()?;
    let chosen = || layers.iter().zip(&choice).map(|(layer, &place)| &layer[place]);
    for (layer, (swapped, &place)) in chosen().zip(&choice).enumerate() {
        if place > 0 {
            model.swap(&[layer], &swapped.attention, args.seed)?;
        }
    }
    let mut progress = count_every_row(rows.len());
    let batching = &probing.batching;
    let found = divergence(&model, &teacher, &rows, probing.masking, batching, &mut progress)?;
    drop(progress);

    let report = Report {
        subject,
        which: task.which(),
        n_rows: rows.len(),
        seed: args.seed,
        n_tokens,
        budget,
        dense,
        layers: &layers,
        choice: &choice,
        spent: Spent::of(chosen()),
        kl_of_layers: chosen().map(|layer| layer.kl_nats_per_token).sum(),
        divergence: &found,
    };
    let folder = args.out.join("model");
    write(&model, &task.folder.tokenizer, &folder, &WriteOptions::default())?;
    write_json(&file, &report)?;
    print(&report, &model, out)?;
    tracing::info!("wrote `{}`", args.out.display());
    Ok(())
}

/// Refuses candidates that a layer cannot have or that read two texts, and a budget of what the model does not keep.
fn check(config: &Config, candidates: &[Vec<Variant>], wanted: Option<Wanted>) -> Result<()> {
    if let Some(wanted) = wanted
        && wanted.cost == Cost::StateBytes
        && !config.is_causal()
    {
        return Err(without_state());
    }
    refuse_two_texts(config, "the model", "`attn choose`")?;
    for (layer, candidates) in candidates.iter().enumerate() {
        for (place, candidate) in candidates.iter().enumerate() {
            if candidates[..place].contains(candidate) {
                continue;
            }
            let mut changed = config.clone();
            changed
                .set_attention(&[layer], candidate)
                .with_context(|| format!("layer {layer} cannot have `{}`", candidate.name()))?;
            refuse_two_texts(&changed, "a candidate", "`attn choose`")?;
        }
    }
    Ok(())
}

fn without_state() -> anyhow::Error {
    anyhow!(
        "`--budget` is of `state_bytes`, and an encoder keeps nothing between tokens\nhint: give a budget of `flops`"
    )
}

/// A budget as it was typed.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Wanted {
    cost: Cost,
    amount: Amount,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Amount {
    Count(u64),
    /// Of dense attention, from 0 to 1.
    Share(f64),
}

impl Wanted {
    fn parse(text: &str) -> Result<Self> {
        let refuse = || {
            anyhow!(
                "`--budget` is `{text}`, expected `flops` or `state_bytes`, `=` and a number, or a share of dense \
                 attention such as `state_bytes=25%`"
            )
        };
        let (cost, amount) = text.split_once('=').ok_or_else(refuse)?;
        let cost = match cost {
            "flops" => Cost::Flops,
            "state_bytes" => Cost::StateBytes,
            _ => return Err(refuse()),
        };
        let amount = match amount.strip_suffix('%') {
            Some(percent) => {
                let percent: f64 = percent.parse().map_err(|_| refuse())?;
                ensure!(
                    (0.0..=100.0).contains(&percent),
                    "`--budget` is `{text}`, expected from 0 % to 100 %"
                );
                Amount::Share(percent / 100.0)
            }
            None => Amount::Count(amount.parse().map_err(|_| refuse())?),
        };
        Ok(Self { cost, amount })
    }

    fn of(self, dense: Spent) -> Result<Budget> {
        let Self { cost, amount } = self;
        let whole = match cost {
            Cost::Flops => Some(dense.flops),
            Cost::StateBytes => dense.state_bytes,
        };
        let whole = whole.ok_or_else(without_state)?;
        let most = match amount {
            Amount::Count(most) => most,
            Amount::Share(share) => (share * whole as f64).floor() as u64,
        };
        Ok(Budget { cost, most })
    }
}

/// The candidates of each layer, `single_head` from the best head as one a head where no head is named.
fn by_layer(candidates: &[Variant], config: &Config) -> Vec<Vec<Variant>> {
    let of_layer = |n_heads: i64| {
        let each = candidates.iter().flat_map(|candidate| match candidate {
            Variant::SingleHead(any)
                if any.from == single_head::From::Best && any.head.is_none() =>
            {
                let of_head = |head| single_head::Config { head: Some(head), ..any.clone() };
                (0..n_heads as u32).map(|head| Variant::SingleHead(of_head(head))).collect()
            }
            other => vec![other.clone()],
        });
        each.collect()
    };
    config.layers.iter().map(|layer| of_layer(layer.n_heads)).collect()
}

/// The model with softmax attention in every layer.
fn dense(model: &Model, probing: &Probing<'_>) -> Result<Spent> {
    let mut dense = model.alias()?;
    let layers: Vec<usize> = (0..model.layers().len()).collect();
    dense.swap(&layers, &Variant::default(), probing.seed)?;
    let none = vec![Vec::new(); layers.len()];
    let layers = sensitivity(&dense, &none, probing, &mut count_every_row(0))?;
    Ok(Spent::of(layers.iter().flatten()))
}

/// The place of what each layer gets: within the budget, or of the candidates the nearest.
fn choose(layers: &[Vec<Swapped>], budget: Option<Budget>) -> Result<Vec<usize>> {
    let offer = |swapped: &Swapped, cost: Option<Cost>| -> Result<Offer> {
        let cost = cost.map(|cost| swapped.cost(cost)).transpose()?.unwrap_or(0);
        Ok(Offer { kl: swapped.kl_nats_per_token, cost })
    };
    match budget {
        Some(budget) => {
            let offers = layers
                .iter()
                .map(|layer| layer.iter().map(|one| offer(one, Some(budget.cost))).collect())
                .collect::<Result<Vec<_>>>()?;
            Ok(allocate(&offers, budget)?)
        }
        // The layer as it is would win.
        None => {
            let nearest = |layer: &Vec<Swapped>| {
                (1..layer.len())
                    .min_by(|&a, &b| {
                        let kl = |place: usize| layer[place].kl_nats_per_token;
                        kl(a).total_cmp(&kl(b))
                    })
                    .context(
                        "a layer without heads has no candidate\nhint: add one that is no single head",
                    )
            };
            layers.iter().map(nearest).collect()
        }
    }
}

/// The table of layers and candidates, what each layer got, and what became of the model.
fn print(report: &Report<'_>, model: &Model, out: &mut dyn Write) -> Result<()> {
    let Report { layers, choice, n_tokens, spent, dense, divergence, .. } = report;
    // Layers may have other heads, and so other candidates.
    let mut names: Vec<String> = Vec::new();
    let name = |place: usize, one: &Swapped| match place {
        0 => "as it is".to_owned(),
        _ => with_own_settings(&one.attention, layers.iter().flatten().map(|one| &one.attention)),
    };
    for (place, one) in layers.iter().flat_map(|layer| layer.iter().enumerate()) {
        let name = name(place, one);
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let width = names.iter().map(|name| name.chars().count()).max().unwrap_or(0).max(9);
    for first in (0..layers.len()).step_by(N_COLUMNS) {
        let last = (first + N_COLUMNS).min(layers.len());
        let numbers: String = (first..last).map(|layer| format!(" {layer:>8} ")).collect();
        writeln!(out, "{:<width$} {:>11} {:>11} {numbers}", "KL by layer", "Mflop", "bytes")?;
        for shown in &names {
            let cells: Vec<Option<(usize, &Swapped)>> = (first..last)
                .map(|layer| {
                    let mut all = layers[layer].iter().enumerate();
                    all.find(|&(place, one)| name(place, one) == *shown)
                })
                .collect();
            let costs = |of: &dyn Fn(&Swapped) -> Option<String>| {
                let mut all: Vec<String> =
                    cells.iter().flatten().filter_map(|(_, one)| of(one)).collect();
                all.dedup();
                match &all[..] {
                    [] => "-".to_owned(),
                    [one] => one.clone(),
                    _ => "differs".to_owned(),
                }
            };
            let flops = costs(&|one| Some(format!("{:.3}", one.flops as f64 / 1e6)));
            let bytes = costs(&|one| one.state_bytes.map(|bytes| grouped(bytes as usize)));
            write!(out, "{shown:<width$} {flops:>11} {bytes:>11} ")?;
            for (cell, layer) in cells.iter().zip(first..last) {
                match cell {
                    Some((place, one)) => {
                        let mark = if *place == choice[layer] { '*' } else { ' ' };
                        write!(out, " {:>8.4}{mark}", one.kl_nats_per_token)?;
                    }
                    None => write!(out, " {:>8} ", "-")?,
                }
            }
            writeln!(out)?;
        }
        writeln!(out)?;
    }
    let attention = describe(&variants(model)).unwrap_or_else(|| "as plain transformers".into());
    writeln!(out, "* chosen\n\nattention  {attention}")?;
    let share = |own: u64, whole: u64| 100.0 * own as f64 / whole as f64;
    let (mega, dense_mega) = (spent.flops as f64 / 1e6, dense.flops as f64 / 1e6);
    writeln!(
        out,
        "costs      {mega:.3} Mflop over {} tokens, {:.1} % of dense attention's {dense_mega:.3}",
        grouped(*n_tokens as usize),
        share(spent.flops, dense.flops),
    )?;
    if let (Some(own), Some(whole)) = (spent.state_bytes, dense.state_bytes) {
        writeln!(
            out,
            "keeps      {} bytes after as many, {:.1} % of {}",
            grouped(own as usize),
            share(own, whole),
            grouped(whole as usize)
        )?;
    }
    let Divergence { kl_nats_per_token, kl_interval_95: Interval { low, high }, .. } = divergence;
    writeln!(
        out,
        "KL         {kl_nats_per_token:.4} nats per token (95 % interval {low:.4} to {high:.4}), where its layers one by \
         one add up to {:.4}",
        report.kl_of_layers
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn the_bundled_candidates_say_what_they_cost_and_are_read() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/attention");
        let path = folder.join("choose.toml");
        let text = std::fs::read_to_string(&path).unwrap();
        let comment: String = text.lines().take_while(|line| line.starts_with('#')).collect();
        let command = "#   cargo run -p attn-cli -- choose configs/attention/choose.toml";
        assert!(comment.contains("Costs ") && comment.contains(command), "{comment}");

        let written = Written::read(&path, &[]).unwrap();
        let Candidates { candidate } = written.parse().unwrap();
        assert!(candidate.len() > 5);
        let any = |one: &&Candidate| match &one.attention {
            Variant::SingleHead(of) => of.from == single_head::From::Best && of.head.is_none(),
            _ => false,
        };
        assert_eq!(candidate.iter().filter(any).count(), 1);
    }

    #[test]
    fn a_budget_is_a_count_or_a_share() {
        let spent = Spent { flops: 1000, state_bytes: Some(999) };
        let most = |text: &str| Wanted::parse(text).unwrap().of(spent).unwrap();
        assert_eq!(most("flops=12"), Budget { cost: Cost::Flops, most: 12 });
        assert_eq!(most("state_bytes=25%"), Budget { cost: Cost::StateBytes, most: 249 });
        assert_eq!(most("flops=12.5%"), Budget { cost: Cost::Flops, most: 125 });
        for wrong in ["25%", "bytes=3", "flops=", "flops=x%", "flops=-1", "flops=1.5", "flops"] {
            let error = Wanted::parse(wrong).unwrap_err().to_string();
            assert!(error.contains(wrong) && error.contains("`state_bytes`"), "{error}");
        }
        let error = Wanted::parse("flops=101%").unwrap_err().to_string();
        assert!(error.contains("100 %"), "{error}");
        let encoder = Spent { state_bytes: None, ..spent };
        let error = Wanted::parse("state_bytes=9").unwrap().of(encoder).unwrap_err().to_string();
        assert!(error.contains("encoder") && error.contains("hint: "), "{error}");
    }
}
