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
use common::{COMMIT, Faults, Server, hex};
use sha1::Sha1;
use sha2::{Digest, Sha256};
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
    let link = fs::read_link(&large).unwrap();
    assert_eq!(link, Path::new("../../blobs").join(hex(Sha256::digest([7; 5000]))));
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

    assert!(message(&error).contains("HTTP 403 Forbidden in place of the content"), "{error:?}");
    assert!(blobs(cache.path()).iter().all(|name| name.ends_with(".incomplete")));
}

#[test]
fn a_connection_that_always_breaks_leaves_no_file() {
    let (server, cache) = start();
    server.set(Faults { cut: Some((0, usize::MAX)), ..Faults::default() });
    let hub = server.hub(cache.path());

    let error = hub.file(MODEL, "o/m", "model.safetensors", None).unwrap_err();

    assert!(matches!(error, Error::Unreachable { .. }), "{error:?}");
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

/// What was asked of contents: `Range` and `If-Range` of each request.
fn ranges(server: &Server) -> Vec<(Option<String>, Option<String>)> {
    let requests = server.requests().into_iter().filter(|request| request.method == "GET");
    let contents = requests.filter(|request| request.path.starts_with("/cdn/"));
    contents
        .map(|mut request| (request.headers.remove("range"), request.headers.remove("if-range")))
        .collect()
}

fn range(from: usize, tag: Option<&str>) -> (Option<String>, Option<String>) {
    (Some(format!("bytes={from}-")), tag.map(|tag| format!("\"{tag}\"")))
}

/// Contents of the repository's folder of contents that are parts.
fn parts(cache: &Path) -> Vec<String> {
    blobs(cache).into_iter().filter(|name| name.ends_with(".incomplete")).collect()
}

const LARGE: &str = "model.safetensors";

/// 5000 bytes of which no two stretches are alike.
fn varied() -> Vec<u8> {
    (0..5000u32).flat_map(|i| [(i / 7) as u8, ((i * 31) >> 3) as u8]).take(5000).collect()
}

/// A server with one large file of [`varied`] bytes.
fn start_varied() -> (Server, TempDir) {
    let server = Server::start();
    server.put_large("o/m", LARGE, varied());
    (server, tempfile::tempdir().unwrap())
}

#[test]
fn a_connection_that_breaks_goes_on_where_it_stopped() {
    let (server, cache) = start_varied();
    server.set(Faults { cut: Some((1234, 3)), ..Faults::default() });

    let path = server.hub(cache.path()).file(MODEL, "o/m", LARGE, None).unwrap();

    assert_eq!(fs::read(path).unwrap(), varied());
    let tag = Some("store");
    let expected = [(None, None), range(1234, tag), range(2468, tag), range(3702, tag)];
    assert_eq!(ranges(&server), expected);
    assert_eq!(parts(cache.path()), Vec::<String>::new());
}

/// A Hub whose server changes its faults once so many bytes are there.
fn changing(server: &Arc<Server>, cache: &Path, at: u64, faults: Faults) -> Hub {
    let changed = Arc::clone(server);
    server.hub(cache).with_progress(move |progress| {
        if progress.n_bytes == at {
            changed.set(faults.clone());
        }
    })
}

#[test]
fn a_later_run_goes_on_where_an_earlier_one_stopped() {
    let (server, cache) = start_varied();
    let server = Arc::new(server);
    server.set(Faults { cut: Some((1234, 1)), ..Faults::default() });
    let out = Faults { cut: Some((0, usize::MAX)), ..Faults::default() };
    changing(&server, cache.path(), 1234, out).file(MODEL, "o/m", LARGE, None).unwrap_err();
    server.set(Faults::default());
    server.requests();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let sink = Arc::clone(&seen);
    let hub = server
        .hub(cache.path())
        .with_progress(move |progress| sink.lock().unwrap().push(progress.n_bytes));

    let path = hub.file(MODEL, "o/m", LARGE, None).unwrap();

    assert_eq!(fs::read(path).unwrap(), varied());
    assert_eq!(ranges(&server), [range(1234, None)]);
    let seen = seen.lock().unwrap();
    assert_eq!((seen[0], *seen.last().unwrap()), (1234, 5000));
    assert!(seen.is_sorted(), "{seen:?}");
}

#[test]
fn a_small_file_is_continued_under_its_own_tag() {
    let (server, cache) = start();
    let bytes = b"{\"model_type\": \"gpt2\"}";
    let mut tag = Sha1::new_with_prefix(format!("blob {}\0", bytes.len()));
    tag.update(bytes);
    let tag = hex(tag.finalize());
    let blobs = cache.path().join("models--o--m/blobs");
    fs::create_dir_all(&blobs).unwrap();
    fs::write(blobs.join(format!("{tag}.incomplete")), &bytes[..9]).unwrap();

    let path = server.hub(cache.path()).file(MODEL, "o/m", "config.json", None).unwrap();

    assert_eq!(fs::read(path).unwrap(), bytes);
    let asked = server.requests().pop().unwrap().headers;
    assert_eq!((asked["range"].as_str(), &asked["if-range"]), ("bytes=9-", &format!("\"{tag}\"")));
}

#[test]
fn a_content_that_changed_begins_anew() {
    let (server, cache) = start_varied();
    let blobs = cache.path().join("models--o--m/blobs");
    fs::create_dir_all(&blobs).unwrap();
    let old = hex(Sha256::digest(varied()));
    fs::write(blobs.join(format!("{old}.incomplete")), &varied()[..100]).unwrap();
    server.put_large("o/m", LARGE, [3; 4000]);

    let path = server.hub(cache.path()).file(MODEL, "o/m", LARGE, None).unwrap();

    assert_eq!(fs::read(path).unwrap(), [3; 4000]);
    assert_eq!(ranges(&server), [(None, None)]);
}

#[test]
fn a_store_whose_tag_changed_sends_the_whole() {
    let (server, cache) = start_varied();
    let server = Arc::new(server);
    server.set(Faults { cut: Some((1234, 1)), ..Faults::default() });
    let other = Faults { store_tag: Some("other"), ..Faults::default() };

    let hub = changing(&server, cache.path(), 1234, other);
    let path = hub.file(MODEL, "o/m", LARGE, None).unwrap();

    assert_eq!(fs::read(path).unwrap(), varied());
    assert_eq!(ranges(&server), [(None, None), range(1234, Some("store"))]);
}

#[test]
fn a_server_without_ranges_or_with_others_than_asked_serves_all_the_same() {
    for faults in [
        Faults { no_ranges: true, ..Faults::default() },
        Faults { shifted: 7, ..Faults::default() },
    ] {
        let (server, cache) = start_varied();
        server.set(Faults { cut: Some((1234, 1)), ..faults.clone() });

        let path = server.hub(cache.path()).file(MODEL, "o/m", LARGE, None).unwrap();

        assert_eq!(fs::read(path).unwrap(), varied(), "{faults:?}");
    }
}

#[test]
fn a_server_that_never_gets_further_is_not_asked_for_ever() {
    let (server, cache) = start_varied();
    let cut = Some((1234, usize::MAX));
    server.set(Faults { cut, no_ranges: true, ..Faults::default() });

    let error = server.hub(cache.path()).file(MODEL, "o/m", LARGE, None).unwrap_err();

    assert!(matches!(error, Error::Unreachable { .. }), "{error:?}");
    assert_eq!(ranges(&server).len(), 6);
}

#[test]
fn a_part_as_long_as_the_whole_is_checked_before_it_is_used() {
    let (server, cache) = start_varied();
    let blobs_dir = cache.path().join("models--o--m/blobs");
    fs::create_dir_all(&blobs_dir).unwrap();
    let tag = hex(Sha256::digest(varied()));
    let part = blobs_dir.join(format!("{tag}.incomplete"));
    let hub = server.hub(cache.path());

    fs::write(&part, [9; 5000]).unwrap();
    let error = hub.file(MODEL, "o/m", LARGE, None).unwrap_err();

    assert!(matches!(error, Error::HashMismatch { .. }), "{error:?}");
    assert!(message(&error).contains("was deleted"), "{error:?}");
    assert_eq!((ranges(&server).len(), blobs(cache.path()).len()), (0, 0));

    fs::write(&part, varied()).unwrap();
    hub.file(MODEL, "o/m", LARGE, None).unwrap();
    assert_eq!((ranges(&server).len(), blobs(cache.path())), (0, vec![tag]));
}

#[test]
fn a_content_longer_than_announced_is_cut_off_and_deleted() {
    let (server, cache) = start_varied();
    server.set(Faults { replace: Some(vec![1; 50_000]), ..Faults::default() });

    let error = server.hub(cache.path()).file(MODEL, "o/m", LARGE, None).unwrap_err();

    let Error::HashMismatch { expected, found, .. } = &error else { panic!("{error:?}") };
    assert!(expected == "5000" && found.starts_with("at least "), "{expected} {found}");
    assert_eq!(blobs(cache.path()), Vec::<String>::new());
}

#[test]
fn a_busy_server_is_asked_again_when_it_says_to() {
    for status in [429, 503] {
        let (server, cache) = start_varied();
        server.set(Faults { busy: Some((status, "1", 1)), ..Faults::default() });
        let begun = std::time::Instant::now();

        server.hub(cache.path()).file(MODEL, "o/m", LARGE, None).unwrap();

        assert!(begun.elapsed().as_secs_f64() >= 1.0, "HTTP {status}");
    }
}

#[test]
fn a_server_that_asks_to_wait_for_hours_is_not_waited_for() {
    let (server, cache) = start_varied();
    server.set(Faults { busy: Some((429, "7200", usize::MAX)), ..Faults::default() });

    let error = server.hub(cache.path()).file(MODEL, "o/m", LARGE, None).unwrap_err();

    let text = message(&error);
    assert!(text.contains("HTTP 429") && text.contains("7200 s"), "{text}");
}

#[test]
fn who_finds_another_at_work_waits_and_fetches_nothing() {
    let (server, cache) = start_varied();
    let tag = hex(Sha256::digest(varied()));
    let (locks, blobs) =
        (cache.path().join(".locks/models--o--m"), cache.path().join("models--o--m/blobs"));
    fs::create_dir_all(&locks).unwrap();
    fs::create_dir_all(&blobs).unwrap();
    let lock = fs::File::create(locks.join(format!("{tag}.lock"))).unwrap();
    lock.lock().unwrap();

    thread::scope(|scope| {
        let hub = server.hub(cache.path());
        let waiting = scope.spawn(move || hub.file(MODEL, "o/m", LARGE, None).unwrap());
        thread::sleep(std::time::Duration::from_millis(300));
        assert!(!waiting.is_finished());
        fs::write(blobs.join(&tag), varied()).unwrap();
        lock.unlock().unwrap();
        assert_eq!(fs::read(waiting.join().unwrap()).unwrap(), varied());
    });

    assert_eq!(ranges(&server), []);
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

    assert_eq!(ranges(&server).len(), 1);
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

#[test]
fn names_of_a_server_that_lead_elsewhere_are_refused() {
    let (server, cache) = start();
    let inside = cache.path().join("a/b/c/hub");
    for commit in ["../../../../evil", "/evil", "main", ""] {
        server.set(Faults { commit: Some(commit), ..Faults::default() });
        let error = server.hub(&inside).file(MODEL, "o/m", "config.json", None).unwrap_err();
        assert!(matches!(error, Error::Hub { .. }), "{error:?}");
        assert!(
            message(&error).contains("is no commit") || commit.is_empty(),
            "{}",
            message(&error)
        );
    }
    server.set(Faults::default());

    server.put("datasets/o/d", "data/../../../../evil.parquet", b"x");
    server.put("datasets/o/d", "/evil.parquet", b"x");
    let files = server.hub(&inside).list_files(RepoKind::Dataset, "o/d", None).unwrap();
    assert_eq!(files.len(), 2);
    for file in files {
        let error = server.hub(&inside).file(RepoKind::Dataset, "o/d", &file, None).unwrap_err();
        assert!(matches!(error, Error::FileName { .. }), "{file}: {error:?}");
    }
    let made: Vec<String> = fs::read_dir(cache.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .filter(|name| name != "a")
        .collect();
    assert!(made.is_empty(), "{made:?}");
}
