//! What can go wrong while data is found, fetched, read, tokenized or chosen.

use std::{
    io,
    path::{Path, PathBuf},
};

use crate::hub::Repo;

/// Shorthand for this crate's results.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of another library, kept as the source.
pub type Source = Box<dyn std::error::Error + Send + Sync>;

/// Everything this crate refuses, each with what was found, what was expected and, where there is one, a way out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The disk refused.
    #[error("cannot {doing} `{}`", path.display())]
    Io {
        /// What was tried, as a verb: `read`, `write`, `list`.
        doing: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },

    /// A repository id that cannot be one.
    #[error("`{id}` is not a repository id: expected `owner/name`")]
    RepoId {
        /// What was given.
        id: String,
    },

    /// A file name that leads out of its folder.
    #[error("`{name}` is not a file name within a repository")]
    FileName {
        /// What was given.
        name: String,
    },

    /// A path was given, and nothing is there.
    #[error(
        "there is no folder `{path}`\nhint: a repository id reads `owner/name`; a path begins with `/`, `./`, `../` or `~`"
    )]
    NoSuchFolder {
        /// The path as the user wrote it.
        path: String,
    },

    /// The Hub knows no such repository, or it is private.
    #[error("{} has no {repo}, or it is private\nhint: check the spelling; for a private one set HF_TOKEN", repo.endpoint)]
    RepoNotFound {
        /// What was asked for.
        repo: Box<Repo>,
    },

    /// The repository has no such branch, tag or commit.
    #[error(
        "{repo} has no revision `{revision}`\nhint: give a branch, a tag or a full commit id of 40 hex digits"
    )]
    RevisionNotFound {
        /// Where it was looked for.
        repo: Box<Repo>,
        /// What was asked for.
        revision: String,
    },

    /// The repository has no such file.
    #[error("{repo} has no file `{file}` at revision `{revision}`")]
    FileNotFound {
        /// Where it was looked for.
        repo: Box<Repo>,
        /// Path within the repository.
        file: String,
        /// Branch, tag or commit.
        revision: String,
    },

    /// The Hub wants to know who asks, or that a licence was accepted.
    #[error("{} refuses {repo} (HTTP {status}, {} token was sent)\nhint: {}", repo.endpoint, if *token_sent { "a" } else { "no" }, access_hint(repo, *token_sent))]
    Refused {
        /// What was asked for.
        repo: Box<Repo>,
        /// 401 or 403.
        status: u16,
        /// Whether the request carried a token.
        token_sent: bool,
    },

    /// Offline, and the cache does not have it.
    #[error(
        "`{file}` of {repo} at revision `{revision}` is not in the cache `{}`, and offline mode forbids fetching it\n\
         hint: unset HF_HUB_OFFLINE, or run once with a network; HF_HUB_CACHE names another cache",
        cache.display()
    )]
    NotCached {
        /// What was asked for.
        repo: Box<Repo>,
        /// Path within the repository.
        file: String,
        /// Branch, tag or commit.
        revision: String,
        /// The cache looked into.
        cache: PathBuf,
    },

    /// No answer from the Hub, and the cache does not have it either.
    #[error(
        "cannot reach {} for `{file}` of {repo}\n\
         hint: check the network and the proxy; HF_ENDPOINT names a mirror; what is cached works with HF_HUB_OFFLINE=1",
        repo.endpoint
    )]
    Unreachable {
        /// What was asked for.
        repo: Box<Repo>,
        /// Path within the repository.
        file: String,
        /// What the connection said.
        #[source]
        source: Source,
    },

    /// The content of a download is not what the Hub announced. It has been deleted.
    #[error(
        "`{file}` of {repo} arrived damaged and was deleted: expected {algorithm} {expected}, found {found}\n\
         hint: run again; if it happens twice, something between here and {} changes files",
        repo.endpoint
    )]
    HashMismatch {
        /// What was asked for.
        repo: Box<Repo>,
        /// Path within the repository.
        file: String,
        /// `sha256` or `git blob sha1`.
        algorithm: &'static str,
        /// What the Hub announced, hex.
        expected: String,
        /// What arrived, hex.
        found: String,
    },

    /// Anything else the Hub or its client said.
    #[error("cannot fetch `{file}` of {repo} from {}", repo.endpoint)]
    Hub {
        /// What was asked for.
        repo: Box<Repo>,
        /// Path within the repository, or what was asked about it.
        file: String,
        /// What was said.
        #[source]
        source: Source,
    },

    /// A model repository without weights we can read.
    #[error(
        "model `{id}` has neither `model.safetensors` nor `model.safetensors.index.json`\nhint: {hint}"
    )]
    NoWeights {
        /// Repository id.
        id: String,
        /// What it has instead.
        hint: String,
    },

    /// A JSON file that is not what it should be.
    #[error("`{}` is not {expected}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What it should be.
        expected: &'static str,
        /// What the parser said.
        #[source]
        source: Source,
    },

    /// A task name that is not in the table.
    #[error(
        "there is no task `{name}`, expected one of {}{}",
        list(known),
        did_you_mean(name, known)
    )]
    UnknownTask {
        /// What was given.
        name: String,
        /// The names there are.
        known: Vec<String>,
    },

    /// No data source was named.
    #[error(
        "no data source\nhint: set `source` to a Hub id, a folder or a file, or to one of {}",
        list(known)
    )]
    NoSource {
        /// The task names there are.
        known: Vec<String>,
    },

    /// A data path was given, and nothing is there.
    #[error(
        "there is no data file or folder `{path}`\nhint: look at the name; paths in a config are taken from the working directory"
    )]
    NoSuchData {
        /// The path as the user wrote it.
        path: String,
    },

    /// Labels are names, and there is nowhere to learn them all.
    #[error(
        "column `{column}` of `{source_name}` holds class names, and there is no split `{split}` to collect them from\nhint: set `classes`"
    )]
    ClassesNeeded {
        /// Folder, file or repository id.
        source_name: String,
        /// The label column.
        column: String,
        /// The split to train on.
        split: String,
    },

    /// A data folder or repository without the split.
    #[error("`{source_name}` has no split `{split}`; {}{hint}", if available.is_empty() { "it has none that can be read".into() } else { format!("it has {}", list(available)) })]
    SplitNotFound {
        /// Folder, file or repository id.
        source_name: String,
        /// The split asked for.
        split: String,
        /// The splits there are.
        available: Vec<String>,
        /// A line of advice, or nothing; begins with a line break.
        hint: String,
    },

    /// Several configurations, and none was chosen.
    #[error(
        "`{source_name}` has several configurations with a split `{split}`: {}\nhint: set `config`",
        list(available)
    )]
    ConfigNeeded {
        /// Folder or repository id.
        source_name: String,
        /// The split asked for.
        split: String,
        /// The configurations there are.
        available: Vec<String>,
    },

    /// Some pieces of a split are absent.
    #[error(
        "split `{split}` of `{source_name}` is incomplete: {found} of {expected} files are there, `{missing}` is not"
    )]
    MissingShard {
        /// Folder or repository id.
        source_name: String,
        /// The split asked for.
        split: String,
        /// Files found.
        found: usize,
        /// Files that their names announce.
        expected: usize,
        /// The first that is absent.
        missing: String,
    },

    /// A split without a row.
    #[error(
        "split `{split}` of `{source_name}` has no rows\nhint: look into its file, or name another split"
    )]
    EmptySplit {
        /// Folder, file or repository id.
        source_name: String,
        /// The split.
        split: String,
    },

    /// A file whose kind we do not read.
    #[error("cannot read `{}`: expected a file ending in {}", path.display(), list(&crate::dataset::EXTENSIONS))]
    FileKind {
        /// The file.
        path: PathBuf,
    },

    /// A data file that its reader refuses: cut off, damaged or another format.
    #[error("`{}` cannot be read as {format}{}", path.display(), row.map(|row| format!(" (row {row})")).unwrap_or_default())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The format its name announces.
        format: &'static str,
        /// 1 is the first row after a header, where the reader knows it.
        row: Option<u64>,
        /// What the reader said.
        #[source]
        source: Source,
    },

    /// A column that is not there.
    #[error("`{}` has no column `{column}`; it has {}{}{}", path.display(), list(available), did_you_mean(column, available), separator(available))]
    ColumnMissing {
        /// The file.
        path: PathBuf,
        /// The column asked for.
        column: String,
        /// The columns there are.
        available: Vec<String>,
    },

    /// A column of a type that cannot serve.
    #[error("column `{column}` of `{}` holds {found}, expected {expected}", path.display())]
    ColumnType {
        /// The file.
        path: PathBuf,
        /// The column.
        column: String,
        /// What it should hold.
        expected: &'static str,
        /// What it holds.
        found: String,
    },

    /// A sentence of a treebank that is no tree.
    #[error("row {row} of `{}` {problem}\nhint: correct the row, or take it out", path.display())]
    Tree {
        /// The file.
        path: PathBuf,
        /// From 1.
        row: u64,
        /// What is wrong, and what was expected.
        problem: String,
    },

    /// A token that stands for parts of two words.
    #[error(
        "the tokenizer makes one token, `{token}`, of the end of the word `{word}` and the beginning of the next, in \
         sentence {sentence} (counted from 0)\nhint: name a model whose tokenizer keeps words apart"
    )]
    Straddles {
        /// Its number.
        sentence: usize,
        /// The first of the words.
        word: String,
        /// The token.
        token: String,
    },

    /// A row without text.
    #[error("column `{column}` of `{}` is null in row {row}\nhint: give it a text, or take the row out", path.display())]
    NullText {
        /// The file.
        path: PathBuf,
        /// The column.
        column: String,
        /// 1 is the first row.
        row: u64,
    },

    /// A label that is no class.
    #[error("label `{label}` in row {row} of `{}` is not one of {expected}\nhint: mend the row, or name every class (`classes`)", path.display())]
    Label {
        /// The file.
        path: PathBuf,
        /// 1 is the first row.
        row: u64,
        /// The value found.
        label: String,
        /// The classes there are.
        expected: String,
    },

    /// Class names were asked for, and the data set has no label column.
    #[error("`{source_name}` has no label column set\nhint: set `label`")]
    NoLabel {
        /// Folder, file or repository id.
        source_name: String,
    },

    /// A model folder without a tokenizer we can use.
    #[error("`{}` has no tokenizer: {reason}\nhint: {hint}", folder.display())]
    NoTokenizer {
        /// The folder.
        folder: PathBuf,
        /// What was found.
        reason: String,
        /// A way out.
        hint: &'static str,
    },

    /// The tokenizer library refused.
    #[error("the tokenizer cannot {doing}")]
    Tokenizer {
        /// What was tried.
        doing: String,
        /// What the library said.
        #[source]
        source: Source,
    },

    /// Text longer than the model takes, and cutting was not allowed.
    #[error(
        "text {index} has {n_tokens} tokens, more than the {max_len} allowed\nhint: allow truncation, or raise the limit if the model has more positions"
    )]
    TooLong {
        /// Position of the text in the call, from 0.
        index: usize,
        /// Its length.
        n_tokens: usize,
        /// The limit.
        max_len: usize,
    },

    /// A vocabulary that cannot be made.
    #[error("cannot train a vocabulary of {asked}: {reason}")]
    Vocabulary {
        /// The size asked for.
        asked: usize,
        /// Why not.
        reason: String,
    },

    /// A class with fewer examples than asked for.
    #[error(
        "class {class} has {found} labelled examples, fewer than the {asked} per class asked for\nhint: {}",
        match found {
            0 => "leave the class out of `data.classes`".to_owned(),
            found => format!("ask for at most {found}"),
        }
    )]
    TooFewExamples {
        /// The class.
        class: i64,
        /// Its examples.
        found: usize,
        /// Examples per class asked for.
        asked: usize,
    },

    /// Nothing carries a label.
    #[error(
        "none of the {n_examples} examples is labelled\nhint: look at the label column; a test split often holds -1 alone"
    )]
    NoLabels {
        /// Examples looked at.
        n_examples: usize,
    },

    /// A text with too few different words to make needles of.
    #[error(
        "the haystack has {found} words to make needles of (3 to 10 small letters, at least twice), expected at least \
         {expected}\nhint: take a longer text"
    )]
    FewWords {
        /// Words found.
        found: usize,
        /// Words needed.
        expected: usize,
    },

    /// A needle that does not stand where it was to.
    #[error(
        "a needle was to stand at {wanted:.2} of its document and stands at {found:.2}, further off than its sentences are long \
         ({allowed:.2})\nhint: needles are put between sentences: take longer documents, or a text whose sentences end in full stops"
    )]
    Misplaced {
        /// Where it was to stand, as a share of the text around it.
        wanted: f64,
        /// Where it stands.
        found: f64,
        /// How far off it may be.
        allowed: f64,
    },

    /// A line of a file of needles that says no needle.
    #[error("line {line} of `{}` is no needle: {problem}", path.display())]
    Needle {
        /// The file.
        path: PathBuf,
        /// 1 is the first.
        line: usize,
        /// What is wrong, what was expected, and a hint.
        problem: String,
    },

    /// A text that is shorter than the documents to be made of it.
    #[error(
        "the haystack has {n_tokens} tokens, and documents of {asked} are asked for\nhint: take a longer text, or \
         shorter documents"
    )]
    ShortHaystack {
        /// Tokens of the text.
        n_tokens: usize,
        /// Tokens of a document.
        asked: usize,
    },

    /// A part that cannot be cut off.
    #[error("cannot hold out {asked} of {n_examples} examples: {reason}")]
    HoldOut {
        /// What was asked for.
        asked: String,
        /// Examples there are.
        n_examples: usize,
        /// Why not.
        reason: &'static str,
    },

    /// A tokenizer that says nothing of conversations.
    #[error(
        "`{}` has no chat template: no `chat_template.jinja`, and no `chat_template` in `tokenizer_config.json`\nhint: \
         use a prompt without `chat`, or put the template of the model it was tuned from there",
        folder.display()
    )]
    NoChatTemplate {
        /// The folder.
        folder: PathBuf,
    },

    /// A chat template that cannot be used, or refuses a conversation.
    #[error("the chat template in `{origin}` cannot be used: {reason}")]
    ChatTemplate {
        /// Its file.
        origin: String,
        /// What it says.
        reason: String,
    },

    /// A prompt that cannot be made.
    #[error("{problem}\nhint: {hint}")]
    Prompt {
        /// What is wrong, and where.
        problem: String,
        /// A way out.
        hint: String,
    },

    /// A setting out of its range.
    #[error("`{name}` is {value}, expected {expected}")]
    Setting {
        /// Its name.
        name: &'static str,
        /// Its value.
        value: String,
        /// Its range.
        expected: &'static str,
    },
}

impl Error {
    /// Wraps a refusal of the disk.
    pub(crate) fn io(
        doing: &'static str,
        path: impl AsRef<Path>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        move |source| Self::Io { doing, path, source }
    }
}

fn access_hint(repo: &Repo, token_sent: bool) -> String {
    let page = repo.page();
    if token_sent {
        format!(
            "accept the licence at {page} with the account the token belongs to, and see that the token may read it"
        )
    } else {
        format!(
            "accept the licence at {page} if it has one, and set HF_TOKEN to a token that may read it"
        )
    }
}

/// Names in backticks, for a message.
pub(crate) fn list(names: &[impl AsRef<str>]) -> String {
    const SHOWN: usize = 24;
    let mut shown: Vec<String> =
        names.iter().take(SHOWN).map(|name| format!("`{}`", name.as_ref())).collect();
    if names.len() > SHOWN {
        shown.push(format!("and {} more", names.len() - SHOWN));
    }
    shown.join(", ")
}

/// Advice where the one column there is looks like several.
fn separator(available: &[String]) -> String {
    let [header] = available else { return String::new() };
    match header.chars().find(|c| ";\t|,".contains(*c)) {
        Some('\t') => "\nhint: tabs separate its columns, not commas: name the file `.tsv`".into(),
        Some(',') => "\nhint: commas separate its columns, not tabs: name the file `.csv`".into(),
        Some(found) => format!(
            "\nhint: `{found}` separates its columns, not commas: save it as CSV with commas, or with tabs as `.tsv`"
        ),
        None => String::new(),
    }
}

/// A line that offers the nearest name, or nothing where none is near.
pub(crate) fn did_you_mean(name: &str, known: &[String]) -> String {
    let distance =
        |other: &String| strsim::damerau_levenshtein(&name.to_lowercase(), &other.to_lowercase());
    let nearest = known.iter().map(|other| (distance(other), other)).min();
    match nearest {
        Some((distance, other)) if distance <= name.len().max(3) / 3 => {
            format!("\nhint: did you mean `{other}`?")
        }
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hub::RepoKind;

    #[test]
    fn a_near_name_is_offered_and_a_far_one_is_not() {
        let known = ["sentence".to_string(), "label".to_string()];

        assert_eq!(did_you_mean("sentense", &known), "\nhint: did you mean `sentence`?");
        assert_eq!(did_you_mean("Label", &known), "\nhint: did you mean `label`?");
        assert_eq!(did_you_mean("text", &known), "");
    }

    #[test]
    fn a_refusal_names_the_licence_page() {
        let refused = |token_sent| {
            let (endpoint, id) =
                ("https://huggingface.co".into(), "meta-llama/Llama-3.2-1B".into());
            let repo = Box::new(Repo { endpoint, kind: RepoKind::Model, id });
            Error::Refused { repo, status: 401, token_sent }.to_string()
        };

        assert!(refused(false).contains("https://huggingface.co/meta-llama/Llama-3.2-1B"));
        assert!(refused(false).contains("set HF_TOKEN"));
        assert!(refused(true).contains("a token was sent"));
    }
}
