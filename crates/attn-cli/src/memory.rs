//! Whether there is room for what a command is about to do, before it begins.
//!
//! A command adds up what it will hold ([`Foreseen`]), from the sizes in `config.json` and its own settings, and ends with the parts
//! and what to lower where that is more than is free. The numbers are upper bounds of tensors ([`attn_core::need`]) and what the
//! allocator keeps beside. `results/2026-11-23-memory` holds them against measured peaks.

use std::{
    path::Path,
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use anyhow::{Result, bail};
use attn_core::{
    Config,
    config::Head,
    need::{Extents, Kept, Need, Pass},
};
use attn_data::batch::Encoded;
use attn_eval::Batching;
use attn_train::{TrainConfig, trainable};
use tch::{Device, Kind};

use crate::args::{ComputeArgs, Init};

/// Bytes of a MiB and a GiB.
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// What a command holds beside tensors: libraries, threads, the tokenizer and data, and what the C library's allocator keeps of batches of
/// ever other lengths, which differs from run to run (up to 340 MiB were measured).
const BESIDE: u64 = 384 * MIB;

/// Losses over the vocabulary that are made piece by piece hold this much of it at once.
pub(crate) const PIECES: u64 = 4 * 32 * MIB;

/// Attention weights that batches made for them hold at once.
const BOUNDED: u64 = 4 * attn_eval::MAX_WEIGHTS as u64;

/// Whether to begin in any case.
static ANYWAY: AtomicBool = AtomicBool::new(false);

/// What to lower, of the command that runs.
static LOWER: Mutex<Option<String>> = Mutex::new(None);

/// From here on nothing is refused.
pub(crate) fn begin_anyway() {
    ANYWAY.store(true, Ordering::Relaxed);
}

/// What to lower where memory runs out: of the command that runs, once it has said what it needs.
pub(crate) fn to_lower() -> String {
    let held = LOWER.lock().ok().and_then(|held| held.clone());
    held.unwrap_or_else(|| "a smaller model, a smaller batch, shorter rows, or --dtype bf16".into())
}

/// What a command is about to hold.
pub(crate) struct Foreseen {
    need: Need,
    extents: Extents,
    kind: Kind,
}

impl Foreseen {
    /// A model of `config` in `kind`; its weights are drawn where `is_random`.
    pub(crate) fn model(config: &Config, kind: Kind, is_random: bool) -> Result<Self> {
        let extents = Extents::of(config)?;
        let what = format!(
            "{:.1} million parameters in {} bits",
            extents.n_parameters() as f64 / 1e6,
            8 * kind.elt_size_in_bytes()
        );
        let need = Need::new().with(what, extents.parameter_bytes(kind, is_random));
        Ok(Self { need, extents, kind })
    }

    /// As [`Self::model`], as `compute` says.
    pub(crate) fn computing(config: &Config, compute: &ComputeArgs) -> Result<Self> {
        Self::model(config, compute.dtype.into(), compute.init == Some(Init::Random))
    }

    /// A model that goes on from a layer with copies of a batch, under other gates each: they share a pass, of as many tokens as a batch
    /// may have.
    pub(crate) fn branching(
        config: &Config,
        compute: &ComputeArgs,
        (rows, len): (u64, u64),
    ) -> Result<Self> {
        let most = Batching::default().max_tokens.unwrap_or(8192) as u64;
        let copies = (most / len).max(rows);
        let all = Self::computing(config, compute)?.pass((copies, len)).inputs((rows, len));
        Ok(all.row_loss((copies, len), config, 3))
    }

    /// And `bytes` for `what`.
    pub(crate) fn with(self, what: impl Into<String>, bytes: u64) -> Self {
        Self { need: self.need.with(what, bytes), ..self }
    }

    /// And another model.
    pub(crate) fn beside(self, what: &str, config: &Config, kind: Kind) -> Result<Self> {
        let bytes = Extents::of(config)?.parameter_bytes(kind, false);
        Ok(self.with(format!("the parameters of {what}"), bytes))
    }

    /// And `share` of the parameters once more, in `kind`.
    pub(crate) fn copied(self, what: &str, kind: Kind, times: u64) -> Self {
        let bytes = self.extents.n_parameters().saturating_mul(kind.elt_size_in_bytes() as u64);
        self.with(what, bytes.saturating_mul(times))
    }

    /// And a pass of a batch without gradients.
    pub(crate) fn pass(self, (rows, len): (u64, u64)) -> Self {
        let bytes = self.blocks((rows, len), Kept::Nothing, false);
        self.with(format!("activations of {rows} x {len} tokens"), bytes)
    }

    /// As [`Self::pass`] or [`Self::backward`], in `f64`.
    pub(crate) fn wide_pass(self, extent: (u64, u64), trains: bool) -> Self {
        let kind = self.kind;
        let wide = Self { kind: Kind::Double, ..self };
        let all = if trains { wide.backward(extent) } else { wide.pass(extent) };
        Self { kind, ..all }
    }

    /// And a pass of a batch with all that gradients are made of, dropout off.
    pub(crate) fn backward(self, (rows, len): (u64, u64)) -> Self {
        let bytes = self.blocks((rows, len), Kept::All, false);
        self.with(format!("activations of {rows} x {len} tokens, kept for gradients"), bytes)
    }

    fn blocks(&self, (rows, len): (u64, u64), kept: Kept, train: bool) -> u64 {
        let pass = Pass { rows, len, kept, train, is_padded: rows > 1, kind: self.kind };
        self.extents.block_bytes(&pass)
    }

    /// And logits over the vocabulary at `places`, `copies` times in at least 32 bits.
    pub(crate) fn logits(self, places: u64, copies: u64) -> Self {
        let kind = if self.kind == Kind::Double { Kind::Double } else { Kind::Float };
        let bytes = self.extents.logit_bytes(places, copies, kind);
        self.with(format!("logits of {places} tokens"), bytes)
    }

    /// And the attention of every token to every other, in all layers, `copies` times in 32 bits.
    pub(crate) fn attention(self, (rows, len): (u64, u64), copies: u64) -> Self {
        let bytes = self.extents.row_bytes(rows, len, Kind::Float).saturating_mul(copies);
        self.with(format!("attention rows of {rows} x {len} tokens"), bytes)
    }

    /// And a loss of each row of a batch: of tokens over the vocabulary, or of classes.
    pub(crate) fn row_loss(self, (rows, len): (u64, u64), config: &Config, copies: u64) -> Self {
        match (config.head, config.is_causal()) {
            (Head::LanguageModel, true) => self.logits(rows * len, copies),
            (Head::LanguageModel, false) => self.logits(rows * len / 5 + 16, copies),
            _ => self,
        }
    }

    /// As [`Self::attention`] of batches made small enough for it (`attn_eval`'s head roles), a single text at least.
    pub(crate) fn bounded_attention(self, (rows, len): (u64, u64), copies: u64) -> Self {
        let (all, one) = (
            self.extents.row_bytes(rows, len, Kind::Float),
            self.extents.row_bytes(1, len, Kind::Float),
        );
        let bytes = all.min(one.max(BOUNDED)).saturating_mul(copies);
        self.with(format!("attention rows of texts of {len} tokens"), bytes)
    }

    /// And what goes into every layer and comes out of its heads, of two models.
    pub(crate) fn inputs(self, (rows, len): (u64, u64)) -> Self {
        let values = 4 * self.extents.hidden_size() * self.extents.n_layers();
        let bytes = rows.saturating_mul(len).saturating_mul(values).saturating_mul(4);
        self.with("what goes into layers and comes out of heads", bytes)
    }

    /// The sum so far.
    pub(crate) fn total(&self) -> u64 {
        self.need.total()
    }

    /// And keys and values of texts that are written; while they grow, old and new.
    pub(crate) fn cache(self, (rows, len): (u64, u64)) -> Self {
        let bytes = self.extents.cache_bytes(rows, len, self.kind).saturating_mul(2);
        self.with(format!("keys and values of {rows} x {len} tokens"), bytes)
    }

    /// And second moments of what goes into the layers, in `f64`, `times` of each.
    pub(crate) fn moments(self, n_layers: usize, times: u64) -> Self {
        let bytes = self.extents.n_moments(n_layers as u64).saturating_mul(8 * times);
        self.with("second moments of calibration", bytes)
    }

    /// Values of adapters of this rank.
    pub(crate) fn adapters(&self, rank: usize) -> u64 {
        self.extents.n_adapter_values(rank as u64)
    }

    /// And training: gradients, AdamW's moments, and a step's activations, `n_labels` of its tokens predicted over the vocabulary
    /// where that is what is learned. `trained` says which parameters `config` leaves to be trained.
    pub(crate) fn training(self, step: &Training<'_>) -> Result<Self> {
        let Training { config, lora, len, n_rows, labelled, is_language, scored, scored_places } =
            *step;
        let names: Vec<&String> = self.extents.parameters.iter().map(|(name, _)| name).collect();
        let n_trained = match lora {
            Some(n) => n,
            // Patterns may name what a surgery is still to make: what cannot be told is trained.
            None => match trainable(&names, &config.freeze) {
                Ok(trained) => {
                    let sizes = self.extents.parameters.iter().zip(trained);
                    sizes.filter(|(_, trained)| *trained).map(|((_, n), _)| *n).sum()
                }
                Err(_) => self.extents.n_parameters(),
            },
        };
        let (rows, len) = batch(config.batch_size, config.max_tokens, len, n_rows);
        let kept = if config.gradient_checkpointing { Kept::Blocks } else { Kept::All };
        let activations = self.blocks((rows, len), kept, true);
        let places = (rows as f64 * len as f64 * labelled).ceil() as u64;
        // Scoring comes between steps, in their place.
        let logits = |places: u64, copies| self.extents.logit_bytes(places, copies, Kind::Float);
        let of_step = activations + if is_language { logits(places, 3) } else { 0 };
        let of_score = self.blocks(scored, Kept::Nothing, false)
            + logits(scored_places, 1)
            + if scored_places > 0 { logits(scored.1, 3) } else { 0 };
        let sums = if config.accumulation > 1 { 2 } else { 1 };
        let bytes = |times: u64| n_trained.saturating_mul(4 * times);
        let all = self
            .with("gradients", bytes(sums))
            .with("AdamW's two moments", bytes(2))
            .with(format!("activations of a step of {rows} x {len} tokens"), activations)
            .with(
                format!("more for scoring {} x {} tokens", scored.0, scored.1),
                of_score.saturating_sub(of_step),
            );
        Ok(if is_language { all.logits(places, 3) } else { all })
    }

    /// Refuses what is more than `device` has free, and remembers what to lower where memory runs out all the same.
    pub(crate) fn check(self, device: Device, lower: &str) -> Result<()> {
        if let Ok(mut held) = LOWER.lock() {
            *held = Some(lower.to_owned());
        }
        let need = self.need;
        let tensors = need.total();
        let need = need
            .with("what the allocator keeps beside", tensors / 10)
            .with("libraries and data", if device == Device::Cpu { BESIDE } else { 0 });
        tracing::debug!(bytes = need.total(), "memory foreseen");
        let Some(free) = free_bytes(device) else { return Ok(()) };
        fits(&need, free, lower, ANYWAY.load(Ordering::Relaxed))
    }
}

/// A stage of training.
#[derive(Clone, Copy)]
pub(crate) struct Training<'a> {
    pub(crate) config: &'a TrainConfig,
    /// Values of adapters, where these alone are trained.
    pub(crate) lora: Option<u64>,
    /// Tokens of the longest row, and rows.
    pub(crate) len: u64,
    pub(crate) n_rows: usize,
    /// The share of tokens with a label.
    pub(crate) labelled: f64,
    /// Whether labels are tokens, their logits made at once.
    pub(crate) is_language: bool,
    /// Rows and tokens of the largest batch that is scored on the way, and the places where its logits are made.
    pub(crate) scored: (u64, u64),
    pub(crate) scored_places: u64,
}

/// What to lower where training is too much.
pub(crate) const OF_TRAINING: &str = "the batch (--set train.batch_size=N, with train.accumulation=N for the same steps, or \
    train.max_tokens=N), the length of rows (examples.max_len), what is kept (train.gradient_checkpointing=true), what is trained \
    (`[lora]`, train.freeze), or a smaller model";

/// What to lower where rows are scored.
pub(crate) const OF_SCORING: &str = "the batch (--batch-size N), the length of rows (--max-len N), the precision (--dtype bf16), or a smaller model";

/// What to lower where a model is changed and written.
pub(crate) const OF_CHANGING: &str = "a smaller model, or a machine with more memory";

/// What to lower where documents with needles are read.
pub(crate) const OF_NEEDLES: &str = "the length of documents (--lengths), how many are read at a time (--batch-size N), the precision (--dtype bf16), or a smaller model";

/// What to lower where laws are held.
pub(crate) const OF_VERIFYING: &str = "how much is tried (--quick), or a smaller model";

/// What to lower where one text is read.
pub(crate) const OF_ONE_TEXT: &str =
    "the length of the text, the precision (--dtype bf16), or a smaller model";

/// Rows and tokens of the largest batch: `batch_size` rows of `len` tokens, fewer where `max_tokens` or the number of rows say so.
pub(crate) fn batch(
    batch_size: usize,
    max_tokens: Option<usize>,
    len: u64,
    n_rows: usize,
) -> (u64, u64) {
    let len = len.max(1);
    let most = max_tokens.map_or(u64::MAX, |most| (most as u64 / len).max(1));
    ((batch_size.min(n_rows.max(1)) as u64).min(most).max(1), len)
}

/// [`batch`] as rows are scored.
pub(crate) fn scored(batching: &Batching, rows: &[Encoded]) -> (u64, u64) {
    batch(batching.batch_size, batching.max_tokens, longest(rows), rows.len())
}

/// Tokens of the longest row.
pub(crate) fn longest(rows: &[Encoded]) -> u64 {
    rows.iter().map(|row| row.ids.len() as u64).max().unwrap_or(1)
}

fn shown(bytes: u64) -> String {
    match bytes < GIB {
        true => format!("{} MiB", bytes.div_ceil(MIB)),
        false => format!("{:.1} GiB", bytes as f64 / GIB as f64),
    }
}

fn fits(need: &Need, free: u64, lower: &str, anyway: bool) -> Result<()> {
    let total = need.total();
    let parts: Vec<String> = need
        .largest_first()
        .into_iter()
        .filter(|(_, bytes)| *bytes > total / 100)
        .map(|(what, bytes)| format!("  {:>10}  {what}", shown(bytes)))
        .collect();
    let (total_shown, free_shown) = (shown(total), shown(free));
    if total > free && !anyway {
        bail!(
            "this needs up to {total_shown} of memory, and {free_shown} are free\n{}\nhint: lower what is large: {lower}; or begin all the \
             same with --despite-memory",
            parts.join("\n")
        );
    }
    if total > free {
        tracing::warn!(
            "up to {total_shown} of memory are needed, and {free_shown} are free: it may run out"
        );
    } else if total > free / 2 {
        tracing::info!(
            "up to {total_shown} of memory are needed, of {free_shown} that are free\n{}",
            parts.join("\n")
        );
    }
    Ok(())
}

/// What may still be taken on `device`, where that can be told.
fn free_bytes(device: Device) -> Option<u64> {
    match device {
        Device::Cpu => free_of(Path::new("/")),
        Device::Cuda(index) => attn_torch::cuda_memory(index).ok().map(|memory| {
            // What LibTorch holds and does not use serves as well.
            (memory.free + memory.reserved.saturating_sub(memory.allocated)) as u64
        }),
        _ => None,
    }
}

/// The least of what the system and the control groups of this process leave, by the files below `root`.
fn free_of(root: &Path) -> Option<u64> {
    let read = |path: &str| std::fs::read_to_string(root.join(path)).ok();
    let number = |path: &str| -> Option<u64> { read(path)?.trim().parse().ok() };
    let available = || -> Option<u64> {
        let told = read("proc/meminfo")?;
        let line = told.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
        let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
        Some(kib.saturating_mul(1024))
    };
    let groups = read("proc/self/cgroup").unwrap_or_default();
    // `0::/path` of the second version, `N:memory:/path` of the first. In a container the path may be another system's.
    let mut limits = Vec::new();
    for line in groups.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(kind), Some(path)) = (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        let is_first = kind.split(',').any(|it| it == "memory");
        let (top, most, held) = match (kind, is_first) {
            ("", _) => ("sys/fs/cgroup", "memory.max", "memory.current"),
            (_, true) => ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
            _ => continue,
        };
        // A limit above holds for what is below.
        let mut place = Path::new(path.trim_start_matches('/'));
        loop {
            let at = |file: &str| Path::new(top).join(place).join(file).display().to_string();
            if let (Some(most), Some(held)) = (number(&at(most)), number(&at(held))) {
                // Pages of files are given back when memory is short.
                let files: u64 = read(&at("memory.stat"))
                    .and_then(|told| {
                        told.lines().find_map(|it| it.strip_prefix("inactive_file ")?.parse().ok())
                    })
                    .unwrap_or(0);
                limits.push(most.saturating_sub(held.saturating_sub(files)));
            }
            match place.parent() {
                Some(parent) => place = parent,
                None => break,
            }
        }
    }
    available().into_iter().chain(limits).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_too_much_is_refused_with_its_parts_and_what_to_lower() {
        let need = Need::new().with("gradients", 2 * GIB).with("activations", 6 * GIB).with("x", 1);
        assert!(fits(&need, 9 * GIB, "the batch", false).is_ok());
        assert!(fits(&need, 7 * GIB, "the batch", true).is_ok());
        let text = fits(&need, 7 * GIB, "the batch", false).unwrap_err().to_string();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "this needs up to 8.0 GiB of memory, and 7.0 GiB are free");
        assert_eq!(lines[1].trim(), "6.0 GiB  activations");
        assert_eq!(lines[2].trim(), "2.0 GiB  gradients");
        assert!(lines[3].starts_with("hint: lower what is large: the batch; or"), "{text}");
        let huge = Need::new().with("a", u64::MAX).with("b", u64::MAX);
        assert!(fits(&huge, u64::MAX - 1, "", false).is_err(), "and no sum that wraps");
    }

    #[test]
    fn the_least_of_system_and_groups_is_free() {
        let dir = tempfile::tempdir().unwrap();
        let put = |path: &str, text: &str| {
            let path = dir.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        assert_eq!(free_of(dir.path()), None);
        put("proc/meminfo", "MemTotal: 9000 kB\nMemAvailable:    4096 kB\n");
        assert_eq!(free_of(dir.path()), Some(4096 * 1024));
        put("proc/self/cgroup", "0::/a/b\n");
        put("sys/fs/cgroup/a/b/memory.max", "max\n");
        put("sys/fs/cgroup/a/b/memory.current", "5\n");
        assert_eq!(free_of(dir.path()), Some(4096 * 1024));
        put("sys/fs/cgroup/a/memory.max", "3000000\n");
        put("sys/fs/cgroup/a/memory.current", "1000000\n");
        assert_eq!(free_of(dir.path()), Some(2_000_000));
        put("sys/fs/cgroup/a/memory.stat", "anon 7\ninactive_file 400000\n");
        assert_eq!(free_of(dir.path()), Some(2_400_000));
        put("proc/self/cgroup", "5:cpu,memory:/c\n");
        put("sys/fs/cgroup/memory/c/memory.limit_in_bytes", "1000\n");
        put("sys/fs/cgroup/memory/c/memory.usage_in_bytes", "1500\n");
        assert_eq!(free_of(dir.path()), Some(0));
    }

    #[test]
    fn this_machine_says_what_is_free() {
        let is_linux = cfg!(target_os = "linux");
        assert_eq!(free_bytes(Device::Cpu).is_some_and(|free| free > 1 << 20), is_linux);
    }

    #[test]
    fn a_batch_has_no_more_rows_and_tokens_than_it_may() {
        assert_eq!(batch(32, None, 512, 1000), (32, 512));
        assert_eq!(batch(32, Some(8192), 512, 1000), (16, 512));
        assert_eq!(batch(32, Some(256), 512, 1000), (1, 512));
        assert_eq!(batch(32, None, 512, 3), (3, 512));
    }
}
