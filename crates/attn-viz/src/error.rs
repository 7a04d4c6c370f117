use std::io;
use std::path::PathBuf;

/// Why a picture or a report could not be made or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A picture without anything to show.
    #[error("{place} is empty, expected at least one {expected}")]
    Empty {
        /// The chart, and the series within it if it is the series that is empty.
        place: String,
        /// What is missing: a series, a point, a bar.
        expected: &'static str,
    },

    /// A number that has no place on an axis.
    #[error("{place} is {value}, expected a finite number")]
    NotFinite {
        /// The chart, and where in it the number stands.
        place: String,
        /// NaN or an infinity.
        value: f64,
    },

    /// A band whose bounds do not belong to the points one by one.
    #[error(
        "{place} has {n_points} points but a band of {n_bounds} bounds, expected one for each point"
    )]
    BandLength {
        /// The chart and the series.
        place: String,
        /// Points of the series.
        n_points: usize,
        /// Pairs of a lower and an upper bound.
        n_bounds: usize,
    },

    /// Values that are not one for each row and column.
    #[error(
        "{place} has {} x {} values, expected {} x {}, one for each row and column", found.0, found.1, expected.0, expected.1
    )]
    Cells {
        /// The heat map.
        place: String,
        /// Rows and columns named.
        expected: (usize, usize),
        /// Rows of values, and the length of one that does not fit.
        found: (usize, usize),
    },

    /// A number that has no logarithm.
    #[error("{place} is {value}, and its axis is logarithmic: expected a number above 0")]
    Log {
        /// The axis and the chart.
        place: String,
        /// The lowest number.
        value: f64,
    },

    /// A group of cells that are not all there.
    #[error("{place} groups {what} {start} to {end} (not included), expected some of its {n}")]
    Group {
        /// The heat map.
        place: String,
        /// Rows or columns.
        what: &'static str,
        /// The first.
        start: usize,
        /// The one behind the last.
        end: usize,
        /// How many there are.
        n: usize,
    },

    /// An interval or a range that is empty or upside down.
    #[error("{place} goes from {low} to {high}, expected the first to be lower")]
    Range {
        /// The chart, and whose range it is.
        place: String,
        /// The lower bound as given.
        low: f64,
        /// The upper bound as given.
        high: f64,
    },

    /// A picture too small to hold its own labels, or too large to hold in memory.
    #[error(
        "a picture of {width} x {height} pixels was asked for\n\
         hint: between 320 x 240 and 8000 x 8000 pixels can be drawn"
    )]
    Size {
        /// Pixels across.
        width: u32,
        /// Pixels down.
        height: u32,
    },

    /// A row of a table that does not fit its columns.
    #[error("{place} has {n_cells} cells, expected {n_columns}, one for each column")]
    Row {
        /// The row and the table.
        place: String,
        /// Columns named.
        n_columns: usize,
        /// Cells of the row.
        n_cells: usize,
    },

    /// Attention weights that are not one for each pair of tokens.
    #[error(
        "{place} has {n_weights} weights, expected {n_rows} x {n_columns}, one for each row and column"
    )]
    Weights {
        /// The sample, the model, the layer and the head.
        place: String,
        /// Tokens that attend.
        n_rows: usize,
        /// Tokens that are attended to.
        n_columns: usize,
        /// Weights given.
        n_weights: usize,
    },

    /// A picture in a report that is something else.
    #[error("the {place} is no SVG: {message}")]
    Svg {
        /// The figure, and for which ground.
        place: String,
        /// What is wrong with it.
        message: String,
    },

    /// The drawing library refused an operation.
    #[error("cannot draw: {message}")]
    Draw {
        /// Its own words.
        message: String,
    },

    /// A file whose name does not say what is to be written.
    #[error("`{}` ends in neither .png nor .svg, the two kinds of pictures that are written", path.display())]
    Format {
        /// The name.
        path: PathBuf,
    },

    /// The picture could not be encoded as PNG.
    #[error("cannot encode `{}` as PNG", path.display())]
    Encode {
        /// Where it should have gone.
        path: PathBuf,
        /// The encoder's reason.
        #[source]
        source: image::ImageError,
    },

    /// The file could not be written.
    #[error("cannot write `{}`", path.display())]
    Write {
        /// The path of the picture or the report.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
}

/// Passes finite numbers on; `place` names the others.
pub(crate) fn finite(value: f64, place: impl FnOnce() -> String) -> Result<f64, Error> {
    if value.is_finite() { Ok(value) } else { Err(Error::NotFinite { place: place(), value }) }
}
