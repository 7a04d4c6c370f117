//! Heat maps in a terminal.

use crate::columns::{Piece, columns_of, cut, wrapped};
use crate::font::{Medium, shown};
use crate::heat::keep;
use crate::scale::{Scale, brief};
use crate::{Error, HeatMap, Shades, Theme};

/// Columns of the narrowest line.
const LEAST_WIDTH: usize = 24;

/// Cells that a line of text has room for, at two characters each, beside the names.
const LEAST_COLUMNS: usize = 8;

/// From low to high where there are no colours.
const SIGNS: [char; 6] = [' ', '\u{B7}', '\u{2591}', '\u{2592}', '\u{2593}', '\u{2588}'];

/// Columns of the names of rows.
const NAME: usize = 14;

impl HeatMap {
    /// The map as lines of text of at most `width` columns of the terminal, 24 where that is less: coloured blocks (24-bit escapes of
    /// ANSI X3.64) if `colors`, else signs from light to dark, which a file or a pager takes. Of more cells than fit, each block
    /// shows the largest below it (of [`Shades::Diverging`] the one farthest from zero).
    ///
    /// # Errors
    ///
    /// As [`Picture::svg`](crate::Picture::svg).
    pub fn text(&self, width: usize, colors: bool) -> Result<String, Error> {
        let (low, high) = self.check()?;
        let scale = Scale::new(low, high, 5);
        let width = width.max(LEAST_WIDTH);
        let name = NAME.min(width - 1 - 2 * LEAST_COLUMNS);
        let room = width - name - 1;
        let per_cell = if 2 * self.columns.len() <= room { 2 } else { 1 };
        let n_columns = self.columns.len().min(room / per_cell);
        let n_rows = self.rows.len().min(n_columns.max(24));
        let mut lines = Vec::new();
        for text in [&self.title, &self.subtitle] {
            let text = shown(text, Medium::Svg);
            match columns_of(&text) <= width {
                true if text.is_empty() => {}
                true => lines.push(text),
                false => lines.extend(wrapped(&Piece::words(&text, 0), width)),
            }
        }
        let short = |text: &str| cut(&shown(text, Medium::Svg), name);
        for row in 0..n_rows {
            let of_row = span(row, self.rows.len(), n_rows);
            let named = short(&self.rows[of_row.start]);
            let mut line = format!("{}{named} ", " ".repeat(name - columns_of(&named)));
            for column in 0..n_columns {
                let of_column = span(column, self.columns.len(), n_columns);
                let values =
                    self.values[of_row.clone()].iter().flat_map(|row| &row[of_column.clone()]);
                let mut found = f64::NAN;
                for &value in values {
                    match self.shades {
                        Shades::Diverging => keep::<true>(&mut found, value),
                        Shades::Viridis | Shades::TrafficLight => keep::<false>(&mut found, value),
                    }
                }
                line += &block(self, found, &scale, per_cell, colors);
            }
            if colors {
                line += "\u{1B}[0m";
            }
            lines.push(line.trim_end().to_owned());
        }
        let [first, last] = [0, self.columns.len() - 1].map(|i| short(&self.columns[i]));
        let columns = format!("{} columns, {first} to {last}", self.columns.len());
        let is_crowded = n_rows < self.rows.len() || n_columns < self.columns.len();
        for pieces in
            [Piece::words(&columns, 0), self.legend((low, high), &scale, is_crowded, colors)]
        {
            let indented = wrapped(&pieces, room);
            lines.extend(indented.iter().map(|line| format!("{:name$} {line}", "")));
        }
        Ok(lines.join("\n") + "\n")
    }

    /// What the values are, and what a block stands for.
    fn legend(
        &self,
        (low, high): (f64, f64),
        scale: &Scale,
        is_crowded: bool,
        colors: bool,
    ) -> Vec<Piece> {
        let mut pieces = Vec::new();
        if !self.value_label.is_empty() {
            pieces = Piece::words(&format!("{}:", shown(&self.value_label, Medium::Svg)), 0);
        }
        let end = if colors { "\u{1B}[0m" } else { "" };
        let mut add = |value: f64, says: String| {
            let sign = block(self, value, scale, 2, colors);
            let (text, columns) = (format!("{sign}{end} {says}"), 3 + columns_of(&says));
            pieces.push(Piece { text, columns, gap: 2 });
        };
        for share in [0., 0.25, 0.5, 0.75, 1.] {
            let value = low + share * (high - low);
            add(value, brief(value));
        }
        let n_missing = self.values.iter().flatten().filter(|value| value.is_nan()).count();
        if n_missing > 0 {
            add(f64::NAN, "no number:".into());
            let n = self.rows.len() * self.columns.len();
            pieces.extend(Piece::words(&format!("{n_missing} of {n} cells"), 1));
        }
        if is_crowded {
            let kept = self.shades.kept();
            pieces.extend(Piece::words(&format!("each block the {kept} of several cells"), 2));
        }
        pieces
    }
}

fn span(at: usize, n: usize, n_shown: usize) -> std::ops::Range<usize> {
    at * n / n_shown..((at + 1) * n).div_ceil(n_shown)
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
    fn a_lone_negative_value_is_not_lost_in_diverging_colours() {
        let mut map = HeatMap { shades: Shades::Diverging, ..map(200) };
        map.values = vec![vec![0.1; 200]; 200];
        map.values[77][123] = -1.;
        let [r, g, b] = map.shades.color(0., map.theme);
        let text = map.text(80, true).unwrap();
        // Besides that of the legend.
        assert!(text.matches(&format!("\u{1B}[48;2;{r};{g};{b}m")).count() > 1);
        assert!(text.contains("farthest from zero"));
    }

    #[test]
    fn lines_are_as_wide_as_said_whatever_the_labels() {
        let labels = [
            "a",
            "\u{4E2D}\u{6587}\u{5B57}\u{7B26}\u{5F88}\u{957F}\u{7684}",
            "\u{1F98A}\u{1F9EA} fox",
        ];
        for n in [2, 3, 33, 40, 500] {
            for width in [0, 24, 31, 40, 80, 133] {
                let names: Vec<String> = (0..n).map(|i| labels[i % 3].to_owned()).collect();
                let map = HeatMap {
                    title: "a title of many words ".repeat(9) + &"\u{1F98A}".repeat(70),
                    subtitle: "\u{4E2D}\u{6587} ".repeat(40),
                    value_label: "\u{1B}[31mweight".repeat(12),
                    rows: names.clone(),
                    columns: names,
                    ..map(n)
                };
                let text = map.text(width, false).unwrap();
                let widest = text.lines().map(columns_of).max().unwrap();
                assert!(widest <= width.max(LEAST_WIDTH), "{n} in {width}: {widest}\n{text}");
                assert!(!text.contains('\u{1B}'), "no escape of a label");
                let cells = text.lines().filter(|line| line.contains('\u{2588}')).count();
                assert!(cells > n.min(24) / 2, "{text}");
                let colored = map.text(width, true).unwrap();
                let escapes = colored.matches('\u{1B}').count();
                assert_eq!(
                    escapes,
                    colored.matches("\u{1B}[48;2;").count() + colored.matches("\u{1B}[0m").count()
                );
            }
        }
    }

    #[test]
    fn wide_names_leave_the_cells_in_line() {
        let rows = ["\u{4E2D}\u{6587}", "fox", "\u{1F98A}"].map(String::from).to_vec();
        let text = HeatMap { rows, ..map(3) }.text(80, false).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        let full = |line: &str| line.find('\u{2588}').map(|at| columns_of(&line[..at]));
        let places: Vec<Option<usize>> = lines[1..4].iter().map(|line| full(line)).collect();
        assert_eq!(places, [Some(NAME + 1), Some(NAME + 3), Some(NAME + 5)]);
    }

    #[test]
    fn cells_without_a_number_are_counted() {
        let mut map = map(3);
        map.values[1][2] = f64::NAN;
        let text = map.text(120, false).unwrap();
        assert!(text.contains("?? no number: 1 of 9 cells"), "{text}");
    }

    #[test]
    fn nothing_high_is_lost_where_cells_share_a_block() {
        let mut map = map(500);
        map.values = vec![vec![0.; 500]; 500];
        map.values[321][77] = 1.;
        let text = map.text(80, false).unwrap();
        assert!(text.lines().all(|line| columns_of(line) <= 80));
        assert_eq!(
            text.lines()
                .filter(|line| line.starts_with("     layer") && line.contains('\u{2588}'))
                .count(),
            1
        );
    }
}
