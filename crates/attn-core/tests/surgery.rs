//! Whole models: swapped, cut, gated, decoded, saved and loaded again.

mod common;
#[path = "common/small.rs"]
mod small;

use std::num::NonZeroU32;

use attn_core::{
    Error, Fill, ForwardOptions, Gate, LoadOptions, Model, ModelInput, Positions, Rows, Variant,
    WantedHead,
    attention::Masks,
    checkpoint::{WriteOptions, read_json, write_folder},
    laws,
    layer::{LayerPass, Source, Tap},
    mask::Mask,
    testing::{Probe, assert_close, naive_attention, randn, random_ids, relative_rms},
    variants,
};
use serde_json::{Value, json};
use small::{BASES, config, ending_in, logits, model, shake};
use tch::{Device, Kind, Tensor};

fn window(size: u32) -> Variant {
    Variant::Window(variants::window::Config { size: NonZeroU32::new(size).unwrap() })
}

/// Every kind, those with sizes small enough to matter in 20 tokens.
fn kinds() -> Vec<Variant> {
    let small = [
        r#"{"kind": "window", "size": 4}"#,
        r#"{"kind": "dilated", "size": 3, "dilation": 3}"#,
        r#"{"kind": "global_local", "n_global": 2, "window": 3}"#,
        r#"{"kind": "sinks", "n_sinks": 2, "window": 3}"#,
        r#"{"kind": "mask_mixture", "basis": ["shift:1", "window:5", "first:2"], "coefficients": "head"}"#,
        r#"{"kind": "window_linear", "window": 4, "feature_dim": 5}"#,
        r#"{"kind": "routed", "by": "text"}"#,
    ];
    let small = small.map(|text| serde_json::from_str(text).unwrap());
    attn_core::testing::kinds().into_iter().chain(small).collect()
}

/// Those that serve `base`: cross-attention and heads chosen by the whole text refuse decoders.
fn kinds_of(base: &str) -> Vec<Variant> {
    let is_causal = config(base).is_causal();
    let serves = |variant: &Variant| match variant {
        Variant::Cross(_) => !is_causal,
        Variant::Routed(config) => !(is_causal && config.by == variants::routed::By::Text),
        _ => true,
    };
    kinds().into_iter().filter(serves).collect()
}

#[test]
fn models_keep_the_laws_plain_and_swapped() {
    for base in BASES {
        for variant in kinds_of(base) {
            let mut model = model(base);
            model.swap(&[0, 1], &variant, 1).unwrap();
            shake(&mut model);
            let ids = random_ids(5, [3, 21], 50);
            let mut verdicts = laws::for_model(&model, &ids).unwrap();
            if model.config().is_causal() {
                verdicts.push(laws::model_decoding(&model, &ids).unwrap());
            }
            assert_eq!(verdicts.len(), if model.config().is_causal() { 4 } else { 2 });
            for verdict in verdicts {
                assert!(verdict.held(), "{base} with {variant:?}: {verdict}");
            }
        }
    }
}

#[test]
fn an_encoder_posing_as_a_decoder_breaks_causality() {
    let model = model("distilbert");
    let verdict = laws::model_causality(&model, &random_ids(5, [2, 12], 50)).unwrap();
    assert!(!verdict.held(), "{verdict}");
}

#[test]
fn swapping_softmax_for_softmax_changes_no_bit() {
    for base in BASES {
        let mut model = model(base);
        let input = ModelInput::new(random_ids(6, [2, 9], 50));
        let before = logits(&model, &input);
        model.swap(&[0, 1], &Variant::default(), 1).unwrap();
        assert!(logits(&model, &input).equal(&before), "{base}");
    }
}

#[test]
fn a_swapped_folder_says_what_it_is_and_loads_again() {
    for base in BASES {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("m");
        let mut model = model(base);
        model.swap(&[1], &Variant::Gated(Default::default()), 1).unwrap();
        model.swap(&[0], &window(5), 1).unwrap();
        model.select_heads(1, &[0, 2, 3]).unwrap();
        shake(&mut model);
        model.save(&folder, &WriteOptions::default()).unwrap();

        let json = read_json(&folder, "config.json").unwrap();
        assert_eq!(json["model_type"], json!(format!("attn_{base}")));
        assert_eq!(json["attn"]["format_version"], 1);
        assert_eq!(json["attn"]["base_model_type"], base);
        assert_eq!(json["attn"]["layers"][0]["kind"], "window");
        assert_eq!(json["attn"]["layers"][0]["settings"], json!({"size": 5}));
        assert_eq!(json["attn"]["layers"][1]["kept_heads"], json!([0, 2, 3]));

        let options = LoadOptions { kind: Kind::Double, ..LoadOptions::default() };
        let (again, report) = Model::load(&folder, &options).unwrap();
        assert!(report.fresh.is_empty() && report.dropped.is_empty());
        assert_eq!(again.config().layers, model.config().layers);
        let input = ModelInput::new(random_ids(7, [2, 13], 50));
        assert!(logits(&again, &input).equal(&logits(&model, &input)), "{base}");
    }
}

#[test]
fn every_kind_is_saved_and_loaded_whole() {
    let options = LoadOptions { kind: Kind::Double, ..LoadOptions::default() };
    for base in ["llama", "distilbert"] {
        for variant in kinds_of(base) {
            let dir = tempfile::tempdir().unwrap();
            let mut model = model(base);
            model.swap(&[1], &variant, 1).unwrap();
            shake(&mut model);
            model.save(dir.path(), &WriteOptions::default()).unwrap();
            let (again, _) = Model::load(dir.path(), &options).unwrap();
            assert_eq!(again.config().layers, model.config().layers, "{base} with {variant:?}");
            let input = || {
                let input = ModelInput::new(random_ids(5, [2, 21], 50));
                match model.needs_source() {
                    true => input.attending_to(ModelInput::new(random_ids(6, [2, 9], 50))),
                    false => input,
                }
            };
            let (before, after) = (logits(&model, &input()), logits(&again, &input()));
            assert!(before.equal(&after), "{base} with {variant:?}");
        }
    }
}

#[test]
fn a_plain_folder_keeps_its_type_and_unknown_fields() {
    let dir = tempfile::tempdir().unwrap();
    let mut model = model("gpt2");
    model.swap(&[0], &window(5), 1).unwrap();
    model.swap(&[0], &Variant::default(), 1).unwrap();
    model.save(&dir.path().join("m"), &WriteOptions::default()).unwrap();
    let json = read_json(&dir.path().join("m"), "config.json").unwrap();
    assert_eq!((&json["model_type"], &json["our_note"]), (&json!("gpt2"), &json!("kept")));
    assert!(!json.contains_key("attn"));
}

#[test]
fn wrong_folders_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("m");
    let mut model = model("llama");
    model.swap(&[1], &Variant::Gated(Default::default()), 1).unwrap();
    model.save(&folder, &WriteOptions::default()).unwrap();
    let tensors = model.parameters();
    let config = read_json(&folder, "config.json").unwrap();
    let refused = |tensors: &[(String, Tensor)],
                   change: &dyn Fn(&mut serde_json::Map<String, Value>)| {
        let mut config = config.clone();
        change(&mut config);
        write_folder(&folder, tensors, &config, &[], &WriteOptions::default()).unwrap();
        Model::load(&folder, &LoadOptions::default()).unwrap_err().to_string()
    };
    let same = |_: &mut serde_json::Map<String, Value>| ();

    let without_gate: Vec<_> = tensors
        .iter()
        .filter(|(name, _)| !name.ends_with("gate.bias"))
        .map(|(n, t)| (n.clone(), t.shallow_clone()))
        .collect();
    let error = refused(&without_gate, &same);
    assert!(
        error.contains("missing") && error.contains("layers.1.self_attn.kind.gate.bias"),
        "{error}"
    );

    let mut one_more: Vec<_> =
        tensors.iter().map(|(n, t)| (n.clone(), t.shallow_clone())).collect();
    one_more.push(("stray.weight".into(), Tensor::zeros([2], (Kind::Float, Device::Cpu))));
    one_more.retain(|(name, _)| name != "model.norm.weight");
    let error = refused(&one_more, &same);
    assert!(
        error.contains("stray.weight") && error.contains("model.norm.weight"),
        "both lists: {error}"
    );

    let error = refused(&tensors, &|c| c["attn"]["format_version"] = json!(2));
    assert!(error.contains("attn.format_version") && error.contains('2'), "{error}");
    let error = refused(&tensors, &|c| c["attn"]["layers"][1]["kind"] = json!("nonsense"));
    assert!(error.contains("attn.layers[1].kind") && error.contains("nonsense"), "{error}");
    let error = refused(&tensors, &|c| c["model_type"] = json!("llama"));
    assert!(error.contains("attn_llama"), "{error}");
    let error = refused(&tensors, &|c| c["attn"]["layers"][0]["kv_of_head"] = json!([0, 0, 0, 0]));
    assert!(error.contains("kv_of_head"), "{error}");
    let error = refused(&tensors, &|c| c["hidden_size"] = json!("wide"));
    assert!(error.contains("hidden_size") && error.contains("wide"), "{error}");
    let error = refused(&tensors, &|c| {
        c.insert("rope_scaling".into(), json!({"rope_type": "yarn", "factor": 2.0}));
    });
    assert!(error.contains("rope_scaling.rope_type") && error.contains("yarn"), "{error}");
    let error = refused(&tensors, &|c| c["vocab_size"] = json!(51));
    assert!(error.contains("[50, 24]") && error.contains("[51, 24]"), "{error}");
    // No memory is asked for what the file does not hold, and no shape is made of a negative size.
    let error = refused(&tensors, &|c| c["vocab_size"] = json!(2_000_000_000_i64));
    assert!(error.contains("[2000000000, 24]"), "{error}");
    for field in ["hidden_size", "intermediate_size", "vocab_size"] {
        let error = refused(&tensors, &|c| c[field] = json!(-8));
        assert!(error.contains(field), "{error}");
    }
}

#[test]
fn a_new_classifier_is_asked_for_and_reported() {
    let dir = tempfile::tempdir().unwrap();
    for base in BASES {
        let folder = dir.path().join(base);
        model(base).save(&folder, &WriteOptions::default()).unwrap();
        let classes: Vec<String> = ["bad", "good", "so so"].map(String::from).to_vec();
        let head = WantedHead::NewClassifier(classes.clone());
        let options = LoadOptions { head, kind: Kind::Double, ..LoadOptions::default() };
        let (mut new, report) = Model::load(&folder, &options).unwrap();
        assert!(!report.fresh.is_empty(), "{base}: {report:?}");
        assert_eq!(new.config().classes(), classes);
        let input = ModelInput::new(random_ids(8, [2, 9], 50));
        assert_eq!(logits(&new, &input).size(), [2, 3]);

        if new.config().is_causal() {
            new.save(&folder, &WriteOptions::default()).unwrap();
            assert!(
                !read_json(&folder, "config.json").unwrap().contains_key("pad_token_id"),
                "no end token to pad with"
            );
            new.config_mut().set_pad_token_id(49);
        }
        new.save(&folder, &WriteOptions::default()).unwrap();
        let (again, report) =
            Model::load(&folder, &LoadOptions { kind: Kind::Double, ..LoadOptions::default() })
                .unwrap();
        assert_eq!((again.config().classes(), report.fresh.len()), (classes, 0));
        assert!(logits(&again, &input).equal(&logits(&new, &input)), "{base}");
        let error = Model::load(
            &folder,
            &LoadOptions { head: WantedHead::LanguageModel, ..LoadOptions::default() },
        )
        .unwrap_err();
        assert!(matches!(error, Error::Head { .. }), "{error}");
    }
}

#[test]
fn what_pretraining_left_beside_a_masked_lm_is_reported() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("m");
    let model = model("bert");
    let mut tensors = model.parameters();
    for (name, size) in
        [("bert.pooler.dense.weight", vec![24, 24]), ("cls.seq_relationship.bias", vec![2])]
    {
        tensors.push((name.into(), Tensor::zeros(&size, (Kind::Double, Device::Cpu))));
    }
    let config = model.config().to_json(Kind::Double);
    write_folder(&folder, &tensors, &config, &[], &WriteOptions::default()).unwrap();
    let (_, report) = Model::load(&folder, &LoadOptions::default()).unwrap();
    assert_eq!(report.buffers, ["bert.pooler.dense.weight", "cls.seq_relationship.bias"]);
}

#[test]
fn removed_heads_equal_closed_gates() {
    for base in BASES {
        let whole = model(base);
        let input = ModelInput::new(random_ids(9, [2, 11], 50));
        let options = (Kind::Double, Device::Cpu);
        let mut gate = vec![1.0; 4];
        (gate[1], gate[3]) = (0.0, 0.0);
        let gates = [
            Some(Gate::per_head(&Tensor::from_slice(&gate))),
            Some(Gate::per_head(&Tensor::ones([4], options))),
        ];
        let masked = whole
            .forward(&input, &ForwardOptions { gates: &gates, ..ForwardOptions::default() })
            .unwrap()
            .logits;

        let mut cut = model(base);
        cut.select_heads(0, &[0, 2]).unwrap();
        assert_close(base, &logits(&cut, &input), &masked, 1e-12);
        assert!(relative_rms(&masked, &logits(&whole, &input)) > 1e-3, "the heads matter");

        cut.select_heads(0, &[]).unwrap();
        assert!(
            logits(&cut, &input).isfinite().all().int64_value(&[]) == 1,
            "{base}: a layer without heads"
        );
        let options =
            ForwardOptions { attentions: Rows::All, z: true, ..ForwardOptions::default() };
        let output = cut.forward(&input, &options).unwrap();
        let sizes: Vec<Vec<i64>> = output.attentions.iter().map(Tensor::size).collect();
        assert_eq!(sizes, [[2, 0, 11, 11], [2, 4, 11, 11]], "an entry a layer");
        assert_eq!(output.z.iter().map(|z| z.size()[1]).collect::<Vec<_>>(), [0, 4]);
        // One row of one token, as decoding has it, on kernels for f32.
        let one = ModelInput::new(random_ids(9, [1, 1], 50));
        let expected = logits(&cut, &one);
        cut.to_kind(Kind::Float);
        assert_close(base, &logits(&cut, &one).to_kind(Kind::Double), &expected, 1e-5);
        let error = cut.select_heads(1, &[4]).unwrap_err();
        assert!(matches!(error, Error::Index { what: "head", index: 4, count: 4 }), "{error}");
    }
}

#[test]
fn tapped_weights_and_z_are_what_ran() {
    for base in BASES {
        for variant in kinds_of(base) {
            let mut model = model(base);
            model.swap(&[0, 1], &variant, 1).unwrap();
            shake(&mut model);
            let keep = Tensor::from_slice(&[0i64, 0, 1, 1, 1, 1, 1, 1, 1]).repeat([2, 1]);
            let mut input = ModelInput::masked(random_ids(10, [2, 9], 50), keep.shallow_clone());
            if model.needs_source() {
                input = input.attending_to(ModelInput::masked(random_ids(11, [2, 9], 50), keep));
            }
            let all =
                ForwardOptions { attentions: Rows::All, z: true, ..ForwardOptions::default() };
            let all = model.forward(&input, &all).unwrap();
            let some =
                ForwardOptions { attentions: Rows::Some(vec![8, 3]), ..ForwardOptions::default() };
            let some = model.forward(&input, &some).unwrap();
            assert_eq!(all.attentions[1].size(), [2, 4, 9, 9]);
            assert_eq!(all.z[1].size()[..3], [2, 4, 9]);
            let picked = all.attentions[1].index_select(2, &Tensor::from_slice(&[8i64, 3]));
            assert_close(base, &some.attentions[1], &picked, 1e-12);
            let on_padding = all.attentions[1].narrow(2, 2, 7).narrow(3, 0, 2);
            assert_eq!(on_padding.abs().max().double_value(&[]), 0.0, "{base} with {variant:?}");
        }
    }
}

#[test]
fn gates_by_example_and_position_reach_their_own_values_alone() {
    let model = model("gpt2");
    let input = ModelInput::new(random_ids(11, [2, 7], 50));
    let g = Tensor::ones([2, 4, 7, 1], (Kind::Double, Device::Cpu));
    let _ = g.get(1).get(2).get(5).fill_(0.0); // example 1, head 2, position 5
    let gates = [Some(Gate { g, fill: Fill::Zero }), None];
    let gated = model
        .forward(&input, &ForwardOptions { gates: &gates, ..ForwardOptions::default() })
        .unwrap()
        .logits;
    let plain = logits(&model, &input);
    let moved = |example: i64, pos: i64| {
        relative_rms(&gated.get(example).get(pos), &plain.get(example).get(pos))
    };
    assert!((0..7).all(|pos| moved(0, pos) == 0.0) && (0..5).all(|pos| moved(1, pos) == 0.0));
    assert!(moved(1, 5) > 1e-6 && moved(1, 6) > 1e-6);
}

#[test]
fn counted_positions_make_padding_vanish_and_arange_does_not() {
    for base in BASES {
        let model = model(base);
        let ids = random_ids(12, [1, 8], 50);
        let padded = Tensor::cat(&[random_ids(13, [1, 3], 50), ids.shallow_clone()], 1);
        let keep = Tensor::from_slice(&[0i64, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1]).view([1, 11]);
        let plain = logits(&model, &ModelInput::new(ids));
        let input = ModelInput::masked(padded, keep);
        assert_close(base, &logits(&model, &input).narrow(1, 3, 8), &plain, 1e-12);
        let bare = ForwardOptions { positions: Positions::Arange, ..ForwardOptions::default() };
        let bare = model.forward(&input, &bare).unwrap().logits.narrow(1, 3, 8);
        let differs = relative_rms(&bare, &plain) > 1e-3;
        assert_eq!(
            differs,
            base != "llama",
            "{base}: rotations see distances alone, tables see places"
        );
    }
}

#[test]
fn logits_at_some_places_are_those_of_all() {
    for base in BASES {
        let model = model(base);
        let input = ModelInput::new(random_ids(18, [2, 7], 50));
        let at = Tensor::from_slice(&[12i64, 0, 7]);
        let options = ForwardOptions { logits_at: Some(&at), ..ForwardOptions::default() };
        let some = model.forward(&input, &options).unwrap().logits;
        let all = logits(&model, &input).flatten(0, 1);
        assert_close(base, &some, &all.index_select(0, &at), 1e-12);
        let beyond = Tensor::from_slice(&[14i64]);
        let options = ForwardOptions { logits_at: Some(&beyond), ..ForwardOptions::default() };
        assert!(model.forward(&input, &options).unwrap_err().to_string().contains("14"));
    }
}

#[test]
fn positions_that_no_head_reads_change_nothing() {
    let classes = WantedHead::NewClassifier(["a", "b", "c"].map(str::to_owned).to_vec());
    let keeps = [[1i64, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]];
    for base in BASES {
        let at = Tensor::from_slice(&[7i64, 2, 14, 9]);
        let without_heads = |mut model: Model| {
            model.select_heads(1, &[]).unwrap();
            model
        };
        let classifier = || ending_in(classes.clone(), base);
        for (what, model, at) in [
            ("vocabulary", model(base), Some(&at)),
            ("classes", classifier(), None),
            ("vocabulary, no heads", without_heads(model(base)), Some(&at)),
            ("classes, no heads", without_heads(classifier()), None),
        ] {
            let wanted = ForwardOptions { logits_at: at, ..ForwardOptions::default() };
            // With the hidden states asked for, the last block is computed at every position.
            let everywhere =
                ForwardOptions { logits_at: at, hidden_states: true, ..ForwardOptions::default() };
            let keep = Tensor::from_slice(keeps.as_flattened()).view([3, 6]);
            let (names, parameters): (Vec<String>, Vec<Tensor>) =
                model.parameters().into_iter().map(|(n, x)| (n, x.set_requires_grad(true))).unzip();
            let [ours, whole] = [wanted, everywhere].map(|options| {
                let input = ModelInput::masked(random_ids(18, [3, 6], 50), keep.shallow_clone());
                let logits = model.forward(&input, &options).unwrap().logits;
                let loss = logits.square().sum(Kind::Double);
                let gradients = Tensor::run_backward(&[loss], &parameters, false, false);
                (logits, gradients)
            });
            let name = format!("{base}, {what}");
            assert_close(&name, &ours.0, &whole.0, 1e-12);
            for (parameter, (ours, whole)) in names.iter().zip(ours.1.iter().zip(&whole.1)) {
                assert_eq!(ours.defined(), whole.defined(), "{name}, {parameter}");
                if !ours.defined() {
                    assert!(
                        parameter.contains(".1."),
                        "{name}: {parameter} of a layer without heads"
                    );
                    continue;
                }
                // Not relative: keys' biases move no softmax, so that their gradients are rounding alone.
                let error = (ours - whole).abs().sum(Kind::Double).double_value(&[]);
                assert!(error < 1e-10, "{name}, {parameter}: off by {error:e}");
            }
        }
    }
}

#[test]
fn holes_are_served_or_refused_by_name() {
    let keep = Tensor::from_slice(&[1i64, 1, 0, 1, 1, 1]).view([1, 6]);
    let input = || ModelInput::masked(random_ids(14, [1, 6], 50), keep.shallow_clone());
    let mut model = model("gpt2");
    assert!(logits(&model, &input()).isfinite().all().int64_value(&[]) == 1);
    model.swap(&[1], &window(3), 1).unwrap();
    let error = model.forward(&input(), &ForwardOptions::default()).unwrap_err().to_string();
    assert!(error.contains("window") && error.contains("holes"), "{error}");
}

#[test]
fn decoding_in_pieces_and_under_left_padding_equals_a_full_pass() {
    for base in ["gpt2", "llama"] {
        let model = model(base);
        let ids = random_ids(15, [2, 14], 50);
        let keep = Tensor::ones([2, 14], (Kind::Int64, Device::Cpu));
        let _ = keep.get(1).narrow(0, 0, 4).fill_(0);
        let full = logits(&model, &ModelInput::masked(ids.shallow_clone(), keep.shallow_clone()));
        let mut state = model.start();
        for (start, len) in [(0, 6), (6, 3), (9, 1), (10, 4)] {
            let cut = |x: &Tensor| x.narrow(1, start, len);
            let input = ModelInput::masked(cut(&ids), cut(&keep));
            let step = model.step(&input, &mut state, &ForwardOptions::default()).unwrap().logits;
            for (row, first) in [(0, 0), (1, 4 - start)] {
                let first = first.clamp(0, len);
                let real = |x: &Tensor| x.get(row).narrow(0, first, len - first);
                if first < len {
                    assert_close(base, &real(&step), &real(&cut(&full)), 1e-12);
                }
            }
        }
        assert_eq!(state.n_tokens(), 14);
        assert!(state.bytes() > 0);
    }
}

#[test]
fn a_layer_attends_to_another_sequence_under_its_own_mask() {
    let model = model("bert");
    let layer = model.layers()[0];
    let dims = layer.dims().clone();
    let (hidden, other) = (randn(21, &[2, 5, 24]), randn(22, &[2, 7, 24]));
    let keep = Tensor::from_slice(&[1i64, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0]).view([2, 7]);
    let (own_mask, source_mask) = (Mask::new(false), Mask::with_keep(false, &keep));
    let mut tap = Tap { keep_z: true, ..Tap::default() };
    let mut pass = LayerPass {
        mask: &own_mask,
        positions: &Tensor::arange(5, (Kind::Int64, Device::Cpu)).repeat([2, 1]),
        rotary: None,
        gate: None,
        fan: 1,
        train: false,
        stream: Default::default(),
        source: Some(Source { hidden: &other, mask: &source_mask }),
        state: None,
        at: None,
        tap: &mut tap,
    };
    let _ = layer.forward(&hidden, &mut pass).unwrap();

    let projections = layer.projections();
    let heads = |x: &Tensor, (weight, bias): &(Tensor, Option<Tensor>)| {
        x.linear(weight, bias.as_ref())
            .view([2, -1, dims.n_heads, dims.head_dim])
            .transpose(1, 2)
            .contiguous()
    };
    let q = heads(&hidden, &projections.q);
    let (k, v) = (heads(&other, &projections.k), heads(&other, &projections.v));
    for (example, n_real) in [(0, 7), (1, 4)] {
        let real = |x: &Tensor| x.narrow(0, example, 1).narrow(2, 0, n_real).contiguous();
        let probe = Probe {
            dims: dims.clone(),
            hidden: hidden.narrow(0, example, 1),
            q: q.narrow(0, example, 1).contiguous(),
            k: real(&k),
            v: real(&v),
            positions: Tensor::zeros([1, 5], (Kind::Int64, Device::Cpu)),
        };
        let (expected, _) = naive_attention(&probe, |_, _| true);
        assert_close("z", &tap.z[0].narrow(0, example, 1), &expected, 1e-12);
    }
}

#[test]
fn another_sequence_is_served_or_refused_by_every_kind() {
    let (hidden, other) = (randn(21, &[2, 5, 24]), randn(22, &[2, 7, 24]));
    let keep = Tensor::from_slice(&[1i64, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 0]).view([2, 7]);
    let (own_mask, source_mask) = (Mask::new(false), Mask::with_keep(false, &keep));
    for variant in attn_core::testing::kinds() {
        let mut model = model("bert");
        model.swap(&[0], &variant, 1).unwrap();
        let mut tap = Tap::default();
        let mut pass = LayerPass {
            mask: &own_mask,
            positions: &Tensor::arange(5, (Kind::Int64, Device::Cpu)).repeat([2, 1]),
            rotary: None,
            gate: None,
            fan: 1,
            train: false,
            stream: Default::default(),
            source: Some(Source { hidden: &other, mask: &source_mask }),
            state: None,
            at: None,
            tap: &mut tap,
        };
        match model.layers()[0].forward(&hidden, &mut pass) {
            Ok(out) => assert_eq!(out.size(), [2, 5, 24], "{variant:?}"),
            Err(error @ Error::Refused { .. }) => {
                assert!(error.to_string().contains(variant.name()), "{error}");
                assert_eq!(model.layers()[0].kind().masks(), Masks::Contiguous);
            }
            Err(error) => panic!("{variant:?}: {error}"),
        }
    }
}

/// What the folder's type is for. Needs Python with transformers, named by `ATTN_TEST_PYTHON`.
#[test]
fn transformers_refuses_a_swapped_folder_and_loads_a_plain_one() {
    const TEST: &str = "transformers_refuses_a_swapped_folder_and_loads_a_plain_one";
    let Some(python) = common::python(TEST, "transformers, torch") else { return };
    let dir = tempfile::tempdir().unwrap();
    let auto = |folder: &std::path::Path| {
        let code = "import sys, transformers; transformers.AutoModel.from_pretrained(sys.argv[1])";
        let output =
            std::process::Command::new(&python).args(["-c", code]).arg(folder).output().unwrap();
        (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let mut model = model("gpt2");
    let plain = dir.path().join("plain");
    model.save(&plain, &WriteOptions::default()).unwrap();
    assert!(auto(&plain).0, "{}", auto(&plain).1);
    model.swap(&[1], &window(5), 1).unwrap();
    let swapped = dir.path().join("swapped");
    model.save(&swapped, &WriteOptions::default()).unwrap();
    let (loads, said) = auto(&swapped);
    assert!(!loads && said.contains("attn_gpt2"), "{said}");
}

#[test]
fn bad_input_is_refused_by_name() {
    let model = model("distilbert");
    let refused = |input: ModelInput| {
        model.forward(&input, &ForwardOptions::default()).unwrap_err().to_string()
    };
    let ids = random_ids(16, [2, 5], 50);
    assert!(refused(ModelInput::new(&ids + 50)).contains("`input_ids`: holds"));
    assert!(refused(ModelInput::new(random_ids(16, [1, 49], 50))).contains("table of 48"));
    assert!(
        refused(ModelInput::masked(
            ids.shallow_clone(),
            Tensor::ones([2, 4], (Kind::Int64, Device::Cpu))
        ))
        .contains("attention_mask")
    );
    assert!(
        refused(ModelInput::masked(ids.shallow_clone(), ids.shallow_clone() + 2))
            .contains("0 and 1")
    );
    let gates = [None];
    let error = model.forward(
        &ModelInput::new(ids),
        &ForwardOptions { gates: &gates, ..ForwardOptions::default() },
    );
    assert!(error.unwrap_err().to_string().contains("2 layers"));
}

/// They would be softmax attention at a higher price, and nobody would see it.
#[test]
fn choices_of_more_than_there_is_are_refused() {
    for (base, kind, what) in [
        (
            "gpt2",
            r#"{"kind": "nsa"}"#,
            "`n_selected` = 16: expected at most 1, as the model's longest text, 48 tokens, has no more blocks of 64",
        ),
        (
            "llama",
            r#"{"kind": "moba"}"#,
            "`top_k` = 3: expected at most 1, as the model's longest text, 64 tokens, has no more blocks of 512",
        ),
        (
            "gpt2",
            r#"{"kind": "moba", "block": 12, "top_k": 5}"#,
            "expected at most 4, as the model's longest text, 48 tokens, has no more blocks of 12",
        ),
        ("bert", r#"{"kind": "indexed", "top_k": 49}"#, "expected at most 48"),
    ] {
        let variant: Variant = serde_json::from_str(kind).unwrap();
        let error = config(base).set_attention(&[0], &variant).unwrap_err().to_string();
        assert!(error.contains(what), "{base}, {kind}: {error}");
    }
    let all: Variant =
        serde_json::from_str(r#"{"kind": "moba", "block": 12, "top_k": 4}"#).unwrap();
    config("gpt2").set_attention(&[0], &all).unwrap();
}

#[test]
fn converting_to_f64_reaches_every_parameter() {
    let options = LoadOptions { seed: 3, ..LoadOptions::default() };
    for base in BASES {
        let mut model = Model::init(config(base), &options).unwrap();
        model.swap(&[0], &Variant::Gated(Default::default()), 1).unwrap();
        let input = ModelInput::new(random_ids(17, [2, 9], 50));
        let single = logits(&model, &input);
        model.to_kind(Kind::Double);
        assert!(model.parameters().iter().all(|(_, tensor)| tensor.kind() == Kind::Double));
        assert_close(base, &single, &logits(&model, &input), 1e-5);
    }
}

#[test]
fn a_layer_attends_to_what_it_is_given_as_in_a_pass() {
    for base in BASES {
        let mut model = model(base);
        model.swap(&[1], &window(3), 1).unwrap();
        let ids = random_ids(5, [2, 9], 50);
        let mask = Tensor::from_slice(&[1i64, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 1]);
        let input = ModelInput::masked(ids, mask.view([2, 9]));
        let options = ForwardOptions {
            z: true,
            attentions: Rows::All,
            attention_inputs: true,
            ..ForwardOptions::default()
        };
        let pass = model.forward(&input, &options).unwrap();

        let alone = model.attend(&input, &[0, 1], &pass.attention_inputs, &options).unwrap();

        for layer in 0..2 {
            assert_close(base, &alone.z[layer], &pass.z[layer], 1e-12);
            assert_close(base, &alone.attentions[layer], &pass.attentions[layer], 1e-12);
        }
        let one = model.attend(&input, &[1], &pass.attention_inputs[..1], &options).unwrap();
        assert!(
            relative_rms(&one.z[0], &pass.z[1]) > 1e-3,
            "{base}: another input, another output"
        );
    }
}

#[test]
fn the_vocabulary_makes_the_logits_of_what_stands_before_it() {
    for base in BASES {
        let model = model(base);
        let input = ModelInput::new(random_ids(6, [2, 7], 50));
        let options = ForwardOptions { before_vocabulary: true, ..ForwardOptions::default() };
        let features = model.forward(&input, &options).unwrap().logits;
        let vocabulary = model.vocabulary().unwrap();
        let made = features.linear(&vocabulary.weight, vocabulary.bias.as_ref());
        assert_close(base, &made, &logits(&model, &input), 1e-12);
    }
    let classifier = ending_in(WantedHead::NewClassifier(vec!["a".into(), "b".into()]), "bert");
    assert!(classifier.vocabulary().is_none());
    let options = ForwardOptions { before_vocabulary: true, ..ForwardOptions::default() };
    let error =
        classifier.forward(&ModelInput::new(random_ids(6, [1, 4], 50)), &options).unwrap_err();
    assert!(error.to_string().contains("a classifier of 2 classes"), "{error}");
}

#[test]
fn a_second_model_on_the_same_memory_is_changed_without_the_first() {
    for base in BASES {
        let teacher = model(base);
        let input = ModelInput::new(random_ids(7, [2, 9], 50));
        let before = logits(&teacher, &input);
        let mut student = teacher.alias().unwrap();
        assert!(logits(&student, &input).equal(&before), "{base}");
        let place = |model: &Model| model.parameters()[0].1.data_ptr();
        assert_eq!(place(&student), place(&teacher), "{base}: held once");

        student.swap(&[0], &Variant::Gated(Default::default()), 1).unwrap();
        student.own(&|_| true);
        assert_ne!(place(&student), place(&teacher), "{base}");
        shake(&mut student);

        assert!(relative_rms(&logits(&student, &input), &before) > 1e-3, "{base}");
        assert!(logits(&teacher, &input).equal(&before), "{base}");
    }
}

/// A gate of `[rows, 4, 1, 1]` with some heads closed, others half open.
fn gate(seed: u64, rows: i64, fill: Fill) -> Gate {
    let soft = randn(seed, &[rows, 4, 1, 1]).sigmoid();
    Gate { g: &soft * soft.gt(0.4).to_kind(Kind::Double), fill }
}

/// A padded batch of 2 rows, with another sequence where the model attends to one.
fn padded(model: &Model) -> ModelInput {
    let keep =
        Tensor::from_slice(&[1i64, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0]).view([2, 8]);
    let input = ModelInput::masked(random_ids(21, [2, 8], 50), keep);
    match model.needs_source() {
        true => input.attending_to(ModelInput::new(random_ids(22, [2, 6], 50))),
        false => input,
    }
}

/// Rows `first` to `first + 2` of a gate.
fn of_copy(gate: &Gate, first: i64) -> Gate {
    let fill = match &gate.fill {
        Fill::Zero => Fill::Zero,
        Fill::ZeroQuery => Fill::ZeroQuery,
        Fill::Values(r) => Fill::Values(r.narrow(0, first, 2)),
    };
    Gate { g: gate.g.narrow(0, first, 2), fill }
}

#[test]
fn a_branch_is_what_whole_passes_under_its_gates_are() {
    for base in BASES {
        for variant in kinds_of(base) {
            let mut model = model(base);
            model.swap(&[1], &variant, 1).unwrap();
            shake(&mut model);
            let input = padded(&model);
            if model.needs_source() {
                let error = model.begin(&input, &ForwardOptions::default()).unwrap_err();
                assert!(error.to_string().contains("block by block"), "{error}");
                continue;
            }
            for layer in [0, 1] {
                let values = || randn(5, &[6, 4, 8, model.layers()[layer].dims().head_dim]);
                for fill in [Fill::Zero, Fill::Values(values()), Fill::ZeroQuery] {
                    let reads = model.layers()[layer].kind().reads_queries();
                    if matches!(fill, Fill::ZeroQuery) && !reads {
                        continue;
                    }
                    let three = gate(6, 6, fill);
                    let at = Tensor::from_slice(&[2i64, 9, 11]);
                    let wanted =
                        ForwardOptions { logits_at: Some(&at), ..ForwardOptions::default() };
                    let mut running = model.begin(&input, &wanted).unwrap();
                    (0..layer).for_each(|_| running.advance(None).unwrap());
                    let branch = running.branch(3, &three).unwrap();
                    assert_eq!((branch.layer(), branch.n_rows()), (layer + 1, 6));
                    let found = branch.finish().unwrap();
                    // In front of the branch nothing has changed.
                    assert!(running.finish().unwrap().equal(&logits_at(&model, &input, &at, &[])));

                    for copy in 0..3 {
                        let mut gates = vec![None, None];
                        gates[layer] = Some(of_copy(&three, 2 * copy));
                        let expected = logits_at(&model, &input, &at, &gates);
                        let name = format!("{base} with {variant:?}, {:?}", three.fill);
                        assert_close(&name, &found.narrow(0, 3 * copy, 3), &expected, 1e-12);
                    }
                }
            }
        }
    }
}

fn logits_at(model: &Model, input: &ModelInput, at: &Tensor, gates: &[Option<Gate>]) -> Tensor {
    let options = ForwardOptions { logits_at: Some(at), gates, ..ForwardOptions::default() };
    model.forward(input, &options).unwrap().logits
}

#[test]
fn a_query_of_zeros_gives_the_mean_of_the_values_in_sight() {
    for base in BASES {
        let model = model(base);
        let input = padded(&model);
        // Head 2 of the first layer, in the second row from position 3 on.
        let g = Tensor::ones([2, 4, 8, 1], (Kind::Double, Device::Cpu));
        let _ = g.get(1).get(2).narrow(0, 3, 5).fill_(0.0);
        let mut values = model.begin(&input, &ForwardOptions::default()).unwrap();
        let z = values.advance_with_z(Some(&Gate { g, fill: Fill::ZeroQuery })).unwrap();

        let asked = ForwardOptions { attentions: Rows::All, z: true, ..ForwardOptions::default() };
        let plain = model.forward(&input, &asked).unwrap();
        let open = plain.z[0].narrow(1, 0, 2);
        assert!(z.narrow(1, 0, 2).equal(&open), "{base}: other heads");
        assert!(z.get(0).equal(&plain.z[0].get(0)), "{base}: another row");
        assert!(z.get(1).narrow(1, 0, 3).equal(&plain.z[0].get(1).narrow(1, 0, 3)), "{base}");
        // The values, from what the heads made of them: z = A v has one solution where A is invertible, and a causal A is.
        if !model.config().is_causal() {
            continue;
        }
        let weights = plain.attentions[0].get(1).get(2).narrow(0, 0, 6).narrow(1, 0, 6);
        let v = Tensor::linalg_solve(&weights, &plain.z[0].get(1).get(2).narrow(0, 0, 6), true);
        for pos in 3..6 {
            let mean = v.narrow(0, 0, pos + 1).mean_dim([0i64].as_slice(), false, Kind::Double);
            assert_close(base, &z.get(1).get(2).get(pos), &mean, 1e-9);
        }
    }
}

#[test]
fn heads_without_queries_of_their_own_are_not_given_zeros() {
    let mut model = model("gpt2");
    model.swap(&[0], &serde_json::from_str(r#"{"kind": "single_head"}"#).unwrap(), 1).unwrap();
    let gates = [Some(gate(1, 1, Fill::ZeroQuery)), None];
    let options = ForwardOptions { gates: &gates, ..ForwardOptions::default() };
    let error = model.forward(&padded(&model), &options).unwrap_err().to_string();
    assert!(error.contains("single_head") && error.contains("hint: replace"), "{error}");
}

#[test]
fn gated_models_decode_as_they_run() {
    for base in ["gpt2", "llama"] {
        for fill in [Fill::Zero, Fill::ZeroQuery] {
            let model = model(base);
            let g = Tensor::from_slice(&[1.0, 0.0, 1.0, 0.0]).view([1, 4, 1, 1]);
            let gates = [None, Some(Gate { g, fill })];
            let options = ForwardOptions { gates: &gates, ..ForwardOptions::default() };
            let ids = random_ids(9, [2, 9], 50);
            let whole = model.forward(&ModelInput::new(ids.shallow_clone()), &options).unwrap();
            let mut state = model.start();
            let steps = [(0, 5), (5, 1), (6, 3)].map(|(first, n)| {
                let input = ModelInput::new(ids.narrow(1, first, n));
                model.step(&input, &mut state, &options).unwrap().logits
            });
            assert_close(base, &Tensor::cat(&steps, 1), &whole.logits, 1e-12);
        }
        let model = model(base);
        let gates = [None, Some(gate(2, 1, Fill::ZeroQuery))];
        let options = ForwardOptions { gates: &gates, ..ForwardOptions::default() };
        let input = ModelInput::new(random_ids(9, [2, 3], 50));
        let error = model.step(&input, &mut model.start(), &options).unwrap_err().to_string();
        assert!(error.contains("neither 0 nor 1"), "{error}");
    }
}

#[test]
fn a_llama_with_equally_fewer_heads_is_an_ordinary_folder() {
    let folder = std::env::temp_dir().join(format!("attn-fewer-{}", std::process::id()));
    let input = ModelInput::new(random_ids(9, [2, 11], 50));
    let saved = |model: &Model| -> serde_json::Map<String, Value> {
        let _ = std::fs::remove_dir_all(&folder);
        model.save(&folder, &WriteOptions::default()).unwrap();
        read_json(&folder, "config.json").unwrap()
    };
    // Query heads of each layer's groups {0, 1} and {2, 3}: what is left, and whether transformers can say it.
    for (kept, heads) in [
        ([vec![0, 2], vec![1, 3]], Some((2, 2))),
        ([vec![2, 3], vec![0, 1]], Some((2, 1))),
        ([vec![0, 2, 3], vec![0, 1, 3]], None), // uneven groups
        ([vec![0, 2], vec![2, 3]], None),
        ([vec![0], vec![]], None),
    ] {
        let mut model = model("llama");
        for (layer, kept) in kept.iter().enumerate() {
            model.select_heads(layer, kept).unwrap();
        }
        let config = saved(&model);
        assert_eq!(config["model_type"] == "llama", heads.is_some(), "{kept:?}");
        assert_eq!(config.contains_key("attn"), heads.is_none(), "{kept:?}");
        if let Some((n_heads, n_kv_heads)) = heads {
            assert_eq!(config["num_attention_heads"], n_heads);
            assert_eq!(config["num_key_value_heads"], n_kv_heads);
            assert_eq!(config["head_dim"], 8);
        }
        let options = LoadOptions { kind: Kind::Double, ..LoadOptions::default() };
        let (again, _) = Model::load(&folder, &options).unwrap();
        assert_close("loaded", &logits(&again, &input), &logits(&model, &input), 1e-12);
        let twice = saved(&again);
        assert_eq!(twice["model_type"], config["model_type"]);
    }
    // A GPT-2 has no field for it.
    let mut model = model("gpt2");
    (0..2).for_each(|layer| model.select_heads(layer, &[0, 1]).unwrap());
    assert_eq!(saved(&model)["model_type"], "attn_gpt2");
    std::fs::remove_dir_all(&folder).unwrap();
}
