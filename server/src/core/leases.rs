//! Which batches are done, held or free.

use std::collections::{BTreeMap, BTreeSet};

use sanderling_common::ids::{BatchId, SessionId};
use sanderling_common::wire::BatchRange;

/// Leases batches 0 to `total` − 1 to sessions, each to one at a time, until each is done once.
///
/// A batch is free (never leased, or given back), held by one session, or done; nothing else can happen to it.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct LeasePool {
    total: u64,
    lease_batches: u32,
    /// The lowest batch that was never leased.
    next: u64,
    /// Given back by sessions that ended.
    returned: BTreeSet<u64>,
    held: BTreeMap<SessionId, BTreeSet<u64>>,
    done: u64,
    closed: bool,
}

impl LeasePool {
    /// All `total` batches are free; leases have up to `lease_batches`.
    ///
    /// # Panics
    /// If either is zero.
    pub fn new(total: u64, lease_batches: u32) -> Self {
        assert!(total > 0, "a run has at least one batch");
        assert!(lease_batches > 0, "a lease has at least one batch");
        Self {
            total,
            lease_batches,
            next: 0,
            returned: BTreeSet::new(),
            held: BTreeMap::new(),
            done: 0,
            closed: false,
        }
    }

    /// Batches of the whole run.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Batches done.
    pub fn done(&self) -> u64 {
        self.done
    }

    /// Whether nothing will be leased any more: all is done, or the pool was closed.
    pub fn is_over(&self) -> bool {
        self.closed || self.done == self.total
    }

    /// Leases nothing from now on. What is held may still be handed in, and no longer counts.
    pub fn close(&mut self) {
        self.closed = true;
    }

    /// Whether the pool was closed before its time.
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// Admits a session.
    pub fn join(&mut self, session: SessionId) {
        let previous = self.held.insert(session, BTreeSet::new());
        assert!(previous.is_none(), "{session} joined the lease pool twice");
    }

    /// Takes back what a session holds.
    pub fn leave(&mut self, session: SessionId) {
        self.returned.extend(self.held.remove(&session).into_iter().flatten());
        self.check();
    }

    /// Whether the session was admitted and has not left.
    pub fn knows(&self, session: SessionId) -> bool {
        self.held.contains_key(&session)
    }

    /// Whether the session holds the batch.
    pub fn holds(&self, session: SessionId, batch: BatchId) -> bool {
        self.held.get(&session).is_some_and(|held| held.contains(&batch.0))
    }

    /// Marks a held batch as done.
    ///
    /// # Panics
    /// If the session does not hold it.
    pub fn finish(&mut self, session: SessionId, batch: BatchId) {
        let held = self.held.get_mut(&session).expect("only sessions that joined hand batches in");
        assert!(held.remove(&batch.0), "{session} handed in {batch}, which it does not hold");
        if self.closed {
            self.returned.insert(batch.0);
        } else {
            self.done += 1;
        }
        self.check();
    }

    /// The first run of batches that the session holds.
    pub fn held(&self, session: SessionId) -> Option<BatchRange> {
        let held = self.held.get(&session)?;
        let first = *held.first()?;
        Some(consecutive(first, held.iter().copied(), u32::MAX))
    }

    /// Leases the lowest free batches to a session that is about to run out; `None` if it is not, or none are free.
    ///
    /// A lease is shorter than `lease_batches` when few batches are left, so that the last ones are spread over all
    /// sessions instead of waiting for one.
    pub fn lease(&mut self, session: SessionId) -> Option<BatchRange> {
        let sessions = self.held.len() as u64;
        let free = self.total - self.next + self.returned.len() as u64;
        let held = self.held.get_mut(&session)?;
        if self.closed || held.len() as u64 > u64::from(self.lease_batches / 2) {
            return None;
        }
        let fair = u32::try_from(free.div_ceil(2 * sessions)).unwrap_or(u32::MAX);
        let count = fair.min(self.lease_batches);
        let range = if let Some(&first) = self.returned.first() {
            consecutive(first, self.returned.iter().copied(), count)
        } else {
            let range = consecutive(self.next, self.next..self.total, count);
            self.next += u64::from(range.count);
            range
        };
        let batches = range.first.0..range.first.0 + u64::from(range.count);
        for batch in batches {
            self.returned.remove(&batch);
            held.insert(batch);
        }
        self.check();
        (range.count > 0).then_some(range)
    }

    fn check(&self) {
        assert!(self.is_sound(), "a batch was lost or counted twice");
    }

    /// Whether every batch is in one place.
    pub(super) fn is_sound(&self) -> bool {
        let held: u64 = self.held.values().map(|held| held.len() as u64).sum();
        let touched =
            (self.returned.len() as u64).checked_add(held).and_then(|sum| sum.checked_add(self.done));
        touched == Some(self.next) && self.next <= self.total
    }
}

/// The run of at most `count` consecutive batches that `batches`, ascending from `first`, begins with.
fn consecutive(first: u64, batches: impl Iterator<Item = u64>, count: u32) -> BatchRange {
    let run = batches.zip(first..).take(count as usize).take_while(|(batch, expected)| batch == expected);
    BatchRange { first: BatchId(first), count: run.count() as u32 }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: SessionId = SessionId(1);
    const B: SessionId = SessionId(2);

    fn range(first: u64, count: u32) -> Option<BatchRange> {
        Some(BatchRange { first: BatchId(first), count })
    }

    #[test]
    fn returned_batches_go_first_and_in_runs() {
        let mut pool = LeasePool::new(100, 4);
        pool.join(A);
        pool.join(B);
        assert_eq!(pool.lease(A), range(0, 4));
        assert_eq!(pool.lease(B), range(4, 4));
        pool.finish(A, BatchId(1));
        pool.leave(A);
        (4..7).for_each(|batch| pool.finish(B, BatchId(batch)));
        assert_eq!(pool.lease(B), range(0, 1));
        assert_eq!(pool.lease(B), range(2, 2));
        pool.finish(B, BatchId(0));
        assert_eq!(pool.held(B), range(2, 2));
        pool.finish(B, BatchId(2));
        pool.finish(B, BatchId(3));
        assert_eq!(pool.lease(B), range(8, 4));
        assert_eq!(pool.held(B), range(7, 5));
    }

    #[test]
    fn sessions_with_enough_to_do_get_nothing_more() {
        let mut pool = LeasePool::new(100, 4);
        pool.join(A);
        assert_eq!(pool.lease(A), range(0, 4));
        assert_eq!(pool.lease(A), None);
        pool.finish(A, BatchId(0));
        assert_eq!(pool.lease(A), None);
        pool.finish(A, BatchId(1));
        assert_eq!(pool.lease(A), range(4, 4));
    }

    #[test]
    fn the_last_batches_are_spread() {
        let mut pool = LeasePool::new(6, 4);
        pool.join(A);
        pool.join(B);
        assert_eq!(pool.lease(A), range(0, 2));
        assert_eq!(pool.lease(B), range(2, 1));
        assert_eq!(pool.lease(B), range(3, 1));
    }

    #[test]
    fn a_closed_pool_leases_and_counts_nothing() {
        let mut pool = LeasePool::new(10, 2);
        pool.join(A);
        pool.lease(A);
        pool.close();
        pool.finish(A, BatchId(0));
        assert_eq!(pool.lease(A), None);
        assert_eq!((pool.done(), pool.is_over()), (0, true));
    }

    #[test]
    fn strangers_get_nothing() {
        let mut pool = LeasePool::new(10, 2);
        assert_eq!(pool.lease(A), None);
        assert_eq!(pool.held(A), None);
        assert!(!pool.holds(A, BatchId(0)));
    }
}
