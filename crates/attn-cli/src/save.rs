//! `attn save`: a model as a folder of its own, in another precision, in smaller files, its adapter merged.

use std::{fs, io::Write, path::Path};

use anyhow::{Context, Result, bail, ensure};
use attn_core::{
    LoadOptions, Model,
    checkpoint::{CONFIG_FILE, FolderDraft, WriteOptions, check_folder},
};
use attn_data::{
    hub::{Hub, progress_bar},
    tokenizer::TextTokenizer,
};
use serde_json::{Map, Value};
use tch::Device;

use crate::{
    args::{SaveArgs, dtype_name},
    memory::{self, Foreseen},
    monitor::grouped,
    run_dir::read_json,
    texts::{Folder, load_model},
};

pub(crate) fn run(args: &SaveArgs, out: &mut dyn Write) -> Result<()> {
    ensure!(args.max_shard_mib != Some(0), "`--max-shard-mib` is 0, expected at least 1");
    check_free(&args.out)?;
    let hub = Hub::from_env().with_progress(progress_bar());
    let folder = Folder::open(&args.model, true, None, &hub)?;
    // An adapter is merged in f32, and a layer is copied as it is written.
    Foreseen::model(&folder.config, args.dtype.into(), false)?
        .check(Device::Cpu, memory::OF_CHANGING)?;
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
    if !is_free(out).with_context(|| format!("cannot look into `{shown}`"))? {
        // Of a writer that was killed after its last step, and that no later one comes past.
        attn_files::remove_abandoned(out);
        bail!("`{shown}` is there already\nhint: name a folder that is new or empty");
    }
    out.file_name().with_context(|| format!("`{shown}` names no folder")).map(drop)
}

/// Refuses to write over anything but a model's folder that holds nothing of `read`.
pub(crate) fn check_replaceable(out: &Path, read: &[&Path]) -> Result<()> {
    check_folder(out)?;
    if check_free(out).is_ok() {
        return Ok(());
    }
    let shown = out.display();
    let config: Option<Map<String, Value>> = read_json(&out.join(CONFIG_FILE)).ok().flatten();
    let is_weights = |name: &Path| name.extension().is_some_and(|it| it == "safetensors");
    let mut files = fs::read_dir(out).into_iter().flatten().flatten();
    ensure!(
        config.is_some_and(|config| config.contains_key("model_type"))
            && files.any(|file| is_weights(&file.path())),
        "`{shown}` is there already and is no model's folder, which alone `--force` replaces\nhint: name a folder that is \
         new or empty"
    );
    let own = out.canonicalize().with_context(|| format!("cannot look into `{shown}`"))?;
    for path in read {
        // What is no file here, a Hub id or a name, is not in the folder either.
        let Ok(path) = path.canonicalize() else { continue };
        ensure!(
            !path.starts_with(&own),
            "`{shown}` holds `{}`, which is read\nhint: name another folder; `--force` replaces all that is in one",
            path.display()
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
    let write = || -> Result<()> {
        ensure!(replace == Replace::Model || is_free(out)?, "it is there already");
        // Through a folder of another name, so that a kill leaves none without a tokenizer.
        let draft = FolderDraft::create(out)?;
        save(&draft.path())?;
        tokenizer.save(draft.path())?;
        for (name, content) in extra {
            fs::write(draft.path().join(name), content)?;
        }
        Ok(draft.commit()?)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_refused_finds_nothing_left_of_a_killed_writer() {
        let dir = tempfile::tempdir().unwrap();
        let (model, draft) = (dir.path().join("model"), dir.path().join(".model.attn-tmp-dead"));
        for folder in [&model, &draft] {
            fs::create_dir(folder).unwrap();
        }
        check_free(&model).unwrap();
        fs::write(model.join("config.json"), "{}").unwrap();
        check_free(&model).unwrap_err();
        assert!(model.join("config.json").exists() && !draft.exists());
    }
}
