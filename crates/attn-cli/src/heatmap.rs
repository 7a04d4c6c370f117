//! `attn heatmap`: pictures of who attends to whom in one text, or in two.

use std::{fs, io::Write};

use anyhow::{Context, Result, ensure};
use attn_core::{
    ForwardOptions, LoadOptions, Model, ModelInput, Output, Rows, attention::Combination,
    layer::AttnLayer,
};
use attn_data::{
    batch::{Side, collate},
    dataset::Example,
    hub::{Hub, progress_bar},
    tokenizer::TextTokenizer,
};
use attn_eval::{entropy, norms, rollout};
use attn_train::Batch;
use attn_viz::HeatMap;
use serde::Serialize;
use tch::{Device, Kind, Tensor};

use crate::{
    args::{HeatmapArgs, HeatmapMeasure},
    memory::{self, Foreseen},
    origin::Recorded,
    plot::{
        self, Figure,
        attention::{Attention, OfLayer, figure, maps},
        entropy::Entropy,
        masks::{self, Masks},
    },
    run_dir::{SCHEMA, write_json},
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

    let extent = (1, batch.rows.cols.max(1) as u64);
    // Attention of all layers, and what is drawn of it once more, in 64 bits and as text.
    Foreseen::model(&folder.config, Kind::Float, false)?
        .pass(extent)
        .attention(extent, 6)
        .check(Device::Cpu, memory::OF_ONE_TEXT)?;
    let options = LoadOptions { device: Device::Cpu, ..LoadOptions::default() };
    let model = load_model(&folder.path, None, &options, &hub)
        .with_context(|| format!("cannot load the model `{}`", args.model))?;
    let input = batch.input(&model);
    let options = ForwardOptions {
        attentions: Rows::All,
        attention_inputs: args.measure == HeatmapMeasure::Norm,
        ..ForwardOptions::default()
    };
    let output = tch::no_grad(|| model.forward(&input, &options))?;
    fs::create_dir_all(&args.out)
        .with_context(|| format!("cannot make `{}`", args.out.display()))?;
    let drawing = Drawing { args, folder: &folder, model: &model, input: &input, output, chosen };
    match args.measure {
        HeatmapMeasure::Weights | HeatmapMeasure::Norm | HeatmapMeasure::Rollout => {
            drawing.by_token(out)
        }
        HeatmapMeasure::Entropy => drawing.entropy(out),
        HeatmapMeasure::Masks => drawing.masks(out),
    }
}

/// What pictures are made of.
struct Drawing<'a> {
    args: &'a HeatmapArgs,
    folder: &'a Folder,
    model: &'a Model,
    input: &'a ModelInput,
    output: Output,
    chosen: Vec<usize>,
}

impl Drawing<'_> {
    fn layer(&self, layer: usize) -> &AttnLayer {
        self.model.layers()[layer]
    }

    fn save(&self, figure: &Figure, name: &str, out: &mut dyn Write) -> Result<()> {
        let extension = if self.args.svg { "svg" } else { "png" };
        let path = self.args.out.join(format!("{name}.{extension}"));
        figure.on(self.args.theme.into()).save(&path)?;
        writeln!(out, "{}", path.display())?;
        Ok(())
    }

    /// Pictures with a token a row, and all of their numbers as a result file.
    fn by_token(&self, out: &mut dyn Write) -> Result<()> {
        let measure = self.args.measure;
        let own = names(&self.folder.tokenizer, &self.input.input_ids)?;
        let source = self.input.source.as_ref();
        let source = source.map(|it| names(&self.folder.tokenizer, &it.input_ids)).transpose()?;
        let needs_source: Vec<bool> =
            self.model.layers().iter().map(|layer| layer.kind().needs_source()).collect();
        if measure != HeatmapMeasure::Weights
            && let Some(&layer) = self.chosen.iter().find(|&&layer| needs_source[layer])
        {
            anyhow::bail!(
                "layer {layer} attends to another text, and `--measure {}` is told of attention within one\nhint: leave it out \
                 with --layers, or draw --measure weights",
                measure.name()
            );
        }
        let rolled = match measure {
            HeatmapMeasure::Rollout => {
                ensure!(
                    !needs_source.contains(&true),
                    "some layers attend to another text, and a rollout goes through all of them"
                );
                let layers = self.model.layers();
                let weights: Vec<(&str, Tensor)> = layers
                    .iter()
                    .zip(&self.output.attentions)
                    .map(|(layer, it)| (layer.variant().name(), it.get(0)))
                    .collect();
                rollout(&weights).context("cannot draw `--measure rollout`")?
            }
            _ => Vec::new(),
        };
        let mut layers = Vec::new();
        for &layer in &self.chosen {
            let of = self.layer(layer);
            let weights = self.output.attentions[layer].get(0); // [heads, queries, keys]
            let columns = match &source {
                Some(source) if needs_source[layer] => source.clone(),
                _ => own.clone(),
            };
            let (heads, values) = match measure {
                HeatmapMeasure::Rollout => (vec!["mean".to_owned()], rolled[layer].unsqueeze(0)),
                HeatmapMeasure::Norm => {
                    let inputs = self.output.attention_inputs[layer].get(0);
                    let lengths = tch::no_grad(|| norms(layer, of, &weights, &inputs));
                    self.heads(layer, &lengths.context("cannot draw `--measure norm`")?)
                }
                _ => self.heads(layer, &weights),
            };
            layers.push(OfLayer {
                layer,
                kind: of.variant().name().to_owned(),
                note: self.note(layer, &weights),
                rows: own.clone(),
                columns,
                heads,
                weights: to_lists(&values)?,
            });
        }
        let attention = Attention {
            schema: SCHEMA,
            model: self.args.model.clone(),
            measure: measure.title().into(),
            unit: measure.unit().into(),
            layers,
        };
        if self.args.grid {
            self.save(&figure(&attention), measure.file("grid").as_str(), out)?;
        } else {
            let mut all = maps(&attention).into_iter();
            for of in &attention.layers {
                for head in &of.heads {
                    let name = match head.as_str() {
                        "mean" => format!("layer-{}", of.layer),
                        head => format!("layer-{}-head-{head}", of.layer),
                    };
                    let map = all.next().expect("a map a head");
                    let map = match (&source, needs_source[of.layer]) {
                        (Some(_), true) => HeatMap {
                            x_label: "attended to, in the first text".into(),
                            y_label: "token of the second text".into(),
                            ..map
                        },
                        _ => map,
                    };
                    self.save(&Figure::Heat(map), &measure.file(&name), out)?;
                }
            }
        }
        self.keep(&measure.file("attention"), &attention)
    }

    /// Writes the numbers of the pictures, from which `attn plot` draws them again.
    fn keep(&self, name: &str, numbers: &impl Serialize) -> Result<()> {
        let path = self.args.out.join(format!("{name}.json"));
        write_json(&path, &Recorded::now(numbers)?)?;
        tracing::info!("wrote `{}`", path.display());
        Ok(())
    }

    /// The heads that were asked for, or their mean.
    fn heads(&self, layer: usize, values: &Tensor) -> (Vec<String>, Tensor) {
        let kept = &self.folder.config.layers[layer].kept_heads;
        let heads: &[i64] = match (&self.args.heads[..], self.args.grid) {
            ([], true) => kept,
            (heads, _) => heads,
        };
        if heads.is_empty() {
            let mean = values.mean_dim([0i64].as_slice(), true, Kind::Float);
            return (vec!["mean".into()], mean);
        }
        let place =
            |head: &i64| kept.iter().position(|it| it == head).expect("checked before") as i64;
        let places: Vec<i64> = heads.iter().map(place).collect();
        let chosen = values.index_select(0, &Tensor::from_slice(&places));
        (heads.iter().map(i64::to_string).collect(), chosen)
    }

    /// What is to be said of numbers that are no distribution.
    fn note(&self, layer: usize, weights: &Tensor) -> Option<String> {
        let sums = weights.sum_dim_intlist([-1i64].as_slice(), false, Kind::Double);
        let apart = (&sums - 1.0).abs().max().double_value(&[]);
        let lowest = weights.min().double_value(&[]);
        (apart > 1e-3 || lowest < 0.0).then(|| {
            format!(
                "coefficients of the values, which need not sum to 1 (rows of layer {layer} sum to {:.3} to {:.3})",
                sums.min().double_value(&[]),
                sums.max().double_value(&[])
            )
        })
    }

    /// A map of layers and heads.
    fn entropy(&self, out: &mut dyn Write) -> Result<()> {
        let of_layer = |layer: &usize| {
            let kept = &self.folder.config.layers[*layer].kept_heads;
            kept.iter().map(|&head| head as usize).collect()
        };
        let mut values = Vec::new();
        for &layer in &self.chosen {
            let found = entropy(&self.output.attentions[layer].get(0));
            let mean = found.mean_dim([-1i64].as_slice(), false, Kind::Double);
            values.push(Vec::<f64>::try_from(mean)?);
        }
        let found = Entropy {
            schema: SCHEMA,
            model: self.args.model.clone(),
            n_tokens: self.input.input_ids.size()[1],
            layers: self.chosen.clone(),
            heads: self.chosen.iter().map(of_layer).collect(),
            entropy: values,
        };
        self.save(&plot::entropy::figure(&found)?, "entropy", out)?;
        self.keep("entropy", &found)
    }

    /// The coefficients of each layer that adds up masks, and what they make.
    fn masks(&self, out: &mut dyn Write) -> Result<()> {
        let n = self.input.input_ids.size()[1];
        let found: Vec<(usize, Combination)> = self
            .chosen
            .iter()
            .filter_map(|&layer| Some((layer, self.layer(layer).kind().combination(n)?)))
            .collect();
        ensure!(
            !found.is_empty(),
            "no layer of `{}` adds up masks\nhint: attn swap --attention mask_mixture makes such a model",
            self.args.model
        );
        let of_layer = |(layer, it): &(usize, Combination)| -> Result<masks::OfLayer> {
            let is_of_heads = it.coefficients.size()[0] > 1;
            let heads = &self.folder.config.layers[*layer].kept_heads;
            Ok(masks::OfLayer {
                layer: *layer,
                heads: if is_of_heads { heads.clone() } else { Vec::new() },
                names: it.names.clone(),
                coefficients: to_lists(&it.coefficients.unsqueeze(0))?.remove(0),
                masks: to_lists(&it.mask)?,
            })
        };
        let found = Masks {
            schema: SCHEMA,
            model: self.args.model.clone(),
            layers: found.iter().map(of_layer).collect::<Result<_>>()?,
        };
        for drawn in masks::draw(&found)? {
            self.save(&drawn.figure, &format!("masks-{}", drawn.name), out)?;
        }
        self.keep("masks", &found)
    }
}

/// `[maps][rows][columns]`.
fn to_lists(values: &Tensor) -> Result<Vec<Vec<Vec<f32>>>> {
    let values = values.to_kind(Kind::Float).contiguous();
    (0..values.size()[0]).map(|map| Ok(Vec::try_from(values.get(map))?)).collect()
}

/// The tokens of one row.
pub(crate) fn names(tokenizer: &TextTokenizer, ids: &Tensor) -> Result<Vec<String>> {
    let ids = Vec::<i64>::try_from(ids.view([-1]))?;
    let name = |id: i64| u32::try_from(id).ok().and_then(|id| tokenizer.shown(id));
    Ok(ids.into_iter().map(|id| name(id).unwrap_or_else(|| id.to_string())).collect())
}
