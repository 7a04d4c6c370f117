//! Text to token ids and back, with the tokenizer that belongs to a model folder.

use std::{
    fs,
    io::Write,
    ops::Range,
    path::{Path, PathBuf},
};

use rayon::prelude::*;
use serde_json::{Value, json};
use tokenizers::{
    AddedToken, DecodeStream, DecoderWrapper, Model, ModelWrapper, NormalizerWrapper,
    PostProcessor, PostProcessorWrapper, PreTokenizerWrapper, Tokenizer, TruncationDirection,
    TruncationParams,
    decoders::{
        byte_level::ByteLevel as ByteLevelDecoder, wordpiece::WordPiece as WordPieceDecoder,
    },
    models::{bpe::BPE, wordpiece::WordPiece},
    normalizers::BertNormalizer,
    pre_tokenizers::{bert::BertPreTokenizer, byte_level::ByteLevel},
    processors::template::TemplateProcessing,
};

use crate::{
    error::{Error, Result, Source},
    guard::guarded,
};

mod train;

pub use train::{Style, train_bpe};

/// What a folder says about its tokenizer.
const CONFIG: &str = "tokenizer_config.json";

/// Files a tokenizer may consist of; [`TextTokenizer::save`] copies those that exist.
pub const FILES: [&str; 9] = [
    "tokenizer.json",
    CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
];

/// A `model_max_length` beyond this is the reference library's way of writing "none".
const NO_LIMIT: f64 = 1e9;

/// One text, or a pair such as premise and hypothesis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Input<'a> {
    /// The text, or the first of two.
    pub text: &'a str,
    /// The second, where there is one.
    pub pair: Option<&'a str>,
}

impl<'a> From<&'a str> for Input<'a> {
    fn from(text: &'a str) -> Self {
        Self { text, pair: None }
    }
}

/// How [`TextTokenizer::encode`] treats a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EncodeOptions {
    /// Most tokens, special tokens included; no limit where absent.
    pub max_len: Option<usize>,
    /// Adds what the tokenizer puts around a text: `[CLS] … [SEP]`, `<s> …`, or nothing.
    pub add_special_tokens: bool,
    /// Cuts longer texts, of a pair the longer one first as the `tokenizers` crate does; otherwise they are an error.
    pub truncate: bool,
}

impl Default for EncodeOptions {
    fn default() -> Self {
        Self { max_len: None, add_special_tokens: true, truncate: true }
    }
}

/// What [`TextTokenizer::encode`] returns.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Encodings {
    /// Token ids of each text, in the order of the texts.
    pub ids: Vec<Vec<u32>>,
    /// The token that the second text's segment begins at, of each pair.
    pub second_from: Vec<Option<usize>>,
    /// Texts that were cut to `max_len`. Worth a line to the user where it is not 0.
    pub n_truncated: usize,
    /// Tokens of the longest text before cutting.
    pub longest: usize,
}

/// A tokenizer and what its folder says about it.
#[derive(Debug, Clone)]
pub struct TextTokenizer {
    inner: Tokenizer,
    special: SpecialIds,
    max_length: Option<usize>,
    truncate_left: bool,
    origin: Origin,
}

/// Where the files to save come from.
#[derive(Debug, Clone)]
enum Origin {
    Folder(PathBuf),
    Trained { config: Value },
}

/// Ids in, text out; see [`TextTokenizer::stream`].
#[allow(missing_debug_implementations, reason = "the library's stream has none")]
pub struct TextStream<'a> {
    inner: DecodeStream<
        'a,
        ModelWrapper,
        NormalizerWrapper,
        PreTokenizerWrapper,
        PostProcessorWrapper,
        DecoderWrapper,
    >,
}

impl TextStream<'_> {
    /// The text that `id` completes; empty while a character is still missing bytes.
    ///
    /// # Errors
    ///
    /// [`Error::Tokenizer`] where the library refuses.
    pub fn push(&mut self, id: u32) -> Result<String> {
        let text = guarded(|| self.inner.step(id)).map_err(refused("decode ids"))?;
        Ok(text.unwrap_or_default())
    }
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct SpecialIds {
    pad: Option<u32>,
    eos: Option<u32>,
    bos: Option<u32>,
    mask: Option<u32>,
}

impl TextTokenizer {
    /// Loads the tokenizer of a model folder.
    ///
    /// `tokenizer.json` is read as it is. Without one, `vocab.txt` makes a BERT WordPiece tokenizer and `vocab.json`
    /// with `merges.txt` a GPT-2 byte-level one. Special tokens come from `tokenizer_config.json`,
    /// `special_tokens_map.json`, `config.json`, in this order, and failing these from the usual names among the
    /// special tokens.
    ///
    /// # Errors
    ///
    /// [`Error::NoTokenizer`] where the folder has none that can be read, [`Error::Tokenizer`] and [`Error::Json`]
    /// where a file is damaged.
    pub fn from_folder(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let config = read_json(&folder.join(CONFIG))?;
        let mut inner = load(folder, &config)?;
        // Padding and cutting are decided and counted here, not by what the file happens to have stored.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(refused("drop the stored truncation"))?;

        let map = read_json(&folder.join("special_tokens_map.json"))?;
        let model = read_json(&folder.join("config.json"))?;
        let special = SpecialIds::find(&inner, &config, &map, &model);
        let max_length =
            config["model_max_length"].as_f64().filter(|&max| (1. ..NO_LIMIT).contains(&max));
        let truncate_left = config["truncation_side"] == "left";
        let origin = Origin::Folder(folder.to_path_buf());
        Ok(Self {
            inner,
            special,
            max_length: max_length.map(|max| max as usize),
            truncate_left,
            origin,
        })
    }

    /// The same for a model that was trained on texts of `n_tokens`: where its `model_max_length` is less it is raised, so
    /// that other programs do not cut texts that the model has learnt to read.
    #[must_use]
    pub fn reaching(mut self, n_tokens: usize) -> Self {
        if self.max_length.is_some_and(|max| max < n_tokens) {
            self.max_length = Some(n_tokens);
        }
        self
    }

    /// Tokenizes every text, on all cores. The result does not depend on how many there are.
    ///
    /// # Errors
    ///
    /// [`Error::TooLong`] for a text over `max_len` where `truncate` is off, [`Error::Setting`] for a `max_len` that
    /// leaves no room beside the special tokens.
    pub fn encode(&self, inputs: &[Input<'_>], options: &EncodeOptions) -> Result<Encodings> {
        let EncodeOptions { max_len, add_special_tokens, truncate } = *options;
        // The copy that cuts is made on the first long text only: cloning a large vocabulary takes a while.
        let cutter = std::sync::OnceLock::new();
        if let Some(max_len) = max_len {
            self.check_room(
                max_len,
                inputs.iter().any(|input| input.pair.is_some()),
                add_special_tokens,
            )?;
        }
        let encode_one = |(index, input): (usize, &Input<'_>)| {
            let row = encoded(&self.inner, input, add_special_tokens)?;
            let n_tokens = row.0.len();
            match max_len {
                Some(max_len) if n_tokens > max_len && truncate => {
                    let cutter = cutter.get_or_init(|| self.cutting_at(max_len));
                    Ok((encoded(cutter, input, add_special_tokens)?, n_tokens))
                }
                Some(max_len) if n_tokens > max_len => {
                    Err(Error::TooLong { index, n_tokens, max_len })
                }
                _ => Ok((row, n_tokens)),
            }
        };
        // Collected before the first error is looked for, so that it is the same one on every run.
        let rows: Vec<Result<_>> =
            inputs.par_iter().enumerate().with_min_len(16).map(encode_one).collect();

        let mut encodings =
            Encodings { ids: Vec::with_capacity(rows.len()), ..Encodings::default() };
        for row in rows {
            let ((ids, second_from), n_tokens) = row?;
            encodings.n_truncated += usize::from(ids.len() < n_tokens);
            encodings.longest = encodings.longest.max(n_tokens);
            encodings.ids.push(ids);
            encodings.second_from.push(second_from);
        }
        Ok(encodings)
    }

    /// Tokenizes one text without a length limit.
    ///
    /// # Errors
    ///
    /// [`Error::Tokenizer`] where the library refuses, for instance a token outside a vocabulary without `unk`.
    pub fn ids(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        Ok(encoded(&self.inner, &text.into(), add_special_tokens)?.0)
    }

    /// Tokenizes one text, and finds the tokens of what stands from byte `start` on: from the first token that reaches
    /// beyond it to the last one that stands for text. A token that straddles `start` is one of them; what the
    /// tokenizer puts behind a text is not.
    ///
    /// # Errors
    ///
    /// [`Error::Tokenizer`] where the library refuses.
    pub fn split_at(
        &self,
        text: &str,
        start: usize,
        add_special_tokens: bool,
    ) -> Result<(Vec<u32>, Range<usize>)> {
        let (ids, offsets) = self.offsets(text, add_special_tokens)?;
        let reaches = |token: &Range<usize>| token.end > start && !token.is_empty();
        let end = offsets.iter().rposition(reaches).map_or(0, |last| last + 1);
        let begin = offsets.iter().position(reaches).unwrap_or(end);
        Ok((ids, begin..end))
    }

    /// Tokenizes one text; beside each token the bytes of the text that it stands for, none for a token that the
    /// tokenizer puts around a text.
    ///
    /// # Errors
    ///
    /// [`Error::Tokenizer`] where the library refuses.
    pub fn offsets(
        &self,
        text: &str,
        add_special_tokens: bool,
    ) -> Result<(Vec<u32>, Vec<Range<usize>>)> {
        let encoding = guarded(|| self.inner.encode(text, add_special_tokens));
        let encoding = encoding.map_err(refused("encode a text"))?;
        let offsets = encoding.get_offsets().iter().map(|&(from, to)| from..to).collect();
        Ok((encoding.get_ids().to_vec(), offsets))
    }

    /// Turns ids back into text; `skip_special` leaves special tokens out. Ids outside the vocabulary are skipped.
    ///
    /// # Errors
    ///
    /// [`Error::Tokenizer`] where the library refuses.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        guarded(|| self.inner.decode(ids, skip_special)).map_err(refused("decode ids"))
    }

    /// Turns ids into text one by one, as they are generated.
    pub fn stream(&self, skip_special: bool) -> TextStream<'_> {
        TextStream { inner: self.inner.decode_stream(skip_special) }
    }

    /// The padding token, where the folder names one.
    pub fn pad_id(&self) -> Option<u32> {
        self.special.pad
    }

    /// An id to fill padding with: the padding token, else the end-of-text token, else 0. What stands in a masked
    /// position changes no result.
    pub fn fill_id(&self) -> u32 {
        self.special.pad.or(self.special.eos).unwrap_or(0)
    }

    /// The token that ends a text.
    pub fn eos_id(&self) -> Option<u32> {
        self.special.eos
    }

    /// The token that begins a text.
    pub fn bos_id(&self) -> Option<u32> {
        self.special.bos
    }

    /// The token that stands for a hidden one, in tokenizers made for masked language models.
    pub fn mask_id(&self) -> Option<u32> {
        self.special.mask
    }

    /// Ids of all special tokens, ascending.
    pub fn special_ids(&self) -> Vec<u32> {
        let added = self.inner.get_added_tokens_decoder();
        let named = [self.special.pad, self.special.eos, self.special.bos, self.special.mask];
        let marked = added.iter().filter(|(_, token)| token.special).map(|(&id, _)| id);
        let mut ids: Vec<u32> = marked.chain(named.into_iter().flatten()).collect();
        ids.sort_unstable();
        ids.dedup();
        ids
    }

    /// Rows an embedding must have: the largest id plus one. Gaps count.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1)
    }

    /// Most tokens the folder says a text may have. The model's own positions may be fewer.
    pub fn max_length(&self) -> Option<usize> {
        self.max_length
    }

    /// The token of an id.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The token of an id as people read it: of byte-level vocabularies the text that it stands for, a blank as `▁`; what is but a part
    /// of a letter, and tokens of other vocabularies, as they stand there.
    pub fn shown(&self, id: u32) -> Option<String> {
        let token = self.token(id)?;
        if token.is_ascii() || token.contains('▁') {
            return Some(token);
        }
        match self.decode(&[id], false) {
            Ok(text) if !text.is_empty() && !text.contains(char::REPLACEMENT_CHARACTER) => {
                Some(text.replace(' ', "▁"))
            }
            _ => Some(token),
        }
    }

    /// The id of a token, as it stands in the vocabulary: `Ġthe` or `##ing`, not ` the` or `ing`.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Writes the tokenizer into `folder`, which is made where it does not exist.
    ///
    /// A tokenizer that came from a folder is copied byte for byte, with a `tokenizer.json` added where it had none.
    /// Each file appears whole or not at all.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] where the disk refuses.
    pub fn save(&self, folder: impl AsRef<Path>) -> Result<()> {
        let folder = folder.as_ref();
        fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        match &self.origin {
            Origin::Folder(origin) => {
                let same =
                    |a: &Path, b: &Path| Some(a.canonicalize().ok()? == b.canonicalize().ok()?);
                if same(origin, folder) == Some(true) {
                    return Ok(());
                }
                for name in FILES {
                    let from = origin.join(name);
                    if from.is_file() {
                        let bytes = fs::read(&from).map_err(Error::io("read", &from))?;
                        write_atomically(&folder.join(name), &bytes)?;
                    }
                    if name == CONFIG {
                        self.write_max_length(read_json(&from)?, folder)?;
                    }
                }
                if !origin.join("tokenizer.json").is_file() {
                    self.write_json(folder)?;
                }
                Ok(())
            }
            Origin::Trained { config } => {
                self.write_json(folder)?;
                write_config(config, folder)?;
                self.write_max_length(config.clone(), folder)
            }
        }
    }

    /// Writes `config` with the most tokens of a text as they are now, where it says otherwise.
    fn write_max_length(&self, mut config: Value, folder: &Path) -> Result<()> {
        let stated = config["model_max_length"].as_f64().map(|max| max as usize);
        match self.max_length {
            Some(max_length) if stated != Some(max_length) => {
                config["model_max_length"] = json!(max_length);
                write_config(&config, folder)
            }
            _ => Ok(()),
        }
    }

    fn write_json(&self, folder: &Path) -> Result<()> {
        let text = self.inner.to_string(true).map_err(refused("write itself as JSON"))?;
        write_atomically(&folder.join("tokenizer.json"), text.as_bytes())
    }

    fn check_room(&self, max_len: usize, pairs: bool, add_special_tokens: bool) -> Result<()> {
        let n_added = match self.inner.get_post_processor() {
            Some(processor) if add_special_tokens => processor.added_tokens(pairs),
            _ => 0,
        };
        if max_len > n_added {
            return Ok(());
        }
        let expected = "room for at least one token beside the special tokens";
        Err(Error::Setting { name: "max_len", value: max_len.to_string(), expected })
    }

    fn cutting_at(&self, max_length: usize) -> Tokenizer {
        let direction =
            if self.truncate_left { TruncationDirection::Left } else { TruncationDirection::Right };
        let mut cutter = self.inner.clone();
        let params = TruncationParams { direction, ..TruncationParams::default() };
        cutter.with_truncation(Some(params)).expect("a stride of 0 fits every length");
        // Set afterwards: the check subtracts the special tokens even where none will be added.
        cutter.get_truncation_mut().expect("set above").max_length = max_length;
        cutter
    }
}

impl SpecialIds {
    fn find(tokenizer: &Tokenizer, config: &Value, map: &Value, model: &Value) -> Self {
        let added = tokenizer.get_added_tokens_decoder();
        let usual = |names: &[&str]| {
            let is_special = |id: &u32| added.get(id).is_some_and(|token| token.special);
            names.iter().find_map(|name| tokenizer.token_to_id(name).filter(is_special))
        };
        let find = |key: &str, names: &[&str]| {
            let named = |table: &Value| {
                let token = table[key].as_str().or_else(|| table[key]["content"].as_str())?;
                let id = tokenizer.token_to_id(token);
                if id.is_none() {
                    tracing::warn!("{key} `{token}` is not in the vocabulary and is left out");
                }
                id
            };
            let numbered = || {
                let value = &model[format!("{key}_id")];
                let id = value.as_u64().or_else(|| value.as_array()?.first()?.as_u64())?;
                u32::try_from(id).ok()
            };
            named(config).or_else(|| named(map)).or_else(numbered).or_else(|| usual(names))
        };
        Self {
            pad: find("pad_token", &["[PAD]", "<pad>", "<|pad|>"]),
            eos: find("eos_token", &["</s>", "<|endoftext|>", "<|end_of_text|>"]),
            bos: find("bos_token", &["<s>", "<|endoftext|>", "<|begin_of_text|>"]),
            mask: find("mask_token", &["[MASK]", "<mask>"]),
        }
    }
}

/// The ids of a text or a pair, and where the second segment begins.
fn encoded(
    tokenizer: &Tokenizer,
    input: &Input<'_>,
    add_special_tokens: bool,
) -> Result<(Vec<u32>, Option<usize>)> {
    let encoding = guarded(|| match input.pair {
        Some(pair) => tokenizer.encode_fast((input.text, pair), add_special_tokens),
        None => tokenizer.encode_fast(input.text, add_special_tokens),
    });
    let encoding = encoding.map_err(refused("encode a text"))?;
    let second_from = encoding.get_type_ids().iter().position(|&segment| segment == 1);
    Ok((encoding.get_ids().to_vec(), second_from))
}

fn load(folder: &Path, config: &Value) -> Result<Tokenizer> {
    let has = |name: &str| folder.join(name).is_file();
    if has("tokenizer.json") {
        let path = folder.join("tokenizer.json");
        return guarded(|| Tokenizer::from_file(&path))
            .map_err(refused(format!("read `{}`", path.display())));
    }
    let none = |reason: &str, hint| Error::NoTokenizer {
        folder: folder.to_path_buf(),
        reason: reason.into(),
        hint,
    };
    const CONVERT: &str = "write one with transformers: `AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)`";
    if !folder.is_dir() {
        return Err(none("the folder does not exist", "check the path"));
    }
    if has("vocab.txt") {
        return word_piece(folder, config["do_lower_case"].as_bool().unwrap_or(true));
    }
    if has("vocab.json") && has("merges.txt") {
        let tokenizer = byte_level(folder, config["add_prefix_space"].as_bool().unwrap_or(false))?;
        // RoBERTa ships the same two files and wraps each text in <s> … </s>, which the files do not say.
        return match tokenizer.token_to_id("<s>") {
            None => Ok(tokenizer),
            Some(_) => Err(none(
                "`vocab.json` and `merges.txt` have `<s>`, so they are not GPT-2's",
                CONVERT,
            )),
        };
    }
    if has("tokenizer.model") {
        return Err(none("`tokenizer.model` (SentencePiece) alone cannot be read", CONVERT));
    }
    Err(none("no `tokenizer.json`, no `vocab.txt`, no `vocab.json` with `merges.txt`", CONVERT))
}

/// BERT's tokenizer from its word list alone.
fn word_piece(folder: &Path, lower_case: bool) -> Result<Tokenizer> {
    let path = folder.join("vocab.txt");
    let doing = || format!("read `{}`", path.display());
    let model = WordPiece::from_file(&path.to_string_lossy()).unk_token("[UNK]".into()).build();
    let model = model.map_err(refused(doing()))?;
    let missing =
        ["[UNK]", "[CLS]", "[SEP]"].into_iter().find(|token| model.token_to_id(token).is_none());
    if let Some(token) = missing {
        return Err(Error::NoTokenizer {
            folder: folder.to_path_buf(),
            reason: format!("`vocab.txt` has no `{token}`, so it is not BERT's"),
            hint: "a word list says nothing else about a tokenizer; provide its `tokenizer.json`",
        });
    }
    bert_pipeline(model, lower_case).map_err(refused(doing()))
}

/// Everything around BERT's word list.
fn bert_pipeline(model: WordPiece, lower_case: bool) -> tokenizers::Result<Tokenizer> {
    let special: Vec<AddedToken> = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        .into_iter()
        .filter(|token| model.token_to_id(token).is_some())
        .map(|token| AddedToken::from(token, true))
        .collect();
    let id = |token: &str| {
        model.token_to_id(token).ok_or_else(|| format!("`{token}` is not in the vocabulary"))
    };
    let template = TemplateProcessing::builder()
        .try_single("[CLS]:0 $A:0 [SEP]:0")?
        .try_pair("[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1")?
        .special_tokens(vec![("[CLS]", id("[CLS]")?), ("[SEP]", id("[SEP]")?)])
        .build()?;
    let mut tokenizer = Tokenizer::new(model);
    tokenizer.with_normalizer(Some(BertNormalizer::new(true, true, None, lower_case)))?;
    tokenizer.with_pre_tokenizer(Some(BertPreTokenizer));
    tokenizer.with_post_processor(Some(template));
    tokenizer.with_decoder(Some(WordPieceDecoder::default()));
    tokenizer.add_special_tokens(special)?;
    Ok(tokenizer)
}

/// GPT-2's tokenizer from its two files.
fn byte_level(folder: &Path, add_prefix_space: bool) -> Result<Tokenizer> {
    let (vocab, merges) = (folder.join("vocab.json"), folder.join("merges.txt"));
    let model = BPE::from_file(&vocab.to_string_lossy(), &merges.to_string_lossy()).build();
    let doing = || format!("read `{}` with `merges.txt`", vocab.display());
    let model = model.map_err(refused(doing()))?;
    let special = ["<|endoftext|>"].into_iter().filter(|token| model.token_to_id(token).is_some());
    let special: Vec<AddedToken> = special.map(|token| AddedToken::from(token, true)).collect();
    byte_level_pipeline(model, special, add_prefix_space).map_err(refused(doing()))
}

/// Everything around a byte-level vocabulary.
fn byte_level_pipeline(
    model: BPE,
    special: Vec<AddedToken>,
    add_prefix_space: bool,
) -> tokenizers::Result<Tokenizer> {
    let mut tokenizer = Tokenizer::new(model);
    tokenizer.with_pre_tokenizer(Some(ByteLevel::default().add_prefix_space(add_prefix_space)));
    tokenizer.with_post_processor(Some(ByteLevel::default().trim_offsets(false)));
    tokenizer.with_decoder(Some(ByteLevelDecoder::default()));
    tokenizer.add_special_tokens(special)?;
    Ok(tokenizer)
}

/// The object in a JSON file, or null where there is no file.
pub(crate) fn read_json(path: &Path) -> Result<Value> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Value::Null),
        Err(error) => return Err(Error::io("read", path)(error)),
    };
    serde_json::from_str(&text).map_err(|source| Error::Json {
        path: path.to_path_buf(),
        expected: "JSON",
        source: source.into(),
    })
}

fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    let name = path.file_name().expect("a file inside a folder").to_string_lossy();
    // Always the same name, so that what a kill leaves is written over by the next.
    let scratch = path.with_file_name(format!(".{name}.tmp"));
    let write = || {
        let mut file = fs::File::create(&scratch)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&scratch, path)
    };
    write().map_err(|error| {
        let _ = fs::remove_file(&scratch);
        Error::io("write", path)(error)
    })
}

fn write_config(config: &Value, folder: &Path) -> Result<()> {
    let text = serde_json::to_string_pretty(config).expect("a JSON value can be written");
    write_atomically(&folder.join(CONFIG), text.as_bytes())
}

fn refused(doing: impl Into<String>) -> impl FnOnce(Source) -> Error {
    let doing = doing.into();
    move |source| Error::Tokenizer { doing, source }
}

/// What a trained tokenizer tells the reference library about itself.
fn trained_config(tokens: &[(&str, &str)], max_length: Option<usize>) -> Value {
    let mut config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": false,
        "model_input_names": ["input_ids", "attention_mask"],
    });
    for (key, token) in tokens {
        config[*key] = json!(token);
    }
    if let Some(max_length) = max_length {
        config["model_max_length"] = json!(max_length);
    }
    config
}
