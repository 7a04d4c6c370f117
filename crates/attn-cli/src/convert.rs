//! `attn convert`: fewer key/value heads in the layers of a model, or more, as a folder of its own.

use std::{io::Write, path::Path};

use anyhow::{Context, Result, bail, ensure};
use attn_core::{
    Config, LoadOptions, Merge, Merged, Model, check_merge, checkpoint::WriteOptions, config::Head,
    expanded, save_multi_query,
};
use attn_data::{
    batch::{Encoded, Masking},
    hub::{Hub, progress_bar},
};
use attn_eval::{
    Batching, Converted, Divergence, Text, WithHeads, against, cache_bytes, choose_kv_heads,
    convert, kl_difference, kv_sensitivity, moments, n_parameters, set_apart, stats::Interval,
};
use serde::Serialize;
use tch::{Device, Kind};

use crate::{
    args::{ConvertArgs, Form, MergeBy, dtype_name},
    config::bundled,
    monitor::{count_every_row, count_every_row_of, grouped},
    prune::{Layer, of_layer, warn_of_few_tokens},
    run_dir::SCHEMA,
    save::{Replace, check_free, check_replaceable, write_with},
    swap::layers,
    task::dataset,
    texts::{Folder, load_model, max_len, read_split},
};

/// The file in the folder that says what was made of what.
const FILE: &str = "conversion.json";

/// The text that is read where none is named.
const TEXT: &str = "data/sample_text.txt";

/// Most tokens of a block where nothing says otherwise.
const BLOCK: usize = 512;

/// Tokens that `--cache` tries each layer's candidates on, at most.
const SENSITIVITY_TOKENS: usize = 8192;

/// conversion.json.
#[derive(Serialize)]
struct Report {
    schema: u32,
    attn: &'static str,
    model: String,
    method: Merge,
    /// Layers that were named.
    layers: Vec<usize>,
    kv_heads_before: Vec<i64>,
    kv_heads_after: Vec<i64>,
    parameters_before: usize,
    parameters_after: usize,
    /// Keys and values of one token in all layers, in `cache_dtype`.
    cache_bytes_per_token_before: u64,
    cache_bytes_per_token_after: u64,
    cache_dtype: &'static str,
    /// Whether transformers loads the folder.
    loads_in_transformers: bool,
    form: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<Read>,
    merged: Vec<Merged>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    refitted: Vec<Layer>,
    /// The most bytes that `--cache` allowed.
    #[serde(skip_serializing_if = "Option::is_none")]
    budget_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    sensitivity: Vec<OfLayer>,
    #[serde(skip_serializing_if = "Option::is_none")]
    measured: Option<Measured>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    compared: Vec<Measured>,
}

/// The text.
#[derive(Serialize)]
struct Read {
    task: String,
    split: String,
    max_len: usize,
    seed: u64,
    /// Blocks that were read, and those that models were compared on.
    n_rows: usize,
    n_tokens: usize,
    n_test_rows: usize,
    n_test_tokens: usize,
}

/// What one layer loses by numbers of heads of its own.
#[derive(Serialize)]
struct OfLayer {
    layer: usize,
    tried: Vec<WithHeads>,
}

/// A converted model against what it was, on text that was set apart.
#[derive(Clone, Serialize)]
struct Measured {
    method: Merge,
    refit: bool,
    kl_nats_per_token: f64,
    kl_interval_95: Interval,
    perplexity: f64,
    perplexity_before: f64,
    /// Its KL less that of the model that was written, over the same blocks.
    #[serde(skip_serializing_if = "Option::is_none")]
    kl_more: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kl_more_interval_95: Option<Interval>,
    #[serde(skip)]
    by_row: Vec<(f64, f64)>,
}

/// The text as it is read: blocks to fit to, and blocks to compare models on.
struct Blocks {
    read: Read,
    calibration: Vec<Encoded>,
    test: Vec<Encoded>,
    masking: Option<Masking>,
    pad_id: u32,
}

impl Blocks {
    fn text<'a>(&'a self, rows: &'a [Encoded]) -> Text<'a> {
        let batching =
            Batching { pad_id: self.pad_id, max_tokens: Some(2048), ..Batching::default() };
        Text { rows, masking: self.masking.as_ref().map(|masking| (masking, 0)), batching }
    }
}

pub(crate) fn run(args: &ConvertArgs, out: &mut dyn Write) -> Result<()> {
    if let Some(threads) = args.threads {
        tch::set_num_threads(threads.get().into());
    }
    let hub = Hub::from_env().with_progress(progress_bar());
    let folder = Folder::open(&args.model, true, None, &hub)?;
    match args.force {
        true => check_replaceable(&args.out, &[&folder.path])?,
        false => check_free(&args.out)?,
    }
    // What cannot be is refused before texts and weights are read.
    let method = method(args);
    let config = folder.config.clone();
    let n_layers = config.layers.len();
    let named = match &args.layers {
        None => (0..n_layers).collect(),
        Some(text) => layers(text, n_layers).context("cannot use `--layers`")?,
    };
    let dtype = Kind::from(args.dtype);
    let budget = args.cache.as_deref().map(|text| budget(text, &config, dtype)).transpose()?;
    let candidates = candidates(args, &config, &named)?;
    for (layer, numbers) in &candidates {
        for &n in numbers {
            check_merge(&config, &[(*layer, n)], method).context("cannot use `--kv-heads`")?;
        }
    }
    check_form(args, &config, &candidates)?;
    if config.head != Head::LanguageModel {
        let flag = [(args.compare, "--compare"), (budget.is_some(), "--cache")];
        if let Some((_, flag)) = flag.into_iter().find(|(is_set, _)| *is_set) {
            bail!(
                "`{flag}` compares predictions of tokens, and the model ends in {}\nhint: leave it out and name a number, \
                 --kv-heads",
                config.head
            );
        }
    }
    // Copies need no text.
    let is_fewer = |(layer, numbers): &(usize, Vec<i64>)| {
        numbers.iter().any(|&n| n < config.layers[*layer].n_kv_heads)
    };
    let loses = candidates.iter().any(is_fewer);
    let reads = args.compare || (loses && (method.reads_text() || args.refit));
    let blocks = (reads || budget.is_some() || args.calibration.is_some())
        .then(|| blocks(args, &folder, &hub))
        .transpose()?;

    let options = LoadOptions { device: Device::Cpu, ..LoadOptions::default() };
    let whole = load_model(&folder.path, None, &options, &hub)
        .with_context(|| format!("cannot load the model `{}`", args.model))?;
    let calibration = blocks.as_ref().map(|blocks| blocks.text(&blocks.calibration));
    let needs_moments = args.compare || (loses && method.reads_text());
    let moments = match calibration.as_ref().filter(|_| needs_moments) {
        Some(text) => {
            let mut progress = count_every_row_of("reading", text.rows.len());
            Some(moments(&whole, &named, text, &mut progress).context("cannot read the text")?)
        }
        None => None,
    };
    let mut sensitivity = Vec::new();
    let wanted: Vec<(usize, i64)> = match (budget, &blocks) {
        (Some(most), Some(blocks)) => {
            sensitivity = tried(&whole, &candidates, (method, moments.as_ref()), blocks, dtype)?;
            let others = bytes_of_token(&config, &named, dtype);
            let found: Vec<Vec<WithHeads>> =
                sensitivity.iter().map(|it| it.tried.clone()).collect();
            let chosen = choose_kv_heads(&found, most.saturating_sub(others))
                .context("cannot use `--cache`")?;
            named.iter().copied().zip(chosen).collect()
        }
        _ => candidates.iter().map(|(layer, numbers)| (*layer, numbers[0])).collect(),
    };

    let make = |method: Merge, refit: bool| -> Result<Converted> {
        let text = calibration.as_ref().filter(|_| refit);
        let mut progress = count_every_row_of("fitting", text.map_or(0, |text| text.rows.len()));
        let fit = text.map(|text| (args.ridge, text));
        Ok(convert(&whole, &wanted, (method, moments.as_ref()), fit, &mut progress)?)
    };
    let Converted { model, merged, refitted } =
        make(method, args.refit).with_context(|| format!("cannot convert `{}`", args.model))?;
    let test = blocks.as_ref().and_then(|blocks| testable(blocks, &config));
    ensure!(
        !args.compare || test.is_some(),
        "`--compare` has no text to compare models on\nhint: more text, or more --test-tokens: a quarter of the text at most is \
         set apart"
    );
    let mut measured = None;
    let mut compared = Vec::new();
    if let Some(test) = &test {
        let measure = |model: &Model, method: Merge, refit: bool| -> Result<Measured> {
            let mut progress = count_every_row(test.rows.len());
            let found = against(&whole, model, test, &mut progress)?;
            Ok(of_divergence(&found, method, refit))
        };
        let own = measure(&model, method, args.refit)?;
        if args.compare {
            for other in Merge::ALL.map(|other| of_seed(other, args.seed)) {
                if other.reads_text() && check_merge(&config, &wanted, other).is_err() {
                    continue; // heads that cannot be turned
                }
                for refit in [false, true] {
                    let one = match (other, refit) == (method, args.refit) {
                        true => own.clone(), // the model that is written
                        false => measure(&make(other, refit)?.model, other, refit)?,
                    };
                    compared.push(one.less(&own)?);
                }
            }
            let each: Vec<(usize, Vec<i64>)> =
                wanted.iter().map(|&(layer, n)| (layer, vec![n])).collect();
            if let Some(blocks) = &blocks {
                sensitivity = tried(&whole, &each, (method, moments.as_ref()), blocks, dtype)?;
            }
        }
        measured = Some(own);
    }

    let mut written = match args.form {
        Form::Expanded => expanded(&model).context("cannot use `--as expanded`")?,
        Form::Smallest | Form::MultiQuery => model,
    };
    if dtype != written.kind() {
        written.own(&|_| true);
        written.to_kind(dtype);
    }
    let kv =
        |of: &Model| -> Vec<i64> { of.layers().iter().map(|it| it.dims().n_kv_heads).collect() };
    let report = Report {
        schema: SCHEMA,
        attn: env!("CARGO_PKG_VERSION"),
        model: args.model.clone(),
        method,
        layers: named,
        kv_heads_before: kv(&whole),
        kv_heads_after: kv(&written),
        parameters_before: n_parameters(&whole),
        parameters_after: n_parameters(&written),
        cache_bytes_per_token_before: bytes_of_token(whole.config(), &[], dtype),
        cache_bytes_per_token_after: bytes_of_token(written.config(), &[], dtype),
        cache_dtype: dtype_name(dtype),
        loads_in_transformers: written.config().is_plain() || args.form == Form::MultiQuery,
        form: match args.form {
            Form::Smallest => "smallest",
            Form::Expanded => "expanded",
            Form::MultiQuery => "multi_query",
        },
        text: blocks.map(|blocks| blocks.read),
        merged,
        refitted: refitted.iter().map(of_layer).collect(),
        budget_bytes: budget,
        sensitivity,
        measured,
        compared,
    };
    let extra = serde_json::to_vec_pretty(&report).context("cannot write JSON")?;
    let save = |draft: &Path| -> Result<()> {
        let options = WriteOptions::default();
        match args.form {
            Form::MultiQuery => save_multi_query(&written, draft, &options)?,
            Form::Smallest | Form::Expanded => written.save(draft, &options)?,
        }
        Ok(())
    };
    let replace = if args.force { Replace::Model } else { Replace::Nothing };
    write_with(&save, &folder.tokenizer, &args.out, &[(FILE, extra)], replace)?;
    print(&report, args, out)
}

fn method(args: &ConvertArgs) -> Merge {
    let method = match args.method {
        MergeBy::First => Merge::First,
        MergeBy::Random => Merge::Random { seed: 0 },
        MergeBy::Mean => Merge::Mean,
        MergeBy::Similarity => Merge::Similarity,
        MergeBy::Aligned => Merge::Aligned,
        MergeBy::LowRank => Merge::LowRank,
    };
    of_seed(method, args.seed)
}

fn of_seed(method: Merge, seed: u64) -> Merge {
    match method {
        Merge::Random { .. } => Merge::Random { seed },
        other => other,
    }
}

/// The numbers of heads that each layer may have: the one of `--kv-heads`, or those below its own that divide it.
fn candidates(
    args: &ConvertArgs,
    config: &Config,
    named: &[usize],
) -> Result<Vec<(usize, Vec<i64>)>> {
    let heads = |layer: usize| config.layers[layer].n_kv_heads;
    let Some(n) = args.kv_heads.map(|n| i64::from(n.get())) else {
        let below = |layer: usize| (1..heads(layer)).filter(|n| heads(layer) % n == 0).collect();
        return Ok(named.iter().map(|&layer| (layer, below(layer))).collect());
    };
    ensure!(
        named.iter().any(|&layer| heads(layer) != n),
        "`--kv-heads` is {n}, and the layers have as many: nothing would change"
    );
    Ok(named.iter().map(|&layer| (layer, vec![n])).collect())
}

/// `--cache`, in bytes.
fn budget(text: &str, config: &Config, dtype: Kind) -> Result<u64> {
    let all = bytes_of_token(config, &[], dtype);
    let problem = || {
        format!(
            "`--cache` is `{text}`, expected bytes of a token, or a share of {all}, such as 50%"
        )
    };
    let most = match text.strip_suffix('%') {
        Some(percent) => {
            let percent: f64 = percent.trim().parse().with_context(problem)?;
            (percent / 100.0 * all as f64).floor() as u64
        }
        None => text.parse().with_context(problem)?,
    };
    ensure!(
        most > 0 && most < all,
        "`--cache` allows {most} bytes a token, and the model takes {all}: expected less, and more than 0"
    );
    Ok(most)
}

/// Bytes of the keys and values of one token, but for those of the layers `named`.
fn bytes_of_token(config: &Config, named: &[usize], dtype: Kind) -> u64 {
    let bytes = |n: i64| cache_bytes(n, config.sizes.head_dim, dtype.elt_size_in_bytes());
    let layers = config.layers.iter().enumerate().filter(|(layer, _)| !named.contains(layer));
    layers.map(|(_, spec)| bytes(spec.n_kv_heads)).sum()
}

/// Refuses a form that the model cannot have, before anything is read.
fn check_form(args: &ConvertArgs, config: &Config, candidates: &[(usize, Vec<i64>)]) -> Result<()> {
    if args.form == Form::Expanded {
        let mut whole = config.clone();
        for layer in &mut whole.layers {
            layer.n_kv_heads = layer.n_heads;
            layer.kv_of_head = (0..layer.n_heads).collect();
        }
        ensure!(
            whole.is_plain(),
            "`--as expanded` is of a model whose layers are plain softmax attention with as many heads each, and `{}` has \
             others\nhint: leave it out",
            args.model
        );
    }
    if args.form != Form::MultiQuery {
        return Ok(());
    }
    ensure!(
        config.base_model_type() == "gpt2",
        "`--as multi-query` is of a GPT-2 alone, and `{}` is a {}",
        args.model,
        config.base_model_type()
    );
    let after = |layer: usize| {
        let wanted = candidates.iter().find(|(at, _)| *at == layer);
        wanted.map_or(config.layers[layer].n_kv_heads, |(_, numbers)| numbers[0])
    };
    let other = (0..config.layers.len()).find(|&layer| after(layer) != 1);
    ensure!(
        args.cache.is_none() && other.is_none(),
        "`--as multi-query` is of one key/value head in every layer, and layer {} would have another number\nhint: \
         --kv-heads 1, without --cache and --layers",
        other.unwrap_or(0)
    );
    Ok(())
}

/// Reads the text, and sets blocks of it apart.
fn blocks(args: &ConvertArgs, folder: &Folder, hub: &Hub) -> Result<Blocks> {
    // What a fit has as many unknowns as, and what second moments need.
    let sizes = &folder.config.sizes;
    let n_channels = sizes.hidden_size.max(sizes.n_heads * sizes.head_dim);
    let task = match &args.calibration {
        Some(task) => task.clone(),
        None => bundled(TEXT)
            .context("cannot find the text that is read where `--calibration` is not given")?
            .display()
            .to_string(),
    };
    let data = dataset(&task, &args.set).context("cannot use `--calibration`")?;
    let split = args.split.clone().unwrap_or_else(|| data.train_split.clone());
    let block = BLOCK.min(folder.config.sizes.max_positions as usize);
    let read = || -> Result<Blocks> {
        let (config, tokenizer) = (&folder.config, &folder.tokenizer);
        let max_len = max_len(args.max_len.or(Some(block)), config, tokenizer, "`--max-len`")?;
        let texts = read_split(&data, &split, args.limit, hub)?.rows;
        // A task's rows stand for themselves; their labels are not looked at.
        let rows = folder.read_texts(&texts, data.label.is_some(), max_len, &split)?;
        let tokens = [args.test_tokens, args.calibration_tokens.get()];
        let [test, calibration] = set_apart(rows, tokens, args.seed);
        let count = |rows: &[Encoded]| rows.iter().map(|row| row.ids.len()).sum();
        let read = Read {
            task: task.clone(),
            split: split.clone(),
            max_len,
            seed: args.seed,
            n_rows: calibration.len(),
            n_tokens: count(&calibration),
            n_test_rows: test.len(),
            n_test_tokens: count(&test),
        };
        let pad_id = tokenizer.fill_id();
        Ok(Blocks { read, calibration, test, masking: folder.masking()?, pad_id })
    };
    let blocks = read().context("cannot read the text (`--calibration`)")?;
    let n_tokens = blocks.read.n_tokens as i64;
    ensure!(
        n_tokens > n_channels,
        "the text (`--calibration`) has {n_tokens} tokens to read, and the hidden states of `{}` {n_channels} channels\nhint: \
         give more text: {} tokens at least",
        args.model,
        10 * n_channels
    );
    Ok(blocks)
}

/// What models can be compared on.
fn testable<'a>(blocks: &'a Blocks, config: &Config) -> Option<Text<'a>> {
    if config.head != Head::LanguageModel {
        tracing::info!(
            "the model ends in {}, and predicts no tokens that it could be compared by: `attn eval` scores it",
            config.head
        );
        return None;
    }
    (!blocks.test.is_empty()).then(|| blocks.text(&blocks.test))
}

fn tried(
    whole: &Model,
    candidates: &[(usize, Vec<i64>)],
    by: (Merge, Option<&attn_core::Moments>),
    blocks: &Blocks,
    dtype: Kind,
) -> Result<Vec<OfLayer>> {
    let mut n_tokens = 0;
    let few = blocks.calibration.iter().take_while(|row| {
        n_tokens += row.ids.len();
        n_tokens <= SENSITIVITY_TOKENS
    });
    let n_rows = few.count().max(1);
    let text = blocks.text(&blocks.calibration[..n_rows]);
    let n_passes: usize = candidates.iter().map(|(_, numbers)| numbers.len()).sum();
    let mut progress = count_every_row(n_passes * n_rows);
    let bytes = dtype.elt_size_in_bytes();
    let found = kv_sensitivity(whole, candidates, by, &text, bytes, &mut progress)?;
    let of_layer = |((layer, _), tried): (&(usize, Vec<i64>), _)| OfLayer { layer: *layer, tried };
    Ok(candidates.iter().zip(found).map(of_layer).collect())
}

fn of_divergence(found: &Divergence, method: Merge, refit: bool) -> Measured {
    Measured {
        method,
        refit,
        kl_nats_per_token: found.kl_nats_per_token,
        kl_interval_95: found.kl_interval_95,
        perplexity: found.model.perplexity,
        perplexity_before: found.baseline.perplexity,
        kl_more: None,
        kl_more_interval_95: None,
        by_row: found.kl_by_row.clone(),
    }
}

impl Measured {
    /// The same, with what its KL is above that of `own`, block by block.
    fn less(self, own: &Self) -> Result<Self> {
        let interval = kl_difference(&self.by_row, &own.by_row)?;
        Ok(Self {
            kl_more: Some(self.kl_nats_per_token - own.kl_nats_per_token),
            kl_more_interval_95: Some(interval),
            ..self
        })
    }
}

fn print(report: &Report, args: &ConvertArgs, out: &mut dyn Write) -> Result<()> {
    let shown = args.out.display();
    writeln!(
        out,
        "{shown}: {} parameters in {}, by {}{}",
        grouped(report.parameters_after),
        report.cache_dtype,
        report.method.name(),
        if report.refitted.is_empty() { "" } else { ", output projections fitted anew" }
    )?;
    writeln!(
        out,
        "key/value heads by layer: {:?}, before {:?}",
        report.kv_heads_after, report.kv_heads_before
    )?;
    writeln!(
        out,
        "keys and values: {} bytes a token, before {}",
        grouped(report.cache_bytes_per_token_after as usize),
        grouped(report.cache_bytes_per_token_before as usize)
    )?;
    let percent = |share: Option<f64>| share.map(|share| format!("{:.1}", 100.0 * share));
    let of_merged = |it: &Merged| {
        Some(format!("{} {}/{}", it.layer, percent(it.key_loss)?, percent(it.value_loss)?))
    };
    let lost: Vec<String> = report.merged.iter().filter_map(of_merged).collect();
    if !lost.is_empty() {
        writeln!(out, "% lost of scores/of what values add, by layer: {}", lost.join(", "))?;
    }
    for layer in &report.refitted {
        writeln!(
            out,
            "layer {} fitted to {} tokens, rank {} of {}: error {:.4} -> {:.4} on these",
            layer.layer,
            grouped(layer.n_tokens as usize),
            layer.rank,
            layer.n_unknowns,
            layer.error_before,
            layer.error_after
        )?;
        warn_of_few_tokens(layer, "--calibration-tokens");
    }
    for OfLayer { layer, tried } in &report.sensitivity {
        let each = tried.iter().filter(|one| one.kl_interval_95.is_some());
        let each: Vec<String> = each
            .map(|one| format!("{} heads {:.4}", one.n_kv_heads, one.kl_nats_per_token))
            .collect();
        writeln!(out, "layer {layer} alone, KL in nats a token: {}", each.join(", "))?;
    }
    if !report.compared.is_empty() {
        writeln!(out, "\nmethod       refit  KL a token (95 %)               perplexity")?;
        for one in &report.compared {
            let Interval { low, high } = one.kl_interval_95;
            writeln!(
                out,
                "{:<12} {:<5}  {:.4} ({low:.4} to {high:.4})     {:>10.2}",
                one.method.name(),
                if one.refit { "yes" } else { "no" },
                one.kl_nats_per_token,
                one.perplexity
            )?;
        }
        writeln!(out)?;
    }
    match (&report.measured, &report.text) {
        (Some(one), Some(text)) => {
            let Interval { low, high } = one.kl_interval_95;
            writeln!(
                out,
                "KL {:.4} nats a token ({low:.4} to {high:.4}, 95 %), perplexity {:.2}, before {:.2}: on {} tokens of the \
                 text that were set apart",
                one.kl_nats_per_token,
                one.perplexity,
                one.perplexity_before,
                grouped(text.n_test_tokens)
            )?;
        }
        _ => writeln!(out, "not compared with what it was: `attn eval --against` does")?,
    }
    if args.calibration.is_none() && report.text.is_some() {
        tracing::warn!(
            "the text was `{TEXT}`, plain opinions: it tells little of a model of other text\nhint: --calibration with text like \
             that the model is for"
        );
    }
    writeln!(
        out,
        "{}",
        match (args.form, report.loads_in_transformers) {
            (Form::MultiQuery, _) =>
                "transformers loads the folder as `gpt_bigcode`, with the same logits",
            (Form::Expanded, true) =>
                "transformers loads the folder, with the same logits; in its full shape nothing is saved",
            (_, true) => "transformers loads the folder, with the same logits",
            (_, false) =>
                "transformers has no words for these layers and refuses the folder; --as expanded writes one that it loads",
        }
    )?;
    Ok(())
}
