//! Draws a matrix, without LibTorch: `cargo run -p attn-viz --example matrix matrix.svg`

use std::{error::Error, path::Path};

use attn_viz::{HeatMap, Picture};

#[allow(clippy::print_stdout, reason = "an example prints")]
fn main() -> Result<(), Box<dyn Error>> {
    let out = std::env::args().nth(1).ok_or("usage: matrix OUT.png|OUT.svg")?;
    let map = matrix();
    map.save(Path::new(&out))?;
    print!("{}", map.text(80, false)?); // in a terminal, without a file
    Ok(())
}

/// What each token attends to; none sees those behind it.
pub(crate) fn matrix() -> HeatMap {
    let tokens = ["the", "cat", "sat", "there"].map(String::from).to_vec();
    HeatMap {
        title: "Who attends to whom".into(),
        x_label: "attended to".into(),
        y_label: "token".into(),
        value_label: "weight".into(),
        rows: tokens.clone(),
        columns: tokens,
        values: vec![
            vec![1.0, f64::NAN, f64::NAN, f64::NAN],
            vec![0.6, 0.4, f64::NAN, f64::NAN],
            vec![0.1, 0.7, 0.2, f64::NAN],
            vec![0.1, 0.5, 0.3, 0.1],
        ],
        ..HeatMap::default()
    }
}
