//! The claim of both papers on upcycling, at a small scale: after the same dense checkpoint and for the same compute, does
//! the upcycled mixture reach a lower validation loss than the dense model trained on?

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use anyhow::{Context, ensure};
use sanderling_common::checkpoint::{self, Checkpoint};
use sanderling_common::config::RunConfig;
use sanderling_common::corpus::Corpus;
use sanderling_common::init::{initial_parameters, parameters_hash};
use sanderling_common::model_config::ModelConfig;
use sanderling_common::origin::Dense;
use sanderling_worker::model::forward_flops_per_token;

use super::arms::{ARMS, Arm, Budget};
use super::results::{Results, RunKey, RunResult, mean_and_spread};
use super::trainer::{Stretch, Trained, train};
use crate::commands::say;
use crate::report::{Curve, plot_curves};
use crate::work::{Unit, Work};

/// Dense against upcycled, at equal compute and at equal tokens
///
/// Trains a small dense model on the bundled text, upcycles it in several ways, and trains each on with a fresh optimiser
/// and learning rate, AdamW in one process: for the floating-point operations of the dense continuation (so the mixtures,
/// which cost more per token, see fewer tokens) and for its tokens. The learning rate is chosen for every arm from the same
/// values, by validation with the first seed, and from further ones as long as the best lies at the edge. Finished runs are kept in the folder and not run again, so an interrupted
/// experiment goes on where it was.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  sanderling reproduce upcycling --quick        # minutes, one seed
  sanderling reproduce upcycling                # the full form, three seeds")]
pub struct Arguments {
    /// A short form: fewer steps, one seed and one learning rate
    #[arg(long)]
    quick: bool,
    /// Seeds [default: 3, with --quick 1]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=100))]
    seeds: Option<u64>,
    /// Where results go, and are looked for [default: runs/reproduce-upcycling, with --quick …-quick]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Runs at a time [default: one per core]
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1024))]
    jobs: Option<u16>,
}

/// What is the same for all arms.
#[derive(Clone, Debug)]
struct Settings {
    run: RunConfig,
    dense: ModelConfig,
    pretraining_steps: u64,
    /// Of the dense continuation.
    steps: u64,
    /// Ascending; a single one is not chosen from, and not added to.
    rates: Vec<f64>,
    seeds: Vec<u64>,
}

/// The rate of the dense pre-training.
const PRETRAINING_RATE: f64 = 4e-3;
/// Evaluations in a run.
const EVALUATIONS: u64 = 10;
/// The first seed; the others follow.
const FIRST_SEED: u64 = 1337;
/// Learning rates that one arm may be tried with.
const RATES_MAX: usize = 8;

impl Settings {
    fn new(arguments: &Arguments, vocabulary: usize) -> anyhow::Result<Self> {
        let mut run = RunConfig::default();
        run.data.batch_size = 12;
        let model = &mut run.model;
        (model.hidden_size, model.layers, model.context) = (64, 2, 64);
        (model.intermediate_size, model.experts, model.top_k) = (256, 1, 1);
        run.validate()?;
        let dense = run.model_config(vocabulary);
        let seeds = arguments.seeds.unwrap_or(if arguments.quick { 1 } else { 3 });
        let (pretraining_steps, steps, rates) =
            if arguments.quick { (400, 400, vec![2e-3]) } else { (1000, 1000, vec![1e-3, 2e-3, 4e-3]) };
        let seeds = (FIRST_SEED..FIRST_SEED + seeds).collect();
        Ok(Self { run, dense, pretraining_steps, steps, rates, seeds })
    }

    /// A word that differs for settings that differ.
    fn name(&self) -> String {
        format!("p{}-c{}-b{}", self.pretraining_steps, self.steps, self.run.data.batch_size)
    }

    fn run(&self, seed: u64) -> RunConfig {
        let mut run = self.run.clone();
        run.run.seed = seed;
        run
    }

    fn stretch(&self, steps: u64, rate: f64, first_batch: u64) -> Stretch {
        let eval_every = (steps / EVALUATIONS).max(1);
        Stretch { steps, first_batch, rate, warmup_steps: 100.min(steps / 10), eval_every }
    }

    fn tokens_per_step(&self) -> u64 {
        u64::from(self.run.data.batch_size) * self.run.model.context as u64
    }

    fn key(&self, (arm, budget): (Arm, Budget), seed: u64, rate: f64) -> RunKey {
        // The dense model's two budgets are one run.
        let budget = if arm == ARMS[0] { Budget::Compute } else { budget };
        RunKey { arm: arm.key.to_owned(), budget, seed, rate, settings: self.name() }
    }

    /// Steps that a budget allows an arm.
    fn steps_of(&self, (arm, budget): (Arm, Budget)) -> anyhow::Result<u64> {
        match budget {
            Budget::Tokens => Ok(self.steps),
            Budget::Compute => {
                Ok((self.steps as f64 / arm.cost(&self.dense, self.run.model.context)?).round() as u64)
            }
        }
    }
}

/// An arm with a budget: what the table has a row for.
fn contestants() -> Vec<(Arm, Budget)> {
    let mixtures = ARMS[1..].iter().flat_map(|&arm| Budget::ALL.map(|budget| (arm, budget)));
    std::iter::once((ARMS[0], Budget::Compute)).chain(mixtures).collect()
}

struct Experiment {
    settings: Settings,
    corpus: Arc<Corpus>,
    folder: PathBuf,
    jobs: usize,
}

/// Runs the command.
///
/// # Errors
/// Whatever keeps the experiment from its end, in a sentence.
pub fn upcycling(arguments: &Arguments) -> anyhow::Result<()> {
    let corpus = Arc::new(Corpus::bundled());
    let settings = Settings::new(arguments, corpus.vocabulary().len())?;
    let folder = arguments.out.clone().unwrap_or_else(|| {
        PathBuf::from(if arguments.quick {
            "runs/reproduce-upcycling-quick"
        } else {
            "runs/reproduce-upcycling"
        })
    });
    fs::create_dir_all(&folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let jobs = arguments.jobs.map_or(cores, usize::from);
    let experiment = Experiment { settings, corpus, folder, jobs };
    let results = Mutex::new(Results::open(&experiment.folder)?);

    let started = Instant::now();
    let dense = experiment.pretrain_all()?;
    let settings = &experiment.settings;
    let chosen = experiment.choose_rates(&dense, &results)?;
    let final_keys: Vec<_> = chosen
        .iter()
        .flat_map(|&(contestant, rate)| {
            settings.seeds.iter().map(move |&seed| (contestant, settings.key(contestant, seed, rate)))
        })
        .collect();
    experiment.run_all("running all seeds", &dense, final_keys.clone(), &results)?;
    let results = results.into_inner().expect("no holder of the results panics");
    let keys: Vec<RunKey> = final_keys.into_iter().map(|(_, key)| key).collect();
    let report = experiment.report(&results, &keys, started.elapsed().as_secs_f64())?;
    say(&format!("{report}\nResults are in {}\n", experiment.folder.display()))
}

impl Experiment {
    /// The dense model of every seed: read from the folder, or trained and written there.
    fn pretrain_all(&self) -> anyhow::Result<Vec<Dense>> {
        let seeds = &self.settings.seeds;
        self.each("pre-training", seeds, |&seed, keep_going| {
            let settings = &self.settings;
            let directory = self.folder.join(format!("dense-{}-{seed}", settings.name()));
            if directory.exists() {
                let checkpoint = Checkpoint::open(&directory)?;
                ensure!(
                    checkpoint.config() == &settings.dense,
                    "{} holds another model than this experiment's; remove it",
                    directory.display()
                );
                return Ok(Dense::load(&checkpoint)?);
            }
            let run = settings.run(seed);
            let stretch = settings.stretch(settings.pretraining_steps, PRETRAINING_RATE, 0);
            let initial = initial_parameters(&settings.dense, seed)?;
            let trained = train(&run, &self.corpus, (&settings.dense, initial), &stretch, keep_going)?;
            checkpoint::save(&directory, &settings.dense, &trained.best, &[])?;
            let sha256 = parameters_hash(&settings.dense.layout()?, &trained.best);
            Ok(Dense { config: settings.dense.clone(), parameters: trained.best, sha256 })
        })
    }

    /// Makes the runs that are not there yet.
    fn run_all(
        &self,
        what: &'static str,
        dense: &[Dense],
        wanted: Vec<((Arm, Budget), RunKey)>,
        results: &Mutex<Results>,
    ) -> anyhow::Result<()> {
        let lock = || results.lock().expect("no holder of the results panics");
        let mut missing: Vec<_> = wanted.into_iter().filter(|(_, key)| lock().find(key).is_none()).collect();
        missing.dedup_by(|a, b| a.1 == b.1);
        self.each(what, &missing, |(contestant, key), keep_going| {
            let place = self.settings.seeds.iter().position(|&seed| seed == key.seed).expect("a known seed");
            let result = self.run(&dense[place], *contestant, key, keep_going)?;
            lock().add(result)
        })?;
        Ok(())
    }

    fn run(
        &self,
        dense: &Dense,
        contestant: (Arm, Budget),
        key: &RunKey,
        keep_going: &(dyn Fn() -> bool + Sync),
    ) -> anyhow::Result<RunResult> {
        let started = Instant::now();
        let settings = &self.settings;
        let steps = settings.steps_of(contestant)?;
        let (config, parameters) = match contestant.0.recipe(key.seed) {
            None => (dense.config.clone(), dense.parameters.clone()),
            Some(recipe) => dense.upcycle(&recipe)?,
        };
        let stretch = settings.stretch(steps, key.rate, settings.pretraining_steps);
        let run = settings.run(key.seed);
        let trained = train(&run, &self.corpus, (&config, parameters), &stretch, keep_going)?;
        let best_val_loss = trained.best_val_loss();
        let Trained { curve, test_loss, .. } = trained;
        let tokens = steps * settings.tokens_per_step();
        let best = curve.iter().find(|point| point.val_loss == best_val_loss);
        Ok(RunResult {
            key: key.clone(),
            steps,
            tokens,
            flops: 3.0 * tokens as f64 * forward_flops_per_token(&config, settings.run.model.context, true),
            parameters: config.layout()?.len() as u64,
            active_parameters: config.active_parameters()? as u64,
            start_val_loss: curve.first().map_or(f64::NAN, |point| point.val_loss),
            best_val_loss,
            best_step: best.map_or(0, |point| point.steps),
            test_loss,
            seconds: started.elapsed().as_secs_f64(),
            curve,
        })
    }

    /// Does something to every item, some at a time, with a bar; results in the order of the items.
    fn each<I: Sync, R: Send>(
        &self,
        what: &'static str,
        items: &[I],
        job: impl Fn(&I, &(dyn Fn() -> bool + Sync)) -> anyhow::Result<R> + Sync,
    ) -> anyhow::Result<Vec<R>> {
        let work = Work::begin(what, items.len() as u64, Unit::Count("runs"))?;
        let stop = work.stop();
        let keep_going = || !*stop.borrow();
        let (next, work) = (AtomicUsize::new(0), Mutex::new((work, 0)));
        let results: Mutex<Vec<Option<R>>> = Mutex::new(items.iter().map(|_| None).collect());
        let thread = || -> anyhow::Result<()> {
            while let Some(number) = Some(next.fetch_add(1, Ordering::Relaxed)).filter(|&n| n < items.len()) {
                let result = job(&items[number], &keep_going).inspect_err(|_| {
                    // The others stop at their next run.
                    next.store(items.len(), Ordering::Relaxed);
                })?;
                results.lock().expect("no holder panics")[number] = Some(result);
                let (work, done) = &mut *work.lock().expect("no holder panics");
                *done += 1;
                // The runs themselves look at the stop.
                let _ = work.at(*done);
            }
            Ok(())
        };
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..self.jobs.min(items.len())).map(|_| scope.spawn(thread)).collect();
            threads.into_iter().try_for_each(|thread| thread.join().expect("runs do not panic"))
        })?;
        work.into_inner().expect("no holder panics").0.end();
        let results = results.into_inner().expect("no holder panics");
        Ok(results.into_iter().map(|result| result.expect("every run was made")).collect())
    }

    /// The rate of every contestant: the best of the settings' by validation with the first seed or, while that lies at
    /// the edge of those tried, of further ones a factor of two apart.
    fn choose_rates(
        &self,
        dense: &[Dense],
        results: &Mutex<Results>,
    ) -> anyhow::Result<Vec<((Arm, Budget), f64)>> {
        let settings = &self.settings;
        let key = |contestant, rate| settings.key(contestant, settings.seeds[0], rate);
        let mut tried: Vec<_> =
            contestants().into_iter().map(|contestant| (contestant, settings.rates.clone())).collect();
        loop {
            let sweep = tried.iter().flat_map(|(contestant, rates)| {
                rates.iter().map(|&rate| (*contestant, key(*contestant, rate)))
            });
            self.run_all("choosing learning rates", dense, sweep.collect(), results)?;
            let results = results.lock().expect("no holder of the results panics");
            let loss = |contestant, rate| {
                results.find(&key(contestant, rate)).expect("the sweep was run").best_val_loss
            };
            let mut is_widened = false;
            for (contestant, rates) in &mut tried {
                is_widened |= widen(rates, |rate| loss(*contestant, rate));
            }
            if !is_widened {
                let best = |(contestant, rates): (_, Vec<f64>)| {
                    (contestant, rates[best_place(&rates, |rate| loss(contestant, rate))])
                };
                return Ok(tried.into_iter().map(best).collect());
            }
        }
    }

    /// Table, verdict and plots; returns the text that is also written.
    fn report(&self, results: &Results, keys: &[RunKey], seconds: f64) -> anyhow::Result<String> {
        let groups = results.grouped(keys);
        let settings = &self.settings;
        let rows: Vec<Row<'_>> = contestants()
            .into_iter()
            .map(|(arm, budget)| {
                let runs = &groups[&(arm.key.to_owned(), budget.name())];
                Row { arm, budget, runs: runs.clone() }
            })
            .collect();
        let mut text = format!(
            "# Upcycling against the dense model trained on\n\nBundled text, characters; dense model of {} parameters, {} \
             steps of pre-training and {} more (batch {} × {}); {} seed(s); AdamW, fresh optimiser and rate, the \
             best of {:?} for every row by validation with the first seed{}. The text is small enough to overfit, so the \
             best validation loss of each run counts. Losses are nats per character, mean ± standard deviation over seeds; \
             `steps` and `TFLOP` are those of the second phase.\n\n",
            settings.dense.layout()?.len(),
            settings.pretraining_steps,
            settings.steps,
            settings.run.data.batch_size,
            settings.run.model.context,
            settings.seeds.len(),
            settings.rates,
            if settings.rates.len() > 1 {
                ", and of twice or half as much while the best lies at the edge"
            } else {
                ""
            },
        );
        text.push_str(
            "| model | equal | parameters | active | steps | TFLOP | rate | start | best validation | test |\n\
             | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n",
        );
        rows.iter().for_each(|row| text.push_str(&row.line()));
        text.push_str("\n## Verdict\n\n");
        for row in &rows[1..] {
            text.push_str(&row.verdict(&rows[0]));
        }
        for budget in Budget::ALL {
            let file = format!("{}.svg", budget.name());
            self.plot(&self.folder.join(&file), budget, &rows)?;
            let _ = write!(text, "\n![Validation loss at equal {}]({file})\n", budget.name());
        }
        let _ = writeln!(text, "\nMade in {seconds:.0} s, runs that were there already not counted.");
        let path = self.folder.join("README.md");
        fs::write(&path, &text).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(text)
    }

    fn plot(&self, path: &Path, budget: Budget, rows: &[Row<'_>]) -> anyhow::Result<()> {
        let curves: Vec<Curve> = rows
            .iter()
            .filter(|row| row.budget == budget || row.arm == ARMS[0])
            .map(|row| Curve { name: row.arm.name.replace('`', ""), points: row.mean_curve(budget) })
            .collect();
        let (title, x) = match budget {
            Budget::Compute => {
                ("Validation loss at equal compute", "training compute after upcycling, TFLOP")
            }
            Budget::Tokens => {
                ("Validation loss at equal tokens", "training tokens after upcycling, millions")
            }
        };
        Ok(plot_curves(path, title, (x, "cross-entropy, nats per character"), &curves)?)
    }
}

/// The place of the rate with the lowest loss.
fn best_place(rates: &[f64], loss: impl Fn(f64) -> f64) -> usize {
    let losses: Vec<f64> = rates.iter().map(|&rate| loss(rate)).collect();
    let order = |&a: &usize, &b: &usize| losses[a].total_cmp(&losses[b]);
    (0..rates.len()).min_by(order).expect("there are rates")
}

/// Adds a rate of twice the largest or half the smallest if that one is the best so far; returns whether it did.
fn widen(rates: &mut Vec<f64>, loss: impl Fn(f64) -> f64) -> bool {
    if !(2..RATES_MAX).contains(&rates.len()) {
        return false;
    }
    let best = best_place(rates, loss);
    if best == 0 {
        rates.insert(0, rates[0] / 2.0);
    } else if best == rates.len() - 1 {
        rates.push(rates[best] * 2.0);
    } else {
        return false;
    }
    true
}

/// The runs of one contestant.
struct Row<'a> {
    arm: Arm,
    budget: Budget,
    runs: Vec<&'a RunResult>,
}

impl Row<'_> {
    fn over_seeds(&self, value: impl Fn(&RunResult) -> f64) -> (f64, f64) {
        mean_and_spread(&self.runs.iter().map(|run| value(run)).collect::<Vec<_>>())
    }

    fn line(&self) -> String {
        let first = self.runs[0];
        let equal = if self.arm == ARMS[0] { "–" } else { self.budget.name() };
        let show = |(mean, spread): (f64, f64)| format!("{mean:.4} ± {spread:.4}");
        format!(
            "| {} | {equal} | {} | {} | {} | {:.1} | {} | {} | {} | {} |\n",
            self.arm.name,
            first.parameters,
            first.active_parameters,
            first.steps,
            first.flops / 1e12,
            first.key.rate,
            show(self.over_seeds(|run| run.start_val_loss)),
            show(self.over_seeds(|run| run.best_val_loss)),
            show(self.over_seeds(|run| run.test_loss)),
        )
    }

    /// Against the dense model, seed by seed.
    fn verdict(&self, dense: &Row<'_>) -> String {
        let pairs = self.runs.iter().zip(&dense.runs);
        let differences: Vec<f64> =
            pairs.map(|(ours, dense)| ours.best_val_loss - dense.best_val_loss).collect();
        let (mean, spread) = mean_and_spread(&differences);
        let better = differences.iter().filter(|&&difference| difference < 0.0).count();
        let says = match better {
            all if all == differences.len() => "lower than the dense model's with every seed",
            0 => "not lower than the dense model's with any seed",
            _ => "lower than the dense model's with some seeds only",
        };
        format!(
            "* {}, equal {}: the best validation loss is {says} (difference {mean:+.4} ± {spread:.4}).\n",
            self.arm.name,
            self.budget.name()
        )
    }

    /// The mean over seeds at every evaluation, over what the budget counts.
    fn mean_curve(&self, budget: Budget) -> Vec<(f64, f64)> {
        let first = self.runs[0];
        let per_step = match budget {
            Budget::Compute => first.flops / first.steps as f64 / 1e12,
            Budget::Tokens => first.tokens as f64 / first.steps as f64 / 1e6,
        };
        let points = first.curve.iter().enumerate();
        points
            .map(|(place, point)| {
                let (mean, _) = self.over_seeds(|run| run.curve[place].val_loss);
                (point.steps as f64 * per_step, mean)
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_added_while_the_best_lies_at_the_edge() {
        let search = |optimum: f64, mut rates: Vec<f64>| {
            let loss = |rate: f64| (rate / optimum).ln().abs();
            while widen(&mut rates, loss) {}
            (rates[best_place(&rates, loss)], rates)
        };
        assert_eq!(search(2.0, vec![1.0, 2.0, 4.0]), (2.0, vec![1.0, 2.0, 4.0]));
        assert_eq!(search(15.0, vec![1.0, 2.0, 4.0]), (16.0, vec![1.0, 2.0, 4.0, 8.0, 16.0, 32.0]));
        assert_eq!(search(0.5, vec![1.0, 2.0]), (0.5, vec![0.25, 0.5, 1.0, 2.0]));
        assert_eq!(search(1e9, vec![1.0, 2.0]).1.len(), RATES_MAX);
        assert_eq!(search(1e9, vec![1.0]), (1.0, vec![1.0]));
    }
}
