//! Defects that can be switched on, so that tests can show that they would be found. Without the feature `mutations`,
//! which only tests have, there are none and nothing of this is in the program.

/// A defect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutation {
    /// A push that comes again is taken for a new one.
    NoDeduplication,
    /// What a decision brings leaves before it is in the journal: the server's gate, and the simulator's, are open.
    AnswerBeforeJournal,
    /// What a worker is sent is not added to its replica.
    StaleReplica,
}

#[cfg(feature = "mutations")]
thread_local! {
    static CURRENT: std::cell::Cell<Option<Mutation>> = const { std::cell::Cell::new(None) };
}

/// A defect is on until this is dropped.
#[derive(Debug)]
pub struct Mutated;

impl Drop for Mutated {
    fn drop(&mut self) {
        #[cfg(feature = "mutations")]
        CURRENT.set(None);
    }
}

impl Mutation {
    /// Every defect.
    pub const ALL: [Self; 3] = [Self::NoDeduplication, Self::AnswerBeforeJournal, Self::StaleReplica];

    /// Switches the defect on, for this thread.
    ///
    /// # Panics
    /// Without the feature `mutations`.
    pub fn switch_on(self) -> Mutated {
        #[cfg(feature = "mutations")]
        CURRENT.set(Some(self));
        #[cfg(not(feature = "mutations"))]
        panic!("{self:?} needs the feature `mutations`");
        #[cfg(feature = "mutations")]
        Mutated
    }

    /// Whether the defect is on.
    pub(crate) fn is_on(self) -> bool {
        #[cfg(feature = "mutations")]
        return CURRENT.get() == Some(self);
        #[cfg(not(feature = "mutations"))]
        false
    }
}
