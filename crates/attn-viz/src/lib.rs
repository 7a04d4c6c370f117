//! Pictures from plain numbers and labels: `f64`s and strings in, SVG or PNG out.
//!
//! A kind of picture is one file and one struct with public fields that implements [`Picture`]. What the kinds share
//! (colours, fonts, axes, ticks) lies in the private modules beside them. Fonts are built in, so that a picture of pixels comes
//! out the same on every machine. [`report`] puts pictures, tables and attention weights into one HTML page. This crate does not
//! link LibTorch.
//!
//! ```
//! use attn_viz::{LineChart, Picture, Series};
//!
//! let chart = LineChart {
//!     title: "Fine-tuning on the sample task".into(),
//!     x_label: "step".into(),
//!     y_label: "loss (nats)".into(),
//!     series: vec![Series::new("train", [(0., 0.69), (50., 0.41), (100., 0.22)])],
//!     ..LineChart::default()
//! };
//! let image = chart.render()?;
//! assert_eq!(image.dimensions(), (1200, 720));
//! # Ok::<(), attn_viz::Error>(())
//! ```

mod bar;
mod canvas;
mod columns;
mod error;
mod font;
mod frame;
mod heat;
mod histogram;
mod line;
mod panels;
mod picture;
mod power;
mod raster;
pub mod report;
mod scale;
mod shades;
mod terminal;
mod theme;

pub use bar::{Bar, BarChart};
pub use error::Error;
pub use frame::Baseline;
pub use heat::{Group, HeatMap};
pub use histogram::{Histogram, Values};
pub use image::RgbImage;
pub use line::{LineChart, Series, Stroke};
pub use panels::Panels;
pub use picture::{Picture, Size};
pub use power::PowerLaw;
pub use scale::Axis;
pub use shades::Shades;
pub use theme::{Color, Theme};
