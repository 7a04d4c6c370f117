//! Fewer key/value heads, or more: grouped-query attention made of a pretrained layer.
//!
//! ```text
//! K_g = Σ_{h ∈ group g} c_h K_h      V_g likewise      query heads of group g read head g
//! first   c = 1 of the first member     random   c = 1 of one drawn     mean   c = 1/|group|
//! ```
//!
//! Groups are neighbours: of n old heads and m new ones, m a divisor, head h goes into group ⌊h·m/n⌋; where n is the divisor, old head h
//! becomes the heads h·m/n up to (h+1)·m/n, copies of it that change nothing. Ainslie et al. 2023, "GQA: Training Generalized
//! Multi-Query Transformer Models from Multi-Head Checkpoints", <https://arxiv.org/abs/2305.13245>, section 2.1 and figure 5.

use rand_chacha::{
    ChaCha8Rng,
    rand_core::{RngCore, SeedableRng},
};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::{Error, Model, attention::Dims, layer::AttnLayer};

/// What a new key/value head is made of the old ones of its group.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pooling {
    /// The first of them.
    First,
    /// One drawn by the seed, for each layer and group by itself.
    Random {
        /// The draw's.
        seed: u64,
    },
    /// Their mean.
    #[default]
    Mean,
}

/// Gives the layers `layers` of `model` `n_kv` key/value heads each, made of neighbouring old ones by `pooling`, or copies of these where
/// they become more. Layers that have as many stay as they are.
///
/// # Errors
/// [`Error::Input`] where the numbers of old and new heads do not divide one by the other, where there are fewer query heads than `n_kv`, or
/// a layer has no heads, before any layer is changed; as [`AttnLayer::regroup_kv`] of a kind that cannot follow: layers before it are
/// then changed.
pub fn pool_kv(
    model: &mut Model,
    layers: &[usize],
    n_kv: i64,
    pooling: Pooling,
) -> Result<(), Error> {
    let all = model.layers();
    let mut wanted = Vec::new();
    for &layer in layers {
        let Some(it) = all.get(layer) else {
            return Err(Error::Index {
                what: "layer",
                index: layer as i64,
                count: all.len() as i64,
            });
        };
        if it.dims().n_kv_heads != n_kv {
            let groups = neighbours(layer, it.dims(), n_kv)?;
            let kv = pooled(it, layer, &groups, pooling);
            wanted.push((layer, groups, kv));
        }
    }
    for (layer, groups, kv) in wanted {
        model.regroup_kv(layer, &groups, kv)?;
    }
    Ok(())
}

/// The old heads of each of `n_kv` new ones.
fn neighbours(layer: usize, dims: &Dims, n_kv: i64) -> Result<Vec<Vec<i64>>, Error> {
    let old = dims.n_kv_heads;
    let refuse = |problem: String| {
        Err(Error::Input {
            name: "key/value heads",
            problem: format!("of layer {layer}: {problem}"),
        })
    };
    if old == 0 {
        return refuse("there are none".into());
    }
    if n_kv < 1 || n_kv > dims.n_heads {
        return refuse(format!(
            "{n_kv} are asked for, expected 1 to {}, the query heads",
            dims.n_heads
        ));
    }
    if old % n_kv != 0 && n_kv % old != 0 {
        return refuse(format!("{old} cannot become {n_kv}: neither divides the other"));
    }
    Ok(match n_kv < old {
        true => (0..n_kv).map(|g| (g * old / n_kv..(g + 1) * old / n_kv).collect()).collect(),
        false => (0..n_kv).map(|g| vec![g * old / n_kv]).collect(),
    })
}

fn pooled(
    it: &AttnLayer,
    layer: usize,
    groups: &[Vec<i64>],
    pooling: Pooling,
) -> [(Tensor, Option<Tensor>); 2] {
    let projections = it.projections();
    let d = it.dims().head_dim;
    // The members that are taken: k and v of one head belong together.
    let taken: Vec<Vec<i64>> = match pooling {
        Pooling::Mean => groups.to_vec(),
        Pooling::First => groups.iter().map(|group| vec![group[0]]).collect(),
        Pooling::Random { seed } => {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            rng.set_stream(layer as u64);
            let one =
                |group: &Vec<i64>| vec![group[(rng.next_u64() % group.len() as u64) as usize]];
            groups.iter().map(one).collect()
        }
    };
    // Of matrices and biases alike: `[n · d, ..]`.
    let pool = |x: &Tensor| {
        let of_group = |heads: &Vec<i64>| match heads.as_slice() {
            [head] => x.narrow(0, head * d, d),
            many => {
                let sum: Tensor =
                    many.iter().map(|head| x.narrow(0, head * d, d).to_kind(Kind::Double)).sum();
                (sum / many.len() as i64).to_kind(x.kind())
            }
        };
        Tensor::cat(&taken.iter().map(of_group).collect::<Vec<_>>(), 0)
    };
    let both = |(weight, bias): &(Tensor, Option<Tensor>)| (pool(weight), bias.as_ref().map(pool));
    [both(&projections.k), both(&projections.v)]
}
