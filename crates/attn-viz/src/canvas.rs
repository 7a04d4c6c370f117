//! Drawing in fractions of a pixel. What is drawn is written down as SVG; pixels are made of that.

use std::cell::RefCell;
use std::fmt::Display;

use base64::{Engine, prelude::BASE64_STANDARD};
use image::RgbImage;
use quick_xml::Writer;
use quick_xml::events::{BytesText, Event};

use crate::font::{Font, Medium, shown};
use crate::picture::{Size, encode};
use crate::{Color, Error};

/// Which point of a text its position names, along the line; across it, that is always the middle of its capitals.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Align {
    Left,
    Center,
    Right,
}

/// What a picture is to those who do not see it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Alt {
    pub(crate) title: String,
    pub(crate) description: String,
}

/// Runs `draw` on an empty picture and returns the SVG. Coordinates are picture pixels from the upper left corner.
pub(crate) fn paint(
    size: Size,
    ground: Color,
    medium: Medium,
    alt: &Alt,
    draw: impl FnOnce(&Pen) -> Result<(), Error>,
) -> Result<String, Error> {
    let Size { width, height } = size;
    if !(320..=8000).contains(&width) || !(240..=8000).contains(&height) {
        return Err(Error::Size { width, height });
    }
    let pen = Pen { writer: RefCell::new(Writer::new(Vec::new())), medium };
    let frame = [
        ("xmlns", "http://www.w3.org/2000/svg".to_owned()),
        ("width", width.to_string()),
        ("height", height.to_string()),
        ("viewBox", format!("0 0 {width} {height}")),
        ("role", "img".to_owned()),
        ("font-family", "'DejaVu Sans', Verdana, sans-serif".to_owned()),
    ];
    let mut writer = Writer::new(Vec::new());
    let mut drawn = Ok(());
    writer
        .create_element("svg")
        .with_attributes(frame.iter().map(|(name, value)| (*name, value.as_str())))
        .write_inner_content(|inner| {
            for (name, text) in [("title", &alt.title), ("desc", &alt.description)] {
                if !text.is_empty() {
                    let text = shown(text, Medium::Svg);
                    inner.create_element(name).write_text_content(BytesText::new(&text))?;
                }
            }
            let (right, bottom) = (f64::from(width), f64::from(height));
            drawn = pen.rectangle((0., 0.), (right, bottom), ground).and_then(|()| draw(&pen));
            inner.write_event(Event::Text(BytesText::from_escaped(text_of(
                pen.writer.replace(Writer::new(Vec::new())).into_inner(),
            ))))
        })
        .map_err(refused)?;
    drawn?;
    Ok(text_of(writer.into_inner()))
}

fn text_of(bytes: impl Into<Vec<u8>>) -> String {
    String::from_utf8(bytes.into()).expect("strings alone were written")
}

/// Draws one picture.
pub(crate) struct Pen {
    writer: RefCell<Writer<Vec<u8>>>,
    medium: Medium,
}

impl Pen {
    /// A filled rectangle between two corners.
    pub(crate) fn rectangle(
        &self,
        from: (f64, f64),
        to: (f64, f64),
        color: Color,
    ) -> Result<(), Error> {
        self.cell(from, to, color, None)
    }

    /// A filled rectangle whose edges lie between pixels, as those of its neighbours; `says` is told to who points at it.
    pub(crate) fn cell(
        &self,
        from: (f64, f64),
        to: (f64, f64),
        color: Color,
        says: Option<&str>,
    ) -> Result<(), Error> {
        // What is thinner than can be written down is not to be seen.
        if to.0 - from.0 < THINNEST || to.1 - from.1 < THINNEST {
            return Ok(());
        }
        let mut attributes = box_of(from, to);
        attributes.push(("fill", hex(color)));
        if says.is_some() {
            attributes.push(("shape-rendering", "crispEdges".into()));
        }
        let says = says.map(|text| shown(text, Medium::Svg));
        self.element("rect", attributes, says.as_deref())
    }

    /// The outline of a rectangle.
    pub(crate) fn outline(
        &self,
        from: (f64, f64),
        to: (f64, f64),
        width: f64,
        color: Color,
    ) -> Result<(), Error> {
        let mut attributes = box_of(from, to);
        attributes.extend([
            ("fill", "none".into()),
            ("stroke", hex(color)),
            ("stroke-width", number(width)),
        ]);
        self.element("rect", attributes, None)
    }

    /// A filled polygon; `opacity` lets what lies below shine through.
    pub(crate) fn polygon(
        &self,
        points: &[(f64, f64)],
        color: Color,
        opacity: f64,
    ) -> Result<(), Error> {
        let attributes = vec![
            ("points", joined(points)),
            ("fill", hex(color)),
            ("fill-opacity", number(opacity)),
        ];
        self.element("polygon", attributes, None)
    }

    /// A filled circle.
    pub(crate) fn disc(&self, center: (f64, f64), radius: f64, color: Color) -> Result<(), Error> {
        let attributes = vec![
            ("cx", number(center.0)),
            ("cy", number(center.1)),
            ("r", number(radius)),
            ("fill", hex(color)),
        ];
        self.element("circle", attributes, None)
    }

    /// A line through `points` with round joins and ends.
    pub(crate) fn line(
        &self,
        points: &[(f64, f64)],
        width: f64,
        color: Color,
    ) -> Result<(), Error> {
        let mut attributes = stroke(points, width, color);
        attributes
            .extend([("stroke-linejoin", "round".into()), ("stroke-linecap", "round".into())]);
        self.element("polyline", attributes, None)
    }

    /// A line through `points` in dashes of `on` pixels with gaps of `off`.
    pub(crate) fn dashed(
        &self,
        points: &[(f64, f64)],
        (on, off): (f64, f64),
        width: f64,
        color: Color,
    ) -> Result<(), Error> {
        let mut attributes = stroke(points, width, color);
        attributes.push(("stroke-dasharray", format!("{} {}", number(on), number(off))));
        self.element("polyline", attributes, None)
    }

    /// An image, each of whose pixels becomes a rectangle.
    pub(crate) fn image(
        &self,
        from: (f64, f64),
        to: (f64, f64),
        image: &RgbImage,
    ) -> Result<(), Error> {
        let bytes = encode(image).map_err(refused)?;
        let mut attributes = box_of(from, to);
        attributes.extend([
            ("preserveAspectRatio", "none".into()),
            ("image-rendering", "optimizeSpeed".into()),
            ("style", "image-rendering:pixelated".into()),
            ("href", format!("data:image/png;base64,{}", BASE64_STANDARD.encode(bytes))),
        ]);
        self.element("image", attributes, None)
    }

    /// A line of text.
    pub(crate) fn text(
        &self,
        text: &str,
        at: (f64, f64),
        align: Align,
        font: Font,
    ) -> Result<(), Error> {
        self.write(text, (at.0, at.1 + font.to_baseline()), align, font, None)
    }

    /// A line of text that reads upwards.
    pub(crate) fn text_upwards(
        &self,
        text: &str,
        at: (f64, f64),
        align: Align,
        font: Font,
    ) -> Result<(), Error> {
        let at = (at.0 + font.to_baseline(), at.1);
        let turned = format!("rotate(-90 {} {})", number(at.0), number(at.1));
        self.write(text, at, align, font, Some(turned))
    }

    fn write(
        &self,
        text: &str,
        (x, y): (f64, f64),
        align: Align,
        font: Font,
        transform: Option<String>,
    ) -> Result<(), Error> {
        let text = shown(text, self.medium);
        if text.is_empty() {
            return Ok(());
        }
        let anchor = match align {
            Align::Left => "start",
            Align::Center => "middle",
            Align::Right => "end",
        };
        let mut attributes = vec![
            ("x", number(x)),
            ("y", number(y)),
            ("font-size", number(font.em())),
            ("fill", hex(font.color)),
            ("text-anchor", anchor.into()),
            ("xml:space", "preserve".into()),
        ];
        if font.bold {
            attributes.push(("font-weight", "bold".into()));
        }
        // Where another font takes the place of ours, the line keeps its length.
        if text.chars().all(|c| c < '\u{250}') {
            attributes.push(("textLength", number(font.width_of(&text))));
            attributes.push(("lengthAdjust", "spacingAndGlyphs".into()));
        }
        attributes.extend(transform.map(|it| ("transform", it)));
        self.element("text", attributes, Some(&text))
    }

    /// Pixels that `text` takes along its line.
    pub(crate) fn width_of(&self, text: &str, font: Font) -> f64 {
        font.width_of(&shown(text, self.medium))
    }

    /// `text` in a font small enough for `width` pixels, cut off with an ellipsis where 0.7 of the size will not do.
    pub(crate) fn fitted(&self, text: &str, width: f64, font: Font) -> (String, Font) {
        let text = shown(text, self.medium);
        let full = font.width_of(&text);
        if full <= width {
            return (text, font);
        }
        let font = Font { size: font.size * (width / full).max(0.7), ..font };
        (font.cut(&text, width + 0.5), font)
    }

    /// An element, with text for its content; that of a shape is shown to who points at it.
    fn element(
        &self,
        name: &str,
        attributes: Vec<(&str, String)>,
        content: Option<&str>,
    ) -> Result<(), Error> {
        let mut writer = self.writer.borrow_mut();
        let element = writer
            .create_element(name)
            .with_attributes(attributes.iter().map(|(name, value)| (*name, value.as_str())));
        let written = match content {
            None => element.write_empty(),
            Some(text) if name == "text" => element.write_text_content(BytesText::new(text)),
            Some(text) => element.write_inner_content(|inner| {
                inner.create_element("title").write_text_content(BytesText::new(text))?;
                Ok(())
            }),
        };
        written.map(|_| ()).map_err(refused)
    }
}

fn box_of(from: (f64, f64), to: (f64, f64)) -> Vec<(&'static str, String)> {
    vec![
        ("x", number(from.0)),
        ("y", number(from.1)),
        ("width", number(to.0 - from.0)),
        ("height", number(to.1 - from.1)),
    ]
}

fn stroke(points: &[(f64, f64)], width: f64, color: Color) -> Vec<(&'static str, String)> {
    // A line from a point to itself has no length, and so no ends to be seen by.
    vec![
        ("points", joined(points)),
        ("fill", "none".into()),
        ("stroke", hex(color)),
        ("stroke-width", number(width)),
    ]
}

fn joined(points: &[(f64, f64)]) -> String {
    let points: Vec<String> =
        points.iter().map(|(x, y)| format!("{},{}", number(*x), number(*y))).collect();
    points.join(" ")
}

/// The least that [`number`] writes.
const THINNEST: f64 = 0.001;

/// To a thousandth of a pixel, without zeros at the end.
fn number(value: f64) -> String {
    let text = format!("{value:.3}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if text == "-0" { "0".into() } else { text.into() }
}

fn hex([r, g, b]: Color) -> String {
    format!("#{r:02x}{g:02x}{b:02x}")
}

fn refused(error: impl Display) -> Error {
    Error::Draw { message: error.to_string() }
}
