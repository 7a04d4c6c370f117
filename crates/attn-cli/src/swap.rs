//! `attn swap`: another attention in the layers of a model, as a folder of its own.

use std::io::Write;

use anyhow::{Context, Result, bail, ensure};
use attn_core::{LoadOptions, Variant, checkpoint::WriteOptions};
use attn_data::hub::{Hub, progress_bar};
use attn_eval::n_parameters;
use tch::{Device, Kind};
use toml::{Table, Value};

use crate::{
    args::{SwapArgs, dtype_name},
    config::Written,
    memory::{self, Foreseen},
    monitor::grouped,
    save::{check_free, write},
    surgery::{describe, variants},
    texts::{Folder, load_model},
};

pub(crate) fn run(args: &SwapArgs, out: &mut dyn Write) -> Result<()> {
    let variant = variant(&args.attention, &args.set)?;
    check_free(&args.out)?;
    let hub = Hub::from_env().with_progress(progress_bar());
    let mut folder = Folder::open(&args.model, true, None, &hub)?;
    let n_layers = folder.config.layers.len();
    let layers = match &args.layers {
        None => (0..n_layers).collect(),
        Some(text) => layers(text, n_layers).context("cannot use `--layers`")?,
    };
    // What cannot be is refused before the weights are read.
    folder.config.set_attention(&layers, &variant)?;
    let dtype = Kind::from(args.dtype);
    let mut foreseen = Foreseen::model(&folder.config, Kind::Float, false)?;
    if dtype != Kind::Float {
        foreseen = foreseen.copied("the parameters as they are written", dtype, 1);
    }
    foreseen.check(Device::Cpu, memory::OF_CHANGING)?;
    let options = LoadOptions { device: Device::Cpu, seed: args.seed, ..LoadOptions::default() };
    let mut model = load_model(&folder.path, None, &options, &hub)
        .with_context(|| format!("cannot load the model `{}`", args.model))?;
    let before = n_parameters(&model);
    model.swap(&layers, &variant, args.seed)?;
    if dtype != model.kind() {
        model.to_kind(dtype);
    }
    write(&model, &folder.tokenizer, &args.out, &WriteOptions::default())?;
    let after = n_parameters(&model);
    let attention = describe(&variants(&model)).unwrap_or_else(|| "as plain transformers".into());
    writeln!(
        out,
        "{}: {} parameters in {}",
        args.out.display(),
        grouped(after),
        dtype_name(model.kind())
    )?;
    writeln!(out, "attention: {attention}")?;
    if after > before {
        writeln!(
            out,
            "{} parameters are new; `attn distill` trains them",
            grouped(after - before)
        )?;
    }
    Ok(())
}

/// The kind of that name with settings of the form `key=value`.
fn variant(kind: &str, settings: &[String]) -> Result<Variant> {
    let known: Vec<&str> = Variant::all().iter().map(Variant::name).collect();
    ensure!(
        known.contains(&kind),
        "`--attention` is `{kind}`, expected one of {}",
        known.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
    );
    let base = Table::from_iter([("kind".to_owned(), Value::String(kind.to_owned()))]);
    Written::of(base, settings)?
        .parse()
        .with_context(|| format!("cannot use the settings of `{kind}` (`attn list` shows them)"))
}

/// `0,3-5` as the layers 0, 3, 4 and 5.
pub(crate) fn layers(text: &str, n_layers: usize) -> Result<Vec<usize>> {
    let mut layers = Vec::new();
    for part in text.split(',').map(str::trim) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let [first, last] = [first, last].map(|number| number.trim().parse::<usize>());
        let (Ok(first), Ok(last)) = (first, last) else {
            bail!("`{part}` is no layer\nhint: write layers and runs of them: 0,3-5");
        };
        ensure!(first <= last, "`{part}` counts backwards");
        ensure!(
            last < n_layers,
            "there is no layer {last}: the model has {n_layers}, counted from 0"
        );
        layers.extend(first..=last);
    }
    layers.sort_unstable();
    layers.dedup();
    Ok(layers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_numbers_and_runs() {
        assert_eq!(layers("0,3-5", 6).unwrap(), [0, 3, 4, 5]);
        assert_eq!(layers(" 2 - 3, 2", 6).unwrap(), [2, 3]);
        for (text, problem) in
            [("6", "no layer 6"), ("3-1", "backwards"), ("a", "`a` is no layer"), ("", "no layer")]
        {
            assert!(layers(text, 6).unwrap_err().to_string().contains(problem), "{text}");
        }
    }

    #[test]
    fn settings_are_those_of_the_kind() {
        let window: Variant = serde_json::from_str(r#"{"kind": "window", "size": 4}"#).unwrap();
        assert_eq!(variant("window", &["size=4".into()]).unwrap(), window);
        let error = format!("{:#}", variant("window", &["sise=4".into()]).unwrap_err());
        assert!(error.contains("sise") && error.contains("did you mean `size`"), "{error}");
        let error = format!("{:#}", variant("window", &["size=0".into()]).unwrap_err());
        assert!(error.contains("`size` is 0, expected"), "{error}");
        assert!(variant("windo", &[]).unwrap_err().to_string().contains("`window`"));
    }
}
