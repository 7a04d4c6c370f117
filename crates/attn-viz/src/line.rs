//! Curves over a numeric axis: losses, rates, scores by step.

use crate::canvas::{Alt, Pen};
use crate::error::finite;
use crate::frame::{Baseline, Entry, Frame, Mark, Words};
use crate::picture::Draw;
use crate::scale::{Scale, brief};
use crate::{Axis, Error, Size, Theme};

/// One or more curves that share their axes.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LineChart {
    /// What the picture shows; empty for none.
    pub title: String,
    /// A smaller line below the title, for the conditions; empty for none.
    pub subtitle: String,
    /// What x is, with its unit.
    pub x_label: String,
    /// What y is, with its unit.
    pub y_label: String,
    /// The curves, later ones in front.
    pub series: Vec<Series>,
    /// Values to compare with.
    pub baselines: Vec<Baseline>,
    /// Lowest and highest y. By default everything fits in, from zero where the values come near it.
    pub y_range: Option<(f64, f64)>,
    /// How x is laid out.
    pub x_axis: Axis,
    /// How y is laid out.
    pub y_axis: Axis,
    /// The ground and its colours.
    pub theme: Theme,
    /// Pixels.
    pub size: Size,
}

/// One curve.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Series {
    /// Its name in the legend.
    pub name: String,
    /// `(x, y)` in the order in which they are joined. However many there are, the curve shows every peak.
    pub points: Vec<(f64, f64)>,
    /// Lowest and highest y at each point, shaded behind the curve: an interval, or the spread over seeds.
    pub band: Option<Vec<(f64, f64)>>,
    /// How the points are joined.
    pub stroke: Stroke,
    /// Number of its colour in the palette; its place in the list where not given. Two series that belong together,
    /// such as raw and smoothed values, can share one.
    pub color: Option<usize>,
}

/// How the points of a series are joined.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Stroke {
    /// A solid line.
    #[default]
    Solid,
    /// A dashed line.
    Dashed,
    /// A thin pale line, for raw values behind smoothed ones.
    Faint,
    /// A solid line with a dot at each point, for values taken now and then.
    Dotted,
}

impl Series {
    /// A solid curve without a band.
    pub fn new(name: impl Into<String>, points: impl IntoIterator<Item = (f64, f64)>) -> Self {
        Self { name: name.into(), points: points.into_iter().collect(), ..Self::default() }
    }

    /// The same curve with each y replaced by the mean over the `window` points around it. Towards the ends the window
    /// shrinks on both sides alike, so that it stays centred and a straight line stays one. An even window is taken as
    /// the odd one below it. The band is left out.
    pub fn smoothed(&self, window: usize) -> Self {
        let half = window.saturating_sub(1) / 2;
        // Sums of everything before a point, so that long windows cost no more than short ones.
        let mut sums = vec![0.];
        sums.extend(self.points.iter().scan(0., |sum, (_, y)| {
            *sum += y;
            Some(*sum)
        }));
        let n = self.points.len();
        let mean = |i: usize| {
            let half = half.min(i).min(n - 1 - i);
            let (start, end) = (i - half, i + half + 1);
            (sums[end] - sums[start]) / (end - start) as f64
        };
        let points = self.points.iter().enumerate().map(|(i, (x, _))| (*x, mean(i))).collect();
        Self { points, band: None, ..self.clone() }
    }
}

impl Draw for LineChart {
    fn size(&self) -> Size {
        self.size
    }

    fn theme(&self) -> Theme {
        self.theme
    }

    fn alt(&self) -> Alt {
        let curve = |series: &Series| {
            let ends = series.points.first().zip(series.points.last());
            let ends = ends.map_or(String::new(), |((x0, y0), (x1, y1))| {
                let [x0, y0, x1, y1] = [*x0, *y0, *x1, *y1].map(brief);
                format!(", {} points from {y0} at {x0} to {y1} at {x1}", series.points.len())
            });
            format!("{}{ends}", series.name)
        };
        let curves: Vec<String> = self.series.iter().map(curve).collect();
        let description =
            format!("Curves of {} over {}. {}.", self.y_label, self.x_label, curves.join("; "));
        Alt { title: self.title.clone(), description }
    }

    fn draw(&self, pen: &Pen) -> Result<(), Error> {
        let (xs, ys) = self.extent()?;
        let words = Words {
            title: self.title.clone(),
            subtitle: self.subtitle.clone(),
            x_label: self.x_label.clone(),
            y_label: self.y_label.clone(),
            legend: self.legend(),
        };
        let frame = Frame::new(pen, self.size, self.theme, words, (self.y_axis, ys.0, ys.1), 1);
        let x = Scale::along(self.x_axis, xs.0, xs.1, x_ticks(&frame, self.x_axis, xs));
        let x = if self.x_axis == Axis::Linear && self.counts() { x.whole() } else { x };
        self.draw_curves(pen, &frame, &x)
    }
}

/// Lowest and highest value of an axis.
type Bounds = (f64, f64);

impl LineChart {
    /// Checks every number and finds the ranges of both axes.
    fn extent(&self) -> Result<(Bounds, Bounds), Error> {
        let chart = format!("chart `{}`", self.title);
        if self.series.is_empty() {
            return Err(Error::Empty { place: chart, expected: "series" });
        }
        let (mut xs, mut ys) = (Extent::default(), Extent::default());
        for series in &self.series {
            let place = format!("series `{}` of {chart}", series.name);
            if series.points.is_empty() {
                return Err(Error::Empty { place, expected: "point" });
            }
            for (i, (x, y)) in series.points.iter().enumerate() {
                xs.add(finite(*x, || format!("x of point {i} in {place}"))?);
                ys.add(finite(*y, || format!("y of point {i} in {place}"))?);
            }
            let Some(band) = &series.band else { continue };
            if band.len() != series.points.len() {
                return Err(Error::BandLength {
                    place,
                    n_points: series.points.len(),
                    n_bounds: band.len(),
                });
            }
            for (i, (low, high)) in band.iter().enumerate() {
                ys.add(finite(*low, || format!("lower bound {i} of the band of {place}"))?);
                ys.add(finite(*high, || format!("upper bound {i} of the band of {place}"))?);
                if low > high {
                    let place = format!("bound {i} of the band of {place}");
                    return Err(Error::Range { place, low: *low, high: *high });
                }
            }
        }
        for Baseline { label, value } in &self.baselines {
            ys.add(finite(*value, || format!("baseline `{label}` of {chart}"))?);
        }

        for (axis, which, low) in [(self.x_axis, "x", xs.low), (self.y_axis, "y", ys.low)] {
            if axis == Axis::Log && low <= 0. {
                return Err(Error::Log { place: format!("an {which} of {chart}"), value: low });
            }
        }
        let x_range = match self.x_axis {
            Axis::Linear => {
                let pad = (xs.high - xs.low) * 0.015;
                (xs.low - pad, xs.high + pad)
            }
            Axis::Log => (xs.low / 1.05, xs.high * 1.05),
        };
        let y_range = match self.y_range {
            None if self.y_axis == Axis::Log => (ys.low / 1.15, ys.high * 1.15),
            None => ys.padded(),
            Some((low, high)) => {
                finite(low, || format!("the lower end of the y range of {chart}"))?;
                finite(high, || format!("the upper end of the y range of {chart}"))?;
                if low >= high {
                    return Err(Error::Range {
                        place: format!("the y range of {chart}"),
                        low,
                        high,
                    });
                }
                (low, high)
            }
        };
        Ok((x_range, y_range))
    }

    /// Whether every x is a whole number, such as a step: half of one then means nothing.
    fn counts(&self) -> bool {
        self.series.iter().flat_map(|series| &series.points).all(|(x, _)| x.fract() == 0.)
    }

    fn legend(&self) -> Vec<Entry> {
        let series = self.series.iter().enumerate().filter(|(_, series)| !series.name.is_empty());
        let series = series.map(|(i, series)| Entry {
            name: series.name.clone(),
            color: self.color_of(i),
            mark: match series.stroke {
                Stroke::Solid | Stroke::Faint => Mark::Line,
                Stroke::Dashed => Mark::Dashes,
                Stroke::Dotted => Mark::DottedLine,
            },
        });
        let baselines = self.baselines.iter().map(|baseline| Entry {
            name: baseline.label.clone(),
            color: self.theme.muted(),
            mark: Mark::Dashes,
        });
        series.chain(baselines).collect()
    }

    fn color_of(&self, index: usize) -> crate::Color {
        let series = &self.series[index];
        let color = self.theme.color(series.color.unwrap_or(index));
        if series.stroke == Stroke::Faint { self.theme.washed(color, 0.35) } else { color }
    }

    fn draw_curves(&self, pen: &Pen, frame: &Frame<'_>, x: &Scale) -> Result<(), Error> {
        let unit = frame.unit;
        let x_of = |value: f64| frame.left + x.fraction(value) * (frame.right - frame.left);
        for tick in x.ticks() {
            pen.rectangle(
                (x_of(tick) - 0.5, frame.top),
                (x_of(tick) + 0.5, frame.bottom),
                self.theme.grid(),
            )?;
        }
        frame.grid()?;
        for baseline in &self.baselines {
            frame.baseline(baseline.value, self.theme.muted())?;
        }
        for (i, series) in self.series.iter().enumerate() {
            if let Some(band) = &series.band {
                let bounds = |bound: fn(&(f64, f64)) -> f64| {
                    let points = series.points.iter().zip(band);
                    let pixels = points.map(|((x, _), range)| (x_of(*x), frame.y_of(bound(range))));
                    thinned(pixels)
                };
                let mut outline = bounds(|range| range.1);
                outline.extend(bounds(|range| range.0).into_iter().rev());
                pen.polygon(&outline, self.color_of(i), 0.22)?;
            }
        }
        for (i, series) in self.series.iter().enumerate() {
            let color = self.color_of(i);
            let points = thinned(series.points.iter().map(|(x, y)| (x_of(*x), frame.y_of(*y))));
            match series.stroke {
                Stroke::Faint => pen.line(&points, 1.5 * unit, color)?,
                Stroke::Dashed => pen.dashed(&points, (8. * unit, 5. * unit), 2.5 * unit, color)?,
                Stroke::Solid => pen.line(&points, 2.75 * unit, color)?,
                Stroke::Dotted => pen.line(&points, 2.5 * unit, color)?,
            }
            // A single point has no line to be seen by.
            if series.stroke == Stroke::Dotted || series.points.len() == 1 {
                for point in &points {
                    pen.disc(*point, 5. * unit, color)?;
                }
            }
        }
        let font = frame.small();
        let labels: Vec<_> =
            x.ticks().into_iter().map(|tick| (x_of(tick), vec![(x.label(tick), font)])).collect();
        frame.finish(&labels)
    }
}

/// As many ticks as have room for their labels, eight at most.
fn x_ticks(frame: &Frame<'_>, axis: Axis, (low, high): (f64, f64)) -> usize {
    let wanted = Scale::along(axis, low, high, 8);
    let widths = wanted.ticks().into_iter();
    let widest = widths
        .map(|tick| frame.pen.width_of(&wanted.label(tick), frame.small()))
        .fold(0., f64::max);
    let room = (frame.right - frame.left) / (widest + 24. * frame.unit);
    (room as usize).saturating_sub(2).clamp(2, 8)
}

/// The smallest stretch of numbers that holds all that were added.
#[derive(Debug, Clone, Copy)]
struct Extent {
    low: f64,
    high: f64,
}

impl Default for Extent {
    fn default() -> Self {
        Self { low: f64::INFINITY, high: f64::NEG_INFINITY }
    }
}

impl Extent {
    fn add(&mut self, value: f64) {
        self.low = self.low.min(value);
        self.high = self.high.max(value);
    }

    /// With some room above and below, and from zero where zero is near.
    fn padded(self) -> (f64, f64) {
        let Self { low, high } = self;
        let pad = (high - low) * 0.06;
        let near_zero = low >= 0. && low < (high - low) * 0.5;
        (if near_zero { 0. } else { low - pad }, high + pad)
    }
}

/// Keeps, of each run of points that share a pixel column, the first, the lowest, the highest and the last: what is
/// left looks the same.
fn thinned(points: impl IntoIterator<Item = (f64, f64)>) -> Vec<(f64, f64)> {
    let mut kept: Vec<(f64, f64)> = Vec::new();
    let mut run: Option<Run> = None;
    for point in points {
        match &mut run {
            Some(run) if run.column == point.0.floor() => run.add(point),
            _ => {
                kept.extend(run.take().into_iter().flat_map(Run::points));
                run = Some(Run::new(point));
            }
        }
    }
    kept.extend(run.into_iter().flat_map(Run::points));
    kept
}

/// Neighbouring points in one pixel column.
#[derive(Debug, Clone, Copy)]
struct Run {
    column: f64,
    len: usize,
    first: (f64, f64),
    last: (f64, f64),
    /// With its place in the run, as the points below.
    lowest: (usize, (f64, f64)),
    highest: (usize, (f64, f64)),
}

impl Run {
    fn new(point: (f64, f64)) -> Self {
        let column = point.0.floor();
        Self { column, len: 1, first: point, last: point, lowest: (0, point), highest: (0, point) }
    }

    fn add(&mut self, point: (f64, f64)) {
        if point.1 < self.lowest.1.1 {
            self.lowest = (self.len, point);
        }
        if point.1 > self.highest.1.1 {
            self.highest = (self.len, point);
        }
        self.last = point;
        self.len += 1;
    }

    fn points(self) -> impl Iterator<Item = (f64, f64)> {
        let mut points =
            vec![(0, self.first), self.lowest, self.highest, (self.len - 1, self.last)];
        points.sort_by_key(|(i, _)| *i);
        points.dedup_by_key(|(i, _)| *i);
        points.into_iter().map(|(_, point)| point)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thinning_keeps_every_peak_in_order() {
        let mut points: Vec<(f64, f64)> = (0..10_000).map(|i| (f64::from(i) / 100., 0.)).collect();
        points[5_050].1 = 9.;
        points[5_060].1 = -9.;

        let kept = thinned(points.iter().copied());

        assert!(kept.len() <= 4 * 101, "{}", kept.len());
        assert!(kept.contains(&(50.5, 9.)) && kept.contains(&(50.6, -9.)));
        assert!(kept.is_sorted_by(|a, b| a.0 < b.0));
        assert_eq!((kept.first(), kept.last()), (points.first(), points.last()));
    }

    #[test]
    fn few_points_are_left_alone() {
        let points = [(0., 1.), (5., 2.), (3., 4.), (3.2, 5.)];
        assert_eq!(thinned(points), points);
    }

    #[test]
    fn smoothing_takes_the_mean_of_a_centred_window() {
        let series = Series::new("loss", [(0., 4.), (1., 1.), (2., 4.), (3., 1.), (4., 4.)]);
        assert_eq!(series.smoothed(3).points, [(0., 4.), (1., 3.), (2., 2.), (3., 3.), (4., 4.)]);
        assert_eq!(series.smoothed(1), series);
        assert_eq!(series.smoothed(100).points[2], (2., 2.8));
        assert!(Series::default().smoothed(5).points.is_empty());
    }

    #[test]
    fn smoothing_leaves_a_straight_line_straight_to_its_ends() {
        let line = Series::new("loss", (0..20).map(|i| (f64::from(i), 7. - 0.25 * f64::from(i))));
        assert_eq!(line.smoothed(9), line);
    }
}
