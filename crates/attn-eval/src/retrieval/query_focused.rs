//! The attention that a question pays to the needle, beyond what any question would.
//!
//! ```text
//! c_h(j)  = mean_{t of the question} a_h(t, j) − mean_{t of "N/A"} a'_h(t, j)      j within the needle
//! score_h = Σ_j c_h(j) [ c_h(j) > mean_j c_h − 2 std_j c_h ]
//! ```
//!
//! a' is the attention over the same text followed by a question that asks nothing: heads that look at the needle whatever is
//! asked (at its first token, at full stops) come out near 0, and tokens that fall far below the others are left out. Nothing
//! is written: two passes over the text, the rows of the question alone. Not bounded below by 0.
//!
//! Zhang et al. 2025, "Query-Focused Retrieval Heads", <https://arxiv.org/abs/2506.09944>; calibration and outliers as Chen et
//! al. 2024, "Attention in Large Language Models Yields Efficient Zero-Shot Re-Rankers", <https://arxiv.org/abs/2410.02642>.
//! The needle stands for their document. std divides by n − 1 and is 0 for one token.

use std::ops::Range;

use attn_core::{ForwardOptions, Model, ModelInput, Rows};
use tch::{Kind, Tensor};

use crate::{
    error::{Error, Result},
    language::check_decoder,
};

/// A long text with a question at its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Query {
    /// The text and the question.
    pub ids: Vec<u32>,
    /// The needle's tokens.
    pub needle: Range<usize>,
    /// The question's.
    pub asked: Range<usize>,
}

/// A score a head, layer after layer, from a question and one that asks nothing about the same text.
///
/// # Errors
///
/// [`Error::Direction`] for an encoder, [`Error::Head`] for a model without a language-model head, [`Error::NotFinite`] of
/// row 0 (the question) or 1, and what the model refuses.
///
/// # Panics
///
/// Unless needle and question lie within the ids, neither empty, and the needle has as many tokens in both.
pub fn query_focused(model: &Model, query: &Query, null: &Query) -> Result<Vec<f64>> {
    assert_eq!(query.needle.len(), null.needle.len(), "the same needle");
    check_decoder(model.config(), "answers")?;
    let (asked, unasked) = (paid(model, query, 0)?, paid(model, null, 1)?);
    let score = |(asked, unasked): (&Vec<f64>, &Vec<f64>)| {
        let calibrated: Vec<f64> = asked.iter().zip(unasked).map(|(a, b)| a - b).collect();
        without_outliers(&calibrated)
    };
    Ok(asked.iter().zip(&unasked).map(score).collect())
}

/// The mean attention of the question to each token of the needle, `[head][token]`, layer after layer.
fn paid(model: &Model, query: &Query, index: usize) -> Result<Vec<Vec<f64>>> {
    let Query { ids, needle, asked } = query;
    for range in [needle, asked] {
        assert!(!range.is_empty() && range.end <= ids.len(), "{range:?} of {}", ids.len());
    }
    let wide: Vec<i64> = ids.iter().map(|&id| id.into()).collect();
    let last = Tensor::from_slice(&[wide.len() as i64 - 1]);
    let options = ForwardOptions {
        attentions: Rows::Some((asked.start as i64..asked.end as i64).collect()),
        logits_at: Some(&last),
        ..ForwardOptions::default()
    };
    let input = ModelInput::new(Tensor::from_slice(&wide).unsqueeze(0));
    let output = tch::no_grad(|| model.forward(&input, &options))?;
    let mut heads = Vec::new();
    for rows in output.attentions.iter().filter(|rows| rows.numel() > 0) {
        let rows = rows.narrow(3, needle.start as i64, needle.len() as i64); // [1, h, asked, needle]
        let mean = rows.mean_dim([2i64].as_slice(), false, Kind::Double).squeeze_dim(0);
        heads.extend(Vec::<Vec<f64>>::try_from(mean).expect("two axes of f64"));
    }
    if heads.iter().flatten().any(|value| !value.is_finite()) {
        return Err(Error::NotFinite { index });
    }
    Ok(heads)
}

/// The sum of what is not far below the rest.
fn without_outliers(values: &[f64]) -> f64 {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let squares = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>();
    let std = if values.len() > 1 { (squares / (n - 1.0)).sqrt() } else { 0.0 };
    // Where all are alike none is an outlier.
    let stays = |value: f64| std == 0.0 || value > mean - 2.0 * std;
    values.iter().copied().filter(|&value| stays(value)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_falls_far_below_is_left_out() {
        assert_eq!(without_outliers(&[0.5]), 0.5);
        assert_eq!(without_outliers(&[0.25; 4]), 1.0);
        let mut values = vec![0.5; 9];
        values.push(-8.0);
        assert_eq!(without_outliers(&values), 4.5);
        assert_eq!(without_outliers(&[0.5, -0.25]), 0.25, "near enough");
    }
}
