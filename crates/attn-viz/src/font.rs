//! The built-in font: how long a line is, and what it can show.

use std::sync::OnceLock;

use ttf_parser::Face;

use crate::Color;

/// How a piece of text looks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Font {
    /// Line height in pixels.
    pub(crate) size: f64,
    pub(crate) bold: bool,
    pub(crate) color: Color,
}

/// What a picture is drawn for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Medium {
    /// A viewer that may have glyphs that the built-in font lacks.
    Svg,
    /// Pixels, with the built-in font alone.
    Pixels,
}

/// Line height of DejaVu Sans, in em: 1901 units above the baseline and 483 below it, of 2048.
const LINE_HEIGHT: f64 = 2384. / 2048.;

/// Height of its capitals, in em.
const CAPITALS: f64 = 1493. / 2048.;

impl Font {
    /// Pixels of an em.
    pub(crate) fn em(self) -> f64 {
        self.size / LINE_HEIGHT
    }

    /// From the middle of the capitals down to the baseline.
    pub(crate) fn to_baseline(self) -> f64 {
        self.em() * CAPITALS / 2.
    }

    /// Pixels that `text` takes along its line.
    pub(crate) fn width_of(self, text: &str) -> f64 {
        text.chars().map(|c| self.advance(c)).sum()
    }

    fn advance(self, c: char) -> f64 {
        let face = &faces()[usize::from(self.bold)];
        // What another font draws is taken for as wide as it is high.
        let advance = face.glyph_index(c).and_then(|glyph| face.glyph_hor_advance(glyph));
        advance.map_or(1., |units| f64::from(units) / f64::from(face.units_per_em())) * self.em()
    }

    /// The beginning of `text` that, with an ellipsis, takes `width` pixels at most; all of it where that does.
    pub(crate) fn cut(self, text: &str, width: f64) -> String {
        if self.width_of(text) <= width {
            return text.to_owned();
        }
        let mut left = width - self.advance('\u{2026}');
        let fits = |c: &char| {
            left -= self.advance(*c);
            left >= 0.
        };
        let kept: String = text.chars().take_while(fits).collect();
        kept.trim_end().to_owned() + "\u{2026}"
    }
}

/// `text` with everything in it to be seen: line breaks and tabs as signs, and as its number what would steer the line instead
/// of standing in it, and what the medium has no glyph of.
pub(crate) fn shown(text: &str, medium: Medium) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\n' => shown.push('\u{21B5}'),
            '\t' => shown.push('\u{21E5}'),
            c if is_steering(c) || (medium == Medium::Pixels && !has_glyph(c)) => {
                shown.push_str(&format!("\u{27E8}{:04X}\u{27E9}", u32::from(c)));
            }
            c => shown.push(c),
        }
    }
    shown
}

/// Whether a character is no sign: controls, what is not to be in an XML file, marks of direction, joiners without width, and
/// what chooses between forms of the sign before it.
fn is_steering(c: char) -> bool {
    c.is_control()
        || matches!(
            c,
            '\u{AD}'
                | '\u{61C}'
                | '\u{180E}'
                | '\u{200B}'..='\u{200F}'
                | '\u{2028}'..='\u{202E}'
                | '\u{2060}'..='\u{206F}'
                | '\u{FE00}'..='\u{FE0F}'
                | '\u{FEFF}'
                | '\u{FFF0}'..='\u{FFFB}'
                | '\u{FFFE}'..='\u{FFFF}'
                | '\u{E0000}'..='\u{E0FFF}'
        )
}

fn has_glyph(c: char) -> bool {
    faces()[0].glyph_index(c).is_some()
}

/// Regular and bold.
fn faces() -> &'static [Face<'static>; 2] {
    static FACES: OnceLock<[Face<'static>; 2]> = OnceLock::new();
    FACES.get_or_init(|| {
        [dejavu::sans::regular(), dejavu::sans::bold()]
            .map(|bytes| Face::parse(bytes, 0).expect("the built-in font is a font"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_in_a_text_is_seen() {
        let shown = |text| super::shown(text, Medium::Pixels);
        assert_eq!(shown("a\nb\tc"), "a\u{21B5}b\u{21E5}c");
        assert_eq!(shown("\u{202E}evil\u{0}"), "\u{27E8}202E\u{27E9}evil\u{27E8}0000\u{27E9}");
        assert_eq!(
            shown("\u{5D0}\u{5D1} \u{441}"),
            "\u{5D0}\u{5D1} \u{441}",
            "Hebrew and Cyrillic are in the font"
        );
        assert_eq!(shown("\u{4E2D}\u{1F9EA}"), "\u{27E8}4E2D\u{27E9}\u{27E8}1F9EA\u{27E9}");
        assert_eq!(super::shown("\u{4E2D}\u{1F9EA}", Medium::Svg), "\u{4E2D}\u{1F9EA}");
        for sign in
            "\u{21B5}\u{21E5}\u{27E8}\u{27E9}\u{2026}\u{2212}\u{2581}\u{120}\u{D7}\u{3B1}\u{2016}"
                .chars()
        {
            assert!(has_glyph(sign), "{sign}");
        }
    }

    #[test]
    fn a_cut_line_fits() {
        let font = Font { size: 20., bold: false, color: [0; 3] };
        assert_eq!(font.cut("attention", 500.), "attention");
        for width in [20., 33., 47., 80.] {
            let cut = font.cut("attention to the past alone", width);
            assert!(font.width_of(&cut) <= width && cut.ends_with('\u{2026}'), "{cut}");
        }
    }
}
