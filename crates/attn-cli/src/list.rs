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
        let text = toml::to_string(&variant).context("cannot write the settings as TOML")?;
        let settings: Vec<&str> = text.lines().filter(|line| !line.starts_with("kind")).collect();
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
