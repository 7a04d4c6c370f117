//! Tokenizers from folders and from text.

use std::{fs, path::Path};

use attn_data::{
    Error,
    tokenizer::{EncodeOptions, Encodings, Input, Style, TextTokenizer, train_bpe},
};
use serde_json::{Value, json};
use tempfile::TempDir;

const STYLES: [Style; 2] = [Style::ByteLevel, Style::WordPiece];

/// A small language: enough repetition for a few hundred pairs.
fn texts() -> Vec<String> {
    let (subjects, verbs) =
        (["The actor", "A critic", "Zoë's étude", "the plot"], ["loves", "hated", "ignores"]);
    let ends = ["every scene!", "the ending…", "its 1,234 twists", "it — truly"];
    let mut texts = Vec::new();
    for i in 0..600 {
        texts.push(format!("{} {} {}", subjects[i % 4], verbs[i / 4 % 3], ends[i / 12 % 4]));
    }
    texts
}

fn trained(style: Style) -> TextTokenizer {
    train_bpe(&texts(), 420, style, Some(64)).unwrap()
}

fn inputs(texts: &[String]) -> Vec<Input<'_>> {
    texts.iter().map(|text| Input::from(text.as_str())).collect()
}

/// Names and contents.
type Files = &'static [(&'static str, &'static str)];

fn folder(files: &[(&str, &str)]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, content) in files {
        fs::write(folder.path().join(name), content).unwrap();
    }
    folder
}

/// A word-level tokenizer small enough to read.
fn word_level() -> Value {
    json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 9}, "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>",
            "pad_to_multiple_of": null},
        "added_tokens": [
            {"id": 0, "content": "<pad>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
                "special": true},
            {"id": 12, "content": "<end>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
                "special": true},
        ],
        "normalizer": null,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": null,
        "decoder": null,
        "model": {"type": "WordLevel", "vocab": {"<pad>": 0, "<unk>": 1, "a": 2, "b": 3, "<end>": 12}, "unk_token": "<unk>"},
    })
}

#[test]
fn training_twice_gives_the_same_file() {
    for style in STYLES {
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        trained(style).save(a.path()).unwrap();
        // One thread counts in another order than several.
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        pool.install(|| trained(style)).save(b.path()).unwrap();

        for name in ["tokenizer.json", "tokenizer_config.json"] {
            let read = |folder: &TempDir| fs::read_to_string(folder.path().join(name)).unwrap();
            assert_eq!(read(&a), read(&b), "{style:?} {name}");
        }
    }
}

#[test]
fn bytes_represent_every_text() {
    let tokenizer = trained(Style::ByteLevel);

    for text in ["The actor loves it", "日本語 🎬\n\ttab", "  two  spaces ", "", "\u{0}\u{feff}é"]
    {
        let ids = tokenizer.ids(text, true).unwrap();
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
    }
    assert_eq!(
        (tokenizer.eos_id(), tokenizer.bos_id(), tokenizer.pad_id()),
        (Some(0), Some(0), Some(1))
    );
    assert_eq!((tokenizer.mask_id(), tokenizer.special_ids()), (None, vec![0, 1]));
    assert_eq!(tokenizer.ids("<|endoftext|>", false).unwrap(), [0]);
    assert_eq!(tokenizer.ids("actor", false).unwrap().len(), 2); // seen only after a space, and so learned
    assert_eq!(tokenizer.ids(" actor", false).unwrap().len(), 1);
}

#[test]
fn word_pieces_stand_between_cls_and_sep() {
    let tokenizer = trained(Style::WordPiece);

    let ids = tokenizer.ids("The ACTOR hated 漢", true).unwrap();
    let tokens: Vec<String> = ids.iter().map(|&id| tokenizer.token(id).unwrap()).collect();
    let pair = tokenizer
        .encode(&[Input { text: "a", pair: Some("a") }], &EncodeOptions::default())
        .unwrap();

    assert_eq!(tokens, ["[CLS]", "the", "actor", "hated", "[UNK]", "[SEP]"]);
    let a = tokenizer.token_id("a").unwrap();
    assert_eq!(pair.ids[0], [2, a, 3, a, 3]);
    assert_eq!(pair.second_from, [Some(3)]);
    assert_eq!(tokenizer.special_ids(), [0, 1, 2, 3, 4]);
    assert_eq!(
        (tokenizer.pad_id(), tokenizer.mask_id(), tokenizer.eos_id()),
        (Some(0), Some(4), None)
    );
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "the actor hated");
    assert_eq!(tokenizer.ids("zoë", false).unwrap(), tokenizer.ids("ZOE", false).unwrap());
}

#[test]
fn a_vocabulary_has_the_size_asked_for_where_the_text_suffices() {
    for (style, asked) in [(Style::ByteLevel, 300), (Style::WordPiece, 105)] {
        assert_eq!(train_bpe(&texts(), asked, style, None).unwrap().vocab_size(), asked);
    }
    assert!(trained(Style::ByteLevel).vocab_size() < 420); // no more pairs
    for (style, asked) in [(Style::ByteLevel, 257), (Style::WordPiece, 40)] {
        let error = train_bpe(&texts(), asked, style, None).unwrap_err();
        assert!(matches!(error, Error::Vocabulary { .. }), "{error:?}");
        assert!(
            error.to_string().starts_with(&format!("cannot train a vocabulary of {asked}: ")),
            "{error}"
        );
    }
    assert!(matches!(
        train_bpe(&[" "], 1000, Style::ByteLevel, None),
        Err(Error::Vocabulary { .. })
    ));
}

#[test]
fn a_saved_tokenizer_is_the_same_one() {
    for style in STYLES {
        let (tokenizer, first, second) =
            (trained(style), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        tokenizer.save(first.path().join("new")).unwrap();
        let loaded = TextTokenizer::from_folder(first.path().join("new")).unwrap();
        loaded.save(second.path()).unwrap();
        let again = TextTokenizer::from_folder(second.path()).unwrap();

        let texts = texts();
        let (inputs, options) = (inputs(&texts), EncodeOptions::default());
        let expected = tokenizer.encode(&inputs, &options).unwrap();
        for other in [&loaded, &again] {
            assert_eq!(other.encode(&inputs, &options).unwrap(), expected);
            assert_eq!(other.special_ids(), tokenizer.special_ids());
            assert_eq!((other.pad_id(), other.eos_id()), (tokenizer.pad_id(), tokenizer.eos_id()));
            assert_eq!(
                (other.vocab_size(), other.max_length()),
                (tokenizer.vocab_size(), Some(64))
            );
        }
        let read = |folder: &Path| fs::read(folder.join("tokenizer.json")).unwrap();
        assert_eq!(read(&first.path().join("new")), read(second.path()));
        loaded.save(first.path().join("new")).unwrap(); // onto itself: changes nothing
        assert_eq!(read(&first.path().join("new")), read(second.path()));
    }
}

#[test]
fn threads_change_neither_ids_nor_order() {
    let texts: Vec<String> = (0..500).map(|i| texts()[i * 7 % 600].repeat(1 + i % 5)).collect();
    let inputs = inputs(&texts);
    for style in STYLES {
        let tokenizer = trained(style);
        let options = EncodeOptions { max_len: Some(20), ..EncodeOptions::default() };
        let with = |n_threads| -> Encodings {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads).build().unwrap();
            pool.install(|| tokenizer.encode(&inputs, &options)).unwrap()
        };

        let one = with(1);

        assert_eq!(one, with(4));
        for (text, ids) in texts.iter().zip(&one.ids) {
            let whole = tokenizer.ids(text, true).unwrap();
            assert!(whole.len() > 20 || whole == *ids);
        }
    }
}

#[test]
fn cut_texts_are_counted() {
    let tokenizer = trained(Style::WordPiece);
    let inputs = ["the plot", "the plot loves every scene the plot hated", "the"].map(Input::from);

    let cut = tokenizer
        .encode(&inputs, &EncodeOptions { max_len: Some(5), ..EncodeOptions::default() })
        .unwrap();
    let whole = tokenizer.encode(&inputs, &EncodeOptions::default()).unwrap();

    assert_eq!((cut.n_truncated, cut.longest), (1, 10));
    assert_eq!(cut.ids[1], [&whole.ids[1][..4], &[3]].concat()); // [SEP] stays at the end
    assert_eq!((&cut.ids[0], &cut.ids[2]), (&whole.ids[0], &whole.ids[2]));
    assert_eq!((whole.n_truncated, whole.longest), (0, 10));
}

#[test]
fn of_a_pair_the_longer_text_is_cut() {
    let tokenizer = trained(Style::WordPiece);
    let input = Input { text: "the plot the plot the plot", pair: Some("a critic") };

    let cut = tokenizer
        .encode(&[input], &EncodeOptions { max_len: Some(8), ..EncodeOptions::default() })
        .unwrap();

    let tokens: Vec<String> = cut.ids[0].iter().map(|&id| tokenizer.token(id).unwrap()).collect();
    assert_eq!(tokens, ["[CLS]", "the", "plot", "the", "[SEP]", "a", "critic", "[SEP]"]);
    assert_eq!(cut.second_from, [Some(5)], "of what was left");
}

#[test]
fn texts_too_long_are_an_error_where_cutting_is_not_allowed() {
    let tokenizer = trained(Style::WordPiece);
    let inputs = ["the", "the plot the plot", "the plot the plot the plot"].map(Input::from);
    let options = EncodeOptions { max_len: Some(5), truncate: false, ..EncodeOptions::default() };

    let error = tokenizer.encode(&inputs, &options).unwrap_err();
    let no_room =
        tokenizer.encode(&inputs, &EncodeOptions { max_len: Some(2), ..options }).unwrap_err();

    assert!(matches!(error, Error::TooLong { index: 1, n_tokens: 6, max_len: 5 }), "{error:?}");
    assert!(matches!(no_room, Error::Setting { name: "max_len", .. }), "{no_room:?}");
    let bare = EncodeOptions { max_len: Some(1), add_special_tokens: false, truncate: true };
    assert_eq!(tokenizer.encode(&inputs, &bare).unwrap().n_truncated, 2);
}

#[test]
fn no_texts_are_no_ids() {
    assert_eq!(
        trained(Style::ByteLevel).encode(&[], &EncodeOptions::default()).unwrap(),
        Encodings::default()
    );
}

#[test]
fn what_a_file_stores_about_padding_and_cutting_is_left_out() {
    let folder = folder(&[("tokenizer.json", &word_level().to_string())]);

    let tokenizer = TextTokenizer::from_folder(folder.path()).unwrap();

    assert_eq!(tokenizer.ids("a b a b", true).unwrap(), [2, 3, 2, 3]);
    assert_eq!(tokenizer.vocab_size(), 13); // ids have a gap: the largest counts
}

#[test]
fn special_tokens_are_found_where_each_library_version_wrote_them() {
    let tokenizer = word_level().to_string();
    let cases: [(Files, Option<u32>, Option<u32>); 6] = [
        (&[], Some(0), None), // `<pad>` is a usual name, `<end>` is not
        (
            &[("tokenizer_config.json", r#"{"eos_token": "<end>", "pad_token": null}"#)],
            Some(0),
            Some(12),
        ),
        (&[("tokenizer_config.json", r#"{"eos_token": {"content": "<end>"}}"#)], Some(0), Some(12)),
        (
            &[(
                "special_tokens_map.json",
                r#"{"eos_token": "<end>", "pad_token": {"content": "b"}}"#,
            )],
            Some(3),
            Some(12),
        ),
        (&[("config.json", r#"{"eos_token_id": [12, 3], "pad_token_id": 2}"#)], Some(2), Some(12)),
        (
            &[
                ("tokenizer_config.json", r#"{"eos_token": "<unheard>"}"#),
                ("config.json", r#"{"eos_token_id": 3, "pad_token_id": null}"#),
            ],
            Some(0),
            Some(3),
        ),
    ];
    for (files, pad, eos) in cases {
        let folder = folder(&[files, &[("tokenizer.json", &tokenizer)]].concat());
        let tokenizer = TextTokenizer::from_folder(folder.path()).unwrap();
        assert_eq!((tokenizer.pad_id(), tokenizer.eos_id()), (pad, eos), "{files:?}");
    }
}

#[test]
fn the_length_limit_is_read_and_its_absence_too() {
    let tokenizer = word_level().to_string();
    for (limit, expected) in
        [("512", Some(512)), ("1000000000000000019884624838656", None), ("null", None)]
    {
        let config = format!("{{\"model_max_length\": {limit}}}");
        let folder = folder(&[("tokenizer.json", &tokenizer), ("tokenizer_config.json", &config)]);
        let tokenizer = TextTokenizer::from_folder(folder.path()).unwrap();
        assert_eq!(tokenizer.max_length(), expected);

        // Raised for a model that learnt to read more, and nothing else of the file changed.
        let saved = tempfile::tempdir().unwrap();
        tokenizer.clone().reaching(100).save(saved.path()).unwrap();
        let text = fs::read_to_string(saved.path().join("tokenizer_config.json")).unwrap();
        assert_eq!(text, config);
        tokenizer.reaching(600).save(saved.path()).unwrap();
        let again = TextTokenizer::from_folder(saved.path()).unwrap();
        assert_eq!(again.max_length(), expected.map(|_| 600));
    }
    let trained = train_bpe(&["a b c"], 300, Style::ByteLevel, Some(32)).unwrap();
    let saved = tempfile::tempdir().unwrap();
    trained.reaching(64).save(saved.path()).unwrap();
    assert_eq!(TextTokenizer::from_folder(saved.path()).unwrap().max_length(), Some(64));
}

#[test]
fn an_older_folder_with_a_word_list_makes_bert_and_with_merges_gpt2() {
    let bert = folder(&[("vocab.txt", "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nhel\n##lo\nworld\n")]);
    let cased = folder(&[
        ("vocab.txt", "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nhel\n##lo\nworld\n"),
        ("tokenizer_config.json", r#"{"do_lower_case": false}"#),
    ]);
    let gpt2 = folder(&[
        ("vocab.json", r#"{"h": 0, "i": 1, "Ġ": 2, "hi": 3, "Ġhi": 4, "<|endoftext|>": 5}"#),
        ("merges.txt", "#version: 0.2\nh i\nĠ hi\n"),
    ]);

    let bert_tokenizer = TextTokenizer::from_folder(bert.path()).unwrap();
    assert_eq!(bert_tokenizer.ids("Hello world", true).unwrap(), [2, 5, 6, 7, 3]);
    assert_eq!((bert_tokenizer.pad_id(), bert_tokenizer.mask_id()), (Some(0), Some(4)));
    assert_eq!(TextTokenizer::from_folder(cased.path()).unwrap().ids("Hello", false).unwrap(), [1]);
    let gpt2_tokenizer = TextTokenizer::from_folder(gpt2.path()).unwrap();
    assert_eq!(gpt2_tokenizer.ids("hi hi<|endoftext|>", true).unwrap(), [3, 4, 5]);
    assert_eq!(gpt2_tokenizer.eos_id(), Some(5));

    // Saved, each becomes a folder with a `tokenizer.json` as well.
    for (tokenizer, text) in [(bert_tokenizer, "Hello world"), (gpt2_tokenizer, "hi hi")] {
        let saved = tempfile::tempdir().unwrap();
        tokenizer.save(saved.path()).unwrap();
        assert!(saved.path().join("tokenizer.json").is_file());
        let again = TextTokenizer::from_folder(saved.path()).unwrap();
        assert_eq!(again.ids(text, true).unwrap(), tokenizer.ids(text, true).unwrap());
    }
}

#[test]
fn folders_without_a_usable_tokenizer_say_why() {
    let cases: [(Files, &str); 4] = [
        (&[], "no `tokenizer.json`"),
        (&[("tokenizer.model", "\u{1}")], "`tokenizer.model` (SentencePiece) alone cannot be read"),
        (
            &[("vocab.json", r#"{"<s>": 0, "a": 1}"#), ("merges.txt", "#version: 0.2\n")],
            "not GPT-2's",
        ),
        (&[("vocab.txt", "a\nb\n")], "`vocab.txt` has no `[UNK]`"),
    ];
    for (files, expected) in cases {
        let folder = folder(files);
        let error = TextTokenizer::from_folder(folder.path()).unwrap_err();
        assert!(matches!(error, Error::NoTokenizer { .. }), "{error:?}");
        let text = error.to_string();
        assert!(text.contains(expected) && text.contains("\nhint: "), "{text}");
    }
    let missing = TextTokenizer::from_folder("no/such/folder").unwrap_err();
    assert!(missing.to_string().contains("the folder does not exist"), "{missing}");
}

#[test]
fn damaged_files_are_named() {
    let cut = folder(&[("tokenizer.json", &word_level().to_string()[..200])]);
    let config =
        folder(&[("tokenizer.json", &word_level().to_string()), ("tokenizer_config.json", "{")]);

    let cut = TextTokenizer::from_folder(cut.path()).unwrap_err();
    let config = TextTokenizer::from_folder(config.path()).unwrap_err();

    assert!(
        matches!(&cut, Error::Tokenizer { doing, .. } if doing.contains("tokenizer.json")),
        "{cut:?}"
    );
    assert!(
        matches!(&config, Error::Json { path, .. } if path.ends_with("tokenizer_config.json")),
        "{config:?}"
    );
}

#[test]
fn tokens_are_shown_as_the_text_that_they_stand_for() {
    let bytes = train_bpe(&["naïve the the שלום שלום"], 400, Style::ByteLevel, None).unwrap();
    let shown = |text: &str| -> Vec<String> {
        let ids = bytes.ids(text, false).unwrap();
        ids.iter().map(|&id| bytes.shown(id).unwrap()).collect()
    };
    assert_eq!(shown(" the").concat(), "▁the");
    assert_eq!(shown(" שלום").concat(), "▁שלום");
    // Half a letter is none.
    assert!(shown("ש").iter().all(|it| !it.contains(char::REPLACEMENT_CHARACTER)));
    assert!(shown("x").concat() == "x" && bytes.shown(100_000).is_none());
    let pieces = train_bpe(&["playing the plays"], 60, Style::WordPiece, None).unwrap();
    let ids = pieces.ids("playing", false).unwrap();
    let raw: Vec<String> = ids.iter().map(|&id| pieces.token(id).unwrap()).collect();
    let same: Vec<String> = ids.iter().map(|&id| pieces.shown(id).unwrap()).collect();
    assert_eq!(raw, same, "as they stand in the vocabulary");
}
