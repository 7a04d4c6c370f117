//! A report in a real browser: what is clicked, typed, seen, printed and said. Set `ATTN_TEST_BROWSER` to what
//! `scripts/setup_browser.sh` prints.
//!
//! The checks are in `browser/report.mjs`; the report they are made on, and what is to be found in it, here. After a change that is
//! meant: `ATTN_BLESS=1 cargo test -p attn-viz --test report_browser`, and look at `browser/*.png`.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use attn_viz::report::{
    AttentionViewer, Block, Cell, Column, Figure, Head, Layer, ModelAttention, Report, Sample,
    Section, Table,
};
use attn_viz::{Bar, BarChart, RgbImage};
use image::imageops::{FilterType, resize};
use serde_json::{Value, json};

/// Pictures are stored at this fraction of their size: letters become grey, what stands where remains.
const SHRUNK: u32 = 8;

/// Levels, of 255, by which a channel of a pixel may differ before the pixel counts.
const LEVELS: u8 = 28;

/// Share of the pixels that may count, for fonts and controls of another system.
const SHARE: f64 = 0.02;

const EVIL: &str = "</script><img src=x onerror=\"window.evil=1\">";

const TOKENS: [&str; 10] = [
    "The",
    " quick",
    " brown",
    " fox",
    EVIL,
    "\u{202E}jumps",
    " over",
    "&amp;",
    " \u{5E9}\u{5DC}",
    ".",
];

/// Tokens of the map that has more cells than pixels, and its one bright cell.
const MANY: (usize, usize, usize) = (600, 467, 214);

#[test]
fn a_reader_can_use_it() {
    let test = "a_reader_can_use_it";
    let Some(folder) = std::env::var_os("ATTN_TEST_BROWSER").filter(|it| !it.is_empty()) else {
        let line =
            format!("\nSKIPPED {test}: ATTN_TEST_BROWSER names no folder with playwright-core\n");
        // Past the capture of tests' output.
        let _ = std::io::stderr().write_all(line.as_bytes());
        return;
    };
    let scratch = tempfile::tempdir().unwrap();
    let file = |name: &str| scratch.path().join(name);
    report().save(&file("report.html")).unwrap();
    std::fs::write(file("expected.json"), expected().to_string()).unwrap();
    let ran = Command::new("node")
        .arg(here("report.mjs"))
        .args([file("report.html"), file("expected.json"), scratch.path().to_owned()])
        .env("ATTN_TEST_BROWSER", folder)
        .output()
        .expect("node starts");
    let [out, errors] = [&ran.stdout, &ran.stderr].map(|it| String::from_utf8_lossy(it));
    assert!(ran.status.success(), "{out}\n{errors}");
    for name in ["viewer-light", "viewer-dark", "page-light", "page-dark"] {
        looks_as_it_did(&file(&format!("{name}.png")), &here(&format!("{name}.png")));
    }
}

fn here(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/browser").join(name)
}

fn looks_as_it_did(found: &Path, stored: &Path) {
    let read = |path: &Path| {
        image::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display())).to_rgb8()
    };
    let found = read(found);
    let found =
        resize(&found, found.width() / SHRUNK, found.height() / SHRUNK, FilterType::Triangle);
    if std::env::var_os("ATTN_BLESS").is_some() {
        found.save(stored).unwrap();
    }
    let golden = read(stored);
    // A line that another font breaks elsewhere makes the page a little longer.
    let rows = found.height().min(golden.height());
    assert_eq!(found.width(), golden.width(), "{}", stored.display());
    assert!(found.height().abs_diff(golden.height()) <= 8, "{}", stored.display());
    let share = apart(&found, &golden, rows);
    assert!(share <= SHARE, "{}: {share} of the pixels differ", stored.display());
}

/// The share of pixels of the first `rows` that differ.
fn apart(one: &RgbImage, other: &RgbImage, rows: u32) -> f64 {
    let differs = |(x, y): (u32, u32)| {
        let (a, b) = (one.get_pixel(x, y), other.get_pixel(x, y));
        a.0.iter().zip(b.0).any(|(a, b)| a.abs_diff(b) > LEVELS)
    };
    let pixels = (0..rows).flat_map(|y| (0..one.width()).map(move |x| (x, y)));
    pixels.filter(|it| differs(*it)).count() as f64 / f64::from(rows * one.width())
}

fn report() -> Report {
    let section = |title: &str, blocks| Section { title: title.into(), blocks };
    Report {
        title: format!("Two models compared {EVIL}"),
        subtitle: "made-up numbers \u{2066}\u{202E}".into(),
        sections: vec![
            section(
                "Numbers",
                vec![
                    Block::Text(format!("First {EVIL}\n\nSecond: {}", "long".repeat(60))),
                    Block::Facts(vec![("model".into(), EVIL.into()), ("seeds".into(), "5".into())]),
                    Block::Table(table()),
                    Block::Table(wide_table()),
                    Block::Code {
                        name: "config.toml".into(),
                        text: format!("a = 1\n# {}\t{EVIL}", "x".repeat(300)),
                    },
                ],
            ),
            section(EVIL, vec![Block::Figure(figure())]),
            section("Attention", vec![Block::Attention(viewer())]),
            section("Many tokens", vec![Block::Attention(many())]),
        ],
    }
}

/// Ties, an empty cell, a number that sorts otherwise as text.
fn table() -> Table {
    let row = |name: &str, cell| vec![Cell::text(name), cell, Cell::text(EVIL)];
    Table {
        caption: "Perplexity".into(),
        columns: vec![Column::text("layer"), Column::number("perplexity"), Column::text("note")],
        rows: vec![
            row("layer 10", Cell::number("9.5", 9.5)),
            row("layer 2", Cell::default()),
            row("layer 1", Cell::number("10.0 \u{B1}0.1", 10.)),
            row("", Cell::number("diverged", f64::INFINITY)),
            row("layer 30", Cell::number("9.5", 9.5)),
            row("layer 4", Cell::number("NaN", f64::NAN)),
        ],
    }
}

fn wide_table() -> Table {
    Table {
        caption: "Many columns".into(),
        columns: (0..24).map(|i| Column::number(format!("head {i}"))).collect(),
        rows: vec![(0..24).map(|i| Cell::number(i.to_string(), f64::from(i))).collect()],
    }
}

fn figure() -> Figure {
    let figure = Figure::draw("Bars", |theme| BarChart {
        title: "Bars".into(),
        bars: vec![Bar { label: "one".into(), value: 3., ..Bar::default() }],
        theme,
        ..BarChart::default()
    });
    Figure {
        data: Some(Table { caption: "Numbers of the bars".into(), ..table() }),
        ..figure.unwrap()
    }
}

/// A weight that differs for each model, layer, head, row and column; above the diagonal, none.
fn weight(seed: usize, i: usize, j: usize) -> f32 {
    let score = |j: usize| (2. * ((seed * 997 + i * 31 + j) as f64 * 12.9898).sin()).exp();
    if j > i { 0. } else { (score(j) / (0..=i).map(score).sum::<f64>()) as f32 }
}

fn seed(model: usize, layer: usize, head: usize) -> usize {
    100 * model + 10 * layer + head
}

fn tokens(words: &[&str]) -> Vec<String> {
    words.iter().map(|it| (*it).to_owned()).collect()
}

fn model(
    name: &str,
    index: usize,
    rows: &[&str],
    (n_layers, n_heads): (usize, usize),
) -> ModelAttention {
    let n = rows.len();
    let weights = |seed| (0..n * n).map(|at| weight(seed, at / n, at % n)).collect();
    let head = |layer: usize, head: usize| Head {
        name: format!("head {head}"),
        weights: weights(seed(index, layer, head)),
    };
    let layer = |layer: usize| Layer {
        name: format!("layer {layer}"),
        heads: (0..n_heads).map(|it| head(layer, it)).collect(),
        note: if layer == 1 { NOTE.into() } else { String::new() },
    };
    ModelAttention {
        model: name.into(),
        rows: tokens(rows),
        columns: tokens(rows),
        layers: (0..n_layers).map(layer).collect(),
    }
}

const NOTE: &str = "Coefficients of v <b>: they need not sum to 1.";

fn reversed() -> Vec<&'static str> {
    TOKENS.iter().rev().copied().collect()
}

/// Two models of the same tokens, one of others and with fewer heads; a text that attends to another, with signs and a NaN; the
/// two models with fewer tokens, layers and heads, and with as many.
fn viewer() -> AttentionViewer {
    let first = Sample {
        name: "a fox".into(),
        models: vec![
            model("before", 0, &TOKENS, (2, 3)),
            model("after", 1, &TOKENS, (2, 3)),
            model(EVIL, 2, &TOKENS[..4], (2, 1)),
        ],
    };
    let head = Head { name: "head 0".into(), weights: vec![-0.5, 1.25, f32::NAN, 0., 0.25, 0.5] };
    let cross = ModelAttention {
        model: "cross".into(),
        rows: tokens(&["one", "two"]),
        columns: tokens(&["eins", "zwei", "drei"]),
        layers: vec![Layer { name: "layer 0".into(), heads: vec![head], note: String::new() }],
    };
    let second = Sample { name: "two texts".into(), models: vec![cross] };
    let third = Sample {
        name: "six tokens".into(),
        models: vec![
            model("before", 3, &TOKENS[..6], (2, 2)),
            model("after", 4, &TOKENS[..6], (1, 2)),
        ],
    };
    let fourth = Sample {
        name: "as many".into(),
        models: vec![
            model("before", 5, &reversed(), (2, 3)),
            model("after", 6, &reversed(), (2, 3)),
        ],
    };
    AttentionViewer { samples: vec![first, second, third, fourth] }
}

fn many() -> AttentionViewer {
    let (n, row, column) = MANY;
    let mut weights = vec![0.; n * n];
    weights[row * n + column] = 1.;
    let names: Vec<String> = (0..n).map(|i| format!("t{i}")).collect();
    let head = Head { name: "head 0".into(), weights };
    let layer = Layer { name: "layer 0".into(), heads: vec![head], note: String::new() };
    let model = ModelAttention {
        model: "m".into(),
        rows: names.clone(),
        columns: names,
        layers: vec![layer],
    };
    AttentionViewer { samples: vec![Sample { name: "long".into(), models: vec![model] }] }
}

/// What the page has to show of [`report`].
fn expected() -> Value {
    let shown = |tokens: &[&str]| -> Vec<String> {
        tokens.iter().map(|it| it.replace('\u{202E}', "\u{27E8}202E\u{27E9}")).collect()
    };
    let n = TOKENS.len();
    let row = |model, layer, head, i| -> Vec<f32> {
        (0..n).map(|j| weight(seed(model, layer, head), i, j)).collect()
    };
    let mean = |i| -> Vec<f32> {
        (0..n)
            .map(|j| (0..3).map(|head| weight(seed(0, 0, head), i, j)).sum::<f32>() / 3.)
            .collect()
    };
    let panel = |tokens: &[&str], weights: &[f32]| json!({ "tokens": shown(tokens), "weights": weights[..tokens.len()] });
    // Two models and their difference.
    let compared = |tokens: &[&str], models: [usize; 2]| {
        let [before, after] = models.map(|model| row(model, 1, 2, 8));
        let apart: Vec<f32> = after.iter().zip(&before).map(|(a, b)| a - b).collect();
        [before, after, apart].map(|weights| panel(tokens, &weights))
    };
    let beside = [compared(&TOKENS, [0, 1]), compared(&reversed(), [5, 6])].concat();
    let largest = (0..n * n)
        .max_by(|a, b| {
            let at = |it: &usize| weight(seed(0, 1, 1), it / n, it % n);
            at(a).total_cmp(&at(b)).then(b.cmp(a))
        })
        .unwrap();
    json!({
        "texts": [EVIL, "\u{27E8}2066\u{27E9}\u{27E8}202E\u{27E9}", "&amp;"],
        "note": NOTE,
        // Half a step of the largest weight, twice for a difference, and half of the last digit shown.
        "error": 2. * 0.5 / 254. + 0.0005,
        "crossColumns": 3,
        "lists": [
            { "hash": "#s=0&m=0&l=1&h=1&t=7", "panels": [panel(&TOKENS, &row(0, 1, 1, 7))] },
            { "hash": "#s=0&m=1&l=0&h=2&t=9", "panels": [panel(&TOKENS, &row(1, 0, 2, 9))] },
            { "hash": "#s=0&m=0&l=0&h=mean&t=6", "panels": [panel(&TOKENS, &mean(6))] },
            { "hash": "#s=0&m=0&c=1&l=1&h=2&t=8", "panels": compared(&TOKENS, [0, 1]) },
            { "hash": "#s=0&b=3&m=0&c=1&l=1&h=2&t=8", "panels": beside },
            { "hash": "#s=0&b=2&m=0&l=1&h=1&t=7&u=4", "panels": [
                panel(&TOKENS, &row(0, 1, 1, 7)), null, null, panel(&TOKENS[..6], &row(3, 1, 1, 4))
            ] },
            { "hash": "#s=1&t=0", "panels": [
                { "tokens": ["eins", "zwei", "drei"], "weights": [-0.5, 1.25, null] }
            ] },
        ],
        "largest": [largest / n, largest % n],
        "many": { "n": MANY.0, "row": MANY.1, "column": MANY.2 },
        "sorted": {
            "up": ["layer 10", "layer 30", "layer 1", "", "layer 2", "layer 4"],
            "down": ["", "layer 1", "layer 10", "layer 30", "layer 2", "layer 4"],
            "words": ["layer 1", "layer 2", "layer 4", "layer 10", "layer 30", ""],
        },
    })
}
