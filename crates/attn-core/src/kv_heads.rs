//! Fewer key/value heads, or more: grouped-query attention made of a pretrained layer.
//!
//! ```text
//! x̂_g = Σ_{j ∈ group g} P_j x_j          x_j ≈ C_j x̂_g            x: keys, and likewise values
//! query heads that read j:   q' = C_jᵀ q  (keys' C)      W_O' = W_O C_j  (values' C)
//! ```
//!
//! Scores q·k and what values add to the output are then those of the C_j x̂_g: nothing but the x_j is approximated, and the result is
//! an ordinary layer with fewer heads. A method ([`Merge`]) is a choice of groups and of P and C; `first`, `random` and `mean` leave C
//! at 1, take neighbours together and look at no text. Of n old heads and m new ones, m a divisor, neighbours are what ⌊h·m/n⌋ says;
//! where n is the divisor, old head h becomes the heads h·m/n up to (h+1)·m/n, copies of it that change nothing.
//!
//! Ainslie et al. 2023, "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints",
//! <https://arxiv.org/abs/2305.13245>, section 2.1 and figure 5; the other methods name their sources in their files.

use rand_chacha::{
    ChaCha8Rng,
    rand_core::{RngCore, SeedableRng},
};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::{
    Config, Error, Model, Variant,
    attention::{Dims, Projections},
    layer::AttnLayer,
    variants::{self, merging},
};

mod aligned;
mod grouping;
mod latent;
mod low_rank;
mod moments;
pub(crate) mod space;

pub use moments::Moments;
pub(crate) use moments::attention_inputs;

use space::Space;

/// What new key/value heads are made of the old ones.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Merge {
    /// The first of a group of neighbours.
    First,
    /// One of the neighbours drawn by the seed, for each layer and group by itself.
    Random {
        /// The draw's.
        seed: u64,
    },
    /// The mean of neighbours.
    #[default]
    Mean,
    /// The mean of heads whose keys and values are near each other as they stand.
    Similarity,
    /// Heads that are near each other once turned, turned onto each other, their mean weighted by what an error of each costs.
    Aligned,
    /// The `head_dim` directions of a group's keys, and of its values, that matter most together: each head then reads them through a
    /// matrix of its own.
    LowRank,
    /// One code of all keys and values, of the directions that matter most together: each head reads its own from it. The layer's kind
    /// becomes [`latent`](crate::variants::latent). Not where positions turn keys.
    Latent,
}

impl Merge {
    /// Every method, random draws by seed 0.
    pub const ALL: [Self; 7] = [
        Self::First,
        Self::Random { seed: 0 },
        Self::Mean,
        Self::Similarity,
        Self::Aligned,
        Self::LowRank,
        Self::Latent,
    ];

    /// Its name in configs and results.
    pub fn name(self) -> &'static str {
        match self {
            Self::First => "first",
            Self::Random { .. } => "random",
            Self::Mean => "mean",
            Self::Similarity => "similarity",
            Self::Aligned => "aligned",
            Self::LowRank => "low_rank",
            Self::Latent => "latent",
        }
    }

    /// Whether it needs [`Moments`].
    pub fn reads_text(self) -> bool {
        matches!(self, Self::Similarity | Self::Aligned | Self::LowRank | Self::Latent)
    }

    /// Whether keys and values come out in other coordinates than they had.
    fn turns(self) -> bool {
        matches!(self, Self::Aligned | Self::LowRank | Self::Latent)
    }
}

/// What became of one layer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Merged {
    /// The layer.
    pub layer: usize,
    /// The old key/value heads of each new one; of a code, which all heads read, neighbours: what its channels are counted by.
    pub groups: Vec<Vec<i64>>,
    /// How much the error of a query's scores, q·(k − C k̂), varies over keys, as a share of how much the scores vary, summed over the
    /// heads: as if queries met any key of the text, and at any distance within its longest row where positions turn keys. What is the
    /// same for all keys no softmax sees. Of methods that read text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key_loss: Option<f64>,
    /// Σ E‖W_O (v − C v̂)‖² / Σ E‖W_O v‖² over the heads: what is lost of what values add to the output. Of methods that read text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub value_loss: Option<f64>,
    /// How much of each old head was still in use when it was left out, from 0 to 1. Of learned merges.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub open: Option<Vec<f64>>,
}

/// How x̂ is made of the old heads, and how these are read from it.
pub(crate) struct Maps {
    /// P: `[n_old, head_dim, head_dim]`.
    pub(crate) pull: Tensor,
    /// C: `[n_old, head_dim, head_dim]`.
    pub(crate) push: Tensor,
}

/// Gives each of `wanted`, a layer and a number, so many key/value heads by `method`. Layers that have as many stay as they are, and
/// are not in the result; more heads than there were are copies, whatever the method. Query heads are put into the order of the new
/// heads that they read; their numbers ([`LayerSpec::kept_heads`](crate::config::LayerSpec)) go with them.
///
/// # Errors
/// [`Error::Input`] where the numbers of old and new heads do not divide one by the other, where there are fewer query heads than asked
/// for, or a layer has none, and where a method that reads text is given no moments of a layer, or of fewer tokens than a hidden state
/// has channels; [`Error::Refused`] where keys and values would be turned under an attention kind that looks at their coordinates.
/// No layer is then changed. As [`AttnLayer::regroup_kv`] of a kind that cannot follow: layers before it are then changed.
pub fn merge_kv(
    model: &mut Model,
    wanted: &[(usize, i64)],
    method: Merge,
    moments: Option<&Moments>,
) -> Result<Vec<Merged>, Error> {
    let mut made = Vec::new();
    for (merged, made_of) in plan(model, wanted, method, moments)? {
        let it = model.layers()[merged.layer];
        made.push(match made_of {
            Made::Maps(maps) => {
                let (projections, out) = through(it, &merged.groups, &maps);
                (merged, projections, out, None)
            }
            Made::Code(code) => (merged, code.projections, it.out().out_in(), Some(code.readings)),
        });
    }
    let mut all = Vec::new();
    for (merged, projections, out, readings) in made {
        let layer = merged.layer;
        let heads = |model: &Model| model.layers()[layer].spec().kept_heads;
        let before = heads(model);
        model.regroup_kv(layer, &merged.groups, projections, &out)?;
        if let Some(readings) = readings {
            let place = |head: &i64| before.iter().position(|old| old == head);
            let order: Vec<i64> =
                heads(model).iter().filter_map(place).map(|at| at as i64).collect();
            let kind = Variant::Latent(variants::latent::Config::default());
            model.swap(&[layer], &kind, 0)?;
            readings.install(&order, model.layers()[layer].kind());
        }
        all.push(merged);
    }
    Ok(all)
}

/// Puts each of `wanted`, a layer and a number, on its way to so many key/value heads: the layer's kind becomes
/// [`merging`](crate::variants::merging) by matrices, which start where `method` would end, an open gate at `price`. The model computes
/// what it did. Layers that have as many stay as they are, and are not in the result.
///
/// # Errors
/// As [`merge_kv`]; [`Error::Input`] where a layer is to have more heads, and [`Error::Refused`] where it is not softmax attention. No layer
/// is then changed.
pub fn begin_merging(
    model: &mut Model,
    wanted: &[(usize, i64)],
    method: Merge,
    moments: Option<&Moments>,
    price: f64,
) -> Result<Vec<Merged>, Error> {
    check_merging(model.config(), wanted, method)?;
    let made = plan(model, wanted, method, moments)?;
    for (Merged { layer, groups, .. }, made) in &made {
        let Made::Maps(maps) = made else { return Err(no_code()) };
        let it = model.layers()[*layer];
        let new = pulled(it, groups, maps);
        let push = maps.each_ref().map(|maps| maps.push.shallow_clone());
        let config = merging::Config {
            kv_heads: groups.len() as u32,
            groups: Some(groups.clone()),
            price,
            ..merging::Config::default()
        };
        model.swap(&[*layer], &Variant::Merging(config), 0)?;
        merging::start_from(model.layers()[*layer].kind(), &new, &push);
    }
    Ok(made.into_iter().map(|(merged, _)| merged).collect())
}

/// Refuses what [`begin_merging`] would refuse, beside [`check_merge`], of a model with this config, whatever the text.
///
/// # Errors
/// As [`begin_merging`].
pub fn check_merging(config: &Config, wanted: &[(usize, i64)], method: Merge) -> Result<(), Error> {
    if method == Merge::Latent {
        return Err(no_code());
    }
    for &(layer, n_kv) in wanted {
        let Some(spec) = config.layers.get(layer) else { continue }; // refused by `check_merge`
        if n_kv > spec.n_kv_heads {
            let problem = format!(
                "of layer {layer}: {n_kv} are asked for, and there are {}: copies need no learning",
                spec.n_kv_heads
            );
            return Err(Error::Input { name: "key/value heads", problem });
        }
        check_softmax(
            &spec.variant,
            "have its key/value heads merged by learning",
            "that is done to softmax attention\nhint: merge heads first, then swap the attention",
        )?;
    }
    Ok(())
}

fn no_code() -> Error {
    Error::Input {
        name: "key/value heads",
        problem: "a code (`latent`) cannot be learned by merging, whose new heads take the place of old ones\nhint: convert the model \
                  by `latent`, then distill it"
            .into(),
    }
}

/// Ends what [`begin_merging`] began, once it has learned: the new heads alone are left, in ordinary grouped layers. What is still open of
/// an old head is lost ([`Merged::open`]).
///
/// # Errors
/// [`Error::Input`] where no layer's heads are being merged. As [`AttnLayer::regroup_kv`].
pub fn merge_learned(model: &mut Model) -> Result<Vec<Merged>, Error> {
    let learned: Vec<_> = (0..)
        .zip(model.layers())
        .filter_map(|(layer, it): (usize, _)| {
            let heads = it.kind().learned_heads(&it.projections())?;
            let (q, out) = pushed(it, &heads.push);
            let projections = Projections { q, k: heads.k, v: heads.v };
            let open = Some(heads.open);
            let merged =
                Merged { layer, groups: heads.groups, key_loss: None, value_loss: None, open };
            Some((merged, projections, out))
        })
        .collect();
    if learned.is_empty() {
        return Err(Error::Input {
            name: "key/value heads",
            problem: "no layer's are being merged: the attention kind `merging` does that".into(),
        });
    }
    let layers: Vec<usize> = learned.iter().map(|(merged, ..)| merged.layer).collect();
    model.swap(&layers, &Variant::default(), 0)?;
    let mut all = Vec::new();
    for (merged, projections, out) in learned {
        model.regroup_kv(merged.layer, &merged.groups, projections, &out)?;
        all.push(merged);
    }
    Ok(all)
}

/// What a layer's new heads are made by.
enum Made {
    /// Of keys and of values.
    Maps([Maps; 2]),
    Code(latent::Code),
}

/// Groups of the layers that are to have another number of heads, and what makes new heads of them.
fn plan(
    model: &Model,
    wanted: &[(usize, i64)],
    method: Merge,
    moments: Option<&Moments>,
) -> Result<Vec<(Merged, Made)>, Error> {
    check_merge(model.config(), wanted, method)?;
    let all = model.layers();
    let mut made = Vec::new();
    for &(layer, n_kv) in wanted {
        let it = all[layer];
        let n_old = it.dims().n_kv_heads;
        if n_old == n_kv {
            continue;
        }
        let of_text = (method.reads_text() && n_kv < n_old)
            .then(|| -> Result<_, Error> {
                let moment = moments.map_or_else(
                    || Err(no_moments(layer, "there are none")),
                    |moments| moments.of(layer, it.dims().hidden_size),
                )?;
                let kept = kept(model, moments.map_or(1, Moments::max_len));
                let spaces =
                    [Space::of_keys(it, &moment, kept.as_deref()), Space::of_values(it, &moment)];
                Ok((moment, spaces))
            })
            .transpose()?;
        made.push(match &of_text {
            Some((moment, spaces)) if method == Merge::Latent => {
                let own = it.projections();
                if own.k.1.is_some() != own.v.1.is_some() {
                    return Err(Error::Refused {
                        kind: variants::latent::KIND,
                        what: "code keys and values of which one alone has a bias",
                        reason: "the code has one for both, or none".into(),
                    });
                }
                let code = latent::code(it, moment, spaces, n_kv);
                let [key_loss, value_loss] = code.losses.map(Some);
                let groups = neighbours(n_old, n_kv);
                (Merged { layer, groups, key_loss, value_loss, open: None }, Made::Code(code))
            }
            Some((_, spaces)) => {
                let (merged, maps) = by_text(it, layer, n_kv, method, spaces);
                (merged, Made::Maps(maps))
            }
            None => {
                let groups = neighbours(n_old, n_kv);
                let maps = || pooled(it.dims(), layer, &groups, method);
                let merged = Merged {
                    layer,
                    groups: groups.clone(),
                    key_loss: None,
                    value_loss: None,
                    open: None,
                };
                (merged, Made::Maps([maps(), maps()]))
            }
        });
    }
    Ok(made)
}

/// Refuses what [`merge_kv`] would refuse of a model with this config, whatever the text.
///
/// # Errors
/// As [`merge_kv`].
pub fn check_merge(config: &Config, wanted: &[(usize, i64)], method: Merge) -> Result<(), Error> {
    let count = config.layers.len();
    for (at, &(layer, n_kv)) in wanted.iter().enumerate() {
        let Some(spec) = config.layers.get(layer) else {
            return Err(Error::Index { what: "layer", index: layer as i64, count: count as i64 });
        };
        let refuse = |problem: String| {
            Err(Error::Input {
                name: "key/value heads",
                problem: format!("of layer {layer}: {problem}"),
            })
        };
        if wanted[..at].iter().any(|(other, _)| *other == layer) {
            return refuse("two numbers are asked for".into());
        }
        let old = spec.n_kv_heads;
        if old == n_kv {
            continue;
        }
        if old == 0 {
            return refuse("there are none".into());
        }
        if n_kv < 1 || n_kv > spec.n_heads {
            return refuse(format!(
                "{n_kv} are asked for, expected 1 to {}, the query heads",
                spec.n_heads
            ));
        }
        if n_kv < old && matches!(spec.variant, Variant::Latent(_)) {
            return Err(Error::Refused {
                kind: variants::latent::KIND,
                what: "have its code made narrower",
                reason: "its channels are no heads that could be merged\nhint: code the model that it was made of by fewer".into(),
            });
        }
        if old % n_kv != 0 && n_kv % old != 0 {
            let fits = |n: &i64| old % n == 0 || n % old == 0;
            let fitting: Vec<String> =
                (1..=spec.n_heads).filter(fits).map(|n| n.to_string()).collect();
            return refuse(format!(
                "{old} cannot become {n_kv}: neither divides the other, expected one of {}",
                fitting.join(", ")
            ));
        }
        if n_kv < old && method.turns() {
            check_turns(&spec.variant)?;
        }
        if n_kv < old && method == Merge::Latent && config.sizes.position_table.is_none() {
            return Err(Error::Refused {
                kind: variants::latent::KIND,
                what: "code keys that their positions turn",
                reason: "a code holds them as they are before that\nhint: `low_rank` codes them plane by plane".into(),
            });
        }
    }
    Ok(())
}

fn no_moments(layer: usize, problem: &str) -> Error {
    Error::Input { name: "moments", problem: format!("of what goes into layer {layer}: {problem}") }
}

/// Refuses a kind that keys and values in other coordinates would be something else to.
fn check_turns(variant: &Variant) -> Result<(), Error> {
    check_softmax(
        variant,
        "have its keys and values turned",
        "it may look at more of them than products\nhint: convert the model before its attention is swapped, or pool heads as \
         they are (`mean`)",
    )
}

fn check_softmax(variant: &Variant, what: &'static str, reason: &str) -> Result<(), Error> {
    match variant {
        Variant::Softmax(_) => Ok(()),
        Variant::Merging(_) => Err(Error::Refused {
            kind: variant.name(),
            what,
            reason: "they are being merged\nhint: end that first (`attn convert --method learned`)"
                .into(),
        }),
        other => Err(Error::Refused { kind: other.name(), what, reason: reason.into() }),
    }
}

/// |mean over distances Δ < n of exp(i f Δ)|² for the frequency f of each rotary plane: near 1 where a text of n tokens hardly turns it.
fn kept(model: &Model, n: i64) -> Option<Vec<f64>> {
    let of = |f: &f64| {
        // A geometric series: |sin(n f/2) / (n sin(f/2))|².
        let (all, one) = ((n as f64 * f / 2.0).sin(), n as f64 * (f / 2.0).sin());
        if one == 0.0 { 1.0 } else { (all / one).powi(2) }
    };
    Some(model.arch.rotary()?.frequencies().iter().map(of).collect())
}

/// Groups and maps of a method that reads text.
fn by_text(
    it: &AttnLayer,
    layer: usize,
    n_kv: i64,
    method: Merge,
    spaces: &[Space; 2],
) -> (Merged, [Maps; 2]) {
    let costs = |space: &Space| match method {
        Merge::Aligned => aligned::pair_costs(space),
        Merge::LowRank => low_rank::pair_costs(space),
        _ => aligned::pair_costs_as_they_stand(space),
    };
    let [keys, values] = spaces.each_ref().map(costs);
    // One unit of either is all that there is to lose of it.
    let costs: Vec<Vec<f64>> = keys
        .iter()
        .zip(&values)
        .map(|(keys, values)| keys.iter().zip(values).map(|(key, value)| key + value).collect())
        .collect();
    let groups = grouping::balanced(&costs, n_kv as usize);
    let maps = spaces.each_ref().map(|space| match method {
        Merge::Aligned => aligned::maps(space, &groups),
        Merge::LowRank => low_rank::maps(space, &groups),
        _ => means(it.dims(), &groups),
    });
    let loss = |at: usize| Some(spaces[at].loss(&groups, &maps[at]));
    let [key_loss, value_loss] = [loss(0), loss(1)];
    (Merged { layer, key_loss, value_loss, groups: groups.clone(), open: None }, maps)
}

/// The old heads of each of `n_kv` new ones, one number dividing the other.
pub(crate) fn neighbours(old: i64, n_kv: i64) -> Vec<Vec<i64>> {
    match n_kv < old {
        true => (0..n_kv).map(|g| (g * old / n_kv..(g + 1) * old / n_kv).collect()).collect(),
        false => (0..n_kv).map(|g| vec![g * old / n_kv]).collect(),
    }
}

/// The maps of neighbours that stay in their coordinates.
fn pooled(dims: &Dims, layer: usize, groups: &[Vec<i64>], method: Merge) -> Maps {
    // The members that are taken: k and v of one head belong together.
    let taken: Vec<Vec<i64>> = match method {
        Merge::First => groups.iter().map(|group| vec![group[0]]).collect(),
        Merge::Random { seed } => {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            rng.set_stream(layer as u64);
            let one =
                |group: &Vec<i64>| vec![group[(rng.next_u64() % group.len() as u64) as usize]];
            groups.iter().map(one).collect()
        }
        _ => groups.to_vec(),
    };
    means(dims, &taken)
}

/// Means of the heads `taken` of each group, read as they are.
fn means(dims: &Dims, taken: &[Vec<i64>]) -> Maps {
    let mut share = vec![0.0; dims.n_kv_heads as usize];
    for group in taken {
        group.iter().for_each(|&head| share[head as usize] = 1.0 / group.len() as f64);
    }
    let one = Tensor::eye(dims.head_dim, (Kind::Double, tch::Device::Cpu)).unsqueeze(0);
    Maps {
        pull: Tensor::from_slice(&share).view([-1, 1, 1]) * &one,
        push: one.repeat([dims.n_kv_heads, 1, 1]),
    }
}

/// A layer's projections and output projection, `[hidden_size, n_heads · head_dim]`, once its heads went through `maps`, of keys and of
/// values.
fn through(it: &AttnLayer, groups: &[Vec<i64>], maps: &[Maps; 2]) -> (Projections, Tensor) {
    let [k, v] = pulled(it, groups, maps);
    let (q, out) = pushed(it, &maps.each_ref().map(|maps| maps.push.shallow_clone()));
    (Projections { q, k, v }, out)
}

/// The projections of new keys and values, P applied. Computed in `f64`.
fn pulled(it: &AttnLayer, groups: &[Vec<i64>], maps: &[Maps; 2]) -> [(Tensor, Option<Tensor>); 2] {
    let Dims { n_kv_heads, head_dim: d, .. } = *it.dims();
    let device = it.out().weight.device();
    let old = it.projections();
    let of_side = |(weight, bias): &(Tensor, Option<Tensor>), maps: &Maps| {
        let pull = maps.pull.to_device(device); // made on the CPU
        let made = |x: &Tensor| {
            let parts = pull.matmul(&x.to_kind(Kind::Double).view([n_kv_heads, d, -1])); // [n, d, ..]
            let sums =
                groups.iter().map(|group| {
                    parts
                        .index_select(0, &Tensor::from_slice(group).to_device(device))
                        .sum_dim_intlist([0i64].as_slice(), false, Kind::Double)
                });
            let width = x.size()[1..].to_vec();
            let rows = groups.len() as i64 * d;
            Tensor::cat(&sums.collect::<Vec<_>>(), 0)
                .view([vec![rows], width].concat().as_slice())
                .to_kind(x.kind())
        };
        (made(weight), bias.as_ref().map(made))
    };
    [of_side(&old.k, &maps[0]), of_side(&old.v, &maps[1])]
}

/// The queries' projection and the output projection, `[hidden_size, n_heads · head_dim]`, C of keys and of values folded in: `push`, each
/// `[n_kv_heads, head_dim, head_dim]`. Computed in `f64`.
fn pushed(it: &AttnLayer, push: &[Tensor; 2]) -> ((Tensor, Option<Tensor>), Tensor) {
    let Dims { n_heads, head_dim: d, hidden_size, ref kv_of_head, .. } = *it.dims();
    let device = it.out().weight.device();
    let of_head = Tensor::from_slice(kv_of_head).to_device(device);
    let [push_k, push_v] = push
        .each_ref()
        .map(|push| push.to_device(device).to_kind(Kind::Double).index_select(0, &of_head));
    let push_k = push_k.transpose(1, 2);
    let turned = |x: &Tensor| {
        let by_head = x.to_kind(Kind::Double).view([n_heads, d, -1]);
        push_k.matmul(&by_head).view_as(x).to_kind(x.kind())
    };
    let (weight, bias) = it.projections().q;
    let q = (turned(&weight), bias.as_ref().map(turned));
    let out = it.out().out_in();
    let by_reader = out.to_kind(Kind::Double).view([hidden_size, n_heads, d]).transpose(0, 1);
    let new_out = by_reader.matmul(&push_v).transpose(0, 1).reshape([hidden_size, n_heads * d]);
    (q, new_out.to_kind(out.kind()))
}
