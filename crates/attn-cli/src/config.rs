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

/// The keys that say what a table describes, so that its other keys belong to that.
const NAMING: [&str; 2] = ["kind", "source"];

/// What other libraries call our settings.
const SYNONYMS: [(&str, &str); 26] = [
    ("adam_epsilon", "eps"),
    ("eval_steps", "eval_every"),
    ("gradient_accumulation_steps", "accumulation"),
    ("label_column", "label"),
    ("learning_rate", "lr"),
    ("logging_steps", "log_every"),
    ("lr_scheduler_type", "schedule"),
    ("max_grad_norm", "clip_norm"),
    ("max_length", "max_len"),
    ("max_seq_length", "max_len"),
    ("max_train_samples", "limit"),
    ("metric_for_best_model", "select"),
    ("mlm_probability", "mask_rate"),
    ("model_name_or_path", "model"),
    ("num_epochs", "epochs"),
    ("num_train_epochs", "epochs"),
    ("per_device_train_batch_size", "batch_size"),
    ("save_steps", "checkpoint_every"),
    ("save_total_limit", "keep_last"),
    ("scheduler", "schedule"),
    ("seq_len", "max_len"),
    ("text_column", "text"),
    ("train_batch_size", "batch_size"),
    ("warmup", "warmup_ratio"),
    ("wd", "weight_decay"),
    ("bs", "batch_size"),
];

/// A config as it was written, `extends` and `--set` applied.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Written {
    /// The file for messages; `None` for a config made of `--set` alone.
    path: Option<PathBuf>,
    /// What the file says.
    base: Table,
    sets: Vec<Set>,
}

impl Written {
    /// Reads `path` and what it extends, then applies `overrides` of the form `table.key=value`.
    ///
    /// A table replaces the keys it names and leaves the others; one that names a `kind` or `source` other than the one
    /// named below it replaces the whole, as the other keys described that one. The overrides are one table on top of
    /// the file: their order tells only which of two for the same key wins.
    pub(crate) fn read(path: &Path, overrides: &[String]) -> Result<Self> {
        let base = read_extended(path, &mut Vec::new())?;
        Ok(Self { path: Some(path.to_owned()), base, sets: Set::all(overrides)? })
    }

    /// A config of `overrides` on top of `base`.
    pub(crate) fn of(base: Table, overrides: &[String]) -> Result<Self> {
        Ok(Self { path: None, base, sets: Set::all(overrides)? })
    }

    /// What the file says, without the overrides.
    pub(crate) fn base(&self) -> &Table {
        &self.base
    }

    /// Understands it. From the merged table, not the text: mistakes in the file and in `--set` then read the same.
    pub(crate) fn parse<T: DeserializeOwned>(&self) -> Result<T> {
        self.complete(Ok::<T, _>)
    }

    /// Understands it and passes it on to `then`. An error of either names the override that it comes from, else the
    /// file.
    pub(crate) fn complete<T: DeserializeOwned, U>(
        &self,
        then: impl Fn(T) -> Result<U>,
    ) -> Result<U> {
        let make = |sets: &[Set]| -> Result<U> {
            let table = applied(&self.base, sets);
            let made = then(understand::<T>(&table)?)?;
            sets.iter().try_for_each(|set| set.check_unset::<T>(&table))?;
            Ok(made)
        };
        make(&self.sets).map_err(|error| {
            match (self.culprit(&format!("{error:#}"), |sets| make(sets).map(drop)), &self.path) {
                (Some(set), _) => error.context(format!("cannot use `--set {}`", set.pair)),
                (None, Some(path)) => error.context(format!("cannot use `{}`", path.display())),
                (None, None) => error,
            }
        })
    }

    /// The override without which there would be another error or none. Of several the one whose key is in the
    /// message.
    fn culprit(&self, message: &str, make: impl Fn(&[Set]) -> Result<()>) -> Option<&Set> {
        let matters = |at: usize| {
            let others = [&self.sets[..at], &self.sets[at + 1..]].concat();
            make(&others).map_or_else(|error| format!("{error:#}") != message, |()| true)
        };
        let that_matter: Vec<&Set> =
            (0..self.sets.len()).filter(|&at| matters(at)).map(|at| &self.sets[at]).collect();
        let is_named = |set: &&&Set| {
            let mut names = message.split('`').skip(1).step_by(2);
            names.any(|name| name == set.key() || Some(name) == set.keys.last().map(String::as_str))
        };
        that_matter.iter().find(is_named).or(that_matter.last()).copied()
    }
}

/// One `--set`.
#[derive(Debug, Clone, PartialEq)]
struct Set {
    /// As it was typed.
    pair: String,
    keys: Vec<String>,
    /// `None` to leave the setting away.
    value: Option<Value>,
}

impl Set {
    /// The overrides that count: of two for the same key the later.
    fn all(pairs: &[String]) -> Result<Vec<Self>> {
        let mut all: Vec<Self> = Vec::new();
        for pair in pairs {
            let set = Self::parse(pair).with_context(|| format!("cannot apply `--set {pair}`"))?;
            // What stands below a key is replaced with it.
            all.retain(|earlier| !earlier.keys.starts_with(&set.keys));
            all.push(set);
        }
        Ok(all)
    }

    fn parse(pair: &str) -> Result<Self> {
        let (keys, text) = pair.split_once('=').ok_or_else(|| {
            anyhow!(
                "there is no `=`\nhint: write `--set table.key=value`, such as `--set train.lr=1e-4`"
            )
        })?;
        let keys: Vec<String> = keys.split('.').map(|key| key.trim().to_owned()).collect();
        ensure!(keys.iter().all(|key| !key.is_empty()), "a part of the key is empty");
        let text = text.trim();
        let value = (!text.is_empty()).then(|| parse_value(text));
        Ok(Self { pair: pair.to_owned(), keys, value })
    }

    fn key(&self) -> String {
        self.keys.join(".")
    }

    /// The table that holds `value` alone.
    fn table(&self, value: Value) -> Table {
        let wrap = |inner, key: &String| Value::Table(Table::from_iter([(key.clone(), inner)]));
        match self.keys.iter().rev().fold(value, wrap) {
            Value::Table(table) => table,
            _ => unreachable!("every key wraps a table around"),
        }
    }

    /// Refuses to leave away what no config has.
    fn check_unset<T: DeserializeOwned>(&self, table: &Table) -> Result<()> {
        if self.value.is_some() {
            return Ok(());
        }
        let mut probe = table.clone();
        merge(&mut probe, self.table(Value::Boolean(true)));
        match understand::<T>(&probe) {
            Err(error) if error.to_string().starts_with("unknown field") => Err(error),
            _ => Ok(()),
        }
    }
}

/// `base` with the overrides on top.
fn applied(base: &Table, sets: &[Set]) -> Table {
    let mut table = base.clone();
    let mut new = Table::new();
    for set in sets {
        match &set.value {
            // Among each other, overrides only add up.
            Some(value) => add(&mut new, set.table(value.clone())),
            None => remove(&mut table, &set.keys),
        }
    }
    merge(&mut table, new);
    table
}

fn remove(table: &mut Table, keys: &[String]) {
    match keys {
        [] => {}
        [key] => drop(table.remove(key)),
        [key, below @ ..] => {
            if let Some(Value::Table(inner)) = table.get_mut(key) {
                remove(inner, below);
            }
        }
    }
}

/// A hint that names the configs beside one that is not there.
fn neighbours(path: &Path) -> String {
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let entries = fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut names: Vec<String> = entries
        .filter(|path| path.extension().is_some_and(|extension| extension == "toml"))
        .filter_map(|path| Some(path.file_name()?.to_string_lossy().into_owned()))
        .collect();
    names.sort();
    match (path.exists(), names.is_empty()) {
        (false, false) => format!("\nhint: `{}` holds {}", dir.display(), names.join(", ")),
        (false, true) => {
            "\nhint: a setting is changed by --set table.key=value, with `=` and no space".into()
        }
        (true, _) => String::new(),
    }
}

fn read_extended(path: &Path, above: &mut Vec<PathBuf>) -> Result<Table> {
    let shown = path.display();
    let real = path
        .canonicalize()
        .with_context(|| format!("cannot read `{shown}`{}", neighbours(path)))?;
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

/// Puts `new` on top of `base`, table by table.
fn add(base: &mut Table, new: Table) {
    put(base, new, add);
}

/// The same, but a table that names a `kind` or `source` other than the one below it replaces the whole.
fn merge(base: &mut Table, new: Table) {
    let differs = |key: &&str| match (base.get(*key), new.get(*key)) {
        (Some(old), Some(new)) => old != new,
        // What names none describes whatever is named on top.
        _ => false,
    };
    if NAMING.iter().any(differs) {
        base.clear();
    }
    put(base, new, merge);
}

fn put(base: &mut Table, new: Table, below: impl Fn(&mut Table, Table)) {
    for (key, value) in new {
        match (base.get_mut(&key), value) {
            (Some(Value::Table(old)), Value::Table(new)) => below(old, new),
            (_, value) => {
                base.insert(key, value);
            }
        }
    }
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

/// Parses `table`, in words of our own where it cannot be.
fn understand<T: DeserializeOwned>(table: &Table) -> Result<T> {
    T::deserialize(table.clone()).map_err(|error| anyhow!(explain::<T>(&error.to_string(), table)))
}

/// serde's message in plain words, with the setting it is about, and the nearest name where a name is unknown.
fn explain<T: DeserializeOwned>(message: &str, table: &Table) -> String {
    let (problem, place) = split_place(message);
    if let Some((found, expected)) = ["invalid type: ", "invalid value: ", "invalid length "]
        .iter()
        .find_map(|start| problem.strip_prefix(start)?.split_once(", expected "))
    {
        let place = narrowed::<T>(table, place, message);
        let verb = match (lookup(table, &place), found) {
            (_, found) if found.starts_with(|c: char| c.is_ascii_digit()) => "has length",
            (Some(Value::Array(_)), found) if found != "sequence" => "holds",
            _ => "is",
        };
        let found = match lookup(table, &place) {
            // So serde calls what stands where a name should.
            Some(value) if found == "unit variant" => value.to_string(),
            _ => plain_found(found),
        };
        return format!("`{place}` {verb} {found}, expected {}", plain(expected));
    }
    let mut text = match problem {
        // `Part` is the one setting that may be of two types.
        "data did not match any variant of untagged enum Part" => {
            let place = narrowed::<T>(table, place, message);
            let found = lookup(table, &place).map(Value::to_string).unwrap_or_default();
            return format!("`{place}` is {found}, expected a count, or a share such as 0.1");
        }
        _ if problem.starts_with("unknown variant") => {
            format!("{problem} in `{}`", narrowed::<T>(table, place, message))
        }
        _ if place.is_empty() => problem.to_owned(),
        _ => format!("{problem} in `{place}`"),
    };
    if let Some(hint) = nearest::<T>(problem, place) {
        text = format!("{text}\nhint: did you mean `{hint}`?");
    }
    text
}

/// serde's message, and the table or setting it names: "invalid type: ...\nin `train.lr`".
fn split_place(message: &str) -> (&str, &str) {
    let message = message.trim_end();
    match message.rsplit_once("\nin `") {
        Some((problem, place)) => (problem, place.trim_end_matches('`')),
        None => (message, ""),
    }
}

/// The setting in the table `place` that the message is about. Where serde loses track, as in a table whose `kind` says
/// what the others mean, it is the one without which the message would be another.
fn narrowed<T: DeserializeOwned>(table: &Table, place: &str, message: &str) -> String {
    let inner = match (place, lookup(table, place)) {
        ("", _) => table,
        (_, Some(Value::Table(inner))) => inner,
        _ => return place.to_owned(),
    };
    let within =
        |key: &str| if place.is_empty() { key.to_owned() } else { format!("{place}.{key}") };
    // Without the kind, everything is another matter: it comes last.
    let (kind, others): (Vec<&String>, Vec<&String>) =
        inner.keys().partition(|key| NAMING.contains(&key.as_str()));
    let key = others.into_iter().chain(kind).find(|key| {
        let mut without = table.clone();
        let keys: Vec<String> = within(key).split('.').map(Into::into).collect();
        remove(&mut without, &keys);
        T::deserialize(without).err().is_none_or(|error| error.to_string() != message)
    });
    key.map_or(place.to_owned(), |key| within(key))
}

fn lookup<'a>(table: &'a Table, place: &str) -> Option<&'a Value> {
    let (first, rest) = place.split_once('.').unwrap_or((place, ""));
    match (table.get(first)?, rest) {
        (value, "") => Some(value),
        (Value::Table(inner), rest) => lookup(inner, rest),
        _ => None,
    }
}

/// What was found, in serde's words: "string \"fast\"", "integer `0`".
fn plain_found(found: &str) -> String {
    match found {
        "map" => "a table".to_owned(),
        "sequence" => "a list".to_owned(),
        _ => {
            let value = ["string ", "integer ", "floating point ", "boolean "]
                .iter()
                .find_map(|kind| found.strip_prefix(kind));
            value.unwrap_or(found).trim_matches('`').to_owned()
        }
    }
}

/// What was expected, in serde's words or Rust's: "f64", "a nonzero u16".
fn plain(expected: &str) -> String {
    let expected = expected.strip_prefix("a ").unwrap_or(expected);
    match expected {
        "f32" | "f64" => "a number".to_owned(),
        "string" => "a text".to_owned(),
        "bool" | "boolean" => "true or false".to_owned(),
        "sequence" => "a list".to_owned(),
        "map" => "a table".to_owned(),
        "i8" | "i16" | "i32" | "i64" | "isize" => "a whole number".to_owned(),
        "u8" | "u16" | "u32" | "u64" | "usize" => "a whole number of at least 0".to_owned(),
        "string only" => "a name".to_owned(),
        _ if expected.starts_with("nonzero ") => "a whole number of at least 1".to_owned(),
        _ if expected.starts_with("struct ") => "a table".to_owned(),
        _ if expected.contains("tagged enum") => "a table with `kind`".to_owned(),
        _ => match expected.strip_prefix("an array of length ") {
            Some(n) => format!("a list of {n}"),
            None => expected.to_owned(),
        },
    }
}

/// The setting that is meant by the unknown one in serde's "unknown field `a`, expected one of `b`, `c`" of the table
/// `place`: the one of another library's name, one of another table, the nearest.
fn nearest<T: DeserializeOwned>(problem: &str, place: &str) -> Option<String> {
    if !problem.starts_with("unknown ") {
        return None;
    }
    let mut names = problem.split('`').skip(1).step_by(2);
    let unknown = names.next()?;
    let names: Vec<&str> = names.collect();
    if problem.starts_with("unknown field") {
        let synonym = SYNONYMS.iter().find(|(theirs, _)| *theirs == unknown);
        let meant = synonym.map_or(unknown, |(_, ours)| *ours);
        if names.contains(&meant) {
            return Some(meant.to_owned());
        }
        let keys = keys_of::<T>();
        let mut elsewhere = keys.iter().filter(|key| {
            let (table, last) = key.rsplit_once('.').unwrap_or(("", key));
            last == meant && table != place
        });
        if let (Some(key), None) = (elsewhere.next(), elsewhere.next()) {
            return Some(key.clone());
        }
    }
    let distance = |name: &&str| (strsim::damerau_levenshtein(unknown, name), name.len());
    let ranked = names.into_iter().min_by_key(distance)?;
    // Three letters in a name of nine.
    (distance(&ranked).0 <= unknown.len().max(3) / 3).then(|| ranked.to_owned())
}

/// Every setting of a `T`, as `table.key`; of a table that holds what it likes, or whose `kind` decides, its name
/// alone.
pub(crate) fn keys_of<T: DeserializeOwned>() -> Vec<String> {
    /// serde lists the fields where it meets one that there is not.
    fn fields<T: DeserializeOwned>(table: Option<&str>) -> Option<Vec<String>> {
        const NONE: &str = "?";
        let mut probe = Table::from_iter([(NONE.to_owned(), Value::Boolean(true))]);
        if let Some(table) = table {
            probe = Table::from_iter([(table.to_owned(), Value::Table(probe))]);
        }
        let message = T::deserialize(probe).err()?.to_string();
        let (problem, _) = split_place(&message);
        let names = problem.strip_prefix(&format!("unknown field `{NONE}`"))?;
        Some(names.split('`').skip(1).step_by(2).map(Into::into).collect())
    }
    let mut keys = Vec::new();
    for key in fields::<T>(None).unwrap_or_default() {
        match fields::<T>(Some(&key)) {
            Some(below) => keys.extend(below.iter().map(|name| format!("{key}.{name}"))),
            None => keys.push(key),
        }
    }
    keys
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

/// A file that the repository brings along, `configs/finetune/default.toml` say: here, in a folder above, or in the repository this
/// program was built from.
pub(crate) fn bundled(name: &str) -> Result<PathBuf> {
    let here = std::env::current_dir().context("cannot find the working directory")?;
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).map(Path::to_owned);
    let found = here.ancestors().chain(source.as_deref()).find_map(|dir| {
        let path = dir.join(name);
        path.is_file().then_some(path)
    });
    let path = found.ok_or_else(|| {
        anyhow!(
            "there is no `{name}` here or in a folder above\nhint: run this in the repository, or name a file of your own"
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
        rate: f64,
        way: Way,
        data: Data,
        train: Train,
        attention: Option<attn_core::Variant>,
    }

    #[derive(Debug, Default, PartialEq, Deserialize)]
    #[serde(default, deny_unknown_fields)]
    struct Train {
        lr: f64,
        steps: Vec<u64>,
    }

    #[derive(Debug, Default, PartialEq, Deserialize)]
    #[serde(rename_all = "snake_case")]
    enum Way {
        #[default]
        Up,
        Down,
    }

    #[derive(Debug, Default, PartialEq, Deserialize)]
    #[serde(default, deny_unknown_fields)]
    struct Data {
        source: String,
        label: Option<String>,
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
    fn overrides_come_last_and_the_later_of_two_wins() {
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
    fn the_order_of_overrides_for_different_keys_changes_nothing() {
        let text = "[attention]\nkind = 'softmax'\n[data]\nsource = 'a'\nlabel = 'old'";
        let mut pairs =
            ["attention.size=3", "attention.kind=window", "data.label=l", "data.source=b"];
        let one = parse(text, &pairs).unwrap();
        pairs.reverse();

        assert_eq!(one, parse(text, &pairs).unwrap());
        assert_eq!(format!("{:?}", one.attention.unwrap()), "Window(Config { size: 3 })");
        assert_eq!(one.data, Data { source: "b".into(), label: Some("l".into()) });
    }

    #[test]
    fn nothing_behind_the_equals_sign_leaves_a_setting_away() {
        let text =
            "name = 'a'\n[data]\nsource = 'a'\nlabel = 'l'\n[attention]\nkind = 'window'\nsize = 7";

        assert_eq!(parse(text, &["data.label="]).unwrap().data.label, None);
        assert_eq!(parse(text, &["data.label=\"\""]).unwrap().data.label.as_deref(), Some(""));
        assert_eq!(parse(text, &["attention="]).unwrap().attention, None);
        let anew = parse(text, &["attention= ", "attention.kind=window"]).unwrap();
        assert_eq!(format!("{:?}", anew.attention.unwrap()), "Window(Config { size: 32 })");
        let back = parse(text, &["data.label=", "data.label=x"]).unwrap();
        assert_eq!(back.data.label.as_deref(), Some("x"), "the later of two wins");
        assert_eq!(parse("", &["data.label="]).unwrap(), Probe::default());
        let error = message(parse(text, &["data.lable="]));
        assert!(error.contains("cannot use `--set data.lable=`: unknown field `lable`"), "{error}");
    }

    #[test]
    fn another_kind_or_source_takes_nothing_over() {
        let text = "[attention]\nkind = 'window'\nsize = 7\n[data]\nsource = 'a'\nlabel = 'l'";
        let kind = |pairs: &[&str]| parse(text, pairs).unwrap().attention.unwrap();

        assert_eq!(kind(&["attention.kind=softmax"]).name(), "softmax");
        assert_eq!(format!("{:?}", kind(&["attention.size=9"])), "Window(Config { size: 9 })");
        assert_eq!(format!("{:?}", kind(&["attention.kind=window"])), "Window(Config { size: 7 })");
        let label = |pair: &str| parse(text, &[pair]).unwrap().data.label;
        assert_eq!(label("data.source=b"), None);
        assert_eq!(label("data.source=a").as_deref(), Some("l"));
    }

    #[test]
    fn settings_of_a_table_that_names_none_go_with_the_kind_put_on_top() {
        let text = "[attention]\nsize = 8\n[data]\nlabel = 'l'";
        let probe = parse(text, &["attention.kind=window", "data.source=a"]).unwrap();

        assert_eq!(format!("{:?}", probe.attention.unwrap()), "Window(Config { size: 8 })");
        assert_eq!(probe.data, Data { source: "a".into(), label: Some("l".into()) });
        let error = message(parse(text, &["attention.kind=softmax"]));
        assert!(error.contains("unknown field `size`"), "{error}");
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

        assert!(
            message(parse("", &["train.lr"]))
                .contains("cannot apply `--set train.lr`: there is no `=`")
        );
        assert!(message(parse("", &["train..lr=1"])).contains("is empty"));
        assert!(message(parse("a b", &[])).contains("is not TOML"));
    }

    #[test]
    fn what_other_libraries_or_tables_call_a_setting_is_understood() {
        let meant = |pair: &str| {
            let message = message(parse("", &[pair]));
            message.rsplit_once("hint: did you mean `").map(|(_, name)| name.to_owned())
        };

        assert_eq!(meant("train.learning_rate=1").as_deref(), Some("lr`?"));
        assert_eq!(meant("learning_rate=1").as_deref(), Some("train.lr`?"));
        assert_eq!(meant("lr=1").as_deref(), Some("train.lr`?"));
        assert_eq!(meant("train.rate=1").as_deref(), Some("rate`?"), "it stands in no table");
        assert_eq!(meant("data.steps=1").as_deref(), Some("train.steps`?"));
    }

    #[test]
    fn what_was_found_and_expected_is_said_in_plain_words() {
        for (pair, expected) in [
            ("train.lr=fast", "`train.lr` is \"fast\", expected a number"),
            ("train.lr=true", "`train.lr` is true, expected a number"),
            ("train.steps=1", "`train.steps` is 1, expected a list"),
            ("train.steps=[1, x]", "`train.steps` is \"[1, x]\", expected a list"),
            (
                "train.steps=[1, 2.5]",
                "`train.steps` holds 2.5, expected a whole number of at least 0",
            ),
            ("train.steps=[-1]", "`train.steps` holds -1, expected a whole number of at least 0"),
            ("train=3", "`train` is 3, expected a table"),
            ("way=3", "`way` is 3, expected a name"),
            ("name=5", "`name` is 5, expected a text"),
            ("name.x=5", "`name` is a table, expected a text"),
            ("name=[5]", "`name` is a list, expected a text"),
            ("attention=window", "`attention` is \"window\", expected a table with `kind`"),
            (
                "attention={kind = 'window', size = 0}",
                "`attention.size` is 0, expected a whole number of at least 1",
            ),
        ] {
            let message = message(parse("name = 'a'", &[pair]));
            assert_eq!(message, format!("cannot use `--set {pair}`: {expected}"));
        }
    }

    #[test]
    fn a_mistake_is_blamed_on_the_override_it_comes_from_else_on_the_file() {
        let error = |text: &str, pairs: &[&str]| message(parse(text, pairs));
        let sized = ["attention.kind=window", "attention.size=0", "name=x"];
        assert!(error("", &sized).starts_with("cannot use `--set attention.size=0`: "));
        let of_file = error("[train]\nlr = 'x'", &["train.steps=[1]"]);
        assert!(of_file.contains("run.toml`: `train.lr` is \"x\""), "{of_file}");
        let twice = error("", &["train.lr=x", "train.lr=x"]);
        assert!(twice.starts_with("cannot use `--set train.lr=x`"), "{twice}");

        let written = Written::of(Table::new(), &sets(&["name=b", "rate=2"])).unwrap();
        let refused = written.complete(|probe: Probe| -> Result<()> {
            ensure!(probe.rate < 1.0, "`rate` is {}", probe.rate);
            Ok(())
        });
        let error = format!("{:#}", refused.unwrap_err());
        assert_eq!(error, "cannot use `--set rate=2`: `rate` is 2", "later checks too");
    }

    #[test]
    fn every_setting_is_known_by_name() {
        let keys = [
            "name",
            "rate",
            "way",
            "data.source",
            "data.label",
            "train.lr",
            "train.steps",
            "attention",
        ];
        assert_eq!(keys_of::<Probe>(), keys);
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
