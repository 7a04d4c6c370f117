//! Swaps the attention of a model and teaches it what it did before, in a loop of one's own:
//! `cargo run -p attn-train --example own_loop results/models/wikitext-gpt2`

use std::{error::Error, path::Path};

use attn_core::{ForwardOptions, LoadOptions, Model, ModelInput, Variant};
use tch::{Device, Kind, Reduction, Tensor};

#[allow(clippy::print_stdout, reason = "an example prints")]
fn main() -> Result<(), Box<dyn Error>> {
    let folder = std::env::args().nth(1).ok_or("usage: own_loop MODEL")?;
    println!("{:.4?}", distill(Path::new(&folder), 20)?);
    Ok(())
}

/// KL(teacher ‖ student) in nats a token before each step of plain gradient descent.
pub(crate) fn distill(folder: &Path, steps: i64) -> Result<Vec<f64>, Box<dyn Error>> {
    let (teacher, _) = Model::load(folder, &LoadOptions::default())?;
    let mut student = teacher.alias()?; // shares the teacher's memory
    let window: Variant = serde_json::from_str(r#"{"kind": "window", "size": 4}"#)?;
    student.swap(&[0, 1, 2, 3], &window, 0)?;
    student.own(&|_| true); // has memory of its own from here on
    let parameters: Vec<Tensor> =
        student.parameters().into_iter().map(|(_, it)| it.set_requires_grad(true)).collect();
    let mut losses = Vec::new();
    for step in 0..steps {
        let ids = Tensor::arange(4 * 48, (Kind::Int64, Device::Cpu)) * 7 + step;
        let input = ModelInput::new(ids.view([4, 48]));
        let run = |model: &Model| model.forward(&input, &ForwardOptions::default());
        let target = tch::no_grad(|| run(&teacher))?.logits.log_softmax(-1, Kind::Float);
        let log_p = run(&student)?.logits.log_softmax(-1, Kind::Float);
        let loss = log_p.kl_div(&target, Reduction::Sum, true) / (4 * 48);
        losses.push(loss.double_value(&[]));
        let slopes = Tensor::run_backward(&[&loss], &parameters, false, false);
        for (it, slope) in parameters.iter().zip(&slopes) {
            let _ = tch::no_grad(|| it.shallow_clone().g_sub_(&(slope * 0.05)));
        }
    }
    Ok(losses)
}
