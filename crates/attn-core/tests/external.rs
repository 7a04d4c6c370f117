//! An attention kind of another crate: what its authors write, and that it is a kind like any other.

use attn_core::{
    Config, Error, ForwardOptions, LoadOptions, Model, ModelInput, Variant,
    attention::{Attention, AttnInput, Dims, Nature, Own, Projections},
    checkpoint::WriteOptions,
    external::{self, Kind, Settings},
    laws,
    nn::Visitor,
};
use serde_json::{Value, json};
use tch::Tensor;

/// Softmax attention whose values are scaled by a number: z = c Σ_j softmax_j(s_ij) v_j.
#[derive(Debug)]
struct Scaled {
    by: f64,
    softmax: Box<dyn Attention>,
}

impl Attention for Scaled {
    fn forward(&self, input: &AttnInput) -> Tensor {
        self.softmax.forward(input) * self.by
    }

    fn weights(&self, input: &AttnInput, rows: &[i64]) -> Tensor {
        self.softmax.weights(input, rows) * self.by
    }

    fn flops(&self, n_tokens: i64) -> i64 {
        self.softmax.flops(n_tokens)
    }

    fn nature(&self) -> Nature {
        self.softmax.nature()
    }

    fn visit(&self, _: &mut Visitor<'_>) {}

    fn select_heads(&mut self, heads: &[i64], dims: &Dims) -> Result<(), Error> {
        self.softmax.select_heads(heads, dims)
    }

    fn regroup_kv(&mut self, groups: &[Vec<i64>], dims: &Dims) -> Result<(), Error> {
        self.softmax.regroup_kv(groups, dims)
    }
}

fn build(
    settings: &Settings,
    dims: &Dims,
    projections: &Projections,
    own: &mut Own<'_, '_>,
) -> Result<Box<dyn Attention>, Error> {
    let by = settings.get("by").and_then(Value::as_f64).filter(|by| *by > 0.0);
    let Some(by) = by else {
        return Err(Error::Setting {
            kind: "scaled",
            field: "by",
            value: settings.get("by").map_or("nothing".into(), Value::to_string),
            problem: "expected a number above 0".into(),
        });
    };
    // What it is made of is a kind, too.
    let softmax = Variant::default().build(dims, projections, own)?;
    Ok(Box::new(Scaled { by, softmax }))
}

const SCALED: Kind = Kind {
    name: "scaled",
    defaults: || Settings::from_iter([("by".to_owned(), json!(1.0))]),
    build,
};

/// Tests share a process: the first registers it.
fn register() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| external::register(SCALED).unwrap());
}

fn scaled(by: f64) -> Variant {
    serde_json::from_value(json!({"kind": "scaled", "by": by})).unwrap()
}

#[test]
fn a_kind_is_known_once_it_is_registered_and_its_name_is_its_own() {
    let unknown: Result<Variant, _> = serde_json::from_value(json!({"kind": "no_such_kind"}));
    assert!(unknown.unwrap_err().to_string().contains("unknown variant `no_such_kind`"));
    register();
    assert_eq!(scaled(2.0).name(), "scaled");
    let plain: Variant = serde_json::from_value(json!({"kind": "scaled"})).unwrap();
    assert_eq!(plain, scaled(1.0), "its defaults");
    assert_eq!(serde_json::to_value(scaled(2.0)).unwrap(), json!({"kind": "scaled", "by": 2.0}));
    for (name, problem) in
        [("scaled", "taken"), ("softmax", "taken"), ("A b", "no name"), ("", "no name")]
    {
        let refused = external::register(Kind { name, ..SCALED }).unwrap_err().to_string();
        assert!(refused.contains(problem), "{refused}");
    }
}

#[test]
fn it_keeps_the_laws_of_all_kinds() {
    register();
    for verdict in laws::for_layer(&scaled(0.5), laws::ProbeSize::default()).unwrap() {
        assert!(verdict.held(), "{verdict:?}");
    }
}

#[test]
fn a_model_is_swapped_to_it_saved_and_loaded_again() {
    register();
    let config = json!({
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 10, "n_embd": 16, "n_layer": 2,
        "n_head": 2, "n_positions": 16,
    });
    let config = Config::from_json(serde_json::from_value(config).unwrap()).unwrap();
    let mut model = Model::init(config, &LoadOptions::default()).unwrap();
    let input = ModelInput::new(Tensor::from_slice(&[1_i64, 5, 3, 2]).unsqueeze(0));
    let logits = |model: &Model| {
        tch::no_grad(|| model.forward(&input, &ForwardOptions::default())).unwrap().logits
    };
    let before = logits(&model);
    model.swap(&[0, 1], &scaled(1.0), 0).unwrap();
    assert!((logits(&model) - &before).abs().max().double_value(&[]) < 1e-6);
    model.swap(&[1], &scaled(3.0), 0).unwrap();
    let after = logits(&model);
    assert!((&after - &before).abs().max().double_value(&[]) > 1e-4, "it is what runs");

    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("model");
    model.save(&dir, &WriteOptions::default()).unwrap();
    let (again, _) = Model::load(&dir, &LoadOptions::default()).unwrap();
    assert_eq!(again.layers()[1].variant(), &scaled(3.0));
    assert!(logits(&again).equal(&after));

    let refused = model.swap(&[0], &scaled(-1.0), 0).unwrap_err().to_string();
    assert!(refused.contains("`scaled`: `by` = -1.0: expected a number above 0"), "{refused}");
}
