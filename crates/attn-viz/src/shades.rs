//! Numbers as colours.

use std::sync::OnceLock;

use oklab::{Oklab, Rgb, oklab_to_srgb, srgb_to_oklab};

use crate::{Color, Theme};

/// Colours from the lowest value to the highest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Shades {
    /// Viridis, from dark to bright: steps look alike, also to the colour-blind, and their order survives a grey print. Smith and van der
    /// Walt 2015, <https://bids.github.io/colormap/>.
    #[default]
    Viridis,
    /// Blue below zero and orange above it, the ground's colour at zero: for differences. Each arm is a straight line in Oklab (Ottosson
    /// 2020, <https://bottosson.github.io/posts/oklab/>), so that equal steps look alike; blue and orange are told apart with any of the
    /// common colour vision deficiencies. The range is made symmetric.
    Diverging,
    /// Red, amber, green: bad to good, as pictures of needles in haystacks have it.
    TrafficLight,
}

/// The stops of [`Shades::TrafficLight`], evenly apart: those of <https://github.com/gkamradt/LLMTest_NeedleInAHaystack>.
const TRAFFIC_LIGHT: [Color; 3] = [[0xF0, 0x49, 0x6E], [0xEB, 0xB8, 0x39], [0x0C, 0xD7, 0x9F]];

/// The ends of [`Shades::Diverging`], equally light.
const ENDS: [Color; 2] = [[0x1D, 0x5C, 0xA8], [0x94, 0x3F, 0x00]];

/// Colours that are worked out once: more steps than a screen shows.
const STEPS: usize = 1024;

impl Shades {
    /// The colour of `fraction` (0 to 1) of the range; what lies beyond is drawn as its end.
    pub fn color(self, fraction: f64, theme: Theme) -> Color {
        let fraction = fraction.clamp(0., 1.);
        let step = (fraction * (STEPS - 1) as f64).round() as usize;
        match self {
            Self::Viridis => viridis()[step],
            Self::Diverging => diverging(theme)[step],
            Self::TrafficLight => {
                let (from, to) = if fraction < 0.5 { (0, 1) } else { (1, 2) };
                let share = 2. * fraction - from as f64;
                let [from, to] = [from, to].map(|stop: usize| TRAFFIC_LIGHT[stop]);
                std::array::from_fn(|i| {
                    (f64::from(from[i]) * (1. - share) + f64::from(to[i]) * share).round() as u8
                })
            }
        }
    }

    /// Which of several values is shown where there is room for one.
    pub(crate) fn kept(self) -> &'static str {
        match self {
            Self::Diverging => "farthest from zero",
            Self::Viridis | Self::TrafficLight => "largest",
        }
    }

    /// The range of values that the colours span, of those that there are.
    pub(crate) fn range(self, (low, high): (f64, f64)) -> (f64, f64) {
        match self {
            Self::Diverging => {
                let most = low.abs().max(high.abs());
                let most = if most == 0. { 1. } else { most };
                (-most, most)
            }
            Self::Viridis | Self::TrafficLight => (low, high),
        }
    }
}

/// The colours of [`Shades::Viridis`].
fn viridis() -> &'static [Color] {
    static MADE: OnceLock<Vec<Color>> = OnceLock::new();
    let color = |step: usize| {
        colorous::VIRIDIS.eval_continuous(step as f64 / (STEPS - 1) as f64).into_array()
    };
    MADE.get_or_init(|| (0..STEPS).map(color).collect())
}

/// The colours of [`Shades::Diverging`] on this ground.
fn diverging(theme: Theme) -> &'static [Color] {
    static LIGHT: OnceLock<Vec<Color>> = OnceLock::new();
    static DARK: OnceLock<Vec<Color>> = OnceLock::new();
    let (made, zero, ends) = match theme {
        Theme::Light => (&LIGHT, [0xF7; 3], ENDS),
        // Brighter away from a dark ground.
        Theme::Dark => (&DARK, [0x24, 0x27, 0x2C], [[0x7F, 0xB8, 0xF5], [0xF2, 0xA2, 0x4E]]),
    };
    made.get_or_init(|| {
        let [below, above] = ends;
        let color = |step: usize| {
            let at = 2. * step as f64 / (STEPS - 1) as f64 - 1.;
            between(zero, if at < 0. { below } else { above }, at.abs())
        };
        (0..STEPS).map(color).collect()
    })
}

/// The colour a share of the way from one to another, as straight as the eye sees it.
fn between(from: Color, to: Color, share: f64) -> Color {
    let [from, to] = [from, to].map(|[r, g, b]| srgb_to_oklab(Rgb { r, g, b }));
    let mix = |from: f32, to: f32| from + (to - from) * share as f32;
    let Rgb { r, g, b } =
        oklab_to_srgb(Oklab { l: mix(from.l, to.l), a: mix(from.a, to.a), b: mix(from.b, to.b) });
    [r, g, b]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lab([r, g, b]: Color) -> [f64; 3] {
        let Oklab { l, a, b } = srgb_to_oklab(Rgb { r, g, b });
        [l, a, b].map(f64::from)
    }

    fn distance(a: Color, b: Color) -> f64 {
        let (a, b) = (lab(a), lab(b));
        (0..3).map(|i| (a[i] - b[i]).powi(2)).sum::<f64>().sqrt()
    }

    #[test]
    fn a_traffic_light_goes_through_its_stops() {
        let color = |fraction| Shades::TrafficLight.color(fraction, Theme::Light);
        assert_eq!([0., 0.5, 1.].map(color), TRAFFIC_LIGHT);
        assert_eq!(color(0.25), [238, 129, 84], "half way from red to amber");
        assert_eq!(color(7.), TRAFFIC_LIGHT[2]);
    }

    /// Each of 16 steps is as large as another to a tenth, and lightness goes one way along each arm.
    #[test]
    fn equal_steps_look_alike() {
        for theme in [Theme::Light, Theme::Dark] {
            let colors: Vec<Color> =
                (0..=16).map(|i| Shades::Diverging.color(f64::from(i) / 16., theme)).collect();
            for arm in [&colors[..9], &colors[8..]] {
                let steps: Vec<f64> = arm.windows(2).map(|two| distance(two[0], two[1])).collect();
                let mean = steps.iter().sum::<f64>() / steps.len() as f64;
                assert!(steps.iter().all(|step| (step / mean - 1.).abs() < 0.1), "{steps:?}");
                let light: Vec<f64> = arm.iter().map(|color| lab(*color)[0]).collect();
                assert!(light.is_sorted() || light.iter().rev().is_sorted(), "{light:?}");
            }
            let [low, high] = [colors[0], colors[16]].map(|color| lab(color)[0]);
            assert!((low - high).abs() < 0.04, "equally far from zero in lightness: {low} {high}");
        }
        let viridis: Vec<Color> =
            (0..=16).map(|i| Shades::Viridis.color(f64::from(i) / 16., Theme::Light)).collect();
        assert!(viridis.is_sorted_by(|a, b| lab(*a)[0] < lab(*b)[0]));
    }

    /// With the cones of one kind missing (Machado, Oliveira, Fernandes 2009, severity 1; in linear light), the two arms and their
    /// order are still told apart.
    #[test]
    fn the_colour_blind_see_which_side_of_zero_a_value_is_on() {
        const KINDS: [[[f64; 3]; 3]; 3] = [
            [
                [0.152286, 1.052583, -0.204868],
                [0.114503, 0.786281, 0.099216],
                [-0.003882, -0.048116, 1.051998],
            ],
            [
                [0.367322, 0.860646, -0.227968],
                [0.280085, 0.672501, 0.047413],
                [-0.011820, 0.042940, 0.968881],
            ],
            [
                [1.255528, -0.076749, -0.178779],
                [-0.078411, 0.930809, 0.147602],
                [0.004733, 0.691367, 0.303900],
            ],
        ];
        let seen = |color: Color, kind: &[[f64; 3]; 3]| -> Color {
            let linear = color.map(|c| {
                let c = f64::from(c) / 255.;
                if c <= 0.04045 { c / 12.92 } else { ((c + 0.055) / 1.055).powf(2.4) }
            });
            std::array::from_fn(|i| {
                let c: f64 = (0..3).map(|j| kind[i][j] * linear[j]).sum::<f64>().clamp(0., 1.);
                let c = if c <= 0.0031308 { 12.92 * c } else { 1.055 * c.powf(1. / 2.4) - 0.055 };
                (255. * c).round() as u8
            })
        };
        for theme in [Theme::Light, Theme::Dark] {
            for kind in &KINDS {
                for share in [0.25, 0.5] {
                    let [below, above] = [0.5 - share, 0.5 + share]
                        .map(|at| seen(Shades::Diverging.color(at, theme), kind));
                    assert!(
                        distance(below, above) > 0.08,
                        "{theme:?} {share}: {below:?} {above:?}"
                    );
                }
            }
        }
    }
}
