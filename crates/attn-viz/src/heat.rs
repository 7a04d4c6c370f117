//! Numbers of two labels as colours: who attends to whom.

use image::RgbImage;
use plotters::style::colors::colormaps::{ColorMap, ViridisRGB};

use crate::canvas::{Align, Font, Pen, paint};
use crate::error::finite;
use crate::scale::Scale;
use crate::{Color, Error, Picture, Size, Theme};

/// A cell for each pair of a row and a column, from dark (low) to bright (high): viridis, unless [`Shades`] say otherwise.
/// Smith and van der Walt 2015, <https://bids.github.io/colormap/>.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct HeatMap {
    /// What the picture shows; empty for none.
    pub title: String,
    /// A smaller line below the title, for the conditions; empty for none.
    pub subtitle: String,
    /// What the columns are; empty for none.
    pub x_label: String,
    /// What the rows are; empty for none.
    pub y_label: String,
    /// What the values are, with their unit, beside the colours.
    pub value_label: String,
    /// Names of the columns from left to right; some are left out where they do not fit.
    pub columns: Vec<String>,
    /// Names of the rows from top to bottom.
    pub rows: Vec<String>,
    /// `values[row][column]`.
    pub values: Vec<Vec<f64>>,
    /// The values of the darkest and the brightest colour; those of the lowest and the highest value where absent. Values
    /// beyond are drawn as these.
    pub range: Option<(f64, f64)>,
    /// The colours of the values.
    pub shades: Shades,
    /// The ground and its colours.
    pub theme: Theme,
    /// Pixels.
    pub size: Size,
}

/// Colours from the lowest value to the highest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Shades {
    /// Viridis: steps look alike, and their order survives a grey print.
    #[default]
    Viridis,
    /// Red, amber, green: bad to good, as pictures of needles in haystacks have it.
    TrafficLight,
}

/// The stops of [`Shades::TrafficLight`], evenly apart: those of <https://github.com/gkamradt/LLMTest_NeedleInAHaystack>.
const TRAFFIC_LIGHT: [Color; 3] = [[0xF0, 0x49, 0x6E], [0xEB, 0xB8, 0x39], [0x0C, 0xD7, 0x9F]];

impl Shades {
    /// The colour of `fraction` (0 to 1) of the range.
    fn color(self, fraction: f64) -> Color {
        let fraction = fraction.clamp(0., 1.);
        match self {
            Self::Viridis => {
                let plotters::style::RGBColor(r, g, b) = ViridisRGB.get_color(fraction);
                [r, g, b]
            }
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
}

/// Share of the picture that the names of the rows, or of the columns, may take.
const NAMES: f64 = 0.25;

impl Picture for HeatMap {
    fn render(&self) -> Result<RgbImage, Error> {
        let range = self.check()?;
        paint(self.size, self.theme.ground(), |pen| self.draw(pen, range))
    }
}

impl HeatMap {
    /// Checks every number and finds the range of the colours.
    fn check(&self) -> Result<(f64, f64), Error> {
        let chart = || format!("heat map `{}`", self.title);
        for (names, expected) in [(&self.rows, "row"), (&self.columns, "column")] {
            if names.is_empty() {
                return Err(Error::Empty { place: chart(), expected });
            }
        }
        let ragged = self.values.iter().find(|row| row.len() != self.columns.len());
        if self.values.len() != self.rows.len() || ragged.is_some() {
            return Err(Error::Cells {
                place: chart(),
                expected: (self.rows.len(), self.columns.len()),
                found: (self.values.len(), ragged.or(self.values.first()).map_or(0, Vec::len)),
            });
        }
        let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
        for (name, row) in self.rows.iter().zip(&self.values) {
            for (column, &value) in self.columns.iter().zip(row) {
                finite(value, || format!("row `{name}`, column `{column}` of {}", chart()))?;
                (low, high) = (low.min(value), high.max(value));
            }
        }
        let Some((low, high)) = self.range else { return Ok((low, high)) };
        for bound in [low, high] {
            finite(bound, || format!("range of {}", chart()))?;
        }
        if low >= high {
            return Err(Error::Range { place: chart(), low, high });
        }
        Ok((low, high))
    }

    fn draw(&self, pen: &Pen<'_>, (low, high): (f64, f64)) -> Result<(), Error> {
        let (width, height) = (f64::from(self.size.width), f64::from(self.size.height));
        let unit = (width / 1200.).min(height / 720.).clamp(0.5, 4.);
        let font = |size: f64, bold, color| Font { size: size * unit, bold, color };
        let (ink, muted) = (self.theme.ink(), self.theme.muted());
        let small = font(17., false, muted);
        let scale = Scale::new(low, high, 5);

        let mut top = 24. * unit;
        for (text, room, font) in [
            (&self.title, 36., font(25., true, ink)),
            (&self.subtitle, 26., font(18., false, muted)),
        ] {
            if !text.is_empty() {
                let (text, font) = pen.fitted(text, width - 48. * unit, font)?;
                pen.text(&text, (24. * unit, top + 10. * unit), Align::Left, font)?;
                top += room * unit;
            }
        }
        let widest = |names: &[String]| -> Result<f64, Error> {
            let mut widest: f64 = 0.;
            for name in names {
                widest = widest.max(pen.width_of(name, small)?);
            }
            Ok(widest)
        };
        let for_label = |text: &str| if text.is_empty() { 0. } else { 30. * unit };
        let row_names = widest(&self.rows)?.min(NAMES * width);
        let column_names = widest(&self.columns)?.min(NAMES * height);
        let ticks: Vec<String> = scale.ticks().iter().map(|&tick| scale.label(tick)).collect();
        let bar = 20. * unit;
        let beside = bar + 40. * unit + widest(&ticks)? + for_label(&self.value_label);
        let left = 24. * unit + for_label(&self.y_label) + row_names + 10. * unit;
        let right = width - 16. * unit - beside;
        let bottom = height - 20. * unit - for_label(&self.x_label) - column_names - 10. * unit;
        top += 8. * unit;
        let cell =
            ((right - left) / self.columns.len() as f64, (bottom - top) / self.rows.len() as f64);

        let at = |row: f64, column: f64| (left + column * cell.0, top + row * cell.1);
        for (row, values) in self.values.iter().enumerate() {
            for (column, &value) in values.iter().enumerate() {
                let (row, column) = (row as f64, column as f64);
                let fill = self.shades.color(scale.fraction(value));
                pen.rectangle(at(row, column), at(row + 1., column + 1.), fill)?;
            }
        }
        // Every so many names, where lines of text would overlap.
        let every = |extent: f64| (18. * unit / extent).ceil().max(1.) as usize;
        for (row, name) in self.rows.iter().enumerate().step_by(every(cell.1)) {
            let (name, font) = pen.fitted(name, row_names, small)?;
            let (_, y) = at(row as f64 + 0.5, 0.);
            pen.text(&name, (left - 8. * unit, y), Align::Right, font)?;
        }
        for (column, name) in self.columns.iter().enumerate().step_by(every(cell.0)) {
            let (name, font) = pen.fitted(name, column_names, small)?;
            let (x, _) = at(0., column as f64 + 0.5);
            pen.text_upwards(&name, (x, bottom + 8. * unit), Align::Right, font)?;
        }
        let label = font(18., false, ink);
        let middle = ((left + right) / 2., (top + bottom) / 2.);
        pen.text(&self.x_label, (middle.0, height - 26. * unit), Align::Center, label)?;
        pen.text_upwards(&self.y_label, (28. * unit, middle.1), Align::Center, label)?;

        const SHADES: usize = 128;
        let bar_left = right + 24. * unit;
        let level = |fraction: f64| bottom - fraction * (bottom - top);
        for shade in 0..SHADES {
            let fraction = |shade: usize| shade as f64 / SHADES as f64;
            let fill = self.shades.color((shade as f64 + 0.5) / SHADES as f64);
            // One over the other, so that no ground shows between them.
            let (low, high) = (level(fraction(shade)), level(1.));
            pen.rectangle((bar_left, high), (bar_left + bar, low), fill)?;
        }
        for (tick, text) in scale.ticks().into_iter().zip(ticks) {
            let place = (bar_left + bar + 8. * unit, level(scale.fraction(tick)));
            pen.text(&text, place, Align::Left, small)?;
        }
        pen.text_upwards(&self.value_label, (width - 24. * unit, middle.1), Align::Center, label)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_traffic_light_goes_through_its_stops() {
        let color = |fraction| Shades::TrafficLight.color(fraction);
        assert_eq!([0., 0.5, 1.].map(color), TRAFFIC_LIGHT);
        assert_eq!(color(0.25), [238, 129, 84], "half way from red to amber");
        assert_eq!(color(7.), TRAFFIC_LIGHT[2]);
    }
}
