//! What each head does for pairs of sentences of which one is English: the model's preferences with the head's output at
//! zero, against those of the untouched model on the same pairs.
//!
//! ```text
//! effect = share of pairs with ln p(good) > ln p(bad), head at zero,  less that of the untouched model
//! ```
//!
//! The output is gated before the output projection, one head at a time. Query heads: under grouped queries the others of
//! the group go on. Pairs and phenomena are those of BLiMP: Warstadt et al. 2020, <https://arxiv.org/abs/1912.00582>.
//! Many heads on many phenomena: of so many p-values some are small by chance, and [`Phenomena::n_tested`] says how many
//! there are.

use std::{collections::BTreeMap, ops::ControlFlow};

use attn_core::{Gate, Model};
use serde::Serialize;
use tch::{Kind, Tensor};

use super::{CONFIDENCE, numbers};
use crate::{
    attention_shift::Table,
    error::{Error, Result},
    heads::by_layer,
    language::N_RESAMPLES,
    likelihood::{Window, gated_log_likelihoods},
    rows::{Batching, Progress},
    stats::{Interval, compare_over_seeds, wilson},
};

/// The group of all pairs.
const ALL: &str = "all";

/// What [`phenomena()`] found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Phenomena {
    /// Heads × phenomena, `all` among them.
    pub n_tested: usize,
    /// `all`, then each by name.
    pub phenomena: Vec<Phenomenon>,
}

/// One phenomenon. Tables are layers × heads.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Phenomenon {
    /// Name.
    pub phenomenon: String,
    /// Pairs.
    pub n_pairs: usize,
    /// Share of the pairs of which the untouched model holds the good sentence for the likelier one. A tie is none.
    pub accuracy: f64,
    /// Of `accuracy` (Wilson).
    pub interval_95: Interval,
    /// Accuracy with the head at zero, less `accuracy`.
    pub effect: Table<f64>,
    /// Of `effect`, by the paired bootstrap over pairs.
    pub effect_interval_95: Table<Interval>,
    /// McNemar's exact p-value of each.
    pub mcnemar_p: Table<f64>,
}

/// Leaves out each head of `model` in turn. `sentences`: the good and the bad one of each pair in turn; `of`: the phenomenon
/// of each pair. Progress counts sentences, all passes together: [`n_passes()`] of them.
///
/// # Errors
///
/// As [`crate::log_likelihoods`].
///
/// # Panics
///
/// Where there are not twice as many sentences as pairs.
pub fn phenomena(
    model: &Model,
    sentences: &[Window],
    of: &[&str],
    batching: &Batching,
    progress: &mut Progress<'_>,
) -> Result<Phenomena> {
    assert_eq!(sentences.len(), 2 * of.len(), "two sentences a pair");
    let heads = numbers(model)?;
    let mut n_before = 0;
    let mut right = |gates: &[Option<Gate>]| -> Result<Vec<bool>> {
        let mut count = |n_done: usize| -> ControlFlow<()> { progress(n_before + n_done) };
        let log_p = gated_log_likelihoods(model, sentences, gates, batching, &mut count)?;
        n_before += sentences.len();
        Ok(log_p.chunks_exact(2).map(|pair| pair[0] > pair[1]).collect())
    };
    let untouched = right(&[])?;
    let mut without = Vec::new();
    for (layer, of_layer) in heads.iter().enumerate() {
        for head in 0..of_layer.len() {
            without.push(right(&all_but(model, layer, head))?);
        }
    }
    report(of, &untouched, &without, &heads)
}

/// How often the sentences are run through the model.
pub fn n_passes(model: &Model) -> usize {
    1 + model.layers().iter().map(|layer| layer.dims().n_heads as usize).sum::<usize>()
}

/// Gates that are zero at one head, the `head`-th of `layer`.
fn all_but(model: &Model, layer: usize, head: usize) -> Vec<Option<Gate>> {
    let gate = |at: usize| {
        let n_heads = model.layers()[at].dims().n_heads as usize;
        (at == layer).then(|| {
            let g: Vec<f32> =
                (0..n_heads).map(|place| f32::from(u8::from(place != head))).collect();
            Gate::per_head(&Tensor::from_slice(&g).to_kind(Kind::Float).to_device(model.device()))
        })
    };
    (0..model.layers().len()).map(gate).collect()
}

/// `untouched[i]`: whether pair `i` is right; `without[head][i]`: with the head at zero, layer after layer.
fn report(
    of: &[&str],
    untouched: &[bool],
    without: &[Vec<bool>],
    heads: &[Vec<i64>],
) -> Result<Phenomena> {
    if of.is_empty() {
        return Err(Error::Nothing("no pair of sentences was given"));
    }
    let mut groups: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    of.iter().enumerate().for_each(|(pair, name)| groups.entry(name).or_default().push(pair));
    let all = [(ALL, (0..of.len()).collect::<Vec<usize>>())];
    let mut phenomena = Vec::new();
    for (name, pairs) in all.into_iter().chain(groups) {
        let pick =
            |right: &[bool]| -> Vec<bool> { pairs.iter().map(|&pair| right[pair]).collect() };
        let plain = pick(untouched);
        let n_right = plain.iter().filter(|right| **right).count() as u64;
        let compared: Vec<_> = without
            .iter()
            .map(|right| {
                compare_over_seeds(
                    &[pick(right)],
                    std::slice::from_ref(&plain),
                    CONFIDENCE,
                    N_RESAMPLES,
                    0,
                )
                .expect("as many on either side, and at least one")
            })
            .collect();
        let table = |of: &dyn Fn(usize) -> f64| {
            by_layer(&(0..compared.len()).map(of).collect::<Vec<_>>(), heads)
        };
        let intervals: Vec<Interval> = compared.iter().map(|one| one.interval).collect();
        phenomena.push(Phenomenon {
            phenomenon: name.to_owned(),
            n_pairs: pairs.len(),
            accuracy: n_right as f64 / pairs.len() as f64,
            interval_95: wilson(n_right, pairs.len() as u64, CONFIDENCE)
                .expect("a group has a pair"),
            effect: table(&|at| compared[at].difference),
            effect_interval_95: by_layer(&intervals, heads),
            mcnemar_p: table(&|at| compared[at].seeds[0].mcnemar_p),
        });
    }
    Ok(Phenomena { n_tested: without.len() * phenomena.len(), phenomena })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn effects_are_differences_on_the_same_pairs() {
        let of = ["b", "a", "b", "b", "a", "b"];
        let untouched = [true, true, true, false, false, true];
        // The first head hurts two of `b`, the second helps one of `a`.
        let without = vec![
            vec![false, true, false, false, false, true],
            vec![true, true, true, false, true, true],
        ];
        let found = report(&of, &untouched, &without, &[vec![2], vec![], vec![7]]).unwrap();
        assert_eq!(found.n_tested, 6);
        let of = |at: usize| &found.phenomena[at];
        let names: Vec<&str> = found.phenomena.iter().map(|one| one.phenomenon.as_str()).collect();
        assert_eq!(names, ["all", "a", "b"]);
        assert_eq!((of(1).n_pairs, of(1).accuracy, of(2).accuracy), (2, 0.5, 0.75));
        assert_eq!(of(2).effect, [vec![-0.5], vec![], vec![0.0]]);
        assert_eq!(of(1).effect, [vec![0.0], vec![], vec![0.5]]);
        // Two against none: 2 · (1/2)².
        assert_eq!((of(2).mcnemar_p[0][0], of(2).mcnemar_p[2][0]), (0.5, 1.0));
        let interval = of(2).effect_interval_95[0][0];
        assert!(interval.low < -0.5 && interval.high > -0.5 && interval.high <= 0.0);
    }
}
