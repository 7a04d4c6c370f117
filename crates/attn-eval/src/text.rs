//! What generated text is like, from its tokens and letters alone.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

/// Figures of texts that a model wrote.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Wording {
    /// Mean over texts of the share of 4-grams that have occurred before in the same text: rep-4 of Welleck et al. 2019,
    /// <https://arxiv.org/abs/1908.04319>, section 6.
    pub rep_4: f64,
    /// Different unigrams of all texts together, as a share of all: distinct-1 of Li et al. 2016,
    /// <https://arxiv.org/abs/1510.03055>, section 5.
    pub distinct_1: f64,
    /// Of bigrams: distinct-2.
    pub distinct_2: f64,
    /// Of trigrams.
    pub distinct_3: f64,
}

impl Wording {
    /// Of texts as token ids, without their prompts; `None` where no text has four tokens.
    pub fn of<T: AsRef<[i64]>>(texts: &[T]) -> Option<Self> {
        let texts: Vec<&[i64]> = texts.iter().map(AsRef::as_ref).collect();
        let repeated: Vec<f64> = texts.iter().filter_map(|text| repetition(text, 4)).collect();
        let [distinct_1, distinct_2, distinct_3] = [1, 2, 3].map(|n| distinct(&texts, n));
        Some(Self {
            rep_4: (!repeated.is_empty())
                .then(|| repeated.iter().sum::<f64>() / repeated.len() as f64)?,
            distinct_1: distinct_1?,
            distinct_2: distinct_2?,
            distinct_3: distinct_3?,
        })
    }
}

/// The share of the n-grams of a text that have occurred before in it; `None` of a text shorter than n.
fn repetition(text: &[i64], n: usize) -> Option<f64> {
    let different: HashSet<&[i64]> = text.windows(n).collect();
    let count = text.windows(n).count();
    (count > 0).then(|| 1.0 - different.len() as f64 / count as f64)
}

/// Different n-grams of all texts together, as a share of all; `None` where there is none.
fn distinct(texts: &[&[i64]], n: usize) -> Option<f64> {
    let grams = || texts.iter().flat_map(|text| text.windows(n));
    let different: HashSet<&[i64]> = grams().collect();
    let count = grams().count();
    (count > 0).then(|| different.len() as f64 / count as f64)
}

/// What a text names: numbers, and words that begin with a capital and do not begin a sentence. Each once, in order.
///
/// A word is a run of letters, digits, hyphens and apostrophes. The first word of the text, and any after `.`, `!`, `?` or a
/// line break, begins a sentence; WikiText's ` = ` around headings does not. The English `I` is no name.
pub fn entities(text: &str) -> Vec<&str> {
    let is_inner = |c: char| c.is_alphanumeric() || c == '-' || c == '\'';
    let mut found: Vec<&str> = Vec::new();
    let mut begins = true;
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        if !first.is_alphanumeric() {
            begins |= matches!(first, '.' | '!' | '?' | '\n');
            rest = &rest[first.len_utf8()..];
            continue;
        }
        let end = rest.find(|c: char| !is_inner(c)).unwrap_or(rest.len());
        let word = rest[..end].trim_end_matches(['-', '\'']);
        let is_number = word.chars().all(|c| c.is_ascii_digit());
        let is_name = first.is_uppercase() && !begins && word != "I";
        if (is_number || is_name) && !found.contains(&word) {
            found.push(word);
        }
        // The dot of `3.5` and the comma of `1,024` end no sentence.
        rest = &rest[end..];
        let mut next = rest.chars();
        let is_inside_number = is_number
            && matches!(next.next(), Some('.' | ','))
            && next.next().is_some_and(|c| c.is_ascii_digit());
        if is_inside_number {
            rest = &rest[1..];
        }
        begins = false;
    }
    found
}

/// The share of what `prompt` names that `text` names again, as a word of its own, wherever in a sentence; `None` where the
/// prompt names nothing.
pub fn entities_kept(prompt: &str, text: &str) -> Option<f64> {
    let named = entities(prompt);
    let is_inner = |c: char| c.is_alphanumeric() || c == '-' || c == '\'';
    let words: HashSet<&str> =
        text.split(|c: char| !is_inner(c)).map(|word| word.trim_matches(['-', '\''])).collect();
    let n_kept = named.iter().filter(|name| words.contains(*name)).count();
    (!named.is_empty()).then(|| n_kept as f64 / named.len() as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repetition_and_variety_are_shares_of_n_grams() {
        // 4-grams of the first: 1234, 2341, 3412, 4123, 1234: one of five repeats; of the second none.
        let texts: [&[i64]; 2] = [&[1, 2, 3, 4, 1, 2, 3, 4], &[5, 6, 7, 8, 9]];
        let found = Wording::of(&texts).unwrap();
        assert!((found.rep_4 - 0.1).abs() < 1e-15, "{found:?}");
        assert!((found.distinct_1 - 9.0 / 13.0).abs() < 1e-15, "{found:?}");
        assert!((found.distinct_2 - 8.0 / 11.0).abs() < 1e-15, "{found:?}");
        assert!((found.distinct_3 - 7.0 / 9.0).abs() < 1e-15, "{found:?}");
        let stuck = Wording::of(&[vec![7i64; 20]]).unwrap();
        assert!((stuck.rep_4 - 16.0 / 17.0).abs() < 1e-15);
        assert_eq!(Wording::of(&[[1i64, 2]]), None);
    }

    #[test]
    fn names_and_numbers_are_found_and_first_words_are_not() {
        let text = "The song by Jean-Luc O'Neil reached number 3 in 1987 . In London I saw it. Paris was next, \
                    1,024 km off: Paris !";
        assert_eq!(
            entities(text),
            ["Jean-Luc", "O'Neil", "3", "1987", "London", "1", "024", "Paris"]
        );
        assert!(entities("Nothing here is named.").is_empty());
    }

    #[test]
    fn what_is_named_again_counts_once_wherever_it_stands() {
        let prompt = "He met Anna in Oslo in 1905 .";
        assert_eq!(entities_kept(prompt, "Oslo was cold. Anna left in 1906."), Some(2.0 / 3.0));
        assert_eq!(entities_kept(prompt, "Annabel of Osloville"), Some(0.0));
        assert_eq!(entities_kept("he went home .", "Anna"), None);
    }
}
