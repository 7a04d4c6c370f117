//! A Hub that lives in this process: the part of the protocol that a download uses, over plain HTTP on a free port.

#![allow(dead_code, reason = "each test file uses its own part")]

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use attn_data::hub::{Hub, HubConfig};
use sha1::{Digest, Sha1};
use sha2::Sha256;

/// The commit that `main` stands for.
pub(crate) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// How the server misbehaves.
#[derive(Debug, Clone, Default)]
pub(crate) struct Faults {
    /// Answers to file requests, whatever the repository holds: status and `X-Error-Code`.
    pub(crate) refuse_files: Option<(u16, &'static str)>,
    /// Answers to a file's content alone; its description stays as it is.
    pub(crate) refuse_content: Option<u16>,
    /// Sends this many bytes of a file and hangs up, in as many requests as the second number says.
    pub(crate) cut: Option<(usize, usize)>,
    /// Answers to requests for a content or a description, so many of them: status and `Retry-After`.
    pub(crate) busy: Option<(u16, &'static str, usize)>,
    /// Sends whole contents, whatever `Range` asks for.
    pub(crate) no_ranges: bool,
    /// Sends the part that begins so many bytes after the one asked for.
    pub(crate) shifted: usize,
    /// The tag that the store of large files gives.
    pub(crate) store_tag: Option<&'static str>,
    /// Content sent instead of the file's own.
    pub(crate) replace: Option<Vec<u8>>,
    /// Stands in the description of a repository in the place of its commit.
    pub(crate) commit: Option<&'static str>,
    /// Answers every request for the description of a repository with this status.
    pub(crate) refuse_api: Option<u16>,
}

#[derive(Debug, Default)]
struct State {
    /// Path within the repository, by `PREFIX/OWNER/NAME/REVISION`.
    repos: BTreeMap<String, BTreeMap<String, Content>>,
    /// Old ids and what they are now.
    moved: BTreeMap<String, String>,
    faults: Faults,
    requests: Vec<Request>,
}

#[derive(Debug, Clone)]
struct Content {
    bytes: Vec<u8>,
    large: bool,
}

/// What a client asked for.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    /// `GET` or `HEAD`.
    pub(crate) method: String,
    /// Path and query.
    pub(crate) path: String,
    /// By lower-case name.
    pub(crate) headers: BTreeMap<String, String>,
}

/// The server; it stops answering when dropped.
pub(crate) struct Server {
    endpoint: String,
    state: Arc<Mutex<State>>,
    stopped: Arc<Mutex<bool>>,
}

impl Server {
    pub(crate) fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let (state, stopped) =
            (Arc::new(Mutex::new(State::default())), Arc::new(Mutex::new(false)));
        let server = Self {
            endpoint: endpoint.clone(),
            state: Arc::clone(&state),
            stopped: Arc::clone(&stopped),
        };
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if *stopped.lock().unwrap() {
                    return;
                }
                let (state, endpoint) = (Arc::clone(&state), endpoint.clone());
                thread::spawn(move || serve(stream, &state, &endpoint));
            }
        });
        server
    }

    pub(crate) fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Adds a file at `main`; `repo` is `OWNER/NAME`, with `datasets/` before it for a data set.
    pub(crate) fn put(&self, repo: &str, file: &str, bytes: impl AsRef<[u8]>) -> &Self {
        self.put_at(repo, "main", file, bytes, false)
    }

    /// Adds a file that is stored apart and named by its SHA-256, as weights and parquet files are.
    pub(crate) fn put_large(&self, repo: &str, file: &str, bytes: impl AsRef<[u8]>) -> &Self {
        self.put_at(repo, "main", file, bytes, true)
    }

    pub(crate) fn put_at(
        &self,
        repo: &str,
        revision: &str,
        file: &str,
        bytes: impl AsRef<[u8]>,
        large: bool,
    ) -> &Self {
        let content = Content { bytes: bytes.as_ref().to_vec(), large };
        let mut state = self.state.lock().unwrap();
        state.repos.entry(format!("{repo}/{revision}")).or_default().insert(file.into(), content);
        drop(state);
        self
    }

    pub(crate) fn move_repo(&self, from: &str, to: &str) {
        self.state.lock().unwrap().moved.insert(from.into(), to.into());
    }

    pub(crate) fn set(&self, faults: Faults) {
        self.state.lock().unwrap().faults = faults;
    }

    /// The requests since the last call.
    pub(crate) fn requests(&self) -> Vec<Request> {
        std::mem::take(&mut self.state.lock().unwrap().requests)
    }

    /// A Hub that asks this server and caches in `cache`.
    pub(crate) fn hub(&self, cache: &std::path::Path) -> Hub {
        Hub::new(self.config(cache)).with_pause(Duration::from_millis(1))
    }

    pub(crate) fn config(&self, cache: &std::path::Path) -> HubConfig {
        HubConfig {
            cache: cache.into(),
            endpoint: self.endpoint.clone(),
            offline: false,
            token: None,
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        *self.stopped.lock().unwrap() = true;
        // Wakes the listener, which then ends and frees the port: connections are refused from here on.
        let _ = TcpStream::connect(self.endpoint.trim_start_matches("http://"));
    }
}

struct Response {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    /// Bytes after which the connection ends, where it is cut.
    cut: Option<usize>,
}

impl Response {
    fn new(status: u16) -> Self {
        Self { status, headers: Vec::new(), body: Vec::new(), cut: None }
    }

    fn with(mut self, name: &str, value: impl ToString) -> Self {
        self.headers.push((name.into(), value.to_string()));
        self
    }

    fn error(status: u16, code: &str) -> Self {
        Self { body: b"an error page".to_vec(), ..Self::new(status).with("X-Error-Code", code) }
    }
}

fn serve(stream: TcpStream, state: &Mutex<State>, endpoint: &str) {
    let mut reader = BufReader::new(&stream);
    let mut line = String::new();
    if reader.read_line(&mut line).unwrap_or(0) == 0 {
        return;
    }
    let mut words = line.split_whitespace();
    let (method, path) = (
        words.next().unwrap_or_default().to_string(),
        words.next().unwrap_or_default().to_string(),
    );
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        match line.trim().split_once(": ") {
            Some((name, value)) => headers.insert(name.to_lowercase(), value.to_string()),
            None => break,
        };
    }
    let request = Request { method, path, headers };
    let response = {
        let mut state = state.lock().unwrap();
        state.requests.push(request.clone());
        answer(&mut state, &request, endpoint)
    };
    let mut head = format!("HTTP/1.1 {} X\r\nConnection: close\r\n", response.status);
    for (name, value) in &response.headers {
        head += &format!("{name}: {value}\r\n");
    }
    if !response.headers.iter().any(|(name, _)| name == "Content-Length") {
        head += &format!("Content-Length: {}\r\n", response.body.len());
    }
    head += "\r\n";
    let mut stream = &stream;
    let _ = stream.write_all(head.as_bytes());
    if request.method != "HEAD" {
        let end = response.cut.unwrap_or(response.body.len()).min(response.body.len());
        let _ = stream.write_all(&response.body[..end]);
    }
    let _ = stream.flush();
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let _ = std::io::copy(&mut stream.take(1 << 16), &mut std::io::sink());
}

fn answer(state: &mut State, request: &Request, endpoint: &str) -> Response {
    let path = request.path.split('?').next().unwrap_or_default();
    let path = path.replace("%2F", "\u{1}"); // a slash inside a revision is one segment
    for (from, to) in &state.moved {
        if path.contains(&format!("/{from}/")) {
            let to = path.replace(&format!("/{from}/"), &format!("/{to}/"));
            return Response::new(307).with("Location", to);
        }
    }
    if let Some(rest) = path.strip_prefix("/api/") {
        return describe(state, rest);
    }
    if let Some(key) = path.strip_prefix("/cdn/") {
        let tag = format!("\"{}\"", state.faults.store_tag.unwrap_or("store"));
        return content(state, &key.replace('\u{1}', "/"), &tag, request);
    }
    let Some((repo, rest)) = path[1..].split_once("/resolve/") else {
        return Response::error(404, "");
    };
    let Some((revision, file)) = rest.split_once('/') else { return Response::error(404, "") };
    if let Some((status, code)) = state.faults.refuse_files {
        return Response::error(status, code);
    }
    if let Some((status, after, n @ 1..)) = state.faults.busy {
        state.faults.busy = Some((status, after, n - 1));
        return Response::error(status, "").with("Retry-After", after);
    }
    let revision = revision.replace('\u{1}', "/");
    let commit = if revision.len() == 40 { revision.clone() } else { commit_of(&revision) };
    let Some((key, _)) = find(state, repo, &revision) else {
        return Response::error(404, "RevisionNotFound");
    };
    let Some(found) = state.repos[&key].get(file).cloned() else {
        return Response::error(404, "EntryNotFound").with("X-Repo-Commit", &commit);
    };
    if found.large {
        return Response::new(302)
            .with("Location", format!("{endpoint}/cdn/{key}!{file}"))
            .with("X-Repo-Commit", &commit)
            .with("X-Linked-Etag", format!("\"{}\"", hex(Sha256::digest(&found.bytes))))
            .with("X-Linked-Size", found.bytes.len());
    }
    let mut blob = Sha1::new_with_prefix(format!("blob {}\0", found.bytes.len()));
    blob.update(&found.bytes);
    let tag = format!("\"{}\"", hex(blob.finalize()));
    if request.method == "HEAD" {
        let head = Response::new(200).with("ETag", tag).with("X-Repo-Commit", &commit);
        return head.with("Content-Length", found.bytes.len());
    }
    content(state, &format!("{key}!{file}"), &tag, request)
}

fn content(state: &mut State, key: &str, tag: &str, request: &Request) -> Response {
    let Some((key, file)) = key.split_once('!') else { return Response::error(404, "") };
    if let Some(status) = state.faults.refuse_content {
        return Response::error(status, "");
    }
    let bytes = state.repos[key][file].bytes.clone();
    let bytes = state.faults.replace.clone().unwrap_or(bytes);
    let range = request.headers.get("range").and_then(|range| range.strip_prefix("bytes="));
    let is_same = request.headers.get("if-range").is_none_or(|asked| asked == tag);
    let begin = range.filter(|_| is_same && !state.faults.no_ranges);
    let mut response =
        match begin.map(|range| range.trim_end_matches('-').parse::<usize>().unwrap()) {
            Some(begin) if begin >= bytes.len() => Response::error(416, ""),
            Some(begin) => {
                let (begin, n) = (begin + state.faults.shifted, bytes.len());
                let range = format!("bytes {begin}-{}/{n}", n - 1);
                Response { body: bytes[begin..].to_vec(), ..Response::new(206) }
                    .with("Content-Range", range)
            }
            None => Response { body: bytes, ..Response::new(200) },
        };
    if let Some((n_bytes, n_requests @ 1..)) = state.faults.cut {
        state.faults.cut = Some((n_bytes, n_requests - 1));
        response.cut = Some(n_bytes);
    }
    response.with("ETag", tag)
}

fn describe(state: &State, rest: &str) -> Response {
    if let Some(status) = state.faults.refuse_api {
        return Response::error(status, "");
    }
    let Some((repo, revision)) = rest.split_once("/revision/") else {
        return Response::error(404, "RepoNotFound");
    };
    let repo = repo.strip_prefix("models/").unwrap_or(repo);
    let revision = revision.replace('\u{1}', "/");
    match find(state, repo, &revision) {
        Some((_, files)) => {
            let siblings: Vec<String> =
                files.iter().map(|file| format!("{{\"rfilename\":\"{file}\"}}")).collect();
            let commit = state.faults.commit.map_or_else(|| commit_of(&revision), Into::into);
            let body = format!(
                "{{\"id\":\"{repo}\",\"sha\":\"{commit}\",\"siblings\":[{}]}}",
                siblings.join(",")
            );
            Response {
                body: body.into_bytes(),
                ..Response::new(200).with("Content-Type", "application/json")
            }
        }
        None if state.repos.keys().any(|key| key.starts_with(&format!("{repo}/"))) => {
            Response::error(404, "RevisionNotFound")
        }
        None => Response::error(401, "RepoNotFound"),
    }
}

/// The key of a repository at a branch or at the commit a branch stands for, and its files.
fn find(state: &State, repo: &str, revision: &str) -> Option<(String, Vec<String>)> {
    let (key, files) = state.repos.iter().find(|(key, _)| {
        let branch = key.strip_prefix(&format!("{repo}/"));
        branch.is_some_and(|branch| branch == revision || commit_of(branch) == revision)
    })?;
    Some((key.clone(), files.keys().cloned().collect()))
}

/// The commit a branch stands for.
fn commit_of(branch: &str) -> String {
    if branch == "main" { COMMIT.into() } else { hex(Sha1::digest(branch)) }
}

pub(crate) fn hex(bytes: impl AsRef<[u8]>) -> String {
    bytes.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}
