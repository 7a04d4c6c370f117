//! `attn heatmap`: pictures of who attends to whom in one text, or in two.

use std::{fs, io::Write};

use anyhow::{Context, Result, ensure};
use attn_core::{ForwardOptions, LoadOptions, Rows};
use attn_data::{
    batch::{Side, collate},
    dataset::Example,
    hub::{Hub, progress_bar},
    tokenizer::TextTokenizer,
};
use attn_train::Batch;
use attn_viz::{HeatMap, Picture, Size};
use tch::{Device, Kind, Tensor};

use crate::{
    args::HeatmapArgs,
    swap::layers,
    texts::{Folder, encode, load_model, max_len},
};

pub(crate) fn run(args: &HeatmapArgs, out: &mut dyn Write) -> Result<()> {
    let hub = Hub::from_env().with_progress(progress_bar());
    let folder = Folder::open(&args.model, true, None, &hub)?;
    let n_layers = folder.config.layers.len();
    let chosen = match &args.layers {
        None => (0..n_layers).collect(),
        Some(text) => layers(text, n_layers).context("cannot use `--layers`")?,
    };
    for &head in &args.heads {
        for &layer in &chosen {
            let heads = &folder.config.layers[layer].kept_heads;
            ensure!(
                heads.contains(&head),
                "`--heads` names head {head}, and layer {layer} has the heads {heads:?}"
            );
        }
    }
    let max_len = max_len(None, &folder.config, &folder.tokenizer, "the texts")?;
    let example = Example { text: args.text.clone(), pair: args.text_pair.clone(), label: None };
    let rows = encode(&folder.tokenizer, &[(0, &example)], max_len, "typed")?;
    let batch = Batch::from(collate(&[&rows[0]], folder.tokenizer.fill_id(), Side::Right));

    let options = LoadOptions { device: Device::Cpu, ..LoadOptions::default() };
    let model = load_model(&folder.path, None, &options, &hub)
        .with_context(|| format!("cannot load the model `{}`", args.model))?;
    let input = batch.input(&model);
    let options = ForwardOptions { attentions: Rows::All, ..ForwardOptions::default() };
    let attentions = tch::no_grad(|| model.forward(&input, &options))?.attentions;

    let own = names(&folder.tokenizer, &input.input_ids)?;
    let source = input
        .source
        .as_ref()
        .map(|source| names(&folder.tokenizer, &source.input_ids))
        .transpose()?;
    fs::create_dir_all(&args.out)
        .with_context(|| format!("cannot make `{}`", args.out.display()))?;
    for &layer in &chosen {
        let attention = model.layers()[layer].kind();
        let (columns, words) = match &source {
            Some(source) if attention.needs_source() => {
                (source.clone(), ["attended to, in the first text", "token of the second text"])
            }
            _ => (own.clone(), ["attended to", "token"]),
        };
        let weights = attentions[layer].get(0); // [heads, queries, keys]
        let n_heads = weights.size()[0];
        let kind = model.layers()[layer].variant().name();
        let maps: Vec<(String, String, Tensor)> = match args.heads.as_slice() {
            [] => vec![(
                format!("layer-{layer}"),
                format!("mean of {n_heads} heads"),
                weights.mean_dim([0i64].as_slice(), false, Kind::Float),
            )],
            heads => heads
                .iter()
                .map(|&head| {
                    let kept = &folder.config.layers[layer].kept_heads;
                    let place = kept.iter().position(|&it| it == head).expect("checked above");
                    (
                        format!("layer-{layer}-head-{head}"),
                        format!("head {head}"),
                        weights.get(place as i64),
                    )
                })
                .collect(),
        };
        for (file, which, values) in maps {
            let map = HeatMap {
                title: format!("Attention of layer {layer}"),
                subtitle: format!("{which}, {kind}"),
                x_label: words[0].into(),
                y_label: words[1].into(),
                value_label: "weight".into(),
                values: Vec::<Vec<f64>>::try_from(values.to_kind(Kind::Double))?,
                size: size(own.len(), columns.len()),
                rows: own.clone(),
                columns: columns.clone(),
                ..HeatMap::default()
            };
            let path = args.out.join(format!("{file}.png"));
            map.png(&path)?;
            writeln!(out, "{}", path.display())?;
        }
    }
    Ok(())
}

/// The tokens of one row.
pub(crate) fn names(tokenizer: &TextTokenizer, ids: &Tensor) -> Result<Vec<String>> {
    let ids = Vec::<i64>::try_from(ids.view([-1]))?;
    let name = |id: i64| u32::try_from(id).ok().and_then(|id| tokenizer.token(id));
    Ok(ids.into_iter().map(|id| name(id).unwrap_or_else(|| id.to_string())).collect())
}

/// Room for every name, within reason.
pub(crate) fn size(n_rows: usize, n_columns: usize) -> Size {
    let extent = |n: usize, around: u32, least: u32| (n as u32 * 24 + around).clamp(least, 2400);
    Size { width: extent(n_columns, 340, 640), height: extent(n_rows, 280, 480) }
}
