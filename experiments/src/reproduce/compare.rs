//! Any run files, side by side.

use std::fmt::Write;
use std::path::PathBuf;

use anyhow::{bail, ensure};

use super::lab::{
    Options, RunFile, Sweep, Trainer, Variant, Varied, cost, counted, distinct, escaped, file_name, typed,
    workers_option,
};
use crate::commands::UsageError;
use crate::simulation::Conditions;

/// Run files of your own side by side, each with all seeds: loss, bytes and staleness
///
/// What each file describes is trained by asynchronous workers in virtual time: as many as the file says, or as --workers
/// says, all of about the same speed unless told otherwise. All runs have the same number of gradient evaluations: --steps,
/// or as many as the first file's run has, with --quick 1 000 at most. What the files say of seeds and of the server plays no
/// part. Every file is compared with the first one, seed by seed. A file that was changed since makes another run, and the
/// report that of now; other runs are kept. The resolved configurations of other reproductions (configurations/*.toml) are
/// run files, too, but for those of measured links, whose runs have no end of their own.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  sanderling reproduce compare a.toml b.toml --steps 4000
  sanderling reproduce compare cosine.toml wsd.toml --workers 8,32 --out runs/decay
  sanderling reproduce compare a.toml --workers 8 --slow-workers 1 --slowness 10    # one worker ten times slower")]
pub struct Arguments {
    /// Run files (TOML), as `train --config` takes them; the others are compared with the first
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Numbers of workers [default: what each file says]
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=256))]
    workers: Vec<u32>,
    /// So many workers are slower than the others
    #[arg(long, default_value_t = 0, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=256))]
    slow_workers: u32,
    /// How many times slower they are
    #[arg(long, default_value_t = 10.0, value_name = "TIMES", value_parser = times, requires = "slow_workers")]
    slowness: f64,
    /// Every second worker leaves after about so many exchanges, and comes back later as a new one; 0: none does
    #[arg(long, default_value_t = 0, value_name = "EXCHANGES")]
    stay: u32,
    /// For the time of about so many gradients it is away
    #[arg(long, default_value_t = 40.0, value_name = "GRADIENTS", value_parser = times, requires = "stay")]
    away: f64,
    /// What all reproductions take.
    #[command(flatten)]
    options: Options,
}

const COLUMNS: [&str; 2] = ["workers", "run file"];

/// How many times slower a worker may be, and for how many gradients one may be away: time without end would pass before a run
/// came to its own.
const TIMES_MAX: f64 = 1e6;

/// Gradient evaluations with --quick, at most.
const QUICK_EVALUATIONS: u64 = 1000;

fn times(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if (1.0..=TIMES_MAX).contains(&value) => Ok(value),
        _ => Err(format!("a number from 1 to {TIMES_MAX} is wanted")),
    }
}

impl Arguments {
    fn conditions(&self) -> Conditions {
        let even = Conditions::default();
        Conditions {
            slow_workers: self.slow_workers,
            slowness: if self.slow_workers > 0 { self.slowness } else { even.slowness },
            stay: self.stay,
            away: if self.stay > 0 { self.away } else { even.away },
            ..even
        }
    }

    /// The options that make it another experiment, as they are typed.
    fn own(&self) -> Vec<String> {
        let mut own: Vec<String> = self.files.iter().map(|path| typed(path)).collect();
        own.extend(workers_option(&self.workers));
        if self.slow_workers > 0 {
            own.push(format!("--slow-workers {} --slowness {}", self.slow_workers, self.slowness));
        }
        if self.stay > 0 {
            own.push(format!("--stay {} --away {}", self.stay, self.away));
        }
        own
    }
}

/// Runs the command.
///
/// # Errors
/// Whatever keeps it from its end, in a sentence.
pub fn compare(arguments: &Arguments) -> anyhow::Result<()> {
    // Each of the numbers is checked with each of the files below.
    let stated = arguments.workers.iter().min().copied();
    let files: Vec<RunFile> =
        arguments.files.iter().map(|path| RunFile::read(path, stated)).collect::<Result<_, _>>()?;
    for (place, file) in files.iter().enumerate() {
        // Configurations are written by these names.
        let is_same = |other: &&RunFile| file_name(&other.name()) == file_name(&file.name());
        if let Some(other) = files[..place].iter().find(is_same) {
            bail!(UsageError(match typed(&other.path) == typed(&file.path) {
                true => format!("the run file {} is named twice; name it once", file.path.display()),
                false => format!(
                    "{} and {} have the same name for tables and files; rename one, or leave it out",
                    other.path.display(),
                    file.path.display()
                ),
            }));
        }
    }
    let first = files[0].settings.clone().resolve()?.training;
    let of_first = first.steps * u64::from(first.local_steps);
    let evaluations = arguments.options.steps(of_first, of_first.min(QUICK_EVALUATIONS));
    // By workers first, so that a picture holds what is compared.
    let mut numbers: Vec<Option<u32>> = distinct(&arguments.workers).into_iter().map(Some).collect();
    if numbers.is_empty() {
        numbers.push(None);
    }
    let pairs = numbers.iter().flat_map(|&workers| files.iter().map(move |file| (file, workers)));
    let variants = pairs.map(|(file, workers)| variant(file, workers, arguments.conditions()));
    let variants = variants.collect::<anyhow::Result<_>>()?;
    let sweep = Sweep {
        name: "compare",
        own: arguments.own(),
        title: "Run files side by side",
        introduction: introduction(arguments),
        columns: &COLUMNS,
        evaluations,
        variants,
    };
    sweep.report(&arguments.options, |rows, _| Ok(rows.chunks(files.len()).map(verdict).collect()))
}

/// A file by so many workers, or by as many as it says.
fn variant(file: &RunFile, stated: Option<u32>, conditions: Conditions) -> anyhow::Result<Variant> {
    let workers = match stated {
        Some(workers) => workers,
        None => file.settings.clone().resolve()?.run.workers,
    };
    ensure!(
        conditions.slow_workers < workers,
        UsageError(format!(
            "--slow-workers {} is as many as there are, or more, of {}; take fewer",
            conditions.slow_workers,
            counted(u64::from(workers), "worker")
        ))
    );
    Ok(Variant {
        cells: vec![workers.to_string(), file.name()],
        picture: stated.map_or("Run files".to_owned(), |_| {
            format!("Run files, {}", counted(u64::from(workers), "worker"))
        }),
        run: file.clone(),
        workers,
        trainer: Trainer::Workers(conditions),
    })
}

fn introduction(arguments: &Arguments) -> String {
    let mut text = String::from("By asynchronous workers");
    if arguments.slow_workers > 0 {
        let _ = write!(text, ", {} of them {} times slower", arguments.slow_workers, arguments.slowness);
    }
    if arguments.stay > 0 {
        let (stay, away) = (arguments.stay, arguments.away);
        let _ = write!(
            text,
            ", every second of which stays for about {stay} exchanges and is away for about {away} gradients"
        );
    }
    text.push('.');
    text
}

/// Of one number of workers: everyone against the first.
fn verdict(rows: &[Varied<'_>]) -> String {
    let first = &rows[0];
    let mut text = String::new();
    for row in &rows[1..] {
        let (up, down) = row.fewer_bytes(first);
        let above = row.above(first);
        let _ = writeln!(
            text,
            "* {} against {}: {up} up and {down} down; test loss: {above}: {}.",
            row.variant.in_words(&COLUMNS),
            escaped(&first.variant.cells[1]),
            cost(&above),
        );
    }
    if text.is_empty() {
        let _ = writeln!(text, "* {}: nothing to compare it with.", first.variant.in_words(&COLUMNS));
    }
    text
}
