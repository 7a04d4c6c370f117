//! `attn compare-scores`: how far scores of heads agree.

use std::io::Write;

use anyhow::{Context, Result};
use attn_eval::stats::{Correlation, kendall, spearman};
use serde::Serialize;

use crate::{
    args::CompareScoresArgs,
    head_names::read_any_scores,
    origin::Origin,
    plot::write_result,
    run_dir::{SCHEMA, check_writable},
};

/// OUT.json.
#[derive(Serialize)]
struct Report {
    schema: u32,
    #[serde(flatten)]
    origin: Origin,
    /// As typed.
    files: Vec<String>,
    n_heads: usize,
    pairs: Vec<Agreement>,
}

#[derive(Serialize)]
struct Agreement {
    /// Places in `files`.
    files: [usize; 2],
    spearman: Correlation,
    kendall: f64,
    /// Heads of either's best tenth, at least one.
    n_top: usize,
    /// The share that both have.
    shared_top: f64,
}

pub(crate) fn run(args: &CompareScoresArgs, out: &mut dyn Write) -> Result<()> {
    let _made = check_writable(&args.out)?;
    let mut all =
        args.scores.iter().map(|path| read_any_scores(path)).collect::<Result<Vec<_>>>()?;
    let heads = all[0].heads.clone();
    for (path, one) in args.scores.iter().zip(&mut all) {
        *one = one.in_order(&heads).with_context(|| {
            format!(
                "`{}` scores the heads {:?}, and `{}` {heads:?}: there is nothing to compare",
                path.display(),
                one.heads,
                args.scores[0].display()
            )
        })?;
    }
    let flat: Vec<Vec<f64>> = all.iter().map(|one| one.scores.concat()).collect();
    let n_heads = flat[0].len();
    let n_top = n_heads.div_ceil(10);
    let top: Vec<_> = all.iter().map(|one| one.ranked()[..n_top].to_vec()).collect();
    let mut pairs = Vec::new();
    for b in 1..all.len() {
        for a in 0..b {
            let names = || {
                let [a, b] = [a, b].map(|at| args.scores[at].display());
                format!("cannot compare `{a}` and `{b}`")
            };
            let shared = top[a].iter().filter(|head| top[b].contains(head)).count();
            pairs.push(Agreement {
                files: [a, b],
                spearman: spearman(&flat[a], &flat[b]).with_context(names)?,
                kendall: kendall(&flat[a], &flat[b]).with_context(names)?,
                n_top,
                shared_top: shared as f64 / n_top as f64,
            });
        }
    }
    let files: Vec<String> = args.scores.iter().map(|path| path.display().to_string()).collect();
    let width = files.iter().map(String::len).max().unwrap_or(0);
    writeln!(out, "{n_heads} heads\n")?;
    writeln!(out, "{:width$}  {:width$}  spearman  kendall  best {n_top} shared", "", "")?;
    for Agreement { files: [a, b], spearman, kendall, shared_top, .. } in &pairs {
        let (value, shared) = (spearman.value, 100.0 * shared_top);
        writeln!(
            out,
            "{:width$}  {:width$}  {value:>8.3}  {kendall:>7.3}  {shared:>6.0} %",
            files[*a], files[*b]
        )?;
    }
    let report = Report { schema: SCHEMA, origin: Origin::now()?, files, n_heads, pairs };
    write_result(&args.out, &report, None)?;
    Ok(())
}
