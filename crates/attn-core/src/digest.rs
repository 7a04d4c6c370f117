//! Tells models apart by everything that their outputs follow from.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value;
use sha2::{Digest, Sha256};
use tch::{Kind, Tensor};

use crate::{Error, Model, checkpoint::for_each_piece};

/// Fields of `config.json` that say where a model comes from, and nothing of what it computes.
const ORIGIN: [&str; 2] = ["_name_or_path", "transformers_version"];

/// JSON with the fields of objects by name: who writes a file again may order it anew.
#[derive(Serialize)]
#[serde(untagged)]
enum Sorted {
    Object(BTreeMap<String, Sorted>),
    List(Vec<Sorted>),
    Other(Value),
}

impl From<Value> for Sorted {
    fn from(value: Value) -> Self {
        match value {
            Value::Object(fields) => {
                Self::Object(fields.into_iter().map(|(name, value)| (name, value.into())).collect())
            }
            Value::Array(items) => Self::List(items.into_iter().map(Self::from).collect()),
            other => Self::Other(other),
        }
    }
}

impl Model {
    /// SHA-256, in hexadecimal, of every byte of every parameter with its name and shape, and of `config.json` but for what
    /// says where the model comes from. The same weights in another kind are another model.
    ///
    /// Reads all weights once, a few MiB at a time.
    ///
    /// # Errors
    /// If LibTorch cannot hand out the bytes of a parameter.
    pub fn digest(&self) -> Result<String, Error> {
        let config = self.config.to_json(self.kind).into_iter();
        let config: BTreeMap<String, Sorted> = config
            .filter(|(field, _)| !ORIGIN.contains(&field.as_str()))
            .map(|(field, value)| (field, Sorted::from(value)))
            .collect();
        let mut hash = Sha256::new();
        hash.update(serde_json::to_vec(&config).expect("an object of JSON values"));
        hash.update(format!("{:?}", self.lora_scales));
        for (name, tensor) in self.parameters() {
            update(&mut hash, &name, &tensor)?;
        }
        Ok(hexadecimal(hash))
    }

    /// Tells weights apart, whatever they run in: SHA-256, in hexadecimal, of names, shapes and all values of the parameters
    /// that `counts` picks, rounded to bf16, so that a model is the same in f64, f32 and bf16.
    ///
    /// # Errors
    /// If LibTorch cannot hand out the bytes of a parameter.
    pub fn fingerprint(&self, counts: &dyn Fn(&str) -> bool) -> Result<String, Error> {
        let mut hash = Sha256::new();
        for (name, tensor) in self.parameters().into_iter().filter(|(name, _)| counts(name)) {
            update(&mut hash, &name, &tch::no_grad(|| tensor.to_kind(Kind::BFloat16)))?;
        }
        Ok(hexadecimal(hash))
    }
}

fn update(hash: &mut Sha256, name: &str, tensor: &Tensor) -> Result<(), Error> {
    hash.update(format!("\n{name} {:?} {:?}\n", tensor.kind(), tensor.size()));
    Ok(for_each_piece(name, tensor, |piece| {
        hash.update(piece);
        Ok(())
    })?)
}

pub(crate) fn hexadecimal(hash: Sha256) -> String {
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_of_fields_says_nothing() {
        let sorted = |text: &str| {
            let value: Value = serde_json::from_str(text).unwrap();
            serde_json::to_string(&Sorted::from(value)).unwrap()
        };
        let (one, other) =
            (r#"{"a": [{"y": 1, "x": null}], "b": 2}"#, r#"{"b": 2, "a": [{"x": null, "y": 1}]}"#);
        assert_eq!(sorted(one), sorted(other));
        assert_ne!(sorted(one), sorted(r#"{"b": 2, "a": [{"x": null, "y": 2}]}"#));
    }
}
