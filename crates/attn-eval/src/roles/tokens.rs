//! What is known of the tokens of a batch, whatever attends to them.

use attn_data::batch::Batch;
use tch::{Device, Kind, Tensor};

/// What the roles need to know of a vocabulary.
#[derive(Debug, Clone, Copy)]
pub struct Known<'a> {
    /// Ids that stand for no text: `[CLS]`, `[SEP]`, `<|endoftext|>`. They ask nothing, and count only where it is said.
    pub special: &'a [u32],
    /// How often each id occurs in some large text; one beyond the list never does.
    pub counts: &'a [u64],
}

/// A batch that is padded on the right, as roles see it. `n` is its length.
#[derive(Debug)]
pub(crate) struct Tokens {
    /// `[b, n]`, int64.
    pub(crate) ids: Tensor,
    /// `[b, n]`, bool: special tokens, padding apart.
    pub(crate) special: Tensor,
    /// `[b, n]`, int64: how often each token occurs in text.
    pub(crate) n_occurrences: Tensor,
    /// `[b, n, n]`, bool: whether query i sees key j, as the mask has it, whatever the attention kind makes of it.
    pub(crate) seen: Tensor,
    /// `[b, n]`, bool: the queries that count, which are no padding and no special tokens and see two keys or more: of one
    /// key alone nothing is chosen.
    pub(crate) asking: Tensor,
    pub(crate) causal: bool,
}

impl Tokens {
    pub(crate) fn of(batch: &Batch, causal: bool, known: &Known<'_>, device: Device) -> Self {
        let (b, n) = (batch.rows as i64, batch.cols as i64);
        let of_id = |value: &dyn Fn(u32) -> i64| -> Tensor {
            let values: Vec<i64> = batch.ids.iter().map(|&id| value(id as u32)).collect();
            Tensor::from_slice(&values).view([b, n]).to_device(device)
        };
        let real = Tensor::from_slice(&batch.mask).view([b, n]).to_device(device).ne(0);
        let is_special = of_id(&|id| known.special.contains(&id).into()).ne(0);
        let count = |id: u32| known.counts.get(id as usize).copied().unwrap_or(0) as i64;
        let mut seen = real.unsqueeze(2).logical_and(&real.unsqueeze(1)); // [b, q, k]
        if causal {
            seen = seen.logical_and(&Tensor::ones([n, n], (Kind::Bool, device)).tril(0));
        }
        let n_seen = seen.sum_dim_intlist([-1i64].as_slice(), false, Kind::Int64);
        let plain = real.logical_and(&is_special.logical_not());
        Self {
            ids: of_id(&i64::from),
            special: real.logical_and(&is_special),
            n_occurrences: of_id(&count),
            asking: plain.logical_and(&n_seen.ge(2)),
            seen,
            causal,
        }
    }

    /// Length of the batch.
    pub(crate) fn len(&self) -> i64 {
        self.ids.size()[1]
    }

    /// `[n, n]`, int64: the key's position less the query's.
    pub(crate) fn offsets(&self) -> Tensor {
        let at = Tensor::arange(self.len(), (Kind::Int64, self.ids.device()));
        at.unsqueeze(0) - at.unsqueeze(1)
    }

    /// The weights of a head that attends to all that it sees alike: `[b, 1, n, n]`.
    pub(crate) fn uniform(&self, kind: Kind) -> Tensor {
        let seen = self.seen.to_kind(kind);
        let n_seen = seen.sum_dim_intlist([-1i64].as_slice(), true, kind).clamp_min(1);
        (seen / n_seen).unsqueeze(1)
    }
}

/// The keys that a role looks for.
#[derive(Debug)]
pub(crate) struct Target {
    pub(crate) role: &'static str,
    /// Where the role is a distance: that of the key from the query.
    pub(crate) offset: Option<i64>,
    /// `[b, n, n]`, bool; among those that the query sees.
    pub(crate) hits: Tensor,
    /// `[b, n]`, bool: the queries that count.
    pub(crate) counted: Tensor,
}

impl Target {
    /// The keys `hits` among those in sight, of the queries that have one.
    pub(crate) fn new(role: &'static str, tokens: &Tokens, hits: &Tensor) -> Self {
        let hits = hits.logical_and(&tokens.seen);
        let has_one = hits.any_dim(-1, false);
        Self { role, offset: None, counted: tokens.asking.logical_and(&has_one), hits }
    }
}
