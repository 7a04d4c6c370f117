//! Fewer and more key/value heads, against models whose heads are made alike.

#[path = "common/small.rs"]
mod small;

use attn_core::{
    ForwardOptions, Gate, Model, ModelInput, Pooling,
    config::LayerSpec,
    pool_kv,
    testing::{assert_close, random_ids},
};
use small::{BASES, logits, model};
use tch::{Kind, Tensor};

fn input() -> ModelInput {
    ModelInput::new(random_ids(9, [2, 11], 50))
}

/// Logits with the second head of layer 0 closed and its last one at 0.3.
fn gated(model: &Model) -> Tensor {
    let gates = [Some(Gate::per_head(&Tensor::from_slice(&[1.0, 0.0, 1.0, 0.3]))), None];
    let options = ForwardOptions { gates: &gates, ..ForwardOptions::default() };
    model.forward(&input(), &options).unwrap().logits
}

/// Writes what `head` gives for each key/value head of each layer over it, in keys and values: matrices and biases.
fn rewrite(model: &Model, head: impl Fn(&Tensor, i64) -> Tensor) {
    for layer in model.layers() {
        let (n, d) = (layer.dims().n_kv_heads, layer.dims().head_dim);
        let projections = layer.projections(); // Views of the layer's own.
        for (weight, bias) in [&projections.k, &projections.v] {
            for all in [Some(weight), bias.as_ref()].into_iter().flatten() {
                let by_head =
                    all.copy().view([vec![n, d], all.size()[1..].to_vec()].concat().as_slice());
                for at in 0..n {
                    tch::no_grad(|| all.narrow(0, at * d, d).copy_(&head(&by_head, at)));
                }
            }
        }
    }
}

/// Many heads that are all what their groups' one head is compute what grouped queries compute: of neighbours, and by each way of pooling.
#[test]
fn grouped_queries_are_heads_made_alike() {
    for base in BASES {
        let n_kv = model(base).layers()[0].dims().n_kv_heads;
        for n_new in [1, 2].into_iter().filter(|&n| n < n_kv) {
            let group = n_kv / n_new;
            for pooling in [Pooling::Mean, Pooling::First] {
                let alike = model(base);
                rewrite(&alike, |all, at| {
                    let members = all.narrow(0, at / group * group, group);
                    match pooling {
                        Pooling::Mean => members.mean_dim([0i64].as_slice(), false, Kind::Double),
                        _ => members.get(0),
                    }
                });
                let mut grouped = model(base);
                pool_kv(&mut grouped, &[0, 1], n_new, pooling).unwrap();
                let context = format!("{base} {n_new} {pooling:?}");
                assert_close(
                    &context,
                    &logits(&grouped, &input()),
                    &logits(&alike, &input()),
                    1e-12,
                );
                let before = logits(&model(base), &input());
                assert!(
                    (logits(&grouped, &input()) - before).abs().max().double_value(&[]) > 1e-3,
                    "{context}"
                );
                // A gate still means the same query head.
                assert_close(&context, &gated(&grouped), &gated(&alike), 1e-12);
                // Made alike before, pooling loses nothing.
                let mut again = alike;
                let before = logits(&again, &input());
                pool_kv(&mut again, &[0, 1], n_new, Pooling::Mean).unwrap();
                assert_close(&context, &logits(&again, &input()), &before, 1e-12);
            }
        }
    }
}

#[test]
fn more_heads_are_copies_side_by_side_that_change_nothing() {
    let mut model = model("llama");
    let before = logits(&model, &input());
    let old = model.layers()[1].projections().k.0.copy();
    pool_kv(&mut model, &[1], 4, Pooling::Mean).unwrap();
    assert_eq!(model.layers()[1].dims().kv_of_head, [0, 1, 2, 3]);
    assert_eq!(model.layers()[0].dims().n_kv_heads, 2, "another layer");
    let d = model.layers()[1].dims().head_dim;
    for (new, of) in [(0, 0), (1, 0), (2, 1), (3, 1)] {
        let new = model.layers()[1].projections().k.0.narrow(0, new * d, d);
        assert_eq!(new, old.narrow(0, of * d, d));
    }
    assert_close("llama", &logits(&model, &input()), &before, 1e-12);
    // As many as there are: not a bit.
    let before = logits(&model, &input());
    pool_kv(&mut model, &[1], 4, Pooling::Mean).unwrap();
    assert_eq!(logits(&model, &input()), before);
}

#[test]
fn a_drawn_head_is_one_of_its_group_with_keys_and_values_of_one() {
    let whole = model("gpt2");
    let mut seen = std::collections::BTreeSet::new();
    for seed in 0..12 {
        let mut drawn = model("gpt2");
        pool_kv(&mut drawn, &[0, 1], 2, Pooling::Random { seed }).unwrap();
        let (new, old) = (drawn.layers()[0].projections(), whole.layers()[0].projections());
        let d = whole.layers()[0].dims().head_dim;
        for g in 0..2 {
            let is = |head: i64| {
                let same = |new: &Tensor, old: &Tensor| {
                    new.narrow(0, g * d, d) == old.narrow(0, head * d, d)
                };
                same(&new.k.0, &old.k.0) && same(&new.v.0, &old.v.0)
            };
            let member =
                [2 * g, 2 * g + 1].into_iter().find(|&head| is(head)).expect("one of its group");
            seen.insert(member);
        }
    }
    assert_eq!(seen.len(), 4, "each comes up");
}

#[test]
fn a_llama_with_fewer_heads_is_an_ordinary_folder() {
    let mut grouped = model("llama");
    pool_kv(&mut grouped, &[0, 1], 1, Pooling::Mean).unwrap();
    assert!(grouped.config().is_plain());
    assert_eq!(grouped.config().layers[0], LayerSpec::plain(4, 1));
    let mut one = model("llama");
    pool_kv(&mut one, &[1], 1, Pooling::Mean).unwrap();
    assert!(!one.config().is_plain(), "layers differ");
}

#[test]
fn numbers_that_cannot_be_are_refused_and_nothing_is_changed() {
    let mut model = model("gpt2");
    let before = logits(&model, &input());
    for (layers, n, said) in [
        (vec![0, 1], 3, "4 cannot become 3"),
        (vec![0, 1], 0, "expected 1 to 4"),
        (vec![0, 1], 8, "expected 1 to 4"),
        (vec![0, 2], 2, "layer"),
    ] {
        let error = pool_kv(&mut model, &layers, n, Pooling::Mean).unwrap_err().to_string();
        assert!(error.contains(said), "{error}");
    }
    assert_eq!(logits(&model, &input()), before);
}
