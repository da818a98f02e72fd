//! The batches a worker holds.

use std::collections::VecDeque;

use sanderling_common::ids::BatchId;
use sanderling_common::wire::BatchRange;

/// The most leases a worker holds; a server hands out the next when the last is about to run out.
pub const LEASES_MAX: usize = 1024;

/// Leased batches in the order in which they came, as ranges: their number is the server's to choose.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub(super) struct BatchQueue {
    ranges: VecDeque<BatchRange>,
}

impl BatchQueue {
    /// Whether it is one that [`add`](Self::add) can have led to.
    pub(super) fn is_sound(&self) -> bool {
        self.ranges.len() <= LEASES_MAX && self.ranges.iter().all(exists)
    }

    pub(super) fn first(&self) -> Option<BatchId> {
        self.ranges.front().map(|range| range.first)
    }

    pub(super) fn len(&self) -> u64 {
        self.ranges.iter().map(|range| u64::from(range.count)).sum()
    }

    pub(super) fn take_first(&mut self) {
        let range = self.ranges.front_mut().expect("a batch is taken only when there is one");
        if range.count == 1 {
            self.ranges.pop_front();
        } else {
            *range = BatchRange { first: BatchId(range.first.0 + 1), count: range.count - 1 };
        }
    }

    /// Gives the range back if it cannot be held.
    pub(super) fn add(&mut self, range: BatchRange) -> Result<(), BatchRange> {
        if !exists(&range) || self.ranges.len() == LEASES_MAX {
            return Err(range);
        }
        self.ranges.push_back(range);
        Ok(())
    }
}

fn exists(range: &BatchRange) -> bool {
    range.count > 0 && range.first.0.checked_add(u64::from(range.count)).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(first: u64, count: u32) -> BatchRange {
        BatchRange { first: BatchId(first), count }
    }

    #[test]
    fn batches_come_in_the_order_of_their_leases() {
        let mut queue = BatchQueue::default();
        queue.add(range(7, 2)).unwrap();
        queue.add(range(3, 1)).unwrap();
        assert_eq!(queue.len(), 3);
        let taken: Vec<_> = std::iter::from_fn(|| queue.first().inspect(|_| queue.take_first())).collect();
        assert_eq!(taken, [BatchId(7), BatchId(8), BatchId(3)]);
    }

    #[test]
    fn refuses_ranges_that_do_not_exist_and_more_than_it_can_hold() {
        let mut queue = BatchQueue::default();
        assert_eq!(queue.add(range(5, 0)), Err(range(5, 0)));
        assert_eq!(queue.add(range(u64::MAX, 2)), Err(range(u64::MAX, 2)));
        (0..LEASES_MAX as u64).for_each(|first| queue.add(range(first, u32::MAX)).unwrap());
        assert_eq!(queue.add(range(1, 1)), Err(range(1, 1)));
    }
}
