//! Which updates are out of all proportion to those before them.

use std::collections::VecDeque;

/// Updates that the median is of.
pub const NORMS_KEPT: usize = 101;

/// With fewer updates than this there is no saying what is usual.
pub const NORMS_NEEDED: usize = 20;

/// Refuses updates whose norm is more than so many times the median of the recent ones.
///
/// A median is moved by many updates only, so a worker that sends large ones does not make room for larger ones.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct NormGuard {
    /// 0 refuses nothing.
    limit: f64,
    recent: VecDeque<f64>,
}

impl NormGuard {
    /// A guard with this limit; 0 refuses nothing.
    ///
    /// # Panics
    /// If the limit is negative or not a number.
    pub fn new(limit: f64) -> Self {
        assert!(limit >= 0.0, "a limit of {limit} on norms");
        Self { limit, recent: VecDeque::with_capacity(NORMS_KEPT) }
    }

    /// Whether an update of this Euclidean norm may be applied.
    pub fn admits(&self, norm: f64) -> bool {
        if self.limit == 0.0 || self.recent.len() < NORMS_NEEDED {
            return true;
        }
        let mut recent: Vec<f64> = self.recent.iter().copied().collect();
        let middle = recent.len() / 2;
        let (_, median, _) = recent.select_nth_unstable_by(middle, f64::total_cmp);
        // Where nothing has moved yet, anything is more than before.
        *median == 0.0 || norm <= self.limit * *median
    }

    /// Notes that an update of this norm was applied.
    pub fn note(&mut self, norm: f64) {
        if self.recent.len() == NORMS_KEPT {
            self.recent.pop_front();
        }
        self.recent.push_back(norm);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_usual_follows_many_updates_and_not_one() {
        let mut guard = NormGuard::new(10.0);
        assert!(guard.admits(1e9), "nothing is known yet");
        (0..NORMS_NEEDED).for_each(|_| guard.note(1.0));
        assert!(guard.admits(10.0) && !guard.admits(10.1));
        (0..30).for_each(|_| guard.note(9.0));
        assert!(guard.admits(90.0), "most of them are larger now");
        (0..NORMS_KEPT).for_each(|_| guard.note(0.1));
        assert!(guard.admits(1.0) && !guard.admits(1.1));
        (0..NORMS_KEPT).for_each(|_| guard.note(0.0));
        assert!(guard.admits(5.0));
        let mut open = NormGuard::new(0.0);
        (0..NORMS_KEPT).for_each(|_| open.note(1.0));
        assert!(open.admits(1e30));
    }
}
