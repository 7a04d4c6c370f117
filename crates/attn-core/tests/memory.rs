//! Kinds that are linear or sparse take memory that grows with the text and not with its square, forward and backward.
//! The only test of its program: tensors are counted in the whole process.

use attn_core::{
    Variant,
    attention::Dims,
    mask::Mask,
    testing::{Probe, randn},
};
use tch::{Device, Kind, Tensor};

/// Kinds that weigh every key for every query.
const DENSE: [&str; 5] = ["cross", "softmax", "gated", "routed", "single_head"];

/// Texts that are long enough for squares to show: at the second n²/16 numbers of f32 take 64 MiB.
const LENGTHS: [i64; 2] = [4096, 16384];

fn probe(n: i64, causal: bool) -> Probe {
    let dims = Dims {
        hidden_size: 8,
        n_heads: 2,
        n_kv_heads: 1,
        head_dim: 16,
        kv_of_head: vec![0, 0],
        scale: 0.25,
        causal,
        rotary: false,
        max_len: None,
    };
    Probe::with_dims(91, [1, n, n], dims)
}

/// The most bytes held at once by `run` beyond what was there.
fn peak(run: impl FnOnce()) -> i64 {
    let before = attn_torch::cpu_memory().now;
    attn_torch::reset_peak_cpu_memory();
    run();
    attn_torch::cpu_memory().peak - before
}

/// x in n^x between two lengths: 1 is linear.
fn growth(bytes: [i64; 2]) -> f64 {
    let log = |of: [i64; 2]| (of[1] as f64 / of[0] as f64).ln();
    log(bytes) / log(LENGTHS)
}

/// Peaks of a pass forward and of one back and forth, after which `besides` made its tensors.
fn peaks(
    variant: &Variant,
    kind: Kind,
    causal: bool,
    besides: impl Fn(&Tensor) -> Tensor,
) -> [[i64; 2]; 2] {
    let both = LENGTHS.map(|n| {
        let probe = probe(n, causal).to(kind, Device::Cpu);
        let attention = probe.build(variant);
        let mask = Mask::new(causal);
        let pull = randn(5, &probe.q.size()).to_kind(kind);
        let forward = peak(|| {
            let z = tch::no_grad(|| attention.forward(&probe.input(&mask)));
            drop(besides(&z));
        });
        let [q, k, v] = [&probe.q, &probe.k, &probe.v].map(|x| x.copy().set_requires_grad(true));
        let leaves = Probe { q, k, v, ..probe };
        let backward = peak(|| {
            let z = attention.forward(&leaves.input(&mask));
            (besides(&z) * &pull).sum(kind).backward();
        });
        [forward, backward]
    });
    [0, 1].map(|pass| both.map(|peaks| peaks[pass]))
}

#[test]
fn memory_grows_with_the_text() {
    attn_torch::count_cpu_memory().unwrap();
    let mut failed = Vec::new();
    for variant in Variant::all() {
        // The default would take all keys of the shorter text.
        let variant = match variant {
            Variant::Indexed(_) => serde_json::from_str(
                r#"{"kind": "indexed", "n_index_heads": 1, "index_dim": 8, "top_k": 64}"#,
            )
            .unwrap(),
            other => other,
        };
        if DENSE.contains(&variant.name()) {
            continue;
        }
        // f32 runs the kernels, f64 LibTorch's operators.
        for (kind, causal) in [(Kind::Float, true), (Kind::Float, false), (Kind::Double, true)] {
            let passes = ["forward", "and backward"];
            for (pass, bytes) in
                passes.iter().zip(peaks(&variant, kind, causal, Tensor::shallow_clone))
            {
                let growth = growth(bytes);
                let line = format!(
                    "{} in {kind:?}, causal {causal}, {pass}: n^{growth:.2}, {:?} MiB",
                    variant.name(),
                    bytes.map(|bytes| bytes >> 20)
                );
                eprintln_past_the_runner(&line);
                // What is done piece by piece takes up to a few MiB, less for a short text.
                if growth > 1.1 && bytes[1] - 4 * bytes[0] > 8 << 20 {
                    failed.push(line);
                }
            }
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));

    // A byte for every pair of tokens is found.
    let window = serde_json::from_str(r#"{"kind": "window"}"#).unwrap();
    let square = |z: &Tensor| {
        let n = z.size()[2];
        let pairs = Tensor::zeros([n, n], (Kind::Uint8, Device::Cpu));
        z + pairs.get(0).get(0)
    };
    for bytes in peaks(&window, Kind::Float, true, square) {
        assert!(growth(bytes) > 1.1 && bytes[1] - 4 * bytes[0] > 8 << 20, "{bytes:?}");
    }
}

/// For who runs the test by hand with `--nocapture`.
fn eprintln_past_the_runner(line: &str) {
    #[expect(clippy::print_stderr, reason = "shown with --nocapture alone")]
    {
        eprintln!("{line}");
    }
}
