//! A file's description and its content, over HTTP: what `hf-hub` 1.0 leaves out.
//!
//! That crate begins a broken download anew and takes an error page for content. Here a download goes on where it
//! stopped, in this process or a later one, and whatever ends it leaves a part that the next one can use.
//!
//! - **The part** is `blobs/ETAG.incomplete`, as `huggingface_hub` called it. The entity tag is a hash of the content:
//!   another content has another part.
//! - **`Range`** asks for the rest, **`If-Range`** for all of it where the content has changed. The tag that goes with
//!   it is the one its own server gave: a store of large files has tags of its own.
//! - **What is worth trying again** is a connection that breaks and 408, 429 and 5xx, after a pause that doubles, or
//!   the one that `Retry-After` asks for. What brings new bytes starts the count afresh.

use std::{
    fs::{File, OpenOptions},
    io::{Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use chrono::{DateTime, Utc};
use reqwest::{
    Client, Method, Response, StatusCode, Url,
    header::{
        ACCEPT_ENCODING, AUTHORIZATION, CONTENT_LENGTH, CONTENT_RANGE, ETAG, HeaderMap,
        HeaderValue, IF_RANGE, LOCATION, RANGE, RETRY_AFTER,
    },
    redirect::Policy,
};
use tokio::runtime::Runtime;

use crate::error::{Error, Source};

/// How long a connection may take to come about, and to say nothing.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const READ_TIMEOUT: Duration = Duration::from_secs(60);

pub(super) const USER_AGENT: &str = concat!("attn-data/", env!("CARGO_PKG_VERSION"));

/// Requests for a description, and requests in a row for content that bring nothing, before giving up.
pub(super) const DESCRIPTIONS: u32 = 3;
const ATTEMPTS: u32 = 6;

/// The longest pause of ours, and the longest that a server may ask for.
const MAX_PAUSE: Duration = Duration::from_secs(60);
pub(super) const MAX_RETRY_AFTER: Duration = Duration::from_secs(600);

/// Redirects within the Hub: a repository that moved, another spelling.
const MAX_REDIRECTS: usize = 10;

/// Asks for files.
pub(super) struct Requests {
    runtime: Runtime,
    client: Client,
    /// The same, but an answer that leads elsewhere is an answer.
    unled: Client,
    token: Option<HeaderValue>,
    pause: Duration,
}

/// What the Hub says of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Description {
    /// Names the content; fit to be a file name.
    pub(super) tag: String,
    /// Bytes, where the Hub says.
    pub(super) size: Option<u64>,
    /// The tag that the content comes with, where that is known before.
    if_range: Option<HeaderValue>,
}

/// Why no description or content came.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    /// The server refuses.
    #[error("HTTP {status}{}", after.map(|after| format!(", to be asked again after {} s", after.as_secs())).unwrap_or_default())]
    Status { status: StatusCode, code: Option<String>, after: Option<Duration> },
    /// No connection, or none that lasted.
    #[error("the connection failed")]
    Connection(#[source] Source),
    /// An answer that makes no sense.
    #[error("{0}")]
    Answer(String),
    /// More bytes than announced came, or fewer with nothing missing from the answer.
    #[error("{found} bytes came, expected {expected}")]
    Size { expected: u64, found: u64 },
    /// The disk refused.
    #[error(transparent)]
    Disk(Error),
}

/// A failure, and whether another request may do better.
struct Attempt {
    failure: Failure,
    again: bool,
}

impl Failure {
    fn for_good(self) -> Attempt {
        Attempt { failure: self, again: false }
    }

    fn for_now(self) -> Attempt {
        Attempt { failure: self, again: true }
    }
}

impl Requests {
    /// `pause` is the first after a failure.
    pub(super) fn new(token: Option<&str>, pause: Duration) -> Result<Self, Source> {
        let bearer = |token: &str| -> Result<HeaderValue, Source> {
            let mut value = HeaderValue::from_str(&format!("Bearer {token}"))?;
            value.set_sensitive(true);
            Ok(value)
        };
        let token = token.map(bearer).transpose()?;
        let (client, unled) = (http(Policy::default())?, http(Policy::none())?);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(Self { runtime, client, unled, token, pause })
    }

    /// Asks what `url` is, without its content.
    pub(super) fn describe(&self, url: &Url) -> Result<Description, Failure> {
        self.wait_for(async {
            let mut n_failed = 0;
            loop {
                let attempt = match self.describe_once(url.clone()).await {
                    Ok(description) => return Ok(description),
                    Err(attempt) => attempt,
                };
                n_failed += 1;
                self.rest(attempt, n_failed, DESCRIPTIONS).await?;
            }
        })
    }

    /// Writes the content of `url` to `path`, from where the part that is there ends.
    ///
    /// `report` is told how many bytes are there, first before anything is asked for.
    pub(super) fn fetch(
        &self,
        url: &Url,
        description: &Description,
        path: &Path,
        report: &(dyn Fn(u64) + Sync),
    ) -> Result<(), Failure> {
        let mut part = Part::open(path, description).map_err(Failure::Disk)?;
        self.wait_for(async {
            let (mut n_failed, mut most) = (0, part.n_bytes);
            report(part.n_bytes);
            while part.size != Some(part.n_bytes) {
                let Err(attempt) = self.fetch_once(url, &mut part, report).await else { break };
                // The most there has been, so that a server that never gets further is not asked for ever.
                n_failed = if part.n_bytes > most { 1 } else { n_failed + 1 };
                most = most.max(part.n_bytes);
                self.rest(attempt, n_failed, ATTEMPTS).await?;
            }
            part.file.sync_all().map_err(|error| Failure::Disk(Error::io("write", path)(error)))
        })
    }

    /// Runs on a thread of its own, as a thread that already runs such tasks may not wait for one.
    fn wait_for<T: Send>(&self, task: impl Future<Output = T> + Send) -> T {
        thread::scope(|scope| {
            let waiting = scope.spawn(move || self.runtime.block_on(task));
            waiting.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Waits before the next attempt, or says that there is none.
    async fn rest(&self, attempt: Attempt, n_failed: u32, most: u32) -> Result<(), Failure> {
        let Attempt { failure, again } = attempt;
        let after = match &failure {
            Failure::Status { after, .. } => *after,
            _ => None,
        };
        if !again || n_failed >= most || after.is_some_and(|after| after > MAX_RETRY_AFTER) {
            return Err(failure);
        }
        let own = self.pause.saturating_mul(1 << (n_failed - 1)).min(MAX_PAUSE);
        let pause = after.map_or(own, |after| after.max(own));
        tracing::warn!("{failure}; trying again in {:.1} s", pause.as_secs_f64());
        tokio::time::sleep(pause).await;
        Ok(())
    }

    async fn describe_once(&self, mut url: Url) -> Result<Description, Attempt> {
        for _ in 0..MAX_REDIRECTS {
            let response = self.send(&self.unled, Method::HEAD, &url, HeaderMap::new()).await?;
            let (status, headers) = (response.status(), response.headers());
            // Only a way within the Hub leads to the description: the way to the content comes with it.
            let to = header(headers, LOCATION.as_str()).filter(|to| {
                status.is_redirection() && !to.starts_with("//") && Url::parse(to).is_err()
            });
            if let Some(to) = to {
                let unreadable = |error| Failure::Answer(format!("`{to}` leads nowhere: {error}"));
                url = url.join(to).map_err(|error| unreadable(error).for_good())?;
            } else if status.is_success() || status.is_redirection() {
                return Description::read(status, headers).map_err(Failure::for_good);
            } else {
                return Err(refusal(&response));
            }
        }
        Err(Failure::Answer("too many redirects".into()).for_good())
    }

    async fn fetch_once(
        &self,
        url: &Url,
        part: &mut Part,
        report: &(dyn Fn(u64) + Sync),
    ) -> Result<(), Attempt> {
        let mut headers = HeaderMap::new();
        if part.n_bytes > 0 {
            let range = format!("bytes={}-", part.n_bytes);
            headers.insert(RANGE, HeaderValue::try_from(range).expect("digits"));
            headers.extend(part.if_range.clone().map(|tag| (IF_RANGE, tag)));
        }
        let mut response = self.send(&self.client, Method::GET, url, headers).await?;
        match response.status() {
            StatusCode::OK => part.restart()?,
            StatusCode::PARTIAL_CONTENT if part.is_continued_by(response.headers()) => {}
            StatusCode::PARTIAL_CONTENT | StatusCode::RANGE_NOT_SATISFIABLE => {
                let problem = format!("the server has no bytes from {} on", part.n_bytes);
                part.restart()?;
                return Err(Failure::Answer(problem).for_now());
            }
            _ => return Err(refusal(&response)),
        }
        part.if_range = strong(response.headers().get(ETAG));
        report(part.n_bytes);
        let broken = |error: reqwest::Error| Failure::Connection(error.into()).for_now();
        while let Some(bytes) = response.chunk().await.map_err(broken)? {
            part.write(&bytes)?;
            report(part.n_bytes);
        }
        match part.size {
            Some(expected) if part.n_bytes < expected => {
                Err(Failure::Size { expected, found: part.n_bytes }.for_now())
            }
            _ => Ok(()),
        }
    }

    async fn send(
        &self,
        client: &Client,
        method: Method,
        url: &Url,
        mut headers: HeaderMap,
    ) -> Result<Response, Attempt> {
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        headers.extend(self.token.clone().map(|token| (AUTHORIZATION, token)));
        client.request(method, url.clone()).headers(headers).send().await.map_err(|error| {
            let again = !error.is_builder() && !error.is_redirect();
            Attempt { failure: Failure::Connection(error.into()), again }
        })
    }
}

impl Description {
    fn read(status: StatusCode, headers: &HeaderMap) -> Result<Self, Failure> {
        let linked = header(headers, "x-linked-etag");
        let tag = linked.or_else(|| header(headers, ETAG.as_str()));
        let tag = tag.ok_or_else(|| Failure::Answer("the answer has no entity tag".into()))?;
        let name = tag.trim_start_matches("W/").trim_matches('"');
        // It becomes a file's name.
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if name.is_empty()
            || name.len() > 128
            || name.starts_with('.')
            || !name.chars().all(is_plain)
        {
            return Err(Failure::Answer(format!("`{name}` is no entity tag that can name a file")));
        }
        let length = || header(headers, CONTENT_LENGTH.as_str()).filter(|_| status.is_success());
        let size = header(headers, "x-linked-size").or_else(length);
        let own = headers.get(ETAG).filter(|_| linked.is_none() && status.is_success());
        Ok(Self {
            tag: name.into(),
            size: size.and_then(|size| size.parse().ok()),
            if_range: strong(own),
        })
    }
}

/// What there is of a file that is being fetched.
struct Part {
    file: File,
    path: PathBuf,
    n_bytes: u64,
    /// Bytes of the whole, where the Hub says.
    size: Option<u64>,
    /// The tag of the content it is a part of, as its server gave it.
    if_range: Option<HeaderValue>,
}

impl Part {
    fn open(path: &Path, description: &Description) -> Result<Self, Error> {
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(false).open(path);
        let file = file.map_err(Error::io("write", path))?;
        let n_bytes = file.metadata().map_err(Error::io("read", path))?.len();
        let Description { size, if_range, .. } = description.clone();
        let mut part = Self { file, path: path.into(), n_bytes, size, if_range };
        if size.is_some_and(|size| n_bytes > size) {
            part.truncate().map_err(Error::io("write", path))?;
        }
        Ok(part)
    }

    fn truncate(&mut self) -> std::io::Result<()> {
        self.file.set_len(0)?;
        self.n_bytes = 0;
        Ok(())
    }

    fn restart(&mut self) -> Result<(), Attempt> {
        let path = self.path.clone();
        self.truncate().map_err(|error| disk(&path, error))
    }

    /// Writes at a place of its own choice: where locks do not hold, as on some network file systems, two that fetch
    /// the same content write the same bytes to the same places.
    fn write(&mut self, bytes: &[u8]) -> Result<(), Attempt> {
        let n_bytes = self.n_bytes + bytes.len() as u64;
        if let Some(expected) = self.size.filter(|&size| n_bytes > size) {
            return Err(Failure::Size { expected, found: n_bytes }.for_good());
        }
        let written = self.file.seek(SeekFrom::Start(self.n_bytes));
        written
            .and_then(|_| self.file.write_all(bytes))
            .map_err(|error| disk(&self.path, error))?;
        self.n_bytes = n_bytes;
        Ok(())
    }

    /// Whether an answer begins where this ends, and means a content of the same size.
    fn is_continued_by(&self, headers: &HeaderMap) -> bool {
        let range = header(headers, CONTENT_RANGE.as_str());
        let Some((range, size)) = range
            .and_then(|range| range.strip_prefix("bytes "))
            .and_then(|rest| rest.split_once('/'))
        else {
            return false;
        };
        let begin = range.split('-').next().and_then(|begin| begin.parse().ok());
        begin == Some(self.n_bytes)
            && self.size.is_none_or(|own| size == "*" || size.parse() == Ok(own))
    }
}

fn disk(path: &Path, error: std::io::Error) -> Attempt {
    Failure::Disk(Error::io("write", path)(error)).for_good()
}

/// A client that gives up where packets vanish.
pub(super) fn http(redirects: Policy) -> Result<Client, Source> {
    let builder = Client::builder()
        .user_agent(USER_AGENT)
        .connect_timeout(CONNECT_TIMEOUT)
        .read_timeout(READ_TIMEOUT)
        .redirect(redirects);
    Ok(builder.build()?)
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok().map(str::trim)
}

/// A tag that stands for the very bytes: a weak one does not.
fn strong(tag: Option<&HeaderValue>) -> Option<HeaderValue> {
    tag.filter(|tag| tag.as_bytes().starts_with(b"\"")).cloned()
}

fn refusal(response: &Response) -> Attempt {
    let (status, headers) = (response.status(), response.headers());
    let again = status.is_server_error()
        || [StatusCode::REQUEST_TIMEOUT, StatusCode::TOO_MANY_REQUESTS].contains(&status);
    let code = header(headers, "x-error-code").map(str::to_owned);
    let after =
        header(headers, RETRY_AFTER.as_str()).and_then(|after| pause_until(after, Utc::now()));
    Attempt { failure: Failure::Status { status, code, after }, again }
}

/// What `Retry-After` says: seconds, or a date.
fn pause_until(after: &str, now: DateTime<Utc>) -> Option<Duration> {
    if let Ok(seconds) = after.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = DateTime::parse_from_rfc2822(after).ok()?;
    Some((date.to_utc() - now).to_std().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|&(name, value)| {
                (reqwest::header::HeaderName::from_static(name), value.parse().unwrap())
            })
            .collect()
    }

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let now = DateTime::parse_from_rfc2822("Wed, 21 Oct 2015 07:28:00 GMT").unwrap().to_utc();

        assert_eq!(pause_until("120", now), Some(Duration::from_secs(120)));
        let later = pause_until("Wed, 21 Oct 2015 07:29:30 GMT", now);
        assert_eq!(later, Some(Duration::from_secs(90)));
        assert_eq!(pause_until("Wed, 21 Oct 2015 07:00:00 GMT", now), Some(Duration::ZERO));
        assert_eq!(pause_until("soon", now), None);
    }

    #[test]
    fn a_tag_that_leads_out_of_the_folder_is_refused() {
        for tag in ["\"../../x\"", "\"\"", "\".hidden\"", "\"a/b\""] {
            let read = Description::read(StatusCode::OK, &headers(&[("etag", tag)]));
            assert!(matches!(read, Err(Failure::Answer(_))), "{tag}");
        }
    }

    #[test]
    fn the_linked_tag_names_the_content_and_is_not_sent_to_its_store() {
        let linked = [
            ("etag", "\"page\""),
            ("x-linked-etag", "\"abc\""),
            ("x-linked-size", "7"),
            ("content-length", "300"),
        ];
        let linked = Description::read(StatusCode::FOUND, &headers(&linked)).unwrap();
        let own = [("etag", "\"abc\""), ("content-length", "7")];
        let own = Description::read(StatusCode::OK, &headers(&own)).unwrap();
        let weak = Description::read(StatusCode::OK, &headers(&[("etag", "W/\"abc\"")])).unwrap();

        assert_eq!((linked.tag.as_str(), linked.size, linked.if_range), ("abc", Some(7), None));
        assert_eq!((own.tag.as_str(), own.size), ("abc", Some(7)));
        assert_eq!(own.if_range.unwrap(), "\"abc\"");
        assert_eq!((weak.tag.as_str(), weak.size, weak.if_range), ("abc", None, None));
    }
}
