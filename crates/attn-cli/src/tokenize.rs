//! `attn tokenize`: texts to the token ids that `attn forward` reads.

use std::{fs, io::Write};

use anyhow::{Context, Result, ensure};
use attn_data::{
    batch::{Encoded, Side, collate},
    hub::{Hub, progress_bar},
    tokenizer::{EncodeOptions, Input},
};
use serde::Serialize;

use crate::{args::TokenizeArgs, texts::Folder};

/// IDS.json.
#[derive(Serialize)]
struct Ids<'a> {
    input_ids: Vec<&'a [i64]>,
    attention_mask: Vec<&'a [i64]>,
}

pub(crate) fn run(args: &TokenizeArgs, out: &mut dyn Write) -> Result<()> {
    let texts = texts(args)?;
    let hub = Hub::from_env().with_progress(progress_bar());
    let Folder { config, tokenizer, .. } = Folder::open(&args.model, false, None, &hub)?;
    let inputs: Vec<Input<'_>> = texts.iter().map(|text| text.as_str().into()).collect();
    let ids = tokenizer.encode(&inputs, &EncodeOptions::default()).context("cannot tokenize")?.ids;
    let room = config.sizes.position_table.map_or(usize::MAX, |rows| rows as usize);
    for (index, ids) in ids.iter().enumerate() {
        ensure!(!ids.is_empty(), "text {index} (counted from 0) has no tokens");
        ensure!(
            ids.len() <= room,
            "text {index} (counted from 0) has {} tokens, and the model has {room} positions\nhint: shorten it",
            ids.len()
        );
        let tokens: Vec<String> =
            ids.iter().map(|&id| tokenizer.token(id).unwrap_or_else(|| id.to_string())).collect();
        match args.tokens {
            true => tracing::info!("{}", tokens.join(" ")),
            false => tracing::debug!("{}", tokens.join(" ")),
        }
    }
    let rows: Vec<Encoded> = ids
        .into_iter()
        .map(|ids| Encoded { ids, label: None, index: 0, second_from: None })
        .collect();
    let batch = collate(&rows.iter().collect::<Vec<_>>(), tokenizer.fill_id(), Side::Right);
    let json = Ids {
        input_ids: batch.ids.chunks(batch.cols).collect(),
        attention_mask: batch.mask.chunks(batch.cols).collect(),
    };
    writeln!(out, "{}", serde_json::to_string(&json).context("cannot write JSON")?)?;
    Ok(())
}

/// The texts as typed, then the lines of the file.
fn texts(args: &TokenizeArgs) -> Result<Vec<String>> {
    let mut texts = args.texts.clone();
    if let Some(path) = &args.file {
        let shown = path.display();
        let lines = fs::read_to_string(path).with_context(|| format!("cannot read `{shown}`"))?;
        texts.extend(lines.lines().map(str::to_owned));
        ensure!(!texts.is_empty(), "`{shown}` is empty, expected a text a line");
    }
    Ok(texts)
}
