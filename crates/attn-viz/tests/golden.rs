//! One picture of each kind against what it looked like, with a tolerance that a wrong axis or a shifted cell fails.
//!
//! After a change that is meant: `ATTN_BLESS=1 cargo test -p attn-viz --test golden`, and look at every picture that changed.

#[path = "../examples/gallery.rs"]
#[allow(dead_code, reason = "its `main` is the example's")]
mod gallery;

use std::path::{Path, PathBuf};

use attn_viz::{Picture, RgbImage, Theme};
use gallery::{heads, pictures};
use image::imageops::{FilterType, resize};

/// Golden pictures are stored at this fraction of their size.
const SHRUNK: u32 = 3;

/// Levels, of 255, by which a channel of a pixel may differ before the pixel counts.
const LEVELS: u8 = 24;

/// Share of the pixels that may count: what another rounding does to the edges of letters.
const SHARE: f64 = 0.002;

fn shrunk(image: &RgbImage) -> RgbImage {
    let (width, height) = image.dimensions();
    resize(image, width / SHRUNK, height / SHRUNK, FilterType::Triangle)
}

/// The share of pixels that differ.
fn apart(one: &RgbImage, other: &RgbImage) -> f64 {
    assert_eq!(one.dimensions(), other.dimensions());
    let differs = |(a, b): (&image::Rgb<u8>, &image::Rgb<u8>)| {
        a.0.iter().zip(b.0).any(|(a, b)| a.abs_diff(b) > LEVELS)
    };
    let n = one.pixels().zip(other.pixels()).filter(|it| differs(*it)).count();
    n as f64 / f64::from(one.width() * one.height())
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
        let share = apart(&image, &read(&path));
        assert!(share <= SHARE, "{}: {share} of the pixels differ", path.display());
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

/// The tolerance is no licence: one cell with its neighbour's value, heads counted from 1, rows upside down, and a point in another
/// place all fail.
#[test]
fn small_faults_are_seen() {
    let golden = read(&stored("heads", Theme::Light));
    let share = |map: attn_viz::HeatMap| apart(&shrunk(&map.render().unwrap()), &golden);
    let map = heads(Theme::Light);
    assert!(share(map.clone()) <= SHARE);

    let mut shifted = map.clone();
    shifted.values[3][8] = shifted.values[3][9];
    assert!(share(shifted) > SHARE);

    let mut upside_down = map.clone();
    upside_down.values.reverse();
    assert!(share(upside_down) > SHARE);

    let mut from_one = map.clone();
    from_one.columns = (1..=12).map(|head| head.to_string()).collect();
    let other_names = share(from_one);
    assert!(other_names > 0., "{other_names}");

    let golden = read(&stored("accuracy", Theme::Light));
    let mut bars = gallery::accuracy(Theme::Light);
    bars.bars[1].value += 4.;
    assert!(apart(&shrunk(&bars.render().unwrap()), &golden) > SHARE);

    let golden = read(&stored("time", Theme::Light));
    let mut linear = gallery::time(Theme::Light);
    linear.x_axis = attn_viz::Axis::Linear;
    assert!(apart(&shrunk(&linear.render().unwrap()), &golden) > SHARE);
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
