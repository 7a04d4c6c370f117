//! `attn save`: a model as a folder of its own, in another precision, in smaller files, its adapter merged.

use std::{fs, io::Write, path::Path};

use anyhow::{Context, Result, ensure};
use attn_core::{
    LoadOptions, Model,
    checkpoint::{CONFIG_FILE, WriteOptions, replace_folder},
};
use attn_data::{
    hub::{Hub, progress_bar},
    tokenizer::TextTokenizer,
};
use tch::Device;

use crate::{
    args::{SaveArgs, dtype_name},
    monitor::grouped,
    run_dir::parent_of,
    texts::{Folder, load_model},
};

pub(crate) fn run(args: &SaveArgs, out: &mut dyn Write) -> Result<()> {
    ensure!(args.max_shard_mib != Some(0), "`--max-shard-mib` is 0, expected at least 1");
    check_free(&args.out)?;
    let hub = Hub::from_env().with_progress(progress_bar());
    let folder = Folder::open(&args.model, true, None, &hub)?;
    let options =
        LoadOptions { kind: args.dtype.into(), device: Device::Cpu, ..LoadOptions::default() };
    let model = load_model(&folder.path, None, &options, &hub)
        .with_context(|| format!("cannot load the model `{}`", args.model))?;

    let max_shard_bytes = args.max_shard_mib.map(|mib| mib << 20);
    write(
        &model,
        &folder.tokenizer,
        &args.out,
        &WriteOptions { max_shard_bytes, ..WriteOptions::default() },
    )?;
    let shown = args.out.display();
    let n_parameters = model.parameters().iter().map(|(_, tensor)| tensor.numel()).sum();
    writeln!(out, "{shown}: {} parameters in {}", grouped(n_parameters), dtype_name(model.kind()))?;
    Ok(())
}

/// Refuses to write over what is there.
pub(crate) fn check_free(out: &Path) -> Result<()> {
    let shown = out.display();
    ensure!(
        is_free(out).with_context(|| format!("cannot look into `{shown}`"))?,
        "`{shown}` is there already\nhint: name a folder that is new or empty"
    );
    out.file_name().with_context(|| format!("`{shown}` names no folder")).map(drop)
}

/// Refuses to write over anything but a model's folder that is not among `read`.
pub(crate) fn check_replaceable(out: &Path, read: &[&Path]) -> Result<()> {
    if check_free(out).is_ok() {
        return Ok(());
    }
    let shown = out.display();
    ensure!(
        out.join(CONFIG_FILE).is_file(),
        "`{shown}` is there already and is no model's folder, which alone `--force` replaces\nhint: name a folder that is \
         new or empty"
    );
    let own = out.canonicalize().with_context(|| format!("cannot look into `{shown}`"))?;
    for path in read {
        let path =
            path.canonicalize().with_context(|| format!("cannot find `{}`", path.display()))?;
        ensure!(
            !path.starts_with(&own),
            "`{shown}` holds what is converted\nhint: name another folder; `--force` replaces all that is in one"
        );
    }
    Ok(())
}

/// Writes a model with its tokenizer as the folder `out`, which appears whole.
pub(crate) fn write(
    model: &Model,
    tokenizer: &TextTokenizer,
    out: &Path,
    options: &WriteOptions,
) -> Result<()> {
    let save = |draft: &Path| Ok(model.save(draft, options)?);
    write_with(&save, tokenizer, out, &[], Replace::Nothing)
}

/// What a folder that is written may take the place of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Replace {
    Nothing,
    /// A model's folder, with all that is in it.
    Model,
}

/// As [`write()`], with more files, each by its name; `save` writes the model to the folder it is told.
pub(crate) fn write_with(
    save: &dyn Fn(&Path) -> Result<()>,
    tokenizer: &TextTokenizer,
    out: &Path,
    extra: &[(&str, Vec<u8>)],
    replace: Replace,
) -> Result<()> {
    let parent = parent_of(out);
    fs::create_dir_all(parent).with_context(|| format!("cannot create `{}`", parent.display()))?;
    let name = out.file_name().unwrap_or_default().to_string_lossy();
    // Through a folder of another name, so that a kill leaves none without a tokenizer.
    let draft = parent.join(format!(".{name}.part"));
    let write = || -> Result<()> {
        save(&draft)?;
        tokenizer.save(&draft)?;
        for (name, content) in extra {
            fs::write(draft.join(name), content)?;
        }
        match replace == Replace::Model && !is_free(out)? {
            true => replace_folder(&draft, out)?,
            false => fs::rename(&draft, out)?,
        }
        Ok(())
    };
    write().with_context(|| format!("cannot save the model to `{}`", out.display()))
}

/// Whether nothing stands there, or an empty folder.
fn is_free(path: &Path) -> std::io::Result<bool> {
    match fs::read_dir(path) {
        Ok(mut entries) => Ok(entries.next().is_none()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(true),
        Err(error) => Err(error),
    }
}
