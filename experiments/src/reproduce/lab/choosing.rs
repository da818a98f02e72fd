//! The same choice of rate and momentum for every contestant, by runs.

use super::book::{Book, Finished};
use super::jobs::{EVALUATIONS, Jobs, Progress, Wanted};
use super::search::{Grid, Search, Tried};
use super::spec::Run;
use crate::task::Score;

/// Makes of a contestant and a point what is to be run.
type WhatTries<'a, C, K> = dyn Fn(&C, Tried) -> anyhow::Result<Wanted<K>> + 'a;

/// What chooses: contestants, each with a grid, and how a point of it becomes a run.
pub(in crate::reproduce) struct Choosing<'a, C, R: Finished> {
    /// For the bar.
    pub(in crate::reproduce) what: &'static str,
    pub(in crate::reproduce) book: &'a Book<R>,
    pub(in crate::reproduce) jobs: Jobs,
    /// The run of a contestant that tries a point, and its gradient evaluations.
    pub(in crate::reproduce) wanted: &'a WhatTries<'a, C, R::Key>,
    pub(in crate::reproduce) make: &'a (dyn Fn(&R::Key, &Progress<'_>) -> anyhow::Result<R> + Sync),
    /// What is best of it decides.
    pub(in crate::reproduce) score: fn(&R) -> Score,
}

/// The validation score of a run.
pub(in crate::reproduce) fn validation(run: &Run) -> Score {
    run.outcome.validation()
}

/// A contestant, its search, and what came out best by validation.
pub(in crate::reproduce) struct Chosen<C> {
    pub(in crate::reproduce) contestant: C,
    pub(in crate::reproduce) search: Search,
    pub(in crate::reproduce) best: Tried,
}

impl<C, R: Finished + Sync> Choosing<'_, C, R>
where
    R::Key: Sync,
{
    /// The score of a run that was made.
    ///
    /// # Errors
    /// If the point makes no run.
    ///
    /// # Panics
    /// If the run was not made.
    pub(in crate::reproduce) fn score(&self, contestant: &C, tried: Tried) -> anyhow::Result<Score> {
        let (key, _) = (self.wanted)(contestant, tried)?;
        Ok((self.score)(&self.book.find(&key).expect("the run was made")))
    }

    /// Makes the runs of all grids, widens those whose best lies at an edge, and goes on until none does.
    ///
    /// # Errors
    /// The first failure of a run, or a sentence if the user wanted it to stop.
    pub(in crate::reproduce) fn choose(
        &self,
        contestants: Vec<C>,
        grid: impl Fn(&C) -> Grid,
    ) -> anyhow::Result<Vec<Chosen<C>>> {
        let mut searches: Vec<Search> = contestants.iter().map(|of| Search::new(&grid(of))).collect();
        // Where the best lies at an edge there is another round, which nobody knows before.
        for round in 1_u32.. {
            let mut wanted = Vec::new();
            for (contestant, search) in contestants.iter().zip(&searches) {
                for tried in search.points() {
                    wanted.push((self.wanted)(contestant, tried)?);
                }
            }
            let what = format!("{}, round {round}", self.what);
            self.jobs.make_missing((&what, EVALUATIONS), self.book, &wanted, self.make)?;
            let mut is_widened = false;
            for (contestant, search) in contestants.iter().zip(&mut searches) {
                is_widened |= search.widen(|tried| self.score(contestant, tried))?;
            }
            if !is_widened {
                break;
            }
        }
        let best = |(contestant, search): (C, Search)| {
            let best = search.best(|tried| self.score(&contestant, tried))?;
            Ok(Chosen { contestant, search, best })
        };
        contestants.into_iter().zip(searches).map(best).collect()
    }
}
