//! What a picture shows, read back from its pixels.

use std::fs;
use std::time::{Duration, Instant};

use attn_viz::{
    Bar, BarChart, Baseline, Color, Error, HeatMap, LineChart, Picture, RgbImage, Series, Size,
    Stroke, Theme,
};

fn line_chart(series: Vec<Series>) -> LineChart {
    LineChart {
        title: "run".into(),
        x_label: "step".into(),
        y_label: "loss".into(),
        series,
        ..LineChart::default()
    }
}

fn bar_chart(values: &[f64]) -> BarChart {
    let bars = values.iter().enumerate();
    let bars = bars.map(|(i, value)| Bar {
        label: format!("bar {i}"),
        value: *value,
        color: i,
        ..Bar::default()
    });
    BarChart { title: "run".into(), bars: bars.collect(), ..BarChart::default() }
}

/// The places of all pixels of exactly this colour.
fn pixels(image: &RgbImage, color: Color) -> Vec<(u32, u32)> {
    image
        .enumerate_pixels()
        .filter(|(_, _, pixel)| pixel.0 == color)
        .map(|(x, y, _)| (x, y))
        .collect()
}

/// Left, top, right and bottom of what has this colour.
fn bounds(image: &RgbImage, color: Color) -> [u32; 4] {
    let found = pixels(image, color);
    assert!(!found.is_empty(), "no pixel is {color:?}");
    let range = |axis: fn(&(u32, u32)) -> u32| {
        let values = found.iter().map(axis);
        (values.clone().min().unwrap(), values.max().unwrap())
    };
    let ((left, right), (top, bottom)) = (range(|place| place.0), range(|place| place.1));
    [left, top, right, bottom]
}

/// As [`bounds`], below the legend of a default-sized picture with a title.
fn bounds_in_plot(image: &RgbImage, color: Color) -> [u32; 4] {
    let (width, height) = image.dimensions();
    let plot = image::imageops::crop_imm(image, 0, 90, width, height - 90).to_image();
    let [left, top, right, bottom] = bounds(&plot, color);
    [left, top + 90, right, bottom + 90]
}

fn assert_near(name: &str, found: u32, expected: f64) {
    assert!(
        (f64::from(found) - expected).abs() <= 4.,
        "{name}: {found}, expected about {expected}"
    );
}

#[test]
fn a_picture_has_the_size_asked_for() {
    for (width, height) in [(320, 240), (801, 333), (1200, 720), (500, 1500)] {
        let size = Size { width, height };
        let chart =
            LineChart { size, ..line_chart(vec![Series::new("train", [(0., 1.), (1., 2.)])]) };
        assert_eq!(chart.render().unwrap().dimensions(), (width, height));
        let chart = BarChart { size, ..bar_chart(&[1., 2.]) };
        assert_eq!(chart.render().unwrap().dimensions(), (width, height));
    }
}

#[test]
fn a_size_that_cannot_be_drawn_is_refused() {
    for (width, height) in [(0, 0), (319, 720), (1200, 100_000)] {
        let size = Size { width, height };
        let refused = BarChart { size, ..bar_chart(&[1.]) }.render().unwrap_err();
        assert!(matches!(refused, Error::Size { .. }), "{refused}");
        assert!(refused.to_string().contains(&format!("{width} x {height}")), "{refused}");
    }
}

#[test]
fn a_rising_line_goes_from_the_lower_left_to_the_upper_right() {
    let image = line_chart(vec![Series::new("", [(0., 0.), (100., 50.)])]).render().unwrap();
    let color = Theme::Light.color(0);
    let [left, top, right, bottom] = bounds(&image, color);
    let height_at = |x: u32| {
        let column: Vec<u32> = pixels(&image, color)
            .iter()
            .filter(|place| place.0 == x)
            .map(|place| place.1)
            .collect();
        column.iter().map(|y| f64::from(*y)).sum::<f64>() / column.len() as f64
    };
    assert!(right - left > 900 && bottom - top > 400, "{left} {top} {right} {bottom}");
    assert!(height_at(left + 5) > height_at(right - 5));
    // Straight: the middle of the line is at the middle of its ends.
    let middle = (height_at(left + 5) + height_at(right - 5)) / 2.;
    assert!((height_at((left + right) / 2) - middle).abs() < 2.);
}

#[test]
fn every_series_has_its_own_colour() {
    let series =
        (0..5).map(|i| Series::new(format!("run {i}"), [(0., f64::from(i)), (1., f64::from(i))]));
    let image = line_chart(series.collect()).render().unwrap();
    let mut heights: Vec<u32> =
        (0..5).map(|i| bounds_in_plot(&image, Theme::Light.color(i))[1]).collect();
    let drawn = heights.clone();
    heights.sort_unstable_by(|a, b| b.cmp(a));
    assert_eq!(drawn, heights, "higher values stand higher");
    heights.dedup();
    assert_eq!(heights.len(), 5);
}

#[test]
fn series_can_share_a_colour_and_a_faint_one_is_paler() {
    let raw = Series {
        stroke: Stroke::Faint,
        color: Some(3),
        ..Series::new("raw", [(0., 0.), (1., 1.)])
    };
    let image = line_chart(vec![raw]).render().unwrap();
    assert!(pixels(&image, Theme::Light.color(3)).is_empty());
    let smooth = Series { color: Some(3), ..Series::new("smooth", [(0., 0.), (1., 1.)]) };
    let image = line_chart(vec![smooth]).render().unwrap();
    assert!(!pixels(&image, Theme::Light.color(3)).is_empty());
}

#[test]
fn steps_have_no_tick_between_them() {
    // Vertical grid lines, in a row of pixels that no horizontal one crosses.
    let n_lines = |points: [(f64, f64); 2]| {
        let image = line_chart(vec![Series::new("", points)]).render().unwrap();
        let lines = |y: u32| {
            let ground = Theme::Light.ground();
            let is_grid = |x: u32| image.get_pixel(x, y).0 != ground && x > 100;
            (1..image.width()).filter(|&x| is_grid(x) && !is_grid(x - 1)).count()
        };
        (300..310).map(lines).min().unwrap()
    };
    assert_eq!(n_lines([(1., 0.), (3., 0.)]), 3);
    assert!(n_lines([(1., 0.), (3.5, 0.)]) > 4, "other numbers keep theirs");
}

#[test]
fn a_dotted_series_shows_its_points() {
    let flat = |stroke| Series { stroke, ..Series::new("", [(0., 1.), (1., 1.), (2., 1.)]) };
    let thickness = |stroke| {
        let image = line_chart(vec![flat(stroke)]).render().unwrap();
        let [_, top, _, bottom] = bounds(&image, Theme::Light.color(0));
        bottom - top
    };
    assert!(thickness(Stroke::Dotted) >= 8 && thickness(Stroke::Solid) <= 3);
}

#[test]
fn a_dashed_series_has_gaps() {
    let flat = |stroke| Series { stroke, ..Series::new("", [(0., 1.), (1., 1.)]) };
    let count = |stroke| {
        pixels(&line_chart(vec![flat(stroke)]).render().unwrap(), Theme::Light.color(0)).len()
    };
    let (solid, dashed) = (count(Stroke::Solid), count(Stroke::Dashed));
    assert!(dashed * 10 > solid * 4 && dashed * 10 < solid * 8, "{dashed} of {solid}");
}

#[test]
fn a_single_point_is_seen() {
    let image = line_chart(vec![Series::new("", [(3., 0.7)])]).render().unwrap();
    let [left, top, right, bottom] = bounds(&image, Theme::Light.color(0));
    assert!(right - left >= 6 && bottom - top >= 6);
    assert_near("x", (left + right) / 2, 630.);
}

#[test]
fn a_band_lies_behind_its_curve_between_its_bounds() {
    let points: Vec<(f64, f64)> = (0..=10).map(|i| (f64::from(i), 5.)).collect();
    let band = points.iter().map(|(_, y)| (y - 5., y + 5.)).collect();
    let chart = line_chart(vec![Series { band: Some(band), ..Series::new("", points) }]);
    let image = chart.render().unwrap();
    let [left, line_top, right, line_bottom] = bounds(&image, Theme::Light.color(0));

    // The colour found between the curve and the upper bound, away from grid lines.
    let middle = (left + right) / 2 + 17;
    let wash = image.get_pixel(middle, line_top - 17).0;
    assert_ne!(wash, Theme::Light.ground());
    let [_, top, _, bottom] = bounds(&image, wash);
    assert_near(
        "the curve is in the middle",
        (line_top + line_bottom) / 2,
        f64::from(top + bottom) / 2.,
    );
    assert!(bottom - top > 400);
}

#[test]
fn values_beyond_the_range_do_not_leave_the_plot() {
    let series = Series::new("", [(0., 0.5), (1., 9.), (2., -9.), (3., 0.5)]);
    let chart = LineChart { y_range: Some((0., 1.)), ..line_chart(vec![series]) };
    let image = chart.render().unwrap();
    let [_, top, _, bottom] = bounds(&image, Theme::Light.color(0));
    let plain = LineChart {
        y_range: Some((0., 1.)),
        ..line_chart(vec![Series::new("", [(0., 0.), (3., 1.)])])
    };
    let [_, plot_top, _, plot_bottom] = bounds(&plain.render().unwrap(), Theme::Light.color(0));
    assert!(
        top + 1 >= plot_top && bottom <= plot_bottom + 1,
        "{top}-{bottom} in {plot_top}-{plot_bottom}"
    );
}

#[test]
fn the_legend_stands_above_the_data() {
    let top_of = |name: &str| {
        let series = Series { color: Some(1), ..Series::new(name, [(0., 1.), (1., 1.)]) };
        bounds(&line_chart(vec![series]).render().unwrap(), Theme::Light.color(1))
    };
    let ([_, without, ..], [_, with, ..]) = (top_of(""), top_of("train"));
    assert!(with < 90, "the legend's line is at {with}");
    assert!(without > 200, "without a name there is no legend: {without}");
}

#[test]
fn many_long_names_take_more_lines_and_leave_the_plot_whole() {
    let series = (0..12).map(|i| {
        Series::new(format!("a rather long name of series {i}"), [(0., 0.), (1., f64::from(i))])
    });
    let image = line_chart(series.collect()).render().unwrap();
    let [left, top, right, bottom] = bounds_in_plot(&image, Theme::Light.color(4));
    assert!(right - left > 900 && bottom - top > 80, "{left} {top} {right} {bottom}");
}

#[test]
fn bars_stand_on_zero_and_are_as_high_as_their_values() {
    let chart = BarChart { y_range: Some((0., 100.)), ..bar_chart(&[25., 50., 100.]) };
    let image = chart.render().unwrap();
    let boxes: Vec<[u32; 4]> = (0..3).map(|i| bounds(&image, Theme::Light.color(i))).collect();
    let heights = boxes.iter().map(|[_, top, _, bottom]| bottom + 1 - top);
    let heights: Vec<f64> = heights.map(f64::from).collect();
    assert!(
        (heights[0] / heights[2] - 0.25).abs() < 0.01
            && (heights[1] / heights[2] - 0.5).abs() < 0.01,
        "{heights:?}"
    );
    assert!(boxes.iter().all(|[.., bottom]| *bottom == boxes[0][3]), "{boxes:?}");
    assert!(boxes[0][2] < boxes[1][0] && boxes[1][2] < boxes[2][0], "side by side: {boxes:?}");
}

#[test]
fn a_negative_bar_hangs_below_zero() {
    let image = bar_chart(&[2., -1.]).render().unwrap();
    let [_, _, _, foot] = bounds(&image, Theme::Light.color(0));
    let [_, head, _, _] = bounds(&image, Theme::Light.color(1));
    assert!(head > foot && head - foot < 6, "{foot} {head}");
}

#[test]
fn an_interval_is_drawn_from_end_to_end() {
    let mut chart = BarChart { y_range: Some((0., 100.)), theme: Theme::Dark, ..bar_chart(&[50.]) };
    let bar = bounds(&chart.render().unwrap(), Theme::Dark.color(0));
    let per_unit = f64::from(bar[3] + 1 - bar[1]) / 50.;
    chart.bars[0].interval = Some((30., 80.));
    let image = chart.render().unwrap();

    let middle = (bar[0] + bar[2]) / 2;
    let ink = image.get_pixel(middle, bar[1]).0;
    assert_ne!(ink, Theme::Dark.color(0), "the whisker crosses the bar's end");
    let column = (bar[1] - 250..bar[3]).filter(|y| image.get_pixel(middle, *y).0 == ink);
    let whisker: Vec<u32> = column.collect();
    // The value's digits stand above the whisker and may share its colour and column: look below them.
    let low_end = f64::from(*whisker.last().unwrap());
    let high_end = f64::from(bar[1]) - 30. * per_unit;
    assert!((low_end - (f64::from(bar[1]) + 20. * per_unit)).abs() < 4., "{low_end}");
    let just_inside = (high_end + 4.) as u32..bar[1];
    assert!(just_inside.clone().all(|y| image.get_pixel(middle, y).0 == ink), "{just_inside:?}");
}

#[test]
fn a_baseline_crosses_the_plot_at_its_value() {
    let baselines = vec![Baseline { label: "majority class".into(), value: 60. }];
    let chart = BarChart { y_range: Some((0., 100.)), ..bar_chart(&[100.]) };
    let bar = bounds(&chart.render().unwrap(), Theme::Light.color(0));
    let with = BarChart { baselines, ..chart.clone() }.render().unwrap();
    let without = chart.render().unwrap();
    let row = bar[3] - (f64::from(bar[3] - bar[1]) * 0.6) as u32;
    // The legend moves the plot down a little, so the row is looked for nearby.
    let changed = |y: u32| {
        (0..with.width()).filter(|x| with.get_pixel(*x, y) != without.get_pixel(*x, y)).count()
    };
    let most = (row - 30..row + 30).map(changed).max().unwrap();
    assert!(most > 500, "{most}");
}

#[test]
fn themes_differ_in_ground() {
    for theme in [Theme::Light, Theme::Dark] {
        let image = BarChart { theme, ..bar_chart(&[1.]) }.render().unwrap();
        assert_eq!(image.get_pixel(0, 0).0, theme.ground());
        assert_eq!(image.get_pixel(1199, 719).0, theme.ground());
    }
}

#[test]
fn words_are_written() {
    let ink = |chart: LineChart| {
        let image = chart.render().unwrap();
        image.pixels().filter(|pixel| pixel.0.iter().all(|channel| *channel < 0x60)).count()
    };
    let plain = || LineChart {
        series: vec![Series::new("", [(0., 0.), (1., 1.)])],
        ..LineChart::default()
    };
    let bare = ink(plain());
    for chart in [
        LineChart { title: "Title".into(), ..plain() },
        LineChart { subtitle: "Subtitle".into(), ..plain() },
        LineChart { x_label: "step".into(), ..plain() },
        LineChart { y_label: "loss (nats)".into(), ..plain() },
    ] {
        assert!(ink(chart.clone()) > bare + 60, "{chart:?}");
    }
}

#[test]
fn equal_charts_give_equal_pixels() {
    let chart = || {
        let points = (0..500).map(|i| (f64::from(i), f64::from(i).sin()));
        line_chart(vec![Series::new("train", points)])
    };
    let images: Vec<RgbImage> = std::thread::scope(|scope| {
        [0; 3].map(|_| scope.spawn(|| chart().render().unwrap())).map(|t| t.join().unwrap()).into()
    });
    assert!(images.windows(2).all(|pair| pair[0] == pair[1]));
}

#[test]
fn a_hundred_thousand_points_are_drawn_in_seconds_with_every_peak() {
    let mut points: Vec<(f64, f64)> =
        (0..100_000).map(|i| (f64::from(i), f64::from(i).sin())).collect();
    points[70_000].1 = 40.;
    let start = Instant::now();
    let image = line_chart(vec![Series::new("", points)]).render().unwrap();
    // About a second in the dev profile; the limit allows for a busy machine and still excludes a join per point.
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    let [_, top, _, bottom] = bounds(&image, Theme::Light.color(0));
    assert!(bottom - top > 400, "the peak is drawn: {top} to {bottom}");
}

#[test]
fn numbers_that_cannot_be_drawn_are_named() {
    let series = |points: Vec<(f64, f64)>| line_chart(vec![Series::new("train", points)]);
    let with_band = |band: Vec<(f64, f64)>| {
        let series = Series::new("train", [(0., 1.), (1., 2.)]);
        line_chart(vec![Series { band: Some(band), ..series }])
    };
    let with_interval = |interval| {
        let mut chart = bar_chart(&[1.]);
        chart.bars[0].interval = Some(interval);
        chart
    };
    let cases: Vec<(Result<RgbImage, Error>, &str)> = vec![
        (line_chart(vec![]).render(), "chart `run` is empty, expected at least one series"),
        (
            series(vec![]).render(),
            "series `train` of chart `run` is empty, expected at least one point",
        ),
        (
            series(vec![(0., 1.), (1., f64::NAN)]).render(),
            "y of point 1 in series `train` of chart `run` is NaN, expected a finite number",
        ),
        (
            series(vec![(f64::INFINITY, 1.)]).render(),
            "x of point 0 in series `train` of chart `run` is inf, expected a finite number",
        ),
        (
            with_band(vec![(0., 1.)]).render(),
            "series `train` of chart `run` has 2 points but a band of 1 bounds, expected one for each point",
        ),
        (
            with_band(vec![(0., 1.), (3., 2.)]).render(),
            "bound 1 of the band of series `train` of chart `run` goes from 3 to 2, expected the first to be lower",
        ),
        (
            LineChart { y_range: Some((1., 1.)), ..series(vec![(0., 1.)]) }.render(),
            "the y range of chart `run` goes from 1 to 1, expected the first to be lower",
        ),
        (bar_chart(&[]).render(), "chart `run` is empty, expected at least one bar"),
        (
            bar_chart(&[1., f64::NEG_INFINITY]).render(),
            "the value of bar `bar 1` of chart `run` is -inf, expected a finite number",
        ),
        (
            with_interval((2., 1.)).render(),
            "the interval of bar `bar 0` of chart `run` goes from 2 to 1, expected the first to be lower",
        ),
        (
            BarChart {
                baselines: vec![Baseline { label: "chance".into(), value: f64::NAN }],
                ..bar_chart(&[1.])
            }
            .render(),
            "baseline `chance` of chart `run` is NaN, expected a finite number",
        ),
    ];
    for (result, message) in cases {
        assert_eq!(result.unwrap_err().to_string(), message);
    }
}

#[test]
fn a_png_file_holds_the_picture_and_nothing_is_left_beside_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("accuracy.png");
    fs::write(&path, "an older file").unwrap();
    let chart = bar_chart(&[1., 2.]);

    chart.png(&path).unwrap();

    assert_eq!(image::open(&path).unwrap().into_rgb8(), chart.render().unwrap());
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn a_picture_that_cannot_be_drawn_or_written_leaves_the_old_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("loss.png");
    fs::write(&path, "an older file").unwrap();
    assert!(bar_chart(&[f64::NAN]).png(&path).is_err());
    assert_eq!(fs::read_to_string(&path).unwrap(), "an older file");

    let nowhere = folder.path().join("missing").join("loss.png");
    let refused = bar_chart(&[1.]).png(&nowhere).unwrap_err();
    assert_eq!(refused.to_string(), format!("cannot write `{}`", nowhere.display()));
    assert!(std::error::Error::source(&refused).is_some());
}

fn heat_map(values: &[&[f64]]) -> HeatMap {
    let names = |n: usize, what: &str| (0..n).map(|i| format!("{what}{i}")).collect();
    HeatMap {
        title: "layer 1".into(),
        rows: names(values.len(), "r"),
        columns: names(values[0].len(), "c"),
        values: values.iter().map(|row| row.to_vec()).collect(),
        ..HeatMap::default()
    }
}

#[test]
fn the_lowest_value_is_dark_and_the_highest_bright_each_in_its_cell() {
    let (dark, bright): (Color, Color) = ([68, 1, 84], [253, 231, 37]);
    let map = heat_map(&[&[0.0, 0.5, 0.5], &[0.5, 0.5, 1.0]]);
    // Without the colours beside the map.
    let cells = |map: &HeatMap| {
        image::imageops::crop_imm(&map.render().unwrap(), 0, 0, 1110, 720).to_image()
    };
    let image = cells(&map);
    let [left, top, right, bottom] = bounds(&image, dark);
    let [other_left, other_top, other_right, other_bottom] = bounds(&image, bright);
    assert!(
        right < other_left && bottom <= other_top + 1,
        "upper left and lower right: {right} {other_left}, {bottom} {other_top}"
    );
    let (width, height) = (right - left, bottom - top);
    assert!(width > 200 && height > 200, "cells of {width} x {height}");
    assert_near("as wide", other_right - other_left, f64::from(width));
    assert_near("as high", other_bottom - other_top, f64::from(height));

    // Under a range of its own nothing is as bright, and what is beyond it is drawn as its end.
    let wide = cells(&HeatMap { range: Some((0., 2.)), ..map.clone() });
    assert!(pixels(&wide, bright).is_empty() && !pixels(&wide, dark).is_empty());
    let narrow = cells(&HeatMap { range: Some((0.5, 0.75)), ..map });
    assert!(!pixels(&narrow, bright).is_empty() && !pixels(&narrow, dark).is_empty());
}

#[test]
fn heat_maps_that_cannot_be_are_refused_by_name() {
    let fine = heat_map(&[&[0.0, 1.0]]);
    let said = |map: HeatMap| map.svg().unwrap_err().to_string();
    let ragged = HeatMap { values: vec![vec![1.0]], ..fine.clone() };
    assert!(said(ragged).contains("1 x 1 values, expected 1 x 2"));
    let nan = said(heat_map(&[&[0.0, f64::INFINITY]]));
    assert!(nan.contains("row `r0`, column `c1` of heat map `layer 1`"), "{nan}");
    assert!(said(heat_map(&[&[f64::NAN]])).contains("at least one cell with a number"));
    assert!(said(HeatMap { rows: Vec::new(), ..fine.clone() }).contains("at least one row"));
    assert!(said(HeatMap { range: Some((1., 1.)), ..fine }).contains("from 1 to 1"));
    let one = heat_map(&[&[0.3]]);
    assert!(one.render().is_ok(), "a single value has a colour");
    let long = vec!["a very long name of a token that has no end at all".to_owned(); 90];
    let values = vec![vec![0.1; 90]; 90];
    let many = HeatMap { rows: long.clone(), columns: long, values, ..heat_map(&[&[0.3]]) };
    assert!(many.render().is_ok(), "names that do not fit are cut or left out");
}
