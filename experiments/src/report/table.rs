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
