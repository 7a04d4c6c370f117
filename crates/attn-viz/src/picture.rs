use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicU64, Ordering};

use image::codecs::png::{CompressionType, FilterType, PngEncoder};
use image::{ExtendedColorType, ImageEncoder, RgbImage};

use crate::Error;

/// Pixels of a picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Across, 320 to 8000.
    pub width: u32,
    /// Down, 240 to 8000.
    pub height: u32,
}

impl Default for Size {
    fn default() -> Self {
        Self { width: 1200, height: 720 }
    }
}

/// Something that can be drawn.
pub trait Picture {
    /// Draws it. Equal pictures give equal pixels.
    ///
    /// # Errors
    ///
    /// Numbers that cannot be drawn are named with the chart and the series or bar they stand in.
    fn render(&self) -> Result<RgbImage, Error>;

    /// Draws it into a PNG file at `path`. The file appears whole or not at all; an older one is replaced.
    ///
    /// # Errors
    ///
    /// As [`Picture::render`], and if the file cannot be written: its folder must exist.
    fn png(&self, path: impl AsRef<Path>) -> Result<(), Error> {
        let path = path.as_ref();
        let image = self.render()?;
        let bytes =
            encode(&image).map_err(|source| Error::Encode { path: path.to_owned(), source })?;
        write_whole(path, &bytes).map_err(|source| Error::Write { path: path.to_owned(), source })
    }
}

fn encode(image: &RgbImage) -> image::ImageResult<Vec<u8>> {
    let mut bytes = Vec::new();
    let encoder =
        PngEncoder::new_with_quality(&mut bytes, CompressionType::Default, FilterType::Adaptive);
    encoder.write_image(image, image.width(), image.height(), ExtendedColorType::Rgb8)?;
    Ok(bytes)
}

/// Writes beside `path` and renames, so that no reader sees half a picture.
fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let scratch = scratch_beside(path)?;
    let written = File::create(&scratch).and_then(|file| {
        let mut file = BufWriter::new(file);
        file.write_all(bytes)?;
        file.into_inner()?.sync_all()?;
        fs::rename(&scratch, path)
    });
    if written.is_err() {
        // The first error is the one worth telling; the file may not even exist.
        let _ = fs::remove_file(&scratch);
    }
    written
}

/// A name in the same folder that no other thread or process uses.
fn scratch_beside(path: &Path) -> io::Result<PathBuf> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let name = path
        .file_name()
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the path names no file"))?;
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let scratch = format!(".{}.{}-{number}.tmp", name.to_string_lossy(), process::id());
    Ok(path.with_file_name(scratch))
}
