//! What the test files of this folder share.

use std::io::Write;

/// Says that a test checked nothing, and why. Written past the test runner, which keeps what passing tests print.
pub(crate) fn skipped(test: &str, why: &str) {
    let line = format!("\nSKIPPED {test}: {why}\n");
    std::io::stderr().write_all(line.as_bytes()).expect("standard error takes a line");
}
