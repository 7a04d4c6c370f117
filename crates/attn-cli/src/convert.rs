//! `attn convert`: fewer key/value heads in the layers of a model, or more, as a folder of its own.

use std::io::Write;

use anyhow::{Context, Result, ensure};
use attn_core::{LoadOptions, Model, Pooling, checkpoint::WriteOptions, pool_kv};
use attn_data::hub::{Hub, progress_bar};
use attn_eval::n_parameters;
use serde::Serialize;
use tch::{Device, Kind};

use crate::{
    args::{ConvertArgs, PoolBy, dtype_name},
    monitor::grouped,
    run_dir::SCHEMA,
    save::{check_free, write_with},
    swap::layers,
    texts::{Folder, load_model},
};

/// The file in the folder that says what was made of what.
const FILE: &str = "conversion.json";

/// conversion.json.
#[derive(Serialize)]
struct Report {
    schema: u32,
    attn: &'static str,
    model: String,
    method: Pooling,
    /// Layers that were changed.
    layers: Vec<usize>,
    kv_heads_before: Vec<i64>,
    kv_heads_after: Vec<i64>,
    parameters_before: usize,
    parameters_after: usize,
    /// Keys and values of one token in all layers, in `cache_dtype`.
    cache_bytes_per_token_before: i64,
    cache_bytes_per_token_after: i64,
    cache_dtype: &'static str,
    /// Whether transformers loads the folder.
    loads_in_transformers: bool,
}

pub(crate) fn run(args: &ConvertArgs, out: &mut dyn Write) -> Result<()> {
    check_free(&args.out)?;
    let hub = Hub::from_env().with_progress(progress_bar());
    let folder = Folder::open(&args.model, true, None, &hub)?;
    let n_layers = folder.config.layers.len();
    let layers = match &args.layers {
        None => (0..n_layers).collect(),
        Some(text) => layers(text, n_layers).context("cannot use `--layers`")?,
    };
    let n_kv = i64::from(args.kv_heads.get());
    let method = match args.method {
        PoolBy::First => Pooling::First,
        PoolBy::Random => Pooling::Random { seed: args.seed },
        PoolBy::Mean => Pooling::Mean,
    };
    let kv =
        |of: &Model| -> Vec<i64> { of.layers().iter().map(|it| it.dims().n_kv_heads).collect() };
    ensure!(
        layers.iter().any(|&layer| folder.config.layers[layer].n_kv_heads != n_kv),
        "`--kv-heads` is {n_kv}, and the layers have as many: nothing would change"
    );
    let options = LoadOptions { device: Device::Cpu, ..LoadOptions::default() };
    let whole = load_model(&folder.path, None, &options, &hub)
        .with_context(|| format!("cannot load the model `{}`", args.model))?;
    let mut model = whole.alias()?;
    pool_kv(&mut model, &layers, n_kv, method).context("cannot use `--kv-heads`")?;
    let dtype = Kind::from(args.dtype);
    if dtype != model.kind() {
        model.own(&|_| true);
        model.to_kind(dtype);
    }
    let report = Report {
        schema: SCHEMA,
        attn: env!("CARGO_PKG_VERSION"),
        model: args.model.clone(),
        method,
        layers,
        kv_heads_before: kv(&whole),
        kv_heads_after: kv(&model),
        parameters_before: n_parameters(&whole),
        parameters_after: n_parameters(&model),
        cache_bytes_per_token_before: cache_bytes(&whole, dtype),
        cache_bytes_per_token_after: cache_bytes(&model, dtype),
        cache_dtype: dtype_name(dtype),
        loads_in_transformers: model.config().is_plain(),
    };
    let extra = serde_json::to_vec_pretty(&report).context("cannot write JSON")?;
    write_with(&model, &folder.tokenizer, &args.out, &WriteOptions::default(), &[(FILE, extra)])?;
    print(&report, args, out)
}

/// Bytes of the keys and values of one token.
fn cache_bytes(model: &Model, kind: Kind) -> i64 {
    let values = |dims: &attn_core::attention::Dims| 2 * dims.n_kv_heads * dims.head_dim;
    let all: i64 = model.layers().iter().map(|it| values(it.dims())).sum();
    all * kind.elt_size_in_bytes() as i64
}

fn print(report: &Report, args: &ConvertArgs, out: &mut dyn Write) -> Result<()> {
    writeln!(
        out,
        "{}: {} parameters in {}",
        args.out.display(),
        grouped(report.parameters_after),
        report.cache_dtype
    )?;
    writeln!(
        out,
        "key/value heads by layer: {:?}, before {:?}",
        report.kv_heads_after, report.kv_heads_before
    )?;
    writeln!(
        out,
        "keys and values: {} bytes a token, before {}",
        grouped(report.cache_bytes_per_token_after as usize),
        grouped(report.cache_bytes_per_token_before as usize)
    )?;
    writeln!(
        out,
        "{}",
        match report.loads_in_transformers {
            true => "transformers loads the folder, with the same logits",
            false => "transformers has no words for these layers and refuses the folder",
        }
    )?;
    Ok(())
}
