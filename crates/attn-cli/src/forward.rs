//! `attn forward`: one pass over given token ids.

use std::{collections::BTreeMap, fs, path::Path};

use anyhow::{Context, Result, bail, ensure};
use attn_core::{
    Config, ForwardOptions, Gate, LoadOptions, Model, ModelInput, Output, Rows,
    checkpoint::{read_json, write_tensors},
    config::Head,
};
use attn_data::hub::{Hub, progress_bar};
use serde_json::{Map, Value};
use tch::{Device, Kind, Tensor};

use crate::{
    args::{ForwardArgs, dtype_name},
    attention_table,
    memory::{self, Foreseen},
    origin::Origin,
    run_dir::check_writable,
    texts::{find_folder, load_model},
};

/// The rows of a JSON matrix, all of one length.
type Matrix = Vec<Vec<i64>>;

pub(crate) fn run(args: &ForwardArgs) -> Result<()> {
    // What the user wrote is checked before the model is loaded, which may take minutes.
    let _made = check_writable(&args.out)?;
    let _made_too = args.attention_table.as_deref().map(check_writable).transpose()?;
    let input = read_ids(&args.input_ids)?;
    let mask = args.head_mask.as_deref().map(read_mask).transpose()?;
    let device = args.compute.device()?;
    foresee(args, &input, device)?;
    let model = load(args, device)?;
    let gates = match mask {
        Some((path, mask)) => gates(&model, path, &mask)?,
        None => Vec::new(),
    };
    let options = ForwardOptions {
        positions: args.positions.into(),
        gates: &gates,
        hidden_states: args.hidden_states,
        attentions: match args.attentions || args.attention_table.is_some() {
            true => Rows::All,
            false => Rows::None,
        },
        ..ForwardOptions::default()
    };
    let _no_grad = tch::no_grad_guard();
    let mut output = model.forward(&input, &options).with_context(|| {
        format!("cannot run `{}` on `{}`", args.model, args.input_ids.display())
    })?;
    for (attention, layer) in output.attentions.iter_mut().zip(&model.config().layers) {
        let places: Vec<i64> =
            layer.places_by_number().into_iter().map(|place| place as i64).collect();
        if !places.is_sorted() {
            let places = Tensor::from_slice(&places).to_device(attention.device());
            *attention = attention.index_select(1, &places);
        }
    }
    let wide = |tensor: &Tensor| tensor.to_device(Device::Cpu).to_kind(Kind::Float);
    if let Some(path) = &args.attention_table {
        let layers: Vec<Tensor> = output.attentions.iter().map(wide).collect();
        attention_table::write(path, args, &input, &layers)?;
    }
    if !args.attentions {
        output.attentions.clear();
    }
    let tensors = named(output);
    let mut metadata = BTreeMap::from(Origin::now()?.as_metadata());
    metadata.insert("model".into(), args.model.clone());
    metadata.insert("computed_in".into(), dtype_name(args.compute.dtype.into()).into());
    write_tensors(&args.out, &tensors, &metadata)?;
    for (name, tensor) in &tensors {
        tracing::debug!("{name} {:?}", tensor.size());
    }
    tracing::info!(
        "wrote {} {} to `{}`",
        tensors.len(),
        if tensors.len() == 1 { "tensor" } else { "tensors" },
        args.out.display()
    );
    Ok(())
}

/// What the pass will hold, where the model is at hand: what is wrong with it is said as it is loaded.
fn foresee(args: &ForwardArgs, input: &ModelInput, device: Device) -> Result<()> {
    let hub = Hub::from_env();
    let Ok(folder) = find_folder(&args.model, args.compute.init.is_none(), None, &hub) else {
        return Ok(());
    };
    let Ok(config) = read_json(&folder, "config.json")
        .map_err(anyhow::Error::from)
        .and_then(|it| Ok(Config::from_json(it)?))
    else {
        return Ok(());
    };
    let [rows, len] = input.input_ids.size()[..] else { return Ok(()) };
    let extent = (rows as u64, len as u64);
    let mut foreseen = Foreseen::computing(&config, &args.compute)?.pass(extent);
    if config.head == Head::LanguageModel {
        foreseen = foreseen.logits(extent.0 * extent.1, 2);
    }
    if args.attentions || args.attention_table.is_some() {
        foreseen = foreseen.attention(extent, 3);
    }
    if args.hidden_states {
        foreseen = foreseen.inputs(extent);
    }
    foreseen.check(device, memory::OF_ONE_TEXT)
}

fn load(args: &ForwardArgs, device: Device) -> Result<Model> {
    let hub = Hub::from_env().with_progress(progress_bar());
    let options = LoadOptions {
        kind: args.compute.dtype.into(),
        device,
        seed: args.seed,
        ..LoadOptions::default()
    };
    let load = || {
        let folder = find_folder(&args.model, args.compute.init.is_none(), None, &hub)?;
        load_model(&folder, args.compute.init, &options, &hub)
    };
    load().with_context(|| format!("cannot load the model `{}`", args.model))
}

fn named(output: Output) -> Vec<(String, Tensor)> {
    let wide = |tensor: Tensor| tensor.to_device(Device::Cpu).to_kind(Kind::Float);
    let mut tensors = vec![("logits".to_owned(), wide(output.logits))];
    let numbered = |name: &str, tensors: Vec<Tensor>| -> Vec<(String, Tensor)> {
        (0..)
            .zip(tensors)
            .map(|(i, tensor): (usize, _)| (format!("{name}.{i}"), wide(tensor)))
            .collect()
    };
    tensors.extend(numbered("attentions", output.attentions));
    tensors.extend(numbered("hidden_states", output.hidden_states));
    tensors
}

pub(crate) fn read_ids(path: &Path) -> Result<ModelInput> {
    const FIELDS: [&str; 5] =
        ["input_ids", "attention_mask", "position_ids", "token_type_ids", "source"];
    let object = read_object(path, &FIELDS)?;
    let input = ids_of(&object, path)?;
    match object.get("source") {
        None | Some(Value::Null) => Ok(input),
        Some(Value::Object(source)) => {
            let known = &FIELDS[..4];
            if let Some(field) = source.keys().find(|field| !known.contains(&field.as_str())) {
                bail!(
                    "`{}`: unknown field `source.{field}`, expected {}",
                    path.display(),
                    quoted(known)
                );
            }
            let source = ids_of(source, path).context("`source` cannot be read")?;
            Ok(input.attending_to(source))
        }
        Some(value) => bail!(
            "`{}`: `source` is {}, expected an object with {}",
            path.display(),
            kind_of(value),
            quoted(&FIELDS[..4])
        ),
    }
}

/// The sequence that `object` holds.
fn ids_of(object: &Map<String, Value>, path: &Path) -> Result<ModelInput> {
    let shown = path.display();
    let get = |field: &str, range: Range| -> Result<Option<Matrix>> {
        match object.get(field) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => matrix(value, field, range)
                .map(Some)
                .with_context(|| format!("cannot use `{shown}`")),
        }
    };
    let Some(ids) = get("input_ids", Range::FromZero)? else {
        bail!(
            "`{shown}` has no `input_ids`\nhint: write {{\"input_ids\": [[5, 6, 7]]}}, one list a row"
        );
    };
    let (rows, cols) = (ids.len(), ids[0].len());
    let other = |field: &str, range: Range| -> Result<Option<Tensor>> {
        let Some(values) = get(field, range)? else { return Ok(None) };
        ensure!(
            (values.len(), values[0].len()) == (rows, cols),
            "`{shown}`: `{field}` is {} x {}, expected {rows} x {cols} as `input_ids`",
            values.len(),
            values[0].len()
        );
        Ok(Some(tensor(&values)))
    };
    Ok(ModelInput {
        attention_mask: other("attention_mask", Range::ZeroOrOne)?,
        position_ids: other("position_ids", Range::FromZero)?,
        token_type_ids: other("token_type_ids", Range::FromZero)?,
        ..ModelInput::new(tensor(&ids))
    })
}

pub(crate) fn read_mask(path: &Path) -> Result<(&Path, Vec<Vec<i64>>)> {
    let object = read_object(path, &["mask"])?;
    let shown = path.display();
    let Some(value) = object.get("mask") else {
        bail!(
            "`{shown}` has no `mask`\nhint: write {{\"mask\": [[1, 0], [1, 1]]}}, layers x heads, 1 keeps"
        );
    };
    // Layers may have different numbers of heads.
    let mask =
        rows(value, "mask", Range::ZeroOrOne).with_context(|| format!("cannot use `{shown}`"))?;
    Ok((path, mask))
}

fn gates(model: &Model, path: &Path, mask: &[Vec<i64>]) -> Result<Vec<Option<Gate>>> {
    let shown = path.display();
    let layers = model.layers();
    ensure!(
        mask.len() == layers.len(),
        "`{shown}`: `mask` has {} rows, expected {}, one a layer",
        mask.len(),
        layers.len()
    );
    let gate = |(layer, row): (usize, &Vec<i64>)| {
        let n_heads = layers[layer].dims().n_heads;
        ensure!(
            row.len() as i64 == n_heads,
            "`{shown}`: `mask[{layer}]` has {} values, expected {n_heads}, one a head of layer {layer}",
            row.len()
        );
        let mut by_place = row.clone();
        for (&value, place) in row.iter().zip(layers[layer].spec().places_by_number()) {
            by_place[place] = value;
        }
        let heads = Tensor::from_slice(&by_place).to_kind(model.kind()).to_device(model.device());
        Ok(Some(Gate::per_head(&heads)))
    };
    mask.iter().enumerate().map(gate).collect()
}

fn read_object(path: &Path, known: &[&str]) -> Result<Map<String, Value>> {
    let shown = path.display();
    let text = fs::read_to_string(path).with_context(|| format!("cannot read `{shown}`"))?;
    let value: Value =
        serde_json::from_str(&text).with_context(|| format!("`{shown}` is not JSON"))?;
    let Value::Object(object) = value else {
        bail!("`{shown}` holds {}, expected an object with {}", kind_of(&value), quoted(known));
    };
    if let Some(field) = object.keys().find(|field| !known.contains(&field.as_str())) {
        bail!("`{shown}`: unknown field `{field}`, expected {}", quoted(known));
    }
    Ok(object)
}

fn quoted(fields: &[&str]) -> String {
    fields.iter().map(|field| format!("`{field}`")).collect::<Vec<_>>().join(", ")
}

/// The numbers that a field may hold.
#[derive(Clone, Copy)]
enum Range {
    FromZero,
    ZeroOrOne,
}

fn matrix(value: &Value, field: &str, range: Range) -> Result<Matrix> {
    let rows = rows(value, field, range)?;
    let cols = rows[0].len();
    if let Some((row, values)) = rows.iter().enumerate().find(|(_, row)| row.len() != cols) {
        bail!(
            "`{field}` has rows of different lengths: {cols} in row 0, {} in row {row}\nhint: pad the shorter rows \
             with any token, and give an `attention_mask` that is 1 at real tokens and 0 at padding",
            values.len()
        );
    }
    ensure!(cols > 0, "`{field}[0]` is empty, expected at least one number");
    Ok(rows)
}

fn rows(value: &Value, field: &str, range: Range) -> Result<Vec<Vec<i64>>> {
    let Value::Array(rows) = value else {
        bail!("`{field}` is {}, expected a list of lists of whole numbers", kind_of(value));
    };
    ensure!(!rows.is_empty(), "`{field}` is empty, expected at least one row");
    let row = |(i, row): (usize, &Value)| -> Result<Vec<i64>> {
        let Value::Array(values) = row else {
            bail!(
                "`{field}[{i}]` is {}, expected a list of whole numbers\nhint: one sequence is a list in a list: \
                 [[5, 6, 7]]",
                kind_of(row)
            );
        };
        let number = |(j, value): (usize, &Value)| match (value.as_i64(), range) {
            (Some(number @ 0..), Range::FromZero) => Ok(number),
            (Some(number @ (0 | 1)), Range::ZeroOrOne) => Ok(number),
            _ => {
                let expected = match range {
                    Range::FromZero => "a whole number from 0",
                    Range::ZeroOrOne => "0 or 1",
                };
                bail!("`{field}[{i}][{j}]` is {}, expected {expected}", kind_of(value))
            }
        };
        values.iter().enumerate().map(number).collect()
    };
    rows.iter().enumerate().map(row).collect()
}

/// A JSON value in a few words.
fn kind_of(value: &Value) -> String {
    match value {
        Value::Null => "null".into(),
        Value::Array(_) => "a list".into(),
        Value::Object(_) => "an object".into(),
        Value::String(text) => format!("the text {:?}", text.chars().take(40).collect::<String>()),
        Value::Bool(_) | Value::Number(_) => value.to_string(),
    }
}

fn tensor(rows: &Matrix) -> Tensor {
    Tensor::from_slice(&rows.concat()).view([rows.len() as i64, -1])
}
