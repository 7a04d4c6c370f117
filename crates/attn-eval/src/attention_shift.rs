//! What tuning, or anything else, does to attention: the weights of each head before against after, on the same texts.
//!
//! ```text
//! JS(p, q)  = H((p + q)/2) − (H(p) + H(q))/2      natural logarithm: 0 to ln 2 = 0.693 nats
//! distance  = √JS                                 0 to √(ln 2) = 0.833, a metric
//! ```
//!
//! p and q are the rows of a head at one token, divided by their sums. Endres and Schindelin 2003, "A New Metric for Probability
//! Distributions", <https://doi.org/10.1109/TIT.2003.813506>; between heads Clark et al. 2019, "What Does BERT Look At?",
//! section 6, <https://arxiv.org/abs/1906.04341>. How much of a shift the seed alone makes, a model tuned in the same way
//! with another seed says.

use attn_core::Model;
use attn_data::batch::{Batch, Encoded};
use serde::Serialize;
use tch::{Kind, Tensor};

use crate::{
    ablate::Head,
    error::{Error, Result},
    heads::{by_layer, ranked},
    roles::{
        Known, Tokens, bounded, check_attention, distance, entropy, first_token, means_over_tokens,
        numbers, values, weights_of,
    },
    rows::{Batching, Progress, for_each_batch},
    stats::Interval,
};

/// Layers × heads.
pub type Table<T> = Vec<Vec<T>>;

/// What a head is like: name, unit.
const MEASURES: [(&str, &str); 3] =
    [("entropy", "nats"), ("distance", "tokens"), ("first_token_mass", "weight")];

/// How attention differs between models, means over tokens. Special tokens and those that see one key alone are not counted. Intervals are
/// 95 %, by the bootstrap over texts (percentiles, 1,000 draws of seed 0, the same for all heads).
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AttentionShift {
    /// The number in the pretrained layer of each head that all models have.
    pub heads: Table<i64>,
    /// Texts.
    pub n_texts: usize,
    /// Tokens that count.
    pub n_tokens: usize,
    /// From before to after.
    pub shift: Shift,
    /// What another seed does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub control: Option<Control>,
}

/// From one model to another.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Shift {
    /// Mean of √JS.
    pub js_distance: Table<f64>,
    /// Of `js_distance`.
    pub js_distance_interval_95: Table<Interval>,
    /// Mean of JS, in nats.
    pub js_divergence_nats: Table<f64>,
    /// What else changes.
    pub changes: Vec<Change>,
}

/// A mean over tokens in both models.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Change {
    /// Name.
    pub measure: &'static str,
    /// Unit.
    pub unit: &'static str,
    /// In the first.
    pub before: Table<f64>,
    /// In the second.
    pub after: Table<f64>,
    /// `after` less `before`.
    pub change: Table<f64>,
    /// Of `change`, pairs drawn together.
    pub change_interval_95: Table<Interval>,
}

/// The same model tuned with another seed.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Control {
    /// From before to the control.
    pub shift: Shift,
    /// Between after and the control: what the seed alone makes.
    pub between: Shift,
    /// √JS from before to after, less that between after and the control.
    pub excess: Table<f64>,
    /// Of `excess`: one above 0 says that tuning moves the head by more than its seed does.
    pub excess_interval_95: Table<Interval>,
}

/// Compares the attention of `before` and `after` on `texts`, and of `control` with both: of the heads that all of them have, where some
/// were removed. What the models end in may differ.
///
/// # Errors
///
/// [`Error::Source`] for a model that attends to another sequence, [`Error::Heads`] for models of other layers or without a common head,
/// [`Error::Nothing`] where no token counts, [`Error::EmptyRow`], [`Error::NotFinite`], [`Error::Stopped`], and what a model
/// refuses.
pub fn attention_shift(
    before: &Model,
    after: &Model,
    control: Option<&Model>,
    texts: &[Encoded],
    known: &Known<'_>,
    batching: &Batching,
    progress: &mut Progress<'_>,
) -> Result<AttentionShift> {
    let own = numbers(before)?;
    let causal = before.config().is_causal();
    let mut heads = own.clone();
    // All are in memory at once.
    let mut n_heads = 0;
    for model in [Some(before), Some(after), control].into_iter().flatten() {
        check_attention(model, "a shift of attention")?;
        let other = numbers(model)?;
        n_heads += other.iter().map(Vec::len).sum::<usize>();
        let is_alike = other.len() == own.len() && model.config().is_causal() == causal;
        for (common, other) in heads.iter_mut().zip(&other) {
            common.retain(|head| other.contains(head));
        }
        if !is_alike || heads.iter().all(Vec::is_empty) {
            return Err(Error::Heads { own, other });
        }
    }
    let n_models = if control.is_some() { 3 } else { 2 };
    let batching = bounded(batching, texts, n_heads);
    let mut found: Vec<Vec<Pair>> = vec![vec![Pair::default(); texts.len()]; 2 * n_models - 3];
    for_each_batch(before, texts, &batching, progress, |positions, batch| {
        let tokens = Tokens::of(&batch, causal, known, before.device());
        let mut put = |at: usize, pairs: Vec<Pair>| {
            for (pair, &position) in pairs.into_iter().zip(positions) {
                if !pair
                    .js_distance
                    .iter()
                    .chain(pair.measures.iter().flatten().flatten())
                    .all(|x| x.is_finite())
                {
                    return Err(Error::NotFinite { index: texts[position].index });
                }
                found[at][position] = pair;
            }
            Ok(())
        };
        let weights = |model: &Model| weights_of_heads(model, &heads, &batch);
        let [first, second] = [weights(before)?, weights(after)?];
        put(0, compare(&first, &second, &tokens))?;
        if let Some(control) = control {
            let third = weights(control)?;
            put(1, compare(&first, &third, &tokens))?;
            put(2, compare(&second, &third, &tokens))?;
        }
        Ok(())
    })?;
    let n_tokens = found[0].iter().map(|pair| pair.n).sum::<f64>();
    if n_tokens == 0.0 {
        return Err(Error::Nothing("no token but special ones sees a second one"));
    }
    let control = (n_models == 3).then(|| {
        let n: Vec<f64> = found[0].iter().map(|pair| pair.n).collect();
        let excess: Vec<Vec<f64>> = found[0]
            .iter()
            .zip(&found[2])
            .map(|(tuned, seed)| less(&tuned.js_distance, &seed.js_distance))
            .collect();
        let (excess, intervals) = means_over_tokens(&excess, &n);
        Control {
            shift: summarize(&found[1], &heads),
            between: summarize(&found[2], &heads),
            excess: by_layer(&excess, &heads),
            excess_interval_95: by_layer(&intervals, &heads),
        }
    });
    let shift = summarize(&found[0], &heads);
    Ok(AttentionShift { n_texts: texts.len(), n_tokens: n_tokens as usize, shift, control, heads })
}

/// [`weights_of`] the heads of these numbers.
fn weights_of_heads(model: &Model, heads: &[Vec<i64>], batch: &Batch) -> Result<Vec<Tensor>> {
    let mut all = weights_of(model, batch)?;
    for ((weights, wanted), own) in all.iter_mut().zip(heads).zip(numbers(model)?) {
        if *wanted != own {
            let place = |head: &i64| own.iter().position(|own| own == head).map(|at| at as i64);
            let places: Vec<i64> = wanted.iter().filter_map(place).collect();
            *weights =
                weights.index_select(1, &Tensor::from_slice(&places).to_device(weights.device()));
        }
    }
    Ok(all)
}

/// Sums over the tokens of a text, an entry a head.
#[derive(Debug, Clone, Default)]
struct Pair {
    n: f64,
    js_distance: Vec<f64>,
    js_divergence: Vec<f64>,
    /// Of each measure: before, after.
    measures: [[Vec<f64>; 2]; 3],
    /// Tokens that each measure counts.
    n_of: [f64; 3],
}

fn less(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a - b).collect()
}

/// JS of the rows of `a` and `b`: `[b, h, q, k] -> [b, h, q]`, in nats.
fn jensen_shannon(a: &Tensor, b: &Tensor, tokens: &Tokens) -> Tensor {
    let normal = |x: &Tensor| {
        let sum = x.sum_dim_intlist([-1i64].as_slice(), true, x.kind());
        x / sum.masked_fill(&sum.eq(0.0), 1.0)
    };
    let (p, q) = (normal(a), normal(b));
    let middle = (&p + &q) / 2.0;
    let h = |x: &Tensor| entropy::per_query(x, tokens);
    // Rounding may make it a little less than 0.
    (h(&middle) - (h(&p) + h(&q)) / 2.0).clamp_min(0.0)
}

/// The sums of each row of a batch. `before`, `after`: `[b, h, n, n]` a layer.
fn compare(before: &[Tensor], after: &[Tensor], tokens: &Tokens) -> Vec<Pair> {
    let first = first_token::targets(tokens).remove(0);
    let counted = [&tokens.asking, &tokens.asking, &first.counted];
    let n = counted.map(|counted| {
        values(&counted.sum_dim_intlist([-1i64].as_slice(), true, Kind::Double)).concat()
    });
    let mut pairs: Vec<Pair> = (0..n[0].len())
        .map(|row| Pair {
            n: n[0][row],
            n_of: [n[0][row], n[1][row], n[2][row]],
            ..Pair::default()
        })
        .collect();
    // Σ over the queries that count: [b, h].
    let sum = |per_query: Tensor, counted: &Tensor| {
        let per_query = per_query.masked_fill(&counted.unsqueeze(1).logical_not(), 0.0);
        values(&per_query.sum_dim_intlist([-1i64].as_slice(), false, Kind::Double))
    };
    let with_heads = before.iter().zip(after).filter(|(weights, _)| weights.size()[1] > 0);
    for (before, after) in with_heads {
        // In f64: differences of entropies are small where little changed.
        let [before, after] = [before, after].map(|weights| weights.to_kind(Kind::Double));
        let js = jensen_shannon(&before, &after, tokens);
        let distances = sum(js.sqrt(), &tokens.asking);
        let divergences = sum(js, &tokens.asking);
        for ((pair, distances), divergences) in pairs.iter_mut().zip(distances).zip(divergences) {
            pair.js_distance.extend(distances);
            pair.js_divergence.extend(divergences);
        }
        for (side, weights) in [before, after].iter().enumerate() {
            let found = [
                entropy::per_query(weights, tokens),
                distance::per_query(weights, tokens),
                weights.select(-1, 0),
            ];
            for (at, per_query) in found.into_iter().enumerate() {
                for (pair, sums) in pairs.iter_mut().zip(sum(per_query, counted[at])) {
                    pair.measures[at][side].extend(sums);
                }
            }
        }
    }
    pairs
}

fn summarize(pairs: &[Pair], heads: &[Vec<i64>]) -> Shift {
    let n: Vec<f64> = pairs.iter().map(|pair| pair.n).collect();
    let mean = |of: &dyn Fn(&Pair) -> Vec<f64>, n: &[f64]| {
        let rows: Vec<Vec<f64>> = pairs.iter().map(of).collect();
        let (means, intervals) = means_over_tokens(&rows, n);
        (by_layer(&means, heads), by_layer(&intervals, heads))
    };
    let (js_distance, js_distance_interval_95) = mean(&|pair| pair.js_distance.clone(), &n);
    let (js_divergence_nats, _) = mean(&|pair| pair.js_divergence.clone(), &n);
    let mut changes = Vec::new();
    for (at, (measure, unit)) in MEASURES.into_iter().enumerate() {
        let n: Vec<f64> = pairs.iter().map(|pair| pair.n_of[at]).collect();
        if n.iter().sum::<f64>() == 0.0 {
            continue;
        }
        let side = |side: usize| mean(&|pair| pair.measures[at][side].clone(), &n).0;
        let (change, change_interval_95) =
            mean(&|pair| less(&pair.measures[at][1], &pair.measures[at][0]), &n);
        let (before, after) = (side(0), side(1));
        changes.push(Change { measure, unit, before, after, change, change_interval_95 });
    }
    Shift { js_distance, js_distance_interval_95, js_divergence_nats, changes }
}

impl AttentionShift {
    /// The heads by falling distance from before to after.
    pub fn ranked(&self) -> Vec<Head> {
        ranked(&self.shift.js_distance)
    }
}

#[cfg(test)]
mod tests {
    use attn_core::testing::randn;
    use attn_data::batch::{Side, collate};

    use super::*;

    const SPECIAL: [u32; 1] = [0];

    fn setting(causal: bool) -> (Tokens, Vec<usize>) {
        let row = |(index, ids): (usize, &[u32])| Encoded {
            ids: ids.to_vec(),
            label: None,
            index,
            second_from: None,
        };
        let all: [&[u32]; 3] = [&[0, 3, 4, 5, 0, 6], &[0, 7], &[8, 9, 3, 4]];
        let rows: Vec<Encoded> = all.into_iter().enumerate().map(row).collect();
        let batch = collate(&rows.iter().collect::<Vec<_>>(), 2, Side::Right);
        let known = Known { special: &SPECIAL, counts: &[] };
        let lengths = all.iter().map(|ids| ids.len()).collect();
        (Tokens::of(&batch, causal, &known, tch::Device::Cpu), lengths)
    }

    fn weights(seed: u64, tokens: &Tokens) -> Tensor {
        let hidden = tokens.seen.unsqueeze(1).logical_not();
        let scores = randn(seed, &[3, 2, 6, 6]) * 2.0;
        scores.masked_fill(&hidden, -1e30).softmax(-1, Kind::Double)
    }

    #[test]
    fn shifts_match_their_definitions() {
        for causal in [true, false] {
            let (tokens, lengths) = setting(causal);
            let [a, b] = [[1, 2], [3, 4]].map(|seeds| seeds.map(|seed| weights(seed, &tokens)));

            let found = compare(&a, &b, &tokens);

            let asks = tokens.asking.to_kind(Kind::Int64);
            for (row, &n_real) in lengths.iter().enumerate() {
                let asking: Vec<usize> = (0..n_real)
                    .filter(|&t| asks.int64_value(&[row as i64, t as i64]) == 1)
                    .collect();
                assert_eq!(found[row].n, asking.len() as f64);
                for head in 0..4 {
                    let of = |side: &[Tensor; 2], t: usize| -> Vec<f64> {
                        let in_sight = if causal { t + 1 } else { n_real };
                        let at = |j| [row as i64, head as i64 % 2, t as i64, j as i64];
                        (0..in_sight).map(|j| side[head / 2].double_value(&at(j))).collect()
                    };
                    // KL to the middle, from both sides.
                    let kl = |p: &[f64], m: &[f64]| -> f64 {
                        p.iter()
                            .zip(m)
                            .map(|(p, m)| if *p > 0.0 { p * (p / m).ln() } else { 0.0 })
                            .sum()
                    };
                    let (mut js, mut distance, mut changes) = (0.0, 0.0, [0.0; 3]);
                    for &t in &asking {
                        let (p, q) = (of(&a, t), of(&b, t));
                        let m: Vec<f64> = p.iter().zip(&q).map(|(p, q)| (p + q) / 2.0).collect();
                        let one = (kl(&p, &m) + kl(&q, &m)) / 2.0;
                        js += one;
                        distance += one.sqrt();
                        let entropy = |p: &[f64]| {
                            p.iter().map(|p| if *p > 0.0 { -p * p.ln() } else { 0.0 }).sum::<f64>()
                        };
                        let far = |p: &[f64]| {
                            (0..).zip(p).map(|(j, p)| p * (j as f64 - t as f64).abs()).sum::<f64>()
                        };
                        changes[0] += entropy(&q) - entropy(&p);
                        changes[1] += far(&q) - far(&p);
                        changes[2] += if t > 0 { q[0] - p[0] } else { 0.0 };
                    }
                    let pair = &found[row];
                    assert!((pair.js_divergence[head] - js).abs() < 1e-12, "{row} {head}");
                    assert!((pair.js_distance[head] - distance).abs() < 1e-10, "{row} {head}");
                    for (at, change) in changes.into_iter().enumerate() {
                        let [before, after] = &pair.measures[at];
                        assert!((after[head] - before[head] - change).abs() < 1e-12, "{at}");
                    }
                }
            }
        }
    }

    #[test]
    fn distances_reach_from_nothing_to_the_root_of_ln_2() {
        let (tokens, _) = setting(false);
        let one = |key: i64| {
            let weights = Tensor::zeros([3, 2, 6, 6], (Kind::Double, tch::Device::Cpu));
            let _ = weights.select(-1, key).fill_(1.0);
            weights
        };
        let of = |a: Tensor, b: Tensor| summarize(&compare(&[a], &[b], &tokens), &[vec![0, 5]]);
        let apart = of(one(0), one(1));
        for distance in &apart.js_distance[0] {
            assert!((distance - 2f64.ln().sqrt()).abs() < 1e-12);
        }
        assert!((apart.js_divergence_nats[0][1] - 2f64.ln()).abs() < 1e-12);
        assert_eq!(apart.changes[2].change, [[-1.0, -1.0]]);
        let none = of(one(1), one(1));
        assert_eq!(none.js_distance, [[0.0, 0.0]]);
        assert!(none.changes.iter().all(|change| change.change == [[0.0, 0.0]]));
    }
}
