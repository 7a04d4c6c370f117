//! What every attention kind and every model owes its callers, as functions: tests run them over everything listed,
//! training runs a cheap few before it starts, and users run them on their own checkpoints.
//!
//! A law takes a subject and says whether it holds, by how much it is off, and where. [`for_layer`] judges one
//! attention kind on random projections in `f64`; [`for_model`] judges a whole model on a batch of ids, by the laws that are cheap
//! enough for every start.

mod model;

use tch::{Kind, Tensor};

pub use model::*;

use crate::{
    Error,
    attention::{self, Attention, AttnInput, Dims, Masks, Own, Projections, Stream},
    mask::Mask,
    rotary::{Rotary, Scaling},
    variants::Variant,
    weights::Weights,
};

/// What a law found.
#[derive(Debug, Clone, PartialEq)]
pub struct Verdict {
    /// The law, as a sentence in snake case.
    pub law: &'static str,
    /// The largest relative rms error found; NaN where an output was not finite.
    pub error: f64,
    /// The largest allowed.
    pub tolerance: f64,
    /// Where the largest error was.
    pub place: String,
}

impl Verdict {
    /// Whether the law holds.
    pub fn held(&self) -> bool {
        self.error <= self.tolerance
    }

    /// Of two verdicts on one law the worse.
    #[must_use]
    pub fn or_worse(self, other: Self) -> Self {
        if other.error > self.error || other.error.is_nan() { other } else { self }
    }
}

impl std::fmt::Display for Verdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let word = if self.held() { "held" } else { "BROKEN" };
        write!(
            f,
            "{} {word}: error {:.2e}, allowed {:.0e}, {}",
            self.law, self.error, self.tolerance, self.place
        )
    }
}

/// `rms(actual − expected) / rms(expected)`, of at least one value.
fn relative_rms(actual: &Tensor, expected: &Tensor) -> f64 {
    let wide = |x: &Tensor| x.detach().to_device(tch::Device::Cpu).to_kind(Kind::Double);
    let rms = |x: Tensor| x.square().mean(Kind::Double).sqrt().double_value(&[]);
    let (error, scale) = (rms(wide(actual) - wide(expected)), rms(wide(expected)));
    if scale > 0.0 { error / scale } else { error }
}

/// Where there was no error at all.
pub const NOWHERE: &str = "nowhere";

/// Keeps the worst of several errors. NaN is worse than anything.
struct Worst {
    error: f64,
    place: String,
}

impl Worst {
    fn new() -> Self {
        Self { error: 0.0, place: NOWHERE.into() }
    }

    fn see(&mut self, error: f64, place: impl FnOnce() -> String) {
        if error > self.error || error.is_nan() {
            (self.error, self.place) = (error, place());
        }
    }

    fn verdict(self, law: &'static str, tolerance: f64) -> Verdict {
        Verdict { law, error: self.error, tolerance, place: self.place }
    }
}

/// One attention kind on random input, the subject of [`for_layer`].
#[derive(Debug)]
pub struct LayerProbe {
    dims: Dims,
    hidden: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    /// Where the layer rotates, by the positions.
    tables: Option<(Tensor, Tensor)>,
    projections: Projections,
}

/// Sizes of a [`LayerProbe`]. Choose `seq_len` larger than what the kind attends to, or a law says nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProbeSize {
    /// Examples; at least 2.
    pub batch: i64,
    /// Tokens; at least 8.
    pub seq_len: i64,
    /// Query heads.
    pub n_heads: i64,
    /// Key/value heads; divides `n_heads`.
    pub n_kv_heads: i64,
    /// Channels a head.
    pub head_dim: i64,
}

impl Default for ProbeSize {
    fn default() -> Self {
        Self { batch: 3, seq_len: 80, n_heads: 4, n_kv_heads: 2, head_dim: 6 }
    }
}

impl LayerProbe {
    /// Random hidden states, q, k, v and projections of `size`; `rotary` says whether q and k pass for rotated ones.
    pub fn new(size: ProbeSize, causal: bool, rotary: bool, seed: u64) -> Self {
        let ProbeSize { batch, seq_len, n_heads, n_kv_heads, head_dim } = size;
        let hidden_size = n_heads * head_dim;
        let mut draw = normals(seed);
        let mut project = |heads: i64| {
            let weight = draw(&[heads * head_dim, hidden_size]) * (hidden_size as f64).powf(-0.5);
            (weight, Some(draw(&[heads * head_dim])))
        };
        let projections =
            Projections { q: project(n_heads), k: project(n_kv_heads), v: project(n_kv_heads) };
        let positions = Tensor::arange(seq_len, (Kind::Int64, tch::Device::Cpu)).unsqueeze(0);
        let tables = rotary.then(|| {
            Rotary::new(head_dim, 10_000.0, &Scaling::None).tables(&positions, Kind::Double)
        });
        let expanded = |x: &Tensor| x.expand([batch, 1, seq_len, head_dim], false);
        Self {
            tables: tables.map(|(cos, sin)| (expanded(&cos), expanded(&sin))),
            hidden: draw(&[batch, seq_len, hidden_size]),
            // Laid out as a layer cuts them from its projections: not contiguous.
            q: draw(&[batch, seq_len, n_heads, head_dim]).transpose(1, 2),
            k: draw(&[batch, seq_len, n_kv_heads, head_dim]).transpose(1, 2),
            v: draw(&[batch, seq_len, n_kv_heads, head_dim]).transpose(1, 2),
            projections,
            dims: Dims {
                hidden_size,
                n_heads,
                n_kv_heads,
                head_dim,
                kv_of_head: (0..n_heads).map(|head| head * n_kv_heads / n_heads).collect(),
                scale: (head_dim as f64).powf(-0.5),
                causal,
                rotary,
                max_len: None,
            },
        }
    }

    /// Builds `variant` for the probe, its own parameters moved away from where they start: at its start a kind may be
    /// the identity in disguise.
    ///
    /// # Errors
    /// Where the settings do not fit the probe.
    pub fn build(&self, variant: &Variant) -> Result<Box<dyn Attention>, Error> {
        let mut weights = Weights::from_seed(7, Kind::Double, tch::Device::Cpu);
        let kind =
            variant.build(&self.dims, &self.projections, &mut Own::new(&mut weights, "probe"))?;
        let mut draw = normals(8);
        kind.visit(&mut |_, tensor| {
            tch::no_grad(|| tensor.shallow_clone().copy_(&(tensor + draw(&tensor.size()) * 0.3)));
        });
        Ok(kind)
    }

    fn n_tokens(&self) -> i64 {
        self.hidden.size()[1]
    }

    fn select(&self, pick: impl Fn(&Tensor, i64) -> Tensor) -> Self {
        Self {
            dims: self.dims.clone(),
            hidden: pick(&self.hidden, 1),
            q: pick(&self.q, 2),
            k: pick(&self.k, 2),
            v: pick(&self.v, 2),
            // A token takes its place along.
            tables: self.tables.as_ref().map(|(cos, sin)| (pick(cos, 2), pick(sin, 2))),
            projections: Projections {
                q: copy(&self.projections.q),
                k: copy(&self.projections.k),
                v: copy(&self.projections.v),
            },
        }
    }

    fn with_input<T>(&self, mask: &Mask, f: impl FnOnce(&AttnInput) -> T) -> T {
        let [b, n, _] = self.hidden.size()[..] else {
            unreachable!("hidden states have three axes")
        };
        let positions =
            Tensor::arange(n, (Kind::Int64, self.hidden.device())).expand([b, n], false);
        f(&AttnInput {
            hidden: &self.hidden,
            q: &self.q,
            k: &self.k,
            v: &self.v,
            rotary: self.tables.as_ref(),
            positions: &positions,
            mask,
            source: None,
            dropout: 0.0,
            train: false,
            stream: Stream::default(),
            selection: None,
        })
    }

    /// z, with rows rolled for kinds that need it, as a layer does.
    fn z(&self, kind: &dyn Attention, mask: &Mask) -> Tensor {
        self.with_input(mask, |input| match kind.masks() {
            Masks::Contiguous => attention::rolled(input, kind),
            Masks::Any => kind.forward(input),
        })
    }
}

fn copy((weight, bias): &(Tensor, Option<Tensor>)) -> (Tensor, Option<Tensor>) {
    (weight.shallow_clone(), bias.as_ref().map(Tensor::shallow_clone))
}

/// Draws standard normal `f64` tensors, one after the other, from a generator of its own.
fn normals(seed: u64) -> impl FnMut(&[i64]) -> Tensor {
    use rand::SeedableRng;
    use rand_distr::{Distribution, StandardNormal};
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    move |size: &[i64]| {
        let n: i64 = size.iter().product();
        let values: Vec<f64> = (0..n).map(|_| StandardNormal.sample(&mut rng)).collect();
        Tensor::from_slice(&values).view(size)
    }
}

/// A law of one attention kind: the kind, built for the probe, and the probe.
pub type LayerLaw = fn(&dyn Attention, &LayerProbe) -> Verdict;

/// The laws of attention kinds. Those about the future hold for causal probes alone.
pub const LAYER_LAWS: &[(&str, bool, LayerLaw)] = &[
    ("a_causal_output_ignores_the_future", true, ignores_the_future),
    ("padding_changes_nothing", false, padding_changes_nothing),
    ("a_query_that_sees_no_key_stays_finite", false, stays_finite),
    ("a_batch_equals_its_rows", false, a_batch_equals_its_rows),
    ("steps_equal_a_full_pass", true, steps_equal_a_full_pass),
    ("weights_are_the_coefficients_of_v", false, weights_are_coefficients),
    ("gradients_are_those_of_finite_differences", false, gradients_are_right),
];

/// Every law of an attention kind, on probes of `size`: causal, causal with rotary embeddings, bidirectional; of a kind
/// that refuses some of these layers ([`Error::Refused`]), on the others.
///
/// # Errors
/// Where the settings do not fit the probe, or the kind refuses every one.
pub fn for_layer(variant: &Variant, size: ProbeSize) -> Result<Vec<Verdict>, Error> {
    let mut verdicts = Vec::new();
    let mut refusal = None;
    for (causal, rotary) in [(true, false), (true, true), (false, false)] {
        let probe = LayerProbe::new(size, causal, rotary, 1);
        let kind = match probe.build(variant) {
            Err(error @ Error::Refused { .. }) => {
                refusal = Some(error);
                continue;
            }
            built => built?,
        };
        let laws = LAYER_LAWS.iter().filter(|(_, needs_causal, _)| causal || !needs_causal);
        verdicts.extend(laws.map(|(.., law)| {
            let verdict = law(kind.as_ref(), &probe);
            let place = format!("{}, causal {causal}, rotary {rotary}", verdict.place);
            Verdict { place, ..verdict }
        }));
    }
    match refusal {
        Some(refusal) if verdicts.is_empty() => Err(refusal),
        _ => Ok(verdicts),
    }
}

/// Changes keys, values and hidden states from token t on: outputs before t must not move.
pub fn ignores_the_future(kind: &dyn Attention, probe: &LayerProbe) -> Verdict {
    let n = probe.n_tokens();
    let mask = Mask::new(true);
    let before = probe.z(kind, &mask);
    let mut worst = Worst::new();
    for t in [1, n / 2, n - 1] {
        let changed = probe.select(|x, dim| {
            let x = x.copy();
            let _ = x.narrow(dim, t, n - t).fill_(9.0);
            x
        });
        let after = changed.z(kind, &mask);
        let past = |z: &Tensor| z.narrow(2, 0, t);
        worst.see(relative_rms(&past(&after), &past(&before)), || {
            format!("before token {t} of {n}")
        });
    }
    worst.verdict("a_causal_output_ignores_the_future", 1e-12)
}

/// Pads each row by another amount, in front, behind and on both sides: outputs of real tokens must not move.
pub fn padding_changes_nothing(kind: &dyn Attention, probe: &LayerProbe) -> Verdict {
    let [b, n, _] = probe.hidden.size()[..] else { unreachable!("hidden states have three axes") };
    let plain = probe.z(kind, &Mask::new(probe.dims.causal));
    let mut worst = Worst::new();
    type Pads = fn(i64) -> [i64; 2]; // of a row: how many before, how many behind
    let sides: [(&str, Pads); 3] = [
        ("left", |row| [2 * row + 1, 0]),
        ("right", |row| [0, 2 * row + 1]),
        ("both sides", |row| [row + 1, row]),
    ];
    for (name, pads) in sides {
        let widest =
            (0..b).map(|row| pads(row).iter().sum::<i64>()).max().expect("a probe has rows");
        let place = |row: i64| [pads(row)[0], n, widest - pads(row)[0]];
        let padded = probe.select(|x, dim| {
            let rows: Vec<Tensor> = (0..b)
                .map(|row| {
                    let x = x.narrow(0, row, 1);
                    let [before, _, behind] = place(row);
                    let filler = |len: i64| {
                        let mut size = x.size();
                        size[dim as usize] = len;
                        Tensor::full(&size, 5.0, (x.kind(), x.device()))
                    };
                    Tensor::cat(&[filler(before), x.shallow_clone(), filler(behind)], dim)
                })
                .collect();
            Tensor::cat(&rows, 0)
        });
        let keep: Vec<Tensor> = (0..b)
            .map(|row| {
                let [before, _, _] = place(row);
                let keep = Tensor::zeros([1, n + widest], (Kind::Int64, probe.hidden.device()));
                let _ = keep.narrow(1, before, n).fill_(1);
                keep
            })
            .collect();
        let z = padded.z(kind, &Mask::with_keep(probe.dims.causal, &Tensor::cat(&keep, 0)));
        for row in 0..b {
            let real = z.get(row).narrow(1, place(row)[0], n);
            worst.see(relative_rms(&real, &plain.get(row)), || {
                format!("row {row}, padded on the {name}")
            });
        }
    }
    worst.verdict("padding_changes_nothing", 1e-12)
}

/// Hides every key of one row, and the first keys of another: every output must be a number.
pub fn stays_finite(kind: &dyn Attention, probe: &LayerProbe) -> Verdict {
    let [b, n, _] = probe.hidden.size()[..] else { unreachable!("hidden states have three axes") };
    let keep = Tensor::ones([b, n], (Kind::Int64, probe.hidden.device()));
    let _ = keep.get(0).fill_(0);
    let _ = keep.get(1).narrow(0, 0, 5).fill_(0);
    let z = probe.z(kind, &Mask::with_keep(probe.dims.causal, &keep));
    let n_wrong = z.isfinite().logical_not().sum(Kind::Int64).double_value(&[]);
    Verdict {
        law: "a_query_that_sees_no_key_stays_finite",
        error: n_wrong,
        tolerance: 0.0,
        place: "values that are not finite".into(),
    }
}

/// Runs each row alone.
pub fn a_batch_equals_its_rows(kind: &dyn Attention, probe: &LayerProbe) -> Verdict {
    let mask = Mask::new(probe.dims.causal);
    let together = probe.z(kind, &mask);
    let mut worst = Worst::new();
    for row in 0..together.size()[0] {
        let alone = probe.select(|x, _| x.narrow(0, row, 1)).z(kind, &mask);
        worst.see(relative_rms(&alone.get(0), &together.get(row)), || format!("row {row}"));
    }
    worst.verdict("a_batch_equals_its_rows", 1e-12)
}

/// Decodes: a first piece at once, then token by token, and compares with the full pass.
pub fn steps_equal_a_full_pass(kind: &dyn Attention, probe: &LayerProbe) -> Verdict {
    let n = probe.n_tokens();
    let mask = Mask::new(true);
    let full = probe.z(kind, &mask);
    let mut worst = Worst::new();
    let mut state = kind.start();
    let first = n / 3;
    for (start, len) in std::iter::once((0, first)).chain((first..n).map(|at| (at, 1))) {
        let piece = probe.select(|x, dim| x.narrow(dim, start, len));
        let positions =
            Tensor::arange_start(start, start + len, (Kind::Int64, probe.hidden.device()));
        let positions = positions.expand([probe.hidden.size()[0], len], false);
        let z = piece.with_input(&mask, |input| {
            kind.step(&AttnInput { positions: &positions, ..*input }, state.as_mut())
        });
        worst.see(relative_rms(&z, &full.narrow(2, start, len)), || {
            format!("tokens {start} to {}", start + len)
        });
    }
    worst.verdict("steps_equal_a_full_pass", 1e-12)
}

/// z must be linear in v with the weights as its coefficients. Of kinds with values of their own
/// ([`Attention::has_own_values`]) z is not a function of v alone: they compare their weights with their definition.
pub fn weights_are_coefficients(kind: &dyn Attention, probe: &LayerProbe) -> Verdict {
    if kind.has_own_values() {
        let place = "the kind has values of its own".into();
        return Verdict {
            law: "weights_are_the_coefficients_of_v",
            error: 0.0,
            tolerance: 1e-12,
            place,
        };
    }
    let n = probe.n_tokens();
    let mask = Mask::new(probe.dims.causal);
    let rows = [0, n / 2, n - 1];
    let weights = probe.with_input(&mask, |input| kind.weights(input, &rows)); // [b, h, rows, k]
    let expected = weights.matmul(&probe.dims.expand_kv(&probe.v));
    let z = probe.z(kind, &mask).index_select(2, &Tensor::from_slice(&rows));
    let mut worst = Worst::new();
    for (slot, row) in (0..).zip(rows) {
        let error = relative_rms(&expected.select(2, slot), &z.select(2, slot));
        worst.see(error, || format!("query {row} of {n}"));
    }
    worst.verdict("weights_are_the_coefficients_of_v", 1e-12)
}

/// How far choices must be apart for a step of finite differences not to change them.
const CLEAR: f64 = 1e-3;

/// The queries whose choices are clear, `[batch, 1, q_len, 1]` of ones and zeros; `None` where nothing is chosen.
fn clear_queries(kind: &dyn Attention, input: &AttnInput) -> Option<Tensor> {
    let margin = kind.selection(input)?.margin; // [b, groups, q]
    Some(margin.gt(CLEAR).all_dim(1, true).unsqueeze(-1).to_kind(Kind::Double))
}

/// Moves q, k, v, hidden states and the kind's own parameters along random directions and compares the change of a
/// random functional of z with what the gradient promises. Of kinds that choose, queries count whose choices are clear,
/// and the gradient must be that of the kind with its choices imposed: none flows through them.
pub fn gradients_are_right(kind: &dyn Attention, probe: &LayerProbe) -> Verdict {
    // A kink (that of a ReLU) between the two points spoils a difference; smaller steps pass it by. A wrong gradient is
    // wrong at every step.
    const STEPS: [f64; 4] = [1e-5, 1e-6, 1e-7, 1e-8];
    const TOLERANCE: f64 = 1e-7;
    let mask = Mask::new(probe.dims.causal);
    let mut draw = normals(9);
    let mut pull = draw(&probe.q.size());
    let mut worst = Worst::new();
    let clear = probe.with_input(&mask, |input| clear_queries(kind, input));
    if let Some(clear) = &clear {
        pull *= clear;
        if clear.mean(Kind::Double).double_value(&[]) < 0.05 {
            worst.see(f64::NAN, || "too few choices are clear to say anything".into());
        }
    }
    let value = |probe: &LayerProbe| (probe.z(kind, &mask) * &pull).sum(Kind::Double);

    let leaf = probe.select(|x, _| x.copy().set_requires_grad(true));
    let mut own = Vec::new();
    kind.visit(&mut |name, tensor| {
        let _ = tensor.set_requires_grad(true);
        own.push((name.to_owned(), tensor.shallow_clone()));
    });
    tch::with_grad(|| value(&leaf).backward());

    let mut compare = |name: &str, tensor: &Tensor, at: &dyn Fn() -> f64| {
        let direction = draw(&tensor.size());
        let promised = if tensor.grad().defined() {
            (tensor.grad() * &direction).sum(Kind::Double).double_value(&[])
        } else {
            0.0
        };
        let start = tensor.detach().copy();
        let moved = |by: f64| {
            tch::no_grad(|| tensor.shallow_clone().copy_(&(&start + &direction * by)));
            at()
        };
        let mut least = f64::NAN;
        for step in STEPS {
            let seen = (moved(step) - moved(-step)) / (2.0 * step);
            let scale = promised.abs().max(seen.abs()).max(1.0);
            least = least.min((promised - seen).abs() / scale);
            if least <= TOLERANCE {
                break;
            }
        }
        moved(0.0);
        worst.see(least, || format!("along {name}"));
    };
    let at = || tch::no_grad(|| value(&leaf).double_value(&[]));
    for (name, tensor) in [("hidden", &leaf.hidden), ("q", &leaf.q), ("k", &leaf.k), ("v", &leaf.v)]
    {
        compare(name, tensor, &at);
    }
    for (name, tensor) in &own {
        compare(name, tensor, &at);
        let mut tensor = tensor.set_requires_grad(false);
        tensor.zero_grad();
    }
    if clear.is_some() {
        through_choices(kind, probe, &pull, &leaf, &mut worst);
    }
    // Central differences: a truncation of order step² and a rounding of order 1e-16 / step.
    worst.verdict("gradients_are_those_of_finite_differences", TOLERANCE)
}

/// Compares the gradients in `leaf` with those of the kind when its choices are imposed.
fn through_choices(
    kind: &dyn Attention,
    probe: &LayerProbe,
    pull: &Tensor,
    leaf: &LayerProbe,
    worst: &mut Worst,
) {
    let mask = Mask::new(probe.dims.causal);
    let imposed = probe.select(|x, _| x.copy().set_requires_grad(true));
    imposed.with_input(&mask, |input| {
        let chosen = kind.selection(input).expect("the kind chooses").chosen;
        tch::with_grad(|| {
            let z = kind.forward(&AttnInput { selection: Some(&chosen), ..*input });
            (z * pull).sum(Kind::Double).backward();
        });
    });
    let pairs = [
        ("hidden", &leaf.hidden, &imposed.hidden),
        ("q", &leaf.q, &imposed.q),
        ("k", &leaf.k, &imposed.k),
        ("v", &leaf.v, &imposed.v),
    ];
    for (name, free, imposed) in pairs {
        let error = match (free.grad().defined(), imposed.grad().defined()) {
            (true, true) => relative_rms(&free.grad(), &imposed.grad()),
            (free, imposed) => f64::from(u8::from(free != imposed)),
        };
        worst.see(error, || format!("{name}, through the choices"));
    }
}
