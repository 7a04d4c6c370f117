//! The attention of a model: in words, for tables, pictures and the names of folders, and what a run makes of it.

use anyhow::{Result, bail};
use attn_core::{Config, Model, Variant};
use serde_json::Value;

use crate::settings::Surgery;

/// The config of a model once its attention is what `[surgery]` and `[attention]` say, found before there is a model.
pub(crate) fn changed(
    config: &Config,
    surgery: &Surgery,
    attention: Option<&Variant>,
) -> Result<Config> {
    let mut changed = config.clone();
    if let Some(variant) = attention {
        changed.set_attention(&surgery.layers(config.layers.len()), variant)?;
    }
    Ok(changed)
}

/// The first layer that attends to another text.
pub(crate) fn crossed(config: &Config) -> Option<usize> {
    config.layers.iter().position(|layer| matches!(layer.variant, Variant::Cross(_)))
}

/// Refuses layers that attend to another text, for `what`, whose rows have one; `setting` names the model.
pub(crate) fn refuse_two_texts(config: &Config, setting: &str, what: &str) -> Result<()> {
    if let Some(layer) = crossed(config) {
        bail!(
            "layer {layer} of {setting} is `cross`, which attends to the first of two texts, and {what} reads \
             one\nhint: `attn finetune` trains it, on rows with `data.text_pair`"
        );
    }
    Ok(())
}

/// The attention kind of each layer, with its settings.
pub(crate) fn variants(model: &Model) -> Vec<Variant> {
    model.layers().iter().map(|layer| layer.variant().clone()).collect()
}

/// What stands in which layers, such as `window (size 4) in layers 0-1, softmax elsewhere`; `None` where all layers have
/// the attention of plain transformers.
pub(crate) fn describe(layers: &[Variant]) -> Option<String> {
    let plain = Variant::default();
    let mut kinds: Vec<&Variant> = Vec::new();
    for variant in layers.iter().filter(|variant| **variant != plain) {
        if !kinds.contains(&variant) {
            kinds.push(variant);
        }
    }
    let of = |variant: &Variant| -> Vec<usize> {
        (0..layers.len()).filter(|&layer| layers[layer] == *variant).collect()
    };
    let mut parts: Vec<String> = kinds
        .iter()
        .map(|variant| {
            let own = of(variant);
            let place =
                if own.len() == layers.len() { "all layers".to_owned() } else { numbers(&own) };
            format!("{} in {place}", with_settings(variant))
        })
        .collect();
    if parts.is_empty() {
        return None;
    }
    if layers.contains(&plain) {
        parts.push(format!("{} elsewhere", plain.name()));
    }
    Some(parts.join(", "))
}

/// `window (size 4)`.
fn with_settings(variant: &Variant) -> String {
    with_those(variant, |key, _| key != "kind")
}

/// The kind with the settings that are not its defaults, or in which others of the kind differ from it.
pub(crate) fn with_own_settings<'a>(
    variant: &Variant,
    others: impl Iterator<Item = &'a Variant>,
) -> String {
    let others: Vec<Value> = others
        .cloned()
        .chain(Variant::all())
        .filter(|other| other.name() == variant.name())
        .map(|other| serde_json::to_value(other).unwrap_or_default())
        .collect();
    with_those(variant, |key, value| others.iter().any(|other| other.get(key) != Some(value)))
}

fn with_those(variant: &Variant, is_shown: impl Fn(&str, &Value) -> bool) -> String {
    let Ok(Value::Object(fields)) = serde_json::to_value(variant) else {
        return variant.name().to_owned();
    };
    let settings: Vec<String> = fields
        .iter()
        .filter(|(key, value)| !value.is_null() && is_shown(key, value))
        .map(|(key, value)| match value {
            Value::String(text) => format!("{key} {text}"),
            other => format!("{key} {other}"),
        })
        .collect();
    match settings.is_empty() {
        true => variant.name().to_owned(),
        false => format!("{} ({})", variant.name(), settings.join(", ")),
    }
}

/// `layer 2`, `layers 0-3, 5`.
fn numbers(layers: &[usize]) -> String {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for &layer in layers {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == layer => *last = layer,
            _ => runs.push((layer, layer)),
        }
    }
    let shown: Vec<String> = runs
        .iter()
        .map(|(first, last)| match first == last {
            true => first.to_string(),
            false => format!("{first}-{last}"),
        })
        .collect();
    format!("layer{} {}", if layers.len() == 1 { "" } else { "s" }, shown.join(", "))
}

/// The name of a run that puts `attention` into a model: the kind comes last, in place of another one.
pub(crate) fn run_name(name: &str, attention: Option<&Variant>) -> String {
    let Some(variant) = attention else { return name.to_owned() };
    let kinds = Variant::all();
    let stem = kinds.iter().find_map(|kind| name.strip_suffix(kind.name())?.strip_suffix('-'));
    format!("{}-{}", stem.unwrap_or(name), variant.name())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn variant(json: &str) -> Variant {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn layers_are_named_with_their_settings() {
        let soft = Variant::default();
        let four = variant(r#"{"kind": "window", "size": 4}"#);
        let eight = variant(r#"{"kind": "window", "size": 8}"#);
        let said = |layers: &[&Variant]| {
            describe(&layers.iter().map(|&variant| variant.clone()).collect::<Vec<_>>())
        };

        assert_eq!(said(&[&soft, &soft]), None);
        assert_eq!(said(&[&four, &four]).unwrap(), "window (size 4) in all layers");
        assert_eq!(
            said(&[&four, &four, &soft]).unwrap(),
            "window (size 4) in layers 0-1, softmax elsewhere"
        );
        assert_eq!(
            said(&[&eight, &four, &soft, &four, &four]).unwrap(),
            "window (size 8) in layer 0, window (size 4) in layers 1, 3-4, softmax elsewhere"
        );
    }

    #[test]
    fn settings_that_tell_nothing_apart_need_not_be_said() {
        let head = |head: u32| {
            variant(&format!(r#"{{"kind": "single_head", "from": "best", "head": {head}}}"#))
        };
        let window = Variant::Window(attn_core::variants::window::Config::default());
        let all = [window.clone(), head(0), head(3)];
        let said = |of: &Variant| with_own_settings(of, all.iter());
        assert_eq!(said(&window), "window");
        assert_eq!(said(&head(0)), "single_head (from best, head 0)");
        let wide = variant(r#"{"kind": "window", "size": 9}"#);
        assert_eq!(with_own_settings(&window, [&wide].into_iter()), "window (size 32)");
    }

    #[test]
    fn a_run_is_named_after_its_attention_once() {
        let window = variant(r#"{"kind": "window", "size": 4}"#);
        let named = |name: &str| run_name(name, Some(&window));

        assert_eq!(run_name("default", None), "default");
        assert_eq!(named("default"), "default-window");
        assert_eq!(named("default-window"), "default-window");
        assert_eq!(named("default-gated"), "default-window");
        assert_eq!(named("mywindow"), "mywindow-window");
    }
}
