//! Models in `tests/golden` compute what transformers computed from the same folders.
//!
//! `scripts/make_goldens.py` made them; its first lines say what each file holds. Cases are found, not listed: adding
//! one there adds it here.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use attn_core::{
    Error, ForwardOptions, LoadOptions, Model, ModelInput, Output, Positions, Rows,
    checkpoint::{WriteOptions, read_metadata, read_tensors},
    testing::relative_rms,
};
use serde::Deserialize;
use tch::{Device, Kind, Tensor};

mod common;

/// Fewer would mean that cases were lost, not that fewer are needed.
const N_CASES: usize = 52;

const TOLERANCE: f64 = 1e-5;
/// When computing in f16 or bf16; transformers' own rounding reaches 1.3e-2 on these models in bf16.
const HALF_TOLERANCE: f64 = 2e-2;

#[test]
fn every_golden_is_met() {
    assert_all(&cases(), TOLERANCE, |case| case.load(Kind::Float, Device::Cpu));
}

#[test]
fn every_golden_is_met_after_conversion_to_f64() {
    let mut cases = cases();
    for case in &mut cases {
        // Thousands of positions away, transformers' own angles in f32 are off by more than the tolerance.
        case.positions.remove("far");
    }
    assert_all(&cases, TOLERANCE, |case| {
        let mut model = case.load(Kind::Float, Device::Cpu)?;
        model.to_kind(Kind::Double);
        Ok(model)
    });
}

#[test]
fn half_precision_stays_close() {
    let stored_in_half: Vec<Case> =
        cases().into_iter().filter(|case| case.kind() != Kind::Float).collect();
    let kinds: BTreeSet<_> =
        stored_in_half.iter().map(|case| format!("{:?}", case.kind())).collect();
    assert_eq!(kinds, BTreeSet::from(["BFloat16".to_owned(), "Half".to_owned()]));
    assert_all(&stored_in_half, HALF_TOLERANCE, |case| case.load(case.kind(), Device::Cpu));
}

#[test]
fn every_golden_is_met_on_cuda() {
    let cuda = match attn_torch::device("cuda") {
        Ok(device) => device,
        Err(error) => return common::skipped("every_golden_is_met_on_cuda", &error.to_string()),
    };
    attn_torch::set_tf32(false).unwrap();
    assert_all(&cases(), TOLERANCE, |case| case.load(Kind::Float, cuda));
}

#[test]
fn a_saved_model_computes_the_same_bits() {
    let temp = tempfile::tempdir().expect("a temporary folder");
    for case in cases() {
        // As stored, so that no value is rounded on the way.
        let kind = case.kind();
        let model = case.load(kind, Device::Cpu).unwrap();
        let dir = temp.path().join(&case.name);
        for max_shard_bytes in [None, Some(6000)] {
            let options = WriteOptions { max_shard_bytes, ..WriteOptions::default() };
            model.save(&dir, &options).unwrap();
            let again = load(&dir, kind, Device::Cpu).unwrap();

            let [before, after] = [&model, &again].map(|model| model.config().raw("model_type"));
            assert_eq!(before, after, "{}", case.name);
            for probe in case.positions.keys() {
                let [before, after] = [&model, &again].map(|model| case.run(model, probe).logits);
                assert!(before.equal(&after), "{}: {probe}.logits, {options:?}", case.name);
            }
        }
    }
}

/// The comparison can fail: on a padded row, transformers' bare forward is far from counted positions. (Not in Llama,
/// whose rotations tell distances alone.)
#[test]
fn other_positions_are_noticed() {
    let mut n_noticed = 0;
    for mut case in cases() {
        let Some(source) =
            case.positions.get_mut("left").filter(|_| !case.name.starts_with("llama"))
        else {
            continue;
        };
        assert_eq!(*source, Source::Count);
        *source = Source::Arange;
        let errors = case.errors(&case.load(Kind::Float, Device::Cpu).unwrap());
        let worst = errors
            .iter()
            .filter(|(name, _)| name.starts_with("left."))
            .map(|(_, error)| *error)
            .fold(0.0, f64::max);
        assert!(worst > 0.05, "{}: {worst}", case.name);
        n_noticed += 1;
    }
    assert!(n_noticed > 20, "{n_noticed}");
}

/// Where a probe's positions come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Source {
    Given,
    Count,
    Arange,
}

/// The metadata of `expected.safetensors`.
#[derive(Debug, Deserialize)]
struct Facts {
    transformers: String,
    probes: BTreeMap<String, Source>,
}

struct Case {
    name: String,
    dir: PathBuf,
    expected: BTreeMap<String, Tensor>,
    /// By probe.
    positions: BTreeMap<String, Source>,
}

fn cases() -> Vec<Case> {
    // scripts/gpu_check.sh runs this on a machine that did not build it.
    let crate_dir = std::env::var_os("CARGO_MANIFEST_DIR");
    let crate_dir = crate_dir.unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    let golden = Path::new(&crate_dir).join("tests/golden");
    let mut dirs: Vec<PathBuf> =
        golden.read_dir().unwrap().map(|entry| entry.unwrap().path()).collect();
    dirs.retain(|dir| dir.is_dir());
    dirs.sort();
    assert!(dirs.len() >= N_CASES, "only {} cases in {}", dirs.len(), golden.display());
    dirs.into_iter().map(Case::read).collect()
}

fn load(dir: &Path, kind: Kind, device: Device) -> Result<Model, Error> {
    let (model, report) =
        Model::load(dir, &LoadOptions { kind, device, ..LoadOptions::default() })?;
    assert_eq!((report.fresh.len(), report.dropped.len()), (0, 0), "{}: {report:?}", dir.display());
    Ok(model)
}

/// Compares every tensor of every case before it fails, with a line for each that is off.
fn assert_all(cases: &[Case], tolerance: f64, load: impl Fn(&Case) -> Result<Model, Error>) {
    let bad_of = |case: &Case| match load(case) {
        Err(error) => vec![format!("{}: {error}", case.name)],
        Ok(model) => {
            let errors = case.errors(&model);
            assert!(!errors.is_empty(), "{}: nothing was compared", case.name);
            let is_bad = |error: f64| error.is_nan() || error > tolerance;
            let bad = errors.into_iter().filter(|(_, error)| is_bad(*error));
            let line =
                |(tensor, error)| format!("{}: {tensor}: relative rms {error:.1e}", case.name);
            bad.map(line).collect()
        }
    };
    let bad: Vec<String> = cases.iter().flat_map(bad_of).collect();
    assert!(bad.is_empty(), "not within {tolerance:.0e}:\n{}", bad.join("\n"));
}

impl Case {
    fn read(dir: PathBuf) -> Self {
        let file = dir.join("expected.safetensors");
        let facts: Facts = serde_json::from_str(&read_metadata(&file).unwrap()["golden"]).unwrap();
        assert!(
            facts.transformers.starts_with("5."),
            "made by transformers {}",
            facts.transformers
        );
        Self {
            name: dir.file_name().unwrap().to_string_lossy().into_owned(),
            expected: read_tensors(&file).unwrap().into_iter().collect(),
            positions: facts.probes,
            dir,
        }
    }

    /// What the weights are stored in, by the name of the case.
    fn kind(&self) -> Kind {
        match self.name.rsplit('_').next() {
            Some("f16") => Kind::Half,
            Some("bf16") => Kind::BFloat16,
            _ => Kind::Float,
        }
    }

    fn load(&self, kind: Kind, device: Device) -> Result<Model, Error> {
        load(&self.dir, kind, device)
    }

    fn input(&self, probe: &str, name: &str) -> Option<Tensor> {
        self.expected.get(&format!("{probe}.{name}")).map(Tensor::shallow_clone)
    }

    fn run(&self, model: &Model, probe: &str) -> Output {
        let source = self.positions[probe];
        let input = ModelInput {
            input_ids: self.input(probe, "input_ids").unwrap(),
            attention_mask: self.input(probe, "attention_mask"),
            position_ids: self.input(probe, "position_ids"),
            token_type_ids: self.input(probe, "token_type_ids"),
            source: None,
        };
        assert_eq!(input.position_ids.is_some(), source == Source::Given, "{}: {probe}", self.name);
        let options = ForwardOptions {
            positions: if source == Source::Arange { Positions::Arange } else { Positions::Count },
            hidden_states: true,
            attentions: Rows::All,
            ..ForwardOptions::default()
        };
        let out = tch::no_grad(|| model.forward(&input, &options));
        out.unwrap_or_else(|error| panic!("{}: {probe}: {error}", self.name))
    }

    /// The relative rms of every expected tensor over real tokens, by name.
    fn errors(&self, model: &Model) -> Vec<(String, f64)> {
        self.positions.keys().flat_map(|probe| self.errors_of(model, probe)).collect()
    }

    fn errors_of(&self, model: &Model, probe: &str) -> Vec<(String, f64)> {
        let out = self.run(model, probe);
        let mut actual = BTreeMap::new();
        // Without a head, `logits` is the last hidden state, which is compared as such.
        if self.input(probe, "logits").is_some() {
            actual.insert(format!("{probe}.logits"), out.logits);
        }
        let number =
            |part: &'static str| move |(i, x): (usize, Tensor)| (format!("{probe}.{part}.{i}"), x);
        actual.extend(out.hidden_states.into_iter().enumerate().map(number("hidden_states")));
        actual.extend(out.attentions.into_iter().enumerate().map(number("attentions")));

        let inputs = ["input_ids", "attention_mask", "position_ids", "token_type_ids"]
            .map(|name| format!("{probe}.{name}"));
        let is_output =
            |name: &&String| name.split('.').next() == Some(probe) && !inputs.contains(name);
        let names: Vec<&String> = self.expected.keys().filter(is_output).collect();
        assert_eq!(
            actual.keys().collect::<Vec<_>>(),
            names,
            "{}: the model returns other tensors",
            self.name
        );

        let ids = self.input(probe, "input_ids").unwrap();
        let real = self
            .input(probe, "attention_mask")
            .unwrap_or_else(|| ids.ones_like())
            .to_kind(Kind::Bool);
        let error_of = |(name, actual): (String, Tensor)| {
            let (actual, expected) = (actual.to_device(Device::Cpu), &self.expected[&name]);
            assert_eq!(actual.size(), expected.size(), "{}: {name}: the shape differs", self.name);
            assert!(
                actual.isfinite().all().int64_value(&[]) == 1,
                "{}: {name} is not finite",
                self.name
            );
            let error =
                relative_rms(&at_real_tokens(&actual, &real), &at_real_tokens(expected, &real));
            (name, error)
        };
        actual.into_iter().map(error_of).collect()
    }
}

/// What stands at real tokens, and so is specified: queries of attentions, places of hidden states and of a language
/// model's logits, and all of a classifier's.
fn at_real_tokens(values: &Tensor, real: &Tensor) -> Tensor {
    match values.dim() {
        4 => values.transpose(1, 2).index(&[Some(real)]), // [real queries, h, k]
        3 => values.index(&[Some(real)]),
        _ => values.shallow_clone(),
    }
}
