//! `attn convert`: fewer key/value heads in the layers of a model, or more, as a folder of its own.

use std::{io::Write, path::Path};

use anyhow::{Context, Result, bail, ensure};
use attn_core::{
    Config, LoadOptions, Merge, Merged, Model, Moments, Variant, begin_merging, check_merge,
    check_merging,
    checkpoint::WriteOptions,
    config::{Head, LayerSpec},
    expanded, merge_learned, save_multi_query,
};
use attn_data::{
    batch::{Encoded, Masking},
    hub::{Hub, progress_bar},
};
use attn_eval::{
    Batching, Converted, Divergence, SetApart, Text, WithHeads, against, cache_bytes,
    choose_kv_heads, convert, kl_difference, kv_sensitivity, moments, n_parameters,
    stats::Interval,
};
use serde::Serialize;
use tch::{Device, Kind};

use crate::{
    args::{ConvertArgs, Form, MergeBy, dtype_name},
    config::bundled,
    memory::{self, Foreseen},
    monitor::{count_every_row, count_every_row_of, grouped},
    origin::Origin,
    plot::draw_result,
    prune::{Layer, of_layer, warn_of_few_tokens},
    run_dir::SCHEMA,
    save::{Replace, check_free, check_replaceable, write_with},
    swap::layers,
    task::dataset,
    texts::{Folder, load_model, max_len},
};

/// The file in the folder that says what was made of what.
const FILE: &str = "conversion.json";

/// The text that is read where none is named.
const TEXT: &str = "data/sample_text.txt";

/// Most tokens of a block where nothing says otherwise.
const BLOCK: usize = 512;

/// Blocks below which an interval over them says little.
const FEW_BLOCKS: usize = 10;

/// What open gates cost where nothing else is said.
const PRICE: f64 = 1.0;

/// Tokens that `--cache` tries each layer's candidates on, at most.
const SENSITIVITY_TOKENS: usize = 8192;

/// conversion.json.
#[derive(Serialize)]
struct Report {
    schema: u32,
    #[serde(flatten)]
    origin: Origin,
    model: String,
    method: Method,
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
    /// Whether query heads stand in another order than their numbers.
    #[serde(skip)]
    is_reordered: bool,
    #[serde(skip)]
    classifies: bool,
    /// Whether `--as expanded` is a folder that transformers loads.
    #[serde(skip)]
    expands: bool,
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

/// What key/value heads were made by.
#[derive(Clone, Copy, PartialEq, Serialize)]
#[serde(untagged)]
enum Method {
    Merge(Merge),
    #[serde(serialize_with = "learned")]
    Learned,
}

fn learned<S: serde::Serializer>(to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str("learned")
}

impl Method {
    fn name(self) -> &'static str {
        match self {
            Self::Merge(method) => method.name(),
            Self::Learned => "learned",
        }
    }
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
    method: Method,
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
    /// Its KL less that of the mean of neighbours, as much fitted.
    #[serde(skip_serializing_if = "Option::is_none")]
    kl_over_mean: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kl_over_mean_interval_95: Option<Interval>,
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

/// What was asked for, as far as it can be checked before texts and weights are read.
struct Asked {
    /// `None`: what the model has learned.
    method: Option<Merge>,
    /// Layers that were named.
    named: Vec<usize>,
    /// The numbers of heads that each layer may have.
    candidates: Vec<(usize, Vec<i64>)>,
    /// The most bytes of a token.
    budget: Option<u64>,
    dtype: Kind,
    /// Whether a layer loses heads that a text could tell of.
    loses: bool,
}

impl Asked {
    fn check(args: &ConvertArgs, config: &Config) -> Result<Self> {
        let n_layers = config.layers.len();
        let dtype = Kind::from(args.dtype);
        let Some(method) = method(args) else {
            check_learned(args)?;
            let is_merging = |spec: &LayerSpec| matches!(spec.variant, Variant::Merging(_));
            ensure!(
                config.layers.iter().any(is_merging),
                "`--method learned` is of a model whose heads are being merged, and `{}` has none such\nhint: attn convert --as \
                 merging, then attn distill",
                args.model
            );
            check_form(args, &ended(config), &[])?;
            let named = (0..n_layers).filter(|&layer| is_merging(&config.layers[layer])).collect();
            return Ok(Self {
                method: None,
                named,
                candidates: Vec::new(),
                budget: None,
                dtype,
                loses: false,
            });
        };
        ensure!(
            args.kv_heads.is_some() || args.cache.is_some(),
            "how many key/value heads are left?\nhint: --kv-heads N, or --cache with the bytes of a token"
        );
        if args.form == Form::Merging {
            check_begun(args)?;
        } else {
            no_use(
                &[(args.price.is_some(), "--price")],
                "gates have a price `--as merging` alone",
            )?;
        }
        let named = match &args.layers {
            None => (0..n_layers).collect(),
            Some(text) => layers(text, n_layers).context("cannot use `--layers`")?,
        };
        let budget = args.cache.as_deref().map(|text| budget(text, config, dtype)).transpose()?;
        let candidates = candidates(args, config, &named)?;
        for (layer, numbers) in &candidates {
            for &n in numbers {
                check_merge(config, &[(*layer, n)], method).with_context(|| {
                    let flag = if budget.is_some() { "--cache" } else { "--kv-heads" };
                    match method.reads_text()
                        && check_merge(config, &[(*layer, n)], Merge::Mean).is_ok()
                    {
                        true => format!("cannot use `{flag}` with `--method {}`", flag_of(method)),
                        false => format!("cannot use `{flag}`"),
                    }
                })?;
                if args.form == Form::Merging {
                    check_merging(config, &[(*layer, n)], method)
                        .context("cannot use `--as merging`")?;
                }
            }
        }
        if let Some(most) = budget {
            check_budget(most, config, &named, dtype)?;
        }
        check_form(args, config, &candidates)?;
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
        Ok(Self { method: Some(method), named, candidates, budget, dtype, loses })
    }

    /// Whether second moments of the text are needed.
    fn needs_moments(&self, args: &ConvertArgs) -> bool {
        args.compare || (self.loses && self.method.is_some_and(Merge::reads_text))
    }

    fn needs_text(&self, args: &ConvertArgs) -> bool {
        self.needs_moments(args)
            || (self.loses && args.refit)
            || self.budget.is_some()
            || args.calibration.is_some()
    }
}

/// Everything that models are made of.
struct Source<'a> {
    args: &'a ConvertArgs,
    asked: &'a Asked,
    whole: &'a Model,
    blocks: Option<&'a Blocks>,
    moments: Option<Moments>,
}

impl<'a> Source<'a> {
    fn calibration(&self) -> Option<Text<'a>> {
        self.blocks.map(|blocks| blocks.text(&blocks.calibration))
    }

    /// What each of `candidates` loses by itself.
    fn tried(&self, candidates: &[(usize, Vec<i64>)], method: Merge) -> Result<Vec<OfLayer>> {
        let Some(blocks) = self.blocks else { return Ok(Vec::new()) };
        tried(self.whole, candidates, (method, self.moments.as_ref()), blocks, self.asked.dtype)
    }

    fn convert(&self, wanted: &[(usize, i64)], method: Merge, refit: bool) -> Result<Converted> {
        let text = self.calibration().filter(|_| refit);
        let n_rows = text.as_ref().map_or(0, |text| text.rows.len());
        let mut progress = count_every_row_of("fitting", n_rows);
        let fit = text.as_ref().map(|text| (self.args.ridge, text));
        Ok(convert(self.whole, wanted, (method, self.moments.as_ref()), fit, &mut progress)?)
    }

    /// The model that is written.
    fn make(&self, wanted: &[(usize, i64)]) -> Result<Converted> {
        let Some(method) = self.asked.method else {
            let mut model = self.whole.alias()?;
            let merged = merge_learned(&mut model)?;
            return Ok(Converted { model, merged, refitted: Vec::new() });
        };
        if self.args.form == Form::Merging {
            let mut model = self.whole.alias()?;
            let (moments, price) = (self.moments.as_ref(), self.args.price.unwrap_or(PRICE));
            let merged = begin_merging(&mut model, wanted, method, moments, price)?;
            return Ok(Converted { model, merged, refitted: Vec::new() });
        }
        self.convert(wanted, method, self.args.refit)
    }

    /// Every method, fitted and not, against `own`, the model that is written.
    fn compared(
        &self,
        wanted: &[(usize, i64)],
        own: &Measured,
        measure: &dyn Fn(&Model, Method, bool) -> Result<Measured>,
    ) -> Result<Vec<Measured>> {
        let mut all = Vec::new();
        for method in Merge::ALL.map(|other| of_seed(other, self.args.seed)) {
            let able = check_merge(self.whole.config(), wanted, method);
            if let (true, Err(error)) = (method.reads_text(), able) {
                tracing::info!("`{}` is left out: {error}", flag_of(method));
                continue;
            }
            for refit in [false, true] {
                let one = match (Method::Merge(method), refit) == (own.method, own.refit) {
                    true => own.clone(),
                    false => {
                        let made = self.convert(wanted, method, refit)?.model;
                        measure(&made, Method::Merge(method), refit)?
                    }
                };
                all.push(one.less(own)?);
            }
        }
        // What averaging neighbours costs is what everything else is held against.
        let is_mean = |it: &&Measured| it.method == Method::Merge(Merge::Mean);
        let means: Vec<Measured> = all.iter().filter(is_mean).cloned().collect();
        for one in &mut all {
            let mean = means.iter().find(|mean| mean.refit == one.refit);
            let Some(mean) = mean else { continue };
            one.kl_over_mean = Some(one.kl_nats_per_token - mean.kl_nats_per_token);
            one.kl_over_mean_interval_95 = Some(kl_difference(&one.by_row, &mean.by_row)?);
        }
        Ok(all)
    }
}

/// What the conversion will hold, before the model is loaded.
fn foresee(
    args: &ConvertArgs,
    asked: &Asked,
    config: &Config,
    blocks: Option<&Blocks>,
) -> Result<()> {
    let kind = Kind::Float;
    let mut foreseen = Foreseen::model(config, kind, false)?.copied("the changed model", kind, 1);
    if asked.dtype != kind {
        foreseen = foreseen.copied("the parameters as they are written", asked.dtype, 1);
    }
    if let Some(blocks) = blocks {
        let text = blocks.text(&blocks.calibration);
        let extent = memory::scored(&text.batching, text.rows);
        foreseen = foreseen.pass(extent).pass(extent).inputs(extent);
        if config.head == Head::LanguageModel {
            foreseen = foreseen.with("predictions of both, in pieces", memory::PIECES);
        }
        if args.refit || args.compare {
            foreseen = foreseen.moments(config.layers.len(), 3);
        }
    }
    if asked.needs_moments(args) {
        foreseen = foreseen.moments(config.layers.len(), 2);
    }
    foreseen.check(Device::Cpu, memory::OF_CHANGING)
}

pub(crate) fn run(args: &ConvertArgs, out: &mut dyn Write) -> Result<()> {
    if let Some(threads) = args.threads {
        tch::set_num_threads(threads.get().into());
    }
    let hub = Hub::from_env().with_progress(progress_bar());
    let folder = Folder::open(&args.model, true, None, &hub)?;
    match args.force {
        true => {
            let text = args.calibration.as_ref().map(Path::new);
            let read: Vec<&Path> = [folder.path.as_path()].into_iter().chain(text).collect();
            check_replaceable(&args.out, &read)?;
        }
        false => check_free(&args.out)?,
    }
    let config = folder.config.clone();
    let asked = Asked::check(args, &config)?;
    let blocks = asked.needs_text(args).then(|| blocks(args, &folder, &hub)).transpose()?;

    foresee(args, &asked, &config, blocks.as_ref())?;
    let options = LoadOptions { device: Device::Cpu, ..LoadOptions::default() };
    let whole = load_model(&folder.path, None, &options, &hub)
        .with_context(|| format!("cannot load the model `{}`", args.model))?;
    let mut source =
        Source { args, asked: &asked, whole: &whole, blocks: blocks.as_ref(), moments: None };
    if let Some(text) = source.calibration().filter(|_| asked.needs_moments(args)) {
        let mut progress = count_every_row_of("reading", text.rows.len());
        let read = moments(&whole, &asked.named, &text, &mut progress);
        source.moments = Some(read.context("cannot read the text")?);
    }
    let mut sensitivity = Vec::new();
    let wanted: Vec<(usize, i64)> = match (asked.budget, asked.method) {
        (Some(most), Some(method)) => {
            sensitivity = source.tried(&asked.candidates, method)?;
            let others = bytes_of_token(&config, &asked.named, asked.dtype);
            let found: Vec<Vec<WithHeads>> =
                sensitivity.iter().map(|it| it.tried.clone()).collect();
            let chosen = choose_kv_heads(&found, most.saturating_sub(others))
                .context("cannot use `--cache`")?;
            asked.named.iter().copied().zip(chosen).collect()
        }
        _ => asked.candidates.iter().map(|(layer, numbers)| (*layer, numbers[0])).collect(),
    };

    let dtype = asked.dtype;
    let Converted { mut model, merged, refitted } =
        source.make(&wanted).with_context(|| format!("cannot convert `{}`", args.model))?;
    if args.form == Form::Expanded {
        model = expanded(&model).context("cannot use `--as expanded`")?;
    }
    if dtype != model.kind() {
        // What is measured are the numbers that are written.
        model.own(&|_| true);
        let kind = model.kind();
        model.to_kind(dtype);
        model.to_kind(kind);
    }
    let method = asked.method.map_or(Method::Learned, Method::Merge);
    let test = blocks.as_ref().and_then(|blocks| testable(blocks, &config));
    let mut measured = None;
    let mut compared = Vec::new();
    if let Some(test) = &test {
        let measure = |model: &Model, method: Method, refit: bool| -> Result<Measured> {
            let mut progress = count_every_row(test.rows.len());
            let found = against(&whole, model, test, &mut progress)?;
            Ok(of_divergence(&found, method, refit))
        };
        let own = measure(&model, method, args.refit)?;
        if let Some(method) = asked.method.filter(|_| args.compare) {
            compared = source.compared(&wanted, &own, &measure)?;
            let each: Vec<(usize, Vec<i64>)> =
                wanted.iter().map(|&(layer, n)| (layer, vec![n])).collect();
            sensitivity = source.tried(&each, method)?;
        }
        measured = Some(own);
    } else if args.compare {
        bail!(
            "`--compare` has no text to compare models on\nhint: more text, or more --test-tokens: a quarter of the text at \
             most is set apart"
        );
    }

    let mut written = model;
    if dtype != written.kind() {
        written.own(&|_| true);
        written.to_kind(dtype);
    }
    let kv =
        |of: &Model| -> Vec<i64> { of.layers().iter().map(|it| it.dims().n_kv_heads).collect() };
    let report = Report {
        schema: SCHEMA,
        origin: Origin::now()?,
        model: args.model.clone(),
        method,
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
            Form::Merging => "merging",
        },
        is_reordered: written.config().layers.iter().any(|it| !it.kept_heads.is_sorted()),
        classifies: config.head != Head::LanguageModel,
        expands: full(written.config()).is_plain(),
        budget_bytes: asked.budget,
        layers: asked.named,
        text: blocks.map(|blocks| blocks.read),
        merged,
        refitted: refitted.iter().map(of_layer).collect(),
        sensitivity,
        measured,
        compared,
    };
    let extra = serde_json::to_vec_pretty(&report).context("cannot write JSON")?;
    let save = |draft: &Path| -> Result<()> {
        let options = WriteOptions::default();
        match args.form {
            Form::MultiQuery => save_multi_query(&written, draft, &options)?,
            Form::Smallest | Form::Expanded | Form::Merging => written.save(draft, &options)?,
        }
        Ok(())
    };
    let replace = if args.force { Replace::Model } else { Replace::Nothing };
    write_with(&save, &folder.tokenizer, &args.out, &[(FILE, extra)], replace)?;
    let file = args.out.join(FILE);
    draw_result(&file, &file);
    print(&report, args, out)
}

/// Refuses what `--method learned` has no use for.
fn check_learned(args: &ConvertArgs) -> Result<()> {
    let flags = [
        (args.kv_heads.is_some(), "--kv-heads"),
        (args.cache.is_some(), "--cache"),
        (args.layers.is_some(), "--layers"),
        (args.refit, "--refit"),
        (args.compare, "--compare"),
        (args.price.is_some(), "--price"),
        (args.form == Form::Merging, "--as merging"),
    ];
    no_use(&flags, "`--method learned` ends what a model has learned as it stands")
}

/// Refuses what `--as merging` has no use for.
fn check_begun(args: &ConvertArgs) -> Result<()> {
    let price = args.price.unwrap_or(PRICE);
    ensure!(
        price >= 0.0 && price.is_finite(),
        "`--price` is {price}, expected a number of at least 0"
    );
    let flags = [(args.refit, "--refit"), (args.compare, "--compare")];
    no_use(&flags, "`--as merging` changes nothing that the model computes")
}

fn no_use(flags: &[(bool, &str)], why: &str) -> Result<()> {
    match flags.iter().find(|(is_set, _)| *is_set) {
        Some((_, flag)) => bail!("{why}, and has no use for `{flag}`\nhint: leave it out"),
        None => Ok(()),
    }
}

/// How a method is typed.
fn flag_of(method: Merge) -> String {
    method.name().replace('_', "-")
}

/// `None`: what was learned.
fn method(args: &ConvertArgs) -> Option<Merge> {
    let method = match args.method {
        MergeBy::First => Merge::First,
        MergeBy::Random => Merge::Random { seed: 0 },
        MergeBy::Mean => Merge::Mean,
        MergeBy::Similarity => Merge::Similarity,
        MergeBy::Aligned => Merge::Aligned,
        MergeBy::LowRank => Merge::LowRank,
        MergeBy::Latent => Merge::Latent,
        MergeBy::Learned => return None,
    };
    Some(of_seed(method, args.seed))
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
        (args.form == Form::Expanded && !config.is_plain())
            || named.iter().any(|&layer| heads(layer) != n),
        "`--kv-heads` is {n}, and the layers have as many: nothing would change"
    );
    let with = |is_fewer: bool| -> Vec<usize> {
        let differs = |&layer: &usize| heads(layer) != n && (heads(layer) > n) == is_fewer;
        named.iter().copied().filter(differs).collect()
    };
    let (fewer, more) = (with(true), with(false));
    ensure!(
        fewer.is_empty() || more.is_empty(),
        "`--kv-heads` is {n}: layers {more:?} have fewer already and would be given copies\nhint: name the others, --layers {}",
        fewer.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
    );
    Ok(named.iter().map(|&layer| (layer, vec![n])).collect())
}

/// Refuses a budget that one head in each of the layers `named` would not keep.
fn check_budget(most: u64, config: &Config, named: &[usize], dtype: Kind) -> Result<()> {
    let others = bytes_of_token(config, named, dtype);
    let one = cache_bytes(1, config.sizes.head_dim, dtype.elt_size_in_bytes());
    let with_heads = named.iter().filter(|&&layer| config.layers[layer].n_kv_heads > 0).count();
    let least = others + one * with_heads as u64;
    ensure!(
        most >= least,
        "`--cache` allows {most} bytes a token, and one key/value head in each of the layers to change comes to {least}, with what the \
         others take\nhint: allow at least that"
    );
    Ok(())
}

/// A KL with its interval. What rounds to 0 from below is 0.
fn kl(one: &Measured) -> String {
    let Interval { low, high } = one.kl_interval_95;
    let [value, low, high] =
        [one.kl_nats_per_token, low, high].map(|x| if x.abs() < 5e-5 { 0.0 } else { x });
    format!("{value:.4} ({low:.4} to {high:.4})")
}

/// The config of a model whose merging has ended.
fn ended(config: &Config) -> Config {
    let mut ended = config.clone();
    for spec in &mut ended.layers {
        if let Variant::Merging(merging) = &spec.variant {
            spec.n_kv_heads = merging.kv_heads.into();
            spec.variant = Variant::default();
        }
    }
    ended
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
        ensure!(
            full(config).is_plain(),
            "`--as expanded` is of a model whose layers are plain softmax attention with as many heads each, and `{}` has \
             others\nhint: leave it out",
            args.model
        );
    }
    if args.form != Form::MultiQuery {
        return Ok(());
    }
    ensure!(
        args.method != MergeBy::Latent,
        "`--as multi-query` is of one key/value head, and `--method latent` makes a code that each head reads its own of\nhint: \
         --as expanded loads everywhere"
    );
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

/// The config with as many key/value heads as query heads, those that are read from a code written out.
fn full(config: &Config) -> Config {
    let mut full = config.clone();
    for layer in &mut full.layers {
        layer.n_kv_heads = layer.n_heads;
        layer.kv_of_head = (0..layer.n_heads).collect();
        if matches!(layer.variant, Variant::Latent(_)) && config.sizes.position_table.is_some() {
            layer.variant = Variant::default();
        }
    }
    full
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
        let tokens = [args.test_tokens, args.calibration_tokens.get()];
        let mut drawn = SetApart::new(tokens, args.seed);
        // A task's rows stand for themselves; their labels are not looked at.
        let by_text = data.label.is_some();
        let rows = (&data, &split[..], args.limit);
        folder.stream_texts(rows, by_text, max_len, hub, &mut |row| drawn.add(row))?;
        let [test, calibration] = drawn.finish();
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
         more text, or more --calibration-tokens: {} are a beginning",
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
    by: (Merge, Option<&Moments>),
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

fn of_divergence(found: &Divergence, method: Method, refit: bool) -> Measured {
    Measured {
        method,
        refit,
        kl_nats_per_token: found.kl_nats_per_token,
        kl_interval_95: found.kl_interval_95,
        perplexity: found.model.perplexity,
        perplexity_before: found.baseline.perplexity,
        kl_more: None,
        kl_more_interval_95: None,
        kl_over_mean: None,
        kl_over_mean_interval_95: None,
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
        match report.merged.iter().all(|it| it.groups.iter().all(|of| of.len() == 1)) {
            true => "copies",
            false => report.method.name(),
        },
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
    for it in &report.merged {
        let Some(open) = &it.open else { continue };
        let most = open.iter().copied().fold(0.0, f64::max);
        let n_open = open.iter().filter(|open| **open > 0.0).count();
        writeln!(
            out,
            "layer {}: {n_open} of {} old heads still in use, at most to {most:.2}",
            it.layer,
            open.len()
        )?;
    }
    let still: usize =
        report.merged.iter().flat_map(|it| &it.open).flatten().filter(|open| **open > 0.0).count();
    if still > 0 {
        tracing::warn!(
            "{still} old heads were still in use, and what they did is lost\nhint: teach the model for more steps, or begin with a \
             higher --price"
        );
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
            writeln!(
                out,
                "{:<12} {:<5}  {}     {:>10.2}",
                one.method.name(),
                if one.refit { "yes" } else { "no" },
                kl(one),
                one.perplexity
            )?;
        }
        writeln!(out)?;
    }
    match (&report.measured, &report.text) {
        (Some(one), Some(text)) => {
            writeln!(
                out,
                "KL a token, nats (95 %) {}, perplexity {:.2}, before {:.2}: on {} tokens of the text that were set apart",
                kl(one),
                one.perplexity,
                one.perplexity_before,
                grouped(text.n_test_tokens)
            )?;
            if report.method == Method::Learned {
                writeln!(
                    out,
                    "that is against the model as it was taught, old heads and all; against the one before: attn eval --against"
                )?;
            }
            if text.n_test_rows < FEW_BLOCKS {
                tracing::warn!(
                    "{} blocks were set apart: intervals over so few say little\nhint: more text, more --test-tokens, or a lower \
                     --max-len",
                    text.n_test_rows
                );
            }
        }
        _ if report.classifies => {
            writeln!(out, "not compared with what it was: `attn eval` scores both")?;
        }
        _ => writeln!(out, "not compared with what it was: `attn eval --against` does")?,
    }
    if args.calibration.is_none() && report.text.is_some() {
        tracing::warn!(
            "the text was `{TEXT}`, plain opinions: it tells little of a model of other text\nhint: --calibration with text like \
             that the model is for"
        );
    }
    if report.loads_in_transformers && report.is_reordered {
        writeln!(
            out,
            "query heads stand in another order there, in that of the key/value heads that they read: `attn_head_order` in \
             config.json has their numbers"
        )?;
    }
    writeln!(
        out,
        "{}",
        match (args.form, report.loads_in_transformers) {
            (Form::MultiQuery, _) =>
                "transformers loads the folder as `gpt_bigcode`, with the same logits",
            (Form::Expanded, true) =>
                "transformers loads the folder, with the same logits; in its full shape, a key/value head for each query head, nothing \
                 is saved",
            (Form::Merging, _) =>
                "nothing is merged yet: teach the model (attn distill configs/gqa/learn.toml), then attn convert --method learned",
            (_, true) => "transformers loads the folder, with the same logits",
            (_, false) if report.expands =>
                "transformers has no words for these layers and refuses the folder; --as expanded writes one that it loads",
            (_, false) => "transformers has no words for these layers and refuses the folder",
        }
    )?;
    Ok(())
}
