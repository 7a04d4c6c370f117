//! Whether the laws that training relies on hold of a model, tried on a little of the real data.

use attn_core::{Model, laws::Verdict};
use tch::Tensor;

use crate::{
    batch::Batch,
    error::{Error, Result},
    run::LawCheck,
};

/// Fewer tokens than this say little; a shorter text is repeated.
const MIN_PROBE_LEN: usize = 8;

/// Tries the laws on the two longest texts of a batch and returns the verdicts if all hold.
pub(crate) fn check_laws(laws: LawCheck, model: &Model, batch: &Batch) -> Result<Vec<Verdict>> {
    let ids = probe(batch, model.config().sizes.position_table);
    let verdicts = laws(model, &ids.to_device(model.device()))?;
    let (held, broken): (Vec<_>, Vec<_>) = verdicts.into_iter().partition(Verdict::held);
    if broken.is_empty() { Ok(held) } else { Err(Error::Laws { broken }) }
}

/// `[2, len]` real tokens, as many as the second longest text has (`[1, len]` of a batch of one).
fn probe(batch: &Batch, position_table: Option<i64>) -> Tensor {
    let rows = &batch.rows;
    let mut texts: Vec<Vec<i64>> = (0..rows.rows)
        .map(|row| {
            let cells = row * rows.cols..(row + 1) * rows.cols;
            cells.filter(|&cell| rows.mask[cell] == 1).map(|cell| rows.ids[cell]).collect()
        })
        .filter(|text: &Vec<i64>| !text.is_empty())
        .collect();
    texts.sort_by_key(|text| std::cmp::Reverse(text.len()));
    texts.truncate(2);
    if texts.is_empty() {
        texts.push(vec![0]);
    }
    let room = position_table.map_or(usize::MAX, |table| table as usize);
    let shortest = texts.last().map_or(0, Vec::len);
    let len = shortest.max(MIN_PROBE_LEN).min(room);
    let ids: Vec<i64> =
        texts.iter().flat_map(|text| text.iter().copied().cycle().take(len)).collect();
    Tensor::from_slice(&ids).view([texts.len() as i64, len as i64])
}

#[cfg(test)]
mod tests {
    use attn_data::batch::{Encoded, Side, collate};

    use super::*;

    fn ids(texts: &[&[u32]], position_table: Option<i64>) -> (Vec<i64>, Vec<i64>) {
        let rows: Vec<Encoded> = texts
            .iter()
            .map(|ids| Encoded { ids: ids.to_vec(), label: None, index: 0, second_from: None })
            .collect();
        let batch = collate(&rows.iter().collect::<Vec<_>>(), 0, Side::Left).into();
        let probe = probe(&batch, position_table);
        (probe.size(), Vec::try_from(probe.view([-1])).unwrap())
    }

    #[test]
    fn the_longest_texts_are_taken_without_padding() {
        let long: Vec<u32> = (1..=30).collect();
        let (size, values) = ids(&[&[7], &long, &long[..9]], None);
        assert_eq!(size, [2, 9]);
        assert_eq!(values[..9], [1, 2, 3, 4, 5, 6, 7, 8, 9]);
        assert_eq!(values[..9], values[9..]);
        assert_eq!(ids(&[&long, &long], None).0, [2, 30]);
        assert_eq!(ids(&[&long, &long], Some(12)).0, [2, 12]);
    }

    #[test]
    fn short_texts_are_repeated() {
        let (size, values) = ids(&[&[5, 6, 7]], None);
        assert_eq!((size, values), (vec![1, 8], vec![5, 6, 7, 5, 6, 7, 5, 6]));
        assert_eq!(ids(&[&[]], None).0, [1, 8]);
    }
}
