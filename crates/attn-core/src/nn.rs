//! The few layers that every architecture is made of. Each knows its name in the checkpoint, so that walking a
//! model lists its parameters under the published names.

use tch::{Device, Kind, Tensor};

use crate::{
    Error,
    lora::Adapter,
    weights::{Init, Weights},
};

/// Receives the name and the tensor of each parameter.
pub type Visitor<'a> = dyn FnMut(&str, &Tensor) + 'a;

/// How a [`Linear`] stores its matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// `[out, in]`, as PyTorch's `nn.Linear`.
    OutIn,
    /// `[in, out]`, as GPT-2's `Conv1D`.
    InOut,
}

/// `y = x Wᵀ + b`, and what an adapter adds.
#[derive(Debug)]
pub struct Linear {
    /// Name in the checkpoint, without `.weight`.
    pub name: String,
    /// `[out, in]` or `[in, out]`, see `layout`.
    pub weight: Tensor,
    /// `[out]`.
    pub bias: Option<Tensor>,
    /// Which of the two.
    pub layout: Layout,
    /// A low-rank correction.
    pub(crate) adapter: Option<Adapter>,
}

impl Linear {
    /// Takes `{name}.weight` and, if `bias`, `{name}.bias` from `weights`.
    pub fn new(
        weights: &mut Weights,
        name: impl Into<String>,
        [n_in, n_out]: [i64; 2],
        bias: bool,
        layout: Layout,
        std: f64,
    ) -> Result<Self, Error> {
        let name = name.into();
        let shape = match layout {
            Layout::OutIn => [n_out, n_in],
            Layout::InOut => [n_in, n_out],
        };
        let weight = weights.get(&format!("{name}.weight"), &shape, Init::Normal(std))?;
        let bias = if bias {
            Some(weights.get(&format!("{name}.bias"), &[n_out], Init::Zeros)?)
        } else {
            None
        };
        Ok(Self { name, weight, bias, layout, adapter: None })
    }

    /// `[.., in] -> [.., out]`; `train` turns on the dropout of an adapter.
    pub fn forward(&self, x: &Tensor, train: bool) -> Tensor {
        let weight = self.out_in();
        let y = product(x, &weight, self.bias.as_ref());
        match &self.adapter {
            Some(adapter) => y + adapter.forward(x, weight.size()[0], train),
            None => y,
        }
    }

    /// [`Self::forward`] of the outputs `channels` (int64) alone, without an adapter.
    pub(crate) fn some_outputs(&self, x: &Tensor, channels: &Tensor) -> Tensor {
        let bias = self.bias.as_ref().map(|bias| bias.index_select(0, channels));
        product(x, &self.out_in().index_select(0, channels), bias.as_ref())
    }

    /// [`Self::forward`] of an input that is zero but for `channels` (int64): `x`, `[.., channels]`, has these alone. Without an
    /// adapter.
    pub(crate) fn some_inputs(&self, x: &Tensor, channels: &Tensor) -> Tensor {
        product(x, &self.out_in().index_select(1, channels), self.bias.as_ref())
    }

    /// The matrix as `[out, in]`, a view.
    pub fn out_in(&self) -> Tensor {
        match self.layout {
            Layout::OutIn => self.weight.shallow_clone(),
            Layout::InOut => self.weight.tr(),
        }
    }

    /// Keeps the outputs `channels`, in that order.
    pub fn select_outputs(&mut self, channels: &[i64]) {
        let axis = if self.layout == Layout::OutIn { 0 } else { 1 };
        self.weight = select(&self.weight, axis, channels);
        self.bias = self.bias.as_ref().map(|bias| select(bias, 0, channels));
    }

    /// Keeps the inputs `channels`, in that order.
    pub fn select_inputs(&mut self, channels: &[i64]) {
        let axis = if self.layout == Layout::OutIn { 1 } else { 0 };
        self.weight = select(&self.weight, axis, channels);
    }

    /// Puts another matrix, `[out, in]`, and bias, `[out]`, in place of the old ones, in their kind and as trainable as they were.
    pub(crate) fn replace(&mut self, weight: &Tensor, bias: Option<&Tensor>) {
        let as_old = |new: &Tensor, old: &Tensor| {
            let new = tch::no_grad(|| new.to_kind(old.kind()).contiguous().copy());
            new.set_requires_grad(old.requires_grad())
        };
        let weight = match self.layout {
            Layout::OutIn => weight.shallow_clone(),
            Layout::InOut => weight.tr(),
        };
        self.weight = as_old(&weight, &self.weight);
        self.bias = self.bias.as_ref().zip(bias).map(|(old, new)| as_old(new, old));
    }

    /// Names the parameters.
    pub fn visit(&self, f: &mut Visitor<'_>) {
        f(&format!("{}.weight", self.name), &self.weight);
        if let Some(bias) = &self.bias {
            f(&format!("{}.bias", self.name), bias);
        }
        if let Some(adapter) = &self.adapter {
            adapter.visit(&self.name, f);
        }
    }
}

/// `x Wᵀ + b`: `[.., in] -> [.., out]`, with `weight` as `[out, in]`.
pub(crate) fn product(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
    if let Some(y) = row_product(x, weight, bias) {
        return y;
    }
    let is_slow =
        x.kind() == Kind::BFloat16 && x.device() == Device::Cpu && !attn_torch::multiplies_bf16();
    if is_slow { bf16_product(x, weight, bias) } else { x.linear(weight, bias) }
}

/// [`product`] of one row, as decoding one text does it, where it can be had faster than from LibTorch.
fn row_product(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Option<Tensor> {
    let mut shape = x.size();
    let n_in = shape.pop()?;
    if shape.iter().product::<i64>() != 1 {
        return None;
    }
    // What LibTorch refuses, it says itself.
    let y = attn_torch::matvec(weight, &x.view([n_in]), bias).ok().flatten()?;
    shape.push(y.size()[0]);
    Some(y.view(shape.as_slice()))
}

/// [`product`] of bf16 matrices on a processor without units for them. LibTorch's own takes 0.8 s for 128 × 3,072 × 768
/// where `f32` takes 9 ms with both conversions (AMD EPYC with AVX2, one thread).
fn bf16_product(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
    let [x, weight] = [x, weight].map(|x| x.to_kind(Kind::Float));
    let bias = bias.map(|bias| bias.to_kind(Kind::Float));
    x.linear(&weight, bias.as_ref()).to_kind(Kind::BFloat16)
}

/// The entries `indices` along `axis` of a parameter, as a parameter: a leaf that requires what the old one did.
pub(crate) fn select(parameter: &Tensor, axis: i64, indices: &[i64]) -> Tensor {
    let indices = Tensor::from_slice(indices).to_device(parameter.device());
    let kept = tch::no_grad(|| parameter.index_select(axis, &indices));
    kept.set_requires_grad(parameter.requires_grad())
}

/// Layer normalization over the last axis, Ba et al. 2016, <https://arxiv.org/abs/1607.06450>.
#[derive(Debug)]
pub struct LayerNorm {
    name: String,
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl LayerNorm {
    /// Takes `{name}.weight` and `{name}.bias`.
    pub fn new(
        weights: &mut Weights,
        name: impl Into<String>,
        size: i64,
        eps: f64,
    ) -> Result<Self, Error> {
        let name = name.into();
        let weight = weights.get(&format!("{name}.weight"), &[size], Init::Ones)?;
        let bias = weights.get(&format!("{name}.bias"), &[size], Init::Zeros)?;
        Ok(Self { name, weight, bias, eps })
    }

    /// `[.., size] -> [.., size]`.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        x.layer_norm(self.weight.size(), Some(&self.weight), Some(&self.bias), self.eps, true)
    }

    /// Names the parameters.
    pub fn visit(&self, f: &mut Visitor<'_>) {
        f(&format!("{}.weight", self.name), &self.weight);
        f(&format!("{}.bias", self.name), &self.bias);
    }
}

/// Root-mean-square normalization, Zhang and Sennrich 2019, <https://arxiv.org/abs/1910.07467>.
#[derive(Debug)]
pub struct RmsNorm {
    name: String,
    weight: Tensor,
    eps: f64,
}

impl RmsNorm {
    /// Takes `{name}.weight`.
    pub fn new(
        weights: &mut Weights,
        name: impl Into<String>,
        size: i64,
        eps: f64,
    ) -> Result<Self, Error> {
        let name = name.into();
        let weight = weights.get(&format!("{name}.weight"), &[size], Init::Ones)?;
        Ok(Self { name, weight, eps })
    }

    /// `[.., size] -> [.., size]`; the mean square is taken in at least `f32`.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        let wide = match x.kind() {
            Kind::Half | Kind::BFloat16 => x.to_kind(Kind::Float),
            _ => x.shallow_clone(),
        };
        let mean_square = wide.square().mean_dim([-1i64].as_slice(), true, wide.kind());
        &self.weight * (wide * (mean_square + self.eps).rsqrt()).to_kind(x.kind())
    }

    /// Names the parameter.
    pub fn visit(&self, f: &mut Visitor<'_>) {
        f(&format!("{}.weight", self.name), &self.weight);
    }
}

/// A table of vectors, one a row.
#[derive(Debug)]
pub struct Embedding {
    name: String,
    /// `[rows, width]`.
    pub weight: Tensor,
}

impl Embedding {
    /// Takes `{name}.weight`.
    pub fn new(
        weights: &mut Weights,
        name: impl Into<String>,
        [rows, width]: [i64; 2],
        std: f64,
    ) -> Result<Self, Error> {
        let name = format!("{}.weight", name.into());
        let weight = weights.get(&name, &[rows, width], Init::Normal(std))?;
        Ok(Self { name, weight })
    }

    /// `[..] -> [.., width]`. Indices are checked where the input enters the model.
    pub fn forward(&self, ids: &Tensor) -> Tensor {
        Tensor::embedding(&self.weight, ids, -1, false, false)
    }

    /// The parameter's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Names the parameter.
    pub fn visit(&self, f: &mut Visitor<'_>) {
        f(&self.name, &self.weight);
    }
}

/// The activation of a feed-forward layer, under transformers' names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x Φ(x)`, exact.
    Gelu,
    /// The tanh form of GELU.
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
    /// `x σ(x)`.
    Silu,
    /// Hyperbolic tangent.
    Tanh,
    /// `x σ(1.702 x)`.
    QuickGelu,
}

impl Activation {
    /// Reads transformers' name; `field` is where in `config.json` it stands.
    pub fn parse(field: &str, name: &str) -> Result<Self, Error> {
        Ok(match name {
            "gelu" => Self::Gelu,
            // Three spellings of one formula: they differ in rounding alone.
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Self::GeluTanh,
            "relu" => Self::Relu,
            "silu" | "swish" => Self::Silu,
            "tanh" => Self::Tanh,
            "quick_gelu" => Self::QuickGelu,
            other => {
                return Err(Error::Config {
                    field: field.to_owned(),
                    problem: format!(
                        "activation `{other}` is not supported, expected gelu, gelu_new, gelu_pytorch_tanh, gelu_fast, \
                         relu, silu, swish, tanh or quick_gelu"
                    ),
                });
            }
        })
    }

    /// Elementwise.
    pub fn forward(self, x: &Tensor) -> Tensor {
        match self {
            Self::Gelu => x.gelu("none"),
            Self::GeluTanh => x.gelu("tanh"),
            Self::Relu => x.relu(),
            Self::Silu => x.silu(),
            Self::Tanh => x.tanh(),
            Self::QuickGelu => x * (x * 1.702).sigmoid(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, randn};

    #[test]
    fn bf16_products_without_units_equal_those_of_the_same_numbers_in_f32() {
        let random = |size: &[i64]| randn(5, size).to_kind(Kind::BFloat16);
        let bias = random(&[48]);
        for shape in [vec![1, 1, 96], vec![1, 96], vec![2, 3, 96]] {
            let x = random(&shape);
            for weight in [random(&[48, 96]), random(&[96, 48]).tr()] {
                for bias in [None, Some(&bias)] {
                    let wide = |x: &Tensor| x.to_kind(Kind::Double);
                    let exact = wide(&x).linear(&wide(&weight), bias.map(wide).as_ref());
                    let name = format!("{shape:?}, {:?}, bias {}", weight.stride(), bias.is_some());

                    let y = bf16_product(&x, &weight, bias);

                    assert_eq!((y.size(), y.kind()), (exact.size(), Kind::BFloat16), "{name}");
                    assert_close(&name, &y.to_kind(Kind::Double), &exact, 4e-3); // half a unit of 8 bits
                }
            }
        }
    }
}
