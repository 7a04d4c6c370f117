//! Models in the shapes of other tools.

use std::path::Path;

use serde_json::json;
use tch::Tensor;

use crate::{
    Error, Merge, Model, Variant,
    attention::Projections,
    checkpoint::{WriteOptions, write_folder},
    config::Head,
    merge_kv,
};

/// `model` with a key/value head for each query head again, copies where several read one, and made from the code where a layer has one
/// ([`variants::latent`](crate::variants::latent)): plain transformers then has words for it, whatever each layer had. It computes what
/// it did, and keeps as much of a token as it did before heads were merged.
///
/// # Errors
/// [`Error::Input`] where query heads do not read their key/value heads in runs of one length.
pub fn expanded(model: &Model) -> Result<Model, Error> {
    let mut all = model.alias()?;
    for (at, layer) in model.layers().into_iter().enumerate() {
        let own = layer.projections();
        let Some([k, v]) = layer.kind().full_heads(&own) else { continue };
        all.swap(&[at], &Variant::default(), 0)?;
        // Head h reads head h, whatever it read before.
        let groups: Vec<Vec<i64>> = layer.dims().kv_of_head.iter().map(|&kv| vec![kv]).collect();
        all.regroup_kv(at, &groups, Projections { q: own.q, k, v }, &layer.out().out_in())?;
    }
    let wanted: Vec<(usize, i64)> =
        model.layers().iter().enumerate().map(|(at, layer)| (at, layer.dims().n_heads)).collect();
    merge_kv(&mut all, &wanted, Merge::Mean, None)?;
    Ok(all)
}

/// Writes a GPT-2 whose layers have one key/value head each as a folder of transformers' `gpt_bigcode`, which keeps as little of a
/// token: multi-query attention (Shazeer 2019, <https://arxiv.org/abs/1911.02150>). This crate does not read such folders.
///
/// # Errors
/// [`Error::Config`] of a model that is no such GPT-2: by the field. As [`Model::save`].
pub fn save_multi_query(model: &Model, dir: &Path, options: &WriteOptions) -> Result<(), Error> {
    let config = model.config();
    check_multi_query(model)?;
    let architecture = match config.head {
        Head::Bare => "GPTBigCodeModel",
        Head::LanguageModel => "GPTBigCodeForCausalLM",
        Head::Classifier { .. } => "GPTBigCodeForSequenceClassification",
    };
    let mut json = config.to_json(model.kind());
    json.shift_remove("attn");
    // What gpt2 takes where the config says nothing, and gpt_bigcode something else.
    json.entry("activation_function").or_insert(json!("gelu_new"));
    for (field, value) in [
        ("model_type", json!("gpt_bigcode")),
        ("architectures", json!([architecture])),
        ("multi_query", json!(true)),
    ] {
        json.insert(field.into(), value);
    }
    // GPT-2 keeps these as [in, out], gpt_bigcode as [out, in].
    let is_turned = |name: &str| {
        [".c_attn.weight", ".c_proj.weight", ".c_fc.weight"].iter().any(|end| name.ends_with(end))
    };
    let turned = |(name, tensor): (String, Tensor)| {
        let tensor = if is_turned(&name) { tensor.detach().tr() } else { tensor };
        (name, tensor)
    };
    let tensors: Vec<(String, Tensor)> = model.parameters().into_iter().map(turned).collect();
    Ok(write_folder(dir, &tensors, &json, &[], options)?)
}

fn check_multi_query(model: &Model) -> Result<(), Error> {
    let config = model.config();
    let refuse = |field: &str, problem: String| Err(Error::Config { field: field.into(), problem });
    if config.base_model_type() != "gpt2" {
        return refuse(
            "model_type",
            format!(
                "is `{}`, and a `gpt_bigcode` can be made of a gpt2 alone",
                config.base_model_type()
            ),
        );
    }
    if config.raw("scale_attn_by_inverse_layer_idx").is_some_and(|on| on == true) {
        return refuse(
            "scale_attn_by_inverse_layer_idx",
            "is true, which `gpt_bigcode` does not know".into(),
        );
    }
    for (at, layer) in config.layers.iter().enumerate() {
        let field = |name: &str| format!("attn.layers[{at}].{name}");
        if layer.n_kv_heads != 1 {
            let problem =
                format!("is {}, and `gpt_bigcode` has one in every layer", layer.n_kv_heads);
            return refuse(&field("n_kv_heads"), problem);
        }
        if layer.n_heads != config.sizes.n_heads {
            let problem = format!(
                "is {}, and `gpt_bigcode` has all {} in every layer",
                layer.n_heads, config.sizes.n_heads
            );
            return refuse(&field("n_heads"), problem);
        }
        if layer.variant != Variant::default() {
            let problem =
                format!("is `{}`, and `gpt_bigcode` has softmax alone", layer.variant.name());
            return refuse(&field("kind"), problem);
        }
    }
    Ok(())
}
