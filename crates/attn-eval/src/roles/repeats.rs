//! Random tokens said twice: text in which nothing but the repetition can be known.

use attn_data::batch::Encoded;
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};

use crate::stats::below;

/// Rows of `n_distinct` different tokens of `vocabulary` drawn at random, twice in the same order, behind `begins` where the
/// model's texts begin with a token: [Olsson et al. 2022](https://arxiv.org/abs/2209.11895), and TransformerLens's
/// `head_detector.py`. Within a row no token repeats but by the repetition. Equal seeds give equal rows.
///
/// # Panics
///
/// Where the vocabulary has fewer than `n_distinct` ids.
pub fn repeats(
    vocabulary: &[u32],
    begins: Option<u32>,
    n_distinct: usize,
    n_rows: usize,
    seed: u64,
) -> Vec<Encoded> {
    assert!(n_distinct <= vocabulary.len(), "{n_distinct} different of {}", vocabulary.len());
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut ids = vocabulary.to_vec();
    let row = |index| {
        for at in 0..n_distinct {
            let from = at + below(ids.len() - at, &mut rng);
            ids.swap(at, from);
        }
        let drawn = &ids[..n_distinct];
        let ids = begins.into_iter().chain(drawn.iter().chain(drawn).copied()).collect();
        Encoded { ids, label: None, index, second_from: None }
    };
    (0..n_rows).map(row).collect()
}
