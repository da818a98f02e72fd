//! The table at the end of a run.

use sanderling_server::progress::{bytes, ratio};
use sanderling_server::results::Summary;

/// The closing table of a run, one row per line.
pub fn closing_table(summary: &Summary) -> String {
    let loss = |value: Option<f64>| value.map_or("not evaluated".to_owned(), |loss| format!("{loss:.4}"));
    let traffic = &summary.traffic;
    let mut rows = vec![
        (
            "method",
            format!("{}, {} workers, seed {}", summary.subject.method, summary.subject.workers, summary.seed),
        ),
        (
            "model",
            format!(
                "{} parameters, {} active per token",
                millions(summary.subject.parameters),
                millions(summary.subject.active_parameters)
            ),
        ),
        (
            "steps",
            format!(
                "{} updates applied, {} skipped, {} tokens",
                summary.steps,
                summary.skipped,
                millions(summary.tokens)
            ),
        ),
        ("validation loss", format!("{} at the end", loss(summary.val_loss))),
        ("best validation loss", format!("{} at step {}", loss(summary.best_val_loss), summary.best_step)),
    ];
    if summary.val_loss.is_some_and(|loss| !loss.is_finite()) {
        let best = if summary.best_val_loss.is_some() { ", after the best model" } else { "" };
        rows.push((
            "the training diverged",
            format!("the last model is of no use{best}; lower learning_rate"),
        ));
    }
    if summary.refused > 0 {
        rows.push(("refused", format!("{} updates, malformed or out of all proportion", summary.refused)));
    }
    if let Some(value) = summary.val_loss_at_1_54m {
        rows.push(("  after 1.54 M characters", format!("{value:.4}")));
    }
    rows.extend([
        ("test loss", format!("{} (the best model)", loss(summary.test_loss))),
        ("bytes up", against_dense(traffic.bytes_up, traffic.dense_bytes_up)),
        ("bytes down", against_dense(traffic.bytes_down, traffic.dense_bytes_down)),
        ("staleness", format!("mean {:.2}, largest {}", summary.staleness_mean, summary.staleness_max)),
        (
            "time",
            format!(
                "{:.1} s, {:.1} k tokens/s while training",
                summary.seconds,
                summary.tokens_per_second / 1e3
            ),
        ),
    ]);
    if summary.capacity_factor > 0.0 {
        let share = summary.dropped_share * 100.0;
        rows.push((
            "dropped",
            format!("{share:.2} % of the choices of experts, capacity factor {}", summary.capacity_factor),
        ));
    }
    if !summary.completed {
        rows.push(("stopped early", "the figures are those of the run up to here".to_owned()));
    }
    table(&rows)
}

/// Names and values, one row per line.
pub fn table(rows: &[(&str, String)]) -> String {
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    rows.iter().map(|(name, value)| format!("  {name:width$}  {value}\n")).collect()
}

fn against_dense(sent: u64, dense: u64) -> String {
    format!("{} ({} fewer than dense, {})", bytes(sent), ratio(dense, sent), bytes(dense))
}

fn millions(count: u64) -> String {
    format!("{:.2} M", count as f64 / 1e6)
}

#[cfg(test)]
mod tests {
    use sanderling_server::results::{Subject, Traffic};

    use super::*;

    fn summary(val_loss: Option<f64>) -> Summary {
        let subject = Subject { method: "dgs".to_owned(), workers: 1, parameters: 1, active_parameters: 1 };
        Summary {
            name: "run".to_owned(),
            subject,
            sessions: 1,
            seed: 1,
            completed: true,
            steps: 1,
            skipped: 0,
            refused: 0,
            tokens: 1,
            val_loss,
            best_val_loss: None,
            best_step: 1,
            test_loss: None,
            val_loss_at_1_54m: None,
            capacity_factor: 0.0,
            dropped_share: 0.0,
            traffic: Traffic::default(),
            staleness_mean: 0.0,
            staleness_max: 0,
            training_seconds: 1.0,
            seconds: 1.0,
            tokens_per_second: 1.0,
        }
    }

    #[test]
    fn a_run_that_diverged_says_so() {
        let diverged = |loss| closing_table(&summary(loss)).contains("the training diverged");
        assert!(diverged(Some(f64::NAN)) && diverged(Some(f64::INFINITY)));
        assert!(!diverged(Some(2.0)) && !diverged(None));
    }
}
