//! An attention kind of another crate, registered, held to the laws of all kinds, and put into a model:
//! `cargo run --manifest-path examples/own-kind/Cargo.toml --target-dir target results/models/tiny-mlm`

use std::{error::Error, path::Path};

use attn_core::{
    Error as Refusal, LoadOptions, Model, Variant,
    attention::{Attention, AttnInput, Dims, Nature, Own, Projections},
    external::{self, Kind, Settings},
    laws::{self, ProbeSize},
    nn::Visitor,
};
use tch::Tensor;

/// Every token attends to itself alone: z_i = v_i.
#[derive(Debug)]
struct Itself(Dims);

/// Keys that come before the first query.
fn behind(input: &AttnInput) -> i64 {
    input.k.size()[2] - input.q.size()[2]
}

impl Attention for Itself {
    fn forward(&self, input: &AttnInput) -> Tensor {
        // While a text is written there are more keys and values than queries, which are the last.
        let own = input.v.narrow(2, behind(input), input.q.size()[2]);
        own.index_select(1, &Tensor::from_slice(&self.0.kv_of_head)).contiguous()
    }

    fn weights(&self, input: &AttnInput, rows: &[i64]) -> Tensor {
        let (q, n) = (input.q.size(), input.k.size()[2]);
        let row = (Tensor::from_slice(rows) + behind(input)).one_hot(n).to_kind(input.q.kind());
        row.expand([q[0], q[1], rows.len() as i64, n], false).contiguous()
    }

    fn flops(&self, _: i64) -> i64 {
        0
    }

    fn nature(&self) -> Nature {
        Nature { reach: 0, chooses: false, reads_coordinates: false, has_own_slopes: false }
    }

    fn visit(&self, _: &mut Visitor<'_>) {}

    fn select_heads(&mut self, _: &[i64], dims: &Dims) -> Result<(), Refusal> {
        self.0 = dims.clone();
        Ok(())
    }

    fn regroup_kv(&mut self, _: &[Vec<i64>], dims: &Dims) -> Result<(), Refusal> {
        self.0 = dims.clone();
        Ok(())
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let build = |_: &Settings, dims: &Dims, _: &Projections, _: &mut Own<'_, '_>| {
        Ok(Box::new(Itself(dims.clone())) as Box<dyn Attention>)
    };
    external::register(Kind { name: "itself", defaults: Settings::new, build })?;
    let itself: Variant = serde_json::from_str(r#"{"kind": "itself"}"#)?;
    for verdict in laws::for_layer(&itself, ProbeSize::default())? {
        println!("{verdict}");
        assert!(verdict.held(), "{verdict}");
    }
    let folder = std::env::args().nth(1).ok_or("usage: own-kind MODEL")?;
    let (mut model, _) = Model::load(Path::new(&folder), &LoadOptions::default())?;
    model.swap(&[0], &itself, 0)?;
    let ids = Tensor::arange(24, (tch::Kind::Int64, tch::Device::Cpu)).view([2, 12]);
    for verdict in laws::for_model(&model, &ids)? {
        println!("{verdict}");
        assert!(verdict.held(), "{verdict}");
    }
    Ok(())
}
