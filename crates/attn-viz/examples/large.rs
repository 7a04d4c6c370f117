//! Times a heat map of many tokens: `cargo run -p attn-viz --example large N OUT.png`. Prints seconds and, on Linux, the most memory.

use std::error::Error;
use std::io::Write;
use std::path::Path;
use std::time::Instant;

use attn_viz::{HeatMap, Picture};

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let n: usize = args.next().ok_or("usage: large N OUT.png")?.parse()?;
    let out = args.next().ok_or("usage: large N OUT.png")?;
    let names: Vec<String> = (0..n).map(|i| format!("token {i}")).collect();
    let row = |i: usize| (0..n).map(|j| if j > i { 0. } else { 1. / (1 + i - j) as f64 }).collect();
    let map = HeatMap {
        title: format!("{n} tokens"),
        value_label: "weight".into(),
        rows: names.clone(),
        columns: names,
        values: (0..n).map(row).collect(),
        ..HeatMap::default()
    };
    let start = Instant::now();
    map.save(Path::new(&out))?;
    let mut out = std::io::stdout();
    writeln!(out, "{:.3} s", start.elapsed().as_secs_f64())?;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    for line in status.lines().filter(|line| line.starts_with("VmHWM")) {
        writeln!(out, "{line}")?;
    }
    Ok(())
}
