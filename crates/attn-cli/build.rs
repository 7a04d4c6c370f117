//! Tells the program which sources it is built from.

#[path = "src/sources.rs"]
mod sources;

use std::{
    env, fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

fn main() {
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR").expect("set by cargo")).join("../..");
    let root = root.canonicalize().unwrap_or(root);
    let mut files = Vec::new();
    for entry in ["Cargo.lock", "Cargo.toml", "crates"] {
        find(&root, entry, &mut files);
    }
    for file in &files {
        println!("cargo:rerun-if-changed={}", root.join(file).display());
    }
    // Folders, where files may come and go.
    for name in fs::read_dir(root.join("crates")).into_iter().flatten().flatten() {
        for part in ["src", "cpp"].map(|part| name.path().join(part)) {
            if part.is_dir() {
                println!("cargo:rerun-if-changed={}", part.display());
            }
        }
    }
    // Empty without git: runs then name no commit.
    let digest = hashes(&root, &files)
        .map(|hashes| sources::digest(hashes.into_iter().zip(files.iter().cloned()).collect()));
    println!("cargo:rustc-env=ATTN_SOURCES={}", digest.unwrap_or_default());
}

fn find(root: &Path, path: &str, files: &mut Vec<String>) {
    let full = root.join(path);
    if full.is_dir() {
        for entry in fs::read_dir(&full).into_iter().flatten().flatten() {
            if let Some(name) = entry.file_name().to_str() {
                find(root, &format!("{path}/{name}"), files);
            }
        }
    } else if sources::is_source(path) && full.is_file() {
        files.push(path.to_owned());
    }
}

/// Git's hash of each file as it is now.
fn hashes(root: &Path, files: &[String]) -> Option<Vec<String>> {
    let mut git = Command::new("git")
        .current_dir(root)
        .args(["hash-object", "--stdin-paths"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .ok()?;
    git.stdin.take()?.write_all(files.join("\n").as_bytes()).ok()?;
    let output = git.wait_with_output().ok()?;
    let hashes: Vec<String> =
        String::from_utf8(output.stdout).ok()?.lines().map(str::to_owned).collect();
    (output.status.success() && hashes.len() == files.len()).then_some(hashes)
}
