//! A teacher's predictions on disk, to distil from without running it again.
//!
//! ```text
//! <dir>/manifest.json                   a Manifest: which teacher, which rows, how many tokens are told apart
//! <dir>/shard-00000.safetensors         of the real tokens of 256 rows, one after another: `ids` [n, k], `log_p` [n, k]
//!                                       and `log_tail` [n, 1], what all other tokens have together
//! <dir>/shard-00000.safetensors.sha256  its checksum, as `sha256sum` writes and checks it
//! ```
//!
//! A shard and its checksum appear by a rename, the checksum last: a kill loses the shard under way and no other.

use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, File, TryLockError},
    io::{self, Read},
    ops::Range,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use attn_core::{
    ForwardOptions, Model, Vocabulary,
    checkpoint::{Checkpoint, write_file, write_tensors},
};
use attn_data::batch::{Encoded, Side, collate};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tch::{Device, Kind, Tensor};

use crate::{
    batch::Batch,
    divergence::{Likeliest, PART_BYTES},
    error::{Error, Result},
    objective::wide,
};

/// 2: the teacher is told by all that it computes from; 1 told it by a few hundred values of each parameter.
const FORMAT_VERSION: u32 = 2;
const MANIFEST_FILE: &str = "manifest.json";
const ROWS_PER_SHARD: usize = 256;
/// Rows that go through the teacher together.
const BATCH_ROWS: usize = 8;
/// Between two looks at whether another run has let go of the folder.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// What a cache was made of. Probabilities are those at temperature 1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    format_version: u32,
    /// [`Model::digest`] of the teacher.
    teacher: String,
    /// SHA-256 of the rows' ids: another text, tokenizer, length or selection of rows is another cache.
    data: String,
    n_rows: usize,
    n_tokens: usize,
    /// How many tokens a position tells apart.
    top_k: i64,
}

/// The likeliest tokens of a teacher at every position of a list of rows.
#[derive(Debug)]
pub struct TeacherCache {
    top_k: i64,
    shards: Vec<Likeliest>,
    /// Where the positions of each row are, by [`Encoded::index`]: the shard, and those in it.
    places: HashMap<usize, (usize, Range<i64>)>,
}

impl TeacherCache {
    /// Opens the cache in `dir`, after making what is missing of it: the `top_k` likeliest tokens of `teacher` at each
    /// token of `rows`, whose `index` must tell them apart. Shards that are there are checked and kept, so that an
    /// interrupted call is gone on with by the next. Where another run makes the same cache, it is waited for. `observe` is
    /// told how many rows are done, every few of them.
    ///
    /// Returns `None` where `stop` was set before the end, be it while waiting.
    ///
    /// # Errors
    ///
    /// [`Error::TeacherCache`] for a cache of another teacher, of other rows or another `top_k`, and for a damaged shard;
    /// [`Error::Teacher`] for a teacher without predictions of tokens, or that hides some from itself;
    /// [`Error::Io`].
    ///
    /// # Panics
    ///
    /// Where two rows have the same `index`.
    pub fn open_or_make(
        dir: &Path,
        teacher: &Model,
        rows: &[Encoded],
        top_k: i64,
        stop: &AtomicBool,
        observe: &mut dyn FnMut(usize),
    ) -> Result<Option<Self>> {
        let refuse = |problem: &str| Err(Error::Teacher { problem: problem.to_owned() });
        let Some(vocabulary) = teacher.vocabulary() else {
            return refuse("it predicts no tokens, and a cache holds nothing else");
        };
        if !teacher.config().is_causal() {
            return refuse("it is a masked language model: other tokens are hidden in each epoch");
        }
        fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
        let manifest = Manifest::of(teacher, rows, top_k)?;
        let lock_path = dir.join(".lock");
        let lock = File::create(&lock_path).map_err(Error::io("create", &lock_path))?;
        // Runs of a sweep share a cache: whoever comes second waits until it is there.
        if !take(&lock, &lock_path, stop) {
            return Ok(None);
        }
        if !manifest.agrees(dir)? {
            let text = serde_json::to_vec_pretty(&manifest).expect("plain fields have a JSON form");
            write_file(&dir.join(MANIFEST_FILE), &text)?;
        }
        let (mut shards, mut places) = (Vec::new(), HashMap::new());
        for (number, rows) in rows.chunks(ROWS_PER_SHARD).enumerate() {
            let path = dir.join(format!("shard-{number:05}.safetensors"));
            let n_before = number * ROWS_PER_SHARD;
            if !is_there(&path)? {
                let mut observe = |n_done| observe(n_before + n_done);
                let made = predict(teacher, &vocabulary, rows, top_k, stop, &mut observe)?;
                let Some(made) = made else { return Ok(None) };
                write_shard(&path, made)?;
            }
            shards.push(read_shard(&path)?);
            let mut start = 0;
            for row in rows {
                let end = start + row.ids.len() as i64;
                let other = places.insert(row.index, (number, start..end));
                assert!(other.is_none(), "two rows have the index {}", row.index);
                start = end;
            }
            observe(n_before + rows.len());
        }
        Ok(Some(Self { top_k, shards, places }))
    }

    /// Whether [`Self::open_or_make`] could use what is in `dir`, or there is nothing yet; only the manifest is read.
    ///
    /// # Errors
    ///
    /// [`Error::TeacherCache`] for a cache of another teacher, of other rows or another `top_k`; [`Error::Io`].
    pub fn check(dir: &Path, teacher: &Model, rows: &[Encoded], top_k: i64) -> Result<()> {
        if dir.join(MANIFEST_FILE).exists() {
            Manifest::of(teacher, rows, top_k)?.agrees(dir)?;
        }
        Ok(())
    }

    /// Bytes that the predictions at every token of `rows` take: `top_k` ids and log-probabilities and a tail, four each.
    pub fn bytes(rows: &[Encoded], top_k: i64) -> usize {
        rows.iter().map(|row| row.ids.len() * (8 * top_k as usize + 4)).sum()
    }

    /// How many tokens a position tells apart.
    pub fn top_k(&self) -> i64 {
        self.top_k
    }

    /// What the teacher predicts at the real tokens of `batch`, row by row.
    pub(crate) fn likeliest(&self, batch: &Batch, device: Device) -> Result<Likeliest> {
        let rows = &batch.rows;
        let mut parts = Vec::with_capacity(rows.rows);
        for (row, index) in rows.indices.iter().enumerate() {
            let cells = &rows.mask[row * rows.cols..(row + 1) * rows.cols];
            let n_tokens = cells.iter().sum::<i64>();
            let Some((shard, range)) =
                self.places.get(index).filter(|(_, range)| range.end - range.start == n_tokens)
            else {
                let problem = format!("its cache holds no row {index} of {n_tokens} tokens");
                return Err(Error::Teacher { problem });
            };
            parts.push(self.shards[*shard].narrow(range.start, n_tokens));
        }
        Ok(Likeliest::cat(&parts).on(device))
    }
}

impl Manifest {
    fn of(teacher: &Model, rows: &[Encoded], top_k: i64) -> Result<Self> {
        Ok(Self {
            format_version: FORMAT_VERSION,
            teacher: teacher.digest()?,
            data: digest_of_rows(rows),
            n_rows: rows.len(),
            n_tokens: rows.iter().map(|row| row.ids.len()).sum(),
            top_k,
        })
    }

    /// Whether there is one in `dir`; refuses another than this.
    fn agrees(&self, dir: &Path) -> Result<bool> {
        let path = dir.join(MANIFEST_FILE);
        let refuse =
            |problem: String, hint| Err(Error::TeacherCache { path: path.clone(), problem, hint });
        let found: Self = match fs::read(&path) {
            Ok(text) => match serde_json::from_slice(&text) {
                Ok(found) => found,
                Err(error) => {
                    return refuse(
                        format!("it is damaged: {error}"),
                        "remove the folder: it is made anew",
                    );
                }
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(Error::io("read", &path)(error)),
        };
        let [ours, theirs] = [self, &found]
            .map(|manifest| serde_json::to_value(manifest).expect("plain fields have a JSON form"));
        let fields = ["format_version", "teacher", "top_k", "n_rows", "n_tokens", "data"];
        match fields.into_iter().find(|field| ours[field] != theirs[field]) {
            None => Ok(true),
            Some(field) => refuse(
                format!("its `{field}` is {}, and this run's is {}", theirs[field], ours[field]),
                "name another folder for it, or remove this one: it is made anew",
            ),
        }
    }
}

/// Takes the lock, waiting for who holds it; false where `stop` was set meanwhile.
fn take(lock: &File, path: &Path, stop: &AtomicBool) -> bool {
    let mut is_said = false;
    loop {
        match lock.try_lock() {
            Ok(()) => return true,
            Err(TryLockError::WouldBlock) => {}
            // Some network file systems have no locks.
            Err(TryLockError::Error(error)) => {
                tracing::warn!("cannot lock `{}`: {error}", path.display());
                return true;
            }
        }
        if stop.load(Ordering::Relaxed) {
            return false;
        }
        if !is_said {
            tracing::info!("waiting for another run, which holds `{}`", path.display());
            is_said = true;
        }
        thread::sleep(LOOK_AGAIN);
    }
}

fn checksum_file(shard: &Path) -> PathBuf {
    shard.with_added_extension("sha256")
}

/// Whether a shard is there, whole.
fn is_there(shard: &Path) -> Result<bool> {
    let path = checksum_file(shard);
    let line = match fs::read_to_string(&path) {
        Ok(line) => line,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(Error::io("read", &path)(error)),
    };
    let expected = line.split_whitespace().next().unwrap_or_default();
    let found = digest_of_file(shard).map_err(Error::io("read", shard))?;
    if found != expected {
        return Err(Error::TeacherCache {
            path: shard.to_owned(),
            problem: format!("its SHA-256 is {found}, and its checksum file says {expected}"),
            hint: "remove the damaged file and its `.sha256`: the shard is made again",
        });
    }
    Ok(true)
}

fn write_shard(path: &Path, Likeliest { ids, log_p, log_tail }: Likeliest) -> Result<()> {
    let tensors = [("ids", ids.to_kind(Kind::Int)), ("log_p", log_p), ("log_tail", log_tail)];
    write_tensors(path, &tensors.map(|(name, x)| (name.to_owned(), x)), &BTreeMap::new())?;
    let hash = digest_of_file(path).map_err(Error::io("read", path))?;
    let name = path.file_name().expect("a shard has a name").to_string_lossy();
    Ok(write_file(&checksum_file(path), format!("{hash}  {name}\n").as_bytes())?)
}

fn read_shard(path: &Path) -> Result<Likeliest> {
    let file = Checkpoint::open_file(path)?;
    let tensor = |name, kind| file.tensor(name, kind, Device::Cpu);
    Ok(Likeliest {
        ids: tensor("ids", Some(Kind::Int))?,
        log_p: tensor("log_p", None)?,
        log_tail: tensor("log_tail", None)?,
    })
}

/// What the teacher expects at each token of `rows`; `None` where `stop` was set. `observe` is told how many are done.
fn predict(
    teacher: &Model,
    vocabulary: &Vocabulary,
    rows: &[Encoded],
    top_k: i64,
    stop: &AtomicBool,
    observe: &mut dyn FnMut(usize),
) -> Result<Option<Likeliest>> {
    let _no_grad = tch::no_grad_guard();
    let (mut parts, mut n_done) = (Vec::new(), 0);
    for rows in rows.chunks(BATCH_ROWS) {
        if stop.load(Ordering::Relaxed) {
            return Ok(None);
        }
        // Any id fills short rows: it is masked.
        let batch = Batch::from(collate(&rows.iter().collect::<Vec<_>>(), 0, Side::Right));
        let places = Tensor::from_slice(&batch.rows.mask).nonzero().view([-1]);
        let options = ForwardOptions {
            before_vocabulary: true,
            logits_at: Some(&places),
            ..ForwardOptions::default()
        };
        let features = teacher.forward(&batch.input(teacher), &options)?.logits; // [n, hidden]
        let n_vocab = vocabulary.weight.size()[0];
        let few = (PART_BYTES / (4 * n_vocab)).max(1);
        for features in features.split(few, 0) {
            let logits = features.linear(&vocabulary.weight, vocabulary.bias.as_ref());
            let log_p = wide(&logits).log_softmax(-1, None::<Kind>);
            parts.push(Likeliest::of(&log_p, top_k).on(Device::Cpu));
        }
        n_done += rows.len();
        observe(n_done);
    }
    Ok(Some(Likeliest::cat(&parts)))
}

fn digest_of_rows(rows: &[Encoded]) -> String {
    let mut hash = Sha256::new();
    for row in rows {
        hash.update((row.ids.len() as u64).to_le_bytes());
        row.ids.iter().for_each(|id| hash.update(id.to_le_bytes()));
    }
    hex(hash.finalize())
}

fn digest_of_file(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let (mut hash, mut buffer) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hex(hash.finalize())),
            n => hash.update(&buffer[..n]),
        }
    }
}

fn hex(bytes: impl AsRef<[u8]>) -> String {
    bytes.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}
