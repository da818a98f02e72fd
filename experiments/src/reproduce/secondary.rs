//! What secondary compression costs and saves.

use std::fmt::Write;

use super::lab::{Options, Sweep, Trainer, Variant, cost};
use crate::simulation::Conditions;

/// Secondary compression off, 10, 5, 3 and 1 %: bytes and loss
///
/// The default method with everything that changed sent down, and with a part of it, for 8 and for 32 workers in virtual time.
/// Values travel as float32, so that only what is selected differs. Of a small model and 8 000 gradient evaluations each; with
/// --quick 1 000, and 8 workers only.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  sanderling reproduce secondary --quick
  sanderling reproduce secondary --out DIR    # the same folder from several shells: they share the work")]
pub struct Arguments {
    /// What all reproductions take.
    #[command(flatten)]
    options: Options,
}

/// The fractions sent down; 1 is off.
const FRACTIONS: [f64; 5] = [1.0, 0.1, 0.05, 0.03, 0.01];

/// Runs the command.
///
/// # Errors
/// Whatever keeps the experiment from its end, in a sentence.
pub fn secondary(arguments: &Arguments) -> anyhow::Result<()> {
    let quick = arguments.options.quick;
    let workers: &[u32] = if quick { &[8] } else { &[8, 32] };
    let variant = |workers: u32, fraction: f64| {
        Variant::small(
            vec![workers.to_string(), name(fraction)],
            format!("Secondary compression, {workers} workers"),
            &format!("[exchange]\nsecondary = {fraction:?}\nvalues_up = \"f32\"\nvalues_down = \"f32\"\n"),
            workers,
            Trainer::Workers(Conditions::default()),
        )
    };
    let variants = workers.iter().flat_map(|&workers| FRACTIONS.map(|fraction| variant(workers, fraction)));
    let sweep = Sweep {
        name: "secondary",
        own: Vec::new(),
        title: "Secondary compression",
        introduction: "The default method, 1 % kept up, with all or a part of the difference sent down, values as float32."
            .to_owned(),
        columns: &["workers", "down"],
        evaluations: arguments.options.steps(8000, 1000),
        variants: variants.collect(),
    };
    sweep.report(&arguments.options, |rows, _| {
        let mut text = String::new();
        for of_workers in rows.chunks(FRACTIONS.len()) {
            let off = &of_workers[0];
            for row in &of_workers[1..] {
                let _ = writeln!(
                    text,
                    "* {} workers, {} down instead of everything: {}, and a test loss {}: {}.",
                    row.variant.workers,
                    row.variant.cells[1],
                    row.fewer_bytes(off).1,
                    row.above(off),
                    cost(&row.above(off)),
                );
            }
        }
        Ok(text)
    })
}

fn name(fraction: f64) -> String {
    if fraction == 1.0 { "off".to_owned() } else { format!("{:.0} %", 100.0 * fraction) }
}
