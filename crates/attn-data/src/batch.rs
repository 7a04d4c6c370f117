//! Rows of token ids: which rows share a batch, how they are padded, packed and masked.
//!
//! Everything here is a pure function of its arguments. A run that was interrupted asks for the same epoch again and
//! gets the same batches, the same masks and the same order.

use std::collections::HashSet;

use rand::{Rng, SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;

use crate::error::{Error, Result};

/// The label of a position or an example that no loss counts.
pub const IGNORED: i64 = -100;

/// One tokenized example.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// Token ids, special tokens included, no padding.
    pub ids: Vec<u32>,
    /// The class, where the example has one.
    pub label: Option<i64>,
    /// Row number in the split, from 0, so that a prediction can be traced back to its text.
    pub index: usize,
    /// The token that the second text's segment begins at, where there are two: BERT's tables tell them apart.
    pub second_from: Option<usize>,
}

/// Where padding stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Side {
    /// Before the text: what generation wants, since the last column is then the last token of every row.
    Left,
    /// After the text.
    #[default]
    Right,
}

/// Rows padded to one length, row-major: position `[row, col]` is `row * cols + col`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Token ids, `[rows, cols]`.
    pub ids: Vec<i64>,
    /// 1 for a token, 0 for padding, `[rows, cols]`.
    pub mask: Vec<i64>,
    /// The segment of each token, 0 or 1, and 0 at padding, `[rows, cols]`; absent where no row has a second text.
    pub segments: Option<Vec<i64>>,
    /// The class of each row, [`IGNORED`] where it has none, `[rows]`.
    pub labels: Vec<i64>,
    /// [`Encoded::index`] of each row, `[rows]`.
    pub indices: Vec<usize>,
    /// Number of rows.
    pub rows: usize,
    /// Length of the longest row; 1 where every row is empty, so that no tensor has an empty axis.
    pub cols: usize,
}

impl Batch {
    /// Tokens that are not padding.
    pub fn n_tokens(&self) -> usize {
        self.mask.iter().filter(|&&keep| keep == 1).count()
    }

    /// The two texts of each row as batches of their own, padded with 0 on the right: all up to the second text, and the
    /// second text behind the row's first token, which opens every text (`[CLS]`). `None` where a row has no second text.
    pub fn apart(&self) -> Option<[Self; 2]> {
        let segments = self.segments.as_ref()?;
        let mut texts = [Vec::with_capacity(self.rows), Vec::with_capacity(self.rows)];
        for row in 0..self.rows {
            let cells = row * self.cols..(row + 1) * self.cols;
            let of = |segment: i64| -> Vec<u32> {
                let cells = cells.clone().filter(|&cell| self.mask[cell] == 1);
                let cells = cells.filter(|&cell| segments[cell] == segment);
                cells.map(|cell| self.ids[cell] as u32).collect()
            };
            let (first, second) = (of(0), of(1));
            if second.is_empty() {
                return None;
            }
            let opener = first.first().copied();
            let make = |ids: Vec<u32>| Encoded {
                ids,
                label: Some(self.labels[row]),
                index: self.indices[row],
                second_from: None,
            };
            texts[1].push(make(opener.into_iter().chain(second).collect()));
            texts[0].push(make(first));
        }
        Some(texts.map(|rows| collate(&rows.iter().collect::<Vec<_>>(), 0, Side::Right)))
    }
}

/// Pads `rows` with `pad_id` on `side` to the longest of them.
pub fn collate(rows: &[&Encoded], pad_id: u32, side: Side) -> Batch {
    let cols = rows.iter().map(|row| row.ids.len()).max().unwrap_or(0).max(1);
    let mut ids = vec![i64::from(pad_id); rows.len() * cols];
    let mut mask = vec![0; rows.len() * cols];
    let has_segments = rows.iter().any(|row| row.second_from.is_some());
    let mut segments = has_segments.then(|| vec![0; rows.len() * cols]);
    for (i, row) in rows.iter().enumerate() {
        let start = i * cols + if side == Side::Left { cols - row.ids.len() } else { 0 };
        let end = start + row.ids.len();
        ids[start..end].iter_mut().zip(&row.ids).for_each(|(to, &from)| *to = from.into());
        mask[start..end].fill(1);
        if let (Some(segments), Some(second)) = (&mut segments, row.second_from) {
            segments[(start + second).min(end)..end].fill(1);
        }
    }
    let labels = rows.iter().map(|row| row.label.unwrap_or(IGNORED)).collect();
    let indices = rows.iter().map(|row| row.index).collect();
    Batch { ids, mask, segments, labels, indices, rows: rows.len(), cols }
}

/// How many rows go into a batch, and which.
///
/// The plans are lists of batches, a batch a list of positions in `lengths`; every position occurs exactly once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchPlan {
    /// Most rows in a batch, at least 1.
    pub batch_size: usize,
    /// Most positions, padding included: rows × longest row. A row longer than that stands alone.
    pub max_tokens: Option<usize>,
}

/// Batches that share one sorted stretch in [`BatchPlan::bucketed`]. Longer stretches pad less, shorter ones mix more.
const BUCKET_BATCHES: usize = 64;

impl BatchPlan {
    /// Batches of up to `batch_size` rows.
    ///
    /// # Errors
    ///
    /// [`Error::Setting`] for a batch size of 0.
    pub fn new(batch_size: usize) -> Result<Self> {
        if batch_size == 0 {
            return Err(Error::Setting {
                name: "batch_size",
                value: "0".into(),
                expected: "at least 1",
            });
        }
        Ok(Self { batch_size, max_tokens: None })
    }

    /// Also keeps rows × longest row at or below `max_tokens`.
    pub fn with_max_tokens(self, max_tokens: usize) -> Self {
        Self { max_tokens: Some(max_tokens), ..self }
    }

    /// Random batches of rows of similar length, for training.
    ///
    /// Rows are shuffled, cut into stretches of 64 batches, sorted by length within each, cut into batches, and the
    /// batches are shuffled. The order depends on `seed` and `epoch` only.
    pub fn bucketed(&self, lengths: &[usize], seed: u64, epoch: u64) -> Vec<Vec<usize>> {
        let mut rng = stream(seed, epoch);
        let mut order: Vec<usize> = (0..lengths.len()).collect();
        order.shuffle(&mut rng);
        let mut batches = Vec::new();
        for bucket in order.chunks_mut(self.batch_size.max(1).saturating_mul(BUCKET_BATCHES)) {
            bucket.sort_by_key(|&row| lengths[row]); // stable: equal lengths stay shuffled
            batches.extend(self.cut(bucket, lengths));
        }
        batches.shuffle(&mut rng);
        batches
    }

    /// Rows in the order they come in.
    pub fn in_order(&self, lengths: &[usize]) -> Vec<Vec<usize>> {
        self.cut(&(0..lengths.len()).collect::<Vec<_>>(), lengths)
    }

    /// Rows sorted by length, longest first: the least padding, and a batch too large for the memory shows at once.
    pub fn by_length(&self, lengths: &[usize]) -> Vec<Vec<usize>> {
        let mut order: Vec<usize> = (0..lengths.len()).collect();
        order.sort_by_key(|&row| std::cmp::Reverse(lengths[row]));
        self.cut(&order, lengths)
    }

    fn cut(&self, order: &[usize], lengths: &[usize]) -> Vec<Vec<usize>> {
        let mut batches: Vec<Vec<usize>> = Vec::new();
        let mut longest = 0;
        for &row in order {
            let grown = longest.max(lengths[row]);
            let fits = |batch: &Vec<usize>| {
                let rows = batch.len() + 1;
                rows <= self.batch_size
                    && self.max_tokens.is_none_or(|budget| rows * grown <= budget)
            };
            match batches.last_mut().filter(|batch| fits(batch)) {
                Some(batch) => {
                    batch.push(row);
                    longest = grown;
                }
                None => {
                    batches.push(vec![row]);
                    longest = lengths[row];
                }
            }
        }
        batches
    }
}

/// Joins texts into one stream of tokens and cuts it into blocks of exactly `block` tokens.
///
/// `eos` follows each text that has tokens. What is left at the end is dropped; [`Packed::n_dropped`] counts it. The
/// texts are drawn as blocks are asked for, so a corpus larger than memory can be packed.
///
/// # Errors
///
/// [`Error::Setting`] for a block of 0.
pub fn pack<I>(texts: I, block: usize, eos: Option<u32>) -> Result<Packed<I::IntoIter>>
where
    I: IntoIterator<Item = Vec<u32>>,
{
    if block == 0 {
        return Err(Error::Setting { name: "block", value: "0".into(), expected: "at least 1" });
    }
    Ok(Packed { texts: texts.into_iter(), block, eos, rest: Vec::new(), start: 0, n_blocks: 0 })
}

/// The blocks that [`pack`] cuts, each of the same length.
#[derive(Debug, Clone)]
pub struct Packed<I> {
    texts: I,
    block: usize,
    eos: Option<u32>,
    rest: Vec<u32>,
    start: usize,
    n_blocks: usize,
}

impl<I> Packed<I> {
    /// Tokens handed out so far.
    pub fn n_tokens(&self) -> usize {
        self.n_blocks * self.block
    }

    /// Tokens read but not handed out: once the iterator has ended, those dropped.
    pub fn n_dropped(&self) -> usize {
        self.rest.len() - self.start
    }
}

impl<I: Iterator<Item = Vec<u32>>> Iterator for Packed<I> {
    type Item = Vec<u32>;

    fn next(&mut self) -> Option<Vec<u32>> {
        while self.rest.len() - self.start < self.block {
            let text = self.texts.next()?;
            if text.is_empty() {
                continue;
            }
            // Drained once per text, not once per block: one long text would otherwise be moved block by block.
            self.rest.drain(..std::mem::take(&mut self.start));
            self.rest.extend(text);
            self.rest.extend(self.eos);
        }
        let end = self.start + self.block;
        let block = self.rest[self.start..end].to_vec();
        self.start = end;
        self.n_blocks += 1;
        Some(block)
    }
}

/// What [`mask_tokens`] hides.
#[derive(Debug, Clone, PartialEq)]
pub struct Masking {
    /// The id that stands for a hidden token.
    pub mask_id: u32,
    /// Number of ids, for the random replacements.
    pub vocab_size: usize,
    /// Ids that are never hidden and never drawn as a replacement: `[CLS]`, `[SEP]`, `[PAD]`, `[MASK]`…
    pub special: Vec<u32>,
    /// Share of the other tokens that is hidden; BERT's is 0.15.
    pub rate: f64,
}

/// Ids with some hidden, and what they were.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Masked {
    /// `[rows, cols]`, as in the batch but for the hidden positions.
    pub ids: Vec<i64>,
    /// The original id where one is to be predicted, [`IGNORED`] elsewhere, `[rows, cols]`.
    pub labels: Vec<i64>,
    /// Positions to be predicted.
    pub n_masked: usize,
}

/// Hides tokens for masked language modelling.
///
/// In each row `max(1, round(rate · n))` of the `n` tokens that are neither padding nor special are chosen; of those
/// 80 % become the mask token, 10 % a random other token, and 10 % stay. Devlin et al. 2018, "BERT", section 3.1,
/// <https://arxiv.org/abs/1810.04805>; the exact count per row, instead of a coin per token, is what the authors'
/// code does and keeps a short row from having nothing to predict.
///
/// A row's choice depends on `seed`, `epoch` and its [`Batch::indices`] entry, not on its neighbours.
///
/// # Errors
///
/// [`Error::Setting`] for a rate outside (0, 1], and for a vocabulary of special tokens alone.
pub fn mask_tokens(batch: &Batch, masking: &Masking, seed: u64, epoch: u64) -> Result<Masked> {
    let Masking { mask_id, vocab_size, special, rate } = masking;
    if !(*rate > 0. && *rate <= 1.) {
        return Err(Error::Setting {
            name: "rate",
            value: rate.to_string(),
            expected: "more than 0, at most 1",
        });
    }
    let special: HashSet<i64> = special.iter().map(|&id| id.into()).collect();
    let n_special = special.iter().filter(|&&id| (id as usize) < *vocab_size).count();
    if n_special >= *vocab_size {
        let expected = "more than the special tokens it holds";
        return Err(Error::Setting { name: "vocab_size", value: vocab_size.to_string(), expected });
    }

    let mut ids = batch.ids.clone();
    let mut labels = vec![IGNORED; ids.len()];
    let mut n_masked = 0;
    for (row, &index) in batch.indices.iter().enumerate() {
        let cells = row * batch.cols..(row + 1) * batch.cols;
        let mut open: Vec<usize> = cells
            .filter(|&cell| batch.mask[cell] == 1 && !special.contains(&batch.ids[cell]))
            .collect();
        if open.is_empty() {
            continue;
        }
        // Two words of the stream number would collide if simply added: epochs are few, rows are many.
        let mut rng = stream(seed ^ 0x6d61_736b, epoch.rotate_left(40) ^ index as u64);
        let n_chosen = ((open.len() as f64 * rate).round() as usize).max(1);
        let (chosen, _) = open.partial_shuffle(&mut rng, n_chosen);
        chosen.sort_unstable(); // the draws below then run from left to right
        n_masked += chosen.len();
        for &cell in chosen.iter() {
            labels[cell] = batch.ids[cell];
            match rng.random_range(0..10) {
                0..8 => ids[cell] = (*mask_id).into(),
                8 => {
                    ids[cell] = loop {
                        let id = rng.random_range(0..*vocab_size) as i64;
                        if !special.contains(&id) {
                            break id;
                        }
                    }
                }
                _ => {}
            }
        }
    }
    Ok(Masked { ids, labels, n_masked })
}

/// Independent generators of one seed: the stream number selects a sequence, it does not move within one.
pub(crate) fn stream(seed: u64, stream: u64) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(stream);
    rng
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded(ids: &[u32], label: Option<i64>, index: usize) -> Encoded {
        Encoded { ids: ids.to_vec(), label, index, second_from: None }
    }

    fn lengths(n: usize, seed: u64) -> Vec<usize> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        (0..n).map(|_| rng.random_range(1..64)).collect()
    }

    fn sorted(plan: &[Vec<usize>]) -> Vec<usize> {
        let mut all = plan.concat();
        all.sort_unstable();
        all
    }

    #[test]
    fn the_two_texts_of_a_row_come_apart() {
        // [CLS] = 1, [SEP] = 2.
        let pair =
            |ids: &[u32], second| Encoded { second_from: Some(second), ..encoded(ids, Some(7), 3) };
        let rows = [pair(&[1, 5, 6, 2, 8, 2], 4), pair(&[1, 5, 2, 9, 9, 9, 2], 3)];
        for side in [Side::Right, Side::Left] {
            let batch = collate(&rows.iter().collect::<Vec<_>>(), 4, side);
            let [first, second] = batch.apart().unwrap();
            assert_eq!(first.ids, [1, 5, 6, 2, 1, 5, 2, 0], "{side:?}");
            assert_eq!(first.mask, [1, 1, 1, 1, 1, 1, 1, 0]);
            assert_eq!(second.ids, [1, 8, 2, 0, 0, 1, 9, 9, 9, 2]);
            assert_eq!(second.mask, [1, 1, 1, 0, 0, 1, 1, 1, 1, 1]);
            assert_eq!((second.labels, second.segments), (vec![7, 7], None));
        }
        let single = encoded(&[1, 5, 2], None, 0);
        assert!(collate(&[&rows[0], &single], 0, Side::Right).apart().is_none());
    }

    #[test]
    fn padding_stands_on_the_side_asked_for() {
        let (a, b) = (encoded(&[5, 6, 7], Some(1), 40), encoded(&[8], None, 41));

        let right = collate(&[&a, &b], 9, Side::Right);
        let left = collate(&[&a, &b], 9, Side::Left);

        assert_eq!((right.rows, right.cols, right.n_tokens()), (2, 3, 4));
        assert_eq!(right.ids, [5, 6, 7, 8, 9, 9]);
        assert_eq!(right.mask, [1, 1, 1, 1, 0, 0]);
        assert_eq!(left.ids, [5, 6, 7, 9, 9, 8]);
        assert_eq!(left.mask, [1, 1, 1, 0, 0, 1]);
        assert_eq!(right.labels, [1, IGNORED]);
        assert_eq!(right.indices, [40, 41]);
    }

    #[test]
    fn a_pad_id_inside_the_text_stays_a_token() {
        let batch = collate(&[&encoded(&[9, 5], None, 0)], 9, Side::Right);

        assert_eq!(batch.mask, [1, 1]);
    }

    #[test]
    fn rows_without_tokens_keep_one_padded_column() {
        let batch = collate(&[&encoded(&[], Some(0), 0), &encoded(&[], Some(0), 1)], 3, Side::Left);

        assert_eq!((batch.rows, batch.cols), (2, 1));
        assert_eq!((batch.ids, batch.mask), (vec![3, 3], vec![0, 0]));
    }

    #[test]
    fn every_row_is_in_exactly_one_batch() {
        for n in [0, 1, 7, 63, 1000, 5003] {
            let lengths = lengths(n, 1);
            for plan in
                [BatchPlan::new(16).unwrap(), BatchPlan::new(16).unwrap().with_max_tokens(200)]
            {
                let all: Vec<usize> = (0..n).collect();
                assert_eq!(sorted(&plan.bucketed(&lengths, 3, 1)), all);
                assert_eq!(sorted(&plan.by_length(&lengths)), all);
                assert_eq!(plan.in_order(&lengths).concat(), all);
            }
        }
    }

    #[test]
    fn a_plan_is_repeated_by_seed_and_epoch_alone() {
        let lengths = lengths(2000, 2);
        let plan = BatchPlan::new(8).unwrap();

        assert_eq!(plan.bucketed(&lengths, 3, 1), plan.bucketed(&lengths, 3, 1));
        assert_ne!(plan.bucketed(&lengths, 3, 1), plan.bucketed(&lengths, 3, 2));
        assert_ne!(plan.bucketed(&lengths, 3, 1), plan.bucketed(&lengths, 4, 1));
    }

    /// A change of this order breaks the resuming of runs that an older version saved.
    #[test]
    fn the_order_is_the_one_older_runs_were_made_with() {
        let plan = BatchPlan::new(2).unwrap();

        assert_eq!(plan.bucketed(&[4, 1, 3, 1, 2], 0, 0), [vec![0], vec![1, 3], vec![4, 2]]);
        assert_eq!(plan.bucketed(&[4, 1, 3, 1, 2], 0, 1), [vec![3, 1], vec![4, 2], vec![0]]);
    }

    #[test]
    fn buckets_pad_far_less_than_chance() {
        let lengths = lengths(6400, 5);
        let padded = |plan: &[Vec<usize>]| -> usize {
            plan.iter()
                .map(|batch| batch.len() * batch.iter().map(|&row| lengths[row]).max().unwrap())
                .sum()
        };
        let tokens: usize = lengths.iter().sum();
        let plan = BatchPlan::new(32).unwrap();

        let bucketed = padded(&plan.bucketed(&lengths, 0, 0)) as f64 / tokens as f64;
        let in_order = padded(&plan.in_order(&lengths)) as f64 / tokens as f64;

        assert!(bucketed < 1.03, "{bucketed}");
        assert!(in_order > 1.5, "{in_order}");
    }

    #[test]
    fn batches_keep_to_the_row_and_token_limits() {
        let mut lengths = lengths(500, 6);
        lengths[17] = 900; // longer than the whole budget: stands alone
        let plan = BatchPlan::new(12).unwrap().with_max_tokens(256);

        for batch in
            [plan.bucketed(&lengths, 1, 0), plan.by_length(&lengths), plan.in_order(&lengths)]
                .concat()
        {
            let longest = batch.iter().map(|&row| lengths[row]).max().unwrap();
            assert!(batch.len() <= 12);
            assert!(batch.len() * longest <= 256 || batch == [17], "{batch:?}");
        }
    }

    #[test]
    fn the_longest_batch_comes_first_when_sorted() {
        let plan = BatchPlan::new(2).unwrap();

        assert_eq!(plan.by_length(&[1, 9, 3, 9]), [vec![1, 3], vec![2, 0]]);
    }

    #[test]
    fn a_batch_of_no_rows_is_refused() {
        assert!(matches!(BatchPlan::new(0), Err(Error::Setting { name: "batch_size", .. })));
    }

    #[test]
    fn packing_fills_blocks_and_counts_what_is_left() {
        let texts = [vec![1, 2, 3], vec![], vec![4], vec![5, 6, 7, 8]];

        let mut packed = pack(texts, 4, Some(0)).unwrap();
        let blocks: Vec<_> = packed.by_ref().collect();

        assert_eq!(blocks, [vec![1, 2, 3, 0], vec![4, 0, 5, 6]]);
        assert_eq!((packed.n_tokens(), packed.n_dropped()), (8, 3));
    }

    #[test]
    fn packing_equals_the_joined_stream() {
        let mut rng = ChaCha8Rng::seed_from_u64(4);
        let texts: Vec<Vec<u32>> =
            (0..300).map(|_| (0..rng.random_range(0..97)).collect()).collect();
        let joined: Vec<u32> = texts.concat();

        let mut packed = pack(texts, 31, None).unwrap();
        let blocks: Vec<_> = packed.by_ref().collect();

        assert_eq!(blocks.concat(), joined[..joined.len() / 31 * 31]);
        assert_eq!(packed.n_dropped(), joined.len() % 31);
    }

    #[test]
    fn packing_reads_no_further_than_it_must() {
        let mut drawn = 0;
        let texts = std::iter::from_fn(|| {
            drawn += 1;
            Some(vec![7; 10])
        });

        assert_eq!(pack(texts, 25, None).unwrap().take(2).count(), 2);
        assert_eq!(drawn, 5);
    }

    fn masking() -> Masking {
        Masking { mask_id: 4, vocab_size: 1000, special: vec![0, 1, 2, 3, 4], rate: 0.15 }
    }

    fn long_batch() -> Batch {
        let row = |index| {
            let text = (0..400).map(|i| 5 + (i * 7 + index as u32) % 990);
            encoded(&[2].into_iter().chain(text).chain([3]).collect::<Vec<_>>(), None, index)
        };
        let rows: Vec<Encoded> = (0..64).map(row).collect();
        collate(&rows.iter().collect::<Vec<_>>(), 0, Side::Right)
    }

    #[test]
    fn masking_hides_the_share_the_paper_gives() {
        let batch = long_batch();

        let masked = mask_tokens(&batch, &masking(), 7, 0).unwrap();

        let chosen: Vec<usize> =
            (0..masked.labels.len()).filter(|&cell| masked.labels[cell] != IGNORED).collect();
        assert_eq!((chosen.len(), masked.n_masked), (64 * 60, 64 * 60)); // 15 % of 400 in each row
        assert!(chosen.iter().all(|&cell| masked.labels[cell] == batch.ids[cell]));
        let share = |hit: &dyn Fn(usize) -> bool| {
            chosen.iter().filter(|&&cell| hit(cell)).count() as f64 / chosen.len() as f64
        };
        let hidden = share(&|cell| masked.ids[cell] == 4);
        let kept = share(&|cell| masked.ids[cell] == batch.ids[cell]);
        assert!((hidden - 0.8).abs() < 0.02, "{hidden}"); // 3σ of 3840 draws
        assert!((kept - 0.1).abs() < 0.015, "{kept}");
    }

    #[test]
    fn special_tokens_and_padding_are_left_alone() {
        let rows = [encoded(&[2, 50, 3], None, 0), encoded(&[2, 50, 51, 52, 53, 3], None, 1)];
        let batch = collate(&rows.iter().collect::<Vec<_>>(), 0, Side::Left);
        let masking = Masking { rate: 1., ..masking() };

        for seed in 0..50 {
            let masked = mask_tokens(&batch, &masking, seed, 0).unwrap();
            for cell in 0..batch.ids.len() {
                let special = batch.ids[cell] < 5;
                assert_eq!(masked.labels[cell] == IGNORED, special);
                assert!(!special || masked.ids[cell] == batch.ids[cell]);
                assert!(masked.ids[cell] >= 4 || special, "a special token was drawn");
            }
        }
    }

    #[test]
    fn a_short_row_still_predicts_one_token_and_an_empty_one_none() {
        let rows = [encoded(&[2, 50, 3], None, 0), encoded(&[2, 3], None, 1)];
        let batch = collate(&rows.iter().collect::<Vec<_>>(), 0, Side::Right);

        let masked = mask_tokens(&batch, &masking(), 0, 0).unwrap();

        assert_eq!(masked.labels, [IGNORED, 50, IGNORED, IGNORED, IGNORED, IGNORED]);
        assert_eq!(masked.n_masked, 1);
    }

    #[test]
    fn a_rows_mask_does_not_depend_on_its_neighbours() {
        let rows: Vec<Encoded> =
            (0..4).map(|i| encoded(&[2, 10, 11, 12, 13, 14, 15, 16, 3], None, i)).collect();
        let together = collate(&rows.iter().collect::<Vec<_>>(), 0, Side::Right);
        let alone = collate(&[&rows[2]], 0, Side::Right);

        let all = mask_tokens(&together, &masking(), 5, 3).unwrap();
        let one = mask_tokens(&alone, &masking(), 5, 3).unwrap();
        let next_epoch = mask_tokens(&long_batch(), &masking(), 5, 4).unwrap();

        assert_eq!(all.ids[18..27], one.ids);
        assert_eq!(all.labels[18..27], one.labels);
        assert_ne!(next_epoch, mask_tokens(&long_batch(), &masking(), 5, 3).unwrap());
    }

    #[test]
    fn settings_that_cannot_be_met_are_refused() {
        let batch = long_batch();
        for rate in [0., -0.1, 1.5, f64::NAN] {
            let masking = Masking { rate, ..masking() };
            assert!(matches!(
                mask_tokens(&batch, &masking, 0, 0),
                Err(Error::Setting { name: "rate", .. })
            ));
        }
        let masking = Masking { vocab_size: 5, ..masking() };
        assert!(matches!(
            mask_tokens(&batch, &masking, 0, 0),
            Err(Error::Setting { name: "vocab_size", .. })
        ));
        assert!(matches!(pack([vec![1]], 0, None), Err(Error::Setting { name: "block", .. })));
    }
}
