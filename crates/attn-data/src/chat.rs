//! Conversations as the text that a model was trained on: chat templates, rendered as transformers renders them.
//!
//! A template is Jinja, with what transformers' `apply_chat_template` gives it: blocks that take their line with them
//! (`trim_blocks`, `lstrip_blocks`), `break` and `continue`, methods of Python's strings, lists and tables,
//! `raise_exception`, `strftime_now` (in UTC), `tojson` as Python's `json.dumps`, and the tokenizer's special tokens.

use std::{convert::Infallible, fs, path::Path};

use minijinja::{
    Environment, ErrorKind, UndefinedBehavior,
    value::{Kwargs, Value as Jinja},
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{
    error::{Error, Result},
    guard::guarded,
    tokenizer::read_json,
};

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Message {
    /// `system`, `user`, `assistant`, or what else the template knows.
    pub role: String,
    /// What is said.
    pub content: String,
}

impl Message {
    /// `content`, said by `role`.
    pub fn new(role: &str, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// How a tokenizer's folder writes a conversation.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    env: Environment<'static>,
    tokens: Map<String, Value>,
    /// Where it comes from, for messages.
    origin: String,
}

const NAME: &str = "chat_template";

impl ChatTemplate {
    /// Reads the template of a tokenizer's folder: `chat_template.jinja`, else `chat_template` of
    /// `tokenizer_config.json` (of several the one named `default`). The special tokens are those that
    /// `tokenizer_config.json` and `special_tokens_map.json` name.
    ///
    /// # Errors
    ///
    /// [`Error::NoChatTemplate`] where there is none, [`Error::ChatTemplate`] for one that is not Jinja, [`Error::Io`]
    /// and [`Error::Json`] for damaged files.
    pub fn from_folder(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let config = read_json(&folder.join("tokenizer_config.json"))?;
        let map = read_json(&folder.join("special_tokens_map.json"))?;
        let file = folder.join("chat_template.jinja");
        let (source, origin) = if file.is_file() {
            (fs::read_to_string(&file).map_err(Error::io("read", &file))?, file)
        } else {
            let found = &config["chat_template"];
            let default = || found.as_array()?.iter().find(|named| named["name"] == "default");
            let source = found
                .as_str()
                .or_else(|| default()?["template"].as_str())
                .ok_or_else(|| Error::NoChatTemplate { folder: folder.to_path_buf() })?;
            (source.to_owned(), folder.join("tokenizer_config.json"))
        };
        let mut tokens = Map::new();
        for table in [&config, &map] {
            for (key, value) in table.as_object().into_iter().flatten() {
                let text = value.as_str().or_else(|| value["content"].as_str());
                if let Some(text) = text.filter(|_| key.ends_with("_token")) {
                    tokens.entry(key.clone()).or_insert_with(|| text.into());
                }
            }
        }
        Self::new(&source, tokens, &origin.display().to_string())
    }

    /// The template `source` with special tokens by name (`bos_token`, ...); `origin` names it in messages.
    ///
    /// # Errors
    ///
    /// [`Error::ChatTemplate`] where it is not Jinja.
    pub fn new(source: &str, tokens: Map<String, Value>, origin: &str) -> Result<Self> {
        let mut env = environment();
        env.set_trim_blocks(true);
        env.set_lstrip_blocks(true);
        jinja(|| env.add_template_owned(NAME, source.to_owned()))
            .map_err(|reason| Error::ChatTemplate { origin: origin.to_owned(), reason })?;
        Ok(Self { env, tokens, origin: origin.to_owned() })
    }

    /// Writes `messages`; `add_generation_prompt` ends with what an answer begins with, where the template has that.
    ///
    /// # Errors
    ///
    /// [`Error::ChatTemplate`] where the template refuses the conversation, with its own words.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let mut context = self.tokens.clone();
        context.insert("messages".into(), serde_json::to_value(messages).expect("texts alone"));
        context.insert("add_generation_prompt".into(), add_generation_prompt.into());
        // transformers always names these two.
        context.insert("tools".into(), Value::Null);
        context.insert("documents".into(), Value::Null);
        let template = self.env.get_template(NAME).expect("added when made");
        jinja(|| template.render(Jinja::from_serialize(&context)))
            .map_err(|reason| Error::ChatTemplate { origin: self.origin.clone(), reason })
    }

    /// Where it comes from.
    pub fn origin(&self) -> &str {
        &self.origin
    }
}

/// Steps after which a template is taken to have no end. A published one takes about 30 a message.
const FUEL: u64 = 5_000_000;

/// What Jinja has in Python, without the settings that transformers changes for chats.
pub(crate) fn environment() -> Environment<'static> {
    let mut env = Environment::new();
    env.set_undefined_behavior(UndefinedBehavior::Lenient);
    env.set_fuel(Some(FUEL));
    env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    env.add_function("raise_exception", |message: String| -> Result<String, minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
    });
    env.add_function("strftime_now", strftime_now);
    env.add_filter("tojson", to_json);
    env
}

/// What `work` with templates gives, or why it gives nothing. The library panics at some: a slice that goes backwards through what
/// is not there (minijinja 2.24).
pub(crate) fn jinja<T>(work: impl FnOnce() -> Result<T, minijinja::Error>) -> Result<T, String> {
    match guarded(|| Ok::<_, Infallible>(work())) {
        Ok(done) => done.map_err(|error| reason(&error)),
        Err(panicked) => Err(panicked.to_string()),
    }
}

/// What an error says, without the library's own name for its kind where the template raised it.
fn reason(error: &minijinja::Error) -> String {
    let what = match (error.kind(), error.detail()) {
        (ErrorKind::InvalidOperation, Some(detail)) => detail.to_owned(),
        (kind, Some(detail)) => format!("{kind}: {detail}"),
        (kind, None) => kind.to_string(),
    };
    match error.line() {
        Some(line) => format!("{what} (line {line} of the template)"),
        None => what,
    }
}

fn strftime_now(format: String) -> Result<String, minijinja::Error> {
    use std::fmt::Write;
    let now = chrono::DateTime::<chrono::Utc>::from(std::time::SystemTime::now());
    let mut text = String::new();
    write!(text, "{}", now.format(&format)).map_err(|_| {
        let problem = format!("`{format}` is no format of a date");
        minijinja::Error::new(ErrorKind::InvalidOperation, problem)
    })?;
    Ok(text)
}

/// Python's `json.dumps(x, ensure_ascii=False)`, with its `indent`.
fn to_json(value: &Jinja, options: Kwargs) -> Result<Jinja, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    let ensure_ascii: Option<bool> = options.get("ensure_ascii")?;
    let sort_keys: Option<bool> = options.get("sort_keys")?;
    options.assert_all_used()?;
    if ensure_ascii == Some(true) || sort_keys == Some(true) {
        let problem =
            "`tojson` is asked for `ensure_ascii` or `sort_keys`, which are not written here";
        return Err(minijinja::Error::new(ErrorKind::InvalidOperation, problem));
    }
    let value = serde_json::to_value(value).map_err(|error| {
        minijinja::Error::new(ErrorKind::BadSerialization, "cannot write as JSON")
            .with_source(error)
    })?;
    let mut bytes = Vec::new();
    let written = match indent {
        Some(width) => {
            let indent = " ".repeat(width);
            let formatter = serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, formatter))
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, OneLine)),
    };
    written.expect("JSON into memory");
    Ok(Jinja::from(String::from_utf8(bytes).expect("JSON is UTF-8")))
}

/// One line with a space behind each comma and colon.
struct OneLine;

impl serde_json::ser::Formatter for OneLine {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        writer.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
    ) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

/// The messages as Python's `repr` of a list of tables writes them.
pub fn python_repr(messages: &[Message]) -> String {
    let one = |Message { role, content }: &Message| {
        format!("{{'role': {}, 'content': {}}}", repr(role), repr(content))
    };
    format!("[{}]", messages.iter().map(one).collect::<Vec<_>>().join(", "))
}

/// Python's `repr` of a text. Of what it would escape as not printable, letters that Unicode has not assigned are kept.
fn repr(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::from(quote);
    for c in text.chars() {
        match c {
            '\\' => out += "\\\\",
            '\n' => out += "\\n",
            '\r' => out += "\\r",
            '\t' => out += "\\t",
            c if c == quote => out.extend(['\\', c]),
            c if !is_printable(c) => {
                let code = u32::from(c);
                out += &match code {
                    0..=0xff => format!("\\x{code:02x}"),
                    0x100..=0xffff => format!("\\u{code:04x}"),
                    _ => format!("\\U{code:08x}"),
                };
            }
            c => out.push(c),
        }
    }
    out.push(quote);
    out
}

fn is_printable(c: char) -> bool {
    let is_format = matches!(u32::from(c), 0xad | 0x600..=0x605 | 0x61c | 0x6dd | 0x70f | 0x180e
        | 0x200b..=0x200f | 0x2028..=0x202e | 0x2060..=0x206f | 0xe000..=0xf8ff | 0xfeff | 0xfff9..=0xfffb
        | 0xe0001..=0xe007f | 0xf0000..=0x10_fffd);
    c == ' ' || !(c.is_control() || c.is_whitespace() || is_format)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(source: &str) -> Result<ChatTemplate> {
        ChatTemplate::new(source, Map::new(), "test.jinja")
    }

    #[test]
    fn a_template_that_is_no_jinja_is_refused_with_its_line() {
        let error = template("{{ messages }}\n{% if %}").unwrap_err().to_string();

        assert!(error.contains("`test.jinja`") && error.contains("line 2"), "{error}");
    }

    #[test]
    fn a_date_is_todays() {
        let date = template("{{ strftime_now('%Y') }}").unwrap().render(&[], false).unwrap();

        let now = chrono::DateTime::<chrono::Utc>::from(std::time::SystemTime::now());
        assert_eq!(date, now.format("%Y").to_string());
        let error = template("{{ strftime_now('%Q') }}").unwrap().render(&[], false).unwrap_err();
        assert!(error.to_string().contains("`%Q`"), "{error}");
    }

    #[test]
    fn the_file_of_its_own_comes_before_the_config() {
        let dir = tempfile::tempdir().unwrap();
        let read = || ChatTemplate::from_folder(dir.path());
        let render = || read().unwrap().render(&[], false).unwrap();

        let error = read().unwrap_err();
        assert!(
            matches!(error, Error::NoChatTemplate { .. }) && error.to_string().contains("hint: ")
        );

        let config = r#"{"bos_token": {"content": "<s>"}, "chat_template": [
            {"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ bos_token }} config"}]}"#;
        fs::write(dir.path().join("tokenizer_config.json"), config).unwrap();
        assert_eq!(render(), "<s> config");

        fs::write(dir.path().join("chat_template.jinja"), "{{ bos_token }} file").unwrap();
        assert_eq!(render(), "<s> file");
    }
}
