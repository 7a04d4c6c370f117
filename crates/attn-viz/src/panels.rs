//! Several heat maps side by side: the heads of a layer, before and after.

use crate::canvas::{Align, Alt, Pen};
use crate::font::Font;
use crate::frame::{Area, unit_of, write_title};
use crate::heat::{ColorBar, Shown};
use crate::picture::Draw;
use crate::scale::Scale;
use crate::{Error, HeatMap, Size, Theme};

/// Heat maps in a grid, each below its title. The themes and sizes of the maps themselves are not looked at.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Panels {
    /// What the picture shows; empty for none.
    pub title: String,
    /// A smaller line below the title, for the conditions; empty for none.
    pub subtitle: String,
    /// The maps, row after row.
    pub maps: Vec<HeatMap>,
    /// How many stand side by side; 0 for as square a grid as there is.
    pub columns: usize,
    /// Whether the same colour is the same value in all, which then share the colours, and the bar, of the first.
    pub shared: bool,
    /// The ground and its colours.
    pub theme: Theme,
    /// Pixels.
    pub size: Size,
}

/// Pixels of a map, in units, below which it has no names of rows and columns.
const FOR_NAMES: f64 = 220.;

impl Draw for Panels {
    fn size(&self) -> Size {
        self.size
    }

    fn theme(&self) -> Theme {
        self.theme
    }

    fn alt(&self) -> Alt {
        let each: Vec<String> =
            self.maps.iter().map(|map| format!("{}: {}", map.title, map.in_words())).collect();
        let description = format!("{} maps. {}", self.maps.len(), each.join(" "));
        Alt { title: self.title.clone(), description }
    }

    fn draw(&self, pen: &Pen) -> Result<(), Error> {
        let Some(first) = self.maps.first() else {
            let place = format!("picture `{}`", self.title);
            return Err(Error::Empty { place, expected: "heat map" });
        };
        let ranges: Vec<(f64, f64)> =
            self.maps.iter().map(HeatMap::check).collect::<Result<_, _>>()?;
        let all = ranges.iter().fold(ranges[0], |all, it| (all.0.min(it.0), all.1.max(it.1)));
        let unit = unit_of(self.size);
        let (width, height) = (f64::from(self.size.width), f64::from(self.size.height));
        let mut area = Area {
            left: 24. * unit,
            top: 24. * unit,
            right: width - 16. * unit,
            bottom: height - 16. * unit,
        };
        area.top = write_title(pen, self.theme, (&self.title, &self.subtitle), area, unit)?;
        if self.shared {
            let scale = Scale::new(all.0, all.1, 5);
            let room = ColorBar::width(pen, &scale, &first.value_label, unit);
            let place = Area { left: area.right - room, top: area.top + 30. * unit, ..area };
            let (shades, label) = (first.shades, &first.value_label[..]);
            ColorBar { shades, theme: self.theme, label, scale }.draw(pen, place, unit)?;
            area.right -= room + 24. * unit;
        }

        let n = self.maps.len();
        let across = match self.columns {
            0 => (n as f64).sqrt().ceil() as usize,
            columns => columns.min(n),
        };
        let down = n.div_ceil(across);
        let slot =
            ((area.right - area.left) / across as f64, (area.bottom - area.top) / down as f64);
        let gap = (0.06 * slot.0.min(slot.1)).min(18. * unit);
        let heading = (0.14 * slot.1).clamp(12. * unit, 28. * unit);
        let names = slot.0.min(slot.1) >= FOR_NAMES * unit;
        for (i, (map, &range)) in self.maps.iter().zip(&ranges).enumerate() {
            let (left, top) =
                (area.left + (i % across) as f64 * slot.0, area.top + (i / across) as f64 * slot.1);
            let place = Area {
                left,
                top: top + heading,
                right: left + slot.0 - gap,
                bottom: top + slot.1 - gap,
            };
            let font =
                Font { size: (0.8 * heading).min(20. * unit), bold: true, color: self.theme.ink() };
            let (text, font) = pen.fitted(&map.title, slot.0 - gap, font);
            pen.text(&text, (left, top + heading / 2.), Align::Left, font)?;
            // Small maps have names and axes in none, so that all are drawn alike.
            let plain = HeatMap {
                x_label: if names { map.x_label.clone() } else { String::new() },
                y_label: if names { map.y_label.clone() } else { String::new() },
                shades: if self.shared { first.shades } else { map.shades },
                theme: self.theme,
                ..map.clone()
            };
            let range = if self.shared { all } else { range };
            let shown = Shown { names, bar: !self.shared };
            plain.draw_in(pen, place, range, unit * if names { 0.85 } else { 0.7 }, shown)?;
        }
        Ok(())
    }
}
