//! The way to the kernels of [`attn_torch::attend`], which serve kinds in which a query sees a few stretches of keys. Every
//! such kind has a form in LibTorch's operators, too, for what the kernels do not do.

use attn_torch::Seen;
use tch::{Kind, Tensor};

use crate::attention::Dims;

/// Up to so many queries are not worth laying out all keys for.
pub(crate) const FEW_QUERIES: i64 = 8;

/// Whether [`attend`] can take these queries.
pub(crate) fn serves(q: &Tensor, dims: &Dims, dropout: f64) -> bool {
    q.size()[2] > FEW_QUERIES && dropout == 0.0 && dims.scale > 0.0 && attn_torch::attends(q)
}

/// z and the base-2 logarithms of the sums of exponentials of queries for which [`serves`] is true; `k` and `v` have the
/// layer's key/value heads.
pub(crate) fn attend(q: &Tensor, [k, v]: [&Tensor; 2], seen: Seen, dims: &Dims) -> [Tensor; 2] {
    // Evenly grouped heads find their keys by themselves.
    let [k, v] = [k, v].map(|x| {
        let x = if dims.is_evenly_grouped() { x.shallow_clone() } else { dims.expand_kv(x) };
        x.to_kind(q.kind()) // Rotation under autocast leaves q and k wider than v.
    });
    attn_torch::attend(q, &k, &v, seen, dims.scale)
        .expect("shapes and kinds fit, and memory that runs out ends any operation so")
}

/// Numbers of keys or places of them, for [`Seen`]: int32, a row an example.
pub(crate) fn limits(x: &Tensor) -> Tensor {
    let x = x.to_kind(Kind::Int);
    if x.dim() == 1 { x.unsqueeze(0) } else { x }
}
