//! How much of an expected answer a text says.

use std::collections::HashMap;

/// ROUGE-1 recall: the share of the words of `reference` that `response` has, each as often as it has it.
///
/// ```text
/// Σ_w min(count_reference(w), count_response(w)) / Σ_w count_reference(w)
/// ```
///
/// Lin 2004, "ROUGE", <https://aclanthology.org/W04-1013/>, section 2. Words are runs of letters and digits in small letters.
/// No word is cut to its stem, as the needle tests of others do it, so that `broke` is not `broken`.
///
/// 0 to 1; `None` where `reference` has no word.
pub fn rouge1_recall(reference: &str, response: &str) -> Option<f64> {
    let (reference, response) = (words(reference), words(response));
    let mut left: HashMap<&str, usize> = HashMap::new();
    response.iter().for_each(|word| *left.entry(word).or_default() += 1);
    let mut found = |word: &String| match left.get_mut(word.as_str()) {
        Some(n) if *n > 0 => {
            *n -= 1;
            true
        }
        _ => false,
    };
    let n_found = reference.iter().filter(|word| found(word)).count();
    (!reference.is_empty()).then(|| n_found as f64 / reference.len() as f64)
}

/// Whether `response` says `reference` word for word: its words one after another, whatever stands around them. Words are
/// those of [`rouge1_recall`].
pub fn says(reference: &str, response: &str) -> bool {
    let (reference, response) = (words(reference), words(response));
    !reference.is_empty() && response.windows(reference.len()).any(|run| run == reference)
}

fn words(text: &str) -> Vec<String> {
    let runs = text.split(|c: char| !c.is_alphanumeric());
    runs.filter(|run| !run.is_empty()).map(str::to_lowercase).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recall_counts_each_word_as_often_as_both_have_it() {
        let of = |reference, response| rouge1_recall(reference, response).unwrap();
        assert_eq!(of("Eat a sandwich, in a park.", "a park in the sun: a SANDWICH"), 5.0 / 6.0);
        assert_eq!(of("the the the", "the cat and the dog"), 2.0 / 3.0);
        assert_eq!(of("12345", "The pass key is 12345."), 1.0);
        assert_eq!(of("12345", "123456"), 0.0);
        assert_eq!(of("can't", "can t"), 1.0);
        assert_eq!(of("a", ""), 0.0);
        assert_eq!(rouge1_recall(" .", "a"), None);
    }

    #[test]
    fn an_answer_is_said_where_its_words_stand_together() {
        assert!(says("eat a Sandwich", "The best thing is to eat a sandwich."));
        assert!(!says("eat a sandwich", "a sandwich eat"));
        assert!(!says("eat a sandwich", "eat a big sandwich"));
        assert!(!says(" ", "a"));
    }
}
