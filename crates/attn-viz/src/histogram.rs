//! How values are spread: scores of heads, entropies.

use crate::canvas::{Alt, Pen};
use crate::error::finite;
use crate::frame::{Entry, Frame, Mark, Words};
use crate::picture::Draw;
use crate::scale::{Scale, brief};
use crate::{Axis, Error, Size, Theme};

/// Counts of values in stretches of equal width. Several sets share the stretches and are drawn over each other as outlines.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Histogram {
    /// What the picture shows; empty for none.
    pub title: String,
    /// A smaller line below the title, for the conditions; empty for none.
    pub subtitle: String,
    /// What the values are, with their unit.
    pub x_label: String,
    /// What is counted, such as `heads`.
    pub y_label: String,
    /// The values, set by set.
    pub sets: Vec<Values>,
    /// Stretches; 0 for as many as the rule of Freedman and Diaconis 1981 gives the largest set, 5 to 60.
    pub n_bins: usize,
    /// The ground and its colours.
    pub theme: Theme,
    /// Pixels.
    pub size: Size,
}

/// One set of values.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Values {
    /// Its name in the legend; empty for none.
    pub name: String,
    /// The values in any order; a NaN is left out and counted below the title.
    pub values: Vec<f64>,
}

impl Draw for Histogram {
    fn size(&self) -> Size {
        self.size
    }

    fn theme(&self) -> Theme {
        self.theme
    }

    fn alt(&self) -> Alt {
        let set = |set: &Values| {
            let mut sorted = numbers(&set.values);
            sorted.sort_by(f64::total_cmp);
            let middle = sorted.get(sorted.len() / 2).map_or(String::new(), |it| {
                format!(
                    ", from {} to {}, median {}",
                    brief(sorted[0]),
                    brief(sorted[sorted.len() - 1]),
                    brief(*it)
                )
            });
            format!("{} {} values{middle}", set.name, sorted.len())
        };
        let sets: Vec<String> = self.sets.iter().map(set).collect();
        let description = format!("Histogram of {}. {}.", self.x_label, sets.join("; "));
        Alt { title: self.title.clone(), description }
    }

    fn draw(&self, pen: &Pen) -> Result<(), Error> {
        let (low, high) = self.range()?;
        let edges = self.edges(low, high);
        let counts: Vec<Vec<usize>> =
            self.sets.iter().map(|set| counted(&numbers(&set.values), &edges)).collect();
        let most = counts.iter().flatten().copied().max().unwrap_or(0).max(1) as f64;
        let named = self.sets.iter().enumerate().filter(|(_, set)| !set.name.is_empty());
        let words = Words {
            title: self.title.clone(),
            subtitle: self.conditions(),
            x_label: self.x_label.clone(),
            y_label: self.y_label.clone(),
            legend: named
                .map(|(i, set)| Entry {
                    name: format!("{} ({})", set.name, numbers(&set.values).len()),
                    color: self.theme.color(i),
                    mark: Mark::Line,
                })
                .collect(),
        };
        let range = (Axis::Linear, 0., most * 1.06);
        let frame = Frame::new(pen, self.size, self.theme, words, range, 1);
        let x = Scale::new(edges[0], edges[edges.len() - 1], 8);
        let x_of = |value: f64| frame.left + x.fraction(value) * (frame.right - frame.left);
        frame.grid()?;
        for (i, counts) in counts.iter().enumerate() {
            let color = self.theme.color(i);
            let mut outline = vec![(x_of(edges[0]), frame.bottom)];
            for (two, &count) in edges.windows(2).zip(counts) {
                let y = frame.y_of(count as f64);
                outline.extend([(x_of(two[0]), y), (x_of(two[1]), y)]);
            }
            outline.push((x_of(edges[edges.len() - 1]), frame.bottom));
            pen.polygon(&outline, color, if counts.len() > 1 { 0.3 } else { 0.8 })?;
            pen.line(&outline, 2. * frame.unit, color)?;
        }
        let font = frame.small();
        let labels: Vec<_> =
            x.ticks().into_iter().map(|tick| (x_of(tick), vec![(x.label(tick), font)])).collect();
        frame.finish(&labels)
    }
}

impl Histogram {
    fn range(&self) -> Result<(f64, f64), Error> {
        let chart = format!("histogram `{}`", self.title);
        if self.sets.is_empty() {
            return Err(Error::Empty { place: chart, expected: "set of values" });
        }
        let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
        for Values { name, values } in &self.sets {
            let place = format!("set `{name}` of {chart}");
            if numbers(values).is_empty() {
                return Err(Error::Empty { place, expected: "number" });
            }
            for value in numbers(values) {
                finite(value, || format!("a value of {place}"))?;
                (low, high) = (low.min(value), high.max(value));
            }
        }
        Ok((low, high))
    }

    fn conditions(&self) -> String {
        let n_missing =
            self.sets.iter().flat_map(|set| &set.values).filter(|it| it.is_nan()).count();
        match (n_missing, self.subtitle.as_str()) {
            (0, text) => text.to_owned(),
            (n, "") => format!("{n} values are no number and left out"),
            (n, text) => format!("{text}; {n} values are no number and left out"),
        }
    }

    fn edges(&self, low: f64, high: f64) -> Vec<f64> {
        let (low, high) = if high > low { (low, high) } else { (low - 0.5, high + 0.5) };
        let n = match self.n_bins {
            0 => {
                let sets = self.sets.iter().map(|set| freedman_diaconis(numbers(&set.values)));
                let width = sets.flatten().fold(f64::INFINITY, f64::min);
                if width.is_finite() {
                    ((high - low) / width).ceil().clamp(5., 60.) as usize
                } else {
                    10
                }
            }
            n => n,
        };
        (0..=n).map(|i| low + (high - low) * i as f64 / n as f64).collect()
    }
}

fn numbers(values: &[f64]) -> Vec<f64> {
    values.iter().copied().filter(|it| !it.is_nan()).collect()
}

/// Twice the distance between the quartiles over the cube root of the number of values; `None` where that is 0.
fn freedman_diaconis(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let at = |share: f64| values[((values.len() - 1) as f64 * share).round() as usize];
    let width = 2. * (at(0.75) - at(0.25)) / (values.len() as f64).cbrt();
    (width > 0.).then_some(width)
}

/// How many values lie between each two edges; the last one belongs to its stretch.
fn counted(values: &[f64], edges: &[f64]) -> Vec<usize> {
    let n = edges.len() - 1;
    let mut counts = vec![0; n];
    for value in values {
        counts[edges[1..n].partition_point(|edge| edge <= value)] += 1;
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_is_counted_once() {
        let edges = [0., 1., 2., 3.];
        assert_eq!(counted(&[0., 0.99, 1., 2., 3., 3.], &edges), [2, 1, 3]);
    }

    #[test]
    fn the_rule_widens_stretches_where_there_are_few_values() {
        let values = |n: usize| (0..n).map(|i| i as f64 / (n - 1) as f64).collect::<Vec<_>>();
        let [few, many] = [values(11), values(1001)].map(|it| freedman_diaconis(it).unwrap());
        assert!((few - 2. * 0.6 / 11_f64.cbrt()).abs() < 0.1 && (many - 0.1).abs() < 1e-3);
        assert_eq!(freedman_diaconis(vec![1.; 20]), None);
    }
}
