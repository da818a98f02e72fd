//! `sanderling simulate`: everything breaks, by a seed.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use indicatif::{ProgressBar, ProgressStyle};

use super::{UsageError, say};
use crate::faults::{Tally, Violation, trial};
use crate::work::Stop;

/// Events that are shown before a violation.
const EVENTS_SHOWN: usize = 40;

/// How often the progress is drawn.
const DRAW_EVERY: Duration = Duration::from_millis(200);

/// Try the shipped server and worker against everything that can break, in simulation
///
/// Each seed is one run in virtual time, on a disk in memory, in which messages are lost, repeated and overtake each other,
/// connections are cut, workers and the server are killed at any point, power cuts tear files, and disks fill up. After
/// every event the workers' models are compared with the server's replicas, after every recovery the model with the fold
/// over all records that were ever safe, and in the end every batch must have been done once.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  sanderling simulate --seeds 1000             # seeds 0 to 999, and what broke how often
  sanderling simulate --first 5000 --seeds 100 --json faults.json
  sanderling simulate --first 4242 --seeds 1 --trace   # every event of one seed")]
pub struct Arguments {
    /// Runs, one per seed
    #[arg(long, default_value_t = 1000, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    seeds: u64,
    /// The first seed
    #[arg(long, default_value_t = 0, value_name = "SEED")]
    first: u64,
    /// Seeds that are run side by side; as many as the machine has processors unless told otherwise
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Print every event of every run
    #[arg(long)]
    trace: bool,
    /// Write what happened to a file, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// What the file says.
#[derive(serde::Serialize)]
struct Report<'a> {
    first_seed: u64,
    seeds: u64,
    seconds: f64,
    #[serde(flatten)]
    tally: &'a Tally,
    violation: Option<String>,
}

/// Runs the command.
///
/// # Errors
/// The violation with the lowest seed of those found, or a file that cannot be written; [`UsageError`] for more seeds than
/// there are.
pub fn simulate(arguments: &Arguments) -> anyhow::Result<()> {
    if arguments.first.checked_add(arguments.seeds - 1).is_none() {
        let seeds = arguments.seeds;
        return Err(UsageError(format!("--seeds {seeds} goes beyond the last seed, {}", u64::MAX)).into());
    }
    // Nobody wants to learn at the end of a long run that it cannot be written down.
    let json = arguments.json.as_deref().map(|path| open(path).map(|file| (path, file))).transpose()?;
    let started = Instant::now();
    let threads = match arguments.threads {
        Some(threads) => threads.max(1),
        None => std::thread::available_parallelism().map_or(1, usize::from),
    };
    let threads = if arguments.trace { 1 } else { threads };
    let stop = Stop::listen()?;
    let trials = Trials::new(arguments);
    std::thread::scope(|scope| {
        (0..threads).for_each(|_| drop(scope.spawn(|| trials.work(arguments.trace))));
        trials.watch(|| stop.is_asked());
    });
    let done = trials.done.load(Ordering::Relaxed);
    let tally = *trials.tally.lock().expect("no trial panics while it counts");
    let violation = trials.violation.into_inner().expect("no trial panics while it tells");
    let seconds = started.elapsed().as_secs_f64();
    if let Some((path, mut file)) = json {
        let violation = violation.as_ref().map(ToString::to_string);
        let report = Report { first_seed: arguments.first, seeds: done, seconds, tally: &tally, violation };
        let json = serde_json::to_vec_pretty(&report)?;
        let written = file.set_len(0).and_then(|()| file.write_all(&json));
        written.with_context(|| format!("cannot write {}", path.display()))?;
    }
    say(&closing_table(arguments.first, done, &tally, seconds))?;
    match violation {
        None if done < arguments.seeds => bail!("interrupted after {done} of {} seeds", arguments.seeds),
        None => say("nothing was lost, nothing was applied twice, every replica was right\n"),
        Some(violation) => {
            show_course(&violation);
            let seed = violation.seed;
            bail!("{violation}; run it again: sanderling simulate --first {seed} --seeds 1 --trace")
        }
    }
}

/// A file to be written later; what is in it stays until then.
fn open(path: &Path) -> anyhow::Result<File> {
    let file = File::options().create(true).truncate(false).write(true).open(path);
    file.with_context(|| format!("cannot write {}", path.display()))
}

/// What happened, a kind per line.
fn closing_table(first: u64, seeds: u64, tally: &Tally, seconds: f64) -> String {
    let mut table = format!("{:>12} seeds from {first} on, in {seconds:.1} s\n", seeds);
    for (kind, count) in tally.kinds() {
        table += &format!("{count:>12} {kind}\n");
    }
    table
}

struct Trials {
    first: u64,
    seeds: u64,
    next: AtomicU64,
    done: AtomicU64,
    stop: AtomicBool,
    tally: Mutex<Tally>,
    violation: Mutex<Option<Violation>>,
}

impl Trials {
    fn new(arguments: &Arguments) -> Self {
        Self {
            first: arguments.first,
            seeds: arguments.seeds,
            next: AtomicU64::new(0),
            done: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            tally: Mutex::new(Tally::default()),
            violation: Mutex::new(None),
        }
    }

    fn work(&self, trace: bool) {
        loop {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            if number >= self.seeds || self.stop.load(Ordering::Relaxed) {
                return;
            }
            let outcome = trial(self.first + number, None, &mut |event| {
                if trace {
                    // Nobody is left to read when the output is closed.
                    let _ = say(&format!("{event}\n"));
                }
            });
            self.done.fetch_add(1, Ordering::Relaxed);
            match outcome {
                Ok(tally) => self.tally.lock().expect("no trial panics while it counts").add(&tally),
                Err(violation) => {
                    self.stop.store(true, Ordering::Relaxed);
                    let mut worst = self.violation.lock().expect("no trial panics while it tells");
                    if worst.as_ref().is_none_or(|known| violation.seed < known.seed) {
                        *worst = Some(violation);
                    }
                }
            }
        }
    }

    /// Draws the progress until all is done, or told to stop.
    fn watch(&self, interrupted: impl Fn() -> bool) {
        let style = ProgressStyle::with_template("{bar:40} {pos}/{len} seeds, {eta} left");
        let bar = ProgressBar::new(self.seeds).with_style(style.expect("the template is valid"));
        loop {
            let done = self.done.load(Ordering::Relaxed);
            bar.set_position(done);
            if done == self.seeds || self.stop.load(Ordering::Relaxed) {
                return bar.finish_and_clear();
            }
            if interrupted() {
                self.stop.store(true, Ordering::Relaxed);
            }
            std::thread::sleep(DRAW_EVERY);
        }
    }
}

/// The events before a violation.
#[allow(clippy::print_stderr)]
fn show_course(violation: &Violation) {
    let mut last = VecDeque::with_capacity(EVENTS_SHOWN);
    let again = trial(violation.seed, None, &mut |event| {
        if last.len() == EVENTS_SHOWN {
            last.pop_front();
        }
        last.push_back(event.to_owned());
    });
    eprintln!("the last events of seed {}:", violation.seed);
    last.iter().for_each(|event| eprintln!("{event}"));
    if again.is_ok() {
        eprintln!("(the second run of the seed went well: it is not one course of events)");
    }
}
