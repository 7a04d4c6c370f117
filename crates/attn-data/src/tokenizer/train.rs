//! Vocabularies from text.

use std::collections::{BTreeMap, HashSet};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use tokenizers::{
    AddedToken, NormalizedString, Normalizer, OffsetReferential, OffsetType, PreTokenizedString,
    PreTokenizer, Trainer,
    models::{
        bpe::{BPE, BpeTrainer},
        wordpiece::WordPiece,
    },
    normalizers::BertNormalizer,
    pre_tokenizers::{bert::BertPreTokenizer, byte_level::ByteLevel},
};

use super::{
    Origin, SpecialIds, TextTokenizer, bert_pipeline, byte_level_pipeline, refused, trained_config,
};
use crate::error::{Error, Result};

/// Most characters a WordPiece vocabulary gives a token of their own; rarer ones become `[UNK]`.
const MAX_ALPHABET: usize = 1000;

/// Occurrences below which a pair is not joined.
const MIN_PAIR_COUNT: u64 = 2;

/// What kind of tokenizer to train.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Style {
    /// As GPT-2's: bytes joined by frequency, every text representable, case kept. `<|endoftext|>` is 0 and begins
    /// and ends texts, `<|pad|>` is 1.
    ByteLevel,
    /// As BERT's: lower case, words split into pieces. `[PAD]` 0, `[UNK]` 1, `[CLS]` 2, `[SEP]` 3, `[MASK]` 4.
    WordPiece,
}

/// Trains a vocabulary of `vocab_size` tokens on `texts`, special tokens included.
///
/// Byte-pair encoding in both styles (Sennrich et al. 2016, <https://arxiv.org/abs/1508.07909>). The same texts give
/// the same ids in the same order, whatever the thread count. Fewer tokens come out where the texts have no more
/// pairs that occur twice. `max_length` is written into the tokenizer's config.
///
/// # Errors
///
/// [`Error::Vocabulary`] where `vocab_size` does not hold the special tokens and single characters, or where the
/// texts are empty.
pub fn train_bpe<S: AsRef<str> + Sync>(
    texts: &[S],
    vocab_size: usize,
    style: Style,
    max_length: Option<usize>,
) -> Result<TextTokenizer> {
    if texts.iter().all(|text| text.as_ref().trim().is_empty()) {
        let reason = "there is no text to train on".into();
        return Err(Error::Vocabulary { asked: vocab_size, reason });
    }
    let (inner, special, config) = match style {
        Style::ByteLevel => {
            let names = ["<|endoftext|>", "<|pad|>"];
            let special = names.map(|token| AddedToken::from(token, true));
            let alphabet: HashSet<char> = ByteLevel::alphabet().into_iter().collect();
            check_size(vocab_size, names.len() + alphabet.len())?;
            let builder =
                BpeTrainer::builder().initial_alphabet(alphabet).special_tokens(special.to_vec());
            let words = |text: &str| {
                words(text, None::<&BertNormalizer>, &ByteLevel::default().add_prefix_space(false))
            };
            let model = train(builder.vocab_size(vocab_size), texts, words)?;
            let inner = byte_level_pipeline(model, special.to_vec(), false)
                .map_err(refused("be assembled"))?;
            let tokens = [
                ("bos_token", names[0]),
                ("eos_token", names[0]),
                ("unk_token", names[0]),
                ("pad_token", names[1]),
            ];
            (
                inner,
                SpecialIds { bos: Some(0), eos: Some(0), pad: Some(1), mask: None },
                tokens.to_vec(),
            )
        }
        Style::WordPiece => {
            let names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"];
            let normalizer = BertNormalizer::new(true, true, None, true);
            let words = |text: &str| words(text, Some(&normalizer), &BertPreTokenizer);
            let alphabet = alphabet(texts, words)?;
            check_size(vocab_size, names.len() + 2 * alphabet.len())?;
            // The trainer numbers the pieces that continue a word as it meets them, in the order of a hash map that
            // differs between runs. Named beforehand, they get the same ids every time.
            let singles = alphabet.iter().map(char::to_string);
            let pieces = alphabet.iter().map(|c| format!("##{c}"));
            let fixed: Vec<AddedToken> = names
                .iter()
                .map(|token| AddedToken::from(*token, true))
                .chain(singles.chain(pieces).map(|token| AddedToken::from(token, false)))
                .collect();
            let builder = BpeTrainer::builder()
                .continuing_subword_prefix("##".into())
                .limit_alphabet(alphabet.len())
                .initial_alphabet(alphabet.into_iter().collect())
                .special_tokens(fixed);
            let model = train(builder.vocab_size(vocab_size), texts, words)?;
            let inner = bert_pipeline(WordPiece::from_bpe(&model), true)
                .map_err(refused("be assembled"))?;
            let keys = ["pad_token", "unk_token", "cls_token", "sep_token", "mask_token"];
            let special = SpecialIds { pad: Some(0), mask: Some(4), ..SpecialIds::default() };
            (inner, special, keys.into_iter().zip(names).collect())
        }
    };
    let origin = Origin::Trained { config: trained_config(&config, max_length) };
    Ok(TextTokenizer { inner, special, max_length, truncate_left: false, origin })
}

fn check_size(asked: usize, needed: usize) -> Result<()> {
    if asked >= needed {
        return Ok(());
    }
    let reason = format!("special tokens and single characters alone are {needed}");
    Err(Error::Vocabulary { asked, reason })
}

fn train<S: AsRef<str> + Sync>(
    builder: tokenizers::models::bpe::BpeTrainerBuilder,
    texts: &[S],
    words: impl Fn(&str) -> tokenizers::Result<Vec<String>> + Sync,
) -> Result<BPE> {
    let mut trainer = builder.min_frequency(MIN_PAIR_COUNT).show_progress(false).build();
    let mut model = BPE::default();
    let run = || {
        trainer.feed(texts.iter().map(AsRef::as_ref), words)?;
        trainer.train(&mut model)
    };
    run().map_err(refused("train a vocabulary"))?;
    Ok(model)
}

/// The pieces within which pairs are counted.
fn words(
    text: &str,
    normalizer: Option<&impl Normalizer>,
    pre_tokenizer: &impl PreTokenizer,
) -> tokenizers::Result<Vec<String>> {
    let mut normalized = NormalizedString::from(text);
    if let Some(normalizer) = normalizer {
        normalizer.normalize(&mut normalized)?;
    }
    let mut pre_tokenized = PreTokenizedString::from(normalized);
    pre_tokenizer.pre_tokenize(&mut pre_tokenized)?;
    let splits = pre_tokenized.get_splits(OffsetReferential::Original, OffsetType::Byte);
    Ok(splits.into_iter().map(|(word, _, _)| word.to_owned()).collect())
}

/// The most frequent characters, in code point order; of equally frequent ones the lower code points are kept.
fn alphabet<S: AsRef<str> + Sync>(
    texts: &[S],
    words: impl Fn(&str) -> tokenizers::Result<Vec<String>> + Sync,
) -> Result<Vec<char>> {
    let count = |mut counts: BTreeMap<char, u64>, text: &S| {
        for c in words(text.as_ref())?.iter().flat_map(|word| word.chars()) {
            *counts.entry(c).or_default() += 1;
        }
        tokenizers::Result::Ok(counts)
    };
    let join = |mut a: BTreeMap<char, u64>, b: BTreeMap<char, u64>| {
        b.into_iter().for_each(|(c, n)| *a.entry(c).or_default() += n);
        Ok(a)
    };
    let counts = texts.par_iter().try_fold(BTreeMap::new, count).try_reduce(BTreeMap::new, join);
    let mut ranked: Vec<(char, u64)> =
        counts.map_err(refused("count characters"))?.into_iter().collect();
    ranked.sort_by_key(|&(_, n)| std::cmp::Reverse(n)); // stable: ties stay in code point order
    ranked.truncate(MAX_ALPHABET);
    let mut alphabet: Vec<char> = ranked.into_iter().map(|(c, _)| c).collect();
    alphabet.sort_unstable();
    Ok(alphabet)
}
