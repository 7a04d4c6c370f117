//! Text in columns of a terminal: how many it takes, and lines of so many at most.

use unicode_width::UnicodeWidthStr;

/// Columns that `text` takes: two for most signs of Chinese, Japanese and Korean, and for pictures.
pub(crate) fn columns_of(text: &str) -> usize {
    text.width()
}

/// The beginning of `text` that, with an ellipsis, takes `n` columns at most; all of it where that does.
pub(crate) fn cut(text: &str, n: usize) -> String {
    if columns_of(text) <= n {
        return text.to_owned();
    }
    format!("{}\u{2026}", &text[..end_of(text, n.saturating_sub(1))])
}

/// Bytes of the longest beginning of `text` of at most `n` columns.
fn end_of(text: &str, n: usize) -> usize {
    let ends = text.char_indices().map(|(at, c)| at + c.len_utf8());
    ends.take_while(|&end| columns_of(&text[..end]) <= n).last().unwrap_or(0)
}

/// What stays together on a line.
#[derive(Debug, Clone)]
pub(crate) struct Piece {
    pub(crate) text: String,
    /// Without escapes.
    pub(crate) columns: usize,
    /// Columns between it and what stands before it on its line.
    pub(crate) gap: usize,
}

impl Piece {
    /// The words of `text`, each a piece; the first is `gap` columns from what is before.
    pub(crate) fn words(text: &str, gap: usize) -> Vec<Self> {
        let words = text.split(' ').filter(|word| !word.is_empty()).enumerate();
        words
            .map(|(i, word)| {
                let (text, gap) = (word.to_owned(), if i == 0 { gap } else { 1 });
                Self { columns: columns_of(&text), text, gap }
            })
            .collect()
    }
}

/// Lines of at most `n` columns; a piece that is longer by itself goes on in the next.
pub(crate) fn wrapped(pieces: &[Piece], n: usize) -> Vec<String> {
    let mut lines = Vec::new();
    let (mut line, mut taken) = (String::new(), 0);
    for piece in pieces {
        if taken > 0 && taken + piece.gap + piece.columns <= n {
            line += &" ".repeat(piece.gap);
            taken += piece.gap;
        } else if taken > 0 {
            lines.push(std::mem::take(&mut line));
            taken = 0;
        }
        let mut rest = &piece.text[..];
        let mut left = piece.columns;
        while left > n {
            let (start, end) = rest.split_at(end_of(rest, n).max(1));
            lines.push(start.to_owned());
            (rest, left) = (end, columns_of(end));
        }
        line += rest;
        taken += left;
    }
    if !line.is_empty() {
        lines.push(line);
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wide_signs_take_two_columns() {
        assert_eq!(["abc", "\u{4E2D}\u{6587}", "\u{1F98A}!"].map(columns_of), [3, 4, 3]);
        assert_eq!(cut("\u{4E2D}\u{6587}\u{5B57}", 6), "\u{4E2D}\u{6587}\u{5B57}");
        assert_eq!(cut("\u{4E2D}\u{6587}\u{5B57}", 5), "\u{4E2D}\u{6587}\u{2026}");
        assert_eq!(cut("\u{4E2D}\u{6587}\u{5B57}", 4), "\u{4E2D}\u{2026}");
    }

    #[test]
    fn nothing_is_lost_between_lines() {
        let text = "a few words and \u{1F98A}\u{1F98A}\u{1F98A}\u{1F98A}\u{1F98A}\u{1F98A} more";
        let lines = wrapped(&Piece::words(text, 0), 9);
        assert!(lines.iter().all(|line| columns_of(line) <= 9), "{lines:?}");
        assert_eq!(lines.concat().replace(' ', ""), text.replace(' ', ""));
        assert_eq!(lines[..2], ["a few", "words and"]);
    }
}
