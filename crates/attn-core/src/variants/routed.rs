//! Softmax attention whose heads run where the input asks for them: a router of one row per head closes the others.
//!
//! ```text
//! z_hi = g_hi Σ_j softmax_j(s_ij) v_j,   g_hi = 1 if r_hi > 0, else 0
//! by = "token"    r_hi = w_h·x_i + b_h       each token opens heads for its own query
//! by = "text"     r_hi = w_h·x̄ + b_h         x̄: the mean of the text's real tokens, one choice for all its queries
//!
//! in training     ∂g/∂r = σ'(r), as if g were σ(r)
//! own loss        price · (mean g − budget)²
//! ```
//!
//! Heads chosen by each token: Jin et al. 2024, "MoH: Multi-Head Attention as Mixture-of-Head Attention",
//! <https://arxiv.org/abs/2410.11842>. The gradient of the step is the straight-through estimator of Bengio, Léonard, Courville 2013,
//! <https://arxiv.org/abs/1308.3432>, section 4, with the slope of a sigmoid.
//!
//! Deviations: MoH keeps a fixed number of heads, some of them always, and weighs them; here as many run as the input asks for, within
//! a budget that each layer keeps on average over a batch. At w = 0 and b_h = 1 + h/n_heads, the start, every head runs and
//! the layer is what it was; were all b alike, all heads of a layer would close at one step. Gates that are drawn in training (hard concrete, as `attn_eval` learns fixed ones by) were tried: the budget is then kept by
//! leaving every gate half open, and nearly all heads run once nothing is drawn.
//!
//! - `by = "text"` closes whole heads for a text: outside of training the layer then makes no queries, keys, values or output
//!   of them, where that saves something: on a CPU, where enough tokens go without a head to be worth a copy of the matrices of
//!   the others, and nothing of single heads is asked for (attention rows, z, adapters, gates that learn). It is refused in causal layers, whose first tokens would learn what the last ones say.
//! - `by = "token"` is causal and decodes. Keys and values of a head are needed by whichever later token opens it, and what its
//!   closed queries would cost is not saved here: gates are multiplied in.

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::softmax::Softmax;
use crate::{
    Error,
    attention::{Attention, AttnInput, Dims, Nature, Own, Param, Projections, Routes, Selection},
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
    /// The share of a layer's heads that are to run, over 0 and at most 1, on average over the real tokens (texts) of a training
    /// batch. A pull, not a bound: how many run on other text, `attn score-heads --method open` measures.
    pub budget: f64,
    /// What missing the budget costs, in nats for a share of 1.
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

/// The first logit of head 0, the lowest: it runs.
const START: f64 = 1.0;

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
        let starts = (0..dims.n_heads).map(|h| START + h as f64 / dims.n_heads as f64);
        let start = Init::Value(Tensor::from_slice(&starts.collect::<Vec<f64>>()));
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

    /// g, as the logits.
    fn gates(&self, input: &AttnInput) -> Tensor {
        let logits = self.logits(input.hidden, input.mask);
        match (input.selection, input.train) {
            (Some(chosen), _) => chosen.squeeze_dim(-1).to_kind(logits.kind()),
            (None, true) => straight_through(&logits),
            (None, false) => step(&logits),
        }
    }
}

/// g of the logits.
fn step(logits: &Tensor) -> Tensor {
    logits.gt(0.0).to_kind(logits.kind())
}

/// g of the logits, with the gradient of a sigmoid.
fn straight_through(logits: &Tensor) -> Tensor {
    let smooth = logits.sigmoid();
    // In this order the difference is 0 to the last bit.
    step(logits) + (&smooth - smooth.detach())
}

/// The mean of the real tokens' `hidden`: `[b, n, hidden_size] -> [b, 1, hidden_size]`; zero of a text without any.
fn mean_of_real(hidden: &Tensor, mask: &Mask) -> Tensor {
    let over = [1i64].as_slice();
    let wide = wide(hidden.kind());
    let Some(keep) = mask.keep() else {
        return hidden.mean_dim(over, true, wide).to_kind(hidden.kind());
    };
    let keep = keep.unsqueeze(-1); // [b, n, 1]
    // Not a product: what stands at padding may be anything.
    let real = hidden.masked_fill(&keep.logical_not(), 0.0);
    let n_real = keep.sum_dim_intlist(over, true, wide).clamp_min(1.0);
    (real.sum_dim_intlist(over, true, wide) / n_real).to_kind(hidden.kind())
}

impl Attention for Routed {
    fn forward(&self, input: &AttnInput) -> Tensor {
        self.softmax.forward(input) * self.gates(input).unsqueeze(-1)
    }

    fn weights(&self, input: &AttnInput, rows: &[i64]) -> Tensor {
        let gates = self.gates(input).unsqueeze(-1); // [b, h, q or 1, 1]
        let gates = match gates.size()[2] {
            1 => gates,
            _ => gates.index_select(2, &Tensor::from_slice(rows).to_device(gates.device())),
        };
        self.softmax.weights(input, rows) * gates
    }

    /// Softmax attention's, as if every head ran, and 2 · hidden_size · n_heads for each choice of the router.
    fn flops(&self, n_tokens: i64) -> i64 {
        let dims = &self.softmax.dims;
        let n_choices = if self.config.by == By::Text { 1 } else { n_tokens };
        self.softmax.flops(n_tokens) + pairs::projecting(dims, n_choices, dims.n_heads)
    }

    super::holds!(1, 2);

    fn nature(&self) -> Nature {
        Nature { reach: 0, chooses: true, reads_coordinates: false, has_own_slopes: true }
    }

    fn selection(&self, input: &AttnInput) -> Option<Selection> {
        let logits = self.logits(input.hidden, input.mask);
        let size = [logits.size()[0], logits.size()[1], input.q.size()[2]];
        Some(Selection {
            chosen: logits.gt(0.0).expand(size, false).unsqueeze(-1), // [b, h, q, 1]
            margin: logits.abs().expand(size, false),
        })
    }

    fn own_loss(&self, input: &AttnInput) -> Option<Tensor> {
        if !self.weight.tensor.requires_grad() && !self.bias.tensor.requires_grad() {
            return None;
        }
        let kind = wide(input.hidden.kind());
        let logits = self.logits(&input.hidden.detach(), input.mask).to_kind(kind);
        let open = straight_through(&logits); // [b, h, q or 1]
        let share = match (self.config.by, input.mask.keep()) {
            (By::Text, _) | (By::Token, None) => open.mean(None::<Kind>),
            (By::Token, Some(keep)) => {
                let q_len = open.size()[2];
                let real = keep.narrow(1, keep.size()[1] - q_len, q_len).to_kind(kind); // [b, q]
                let by_token = open.mean_dim([1i64].as_slice(), false, None::<Kind>);
                (by_token * &real).sum(None::<Kind>) / real.sum(None::<Kind>).clamp_min(1.0)
            }
        };
        Some((share - self.config.budget).square() * self.config.price)
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
        step(&self.logits(hidden, mask))
    }

    fn spares_whole_heads(&self) -> bool {
        self.config.by == By::Text
    }

    fn mix(&self, heads: &[i64], qkv: [&Tensor; 3], mask: &Mask) -> Tensor {
        let part = Softmax { dims: self.softmax.dims.of_heads(heads) };
        part.mix(qkv, mask, 0.0)
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

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
                        n_closed += u32::from(r <= 0.0);
                        let _ = expected
                            .get(0)
                            .get(h)
                            .get(i)
                            .g_mul_scalar_(f64::from(u8::from(r > 0.0)));
                    }
                }
                let real = z.narrow(0, b, 1).narrow(2, 0, n_real);
                assert_close(&format!("{by:?}, causal {causal}, row {b}"), &real, &expected, 1e-12);
            }
            assert!((9..52).contains(&n_closed), "{by:?}: {n_closed} of 60 closed");
        }
    }

    #[test]
    fn its_own_loss_is_the_price_of_missing_the_budget() {
        for by in [By::Token, By::Text] {
            let probe = Probe::new(35, [2, 9, 9], 4, 2, false);
            let mask = mask(false);
            let input = AttnInput { train: true, ..probe.input(&mask) };
            let kind = routed(&probe, by);
            assert!(kind.own_loss(&input).is_none(), "nothing is trained");
            let own = [&kind.weight.tensor, &kind.bias.tensor].map(|x| x.set_requires_grad(true));
            let hidden = probe.hidden.copy().set_requires_grad(true);
            let input = AttnInput { hidden: &hidden, ..input };

            let (mut n_open, mut n) = (0.0, 0.0);
            let mut slopes = [[0.0; 11]; 4]; // Σ σ'(r) [x, 1] of every head
            for (b, n_real) in (0..).zip(N_REAL) {
                for i in 0..if by == By::Text { 1 } else { n_real } {
                    for h in 0..4 {
                        let x = read(&probe, by, b, i, n_real);
                        let r = logit(&kind, h, &x);
                        n_open += f64::from(u8::from(r > 0.0));
                        n += 1.0;
                        let slope = sigmoid(r) * (1.0 - sigmoid(r));
                        for (sum, x) in slopes[h as usize].iter_mut().zip(x.iter().chain([&1.0])) {
                            *sum += slope * x;
                        }
                    }
                }
            }
            let over = n_open / n - 0.25;
            assert!(over > 0.1, "over the budget: {over}");
            let loss = kind.own_loss(&input).unwrap();
            assert!((loss.double_value(&[]) - 2.0 * over * over).abs() < 1e-12, "{by:?}");

            loss.backward();
            assert!(!hidden.grad().defined(), "the router's own parameters alone learn from it");
            let found = Tensor::cat(&[own[0].grad(), own[1].grad().unsqueeze(1)], 1);
            let expected = Tensor::from_slice2(&slopes) * (2.0 * 2.0 * over / n);
            assert_close("slopes of the router", &found, &expected, 1e-12);
            let rich = Routed { config: Config { budget: 1.0, ..kind.config.clone() }, ..kind };
            let under = n_open / n - 1.0;
            assert!(
                (rich.own_loss(&input).unwrap().double_value(&[]) - 2.0 * under * under).abs()
                    < 1e-12
            );
        }
    }

    /// The gradient of a gate goes on with the slope of a sigmoid, closed gates included, and training changes no output.
    #[test]
    fn in_training_gradients_pass_the_step() {
        let probe = Probe::new(37, [2, 9, 9], 4, 2, true);
        let mask = mask(true);
        let kind = routed(&probe, By::Token);
        let own = [&kind.weight.tensor, &kind.bias.tensor].map(|x| x.set_requires_grad(true));
        let pull = randn(8, &probe.q.size());
        let plain = kind.forward(&probe.input(&mask));
        assert!(!plain.requires_grad(), "a step has no slope");
        let z = kind.forward(&AttnInput { train: true, ..probe.input(&mask) });
        assert!(z.equal(&plain));
        (z * &pull).sum(Kind::Double).backward();

        let all = kind.softmax.forward(&probe.input(&mask));
        let mut slopes = [[0.0; 11]; 4];
        for (b, i, h, c) in probe.each_output() {
            let x = channels(&probe.hidden, b, i);
            let r = logit(&kind, h, &x);
            let of_gate =
                (&all * &pull).double_value(&[b, h, i, c]) * sigmoid(r) * (1.0 - sigmoid(r));
            for (sum, x) in slopes[h as usize].iter_mut().zip(x.iter().chain([&1.0])) {
                *sum += of_gate * x;
            }
        }
        let found = Tensor::cat(&[own[0].grad(), own[1].grad().unsqueeze(1)], 1);
        assert_close("slopes of the router", &found, &Tensor::from_slice2(&slopes), 1e-12);
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
