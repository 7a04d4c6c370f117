//! The readers of files that strangers wrote, each as a function of any bytes: it understands them or refuses them with an error, and
//! neither panics nor takes more memory than the bytes are worth.
//!
//! `fuzz/libfuzzer` looks for bytes that break this, guided by what code they reach; `fuzz/corpus` keeps those that reached something
//! new, and `tests/replay.rs` runs all of them again, without a fuzzer. Those of `attn-files` and `attn-data` link no LibTorch.

use std::{cell::LazyCell, fs, path::Path};

use attn_data::{
    chat::{ChatTemplate, Message},
    dataset::{self, DatasetSpec},
    hub::{Hub, HubConfig},
    needle,
    tokenizer::{EncodeOptions, Input, TextTokenizer},
};
use attn_files::{Layout, section};
use tempfile::TempDir;

/// Understands the bytes or refuses them.
pub type Reader = fn(&[u8]);

/// Every reader, by the name of its corpus.
pub const READERS: &[(&str, Reader)] = &[
    ("safetensors", safetensors),
    ("index", index),
    ("section", attn_section),
    ("tokenizer", tokenizer),
    ("tokenizer_config", tokenizer_config),
    ("chat", chat),
    ("parquet", parquet),
    ("rows", rows),
    ("needles", needles),
    #[cfg(feature = "commands")]
    ("model_config", commands::model_config),
    #[cfg(feature = "commands")]
    ("settings", commands::settings),
    #[cfg(feature = "commands")]
    ("scores", commands::scores),
    #[cfg(feature = "commands")]
    ("input", commands::input),
    #[cfg(feature = "commands")]
    ("result", commands::result),
];

/// Rows read of a file; a hostile one may claim any number.
const MOST_ROWS: usize = 2_000;

/// A small tokenizer that is as it should be.
const TOKENIZER: &str = include_str!("../../results/models/tiny-mlm/tokenizer.json");

thread_local! {
    /// In memory where the system has such a folder.
    static FOLDER: LazyCell<TempDir> = LazyCell::new(|| {
        let memory = Path::new("/dev/shm");
        let made = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
        made.expect("a folder for one file")
    });
}

/// Calls `read` with a folder in which `files` stand.
fn with_files(files: &[(&str, &[u8])], read: impl FnOnce(&Path)) {
    FOLDER.with(|folder| {
        for (name, content) in files {
            fs::write(folder.path().join(name), content).expect("there is room for it");
        }
        read(folder.path());
    });
}

/// A safetensors file. What is accepted keeps its word: every tensor lies in the file, none overlap.
pub fn safetensors(data: &[u8]) {
    with_files(&[("model.safetensors", data)], |folder| {
        let Ok(layout) = Layout::open_file(&folder.join("model.safetensors")) else { return };
        let mut all: Vec<_> = layout.tensors.values().collect();
        all.sort_by_key(|stored| (stored.begin, stored.len));
        let mut end = 0;
        for stored in all {
            assert!(stored.begin >= end, "it overlaps the one before");
            end = stored.begin + stored.len;
            let n: i64 = stored.shape.iter().product();
            assert_eq!(n as usize * stored.dtype.bitsize() / 8, stored.len);
        }
        assert!(end <= data.len(), "it ends behind the file");
    });
}

/// An index of shards, two of which are there.
pub fn index(data: &[u8]) {
    let shard = |name: &str| {
        let header = format!(r#"{{"{name}":{{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}}}"#);
        [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), b"x"].concat()
    };
    let files: [(&str, &[u8]); 3] = [
        ("model.safetensors.index.json", data),
        ("a.safetensors", &shard("a")),
        ("b.safetensors", &shard("b")),
    ];
    with_files(&files, |folder| {
        // Of the reader before.
        let _ = fs::remove_file(folder.join("model.safetensors"));
        if let Ok(layout) = Layout::open(folder) {
            let inside = |path: &Path| path.parent() == Some(folder);
            assert!(layout.files.iter().all(|file| inside(&file.path)), "it lies elsewhere");
        }
    });
}

/// The section `attn` of a `config.json`. What is accepted names heads that are there.
pub fn attn_section(data: &[u8]) {
    let Ok(raw) = serde_json::from_slice(data) else { return };
    let Ok((_, Some(section))) = section::read(&raw) else { return };
    let (n_layers, n_heads) = (section.layers.len().min(3) as i64, 4);
    if section.check(n_layers, n_heads).is_ok() {
        for layer in &section.layers {
            assert!(layer.kept_heads.iter().all(|head| (0..n_heads).contains(head)));
            assert!(layer.kv_of_head.iter().all(|head| (0..layer.n_kv_heads).contains(head)));
        }
    }
}

/// Encodes and decodes a text with the tokenizer of `folder`.
fn use_tokenizer(folder: &Path) {
    let Ok(tokenizer) = TextTokenizer::from_folder(folder) else { return };
    let texts = ["A fine film, 3.5 of 5!", "été 日本 \u{1f600}\n\t", ""].map(Input::from);
    let options = EncodeOptions { max_len: Some(64), ..EncodeOptions::default() };
    if let Ok(encoded) = tokenizer.encode(&texts, &options) {
        for ids in &encoded.ids {
            let _ = tokenizer.decode(ids, true);
        }
    }
    let _ = (tokenizer.fill_id(), tokenizer.special_ids(), tokenizer.decode(&[0, u32::MAX], false));
}

/// A `tokenizer.json`.
pub fn tokenizer(data: &[u8]) {
    with_files(&[("tokenizer.json", data), ("tokenizer_config.json", b"{}")], use_tokenizer);
}

/// A `tokenizer_config.json` beside a good tokenizer, and its chat template.
pub fn tokenizer_config(data: &[u8]) {
    let files = [("tokenizer.json", TOKENIZER.as_bytes()), ("tokenizer_config.json", data)];
    with_files(&files, |folder| {
        use_tokenizer(folder);
        if data.contains(&b'*') {
            return; // See `chat`.
        }
        if let Ok(template) = ChatTemplate::from_folder(folder) {
            converse(&template);
        }
    });
}

fn converse(template: &ChatTemplate) {
    let messages = [Message::new("system", "Be brief."), Message::new("user", "2 + 2?")];
    let _ = template.render(&messages, true);
}

/// A chat template. One that multiplies is left out: `'a' * 99999999999` takes what it says, and minijinja has no bound for it.
pub fn chat(data: &[u8]) {
    let Ok(source) = std::str::from_utf8(data) else { return };
    if source.contains('*') {
        return;
    }
    let tokens = [("bos_token".to_owned(), "<s>".into())].into_iter().collect();
    if let Ok(template) = ChatTemplate::new(source, tokens, "fuzz") {
        converse(&template);
    }
}

/// Reads a file of rows with texts, pairs and labels, and with texts alone.
fn read_rows(path: &Path) {
    let hub = Hub::new(HubConfig { offline: true, ..HubConfig::default() });
    let source = path.to_string_lossy().into_owned();
    let of = |text: &str, pair: Option<&str>, label: Option<&str>| DatasetSpec {
        source: source.clone(),
        text: text.into(),
        text_pair: pair.map(Into::into),
        label: label.map(Into::into),
        ..DatasetSpec::default()
    };
    let specs = [
        of("sentence", None, Some("label")),
        of("text", None, None),
        of("premise", Some("hypothesis"), Some("label")),
    ];
    for spec in specs {
        let _ = dataset::classes(&spec, &hub);
        if let Ok(rows) = dataset::open(&spec, "train", &hub) {
            rows.take(MOST_ROWS).for_each(drop);
        }
    }
}

/// A Parquet file.
pub fn parquet(data: &[u8]) {
    with_files(&[("rows.parquet", data)], |folder| read_rows(&folder.join("rows.parquet")));
}

/// A CSV, TSV, JSONL or text file: the first byte says which.
pub fn rows(data: &[u8]) {
    let Some((&kind, data)) = data.split_first() else { return };
    let name = ["rows.csv", "rows.tsv", "rows.jsonl", "rows.txt"][kind as usize % 4];
    with_files(&[(name, data)], |folder| read_rows(&folder.join(name)));
}

/// Facts to be hidden, and the text to hide them in.
pub fn needles(data: &[u8]) {
    with_files(&[("needles.jsonl", data)], |folder| {
        let path = folder.join("needles.jsonl");
        let _ = (needle::read_needles(&path), needle::read_texts(&path));
    });
}

#[cfg(feature = "commands")]
mod commands {
    use std::path::Path;

    use attn_cli::readers;

    fn read<E>(name: &str, data: &[u8], read: impl FnOnce(&Path) -> Result<(), E>) {
        super::with_files(&[(name, data)], |folder| {
            let _ = read(&folder.join(name));
        });
    }

    /// A `config.json`, and the attention of its layers.
    pub(super) fn model_config(data: &[u8]) {
        read("config.json", data, readers::model_config);
    }

    /// The config of a run, or a sweep.
    pub(super) fn settings(data: &[u8]) {
        read("config.toml", data, readers::settings);
    }

    /// Scores of heads.
    pub(super) fn scores(data: &[u8]) {
        read("scores.json", data, readers::scores);
    }

    /// Token ids with a mask, or a mask over heads.
    pub(super) fn input(data: &[u8]) {
        read("input.json", data, readers::input);
    }

    /// A result, drawn where there is a picture of its kind.
    pub(super) fn result(data: &[u8]) {
        read("result.json", data, readers::result);
    }
}
