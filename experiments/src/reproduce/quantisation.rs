//! What fewer bits per value cost and save, in each direction.

use std::fmt::Write;

use super::lab::{Options, Sweep, Trainer, Variant, cost};
use crate::simulation::Conditions;

/// Values as float32, bfloat16, 8 bits, or signs of one magnitude per tensor, in each direction
///
/// The default method on 8 workers in virtual time. What a format rounds off stays with the sender and is sent later. Of
/// a small model and 8 000 gradient evaluations each; with --quick 1 000.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  sanderling reproduce quantisation --quick
  sanderling reproduce quantisation --out DIR    # the same folder from several shells: they share the work")]
pub struct Arguments {
    /// What all reproductions take.
    #[command(flatten)]
    options: Options,
}

/// Up and down.
const FORMATS: [(&str, &str); 10] = [
    ("f32", "f32"),
    ("bf16", "f32"),
    ("int8", "f32"),
    ("sign", "f32"),
    ("f32", "bf16"),
    ("f32", "int8"),
    ("f32", "sign"),
    ("bf16", "bf16"),
    ("int8", "int8"),
    ("sign", "sign"),
];

/// The run's workers.
const WORKERS: u32 = 8;

/// Runs the command.
///
/// # Errors
/// Whatever keeps the experiment from its end, in a sentence.
pub fn quantisation(arguments: &Arguments) -> anyhow::Result<()> {
    let variant = |(up, down): (&str, &str)| {
        let picture = match (up, down) {
            (_, "f32") => "Values up",
            ("f32", _) => "Values down",
            _ => "Values both ways",
        };
        Variant::small(
            vec![up.to_owned(), down.to_owned()],
            picture.to_owned(),
            &format!("[exchange]\nvalues_up = \"{up}\"\nvalues_down = \"{down}\"\n"),
            WORKERS,
            Trainer::Workers(Conditions::default()),
        )
    };
    let sweep = Sweep {
        name: "quantisation",
        own: Vec::new(),
        title: "Values of fewer bits",
        introduction: format!("The default method on {WORKERS} workers, 1 % kept up and 5 % down."),
        columns: &["up", "down"],
        evaluations: arguments.options.steps(8000, 1000),
        variants: FORMATS.map(variant).to_vec(),
    };
    sweep.report(&arguments.options, |rows, _| {
        let mut text = String::new();
        let exact = &rows[0];
        for row in &rows[1..] {
            let (up, down) = row.fewer_bytes(exact);
            let _ = writeln!(
                text,
                "* {} up, {} down: {up} up and {down} down, compared with float32, and a test loss {}: {}.",
                row.variant.cells[0],
                row.variant.cells[1],
                row.above(exact),
                cost(&row.above(exact)),
            );
        }
        Ok(text)
    })
}
