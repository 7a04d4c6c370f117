//! A task put as a prompt: what a language model reads of a row, and the answer it is to give.
//!
//! Built in are the prompts of lm-evaluation-harness for SST-2 and MultiNLI, word for word
//! (<https://github.com/EleutherAI/lm-evaluation-harness>, `lm_eval/tasks/glue/sst2/default.yaml` and `mnli/`, version
//! 1.0), and a chat. As there, a prompt is a Jinja template of the row's columns, an answer follows after a delimiter,
//! and white space that ends the prompt counts to the answer.
//!
//! Which tokens are the answer's is read from the offsets of the tokens in the text. The harness counts the tokens of the
//! prompt alone instead; the two differ only where a token straddles the place, which is the answer's here.

use std::ops::Range;

use minijinja::{Environment, UndefinedBehavior, value::Value as Jinja};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::{
    batch::Encoded,
    chat::{self, ChatTemplate, Message, python_repr},
    dataset::{DatasetSpec, Example},
    error::{Error, Result, did_you_mean, list},
    tokenizer::TextTokenizer,
};

/// A prompt as a config has it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PromptSpec {
    /// A prompt of [`names`]; what is set beside it takes the place of its part.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// What stands before the answer: Jinja, with the columns as variables, `{{sentence}}`. `{{text}}` and
    /// `{{text_pair}}` are the columns that [`DatasetSpec::text`] and [`DatasetSpec::text_pair`] name, whatever those are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub template: Option<String>,
    /// Messages in place of a template, each content Jinja as above, written by the tokenizer's chat template. The
    /// assistant's next one is the answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chat: Option<Vec<Message>>,
    /// The answer that stands for each class; the names of the classes where absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub answers: Option<Vec<String>>,
    /// What stands between template and answer; a space where absent. A chat has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub delimiter: Option<String>,
    /// Puts the list of messages as Python prints it into one message of the user, and has the answer follow without
    /// the words that open the assistant's turn, where it is scored: a fault of a published experiment, to measure what
    /// it costs. Training sees the list too, but the turn opened.
    pub malformed: bool,
    /// Cuts a row that is too long down to its last tokens, as lm-evaluation-harness does, and says how many were; without
    /// it such a row is refused. A chat is not cut: its opening would be gone.
    pub cut: bool,
}

/// The prompts that are built in.
pub fn names() -> [&'static str; 3] {
    ["sst2", "mnli", "mnli_chat"]
}

fn built_in(name: &str) -> Option<PromptSpec> {
    match name {
        "sst2" => Some(sst2()),
        "mnli" => Some(mnli()),
        "mnli_chat" => Some(mnli_chat()),
        _ => None,
    }
}

/// The classes that the answers of a built-in prompt stand for, in their order.
fn classes_of(name: &str) -> Option<&'static [&'static str]> {
    match name {
        "sst2" => Some(&["negative", "positive"]),
        "mnli" | "mnli_chat" => Some(&["entailment", "neutral", "contradiction"]),
        _ => None,
    }
}

/// Refuses data whose classes are others than those a built-in prompt answers, or stand in another order: every figure
/// would be wrong. Numbers from 0 are taken for the usual order.
fn check_classes(name: &str, expected: &[&str], classes: &[String]) -> Result<()> {
    let is_same = classes.iter().map(|class| class.to_lowercase()).eq(expected.iter().copied());
    let is_numbered = classes.len() == expected.len()
        && classes.iter().enumerate().all(|(number, class)| *class == number.to_string());
    if is_same || is_numbered {
        return Ok(());
    }
    let quoted: Vec<String> = expected.iter().map(|class| format!("\"{class}\"")).collect();
    Err(refused(
        format!(
            "the prompt `{name}` answers the classes {}, and the data has {}, in this order",
            list(&expected.iter().map(|&class| class.to_owned()).collect::<Vec<_>>()),
            list(classes)
        ),
        format!(
            "where they are the same, name them in the prompt's order (--set 'data.classes=[{}]'); else set `prompt.answers`, \
             one a class of the data",
            quoted.join(", ")
        ),
    ))
}

fn sst2() -> PromptSpec {
    let template = "{{text}}\nQuestion: Is this sentence positive or negative?\nAnswer:";
    harness(template, &["negative", "positive"])
}

/// The second text is put as a sentence, with the full stop that it may lack.
fn mnli() -> PromptSpec {
    let template = "{{text}}\nQuestion: {{text_pair.strip()}}{% if not text_pair.strip().endswith('.') %}.{% endif %} \
                    True, False or Neither?\nAnswer:";
    harness(template, &["True", "Neither", "False"])
}

fn harness(template: &str, answers: &[&str]) -> PromptSpec {
    PromptSpec {
        template: Some(template.into()),
        answers: Some(answers.iter().map(|&answer| answer.into()).collect()),
        ..PromptSpec::default()
    }
}

fn mnli_chat() -> PromptSpec {
    let system = "helpful assistant who respond entailment, neutral, or contradiction. You should only respond one word.";
    let user = "Premise:\n '{{text}}'\n Based on this premise, can we conclude the hypothesis '{{text_pair}}' is true?\n \
                OPTIONS:\n - entailment\n - neutral\n - contradiction";
    PromptSpec {
        chat: Some(vec![Message::new("system", system), Message::new("user", user)]),
        answers: Some(["entailment", "neutral", "contradiction"].map(Into::into).into()),
        ..PromptSpec::default()
    }
}

impl PromptSpec {
    /// The same with a name replaced by what it stands for.
    ///
    /// # Errors
    ///
    /// [`Error::Prompt`] for a name that is not built in, and for settings that do not go together.
    pub fn resolved(&self) -> Result<Self> {
        let mut spec = self.clone();
        if let Some(name) = spec.name.take() {
            let base = built_in(&name).ok_or_else(|| {
                let known: Vec<String> = names().into_iter().map(Into::into).collect();
                let near = did_you_mean(&name, &known);
                refused(
                    format!("there is no prompt `{name}`, only {}", list(&known)),
                    match near.strip_prefix("\nhint: ") {
                        Some(near) => near.to_owned(),
                        None => "write your own: `template` and `answers`".to_owned(),
                    },
                )
            })?;
            // A template of one's own takes the place of the built-in messages, and the other way round.
            let is_own = spec.template.is_some() || spec.chat.is_some();
            spec.template = spec.template.or(base.template.filter(|_| !is_own));
            spec.chat = spec.chat.or(base.chat.filter(|_| !is_own));
            spec.answers = spec.answers.or(base.answers);
        }
        spec.check()?;
        if spec.template.is_some() {
            spec.delimiter.get_or_insert_with(|| " ".into());
        }
        Ok(spec)
    }

    fn check(&self) -> Result<()> {
        let refuse = |problem: &str, hint: &str| Err(refused(problem.into(), hint.into()));
        match (&self.template, &self.chat) {
            (None, None) => {
                return refuse(
                    "the prompt has neither `template` nor `chat`",
                    "set `prompt.name` to `sst2`, `mnli` or `mnli_chat`, or write a `prompt.template`",
                );
            }
            (Some(_), Some(_)) => {
                return refuse("the prompt has both `template` and `chat`", "leave one away");
            }
            (Some(_), None) if self.malformed => {
                return refuse(
                    "`prompt.malformed` is set, and the prompt is no chat",
                    "leave it away, or set `prompt.chat`",
                );
            }
            (None, Some(_)) if self.cut => {
                return refuse(
                    "`prompt.cut` is set, and a chat without its beginning is none",
                    "leave it away",
                );
            }
            (None, Some(_)) if self.delimiter.is_some() => {
                return refuse(
                    "`prompt.delimiter` is set, and a chat has none: its template says what opens an answer",
                    "leave it away",
                );
            }
            _ => {}
        }
        if let Some(last) = self.chat.as_ref().map(|chat| chat.last()) {
            let found = match last {
                Some(last) if last.role != "assistant" => return self.check_answers(),
                Some(_) => "ends with the assistant",
                None => "has no message",
            };
            return refuse(
                &format!("`prompt.chat` {found}, and the answer is the assistant's next message"),
                "end it with a message of the user",
            );
        }
        self.check_answers()
    }

    fn check_answers(&self) -> Result<()> {
        let answers = self.answers.as_deref().unwrap_or_default();
        for (class, answer) in answers.iter().enumerate() {
            if answer.trim().is_empty() {
                return Err(refused(
                    format!("the answer of class {class} is {answer:?}, expected a word"),
                    "`prompt.answers` has one a class, in the order of their numbers".into(),
                ));
            }
            if let Some(other) = answers[..class].iter().position(|other| other == answer) {
                return Err(refused(
                    format!("classes {other} and {class} have the same answer `{answer}`"),
                    "`prompt.answers` has one a class, in the order of their numbers".into(),
                ));
            }
        }
        Ok(())
    }
}

/// A prompt with one of its answers, tokenized.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Completion {
    /// Token ids of both.
    pub ids: Vec<u32>,
    /// Those of the answer; at least one, and at least one stands before it.
    pub answer: Range<usize>,
}

/// A row with each answer it may get.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// One a class.
    pub answers: Vec<Completion>,
    /// The class it has; absent where the row is not labelled.
    pub label: Option<i64>,
    /// Row number in the split, from 0.
    pub index: usize,
}

/// Rows as prompts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompted<T> {
    /// In the order they were given.
    pub rows: Vec<T>,
    /// Rows that were cut. Worth a line to the user where it is not 0.
    pub n_truncated: usize,
    /// Tokens of the longest row before cutting, with its answer.
    pub longest: usize,
}

/// Puts rows as prompts.
#[derive(Debug)]
pub struct Prompt {
    env: Environment<'static>,
    /// Role and name of the template of each message; one without a role where there is no chat.
    parts: Vec<Option<String>>,
    chat: Option<ChatTemplate>,
    answers: Vec<String>,
    delimiter: String,
    malformed: bool,
    cut: bool,
    columns: [Option<String>; 2],
}

/// What a text is made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Purpose {
    Train,
    Score,
}

impl Prompt {
    /// The prompt of `spec` for rows of `data` with these classes. `template` is asked for the tokenizer's chat template
    /// where the prompt is a chat.
    ///
    /// # Errors
    ///
    /// [`Error::Prompt`] for what [`PromptSpec::resolved`] refuses, a template that is not Jinja or names a column that is
    /// not there, and answers that are not one a class; what `template` returns.
    pub fn new(
        spec: &PromptSpec,
        data: &DatasetSpec,
        classes: &[String],
        template: impl FnOnce() -> Result<ChatTemplate>,
    ) -> Result<Self> {
        if let Some(expected) = spec.name.as_deref().and_then(classes_of)
            && spec.answers.is_none()
        {
            check_classes(spec.name.as_deref().unwrap_or_default(), expected, classes)?;
        }
        let spec = spec.resolved()?;
        let answers = spec.answers.clone().unwrap_or_else(|| classes.to_vec());
        if answers.len() != classes.len() {
            return Err(refused(
                format!(
                    "the prompt has {} answers ({}), and the data {} classes ({})",
                    answers.len(),
                    list(&answers),
                    classes.len(),
                    list(classes)
                ),
                "`prompt.answers` has one a class, in the order of their numbers".into(),
            ));
        }
        PromptSpec { answers: Some(answers.clone()), ..spec.clone() }.check()?;

        let columns = [Some(data.text.clone()), data.text_pair.clone()];
        let mut known = vec!["text".to_owned()];
        if data.text_pair.is_some() {
            known.push("text_pair".into());
        }
        known.extend(columns.iter().flatten().filter(|column| *column != "text").cloned());
        let mut env = chat::environment();
        env.set_undefined_behavior(UndefinedBehavior::Strict);
        env.set_keep_trailing_newline(true);
        let sources: Vec<(Option<String>, String)> = match (&spec.chat, &spec.template) {
            (Some(chat), _) => {
                chat.iter().map(|turn| (Some(turn.role.clone()), turn.content.clone())).collect()
            }
            (None, template) => vec![(None, template.clone().expect("one of the two"))],
        };
        let mut parts = Vec::new();
        for (at, (role, source)) in sources.into_iter().enumerate() {
            let setting = match &role {
                Some(_) => format!("message {at} of `prompt.chat`"),
                None => "`prompt.template`".to_owned(),
            };
            chat::jinja(|| env.add_template_owned(at.to_string(), source)).map_err(|reason| {
                refused(
                    format!("{setting} is no Jinja: {reason}"),
                    "a column stands in two braces: {{text}}".into(),
                )
            })?;
            let used = env.get_template(&at.to_string()).expect("added above");
            let mut unknown: Vec<String> = used.undeclared_variables(false).into_iter().collect();
            unknown.retain(|name| !known.contains(name) && env.globals().all(|(of, _)| of != name));
            unknown.sort();
            if let Some(name) = unknown.first() {
                return Err(refused(
                    format!("{setting} names `{name}`, and the data has {}", list(&known)),
                    "`data.text` and `data.text_pair` name the columns that are read".into(),
                ));
            }
            parts.push(role);
        }
        let chat = match spec.chat {
            Some(_) => Some(template()?),
            None => None,
        };
        let delimiter = spec.delimiter.unwrap_or_default();
        let (malformed, cut) = (spec.malformed, spec.cut);
        Ok(Self { env, parts, chat, answers, delimiter, malformed, cut, columns })
    }

    /// The answer of each class.
    pub fn answers(&self) -> &[String] {
        &self.answers
    }

    /// Every answer to each of `rows`, which carry their number in the split. A model reads `max_len` tokens at most; the
    /// last one of an answer is predicted and not read, so that one more fits, as in lm-evaluation-harness.
    ///
    /// # Errors
    ///
    /// [`Error::ChatTemplate`] where the chat template refuses; [`Error::Prompt`] for a row of which more would be read
    /// and that may not be cut, an answer without a token, a prompt without one, and a label that has no answer.
    pub fn questions(
        &self,
        tokenizer: &TextTokenizer,
        rows: &[(usize, &Example)],
        max_len: usize,
    ) -> Result<Prompted<Question>> {
        let question = |&(index, row): &(usize, &Example)| {
            if let Some(label) = row.label {
                self.class(label, index)?;
            }
            let answer =
                |class| self.completion(tokenizer, row, index, class, Purpose::Score, max_len);
            let answers = (0..self.answers.len()).map(answer).collect::<Result<Vec<_>>>()?;
            let n_tokens = answers.iter().map(|(_, n_tokens)| *n_tokens).max();
            let is_cut = answers.iter().any(|(answer, n_tokens)| answer.ids.len() < *n_tokens);
            let answers = answers.into_iter().map(|(answer, _)| answer).collect();
            Ok((Question { answers, label: row.label, index }, is_cut, n_tokens.unwrap_or(0)))
        };
        collect(rows, question)
    }

    /// The right answer to each of `rows`, to train on, with the place of the answer's tokens: `max_len` tokens at most.
    ///
    /// # Errors
    ///
    /// As [`Self::questions`], and [`Error::Prompt`] for a row without a label.
    pub fn completions(
        &self,
        tokenizer: &TextTokenizer,
        rows: &[(usize, &Example)],
        max_len: usize,
    ) -> Result<Prompted<(Encoded, Range<usize>)>> {
        let completion = |&(index, row): &(usize, &Example)| {
            let class = self.class(row.label.unwrap_or(-1), index)?;
            let (Completion { ids, answer }, n_tokens) =
                self.completion(tokenizer, row, index, class, Purpose::Train, max_len)?;
            let is_cut = ids.len() < n_tokens;
            Ok((
                (Encoded { ids, label: row.label, index, second_from: None }, answer),
                is_cut,
                n_tokens,
            ))
        };
        collect(rows, completion)
    }

    /// What a model reads of `row` before it answers, as text.
    ///
    /// # Errors
    ///
    /// [`Error::ChatTemplate`] and [`Error::Prompt`] where it cannot be written.
    pub fn text(&self, row: &Example) -> Result<String> {
        Ok(self.written(row, 0, 0, Purpose::Score)?.before().to_owned())
    }

    fn class(&self, label: i64, index: usize) -> Result<usize> {
        let class = usize::try_from(label).ok().filter(|&class| class < self.answers.len());
        class.ok_or_else(|| {
            refused(
                format!(
                    "row {index} has label {label}, and the prompt answers for classes 0 to {}",
                    self.answers.len() - 1
                ),
                "`prompt.answers` has one a class; rows without a label cannot be trained on"
                    .into(),
            )
        })
    }

    /// A row with an answer, and how many tokens it had before it was cut.
    fn completion(
        &self,
        tokenizer: &TextTokenizer,
        row: &Example,
        index: usize,
        class: usize,
        purpose: Purpose,
        max_len: usize,
    ) -> Result<(Completion, usize)> {
        let Written { text, answer_at } = self.written(row, index, class, purpose)?;
        // A chat template writes the special tokens itself.
        let (mut ids, answer) = tokenizer.split_at(&text, answer_at, self.chat.is_none())?;
        let word = &self.answers[class];
        if answer.is_empty() {
            return Err(refused(
                format!("the answer `{word}` tokenizes to nothing (row {index}, counted from 0)"),
                "the tokenizer drops what it does not know: choose other `prompt.answers`".into(),
            ));
        }
        if answer.start == 0 {
            return Err(refused(
                format!("row {index} (counted from 0) has no token before the answer `{word}`"),
                "a first token is predicted from nothing: put some words before the answer".into(),
            ));
        }
        // What the tokenizer puts behind a text is no part of the answer.
        ids.truncate(answer.end);
        let n_tokens = ids.len();
        // Where it is scored the last token is not read.
        let (n_read, with) = match purpose {
            Purpose::Train => (n_tokens, "with"),
            Purpose::Score => (n_tokens - 1, "before the last one of"),
        };
        let over = n_read.saturating_sub(max_len);
        // At least one token of the prompt stays, or the answer would follow nothing.
        if over > 0 && !(self.cut && over < answer.start) {
            let hint = match self.cut {
                true => {
                    "the answer alone does not fit: raise the limit, or choose shorter `prompt.answers`"
                }
                false => {
                    "set `prompt.cut` to keep the last tokens alone, leave the row out, or raise the limit where the model \
                     has more positions"
                }
            };
            return Err(refused(
                format!(
                    "row {index} (counted from 0) has {n_read} tokens {with} the answer `{word}`, and {max_len} are allowed"
                ),
                hint.into(),
            ));
        }
        let answer = answer.start - over..answer.end - over;
        Ok((Completion { ids: ids.split_off(over), answer }, n_tokens))
    }

    fn written(
        &self,
        row: &Example,
        index: usize,
        class: usize,
        purpose: Purpose,
    ) -> Result<Written> {
        let mut columns = vec![("text", Jinja::from(row.text.as_str()))];
        let [text, pair] = &self.columns;
        columns.extend(text.iter().map(|name| (name.as_str(), Jinja::from(row.text.as_str()))));
        if let Some(second) = &row.pair {
            columns.push(("text_pair", Jinja::from(second.as_str())));
            columns.extend(pair.iter().map(|name| (name.as_str(), Jinja::from(second.as_str()))));
        }
        let columns = Jinja::from_iter(columns);
        let render = |at: usize| {
            let template = self.env.get_template(&at.to_string()).expect("added when made");
            chat::jinja(|| template.render(&columns)).map_err(|reason| {
                refused(
                    format!("row {index} cannot be put as a prompt: {reason}"),
                    "`prompt.template` is Jinja with the columns as variables: {{text}}".into(),
                )
            })
        };
        let answer = &self.answers[class];
        let Some(chat) = &self.chat else {
            let before = render(0)?;
            let answer_at = before.trim_end().len();
            return Ok(Written { text: format!("{before}{}{answer}", self.delimiter), answer_at });
        };
        let mut messages = Vec::new();
        for (at, role) in self.parts.iter().enumerate() {
            messages.push(Message::new(role.as_deref().unwrap_or("user"), render(at)?));
        }
        if self.malformed {
            messages = vec![Message::new("user", python_repr(&messages))];
        }
        let opened = chat.render(&messages, true)?;
        let unopened = match self.malformed && purpose == Purpose::Score {
            true => Some(chat.render(&messages, false)?),
            false => None,
        };
        messages.push(Message::new("assistant", answer.clone()));
        let whole = chat.render(&messages, false)?;
        let Some(turn) = whole.strip_prefix(&opened) else {
            return Err(refused(
                format!(
                    "the chat template in `{}` writes a conversation otherwise once it is answered, so that no place is \
                     the answer's",
                    chat.origin()
                ),
                "use a template that only appends what the assistant says".into(),
            ));
        };
        let before = unopened.as_deref().unwrap_or(&opened);
        Ok(Written { text: format!("{before}{turn}"), answer_at: before.len() })
    }
}

/// A prompt with its answer.
struct Written {
    text: String,
    /// The byte that the answer begins at.
    answer_at: usize,
}

impl Written {
    fn before(&self) -> &str {
        &self.text[..self.answer_at]
    }
}

/// On all cores; the first error by the order of the rows. `each` also says whether a row was cut, and how many tokens
/// it had.
fn collect<T: Send>(
    rows: &[(usize, &Example)],
    each: impl Fn(&(usize, &Example)) -> Result<(T, bool, usize)> + Send + Sync,
) -> Result<Prompted<T>> {
    let all: Vec<Result<_>> = rows.par_iter().with_min_len(16).map(each).collect();
    let mut found = Prompted { rows: Vec::with_capacity(rows.len()), n_truncated: 0, longest: 0 };
    for row in all {
        let (row, is_cut, n_tokens) = row?;
        found.rows.push(row);
        found.n_truncated += usize::from(is_cut);
        found.longest = found.longest.max(n_tokens);
    }
    Ok(found)
}

fn refused(problem: String, hint: String) -> Error {
    Error::Prompt { problem, hint }
}
