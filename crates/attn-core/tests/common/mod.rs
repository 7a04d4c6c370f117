//! What the test files of this folder share.

use std::{io::Write, process::Command};

/// Says that a test checked nothing, and why. Written past the test runner, which keeps what passing tests print.
pub(crate) fn skipped(test: &str, why: &str) {
    let line = format!("\nSKIPPED {test}: {why}\n");
    std::io::stderr().write_all(line.as_bytes()).expect("standard error takes a line");
}

/// The Python that `ATTN_TEST_PYTHON` names, if it has `modules`; else says that `test` is skipped.
#[allow(dead_code, reason = "not every test file compares with Python")]
pub(crate) fn python(test: &str, modules: &str) -> Option<String> {
    let found = std::env::var("ATTN_TEST_PYTHON").ok().filter(|python| {
        let ran = Command::new(python).args(["-c", &format!("import {modules}")]).output();
        ran.is_ok_and(|ran| ran.status.success())
    });
    if found.is_none() {
        skipped(test, &format!("ATTN_TEST_PYTHON names no Python with {modules}"));
    }
    found
}
