//! Files of the Hugging Face Hub, by repository id.
//!
//! Downloads go through the `hf-hub` crate into the cache that the Python libraries use, so that nothing is fetched
//! twice. What the crate leaves out is done here:
//!
//! - **Offline mode.** `HF_HUB_OFFLINE=1` answers from the cache alone. No socket is opened.
//! - **Hashes.** The Hub's entity tag is the content's SHA-256 or its git blob id. A download that does not match is
//!   deleted and reported. A process killed between download and check leaves a mark, and the next one checks.
//! - **One revision.** A branch is resolved to a commit once, and every file is fetched at that commit: a repository
//!   that changes meanwhile cannot mix two versions. A pinned commit that is cached needs no request.
//! - **Messages.** What is missing, refused, not cached or out of reach is told apart, with a way out.

use std::{
    collections::{BTreeSet, HashMap},
    fmt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::{Duration, Instant},
};

use hf_hub::{HFClient, HFClientSync, HFError, HFRepositorySync, repository::RepoType};
use serde_json::Value;

use crate::{
    error::{Error, Result},
    tokenizer,
};

mod cache;
mod config;
mod progress;

use cache::{Cache, Repository};
pub use config::HubConfig;
pub use progress::{Progress, progress_bar};
use progress::{Report, Reporter};

/// What is fetched where no revision is given.
const MAIN: &str = "main";

/// Downloads of one file that broke off before giving up.
const ATTEMPTS: usize = 3;

/// How long to wait for another process that fetches the same file.
const MAX_WAIT: Duration = Duration::from_secs(3600);

/// How long a connection may take to come about, and to say nothing.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const READ_TIMEOUT: Duration = Duration::from_secs(60);

const USER_AGENT: &str = concat!("attn-data/", env!("CARGO_PKG_VERSION"));

const SINGLE_WEIGHTS: &str = "model.safetensors";
const WEIGHTS_INDEX: &str = "model.safetensors.index.json";

/// What a repository holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RepoKind {
    /// Weights, a config, a tokenizer.
    Model,
    /// Rows.
    Dataset,
}

impl RepoKind {
    /// What stands before the id in the Hub's addresses.
    fn url_prefix(self) -> &'static str {
        match self {
            Self::Model => "",
            Self::Dataset => "datasets/",
        }
    }

    /// What begins the name of the cache's folder.
    fn folder_prefix(self) -> &'static str {
        match self {
            Self::Model => "models",
            Self::Dataset => "datasets",
        }
    }
}

impl fmt::Display for RepoKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Model => "model",
            Self::Dataset => "data set",
        })
    }
}

/// A repository on a Hub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repo {
    /// Address of the Hub, without a slash at the end.
    pub endpoint: String,
    /// Model or data set.
    pub kind: RepoKind,
    /// `owner/name`, or the bare name of one of the Hub's first repositories.
    pub id: String,
}

impl Repo {
    /// The page a browser shows.
    pub fn page(&self) -> String {
        format!("{}/{}{}", self.endpoint, self.kind.url_prefix(), self.id)
    }
}

impl fmt::Display for Repo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} `{}`", self.kind, self.id)
    }
}

/// The Hub and its cache on this machine.
pub struct Hub {
    config: HubConfig,
    cache: Cache,
    client: OnceLock<HFClientSync>,
    listings: Mutex<HashMap<(RepoKind, String, String), Arc<Listing>>>,
    report: Option<Report>,
}

/// What a revision holds.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Listing {
    commit: String,
    files: Vec<String>,
}

impl Hub {
    /// A Hub with these settings. Nothing is asked for yet.
    pub fn new(config: HubConfig) -> Self {
        let cache = Cache::new(config.cache.clone());
        let (client, listings) = (OnceLock::new(), Mutex::new(HashMap::new()));
        Self { config, cache, client, listings, report: None }
    }

    /// A Hub as the environment describes it; see [`HubConfig::from_env`].
    pub fn from_env() -> Self {
        Self::new(HubConfig::from_env())
    }

    /// Calls `report` as downloads advance, from the downloading thread. [`progress_bar`] makes one that draws.
    pub fn with_progress(self, report: impl Fn(&Progress) + Send + Sync + 'static) -> Self {
        Self { report: Some(Arc::new(report)), ..self }
    }

    /// The settings in use.
    pub fn config(&self) -> &HubConfig {
        &self.config
    }

    /// The path of one file in the cache, fetched first where it is not there.
    ///
    /// `revision` is a branch, a tag or a full commit id; `main` where absent.
    ///
    /// # Errors
    ///
    /// [`Error::RepoNotFound`], [`Error::RevisionNotFound`], [`Error::FileNotFound`], [`Error::Refused`],
    /// [`Error::NotCached`], [`Error::Unreachable`], [`Error::HashMismatch`], [`Error::Hub`], and [`Error::RepoId`]
    /// or [`Error::FileName`] for names that cannot be any.
    pub fn file(
        &self,
        kind: RepoKind,
        id: &str,
        file: &str,
        revision: Option<&str>,
    ) -> Result<PathBuf> {
        let at = self.locate(kind, id, revision)?;
        check_file_name(file)?;
        let commit = self.commit(&at)?;
        self.file_at(&at, &commit, file)
    }

    /// The files of a revision, as paths with `/` between, sorted. Offline: those that are cached.
    ///
    /// # Errors
    ///
    /// As for [`Hub::file`].
    pub fn list_files(
        &self,
        kind: RepoKind,
        id: &str,
        revision: Option<&str>,
    ) -> Result<Vec<String>> {
        let at = self.locate(kind, id, revision)?;
        Ok(self.listing(&at)?.files.clone())
    }

    /// The folder of a model in the cache: config, tokenizer and weights, fetched first where they are not there.
    ///
    /// Weights are `model.safetensors`, or all the files that `model.safetensors.index.json` names.
    ///
    /// # Errors
    ///
    /// As for [`Hub::file`], and [`Error::NoWeights`] where the repository has none in this format.
    pub fn model_folder(&self, id: &str, revision: Option<&str>) -> Result<PathBuf> {
        self.folder(id, revision, true)
    }

    /// As [`Hub::model_folder`] without the weights: enough for random weights of the real size, or to tokenize.
    ///
    /// # Errors
    ///
    /// As for [`Hub::file`].
    pub fn config_folder(&self, id: &str, revision: Option<&str>) -> Result<PathBuf> {
        self.folder(id, revision, false)
    }

    fn folder(&self, id: &str, revision: Option<&str>, weights: bool) -> Result<PathBuf> {
        let at = self.locate(RepoKind::Model, id, revision)?;
        let commit = self.commit(&at)?;
        let optional = ["generation_config.json"].into_iter().chain(tokenizer::FILES);
        self.file_at(&at, &commit, "config.json")?;
        for file in optional {
            if self.exists_at(&at, &commit, file)? {
                self.file_at(&at, &commit, file)?;
            }
        }
        if weights {
            self.weights(&at, &commit)?;
        }
        Ok(at.repository.snapshot(&commit))
    }

    fn weights(&self, at: &At, commit: &str) -> Result<()> {
        if self.exists_at(at, commit, SINGLE_WEIGHTS)? {
            self.file_at(at, commit, SINGLE_WEIGHTS)?;
            return Ok(());
        }
        if !self.exists_at(at, commit, WEIGHTS_INDEX)? {
            if self.config.offline {
                return Err(self.not_cached(at, SINGLE_WEIGHTS));
            }
            let other = self.listing(at)?.files.iter().find(|file| file.ends_with(".bin")).cloned();
            let hint = match other {
                Some(file) => format!(
                    "it has `{file}`; convert it with transformers: \
                     `AutoModel.from_pretrained(ID).save_pretrained(FOLDER)`, and give the folder"
                ),
                None => "for random weights of this size, ask for a random initialization".into(),
            };
            return Err(Error::NoWeights { id: at.repo.id.clone(), hint });
        }
        let index = self.file_at(at, commit, WEIGHTS_INDEX)?;
        for shard in shards(&index)? {
            check_file_name(&shard)?;
            self.file_at(at, commit, &shard)?;
        }
        Ok(())
    }

    /// Whether a revision has a file, without a request where the cache knows.
    fn exists_at(&self, at: &At, commit: &str, file: &str) -> Result<bool> {
        if let Some(known) = at.repository.knows(commit, file) {
            return Ok(known);
        }
        if self.config.offline {
            return Ok(false);
        }
        let exists = self.listing(at)?.files.iter().any(|other| other == file);
        if !exists {
            at.repository.mark_absent(commit, file);
        }
        Ok(exists)
    }

    fn file_at(&self, at: &At, commit: &str, file: &str) -> Result<PathBuf> {
        if let Some(path) = at.repository.cached(commit, file) {
            if !at.repository.is_checked(commit, file) {
                tracing::info!(
                    "checking `{file}` of {}: an earlier run was stopped before it could",
                    at.repo
                );
                self.check(at, commit, file)?;
            }
            // Fetched under another name of this commit: offline, the branch must lead here too.
            if !self.config.offline
                && !cache::is_commit(&at.revision)
                && let Err(error) = at.repository.write_ref(&at.revision, commit)
            {
                tracing::debug!("{error}; the cache may be read-only");
            }
            return Ok(path);
        }
        if self.config.offline {
            return Err(self.not_cached(at, file));
        }
        let known =
            self.listings.lock().unwrap_or_else(PoisonError::into_inner).get(&at.key()).cloned();
        if known.is_some_and(|listing| {
            listing.commit == commit && !listing.files.iter().any(|other| other == file)
        }) {
            return Err(at.no_such_file(file));
        }
        self.download(at, commit, file)
    }

    fn download(&self, at: &At, commit: &str, file: &str) -> Result<PathBuf> {
        let before = at.repository.blobs();
        at.repository.mark_unchecked(commit, file)?;
        let begun = Instant::now();
        let mut attempt = 1;
        let reporter = loop {
            let reporter = Arc::new(Reporter::new(file, self.report.clone()));
            let client = self.client(&at.repo)?;
            let (owner, name) = hf_hub::split_id(&at.repo.id);
            let fetched = match at.repo.kind {
                RepoKind::Model => fetch(&client.model(owner, name), commit, file, &reporter),
                RepoKind::Dataset => fetch(&client.dataset(owner, name), commit, file, &reporter),
            };
            match fetched {
                Ok(_) => break reporter,
                Err(HFError::CacheLockTimeout { .. }) if begun.elapsed() < MAX_WAIT => {
                    tracing::info!("another process is fetching `{file}` of {}; waiting", at.repo);
                    if at.repository.cached(commit, file).is_some() {
                        break reporter;
                    }
                }
                Err(HFError::Request { source, .. })
                    if attempt < ATTEMPTS
                        && (source.is_body() || source.is_decode() || source.is_timeout()) =>
                {
                    tracing::warn!(
                        "`{file}` of {} broke off; attempt {} of {ATTEMPTS}",
                        at.repo,
                        attempt + 1
                    );
                    attempt += 1;
                }
                Err(error) => {
                    at.repository.unmark(commit, file);
                    return Err(self.explain(at, file, error));
                }
            }
        };
        let path = at.repository.cached(commit, file).ok_or_else(|| self.not_cached(at, file))?;
        // Content that was there before has been checked, or was put there by a program that is trusted to.
        let is_new = at.repository.blob(commit, file).is_none_or(|blob| !before.contains(&blob));
        let is_doubtful = at.repository.others_unchecked(commit, file);
        if is_new {
            self.check_size(at, commit, file, reporter.announced())?;
        }
        if is_new || is_doubtful {
            self.check(at, commit, file)?;
        }
        at.repository.unmark(commit, file);
        if !cache::is_commit(&at.revision) {
            at.repository.write_ref(&at.revision, commit)?;
        }
        reporter.finish();
        Ok(path)
    }

    /// Compares a download with what the Hub announced, and deletes it where they differ.
    fn check(&self, at: &At, commit: &str, file: &str) -> Result<()> {
        match at.repository.verify(commit, file)? {
            cache::Verdict::Same => {}
            cache::Verdict::Unknown(tag) => {
                tracing::debug!("`{file}` of {}: `{tag}` is no hash to check", at.repo)
            }
            cache::Verdict::Differs { algorithm, expected, found } => {
                at.repository.delete(commit, file)?;
                at.repository.unmark(commit, file);
                return Err(Error::HashMismatch {
                    repo: at.boxed(),
                    file: file.into(),
                    algorithm,
                    expected,
                    found,
                });
            }
        }
        at.repository.unmark(commit, file);
        Ok(())
    }

    fn check_size(&self, at: &At, commit: &str, file: &str, announced: u64) -> Result<()> {
        let path = at.repository.path(commit, file);
        let size = path.metadata().map_err(Error::io("read", &path))?.len();
        if announced == 0 || announced == size {
            return Ok(());
        }
        at.repository.delete(commit, file)?;
        at.repository.unmark(commit, file);
        Err(Error::HashMismatch {
            repo: at.boxed(),
            file: file.into(),
            algorithm: "a size in bytes of",
            expected: announced.to_string(),
            found: size.to_string(),
        })
    }

    /// The commit a revision stands for.
    fn commit(&self, at: &At) -> Result<String> {
        if cache::is_commit(&at.revision) {
            return Ok(at.revision.to_ascii_lowercase());
        }
        Ok(self.listing(at)?.commit.clone())
    }

    fn listing(&self, at: &At) -> Result<Arc<Listing>> {
        let mut listings = self.listings.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(listing) = listings.get(&at.key()) {
            return Ok(Arc::clone(listing));
        }
        let listing =
            if self.config.offline { self.cached_listing(at)? } else { self.fetched_listing(at)? };
        let listing = Arc::new(listing);
        listings.insert(at.key(), Arc::clone(&listing));
        Ok(listing)
    }

    fn cached_listing(&self, at: &At) -> Result<Listing> {
        let commit = match cache::is_commit(&at.revision) {
            true => Some(at.revision.to_ascii_lowercase()),
            false => at.repository.read_ref(&at.revision)?,
        };
        let files =
            commit.as_ref().map(|commit| at.repository.files(commit)).transpose()?.flatten();
        match (commit, files) {
            (Some(commit), Some(files)) => Ok(Listing { commit, files }),
            _ => Err(self.not_cached(at, "its list of files")),
        }
    }

    fn fetched_listing(&self, at: &At) -> Result<Listing> {
        let client = self.client(&at.repo)?;
        let (owner, name) = hf_hub::split_id(&at.repo.id);
        // Only what is used is asked for: the full description is large and changes its shape now and then.
        let expand = vec!["sha".to_string(), "siblings".to_string()];
        let revision = at.revision.clone();
        let info = match at.repo.kind {
            RepoKind::Model => {
                let info =
                    client.model(owner, name).info().revision(revision).expand(expand).send();
                info.map(|info| (info.sha, info.siblings))
            }
            RepoKind::Dataset => {
                let info =
                    client.dataset(owner, name).info().revision(revision).expand(expand).send();
                info.map(|info| (info.sha, info.siblings))
            }
        };
        match info {
            Ok((Some(commit), Some(siblings))) => {
                let mut files: Vec<String> =
                    siblings.into_iter().map(|file| file.rfilename).collect();
                files.sort();
                Ok(Listing { commit, files })
            }
            Ok(_) => Err(Error::Hub {
                repo: at.boxed(),
                file: "its list of files".into(),
                source: "the answer names no commit or no files".into(),
            }),
            Err(error) if is_outage(&error) => match self.cached_listing(at) {
                Ok(listing) => {
                    tracing::warn!(
                        "cannot reach {}; using {} as cached at commit {}",
                        at.repo.endpoint,
                        at.repo,
                        listing.commit
                    );
                    Ok(listing)
                }
                Err(_) => Err(self.explain(at, "its list of files", error)),
            },
            Err(error) => Err(self.explain(at, "its list of files", error)),
        }
    }

    fn client(&self, repo: &Repo) -> Result<&HFClientSync> {
        if let Some(client) = self.client.get() {
            return Ok(client);
        }
        // Without a token the client looks for one in the environment, which is not what these settings say. A line
        // break cannot be sent in a header: with it the client finds a token and sends none.
        let token = self.config.token.clone().unwrap_or_else(|| "\n".into());
        // The client waits for ever where packets vanish. Its first question for a branch goes through this one.
        let http = reqwest::Client::builder()
            .user_agent(USER_AGENT)
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(READ_TIMEOUT)
            .build();
        let client = http.map_err(HFError::from).and_then(|http| {
            HFClient::builder()
                .client(http)
                .user_agent(USER_AGENT)
                .endpoint(&repo.endpoint)
                .cache_dir(&self.config.cache)
                .token(token)
                .retry_max_attempts(2)
                .build_sync()
        });
        let client = client.map_err(|source| Error::Hub {
            repo: Box::new(repo.clone()),
            file: "anything".into(),
            source: source.into(),
        })?;
        Ok(self.client.get_or_init(|| client))
    }

    fn locate(&self, kind: RepoKind, id: &str, revision: Option<&str>) -> Result<At> {
        check_id(id)?;
        let revision = revision.unwrap_or(MAIN).to_string();
        check_file_name(&revision)?;
        let repo = Repo { endpoint: self.config.endpoint.clone(), kind, id: id.into() };
        Ok(At { repository: self.cache.repository(kind.folder_prefix(), id), repo, revision })
    }

    fn not_cached(&self, at: &At, file: &str) -> Error {
        let (repo, revision, cache) = (at.boxed(), at.revision.clone(), self.config.cache.clone());
        if self.config.offline {
            return Error::NotCached { repo, file: file.into(), revision, cache };
        }
        let source = "the download ended without a file in the cache".into();
        Error::Hub { repo, file: file.into(), source }
    }

    /// Tells apart what the client's errors leave to their texts and headers.
    fn explain(&self, at: &At, file: &str, error: HFError) -> Error {
        let (repo, file) = (at.boxed(), file.to_string());
        let refused = |status| Error::Refused {
            repo: at.boxed(),
            status,
            token_sent: self.config.token.is_some(),
        };
        match error {
            HFError::AuthRequired { context } => match context.error_code.as_deref() {
                // So the Hub answers who is not logged in, rather than say whether a private repository exists.
                Some("RepoNotFound") => Error::RepoNotFound { repo },
                _ => refused(401),
            },
            HFError::Forbidden { .. } => refused(403),
            HFError::RepoNotFound { .. } => Error::RepoNotFound { repo },
            HFError::RevisionNotFound { context, .. } => {
                let code = context.and_then(|context| context.error_code);
                match code.as_deref() {
                    Some("RepoNotFound") => Error::RepoNotFound { repo },
                    None if at.revision == MAIN => Error::RepoNotFound { repo },
                    _ => Error::RevisionNotFound { repo, revision: at.revision.clone() },
                }
            }
            HFError::EntryNotFound { .. } => at.no_such_file(&file),
            HFError::LocalEntryNotFound { .. } => self.not_cached(at, &file),
            error if is_outage(&error) => Error::Unreachable { repo, file, source: error.into() },
            error => Error::Hub { repo, file, source: error.into() },
        }
    }
}

impl fmt::Debug for Hub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hub").field("config", &self.config).finish_non_exhaustive()
    }
}

/// One revision of one repository, and its place in the cache.
struct At {
    repo: Repo,
    repository: Repository,
    revision: String,
}

impl At {
    fn key(&self) -> (RepoKind, String, String) {
        (self.repo.kind, self.repo.id.clone(), self.revision.clone())
    }

    fn boxed(&self) -> Box<Repo> {
        Box::new(self.repo.clone())
    }

    fn no_such_file(&self, file: &str) -> Error {
        Error::FileNotFound {
            repo: self.boxed(),
            file: file.into(),
            revision: self.revision.clone(),
        }
    }
}

fn fetch<T: RepoType>(
    repo: &HFRepositorySync<T>,
    commit: &str,
    file: &str,
    reporter: &Arc<Reporter>,
) -> Result<PathBuf, HFError> {
    repo.download_file().filename(file).revision(commit).progress(Arc::clone(reporter)).send()
}

/// Whether the Hub could not be asked, as opposed to what it answered.
fn is_outage(error: &HFError) -> bool {
    match error {
        HFError::Request { source, .. } => !source.is_decode() && !source.is_builder(),
        HFError::Http { context } => context.status.is_server_error(),
        _ => false,
    }
}

/// Finds a model: a folder on disk, or else a repository on the Hub, weights included.
///
/// # Errors
///
/// [`Error::NoSuchFolder`] for what can only be a path and does not exist; otherwise as [`Hub::model_folder`].
pub fn resolve_model(hub: &Hub, name: &str, revision: Option<&str>) -> Result<PathBuf> {
    match local_folder(name)? {
        Some(folder) => Ok(folder),
        None => hub.model_folder(name, revision),
    }
}

/// As [`resolve_model`] for who needs no weights.
///
/// # Errors
///
/// [`Error::NoSuchFolder`] for what can only be a path and does not exist; otherwise as [`Hub::config_folder`].
pub fn resolve_config(hub: &Hub, name: &str, revision: Option<&str>) -> Result<PathBuf> {
    match local_folder(name)? {
        Some(folder) => Ok(folder),
        None => hub.config_folder(name, revision),
    }
}

fn local_folder(name: &str) -> Result<Option<PathBuf>> {
    let path = Path::new(name);
    if path.is_dir() {
        Ok(Some(path.into()))
    } else if looks_like_path(name) || path.exists() {
        Err(Error::NoSuchFolder { path: name.into() })
    } else {
        Ok(None)
    }
}

/// Whether a name can only be meant as a path.
pub(crate) fn looks_like_path(name: &str) -> bool {
    let starts = ["/", "./", "../", "~"];
    starts.iter().any(|start| name.starts_with(start))
        || [".", ".."].contains(&name)
        || name.contains('\\')
        || name.ends_with('/')
        || name.matches('/').count() > 1
}

/// Refuses what is no `owner/name`, before it becomes part of an address or of a path in the cache.
fn check_id(id: &str) -> Result<()> {
    let valid = |part: &str| {
        let chars = part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
        chars
            && !part.is_empty()
            && part.len() <= 96
            && !part.starts_with(['.', '-'])
            && !part.contains("..")
    };
    match id.split('/').count() <= 2 && id.split('/').all(valid) && !id.contains("--") {
        true => Ok(()),
        false => Err(Error::RepoId { id: id.into() }),
    }
}

/// Refuses a name that leads out of its folder.
fn check_file_name(name: &str) -> Result<()> {
    let valid = |part: &str| !["", ".", ".."].contains(&part);
    match name.split('/').all(valid) && !name.contains(['\\', '\0', ':']) {
        true => Ok(()),
        false => Err(Error::FileName { name: name.into() }),
    }
}

/// The files that an index of weights names.
fn shards(index: &Path) -> Result<BTreeSet<String>> {
    const EXPECTED: &str = "an index of weights: `{\"weight_map\": {TENSOR: FILE, …}}`";
    let refused = |source| Error::Json { path: index.into(), expected: EXPECTED, source };
    let text = std::fs::read_to_string(index).map_err(Error::io("read", index))?;
    let index: Value = serde_json::from_str(&text).map_err(|error| refused(error.into()))?;
    let map = index["weight_map"]
        .as_object()
        .ok_or_else(|| refused("`weight_map` is not an object".into()))?;
    let name = |(tensor, file): (&String, &Value)| {
        let name =
            file.as_str().ok_or_else(|| refused(format!("`{tensor}` names no file").into()))?;
        Ok(name.to_string())
    };
    map.iter().map(name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_and_names_that_lead_elsewhere_are_refused() {
        for id in ["gpt2", "openai-community/gpt2", "meta-llama/Llama-3.2-1B-Instruct"] {
            assert!(check_id(id).is_ok(), "{id}");
        }
        for id in ["", "/", "a/", "../x", "a/..", "a/b/c", "a b", "a--b", "a/.git", "https://x"] {
            assert!(matches!(check_id(id), Err(Error::RepoId { .. })), "{id}");
        }
        for name in ["config.json", "data/train-00000-of-00001.parquet"] {
            assert!(check_file_name(name).is_ok(), "{name}");
        }
        for name in ["", "../x", "a/../../x", "/etc/passwd", "a//b", "a\\b", "C:x"] {
            assert!(matches!(check_file_name(name), Err(Error::FileName { .. })), "{name}");
        }
    }

    #[test]
    fn a_folder_wins_and_a_missing_path_says_so() {
        let hub = Hub::new(HubConfig { offline: true, ..HubConfig::default() });
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().to_str().unwrap();

        assert_eq!(resolve_model(&hub, path, None).unwrap(), folder.path());
        for missing in [format!("{path}/none"), "./none".into(), "a/b/c".into(), "~/none".into()] {
            assert!(
                matches!(resolve_model(&hub, &missing, None), Err(Error::NoSuchFolder { .. })),
                "{missing}"
            );
        }
    }
}
