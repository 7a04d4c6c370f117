//! Heat maps in a terminal.

use crate::scale::{Scale, brief};
use crate::{Error, HeatMap, Theme};

/// Cells that a line of text has room for, at two characters each, beside the names.
const LEAST_COLUMNS: usize = 8;

/// From low to high where there are no colours.
const SIGNS: [char; 6] = [' ', '\u{B7}', '\u{2591}', '\u{2592}', '\u{2593}', '\u{2588}'];

/// Characters of the names of rows.
const NAME: usize = 14;

impl HeatMap {
    /// The map as lines of text of at most `width` characters: coloured blocks (24-bit escapes of ANSI X3.64) if `colors`, else signs
    /// from light to dark, which a file or a pager takes. Of more cells than fit, each block shows the largest below it.
    ///
    /// # Errors
    ///
    /// As [`Picture::svg`](crate::Picture::svg).
    pub fn text(&self, width: usize, colors: bool) -> Result<String, Error> {
        let (low, high) = self.check()?;
        let scale = Scale::new(low, high, 5);
        let room = width.saturating_sub(NAME + 1).max(2 * LEAST_COLUMNS);
        let per_cell = if 2 * self.columns.len() <= room { 2 } else { 1 };
        let n_columns = self.columns.len().min(room / per_cell);
        let n_rows = self.rows.len().min(n_columns.max(24));
        let mut lines = Vec::new();
        for text in [&self.title, &self.subtitle] {
            if !text.is_empty() {
                lines.push(crate::font::shown(text, crate::font::Medium::Svg));
            }
        }
        for row in 0..n_rows {
            let of_row = span(row, self.rows.len(), n_rows);
            let mut line = format!("{:>NAME$} ", short(&self.rows[of_row.start]));
            for column in 0..n_columns {
                let of_column = span(column, self.columns.len(), n_columns);
                let values =
                    self.values[of_row.clone()].iter().flat_map(|row| &row[of_column.clone()]);
                let largest = values.fold(f64::NAN, |found, &value| {
                    if found.is_nan() || value > found { value } else { found }
                });
                line += &block(self, largest, &scale, per_cell, colors);
            }
            if colors {
                line += "\u{1B}[0m";
            }
            lines.push(line.trim_end().to_owned());
        }
        let columns = format!(
            "{} columns, {} to {}",
            self.columns.len(),
            short(&self.columns[0]),
            short(&self.columns[self.columns.len() - 1])
        );
        let mut legend: Vec<String> = [0., 0.25, 0.5, 0.75, 1.]
            .map(|share| {
                let value = low + share * (high - low);
                let sign = block(self, value, &scale, 2, colors);
                let end = if colors { "\u{1B}[0m" } else { "" };
                format!("{sign}{end} {}", brief(value))
            })
            .into();
        if self.values.iter().flatten().any(|value| value.is_nan()) {
            let end = if colors { "\u{1B}[0m" } else { "" };
            legend.push(format!("{}{end} no number", block(self, f64::NAN, &scale, 2, colors)));
        }
        if n_rows < self.rows.len() || n_columns < self.columns.len() {
            legend.push("each block the largest of several cells".into());
        }
        lines.push(format!("{:NAME$} {columns}", ""));
        lines.push(format!("{:NAME$} {}: {}", "", self.value_label, legend.join("  ")));
        Ok(lines.join("\n") + "\n")
    }
}

fn span(at: usize, n: usize, n_shown: usize) -> std::ops::Range<usize> {
    at * n / n_shown..((at + 1) * n).div_ceil(n_shown)
}

fn short(name: &str) -> String {
    let shown = crate::font::shown(name, crate::font::Medium::Svg);
    match shown.chars().count() {
        n if n <= NAME => shown,
        _ => shown.chars().take(NAME - 1).chain(['\u{2026}']).collect(),
    }
}

fn block(map: &HeatMap, value: f64, scale: &Scale, width: usize, colors: bool) -> String {
    if colors {
        let [r, g, b] = match value.is_nan() {
            true => Theme::Light.missing(),
            false => map.shades.color(scale.fraction(value), map.theme),
        };
        return format!("\u{1B}[48;2;{r};{g};{b}m{}", " ".repeat(width));
    }
    let sign = match value.is_nan() {
        true => '?',
        false => {
            let step = scale.fraction(value).clamp(0., 1.) * (SIGNS.len() - 1) as f64;
            SIGNS[step.round() as usize]
        }
    };
    sign.to_string().repeat(width)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(n: usize) -> HeatMap {
        HeatMap {
            title: "heads".into(),
            value_label: "score".into(),
            rows: (0..n).map(|i| format!("layer {i}")).collect(),
            columns: (0..n).map(|i| format!("head {i}")).collect(),
            values: (0..n)
                .map(|row| (0..n).map(|column| f64::from(row == column)).collect())
                .collect(),
            ..HeatMap::default()
        }
    }

    #[test]
    fn plain_text_has_no_escapes_and_shows_where_values_are_high() {
        let text = map(3).text(80, false).unwrap();
        assert!(!text.contains('\u{1B}'));
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "heads");
        let full = |line: &str| line.find('\u{2588}').map(|at| line[..at].chars().count());
        let places: Vec<Option<usize>> = lines[1..4].iter().map(|line| full(line)).collect();
        assert_eq!(places, [Some(NAME + 1), Some(NAME + 3), Some(NAME + 5)]);
    }

    #[test]
    fn colours_are_those_of_the_picture() {
        let map = map(3);
        let text = map.text(80, true).unwrap();
        let [r, g, b] = map.shades.color(1., map.theme);
        assert_eq!(text.matches(&format!("\u{1B}[48;2;{r};{g};{b}m")).count(), 3 + 1);
    }

    #[test]
    fn nothing_high_is_lost_where_cells_share_a_block() {
        let mut map = map(500);
        map.values = vec![vec![0.; 500]; 500];
        map.values[321][77] = 1.;
        let text = map.text(80, false).unwrap();
        assert!(text.lines().all(|line| line.chars().count() <= 160));
        assert_eq!(
            text.lines()
                .filter(|line| line.starts_with("     layer") && line.contains('\u{2588}'))
                .count(),
            1
        );
    }
}
