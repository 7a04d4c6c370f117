//! Our side of `scripts/bench_finetune.sh`: prepares one section, prints a JSON line when ready, then does as many units
//! of work as each line of stdin asks for and prints a line when they are done. The script measures.
//!
//! ```text
//! bench train|distill|generate|sst2 MODEL THREADS [f32|bf16] [BATCHES]
//! bench kl MODEL THREADS TEXT-FILE
//! ```
//!
//! `BENCH_DEVICE` names the device, as `--device` of `attn` does; the CPU where it is not set.

use std::{
    cell::RefCell,
    fs,
    io::{self, BufRead, Write},
    ops::ControlFlow,
    path::Path,
    process::exit,
    time::Instant,
};

use attn_core::{
    Config, ForwardOptions, LoadOptions, Model, ModelInput, WantedHead,
    checkpoint::read_json,
    generate::{Limits, Sampling, generate},
};
use attn_data::{
    batch::{Encoded, Side, collate},
    dataset::{self, DatasetSpec, Example},
    hub::{Hub, resolve_config},
    tokenizer::{EncodeOptions, Input, TextTokenizer},
};
use attn_train::{
    Batch, Batches, BoxError, CausalLm, Classification, Distillation, Event, Examples, Losses,
    Objective, Run, TrainConfig, train,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};
use tch::{Kind, Tensor};

type Result<T> = std::result::Result<T, BoxError>;

fn main() -> Result<()> {
    attn_torch::tune_allocator();
    let args: Vec<String> = std::env::args().skip(1).collect();
    let arg = |at: usize| args.get(at).map(String::as_str);
    let (Some(section), Some(name), Some(threads)) = (arg(0), arg(1), arg(2)) else {
        return Err(
            "usage: bench train|distill|generate|sst2|kl MODEL THREADS [f32|bf16|TEXT-FILE] [BATCHES]"
                .into(),
        );
    };
    tch::set_num_threads(threads.parse()?);
    let device = std::env::var("BENCH_DEVICE").unwrap_or_else(|_| "cpu".to_owned());
    let device = attn_torch::device(&device)?;
    let kind = if arg(3) == Some("bf16") { Kind::BFloat16 } else { Kind::Float };
    let hub = Hub::from_env();
    let folder = resolve_config(&hub, name, None)?;
    let model = |head| -> Result<Model> {
        let config = Config::from_json(read_json(&folder, "config.json")?)?;
        Ok(Model::init(config, &LoadOptions { kind, head, device, ..LoadOptions::default() })?)
    };
    match section {
        "train" => {
            let model = model(WantedHead::LanguageModel)?;
            let vocab_size = model.config().sizes.vocab_size;
            let data = RandomIds { vocab_size, shape: [16, 64] };
            fit(model, &CausalLm, &data, json!({}))
        }
        "distill" => {
            let teacher = model(WantedHead::LanguageModel)?;
            let mut student = teacher.alias()?;
            student.own(&|_| true);
            let losses = Losses { forward_kl: 1.0, ..Losses::default() };
            let objective = Distillation::new(&teacher, &student, &losses)?;
            let vocab_size = teacher.config().sizes.vocab_size;
            let data = RandomIds { vocab_size, shape: [4, 256] };
            fit(student, &objective, &data, json!({ "loaded_gib": resident_gib()? }))
        }
        "sst2" => {
            let n_batches = arg(4).ok_or("how many batches?")?.parse()?;
            let (examples, facts) = sst2(&hub, &TextTokenizer::from_folder(&folder)?)?;
            let data = Sample { examples, n_batches };
            let classes = ["negative", "positive"].map(String::from).to_vec();
            fit(model(WantedHead::NewClassifier(classes))?, &Classification, &data, facts)
        }
        "generate" => decode(&model(WantedHead::LanguageModel)?),
        "kl" => kl(&folder, arg(3).ok_or("which text?")?),
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

/// Trains by the product's own loop, paused from step to step.
fn fit(
    mut model: Model,
    objective: &dyn Objective,
    data: &dyn Batches,
    facts: Value,
) -> Result<()> {
    let config = TrainConfig {
        max_steps: Some(1_000_000),
        eval_every: 1_000_000,
        checkpoint_every: 1_000_000,
        log_every: 500,
        ..TrainConfig::default()
    };
    let left = RefCell::new(0);
    let mut run = Run::new(&config, objective, data);
    run.observe = Box::new(|event| match event {
        Event::Started { .. } => *left.borrow_mut() = next_order(&facts),
        Event::Step(progress) => {
            let mut left = left.borrow_mut();
            *left -= 1;
            if *left == 0 {
                *left = next_order(&json!({ "loss": progress.loss, "tokens": progress.n_tokens }));
            }
        }
        _ => {}
    });
    train(&mut model, run)?;
    Ok(())
}

/// What this process holds in memory.
fn resident_gib() -> Result<f64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")).ok_or("no VmRSS")?;
    Ok(kib.trim().parse::<f64>()? / f64::from(1 << 20))
}

/// Batches of random ids.
struct RandomIds {
    vocab_size: i64,
    /// Rows and ids a row.
    shape: [usize; 2],
}

impl Batches for RandomIds {
    fn plan(&self, _: u64) -> Vec<Vec<usize>> {
        (0..1000).map(|batch| vec![batch]).collect()
    }

    fn batch(&self, _: u64, rows: &[usize]) -> std::result::Result<Batch, BoxError> {
        let mut rng = ChaCha8Rng::seed_from_u64(rows[0] as u64);
        let mut row = |index| {
            let ids =
                (0..self.shape[1]).map(|_| rng.random_range(0..self.vocab_size as u32)).collect();
            Encoded { ids, label: None, index, second_from: None }
        };
        let rows: Vec<Encoded> = (0..self.shape[0]).map(&mut row).collect();
        Ok(collate(&rows.iter().collect::<Vec<_>>(), 0, Side::Right).into())
    }
}

/// `n_batches` batches that stand for those of a whole pass: evenly spaced when sorted by their positions.
struct Sample {
    examples: Examples,
    n_batches: usize,
}

impl Batches for Sample {
    fn plan(&self, _: u64) -> Vec<Vec<usize>> {
        let mut all = self.examples.plan(0);
        all.sort_by_key(|batch| positions(&self.examples, batch));
        let at = |i: usize| (2 * i + 1) * all.len() / (2 * self.n_batches);
        (0..self.n_batches).map(|i| all[at(i)].clone()).collect()
    }

    fn batch(&self, epoch: u64, rows: &[usize]) -> std::result::Result<Batch, BoxError> {
        self.examples.batch(epoch, rows)
    }
}

/// Places in a batch, padding included.
fn positions(examples: &Examples, batch: &[usize]) -> usize {
    let lengths = batch.iter().map(|&row| examples.examples()[row].ids.len());
    lengths.max().unwrap_or(0) * batch.len()
}

/// SST-2's train split, tokenized, with the seconds that took.
fn sst2(hub: &Hub, tokenizer: &TextTokenizer) -> Result<(Examples, Value)> {
    let spec = DatasetSpec {
        source: "stanfordnlp/sst2".into(),
        text: "sentence".into(),
        label: Some("label".into()),
        ..DatasetSpec::default()
    };
    let rows: Vec<Example> =
        dataset::open(&spec, "train", hub)?.collect::<std::result::Result<_, _>>()?;
    let started = Instant::now();
    let inputs: Vec<Input<'_>> = rows.iter().map(|row| row.text.as_str().into()).collect();
    let options = EncodeOptions { max_len: Some(512), ..EncodeOptions::default() };
    let ids = tokenizer.encode(&inputs, &options)?.ids;
    let tokenize_s = started.elapsed().as_secs_f64();
    let examples: Vec<Encoded> = (0..)
        .zip(ids.into_iter().zip(&rows))
        .map(|(index, (ids, row))| Encoded { ids, label: row.label, index, second_from: None })
        .collect();
    let n_examples = examples.len();
    let plan = TrainConfig::default().plan()?;
    let examples = Examples::new(examples, plan, tokenizer.fill_id(), 0);
    let plan = examples.plan(0);
    let facts = json!({
        "tokenize_s": tokenize_s,
        "examples": n_examples,
        "batches": plan.len(),
        "positions": plan.iter().map(|batch| positions(&examples, batch)).sum::<usize>(),
    });
    Ok((examples, facts))
}

/// One unit is one text: 16 tokens of prompt, 64 new ones.
fn decode(model: &Model) -> Result<()> {
    let prompts = [(0..16).map(|i| 1000 + 37 * i).collect::<Vec<i64>>()];
    let limits = Limits { max_new_tokens: 64, stop_ids: Vec::new() };
    let mut answer = json!({});
    loop {
        for _ in 0..next_order(&answer) {
            let rows = generate(model, &prompts, &Sampling::default(), &limits, &mut |_, _| {
                ControlFlow::Continue(())
            })?;
            answer = json!({ "ids": rows[0].ids });
        }
    }
}

/// What bf16 weights change in the predictions of a trained model: the mean of KL(f32 ‖ bf16) over the first 32 × 64
/// tokens of a text, and how often the likeliest token stays.
fn kl(folder: &Path, text: &str) -> Result<()> {
    let ids = TextTokenizer::from_folder(folder)?.ids(&fs::read_to_string(text)?, false)?;
    let ids: Vec<i64> = ids.into_iter().map(i64::from).take(32 * 64).collect();
    let ids = Tensor::from_slice(&ids).view([32, 64]);
    let _no_grad = tch::no_grad_guard();
    let log_p = |kind| -> Result<Tensor> {
        let (model, _) = Model::load(folder, &LoadOptions { kind, ..LoadOptions::default() })?;
        let input = ModelInput::new(ids.shallow_clone());
        let logits = model.forward(&input, &ForwardOptions::default())?.logits;
        Ok(logits.to_kind(Kind::Double).log_softmax(-1, Kind::Double))
    };
    let (wide, narrow) = (log_p(Kind::Float)?, log_p(Kind::BFloat16)?);
    let terms = wide.exp() * (&wide - &narrow); // [32, 64, vocab_size]
    let each = terms.sum_dim_intlist([-1i64].as_slice(), false, Kind::Double);
    let same = wide.argmax(-1, false).eq_tensor(&narrow.argmax(-1, false));
    let answer = json!({
        "mean_kl_nats": each.mean(Kind::Double).double_value(&[]),
        "max_kl_nats": each.max().double_value(&[]),
        "same_likeliest": same.to_kind(Kind::Double).mean(Kind::Double).double_value(&[]),
    });
    writeln!(io::stdout(), "{answer}")?;
    Ok(())
}
