//! Options, tables and pictures of reproductions.

use std::fs::{self, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use sanderling_common::beside::Beside;

use super::book::{CLAIMS, FILE as RESULTS_FILE, key_name};
use super::difference::diverged_of;
use super::jobs::Jobs;
use super::spec::{Outcome, Run, Spec};
use crate::commands::{UsageError, say};
use crate::report::{Curve, plot_curves, without_beginnings};
use crate::simulation::Point;
use crate::task::Score;

/// The first seed; the others follow.
const FIRST_SEED: u64 = 1337;

/// The most gradient evaluations of a run.
pub(in crate::reproduce) const EVALUATIONS_MAX: u64 = 100_000_000;

/// The longest name of a folder that is made of a command, in bytes; longer ones are cut off and end with a hash.
const FOLDER_NAME_MAX: usize = 100;

/// The file of a folder that says whose results it holds.
const WHOSE: &str = "reproduction.txt";

/// How often a file is tried to be written that another process is writing, and how long it is waited for in between.
const WRITES_MAX: u32 = 100;
const WRITE_AGAIN_AFTER: Duration = Duration::from_millis(50);

/// The file with the report.
pub(in crate::reproduce) const REPORT: &str = "README.md";

/// What every reproduction can be told.
#[derive(Debug, clap::Args)]
pub(in crate::reproduce) struct Options {
    /// A short form: fewer steps, seeds and settings
    #[arg(long)]
    pub(in crate::reproduce) quick: bool,
    /// Seeds, from 1337 on [default: 3, with --quick 1]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=100))]
    pub(in crate::reproduce) seeds: Option<u64>,
    /// Gradient evaluations of a run that counts [default: the command's own, see --help]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=EVALUATIONS_MAX))]
    pub(in crate::reproduce) steps: Option<u64>,
    /// Where results go, and are looked for; several processes may share it [default: runs/reproduce-NAME, with the options
    /// that make it another experiment]
    #[arg(long, value_name = "DIR")]
    pub(in crate::reproduce) out: Option<PathBuf>,
    /// Runs at a time [default: one per core]
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(in crate::reproduce) jobs: Option<u16>,
}

impl Options {
    /// Where the results of the reproduction of this name go; made if it is not there. `own` are the options of its own that
    /// make it another experiment, as they are typed.
    ///
    /// # Errors
    /// A sentence, also if the results of another reproduction, or of another form of it, are there: its report would be
    /// replaced.
    pub(in crate::reproduce) fn folder(&self, name: &str, own: &[String]) -> anyhow::Result<PathBuf> {
        self.folder_of(name, own, &[REPORT])
    }

    /// The same, where a report by any of these names may show what would be replaced.
    ///
    /// # Errors
    /// As [`folder`](Self::folder).
    pub(in crate::reproduce) fn folder_of(
        &self,
        name: &str,
        own: &[String],
        reports: &[&str],
    ) -> anyhow::Result<PathBuf> {
        let form = self.form(name, own);
        let folder = match &self.out {
            Some(folder) => folder.clone(),
            None => PathBuf::from(format!("runs/reproduce-{}", folder_name(&form))),
        };
        if folder.exists() && !folder.is_dir() {
            bail!(UsageError(format!("{} is no folder; give another --out", folder.display())));
        }
        fs::create_dir_all(&folder).map_err(|error| {
            UsageError(format!("cannot make the folder {}: {error}; give another --out", folder.display()))
        })?;
        take(&folder, &form)?;
        let told = reports.iter().filter_map(|report| fs::read_to_string(folder.join(report)).ok());
        let (there, seeds) = (told.map(|report| seeds_told(&report)).max().unwrap_or(0), self.seeds().len());
        ensure!(
            seeds >= there,
            UsageError(format!(
                "{} holds a report of {there} seeds, which one of {seeds} would replace; give --seeds {there}, or \
                 another --out",
                folder.display()
            ))
        );
        Ok(folder)
    }

    /// The command, without what only says how often, how fast and where.
    fn form(&self, name: &str, own: &[String]) -> String {
        let mut form = vec![name.to_owned()];
        form.extend(self.quick.then(|| "--quick".to_owned()));
        form.extend(self.steps.map(|steps| format!("--steps {steps}")));
        form.extend(own.iter().cloned());
        form.join(" ")
    }

    pub(in crate::reproduce) fn seeds(&self) -> Vec<u64> {
        let count = self.seeds.unwrap_or(if self.quick { 1 } else { 3 });
        (FIRST_SEED..FIRST_SEED + count).collect()
    }

    /// Gradient evaluations of a run that counts, where `full` and `quick` are this reproduction's own numbers.
    pub(in crate::reproduce) fn steps(&self, full: u64, quick: u64) -> u64 {
        self.steps.unwrap_or(if self.quick { quick } else { full })
    }

    pub(in crate::reproduce) fn jobs(&self) -> Jobs {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Jobs(self.jobs.map_or(cores, usize::from))
    }
}

/// Makes a folder that of this form of a command, if it is nobody's.
fn take(folder: &Path, form: &str) -> anyhow::Result<()> {
    // Looked at first: what another process makes in between, it makes after it has said whose the folder is.
    let foreign = foreign(folder)?;
    let path = folder.join(WHOSE);
    let unusable = || format!("cannot use {}", path.display());
    // Not made where it would say whose something else is.
    let mut file = match OpenOptions::new().read(true).append(true).create(foreign.is_none()).open(&path) {
        Ok(file) => Some(file),
        Err(error) if error.kind() == ErrorKind::NotFound && foreign.is_some() => None,
        Err(error) => return Err(error).with_context(unusable),
    };
    let mut whose = String::new();
    if let Some(file) = &mut file {
        // Of two processes that come at once, the second reads what the first has written.
        file.lock().with_context(unusable)?;
        file.read_to_string(&mut whose).with_context(unusable)?;
    }
    match (whose.trim(), foreign, file) {
        (whose, ..) if whose == form => Ok(()),
        ("", None, Some(mut file)) => file.write_all(format!("{form}\n").as_bytes()).with_context(unusable),
        ("", None, None) => unreachable!("the file is made where nothing else is"),
        ("", Some(foreign), _) => bail!(UsageError(format!(
            "{} holds {foreign}, and no {WHOSE} that says whose results these are; give another --out, to which \
             {RESULTS_FILE} alone can be copied to go on from",
            folder.display()
        ))),
        (whose, ..) => bail!(UsageError(format!(
            "{} holds the results of `reproduce {whose}`, and not of `reproduce {form}`; give another --out",
            folder.display()
        ))),
    }
}

/// Writes a file whole or not at all, also where several processes write it.
///
/// # Errors
/// If it cannot be written, or another process does not come to an end with it.
pub(in crate::reproduce) fn write_whole(path: &Path, text: &str) -> anyhow::Result<()> {
    let write = || {
        let mut file = Beside::create(path)?;
        file.write_all(text.as_bytes())?;
        file.place()
    };
    let mut written = write();
    for _ in 1..WRITES_MAX {
        let is_busy = |error: &io::Error| error.kind() == ErrorKind::WouldBlock;
        if !written.as_ref().is_err_and(is_busy) {
            break;
        }
        std::thread::sleep(WRITE_AGAIN_AFTER);
        written = write();
    }
    written.with_context(|| format!("cannot write {}", path.display()))
}

/// Of how many seeds a report says that it is, in the words of [`seeds_text`]; 0 if of one, or it does not say.
fn seeds_told(report: &str) -> usize {
    let is_number = |word: &&str| !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_digit());
    let after = report.find(&format!("seeds {FIRST_SEED}, ")).map(|at| &report[at + "seeds ".len()..]);
    after.map_or(0, |after| after.split(", ").take_while(is_number).count())
}

/// Something in a folder of nobody's that results would be mixed with: anything but results that were put there, and what a
/// process that was ended before it said whose they are may have left.
fn foreign(folder: &Path) -> anyhow::Result<Option<String>> {
    let cannot = || format!("cannot look into {}", folder.display());
    let mut found = None;
    for entry in fs::read_dir(folder).with_context(cannot)? {
        let name = entry.with_context(cannot)?.file_name().to_string_lossy().into_owned();
        // The first by name, so that the sentence is the same each time.
        if ![WHOSE, RESULTS_FILE, CLAIMS].contains(&name.as_str())
            && found.as_ref().is_none_or(|there| name < *there)
        {
            found = Some(name);
        }
    }
    Ok(found)
}

/// A look at the validation split takes as long as many steps, so there are at least so many between two.
const STEPS_BETWEEN_LOOKS_MIN: u64 = 8;

/// Gradient evaluations between the looks of a run that is looked at about so many times.
pub(in crate::reproduce) fn look_every(steps: u64, looks: u64) -> u64 {
    (steps / looks).max(STEPS_BETWEEN_LOOKS_MIN.min(steps))
}

/// Mean and sample standard deviation; a single value has none.
pub(in crate::reproduce) fn mean_and_spread(values: &[f64]) -> (f64, Option<f64>) {
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    (mean, (values.len() > 1).then(|| (squares / (count - 1.0)).sqrt()))
}

/// As `1.5634 ± 0.0012`, or without a spread.
pub(in crate::reproduce) fn plus_minus(mean: f64, spread: Option<f64>, decimals: usize) -> String {
    let mean = format!("{mean:.decimals$}").replace('-', "−");
    match spread {
        Some(spread) => format!("{mean} ± {spread:.decimals$}"),
        None => mean,
    }
}

/// Each number of workers once, ascending.
pub(in crate::reproduce) fn distinct(workers: &[u32]) -> Vec<u32> {
    let mut workers = workers.to_vec();
    workers.sort_unstable();
    workers.dedup();
    workers
}

/// A path as it is typed, but for a leading `./`, which makes it no other.
pub(in crate::reproduce) fn typed(path: &Path) -> String {
    path.strip_prefix(".").unwrap_or(path).display().to_string()
}

/// An option with [`distinct`] numbers of workers, as it is typed; none if none were stated.
pub(in crate::reproduce) fn workers_option(workers: &[u32]) -> Option<String> {
    let typed: Vec<String> = distinct(workers).iter().map(u32::to_string).collect();
    (!typed.is_empty()).then(|| format!("--workers {}", typed.join(",")))
}

/// So many of something: `1 worker`, `8 workers`.
pub(in crate::reproduce) fn counted(count: u64, noun: &str) -> String {
    if count == 1 { format!("1 {noun}") } else { format!("{count} {noun}s") }
}

/// Which seeds there are, and what the tables show of them.
pub(in crate::reproduce) fn seeds_text(seeds: &[u64]) -> String {
    let names: Vec<String> = seeds.iter().map(u64::to_string).collect();
    match seeds {
        [_] => format!("seed {}", names[0]),
        _ => format!("seeds {}, mean ± standard deviation", names.join(", ")),
    }
}

/// Scores of several seeds, as a cell of a table: accuracy in per cent where there is one, or else the loss.
pub(in crate::reproduce) fn show(scores: &[Score]) -> String {
    if scores.iter().all(|score| score.accuracy.is_some()) {
        show_values(scores.iter().map(|score| 100.0 * score.accuracy.unwrap_or(f64::NAN)), 2)
    } else {
        show_loss(scores)
    }
}

/// Losses of several seeds, as a cell of a table.
pub(in crate::reproduce) fn show_loss(scores: &[Score]) -> String {
    show_values(scores.iter().map(|score| score.loss), 4)
}

fn show_values(values: impl Iterator<Item = f64>, decimals: usize) -> String {
    let values: Vec<f64> = values.collect();
    let diverged = values.iter().filter(|value| !value.is_finite()).count();
    if diverged > 0 {
        return diverged_of(diverged, values.len());
    }
    let (mean, spread) = mean_and_spread(&values);
    plus_minus(mean, spread, decimals)
}

/// The validation loss over what [`Point::steps`] counts, mean and spread over runs that were looked at at the same places. A run
/// that diverged has no curve, and leaves none to the others.
pub(in crate::reproduce) fn mean_curve<'a>(
    outcomes: impl IntoIterator<Item = &'a Outcome>,
) -> Vec<(f64, f64, Option<f64>)> {
    let curves: Vec<&[Point]> = outcomes.into_iter().map(|outcome| outcome.curve.as_slice()).collect();
    let Some(shortest) = curves.iter().min_by_key(|curve| curve.len()) else { return Vec::new() };
    let at = |(place, point): (usize, &Point)| {
        let losses: Vec<f64> = curves.iter().map(|curve| curve[place].score.loss).collect();
        let (mean, spread) = mean_and_spread(&losses);
        (point.steps as f64, mean, spread)
    };
    // The first point, of the untrained model, would only press the others together.
    shortest.iter().enumerate().skip(1).map(at).collect()
}

/// The same of the seeds of one run, over the gradients that it took: those of its local steps in each update.
pub(in crate::reproduce) fn curve_of(runs: &[Run]) -> Vec<(f64, f64, Option<f64>)> {
    let local_steps = runs.first().map_or(1.0, |run| f64::from(run.spec.training.local_steps));
    let of_updates = mean_curve(runs.iter().map(|run| &run.outcome)).into_iter();
    of_updates.map(|(updates, loss, spread)| (local_steps * updates, loss, spread)).collect()
}

/// Writes a run's resolved configuration: everything as JSON and, of a run that `train` could make too, a run file.
pub(in crate::reproduce) fn write_configuration(
    folder: &Path,
    name: &str,
    spec: &Spec,
) -> anyhow::Result<()> {
    write_resolved(folder, &format!("{name}.json"), &format!("{:#}\n", spec.resolved()))?;
    match spec.run_file(name) {
        Some(run) => write_resolved(folder, &format!("{name}.toml"), &run.to_toml()),
        None => Ok(()),
    }
}

/// Writes a file among the resolved configurations.
pub(in crate::reproduce) fn write_resolved(folder: &Path, name: &str, text: &str) -> anyhow::Result<()> {
    let folder = folder.join("configurations");
    let path = folder.join(name);
    fs::create_dir_all(&folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
    write_whole(&path, text)
}

/// Draws the curves twice, as SVG and as PNG; returns what shows the picture in Markdown.
pub(in crate::reproduce) fn plot_both(
    folder: &Path,
    name: &str,
    title: &str,
    axes: (&str, &str),
    curves: &[Curve],
) -> anyhow::Result<String> {
    for kind in ["svg", "png"] {
        plot_curves(&folder.join(format!("{name}.{kind}")), title, axes, curves)?;
    }
    Ok(format!("![{title}]({name}.svg)\n"))
}

/// The same of validation losses over gradient evaluations, without the fall of the beginning.
pub(in crate::reproduce) fn plot_training(
    folder: &Path,
    name: &str,
    title: &str,
    curves: Vec<Curve>,
) -> anyhow::Result<String> {
    let axes = ("gradient evaluations", "validation loss, nats");
    plot_both(folder, name, title, axes, &without_beginnings(curves))
}

/// Writes the report of a reproduction and shows it.
pub(in crate::reproduce) fn write_report(folder: &Path, text: &str) -> anyhow::Result<()> {
    write_part(folder, REPORT, text)
}

/// Writes a report by this name, of a part of a reproduction, and shows it.
pub(in crate::reproduce) fn write_part(folder: &Path, name: &str, text: &str) -> anyhow::Result<()> {
    write_whole(&folder.join(name), text)?;
    say(&format!("{text}\nResults are in {}\n", folder.display()))
}

/// A folder's name for a command.
fn folder_name(form: &str) -> String {
    let name = file_name(form);
    match name.get(..FOLDER_NAME_MAX) {
        Some(beginning) if name.len() > FOLDER_NAME_MAX => format!("{beginning}-{}", key_name(&form)),
        _ => name,
    }
}

/// A name without what a file system or a link would trip over.
pub(in crate::reproduce) fn file_name(name: &str) -> String {
    let plain = |character: char| if character.is_ascii_alphanumeric() { character } else { '-' };
    let name: String = name.to_lowercase().replace('%', "percent").chars().map(plain).collect();
    name.split('-').filter(|part| !part.is_empty()).collect::<Vec<_>>().join("-")
}

/// A name that stands for itself in Markdown, in a table too.
pub(in crate::reproduce) fn escaped(name: &str) -> String {
    let mut text = String::with_capacity(name.len());
    for character in name.chars() {
        if "\\|*_`<>[]".contains(character) {
            text.push('\\');
        }
        text.push(character);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_tells_its_seeds() {
        for count in 2..12 {
            let seeds: Vec<u64> = (FIRST_SEED..FIRST_SEED + count).collect();
            assert_eq!(
                seeds_told(&format!("# Title\n\nOf a text; {}; more", seeds_text(&seeds))),
                seeds.len()
            );
        }
        assert_eq!(seeds_told(&seeds_text(&[FIRST_SEED])), 0);
        assert_eq!(seeds_told(""), 0);
    }

    #[test]
    fn names_stand_for_themselves_in_markdown() {
        assert_eq!(escaped("5 % down, f32"), "5 % down, f32");
        assert_eq!(escaped(r"a|b_c\*"), r"a\|b\_c\\\*");
    }

    #[test]
    fn numbers_of_workers_are_the_same_in_any_order() {
        assert_eq!(workers_option(&[8, 4, 8]).unwrap(), "--workers 4,8");
        assert_eq!(workers_option(&[]), None);
    }

    #[test]
    fn names_of_files_are_plain() {
        assert_eq!(file_name("8 workers, 5 % down"), "8-workers-5-percent-down");
        assert_eq!(file_name("η0/√(1+τ)"), "0-1");
        assert_eq!(folder_name("compare a.toml"), "compare-a-toml");
        let long = |name: &str| folder_name(&format!("{} {name}", "run.toml ".repeat(50)));
        assert!(long("a").len() < 150 && long("a") != long("b"), "{}", long("a"));
    }
}
