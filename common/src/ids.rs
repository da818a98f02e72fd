//! Identifiers that must not be mixed up.

use std::fmt;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty), $format:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[derive(serde::Serialize, serde::Deserialize)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, $format, self.0)
            }
        }
    };
}

id!(
    /// The small number that names a worker to people; the server counts them up as they join.
    WorkerId(u32),
    "worker {}"
);
id!(
    /// A worker's session with the server: unguessable, and good for resuming after a lost connection.
    SessionId(u64),
    "session {:016x}"
);
id!(
    /// A worker's own count of its pushes, starting at 1; (session, seq) identifies an update for ever.
    Seq(u64),
    "push {}"
);
id!(
    /// Server steps: updates applied so far. The initial model is step 0.
    Step(u64),
    "step {}"
);
id!(
    /// The number of a training batch; its content is a pure function of the run's seed, this number and the run's local steps.
    BatchId(u64),
    "batch {}"
);

impl BatchId {
    /// The batch of a worker's step by itself, the `step`-th of `local_steps` per exchange. Where there are several, a batch that is
    /// leased and pushed stands for so many batches of sequences.
    #[must_use]
    pub fn of_local_step(self, local_steps: u32, step: u32) -> Self {
        Self(self.0.wrapping_mul(u64::from(local_steps)).wrapping_add(u64::from(step)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn local_steps_go_through_all_batches_of_sequences() {
        let of = |batch, steps: u32| (0..steps).map(move |step| BatchId(batch).of_local_step(steps, step).0);
        assert_eq!((0..3).flat_map(|batch| of(batch, 1)).collect::<Vec<_>>(), [0, 1, 2]);
        assert_eq!((0..2).flat_map(|batch| of(batch, 3)).collect::<Vec<_>>(), [0, 1, 2, 3, 4, 5]);
        // A number that no server leases is no reason to stop.
        let _ = BatchId(u64::MAX).of_local_step(u32::MAX, 7);
    }
}
