//! The comparison of methods: Table 3 of the paper on DGS, on a language model and on images.

mod report;

use std::path::PathBuf;
use std::time::Instant;

use sanderling_common::method::Method;

use self::report::{Cell, Table};
use super::lab::{
    Book, Choosing, Chosen, EVALUATIONS, Grid, Jobs, MANY, Options, Published, RATES, RATES_OF_MANY, Run,
    Spec, Subject, Trainer, Tried, make, published_grid, seeds_text, validation, write_configuration,
    write_report,
};
use crate::simulation::Conditions;

/// The methods of the paper on DGS, for 1 to 32 workers (its Table 3)
///
/// MSGD on one worker, and ASGD, GD-async, DGC-async and DGS on 1, 4, 8, 16 and 32, on characters of the bundled text
/// and on handwritten digits, both with small mixtures of experts, in virtual time. Every method and number of workers
/// has the same number of gradient evaluations, 8 000 (with --quick 1 200), and the same search for its learning rate
/// (four values or, from 16 workers on, seven, and further ones while the best lies at an edge) and, where it has one,
/// its momentum: by validation, with the first seed, at a quarter of the length. Then all seeds are run with what was
/// found, and tested. Finished runs are kept in the folder and not made again.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  sanderling reproduce methods --quick          # minutes: up to 8 workers, one seed
  sanderling reproduce methods                  # an hour and a half on two cores
  sanderling reproduce methods --out DIR        # the same folder from several shells: they share the work")]
pub struct Arguments {
    /// Only one task [default: both]
    #[arg(long)]
    subject: Option<Subject>,
    /// What all reproductions take.
    #[command(flatten)]
    options: Options,
}

/// In the order of the paper's claim.
const METHODS: [Method; 4] = [Method::Asgd, Method::GdAsync, Method::DgcAsync, Method::Dgs];

/// The paper lowers DGS's momentum from the second to the first for 32 workers.
const MOMENTA_COMPARED: [f32; 2] = [0.3, 0.7];

/// Points of a curve.
const LOOKS: u64 = 16;

/// What is compared with what.
struct Settings {
    subjects: Vec<Subject>,
    workers: Vec<u32>,
    /// Gradient evaluations of a run that chooses, and of one that counts.
    choosing: u64,
    counting: u64,
    momenta: Vec<f32>,
    seeds: Vec<u64>,
}

impl Settings {
    fn new(options: &Options, subject: Option<Subject>) -> Self {
        let (quick, counting) = (options.quick, options.steps(8000, 1200));
        Self {
            subjects: subject.map_or(vec![Subject::Text, Subject::Digits], |subject| vec![subject]),
            workers: if quick { vec![1, 4, 8] } else { vec![1, 4, 8, 16, 32] },
            choosing: (counting / 4).max(1),
            counting,
            momenta: if quick { vec![0.3, 0.7] } else { vec![0.3, 0.5, 0.7, 0.9] },
            seeds: options.seeds(),
        }
    }

    fn contestants(&self) -> Vec<Contestant> {
        let mut all = Vec::new();
        for &subject in &self.subjects {
            all.push(Contestant { subject, method: Method::Msgd, workers: 1 });
            for method in METHODS {
                all.extend(self.workers.iter().map(|&workers| Contestant { subject, method, workers }));
            }
        }
        all
    }

    fn grid(&self, &Contestant { method, workers, .. }: &Contestant) -> Grid {
        published_grid(method, workers, &self.momenta)
    }
}

/// What has a cell in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Contestant {
    subject: Subject,
    method: Method,
    workers: u32,
}

impl Contestant {
    fn spec(self, tried: Tried, steps: u64, seed: u64) -> anyhow::Result<Spec> {
        let Self { subject, method, workers } = self;
        let published =
            Published { subject, method, workers, tried, sections: "", steps, looks: LOOKS, seed };
        let run = published.run()?;
        Ok(Spec::of(subject, &run, Trainer::Workers(Conditions::default())))
    }
}

type Choice = Chosen<Contestant>;

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
pub fn methods(arguments: &Arguments) -> anyhow::Result<()> {
    let options = &arguments.options;
    let only = arguments.subject.map(|subject| format!("--subject {}", subject.option()));
    let folder = options.folder("methods", only.as_slice())?;
    let book = Book::open(&folder)?;
    let settings = Settings::new(options, arguments.subject);
    let experiment = Experiment { settings, folder, jobs: options.jobs(), book };
    let started = Instant::now();
    let mut cells = experiment.choose()?;
    experiment.count(&mut cells)?;
    let text = experiment.report(&cells, started.elapsed().as_secs_f64())?;
    write_report(&experiment.folder, &text)
}

impl Experiment {
    /// The best rate and momentum of every contestant and, of DGS with the most workers, the best rate of either momentum of
    /// [`MOMENTA_COMPARED`]; nothing is run with them yet.
    fn choose(&self) -> anyhow::Result<Vec<Cell>> {
        let settings = &self.settings;
        let choosing = Choosing {
            what: "choosing rates and momenta",
            book: &self.book,
            jobs: self.jobs,
            wanted: &|contestant: &Contestant, tried| {
                Ok((contestant.spec(tried, settings.choosing, settings.seeds[0])?, settings.choosing))
            },
            make: &make,
            score: validation,
        };
        let choices: Vec<Choice> =
            choosing.choose(settings.contestants(), |contestant| settings.grid(contestant))?;
        let most = settings.workers.last().copied();
        let mut cells = Vec::new();
        for Chosen { contestant, search, best } in &choices {
            let cell = |best, of_momenta| Cell {
                contestant: *contestant,
                best,
                is_at_edge: search.is_at_edge(best),
                is_momentum_at_edge: search.is_momentum_at_edge(best),
                of_momenta,
                runs: Vec::new(),
            };
            cells.push(cell(*best, false));
            if contestant.method == Method::Dgs && Some(contestant.workers) == most {
                for momentum in MOMENTA_COMPARED {
                    let best = search.best_with(momentum, |tried| choosing.score(contestant, tried))?;
                    cells.push(cell(best, true));
                }
            }
        }
        Ok(cells)
    }

    /// All seeds of what was chosen, and the configuration of each contestant.
    fn count(&self, cells: &mut [Cell]) -> anyhow::Result<()> {
        let settings = &self.settings;
        let mut specs = Vec::new();
        for Cell { contestant, best, of_momenta, .. } in &*cells {
            let spec = |&seed: &u64| contestant.spec(*best, settings.counting, seed);
            let of_cell: Vec<Spec> = settings.seeds.iter().map(spec).collect::<Result<_, _>>()?;
            let Contestant { subject, method, workers } = contestant;
            let momentum = if *of_momenta { format!("-m{}", best.momentum) } else { String::new() };
            let name = format!("{}-{method}-{workers}w{momentum}", subject.name());
            write_configuration(&self.folder, &name, &of_cell[0])?;
            specs.push(of_cell);
        }
        let wanted: Vec<_> = specs.iter().flatten().map(|spec| (spec.clone(), spec.training.steps)).collect();
        self.jobs.make_missing(("running all seeds", EVALUATIONS), &self.book, &wanted, make)?;
        for (cell, specs) in cells.iter_mut().zip(&specs) {
            cell.runs = specs.iter().map(|spec| self.book.find(spec).expect("every run was made")).collect();
        }
        Ok(())
    }

    fn report(&self, cells: &[Cell], seconds: f64) -> anyhow::Result<String> {
        let settings = &self.settings;
        let training = &cells[0].runs[0].spec.training;
        let mut text = format!(
            "# The methods of DGS, for 1 to {} workers\n\nEqual gradient evaluations for everyone: {} in a run that counts, {} \
             in one that chooses; {}. 1 % kept up, everything that changed sent down, float32; gradients clipped to norm {}, warm-up \
             over {} updates, the rate {}. In virtual time, workers of uneven speed. Learning rate and momentum are \
             each contestant's own, the best by validation with the first seed; rates {:?}, of {MANY} workers and more also {:?}, and on \
             while the best lies at an edge, momenta {:?}. Runs of one seed share parameters and batches, and are compared with each other.\n",
            settings.workers.last().copied().unwrap_or(1),
            settings.counting,
            settings.choosing,
            seeds_text(&settings.seeds),
            training.clip_norm,
            training.warmup_steps,
            training.decay.describe(training.final_rate_fraction),
            RATES,
            RATES_OF_MANY,
            settings.momenta,
        );
        for &subject in &settings.subjects {
            let cells = cells.iter().filter(|cell| cell.contestant.subject == subject).collect();
            let table = Table { subject, workers: &settings.workers, cells };
            text.push_str(&table.text(&self.folder)?);
        }
        text.push_str(&format!("\nMade in {seconds:.0} s, runs that were there already not counted.\n"));
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_contestant_makes_a_run() {
        let options = Options { quick: true, seeds: None, steps: None, out: None, jobs: None };
        let settings = Settings::new(&options, None);
        let contestants = settings.contestants();
        assert_eq!(contestants.len(), 2 * (1 + 4 * 3));
        for contestant in contestants {
            let tried = Tried { rate: 0.1, momentum: 0.7 };
            let spec = contestant.spec(tried, 100, 7).unwrap();
            assert_eq!(
                (spec.training.method, spec.workers, spec.seed),
                (contestant.method, contestant.workers, 7)
            );
            assert_eq!(spec.exchange.keep, if contestant.method.is_dense() { 1.0 } else { 0.01 });
            assert_eq!((spec.exchange.secondary, spec.training.learning_rate), (1.0, 0.1));
        }
    }
}
