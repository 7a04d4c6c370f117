//! Files and folders that appear whole or not at all.

use std::{
    ffi::OsStr,
    fs::{self, DirBuilder, File, Permissions, TryLockError},
    io::{self, ErrorKind},
    os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{AtFlags, CWD, FallocateFlags, RenameFlags, StatxAttributes, StatxFlags},
    io::Errno,
};
use tempfile::{Builder, NamedTempFile, TempDir};

use crate::{Error, is_plain};

/// What the system's mask is taken from, as for any file and folder that a program makes.
const FILE_MODE: u32 = 0o666;
const FOLDER_MODE: u32 = 0o777;

/// Part of every temporary name.
const TEMP: &str = ".attn-tmp-";

/// Writes a file beside `path` with `write`, then puts it in the place of `path` in one step.
///
/// # Errors
///
/// If `path` is no file, `write` fails, or the system refuses. `path` is then as it was.
pub fn write_file(
    path: &Path,
    write: impl FnOnce(&File) -> Result<(), Error>,
) -> Result<(), Error> {
    // Through a link, so that the link stays one.
    let target = match fs::metadata(path) {
        Ok(metadata) if !metadata.is_file() => {
            return Err(Error::FileType { path: path.into(), expected: "file" });
        }
        Ok(_) => path.canonicalize().map_err(Error::io("open", path))?,
        Err(_) => path.to_owned(),
    };
    let parent = parent_of(&target);
    fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
    remove_abandoned(&target);
    let make = || -> Result<NamedTempFile, Error> {
        Builder::new()
            .prefix(&temp_prefix(&target))
            .permissions(Permissions::from_mode(FILE_MODE))
            .tempfile_in(parent)
            .map_err(Error::io("create a file in", parent))
    };
    let mut file = make()?;
    while !is_ours(file.as_file(), file.path()) {
        file = make()?;
    }
    write(file.as_file())?;
    file.as_file().sync_all().map_err(Error::io("write", path))?;
    file.persist(&target).map_err(|e| Error::io("replace", path)(e.error))?;
    sync_folder(parent)
}

/// A folder in the making, hidden beside the one it will replace. Dropped, it disappears; what a kill leaves, the next writer of the
/// same folder removes.
#[derive(Debug)]
pub struct Staging {
    folder: TempDir,
    /// Held as long as the folder is being written, so that others can tell it from one left by a kill.
    lock: File,
    target: PathBuf,
    /// Whether there is a folder to replace.
    replaces: bool,
}

/// Where a folder that is written as `dir` will stand, and whether one is there that it replaces.
///
/// # Errors
///
/// If `dir` is a file, a place where a file system is mounted, or a folder that the working directory lies in.
pub fn target_of(dir: &Path) -> Result<(PathBuf, bool), Error> {
    let (target, replaces) = match fs::metadata(dir) {
        Ok(metadata) if !metadata.is_dir() => {
            return Err(Error::FileType { path: dir.into(), expected: "folder" });
        }
        // Through links, so that a link stays one.
        Ok(_) => (dir.canonicalize().map_err(Error::io("open", dir))?, true),
        Err(e) if e.kind() == ErrorKind::NotFound && dir.symlink_metadata().is_err() => {
            (std::path::absolute(dir).map_err(Error::io("create", dir))?, false)
        }
        Err(e) => return Err(Error::io("open", dir)(e)),
    };
    // The process would be left in the folder that is removed.
    if replaces && std::env::current_dir().is_ok_and(|cwd| cwd.starts_with(&target)) {
        return Err(Error::WorkingFolder { dir: dir.into() });
    }
    // Now, rather than when all is written.
    if replaces && is_mount_point(&target) {
        return Err(Error::MountPoint { dir: dir.into() });
    }
    if target.file_name().is_none() {
        return Err(Error::io("replace", dir)(ErrorKind::InvalidInput.into()));
    }
    Ok((target, replaces))
}

impl Staging {
    /// Begins to write `dir`, which may exist. Missing folders above it are made.
    ///
    /// # Errors
    ///
    /// As [`target_of`], and if the folder above it cannot be written to.
    pub fn new(dir: &Path) -> Result<Self, Error> {
        let (target, replaces) = target_of(dir)?;
        let parent = parent_of(&target);
        fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
        remove_abandoned(&target);
        loop {
            let folder = Builder::new()
                .prefix(&temp_prefix(&target))
                .permissions(Permissions::from_mode(FOLDER_MODE))
                .tempdir_in(parent)
                .map_err(Error::io("create a folder in", parent))?;
            match File::open(folder.path()) {
                Ok(lock) if is_ours(&lock, folder.path()) => {
                    return Ok(Self { folder, lock, target, replaces });
                }
                Err(e) if e.kind() != ErrorKind::NotFound => {
                    return Err(Error::io("open", folder.path())(e));
                }
                // Another writer has taken it for abandoned, and removes it.
                _ => {}
            }
        }
    }

    /// A place inside of it for a folder that others write: see [`Self::commit_inner`].
    pub fn inner(&self) -> PathBuf {
        self.folder.path().join("new")
    }

    /// Puts [`Self::inner`] in the folder's place; what the old one holds is gone.
    ///
    /// # Errors
    ///
    /// If nothing was written, or the system refuses; what was there is then as it was.
    pub fn commit_inner(self) -> Result<(), Error> {
        let (inner, target) = (self.inner(), &self.target);
        sync_tree(&inner)?;
        if self.replaces {
            let mode = fs::metadata(target).map_err(Error::io("open", target))?.permissions();
            fs::set_permissions(&inner, mode).map_err(Error::io("write", target))?;
            exchange(&inner, target)?;
        } else {
            fs::rename(&inner, target).map_err(Error::io("create", target))?;
        }
        sync_folder(parent_of(target))?;
        drop(self.lock);
        let left = self.folder.path().to_owned();
        if let Err(e) = self.folder.close() {
            tracing::warn!("cannot remove `{}`, which has been replaced: {e}", left.display());
        }
        Ok(())
    }

    /// Where it is written.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Where `file` will stand, for messages.
    pub fn shown(&self, file: &str) -> PathBuf {
        self.target.join(file)
    }

    /// Whether `file` was written.
    pub fn contains(&self, file: &str) -> bool {
        self.folder.path().join(file).symlink_metadata().is_ok()
    }

    /// Writes `file`.
    ///
    /// # Errors
    ///
    /// If `file` is not a plain relative path, is there already, `write` fails, or the system refuses.
    pub fn write(
        &self,
        file: &str,
        write: impl FnOnce(&File) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let refuse = |reason| Err(Error::FileName { file: file.to_owned(), reason });
        if !is_plain(file) {
            return refuse("expected a relative path inside the folder");
        }
        if self.contains(file) {
            return refuse("it has been written already");
        }
        let path = self.folder.path().join(file);
        let parent = parent_of(&path);
        fs::create_dir_all(parent).map_err(Error::io("create", self.shown(file)))?;
        let opened = File::create_new(&path).map_err(Error::io("create", self.shown(file)))?;
        write(&opened)?;
        opened.sync_all().map_err(Error::io("write", self.shown(file)))
    }

    /// Puts the folder in its place, with what the old one holds and this does not, but for the files at the top that
    /// are `stale`.
    ///
    /// # Errors
    ///
    /// If the old folder cannot be read, is a mount point or holds one, or the system refuses; it is then as it was.
    pub fn commit(self, stale: impl Fn(&OsStr) -> bool) -> Result<(), Error> {
        let Self { folder, lock, target, replaces } = self;
        if replaces {
            take_over(&target, folder.path(), &stale)?;
        }
        sync_tree(folder.path())?;
        if replaces {
            let mode = fs::metadata(&target).map_err(Error::io("open", &target))?.permissions();
            fs::set_permissions(folder.path(), mode).map_err(Error::io("write", &target))?;
            exchange(folder.path(), &target)?;
        } else {
            fs::rename(folder.path(), &target).map_err(Error::io("create", &target))?;
        }
        sync_folder(parent_of(&target))?;
        drop(lock);
        if replaces {
            // The folder's old contents now lie under the temporary name.
            let left = folder.path().to_owned();
            if let Err(e) = folder.close() {
                tracing::warn!("cannot remove `{}`, which has been replaced: {e}", left.display());
            }
        } else {
            let _gone = folder.keep();
        }
        Ok(())
    }
}

/// Reserves `len` bytes for `file`, so that a full disk shows at once.
///
/// # Errors
///
/// If there is no room, or the file would be larger than files may be.
pub fn reserve(file: &File, len: u64) -> io::Result<()> {
    match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, len) {
        Err(e @ (Errno::NOSPC | Errno::DQUOT | Errno::FBIG | Errno::IO)) => Err(e.into()),
        // Not every file system can reserve; there, writing finds out.
        _ => Ok(()),
    }
}

fn is_mount_point(folder: &Path) -> bool {
    rustix::fs::statx(CWD, folder, AtFlags::empty(), StatxFlags::BASIC_STATS)
        .is_ok_and(|stat| stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}

/// Swaps two folders in one step.
fn exchange(new: &Path, target: &Path) -> Result<(), Error> {
    match rustix::fs::renameat_with(CWD, new, CWD, target, RenameFlags::EXCHANGE) {
        Ok(()) => Ok(()),
        Err(Errno::BUSY | Errno::XDEV) => Err(Error::MountPoint { dir: target.into() }),
        // Not every file system can (NFS, some FUSE ones).
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => exchange_by_renames(new, target),
        Err(e) => Err(Error::io("replace", target)(e.into())),
    }
}

/// Swaps two folders in three steps. A kill after the first leaves the old folder whole beside `target`, under a name
/// that nothing removes.
fn exchange_by_renames(new: &Path, target: &Path) -> Result<(), Error> {
    let name = target.file_name().unwrap_or_default().to_string_lossy();
    let old = target.with_file_name(format!(".{name}.attn-old-{}", std::process::id()));
    fs::rename(target, &old).map_err(Error::io("replace", target))?;
    if let Err(e) = fs::rename(new, target) {
        fs::rename(&old, target).map_err(Error::io("restore", target))?;
        return Err(Error::io("replace", target)(e));
    }
    fs::rename(&old, new).map_err(Error::io("remove", old))
}

/// Links, or else copies, what is in `old` and not in `new`.
fn take_over(old: &Path, new: &Path, stale: &dyn Fn(&OsStr) -> bool) -> Result<(), Error> {
    for entry in fs::read_dir(old).map_err(Error::io("read", old))? {
        let entry = entry.map_err(Error::io("read", old))?;
        let (from, to) = (entry.path(), new.join(entry.file_name()));
        let metadata = entry.metadata().map_err(Error::io("read", &from))?;
        if metadata.is_dir() {
            // What is mounted here cannot move along, and must not be emptied with the old folder.
            if is_mount_point(&from) {
                return Err(Error::MountPoint { dir: from });
            }
            match DirBuilder::new().mode(0o700).create(&to) {
                Err(e) if e.kind() == ErrorKind::AlreadyExists && to.is_dir() => {}
                result => result.map_err(Error::io("keep", &from))?,
            }
            take_over(&from, &to, &|_| false)?;
            fs::set_permissions(&to, metadata.permissions()).map_err(Error::io("keep", &from))?;
        } else if !stale(&entry.file_name()) && to.symlink_metadata().is_err() {
            // Some file systems have no links, and some systems refuse links to other people's files.
            fs::hard_link(&from, &to)
                .or_else(|_| copy(&from, &to))
                .map_err(Error::io("keep", &from))?;
        }
    }
    Ok(())
}

fn copy(from: &Path, to: &Path) -> io::Result<()> {
    let kind = from.symlink_metadata()?.file_type();
    if kind.is_symlink() {
        std::os::unix::fs::symlink(fs::read_link(from)?, to)
    } else if kind.is_file() {
        fs::copy(from, to)?;
        File::open(to)?.sync_all()
    } else {
        Err(io::Error::other("neither a file nor a folder nor a link"))
    }
}

/// Locks what was just made under `path`, so that others can tell it from what a kill left. False where another writer was
/// quicker and removes it.
fn is_ours(opened: &File, path: &Path) -> bool {
    let place = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    match opened.try_lock() {
        Ok(()) => opened
            .metadata()
            .is_ok_and(|own| path.metadata().is_ok_and(|it| place(own) == place(it))),
        Err(TryLockError::WouldBlock) => false,
        // Some network file systems have no such locks; what a kill leaves there is then left to the user.
        Err(TryLockError::Error(_)) => true,
    }
}

/// Removes what killed writers of the file or folder `target` left beside it: what bears our name and nobody holds. What cannot be
/// removed is warned of.
pub fn remove_abandoned(target: &Path) {
    let prefix = temp_prefix(target);
    let Ok(entries) = fs::read_dir(parent_of(target)) else { return };
    for entry in entries.flatten() {
        let has_prefix = entry.file_name().to_str().is_some_and(|name| name.starts_with(&prefix));
        let Ok(metadata) = entry.metadata() else { continue };
        if !has_prefix || metadata.is_symlink() {
            continue;
        }
        let path = entry.path();
        // Held while it is removed: who has only just made it sees that, and makes another.
        let Ok(held) = File::open(&path) else { continue };
        if held.try_lock().is_err() {
            continue;
        }
        let removed =
            if metadata.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        match removed {
            Ok(()) => tracing::info!("removed `{}`, left by a run that was killed", path.display()),
            // It was not left: its writer has given it its name since.
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) => {
                tracing::warn!("cannot remove `{}`, left by a killed run: {e}", path.display())
            }
        }
    }
}

/// How the temporary names beside `target` begin.
fn temp_prefix(target: &Path) -> String {
    format!(".{}{TEMP}", target.file_name().unwrap_or_default().to_string_lossy())
}

fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Makes the names in `folder` and in the folders below it survive a power cut.
fn sync_tree(folder: &Path) -> Result<(), Error> {
    for entry in fs::read_dir(folder).map_err(Error::io("read", folder))? {
        let entry = entry.map_err(Error::io("read", folder))?;
        if entry.file_type().map_err(Error::io("read", entry.path()))?.is_dir() {
            sync_tree(&entry.path())?;
        }
    }
    sync_folder(folder)
}

fn sync_folder(folder: &Path) -> Result<(), Error> {
    match File::open(folder).and_then(|opened| opened.sync_all()) {
        // Some file systems keep names safe in their own way and refuse to be asked.
        Err(e) if matches!(e.kind(), ErrorKind::InvalidInput | ErrorKind::Unsupported) => Ok(()),
        result => result.map_err(Error::io("write", folder)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_swap_without_help_of_the_file_system() {
        let dir = tempfile::tempdir().unwrap();
        // The new one may have any name.
        fs::create_dir(dir.path().join(".a.attn-tmp-1")).unwrap();
        let (new, target) = (dir.path().join(".a.attn-tmp-1/new"), dir.path().join("a"));
        for (folder, content) in [(&new, "new"), (&target, "old")] {
            fs::create_dir(folder).unwrap();
            fs::write(folder.join("file"), content).unwrap();
        }

        exchange_by_renames(&new, &target).unwrap();

        let read = |folder: &Path| fs::read_to_string(folder.join("file")).unwrap();
        assert_eq!((read(&target).as_str(), read(&new).as_str()), ("new", "old"));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn what_a_kill_left_is_removed_and_what_lives_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("model");
        let make = |name: &str| {
            let path = dir.path().join(name);
            fs::create_dir(&path).unwrap();
            fs::write(path.join("file"), "x").unwrap();
            (path.clone(), File::open(&path).unwrap())
        };
        let (abandoned, handle) = make(".model.attn-tmp-dead");
        // The clock was set back since.
        let later = std::time::SystemTime::now() + std::time::Duration::from_secs(86_400);
        handle.set_modified(later).unwrap();
        drop(handle);
        let (held, lock) = make(".model.attn-tmp-held");
        assert!(is_ours(&lock, &held));
        let (foreign, _) = make(".model2.attn-tmp-dead");
        let file = dir.path().join(".model.attn-tmp-file");
        fs::write(&file, "half").unwrap();

        remove_abandoned(&target);

        let there = [&abandoned, &held, &foreign, &file].map(|path| path.exists());
        assert_eq!(there, [false, true, true, false]);
    }

    #[test]
    fn what_another_writer_removes_is_not_filled() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(".model.attn-tmp-new");
        let opened = File::create(&path).unwrap();
        let other = File::open(&path).unwrap();
        other.try_lock().unwrap();
        assert!(!is_ours(&opened, &path), "it is about to be removed");

        fs::remove_file(&path).unwrap();
        drop(other);
        assert!(!is_ours(&opened, &path), "it is gone");
    }

    #[test]
    fn writers_of_one_target_do_not_remove_each_others_drafts() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("file");
        std::thread::scope(|scope| {
            for writer in 0..8_u8 {
                let target = &target;
                scope.spawn(move || {
                    for _ in 0..50 {
                        write_file(target, |mut file| {
                            io::Write::write_all(&mut file, &[writer; 999])
                                .map_err(Error::io("write", target))
                        })
                        .unwrap();
                    }
                });
            }
        });
        let found = fs::read(&target).unwrap();
        assert_eq!(found, [found[0]; 999]);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left");
    }
}
