//! What several local steps per exchange cost and save, beside sending fewer entries.

use std::fmt::Write;

use super::lab::{Options, Sweep, Trainer, Variant, Varied, cost, counted};
use crate::simulation::Conditions;

/// Several local steps per exchange: bytes and loss
///
/// The default method with 1, 2, 4 and 8 steps that a worker takes by itself per exchange, for the same number of gradients, and
/// for comparison with fewer entries sent: what else saves as many bytes up, but not exchanges. In virtual time, where gradients
/// take as long whether they are exchanged or not; there are 8 000 or, with
/// --quick, 1 600 of them, and other numbers are rounded up to a multiple of 8. Finished runs are kept in the folder and not made
/// again.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  sanderling reproduce local-steps --quick
  sanderling reproduce local-steps --out DIR    # the same folder from several shells: they share the work")]
pub struct Arguments {
    /// What all reproductions take.
    #[command(flatten)]
    options: Options,
}

/// Local steps, and the fraction kept up.
const WAYS: [(u32, f64); 6] = [(1, 0.01), (1, 0.005), (1, 0.0025), (2, 0.01), (4, 0.01), (8, 0.01)];

/// All local steps divide it.
const LOCAL_STEPS_MOST: u64 = 8;

/// Runs the command.
///
/// # Errors
/// Whatever keeps it from its end.
pub fn local_steps(arguments: &Arguments) -> anyhow::Result<()> {
    let quick = arguments.options.quick;
    let workers: &[u32] = if quick { &[8] } else { &[4, 8, 32] };
    // As many gradients in every row.
    let evaluations = arguments.options.steps(8000, 1600).next_multiple_of(LOCAL_STEPS_MOST);
    let variant = |workers: u32, (local_steps, keep): (u32, f64)| {
        Variant::small(
            vec![workers.to_string(), local_steps.to_string(), format!("{} %", 100.0 * keep)],
            format!("Local steps, {workers} workers"),
            &format!("[training]\nlocal_steps = {local_steps}\n[exchange]\nkeep = {keep:?}\n"),
            workers,
            Trainer::Workers(Conditions::default()),
        )
    };
    let variants = workers.iter().flat_map(|&workers| WAYS.map(|way| variant(workers, way)));
    let sweep = Sweep {
        name: "local-steps",
        own: Vec::new(),
        title: "Local steps",
        introduction: "The default method, 5 % down and 8 bits both ways; the sum of several local steps is sent at once. Staleness \
                       counts exchanges."
            .to_owned(),
        columns: &["workers", "local steps", "kept up"],
        evaluations,
        variants: variants.collect(),
    };
    sweep.report(&arguments.options, |rows, _| Ok(rows.chunks(WAYS.len()).map(verdict).collect()))
}

fn verdict(rows: &[Varied<'_>]) -> String {
    let mut text = String::new();
    let every = &rows[0];
    for row in &rows[1..] {
        let (up, down) = row.fewer_bytes(every);
        let [workers, _, keep] = &row.variant.cells[..] else { continue };
        let local_steps = u64::from(row.runs[0].spec.training.local_steps);
        let _ = writeln!(
            text,
            "* {workers} workers, {}, {keep}: {up} up and {down} down, compared with an exchange per gradient with 1 %, \
             and a test loss {}: {}.",
            counted(local_steps, "local step"),
            row.above(every),
            cost(&row.above(every)),
        );
    }
    text
}
