//! What attention weights say beside themselves: how much of a value reaches the stream, where it came from over all layers, and how
//! spread the weights are.

use attn_core::layer::AttnLayer;
use tch::{Kind, Tensor};

use crate::error::{Error, Result};

/// ‖α_ij v_j W_O‖ of each head: the length of what it takes from token j to token i. A head may put a large weight on a token whose
/// value is small, such as the first one or a comma. Kobayashi, Kuribayashi, Yokoi, Inui 2020, section 3.1,
/// <https://aclanthology.org/2020.emnlp-main.574>; the bias of the output projection belongs to no token and is left out.
///
/// `weights`: `[n_heads, q_len, k_len]`, what the layer weighs its values by; `inputs`: `[k_len, hidden_size]`, what goes into the
/// layer ([`ForwardOptions::attention_inputs`](attn_core::ForwardOptions)). As `weights`.
///
/// # Errors
///
/// [`Error::OwnValues`] for a kind that weighs values of its own making ([`Attention::has_own_values`](attn_core::attention::Attention)),
/// not the projection's; `index` names the layer there.
pub fn norms(index: usize, layer: &AttnLayer, weights: &Tensor, inputs: &Tensor) -> Result<Tensor> {
    if layer.kind().has_own_values() {
        return Err(Error::OwnValues { layer: index, kind: layer.variant().name().to_owned() });
    }
    let dims = layer.dims();
    let (v, bias) = layer.projections().v;
    let kind = inputs.kind();
    let mut values = inputs.matmul(&v.to_kind(kind).tr());
    if let Some(bias) = bias {
        values += bias.to_kind(kind);
    }
    let n = inputs.size()[0];
    let values = values.view([1, n, dims.n_kv_heads, dims.head_dim]).transpose(1, 2);
    let values = dims.expand_kv(&values); // [1, n_heads, n, head_dim]
    let nothing = layer.put_out(&values.zeros_like(), false);
    let lengths = (0..dims.n_heads).map(|head| {
        let alone = values.zeros_like();
        alone.select(1, head).copy_(&values.select(1, head));
        let added = layer.put_out(&alone, false) - &nothing;
        added.squeeze_dim(0).norm_scalaropt_dim(2.0, [-1i64].as_slice(), false)
    });
    let lengths = Tensor::stack(&lengths.collect::<Vec<_>>(), 0); // [n_heads, n]
    Ok(weights.abs() * lengths.unsqueeze(1))
}

/// How much of each token of the text is in each position behind each layer, if heads count alike and half of what a layer passes on is
/// what it was given: A_l = (mean over heads + 1) / 2, rows scaled to 1, times that of the layers below. Abnar and Zuidema 2020, section 3,
/// <https://aclanthology.org/2020.acl-main.385>.
///
/// `layers`: the kind and `[n_heads, n, n]` of each, first layer first. `[n, n]` a layer.
///
/// # Errors
///
/// [`Error::NoShares`] where a row of a head does not sum to 1 within 0.001, as the coefficients of some kinds need not: half of
/// what is passed on would then be another share.
pub fn rollout(layers: &[(&str, Tensor)]) -> Result<Vec<Tensor>> {
    let mut rolled: Vec<Tensor> = Vec::new();
    for (layer, (kind, weights)) in layers.iter().enumerate() {
        let sums = weights.sum_dim_intlist([-1i64].as_slice(), false, Kind::Double);
        if (&sums - 1.0).abs().lt(1e-3).all().int64_value(&[]) == 0 {
            let [low, high] = [sums.min(), sums.max()].map(|it| it.double_value(&[]));
            return Err(Error::NoShares { layer, kind: (*kind).to_owned(), low, high });
        }
        let mean = weights.mean_dim([0i64].as_slice(), false, weights.kind());
        let passed_on = Tensor::eye(mean.size()[0], (mean.kind(), mean.device()));
        let mixed = (mean + passed_on) / 2.0;
        let mixed = &mixed / mixed.sum_dim_intlist([-1i64].as_slice(), true, mixed.kind());
        rolled
            .push(rolled.last().map_or_else(|| mixed.shallow_clone(), |below| mixed.matmul(below)));
    }
    Ok(rolled)
}

/// The entropy of each row of weights that sum to 1, in nats: `[.., q_len]` of `[.., q_len, k_len]`. Not a number where a weight is
/// below 0 or a row does not sum to 1, as the coefficients of some kinds need not.
pub fn entropy(weights: &Tensor) -> Tensor {
    let kind = Kind::Double;
    let weights = weights.to_kind(kind);
    let total = weights.sum_dim_intlist([-1i64].as_slice(), false, kind);
    let is_fine =
        (total - 1.0).abs().lt(1e-3).logical_and(&weights.amin([-1i64].as_slice(), false).ge(0.0));
    let terms = weights.special_entr();
    let entropy = terms.sum_dim_intlist([-1i64].as_slice(), false, kind);
    entropy.masked_fill(&is_fine.logical_not(), f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(values: &[&[f64]]) -> Tensor {
        let n = values[0].len() as i64;
        Tensor::from_slice(&values.concat()).view([-1, n])
    }

    /// By hand: the first layer's mean is [[1, 0], [0.5, 0.5]], so A = [[1, 0], [0.25, 0.75]]; the second's mean is [[1, 0], [1, 0]], so
    /// [[1, 0], [0.5, 0.5]]; their product [[1, 0], [0.625, 0.375]].
    #[test]
    fn rollout_is_the_product_of_layers_that_pass_half_on() {
        let first =
            Tensor::stack(&[rows(&[&[1., 0.], &[1., 0.]]), rows(&[&[1., 0.], &[0., 1.]])], 0);
        let second = rows(&[&[1., 0.], &[1., 0.]]).unsqueeze(0);
        let found = rollout(&[("softmax", first), ("softmax", second)]).unwrap();
        let expected = [rows(&[&[1., 0.], &[0.25, 0.75]]), rows(&[&[1., 0.], &[0.625, 0.375]])];
        for (found, expected) in found.iter().zip(&expected) {
            assert!((found - expected).abs().max().double_value(&[]) < 1e-12);
        }
    }

    #[test]
    fn rows_that_are_no_shares_have_no_rollout() {
        let fine = rows(&[&[1., 0.], &[0.5, 0.5]]).unsqueeze(0);
        for last in [[0.5, 0.6], [0., 0.], [-1., 0.], [f64::NAN, 1.]] {
            let other = Tensor::stack(&[fine.get(0), rows(&[&[1., 0.], &last])], 0);
            let layers = [("softmax", fine.shallow_clone()), ("performer", other)];
            let refused = rollout(&layers).unwrap_err().to_string();
            assert!(refused.contains("layer 1 is `performer`"), "{refused}");
        }
    }

    #[test]
    fn entropy_is_that_of_a_distribution_and_of_nothing_else() {
        let found = entropy(&rows(&[
            &[0.25; 4],
            &[1., 0., 0., 0.],
            &[0.7, 0.7, 0., 0.],
            &[1.5, -0.5, 0., 0.],
        ]));
        let found = Vec::<f64>::try_from(found).unwrap();
        assert!((found[0] - 4_f64.ln()).abs() < 1e-12 && found[1] == 0.0);
        assert!(found[2].is_nan() && found[3].is_nan());
    }
}
