//! Scores the heads of a language model by the gradients of its loss at their gates (Michel et al. 2019):
//! `cargo run -p attn-eval --example score_heads results/models/wikitext-gpt2`

use std::{error::Error, ops::ControlFlow, path::Path};

use attn_core::{LoadOptions, Model};
use attn_data::batch::Encoded;
use attn_eval::{Batching, HeadScores, Method, RowLoss, score_heads};

#[allow(clippy::print_stdout, reason = "an example prints")]
fn main() -> Result<(), Box<dyn Error>> {
    let folder = std::env::args().nth(1).ok_or("usage: score_heads MODEL")?;
    for (layer, heads) in scores(Path::new(&folder))?.scores.iter().enumerate() {
        println!("layer {layer}: {heads:.4?}");
    }
    Ok(())
}

/// What each head matters to the next token of a few made-up rows; `attn_data` reads real ones.
pub(crate) fn scores(folder: &Path) -> Result<HeadScores, Box<dyn Error>> {
    let (model, _) = Model::load(folder, &LoadOptions::default())?;
    let vocab = model.config().sizes.vocab_size as u32;
    let row = |index: usize| Encoded {
        ids: (0..32).map(|i| (i * i * 31 + 17 * index as u32) % vocab).collect(),
        label: None,
        index,
        second_from: None,
    };
    let rows: Vec<Encoded> = (0..16).map(row).collect();
    let loss = RowLoss::NextToken;
    let mut go_on = |_| ControlFlow::Continue(());
    let found =
        score_heads(&model, &rows, &[Method::Michel], &loss, &Batching::default(), &mut go_on)?;
    Ok(found.into_iter().next().expect("a method has scores"))
}
