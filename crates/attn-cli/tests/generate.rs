//! `attn generate`, as a user runs it.

mod common;

use std::{
    io::Write,
    path::Path,
    process::{Command, Stdio},
};

use attn_data::tokenizer::{Style, train_bpe};
use serde_json::json;

/// A folder of a small decoder with a tokenizer; its weights are made with `--init random`.
fn folder(dir: &Path) {
    let text = "once upon a time there was a small dog . it ran and ran and then it slept .";
    let tokenizer = train_bpe(&[text], 280, Style::ByteLevel, None).unwrap();
    tokenizer.save(dir).unwrap();
    let config = json!({
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": tokenizer.vocab_size(),
        "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.5,
        "eos_token_id": tokenizer.eos_id(),
    });
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
}

/// Runs it with `--init random`; standard output, standard error, and whether it succeeded.
fn run(dir: &Path, args: &[&str], stdin: &str) -> (String, String, bool) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_attn"))
        .args(["generate", "--device", "cpu", "--init", "random", "--model"])
        .arg(dir)
        .args(args)
        .env("OMP_NUM_THREADS", "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A program that refuses its arguments does not read.
    let _ = child.stdin.take().unwrap().write_all(stdin.as_bytes());
    let output = child.wait_with_output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (text(output.stdout), text(output.stderr), output.status.success())
}

#[test]
fn new_text_alone_goes_to_stdout() {
    let dir = tempfile::tempdir().unwrap();
    folder(dir.path());
    let (out, err, ok) = run(dir.path(), &["--max-new-tokens", "8", "once upon"], "");
    assert!(ok, "{err}");
    assert!(out.trim_end().len() > 2 && !out.contains("once upon"), "{out}");
    assert!(
        err.contains("8 tokens, ended by the number of tokens") && err.contains("tokens/s"),
        "{err}"
    );

    let (echoed, ..) = run(dir.path(), &["--max-new-tokens", "8", "--echo"], "once upon\n");
    assert_eq!(echoed, format!("once upon{out}"), "from stdin, greedy both times");

    let middle = out.trim_end().chars().nth(3).unwrap().to_string();
    let (cut, err, _) =
        run(dir.path(), &["--max-new-tokens", "8", "--stop", &middle, "once upon"], "");
    assert_eq!(cut.trim_end_matches('\n'), &out[..out.find(&middle).unwrap()]);
    assert!(err.contains("ended by a stop text"), "{err}");
}

/// Llama's tokenizers write a space as part of the token behind it, and strip the first one of a text.
#[test]
fn a_space_between_prompt_and_text_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    folder(dir.path());
    let words: Vec<String> = (0..40).map(|i| format!("▁w{i}")).collect();
    let vocab: serde_json::Map<String, serde_json::Value> =
        words.iter().enumerate().map(|(id, word)| (word.clone(), json!(id))).collect();
    let metaspace =
        json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": true});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": metaspace, "post_processor": null, "decoder": metaspace,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "▁w0"},
    });
    std::fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let config = json!({
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 40, "n_positions": 16, "n_embd": 16,
        "n_layer": 1, "n_head": 2, "initializer_range": 0.5,
    });
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();

    let (out, err, ok) = run(dir.path(), &["--echo", "w1 w2 w3"], "");

    assert!(ok, "{err}");
    let written: Vec<&str> = out.split_whitespace().collect();
    assert_eq!(written[..3], ["w1", "w2", "w3"]);
    assert_eq!(written.len(), 3 + 14, "14 more fit 16 positions, each a word of its own: {out}");
    assert!(written.iter().all(|word| words.contains(&format!("▁{word}"))), "{out}");
}

#[test]
fn draws_repeat_with_their_seed() {
    let dir = tempfile::tempdir().unwrap();
    folder(dir.path());
    let draw = |seed: &str| {
        run(dir.path(), &["--temperature", "1", "--seed", seed, "--max-new-tokens", "20", "a"], "")
            .0
    };
    assert_eq!(draw("1"), draw("1"));
    // The seed makes the weights, too.
    assert_ne!(draw("1"), draw("2"));
}

#[test]
fn what_cannot_be_is_refused_with_a_hint() {
    let dir = tempfile::tempdir().unwrap();
    folder(dir.path());
    let refused = |args: &[&str], expected: &[&str]| {
        let (out, err, ok) = run(dir.path(), args, "");
        assert!(!ok && out.is_empty(), "{out}");
        for part in expected {
            assert!(err.contains(part), "{err}");
        }
    };
    refused(
        &["--max-new-tokens", "40", "a"],
        &["the model's 32 positions", "hint: at most 32 new tokens"],
    );
    refused(&["--temperature=-1", "a"], &["`temperature` is -1"]);
    refused(&["--top-p", "0", "a"], &["`top_p` is 0"]);
    refused(&["--stop", "", "a"], &["`--stop` is empty"]);
}
