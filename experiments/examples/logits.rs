//! Prints what a checkpoint computes, for comparison with other implementations:
//!
//!     cargo run --release -p sanderling --example logits -- DIR '[[1, 2, 3], [4, 5, 6]]'
//!
//! The output is JSON: `loss`, the mean cross-entropy of each token given those before it, in nats, and `logits`, all of
//! them in the order (sequence, position, vocabulary).

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, ensure};
use clap::Parser;
use ndarray::{Array2, s};
use sanderling_common::checkpoint;
use sanderling_worker::kernels::cpu::Cpu;
use sanderling_worker::model::Model;

#[derive(Debug, Parser)]
struct Arguments {
    /// The checkpoint
    directory: PathBuf,
    /// Token ids: a JSON list of sequences of the same length, at least 2
    ids: String,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let ids: Vec<Vec<u32>> =
        serde_json::from_str(&arguments.ids).context("the ids are not a list of lists")?;
    let length = ids.first().map_or(0, Vec::len);
    ensure!(length >= 2 && ids.iter().all(|row| row.len() == length), "sequences of one length, at least 2");
    let ids = Array2::from_shape_fn((ids.len(), length), |(row, place)| ids[row][place]);
    let (config, parameters) = checkpoint::load(&arguments.directory)?;
    let mut model = Model::new(config, Cpu::default())?;
    let logits: Vec<f32> = model.logits(&parameters, ids.view())?.iter().copied().collect();
    let sums = model.evaluate(&parameters, ids.slice(s![.., ..-1]), ids.slice(s![.., 1..]))?;
    let result = serde_json::json!({ "loss": sums.loss(), "logits": logits });
    Ok(writeln!(std::io::stdout(), "{result}")?)
}
