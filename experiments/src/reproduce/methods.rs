//! The comparison of methods: Table 3 of the paper on DGS, on a language model and on images.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::PathBuf;
use std::time::Instant;

use sanderling_common::config::{RunConfig, parse};
use sanderling_common::method::Method;

use super::lab::{
    Book, Choosing, Chosen, EVALUATIONS, Grid, Jobs, Options, Run, Spec, Subject, Trainer, Tried, look_every,
    make, mean_and_spread, mean_curve, plot_both, show, small_model, write_configuration, write_report,
};
use crate::report::Curve;
use crate::simulation::Conditions;
use crate::task::Score;

/// The methods of the paper on DGS, for 1 to 32 workers (its Table 3)
///
/// MSGD on one worker, and ASGD, GD-async, DGC-async and DGS on 1, 4, 8, 16 and 32, on characters of the bundled text and on
/// handwritten digits, both with small mixtures of experts, in virtual time. Every method and number of workers has the same
/// number of gradient evaluations and the same search for its learning rate (four values, and further ones while the best
/// lies at an edge) and, where it has one, its momentum: by validation, with the first seed, at a quarter of the length. Then all
/// seeds are run with what was found, and tested. Finished runs are kept in the folder and not made again.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  sanderling reproduce methods --quick          # minutes: up to 8 workers, one seed
  sanderling reproduce methods                  # hours: the full form
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
    rates: Vec<f64>,
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
            rates: vec![0.05, 0.1, 0.2, 0.4],
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

    fn grid(&self, method: Method) -> Grid {
        let momenta = if has_momentum(method) { self.momenta.clone() } else { vec![0.0] };
        Grid { rates: self.rates.clone(), momenta }
    }
}

fn has_momentum(method: Method) -> bool {
    matches!(method, Method::Msgd | Method::DgcAsync | Method::Dgs)
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
        let file = format!(
            "[run]\nworkers = {workers}\nseed = {seed}\n{}[training]\nmethod = \"{method}\"\nsteps = {steps}\n\
             learning_rate = {:?}\nlearning_rate_max = {:?}\nmomentum = {:?}\neval_every = {}\n",
            small_model(subject),
            tried.rate,
            tried.rate,
            tried.momentum,
            look_every(steps, LOOKS),
        );
        let run: RunConfig = parse(&file)?.resolve()?;
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
    let folder = options.folder("methods");
    let book = Book::open(&folder)?;
    let experiment = Experiment {
        settings: Settings::new(options, arguments.subject),
        folder,
        jobs: options.jobs(),
        book,
    };
    let started = Instant::now();
    let choices = experiment.choose()?;
    experiment.count(&choices)?;
    let text = experiment.report(&choices, started.elapsed().as_secs_f64())?;
    write_report(&experiment.folder, &text)
}

impl Experiment {
    fn run_all(&self, what: &'static str, specs: Vec<Spec>) -> anyhow::Result<()> {
        let wanted: Vec<_> = specs.into_iter().map(|spec| (spec.clone(), spec.training.steps)).collect();
        self.jobs.make_missing((what, EVALUATIONS), &self.book, &wanted, make)
    }

    /// The run that tries a point.
    fn trial(&self, contestant: Contestant, tried: Tried) -> anyhow::Result<Spec> {
        contestant.spec(tried, self.settings.choosing, self.settings.seeds[0])
    }

    fn score(&self, contestant: Contestant, tried: Tried) -> anyhow::Result<Score> {
        let run = self.book.find(&self.trial(contestant, tried)?);
        Ok(run.expect("the sweep was run").outcome.validation())
    }

    /// The best rate and momentum of every contestant.
    fn choose(&self) -> anyhow::Result<Vec<Choice>> {
        let choosing = Choosing {
            what: "choosing rates and momenta",
            book: &self.book,
            jobs: self.jobs,
            spec: &|&contestant: &Contestant, tried| self.trial(contestant, tried),
        };
        choosing.choose(self.settings.contestants(), |contestant| self.settings.grid(contestant.method))
    }

    fn specs(&self, choice: &Choice) -> anyhow::Result<Vec<Spec>> {
        let spec = |&seed: &u64| choice.contestant.spec(choice.best, self.settings.counting, seed);
        self.settings.seeds.iter().map(spec).collect()
    }

    /// All seeds of what was chosen, and the configuration of each contestant as a run file.
    fn count(&self, choices: &[Choice]) -> anyhow::Result<()> {
        let mut specs = Vec::new();
        for choice in choices {
            let of_choice = self.specs(choice)?;
            let Contestant { subject, method, workers } = choice.contestant;
            let name = format!("{}-{method}-{workers}w", subject.name());
            write_configuration(&self.folder, &name, &of_choice[0])?;
            specs.extend(of_choice);
        }
        self.run_all("running all seeds", specs)
    }

    fn runs(&self, choice: &Choice) -> anyhow::Result<Vec<Run>> {
        let specs = self.specs(choice)?;
        Ok(specs.iter().map(|spec| self.book.find(spec).expect("every run was made")).collect())
    }

    fn report(&self, choices: &[Choice], seconds: f64) -> anyhow::Result<String> {
        let settings = &self.settings;
        let mut text = format!(
            "# The methods of DGS, for 1 to {} workers\n\nEqual gradient evaluations for everyone: {} in a run that counts, {} \
             in one that chooses; {} seed(s) from {} on, mean ± standard deviation. 1 % kept up, everything that changed sent \
             down, float32; gradients clipped to norm 1, warm-up over 100 updates, half a cosine to a tenth. In virtual time, \
             workers of uneven speed. Learning rate and momentum are each contestant's own, the best by validation with the \
             first seed; rates {:?} and on while the best lies at an edge, momenta {:?}.\n",
            settings.workers.last().copied().unwrap_or(1),
            settings.counting,
            settings.choosing,
            settings.seeds.len(),
            settings.seeds[0],
            settings.rates,
            settings.momenta,
        );
        for &subject in &settings.subjects {
            let mut cells = BTreeMap::new();
            for choice in choices.iter().filter(|choice| choice.contestant.subject == subject) {
                let Contestant { method, workers, .. } = choice.contestant;
                cells.insert((method.name(), workers), Cell { best: choice.best, runs: self.runs(choice)? });
            }
            let table = Table { subject, workers: &settings.workers, cells };
            let _ = write!(text, "\n## {}\n\n{}", table.title(), table.scores());
            let _ = write!(text, "\nChosen rates and momenta:\n\n{}", table.choices());
            for picture in table.plots(&self.folder)? {
                let _ = write!(text, "\n{picture}");
            }
            let dgs = choices.iter().filter(|choice| {
                choice.contestant.subject == subject && choice.contestant.method == Method::Dgs
            });
            let momenta = self.momenta(dgs)?;
            let _ = write!(text, "\n### Verdict\n\n{}{momenta}", table.verdict());
        }
        let _ = writeln!(text, "\nMade in {seconds:.0} s, runs that were there already not counted.");
        Ok(text)
    }

    /// Whether momentum must fall as workers rise: the best score of every momentum of DGS.
    fn momenta<'a>(&self, choices: impl Iterator<Item = &'a Choice>) -> anyhow::Result<String> {
        let mut text = String::from(
            "* Lower momentum for more workers (DGS; validation of the runs that choose, the best rate each): ",
        );
        let mut chosen = Vec::new();
        for choice in choices {
            let mut best: BTreeMap<u32, Score> = BTreeMap::new();
            for tried in choice.search.points() {
                let score = self.score(choice.contestant, tried)?;
                let held = best.entry(tried.momentum.to_bits()).or_insert(score);
                if is_better(score, *held) {
                    *held = score;
                }
            }
            let cells: Vec<String> = best
                .iter()
                .map(|(&momentum, score)| format!("m {} {}", f32::from_bits(momentum), show(&[*score])))
                .collect();
            let _ = write!(text, "{} workers: {}; ", choice.contestant.workers, cells.join(", "));
            chosen.push(choice.best.momentum);
        }
        let (first, last) = (chosen.first().copied().unwrap_or(0.0), chosen.last().copied().unwrap_or(0.0));
        let says = if last < first { "held" } else { "did not hold" };
        let _ = writeln!(text, "chosen from {first} down to {last}: **{says}**.");
        Ok(text)
    }
}

fn is_better(a: Score, b: Score) -> bool {
    match (a.accuracy, b.accuracy) {
        (Some(a), Some(b)) => a > b,
        _ => a.loss < b.loss || (a.loss.is_finite() && !b.loss.is_finite()),
    }
}

/// The runs of one contestant.
struct Cell {
    best: Tried,
    runs: Vec<Run>,
}

impl Cell {
    fn scores(&self) -> Vec<Score> {
        self.runs.iter().map(|run| run.outcome.test).collect()
    }

    /// Larger is better: accuracy in per cent, or the loss with its sign turned.
    fn merit(&self) -> (f64, f64) {
        let merit = |score: &Score| score.accuracy.map_or(-score.loss, |accuracy| 100.0 * accuracy);
        let merits: Vec<f64> = self.scores().iter().map(merit).collect();
        let (mean, spread) = mean_and_spread(&merits);
        (if mean.is_finite() { mean } else { f64::NEG_INFINITY }, spread)
    }
}

/// What there is to say of one subject.
struct Table<'a> {
    subject: Subject,
    workers: &'a [u32],
    cells: BTreeMap<(&'static str, u32), Cell>,
}

impl Table<'_> {
    fn title(&self) -> &'static str {
        match self.subject {
            Subject::Text => "Characters of the bundled text: test loss, nats",
            Subject::Digits => "Handwritten digits: test accuracy, per cent",
        }
    }

    fn cell(&self, method: Method, workers: u32) -> Option<&Cell> {
        self.cells.get(&(method.name(), workers))
    }

    fn grid(&self, show: impl Fn(&Cell) -> String) -> String {
        let mut text = String::from(
            "| workers | msgd | asgd | gd-async | dgc-async | dgs |\n| --- | --- | --- | --- | --- | --- |\n",
        );
        for &workers in self.workers {
            let _ = write!(text, "| {workers} |");
            for method in std::iter::once(Method::Msgd).chain(METHODS) {
                let _ = write!(text, " {} |", self.cell(method, workers).map_or(String::new(), &show));
            }
            text.push('\n');
        }
        text
    }

    fn scores(&self) -> String {
        self.grid(|cell| show(&cell.scores()))
    }

    fn choices(&self) -> String {
        self.grid(|cell| match cell.runs[0].spec.training.method {
            method if has_momentum(method) => format!("{}, m {}", cell.best.rate, cell.best.momentum),
            _ => cell.best.rate.to_string(),
        })
    }

    /// Scores over workers, and the curves of the most workers.
    fn plots(&self, folder: &std::path::Path) -> anyhow::Result<Vec<String>> {
        let name = self.subject.name();
        let y = match self.subject {
            Subject::Text => "test loss, nats per character",
            Subject::Digits => "test accuracy, per cent",
        };
        let over_workers = METHODS.map(|method| Curve {
            name: method.name().to_owned(),
            points: (self.workers.iter())
                .filter_map(|&workers| {
                    let (merit, _) = self.cell(method, workers)?.merit();
                    Some((f64::from(workers), if self.subject == Subject::Text { -merit } else { merit }))
                })
                .collect(),
        });
        let most = self.workers.last().copied().unwrap_or(1);
        let curves = METHODS.map(|method| Curve {
            name: method.name().to_owned(),
            points: self.cell(method, most).map_or(Vec::new(), |cell| mean_curve(&cell.runs)),
        });
        Ok(vec![
            plot_both(
                folder,
                &format!("{name}-workers"),
                &format!("{name}: methods over workers"),
                ("workers", y),
                &over_workers,
            )?,
            plot_both(
                folder,
                &format!("{name}-curves"),
                &format!("{name}: validation loss of {most} workers"),
                ("gradient evaluations", "loss, nats"),
                &curves,
            )?,
        ])
    }

    /// What became of the paper's claims.
    fn verdict(&self) -> String {
        let mut text = String::new();
        let many: Vec<u32> = self.workers.iter().copied().filter(|&workers| workers > 1).collect();
        for pair in METHODS.windows(2) {
            let (worse, better) = (pair[0], pair[1]);
            let mut says = Vec::new();
            for &workers in &many {
                let (Some(a), Some(b)) = (self.cell(better, workers), self.cell(worse, workers)) else {
                    continue;
                };
                says.push(format!("{workers} workers: {}", compare(a.merit(), b.merit())));
            }
            let _ = writeln!(text, "* {better} ≥ {worse}: {}.", says.join(", "));
        }
        if let Some(msgd) = self.cell(Method::Msgd, 1) {
            let differences: Vec<String> = (self.workers.iter())
                .filter_map(|&workers| {
                    let dgs = self.cell(Method::Dgs, workers)?;
                    Some(format!("{workers}: {:+.4}", dgs.merit().0 - msgd.merit().0))
                })
                .collect();
            let unit = if self.subject == Subject::Text { "nats" } else { "points" };
            let _ = writeln!(
                text,
                "* DGS close to MSGD on one worker ({unit} better, by number of workers; the paper: −0.11 to +0.24 points of \
                 accuracy on CIFAR-10): {}.",
                differences.join(", ")
            );
        }
        let falls: Vec<String> = METHODS
            .into_iter()
            .filter_map(|method| {
                let one = self.cell(method, self.workers[0])?.merit().0;
                let most = self.cell(method, *self.workers.last()?)?.merit().0;
                Some(format!("{method} {:+.4}", most - one))
            })
            .collect();
        let most = self.workers.last().copied().unwrap_or(1);
        let _ = writeln!(
            text,
            "* Degradation from one worker to {most} (the paper: most for ASGD, −3.2 points, least for DGS, −0.3): {}.",
            falls.join(", ")
        );
        text
    }
}

/// Whether a first mean is at least a second one, in words; differences within both spreads are ties.
fn compare((a, a_spread): (f64, f64), (b, b_spread): (f64, f64)) -> &'static str {
    let noise = a_spread.max(b_spread);
    if (a - b).abs() <= noise {
        "a tie"
    } else if a > b {
        "**held**"
    } else {
        "**did not hold**"
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

    #[test]
    fn words_fit_the_numbers() {
        assert_eq!(compare((-1.5, 0.01), (-1.6, 0.01)), "**held**");
        assert_eq!(compare((-1.6, 0.01), (-1.5, 0.01)), "**did not hold**");
        assert_eq!(compare((93.0, 0.5), (93.4, 0.1)), "a tie");
        assert_eq!(compare((93.0, 0.0), (f64::NEG_INFINITY, 0.0)), "**held**");
    }
}
