//! Thin links: Figures 5 and 6 of the paper on DGS.

mod children;
mod link;
mod measure;
mod synthetic;

use std::fmt::Write;
use std::path::Path;
use std::time::Instant;

use anyhow::ensure;
use sanderling_common::config::{RunConfig, parse};
use sanderling_common::corpus::Corpus;
use sanderling_common::method::Method;
use sanderling_server::progress::bytes;

pub use children::{ServerArguments, WorkersArguments, join, serve};

use self::link::Kind;
use self::measure::{Measured, Setup, measure};
use super::lab::{
    Book, Choosing, Chosen, EVALUATIONS, Grid, Jobs, Options, Run, Spec, Subject, Trainer, Tried, look_every,
    make, plot_both, small_model, validation, write_report,
};
use crate::report::Curve;
use crate::simulation::Conditions;
use crate::work::Unit;

/// Updates per second and time to a loss over thin links, for ASGD and DGS (Figures 5 and 6)
///
/// Updates per second are measured: one server and up to 16 workers over real QUIC, on the two ends of a link that is limited
/// to 1 Gbit/s, 100 and 10 Mbit/s in each direction, with a model of ResNet-18's size. Gradients are made up and a step takes a
/// fixed time, so that this machine can stand for seventeen. Where this process may, the link lies between two network namespaces
/// of Linux (root, `ip` and `tc` of iproute2); otherwise a relay in this process limits it, which costs processor time of its
/// own. The time to a loss is simulated: a small model in virtual time, over a link that is as thin for it as the stated one is
/// for ResNet-18, also of 10 Gbit/s; rates and momenta are chosen as in `methods`, over an unlimited link.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  sudo sanderling reproduce bandwidth --quick
  sudo sanderling reproduce bandwidth --compute-ms 250
  sanderling reproduce bandwidth --part simulated       # as anybody, with all cores")]
pub struct Arguments {
    /// What a step of a worker takes
    #[arg(long, default_value_t = 500, value_name = "MS", value_parser = clap::value_parser!(u64).range(1..=3_600_000))]
    compute_ms: u64,
    /// Only one part [default: both]
    #[arg(long)]
    part: Option<Part>,
    /// What all reproductions take; measurements are made one at a time.
    #[command(flatten)]
    options: Options,
}

/// A half of the report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// Updates per second
    Measured,
    /// Time to a loss
    Simulated,
}

const METHODS: [Method; 2] = [Method::Asgd, Method::Dgs];

/// Bytes of a dense float32 exchange of ResNet-18, in one direction.
const RESNET_BYTES: f64 = 4.0 * 11_689_512.0;

/// Looks at the loss in a simulated run: what the time to a loss is exact to.
const LOOKS: u64 = 64;

/// Runs the command.
///
/// # Errors
/// Whatever keeps the experiment from its end, in a sentence.
pub fn bandwidth(arguments: &Arguments) -> anyhow::Result<()> {
    let options = &arguments.options;
    let folder = options.folder("bandwidth")?;
    let started = Instant::now();
    let workers: &[u32] = if options.quick { &[1, 8] } else { &[1, 2, 4, 8, 16] };
    let experiment = Experiment { arguments, folder: &folder, workers, link: Kind::best() };
    let mut text = format!(
        "# Thin links\n\nASGD sends everything both ways; DGS 1 % up and 1 % down (m = 0.7), as published but for the encoding. A \
         step takes {} ms.\n",
        arguments.compute_ms
    );
    if arguments.part != Some(Part::Simulated) {
        text.push_str(&experiment.measured()?);
    }
    if arguments.part != Some(Part::Measured) {
        text.push_str(&experiment.simulated()?);
    }
    let _ = writeln!(
        text,
        "\nMade in {:.0} s, what was there already not counted.",
        started.elapsed().as_secs_f64()
    );
    write_report(&folder, &text)
}

/// Who is simulated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Contestant {
    method: Method,
    workers: u32,
}

struct Experiment<'a> {
    arguments: &'a Arguments,
    folder: &'a Path,
    workers: &'a [u32],
    link: Kind,
}

fn rate_name(bits_per_second: f64) -> String {
    if bits_per_second >= 1e9 {
        format!("{:.0} Gbit/s", bits_per_second / 1e9)
    } else {
        format!("{:.0} Mbit/s", bits_per_second / 1e6)
    }
}

impl Experiment<'_> {
    fn setup(&self, method: Method, workers: u32, bits_per_second: f64) -> Setup {
        let quick = self.arguments.options.quick;
        Setup {
            method,
            workers,
            bits_per_second,
            compute_ms: self.arguments.compute_ms,
            link: self.link,
            seconds_min: if quick { 8.0 } else { 20.0 },
            updates_min: if quick { 6 } else { 20 },
            seconds_max: if quick { 60.0 } else { 300.0 },
        }
    }

    /// Updates per second over a real link.
    fn measured(&self) -> anyhow::Result<String> {
        let link = match self.link {
            Kind::Namespaces => "Between two network namespaces of Linux, limited by `tc tbf`.",
            Kind::Relay => {
                "Over a relay in one process, which shares the processor with server and workers and is itself a limit at high \
                 rates: this process may not make network namespaces (Linux, root, `ip` and `tc`)."
            }
        };
        let mut text = format!("\n## Updates per second, measured over QUIC\n\n{link}\n\n");
        let rates: &[f64] = if self.arguments.options.quick { &[1e9, 1e8] } else { &[1e9, 1e8, 1e7] };
        let book = Book::<Measured>::open(&self.folder.join("measured"))?;
        let all = METHODS.iter().flat_map(|&method| {
            rates.iter().flat_map(move |&rate| {
                self.workers.iter().map(move |&workers| self.setup(method, workers, rate))
            })
        });
        let wanted: Vec<_> = all.map(|setup| (setup, 1)).collect();
        // One at a time: they share the machine.
        Jobs(1).make_missing(("measuring", Unit::Count("measurements")), &book, &wanted, measure)?;
        let find =
            |method, workers, rate| book.find(&self.setup(method, workers, rate)).expect("it was measured");
        for &rate in rates {
            let _ = write!(
                text,
                "{}:\n\n| workers | ASGD | × one worker | DGS | × one worker | DGS / ASGD | bytes per DGS update up, down |\n\
                 | --- | --- | --- | --- | --- | --- | --- |\n",
                rate_name(rate)
            );
            let one = METHODS.map(|method| find(method, 1, rate).updates_per_second());
            for &workers in self.workers {
                let [asgd, dgs] = METHODS.map(|method| find(method, workers, rate));
                let (a, d) = (asgd.updates_per_second(), dgs.updates_per_second());
                let per = |sent: u64| bytes(sent / dgs.updates.max(1));
                let _ = writeln!(
                    text,
                    "| {workers} | {a:.3} | {:.2} | {d:.3} | {:.2} | {:.2} | {}, {} |",
                    a / one[0],
                    d / one[1],
                    d / a,
                    per(dgs.bytes_up),
                    per(dgs.bytes_down),
                );
            }
            let curves: Vec<Curve> = METHODS
                .iter()
                .map(|&method| Curve {
                    name: method.name().to_owned(),
                    points: (self.workers.iter())
                        .map(|&workers| {
                            (f64::from(workers), find(method, workers, rate).updates_per_second())
                        })
                        .collect(),
                })
                .collect();
            let name = format!("updates-{}", rate_name(rate).replace([' ', '/'], "-").to_lowercase());
            let title = format!("Updates per second at {}", rate_name(rate));
            let picture = plot_both(self.folder, &name, &title, ("workers", "updates per second"), &curves)?;
            let _ = write!(text, "\n{picture}\n");
        }
        if let (Some(&most), true) = (self.workers.last(), rates.contains(&1e9)) {
            let speed_up = find(Method::Dgs, most, 1e9).updates_per_second()
                / find(Method::Dgs, 1, 1e9).updates_per_second();
            let ratio = find(Method::Dgs, 8, 1e9).updates_per_second()
                / find(Method::Asgd, 8, 1e9).updates_per_second();
            let _ = writeln!(
                text,
                "At 1 Gbit/s {most} DGS workers make {speed_up:.1} times the updates of one (the paper: 12.6 with 16), and 8 make \
                 {ratio:.1} times those of ASGD (the paper: 5.7 times the speed, with secondary compression)."
            );
        }
        Ok(text)
    }

    fn steps(&self) -> u64 {
        self.arguments.options.steps(4000, 800)
    }

    /// A simulated run, over a link that takes as long for a dense exchange of its model as the real one for ResNet-18's.
    fn spec(&self, of: Contestant, tried: Tried, link: Option<f64>, steps: u64) -> anyhow::Result<Spec> {
        let Contestant { method, workers } = of;
        let compression = if method.is_dense() {
            ""
        } else {
            "[exchange]\nkeep = 0.01\nsecondary = 0.01\nvalues_down = \"f32\"\n"
        };
        let Tried { rate, momentum } = tried;
        let file = format!(
            "{}{compression}[run]\nworkers = {workers}\n[training]\nmethod = \"{method}\"\nsteps = {steps}\neval_every = {}\n\
             learning_rate = {rate:?}\nlearning_rate_max = {rate:?}\nmomentum = {momentum:?}\n",
            small_model(Subject::Text),
            look_every(steps, LOOKS),
        );
        let run: RunConfig = parse(&file)?.resolve()?;
        let parameters = run.model_config(Corpus::bundled().vocabulary().len()).layout()?.len() as f64;
        let link_bytes = link.map_or(0.0, |bits_per_second| {
            let bytes_per_step = bits_per_second / 8.0 * self.arguments.compute_ms as f64 / 1e3;
            bytes_per_step * 4.0 * parameters / RESNET_BYTES
        });
        let conditions = Conditions { link_bytes, ..Conditions::default() };
        Ok(Spec::of(Subject::Text, &run, Trainer::Workers(conditions)))
    }

    /// The rate and momentum of every method and number of workers, over an unlimited link.
    fn choose(&self, book: &Book<Run>) -> anyhow::Result<Vec<Chosen<Contestant>>> {
        let quick = self.arguments.options.quick;
        let grid = |&Contestant { method, .. }: &Contestant| Grid {
            rates: if quick { vec![0.2] } else { vec![0.05, 0.1, 0.2, 0.4] },
            momenta: match method {
                Method::Dgs if quick => vec![0.3],
                Method::Dgs => vec![0.3, 0.7],
                _ => vec![0.0],
            },
        };
        let choosing = Choosing {
            what: "choosing rates and momenta",
            book,
            jobs: self.arguments.options.jobs(),
            wanted: &|&of: &Contestant, tried| {
                let steps = self.steps() / 4;
                Ok((self.spec(of, tried, None, steps)?, steps))
            },
            make: &make,
            score: validation,
        };
        let of = |&method| self.workers.iter().map(move |&workers| Contestant { method, workers });
        choosing.choose(METHODS.iter().flat_map(of).collect(), grid)
    }

    /// Time to a loss, in virtual time.
    fn simulated(&self) -> anyhow::Result<String> {
        let rates = [1e10, 1e9, 1e8, 1e7];
        let book = Book::<Run>::open(&self.folder.join("simulated"))?;
        let choices = self.choose(&book)?;
        let spec = |method, workers, rate| {
            let is_it = |chosen: &&Chosen<Contestant>| chosen.contestant == Contestant { method, workers };
            let chosen = choices.iter().find(is_it).expect("all have chosen");
            self.spec(chosen.contestant, chosen.best, Some(rate), self.steps())
        };
        let mut wanted = Vec::new();
        for method in METHODS {
            for rate in rates {
                for &workers in self.workers {
                    wanted.push((spec(method, workers, rate)?, self.steps()));
                }
            }
        }
        let jobs = self.arguments.options.jobs();
        jobs.make_missing(("simulating", EVALUATIONS), &book, &wanted, make)?;
        let run = |method, workers, rate| -> anyhow::Result<Run> {
            Ok(book.find(&spec(method, workers, rate)?).expect("it was simulated"))
        };
        // A loss that all of them reach: the worst of their best, a little above it.
        let mut target = f64::NEG_INFINITY;
        for (spec, _) in &wanted {
            let best = book.find(spec).expect("it was simulated").outcome.curve;
            target = target.max(best.iter().map(|point| point.score.loss).fold(f64::INFINITY, f64::min));
        }
        ensure!(target.is_finite(), "a simulated run came to nothing");
        let target = (target * 100.0).ceil() / 100.0;
        let seconds_per_step = self.arguments.compute_ms as f64 / 1e3;
        let time = |run: &Run| {
            let reached = run.outcome.curve.iter().find(|point| point.score.loss <= target);
            reached.map_or(f64::NAN, |point| point.time * seconds_per_step)
        };
        let mut text = format!(
            "\n## Time to a validation loss of {target}, simulated\n\nSeconds of virtual time, {} gradient evaluations at most; a link \
             that carries the small model's dense exchange as fast as the stated one carries ResNet-18's. Rate and momentum are \
             each one's best by validation over an unlimited link, in runs of a quarter of the length.\n\n\
             | workers | ASGD | DGS |\n| --- | --- | --- |\n",
            self.steps()
        );
        for &workers in self.workers {
            let of = |method| {
                let chosen =
                    choices.iter().find(|chosen| chosen.contestant == Contestant { method, workers });
                chosen.expect("all have chosen").best
            };
            let (asgd, dgs) = (of(Method::Asgd), of(Method::Dgs));
            let _ = writeln!(text, "| {workers} | {} | {}, m {} |", asgd.rate, dgs.rate, dgs.momentum);
        }
        for rate in rates {
            let _ = write!(
                text,
                "\n{}:\n\n| workers | ASGD | DGS | ASGD / DGS |\n| --- | --- | --- | --- |\n",
                rate_name(rate)
            );
            let mut curves =
                METHODS.map(|method| Curve { name: method.name().to_owned(), points: Vec::new() });
            for &workers in self.workers {
                let (asgd, dgs) = (run(Method::Asgd, workers, rate)?, run(Method::Dgs, workers, rate)?);
                let (a, d) = (time(&asgd), time(&dgs));
                let _ = writeln!(text, "| {workers} | {a:.0} | {d:.0} | {:.2} |", a / d);
                curves[0].points.push((f64::from(workers), a));
                curves[1].points.push((f64::from(workers), d));
            }
            let name = format!("time-{}", rate_name(rate).replace([' ', '/'], "-").to_lowercase());
            let title = format!("Time to a loss of {target} at {}", rate_name(rate));
            let _ =
                write!(text, "\n{}", plot_both(self.folder, &name, &title, ("workers", "seconds"), &curves)?);
        }
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_link_is_as_thin_for_the_small_model_as_for_the_large_one() {
        let options = Options { quick: true, seeds: None, steps: None, out: None, jobs: None };
        let arguments = Arguments { compute_ms: 500, part: None, options };
        let experiment =
            Experiment { arguments: &arguments, folder: Path::new(""), workers: &[1], link: Kind::Relay };
        let of = Contestant { method: Method::Asgd, workers: 8 };
        let spec = experiment.spec(of, Tried { rate: 0.1, momentum: 0.0 }, Some(1e9), 800).unwrap();
        let Trainer::Workers(conditions) = spec.trainer else { panic!("workers train") };
        // At 1 Gbit/s a dense exchange of ResNet-18 takes 0.374 s, three quarters of a step of half a second.
        let parameters = spec.run().model_config(65).layout().unwrap().len() as f64;
        assert!((4.0 * parameters / conditions.link_bytes - 0.748).abs() < 1e-3, "{conditions:?}");
    }
}
