//! Variations of one run, each with all seeds: a table, curves, and what they differ by.

use std::fmt::Write;
use std::path::Path;
use std::time::Instant;

use sanderling_server::progress::bytes;

use super::book::Book;
use super::difference::Difference;
use super::jobs::{EVALUATIONS, Jobs};
use super::run_file::RunFile;
use super::spec::{Run, Spec, Trainer, exchanges, make};
use super::text::{
    Options, counted, curve_of, escaped, file_name, look_every, mean_and_spread, plot_training, seeds_text,
    show, write_configuration, write_report,
};
use crate::report::Curve;
use crate::task::Score;

/// One variation.
#[derive(Clone, Debug)]
pub(in crate::reproduce) struct Variant {
    /// What it is, a word for each of the sweep's columns.
    pub(in crate::reproduce) cells: Vec<String>,
    /// Of the picture that its curve is drawn in.
    pub(in crate::reproduce) picture: String,
    /// Everything but the seed and how often it is looked at.
    pub(in crate::reproduce) run: RunFile,
    pub(in crate::reproduce) workers: u32,
    pub(in crate::reproduce) trainer: Trainer,
}

impl Variant {
    /// Of the small model, with what a run file would say of its method besides: the default method with the rates that suit
    /// the model.
    ///
    /// # Panics
    /// If no run file could say that.
    pub(in crate::reproduce) fn small(
        cells: Vec<String>,
        picture: String,
        settings: &str,
        workers: u32,
        trainer: Trainer,
    ) -> Self {
        Self { cells, picture, run: RunFile::small_with(settings), workers, trainer }
    }

    /// In file names and legends.
    pub(in crate::reproduce) fn name(&self) -> String {
        self.cells.join(", ")
    }

    /// In sentences, where a number of workers is no number alone; with the columns that it has cells of.
    pub(in crate::reproduce) fn in_words(&self, columns: &[&str]) -> String {
        let cell = |(cell, &column): (&String, &&str)| match column {
            "workers" => counted(u64::from(self.workers), "worker"),
            _ => escaped(cell),
        };
        self.cells.iter().zip(columns).map(cell).collect::<Vec<_>>().join(", ")
    }
}

/// The variations, and what the report says of them.
pub(in crate::reproduce) struct Sweep {
    /// Of the folder.
    pub(in crate::reproduce) name: &'static str,
    /// Its own options that make it another experiment.
    pub(in crate::reproduce) own: Vec<String>,
    pub(in crate::reproduce) title: &'static str,
    pub(in crate::reproduce) introduction: String,
    pub(in crate::reproduce) columns: &'static [&'static str],
    /// Gradients in every run.
    pub(in crate::reproduce) evaluations: u64,
    pub(in crate::reproduce) variants: Vec<Variant>,
}

/// A variation with its runs, a seed each.
pub(in crate::reproduce) struct Varied<'a> {
    pub(in crate::reproduce) variant: &'a Variant,
    pub(in crate::reproduce) runs: Vec<Run>,
}

/// Points of a curve.
const LOOKS: u64 = 16;

impl Varied<'_> {
    /// Of the runs that did not diverge; 0 if all did.
    fn mean(&self, value: impl Fn(&Run) -> f64) -> f64 {
        let ended = self.runs.iter().filter(|run| run.outcome.diverged.is_none());
        let values: Vec<f64> = ended.map(value).collect();
        if values.is_empty() { 0.0 } else { mean_and_spread(&values).0 }
    }

    pub(in crate::reproduce) fn test(&self) -> Vec<Score> {
        self.runs.iter().map(|run| run.outcome.test).collect()
    }

    /// By how much its test loss is above another's, seed by seed.
    pub(in crate::reproduce) fn above(&self, other: &Self) -> Difference {
        let losses = |of: &Self| of.runs.iter().map(|run| run.outcome.test.loss).collect::<Vec<_>>();
        Difference::of(&losses(self), &losses(other))
    }

    /// How many times fewer bytes it sends up than another, and down, as words; nothing is said of runs that diverged or
    /// skipped updates, whose frames are empty.
    pub(in crate::reproduce) fn fewer_bytes(&self, other: &Self) -> (String, String) {
        let is_whole = [self, other].iter().all(|of| of.runs.iter().all(Run::is_whole));
        let times = |ours: f64, theirs: f64| match is_whole && ours > 0.0 && theirs > 0.0 {
            true => match (theirs / ours, ours / theirs) {
                (fewer, _) if fewer >= 1.05 => format!("{fewer:.1} times fewer bytes"),
                (_, more) if more >= 1.05 => format!("{more:.1} times more bytes"),
                _ => "as many bytes".to_owned(),
            },
            false => "no bytes to compare".to_owned(),
        };
        (times(self.bytes_up(), other.bytes_up()), times(self.bytes_down(), other.bytes_down()))
    }

    fn bytes_up(&self) -> f64 {
        self.mean(|run| run.outcome.bytes_up as f64)
    }

    fn bytes_down(&self) -> f64 {
        self.mean(|run| run.outcome.bytes_down as f64)
    }

    /// Gradients of an update.
    fn local_steps(&self) -> f64 {
        f64::from(self.runs[0].spec.training.local_steps)
    }

    /// Bytes of a dense float32 exchange of every gradient, in one direction.
    fn dense_bytes(&self) -> f64 {
        self.local_steps() * self.mean(|run| 4.0 * run.outcome.parameters as f64 * run.outcome.updates as f64)
    }

    /// Of each seed with which updates did not change the model, a sentence.
    fn skipped_text(&self, columns: &[&str]) -> String {
        let name = self.variant.in_words(columns);
        self.runs.iter().map(|run| run.skipped_text(&name)).collect()
    }

    /// That workers who would come and go hardly do in so short a run, if so.
    fn stays_text(&self, columns: &[&str]) -> String {
        let (Trainer::Workers(conditions), workers) = (self.variant.trainer, self.variant.workers) else {
            return String::new();
        };
        let exchanges = self.runs[0].spec.training.steps / u64::from(workers);
        if conditions.stay == 0 || exchanges >= u64::from(conditions.stay) {
            return String::new();
        }
        format!(
            "\n{}: a worker makes about {} in all and would leave after {}, so that hardly any does, or none.\n",
            self.variant.in_words(columns),
            counted(exchanges, "exchange"),
            conditions.stay
        )
    }

    fn line(&self) -> String {
        let traffic = |sent: f64| match sent > 0.0 {
            true => format!("{} ({:.0}×)", bytes(sent as u64), self.dense_bytes() / sent),
            false => "–".to_owned(),
        };
        let validation: Vec<Score> = self.runs.iter().map(|run| run.outcome.validation()).collect();
        let max = self.runs.iter().map(|run| run.outcome.staleness_max()).max().unwrap_or(0);
        format!(
            "| {} | {} | {} | {} | {} | {:.1}, {max} | {:.0} |\n",
            self.variant.cells.iter().map(|cell| escaped(cell)).collect::<Vec<_>>().join(" | "),
            show(&validation),
            show(&self.test()),
            traffic(self.bytes_up()),
            traffic(self.bytes_down()),
            self.mean(|run| run.outcome.staleness_mean()),
            self.mean(|run| run.outcome.curve.last().map_or(0.0, |point| point.time)),
        )
    }

    /// The share of updates of each staleness, over all seeds.
    pub(in crate::reproduce) fn staleness(&self) -> Vec<(f64, f64)> {
        let longest = self.runs.iter().map(|run| run.outcome.staleness.len()).max().unwrap_or(0);
        let count = |staleness: usize| -> u64 {
            self.runs.iter().filter_map(|run| run.outcome.staleness.get(staleness)).sum()
        };
        let all = (0..longest).map(count).sum::<u64>().max(1) as f64;
        (0..longest).map(|staleness| (staleness as f64, count(staleness) as f64 / all)).collect()
    }
}

impl Sweep {
    fn spec(&self, variant: &Variant, seed: u64) -> anyhow::Result<Spec> {
        let mut settings = variant.run.settings.clone();
        (settings.run.workers, settings.run.seed) = (Some(variant.workers), Some(seed));
        let local_steps = settings.training.local_steps.unwrap_or(1);
        let steps = variant.run.named(exchanges(self.evaluations, local_steps))?;
        settings.training.steps = Some(steps);
        settings.training.eval_every = Some(look_every(steps, LOOKS));
        variant.run.spec(settings, variant.trainer)
    }

    /// Makes the runs that are missing and writes the report; `verdict` adds to its text, and to the pictures in the folder.
    pub(in crate::reproduce) fn report(
        &self,
        options: &Options,
        verdict: impl FnOnce(&[Varied<'_>], &Path) -> anyhow::Result<String>,
    ) -> anyhow::Result<()> {
        let started = Instant::now();
        let seeds = options.seeds();
        // What cannot be run is found out before it has a folder.
        for variant in &self.variants {
            self.spec(variant, seeds[0])?;
        }
        let folder = options.folder(self.name, &self.own)?;
        let rows = self.make_all(&folder, &seeds, options.jobs())?;
        let mut text = self.table(&seeds, &rows);
        let _ = write!(text, "\n## Verdict\n\n{}\n", verdict(&rows, &folder)?);
        let mut pictures: Vec<&str> = rows.iter().map(|row| row.variant.picture.as_str()).collect();
        pictures.dedup();
        for picture in pictures {
            let curves: Vec<Curve> = (rows.iter().filter(|row| row.variant.picture == picture))
                .map(|row| Curve::of_means(row.variant.name(), curve_of(&row.runs)))
                .collect();
            let drawn = plot_training(&folder, &file_name(picture), picture, curves)?;
            let _ = write!(text, "\n{drawn}");
        }
        let _ = writeln!(
            text,
            "\nMade in {:.0} s, runs that were there already not counted.",
            started.elapsed().as_secs_f64()
        );
        write_report(&folder, &text)
    }

    /// The runs of every variant, those that are missing made.
    fn make_all(&self, folder: &Path, seeds: &[u64], jobs: Jobs) -> anyhow::Result<Vec<Varied<'_>>> {
        let book = Book::<Run>::open(folder)?;
        let mut specs = Vec::new();
        for variant in &self.variants {
            let of_variant: Vec<Spec> =
                seeds.iter().map(|&seed| self.spec(variant, seed)).collect::<Result<_, _>>()?;
            write_configuration(folder, &file_name(&variant.name()), &of_variant[0])?;
            specs.push(of_variant);
        }
        let wanted: Vec<_> = specs.iter().flatten().map(|spec| (spec.clone(), self.evaluations)).collect();
        jobs.make_missing(("running", EVALUATIONS), &book, &wanted, make)?;
        let find = |spec: &Spec| book.find(spec).expect("every run was made");
        let rows = (self.variants.iter().zip(&specs))
            .map(|(variant, specs)| Varied { variant, runs: specs.iter().map(find).collect() });
        Ok(rows.collect())
    }

    fn table(&self, seeds: &[u64], rows: &[Varied<'_>]) -> String {
        let mut text = format!(
            "# {}\n\n{} {} each, {}; {}; in virtual time, whose \
             unit is a gradient of a worker of middling speed. Bytes are those of the frames, down with what sessions begin with, \
             and how many times fewer they are than a dense float32 exchange of every gradient. {}{}\n\n",
            self.title,
            self.introduction,
            counted(self.evaluations, "gradient evaluation"),
            seeds_text(seeds),
            subject_text(rows),
            rate_text(rows, self.columns),
            shared_text(rows),
        );
        let _ = writeln!(
            text,
            "| {} | validation loss | test loss | up | down | staleness mean, largest | time |",
            self.columns.join(" | ")
        );
        text.push_str(&"| --- ".repeat(self.columns.len() + 6));
        text.push_str("|\n");
        rows.iter().for_each(|row| text.push_str(&row.line()));
        rows.iter().for_each(|row| text.push_str(&row.skipped_text(self.columns)));
        rows.iter().for_each(|row| text.push_str(&row.stays_text(self.columns)));
        text
    }
}

/// What was learned by how large a model.
fn subject_text(rows: &[Varied<'_>]) -> String {
    // In the order of the table.
    let list = |all: Vec<String>| {
        let is_first = |&(place, one): &(usize, &String)| !all[..place].contains(one);
        all.iter().enumerate().filter(is_first).map(|(_, one)| one.as_str()).collect::<Vec<_>>().join(" and ")
    };
    let texts = list(rows.iter().map(|row| row.runs[0].spec.text_name()).collect());
    let parameters = list(rows.iter().map(|row| row.runs[0].outcome.parameters.to_string()).collect());
    format!("{texts}, {parameters} parameters")
}

/// How the learning rate goes: once if that is the same for all, or else whose goes how.
fn rate_text(rows: &[Varied<'_>], columns: &[&str]) -> String {
    let mut ways: Vec<(String, Vec<String>)> = Vec::new();
    for row in rows {
        let (way, name) = (row.runs[0].spec.describe_rate(), row.variant.in_words(columns));
        match ways.iter_mut().find(|(other, _)| *other == way) {
            Some((_, names)) => names.push(name),
            None => ways.push((way, vec![name])),
        }
    }
    match &ways[..] {
        [(way, _)] => format!("The learning rate {way}. "),
        ways => {
            let of = |(way, names): &(String, Vec<String>)| {
                let names: Vec<String> = names.iter().map(|name| format!("({name})")).collect();
                format!("The learning rate of {} {way}. ", names.join(", "))
            };
            ways.iter().map(of).collect()
        }
    }
}

/// Whether runs of one seed can be compared.
fn shared_text(rows: &[Varied<'_>]) -> &'static str {
    let first = &rows[0].runs[0].spec;
    match rows.iter().all(|row| row.runs[0].spec.shares_all_but_method(first)) {
        true => "Runs of one seed share parameters and batches, and are compared with each other.",
        false => "Not all of them have the same model, start and text: their losses differ by that, too.",
    }
}
