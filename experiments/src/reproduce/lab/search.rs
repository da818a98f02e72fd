//! The choice of a learning rate and, where a method has one, a momentum: the same search for everyone.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use crate::task::Score;

/// The most learning rates that are tried with one momentum.
const RATES_MAX: usize = 12;

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

impl Tried {
    /// For tables: the rate and, if there is one, the momentum, each marked where it is the lowest or the highest that was tried.
    pub(in crate::reproduce) fn cell(self, has_momentum: bool, [rate, momentum]: [bool; 2]) -> String {
        let edge = |is_there: bool| if is_there { " (at the edge)" } else { "" };
        match has_momentum {
            true => format!("{}{}, m {}{}", self.rate, edge(rate), self.momentum, edge(momentum)),
            false => format!("{}{}", self.rate, edge(rate)),
        }
    }
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
        self.rates.iter().flat_map(|(&momentum, rates)| with(momentum, rates)).collect()
    }

    /// Adds what lies beyond the edges at which the best is; returns whether there was any. All points were tried.
    ///
    /// # Errors
    /// If a score cannot be had.
    pub(in crate::reproduce) fn widen(
        &mut self,
        score: impl Fn(Tried) -> anyhow::Result<Score>,
    ) -> anyhow::Result<bool> {
        let mut is_widened = false;
        for (&momentum, rates) in &mut self.rates {
            if !(2..RATES_MAX).contains(&rates.len()) {
                continue;
            }
            let best = best_of(with(momentum, rates), &score)?.rate;
            if best == rates[0] {
                rates.insert(0, best / 2.0);
            } else if best == rates[rates.len() - 1] {
                rates.push(best * 2.0);
            } else {
                continue;
            }
            is_widened = true;
        }
        Ok(is_widened)
    }

    /// Whether a rate is the lowest or highest that was tried with its momentum, so that a better one may lie beyond; a single
    /// one has no others beside it to be better.
    ///
    /// # Panics
    /// If the momentum was not tried.
    pub(in crate::reproduce) fn is_at_edge(&self, tried: Tried) -> bool {
        let rates = &self.rates[&tried.momentum.to_bits()];
        rates.len() > 1 && (rates.first() == Some(&tried.rate) || rates.last() == Some(&tried.rate))
    }

    /// Whether a momentum is the lowest or highest that was tried, as [`Self::is_at_edge`] is of rates. Momenta are not added to.
    pub(in crate::reproduce) fn is_momentum_at_edge(&self, tried: Tried) -> bool {
        let momentum = tried.momentum.to_bits();
        // The bits of numbers that are not negative have their order.
        let ends = [self.rates.first_key_value(), self.rates.last_key_value()];
        self.rates.len() > 1 && ends.into_iter().flatten().any(|(&end, _)| end == momentum)
    }

    /// The best of those with one momentum.
    ///
    /// # Errors
    /// If a score cannot be had.
    ///
    /// # Panics
    /// If the momentum was not tried.
    pub(in crate::reproduce) fn best_with(
        &self,
        momentum: f32,
        score: impl Fn(Tried) -> anyhow::Result<Score>,
    ) -> anyhow::Result<Tried> {
        best_of(with(momentum.to_bits(), &self.rates[&momentum.to_bits()]), score)
    }

    /// The best of what was tried.
    ///
    /// # Errors
    /// If a score cannot be had.
    pub(in crate::reproduce) fn best(
        &self,
        score: impl Fn(Tried) -> anyhow::Result<Score>,
    ) -> anyhow::Result<Tried> {
        best_of(self.points(), score)
    }
}

fn with(momentum: u32, rates: &[f64]) -> Vec<Tried> {
    let momentum = f32::from_bits(momentum);
    rates.iter().map(|&rate| Tried { rate, momentum }).collect()
}

/// The first of the least bad ones.
fn best_of(points: Vec<Tried>, score: impl Fn(Tried) -> anyhow::Result<Score>) -> anyhow::Result<Tried> {
    let mut best = None;
    for tried in points {
        let badness = badness(score(tried)?);
        if best.is_none_or(|(_, held)| order(badness, held) == Ordering::Less) {
            best = Some((tried, badness));
        }
    }
    Ok(best.expect("a grid has a point").0)
}

fn order(a: (f64, f64), b: (f64, f64)) -> Ordering {
    a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn search(optimum: f64, rates: &[f64]) -> (f64, Vec<f64>) {
        let score = |tried: Tried| Ok(Score { loss: (tried.rate / optimum).ln().abs(), accuracy: None });
        let mut search = Search::new(&Grid { rates: rates.to_vec(), momenta: vec![0.0] });
        while search.widen(score).unwrap() {}
        (search.best(score).unwrap().rate, search.points().iter().map(|tried| tried.rate).collect())
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
    fn a_best_at_the_edge_is_known_as_such() {
        let search = Search::new(&Grid { rates: vec![1.0, 2.0, 4.0], momenta: vec![0.0, 0.5] });
        let tried = |rate, momentum| Tried { rate, momentum };
        assert!(search.is_at_edge(tried(1.0, 0.5)) && search.is_at_edge(tried(4.0, 0.0)));
        assert!(!search.is_at_edge(tried(2.0, 0.0)));
        let single = Search::new(&Grid { rates: vec![1.0], momenta: vec![0.0] });
        assert!(!single.is_at_edge(tried(1.0, 0.0)) && !single.is_momentum_at_edge(tried(1.0, 0.0)));
        let momenta = Search::new(&Grid { rates: vec![1.0], momenta: vec![0.3, 0.5, 0.9] });
        let at_edge = [0.3, 0.5, 0.9].map(|momentum| momenta.is_momentum_at_edge(tried(1.0, momentum)));
        assert_eq!(at_edge, [true, false, true]);
        assert_eq!(tried(0.1, 0.3).cell(true, [false, true]), "0.1, m 0.3 (at the edge)");
        assert_eq!(tried(0.1, 0.3).cell(false, [true, true]), "0.1 (at the edge)");
        let score = |tried: Tried| {
            let loss = (tried.rate - 2.0).abs() + f64::from(tried.momentum);
            Ok(Score { loss, accuracy: None })
        };
        assert_eq!(search.best_with(0.5, score).unwrap(), tried(2.0, 0.5));
    }

    #[test]
    fn every_momentum_has_rates_of_its_own() {
        let score = |tried: Tried| {
            let reach = tried.rate / (1.0 - f64::from(tried.momentum));
            Ok(Score { loss: reach.ln().abs() + f64::from(tried.momentum), accuracy: None })
        };
        let mut search = Search::new(&Grid { rates: vec![0.5, 1.0, 2.0], momenta: vec![0.0, 0.75] });
        while search.widen(score).unwrap() {}
        let with = |momentum: f32| search.points().iter().filter(|tried| tried.momentum == momentum).count();
        assert_eq!((with(0.0), with(0.75)), (3, 5));
        assert_eq!(search.best(score).unwrap(), Tried { rate: 1.0, momentum: 0.0 });
    }

    #[test]
    fn a_diverged_run_is_worse_than_any_other() {
        let diverged = badness(Score { loss: f64::NAN, accuracy: None });
        let bad = badness(Score { loss: 9.0, accuracy: Some(0.05) });
        assert_eq!(order(bad, diverged), Ordering::Less);
        let better = badness(Score { loss: 10.0, accuracy: Some(0.06) });
        assert_eq!(order(better, bad), Ordering::Less, "accuracy comes first");
    }
}
