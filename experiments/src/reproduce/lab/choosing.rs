//! The same choice of rate and momentum for every contestant, by runs.

use super::book::Book;
use super::jobs::{EVALUATIONS, Jobs};
use super::search::{Grid, Search, Tried};
use super::spec::{Run, Spec, make};
use crate::task::Score;

/// What chooses: contestants, each with a grid, and how a point of it becomes a run.
pub(in crate::reproduce) struct Choosing<'a, C> {
    /// For the bar.
    pub(in crate::reproduce) what: &'static str,
    pub(in crate::reproduce) book: &'a Book<Run>,
    pub(in crate::reproduce) jobs: Jobs,
    /// The run of a contestant that tries a point.
    pub(in crate::reproduce) spec: &'a dyn Fn(&C, Tried) -> anyhow::Result<Spec>,
}

/// A contestant, its search, and what came out best by validation.
pub(in crate::reproduce) struct Chosen<C> {
    pub(in crate::reproduce) contestant: C,
    pub(in crate::reproduce) search: Search,
    pub(in crate::reproduce) best: Tried,
}

impl<C> Choosing<'_, C> {
    /// The validation score of a run that was made.
    ///
    /// # Errors
    /// If the point makes no run.
    ///
    /// # Panics
    /// If the run was not made.
    pub(in crate::reproduce) fn score(&self, contestant: &C, tried: Tried) -> anyhow::Result<Score> {
        let spec = (self.spec)(contestant, tried)?;
        Ok(self.book.find(&spec).expect("the run was made").outcome.validation())
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
        loop {
            let mut wanted = Vec::new();
            for (contestant, search) in contestants.iter().zip(&searches) {
                for tried in search.points() {
                    let spec = (self.spec)(contestant, tried)?;
                    let steps = spec.training.steps;
                    wanted.push((spec, steps));
                }
            }
            self.jobs.make_missing((self.what, EVALUATIONS), self.book, &wanted, make)?;
            let mut is_widened = false;
            for (contestant, search) in contestants.iter().zip(&mut searches) {
                is_widened |= search.try_widen(|tried| self.score(contestant, tried))?;
            }
            if !is_widened {
                break;
            }
        }
        let best = |(contestant, search): (C, Search)| {
            let best = search.try_best(|tried| self.score(&contestant, tried))?;
            Ok(Chosen { contestant, search, best })
        };
        contestants.into_iter().zip(searches).map(best).collect()
    }
}
