//! The choice of a learning rate and, where a method has one, a momentum: the same search for everyone.

use std::collections::BTreeMap;

use crate::task::Score;

/// The most learning rates that are tried with one momentum.
const RATES_MAX: usize = 9;

/// What is tried first.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::reproduce) struct Grid {
    /// Ascending; widened by a factor of two at a time while the best lies at an edge, unless there is only one.
    pub(in crate::reproduce) rates: Vec<f64>,
    /// Each with rates of its own; a method without momentum has one, 0.
    pub(in crate::reproduce) momenta: Vec<f32>,
}

/// A point of the grid.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(in crate::reproduce) struct Tried {
    pub(in crate::reproduce) rate: f64,
    pub(in crate::reproduce) momentum: f32,
}

/// The search of one contestant.
#[derive(Clone, Debug)]
pub(in crate::reproduce) struct Search {
    rates: BTreeMap<u32, Vec<f64>>,
}

/// How bad a score is: the share of mistakes where there are classes, then the loss. One that is not a number is the worst.
pub(in crate::reproduce) fn badness(score: Score) -> (f64, f64) {
    let number = |value: f64| if value.is_finite() { value } else { f64::INFINITY };
    let loss = number(score.loss);
    // A run that diverged has no accuracy either.
    let mistakes =
        score.accuracy.map_or(if loss.is_finite() { 0.0 } else { 1.0 }, |accuracy| 1.0 - number(accuracy));
    (mistakes, loss)
}

impl Search {
    pub(in crate::reproduce) fn new(grid: &Grid) -> Self {
        Self { rates: grid.momenta.iter().map(|momentum| (momentum.to_bits(), grid.rates.clone())).collect() }
    }

    /// What is to be tried by now.
    pub(in crate::reproduce) fn points(&self) -> Vec<Tried> {
        let of = |(&momentum, rates): (&u32, &Vec<f64>)| {
            let momentum = f32::from_bits(momentum);
            rates.iter().map(move |&rate| Tried { rate, momentum }).collect::<Vec<_>>()
        };
        self.rates.iter().flat_map(of).collect()
    }

    /// Adds what lies beyond the edges at which the best is; returns whether there was any. All points were tried.
    pub(in crate::reproduce) fn widen(&mut self, score: impl Fn(Tried) -> Score) -> bool {
        let mut is_widened = false;
        for (&momentum, rates) in &mut self.rates {
            if !(2..RATES_MAX).contains(&rates.len()) {
                continue;
            }
            let momentum = f32::from_bits(momentum);
            let at = |place: usize| badness(score(Tried { rate: rates[place], momentum }));
            let best = (0..rates.len()).min_by(|&a, &b| order(at(a), at(b))).expect("there are rates");
            if best == 0 {
                rates.insert(0, rates[0] / 2.0);
            } else if best == rates.len() - 1 {
                rates.push(rates[best] * 2.0);
            } else {
                continue;
            }
            is_widened = true;
        }
        is_widened
    }

    /// As [`widen`](Self::widen), with scores that can fail.
    pub(in crate::reproduce) fn try_widen(
        &mut self,
        score: impl Fn(Tried) -> anyhow::Result<Score>,
    ) -> anyhow::Result<bool> {
        let scores = self.scores(score)?;
        Ok(self.widen(|tried| look_up(&scores, tried)))
    }

    /// As [`best`](Self::best), with scores that can fail.
    pub(in crate::reproduce) fn try_best(
        &self,
        score: impl Fn(Tried) -> anyhow::Result<Score>,
    ) -> anyhow::Result<Tried> {
        let scores = self.scores(score)?;
        Ok(self.best(|tried| look_up(&scores, tried)))
    }

    fn scores(&self, score: impl Fn(Tried) -> anyhow::Result<Score>) -> anyhow::Result<Vec<(Tried, Score)>> {
        self.points().into_iter().map(|tried| Ok((tried, score(tried)?))).collect()
    }

    /// The best of what was tried.
    pub(in crate::reproduce) fn best(&self, score: impl Fn(Tried) -> Score) -> Tried {
        let by = |a: &Tried, b: &Tried| order(badness(score(*a)), badness(score(*b)));
        self.points().into_iter().min_by(by).expect("a grid has a point")
    }
}

fn look_up(scores: &[(Tried, Score)], tried: Tried) -> Score {
    scores.iter().find(|(of, _)| *of == tried).expect("every point has a score").1
}

fn order(a: (f64, f64), b: (f64, f64)) -> std::cmp::Ordering {
    a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn search(optimum: f64, rates: &[f64]) -> (f64, Vec<f64>) {
        let score = |tried: Tried| Score { loss: (tried.rate / optimum).ln().abs(), accuracy: None };
        let mut search = Search::new(&Grid { rates: rates.to_vec(), momenta: vec![0.0] });
        while search.widen(score) {}
        (search.best(score).rate, search.points().iter().map(|tried| tried.rate).collect())
    }

    #[test]
    fn rates_are_added_while_the_best_lies_at_the_edge() {
        assert_eq!(search(2.0, &[1.0, 2.0, 4.0]), (2.0, vec![1.0, 2.0, 4.0]));
        assert_eq!(search(15.0, &[1.0, 2.0, 4.0]), (16.0, vec![1.0, 2.0, 4.0, 8.0, 16.0, 32.0]));
        assert_eq!(search(0.5, &[1.0, 2.0]), (0.5, vec![0.25, 0.5, 1.0, 2.0]));
        assert_eq!(search(1e9, &[1.0, 2.0]).1.len(), RATES_MAX);
        assert_eq!(search(1e9, &[1.0]), (1.0, vec![1.0]));
    }

    #[test]
    fn every_momentum_has_rates_of_its_own() {
        let score = |tried: Tried| {
            let reach = tried.rate / (1.0 - f64::from(tried.momentum));
            Score { loss: reach.ln().abs() + f64::from(tried.momentum), accuracy: None }
        };
        let mut search = Search::new(&Grid { rates: vec![0.5, 1.0, 2.0], momenta: vec![0.0, 0.75] });
        while search.widen(score) {}
        let with = |momentum: f32| search.points().iter().filter(|tried| tried.momentum == momentum).count();
        assert_eq!((with(0.0), with(0.75)), (3, 5));
        assert_eq!(search.best(score), Tried { rate: 1.0, momentum: 0.0 });
    }

    #[test]
    fn a_diverged_run_is_worse_than_any_other() {
        let diverged = badness(Score { loss: f64::NAN, accuracy: None });
        let bad = badness(Score { loss: 9.0, accuracy: Some(0.05) });
        assert_eq!(order(bad, diverged), std::cmp::Ordering::Less);
        let better = badness(Score { loss: 10.0, accuracy: Some(0.06) });
        assert_eq!(order(better, bad), std::cmp::Ordering::Less, "accuracy comes first");
    }
}
