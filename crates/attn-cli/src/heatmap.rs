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
use tch::{Device, Kind, Tensor};

use crate::{
    args::{HeatmapArgs, HeatmapMeasure},
    plot::{
        Figure,
        attention::{Attention, OfLayer, figure, maps},
        in_cell, layer_head,
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
        let path = self.args.out.join(measure.file("attention") + ".json");
        write_json(&path, &attention)?;
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
        let heads: Vec<Vec<usize>> = self
            .chosen
            .iter()
            .map(|&layer| {
                let kept = &self.folder.config.layers[layer].kept_heads;
                kept.iter().map(|&head| head as usize).collect()
            })
            .collect();
        let mut values = Vec::new();
        for &layer in &self.chosen {
            let found = entropy(&self.output.attentions[layer].get(0));
            values.push(Vec::<f64>::try_from(found.mean_dim(
                [-1i64].as_slice(),
                false,
                Kind::Double,
            ))?);
        }
        let map = layer_head(&heads, &values)?;
        let n_tokens = self.input.input_ids.size()[1];
        let note = |value: &f64| if value.is_nan() { String::new() } else { in_cell(*value) };
        let map = HeatMap {
            title: format!("Entropy of attention in {}", self.args.model),
            subtitle: format!(
                "mean over {n_tokens} tokens of one text; ln n for n tokens seen alike; none where coefficients are no distribution"
            ),
            value_label: "nats".into(),
            rows: self.chosen.iter().map(usize::to_string).collect(),
            notes: map.values.iter().map(|row| row.iter().map(note).collect()).collect(),
            ..map
        };
        self.save(&Figure::Heat(map), "entropy", out)
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
        let names: Vec<String> = {
            let mut names: Vec<String> = found.iter().flat_map(|it| it.1.names.clone()).collect();
            let mut seen = std::collections::HashSet::new();
            names.retain(|name| seen.insert(name.clone()));
            names
        };
        let (mut rows, mut values) = (Vec::new(), Vec::new());
        for (layer, it) in &found {
            for (head, of_head) in
                to_lists(&it.coefficients.unsqueeze(0))?.remove(0).into_iter().enumerate()
            {
                let place = |name: &String| it.names.iter().position(|own| own == name);
                let value =
                    |name: &String| place(name).map_or(f64::NAN, |at| f64::from(of_head[at]));
                rows.push(match it.coefficients.size()[0] {
                    1 => format!("layer {layer}"),
                    _ => format!("{layer}-{}", self.folder.config.layers[*layer].kept_heads[head]),
                });
                values.push(names.iter().map(value).collect::<Vec<f64>>());
            }
        }
        let note = |value: &f64| if value.is_nan() { String::new() } else { in_cell(*value) };
        let coefficients = HeatMap {
            title: format!("What each mask counts in {}", self.args.model),
            subtitle: "coefficients of the sum of masks; 0 leaves a mask out, 1 takes it whole"
                .into(),
            x_label: "mask".into(),
            value_label: "coefficient".into(),
            notes: values.iter().map(|row: &Vec<f64>| row.iter().map(note).collect()).collect(),
            columns: names,
            rows,
            values,
            range: Some((0.0, 1.0)),
            ..HeatMap::default()
        };
        self.save(&Figure::Heat(coefficients), "masks-coefficients", out)?;
        let places: Vec<String> = (0..n).map(|place| place.to_string()).collect();
        for (layer, it) in &found {
            for (head, mask) in to_lists(&it.mask)?.into_iter().enumerate() {
                let (which, file) = match it.mask.size()[0] {
                    1 => (String::new(), format!("masks-layer-{layer}")),
                    _ => {
                        let head = self.folder.config.layers[*layer].kept_heads[head];
                        (format!(", head {head}"), format!("masks-layer-{layer}-head-{head}"))
                    }
                };
                let map = HeatMap {
                    title: format!("The mask of layer {layer}{which}"),
                    subtitle: "the sum of masks before the model's own is applied (a causal one sees no future)".into(),
                    x_label: "attended to".into(),
                    y_label: "position".into(),
                    value_label: "M".into(),
                    rows: places.clone(),
                    columns: places.clone(),
                    values: mask.iter().map(|row| row.iter().map(|&it| it.into()).collect()).collect(),
                    ..HeatMap::default()
                };
                self.save(&Figure::Heat(map), &file, out)?;
            }
        }
        Ok(())
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
    let name = |id: i64| u32::try_from(id).ok().and_then(|id| tokenizer.token(id));
    Ok(ids.into_iter().map(|id| name(id).unwrap_or_else(|| id.to_string())).collect())
}
