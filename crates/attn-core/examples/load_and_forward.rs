//! Loads a model folder and says what it expects next, by token id:
//! `cargo run -p attn-core --example load_and_forward results/models/wikitext-gpt2 11 205 340`

use std::{error::Error, path::Path};

use attn_core::{ForwardOptions, LoadOptions, Model, ModelInput, Rows};
use tch::{Kind, Tensor};

#[allow(clippy::print_stdout, reason = "an example prints")]
fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let folder = args.next().ok_or("usage: load_and_forward MODEL ID...")?;
    let ids = args.map(|id| id.parse()).collect::<Result<Vec<i64>, _>>()?;
    println!("{:?}", next_tokens(Path::new(&folder), &ids)?);
    Ok(())
}

/// The five likeliest next tokens with their probabilities.
pub(crate) fn next_tokens(folder: &Path, ids: &[i64]) -> Result<Vec<(i64, f64)>, Box<dyn Error>> {
    // Every tensor of the file is used and every parameter filled, or this is an error with both lists.
    let (model, _) = Model::load(folder, &LoadOptions::default())?;
    let input = ModelInput::new(Tensor::from_slice(ids).unsqueeze(0));
    let options = ForwardOptions { attentions: Rows::All, ..ForwardOptions::default() };
    let output = tch::no_grad(|| model.forward(&input, &options))?;
    // Weights of each layer: [batch, heads, queries, keys].
    assert_eq!(output.attentions[0].size()[2..], [ids.len() as i64; 2]);
    let last = output.logits.get(0).get(ids.len() as i64 - 1);
    let (values, places) = last.softmax(-1, Kind::Double).topk(5, -1, true, true);
    let likeliest = Vec::<i64>::try_from(places)?.into_iter();
    Ok(likeliest.zip(Vec::<f64>::try_from(values)?).collect())
}
