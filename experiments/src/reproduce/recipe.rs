//! The default method against AdamW on one machine and data-parallel, at equal gradient evaluations.

use std::fmt::Write;
use std::path::PathBuf;
use std::time::Instant;

use sanderling_common::config::{RunConfig, parse};

use super::lab::{
    Book, Choosing, Chosen, EVALUATIONS, Grid, Jobs, Options, Run, Spec, Subject, Trainer, look_every, make,
    mean_and_spread, mean_curve, plot_both, show, small_model, write_configuration, write_report,
};
use crate::report::Curve;
use crate::simulation::Conditions;
use crate::task::Score;

/// The default method, for 4 to 32 workers, against AdamW on one worker and data-parallel AdamW
///
/// The default model and method, one setting for every number of workers, 1 % sent up and 5 % down with 8 bits, in virtual time;
/// and AdamW at the same number of gradient evaluations: on one worker, and data-parallel, where N workers make one step of N
/// batches together, with the best of at least four learning rates for each number of workers, by validation with the first seed.
/// With --quick a small model. Finished runs are kept in the folder and not made again.
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

/// What is hoped for in the longest runs: how far above one-worker AdamW the loss may lie, by workers.
const GOALS: [(u32, f64); 3] = [(4, 0.02), (16, 0.04), (32, 0.06)];

struct Settings {
    /// Sections of the run file.
    model: &'static str,
    /// Of the default method.
    workers: Vec<u32>,
    /// Gradient evaluations: rates are chosen at the first of the lengths.
    lengths: Vec<u64>,
    /// Of AdamW, ascending.
    rates: Vec<f64>,
    seeds: Vec<u64>,
}

impl Settings {
    fn new(options: &Options) -> Self {
        if options.quick {
            Self {
                model: small_model(Subject::Text),
                workers: vec![4, 8],
                lengths: vec![options.steps(0, 600)],
                rates: vec![2e-3, 4e-3, 8e-3],
                seeds: options.seeds(),
            }
        } else {
            Self {
                model: "",
                workers: vec![4, 8, 16, 32],
                lengths: options.steps.map_or(vec![8_000, 16_000], |steps| vec![steps]),
                rates: vec![5e-4, 1e-3, 2e-3, 4e-3],
                seeds: options.seeds(),
            }
        }
    }

    /// Of AdamW; four workers are measured against one.
    fn references(&self) -> Vec<u32> {
        std::iter::once(1).chain(self.workers.iter().copied().filter(|&workers| workers > 4)).collect()
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
    fn reference(&self, workers: u32, rate: f64, steps: u64, seed: u64) -> anyhow::Result<Spec> {
        let run = self.run(workers, steps, seed, &format!("learning_rate = {rate:?}\n"))?;
        Ok(Spec::of(Subject::Text, &run, Trainer::AdamW))
    }

    /// The default method.
    fn ours(&self, workers: u32, steps: u64, seed: u64) -> anyhow::Result<Spec> {
        let run = self.run(workers, steps, seed, "")?;
        Ok(Spec::of(Subject::Text, &run, Trainer::Workers(Conditions::default())))
    }
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
    let folder = options.folder("recipe");
    let book = Book::open(&folder)?;
    let experiment = Experiment { settings: Settings::new(options), folder, jobs: options.jobs(), book };
    let started = Instant::now();
    let text = experiment.report(&experiment.lines()?, started)?;
    write_report(&experiment.folder, &text)
}

/// A row of the table: one trainer with so many workers, its runs by length.
struct Line {
    /// The rate of AdamW; `None`: the default method.
    rate: Option<f64>,
    workers: u32,
    runs: Vec<Vec<Run>>,
}

impl Line {
    fn name(&self) -> String {
        match (self.rate, self.workers) {
            (None, workers) => format!("asynchronous, {workers}"),
            (Some(_), 1) => "AdamW, 1".to_owned(),
            (Some(_), workers) => format!("data-parallel AdamW, {workers}"),
        }
    }

    fn test(&self, length: usize) -> Vec<Score> {
        self.runs[length].iter().map(|run| run.outcome.test).collect()
    }

    /// Mean and spread of the test loss.
    fn loss(&self, length: usize) -> (f64, f64) {
        mean_and_spread(&self.test(length).iter().map(|score| score.loss).collect::<Vec<_>>())
    }
}

impl Experiment {
    fn choose(&self) -> anyhow::Result<Vec<Chosen<u32>>> {
        let settings = &self.settings;
        let choosing = Choosing {
            what: "choosing the rates of AdamW",
            book: &self.book,
            jobs: self.jobs,
            spec: &|&workers: &u32, tried| {
                settings.reference(workers, tried.rate, settings.lengths[0], settings.seeds[0])
            },
        };
        let grid = |_: &u32| Grid { rates: settings.rates.clone(), momenta: vec![0.0] };
        choosing.choose(settings.references(), grid)
    }

    /// Makes all runs.
    fn lines(&self) -> anyhow::Result<Vec<Line>> {
        let settings = &self.settings;
        let references = self.choose()?;
        let references = references.iter().map(|chosen| (Some(chosen.best.rate), chosen.contestant));
        let rows: Vec<(Option<f64>, u32)> =
            references.chain(settings.workers.iter().map(|&workers| (None, workers))).collect();
        let spec = |(rate, workers): (Option<f64>, u32), steps, seed| match rate {
            Some(rate) => settings.reference(workers, rate, steps, seed),
            None => settings.ours(workers, steps, seed),
        };
        let mut wanted = Vec::new();
        for &steps in &settings.lengths {
            for &row in &rows {
                for &seed in &settings.seeds {
                    wanted.push((spec(row, steps, seed)?, steps));
                }
            }
        }
        self.jobs.make_missing(("running all seeds", EVALUATIONS), &self.book, &wanted, make)?;
        let mut lines = Vec::new();
        for (rate, workers) in rows {
            let mut runs = Vec::new();
            for &steps in &settings.lengths {
                let specs = settings.seeds.iter().map(|&seed| spec((rate, workers), steps, seed));
                let specs: Vec<Spec> = specs.collect::<Result<_, _>>()?;
                runs.push(
                    specs.iter().map(|spec| self.book.find(spec).expect("every run was made")).collect(),
                );
            }
            let line = Line { rate, workers, runs };
            write_configuration(&self.folder, &super::lab::file_name(&line.name()), &line.runs[0][0].spec)?;
            lines.push(line);
        }
        Ok(lines)
    }

    fn report(&self, lines: &[Line], started: Instant) -> anyhow::Result<String> {
        let settings = &self.settings;
        let first = &lines[lines.len() - 1].runs[0][0];
        let mut text = format!(
            "# The default recipe against AdamW\n\nCharacters of the bundled text, {} parameters, {} seed(s) from {} on, mean ± \
             standard deviation, test loss in nats per character. {} gradient evaluations for everyone in a row of the same length: N \
             workers with data-parallel AdamW make a step of N batches together, with the best of the rates {:?} and on, by \
             validation at {} evaluations with the first seed; asynchronous workers each go at their own pace, with the default \
             settings: {} % kept up, {} % down, in virtual time.\n\n| | rate |",
            first.outcome.parameters,
            settings.seeds.len(),
            settings.seeds[0],
            settings.lengths.iter().map(u64::to_string).collect::<Vec<_>>().join(" or "),
            settings.rates,
            settings.lengths[0],
            100.0 * first.spec.exchange.keep,
            100.0 * first.spec.exchange.secondary,
        );
        for steps in &settings.lengths {
            let _ = write!(text, " {steps}: validation | test |");
        }
        text.push_str("\n| --- | --- |");
        text.push_str(&" --- | --- |".repeat(settings.lengths.len()));
        text.push('\n');
        for line in lines {
            let rate = line.rate.map_or("default".to_owned(), |rate| rate.to_string());
            let _ = write!(text, "| {} | {rate} |", line.name());
            for (length, runs) in line.runs.iter().enumerate() {
                let validation: Vec<Score> = runs.iter().map(|run| run.outcome.validation()).collect();
                let _ = write!(text, " {} | {} |", show(&validation), show(&line.test(length)));
            }
            text.push('\n');
        }
        let _ = write!(text, "\n## Verdict\n\n{}", self.verdict(lines));
        for (length, steps) in settings.lengths.iter().enumerate() {
            let curves: Vec<Curve> = lines
                .iter()
                .map(|line| Curve { name: line.name(), points: mean_curve(&line.runs[length]) })
                .collect();
            let title = format!("AdamW and asynchronous workers, {steps} gradient evaluations");
            let axes = ("gradient evaluations", "validation loss, nats per character");
            let _ = write!(
                text,
                "\n{}",
                plot_both(&self.folder, &format!("curves-{steps}"), &title, axes, &curves)?
            );
        }
        let _ = writeln!(
            text,
            "\nMade in {:.0} s, runs that were there already not counted.",
            started.elapsed().as_secs_f64()
        );
        Ok(text)
    }

    fn verdict(&self, lines: &[Line]) -> String {
        let mut text = String::new();
        let find = |is_ours: bool, workers: u32| {
            lines.iter().find(|line| line.rate.is_none() == is_ours && line.workers == workers)
        };
        let lengths = &self.settings.lengths;
        for (length, steps) in lengths.iter().enumerate() {
            for &workers in &self.settings.workers {
                let (Some(ours), Some(reference)) = (find(true, workers), find(false, workers)) else {
                    continue;
                };
                let ((ours, spread), (theirs, their_spread)) = (ours.loss(length), reference.loss(length));
                let _ = writeln!(
                    text,
                    "* {workers} workers, {steps} evaluations, no worse than data-parallel AdamW: {ours:.4} against {theirs:.4} \
                     (spreads {spread:.4} and {their_spread:.4}): **{}**.",
                    held(ours <= theirs)
                );
            }
        }
        let length = lengths.len() - 1;
        let Some(one) = find(false, 1).map(|line| line.loss(length).0) else { return text };
        for line in lines.iter().filter(|line| line.rate.is_none()) {
            let above = line.loss(length).0 / one - 1.0;
            let goal = GOALS.iter().find(|(workers, _)| *workers == line.workers);
            let says = goal.map_or(String::new(), |(_, goal)| {
                format!(" (at most {:.0} %: **{}**)", 100.0 * goal, held(above <= *goal))
            });
            let _ = writeln!(
                text,
                "* {} workers, {} evaluations, above one-worker AdamW: {:.1} %{says}.",
                line.workers,
                lengths[length],
                100.0 * above,
            );
        }
        text
    }
}

fn held(is_so: bool) -> &'static str {
    if is_so { "held" } else { "did not hold" }
}
