//! A report that is one file: it opens from disk, asks the network for nothing, and shows what it was given as text.
//!
//! ```
//! use attn_viz::report::{Block, Cell, Column, Report, Section, Table};
//!
//! let table = Table {
//!     caption: "Accuracy by model".into(),
//!     columns: vec![Column::text("model"), Column::number("accuracy (%)")],
//!     rows: vec![
//!         vec![Cell::text("as published"), Cell::number("91.3", 91.3)],
//!         vec![Cell::text("window of 32"), Cell::number("88.0", 88.)],
//!     ],
//! };
//! let report = Report {
//!     title: "Windows in DistilBERT".into(),
//!     subtitle: "made-up numbers".into(),
//!     sections: vec![Section { title: "Accuracy".into(), blocks: vec![Block::Table(table)] }],
//! };
//! assert!(report.html()?.starts_with("<!DOCTYPE html>"));
//! # Ok::<(), attn_viz::Error>(())
//! ```

mod attention;
mod figure;
mod markup;
mod table;

use std::path::Path;

use base64::{Engine, prelude::BASE64_STANDARD};
use serde_json::json;
use sha2::{Digest, Sha256};

pub use attention::{AttentionViewer, Head, Layer, ModelAttention, Sample};
pub use figure::Figure;
use markup::{json_text, line, lines};
pub use table::{Cell, Column, Table};

use crate::picture::write_whole;
use crate::{Error, Shades, Theme};

/// Text, tables, pictures and attention to look into, as one HTML page.
///
/// Titles, names, cells and tokens are text wherever they come from: markup in them is shown, not followed, and what would steer
/// a line stands as its number, as in pictures (`⟨202E⟩`). The page's own script and style are the only ones that its security
/// policy lets in, by their hashes.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Report {
    /// The heading, and the name of the window.
    pub title: String,
    /// A smaller line below it, for the conditions; empty for none.
    pub subtitle: String,
    /// The parts, in order; at least one.
    pub sections: Vec<Section>,
}

/// A part of a report under a heading of its own.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Section {
    /// The heading.
    pub title: String,
    /// What stands below it, in order; at least one.
    pub blocks: Vec<Block>,
}

/// A piece of a section.
#[derive(Debug, Clone, PartialEq)]
pub enum Block {
    /// Plain text. An empty line begins another paragraph.
    Text(String),
    /// Names with what they stand for: settings, versions, counts.
    Facts(Vec<(String, String)>),
    /// Rows that the reader can sort.
    Table(Table),
    /// A picture for a light and one for a dark ground.
    Figure(Figure),
    /// Text in which line breaks and columns count: a config, a command.
    Code {
        /// What it is, shown above it.
        name: String,
        /// The text.
        text: String,
    },
    /// Attention weights, token by token.
    Attention(AttentionViewer),
}

const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");

/// Colours from the lowest value to the highest that the page is given: one for each step of a weight, and one in the middle.
const COLORS: usize = 255;

impl Report {
    /// Writes it as HTML. Equal reports give equal text.
    ///
    /// # Errors
    ///
    /// What has nothing to show, what is not one for each row and column, and infinite weights are named with where they stand.
    pub fn html(&self) -> Result<String, Error> {
        if self.sections.is_empty() {
            let place = format!("report `{}`", self.title);
            return Err(Error::Empty { place, expected: "section" });
        }
        let title = line(&self.title);
        let mut page = format!(
            "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
             <meta http-equiv=\"Content-Security-Policy\" content=\"{}\">\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
             <meta name=\"color-scheme\" content=\"light dark\">\n\
             <title>{title}</title>\n<link rel=\"icon\" href=\"data:,\">\n<style>{STYLE}</style>\n</head>\n<body>\n\
             <a class=\"skip\" href=\"#main\">Skip to the report</a>\n<header>\n<div>\n<h1>{title}</h1>\n",
            policy()
        );
        if !self.subtitle.is_empty() {
            page += &format!("<p class=\"subtitle\">{}</p>\n", line(&self.subtitle));
        }
        page += "</div>\n<button type=\"button\" id=\"theme\" hidden>Dark colours</button>\n</header>\n";
        page += &self.contents();
        page += "<main id=\"main\" tabindex=\"-1\">\n\
             <p class=\"trouble\" id=\"no-script\">Tables cannot be sorted and attention cannot be shown: \
             the script of this page did not run.</p>\n";
        let mut n_tables = 0;
        for (i, section) in self.sections.iter().enumerate() {
            page += &section.html(i, &mut n_tables)?;
        }
        page += "</main>\n";
        page += &format!(
            "<script type=\"application/json\" id=\"colors\">{}</script>\n<script>{SCRIPT}</script>\n</body>\n</html>\n",
            json_text(&colors())
        );
        Ok(page)
    }

    /// Writes it to the file `path`, which appears whole or not at all; an older one is replaced.
    ///
    /// # Errors
    ///
    /// As [`Report::html`], and if the file cannot be written: its folder must exist.
    pub fn save(&self, path: &Path) -> Result<(), Error> {
        write_whole(path, self.html()?.as_bytes())
            .map_err(|source| Error::Write { path: path.to_owned(), source })
    }

    /// Links to the sections.
    fn contents(&self) -> String {
        let link = |(i, section): (usize, &Section)| {
            format!("<li><a href=\"#section-{}\">{}</a></li>\n", i + 1, line(&section.title))
        };
        let links: String = self.sections.iter().enumerate().map(link).collect();
        format!("<nav aria-label=\"Sections\">\n<ol>\n{links}</ol>\n</nav>\n")
    }
}

impl Section {
    fn html(&self, index: usize, n_tables: &mut usize) -> Result<String, Error> {
        if self.blocks.is_empty() {
            let place = format!("section `{}`", self.title);
            return Err(Error::Empty { place, expected: "block" });
        }
        let id = format!("section-{}", index + 1);
        let title = line(&self.title);
        let mut html =
            format!("<section aria-labelledby=\"{id}\">\n<h2 id=\"{id}\">{title}</h2>\n");
        for block in &self.blocks {
            html += &block.html(n_tables)?;
        }
        Ok(html + "</section>\n")
    }
}

impl Block {
    fn html(&self, n_tables: &mut usize) -> Result<String, Error> {
        match self {
            Self::Text(text) => Ok(paragraphs(text)),
            Self::Facts(facts) => Ok(list(facts)),
            Self::Table(table) => table.html(n_tables),
            Self::Figure(figure) => figure.html(n_tables),
            Self::Code { name, text } => Ok(code(name, text)),
            Self::Attention(viewer) => viewer.html(),
        }
    }
}

fn paragraphs(text: &str) -> String {
    let text = text.replace("\r\n", "\n");
    let paragraphs = text.split("\n\n").map(|it| it.trim_matches('\n')).filter(|it| !it.is_empty());
    paragraphs.map(|it| format!("<p class=\"text\">{}</p>\n", lines(it))).collect()
}

fn list(facts: &[(String, String)]) -> String {
    let fact = |(name, value): &(String, String)| {
        format!("<div><dt>{}</dt><dd>{}</dd></div>\n", line(name), line(value))
    };
    let facts: String = facts.iter().map(fact).collect();
    format!("<dl>\n{facts}</dl>\n")
}

fn code(name: &str, text: &str) -> String {
    let (name, text) = (line(name), lines(&text.replace("\r\n", "\n")));
    format!(
        "<figure class=\"code\">\n<figcaption>{name}</figcaption>\n\
         <pre tabindex=\"0\" role=\"group\" aria-label=\"{name}\"><code>{text}</code></pre>\n</figure>\n"
    )
}

/// What the page may do: run its own script, use its own style, show the pictures that it holds.
fn policy() -> String {
    let [script, style] =
        [SCRIPT, STYLE].map(|text| BASE64_STANDARD.encode(Sha256::digest(text.as_bytes())));
    format!(
        "default-src 'none'; script-src 'sha256-{script}'; style-src 'sha256-{style}'; img-src data:; \
         base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'"
    )
}

/// The colours of pictures, six hexadecimal digits each in one long text.
fn colors() -> serde_json::Value {
    let digits = |shades: Shades, theme| -> String {
        (0..COLORS)
            .map(|i| shades.color(i as f64 / (COLORS - 1) as f64, theme))
            .map(|[r, g, b]| format!("{r:02x}{g:02x}{b:02x}"))
            .collect()
    };
    let [r, g, b] = Theme::Light.missing();
    json!({
        "viridis": digits(Shades::Viridis, Theme::Light),
        "diverging": {
            "light": digits(Shades::Diverging, Theme::Light),
            "dark": digits(Shades::Diverging, Theme::Dark),
        },
        "missing": format!("{r:02x}{g:02x}{b:02x}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(text: &str) -> Report {
        let blocks = vec![Block::Text(text.into())];
        let section = Section { title: "Part".into(), blocks };
        Report { title: "Whole".into(), sections: vec![section], ..Report::default() }
    }

    #[test]
    fn a_file_is_replaced_whole_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("report.html");
        report("first").save(&path).unwrap();
        report("second").save(&path).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), report("second").html().unwrap());

        assert!(Report::default().save(&path).is_err());
        assert!(std::fs::read_to_string(&path).unwrap().contains("second"));
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1, "nothing is left beside it");

        let nowhere = report("third").save(&folder.path().join("missing/report.html"));
        assert!(matches!(nowhere, Err(Error::Write { .. })));
    }

    #[test]
    fn what_is_empty_is_named() {
        let message = |report: &Report| report.html().unwrap_err().to_string();
        let mut empty = report("text");
        empty.sections[0].blocks.clear();
        assert_eq!(message(&empty), "section `Part` is empty, expected at least one block");
        empty.sections.clear();
        assert_eq!(message(&empty), "report `Whole` is empty, expected at least one section");
    }

    /// The script and the style end where they are meant to, and what is hashed is what stands between the tags.
    #[test]
    fn the_page_holds_one_script_and_one_style() {
        let html = report("</script></style>").html().unwrap();
        for (tag, text) in [("script", SCRIPT), ("style", STYLE)] {
            let start = format!("<{tag}>");
            assert_eq!(html.matches(&start).count(), 1);
            assert!(html.contains(&format!("{start}{text}</{tag}>")));
            assert!(!text.contains("</") && !text.contains('\r'), "{tag}");
        }
        assert_eq!(html, report("</script></style>").html().unwrap());
    }
}
