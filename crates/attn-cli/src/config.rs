//! Config files: reading, `extends`, `--set`, and messages that say where a mistake is.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::de::DeserializeOwned;
use toml::{Table, Value};

/// The key that names the file a config builds on.
const EXTENDS: &str = "extends";

/// The key that says which of several things a table configures, so that its other keys belong to that.
const KIND: &str = "kind";

/// A config as it was written, `extends` and `--set` applied.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Written {
    /// What it says.
    pub(crate) table: Table,
    /// The file, for messages; `None` for a config made of `--set` alone.
    pub(crate) path: Option<PathBuf>,
}

impl Written {
    /// Reads `path` and what it extends, then applies `overrides` of the form `table.key=value`, in order.
    ///
    /// A table replaces the keys it names and leaves the others; one with another `kind` replaces the whole, as the
    /// other keys were that kind's.
    pub(crate) fn read(path: &Path, overrides: &[String]) -> Result<Self> {
        let mut table = read_extended(path, &mut Vec::new())?;
        for pair in overrides {
            set(&mut table, pair).with_context(|| format!("cannot apply `--set {pair}`"))?;
        }
        Ok(Self { table, path: Some(path.to_owned()) })
    }

    /// A config of `overrides` on top of `table`.
    pub(crate) fn of(mut table: Table, overrides: &[String]) -> Result<Self> {
        for pair in overrides {
            set(&mut table, pair).with_context(|| format!("cannot apply `--set {pair}`"))?;
        }
        Ok(Self { table, path: None })
    }

    /// Understands it. From the merged table, not the text: mistakes in the file and in `--set` then read the same.
    pub(crate) fn parse<T: DeserializeOwned>(&self) -> Result<T> {
        T::deserialize(self.table.clone()).map_err(|error| {
            let problem = anyhow!(explain(&error.to_string()));
            match &self.path {
                Some(path) => problem.context(format!("cannot use `{}`", path.display())),
                None => problem,
            }
        })
    }
}

fn read_extended(path: &Path, above: &mut Vec<PathBuf>) -> Result<Table> {
    let shown = path.display();
    let real = path.canonicalize().with_context(|| format!("cannot read `{shown}`"))?;
    if above.contains(&real) {
        match above.len() - 1 {
            0 => bail!("`{shown}` extends itself"),
            others => bail!("`{shown}` extends itself, by way of {others} other file(s)"),
        }
    }
    above.push(real);
    let text = fs::read_to_string(path).with_context(|| format!("cannot read `{shown}`"))?;
    let mut table: Table = text.parse().with_context(|| format!("`{shown}` is not TOML"))?;
    match table.remove(EXTENDS) {
        None => Ok(table),
        Some(Value::String(base)) => {
            let base = path.parent().unwrap_or(Path::new("")).join(base);
            let mut merged = read_extended(&base, above).with_context(|| {
                format!("cannot use `{shown}`, which extends `{}`", base.display())
            })?;
            merge(&mut merged, table);
            Ok(merged)
        }
        Some(other) => {
            bail!("`{shown}`: `{EXTENDS}` is {}, expected a file name in quotes", other.type_str())
        }
    }
}

/// Puts `new` on top of `base`.
fn merge(base: &mut Table, new: Table) {
    let changes_kind = |old: &Table| new.get(KIND).is_some_and(|kind| old.get(KIND) != Some(kind));
    if changes_kind(base) {
        base.clear();
    }
    for (key, value) in new {
        match (base.get_mut(&key), value) {
            (Some(Value::Table(old)), Value::Table(new)) => merge(old, new),
            (_, value) => {
                base.insert(key, value);
            }
        }
    }
}

/// Applies one `table.key=value`.
fn set(table: &mut Table, pair: &str) -> Result<()> {
    let (keys, text) = pair.split_once('=').ok_or_else(|| {
        anyhow!(
            "there is no `=`\nhint: write `--set table.key=value`, such as `--set train.lr=1e-4`"
        )
    })?;
    let keys: Vec<&str> = keys.split('.').map(str::trim).collect();
    ensure!(keys.iter().all(|key| !key.is_empty()), "a part of the key is empty");
    let mut new = Value::Table(Table::new());
    for (depth, key) in keys.iter().rev().enumerate() {
        let inner = if depth == 0 { parse_value(text.trim()) } else { new };
        new = Value::Table(Table::from_iter([((*key).to_owned(), inner)]));
    }
    // What is no table yet cannot hold a key.
    let mut at = &*table;
    for (depth, key) in keys[..keys.len() - 1].iter().enumerate() {
        match at.get(*key) {
            None => break,
            Some(Value::Table(inner)) => at = inner,
            Some(other) => {
                bail!("`{}` is {}, not a table", keys[..=depth].join("."), other.type_str())
            }
        }
    }
    let Value::Table(new) = new else { unreachable!("every key wraps a table around") };
    merge(table, new);
    Ok(())
}

/// A TOML value, or the text itself where it is none: quotes are the shell's business.
fn parse_value(text: &str) -> Value {
    let parsed = format!("value = {text}").parse::<Table>().ok().filter(|table| table.len() == 1);
    match parsed.and_then(|mut table| table.remove("value")) {
        // A date can only be meant as a name.
        None | Some(Value::Datetime(_)) => Value::String(text.to_owned()),
        Some(value) => value,
    }
}

/// serde's message on one line, with the nearest name where a name is unknown.
fn explain(message: &str) -> String {
    let mut lines = message.trim_end().lines();
    let mut text = lines.next().unwrap_or("no message").to_owned();
    for line in lines {
        text = format!("{text} {line}");
    }
    if let Some(hint) = nearest(message) {
        text = format!("{text}\nhint: did you mean `{hint}`?");
    }
    text
}

/// The known name nearest to the unknown one in serde's "unknown field `a`, expected one of `b`, `c`".
fn nearest(message: &str) -> Option<String> {
    let first = message.lines().next()?;
    if !first.starts_with("unknown ") {
        return None;
    }
    let mut names = first.split('`').skip(1).step_by(2);
    let unknown = names.next()?;
    let ranked = names.map(|name| (strsim::damerau_levenshtein(unknown, name), name)).min()?;
    // Three letters in a name of nine.
    (ranked.0 <= unknown.len().max(3) / 3).then(|| ranked.1.to_owned())
}

/// The repository that a config lies in: the folder that holds the `configs` it is part of.
pub(crate) fn root_of(config: &Path) -> Option<PathBuf> {
    let config = config.canonicalize().ok()?;
    let configs =
        config.ancestors().find(|dir| dir.file_name().is_some_and(|name| name == "configs"))?;
    configs.parent().map(Path::to_owned)
}

/// A path in a config: as seen from here where something is there, else from the repository the config lies in, so
/// that a run can be started from anywhere. What is neither may be a Hub id and stays as it is.
pub(crate) fn find_path(path: &str, root: Option<&Path>) -> String {
    let in_root = root.map(|root| root.join(path)).filter(|path| path.exists());
    match in_root {
        Some(found) if !path.is_empty() && !Path::new(path).exists() => found.display().to_string(),
        _ => path.to_owned(),
    }
}

/// The config of a run that names none: `configs/<name>` here, in a folder above, or in the repository this program
/// was built from.
pub(crate) fn bundled(name: &str) -> Result<PathBuf> {
    let here = std::env::current_dir().context("cannot find the working directory")?;
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).map(Path::to_owned);
    let found = here.ancestors().chain(source.as_deref()).find_map(|dir| {
        let path = dir.join("configs").join(name);
        path.is_file().then_some(path)
    });
    let path = found.ok_or_else(|| {
        anyhow!(
            "there is no `configs/{name}` here or in a folder above\nhint: run this in the repository, or name a config"
        )
    })?;
    // Shorter in messages, where it is below.
    Ok(path.strip_prefix(&here).map(Path::to_owned).unwrap_or(path))
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Default, PartialEq, Deserialize)]
    #[serde(default, deny_unknown_fields)]
    struct Probe {
        name: String,
        train: Train,
        attention: Option<attn_core::Variant>,
    }

    #[derive(Debug, Default, PartialEq, Deserialize)]
    #[serde(default, deny_unknown_fields)]
    struct Train {
        lr: f64,
        steps: Vec<u64>,
    }

    fn sets(pairs: &[&str]) -> Vec<String> {
        pairs.iter().map(|pair| (*pair).to_owned()).collect()
    }

    fn parse(text: &str, pairs: &[&str]) -> Result<Probe> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("run.toml");
        fs::write(&path, text)?;
        Written::read(&path, &sets(pairs))?.parse()
    }

    fn message(result: Result<Probe>) -> String {
        format!("{:#}", result.unwrap_err())
    }

    #[test]
    fn overrides_come_last_and_in_order() {
        let probe = parse(
            "name = 'a'\n[train]\nlr = 1.0",
            &["train.lr=2e-4", "train.steps=[1, 2]", "train.lr = 3e-4", "name=2024-01-01"],
        )
        .unwrap();

        assert_eq!((probe.train.lr, probe.train.steps), (3e-4, vec![1, 2]));
        assert_eq!(probe.name, "2024-01-01", "a date is a name");
        assert_eq!(parse("", &["name=owner/model"]).unwrap().name, "owner/model");
        assert_eq!(parse("", &["name=\"7\""]).unwrap().name, "7");
        assert_eq!(
            parse("", &["name=a\nb = 1"]).unwrap().name,
            "a\nb = 1",
            "one value, not a document"
        );
    }

    #[test]
    fn another_kind_takes_nothing_over() {
        let text = "[attention]\nkind = 'window'\nsize = 7";
        let kind = |pairs: &[&str]| parse(text, pairs).unwrap().attention.unwrap();

        assert_eq!(kind(&["attention.kind=softmax"]).name(), "softmax");
        assert_eq!(format!("{:?}", kind(&["attention.size=9"])), "Window(Config { size: 9 })");
        assert_eq!(format!("{:?}", kind(&["attention.kind=window"])), "Window(Config { size: 7 })");
    }

    #[test]
    fn mistakes_are_named_with_their_place_and_the_nearest_name() {
        let unknown = message(parse("[train]\nlrr = 1", &[]));
        assert!(
            unknown.contains("run.toml`: unknown field `lrr`, expected `lr` or `steps` in `train`"),
            "{unknown}"
        );
        assert!(unknown.contains("hint: did you mean `lr`?"), "{unknown}");
        let far = message(parse("nonsense = 1", &[]));
        assert!(far.contains("unknown field `nonsense`") && !far.contains("hint"), "{far}");
        let kind = message(parse("", &["attention.kind=windw"]));
        assert!(
            kind.contains("unknown variant `windw`") && kind.contains("did you mean `window`"),
            "{kind}"
        );
        let wrong = message(parse("", &["train.lr=fast"]));
        assert!(
            wrong.contains("invalid type: string \"fast\", expected f64 in `train.lr`"),
            "{wrong}"
        );

        assert!(
            message(parse("", &["train.lr"]))
                .contains("cannot apply `--set train.lr`: there is no `=`")
        );
        assert!(
            message(parse("name = 'a'", &["name.x=1"])).contains("`name` is string, not a table")
        );
        assert!(message(parse("", &["train..lr=1"])).contains("is empty"));
        assert!(message(parse("a b", &[])).contains("is not TOML"));
    }

    #[test]
    fn a_file_builds_on_another_and_not_on_itself() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        fs::create_dir(dir.path().join("sub")).unwrap();
        write("base.toml", "name = 'base'\n[train]\nlr = 1.0\nsteps = [1, 2, 3]");
        write("sub/child.toml", "extends = '../base.toml'\n[train]\nsteps = [9]");
        let read = |name: &str| Written::read(&dir.path().join(name), &[]);

        let child: Probe = read("sub/child.toml").unwrap().parse().unwrap();
        assert_eq!(
            (child.name.as_str(), child.train.lr, child.train.steps),
            ("base", 1.0, vec![9])
        );

        write("a.toml", "extends = 'b.toml'");
        write("b.toml", "extends = 'a.toml'");
        let error = format!("{:#}", read("a.toml").unwrap_err());
        assert!(error.contains("extends itself, by way of 1 other file"), "{error}");
        write("c.toml", "extends = 'none.toml'");
        let error = format!("{:#}", read("c.toml").unwrap_err());
        assert!(error.contains("c.toml`, which extends") && error.contains("none.toml"), "{error}");
    }

    #[test]
    fn paths_are_found_from_the_repository_too() {
        let repo = tempfile::tempdir().unwrap();
        let root = repo.path().canonicalize().unwrap();
        fs::create_dir_all(root.join("configs/finetune")).unwrap();
        fs::create_dir(root.join("data")).unwrap();
        fs::write(root.join("configs/finetune/x.toml"), "").unwrap();
        let config = root.join("configs/finetune/x.toml");

        assert_eq!(root_of(&config), Some(root.clone()));
        assert_eq!(find_path("data", Some(&root)), root.join("data").display().to_string());
        assert_eq!(find_path("owner/name", Some(&root)), "owner/name");
        assert_eq!(find_path("src", Some(&root)), "src", "what is here wins");
        assert_eq!(root_of(Path::new("Cargo.toml")), None);
    }
}
