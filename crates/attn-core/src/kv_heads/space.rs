//! The keys, or the values, of a layer's heads, as far as a text tells of them.

use tch::{Device, Kind, Tensor};

use super::Maps;
use crate::layer::AttnLayer;

/// Keys or values of n heads.
pub(super) struct Space {
    /// Mean x_i x_jᵀ: `[n, n, head_dim, head_dim]`, on the CPU in `f64`, as everything here.
    pub(super) moments: Tensor,
    /// T_j, where an error e of head j costs eᵀ T_j e: `[n, head_dim, head_dim]`.
    pub(super) gains: Tensor,
    /// Whether x is turned by its position: what it goes through must then be a rotation, or a scale, of each rotary plane.
    pub(super) rotary: bool,
}

impl Space {
    /// `moment`: mean h̃ h̃ᵀ of what goes into the layer. How much the errors of the scores of a query differ from key to key, which is all
    /// that a softmax sees of them, over the queries that read a head. `kept` says of each rotary plane, where there are any, how much
    /// of what is the same for all keys stays the same once positions turn it.
    pub(super) fn of_keys(it: &AttnLayer, moment: &Tensor, kept: Option<&[f64]>) -> Self {
        let dims = it.dims();
        let n = dims.n_kv_heads;
        let projections = it.projections();
        let last = moment.size()[1] - 1;
        let mean = moment.narrow(1, last, 1); // of h̃
        let k = with_bias(&projections.k, n);
        let q = with_bias(&projections.q, dims.n_heads);
        let of_query = q.matmul(moment).matmul(&q.transpose(1, 2)); // [h, d, d]
        let gains = by_reader(&of_query, &dims.kv_of_head, n);
        let (all, same) = (between(&k, moment), between(&k, &mean.matmul(&mean.tr())));
        match kept {
            None => Self { moments: all - same, gains, rotary: false },
            // Over all distances the planes of different frequencies do not meet, and each is turned all ways.
            Some(kept) => Self {
                moments: of_planes(&all) - of_planes(&same) * twice(kept).unsqueeze(1),
                gains: of_planes(&gains),
                rotary: true,
            },
        }
    }

    /// Errors of what the heads that read a value add to the output.
    pub(super) fn of_values(it: &AttnLayer, moment: &Tensor) -> Self {
        let dims = it.dims();
        let v = with_bias(&it.projections().v, dims.n_kv_heads);
        let out = wide(&it.out().out_in()).view([-1, dims.n_heads, dims.head_dim]).transpose(0, 1);
        let of_reader = out.transpose(1, 2).matmul(&out); // [h, d, d]
        Self {
            moments: between(&v, moment),
            gains: by_reader(&of_reader, &dims.kv_of_head, dims.n_kv_heads),
            rotary: false,
        }
    }

    /// Heads.
    pub(super) fn n(&self) -> i64 {
        self.moments.size()[0]
    }

    /// Mean x_i x_jᵀ: `[head_dim, head_dim]`.
    pub(super) fn moment(&self, i: i64, j: i64) -> Tensor {
        self.moments.get(i).get(j)
    }

    /// What an error of each head costs, whatever its direction: tr T_j, relative to their mean.
    pub(super) fn weights(&self) -> Vec<f64> {
        let traces = numbers(&traces(&self.gains));
        let mean = traces.iter().sum::<f64>() / traces.len() as f64;
        let relative = |trace: &f64| if mean > 0.0 { (trace / mean).max(1e-6) } else { 1.0 };
        traces.iter().map(relative).collect()
    }

    /// Σ_j tr(T_j X_jj): all that there is to lose.
    pub(super) fn total(&self) -> f64 {
        let own: Vec<Tensor> = (0..self.n()).map(|j| self.moment(j, j)).collect();
        (&self.gains * Tensor::stack(&own, 0)).sum(Kind::Double).double_value(&[]) // both symmetric
    }

    /// The share of [`Self::total`] that is lost once heads are read from what `maps` makes of `groups`.
    pub(super) fn loss(&self, groups: &[Vec<i64>], maps: &Maps) -> f64 {
        let mut lost = 0.0;
        for group in groups {
            let moments = self.among(group); // [g, g, d, d]
            let pull = rows(&maps.pull, group);
            for (place, &j) in group.iter().enumerate() {
                // x_j − C_j Σ P_i x_i = Σ A_i x_i.
                let a = -maps.push.get(j).matmul(&pull);
                let own =
                    a.get(place as i64) + Tensor::eye(a.size()[1], (Kind::Double, Device::Cpu));
                a.get(place as i64).copy_(&own);
                let half = (a.unsqueeze(1).matmul(&moments)).sum_dim_intlist(
                    [0i64].as_slice(),
                    false,
                    Kind::Double,
                ); // Σ_i A_i X_ik: [g, d, d]
                let error = half.matmul(&a.transpose(1, 2));
                let error = error.sum_dim_intlist([0i64].as_slice(), false, Kind::Double);
                lost += (self.gains.get(j) * error).sum(Kind::Double).double_value(&[]);
            }
        }
        let total = self.total();
        if total > 0.0 { (lost / total).max(0.0) } else { 0.0 }
    }

    /// The moments among the heads of a group: `[g, g, head_dim, head_dim]`.
    pub(super) fn among(&self, group: &[i64]) -> Tensor {
        let index = Tensor::from_slice(group);
        self.moments.index_select(0, &index).index_select(1, &index)
    }
}

/// The entries `heads` of the first axis.
pub(super) fn rows(x: &Tensor, heads: &[i64]) -> Tensor {
    x.index_select(0, &Tensor::from_slice(heads))
}

/// `[.., d, d] -> [..]`.
pub(super) fn traces(x: &Tensor) -> Tensor {
    x.diagonal(0, -2, -1).sum_dim_intlist([-1i64].as_slice(), false, Kind::Double)
}

pub(super) fn numbers(x: &Tensor) -> Vec<f64> {
    Vec::try_from(x.contiguous().view([-1])).expect("a tensor of f64")
}

/// One number a plane for both of its channels: `[planes] -> [d]`.
fn twice(by_plane: &[f64]) -> Tensor {
    Tensor::from_slice(by_plane).repeat([2])
}

/// The complex number, real and imaginary part, by which `[.., d, d]` multiplies each rotary plane, as nearly as one can: `[.., d / 2]` each.
pub(crate) fn complex(x: &Tensor) -> [Tensor; 2] {
    let half = x.size()[x.dim() - 1] / 2;
    let block = |row: i64, col: i64| {
        x.narrow(-2, row * half, half).narrow(-1, col * half, half).diagonal(0, -2, -1)
    };
    [(block(0, 0) + block(1, 1)) / 2.0, (block(1, 0) - block(0, 1)) / 2.0]
}

/// What of `[.., d, d]` multiplies each rotary plane by a complex number.
fn of_planes(x: &Tensor) -> Tensor {
    in_planes(&complex(x))
}

/// Multiplication by a complex number in each plane, given as real and imaginary parts: `[.., d / 2]` each to `[.., d, d]`.
pub(crate) fn in_planes(parts: &[Tensor; 2]) -> Tensor {
    let [c, s] = parts.each_ref().map(|part| part.diag_embed(0, -2, -1));
    Tensor::cat(&[Tensor::cat(&[&c, &(-&s)], -1), Tensor::cat(&[&s, &c], -1)], -2)
}

fn wide(x: &Tensor) -> Tensor {
    x.to_device(Device::Cpu).to_kind(Kind::Double)
}

/// `[n · d, hidden_size]` and its bias as `[n, d, hidden_size + 1]`.
pub(super) fn with_bias((weight, bias): &(Tensor, Option<Tensor>), n: i64) -> Tensor {
    let weight = wide(weight);
    let bias = match bias {
        Some(bias) => wide(bias).unsqueeze(1),
        None => weight.narrow(1, 0, 1).zeros_like(),
    };
    let all = Tensor::cat(&[weight, bias], 1);
    let width = all.size()[1];
    all.view([n, -1, width])
}

/// Mean x_i x_jᵀ of x = `maps` h̃: `[n, n, d, d]`.
fn between(maps: &Tensor, moment: &Tensor) -> Tensor {
    let [n, d, width] = maps.size()[..] else { unreachable!("maps have three axes") };
    let flat = maps.view([n * d, width]);
    flat.matmul(moment).matmul(&flat.tr()).view([n, d, n, d]).transpose(1, 2).contiguous()
}

/// The sum over the query heads that read each key/value head: `[h, d, d] -> [n, d, d]`.
fn by_reader(of_head: &Tensor, kv_of_head: &[i64], n: i64) -> Tensor {
    let [_, d, _] = of_head.size()[..] else { unreachable!("a matrix a head") };
    let zeros = Tensor::zeros([n, d, d], (Kind::Double, Device::Cpu));
    zeros.index_add(0, &Tensor::from_slice(kv_of_head), of_head)
}
