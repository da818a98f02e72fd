//! Table, verdict and plots of the comparison.

use std::fmt::Write;

use super::arms::{ARMS, Budget};
use super::{By, Contestant, Experiment, Row, best_validation};
use crate::report::Curve;
use crate::reproduce::lab::{
    Above, Difference, WARM_START_GOAL, Warmup, mean_and_spread, mean_curve, plot_both, plus_minus,
    seeds_text, show_loss,
};
use crate::task::Score;

/// The text of the report; draws the plots.
pub(super) fn report(experiment: &Experiment, rows: &[Row], seconds: f64) -> anyhow::Result<String> {
    let settings = &experiment.settings;
    let mut text = introduction(experiment)?;
    text.push_str(
        "| model | by | equal | parameters | active | steps | TFLOP | rate | start | best validation | test, best model | test, \
         last model |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n",
    );
    rows.iter().for_each(|row| text.push_str(&row.line()));
    rows.iter().for_each(|row| text.push_str(&row.skipped_text()));
    text.push_str("\n## Verdict\n\n");
    let ours = |row: &&Row| row.contestant.workers == settings.workers;
    for row in rows.iter().filter(ours).skip(1) {
        text.push_str(&row.against_dense(&rows[0]));
    }
    for adamw in rows.iter().filter(|row| row.contestant.workers != settings.workers) {
        let is_same = |row: &&Row| {
            row.contestant
                == Contestant { workers: settings.workers, warmup: Warmup::Short, ..adamw.contestant }
        };
        let asynchronous = rows.iter().find(is_same).expect("everybody is trained by workers, too");
        text.push_str(&asynchronous.against_adamw(adamw));
    }
    for budget in Budget::ALL {
        text.push_str(&picture(experiment, rows, budget)?);
    }
    let _ = writeln!(text, "\nMade in {seconds:.0} s, runs that were there already not counted.");
    Ok(text)
}

fn introduction(experiment: &Experiment) -> anyhow::Result<String> {
    let settings = &experiment.settings;
    let trainer = settings.workers.map_or("AdamW in one process".to_owned(), |workers| {
        format!(
            "{workers} asynchronous workers with dgs-adam (rates are η0, of {:?}) or, for comparison, AdamW in one \
             process, with the better of a warm-up of its own and a long one of as many gradients as theirs, by validation with \
             the first seed",
            settings.asynchronous_rates
        )
    });
    let widened = if settings.rates.len() > 1 {
        ", and of twice or half as much while the best lies at the edge"
    } else {
        ""
    };
    Ok(format!(
        "# Upcycling against the dense model trained on\n\nBundled text, characters; dense model of {} parameters, {} \
         steps of pre-training and {} more (batch {} × {}); {}; trained on by {trainer}, fresh optimiser and rate, the best of {:?} \
         (AdamW) for every row by validation with the first seed{widened}. Everyone's rate {}, and weight decay is {}. The text \
         is small enough to overfit, so the \
         best validation loss of each run counts. Losses are nats per character; `steps` and `TFLOP` are those of the second phase. \
         Runs of one seed share start and batches, and are compared with each other.\n\n",
        settings.dense.layout()?.len(),
        settings.pretraining_steps,
        settings.steps,
        settings.run.data.batch_size,
        settings.run.model.context,
        seeds_text(&settings.seeds),
        settings.rates,
        settings.run.training.decay.describe(settings.run.training.final_rate_fraction),
        settings.run.training.weight_decay,
    ))
}

/// Of all rows of a budget; draws it.
fn picture(experiment: &Experiment, rows: &[Row], budget: Budget) -> anyhow::Result<String> {
    let of = |row: &&Row| {
        row.contestant.workers == experiment.settings.workers
            && (row.contestant.budget == budget || row.contestant.arm == ARMS[0])
    };
    let curve = |row: &Row| Curve::of_means(row.contestant.arm.name.replace('`', ""), row.curve(budget));
    let curves: Vec<Curve> = rows.iter().filter(of).map(curve).collect();
    let (title, x) = match budget {
        Budget::Compute => ("Validation loss at equal compute", "training compute after upcycling, TFLOP"),
        Budget::Tokens => ("Validation loss at equal tokens", "training tokens after upcycling, millions"),
    };
    let axes = (x, "cross-entropy, nats per character");
    Ok(format!("\n{}", plot_both(&experiment.folder, budget.name(), title, axes, &curves)?))
}

impl Row {
    fn scores(&self, score: impl Fn(&super::RunResult) -> Score) -> Vec<Score> {
        self.runs.iter().map(score).collect()
    }

    fn best_losses(&self) -> Vec<f64> {
        self.runs.iter().map(|run| best_validation(run).loss).collect()
    }

    /// Whether any run came below where it began.
    fn has_learnt(&self) -> bool {
        self.runs.iter().any(|run| run.outcome.best_validation().steps > 0)
    }

    fn line(&self) -> String {
        let (first, Contestant { arm, budget, .. }) = (&self.runs[0], self.contestant);
        let equal = if arm == ARMS[0] { "–" } else { budget.name() };
        let edge = if self.is_at_edge { " (at the edge)" } else { "" };
        let warmup = if self.contestant.warmup == Warmup::Short { "" } else { ", long warm-up" };
        let nothing = Score { loss: f64::NAN, accuracy: None };
        let start = |run: &super::RunResult| run.outcome.curve.first().map_or(nothing, |point| point.score);
        let best: Option<Vec<Score>> = self.runs.iter().map(|run| run.best_test).collect();
        format!(
            "| {} | {} | {equal} | {} | {} | {} | {:.1} | {}{edge}{warmup} | {} | {} | {} | {} |\n",
            arm.name,
            self.contestant.by(),
            first.outcome.parameters,
            first.active_parameters,
            first.steps,
            first.flops / 1e12,
            show_rate(self.rate),
            show_loss(&self.scores(start)),
            show_loss(&self.scores(best_validation)),
            best.map_or("–".to_owned(), |best| show_loss(&best)),
            show_loss(&self.scores(|run| run.outcome.test)),
        )
    }

    /// Sentences on updates that did not change the model.
    fn skipped_text(&self) -> String {
        let Contestant { arm, budget, .. } = self.contestant;
        let name = format!("{}, equal {}, by {}", arm.name, budget.name(), self.contestant.by());
        let of = |run: &super::RunResult| {
            let updates = match &run.key.by {
                By::AdamW(stretch) => stretch.steps(),
                By::Workers { training, .. } => training.steps,
            };
            run.outcome.skipped_text(&name, run.key.pretraining.seed, updates)
        };
        self.runs.iter().map(of).collect()
    }

    /// Against the dense model, seed by seed.
    fn against_dense(&self, dense: &Self) -> String {
        let above = Difference::of(&self.best_losses(), &dense.best_losses());
        let Contestant { arm, budget, .. } = self.contestant;
        format!(
            "* {}, equal {}: a lower best validation loss than the dense model's: {} ({above}).\n",
            arm.name,
            budget.name(),
            above.held(),
        )
    }

    /// Asynchronous workers against AdamW from the same start and with as many gradient evaluations, seed by seed.
    fn against_adamw(&self, adamw: &Self) -> String {
        let above = Above::of(&self.best_losses(), &adamw.best_losses());
        let (name, by) = (self.contestant.arm.name, self.contestant.by());
        let amount = match &above {
            Above::By(values) => {
                let (mean, spread) = mean_and_spread(values);
                let mean = plus_minus(mean, spread, 2);
                format!(
                    "the best validation loss of {by} is {mean} % above AdamW's at as many gradient evaluations."
                )
            }
            Above::Diverged(_) => format!("runs of {by} diverged, and AdamW's did not."),
            Above::Nothing => "not to be compared with AdamW, whose runs diverged.".to_owned(),
        };
        let (workers, goal) = WARM_START_GOAL;
        let says = match (self.contestant, above.is_at_most(goal)) {
            (_, Some(_)) if !self.has_learnt() && !adamw.has_learnt() => {
                " Neither came below where it began: **that says nothing**.".to_owned()
            }
            (Contestant { arm, workers: Some(ours), .. }, Some(held))
                if arm != ARMS[0] && ours == workers =>
            {
                format!(" At most {goal} %: {held}.")
            }
            _ => String::new(),
        };
        format!("* {name}: {amount}{says}\n")
    }

    /// The mean over seeds at every evaluation, over what the budget counts.
    fn curve(&self, budget: Budget) -> Vec<(f64, f64, Option<f64>)> {
        let first = &self.runs[0];
        let per_step = match budget {
            Budget::Compute => first.flops / first.steps as f64 / 1e12,
            Budget::Tokens => first.tokens as f64 / first.steps as f64 / 1e6,
        };
        let outcomes = self.runs.iter().map(|run| &run.outcome);
        mean_curve(outcomes)
            .into_iter()
            .map(|(steps, loss, spread)| (steps * per_step, loss, spread))
            .collect()
    }
}

/// Halved often enough, a rate has more digits than anybody reads.
fn show_rate(rate: f64) -> String {
    if rate < 1e-4 { format!("{rate:.1e}") } else { rate.to_string() }
}
