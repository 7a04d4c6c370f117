//! Activations computed again in the backward pass change no gradient.

use std::{
    path::Path,
    sync::{Mutex, PoisonError},
};

use attn_core::{
    ForwardOptions, Gate, LoadOptions, Lora, Model, ModelInput, Variant, lora::is_adapter,
    testing::random_ids,
};
use tch::{Kind, Tensor};

/// Held while dropout draws: all tests of this file share LibTorch's random numbers.
static DRAWS: Mutex<()> = Mutex::new(());

fn load(name: &str) -> Model {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    let options = LoadOptions { kind: Kind::Double, ..LoadOptions::default() };
    Model::load(&dir, &options).unwrap().0
}

/// Loss and gradients of the parameters that `wanted` picks; `None` for one that the loss does not reach.
fn gradients(model: &Model, wanted: &dyn Fn(&str) -> bool) -> (f64, Vec<(String, Option<Tensor>)>) {
    let parameters = model.parameters();
    for (name, tensor) in &parameters {
        tensor.shallow_clone().zero_grad();
        let _ = tensor.set_requires_grad(wanted(name));
    }
    let _alone = DRAWS.lock().unwrap_or_else(PoisonError::into_inner);
    tch::manual_seed(9);
    let ids = random_ids(4, [3, 7], 20);
    let mask = Tensor::from_slice(&[1_i64; 21]).view([3, 7]);
    let _ = mask.get(1).narrow(0, 5, 2).fill_(0);
    let options = ForwardOptions { train: true, ..ForwardOptions::default() };
    let output = model.forward(&ModelInput::masked(ids, mask), &options).unwrap();
    let loss = output.logits.square().sum(Kind::Double);
    let loss = output.own_loss.into_iter().fold(loss, |loss, own| loss + own);
    loss.backward();
    let gradient = |(name, tensor): (String, Tensor)| {
        let grad = tensor.grad();
        wanted(&name).then(|| (name, grad.defined().then_some(grad)))
    };
    (loss.double_value(&[]), parameters.into_iter().filter_map(gradient).collect())
}

fn assert_same(name: &str, model: &mut Model, wanted: &dyn Fn(&str) -> bool) {
    model.set_gradient_checkpointing(false).unwrap();
    let (loss, kept) = gradients(model, wanted);
    model.set_gradient_checkpointing(true).unwrap();
    let (again, recomputed) = gradients(model, wanted);
    assert_eq!(loss, again, "{name}: the losses");
    assert!(!kept.is_empty());
    for ((parameter, kept), (_, recomputed)) in kept.iter().zip(&recomputed) {
        match (kept, recomputed) {
            (Some(kept), Some(recomputed)) => {
                let error = (kept - recomputed).abs().max().double_value(&[]);
                let size = kept.abs().max().double_value(&[]);
                assert!(
                    error <= 1e-12 * size,
                    "{name}: {parameter} is off by {error:e} of {size:e}"
                );
            }
            (None, None) => {}
            _ => panic!("{name}: {parameter}: {kept:?} kept, {recomputed:?} recomputed"),
        }
    }
}

#[test]
fn gradients_are_those_of_kept_activations() {
    for name in ["gpt2_lm_tied", "llama_biases", "distilbert_classifier_3", "bert_mlm_tied"] {
        assert_same(name, &mut load(name), &|_| true);
    }
}

#[test]
fn frozen_embeddings_and_adapters_alone_are_no_obstacle() {
    for name in ["gpt2_lm_tied", "llama_biases"] {
        let mut model = load(name);
        model.add_lora(&Lora::default(), 2).unwrap();
        for (name, tensor) in model.parameters().iter().filter(|(name, _)| is_adapter(name)) {
            let seed = name.len() as i64;
            let _ = tch::no_grad(|| tensor.shallow_clone().fill_(0.01 * seed as f64));
        }
        assert_same(name, &mut model, &is_adapter);
    }
}

#[test]
fn a_swap_reaches_the_blocks_that_are_run_again() {
    for variant in attn_core::testing::kinds() {
        if matches!(variant, Variant::Cross(_)) {
            continue; // refuses decoders, see tests/cross.rs
        }
        let mut model = load("gpt2_lm_tied");
        model.set_gradient_checkpointing(true).unwrap();
        model.swap(&[0, 1], &variant, 3).unwrap();
        assert_same(variant.name(), &mut model, &|_| true);
        model.select_heads(1, &[1]).unwrap();
        assert_same("with a head less", &mut model, &|_| true);
    }
}

#[test]
fn what_goes_into_the_layers_is_kept_on_request() {
    for name in ["gpt2_lm_tied", "bert_mlm_tied"] {
        let mut model = load(name);
        for (_, tensor) in model.parameters() {
            let _ = tensor.set_requires_grad(true);
        }
        let inputs = |model: &Model| {
            let _alone = DRAWS.lock().unwrap_or_else(PoisonError::into_inner);
            tch::manual_seed(9);
            let input = ModelInput::new(random_ids(1, [2, 6], 20));
            let options =
                ForwardOptions { train: true, attention_inputs: true, ..ForwardOptions::default() };
            let inputs = model.forward(&input, &options).unwrap().attention_inputs;
            inputs.iter().map(|x| x.square().sum(Kind::Double)).sum::<Tensor>().backward();
            let gradient = |(_, tensor): (String, Tensor)| {
                let gradient = tensor.grad();
                let own = gradient.defined().then(|| gradient.copy());
                tensor.shallow_clone().zero_grad();
                own
            };
            (inputs, model.parameters().into_iter().map(gradient).collect::<Vec<_>>())
        };
        let kept = inputs(&model);
        model.set_gradient_checkpointing(true).unwrap();
        let recomputed = inputs(&model);
        assert_eq!((kept.0.len(), recomputed.0.len()), (2, 2));
        for (kept, recomputed) in kept.0.iter().zip(&recomputed.0) {
            assert!(kept.equal(recomputed), "{name}");
        }
        let mut n = 0;
        for (kept, recomputed) in kept.1.iter().zip(&recomputed.1) {
            let Some(kept) = kept else { continue };
            let recomputed = recomputed.as_ref().expect("a gradient as without");
            n += usize::from(kept.abs().max().double_value(&[]) > 0.0);
            assert!((kept - recomputed).abs().max().double_value(&[]) < 1e-12, "{name}");
        }
        assert!(n > 5, "a test of nothing");
    }
}

#[test]
fn what_would_be_lost_is_refused() {
    let mut model = load("gpt2_lm_tied");
    model.set_gradient_checkpointing(true).unwrap();
    let gate = || Some(Gate::per_head(&Tensor::ones([2], (Kind::Double, tch::Device::Cpu))));
    let gates = [gate(), gate()];
    let _alone = DRAWS.lock().unwrap_or_else(PoisonError::into_inner);
    let input = ModelInput::new(random_ids(1, [1, 4], 20));
    let train = ForwardOptions { train: true, gates: &gates, ..ForwardOptions::default() };
    let error = model.forward(&input, &train).unwrap_err().to_string();
    assert!(error.contains("turn gradient checkpointing off"), "{error}");
    model.forward(&input, &ForwardOptions { train: false, ..train }).unwrap();
    let train = ForwardOptions { train: true, ..ForwardOptions::default() };
    let error = model.step(&input, &mut model.start(), &train).unwrap_err().to_string();
    assert!(error.contains("a decoding step is no training pass"), "{error}");
}
