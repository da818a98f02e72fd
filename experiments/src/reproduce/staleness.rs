//! How stale updates are, and what uneven and restless workers do.

use std::fmt::Write;

use super::lab::{Options, SMALL_MODEL_RATE, Sweep, Trainer, Variant, file_name, plot_both};
use crate::report::Curve;
use crate::simulation::Conditions;

/// Distributions of staleness, and what workers of uneven speed, or that come and go, do to the loss
///
/// The default method, whose rate falls with the staleness of each gradient, and the same with the rate that it has on
/// average, in virtual time: workers of about the same speed; one that is ten times slower; and every second one leaving after
/// some exchanges and coming back later as a new one.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  sanderling reproduce staleness --quick
  sanderling reproduce staleness --out DIR    # the same folder from several shells: they share the work")]
pub struct Arguments {
    /// What all reproductions take.
    #[command(flatten)]
    options: Options,
}

/// What the workers are like.
const KINDS: [&str; 3] = ["even", "one ten times slower", "half come and go"];

fn conditions(kind: &str) -> Conditions {
    let even = Conditions::default();
    match kind {
        "one ten times slower" => Conditions { slow_workers: 1, slowness: 10.0, ..even },
        "half come and go" => Conditions { stay: 40, away: 40.0, ..even },
        _ => even,
    }
}

/// Runs the command.
///
/// # Errors
/// Whatever keeps the experiment from its end, in a sentence.
pub fn staleness(arguments: &Arguments) -> anyhow::Result<()> {
    let quick = arguments.options.quick;
    let workers: &[u32] = if quick { &[8] } else { &[8, 32] };
    let mut variants = Vec::new();
    for &workers in workers {
        for kind in KINDS {
            for scaling in ["inverse-sqrt", "constant"] {
                // Of even workers, each of the others' updates comes once between two of one's own.
                let rate = match scaling {
                    "constant" => {
                        let rate = SMALL_MODEL_RATE / f64::from(workers).sqrt();
                        let local = SMALL_MODEL_RATE / 2.0;
                        format!("learning_rate = {rate:?}\nlocal_rate = {local:?}\n")
                    }
                    _ => String::new(),
                };
                variants.push(Variant {
                    cells: vec![workers.to_string(), kind.to_owned(), scaling.to_owned()],
                    picture: format!("Uneven workers, {workers} of them"),
                    settings: format!("[training]\nrate_scaling = \"{scaling}\"\n{rate}"),
                    workers,
                    trainer: Trainer::Workers(conditions(kind)),
                });
            }
        }
    }
    let sweep = Sweep {
        name: "staleness",
        title: "Staleness",
        introduction: "The default method, with its rate η0/√(1+τ) and with the constant rate that this is for workers that \
                       take turns."
            .to_owned(),
        columns: &["workers", "workers are", "rate"],
        steps: arguments.options.steps(8000, 1000),
        variants,
    };
    sweep.report(&arguments.options, |rows, folder| {
        let mut text = String::new();
        for of_workers in rows.chunks(2 * KINDS.len()) {
            for pair in of_workers.chunks(2) {
                let ((scaled, a), (constant, b)) = (pair[0].test_loss(), pair[1].test_loss());
                let (even, _) = of_workers[0].test_loss();
                let _ = writeln!(
                    text,
                    "* {} workers, {}: a test loss {:+.4} against even workers; a rate that falls with staleness makes {:+.4} of \
                     difference to a constant one (spreads {a:.4} and {b:.4}).",
                    pair[0].variant.workers,
                    pair[0].variant.cells[1],
                    scaled - even,
                    scaled - constant,
                );
            }
            let curves: Vec<Curve> = (of_workers.iter().step_by(2))
                .map(|row| Curve { name: row.variant.cells[1].clone(), points: row.staleness() })
                .collect();
            let title = format!("Staleness of updates, {} workers", of_workers[0].variant.workers);
            let axes = ("staleness, updates", "share of the updates");
            let _ = write!(text, "\n{}\n", plot_both(folder, &file_name(&title), &title, axes, &curves)?);
        }
        Ok(text)
    })
}
