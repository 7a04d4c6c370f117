//! One picture of each kind against what it looked like, with a tolerance that a wrong axis or a shifted cell fails.
//!
//! After a change that is meant: `ATTN_BLESS=1 cargo test -p attn-viz --test golden`, and look at every picture that changed.

#[path = "../examples/gallery.rs"]
#[allow(dead_code, reason = "its `main` is the example's")]
mod gallery;

use std::path::{Path, PathBuf};

use attn_viz::{HeatMap, Picture, RgbImage, Theme};
use gallery::{heads, pictures};
use image::imageops::{FilterType, resize};

/// Golden pictures are stored at this fraction of their size.
const SHRUNK: u32 = 3;

/// Levels, of 255, by which a channel of a pixel may differ before the pixel counts.
const LEVELS: u8 = 24;

/// Share of the pixels that may count: what another rounding does to the edges of letters.
const SHARE: f64 = 0.002;

/// Pixels across and down of a tile, and how many of one may count: a single letter that is another is more.
const TILE: u32 = 32;
const OF_TILE: usize = 4;

fn shrunk(image: &RgbImage) -> RgbImage {
    let (width, height) = image.dimensions();
    resize(image, width / SHRUNK, height / SHRUNK, FilterType::Triangle)
}

/// The pixels that differ: their share, and the most of them in one tile.
#[derive(Debug)]
struct Apart {
    share: f64,
    of_tile: usize,
}

impl Apart {
    fn is_seen(&self) -> bool {
        self.share > SHARE || self.of_tile > OF_TILE
    }
}

fn apart(one: &RgbImage, other: &RgbImage) -> Apart {
    assert_eq!(one.dimensions(), other.dimensions());
    let (width, height) = one.dimensions();
    let across = width.div_ceil(TILE);
    let mut tiles = vec![0; (across * height.div_ceil(TILE)) as usize];
    for ((x, y, a), b) in one.enumerate_pixels().zip(other.pixels()) {
        if a.0.iter().zip(b.0).any(|(a, b)| a.abs_diff(b) > LEVELS) {
            tiles[(y / TILE * across + x / TILE) as usize] += 1;
        }
    }
    let n: usize = tiles.iter().sum();
    Apart {
        share: n as f64 / f64::from(width * height),
        of_tile: tiles.into_iter().max().unwrap_or(0),
    }
}

fn stored(name: &str, theme: Theme) -> PathBuf {
    let theme = if theme == Theme::Light { "light" } else { "dark" };
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/{name}-{theme}.png"))
}

fn read(path: &Path) -> RgbImage {
    image::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display())).to_rgb8()
}

fn check(theme: Theme) {
    for (name, picture) in pictures(theme) {
        let image = shrunk(&picture.render().unwrap());
        let path = stored(name, theme);
        if std::env::var_os("ATTN_BLESS").is_some() {
            image.save(&path).unwrap();
        }
        let found = apart(&image, &read(&path));
        assert!(!found.is_seen(), "{}: {found:?} of the pixels differ", path.display());
    }
}

#[test]
fn every_kind_looks_as_it_did() {
    check(Theme::Light);
}

#[test]
fn every_kind_looks_as_it_did_on_a_dark_ground() {
    check(Theme::Dark);
}

/// The tolerance is no licence: one cell with its neighbour's value, rows or columns counted from 1, rows upside down, a caption less,
/// a bar a little higher and a linear axis are all seen.
#[test]
fn small_faults_are_seen() {
    let seen = |name: &str, picture: &dyn Picture| {
        apart(&shrunk(&picture.render().unwrap()), &read(&stored(name, Theme::Light))).is_seen()
    };
    let from_one = |n: usize| (1..=n).map(|i| i.to_string()).collect();
    let map = heads(Theme::Light);
    assert!(!seen("heads", &map));

    let mut shifted = map.clone();
    shifted.values[3][8] = shifted.values[3][9];
    assert!(seen("heads", &shifted));

    let mut upside_down = map.clone();
    upside_down.values.reverse();
    assert!(seen("heads", &upside_down));

    assert!(seen("heads", &HeatMap { columns: from_one(12), ..map.clone() }), "heads from 1");
    assert!(seen("heads", &HeatMap { rows: from_one(6), ..map }), "layers from 1");

    let mut needle = gallery::needle(Theme::Light);
    assert!(!seen("needle", &needle));
    needle.maps[0].values.reverse();
    assert!(seen("needle", &needle), "depth upwards");
    let mut needle = gallery::needle(Theme::Light);
    needle.maps[1].subtitle.clear();
    assert!(seen("needle", &needle), "no conditions");
    let mut needle = gallery::needle(Theme::Light);
    needle.maps[0].shades = attn_viz::Shades::Viridis;
    assert!(seen("needle", &needle), "other colours");

    let mut bars = gallery::accuracy(Theme::Light);
    bars.bars[1].value += 4.;
    assert!(seen("accuracy", &bars));

    let mut linear = gallery::time(Theme::Light);
    linear.x_axis = attn_viz::Axis::Linear;
    assert!(seen("time", &linear));
}

/// Needles are drawn in the colours that pictures of them have, the beginning of the text above its end.
#[test]
fn needles_lie_deeper_downward_in_the_colours_of_such_pictures() {
    let mut needle = gallery::needle(Theme::Light);
    needle.maps.truncate(1);
    let map = &mut needle.maps[0];
    for (depth, row) in map.values.iter_mut().enumerate() {
        row.fill([100., 50., 0.][depth / 4]);
    }
    let image = map.render().unwrap();
    let rows_of = |color: [u8; 3]| -> Vec<u32> {
        (0..image.height()).filter(|&y| image.get_pixel(600, y).0 == color).collect()
    };
    let [red, amber, green] =
        [[0xF0, 0x49, 0x6E], [0xEB, 0xB8, 0x39], [0x0C, 0xD7, 0x9F]].map(rows_of);
    assert!(red.len() > 100 && amber.len() > 100 && green.len() > 100);
    assert!(green.last() < amber.first() && amber.last() < red.first());
}

/// What a browser shows is what the pixels are made of: the SVG of each is drawn, without its own words for who cannot see.
#[test]
fn a_vector_file_has_its_words_and_no_markup_from_labels() {
    for (name, picture) in pictures(Theme::Light) {
        let svg = picture.svg().unwrap();
        assert!(
            svg.starts_with("<svg ") && svg.contains("<title>") && svg.contains("<desc>"),
            "{name}"
        );
        assert!(!svg.contains("<script>"), "{name}: a token is no markup");
    }
    let (_, change) = pictures(Theme::Light).remove(4);
    assert!(change.svg().unwrap().contains("&lt;script&gt;"));
}
