//! Several heat maps side by side: the heads of a layer, before and after.

use crate::canvas::{Align, Alt, Pen};
use crate::font::Font;
use crate::frame::{Area, SUBTITLE, room_of, unit_of, write_title};
use crate::heat::{ColorBar, Shown, joined};
use crate::picture::Draw;
use crate::scale::Scale;
use crate::{Error, HeatMap, Shades, Size, Theme};

/// Heat maps in a grid, each below its title and subtitle, which tells how many of its cells hold no number. The themes and sizes of the maps themselves are not looked at.
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
        // As if there were a line below the title, since that there are too many cells is told there.
        let below = Area { top: area.top + (room_of(&self.title) + SUBTITLE) * unit, ..area };
        let subtitle = joined([self.subtitle.clone(), self.told_of_pixels(pen, below, all, unit)]);
        area.top = write_title(pen, self.theme, (&self.title, &subtitle), area, unit)?;
        if self.shared {
            let scale = Scale::new(all.0, all.1, 5);
            let room = self.bar_room(pen, all, unit);
            let place = Area { left: area.right - room, top: area.top + 30. * unit, ..area };
            let (shades, label) = (first.shades, &first.value_label[..]);
            ColorBar { shades, theme: self.theme, label, scale }.draw(pen, place, unit)?;
        }
        let grid = self.grid(pen, area, all, unit);
        for (i, (map, &range)) in self.maps.iter().zip(&ranges).enumerate() {
            let place = grid.cells_of(i);
            let width = place.right - place.left;
            let (bold, color) = (true, self.theme.ink());
            let font = Font { size: (0.8 * grid.heading).min(20. * unit), bold, color };
            let (text, font) = pen.fitted(&map.title, width, font);
            let middle = place.top - grid.caption - grid.heading / 2.;
            pen.text(&text, (place.left, middle), Align::Left, font)?;
            let (bold, color) = (false, self.theme.muted());
            let font = Font { size: 0.8 * grid.caption, bold, color };
            let (text, font) = pen.fitted(&grid.captions[i], width, font);
            pen.text(&text, (place.left, place.top - grid.caption / 2.), Align::Left, font)?;
            let plain = HeatMap { shades: self.shades_of(map), theme: self.theme, ..map.clone() };
            let range = if self.shared { all } else { range };
            plain.draw_in(pen, place, range, grid.unit, grid.shown)?;
        }
        Ok(())
    }
}

/// Where the maps stand.
struct Grid {
    area: Area,
    across: usize,
    slot: (f64, f64),
    gap: f64,
    /// Pixels down of a map's title, and of the line below it.
    heading: f64,
    caption: f64,
    captions: Vec<String>,
    shown: Shown,
    /// Size of what is written around the cells.
    unit: f64,
}

impl Grid {
    /// What is left of a map's slot below its words.
    fn cells_of(&self, i: usize) -> Area {
        let left = self.area.left + (i % self.across) as f64 * self.slot.0;
        let top = self.area.top + (i / self.across) as f64 * self.slot.1;
        Area {
            left,
            top: top + self.heading + self.caption,
            right: left + self.slot.0 - self.gap,
            bottom: top + self.slot.1 - self.gap,
        }
    }
}

impl Panels {
    fn grid(&self, pen: &Pen, area: Area, all: (f64, f64), unit: f64) -> Grid {
        let right = match self.shared {
            true => area.right - self.bar_room(pen, all, unit) - 24. * unit,
            false => area.right,
        };
        let n = self.maps.len();
        let across = match self.columns {
            0 => (n as f64).sqrt().ceil() as usize,
            columns => columns.min(n),
        };
        let down = n.div_ceil(across);
        let slot = ((right - area.left) / across as f64, (area.bottom - area.top) / down as f64);
        let heading = (0.14 * slot.1).clamp(12. * unit, 28. * unit);
        let captions: Vec<String> = self.maps.iter().map(HeatMap::caption).collect();
        let has_captions = captions.iter().any(|caption| !caption.is_empty());
        // Small maps have names and axes in none, so that all are drawn alike.
        let names = slot.0.min(slot.1) >= FOR_NAMES * unit;
        Grid {
            area: Area { right, ..area },
            across,
            slot,
            gap: (0.06 * slot.0.min(slot.1)).min(18. * unit),
            heading,
            caption: if has_captions { (0.75 * heading).max(11. * unit) } else { 0. },
            captions,
            shown: Shown { names, bar: !self.shared },
            unit: unit * if names { 0.85 } else { 0.7 },
        }
    }

    /// Pixels across of the colours that all share.
    fn bar_room(&self, pen: &Pen, all: (f64, f64), unit: f64) -> f64 {
        let label = self.maps.first().map_or("", |first| &first.value_label);
        ColorBar::width(pen, &Scale::new(all.0, all.1, 5), label, unit)
    }

    fn shades_of(&self, map: &HeatMap) -> Shades {
        match (self.shared, self.maps.first()) {
            (true, Some(first)) => first.shades,
            _ => map.shades,
        }
    }

    /// What a pixel of several cells shows, if there is one in any map.
    fn told_of_pixels(&self, pen: &Pen, area: Area, all: (f64, f64), unit: f64) -> String {
        let grid = self.grid(pen, area, all, unit);
        let is_crowded = |(i, map): &(usize, &HeatMap)| {
            let cells = map.layout(pen, grid.cells_of(*i), all, grid.unit, grid.shown).cells;
            map.is_crowded(cells)
        };
        let crowded = self.maps.iter().enumerate().filter(is_crowded);
        let mut kept: Vec<&str> = crowded.map(|(_, map)| self.shades_of(map).kept()).collect();
        kept.sort_unstable();
        kept.dedup();
        match kept.is_empty() {
            true => String::new(),
            false => format!(
                "more cells than pixels: each pixel shows the {} of those below it",
                kept.join(" (diverging colours) or ")
            ),
        }
    }
}
