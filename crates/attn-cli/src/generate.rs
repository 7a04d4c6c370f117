//! `attn generate`: text from a prompt, written as it comes.

use std::{
    io::{self, Read, Write},
    ops::ControlFlow,
    path::Path,
    time::Instant,
};

use anyhow::{Context, Result, bail, ensure};
use attn_core::{
    Model,
    checkpoint::read_json,
    generate::{Ending, Limits, Sampling, generate},
};
use attn_data::{
    hub::{Hub, progress_bar},
    tokenizer::TextTokenizer,
};
use serde_json::Value;

use crate::{
    args::GenerateArgs,
    memory::{self, Foreseen},
    texts::Folder,
};

/// Tokens to write where nothing says otherwise.
const USUAL_LENGTH: usize = 64;

pub(crate) fn run(args: &GenerateArgs, out: &mut dyn Write) -> Result<()> {
    let sampling = Sampling {
        temperature: args.temperature,
        top_k: args.top_k,
        top_p: args.top_p,
        repetition_penalty: args.repetition_penalty,
        seed: args.seed,
    };
    sampling.validate()?;
    ensure!(args.max_new_tokens != Some(0), "`--max-new-tokens` is 0, expected at least 1");
    ensure!(args.stop.iter().all(|text| !text.is_empty()), "`--stop` is empty, expected a text");
    args.compute.device()?;
    let text = prompt(args)?;

    let hub = Hub::from_env().with_progress(progress_bar());
    let folder = Folder::open(&args.model, args.compute.init.is_none(), None, &hub)?;
    let tokenizer = &folder.tokenizer;
    let ids = prompt_ids(tokenizer, &text)?;
    let n_read = ids.len() as u64;
    let n_new = args.max_new_tokens.map_or(USUAL_LENGTH, |most| most) as u64;
    // What would not fit the positions of the model is said by itself.
    let most = u64::try_from(folder.config.sizes.position_table.unwrap_or(i64::MAX)).unwrap_or(0);
    Foreseen::computing(&folder.config, &args.compute)?
        .pass((1, n_read))
        .cache((1, n_read.saturating_add(n_new).min(most)))
        .logits(1, 4)
        .check(args.compute.device()?, memory::OF_ONE_TEXT)?;
    let model = folder.load(&args.compute, args.seed, &hub)?;
    let limits = Limits {
        max_new_tokens: args.max_new_tokens.unwrap_or_else(|| room(&model, ids.len())),
        stop_ids: stop_ids(&folder.path, tokenizer)?,
    };

    if args.echo {
        write!(out, "{text}")?;
        out.flush()?;
    }
    let n_all = ids.len().saturating_add(limits.max_new_tokens);
    let trained = model.config().sizes.max_positions;
    let is_within = i64::try_from(n_all).is_ok_and(|n| n <= trained);
    if model.config().sizes.position_table.is_none() && !is_within {
        tracing::warn!(
            "prompt and new tokens are up to {n_all}, and the model was trained on {trained} positions: expect it to get \
             worse beyond them"
        );
    }
    // The prompt first: what a token becomes depends on whether something stands before it.
    let mut stream = tokenizer.stream(true);
    for &id in &ids {
        stream.push(u32::try_from(id).context("an id is not negative")?)?;
    }
    let mut stops = Stops::new(&args.stop);
    let mut failure = None;
    let mut n_new = 0;
    let started = Instant::now();
    let mut first = None;
    let mut write = |id: i64| -> Result<ControlFlow<()>> {
        n_new += 1;
        first.get_or_insert_with(|| started.elapsed());
        let text = match limits.stop_ids.contains(&id) {
            true => String::new(),
            false => stream.push(id.try_into().context("an id is not negative")?)?,
        };
        let (text, ended) = stops.push(&text);
        write!(out, "{text}")?;
        out.flush()?;
        Ok(if ended { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    };
    let result = generate(&model, &[ids], &sampling, &limits, &mut |_, id| {
        write(id).unwrap_or_else(|error| {
            failure = Some(error);
            ControlFlow::Break(())
        })
    });
    if let Some(error) = failure {
        return Err(error);
    }
    let rows = result.with_context(|| format!("cannot generate with `{}`", args.model))?;
    let seconds = started.elapsed().as_secs_f64();
    writeln!(out, "{}", stops.finish())?;

    let why = match rows[0].ending {
        Ending::StopId => "the end of the text",
        Ending::Caller => "a stop text",
        Ending::Length => "the number of tokens",
    };
    let prefill = first.map_or(0.0, |time| time.as_secs_f64());
    tracing::info!(
        "{n_new} tokens, ended by {why}; the first after {prefill:.2} s{}",
        match n_new {
            0 | 1 => String::new(),
            n => format!(", then {:.1} tokens/s", (n - 1) as f64 / (seconds - prefill)),
        }
    );
    Ok(())
}

/// The tokens to write where the user names no number: the usual, or what fits behind the prompt.
fn room(model: &Model, n_prompt: usize) -> usize {
    // The last one is predicted, never read.
    let fits = |rows: i64| (rows + 1).saturating_sub(n_prompt as i64).max(1) as usize;
    model.config().sizes.position_table.map_or(USUAL_LENGTH, |rows| USUAL_LENGTH.min(fits(rows)))
}

fn prompt(args: &GenerateArgs) -> Result<String> {
    match &args.prompt {
        Some(text) => Ok(text.clone()),
        None => {
            let mut text = String::new();
            io::stdin().read_to_string(&mut text).context("cannot read the prompt from stdin")?;
            // The line break that ends a file is not part of what it says.
            Ok(text.strip_suffix('\n').unwrap_or(&text).to_owned())
        }
    }
}

/// The prompt's ids as a text begins: what the tokenizer puts behind a text is left off.
fn prompt_ids(tokenizer: &TextTokenizer, text: &str) -> Result<Vec<i64>> {
    let mut ids = tokenizer.ids(text, true).context("cannot tokenize the prompt")?;
    if ids.len() > 1 && ids.last().copied() == tokenizer.eos_id() {
        ids.pop();
    }
    if ids.is_empty() {
        match tokenizer.bos_id().or(tokenizer.eos_id()) {
            Some(id) => ids.push(id),
            None => bail!(
                "the prompt is empty, and the tokenizer has no token that begins a text\nhint: give a prompt"
            ),
        }
    }
    Ok(ids.into_iter().map(i64::from).collect())
}

/// The ids that end a text: those of `generation_config.json` or `config.json`, and the tokenizer's.
pub(crate) fn stop_ids(folder: &Path, tokenizer: &TextTokenizer) -> Result<Vec<i64>> {
    let mut ids: Vec<i64> = tokenizer.eos_id().map(i64::from).into_iter().collect();
    for file in ["generation_config.json", "config.json"] {
        if !folder.join(file).exists() {
            continue;
        }
        match read_json(folder, file)?.get("eos_token_id") {
            Some(Value::Array(several)) => ids.extend(several.iter().filter_map(Value::as_i64)),
            Some(one) => ids.extend(one.as_i64()),
            None => {}
        }
    }
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
}

/// Finds the first of several texts in a stream, and holds back what may be the beginning of one.
struct Stops<'a> {
    texts: &'a [String],
    held: String,
    found: bool,
}

impl<'a> Stops<'a> {
    fn new(texts: &'a [String]) -> Self {
        Self { texts, held: String::new(), found: false }
    }

    /// What can be written now, and whether a stop has come: nothing is written after that.
    fn push(&mut self, text: &str) -> (String, bool) {
        self.held.push_str(text);
        let first = self.texts.iter().filter_map(|stop| self.held.find(stop.as_str())).min();
        if let Some(at) = first {
            self.held.truncate(at);
            self.found = true;
            return (std::mem::take(&mut self.held), true);
        }
        let begins =
            |from: usize| self.texts.iter().any(|stop| stop.starts_with(&self.held[from..]));
        let hold_from = self
            .held
            .char_indices()
            .map(|(at, _)| at)
            .find(|&at| begins(at))
            .unwrap_or(self.held.len());
        let rest = self.held.split_off(hold_from);
        (std::mem::replace(&mut self.held, rest), false)
    }

    /// What was held back, once no more is coming.
    fn finish(self) -> String {
        if self.found { String::new() } else { self.held }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is written of a stream, piece by piece, and whether it was stopped.
    fn written(stops: &[&str], pieces: &[&str]) -> (Vec<String>, bool) {
        let texts: Vec<String> = stops.iter().map(|&text| text.to_owned()).collect();
        let mut stops = Stops::new(&texts);
        let mut out = Vec::new();
        for piece in pieces {
            let (text, ended) = stops.push(piece);
            out.push(text);
            if ended {
                return (out, true);
            }
        }
        out.push(stops.finish());
        (out, false)
    }

    #[test]
    fn a_stop_may_come_in_pieces_and_is_not_written() {
        assert_eq!(
            written(&["END"], &["a E", "N", "D b"]),
            (vec!["a ".into(), "".into(), "".into()], true)
        );
        assert_eq!(
            written(&["END"], &["a E", "NO", "x"]),
            (vec!["a ".into(), "ENO".into(), "x".into(), "".into()], false)
        );
        assert_eq!(
            written(&["END"], &["E"]).0.concat(),
            "E",
            "what was held back is written at the end"
        );
        assert_eq!(written(&["b", "ab"], &["xab"]), (vec!["x".into()], true), "the earliest wins");
        assert_eq!(written(&["aab"], &["aaa", "b"]).0.concat(), "a");
        assert_eq!(written(&["…!"], &["wait…", "?"]).0, ["wait", "…?", ""]);
        assert_eq!(written(&[], &["a", "b"]).0, ["a", "b", ""]);
    }
}
