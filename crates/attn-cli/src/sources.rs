//! Which sources a program was built from: shared by the build script, which knows them, and the program, which finds
//! the commit that has them.

/// Whether the program depends on the file, as seen from the repository.
pub(crate) fn is_source(path: &str) -> bool {
    let parts: Vec<&str> = path.split('/').collect();
    matches!(
        parts[..],
        ["Cargo.lock" | "Cargo.toml"]
            | ["crates", _, "Cargo.toml" | "build.rs"]
            | ["crates", _, "src" | "cpp", ..]
    )
}

/// One number for all sources, given as `(git's hash, path)`: FNV-1a over them in the order of paths.
pub(crate) fn digest(mut files: Vec<(String, String)>) -> String {
    files.sort_by(|a, b| a.1.cmp(&b.1));
    let bytes = files.iter().flat_map(|(hash, path)| [hash.as_bytes(), path.as_bytes(), b"\n"]);
    let hash = bytes.flatten().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("{hash:016x}")
}
