//! Showing people how a run goes: a bar on a terminal, a line now and then elsewhere.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::results::{Evaluation, Traffic};

/// Without a terminal, a line is written this often.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Where a run stands.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Progress {
    /// Updates applied and batches skipped.
    pub done: u64,
    /// Batches of the whole run.
    pub total: u64,
    /// Workers connected.
    pub workers: u32,
    /// Mean training loss of the last pushes; none before the first.
    pub loss: Option<f64>,
    /// Training tokens per second, recently.
    pub tokens_per_second: f64,
    /// Mean staleness of the last pushes.
    pub staleness: f64,
    /// Bytes so far.
    pub traffic: Traffic,
    /// The newest evaluation.
    pub evaluation: Option<Evaluation>,
}

/// Draws [`Progress`] on standard error.
pub struct ProgressView {
    bar: Option<ProgressBar>,
    next_line: Instant,
    evaluated: u64,
}

impl ProgressView {
    /// A view for a run of `total` batches.
    ///
    /// # Panics
    /// Never: the template is a constant.
    pub fn new(total: u64) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{bar:28.cyan} {pos}/{len} {msg} {eta:>4}")
                .expect("the template is well formed");
            ProgressBar::new(total).with_style(style.progress_chars("━╸─"))
        });
        Self { bar, next_line: Instant::now(), evaluated: 0 }
    }

    /// Shows where the run stands now.
    pub fn update(&mut self, progress: &Progress) {
        if let Some(evaluation) = &progress.evaluation
            && evaluation.steps > self.evaluated
        {
            self.evaluated = evaluation.steps;
            self.say(&describe_evaluation(evaluation));
        }
        match &self.bar {
            Some(bar) => {
                bar.set_position(progress.done);
                bar.set_message(describe(progress));
            }
            None if progress.loss.is_some() && Instant::now() >= self.next_line => {
                self.next_line = Instant::now() + LINE_EVERY;
                self.say(&format!("{}/{} {}", progress.done, progress.total, describe(progress)));
            }
            None => {}
        }
    }

    /// Writes a line above the bar.
    pub fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.println(line),
            // Nobody is left to tell when standard error is closed.
            None => drop(writeln!(std::io::stderr(), "{line}")),
        }
    }

    /// Takes the bar away.
    pub fn finish(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}

fn describe(progress: &Progress) -> String {
    let loss = progress.loss.map_or("loss –".to_owned(), |loss| format!("loss {loss:.3}"));
    // What is left then takes a while, and nothing else would move.
    let evaluating = if progress.done >= progress.total { "  evaluating" } else { "" };
    format!(
        "{loss}{evaluating}  {:.1} k tok/s  ↑ {} ({}) ↓ {} ({})  staleness {:.1}  workers {}",
        progress.tokens_per_second / 1e3,
        bytes(progress.traffic.bytes_up),
        ratio(progress.traffic.dense_bytes_up, progress.traffic.bytes_up),
        bytes(progress.traffic.bytes_down),
        ratio(progress.traffic.dense_bytes_down, progress.traffic.bytes_down),
        progress.staleness,
        progress.workers,
    )
}

fn describe_evaluation(evaluation: &Evaluation) -> String {
    let best = if evaluation.val_loss <= evaluation.best_val_loss { "  best" } else { "" };
    format!(
        "step {:>6}  {:>6.2} M tokens  {:>5.0} s  val loss {:.4}{best}",
        evaluation.steps,
        evaluation.tokens as f64 / 1e6,
        evaluation.seconds,
        evaluation.val_loss,
    )
}

/// Bytes for people, in decimal units.
pub fn bytes(count: u64) -> String {
    match count {
        0..1_000 => format!("{count} B"),
        1_000..1_000_000 => format!("{:.1} kB", count as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", count as f64 / 1e6),
        _ => format!("{:.2} GB", count as f64 / 1e9),
    }
}

/// How many times fewer bytes than dense exchange.
pub fn ratio(dense: u64, sent: u64) -> String {
    if sent == 0 { "–".to_owned() } else { format!("{:.0}×", dense as f64 / sent as f64) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_and_ratios_read_well() {
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(12_345), "12.3 kB");
        assert_eq!(bytes(5_000_000_000), "5.00 GB");
        assert_eq!(ratio(1000, 40), "25×");
        assert_eq!(ratio(1000, 0), "–");
    }
}
