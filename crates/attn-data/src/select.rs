//! Which examples are used: a few per class, or all but a part that is held out.

use std::collections::BTreeMap;

use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};

use crate::{
    batch::stream,
    error::{Error, Result},
};

/// Chooses `k` examples of each class.
///
/// The choice for a smaller `k` is a prefix of the choice for a larger one with the same seed, so that curves over `k`
/// differ by what was added and not by luck. Classes alternate in the result. Negative labels mean "no label" and are
/// never chosen.
///
/// # Errors
///
/// [`Error::TooFewExamples`] where a class has fewer than `k`, [`Error::NoLabels`] where no example has a label,
/// [`Error::Setting`] for `k = 0`.
pub fn few_shot(labels: &[i64], k: usize, seed: u64) -> Result<Vec<usize>> {
    if k == 0 {
        return Err(Error::Setting { name: "few_shot", value: "0".into(), expected: "at least 1" });
    }
    let mut classes = by_class(labels);
    classes.retain(|&class, _| class >= 0);
    if classes.is_empty() {
        return Err(Error::NoLabels { n_examples: labels.len() });
    }
    if let Some((&class, rows)) = classes.iter().find(|(_, rows)| rows.len() < k) {
        return Err(Error::TooFewExamples { class, found: rows.len(), asked: k });
    }
    for (&class, rows) in &mut classes {
        rows.shuffle(&mut stream(seed, class as u64));
    }
    Ok((0..k).flat_map(|rank| classes.values().map(move |rows| rows[rank])).collect())
}

/// How much [`hold_out`] sets aside.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Part {
    /// This many examples.
    Count(usize),
    /// This share of the examples, between 0 and 1, rounded to the nearest number.
    Fraction(f64),
}

/// Sets a part of the examples aside: `(rest, held)`, both in ascending order.
///
/// Stratified: each class gives its share, rounded so that the total is exact (largest remainders first, the smaller
/// class on a tie). Unlabelled examples count as a class of their own.
///
/// # Errors
///
/// [`Error::HoldOut`] where nothing would be held out, or nothing left.
pub fn hold_out(labels: &[i64], part: Part, seed: u64) -> Result<(Vec<usize>, Vec<usize>)> {
    let n_examples = labels.len();
    let (n_held, asked) = match part {
        Part::Count(n) => (n, n.to_string()),
        Part::Fraction(share) if (0. ..=1.).contains(&share) => {
            ((share * n_examples as f64).round() as usize, format!("{share} (a share)"))
        }
        Part::Fraction(share) => {
            let reason = "expected a share between 0 and 1";
            return Err(Error::HoldOut { asked: share.to_string(), n_examples, reason });
        }
    };
    let refuse = |reason| Err(Error::HoldOut { asked: asked.clone(), n_examples, reason });
    if n_held == 0 {
        return refuse("that is none of them");
    }
    if n_held >= n_examples {
        return refuse("nothing would be left to train on");
    }

    let mut classes = by_class(labels);
    let share = |rows: &Vec<usize>| rows.len() as u128 * n_held as u128;
    let mut quotas: BTreeMap<i64, usize> = classes
        .iter()
        .map(|(&class, rows)| (class, (share(rows) / n_examples as u128) as usize))
        .collect();
    let mut by_remainder: Vec<i64> = classes.keys().copied().collect();
    by_remainder
        .sort_by_key(|class| std::cmp::Reverse(share(&classes[class]) % n_examples as u128));
    let n_short = n_held - quotas.values().sum::<usize>();
    for class in by_remainder.into_iter().take(n_short) {
        *quotas.entry(class).or_default() += 1;
    }

    let (mut rest, mut held) = (Vec::new(), Vec::new());
    for (class, rows) in &mut classes {
        rows.shuffle(&mut stream(seed ^ 0x686f_6c64, *class as u64));
        let (front, back) = rows.split_at(quotas[class]);
        held.extend_from_slice(front);
        rest.extend_from_slice(back);
    }
    rest.sort_unstable();
    held.sort_unstable();
    Ok((rest, held))
}

fn by_class(labels: &[i64]) -> BTreeMap<i64, Vec<usize>> {
    let mut classes: BTreeMap<i64, Vec<usize>> = BTreeMap::new();
    for (row, &label) in labels.iter().enumerate() {
        classes.entry(label).or_default().push(row);
    }
    classes
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn labels() -> Vec<i64> {
        (0..1000).map(|i| if i % 10 == 0 { -1 } else { i64::from(i % 3 == 0) }).collect()
    }

    fn count(labels: &[i64], rows: &[usize], class: i64) -> usize {
        rows.iter().filter(|&&row| labels[row] == class).count()
    }

    #[test]
    fn each_class_gives_k_and_no_row_comes_twice() {
        let labels = labels();

        let chosen = few_shot(&labels, 8, 3).unwrap();

        assert_eq!(
            (count(&labels, &chosen, 0), count(&labels, &chosen, 1), chosen.len()),
            (8, 8, 16)
        );
        assert_eq!(chosen.iter().collect::<HashSet<_>>().len(), 16);
    }

    #[test]
    fn fewer_shots_are_a_prefix_of_more() {
        let labels = labels();
        let (few, many) = (few_shot(&labels, 8, 5).unwrap(), few_shot(&labels, 32, 5).unwrap());

        assert_eq!(few, many[..16]);
        assert_ne!(few, few_shot(&labels, 8, 6).unwrap());
    }

    #[test]
    fn too_few_examples_name_the_class() {
        let error = few_shot(&[0, 0, 0, 1], 2, 0).unwrap_err();

        assert_eq!(
            error.to_string(),
            "class 1 has 1 labelled examples, fewer than the 2 per class asked for"
        );
        assert!(matches!(few_shot(&[-1, -1], 1, 0), Err(Error::NoLabels { n_examples: 2 })));
        assert!(matches!(few_shot(&[0], 0, 0), Err(Error::Setting { .. })));
    }

    #[test]
    fn a_held_out_part_is_exact_and_stratified() {
        let labels = labels();

        let (rest, held) = hold_out(&labels, Part::Count(101), 9).unwrap();

        assert_eq!((rest.len(), held.len()), (899, 101));
        let mut all = [rest, held.clone()].concat();
        all.sort_unstable();
        assert_eq!(all, (0..1000).collect::<Vec<_>>());
        for class in [-1, 0, 1] {
            let (of_all, of_held) =
                (count(&labels, &all, class) as f64, count(&labels, &held, class) as f64);
            assert!((of_held - of_all * 0.101).abs() < 1., "class {class}: {of_held} of {of_all}");
        }
    }

    #[test]
    fn a_fraction_and_its_count_choose_the_same() {
        let labels = labels();

        assert_eq!(
            hold_out(&labels, Part::Fraction(0.05), 1).unwrap(),
            hold_out(&labels, Part::Count(50), 1).unwrap()
        );
        assert_ne!(
            hold_out(&labels, Part::Count(50), 2).unwrap(),
            hold_out(&labels, Part::Count(50), 1).unwrap()
        );
    }

    #[test]
    fn holding_out_nothing_or_everything_is_refused() {
        for part in [
            Part::Count(0),
            Part::Count(4),
            Part::Fraction(0.),
            Part::Fraction(1.),
            Part::Fraction(f64::NAN),
        ] {
            assert!(
                matches!(hold_out(&[0, 1, 0, 1], part, 0), Err(Error::HoldOut { .. })),
                "{part:?}"
            );
        }
    }

    #[test]
    fn a_part_reads_as_a_number() {
        assert_eq!(serde_json::from_str::<Part>("200").unwrap(), Part::Count(200));
        assert_eq!(serde_json::from_str::<Part>("0.1").unwrap(), Part::Fraction(0.1));
    }
}
