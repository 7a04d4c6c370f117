//! Big Bird: tokens in blocks; a block of queries sees the first blocks, its neighbours and a few blocks drawn at random.
//!
//! ```text
//! z_i  = Σ_j softmax_j(scale · q_i·k_j  if block(j) in S(block(i)), else -∞) v_j
//! S(b) = the first n_global ∪ b − ⌊n_window/2⌋ … b + ⌊n_window/2⌋ ∪ n_random others     all blocks for b < n_global
//! ```
//!
//! Zaheer et al. 2020, "Big Bird", <https://arxiv.org/abs/2007.14062>, section 2 and appendix D, the model whose global tokens
//! are among the text's (ITC). What differs, and what the paper leaves open:
//!
//! - The published code draws for each head; here the heads of a layer share a draw, which then outlives the removal of heads.
//! - Random blocks are whole ones, drawn by seed, layer and query block, and in a bidirectional layer by the number of blocks:
//!   padding changes nothing.
//! - A causal layer sees no block behind the query's own, and draws among those before the window; its global queries see
//!   their past alone.
//!
//! Time and memory grow with the blocks seen; the draws take n/block numbers more.

use std::num::NonZeroU32;

use rand::seq::index;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::{
    Error,
    attention::{Attention, AttnInput, Dims, Masks, Nature, Own, Projections, Stream},
    banded,
    blocks::{ChosenBlocks, n_blocks, query_positions},
    pairs,
};

/// Settings of [`BigBird`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Tokens in a block.
    pub block: NonZeroU32,
    /// Blocks at the beginning that every query sees, and whose queries see everything.
    pub n_global: u32,
    /// Blocks around the query's own, itself among them: an odd number.
    pub n_window: NonZeroU32,
    /// Other blocks that a block of queries sees.
    pub n_random: u32,
    /// Of the draws.
    pub seed: u64,
}

impl Default for Config {
    fn default() -> Self {
        // The paper's base model, appendix E.
        Self {
            block: const { NonZeroU32::new(64).unwrap() },
            n_global: 2,
            n_window: const { NonZeroU32::new(3).unwrap() },
            n_random: 3,
            seed: 0,
        }
    }
}

impl Config {
    fn check(&self, dims: &Dims) -> Result<(), Error> {
        let block = i64::from(self.block.get());
        if self.n_window.get().is_multiple_of(2) {
            let (field, value) = ("n_window", self.n_window.to_string());
            let problem =
                "expected an odd number: the query's own block and as many on each side".into();
            return Err(Error::Setting { kind: "big_bird", field, value, problem });
        }
        let window = i64::from(self.n_window.get());
        let window = if dims.causal { window / 2 + 1 } else { window };
        let fixed = i64::from(self.n_global) + window;
        let what = format!("no more blocks of {block} beside the {fixed} global and near ones");
        let wanted = ("n_random", self.n_random);
        dims.check_choices("big_bird", wanted, &what, |n| (n_blocks(n, block) - fixed).max(0))
    }

    pub(super) fn build(
        &self,
        dims: &Dims,
        _: &Projections,
        _: &mut Own<'_, '_>,
    ) -> Result<Box<dyn Attention>, Error> {
        self.check(dims)?;
        Ok(Box::new(BigBird { config: self.clone(), dims: dims.clone() }))
    }
}

/// Softmax over the keys of some blocks, which are alike for the queries of a block.
#[derive(Debug)]
pub struct BigBird {
    config: Config,
    dims: Dims,
}

impl BigBird {
    fn block(&self) -> i64 {
        self.config.block.get().into()
    }

    fn n_global(&self) -> i64 {
        self.config.n_global.into()
    }

    /// The blocks that `own` sees of a text of `n` tokens, in no order: those in any case, and those drawn.
    fn seen(&self, own: i64, n: i64, layer: u64) -> (Vec<i64>, Vec<i64>) {
        let n_all = n_blocks(n, self.block());
        let reach = i64::from(self.config.n_window.get() / 2);
        let (first, last) = (own - reach, if self.dims.causal { own } else { own + reach });
        let last = last.min(n_all - 1);
        let n_global = self.n_global().min(if self.dims.causal { own + 1 } else { n_all });
        let fixed = (0..n_global).chain(first.max(n_global)..=last).collect();
        // Whole blocks before the window, and in a bidirectional layer behind it.
        let before = (first - n_global).max(0);
        let behind = if self.dims.causal { 0 } else { n / self.block() - n_global.max(last + 1) };
        let others = before + behind.max(0);
        let mut rng = Stream { seed: self.config.seed, step: own as u64, layer }.rng();
        let n_random = i64::from(self.config.n_random).min(others);
        let drawn = index::sample(&mut rng, others as usize, n_random as usize).into_iter();
        let place = |at: i64| {
            if at < before { n_global + at } else { n_global.max(last + 1) + at - before }
        };
        (fixed, drawn.map(|at| place(at as i64)).collect())
    }

    /// Lists of blocks for every query, as [`ChosenBlocks`] takes them, without an axis of heads: int32, `[1 or batch, q_len, n]`.
    fn lists(&self, input: &AttnInput) -> Tensor {
        let (q_len, k_len, device) = (input.q.size()[2], input.k.size()[2], input.q.device());
        let first = (k_len - q_len) / self.block();
        let n_all = n_blocks(k_len, self.block());
        let keep = input.mask.keep().filter(|_| !input.mask.is_plain() && !self.dims.causal);
        let lengths = keep.map_or(vec![k_len], |keep| {
            let n_real = keep.sum_dim_intlist([1i64].as_slice(), false, Kind::Int64);
            Vec::try_from(n_real).expect("a length for each row")
        });
        let width = self.n_global()
            + i64::from(self.config.n_window.get())
            + i64::from(self.config.n_random);
        let mut table: Vec<i32> = Vec::new();
        for &n in &lengths {
            for own in first..n_all {
                let (fixed, drawn) = self.seen(own, n, input.stream.layer);
                let end = table.len() + width as usize;
                table.extend(fixed.iter().chain(&drawn).map(|&block| block as i32));
                table.resize(end, -1);
            }
        }
        let table = Tensor::from_slice(&table).to_device(device);
        let own = query_positions(q_len, k_len, device).divide_scalar_mode(self.block(), "floor");
        table.view([lengths.len() as i64, n_all - first, width]).index_select(1, &(own - first))
    }

    /// The queries that see all keys, of the first tokens.
    fn n_all_seeing(&self, input: &AttnInput) -> i64 {
        let (q_len, k_len) = (input.q.size()[2], input.k.size()[2]);
        let is_whole = !input.mask.causal() && q_len == k_len;
        if is_whole { (self.n_global() * self.block()).min(q_len) } else { 0 }
    }
}

impl Attention for BigBird {
    fn forward(&self, input: &AttnInput) -> Tensor {
        let [b, _, q_len, _] = input.q.size()[..] else { unreachable!("queries have four axes") };
        let lists = self.lists(input).unsqueeze(1);
        let lists = lists.expand([b, self.dims.n_kv_heads, q_len, -1], true);
        let blocks = ChosenBlocks {
            chosen: &lists,
            by_head: false,
            block: self.block(),
            mask: input.mask,
            dims: &self.dims,
            dropout: input.dropout,
        };
        let z = blocks.attend(input.q, input.k, input.v).0;
        let n = self.n_all_seeing(input);
        if n == 0 {
            return z;
        }
        let rest = z.narrow(2, n, q_len - n);
        Tensor::cat(&[banded::first_see_all(input, &self.dims, n), rest], 2)
    }

    fn weights(&self, input: &AttnInput, rows: &[i64]) -> Tensor {
        let (k_len, device) = (input.k.size()[2], input.q.device());
        let index = Tensor::from_slice(rows).to_device(device);
        let lists = self.lists(input).index_select(1, &index); // [1 or b, rows, n]
        let key = Tensor::arange(k_len, (Kind::Int64, device));
        let key = key.divide_scalar_mode(self.block(), "floor");
        let sees = lists.unsqueeze(-1).eq_tensor(&key).any_dim(-2, false); // [1 or b, rows, k]
        let sees = sees.logical_or(&index.lt(self.n_all_seeing(input)).unsqueeze(-1));
        banded::dense_weights(input, &self.dims, rows, &sees.unsqueeze(1))
    }

    /// 4 · head_dim · n_heads · pairs of a query with the keys of the blocks that its own sees; all keys for global queries of a
    /// bidirectional layer.
    fn flops(&self, n_tokens: i64) -> i64 {
        let (block, causal) = (self.block(), self.dims.causal);
        let size = |at: i64| block.min(n_tokens - at * block);
        let n_pairs = |own: i64| {
            if !causal && own < self.n_global() {
                return size(own) * n_tokens;
            }
            let (fixed, drawn) = self.seen(own, n_tokens, 0);
            let keys: i64 = fixed.iter().chain(&drawn).map(|&at| size(at)).sum();
            // Of its own block a causal query sees what is before it.
            let hidden = if causal { size(own) * (size(own) - 1) / 2 } else { 0 };
            size(own) * keys - hidden
        };
        pairs::weighing(&self.dims, (0..n_blocks(n_tokens, block)).map(n_pairs).sum())
    }

    super::holds!(1, 4);

    fn nature(&self) -> Nature {
        let n_random: i64 = self.config.n_random.into();
        let n_window: i64 = self.config.n_window.get().into();
        let reach = self.block() * (self.n_global() + n_window + n_random);
        Nature { reach, chooses: false, reads_coordinates: false, has_own_slopes: false }
    }

    fn masks(&self) -> Masks {
        Masks::Contiguous // Blocks count from the first real token.
    }

    super::follows_dims!();
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::{
        mask::Mask,
        testing::{Probe, assert_close, naive_attention, randn},
    };

    fn kind([block, n_global, n_window, n_random]: [u32; 4], probe: &Probe) -> BigBird {
        let size = |n| NonZeroU32::new(n).unwrap();
        let (block, n_window) = (size(block), size(n_window));
        let config = Config { block, n_global, n_window, n_random, seed: 3 };
        BigBird { config, dims: probe.dims.clone() }
    }

    const SIZES: [[u32; 4]; 5] =
        [[4, 1, 3, 2], [1, 0, 1, 3], [7, 2, 1, 1], [3, 0, 5, 0], [50, 1, 3, 1]];

    /// Whether query i sees key j, from the definition, but for what was drawn.
    fn sees(kind: &BigBird, n: usize, causal: bool, i: usize, j: usize) -> bool {
        let (block, n_global) = (kind.block() as usize, kind.n_global() as usize);
        let (own, other) = (i / block, j / block);
        let drawn = kind.seen(own as i64, n as i64, 0).1;
        let near = own.abs_diff(other) <= kind.config.n_window.get() as usize / 2;
        let all = !causal && own < n_global;
        (near || other < n_global || drawn.contains(&(other as i64)) || all) && (!causal || j <= i)
    }

    #[test]
    fn matches_the_definition() {
        for sizes in SIZES {
            for n in [1usize, 7, 30, 64] {
                for causal in [false, true] {
                    let probe = Probe::new(83, [2, n as i64, n as i64], 4, 2, causal);
                    let kind = kind(sizes, &probe);
                    let (z, weights) = naive_attention(&probe, |i, j| sees(&kind, n, causal, i, j));
                    let name = format!("{sizes:?}, {n} tokens, causal {causal}");
                    let mask = Mask::new(causal);
                    assert_close(&name, &kind.forward(&probe.input(&mask)), &z, 1e-12);
                    let rows: Vec<i64> = (0..n as i64).collect();
                    assert_close(&name, &kind.weights(&probe.input(&mask), &rows), &weights, 1e-12);
                    let single = kind.forward(&probe.to(Kind::Float, Device::Cpu).input(&mask));
                    assert_close(&format!("{name}, f32"), &single, &z, 1e-5);
                }
            }
        }
    }

    #[test]
    fn draws_are_other_whole_blocks_and_differ_by_block_and_layer() {
        let probe = Probe::new(84, [1, 8, 8], 4, 2, false);
        let kind = kind([4, 2, 3, 5], &probe);
        for own in 0..20 {
            let (fixed, mut drawn) = kind.seen(own, 79, 0);
            assert_eq!(drawn.len(), 5, "block {own}");
            assert!(
                drawn.iter().all(|at| !fixed.contains(at) && (0..19).contains(at)),
                "{drawn:?}"
            );
            drawn.sort_unstable();
            drawn.dedup();
            assert_eq!(drawn.len(), 5, "block {own}");
        }
        let of = |own, layer| kind.seen(own, 79, layer).1;
        assert_eq!(of(9, 0), of(9, 0));
        assert_ne!(of(9, 0), of(9, 1));
        assert_ne!(of(9, 0), of(13, 0));
    }

    #[test]
    fn padding_on_the_right_is_not_seen() {
        let n_real = [63, 5];
        let probe = Probe::new(85, [2, 80, 80], 4, 2, false);
        let keep = Tensor::from_slice(&n_real).unsqueeze(-1).gt_tensor(&probe.positions);
        let kind = kind([4, 1, 3, 2], &probe);
        let z = kind.forward(&probe.input(&Mask::with_keep(false, &keep)));
        for (row, n) in (0..).zip(n_real) {
            let alone = kind.forward(&probe.narrowed(row, n).input(&Mask::new(false)));
            let real = z.narrow(0, row, 1).narrow(2, 0, n);
            assert_close(&format!("{n} of 80 tokens"), &real, &alone, 1e-12);
        }
    }

    #[test]
    fn gradients_are_those_of_the_definition() {
        for causal in [false, true] {
            let probe = Probe::new(86, [1, 40, 40], 4, 2, causal);
            let (kind, mask) = (kind([4, 1, 3, 2], &probe), Mask::new(causal));
            let pull = randn(87, &probe.q.size());
            let gradients = |to: Kind, by_weights: bool| {
                let probe = probe.to(to, Device::Cpu);
                let [q, k, v] =
                    [&probe.q, &probe.k, &probe.v].map(|x| x.detach().set_requires_grad(true));
                let input = AttnInput { q: &q, k: &k, v: &v, ..probe.input(&mask) };
                let z = if by_weights {
                    let rows: Vec<i64> = (0..40).collect();
                    kind.weights(&input, &rows).matmul(&kind.dims.expand_kv(&v))
                } else {
                    kind.forward(&input)
                };
                (z * pull.to_kind(to)).sum(to).backward();
                [q.grad(), k.grad(), v.grad()]
            };
            let expected = gradients(Kind::Double, true);
            for (to, tolerance) in [(Kind::Double, 1e-12), (Kind::Float, 1e-5)] {
                for (found, expected) in gradients(to, false).iter().zip(&expected) {
                    assert_close(&format!("{to:?}, causal {causal}"), found, expected, tolerance);
                }
            }
        }
    }

    #[test]
    fn settings_that_do_not_fit_are_refused() {
        let probe = Probe::new(88, [1, 4, 4], 4, 2, false);
        let dims = Dims { max_len: Some(512), ..probe.dims };
        let even = Config { n_window: NonZeroU32::new(2).unwrap(), ..Config::default() };
        let error = even.check(&dims).unwrap_err().to_string();
        assert!(error.contains("`n_window` = 2: expected an odd number"), "{error}");
        Config::default().check(&dims).unwrap(); // 8 blocks
        let many = Config { n_random: 4, ..Config::default() };
        let error = many.check(&dims).unwrap_err().to_string();
        assert!(error.contains("`n_random` = 4: expected at most 3"), "{error}");
        let causal = Dims { causal: true, ..dims };
        many.check(&causal).unwrap(); // The window has one side.
    }
}
