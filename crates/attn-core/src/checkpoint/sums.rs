//! Checksums of the files in a folder, beside them.

use std::{
    fs::{self, File},
    io::{self, Read},
    path::Path,
};

use attn_files::{Error, is_plain};
use sha2::{Digest, Sha256};

use crate::digest::hexadecimal;

/// `HASH  FILE` a line, as `sha256sum` writes and checks them.
pub const SUMS_FILE: &str = "SHA256SUMS";

/// The lines for the files at the top of `folder`, by name.
pub(super) fn of(folder: &Path) -> Result<String, Error> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).map_err(Error::io("read", folder))? {
        let entry = entry.map_err(Error::io("read", folder))?;
        if entry.file_type().map_err(Error::io("read", entry.path()))?.is_file() {
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    names.sort();
    let line = |name: &String| Ok(format!("{}  {name}\n", sum(&folder.join(name))?));
    names.iter().map(line).collect()
}

/// Compares the files in `folder` with their checksums. False where it has none.
///
/// # Errors
///
/// [`Error::Damaged`] for a file with another checksum, or a line that is none; [`Error::Io`] for a file that is not there.
pub fn check_sums(folder: &Path) -> Result<bool, Error> {
    let path = folder.join(SUMS_FILE);
    let text = match fs::read_to_string(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        text => text.map_err(Error::io("read", &path))?,
    };
    for line in text.lines() {
        let (expected, name) = match line.split_once("  ") {
            Some((sum, name)) if is_plain(name) => (sum, name),
            _ => {
                let found = format!("the line `{line}`");
                return Err(Error::Damaged { path, expected: "checksums and names".into(), found });
            }
        };
        let path = folder.join(name);
        let found = sum(&path)?;
        if found != expected {
            let expected = format!("SHA-256 {expected}");
            return Err(Error::Damaged { path, expected, found });
        }
    }
    Ok(true)
}

fn sum(path: &Path) -> Result<String, Error> {
    let read = || -> io::Result<String> {
        let mut file = File::open(path)?;
        let (mut hash, mut buffer) = (Sha256::new(), vec![0; 1 << 20]);
        loop {
            match file.read(&mut buffer)? {
                0 => return Ok(hexadecimal(hash)),
                n => hash.update(&buffer[..n]),
            }
        }
    };
    read().map_err(Error::io("read", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_other_byte_is_found_and_a_name_outside_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!check_sums(dir.path()).unwrap(), "there are none");
        fs::write(dir.path().join("a"), b"abc").unwrap();
        fs::write(dir.path().join("b"), b"").unwrap();
        let sums = of(dir.path()).unwrap();
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert!(sums.starts_with(&format!("{abc}  a\n")), "{sums}");
        fs::write(dir.path().join(SUMS_FILE), &sums).unwrap();
        assert!(check_sums(dir.path()).unwrap());

        fs::write(dir.path().join("a"), b"abd").unwrap();
        let text = check_sums(dir.path()).unwrap_err().to_string();
        assert!(text.contains("/a` is damaged") && text.contains(abc), "{text}");
        fs::remove_file(dir.path().join("a")).unwrap();
        assert!(matches!(check_sums(dir.path()), Err(Error::Io { .. })));
        for line in ["x  ../a", "x", "x  /etc/passwd"] {
            fs::write(dir.path().join(SUMS_FILE), line).unwrap();
            assert!(matches!(check_sums(dir.path()), Err(Error::Damaged { .. })), "{line}");
        }
    }
}
