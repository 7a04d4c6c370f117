//! Bars side by side, with intervals: scores of models, before and after.

use crate::canvas::{Align, Alt, Pen};
use crate::error::finite;
use crate::font::Font;
use crate::frame::{Baseline, Entry, Frame, Mark, Words};
use crate::picture::Draw;
use crate::{Axis, Error, Size, Theme};

/// One bar for each value, all from zero.
#[derive(Debug, Clone, PartialEq)]
pub struct BarChart {
    /// What the picture shows; empty for none.
    pub title: String,
    /// A smaller line below the title: how many examples, which interval; empty for none.
    pub subtitle: String,
    /// What the values are, with their unit.
    pub y_label: String,
    /// Lowest and highest y. By default from zero (or the lowest value, where one is negative) to what the bars need.
    pub y_range: Option<(f64, f64)>,
    /// The bars from left to right.
    pub bars: Vec<Bar>,
    /// Values to compare with.
    pub baselines: Vec<Baseline>,
    /// Decimals of the values written above the bars.
    pub decimals: usize,
    /// The ground and its colours.
    pub theme: Theme,
    /// Pixels.
    pub size: Size,
}

/// One value.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Bar {
    /// Its name below the axis; long ones are broken into lines.
    pub label: String,
    /// Its height.
    pub value: f64,
    /// Lowest and highest value that the data allow, drawn as a whisker.
    pub interval: Option<(f64, f64)>,
    /// Number of its colour in the palette, the first by default: bars differ in colour only where that means something.
    pub color: usize,
}

impl Default for BarChart {
    fn default() -> Self {
        Self {
            title: String::new(),
            subtitle: String::new(),
            y_label: String::new(),
            y_range: None,
            bars: Vec::new(),
            baselines: Vec::new(),
            decimals: 1,
            theme: Theme::default(),
            size: Size::default(),
        }
    }
}

/// Lines that a label may take.
const MAX_LINES: usize = 4;

impl Draw for BarChart {
    fn size(&self) -> Size {
        self.size
    }

    fn theme(&self) -> Theme {
        self.theme
    }

    fn alt(&self) -> Alt {
        let bar = |Bar { label, value, interval, .. }: &Bar| {
            let interval = interval.map_or(String::new(), |(low, high)| {
                format!(" ({low:.0$} to {high:.0$})", self.decimals)
            });
            format!("{label}: {value:.0$}{interval}", self.decimals)
        };
        let bars: Vec<String> = self.bars.iter().map(bar).collect();
        let description = format!("Bars, {}. {}.", self.y_label, bars.join("; "));
        Alt { title: self.title.clone(), description }
    }

    fn draw(&self, pen: &Pen) -> Result<(), Error> {
        let (low, high) = self.range()?;
        let range = (Axis::Linear, low, high);
        let words = || Words {
            title: self.title.clone(),
            subtitle: self.subtitle.clone(),
            x_label: String::new(),
            y_label: self.y_label.clone(),
            legend: self.legend(),
        };
        // The width of a slot decides how labels break, and the lines they take decide the height of the plot.
        let frame = Frame::new(pen, self.size, self.theme, words(), range, 1);
        let slot = self.slot(&frame);
        let labels = self.labels(&frame, slot);
        let n_lines = labels.iter().map(Vec::len).max().unwrap_or(1);
        let frame = Frame::new(pen, self.size, self.theme, words(), range, n_lines);
        self.draw_bars(pen, &frame, labels)
    }
}

impl BarChart {
    /// Checks every number and finds the range of the y axis.
    fn range(&self) -> Result<(f64, f64), Error> {
        let chart = format!("chart `{}`", self.title);
        if self.bars.is_empty() {
            return Err(Error::Empty { place: chart, expected: "bar" });
        }
        let (mut low, mut high) = (0_f64, 0_f64);
        let mut add = |value: f64| {
            low = low.min(value);
            high = high.max(value);
        };
        for Bar { label, value, interval, .. } in &self.bars {
            let place = format!("bar `{label}` of {chart}");
            add(finite(*value, || format!("the value of {place}"))?);
            let Some((least, most)) = *interval else { continue };
            add(finite(least, || format!("the lower end of the interval of {place}"))?);
            add(finite(most, || format!("the upper end of the interval of {place}"))?);
            if least > most {
                return Err(Error::Range {
                    place: format!("the interval of {place}"),
                    low: least,
                    high: most,
                });
            }
        }
        for Baseline { label, value } in &self.baselines {
            add(finite(*value, || format!("baseline `{label}` of {chart}"))?);
        }
        match self.y_range {
            // Room for the value above the highest bar, and below the lowest.
            None => Ok((
                if low < 0. { low - (high - low) * 0.1 } else { 0. },
                high + (high - low) * 0.1,
            )),
            Some((low, high)) => {
                finite(low, || format!("the lower end of the y range of {chart}"))?;
                finite(high, || format!("the upper end of the y range of {chart}"))?;
                if low < high {
                    Ok((low, high))
                } else {
                    Err(Error::Range { place: format!("the y range of {chart}"), low, high })
                }
            }
        }
    }

    fn legend(&self) -> Vec<Entry> {
        let entry = |(i, baseline): (usize, &Baseline)| Entry {
            name: baseline.label.clone(),
            color: self.baseline_color(i),
            mark: Mark::Dashes,
        };
        self.baselines.iter().enumerate().map(entry).collect()
    }

    /// One baseline is grey; several take the colours that bars use last.
    fn baseline_color(&self, index: usize) -> crate::Color {
        if self.baselines.len() == 1 {
            self.theme.muted()
        } else {
            self.theme.color(self.theme.palette().len() - 1 - index % self.theme.palette().len())
        }
    }

    /// The width that each bar has to itself, its distance to the next included.
    fn slot(&self, frame: &Frame<'_>) -> f64 {
        (frame.right - frame.left) / self.bars.len() as f64
    }

    fn labels(&self, frame: &Frame<'_>, slot: f64) -> Vec<Vec<(String, Font)>> {
        let font = Font { color: self.theme.ink(), ..frame.small() };
        self.bars
            .iter()
            .map(|bar| broken(frame.pen, &bar.label, slot - 8. * frame.unit, font))
            .collect()
    }

    fn draw_bars(
        &self,
        pen: &Pen,
        frame: &Frame<'_>,
        labels: Vec<Vec<(String, Font)>>,
    ) -> Result<(), Error> {
        let unit = frame.unit;
        let slot = self.slot(frame);
        let width = (slot * 0.6).min(150. * unit);
        let middle_of = |i: usize| frame.left + (i as f64 + 0.5) * slot;
        // Where zero lies outside the plot the bars start at its nearer edge.
        let zero = frame.y_of(0_f64.clamp(frame.y.low, frame.y.high));

        frame.grid()?;
        for (i, bar) in self.bars.iter().enumerate() {
            let (middle, y) = (middle_of(i), frame.y_of(bar.value));
            let corners = ((middle - width / 2., y.min(zero)), (middle + width / 2., y.max(zero)));
            pen.rectangle(corners.0, corners.1, self.theme.color(bar.color))?;
        }
        for (i, baseline) in self.baselines.iter().enumerate() {
            frame.baseline(baseline.value, self.baseline_color(i))?;
        }
        for (i, bar) in self.bars.iter().enumerate() {
            if let Some((low, high)) = bar.interval {
                self.draw_whisker(pen, frame, middle_of(i), width, (low, high))?;
            }
            self.write_value(pen, frame, middle_of(i), slot, bar)?;
        }
        if frame.y.low < 0. {
            pen.rectangle(
                (frame.left, zero - 0.75 * unit),
                (frame.right, zero + 0.75 * unit),
                self.theme.muted(),
            )?;
        }
        let labels: Vec<_> =
            labels.into_iter().enumerate().map(|(i, lines)| (middle_of(i), lines)).collect();
        frame.finish(&labels)
    }

    fn draw_whisker(
        &self,
        pen: &Pen,
        frame: &Frame<'_>,
        middle: f64,
        width: f64,
        (low, high): (f64, f64),
    ) -> Result<(), Error> {
        let (top, bottom) = (frame.y_of(high), frame.y_of(low));
        let half = 1.25 * frame.unit;
        let cap = (width * 0.12).min(12. * frame.unit);
        let ink = self.theme.ink();
        pen.rectangle((middle - half, top), (middle + half, bottom), ink)?;
        for y in [top, bottom] {
            pen.rectangle((middle - cap, y - half), (middle + cap, y + half), ink)?;
        }
        Ok(())
    }

    /// Writes the value beyond the end of the bar and its whisker, or beside the whisker where that is out of the plot.
    fn write_value(
        &self,
        pen: &Pen,
        frame: &Frame<'_>,
        middle: f64,
        slot: f64,
        bar: &Bar,
    ) -> Result<(), Error> {
        let text = format!("{:.*}", self.decimals, bar.value).replace('-', "\u{2212}");
        let (text, font) = pen.fitted(&text, slot - 4. * frame.unit, frame.strong());
        let (low, high) = bar.interval.map_or((bar.value, bar.value), |(low, high)| {
            (low.min(bar.value), high.max(bar.value))
        });
        let gap = 14. * frame.unit;
        let y = if bar.value < 0. { frame.y_of(low) + gap } else { frame.y_of(high) - gap };
        // At most one line out of the plot: above it there is room, and the text must stay with its bar.
        let y = y.clamp(frame.top - gap / 2., frame.bottom - gap / 2.);
        pen.text(&text, (middle, y), Align::Center, font)
    }
}

/// Breaks `text` between words into lines of at most `width` pixels; what does not fit even so is made smaller or cut.
fn broken(pen: &Pen, text: &str, width: f64, font: Font) -> Vec<(String, Font)> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let line = lines.last_mut().expect("there is always a line");
        let longer = if line.is_empty() { word.to_owned() } else { format!("{line} {word}") };
        let n_lines = lines.len();
        let line = lines.last_mut().expect("there is always a line");
        if line.is_empty() || n_lines == MAX_LINES || pen.width_of(&longer, font) <= width {
            *line = longer;
        } else {
            lines.push(word.to_owned());
        }
    }
    lines.iter().map(|line| pen.fitted(line, width, font)).collect()
}
