//! Training steps of a model at its real size, with random weights: seconds and peak memory.
//!
//! ```text
//! cargo run --release -p attn-train --example real_size -- FOLDER --lora --rows 1 --len 500 --steps 2
//! ```
//!
//! FOLDER needs a `config.json` alone. Without `--lora` everything is trained. Prints one JSON object.

#![allow(clippy::print_stdout, reason = "a measurement is what it is for")]

use std::{fs, path::PathBuf, time::Instant};

use attn_core::{Config, LoadOptions, Lora, Model, checkpoint::read_json};
use attn_data::batch::Encoded;
use attn_train::{CausalLm, Event, Examples, MaskedLm, Objective, Run, TrainConfig, train};
use serde_json::json;

type BoxError = Box<dyn std::error::Error>;

fn main() -> Result<(), BoxError> {
    attn_torch::tune_allocator();
    let (mut folder, mut lora, mut recompute) = (None, false, false);
    let (mut rows, mut len, mut steps) = (1, 500, 2);
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut number = || -> Result<usize, BoxError> {
            Ok(args.next().ok_or(format!("{arg} needs a number"))?.parse()?)
        };
        match arg.as_str() {
            "--lora" => lora = true,
            "--recompute" => recompute = true,
            "--rows" => rows = number()?,
            "--len" => len = number()?,
            "--steps" => steps = number()?,
            _ => folder = Some(PathBuf::from(arg)),
        }
    }
    let folder = folder.ok_or("name the folder of a config.json")?;

    let started = Instant::now();
    let config = Config::from_json(read_json(&folder, "config.json")?)?;
    let vocab_size = config.sizes.vocab_size as u32;
    let mut model = Model::init(config, &LoadOptions::default())?;
    let init_s = started.elapsed().as_secs_f64();
    let mut training = TrainConfig {
        max_steps: Some(steps as u64),
        batch_size: rows,
        warmup_ratio: 0.0,
        gradient_checkpointing: recompute,
        ..TrainConfig::default()
    };
    if lora {
        let targets = vec!["all-linear".to_owned()];
        model.add_lora(&Lora { targets, ..Lora::default() }, 0)?;
        training.freeze = ["*", "!*.lora_*"].map(str::to_owned).into();
    }
    let row = |index: usize| {
        let ids = (0..len).map(|i| ((i * 7919 + index * 104_729) as u32) % vocab_size).collect();
        Encoded { ids, label: None, index, second_from: None }
    };
    let causal = model.config().is_causal();
    let mut data = Examples::new((0..rows * steps).map(row).collect(), training.plan()?, 0, 0);
    let objective: &dyn Objective = if causal { &CausalLm } else { &MaskedLm };
    if !causal {
        let masking = attn_data::batch::Masking {
            mask_id: 103,
            vocab_size: vocab_size as usize,
            special: vec![0],
            rate: 0.15,
        };
        data = data.with_masking(masking);
    }
    let (mut at, mut seconds) = (None, Vec::new());
    let run = Run {
        observe: Box::new(|event| match event {
            Event::Started { .. } => at = Some(Instant::now()),
            Event::Step(progress) => {
                let now = Instant::now();
                let before = at.replace(now).expect("a run starts before its steps");
                seconds.push(((now - before).as_secs_f64(), progress.loss));
            }
            _ => {}
        }),
        ..Run::new(&training, objective, &data)
    };
    train(&mut model, run)?;
    let n_parameters: usize = model.parameters().iter().map(|(_, tensor)| tensor.numel()).sum();
    println!(
        "{}",
        json!({
            "model_type": model.config().base_model_type(),
            "n_parameters": n_parameters,
            "adapters": lora,
            "recompute": recompute,
            "rows": rows,
            "len": len,
            "init_s": init_s,
            "step_s": seconds.iter().map(|(s, _)| s).collect::<Vec<_>>(),
            "loss": seconds.iter().map(|(_, loss)| loss).collect::<Vec<_>>(),
            "peak_gib": peak_kib()? as f64 / (1 << 20) as f64,
            "threads": tch::get_num_threads(),
        })
    );
    Ok(())
}

/// The most memory this process has had, in KiB; Linux.
fn peak_kib() -> Result<u64, BoxError> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).ok_or("no VmHWM")?;
    Ok(line.split_whitespace().nth(1).ok_or("no number")?.parse()?)
}
