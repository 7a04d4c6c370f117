//! A learned mixture of masks: fixed masks, such as "the previous token" or "the last 32 keys", are added up with
//! learned coefficients, and the sum scales the attention weights.
//!
//! ```text
//! M_ij = Σ_n w_n [mask n shows query i the key j]      w = σ(alpha), 0 where below prune_below (but the largest)
//! a_ij = softmax_j(scale · q_i·k_j) over the keys the layer may see
//! z_i  = Σ_j a_ij M_ij v_j / Σ_j a_ij M_ij
//! ```
//!
//! After a course project, <https://github.com/charisgao/STAT-4830-Optimizing-Attention-Project> (notebook "Custom masks
//! implementation"): five masks, each of one earlier token, a coefficient a layer, start at w = 0.5, an optional penalty
//! on Σ w. Deviations:
//!
//! - The layer's own mask comes first. There causality came from M alone: a mask that looks ahead would have leaked.
//! - Nothing is added to the denominator (there 1e-8); a query whose keys are all hidden gets zeros.
//! - Masks, coefficients by head and pruning are settings. Positive coefficients that share a factor do the same.
//! - The pretrained projections are used; there, by a fault, they were random.
//!
//! **What is computed.** With e_ij = exp(scale·q_i·k_j), a_ij = e_ij / Σ_l e_il, and the denominator over all visible
//! keys l cancels:
//!
//! ```text
//! z_i = Σ_j e_ij M_ij v_j / Σ_j e_ij M_ij = Σ_j softmax_j(scale · q_i·k_j + log M_ij) v_j
//! ```
//!
//! The first form is `place = "after"`, the last `place = "before"`. Neither needs a key where M is 0, so keys that no
//! mask shows are never read: a basis without `all` costs n times the keys its masks reach. Nearby masks are served by
//! one band, far ones by bands of their own, strided ones among every r-th token, and the parts are joined by their
//! share of the denominator. A basis with `all` is dense.

use std::num::NonZeroU32;

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::{
    Error,
    attention::{
        Attention, AttnInput, Combination, Dims, Masks, Nature, Own, Param, Projections, State,
    },
    banded::{self, Band, Blocks, FirstAndLast},
    mask::{hidden_score, to_bias},
    nn::Visitor,
    pairs,
    weights::Init,
};

const KIND: &str = "mask_mixture";

/// Masks this far apart (tokens) are served apart; nearer ones share a band, with what lies between hidden.
const NEAR: i64 = 32;

/// Settings of [`MaskMixture`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The masks, at least one, each written as text, see [`Basis`]: `["shift:1", "window:32", "all"]`.
    pub basis: Vec<Basis>,
    /// Whether heads share their coefficients.
    pub coefficients: Coefficients,
    /// Where M stands: two forms of the same function.
    pub place: Place,
    /// What Σ w counts in the training loss, at least 0.
    pub l1: f64,
    /// Coefficients below this are exactly 0, and no longer learn, but the largest of a layer (of a head); from 0 to 1.
    pub prune_below: f64,
    /// Every coefficient at the start, between 0 and 1, not below `prune_below`.
    pub start: f64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            basis: (0..5).map(Basis::Shift).collect(),
            coefficients: Coefficients::Layer,
            place: Place::After,
            l1: 0.0,
            prune_below: 0.0,
            start: 0.5,
        }
    }
}

/// One mask. In configs it is text: `shift:I`, `window:W`, `dilated:R:W`, `first:G`, `all`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Basis {
    /// `shift:I`: the one key I tokens back; in a bidirectional layer I may be negative.
    Shift(i64),
    /// `window:W`: the keys less than W tokens away, before and, in a bidirectional layer, behind.
    Window(NonZeroU32),
    /// `dilated:R:W`: the keys at distances 0, R, 2R, … (W − 1)R, on one side or both.
    Dilated {
        /// R.
        stride: NonZeroU32,
        /// W.
        size: NonZeroU32,
    },
    /// `first:G`: the first G tokens of the text.
    First(NonZeroU32),
    /// `all`: every key the layer may see.
    All,
}

impl std::fmt::Display for Basis {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Shift(by) => write!(f, "shift:{by}"),
            Self::Window(size) => write!(f, "window:{size}"),
            Self::Dilated { stride, size } => write!(f, "dilated:{stride}:{size}"),
            Self::First(n) => write!(f, "first:{n}"),
            Self::All => write!(f, "all"),
        }
    }
}

impl From<Basis> for String {
    fn from(basis: Basis) -> Self {
        basis.to_string()
    }
}

impl TryFrom<String> for Basis {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let parts: Vec<&str> = text.split(':').collect();
        let count = |x: &str| x.parse().ok();
        let basis = match parts[..] {
            ["all"] => Some(Self::All),
            // Beyond 32 bits no text is that long, and sums of two would overflow.
            ["shift", by] => by.parse::<i32>().ok().map(|by| Self::Shift(by.into())),
            ["window", size] => count(size).map(Self::Window),
            ["first", n] => count(n).map(Self::First),
            ["dilated", stride, size] => {
                count(stride).zip(count(size)).map(|(stride, size)| Self::Dilated { stride, size })
            }
            _ => None,
        };
        basis.ok_or_else(|| {
            format!(
                "`{text}` is no mask, expected `shift:I`, `window:W`, `dilated:R:W`, `first:G` (I a number of tokens \
                 back, the others at least 1) or `all`"
            )
        })
    }
}

impl Basis {
    /// Whether the mask shows a key (at `key`) from `distance` = query − key away. Shapes need only fit each other.
    fn shows(self, distance: &Tensor, key: &Tensor) -> Tensor {
        match self {
            Self::Shift(by) => distance.eq(by),
            Self::Window(size) => distance.abs().lt(i64::from(size.get())),
            Self::Dilated { stride, size } => {
                Band::around(size.get().into(), stride.get().into(), 0).has(distance)
            }
            Self::First(n) => key.lt(i64::from(n.get())),
            Self::All => distance.eq_tensor(distance),
        }
    }

    /// Whether the mask shows keys by their distance, and this one.
    fn is_at(self, distance: i64) -> bool {
        let is_within = |size: NonZeroU32, stride: i64| {
            distance.abs() < i64::from(size.get()) * stride && distance % stride == 0
        };
        match self {
            Self::Shift(by) => distance == by,
            Self::Window(size) => is_within(size, 1),
            Self::Dilated { stride, size } => is_within(size, stride.get().into()),
            Self::First(_) => false,
            Self::All => true,
        }
    }
}

/// Whose the coefficients are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Coefficients {
    /// One a mask.
    Layer,
    /// One a mask and query head.
    Head,
}

/// Where M stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// A factor of the weights, which are then renormalized.
    After,
    /// Its logarithm added to the scores.
    Before,
}

impl Config {
    pub(super) fn build(
        &self,
        dims: &Dims,
        _: &Projections,
        own: &mut Own<'_, '_>,
    ) -> Result<Box<dyn Attention>, Error> {
        let refuse = |field, value: String, problem: &str| {
            Err(Error::Setting { kind: KIND, field, value, problem: problem.to_owned() })
        };
        if self.basis.is_empty() {
            return refuse("basis", "[]".into(), "expected at least one mask");
        }
        let sees_none = |by: i64| dims.max_len.is_some_and(|n| by.abs() >= n);
        if let Some(far) =
            self.basis.iter().find(|mask| matches!(mask, Basis::Shift(by) if sees_none(*by)))
        {
            let problem = format!(
                "shows no key, as the model's longest text has {} tokens: expected a smaller shift",
                dims.max_len.unwrap_or_default()
            );
            return refuse("basis", far.to_string(), &problem);
        }
        if let Some(ahead) =
            self.basis.iter().find(|mask| matches!(mask, Basis::Shift(by) if *by < 0))
            && dims.causal
        {
            let problem = "looks ahead, which this layer may not: expected `shift:0` or more";
            return refuse("basis", ahead.to_string(), problem);
        }
        if !(self.start > 0.0 && self.start < 1.0) {
            return refuse(
                "start",
                self.start.to_string(),
                "expected between 0 and 1, neither of them",
            );
        }
        if !(0.0..1.0).contains(&self.prune_below) || self.prune_below > self.start {
            let problem = "expected at least 0 and no more than `start`, or nothing is left";
            return refuse("prune_below", self.prune_below.to_string(), problem);
        }
        if !(self.l1.is_finite() && self.l1 >= 0.0) {
            return refuse("l1", self.l1.to_string(), "expected a number, at least 0");
        }
        let n_masks = self.basis.len() as i64;
        let shape = match self.coefficients {
            Coefficients::Layer => vec![n_masks],
            Coefficients::Head => vec![dims.n_heads, n_masks],
        };
        let alpha = (self.start / (1.0 - self.start)).ln();
        let start = Tensor::full(&shape, alpha, (Kind::Double, tch::Device::Cpu));
        let alpha = own.get("mixture.alpha", &shape, Init::Value(start))?;
        Ok(Box::new(MaskMixture {
            parts: Parts::of(&self.basis),
            config: self.clone(),
            alpha,
            dims: dims.clone(),
        }))
    }
}

/// The keys that a basis reaches, taken apart into what is computed at once.
#[derive(Debug, Clone, PartialEq)]
enum Parts {
    /// All keys.
    All,
    /// Each band's keys but those of the bands before it, and the first few keys but those of the bands.
    Few { bands: Vec<Band>, first: i64 },
}

impl Parts {
    fn of(basis: &[Basis]) -> Self {
        let (mut spans, mut strided, mut first) = (Vec::new(), Vec::new(), 0);
        for mask in basis {
            match *mask {
                Basis::All => return Self::All,
                Basis::Shift(by) => spans.push((by, by)),
                Basis::Window(size) => {
                    let reach = i64::from(size.get()) - 1;
                    spans.push((-reach, reach));
                }
                Basis::Dilated { stride, size } => {
                    let (stride, size) = (i64::from(stride.get()), i64::from(size.get()));
                    let reach = (size - 1) * stride;
                    if reach <= NEAR || stride == 1 {
                        spans.push((-reach, reach));
                    } else {
                        strided.push(Band::around(size, stride, 0));
                    }
                }
                Basis::First(n) => first = first.max(i64::from(n.get())),
            }
        }
        spans.sort_unstable();
        let mut bands: Vec<Band> = Vec::new();
        for (lo, hi) in spans {
            match bands.last_mut() {
                Some(last) if lo <= last.hi + NEAR => last.hi = last.hi.max(hi),
                _ => bands.push(Band { lo, hi, stride: 1, first: 0 }),
            }
        }
        bands.append(&mut strided);
        Self::Few { bands, first }
    }
}

/// Softmax attention under a learned sum of masks.
#[derive(Debug)]
pub struct MaskMixture {
    config: Config,
    parts: Parts,
    /// `[masks]`, or `[n_heads, masks]`.
    alpha: Param,
    dims: Dims,
}

impl MaskMixture {
    /// w in at least `f32`: `[1 or n_heads, masks]`.
    fn coefficients(&self) -> Tensor {
        let w = self.alpha.tensor.to_kind(wide(self.alpha.tensor.kind())).sigmoid();
        let w = w.view([-1, self.config.basis.len() as i64]);
        match self.config.prune_below {
            0.0 => w,
            bar => {
                let largest = w.amax([-1i64].as_slice(), true);
                w.masked_fill(&w.lt(bar).logical_and(&w.lt_tensor(&largest)), 0.0)
            }
        }
    }

    /// M where `distance` (query − key) is `[rows, keys]` and `key` `[.., 1, keys]`, and 0 where it is not `visible`
    /// (`[.., 1, rows, keys]`): `[.., 1 or n_heads, rows, keys]`.
    fn mixture(&self, distance: &Tensor, key: &Tensor, visible: &Tensor) -> Tensor {
        let w = self.coefficients();
        let terms = self.config.basis.iter().zip(0..).map(|(mask, n)| {
            let shown = mask.shows(distance, key).unsqueeze(-3).to_kind(w.kind());
            shown * w.select(1, n).view([-1, 1, 1])
        });
        let sum = terms.reduce(|sum, term| sum + term).expect("a basis has a mask");
        sum * visible.to_kind(w.kind())
    }

    /// The weights that `scores` make under `m` (keys last, shapes that broadcast), zeros where m is 0, and what to
    /// multiply their sums by, `[.., 1]`: sums of values are fewer than weights.
    fn normalize(&self, scores: &Tensor, m: &Tensor) -> Weighed {
        let kind = scores.kind();
        let hidden = m.eq(0.0);
        match self.config.place {
            Place::Before => {
                // Not the logarithm of 0, whose gradient is no number.
                let bias =
                    m.masked_fill(&hidden, 1.0).log().masked_fill(&hidden, hidden_score(kind));
                let scores = scores + bias;
                let factor = hidden.all_dim(-1, true).logical_not().to_kind(kind);
                Weighed { weights: scores.softmax(-1, kind), factor, scores }
            }
            Place::After => {
                let scores = scores + to_bias(&hidden.logical_not(), kind);
                let weights = scores.softmax(-1, kind) * m;
                let total = weights.sum_dim_intlist([-1i64].as_slice(), true, kind);
                // Where all is hidden the weights are 0 already, and what they are divided by must not blow up a gradient.
                let none = total.eq(0.0).to_kind(kind);
                let factor = (&total + none).reciprocal();
                Weighed { weights, factor, scores }
            }
        }
    }

    /// `q·kᵀ` of heads, scaled, in at least `f32`.
    fn scores(&self, q: &Tensor, k: &Tensor) -> Tensor {
        (q * self.dims.scale).matmul(&k.transpose(-2, -1)).to_kind(wide(q.kind()))
    }

    /// Whether coefficients are trained. Asked of the parameter, so that a block that is run again for its gradients runs
    /// as it did without.
    fn learns(&self) -> bool {
        self.alpha.tensor.requires_grad()
    }

    /// The fused kernel under M, where coefficients are not trained: it has no gradient for what is added to scores. `q`,
    /// `k` and `v` are `[batch, n_heads, .., head_dim]`.
    fn fused(&self, [q, k, v]: [&Tensor; 3], m: &Tensor, dropout: f64) -> Tensor {
        let hidden = m.eq(0.0);
        let bias = m.log().masked_fill(&hidden, hidden_score(q.kind())).to_kind(q.kind());
        let scale = self.dims.scale;
        let z =
            Tensor::scaled_dot_product_attention(q, k, v, Some(bias), dropout, false, scale, false);
        z.masked_fill(&hidden.all_dim(-1, true), 0.0)
    }

    /// Every query against every key; `visible`: `[1 or batch, 1, q_len, k_len]`.
    fn dense(&self, input: &AttnInput, query: &Tensor, key: &Tensor, visible: &Tensor) -> Tensor {
        let AttnInput { q, k, v, dropout, .. } = *input;
        let m = self.mixture(&(query.unsqueeze(-1) - key), &key.unsqueeze(0), visible);
        let (k, v) = (self.dims.expand_kv(k), self.dims.expand_kv(v));
        match self.learns() {
            true => self.normalize(&self.scores(q, &k), &m).mix(&v, dropout),
            false => self.fused([q, &k, &v], &m, dropout),
        }
    }

    /// One band of keys, those of the bands `before` left out: z, and if there are `several` parts the logarithm of its
    /// denominator (`[.., 1]`).
    fn band(
        &self,
        input: &AttnInput,
        kv: [&Tensor; 2],
        band: &Band,
        before: &[Band],
        several: bool,
    ) -> (Tensor, Option<Tensor>) {
        let blocks = Blocks::new(input.q, kv, input.mask, band);
        let mut visible = blocks.allowed.shallow_clone(); // [1 or b, blocks, rows, keys]
        for other in before {
            visible = visible.logical_and(&other.has(&blocks.distance).logical_not());
        }
        let m = self.mixture(&blocks.distance, &blocks.key.unsqueeze(1), &visible.unsqueeze(2));
        if !several && !self.learns() {
            let [b, n_blocks, h, rows, d] = blocks.q.size()[..] else {
                unreachable!("blocks have five axes")
            };
            let m = m.expand([b, -1, -1, -1, -1], true).flatten(0, 1);
            let [q, k, v] = [&blocks.q, &blocks.k, &blocks.v].map(|x| x.flatten(0, 1));
            let z = self.fused([&q, &k, &v], &m, input.dropout);
            return (blocks.unfold(&z.view([b, n_blocks, h, rows, d])), None);
        }
        let weighed = self.normalize(&self.scores(&blocks.q, &blocks.k), &m);
        let z = blocks.unfold(&weighed.mix(&blocks.v, input.dropout));
        (z, several.then(|| blocks.unfold(&weighed.log_total())))
    }

    /// The first `n` keys, those of `bands` left out, as [`Self::band`].
    fn first(
        &self,
        input: &AttnInput,
        [k, v]: [&Tensor; 2],
        n: i64,
        bands: &[Band],
    ) -> (Tensor, Option<Tensor>) {
        let options = (Kind::Int64, input.q.device());
        let key = Tensor::arange(n, options);
        let distance = Tensor::arange(input.q.size()[2], options).unsqueeze(-1) - &key; // [q, n]
        let mut visible = distance.eq_tensor(&distance);
        if input.mask.causal() {
            visible = distance.ge(0);
        }
        for band in bands {
            visible = visible.logical_and(&band.has(&distance).logical_not());
        }
        let mut visible = visible.unsqueeze(0).unsqueeze(0);
        if let Some(keep) = input.mask.keep() {
            let keep = keep.narrow(1, 0, n).unsqueeze(1).unsqueeze(1);
            visible = visible.logical_and(&keep);
        }
        let m = self.mixture(&distance, &key.unsqueeze(0), &visible);
        let weighed = self.normalize(&self.scores(input.q, &k.narrow(2, 0, n)), &m);
        (weighed.mix(&v.narrow(2, 0, n), input.dropout), Some(weighed.log_total()))
    }

    /// n queries against the keys that the masks reach among n.
    fn sparse(&self, input: &AttnInput, bands: &[Band], first: i64) -> Tensor {
        let n = input.q.size()[2];
        let (k, v) = (self.dims.expand_kv(input.k), self.dims.expand_kv(input.v));
        let bands: Vec<Band> =
            bands.iter().filter_map(|band| band.within(n, input.mask.causal())).collect();
        let several = bands.len() + usize::from(first > 0) > 1;
        let mut parts: Vec<(Tensor, Option<Tensor>)> = bands
            .iter()
            .enumerate()
            .map(|(i, band)| self.band(input, [&k, &v], band, &bands[..i], several))
            .collect();
        if first > 0 {
            parts.push(self.first(input, [&k, &v], first.min(n), &bands));
        }
        if !several {
            return parts.pop().map_or_else(|| input.q.zeros_like(), |(z, _)| z);
        }
        // Each part is a mean of its own; of the whole it has the share of its denominator.
        let log_totals: Vec<&Tensor> =
            parts.iter().filter_map(|(_, log_total)| log_total.as_ref()).collect();
        let log_totals = Tensor::cat(&log_totals, -1); // [b, h, n, parts]
        let shares = log_totals.softmax(-1, log_totals.kind()).split(1, -1);
        let z = parts.iter().zip(shares).map(|((z, _), share)| z * share);
        z.reduce(|sum, z| sum + z).expect("there are two parts").to_kind(input.q.kind())
    }
}

/// Attention weights before the last division.
struct Weighed {
    /// `[.., keys]`, to be multiplied by `factor`.
    weights: Tensor,
    /// `[.., 1]`; 0, or anything beside weights of 0, where a query sees no key.
    factor: Tensor,
    /// The scores, hidden ones hugely negative.
    scores: Tensor,
}

impl Weighed {
    /// The logarithm of the whole denominator, Σ_j e_ij M_ij: `[.., 1]`.
    fn log_total(&self) -> Tensor {
        let all = self.scores.logsumexp([-1i64].as_slice(), true);
        // A factor of 0 stands beside scores that are all hidden: such a part has no share in any case.
        all - self.factor.masked_fill(&self.factor.eq(0.0), 1.0).log()
    }

    /// The sums of values: `[.., keys, d] -> [.., rows, d]`.
    fn mix(&self, v: &Tensor, dropout: f64) -> Tensor {
        let drop = |weights: &Tensor| weights.dropout(dropout, dropout > 0.0);
        if v.kind() == self.weights.kind() {
            return drop(&self.weights).matmul(v) * &self.factor;
        }
        // Undivided weights may be too small for a narrow kind.
        drop(&(&self.weights * &self.factor).to_kind(v.kind())).matmul(v)
    }
}

impl Attention for MaskMixture {
    fn forward(&self, input: &AttnInput) -> Tensor {
        let (q_len, k_len) = (input.q.size()[2], input.k.size()[2]);
        match &self.parts {
            Parts::Few { bands, first } if q_len == k_len => self.sparse(input, bands, *first),
            _ => {
                let rows: Vec<i64> = (0..q_len).collect();
                let (query, key) = banded::places(input, &rows);
                let visible = input.mask.allowed(q_len, k_len, input.q.device());
                self.dense(input, &query, &key, &visible)
            }
        }
    }

    fn weights(&self, input: &AttnInput, rows: &[i64]) -> Tensor {
        let (q_len, k_len, device) = (input.q.size()[2], input.k.size()[2], input.q.device());
        let (query, key) = banded::places(input, rows);
        let visible = input.mask.allowed_rows(rows, q_len, k_len, device);
        let m = self.mixture(&(query.unsqueeze(-1) - &key), &key.unsqueeze(0), &visible);
        let q = input.q.index_select(2, &Tensor::from_slice(rows).to_device(device));
        let weighed = self.normalize(&self.scores(&q, &self.dims.expand_kv(input.k)), &m);
        (weighed.weights * weighed.factor).to_kind(q.kind())
    }

    /// 4 · head_dim · n_heads · pairs that a mask shows, a pruned one too.
    fn flops(&self, n_tokens: i64) -> i64 {
        let basis = &self.config.basis;
        let n_pairs = match basis.contains(&Basis::All) {
            true => pairs::n_seen(n_tokens, self.dims.causal),
            false => {
                let first = |mask: &Basis| match mask {
                    Basis::First(n) => i64::from(n.get()),
                    _ => 0,
                };
                let first = basis.iter().map(first).max().unwrap_or(0);
                let is_near = |distance| basis.iter().any(|mask| mask.is_at(distance));
                pairs::n_pairs(n_tokens, self.dims.causal, first, is_near)
            }
        };
        pairs::weighing(&self.dims, n_pairs)
    }

    super::holds!(2, 6);

    fn nature(&self) -> Nature {
        let of = |basis: &Basis| match *basis {
            Basis::Shift(by) => by.abs() + 1,
            Basis::Window(size) => size.get().into(),
            Basis::Dilated { stride, size } => i64::from(stride.get()) * i64::from(size.get()),
            Basis::First(n) => n.get().into(),
            Basis::All => 0,
        };
        let reach = self.config.basis.iter().map(of).max().unwrap_or(0);
        Nature { reach, chooses: false, reads_coordinates: false, has_own_slopes: false }
    }

    fn masks(&self) -> Masks {
        Masks::Contiguous // A distance across a hole is not a distance between tokens.
    }

    fn start(&self) -> Box<dyn State> {
        Box::new(match &self.parts {
            Parts::All => FirstAndLast::new(0, None),
            Parts::Few { bands, first } => {
                let reach = bands.iter().map(Band::reach).max().unwrap_or(1);
                FirstAndLast::new(*first, Some(reach))
            }
        })
    }

    fn step(&self, input: &AttnInput, state: &mut dyn State) -> Tensor {
        let cache = FirstAndLast::of(state);
        let is_new = cache.n_tokens() == 0;
        let held = cache.append(input.k, input.v);
        let z = if is_new {
            self.forward(input)
        } else {
            let past = held.key.le_tensor(&held.query.unsqueeze(-1)).unsqueeze(0).unsqueeze(0); // [1, 1, q, k]
            let held_input = AttnInput { k: &held.k, v: &held.v, ..*input };
            self.dense(&held_input, &held.query, &held.key, &past)
        };
        cache.trim();
        z
    }

    fn penalty(&self) -> Option<Tensor> {
        let w = self.coefficients();
        (self.config.l1 > 0.0).then(|| w.sum(w.kind()) * self.config.l1)
    }

    fn combination(&self, n: i64) -> Option<Combination> {
        let place = Tensor::arange(n, (Kind::Int64, self.alpha.tensor.device()));
        let visible = Tensor::ones([1, n, n], (Kind::Bool, place.device()));
        let distance = place.unsqueeze(-1) - place.unsqueeze(0);
        Some(Combination {
            names: self.config.basis.iter().map(Basis::to_string).collect(),
            coefficients: self.coefficients().detach(),
            mask: self.mixture(&distance, &place.unsqueeze(0), &visible).detach(),
        })
    }

    fn visit(&self, f: &mut Visitor<'_>) {
        f(&self.alpha.name, &self.alpha.tensor);
    }

    fn select_heads(&mut self, heads: &[i64], dims: &Dims) -> Result<(), Error> {
        if self.config.coefficients == Coefficients::Head {
            self.alpha.select(0, heads);
        }
        self.dims = dims.clone();
        Ok(())
    }

    fn regroup_kv(&mut self, _: &[Vec<i64>], dims: &Dims) -> Result<(), Error> {
        self.dims = dims.clone(); // Coefficients belong to query heads.
        Ok(())
    }
}

/// The kind that sums and exponentials are made in.
fn wide(kind: Kind) -> Kind {
    if kind == Kind::Double { Kind::Double } else { Kind::Float }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        mask::Mask,
        testing::{Probe, assert_close, naive_attention, randn},
        variants::Variant,
    };

    fn basis(texts: &[&str]) -> Vec<Basis> {
        texts.iter().map(|&text| Basis::try_from(text.to_owned()).unwrap()).collect()
    }

    fn config(texts: &[&str]) -> Config {
        Config { basis: basis(texts), ..Config::default() }
    }

    /// Built for `probe`, alpha drawn.
    fn built(config: &Config, probe: &Probe) -> Box<dyn Attention> {
        let kind = probe.build(&Variant::MaskMixture(config.clone()));
        kind.visit(&mut |_, alpha| {
            tch::no_grad(|| alpha.shallow_clone().copy_(&randn(5, &alpha.size())));
        });
        kind
    }

    /// The original's two steps, one query at a time: softmax over all that the layer sees, times M, renormalized.
    fn naive(probe: &Probe, config: &Config, causal: bool, n_real: usize) -> (Tensor, Tensor) {
        let (_, softmax) = naive_attention(probe, |i, j| j < n_real && (!causal || j <= i));
        let [b, h, n, d] = probe.q.size()[..] else { unreachable!() };
        let n_masks = config.basis.len() as i64;
        let by_head = config.coefficients == Coefficients::Head;
        let alpha = randn(5, &if by_head { vec![h, n_masks] } else { vec![n_masks] });
        let coefficient = |head: i64, mask: i64| {
            let alpha = if by_head {
                alpha.double_value(&[head, mask])
            } else {
                alpha.double_value(&[mask])
            };
            1.0 / (1.0 + (-alpha).exp())
        };
        let largest = |head| (0..n_masks).map(|n| coefficient(head, n)).fold(0.0, f64::max);
        let coefficient = |head: i64, mask: i64| {
            let w = coefficient(head, mask);
            if w < config.prune_below && w < largest(head) { 0.0 } else { w }
        };
        let shows = |mask: &Basis, i: i64, j: i64| match *mask {
            Basis::Shift(by) => j == i - by,
            Basis::Window(size) => (i - j).abs() < i64::from(size.get()),
            Basis::Dilated { stride, size } => {
                (0..i64::from(size.get())).any(|m| (i - j).abs() == m * i64::from(stride.get()))
            }
            Basis::First(g) => j < i64::from(g.get()),
            Basis::All => true,
        };
        let (mut z, mut all_weights) = (Vec::new(), Vec::new());
        for example in 0..b {
            for head in 0..h {
                let row = |x: &Tensor| {
                    Vec::<f64>::try_from(x.get(example).get(head).reshape([-1])).unwrap()
                };
                let softmax = row(&softmax);
                let v = row(&probe.dims.expand_kv(&probe.v));
                let w: Vec<f64> = (0..n_masks).map(|mask| coefficient(head, mask)).collect();
                for i in 0..n {
                    let masked: Vec<f64> = (0..n)
                        .map(|j| {
                            let shown =
                                config.basis.iter().zip(&w).filter(|(mask, _)| shows(mask, i, j));
                            softmax[(i * n + j) as usize] * shown.map(|(_, w)| w).sum::<f64>()
                        })
                        .collect();
                    let total: f64 = masked.iter().sum();
                    let weights: Vec<f64> =
                        masked.iter().map(|x| if total > 0.0 { x / total } else { 0.0 }).collect();
                    z.extend((0..d).map(|c| {
                        (0..n).map(|j| weights[j as usize] * v[(j * d + c) as usize]).sum::<f64>()
                    }));
                    all_weights.extend(weights);
                }
            }
        }
        let tensor = |x: &[f64], last| Tensor::from_slice(x).view([b, h, n, last]);
        (tensor(&z, d), tensor(&all_weights, n))
    }

    const BASES: [&[&str]; 9] = [
        &["shift:0", "shift:1", "shift:2", "shift:3", "shift:4"],
        &["shift:2"],
        &["window:3", "window:20", "shift:1"],
        &["shift:0", "shift:50", "window:4"],
        &["dilated:3:4", "dilated:9:5", "dilated:12:4", "shift:9"],
        &["first:3"],
        &["first:5", "window:4", "dilated:20:3", "shift:61"],
        &["all", "shift:1", "first:2"],
        &["all"],
    ];

    /// What the masks make of tokens that all see each other is what scales equal weights, up to each row's sum.
    #[test]
    fn the_combination_is_what_scales_weights() {
        let n = 7;
        for coefficients in [Coefficients::Layer, Coefficients::Head] {
            let config =
                Config { coefficients, ..config(&["shift:0", "shift:2", "window:3", "first:1"]) };
            let mut probe = Probe::new(94, [1, n, n], 4, 2, false);
            probe.q = probe.q.zeros_like();
            let kind = built(&config, &probe);
            let Combination { names, coefficients, mask } = kind.combination(n).unwrap();
            assert_eq!(names, ["shift:0", "shift:2", "window:3", "first:1"]);
            assert_eq!(coefficients.size()[1], 4);
            let sums = mask.sum_dim_intlist([-1i64].as_slice(), true, Kind::Double);
            let expected = &mask / sums;
            let mask = Mask::new(false);
            let weights = kind.weights(&probe.input(&mask), &(0..n).collect::<Vec<_>>()).get(0);
            assert_close("mask", &weights, &expected.expand_as(&weights), 1e-12);
        }
    }

    #[test]
    fn matches_the_definition() {
        for texts in BASES {
            for (n, causal) in [(1, true), (7, true), (7, false), (63, false), (90, true)] {
                for place in [Place::After, Place::Before] {
                    for (coefficients, prune_below) in
                        [(Coefficients::Layer, 0.0), (Coefficients::Head, 0.4)]
                    {
                        let config = Config { coefficients, place, prune_below, ..config(texts) };
                        let probe = Probe::new(91, [2, n, n], 4, 2, causal);
                        let kind = built(&config, &probe);
                        let (z, weights) = naive(&probe, &config, causal, n as usize);
                        let mask = Mask::new(causal);
                        let name = format!("{config:?}, {n} tokens, causal {causal}");
                        assert_close(&name, &kind.forward(&probe.input(&mask)), &z, 1e-12);
                        let rows: Vec<i64> = (0..n).collect();
                        let own = kind.weights(&probe.input(&mask), &rows);
                        assert_close(&name, &own, &weights, 1e-12);
                        // With gradients other kernels run.
                        kind.visit(&mut |_, alpha| drop(alpha.set_requires_grad(true)));
                        assert_close(&name, &kind.forward(&probe.input(&mask)), &z, 1e-12);
                    }
                }
            }
        }
    }

    #[test]
    fn both_sides_and_padding_of_a_bidirectional_layer() {
        for texts in
            [&["shift:-2", "shift:0", "shift:-60"][..], &["first:5", "dilated:20:3"], &["all"]]
        {
            let probe = Probe::new(92, [1, 90, 90], 4, 2, false);
            let kind = built(&config(texts), &probe);
            let keep = probe.positions.lt(63);
            let mask = Mask::with_keep(false, &keep);
            let (z, _) = naive(&probe, &config(texts), false, 63);
            let real = |z: &Tensor| z.narrow(2, 0, 63);
            assert_close(
                &format!("{texts:?}"),
                &real(&kind.forward(&probe.input(&mask))),
                &real(&z),
                1e-12,
            );
        }
    }

    #[test]
    fn every_key_alone_is_softmax() {
        for causal in [true, false] {
            let probe = Probe::new(93, [2, 63, 63], 4, 2, causal);
            let (z, _) = naive_attention(&probe, |i, j| !causal || j <= i);
            for texts in [["all"], ["window:63"], ["first:63"]] {
                for place in [Place::After, Place::Before] {
                    let kind = built(&Config { place, ..config(&texts) }, &probe);
                    let mask = Mask::new(causal);
                    assert_close(texts[0], &kind.forward(&probe.input(&mask)), &z, 1e-12);
                }
            }
        }
    }

    #[test]
    fn a_pruned_mask_is_one_left_out() {
        let probe = Probe::new(94, [2, 63, 63], 4, 2, true);
        let with_alpha = |texts: &[&str], alpha: &[f64]| {
            let kind = built(&Config { prune_below: 0.3, ..config(texts) }, &probe);
            kind.visit(&mut |_, own| {
                tch::no_grad(|| own.shallow_clone().copy_(&Tensor::from_slice(alpha)));
            });
            kind.forward(&probe.input(&Mask::new(true)))
        };
        let pruned = with_alpha(&["window:4", "all", "shift:7"], &[0.2, -1.0, 1.0]);
        assert_close("pruned", &pruned, &with_alpha(&["window:4", "shift:7"], &[0.2, 1.0]), 1e-12);
        // The last mask stays, or the layer would attend to nothing and learn nothing more.
        let last = with_alpha(&["window:4", "all", "shift:7"], &[-3.0, -2.0, -4.0]);
        assert_close("the last", &last, &with_alpha(&["all"], &[-2.0]), 1e-12);
    }

    #[test]
    fn masks_are_read_as_they_are_written() {
        for mask in basis(&["shift:-3", "window:4", "dilated:2:8", "first:1", "all"]) {
            assert_eq!(Basis::try_from(mask.to_string()), Ok(mask));
        }
        for wrong in ["", "winow:3", "window:0", "window", "shift:x", "dilated:2", "all:1"] {
            let error = Basis::try_from(wrong.to_owned()).unwrap_err();
            assert!(
                error.contains(&format!("`{wrong}`")) && error.contains("dilated:R:W"),
                "{error}"
            );
        }
    }

    #[test]
    fn far_masks_are_served_apart() {
        let parts =
            Parts::of(&basis(&["window:4", "shift:200", "shift:210", "dilated:16:8", "first:2"]));
        let near = |lo, hi| Band { lo, hi, stride: 1, first: 0 };
        let bands = vec![near(-3, 3), near(200, 210), Band::around(8, 16, 0)];
        assert_eq!(parts, Parts::Few { bands, first: 2 });
    }

    #[test]
    fn settings_out_of_range_are_refused() {
        let mut probe = Probe::new(95, [1, 4, 4], 2, 2, true);
        probe.dims.max_len = Some(9);
        for (field, config) in [
            ("basis", config(&[])),
            ("basis", config(&["shift:0", "shift:-1"])),
            ("basis", config(&["shift:0", "shift:9"])),
            ("start", Config { start: 1.0, ..Config::default() }),
            ("prune_below", Config { prune_below: 0.6, ..Config::default() }),
            ("l1", Config { l1: -1.0, ..Config::default() }),
        ] {
            let mut weights = crate::weights::Weights::from_seed(1, Kind::Float, tch::Device::Cpu);
            let none = || (Tensor::new(), None);
            let projections = Projections { q: none(), k: none(), v: none() };
            let error = config
                .build(&probe.dims, &projections, &mut Own::new(&mut weights, "x"))
                .unwrap_err()
                .to_string();
            assert!(error.contains(&format!("`{field}`")), "{error}");
        }
    }

    #[test]
    fn the_penalty_is_the_sum_of_the_coefficients() {
        let probe = Probe::new(96, [1, 4, 4], 2, 2, true);
        assert!(built(&Config::default(), &probe).penalty().is_none());
        let penalty = built(&Config { l1: 0.1, ..Config::default() }, &probe).penalty().unwrap();
        let expected = randn(5, &[5]).sigmoid().sum(Kind::Double) * 0.1;
        assert_close("penalty", &penalty, &expected, 1e-12);
    }

    #[test]
    fn decoding_keeps_the_reach_and_the_first_tokens() {
        let probe = Probe::new(97, [1, 40, 40], 2, 2, true);
        let kind = built(&config(&["shift:0", "shift:9", "first:3"]), &probe);
        let mask = Mask::new(true);
        let full = kind.forward(&probe.input(&mask));
        let mut state = kind.start();
        for at in 0..40 {
            let cut = |x: &Tensor| x.narrow(2, at, 1);
            let (q, k, v) = (cut(&probe.q), cut(&probe.k), cut(&probe.v));
            let z =
                kind.step(&AttnInput { q: &q, k: &k, v: &v, ..probe.input(&mask) }, state.as_mut());
            assert_close("a step", &z, &cut(&full), 1e-12);
        }
        let per_token = 2 * 2 * probe.dims.head_dim as usize * 8; // k and v, two heads, f64
        assert_eq!(state.bytes(), (3 + 10) * per_token);
    }
}
