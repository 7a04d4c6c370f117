//! Perplexity of a text by each convention in use, labelled: figures of different ones are not comparable.

use std::{io::Write, ops::ControlFlow};

use anyhow::{Context, Result, ensure};
use attn_core::Model;
use attn_data::{
    tokenizer::{EncodeOptions, Input},
    wikitext,
};
use attn_eval::{Document, Perplexity, Windows, check_decoder, perplexity};
use serde::Serialize;

use crate::{
    monitor::grouped,
    task::Task,
    texts::{Folder, is_running},
};

/// A convention, and what came of it.
#[derive(Serialize)]
pub(crate) struct Labelled {
    text: Text,
    #[serde(flatten)]
    score: Perplexity,
}

/// What was tokenized. Words and bytes are in any case those of the pages as they stand, counted as lm-evaluation-harness
/// does ([`wikitext::count_words`]; of UTF-8).
#[derive(Debug, Clone, Copy, Serialize)]
#[serde(rename_all = "snake_case")]
enum Text {
    /// As it stands.
    Raw,
    /// WikiText with its marks of tokenization undone, as lm-evaluation-harness reads it.
    Detokenized,
}

/// Refuses what has no such figures, before anything slow.
pub(crate) fn check(task: &Task<'_>) -> Result<()> {
    const HINT: &str = "hint: leave `--conventions` away";
    check_decoder(&task.folder.config, "perplexity").context(HINT)?;
    ensure!(
        task.data.label.is_none() && task.packs(),
        "`--conventions` scores running text, and the rows are scored one by one\n{HINT}"
    );
    ensure!(task.max_len >= 4, "`--max-len` is {}, expected at least 4", task.max_len);
    begins(&task.folder).map(drop)
}

/// The token that begins texts: lm-evaluation-harness's prefix.
pub(crate) fn begins(folder: &Folder) -> Result<u32> {
    let tokenizer = &folder.tokenizer;
    tokenizer.bos_id().or(tokenizer.eos_id()).with_context(|| {
        format!(
            "the tokenizer of `{}` has no token that begins a text, which the first token is predicted from\nhint: \
             name one as `bos_token` in its tokenizer_config.json",
            folder.name
        )
    })
}

/// Every convention that the text allows. `stream` is the text as rows of tokens.
pub(crate) fn conventions(
    model: &Model,
    task: &Task<'_>,
    stream: Vec<u32>,
) -> Result<Vec<Labelled>> {
    let texts = || task.texts.iter().map(|row| row.text.as_str());
    let pages: Vec<String> = match is_running(&task.texts) {
        true => wikitext::pages(texts()),
        false => texts().map(str::to_owned).collect(),
    };
    let documents = |of: &dyn Fn(&str) -> String| -> Result<Vec<Document>> {
        let written: Vec<String> = pages.iter().map(|page| of(page)).collect();
        let inputs: Vec<Input<'_>> = written.iter().map(|page| page.as_str().into()).collect();
        let options = EncodeOptions { add_special_tokens: false, ..EncodeOptions::default() };
        let ids = task.folder.tokenizer.encode(&inputs, &options).context("cannot tokenize")?.ids;
        let both = ids.into_iter().zip(&pages);
        Ok(both
            .map(|(ids, page)| Document {
                ids,
                n_words: wikitext::count_words(page),
                n_bytes: page.len(),
            })
            .collect())
    };
    // The text as one, told by the words and bytes of its pages.
    let whole = |ids, by_page: &[Document]| Document {
        ids,
        n_words: by_page.iter().map(|page| page.n_words).sum(),
        n_bytes: by_page.iter().map(|page| page.n_bytes).sum(),
    };
    let by_page = documents(&str::to_owned)?;
    let mut texts = vec![(Text::Raw, vec![whole(stream, &by_page)], by_page)];
    if pages.iter().any(|page| wikitext::is_tokenized(page)) {
        let by_page = documents(&wikitext::detokenize)?;
        let joined = by_page.iter().flat_map(|page| page.ids.iter().copied()).collect();
        texts.push((Text::Detokenized, vec![whole(joined, &by_page)], by_page));
    } else {
        tracing::info!(
            "the text carries no marks of WikiText's tokenization: it is scored as it stands alone"
        );
    }
    let begins = begins(&task.folder)?;
    let mut found = Vec::new();
    for (text, whole, by_page) in &texts {
        for windows in [Windows::Context, Windows::HalfContext, Windows::LmEval] {
            let documents = if windows == Windows::LmEval { by_page } else { whole };
            tracing::info!("perplexity: {}", label(*text, windows));
            let mut go_on = |_: usize| ControlFlow::Continue(());
            let batching = task.batching();
            let score =
                perplexity(model, documents, windows, task.max_len, begins, &batching, &mut go_on)
                    .with_context(|| format!("cannot score `{}`", task.folder.name))?;
            found.push(Labelled { text: *text, score });
        }
    }
    Ok(found)
}

fn label(text: Text, windows: Windows) -> String {
    let text = match text {
        Text::Raw => "raw",
        Text::Detokenized => "detokenised",
    };
    let windows = match windows {
        Windows::Context => "stride = context",
        Windows::HalfContext => "stride = context/2",
        Windows::LmEval => "lm-evaluation-harness, by page",
    };
    format!("{text}, {windows}")
}

pub(crate) fn print(found: &[Labelled], out: &mut dyn Write) -> Result<()> {
    let Some(first) = found.first() else { return Ok(()) };
    writeln!(out)?;
    writeln!(out, "perplexity by convention, context of {} tokens", first.score.context)?;
    writeln!(
        out,
        "  {:<44} {:>9} {:>10} {:>11} {:>9} {:>9}",
        "", "scored", "per token", "per word", "per byte", "bits/byte"
    )?;
    for Labelled { text, score } in found {
        writeln!(
            out,
            "  {:<44} {:>9} {:>10.3} {:>11.2} {:>9.4} {:>9.4}",
            label(*text, score.windows),
            grouped(score.n_scored),
            score.token_perplexity,
            score.word_perplexity,
            score.byte_perplexity,
            score.bits_per_byte
        )?;
    }
    writeln!(
        out,
        "Words ({}) and bytes ({}) are in every line those of the pages as they stand, as lm-evaluation-harness counts them.",
        grouped(first.score.n_words),
        grouped(first.score.n_bytes)
    )?;
    Ok(())
}
