use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process;

use image::codecs::png::{CompressionType, FilterType, PngEncoder};
use image::{ExtendedColorType, ImageEncoder, RgbImage};

use crate::canvas::{Alt, Pen, paint};
use crate::font::Medium;
use crate::raster::raster;
use crate::{Error, Theme};

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
    /// Draws it as SVG, with its title and what there is to see in words for those who hear it. Equal pictures give equal text.
    ///
    /// # Errors
    ///
    /// Numbers that cannot be drawn are named with the chart and the series, bar or cell they stand in.
    fn svg(&self) -> Result<String, Error>;

    /// Draws it as pixels, with nothing but the built-in font: a sign that it lacks stands as its number, `⟨4E2D⟩`.
    ///
    /// # Errors
    ///
    /// As [`Picture::svg`].
    fn render(&self) -> Result<RgbImage, Error>;

    /// Draws it into a PNG file at `path`. The file appears whole or not at all; an older one is replaced.
    ///
    /// # Errors
    ///
    /// As [`Picture::render`], and if the file cannot be written: its folder must exist.
    fn png(&self, path: &Path) -> Result<(), Error> {
        let image = self.render()?;
        let bytes =
            encode(&image).map_err(|source| Error::Encode { path: path.to_owned(), source })?;
        write_whole(path, &bytes).map_err(|source| Error::Write { path: path.to_owned(), source })
    }

    /// Draws it into the file `path`: pixels where its name ends in `.png`, vectors where it ends in `.svg`. Written as
    /// [`Picture::png`] does.
    ///
    /// # Errors
    ///
    /// As [`Picture::png`], and if the name ends in something else.
    fn save(&self, path: &Path) -> Result<(), Error> {
        let extension = path.extension().map(|it| it.to_string_lossy().to_lowercase());
        match extension.as_deref() {
            Some("png") => self.png(path),
            Some("svg") => write_whole(path, self.svg()?.as_bytes())
                .map_err(|source| Error::Write { path: path.to_owned(), source }),
            _ => Err(Error::Format { path: path.to_owned() }),
        }
    }
}

/// A kind of picture.
pub(crate) trait Draw {
    /// Pixels.
    fn size(&self) -> Size;

    /// The ground and its colours.
    fn theme(&self) -> Theme;

    /// What it says to those who do not see it.
    fn alt(&self) -> Alt;

    /// Checks its numbers and draws them on an empty ground.
    fn draw(&self, pen: &Pen) -> Result<(), Error>;
}

impl<D: Draw> Picture for D {
    fn svg(&self) -> Result<String, Error> {
        svg(self, Medium::Svg)
    }

    fn render(&self) -> Result<RgbImage, Error> {
        raster(&svg(self, Medium::Pixels)?, self.size())
    }
}

fn svg(it: &impl Draw, medium: Medium) -> Result<String, Error> {
    paint(it.size(), it.theme().ground(), medium, &it.alt(), |pen| it.draw(pen))
}

/// The bytes of a PNG file.
pub(crate) fn encode(image: &RgbImage) -> image::ImageResult<Vec<u8>> {
    let mut bytes = Vec::new();
    let encoder =
        PngEncoder::new_with_quality(&mut bytes, CompressionType::Default, FilterType::Adaptive);
    encoder.write_image(image, image.width(), image.height(), ExtendedColorType::Rgb8)?;
    Ok(bytes)
}

/// Writes beside `path` and renames, so that no reader sees half a file. What a kill leaves beside it is written over by the
/// next writer.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let (scratch, file) = scratch_beside(path)?;
    let written = (|| {
        file.set_len(0)?;
        let mut file = BufWriter::new(file);
        file.write_all(bytes)?;
        let file = file.into_inner()?;
        file.sync_all()?;
        // Locked until it has its name.
        fs::rename(&scratch, path)
    })();
    if written.is_err() {
        // The first error is the one worth telling.
        let _ = fs::remove_file(&scratch);
    }
    written
}

/// A file in the same folder that nobody else writes to, be it left by a kill.
fn scratch_beside(path: &Path) -> io::Result<(PathBuf, File)> {
    let name = path
        .file_name()
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the path names no file"))?
        .to_string_lossy();
    let scratch = path.with_file_name(format!(".{name}.tmp"));
    loop {
        let file = File::options().create(true).truncate(false).write(true).open(&scratch)?;
        if file.lock().is_err() {
            // Some network file systems have no locks.
            let own = path.with_file_name(format!(".{name}.{}.tmp", process::id()));
            return Ok((own.clone(), File::create(own)?));
        }
        // Who held it may have given it its name meanwhile.
        let place = |it: fs::Metadata| (it.dev(), it.ino());
        if let Ok(there) = fs::symlink_metadata(&scratch)
            && place(there) == place(file.metadata()?)
        {
            return Ok((scratch, file));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writers_of_one_picture_leave_one_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.svg");
        fs::write(dir.path().join(".a.svg.tmp"), vec![b'x'; 100_000]).unwrap(); // left by a kill
        std::thread::scope(|scope| {
            for writer in 0..8_u8 {
                let path = &path;
                scope.spawn(move || {
                    (0..20).for_each(|_| write_whole(path, &[writer; 50_000]).unwrap())
                });
            }
        });

        let found = fs::read(&path).unwrap();
        assert_eq!(found, vec![found[0]; 50_000]);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing else is there");
    }
}
