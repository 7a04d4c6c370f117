//! Our side of `scripts/bench_heads.sh`: prepares one section, prints a JSON line when ready, then does as many units of work as
//! each line of stdin asks for and prints a line when they are done. The script measures.
//!
//! ```text
//! bench_heads ablate|ablate_last|michel|layers|routed|retrieval MODEL THREADS
//! ```
//!
//! MODEL is a folder with a config.json; weights are random.

use std::{
    io::{self, BufRead, Write},
    ops::ControlFlow,
    path::Path,
    process::exit,
    time::Instant,
};

use attn_core::{
    Config, LoadOptions, Mask, Model, WantedHead,
    attention::Stream,
    checkpoint::read_json,
    layer::{AttnLayer, LayerPass, Tap},
};
use attn_data::batch::Encoded;
use attn_eval::{
    Answering, Batching, Head, Method, Replacement, RowLoss, Trial, ablate, all_heads, retrieval,
    score_heads,
};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Rows and tokens of a batch.
const SHAPE: [usize; 2] = [8, 64];

fn main() -> Result<()> {
    attn_torch::tune_allocator();
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [section, folder, threads] = args.as_slice() else {
        return Err(
            "usage: bench_heads ablate|ablate_last|michel|layers|routed|retrieval MODEL THREADS"
                .into(),
        );
    };
    tch::set_num_threads(threads.parse()?);
    let model = |head| -> Result<Model> {
        let config = Config::from_json(read_json(Path::new(folder), "config.json")?)?;
        Ok(Model::init(config, &LoadOptions { head, ..LoadOptions::default() })?)
    };
    let two = || WantedHead::NewClassifier(vec!["a".into(), "b".into()]);
    match section.as_str() {
        "ablate" => leave_out(&model(WantedHead::LanguageModel)?, &RowLoss::NextToken),
        "ablate_last" => leave_out(&model(two())?, &RowLoss::Label),
        "michel" => michel(&model(two())?),
        "retrieval" => retrieve(&model(WantedHead::LanguageModel)?),
        section @ ("layers" | "routed") => {
            let _no_grad = tch::no_grad_guard();
            let whole = model(WantedHead::LanguageModel)?;
            let n = if section == "layers" { SHAPE[1] as i64 } else { ROUTED_TOKENS };
            let size = [LAYER_ROWS, n, whole.config().sizes.hidden_size];
            let hidden = Tensor::randn(size, (Kind::Float, Device::Cpu));
            let cut = if section == "layers" { halved(&whole)? } else { routed(&whole, &hidden)? };
            layers(&whole, &hidden, &cut)
        }
        other => Err(format!("there is no section `{other}`").into()),
    }
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

fn rows(model: &Model) -> Vec<Encoded> {
    let vocab_size = model.config().sizes.vocab_size as usize;
    let [n_rows, n] = SHAPE;
    let id = |at: usize| ((at * 7919 + at * at * 31) % vocab_size) as u32;
    let row = |row: usize| Encoded {
        ids: (row * n..(row + 1) * n).map(id).collect(),
        label: Some((row % 2) as i64),
        index: row,
        second_from: None,
    };
    (0..n_rows).map(row).collect()
}

fn go_on(_: usize) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// A unit: every head left out in turn, on one batch.
fn leave_out(model: &Model, loss: &RowLoss<'_>) -> Result<()> {
    let rows = rows(model);
    let choices: Vec<Vec<Head>> = all_heads(model).into_iter().map(|head| vec![head]).collect();
    let mut answer = json!({ "choices": choices.len() });
    loop {
        for _ in 0..next_order(&answer) {
            let zero = Replacement::Zero;
            ablate(model, &rows, &choices, zero, loss, &Batching::default(), &mut go_on)?;
        }
        answer = json!({});
    }
}

/// A unit: the score of every head, on one batch.
fn michel(model: &Model) -> Result<()> {
    let rows = rows(model);
    let mut answer = json!({});
    loop {
        for _ in 0..next_order(&answer) {
            let loss = RowLoss::Label;
            score_heads(model, &rows, &[Method::Michel], &loss, &Batching::default(), &mut go_on)?;
        }
        answer = json!({});
    }
}

/// A unit: a document of 4,096 tokens read, 16 tokens written, and where every head looked for each of them.
fn retrieve(model: &Model) -> Result<()> {
    let vocab_size = model.config().sizes.vocab_size as usize;
    let trial = Trial {
        prompt: (0..4096_usize)
            .map(|at| ((at * 7919 + at * at * 31) % vocab_size) as u32)
            .collect(),
        needle: 2000..2020,
        told: std::iter::once(2010..2014).collect(),
        answer: "what was asked".into(),
    };
    let words = |ids: &[i64]| Ok(ids.iter().map(|id| format!("w{id} ")).collect());
    let answering = Answering { max_new_tokens: 16, stop_ids: &[], decode: &words };
    let mut answer = json!({});
    loop {
        for _ in 0..next_order(&answer) {
            retrieval(model, std::slice::from_ref(&trial), &answering, &mut go_on)?;
        }
        answer = json!({});
    }
}

/// Tokens of a text whose heads are chosen: of texts of 64 tokens that all choose differently nothing can be saved.
const ROUTED_TOKENS: i64 = 256;

/// Rows of [`layers`].
const LAYER_ROWS: i64 = 16;

/// Half of the heads removed.
fn halved(whole: &Model) -> Result<(Model, i64)> {
    let mut half = whole.alias()?;
    for (layer, it) in whole.layers().iter().enumerate() {
        let kept: Vec<i64> = (0..it.dims().n_heads).step_by(2).collect();
        half.select_heads(layer, &kept)?;
    }
    let flops = flops(&half, SHAPE[1] as i64);
    Ok((half, flops))
}

/// Heads chosen for whole texts, each text its own half, and the operations of those that run on `hidden`.
fn routed(whole: &Model, hidden: &Tensor) -> Result<(Model, i64)> {
    let mut routed = whole.alias()?;
    let by_text = serde_json::from_value(json!({"kind": "routed", "by": "text"}))?;
    let all: Vec<usize> = (0..whole.layers().len()).collect();
    routed.swap(&all, &by_text, 0)?;
    for (name, mut tensor) in routed.parameters() {
        if name.contains("router.weight") {
            let _ = tensor.normal_(0.0, 1.0);
        } else if name.contains("router.bias") {
            let _ = tensor.fill_(0.0); // where a gate closes
        }
    }
    let mask = Mask::new(false);
    let of_layer = |layer: &&AttnLayer| {
        let open = layer.kind().routes().expect("it was swapped").open(hidden, &mask).gt(0.0);
        let share = open.to_kind(Kind::Double).mean(Kind::Double).double_value(&[]);
        (layer.flops(ROUTED_TOKENS) as f64 * share) as i64
    };
    let flops = routed.layers().iter().map(of_layer).sum();
    Ok((routed, flops))
}

/// Operations of all attention layers on one row.
fn flops(model: &Model, n: i64) -> i64 {
    model.layers().iter().map(|layer| layer.flops(n)).sum()
}

/// A unit: every attention layer once, with all heads and with those of `cut`; the answer has the seconds of both.
fn layers(whole: &Model, hidden: &Tensor, (cut, flops_left): &(Model, i64)) -> Result<()> {
    let n = hidden.size()[1];
    let mask = Mask::new(whole.config().is_causal());
    let positions = Tensor::arange(n, (Kind::Int64, Device::Cpu)).repeat([LAYER_ROWS, 1]);
    let pass = |model: &Model| -> Result<f64> {
        let start = Instant::now();
        for layer in model.layers() {
            let mut pass = LayerPass {
                mask: &mask,
                positions: &positions,
                rotary: None,
                gate: None,
                fan: 1,
                train: false,
                stream: Stream::default(),
                source: None,
                state: None,
                at: None,
                tap: &mut Tap::default(),
            };
            let _ = layer.forward(hidden, &mut pass)?;
        }
        Ok(start.elapsed().as_secs_f64())
    };
    let mut answer = json!({ "flops": [flops(whole, n), flops_left] });
    loop {
        let (mut all, mut left) = (0.0, 0.0);
        let units = next_order(&answer);
        for _ in 0..units {
            all += pass(whole)?;
            left += pass(cut)?;
        }
        answer = json!({ "all_s": all / units as f64, "half_s": left / units as f64 });
    }
}
