//! Every input of the corpora again: no panic, and no more memory than the bytes are worth.

#![allow(clippy::print_stdout, reason = "what is said last is what broke")]

use std::{fs, path::Path};

use attn_fuzz::READERS;
use base64::prelude::{BASE64_STANDARD, Engine};
use peak_alloc::PeakAlloc;

#[global_allocator]
static HEAP: PeakAlloc = PeakAlloc;

/// Bytes that a reader may hold at a time, whatever it reads, and for each byte that it reads.
const ANY: usize = 64 << 20;
const PER_BYTE: usize = 2_000;

#[test]
fn whatever_the_corpora_hold_is_understood_or_refused() {
    // Some readers catch what other libraries panic at; with a backtrace, that would be the most that any of them takes.
    std::panic::set_hook(Box::new(|panic| println!("{panic}")));
    let of = |folder: &str, name: &str| {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder).join(name);
        fs::read_to_string(file.with_extension("base64"))
    };
    let mut n_mended = 0;
    for (name, read) in READERS {
        let corpus = of("corpus", name).unwrap_or_else(|error| panic!("{name}: {error}"));
        // Of most readers none.
        let mended = of("mended", name).unwrap_or_default();
        n_mended += mended.lines().count();
        let inputs: Vec<&str> = corpus.lines().chain(mended.lines()).collect();
        let mut most = 0;
        for (line, text) in (1..).zip(&inputs) {
            let data = BASE64_STANDARD.decode(text).unwrap();
            // Said first: an abort says nothing. Shown where the test fails.
            println!("{name}, line {line}: {} bytes", data.len());
            let before = HEAP.current_usage();
            HEAP.reset_peak_usage();
            read(&data);
            let taken = HEAP.peak_usage().saturating_sub(before);
            assert!(taken <= ANY + PER_BYTE * data.len(), "it took {taken} bytes");
            most = most.max(taken);
        }
        let n = inputs.len();
        assert!(n >= 3, "the corpus of `{name}` holds next to nothing");
        println!("{name}: {n} inputs, at most {} KiB", most >> 10);
    }
    assert!(n_mended > 0, "what once broke a reader is not there");
}
