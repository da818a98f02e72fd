//! Options, tables and pictures of reproductions.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;

use super::jobs::Jobs;
use super::spec::{Run, Spec};
use crate::commands::say;
use crate::report::{Curve, plot_curves};
use crate::simulation::Point;
use crate::task::Score;

/// The first seed; the others follow.
const FIRST_SEED: u64 = 1337;

/// What every reproduction can be told.
#[derive(Debug, clap::Args)]
pub(in crate::reproduce) struct Options {
    /// A short form: fewer steps, seeds and settings
    #[arg(long)]
    pub(in crate::reproduce) quick: bool,
    /// Seeds, from 1337 on [default: 3, with --quick 1]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=100))]
    pub(in crate::reproduce) seeds: Option<u64>,
    /// Gradient evaluations of a run that counts [default: each reproduction's own]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=100_000_000))]
    pub(in crate::reproduce) steps: Option<u64>,
    /// Where results go, and are looked for; several processes may share it [default: runs/reproduce-NAME, with --quick
    /// …-quick]
    #[arg(long, value_name = "DIR")]
    pub(in crate::reproduce) out: Option<PathBuf>,
    /// Runs at a time [default: one per core]
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(in crate::reproduce) jobs: Option<u16>,
}

impl Options {
    /// Where the results of the reproduction of this name go.
    pub(in crate::reproduce) fn folder(&self, name: &str) -> PathBuf {
        let quick = if self.quick { "-quick" } else { "" };
        self.out.clone().unwrap_or_else(|| PathBuf::from(format!("runs/reproduce-{name}{quick}")))
    }

    pub(in crate::reproduce) fn seeds(&self) -> Vec<u64> {
        let count = self.seeds.unwrap_or(if self.quick { 1 } else { 3 });
        (FIRST_SEED..FIRST_SEED + count).collect()
    }

    /// Gradient evaluations of a run that counts, where `full` and `quick` are this reproduction's own numbers.
    pub(in crate::reproduce) fn steps(&self, full: u64, quick: u64) -> u64 {
        self.steps.unwrap_or(if self.quick { quick } else { full })
    }

    pub(in crate::reproduce) fn jobs(&self) -> Jobs {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Jobs(self.jobs.map_or(cores, usize::from))
    }
}

/// A look at the validation split takes as long as many steps, so there are at least so many between two.
const STEPS_BETWEEN_LOOKS_MIN: u64 = 8;

/// Gradient evaluations between the looks of a run that is looked at about so many times.
pub(in crate::reproduce) fn look_every(steps: u64, looks: u64) -> u64 {
    (steps / looks).max(STEPS_BETWEEN_LOOKS_MIN.min(steps))
}

/// Mean and sample standard deviation; the latter zero for a single value.
pub(in crate::reproduce) fn mean_and_spread(values: &[f64]) -> (f64, f64) {
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    (mean, if values.len() > 1 { (squares / (count - 1.0)).sqrt() } else { 0.0 })
}

/// Scores of several seeds, as a cell of a table: accuracy in per cent where there is one, or else the loss.
pub(in crate::reproduce) fn show(scores: &[Score]) -> String {
    let of = |value: fn(&Score) -> f64, decimals: usize| {
        let (mean, spread) = mean_and_spread(&scores.iter().map(value).collect::<Vec<_>>());
        match scores.len() {
            _ if !mean.is_finite() => "diverged".to_owned(),
            // One seed has no spread.
            1 => format!("{mean:.decimals$}"),
            _ => format!("{mean:.decimals$} ± {spread:.decimals$}"),
        }
    };
    if scores.iter().all(|score| score.accuracy.is_some()) {
        of(|score| 100.0 * score.accuracy.unwrap_or(f64::NAN), 2)
    } else {
        of(|score| score.loss, 4)
    }
}

/// The validation loss over gradient evaluations, mean over runs that were looked at at the same places.
pub(in crate::reproduce) fn mean_curve(runs: &[Run]) -> Vec<(f64, f64)> {
    let Some(shortest) = runs.iter().min_by_key(|run| run.outcome.curve.len()) else { return Vec::new() };
    let at = |(place, point): (usize, &Point)| {
        let losses: Vec<f64> = runs.iter().map(|run| run.outcome.curve[place].score.loss).collect();
        (point.steps as f64, mean_and_spread(&losses).0)
    };
    // The first point, of the untrained model, would only press the others together.
    shortest.outcome.curve.iter().enumerate().skip(1).map(at).collect()
}

/// Writes a run's resolved configuration, as a run file that `train` takes too.
pub(in crate::reproduce) fn write_configuration(
    folder: &Path,
    name: &str,
    spec: &Spec,
) -> anyhow::Result<()> {
    let folder = folder.join("configurations");
    let path = folder.join(format!("{name}.toml"));
    let text = spec.run().to_toml();
    let written = fs::create_dir_all(&folder).and_then(|()| fs::write(&path, text));
    written.with_context(|| format!("cannot write {}", path.display()))
}

/// Draws the curves twice, as SVG and as PNG; returns what shows the picture in Markdown.
pub(in crate::reproduce) fn plot_both(
    folder: &Path,
    name: &str,
    title: &str,
    axes: (&str, &str),
    curves: &[Curve],
) -> anyhow::Result<String> {
    for kind in ["svg", "png"] {
        plot_curves(&folder.join(format!("{name}.{kind}")), title, axes, curves)?;
    }
    Ok(format!("![{title}]({name}.svg)\n"))
}

/// Writes the report of a reproduction and shows it.
pub(in crate::reproduce) fn write_report(folder: &Path, text: &str) -> anyhow::Result<()> {
    let path = folder.join("README.md");
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    say(&format!("{text}\nResults are in {}\n", folder.display()))
}
