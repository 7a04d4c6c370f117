//! Softmax attention in which each query sees a few stretches of keys: kernels for `f32` on the CPU.

use std::ptr;

use tch::{Device, Kind, Tensor};

use crate::autograd::{self, BoxError, Forward, Function};
use crate::error::{Error, Result};
use crate::ffi::{
    List, attn_attend, attn_attend_backward, attn_attends, attn_choose_blocks, call, take_tensor,
};
use crate::guards::GradMode;

/// The keys that queries see.
#[derive(Debug)]
pub struct Seen {
    /// Query i sees the keys from `lo[i]` up to but without `hi[i]`: int32, `[1 or batch, q_len]`.
    pub lo: Tensor,
    /// As `lo`. A query whose stretch is empty has an output of 0.
    pub hi: Tensor,
    /// Keys at the beginning that a query sees beside its stretch, where they lie before `hi`; 0 with `choices`.
    pub first: i64,
    /// Of its stretch a query sees the chosen blocks alone, where there are choices.
    pub choices: Option<Choices>,
}

/// The blocks that queries chose.
#[derive(Debug)]
pub struct Choices {
    /// Int32, `[batch, groups, q_len, n]`, each block once and -1 for none; `groups` divides the query heads, and
    /// neighbours share a choice.
    pub chosen: Tensor,
    /// Keys in a block.
    pub block: i64,
}

/// Whether [`attend`] serves tensors like `x` here: `f32`, on the CPU, without autocast, on a processor with AVX2 and FMA
/// (or one that is no x86-64).
pub fn attends(x: &Tensor) -> bool {
    // SAFETY: takes nothing and reads the state of this thread.
    x.device() == Device::Cpu && x.kind() == Kind::Float && unsafe { attn_attends() } != 0
}

/// Softmax attention of the queries `[batch, n_heads, q_len, head_dim]` to the keys and values `[batch, n_kv_heads, k_len,
/// head_dim]` that `seen` names, with scores of `scale · q·k`: z like the queries, and the base-2 logarithms of the sums of
/// exponentials, `[batch, n_heads, q_len]`, which take no gradient (-∞ where a query sees nothing). Query head h reads
/// key/value head ⌊h·n_kv_heads/n_heads⌋.
///
/// No score is kept: time grows with the pairs of query and key that are seen, memory with the queries and the keys, in
/// the backward pass too (Dao et al. 2022, "FlashAttention", <https://arxiv.org/abs/2205.14135>). There is no second
/// derivative.
///
/// # Errors
///
/// Where [`attends`] says no, for shapes that do not fit, and for a `scale` that is not above 0.
pub fn attend(q: &Tensor, k: &Tensor, v: &Tensor, seen: Seen, scale: f64) -> Result<[Tensor; 2]> {
    check(q, scale)?;
    let mut both = autograd::apply(Attend { seen, scale }, &[q, k, v])?;
    let lse = both.pop().expect("two outputs").detach();
    Ok([both.pop().expect("two outputs"), lse])
}

/// Refuses what no kernel serves.
pub(crate) fn check(q: &Tensor, scale: f64) -> Result<()> {
    let refuse = |message: String| Err(Error::Torch { doing: "attending", message });
    if !attends(q) {
        return refuse(format!("no kernel here for {:?} on {:?}", q.kind(), q.device()));
    }
    if !(scale.is_finite() && scale > 0.0) {
        return refuse(format!("`scale` is {scale}, a number above 0 expected"));
    }
    Ok(())
}

/// How [`choose_blocks`] scores blocks, and which it takes in any case.
#[derive(Debug)]
pub struct BlockChoice<'a> {
    /// Keys that query i sees, from the first on: int32, `[1 or batch, q_len]`.
    pub hi: &'a Tensor,
    /// Of [`attend`] to the same keys.
    pub lse: &'a Tensor,
    /// The query's own block: int32, `[q_len]`.
    pub own: &'a Tensor,
    /// How many blocks there are for a query: int32, as `hi`.
    pub end: &'a Tensor,
    /// What scores are multiplied by.
    pub scale: f64,
    /// Keys before a block's own that count for it, and the last of its own as often: n below `reach` in the sum.
    pub reach: i64,
    /// Keys that are a block's own.
    pub per_block: i64,
    /// Blocks in all.
    pub n_blocks: i64,
    /// Blocks at the beginning that are chosen in any case.
    pub n_initial: i64,
    /// Blocks less far than this from the query's own are chosen in any case.
    pub n_local: i64,
    /// Blocks that a query chooses.
    pub n_chosen: i64,
}

/// The blocks that weigh most for the query heads of each key/value head, as [`Choices::chosen`] has them:
/// `[batch, n_kv_heads, q_len, n_chosen]`. Of equal ones the earlier.
///
/// ```text
/// score_j = Σ_{heads of the group} Σ_{m<per_block} Σ_{n<reach} weight[per_block·j + m − n]
/// ```
///
/// over the softmax weights of the keys `k`, zero-based, out of range dropped. Takes no gradient.
///
/// # Errors
///
/// As [`attend`].
pub fn choose_blocks(q: &Tensor, k: &Tensor, choice: &BlockChoice) -> Result<Tensor> {
    check(q, choice.scale)?;
    let mut out = ptr::null_mut();
    // SAFETY: the tensors are borrowed for the call, and C++ keeps none of them.
    call("choosing blocks", |err| unsafe {
        attn_choose_blocks(
            q.as_ptr(),
            k.as_ptr(),
            choice.hi.as_ptr(),
            choice.lse.as_ptr(),
            choice.own.as_ptr(),
            choice.end.as_ptr(),
            choice.scale,
            choice.reach,
            choice.per_block,
            choice.n_blocks,
            choice.n_initial,
            choice.n_local,
            choice.n_chosen,
            &mut out,
            err,
        )
    })?;
    // SAFETY: a successful call leaves a tensor of its own.
    Ok(unsafe { take_tensor(out) }.expect("a successful call leaves a tensor"))
}

struct Attend {
    seen: Seen,
    scale: f64,
}

impl Attend {
    fn choices(&self) -> (*const torch_sys::C_tensor, i64) {
        let choices = self.seen.choices.as_ref();
        choices.map_or((ptr::null(), 0), |choices| (choices.chosen.as_ptr(), choices.block))
    }
}

impl Function for Attend {
    fn forward(&self, inputs: &[Tensor]) -> std::result::Result<Forward, BoxError> {
        let [q, k, v] = inputs else { unreachable!("queries, keys and values") };
        let (choices, block) = self.choices();
        let Seen { lo, hi, first, .. } = &self.seen;
        let (mut out, doing) = (List::new(), "attending");
        // SAFETY: the tensors are borrowed for the call, C++ keeps none of them, and the list is ours alone.
        call(doing, |err| unsafe {
            let (q, k, v) = (q.as_ptr(), k.as_ptr(), v.as_ptr());
            let (lo, hi, list) = (lo.as_ptr(), hi.as_ptr(), out.as_mut_ptr());
            attn_attend(q, k, v, lo, hi, choices, *first, block, self.scale, list, err)
        })?;
        let [whole, lse] = <[Tensor; 2]>::try_from(out.to_defined(doing)?).expect("two results");
        let z = whole.narrow(3, 0, q.size()[3]);
        let saved = [q, k, v, &whole, &lse].map(Tensor::shallow_clone).into();
        Ok(Forward { outputs: vec![z, lse], saved })
    }

    fn backward(
        &self,
        saved: &[Tensor],
        grads: &[Tensor],
    ) -> std::result::Result<Vec<Option<Tensor>>, BoxError> {
        if GradMode::is_enabled() {
            return Err("attention to stretches of keys has no second derivative in f32 on the CPU\nhint: use f64".into());
        }
        let [q, k, v, z, lse] = saved else { unreachable!("five tensors were saved") };
        let (choices, block) = self.choices();
        let Seen { lo, hi, first, .. } = &self.seen;
        let (mut out, doing) = (List::new(), "going back through attention");
        // SAFETY: as in `forward`.
        call(doing, |err| unsafe {
            let (q, k, v) = (q.as_ptr(), k.as_ptr(), v.as_ptr());
            let (lo, hi, list) = (lo.as_ptr(), hi.as_ptr(), out.as_mut_ptr());
            let (z, lse, grad) = (z.as_ptr(), lse.as_ptr(), grads[0].as_ptr());
            attn_attend_backward(
                q, k, v, lo, hi, choices, *first, block, self.scale, z, lse, grad, list, err,
            )
        })?;
        Ok(out.to_tensors()?)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io::Write;

    use super::*;
    use crate::random::seeded;

    const OPTIONS: (Kind, Device) = (Kind::Float, Device::Cpu);

    /// Whether the kernels run here; says so where not.
    pub(crate) fn served(test: &str) -> bool {
        let is_served = attends(&Tensor::zeros([1], OPTIONS));
        if !is_served {
            // Past the test runner, which keeps what passing tests print.
            let line = format!("\nSKIPPED {test}: no kernels for this processor\n");
            std::io::stderr().write_all(line.as_bytes()).unwrap();
        }
        is_served
    }

    fn ints(values: &[i64]) -> Tensor {
        Tensor::from_slice(values).to_kind(Kind::Int)
    }

    /// Which keys are seen, from the definition: bool `[batch, n_heads, q_len, k_len]`.
    fn allowed(seen: &Seen, [b, h, k_len]: [i64; 3]) -> Tensor {
        let q_len = seen.lo.size()[1];
        let key = Tensor::arange(k_len, (Kind::Int64, Device::Cpu));
        let [lo, hi] = [&seen.lo, &seen.hi].map(|x| x.view([-1, 1, q_len, 1]));
        let near = key.ge_tensor(&lo).logical_or(&key.lt(seen.first));
        let mut allowed = near.logical_and(&key.lt_tensor(&hi));
        if let Some(Choices { chosen, block }) = &seen.choices {
            let own = key.divide_scalar_mode(*block, "floor");
            let is_chosen = chosen.unsqueeze(-2).eq_tensor(&own.unsqueeze(-1)).any_dim(-1, false);
            let is_chosen =
                is_chosen.repeat_interleave_self_int(h / chosen.size()[1], 1, None::<i64>);
            allowed = allowed.logical_and(&is_chosen);
        }
        allowed.expand([b, h, q_len, k_len], true)
    }

    /// z, its base-2 log sums and the gradients of q, k and v under `grad`, all in `f64` and with every score made.
    fn naive(qkv: [&Tensor; 3], seen: &Seen, scale: f64, grad: &Tensor) -> [Tensor; 5] {
        let exact = qkv.map(|x| x.detach().to_kind(Kind::Double).set_requires_grad(true));
        let [q, k, v] = &exact;
        let (h, r) = (q.size()[1], q.size()[1] / k.size()[1]);
        let allowed = allowed(seen, [q.size()[0], h, k.size()[2]]);
        let [k, v] = [k, v].map(|x| x.repeat_interleave_self_int(r, 1, None::<i64>));
        let scores =
            (q.matmul(&k.transpose(-2, -1)) * scale).masked_fill(&allowed.logical_not(), -1e300);
        let lse = scores.detach().logsumexp([-1i64].as_slice(), false) / std::f64::consts::LN_2;
        let lse = lse.masked_fill(&allowed.any_dim(-1, false).logical_not(), f64::NEG_INFINITY);
        let z = (scores.softmax(-1, Kind::Double) * allowed.any_dim(-1, true)).matmul(&v);
        (&z * grad).sum(Kind::Double).backward();
        let [dq, dk, dv] = exact.each_ref().map(Tensor::grad);
        [z.detach(), lse, dq, dk, dv]
    }

    pub(crate) fn random(size: &[i64]) -> Tensor {
        // Laid out as a layer cuts them from its projections: not contiguous.
        let [b, h, n, d] = size else { unreachable!("four axes") };
        Tensor::randn([*b, *n, *h, *d], OPTIONS).transpose(1, 2)
    }

    /// Relative to `expected`, or as it is where that is 0: scores of a single key have no gradient but rounding.
    pub(crate) fn error(found: &Tensor, expected: &Tensor) -> f64 {
        let rms = |x: Tensor| x.square().mean(Kind::Double).sqrt().double_value(&[]);
        let (error, scale) =
            (rms(found.to_kind(Kind::Double) - expected), rms(expected.shallow_clone()));
        if scale < 1e-12 { error } else { error / scale }
    }

    fn check(name: &str, [b, h, n_kv, k_len, d]: [i64; 5], seen: impl Fn() -> Seen) {
        let q_len = seen().lo.size()[1];
        let (q, k, v) =
            (random(&[b, h, q_len, d]), random(&[b, n_kv, k_len, d]), random(&[b, n_kv, k_len, d]));
        let grad = random(&[b, h, q_len, d]);
        let scale = (d as f64).powf(-0.5);
        let expected = naive([&q, &k, &v], &seen(), scale, &grad);
        let leaves = [&q, &k, &v].map(|x| x.detach().set_requires_grad(true));
        let [z, lse] = attend(&leaves[0], &leaves[1], &leaves[2], seen(), scale).unwrap();
        (&z * &grad).sum(Kind::Float).backward();
        let found = [z.detach(), lse, leaves[0].grad(), leaves[1].grad(), leaves[2].grad()];
        for (at, (what, (found, expected))) in
            ["z", "lse", "dq", "dk", "dv"].into_iter().zip(found.iter().zip(&expected)).enumerate()
        {
            assert_eq!(found.size(), expected.size(), "{name}: {what}");
            if at == 1 {
                let bare = expected.isinf();
                assert!(found.isinf().equal(&bare), "{name}: queries that see nothing");
                let error =
                    (found - expected).masked_fill(&bare, 0.0).abs().max().double_value(&[]);
                assert!(error < 1e-4, "{name}: {what} is off by {error:.1e}");
                continue;
            }
            // Sums of a few hundred terms in f32, each rounded to 6e-8.
            let error = error(found, expected);
            assert!(error < 2e-6, "{name}: {what} is off by {error:.1e}");
        }
    }

    fn limits(rows: &[Vec<i64>]) -> Tensor {
        Tensor::stack(&rows.iter().map(|row| ints(row)).collect::<Vec<_>>(), 0)
    }

    #[test]
    fn stretches_are_softmax_over_what_is_seen() {
        if !served("stretches_are_softmax_over_what_is_seen") {
            return;
        }
        let _stream = seeded(1);
        // Sizes around a group of rows, a panel, a tile, a chunk of queries.
        for (n, window, d) in
            [(1, 1, 6), (7, 3, 64), (65, 20, 6), (130, 64, 80), (300, 100, 64), (700, 33, 16)]
        {
            for first in [0, 1, 5, 70] {
                for (h, n_kv) in [(2, 2), (4, 1)] {
                    let causal = || Seen {
                        lo: limits(&[(0..n).map(|i| i - window + 1).collect()]),
                        hi: limits(&[(0..n).map(|i| i + 1).collect()]),
                        first,
                        choices: None,
                    };
                    let name = format!(
                        "{n} tokens, window {window}, {first} first, {d} channels, {h}/{n_kv}"
                    );
                    check(&name, [2, h, n_kv, n, d], causal);
                    // Both sides, and the second example ends early.
                    let around = || Seen {
                        lo: limits(&[0, 1].map(|_| (0..n).map(|i| i - window + 1).collect())),
                        hi: limits(
                            &[n, n * 2 / 3]
                                .map(|n_real| (0..n).map(|i| (i + window).min(n_real)).collect()),
                        ),
                        first,
                        choices: None,
                    };
                    check(&format!("{name}, both sides"), [2, h, n_kv, n, d], around);
                }
            }
        }
    }

    #[test]
    fn chosen_blocks_are_softmax_over_their_keys() {
        if !served("chosen_blocks_are_softmax_over_their_keys") {
            return;
        }
        let _stream = seeded(2);
        for (n, block, n_choices, d) in [
            (9, 1, 3, 6),
            (150, 4, 5, 6),
            (200, 48, 2, 64),
            (520, 200, 2, 16),
            (1100, 64, 4, 8),
            (300, 131, 2, 6),
        ] {
            for (h, groups, n_kv) in [(2, 2, 2), (4, 2, 2), (4, 4, 1), (4, 1, 1)] {
                let n_blocks = (n + block - 1) / block;
                // A permutation of the blocks for each query, with none in the places of some; one query has nothing.
                let order = Tensor::rand([2, groups, n, n_blocks], OPTIONS).argsort(-1, false);
                let chosen = order.narrow(-1, 0, n_choices.min(n_blocks)).to_kind(Kind::Int);
                let gone = Tensor::rand(chosen.size(), OPTIONS).lt(0.2);
                let chosen = chosen.masked_fill(&gone, -1);
                let _ = chosen.narrow(2, n / 2, 1).fill_(-1);
                let seen = || Seen {
                    lo: ints(&vec![0; n as usize]).unsqueeze(0),
                    hi: limits(&[(0..n).map(|i| i + 1).collect()]),
                    first: 0,
                    choices: Some(Choices { chosen: chosen.shallow_clone(), block }),
                };
                let name = format!(
                    "{n} tokens, {n_choices} blocks of {block}, {d} channels, {h}/{groups}/{n_kv} heads"
                );
                check(&name, [2, h, n_kv, n, d], seen);
            }
        }
    }

    #[test]
    fn blocks_are_chosen_by_what_they_weigh() {
        if !served("blocks_are_chosen_by_what_they_weigh") {
            return;
        }
        let _stream = seeded(3);
        let (b, d, scale) = (2, 16, 0.25);
        for (n, stride, reach, per_block, n_chosen) in
            [(400i64, 4, 2, 4, 5), (90, 2, 1, 3, 4), (33, 16, 2, 2, 3), (300, 1, 3, 1, 20)]
        {
            for (h, n_kv) in [(2, 2), (4, 1)] {
                let length = reach * stride;
                let n_keys = if n < length { 0 } else { (n - length) / stride + 1 };
                let (block, n_local, n_initial) = (per_block * stride, 2, 1);
                let n_blocks = (n + block - 1) / block;
                let (q, k) = (random(&[b, h, n, d]), random(&[b, n_kv, n_keys, d]));
                let hi = limits(&[(0..n)
                    .map(|i| if i + 1 < length { 0 } else { (i + 1 - length) / stride + 1 })
                    .collect()]);
                let own: Vec<i64> = (0..n).map(|i| i / block).collect();
                let end = limits(&[own.iter().map(|own| own + 1).collect()]);
                let seen =
                    Seen { lo: hi.zeros_like(), hi: hi.shallow_clone(), first: 0, choices: None };
                let all = allowed(&seen, [b, h, n_keys]);
                let [_, lse] = attend(&q, &k, &k, seen, scale).unwrap();
                let choice = BlockChoice {
                    hi: &hi,
                    lse: &lse,
                    own: &ints(&own),
                    end: &end,
                    scale,
                    reach,
                    per_block,
                    n_blocks,
                    n_initial,
                    n_local,
                    n_chosen,
                };
                let chosen = choose_blocks(&q, &k, &choice).unwrap();
                assert_eq!(chosen.size(), [b, n_kv, n, n_chosen]);

                let k =
                    k.to_kind(Kind::Double).repeat_interleave_self_int(h / n_kv, 1, None::<i64>);
                let scores = q.to_kind(Kind::Double).matmul(&k.transpose(-2, -1)) * scale;
                let weights =
                    scores.masked_fill(&all.logical_not(), -1e300).softmax(-1, Kind::Double) * &all;
                let shared = weights.view([b, n_kv, h / n_kv, n, n_keys]).sum_dim_intlist(
                    [2i64].as_slice(),
                    false,
                    Kind::Double,
                );
                let shared = Vec::<f64>::try_from(shared.contiguous().view([-1])).unwrap();
                let chosen = Vec::<i64>::try_from(chosen.to_kind(Kind::Int64).view([-1])).unwrap();
                for (at, chosen) in chosen.chunks(n_chosen as usize).enumerate() {
                    let (row, own) =
                        (&shared[at * n_keys as usize..][..n_keys as usize], own[at % n as usize]);
                    let score = |j: i64| -> f64 {
                        let terms = (0..per_block)
                            .flat_map(|m| (0..reach).map(move |back| per_block * j + m - back));
                        terms
                            .filter(|key| (0..n_keys).contains(key))
                            .map(|key| row[key as usize])
                            .sum()
                    };
                    let in_any_case = |j: i64| j < n_initial || own - j < n_local;
                    let taken: Vec<i64> = chosen.iter().copied().filter(|&j| j >= 0).collect();
                    assert_eq!(taken.len() as i64, n_chosen.min(own + 1), "query {at}: {chosen:?}");
                    let left: Vec<i64> = (0..=own).filter(|j| !taken.contains(j)).collect();
                    assert!(left.iter().all(|&j| !in_any_case(j)), "query {at}: {chosen:?}");
                    let worst = taken
                        .iter()
                        .filter(|&&j| !in_any_case(j))
                        .map(|&j| score(j))
                        .fold(f64::MAX, f64::min);
                    let best = left.iter().map(|&j| score(j)).fold(0.0, f64::max);
                    // Weights of f32; where they are nearer than their rounding either may be taken.
                    assert!(
                        worst >= best - 1e-5,
                        "query {at} took {taken:?}: {worst} against {best}"
                    );
                }
            }
        }
    }

    #[test]
    fn equal_blocks_are_taken_from_the_first_on() {
        if !served("equal_blocks_are_taken_from_the_first_on") {
            return;
        }
        // Keys of 0 weigh alike.
        let (q, k) = (random(&[1, 1, 1, 8]), Tensor::zeros([1, 1, 8, 8], OPTIONS));
        let (hi, end) = (ints(&[8]).unsqueeze(0), ints(&[8]).unsqueeze(0));
        let seen = Seen { lo: hi.zeros_like(), hi: hi.shallow_clone(), first: 0, choices: None };
        let [_, lse] = attend(&q, &k, &k, seen, 1.0).unwrap();
        let choice = BlockChoice {
            hi: &hi,
            lse: &lse,
            own: &ints(&[7]),
            end: &end,
            scale: 1.0,
            reach: 1,
            per_block: 1,
            n_blocks: 8,
            n_initial: 0,
            n_local: 1,
            n_chosen: 4,
        };
        let chosen = choose_blocks(&q, &k, &choice).unwrap().view([-1]).sort(-1, false).0;
        assert!(chosen.equal(&ints(&[0, 1, 2, 7])), "{chosen}");
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        if !served("what_does_not_fit_is_refused") {
            return;
        }
        let _stream = seeded(11);
        let x = random(&[1, 2, 5, 8]);
        let seen = |n: i64| Seen {
            lo: Tensor::zeros([1, n], (Kind::Int, Device::Cpu)),
            hi: Tensor::ones([1, n], (Kind::Int, Device::Cpu)),
            first: 0,
            choices: None,
        };
        let message = |x: &Tensor, n: i64, scale: f64| {
            attend(x, x, x, seen(n), scale).unwrap_err().to_string()
        };
        assert!(message(&x, 4, 1.0).contains("limits [1, 4]"), "{}", message(&x, 4, 1.0));
        assert!(message(&x.to_kind(Kind::Double), 5, 1.0).contains("Double"));
        assert!(message(&x, 5, -1.0).contains("`scale` is -1"));

        let (ends, lse) = (ints(&[4; 5]).unsqueeze(0), Tensor::zeros([1, 2, 5], OPTIONS));
        let refused = |n_blocks: i64, n_chosen: i64| {
            let choice = BlockChoice {
                hi: &ends,
                lse: &lse,
                own: &ints(&[0; 5]),
                end: &ends,
                scale: 1.0,
                reach: 1,
                per_block: 1,
                n_blocks,
                n_initial: 0,
                n_local: 1,
                n_chosen,
            };
            choose_blocks(&x, &x, &choice).map_err(|error| error.to_string())
        };
        assert!(refused(4, 2).is_ok());
        assert!(refused(4, 0).unwrap_err().contains("0 of 4 blocks"));
        assert!(refused(3, 2).unwrap_err().contains("block 4 of 3"));

        let learned = x.copy().set_requires_grad(true);
        let [z, _] = attend(&learned, &x, &x, seen(5), 1.0).unwrap();
        let twice = autograd::GradOptions { create_graph: true, ..Default::default() };
        let error = autograd::grad(&[z.sum(Kind::Float)], &[] as &[Tensor], &[&learned], twice)
            .unwrap_err();
        assert!(error.to_string().contains("no second derivative"), "{error}");
    }

    #[test]
    fn large_scores_and_what_is_no_number_come_through() {
        if !served("large_scores_and_what_is_no_number_come_through") {
            return;
        }
        let _stream = seeded(12);
        let n = 40;
        let seen = || Seen {
            lo: ints(&vec![0; n as usize]).unsqueeze(0),
            hi: limits(&[(0..n).map(|i| i + 1).collect()]),
            first: 0,
            choices: None,
        };
        let (q, k) = (random(&[1, 1, n, 8]) * 100.0, random(&[1, 1, n, 8]) * 100.0);
        let [z, _] = attend(&q, &k, &k, seen(), 1.0).unwrap();
        assert_eq!(z.isfinite().all().int64_value(&[]), 1);

        let _ = q.narrow(2, 20, 1).fill_(f64::NAN);
        let [z, _] = attend(&q, &k, &k, seen(), 1.0).unwrap();
        let is_nan = z.isnan().all_dim(-1, false).view([-1]);
        assert_eq!((is_nan.int64_value(&[20]), is_nan.sum(Kind::Int64).int64_value(&[])), (1, 1));
    }
}
