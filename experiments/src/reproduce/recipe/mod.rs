//! The default method against AdamW on one machine and data-parallel, at equal gradient evaluations.

mod report;

use std::path::PathBuf;
use std::time::Instant;

use sanderling_common::config::{RunConfig, parse};

use self::report::Report;
use super::lab::{
    Book, Choosing, Chosen, EVALUATIONS, Grid, Jobs, Options, Run, SMALL_MODEL_RATE, Spec, Subject, Trainer,
    Tried, Warmup, file_name, look_every, make, small_model, validation, write_configuration, write_report,
};
use crate::simulation::Conditions;

/// The default method, for 4 to 32 workers, against AdamW on one worker and data-parallel AdamW
///
/// The default model and method, one setting for every number of workers, 1 % sent up and 5 % down with 8 bits, in virtual time;
/// and AdamW at the same number of gradient evaluations: on one worker, and data-parallel, where N workers make one step of N
/// batches together. AdamW has the best of at least four learning rates for each number of workers, and of the rates around it for
/// longer runs, and the better of two warm-ups, by validation with the first seed; weight decay is 0 for everyone. With --quick a
/// small model, with the rates that suit it, and three rates of AdamW. Finished runs are kept in the folder and not made again.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  sanderling reproduce recipe --quick
  sanderling reproduce recipe --out DIR    # the same folder from several shells: they share the work")]
pub struct Arguments {
    /// What all reproductions take.
    #[command(flatten)]
    options: Options,
}

/// Points of a curve.
const LOOKS: u64 = 16;

struct Settings {
    /// Sections of the run file.
    model: &'static str,
    /// What the run file says of training by the default method, beside its length.
    ours: String,
    /// Of the default method.
    workers: Vec<u32>,
    /// Gradient evaluations, ascending.
    lengths: Vec<u64>,
    /// Of AdamW for the first of the lengths, ascending.
    rates: Vec<f64>,
    seeds: Vec<u64>,
}

impl Settings {
    fn new(options: &Options) -> Self {
        if options.quick {
            Self {
                model: small_model(Subject::Text),
                ours: format!("learning_rate = {SMALL_MODEL_RATE:?}\n"),
                workers: vec![4, 8],
                lengths: vec![options.steps(0, 600)],
                rates: vec![2e-3, 4e-3, 8e-3],
                seeds: options.seeds(),
            }
        } else {
            Self {
                model: "",
                ours: String::new(),
                workers: vec![4, 8, 16, 32],
                lengths: options.steps.map_or(vec![8_000, 16_000], |steps| vec![steps]),
                rates: vec![5e-4, 1e-3, 2e-3, 4e-3],
                seeds: options.seeds(),
            }
        }
    }

    /// Everyone's AdamW with the short warm-up, which one worker has in any case.
    fn references(&self) -> Vec<Reference> {
        let workers = std::iter::once(1).chain(self.workers.iter().copied());
        workers.map(|workers| Reference { workers, warmup: Warmup::Short }).collect()
    }

    fn run(&self, workers: u32, steps: u64, seed: u64, training: &str) -> anyhow::Result<RunConfig> {
        let eval_every = look_every(steps, LOOKS);
        let file = format!(
            "{}[run]\nworkers = {workers}\nseed = {seed}\n[training]\nsteps = {steps}\neval_every = {eval_every}\n{training}",
            self.model
        );
        Ok(parse(&file)?.resolve()?)
    }

    /// AdamW, where so many workers make a step together.
    fn reference(&self, reference: Reference, rate: f64, steps: u64, seed: u64) -> anyhow::Result<Spec> {
        let Reference { workers, warmup } = reference;
        let mut run = self.run(workers, steps, seed, &format!("learning_rate = {rate:?}\n"))?;
        if warmup == Warmup::Long {
            run.training.warmup_steps = run.training.warmup_exchanges * u64::from(workers);
        }
        Ok(Spec::of(Subject::Text, &run, Trainer::AdamW))
    }

    /// The default method.
    fn ours(&self, workers: u32, steps: u64, seed: u64) -> anyhow::Result<Spec> {
        let run = self.run(workers, steps, seed, &self.ours)?;
        Ok(Spec::of(Subject::Text, &run, Trainer::Workers(Conditions::default())))
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
    let folder = options.folder("recipe")?;
    let book = Book::open(&folder)?;
    let experiment = Experiment { settings: Settings::new(options), folder, jobs: options.jobs(), book };
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
            let several = of_short.iter().filter(|(tuned, _)| tuned.reference.workers > 1);
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
