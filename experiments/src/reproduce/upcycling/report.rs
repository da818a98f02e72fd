//! Table, verdict and plots of the comparison.

use std::fmt::Write;

use super::arms::{ARMS, Budget};
use super::{Contestant, Experiment, RunKey, RunResult};
use crate::report::Curve;
use crate::reproduce::lab::{mean_and_spread, plot_both, show};
use crate::task::Score;

/// The text of the report; draws the plots.
pub(super) fn report(
    experiment: &Experiment,
    rows: &[(Contestant, Vec<RunKey>)],
    seconds: f64,
) -> anyhow::Result<String> {
    let settings = &experiment.settings;
    let find = |key: &RunKey| experiment.book.find(key).expect("every run was made");
    let rows: Vec<Row> = rows
        .iter()
        .map(|&(contestant, ref keys)| Row { contestant, runs: keys.iter().map(find).collect() })
        .collect();
    let trainer = settings.workers.map_or("AdamW in one process".to_owned(), |workers| {
        format!("{workers} asynchronous workers with dgs-adam (rates are η0)")
    });
    let widened = if settings.rates.len() > 1 {
        ", and of twice or half as much while the best lies at the edge"
    } else {
        ""
    };
    let mut text = format!(
        "# Upcycling against the dense model trained on\n\nBundled text, characters; dense model of {} parameters, {} \
         steps of pre-training and {} more (batch {} × {}); {} seed(s); trained on by {trainer}, fresh optimiser and rate, the \
         best of {:?} for every row by validation with the first seed{widened}. The text is small enough to overfit, so the \
         best validation loss of each run counts. Losses are nats per character, mean ± standard deviation over seeds; \
         `steps` and `TFLOP` are those of the second phase.\n\n",
        settings.dense.layout()?.len(),
        settings.pretraining_steps,
        settings.steps,
        settings.run.data.batch_size,
        settings.run.model.context,
        settings.seeds.len(),
        settings.rates,
    );
    text.push_str(
        "| model | equal | parameters | active | steps | TFLOP | rate | start | best validation | test |\n\
         | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n",
    );
    rows.iter().for_each(|row| text.push_str(&row.line()));
    text.push_str("\n## Verdict\n\n");
    for row in &rows[1..] {
        text.push_str(&row.verdict(&rows[0]));
    }
    for budget in Budget::ALL {
        let of = |row: &&Row| row.contestant.1 == budget || row.contestant.0 == ARMS[0];
        let curves: Vec<Curve> = rows
            .iter()
            .filter(of)
            .map(|row| Curve { name: row.contestant.0.name.replace('`', ""), points: row.mean_curve(budget) })
            .collect();
        let (title, x) = match budget {
            Budget::Compute => {
                ("Validation loss at equal compute", "training compute after upcycling, TFLOP")
            }
            Budget::Tokens => {
                ("Validation loss at equal tokens", "training tokens after upcycling, millions")
            }
        };
        let axes = (x, "cross-entropy, nats per character");
        let _ = write!(text, "\n{}", plot_both(&experiment.folder, budget.name(), title, axes, &curves)?);
    }
    let _ = writeln!(text, "\nMade in {seconds:.0} s, runs that were there already not counted.");
    Ok(text)
}

/// The runs of one contestant.
struct Row {
    contestant: Contestant,
    runs: Vec<RunResult>,
}

impl Row {
    fn losses(&self, loss: impl Fn(&RunResult) -> f64) -> String {
        let scores = self.runs.iter().map(|run| Score { loss: loss(run), accuracy: None });
        show(&scores.collect::<Vec<_>>())
    }

    fn line(&self) -> String {
        let (first, (arm, budget)) = (&self.runs[0], self.contestant);
        let equal = if arm == ARMS[0] { "–" } else { budget.name() };
        format!(
            "| {} | {equal} | {} | {} | {} | {:.1} | {} | {} | {} | {} |\n",
            arm.name,
            first.parameters,
            first.active_parameters,
            first.steps,
            first.flops / 1e12,
            first.key.rate,
            self.losses(|run| run.curve.first().map_or(f64::NAN, |point| point.score.loss)),
            self.losses(|run| run.best_val_loss),
            self.losses(|run| run.test.loss),
        )
    }

    /// Against the dense model, seed by seed.
    fn verdict(&self, dense: &Self) -> String {
        let pairs = self.runs.iter().zip(&dense.runs);
        let differences: Vec<f64> =
            pairs.map(|(ours, dense)| ours.best_val_loss - dense.best_val_loss).collect();
        let (mean, spread) = mean_and_spread(&differences);
        let better = differences.iter().filter(|&&difference| difference < 0.0).count();
        let says = match better {
            all if all == differences.len() => "lower than the dense model's with every seed",
            0 => "not lower than the dense model's with any seed",
            _ => "lower than the dense model's with some seeds only",
        };
        let (arm, budget) = self.contestant;
        format!(
            "* {}, equal {}: the best validation loss is {says} (difference {mean:+.4} ± {spread:.4}).\n",
            arm.name,
            budget.name()
        )
    }

    /// The mean over seeds at every evaluation, over what the budget counts.
    fn mean_curve(&self, budget: Budget) -> Vec<(f64, f64)> {
        let first = &self.runs[0];
        let per_step = match budget {
            Budget::Compute => first.flops / first.steps as f64 / 1e12,
            Budget::Tokens => first.tokens as f64 / first.steps as f64 / 1e6,
        };
        let points = first.curve.iter().enumerate();
        points
            .map(|(place, point)| {
                let losses: Vec<f64> = self.runs.iter().map(|run| run.curve[place].score.loss).collect();
                (point.steps as f64 * per_step, mean_and_spread(&losses).0)
            })
            .collect()
    }
}
