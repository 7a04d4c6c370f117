//! WikiText as lm-evaluation-harness reads it: by page, its marks of tokenization undone.
//!
//! After its task `wikitext` (`lm_eval/tasks/wikitext/preprocess_wikitext.py`, version 2) and the data set
//! `EleutherAI/wikitext_document_level`, so that perplexities by word and byte can be compared.

/// The pages of running text, of which `lines` are the rows as the data set has them: an empty one is a blank line, of
/// which the file holds a space. A page begins with a heading of the first level, ` = Title = `, and ends before the line
/// break in front of the next one.
pub fn pages<'a>(lines: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    let whole: String =
        lines.into_iter().map(|line| if line.is_empty() { " \n" } else { line }).collect();
    let mut pages: Vec<Vec<&str>> = vec![Vec::new()];
    for line in whole.split('\n') {
        // Headings of lower levels have several marks a side.
        let plain = line.replace("= = =", "===").replace("= =", "==");
        let plain = plain.trim();
        if plain.starts_with("= ") && plain.ends_with(" =") {
            pages.push(Vec::new());
        }
        pages.last_mut().expect("there is a first page").push(line);
    }
    let joined = pages.iter().map(|lines| lines.join("\n"));
    joined.filter(|page| !page.trim().is_empty()).collect()
}

/// Words as the harness counts them: pieces between runs of white space, an empty one at either end included.
pub fn count_words(page: &str) -> usize {
    let is_space = char::is_whitespace;
    let ends = usize::from(page.starts_with(is_space)) + usize::from(page.ends_with(is_space));
    match page.split_whitespace().count() {
        0 => 1 + usize::from(!page.is_empty()),
        n => n + ends,
    }
}

/// Whether a text carries the marks that [`detokenize`] undoes.
pub fn is_tokenized(text: &str) -> bool {
    [" @-@ ", " @,@ ", " @.@ "].iter().any(|mark| text.contains(mark))
}

/// The text of a page as it would be written: no blanks before punctuation and inside of brackets and quotes.
///
/// The harness's rules in its order, but for one that matches nothing but slashes around an apostrophe
/// (`/' [0-9]/`, a pattern of another language).
pub fn detokenize(page: &str) -> String {
    let replace = |text: String, pairs: &[(&str, &str)]| {
        pairs.iter().fold(text, |text, (from, to)| text.replace(from, to))
    };
    let mut text = replace(
        page.to_owned(),
        &[
            ("s '", "s'"),
            (" @-@ ", "-"),
            (" @,@ ", ","),
            (" @.@ ", "."),
            (" : ", ": "),
            (" ; ", "; "),
            (" . ", ". "),
            (" ! ", "! "),
            (" ? ", "? "),
            (" , ", ", "),
        ],
    );
    for (open, close) in [('(', ')'), ('[', ']'), ('{', '}'), ('"', '"'), ('\'', '\'')] {
        text = trim_inside(&text, open, close);
    }
    replace(
        text,
        &[
            ("= = = =", "===="),
            ("= = =", "==="),
            ("= =", "=="),
            (" \u{b0} ", "\u{b0}"),
            (" \n", "\n"),
            ("\n ", "\n"),
            (" N ", " 1 "),
            (" 's", "'s"),
        ],
    )
}

/// Takes the white space from the inside of each `open` … `close`, of which the first `close` counts.
fn trim_inside(text: &str, open: char, close: char) -> String {
    let mut trimmed = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, behind)) = rest.split_once(open) {
        let Some((inside, after)) = behind.split_once(close) else { break };
        trimmed.push_str(before);
        trimmed.push(open);
        trimmed.push_str(inside.trim());
        trimmed.push(close);
        rest = after;
    }
    trimmed + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the harness's own function returns of the same text.
    #[test]
    fn marks_of_tokenization_are_undone() {
        let page = " = Well @-@ known = \n \n The cats ' 1 @,@ 200 ( or 3 @.@ 5 % ) \" toys \" , it said ; [ sic ] \n = = A = = \n \
                    It 's 5 \u{b0} C : N of ' them ' ! \n";
        assert_eq!(
            detokenize(page),
            " = Well-known =\n\nThe cats'1,200 (or 3.5 %) \"toys\", it said; [sic]\n== A ==\nIt's 5\u{b0}C: 1 of 'them'!\n"
        );
    }

    #[test]
    fn pages_begin_with_headings_of_the_first_level() {
        let rows =
            ["", " = One = \n", "", " text \n", " = = Part = = \n", "", " = Two = \n", " more \n"];
        let pages = pages(rows);
        assert_eq!(pages, [" = One = \n \n text \n = = Part = = \n ", " = Two = \n more \n"]);
        // re.split(r"\s+", page): '', '=', 'One', '=', 'text', '=', '=', 'Part', '=', '=', ''.
        assert_eq!(count_words(&pages[0]), 11);
        assert_eq!([count_words(""), count_words(" "), count_words("a")], [1, 2, 1]);
    }
}
