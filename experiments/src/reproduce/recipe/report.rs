//! Table, verdict and plots of the recipe.

use std::fmt::Write;
use std::path::Path;

use sanderling_common::config::TrainingSettings;
use sanderling_common::sparse::ValueFormat;

use super::{Length, Line, Settings, Whose};
use crate::report::Curve;
use crate::reproduce::lab::{
    Difference, WARM_START_GOAL, Warmup, curve_of, held, mean_and_spread, per_cent_above, plot_training,
    plus_minus, seeds_text, show,
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
            100.0 * first.spec.exchange.keep,
            values(first.spec.exchange.values_up),
            100.0 * first.spec.exchange.secondary,
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
                let above = per_cent_above(&ours.lengths[length].losses(), &one.lengths[length].losses());
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

fn against_goal(above: &[f64], goal: Option<f64>) -> String {
    let (mean, spread) = mean_and_spread(above);
    if !mean.is_finite() {
        return "not to be compared with one-worker AdamW, as runs diverged".to_owned();
    }
    let amount = format!("a test loss {} % above one-worker AdamW's", plus_minus(mean, spread, 2));
    match goal {
        None => amount,
        Some(goal) => format!("{amount}, at most {goal} %: {}", held(mean <= goal, above.len())),
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
        let above = per_cent_above(&[1.02, 2.06], &[1.0, 2.0]);
        assert!((above[0] - 2.0).abs() < 1e-9 && (above[1] - 3.0).abs() < 1e-9, "{above:?}");
        let says = against_goal(&above, Some(2.6));
        assert_eq!(says, "a test loss 2.50 ± 0.71 % above one-worker AdamW's, at most 2.6 %: **held**");
        assert!(against_goal(&above, Some(2.4)).ends_with("at most 2.4 %: **did not hold**"));
        assert_eq!(against_goal(&[-1.0], None), "a test loss −1.00 % above one-worker AdamW's");
        assert!(against_goal(&[f64::NAN, 1.0], Some(2.0)).contains("diverged"));
    }
}
