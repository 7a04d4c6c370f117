//! Our side of `scripts/bench_gqa.sh`.
//!
//! ```text
//! bench_gqa make CONFIG-FOLDER OUT N     a model of random weights with N key/value heads a layer, as an ordinary folder
//! bench_gqa decode FOLDER THREADS TOKENS reads a context of 8 rows of TOKENS, prints a JSON line, then writes as many tokens as each line
//!                                        of stdin asks for
//! ```

use std::{
    io::{self, BufRead, Write},
    path::Path,
    process::exit,
};

use attn_core::{
    Config, ForwardOptions, LoadOptions, Merge, Model, ModelInput,
    checkpoint::{WriteOptions, read_json},
    merge_kv,
};
use serde_json::{Value, json};
use tch::{Kind, Tensor};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Rows of the context.
const ROWS: i64 = 8;

/// Tokens of the context that share a pass.
const CHUNK: i64 = 512;

fn main() -> Result<()> {
    attn_torch::tune_allocator();
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[..] {
        ["make", folder, out, n] => make(Path::new(folder), Path::new(out), n.parse()?),
        ["decode", folder, threads, n_tokens] => {
            tch::set_num_threads(threads.parse()?);
            decode(Path::new(folder), n_tokens.parse()?)
        }
        _ => Err("usage: bench_gqa make CONFIG-FOLDER OUT N | decode FOLDER THREADS TOKENS".into()),
    }
}

fn make(folder: &Path, out: &Path, n: i64) -> Result<()> {
    let config = Config::from_json(read_json(folder, "config.json")?)?;
    let mut model = Model::init(config, &LoadOptions::default())?;
    let wanted: Vec<(usize, i64)> = (0..model.layers().len()).map(|layer| (layer, n)).collect();
    merge_kv(&mut model, &wanted, Merge::Mean, None)?;
    Ok(model.save(out, &WriteOptions::default())?)
}

fn decode(folder: &Path, n: i64) -> Result<()> {
    let (model, _) = Model::load(folder, &LoadOptions::default())?;
    let _no_grad = tch::no_grad_guard();
    let vocab_size = model.config().sizes.vocab_size;
    let rows = ROWS;
    let ids = Tensor::arange(rows * n, (Kind::Int64, model.device())).remainder(vocab_size - 7);
    let ids = ids.view([rows, n]);
    let last = |len: i64| {
        Tensor::arange_start_step(len - 1, rows * len, len, (Kind::Int64, model.device()))
    };
    let mut state = model.start();
    let step = |ids: &Tensor, state: &mut _| -> Result<Tensor> {
        let at = last(ids.size()[1]);
        let options = ForwardOptions { logits_at: Some(&at), ..ForwardOptions::default() };
        let logits = model.step(&ModelInput::new(ids.shallow_clone()), state, &options)?.logits;
        Ok(logits.argmax(-1, true)) // [rows, 1]
    };
    let mut next = ids.narrow(1, 0, 1);
    for at in (0..n).step_by(CHUNK as usize) {
        next = step(&ids.narrow(1, at, CHUNK.min(n - at)), &mut state)?;
    }
    let weights: usize = model.parameters().iter().map(|(_, x)| x.numel() * 4).sum();
    let cache: i64 =
        model.layers().iter().map(|it| it.dims()).map(|it| 8 * it.n_kv_heads * it.head_dim).sum();
    let mut answer =
        json!({ "weight_bytes": weights, "cache_bytes": cache * rows * n, "first": first(&next) });
    loop {
        for _ in 0..next_order(&answer) {
            next = step(&next, &mut state)?;
        }
        answer = json!({ "last": first(&next) });
    }
}

fn first(ids: &Tensor) -> i64 {
    ids.int64_value(&[0, 0])
}

/// Prints a line and waits for the next order; ends the process where there is none.
fn next_order(answer: &Value) -> usize {
    let mut out = io::stdout();
    let mut line = String::new();
    let told = writeln!(out, "{answer}").and_then(|()| out.flush());
    let read = told.and_then(|()| io::stdin().lock().read_line(&mut line));
    match (read, line.trim().parse()) {
        (Ok(1..), Ok(units)) => units,
        _ => exit(0),
    }
}
