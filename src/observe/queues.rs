//! How full the edges of a run were, over its whole time.

use std::collections::BTreeMap;

use super::EdgeStatus;

/// Moments that are kept of an edge: when there are more, every second one goes, and from then on only every second
/// one is taken. So a run of a week takes as much room as one of ten minutes.
const MOMENTS: usize = 600;

/// Rows on one edge over time.
#[derive(Debug, Clone, PartialEq)]
pub struct Queue {
    /// `FROM->TO`.
    pub edge: String,
    /// Rows; `None` where the edge never blocks its sender.
    pub capacity: Option<u64>,
    /// Microseconds since the run began, and rows.
    pub moments: Vec<(u64, u64)>,
}

/// Takes a look at all edges every so often.
#[derive(Debug)]
pub struct QueueHistory {
    edges: BTreeMap<String, Queue>,
    /// One of so many looks is kept.
    stride: usize,
    looks: usize,
}

impl Default for QueueHistory {
    fn default() -> Self {
        Self { edges: BTreeMap::new(), stride: 1, looks: 0 }
    }
}

impl QueueHistory {
    pub fn look(&mut self, now_us: u64, edges: &[EdgeStatus]) {
        self.looks += 1;
        if !self.looks.is_multiple_of(self.stride) {
            return;
        }
        for edge in edges {
            let name = format!("{}->{}", edge.from, edge.to);
            let capacity = edge.capacity_rows;
            let fresh = || Queue { edge: name.clone(), capacity, moments: Vec::new() };
            self.edges.entry(name.clone()).or_insert_with(fresh).moments.push((now_us, edge.rows));
        }
        if self.edges.values().any(|queue| queue.moments.len() > MOMENTS) {
            self.stride *= 2;
            for queue in self.edges.values_mut() {
                let mut place = 0;
                queue.moments.retain(|_| {
                    place += 1;
                    place % 2 == 1
                });
            }
        }
    }

    pub fn queues(&self) -> Vec<Queue> {
        self.edges.values().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_run_takes_as_much_room_as_a_short_one() {
        let edge = |rows| EdgeStatus {
            from: "sample".into(),
            to: "judge".into(),
            messages: 1,
            rows,
            bytes: 8,
            spilled_bytes: 0,
            capacity_rows: Some(64),
            capacity_bytes: Some(1 << 20),
            blocked_seconds: 0.0,
            rows_total: rows,
        };
        let mut history = QueueHistory::default();
        (0..10_000).for_each(|second| history.look(second * 1_000_000, &[edge(second)]));
        let [queue] = history.queues().try_into().unwrap();
        assert_eq!((queue.edge.as_str(), queue.capacity), ("sample->judge", Some(64)));
        assert!((MOMENTS / 2..=MOMENTS).contains(&queue.moments.len()), "{}", queue.moments.len());
        assert!(queue.moments.iter().all(|(us, rows)| *us == rows * 1_000_000));
        assert!(queue.moments.last().unwrap().1 > 9_900, "the end is there too");
        let gaps: Vec<u64> = queue.moments.windows(2).map(|w| w[1].1 - w[0].1).collect();
        assert!(gaps.iter().max() <= gaps.iter().min().map(|g| g * 2).as_ref(), "{gaps:?}");
    }
}
