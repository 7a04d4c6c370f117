//! Softmax attention whose heads run where the input asks for them: a router of one row per head closes the others.
//!
//! ```text
//! z_hi = g_hi Σ_j softmax_j(s_ij) v_j,   g = clip(1.2 s − 0.1, 0, 1),  s = σ((ln u − ln(1 − u) + r)/β)
//! by = "token"    r_hi = w_h·x_i + b_h       each token opens heads for its own query
//! by = "text"     r_hi = w_h·x̄ + b_h         x̄: the mean of the text's real tokens, one choice for all its queries
//!
//! in training     u ~ U(0, 1)
//! otherwise       u = 1/2: a head runs where P(g > 0) = σ(r − β ln(0.1/1.1)) is above 1/2
//! own loss        price · max(0, mean P(g > 0) − budget)²
//! ```
//!
//! The gates of Louizos, Welling, Kingma 2017, "Learning Sparse Neural Networks through L0 Regularization",
//! <https://arxiv.org/abs/1712.01312>, section 2.2, which Voita et al. 2019, <https://arxiv.org/abs/1905.09418>, section 5.1, put
//! on heads (β = 0.33, as their code has it), here with a logit that the input sets. Heads chosen by each token: Jin et al. 2024, "MoH: Multi-Head Attention as Mixture-of-Head Attention",
//! <https://arxiv.org/abs/2410.11842>.
//!
//! Deviations: MoH keeps a fixed number of heads, some of them always, and renormalizes; here as many run as the input asks
//! for, within a budget that each layer keeps on average over a batch. Outside of training Louizos et al. put σ(r) for s, whose
//! gate is open, if barely, where it is drawn open one time in six; the median closes it there, so that about as many heads run as
//! the budget says. At w = 0 and b = 3, the start, every gate is 1 and the
//! layer is what it was.
//!
//! - `by = "text"` closes whole heads for a text: outside of training the layer then makes no queries, keys, values or output
//!   of them. It is refused in causal layers, whose first tokens would learn what the last ones say.
//! - `by = "token"` is causal and decodes. Keys and values of a head are needed by whichever later token opens it, and what its
//!   closed queries would cost is not saved here: gates are multiplied in.

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use super::softmax::Softmax;
use crate::{
    Error,
    attention::{Attention, AttnInput, Dims, Own, Param, Projections, Routes, Stream},
    blocks::wide,
    mask::Mask,
    nn::Visitor,
    pairs,
    weights::Init,
};

const KIND: &str = "routed";

/// Settings of [`Routed`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// What a choice is made for.
    pub by: By,
    /// The share of a layer's heads that may run, over 0 and at most 1, on average over the real tokens (texts) of a batch.
    pub budget: f64,
    /// What exceeding the budget costs, in nats for a share of 1.
    pub price: f64,
}

impl Default for Config {
    fn default() -> Self {
        Self { by: By::Token, budget: 0.5, price: 10.0 }
    }
}

/// What a choice of heads is made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum By {
    /// Each query.
    Token,
    /// All queries of a text.
    Text,
}

/// β of the hard concrete distribution.
const BETA: f64 = 0.33;

/// Where the stretched distribution begins: it ends as far behind 1.
const EPS: f64 = 0.1;

/// The first logit of every head: its gate is 1.
const START: f64 = 3.0;

impl Config {
    pub(super) fn build(
        &self,
        dims: &Dims,
        _: &Projections,
        own: &mut Own<'_, '_>,
    ) -> Result<Box<dyn Attention>, Error> {
        let refuse = |field, value: String, problem: &str| {
            Err(Error::Setting { kind: KIND, field, value, problem: problem.into() })
        };
        if !(self.budget > 0.0 && self.budget <= 1.0) {
            let problem = "expected a share of heads, over 0 and at most 1";
            return refuse("budget", self.budget.to_string(), problem);
        }
        if !(self.price >= 0.0 && self.price.is_finite()) {
            return refuse("price", self.price.to_string(), "expected a number of at least 0");
        }
        if self.by == By::Text && dims.causal {
            return Err(Error::Refused {
                kind: KIND,
                what: "choose heads by text in a causal layer",
                reason: "its tokens may not know how their text goes on\nhint: by = \"token\""
                    .into(),
            });
        }
        let start = Init::Value(Tensor::full([dims.n_heads], START, (Kind::Double, Device::Cpu)));
        let weight = own.get("router.weight", &[dims.n_heads, dims.hidden_size], Init::Zeros)?;
        let bias = own.get("router.bias", &[dims.n_heads], start)?;
        Ok(Box::new(Routed {
            config: self.clone(),
            weight,
            bias,
            softmax: Softmax { dims: dims.clone() },
        }))
    }
}

/// Softmax attention under gates that close.
#[derive(Debug)]
pub struct Routed {
    config: Config,
    /// `[n_heads, hidden_size]`
    weight: Param,
    /// `[n_heads]`
    bias: Param,
    softmax: Softmax,
}

impl Routed {
    /// r: `[b, n_heads, q_len]`, or `[b, n_heads, 1]` by text.
    fn logits(&self, hidden: &Tensor, mask: &Mask) -> Tensor {
        let read = match self.config.by {
            By::Token => hidden.shallow_clone(),
            By::Text => mean_of_real(hidden, mask),
        };
        read.linear(&self.weight.tensor, Some(&self.bias.tensor)).transpose(1, 2)
    }

    /// g, as the logits; drawn in training.
    fn gates(&self, input: &AttnInput) -> Tensor {
        let logits = self.logits(input.hidden, input.mask);
        match input.train {
            true => gate(&(noise(input.stream, &logits) + logits)),
            false => gate(&logits),
        }
    }
}

/// g of the logits, noise and all.
fn gate(logits: &Tensor) -> Tensor {
    let s = (logits / BETA).sigmoid();
    (s * (1.0 + 2.0 * EPS) - EPS).clamp(0.0, 1.0)
}

/// ln u − ln(1 − u) for every logit.
fn noise(stream: Stream, logits: &Tensor) -> Tensor {
    use rand_chacha::rand_core::RngCore;
    let mut rng = stream.rng();
    let draw = |_| {
        let u = ((rng.next_u64() >> 12) as f64 + 0.5) / (1_u64 << 52) as f64;
        u.ln() - (1.0 - u).ln()
    };
    let values: Vec<f64> = (0..logits.numel()).map(draw).collect();
    Tensor::from_slice(&values)
        .view(logits.size().as_slice())
        .to_kind(logits.kind())
        .to_device(logits.device())
}

/// The mean of the real tokens' `hidden`: `[b, n, hidden_size] -> [b, 1, hidden_size]`; zero of a text without any.
fn mean_of_real(hidden: &Tensor, mask: &Mask) -> Tensor {
    let over = [1i64].as_slice();
    let Some(keep) = mask.keep() else { return hidden.mean_dim(over, true, None::<Kind>) };
    let keep = keep.unsqueeze(-1); // [b, n, 1]
    // Not a product: what stands at padding may be anything.
    let real = hidden.masked_fill(&keep.logical_not(), 0.0);
    let n_real = keep.sum_dim_intlist(over, true, hidden.kind()).clamp_min(1.0);
    real.sum_dim_intlist(over, true, None::<Kind>) / n_real
}

impl Attention for Routed {
    fn forward(&self, input: &AttnInput) -> Tensor {
        self.softmax.forward(input) * self.gates(input).unsqueeze(-1)
    }

    fn weights(&self, input: &AttnInput, rows: &[i64]) -> Tensor {
        let gates = self.gates(input).unsqueeze(-1); // [b, h, q or 1, 1]
        let gates = match self.config.by {
            By::Token => gates.index_select(2, &Tensor::from_slice(rows).to_device(gates.device())),
            By::Text => gates,
        };
        self.softmax.weights(input, rows) * gates
    }

    /// Softmax attention's, as if every head ran, and 2 · hidden_size · n_heads for each choice of the router.
    fn flops(&self, n_tokens: i64) -> i64 {
        let dims = &self.softmax.dims;
        let n_choices = if self.config.by == By::Text { 1 } else { n_tokens };
        self.softmax.flops(n_tokens) + pairs::projecting(dims, n_choices, dims.n_heads)
    }

    fn own_loss(&self, input: &AttnInput) -> Option<Tensor> {
        if !self.weight.tensor.requires_grad() && !self.bias.tensor.requires_grad() {
            return None;
        }
        let kind = wide(input.hidden.kind());
        let logits = self.logits(&input.hidden.detach(), input.mask).to_kind(kind);
        let open = (logits - BETA * (EPS / (1.0 + EPS)).ln()).sigmoid(); // [b, h, q or 1]
        let share = match (self.config.by, input.mask.keep()) {
            (By::Text, _) | (By::Token, None) => open.mean(None::<Kind>),
            (By::Token, Some(keep)) => {
                let q_len = open.size()[2];
                let real = keep.narrow(1, keep.size()[1] - q_len, q_len).to_kind(kind); // [b, q]
                let by_token = open.mean_dim([1i64].as_slice(), false, None::<Kind>);
                (by_token * &real).sum(None::<Kind>) / real.sum(None::<Kind>).clamp_min(1.0)
            }
        };
        Some((share - self.config.budget).clamp_min(0.0).square() * self.config.price)
    }

    fn routes(&self) -> Option<&dyn Routes> {
        Some(self)
    }

    fn visit(&self, f: &mut Visitor<'_>) {
        f(&self.weight.name, &self.weight.tensor);
        f(&self.bias.name, &self.bias.tensor);
    }

    fn select_heads(&mut self, heads: &[i64], dims: &Dims) -> Result<(), Error> {
        self.weight.select(0, heads);
        self.bias.select(0, heads);
        self.softmax.select_heads(heads, dims)
    }

    fn regroup_kv(&mut self, groups: &[Vec<i64>], dims: &Dims) -> Result<(), Error> {
        self.softmax.regroup_kv(groups, dims) // Gates belong to query heads.
    }
}

impl Routes for Routed {
    fn open(&self, hidden: &Tensor, mask: &Mask) -> Tensor {
        gate(&self.logits(hidden, mask))
    }

    fn spares_whole_heads(&self) -> bool {
        self.config.by == By::Text
    }

    fn mix(&self, qkv: [&Tensor; 3], mask: &Mask) -> Tensor {
        let dims = &self.softmax.dims;
        let n = qkv[0].size()[1];
        let part = Softmax {
            dims: Dims {
                n_heads: n,
                n_kv_heads: 1,
                kv_of_head: vec![0; n as usize],
                ..dims.clone()
            },
        };
        part.mix(qkv, mask, 0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Probe, assert_close, naive_attention, randn};

    fn param(name: &str, tensor: Tensor) -> Param {
        Param { name: name.into(), tensor }
    }

    /// A kind that closes about a third of the heads.
    fn routed(probe: &Probe, by: By) -> Routed {
        let (n_heads, hidden_size) = (probe.dims.n_heads, probe.dims.hidden_size);
        Routed {
            config: Config { by, budget: 0.25, price: 2.0 },
            weight: param("w", randn(5, &[n_heads, hidden_size]) * 2.0),
            bias: param("b", randn(6, &[n_heads])),
            softmax: Softmax { dims: probe.dims.clone() },
        }
    }

    /// r of head h where it reads `x`.
    fn logit(kind: &Routed, h: i64, x: &[f64]) -> f64 {
        let weight = &kind.weight.tensor;
        let dot: f64 = (0..).zip(x).map(|(c, x)| weight.double_value(&[h, c]) * x).sum();
        dot + kind.bias.tensor.double_value(&[h])
    }

    fn sigmoid(x: f64) -> f64 {
        1.0 / (1.0 + (-x).exp())
    }

    fn channels(hidden: &Tensor, b: i64, i: i64) -> Vec<f64> {
        Vec::try_from(hidden.get(b).get(i)).unwrap()
    }

    /// What the router reads for token i of row b, of which the first `n_real` are real.
    fn read(probe: &Probe, by: By, b: i64, i: i64, n_real: i64) -> Vec<f64> {
        match by {
            By::Token => channels(&probe.hidden, b, i),
            By::Text => {
                let all = (0..n_real).map(|j| channels(&probe.hidden, b, j));
                let sum = all.reduce(|a, b| a.iter().zip(&b).map(|(a, b)| a + b).collect());
                sum.unwrap().iter().map(|x| x / n_real as f64).collect()
            }
        }
    }

    /// Rows of 9 tokens of which 9 and 6 are real.
    const N_REAL: [i64; 2] = [9, 6];

    fn mask(causal: bool) -> Mask {
        let keep = Tensor::from_slice(&N_REAL)
            .unsqueeze(1)
            .gt_tensor(&Tensor::arange(9, (Kind::Int64, Device::Cpu)));
        Mask::with_keep(causal, &keep)
    }

    #[test]
    fn matches_the_definition() {
        for (by, causal) in [(By::Token, true), (By::Token, false), (By::Text, false)] {
            let probe = Probe::new(31, [2, 9, 9], 4, 2, causal);
            let kind = routed(&probe, by);
            let mask = mask(causal);
            let z = kind.forward(&probe.input(&mask));
            let mut n_closed = 0;
            for (b, n_real) in (0..).zip(N_REAL) {
                let cut = |x: &Tensor, dim| x.narrow(0, b, 1).narrow(dim, 0, n_real);
                let own = Probe {
                    dims: probe.dims.clone(),
                    hidden: cut(&probe.hidden, 1),
                    q: cut(&probe.q, 2),
                    k: cut(&probe.k, 2),
                    v: cut(&probe.v, 2),
                    positions: cut(&probe.positions, 1),
                };
                let (expected, _) = naive_attention(&own, |i, j| !causal || j <= i);
                for h in 0..4 {
                    for i in 0..n_real {
                        let r = logit(&kind, h, &read(&probe, by, b, i, n_real));
                        let gate = (1.2 * sigmoid(r / 0.33) - 0.1).clamp(0.0, 1.0);
                        n_closed += u32::from(gate == 0.0);
                        let _ = expected.get(0).get(h).get(i).g_mul_scalar_(gate);
                    }
                }
                let real = z.narrow(0, b, 1).narrow(2, 0, n_real);
                assert_close(&format!("{by:?}, causal {causal}, row {b}"), &real, &expected, 1e-12);
            }
            assert!((9..40).contains(&n_closed), "{by:?}: {n_closed} of 60 closed");
        }
    }

    #[test]
    fn gates_are_drawn_in_training_as_often_open_as_their_probability_says() {
        let probe = Probe::new(33, [2, 2000, 1], 3, 1, false);
        let mask = Mask::new(false);
        let flat = Probe { hidden: probe.hidden.zeros_like(), ..probe };
        let kind = Routed {
            bias: param("b", Tensor::from_slice(&[-2.0, -0.5, 1.0])),
            ..routed(&flat, By::Token)
        };
        let input = AttnInput {
            train: true,
            stream: Stream { seed: 1, step: 3, layer: 1 },
            ..flat.input(&mask)
        };
        let gates = kind.gates(&input); // [2, 3, 2000]
        for (h, r) in (0..).zip([-2.0, -0.5, 1.0_f64]) {
            let of_head = gates.select(1, h);
            let share = of_head.gt(0.0).to_kind(Kind::Double).mean(Kind::Double).double_value(&[]);
            let expected = sigmoid(r - 0.33 * (0.1_f64 / 1.1).ln());
            assert!((share - expected).abs() < 0.03, "{r}: {share} for {expected}"); // four standard errors
            let n_whole = of_head.eq(1.0).sum(Kind::Int64).int64_value(&[]);
            assert!(n_whole > 100, "the ends have mass");
        }
        let again = kind.gates(&input);
        assert!(again.equal(&gates), "the stream says what is drawn");
        let other = AttnInput { stream: Stream { seed: 1, step: 4, layer: 1 }, ..input };
        assert!(!kind.gates(&other).equal(&gates));
    }

    #[test]
    fn its_own_loss_is_the_price_of_what_is_over_the_budget() {
        for by in [By::Token, By::Text] {
            let probe = Probe::new(35, [2, 9, 9], 4, 2, false);
            let mask = mask(false);
            let input = AttnInput { train: true, ..probe.input(&mask) };
            let kind = routed(&probe, by);
            assert!(kind.own_loss(&input).is_none(), "nothing is trained");
            let own = [&kind.weight.tensor, &kind.bias.tensor].map(|x| x.set_requires_grad(true));
            let hidden = probe.hidden.copy().set_requires_grad(true);
            let input = AttnInput { hidden: &hidden, ..input };

            let (mut sum, mut n) = (0.0, 0.0);
            for (b, n_real) in (0..).zip(N_REAL) {
                for i in 0..if by == By::Text { 1 } else { n_real } {
                    for h in 0..4 {
                        let r = logit(&kind, h, &read(&probe, by, b, i, n_real));
                        sum += sigmoid(r - 0.33 * (0.1_f64 / 1.1).ln());
                        n += 1.0;
                    }
                }
            }
            let expected = 2.0 * (sum / n - 0.25_f64).max(0.0).powi(2);
            assert!(expected > 0.01, "over the budget: {expected}");
            let loss = kind.own_loss(&input).unwrap();
            assert!((loss.double_value(&[]) - expected).abs() < 1e-12, "{by:?}");

            loss.backward();
            assert!(!hidden.grad().defined(), "the router's own parameters alone learn from it");
            for tensor in own {
                let (start, along) = (tensor.detach().copy(), randn(7, &tensor.size()));
                let at = |by: f64| {
                    tch::no_grad(|| tensor.shallow_clone().copy_(&(&start + &along * by)));
                    kind.own_loss(&input).unwrap().double_value(&[])
                };
                let seen = (at(1e-6) - at(-1e-6)) / 2e-6;
                at(0.0);
                let promised = (tensor.grad() * along).sum(Kind::Double).double_value(&[]);
                assert!((seen - promised).abs() < 1e-7, "{by:?}: {seen} for {promised}");
            }
            let rich = Routed { config: Config { budget: 1.0, ..kind.config.clone() }, ..kind };
            assert_eq!(rich.own_loss(&input).unwrap().double_value(&[]), 0.0, "within its budget");
        }
    }

    #[test]
    fn drawn_gates_have_gradients_of_their_own() {
        let probe = Probe::new(37, [2, 9, 9], 4, 2, true);
        let mask = mask(true);
        let kind = routed(&probe, By::Token);
        let weight = kind.weight.tensor.set_requires_grad(true);
        let pull = randn(8, &probe.q.size());
        let value = || {
            let input = AttnInput { train: true, ..probe.input(&mask) };
            (kind.forward(&input) * &pull).sum(Kind::Double)
        };
        value().backward();
        let (start, along) = (weight.detach().copy(), randn(9, &weight.size()));
        let at = |by: f64| {
            tch::no_grad(|| weight.shallow_clone().copy_(&(&start + &along * by)));
            value().double_value(&[])
        };
        let seen = (at(1e-7) - at(-1e-7)) / 2e-7;
        let promised = (weight.grad() * &along).sum(Kind::Double).double_value(&[]);
        assert!(promised.abs() > 0.1);
        assert!((seen - promised).abs() / promised.abs() < 1e-6, "{seen} for {promised}");
    }

    #[test]
    fn starts_out_as_softmax() {
        let probe = Probe::new(39, [2, 9, 9], 4, 2, false);
        for by in [By::Token, By::Text] {
            let mut kind = routed(&probe, by);
            (kind.weight.tensor, kind.bias.tensor) =
                (kind.weight.tensor.zeros_like(), kind.bias.tensor.full_like(START));
            let mask = mask(false);
            let input = probe.input(&mask);
            assert!(kind.forward(&input).equal(&kind.softmax.forward(&input)));
        }
    }

    #[test]
    fn dropping_a_head_drops_its_gate() {
        let probe = Probe::new(32, [1, 5, 5], 4, 4, true);
        let mask = Mask::new(true);
        let mut kind = routed(&probe, By::Token);
        let keep = [0i64, 3];
        let whole = kind.forward(&probe.input(&mask)).index_select(1, &Tensor::from_slice(&keep));
        let part = probe.select_heads(&keep);
        kind.select_heads(&keep, &part.dims).unwrap();
        assert_close("two of four heads", &kind.forward(&part.input(&mask)), &whole, 1e-12);
    }
}
