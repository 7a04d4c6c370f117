//! `attn patch`: which heads carry what tells two prompts apart.

use std::io::Write;

use anyhow::{Context, Result, bail, ensure};
use attn_data::{
    hub::{Hub, progress_bar},
    tokenizer::TextTokenizer,
};
use attn_eval::{Patched, Patching, Prompts, patch};
use serde::Serialize;

use crate::{
    args::{PatchArgs, PatchBy},
    head_names::QUERY_HEAD,
    memory::{self, Foreseen},
    plot::write_result,
    run_dir::check_writable,
    subject::Subject,
    texts::Folder,
};

/// Heads that are shown.
const N_SHOWN: usize = 8;

/// OUT.json.
#[derive(Serialize)]
struct Report<'a> {
    #[serde(flatten)]
    subject: Subject<'a>,
    clean_prompt: &'a str,
    corrupted_prompt: &'a str,
    answer: &'a str,
    wrong: &'a str,
    /// Tokens of the clean prompt.
    tokens: Vec<String>,
    /// The place that predicts the answer.
    at: usize,
    by: Patching,
    /// Which heads are meant.
    unit: &'static str,
    /// The number of each head in the pretrained layer.
    heads: Vec<Vec<i64>>,
    #[serde(flatten)]
    patched: Patched,
}

pub(crate) fn run(args: &PatchArgs, out: &mut dyn Write) -> Result<()> {
    let _made = check_writable(&args.out)?;
    let _made_too = args.plot.as_deref().map(check_writable).transpose()?;
    args.compute.device()?;
    let hub = Hub::from_env().with_progress(progress_bar());
    let folder = Folder::open(&args.model, args.compute.init.is_none(), None, &hub)?;
    let tokenizer = &folder.tokenizer;
    let is_causal = folder.config.is_causal();
    let [clean, corrupted] =
        [&args.clean, &args.corrupted].map(|text| tokenizer.ids(text, !is_causal));
    let (clean, corrupted) = (clean?, corrupted?);
    ensure!(!clean.is_empty(), "the prompt CLEAN has no tokens");
    let at = match is_causal {
        true => clean.len() - 1,
        false => {
            let (at, other) = (
                mask_place(tokenizer, &clean, "CLEAN")?,
                mask_place(tokenizer, &corrupted, "CORRUPTED")?,
            );
            ensure!(
                at == other || clean.len() != corrupted.len(),
                "the masks of the prompts are tokens {at} and {other}, expected one place: positions are patched one for one"
            );
            at
        }
    };
    let token = |&id: &u32| tokenizer.shown(id).unwrap_or_else(|| id.to_string());
    let tokens = |ids: &[u32]| ids.iter().map(token).collect::<Vec<_>>().join(" | ");
    ensure!(
        clean.len() == corrupted.len(),
        "the prompts have {} and {} tokens, expected as many: positions are patched one for one\n  {}\n  {}\nhint: swap names or \
         words for others of as many tokens",
        clean.len(),
        corrupted.len(),
        tokens(&clean),
        tokens(&corrupted)
    );
    let right = one_token(tokenizer, &args.answer, "--answer")?;
    let wrong = one_token(tokenizer, &args.wrong, "--wrong")?;
    let len = clean.len() as u64;
    // Copies share a pass of some thousand tokens.
    let rows = (4096 / len).max(1);
    Foreseen::computing(&folder.config, &args.compute)?
        .pass((rows, len))
        .inputs((2, len))
        .logits(rows, 2)
        .check(args.compute.device()?, memory::OF_ONE_TEXT)?;
    let model = folder.load(&args.compute, args.seed, &hub)?;
    let by = match args.by {
        PatchBy::Head => Patching::Heads,
        PatchBy::Position => Patching::Positions,
    };
    let prompts = Prompts { clean: &clean, corrupted: &corrupted, at, right, wrong };
    let patched = patch(&model, &prompts, by)
        .with_context(|| format!("cannot patch the heads of `{}`", args.model))?;
    let report = Report {
        unit: QUERY_HEAD,
        subject: Subject::new(&args.model, &args.compute, &model)?,
        clean_prompt: &args.clean,
        corrupted_prompt: &args.corrupted,
        answer: &args.answer,
        wrong: &args.wrong,
        tokens: clean.iter().map(token).collect(),
        at,
        by,
        heads: model.layers().iter().map(|layer| layer.spec().kept_heads).collect(),
        patched,
    };
    let Patched { clean, corrupted, .. } = &report.patched;
    if clean <= corrupted {
        tracing::warn!(
            "the clean prompt prefers {:?} to {:?} no more than the corrupted one does ({clean:.3}, {corrupted:.3}): there is \
             nothing to bring back\nhint: prompts whose answers the model tells apart",
            args.answer,
            args.wrong
        );
    }
    if *corrupted > 0.0 {
        tracing::warn!(
            "the corrupted prompt prefers {:?}, too ({corrupted:.3}): shares are of how much less it does",
            args.answer
        );
    }
    print(&report, out)?;
    write_result(&args.out, &report, args.plot.as_deref())?;
    Ok(())
}

fn one_token(tokenizer: &TextTokenizer, text: &str, option: &str) -> Result<i64> {
    match tokenizer.ids(text, false)?.as_slice() {
        [id] => Ok((*id).into()),
        ids => bail!(
            "`{option}` is {text:?}, {} tokens, expected one\nhint: many tokenizers write a word with the blank in front of it",
            ids.len()
        ),
    }
}

fn mask_place(tokenizer: &TextTokenizer, ids: &[u32], prompt: &str) -> Result<usize> {
    let Some(mask) = tokenizer.mask_id() else {
        bail!("the tokenizer has no mask token to ask at")
    };
    let places: Vec<usize> = (0..ids.len()).filter(|&at| ids[at] == mask).collect();
    let shown = tokenizer.token(mask).unwrap_or_else(|| mask.to_string());
    ensure!(
        places.len() == 1,
        "the prompt {prompt} has the mask token {} times, expected once\nhint: write {shown} where the answer belongs",
        places.len()
    );
    Ok(places[0])
}

fn print(report: &Report<'_>, out: &mut dyn Write) -> Result<()> {
    let Report { patched, heads, tokens, .. } = report;
    writeln!(
        out,
        "ln p({:?}) - ln p({:?}): clean {:+.3}, corrupted {:+.3}\n",
        report.answer, report.wrong, patched.clean, patched.corrupted
    )?;
    writeln!(out, "{:>10} {:>10} {:>9}   position", "layer-head", "denoising", "noising")?;
    let mut all = Vec::new();
    for (layer, of_layer) in patched.denoising.iter().enumerate() {
        for (place, of_head) in of_layer.iter().enumerate() {
            all.extend((0..of_head.len()).map(|pos| (layer, place, pos)));
        }
    }
    let denoising =
        |&(layer, place, pos): &(usize, usize, usize)| patched.denoising[layer][place][pos];
    all.sort_by(|a, b| denoising(b).abs().total_cmp(&denoising(a).abs()));
    for one @ &(layer, place, pos) in all.iter().take(N_SHOWN) {
        let name = format!("{layer}-{}", heads[layer][place]);
        let noising = patched.noising[layer][place][pos];
        let at = match report.by {
            Patching::Heads => "all".to_owned(),
            Patching::Positions => format!("{pos} {:?}", tokens[pos]),
        };
        writeln!(out, "{name:>10} {:>+10.3} {noising:>+9.3}   {at}", denoising(one))?;
    }
    Ok(())
}
