//! Heads into groups of one size, so that what is together costs least.
//!
//! A balanced minimum-cost partition, NP-hard for groups of three and more: pairs are exchanged as long as that lowers the cost, from the
//! order as it is and from drawn ones. Jin et al. 2024 anneal instead ("Align Attention Heads Before Merging Them",
//! <https://arxiv.org/abs/2412.20677>, section 3.3).

use rand::{SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;

/// Starts beside the heads' own order.
const N_STARTS: usize = 200;

/// `n_groups` groups of as many heads each, ascending and ordered by their first heads: Σ `costs[i][j]` over the pairs that are together
/// is as low as the search finds. The number of groups divides that of heads.
pub(super) fn balanced(costs: &[Vec<f64>], n_groups: usize) -> Vec<Vec<i64>> {
    let n = costs.len();
    let size = n / n_groups;
    let mut order: Vec<usize> = (0..n).collect();
    let mut best = order.clone();
    let mut least = f64::INFINITY;
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    for start in 0..=N_STARTS {
        if start > 0 {
            order.shuffle(&mut rng);
        }
        let mut found = order.clone();
        descend(&mut found, size, costs);
        let cost: f64 = found.chunks(size).map(|group| within(group, costs)).sum();
        // As good as before by rounding: the earlier one stays.
        if cost < least - 1e-12 * least.abs().min(1.0) {
            (least, best) = (cost, found);
        }
        if n_groups == 1 || size == 1 {
            break;
        }
    }
    let mut groups: Vec<Vec<i64>> = best
        .chunks(size)
        .map(|group| {
            let mut group: Vec<i64> = group.iter().map(|&head| head as i64).collect();
            group.sort_unstable();
            group
        })
        .collect();
    groups.sort_unstable();
    groups
}

/// Exchanges heads of two groups while that lowers the cost.
fn descend(order: &mut [usize], size: usize, costs: &[Vec<f64>]) {
    // What `head` costs in the group of `place`, without who stands there.
    let cost = |order: &[usize], head: usize, place: usize| -> f64 {
        let start = place / size * size;
        (start..start + size).filter(|&at| at != place).map(|at| costs[head][order[at]]).sum()
    };
    loop {
        let mut is_lower = false;
        for a in 0..order.len() {
            for b in (a / size + 1) * size..order.len() {
                let (x, y) = (order[a], order[b]);
                let before = cost(order, x, a) + cost(order, y, b);
                let after = cost(order, y, a) + cost(order, x, b);
                if after < before - 1e-12 * before.abs() {
                    order.swap(a, b);
                    is_lower = true;
                }
            }
        }
        if !is_lower {
            return;
        }
    }
}

fn within(group: &[usize], costs: &[Vec<f64>]) -> f64 {
    let pairs =
        group.iter().enumerate().flat_map(|(at, &i)| group[at + 1..].iter().map(move |&j| (i, j)));
    pairs.map(|(i, j)| costs[i][j]).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::randn;

    /// The least cost of all partitions.
    fn least(left: &[usize], size: usize, costs: &[Vec<f64>]) -> f64 {
        let Some((&first, rest)) = left.split_first() else { return 0.0 };
        let mut best = f64::INFINITY;
        // Every way to choose the companions of the first.
        for chosen in 0u32..1 << rest.len() {
            if chosen.count_ones() as usize + 1 != size {
                continue;
            }
            let is_in = |at: usize| chosen >> at & 1 == 1;
            let pick = |wanted: bool| {
                (0..rest.len()).filter(move |&at| is_in(at) == wanted).map(|at| rest[at])
            };
            let group: Vec<usize> = std::iter::once(first).chain(pick(true)).collect();
            let others: Vec<usize> = pick(false).collect();
            best = best.min(within(&group, costs) + least(&others, size, costs));
        }
        best
    }

    #[test]
    fn finds_the_least_of_all_partitions() {
        for (seed, n, n_groups) in
            [(1, 6, 3), (2, 6, 2), (3, 8, 2), (4, 9, 3), (5, 8, 4), (6, 10, 2), (7, 12, 4)]
        {
            let costs = randn(seed, &[n, n]).square();
            let costs = &costs + costs.tr();
            let costs: Vec<Vec<f64>> = Vec::try_from(costs).unwrap();
            let groups = balanced(&costs, n_groups);
            assert!(groups.iter().all(|group| group.len() * n_groups == n as usize));
            let mut all: Vec<i64> = groups.concat();
            all.sort_unstable();
            assert_eq!(all, (0..n).collect::<Vec<_>>());
            let found: f64 = groups
                .iter()
                .map(|group| {
                    within(&group.iter().map(|&head| head as usize).collect::<Vec<_>>(), &costs)
                })
                .sum();
            let all: Vec<usize> = (0..n as usize).collect();
            let expected = least(&all, n as usize / n_groups, &costs);
            assert!(
                (found - expected).abs() < 1e-12,
                "{n} into {n_groups}: {found} and {expected}"
            );
        }
    }

    #[test]
    fn equal_costs_leave_neighbours_together() {
        let costs = vec![vec![1.0; 6]; 6];
        assert_eq!(balanced(&costs, 3), [[0, 1], [2, 3], [4, 5]]);
        assert_eq!(balanced(&costs, 1), [[0, 1, 2, 3, 4, 5]]);
        assert_eq!(balanced(&costs, 6).len(), 6);
    }
}
