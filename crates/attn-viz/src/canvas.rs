//! Drawing in fractions of a pixel: shapes are drawn several times too large and averaged down, so every edge is smooth.

use std::sync::OnceLock;

use image::RgbImage;
use plotters::backend::BitMapBackend;
use plotters::coord::Shift;
use plotters::drawing::{DrawingArea, IntoDrawingArea};
use plotters::element::{Circle, Polygon, Rectangle};
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{
    Color as _, FontDesc, FontFamily, FontStyle, FontTransform, IntoFont, RGBAColor, RGBColor,
    TextStyle, register_font,
};

use crate::{Color, Error, Size};

/// Drawn pixels per picture pixel, in either direction.
const SCALE: u32 = 3;

const FAMILY: FontFamily<'static> = FontFamily::Name("attn-viz DejaVu Sans");

/// How a piece of text looks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Font {
    /// Line height in pixels.
    pub(crate) size: f64,
    pub(crate) bold: bool,
    pub(crate) color: Color,
}

/// Which point of a text its position names, along the line; across it, that is always the middle of its capitals.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Align {
    Left,
    Center,
    Right,
}

/// Runs `draw` on an empty picture. Coordinates are picture pixels from the upper left corner.
pub(crate) fn paint(
    size: Size,
    ground: Color,
    draw: impl FnOnce(&Pen<'_>) -> Result<(), Error>,
) -> Result<RgbImage, Error> {
    let Size { width, height } = size;
    if !(320..=8000).contains(&width) || !(240..=8000).contains(&height) {
        return Err(Error::Size { width, height });
    }
    register_fonts()?;

    let (wide, high) = (width * SCALE, height * SCALE);
    let mut pixels = vec![0; wide as usize * high as usize * 3];
    {
        let area = BitMapBackend::with_buffer(&mut pixels, (wide, high)).into_drawing_area();
        area.fill(&rgb(ground)).map_err(refused)?;
        let pen = Pen { area };
        draw(&pen)?;
        pen.area.present().map_err(refused)?;
    }
    Ok(averaged(&pixels, width, height))
}

/// Draws one picture.
pub(crate) struct Pen<'a> {
    area: DrawingArea<BitMapBackend<'a>, Shift>,
}

impl Pen<'_> {
    /// A filled rectangle between two corners.
    pub(crate) fn rectangle(
        &self,
        from: (f64, f64),
        to: (f64, f64),
        color: Color,
    ) -> Result<(), Error> {
        // The library includes the second corner's pixels.
        let (from, to) = (scaled(from), scaled(to));
        let to = (to.0 - 1, to.1 - 1);
        if to.0 < from.0 || to.1 < from.1 {
            return Ok(());
        }
        self.area.draw(&Rectangle::new([from, to], rgb(color).filled())).map_err(refused)
    }

    /// A filled polygon; `opacity` lets what lies below shine through.
    pub(crate) fn polygon(
        &self,
        points: &[(f64, f64)],
        color: Color,
        opacity: f64,
    ) -> Result<(), Error> {
        let points: Vec<(i32, i32)> = points.iter().copied().map(scaled).collect();
        let color: RGBAColor = rgb(color).mix(opacity);
        self.area.draw(&Polygon::new(points, color.filled())).map_err(refused)
    }

    /// A filled circle.
    pub(crate) fn disc(&self, center: (f64, f64), radius: f64, color: Color) -> Result<(), Error> {
        let radius = (radius * f64::from(SCALE)).round() as i32;
        self.area.draw(&Circle::new(scaled(center), radius, rgb(color).filled())).map_err(refused)
    }

    /// A line through `points` with round joins and ends.
    pub(crate) fn line(
        &self,
        points: &[(f64, f64)],
        width: f64,
        color: Color,
    ) -> Result<(), Error> {
        for pair in points.windows(2) {
            self.stroke(pair[0], pair[1], width, color)?;
        }
        for point in points {
            self.disc(*point, width / 2., color)?;
        }
        Ok(())
    }

    /// A line through `points` in dashes of `on` pixels with gaps of `off`.
    pub(crate) fn dashed(
        &self,
        points: &[(f64, f64)],
        (on, off): (f64, f64),
        width: f64,
        color: Color,
    ) -> Result<(), Error> {
        let mut walked = 0.;
        for pair in points.windows(2) {
            let (from, to) = (pair[0], pair[1]);
            let length = (to.0 - from.0).hypot(to.1 - from.1);
            let at = |distance: f64| {
                let part = distance / length;
                (from.0 + (to.0 - from.0) * part, from.1 + (to.1 - from.1) * part)
            };
            let mut distance = 0.;
            while distance < length {
                let phase = (walked + distance) % (on + off);
                let next =
                    (distance + if phase < on { on - phase } else { on + off - phase }).min(length);
                if phase < on {
                    self.stroke(at(distance), at(next), width, color)?;
                }
                // A step too small to move the sum would never end.
                distance = if next > distance { next } else { length };
            }
            walked += length;
        }
        Ok(())
    }

    /// One straight piece, cut off square.
    fn stroke(
        &self,
        from: (f64, f64),
        to: (f64, f64),
        width: f64,
        color: Color,
    ) -> Result<(), Error> {
        let length = (to.0 - from.0).hypot(to.1 - from.1);
        if length == 0. {
            return Ok(());
        }
        let (x, y) = ((to.1 - from.1) / length * width / 2., (from.0 - to.0) / length * width / 2.);
        let corners = [
            (from.0 + x, from.1 + y),
            (to.0 + x, to.1 + y),
            (to.0 - x, to.1 - y),
            (from.0 - x, from.1 - y),
        ];
        self.polygon(&corners, color, 1.)
    }

    /// A line of text.
    pub(crate) fn text(
        &self,
        text: &str,
        at: (f64, f64),
        align: Align,
        font: Font,
    ) -> Result<(), Error> {
        // The library puts the baseline half a line height below the point; capitals are 0.63 of it high.
        let at = scaled((at.0, at.1 - 0.185 * font.size));
        self.area.draw_text(text, &style(font, align, FontTransform::None), at).map_err(refused)
    }

    /// A line of text that reads upwards.
    pub(crate) fn text_upwards(
        &self,
        text: &str,
        at: (f64, f64),
        align: Align,
        font: Font,
    ) -> Result<(), Error> {
        let at = scaled((at.0 - 0.185 * font.size, at.1));
        self.area
            .draw_text(text, &style(font, align, FontTransform::Rotate270), at)
            .map_err(refused)
    }

    /// Pixels that `text` takes along its line.
    pub(crate) fn width_of(&self, text: &str, font: Font) -> Result<f64, Error> {
        let style = style(font, Align::Left, FontTransform::None);
        let (width, _) = self.area.estimate_text_size(text, &style).map_err(refused)?;
        Ok(f64::from(width) / f64::from(SCALE))
    }

    /// `text` in a font small enough for `width` pixels, cut off with an ellipsis where 0.7 of the size will not do.
    pub(crate) fn fitted(
        &self,
        text: &str,
        width: f64,
        font: Font,
    ) -> Result<(String, Font), Error> {
        let full = self.width_of(text, font)?;
        if full <= width {
            return Ok((text.to_owned(), font));
        }
        let font = Font { size: font.size * (width / full).max(0.7), ..font };
        let mut kept: Vec<char> = text.chars().collect();
        let mut shown = text.to_owned();
        while self.width_of(&shown, font)? > width + 0.5 && !kept.is_empty() {
            kept.pop();
            shown = kept.iter().collect::<String>().trim_end().to_owned() + "\u{2026}";
        }
        Ok((shown, font))
    }
}

fn register_fonts() -> Result<(), Error> {
    static DONE: OnceLock<bool> = OnceLock::new();
    let done = DONE.get_or_init(|| {
        let name = FAMILY.as_str();
        register_font(name, FontStyle::Normal, dejavu::sans::regular()).is_ok()
            && register_font(name, FontStyle::Bold, dejavu::sans::bold()).is_ok()
    });
    if *done {
        Ok(())
    } else {
        Err(Error::Draw { message: "the built-in font is not a font".into() })
    }
}

fn style(font: Font, align: Align, transform: FontTransform) -> TextStyle<'static> {
    let style = if font.bold { FontStyle::Bold } else { FontStyle::Normal };
    let desc =
        FontDesc::new(FAMILY, font.size * f64::from(SCALE), style).transform(transform).into_font();
    let h_pos = match align {
        Align::Left => HPos::Left,
        Align::Center => HPos::Center,
        Align::Right => HPos::Right,
    };
    TextStyle {
        font: desc,
        color: rgb(font.color).to_backend_color(),
        pos: Pos::new(h_pos, VPos::Top),
    }
}

fn scaled((x, y): (f64, f64)) -> (i32, i32) {
    let scale = f64::from(SCALE);
    ((x * scale).round() as i32, (y * scale).round() as i32)
}

fn rgb([r, g, b]: Color) -> RGBColor {
    RGBColor(r, g, b)
}

fn refused(error: impl std::fmt::Display) -> Error {
    Error::Draw { message: error.to_string() }
}

/// The mean of each block of `SCALE` x `SCALE` pixels.
fn averaged(pixels: &[u8], width: u32, height: u32) -> RgbImage {
    let (scale, width, height) = (SCALE as usize, width as usize, height as usize);
    let row = width * scale * 3;
    let n = (scale * scale) as u32;
    let mut small = Vec::with_capacity(width * height * 3);
    let mut sums = vec![0_u32; width * 3];
    for block in pixels.chunks_exact(row * scale) {
        sums.fill(0);
        for line in block.chunks_exact(row) {
            for (sum, run) in sums.chunks_exact_mut(3).zip(line.chunks_exact(3 * scale)) {
                for pixel in run.chunks_exact(3) {
                    sum[0] += u32::from(pixel[0]);
                    sum[1] += u32::from(pixel[1]);
                    sum[2] += u32::from(pixel[2]);
                }
            }
        }
        small.extend(sums.iter().map(|sum| ((sum + n / 2) / n) as u8));
    }
    RgbImage::from_raw(width as u32, height as u32, small).expect("three bytes for each pixel")
}
