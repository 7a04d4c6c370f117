//! What each query may see. Masks are built here and nowhere else: a variant never makes a triangle of its own.

use tch::{Device, Kind, Tensor};

/// Where a batch's padding lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Padding {
    /// Every key is real.
    None,
    /// In each row the real keys come first.
    Right,
    /// In each row the real keys are one run, wherever it begins.
    Contiguous,
    /// Some row has hidden keys between real ones.
    Holes,
}

/// What is hidden; how to hide it is the variant's business.
#[derive(Debug)]
pub struct Mask {
    causal: bool,
    keep: Option<Tensor>,
    padding: Padding,
}

impl Clone for Mask {
    fn clone(&self) -> Self {
        Self {
            causal: self.causal,
            keep: self.keep.as_ref().map(Tensor::shallow_clone),
            padding: self.padding,
        }
    }
}

impl Mask {
    /// Hides nothing but, if `causal`, the future.
    pub fn new(causal: bool) -> Self {
        Self { causal, keep: None, padding: Padding::None }
    }

    /// Hides the keys where `keep` is 0 as well. `keep`: `[batch, k_len]`, 1 at real tokens, of any kind.
    pub fn with_keep(causal: bool, keep: &Tensor) -> Self {
        let keep = keep.ne(0); // [b, k]
        let padding = classify(&keep);
        let keep = (padding != Padding::None).then_some(keep);
        Self { causal, keep, padding }
    }

    /// The mask of `fan` copies of the batch, copy after copy.
    pub(crate) fn fanned(&self, fan: i64) -> Self {
        let keep = self.keep.as_ref().map(|keep| keep.repeat([fan, 1]));
        Self { keep, ..self.clone() }
    }

    /// The mask of some rows of the batch, `[n]` int64.
    pub(crate) fn rows(&self, rows: &Tensor) -> Self {
        let keep = self.keep.as_ref().map(|keep| keep.index_select(0, rows));
        Self { keep, ..self.clone() }
    }

    /// Whether a query is kept from seeing later keys.
    pub fn causal(&self) -> bool {
        self.causal
    }

    /// `[batch, k_len]` bool, true at real keys; `None` where all are real.
    pub fn keep(&self) -> Option<&Tensor> {
        self.keep.as_ref()
    }

    /// Where the padding lies.
    pub fn padding(&self) -> Padding {
        self.padding
    }

    /// Whether a causal triangle alone, or nothing at all, hides all that real queries must not see.
    ///
    /// Under a causal mask padding on the right needs no hiding: it lies in every real query's future.
    pub fn is_plain(&self) -> bool {
        self.padding == Padding::None || (self.causal && self.padding == Padding::Right)
    }

    /// Whether query i may see key j: bool, `[1 or batch, 1, q_len, k_len]`. With fewer queries than keys the queries
    /// are the last ones, as in decoding.
    pub fn allowed(&self, q_len: i64, k_len: i64, device: Device) -> Tensor {
        self.allowed_rows(&(0..q_len).collect::<Vec<_>>(), q_len, k_len, device)
    }

    /// [`Self::allowed`] for some of the `q_len` queries: `[1 or batch, 1, rows, k_len]`.
    pub fn allowed_rows(&self, rows: &[i64], q_len: i64, k_len: i64, device: Device) -> Tensor {
        let triangle = self.causal.then(|| {
            let query =
                (Tensor::from_slice(rows).to_device(device) + (k_len - q_len)).unsqueeze(-1);
            let key = Tensor::arange(k_len, (Kind::Int64, device));
            key.le_tensor(&query).view([1, 1, rows.len() as i64, k_len])
        });
        let keep = self.keep.as_ref().map(|keep| keep.unsqueeze(1).unsqueeze(1)); // [b, 1, 1, k]
        match (triangle, keep) {
            (Some(triangle), Some(keep)) => triangle.logical_and(&keep),
            (Some(triangle), None) => triangle,
            (None, Some(keep)) => keep.expand([-1, -1, rows.len() as i64, -1], true),
            (None, None) => Tensor::ones([1, 1, rows.len() as i64, k_len], (Kind::Bool, device)),
        }
    }

    /// How many keys, from the first on, each query may see: int64, `[1 or batch, q_len]`; `None` where hidden keys lie
    /// before real ones. Of padded queries it says what suits.
    pub fn visible(&self, q_len: i64, k_len: i64, device: Device) -> Option<Tensor> {
        let options = (Kind::Int64, device);
        let all = if self.causal {
            Tensor::arange_start(k_len - q_len + 1, k_len + 1, options)
        } else {
            Tensor::full([q_len], k_len, options)
        };
        let all = all.unsqueeze(0);
        match &self.keep {
            None => Some(all),
            Some(_) if self.is_plain() => Some(all),
            Some(keep) if self.padding == Padding::Right => {
                let n_real = keep.sum_dim_intlist([1i64].as_slice(), true, Kind::Int64); // [b, 1]
                Some(all.minimum(&n_real))
            }
            Some(_) => None,
        }
    }

    /// What to add to the scores: 0 where a query may see a key, a huge negative number elsewhere.
    /// `[1 or batch, 1, q_len, k_len]`.
    pub fn bias(&self, q_len: i64, k_len: i64, options: (Kind, Device)) -> Tensor {
        to_bias(&self.allowed(q_len, k_len, options.1), options.0)
    }

    /// The mask of the last `k_len` keys.
    pub fn tail(&self, k_len: i64) -> Self {
        match &self.keep {
            Some(keep) if keep.size()[1] > k_len => {
                Self::with_keep(self.causal, &keep.narrow(1, keep.size()[1] - k_len, k_len))
            }
            _ => self.clone(),
        }
    }
}

/// Turns what is allowed (bool) into what is added to scores of `kind`.
pub fn to_bias(allowed: &Tensor, kind: Kind) -> Tensor {
    Tensor::zeros(allowed.size(), (kind, allowed.device()))
        .masked_fill(&allowed.logical_not(), hidden_score(kind))
}

/// The score of a hidden key: finite, so that a query that sees no key has an output (the mean of the values)
/// instead of NaN, and half the range, so that adding it to a score does not overflow.
pub fn hidden_score(kind: Kind) -> f64 {
    match kind {
        Kind::Half => -32752.0,
        _ => f64::from(f32::MIN / 2.0),
    }
}

/// Finds where the padding of `keep` (`[batch, k_len]`, bool) lies. Synchronizes with the device.
fn classify(keep: &Tensor) -> Padding {
    if keep.all().int64_value(&[]) != 0 {
        return Padding::None;
    }
    let k_len = keep.size()[1];
    let length = keep.sum_dim_intlist([1i64].as_slice(), false, Kind::Int64); // [b]
    let key = Tensor::arange(k_len, (Kind::Int64, keep.device()));
    let run_from = |start: &Tensor| {
        let end = start + &length;
        let inside =
            key.ge_tensor(&start.unsqueeze(1)).logical_and(&key.lt_tensor(&end.unsqueeze(1)));
        inside.equal(keep)
    };
    let first = keep.to_kind(Kind::Int64).argmax(1, false); // [b], 0 where no key is real
    if run_from(&first.zeros_like()) {
        Padding::Right
    } else if run_from(&first) {
        Padding::Contiguous
    } else {
        Padding::Holes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keep(rows: &[&[i64]]) -> Tensor {
        Tensor::from_slice2(rows)
    }

    #[test]
    fn padding_is_told_apart() {
        let of = |rows: &[&[i64]]| Mask::with_keep(true, &keep(rows)).padding();
        assert_eq!(of(&[&[1, 1, 1], &[1, 1, 1]]), Padding::None);
        assert_eq!(of(&[&[1, 1, 1], &[1, 1, 0]]), Padding::Right);
        assert_eq!(of(&[&[1, 1, 1], &[0, 0, 0]]), Padding::Right);
        assert_eq!(of(&[&[1, 1, 0], &[0, 1, 1]]), Padding::Contiguous);
        assert_eq!(of(&[&[1, 1, 1], &[1, 0, 1]]), Padding::Holes);
    }

    #[test]
    fn fewer_queries_than_keys_are_the_last_ones() {
        let allowed = Mask::new(true).allowed(2, 4, Device::Cpu).view([2, 4]);
        let expected = keep(&[&[1, 1, 1, 0], &[1, 1, 1, 1]]).ne(0);
        assert!(allowed.equal(&expected));
    }

    #[test]
    fn causality_and_padding_combine() {
        let mask = Mask::with_keep(true, &keep(&[&[0, 1, 1], &[1, 1, 1]]));
        let expected =
            keep(&[&[0, 0, 0], &[0, 1, 0], &[0, 1, 1], &[1, 0, 0], &[1, 1, 0], &[1, 1, 1]]).ne(0);
        assert!(mask.allowed(3, 3, Device::Cpu).view([6, 3]).equal(&expected));
        let rows = mask.allowed_rows(&[2], 3, 3, Device::Cpu).view([2, 3]);
        assert!(rows.equal(&keep(&[&[0, 1, 1], &[1, 1, 1]]).ne(0)));
    }

    #[test]
    fn keys_in_sight_are_counted_where_they_come_first() {
        let rows: [&[i64]; 2] = [&[1, 1, 1, 1], &[1, 1, 0, 0]];
        for (causal, q_len) in [(true, 4), (true, 2), (false, 4), (false, 1)] {
            for keep in [keep(&rows), keep(&[&[1, 1, 1, 1]])] {
                let mask = Mask::with_keep(causal, &keep);
                let seen = mask.visible(q_len, 4, Device::Cpu).unwrap();
                let allowed = mask.allowed(q_len, 4, Device::Cpu).squeeze_dim(1);
                let counted = allowed.sum_dim_intlist([-1i64].as_slice(), false, Kind::Int64);
                if mask.is_plain() {
                    // Padded queries of the second row apart.
                    assert!(seen.get(0).equal(&counted.get(0)), "{causal} {q_len}");
                } else {
                    assert!(seen.equal(&counted), "{causal} {q_len}: {seen} {counted}");
                }
            }
        }
        assert!(Mask::with_keep(true, &keep(&[&[0, 1]])).visible(2, 2, Device::Cpu).is_none());
    }

    #[test]
    fn hidden_scores_stay_finite() {
        for kind in [Kind::Half, Kind::BFloat16, Kind::Float, Kind::Double] {
            let mask = Mask::with_keep(false, &keep(&[&[1, 0]]));
            let bias = mask.bias(1, 2, (kind, Device::Cpu));
            assert!((&bias - 100.0).isfinite().all().int64_value(&[]) == 1, "{kind:?}");
            let weights = bias.to_kind(Kind::Double).softmax(-1, Kind::Double);
            assert_eq!(weights.double_value(&[0, 0, 0, 1]), 0.0, "{kind:?}");
        }
    }
}
