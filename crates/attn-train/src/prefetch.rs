//! Batches made on a thread of their own, a step ahead of the one that trains.

use std::{
    sync::mpsc::{Receiver, sync_channel},
    thread::Scope,
};

use crate::{
    batch::{Batch, Batches},
    error::{Error, Result},
};

/// Steps that wait to be taken.
const AHEAD: usize = 2;

/// A place in the data: the next batch of an epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Position {
    pub(crate) epoch: u64,
    pub(crate) batch: usize,
}

/// What one step is computed from.
#[derive(Debug)]
pub(crate) struct StepBatches {
    /// Where its first batch stands.
    pub(crate) at: Position,
    /// Where the next step begins.
    pub(crate) next: Position,
    /// Batches in this epoch.
    pub(crate) n_batches: usize,
    /// The batches, at most as many as accumulate.
    pub(crate) batches: Vec<Batch>,
}

/// Steps in `epoch`: the last one of an epoch may be of fewer batches.
pub(crate) fn steps_in_epoch(data: &dyn Batches, epoch: u64, accumulation: usize) -> Result<u64> {
    match data.plan(epoch).len() {
        0 => Err(Error::NoBatches { epoch }),
        n => Ok(n.div_ceil(accumulation) as u64),
    }
}

/// Sends the next `n_steps` steps from `position`, until the receiver is dropped or a batch fails.
pub(crate) fn spawn<'scope, 'env>(
    scope: &'scope Scope<'scope, 'env>,
    data: &'env dyn Batches,
    mut position: Position,
    accumulation: usize,
    n_steps: u64,
) -> Receiver<Result<StepBatches>> {
    let (sender, receiver) = sync_channel(AHEAD);
    scope.spawn(move || {
        let mut plan = (position.epoch, data.plan(position.epoch));
        for _ in 0..n_steps {
            if plan.0 != position.epoch {
                plan = (position.epoch, data.plan(position.epoch));
            }
            let step = step(data, position, &plan.1, accumulation);
            let failed = step.is_err();
            if let Ok(step) = &step {
                position = step.next;
            }
            if sender.send(step).is_err() || failed {
                return;
            }
        }
    });
    receiver
}

fn step(
    data: &dyn Batches,
    at: Position,
    plan: &[Vec<usize>],
    accumulation: usize,
) -> Result<StepBatches> {
    let epoch = at.epoch;
    if plan.is_empty() {
        return Err(Error::NoBatches { epoch });
    }
    let end = (at.batch + accumulation).min(plan.len());
    let batches = (at.batch..end)
        .map(|batch| {
            data.batch(epoch, &plan[batch]).map_err(|source| Error::Batch { epoch, batch, source })
        })
        .collect::<Result<_>>()?;
    let next = match end == plan.len() {
        true => Position { epoch: epoch + 1, batch: 0 },
        false => Position { epoch, batch: end },
    };
    Ok(StepBatches { at, next, n_batches: plan.len(), batches })
}
