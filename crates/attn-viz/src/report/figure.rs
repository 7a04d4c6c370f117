use base64::{Engine, prelude::BASE64_STANDARD};
use quick_xml::Reader;
use quick_xml::events::{BytesStart, Event};

use super::Table;
use super::markup::line;
use crate::{Error, Picture, Theme};

/// A picture with what it shows in words, and its numbers behind it.
///
/// Pictures are shown as images, so that nothing in them runs and none sees another's names.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Figure {
    /// SVG for a light ground.
    pub light: String,
    /// SVG for a dark ground.
    pub dark: String,
    /// What it shows.
    pub caption: String,
    /// The numbers, folded away below it.
    pub data: Option<Table>,
}

/// What an SVG says of itself.
#[derive(Debug, Default)]
struct Words {
    title: String,
    description: String,
    width: String,
    height: String,
}

impl Figure {
    /// A picture drawn in both themes.
    ///
    /// # Errors
    ///
    /// As [`Picture::svg`].
    pub fn draw<P: Picture>(
        caption: impl Into<String>,
        picture: impl Fn(Theme) -> P,
    ) -> Result<Self, Error> {
        let [light, dark] = [Theme::Light, Theme::Dark].map(|theme| picture(theme).svg());
        Ok(Self { light: light?, dark: dark?, caption: caption.into(), data: None })
    }

    pub(super) fn html(&self, n_tables: &mut usize) -> Result<String, Error> {
        let light = self.image(&self.light, "light")?;
        let dark = self.image(&self.dark, "dark")?;
        let caption = line(&self.caption);
        let mut html = format!(
            "<figure>\n<div class=\"scroll\" role=\"group\" aria-label=\"{caption}\" tabindex=\"0\">\n{light}{dark}</div>\n\
             <figcaption>{caption}</figcaption>\n"
        );
        if let Some(data) = &self.data {
            html += "<details>\n<summary>Numbers behind it</summary>\n";
            html += &data.html(n_tables)?;
            html += "</details>\n";
        }
        Ok(html + "</figure>\n")
    }

    fn image(&self, svg: &str, ground: &str) -> Result<String, Error> {
        let words = words_of(svg).map_err(|message| Error::Svg {
            place: format!("{ground} picture of figure `{}`", self.caption),
            message,
        })?;
        let Words { title, description, width, height } = &words;
        let said = [title, description].map(|it| it.trim()).into_iter().filter(|it| !it.is_empty());
        let alt = said.collect::<Vec<_>>().join(". ");
        let alt = if alt.is_empty() { line(&self.caption) } else { line(&alt) };
        let size = |name: &str, value: &str| match value.parse::<u32>() {
            Ok(value) => format!(" {name}=\"{value}\""),
            Err(_) => String::new(),
        };
        Ok(format!(
            "<img class=\"on-{ground}\"{}{} alt=\"{alt}\" src=\"data:image/svg+xml;base64,{}\">\n",
            size("width", width),
            size("height", height),
            BASE64_STANDARD.encode(svg)
        ))
    }
}

/// Reads title, description and size. Says what is wrong with what is no SVG.
fn words_of(svg: &str) -> Result<Words, String> {
    let mut reader = Reader::from_str(svg);
    let mut words = Words::default();
    let mut open: Vec<Vec<u8>> = Vec::new();
    let mut seen = false;
    loop {
        match reader.read_event().map_err(|error| error.to_string())? {
            Event::Eof if seen && open.is_empty() => return Ok(words),
            Event::Eof => return Err("it ends before its `</svg>`".into()),
            Event::Start(start) => {
                if !seen {
                    begin(&start, &mut words)?;
                    seen = true;
                }
                open.push(start.local_name().as_ref().to_vec());
            }
            Event::End(_) => {
                open.pop();
            }
            Event::Empty(start) if !seen => {
                begin(&start, &mut words)?;
                seen = true;
            }
            Event::Text(text) => {
                let text = text.decode().map_err(|error| error.to_string())?;
                add(&mut words, &open, &text);
            }
            Event::GeneralRef(name) => {
                let name = name.decode().map_err(|error| error.to_string())?;
                let text = quick_xml::escape::unescape(&format!("&{name};"))
                    .map_err(|error| error.to_string())?
                    .into_owned();
                add(&mut words, &open, &text);
            }
            _ => {}
        }
    }
}

fn begin(start: &BytesStart, words: &mut Words) -> Result<(), String> {
    if start.local_name().as_ref() != b"svg" {
        return Err("its first element is not `<svg>`".into());
    }
    let value = |name: &str| {
        let found = start.try_get_attribute(name).ok().flatten();
        found.map_or_else(String::new, |it| String::from_utf8_lossy(&it.value).into_owned())
    };
    (words.width, words.height) = (value("width"), value("height"));
    Ok(())
}

/// Adds to the title or the description where these are the picture's own, not those of a shape in it.
fn add(words: &mut Words, open: &[Vec<u8>], text: &str) {
    match open {
        [_, name] if name == b"title" => words.title += text,
        [_, name] if name == b"desc" => words.description += text,
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Bar, BarChart};

    fn chart(theme: Theme) -> BarChart {
        let bar = Bar { label: "before".into(), value: 3., ..Bar::default() };
        BarChart { title: "A < B & \"C\"".into(), bars: vec![bar], theme, ..BarChart::default() }
    }

    #[test]
    fn a_picture_is_told_in_its_own_words() {
        let figure = Figure::draw("bars", chart).unwrap();
        let html = figure.html(&mut 0).unwrap();
        let [light, dark] = [&figure.light, &figure.dark].map(|svg| BASE64_STANDARD.encode(svg));
        let (before, after) = html.split_once("class=\"on-dark\"").unwrap();
        assert!(light != dark && before.contains(&light) && after.contains(&dark));
        assert_eq!(html.matches("alt=\"A &lt; B &amp; &quot;C&quot;").count(), 2, "{html}");
        assert!(html.contains("class=\"on-light\" width=\"1200\" height=\"720\""), "{html}");
    }

    #[test]
    fn what_is_no_svg_is_refused_by_name() {
        for bad in ["", "no picture", "<html></html>", "<svg>", "<svg></g></svg>"] {
            let light = Figure::draw("bars", chart).unwrap().light;
            let figure =
                Figure { light, dark: bad.into(), caption: "bars".into(), ..Figure::default() };
            let message = figure.html(&mut 0).unwrap_err().to_string();
            assert!(
                message.starts_with("the dark picture of figure `bars` is no SVG"),
                "{message}"
            );
        }
    }
}
