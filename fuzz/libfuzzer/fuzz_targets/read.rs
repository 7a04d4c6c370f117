//! Feeds bytes to the reader that the variable ATTN_READER names.

#![no_main]

use std::sync::LazyLock;

use attn_fuzz::{READERS, Reader};
use libfuzzer_sys::fuzz_target;

static READER: LazyLock<Reader> = LazyLock::new(|| {
    // The fuzzer's own ends the program at once, and some readers catch what other libraries panic at. What nothing catches ends it all
    // the same.
    std::panic::set_hook(Box::new(|panic| eprintln!("{panic}")));
    let name = std::env::var("ATTN_READER").unwrap_or_default();
    let known: Vec<_> = READERS.iter().map(|it| it.0).collect();
    let found = READERS.iter().find(|it| it.0 == name);
    found.unwrap_or_else(|| panic!("ATTN_READER is `{name}`, expected one of {known:?}")).1
});

fuzz_target!(|data: &[u8]| READER(data));
