//! Attention variants, one file each.

use serde::{Deserialize, Deserializer, Serialize, de::Error as _};
use serde_json::Value;

use crate::{
    Error,
    attention::{Attention, Dims, Own as Parameters, Projections},
    external,
};

pub mod big_bird;
pub mod cross;
pub mod dilated;
pub mod gated;
pub mod global_local;
pub mod hedgehog;
pub mod indexed;
pub mod latent;
pub mod mask_mixture;
pub mod merging;
pub mod moba;
pub mod nsa;
pub mod performer;
pub mod routed;
pub mod single_head;
pub mod sinks;
pub mod softmax;
pub mod t2r;
pub mod window;
pub mod window_linear;

/// `select_heads` and `regroup_kv` of an [`Attention`](crate::attention::Attention) that keeps its `dims` and nothing
/// else of single heads. No defaults of the trait: a kind with parameters of heads would then forget to cut them.
macro_rules! follows_dims {
    () => {
        fn select_heads(
            &mut self,
            _: &[i64],
            dims: &crate::attention::Dims,
        ) -> Result<(), crate::Error> {
            self.dims = dims.clone();
            Ok(())
        }

        fn regroup_kv(
            &mut self,
            _: &[Vec<i64>],
            dims: &crate::attention::Dims,
        ) -> Result<(), crate::Error> {
            self.dims = dims.clone();
            Ok(())
        }
    };
}
use follows_dims;

/// `held` of an [`Attention`](crate::attention::Attention) that holds so many values for each channel of its heads and token: while it
/// runs alone, and where it trains. With dropout a kind may make every weight, and three times keep it. Measured (`tests/need.rs`).
macro_rules! holds {
    ($alone:expr, $training:expr) => {
        fn held(&self, dims: &crate::attention::Dims, pass: crate::attention::Holds) -> i64 {
            let channels: i64 = if pass.trains { $training } else { $alone };
            channels * dims.n_heads * dims.head_dim * pass.n_tokens
                + pass.dropped_pairs(dims)
                + pass.masked_pairs()
        }
    };
}
use holds;

/// As [`holds`], for each feature of a kind that makes `$n` features of queries and of keys.
macro_rules! holds_features {
    ($n:expr, $alone:expr, $training:expr) => {
        fn held(&self, dims: &crate::attention::Dims, pass: crate::attention::Holds) -> i64 {
            let n_features: fn(&Self) -> i64 = $n;
            let times: i64 = if pass.trains { $training } else { $alone };
            (times * n_features(self) + 4 * dims.head_dim) * dims.n_heads * pass.n_tokens
                + pass.masked_pairs()
        }
    };
}
use holds_features;

/// Lists the variants. To add one: write `<name>.rs` beside this file, then name it here and in the `mod` lines above
/// (rustfmt does not follow a `mod` inside a macro call).
macro_rules! variants {
    ($($name:ident => $module:ident,)*) => {
        /// Which attention to run, and its settings. In TOML, `kind` names it.
        #[derive(Debug, Clone, PartialEq, Serialize)]
        #[serde(tag = "kind", rename_all = "snake_case")]
        pub enum Variant {
            $(#[doc = concat!("See [`", stringify!($module), "`].")] $name($module::Config),)*
            /// A kind of another crate, see [`external`].
            #[serde(untagged)]
            External(external::Config),
        }

        /// The kinds of this crate.
        #[derive(Deserialize)]
        #[serde(tag = "kind", rename = "Variant", rename_all = "snake_case")]
        enum Own {
            $($name($module::Config),)*
        }

        impl From<Own> for Variant {
            fn from(own: Own) -> Self {
                match own { $(Own::$name(config) => Self::$name(config),)* }
            }
        }

        impl Variant {
            /// Every variant of this crate with its default settings.
            pub fn all() -> Vec<Self> {
                vec![$(Self::$name($module::Config::default()),)*]
            }

            /// The name used in configs, results and plots.
            pub fn name(&self) -> &'static str {
                match self {
                    $(Self::$name(_) => stringify!($module),)*
                    Self::External(config) => config.name(),
                }
            }

            /// Creates the variant for a layer of `dims`, its parameters from `own`, which may start from the
            /// pretrained `projections`.
            ///
            /// # Errors
            /// [`Error::Setting`] where the settings do not fit the layer.
            pub fn build(
                &self,
                dims: &Dims,
                projections: &Projections,
                own: &mut Parameters<'_, '_>,
            ) -> Result<Box<dyn Attention>, Error> {
                match self {
                    $(Self::$name(config) => config.build(dims, projections, own),)*
                    Self::External(config) => config.build(dims, projections, own),
                }
            }
        }
    };
}

variants! {
    Softmax => softmax,
    Cross => cross,
    Window => window,
    Gated => gated,
    Routed => routed,
    MaskMixture => mask_mixture,
    SingleHead => single_head,
    Dilated => dilated,
    GlobalLocal => global_local,
    BigBird => big_bird,
    Sinks => sinks,
    Performer => performer,
    Hedgehog => hedgehog,
    T2r => t2r,
    WindowLinear => window_linear,
    Nsa => nsa,
    Moba => moba,
    Indexed => indexed,
    Merging => merging,
    Latent => latent,
}

impl<'de> Deserialize<'de> for Variant {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let mut value = Value::deserialize(from)?;
        if let Value::Object(fields) = &mut value
            && let Some(Value::String(name)) = fields.get("kind").cloned()
            && external::is_registered(&name)
        {
            fields.remove("kind");
            let config = external::Config::new(&name, std::mem::take(fields));
            return Ok(Self::External(config.expect("it is registered")));
        }
        Own::deserialize(value).map(Self::from).map_err(D::Error::custom)
    }
}

impl Default for Variant {
    fn default() -> Self {
        Self::Softmax(softmax::Config::default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_is_listed() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/src/variants");
        let mut files: Vec<String> = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().path().file_stem().unwrap().to_string_lossy().into_owned())
            .filter(|name| name != "mod")
            .collect();
        let mut listed: Vec<String> =
            Variant::all().iter().map(|variant| variant.name().to_owned()).collect();
        files.sort();
        listed.sort();
        assert_eq!(files, listed);
    }

    #[test]
    fn unknown_settings_are_refused() {
        let error = serde_json::from_str::<Variant>(r#"{"kind": "window", "sise": 3}"#)
            .unwrap_err()
            .to_string();
        assert!(error.contains("sise") && error.contains("size"), "{error}");
    }
}
