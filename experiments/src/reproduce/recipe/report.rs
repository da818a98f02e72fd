//! Table, verdict and plots of the recipe.

use std::fmt::Write;
use std::path::Path;

use sanderling_common::config::TrainingSettings;
use sanderling_common::sparse::ValueFormat;

use super::{Length, Line, Settings, Whose};
use crate::report::Curve;
use crate::reproduce::lab::{
    Above, Difference, WARM_START_GOAL, Warmup, curve_of, mean_and_spread, plot_training, plus_minus,
    seeds_text, show,
};
use crate::task::Score;

/// What is hoped for in runs of [`GOAL_STEPS`]: how far above one-worker AdamW the loss may lie, in per cent, by workers.
const GOALS: [(u32, f64); 3] = [(4, 2.0), (16, 4.0), (32, 6.0)];

/// The length that the goals are for.
const GOAL_STEPS: u64 = 16_000;

impl Line {
    /// In tables, legends and file names.
    pub(super) fn name(&self) -> String {
        match (self.is_reference, self.workers) {
            (false, workers) => format!("asynchronous, {workers}"),
            (true, 1) => "AdamW, 1".to_owned(),
            (true, workers) => format!("data-parallel AdamW, {workers}"),
        }
    }
}

impl Length {
    fn test(&self) -> Vec<Score> {
        self.runs.iter().map(|run| run.outcome.test).collect()
    }

    fn losses(&self) -> Vec<f64> {
        self.runs.iter().map(|run| run.outcome.test.loss).collect()
    }

    fn cells(&self) -> String {
        let own = || format!("η0 {}", self.runs[0].spec.training.learning_rate);
        let rate = self.tuned.map_or_else(own, |tuned| {
            let edge = if tuned.is_at_edge { " (at the edge)" } else { "" };
            let warmup = if tuned.reference.warmup == Warmup::Long { ", long warm-up" } else { "" };
            format!("{}{edge}{warmup}", tuned.rate)
        });
        let validation: Vec<Score> = self.runs.iter().map(|run| run.outcome.validation()).collect();
        format!(" {rate} | {} | {} |", show(&validation), show(&self.test()))
    }
}

pub(super) struct Report<'a> {
    pub(super) settings: &'a Settings,
    pub(super) lines: &'a [Line],
    pub(super) folder: &'a Path,
}

impl Report<'_> {
    /// All of it; draws the plots.
    pub(super) fn text(&self, seconds: f64) -> anyhow::Result<String> {
        let mut text = self.introduction();
        text.push_str(&self.table());
        for line in self.lines {
            for (length, steps) in line.lengths.iter().zip(&self.settings.lengths) {
                let name = format!("{}, {steps} evaluations", line.name());
                text.extend(length.runs.iter().map(|run| run.skipped_text(&name)));
            }
        }
        let _ = write!(text, "\n## Verdict\n\n{}", self.verdict());
        for (length, steps) in self.settings.lengths.iter().enumerate() {
            let curves: Vec<Curve> = self.lines.iter().map(|line| self.curve(line, length)).collect();
            let title = format!("AdamW and asynchronous workers, {steps} gradient evaluations");
            let picture = plot_training(self.folder, &format!("curves-{steps}"), &title, curves)?;
            let _ = write!(text, "\n{picture}");
        }
        let _ = writeln!(text, "\nMade in {seconds:.0} s, runs that were there already not counted.");
        Ok(text)
    }

    /// Of one trainer; those of as many workers have one colour, and the reference of several is dashed.
    fn curve(&self, line: &Line, length: usize) -> Curve {
        let place = self.settings.workers.iter().position(|&workers| workers == line.workers);
        Curve::of_means(line.name(), curve_of(&line.lengths[length].runs))
            .drawn_as(place.map_or(0, |place| 1 + place), line.is_reference && line.workers > 1)
    }

    fn introduction(&self) -> String {
        let settings = self.settings;
        let first = &self.lines[self.lines.len() - 1].lengths[0].runs[0];
        let around = if settings.lengths.len() > 1 {
            ", and for longer runs of half, once and twice that and on"
        } else {
            ""
        };
        let (title, whose) = match settings.whose {
            Whose::Default => ("The default recipe".to_owned(), "the default settings"),
            Whose::Small => (
                "The default recipe on a small model".to_owned(),
                "the default settings but for the rates, which suit the model,",
            ),
            Whose::File => (settings.base.name(), "the settings of the run file"),
        };
        let start = match &first.spec.upcycle.dense {
            dense if !dense.is_empty() => format!(", upcycled from {dense}"),
            _ if !first.spec.model.init.is_empty() => format!(", from {}", first.spec.model.init),
            _ => String::new(),
        };
        let values = |values: ValueFormat| format!("{values:?}").to_lowercase();
        let weight_decay = first.spec.training.weight_decay;
        format!(
            "# {title} against AdamW\n\nOf {}, {} parameters{start}; {}, loss in nats per token. \
             The same number of gradient evaluations for everyone: N workers with data-parallel AdamW make a step of N \
             batches together, with the best of the rates {:?} and on while the best lies at the edge{around}{}, by \
             validation with the first seed; asynchronous workers each go at their own pace, with {whose} for any N and length: \
             {} % kept up as {}, {} % down as {}, in virtual time. Everyone's rate {}{}, and weight decay is \
             {weight_decay}. Runs of one seed share parameters and batches, and are compared with each other.\n\n",
            first.spec.text_name(),
            first.outcome.parameters,
            seeds_text(&settings.seeds),
            settings.rates,
            warmups(&first.spec.training),
            per_cent(first.spec.exchange.keep),
            values(first.spec.exchange.values_up),
            per_cent(first.spec.exchange.secondary),
            values(first.spec.exchange.values_down),
            first.spec.training.decay.describe(first.spec.training.final_rate_fraction),
            match first.spec.too_short_for_its_warmup() {
                Some(too_short) => format!(" (that of asynchronous workers {too_short})"),
                None => String::new(),
            },
        )
    }

    fn table(&self) -> String {
        let mut text = String::from("| |");
        for steps in &self.settings.lengths {
            let _ = write!(text, " {steps}: rate | validation | test |");
        }
        text.push_str("\n| --- |");
        text.push_str(&" --- | --- | --- |".repeat(self.settings.lengths.len()));
        text.push('\n');
        for line in self.lines {
            let cells: String = line.lengths.iter().map(Length::cells).collect();
            let _ = writeln!(text, "| {} |{cells}", line.name());
        }
        text
    }

    fn find(&self, is_reference: bool, workers: u32) -> Option<&Line> {
        self.lines.iter().find(|line| line.is_reference == is_reference && line.workers == workers)
    }

    /// How far above one-worker AdamW's these workers' loss may lie, in per cent, if anything is hoped for.
    fn goal(&self, ours: &Line, steps: u64) -> Option<f64> {
        let is_upcycled = !ours.lengths[0].runs[0].spec.upcycle.dense.is_empty();
        match self.settings.whose {
            Whose::Default => goal_from_scratch(ours.workers, steps),
            Whose::File if is_upcycled && ours.workers == WARM_START_GOAL.0 => Some(WARM_START_GOAL.1),
            Whose::Small | Whose::File => None,
        }
    }

    fn verdict(&self) -> String {
        let mut text = String::new();
        for (length, steps) in self.settings.lengths.iter().enumerate() {
            for &workers in &self.settings.workers {
                let (Some(ours), Some(theirs)) = (self.find(false, workers), self.find(true, workers)) else {
                    continue;
                };
                let difference =
                    Difference::of(&ours.lengths[length].losses(), &theirs.lengths[length].losses());
                let _ = writeln!(
                    text,
                    "* {workers} workers, {steps} evaluations: no worse than data-parallel AdamW: {} (test loss {difference}).",
                    difference.held()
                );
            }
        }
        let Some(one) = self.find(true, 1) else { return text };
        for (length, &steps) in self.settings.lengths.iter().enumerate() {
            for ours in self.lines.iter().filter(|line| !line.is_reference) {
                let above = Above::of(&ours.lengths[length].losses(), &one.lengths[length].losses());
                let _ = writeln!(
                    text,
                    "* {} workers, {steps} evaluations: {}.",
                    ours.workers,
                    against_goal(&above, self.goal(ours, steps))
                );
            }
        }
        text
    }
}

/// The warm-ups that AdamW was tried with, after its rates.
fn warmups(training: &TrainingSettings) -> String {
    let local_steps = u64::from(training.local_steps);
    let short = format!("over {} evaluations (but 10 steps at least", local_steps * training.warmup_steps);
    match training.warmup_exchanges {
        0 => format!(" and with a warm-up {short}, and a quarter of the run at most)"),
        exchanges => format!(
            ", and the better of a warm-up {short}) and a long one over {} steps, either of a quarter of the run at most, as for \
             asynchronous workers",
            local_steps * exchanges
        ),
    }
}

fn goal_from_scratch(workers: u32, steps: u64) -> Option<f64> {
    let is_it = |(of, _): &&(u32, f64)| (*of, GOAL_STEPS) == (workers, steps);
    GOALS.iter().find(is_it).map(|(_, goal)| *goal)
}

/// A share in per cent, without what is left of its binary form.
fn per_cent(share: f64) -> f64 {
    (1e8 * share).round() / 1e6
}

fn against_goal(above: &Above, goal: Option<f64>) -> String {
    let amount = match above {
        Above::By(values) => {
            let (mean, spread) = mean_and_spread(values);
            format!("a test loss {} % above one-worker AdamW's", plus_minus(mean, spread, 2))
        }
        Above::Diverged(_) => "runs diverged, and one-worker AdamW's did not".to_owned(),
        Above::Nothing => "not to be compared with one-worker AdamW, whose runs diverged".to_owned(),
    };
    match goal.and_then(|goal| Some((goal, above.is_at_most(goal)?))) {
        None => amount,
        Some((goal, held)) => format!("{amount}, at most {goal} %: {held}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goals_are_for_one_length() {
        assert_eq!(
            [4, 8, 16].map(|workers| goal_from_scratch(workers, 16_000)),
            [Some(2.0), None, Some(4.0)]
        );
        assert_eq!(goal_from_scratch(4, 8_000), None);
    }

    #[test]
    fn goals_are_for_the_mean() {
        let above = Above::of(&[1.02, 2.06], &[1.0, 2.0]);
        let says = against_goal(&above, Some(2.6));
        assert_eq!(says, "a test loss 2.50 ± 0.71 % above one-worker AdamW's, at most 2.6 %: **held**");
        assert!(against_goal(&above, Some(2.4)).ends_with("at most 2.4 %: **did not hold**"));
        let below = Above::of(&[0.99], &[1.0]);
        assert_eq!(against_goal(&below, None), "a test loss −1.00 % above one-worker AdamW's");
    }

    #[test]
    fn a_goal_is_missed_by_runs_that_diverge() {
        let of = |ours: [f64; 2], theirs: [f64; 2]| against_goal(&Above::of(&ours, &theirs), Some(2.0));
        let missed = of([f64::NAN, 1.0], [1.0, 1.0]);
        assert_eq!(missed, "runs diverged, and one-worker AdamW's did not, at most 2 %: **did not hold**");
        let nothing = of([1.0, 1.0], [f64::NAN, 1.0]);
        assert_eq!(nothing, "not to be compared with one-worker AdamW, whose runs diverged");
    }

    #[test]
    fn shares_are_shown_as_they_were_stated() {
        assert_eq!([0.07, 0.01, 0.05, 1.0, 1e-6].map(per_cent), [7.0, 1.0, 5.0, 100.0, 1e-4]);
    }
}
