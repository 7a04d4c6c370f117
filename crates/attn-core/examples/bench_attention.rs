//! Times attention kinds against LibTorch's fused softmax attention, from projected q, k and v to z; see
//! `scripts/bench_attention.sh`.
//!
//! ```text
//! bench_attention THREADS ROUNDS LENGTH... [--kinds NAME,...]
//! ```
//!
//! Kinds take turns within a length, so that what else the machine does meets them alike. Hidden states have 8 channels,
//! which makes the projections that some kinds add cost next to nothing: they are no part of the comparison. One line of
//! CSV for each kind, length and pass.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Write},
    time::Instant,
};

use attn_core::{
    Variant,
    attention::{Attention, Dims},
    mask::Mask,
    testing::{Probe, randn},
};
use attn_torch::{BoxError, GradOptions};
use tch::{Device, Kind, Tensor};

/// Name and settings.
const KINDS: [(&str, &str); 15] = [
    ("sdpa", r#"{"kind": "softmax"}"#),
    ("window_256", r#"{"kind": "window", "size": 256}"#),
    ("window_32", r#"{"kind": "window", "size": 32}"#),
    ("sinks_4_256", r#"{"kind": "sinks", "n_sinks": 4, "window": 256}"#),
    ("dilated_256_2", r#"{"kind": "dilated", "size": 256, "dilation": 2}"#),
    ("global_local", r#"{"kind": "global_local"}"#),
    ("big_bird", r#"{"kind": "big_bird"}"#),
    ("nsa", r#"{"kind": "nsa"}"#),
    ("moba_512_3", r#"{"kind": "moba"}"#),
    ("moba_64_16", r#"{"kind": "moba", "block": 64, "top_k": 16}"#),
    ("performer_256", r#"{"kind": "performer"}"#),
    ("hedgehog", r#"{"kind": "hedgehog"}"#),
    ("t2r", r#"{"kind": "t2r"}"#),
    ("window_linear", r#"{"kind": "window_linear"}"#),
    ("indexed", r#"{"kind": "indexed"}"#),
];

const HEADS: i64 = 12;
const HEAD_DIM: i64 = 64;
/// No kind is run where it would take more processor time for a pass than this, if it grew with n².
const TOO_SLOW_S: f64 = 60.0;

type Result<T> = std::result::Result<T, BoxError>;

const PASSES: [&str; 2] = ["forward", "forward+backward"];

fn main() -> Result<()> {
    attn_torch::tune_allocator();
    attn_torch::count_cpu_memory()?;
    let mut args: Vec<String> = std::env::args().skip(1).collect();
    let mut wanted: Option<Vec<String>> = None;
    if let Some(at) = args.iter().position(|arg| arg == "--kinds") {
        let names = args.get(at + 1).ok_or("`--kinds` wants names, separated by commas")?;
        wanted = Some(names.split(',').map(str::to_owned).collect());
        args.drain(at..at + 2);
    }
    let numbers: Vec<i64> =
        args.iter().map(|arg| arg.parse()).collect::<std::result::Result<_, _>>()?;
    let [threads, rounds, lengths @ ..] = &numbers[..] else {
        return Err("usage: bench_attention THREADS ROUNDS LENGTH... [--kinds NAME,...]".into());
    };
    for name in wanted.iter().flatten() {
        if !KINDS.iter().any(|(known, _)| known == name) {
            let known = KINDS.map(|(known, _)| known).join(", ");
            return Err(format!("there is no kind `{name}`, expected some of {known}").into());
        }
    }
    tch::set_num_threads(*threads as i32);
    let mut out = io::stdout().lock();
    writeln!(
        out,
        "kind,n,pass,ms,ms_least,ms_most,ratio_to_sdpa,cpu_ms,ratio_of_cpu,growth_of_cpu,peak_mib,gflop_per_cpu_s,share_of_floor,matmul_gflop_per_cpu_s"
    )?;

    let mut before: BTreeMap<(&str, &str), (i64, f64)> = BTreeMap::new();
    for &n in lengths {
        let peak_flops = matmul_flops();
        let probe = inputs(n);
        let pull = randn(2, &probe.q.size()).to_kind(Kind::Float);
        let is_wanted = |name: &str| {
            let among = |wanted: &Vec<String>| wanted.iter().any(|wanted| wanted == name);
            name == "sdpa" || wanted.as_ref().is_none_or(among)
        };
        let mut subjects = Vec::new();
        for (name, settings) in &KINDS {
            let expected_ms = before
                .get(&(*name, PASSES[1]))
                .map_or(0.0, |(shorter, ms)| ms * (n as f64 / *shorter as f64).powi(2));
            if is_wanted(name) && expected_ms / 1e3 <= TOO_SLOW_S {
                let attention = probe.build(&serde_json::from_str::<Variant>(settings)?);
                let [times, cpu_times] = [BTreeMap::new(), BTreeMap::new()];
                let peaks = BTreeMap::new();
                subjects.push(Subject { name, attention, times, cpu_times, peaks });
            }
        }
        for _ in 0..*rounds {
            for subject in &mut subjects {
                subject.run(&probe, &pull)?;
            }
        }
        for pass in PASSES {
            let of = |subject: &Subject| {
                (median(&subject.times[pass]), median(&subject.cpu_times[pass]))
            };
            let dense = subjects.iter().find(|subject| subject.name == "sdpa").map(of);
            for subject in &subjects {
                let ((ms, cpu), times) = (of(subject), &subject.times[pass]);
                let growth = before
                    .insert((subject.name, pass), (n, cpu))
                    .map(|(shorter, then)| (cpu / then).ln() / (n as f64 / shorter as f64).ln());
                // On the way back each product has two of its own, at the least.
                let passes = if pass == PASSES[0] { 1.0 } else { 3.0 };
                let rate = subject.attention.flops(n) as f64 * passes / (cpu / 1e3);
                let shown = |x: Option<f64>| x.map(|x| format!("{x:.3}")).unwrap_or_default();
                writeln!(
                    out,
                    "{},{n},{pass},{ms:.1},{:.1},{:.1},{},{cpu:.1},{},{},{},{},{},{:.0}",
                    subject.name,
                    times.iter().copied().fold(f64::MAX, f64::min),
                    times.iter().copied().fold(0.0, f64::max),
                    shown(dense.map(|dense| dense.0 / ms)),
                    shown(dense.map(|dense| dense.1 / cpu)),
                    shown(growth),
                    subject.peaks[pass] >> 20,
                    shown(Some(rate / 1e9)),
                    shown(Some(rate / peak_flops)),
                    peak_flops / 1e9,
                )?;
            }
            out.flush()?;
        }
    }
    Ok(())
}

/// Random q, k and v of a layer of 12 heads of 64, causal, in `f32`.
fn inputs(n: i64) -> Probe {
    let dims = Dims {
        hidden_size: 8,
        n_heads: HEADS,
        n_kv_heads: HEADS,
        head_dim: HEAD_DIM,
        kv_of_head: (0..HEADS).collect(),
        scale: (HEAD_DIM as f64).powf(-0.5),
        causal: true,
        rotary: false,
        max_len: None,
    };
    let probe = Probe::with_dims(1, [1, n, n], dims).to(Kind::Float, Device::Cpu);
    let [q, k, v] = [&probe.q, &probe.k, &probe.v].map(|x| x.detach().set_requires_grad(true));
    Probe { q, k, v, ..probe }
}

/// One kind at one length.
struct Subject {
    name: &'static str,
    attention: Box<dyn Attention>,
    /// In ms, of the clock and of the processor.
    times: BTreeMap<&'static str, Vec<f64>>,
    cpu_times: BTreeMap<&'static str, Vec<f64>>,
    peaks: BTreeMap<&'static str, i64>,
}

impl Subject {
    /// Both passes once. `pull` is the gradient of z.
    fn run(&mut self, probe: &Probe, pull: &Tensor) -> Result<()> {
        let mask = Mask::new(true);
        let input = probe.input(&mask);
        let mut time = |pass, work: &dyn Fn() -> Result<()>| -> Result<()> {
            let held = attn_torch::cpu_memory().now;
            attn_torch::reset_peak_cpu_memory();
            let (started, cpu_started) = (Instant::now(), cpu_ms());
            work()?;
            self.cpu_times.entry(pass).or_default().push(cpu_ms() - cpu_started);
            self.times.entry(pass).or_default().push(started.elapsed().as_secs_f64() * 1e3);
            self.peaks.insert(pass, attn_torch::cpu_memory().peak - held);
            Ok(())
        };
        time(PASSES[0], &|| {
            tch::no_grad(|| drop(self.attention.forward(&input)));
            Ok(())
        })?;
        time(PASSES[1], &|| {
            let z = self.attention.forward(&input);
            Ok(attn_torch::backward(&[z], &[pull], GradOptions::default())?)
        })?;
        attn_torch::take_grads(&[&probe.q, &probe.k, &probe.v])?;
        Ok(())
    }
}

/// Processor time of all threads of this process, in ms; 0 where the system does not say. Threads that wait for work
/// spin for a while, so that it is one thread's figures that compare.
fn cpu_ms() -> f64 {
    let threads = fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let of_thread = |thread: fs::DirEntry| {
        let text = fs::read_to_string(thread.path().join("schedstat")).ok()?;
        text.split(' ').next()?.parse::<f64>().ok()
    };
    threads.filter_map(of_thread).sum::<f64>() / 1e6
}

/// Operations of LibTorch's own product of matrices in a second of processor time, the best of a few.
fn matmul_flops() -> f64 {
    let n = 1024;
    let [a, b] = [0, 1].map(|_| Tensor::rand([n, n], (Kind::Float, Device::Cpu)));
    let time = |_| {
        let started = cpu_ms();
        drop(a.matmul(&b));
        (cpu_ms() - started) / 1e3
    };
    2.0 * (n as f64).powi(3) / (0..8).map(time).fold(f64::MAX, f64::min)
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 }
}
