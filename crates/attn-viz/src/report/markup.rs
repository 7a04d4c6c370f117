//! Text of others in a page: never markup, and all of it to be seen.

use serde::Serialize;

use crate::font::{Medium, shown};

/// `text` on one line.
pub(super) fn line(text: &str) -> String {
    escaped(&shown(text, Medium::Svg))
}

/// `text` with its line breaks and tabs as they are.
pub(super) fn lines(text: &str) -> String {
    let tabs = |text: &str| text.split('\t').map(line).collect::<Vec<_>>().join("\t");
    text.split('\n').map(tabs).collect::<Vec<_>>().join("\n")
}

/// `text` between tags, or between the double quotes of an attribute.
fn escaped(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '&' => safe.push_str("&amp;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            c => safe.push(c),
        }
    }
    safe
}

/// JSON that can stand in a `<script>`: nothing in it ends the element, begins a comment, or breaks a line of a script.
pub(super) fn json_text(value: &impl Serialize) -> String {
    let json = serde_json::to_string(value).expect("plain structs have a JSON");
    let mut safe = String::with_capacity(json.len());
    for c in json.chars() {
        match c {
            // Outside of strings JSON has none of these, and within them their numbers say the same.
            '<' | '>' | '&' | '\u{2028}' | '\u{2029}' => {
                safe.push_str(&format!("\\u{:04x}", u32::from(c)));
            }
            c => safe.push(c),
        }
    }
    safe
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVIL: &str = "</script><img src=x onerror=\"alert('1')\">&amp;<!--";

    #[test]
    fn markup_is_text() {
        let safe = line(EVIL);
        assert!(!safe.contains(['<', '>', '"', '\'']), "{safe}");
        assert!(safe.ends_with("&amp;amp;&lt;!--"), "{safe}");
    }

    #[test]
    fn what_steers_a_line_stands_as_its_number() {
        assert_eq!(
            line("a\u{202E}b\n\u{2066}"),
            "a\u{27E8}202E\u{27E9}b\u{21B5}\u{27E8}2066\u{27E9}"
        );
        assert_eq!(lines("a\tb\n\u{200F}"), "a\tb\n\u{27E8}200F\u{27E9}");
    }

    #[test]
    fn json_ends_no_script_and_says_the_same() {
        let text = format!("{EVIL}\u{2028}\u{2029}\u{0}\\");
        let safe = json_text(&[&text]);
        assert!(!safe.contains(['<', '>', '&', '\u{2028}', '\u{2029}']), "{safe}");
        assert_eq!(serde_json::from_str::<Vec<String>>(&safe).unwrap(), [text]);
    }
}
