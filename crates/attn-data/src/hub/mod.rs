//! Files of the Hugging Face Hub, by repository id.
//!
//! Files stand in the cache that the Python libraries use, so that nothing is fetched twice. `hf-hub` asks what a
//! repository holds; contents are fetched here, for what that crate leaves out:
//!
//! - **Offline mode.** `HF_HUB_OFFLINE=1` answers from the cache alone. No socket is opened.
//! - **Resuming.** A download that breaks off goes on where it stopped, at once or in a later run, and waits as long
//!   as the server asks it to. Of those who want one content at a time, one fetches it.
//! - **Hashes.** The Hub's entity tag is the content's SHA-256 or its git blob id. A download takes its name in the
//!   cache once it matches; one that does not match is deleted and reported.
//! - **One revision.** A branch is resolved to a commit once, and every file is fetched at that commit: a repository
//!   that changes meanwhile cannot mix two versions. A pinned commit that is cached needs no request.
//! - **Messages.** What is missing, refused, not cached or out of reach is told apart, with a way out.

use std::{
    collections::{BTreeSet, HashMap},
    fmt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, OnceLock, PoisonError},
    thread,
    time::{Duration, Instant},
};

use hf_hub::{HFClient, HFClientSync, HFError};
use reqwest::{StatusCode, Url, redirect::Policy};
use serde_json::Value;

use crate::{
    error::{Error, Result},
    tokenizer,
};

mod cache;
mod config;
mod content;
mod progress;

use cache::{Cache, Repository};
pub use config::HubConfig;
use content::{Description, Failure, Requests};
pub use progress::{Progress, progress_bar};
use progress::{Report, Reporter};

/// What is fetched where no revision is given.
const MAIN: &str = "main";

/// How long to wait for another process that fetches the same content, and how often to look.
const MAX_WAIT: Duration = Duration::from_secs(3600);
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// The first pause after a request that failed; the next ones double.
const PAUSE: Duration = Duration::from_secs(1);

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
    requests: OnceLock<Requests>,
    pause: Duration,
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
        let (client, requests) = (OnceLock::new(), OnceLock::new());
        let listings = Mutex::new(HashMap::new());
        Self { config, cache, client, requests, pause: PAUSE, listings, report: None }
    }

    /// A Hub as the environment describes it; see [`HubConfig::from_env`].
    pub fn from_env() -> Self {
        Self::new(HubConfig::from_env())
    }

    /// Calls `report` as downloads advance, from the downloading thread. [`progress_bar`] makes one that draws.
    pub fn with_progress(self, report: impl Fn(&Progress) + Send + Sync + 'static) -> Self {
        Self { report: Some(Arc::new(report)), ..self }
    }

    /// Waits this long after the first request that fails, twice as long after the next, and so on; 1 s otherwise.
    pub fn with_pause(self, pause: Duration) -> Self {
        Self { pause, ..self }
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
        let url = self.url(at, commit, file)?;
        let description = self.requests(at)?.describe(&url);
        let description = description.map_err(|failure| {
            let error = self.explain_failure(at, file, failure);
            if matches!(error, Error::FileNotFound { .. }) {
                at.repository.mark_absent(commit, file);
            }
            error
        })?;
        let report = self.report.as_ref();
        let reporter = Reporter { file, total: description.size.unwrap_or(0), report };
        let blob = at.repository.blob(&description.tag);
        if !blob.is_file() {
            let _lock = self.lock(at, file, &description.tag)?;
            // Another process may have fetched it meanwhile.
            if !blob.is_file() {
                self.fetch(at, file, &url, &description, &reporter)?;
            }
        }
        at.repository.link(commit, file, &description.tag)?;
        if !cache::is_commit(&at.revision) {
            at.repository.write_ref(&at.revision, commit)?;
        }
        let path = at.repository.path(commit, file);
        let size = path.metadata().map_err(Error::io("read", &path))?.len();
        reporter.send(size, true);
        Ok(path)
    }

    /// Fetches a content, or the rest of it, and checks it before it gets its name.
    fn fetch(
        &self,
        at: &At,
        file: &str,
        url: &Url,
        description: &Description,
        reporter: &Reporter<'_>,
    ) -> Result<()> {
        let tag = &description.tag;
        let part = at.repository.part(tag);
        let folder = part.parent().expect("a file in a folder");
        std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        let damaged = |algorithm, expected, found| {
            at.repository.delete_part(tag)?;
            let (repo, file) = (at.boxed(), file.into());
            Err(Error::HashMismatch { repo, file, algorithm, expected, found })
        };
        let report = |n_bytes| reporter.send(n_bytes, false);
        match self.requests(at)?.fetch(url, description, &part, &report) {
            Ok(()) => {}
            Err(Failure::Size { expected, found }) => {
                let found =
                    if found > expected { format!("at least {found}") } else { found.to_string() };
                return damaged("a size in bytes of", expected.to_string(), found);
            }
            // Whether there is such a file and who may read it, its description has answered.
            Err(Failure::Status { status, .. }) if status.is_client_error() => {
                let source = format!("HTTP {status} in place of the content").into();
                return Err(Error::Hub { repo: at.boxed(), file: file.into(), source });
            }
            Err(failure) => return Err(self.explain_failure(at, file, failure)),
        }
        match at.repository.verify(tag)? {
            cache::Verdict::Same => {}
            cache::Verdict::Unknown => {
                tracing::warn!(
                    "`{file}` of {} is taken as it came: the server names no hash of it (`{tag}`)",
                    at.repo
                )
            }
            cache::Verdict::Differs { algorithm, expected, found } => {
                return damaged(algorithm, expected, found);
            }
        }
        at.repository.finish(tag)
    }

    /// Waits until nobody else fetches the content.
    fn lock(&self, at: &At, file: &str, tag: &str) -> Result<std::fs::File> {
        let begun = Instant::now();
        let mut told = false;
        let lock = at.repository.lock(tag, || {
            if !told {
                tracing::info!("another process is fetching `{file}` of {}; waiting", at.repo);
                told = true;
            }
            (begun.elapsed() < MAX_WAIT).then_some(LOOK_EVERY)
        })?;
        lock.ok_or_else(|| Error::Hub {
            repo: at.boxed(),
            file: file.into(),
            source: format!("another process has been fetching it for {} s", MAX_WAIT.as_secs())
                .into(),
        })
    }

    /// The address of a file at a commit.
    fn url(&self, at: &At, commit: &str, file: &str) -> Result<Url> {
        let Repo { endpoint, kind, id } = &at.repo;
        let address = format!("{endpoint}/{}{id}/resolve/{commit}", kind.url_prefix());
        let refused = |source| Error::Hub { repo: at.boxed(), file: file.into(), source };
        let mut url = Url::parse(&address).map_err(|error| refused(error.into()))?;
        match url.path_segments_mut() {
            Ok(mut segments) => segments.extend(file.split('/')),
            Err(()) => {
                return Err(refused(format!("`{endpoint}` is no address of a server").into()));
            }
        };
        Ok(url)
    }

    fn requests(&self, at: &At) -> Result<&Requests> {
        if let Some(requests) = self.requests.get() {
            return Ok(requests);
        }
        let requests = Requests::new(self.config.token.as_deref(), self.pause);
        let requests = requests.map_err(|source| Error::Hub {
            repo: at.boxed(),
            file: "anything".into(),
            source,
        })?;
        Ok(self.requests.get_or_init(|| requests))
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
        let ask = || {
            let (revision, expand) = (at.revision.clone(), expand.clone());
            match at.repo.kind {
                RepoKind::Model => {
                    let model = client.model(owner, name);
                    let info = model.info().revision(revision).expand(expand).send();
                    info.map(|info| (info.sha, info.siblings))
                }
                RepoKind::Dataset => {
                    let dataset = client.dataset(owner, name);
                    let info = dataset.info().revision(revision).expand(expand).send();
                    info.map(|info| (info.sha, info.siblings))
                }
            }
        };
        let mut info = ask();
        // The client asks again by itself, but not when the Hub says to.
        for _ in 1..content::DESCRIPTIONS {
            let Err(HFError::RateLimited { retry_after: Some(after), .. }) = &info else { break };
            if *after > content::MAX_RETRY_AFTER {
                break;
            }
            tracing::warn!("{} asks to wait for {} s", at.repo.endpoint, after.as_secs());
            thread::sleep(*after);
            info = ask();
        }
        match info {
            // It becomes a folder's name.
            Ok((Some(commit), Some(_))) if !cache::is_commit(&commit) => Err(Error::Hub {
                repo: at.boxed(),
                file: "its list of files".into(),
                source: format!("`{commit}` is no commit: expected 40 hexadecimal digits").into(),
            }),
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
        let refused =
            |source| Error::Hub { repo: Box::new(repo.clone()), file: "anything".into(), source };
        // The client's own waits for ever where packets vanish.
        let http = content::http(Policy::default()).map_err(refused)?;
        let client = HFClient::builder()
            .client(http)
            .user_agent(content::USER_AGENT)
            .endpoint(&repo.endpoint)
            .cache_dir(&self.config.cache)
            .token(token)
            .retry_max_attempts(2)
            .build_sync()
            .map_err(|error| refused(error.into()))?;
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
        Error::NotCached { repo, file: file.into(), revision, cache }
    }

    fn refused(&self, at: &At, status: u16) -> Error {
        Error::Refused { repo: at.boxed(), status, token_sent: self.config.token.is_some() }
    }

    /// Tells apart why no file came.
    fn explain_failure(&self, at: &At, file: &str, failure: Failure) -> Error {
        let (repo, file) = (at.boxed(), file.to_string());
        match failure {
            Failure::Disk(error) => error,
            Failure::Connection(source) => Error::Unreachable { repo, file, source },
            Failure::Status { status, ref code, .. } => match (status, code.as_deref()) {
                // So the Hub answers who is not logged in, rather than say whether a private repository exists.
                (StatusCode::UNAUTHORIZED | StatusCode::NOT_FOUND, Some("RepoNotFound")) => {
                    Error::RepoNotFound { repo }
                }
                (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN, _) => {
                    self.refused(at, status.as_u16())
                }
                (StatusCode::NOT_FOUND, Some("RevisionNotFound")) => {
                    Error::RevisionNotFound { repo, revision: at.revision.clone() }
                }
                (StatusCode::NOT_FOUND, _) => at.no_such_file(&file),
                _ if status.is_server_error() => {
                    Error::Unreachable { repo, file, source: failure.into() }
                }
                _ => Error::Hub { repo, file, source: failure.into() },
            },
            failure => Error::Hub { repo, file, source: failure.into() },
        }
    }

    /// Tells apart what the client's errors leave to their texts and headers.
    fn explain(&self, at: &At, file: &str, error: HFError) -> Error {
        let (repo, file) = (at.boxed(), file.to_string());
        let refused = |status| self.refused(at, status);
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
