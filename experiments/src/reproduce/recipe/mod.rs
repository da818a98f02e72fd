//! The default method against AdamW on one machine and data-parallel, at equal gradient evaluations.

mod report;

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::ensure;
use sanderling_common::config::RunPartial;
use sanderling_common::method::Method;

use self::report::Report;
use super::lab::{
    Book, Choosing, Chosen, EVALUATIONS, Grid, Jobs, Options, Run, RunFile, Spec, Trainer, Tried, Warmup,
    counted, distinct, exchanges, file_name, look_every, make, typed, validation, workers_option,
    write_configuration, write_report,
};
use crate::commands::UsageError;
use crate::simulation::Conditions;

/// The default method, for 4 to 32 workers, against AdamW on one worker and data-parallel AdamW
///
/// The default model and method, one setting for every number of workers, 1 % sent up and 5 % down with 8 bits, in virtual
/// time; and AdamW at the same number of gradient evaluations, 8 000 and 16 000: on one worker, and data-parallel, where N
/// workers make one step of N batches together. AdamW has the best of at least four learning rates for each number of
/// workers, and of the rates around it for longer runs, and the better of two warm-ups, by validation with the first seed;
/// weight decay is the same for everyone. With --quick 600 evaluations of a small model, with the rates that suit it, and
/// three rates of AdamW. A run file puts other settings in the place of the defaults and of the small model: its model,
/// text, start, length and schedule are also those of AdamW, its method and rates are the workers'; what it says of the
/// server, of seeds and of the number of workers plays no part. Finished runs are kept in the folder and not made again.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  sanderling reproduce recipe --quick
  sanderling reproduce recipe --config run.toml --steps 2048 --workers 8,32    # your model, or from a checkpoint
  sanderling reproduce recipe --out DIR    # the same folder from several shells: they share the work")]
pub struct Arguments {
    /// A run file (TOML) with other settings than the defaults, as `train` takes it
    #[arg(long, short, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Numbers of workers, 2 to 256 [default: 4,8,16,32, with --quick 4,8]
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(2..=256))]
    workers: Vec<u32>,
    /// What all reproductions take.
    #[command(flatten)]
    options: Options,
}

/// Points of a curve.
const LOOKS: u64 = 16;

/// Whose method and model it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Whose {
    /// What `train` does by itself, for which the goals are.
    Default,
    /// The small model of --quick, with the rates that suit it.
    Small,
    /// A run file's.
    File,
}

struct Settings {
    whose: Whose,
    /// Everything but numbers of workers, lengths, seeds, and AdamW's rates.
    base: RunFile,
    /// Of the default method, ascending.
    workers: Vec<u32>,
    /// Gradient evaluations, ascending.
    lengths: Vec<u64>,
    /// Of AdamW for the first of the lengths, ascending.
    rates: Vec<f64>,
    seeds: Vec<u64>,
}

/// The lengths of the full form, and that of --quick.
const LENGTHS: [u64; 2] = [8_000, 16_000];
const QUICK_LENGTH: u64 = 600;

/// Reads a run file whose method several workers can take.
fn read(path: &Path) -> anyhow::Result<RunFile> {
    // How many there are is checked later, as AdamW's one is also made of it.
    let file = RunFile::read(path, Some(1))?;
    ensure!(
        file.settings.training.method != Some(Method::Msgd),
        UsageError(format!(
            "the run file {}: method msgd is for one worker, and this is about several; give asgd, or another method",
            path.display()
        ))
    );
    Ok(file)
}

impl Settings {
    fn new(arguments: &Arguments) -> anyhow::Result<Self> {
        let options = &arguments.options;
        let (whose, base) = match &arguments.config {
            Some(path) => (Whose::File, read(path)?),
            None if options.quick => (Whose::Small, RunFile::small()),
            None => (Whose::Default, RunFile::default()),
        };
        let stated = &base.settings.training;
        let of_file =
            stated.steps.map(|steps| steps.saturating_mul(u64::from(stated.local_steps.unwrap_or(1))));
        let lengths = match options.steps {
            Some(steps) => vec![steps],
            None if options.quick => vec![QUICK_LENGTH],
            None => of_file.map_or(LENGTHS.to_vec(), |evaluations| vec![evaluations]),
        };
        let workers = match &arguments.workers[..] {
            [] if options.quick => vec![4, 8],
            [] => vec![4, 8, 16, 32],
            stated => distinct(stated),
        };
        let rates = match options.quick {
            true => vec![2e-3, 4e-3, 8e-3],
            false => vec![5e-4, 1e-3, 2e-3, 4e-3],
        };
        Ok(Self { whose, base, workers, lengths, rates, seeds: options.seeds() })
    }

    /// Finds out what cannot be run before anything is.
    fn check(&self) -> anyhow::Result<()> {
        for &evaluations in &self.lengths {
            for reference in self.references() {
                let workers = reference.workers;
                ensure!(
                    evaluations.is_multiple_of(u64::from(workers)),
                    UsageError(format!(
                        "{} cannot be made in whole steps of {workers} workers together; give other --steps or --workers",
                        counted(evaluations, "gradient evaluation")
                    ))
                );
                self.reference(reference, self.rates[0], evaluations, self.seeds[0])?;
                if workers > 1 {
                    self.ours(workers, evaluations, self.seeds[0])?;
                }
            }
        }
        Ok(())
    }

    /// Everyone's AdamW with the short warm-up, which one worker has in any case.
    fn references(&self) -> Vec<Reference> {
        let workers = std::iter::once(1).chain(self.workers.iter().copied());
        workers.map(|workers| Reference { workers, warmup: Warmup::Short }).collect()
    }

    /// The base with so many workers, and of so many gradient evaluations.
    fn settings(&self, workers: u32, evaluations: u64, seed: u64) -> RunPartial {
        let mut settings = self.base.settings.clone();
        (settings.run.workers, settings.run.seed) = (Some(workers), Some(seed));
        settings.training.steps = Some(evaluations);
        settings.training.eval_every = Some(look_every(evaluations, LOOKS));
        settings
    }

    /// AdamW, where so many workers make a step together.
    fn reference(
        &self,
        reference: Reference,
        rate: f64,
        evaluations: u64,
        seed: u64,
    ) -> anyhow::Result<Spec> {
        let Reference { workers, warmup } = reference;
        let mut settings = self.settings(workers, evaluations, seed);
        settings.training.learning_rate = Some(rate);
        // What else there is of a method's rates is not AdamW's.
        (settings.training.learning_rate_max, settings.training.local_rate) = (None, None);
        // Warm-ups count exchanges, which are as many gradients each.
        let local_steps = u64::from(settings.training.local_steps.take().unwrap_or(1));
        let mut spec = self.base.spec(settings, Trainer::AdamW)?;
        let training = &mut spec.training;
        training.warmup_steps = local_steps
            * match warmup {
                Warmup::Short => training.warmup_steps,
                Warmup::Long => training.warmup_exchanges * u64::from(workers),
            };
        Ok(spec)
    }

    /// Whether asynchronous workers have a warm-up that grows with their number.
    fn warms_up_by_exchanges(&self) -> anyhow::Result<bool> {
        let spec = self.ours(self.workers[0], self.lengths[0], self.seeds[0])?;
        Ok(spec.training.warmup_exchanges > 0)
    }

    /// The default method, or that of the run file.
    fn ours(&self, workers: u32, evaluations: u64, seed: u64) -> anyhow::Result<Spec> {
        let mut settings = self.settings(workers, evaluations, seed);
        let steps = exchanges(evaluations, settings.training.local_steps.unwrap_or(1))?;
        settings.training.steps = Some(steps);
        settings.training.eval_every = Some(look_every(steps, LOOKS));
        self.base.spec(settings, Trainer::Workers(Conditions::default()))
    }
}

/// AdamW for a number of workers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Reference {
    workers: u32,
    warmup: Warmup,
}

struct Experiment {
    settings: Settings,
    folder: PathBuf,
    jobs: Jobs,
    book: Book<Run>,
}

/// Runs the command.
///
/// # Errors
/// Whatever keeps the experiment from its end, in a sentence.
pub fn recipe(arguments: &Arguments) -> anyhow::Result<()> {
    let options = &arguments.options;
    let mut own = Vec::new();
    own.extend(arguments.config.iter().map(|path| format!("--config {}", typed(path))));
    own.extend(workers_option(&arguments.workers));
    let settings = Settings::new(arguments)?;
    settings.check()?;
    let folder = options.folder("recipe", &own)?;
    let book = Book::open(&folder)?;
    let experiment = Experiment { settings, folder, jobs: options.jobs(), book };
    let started = Instant::now();
    let lines = experiment.lines()?;
    let report = Report { settings: &experiment.settings, lines: &lines, folder: &experiment.folder };
    write_report(&experiment.folder, &report.text(started.elapsed().as_secs_f64())?)
}

/// A row of the table: one trainer with so many workers.
struct Line {
    workers: u32,
    is_reference: bool,
    lengths: Vec<Length>,
}

/// The runs of a row that are of one length.
struct Length {
    /// Of AdamW.
    tuned: Option<Tuned>,
    runs: Vec<Run>,
}

/// What was chosen for AdamW.
#[derive(Clone, Copy)]
struct Tuned {
    reference: Reference,
    rate: f64,
    /// The search gave up there.
    is_at_edge: bool,
}

impl Experiment {
    /// Rate and warm-up of AdamW, by number of workers, for each length. The rates of the first length are those of the settings,
    /// of others those around the one found before; and with the long warm-up those from the short one's best on.
    fn choose(&self) -> anyhow::Result<Vec<Vec<Tuned>>> {
        let settings = &self.settings;
        let mut short: Vec<Tuned> = Vec::new();
        let mut chosen = Vec::new();
        for &steps in &settings.lengths {
            let grid = |reference: &Reference| match short.iter().find(|of| of.reference == *reference) {
                None => settings.rates.clone(),
                Some(before) => [0.5, 1.0, 2.0].map(|by| by * before.rate).to_vec(),
            };
            let of_short = self.tune(settings.references(), steps, grid)?;
            let is_longer = settings.warms_up_by_exchanges()?;
            let several = of_short.iter().filter(|(tuned, _)| is_longer && tuned.reference.workers > 1);
            let long = several.map(|(tuned, _)| Reference { warmup: Warmup::Long, ..tuned.reference });
            let grid = |reference: &Reference| {
                let (short, _) =
                    of_workers(&of_short, reference.workers).expect("both have the same workers");
                vec![short.rate, 2.0 * short.rate]
            };
            let of_long = self.tune(long.collect(), steps, grid)?;
            let better = |&(tuned, loss): &(Tuned, f64)| match of_workers(&of_long, tuned.reference.workers) {
                Some((long, below)) if below < loss => long,
                _ => tuned,
            };
            chosen.push(of_short.iter().map(better).collect());
            short = of_short.into_iter().map(|(tuned, _)| tuned).collect();
        }
        Ok(chosen)
    }

    /// The best rate of each, with its validation loss.
    fn tune(
        &self,
        references: Vec<Reference>,
        steps: u64,
        grid: impl Fn(&Reference) -> Vec<f64>,
    ) -> anyhow::Result<Vec<(Tuned, f64)>> {
        let settings = &self.settings;
        let choosing = Choosing {
            what: "choosing rates and warm-ups of AdamW",
            book: &self.book,
            jobs: self.jobs,
            wanted: &|&reference: &Reference, tried: Tried| {
                Ok((settings.reference(reference, tried.rate, steps, settings.seeds[0])?, steps))
            },
            make: &make,
            score: validation,
        };
        let found =
            choosing.choose(references, |reference| Grid { rates: grid(reference), momenta: vec![0.0] })?;
        let tuned = found.into_iter().map(|Chosen { contestant: reference, search, best }| {
            let tuned = Tuned { reference, rate: best.rate, is_at_edge: search.is_at_edge(best) };
            // One that diverged is below nothing.
            anyhow::Ok((tuned, choosing.score(&reference, best)?.loss))
        });
        tuned.collect()
    }

    /// Makes all runs.
    fn lines(&self) -> anyhow::Result<Vec<Line>> {
        let settings = &self.settings;
        let chosen = self.choose()?;
        let references = settings.references().into_iter().enumerate();
        let rows: Vec<(u32, Option<usize>)> = references
            .map(|(place, reference)| (reference.workers, Some(place)))
            .chain(settings.workers.iter().map(|&workers| (workers, None)))
            .collect();
        let specs = |(workers, reference): (u32, Option<usize>), length: usize| {
            let steps = settings.lengths[length];
            let spec = |&seed: &u64| match reference {
                Some(place) => {
                    let Tuned { reference, rate, .. } = chosen[length][place];
                    settings.reference(reference, rate, steps, seed)
                }
                None => settings.ours(workers, steps, seed),
            };
            settings.seeds.iter().map(spec).collect::<anyhow::Result<Vec<Spec>>>()
        };
        let mut wanted = Vec::new();
        for (length, &steps) in settings.lengths.iter().enumerate() {
            for &row in &rows {
                wanted.extend(specs(row, length)?.into_iter().map(|spec| (spec, steps)));
            }
        }
        self.jobs.make_missing(("running all seeds", EVALUATIONS), &self.book, &wanted, make)?;
        let mut lines = Vec::new();
        for (workers, reference) in rows {
            let mut lengths = Vec::new();
            for (length, chosen) in chosen.iter().enumerate() {
                let runs = specs((workers, reference), length)?;
                let runs =
                    runs.iter().map(|spec| self.book.find(spec).expect("every run was made")).collect();
                lengths.push(Length { tuned: reference.map(|place| chosen[place]), runs });
            }
            let line = Line { workers, is_reference: reference.is_some(), lengths };
            for (length, steps) in line.lengths.iter().zip(&settings.lengths) {
                let name = format!("{} {steps}", line.name());
                write_configuration(&self.folder, &file_name(&name), &length.runs[0].spec)?;
            }
            lines.push(line);
        }
        Ok(lines)
    }
}

fn of_workers(tuned: &[(Tuned, f64)], workers: u32) -> Option<(Tuned, f64)> {
    tuned.iter().find(|(tuned, _)| tuned.reference.workers == workers).copied()
}
