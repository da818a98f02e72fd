//! The measured half of the report: updates per second.

use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;

use anyhow::ensure;
use sanderling_common::method::Method;
use sanderling_server::progress::bytes;

use super::super::lab::{Book, Jobs, REVISION, file_name, plot_both, write_resolved};
use super::link::Kind;
use super::measure::{Measured, Outcome, measure};
use super::seen::Updates;
use super::setup::{Course, Setup, fit};
use super::statistics::Estimate;
use super::{Experiment, Half, METHODS, REPORTS, rate_name, verdict};
use crate::commands::UsageError;
use crate::report::Curve;
use crate::work::Unit;

/// A measurement that is wanted, or why it is not made.
struct Cell {
    method: Method,
    workers: u32,
    bits_per_second: f64,
    plan: Result<Setup, String>,
}

/// All that was wanted, with what came of it.
struct Cells<'a> {
    book: &'a Book<Measured>,
    all: Vec<Cell>,
}

/// A rate, with the updates that it was made of; or why there is none.
type Found = Result<(Estimate, Updates), String>;

impl Cells<'_> {
    fn find(&self, method: Method, workers: u32, bits_per_second: f64) -> Found {
        let is_it = |cell: &&Cell| {
            (cell.method, cell.workers) == (method, workers) && cell.bits_per_second == bits_per_second
        };
        let Some(cell) = self.all.iter().find(is_it) else {
            return Err(format!("this form has no {workers} workers there"));
        };
        let setup = cell.plan.as_ref().map_err(Clone::clone)?;
        match self.book.find(setup).map(|measured| measured.outcome) {
            Some(Outcome::Updates(updates)) => {
                let rate = updates.rate(workers).ok_or("too few updates came")?;
                Ok((rate, updates))
            }
            Some(Outcome::Failed(reason)) => Err(reason),
            None => Err("it was not reached".to_owned()),
        }
    }

    fn rate(&self, method: Method, workers: u32, bits_per_second: f64) -> Result<Estimate, String> {
        self.find(method, workers, bits_per_second).map(|(rate, _)| rate)
    }

    fn ratio(
        &self,
        (of, of_workers): (Method, u32),
        (to, to_workers): (Method, u32),
        bits_per_second: f64,
    ) -> Result<Estimate, String> {
        let of = self.rate(of, of_workers, bits_per_second)?;
        Ok(of.over(self.rate(to, to_workers, bits_per_second)?))
    }
}

/// Text that fits into a cell of a table.
fn in_a_cell(text: &str) -> String {
    text.replace(['\n', '|'], " ")
}

/// A number, or a dash where one of its parts is missing.
fn or_dash(value: &Result<Estimate, String>) -> String {
    value.as_ref().map_or("–".to_owned(), Estimate::to_string)
}

impl Experiment<'_> {
    /// Updates per second over a real link.
    pub(super) fn measured(&self) -> anyhow::Result<Half> {
        let kind = self.arguments.link.unwrap_or_else(Kind::best);
        // Whichever report shows them: the pictures are the same files.
        for report in REPORTS.map(|report| self.folder.join(report)) {
            ensure!(
                !kind.is_other_of(&fs::read_to_string(&report).unwrap_or_default()),
                UsageError(format!(
                    "{} is of measurements over the other kind of link, and would be replaced; give another --link or --out",
                    report.display()
                ))
            );
        }
        let rates: &[f64] = if self.arguments.options.quick { &[1e9, 1e8] } else { &[1e9, 1e8, 1e7] };
        let folder = self.folder.join("measured");
        let book = Book::<Measured>::open(&folder)?;
        let parameters = self.size.parameters()?;
        let cells = Cells { all: self.cells(&book, kind, rates, parameters), book: &book };
        let wanted: Vec<(Setup, u64)> = (cells.all.iter())
            .filter_map(|cell| cell.plan.as_ref().ok())
            .map(|setup| (setup.clone(), Course::of(setup, parameters).total_s(setup).ceil() as u64))
            .collect();
        for (setup, _) in &wanted {
            let name = format!("{}.toml", file_name(&setup.name()));
            write_resolved(self.folder, &name, &setup.run()?.to_toml())?;
            self.write_setup(&setup.name(), setup)?;
        }
        announce(&book, &wanted, cells.all.len());
        // One at a time: they share the machine.
        Jobs(1).make_missing(
            ("measuring", Unit::Count("expected seconds")),
            &book,
            &wanted,
            |setup, progress| measure(setup, (&folder, parameters), progress),
        )?;
        let mut text = self.introduction(kind)?;
        for &rate in rates {
            text.push_str(&self.table(&cells, rate));
            let _ = write!(text, "\n{}\n", self.picture(&cells, rate)?);
        }
        Ok(Half { text, verdict: self.measured_verdict(&cells, parameters) })
    }

    /// What is wanted, in the order in which it is measured: the fast links first.
    fn cells(&self, book: &Book<Measured>, link: Kind, rates: &[f64], parameters: u64) -> Vec<Cell> {
        let quick = self.arguments.options.quick;
        let mut all = Vec::new();
        for &bits_per_second in rates {
            for method in METHODS {
                for &workers in self.workers {
                    let setup = Setup {
                        revision: REVISION,
                        method,
                        workers,
                        bits_per_second,
                        link,
                        size: self.size,
                        compute_ms: self.arguments.compute_ms,
                        seconds_min: if self.arguments.tiny {
                            0.0
                        } else if quick {
                            8.0
                        } else {
                            20.0
                        },
                        updates: if quick { 6 } else { 20 },
                        attempt: 0,
                    };
                    let plan = fit(setup, parameters, self.limits()).map(|setup| untried(book, setup));
                    all.push(Cell { method, workers, bits_per_second, plan });
                }
            }
        }
        all
    }

    fn introduction(&self, kind: Kind) -> anyhow::Result<String> {
        let parameters = self.size.parameters()? as f64 / 1e6;
        let momentum = Method::Dgs.defaults().momentum;
        Ok(format!(
            "\n## Updates per second, measured over QUIC\n\n{} A model of {parameters:.2} million parameters, with gradients \
             that are made up; DGS with momentum {momentum}, which its speed does not depend on. Workers begin one after the \
             other, spread over the time from one update of theirs to the next; the measurement begins with the update at \
             which every one of them had been answered, and ends with an update. Nothing here depends on a seed: rate ± its \
             standard error over four to ten blocks of that one measurement's updates, in whole rounds of all workers where \
             there are enough.\n\n",
            kind.describe()
        ))
    }

    fn table(&self, cells: &Cells<'_>, rate: f64) -> String {
        let mut text = format!(
            "{}, updates per second:\n\n| workers | ASGD | × one worker | DGS | × one worker | DGS / ASGD | bytes per DGS update \
             up, down |\n| --- | --- | --- | --- | --- | --- | --- |\n",
            rate_name(rate)
        );
        for &workers in self.workers {
            let [asgd, dgs] = METHODS.map(|method| match cells.rate(method, workers, rate) {
                Ok(rate) => rate.to_string(),
                Err(reason) => format!("not measured: {}", in_a_cell(&reason)),
            });
            let [asgd_ups, dgs_ups] = METHODS.map(|method| match workers {
                1 => "1".to_owned(),
                _ => or_dash(&cells.ratio((method, workers), (method, 1), rate)),
            });
            let ratio = or_dash(&cells.ratio((Method::Dgs, workers), (Method::Asgd, workers), rate));
            let sent = cells.find(Method::Dgs, workers, rate).ok().and_then(|(_, updates)| {
                Some(format!("{}, {}", bytes(updates.bytes_up?), bytes(updates.bytes_down?)))
            });
            let sent = sent.unwrap_or_else(|| "–".to_owned());
            let _ =
                writeln!(text, "| {workers} | {asgd} | {asgd_ups} | {dgs} | {dgs_ups} | {ratio} | {sent} |");
        }
        text
    }

    fn picture(&self, cells: &Cells<'_>, rate: f64) -> anyhow::Result<String> {
        let point = |method, workers| {
            let Estimate { value, error } = cells.rate(method, workers, rate).ok()?;
            Some((f64::from(workers), value, Some(error)))
        };
        let curves = METHODS.map(|method| {
            let points = self.workers.iter().filter_map(|&workers| point(method, workers));
            Curve::of_means(method.name(), points)
        });
        let title = format!("Updates per second at {}", rate_name(rate));
        let name = file_name(&format!("updates {}", rate_name(rate)));
        plot_both(self.folder, &name, &title, ("workers", "updates per second"), &curves)
    }

    fn measured_verdict(&self, cells: &Cells<'_>, parameters: u64) -> String {
        let most = self.most();
        let speed_up = cells.ratio((Method::Dgs, most), (Method::Dgs, 1), verdict::BITS_PER_SECOND);
        let [dgs, asgd] = [Method::Dgs, Method::Asgd]
            .map(|method| cells.rate(method, verdict::AGAINST_ASGD_WORKERS, verdict::BITS_PER_SECOND));
        format!(
            "{}{}",
            verdict::speed_up(most, &speed_up),
            verdict::against_asgd([&dgs, &asgd], self.arguments.compute_ms, parameters)
        )
    }
}

/// The setup, as often tried again as it failed.
fn untried(book: &Book<Measured>, mut setup: Setup) -> Setup {
    while let Some(Measured { outcome: Outcome::Failed(_), .. }) = book.find(&setup) {
        setup.attempt += 1;
    }
    setup
}

/// Says how long it is going to take.
fn announce(book: &Book<Measured>, wanted: &[(Setup, u64)], cells: usize) {
    let missing = wanted.iter().filter(|(setup, _)| book.find(setup).is_none());
    let (count, seconds) =
        missing.fold((0, 0), |(count, seconds), (_, expected)| (count + 1, seconds + expected));
    if count > 0 {
        let minutes = seconds.div_ceil(60);
        // Nobody is left to tell when standard error is closed.
        let _ = writeln!(
            std::io::stderr(),
            "measuring {count} of {cells} cells, which is expected to take about {minutes} minutes"
        );
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::super::lab::Options;
    use super::super::Arguments;
    use super::*;

    fn arguments(quick: bool) -> Arguments {
        let options = Options { quick, seeds: None, steps: None, out: None, jobs: None };
        Arguments { compute_ms: 500, part: None, link: None, longest_minutes: None, tiny: false, options }
    }

    /// As if everything had been measured but what fails.
    fn book(folder: &Path, experiment: &Experiment<'_>, fails: impl Fn(&Setup) -> bool) -> Book<Measured> {
        let book = Book::open(folder).unwrap();
        for cell in experiment.cells(&book, Kind::Relay, &[1e9], 11_680_000) {
            let setup = cell.plan.unwrap();
            let outcome = if fails(&setup) {
                Outcome::Failed("the server | ended".to_owned())
            } else {
                let step = if setup.method == Method::Dgs { 0.5 } else { 2.0 } / f64::from(setup.workers);
                let moments = (0..=20).map(|update| step * f64::from(update)).collect();
                Outcome::Updates(Updates { moments, bytes_up: Some(500_000), bytes_down: None })
            };
            book.add(&Measured { setup, outcome }).unwrap();
        }
        book
    }

    #[test]
    fn a_measurement_that_failed_is_a_cell_and_made_again_the_next_time() {
        let (arguments, folder) = (arguments(true), tempfile::tempdir().unwrap());
        let experiment = Experiment::new(&arguments, folder.path());
        let fails = |setup: &Setup| (setup.method, setup.workers) == (Method::Asgd, 8);
        let all = experiment.cells(&Book::open(folder.path()).unwrap(), Kind::Relay, &[1e9], 11_680_000);
        let book = book(folder.path(), &experiment, fails);
        let cells = Cells { book: &book, all };
        let table = experiment.table(&cells, 1e9);
        assert!(table.contains("| 8 | not measured: the server   ended | – | 16.0000 ± 0.0000 |"), "{table}");
        assert!(table.contains("| 1 | 0.5000 ± 0.0000 | 1 | 2.0000 ± 0.0000 | 1 |"), "{table}");
        let verdict = experiment.measured_verdict(&cells, 11_680_000);
        assert!(verdict.contains("not measured"), "{verdict}");
        let again: Vec<u32> = (experiment.cells(&book, Kind::Relay, &[1e9], 11_680_000).into_iter())
            .map(|cell| cell.plan.unwrap().attempt)
            .collect();
        assert_eq!(again, [0, 1, 0, 0]);
    }

    #[test]
    fn what_takes_too_long_is_a_cell_without_a_number() {
        let (arguments, folder) = (arguments(true), tempfile::tempdir().unwrap());
        let experiment = Experiment::new(&arguments, folder.path());
        let book = Book::open(folder.path()).unwrap();
        let cells = Cells { all: experiment.cells(&book, Kind::Relay, &[1e7], 11_680_000), book: &book };
        let table = experiment.table(&cells, 1e7);
        assert!(table.contains("| 8 | not measured: would take about"), "{table}");
    }

    /// Minutes that all measurements are expected to take together, and which are not made.
    fn expected(quick: bool, rates: &[f64]) -> (f64, Vec<(Method, u32, f64)>) {
        let (arguments, folder) = (arguments(quick), tempfile::tempdir().unwrap());
        let experiment = Experiment::new(&arguments, folder.path());
        let book = Book::open(folder.path()).unwrap();
        let (mut total_s, mut left_out) = (0.0, Vec::new());
        for cell in experiment.cells(&book, Kind::Relay, rates, 11_680_000) {
            match cell.plan {
                Ok(setup) => total_s += Course::of(&setup, 11_680_000).total_s(&setup),
                Err(_) => left_out.push((cell.method, cell.workers, cell.bits_per_second)),
            }
        }
        (total_s / 60.0, left_out)
    }

    #[test]
    fn every_form_ends_in_the_time_it_is_given() {
        let (minutes, left_out) = expected(false, &[1e9, 1e8, 1e7]);
        assert!((40.0..76.0).contains(&minutes), "{minutes}");
        assert_eq!(left_out, [(Method::Asgd, 16, 1e7)]);
        let (minutes, left_out) = expected(true, &[1e9, 1e8]);
        assert!(minutes < 6.0 && left_out.is_empty(), "{minutes} {left_out:?}");
    }
}
