//! A run whose memory ends within a step goes on from its last checkpoint. The only test of its program: it turns a panic's message off.

mod common;

use std::{
    cell::Cell,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
};

use attn_core::{Model, attention::Stream};
use attn_train::{Batch, Classification, Objective, Run, TrainConfig, checkpoint, train};
use common::{assert_same, examples, model, quick, weights};
use tch::{Device, Kind, Tensor};

/// Classification that asks for more memory than there is, as its loss is made for this time.
struct Hungry {
    fails_at: usize,
    n_losses: Cell<usize>,
}

impl Objective for Hungry {
    fn name(&self) -> &'static str {
        Classification.name()
    }

    fn check(&self, model: &Model) -> attn_train::Result<()> {
        Classification.check(model)
    }

    fn n_targets(&self, batch: &Batch) -> usize {
        Classification.n_targets(batch)
    }

    fn loss(&self, model: &Model, batch: &Batch, stream: Stream) -> attn_train::Result<Tensor> {
        self.n_losses.set(self.n_losses.get() + 1);
        let loss = Classification.loss(model, batch, stream)?;
        if self.n_losses.get() == self.fails_at {
            // Half an exbibyte, which no allocator has.
            return Ok(loss + Tensor::zeros([1 << 57], (Kind::Float, Device::Cpu)).sum(Kind::Float));
        }
        Ok(loss)
    }
}

fn run(dir: &Path, config: &TrainConfig, objective: &dyn Objective, resume: bool) -> Model {
    let mut model = model("gpt2", "classifier", 0.1, Kind::Float, 1);
    let data = examples(40, config);
    let run = Run { dir: Some(dir.to_owned()), resume, ..Run::new(config, objective, &data) };
    train(&mut model, run).unwrap();
    model
}

#[test]
fn what_was_saved_before_memory_ran_out_is_gone_on_from() {
    let config = TrainConfig { checkpoint_every: 2, ..quick(8) };
    let [whole, broken] = [0, 1].map(|_| tempfile::tempdir().unwrap());
    let expected = weights(&run(whole.path(), &config, &Classification, false));

    // In the sixth step, after the checkpoint of the fourth.
    let hungry = Hungry { fails_at: 6, n_losses: Cell::new(0) };
    std::panic::set_hook(Box::new(|_| {}));
    let ended = catch_unwind(AssertUnwindSafe(|| run(broken.path(), &config, &hungry, false)));
    drop(std::panic::take_hook());
    let said = ended.unwrap_err();
    let said = said.downcast_ref::<String>().expect("a message");
    assert!(said.contains("allocate memory"), "{said}");
    assert_eq!(hungry.n_losses.get(), 6);
    let found = checkpoint::list(broken.path()).unwrap();
    assert!(!found.is_empty(), "no checkpoint was left");

    let resumed = weights(&run(broken.path(), &config, &Classification, true));

    assert_same(&resumed, &expected);
}
