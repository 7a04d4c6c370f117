//! Attention weights as a table that pandas, polars and others read: Arrow's IPC file format, `results/SCHEMA.md`.

use std::{collections::HashMap, path::Path, sync::Arc};

use anyhow::{Context, Result};
use arrow::{
    array::{ArrayRef, FixedSizeListArray, Float32Array, Int32Array, ListArray, RecordBatch},
    buffer::OffsetBuffer,
    datatypes::{DataType, Field, Schema},
    ipc::writer::FileWriter,
};
use attn_core::ModelInput;
use tch::{Kind, Tensor};

use crate::{
    args::ForwardArgs,
    run_dir::{self, SCHEMA},
};

/// Writes the attention of each layer, `[batch, n_heads, q_len, k_len]`, a record batch a layer and a row a query.
pub(crate) fn write(
    path: &Path,
    args: &ForwardArgs,
    input: &ModelInput,
    layers: &[Tensor],
) -> Result<()> {
    let k_len = |layer: &Tensor| layer.size()[3] as i32;
    let shared = layers.first().map_or(0, k_len);
    let is_shared = layers.iter().all(|layer| k_len(layer) == shared);
    let weights = Arc::new(Field::new_list_field(DataType::Float32, false));
    let list = match is_shared {
        true => DataType::FixedSizeList(Arc::clone(&weights), shared),
        // Some layers attend to a sequence of another length.
        false => DataType::List(Arc::clone(&weights)),
    };
    let mut fields: Vec<Field> = ["row", "layer", "head", "query"]
        .map(|name| Field::new(name, DataType::Int32, false))
        .to_vec();
    fields.push(Field::new("weights", list, false));
    let ids = |ids: &Tensor| -> Result<String> {
        Ok(serde_json::to_string(&Vec::<Vec<i64>>::try_from(ids.to_kind(Kind::Int64))?)?)
    };
    let mut metadata = HashMap::from([
        ("schema".to_owned(), SCHEMA.to_string()),
        ("attn".to_owned(), env!("CARGO_PKG_VERSION").to_owned()),
        ("model".to_owned(), args.model.clone()),
        ("input_ids".to_owned(), ids(&input.input_ids)?),
    ]);
    if let Some(mask) = &input.attention_mask {
        metadata.insert("attention_mask".to_owned(), ids(mask)?);
    }
    if let Some(source) = &input.source {
        metadata.insert("source_input_ids".to_owned(), ids(&source.input_ids)?);
    }
    let schema = Arc::new(Schema::new_with_metadata(fields, metadata));
    let table = || -> Result<Vec<u8>> {
        let mut writer = FileWriter::try_new(Vec::new(), &schema)?;
        for (number, layer) in layers.iter().enumerate() {
            let [n_rows, n_heads, n_queries, _] = layer.size()[..] else {
                unreachable!("attention has four axes")
            };
            let count = n_rows * n_heads * n_queries;
            let column = |value: &dyn Fn(i64) -> i64| -> ArrayRef {
                Arc::new(Int32Array::from_iter_values((0..count).map(|i| value(i) as i32)))
            };
            let values = Vec::<f32>::try_from(layer.flatten(0, -1))?;
            let (field, values) = (Arc::clone(&weights), Arc::new(Float32Array::from(values)));
            let lists: ArrayRef = match is_shared {
                true => Arc::new(FixedSizeListArray::try_new(field, shared, values, None)?),
                false => {
                    let lengths = std::iter::repeat_n(k_len(layer) as usize, count as usize);
                    let offsets = OffsetBuffer::from_lengths(lengths);
                    Arc::new(ListArray::try_new(field, offsets, values, None)?)
                }
            };
            writer.write(&RecordBatch::try_new(
                Arc::clone(&schema),
                vec![
                    column(&|i| i / (n_heads * n_queries)),
                    column(&|_| number as i64),
                    column(&|i| i / n_queries % n_heads),
                    column(&|i| i % n_queries),
                    lists,
                ],
            )?)?;
        }
        Ok(writer.into_inner()?)
    };
    let bytes = table().context("cannot make a table of the attention weights")?;
    run_dir::write(path, &bytes)
}
