//! Numbers of two labels as colours: who attends to whom.

use std::ops::Range;

use image::RgbImage;

use crate::canvas::{Align, Alt, Pen};
use crate::error::finite;
use crate::font::Font;
use crate::frame::{Area, SUBTITLE, room_of, unit_of, write_title};
use crate::picture::Draw;
use crate::scale::{Scale, brief};
use crate::{Color, Error, Shades, Size, Theme};

/// A cell for each pair of a row and a column, from dark (low) to bright (high) unless [`Shades`] say otherwise.
///
/// Of more cells than there are pixels, each pixel shows the largest value below it, so that nothing bright is lost (of
/// [`Shades::Diverging`] the one farthest from zero). A NaN is grey. The line below the title says so of both.
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
    /// `values[row][column]`; NaN where there is none.
    pub values: Vec<Vec<f64>>,
    /// Words of each cell, lines set apart by `\n`, written into it where those of all cells fit; empty for none.
    pub notes: Vec<Vec<String>>,
    /// Cells that belong together, outlined.
    pub groups: Vec<Group>,
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

/// Cells that belong together, as query heads that share keys.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Group {
    /// Its rows, counted from 0.
    pub rows: Range<usize>,
    /// Its columns.
    pub columns: Range<usize>,
}

/// Share of the picture that the names of the rows, or of the columns, may take.
const NAMES: f64 = 0.25;

/// Cells up to which each is a shape of its own, that tells its value to who points at it, where it is a pixel wide and high.
const SHAPES: usize = 4096;

/// What there is in the cells.
#[derive(Debug, Clone, Copy, Default)]
struct Survey {
    n_missing: usize,
    /// The lowest and the highest value, with their rows and columns.
    ends: Option<[(f64, usize, usize); 2]>,
}

/// Where the parts of a map lie.
#[derive(Debug)]
pub(crate) struct Layout {
    pub(crate) cells: Area,
    scale: Scale,
    /// Pixels across of the names of rows, and down of those of columns.
    row_names: f64,
    column_names: f64,
    /// Whether the names of columns lie.
    lies: bool,
}

/// What the map says of itself where it is one of several.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shown {
    /// The names of rows and columns, and of both axes.
    pub(crate) names: bool,
    pub(crate) bar: bool,
}

impl Draw for HeatMap {
    fn size(&self) -> Size {
        self.size
    }

    fn theme(&self) -> Theme {
        self.theme
    }

    fn alt(&self) -> Alt {
        Alt { title: self.title.clone(), description: self.in_words() }
    }

    fn draw(&self, pen: &Pen) -> Result<(), Error> {
        let found = self.survey();
        let range = self.check_with(&found)?;
        let unit = unit_of(self.size);
        let (width, height) = (f64::from(self.size.width), f64::from(self.size.height));
        let mut area = Area {
            left: 24. * unit,
            top: 24. * unit,
            right: width - 16. * unit,
            bottom: height - 20. * unit,
        };
        let shown = Shown { names: true, bar: true };
        // As if there were a line below the title, since that there are too many cells is told there.
        let below = Area { top: area.top + (room_of(&self.title) + SUBTITLE) * unit, ..area };
        let crowded = self.is_crowded(self.layout(pen, below, range, unit, shown).cells);
        let subtitle = joined([
            self.conditions(found.n_missing),
            if crowded { self.told_of_pixels() } else { String::new() },
        ]);
        area.top = write_title(pen, self.theme, (&self.title, &subtitle), area, unit)?;
        self.draw_in(pen, area, range, unit, shown)
    }
}

impl HeatMap {
    /// Checks every number and finds the range of the colours.
    pub(crate) fn check(&self) -> Result<(f64, f64), Error> {
        self.check_with(&self.survey())
    }

    fn check_with(&self, survey: &Survey) -> Result<(f64, f64), Error> {
        let chart = || format!("heat map `{}`", self.title);
        for (names, expected) in [(&self.rows, "row"), (&self.columns, "column")] {
            if names.is_empty() {
                return Err(Error::Empty { place: chart(), expected });
            }
        }
        let expected = (self.rows.len(), self.columns.len());
        let found = |rows: usize, columns: Option<usize>| Error::Cells {
            place: chart(),
            expected,
            found: (rows, columns.unwrap_or(0)),
        };
        let ragged = self.values.iter().map(Vec::len).find(|&n| n != expected.1);
        if self.values.len() != expected.0 || ragged.is_some() {
            return Err(found(self.values.len(), ragged.or(self.values.first().map(Vec::len))));
        }
        let ragged = self.notes.iter().map(Vec::len).find(|&n| n != expected.1);
        if !self.notes.is_empty() && (self.notes.len() != expected.0 || ragged.is_some()) {
            return Err(found(self.notes.len(), ragged.or(self.notes.first().map(Vec::len))));
        }
        for (side, n, what) in [(0, expected.0, "rows"), (1, expected.1, "columns")] {
            let of = |group: &Group| [group.rows.clone(), group.columns.clone()][side].clone();
            let beyond = self.groups.iter().map(of).find(|range| range.is_empty() || range.end > n);
            if let Some(Range { start, end }) = beyond {
                return Err(Error::Group { place: chart(), what, start, end, n });
            }
        }
        let Some([low, high]) = survey.ends else {
            return Err(Error::Empty { place: chart(), expected: "cell with a number" });
        };
        for (value, row, column) in [low, high] {
            let place = || {
                format!(
                    "row `{}`, column `{}` of {}",
                    self.rows[row],
                    self.columns[column],
                    chart()
                )
            };
            finite(value, place)?;
        }
        let (low, high) = (low.0, high.0);
        let Some((low, high)) = self.range else { return Ok(self.shades.range((low, high))) };
        for bound in [low, high] {
            finite(bound, || format!("range of {}", chart()))?;
        }
        if low >= high {
            return Err(Error::Range { place: chart(), low, high });
        }
        Ok((low, high))
    }

    /// Looks at every cell once.
    fn survey(&self) -> Survey {
        let mut found = Survey::default();
        for (row, values) in self.values.iter().enumerate() {
            let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
            let mut n_missing = 0;
            for &value in values {
                n_missing += usize::from(value.is_nan());
                low = if value < low { value } else { low };
                high = if value > high { value } else { high };
            }
            found.n_missing += n_missing;
            let place =
                |value: f64| values.iter().position(|it| *it == value).map(|it| (value, row, it));
            let (Some(low), Some(high)) = (place(low), place(high)) else { continue };
            let ends = found.ends.get_or_insert([low, high]);
            if low.0 < ends[0].0 {
                ends[0] = low;
            }
            if high.0 > ends[1].0 {
                ends[1] = high;
            }
        }
        found
    }

    /// The line below the title, with how many cells hold no number.
    pub(crate) fn caption(&self) -> String {
        self.conditions(self.survey().n_missing)
    }

    fn conditions(&self, n_missing: usize) -> String {
        let n = self.rows.len() * self.columns.len();
        let missing = match n_missing {
            0 => String::new(),
            _ => format!("{n_missing} of {n} cells hold no number (grey)"),
        };
        joined([self.subtitle.clone(), missing])
    }

    fn told_of_pixels(&self) -> String {
        let [rows, columns] = [self.rows.len(), self.columns.len()];
        let kept = self.shades.kept();
        format!("{rows} \u{D7} {columns} cells: each pixel shows the {kept} of those below it")
    }

    pub(crate) fn in_words(&self) -> String {
        let Survey { n_missing, ends } = self.survey();
        let mut text =
            format!("Heat map of {} rows and {} columns", self.rows.len(), self.columns.len());
        for part in [self.conditions(n_missing), self.value_label.clone()] {
            if !part.is_empty() {
                text += &format!("; {part}");
            }
        }
        if let Some(ends) = ends {
            let name = |names: &[String], at: usize| names.get(at).cloned().unwrap_or_default();
            let [low, high] = ends.map(|(value, row, column)| {
                let (row, column) = (name(&self.rows, row), name(&self.columns, column));
                format!("{} at row {row}, column {column}", brief(value))
            });
            text += &format!(": lowest {low}; highest {high}");
        }
        text + "."
    }

    /// Shares out a part of the picture among the cells, their names and the colours.
    pub(crate) fn layout(
        &self,
        pen: &Pen,
        area: Area,
        (low, high): (f64, f64),
        unit: f64,
        shown: Shown,
    ) -> Layout {
        let small = self.small(unit);
        let scale = Scale::new(low, high, 5);
        let extent = (area.right - area.left, area.bottom - area.top);
        let widest = |names: &[String]| -> f64 {
            names.iter().map(|name| pen.width_of(name, small)).fold(0., f64::max)
        };
        let for_label = |text: &str| if text.is_empty() || !shown.names { 0. } else { 30. * unit };
        let for_names = |names: &[String], extent: f64| match shown.names {
            true => widest(names).min(NAMES * extent) + 10. * unit,
            false => 0.,
        };
        let row_names = for_names(&self.rows, extent.0);
        // Short names lie, others stand.
        let about = (extent.0 - row_names) * 0.85 / self.columns.len() as f64;
        let lies = shown.names && widest(&self.columns) <= 0.8 * about;
        let column_names = match lies {
            true => 26. * unit,
            false => for_names(&self.columns, extent.1),
        };
        let mut cells = Area {
            left: area.left + for_label(&self.y_label) + row_names,
            top: area.top + 8. * unit,
            right: area.right,
            bottom: area.bottom - for_label(&self.x_label) - column_names,
        };
        if shown.bar {
            cells.right -= ColorBar::width(pen, &scale, &self.value_label, unit) + 24. * unit;
        }
        // Whole pixels, so that those of an image are its own.
        let cells = Area {
            left: cells.left.ceil(),
            top: cells.top.ceil(),
            right: cells.right.floor().max(cells.left.ceil() + 1.),
            bottom: cells.bottom.floor().max(cells.top.ceil() + 1.),
        };
        Layout { cells, scale, row_names, column_names, lies }
    }

    /// The font of names.
    fn small(&self, unit: f64) -> Font {
        Font { size: 17. * unit, bold: false, color: self.theme.muted() }
    }

    /// Draws the cells, their names and the colours into a part of the picture.
    pub(crate) fn draw_in(
        &self,
        pen: &Pen,
        area: Area,
        range: (f64, f64),
        unit: f64,
        shown: Shown,
    ) -> Result<(), Error> {
        let small = self.small(unit);
        let label = Font { size: 18. * unit, bold: false, color: self.theme.ink() };
        let extent = (area.right - area.left, area.bottom - area.top);
        let Layout { cells, scale, row_names, column_names, lies } =
            self.layout(pen, area, range, unit, shown);
        self.draw_cells(pen, cells, &scale, unit)?;

        if shown.names {
            let cell = self.cell(cells);
            // Every so many names, where lines of text would overlap.
            let every = |extent: f64| (18. * unit / extent).ceil().max(1.) as usize;
            for (row, name) in self.rows.iter().enumerate().step_by(every(cell.1)) {
                let (name, font) = pen.fitted(name, row_names - 10. * unit + 0.5, small);
                let y = cells.top + (row as f64 + 0.5) * cell.1;
                pen.text(&name, (cells.left - 8. * unit, y), Align::Right, font)?;
            }
            if lies {
                for (column, name) in self.columns.iter().enumerate() {
                    let x = cells.left + (column as f64 + 0.5) * cell.0;
                    pen.text(name, (x, cells.bottom + 16. * unit), Align::Center, small)?;
                }
            }
            let standing = if lies { 0 } else { self.columns.len() };
            for (column, name) in self.columns[..standing].iter().enumerate().step_by(every(cell.0))
            {
                let (name, font) = pen.fitted(name, column_names - 10. * unit + 0.5, small);
                let x = cells.left + (column as f64 + 0.5) * cell.0;
                pen.text_upwards(&name, (x, cells.bottom + 8. * unit), Align::Right, font)?;
            }
        }
        let middle = cells.middle();
        if shown.names && !self.x_label.is_empty() {
            let (text, font) = pen.fitted(&self.x_label, extent.0, label);
            pen.text(&text, (middle.0, area.bottom - 8. * unit), Align::Center, font)?;
        }
        if shown.names && !self.y_label.is_empty() {
            let (text, font) = pen.fitted(&self.y_label, extent.1, label);
            pen.text_upwards(&text, (area.left + 6. * unit, middle.1), Align::Center, font)?;
        }
        if shown.bar {
            let place = Area { left: cells.right + 24. * unit, right: area.right, ..cells };
            ColorBar { shades: self.shades, theme: self.theme, label: &self.value_label, scale }
                .draw(pen, place, unit)?;
        }
        Ok(())
    }

    /// Whether a pixel stands for more than a cell, across or down.
    pub(crate) fn is_crowded(&self, cells: Area) -> bool {
        let (width, height) = self.cell(cells);
        width < 1. || height < 1.
    }

    /// Width and height of a cell.
    fn cell(&self, cells: Area) -> (f64, f64) {
        (
            (cells.right - cells.left) / self.columns.len() as f64,
            (cells.bottom - cells.top) / self.rows.len() as f64,
        )
    }

    fn draw_cells(&self, pen: &Pen, cells: Area, scale: &Scale, unit: f64) -> Result<(), Error> {
        let cell = self.cell(cells);
        let at = |row: usize, column: usize| {
            (cells.left + column as f64 * cell.0, cells.top + row as f64 * cell.1)
        };
        if self.rows.len() * self.columns.len() > SHAPES || self.is_crowded(cells) {
            let pixels = [cells.bottom - cells.top, cells.right - cells.left].map(|it| it as usize);
            let image = self.image(pixels, scale);
            pen.image((cells.left, cells.top), (cells.right, cells.bottom), &image)?;
        } else {
            for (row, values) in self.values.iter().enumerate() {
                for (column, &value) in values.iter().enumerate() {
                    let says =
                        format!("{}, {}: {}", self.rows[row], self.columns[column], brief(value));
                    let fill = self.fill(value, scale);
                    pen.cell(at(row, column), at(row + 1, column + 1), fill, Some(&says))?;
                }
            }
            self.write_notes(pen, cells, scale, unit)?;
        }
        for Group { rows, columns } in &self.groups {
            let corners = (at(rows.start, columns.start), at(rows.end, columns.end));
            pen.outline(corners.0, corners.1, 2.5 * unit, self.theme.ink())?;
            pen.outline(corners.0, corners.1, 1. * unit, self.theme.ground())?;
        }
        Ok(())
    }

    fn fill(&self, value: f64, scale: &Scale) -> Color {
        match value.is_nan() {
            true => self.theme.missing(),
            false => self.shades.color(scale.fraction(value), self.theme),
        }
    }

    /// A pixel for each cell, or fewer: at most so many down and across.
    fn image(&self, most: [usize; 2], scale: &Scale) -> RgbImage {
        let n = [self.rows.len(), self.columns.len()];
        let size: [usize; 2] = std::array::from_fn(|i| n[i].min(most[i]).max(1));
        // Cells of a pixel: neighbours may share one.
        let span = |i: usize, at: usize| at * n[i] / size[i]..((at + 1) * n[i]).div_ceil(size[i]);
        let by_size = self.shades == Shades::Diverging;
        let mut image = RgbImage::new(size[1] as u32, size[0] as u32);
        let mut found = vec![f64::NAN; n[1]];
        for y in 0..size[0] {
            found.fill(f64::NAN);
            for row in &self.values[span(0, y)] {
                match by_size {
                    true => {
                        found.iter_mut().zip(row).for_each(|(found, it)| keep::<true>(found, *it))
                    }
                    false => {
                        found.iter_mut().zip(row).for_each(|(found, it)| keep::<false>(found, *it))
                    }
                }
            }
            for x in 0..size[1] {
                let mut largest = f64::NAN;
                for &value in &found[span(1, x)] {
                    if by_size {
                        keep::<true>(&mut largest, value)
                    } else {
                        keep::<false>(&mut largest, value)
                    }
                }
                image.put_pixel(x as u32, y as u32, image::Rgb(self.fill(largest, scale)));
            }
        }
        image
    }

    /// Writes the words of the cells, those of all or of none.
    fn write_notes(&self, pen: &Pen, cells: Area, scale: &Scale, unit: f64) -> Result<(), Error> {
        let cell = self.cell(cells);
        let font = Font { size: 15. * unit, bold: false, color: self.theme.ink() };
        let lines = self.notes.iter().flatten().map(|note| note.lines().count()).max().unwrap_or(0);
        let widest = self.notes.iter().flatten().flat_map(|note| note.lines());
        let widest = widest.map(|line| pen.width_of(line, font)).fold(0., f64::max);
        let shrunk =
            (0.92 * cell.0 / widest).min(0.92 * cell.1 / (lines as f64 * font.size)).min(1.);
        if lines == 0 || shrunk < 0.6 {
            return Ok(());
        }
        let size = font.size * shrunk;
        for (row, notes) in self.notes.iter().enumerate() {
            for (column, note) in notes.iter().enumerate() {
                let fill = self.fill(self.values[row][column], scale);
                let font = Font { size, color: readable_on(fill), ..font };
                let x = cells.left + (column as f64 + 0.5) * cell.0;
                let middle = cells.top + (row as f64 + 0.5) * cell.1;
                let first = middle - (note.lines().count().saturating_sub(1)) as f64 * size / 2.;
                for (i, line) in note.lines().enumerate() {
                    pen.text(line, (x, first + i as f64 * size), Align::Center, font)?;
                }
            }
        }
        Ok(())
    }
}

/// The parts that there are, in one line.
pub(crate) fn joined<const N: usize>(parts: [String; N]) -> String {
    let parts: Vec<String> = parts.into_iter().filter(|part| !part.is_empty()).collect();
    parts.join("; ")
}

/// Keeps the larger, or the one farther from zero, of two values, and any number in place of none.
pub(crate) fn keep<const BY_SIZE: bool>(found: &mut f64, value: f64) {
    let is_more = if BY_SIZE { value.abs() > found.abs() } else { value > *found };
    // With none found so far nothing is more, nor less.
    if is_more || found.is_nan() {
        *found = value;
    }
}

/// Black or white, whichever stands out.
fn readable_on([r, g, b]: Color) -> Color {
    let brightness = 0.299 * f64::from(r) + 0.587 * f64::from(g) + 0.114 * f64::from(b);
    if brightness > 140. { [0; 3] } else { [0xFF; 3] }
}

/// The colours beside the values that they stand for.
pub(crate) struct ColorBar<'a> {
    pub(crate) shades: Shades,
    pub(crate) theme: Theme,
    pub(crate) label: &'a str,
    pub(crate) scale: Scale,
}

/// Width of the colours themselves, in units.
const BAR: f64 = 20.;

impl ColorBar<'_> {
    fn font(theme: Theme, unit: f64) -> Font {
        Font { size: 17. * unit, bold: false, color: theme.muted() }
    }

    /// Pixels that it takes across.
    pub(crate) fn width(pen: &Pen, scale: &Scale, label: &str, unit: f64) -> f64 {
        let font = Self::font(Theme::Light, unit);
        let ticks = scale.ticks();
        let widest = ticks.iter().map(|&tick| pen.width_of(&scale.label(tick), font));
        let for_label = if label.is_empty() { 0. } else { 30. * unit };
        (BAR + 16.) * unit + widest.fold(0., f64::max) + for_label
    }

    pub(crate) fn draw(&self, pen: &Pen, area: Area, unit: f64) -> Result<(), Error> {
        const SHADES: u32 = 256;
        let Area { left, top, right, bottom } = area;
        // From the highest value down.
        let image = RgbImage::from_fn(1, SHADES, |_, y| {
            let fraction = 1. - (f64::from(y) + 0.5) / f64::from(SHADES);
            image::Rgb(self.shades.color(fraction, self.theme))
        });
        pen.image((left, top), (left + BAR * unit, bottom), &image)?;
        let font = Self::font(self.theme, unit);
        for tick in self.scale.ticks() {
            let y = bottom - self.scale.fraction(tick) * (bottom - top);
            let place = (left + (BAR + 8.) * unit, y);
            pen.text(&self.scale.label(tick), place, Align::Left, font)?;
        }
        let label = Font { size: 18. * unit, color: self.theme.ink(), ..font };
        let (text, label) = pen.fitted(self.label, bottom - top, label);
        pen.text_upwards(&text, (right - 8. * unit, (top + bottom) / 2.), Align::Center, label)
    }
}
