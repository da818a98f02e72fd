//! The simulated half of the report: time to a loss.

use std::fmt::Write;

use sanderling_common::corpus::Corpus;
use sanderling_common::method::Method;

use super::super::lab::{
    Book, Choosing, Chosen, EVALUATIONS, Grid, MANY, Published, RATES, RATES_OF_MANY, Run, Spec, Subject,
    Trainer, Tried, counted, file_name, has_momentum, look_every, make, mean_and_spread, plot_both,
    plus_minus, published_grid, seeds_text, show, validation, write_configuration,
};
use super::times::{Time, Times, ratio, reaches, sooner, target};
use super::{Experiment, Half, METHODS, rate_name};
use crate::report::Curve;
use crate::simulation::Conditions;

/// Bytes of a dense float32 exchange of ResNet-18, in one direction.
const RESNET_BYTES: f64 = 4.0 * 11_689_512.0;

/// Looks at the loss in a simulated run; between two, the time to a loss is interpolated.
const LOOKS: u64 = 64;

/// The links, in bits per second.
const LINKS: [f64; 4] = [1e10, 1e9, 1e8, 1e7];

/// What DGS is tried with.
const MOMENTA: [f32; 4] = [0.3, 0.5, 0.7, 0.9];

/// What everyone has in the short form, where nothing is chosen.
const QUICK: Tried = Tried { rate: 0.2, momentum: 0.3 };

/// Who is simulated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Contestant {
    method: Method,
    workers: u32,
}

type Choice = Chosen<Contestant>;

/// How a contestant runs that counts, or one that is tried: over which link, how long, with which seed.
#[derive(Clone, Copy)]
struct Form {
    bits_per_second: Option<f64>,
    steps: u64,
    seed: u64,
}

/// All runs, with what was chosen for them.
struct Simulated<'a> {
    experiment: &'a Experiment<'a>,
    book: Book<Run>,
    choices: Vec<Choice>,
}

impl Experiment<'_> {
    fn steps(&self) -> u64 {
        self.arguments.options.steps(4000, 800)
    }

    /// Evaluations of a run that chooses.
    fn choosing_steps(&self) -> u64 {
        (self.steps() / 4).max(1)
    }

    /// What is tried; a single rate is not widened.
    fn grid(&self, Contestant { method, workers }: Contestant) -> Grid {
        if self.arguments.options.quick {
            let momentum = if has_momentum(method) { QUICK.momentum } else { 0.0 };
            return Grid { rates: vec![QUICK.rate], momenta: vec![momentum] };
        }
        published_grid(method, workers, &MOMENTA)
    }

    /// A simulated run, over a link that takes as long for a dense exchange of its model as the real one for ResNet-18's.
    fn spec(&self, of: Contestant, tried: Tried, form: Form) -> anyhow::Result<Spec> {
        let Contestant { method, workers } = of;
        let sections = if method.is_dense() {
            ""
        } else {
            "[exchange]\nkeep = 0.01\nsecondary = 0.01\nvalues_down = \"f32\"\n"
        };
        let Form { bits_per_second, steps, seed } = form;
        let subject = Subject::Text;
        let run = Published { subject, method, workers, tried, sections, steps, looks: LOOKS, seed }.run()?;
        let parameters = run.model_config(Corpus::bundled().vocabulary().len()).layout()?.len() as f64;
        let link_bytes = bits_per_second.map_or(0.0, |bits_per_second| {
            let bytes_per_step = bits_per_second / 8.0 * self.arguments.compute_ms as f64 / 1e3;
            bytes_per_step * 4.0 * parameters / RESNET_BYTES
        });
        let conditions = Conditions { link_bytes, ..Conditions::default() };
        Ok(Spec::of(Subject::Text, &run, Trainer::Workers(conditions)))
    }

    /// The rate and momentum of every method and number of workers, over an unlimited link, with the first seed.
    fn choose(&self, book: &Book<Run>) -> anyhow::Result<Vec<Choice>> {
        let form = Form {
            bits_per_second: None,
            steps: self.choosing_steps(),
            seed: self.arguments.options.seeds()[0],
        };
        let choosing = Choosing {
            what: if self.arguments.options.quick { "simulating" } else { "choosing rates and momenta" },
            book,
            jobs: self.arguments.options.jobs(),
            wanted: &|&of: &Contestant, tried| Ok((self.spec(of, tried, form)?, form.steps)),
            make: &make,
            score: validation,
        };
        let of = |&method| self.workers.iter().map(move |&workers| Contestant { method, workers });
        choosing.choose(METHODS.iter().flat_map(of).collect(), |&of| self.grid(of))
    }

    /// Time to a loss, in virtual time.
    pub(super) fn simulated(&self) -> anyhow::Result<Half> {
        let book = Book::<Run>::open(&self.folder.join("simulated"))?;
        let choices = self.choose(&book)?;
        let simulated = Simulated { experiment: self, book, choices };
        simulated.run_all()?;
        simulated.half()
    }
}

impl Simulated<'_> {
    fn choice(&self, method: Method, workers: u32) -> &Choice {
        let is_it = |choice: &&Choice| choice.contestant == Contestant { method, workers };
        self.choices.iter().find(is_it).expect("all have chosen")
    }

    /// One run per seed.
    fn specs(&self, method: Method, workers: u32, bits_per_second: f64) -> anyhow::Result<Vec<Spec>> {
        let choice = self.choice(method, workers);
        let spec = |seed| {
            let form = Form { bits_per_second: Some(bits_per_second), steps: self.experiment.steps(), seed };
            self.experiment.spec(choice.contestant, choice.best, form)
        };
        self.experiment.arguments.options.seeds().into_iter().map(spec).collect()
    }

    fn all_specs(&self) -> anyhow::Result<Vec<Spec>> {
        let mut all = Vec::new();
        for method in METHODS {
            for rate in LINKS {
                for &workers in self.experiment.workers {
                    all.extend(self.specs(method, workers, rate)?);
                }
            }
        }
        Ok(all)
    }

    /// Makes all runs that count, and writes down what they are.
    fn run_all(&self) -> anyhow::Result<()> {
        for method in METHODS {
            for &workers in self.experiment.workers {
                for rate in LINKS {
                    let specs = self.specs(method, workers, rate)?;
                    let name = format!("simulated {method} {workers}w {}", rate_name(rate));
                    write_configuration(self.experiment.folder, &file_name(&name), &specs[0])?;
                }
            }
        }
        let wanted: Vec<_> =
            self.all_specs()?.into_iter().map(|spec| (spec, self.experiment.steps())).collect();
        let jobs = self.experiment.arguments.options.jobs();
        jobs.make_missing(("simulating", EVALUATIONS), &self.book, &wanted, make)
    }

    fn run(&self, spec: &Spec) -> Run {
        self.book.find(spec).expect("it was simulated")
    }

    /// A loss that all runs reach that come to anything.
    fn target(&self) -> anyhow::Result<Option<f64>> {
        let runs: Vec<Run> = self.all_specs()?.iter().map(|spec| self.run(spec)).collect();
        let come_to_an_end = runs.iter().filter(|run| run.outcome.diverged.is_none());
        Ok(target(come_to_an_end.map(|run| run.outcome.curve.as_slice())))
    }

    /// Seconds of virtual time until the loss is reached.
    fn times(&self, method: Method, workers: u32, rate: f64, target: f64) -> anyhow::Result<Times> {
        let seconds_per_step = self.experiment.arguments.compute_ms as f64 / 1e3;
        let time = |spec: &Spec| {
            let outcome = self.run(spec).outcome;
            if outcome.diverged.is_some() {
                return Time::Diverged;
            }
            let reached = reaches(&outcome.curve, target);
            reached.map_or(Time::NotReached, |time| Time::Reached(time * seconds_per_step))
        };
        Ok(Times(self.specs(method, workers, rate)?.iter().map(time).collect()))
    }

    fn half(&self) -> anyhow::Result<Half> {
        let Some(target) = self.target()? else {
            return Ok(Half {
                text: "\n## Time to a loss, simulated\n\nRuns learned too little, or nothing, for a loss that all could \
                       reach; longer ones (--steps) may.\n"
                    .to_owned(),
                verdict: "* DGS workers reach the loss sooner than as many of ASGD: there was none to be reached.\n"
                    .to_owned(),
            });
        };
        let mut text = self.introduction(target)?;
        text.push_str(&self.choices_table());
        let mut verdict = String::new();
        for rate in LINKS {
            let (table, curves) = self.table(rate, target)?;
            let title = format!("Time to a loss of {target} at {}", rate_name(rate));
            let name = file_name(&format!("time {}", rate_name(rate)));
            let picture = plot_both(self.experiment.folder, &name, &title, ("workers", "seconds"), &curves)?;
            let _ = write!(text, "\n{table}{}\n{picture}", self.skipped_text(rate)?);
            let most = self.experiment.most();
            let of = |method| self.times(method, most, rate, target);
            verdict.push_str(&sooner(&rate_name(rate), most, &of(Method::Asgd)?, &of(Method::Dgs)?));
        }
        Ok(Half { text, verdict })
    }

    fn introduction(&self, target: f64) -> anyhow::Result<String> {
        let experiment = self.experiment;
        let training = &self.all_specs()?[0].training;
        let (steps, seeds) = (experiment.steps(), experiment.arguments.options.seeds());
        let looks = look_every(steps, LOOKS);
        Ok(format!(
            "\n## Time to a validation loss of {target}, simulated\n\nSeconds of virtual time, {steps} gradient evaluations at \
             most, {}; a link that carries the small model's dense exchange as fast \
             as the stated one carries ResNet-18's. The loss is looked at every {looks} evaluations, and the time interpolated \
             between two looks. The loss to be reached is the worst of all runs' best, but for those that diverged or learned \
             nothing. Updates per second, and the loss at the end, are those of whole runs. The learning rate {} for everyone. \
             {}\n\n",
            seeds_text(&seeds),
            training.decay.describe(training.final_rate_fraction),
            self.how_chosen(),
        ))
    }

    /// How rates and momenta were come by.
    fn how_chosen(&self) -> String {
        if self.experiment.arguments.options.quick {
            return format!(
                "In this short form nothing is chosen: the rate is {} for everyone, DGS's momentum {}.",
                QUICK.rate, QUICK.momentum
            );
        }
        format!(
            "Rate and, for DGS, momentum are each one's best by validation over an unlimited link, with the first seed, in runs \
             of {} evaluations: rates {RATES:?}, of {MANY} workers and more also {RATES_OF_MANY:?}, and on while the best lies at \
             an edge, momenta {MOMENTA:?}.",
            self.experiment.choosing_steps()
        )
    }

    fn choices_table(&self) -> String {
        let mut text = String::from("| workers | rate of ASGD | of DGS |\n| --- | --- | --- |\n");
        for &workers in self.experiment.workers {
            let [asgd, dgs] = METHODS.map(|method| {
                let Chosen { search, best, .. } = self.choice(method, workers);
                best.cell(has_momentum(method), [search.is_at_edge(*best), search.is_momentum_at_edge(*best)])
            });
            let _ = writeln!(text, "| {workers} | {asgd} | {dgs} |");
        }
        text
    }

    /// Sentences on updates of these runs that did not change the model.
    fn skipped_text(&self, rate: f64) -> anyhow::Result<String> {
        let mut text = String::new();
        for method in METHODS {
            for &workers in self.experiment.workers {
                let name =
                    format!("{method} of {} at {}", counted(u64::from(workers), "worker"), rate_name(rate));
                let runs = self.specs(method, workers, rate)?;
                text.extend(runs.iter().map(|spec| self.run(spec).skipped_text(&name)));
            }
        }
        Ok(text)
    }

    /// Updates per second of whole runs, and the validation loss that they end at.
    fn pace(&self, method: Method, workers: u32, rate: f64) -> anyhow::Result<(String, String)> {
        let seconds_per_step = self.experiment.arguments.compute_ms as f64 / 1e3;
        let specs = self.specs(method, workers, rate)?;
        let outcomes: Vec<_> = specs.iter().map(|spec| self.run(spec).outcome).collect();
        let per_second = outcomes.iter().filter_map(|outcome| {
            let end = outcome.curve.last().filter(|end| end.time > 0.0)?;
            Some(end.steps as f64 / (end.time * seconds_per_step))
        });
        let per_second: Vec<f64> = per_second.collect();
        let ends: Vec<_> = outcomes.iter().map(|outcome| outcome.validation()).collect();
        let pace = if per_second.is_empty() {
            // What the other column says.
            "–".to_owned()
        } else {
            let (mean, spread) = mean_and_spread(&per_second);
            // As many decimals as a thin link's few updates need.
            plus_minus(mean, spread, 3)
        };
        Ok((pace, show(&ends)))
    }

    fn table(&self, rate: f64, target: f64) -> anyhow::Result<(String, [Curve; 2])> {
        let mut text = format!(
            "{}:\n\n| workers | ASGD, s | DGS, s | ASGD / DGS | ASGD, updates/s | DGS | ASGD ends at | DGS |\n{}\n",
            rate_name(rate),
            "| --- ".repeat(8) + "|",
        );
        let seeds = self.experiment.arguments.options.seeds().len();
        let mut points = [Vec::new(), Vec::new()];
        for &workers in self.experiment.workers {
            let asgd = self.times(Method::Asgd, workers, rate, target)?;
            let dgs = self.times(Method::Dgs, workers, rate, target)?;
            let (asgd_pace, asgd_end) = self.pace(Method::Asgd, workers, rate)?;
            let (dgs_pace, dgs_end) = self.pace(Method::Dgs, workers, rate)?;
            let _ = writeln!(
                text,
                "| {workers} | {asgd} | {dgs} | {} | {asgd_pace} | {dgs_pace} | {asgd_end} | {dgs_end} |",
                ratio(&asgd, &dgs, seeds)
            );
            for (points, times) in points.iter_mut().zip([&asgd, &dgs]) {
                let time = times.of_all();
                points.extend(time.map(|time| (f64::from(workers), time.value, Some(time.error))));
            }
        }
        let [asgd, dgs] = points;
        let curves = [(Method::Asgd, asgd), (Method::Dgs, dgs)];
        Ok((text, curves.map(|(method, points)| Curve::of_means(method.name(), points))))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::super::lab::Options;
    use super::super::Arguments;
    use super::*;

    #[test]
    fn the_link_is_as_thin_for_the_small_model_as_for_the_large_one() {
        let options = Options { quick: true, seeds: None, steps: None, out: None, jobs: None };
        let arguments = Arguments {
            compute_ms: 500,
            part: None,
            link: None,
            longest_minutes: None,
            tiny: false,
            options,
        };
        let experiment = Experiment::new(&arguments, Path::new(""));
        let of = Contestant { method: Method::Asgd, workers: 8 };
        let form = Form { bits_per_second: Some(1e9), steps: 800, seed: 7 };
        let spec = experiment.spec(of, Tried { rate: 0.1, momentum: 0.0 }, form).unwrap();
        assert_eq!(spec.seed, 7);
        let Trainer::Workers(conditions) = spec.trainer else { panic!("workers train") };
        // At 1 Gbit/s a dense exchange of ResNet-18 takes 0.374 s, three quarters of a step of half a second.
        let parameters = spec.run().model_config(65).layout().unwrap().len() as f64;
        assert!((4.0 * parameters / conditions.link_bytes - 0.748).abs() < 1e-3, "{conditions:?}");
    }
}
