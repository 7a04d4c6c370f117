//! One code of all keys and values of a layer, from which each head reads its own.
//!
//! ```text
//! x = [k_1, .., k_n, v_1, .., v_n] − mean       T: what an error costs, as a share of all that scores, or outputs, have to lose
//! min over P, C of E (x − C c)ᵀ T (x − C c),    c = P x of r channels
//! S = T^½ E[x xᵀ] T^½ = U Λ Uᵀ      P = Λ_r^-¼ U_rᵀ T^½      C = E[x xᵀ] T^½ U_r Λ_r^-¾
//! ```
//!
//! As [`super::low_rank`], over keys and values at once and over all heads: a code for each side and group is a special case, so this
//! one loses no more, at as many bytes. Both are linear in what goes into the layer: a code of as many channels as that has, half of
//! multi-head attention's cache where the heads fill the hidden state, loses nothing. A mean is no code's business: of keys no softmax
//! sees it, of values it goes past the code, into a bias. The channels of the code are uncorrelated over the text, and what matters most
//! comes first; any scale of each would do.
//!
//! Multi-head latent attention (DeepSeek-AI 2024, <https://arxiv.org/abs/2405.04434>, section 2.1.2) from a pretrained layer: Meng et al.
//! 2025, "TransMLA", <https://arxiv.org/abs/2502.07864>, section 4.3, balances keys and values by their norms before a common principal
//! component analysis; here what an error costs weighs them, which takes the place of that.

use tch::Tensor;

use super::{
    low_rank::{RANK, roots},
    space::{Space, numbers, traces, with_bias},
};
use crate::{
    attention::{Attention, Projections},
    layer::AttnLayer,
};

/// A layer's code.
pub(super) struct Code {
    /// What makes it, as keys and values of m heads, `[m · head_dim, hidden_size]` and biases.
    pub(super) projections: Projections,
    /// How heads read it.
    pub(super) readings: Readings,
    /// The shares of what keys, and values, have to lose that are lost.
    pub(super) losses: [f64; 2],
}

/// What each query head's keys and values are read from a code by.
pub(super) struct Readings {
    /// `[n_heads, head_dim, r]` each.
    matrices: [Tensor; 2],
    /// What is added to values: `[n_heads, head_dim]`.
    value_bias: Tensor,
}

impl Readings {
    /// Puts those of the query heads `heads`, in that order, into a new kind `latent`.
    pub(super) fn install(&self, heads: &[i64], kind: &dyn Attention) {
        let index = Tensor::from_slice(heads);
        kind.visit(&mut |name, tensor| {
            let value = match name.rsplit('.').next() {
                Some("key") => &self.matrices[0],
                Some("value") => &self.matrices[1],
                _ => &self.value_bias,
            };
            let value = value.index_select(0, &index).view(tensor.size().as_slice());
            tch::no_grad(|| tensor.shallow_clone().copy_(&value));
        });
    }
}

/// The best code of the layer in the channels of `n_kv` heads. `moment`: mean h̃ h̃ᵀ of what goes into the layer, and keys and values of
/// it; positions turn neither.
pub(super) fn code(it: &AttnLayer, moment: &Tensor, spaces: &[Space; 2], n_kv: i64) -> Code {
    let dims = it.dims();
    let (n, d, hidden, rank) =
        (dims.n_kv_heads, dims.head_dim, dims.hidden_size, 2 * n_kv * dims.head_dim);
    let own = it.projections();
    let is_biased = own.k.1.is_some();
    let maps = [&own.k, &own.v].map(|side| with_bias(side, n).flatten(0, 1));
    let maps = Tensor::cat(&maps, 0); // x of h̃: [2 n d, hidden + 1]
    // Without a bias nothing can be taken off a code.
    let mean = moment.narrow(1, hidden, 1) * f64::from(u8::from(is_biased));
    let x = maps.matmul(&(moment - mean.matmul(&mean.tr()))).matmul(&maps.tr());

    let totals = spaces.each_ref().map(|space| space.total().max(f64::MIN_POSITIVE));
    let root: Vec<Tensor> = spaces
        .iter()
        .zip(totals)
        .flat_map(|(space, total)| {
            let roots = roots(&space.gains) / total.sqrt();
            (0..n).map(move |head| roots.get(head))
        })
        .collect();
    let root = Tensor::block_diag(&root);
    let s = root.matmul(&x).matmul(&root);
    let (values, vectors) = ((&s + s.tr()) / 2.0).linalg_eigh("L"); // ascending
    let (top, best) =
        (values.narrow(0, 2 * n * d - rank, rank), vectors.narrow(1, 2 * n * d - rank, rank));
    let bar = (top.max().double_value(&[]) * RANK).max(f64::MIN_POSITIVE);
    let size = top.rsqrt().where_scalarother(&top.gt(bar), 0.0);
    let p = (best * size.unsqueeze(0)).tr().matmul(&root).flip([0]); // [r, 2 n d], what matters most first
    let c = x.matmul(&p.tr());

    let error = &x - c.matmul(&c.tr()); // (1 − C P) E[x xᵀ] (1 − C P)ᵀ, as P E[x xᵀ] Pᵀ = 1
    // Half of each direction's size stays in the code: neither matrix then has to make up for all of it.
    let spread = top.clamp_min(bar).pow_tensor_scalar(0.25).flip([0]);
    let (p, c) = (p * spread.unsqueeze(1), c / spread.unsqueeze(0));
    let lost = |side: i64| {
        let of_head = |head: i64| {
            let at = (side * n + head) * d;
            error.narrow(0, at, d).narrow(1, at, d)
        };
        let errors: Vec<Tensor> = (0..n).map(of_head).collect();
        let lost = traces(&spaces[side as usize].gains.matmul(&Tensor::stack(&errors, 0)));
        let lost: f64 = numbers(&lost).iter().sum();
        (lost / totals[side as usize]).max(0.0)
    };

    // Channels as heads have them: a key's, then a value's, head by head.
    let made = p.matmul(&maps);
    let bias = made.narrow(1, hidden, 1) - made.matmul(&mean);
    let as_heads = |x: &Tensor, side: i64, like: &Tensor| {
        let sides = x.reshape([n_kv, 2, d, -1]);
        sides.select(1, side).flatten(0, 1).to_device(like.device()).to_kind(like.kind())
    };
    let side = |at: i64, (weight, bias_of): &(Tensor, Option<Tensor>)| {
        let bias = bias_of.as_ref().map(|like| as_heads(&bias, at, like).squeeze_dim(1));
        (as_heads(&made.narrow(1, 0, hidden), at, weight), bias)
    };
    let (k, v) = (side(0, &own.k), side(1, &own.v));
    let of_head = Tensor::from_slice(&dims.kv_of_head);
    let by_head = |x: &Tensor, side: i64| {
        x.narrow(0, side * n * d, n * d).reshape([n, d, -1]).index_select(0, &of_head)
    };
    let readings = Readings {
        matrices: [by_head(&c, 0), by_head(&c, 1)],
        value_bias: by_head(&maps.matmul(&mean), 1),
    };
    Code { projections: Projections { q: own.q, k, v }, readings, losses: [lost(0), lost(1)] }
}
