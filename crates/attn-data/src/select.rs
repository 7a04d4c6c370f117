//! Which examples are used: a few per class, or all but a part that is held out.

use std::collections::{BTreeMap, HashMap, HashSet};

use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};

use crate::{
    batch::stream,
    error::{Error, Result},
};

/// Chooses `k` examples of each of `n_classes` classes.
///
/// The choice for a smaller `k` is a prefix of the choice for a larger one with the same seed, so that curves over `k`
/// differ by what was added and not by luck. Classes alternate in the result. Negative labels mean "no label" and are
/// never chosen.
///
/// # Errors
///
/// [`Error::TooFewExamples`] where a class has fewer than `k`, [`Error::NoLabels`] where no example has a label,
/// [`Error::Setting`] for `k = 0`.
pub fn few_shot(labels: &[i64], n_classes: usize, k: usize, seed: u64) -> Result<Vec<usize>> {
    if k == 0 {
        return Err(Error::Setting { name: "few_shot", value: "0".into(), expected: "at least 1" });
    }
    let mut classes = by_class(labels);
    classes.retain(|&class, _| class >= 0);
    if classes.is_empty() {
        return Err(Error::NoLabels { n_examples: labels.len() });
    }
    for class in 0..n_classes as i64 {
        classes.entry(class).or_default();
    }
    let fewest = classes.iter().min_by_key(|(_, rows)| rows.len());
    if let Some((&class, rows)) = fewest.filter(|(_, rows)| rows.len() < k) {
        return Err(Error::TooFewExamples { class, found: rows.len(), asked: k });
    }
    for (&class, rows) in &mut classes {
        rows.shuffle(&mut stream(seed, class as u64));
    }
    Ok((0..k).flat_map(|rank| classes.values().map(move |rows| rows[rank])).collect())
}

/// How much [`hold_out`] sets aside.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Part {
    /// This many examples.
    Count(usize),
    /// This share of the examples, between 0 and 1, rounded to the nearest number.
    Fraction(f64),
}

/// Sets a part of the examples aside: `(rest, held)`, both in ascending order.
///
/// Stratified: each class gives its share, rounded so that the total is exact (largest remainders first, the smaller
/// class on a tie). Unlabelled examples count as a class of their own.
///
/// # Errors
///
/// [`Error::HoldOut`] where nothing would be held out, or nothing left.
pub fn hold_out(labels: &[i64], part: Part, seed: u64) -> Result<(Vec<usize>, Vec<usize>)> {
    let n_examples = labels.len();
    let (n_held, asked) = match part {
        Part::Count(n) => (n, n.to_string()),
        Part::Fraction(share) if (0. ..=1.).contains(&share) => {
            ((share * n_examples as f64).round() as usize, format!("{share} (a share)"))
        }
        Part::Fraction(share) => {
            let reason = "expected a share between 0 and 1";
            return Err(Error::HoldOut { asked: share.to_string(), n_examples, reason });
        }
    };
    let refuse = |reason| Err(Error::HoldOut { asked: asked.clone(), n_examples, reason });
    if n_held == 0 {
        return refuse("that is none of them");
    }
    if n_held >= n_examples {
        return refuse("nothing would be left to train on");
    }

    let mut classes = by_class(labels);
    let share = |rows: &Vec<usize>| rows.len() as u128 * n_held as u128;
    let mut quotas: BTreeMap<i64, usize> = classes
        .iter()
        .map(|(&class, rows)| (class, (share(rows) / n_examples as u128) as usize))
        .collect();
    let mut by_remainder: Vec<i64> = classes.keys().copied().collect();
    by_remainder
        .sort_by_key(|class| std::cmp::Reverse(share(&classes[class]) % n_examples as u128));
    let n_short = n_held - quotas.values().sum::<usize>();
    for class in by_remainder.into_iter().take(n_short) {
        *quotas.entry(class).or_default() += 1;
    }

    let (mut rest, mut held) = (Vec::new(), Vec::new());
    for (class, rows) in &mut classes {
        rows.shuffle(&mut stream(seed ^ 0x686f_6c64, *class as u64));
        let (front, back) = rows.split_at(quotas[class]);
        held.extend_from_slice(front);
        rest.extend_from_slice(back);
    }
    rest.sort_unstable();
    held.sort_unstable();
    Ok((rest, held))
}

/// What [`hold_out_related`] made of the rows: each stands in one of the three lists, all in ascending order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Related {
    /// Rows to train on.
    pub rest: Vec<usize>,
    /// Sentences held out.
    pub held: Vec<usize>,
    /// Rows of neither: phrases of the sentences held out, and their repetitions.
    pub dropped: Vec<usize>,
    /// Sentences there are.
    pub n_sentences: usize,
}

/// A row of so few words says nothing of the sentences it stands in: `the film`.
const MIN_PHRASE: usize = 3;

/// Sets whole sentences aside, and their phrases with them, for data whose rows are phrases of each other.
///
/// A text is *contained* in another if its words are a stretch of the other's, and not all of them. Words are runs of
/// letters and digits in lower case, so that punctuation does not matter. A *sentence* is a row contained in no other;
/// of rows with the same words, the first. `part` of the sentences, stratified by class as by [`hold_out`], are held;
/// rows of at least three words contained in one of them are dropped, as are its repetitions. So no row of `rest` with
/// three words or more is part of a held sentence, and no held sentence is part of any row.
///
/// The train split of SST-2 is such data: 6,854 sentences among 67,349 rows. What is held out row by row has its own
/// parts in the rest, and looks seven points easier than sentences of other reviews. Groups of rows linked by
/// containment, directly or through others, would not do: 58,184 of its 58,598 distinct texts are one group (links
/// through words such as `the`), 4,313 still are with phrases of at least three words.
///
/// Takes time in proportion to the words there are and to the rows that begin with the same three.
///
/// # Errors
///
/// [`Error::HoldOut`] where nothing would be held out, or no sentence left; its count is that of sentences.
///
/// # Panics
///
/// If there are not as many labels as texts.
///
/// ```
/// use attn_data::select::{Part, hold_out_related};
///
/// let texts = ["A fine film, all in all.", "a fine film", "dull", "the plot is dull", "fine"];
/// let split = hold_out_related(&texts, &[1, 1, 0, 0, 1], Part::Count(1), 0)?;
/// assert_eq!(split.n_sentences, 2);
/// let plot = split.held == [3]; // or the other sentence, and its phrase of three words with it
/// assert_eq!(split.dropped, if plot { vec![] } else { vec![1] });
/// # Ok::<(), attn_data::Error>(())
/// ```
pub fn hold_out_related(
    texts: &[impl AsRef<str>],
    labels: &[i64],
    part: Part,
    seed: u64,
) -> Result<Related> {
    assert_eq!(texts.len(), labels.len(), "as many labels as texts");
    let n_rows = texts.len();
    let texts = Texts::new(texts.iter().map(AsRef::as_ref));
    let mut is_sentence: Vec<bool> = texts.words.iter().map(|words| !words.is_empty()).collect();
    for outer in 0..texts.words.len() {
        texts.for_each_contained(outer, |inner| is_sentence[inner] = false);
    }
    let sentences: Vec<usize> = (0..texts.words.len()).filter(|&text| is_sentence[text]).collect();

    let labels: Vec<i64> = sentences.iter().map(|&text| labels[texts.rows[text][0]]).collect();
    let (_, chosen) = hold_out(&labels, part, seed)?;
    let (mut held, mut gone) = (Vec::new(), HashSet::new());
    for text in chosen.into_iter().map(|at| sentences[at]) {
        held.push(texts.rows[text][0]);
        gone.insert(text);
        texts.for_each_contained(text, |inner| {
            if texts.words[inner].len() >= MIN_PHRASE {
                gone.insert(inner);
            }
        });
    }
    held.sort_unstable();
    let mut dropped: Vec<usize> =
        gone.iter().flat_map(|&text| &texts.rows[text]).copied().collect();
    dropped.sort_unstable();
    let rest = (0..n_rows).filter(|row| dropped.binary_search(row).is_err()).collect();
    dropped.retain(|row| held.binary_search(row).is_err());
    Ok(Related { rest, held, dropped, n_sentences: sentences.len() })
}

/// Distinct texts as numbered words, and where each begins.
struct Texts {
    /// By text, in the order of their first rows.
    words: Vec<Vec<u32>>,
    /// The rows of each text, ascending.
    rows: Vec<Vec<usize>>,
    /// Texts by their first words: [`MIN_PHRASE`], or all where there are fewer.
    by_start: HashMap<Vec<u32>, Vec<usize>>,
}

impl Texts {
    fn new<'a>(texts: impl Iterator<Item = &'a str>) -> Self {
        let mut vocab: HashMap<String, u32> = HashMap::new();
        let mut known: HashMap<Vec<u32>, usize> = HashMap::new();
        let mut out = Self { words: Vec::new(), rows: Vec::new(), by_start: HashMap::new() };
        for (row, text) in texts.enumerate() {
            let lower = text.to_lowercase();
            let words = lower.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty());
            let mut number = |word: &str| {
                let next = vocab.len() as u32;
                *vocab.entry(word.to_owned()).or_insert(next)
            };
            let words: Vec<u32> = words.map(&mut number).collect();
            let text = *known.entry(words.clone()).or_insert_with(|| {
                let start = words[..words.len().min(MIN_PHRASE)].to_vec();
                out.by_start.entry(start).or_default().push(out.words.len());
                out.words.push(words);
                out.rows.push(Vec::new());
                out.words.len() - 1
            });
            out.rows[text].push(row);
        }
        out
    }

    /// Calls `f` with every text contained in `outer`, perhaps more than once.
    fn for_each_contained(&self, outer: usize, mut f: impl FnMut(usize)) {
        let words = &self.words[outer];
        for begin in 0..words.len() {
            let rest = &words[begin..];
            for n in 1..=MIN_PHRASE.min(rest.len()) {
                for &inner in self.by_start.get(&rest[..n]).into_iter().flatten() {
                    if inner != outer && rest.starts_with(&self.words[inner]) {
                        f(inner);
                    }
                }
            }
        }
    }
}

fn by_class(labels: &[i64]) -> BTreeMap<i64, Vec<usize>> {
    let mut classes: BTreeMap<i64, Vec<usize>> = BTreeMap::new();
    for (row, &label) in labels.iter().enumerate() {
        classes.entry(label).or_default().push(row);
    }
    classes
}

#[cfg(test)]
mod tests {
    use rand::Rng;

    use super::*;

    fn labels() -> Vec<i64> {
        (0..1000).map(|i| if i % 10 == 0 { -1 } else { i64::from(i % 3 == 0) }).collect()
    }

    fn count(labels: &[i64], rows: &[usize], class: i64) -> usize {
        rows.iter().filter(|&&row| labels[row] == class).count()
    }

    #[test]
    fn each_class_gives_k_and_no_row_comes_twice() {
        let labels = labels();

        let chosen = few_shot(&labels, 2, 8, 3).unwrap();

        assert_eq!(
            (count(&labels, &chosen, 0), count(&labels, &chosen, 1), chosen.len()),
            (8, 8, 16)
        );
        assert_eq!(chosen.iter().collect::<HashSet<_>>().len(), 16);
    }

    #[test]
    fn fewer_shots_are_a_prefix_of_more() {
        let labels = labels();
        let (few, many) =
            (few_shot(&labels, 2, 8, 5).unwrap(), few_shot(&labels, 2, 32, 5).unwrap());

        assert_eq!(few, many[..16]);
        assert_ne!(few, few_shot(&labels, 2, 8, 6).unwrap());
    }

    #[test]
    fn too_few_examples_name_the_class() {
        let error = few_shot(&[0, 0, 0, 1], 2, 2, 0).unwrap_err();

        assert_eq!(
            error.to_string(),
            "class 1 has 1 labelled examples, fewer than the 2 per class asked for\nhint: ask for at most 1"
        );
        let absent = few_shot(&[0, 0, 1], 3, 2, 0).unwrap_err();
        assert_eq!(
            absent.to_string(),
            "class 2 has 0 labelled examples, fewer than the 2 per class asked for\nhint: leave the class out of \
             `data.classes`"
        );
        assert!(matches!(few_shot(&[-1, -1], 2, 1, 0), Err(Error::NoLabels { n_examples: 2 })));
        assert!(matches!(few_shot(&[0], 1, 0, 0), Err(Error::Setting { .. })));
    }

    #[test]
    fn a_held_out_part_is_exact_and_stratified() {
        let labels = labels();

        let (rest, held) = hold_out(&labels, Part::Count(101), 9).unwrap();

        assert_eq!((rest.len(), held.len()), (899, 101));
        let mut all = [rest, held.clone()].concat();
        all.sort_unstable();
        assert_eq!(all, (0..1000).collect::<Vec<_>>());
        for class in [-1, 0, 1] {
            let (of_all, of_held) =
                (count(&labels, &all, class) as f64, count(&labels, &held, class) as f64);
            assert!((of_held - of_all * 0.101).abs() < 1., "class {class}: {of_held} of {of_all}");
        }
    }

    #[test]
    fn a_fraction_and_its_count_choose_the_same() {
        let labels = labels();

        assert_eq!(
            hold_out(&labels, Part::Fraction(0.05), 1).unwrap(),
            hold_out(&labels, Part::Count(50), 1).unwrap()
        );
        assert_ne!(
            hold_out(&labels, Part::Count(50), 2).unwrap(),
            hold_out(&labels, Part::Count(50), 1).unwrap()
        );
    }

    #[test]
    fn holding_out_nothing_or_everything_is_refused() {
        for part in [
            Part::Count(0),
            Part::Count(4),
            Part::Fraction(0.),
            Part::Fraction(1.),
            Part::Fraction(f64::NAN),
        ] {
            assert!(
                matches!(hold_out(&[0, 1, 0, 1], part, 0), Err(Error::HoldOut { .. })),
                "{part:?}"
            );
        }
    }

    /// Texts of few different words, so that many are contained in others.
    fn phrases(n: usize, seed: u64) -> Vec<String> {
        let mut rng = stream(seed, 0);
        let words = ["a", "B", "c!"];
        let mut phrase = || {
            let n_words = rng.random_range(0..9);
            (0..n_words)
                .map(|_| words[rng.random_range(0..words.len())])
                .collect::<Vec<_>>()
                .join(" ")
        };
        (0..n).map(|_| phrase()).collect()
    }

    /// The definition: the words of `inner` stand in `outer`, which has others beside them.
    fn contains(outer: &str, inner: &str) -> bool {
        let padded = |text: &str| {
            let text = text.to_lowercase().replace('!', "");
            format!(" {} ", text.split_whitespace().collect::<Vec<_>>().join(" "))
        };
        let (outer, inner) = (padded(outer), padded(inner));
        !inner.trim().is_empty() && outer != inner && outer.contains(&inner)
    }

    #[test]
    fn contained_texts_are_those_of_the_definition() {
        for seed in 0..20 {
            let all = phrases(60, seed);
            let texts = Texts::new(all.iter().map(String::as_str));
            let first = |text: usize| all[texts.rows[text][0]].as_str();
            for outer in 0..texts.words.len() {
                let mut found = HashSet::new();
                texts.for_each_contained(outer, |inner| {
                    found.insert(inner);
                });

                let expected: HashSet<usize> = (0..texts.words.len())
                    .filter(|&inner| contains(first(outer), first(inner)))
                    .collect();
                assert_eq!(found, expected, "{:?}", first(outer));
            }
        }
    }

    #[test]
    fn no_phrase_of_a_held_sentence_is_left_to_train_on() {
        let n_words = |text: &str| text.split_whitespace().count();
        let mut n_dropped = 0;
        for seed in 0..20 {
            let texts = phrases(80, seed);
            let labels: Vec<i64> = (0..80).map(|row| row % 2).collect();

            let split = hold_out_related(&texts, &labels, Part::Count(4), seed).unwrap();

            let Related { rest, held, dropped, n_sentences } = &split;
            let mut all = [&rest[..], held, dropped].concat();
            all.sort_unstable();
            assert_eq!(all, (0..80).collect::<Vec<_>>());
            assert_eq!(held.len(), 4);
            assert!(*n_sentences >= 4);
            for &sentence in held {
                for (row, text) in texts.iter().enumerate() {
                    assert!(!contains(text, &texts[sentence]), "a sentence is part of no row");
                    if contains(&texts[sentence], text) && n_words(text) >= MIN_PHRASE {
                        assert!(dropped.contains(&row), "{text:?} of {:?}", texts[sentence]);
                    }
                }
            }
            for &row in dropped {
                let is_phrase = |&sentence: &usize| contains(&texts[sentence], &texts[row]);
                let is_same = |&sentence: &usize| {
                    contains(&format!("{} x", texts[sentence]), &texts[row])
                        && contains(&format!("{} x", texts[row]), &texts[sentence])
                };
                let (phrase, same) = (held.iter().any(is_phrase), held.iter().any(is_same));
                assert!(phrase || same, "{:?} is nobody's phrase", texts[row]);
            }
            n_dropped += dropped.len();
            assert_eq!(split, hold_out_related(&texts, &labels, Part::Count(4), seed).unwrap());
        }
        assert!(n_dropped > 100, "{n_dropped}: these texts test nothing");
    }

    #[test]
    fn repetitions_of_a_held_sentence_are_not_trained_on() {
        let texts = ["one fine film", "One fine film!", "one dull film", "One dull film."];

        let split = hold_out_related(&texts, &[1, 1, 0, 0], Part::Count(1), 0).unwrap();

        let (held, other) = if split.held == [0] { (0, 2) } else { (2, 0) };
        assert_eq!((split.held, split.dropped), (vec![held], vec![held + 1]));
        assert_eq!((split.rest, split.n_sentences), (vec![other, other + 1], 2));
    }

    #[test]
    fn more_sentences_than_there_are_is_refused() {
        let error = hold_out_related(&["a b c", "a b", "b"], &[0, 1, 0], Part::Count(1), 0);

        assert!(matches!(error, Err(Error::HoldOut { n_examples: 1, .. })), "{error:?}");
    }

    #[test]
    fn a_part_reads_as_a_number() {
        assert_eq!(serde_json::from_str::<Part>("200").unwrap(), Part::Count(200));
        assert_eq!(serde_json::from_str::<Part>("0.1").unwrap(), Part::Fraction(0.1));
    }
}
