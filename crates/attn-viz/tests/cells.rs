//! Heat maps of many cells, of missing ones, and of labels that come from anywhere.

#[path = "../examples/matrix.rs"]
#[allow(dead_code, reason = "its `main` is the example's")]
mod matrix;

use attn_viz::{Color, Error, Group, HeatMap, Panels, Picture, RgbImage, Shades, Size, Theme};

fn map(n: usize, value: impl Fn(usize, usize) -> f64) -> HeatMap {
    let names: Vec<String> = (0..n).map(|i| i.to_string()).collect();
    HeatMap {
        title: "map".into(),
        rows: names.clone(),
        columns: names,
        values: (0..n).map(|row| (0..n).map(|column| value(row, column)).collect()).collect(),
        ..HeatMap::default()
    }
}

fn count(image: &RgbImage, color: Color) -> usize {
    image.pixels().filter(|pixel| pixel.0 == color).count()
}

/// The centre of all pixels of a colour, left of the colour bar.
fn centre(image: &RgbImage, color: Color) -> (f64, f64) {
    let found: Vec<(u32, u32)> = image
        .enumerate_pixels()
        .filter(|(x, _, pixel)| pixel.0 == color && *x < 1090)
        .map(|(x, y, _)| (x, y))
        .collect();
    assert!(!found.is_empty(), "no pixel is {color:?}");
    let mean = |of: fn(&(u32, u32)) -> u32| {
        found.iter().map(|it| f64::from(of(it))).sum::<f64>() / found.len() as f64
    };
    (mean(|it| it.0), mean(|it| it.1))
}

#[test]
fn one_bright_cell_of_many_is_seen_where_it_is() {
    let bright = Shades::Viridis.color(1., Theme::Light);
    for n in [100, 1000, 4096] {
        let at = (n / 4, 3 * n / 4);
        let image = map(n, |row, column| f64::from((row, column) == at)).render().unwrap();
        let (x, y) = centre(&image, bright);
        // Against a map of the same names with four cells, whose centres are known.
        let (left, right) = (70., 1095.);
        let (top, bottom) = (75., 690.);
        let share = ((x - left) / (right - left), (y - top) / (bottom - top));
        assert!((share.0 - 0.75).abs() < 0.03 && (share.1 - 0.25).abs() < 0.08, "{n}: {x} {y}");
    }
}

#[test]
fn a_cell_is_found_at_its_own_place_in_shapes_and_in_pixels() {
    // 64 x 64 cells are shapes, 65 x 65 an image: the same place.
    let bright = Shades::Viridis.color(1., Theme::Light);
    let [(x, y), (other_x, other_y)] = [64, 65].map(|n| {
        let image = map(n, |row, column| f64::from(row == n / 2 && column == 0)).render().unwrap();
        centre(&image, bright)
    });
    assert!((x - other_x).abs() < 3. && (y - other_y).abs() < 6., "{x} {y} {other_x} {other_y}");
}

fn strip(rows: usize, columns: usize, at: (usize, usize)) -> HeatMap {
    let names = |n: usize| (0..n).map(|i| i.to_string()).collect();
    let mut values = vec![vec![0.; columns]; rows];
    values[at.0][at.1] = 1.;
    HeatMap {
        title: "map".into(),
        rows: names(rows),
        columns: names(columns),
        values,
        ..HeatMap::default()
    }
}

#[test]
fn no_bright_cell_of_a_long_strip_is_lost() {
    let bright = Shades::Viridis.color(1., Theme::Light);
    let size = Size { width: 400, height: 300 };
    for n in [310, 340, 1001, 4000, 9001] {
        for rows in [1, 2] {
            for at in [0, n / 3, n - 2, n - 1] {
                let across = strip(rows, n, (rows - 1, at));
                let down = strip(n, rows, (at, rows - 1));
                for map in [across, down] {
                    let image = HeatMap { size, ..map }.render().unwrap();
                    let cells = image::imageops::crop_imm(&image, 0, 0, 350, 300).to_image();
                    assert!(count(&cells, bright) > 0, "cell {at} of {rows} x {n}");
                }
            }
        }
    }
}

#[test]
fn what_is_told_of_pixels_follows_the_cells_and_not_the_picture() {
    let told = |map: HeatMap| map.svg().unwrap().contains("each pixel shows the largest");
    let small = Size { width: 400, height: 300 };
    // The cells have about 310 pixels of the 400 across.
    for (n, expected) in [(280, false), (380, true), (4000, true)] {
        let map = HeatMap { size: small, ..strip(1, n, (0, 0)) };
        assert_eq!(told(map), expected, "{n}");
    }
    let panels = |n: usize, shades| {
        let maps = (0..4).map(|_| HeatMap { shades, ..strip(1, n, (0, 0)) }).collect();
        let title = "maps".into();
        Panels { title, maps, columns: 4, shared: true, ..Panels::default() }.svg().unwrap()
    };
    let words = "more cells than pixels: each pixel shows the largest of those below it";
    assert!(!panels(150, Shades::Viridis).contains("pixels:"));
    assert!(panels(700, Shades::Viridis).contains(words), "700 of 1200 pixels, but in a quarter");
    assert!(panels(700, Shades::Diverging).contains("shows the farthest from zero of those"));
}

#[test]
fn panels_tell_what_each_map_tells() {
    let mut maps: Vec<HeatMap> = (0..4).map(|_| map(4, |row, _| row as f64)).collect();
    maps[0].subtitle = "coefficients need not sum to 1".into();
    maps[1].values[2][3] = f64::NAN;
    maps[2].subtitle = "by chance 0.017; ".to_owned() + &"words ".repeat(60);
    let panels = Panels { maps, columns: 2, ..Panels::default() };
    let svg = panels.svg().unwrap();
    assert!(svg.contains(">coefficients need not sum to 1</text>"));
    assert!(svg.contains(">1 of 16 cells hold no number (grey)</text>"));
    let shortened = svg.split("<text").find(|it| it.contains(">by chance 0.017; words")).unwrap();
    assert!(shortened.contains("\u{2026}</text>"), "{shortened}");
    let plain = Panels { maps: vec![map(4, |row, _| row as f64)], ..panels.clone() };
    let with = HeatMap { subtitle: "noted".into(), ..plain.maps[0].clone() };
    let with = Panels { maps: vec![with], ..panels };
    let [plain, with] = [plain, with].map(|it| it.svg().unwrap().matches("<text").count());
    assert_eq!(with, plain + 1);
}

#[test]
fn the_value_farthest_from_zero_is_not_lost() {
    let lowest = Shades::Diverging.color(0., Theme::Light);
    let one = HeatMap {
        shades: Shades::Diverging,
        ..map(3000, |row, column| if (row, column) == (777, 1234) { -1. } else { 0.3 })
    };
    assert!(count(&one.render().unwrap(), lowest) > 0);
}

#[test]
fn zero_is_in_the_middle_of_diverging_colours() {
    let zero = Shades::Diverging.color(0.5, Theme::Light);
    let svg = HeatMap {
        shades: Shades::Diverging,
        ..map(2, |row, column| [[0., 0.1], [-3., 1.]][row][column])
    }
    .svg()
    .unwrap();
    let hex = |[r, g, b]: Color| format!("fill=\"#{r:02x}{g:02x}{b:02x}\"");
    assert!(svg.contains(&hex(zero)), "the cell of zero");
    assert!(svg.contains(&hex(Shades::Diverging.color(0., Theme::Light))), "the cell of -3");
    assert!(
        !svg.contains(&hex(Shades::Diverging.color(1., Theme::Light))),
        "1 is a third of the way"
    );
}

#[test]
fn cells_without_a_number_are_grey_and_counted() {
    let svg = map(3, |row, column| if row == column { f64::NAN } else { 1. }).svg().unwrap();
    assert!(svg.contains("3 of 9 cells hold no number (grey)"));
    assert_eq!(svg.matches("fill=\"#8c8c8c\"").count(), 3);
    let many = map(100, |row, column| if row == column { f64::NAN } else { 1. });
    assert!(many.svg().unwrap().contains("100 of 10000 cells hold no number"));
    assert!(count(&many.render().unwrap(), [0x8C; 3]) > 500);
}

#[test]
fn less_than_all_cells_is_said() {
    let svg = map(2000, |row, column| (row + column) as f64).svg().unwrap();
    assert!(svg.contains("2000 \u{D7} 2000 cells: each pixel shows the largest of those below it"));
    assert!(!map(100, |_, _| 1.).svg().unwrap().contains("each pixel"));
}

#[test]
fn labels_from_anywhere_are_shown_as_text() {
    let names = [
        "<script>alert(1)</script>",
        "\u{5E9}\u{5DC}\u{5D5}\u{5DD}",
        "\u{1F600}\n",
        "\u{202E}abc",
        "a&b\"'",
        "\u{0}",
    ];
    let rows: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let map = HeatMap {
        title: "<img src=x onerror=alert(1)>".into(),
        columns: rows.clone(),
        rows,
        ..map(6, |row, column| (row * column) as f64)
    };
    let svg = map.svg().unwrap();
    assert!(!svg.contains("<script>") && !svg.contains("<img"));
    assert!(svg.contains("&lt;script&gt;") && svg.contains("\u{5E9}\u{5DC}\u{5D5}\u{5DD}"));
    assert!(svg.contains("\u{1F600}\u{21B5}"), "a viewer may have the sign");
    assert!(!svg.contains('\u{202E}') && svg.contains("\u{27E8}202E\u{27E9}abc"));
    assert!(!svg.contains('\u{0}'));
    map.render().expect("every sign has something to be drawn as");
}

#[test]
fn ten_thousand_names_and_a_single_cell_are_drawn() {
    let n = 10_000;
    let tall = HeatMap {
        rows: (0..n).map(|i| format!("token {i}")).collect(),
        columns: vec!["head 0".into()],
        values: (0..n).map(|i| vec![i as f64]).collect(),
        ..HeatMap::default()
    };
    assert!(tall.render().is_ok());
    assert!(map(1, |_, _| 0.).render().is_ok());
}

#[test]
fn groups_that_are_not_there_are_refused() {
    let beyond = HeatMap { groups: vec![Group { rows: 0..1, columns: 2..5 }], ..map(4, |_, _| 1.) };
    let refused = beyond.svg().unwrap_err();
    assert!(matches!(refused, Error::Group { .. }), "{refused}");
    assert!(refused.to_string().contains("columns 2 to 5 (not included), expected some of its 4"));
}

#[test]
fn words_are_written_into_cells_that_have_room() {
    let notes = |n: usize| vec![vec!["0.123".to_owned(); n]; n];
    let few = HeatMap { notes: notes(4), ..map(4, |row, _| row as f64) };
    assert_eq!(few.svg().unwrap().matches(">0.123</text>").count(), 16);
    let many = HeatMap { notes: notes(60), ..map(60, |row, _| row as f64) };
    assert_eq!(many.svg().unwrap().matches(">0.123</text>").count(), 0);
}

#[test]
fn panels_that_share_colours_have_one_range() {
    let bright = Shades::Viridis.color(1., Theme::Light);
    let panels = |shared| Panels {
        maps: vec![
            map(2, |row, column| (row + column) as f64),
            map(2, |row, column| 10. * (row + column) as f64),
        ],
        shared,
        size: Size { width: 1200, height: 500 },
        ..Panels::default()
    };
    let hex = format!("fill=\"#{:02x}{:02x}{:02x}\"", bright[0], bright[1], bright[2]);
    let n = |shared| panels(shared).svg().unwrap().matches(&hex).count();
    assert_eq!((n(true), n(false)), (1, 2), "the brightest cell of all, or one of each");
    assert!(Panels::default().svg().is_err(), "nothing to draw");
}

#[test]
fn a_file_is_written_as_its_name_says() {
    let folder = tempfile::tempdir().unwrap();
    let map = map(2, |row, _| row as f64);
    map.save(&folder.path().join("a.svg")).unwrap();
    map.save(&folder.path().join("a.PNG")).unwrap();
    assert!(std::fs::read_to_string(folder.path().join("a.svg")).unwrap().starts_with("<svg"));
    assert!(std::fs::read(folder.path().join("a.PNG")).unwrap().starts_with(b"\x89PNG"));
    let refused = map.save(&folder.path().join("a.pdf")).unwrap_err().to_string();
    assert!(refused.contains("a.pdf` ends in neither .png nor .svg"), "{refused}");
}

#[test]
fn the_example_draws_its_matrix() {
    let svg = matrix::matrix().svg().unwrap();
    assert!(svg.contains("6 of 16 cells hold no number") && svg.contains(">there</text>"));
}
