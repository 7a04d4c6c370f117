//! Pixels of an SVG that this crate wrote.

use std::sync::{Arc, OnceLock};

use image::RgbImage;
use resvg::tiny_skia::{Pixmap, Transform};
use resvg::usvg::{Options, Tree, fontdb::Database};

use crate::Error;
use crate::picture::Size;

/// Draws `svg` with the built-in font; nothing on disk is looked at.
pub(crate) fn raster(svg: &str, Size { width, height }: Size) -> Result<RgbImage, Error> {
    let refused = |message: String| Error::Draw { message };
    let options =
        Options { fontdb: fonts(), font_family: "DejaVu Sans".into(), ..Options::default() };
    let tree = Tree::from_str(svg, &options).map_err(|error| refused(error.to_string()))?;
    let mut pixmap = Pixmap::new(width, height)
        .ok_or_else(|| refused(format!("no memory for {width} x {height} pixels")))?;
    resvg::render(&tree, Transform::identity(), &mut pixmap.as_mut());
    // The ground covers everything, so that no pixel is transparent.
    let bytes = pixmap.data().chunks_exact(4).flat_map(|pixel| [pixel[0], pixel[1], pixel[2]]);
    Ok(RgbImage::from_raw(width, height, bytes.collect()).expect("three bytes for each pixel"))
}

fn fonts() -> Arc<Database> {
    static FONTS: OnceLock<Arc<Database>> = OnceLock::new();
    let load = || {
        let mut fonts = Database::new();
        fonts.load_font_data(dejavu::sans::regular().to_vec());
        fonts.load_font_data(dejavu::sans::bold().to_vec());
        fonts.set_sans_serif_family("DejaVu Sans");
        Arc::new(fonts)
    };
    Arc::clone(FONTS.get_or_init(load))
}
