//! Which files hold a split, by their names.
//!
//! The names are those the Hub and its tools use: `train.csv`, `data/train-00000-of-00002.parquet`,
//! `CONFIG/train-00000-of-00001-0123456789abcdef.parquet`, and `CONFIG/train/0000.parquet` in the Hub's own
//! conversions.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use crate::error::{Error, Result};

/// Endings of the files that can be read, the preferred first.
pub(crate) const EXTENSIONS: [&str; 6] = [".parquet", ".jsonl", ".json", ".csv", ".tsv", ".txt"];

/// Folders that hold the files of a data set with one configuration.
const PLAIN_FOLDERS: [&str; 4] = ["", "data", "default", "plain_text"];

/// Files beside the rows that end like rows.
const NOT_ROWS: [&str; 6] = [
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
    "LICENSE.txt",
    "requirements.txt",
];

/// How deep a folder is searched.
const MAX_DEPTH: usize = 4;

/// What a file's name says.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Named {
    folder: String,
    split: String,
    /// Number and count, as in `-00000-of-00002`.
    shard: Option<(usize, usize)>,
    /// Position in [`EXTENSIONS`].
    kind: usize,
}

/// The ending of a file that can be read, by its position in [`EXTENSIONS`].
pub(super) fn extension(name: &str) -> Option<usize> {
    let name = name.to_ascii_lowercase();
    EXTENSIONS.iter().position(|ending| name.ends_with(ending) && name.len() > ending.len())
}

/// The split that a file's own name announces.
pub(super) fn split_of_file(path: &Path) -> Option<String> {
    Some(named(path.file_name()?.to_str()?)?.split)
}

fn named(path: &str) -> Option<Named> {
    let kind = extension(path)?;
    let (folder, name) = path.rsplit_once('/').unwrap_or(("", path));
    if NOT_ROWS.contains(&name) || name.starts_with('.') {
        return None;
    }
    let stem = &name[..name.len() - EXTENSIONS[kind].len()];
    if let Some((split, shard)) = sharded(stem) {
        return Some(Named {
            folder: folder.into(),
            split: split.into(),
            shard: Some(shard),
            kind,
        });
    }
    // The Hub's conversions: the folder is the split, the file a bare number.
    if stem.bytes().all(|byte| byte.is_ascii_digit()) && !folder.is_empty() {
        let (folder, split) = folder.rsplit_once('/').unwrap_or(("", folder));
        return Some(Named { folder: folder.into(), split: split.into(), shard: None, kind });
    }
    Some(Named { folder: folder.into(), split: stem.into(), shard: None, kind })
}

/// `train-00000-of-00002`, with or without a hash of 16 digits behind.
fn sharded(stem: &str) -> Option<(&str, (usize, usize))> {
    let parts: Vec<&str> = stem.split('-').collect();
    let of = parts.iter().rposition(|&part| part == "of").filter(|&of| of >= 2)?;
    let number = |part: &str| part.parse().ok().filter(|_| part.len() >= 5);
    let shard = (number(parts[of - 1])?, number(parts.get(of + 1)?)?);
    let hash_or_nothing = match parts.get(of + 2..)? {
        [] => true,
        [hash] => hash.len() == 16 && hash.bytes().all(|byte| byte.is_ascii_hexdigit()),
        _ => false,
    };
    let n_tail: usize = parts[of - 1..].iter().map(|part| part.len() + 1).sum();
    hash_or_nothing.then(|| (&stem[..stem.len() - n_tail], shard))
}

/// Files below `folder`, as paths from there with `/` between, sorted.
pub(super) fn walk(folder: &Path) -> Result<Vec<String>> {
    fn visit(folder: &Path, prefix: &str, depth: usize, out: &mut Vec<String>) -> Result<()> {
        for entry in fs::read_dir(folder).map_err(Error::io("list", folder))? {
            let entry = entry.map_err(Error::io("list", folder))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with('.') {
                continue;
            }
            // `metadata` follows links: the files of a cached repository are links.
            let path = entry.path();
            match fs::metadata(&path) {
                Ok(data) if data.is_dir() && depth > 0 => {
                    visit(&path, &format!("{prefix}{name}/"), depth - 1, out)?;
                }
                Ok(data) if data.is_file() => out.push(format!("{prefix}{name}")),
                _ => {}
            }
        }
        Ok(())
    }
    let mut out = Vec::new();
    visit(folder, "", MAX_DEPTH, &mut out)?;
    out.sort();
    Ok(out)
}

/// Folders that belong to a configuration, the preferred first.
fn folders(config: Option<&str>) -> Vec<String> {
    match config {
        Some(config) => vec![config.into(), format!("data/{config}"), format!("{config}/data")],
        None => PLAIN_FOLDERS.map(Into::into).to_vec(),
    }
}

/// The splits of a configuration, or of all where none is chosen.
pub(super) fn splits(files: &[String], config: Option<&str>) -> Vec<String> {
    let folders = folders(config);
    let names: Vec<Named> = files.iter().filter_map(|file| named(file)).collect();
    let here = |named: &&Named| folders.contains(&named.folder);
    let any_here = names.iter().any(|named| here(&named));
    let chosen = names.iter().filter(|named| here(named) || (config.is_none() && !any_here));
    chosen.map(|named| named.split.clone()).collect::<BTreeSet<_>>().into_iter().collect()
}

/// The files of a split in the order of their numbers; of `split = None`, those that hold all splits together.
pub(super) fn find(
    source: &str,
    files: &[String],
    config: Option<&str>,
    split: Option<&str>,
    train_split: &str,
) -> Result<Vec<String>> {
    let mut by_folder: BTreeMap<String, Vec<(Named, &String)>> = BTreeMap::new();
    for file in files {
        if let Some(named) =
            named(file).filter(|named| split.is_none_or(|split| named.split == split))
        {
            by_folder.entry(named.folder.clone()).or_default().push((named, file));
        }
    }
    let asked = split.unwrap_or(train_split);
    let preferred = folders(config).into_iter().find(|folder| by_folder.contains_key(folder));
    let folder = match preferred {
        Some(folder) => folder,
        // One configuration that was not asked for by name is still the only one.
        None if config.is_none() && by_folder.len() == 1 => {
            by_folder.keys().next().expect("one").clone()
        }
        None if config.is_none() && by_folder.len() > 1 => {
            let available = by_folder.into_keys().collect();
            return Err(Error::ConfigNeeded {
                source_name: source.into(),
                split: asked.into(),
                available,
            });
        }
        None => {
            let hint = match config {
                Some(config) => format!(
                    " in its configuration `{config}`\nhint: {}",
                    other_configs(files, config)
                ),
                None => String::new(),
            };
            let available = splits(files, config);
            return Err(Error::SplitNotFound {
                source_name: source.into(),
                split: asked.into(),
                available,
                hint,
            });
        }
    };
    let mut found = by_folder.remove(&folder).expect("chosen from its keys");
    let kind = found.iter().map(|(named, _)| named.kind).min().expect("no group is empty");
    found.retain(|(named, _)| named.kind == kind);
    found.sort_by(|(a, a_file), (b, b_file)| (a.shard, a_file).cmp(&(b.shard, b_file)));
    check_shards(source, asked, &found)?;
    Ok(found.into_iter().map(|(_, file)| file.clone()).collect())
}

fn other_configs(files: &[String], config: &str) -> String {
    let folders: Vec<String> = files
        .iter()
        .filter_map(|file| named(file))
        .map(|named| named.folder.split('/').next_back().unwrap_or_default().to_string())
        .filter(|folder| !folder.is_empty() && folder != config)
        .collect::<BTreeSet<_>>()
        .into_iter()
        .collect();
    match folders.is_empty() {
        true => "it has no configurations; leave `config` out".into(),
        false => format!("its configurations are {}", crate::error::list(&folders)),
    }
}

fn check_shards(source: &str, split: &str, found: &[(Named, &String)]) -> Result<()> {
    let Some(expected) = found.iter().filter_map(|(named, _)| Some(named.shard?.1)).max() else {
        return Ok(());
    };
    let there: BTreeSet<usize> =
        found.iter().filter_map(|(named, _)| Some(named.shard?.0)).collect();
    match (0..expected).find(|number| !there.contains(number)) {
        None => Ok(()),
        Some(missing) => Err(Error::MissingShard {
            source_name: source.into(),
            split: split.into(),
            found: there.len(),
            expected,
            missing: format!("{split}-{missing:05}-of-{expected:05}"),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(files: &[&str], config: Option<&str>, split: &str) -> Result<Vec<String>> {
        let files: Vec<String> = files.iter().map(|&file| file.into()).collect();
        find("owner/name", &files, config, Some(split), "train")
    }

    #[test]
    fn shards_come_in_the_order_of_their_numbers() {
        let files = [
            "README.md",
            "data/train-00001-of-00003.parquet",
            "data/train-00000-of-00003.parquet",
            "data/train-00002-of-00003.parquet",
            "data/validation_matched-00000-of-00001.parquet",
            "data/validation_mismatched-00000-of-00001.parquet",
        ];

        let train = found(&files, None, "train").unwrap();
        let matched = found(&files, None, "validation_matched").unwrap();

        assert_eq!(train, [2, 1, 3].map(|i| files[i]));
        assert_eq!(matched, [files[4]]);
    }

    #[test]
    fn a_missing_shard_is_named() {
        let files = ["data/train-00000-of-00003.parquet", "data/train-00002-of-00003.parquet"];

        let error = found(&files, None, "train").unwrap_err();

        assert_eq!(
            error.to_string(),
            "split `train` of `owner/name` is incomplete: 2 of 3 files are there, `train-00001-of-00003` is not"
        );
    }

    #[test]
    fn every_usual_layout_is_understood() {
        for (files, config, split) in [
            (vec!["train.csv"], None, "train"),
            (vec!["data/test.jsonl"], None, "test"),
            (vec!["plain_text/train-00000-of-00001.parquet"], None, "train"),
            (vec!["data/train-00000-of-00001-0123456789abcdef.parquet"], None, "train"),
            (
                vec!["en/train-00000-of-00001.parquet", "de/train-00000-of-00001.parquet"],
                Some("en"),
                "train",
            ),
            (vec!["default/train/0000.parquet", "default/train/0001.parquet"], None, "train"),
            (vec!["only/train-00000-of-00001.parquet"], None, "train"),
        ] {
            let expected: Vec<&str> = files
                .iter()
                .copied()
                .filter(|file| config.is_none_or(|config| file.starts_with(config)))
                .collect();
            assert_eq!(found(&files, config, split).unwrap(), expected, "{files:?}");
        }
    }

    #[test]
    fn parquet_is_preferred_to_a_copy_in_another_format() {
        let files = ["train.csv", "train.parquet", "train.txt"];

        assert_eq!(found(&files, None, "train").unwrap(), ["train.parquet"]);
    }

    #[test]
    fn several_configurations_ask_for_one() {
        let files = [
            "wikitext-2-v1/test-00000-of-00001.parquet",
            "wikitext-103-v1/test-00000-of-00001.parquet",
        ];

        let error = found(&files, None, "test").unwrap_err().to_string();
        let wrong = found(&files, Some("wikitext-2"), "test").unwrap_err().to_string();

        assert!(error.contains("`wikitext-103-v1`, `wikitext-2-v1`"), "{error}");
        assert!(
            wrong.contains("hint: its configurations are `wikitext-103-v1`, `wikitext-2-v1`"),
            "{wrong}"
        );
    }

    #[test]
    fn a_split_that_is_not_there_lists_those_that_are() {
        let files = ["train.csv", "validation.csv", "dataset_infos.json", "README.md"];

        let error = found(&files, None, "test").unwrap_err().to_string();

        assert_eq!(error, "`owner/name` has no split `test`; it has `train`, `validation`");
    }

    #[test]
    fn a_dash_in_a_split_is_part_of_its_name() {
        let files = ["train-clean-100.csv", "train-clean-00000-of-00001.csv"];

        assert_eq!(found(&files, None, "train-clean-100").unwrap(), ["train-clean-100.csv"]);
        assert_eq!(found(&files, None, "train-clean").unwrap(), ["train-clean-00000-of-00001.csv"]);
    }
}
