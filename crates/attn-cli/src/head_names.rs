//! Heads as users name them, scores as files hold them, and the loss that heads are scored by.

use std::{fs, path::Path};

use anyhow::{Context, Result, bail, ensure};
use attn_core::{Config, Model};
use attn_data::{
    batch::{Encoded, Masking},
    hub::Hub,
};
use attn_eval::{Head, HeadScores, Replacement, RowLoss, stats::Interval};
use serde::Deserialize;

use crate::{
    args::{ComputeArgs, Replace, ReplaceArgs, RowArgs},
    task::{Task, dataset},
};

/// A head's name: its layer, and its number in the pretrained layer.
pub(crate) fn name(config: &Config, head: Head) -> String {
    format!("{}-{}", head.layer, config.layers[head.layer].kept_heads[head.place])
}

/// `0-3` as a head, `0-g1` as the query heads that read key/value head 1 of layer 0.
pub(crate) fn parse(config: &Config, text: &str) -> Result<Vec<Head>> {
    let hint = "hint: write LAYER-HEAD, such as 0-3, or LAYER-gGROUP, such as 0-g1";
    let split = text.trim().split_once('-');
    let number = |text: &str| text.parse::<usize>().ok();
    let Some((Some(layer), of_layer)) = split.map(|(layer, rest)| (number(layer), rest)) else {
        bail!("`{text}` is no head\n{hint}");
    };
    let n_layers = config.layers.len();
    ensure!(
        layer < n_layers,
        "`{text}`: there is no layer {layer}: the model has {n_layers}, counted from 0"
    );
    let spec = &config.layers[layer];
    if let Some(group) = of_layer.strip_prefix('g') {
        let Some(group) = number(group) else { bail!("`{text}` is no group\n{hint}") };
        let readers = spec.kv_readers();
        let n_groups = readers.iter().max().map_or(0, |kv| kv + 1);
        ensure!(
            (group as i64) < n_groups,
            "`{text}`: layer {layer} has {n_groups} key/value heads, counted from 0"
        );
        let reads = |place: &usize| readers[*place] == group as i64;
        return Ok((0..readers.len()).filter(reads).map(|place| Head { layer, place }).collect());
    }
    let Some(head) = number(of_layer) else { bail!("`{text}` is no head\n{hint}") };
    let place = spec.kept_heads.iter().position(|&kept| kept == head as i64);
    let Some(place) = place else {
        bail!("`{text}`: layer {layer} has the heads {:?}", spec.kept_heads);
    };
    Ok(vec![Head { layer, place }])
}

/// The scores in an OUT.json of `score-heads`, of the very heads of `config`.
pub(crate) fn read_scores(path: &Path, model: &str, config: &Config) -> Result<HeadScores> {
    let Read { scores, model: scored } = read_any(path)?;
    let kept: Vec<Vec<i64>> = config.layers.iter().map(|layer| layer.kept_heads.clone()).collect();
    // Heads that were merged may stand in another order.
    let Some(scores) = scores.in_order(&kept) else {
        bail!(
            "`{}` scores other heads than the model has: {:?}, and not {kept:?}\nhint: score the heads of this very model",
            path.display(),
            scores.heads
        );
    };
    if let Some(scored) = scored.filter(|scored| scored != model) {
        tracing::warn!("`{}` has scores of `{scored}`, used here for `{model}`", path.display());
    }
    Ok(scores)
}

/// Rows below which means over them are said to be of few.
const FEW_ROWS: usize = 20;

/// What numbers of heads in results mean where nothing else is said.
pub(crate) const QUERY_HEAD: &str = "query_head";

/// An OUT.json of `score-heads`.
#[derive(Deserialize)]
struct Read {
    #[serde(flatten)]
    scores: HeadScores,
    /// As it was typed.
    model: Option<String>,
}

/// The scores in an OUT.json of `score-heads`, of whatever model.
pub(crate) fn read_any_scores(path: &Path) -> Result<HeadScores> {
    Ok(read_any(path)?.scores)
}

fn read_any(path: &Path) -> Result<Read> {
    let shown = path.display();
    let text = fs::read_to_string(path).with_context(|| {
        format!("cannot read `{shown}`\nhint: `attn score-heads --out {shown}` writes scores")
    })?;
    let read: Read = serde_json::from_str(&text).with_context(|| {
        format!("`{shown}` holds no scores of heads\nhint: `attn score-heads` writes them")
    })?;
    let scores = &read.scores;
    let shape = |of: &[Vec<f64>]| of.iter().map(Vec::len).collect::<Vec<_>>();
    let heads: Vec<usize> = scores.heads.iter().map(Vec::len).collect();
    ensure!(
        shape(&scores.scores) == heads,
        "`{shown}`: `scores` are of layers with {:?} heads, and `heads` of {heads:?}",
        shape(&scores.scores)
    );
    let finite = |score: &&f64| !score.is_finite();
    ensure!(
        !scores.scores.iter().flatten().any(|score| finite(&score)),
        "`{shown}`: some score is not a number"
    );
    Ok(read)
}

/// What heads are scored by, and the rows: `masking` is the task's.
pub(crate) fn loss_and_rows<'a>(
    task: &Task<'_>,
    model: &Model,
    masking: Option<&'a Masking>,
    seed: u64,
) -> Result<(RowLoss<'a>, Vec<Encoded>)> {
    Ok(match (masking, task.data.label.is_some()) {
        (_, true) => (RowLoss::Label, task.labelled(model)?),
        (Some(masking), false) => (RowLoss::MaskedTokens { masking, seed }, task.unlabelled()?),
        (None, false) => (RowLoss::NextToken, task.unlabelled()?),
    })
}

/// Says that means over `n_rows` and their intervals are not to be relied on, where they are few.
pub(crate) fn warn_of_few(n_rows: usize) {
    match n_rows {
        1 => tracing::warn!(
            "one row counts: nothing tells how far to trust it\nhint: {FEW_ROWS} rows at least"
        ),
        2..FEW_ROWS => tracing::warn!(
            "{n_rows} rows count: intervals by drawing so few again are too narrow\nhint: {FEW_ROWS} rows at least"
        ),
        _ => {}
    }
}

/// A head's name where others may have been removed: `heads` are the numbers of those that are there.
pub(crate) fn numbered(heads: &[Vec<i64>], head: Head) -> String {
    format!("{}-{}", head.layer, head.of(heads))
}

/// `low to high`, each as `format` writes it; `-` where there is no interval.
pub(crate) fn range(interval: Option<Interval>, format: impl Fn(f64) -> String) -> String {
    interval.map_or_else(
        || "-".to_owned(),
        |Interval { low, high }| format!("{} to {}", format(low), format(high)),
    )
}

/// The rows that stand-ins are made of, where any are.
pub(crate) fn calibration(
    model: &Model,
    name: &str,
    rows: &RowArgs,
    args: &ReplaceArgs,
    compute: &ComputeArgs,
    hub: &Hub,
) -> Result<Vec<Encoded>> {
    if matches!(args.replace, Replace::Zero | Replace::Uniform) {
        return Ok(Vec::new());
    }
    let data = dataset(&rows.task, &rows.set)?;
    let split = args.calibration_split.clone().unwrap_or_else(|| data.train_split.clone());
    let rows = RowArgs { split: Some(split), limit: Some(args.calibration_limit), ..rows.clone() };
    let task = Task::open(name, &rows, data, None, compute, hub).context(
        "cannot read the rows that heads' outputs are taken from (`--calibration-split`)",
    )?;
    match task.data.label.is_some() {
        true => task.labelled(model),
        false => task.unlabelled(),
    }
}

/// How heads are left out.
pub(crate) fn replacement(replace: Replace, calibration: &[Encoded], seed: u64) -> Replacement<'_> {
    match replace {
        Replace::Zero => Replacement::Zero,
        Replace::Uniform => Replacement::Uniform,
        Replace::Mean => Replacement::Mean(calibration),
        Replace::Resample => Replacement::Resample { from: calibration, seed },
    }
}

#[cfg(test)]
mod tests {
    use attn_core::Config;

    use super::*;

    fn llama() -> Config {
        let config = serde_json::json!({
            "model_type": "llama", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2,
        });
        Config::from_json(serde_json::from_value(config).unwrap()).unwrap()
    }

    #[test]
    fn heads_are_named_by_layer_and_number_or_group() {
        let config = llama();
        let places = |text: &str| -> Vec<(usize, usize)> {
            parse(&config, text).unwrap().iter().map(|head| (head.layer, head.place)).collect()
        };
        assert_eq!(places("1-3"), [(1, 3)]);
        assert_eq!(places("0-g1"), [(0, 2), (0, 3)]);
        for (text, said) in [
            ("2-0", "no layer 2"),
            ("0-4", "has the heads [0, 1, 2, 3]"),
            ("0-g2", "has 2 key/value heads"),
            ("3", "is no head"),
            ("0-x", "is no head"),
        ] {
            let error = parse(&config, text).unwrap_err().to_string();
            assert!(error.contains(said), "{text}: {error}");
        }
    }

    #[test]
    fn removed_heads_leave_the_others_their_numbers() {
        let mut config = llama();
        config.layers[0].kept_heads = vec![1, 3];
        config.layers[0].kv_of_head = vec![0, 1];
        config.layers[0].n_heads = 2;
        assert_eq!(parse(&config, "0-3").unwrap(), [Head { layer: 0, place: 1 }]);
        assert_eq!(name(&config, Head { layer: 0, place: 1 }), "0-3");
    }
}
