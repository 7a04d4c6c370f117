//! Fewer and more key/value heads, against models whose heads are made alike.

mod common;
#[path = "common/small.rs"]
mod small;

use attn_core::{
    ForwardOptions, Gate, LoadOptions, Merge, Merged, Model, ModelInput, Moments, StreamedRefit,
    Variant, begin_merging,
    checkpoint::WriteOptions,
    config::LayerSpec,
    expanded, merge_kv, merge_learned, save_multi_query,
    testing::{assert_close, randn, random_ids},
};
use small::{BASES, logits, model};
use tch::{Device, Kind, Tensor};

fn input() -> ModelInput {
    ModelInput::new(random_ids(9, [2, 11], 50))
}

fn pool(
    model: &mut Model,
    layers: &[usize],
    n: i64,
    method: Merge,
) -> Result<Vec<Merged>, attn_core::Error> {
    let wanted: Vec<(usize, i64)> = layers.iter().map(|&layer| (layer, n)).collect();
    merge_kv(model, &wanted, method, None)
}

/// Text that moments are taken of, some of it padding.
fn calibration() -> Vec<ModelInput> {
    let input = |seed: u64| {
        let mask = Tensor::ones([4, 20], (Kind::Int64, Device::Cpu));
        let _ = mask.get(3).narrow(0, 13, 7).fill_(0);
        ModelInput::masked(random_ids(seed, [4, 20], 50), mask)
    };
    vec![input(31), input(32), ModelInput::new(random_ids(33, [3, 15], 50))]
}

fn moments(model: &Model) -> Moments {
    let mut moments = Moments::of_layers(&[0, 1]);
    for input in calibration() {
        moments.add(model, &input).unwrap();
    }
    moments
}

/// All layers by a method that reads text.
fn merge(model: &mut Model, n: i64, method: Merge) -> Vec<Merged> {
    let moments = moments(model);
    merge_kv(model, &[(0, n), (1, n)], method, Some(&moments)).unwrap()
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
            for method in [Merge::Mean, Merge::First] {
                let alike = model(base);
                rewrite(&alike, |all, at| {
                    let members = all.narrow(0, at / group * group, group);
                    match method {
                        Merge::Mean => members.mean_dim([0i64].as_slice(), false, Kind::Double),
                        _ => members.get(0),
                    }
                });
                let mut grouped = model(base);
                pool(&mut grouped, &[0, 1], n_new, method).unwrap();
                let context = format!("{base} {n_new} {method:?}");
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
                pool(&mut again, &[0, 1], n_new, Merge::Mean).unwrap();
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
    pool(&mut model, &[1], 4, Merge::Mean).unwrap();
    assert_eq!(model.layers()[1].dims().kv_of_head, [0, 1, 2, 3]);
    assert_eq!(model.layers()[0].dims().n_kv_heads, 2, "another layer");
    let d = model.layers()[1].dims().head_dim;
    for (new, of) in [(0, 0), (1, 0), (2, 1), (3, 1)] {
        let new = model.layers()[1].projections().k.0.narrow(0, new * d, d);
        assert_eq!(new, old.narrow(0, of * d, d));
    }
    assert_close("llama", &logits(&model, &input()), &before, 1e-12);
    // In f32, from one head that all four read.
    let mut single = self::model("llama");
    pool(&mut single, &[0, 1], 1, Merge::Mean).unwrap();
    single.to_kind(Kind::Float);
    let of_one = logits(&single, &input());
    pool(&mut single, &[0, 1], 2, Merge::Mean).unwrap();
    assert_eq!(single.layers()[1].dims().kv_of_head, [0, 0, 1, 1]);
    assert_close("f32", &logits(&single, &input()), &of_one, 1e-6);
    // As many as there are: not a bit.
    let before = logits(&model, &input());
    pool(&mut model, &[1], 4, Merge::Mean).unwrap();
    assert_eq!(logits(&model, &input()), before);
}

#[test]
fn a_drawn_head_is_one_of_its_group_with_keys_and_values_of_one() {
    let whole = model("gpt2");
    let mut seen = std::collections::BTreeSet::new();
    for seed in 0..12 {
        let mut drawn = model("gpt2");
        pool(&mut drawn, &[0, 1], 2, Merge::Random { seed }).unwrap();
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
    pool(&mut grouped, &[0, 1], 1, Merge::Mean).unwrap();
    assert!(grouped.config().is_plain());
    assert_eq!(grouped.config().layers[0], LayerSpec::plain(4, 1));
    let mut one = model("llama");
    pool(&mut one, &[1], 1, Merge::Mean).unwrap();
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
        (vec![1, 1], 2, "two numbers"),
    ] {
        let error = pool(&mut model, &layers, n, Merge::Mean).unwrap_err().to_string();
        assert!(error.contains(said), "{error}");
    }
    assert_eq!(logits(&model, &input()), before);
}

/// An orthogonal matrix, of rotations and scales `size` within rotary planes where `planes`.
fn drawn_turn(seed: u64, d: i64, planes: bool, size: f64) -> Tensor {
    if !planes {
        return Tensor::linalg_qr(&randn(seed, &[d, d]), "reduced").0 * size;
    }
    let angles = randn(seed, &[d / 2]) * 3.0;
    let (c, s) = (angles.cos().diag(0) * size, angles.sin().diag(0) * size);
    Tensor::cat(&[Tensor::cat(&[&c, &(-&s)], 1), Tensor::cat(&[&s, &c], 1)], 0)
}

/// Key/value head 2i + 1 of every layer is made of 2i (of 2 − i where `across`: 0 and 2, 1 and 3), turned by a matrix of its own.
fn turned_copies(model: &Model, across: bool, size: f64) {
    for (at, layer) in model.layers().into_iter().enumerate() {
        let dims = layer.dims();
        let (n, d) = (dims.n_kv_heads, dims.head_dim);
        let projections = layer.projections();
        for (of, (weight, bias)) in [(0, &projections.k), (1, &projections.v)] {
            let pairs: Vec<(i64, i64)> = match (n, across) {
                (4, true) => vec![(0, 2), (1, 3)],
                (4, false) => vec![(0, 1), (2, 3)],
                _ => vec![(0, 1)],
            };
            for (from, to) in pairs {
                let seed = 40 + 10 * at as u64 + 4 * of + from as u64;
                let turn = drawn_turn(seed, d, of == 0 && dims.rotary, size);
                tch::no_grad(|| {
                    weight.narrow(0, to * d, d).copy_(&turn.matmul(&weight.narrow(0, from * d, d)));
                    if let Some(bias) = bias {
                        bias.narrow(0, to * d, d).copy_(&turn.mv(&bias.narrow(0, from * d, d)));
                    }
                });
            }
        }
    }
}

#[test]
fn heads_that_differ_by_a_turn_are_merged_without_loss() {
    for base in BASES {
        for (kind, bar) in [(Kind::Double, 1e-10), (Kind::Float, 1e-5)] {
            let mut whole = model(base);
            turned_copies(&whole, false, 1.0);
            whole.to_kind(kind);
            let n = whole.layers()[0].dims().n_kv_heads / 2;
            let before = logits(&whole, &input());
            for method in [Merge::Aligned, Merge::LowRank] {
                let mut merged = whole.alias().unwrap();
                let made = merge(&mut merged, n, method);
                let context = format!("{base} {kind:?} {method:?}");
                let after = logits(&merged, &input());
                assert_close(&context, &after, &before, bar);
                assert!(made.iter().all(|it| it.key_loss.unwrap() < 1e-9), "{context} {made:?}");
                assert!(made.iter().all(|it| it.value_loss.unwrap() < 1e-9), "{context} {made:?}");
            }
            let mut mean = whole.alias().unwrap();
            merge(&mut mean, n, Merge::Mean);
            assert!(
                (logits(&mean, &input()) - &before).abs().max().double_value(&[]) > 1e-2,
                "{base}"
            );
            assert_eq!(logits(&whole, &input()), before, "the model it was made of");
        }
    }
}

/// Heads that are scaled, too, or that need half the channels each, fit into one by what `low_rank` keeps, and by nothing else.
#[test]
fn heads_that_fit_into_one_are_merged_without_loss() {
    for base in BASES {
        let whole = model(base);
        if base == "llama" {
            turned_copies(&whole, false, 2.5);
        } else {
            for layer in whole.layers() {
                let d = layer.dims().head_dim;
                let projections = layer.projections();
                for (head, of) in
                    (0..4).flat_map(|head| [(head, &projections.k), (head, &projections.v)])
                {
                    let thin = randn(70 + head as u64, &[d, d / 2])
                        .matmul(&randn(80 + head as u64, &[d / 2, d]));
                    tch::no_grad(|| {
                        let weight = of.0.narrow(0, head * d, d);
                        weight.shallow_clone().copy_(&thin.matmul(&weight));
                        let bias = of.1.as_ref().unwrap().narrow(0, head * d, d);
                        bias.shallow_clone().copy_(&thin.mv(&bias));
                    });
                }
            }
        }
        let n = whole.layers()[0].dims().n_kv_heads / 2;
        let before = logits(&whole, &input());
        let apart = |method| {
            let mut merged = whole.alias().unwrap();
            merge(&mut merged, n, method);
            (logits(&merged, &input()) - &before).abs().max().double_value(&[])
        };
        assert!(apart(Merge::LowRank) < 1e-9, "{base}: {}", apart(Merge::LowRank));
        assert!(apart(Merge::Aligned) > 1e-3, "{base}");
    }
}

/// The losses that are reported, from the text itself, head by head and token by token.
#[test]
fn losses_are_what_scores_and_outputs_lose_on_the_text() {
    for base in BASES {
        let whole = model(base);
        let n = whole.layers()[0].dims().n_kv_heads / 2;
        for method in [Merge::Similarity, Merge::Aligned, Merge::LowRank] {
            let mut merged = whole.alias().unwrap();
            let made = merge(&mut merged, n, method);
            for it in &made {
                let [keys, values] = losses(&whole, &merged, it.layer);
                let context = format!("{base} {method:?} layer {}", it.layer);
                let near = |found: Option<f64>, expected: f64| {
                    (found.unwrap() - expected).abs() < 1e-9 * expected.max(1.0)
                };
                assert!(near(it.key_loss, keys), "{context}: {:?} {keys}", it.key_loss);
                assert!(near(it.value_loss, values), "{context}: {:?} {values}", it.value_loss);
            }
        }
    }
}

/// q̄ k of each rotary plane, its real and then its imaginary part: `[queries, keys]` each.
fn planes(q: &Tensor, k: &Tensor) -> Vec<Tensor> {
    let half = q.size()[1] / 2;
    let product = |i: i64, a: i64, b: i64| {
        q.narrow(1, i + a * half, 1).matmul(&k.narrow(1, i + b * half, 1).tr())
    };
    let of = |i: i64| {
        let re = product(i, 0, 0) + product(i, 1, 1);
        [re, product(i, 0, 1) - product(i, 1, 0)]
    };
    (0..half).flat_map(of).collect()
}

/// How much scores differ over the keys that each query meets, summed: where positions turn keys, over distances up to 19 as well, by
/// frequencies 10000^(−2i/8).
fn unlike(parts: &[Tensor]) -> f64 {
    let size = |x: &Tensor| x.square().sum(Kind::Double).double_value(&[]);
    let mean = |x: &Tensor| x.mean_dim([1i64].as_slice(), true, Kind::Double).expand_as(x);
    if let [scores] = parts {
        return size(&(scores - mean(scores)));
    }
    let of_plane = |(i, plane): (usize, &[Tensor])| {
        let f = 10_000_f64.powf(-2.0 * i as f64 / 8.0);
        let sum = |of: fn(f64) -> f64| (0..20).map(|at| of(f * f64::from(at))).sum::<f64>() / 20.0;
        let same = sum(f64::cos).powi(2) + sum(f64::sin).powi(2);
        plane.iter().map(|part| size(part) - same * size(&mean(part))).sum::<f64>()
    };
    parts.chunks(2).enumerate().map(of_plane).sum()
}

/// A layer's extents, q, k and v of a text, its output matrix, and the numbers of its heads.
type Projected = (attn_core::attention::Dims, Tensor, Tensor, Tensor, Tensor, Vec<i64>);

/// Key and value loss of a layer by their definitions.
fn losses(whole: &Model, merged: &Model, layer: usize) -> [f64; 2] {
    let hidden: Vec<Tensor> = calibration()
        .iter()
        .map(|input| {
            let options = ForwardOptions { attention_inputs: true, ..ForwardOptions::default() };
            let h = whole.forward(input, &options).unwrap().attention_inputs[layer].flatten(0, 1);
            match &input.attention_mask {
                Some(mask) => h.index_select(0, &mask.view([-1]).nonzero().view([-1])),
                None => h,
            }
        })
        .collect();
    let h = Tensor::cat(&hidden, 0);
    let of = |model: &Model| -> Projected {
        let it = model.layers()[layer];
        let (dims, projections) = (it.dims().clone(), it.projections());
        let [q, k, v] = [&projections.q, &projections.k, &projections.v]
            .map(|(weight, bias)| h.linear(weight, bias.as_ref()));
        (dims, q, k, v, it.out().out_in(), it.spec().kept_heads)
    };
    let (old, new) = (of(whole), of(merged));
    let d = old.0.head_dim;
    let head = |x: &Tensor, at: i64| x.narrow(1, at * d, d);
    let mut sums = [0.0; 4];
    for number in 0..old.0.n_heads {
        let place = new.5.iter().position(|&kept| kept == number).unwrap() as i64;
        let scores = |of: &Projected, place: i64, kv: i64| {
            let (q, k) = (head(&of.1, place), head(&of.2, kv));
            match old.0.rotary {
                true => planes(&q, &k),
                false => vec![q.matmul(&k.tr())], // [queries, keys]
            }
        };
        let out =
            |of: &Projected, place: i64, kv: i64| head(&of.3, kv).matmul(&head(&of.4, place).tr());
        let (kv, new_kv) = (old.0.kv_of_head[number as usize], new.0.kv_of_head[place as usize]);
        let (old_out, new_out) = (out(&old, number, kv), out(&new, place, new_kv));
        let size = |x: Tensor| x.square().sum(Kind::Double).double_value(&[]);
        let (of_old, of_new) = (scores(&old, number, kv), scores(&new, place, new_kv));
        let apart: Vec<Tensor> = of_old.iter().zip(&of_new).map(|(old, new)| old - new).collect();
        sums[0] += unlike(&apart);
        sums[1] += unlike(&of_old);
        sums[2] += size(&old_out - new_out);
        sums[3] += size(old_out);
    }
    [sums[0] / sums[1], sums[2] / sums[3]]
}

#[test]
fn each_method_keeps_more_of_a_group_than_the_one_before() {
    for base in BASES {
        let lost = |method| -> [f64; 2] {
            let mut merged = model(base);
            let made = merge(&mut merged, 1, method); // One group: the same heads for all.
            [made[0].key_loss.unwrap(), made[0].value_loss.unwrap()]
        };
        let [mean, aligned, low_rank] =
            [Merge::Similarity, Merge::Aligned, Merge::LowRank].map(lost);
        for of in 0..2 {
            assert!(
                low_rank[of] < aligned[of] && aligned[of] < mean[of],
                "{base} {mean:?} {aligned:?} {low_rank:?}"
            );
        }
    }
}

/// Heads 0 and 2 go together, 1 and 3: query heads change places, and their numbers with them.
#[test]
fn heads_keep_their_numbers_where_groups_are_no_neighbours() {
    for base in ["gpt2", "distilbert"] {
        for method in [Merge::Similarity, Merge::Aligned, Merge::LowRank] {
            let whole = model(base);
            let size = if method == Merge::Similarity { 0.0 } else { 1.0 };
            turned_copies(&whole, true, 1.0);
            if size == 0.0 {
                rewrite(&whole, |all, at| all.get(at % 2));
            }
            let mut merged = whole.alias().unwrap();
            let made = merge(&mut merged, 2, method);
            let context = format!("{base} {method:?}");
            assert_eq!(made[1].groups, [[0, 2], [1, 3]], "{context}");
            let spec = merged.layers()[1].spec();
            assert_eq!(
                (spec.kept_heads, spec.kv_of_head),
                (vec![0, 2, 1, 3], vec![0, 0, 1, 1]),
                "{context}"
            );
            assert!(merged.layers()[0].dims().is_evenly_grouped());
            assert_close(&context, &logits(&merged, &input()), &logits(&whole, &input()), 1e-10);
            // A gate for each number.
            let by_number = [1.0, 0.0, 0.7, 0.3];
            let gated = |of: &Model| {
                let gates: Vec<Option<Gate>> = of
                    .layers()
                    .iter()
                    .map(|layer| {
                        let by_place: Vec<f64> = layer
                            .spec()
                            .kept_heads
                            .iter()
                            .map(|&head| by_number[head as usize])
                            .collect();
                        Some(Gate::per_head(&Tensor::from_slice(&by_place)))
                    })
                    .collect();
                let options = ForwardOptions { gates: &gates, ..ForwardOptions::default() };
                of.forward(&input(), &options).unwrap().logits
            };
            assert_close(&context, &gated(&merged), &gated(&whole), 1e-10);
        }
    }
}

#[test]
fn a_folder_keeps_the_order_of_its_heads() {
    let dir = tempfile::tempdir().unwrap();
    // Two key/value heads of two query heads each, exchanged: plain all the same.
    for base in ["llama", "gpt2"] {
        let mut turned = model(base);
        let before = logits(&turned, &input());
        for layer in 0..2 {
            turned.select_heads(layer, &[3, 2, 1, 0]).unwrap();
            let kv_of_head = &turned.layers()[layer].dims().kv_of_head;
            assert_eq!(*kv_of_head, if base == "llama" { [1, 1, 0, 0] } else { [3, 2, 1, 0] });
        }
        assert_close(base, &logits(&turned, &input()), &before, 1e-12);
        // Even again, in another order than the heads had.
        let old = turned.layers().iter().map(|it| it.dims().n_kv_heads).max().unwrap();
        if base == "llama" {
            merge_kv(&mut turned, &[(0, 1), (1, 1)], Merge::Mean, None).unwrap();
        } else {
            assert_eq!(old, 4);
        }
        let folder = dir.path().join(base);
        turned.save(&folder, &WriteOptions::default()).unwrap();
        let options = LoadOptions { kind: Kind::Double, ..LoadOptions::default() };
        let (loaded, _) = Model::load(&folder, &options).unwrap();
        assert_eq!(loaded.layers()[0].spec(), turned.layers()[0].spec(), "{base}");
        assert_eq!(loaded.layers()[0].spec().kept_heads, [3, 2, 1, 0], "{base}");
        assert_eq!(loaded.config().is_plain(), base == "llama");
        let json = loaded.config().to_json(Kind::Double);
        assert_eq!(json.contains_key("attn_head_order"), base == "llama");
        if base != "llama" {
            continue;
        }
        // Without two of the heads the folder is still an ordinary one, its heads counted anew.
        for layer in 0..2 {
            turned.select_heads(layer, &[0, 3]).unwrap();
        }
        let folder = dir.path().join("less");
        turned.save(&folder, &WriteOptions::default()).unwrap();
        let (loaded, _) = Model::load(&folder, &options).unwrap();
        assert_eq!(loaded.layers()[1].spec().kept_heads, [1, 0]);
        assert!(loaded.config().is_plain());
        assert_close("less", &logits(&loaded, &input()), &logits(&turned, &input()), 1e-12);
    }
}

#[test]
fn projections_are_fitted_by_least_squares_on_a_stream() {
    for base in BASES {
        let whole = model(base);
        let n = whole.layers()[0].dims().n_kv_heads / 2;
        let mut merged = whole.alias().unwrap();
        merge(&mut merged, n, Merge::Mean);
        let before = logits(&whole, &input());
        // The definition, all tokens at once: layer 1 on what goes into it in the whole model.
        let fitted = |ridge: f64| {
            let mut fit = StreamedRefit::new(&merged, &[1]);
            for input in calibration() {
                fit.add(&merged, &whole, &input).unwrap();
            }
            let mut model = merged.alias().unwrap();
            model.own(&|_| true);
            let made = fit.finish(&model, ridge).unwrap();
            (model, made)
        };
        let (model, made) = fitted(1e-13);
        assert_eq!(made.len(), 1);
        assert!(made[0].error_after < made[0].error_before, "{base} {made:?}");
        let (mut zs, mut ys) = (Vec::new(), Vec::new());
        for input in calibration() {
            let options =
                ForwardOptions { attention_inputs: true, z: true, ..ForwardOptions::default() };
            let of = whole.forward(&input, &options).unwrap();
            let z = merged
                .attend(&input, &[1], &[of.attention_inputs[1].shallow_clone()], &options)
                .unwrap()
                .z;
            let flat = |z: &Tensor| {
                let z = z.transpose(1, 2).flatten(2, 3).flatten(0, 1);
                match &input.attention_mask {
                    Some(mask) => z.index_select(0, &mask.view([-1]).nonzero().view([-1])),
                    None => z,
                }
            };
            zs.push(flat(&z[0]));
            ys.push(whole.layers()[1].out().forward(&flat(&of.z[1]), false));
        }
        let (mut z, y) = (Tensor::cat(&zs, 0), Tensor::cat(&ys, 0));
        let bias = whole.layers()[1].out().bias.is_some();
        if bias {
            z = z.pad([0, 1], "constant", 1.0);
        }
        let solved = z.linalg_lstsq(&y, None, "gelsd").0;
        let residual = (z.matmul(&solved) - &y).square().sum(Kind::Double).double_value(&[])
            / y.square().sum(Kind::Double).double_value(&[]);
        assert!((made[0].error_after - residual).abs() < 1e-9, "{base} {made:?} {residual}");
        let out = model.layers()[1].out().out_in();
        assert_close(base, &out, &solved.narrow(0, 0, out.size()[1]).tr(), 1e-5);
        // A strong pull leaves what there was.
        let (still, _) = fitted(1e9);
        assert_close(
            base,
            &still.layers()[1].out().out_in(),
            &merged.layers()[1].out().out_in(),
            1e-6,
        );
        assert_eq!(logits(&whole, &input()), before, "{base}: the model it was made of");
    }
}

/// The bases whose positions turn no keys.
fn unturned() -> impl Iterator<Item = &'static str> {
    BASES.into_iter().filter(|base| *base != "llama")
}

/// Keys and values are made of 24 channels, and so is a code of two heads' keys and values.
#[test]
fn a_code_as_wide_as_the_hidden_state_loses_nothing() {
    for base in unturned() {
        for (kind, bar) in [(Kind::Double, 1e-10), (Kind::Float, 1e-5)] {
            let mut whole = model(base);
            whole.to_kind(kind);
            let before = logits(&whole, &input());
            let mut coded = whole.alias().unwrap();
            let made = merge(&mut coded, 2, Merge::Latent);
            let context = format!("{base} {kind:?}");
            assert!(matches!(coded.layers()[1].variant(), Variant::Latent(_)), "{context}");
            assert_eq!(coded.layers()[1].dims().n_kv_heads, 2);
            assert_close(&context, &logits(&coded, &input()), &before, bar);
            assert!(made.iter().all(|it| it.key_loss.unwrap() < 1e-9), "{context} {made:?}");
            assert!(made.iter().all(|it| it.value_loss.unwrap() < 1e-9), "{context} {made:?}");
            // By `low_rank`, in as many bytes, something is lost.
            let mut low_rank = whole.alias().unwrap();
            merge(&mut low_rank, 2, Merge::LowRank);
            let lost = (logits(&low_rank, &input()) - &before).abs().max().double_value(&[]);
            assert!(lost > 1e-3, "{context}: {lost}");

            let full = expanded(&coded).unwrap();
            assert!(full.config().is_plain());
            assert_close(&context, &logits(&full, &input()), &before, bar);
            let dir = tempfile::tempdir().unwrap();
            coded.save(&dir.path().join("m"), &WriteOptions::default()).unwrap();
            let options = LoadOptions { kind, ..LoadOptions::default() };
            let again = Model::load(&dir.path().join("m"), &options).unwrap().0;
            assert_eq!(logits(&again, &input()), logits(&coded, &input()), "{context}: saved");
            assert_eq!(logits(&whole, &input()), before, "the model it was made of");
        }
    }
}

/// Against the text, and against what codes of keys and of values, group by group, lose in as many bytes.
#[test]
fn a_code_of_one_head_loses_what_it_says_and_less_than_two_codes() {
    for base in unturned() {
        let whole = model(base);
        let moments = moments(&whole);
        let mut coded = whole.alias().unwrap();
        let made = merge(&mut coded, 1, Merge::Latent);
        // Key and value heads for each query head again: what they lost stays lost.
        let full = expanded(&coded).unwrap();
        for it in &made {
            let [keys, values] = losses(&whole, &full, it.layer);
            let context = format!("{base} layer {}", it.layer);
            let [key_loss, value_loss] = [it.key_loss.unwrap(), it.value_loss.unwrap()];
            assert!((key_loss - keys).abs() < 1e-9, "{context}: {key_loss} {keys}");
            assert!((value_loss - values).abs() < 1e-9, "{context}: {value_loss} {values}");
            let mut apart = whole.alias().unwrap();
            let of = merge_kv(&mut apart, &[(it.layer, 1)], Merge::LowRank, Some(&moments));
            let of = of.unwrap().remove(0);
            let apart = of.key_loss.unwrap() + of.value_loss.unwrap();
            assert!(key_loss + value_loss < apart, "{context}: {apart}");
            assert!(key_loss + value_loss > 1e-6, "{context}: something is lost");
        }
        assert_close(base, &logits(&coded, &input()), &logits(&full, &input()), 1e-10);
        let closed = gated(&coded);
        assert_close(base, &closed, &gated(&full), 1e-10);
    }
}

/// Heads that were removed left query heads out of order: each still reads its own.
#[test]
fn a_code_of_uneven_heads_is_read_by_the_heads_that_it_is_of() {
    let mut whole = model("gpt2");
    let before = logits(&whole, &input());
    (0..2).for_each(|layer| whole.select_heads(layer, &[3, 1, 0, 2]).unwrap());
    assert_eq!(whole.layers()[0].dims().kv_of_head, [3, 1, 0, 2]);
    merge(&mut whole, 2, Merge::Latent);
    assert_eq!(whole.layers()[0].spec().kept_heads, [1, 0, 3, 2]);
    assert_close("as before", &logits(&whole, &input()), &before, 1e-10);
    // In any order, written out or not.
    whole.select_heads(0, &[1, 2, 0, 3]).unwrap();
    assert_eq!(whole.layers()[0].dims().kv_of_head, [0, 1, 0, 1]);
    assert_close("in another order", &logits(&whole, &input()), &before, 1e-10);
    assert_close("written out", &logits(&expanded(&whole).unwrap(), &input()), &before, 1e-10);
    whole.select_heads(1, &[3, 1, 0]).unwrap();
    let mut plain = model("gpt2");
    plain.select_heads(1, &[2, 0, 1]).unwrap(); // the numbers of those places
    assert_close("without one", &logits(&whole, &input()), &logits(&plain, &input()), 1e-10);
    let full = expanded(&whole).unwrap();
    assert_close(
        "without one, written out",
        &logits(&full, &input()),
        &logits(&plain, &input()),
        1e-10,
    );
}

#[test]
fn codes_are_refused_where_they_would_be_something_else() {
    let mut llama = model("llama");
    let moments_of = moments(&llama);
    let error = merge_kv(&mut llama, &[(0, 1)], Merge::Latent, Some(&moments_of)).unwrap_err();
    assert!(error.to_string().contains("positions turn"), "{error}");
    let mut gpt2 = model("gpt2");
    let moments_of = moments(&gpt2);
    let error = begin_merging(&mut gpt2, &[(0, 1)], Merge::Latent, Some(&moments_of), 1.0);
    assert!(error.unwrap_err().to_string().contains("then distill"));
    merge_kv(&mut gpt2, &[(0, 2)], Merge::Latent, Some(&moments_of)).unwrap();
    for method in [Merge::Latent, Merge::Aligned, Merge::Mean] {
        let error = merge_kv(&mut gpt2, &[(0, 1)], method, Some(&moments_of)).unwrap_err();
        assert!(error.to_string().contains("made narrower"), "{error}");
    }
    // Heads of which the others read a part cannot go; one head of a pair can.
    assert!(gpt2.select_heads(0, &[0, 1]).unwrap_err().to_string().contains("the whole code"));
    gpt2.select_heads(0, &[3, 0]).unwrap();
}

#[test]
fn text_that_is_missing_short_or_of_no_use_is_refused() {
    let whole = model("gpt2");
    let before = logits(&whole, &input());
    let mut few = Moments::of_layers(&[0, 1]);
    few.add(&whole, &ModelInput::new(random_ids(1, [1, 23], 50))).unwrap();
    let mut one = Moments::of_layers(&[0]);
    one.add(&whole, &calibration()[0]).unwrap();
    let full = moments(&whole);
    let mut swapped = whole.alias().unwrap();
    swapped.swap(&[0], &Variant::Performer(Default::default()), 0).unwrap();
    let refused = |model: &Model, moments: Option<&Moments>| {
        let mut model = model.alias().unwrap();
        let error = merge_kv(&mut model, &[(0, 2), (1, 2)], Merge::Aligned, moments).unwrap_err();
        assert_eq!(model.layers()[0].dims().n_kv_heads, 4);
        error.to_string()
    };
    assert!(refused(&whole, None).contains("there are none"));
    assert!(
        refused(&whole, Some(&few)).contains("of 23 tokens, and a hidden state has 24 channels")
    );
    assert!(refused(&whole, Some(&one)).contains("layer 1"));
    assert!(refused(&swapped, Some(&full)).contains("performer"));
    assert_eq!(logits(&whole, &input()), before);
    let mut fit = StreamedRefit::new(&whole, &[0]);
    fit.add(&whole, &whole, &ModelInput::new(random_ids(1, [1, 23], 50))).unwrap();
    assert!(fit.finish(&whole, 1e-4).unwrap_err().to_string().contains("25 unknowns"));
    let fit = StreamedRefit::new(&whole, &[0]);
    assert!(fit.finish(&whole, 0.0).unwrap_err().to_string().contains("ridge"));
}

/// A Llama with fewer heads, a GPT-2 with all of them again, whose groups were no neighbours, and one with a single head. Needs Python
/// with transformers, named by `ATTN_TEST_PYTHON`.
#[test]
fn transformers_computes_what_converted_folders_do() {
    const TEST: &str = "transformers_computes_what_converted_folders_do";
    let Some(python) = common::python(TEST, "transformers, torch") else { return };
    let dir = tempfile::tempdir().unwrap();
    let folder = |name: &str| dir.path().join(name);
    let save =
        |model: &Model, name: &str| model.save(&folder(name), &WriteOptions::default()).unwrap();
    let mut llama = model("llama");
    merge(&mut llama, 1, Merge::LowRank);
    save(&llama, "llama");
    let gpt2 = |n: i64| {
        let mut gpt2 = model("gpt2");
        turned_copies(&gpt2, true, 1.3);
        merge(&mut gpt2, n, Merge::LowRank);
        gpt2
    };
    let two = gpt2(2);
    assert_eq!(two.layers()[0].spec().kept_heads, [0, 2, 1, 3]);
    save(&expanded(&two).unwrap(), "expanded");
    let one = gpt2(1);
    save_multi_query(&one, &folder("multi_query"), &WriteOptions::default()).unwrap();
    let mut all = vec![("llama", llama), ("expanded", two), ("multi_query", one)];
    for base in ["bert", "distilbert"] {
        let mut encoder = model(base);
        turned_copies(&encoder, true, 1.3);
        merge(&mut encoder, 2, Merge::LowRank);
        assert_eq!(encoder.layers()[0].spec().kept_heads, [0, 2, 1, 3]);
        save(&expanded(&encoder).unwrap(), base);
        all.push((base, encoder));
    }
    for (name, model) in all {
        let ids: Vec<i64> = Vec::try_from(input().input_ids.view([-1])).unwrap();
        let code = "import sys, json, torch, transformers\n\
                    c = transformers.AutoConfig.from_pretrained(sys.argv[1])\n\
                    m = getattr(transformers, c.architectures[0])\n\
                    m = m.from_pretrained(sys.argv[1], dtype=torch.float64).eval()\n\
                    x = torch.tensor(json.loads(sys.argv[2])).view(2, -1)\n\
                    print(json.dumps(m(x).logits.flatten().tolist()))\n\
                    c = m(x, use_cache=True).past_key_values.layers[0].keys.shape[1] if \"M\" in sys.argv[3] else 0\n\
                    print(c)";
        let ran = std::process::Command::new(&python)
            .args(["-c", code])
            .arg(folder(name))
            .arg(format!("{ids:?}"))
            .arg(if model.config().is_causal() { "M" } else { "" })
            .output()
            .unwrap();
        assert!(ran.status.success(), "{name}: {}", String::from_utf8_lossy(&ran.stderr));
        let printed = String::from_utf8(ran.stdout).unwrap();
        let mut lines = printed.lines();
        let found: Vec<f64> = serde_json::from_str(lines.next().unwrap()).unwrap();
        let expected = logits(&model, &input());
        let found = Tensor::from_slice(&found).view_as(&expected);
        assert_close(name, &found, &expected, 1e-6); // theirs turns in f32
        let n_cached: i64 = lines.next().unwrap().parse().unwrap();
        let expected = match name {
            "expanded" => 4,
            "bert" | "distilbert" => 0, // no cache
            _ => 1,
        };
        assert_eq!(n_cached, expected, "{name}");
    }
}

#[test]
fn a_folder_of_another_tool_is_refused_where_it_would_be_another_model() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |model: &Model| {
        let error = save_multi_query(model, &dir.path().join("x"), &WriteOptions::default());
        assert!(!dir.path().join("x").exists());
        error.unwrap_err().to_string()
    };
    assert!(refused(&model("llama")).contains("model_type"));
    let mut two = model("gpt2");
    pool(&mut two, &[0], 1, Merge::Mean).unwrap();
    assert!(refused(&two).contains("attn.layers[1].n_kv_heads"));
    pool(&mut two, &[1], 1, Merge::Mean).unwrap();
    two.select_heads(1, &[0, 1]).unwrap();
    assert!(refused(&two).contains("attn.layers[1].n_heads"));
}

/// Sets every gate of a merging model: ln α over 100.
fn set_gates(model: &Model, value: f64) {
    for (name, tensor) in model.parameters() {
        if name.ends_with("gate.log_alpha") {
            let _ = tch::no_grad(|| tensor.shallow_clone().fill_(value));
        }
    }
}

/// A model whose heads are being merged computes what it did; with its gates closed it computes what the merge in closed form that it
/// started from does, and so does what is left of it in the end.
#[test]
fn merging_begins_where_the_model_is_and_ends_where_its_start_was() {
    let dir = tempfile::tempdir().unwrap();
    for base in BASES {
        let n_kv = model(base).layers()[0].dims().n_kv_heads;
        for method in [Merge::Mean, Merge::Aligned, Merge::LowRank] {
            let context = format!("{base} {method:?}");
            let mut model = model(base);
            let before = logits(&model, &input());
            let moments = moments(&model);
            let wanted = [(0, 1), (1, n_kv / 2)];
            let mut merged = model.alias().unwrap();
            merge_kv(&mut merged, &wanted, method, Some(&moments)).unwrap();
            let begun = begin_merging(&mut model, &wanted, method, Some(&moments), 1.0).unwrap();
            assert_eq!(begun.len(), 2, "{context}");
            assert_close(&context, &logits(&model, &input()), &before, 1e-12);
            // A folder keeps groups, matrices and gates.
            set_gates(&model, -0.1);
            let folder = dir.path().join(format!("{base}-{}", method.name()));
            model.save(&folder, &WriteOptions::default()).unwrap();
            let options = LoadOptions { kind: Kind::Double, ..LoadOptions::default() };
            let (mut model, _) = Model::load(&folder, &options).unwrap();
            let closed = logits(&model, &input());
            let by_head = |model: &Model| {
                let gates =
                    [Some(Gate::per_head(&Tensor::from_slice(&[1.0, 0.0, 1.0, 0.3]))), None];
                let options = ForwardOptions { gates: &gates, ..ForwardOptions::default() };
                model.forward(&input(), &options).unwrap().logits
            };
            let closed_gated = by_head(&model);
            let ended = merge_learned(&mut model).unwrap();
            assert_eq!(ended[0].open, Some(vec![0.0; n_kv as usize]), "{context}");
            assert_close(&context, &logits(&model, &input()), &closed, 1e-12);
            assert_close(&context, &closed, &logits(&merged, &input()), 1e-12);
            if !model.config().layers[0].kept_heads.is_sorted() {
                continue; // gates of a pass go by place
            }
            assert_close(&context, &by_head(&model), &closed_gated, 1e-12);
        }
    }
}

#[test]
fn what_is_still_open_is_said_and_lost() {
    let mut model = model("gpt2");
    assert!(matches!(merge_learned(&mut model), Err(attn_core::Error::Input { .. })));
    begin_merging(&mut model, &[(1, 2)], Merge::Mean, None, 1.0).unwrap();
    assert!(begin_merging(&mut model, &[(1, 1)], Merge::Mean, None, 1.0).is_err(), "twice");
    let error = merge_kv(&mut model, &[(1, 1)], Merge::Mean, None).unwrap_err().to_string();
    assert!(error.contains("--method learned"), "{error}");
    set_gates(&model, 0.0);
    let before = logits(&model, &input());
    let ended = merge_learned(&mut model).unwrap();
    assert_eq!((ended[0].layer, ended[0].open.clone()), (1, Some(vec![0.5; 4])));
    assert!((logits(&model, &input()) - before).abs().max().double_value(&[]) > 1e-3);
    assert_eq!(model.layers()[1].dims().n_kv_heads, 2);
    assert_eq!(model.config().layers[1].variant, Variant::default());
}
