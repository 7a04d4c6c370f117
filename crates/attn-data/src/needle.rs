//! Facts hidden in a long text, and questions at its end that only those facts answer.
//!
//! The haystack is running text; a needle is a sentence put between two of its sentences. Keys, numbers and answers are
//! drawn at random, so that nothing but the text itself tells them: a model answers by finding the needle and copying,
//! which is what retrieval heads do (Wu et al. 2024, <https://arxiv.org/abs/2404.15574>).

mod own;

use std::{
    collections::{BTreeMap, BTreeSet},
    iter,
    ops::Range,
};

use rand::{
    Rng,
    seq::{IndexedRandom, SliceRandom},
};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::{
    batch::stream,
    error::{Error, Result},
    tokenizer::{EncodeOptions, Input, TextTokenizer},
};

pub use own::{OwnNeedle, paragraphs, read_needles, read_texts};

/// Fewer words than this would make needles alike.
const MIN_WORDS: usize = 100;

/// What the needles of a document say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NeedleKind {
    /// A list of 4 to 16 words that is begun once more: what induction heads go on with (Olsson et al. 2022,
    /// <https://arxiv.org/abs/2209.11895>).
    Repeat,
    /// A number of five digits, asked for by its key (Mohtashami and Jaggi 2023, <https://arxiv.org/abs/2305.16300>).
    Passkey,
    /// A statement that ends in 3 to 6 words, asked for by what it is about (Kamradt 2023,
    /// <https://github.com/gkamradt/LLMTest_NeedleInAHaystack>).
    Sentence,
    /// What the user wrote: an [`OwnNeedle`]. Of [`Haystack::hide`] alone.
    #[serde(skip_deserializing)]
    Own,
}

impl NeedleKind {
    /// As configs and tables have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Repeat => "repeat",
            Self::Passkey => "passkey",
            Self::Sentence => "sentence",
            Self::Own => "own",
        }
    }
}

/// Statement, and question up to the answer: `{}` is what it is about. The answer ends both.
const SENTENCES: [(&str, &str); 8] = [
    (
        "The best thing to do in {} is",
        "What is the best thing to do in {}? The best thing to do in {} is",
    ),
    (
        "The secret ingredient of {} is",
        "What is the secret ingredient of {}? The secret ingredient of {} is",
    ),
    ("People go to {} to see", "Why do people go to {}? People go to {} to see"),
    ("The last words of {} were", "What were the last words of {}? The last words of {} were"),
    ("The key to {} lies under", "Where is the key to {}? The key to {} lies under"),
    (
        "On Sundays {} likes to talk about",
        "What does {} like to talk about? On Sundays {} likes to talk about",
    ),
    (
        "The house of {} is known for",
        "What is the house of {} known for? The house of {} is known for",
    ),
    ("The colours of {} are", "What are the colours of {}? The colours of {} are"),
];

/// One thing to be found.
#[derive(Debug, Clone, PartialEq)]
struct Fact {
    /// A sentence.
    statement: String,
    /// Up to the answer.
    question: String,
    /// With the space before it and the full stop behind.
    answer: String,
    /// Where in the statement the answer stands without them, in bytes: each place that tells it.
    told: Vec<Range<usize>>,
}

impl Fact {
    /// A fact about `key`, which no other of the document is about; `alone`: there is no other.
    fn new(
        kind: NeedleKind,
        key: &str,
        alone: bool,
        words: &[String],
        rng: &mut ChaCha8Rng,
    ) -> Self {
        let mut draw = |n: usize| -> Vec<&str> {
            (0..n).map(|_| words.choose(rng).expect("there are words").as_str()).collect()
        };
        match kind {
            NeedleKind::Repeat => {
                let list = draw(16);
                let n = rng.random_range(4..=16);
                let (begin, rest) = (key, list[..n - 2].join(" "));
                Self::ending(
                    format!("The list: {begin}"),
                    format!("Once more the list: {begin}"),
                    &rest,
                )
            }
            NeedleKind::Passkey => {
                let number = rng.random_range(10_000..100_000);
                let of = if alone { String::new() } else { format!(" of {key}") };
                let statement = format!(
                    "The pass key{of} is {number}. Remember it. {number} is the pass key{of}."
                );
                // No key has digits.
                let digits = number.to_string();
                let told = statement.match_indices(&digits).map(|(at, _)| at..at + digits.len());
                Self {
                    told: told.collect(),
                    statement,
                    question: format!("What is the pass key{of}? The pass key{of} is"),
                    answer: format!(" {number}."),
                }
            }
            NeedleKind::Sentence => {
                let list = draw(6);
                let answer = list[..rng.random_range(3..=6)].join(" ");
                let (statement, question) = SENTENCES.choose(rng).expect("there are some");
                let about = capitals(key);
                let [statement, question] =
                    [statement, question].map(|text| text.replace("{}", &about));
                Self::ending(statement, question, &answer)
            }
            NeedleKind::Own => unreachable!("a recipe has no such kind"),
        }
    }

    /// A statement that begins with `begin` and ends in `answer`.
    fn ending(begin: String, question: String, answer: &str) -> Self {
        let start = begin.len() + 1;
        Self {
            statement: format!("{begin} {answer}."),
            question,
            answer: format!(" {answer}."),
            told: iter::once(start..start + answer.len()).collect(),
        }
    }
}

/// `san francisco` as `San Francisco`.
fn capitals(key: &str) -> String {
    let capital = |word: &str| word[..1].to_uppercase() + &word[1..];
    key.split(' ').map(capital).collect::<Vec<_>>().join(" ")
}

/// Running text to hide needles in.
#[derive(Debug, Clone)]
pub struct Haystack {
    /// Sentences in their order, each with the white space behind it.
    sentences: Vec<Sentence>,
    /// Words to make needles of, the most frequent first.
    words: Vec<String>,
}

#[derive(Debug, Clone)]
struct Sentence {
    text: String,
    /// By itself; among others it may have one more or less.
    n_tokens: usize,
}

impl Haystack {
    /// Takes texts apart into sentences. Words for needles are those of 3 to 10 small letters (a to z) that occur at
    /// least twice.
    ///
    /// # Errors
    ///
    /// [`Error::FewWords`] for a text with less than a hundred such words, [`Error::Tokenizer`] where the library
    /// refuses.
    pub fn new(texts: &[&str], tokenizer: &TextTokenizer) -> Result<Self> {
        let haystack = Self::of_any(texts, tokenizer)?;
        if haystack.words.len() < MIN_WORDS {
            return Err(Error::FewWords { found: haystack.words.len(), expected: MIN_WORDS });
        }
        Ok(haystack)
    }

    /// As [`Self::new`], of a text with any words: for [`Self::hide`], which makes no needles of them.
    ///
    /// # Errors
    ///
    /// [`Error::Tokenizer`] where the library refuses.
    pub fn of_any(texts: &[&str], tokenizer: &TextTokenizer) -> Result<Self> {
        let texts: Vec<&str> = texts.iter().flat_map(|text| sentences(text)).collect();
        let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
        for word in texts.iter().flat_map(|text| text.split_whitespace()) {
            if (3..=10).contains(&word.len()) && word.bytes().all(|byte| byte.is_ascii_lowercase())
            {
                *counts.entry(word).or_default() += 1;
            }
        }
        let mut counts: Vec<(usize, &str)> =
            counts.into_iter().filter(|(_, n)| *n > 1).map(|(word, n)| (n, word)).collect();
        counts.sort_unstable_by(|a, b| b.0.cmp(&a.0).then(a.1.cmp(b.1)));
        let words: Vec<String> = counts.into_iter().map(|(_, word)| word.to_owned()).collect();
        let inputs: Vec<Input<'_>> = texts.iter().map(|&text| text.into()).collect();
        let options = EncodeOptions { add_special_tokens: false, ..EncodeOptions::default() };
        let ids = tokenizer.encode(&inputs, &options)?.ids;
        let sentence = |(text, ids): (&&str, Vec<u32>)| Sentence {
            text: (*text).to_owned(),
            n_tokens: ids.len(),
        };
        Ok(Self { sentences: texts.iter().zip(ids).map(sentence).collect(), words })
    }

    /// About as many tokens as the longest document can have of it.
    pub fn n_tokens(&self) -> usize {
        self.sentences.iter().map(|sentence| sentence.n_tokens).sum()
    }

    /// Draws a document: its needles, where they stand, and where in the haystack it begins. The same for the same
    /// `seed` and `index`.
    ///
    /// # Errors
    ///
    /// [`Error::ShortHaystack`] where the text has fewer tokens than asked for, [`Error::Setting`] for a `max_len` that
    /// has no room for one needle and its question, for no kind, and for a depth outside 0 to 1.
    pub fn document(
        &self,
        recipe: &Recipe,
        tokenizer: &TextTokenizer,
        seed: u64,
        index: u64,
    ) -> Result<Document> {
        recipe.check()?;
        let mut rng = stream(seed ^ 0x6e65_6564_6c65, index);
        let kind = *recipe.kinds.choose(&mut rng).expect("checked: there is one");
        let n_needles = match recipe.distractors {
            0 => rng.random_range(1..=recipe.most_needles),
            n => 1 + n,
        };
        let words = &self.words[..recipe.words.unwrap_or(usize::MAX).min(self.words.len())];
        let mut keys = BTreeSet::new();
        while keys.len() < n_needles {
            let mut word = || words.choose(&mut rng).expect("there are words").as_str();
            keys.insert(format!("{} {}", word(), word()));
        }
        let mut keys: Vec<String> = keys.into_iter().collect();
        keys.shuffle(&mut rng);
        let mut facts: Vec<Fact> =
            keys.iter().map(|key| Fact::new(kind, key, n_needles == 1, words, &mut rng)).collect();
        if recipe.distractors > 0 {
            return self.among(kind, &facts, (recipe.depth, recipe.max_len), tokenizer, &mut rng);
        }
        let (mut room, mut n_kept, mut n_asks) = (recipe.max_len, 0, recipe.asks);
        for Fact { statement, question, answer, .. } in &facts {
            let n_tokens = |n_asks| -> Result<usize> {
                let asked = format!("\n{question}{answer}").repeat(n_asks);
                Ok(tokenizer.ids(&format!(" {statement}{asked}"), true)?.len())
            };
            while n_kept == 0 && n_asks > 1 && n_tokens(n_asks)? > room {
                n_asks -= 1;
            }
            let Some(left) = room.checked_sub(n_tokens(n_asks)?) else { break };
            let n_filled = (recipe.max_len - left) as f64;
            if n_kept > 0 && n_filled > recipe.fill * recipe.max_len as f64 {
                break;
            }
            (room, n_kept) = (left, n_kept + 1);
        }
        if n_kept == 0 {
            return Err(Error::Setting {
                name: "max_len",
                value: recipe.max_len.to_string(),
                expected: "room for a needle and its question: 128 is enough",
            });
        }
        facts.truncate(n_kept);

        let hay = self.straw(room, recipe.max_len, &mut rng)?;
        let places: Vec<f64> =
            facts.iter().map(|_| recipe.depth.unwrap_or_else(|| rng.random())).collect();
        let mut order: Vec<usize> = (0..facts.len() * n_asks).map(|i| i % facts.len()).collect();
        order.shuffle(&mut rng);
        fitted(kind, &facts, (&places, &order), hay, recipe.max_len, tokenizer)
    }

    /// Hides `own` at `depth` (0 to 1) and `others` anywhere, and asks for `own` in the words of `template`, whose `{}` stands
    /// for its question. Where in the haystack the document begins is drawn: the same for the same `seed` and `index`.
    ///
    /// # Errors
    ///
    /// [`Error::ShortHaystack`] where the text has fewer tokens than `max_len`, [`Error::Setting`] for a `max_len` without room
    /// for the needles and the question, a depth outside 0 to 1, and a template without `{}`.
    pub fn hide(
        &self,
        own: &OwnNeedle,
        others: &[&OwnNeedle],
        template: &str,
        (depth, max_len): (f64, usize),
        tokenizer: &TextTokenizer,
        (seed, index): (u64, u64),
    ) -> Result<Document> {
        check_depth(depth)?;
        if template.matches("{}").count() != 1 {
            let (name, value) = ("template", template.to_owned());
            let expected = "one {} in it, where the question is put";
            return Err(Error::Setting { name, value, expected });
        }
        let fact = |own: &OwnNeedle| Fact {
            statement: own.needle.clone(),
            question: template.replace("{}", &own.question),
            answer: format!(" {}", own.answer()),
            told: iter::once(own.told()).collect(),
        };
        let facts: Vec<Fact> = iter::once(own).chain(others.iter().copied()).map(fact).collect();
        let mut rng = stream(seed ^ 0x6869_6464_656e, index);
        self.among(NeedleKind::Own, &facts, (Some(depth), max_len), tokenizer, &mut rng)
    }

    /// A document of all of `facts` that asks for the first, which stands at the depth; the others stand anywhere.
    fn among(
        &self,
        kind: NeedleKind,
        facts: &[Fact],
        (depth, max_len): (Option<f64>, usize),
        tokenizer: &TextTokenizer,
        rng: &mut ChaCha8Rng,
    ) -> Result<Document> {
        let statements: String = facts.iter().map(|fact| format!(" {}", fact.statement)).collect();
        let Fact { question, answer, .. } = &facts[0];
        let n_tokens = tokenizer.ids(&format!("{statements}\n{question}{answer}"), true)?.len();
        let Some(room) = max_len.checked_sub(n_tokens) else {
            let (name, value) = ("max_len", max_len.to_string());
            let expected =
                "room for the needles and the question: a longer document, or fewer of them";
            return Err(Error::Setting { name, value, expected });
        };
        let hay = self.straw(room, max_len, rng)?;
        let depth = depth.unwrap_or_else(|| rng.random());
        let mut others = Vec::new();
        for Fact { statement, .. } in &facts[1..] {
            let n_tokens = tokenizer.ids(&format!(" {statement}"), false)?.len();
            others.push((rng.random(), n_tokens as f64));
        }
        let n_hay: usize = hay.iter().map(|sentence| sentence.n_tokens).sum();
        let mut places = vec![share_of_hay(depth, n_hay as f64, &others)];
        places.extend(others.iter().map(|(place, _)| place));
        fitted(kind, facts, (&places, &[0]), hay, max_len, tokenizer)
    }

    /// Sentences one after another, from a place drawn at random, of `room` tokens at most.
    fn straw(&self, room: usize, max_len: usize, rng: &mut ChaCha8Rng) -> Result<Vec<&Sentence>> {
        let n_tokens = self.n_tokens();
        if n_tokens < max_len {
            return Err(Error::ShortHaystack { n_tokens, asked: max_len });
        }
        let first = rng.random_range(0..self.sentences.len());
        let mut left = room;
        let around = self.sentences[first..].iter().chain(&self.sentences[..first]);
        // A sentence that is too long ends the text rather than being left out of its middle.
        Ok(around
            .take_while(|sentence| {
                let fits = sentence.n_tokens <= left;
                left -= if fits { sentence.n_tokens } else { 0 };
                fits
            })
            .collect())
    }

    fn write(
        kind: NeedleKind,
        facts: &[Fact],
        places: &[f64],
        order: &[usize],
        hay: &[&Sentence],
        tokenizer: &TextTokenizer,
    ) -> Result<Document> {
        // Before which sentence each needle stands: the border nearest to its depth.
        let n_hay: usize = hay.iter().map(|sentence| sentence.n_tokens).sum();
        let mut borders = vec![0];
        for sentence in hay {
            borders.push(borders[borders.len() - 1] + sentence.n_tokens);
        }
        let nearest = |depth: f64| {
            let wanted = depth * n_hay as f64;
            let distance = |&border: &usize| (borders[border] as f64 - wanted).abs();
            (0..borders.len())
                .min_by(|a, b| distance(a).total_cmp(&distance(b)))
                .expect("two borders")
        };
        let before: Vec<usize> = places.iter().map(|&depth| nearest(depth)).collect();

        let mut text = String::new();
        let mut needles = vec![0..0; facts.len()];
        for border in 0..=hay.len() {
            for (fact, _) in before.iter().enumerate().filter(|(_, at)| **at == border) {
                if !text.is_empty() && !text.ends_with(char::is_whitespace) {
                    text.push(' ');
                }
                let start = text.len();
                text += &facts[fact].statement;
                needles[fact] = start..text.len();
                text.push(' ');
            }
            if let Some(sentence) = hay.get(border) {
                text += &sentence.text;
            }
        }
        text.truncate(text.trim_end().len());
        let end_of_hay = text.len();
        let mut answers = Vec::new();
        for &fact in order {
            text.push('\n');
            let question = text.len();
            text += &facts[fact].question;
            let start = text.len();
            text += &facts[fact].answer;
            answers.push((fact, question..start, start..text.len()));
        }

        let (ids, offsets) = tokenizer.offsets(&text, true)?;
        let tokens = |bytes: &Range<usize>| tokens_of(&offsets, bytes);
        let n_context = tokens(&(0..end_of_hay)).len();
        let needles: Vec<Needle> = needles
            .into_iter()
            .zip(facts)
            .map(|(bytes, fact)| {
                let told =
                    |at: &Range<usize>| tokens(&(bytes.start + at.start..bytes.start + at.end));
                let (told, tokens) = (fact.told.iter().map(told).collect(), tokens(&bytes));
                let room = n_context.saturating_sub(tokens.len());
                let depth =
                    if room == 0 { 0.0 } else { (tokens.start as f64 / room as f64).min(1.0) };
                Needle { tokens, depth, told, bytes }
            })
            .collect();
        let answers = answers
            .iter()
            .map(|(needle, question, answer)| Answer {
                needle: *needle,
                question: tokens(question),
                tokens: tokens(answer),
            })
            .collect();
        Ok(Document { ids, kind, needles, answers, text, context_len: end_of_hay })
    }
}

/// The share of the haystack that stands before a needle at `depth` of the text, where the others, of so many tokens each, stand
/// at their own shares of the haystack: they are text around it, too.
fn share_of_hay(depth: f64, n_hay: f64, others: &[(f64, f64)]) -> f64 {
    let wanted = depth * (n_hay + others.iter().map(|(_, n)| n).sum::<f64>());
    let mut others = others.to_vec();
    others.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut before = 0.0;
    for (place, n) in others {
        if wanted <= place * n_hay + before {
            break;
        }
        if wanted <= place * n_hay + before + n {
            return place;
        }
        before += n;
    }
    ((wanted - before) / n_hay.max(1.0)).clamp(0.0, 1.0)
}

/// A document of `max_len` tokens at most, from a haystack that may be a little too long.
fn fitted(
    kind: NeedleKind,
    facts: &[Fact],
    (places, order): (&[f64], &[usize]),
    mut hay: Vec<&Sentence>,
    max_len: usize,
    tokenizer: &TextTokenizer,
) -> Result<Document> {
    loop {
        let document = Haystack::write(kind, facts, places, order, &hay, tokenizer)?;
        // Sentences beside each other may have a token more than each by itself.
        if document.ids.len() <= max_len || hay.pop().is_none() {
            return Ok(document);
        }
    }
}

/// The tokens that have a part of `bytes`.
fn tokens_of(offsets: &[Range<usize>], bytes: &Range<usize>) -> Range<usize> {
    let is_of = |token: &Range<usize>| {
        token.end > bytes.start && token.start < bytes.end && token.end > token.start
    };
    let first = offsets.iter().position(is_of).unwrap_or(offsets.len());
    let last = offsets.iter().rposition(is_of).map_or(first, |last| last + 1);
    first..last
}

/// Which documents are drawn.
#[derive(Debug, Clone, PartialEq)]
pub struct Recipe {
    /// What needles say: one kind a document, each as often as the others.
    pub kinds: Vec<NeedleKind>,
    /// Needles are made of as many words, the most frequent ones of the haystack; of all where absent.
    pub words: Option<usize>,
    /// A document has 1 to as many, and asks for each, in any order.
    pub most_needles: usize,
    /// Each is asked for as often, or less often where there is no room. What is asked again can be read off the first answer, too.
    pub asks: usize,
    /// The share of a document that needles and questions may take, 0 to 1; beyond it there are fewer of them, but at
    /// least one.
    pub fill: f64,
    /// Where the needles stand: before the sentence nearest to this share of the haystack. Absent: anywhere.
    pub depth: Option<f64>,
    /// A document has one needle that is asked for, which stands at `depth`, and as many others of its kind, anywhere and not
    /// asked for; `most_needles`, `asks` and `fill` then count for nothing. 0: as those say.
    pub distractors: usize,
    /// Most tokens of a document, what the tokenizer puts around it included. It may be shorter by less than a
    /// sentence.
    pub max_len: usize,
}

impl Recipe {
    fn check(&self) -> Result<()> {
        let refuse = |name, value: String, expected| Err(Error::Setting { name, value, expected });
        if self.kinds.is_empty() || self.kinds.contains(&NeedleKind::Own) {
            return refuse(
                "kinds",
                format!("{:?}", self.kinds),
                "at least one of repeat, passkey, sentence",
            );
        }
        if self.most_needles == 0 {
            return refuse("most_needles", "0".into(), "at least 1");
        }
        if let Some(words @ ..10) = self.words {
            return refuse("words", words.to_string(), "at least 10");
        }
        if self.asks == 0 {
            return refuse("asks", "0".into(), "at least 1");
        }
        if !(0.0..=1.0).contains(&self.fill) {
            return refuse("fill", self.fill.to_string(), "a share from 0 to 1");
        }
        self.depth.map_or(Ok(()), check_depth)
    }
}

fn check_depth(depth: f64) -> Result<()> {
    if (0.0..=1.0).contains(&depth) {
        return Ok(());
    }
    let (value, expected) = (depth.to_string(), "a share of the text from 0 to 1");
    Err(Error::Setting { name: "depth", value, expected })
}

/// A text with needles and questions, and where they stand.
#[derive(Debug, Clone, PartialEq)]
pub struct Document {
    /// The tokens, those that the tokenizer puts around a text included.
    pub ids: Vec<u32>,
    /// What its needles say.
    pub kind: NeedleKind,
    /// In no order.
    pub needles: Vec<Needle>,
    /// In the order of the questions.
    pub answers: Vec<Answer>,
    /// What the ids stand for.
    pub text: String,
    /// Bytes of it before the line break and the first question.
    pub context_len: usize,
}

/// A document's text with another question behind it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    /// The tokens.
    pub ids: Vec<u32>,
    /// Those of the needle.
    pub needle: Range<usize>,
    /// Those of the question.
    pub question: Range<usize>,
}

impl Document {
    /// The text with its needles, and `question` (which has a token) in place of the first question and all behind it. `needle`
    /// is the number of the needle to be found again.
    ///
    /// # Errors
    ///
    /// [`Error::Tokenizer`] where the library refuses.
    pub fn asking(
        &self,
        needle: usize,
        question: &str,
        tokenizer: &TextTokenizer,
    ) -> Result<Asked> {
        let text = format!("{}\n{question}", &self.text[..self.context_len]);
        let (ids, offsets) = tokenizer.offsets(&text, true)?;
        let asked = self.context_len + 1..text.len();
        Ok(Asked {
            needle: tokens_of(&offsets, &self.needles[needle].bytes),
            question: tokens_of(&offsets, &asked),
            ids,
        })
    }
}

/// Furthest that a needle may be from where it was to stand, whatever the length of sentences.
const MOST_OFF: f64 = 0.35;

impl Document {
    /// Checks that the needle numbered `needle` stands where it was to, at `wanted` of the text around it: no further off than the longest
    /// sentence or other needle of the document, and never by more than 0.35 of the text.
    ///
    /// # Errors
    ///
    /// [`Error::Misplaced`] where it does not, [`Error::Tokenizer`] where the library refuses.
    pub fn check_depth(&self, needle: usize, wanted: f64, tokenizer: &TextTokenizer) -> Result<()> {
        let (_, offsets) = tokenizer.offsets(&self.text[..self.context_len], false)?;
        let n_tokens = |bytes: Range<usize>| tokens_of(&offsets, &bytes).len();
        let own = &self.needles[needle].bytes;
        let (before, behind) = (n_tokens(0..own.start), n_tokens(own.end..self.context_len));
        let around = (before + behind).max(1) as f64;
        let found = before as f64 / around;
        let pieces = [0..own.start, own.end..self.context_len].map(|part| {
            let mut end = part.start;
            let lengths = sentences(&self.text[part]).into_iter().map(|sentence| {
                end += sentence.len();
                n_tokens(end - sentence.len()..end)
            });
            lengths.max().unwrap_or(0)
        });
        let others = self.needles.iter().map(|it| n_tokens(it.bytes.clone()));
        let longest = pieces.into_iter().chain(others).max().unwrap_or(0);
        let allowed = (longest as f64 / around).min(MOST_OFF);
        match (found - wanted).abs() <= allowed {
            true => Ok(()),
            false => Err(Error::Misplaced { wanted, found, allowed }),
        }
    }
}

/// A needle in its document.
#[derive(Debug, Clone, PartialEq)]
pub struct Needle {
    /// Its tokens.
    pub tokens: Range<usize>,
    /// Tokens before it over those of the text around it: 0 at its start, 1 at its end.
    pub depth: f64,
    /// The tokens of its answer, each place that tells it, as they were put there: without the full stop, unless one token has
    /// both.
    pub told: Vec<Range<usize>>,
    /// Where it stands in [`Document::text`].
    pub bytes: Range<usize>,
}

/// An answer in its document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Which of [`Document::needles`] tells it.
    pub needle: usize,
    /// The tokens of the question, up to the answer.
    pub question: Range<usize>,
    /// Its tokens, the full stop included.
    pub tokens: Range<usize>,
}

/// Sentences with the white space behind them, which together are `text`. A sentence ends where white space follows `.`,
/// `!` or `?`, and at the end of a line.
fn sentences(text: &str) -> Vec<&str> {
    let mut sentences = Vec::new();
    let (mut start, mut ends) = (0, false);
    let mut before = ' ';
    for (at, c) in text.char_indices() {
        if ends && !c.is_whitespace() {
            sentences.push(&text[start..at]);
            (start, ends) = (at, false);
        }
        ends |= c == '\n' || (c.is_whitespace() && matches!(before, '.' | '!' | '?'));
        before = c;
    }
    if start < text.len() {
        sentences.push(&text[start..]);
    }
    sentences
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::{Style, train_bpe};

    /// Sentences of words made of syllables, each with a number that no other has.
    fn text() -> String {
        let mut rng = stream(1, 0);
        let syllables = ["ba", "no", "ri", "te", "lu", "so", "mi", "ka"];
        let mut word = || -> String {
            (0..3).map(|_| *syllables.choose(&mut rng).unwrap()).collect::<String>()
        };
        let sentence = |i: usize| {
            let words: Vec<String> = (0..9).map(|_| word()).collect();
            format!("{} {i}.{}", words.join(" "), if i % 7 == 6 { "\n" } else { " " })
        };
        (0..800).map(sentence).collect()
    }

    fn haystack() -> (Haystack, TextTokenizer) {
        let text = text();
        let tokenizer = train_bpe(&[&text], 600, Style::ByteLevel, None).unwrap();
        (Haystack::new(&[&text], &tokenizer).unwrap(), tokenizer)
    }

    const ALL: [NeedleKind; 3] = [NeedleKind::Repeat, NeedleKind::Passkey, NeedleKind::Sentence];

    fn recipe(kind: NeedleKind, most_needles: usize, max_len: usize) -> Recipe {
        Recipe {
            kinds: vec![kind],
            words: None,
            most_needles,
            asks: 1,
            fill: 0.5,
            depth: None,
            distractors: 0,
            max_len,
        }
    }

    #[test]
    fn sentences_together_are_the_text() {
        let text = "It rained. 3.5 mm fell!  Who knew?\n= Head =\n\nA b c";

        let found = sentences(text);

        assert_eq!(
            found,
            ["It rained. ", "3.5 mm fell!  ", "Who knew?\n", "= Head =\n\n", "A b c"]
        );
        assert_eq!(found.concat(), text);
    }

    #[test]
    fn an_answer_stands_in_its_needle_and_behind_its_question_alone() {
        let (haystack, tokenizer) = haystack();
        for kind in ALL {
            for index in 0..40 {
                let document =
                    haystack.document(&recipe(kind, 4, 500), &tokenizer, 3, index).unwrap();
                let read = |tokens: &Range<usize>| {
                    tokenizer.decode(&document.ids[tokens.clone()], false).unwrap()
                };
                let ids = tokenizer.ids(&document.text, true).unwrap();
                assert_eq!(document.ids, ids, "the tokens are those of the text as a whole");
                assert!(document.ids.len() <= 500, "{}", document.ids.len());
                assert_eq!(document.answers.len(), document.needles.len(), "each is asked for");
                let asked: BTreeSet<usize> =
                    document.answers.iter().map(|answer| answer.needle).collect();
                assert_eq!(asked.len(), document.needles.len(), "once");
                for Answer { needle, tokens, question } in &document.answers {
                    assert_eq!(question.end, tokens.start);
                    let Needle { tokens: needle, told, .. } = &document.needles[*needle];
                    for told in told {
                        let told = read(told);
                        assert_eq!(told.trim(), read(tokens).trim().trim_end_matches('.'));
                    }
                    assert_eq!(told.len(), if kind == NeedleKind::Passkey { 2 } else { 1 });
                    let (answer, needle) = (read(tokens), read(needle));
                    let fact = answer.trim_end_matches('.');
                    assert!(answer.starts_with(' ') && answer.ends_with('.'), "{answer:?}");
                    assert!(needle.contains(fact), "{answer:?} is not in {needle:?}");
                    let before = read(&(0..tokens.start));
                    let n_told = before.matches(fact).count();
                    assert_eq!(
                        n_told,
                        if kind == NeedleKind::Passkey { 2 } else { 1 },
                        "{answer:?}"
                    );
                    let question = before.rsplit('\n').next().unwrap();
                    assert!(needle.contains(question.rsplit(['?', ':']).next().unwrap().trim()));
                }
            }
        }
    }

    #[test]
    fn a_document_is_the_haystack_but_for_its_needles() {
        let (haystack, tokenizer) = haystack();
        let whole = text();
        for index in 0..20 {
            let document =
                haystack.document(&recipe(NeedleKind::Sentence, 1, 300), &tokenizer, 0, index);
            let Document { ids, needles, text, .. } = document.unwrap();
            let needle = tokenizer.decode(&ids[needles[0].tokens.clone()], false).unwrap();
            let needle = needle.trim();
            let (before, behind) = text.split_once(needle).expect("the needle stands in the text");
            let behind = behind.split("\nWh").next().unwrap().trim();
            assert!(
                before.is_empty() || before.ends_with(". ") || before.ends_with('\n'),
                "{before:?}"
            );
            let around = format!("{before}{behind}");
            let around = around.trim();
            // The text may begin anew where it ends.
            let twice = whole.clone() + &whole;
            assert!(twice.contains(around), "{around:?}");
        }
    }

    #[test]
    fn a_needle_stands_at_the_border_nearest_to_its_depth() {
        let (haystack, tokenizer) = haystack();
        let longest = haystack.sentences.iter().map(|sentence| sentence.n_tokens).max().unwrap();
        for wanted in [0.0, 0.25, 0.5, 0.9, 1.0] {
            for index in 0..10 {
                let recipe = Recipe { depth: Some(wanted), ..recipe(NeedleKind::Passkey, 1, 600) };
                let document = haystack.document(&recipe, &tokenizer, 0, index).unwrap();
                let Needle { depth, tokens, .. } = &document.needles[0];
                let slack = 0.6 * longest as f64 / 500.0;
                assert!((depth - wanted).abs() <= slack, "{depth} for {wanted}");
                if wanted == 0.0 {
                    assert_eq!((tokens.start, *depth), (0, 0.0));
                }
                if wanted == 1.0 {
                    assert!(*depth > 0.99, "{depth}");
                }
            }
        }
    }

    #[test]
    fn a_needle_at_another_depth_is_noticed() {
        let (haystack, tokenizer) = haystack();
        let depths = [0.0, 0.3, 0.5, 0.8, 1.0];
        for (kind, distractors) in [(NeedleKind::Passkey, 0), (NeedleKind::Sentence, 3)] {
            for (index, at) in (0..).zip(depths) {
                let recipe = Recipe { depth: Some(at), distractors, ..recipe(kind, 1, 800) };
                let document = haystack.document(&recipe, &tokenizer, 0, index).unwrap();
                for wanted in depths {
                    let found = document.check_depth(0, wanted, &tokenizer);
                    let is_misplaced = matches!(found, Err(Error::Misplaced { .. }));
                    assert_eq!(
                        is_misplaced,
                        wanted != at,
                        "at {at}, wanted at {wanted}: {found:?}"
                    );
                }
            }
        }
        // No sentence ends, so the needle can stand in front or behind alone.
        let words = text().replace(['.', '\n'], " ");
        let endless = Haystack::new(&[&words[..4000]], &tokenizer).unwrap();
        let recipe = Recipe { depth: Some(0.4), ..recipe(NeedleKind::Passkey, 1, 800) };
        let document = endless.document(&recipe, &tokenizer, 0, 0).unwrap();
        assert_eq!(document.needles[0].depth, 0.0);
        let error = document.check_depth(0, 0.4, &tokenizer).unwrap_err().to_string();
        assert!(
            error.contains("was to stand at 0.40") && error.contains("stands at 0.00"),
            "{error}"
        );
    }

    #[test]
    fn one_of_several_is_asked_for_at_its_depth() {
        let (haystack, tokenizer) = haystack();
        for kind in ALL {
            let recipe = Recipe { depth: Some(0.5), distractors: 3, ..recipe(kind, 1, 700) };
            let document = haystack.document(&recipe, &tokenizer, 0, 5).unwrap();
            assert_eq!((document.needles.len(), document.answers.len()), (4, 1));
            assert_eq!(document.answers[0].needle, 0);
            assert!((document.needles[0].depth - 0.5).abs() < 0.1, "{:?}", document.needles[0]);
            assert!(document.ids.len() <= 700);
            let read = |tokens: &Range<usize>| {
                tokenizer.decode(&document.ids[tokens.clone()], false).unwrap()
            };
            let answer = read(&document.answers[0].tokens);
            let told: Vec<bool> = document
                .needles
                .iter()
                .map(|needle| read(&needle.tokens).contains(answer.trim().trim_end_matches('.')))
                .collect();
            assert_eq!(told, [true, false, false, false]);
        }
        let full = Recipe { distractors: 50, ..recipe(NeedleKind::Passkey, 1, 300) };
        let error = haystack.document(&full, &tokenizer, 0, 0).unwrap_err().to_string();
        assert!(error.contains("`max_len` is 300") && error.contains("fewer of them"), "{error}");
    }

    #[test]
    fn other_needles_are_text_around_one() {
        let others = [(0.5, 30.0), (0.1, 20.0)];
        assert_eq!(share_of_hay(0.0, 100.0, &others), 0.0);
        assert_eq!(share_of_hay(1.0, 100.0, &others), 1.0);
        assert_eq!(share_of_hay(0.1, 100.0, &others), 0.1, "within the first");
        assert!(
            (share_of_hay(0.4, 100.0, &others) - 0.4).abs() < 1e-12,
            "60 tokens, 20 of them needle"
        );
        assert!((share_of_hay(0.8, 100.0, &others) - 0.7).abs() < 1e-12);
        assert_eq!(share_of_hay(0.3, 100.0, &[]), 0.3);
    }

    #[test]
    fn own_needles_stand_where_they_are_put() {
        let (haystack, tokenizer) = haystack();
        let own = OwnNeedle::new(
            "Mr Green is late because he lost his hat.",
            "Why is Mr Green late?",
            "Because he lost his HAT",
        );
        let own = own.unwrap();
        let other = OwnNeedle::new("The best of all is cake.", "What is best?", "cake").unwrap();
        let template = "Question: {}\nAnswer:";
        for wanted in [0.0, 0.3, 1.0] {
            let hide = |seed| {
                haystack.hide(&own, &[&other], template, (wanted, 400), &tokenizer, seed).unwrap()
            };
            let document = hide((3, 4));
            assert_eq!(document, hide((3, 4)));
            assert_ne!(document, hide((3, 5)));
            let read = |tokens: &Range<usize>| {
                tokenizer.decode(&document.ids[tokens.clone()], false).unwrap()
            };
            let Needle { tokens, depth, told, bytes } = &document.needles[0];
            assert_eq!(&document.text[bytes.clone()], own.needle);
            assert_eq!(read(tokens).trim(), own.needle);
            assert_eq!(read(&told[0]).trim(), "because he lost his hat");
            assert!((depth - wanted).abs() < 0.1, "{depth} for {wanted}");
            let Answer { question, tokens, .. } = &document.answers[0];
            assert_eq!(read(question).trim(), "Question: Why is Mr Green late?\nAnswer:");
            assert_eq!(read(tokens), " because he lost his hat");
            let border = document.text[..bytes.start].trim_end();
            assert!(border.is_empty() || border.ends_with('.'), "{border:?}");

            let null = document.asking(0, "N/A", &tokenizer).unwrap();
            let read =
                |tokens: &Range<usize>| tokenizer.decode(&null.ids[tokens.clone()], false).unwrap();
            assert_eq!(read(&null.needle).trim(), own.needle);
            assert_eq!(read(&null.question), "N/A");
            assert_eq!(null.question.end, null.ids.len());
        }
        let refused = |template, place| {
            let error = haystack.hide(&own, &[], template, place, &tokenizer, (0, 0)).unwrap_err();
            error.to_string()
        };
        assert!(refused("Answer:", (0.5, 400)).contains("one {} in it"));
        assert!(refused(template, (0.5, 9)).contains("`max_len` is 9"));
        assert!(refused(template, (-0.5, 400)).contains("`depth` is -0.5"));
        assert!(refused(template, (0.5, 100_000)).contains("documents of 100000 are asked for"));
        assert!(serde_json::from_str::<NeedleKind>("\"own\"").is_err(), "no config names it");
    }

    #[test]
    fn documents_repeat_by_seed_and_number() {
        let (haystack, tokenizer) = haystack();
        let recipe = Recipe { kinds: ALL.to_vec(), ..recipe(NeedleKind::Passkey, 4, 1500) };
        let draw = |seed, index| haystack.document(&recipe, &tokenizer, seed, index).unwrap();

        assert_eq!(draw(1, 2), draw(1, 2));
        assert_ne!(draw(1, 2), draw(1, 3));
        assert_ne!(draw(1, 2), draw(2, 2));
        let kinds: BTreeSet<NeedleKind> = (0..30).map(|index| draw(0, index).kind).collect();
        let counts: BTreeSet<usize> = (0..60).map(|index| draw(0, index).needles.len()).collect();
        assert_eq!(kinds.len(), 3);
        assert_eq!(counts, BTreeSet::from([1, 2, 3, 4]));
    }

    #[test]
    fn what_cannot_be_made_is_refused() {
        let (haystack, tokenizer) = haystack();
        let draw = |recipe: Recipe| haystack.document(&recipe, &tokenizer, 0, 0).unwrap_err();

        let few = Haystack::new(&["one two and one two and"], &tokenizer).unwrap_err().to_string();
        assert!(few.contains("has 3 words to make needles of"), "{few}");
        let long = draw(recipe(NeedleKind::Passkey, 1, 100_000)).to_string();
        assert!(long.contains("documents of 100000 are asked for"), "{long}");
        let short = draw(recipe(NeedleKind::Passkey, 1, 8)).to_string();
        assert!(short.contains("`max_len` is 8"), "{short}");
        let none = draw(Recipe { kinds: vec![], ..recipe(NeedleKind::Repeat, 1, 300) });
        assert!(none.to_string().contains("kinds"), "{none}");
        let deep = draw(Recipe { depth: Some(1.5), ..recipe(NeedleKind::Repeat, 1, 300) });
        assert!(deep.to_string().contains("depth"), "{deep}");
    }
}
