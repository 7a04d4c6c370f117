//! `attn verify`: what every model owes its users, tried on one model and text.

mod apart;

use std::io::Write;

use anyhow::{Context, Result, ensure};
use attn_core::{
    Error, ForwardOptions, LoadOptions, Merge, Model, ModelInput, Variant,
    attention::Stream,
    config::Head,
    laws::{self, ProbeSize},
    merge_kv,
};
use attn_data::{
    batch::{Encoded, Side, collate, mask_tokens},
    hub::{Hub, progress_bar},
    tokenizer::TextTokenizer,
};
use attn_eval::{Batching, kl_by_shift};
use attn_files::Staging;
use attn_train::{
    Batch, CausalLm, Classification, Distillation, Losses, MaskedLm, Objective,
    a_loss_is_what_it_is_called, a_step_moves_what_is_trained_alone,
};
use serde::Serialize;
use tch::{Kind, Tensor};

use crate::{
    Outcome,
    args::VerifyArgs,
    config::bundled,
    memory::{self, Foreseen},
    plot::in_cell,
    run_dir::{check_writable, parent_of, write_json},
    subject::Subject,
    texts::{Folder, find_folder, load_model, same_tokens},
};

use apart::Apart;

/// The text that is read where none is named.
const TEXT: &str = "data/sample_text.txt";

/// Rows of text.
const N_ROWS: usize = 3;

/// Tokens of a row, and the parameters whose gradients are tried: quick, as it is, full. Never more tokens than the model reads.
const SIZES: [(usize, usize); 3] = [(32, 0), (96, 8), (512, 64)];

/// Tokens on which what needs several passes is tried.
const SHORT: i64 = 24;

const FITS: &str = "config_tokenizer_and_embedding_fit";
const TRIED: &str = "every_law_can_be_tried";
const FILLED: &str = "every_tensor_is_used_and_every_parameter_filled";

/// Most tokens on which kinds are tried by themselves.
const LONGEST_PROBE: i64 = 320;

/// What came of a law.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Found {
    Held,
    Broken,
    NotRun,
}

/// A law on this model.
#[derive(Debug, Serialize)]
struct Line {
    law: String,
    found: Found,
    /// The largest that was seen; absent where it was no number, or nothing was run.
    error: Option<f64>,
    /// The largest that is allowed.
    tolerance: Option<f64>,
    /// Where that was; of a law that was not run, why.
    place: String,
}

/// OUT.json.
#[derive(Serialize)]
struct Report<'a> {
    #[serde(flatten)]
    subject: Subject<'a>,
    text: String,
    n_tokens: usize,
    against: Option<&'a str>,
    n_held: usize,
    n_broken: usize,
    n_not_run: usize,
    laws: Vec<Line>,
    /// How it stands to `against`.
    #[serde(flatten)]
    apart: Option<Apart>,
}

/// The laws tried so far, printed as they come.
struct Lines<'a> {
    all: Vec<Line>,
    out: &'a mut dyn Write,
}

impl Lines<'_> {
    fn add(&mut self, line: Line) -> Result<()> {
        let word = match line.found {
            Found::Held => "held",
            Found::Broken => "BROKEN",
            Found::NotRun => "not run",
        };
        let size = match (line.error, line.tolerance) {
            (Some(error), Some(tolerance)) if tolerance > 0.0 => {
                format!("{error:.1e} of {tolerance:.0e}")
            }
            _ => String::new(),
        };
        writeln!(
            self.out,
            "{:<8} {:<47} {size:<18} {}",
            word,
            line.law.replace('_', " "),
            line.place
        )?;
        self.out.flush()?;
        self.all.push(line);
        Ok(())
    }

    /// A law of `attn_core::laws`. One that says nothing of the model was not run.
    fn law(
        &mut self,
        law: &str,
        found: impl FnOnce() -> Result<laws::Verdict, Error>,
    ) -> Result<()> {
        match found() {
            Ok(verdict) => self.verdict(&verdict),
            Err(Error::Refused { reason, .. }) => self.not_run(law, &reason),
            // What a model owes is that it can be tried; the others go on.
            Err(error) => {
                let (message, place) = (error.to_string(), "it could not be tried");
                let first = message.lines().next().unwrap_or_default();
                self.add(Line {
                    law: law.into(),
                    found: Found::Broken,
                    error: None,
                    tolerance: None,
                    place: format!("{place}: {first}"),
                })
            }
        }
    }

    fn verdict(&mut self, verdict: &laws::Verdict) -> Result<()> {
        self.add(Line {
            law: verdict.law.into(),
            found: if verdict.held() { Found::Held } else { Found::Broken },
            error: verdict.error.is_finite().then_some(verdict.error),
            tolerance: Some(verdict.tolerance),
            place: match &verdict.place[..] {
                laws::NOWHERE => String::new(),
                place => place.into(),
            },
        })
    }

    fn not_run(&mut self, law: &str, why: &str) -> Result<()> {
        let why = why.lines().next().unwrap_or_default().to_owned();
        self.add(Line {
            law: law.into(),
            found: Found::NotRun,
            error: None,
            tolerance: None,
            place: why,
        })
    }

    /// A count of what is wrong, and what it is of.
    fn count(&mut self, law: &str, n_wrong: usize, place: String) -> Result<()> {
        self.add(Line {
            law: law.into(),
            found: if n_wrong == 0 { Found::Held } else { Found::Broken },
            error: Some(n_wrong as f64),
            tolerance: Some(0.0),
            place,
        })
    }

    /// A law that tells by a word.
    fn held(&mut self, law: &str, place: String) -> Result<()> {
        self.count(law, 0, place)
    }

    fn n(&self, found: Found) -> usize {
        self.all.iter().filter(|line| line.found == found).count()
    }
}

pub(crate) fn run(args: &VerifyArgs, out: &mut dyn Write) -> Result<Outcome> {
    let _made = args.out.as_deref().map(check_writable).transpose()?;
    args.compute.device()?;
    let hub = Hub::from_env().with_progress(progress_bar());
    let has_weights = args.compute.init.is_none();
    let folder = match Folder::open(&args.model, has_weights, None, &hub) {
        Err(error) if find_folder(&args.model, has_weights, None, &hub).is_ok() => {
            return unloadable(args, FITS, error, out);
        }
        opened => opened?,
    };
    let against = args.against.as_ref().map(|name| Folder::open(name, true, None, &hub));
    let against = against.transpose()?;
    if let Some(against) = &against {
        same_tokens(&folder, against)?;
    }
    let (text, rows) = read(args, &folder)?;
    let n_tokens = rows[0].len();
    let ids: Vec<i64> = rows.iter().flatten().map(|&id| i64::from(id)).collect();

    let extent = (N_ROWS as u64, n_tokens as u64);
    let mut foreseen = Foreseen::computing(&folder.config, &args.compute)?;
    if let Some(against) = &against {
        foreseen = foreseen.beside("the other model", &against.config, Kind::Double)?;
    }
    foreseen = foreseen
        .copied("the model in f64", Kind::Double, 1)
        .wide_pass(extent, true)
        .row_loss(extent, &folder.config, 6);
    let (_, n_gradients) = SIZES[args.size()];
    if n_gradients > 0 {
        foreseen = foreseen.copied("gradients in f64", Kind::Double, 1);
    }
    foreseen.check(args.compute.device()?, memory::OF_VERIFYING)?;
    let model = match folder.load(&args.compute, args.seed, &hub) {
        // Whatever is left over or missing in the file; where there is no room for it, the folder may be sound.
        Err(error) if error.chain().any(is_of_the_folder) => {
            return unloadable(args, FILLED, error, out);
        }
        loaded => loaded?,
    };
    let mut lines = Lines { all: Vec::new(), out };
    let name = text_name(args);
    writeln!(lines.out, "{} on {N_ROWS} rows of {n_tokens} tokens of {name}", args.model)?;
    writeln!(lines.out, "{:<8} {:<47} {:<18} where", "", "law", "error, of allowed")?;
    let mut try_all = || -> Result<Option<Apart>> {
        let vocab_size = model.config().sizes.vocab_size;
        let n_ids = folder.tokenizer.vocab_size();
        lines.held(FITS, format!("{n_ids} tokens, {vocab_size} rows of the embedding"))?;
        match args.compute.init {
            None => lines.held(FILLED, format!("{} parameters", model.parameters().len()))?,
            Some(_) => lines.not_run(FILLED, "the weights are random by request")?,
        }
        let ids = Tensor::from_slice(&ids).view([-1, n_tokens as i64]).to_device(model.device());
        of_tokens(&folder.tokenizer, &model, &text, &mut lines)?;
        let is_finite = tch::no_grad(|| of_model(args, &folder, &model, &ids, &hub, &mut lines))?;
        let Some(against) = against.as_ref().filter(|_| is_finite) else { return Ok(None) };
        let options =
            LoadOptions { kind: model.kind(), device: model.device(), ..LoadOptions::default() };
        let other = load_model(&against.path, None, &options, &hub)
            .with_context(|| format!("cannot load the model `{}`", against.name))?;
        tch::no_grad(|| held_against(&folder, &model, &other, &rows, &ids, &mut lines))
    };
    // What was found until then is told all the same.
    let (apart, ended) = match try_all() {
        Ok(apart) => (apart, None),
        Err(error) => {
            // No fault of the model: memory, a file that is gone, the other model.
            lines.not_run(TRIED, &told(&error))?;
            (None, Some(error))
        }
    };

    let [n_held, n_broken, n_not_run] =
        [Found::Held, Found::Broken, Found::NotRun].map(|found| lines.n(found));
    let Lines { all, out } = lines;
    writeln!(out)?;
    if let (Some(apart), Some(name)) = (&apart, &args.against) {
        apart.tell(name, out)?;
    }
    writeln!(out, "{n_held} held, {n_broken} broken, {n_not_run} not run")?;
    let written = match &args.out {
        None => Ok(()),
        Some(path) => Subject::new(&args.model, &args.compute, &model).and_then(|subject| {
            let report = Report {
                subject,
                text: name,
                n_tokens,
                against: args.against.as_deref(),
                n_held,
                n_broken,
                n_not_run,
                laws: all,
                apart,
            };
            write_json(path, &report)?;
            tracing::info!("wrote `{}`", path.display());
            Ok(())
        }),
    };
    // What came first is said.
    ended.map_or(Ok(()), Err).and(written)?;
    Ok(if n_broken > 0 { Outcome::Failed } else { Outcome::Done })
}

/// What the text is called.
fn text_name(args: &VerifyArgs) -> String {
    args.text.as_ref().map_or(TEXT.into(), |path| path.display().to_string())
}

/// Whether an error is of what a folder holds.
fn is_of_the_folder(cause: &(dyn std::error::Error + 'static)) -> bool {
    cause.is::<Error>() || cause.is::<attn_core::checkpoint::Error>()
}

/// What an error says, without its hint, in one line.
fn told(error: &anyhow::Error) -> String {
    let cause = error.root_cause().to_string();
    let told = cause.lines().map(str::trim).filter(|line| !line.starts_with("hint: "));
    told.take(8).collect::<Vec<_>>().join(" ")
}

/// A law that an error breaks.
fn broken_by(law: &str, error: &anyhow::Error) -> Line {
    let place = told(error);
    Line { law: law.into(), found: Found::Broken, error: None, tolerance: Some(0.0), place }
}

/// Says which law a folder breaks that is no model, in OUT.json as well, and hands back why.
fn unloadable(
    args: &VerifyArgs,
    law: &str,
    error: anyhow::Error,
    out: &mut dyn Write,
) -> Result<Outcome> {
    let mut lines = Lines { all: Vec::new(), out };
    lines.add(broken_by(law, &error))?;
    if let Some(path) = &args.out {
        let report = Report {
            subject: Subject::unloaded(&args.model, &args.compute)?,
            text: text_name(args),
            n_tokens: 0,
            against: args.against.as_deref(),
            n_held: 0,
            n_broken: 1,
            n_not_run: 0,
            laws: lines.all,
            apart: None,
        };
        write_json(path, &report)?;
    }
    Err(error)
}

/// The text, and rows of its tokens, all of one length.
fn read(args: &VerifyArgs, folder: &Folder) -> Result<(String, Vec<Vec<u32>>)> {
    let path = match &args.text {
        Some(path) => path.clone(),
        None => bundled(TEXT)
            .context("cannot find the text that is read where `--text` is not given")?,
    };
    let text = std::fs::read_to_string(&path)
        .with_context(|| format!("cannot read `{}`", path.display()))?;
    let (most, _) = SIZES[args.size()];
    let room = folder.config.sizes.max_positions as usize;
    ensure!(room >= 8, "`{}` reads {room} tokens, and the laws need 8", args.model);
    let most = most.min(room);
    // A page of text is enough, of a book as well.
    let text: String = text.chars().take(200_000).collect();
    let ids = folder.tokenizer.ids(&text, false)?;
    let n = most.min(ids.len() / N_ROWS);
    ensure!(
        n >= 8,
        "`{}` has {} tokens, expected at least {}\nhint: a page of text, of the kind that the model is used on",
        path.display(),
        ids.len(),
        8 * N_ROWS
    );
    let rows = ids.chunks_exact(n).take(N_ROWS).map(<[u32]>::to_vec).collect();
    Ok((text, rows))
}

fn of_tokens(
    tokenizer: &TextTokenizer,
    model: &Model,
    text: &str,
    lines: &mut Lines<'_>,
) -> Result<()> {
    // What a normalizer takes away is gone for good; what is left has to come back, and letters have to be left.
    let some: String = text.chars().take(2000).collect();
    let ids = tokenizer.ids(&some, false)?;
    let decoded = tokenizer.decode(&ids, false)?;
    let again = tokenizer.ids(&decoded, false)?;
    let n_other = ids.iter().zip(&again).filter(|(a, b)| a != b).count();
    let n_other = n_other + ids.len().abs_diff(again.len());
    lines.count(
        "what_is_decoded_has_the_same_tokens",
        n_other,
        format!("{} tokens of text", ids.len()),
    )?;
    let letters = |text: &str| -> String {
        text.chars().filter(char::is_ascii_alphanumeric).map(|it| it.to_ascii_lowercase()).collect()
    };
    let (read, back) = (letters(&some), letters(&decoded));
    let n_same = read.chars().zip(back.chars()).take_while(|(a, b)| a == b).count();
    let n_lost = read.len().max(back.len()) - n_same;
    let place = match n_lost {
        0 => format!("{} of them", read.len()),
        _ => format!("from letter {n_same} of {} on", read.len()),
    };
    lines.count("letters_and_digits_come_back_from_tokens", n_lost, place)?;
    let named: [(&str, Option<u32>); 3] = [
        ("bos_token_id", tokenizer.bos_id()),
        ("eos_token_id", tokenizer.eos_id()),
        ("pad_token_id", tokenizer.pad_id()),
    ];
    let is_other = |(name, own): &&(&str, Option<u32>)| {
        let said = model.config().raw(name);
        let holds = |value: &serde_json::Value, id: u32| match value {
            serde_json::Value::Array(all) => all.iter().any(|it| it.as_u64() == Some(id.into())),
            one => one.as_u64() == Some(id.into()),
        };
        said.zip(*own).is_some_and(|(said, own)| !said.is_null() && !holds(said, own))
    };
    let others: Vec<&str> = named.iter().filter(is_other).map(|it| it.0).collect();
    lines.count(
        "config_and_tokenizer_name_the_same_special_tokens",
        others.len(),
        others.join(" "),
    )?;
    let special = tokenizer.special_ids();
    let is_cut = |id: &&u32| {
        let token = tokenizer.token(**id).unwrap_or_default();
        tokenizer.ids(&token, false).ok() != Some(vec![**id])
    };
    let cut: Vec<String> =
        special.iter().filter(is_cut).filter_map(|&id| tokenizer.token(id)).collect();
    let place = match &cut[..] {
        [] => format!("{} of them", special.len()),
        cut => format!("cut to pieces: {}", cut.join(" ")),
    };
    lines.count("a_special_token_is_one_token", cut.len(), place)
}

/// What holds of a model by itself. Whether its parameters are finite: nothing else is tried where they are not.
fn of_model(
    args: &VerifyArgs,
    folder: &Folder,
    model: &Model,
    ids: &Tensor,
    hub: &Hub,
    lines: &mut Lines<'_>,
) -> Result<bool> {
    let short = ids.narrow(1, 0, SHORT.min(ids.size()[1]));
    let is_causal = model.config().is_causal();
    let is_language_model = model.config().head == Head::LanguageModel;
    let finite = laws::finite_parameters(model);
    lines.verdict(&finite)?;
    if !finite.held() {
        lines.not_run(TRIED, "what is no finite number breaks nearly all that is left")?;
        return Ok(false);
    }
    lines.verdict(&laws::layers_of_their_own(model))?;
    if is_causal {
        lines.law("a_causal_model_ignores_the_future", || laws::model_causality(model, ids))?;
        lines.law("no_layer_sees_the_future", || laws::layer_causality(model, ids))?;
    } else {
        lines.not_run("a_causal_model_ignores_the_future", "the model reads both sides")?;
    }
    if is_language_model {
        const NEXT: &str = "predictions_are_of_the_next_token";
        const BETTER: &str = "predictions_are_better_than_chance";
        let is_random = args.compute.init.is_some();
        let predicting = if is_causal { &[NEXT, BETTER][..] } else { &[BETTER] };
        for law in predicting.iter().filter(|_| is_random) {
            lines.not_run(law, "the weights are random by request")?;
        }
        if is_causal && !is_random {
            lines.law(NEXT, || laws::next_token(model, ids))?;
        }
        let mask_id = folder.tokenizer.mask_id().map(i64::from);
        if !is_random {
            lines.law(BETTER, || laws::better_than_chance(model, ids, mask_id))?;
        }
    }
    // Where numbers decide what is attended to, one that is rounded may tip over: these are tried in f64.
    let chooses = model.layers().iter().any(|layer| layer.kind().nature().chooses);
    let wide = match chooses && !args.quick {
        true => Some(wide(args, folder, model, hub)?),
        false => None,
    };
    let tried = wide.as_ref().unwrap_or(model);
    lines.law("padding_changes_nothing", || laws::model_padding(tried, &short))?;
    lines.law("a_batch_equals_its_rows", || laws::model_batch(tried, &short))?;
    lines.law("open_gates_change_no_bit", || laws::open_gates(tried, &short))?;
    if args.quick {
        lines.law(TIED, || laws::tied_weights(&[("in memory", model)]))?;
        leave_out(model, lines)?;
        return Ok(true);
    }
    if is_causal {
        // Single texts go another way than batches, and long ones leave a window.
        let one = ids.narrow(0, 0, 1);
        lines.law(STEPS, || {
            let together = laws::model_decoding(tried, &short)?;
            Ok(together.or_worse(laws::model_decoding(tried, &one)?))
        })?;
        lines.law(PREFILL, || laws::model_prefill(tried, ids))?;
    }
    of_heads(args, tried, &short, lines)?;
    of_training(args, model, &short, lines)?;
    of_kinds(model, lines)?;
    // Not before: it is as large as two of the model.
    let wide = match wide {
        Some(wide) => wide,
        None => self::wide(args, folder, model, hub)?,
    };
    match model.kind() {
        Kind::Double => lines.not_run(ROUNDING, "the model is in f64")?,
        _ if chooses => lines.not_run(ROUNDING, "what is rounded chooses something else")?,
        _ => lines.law(ROUNDING, || laws::model_precision(model, &wide, &short))?,
    }
    of_slopes(args, folder, &wide, &short, lines)?;
    Ok(true)
}

const TIED: &str = "tied_weights_are_one";
const STEPS: &str = "steps_equal_a_full_pass";
const PREFILL: &str = "a_beginning_and_steps_equal_a_full_pass";
const REMOVED: &str = "a_removed_head_is_a_masked_one";
const SLICES: &str = "the_output_columns_of_a_head_are_its_own";
const TURNED_VALUES: &str = "turned_values_change_nothing";
const TURNED_KEYS: &str = "turned_queries_and_keys_change_nothing";
const REPEATED: &str = "repeated_key_value_heads_change_nothing";
const TWINS: &str = "heads_that_are_alike_merge_into_one";
const SAVED: &str = "what_is_saved_is_loaded_again";
const STEP: &str = "a_step_moves_what_is_trained_alone";
const ROUNDING: &str = "rounding_stays_small";
const SLOPES: &str = "gradients_are_those_of_finite_differences";

/// Says what `--quick` does not try: what is not said would pass for tried.
fn leave_out(model: &Model, lines: &mut Lines<'_>) -> Result<()> {
    let decoding = [STEPS, PREFILL].into_iter().filter(|_| model.config().is_causal());
    let others = [
        REMOVED,
        SLICES,
        TURNED_VALUES,
        TURNED_KEYS,
        REPEATED,
        TWINS,
        SAVED,
        STEP,
        ROUNDING,
        SLOPES,
    ];
    let of_kinds = kinds(model).into_iter().map(|(variant, _)| law_of_kind(variant));
    let mut all = decoding.chain(others).map(str::to_owned).chain(of_kinds);
    all.try_for_each(|law| lines.not_run(&law, "left out by --quick"))
}

/// Each attention of the model once, with how far it reaches.
fn kinds(model: &Model) -> Vec<(&Variant, i64)> {
    let mut kinds: Vec<(&Variant, i64)> = Vec::new();
    for layer in model.layers() {
        if !kinds.iter().any(|(variant, _)| *variant == layer.variant()) {
            kinds.push((layer.variant(), layer.kind().nature().reach));
        }
    }
    kinds
}

fn law_of_kind(variant: &Variant) -> String {
    format!("{}_keeps_the_laws_of_kinds", variant.name())
}

/// What holds of the heads of each layer.
fn of_heads(args: &VerifyArgs, model: &Model, short: &Tensor, lines: &mut Lines<'_>) -> Result<()> {
    let layers = model.layers();
    let n_heads = |layer: usize| layers[layer].dims().n_heads;
    let heads: Vec<(usize, i64)> = (0..layers.len())
        .flat_map(|layer| match args.full {
            true => (0..n_heads(layer)).map(|head| (layer, head)).collect::<Vec<_>>(),
            // Another one in each layer.
            false if n_heads(layer) > 0 => vec![(layer, (layer as i64 + 1) % n_heads(layer))],
            false => Vec::new(),
        })
        .collect();
    let closed = laws::closed_heads(model, short, &heads)?;
    lines.law(REMOVED, || laws::removed_heads(model, short, &heads, &closed))?;
    lines.law(SLICES, || laws::head_slices(model, short, &heads, &closed))?;
    drop(closed);
    let all: Vec<usize> = (0..layers.len()).collect();
    type Turning = fn(&Model, &Tensor, &[usize]) -> Result<laws::Verdict, Error>;
    let turned: [(&str, Turning); 2] =
        [(TURNED_VALUES, laws::turned_values), (TURNED_KEYS, laws::turned_queries_and_keys)];
    for (name, law) in turned {
        match model.kind() {
            Kind::Half | Kind::BFloat16 => lines.not_run(name, "16 bits round them anew")?,
            _ => lines.law(name, || law(model, short, &all))?,
        }
    }
    lines.law(REPEATED, || laws::repeated_kv_heads(model, short, &all))?;
    lines.law(TWINS, || {
        laws::merged_twins(model, short, &all, &|model, wanted| {
            merge_kv(model, wanted, Merge::Mean, None).map(drop)
        })
    })
}

/// What holds of a model that is saved, and of one that is trained.
fn of_training(
    args: &VerifyArgs,
    model: &Model,
    short: &Tensor,
    lines: &mut Lines<'_>,
) -> Result<()> {
    // Beside the result where there is one: a folder for temporary files may be small.
    let beside = args.out.as_deref().map_or_else(std::env::temp_dir, |it| parent_of(it).to_owned());
    // Never put in its place: what a kill leaves of it the next one removes.
    let draft = Staging::new(&beside.join("attn-verify"))
        .context("cannot make a folder to save the model in")?;
    let again = laws::saved(model, &draft.inner());
    let is_same = match &again {
        Ok(again) => {
            let verdict = laws::saved_and_loaded(model, again, short);
            let is_same = verdict.as_ref().is_ok_and(laws::Verdict::held);
            lines.law(SAVED, || verdict)?;
            lines
                .law(TIED, || laws::tied_weights(&[("in memory", model), ("as loaded", again)]))?;
            is_same
        }
        Err(_) => false,
    };
    let before: Vec<Tensor> = match again {
        // What is there twice already need not be copied.
        Ok(again) if is_same => again.parameters().into_iter().map(|it| it.1).collect(),
        Ok(_) => copies(model),
        Err(error) => {
            lines.law(SAVED, || Err(error))?;
            lines.law(TIED, || laws::tied_weights(&[("in memory", model)]))?;
            copies(model)
        }
    };
    let step = a_step_moves_what_is_trained_alone(model, &before, short)
        .with_context(|| format!("cannot try `{STEP}`"))?;
    lines.verdict(&step)
}

fn copies(model: &Model) -> Vec<Tensor> {
    model.parameters().into_iter().map(|it| it.1.detach().copy()).collect()
}

/// The gradients of the loss that the model would be trained by, `wide` in `f64`. Where a kind learns by slopes of its own, which are no
/// derivatives, those of what it computes outside of training.
fn of_slopes(
    args: &VerifyArgs,
    folder: &Folder,
    wide: &Model,
    short: &Tensor,
    lines: &mut Lines<'_>,
) -> Result<()> {
    let (_, n) = SIZES[args.size()];
    let has_own_slopes = wide.layers().iter().any(|layer| layer.kind().nature().has_own_slopes);
    let objective: Option<&dyn Objective> = match wide.config().head {
        _ if has_own_slopes || wide.needs_source() => None,
        Head::Bare => None,
        Head::LanguageModel if wide.config().is_causal() => Some(&CausalLm),
        Head::LanguageModel => Some(&MaskedLm),
        Head::Classifier { .. } => Some(&Classification),
    };
    let rows: Vec<Vec<i64>> = Vec::try_from(short).context("ids have two axes")?;
    let rows: Vec<Encoded> = rows
        .into_iter()
        .enumerate()
        .map(|(index, ids)| {
            let ids = ids.into_iter().map(|id| id as u32).collect(); // of the vocabulary
            Encoded { ids, label: Some(0), index, second_from: None }
        })
        .collect();
    let rows = collate(&rows.iter().collect::<Vec<_>>(), folder.tokenizer.fill_id(), Side::Right);
    let batch = match folder.masking()? {
        Some(masking) => {
            let masked = mask_tokens(&rows, &masking, 0, 0)?;
            Batch::masked(rows, masked)
        }
        None => rows.into(),
    };
    let loss = |model: &Model| match objective {
        Some(objective) => {
            // The same dropout each time.
            tch::manual_seed(0);
            objective.loss(model, &batch, Stream::default())
        }
        None => {
            let input = laws::with_source(model, ModelInput::new(short.shallow_clone()));
            let logits = model.forward(&input, &ForwardOptions::default())?.logits;
            Ok(logits.square().mean(Kind::Double))
        }
    };
    lines.law(SLOPES, || match laws::model_gradients(wide, short, n, loss) {
        Ok(mut verdict) => {
            let of = objective.map_or("mean square of logits", |it| it.name());
            verdict.place = format!("{}, {of}", verdict.place);
            Ok(verdict)
        }
        Err(attn_train::Error::Core(error)) => Err(error),
        Err(error) => Err(Error::Input { name: "batch", problem: error.to_string() }),
    })
}

/// The same model in `f64`.
fn wide(args: &VerifyArgs, folder: &Folder, model: &Model, hub: &Hub) -> Result<Model> {
    let options = LoadOptions {
        kind: Kind::Double,
        device: model.device(),
        seed: args.seed,
        ..LoadOptions::default()
    };
    load_model(&folder.path, args.compute.init, &options, hub)
        .with_context(|| format!("cannot load the model `{}` in f64", args.model))
}

/// The laws of the attention kinds at work, on random projections.
fn of_kinds(model: &Model, lines: &mut Lines<'_>) -> Result<()> {
    for (variant, reach) in kinds(model) {
        let law = law_of_kind(variant);
        // Twice what it attends to and some: else it would attend to all of the probe.
        let seq_len = (2 * reach + 17).max(ProbeSize::default().seq_len);
        if seq_len > LONGEST_PROBE {
            let why = format!("it reaches {reach} tokens, more than is tried here");
            lines.not_run(&law, &why)?;
            continue;
        }
        match laws::for_layer(variant, ProbeSize { seq_len, ..ProbeSize::default() }) {
            Ok(verdicts) => {
                let broken: Vec<String> =
                    verdicts.iter().filter(|it| !it.held()).map(ToString::to_string).collect();
                let place = match &broken[..] {
                    [] => format!("{} of them, on random projections", verdicts.len()),
                    broken => broken.join("; "),
                };
                lines.count(&law, broken.len(), place)?;
            }
            // Settings that fit this model's sizes and not the probe's.
            Err(error @ (Error::Setting { .. } | Error::Refused { .. })) => {
                lines.not_run(&law, &error.to_string())?;
            }
            Err(error) => lines.add(broken_by(&law, &error.into()))?,
        }
    }
    Ok(())
}

/// How the model stands to another.
fn held_against(
    folder: &Folder,
    model: &Model,
    other: &Model,
    rows: &[Vec<u32>],
    ids: &Tensor,
    lines: &mut Lines<'_>,
) -> Result<Option<Apart>> {
    const ALIGNED: &str = "predictions_are_nearest_where_they_are_aligned";
    let is_causal_lm =
        |it: &Model| it.config().is_causal() && it.config().head == Head::LanguageModel;
    if is_causal_lm(model) && is_causal_lm(other) {
        let rows: Vec<Encoded> = rows
            .iter()
            .enumerate()
            .map(|(index, ids)| Encoded { ids: ids.clone(), label: None, index, second_from: None })
            .collect();
        let batching = Batching { pad_id: folder.tokenizer.fill_id(), ..Batching::default() };
        let by_shift = kl_by_shift(model, other, &rows, &batching)?;
        let told: Vec<String> =
            by_shift.iter().map(|(shift, kl)| format!("{shift:+}: {}", in_cell(*kl))).collect();
        let aligned = by_shift.iter().find(|it| it.0 == 0).map_or(f64::NAN, |it| it.1);
        // A shift either way has to look worse; a KL that is no number looks like nothing.
        let is_worse = |it: &&(i64, f64)| it.0 == 0 || it.1 > aligned;
        let n_as_near = by_shift.len() - by_shift.iter().filter(is_worse).count();
        lines.count(ALIGNED, n_as_near, format!("KL by shift {}", told.join(", ")))?;
    } else {
        lines.not_run(ALIGNED, "the two do not both predict next tokens")?;
    }
    const LOSS: &str = "a_loss_is_what_it_is_called";
    let kl = Losses { forward_kl: 1.0, ..Losses::default() };
    let loss = |teacher: &Model, student: &Model, batch: &Batch| {
        Distillation::new(teacher, student, &kl)?.loss(student, batch, Stream::default())
    };
    match a_loss_is_what_it_is_called(&kl, other, model, ids, &loss) {
        Ok(Some(verdict)) => lines.verdict(&verdict)?,
        Ok(None) => lines
            .not_run(LOSS, "the two predict nearly the same on the few tokens it is tried on")?,
        Err(error @ attn_train::Error::Teacher { .. }) => {
            lines.not_run(LOSS, &error.to_string())?
        }
        Err(error) => return Err(error).context(format!("cannot try `{LOSS}`")),
    }
    lines.law("copied_key_value_heads_compute_the_same", || {
        laws::copied_kv_heads(model, other, ids)
    })?;
    let by_layer = match laws::apart_by_layer(model, other, ids) {
        Err(error @ Error::Input { .. }) => {
            lines.not_run("hidden_states_can_be_compared", &error.to_string())?;
            None
        }
        found => Some(found?),
    };
    Ok(Some(Apart::of(model, other, by_layer, ids.size()[1] as usize)))
}
