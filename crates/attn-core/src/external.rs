//! Attention kinds of other crates.
//!
//! A crate that has a kind of its own registers it once, before the first model is read. From then on it is a [`Variant`] like those of
//! `variants/`: configs name it, models are swapped to it, saved with it and loaded again, and [`laws`](crate::laws) hold it to what all
//! kinds keep. A folder with it needs the crate that registers it: a program without it refuses the folder by the kind's name.

use std::sync::RwLock;

use serde::Serialize;
use serde_json::{Map, Value};

use crate::{
    Error,
    attention::{Attention, Dims, Own, Projections},
    variants::Variant,
};

/// A kind's settings, as JSON has them.
pub type Settings = Map<String, Value>;

/// Makes a kind for a layer, as [`Variant::build`] does.
pub type Build =
    fn(&Settings, &Dims, &Projections, &mut Own<'_, '_>) -> Result<Box<dyn Attention>, Error>;

/// An attention kind of another crate.
#[derive(Debug, Clone, Copy)]
pub struct Kind {
    /// Its name in configs and results: one word, small letters.
    pub name: &'static str,
    /// Its settings where none are given.
    pub defaults: fn() -> Settings,
    /// Makes it for a layer. Settings that it does not know are its to refuse.
    pub build: Build,
}

static KINDS: RwLock<Vec<Kind>> = RwLock::new(Vec::new());

/// Makes `kind` known to this process.
///
/// # Errors
/// [`Error::Kind`] where the name is taken, by a kind of this crate or another that was registered, or is no name.
pub fn register(kind: Kind) -> Result<(), Error> {
    let is_name =
        kind.name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
    let problem = |problem: &'static str| Error::Kind { name: kind.name.to_owned(), problem };
    if kind.name.is_empty() || !is_name {
        return Err(problem("is no name: expected small letters, digits and `_`"));
    }
    let mut kinds = KINDS.write().expect("nothing panics while it is held");
    let taken = Variant::all().iter().any(|it| it.name() == kind.name)
        || kinds.iter().any(|it| it.name == kind.name);
    if taken {
        return Err(problem("is taken by another kind"));
    }
    kinds.push(kind);
    Ok(())
}

/// The kinds that were registered.
pub fn registered() -> Vec<Kind> {
    KINDS.read().expect("nothing panics while it is held").clone()
}

/// Whether a kind of that name was registered.
pub fn is_registered(name: &str) -> bool {
    find(name).is_some()
}

fn find(name: &str) -> Option<Kind> {
    registered().into_iter().find(|kind| kind.name == name)
}

/// A registered kind with its settings.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Config {
    /// The kind's name.
    kind: &'static str,
    #[serde(flatten)]
    settings: Settings,
}

impl Config {
    /// The kind `name` with `settings`, its defaults for those that are absent. `None` where nothing of that name is registered.
    pub fn new(name: &str, settings: Settings) -> Option<Self> {
        let kind = find(name)?;
        let mut all = (kind.defaults)();
        all.extend(settings);
        Some(Self { kind: kind.name, settings: all })
    }

    /// The kind's name.
    pub fn name(&self) -> &'static str {
        self.kind
    }

    /// Its settings.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    pub(crate) fn build(
        &self,
        dims: &Dims,
        projections: &Projections,
        own: &mut Own<'_, '_>,
    ) -> Result<Box<dyn Attention>, Error> {
        let kind = find(self.kind).expect("a config is of a registered kind");
        (kind.build)(&self.settings, dims, projections, own)
    }
}
