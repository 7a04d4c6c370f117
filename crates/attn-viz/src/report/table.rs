use super::markup::line;
use crate::Error;

/// Rows under named columns. The reader sorts them by a click on a name.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Table {
    /// What the table shows.
    pub caption: String,
    /// The columns from left to right; at least one.
    pub columns: Vec<Column>,
    /// A cell for each column; at least one row.
    pub rows: Vec<Vec<Cell>>,
}

/// The head of a column.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Column {
    /// Its name, with the unit.
    pub name: String,
    /// Whether its cells are sorted by their numbers and aligned to the right; by their text and to the left where not.
    pub numeric: bool,
}

impl Column {
    /// A column of words.
    pub fn text(name: impl Into<String>) -> Self {
        Self { name: name.into(), numeric: false }
    }

    /// A column of numbers.
    pub fn number(name: impl Into<String>) -> Self {
        Self { name: name.into(), numeric: true }
    }
}

/// What stands in a row under a column.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Cell {
    /// What is shown; empty for nothing.
    pub text: String,
    /// The number it is sorted by in a column of numbers. Cells without one, and NaN, come last either way.
    pub key: Option<f64>,
}

impl Cell {
    /// Words.
    pub fn text(text: impl Into<String>) -> Self {
        Self { text: text.into(), key: None }
    }

    /// A number as it is to be read, `91.3 ±0.4`, and as it is to be sorted.
    pub fn number(text: impl Into<String>, key: f64) -> Self {
        Self { text: text.into(), key: Some(key) }
    }
}

impl Table {
    /// `n_tables` numbers the tables of a page.
    pub(super) fn html(&self, n_tables: &mut usize) -> Result<String, Error> {
        self.check()?;
        *n_tables += 1;
        let id = format!("table-{n_tables}");
        let head: String = self.columns.iter().map(Column::html).collect();
        let body: String = self.rows.iter().map(|row| self.row(row)).collect();
        // A box that scrolls has to take the focus, or the keyboard cannot scroll it.
        Ok(format!(
            "<div class=\"scroll\" role=\"group\" aria-labelledby=\"{id}\" tabindex=\"0\">\n<table>\n\
             <caption id=\"{id}\">{}</caption>\n<thead>\n<tr>{head}</tr>\n</thead>\n<tbody>\n{body}</tbody>\n</table>\n</div>\n",
            line(&self.caption)
        ))
    }

    fn row(&self, row: &[Cell]) -> String {
        let cells: String =
            self.columns.iter().zip(row).map(|(column, cell)| cell.html(column)).collect();
        format!("<tr>{cells}</tr>\n")
    }

    fn check(&self) -> Result<(), Error> {
        let place = || format!("table `{}`", self.caption);
        for (n, expected) in [(self.columns.len(), "column"), (self.rows.len(), "row")] {
            if n == 0 {
                return Err(Error::Empty { place: place(), expected });
            }
        }
        match self.rows.iter().position(|row| row.len() != self.columns.len()) {
            None => Ok(()),
            Some(row) => Err(Error::Row {
                place: format!("row {} of {}", row + 1, place()),
                n_columns: self.columns.len(),
                n_cells: self.rows[row].len(),
            }),
        }
    }
}

impl Column {
    fn html(&self) -> String {
        let class = if self.numeric { " class=\"number\"" } else { "" };
        format!("<th scope=\"col\"{class}>{}</th>", line(&self.name))
    }
}

impl Cell {
    fn html(&self, column: &Column) -> String {
        let class = if column.numeric { " class=\"number\"" } else { "" };
        let key = match self.key.filter(|key| column.numeric && !key.is_nan()) {
            None => String::new(),
            Some(f64::INFINITY) => " data-key=\"Infinity\"".into(),
            Some(f64::NEG_INFINITY) => " data-key=\"-Infinity\"".into(),
            Some(key) => format!(" data-key=\"{key:e}\""),
        };
        format!("<td{class}{key}>{}</td>", line(&self.text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(rows: Vec<Vec<Cell>>) -> Table {
        let columns = vec![Column::text("model"), Column::number("loss")];
        Table { caption: "losses".into(), columns, rows }
    }

    fn message(table: &Table) -> String {
        table.html(&mut 0).unwrap_err().to_string()
    }

    #[test]
    fn keys_are_numbers_that_scripts_read() {
        let row = |key| vec![Cell::text("m"), Cell::number("shown", key)];
        let keys = [0.1, -3e-300, f64::INFINITY, f64::NAN];
        let html = table(keys.map(row).into()).html(&mut 0).unwrap();
        for expected in ["\"1e-1\"", "\"-3e-300\"", "\"Infinity\"", "<td class=\"number\">shown"] {
            assert!(html.contains(expected), "{expected}: {html}");
        }
    }

    #[test]
    fn a_row_with_a_cell_too_few_is_named() {
        let rows = vec![vec![Cell::text("a"), Cell::default()], vec![Cell::text("b")]];
        assert_eq!(
            message(&table(rows)),
            "row 2 of table `losses` has 1 cells, expected 2, one for each column"
        );
        assert_eq!(message(&table(vec![])), "table `losses` is empty, expected at least one row");
    }
}
