//! What several local steps per exchange cost and save, beside sending fewer entries.

use std::fmt::Write;

use super::lab::{Options, Sweep, Trainer, Variant, Varied, cost};
use crate::simulation::Conditions;

/// Several local steps per exchange: bytes and loss
///
/// The default method with 1, 2, 4 and 8 steps that a worker takes by itself per exchange, for the same number of gradients, and
/// for comparison with fewer entries sent: what else saves as many bytes up, but not exchanges. In virtual time, where gradients
/// take as long whether they are exchanged or not. Finished runs are kept in the folder and not made again.
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
    let steps = arguments.options.steps(8000, 1600).next_multiple_of(LOCAL_STEPS_MOST);
    let variant = |workers: u32, (local_steps, keep): (u32, f64)| Variant {
        cells: vec![workers.to_string(), local_steps.to_string(), format!("{} %", 100.0 * keep)],
        picture: format!("Local steps, {workers} workers"),
        settings: format!(
            "[training]\nlocal_steps = {local_steps}\nsteps = {}\n[exchange]\nkeep = {keep:?}\n",
            steps / u64::from(local_steps)
        ),
        workers,
        trainer: Trainer::Workers(Conditions::default()),
    };
    let variants = workers.iter().flat_map(|&workers| WAYS.map(|way| variant(workers, way)));
    let sweep = Sweep {
        name: "local-steps",
        title: "Local steps",
        introduction: "The default method, 5 % down and 8 bits both ways; the sum of several local steps is sent at once. Staleness \
                       counts exchanges."
            .to_owned(),
        columns: &["workers", "local steps", "kept up"],
        steps,
        variants: variants.collect(),
    };
    sweep.report(&arguments.options, |rows, _| Ok(rows.chunks(WAYS.len()).map(verdict).collect()))
}

fn verdict(rows: &[Varied<'_>]) -> String {
    let mut text = String::new();
    let every = &rows[0];
    for row in &rows[1..] {
        let (up, down) = row.fewer_bytes(every);
        let [workers, local_steps, keep] = &row.variant.cells[..] else { continue };
        let _ = writeln!(
            text,
            "* {workers} workers, {local_steps} local steps, {keep}: {up} up and {down} down than an exchange per gradient with 1 %, and \
             a test loss {}: {}.",
            row.above(every),
            cost(&row.above(every)),
        );
    }
    text
}
