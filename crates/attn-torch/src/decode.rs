//! Attention of single queries, as decoding a token asks.

use std::ptr;

use tch::Tensor;

use crate::error::Result;
use crate::ffi::{attn_decode, call, take_tensor};

/// Softmax attention of single queries q, `[batch, n_heads, 1, head_dim]`, to keys and values `[batch, n_kv_heads, n, head_dim]`, query
/// head h reading head ⌊h·n_kv_heads/n_heads⌋: z, of q's shape. `keep`, `[batch, n]` of bool, is false where a key is hidden; a query that
/// sees none has a z of 0.
///
/// `None` where LibTorch has to do it: off the CPU, on an x86 one without AVX2 and FMA, for other kinds than `f32`, for values of other width than keys, for channels that
/// are not side by side or no multiple of two registers (16; 32 with AVX-512; 8 elsewhere), where a gradient is to be recorded, under autocast.
///
/// Keys and values are read once, as they lie, for all the queries of a group, so that its time is that of memory also where many heads
/// share them: LibTorch's kernel multiplies small matrices then. Stretches of 1,024 keys go to threads and are put together, as in Dao et
/// al. 2023, "Flash-Decoding for long-context inference", <https://pytorch.org/blog/flash-decoding/>.
///
/// # Errors
///
/// Shapes that do not fit, and what LibTorch refuses.
pub fn decode(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    keep: Option<&Tensor>,
    scale: f64,
) -> Result<Option<Tensor>> {
    let keep = keep.map_or(ptr::null(), Tensor::as_ptr);
    let mut out = ptr::null_mut();
    // SAFETY: the tensors are borrowed for the call, and C++ keeps none of them.
    call("attending to a cache", |err| unsafe {
        attn_decode(q.as_ptr(), k.as_ptr(), v.as_ptr(), keep, scale, &mut out, err)
    })?;
    // SAFETY: a successful call leaves null or a tensor of its own.
    Ok(unsafe { take_tensor(out) })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use tch::{Device, Kind};

    use super::*;
    use crate::random::seeded;

    const OPTIONS: (Kind, Device) = (Kind::Float, Device::Cpu);

    fn naive(q: &Tensor, k: &Tensor, v: &Tensor, keep: Option<&Tensor>, scale: f64) -> Tensor {
        naive_in(Kind::Double, q, k, v, keep, scale)
    }

    fn naive_in(
        kind: Kind,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        keep: Option<&Tensor>,
        scale: f64,
    ) -> Tensor {
        let group = q.size()[1] / k.size()[1];
        let [k, v] = [k, v].map(|x| x.to_kind(kind).repeat_interleave_self_int(group, 1, None));
        let mut scores = q.to_kind(kind).matmul(&k.transpose(-2, -1)) * scale;
        if let Some(keep) = keep {
            let hidden = keep.logical_not().unsqueeze(1).unsqueeze(1);
            scores = scores.masked_fill(&hidden, f64::NEG_INFINITY);
        }
        scores.softmax(-1, kind).nan_to_num(0.0, 0.0, 0.0).matmul(&v)
    }

    fn is_served() -> bool {
        let x = Tensor::ones([1, 1, 1, 32], OPTIONS);
        decode(&x, &x, &x, None, 1.0).unwrap().is_some()
    }

    #[test]
    fn groups_find_what_the_definition_says() {
        if !is_served() {
            let line =
                "SKIPPED groups_find_what_the_definition_says: a processor without AVX2 and FMA\n";
            std::io::stderr().write_all(line.as_bytes()).unwrap();
            return;
        }
        let _stream = seeded(21);
        // Sizes around a register of keys, a block, a stretch; groups around the rows of a product.
        for (n, d) in
            [(1, 32), (15, 32), (16, 64), (63, 32), (65, 96), (1023, 64), (1025, 32), (2500, 128)]
        {
            for (n_kv, group) in [(1, 1), (3, 1), (2, 2), (1, 6), (2, 7), (1, 13)] {
                let b = 2;
                // As a cache keeps them: the first keys of a longer buffer.
                let cache = || Tensor::randn([b, n_kv, n + 5, d], OPTIONS).narrow(2, 0, n);
                let (k, v) = (cache(), cache());
                let q = Tensor::randn([b, 1, n_kv * group, d], OPTIONS).transpose(1, 2) * 3.0;
                let keep = Tensor::rand([b, n], OPTIONS).gt(0.4);
                let _ = keep.get(0).narrow(0, 0, n / 2).fill_(0);
                for keep in [None, Some(&keep)] {
                    let scale = (d as f64).powf(-0.5);
                    let found = decode(&q, &k, &v, keep, scale).unwrap().unwrap();
                    let expected = naive(&q, &k, &v, keep, scale);
                    let error = (&found - &expected).abs().max().double_value(&[]);
                    let name = format!(
                        "{n} keys, {d} channels, {n_kv} heads of {group}, {}",
                        keep.is_some()
                    );
                    // Or twice as far as the same products are in f32, which rounds by the processor.
                    let plain = naive_in(Kind::Float, &q, &k, &v, keep, scale);
                    let rounding = (&plain - &expected).abs().max().double_value(&[]);
                    let bound = (2.0 * rounding).max(3e-6);
                    assert!(error < bound, "{name}: {error:e}, in f32 {rounding:e}");
                    assert_eq!(found.size(), q.size(), "{name}");
                }
            }
        }
    }

    #[test]
    fn hidden_keys_leave_no_trace_and_large_scores_come_through() {
        if !is_served() {
            let line = "SKIPPED hidden_keys_leave_no_trace: a processor without AVX2 and FMA\n";
            std::io::stderr().write_all(line.as_bytes()).unwrap();
            return;
        }
        let _stream = seeded(22);
        let (n, d) = (1500, 32);
        let q = Tensor::randn([3, 4, 1, d], OPTIONS) * 1e3;
        let (k, v) = (Tensor::randn([3, 2, n, d], OPTIONS), Tensor::randn([3, 2, n, d], OPTIONS));
        let keep = Tensor::ones([3, n], (Kind::Bool, Device::Cpu));
        let _ = keep.get(1).narrow(0, 0, 1100).fill_(0);
        let _ = keep.get(2).fill_(0);
        let expected = naive(&q, &k, &v, Some(&keep), 1.0);
        for x in [&k, &v] {
            let _ = x.get(1).narrow(1, 0, 1100).fill_(f64::from(f32::MAX));
        }
        let _ = k.get(2).fill_(f64::from(f32::MAX));
        let found = decode(&q, &k, &v, Some(&keep), 1.0).unwrap().unwrap();
        let seen = |x: &Tensor| x.narrow(0, 0, 2);
        let error = (seen(&found) - seen(&expected)).abs().max().double_value(&[]);
        assert!(error < 1e-3, "{error:e}"); // scores of thousands, in f32
        assert_eq!(found.get(2).abs().max().double_value(&[]), 0.0, "a row that sees nothing");

        // What is no number is not taken for nothing: one key, in the first stretch or the last, or all of them.
        for at in [3, 1400] {
            for all in [false, true] {
                let [k, v] = [0; 2].map(|_| Tensor::randn([3, 2, n, d], OPTIONS));
                let _ = if all {
                    k.get(0).fill_(f64::NAN)
                } else {
                    k.get(0).narrow(1, at, 1).fill_(f64::NAN)
                };
                let z = decode(&q, &k, &v, None, 1.0).unwrap().unwrap();
                let lost = z.isnan().view([3, -1]);
                assert_eq!(lost.get(0).all().int64_value(&[]), 1, "{at} {all}");
                assert_eq!(lost.get(1).any().int64_value(&[]), 0, "{at} {all}");
            }
        }
    }

    #[test]
    fn what_it_does_not_do_is_left_to_libtorch() {
        let x = |kind| Tensor::ones([1, 2, 1, 32], (kind, Device::Cpu));
        let float = x(Kind::Float);
        let is_left = |x: &Tensor| decode(x, x, x, None, 1.0).unwrap().is_none();
        for kind in [Kind::Double, Kind::BFloat16] {
            assert!(is_left(&x(kind)), "{kind:?}");
        }
        assert!(is_left(&Tensor::ones([1, 2, 1, 20], OPTIONS)), "channels");
        assert!(is_left(&Tensor::ones([1, 2, 1, 64], OPTIONS).slice(3, 0, 64, 2)), "strides");
        assert!(is_left(&float.copy().set_requires_grad(true)), "a gradient");
        let keys = Tensor::ones([1, 3, 5, 32], OPTIONS);
        let wide = Tensor::ones([1, 2, 1, 64], OPTIONS);
        assert!(decode(&float, &float, &wide, None, 1.0).unwrap().is_none(), "wider values");
        let error = decode(&float, &keys, &keys, None, 1.0).unwrap_err().to_string();
        assert!(error.contains("keys [1, 3, 5, 32]"), "{error}");
        let keep = Tensor::ones([1, 4], (Kind::Bool, Device::Cpu));
        let keys = Tensor::ones([1, 2, 5, 32], OPTIONS);
        assert!(decode(&float, &keys, &keys, Some(&keep), 1.0).is_err());
    }
}
