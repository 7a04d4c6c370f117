//! The cache on disk, in the layout that the Python library made common:
//!
//! ```text
//! models--OWNER--NAME/refs/main                    a commit id
//! models--OWNER--NAME/blobs/ETAG                   content
//! models--OWNER--NAME/blobs/ETAG.incomplete        a part of it, not checked
//! models--OWNER--NAME/snapshots/COMMIT/FILE   ->   ../../blobs/ETAG
//! models--OWNER--NAME/.no_exist/COMMIT/FILE        an empty file: the commit has no such file
//! .locks/models--OWNER--NAME/ETAG.lock             locked by who fetches it
//! .locks/models--OWNER--NAME/new-ref, new-link     a ref or link before it has its name, locked by `names.lock`
//! ```
//!
//! What a kill leaves is gone on with (`.incomplete`) or written over (`new-…`) by the next one: it does not grow.

use std::{
    fs::{self, File, TryLockError},
    io::{self, Read},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use sha1::Sha1;
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

/// The lock of who gives a ref or a link its name, and how long to wait for it.
const NAMES: &str = "names";
const SOON: Duration = Duration::from_millis(1);

pub(super) struct Cache {
    root: PathBuf,
}

impl Cache {
    pub(super) fn new(root: PathBuf) -> Self {
        Self { root }
    }

    pub(super) fn repository(&self, prefix: &str, id: &str) -> Repository {
        let name = format!("{prefix}--{}", id.replace('/', "--"));
        Repository { locks: self.root.join(".locks").join(&name), root: self.root.join(name) }
    }
}

/// The part of the cache that belongs to one repository.
pub(super) struct Repository {
    root: PathBuf,
    locks: PathBuf,
}

/// What a check of a download found.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Same,
    /// The entity tag is no hash of a kind we know.
    Unknown,
    Differs {
        algorithm: &'static str,
        expected: String,
        found: String,
    },
}

impl Repository {
    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.root.join("snapshots").join(commit)
    }

    pub(super) fn path(&self, commit: &str, file: &str) -> PathBuf {
        self.snapshot(commit).join(file)
    }

    /// The file, where it is there; a link to nothing is not.
    pub(super) fn cached(&self, commit: &str, file: &str) -> Option<PathBuf> {
        Some(self.path(commit, file)).filter(|path| path.is_file())
    }

    /// Whether the commit has the file, as far as the cache can tell.
    pub(super) fn knows(&self, commit: &str, file: &str) -> Option<bool> {
        match self.cached(commit, file) {
            Some(_) => Some(true),
            None => self.absent(commit, file).exists().then_some(false),
        }
    }

    fn absent(&self, commit: &str, file: &str) -> PathBuf {
        self.root.join(".no_exist").join(commit).join(file)
    }

    /// Remembers that a commit has no such file. It only saves a request, so that a failure is no matter.
    pub(super) fn mark_absent(&self, commit: &str, file: &str) {
        let path = self.absent(commit, file);
        let written =
            path.parent().map_or(Ok(()), fs::create_dir_all).and_then(|()| fs::write(&path, b""));
        if let Err(error) = written {
            tracing::debug!("cannot write `{}`: {error}", path.display());
        }
    }

    /// Files of a commit, sorted; nothing where the commit is not there.
    pub(super) fn files(&self, commit: &str) -> Result<Option<Vec<String>>> {
        fn visit(folder: &Path, prefix: &str, out: &mut Vec<String>) -> io::Result<()> {
            for entry in fs::read_dir(folder)? {
                let entry = entry?;
                let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
                let path = entry.path();
                if entry.file_type()?.is_dir() {
                    visit(&path, &format!("{name}/"), out)?;
                } else if path.is_file() {
                    out.push(name);
                }
            }
            Ok(())
        }
        let folder = self.snapshot(commit);
        if !folder.is_dir() {
            return Ok(None);
        }
        let mut files = Vec::new();
        visit(&folder, "", &mut files).map_err(Error::io("list", &folder))?;
        files.sort();
        Ok(Some(files))
    }

    pub(super) fn read_ref(&self, revision: &str) -> Result<Option<String>> {
        let path = self.root.join("refs").join(revision);
        match fs::read_to_string(&path) {
            Ok(commit) => Ok(Some(commit.trim().to_string()).filter(|commit| is_commit(commit))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io("read", &path)(error)),
        }
    }

    pub(super) fn write_ref(&self, revision: &str, commit: &str) -> Result<()> {
        if self.read_ref(revision)?.as_deref() == Some(commit) {
            return Ok(());
        }
        let path = self.root.join("refs").join(revision);
        let folder = path.parent().expect("a file in a folder");
        let _lock = self.lock(NAMES, || Some(SOON))?;
        let write = || {
            fs::create_dir_all(folder)?;
            let new = self.locks.join("new-ref");
            fs::write(&new, commit)?;
            fs::rename(new, &path)
        };
        write().map_err(Error::io("write", &path))
    }

    /// Where a content stands, and where a part of it does.
    pub(super) fn blob(&self, tag: &str) -> PathBuf {
        self.root.join("blobs").join(tag)
    }

    pub(super) fn part(&self, tag: &str) -> PathBuf {
        self.root.join("blobs").join(format!("{tag}.incomplete"))
    }

    /// Keeps others, other processes included, from fetching the same content until it is dropped.
    ///
    /// `wait` is called each time another has it, and says for how long to wait; nothing to give up waiting.
    pub(super) fn lock(
        &self,
        tag: &str,
        mut wait: impl FnMut() -> Option<Duration>,
    ) -> Result<Option<File>> {
        let path = self.locks.join(format!("{tag}.lock"));
        fs::create_dir_all(&self.locks).map_err(Error::io("create", &self.locks))?;
        let file = File::create(&path).map_err(Error::io("write", &path))?;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Some(file)),
                Err(TryLockError::Error(error)) => return Err(Error::io("lock", &path)(error)),
                Err(TryLockError::WouldBlock) => match wait() {
                    Some(pause) => thread::sleep(pause),
                    None => return Ok(None),
                },
            }
        }
    }

    /// Makes a part that has been checked the content.
    pub(super) fn finish(&self, tag: &str) -> Result<()> {
        let (part, blob) = (self.part(tag), self.blob(tag));
        fs::rename(&part, &blob).map_err(Error::io("write", &blob))
    }

    /// Makes a file of a commit lead to its content.
    pub(super) fn link(&self, commit: &str, file: &str, tag: &str) -> Result<()> {
        let path = self.path(commit, file);
        let folder = path.parent().expect("a file in a folder");
        let up = "../".repeat(file.matches('/').count() + 2);
        let _lock = self.lock(NAMES, || Some(SOON))?;
        let make = || {
            fs::create_dir_all(folder)?;
            // By way of another name, so that whoever looks finds the old link or the new one.
            let new = self.locks.join("new-link");
            match fs::remove_file(&new) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            std::os::unix::fs::symlink(format!("{up}blobs/{tag}"), &new)?;
            fs::rename(new, &path)
        };
        make().map_err(Error::io("write", &path))
    }

    /// Compares a part's content with the hash it is named by.
    pub(super) fn verify(&self, tag: &str) -> Result<Verdict> {
        let part = self.part(tag);
        let expected = tag.to_lowercase();
        let is_hex = expected.bytes().all(|byte| byte.is_ascii_hexdigit());
        let (algorithm, found) = match expected.len() {
            64 if is_hex => ("sha256", digest(Sha256::new(), &part)?),
            40 if is_hex => {
                let size = part.metadata().map_err(Error::io("read", &part))?.len();
                ("git blob sha1", digest(Sha1::new_with_prefix(format!("blob {size}\0")), &part)?)
            }
            _ => return Ok(Verdict::Unknown),
        };
        Ok(if found == expected {
            Verdict::Same
        } else {
            Verdict::Differs { algorithm, expected, found }
        })
    }

    pub(super) fn delete_part(&self, tag: &str) -> Result<()> {
        let part = self.part(tag);
        match fs::remove_file(&part) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Error::io("delete", &part)(error))
            }
            _ => Ok(()),
        }
    }
}

/// Whether a revision is a full commit id, which stands for one content for ever.
pub(super) fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn digest(mut hash: impl Digest, path: &Path) -> Result<String> {
    let mut read = || {
        let mut file = File::open(path)?;
        let mut buffer = vec![0; 1 << 20];
        loop {
            match file.read(&mut buffer)? {
                0 => return Ok(()),
                n => hash.update(&buffer[..n]),
            }
        }
    };
    read().map_err(Error::io("read", path))?;
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}
