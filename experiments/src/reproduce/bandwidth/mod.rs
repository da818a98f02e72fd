//! Thin links: Figures 5 and 6 of the paper on DGS.

mod alone;
mod children;
mod link;
mod measure;
mod measured;
mod seen;
mod setup;
mod simulated;
mod statistics;
mod synthetic;
mod times;
mod verdict;

use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::time::Instant;

use anyhow::Context;
use sanderling_common::method::Method;

pub use children::{ServerArguments, WorkersArguments, join, serve};

use self::link::Kind;
use self::setup::{Limits, Size};
use super::lab::{Options, REPORT, file_name, write_part, write_whole};

/// Updates per second and time to a loss over thin links, for ASGD and DGS (Figures 5 and 6)
///
/// Updates per second are measured: one server and up to 16 workers over real QUIC, on the two ends of a link that is limited
/// to 1 Gbit/s, 100 and 10 Mbit/s in each direction, with a model of ResNet-18's size. Gradients are made up and a step takes a
/// fixed time, so that this machine can stand for seventeen; there are no seeds, and the errors are those of one measurement's
/// blocks. Where this process may, the link lies between two network namespaces of Linux (root, `ip` and `tc` of iproute2);
/// otherwise a relay in this process limits it, which costs processor time of its own. The time to a loss is simulated: a
/// small model in virtual time, over a link that is as thin for it as the stated one is for ResNet-18, also of 10 Gbit/s;
/// rates and momenta are chosen from those of `methods`, over an unlimited link with the first seed, and then run with all of
/// --seeds, in 4 000 gradient evaluations; with --quick in 800, and nothing is chosen. Each part by itself has a report of its
/// own beside README.md, which has both; none is replaced, nor are its pictures, by fewer seeds or another link. The whole form
/// measures for 75 minutes and then simulates; a measurement that fails is a cell without a number, and made again the next
/// time.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  sudo sanderling reproduce bandwidth --quick
  sudo sanderling reproduce bandwidth --compute-ms 250
  sudo sanderling reproduce bandwidth --longest-minutes 40   # also 16 workers of ASGD at 10 Mbit/s
  sanderling reproduce bandwidth --part simulated            # as anybody, with all cores")]
pub struct Arguments {
    /// What a step of a worker takes
    #[arg(long, default_value_t = COMPUTE_MS, value_name = "MS", value_parser = clap::value_parser!(u64).range(1..=3_600_000))]
    compute_ms: u64,
    /// Only one part, whose report is measured.md or simulated.md [default: both]
    #[arg(long)]
    part: Option<Part>,
    /// What limits the link [default: namespaces where this process may make them, otherwise a relay]
    #[arg(long)]
    link: Option<Kind>,
    /// A measurement that would take longer than this is not made [default: 20, with --quick 3]
    #[arg(long, value_name = "MINUTES", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    longest_minutes: Option<u32>,
    /// Measure with a model of next to nothing; for tests.
    #[arg(long, hide = true)]
    tiny: bool,
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

/// Of both parts, of the measured and of the simulated one: they share pictures and configurations.
const REPORTS: [&str; 3] = [REPORT, "measured.md", "simulated.md"];

impl Part {
    /// The file of the report on one part, or on both.
    fn report(part: Option<Self>) -> &'static str {
        match part {
            None => REPORTS[0],
            Some(Self::Measured) => REPORTS[1],
            Some(Self::Simulated) => REPORTS[2],
        }
    }
}

const METHODS: [Method; 2] = [Method::Asgd, Method::Dgs];

/// What a step takes unless the user says otherwise.
const COMPUTE_MS: u64 = 500;

/// A measurement is made shorter, as far as it can be, where it would take longer than this: in the full form, and with
/// --quick.
const USUAL_S: [f64; 2] = [420.0, 90.0];

/// And not made where it would even so take longer than this, unless the user says otherwise.
const LONGEST_MINUTES: [u32; 2] = [20, 3];

/// Runs the command.
///
/// # Errors
/// Whatever keeps the experiment from its end, in a sentence.
pub fn bandwidth(arguments: &Arguments) -> anyhow::Result<()> {
    let options = &arguments.options;
    let of_step =
        (arguments.compute_ms != COMPUTE_MS).then(|| format!("--compute-ms {}", arguments.compute_ms));
    let report = Part::report(arguments.part);
    // What is measured depends on no seeds, so that by itself it replaces nothing of those that are told.
    let of_seeds: &[&str] = if arguments.part == Some(Part::Measured) { &[] } else { &REPORTS };
    let folder = options.folder_of("bandwidth", of_step.as_slice(), of_seeds)?;
    let started = Instant::now();
    let experiment = Experiment::new(arguments, &folder);
    let mut text = format!(
        "# Thin links\n\nASGD sends everything both ways; DGS 1 % up and 1 % down, as published but for the encoding. A step \
         takes {} ms.\n",
        arguments.compute_ms
    );
    let mut verdict = String::new();
    if arguments.part != Some(Part::Simulated) {
        let half = experiment.measured()?;
        text.push_str(&half.text);
        verdict.push_str(&half.verdict);
    }
    if arguments.part != Some(Part::Measured) {
        let half = experiment.simulated()?;
        text.push_str(&half.text);
        verdict.push_str(&half.verdict);
    }
    let _ = write!(text, "\n## Verdict\n\n{verdict}");
    let _ = writeln!(
        text,
        "\nMade in {:.0} s, what was there already not counted.",
        started.elapsed().as_secs_f64()
    );
    write_part(&folder, report, &text)
}

/// A part of the report, and what it says of the claims.
struct Half {
    text: String,
    /// A list.
    verdict: String,
}

struct Experiment<'a> {
    arguments: &'a Arguments,
    folder: &'a Path,
    workers: &'a [u32],
    size: Size,
}

impl<'a> Experiment<'a> {
    fn new(arguments: &'a Arguments, folder: &'a Path) -> Self {
        let workers: &[u32] = if arguments.options.quick { &[1, 8] } else { &[1, 2, 4, 8, 16] };
        let size = if arguments.tiny { Size::Tiny } else { Size::Resnet18 };
        Self { arguments, folder, workers, size }
    }

    fn limits(&self) -> Limits {
        let form = usize::from(self.arguments.options.quick);
        let minutes = self.arguments.longest_minutes.unwrap_or(LONGEST_MINUTES[form]);
        Limits { usual_s: USUAL_S[form], longest_s: 60.0 * f64::from(minutes) }
    }

    /// The most workers.
    fn most(&self) -> u32 {
        self.workers.last().copied().unwrap_or(1)
    }

    /// Writes down what was set up, beside the run files.
    fn write_setup(&self, name: &str, setup: &impl serde::Serialize) -> anyhow::Result<()> {
        let text = serde_json::to_string_pretty(setup).context("a setup has a JSON form")?;
        let folder = self.folder.join("setups");
        fs::create_dir_all(&folder)
            .with_context(|| format!("cannot make the folder {}", folder.display()))?;
        write_whole(&folder.join(format!("{}.json", file_name(name))), &text)
    }
}

fn rate_name(bits_per_second: f64) -> String {
    if bits_per_second >= 1e9 {
        format!("{:.0} Gbit/s", bits_per_second / 1e9)
    } else {
        format!("{:.0} Mbit/s", bits_per_second / 1e6)
    }
}
