//! The way to the kernels: [`attn_torch::attend`], for kinds in which a query sees a few stretches of keys, and others. Every
//! kind that takes it has a form in LibTorch's operators, too, for what the kernels do not do.

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
pub(crate) fn attend(q: &Tensor, kv: [&Tensor; 2], seen: Seen, dims: &Dims) -> [Tensor; 2] {
    let [k, v] = by_head(kv, q, dims);
    attend_evenly(q, [&k, &v], seen, dims.scale)
}

/// As [`attend`], of query heads that share out `k` and `v` evenly.
pub(crate) fn attend_evenly(
    q: &Tensor,
    [k, v]: [&Tensor; 2],
    seen: Seen,
    scale: f64,
) -> [Tensor; 2] {
    served(attn_torch::attend(q, k, v, seen, scale))
}

/// What a kernel gave.
pub(crate) fn served<T>(given: attn_torch::Result<T>) -> T {
    #[cfg(test)]
    tests::SERVED.with(|n| n.set(n.get() + 1));
    given.expect("shapes and kinds fit, and memory that runs out ends any operation so")
}

/// Keys and values as the kernels read them, in the kind of `q`.
pub(crate) fn by_head(kv: [&Tensor; 2], q: &Tensor, dims: &Dims) -> [Tensor; 2] {
    // Evenly grouped heads find their keys by themselves.
    kv.map(|x| {
        let x = if dims.is_evenly_grouped() { x.shallow_clone() } else { dims.expand_kv(x) };
        x.to_kind(q.kind()) // Rotation under autocast leaves q and k wider than v.
    })
}

/// Numbers of keys or places of them, for [`Seen`]: int32, a row an example.
pub(crate) fn limits(x: &Tensor) -> Tensor {
    let x = x.to_kind(Kind::Int);
    if x.dim() == 1 { x.unsqueeze(0) } else { x }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use tch::Device;

    use crate::{
        mask::Mask,
        testing::{Probe, kinds},
    };

    use super::*;

    thread_local! {
        /// How often a kernel was called.
        pub(super) static SERVED: Cell<u64> = const { Cell::new(0) };
    }

    #[test]
    fn kinds_reach_their_kernels() {
        if !attn_torch::attends(&Tensor::zeros([1], (Kind::Float, Device::Cpu))) {
            return; // attn-torch's own tests say so.
        }
        let n = 100;
        let probe = Probe::new(90, [2, n, n], 4, 2, true);
        let keep = Tensor::from_slice(&[n, n * 2 / 3]).unsqueeze(-1).gt_tensor(&probe.positions);
        for mask in [Mask::new(true), Mask::with_keep(true, &keep)] {
            let served_in = |kind: Kind| -> Vec<&str> {
                let probe = probe.to(kind, Device::Cpu);
                let mut names = Vec::new();
                for variant in kinds().iter().filter(|variant| variant.name() != "cross") {
                    let before = SERVED.get();
                    let _ = probe.build(variant).forward(&probe.input(&mask));
                    if SERVED.get() > before {
                        names.push(variant.name());
                    }
                }
                names
            };
            assert_eq!(served_in(Kind::Double), [""; 0]);
            let expected = [
                "window",
                "dilated",
                "global_local",
                "big_bird",
                "sinks",
                "performer",
                "nsa",
                "moba",
            ];
            assert_eq!(served_in(Kind::Float), expected, "{:?}", mask.padding());
        }
    }
}
