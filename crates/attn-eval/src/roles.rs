//! What heads do: where each looks, by definitions that need no training and no loss.
//!
//! Weights are the effective attention of the layer, so that layers with another attention kind are measured like softmax
//! ones. Heads are query heads; under grouped queries those that share keys and values still have weights of their own.
//! Padding counts nowhere, neither do special tokens as queries, nor queries that see one key alone. To add a role: write
//! `roles/<name>.rs`, then name it in one of the lists below.

mod confidence;
pub(crate) mod distance;
mod duplicate_token;
pub(crate) mod entropy;
pub(crate) mod first_token;
mod induction;
pub(crate) mod phenomena;
mod rare_token;
mod relative;
mod repeats;
mod separator;
pub(crate) mod syntax;
mod tokens;

use attn_core::{ForwardOptions, Model, Rows};
use attn_data::batch::{Batch, Encoded};
use serde::Serialize;
use tch::{Device, Kind, Tensor};

pub use repeats::repeats;
pub use tokens::Known;
pub(crate) use tokens::Tokens;

use crate::{
    error::{Error, Result},
    heads::by_layer,
    language::N_RESAMPLES,
    rows::{Batching, Progress, for_each_batch, to_input},
    stats::{Interval, bootstrap_ratios},
};
use tokens::Target;

type Targets = fn(&Tokens) -> Vec<Target>;

/// Roles on text.
const ON_TEXTS: [Targets; 4] =
    [relative::targets, first_token::targets, separator::targets, rare_token::targets];

/// Roles on [`repeats`]: in text the same token and its neighbour are often near for other reasons.
const ON_REPEATS: [Targets; 2] = [duplicate_token::targets, induction::targets];

/// What a head is like, on text: name, unit, value of each query (`[b, h, q, k] -> [b, h, q]`).
type Measurement = (&'static str, &'static str, fn(&Tensor, &Tokens) -> Tensor);

const MEASURES: [Measurement; 3] = [
    ("entropy", "nats", entropy::per_query),
    ("confidence", "weight", confidence::per_query),
    ("distance", "tokens", distance::per_query),
];

/// The share of tokens from which on a head with its largest weight at one distance is positional.
pub const POSITIONAL: f64 = 0.9;

/// Most attention weights of a pass, all layers together.
pub const MAX_WEIGHTS: usize = 1 << 26;

pub(crate) const CONFIDENCE: f64 = 0.95;

/// What the heads of a model do. Tables are layers × heads; intervals are 95 %, by the bootstrap over texts (percentiles,
/// 1,000 draws of seed 0, the same for all heads).
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HeadRoles {
    /// The number of each head in the pretrained layer, as others may have been removed.
    pub heads: Vec<Vec<i64>>,
    /// Texts.
    pub n_texts: usize,
    /// Where heads look.
    pub roles: Vec<RoleScore>,
    /// What else is to be said of their weights.
    pub measures: Vec<Measure>,
    /// The heads that look at one relative position from [`POSITIONAL`] of the tokens or more.
    pub positional: Vec<Positional>,
}

/// How much of its attention each head has for the keys of a role.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RoleScore {
    /// Name.
    pub role: &'static str,
    /// Where the role is a distance: the key's position less the query's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offset: Option<i64>,
    /// `texts` or `repeats`.
    pub on: &'static str,
    /// Tokens that have such a key in sight.
    pub n_tokens: usize,
    /// What `mass` and `share` are of a head that attends to all in sight alike, and `share` of one that picks at random.
    pub chance: f64,
    /// Mean over tokens of the weight on these keys.
    pub mass: Vec<Vec<f64>>,
    /// Of `mass`.
    pub mass_interval_95: Vec<Vec<Interval>>,
    /// Share of the tokens whose largest weight is on such a key; of several equally large ones each counts its part.
    pub share: Vec<Vec<f64>>,
    /// Of `share`.
    pub share_interval_95: Vec<Vec<Interval>>,
}

/// A mean over tokens.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Measure {
    /// Name.
    pub measure: &'static str,
    /// Unit.
    pub unit: &'static str,
    /// Tokens.
    pub n_tokens: usize,
    /// What it is of a head that attends to all in sight alike.
    pub uniform: f64,
    /// Mean over tokens.
    pub mean: Vec<Vec<f64>>,
    /// Of `mean`.
    pub interval_95: Vec<Vec<Interval>>,
}

/// A head that looks at one relative position. The best of the positions is named, which flatters it a little.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Positional {
    /// Its layer.
    pub layer: usize,
    /// Its number in the pretrained layer.
    pub head: i64,
    /// The key's position less the query's.
    pub offset: i64,
    /// Share of the tokens that have such a neighbour whose largest weight is on it.
    pub share: f64,
    /// Of `share`.
    pub interval_95: Interval,
}

/// Says what the heads of `model` do on `texts`, and on `repeated` tokens ([`repeats`]) where there are any.
///
/// A role that no token of the texts could have, such as that of separators where there are none, is left out.
///
/// # Errors
///
/// [`Error::Source`] for a model that attends to another sequence, [`Error::Nothing`] where there is no head or no token to
/// count, [`Error::EmptyRow`], [`Error::NotFinite`], [`Error::Stopped`], and what the model refuses.
pub fn head_roles(
    model: &Model,
    texts: &[Encoded],
    repeated: &[Encoded],
    known: &Known<'_>,
    batching: &Batching,
    progress: &mut Progress<'_>,
) -> Result<HeadRoles> {
    check_attention(model, "what heads do")?;
    let heads = numbers(model)?;
    let mut roles = Vec::new();
    let on_texts = gather(model, texts, known, &ON_TEXTS, &MEASURES, batching, progress)?;
    let mut measures = Vec::new();
    for (found, &(measure, unit, _)) in on_texts.measures.iter().zip(&MEASURES) {
        let n_tokens = found.n_tokens();
        if n_tokens == 0 {
            return Err(Error::Nothing("no token but special ones sees a second one"));
        }
        let (mean, interval_95) = found.mean(|sums| &sums.mass, &heads);
        let uniform = found.uniform();
        measures.push(Measure { measure, unit, n_tokens, uniform, mean, interval_95 });
    }
    let mut add = |found: Gathered, on| {
        for ((role, offset), found) in found.roles.iter().filter(|(_, of)| of.n_tokens() > 0) {
            let (mass, mass_interval_95) = found.mean(|sums| &sums.mass, &heads);
            let (share, share_interval_95) = found.mean(|sums| &sums.share, &heads);
            roles.push(RoleScore {
                role,
                offset: *offset,
                on,
                n_tokens: found.n_tokens(),
                chance: found.uniform(),
                mass,
                mass_interval_95,
                share,
                share_interval_95,
            });
        }
    };
    add(on_texts, "texts");
    if !repeated.is_empty() {
        add(gather(model, repeated, known, &ON_REPEATS, &[], batching, &mut go_on)?, "repeats");
    }
    let positional = positional(&roles, &heads);
    Ok(HeadRoles { heads, n_texts: texts.len(), roles, measures, positional })
}

pub(crate) fn go_on(_: usize) -> std::ops::ControlFlow<()> {
    std::ops::ControlFlow::Continue(())
}

/// Refuses a model whose attention is not between the tokens of one text.
pub(crate) fn check_attention(model: &Model, measure: &'static str) -> Result<()> {
    match (model.needs_source(), routes(model)) {
        (true, _) => Err(Error::Source { measure }),
        (_, true) => Err(Error::Routed { measure }),
        (false, false) => Ok(()),
    }
}

/// Whether heads of some layer run for some tokens alone: at the others they attend to nothing.
pub(crate) fn routes(model: &Model) -> bool {
    model.layers().iter().any(|layer| layer.kind().routes().is_some())
}

/// The number of each head in its pretrained layer.
pub(crate) fn numbers(model: &Model) -> Result<Vec<Vec<i64>>> {
    let heads: Vec<Vec<i64>> = model.layers().iter().map(|layer| layer.spec().kept_heads).collect();
    match heads.iter().all(Vec::is_empty) {
        true => Err(Error::Nothing("no layer of the model has a head")),
        false => Ok(heads),
    }
}

/// Batches whose attention weights fit into memory, all layers of them.
pub(crate) fn bounded(batching: &Batching, rows: &[Encoded], n_heads: usize) -> Batching {
    let longest = rows.iter().map(|row| row.ids.len()).max().unwrap_or(1).max(1);
    let most = (MAX_WEIGHTS / (longest * n_heads)).max(1);
    let max_tokens = batching.max_tokens.map_or(most, |max| max.min(most));
    Batching { max_tokens: Some(max_tokens), ..*batching }
}

/// The attention weights of a batch in at least 32 bits: `[b, h, n, n]` a layer.
pub(crate) fn weights_of(model: &Model, batch: &Batch) -> Result<Vec<Tensor>> {
    let options = ForwardOptions {
        attentions: Rows::All,
        // Nothing is predicted.
        before_vocabulary: model.vocabulary().is_some(),
        ..ForwardOptions::default()
    };
    let layers = model.forward(&to_input(batch, model), &options)?.attentions;
    Ok(layers.iter().map(wide).collect())
}

fn wide(weights: &Tensor) -> Tensor {
    weights.to_kind(if weights.kind() == Kind::Double { Kind::Double } else { Kind::Float })
}

/// The heads whose largest weight is at one distance from [`POSITIONAL`] of the tokens.
fn positional(roles: &[RoleScore], heads: &[Vec<i64>]) -> Vec<Positional> {
    let mut found = Vec::new();
    for (layer, numbers) in heads.iter().enumerate() {
        for (place, &head) in numbers.iter().enumerate() {
            let at = |role: &RoleScore| {
                let (share, interval_95) =
                    (role.share[layer][place], role.share_interval_95[layer][place]);
                Some(Positional { layer, head, offset: role.offset?, share, interval_95 })
            };
            let best = roles.iter().filter_map(at).max_by(|a, b| a.share.total_cmp(&b.share));
            found.extend(best.filter(|best| best.share >= POSITIONAL));
        }
    }
    found
}

/// Sums over the queries of a text.
#[derive(Debug, Clone, Default)]
struct Sums {
    /// One a head, layer after layer.
    mass: Vec<f64>,
    /// Alike; empty of a measure.
    share: Vec<f64>,
    uniform: f64,
    n: f64,
}

/// Sums of all texts.
#[derive(Debug, Default)]
struct Counted {
    texts: Vec<Sums>,
}

impl Counted {
    fn n_tokens(&self) -> usize {
        self.texts.iter().map(|text| text.n).sum::<f64>() as usize
    }

    fn uniform(&self) -> f64 {
        self.texts.iter().map(|text| text.uniform).sum::<f64>() / self.n_tokens() as f64
    }

    /// Means over tokens with their intervals, layers × heads.
    fn mean(
        &self,
        of: impl Fn(&Sums) -> &Vec<f64>,
        heads: &[Vec<i64>],
    ) -> (Vec<Vec<f64>>, Vec<Vec<Interval>>) {
        let rows: Vec<Vec<f64>> = self.texts.iter().map(|text| of(text).clone()).collect();
        let n: Vec<f64> = self.texts.iter().map(|text| text.n).collect();
        let (means, intervals) = means_over_tokens(&rows, &n);
        (by_layer(&means, heads), by_layer(&intervals, heads))
    }
}

/// `Σ rows[text][column] / Σ n[text]` of each column, with intervals over texts. Some n is above 0, and all is finite.
pub(crate) fn means_over_tokens(rows: &[Vec<f64>], n: &[f64]) -> (Vec<f64>, Vec<Interval>) {
    let total: f64 = n.iter().sum();
    let column = |at: usize| rows.iter().map(|row| row[at]).sum::<f64>() / total;
    let intervals = bootstrap_ratios(rows, n, CONFIDENCE, N_RESAMPLES, 0)
        .expect("some token counts, and sums are finite");
    ((0..rows[0].len()).map(column).collect(), intervals)
}

/// What was counted of each role and of each measure.
struct Gathered {
    roles: Vec<((&'static str, Option<i64>), Counted)>,
    measures: Vec<Counted>,
}

fn gather(
    model: &Model,
    rows: &[Encoded],
    known: &Known<'_>,
    targets: &[Targets],
    measurements: &[Measurement],
    batching: &Batching,
    progress: &mut Progress<'_>,
) -> Result<Gathered> {
    let n_heads: usize = numbers(model)?.iter().map(Vec::len).sum();
    let batching = bounded(batching, rows, n_heads);
    let causal = model.config().is_causal();
    // Of each role, then of each measure, and of each text.
    let mut names: Vec<(&'static str, Option<i64>)> = Vec::new();
    let mut all: Vec<Vec<Sums>> = Vec::new();
    for_each_batch(model, rows, &batching, progress, |positions, batch| {
        let layers = weights_of(model, &batch)?;
        let tokens = Tokens::of(&batch, causal, known, model.device());
        let targets: Vec<Target> = targets.iter().flat_map(|of| of(&tokens)).collect();
        let sums = count(&layers, &tokens, &targets, measurements);
        names = targets.iter().map(|target| (target.role, target.offset)).collect();
        all.resize(sums.len(), vec![Sums::default(); rows.len()]);
        for (all, sums) in all.iter_mut().zip(sums) {
            for (sums, &at) in sums.into_iter().zip(positions) {
                if !sums.mass.iter().chain(&sums.share).all(|value| value.is_finite()) {
                    return Err(Error::NotFinite { index: rows[at].index });
                }
                all[at] = sums;
            }
        }
        Ok(())
    })?;
    let mut counted = all.into_iter().map(|texts| Counted { texts });
    let roles = names.into_iter().map(|name| (name, counted.next().expect("one a role"))).collect();
    Ok(Gathered { roles, measures: counted.collect() })
}

/// The sums of each target, then of each measure, for each row of a batch. `layers`: `[b, h, n, n]` a layer.
fn count(
    layers: &[Tensor],
    tokens: &Tokens,
    targets: &[Target],
    measurements: &[Measurement],
) -> Vec<Vec<Sums>> {
    let kind = layers[0].kind();
    let uniform = tokens.uniform(kind);
    let asked: Vec<&Tensor> = targets
        .iter()
        .map(|target| &target.counted)
        .chain(measurements.iter().map(|_| &tokens.asking))
        .collect();
    let b = tokens.ids.size()[0];
    let mut sums: Vec<Vec<Sums>> = asked
        .iter()
        .map(|counted| {
            let n = counted.sum_dim_intlist([-1i64].as_slice(), false, Kind::Double);
            let n = values(&n.view([b, 1]));
            n.into_iter().map(|n| Sums { n: n[0], ..Sums::default() }).collect()
        })
        .collect();
    let hits = (!targets.is_empty()).then(|| {
        let hits: Vec<Tensor> =
            targets.iter().map(|target| target.hits.to_kind(kind).unsqueeze(-1)).collect();
        let counted: Vec<Tensor> =
            targets.iter().map(|target| target.counted.unsqueeze(1).unsqueeze(-1)).collect();
        (Tensor::cat(&hits, -1), Tensor::cat(&counted, -1)) // [b, q, k, t], [b, 1, q, t]
    });
    // Σ over the queries that count of the weight on the keys of each target: [b, h, t].
    let on_targets = |weights: &Tensor| {
        hits.as_ref().map(|(hits, counted)| {
            let mass = weights.transpose(1, 2).matmul(hits).transpose(1, 2); // [b, h, q, t]
            let mass = mass.masked_fill(&counted.logical_not(), 0.0);
            mass.sum_dim_intlist([2i64].as_slice(), false, Kind::Double)
        })
    };
    // Of each measure: [b, h].
    let measured = |weights: &Tensor, (_, _, per_query): &Measurement| {
        let per_query = per_query(weights, tokens); // [b, h, q]
        let per_query = per_query.masked_fill(&tokens.asking.unsqueeze(1).logical_not(), 0.0);
        per_query.sum_dim_intlist([2i64].as_slice(), false, Kind::Double)
    };
    let with_heads = layers.iter().filter(|weights| weights.size()[1] > 0);
    for (weights, is_model) in with_heads.map(|weights| (weights, true)).chain([(&uniform, false)])
    {
        let mass = on_targets(weights);
        let share = on_targets(&largest(weights, &tokens.seen));
        for at in 0..targets.len() {
            let of = |sums: &Option<Tensor>| {
                values(&sums.as_ref().expect("there are targets").select(2, at as i64))
            };
            let both = of(&mass).into_iter().zip(of(&share));
            for (sums, (mass, share)) in sums[at].iter_mut().zip(both) {
                match is_model {
                    true => {
                        sums.mass.extend(mass);
                        sums.share.extend(share);
                    }
                    false => sums.uniform = mass[0],
                }
            }
        }
        for (at, measurement) in measurements.iter().enumerate() {
            let found = values(&measured(weights, measurement));
            for (sums, found) in sums[targets.len() + at].iter_mut().zip(found) {
                match is_model {
                    true => sums.mass.extend(found),
                    false => sums.uniform = found[0],
                }
            }
        }
    }
    sums
}

/// 1 at the largest weight of each query among the keys in sight, parts of it where several are equally large:
/// `[b, h, n, n]`.
fn largest(weights: &Tensor, seen: &Tensor) -> Tensor {
    let seen = seen.unsqueeze(1);
    let hidden = weights.masked_fill(&seen.logical_not(), f64::NEG_INFINITY);
    let top = hidden.amax([-1i64].as_slice(), true);
    let is_top = hidden.eq_tensor(&top).logical_and(&seen).to_kind(weights.kind());
    let n_top = is_top.sum_dim_intlist([-1i64].as_slice(), true, weights.kind());
    is_top / n_top.clamp_min(1)
}

/// Two axes as rows of `f64`.
pub(crate) fn values(tensor: &Tensor) -> Vec<Vec<f64>> {
    let tensor = tensor.to_device(Device::Cpu).to_kind(Kind::Double).contiguous();
    Vec::try_from(tensor).expect("two axes of f64")
}

#[cfg(test)]
mod tests {
    use attn_core::testing::{randn, random_ids};
    use attn_data::batch::{Side, collate};

    use super::*;

    const VOCAB: i64 = 9;

    /// Rows of several lengths with repeated tokens; 0 and 1 are special.
    fn batch() -> Batch {
        let row = |(index, n): (usize, i64)| {
            let ids = random_ids(index as u64, [1, n], VOCAB).view([-1]);
            let ids: Vec<i64> = Vec::try_from(ids).unwrap();
            let mut ids: Vec<u32> = ids.iter().map(|&id| id as u32).collect();
            ids[0] = if index == 1 { 5 } else { 0 };
            Encoded { ids, label: None, index, second_from: None }
        };
        let rows: Vec<Encoded> = [11, 7, 1, 2].into_iter().enumerate().map(row).collect();
        collate(&rows.iter().collect::<Vec<_>>(), 4, Side::Right)
    }

    const SPECIAL: [u32; 2] = [0, 1];
    const COUNTS: [u64; 8] = [90, 80, 7, 7, 3, 3, 5, 1]; // 8 never occurs

    /// Random weights that hide what the mask hides; some queries have several equally large ones.
    fn weights(batch: &Batch, causal: bool, seed: u64) -> Tensor {
        let (b, n) = (batch.rows as i64, batch.cols as i64);
        let known = Known { special: &SPECIAL, counts: &COUNTS };
        let tokens = Tokens::of(batch, causal, &known, Device::Cpu);
        let scores = (randn(seed, &[b, 3, n, n]) * 2.0).round();
        let hidden = tokens.seen.unsqueeze(1).logical_not();
        scores.masked_fill(&hidden, -1e30).softmax(-1, Kind::Double)
    }

    /// The keys of `role` for query `t` of a row, as its file says.
    fn keys(role: &str, offset: Option<i64>, ids: &[u32], t: usize, causal: bool) -> Vec<usize> {
        let in_sight = if causal { t + 1 } else { ids.len() };
        let special = |j: usize| SPECIAL.contains(&ids[j]);
        let count = |j: usize| COUNTS.get(ids[j] as usize).copied().unwrap_or(0);
        let plain: Vec<usize> = (0..in_sight).filter(|&j| !special(j)).collect();
        let is_one = |j: usize| match role {
            "previous_token" | "next_token" | "relative_position" => {
                j as i64 - t as i64 == offset.unwrap()
            }
            "first_token" => j == 0 && t > 0,
            "separator" => j > 0 && special(j),
            "rare_token" => {
                let fewest = plain.iter().map(|&j| count(j)).min();
                plain.len() > 1 && plain.contains(&j) && Some(count(j)) == fewest
            }
            "duplicate_token" => j < t && ids[j] == ids[t],
            "induction" => j > 0 && j - 1 < t && ids[j - 1] == ids[t],
            other => panic!("{other}"),
        };
        (0..in_sight).filter(|&j| is_one(j)).collect()
    }

    #[test]
    fn roles_and_measures_match_their_definitions() {
        let batch = batch();
        for causal in [true, false] {
            let layers = [weights(&batch, causal, 1), weights(&batch, causal, 2)];
            let known = Known { special: &SPECIAL, counts: &COUNTS };
            let tokens = Tokens::of(&batch, causal, &known, Device::Cpu);
            let all = ON_TEXTS.iter().chain(&ON_REPEATS);
            let targets: Vec<Target> = all.flat_map(|of| of(&tokens)).collect();
            assert_eq!(targets.len(), if causal { 4 } else { 7 } + 5);

            let found = count(&layers, &tokens, &targets, &MEASURES);

            let mut n_tokens = 0.0;
            for row in 0..batch.rows {
                let real: Vec<u32> = (0..batch.cols)
                    .filter(|col| batch.mask[row * batch.cols + col] == 1)
                    .map(|col| batch.ids[row * batch.cols + col] as u32)
                    .collect();
                let in_sight = |t: usize| if causal { t + 1 } else { real.len() };
                let asks = |t: &usize| !SPECIAL.contains(&real[*t]) && in_sight(*t) > 1;
                let asking: Vec<usize> = (0..real.len()).filter(asks).collect();
                let weight = |at: usize, t: usize, j: usize| {
                    let place = [row as i64, at as i64 % 3, t as i64, j as i64];
                    layers[at / 3].double_value(&place)
                };
                for (target, sums) in targets.iter().zip(&found) {
                    let (mut mass, mut share, mut uniform, mut n) = ([0.0; 6], [0.0; 6], 0.0, 0.0);
                    for &t in &asking {
                        let keys = keys(target.role, target.offset, &real, t, causal);
                        if keys.is_empty() {
                            continue;
                        }
                        n += 1.0;
                        uniform += keys.len() as f64 / in_sight(t) as f64;
                        for at in 0..6 {
                            let all: Vec<f64> =
                                (0..in_sight(t)).map(|j| weight(at, t, j)).collect();
                            let top = all.iter().copied().fold(0.0, f64::max);
                            let ties = all.iter().filter(|&&w| w == top).count() as f64;
                            mass[at] += keys.iter().map(|&j| all[j]).sum::<f64>();
                            share[at] +=
                                keys.iter().filter(|&&j| all[j] == top).count() as f64 / ties;
                        }
                    }
                    let sums = &sums[row];
                    let name = (target.role, target.offset, row, causal);
                    assert_eq!(sums.n, n, "{name:?}");
                    assert!((sums.uniform - uniform).abs() < 1e-12, "{name:?}");
                    for at in 0..6 {
                        assert!((sums.mass[at] - mass[at]).abs() < 1e-12, "{name:?}");
                        assert!((sums.share[at] - share[at]).abs() < 1e-12, "{name:?}");
                    }
                    n_tokens += n;
                }
                for ((name, ..), sums) in MEASURES.iter().zip(&found[targets.len()..]) {
                    let value = |t: usize, weight: &dyn Fn(usize) -> f64| -> f64 {
                        let all = || (0..in_sight(t)).map(|j| (j, weight(j)));
                        match *name {
                            "entropy" => {
                                all().map(|(_, w)| if w > 0.0 { -w * w.ln() } else { 0.0 }).sum()
                            }
                            "confidence" => all()
                                .filter(|(j, _)| !SPECIAL.contains(&real[*j]))
                                .map(|(_, w)| w)
                                .fold(0.0, f64::max),
                            _ => all().map(|(j, w)| w * (j as f64 - t as f64).abs()).sum(),
                        }
                    };
                    let sums = &sums[row];
                    assert_eq!(sums.n, asking.len() as f64, "{name}");
                    for at in 0..6 {
                        let expected: f64 =
                            asking.iter().map(|&t| value(t, &|j| weight(at, t, j))).sum();
                        assert!((sums.mass[at] - expected).abs() < 1e-10, "{name} {row}");
                    }
                    let even = |t: usize| value(t, &|_| 1.0 / in_sight(t) as f64);
                    let uniform: f64 = asking.iter().map(|&t| even(t)).sum();
                    assert!((sums.uniform - uniform).abs() < 1e-10, "{name} {row}");
                }
            }
            assert!(n_tokens > 80.0, "{n_tokens}: these rows test nothing");
        }
    }

    /// A head that only looks at the keys of `target`, and at itself where there is none.
    fn planted(tokens: &Tokens, target: &Target) -> Tensor {
        let own = tokens.offsets().eq(0).unsqueeze(0).logical_and(&tokens.seen);
        let none = target.hits.any_dim(-1, true).logical_not();
        let keys = target.hits.logical_or(&own.logical_and(&none)).to_kind(Kind::Double);
        let n = keys.sum_dim_intlist([-1i64].as_slice(), true, Kind::Double).clamp_min(1);
        (keys / n).unsqueeze(1)
    }

    #[test]
    fn a_planted_head_is_found_in_its_role_and_in_no_other() {
        let rows = repeats(&(2..40).collect::<Vec<_>>(), Some(0), 10, 3, 7);
        let batch = collate(&rows.iter().collect::<Vec<_>>(), 4, Side::Right);
        let known = Known { special: &[0], counts: &[] };
        let tokens = Tokens::of(&batch, true, &known, Device::Cpu);
        let all = ON_TEXTS.iter().chain(&ON_REPEATS);
        let targets: Vec<Target> = all.flat_map(|of| of(&tokens)).collect();
        let wanted = ["previous_token", "first_token", "duplicate_token", "induction"];
        for role in wanted {
            let target = targets.iter().find(|target| target.role == role).unwrap();
            let found = count(&[planted(&tokens, target)], &tokens, &targets, &[]);
            for (other, sums) in targets.iter().zip(&found) {
                let n: f64 = sums.iter().map(|sums| sums.n).sum();
                let mass: f64 = sums.iter().map(|sums| sums.mass[0]).sum();
                let name = other.role;
                if name == role {
                    assert!(n >= 30.0 && (mass / n - 1.0).abs() < 1e-12, "{role}: {mass} of {n}");
                } else if wanted.contains(&name) {
                    assert!(mass <= 0.06 * n, "{role} as {name}: {mass} of {n}");
                }
            }
        }
        // Each second half: 10 tokens of 21 that were there before.
        let induction = targets.iter().find(|target| target.role == "induction").unwrap();
        let counted = induction.counted.to_kind(Kind::Int64).sum(Kind::Int64).int64_value(&[]);
        assert_eq!(counted, 30);
    }

    #[test]
    fn repeats_are_two_equal_halves_of_different_tokens() {
        let vocabulary: Vec<u32> = (3..60).collect();
        let rows = repeats(&vocabulary, Some(0), 20, 5, 1);
        for row in &rows {
            assert_eq!((row.ids.len(), row.ids[0]), (41, 0));
            assert_eq!(row.ids[1..21], row.ids[21..]);
            let mut half = row.ids[1..21].to_vec();
            half.sort_unstable();
            half.dedup();
            assert_eq!(half.len(), 20);
            assert!(half.iter().all(|id| vocabulary.contains(id)));
        }
        assert_ne!(rows[0].ids, rows[1].ids);
        assert_eq!(rows, repeats(&vocabulary, Some(0), 20, 5, 1));
        assert_ne!(rows, repeats(&vocabulary, Some(0), 20, 5, 2));
    }
}
