/// Red, green, blue.
pub type Color = [u8; 3];

/// The ground a picture is drawn on, and the colours that read well on it.
///
/// The series colours are those of Okabe and Ito, which people with any of the common colour vision deficiencies can
/// tell apart: <https://jfly.uni-koeln.de/color/>. Their order differs by theme, so that the first few stand out from
/// the ground.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Theme {
    /// Dark on white, for papers and README files.
    #[default]
    Light,
    /// Light on near-black, for slides and terminals.
    Dark,
}

const ORANGE: Color = [0xE6, 0x9F, 0x00];
const SKY: Color = [0x56, 0xB4, 0xE9];
const GREEN: Color = [0x00, 0x9E, 0x73];
const YELLOW: Color = [0xF0, 0xE4, 0x42];
const BLUE: Color = [0x00, 0x72, 0xB2];
const VERMILLION: Color = [0xD5, 0x5E, 0x00];
const PURPLE: Color = [0xCC, 0x79, 0xA7];

impl Theme {
    /// The colours of the series, in the order in which they are given out.
    pub const fn palette(self) -> &'static [Color] {
        match self {
            Self::Light => &[BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, [0x44, 0x44, 0x44]],
            Self::Dark => &[SKY, ORANGE, GREEN, PURPLE, YELLOW, VERMILLION, [0xCC, 0xCC, 0xCC]],
        }
    }

    /// The colour of series or bar number `index`; beyond the palette, colours repeat.
    pub fn color(self, index: usize) -> Color {
        self.palette()[index % self.palette().len()]
    }

    /// What the picture is drawn on.
    pub const fn ground(self) -> Color {
        match self {
            Self::Light => [0xFF, 0xFF, 0xFF],
            Self::Dark => [0x16, 0x18, 0x1C],
        }
    }

    /// Titles and values.
    pub(crate) const fn ink(self) -> Color {
        match self {
            Self::Light => [0x1A, 0x1A, 0x1A],
            Self::Dark => [0xF2, 0xF2, 0xF2],
        }
    }

    /// Tick labels, subtitles, axis lines.
    pub(crate) const fn muted(self) -> Color {
        match self {
            Self::Light => [0x55, 0x55, 0x55],
            Self::Dark => [0xB0, 0xB4, 0xBA],
        }
    }

    /// Grid lines.
    pub(crate) const fn grid(self) -> Color {
        match self {
            Self::Light => [0xE4, 0xE4, 0xE4],
            Self::Dark => [0x33, 0x37, 0x3D],
        }
    }

    /// Cells without a number: a grey that no colours of numbers have.
    pub(crate) const fn missing(self) -> Color {
        [0x8C, 0x8C, 0x8C]
    }

    /// `color` over the ground with the given opacity.
    pub(crate) fn washed(self, color: Color, opacity: f64) -> Color {
        let ground = self.ground();
        std::array::from_fn(|i| {
            (f64::from(color[i]) * opacity + f64::from(ground[i]) * (1. - opacity)).round() as u8
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Relative luminance, as the Web Content Accessibility Guidelines define it.
    fn luminance(color: Color) -> f64 {
        let linear = color.map(|c| {
            let c = f64::from(c) / 255.;
            if c <= 0.04045 { c / 12.92 } else { ((c + 0.055) / 1.055).powf(2.4) }
        });
        0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    }

    fn contrast(a: Color, b: Color) -> f64 {
        let (a, b) = (luminance(a), luminance(b));
        (a.max(b) + 0.05) / (a.min(b) + 0.05)
    }

    #[test]
    fn text_and_the_first_colours_stand_out_from_the_ground() {
        for theme in [Theme::Light, Theme::Dark] {
            assert!(contrast(theme.ink(), theme.ground()) > 12.);
            assert!(contrast(theme.muted(), theme.ground()) > 7.);
            for color in &theme.palette()[..3] {
                assert!(contrast(*color, theme.ground()) > 3., "{color:?}");
            }
        }
    }

    #[test]
    fn no_colour_is_given_twice() {
        for theme in [Theme::Light, Theme::Dark] {
            let palette = theme.palette();
            assert!((0..palette.len()).all(|i| !palette[..i].contains(&palette[i])));
        }
    }
}
