//! `attn list`: what a config can name.

use std::io::Write;

use anyhow::{Context, Result};
use attn_core::Variant;
use attn_data::dataset::tasks;

/// Prints the attention kinds with their settings and defaults, and the data sets known by a short name.
pub(crate) fn run(out: &mut dyn Write) -> Result<()> {
    writeln!(
        out,
        "attention kinds ([attention] kind = \"...\", with these settings and defaults):"
    )?;
    for variant in Variant::all() {
        let fields = serde_json::to_value(&variant).context("cannot write the settings")?;
        let settings: Vec<String> = fields
            .as_object()
            .into_iter()
            .flatten()
            .filter(|(key, _)| *key != "kind")
            .map(|(key, value)| match toml::Value::try_from(value) {
                Ok(value) => format!("{key} = {value}"),
                Err(_) => format!("{key} has no default"), // TOML has no null.
            })
            .collect();
        let settings =
            if settings.is_empty() { "no settings".to_owned() } else { settings.join(", ") };
        writeln!(out, "  {:<16} {settings}", variant.name())?;
    }
    writeln!(
        out,
        "\ndata sets ([data] source = \"...\", --task ...), besides files, folders and Hub ids:"
    )?;
    for task in tasks() {
        writeln!(out, "  {:<16} {}", task.name, task.about)?;
    }
    Ok(())
}
