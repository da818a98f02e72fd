//! What is due when in virtual time.

use std::cmp::Ordering;

/// Something at a point in virtual time; of what is due at the same time, what was scheduled first comes first.
#[derive(Debug)]
pub(crate) struct Due<T> {
    pub(crate) time: f64,
    /// Of scheduling, so that no two are equal.
    pub(crate) order: u64,
    pub(crate) what: T,
}

impl<T> PartialEq for Due<T> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl<T> Eq for Due<T> {}

impl<T> PartialOrd for Due<T> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<T> Ord for Due<T> {
    fn cmp(&self, other: &Self) -> Ordering {
        self.time.total_cmp(&other.time).then(self.order.cmp(&other.order))
    }
}
