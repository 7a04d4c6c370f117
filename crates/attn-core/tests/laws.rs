//! The laws of `attn_core::laws` over every listed variant, and proof that they can be broken.

use std::num::NonZeroU32;

use attn_core::{
    Error, Variant,
    attention::{Attention, AttnInput, Dims, KvCache, Nature, State},
    laws::{self, LayerProbe, ProbeSize, Verdict},
    mask::Mask,
    testing::{Probe, assert_close, relative_rms},
    variants::{self, hedgehog, performer, routed, t2r, window_linear},
};
use tch::{Device, Kind, Tensor};

mod common;

#[test]
fn every_variant_keeps_every_law() {
    for variant in with_settings() {
        let verdicts = laws::for_layer(&variant, ProbeSize::default()).unwrap();
        // Two laws are about causal layers alone.
        let n_bidirectional = laws::LAYER_LAWS.len() - 2;
        let n_causal = if is_causal(&variant) { 2 * laws::LAYER_LAWS.len() } else { 0 };
        assert_eq!(verdicts.len(), n_bidirectional + n_causal, "{variant:?}");
        let broken: Vec<String> =
            verdicts.iter().filter(|v| !v.held()).map(Verdict::to_string).collect();
        assert!(broken.is_empty(), "{variant:?}\n{}", broken.join("\n"));
    }
}

#[test]
fn every_variant_keeps_every_law_at_odd_sizes() {
    for variant in with_settings() {
        for (seq_len, n_heads, n_kv_heads) in [(9, 1, 1), (63, 3, 1), (33, 4, 4)] {
            let size = ProbeSize { batch: 2, seq_len, n_heads, n_kv_heads, head_dim: 6 };
            for verdict in laws::for_layer(&variant, size).unwrap() {
                assert!(verdict.held(), "{variant:?} at {size:?}: {verdict}");
            }
        }
    }
}

/// Kinds that carry sums along go by chunks of at most 128 queries.
#[test]
fn kinds_that_go_by_chunks_keep_the_laws_beyond_two() {
    for settings in [
        r#"{"kind": "performer", "n_features": 8}"#,
        r#"{"kind": "t2r", "feature_dim": 7}"#,
        r#"{"kind": "window_linear", "window": 9, "feature_dim": 5}"#,
    ] {
        let variant: Variant = serde_json::from_str(settings).unwrap();
        let size = ProbeSize { batch: 2, seq_len: 260, n_heads: 1, n_kv_heads: 1, head_dim: 6 };
        for verdict in laws::for_layer(&variant, size).unwrap() {
            assert!(verdict.held(), "{settings}: {verdict}");
        }
    }
}

/// Hidden scores have the weight 0 to the last bit, so where later tokens are hidden and not summed up, no bit moves.
#[test]
fn the_past_keeps_every_bit_under_kinds_that_hide_the_future() {
    for variant in with_settings().iter().filter(|variant| is_causal(variant)) {
        let carries_sums = matches!(
            variant,
            Variant::Performer(_)
                | Variant::Hedgehog(_)
                | Variant::T2r(_)
                | Variant::WindowLinear(_)
        );
        let probe = LayerProbe::new(ProbeSize::default(), true, false, 3);
        let kind = probe.build(variant).unwrap();
        let verdict = laws::ignores_the_future(kind.as_ref(), &probe);
        let allowed = if carries_sums { 1e-12 } else { 0.0 };
        assert!(verdict.error <= allowed, "{variant:?}: {verdict}");
    }
}

/// For layers without rotations alone, so not among the others.
#[test]
fn a_single_head_of_low_rank_keeps_every_law() {
    let text = r#"{"kind": "single_head", "from": "svd", "rank": 5}"#;
    let variant: Variant = serde_json::from_str(text).unwrap();
    for causal in [true, false] {
        let probe = LayerProbe::new(ProbeSize::default(), causal, false, 1);
        let kind = probe.build(&variant).unwrap();
        for (.., law) in
            laws::LAYER_LAWS.iter().filter(|(_, needs_causal, _)| causal || !needs_causal)
        {
            let verdict = law(kind.as_ref(), &probe);
            assert!(verdict.held(), "causal {causal}: {verdict}");
        }
    }
    let rotated = LayerProbe::new(ProbeSize::default(), true, true, 1);
    assert!(matches!(rotated.build(&variant), Err(Error::Setting { field: "from", .. })));
}

#[test]
#[allow(clippy::print_stdout, reason = "says how many choices agree")]
fn lower_precision_agrees_with_f64() {
    for variant in with_settings() {
        for &causal in directions(&variant) {
            let probe = Probe::new(3, [2, 50, 50], 4, 2, causal);
            let mask = Mask::new(causal);
            let exact = built(&variant, &probe);
            let expected = exact.forward(&probe.input(&mask));
            let chosen = exact.selection(&probe.input(&mask)).map(|selection| selection.chosen);
            for (kind, tolerance) in
                [(Kind::Float, 1e-5), (Kind::Half, 5e-3), (Kind::BFloat16, 2e-2)]
            {
                let low = probe.to(kind, Device::Cpu);
                let attention = built(&variant, &low);
                // Where choices are nearly even, low precision makes others: it is held against f64's.
                let input = AttnInput { selection: chosen.as_ref(), ..low.input(&mask) };
                let z = attention.forward(&input);
                if let (Some(exact), Some(own)) = (&chosen, attention.selection(&low.input(&mask)))
                {
                    let both = exact.logical_and(&own.chosen).sum(Kind::Double);
                    let n_chosen = exact.sum(Kind::Double).double_value(&[]);
                    // A kind that may choose nothing: then neither does.
                    let overlap = match n_chosen {
                        0.0 => f64::from(u8::from(own.chosen.any().int64_value(&[]) == 0)),
                        n_chosen => both.double_value(&[]) / n_chosen,
                    };
                    println!(
                        "{variant:?} in {kind:?}: {:.1} % of the choices are f64's",
                        100.0 * overlap
                    );
                    assert!(overlap > 0.9, "{variant:?} in {kind:?}: {overlap}");
                }
                let Some(tolerance) = allowed(&variant, kind, tolerance) else {
                    assert_eq!(z.isfinite().all().int64_value(&[]), 1, "{variant:?} in {kind:?}");
                    continue;
                };
                assert_eq!(z.kind(), kind, "{variant:?}");
                assert_close(&format!("{variant:?} in {kind:?}"), &z, &expected, tolerance);
            }
        }
    }
}

#[test]
fn cuda_agrees_with_the_cpu_in_f64() {
    let device = match attn_torch::device("cuda") {
        Ok(device) => device,
        Err(error) => {
            return common::skipped("cuda_agrees_with_the_cpu_in_f64", &error.to_string());
        }
    };
    for variant in with_settings() {
        for &causal in directions(&variant) {
            let probe = Probe::new(3, [2, 50, 50], 4, 2, causal);
            let mask = Mask::new(causal);
            let exact = built(&variant, &probe);
            let expected = exact.forward(&probe.input(&mask));
            let chosen = exact.selection(&probe.input(&mask)).map(|selection| selection.chosen);
            let chosen = chosen.map(|chosen| chosen.to_device(device));
            for (kind, tolerance) in [
                (Kind::Double, 1e-12),
                (Kind::Float, 1e-5),
                (Kind::Half, 5e-3),
                (Kind::BFloat16, 2e-2),
            ] {
                let there = probe.to(kind, device);
                let input = AttnInput { selection: chosen.as_ref(), ..there.input(&mask) };
                let z = built(&variant, &there).forward(&input);
                let Some(tolerance) = allowed(&variant, kind, tolerance) else {
                    assert_eq!(
                        z.isfinite().all().int64_value(&[]),
                        1,
                        "{variant:?} in {kind:?} on CUDA"
                    );
                    continue;
                };
                assert_close(&format!("{variant:?} in {kind:?} on CUDA"), &z, &expected, tolerance);
            }
        }
    }
}

#[test]
fn settings_survive_json_and_defaults_fill_in() {
    for variant in with_settings() {
        let text = serde_json::to_string(&variant).unwrap();
        assert_eq!(serde_json::from_str::<Variant>(&text).unwrap(), variant);
        let named = format!(r#"{{"kind": "{}"}}"#, variant.name());
        assert_eq!(serde_json::from_str::<Variant>(&named).unwrap().name(), variant.name());
    }
}

#[test]
fn a_regrouped_kind_is_the_kind_built_for_the_groups() {
    for variant in with_settings() {
        let causal = is_causal(&variant);
        let whole = Probe::new(8, [2, 20, 20], 4, 4, causal);
        let groups = [vec![0i64, 2], vec![1, 3]]; // not neighbours: query heads 0 and 2 read the first
        let merge = |x: &Tensor| {
            let mean = |group: &Vec<i64>| {
                x.index_select(1, &Tensor::from_slice(group)).mean_dim(
                    [1i64].as_slice(),
                    true,
                    Kind::Double,
                )
            };
            Tensor::cat(&groups.iter().map(mean).collect::<Vec<_>>(), 1)
        };
        let mut grouped =
            Probe { k: merge(&whole.k), v: merge(&whole.v), ..whole.to(Kind::Double, Device::Cpu) };
        grouped.dims.n_kv_heads = 2;
        grouped.dims.kv_of_head = vec![0, 1, 0, 1];

        let mask = Mask::new(causal);
        let merged = built(&variant, &grouped);
        let expected = merged.forward(&grouped.input(&mask));

        // Each old head with what the head it is merged into has.
        let by_head = Probe {
            k: grouped.dims.expand_kv(&grouped.k),
            v: grouped.dims.expand_kv(&grouped.v),
            ..whole.to(Kind::Double, Device::Cpu)
        };
        let mut kind = built(&variant, &by_head);
        repeat_parameters(merged.as_ref(), kind.as_ref(), &grouped.dims);
        if matches!(variant, Variant::Latent(_)) {
            // Sums over all heads: of each, two are there now.
            kind.visit(&mut |name, tensor| {
                if !name.ends_with("bias") {
                    let _ = tch::no_grad(|| tensor.shallow_clone().g_mul_scalar_(0.5));
                }
            });
        }
        // Heads that shared a choice share it still.
        let chosen = merged.selection(&grouped.input(&mask)).map(|selection| {
            let is_shared = selection.chosen.size()[1] == grouped.dims.n_kv_heads;
            let each = Tensor::from_slice(&grouped.dims.kv_of_head);
            if !is_shared { selection.chosen } else { selection.chosen.index_select(1, &each) }
        });
        let plain = kind.forward(&AttnInput { selection: chosen.as_ref(), ..by_head.input(&mask) });
        assert_close(variant.name(), &expected, &plain, 1e-12);

        let followed = kind.regroup_kv(&groups, &grouped.dims);
        if matches!(variant, Variant::Merging(_)) {
            assert!(matches!(followed, Err(Error::Refused { .. })), "it has groups of its own");
            continue;
        }
        followed.unwrap();
        assert_close(variant.name(), &kind.forward(&grouped.input(&mask)), &expected, 1e-12);
    }
}

/// Gives `to`, built for as many key/value heads as query heads, the parameters of `from`, built for fewer. Where their
/// sizes differ, an axis counts key/value heads.
fn repeat_parameters(from: &dyn Attention, to: &dyn Attention, dims: &Dims) {
    let mut parameters = Vec::new();
    from.visit(&mut |name, tensor| parameters.push((name.to_owned(), tensor.shallow_clone())));
    let each = Tensor::from_slice(&dims.kv_of_head);
    to.visit(&mut |name, tensor| {
        let (_, mut value) = parameters
            .iter()
            .find(|(other, _)| other == name)
            .map(|(name, value)| (name, value.shallow_clone()))
            .unwrap();
        let differs = (0..).zip(value.size()).find(|&(axis, n)| tensor.size()[axis as usize] != n);
        if let Some((axis, n)) = differs {
            let (before, after) = (axis, value.dim() as i64 - axis - 1);
            let mut size = value.size();
            size.splice(axis as usize..=axis as usize, [dims.n_kv_heads, n / dims.n_kv_heads]);
            value = value.view(size.as_slice()).index_select(before, &each);
            value = value.flatten(before, -1 - after);
        }
        tch::no_grad(|| tensor.shallow_clone().copy_(&value));
    });
}

#[test]
fn a_window_as_long_as_the_text_is_softmax() {
    let probe = Probe::new(5, [2, 40, 40], 4, 2, true);
    let mask = Mask::new(true);
    let window = Variant::Window(variants::window::Config { size: NonZeroU32::new(40).unwrap() });
    let [window, softmax] = [window, Variant::default()]
        .map(|variant| built(&variant, &probe).forward(&probe.input(&mask)));
    assert_close("window of 40", &window, &softmax, 1e-12);
}

/// Attention that breaks one law on purpose.
#[derive(Debug)]
struct Broken {
    softmax: Box<dyn Attention>,
    how: How,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum How {
    SeesTheNextToken,
    CountsPadding,
    GivesNan,
    MixesTheBatch,
    ForgetsTheCache,
    LiesAboutWeights,
    DetachesTheKeys,
}

impl Attention for Broken {
    fn forward(&self, input: &AttnInput) -> Tensor {
        let z = self.softmax.forward(input);
        match self.how {
            How::SeesTheNextToken => {
                z + input.v.mean_dim([1i64, 2].as_slice(), true, Kind::Double) * 1e-6
            }
            How::CountsPadding => {
                self.softmax.forward(&AttnInput { mask: &Mask::new(input.mask.causal()), ..*input })
            }
            How::GivesNan if input.mask.keep().is_some() => z * f64::NAN,
            How::MixesTheBatch => &z + z.mean_dim([0i64].as_slice(), true, Kind::Double) * 1e-6,
            How::DetachesTheKeys => {
                self.softmax.forward(&AttnInput { k: &input.k.detach(), ..*input })
            }
            _ => z,
        }
    }

    fn weights(&self, input: &AttnInput, rows: &[i64]) -> Tensor {
        let weights = self.softmax.weights(input, rows);
        if self.how == How::LiesAboutWeights { weights * (1.0 + 1e-6) } else { weights }
    }

    fn flops(&self, n_tokens: i64) -> i64 {
        self.softmax.flops(n_tokens)
    }

    fn nature(&self) -> Nature {
        self.softmax.nature()
    }

    fn step(&self, input: &AttnInput, state: &mut dyn State) -> Tensor {
        if self.how == How::ForgetsTheCache {
            return self
                .softmax
                .forward(&AttnInput { mask: &input.mask.tail(input.k.size()[2]), ..*input });
        }
        self.softmax.step(input, state)
    }

    fn start(&self) -> Box<dyn State> {
        Box::new(KvCache::new(None))
    }

    fn select_heads(&mut self, heads: &[i64], dims: &Dims) -> Result<(), Error> {
        self.softmax.select_heads(heads, dims)
    }

    fn regroup_kv(&mut self, groups: &[Vec<i64>], dims: &Dims) -> Result<(), Error> {
        self.softmax.regroup_kv(groups, dims)
    }
}

#[test]
fn each_law_catches_the_fault_it_is_about() {
    let faults: [(How, laws::LayerLaw); 7] = [
        (How::SeesTheNextToken, laws::ignores_the_future),
        (How::CountsPadding, laws::padding_changes_nothing),
        (How::GivesNan, laws::stays_finite),
        (How::MixesTheBatch, laws::a_batch_equals_its_rows),
        (How::ForgetsTheCache, laws::steps_equal_a_full_pass),
        (How::LiesAboutWeights, laws::weights_are_coefficients),
        (How::DetachesTheKeys, laws::gradients_are_right),
    ];
    assert_eq!(faults.len(), laws::LAYER_LAWS.len(), "every law has its fault");
    for (how, law) in faults {
        let size = ProbeSize { n_kv_heads: 4, ..ProbeSize::default() };
        let probe = LayerProbe::new(size, true, false, 2);
        let softmax = probe.build(&Variant::default()).unwrap();
        assert!(
            law(softmax.as_ref(), &probe).held(),
            "softmax itself keeps the law that {how:?} breaks"
        );
        let verdict = law(&Broken { softmax, how }, &probe);
        assert!(!verdict.held(), "{how:?} went unseen: {verdict}");
    }
}

#[test]
fn a_leak_is_seen_in_every_kind() {
    for variant in with_settings().iter().filter(|variant| is_causal(variant)) {
        let probe = LayerProbe::new(ProbeSize::default(), true, false, 2);
        let kind = probe.build(variant).unwrap();
        assert!(laws::ignores_the_future(kind.as_ref(), &probe).held(), "{variant:?}");
        let verdict = laws::ignores_the_future(&Leaky(kind), &probe);
        assert!(!verdict.held(), "{variant:?}: {verdict}");
    }
}

/// A kind that is given, as each token's value, that of the second token after it.
#[derive(Debug)]
struct Leaky(Box<dyn Attention>);

impl Attention for Leaky {
    fn forward(&self, input: &AttnInput) -> Tensor {
        self.0.forward(&AttnInput { v: &input.v.roll([-2], [2]), ..*input })
    }

    fn weights(&self, input: &AttnInput, rows: &[i64]) -> Tensor {
        self.0.weights(input, rows)
    }

    fn flops(&self, n_tokens: i64) -> i64 {
        self.0.flops(n_tokens)
    }

    fn nature(&self) -> Nature {
        self.0.nature()
    }

    fn select_heads(&mut self, heads: &[i64], dims: &Dims) -> Result<(), Error> {
        self.0.select_heads(heads, dims)
    }

    fn regroup_kv(&mut self, groups: &[Vec<i64>], dims: &Dims) -> Result<(), Error> {
        self.0.regroup_kv(groups, dims)
    }
}

/// What a kind says of itself is true of it: whether it chooses, and that a text within its reach is the last that it attends to whole.
#[test]
fn a_kind_knows_its_nature() {
    let mut n_reaching = 0;
    for variant in attn_core::testing::kinds() {
        let causal = is_causal(&variant);
        let probe = Probe::new(6, [2, 40, 40], 4, 2, causal);
        let kind = built(&variant, &probe);
        let nature = kind.nature();
        let selection = kind.selection(&probe.input(&Mask::new(causal)));
        assert_eq!(nature.chooses, selection.is_some(), "{variant:?}");
        if nature.reach == 0 {
            continue;
        }
        n_reaching += 1;
        let settings = serde_json::to_value(&variant).unwrap();
        let longest = ["size", "window", "block", "select_block", "compress_block", "top_k"]
            .iter()
            .filter_map(|name| settings[name].as_i64())
            .max();
        assert!(longest.is_none_or(|longest| nature.reach >= longest), "{variant:?}: {nature:?}");
    }
    assert!(n_reaching >= 8, "{n_reaching}");
}

#[test]
fn rolling_serves_left_padding_as_no_padding() {
    let variant = Variant::Window(variants::window::Config { size: NonZeroU32::new(4).unwrap() });
    let probe = Probe::new(6, [1, 12, 12], 2, 2, true);
    let kind = built(&variant, &probe);
    let keep = Tensor::from_slice(&[0i64, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1]).view([1, 12]);
    let rolled =
        attn_core::attention::rolled(&probe.input(&Mask::with_keep(true, &keep)), kind.as_ref());
    let cut = |x: &Tensor, dim| x.narrow(dim, 3, 9);
    let bare = Probe {
        dims: probe.dims.clone(),
        hidden: cut(&probe.hidden, 1),
        q: cut(&probe.q, 2),
        k: cut(&probe.k, 2),
        v: cut(&probe.v, 2),
        positions: cut(&probe.positions, 1),
    };
    let expected = kind.forward(&bare.input(&Mask::new(true)));
    assert!(relative_rms(&cut(&rolled, 2), &expected) < 1e-12);
}

/// What a kind is held to in `kind`; `None` where a number is all that can be asked for.
///
/// Signed features divide by what may come near 0, which makes much of any rounding: with 11 bits of a number nothing can be
/// promised. It is what they are here to show.
fn allowed(variant: &Variant, kind: Kind, tolerance: f64) -> Option<f64> {
    let is_signed = matches!(variant, Variant::Performer(config)
        if config.features == performer::Features::Trigonometric);
    match (is_signed, kind) {
        (true, Kind::Half | Kind::BFloat16) => None,
        (true, _) => Some(20.0 * tolerance),
        (false, _) => Some(tolerance),
    }
}

/// Every variant with its defaults, and those with settings once more with others.
fn with_settings() -> Vec<Variant> {
    let mut variants = Variant::all();
    let size = |n| NonZeroU32::new(n).unwrap();
    variants.push(Variant::Window(variants::window::Config { size: size(5) }));
    let dilated = variants::dilated::Config { size: size(3), dilation: size(7) };
    variants.push(Variant::Dilated(dilated));
    let global = variants::global_local::Config { n_global: 3, window: size(5) };
    variants.push(Variant::GlobalLocal(global));
    variants.push(Variant::Sinks(variants::sinks::Config { n_sinks: 3, window: size(5) }));
    for (basis, settings) in [
        (r#"["shift:1"]"#, r#""place": "before""#),
        (
            r#"["window:5", "dilated:9:5", "shift:60"]"#,
            r#""coefficients": "head", "place": "before""#,
        ),
        (r#"["first:3", "window:4", "shift:50"]"#, r#""prune_below": 0.2, "l1": 0.1"#),
        (r#"["all", "shift:1", "first:2"]"#, r#""coefficients": "head", "start": 0.1"#),
    ] {
        let text = format!(r#"{{"kind": "mask_mixture", "basis": {basis}, {settings}}}"#);
        variants.push(serde_json::from_str(&text).unwrap());
    }
    for settings in [r#""scale": "head""#, r#""from": "best", "head": 0"#, r#""from": "random""#] {
        let text = format!(r#"{{"kind": "single_head", {settings}}}"#);
        variants.push(serde_json::from_str(&text).unwrap());
    }
    for features in [
        performer::Features::Positive,
        performer::Features::Hyperbolic,
        performer::Features::Relu,
        performer::Features::Trigonometric,
    ] {
        variants.push(Variant::Performer(performer::Config {
            // Signed features need many, or what they are divided by comes near 0.
            n_features: size(if features == performer::Features::Trigonometric { 1024 } else { 8 }),
            features,
            orthogonal: features != performer::Features::Hyperbolic,
            seed: 3,
            ..performer::Config::default()
        }));
    }
    for activation in [hedgehog::Activation::Softmax, hedgehog::Activation::Exp] {
        variants.push(Variant::Hedgehog(hedgehog::Config { feature_dim: size(6), activation }));
    }
    variants.push(Variant::Routed(routed::Config {
        by: routed::By::Text,
        budget: 0.3,
        price: 2.0,
    }));
    variants.push(Variant::T2r(t2r::Config { feature_dim: size(9), eps: 1e-4 }));
    variants.push(Variant::WindowLinear(window_linear::Config {
        window: size(5),
        feature_dim: size(6),
        gamma: 0.3,
    }));
    for (compress_block, select_block, n_selected, n_local, window) in
        [(4, 8, 3, 1, 5), (2, 4, 5, 2, 7)]
    {
        variants.push(Variant::Nsa(variants::nsa::Config {
            compress_block: size(compress_block),
            compress_stride: size(2),
            select_block: size(select_block),
            n_selected: size(n_selected),
            n_initial: 1,
            n_local: size(n_local),
            window: size(window),
            gates: [0.25, 0.5, 0.25],
        }));
    }
    for (block, top_k) in [(4, 3), (8, 2)] {
        let (block, top_k) = (size(block), size(top_k));
        variants.push(Variant::Moba(variants::moba::Config { block, top_k }));
    }
    for (block, n_window) in [(3, 3), (5, 1)] {
        variants.push(Variant::BigBird(variants::big_bird::Config {
            block: size(block),
            n_global: 1,
            n_window: size(n_window),
            n_random: 2,
            seed: 1,
        }));
    }
    for top_k in [3, 9] {
        variants.push(Variant::Indexed(variants::indexed::Config {
            n_index_heads: size(2),
            index_dim: size(5),
            top_k: size(top_k),
        }));
    }
    variants
}

/// Whether the kind serves causal layers; all do but cross-attention and heads chosen by the whole text.
fn is_causal(variant: &Variant) -> bool {
    match variant {
        Variant::Cross(_) => false,
        Variant::Routed(config) => config.by == routed::By::Token,
        _ => true,
    }
}

/// Causal and bidirectional, as far as the kind serves them.
fn directions(variant: &Variant) -> &'static [bool] {
    if is_causal(variant) { &[true, false] } else { &[false] }
}

/// The variant for the probe's layer, its own parameters drawn alike in every precision.
fn built(variant: &Variant, probe: &Probe) -> Box<dyn Attention> {
    probe.build(variant)
}
