//! Heads that look along syntactic relations.
//!
//! ```text
//! A(w → v) = mean over the tokens t of w of Σ over the tokens j of v of a_tj
//! right    = argmax_v≠w A(w → v) is a word that w stands in the relation with
//! ```
//!
//! Both ways: from a word to the one it hangs on, and from a word to any that hangs on it by the relation. Words and the
//! argmax as Clark et al. 2019, "What Does BERT Look At?", sections 4.1 and 4.2, <https://arxiv.org/abs/1906.04341> (their
//! second way turns the attention round instead). A head is syntactic where it is at least 10 points above the best
//! word at a fixed distance: Voita et al. 2019, "Analyzing Multi-Head Self-Attention", section 5.2,
//! <https://arxiv.org/abs/1905.09418>.
//!
//! Many heads are tried on many relations, so that the best of them is good by chance: head and distance are chosen on one
//! split and reported on another. Decoders are asked for words that lie before alone. Words with one word in sight are not
//! asked. Relations with few cases are left out. From a word several may be right, as of a list: a head that looks
//! anywhere is then right often, and a fixed distance is not; the accuracy of a word drawn at random is told beside.

use std::collections::{BTreeMap, BTreeSet};

use attn_core::Model;
use attn_data::{batch::Encoded, treebank::Tree};
use serde::Serialize;
use tch::{Device, Kind, Tensor};

use super::{CONFIDENCE, bounded, check_attention, means_over_tokens, numbers, weights_of};
use crate::{
    error::{Error, Result},
    heads::by_layer,
    language::N_RESAMPLES,
    rows::{Batching, Progress, for_each_batch},
    stats::{Interval, bootstrap_ratios},
};

/// Distances that the baseline chooses from, to either side.
const REACH: i64 = 10;

/// Cases that a relation must have in each split.
pub const MIN_CASES: usize = 50;

/// How far above the baseline a head is syntactic.
pub(crate) const MARGIN: f64 = 0.1;

/// Which word attends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// The one that the other hangs on.
    HeadToDependent,
    /// The one that hangs on the other.
    DependentToHead,
}

/// What [`syntax()`] found. Accuracies are shares of cases, intervals 95 % by the bootstrap over the test sentences that
/// have a case.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Syntax {
    /// Sentences that heads and distances were chosen on.
    pub n_validation: usize,
    /// Sentences that they are reported on.
    pub n_test: usize,
    /// Heads × relations × directions that were tried.
    pub n_tested: usize,
    /// Heads that are 10 points or more above the baseline in both splits, for some relation and direction.
    pub n_syntactic_heads: usize,
    /// By falling distance of the best head from the baseline.
    pub relations: Vec<Relation>,
}

/// A relation in one direction.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Relation {
    /// Its name in the treebank.
    pub relation: String,
    /// Which word attends.
    pub direction: Direction,
    /// Cases to choose by.
    pub n_cases_validation: usize,
    /// Cases to report on.
    pub n_cases: usize,
    /// The distance that is right most often in the validation cases: of the wanted word from the attending one.
    pub baseline_offset: i64,
    /// Its accuracy in the test cases.
    pub baseline: f64,
    /// That of a word drawn at random from those in sight: high where several words are right.
    pub chance: f64,
    /// Layer of the head that is right most often in the validation cases.
    pub layer: usize,
    /// Its number in the pretrained layer.
    pub head: i64,
    /// Its accuracy in the test cases.
    pub accuracy: f64,
    /// Of `accuracy`.
    pub interval_95: Interval,
    /// `accuracy` less `baseline`.
    pub above_baseline: f64,
    /// Of `above_baseline`, pairs drawn together.
    pub above_baseline_interval_95: Interval,
    /// Whether `above_baseline` is 0.1 or more.
    pub is_syntactic: bool,
    /// Layers × heads.
    pub accuracy_validation: Vec<Vec<f64>>,
    /// Layers × heads.
    pub accuracy_test: Vec<Vec<f64>>,
}

/// Finds the heads of `model` that look along the relations of `validation` and says how well they do on `test`.
///
/// # Errors
///
/// [`Error::Source`], [`Error::Nothing`] where no relation has [`MIN_CASES`], [`Error::NotFinite`], [`Error::Stopped`], and
/// what the model refuses.
pub fn syntax(
    model: &Model,
    validation: &[Tree],
    test: &[Tree],
    batching: &Batching,
    progress: &mut Progress<'_>,
) -> Result<Syntax> {
    check_attention(model, "syntax")?;
    let heads = numbers(model)?;
    if n_relations(validation, test, model.config().is_causal()) == 0 {
        return Err(Error::Nothing("no relation occurs 50 times in each split of the treebank"));
    }
    let chosen_on = tally(model, validation, batching, progress)?;
    let mut behind = |n_done| progress(validation.len() + n_done);
    let reported_on = tally(model, test, batching, &mut behind)?;
    let found = report(&chosen_on, &reported_on, &heads, model.config().is_causal());
    Ok(Syntax { n_validation: validation.len(), n_test: test.len(), ..found })
}

/// Relations and directions that have [`MIN_CASES`] in both splits.
pub fn n_relations(validation: &[Tree], test: &[Tree], causal: bool) -> usize {
    let count = |trees: &[Tree]| {
        let mut counts: BTreeMap<(String, Direction), usize> = BTreeMap::new();
        for tree in trees {
            for case in cases(&tree.heads, &tree.relations, causal) {
                *counts.entry((case.relation.to_owned(), case.direction)).or_default() += 1;
            }
        }
        counts.retain(|_, n| *n >= MIN_CASES);
        counts
    };
    let test = count(test);
    count(validation).keys().filter(|key| test.contains_key(key)).count()
}

/// A word that is asked, and the words that are right.
#[derive(Debug, PartialEq, Eq)]
struct Case<'a> {
    relation: &'a str,
    direction: Direction,
    word: usize,
    right: Vec<usize>,
}

fn cases<'a>(heads: &[Option<usize>], relations: &'a [String], causal: bool) -> Vec<Case<'a>> {
    let mut cases = Vec::new();
    let mut dependents: BTreeMap<(usize, &str), Vec<usize>> = BTreeMap::new();
    for (word, (head, relation)) in heads.iter().zip(relations).enumerate() {
        let Some(head) = *head else { continue };
        dependents.entry((head, relation.as_str())).or_default().push(word);
        let direction = Direction::DependentToHead;
        cases.push(Case { relation, direction, word, right: vec![head] });
    }
    let of_heads = dependents.into_iter().map(|((word, relation), right)| Case {
        relation,
        direction: Direction::HeadToDependent,
        word,
        right,
    });
    cases.extend(of_heads);
    if causal {
        for case in &mut cases {
            case.right.retain(|&right| right < case.word);
        }
    }
    let in_sight = |case: &Case<'_>| if causal { case.word } else { heads.len() - 1 };
    cases.retain(|case| !case.right.is_empty() && in_sight(case) > 1);
    cases
}

/// How often heads and distances are right, in a sentence.
#[derive(Debug, Clone, Default, PartialEq)]
struct Sentence {
    n: f64,
    /// Cases in which a word drawn at random is right.
    chance: f64,
    /// Cases in which each head is right.
    heads: Vec<f64>,
    /// Cases in which the word at each of [`offsets`] is right.
    offsets: Vec<f64>,
}

/// The sentences that have a case, of each relation and direction.
type Tally = BTreeMap<(String, Direction), Vec<Sentence>>;

fn offsets(causal: bool) -> Vec<i64> {
    let last = if causal { -1 } else { REACH };
    (-REACH..=last).filter(|&offset| offset != 0).collect()
}

fn tally(
    model: &Model,
    trees: &[Tree],
    batching: &Batching,
    progress: &mut Progress<'_>,
) -> Result<Tally> {
    let rows: Vec<Encoded> = trees.iter().map(|tree| tree.row.clone()).collect();
    let n_heads: usize = numbers(model)?.iter().map(Vec::len).sum();
    let causal = model.config().is_causal();
    let mut found: Vec<BTreeMap<(String, Direction), Sentence>> =
        vec![BTreeMap::new(); trees.len()];
    let batching = bounded(batching, &rows, n_heads);
    for_each_batch(model, &rows, &batching, progress, |positions, batch| {
        let layers: Vec<Tensor> = weights_of(model, &batch)?
            .into_iter()
            .filter(|weights| weights.size()[1] > 0)
            .collect();
        let weights = Tensor::cat(&layers, 1); // [b, all heads, n, n]
        for (row, &at) in positions.iter().enumerate() {
            let words = of_words(&weights.get(row as i64), &trees[at]);
            if !words.iter().flatten().flatten().all(|weight| weight.is_finite()) {
                return Err(Error::NotFinite { index: rows[at].index });
            }
            found[at] = judge(&words, &trees[at], causal);
        }
        Ok(())
    })?;
    // In the order of the sentences, whatever that of the batches.
    let mut tally = Tally::new();
    for (key, sentence) in found.into_iter().flatten() {
        tally.entry(key).or_default().push(sentence);
    }
    Ok(tally)
}

/// The attention between words, `[head][attending][attended]`. `weights`: `[h, n, n]`.
fn of_words(weights: &Tensor, tree: &Tree) -> Vec<Vec<Vec<f64>>> {
    let (n, n_words) = (weights.size()[2], tree.words.len() as i64);
    let of = |value: &dyn Fn(usize) -> f64| {
        let mut members = vec![0.0; (n_words * n) as usize];
        for (word, tokens) in tree.words.iter().enumerate() {
            tokens.clone().for_each(|at| members[word * n as usize + at] = value(tokens.len()));
        }
        let members = Tensor::from_slice(&members).view([n_words, n]);
        members.to_kind(weights.kind()).to_device(weights.device())
    };
    let (mean, sum) = (of(&|n_tokens| 1.0 / n_tokens as f64), of(&|_| 1.0));
    let words = mean.matmul(weights).matmul(&sum.transpose(0, 1)); // [h, w, w]
    let words = words.to_device(Device::Cpu).to_kind(Kind::Double).contiguous();
    Vec::try_from(words).expect("three axes of f64")
}

/// Which heads and which distances are right in each case of a sentence.
fn judge(
    words: &[Vec<Vec<f64>>],
    tree: &Tree,
    causal: bool,
) -> BTreeMap<(String, Direction), Sentence> {
    let offsets = offsets(causal);
    let mut found: BTreeMap<(String, Direction), Sentence> = BTreeMap::new();
    for Case { relation, direction, word, right } in cases(&tree.heads, &tree.relations, causal) {
        let of = found.entry((relation.to_owned(), direction)).or_default();
        of.n += 1.0;
        of.heads.resize(words.len(), 0.0);
        of.offsets.resize(offsets.len(), 0.0);
        let in_sight = if causal { word } else { tree.words.len() };
        let n_others = if causal { word } else { tree.words.len() - 1 };
        of.chance += right.len() as f64 / n_others as f64;
        for (sum, head) in of.heads.iter_mut().zip(words) {
            let others = || (0..in_sight).filter(|&other| other != word);
            let top = others().map(|at| head[word][at]).fold(f64::NEG_INFINITY, f64::max);
            let best: Vec<usize> = others().filter(|&at| head[word][at] == top).collect();
            let n_right = best.iter().filter(|at| right.contains(at)).count();
            *sum += n_right as f64 / best.len() as f64;
        }
        for (sum, offset) in of.offsets.iter_mut().zip(&offsets) {
            let at = word as i64 + offset;
            *sum += f64::from(right.iter().any(|&right| right as i64 == at));
        }
    }
    found
}

/// The first of the largest.
fn best(values: &[f64]) -> usize {
    (0..values.len())
        .rev()
        .max_by(|&a, &b| values[a].total_cmp(&values[b]))
        .expect("there are some")
}

fn report(chosen_on: &Tally, reported_on: &Tally, heads: &[Vec<i64>], causal: bool) -> Syntax {
    let n_of = |sentences: &[Sentence]| sentences.iter().map(|of| of.n).sum::<f64>();
    let accuracies = |sentences: &[Sentence], of: fn(&Sentence) -> &Vec<f64>| -> Vec<f64> {
        let column = |at: usize| sentences.iter().map(|one| of(one)[at]).sum::<f64>();
        (0..of(&sentences[0]).len()).map(|at| column(at) / n_of(sentences)).collect()
    };
    let places: Vec<(usize, i64)> = heads
        .iter()
        .enumerate()
        .flat_map(|(layer, of)| of.iter().map(move |&head| (layer, head)))
        .collect();
    let mut syntactic: BTreeSet<usize> = BTreeSet::new();
    let mut relations = Vec::new();
    for ((relation, direction), validation) in chosen_on {
        let Some(test) = reported_on.get(&(relation.clone(), *direction)) else { continue };
        let (n_cases_validation, n_cases) = (n_of(validation) as usize, n_of(test) as usize);
        if n_cases_validation.min(n_cases) < MIN_CASES {
            continue;
        }
        let [of_validation, of_test] =
            [validation, test].map(|sentences| accuracies(sentences, |one| &one.heads));
        let [baselines, on_test] =
            [validation, test].map(|sentences| accuracies(sentences, |one| &one.offsets));
        let (offset, head) = (best(&baselines), best(&of_validation));
        let baseline = on_test[offset];
        let is_above = |head: &usize| {
            of_validation[*head] - baselines[offset] >= MARGIN
                && of_test[*head] - baseline >= MARGIN
        };
        syntactic.extend((0..places.len()).filter(is_above));
        let n: Vec<f64> = test.iter().map(|one| one.n).collect();
        let right: Vec<Vec<f64>> = test.iter().map(|one| vec![one.heads[head]]).collect();
        let more: Vec<Vec<f64>> =
            test.iter().map(|one| vec![one.heads[head] - one.offsets[offset]]).collect();
        let (_, of_right) = means_over_tokens(&right, &n);
        let of_more = bootstrap_ratios(&more, &n, CONFIDENCE, N_RESAMPLES, 0)
            .expect("there are cases, and their numbers are finite");
        let above_baseline = of_test[head] - baseline;
        relations.push(Relation {
            relation: relation.clone(),
            direction: *direction,
            n_cases_validation,
            n_cases,
            baseline_offset: offsets(causal)[offset],
            baseline,
            chance: test.iter().map(|one| one.chance).sum::<f64>() / n_of(test),
            layer: places[head].0,
            head: places[head].1,
            accuracy: of_test[head],
            interval_95: of_right[0],
            above_baseline,
            above_baseline_interval_95: of_more[0],
            is_syntactic: above_baseline >= MARGIN,
            accuracy_validation: by_layer(&of_validation, heads),
            accuracy_test: by_layer(&of_test, heads),
        });
    }
    relations.sort_by(|a, b| b.above_baseline.total_cmp(&a.above_baseline));
    let n_tested = places.len() * relations.len();
    let n_syntactic_heads = syntactic.len();
    Syntax { n_validation: 0, n_test: 0, n_tested, n_syntactic_heads, relations }
}

#[cfg(test)]
mod tests {
    use attn_core::testing::randn;

    use super::*;

    /// A sentence of four words, the second of two tokens, the last of three, between special tokens.
    fn tree(heads: [usize; 4], relations: [&str; 4]) -> Tree {
        Tree {
            row: Encoded {
                ids: vec![0, 5, 6, 6, 7, 8, 8, 8, 1],
                label: None,
                index: 0,
                second_from: None,
            },
            words: vec![1..2, 2..4, 4..5, 5..8],
            heads: heads.map(|head| head.checked_sub(1)).to_vec(),
            relations: relations.map(str::to_owned).to_vec(),
        }
    }

    #[test]
    fn attention_between_words_is_summed_over_the_attended_and_averaged_over_the_attending() {
        let tree = tree([2, 0, 2, 3], ["a", "root", "b", "b"]);
        let weights = randn(1, &[2, 9, 9]).softmax(-1, Kind::Double);
        let found = of_words(&weights, &tree);
        for (head, found) in found.iter().enumerate() {
            for (w, from) in tree.words.iter().enumerate() {
                for (v, to) in tree.words.iter().enumerate() {
                    let mut expected = 0.0;
                    for t in from.clone() {
                        for j in to.clone() {
                            expected += weights.double_value(&[head as i64, t as i64, j as i64]);
                        }
                    }
                    expected /= from.len() as f64;
                    assert!((found[w][v] - expected).abs() < 1e-14, "{head} {w} {v}");
                }
            }
        }
    }

    #[test]
    fn cases_are_asked_both_ways_and_of_decoders_backwards_alone() {
        // 0 <-a- 1, 2 -b-> 1, 3 -b-> 1: the words 2 and 3 hang on 1 by b.
        let tree = tree([2, 0, 2, 2], ["a", "root", "b", "b"]);
        let of = |causal| -> Vec<(&str, Direction, usize, Vec<usize>)> {
            let cases = cases(&tree.heads, &tree.relations, causal);
            cases.into_iter().map(|c| (c.relation, c.direction, c.word, c.right)).collect()
        };
        use Direction::{DependentToHead, HeadToDependent};
        assert_eq!(
            of(false),
            [
                ("a", DependentToHead, 0, vec![1]),
                ("b", DependentToHead, 2, vec![1]),
                ("b", DependentToHead, 3, vec![1]),
                ("a", HeadToDependent, 1, vec![0]),
                ("b", HeadToDependent, 1, vec![2, 3]),
            ]
        );
        // Word 1 sees one word alone.
        assert_eq!(
            of(true),
            [("b", DependentToHead, 2, vec![1]), ("b", DependentToHead, 3, vec![1])]
        );
    }

    /// A head that looks from each word to the one it hangs on, nowhere where `spoilt`, and one that looks at the next word.
    fn words(tree: &Tree, spoilt: bool) -> Vec<Vec<Vec<f64>>> {
        let mut along = vec![vec![0.0; 4]; 4];
        for case in cases(&tree.heads, &tree.relations, false) {
            if case.direction == Direction::DependentToHead && !spoilt {
                along[case.word][case.right[0]] = 0.9;
            }
            along[case.word][case.word] = 1.0; // not looked at
        }
        let mut next = vec![vec![0.0; 4]; 4];
        (0..3).for_each(|at| next[at][at + 1] = 0.5);
        next[3][0] = 0.5;
        vec![along, next]
    }

    #[test]
    fn a_planted_head_is_found_above_the_baseline_and_reported_on_the_other_split() {
        // Of the words that hang by `b`, one hangs on the word before it, one on that before this.
        let tree = tree([2, 0, 2, 2], ["a", "root", "b", "b"]);
        let collect = |spoilt: fn(usize) -> bool| {
            let mut tally = Tally::new();
            for at in 0..60 {
                for (key, sentence) in judge(&words(&tree, spoilt(at)), &tree, false) {
                    tally.entry(key).or_default().push(sentence);
                }
            }
            tally
        };
        let found = report(&collect(|_| false), &collect(|at| at % 4 == 0), &[vec![0, 3]], false);
        let relation = |name: &str, direction| {
            let mut all = found.relations.iter();
            all.find(|one| one.relation == name && one.direction == direction).unwrap()
        };
        let b = relation("b", Direction::DependentToHead);
        assert_eq!((b.n_cases, b.n_cases_validation, b.layer, b.head), (120, 120, 0, 0));
        // -1 is right in one case of two, and so is -2, which is the first of them.
        assert_eq!((b.baseline_offset, b.baseline), (-2, 0.5));
        // A spoilt head has no largest weight: each of three other words counts a third.
        let expected = 0.75 + 0.25 / 3.0;
        assert!((b.accuracy - expected).abs() < 1e-12, "{b:?}");
        assert!(b.interval_95.low < expected && expected < b.interval_95.high);
        assert!(b.is_syntactic && b.accuracy_validation == [[1.0, 0.0]]);
        assert!((b.chance - 1.0 / 3.0).abs() < 1e-12);
        assert!((relation("b", Direction::HeadToDependent).chance - 2.0 / 3.0).abs() < 1e-12);
        // The next word is right of `a` always, and a distance says so as well.
        let a = relation("a", Direction::DependentToHead);
        assert_eq!((a.baseline_offset, a.baseline, a.accuracy_test[0][1]), (1, 1.0, 1.0));
        assert!(!a.is_syntactic);
        assert_eq!((found.n_tested, found.n_syntactic_heads), (2 * 4, 1));
    }
}
