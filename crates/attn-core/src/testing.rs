//! Helpers for tests of this crate and of crates that build on it (feature `testing`).

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use tch::{Device, Kind, Tensor};

use crate::{
    attention::{Attention, AttnInput, Dims, Own, Projections, Stream},
    mask::Mask,
    model::Model,
    variants::Variant,
    weights::Weights,
};

/// Puts a kind of no variant, such as a faulty one, into layer `layer` of a model.
pub fn plant(
    model: &mut Model,
    layer: usize,
    faulty: impl Fn(Box<dyn Attention>) -> Box<dyn Attention>,
) {
    let layer = model.arch.layer_mut(layer);
    let variant = layer.variant().clone();
    let kind = layer.build(&variant, 0).expect("the layer has such a kind");
    layer.install(&variant, faulty(kind));
}

/// Every kind by its defaults, but for those that choose among blocks or keys: they have room to in 16 tokens, where a model's
/// length would make them refuse their defaults.
///
/// # Panics
/// Never.
pub fn kinds() -> Vec<Variant> {
    let small = [
        r#"{"kind": "nsa", "compress_block": 4, "compress_stride": 2, "select_block": 4, "n_selected": 3, "n_local": 1,
            "window": 3}"#,
        r#"{"kind": "moba", "block": 3, "top_k": 2}"#,
        r#"{"kind": "big_bird", "block": 2, "n_global": 1, "n_window": 3, "n_random": 2}"#,
        r#"{"kind": "indexed", "n_index_heads": 2, "index_dim": 5, "top_k": 4}"#,
    ];
    let small = small.map(|text| serde_json::from_str::<Variant>(text).expect("known settings"));
    let fitting = |kind: Variant| {
        let found = small.iter().find(|small| small.name() == kind.name());
        found.cloned().unwrap_or(kind)
    };
    Variant::all().into_iter().map(fitting).collect()
}

/// `rms(actual − expected) / rms(expected)`; the plain rms where `expected` is all zeros.
pub fn relative_rms(actual: &Tensor, expected: &Tensor) -> f64 {
    assert_eq!(actual.size(), expected.size(), "shapes differ");
    let wide = |x: &Tensor| x.to_device(Device::Cpu).to_kind(Kind::Double);
    let rms = |x: Tensor| x.square().mean(Kind::Double).sqrt().double_value(&[]);
    let scale = rms(wide(expected));
    rms(wide(actual) - wide(expected)) / if scale > 0.0 { scale } else { 1.0 }
}

/// Panics where [`relative_rms`] is above `tolerance` or not a number.
///
/// # Panics
/// See above.
#[track_caller]
pub fn assert_close(name: &str, actual: &Tensor, expected: &Tensor, tolerance: f64) {
    let error = relative_rms(actual, expected);
    assert!(
        error <= tolerance,
        "{name}: relative rms {error:.3e}, at most {tolerance:.0e} allowed"
    );
}

/// Standard normal `f64` values from a seed of their own: tests run on threads, LibTorch has one generator.
pub fn randn(seed: u64, size: &[i64]) -> Tensor {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let n: i64 = size.iter().product();
    let values: Vec<f64> = (0..n).map(|_| StandardNormal.sample(&mut rng)).collect();
    Tensor::from_slice(&values).view(size)
}

/// Token ids below `vocab_size`: `[batch, seq_len]`.
pub fn random_ids(seed: u64, size: [i64; 2], vocab_size: i64) -> Tensor {
    let uniform = (randn(seed, &size) * 1e6).to_kind(Kind::Int64);
    uniform.remainder(vocab_size)
}

/// The input of one attention layer in `f64`.
#[derive(Debug)]
pub struct Probe {
    /// The layer's extents.
    pub dims: Dims,
    /// `[b, q, hidden]`.
    pub hidden: Tensor,
    /// `[b, n_heads, q, d]`.
    pub q: Tensor,
    /// `[b, n_kv_heads, k, d]`.
    pub k: Tensor,
    /// `[b, n_kv_heads, k, d]`.
    pub v: Tensor,
    /// `[b, q]`.
    pub positions: Tensor,
}

impl Probe {
    /// Random q, k, v and hidden states; `size` is `[batch, q_len, k_len]`. Heads have 6 channels.
    pub fn new(
        seed: u64,
        [b, q_len, k_len]: [i64; 3],
        n_heads: i64,
        n_kv_heads: i64,
        causal: bool,
    ) -> Self {
        let head_dim = 6;
        let dims = Dims {
            hidden_size: 10,
            n_heads,
            n_kv_heads,
            head_dim,
            kv_of_head: (0..n_heads).map(|head| head * n_kv_heads / n_heads).collect(),
            scale: (head_dim as f64).powf(-0.5),
            causal,
            rotary: false,
            max_len: None,
        };
        Self::with_dims(seed, [b, q_len, k_len], dims)
    }

    /// [`Self::new`] for a layer of other extents.
    pub fn with_dims(seed: u64, [b, q_len, k_len]: [i64; 3], dims: Dims) -> Self {
        let Dims { n_heads, n_kv_heads, head_dim, .. } = dims;
        let draw = |i: u64, size: &[i64]| randn(seed * 100 + i, size);
        Self {
            hidden: draw(0, &[b, q_len, dims.hidden_size]),
            // Laid out as a layer cuts them from its projections: not contiguous.
            q: draw(1, &[b, q_len, n_heads, head_dim]).transpose(1, 2),
            k: draw(2, &[b, k_len, n_kv_heads, head_dim]).transpose(1, 2),
            v: draw(3, &[b, k_len, n_kv_heads, head_dim]).transpose(1, 2),
            positions: Tensor::arange_start(k_len - q_len, k_len, (Kind::Int64, Device::Cpu))
                .expand([b, q_len], false),
            dims,
        }
    }

    /// The variant for this layer, in the probe's kind and on its device, its own parameters drawn from a fixed seed and
    /// alike in every kind.
    ///
    /// # Panics
    /// Where the settings do not fit the probe.
    pub fn build(&self, variant: &Variant) -> Box<dyn Attention> {
        let (kind, device) = (self.q.kind(), self.q.device());
        let zeros = |heads: i64| {
            (
                Tensor::zeros([heads * self.dims.head_dim, self.dims.hidden_size], (kind, device)),
                None,
            )
        };
        let projections = Projections {
            q: zeros(self.dims.n_heads),
            k: zeros(self.dims.n_kv_heads),
            v: zeros(self.dims.n_kv_heads),
        };
        let mut weights = Weights::from_seed(7, kind, device);
        let built = variant.build(&self.dims, &projections, &mut Own::new(&mut weights, "probe"));
        let built = built.expect("the settings fit the probe");
        built.visit(&mut |name, tensor| {
            let value = randn(crate::weights::fnv1a(name), &tensor.size()) * 0.3;
            tch::no_grad(|| tensor.shallow_clone().copy_(&value));
        });
        built
    }

    /// The probe as a variant sees it.
    pub fn input<'a>(&'a self, mask: &'a Mask) -> AttnInput<'a> {
        AttnInput {
            hidden: &self.hidden,
            q: &self.q,
            k: &self.k,
            v: &self.v,
            rotary: None,
            positions: &self.positions,
            mask,
            source: None,
            dropout: 0.0,
            train: false,
            stream: Stream::default(),
            selection: None,
        }
    }

    /// The same probe in another kind and on another device.
    pub fn to(&self, kind: Kind, device: Device) -> Self {
        let to = |x: &Tensor| x.to_kind(kind).to_device(device);
        Self {
            dims: self.dims.clone(),
            hidden: to(&self.hidden),
            q: to(&self.q),
            k: to(&self.k),
            v: to(&self.v),
            positions: self.positions.to_device(device),
        }
    }

    /// The probe with some of its query heads (key/value heads stay).
    pub fn select_heads(&self, heads: &[i64]) -> Self {
        let mut part = self.to(self.q.kind(), self.q.device());
        part.q = self.q.index_select(1, &Tensor::from_slice(heads));
        part.dims.n_heads = heads.len() as i64;
        part.dims.kv_of_head =
            heads.iter().map(|&head| self.dims.kv_of_head[head as usize]).collect();
        part
    }

    /// The first `n` tokens of one example.
    pub fn narrowed(&self, example: i64, n: i64) -> Self {
        let cut = |x: &Tensor, dim: i64| x.narrow(0, example, 1).narrow(dim, 0, n);
        Self {
            dims: self.dims.clone(),
            hidden: cut(&self.hidden, 1),
            q: cut(&self.q, 2),
            k: cut(&self.k, 2),
            v: cut(&self.v, 2),
            positions: cut(&self.positions, 1),
        }
    }

    /// Every `(example, query, head, channel)` of the output.
    pub fn each_output(&self) -> impl Iterator<Item = (i64, i64, i64, i64)> {
        let [b, h, n, d] = self.q.size()[..] else { unreachable!("queries have four axes") };
        (0..b * n * h * d).map(move |at| (at / (n * h * d), at / (h * d) % n, at / d % h, at % d))
    }
}

/// Softmax attention from its definition, one query at a time, in `f64`, where query i may see key j if `sees(i, j)`.
/// Returns z and the weights.
pub fn naive_attention(probe: &Probe, sees: impl Fn(usize, usize) -> bool) -> (Tensor, Tensor) {
    naive_attention_of(probe, |_, _, i, j| sees(i as usize, j as usize))
}

/// [`naive_attention`] where what is seen differs between examples and heads: `sees(example, head, i, j)`.
pub fn naive_attention_of(
    probe: &Probe,
    sees: impl Fn(i64, i64, i64, i64) -> bool,
) -> (Tensor, Tensor) {
    let [b, h, q_len, d] = probe.q.size()[..] else { unreachable!("queries have four axes") };
    let k_len = probe.k.size()[2];
    let values =
        |x: &Tensor| Vec::<f64>::try_from(x.contiguous().view([-1])).expect("the probe is f64");
    let (q, k, v) = (values(&probe.q), values(&probe.k), values(&probe.v));
    let at = |x: &[f64], n_heads: i64, len: i64, index: [i64; 4]| {
        x[(((index[0] * n_heads + index[1]) * len + index[2]) * d + index[3]) as usize]
    };
    let n_kv = probe.dims.n_kv_heads;
    let (mut z, mut all_weights) = (Vec::new(), Vec::new());
    for example in 0..b {
        for head in 0..h {
            let kv = probe.dims.kv_of_head[head as usize];
            for i in 0..q_len {
                let score = |j: i64| -> f64 {
                    (0..d)
                        .map(|c| {
                            at(&q, h, q_len, [example, head, i, c])
                                * at(&k, n_kv, k_len, [example, kv, j, c])
                        })
                        .sum()
                };
                let exp: Vec<f64> = (0..k_len)
                    .map(|j| {
                        if sees(example, head, i, j) {
                            (score(j) * probe.dims.scale).exp()
                        } else {
                            0.0
                        }
                    })
                    .collect();
                let total: f64 = exp.iter().sum();
                let weights: Vec<f64> = exp.iter().map(|e| e / total).collect();
                z.extend((0..d).map(|c| {
                    (0..k_len)
                        .map(|j| weights[j as usize] * at(&v, n_kv, k_len, [example, kv, j, c]))
                        .sum::<f64>()
                }));
                all_weights.extend(weights);
            }
        }
    }
    (
        Tensor::from_slice(&z).view([b, h, q_len, d]),
        Tensor::from_slice(&all_weights).view([b, h, q_len, k_len]),
    )
}

/// Linear attention from its definition, weight by weight, in `f64`: weights proportional to φ_q(q_i)·φ_k(k_j) where
/// `mask` lets query i see key j. The maps take a query head and a vector. Returns z and the weights; both are 0 where
/// a query sees no key.
pub fn naive_linear(
    probe: &Probe,
    mask: &Mask,
    phi_q: impl Fn(i64, &[f64]) -> Vec<f64>,
    phi_k: impl Fn(i64, &[f64]) -> Vec<f64>,
) -> (Tensor, Tensor) {
    let [b, h, q_len, d] = probe.q.size()[..] else { unreachable!("queries have four axes") };
    let k_len = probe.k.size()[2];
    let row = |x: &Tensor, at: [i64; 3]| {
        let x = x.get(at[0]).get(at[1]).get(at[2]).contiguous();
        Vec::<f64>::try_from(x).expect("the probe is f64")
    };
    let allowed = mask.allowed(q_len, k_len, Device::Cpu).expand([b, 1, q_len, k_len], false);
    let allowed = Vec::<f64>::try_from(allowed.to_kind(Kind::Double).contiguous().view([-1]))
        .expect("a mask converts to numbers");
    let (mut z, mut all_weights) = (Vec::new(), Vec::new());
    for (example, head) in (0..b * h).map(|at| (at / h, at % h)) {
        let kv = probe.dims.kv_of_head[head as usize];
        let keys: Vec<Vec<f64>> =
            (0..k_len).map(|j| phi_k(head, &row(&probe.k, [example, kv, j]))).collect();
        let values: Vec<Vec<f64>> = (0..k_len).map(|j| row(&probe.v, [example, kv, j])).collect();
        for i in 0..q_len {
            let query = phi_q(head, &row(&probe.q, [example, head, i]));
            let scores: Vec<f64> = (0..k_len)
                .map(|j| {
                    let sees = allowed[((example * q_len + i) * k_len + j) as usize] > 0.0;
                    let dot = || query.iter().zip(&keys[j as usize]).map(|(x, y)| x * y).sum();
                    if sees { dot() } else { 0.0 }
                })
                .collect();
            let total: f64 = scores.iter().sum();
            let weights: Vec<f64> =
                scores.iter().map(|s| if total == 0.0 { 0.0 } else { s / total }).collect();
            z.extend(
                (0..d as usize)
                    .map(|c| weights.iter().zip(&values).map(|(w, v)| w * v[c]).sum::<f64>()),
            );
            all_weights.extend(weights);
        }
    }
    (
        Tensor::from_slice(&z).view([b, h, q_len, d]),
        Tensor::from_slice(&all_weights).view([b, h, q_len, k_len]),
    )
}

/// A mask that hides a third of the last row's keys: the last ones, or under a causal mask those behind the first, so
/// that every query sees one. Of a single token it hides nothing.
pub fn partly_hidden(causal: bool, batch: i64, len: i64) -> Mask {
    let keep = Tensor::ones([batch, len], (Kind::Int64, Device::Cpu));
    let first = if causal { 1.min(len - 1) } else { len - len / 3 };
    let _ = keep.get(batch - 1).narrow(0, first, len / 3).fill_(0);
    Mask::with_keep(causal, &keep)
}
