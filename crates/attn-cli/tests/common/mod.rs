//! What the test files of this folder share: the program as a user runs it, and small models and data made on the spot.
#![allow(dead_code, reason = "each test file uses a part")]

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::Arc,
};

use arrow::array::{ArrayRef, ListBuilder, RecordBatch, StringBuilder};

use attn_core::{
    Config, LoadOptions, Model, WantedHead,
    checkpoint::{WriteOptions, read_json},
    config::Head,
};
use attn_data::tokenizer::{Style, TextTokenizer, train_bpe};
use parquet::arrow::ArrowWriter;
use serde_json::{Map, Value, json};
use tempfile::TempDir;

/// An empty folder to work in, and the program run there.
pub(crate) struct Place {
    dir: TempDir,
}

/// What a run of the program left.
pub(crate) struct Ran {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Place {
    pub(crate) fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, text: &str) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    pub(crate) fn read(&self, name: &str) -> String {
        let path = self.path(name);
        fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    pub(crate) fn bytes(&self, name: &str) -> Vec<u8> {
        let path = self.path(name);
        fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    pub(crate) fn json(&self, name: &str) -> Value {
        serde_json::from_str(&self.read(name)).unwrap()
    }

    /// The program, about to run here without a network, a Hub cache or settings of whoever runs the tests.
    pub(crate) fn command(&self, arguments: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_attn"));
        command.args(arguments.split_whitespace()).current_dir(self.dir.path());
        let foreign = ["RUST_LOG", "HF_HUB_CACHE", "HF_TOKEN", "HF_ENDPOINT", "CARGO"];
        foreign.iter().for_each(|name| {
            command.env_remove(name);
        });
        command.env("HF_HOME", self.path("hf")).env("HF_HUB_OFFLINE", "1");
        // Tests run side by side: several threads each would wait for one another.
        command.env("OMP_NUM_THREADS", "1");
        command
    }

    /// Runs a line as a shell would, quotes and all, with `attn` for the program.
    pub(crate) fn shell(&self, line: &str) -> Ran {
        let plain = self.command("");
        let mut shell = Command::new("sh");
        shell
            .arg("-c")
            .arg(format!("attn() {{ '{}' \"$@\"; }}; {line}", env!("CARGO_BIN_EXE_attn")));
        shell.current_dir(self.dir.path());
        for (name, value) in plain.get_envs() {
            match value {
                Some(value) => shell.env(name, value),
                None => shell.env_remove(name),
            };
        }
        Ran::of(shell.output().unwrap())
    }

    /// Runs `attn <arguments>`.
    pub(crate) fn attn(&self, arguments: &str) -> Ran {
        Ran::of(self.command(arguments).output().unwrap())
    }

    /// Runs `attn <arguments>`, which must succeed.
    #[track_caller]
    pub(crate) fn done(&self, arguments: &str) -> Ran {
        let ran = self.attn(arguments);
        assert_eq!(ran.code, 0, "attn {arguments}\n{}", ran.stderr);
        ran
    }

    /// Runs `attn <arguments>`, which must fail with one short message that holds all of `parts`.
    #[track_caller]
    pub(crate) fn refused(&self, arguments: &str, parts: &[&str]) -> String {
        let ran = self.attn(arguments);
        assert_eq!(ran.code, 1, "attn {arguments}\n{}", ran.stderr);
        assert_eq!(ran.stdout, "", "nothing but data goes to stdout");
        assert_eq!(ran.stderr.matches("error: ").count(), 1, "{}", ran.stderr);
        for part in parts {
            assert!(ran.stderr.contains(part), "no `{part}` in:\n{}", ran.stderr);
        }
        ran.stderr
    }
}

impl Ran {
    pub(crate) fn of(output: Output) -> Self {
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Self {
            code: output.status.code().unwrap_or(-1),
            stdout: text(output.stdout),
            stderr: text(output.stderr),
        }
    }
}

/// The architectures, small, without a vocabulary or a head.
pub(crate) fn config(base: &str) -> Map<String, Value> {
    let value = match base {
        "gpt2" => json!({
            "model_type": "gpt2", "vocab_size": 40, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 4,
        }),
        "llama" => json!({
            "model_type": "llama", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 32,
        }),
        "distilbert" => json!({
            "model_type": "distilbert", "vocab_size": 40, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 4,
            "max_position_embeddings": 32,
        }),
        "bert" => json!({
            "model_type": "bert", "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 4, "max_position_embeddings": 32,
        }),
        other => unreachable!("{other}"),
    };
    let Value::Object(map) = value else { unreachable!("written as an object above") };
    map
}

/// A random model whose weights are far from their start, where every output is nearly the same.
pub(crate) fn random_model(config: Map<String, Value>, head: Head) -> Model {
    let mut config = Config::from_json(config).unwrap();
    let wanted = match head {
        Head::Classifier { n_classes } => WantedHead::NewClassifier(
            ["negative", "positive", "neutral"][..n_classes as usize]
                .iter()
                .map(|&class| class.to_owned())
                .collect(),
        ),
        other => {
            config.set_head(other);
            WantedHead::AsSaved
        }
    };
    let model =
        Model::init(config, &LoadOptions { seed: 5, head: wanted, ..LoadOptions::default() })
            .unwrap();
    for (i, (_, tensor)) in model.parameters().iter().enumerate() {
        let noise = attn_core::testing::randn(i as u64, &tensor.size()) * 0.2;
        tch::no_grad(|| tensor.shallow_clone().copy_(&(tensor + noise)));
    }
    model
}

pub(crate) fn save(model: &Model, dir: &Path) {
    model.save(dir, &WriteOptions::default()).unwrap();
}

/// A tokenizer trained on the sentences of [`rows`].
pub(crate) fn tokenizer(style: Style) -> TextTokenizer {
    let texts: Vec<String> = rows(80).into_iter().map(|(text, _)| text).collect();
    let vocab_size = if style == Style::ByteLevel { 290 } else { 90 };
    train_bpe(&texts, vocab_size, style, Some(32)).unwrap()
}

/// A model folder with a tokenizer of its own.
pub(crate) fn model_folder(place: &Place, name: &str, base: &str, head: Head) {
    let style = if base == "distilbert" { Style::WordPiece } else { Style::ByteLevel };
    let tokenizer = tokenizer(style);
    let mut config = config(base);
    config.insert("vocab_size".into(), tokenizer.vocab_size().into());
    save(&random_model(config, head), &place.path(name));
    tokenizer.save(place.path(name)).unwrap();
}

/// Changes `config.json` of a model folder.
pub(crate) fn edit_config(place: &Place, name: &str, edit: impl FnOnce(&mut Map<String, Value>)) {
    let mut config = read_json(&place.path(name), "config.json").unwrap();
    edit(&mut config);
    place.write(&format!("{name}/config.json"), &serde_json::to_string(&config).unwrap());
}

/// Sentences whose last word says the class, 1 for good.
pub(crate) fn rows(n: usize) -> Vec<(String, usize)> {
    let things = ["film", "book", "meal", "song", "trip"];
    let words = [["bad", "dull", "poor"], ["good", "fine", "great"]];
    (0..n)
        .map(|i| {
            let label = i % 2;
            let pause = if i % 7 == 0 { " I saw yesterday" } else { "" };
            let text = format!("the {}{pause} was {}", things[i / 2 % 5], words[label][i / 10 % 3]);
            (text, label)
        })
        .collect()
}

/// `data.csv` with 48 rows to train on and 16 to report on, `train` and `validation` in the column `part`.
pub(crate) fn write_data(place: &Place) {
    let mut text = "review,stars,part\n".to_owned();
    for (i, (review, label)) in rows(64).into_iter().enumerate() {
        let part = if i < 48 { "train" } else { "validation" };
        text += &format!("{review},{label},{part}\n");
    }
    place.write("data.csv", &text);
}

/// A treebank of `n` sentences of four words such as `the film was good` in each split, all of whose words hang on `heads`.
pub(crate) fn treebank(place: &Place, name: &str, n: usize, heads: &[&str]) {
    fs::create_dir_all(place.path(name)).unwrap();
    let list = |entries: &dyn Fn(usize) -> Vec<String>| -> ArrayRef {
        let mut lists = ListBuilder::new(StringBuilder::new());
        for at in 0..n {
            entries(at).iter().for_each(|text| lists.values().append_value(text));
            lists.append(true);
        }
        Arc::new(lists.finish())
    };
    let texts = rows(80);
    let plain: Vec<&String> =
        texts.iter().map(|(text, _)| text).filter(|text| text.split(' ').count() == 4).collect();
    let own = |entries: &[&str]| entries.iter().map(|&text| text.to_owned()).collect::<Vec<_>>();
    let words = |at: usize| own(&plain[at % plain.len()].split(' ').collect::<Vec<_>>());
    for split in ["validation", "test"] {
        let batch = RecordBatch::try_from_iter([
            ("tokens", list(&words)),
            ("head", list(&|_| own(heads))),
            ("deprel", list(&|_| own(&["det", "nsubj", "cop", "root"]))),
        ])
        .unwrap();
        let file = fs::File::create(place.path(&format!("{name}/{split}.parquet"))).unwrap();
        let mut writer = ArrowWriter::try_new(file, batch.schema(), None).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
    }
}

/// A config that fine-tunes `model` on [`write_data`] in a second or two.
pub(crate) const FINETUNE: &str = r#"
model = "model"

[data]
source = "data.csv"
text = "review"
label = "stars"
classes = ["negative", "positive"]
split_column = "part"

[examples]
hold_out = 8

[train]
lr = 1e-2
epochs = 6
batch_size = 8
log_every = 1
seed = 3
"#;

/// The Python that `ATTN_TEST_PYTHON` names, if it has `modules`; else says that `test` is skipped.
pub(crate) fn python(test: &str, modules: &str) -> Option<String> {
    let python = std::env::var("ATTN_TEST_PYTHON").ok();
    let found = python.filter(|python| {
        let ran = Command::new(python).args(["-c", &format!("import {modules}")]).output();
        ran.is_ok_and(|ran| ran.status.success())
    });
    if found.is_none() {
        let line = format!("\nSKIPPED {test}: ATTN_TEST_PYTHON names no Python with {modules}\n");
        // Past the capture of tests' output.
        let _ = std::io::Write::write_all(&mut std::io::stderr(), line.as_bytes());
    }
    found
}
