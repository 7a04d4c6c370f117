//! The readers of files that others wrote, by themselves, as `fuzz/` calls them: each understands its file or refuses it.

use std::path::Path;

use anyhow::Result;
use attn_core::Config;
use attn_viz::Theme;
use tch::Kind;

use crate::{
    config::Written,
    forward, head_names,
    plot::{open, pictures},
    settings::{Distill, Finetune, Pretrain},
    sweep,
};

/// The config of a run, or a sweep, whatever it is.
pub fn settings(path: &Path) -> Result<()> {
    let written = Written::read(path, &[])?;
    let finetune = written.complete(|it: Finetune| it.complete("x")).map(drop);
    let distill = written.complete(|it: Distill| it.complete("x")).map(drop);
    let pretrain = written.complete(|it: Pretrain| it.complete("x")).map(drop);
    finetune.or(distill).or(pretrain).or(sweep::understand(path).map(drop))
}

/// The scores of heads.
pub fn scores(path: &Path) -> Result<()> {
    head_names::read_any_scores(path).map(drop)
}

/// Token ids with a mask over positions, or a mask over heads.
pub fn input(path: &Path) -> Result<()> {
    forward::read_ids(path).map(drop).or(forward::read_mask(path).map(drop))
}

/// A `config.json`, and the attention of its layers.
pub fn model_config(path: &Path) -> Result<()> {
    let raw = attn_files::parse_json(path)?;
    Config::from_json(raw)?.to_json(Kind::Float);
    Ok(())
}

/// A result, which is drawn where there is a picture of its kind.
pub fn result(path: &Path) -> Result<()> {
    open(path)?;
    for picture in pictures(path)? {
        picture.figure.on(Theme::Light).svg()?;
    }
    Ok(())
}
