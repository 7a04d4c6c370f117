//! Flags from a file: `--config FILE.toml` of the commands that have no run of their own to configure.
//!
//! ```toml
//! model = "results/models/needle-llama"   # --model results/models/needle-llama
//! lengths = [256, 512]                    # --lengths 256 --lengths 512
//! keep_failures = true                    # --keep-failures
//! ```

use std::{ffi::OsString, fs, iter, path::Path};

use anyhow::{Context, Result, bail, ensure};
use clap::{Arg, Command};
use toml::{Table, Value};

/// The flag, as clap knows it.
pub(crate) const FLAG: &str = "flags_file";

/// What was typed, the flags of its `--config` behind it; flags that were typed as well stand for themselves.
///
/// # Errors
/// If the file cannot be read, is no TOML, or holds what no flag takes.
pub(crate) fn with_flags(
    typed: Vec<OsString>,
    program: impl FnOnce() -> Command,
) -> Result<Vec<OsString>> {
    let texts: Vec<String> = typed.iter().map(|word| word.to_string_lossy().into_owned()).collect();
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let joined = texts.iter().find_map(|word| word.strip_prefix("--config="));
    let apart =
        || texts.iter().position(|&word| word == "--config").and_then(|at| texts.get(at + 1));
    let Some(file) = joined.or_else(|| apart().copied()) else { return Ok(typed) };
    let program = program();
    let command = texts.iter().skip(1).find_map(|word| program.find_subcommand(word));
    let Some(command) = command.filter(|it| it.get_arguments().any(|arg| arg.get_id() == FLAG))
    else {
        return Ok(typed);
    };
    let flags = read(Path::new(file), command).with_context(|| format!("cannot use `{file}`"))?;
    let is_typed = |flag: &str| {
        texts.iter().any(|word| {
            word.strip_prefix(flag).is_some_and(|rest| rest.is_empty() || rest.starts_with('='))
        })
    };
    // A flag gives way to itself, and to what cannot stand beside it.
    let gives_way = |arg: &Arg| {
        // Conflicts are declared on one side, and hold for both.
        let is_other = |one: &Arg, other: &Arg| {
            command.get_arg_conflicts_with(one).iter().any(|it| it.get_id() == other.get_id())
        };
        let others =
            command.get_arguments().filter(|other| is_other(arg, other) || is_other(other, arg));
        let all = iter::once(arg).chain(others);
        all.filter_map(Arg::get_long).any(|long| is_typed(&format!("--{long}")))
    };
    let more = flags.into_iter().filter(|(arg, _)| !gives_way(arg));
    let more = more.map(|(arg, value)| {
        let long = arg.get_long().expect("flags are found by their names");
        match value {
            Some(value) => format!("--{long}={value}").into(),
            None => format!("--{long}").into(),
        }
    });
    Ok(typed.iter().cloned().chain(more).collect())
}

/// The flags of a file, each with its value if it takes one.
fn read<'a>(file: &Path, command: &'a Command) -> Result<Vec<(&'a Arg, Option<String>)>> {
    let text = fs::read_to_string(file)?;
    let table: Table = text.parse()?;
    let mut flags = Vec::new();
    for (key, value) in table {
        let flag = key.replace('_', "-");
        let known = command
            .get_arguments()
            .find(|arg| arg.get_long() == Some(&flag) && arg.get_id() != FLAG);
        let Some(known) = known else {
            bail!(
                "`{key}` is no flag of `attn {}`\nhint: keys are its flags without the dashes in front: `attn {} --help`",
                command.get_name(),
                command.get_name()
            );
        };
        let takes_value = known.get_action().takes_values();
        match value {
            Value::Boolean(is_on) if !takes_value => {
                if is_on {
                    flags.push((known, None));
                }
            }
            value if !takes_value => bail!("`{key}` is {value}, expected true or false"),
            Value::Array(items) if items.is_empty() => {
                bail!("`{key}` is empty\nhint: leave it away for what is usual")
            }
            Value::Array(items) => {
                for item in items {
                    flags.push((known, Some(plain(&key, item)?)));
                }
            }
            value => flags.push((known, Some(plain(&key, value)?))),
        }
    }
    Ok(flags)
}

/// A value as it is typed.
fn plain(key: &str, value: Value) -> Result<String> {
    ensure!(
        !value.is_table() && !value.is_array(),
        "`{key}` holds {value}, expected a text, a number or a list of them"
    );
    Ok(match value {
        Value::String(text) => text,
        value => value.to_string(),
    })
}
