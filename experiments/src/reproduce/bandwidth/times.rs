//! The time until a loss is reached.

use std::fmt;

use super::super::lab::{Difference, mean_and_spread};
use super::statistics::{Estimate, three_digits};
use crate::simulation::Point;

/// When a run reached a loss.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Time {
    /// After so many seconds.
    Reached(f64),
    /// It did not in the time it had.
    NotReached,
    /// It came to no end.
    Diverged,
}

/// The time at which a curve comes down to `target`, on the straight line between two looks at the loss, in the unit of the
/// curve. `None` if it never does.
pub(super) fn reaches(curve: &[Point], target: f64) -> Option<f64> {
    let place = curve.iter().position(|point| point.score.loss <= target)?;
    let after = curve[place];
    let Some(before) = place.checked_sub(1).map(|place| curve[place]) else { return Some(after.time) };
    // A loss that was no number, or infinite, has no line to the next one.
    let fell = before.score.loss - after.score.loss;
    let part = if fell.is_finite() { (before.score.loss - target) / fell } else { 1.0 };
    Some(before.time + part * (after.time - before.time))
}

/// The least loss of a curve that goes down at all.
pub(super) fn best(curve: &[Point]) -> Option<f64> {
    let first = curve.first()?.score.loss;
    let best = curve.iter().map(|point| point.score.loss).fold(f64::INFINITY, f64::min);
    (best < first).then_some(best)
}

/// A loss that all of these curves reach: the worst of their best, a little above it. Curves that do not go down count for
/// nothing; `None` if none does, or if a curve begins no higher than that.
pub(super) fn target<'a>(curves: impl Iterator<Item = &'a [Point]>) -> Option<f64> {
    let bests = curves.filter_map(|curve| Some((curve.first()?.score.loss, best(curve)?)));
    let (begins, worst) = bests.fold((f64::INFINITY, f64::NEG_INFINITY), |(begins, worst), (first, best)| {
        (begins.min(first), worst.max(best))
    });
    let target = (worst * 100.0).ceil() / 100.0;
    (worst.is_finite() && target < begins).then_some(target)
}

/// Times of several seeds.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Times(pub(super) Vec<Time>);

impl Times {
    fn reached(&self) -> Vec<f64> {
        let reached = |time: &Time| if let Time::Reached(time) = time { Some(*time) } else { None };
        self.0.iter().filter_map(reached).collect()
    }

    /// By seed; not a number where the loss was not reached.
    fn or_nothing(&self) -> Vec<f64> {
        let time = |time: &Time| if let Time::Reached(time) = time { *time } else { f64::NAN };
        self.0.iter().map(time).collect()
    }

    fn count(&self, of: Time) -> usize {
        self.0.iter().filter(|&&time| time == of).count()
    }

    /// Mean and standard deviation, if all seeds came there.
    pub(super) fn of_all(&self) -> Option<Estimate> {
        let reached = self.reached();
        if reached.is_empty() || reached.len() < self.0.len() {
            return None;
        }
        let (value, spread) = mean_and_spread(&reached);
        // That of one seed is not known; nobody shows it.
        Some(Estimate { value, error: spread.unwrap_or(0.0) })
    }
}

impl fmt::Display for Times {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (reached, all) = (self.reached(), self.0.len());
        let (mean, spread) = mean_and_spread(&reached);
        match (reached.len(), spread) {
            (0, _) if self.count(Time::Diverged) == all => return f.write_str("diverged"),
            (0, _) => f.write_str("not reached")?,
            (_, None) => f.write_str(&three_digits(mean))?,
            (_, Some(spread)) => write!(f, "{} ± {}", three_digits(mean), three_digits(spread))?,
        }
        for (what, of) in [("diverged", Time::Diverged), ("did not reach it", Time::NotReached)] {
            let count = self.count(of);
            if count > 0 && count < all {
                write!(f, " ({count} of {all} {what})")?;
            }
        }
        Ok(())
    }
}

/// How many times as long the one takes as the other; in the table.
pub(super) fn ratio(of: &Times, to: &Times, seeds: usize) -> String {
    match (of.of_all(), to.of_all()) {
        (Some(of), Some(to)) if seeds > 1 => of.over(to).to_string(),
        (Some(of), Some(to)) => three_digits(of.value / to.value),
        _ => "–".to_owned(),
    }
}

/// Whether DGS comes there sooner than ASGD, seed by seed, in words. Not to come there is worse than any time.
pub(super) fn sooner(link: &str, workers: u32, asgd: &Times, dgs: &Times) -> String {
    let later = Difference::of(&dgs.or_nothing(), &asgd.or_nothing());
    format!(
        "* At {link} {workers} DGS workers reach the loss sooner than as many of ASGD: {dgs} s against {asgd} s: {}.\n",
        later.held()
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::Score;

    fn curve(losses: &[f64]) -> Vec<Point> {
        let point = |(place, &loss): (usize, &f64)| Point {
            steps: 10 * place as u64,
            time: 2.0 * place as f64,
            score: Score { loss, accuracy: None },
        };
        losses.iter().enumerate().map(point).collect()
    }

    #[test]
    fn a_time_lies_between_two_looks() {
        assert_eq!(reaches(&curve(&[4.0, 3.0, 2.0]), 2.5), Some(3.0));
        assert_eq!(reaches(&curve(&[4.0, 3.0, 2.0]), 3.0), Some(2.0));
        assert_eq!(reaches(&curve(&[4.0, 3.0, 2.0]), 4.5), Some(0.0));
        assert_eq!(reaches(&curve(&[4.0, f64::NAN, 2.0]), 2.5), Some(4.0), "nothing to draw a line from");
        assert_eq!(reaches(&curve(&[4.0, 3.0]), 2.5), None);
        assert_eq!(reaches(&[], 2.5), None);
    }

    #[test]
    fn runs_that_come_to_nothing_do_not_decide_the_target() {
        let curves = [curve(&[4.0, 2.0, 2.5]), curve(&[4.0, 2.123]), curve(&[]), curve(&[4.0, 5.0, 4.2])];
        let parts = || curves.iter().map(Vec::as_slice);
        assert_eq!(target(parts()), Some(2.13));
        assert_eq!(target(parts().skip(2)), None);
        assert_eq!(target(std::iter::once(&curve(&[4.0, f64::NAN])[..])), None);
        assert_eq!(target(std::iter::once(&curve(&[4.001, 3.999])[..])), Some(4.0));
        assert_eq!(target(std::iter::once(&curve(&[3.998, 3.992])[..])), None, "it begins there");
    }

    #[test]
    fn cells_say_what_became_of_every_seed() {
        use Time::{Diverged, NotReached, Reached};
        let show = |times: &[Time]| Times(times.to_vec()).to_string();
        assert_eq!(show(&[Reached(2.345)]), "2.35");
        assert_eq!(show(&[Reached(2.0), Reached(4.0)]), "3.00 ± 1.41");
        assert_eq!(
            show(&[Reached(2.0), Diverged, NotReached]),
            "2.00 (1 of 3 diverged) (1 of 3 did not reach it)"
        );
        assert_eq!(show(&[Diverged, Diverged]), "diverged");
        assert_eq!(show(&[NotReached]), "not reached");
        assert_eq!(show(&[NotReached, Diverged]), "not reached (1 of 2 diverged) (1 of 2 did not reach it)");
    }

    #[test]
    fn verdicts_fit_the_numbers() {
        use Time::{Diverged, NotReached, Reached};
        let of = |times: &[Time]| Times(times.to_vec());
        let says = |asgd: &[Time], dgs: &[Time]| sooner("1 Gbit/s", 8, &of(asgd), &of(dgs));
        assert!(says(&[Reached(9.0)], &[Reached(3.0)]).ends_with("so with one seed, which does not tell.\n"));
        let all = says(&[Reached(9.0), Reached(8.0)], &[Reached(3.0), Reached(7.0)]);
        assert!(all.ends_with("5.00 ± 2.83 s against 8.50 ± 0.707 s: **held**.\n"), "{all}");
        let open = says(&[Reached(3.0), Reached(5.0)], &[Reached(4.0), Reached(4.0)]);
        assert!(open.contains("**a tie**"), "{open}");
        // One seed of ASGD that comes to nothing makes DGS no faster with the others.
        let slower = says(&[Reached(50.0), Diverged], &[Reached(100.0), Reached(100.0)]);
        assert!(slower.contains("**a tie**"), "{slower}");
        assert!(says(&[Diverged, NotReached], &[Reached(9.0), Reached(9.0)]).ends_with("**held**.\n"));
        assert!(says(&[Reached(9.0); 2], &[Diverged; 2]).ends_with("**did not hold**.\n"));
        assert_eq!(ratio(&of(&[Reached(9.0)]), &of(&[Reached(3.0)]), 1), "3.00");
        assert_eq!(ratio(&of(&[Diverged]), &of(&[Reached(3.0)]), 1), "–");
    }
}
