//! Downloads against a Hub in this process: what arrives, what is asked for, and what is said when it fails.

mod common;

use std::{
    fs,
    path::Path,
    sync::{Arc, Mutex},
    thread,
};

use attn_data::{
    Error,
    hub::{Hub, HubConfig, Progress, RepoKind, resolve_model},
};
use common::{COMMIT, Faults, Server};
use tempfile::TempDir;

const MODEL: RepoKind = RepoKind::Model;

fn start() -> (Server, TempDir) {
    let server = Server::start();
    server.put("o/m", "config.json", b"{\"model_type\": \"gpt2\"}").put_large(
        "o/m",
        "model.safetensors",
        [7; 5000],
    );
    (server, tempfile::tempdir().unwrap())
}

/// Names of everything in the repository's folder of contents.
fn blobs(cache: &Path) -> Vec<String> {
    let entries = fs::read_dir(cache.join("models--o--m/blobs")).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

fn message(error: &Error) -> String {
    let mut out = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        out += &format!("\ncaused by: {cause}");
        source = cause.source();
    }
    out
}

#[test]
fn files_arrive_in_the_layout_that_the_python_library_uses() {
    let (server, cache) = start();
    let hub = server.hub(cache.path());

    let small = hub.file(MODEL, "o/m", "config.json", None).unwrap();
    let large = hub.file(MODEL, "o/m", "model.safetensors", None).unwrap();

    let repo = cache.path().join("models--o--m");
    assert_eq!(small, repo.join("snapshots").join(COMMIT).join("config.json"));
    assert_eq!(fs::read(&small).unwrap(), b"{\"model_type\": \"gpt2\"}");
    assert_eq!(fs::read(&large).unwrap(), [7; 5000]);
    assert_eq!(fs::read_to_string(repo.join("refs/main")).unwrap(), COMMIT);
    let mut names = blobs(cache.path());
    names.sort_by_key(String::len);
    assert_eq!(names.iter().map(String::len).collect::<Vec<_>>(), [40, 64]);
    assert!(small.is_symlink() && large.is_symlink());
    assert!(walk(&cache.path().join(".locks")).iter().all(|name| !name.ends_with(".unchecked")));
}

fn walk(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .flat_map(|entry| match entry.path().is_dir() {
            true => walk(&entry.path()),
            false => vec![entry.path().to_string_lossy().into_owned()],
        })
        .collect()
}

#[test]
fn a_pinned_commit_in_the_cache_needs_no_request_and_a_branch_one() {
    let (server, cache) = start();
    server.hub(cache.path()).model_folder("o/m", Some(COMMIT)).unwrap();
    server.requests();

    let pinned = server.hub(cache.path());
    pinned.file(MODEL, "o/m", "config.json", Some(COMMIT)).unwrap();
    pinned.model_folder("o/m", Some(COMMIT)).unwrap();
    assert_eq!(server.requests().len(), 0);

    let branch = server.hub(cache.path());
    branch.file(MODEL, "o/m", "config.json", None).unwrap();
    branch.model_folder("o/m", None).unwrap();
    let requests = server.requests();
    assert_eq!(requests.len(), 1, "{requests:?}");
    assert!(requests[0].path.starts_with("/api/models/o/m/revision/main"));
}

#[test]
fn a_branch_is_remembered_where_only_its_commit_was_fetched() {
    let (server, cache) = start();
    server.hub(cache.path()).file(MODEL, "o/m", "config.json", Some(COMMIT)).unwrap();
    server.hub(cache.path()).file(MODEL, "o/m", "config.json", None).unwrap();

    let offline = Hub::new(HubConfig { offline: true, ..server.config(cache.path()) });

    assert!(offline.file(MODEL, "o/m", "config.json", Some("main")).unwrap().is_file());
}

#[test]
fn a_token_is_sent_with_every_request_and_none_without_one() {
    let (server, cache) = start();
    let token = Some("hf_secret".to_string());
    let hub = Hub::new(HubConfig { token, ..server.config(cache.path()) });

    hub.file(MODEL, "o/m", "config.json", None).unwrap();
    let with = server.requests();
    server
        .hub(tempfile::tempdir().unwrap().path())
        .file(MODEL, "o/m", "config.json", None)
        .unwrap();
    let without = server.requests();

    assert_eq!((with.len(), without.len()), (3, 3)); // the list of files, the description, the content
    assert!(with.iter().all(|request| request.headers["authorization"] == "Bearer hf_secret"));
    assert!(without.iter().all(|request| !request.headers.contains_key("authorization")));
}

#[test]
fn what_does_not_exist_is_told_apart() {
    let (server, cache) = start();
    let hub = server.hub(cache.path());

    let repo = hub.file(MODEL, "o/none", "config.json", None).unwrap_err();
    let revision = hub.file(MODEL, "o/m", "config.json", Some("v9")).unwrap_err();
    let file = hub.file(MODEL, "o/m", "vocab.txt", None).unwrap_err();
    let pinned =
        server.hub(cache.path()).file(MODEL, "o/m", "vocab.txt", Some(COMMIT)).unwrap_err();

    assert!(matches!(repo, Error::RepoNotFound { .. }), "{repo:?}");
    assert!(matches!(revision, Error::RevisionNotFound { .. }), "{revision:?}");
    assert!(matches!(file, Error::FileNotFound { .. }), "{file:?}");
    assert!(matches!(pinned, Error::FileNotFound { .. }), "{pinned:?}");
    assert!(message(&repo).contains("model `o/none`"));
    assert!(message(&revision).contains("no revision `v9`"));
    assert!(message(&file).contains("no file `vocab.txt` at revision `main`"));
}

#[test]
fn a_refusal_says_where_to_accept_the_licence() {
    let (server, cache) = start();
    for (status, code) in [(401, "GatedRepo"), (403, "GatedRepo")] {
        server.set(Faults { refuse_files: Some((status, code)), ..Faults::default() });
        let error = server.hub(cache.path()).file(MODEL, "o/m", "config.json", None).unwrap_err();

        let text = message(&error);
        assert!(
            matches!(error, Error::Refused { status: found, token_sent: false, .. } if found == status)
        );
        assert!(
            text.contains(&format!("{}/o/m", server.endpoint())) && text.contains("HF_TOKEN"),
            "{text}"
        );
    }
}

#[test]
fn a_changed_content_is_reported_and_deleted() {
    let (server, cache) = start();
    for (file, wrong, algorithm) in [
        ("model.safetensors", vec![8; 5000], "sha256"),
        ("config.json", b"{\"model_type\": \"gptX\"}".to_vec(), "git"),
    ] {
        server.set(Faults { replace: Some(wrong), ..Faults::default() });
        let hub = server.hub(cache.path());

        let error = hub.file(MODEL, "o/m", file, None).unwrap_err();

        let text = message(&error);
        let Error::HashMismatch { expected, found, .. } = &error else { panic!("{error:?}") };
        assert!(
            text.contains(file)
                && text.contains(expected)
                && text.contains(found)
                && text.contains(algorithm)
        );
        assert_ne!(expected, found);
        assert_eq!(blobs(cache.path()), Vec::<String>::new());
        assert!(!cache.path().join("models--o--m/snapshots").join(COMMIT).join(file).is_symlink());

        server.set(Faults::default());
        hub.file(MODEL, "o/m", file, None).unwrap();
        fs::remove_dir_all(cache.path().join("models--o--m")).unwrap();
    }
}

#[test]
fn an_error_page_in_place_of_the_content_is_not_taken_for_it() {
    let (server, cache) = start();
    server.set(Faults { refuse_content: Some(403), ..Faults::default() });

    let error = server.hub(cache.path()).file(MODEL, "o/m", "model.safetensors", None).unwrap_err();

    assert!(matches!(error, Error::HashMismatch { .. }), "{error:?}");
    assert_eq!(blobs(cache.path()), Vec::<String>::new());
}

#[test]
fn a_connection_that_breaks_once_is_tried_again() {
    let (server, cache) = start();
    server.set(Faults { cut: Some((1234, 1)), ..Faults::default() });

    let path = server.hub(cache.path()).file(MODEL, "o/m", "model.safetensors", None).unwrap();

    assert_eq!(fs::read(path).unwrap(), [7; 5000]);
}

#[test]
fn a_connection_that_always_breaks_leaves_no_file() {
    let (server, cache) = start();
    server.set(Faults { cut: Some((1234, usize::MAX)), ..Faults::default() });
    let hub = server.hub(cache.path());

    let error = hub.file(MODEL, "o/m", "model.safetensors", None).unwrap_err();

    assert!(matches!(error, Error::Unreachable { .. } | Error::Hub { .. }), "{error:?}");
    assert!(
        !cache
            .path()
            .join("models--o--m/snapshots")
            .join(COMMIT)
            .join("model.safetensors")
            .exists()
    );
    assert!(blobs(cache.path()).iter().all(|name| name.ends_with(".incomplete")));

    server.set(Faults::default());
    assert_eq!(
        fs::read(hub.file(MODEL, "o/m", "model.safetensors", None).unwrap()).unwrap(),
        [7; 5000]
    );
}

#[test]
fn offline_opens_no_socket() {
    let (server, cache) = start();
    server.hub(cache.path()).file(MODEL, "o/m", "config.json", None).unwrap();
    server.requests();
    let hub = Hub::new(HubConfig { offline: true, ..server.config(cache.path()) });

    let cached = hub.file(MODEL, "o/m", "config.json", None).unwrap();
    let files = hub.list_files(MODEL, "o/m", None).unwrap();
    let missing = hub.file(MODEL, "o/m", "model.safetensors", None).unwrap_err();
    let pinned = hub.file(MODEL, "o/m", "model.safetensors", Some(COMMIT)).unwrap_err();
    let folder = hub.model_folder("o/m", None).unwrap_err();
    let unknown = hub.list_files(MODEL, "o/other", None).unwrap_err();

    assert!(cached.is_file());
    assert_eq!(files, ["config.json"]);
    for error in [missing, pinned, folder, unknown] {
        assert!(matches!(error, Error::NotCached { .. }), "{error:?}");
        let text = message(&error);
        assert!(
            text.contains("HF_HUB_OFFLINE") && text.contains(cache.path().to_str().unwrap()),
            "{text}"
        );
    }
    assert!(hub.config_folder("o/m", None).unwrap().join("config.json").is_file());
    assert_eq!(server.requests().len(), 0);
}

#[test]
fn without_a_network_the_cache_serves_and_what_it_lacks_is_named() {
    let (server, cache) = start();
    server.hub(cache.path()).file(MODEL, "o/m", "config.json", None).unwrap();
    let config = server.config(cache.path());
    drop(server);
    let hub = Hub::new(config);

    assert!(hub.file(MODEL, "o/m", "config.json", None).unwrap().is_file());
    assert_eq!(hub.list_files(MODEL, "o/m", None).unwrap(), ["config.json"]);
    let error = hub.file(MODEL, "o/n", "config.json", None).unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error:?}");
    assert!(message(&error).contains("hint: check the network"));
}

#[test]
fn an_answer_that_is_no_list_of_files_is_an_error() {
    let (server, cache) = start();
    server.set(Faults { refuse_api: Some(200), ..Faults::default() });

    let error = server.hub(cache.path()).list_files(MODEL, "o/m", None).unwrap_err();

    assert!(matches!(error, Error::Hub { .. }), "{error:?}");
}

#[test]
fn a_repository_that_moved_is_followed() {
    let (server, cache) = start();
    server.move_repo("old/m", "o/m");

    let path = server.hub(cache.path()).file(MODEL, "old/m", "config.json", None).unwrap();

    assert_eq!(fs::read(path).unwrap(), b"{\"model_type\": \"gpt2\"}");
}

#[test]
fn a_download_that_nobody_checked_is_checked_before_use() {
    let (server, cache) = start();
    let hub = server.hub(cache.path());
    let path = hub.file(MODEL, "o/m", "model.safetensors", None).unwrap();
    // As a process leaves it that was killed between the download and its check.
    let blob = fs::canonicalize(&path).unwrap();
    fs::write(&blob, [9; 5000]).unwrap();
    let marks = cache.path().join(".locks/models--o--m");
    fs::create_dir_all(&marks).unwrap();
    fs::write(marks.join(format!("{COMMIT}--model.safetensors.unchecked")), b"").unwrap();

    let offline = Hub::new(HubConfig { offline: true, ..server.config(cache.path()) });
    let error = offline.file(MODEL, "o/m", "model.safetensors", None).unwrap_err();

    assert!(matches!(error, Error::HashMismatch { .. }), "{error:?}");
    assert!(!blob.exists());
    assert_eq!(
        fs::read(hub.file(MODEL, "o/m", "model.safetensors", None).unwrap()).unwrap(),
        [7; 5000]
    );
}

#[test]
fn content_that_another_revision_left_unchecked_is_checked() {
    let (server, cache) = start();
    server.put_at("o/m", "v2", "copy.safetensors", [7; 5000], true);
    let hub = server.hub(cache.path());
    let path = hub.file(MODEL, "o/m", "model.safetensors", None).unwrap();
    fs::write(fs::canonicalize(&path).unwrap(), [9; 5000]).unwrap();
    let marks = cache.path().join(".locks/models--o--m");
    fs::write(marks.join(format!("{COMMIT}--model.safetensors.unchecked")), b"").unwrap();

    // The same content under another name: nothing is fetched, the blob is there.
    let error = hub.file(MODEL, "o/m", "copy.safetensors", Some("v2")).unwrap_err();

    assert!(matches!(error, Error::HashMismatch { .. }), "{error:?}");
}

#[test]
fn a_hub_serves_several_threads() {
    fn shared<T: Send + Sync>() {}
    fn sent<T: Send>() {}
    shared::<Hub>();
    shared::<attn_data::tokenizer::TextTokenizer>();
    sent::<attn_data::dataset::Rows>();
}

#[test]
fn a_model_folder_has_the_config_the_tokenizer_and_every_shard() {
    let (server, cache) = start();
    let index = r#"{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}"#;
    server
        .put("o/big", "config.json", b"{}")
        .put("o/big", "README.md", b"not needed")
        .put("o/big", "tokenizer.json", b"{}")
        .put("o/big", "pytorch_model.bin", b"not needed")
        .put("o/big", "model.safetensors.index.json", index)
        .put_large("o/big", "model-00001-of-00002.safetensors", [1; 10])
        .put_large("o/big", "model-00002-of-00002.safetensors", [2; 10]);
    let hub = server.hub(cache.path());

    let folder = hub.model_folder("o/big", None).unwrap();

    let mut names: Vec<_> = fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(
        names,
        [
            "config.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
            "tokenizer.json",
        ]
    );
    assert_eq!(resolve_model(&hub, "o/big", None).unwrap(), folder);
}

#[test]
fn weights_that_are_not_there_or_point_elsewhere_are_refused() {
    let (server, cache) = start();
    server.put("o/old", "config.json", b"{}").put("o/old", "pytorch_model.bin", b"x");
    server.put("o/evil", "config.json", b"{}");
    server.put(
        "o/evil",
        "model.safetensors.index.json",
        br#"{"weight_map": {"a": "../../../../evil"}}"#,
    );
    server.put("o/odd", "config.json", b"{}").put("o/odd", "model.safetensors.index.json", b"[]");
    let hub = server.hub(cache.path());

    let old = hub.model_folder("o/old", None).unwrap_err();
    let evil = hub.model_folder("o/evil", None).unwrap_err();
    let odd = hub.model_folder("o/odd", None).unwrap_err();

    assert!(
        matches!(&old, Error::NoWeights { hint, .. } if hint.contains("`pytorch_model.bin`")),
        "{old:?}"
    );
    assert!(matches!(&evil, Error::FileName { name } if name == "../../../../evil"), "{evil:?}");
    assert!(matches!(odd, Error::Json { .. }), "{odd:?}");
    assert!(hub.config_folder("o/old", None).unwrap().join("config.json").is_file());
}

#[test]
fn progress_ends_with_a_checked_file() {
    let (server, cache) = start();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let sink = Arc::clone(&seen);
    let hub = server
        .hub(cache.path())
        .with_progress(move |progress| sink.lock().unwrap().push(progress.clone()));

    hub.file(MODEL, "o/m", "model.safetensors", None).unwrap();

    let seen: Vec<Progress> = seen.lock().unwrap().clone();
    let file = || "model.safetensors".to_string();
    assert_eq!(seen[0], Progress { file: file(), n_bytes: 0, total: 5000, finished: false });
    assert_eq!(
        *seen.last().unwrap(),
        Progress { file: file(), n_bytes: 5000, total: 5000, finished: true }
    );
    assert!(seen.windows(2).all(|pair| pair[0].n_bytes <= pair[1].n_bytes));
}

#[test]
fn two_that_want_one_file_both_get_it() {
    let (server, cache) = start();
    let read = || {
        fs::read(server.hub(cache.path()).file(MODEL, "o/m", "model.safetensors", None).unwrap())
            .unwrap()
    };

    thread::scope(|scope| {
        let all: Vec<_> = (0..4).map(|_| scope.spawn(read)).collect();
        for one in all {
            assert_eq!(one.join().unwrap(), [7; 5000]);
        }
    });
}

#[test]
fn a_branch_with_a_slash_is_one_revision() {
    let (server, cache) = start();
    server.put_at(
        "datasets/o/d",
        "refs/convert/parquet",
        "default/train/0000.parquet",
        b"PAR1",
        true,
    );

    let files = server
        .hub(cache.path())
        .list_files(RepoKind::Dataset, "o/d", Some("refs/convert/parquet"))
        .unwrap();

    assert_eq!(files, ["default/train/0000.parquet"]);
}
