//! Adapters: no change at first, the same merged as apart, PEFT's logits from PEFT's files and PEFT's from ours.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use attn_core::{
    Config, Error, ForwardOptions, LoadOptions, Lora, Model, ModelInput, Variant,
    checkpoint::{WriteOptions, read_metadata, read_tensors, write_tensors},
    lora::is_adapter,
    testing::{assert_close, randn, random_ids, relative_rms},
};
use tch::{Kind, Tensor};

mod common;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn load(name: &str, kind: Kind) -> Model {
    let options = LoadOptions { kind, ..LoadOptions::default() };
    Model::load(&golden(name), &options).unwrap_or_else(|error| panic!("{name}: {error}")).0
}

fn logits(model: &Model, ids: &Tensor, train: bool) -> Tensor {
    let options = ForwardOptions { train, ..ForwardOptions::default() };
    model.forward(&ModelInput::new(ids.shallow_clone()), &options).unwrap().logits
}

/// Gives every factor some value: B starts at zero.
fn fill(model: &Model) {
    let _no_grad = tch::no_grad_guard();
    for (i, (name, tensor)) in (0..).zip(model.parameters()) {
        if is_adapter(&name) {
            tensor.shallow_clone().copy_(&(randn(i, &tensor.size()) * 0.5));
        }
    }
}

/// The matrices of q, k and v of the first layer.
fn projections(model: &Model) -> [Tensor; 3] {
    let all = model.layers()[0].projections();
    [all.q.0, all.k.0, all.v.0]
}

fn lora(targets: &[&str]) -> Lora {
    Lora {
        rank: 3.try_into().unwrap(),
        alpha: 5.0,
        targets: targets.iter().map(|&name| name.to_owned()).collect(),
        ..Lora::default()
    }
}

/// A model of each architecture and head, and a matrix to adapt.
const CASES: [(&str, &str); 5] = [
    ("gpt2_lm_tied", "c_attn"),
    ("gpt2_classifier", "attn.c_proj"),
    ("llama_biases", "q_proj"),
    ("distilbert_classifier_3", "lin1"),
    ("bert_mlm_tied", "all-linear"),
];

#[test]
fn an_adapter_begins_as_no_change_and_is_the_same_merged_as_apart() {
    for (case, target) in CASES {
        let mut model = load(case, Kind::Double);
        let ids = random_ids(1, [2, 6], 20);
        let before = logits(&model, &ids, false);
        let names: Vec<String> = model.parameters().into_iter().map(|(name, _)| name).collect();

        model.add_lora(&lora(&[target]), 1).unwrap();
        assert_close(case, &logits(&model, &ids, false), &before, 1e-14);
        fill(&model);
        let apart = logits(&model, &ids, false);
        assert!(relative_rms(&apart, &before) > 1e-2, "{case}: the adapter changes nothing");

        model.merge_lora().unwrap();
        assert_close(case, &logits(&model, &ids, false), &apart, 1e-12);
        let after: Vec<String> = model.parameters().into_iter().map(|(name, _)| name).collect();
        assert_eq!(after, names, "{case}: nothing of the adapters remains");
        assert!(model.lora().is_none());
    }
}

/// y = W x + s · B A x, by hand.
#[test]
fn a_correction_is_scale_times_b_a() {
    let mut model = load("gpt2_lm_tied", Kind::Double);
    model.add_lora(&lora(&["h.1.mlp.c_fc"]), 1).unwrap();
    fill(&model);
    let named: BTreeMap<String, Tensor> = model.parameters().into_iter().collect();
    let part = |name: &str| named[&format!("transformer.h.1.mlp.c_fc.{name}")].copy();
    let (weight, a, b) = (part("weight"), part("lora_A.weight"), part("lora_B.weight"));
    assert_eq!(a.size()[0], 3);

    model.merge_lora().unwrap();

    let expected = weight + b.matmul(&a).tr() * (5.0 / 3.0); // GPT-2 stores [in, out].
    let merged: BTreeMap<String, Tensor> = model.parameters().into_iter().collect();
    assert_close("merged", &merged["transformer.h.1.mlp.c_fc.weight"], &expected, 1e-14);
}

#[test]
fn ranks_of_q_k_and_v_reach_their_own_outputs_alone() {
    for (case, module) in [("gpt2_lm_tied", "transformer.h.0.attn.c_attn"), ("llama_biases", "")] {
        for (which, ranks) in [(0, [2, 0, 0]), (1, [0, 2, 0]), (2, [0, 0, 2])] {
            let mut model = load(case, Kind::Double);
            let before: Vec<_> = projections(&model).map(|x| x.copy()).into();
            model.add_lora(&Lora { qkv_ranks: Some(ranks), ..lora(&[]) }, 1).unwrap();
            fill(&model);
            let ids = random_ids(1, [2, 6], 20);
            let apart = logits(&model, &ids, false);
            if !module.is_empty() {
                let error = model.check_export(&[]).unwrap_err().to_string();
                assert!(error.contains(module) && error.contains("PEFT"), "{error}");
            }
            model.merge_lora().unwrap();
            assert_close(case, &logits(&model, &ids, false), &apart, 1e-12);
            let after = projections(&model);
            for (i, (before, after)) in before.iter().zip(&after).enumerate() {
                assert_eq!(
                    before.equal(after),
                    i != which,
                    "{case}: projection {i}, ranks {ranks:?}"
                );
            }
        }
    }
}

#[test]
fn gradients_reach_both_factors_and_match_finite_differences() {
    let mut model = load("gpt2_lm_tied", Kind::Double);
    let ids = random_ids(3, [2, 6], 20);
    model.add_lora(&lora(&["c_attn"]), 1).unwrap();
    fill(&model);
    let all = model.parameters();
    let factors: Vec<&Tensor> =
        all.iter().filter(|(name, _)| is_adapter(name)).map(|(_, tensor)| tensor).collect();
    for factor in &factors {
        let _ = factor.set_requires_grad(true);
    }
    let loss = || logits(&model, &ids, false).square().sum(Kind::Double);
    loss().backward();
    for factor in factors {
        let (grad, step) = (factor.grad(), 1e-6);
        let flat = |tensor: &Tensor| tensor.view(-1);
        for at in [0, factor.numel() as i64 - 1] {
            let at_step = |sign: f64| {
                let _ = tch::no_grad(|| flat(factor).get(at).g_add_scalar_(sign * step));
                let value = tch::no_grad(loss).double_value(&[]);
                let _ = tch::no_grad(|| flat(factor).get(at).g_add_scalar_(-sign * step));
                value
            };
            let expected = (at_step(1.0) - at_step(-1.0)) / (2.0 * step);
            let actual = flat(&grad).double_value(&[at]);
            assert!(
                (actual - expected).abs() < 1e-5 * expected.abs().max(1.0),
                "{actual} {expected}"
            );
        }
    }
}

#[test]
fn dropout_falls_on_the_adapters_input_in_training_alone() {
    let mut model = load("llama_biases", Kind::Double); // it has no dropout of its own
    model.add_lora(&Lora { dropout: 0.5, ..lora(&["q_proj", "down_proj"]) }, 1).unwrap();
    fill(&model);
    let ids = random_ids(1, [2, 6], 20);
    let [first, second] = [(), ()].map(|()| logits(&model, &ids, false));
    assert!(first.equal(&second));
    let [first, second] = [(), ()].map(|()| logits(&model, &ids, true));
    assert!(!first.equal(&second));
}

/// The logits that PEFT computed with its own adapter, read from its files.
#[test]
fn adapters_that_peft_wrote_give_its_logits() {
    let mut n_cases = 0;
    for case in ["gpt2_lm_tied", "llama_lm_untied", "distilbert_classifier_2"] {
        let mut model = load(case, Kind::Float);
        let dir = golden(case).join("adapter");
        let expected: BTreeMap<String, Tensor> =
            read_tensors(&dir.join("expected.safetensors")).unwrap().into_iter().collect();

        model.load_adapter(&dir).unwrap();

        assert_close(
            case,
            &logits(&model, &expected["input_ids"], false),
            &expected["logits"],
            1e-5,
        );
        n_cases += 1;
    }
    assert_eq!(n_cases, 3);
}

/// A folder of adapters, and parameters that were trained beside them.
fn saved(case: &str, dir: &Path) -> (Model, Vec<String>) {
    let mut model = load(case, Kind::Float);
    let trained: Vec<String> = model
        .parameters()
        .into_iter()
        .map(|(name, _)| name)
        .filter(|name| name.contains("classifier"))
        .collect();
    model.add_lora(&lora(&["all-linear"]), 1).unwrap();
    fill(&model);
    tch::no_grad(|| {
        for (name, tensor) in model.parameters() {
            if trained.contains(&name) {
                let _ = tensor.shallow_clone().g_add_scalar_(0.25);
            }
        }
    });
    model.save_adapter(dir, case, &trained, &[("note.txt".into(), b"x".to_vec())]).unwrap();
    (model, trained)
}

#[test]
fn what_was_saved_is_read_again() {
    let temp = tempfile::tempdir().unwrap();
    for case in ["gpt2_lm_tied", "llama_biases", "distilbert_classifier_3", "bert_classifier"] {
        let dir = temp.path().join(case);
        let (model, trained) = saved(case, &dir);
        let ids = random_ids(1, [2, 6], 20);
        assert_eq!(trained.is_empty(), !case.contains("classifier"));
        assert_eq!(fs::read(dir.join("note.txt")).unwrap(), b"x");

        let mut again = load(case, Kind::Float);
        again.load_adapter(&dir).unwrap();

        assert!(logits(&again, &ids, false).equal(&logits(&model, &ids, false)), "{case}");
        assert_eq!(again.lora().unwrap().rank, model.lora().unwrap().rank);
    }
}

/// Ranks, alphas and scales of PEFT's own files, also those that no setting of ours expresses.
#[test]
fn what_peft_wrote_keeps_its_scales_when_saved_again() {
    let temp = tempfile::tempdir().unwrap();
    for case in ["gpt2_lm_tied", "llama_lm_untied"] {
        let dir = golden(case).join("adapter");
        let expected: BTreeMap<String, Tensor> =
            read_tensors(&dir.join("expected.safetensors")).unwrap().into_iter().collect();
        let mut model = load(case, Kind::Float);
        model.load_adapter(&dir).unwrap();
        model.save_adapter(&temp.path().join(case), case, &[], &[]).unwrap();

        let mut again = load(case, Kind::Float);
        again.load_adapter(&temp.path().join(case)).unwrap();

        let logits = logits(&again, &expected["input_ids"], false);
        assert_close(case, &logits, &expected["logits"], 1e-5);
    }
}

#[test]
fn an_adapter_fits_its_base_in_whatever_it_is_computed() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("adapter");
    let (model, _) = saved("llama_biases", &dir);
    let ids = random_ids(1, [2, 6], 20);
    let expected = logits(&model, &ids, false);
    for (kind, tolerance) in [(Kind::Double, 1e-5), (Kind::BFloat16, 5e-2)] {
        let mut model = load("llama_biases", kind);
        model.load_adapter(&dir).unwrap_or_else(|error| panic!("{kind:?}: {error}"));
        let error = relative_rms(&logits(&model, &ids, false), &expected);
        assert!(error < tolerance, "{kind:?}: {error:e}");
    }
    // In f16 the values are others than those that were stored in f32: no base could be told from another.
    let error = load("llama_biases", Kind::Half).load_adapter(&dir).unwrap_err().to_string();
    assert!(error.contains("load the model in f32, the adapter, then convert"), "{error}");
    let mut model = load("llama_biases", Kind::Float);
    model.load_adapter(&dir).unwrap();
    model.merge_lora().unwrap();
    model.to_kind(Kind::Half);
    let error = relative_rms(&logits(&model, &ids, false), &expected);
    assert!(error < 1e-2, "{error:e}");
}

#[test]
fn a_pattern_that_peft_would_read_as_a_regular_expression_is_refused() {
    let temp = tempfile::tempdir().unwrap();
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        fs::copy(golden("llama_lm_untied").join("adapter").join(file), temp.path().join(file))
            .unwrap();
    }
    let path = temp.path().join("adapter_config.json");
    let text = fs::read_to_string(&path).unwrap();
    assert!(text.contains("\"v_proj\": 4"), "{text}");
    fs::write(&path, text.replace("\"v_proj\": 4", "\".*v_proj\": 4")).unwrap();
    let error = load("llama_lm_untied", Kind::Float).load_adapter(temp.path()).unwrap_err();
    let message = error.to_string();
    assert!(message.contains("alpha_pattern") && message.contains("regular"), "{message}");
}

#[test]
fn a_pretrained_start_that_changes_the_base_is_refused() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("adapter");
    saved("llama_biases", &dir);
    let path = dir.join("adapter_config.json");
    let text = fs::read_to_string(&path).unwrap();
    for (init, is_fine) in [("true", true), ("\"gaussian\"", true), ("\"pissa_niter_4\"", false)] {
        let with = text.replacen('{', &format!("{{\"init_lora_weights\": {init},"), 1);
        fs::write(&path, with).unwrap();
        match load("llama_biases", Kind::Float).load_adapter(&dir) {
            Ok(_) => assert!(is_fine, "{init}"),
            Err(error) => {
                let error = error.to_string();
                assert!(!is_fine && error.contains("`init_lora_weights` is \"pissa"), "{error}");
            }
        }
    }
}

#[test]
fn an_embedding_that_is_the_head_too_is_not_saved_beside_adapters() {
    let temp = tempfile::tempdir().unwrap();
    for (case, name, is_tied) in [
        ("gpt2_lm_tied", "transformer.wte.weight", true),
        ("gpt2_lm_tied", "transformer.wpe.weight", false),
        ("llama_lm_untied", "model.embed_tokens.weight", false),
    ] {
        let mut model = load(case, Kind::Float);
        model.add_lora(&lora(&["all-linear"]), 1).unwrap();
        let trained = [name.to_owned()];
        match model.check_export(&trained) {
            Ok(()) => assert!(!is_tied, "{case}: {name}"),
            Err(error) => {
                let error = error.to_string();
                assert!(is_tied && error.contains(name) && error.contains("merge"), "{error}");
            }
        }
    }
    // Nor read: PEFT takes the two apart, and we would not.
    let dir = temp.path().join("adapter");
    saved("gpt2_lm_tied", &dir);
    let file = dir.join("adapter_model.safetensors");
    let mut tensors = read_tensors(&file).unwrap();
    let embedding = load("gpt2_lm_tied", Kind::Float).parameters()[0].1.shallow_clone();
    tensors.push(("base_model.model.transformer.wte.weight".into(), embedding));
    write_tensors(&file, &tensors, &BTreeMap::new()).unwrap();
    let error = load("gpt2_lm_tied", Kind::Float).load_adapter(&dir).unwrap_err().to_string();
    assert!(error.contains("modules_to_save") && error.contains("transformer.wte"), "{error}");
}

#[test]
fn an_adapter_for_another_model_is_refused_with_what_does_not_fit() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("adapter");
    saved("gpt2_lm_tied", &dir);
    let refusal = |mut model: Model| {
        let before: Vec<(String, Tensor)> = model.parameters();
        let error = model.load_adapter(&dir).unwrap_err();
        assert!(matches!(error, Error::Adapter { .. }), "{error}");
        let after = model.parameters();
        assert!(before.iter().zip(&after).all(|(a, b)| a.0 == b.0 && a.1.equal(&b.1)));
        error.to_string()
    };

    let other = refusal(load("llama_biases", Kind::Float));
    assert!(other.contains("c_attn.lora_A.weight: no such matrix"), "{other}");
    assert!(other.contains("trained beside `gpt2_lm_tied`"), "{other}");

    let mut twin = load("gpt2_lm_tied", Kind::Float);
    let (_, weight) = &twin.parameters()[0];
    let _ = tch::no_grad(|| weight.get(0).g_add_scalar_(1e-3));
    let shifted = refusal(std::mem::replace(&mut twin, load("gpt2_lm_tied", Kind::Float)));
    assert!(shifted.contains("are others than the model's"), "{shifted}");

    let marked = dir.join("adapter_model.safetensors");
    assert_eq!(read_metadata(&marked).unwrap()["attn_base_sha256"].len(), 64);

    // A factor of the wrong shape.
    let file = dir.join("adapter_model.safetensors");
    let mut tensors = read_tensors(&file).unwrap();
    let name = tensors[0].0.clone();
    tensors[0].1 = Tensor::zeros([3, 5], (Kind::Float, tch::Device::Cpu));
    write_tensors(&file, &tensors, &BTreeMap::new()).unwrap();
    let wrong = refusal(twin);
    assert!(wrong.contains(&format!("{name}: [3, 5] in the adapter")), "{wrong}");
}

/// One value of a large matrix, neither in the first row nor in the first column.
#[test]
fn every_weight_of_the_base_counts() {
    let value = serde_json::json!({
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 50, "n_positions": 16, "n_embd": 64,
        "n_layer": 1, "n_head": 2,
    });
    let map = value.as_object().unwrap().clone();
    let base = |kind: Kind| {
        let config = Config::from_json(map.clone()).unwrap();
        let mut model = Model::init(config, &LoadOptions::default()).unwrap();
        model.to_kind(kind);
        model
    };
    let mut adapted = base(Kind::Float);
    adapted.add_lora(&Lora::default(), 1).unwrap();
    let dir = tempfile::tempdir().unwrap();
    adapted.save_adapter(dir.path(), "base", &[], &[]).unwrap();
    for kind in [Kind::Float, Kind::Double, Kind::BFloat16] {
        base(kind).load_adapter(dir.path()).unwrap();
        let mut other = base(kind);
        for (name, tensor) in other.parameters() {
            if name.ends_with("mlp.c_fc.weight") {
                let _ = tch::no_grad(|| tensor.get(5).get(7).g_add_scalar_(0.1));
            }
        }
        let error = other.load_adapter(dir.path()).unwrap_err().to_string();
        assert!(error.contains("are others than the model's"), "{kind:?}: {error}");
    }
}

#[test]
fn settings_that_do_not_fit_are_named() {
    let mut model = load("gpt2_lm_tied", Kind::Float);
    let mut refusal = |lora: Lora| match model.add_lora(&lora, 0).unwrap_err() {
        Error::Lora { field, problem } => (field, problem),
        other => panic!("{other}"),
    };
    let (field, problem) = refusal(lora(&["c_attn", "q_proj"]));
    assert_eq!(field, "targets");
    assert!(
        problem.contains("`q_proj` matches no matrix") && problem.contains("c_attn, c_fc, c_proj")
    );
    assert_eq!(refusal(Lora { alpha: 0.0, ..lora(&[]) }).0, "alpha");
    assert_eq!(refusal(Lora { dropout: 1.0, ..lora(&[]) }).0, "dropout");
    assert_eq!(refusal(Lora { qkv_ranks: Some([0; 3]), ..lora(&[]) }).0, "qkv_ranks");
    let (field, problem) = refusal(Lora { qkv_ranks: Some([2, 0, 2]), ..lora(&["c_attn"]) });
    assert!(field == "targets" && problem.contains("`qkv_ranks` gives"), "{field}: {problem}");

    model.add_lora(&lora(&[]), 0).unwrap();
    let variant = Variant::all().swap_remove(0);
    let refused: [Result<(), Error>; 4] = [
        model.add_lora(&lora(&[]), 0),
        model.swap(&[0], &variant, 0),
        model.select_heads(0, &[0]),
        model.save(Path::new("nowhere"), &WriteOptions::default()),
    ];
    for result in refused {
        let message = result.unwrap_err().to_string();
        assert!(message.contains("merge them first"), "{message}");
    }
}

/// PEFT loads what we saved and computes the same.
#[test]
fn peft_reads_what_was_saved() {
    const TEST: &str = "peft_reads_what_was_saved";
    let Some(python) = common::python(TEST, "peft, transformers") else { return };
    let temp = tempfile::tempdir().unwrap();
    for case in ["gpt2_lm_tied", "llama_biases", "distilbert_classifier_3"] {
        let dir = temp.path().join(case);
        let (model, _) = saved(case, &dir);
        let ids = random_ids(1, [2, 6], 20);
        let ours = logits(&model, &ids, false);
        let input = dir.join("ours.safetensors");
        write_tensors(&input, &[("ids".into(), ids), ("logits".into(), ours)], &BTreeMap::new())
            .unwrap();
        let script = "\
import sys, torch, transformers
from peft import PeftModel
from safetensors.torch import load_file
base, adapter = sys.argv[1:]
name = transformers.AutoConfig.from_pretrained(base).architectures[0]
model = getattr(transformers, name).from_pretrained(base, dtype=torch.float32)
model = PeftModel.from_pretrained(model, adapter).eval()
ours = load_file(adapter + '/ours.safetensors')
with torch.no_grad():
    theirs = model(ours['ids']).logits
print(((theirs - ours['logits']).square().mean() / theirs.square().mean()).sqrt().item())";
        let output = Command::new(&python)
            .args(["-W", "ignore", "-c", script])
            .args([golden(case), dir.clone()])
            .env("TRANSFORMERS_VERBOSITY", "error")
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let error: f64 = text.trim().parse().unwrap_or_else(|_| {
            panic!("{case}: {text}{}", String::from_utf8_lossy(&output.stderr))
        });
        assert!(error < 1e-5, "{case}: {error:e}");
    }
}
