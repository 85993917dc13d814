//! Order and cycles of a small directed graph.

use std::collections::BTreeSet;

/// The nodes `0..count` so that every edge `(from, to)` points forward; among those that are free,
/// the lowest first.
///
/// # Errors
/// The nodes of one cycle, in the direction of its edges, the lowest first.
pub fn order(count: usize, edges: &[(usize, usize)]) -> Result<Vec<usize>, Vec<usize>> {
    let edges: BTreeSet<(usize, usize)> = edges.iter().copied().collect();
    let mut waiting: BTreeSet<usize> = (0..count).collect();
    let mut sorted = Vec::with_capacity(count);
    let waits = |waiting: &BTreeSet<usize>, node: usize| {
        edges.iter().filter(|(_, to)| *to == node).map(|(from, _)| *from).find(|from| waiting.contains(from))
    };
    while let Some(free) = waiting.iter().copied().find(|node| waits(&waiting, *node).is_none()) {
        waiting.remove(&free);
        sorted.push(free);
    }
    // Every node that is left waits for another one that is left, so walking back comes round.
    let Some(mut node) = waiting.first().copied() else { return Ok(sorted) };
    let mut walked = Vec::new();
    while !walked.contains(&node) {
        walked.push(node);
        match waits(&waiting, node) {
            Some(before) => node = before,
            None => break,
        }
    }
    let mut cycle: Vec<usize> = walked.into_iter().skip_while(|walked| *walked != node).collect();
    cycle.reverse();
    let lowest = cycle.iter().enumerate().min_by_key(|(_, node)| **node).map_or(0, |(at, _)| at);
    cycle.rotate_left(lowest);
    Err(cycle)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ties_keep_the_given_order() {
        assert_eq!(order(4, &[(3, 1)]), Ok(vec![0, 2, 3, 1]));
        assert_eq!(order(0, &[]), Ok(vec![]));
        assert_eq!(order(1, &[(0, 0)]), Err(vec![0]));
    }

    proptest! {
        #[test]
        fn sorted_or_a_true_cycle(count in 1..8usize, edges in prop::collection::vec((0..8usize, 0..8usize), 0..16)) {
            let edges: Vec<_> = edges.into_iter().map(|(a, b)| (a % count, b % count)).collect();
            match order(count, &edges) {
                Ok(sorted) => {
                    let place = |node| sorted.iter().position(|other| *other == node);
                    prop_assert_eq!(sorted.len(), count);
                    prop_assert!(edges.iter().all(|(from, to)| place(*from) < place(*to)));
                }
                Err(cycle) => {
                    let next = cycle.iter().cycle().skip(1);
                    prop_assert!(cycle.iter().zip(next).all(|(from, to)| edges.contains(&(*from, *to))));
                }
            }
        }
    }
}
