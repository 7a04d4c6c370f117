//! The cache on disk, in the layout that the Python library made common:
//!
//! ```text
//! models--OWNER--NAME/refs/main                    a commit id
//! models--OWNER--NAME/blobs/ETAG                   content
//! models--OWNER--NAME/snapshots/COMMIT/FILE   ->   ../../blobs/ETAG
//! models--OWNER--NAME/.no_exist/COMMIT/FILE        an empty file: the commit has no such file
//! .locks/models--OWNER--NAME/COMMIT--FILE.unchecked     ours: the download has not been verified yet
//! ```

use std::{
    collections::HashSet,
    fs::{self, File},
    io::{self, Read, Write},
    path::{Path, PathBuf},
};

use sha1::Sha1;
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

pub(super) struct Cache {
    root: PathBuf,
}

impl Cache {
    pub(super) fn new(root: PathBuf) -> Self {
        Self { root }
    }

    pub(super) fn repository(&self, prefix: &str, id: &str) -> Repository {
        let name = format!("{prefix}--{}", id.replace('/', "--"));
        Repository { marks: self.root.join(".locks").join(&name), root: self.root.join(name) }
    }
}

/// The part of the cache that belongs to one repository.
pub(super) struct Repository {
    root: PathBuf,
    marks: PathBuf,
}

/// What a check of a download found.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Same,
    /// The entity tag is no hash of a kind we know.
    Unknown(String),
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
        let write = || {
            fs::create_dir_all(folder)?;
            let mut file = tempfile::NamedTempFile::new_in(folder)?;
            file.write_all(commit.as_bytes())?;
            file.persist(&path).map_err(|error| error.error)
        };
        write().map(|_| ()).map_err(Error::io("write", &path))
    }

    /// Names of all contents.
    pub(super) fn blobs(&self) -> HashSet<PathBuf> {
        let entries = fs::read_dir(self.root.join("blobs")).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect()
    }

    /// The content behind a file, where the file is a link to it.
    pub(super) fn blob(&self, commit: &str, file: &str) -> Option<PathBuf> {
        let target = fs::read_link(self.path(commit, file)).ok()?;
        Some(self.root.join("blobs").join(target.file_name()?))
    }

    /// Compares a file's content with the hash it is named by.
    pub(super) fn verify(&self, commit: &str, file: &str) -> Result<Verdict> {
        let Some(blob) = self.blob(commit, file) else {
            return Ok(Verdict::Unknown("a file that is no link".into()));
        };
        let tag = blob.file_name().expect("made from a name").to_string_lossy().to_lowercase();
        let is_hex = tag.bytes().all(|byte| byte.is_ascii_hexdigit());
        let (algorithm, found) = match tag.len() {
            64 if is_hex => ("sha256", digest(Sha256::new(), &blob)?),
            40 if is_hex => {
                let size = blob.metadata().map_err(Error::io("read", &blob))?.len();
                ("git blob sha1", digest(Sha1::new_with_prefix(format!("blob {size}\0")), &blob)?)
            }
            _ => return Ok(Verdict::Unknown(tag)),
        };
        Ok(if found == tag {
            Verdict::Same
        } else {
            Verdict::Differs { algorithm, expected: tag, found }
        })
    }

    pub(super) fn delete(&self, commit: &str, file: &str) -> Result<()> {
        for path in self.blob(commit, file).into_iter().chain([self.path(commit, file)]) {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(Error::io("delete", &path)(error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn mark(&self, commit: &str, file: &str) -> PathBuf {
        self.marks.join(format!("{commit}--{}.unchecked", file.replace('/', "--")))
    }

    pub(super) fn is_checked(&self, commit: &str, file: &str) -> bool {
        !self.mark(commit, file).exists()
    }

    /// Whether a download other than this one waits for its check: its content may be the one this file shares.
    pub(super) fn others_unchecked(&self, commit: &str, file: &str) -> bool {
        let own = self.mark(commit, file);
        let mut entries =
            fs::read_dir(&self.marks).into_iter().flatten().flatten().map(|entry| entry.path());
        entries.any(|path| path.extension().is_some_and(|end| end == "unchecked") && path != own)
    }

    pub(super) fn mark_unchecked(&self, commit: &str, file: &str) -> Result<()> {
        let path = self.mark(commit, file);
        let write = || {
            fs::create_dir_all(&self.marks)?;
            fs::write(&path, b"")
        };
        write().map_err(Error::io("write", &path))
    }

    pub(super) fn unmark(&self, commit: &str, file: &str) {
        let path = self.mark(commit, file);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::debug!("cannot delete `{}`: {error}", path.display());
            }
            _ => {}
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
