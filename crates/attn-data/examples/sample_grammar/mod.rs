//! Writes the bundled sample task: short English opinions whose sentiment cannot be read off single words.
//!
//! Rows come in pairs. Both members of a pair share the pattern, the thing, the people and every other neutral
//! word; only the words that carry an opinion differ, and with them the label. So a neutral word, `not` included,
//! stands equally often under both labels. An opinion word leans to its own side, but stands under the other label often
//! enough that adding up words decides little more than the sentences that mean what their words say: a learner gets
//! from them what the words mean, and has to find out from the others what the rest of a sentence does to that. Among
//! several candidate pairs the one is taken whose opinion words and pattern were used least.
//!
//! The random numbers come from ChaCha8 and are reduced by our own code: the files depend on no library's version.

mod lexicon;
pub(crate) mod shortcuts;
mod templates;

use std::cmp::Ordering;
use std::collections::{HashMap, HashSet};

use lexicon::{
    ADVICE, ATTITUDES, Aspect, DEGREES, DOMAINS, Domain, EFFECTS, FACTS, FEELINGS, GENERAL, HOPES,
    LISTS, OPENINGS, PERSONS, Person, Polar, REGRETS, SUMMARIES, TURNS, VERDICTS,
};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use templates::KINDS;

/// The seed behind the committed files.
pub(crate) const SEED: u64 = 20_260_302;

/// Split names with their number of rows, in the order of the file.
pub(crate) const SPLITS: [(&str, usize); 3] =
    [("train", 4000), ("validation", 500), ("test", 1000)];

/// Lines of unlabelled text.
pub(crate) const N_LINES: usize = 20_000;

/// How the words of one pair after the other stand to their labels, again and again.
const READINGS: [Reading; 4] = [Reading::Direct, Reading::Reversed, Reading::Direct, Reading::Both];

/// In validation and test, one pair in so many uses a pattern that train never shows.
const HELD_OUT_EVERY: usize = 5;

/// Candidates drawn for each pair.
const N_CANDIDATES: usize = 8;

/// One labelled sentence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Row {
    pub(crate) text: String,
    /// 0 negative, 1 positive.
    pub(crate) label: i64,
    pub(crate) split: &'static str,
    /// The phenomenon.
    pub(crate) kind: &'static str,
    /// The pattern within its kind, such as `contrast-03`.
    pub(crate) template: String,
}

/// Everything the generator makes.
#[derive(Debug)]
pub(crate) struct Sample {
    pub(crate) rows: Vec<Row>,
    /// Unlabelled lines, none of which contains a sentence of validation or test.
    pub(crate) lines: Vec<String>,
}

/// Makes the sample task. The same seed gives the same sample on every machine.
pub(crate) fn generate(seed: u64) -> Sample {
    let mut rng = Rng(ChaCha8Rng::seed_from_u64(seed));
    let mut used = HashSet::new();
    let rows: Vec<Row> = SPLITS
        .iter()
        .flat_map(|&(split, n_rows)| make_split(&mut rng, split, n_rows, &mut used))
        .collect();
    let reserved =
        rows.iter().filter(|row| row.split != "train").map(|row| row.text.as_str()).collect();
    let lines = make_lines(&mut rng, &reserved);
    Sample { rows, lines }
}

/// The rows as CSV (RFC 4180, line feeds).
pub(crate) fn csv(rows: &[Row]) -> String {
    let mut out = "text,label,split,kind,template\n".to_owned();
    for Row { text, label, split, kind, template } in rows {
        let text = if text.contains([',', '"']) {
            format!("\"{}\"", text.replace('"', "\"\""))
        } else {
            text.clone()
        };
        out.push_str(&format!("{text},{label},{split},{kind},{template}\n"));
    }
    out
}

/// The lines as one text.
pub(crate) fn text(lines: &[String]) -> String {
    lines.iter().flat_map(|line| [line, "\n"]).collect()
}

/// Whether train never shows this pattern.
pub(crate) fn is_held_out(template: &str) -> bool {
    patterns().any(|pattern| pattern.held_out && pattern.name() == template)
}

/// The number of patterns that train shows, and of those it does not.
pub(crate) fn n_patterns() -> (usize, usize) {
    (
        patterns().filter(|pattern| !pattern.held_out).count(),
        patterns().filter(|pattern| pattern.held_out).count(),
    )
}

/// For each word that carries an opinion, 1 if it is a good one and -1 if it is a bad one.
pub(crate) fn opinions() -> HashMap<&'static str, i32> {
    let aspects = DOMAINS.iter().flat_map(|domain| domain.aspects).map(|aspect| aspect.adjectives);
    let things = DOMAINS.iter().map(|domain| &domain.adjectives);
    let shared = [
        &GENERAL, &VERDICTS, &EFFECTS, &ATTITUDES, &FEELINGS, &REGRETS, &ADVICE, &HOPES, &TURNS,
        &DEGREES,
    ];
    let forms = |phrases: &'static [&'static str]| {
        let forms = phrases.iter().flat_map(|phrase| phrase.split('/'));
        forms.filter_map(|form| form.split(' ').find(|word| !["a", "an"].contains(word)))
    };
    let mut signs = HashMap::new();
    for polar in aspects.chain(things).chain(shared) {
        signs.extend(forms(polar.good).map(|word| (word, 1)));
        signs.extend(forms(polar.bad).map(|word| (word, -1)));
    }
    signs
}

/// The words of a sentence, in lower case.
pub(crate) fn words(text: &str) -> impl Iterator<Item = String> {
    text.split(|c: char| !c.is_alphanumeric())
        .filter(|word| !word.is_empty())
        .map(str::to_lowercase)
}

/// A pattern and where it stands in the list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Pattern {
    kind: &'static str,
    number: usize,
    held_out: bool,
    text: &'static str,
}

impl Pattern {
    fn name(&self) -> String {
        format!("{}-{:02}", self.kind, self.number)
    }
}

fn patterns() -> impl Iterator<Item = Pattern> {
    KINDS.iter().flat_map(|kind| {
        let common = kind.common.iter().map(|text| (false, text));
        let held_out = kind.held_out.iter().map(|text| (true, text));
        let numbered = common.chain(held_out).enumerate();
        numbered.map(|(i, (held_out, text))| Pattern {
            kind: kind.name,
            number: i + 1,
            held_out,
            text,
        })
    })
}

/// The generator's source of chance.
#[derive(Debug)]
struct Rng(ChaCha8Rng);

impl Rng {
    /// A number below `n`, each equally likely up to one part in 2³².
    fn below(&mut self, n: usize) -> usize {
        ((u64::from(self.0.next_u32()) * n as u64) >> 32) as usize
    }

    fn percent(&mut self, chance: u32) -> bool {
        self.below(100) < chance as usize
    }

    fn pick<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len())]
    }
}

/// The neutral part of a sentence, shared by both members of a pair.
#[derive(Debug, Clone, Copy)]
struct Scene {
    domain: &'static Domain,
    determiner: &'static str,
    noun: (&'static str, &'static str),
    aspects: [&'static Aspect; 2],
    person: &'static Person,
    opening: Option<&'static str>,
    /// Whether "it" stands for the thing, as a sentence before has named it.
    named: bool,
}

impl Scene {
    fn draw(rng: &mut Rng) -> Self {
        let domain = rng.pick(DOMAINS);
        let first = rng.below(domain.aspects.len());
        let second = (first + 1 + rng.below(domain.aspects.len() - 1)) % domain.aspects.len();
        Self {
            domain,
            determiner: rng.pick::<&str>(&["the", "the", "this"]),
            noun: *rng.pick(domain.nouns),
            aspects: [&domain.aspects[first], &domain.aspects[second]],
            person: rng.pick(PERSONS),
            opening: rng.percent(12).then(|| *rng.pick(OPENINGS)),
            named: false,
        }
    }

    /// Goes on about the same thing, with other parts and people.
    fn next(&self, rng: &mut Rng) -> Self {
        loop {
            let next = Self::draw(rng);
            if std::ptr::eq(next.domain, self.domain)
                && next.aspects[0].phrase != self.aspects[0].phrase
            {
                return Self {
                    noun: self.noun,
                    determiner: self.determiner,
                    opening: None,
                    named: true,
                    ..next
                };
            }
        }
    }

    /// Fills every slot of `pattern` so that the sentence means `label`.
    fn fill(&self, pattern: &str, label: i64, rng: &mut Rng) -> String {
        let mut text = String::new();
        let mut chosen: Vec<&str> = Vec::new();
        let mut rest = pattern;
        while let Some((before, after)) = rest.split_once('{') {
            let (slot, after) = after.split_once('}').expect("every brace of a pattern is closed");
            text.push_str(before);
            match slot.split_once('.') {
                None => self.push_neutral(slot, &mut text),
                Some((name, side)) => {
                    let good = (label == 1) == (side == "same");
                    let word = self.draw_opinion(name, good, &chosen, rng);
                    chosen.push(word);
                    text.push_str(word);
                }
            }
            rest = after;
        }
        text.push_str(rest);
        if let Some(opening) = self.opening
            && !text.starts_with('"')
        {
            text = format!("{opening} {text}");
        }
        capitalised(&with_articles(&text))
    }

    fn push_neutral(&self, slot: &str, text: &mut String) {
        let was = |plural| if plural { "were" } else { "was" };
        match slot {
            "thing" if self.named => text.push_str("it"),
            "thing" => {
                text.push_str(self.determiner);
                text.push(' ');
                text.push_str(self.noun.0);
            }
            "noun" => text.push_str(self.noun.0),
            "things" => text.push_str(self.noun.1),
            "aspect" => text.push_str(self.aspects[0].phrase),
            "aspect2" => text.push_str(self.aspects[1].phrase),
            "was" => text.push_str(was(self.aspects[0].plural)),
            "was2" => text.push_str(was(self.aspects[1].plural)),
            "who" => text.push_str(self.person.phrase),
            "they" => text.push_str(self.person.pronoun),
            "waswho" => text.push_str(was(self.person.plural)),
            _ => panic!("no slot `{slot}`"),
        }
    }

    /// A word of the asked opinion for slot `name`, other than those already `chosen`.
    fn draw_opinion(&self, name: &str, good: bool, chosen: &[&str], rng: &mut Rng) -> &'static str {
        let list = |polar: &Polar| if good { polar.good } else { polar.bad };
        let (specific, general, form): (&Polar, Option<&Polar>, usize) = match name {
            "adj" => (&self.domain.adjectives, Some(&GENERAL), 0),
            "aadj" => (self.aspects[0].adjectives, Some(&GENERAL), 0),
            "aadj2" => (self.aspects[1].adjectives, Some(&GENERAL), 0),
            "gen" => (&GENERAL, None, 0),
            "verdict" => (&VERDICTS, None, 0),
            "vbase" => (&EFFECTS, None, 0),
            "vpast" => (&EFFECTS, None, 1),
            "lbase" => (&ATTITUDES, None, 0),
            "lpast" => (&ATTITUDES, None, 1),
            "feel" => (&FEELINGS, None, 0),
            "glad" => (&REGRETS, None, 0),
            "advise" => (&ADVICE, None, 0),
            "hope" => (&HOPES, None, 0),
            "tbase" => (&TURNS, None, 0),
            "tpast" => (&TURNS, None, 1),
            "comp" => (&DEGREES, None, 0),
            _ => panic!("no slot `{name}` with an opinion"),
        };
        loop {
            let polar = general.filter(|_| rng.percent(25)).unwrap_or(specific);
            let entry = rng.pick::<&str>(list(polar));
            let word = entry.split('/').nth(form).expect("verbs list both forms");
            if !chosen.contains(&word) {
                return word;
            }
        }
    }
}

/// Writes "an" for "a" before a vowel.
fn with_articles(text: &str) -> String {
    let mut fixed = String::with_capacity(text.len() + 4);
    for (i, word) in text.split(' ').enumerate() {
        if i > 0 {
            let open = fixed.ends_with(" a") || fixed == "a" || fixed.ends_with("\"a");
            if open && word.starts_with(['a', 'e', 'i', 'o', 'u']) && !word.starts_with("use")
                || open && word.starts_with("honest")
            {
                fixed.push('n');
            }
            fixed.push(' ');
        }
        fixed.push_str(word);
    }
    fixed
}

/// Begins every sentence of the text with a capital letter.
fn capitalised(text: &str) -> String {
    let mut begins = true;
    let mut before = ' ';
    let letter = |c: char| {
        begins |= c == ' ' && ['.', '!', '?'].contains(&before);
        before = c;
        if begins && c.is_alphabetic() {
            begins = false;
            c.to_ascii_uppercase()
        } else {
            c
        }
    };
    text.chars().map(letter).collect()
}

/// What a split has used so far.
#[derive(Debug, Default)]
struct Tally {
    words: HashMap<String, i64>,
    patterns: HashMap<Pattern, i64>,
}

impl Tally {
    /// The words in which the two sentences differ: those that carry an opinion.
    fn opinions(pair: &[String; 2]) -> impl Iterator<Item = String> {
        let [negative, positive] = pair.each_ref().map(|text| words(text).collect::<HashSet<_>>());
        negative.symmetric_difference(&positive).cloned().collect::<Vec<_>>().into_iter()
    }

    /// How worn the pair's opinion words and its pattern are.
    fn wear(&self, pattern: &Pattern, pair: &[String; 2]) -> i64 {
        let words: i64 =
            Self::opinions(pair).map(|word| self.words.get(&word).copied().unwrap_or(0)).sum();
        words + 8 * self.patterns.get(pattern).copied().unwrap_or(0)
    }

    fn add(&mut self, pattern: Pattern, pair: &[String; 2]) {
        for word in Self::opinions(pair) {
            *self.words.entry(word).or_insert(0) += 1;
        }
        *self.patterns.entry(pattern).or_insert(0) += 1;
    }
}

/// How the words of a pattern stand to its label.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reading {
    /// Most agree with it.
    Direct,
    /// Most contradict it.
    Reversed,
    /// As many agree as contradict.
    Both,
}

impl Reading {
    fn of(pattern: &Pattern) -> Self {
        let [same, opp] = [".same}", ".opp}"].map(|side| pattern.text.matches(side).count());
        match same.cmp(&opp) {
            Ordering::Greater => Self::Direct,
            Ordering::Less => Self::Reversed,
            Ordering::Equal => Self::Both,
        }
    }

    /// Those patterns of the pool that are read so.
    fn filter(self, pool: &[Pattern]) -> Vec<Pattern> {
        pool.iter().copied().filter(|pattern| Self::of(pattern) == self).collect()
    }
}

fn make_split(
    rng: &mut Rng,
    split: &'static str,
    n_rows: usize,
    used: &mut HashSet<String>,
) -> Vec<Row> {
    let (held_out, common): (Vec<Pattern>, Vec<Pattern>) =
        patterns().partition(|pattern| pattern.held_out);
    let mut tally = Tally::default();
    let mut rows = Vec::with_capacity(n_rows);
    for i in 0..n_rows / 2 {
        let unseen = split != "train" && i % HELD_OUT_EVERY == 0;
        let pool = READINGS[i % READINGS.len()].filter(if unseen { &held_out } else { &common });
        let mut best: Option<(i64, Pattern, [String; 2])> = None;
        for _ in 0..N_CANDIDATES {
            let pattern = *rng.pick(&pool);
            let scene = Scene::draw(rng);
            let pair = [0, 1].map(|label| scene.fill(pattern.text, label, rng));
            if pair.iter().any(|text| used.contains(text)) {
                continue;
            }
            let cost = tally.wear(&pattern, &pair);
            if best.as_ref().is_none_or(|(least, ..)| cost < *least) {
                best = Some((cost, pattern, pair));
            }
        }
        let (_, pattern, pair) = best.expect("the grammar has far more sentences than the sample");
        tally.add(pattern, &pair);
        for (label, text) in (0..).zip(pair) {
            used.insert(text.clone());
            rows.push(Row { text, label, split, kind: pattern.kind, template: pattern.name() });
        }
    }
    for i in (1..rows.len()).rev() {
        rows.swap(i, rng.below(i + 1));
    }
    rows
}

/// Lines for pretraining: two opinions that agree, an opinion with its summary, lists of words that go together, bare
/// facts. An opinion never stands alone, as its line then would tell nothing about what its words mean.
fn make_lines(rng: &mut Rng, reserved: &HashSet<&str>) -> Vec<String> {
    let all: Vec<Pattern> = patterns().collect();
    let plain: Vec<Pattern> = patterns().filter(|pattern| pattern.kind == "plain").collect();
    let mut seen = HashSet::new();
    let mut lines = Vec::with_capacity(N_LINES);
    while lines.len() < N_LINES {
        let scene = Scene::draw(rng);
        let bare = Scene { opening: None, ..scene };
        let label = rng.below(2) as i64;
        let pool = rng.pick(&READINGS).filter(&all);
        let opinion = scene.fill(rng.pick(&pool).text, label, rng);
        let line = match rng.below(100) {
            0..16 => vec![opinion, scene.next(rng).fill(rng.pick(&plain).text, label, rng)],
            16..46 => {
                let summaries = if label == 1 { SUMMARIES.good } else { SUMMARIES.bad };
                let summary = (*rng.pick::<&str>(summaries)).to_owned();
                if rng.percent(50) { vec![summary, opinion] } else { vec![opinion, summary] }
            }
            46..82 => vec![bare.fill(rng.pick::<&str>(LISTS), label, rng)],
            _ => {
                let facts = if rng.percent(60) { scene.domain.facts } else { FACTS };
                vec![bare.fill(rng.pick::<&str>(facts), label, rng)]
            }
        };
        if line.iter().any(|sentence| reserved.contains(sentence.as_str())) {
            continue;
        }
        let line = line.join(" ");
        if seen.insert(line.clone()) {
            lines.push(line);
        }
    }
    lines
}
