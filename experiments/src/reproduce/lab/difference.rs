//! What the runs of several seeds say about a difference. Runs of one seed begin with the same parameters and see the same
//! batches, so they are compared seed by seed.

use std::fmt;

use super::text::{mean_and_spread, plus_minus};

/// By how much something is worse than another thing, seed by seed: a difference of losses, or of shares of mistakes.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::reproduce) struct Difference {
    /// Infinite where only one of the two runs diverged; 0 where both did.
    values: Vec<f64>,
    /// Those of the seeds with which neither diverged.
    both_ended: Vec<f64>,
    /// With how many seeds ours diverged, and theirs.
    diverged: [usize; 2],
    /// That it is shown with.
    decimals: usize,
}

/// Decimals of a difference of losses.
const LOSS_DECIMALS: usize = 4;

/// What all seeds agree on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::reproduce) enum Agreement {
    /// Better with every seed.
    Better,
    /// Worse with every seed.
    Worse,
    /// Neither.
    Mixed,
}

impl Difference {
    /// Of two lists of badness in the order of the same seeds; what is not finite is of a run that diverged, and worse than
    /// anything else.
    ///
    /// # Panics
    /// If they are not of the same seeds.
    pub(in crate::reproduce) fn of(ours: &[f64], theirs: &[f64]) -> Self {
        assert_eq!(ours.len(), theirs.len(), "runs of other seeds");
        let pair = |(&ours, &theirs): (&f64, &f64)| match (ours.is_finite(), theirs.is_finite()) {
            (true, true) => ours - theirs,
            (false, true) => f64::INFINITY,
            (true, false) => f64::NEG_INFINITY,
            (false, false) => 0.0,
        };
        let values: Vec<f64> = ours.iter().zip(theirs).map(pair).collect();
        let ended = ours.iter().zip(theirs).filter(|(ours, theirs)| ours.is_finite() && theirs.is_finite());
        let both_ended = ended.map(|(ours, theirs)| ours - theirs).collect();
        let diverged = [ours, theirs].map(|of| of.iter().filter(|value| !value.is_finite()).count());
        Self { values, both_ended, diverged, decimals: LOSS_DECIMALS }
    }

    /// The same, shown with so many decimals instead of those of a loss.
    pub(in crate::reproduce) fn shown_with(self, decimals: usize) -> Self {
        Self { decimals, ..self }
    }

    pub(in crate::reproduce) fn agreement(&self) -> Agreement {
        if self.values.iter().all(|&value| value < 0.0) {
            Agreement::Better
        } else if self.values.iter().all(|&value| value > 0.0) {
            Agreement::Worse
        } else {
            Agreement::Mixed
        }
    }

    fn better(&self) -> usize {
        self.values.iter().filter(|&&value| value < 0.0).count()
    }

    fn worse(&self) -> usize {
        self.values.iter().filter(|&&value| value > 0.0).count()
    }

    /// Whether a claim that this is better, or as good, held.
    pub(in crate::reproduce) fn held(&self) -> &'static str {
        match self.agreement() {
            Agreement::Better => held(true, self.values.len()),
            Agreement::Worse => held(false, self.values.len()),
            Agreement::Mixed if self.values.len() == 1 => "level with one seed, which does not tell",
            Agreement::Mixed if self.values.iter().all(|&value| value == 0.0) => "**a tie**",
            Agreement::Mixed if self.better() > 0 && self.worse() > 0 => {
                "**a tie**, better with some seeds and worse with others"
            }
            Agreement::Mixed => "**a tie**, as good with some seeds",
        }
    }
}

/// As `+0.0123 ± 0.0045 with every seed`.
impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seeds = self.values.len();
        let (mean, spread) = mean_and_spread(&self.both_ended);
        let value = format!(
            "{}{}",
            if mean < 0.0 { "−" } else { "+" },
            plus_minus(mean.abs(), spread, self.decimals)
        );
        if self.diverged != [0, 0] {
            let of = |(who, &count): (&str, &usize)| match count {
                0 => None,
                count => Some(format!("{who}{}", diverged_of(count, seeds))),
            };
            let who: Vec<String> =
                ["", "the other "].into_iter().zip(&self.diverged).filter_map(of).collect();
            f.write_str(&who.join(", "))?;
            return match self.both_ended.len() {
                0 => Ok(()),
                ended => write!(f, "; {value} with the {ended} with which neither did"),
            };
        }
        f.write_str(&value)?;
        let (better, worse) = (self.better(), self.worse());
        match (seeds, self.agreement()) {
            (1, _) => write!(f, " with the only seed"),
            (_, Agreement::Mixed) => {
                write!(f, ", lower with {better} and higher with {worse} of {seeds} seeds")
            }
            _ => write!(f, " with every seed"),
        }
    }
}

/// Whether a claim held that is either true or not.
pub(in crate::reproduce) fn held_or_not(is_so: bool) -> &'static str {
    if is_so { "**held**" } else { "**did not hold**" }
}

/// The same of so many seeds; of one there is no verdict to be had.
pub(in crate::reproduce) fn held(is_so: bool, seeds: usize) -> &'static str {
    match (is_so, seeds) {
        (true, 1) => "so with one seed, which does not tell",
        (false, 1) => "not so with one seed, which does not tell",
        _ => held_or_not(is_so),
    }
}

/// How far our losses lie above theirs by the mean, in per cent: what a goal is for.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::reproduce) enum Above {
    /// So much, seed by seed.
    By(Vec<f64>),
    /// Of ours, of so many seeds, some diverged, and none of theirs.
    Diverged(usize),
    /// Some of theirs diverged, so that there is nothing to be above.
    Nothing,
}

impl Above {
    /// Of two lists of losses in the order of the same seeds; what is not finite is of a run that diverged.
    ///
    /// # Panics
    /// If they are not of the same seeds.
    pub(in crate::reproduce) fn of(ours: &[f64], theirs: &[f64]) -> Self {
        assert_eq!(ours.len(), theirs.len(), "runs of other seeds");
        let ended = |losses: &[f64]| losses.iter().all(|loss| loss.is_finite());
        match (ended(ours), ended(theirs)) {
            (_, false) => Self::Nothing,
            (false, true) => Self::Diverged(ours.len()),
            (true, true) => {
                let above = |(ours, theirs): (&f64, &f64)| 100.0 * (ours / theirs - 1.0);
                Self::By(ours.iter().zip(theirs).map(above).collect())
            }
        }
    }

    /// Whether it is no more than so many per cent, in words; what diverged lies above everything. `None` if there is nothing to
    /// be above.
    pub(in crate::reproduce) fn is_at_most(&self, goal: f64) -> Option<&'static str> {
        match self {
            Self::By(above) => Some(held(mean_and_spread(above).0 <= goal, above.len())),
            Self::Diverged(seeds) => Some(held(false, *seeds)),
            Self::Nothing => None,
        }
    }
}

/// What a saving costs, in words.
pub(in crate::reproduce) fn cost(difference: &Difference) -> &'static str {
    match difference.agreement() {
        _ if difference.values.len() == 1 => "one seed, which does not tell",
        Agreement::Better => "it **costs nothing**, on the contrary",
        Agreement::Worse => "**it costs that**",
        Agreement::Mixed => "**nothing that these seeds agree on**",
    }
}

/// That some runs came to nothing.
pub(in crate::reproduce) fn diverged_of(diverged: usize, seeds: usize) -> String {
    match (diverged, seeds) {
        (1, 1) => "diverged".to_owned(),
        (all, seeds) if all == seeds => "diverged with every seed".to_owned(),
        (some, seeds) => format!("diverged with {some} of {seeds} seeds"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_must_agree() {
        let of = |ours: &[f64], theirs: &[f64]| Difference::of(ours, theirs);
        let better = of(&[1.0, 1.1, 1.2], &[1.5, 1.7, 1.6]);
        assert_eq!((better.agreement(), better.held()), (Agreement::Better, "**held**"));
        assert_eq!(better.to_string(), "−0.5000 ± 0.1000 with every seed");
        let worse = of(&[1.5, 1.7], &[1.0, 1.1]);
        assert_eq!((worse.agreement(), worse.held()), (Agreement::Worse, "**did not hold**"));
        let mixed = of(&[1.0, 1.2, 1.0], &[1.1, 1.1, 1.1]);
        assert_eq!(mixed.agreement(), Agreement::Mixed);
        assert!(mixed.held().starts_with("**a tie**"));
        assert_eq!(mixed.to_string(), "−0.0333 ± 0.1155, lower with 2 and higher with 1 of 3 seeds");
        assert_eq!(of(&[1.0], &[0.5]).to_string(), "+0.5000 with the only seed");
        assert_eq!(of(&[1.0], &[0.5]).shown_with(2).to_string(), "+0.50 with the only seed");
        assert_eq!(of(&[1.0], &[0.5]).held(), "not so with one seed, which does not tell");
        assert_eq!(of(&[1.0], &[1.0]).held(), "level with one seed, which does not tell");
        assert_eq!(of(&[1.0, 1.0], &[1.0, 1.0]).held(), "**a tie**");
        assert_eq!(of(&[1.0, 1.0], &[1.0, 0.5]).held(), "**a tie**, as good with some seeds");
    }

    #[test]
    fn goals_are_for_the_mean_and_missed_by_what_diverged() {
        let above = Above::of(&[1.02, 2.06], &[1.0, 2.0]);
        assert_eq!(
            [2.6, 2.4].map(|goal| above.is_at_most(goal)),
            [Some("**held**"), Some("**did not hold**")]
        );
        let Above::By(values) = above else { panic!("{above:?}") };
        assert!((values[0] - 2.0).abs() < 1e-9 && (values[1] - 3.0).abs() < 1e-9, "{values:?}");
        let diverged = Above::of(&[f64::NAN, 1.0], &[1.0, 1.0]);
        assert_eq!((&diverged, diverged.is_at_most(1e9)), (&Above::Diverged(2), Some("**did not hold**")));
        let nothing = Above::of(&[f64::NAN, 1.0], &[1.0, f64::INFINITY]);
        assert_eq!((&nothing, nothing.is_at_most(1e9)), (&Above::Nothing, None));
    }

    #[test]
    fn what_diverged_is_worse_than_what_did_not_and_ties_with_its_like() {
        let (nan, one) = (f64::NAN, f64::INFINITY);
        let against = |ours: &[f64], theirs: &[f64]| Difference::of(ours, theirs).held();
        assert_eq!(against(&[1.0, 2.0], &[nan, one]), "**held**");
        assert_eq!(against(&[nan, nan], &[1.0, 2.0]), "**did not hold**");
        assert_eq!(against(&[nan, nan], &[one, nan]), "**a tie**");
        let shown = |ours: &[f64], theirs: &[f64]| Difference::of(ours, theirs).to_string();
        assert_eq!(
            shown(&[nan, 1.0, 1.2], &[1.0; 3]),
            "diverged with 1 of 3 seeds; +0.1000 ± 0.1414 with the 2 with which neither did"
        );
        assert_eq!(shown(&[1.0, 1.0], &[nan, nan]), "the other diverged with every seed");
        assert_eq!(
            shown(&[nan, 1.0], &[nan, nan]),
            "diverged with 1 of 2 seeds, the other diverged with every seed"
        );
        assert_eq!(diverged_of(1, 1), "diverged");
        assert_eq!(diverged_of(2, 2), "diverged with every seed");
    }
}
