//! How stale updates are, and what uneven and restless workers do.

use std::fmt::Write;

use super::lab::{Options, SMALL_MODEL_RATE, Sweep, Trainer, Variant, Varied, cost, file_name, plot_both};
use crate::report::Curve;
use crate::simulation::Conditions;

/// Distributions of staleness, and what workers of uneven speed, or that come and go, do to the loss
///
/// The default method, whose rate falls with the staleness of each gradient, and the same with the constant rate that
/// even workers would have of it, in virtual time: workers of about the same speed; one that is ten times slower; and
/// every second one leaving after some exchanges and coming back later as a new one. Of a small model and 8 000
/// gradient evaluations each; with --quick 1 000, and 8 workers only.
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

/// How the rate depends on staleness, the default's first.
const SCALINGS: [&str; 2] = ["inverse-sqrt", "constant"];

/// Exchanges of a worker that comes and goes before it leaves, and how long it is away, in gradients.
const STAY: u32 = 40;
const AWAY: f64 = 40.0;

fn conditions(kind: &str) -> Conditions {
    let even = Conditions::default();
    match kind {
        "one ten times slower" => Conditions { slow_workers: 1, slowness: 10.0, ..even },
        "half come and go" => Conditions { stay: STAY, away: AWAY, ..even },
        _ => even,
    }
}

/// With the rate that falls with staleness, or with a constant one.
fn variant(workers: u32, kind: &str, scaling: &str) -> Variant {
    // Of even workers, each of the others' updates comes once between two of one's own.
    let rate = match scaling {
        "constant" => {
            let rate = SMALL_MODEL_RATE / f64::from(workers).sqrt();
            let local = SMALL_MODEL_RATE / 2.0;
            format!("learning_rate = {rate:?}\nlocal_rate = {local:?}\n")
        }
        _ => String::new(),
    };
    Variant::small(
        vec![workers.to_string(), kind.to_owned(), scaling.to_owned()],
        format!("Uneven workers, {workers} of them"),
        &format!("[training]\nrate_scaling = \"{scaling}\"\n{rate}"),
        workers,
        Trainer::Workers(conditions(kind)),
    )
}

/// Runs the command.
///
/// # Errors
/// Whatever keeps the experiment from its end, in a sentence.
pub fn staleness(arguments: &Arguments) -> anyhow::Result<()> {
    let workers: &[u32] = if arguments.options.quick { &[8] } else { &[8, 32] };
    let of_kind = |workers, kind| SCALINGS.map(|scaling| variant(workers, kind, scaling));
    let variants =
        workers.iter().flat_map(|&workers| KINDS.into_iter().flat_map(move |kind| of_kind(workers, kind)));
    let sweep = Sweep {
        name: "staleness",
        own: Vec::new(),
        title: "Staleness",
        introduction: format!(
            "The default method, with its rate η0/√(1+τ) and with the constant rate that this is for workers that take turns; a \
             worker that comes and goes stays for about {STAY} exchanges and is away for the time of about {AWAY:.0} gradients."
        ),
        columns: &["workers", "workers are", "rate"],
        evaluations: arguments.options.steps(8000, 1000),
        variants: variants.collect(),
    };
    sweep.report(&arguments.options, |rows, folder| {
        let mut text = String::new();
        for of_workers in rows.chunks(SCALINGS.len() * KINDS.len()) {
            text.push_str(&verdict(of_workers));
            let curves: Vec<Curve> = (of_workers.iter().step_by(SCALINGS.len()))
                .map(|row| Curve::of(row.variant.cells[1].as_str(), without_tail(row.staleness())))
                .collect();
            let title = format!("Staleness of updates, {} workers", of_workers[0].variant.workers);
            let axes = ("staleness, updates (the stalest 0.5 % left out)", "share of the updates");
            let _ = write!(text, "\n{}\n", plot_both(folder, &file_name(&title), &title, axes, &curves)?);
        }
        Ok(text)
    })
}

/// The share of updates that a picture leaves out: those of one slow worker among many are ten times staler than the others'
/// and too few to be seen, and would press these together.
const TAIL: f64 = 0.005;

/// Shares of the updates by staleness, without the stalest of them.
fn without_tail(mut shares: Vec<(f64, f64)>) -> Vec<(f64, f64)> {
    let mut left_out = 0.0;
    while let Some(&(_, share)) = shares.last().filter(|(_, share)| left_out + share <= TAIL) {
        left_out += share;
        shares.pop();
    }
    shares
}

/// Of the variants of one number of workers, even ones first.
fn verdict(rows: &[Varied<'_>]) -> String {
    let mut text = String::new();
    for pair in rows.chunks(SCALINGS.len()) {
        let [scaled, constant] = pair else { continue };
        let (workers, kind) = (scaled.variant.workers, &scaled.variant.cells[1]);
        let of_rate = scaled.above(constant);
        let _ = writeln!(
            text,
            "* {workers} workers, {kind}: a rate that falls with staleness beats a constant one: {} (test loss {of_rate}).",
            of_rate.held()
        );
        if kind != KINDS[0] {
            let above = scaled.above(&rows[0]);
            let _ = writeln!(
                text,
                "* {workers} workers, {kind}: a test loss {above} against even workers: {}.",
                cost(&above)
            );
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tail_too_thin_to_be_seen_is_left_out() {
        let shares = vec![(0.0, 0.5), (1.0, 0.496), (2.0, 0.0), (3.0, 0.003), (4.0, 0.001)];
        assert_eq!(without_tail(shares.clone()), shares[..2]);
        assert_eq!(without_tail(vec![(0.0, 0.99), (1.0, 0.01)]).len(), 2);
        assert_eq!(without_tail(Vec::new()), Vec::new());
    }
}
