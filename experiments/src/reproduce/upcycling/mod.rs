//! The claim of both papers on upcycling, at a small scale: after the same dense checkpoint and for the same compute, does
//! the upcycled mixture reach a lower validation loss than the dense model trained on?

mod arms;
mod report;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use sanderling_common::checkpoint::{self, Checkpoint};
use sanderling_common::config::{ExchangeSettings, ModelSettings, RunConfig, TrainingSettings};
use sanderling_common::corpus::Corpus;
use sanderling_common::init::initial_parameters;
use sanderling_common::method::{Decay, Method};
use sanderling_common::model_config::ModelConfig;
use sanderling_common::origin::Dense;
use sanderling_common::wire::Split;
use sanderling_worker::model::forward_flops_per_token;
use serde_json::{Value, json};

use self::arms::{ARMS, Arm, Budget, WARM_START_ARMS};
use self::report::report;
use super::lab::{
    Book, Choosing, Chosen, EVALUATIONS, Finished, Grid, Jobs, Options, Outcome, Progress, REVISION, Stretch,
    Tried, Warmup, by_adamw, by_workers, file_name, key_name, look_every, plain, scale_rates, train,
    write_report, write_resolved,
};
use crate::adamw::AdamWSettings;
use crate::simulation::Conditions;
use crate::task::{LanguageTask, Score, Task};

/// Dense against upcycled, at equal compute and at equal tokens
///
/// Trains a small dense model on the bundled text, upcycles it in several ways, and trains each on with a fresh
/// optimiser and learning rate: for the floating-point operations of the dense continuation (so the mixtures, which
/// cost more per token, see fewer tokens) and for its tokens: of 1 000 steps or, with --quick, 400. By AdamW in one
/// process or, with --workers, by asynchronous workers in virtual time, and for comparison some also by AdamW from the
/// same start. The learning rate is chosen for every arm from the same values, by validation with the first seed, and
/// from further ones as long as the best lies at the edge. Finished runs are kept in the folder and not run again, so
/// an interrupted experiment goes on where it was.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  sanderling reproduce upcycling --quick                  # minutes, one seed
  sanderling reproduce upcycling                          # the full form, three seeds
  sanderling reproduce upcycling --workers 8 --seeds 1    # trained on by 8 asynchronous workers
  sanderling reproduce upcycling --workers 8 --pretraining-steps 8000   # after a dense model that has learnt more")]
pub struct Arguments {
    /// Train on with so many asynchronous workers instead of AdamW in one process
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=256))]
    workers: Option<u32>,
    /// Steps of the dense model before it is upcycled; as many as the dense model is trained on for, unless said otherwise
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pretraining_steps: Option<u64>,
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
    /// Of AdamW, and η0 of η0/√(1+τ) of asynchronous workers. A single one is not chosen from, and not added to.
    rates: Vec<f64>,
    asynchronous_rates: Vec<f64>,
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
        // For everyone, whatever the default is, so that rows of different ages belong to one experiment.
        run.training.decay = Decay::Cosine;
        run.validate()?;
        let dense = run.model_config(vocabulary);
        let workers = arguments.workers;
        let steps = arguments.options.steps(1000, 400);
        let (rates, asynchronous_rates) = match arguments.options.quick {
            true => (vec![2e-3], vec![4e-3]),
            false => (vec![1e-3, 2e-3, 4e-3], vec![2e-3, 4e-3, 8e-3]),
        };
        Ok(Self {
            run,
            dense,
            pretraining_steps: arguments.pretraining_steps.unwrap_or(steps),
            steps,
            workers,
            rates,
            asynchronous_rates,
            seeds: arguments.options.seeds(),
        })
    }

    fn run(&self, seed: u64) -> RunConfig {
        let mut run = self.run.clone();
        run.run.seed = seed;
        run
    }

    /// By AdamW, with the weight decay that asynchronous workers have.
    fn stretch(&self, evaluations: u64, rate: f64, warmup: Warmup) -> Stretch {
        let training = &self.run.training;
        let weight_decay = f64::from(training.weight_decay);
        Stretch {
            batches_per_step: 1,
            evaluations,
            rate,
            warmup: match warmup {
                Warmup::Short => short_warmup(evaluations),
                Warmup::Long => {
                    let workers = u64::from(self.workers.expect("it is only beside workers"));
                    (training.warmup_exchanges * workers).min(evaluations / 4)
                }
            },
            decay: training.decay,
            final_fraction: training.final_rate_fraction,
            eval_every: look_every(evaluations, LOOKS),
            clip_norm: training.clip_norm,
            adamw: AdamWSettings { weight_decay, ..AdamWSettings::default() },
        }
    }

    fn pretraining(&self, seed: u64) -> Pretraining {
        Pretraining {
            revision: REVISION,
            seed,
            stretch: self.stretch(self.pretraining_steps, PRETRAINING_RATE, Warmup::Short),
            batch_size: self.run.data.batch_size,
            model: self.run.model.clone(),
        }
    }

    fn tokens_per_step(&self) -> u64 {
        u64::from(self.run.data.batch_size) * self.run.model.context as u64
    }

    /// Who has a row in the table: everyone by whom the experiment is about and, beside asynchronous workers, AdamW from some of
    /// the same starts and with as many gradient evaluations; that AdamW once with each warm-up.
    fn contestants(&self) -> Vec<Contestant> {
        let by = |workers, arm, budget| Contestant { arm, budget, workers, warmup: Warmup::Short };
        let mixtures = ARMS[1..].iter().flat_map(|&arm| Budget::ALL.map(|budget| (arm, budget)));
        // The dense model's two budgets are one run.
        let all = std::iter::once((ARMS[0], Budget::Compute)).chain(mixtures);
        let mut contestants: Vec<_> = all.map(|(arm, budget)| by(self.workers, arm, budget)).collect();
        if self.workers.is_some() {
            let dense = by(None, ARMS[0], Budget::Compute);
            let upcycled = WARM_START_ARMS.map(|arm| by(None, arm, Budget::Tokens));
            for reference in std::iter::once(dense).chain(upcycled) {
                contestants.push(reference);
                contestants.push(Contestant { warmup: Warmup::Long, ..reference });
            }
        }
        contestants
    }

    fn grid(&self, contestant: Contestant) -> Grid {
        let rates = if contestant.workers.is_some() { &self.asynchronous_rates } else { &self.rates };
        Grid { rates: rates.clone(), momenta: vec![0.0] }
    }

    fn key(&self, contestant: Contestant, seed: u64, rate: f64) -> anyhow::Result<RunKey> {
        let Contestant { arm, budget, workers, warmup } = contestant;
        let mut run = self.run.clone();
        let (steps, mut stretch) = (self.steps_of(arm, budget)?, None);
        match workers {
            Some(workers) => asynchronous(&mut run, (workers, steps, rate)),
            None => stretch = Some(self.stretch(steps, rate, warmup)),
        }
        let by = match stretch {
            Some(stretch) => By::AdamW(stretch),
            None => By::Workers { training: run.training, exchange: run.exchange },
        };
        Ok(RunKey {
            arm: arm.key.to_owned(),
            budget,
            rate,
            workers,
            pretraining: self.pretraining(seed),
            dense_steps: self.steps,
            by,
        })
    }

    /// Everything that a run depends on.
    fn resolved(&self, key: &RunKey, contestant: Contestant) -> Value {
        json!({
            "dense": plain(&self.dense),
            "upcycling": plain(&contestant.arm.recipe(key.pretraining.seed)),
            "run": plain(key),
        })
    }

    /// Steps that a budget allows an arm.
    fn steps_of(&self, arm: Arm, budget: Budget) -> anyhow::Result<u64> {
        match budget {
            Budget::Tokens => Ok(self.steps),
            Budget::Compute => {
                Ok((self.steps as f64 / arm.cost(&self.dense, self.run.model.context)?).round() as u64)
            }
        }
    }
}

fn short_warmup(evaluations: u64) -> u64 {
    100.min(evaluations / 10)
}

/// Who has a row in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Contestant {
    arm: Arm,
    budget: Budget,
    /// `None`: AdamW in one process.
    workers: Option<u32>,
    /// Of AdamW.
    warmup: Warmup,
}

impl Contestant {
    /// Who trains it.
    fn by(self) -> String {
        self.workers.map_or("AdamW".to_owned(), |workers| format!("{workers} workers"))
    }
}

/// Names a run, with everything that it depends on.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
struct RunKey {
    pretraining: Pretraining,
    arm: String,
    budget: Budget,
    rate: f64,
    workers: Option<u32>,
    /// Of the dense model after pre-training.
    dense_steps: u64,
    by: By,
}

/// How a model is trained on.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
enum By {
    AdamW(Stretch),
    Workers { training: TrainingSettings, exchange: ExchangeSettings },
}

/// A finished run.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
struct RunResult {
    key: RunKey,
    steps: u64,
    tokens: u64,
    /// Forward and backward, products and causal attention.
    flops: f64,
    active_parameters: u64,
    outcome: Outcome,
    /// The best model on the test split; by workers there is the last one only, since nobody keeps the others.
    best_test: Option<Score>,
}

impl Finished for RunResult {
    type Key = RunKey;

    fn key(&self) -> &RunKey {
        &self.key
    }
}

/// The text is small enough to overfit, so the best on the way counts.
fn best_validation(run: &RunResult) -> Score {
    run.outcome.best_validation().score
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
    let mut own = Vec::new();
    own.extend(settings.workers.map(|workers| format!("--workers {workers}")));
    own.extend(arguments.pretraining_steps.map(|steps| format!("--pretraining-steps {steps}")));
    let folder = arguments.options.folder("upcycling", &own)?;
    let book = Book::open(&folder)?;
    let experiment = Experiment { settings, corpus, folder, jobs: arguments.options.jobs(), book };

    let started = Instant::now();
    let dense = experiment.pretrain_all()?;
    let rows = experiment.rows(&dense)?;
    let text = report(&experiment, &rows, started.elapsed().as_secs_f64())?;
    write_report(&experiment.folder, &text)
}

/// The runs of one contestant, a seed each.
struct Row {
    contestant: Contestant,
    rate: f64,
    is_at_edge: bool,
    runs: Vec<RunResult>,
}

impl Experiment {
    /// The dense model of every seed: read from the folder, or trained and written there.
    fn pretrain_all(&self) -> anyhow::Result<Vec<Dense>> {
        let folder = self.folder.join("dense");
        let book = Book::<Pretrained>::open(&folder)?;
        let evaluations = self.settings.pretraining_steps;
        let of_seeds: Vec<Pretraining> =
            self.settings.seeds.iter().map(|&seed| self.settings.pretraining(seed)).collect();
        let wanted: Vec<_> = of_seeds.iter().map(|of| (of.clone(), evaluations)).collect();
        self.jobs.make_missing(("pre-training", EVALUATIONS), &book, &wanted, |of, progress| {
            self.pretrain(of, &folder.join(of.directory()), progress)?;
            Ok(Pretrained { of: of.clone() })
        })?;
        let mut dense = Vec::new();
        for of in &of_seeds {
            let directory = folder.join(of.directory());
            let checkpoint = Checkpoint::open(&directory);
            let checkpoint = checkpoint.and_then(|checkpoint| Dense::load(&checkpoint));
            dense.push(checkpoint.with_context(|| {
                format!(
                    "the dense models are damaged; remove {} for them to be trained again",
                    folder.display()
                )
            })?);
        }
        Ok(dense)
    }

    fn pretrain(&self, of: &Pretraining, directory: &Path, progress: &Progress<'_>) -> anyhow::Result<()> {
        let (settings, seed) = (&self.settings, of.seed);
        let run = settings.run(seed);
        let initial = initial_parameters(&settings.dense, seed)?;
        let mut task =
            LanguageTask::from_parameters(&run, self.corpus.clone(), settings.dense.clone(), initial.into())?;
        let trained = train(&mut task, &of.stretch, &|done| progress.at(done))?;
        if directory.exists() {
            // Of a process that was killed before it could note it.
            fs::remove_dir_all(directory)
                .with_context(|| format!("cannot remove {}", directory.display()))?;
        }
        checkpoint::save(directory, &settings.dense, &trained.best, &[])?;
        Ok(())
    }

    /// The rate of every contestant, the best by validation with the first seed, and then all its runs.
    fn rows(&self, dense: &[Dense]) -> anyhow::Result<Vec<Row>> {
        let settings = &self.settings;
        let make = |key: &RunKey, progress: &Progress<'_>| {
            let place =
                settings.seeds.iter().position(|&seed| seed == key.pretraining.seed).expect("a known seed");
            self.run(&dense[place], key, progress)
        };
        let wanted = |&contestant: &Contestant, tried: Tried, seed| {
            Ok((
                settings.key(contestant, seed, tried.rate)?,
                settings.steps_of(contestant.arm, contestant.budget)?,
            ))
        };
        let choosing = Choosing {
            what: "choosing learning rates",
            book: &self.book,
            jobs: self.jobs,
            wanted: &|contestant: &Contestant, tried| wanted(contestant, tried, settings.seeds[0]),
            make: &make,
            score: best_validation,
        };
        let chosen = choosing.choose(settings.contestants(), |&contestant| settings.grid(contestant))?;
        let chosen = better_warmups(chosen, &choosing)?;
        let mut all = Vec::new();
        for chosen in &chosen {
            for &seed in &settings.seeds {
                all.push(wanted(&chosen.contestant, chosen.best, seed)?);
            }
        }
        self.jobs.make_missing(("running all seeds", EVALUATIONS), &self.book, &all, make)?;
        let of_contestants = all.chunks(settings.seeds.len());
        let row = |(chosen, wanted): (&Chosen<Contestant>, &[(RunKey, u64)])| Row {
            contestant: chosen.contestant,
            rate: chosen.best.rate,
            is_at_edge: chosen.search.is_at_edge(chosen.best),
            runs: wanted.iter().map(|(key, _)| self.book.find(key).expect("every run was made")).collect(),
        };
        let rows: Vec<Row> = chosen.iter().zip(of_contestants).map(row).collect();
        for Row { contestant, runs, .. } in &rows {
            let Contestant { arm, budget, .. } = contestant;
            let name = file_name(&format!("{} {} {}", arm.key, budget.name(), contestant.by()));
            let resolved = settings.resolved(&runs[0].key, *contestant);
            write_resolved(&self.folder, &format!("{name}.json"), &format!("{resolved:#}\n"))?;
        }
        Ok(rows)
    }

    fn run(&self, dense: &Dense, key: &RunKey, progress: &Progress<'_>) -> anyhow::Result<RunResult> {
        let settings = &self.settings;
        let arm = ARMS.into_iter().find(|arm| arm.key == key.arm).expect("keys are made of arms");
        let seed = key.pretraining.seed;
        let steps = settings.steps_of(arm, key.budget)?;
        let (config, parameters) = match arm.recipe(seed) {
            None => (dense.config.clone(), dense.parameters.clone()),
            Some(recipe) => dense.upcycle(&recipe)?,
        };
        let mut run = settings.run(seed + SECOND_PHASE);
        let mut task =
            LanguageTask::from_parameters(&run, self.corpus.clone(), config.clone(), parameters.into())?;
        let (outcome, best_test) = match &key.by {
            By::AdamW(stretch) => {
                let (outcome, best) = by_adamw(stretch, &mut task, progress)?;
                (outcome, Some(task.evaluate(&best, Split::Test)?))
            }
            By::Workers { training, exchange } => {
                run.run.workers = key.workers.expect("workers are counted");
                (run.training, run.exchange) = (training.clone(), exchange.clone());
                (by_workers(&run, &mut task, &Conditions::default(), progress)?, None)
            }
        };
        let tokens = steps * settings.tokens_per_step();
        let flops = 3.0 * tokens as f64 * forward_flops_per_token(&config, settings.run.model.context, true);
        Ok(RunResult {
            key: key.clone(),
            steps,
            tokens,
            flops,
            active_parameters: config.active_parameters()? as u64,
            outcome,
            best_test,
        })
    }
}

/// The settings of training on by asynchronous workers.
fn asynchronous(run: &mut RunConfig, (workers, steps, rate): (u32, u64, f64)) {
    run.run.workers = workers;
    let training = &mut run.training;
    (training.method, training.steps) = (Method::DgsAdam, steps);
    (training.warmup_steps, training.eval_every) = (short_warmup(steps), look_every(steps, LOOKS));
    scale_rates(training, rate);
}

/// Of contestants that differ in their warm-up alone, one after the other, the better ones.
fn better_warmups(
    chosen: Vec<Chosen<Contestant>>,
    choosing: &Choosing<'_, Contestant, RunResult>,
) -> anyhow::Result<Vec<Chosen<Contestant>>> {
    let mut better: Vec<Chosen<Contestant>> = Vec::new();
    for chosen in chosen {
        let rival = better.pop_if(|of| {
            Contestant { warmup: chosen.contestant.warmup, ..of.contestant } == chosen.contestant
        });
        better.push(match rival {
            None => chosen,
            Some(rival) => {
                let loss =
                    |of: &Chosen<Contestant>| anyhow::Ok(choosing.score(&of.contestant, of.best)?.loss);
                // That of one that diverged is not a number, which is above all.
                if loss(&chosen)?.total_cmp(&loss(&rival)?).is_lt() { chosen } else { rival }
            }
        });
    }
    Ok(better)
}

/// Everything that the dense model of a seed depends on.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
struct Pretraining {
    revision: u32,
    seed: u64,
    stretch: Stretch,
    batch_size: u32,
    model: ModelSettings,
}

impl Pretraining {
    /// Where the model is.
    fn directory(&self) -> String {
        format!("{}-{}-{}", self.stretch.evaluations, self.seed, key_name(self))
    }
}

/// That the dense model of a seed is there.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
struct Pretrained {
    of: Pretraining,
}

impl Finished for Pretrained {
    type Key = Pretraining;

    fn key(&self) -> &Pretraining {
        &self.of
    }
}
