//! The claim of both papers on upcycling, at a small scale: after the same dense checkpoint and for the same compute, does
//! the upcycled mixture reach a lower validation loss than the dense model trained on?

mod arms;
mod report;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, ensure};
use sanderling_common::checkpoint::{self, Checkpoint};
use sanderling_common::config::RunConfig;
use sanderling_common::corpus::Corpus;
use sanderling_common::init::initial_parameters;
use sanderling_common::method::Method;
use sanderling_common::model_config::ModelConfig;
use sanderling_common::origin::Dense;
use sanderling_common::wire::Split;
use sanderling_worker::model::forward_flops_per_token;

use self::arms::{ARMS, Arm, Budget};
use self::report::report;
use super::lab::{
    Batches, Book, EVALUATIONS, Finished, Grid, Jobs, Options, Progress, Search, Stretch, Tried, look_every,
    scale_rates, train, write_report,
};
use crate::adamw::AdamWSettings;
use crate::simulation::{Conditions, Evaluations, Point, simulate};
use crate::task::{LanguageTask, Score, Task};

/// Dense against upcycled, at equal compute and at equal tokens
///
/// Trains a small dense model on the bundled text, upcycles it in several ways, and trains each on with a fresh optimiser
/// and learning rate: for the floating-point operations of the dense continuation (so the mixtures, which cost more per
/// token, see fewer tokens) and for its tokens. By AdamW in one process or, with --workers, by asynchronous workers in
/// virtual time. The learning rate is chosen for every arm from the same values, by validation with the first seed, and from
/// further ones as long as the best lies at the edge. Finished runs are kept in the folder and not run again, so an
/// interrupted experiment goes on where it was.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  sanderling reproduce upcycling --quick                  # minutes, one seed
  sanderling reproduce upcycling                          # the full form, three seeds
  sanderling reproduce upcycling --workers 8 --seeds 1    # trained on by 8 asynchronous workers")]
pub struct Arguments {
    /// Train on with so many asynchronous workers instead of AdamW in one process
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=256))]
    workers: Option<u32>,
    /// What all reproductions take.
    #[command(flatten)]
    options: Options,
}

/// What is the same for all arms.
#[derive(Clone, Debug)]
struct Settings {
    run: RunConfig,
    dense: ModelConfig,
    pretraining_steps: u64,
    /// Of the dense continuation.
    steps: u64,
    workers: Option<u32>,
    /// A single one is not chosen from, and not added to.
    rates: Vec<f64>,
    seeds: Vec<u64>,
}

/// The rate of the dense pre-training.
const PRETRAINING_RATE: f64 = 4e-3;
/// Evaluations in a run.
const LOOKS: u64 = 10;
/// Added to the seed of what comes after pre-training, which thus sees other windows of the text.
const SECOND_PHASE: u64 = 1 << 32;

impl Settings {
    fn new(arguments: &Arguments, vocabulary: usize) -> anyhow::Result<Self> {
        let mut run = RunConfig::default();
        run.data.batch_size = 12;
        let model = &mut run.model;
        (model.hidden_size, model.layers, model.context) = (64, 2, 64);
        (model.intermediate_size, model.experts, model.top_k) = (256, 1, 1);
        run.validate()?;
        let dense = run.model_config(vocabulary);
        let workers = arguments.workers;
        let steps = arguments.options.steps(1000, 400);
        let rates = match (workers, arguments.options.quick) {
            (None, true) => vec![2e-3],
            (None, false) => vec![1e-3, 2e-3, 4e-3],
            // η0 of η0/√(1+τ).
            (Some(_), true) => vec![4e-3],
            (Some(_), false) => vec![2e-3, 4e-3, 8e-3],
        };
        Ok(Self {
            run,
            dense,
            pretraining_steps: steps,
            steps,
            workers,
            rates,
            seeds: arguments.options.seeds(),
        })
    }

    fn run(&self, seed: u64) -> RunConfig {
        let mut run = self.run.clone();
        run.run.seed = seed;
        run
    }

    fn stretch(&self, evaluations: u64, rate: f64, first: u64) -> Stretch {
        Stretch {
            batches: Batches { first, per_step: 1 },
            evaluations,
            rate,
            warmup: warmup(evaluations),
            final_fraction: 0.1,
            eval_every: look_every(evaluations, LOOKS),
            clip_norm: self.run.training.clip_norm,
            adamw: AdamWSettings::default(),
        }
    }

    fn tokens_per_step(&self) -> u64 {
        u64::from(self.run.data.batch_size) * self.run.model.context as u64
    }

    fn key(&self, (arm, budget): (Arm, Budget), seed: u64, rate: f64) -> RunKey {
        // The dense model's two budgets are one run.
        let budget = if arm == ARMS[0] { Budget::Compute } else { budget };
        RunKey {
            arm: arm.key.to_owned(),
            budget,
            seed,
            rate,
            workers: self.workers,
            pretraining_steps: self.pretraining_steps,
            dense_steps: self.steps,
            batch_size: self.run.data.batch_size,
        }
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

fn warmup(evaluations: u64) -> u64 {
    100.min(evaluations / 10)
}

/// Names a run within the experiment.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
struct RunKey {
    arm: String,
    budget: Budget,
    seed: u64,
    rate: f64,
    workers: Option<u32>,
    pretraining_steps: u64,
    dense_steps: u64,
    batch_size: u32,
}

/// A finished run.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
struct RunResult {
    key: RunKey,
    steps: u64,
    tokens: u64,
    /// Forward and backward, products and causal attention.
    flops: f64,
    parameters: u64,
    active_parameters: u64,
    best_val_loss: f64,
    best_step: u64,
    /// Of the best model; by workers, of the last, since nobody keeps the others.
    test: Score,
    seconds: f64,
    curve: Vec<Point>,
}

impl Finished for RunResult {
    type Key = RunKey;

    fn key(&self) -> &RunKey {
        &self.key
    }
}

/// An arm with a budget: what the table has a row for.
type Contestant = (Arm, Budget);

fn contestants() -> Vec<Contestant> {
    let mixtures = ARMS[1..].iter().flat_map(|&arm| Budget::ALL.map(|budget| (arm, budget)));
    std::iter::once((ARMS[0], Budget::Compute)).chain(mixtures).collect()
}

struct Experiment {
    settings: Settings,
    corpus: Arc<Corpus>,
    folder: PathBuf,
    jobs: Jobs,
    book: Book<RunResult>,
}

/// Runs the command.
///
/// # Errors
/// Whatever keeps the experiment from its end, in a sentence.
pub fn upcycling(arguments: &Arguments) -> anyhow::Result<()> {
    let corpus = Arc::new(Corpus::bundled());
    let settings = Settings::new(arguments, corpus.vocabulary().len())?;
    let name = settings.workers.map_or("upcycling".to_owned(), |workers| format!("upcycling-{workers}w"));
    let folder = arguments.options.folder(&name);
    let book = Book::open(&folder)?;
    let experiment = Experiment { settings, corpus, folder, jobs: arguments.options.jobs(), book };

    let started = Instant::now();
    let dense = experiment.pretrain_all()?;
    let chosen = experiment.choose_rates(&dense)?;
    let settings = &experiment.settings;
    let rows: Vec<(Contestant, Vec<RunKey>)> = chosen
        .into_iter()
        .map(|(contestant, rate)| {
            let key = |&seed: &u64| settings.key(contestant, seed, rate);
            (contestant, settings.seeds.iter().map(key).collect())
        })
        .collect();
    experiment.run_all(
        "running all seeds",
        &dense,
        rows.iter().flat_map(|(_, keys)| keys.clone()).collect(),
    )?;
    let text = report(&experiment, &rows, started.elapsed().as_secs_f64())?;
    write_report(&experiment.folder, &text)
}

impl Experiment {
    /// The dense model of every seed: read from the folder, or trained and written there.
    fn pretrain_all(&self) -> anyhow::Result<Vec<Dense>> {
        let folder = self.folder.join("dense");
        let book = Book::<Pretrained>::open(&folder)?;
        let evaluations = self.settings.pretraining_steps;
        let wanted: Vec<_> =
            self.settings.seeds.iter().map(|&seed| ((seed, evaluations), evaluations)).collect();
        self.jobs.make_missing(("pre-training", EVALUATIONS), &book, &wanted, |&(seed, _), progress| {
            self.pretrain(seed, &self.directory(seed), progress)?;
            Ok(Pretrained { of: (seed, evaluations) })
        })?;
        let mut dense = Vec::new();
        for &seed in &self.settings.seeds {
            let directory = self.directory(seed);
            let checkpoint = Checkpoint::open(&directory)?;
            ensure!(
                checkpoint.config() == &self.settings.dense,
                "{} holds another model than this experiment's; remove it",
                directory.display()
            );
            dense.push(Dense::load(&checkpoint)?);
        }
        Ok(dense)
    }

    fn directory(&self, seed: u64) -> PathBuf {
        self.folder.join("dense").join(format!("{}-{seed}", self.settings.pretraining_steps))
    }

    fn pretrain(&self, seed: u64, directory: &Path, progress: &Progress<'_>) -> anyhow::Result<()> {
        let settings = &self.settings;
        let run = settings.run(seed);
        let initial = initial_parameters(&settings.dense, seed)?;
        let stretch = settings.stretch(settings.pretraining_steps, PRETRAINING_RATE, 0);
        let mut task =
            LanguageTask::from_parameters(&run, self.corpus.clone(), settings.dense.clone(), initial.into())?;
        let trained = train(&mut task, &stretch, &|done| progress.at(done))?;
        if directory.exists() {
            // Of a process that was killed before it could note it.
            fs::remove_dir_all(directory)
                .with_context(|| format!("cannot remove {}", directory.display()))?;
        }
        checkpoint::save(directory, &settings.dense, &trained.best, &[])?;
        Ok(())
    }

    /// Makes the runs that are not there yet.
    fn run_all(&self, what: &'static str, dense: &[Dense], keys: Vec<RunKey>) -> anyhow::Result<()> {
        let steps = |key: &RunKey| self.settings.steps_of(contestant(key));
        let wanted = keys.into_iter().map(|key| steps(&key).map(|steps| (key, steps)));
        let wanted: Vec<_> = wanted.collect::<Result<_, _>>()?;
        self.jobs.make_missing((what, EVALUATIONS), &self.book, &wanted, |key, progress| {
            let place = self.settings.seeds.iter().position(|&seed| seed == key.seed).expect("a known seed");
            self.run(&dense[place], key, progress)
        })
    }

    fn run(&self, dense: &Dense, key: &RunKey, progress: &Progress<'_>) -> anyhow::Result<RunResult> {
        let started = Instant::now();
        let settings = &self.settings;
        let (arm, budget) = contestant(key);
        let steps = settings.steps_of((arm, budget))?;
        let (config, parameters) = match arm.recipe(key.seed) {
            None => (dense.config.clone(), dense.parameters.clone()),
            Some(recipe) => dense.upcycle(&recipe)?,
        };
        let mut run = settings.run(key.seed + SECOND_PHASE);
        let mut task =
            LanguageTask::from_parameters(&run, self.corpus.clone(), config.clone(), parameters.into())?;
        let (curve, last) = match key.workers {
            None => {
                let stretch = settings.stretch(steps, key.rate, 0);
                let trained = train(&mut task, &stretch, &|done| progress.at(done))?;
                (trained.curve, trained.best)
            }
            Some(workers) => {
                asynchronous(&mut run, (workers, steps, key.rate));
                let every = run.training.eval_every;
                let evaluations = Evaluations::Aside { every, until: f64::NEG_INFINITY };
                let conditions = Conditions::default();
                let report = simulate(&run, &mut task, &conditions, evaluations, &|done| progress.at(done))?;
                (report.curve, report.theta)
            }
        };
        let test = task.evaluate(&last, Split::Test)?;
        let tokens = steps * settings.tokens_per_step();
        let best = curve.iter().min_by(|a, b| a.score.loss.total_cmp(&b.score.loss));
        let best = best.expect("it was evaluated before the first step");
        Ok(RunResult {
            key: key.clone(),
            steps,
            tokens,
            flops: 3.0 * tokens as f64 * forward_flops_per_token(&config, settings.run.model.context, true),
            parameters: config.layout()?.len() as u64,
            active_parameters: config.active_parameters()? as u64,
            best_val_loss: best.score.loss,
            best_step: best.steps,
            test,
            seconds: started.elapsed().as_secs_f64(),
            curve: curve.clone(),
        })
    }

    /// The rate of every contestant: the best by validation with the first seed.
    fn choose_rates(&self, dense: &[Dense]) -> anyhow::Result<Vec<(Contestant, f64)>> {
        let settings = &self.settings;
        let grid = Grid { rates: settings.rates.clone(), momenta: vec![0.0] };
        let key = |contestant, tried: Tried| settings.key(contestant, settings.seeds[0], tried.rate);
        let score = |contestant, tried| {
            let run = self.book.find(&key(contestant, tried)).expect("the sweep was run");
            Score { loss: run.best_val_loss, accuracy: None }
        };
        let mut searches: Vec<_> =
            contestants().into_iter().map(|contestant| (contestant, Search::new(&grid))).collect();
        loop {
            let sweep = searches.iter().flat_map(|(contestant, search)| {
                search.points().into_iter().map(|tried| key(*contestant, tried))
            });
            self.run_all("choosing learning rates", dense, sweep.collect())?;
            let mut is_widened = false;
            for (contestant, search) in &mut searches {
                is_widened |= search.widen(|tried| score(*contestant, tried));
            }
            if !is_widened {
                let best = |(contestant, search): (Contestant, Search)| {
                    (contestant, search.best(|tried| score(contestant, tried)).rate)
                };
                return Ok(searches.into_iter().map(best).collect());
            }
        }
    }
}

/// Whose run it is.
fn contestant(key: &RunKey) -> Contestant {
    let arm = ARMS.into_iter().find(|arm| arm.key == key.arm).expect("keys are made of arms");
    (arm, key.budget)
}

/// The settings of training on by asynchronous workers.
fn asynchronous(run: &mut RunConfig, (workers, steps, rate): (u32, u64, f64)) {
    run.run.workers = workers;
    let training = &mut run.training;
    (training.method, training.steps) = (Method::DgsAdam, steps);
    (training.warmup_steps, training.eval_every) = (warmup(steps), look_every(steps, LOOKS));
    scale_rates(training, rate);
}

/// That the dense model of a seed is there.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
struct Pretrained {
    of: (u64, u64),
}

impl Finished for Pretrained {
    type Key = (u64, u64);

    fn key(&self) -> &(u64, u64) {
        &self.of
    }
}
