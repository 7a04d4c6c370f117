//! Needles and haystacks that the user wrote.

use std::{
    fs, iter,
    ops::Range,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// A sentence to hide, a question that it answers, and the answer, which stands in the sentence word for word.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct OwnNeedle {
    /// The sentence.
    pub needle: String,
    /// The question.
    pub question: String,
    told: Range<usize>,
}

/// A line of a file, by the names of <https://github.com/nightdessert/Retrieval_Head>.
#[derive(Deserialize)]
struct Line {
    needle: String,
    question: String,
    #[serde(alias = "answer")]
    real_needle: String,
}

impl OwnNeedle {
    /// A needle whose answer is the part of the sentence that reads as `answer`, whatever its capitals (A to Z).
    ///
    /// # Errors
    ///
    /// What is wrong, as text: an empty part, or an answer that the sentence does not tell.
    pub fn new(needle: &str, question: &str, answer: &str) -> Result<Self, String> {
        let [needle, question, answer] = [needle, question, answer].map(str::trim);
        for (name, text) in [("needle", needle), ("question", question), ("real_needle", answer)] {
            if !text.chars().any(char::is_alphanumeric) {
                return Err(format!("`{name}` is `{text}`, expected words"));
            }
        }
        // Small letters of A to Z take as many bytes.
        let found = needle.to_ascii_lowercase().find(&answer.to_ascii_lowercase());
        let Some(start) = found else {
            return Err(format!(
                "`real_needle` is `{answer}`, expected words of the needle, `{needle}`\nhint: copy the answer from the needle, \
                 so that where it stands is known"
            ));
        };
        let told = start..start + answer.len();
        Ok(Self { needle: needle.to_owned(), question: question.to_owned(), told })
    }

    /// The answer, as the sentence says it.
    pub fn answer(&self) -> &str {
        &self.needle[self.told()]
    }

    /// Where it stands in the sentence, in bytes.
    pub fn told(&self) -> Range<usize> {
        self.told.clone()
    }
}

/// Reads needles from a file of JSON lines with the fields `needle`, `question` and `real_needle` (or `answer`). Empty lines
/// are skipped, other fields ignored.
///
/// # Errors
///
/// [`Error::Io`] for a file that cannot be read, [`Error::Needle`] with the first line that says none, or where there is none.
pub fn read_needles(path: &Path) -> Result<Vec<OwnNeedle>> {
    let text = fs::read_to_string(path).map_err(Error::io("read", path))?;
    let refuse =
        |line: usize, problem: String| Error::Needle { path: path.to_owned(), line, problem };
    let mut needles = Vec::new();
    for (line, text) in (1..).zip(text.lines()).filter(|(_, text)| !text.trim().is_empty()) {
        let Line { needle, question, real_needle } =
            serde_json::from_str(text).map_err(|error| {
                let fields = "`needle`, `question` and `real_needle`";
                refuse(line, format!("{error}\nhint: each line is a JSON object with {fields}"))
            })?;
        let own = OwnNeedle::new(&needle, &question, &real_needle);
        needles.push(own.map_err(|problem| refuse(line, problem))?);
    }
    if needles.is_empty() {
        return Err(refuse(1, "the file is empty, expected a JSON object a line".into()));
    }
    Ok(needles)
}

/// The texts of a file, or of the files of a folder that end in `.txt`, by name, their [`paragraphs`] put in order.
///
/// # Errors
///
/// [`Error::Io`] for what cannot be read, an empty folder included.
pub fn read_texts(path: &Path) -> Result<Vec<String>> {
    let failed = |path: &Path| Error::io("read", path.to_owned());
    let mut files: Vec<PathBuf> = match path.is_dir() {
        false => iter::once(path.to_owned()).collect(),
        true => fs::read_dir(path)
            .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect())
            .map_err(failed(path))?,
    };
    if path.is_dir() {
        files.retain(|file| file.extension().is_some_and(|ending| ending == "txt"));
        files.sort();
        if files.is_empty() {
            let none = std::io::Error::other("it holds no file that ends in .txt");
            return Err(failed(path)(none));
        }
    }
    let read = |file: &PathBuf| Ok(paragraphs(&fs::read_to_string(file).map_err(failed(file))?));
    files.iter().map(read).collect()
}

/// `text` with each paragraph in one line, an empty line behind each: where a text is broken to be read no sentence ends.
/// Paragraphs are set apart by empty lines.
pub fn paragraphs(text: &str) -> String {
    let mut joined = String::with_capacity(text.len());
    for line in text.lines().map(str::trim) {
        let begins = joined.is_empty() || joined.ends_with('\n');
        match (line.is_empty(), begins) {
            (true, true) => {}
            (true, false) => joined.push_str("\n\n"),
            (false, true) => joined.push_str(line),
            (false, false) => {
                joined.push(' ');
                joined.push_str(line);
            }
        }
    }
    let end = joined.trim_end().len();
    joined.truncate(end);
    joined.push_str("\n\n");
    joined
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_found_in_its_needle() {
        let own = OwnNeedle::new("It is he, because HE is.", "Who?", "Because he is").unwrap();
        assert_eq!((own.answer(), own.told()), ("because HE is", 10..23));
        let refused =
            |needle, question, answer| OwnNeedle::new(needle, question, answer).unwrap_err();
        assert!(refused("It is he.", "Who?", "she").contains("`real_needle` is `she`"));
        assert!(refused("It is he.", " ? ", "he").contains("`question` is `?`, expected words"));
        assert!(refused("It is he.", "Who?", "").contains("`real_needle` is ``"));
    }

    #[test]
    fn needles_are_read_line_by_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("needles.jsonl");
        let read = |text: &str| {
            fs::write(&path, text).unwrap();
            read_needles(&path)
        };
        let one =
            r#"{"needle": "A is b.", "question": "What is A?", "real_needle": "b", "more": 1}"#;
        let two = r#"{"question": "And c?", "needle": "C is dé.", "answer": "dé."}"#;
        let needles = read(&format!("{one}\n\n{two}\n")).unwrap();
        assert_eq!(needles.iter().map(OwnNeedle::answer).collect::<Vec<_>>(), ["b", "dé."]);
        let refused = |text: &str| read(text).unwrap_err().to_string();
        let missing = refused(&format!("{one}\n{{\"needle\": \"A\"}}"));
        assert!(missing.contains("line 2 of") && missing.contains("missing field"), "{missing}");
        assert!(missing.contains("hint: each line"), "{missing}");
        assert!(refused(&one.replace("\"b\"", "\"x\"")).contains("line 1 of"));
        assert!(refused("\n").contains("the file is empty"));
        let nowhere = read_needles(&folder.path().join("no")).unwrap_err();
        assert!(nowhere.to_string().contains("no"), "{nowhere}");
    }

    #[test]
    fn lines_of_a_paragraph_are_joined() {
        let text = "\n\nOne two\nthree. Four\r\n\n \n\nfive\n  six\n";
        assert_eq!(paragraphs(text), "One two three. Four\n\nfive six\n\n");
    }

    #[test]
    fn texts_are_read_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let error = read_texts(folder.path()).unwrap_err();
        assert!(format!("{error:?}").contains("no file that ends in .txt"), "{error:?}");
        for (name, text) in [("b.txt", "B\nb."), ("a.txt", "A."), ("c.md", "C.")] {
            fs::write(folder.path().join(name), text).unwrap();
        }
        assert_eq!(read_texts(folder.path()).unwrap(), ["A.\n\n", "B b.\n\n"]);
        assert_eq!(read_texts(&folder.path().join("b.txt")).unwrap(), ["B b.\n\n"]);
        assert!(read_texts(&folder.path().join("x.txt")).is_err());
    }
}
