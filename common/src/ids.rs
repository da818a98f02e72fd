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
    /// The number of a training batch; its content is a pure function of the run's seed and this number.
    BatchId(u64),
    "batch {}"
);
