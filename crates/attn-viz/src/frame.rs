//! What surrounds the data: title, legend, axes, grid. The legend stands above the plot, where it hides nothing.

use crate::canvas::{Align, Pen};
use crate::font::Font;
use crate::scale::{Axis, Scale};
use crate::{Color, Error, Size, Theme};

/// A part of a picture.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Area {
    pub(crate) left: f64,
    pub(crate) top: f64,
    pub(crate) right: f64,
    pub(crate) bottom: f64,
}

impl Area {
    pub(crate) fn middle(self) -> (f64, f64) {
        ((self.left + self.right) / 2., (self.top + self.bottom) / 2.)
    }
}

/// Size of everything that is not data, 1 in a picture of 1200 x 720.
pub(crate) fn unit_of(size: Size) -> f64 {
    (f64::from(size.width) / 1200.).min(f64::from(size.height) / 720.).clamp(0.5, 4.)
}

/// Units down that a title takes.
const TITLE: f64 = 36.;

/// Units down that the line below a title takes.
pub(crate) const SUBTITLE: f64 = 26.;

/// Units down that this title takes.
pub(crate) fn room_of(title: &str) -> f64 {
    if title.is_empty() { 0. } else { TITLE }
}

/// Writes the title and the line below it, and returns where what is left of the area begins.
pub(crate) fn write_title(
    pen: &Pen,
    theme: Theme,
    (title, subtitle): (&str, &str),
    Area { left, top, right, .. }: Area,
    unit: f64,
) -> Result<f64, Error> {
    let font = |size: f64, bold, color| Font { size: size * unit, bold, color };
    let mut top = top;
    for (text, room, font) in [
        (title, TITLE, font(28., true, theme.ink())),
        (subtitle, SUBTITLE, font(18., false, theme.muted())),
    ] {
        if !text.is_empty() {
            let (text, font) = pen.fitted(text, right - left, font);
            pen.text(&text, (left, top + 10. * unit), Align::Left, font)?;
            top += room * unit;
        }
    }
    Ok(top)
}

/// A value to compare with, drawn as a dashed line across the plot and named in the legend.
#[derive(Debug, Clone, PartialEq)]
pub struct Baseline {
    /// What the value is, such as `majority class`.
    pub label: String,
    /// Where it lies on the y axis.
    pub value: f64,
}

/// The words around a plot.
#[derive(Debug)]
pub(crate) struct Words {
    pub(crate) title: String,
    pub(crate) subtitle: String,
    pub(crate) x_label: String,
    pub(crate) y_label: String,
    pub(crate) legend: Vec<Entry>,
}

/// One name in the legend.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) color: Color,
    pub(crate) mark: Mark,
}

/// What stands before a name in the legend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mark {
    Line,
    Dashes,
    DottedLine,
}

/// A legend entry with its place.
#[derive(Debug)]
struct Placed {
    entry: Entry,
    left: f64,
    middle: f64,
    text: String,
    font: Font,
}

/// Axes and the room between them.
pub(crate) struct Frame<'a> {
    pub(crate) pen: &'a Pen,
    pub(crate) theme: Theme,
    pub(crate) y: Scale,
    axis: Axis,
    pub(crate) left: f64,
    pub(crate) right: f64,
    pub(crate) top: f64,
    pub(crate) bottom: f64,
    /// As [`unit_of`].
    pub(crate) unit: f64,
    size: Size,
    words: Words,
    legend: Vec<Placed>,
}

/// Dash and gap of baselines, in units.
pub(crate) const DASHES: (f64, f64) = (9., 6.);

impl<'a> Frame<'a> {
    /// Shares out the picture. `label_lines` is the number of lines that labels below the x axis take.
    pub(crate) fn new(
        pen: &'a Pen,
        size: Size,
        theme: Theme,
        words: Words,
        (axis, low, high): (Axis, f64, f64),
        label_lines: usize,
    ) -> Self {
        let (width, height) = (f64::from(size.width), f64::from(size.height));
        let unit = unit_of(size);
        let mut frame = Self {
            pen,
            theme,
            y: Scale::along(axis, low, high, 5),
            axis,
            left: 24. * unit,
            right: width - 32. * unit,
            top: 24. * unit,
            bottom: height - (22. + 24. * label_lines as f64) * unit,
            unit,
            size,
            words,
            legend: Vec::new(),
        };
        if !frame.words.x_label.is_empty() {
            frame.bottom -= 32. * unit;
        }
        if !frame.words.y_label.is_empty() {
            frame.left += 32. * unit;
        }
        frame.top += [(&frame.words.title, TITLE), (&frame.words.subtitle, SUBTITLE)]
            .map(|(text, room)| if text.is_empty() { 0. } else { room * unit })
            .iter()
            .sum::<f64>();
        frame.place_legend();
        frame.top += 14. * unit;

        let n_ticks = ((frame.bottom - frame.top) / (70. * unit)).round().max(2.) as usize;
        frame.y = Scale::along(frame.axis, low, high, n_ticks);
        let mut widest: f64 = 0.;
        for tick in frame.y.ticks() {
            widest = widest.max(pen.width_of(&frame.y.label(tick), frame.small()));
        }
        frame.left += widest + 10. * unit;
        frame
    }

    /// Puts the names side by side, and on another line where one is full.
    fn place_legend(&mut self) {
        let unit = self.unit;
        let (start, end) = (24. * unit, self.right);
        let (swatch, gap) = (34. * unit, 28. * unit);
        let mut left = start;
        for entry in self.words.legend.clone() {
            let (text, font) = self.pen.fitted(&entry.name, end - start - swatch, self.small());
            let width = swatch + self.pen.width_of(&text, font);
            if left > start && left + width > end {
                left = start;
                self.top += 26. * unit;
            }
            self.legend.push(Placed { entry, left, middle: self.top + 8. * unit, text, font });
            left += width + gap;
        }
        if !self.legend.is_empty() {
            self.top += 26. * unit;
        }
    }

    /// The font of tick labels and legends.
    pub(crate) fn small(&self) -> Font {
        Font { size: 18. * self.unit, bold: false, color: self.theme.muted() }
    }

    /// The font of values that stand in the plot.
    pub(crate) fn strong(&self) -> Font {
        Font { size: 19. * self.unit, bold: true, color: self.theme.ink() }
    }

    /// The y pixel of a value.
    pub(crate) fn y_of(&self, value: f64) -> f64 {
        self.bottom - self.y.fraction(value) * (self.bottom - self.top)
    }

    /// Lines across the plot at the round values, to be drawn before the data.
    pub(crate) fn grid(&self) -> Result<(), Error> {
        for tick in self.y.ticks() {
            let y = self.y_of(tick);
            self.pen.rectangle((self.left, y - 0.5), (self.right, y + 0.5), self.theme.grid())?;
        }
        Ok(())
    }

    /// A dashed line across the plot.
    pub(crate) fn baseline(&self, value: f64, color: Color) -> Result<(), Error> {
        let y = self.y_of(value);
        let dashes = (DASHES.0 * self.unit, DASHES.1 * self.unit);
        self.pen.dashed(&[(self.left, y), (self.right, y)], dashes, 2. * self.unit, color)
    }

    /// Wipes off what the data left outside the plot and writes the words; `x_labels` are the lines below each place.
    pub(crate) fn finish(&self, x_labels: &[(f64, Vec<(String, Font)>)]) -> Result<(), Error> {
        let Self { pen, unit, .. } = *self;
        let (width, height) = (f64::from(self.size.width), f64::from(self.size.height));
        let ground = self.theme.ground();
        pen.rectangle((0., 0.), (width, self.top - 1.), ground)?;
        pen.rectangle((0., self.bottom + 1.), (width, height), ground)?;
        pen.rectangle((0., 0.), (self.left - 1., height), ground)?;
        pen.rectangle((self.right + 1., 0.), (width, height), ground)?;

        let thickness = 1.5 * unit;
        pen.rectangle(
            (self.left, self.bottom),
            (self.right, self.bottom + thickness),
            self.theme.muted(),
        )?;
        for tick in self.y.ticks() {
            let at = (self.left - 10. * unit, self.y_of(tick));
            pen.text(&self.y.label(tick), at, Align::Right, self.small())?;
        }
        for (x, lines) in x_labels {
            for (i, (line, font)) in lines.iter().enumerate() {
                let y = self.bottom + (20. + 24. * i as f64) * unit;
                pen.text(line, (*x, y), Align::Center, *font)?;
            }
        }
        self.write_words()?;
        for placed in &self.legend {
            self.draw_legend_entry(placed)?;
        }
        Ok(())
    }

    fn write_words(&self) -> Result<(), Error> {
        let Self { pen, unit, theme, .. } = *self;
        let Words { title, subtitle, x_label, y_label, .. } = &self.words;
        let margin = 24. * unit;
        let area = Area { left: margin, top: margin, right: self.right, bottom: self.bottom };
        write_title(pen, theme, (title, subtitle), area, unit)?;
        let font = Font { size: 20. * unit, bold: false, color: theme.ink() };
        if !x_label.is_empty() {
            let (text, font) = pen.fitted(x_label, self.right - self.left, font);
            let at = ((self.left + self.right) / 2., f64::from(self.size.height) - 24. * unit);
            pen.text(&text, at, Align::Center, font)?;
        }
        if !y_label.is_empty() {
            let (text, font) = pen.fitted(y_label, self.bottom - self.top, font);
            pen.text_upwards(
                &text,
                (30. * unit, (self.top + self.bottom) / 2.),
                Align::Center,
                font,
            )?;
        }
        Ok(())
    }

    fn draw_legend_entry(&self, placed: &Placed) -> Result<(), Error> {
        let Self { pen, unit, .. } = *self;
        let Placed { entry: Entry { color, mark, .. }, left, middle, text, font } = placed;
        let ends = [(left + 2. * unit, *middle), (left + 26. * unit, *middle)];
        match mark {
            Mark::Line => pen.line(&ends, 3.5 * unit, *color)?,
            Mark::Dashes => pen.dashed(&ends, (6. * unit, 3. * unit), 2.5 * unit, *color)?,
            Mark::DottedLine => {
                pen.line(&ends, 2.5 * unit, *color)?;
                pen.disc((left + 14. * unit, *middle), 5. * unit, *color)?;
            }
        }
        pen.text(text, (left + 34. * unit, *middle), Align::Left, *font)
    }
}
