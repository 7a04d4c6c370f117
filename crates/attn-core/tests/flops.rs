//! What kinds say they cost, against what they do: keys that weigh something, numbers that a decoding state holds, entries of
//! matrices.

use attn_core::{
    Error, Variant,
    attention::{Attention, Dims},
    laws::{LayerProbe, ProbeSize},
    mask::Mask,
    testing::Probe,
    variants::{performer::Features, routed},
};
use tch::{Device, Kind, Tensor};

/// Settings beside the defaults, at which few tokens are more than a kind sees.
const SETTINGS: [&str; 31] = [
    r#"{"kind": "merging", "kv_heads": 2}"#,
    r#"{"kind": "merging", "by": "scalars"}"#,
    r#"{"kind": "merging", "kv_heads": 2, "groups": [[0, 3], [2, 1]]}"#,
    r#"{"kind": "routed", "by": "text"}"#,
    r#"{"kind": "window", "size": 1}"#,
    r#"{"kind": "window", "size": 8}"#,
    r#"{"kind": "dilated", "size": 4, "dilation": 3}"#,
    r#"{"kind": "global_local", "n_global": 5, "window": 3}"#,
    r#"{"kind": "global_local", "n_global": 9, "window": 20}"#,
    r#"{"kind": "sinks", "n_sinks": 4, "window": 6}"#,
    r#"{"kind": "sinks", "n_sinks": 100, "window": 2}"#,
    r#"{"kind": "mask_mixture", "basis": ["shift:2", "dilated:5:3", "first:4", "window:3"]}"#,
    r#"{"kind": "mask_mixture", "basis": ["shift:-3", "first:2"]}"#,
    r#"{"kind": "mask_mixture", "basis": ["all", "shift:1"]}"#,
    r#"{"kind": "single_head", "from": "best", "head": 1}"#,
    r#"{"kind": "single_head", "from": "svd", "rank": 5}"#,
    r#"{"kind": "single_head", "from": "random"}"#,
    r#"{"kind": "single_head", "from": "svd", "rank": 11}"#,
    r#"{"kind": "performer", "n_features": 7, "features": "hyperbolic"}"#,
    r#"{"kind": "performer", "n_features": 7, "features": "relu"}"#,
    r#"{"kind": "hedgehog", "feature_dim": 5}"#,
    r#"{"kind": "t2r", "feature_dim": 5}"#,
    r#"{"kind": "window_linear", "window": 8, "feature_dim": 5}"#,
    r#"{"kind": "window_linear", "window": 40, "feature_dim": 3}"#,
    r#"{"kind": "moba", "block": 8, "top_k": 2}"#,
    r#"{"kind": "big_bird", "block": 5, "n_global": 1, "n_window": 3, "n_random": 2}"#,
    r#"{"kind": "big_bird", "block": 3, "n_global": 0, "n_window": 1, "n_random": 4}"#,
    r#"{"kind": "moba", "block": 7, "top_k": 1}"#,
    r#"{"kind": "indexed", "n_index_heads": 3, "index_dim": 5, "top_k": 6}"#,
    r#"{"kind": "nsa", "compress_block": 4, "compress_stride": 2, "select_block": 8, "n_selected": 3,
        "n_initial": 1, "n_local": 1, "window": 5}"#,
    r#"{"kind": "nsa", "compress_block": 8, "compress_stride": 8, "select_block": 8, "n_selected": 4,
        "n_initial": 0, "n_local": 2, "window": 70}"#,
];

#[test]
fn kinds_cost_what_they_do() {
    let more = SETTINGS.map(|settings| serde_json::from_str(settings).unwrap());
    let mut n_compared = 0;
    for variant in Variant::all().into_iter().chain(more) {
        for (n_heads, n_kv_heads) in [(4, 4), (4, 2), (3, 1)] {
            for n in [1, 7, 56, 64] {
                for causal in [true, false] {
                    let probe = Probe::new(11, [1, n, n], n_heads, n_kv_heads, causal);
                    let Some(kind) = built(&variant, &probe) else { continue };
                    let expected = done(&variant, kind.as_ref(), &probe);
                    let name = format!(
                        "{variant:?}, {n_heads}/{n_kv_heads} heads, {n} tokens, causal {causal}"
                    );
                    assert_eq!(kind.flops(n), expected, "{name}");
                    n_compared += 1;
                }
            }
        }
    }
    assert!(n_compared > 900, "{n_compared}");
}

/// The kind, where it serves such a layer.
fn built(variant: &Variant, probe: &Probe) -> Option<Box<dyn Attention>> {
    let Dims { n_heads, n_kv_heads, head_dim, causal, .. } = probe.dims;
    let size = ProbeSize { n_heads, n_kv_heads, head_dim, ..ProbeSize::default() };
    match LayerProbe::new(size, causal, false, 1).build(variant) {
        Err(Error::Refused { .. } | Error::Setting { .. }) => None,
        served => served.map(|_| probe.build(variant)).ok(),
    }
}

/// Operations, counted on a pass over the probe.
fn done(variant: &Variant, kind: &dyn Attention, probe: &Probe) -> i64 {
    let mask = Mask::new(probe.dims.causal);
    let input = probe.input(&mask);
    let (n, d) = (probe.q.size()[2], probe.dims.head_dim);
    let rows: Vec<i64> = (0..n).collect();
    let count = |x: Tensor| x.count_nonzero(None::<i64>).int64_value(&[]);
    // A weight costs a product of q and k, and one with v.
    let pairs = || count(kind.weights(&input, &rows));
    let mut matrices = 0; // entries of all
    kind.visit(&mut |_, tensor| {
        matrices += if tensor.dim() >= 2 { tensor.numel() as i64 } else { 0 };
    });
    match variant {
        Variant::External(_) => unreachable!("none is registered here"),
        Variant::Softmax(_)
        | Variant::Cross(_)
        | Variant::Window(_)
        | Variant::Dilated(_)
        | Variant::GlobalLocal(_)
        | Variant::BigBird(_)
        | Variant::Sinks(_)
        | Variant::MaskMixture(_) => 4 * d * pairs(),
        // Each entry of a matrix meets every token.
        Variant::Gated(_) | Variant::Latent(_) => 4 * d * pairs() + 2 * matrices * n,
        // Each entry of a matrix meets every token, and so do scalars, once a channel.
        Variant::Merging(config) => {
            use attn_core::variants::merging::By;
            let scaled = match config.by {
                By::Matrices => 0,
                By::Scalars => 2 * probe.dims.n_kv_heads * d,
            };
            4 * d * pairs() + 2 * matrices * n + 2 * scaled * n
        }
        // As if every head ran; by text the router reads once.
        Variant::Routed(config) => {
            let n_choices = if config.by == routed::By::Text { 1 } else { n };
            let seen = count(mask.allowed(n, n, Device::Cpu)) * probe.dims.n_heads;
            4 * d * seen + 2 * matrices * n_choices
        }
        Variant::SingleHead(config) => {
            use attn_core::variants::single_head::From;
            let width = match config.from {
                From::Sum => probe.dims.n_kv_heads * d,
                From::Best => d,
                From::Svd => config.rank.into(),
                From::Random => probe.dims.n_heads * d,
            };
            let of_one = pairs() / probe.dims.n_heads;
            2 * (width + probe.dims.n_kv_heads * d) * of_one + 2 * matrices * n
        }
        Variant::Performer(config) => {
            let columns = i64::from(config.n_features.get());
            match config.features {
                Features::Positive | Features::Relu => linear(kind, probe, columns, columns),
                Features::Hyperbolic | Features::Trigonometric => {
                    linear(kind, probe, columns, 2 * columns)
                }
            }
        }
        Variant::Hedgehog(config) => {
            let columns = i64::from(config.feature_dim.get());
            linear(kind, probe, columns, 2 * columns)
        }
        Variant::T2r(config) => {
            let columns = i64::from(config.feature_dim.get());
            linear(kind, probe, columns, columns)
        }
        Variant::WindowLinear(config) => {
            let window = i64::from(config.window.get());
            let near = |i: i64, j: i64| (i - j).abs() < window;
            let sees = |i: i64, j: i64| !probe.dims.causal || j <= i;
            let of = |i: i64| rows.iter().map(move |&j| (i, j));
            let all: Vec<(i64, i64)> = rows.iter().flat_map(|&i| of(i)).collect();
            let n_near = all.iter().filter(|&&(i, j)| near(i, j) && sees(i, j)).count() as i64;
            let is_far = |&(i, j): &(i64, i64)| !near(i, j) && sees(i, j);
            let far: Vec<(i64, i64)> = all.into_iter().filter(is_far).collect();
            let n_of = |of: fn(&(i64, i64)) -> i64| {
                let mut tokens: Vec<i64> = far.iter().map(of).collect();
                tokens.sort_unstable();
                tokens.dedup();
                tokens.len() as i64
            };
            let m = 2 * i64::from(config.feature_dim.get());
            let state = probe.dims.n_heads * m * (d + 1);
            4 * d * probe.dims.n_heads * n_near
                + 2 * matrices * n
                + 2 * state * (n_of(|pair| pair.0) + n_of(|pair| pair.1))
        }
        Variant::Moba(config) => {
            let block = i64::from(config.block.get());
            let n_blocks = (n + block - 1) / block;
            let others = |query: i64| match probe.dims.causal {
                true => (0..n_blocks).filter(|b| (b + 1) * block <= query).count() as i64,
                false => n_blocks - 1,
            };
            let compared = match n_blocks > config.top_k.get().into() {
                true => rows.iter().map(|&query| others(query)).sum::<i64>(),
                false => 0,
            };
            4 * d * at_most(pairs(), probe, block, config.top_k.get())
                + 2 * d * probe.dims.n_heads * compared
        }
        Variant::Indexed(config) => {
            let (heads, width) = (config.n_index_heads.get(), config.index_dim.get());
            let [heads, width] = [heads, width].map(i64::from);
            let seen = count(mask.allowed(n, n, Device::Cpu).expand([1, 1, n, n], false));
            let weighed = 4 * d * pairs();
            match i64::from(config.top_k.get()) < n {
                true => weighed + 2 * matrices * n + 2 * seen * (heads * width + heads),
                false => weighed + 2 * width * probe.dims.hidden_size * n,
            }
        }
        Variant::Nsa(config) => {
            let (l, stride) = (config.compress_block.get(), config.compress_stride.get());
            let [l, stride] = [l, stride].map(i64::from);
            let ends: Vec<i64> = (0..n)
                .step_by(stride as usize)
                .map(|first| first + l)
                .filter(|&end| end <= n)
                .collect();
            let sees = |query: i64, end: i64| !probe.dims.causal || end <= query + 1;
            let summarized = rows
                .iter()
                .map(|&query| ends.iter().filter(|&&end| sees(query, end)).count() as i64)
                .sum::<i64>();
            let block = i64::from(config.select_block.get());
            let chosen = kind.selection(&input).unwrap().chosen; // [1, kv, n, blocks]
            let place = Tensor::arange(n, (Kind::Int64, Device::Cpu));
            let keys = chosen.index_select(-1, &place.divide_scalar_mode(block, "floor"));
            let keys = count(keys.logical_and(&mask.allowed(n, n, Device::Cpu)));
            let selected = at_most(
                keys * probe.dims.n_heads / probe.dims.n_kv_heads,
                probe,
                block,
                config.n_selected.get(),
            );
            let window = i64::from(config.window.get());
            let near = |i: i64, j: &i64| (i - j).abs() < window && (!probe.dims.causal || *j <= i);
            let near: i64 =
                rows.iter().map(|&i| rows.iter().filter(|j| near(i, j)).count() as i64).sum();
            let mut of_tokens = 0;
            let mut of_summaries = 0;
            kind.visit(&mut |name, tensor| match name {
                name if name.contains("gate.weight") || name.contains("branch") => {
                    of_tokens += tensor.numel() as i64;
                }
                name if name.contains("inner") || name.contains("outer") => {
                    of_summaries += tensor.numel() as i64;
                }
                _ => {}
            });
            4 * d * (probe.dims.n_heads * (summarized + near) + selected)
                + 2 * of_tokens * n
                + 2 * of_summaries * probe.dims.n_kv_heads * ends.len() as i64
        }
    }
}

/// Pairs with chosen keys; where the last block is short and may be left out, what whole blocks have.
fn at_most(pairs: i64, probe: &Probe, block: i64, n_chosen: u32) -> i64 {
    let n = probe.q.size()[2];
    let whole = i64::from(n_chosen) * block;
    if probe.dims.causal || n % block == 0 || whole >= n {
        return pairs;
    }
    let most = probe.dims.n_heads * n * whole;
    assert!(pairs <= most && pairs > most - probe.dims.n_heads * n * block, "{pairs} of {most}");
    most
}

/// Of every number of the decoding state: a key's feature times a channel of its value, for each token, and a query's times the
/// number, for each query head that reads it. And the map of `columns` that makes `m` features, of queries and of keys.
fn linear(kind: &dyn Attention, probe: &Probe, columns: i64, m: i64) -> i64 {
    let (n, d, n_heads) = (probe.q.size()[2], probe.dims.head_dim, probe.dims.n_heads);
    let mut state = kind.start();
    let _z = kind.step(&probe.input(&Mask::new(true)), state.as_mut());
    let held = (state.bytes() / 8) as i64; // of f64
    // Sums of head_dim channels and of ones for each feature, and a log factor a head where there is one.
    let heads = held / (m * (d + 1));
    let sums = heads * m * (d + 1);
    assert!([sums, sums + heads].contains(&held), "{held} numbers are no state of {heads} heads");
    2 * n * (sums + n_heads * sums / heads + (n_heads + heads) * d * columns)
}
