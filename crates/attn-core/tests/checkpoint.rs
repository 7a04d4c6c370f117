//! Model folders in and out: round trips, hostile input, kills.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use attn_core::checkpoint::{
    Checkpoint, Error, FolderWriter, TensorProblem, WriteOptions, read_json, read_metadata,
    read_tensors, write_folder, write_tensors,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::SafeTensors;
use serde_json::{Map, Value, json};
use tch::{Device, Kind, Tensor};

type Tensors = Vec<(String, Tensor)>;

const KINDS: [(Kind, &str); 10] = [
    (Kind::Double, "F64"),
    (Kind::Float, "F32"),
    (Kind::Half, "F16"),
    (Kind::BFloat16, "BF16"),
    (Kind::Int64, "I64"),
    (Kind::Int, "I32"),
    (Kind::Int16, "I16"),
    (Kind::Int8, "I8"),
    (Kind::Uint8, "U8"),
    (Kind::Bool, "BOOL"),
];

/// A safetensors file made by hand.
fn file(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
}

/// A safetensors file with one f32 vector per name and length, filled with 0, 1, 2, …
fn vectors(entries: &[(&str, usize)]) -> Vec<u8> {
    let mut header = Map::new();
    let mut data = Vec::new();
    for &(name, n) in entries {
        let begin = data.len();
        data.extend((0..n).flat_map(|i| (i as f32).to_le_bytes()));
        let offsets = [begin, data.len()];
        header
            .insert(name.into(), json!({ "dtype": "F32", "shape": [n], "data_offsets": offsets }));
    }
    file(&Value::Object(header).to_string(), &data)
}

fn object(value: Value) -> Map<String, Value> {
    serde_json::from_value(value).unwrap()
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// The error and all its causes.
fn chain(error: &Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        text += &format!(": {error}");
        source = error.source();
    }
    text
}

fn assert_same(left: &Tensors, right: &Tensors) {
    let names =
        |tensors: &Tensors| tensors.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
    assert_eq!(names(left), names(right));
    for ((name, left), (_, right)) in left.iter().zip(right) {
        assert_eq!((left.kind(), left.size()), (right.kind(), right.size()), "{name}");
        assert!(left.equal(right), "{name}");
    }
}

/// Writes `bytes` as the weights of a folder and returns how opening it fails.
fn refusal(bytes: &[u8]) -> Error {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
    Checkpoint::open(dir.path()).map(|c| c.names().count()).expect_err("accepted a wrong file")
}

fn sharded(index: &Value, shards: &[(&str, Vec<u8>)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
    for (name, bytes) in shards {
        fs::write(dir.path().join(name), bytes).unwrap();
    }
    dir
}

// Round trips.

/// Every kind, each as a matrix, a scalar, an empty tensor, a transposed and a strided one.
fn samples() -> Tensors {
    let mut tensors = Vec::new();
    for (kind, name) in KINDS {
        let base = Tensor::arange(35, (Kind::Int64, Device::Cpu)).view([5, 7]);
        let base = if kind == Kind::Bool { base.remainder(2) } else { base - 3 }.to_kind(kind);
        for (form, tensor) in [
            ("matrix", base.shallow_clone()),
            ("scalar", base.select(0, 1).select(0, 2)),
            ("empty", base.narrow(0, 0, 0)),
            ("transposed", base.transpose(0, 1)),
            ("strided", base.slice(1, 0, 7, 3)),
            ("expanded", base.narrow(0, 2, 1).expand([4, 7], false)),
        ] {
            tensors.push((format!("{form}.{name}"), tensor));
        }
    }
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    tensors
}

#[test]
fn every_kind_and_layout_survives_a_round_trip() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("all.safetensors");
    let tensors = samples();

    write_tensors(&path, &tensors, &BTreeMap::from([("seed".into(), "7".into())])).unwrap();

    assert_same(&read_tensors(&path).unwrap(), &tensors);
    let metadata = read_metadata(&path).unwrap();
    assert_eq!(
        metadata,
        BTreeMap::from([("format".into(), "pt".into()), ("seed".into(), "7".into())])
    );
    assert_eq!(names(dir.path()), ["all.safetensors"]);
}

#[test]
fn the_safetensors_crate_reads_and_would_write_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("all.safetensors");
    write_tensors(&path, &samples(), &BTreeMap::new()).unwrap();
    let bytes = fs::read(&path).unwrap();

    let theirs = SafeTensors::deserialize(&bytes).unwrap();

    assert_eq!(theirs.len(), samples().len());
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    let again = safetensors::serialize(theirs.tensors(), Some(metadata)).unwrap();
    assert!(again == bytes, "bytes differ");
}

#[test]
fn loading_converts_like_libtorch_across_pieces_and_misaligned_data() {
    // More than one piece of 16 MiB, and an odd header length, so that nothing is aligned.
    let n = 9_000_001;
    let values = Tensor::arange(n, (Kind::Float, Device::Cpu)) * 0.37 - 1e5;
    let stored = values.to_kind(Kind::BFloat16);
    let mut data = vec![0; 2 * n as usize];
    stored.copy_data_u8(&mut data, n as usize);
    let mut header =
        json!({ "w": { "dtype": "BF16", "shape": [n], "data_offsets": [0, data.len()] } })
            .to_string();
    if header.len().is_multiple_of(2) {
        header.push(' ');
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("odd.safetensors");
    fs::write(&path, file(&header, &data)).unwrap();

    let checkpoint = Checkpoint::open_file(&path).unwrap();

    for kind in [Kind::Float, Kind::Half, Kind::Double, Kind::BFloat16] {
        let loaded = checkpoint.tensor("w", Some(kind), Device::Cpu).unwrap();
        assert!(loaded.equal(&stored.to_kind(kind)), "{kind:?}");
    }
    assert_eq!(checkpoint.dtype("w"), Some(Kind::BFloat16));
    assert_eq!(checkpoint.tensor("w", None, Device::Cpu).unwrap().kind(), Kind::BFloat16);
}

#[test]
fn bytes_that_are_no_bool_load_as_true() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("b.safetensors");
    let header =
        json!({ "b": { "dtype": "BOOL", "shape": [3], "data_offsets": [0, 3] } }).to_string();
    fs::write(&path, file(&header, &[0, 1, 7])).unwrap();

    let tensors = read_tensors(&path).unwrap();

    assert!(tensors[0].1.equal(&Tensor::from_slice(&[false, true, true])));
    let mut bytes = [9; 3];
    tensors[0].1.copy_data_u8(&mut bytes, 3);
    assert_eq!(bytes, [0, 1, 1]);
}

#[test]
fn parameters_that_need_gradients_are_written_and_cuda_is_read_and_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p.safetensors");
    for device in [Some(Device::Cpu), tch::Cuda::is_available().then_some(Device::Cuda(0))]
        .into_iter()
        .flatten()
    {
        let weight = Tensor::arange(600_000, (Kind::Float, device))
            .view([600, 1000])
            .set_requires_grad(true);
        let tensors = vec![
            ("t".to_owned(), weight.transpose(0, 1)),
            ("w".to_owned(), weight.shallow_clone()),
        ];

        write_tensors(&path, &tensors, &BTreeMap::new()).unwrap();

        let file = Checkpoint::open_file(&path).unwrap();
        for (name, tensor) in &tensors {
            let read = file.tensor(name, Some(Kind::Double), device).unwrap();
            assert_eq!(read.device(), device);
            assert!(read.equal(&tensor.to_kind(Kind::Double)));
            assert!(!read.requires_grad());
        }
    }
}

#[test]
fn a_folder_survives_a_round_trip() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("runs/model");
    let tensors = samples();
    let config = object(
        json!({ "zebra": 1, "model_type": "gpt2", "eps": 1e-5, "nested": { "b": null, "a": [1] } }),
    );
    let extra = [
        ("tokenizer.json".to_owned(), b"{}".to_vec()),
        ("onnx/notes.txt".to_owned(), b"n".to_vec()),
    ];

    write_folder(&dir, &tensors, &config, &extra, &WriteOptions::default()).unwrap();

    let checkpoint = Checkpoint::open(&dir).unwrap();
    assert_eq!(checkpoint.len(), tensors.len());
    assert!(checkpoint.names().eq(tensors.iter().map(|(name, _)| name.as_str())));
    for (name, tensor) in &tensors {
        assert_eq!(checkpoint.shape(name), Some(tensor.size().as_slice()));
        assert!(checkpoint.tensor(name, None, Device::Cpu).unwrap().equal(tensor), "{name}");
    }
    let read = read_json(&dir, "config.json").unwrap();
    assert!(read.keys().eq(config.keys()), "the order of the fields is kept");
    assert_eq!(read, config);
    assert_eq!(names(&dir), ["config.json", "model.safetensors", "onnx", "tokenizer.json"]);
    assert_eq!(fs::read(dir.join("onnx/notes.txt")).unwrap(), b"n");
    assert_eq!(names(dir.parent().unwrap()), ["model"]);
    assert!(!checkpoint.contains("nothing"));
    let error = checkpoint.tensor("nothing", None, Device::Cpu).unwrap_err();
    assert!(matches!(error, Error::NoSuchTensor { name, .. } if name == "nothing"));
}

#[test]
fn large_models_are_cut_into_shards_with_an_index() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("model");
    // 40, 40, 120, 0, 20 bytes: two fit in one shard, one is too large for any.
    let tensors: Tensors = [("e", 10), ("d", 10), ("c", 30), ("b", 0), ("a", 5)]
        .map(|(name, n)| (name.to_owned(), Tensor::arange(n, (Kind::Float, Device::Cpu))))
        .into();
    let options = WriteOptions { max_shard_bytes: Some(80), ..WriteOptions::default() };

    write_folder(&dir, &tensors, &Map::new(), &[], &options).unwrap();

    let shard = |i| format!("model-{i:05}-of-00003.safetensors");
    assert_eq!(
        names(&dir),
        [
            "config.json".to_owned(),
            shard(1),
            shard(2),
            shard(3),
            "model.safetensors.index.json".to_owned()
        ]
    );
    let index = Value::Object(read_json(&dir, "model.safetensors.index.json").unwrap());
    assert_eq!(
        index,
        json!({
            "metadata": { "total_parameters": 55, "total_size": 220 },
            "weight_map": { "a": shard(3), "b": shard(3), "c": shard(2), "d": shard(1), "e": shard(1) },
        })
    );
    let checkpoint = Checkpoint::open(&dir).unwrap();
    assert_eq!((checkpoint.total_bytes(), checkpoint.total_elements()), (220, 55));
    assert_eq!(checkpoint.file("c"), Some(dir.join(shard(2)).as_path()));
    for (name, tensor) in &tensors {
        assert!(checkpoint.tensor(name, None, Device::Cpu).unwrap().equal(tensor), "{name}");
    }
}

#[test]
fn a_model_that_just_fits_is_not_cut() {
    let root = tempfile::tempdir().unwrap();
    let tensors: Tensors = vec![("a".into(), Tensor::zeros([8], (Kind::Float, Device::Cpu)))];
    for (most, files) in [(32, 2), (31, 3)] {
        let dir = root.path().join(most.to_string());
        let tensors: Tensors = [tensors[0].0.clone() + "1", tensors[0].0.clone() + "2"]
            .map(|name| (name, tensors[0].1.narrow(0, 0, 4)))
            .into();
        let options = WriteOptions { max_shard_bytes: Some(most), ..WriteOptions::default() };
        write_folder(&dir, &tensors, &Map::new(), &[], &options).unwrap();
        assert_eq!(names(&dir).len(), files + usize::from(files == 3));
    }
}

#[test]
fn a_file_without_tensors_is_fine() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("none.safetensors");
    write_tensors(&path, &[], &BTreeMap::new()).unwrap();
    assert!(Checkpoint::open_file(&path).unwrap().is_empty());
}

#[test]
fn the_cache_layout_of_the_hub_is_read_through_its_links() {
    let root = tempfile::tempdir().unwrap();
    let (blobs, snapshot) = (root.path().join("blobs"), root.path().join("snapshots/0"));
    fs::create_dir_all(&blobs).unwrap();
    fs::create_dir_all(&snapshot).unwrap();
    for (blob, bytes, file) in [
        ("1", vectors(&[("a", 2)]), "s1.safetensors"),
        ("2", vectors(&[("b", 3), ("extra", 1)]), "s2.safetensors"),
        (
            "3",
            json!({ "weight_map": { "a": "s1.safetensors", "b": "s2.safetensors" } })
                .to_string()
                .into(),
            "model.safetensors.index.json",
        ),
    ] {
        fs::write(blobs.join(blob), bytes).unwrap();
        symlink(Path::new("../../blobs").join(blob), snapshot.join(file)).unwrap();
    }

    let checkpoint = Checkpoint::open(&snapshot).unwrap();

    // `extra` is in no index, yet in a file: strict loading must see it.
    assert!(checkpoint.names().eq(["a", "b", "extra"]));
    fs::remove_file(blobs.join("2")).unwrap();
    let error = Checkpoint::open(&snapshot).unwrap_err();
    assert!(matches!(error, Error::MissingShard { shard, .. } if shard == "s2.safetensors"));
}

// Hostile input.

#[test]
fn lengths_that_lie_are_refused_without_allocating_them() {
    let good = vectors(&[("w", 4)]);
    let claim = |n: u64| [&n.to_le_bytes()[..], &good[8..]].concat();
    let len = good.len() as u64;
    for (bytes, claimed) in [
        (vec![], 0),
        (good[..7].to_vec(), 0),
        (claim(u64::MAX), u64::MAX),
        (claim(u64::MAX - 7), u64::MAX - 7),
        (claim(1 << 62), 1 << 62),
        (claim(100_000_001), 100_000_001),
        (claim(len - 7), len - 7),
        (good[..20].to_vec(), u64::from_le_bytes(good[..8].try_into().unwrap())),
    ] {
        let error = refusal(&bytes);
        assert!(
            matches!(error, Error::HeaderLength { header_len, file_len, .. }
                if header_len == claimed && file_len == bytes.len() as u64),
            "{error}"
        );
        assert!(error.to_string().contains("model.safetensors"), "{error}");
    }
    // A huge file full of holes: what it claims is there, and too much all the same.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    fs::write(&path, (1_u64 << 39).to_le_bytes()).unwrap();
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(1 << 40).unwrap();
    assert!(matches!(Checkpoint::open(dir.path()), Err(Error::HeaderLength { .. })));
}

#[test]
fn what_is_not_a_header_is_refused() {
    let entry = r#""w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#;
    for (header, expected) in [
        ("", "EOF"),
        ("[]", "expected an object that maps tensor names"),
        ("{", "EOF"),
        ("{}{}", "trailing characters"),
        ("\0\0", "expected value"),
        (r#"{"w":1}"#, "in the entry `w`: invalid type: integer `1`"),
        (r#"{"w":{"dtype":"F32","shape":[1]}}"#, "in the entry `w`: missing field `data_offsets`"),
        (
            r#"{"w":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}"#,
            "in the entry `w`: invalid value: integer `-1`",
        ),
        (
            r#"{"w":{"dtype":"F32","shape":[1.5],"data_offsets":[0,4]}}"#,
            "in the entry `w`: invalid type: floating point",
        ),
        (
            r#"{"w":{"dtype":"F32","shape":[1],"data_offsets":[0]}}"#,
            "in the entry `w`: invalid length 1",
        ),
        (r#"{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4,8]}}"#, "in the entry `w`"),
        (
            r#"{"w":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#,
            "duplicate field `dtype`",
        ),
        (
            r#"{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,99999999999999999999999]}}"#,
            "in the entry `w`",
        ),
        (r#"{"__metadata__":{"a":1}}"#, "in the entry `__metadata__`"),
        (r#"{"__metadata__":{},"__metadata__":{}}"#, "duplicate field `__metadata__`"),
        (&format!("{{{}}}", r#""w":"#.to_owned() + &"[".repeat(5000)), "in the entry `w`"),
        (&format!("{{{entry},}}"), "trailing comma"),
    ] {
        let error = refusal(&file(header, &[0; 4]));
        let text = chain(&error);
        assert!(matches!(error, Error::Header { .. }), "{header}: {text}");
        assert!(text.contains(expected) && text.contains("model.safetensors"), "{header}: {text}");
    }
    let many_axes =
        json!({ "w": { "dtype": "F32", "shape": vec![1; 65], "data_offsets": [0, 4] } });
    assert!(chain(&refusal(&file(&many_axes.to_string(), &[0; 4]))).contains("at most 64 sizes"));
    let mut bytes = vectors(&[("w", 1)]);
    bytes[10] = 0xff;
    assert!(matches!(refusal(&bytes), Error::HeaderUtf8 { .. }));
}

#[test]
fn entries_that_cannot_be_are_refused_by_name() {
    use TensorProblem::{Backwards, Begin, Bytes, CutOff, Dtype, Shape, Twice};
    let entry = |dtype: &str, shape: &str, begin: u64, end: u64| {
        format!(r#"{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{begin},{end}]}}"#)
    };
    let first = entry("F32", "[2]", 0, 8);
    let max = u64::MAX;
    for (w, problem) in [
        (entry("F8_E4M3", "[8]", 8, 16), Dtype("F8_E4M3".into())),
        (entry("U64", "[1]", 8, 16), Dtype("U64".into())),
        (entry("f32", "[2]", 8, 16), Dtype("f32".into())),
        (entry("F32", "[9223372036854775808]", 8, 16), Shape(vec![1 << 63])),
        (entry("F32", "[4611686018427387904]", 8, 16), Shape(vec![1 << 62])),
        (entry("F32", "[4294967296,4294967296]", 8, 16), Shape(vec![1 << 32; 2])),
        (entry("F32", "[0,4611686018427387904,4]", 8, 8), Shape(vec![0, 1 << 62, 4])),
        (entry("F32", "[3]", 8, 16), Bytes { expected: 12, found: 8 }),
        (entry("F32", "[]", 8, 16), Bytes { expected: 4, found: 8 }),
        (entry("F32", "[2]", 8, max), Bytes { expected: 8, found: max - 8 }),
        (entry("F32", "[2]", 16, 8), Backwards(16, 8)),
        (entry("F32", "[2]", 4, 12), Begin { expected: 8, found: 4 }),
        (entry("F32", "[1]", 12, 16), Begin { expected: 8, found: 12 }),
        (entry("F32", "[2]", max - 8, max), Begin { expected: 8, found: max - 8 }),
        (entry("F32", "[4]", 8, 24), CutOff { end: 24, data_len: 16 }),
    ] {
        let error = refusal(&file(&format!(r#"{{"first":{first},"w":{w}}}"#), &[0; 16]));
        let Error::Tensor { name, path, problem: found } = &error else { panic!("{w}: {error}") };
        assert_eq!((name.as_str(), found), ("w", &problem), "{w}");
        assert!(path.ends_with("model.safetensors"));
        assert!(error.to_string().contains("tensor `w`"), "{error}");
    }
    let twice = refusal(&file(&format!(r#"{{"w":{first},"w":{first}}}"#), &[0; 8]));
    assert!(matches!(twice, Error::Tensor { name, problem: Twice, .. } if name == "w"));
    let trailing = refusal(&file(&format!(r#"{{"w":{first}}}"#), &[0; 9]));
    assert!(matches!(trailing, Error::Trailing { data_len: 9, end: 8, .. }), "{trailing}");
}

#[test]
fn a_file_cut_off_anywhere_is_refused() {
    let good = vectors(&[("a", 3), ("b", 2)]);
    for len in 0..good.len() {
        let error = refusal(&good[..len]);
        assert!(error.to_string().contains("model.safetensors"), "{error}");
    }
}

#[test]
fn names_from_a_file_cannot_steer_the_terminal() {
    let header = json!({ "w\u{1b}[2J\n": { "dtype": "x".repeat(10_000), "shape": [1], "data_offsets": [0, 4] } });
    let text = chain(&refusal(&file(&header.to_string(), &[0; 4])));
    assert!(!text.contains('\u{1b}') && !text.contains("\n\n") && text.len() < 1000, "{text}");
}

#[test]
fn mutated_files_never_panic() {
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({ "format": "pt" }));
    header.insert("a".into(), json!({ "dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24] }));
    header
        .insert("b".into(), json!({ "dtype": "BOOL", "shape": [0, 5], "data_offsets": [24, 24] }));
    header.insert("c".into(), json!({ "dtype": "BF16", "shape": [], "data_offsets": [24, 26] }));
    let good = file(&Value::Object(header).to_string(), &[7; 26]);
    const TOKENS: [&str; 14] = [
        "18446744073709551615",
        "9223372036854775807",
        "4611686018427387904",
        "-1",
        "0",
        "1e9",
        "\"",
        "[",
        "]",
        "}",
        "null",
        "\"F64\"",
        "{}",
        "__metadata__",
    ];
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    let mut n_accepted = 0;
    for _ in 0..4000 {
        let mut bytes = good.clone();
        for _ in 0..rng.random_range(1..4) {
            if bytes.is_empty() {
                break;
            }
            let at = rng.random_range(0..bytes.len());
            match rng.random_range(0..6) {
                0 => bytes[at] = rng.random(),
                1 => bytes[at] ^= 1 << rng.random_range(0..8),
                2 => bytes.truncate(at),
                3 => drop(bytes.drain(at..(at + rng.random_range(1..9)).min(bytes.len()))),
                4 => {
                    let token = TOKENS[rng.random_range(0..TOKENS.len())];
                    drop(bytes.splice(at..at, token.bytes()));
                }
                // A number of the header, replaced.
                _ => {
                    let Some(at) = (at..bytes.len()).find(|&i| bytes[i].is_ascii_digit()) else {
                        continue;
                    };
                    let end = (at..bytes.len())
                        .find(|&i| !bytes[i].is_ascii_digit())
                        .unwrap_or(bytes.len());
                    drop(bytes.splice(at..end, TOKENS[rng.random_range(0..6)].bytes()));
                }
            }
        }
        // Half of the time the length is made to fit again, so that the mutation reaches the parser.
        if bytes.len() >= 34 && rng.random() {
            let header_len = bytes.len() as u64 - 34;
            bytes[..8].copy_from_slice(&header_len.to_le_bytes());
        }
        fs::write(&path, &bytes).unwrap();
        if let Ok(tensors) = read_tensors(&path) {
            n_accepted += 1;
            let n_bytes: usize =
                tensors.iter().map(|(_, t)| t.numel() * t.kind().elt_size_in_bytes()).sum();
            assert!(n_bytes <= bytes.len());
        }
    }
    // The data, and names, may change: some must pass, most must not.
    assert!((50..2000).contains(&n_accepted), "{n_accepted} of 4000 accepted");
}

#[test]
fn an_index_that_leads_outside_is_refused() {
    for shard in
        ["../x.safetensors", "/etc/passwd", "a/../../x", "./x.safetensors", "", ".", "..", "a\0b"]
    {
        let dir = sharded(&json!({ "weight_map": { "w": shard } }), &[]);
        let error = Checkpoint::open(dir.path()).unwrap_err();
        assert!(
            matches!(&error, Error::ShardPath { name, shard: found, .. } if name == "w" && found == shard),
            "{shard}: {error}"
        );
    }
}

#[test]
fn an_index_that_disagrees_with_its_shards_is_refused() {
    let (one, two) = ("one.safetensors", "two.safetensors");
    let a = || vectors(&[("a", 2)]);
    let open = |index: Value, shards: &[(&str, Vec<u8>)]| {
        Checkpoint::open(sharded(&index, shards).path())
            .map(|c| c.len())
            .expect_err("accepted a wrong index")
    };

    let error = open(json!({ "weight_map": { "a": one, "b": two } }), &[(one, a())]);
    assert!(matches!(&error, Error::MissingShard { shard, .. } if shard == two), "{error}");
    let error = open(json!({ "weight_map": { "a": one, "b": one } }), &[(one, a())]);
    assert!(
        matches!(&error, Error::NotInShard { name, shard, .. } if name == "b" && shard == one),
        "{error}"
    );
    let error = open(
        json!({ "weight_map": { "a": one, "b": one } }),
        &[(one, a()), (two, vectors(&[("b", 1)]))],
    );
    assert!(matches!(&error, Error::NotInShard { name, .. } if name == "b"), "{error}");
    let error = open(
        json!({ "weight_map": { "a": two, "b": one } }),
        &[(one, a()), (two, vectors(&[("b", 1)]))],
    );
    assert!(
        matches!(&error, Error::NotInShard { name, shard, .. } if name == "a" && shard == two),
        "{error}"
    );
    let both = vectors(&[("a", 2), ("b", 1)]);
    let error = open(json!({ "weight_map": { "a": one, "b": two } }), &[(one, a()), (two, both)]);
    let Error::TwoShards { name, first, second } = &error else { panic!("{error}") };
    assert!(name == "a" && first.ends_with(one) && second.ends_with(two));

    for (index, expected) in [
        (json!({}), "missing field `weight_map`"),
        (json!({ "weight_map": [] }), "expected an object"),
        (json!({ "weight_map": { "a": 1 } }), "invalid type: integer `1`"),
        (json!([]), "line 1"),
    ] {
        let error = open(index, &[]);
        let text = chain(&error);
        assert!(matches!(error, Error::Json { .. }) && text.contains(expected), "{text}");
    }
    let dir = tempfile::tempdir().unwrap();
    let text = r#"{"weight_map": {"a": "one", "a": "two"}}"#;
    fs::write(dir.path().join("model.safetensors.index.json"), text).unwrap();
    let error = Checkpoint::open(dir.path()).unwrap_err();
    assert!(
        matches!(error, Error::Tensor { name, problem: TensorProblem::Twice, .. } if name == "a")
    );
}

#[test]
fn folders_without_safetensors_say_what_to_do() {
    let root = tempfile::tempdir().unwrap();
    let open = |files: &[&str]| {
        let dir = tempfile::tempdir_in(root.path()).unwrap();
        files.iter().for_each(|file| fs::write(dir.path().join(file), "x").unwrap());
        Checkpoint::open(dir.path()).map(|c| c.len()).expect_err("opened a folder without weights")
    };

    let error = open(&["config.json", "pytorch_model.bin"]);
    assert!(
        matches!(&error, Error::Pickled { file, .. } if file == "pytorch_model.bin"),
        "{error}"
    );
    assert!(error.to_string().contains("hint: convert"), "{error}");
    assert!(matches!(open(&["pytorch_model.bin.index.json"]), Error::Pickled { .. }));
    let error = open(&["config.json"]);
    assert!(matches!(&error, Error::NoWeights { found, .. } if found.is_empty()), "{error}");
    let error = open(&["adapter_model.safetensors"]);
    assert!(error.to_string().contains("only `adapter_model.safetensors`"), "{error}");

    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n";
    assert!(matches!(refusal(pointer), Error::LfsPointer { .. }));

    let missing = root.path().join("missing");
    assert!(matches!(Checkpoint::open(&missing), Err(Error::Io { path, .. }) if path == missing));
    let file = root.path().join("file");
    fs::write(&file, "x").unwrap();
    assert!(matches!(Checkpoint::open(&file), Err(Error::FileType { expected: "folder", .. })));
    assert!(matches!(
        Checkpoint::open_file(root.path()),
        Err(Error::FileType { expected: "file", .. })
    ));
    let dir = root.path().join("odd");
    fs::create_dir_all(dir.join("model.safetensors")).unwrap();
    assert!(matches!(Checkpoint::open(&dir), Err(Error::FileType { expected: "file", .. })));
}

#[test]
fn json_errors_name_file_line_and_column() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), "{\n  \"a\": 1,\n  \"b\": oops\n}").unwrap();

    let text = read_json(dir.path(), "config.json").unwrap_err().to_string();

    assert!(text.contains("config.json`, line 3, column 8"), "{text}");
    fs::write(dir.path().join("config.json"), "[1]").unwrap();
    let error = read_json(dir.path(), "config.json").unwrap_err();
    assert!(chain(&error).contains("expected a map"), "{}", chain(&error));
    assert!(
        matches!(read_json(dir.path(), "none.json"), Err(Error::Io { path, .. }) if path.ends_with("none.json"))
    );
    let big = dir.path().join("big.json");
    fs::File::create(&big).unwrap().set_len(1 << 40).unwrap();
    assert!(matches!(read_json(dir.path(), "big.json"), Err(Error::TooLong { .. })));
}

// Replacing.

fn constant(value: f64) -> Tensors {
    ["a", "b", "c"]
        .map(|name| (name.to_owned(), Tensor::full([300, 300], value, (Kind::Float, Device::Cpu))))
        .into()
}

#[test]
fn replacing_a_folder_keeps_foreign_files_and_drops_old_weights() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("model");
    let shards = WriteOptions { max_shard_bytes: Some(400_000), ..WriteOptions::default() };
    write_folder(&dir, &constant(1.), &object(json!({ "v": 1 })), &[], &shards).unwrap();
    assert_eq!(names(&dir).len(), 5);
    for file in ["tokenizer.json", "model_card.md", "vocab.txt"] {
        fs::write(dir.join(file), file).unwrap();
    }
    fs::create_dir_all(dir.join("logs/deep")).unwrap();
    fs::write(dir.join("logs/deep/model.safetensors"), "not ours").unwrap();
    symlink("tokenizer.json", dir.join("link")).unwrap();
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o750)).unwrap();
    fs::set_permissions(dir.join("logs"), fs::Permissions::from_mode(0o700)).unwrap();
    let mapped = Checkpoint::open(&dir).unwrap();

    let extra =
        [("vocab.txt".to_owned(), b"new".to_vec()), ("logs/new.txt".to_owned(), b"new".to_vec())];
    write_folder(&dir, &constant(2.), &object(json!({ "v": 2 })), &extra, &WriteOptions::default())
        .unwrap();

    assert_eq!(
        names(&dir),
        [
            "config.json",
            "link",
            "logs",
            "model.safetensors",
            "model_card.md",
            "tokenizer.json",
            "vocab.txt"
        ]
    );
    let read = |file: &str| fs::read_to_string(dir.join(file)).unwrap();
    assert_eq!(read("tokenizer.json"), "tokenizer.json");
    assert_eq!(read("link"), "tokenizer.json");
    assert_eq!(read("vocab.txt"), "new");
    assert_eq!(
        (read("logs/deep/model.safetensors"), read("logs/new.txt")),
        ("not ours".into(), "new".into())
    );
    let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
    assert_eq!((mode(&dir), mode(&dir.join("logs"))), (0o750, 0o700));
    assert_same(&read_tensors(&dir.join("model.safetensors")).unwrap(), &constant(2.));
    // Who had the old folder open still has its weights.
    assert!(mapped.tensor("b", None, Device::Cpu).unwrap().equal(&constant(1.)[1].1));
    assert_eq!(names(root.path()), ["model"]);
}

#[test]
fn a_folder_without_new_weights_keeps_the_old_ones() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("model");
    write_folder(&dir, &constant(1.), &object(json!({ "v": 1 })), &[], &WriteOptions::default())
        .unwrap();

    let folder = FolderWriter::create(&dir).unwrap();
    folder.json("config.json", &object(json!({ "v": 2 }))).unwrap();
    folder.tensors("optimizer.safetensors", &constant(3.), &BTreeMap::new()).unwrap();
    folder.commit().unwrap();

    assert_eq!(names(&dir), ["config.json", "model.safetensors", "optimizer.safetensors"]);
    assert_eq!(read_json(&dir, "config.json").unwrap()["v"], 2);
    assert_same(&read_tensors(&dir.join("model.safetensors")).unwrap(), &constant(1.));
    assert_same(&read_tensors(&dir.join("optimizer.safetensors")).unwrap(), &constant(3.));
}

#[test]
fn links_to_a_folder_and_to_a_file_stay_links() {
    let root = tempfile::tempdir().unwrap();
    let (real, link) = (root.path().join("disk/real"), root.path().join("link"));
    fs::create_dir_all(&real).unwrap();
    symlink(&real, &link).unwrap();
    write_folder(&link, &constant(1.), &Map::new(), &[], &WriteOptions::default()).unwrap();
    assert!(link.symlink_metadata().unwrap().is_symlink());
    assert_eq!(names(&real), ["config.json", "model.safetensors"]);

    let file = root.path().join("file.safetensors");
    symlink(real.join("model.safetensors"), &file).unwrap();
    write_tensors(&file, &constant(2.), &BTreeMap::new()).unwrap();
    assert!(file.symlink_metadata().unwrap().is_symlink());
    assert_same(&read_tensors(&real.join("model.safetensors")).unwrap(), &constant(2.));
}

#[test]
fn permissions_are_those_of_any_new_file() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("model");
    write_folder(
        &dir,
        &constant(1.),
        &Map::new(),
        &[("x/y".into(), vec![])],
        &WriteOptions::default(),
    )
    .unwrap();
    write_tensors(&dir.join("more.safetensors"), &constant(1.), &BTreeMap::new()).unwrap();
    fs::write(root.path().join("usual"), "").unwrap();
    fs::create_dir(root.path().join("usual_dir")).unwrap();

    let mode = |path: &str| fs::metadata(root.path().join(path)).unwrap().mode() & 0o7777;
    for file in
        ["model/model.safetensors", "model/config.json", "model/x/y", "model/more.safetensors"]
    {
        assert_eq!(mode(file), mode("usual"), "{file}");
    }
    assert_eq!([mode("model"), mode("model/x")], [mode("usual_dir"); 2]);
}

#[test]
fn what_cannot_be_written_is_refused_and_leaves_nothing() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("model");
    let options = WriteOptions::default();
    let a = || ("a".to_owned(), Tensor::zeros([2], (Kind::Float, Device::Cpu)));
    let named = |name: &str, kind| (name.to_owned(), Tensor::zeros([2], (kind, Device::Cpu)));
    let write = |tensors: &Tensors, extra: &[(String, Vec<u8>)]| {
        write_folder(&dir, tensors, &Map::new(), extra, &options)
            .expect_err("wrote what it cannot write")
    };

    assert!(matches!(write(&vec![a(), a()], &[]), Error::TensorName { name, .. } if name == "a"));
    assert!(matches!(
        write(&vec![named("__metadata__", Kind::Float)], &[]),
        Error::TensorName { .. }
    ));
    let complex = write(&vec![a(), named("z", Kind::ComplexFloat)], &[]);
    assert!(
        matches!(&complex, Error::Kind { name, kind } if name == "z" && kind == "ComplexFloat"),
        "{complex}"
    );
    assert!(
        matches!(write(&vec![("u".into(), Tensor::new())], &[]), Error::Torch { name, .. } if name == "u")
    );
    for file in ["../x", "/x", "", "config.json", "model.safetensors"] {
        let error = write(&vec![a()], &[(file.to_owned(), vec![])]);
        assert!(matches!(&error, Error::FileName { file: found, .. } if found == file), "{error}");
    }
    assert_eq!(names(root.path()), [""; 0]);

    fs::write(&dir, "a file").unwrap();
    assert!(
        matches!(write(&vec![a()], &[]), Error::FileType { path, expected: "folder" } if path == dir)
    );
    assert_eq!(fs::read(&dir).unwrap(), b"a file");
    let error = write_tensors(root.path(), &[a()], &BTreeMap::new()).unwrap_err();
    assert!(matches!(error, Error::FileType { expected: "file", .. }), "{error}");
    let error = write_tensors(&dir.join("x"), &[a()], &BTreeMap::new()).unwrap_err();
    assert!(matches!(&error, Error::Io { path, .. } if *path == dir), "{error}");
    assert_eq!(names(root.path()), ["model"]);
}

#[test]
#[expect(clippy::print_stderr, reason = "a test that is skipped says so")]
fn a_lack_of_permission_names_the_folder() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("model");
    write_folder(&dir, &constant(1.), &Map::new(), &[], &WriteOptions::default()).unwrap();
    let set_mode =
        |mode| fs::set_permissions(root.path(), fs::Permissions::from_mode(mode)).unwrap();
    set_mode(0o555);
    if fs::write(root.path().join("probe"), "").is_ok() {
        set_mode(0o755);
        eprintln!("SKIPPED: this user may write anywhere");
        return;
    }

    let errors = [
        write_folder(&dir, &constant(2.), &Map::new(), &[], &WriteOptions::default()),
        write_folder(
            &root.path().join("new"),
            &constant(2.),
            &Map::new(),
            &[],
            &WriteOptions::default(),
        ),
        write_tensors(&root.path().join("x.safetensors"), &constant(2.), &BTreeMap::new()),
    ];

    set_mode(0o755);
    let real = root.path().canonicalize().unwrap();
    for error in errors {
        let error = error.unwrap_err();
        let Error::Io { path, source, .. } = &error else { panic!("{error}") };
        assert_eq!(source.kind(), std::io::ErrorKind::PermissionDenied);
        assert!([root.path(), &real].contains(&path.as_path()), "{error}");
    }
    assert_same(&read_tensors(&dir.join("model.safetensors")).unwrap(), &constant(1.));
}

#[test]
fn the_working_folder_is_not_replaced() {
    let error =
        write_folder(Path::new("."), &[], &Map::new(), &[], &WriteOptions::default()).unwrap_err();
    assert!(matches!(error, Error::WorkingFolder { .. }), "{error}");
}

// Children: this test binary, started again for one test of those below, which do nothing otherwise.

const CHILD: &str = "ATTN_CHECKPOINT_TEST_DIR";

fn child_dir() -> Option<PathBuf> {
    std::env::var_os(CHILD).map(PathBuf::from)
}

/// The command that runs the child test `name` in `dir`, after `shell`, which may set limits.
fn child(name: &str, dir: &Path, shell: &str) -> Command {
    let mut command = Command::new("sh");
    command
        .args(["-c", &format!("{shell} exec \"$0\" \"$@\"")])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", name, "--ignored", "--nocapture", "--test-threads=1"])
        .env(CHILD, dir);
    command
}

#[test]
#[ignore = "runs as a child of `a_kill_leaves_the_old_folder_or_the_new_one`"]
fn child_writes_until_killed() {
    let Some(dir) = child_dir() else { return };
    let begin = Instant::now();
    // Ends by itself, should its parent have died.
    for version in (1..).take_while(|_| begin.elapsed() < Duration::from_secs(60)) {
        // Shards in every other version, so that a mixture would show.
        let max_shard_bytes = (version % 2 == 0).then_some(400_000);
        let options = WriteOptions { max_shard_bytes, ..WriteOptions::default() };
        let config = object(json!({ "version": version }));
        write_folder(&dir.join("model"), &constant(f64::from(version)), &config, &[], &options)
            .unwrap();
    }
}

#[test]
fn a_kill_leaves_the_old_folder_or_the_new_one() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("model");
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("tokenizer.json"), "kept").unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    for _ in 0..8 {
        let _ = fs::remove_file(dir.join("config.json"));
        let mut process = child("child_writes_until_killed", root.path(), "")
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let begin = Instant::now();
        while !dir.join("config.json").exists() && begin.elapsed() < Duration::from_secs(60) {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_micros(rng.random_range(0..40_000)));
        process.kill().unwrap();
        process.wait().unwrap();

        let version = read_json(&dir, "config.json").unwrap()["version"].as_f64().unwrap();
        let checkpoint = Checkpoint::open(&dir).unwrap();
        assert!(checkpoint.names().eq(["a", "b", "c"]));
        for (name, expected) in constant(version) {
            let found = checkpoint.tensor(&name, None, Device::Cpu).unwrap();
            assert!(found.equal(&expected), "{name} is not of version {version}");
        }
        assert_eq!(fs::read(dir.join("tokenizer.json")).unwrap(), b"kept");
        let n_weights = names(&dir).iter().filter(|name| name.ends_with(".safetensors")).count();
        assert_eq!(n_weights, if version as i64 % 2 == 0 { 3 } else { 1 });
    }
}

#[test]
fn a_folder_being_replaced_is_there_at_every_moment() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("model");
    let write = |version: i32| {
        let config = object(json!({ "version": version }));
        write_folder(&dir, &constant(f64::from(version)), &config, &[], &WriteOptions::default())
            .unwrap();
    };
    write(0);
    let (mut n_looks, mut n_gone) = (0, 0);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| (1..40).for_each(write));
        while !writer.is_finished() {
            n_looks += 1;
            n_gone += u32::from(!dir.is_dir());
        }
    });
    assert!(n_looks > 1000, "looked {n_looks} times only");
    assert_eq!(n_gone, 0, "of {n_looks} looks");
}

#[test]
#[ignore = "runs as a child of `a_full_disk_names_the_file_and_changes_nothing`"]
fn child_meets_a_full_disk() {
    let Some(dir) = child_dir() else { return };
    let options = WriteOptions::default();
    let error =
        write_folder(&dir.join("model"), &constant(2.), &Map::new(), &[], &options).unwrap_err();
    let expected = dir.join("model/model.safetensors");
    assert!(
        matches!(&error, Error::Io { doing: "write", path, .. } if *path == expected),
        "{}",
        chain(&error)
    );
    let file = dir.join("file.safetensors");
    let error = write_tensors(&file, &constant(2.), &BTreeMap::new()).unwrap_err();
    assert!(
        matches!(&error, Error::Io { doing: "write", path, .. } if *path == file),
        "{}",
        chain(&error)
    );
}

#[test]
fn a_full_disk_names_the_file_and_changes_nothing() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("model");
    write_folder(&dir, &constant(1.), &Map::new(), &[], &WriteOptions::default()).unwrap();
    write_tensors(&root.path().join("file.safetensors"), &constant(1.), &BTreeMap::new()).unwrap();

    // A limit on the size of files stands in for a full disk: the system refuses the same calls.
    let status = child("child_meets_a_full_disk", root.path(), "trap '' XFSZ; ulimit -f 256;")
        .status()
        .unwrap();

    assert!(status.success());
    assert_eq!(names(root.path()), ["file.safetensors", "model"]);
    assert_eq!(names(&dir), ["config.json", "model.safetensors"]);
    for path in [dir.join("model.safetensors"), root.path().join("file.safetensors")] {
        assert_same(&read_tensors(&path).unwrap(), &constant(1.));
    }
}

/// MiB that `key` of this process's status says.
fn status_mib(key: &str) -> f64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(key)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() / 1024.
}

#[test]
#[ignore = "runs as a child of `loading_takes_little_more_than_the_weights`"]
fn child_loads() {
    let Some(dir) = child_dir() else { return };
    let path = dir.join("model.safetensors");
    // What LibTorch takes to start is not part of the matter.
    drop(
        Tensor::ones([1024, 1024], (Kind::Half, Device::Cpu)).to_kind(Kind::Float).sum(Kind::Float),
    );
    let before = status_mib("VmRSS");
    let checkpoint = Checkpoint::open_file(&path).unwrap();
    let load = |name: &str| checkpoint.tensor(name, Some(Kind::Float), Device::Cpu).unwrap();
    let loaded: Vec<Tensor> = checkpoint.names().map(load).collect();
    let largest = loaded.iter().map(Tensor::numel).max().unwrap();
    let n: usize = loaded.iter().map(Tensor::numel).sum();
    let mib = |n: usize| n as f64 * 4. / 1024. / 1024.;
    let taken = status_mib("VmHWM") - before;
    assert!(taken > 0.9 * mib(n), "{taken} MiB is less than the weights: the measure is wrong");
    assert!(taken < 1.1 * mib(n) + mib(largest), "{taken} MiB taken for {} MiB of weights", mib(n));
}

#[test]
#[cfg(target_os = "linux")]
fn loading_takes_little_more_than_the_weights() {
    for kind in [Kind::Half, Kind::Float, Kind::Double] {
        let dir = tempfile::tempdir().unwrap();
        // Names out of the order of the data, and small tensors between large ones.
        let tensors: Tensors = (0..96)
            .map(|i| {
                let n = if i % 2 == 0 { 500_000 } else { 700 };
                (
                    format!("{:03}.weight", i * 37 % 96),
                    Tensor::full([n], f64::from(i), (kind, Device::Cpu)),
                )
            })
            .collect();
        write_tensors(&dir.path().join("model.safetensors"), &tensors, &BTreeMap::new()).unwrap();
        let status = child("child_loads", dir.path(), "").status().unwrap();
        assert!(status.success(), "stored in {kind:?}");
    }
}
