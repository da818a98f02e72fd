//! A run as data, and what comes of it.

use std::sync::{Arc, OnceLock};
use std::time::Instant;

use anyhow::ensure;
use clap::ValueEnum;
use sanderling_common::config::{
    BUNDLED_TEXT, DataSettings, ExchangeSettings, ModelSettings, RunConfig, TrainingSettings, UpcycleSettings,
};
use sanderling_common::corpus::Corpus;
use sanderling_common::init::parameters_hash;
use sanderling_common::join::hex;
use sanderling_common::method::Method;
use sanderling_common::origin::Origin;
use sanderling_common::wire::{Refusal, Split};
use serde_json::{Value, json};

use super::book::{Finished, REVISION};
use super::jobs::Progress;
use super::reference::{Stretch, train};
use super::text::counted;
use crate::adamw::AdamWSettings;
use crate::commands::UsageError;
use crate::simulation::{Conditions, Evaluations, Point, SimulationError, SimulationReport, simulate};
use crate::task::{DigitsTask, LanguageTask, Score, Task};

/// What is learned.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    serde::Serialize,
    serde::Deserialize,
    clap::ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub(in crate::reproduce) enum Subject {
    /// The bundled text, character by character.
    // Run files, where a reproduction takes them, can name another.
    Text,
    /// Handwritten digits.
    Digits,
}

impl Subject {
    /// For tables.
    pub(in crate::reproduce) fn name(self) -> &'static str {
        match self {
            Self::Text => "characters",
            Self::Digits => "digits",
        }
    }

    /// On the command line.
    pub(in crate::reproduce) fn option(self) -> String {
        self.to_possible_value().expect("none is skipped").get_name().to_owned()
    }

    /// What is trained on, and from where on.
    ///
    /// # Errors
    /// If that cannot be read or made, or is not what it was when the run was described.
    fn task(self, run: &RunConfig, contents: &Contents) -> anyhow::Result<Box<dyn Task>> {
        static BUNDLED: OnceLock<Arc<Corpus>> = OnceLock::new();
        Ok(match self {
            Self::Text => {
                let origin = Origin::open(run)?;
                let is_bundled = run.data.text == BUNDLED_TEXT && !run.starts_from_checkpoint();
                let corpus = match is_bundled {
                    true => BUNDLED.get_or_init(|| Arc::new(Corpus::bundled())).clone(),
                    false => Arc::new(origin.corpus(run)?),
                };
                let Contents { text_sha256, init_sha256 } = contents;
                unchanged("text", &run.data.text, text_sha256, || Ok(corpus.sha256()))?;
                let begun = origin.begin(run, corpus.vocabulary().len())?;
                unchanged("checkpoint", &run.model.init, init_sha256, || {
                    Ok(parameters_hash(&begun.model.layout()?, &begun.parameters))
                })?;
                Box::new(LanguageTask::from_parameters(run, corpus, begun.model, begun.parameters.into())?)
            }
            Self::Digits => {
                let batch_size = run.data.batch_size as usize;
                Box::new(DigitsTask::new(run.run.seed, batch_size, run.model.aux_loss))
            }
        })
    }
}

/// Refuses what was replaced since its hash was taken, if one was: its runs would be kept as those of what was there before.
fn unchanged(
    what: &str,
    path: &str,
    expected: &str,
    found: impl FnOnce() -> anyhow::Result<[u8; 32]>,
) -> anyhow::Result<()> {
    if expected.is_empty() {
        return Ok(());
    }
    let found = hex(&found()?);
    ensure!(
        found == expected,
        "the {what} {path} was changed meanwhile: its hash is {found}, and was {expected}; start again, which goes on with what \
         is there now"
    );
    Ok(())
}

/// The sections of a run file that make a subject's small model, of which many runs can be afforded.
pub(in crate::reproduce) fn small_model(subject: Subject) -> &'static str {
    match subject {
        Subject::Text => {
            "[data]\nbatch_size = 12\n\
             [model]\nhidden_size = 64\nlayers = 2\nintermediate_size = 64\ncontext = 64\n"
        }
        // Its shape is fixed.
        Subject::Digits => "[data]\nbatch_size = 16\n",
    }
}

/// η0 of the default method for the small model, twice that of the default model.
pub(in crate::reproduce) const SMALL_MODEL_RATE: f64 = 4e-3;

/// Updates of a run by workers with so many gradient evaluations.
///
/// # Errors
/// If they are not whole exchanges.
pub(in crate::reproduce) fn exchanges(evaluations: u64, local_steps: u32) -> anyhow::Result<u64> {
    let local_steps = u64::from(local_steps.max(1));
    ensure!(
        evaluations.is_multiple_of(local_steps),
        UsageError(format!(
            "{} cannot be made in whole exchanges of {local_steps} local steps; give other --steps",
            counted(evaluations, "gradient evaluation")
        ))
    );
    Ok(evaluations / local_steps)
}

/// Gives a run the default method's rates for another η0: the cap and the worker's own rate keep their share of it.
pub(in crate::reproduce) fn scale_rates(training: &mut TrainingSettings, rate: f64) {
    training.learning_rate = rate;
    (training.learning_rate_max, training.local_rate) = Method::DgsAdam.defaults().rates_beside(rate);
}

/// Who trains.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(in crate::reproduce) enum Trainer {
    /// Asynchronous workers, by the run's method.
    Workers(Conditions),
    /// Data-parallel AdamW: each step takes the mean gradient of as many batches as there are workers.
    AdamW,
}

/// SHA-256 of what a run file names by paths, in hexadecimal; empty where it names nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(in crate::reproduce) struct Contents {
    /// Of the text or token file.
    pub(in crate::reproduce) text_sha256: String,
    /// Of the parameters of the checkpoint that the run goes on from.
    pub(in crate::reproduce) init_sha256: String,
}

/// A run, fully described. Two that are equal come to the same, but for what [`REVISION`] stands for.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub(in crate::reproduce) struct Spec {
    pub(in crate::reproduce) revision: u32,
    pub(in crate::reproduce) subject: Subject,
    pub(in crate::reproduce) trainer: Trainer,
    pub(in crate::reproduce) seed: u64,
    pub(in crate::reproduce) workers: u32,
    pub(in crate::reproduce) data: DataSettings,
    pub(in crate::reproduce) model: ModelSettings,
    /// Of a mixture that is made of a dense checkpoint, with its hash.
    pub(in crate::reproduce) upcycle: UpcycleSettings,
    /// Of files that a run file names: what is in them, as far as the settings do not say it.
    pub(in crate::reproduce) contents: Contents,
    /// `steps` counts updates, of as many gradient evaluations as there are local steps; `eval_every` is how often the
    /// onlooker looks.
    pub(in crate::reproduce) training: TrainingSettings,
    pub(in crate::reproduce) exchange: ExchangeSettings,
}

impl Spec {
    /// The run that a server would be given.
    pub(in crate::reproduce) fn run(&self) -> RunConfig {
        let mut run = RunConfig::default();
        (run.run.seed, run.run.workers) = (self.seed, self.workers);
        (run.data, run.model, run.upcycle) = (self.data.clone(), self.model.clone(), self.upcycle.clone());
        (run.training, run.exchange) = (self.training.clone(), self.exchange.clone());
        run
    }

    /// A run by workers as `run` describes it.
    pub(in crate::reproduce) fn of(subject: Subject, run: &RunConfig, trainer: Trainer) -> Self {
        Self {
            revision: REVISION,
            subject,
            trainer,
            seed: run.run.seed,
            workers: run.run.workers,
            data: run.data.clone(),
            model: run.model.clone(),
            upcycle: run.upcycle.clone(),
            contents: Contents::default(),
            training: run.training.clone(),
            exchange: run.exchange.clone(),
        }
    }
}

impl Spec {
    /// The text that is trained on.
    pub(in crate::reproduce) fn text_name(&self) -> String {
        match (self.data.text.as_str(), self.contents.text_sha256.is_empty()) {
            (BUNDLED_TEXT, true) => "characters of the bundled text".to_owned(),
            (BUNDLED_TEXT, false) => "the bundled text".to_owned(),
            (path, _) => path.to_owned(),
        }
    }

    /// How the learning rate of a run by workers goes, after "the rate".
    pub(in crate::reproduce) fn describe_rate(&self) -> String {
        let decay = || self.training.decay.describe(self.training.final_rate_fraction);
        self.too_short_for_its_warmup().unwrap_or_else(decay)
    }

    /// That the rate of a run by workers never comes to its peak, if so, after "the rate".
    pub(in crate::reproduce) fn too_short_for_its_warmup(&self) -> Option<String> {
        let warmup_steps = self.training.warmup_steps;
        (self.training.steps < warmup_steps).then(|| {
            format!(
                "stays below its peak, since the warm-up of {warmup_steps} updates is longer than the run"
            )
        })
    }

    /// Whether it has the model, the start and the batches of another run of the same seed.
    pub(in crate::reproduce) fn shares_all_but_method(&self, other: &Self) -> bool {
        (&self.data, &self.model, &self.upcycle, &self.contents)
            == (&other.data, &other.model, &other.upcycle, &other.contents)
    }

    /// Everything that the run depends on, and nothing else.
    pub(in crate::reproduce) fn resolved(&self) -> Value {
        let mut resolved = plain(self);
        resolved.as_object_mut().expect("a run is an object").remove("trainer");
        match self.trainer {
            Trainer::Workers(conditions) => resolved["conditions"] = plain(&conditions),
            Trainer::AdamW => {
                // The method and the exchange of a run have no part in it.
                resolved["adamw"] = plain(&reference(&self.run()));
                resolved["training"] = json!(null);
                resolved["exchange"] = json!(null);
            }
        }
        if self.subject == Subject::Digits {
            let aux_loss = resolved["model"]["aux_loss"].take();
            resolved["model"] = json!({ "classifier": DigitsTask::SHAPE, "aux_loss": aux_loss });
            resolved["data"] = json!({ "batch_size": self.data.batch_size });
        }
        resolved
    }

    /// The run file of the same run in real time, if there is one.
    pub(in crate::reproduce) fn run_file(&self, name: &str) -> Option<RunConfig> {
        let is_real =
            self.subject == Subject::Text && self.trainer == Trainer::Workers(Conditions::default());
        is_real.then(|| {
            let mut run = self.run();
            run.run.name = name.to_owned();
            run
        })
    }
}

/// As JSON with numbers as they are written down: a `Value` made directly would show the float32 0.01 as
/// 0.009999999776482582.
pub(in crate::reproduce) fn plain(of: &impl serde::Serialize) -> Value {
    let text = serde_json::to_string(of).expect("settings have a JSON form");
    serde_json::from_str(&text).expect("it was written as JSON")
}

/// What came of a run.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub(in crate::reproduce) struct Outcome {
    /// Validation along the way, from before the first update to after the last.
    pub(in crate::reproduce) curve: Vec<Point>,
    /// The last model on the test split.
    pub(in crate::reproduce) test: Score,
    /// Parameters of the model.
    pub(in crate::reproduce) parameters: u64,
    /// Updates of the model.
    pub(in crate::reproduce) updates: u64,
    /// Of the frames of pushes, and of those of answers with what sessions begin with; 0 for one process.
    pub(in crate::reproduce) bytes_up: u64,
    pub(in crate::reproduce) bytes_down: u64,
    /// How many updates had each staleness, from 0 on.
    pub(in crate::reproduce) staleness: Vec<u64>,
    /// Why the run came to no end, if it did not.
    pub(in crate::reproduce) diverged: Option<String>,
    /// What it took here.
    pub(in crate::reproduce) seconds: f64,
}

impl Outcome {
    /// Of a run that came to no end, for this reason.
    pub(in crate::reproduce) fn diverged(parameters: u64, reason: String) -> Self {
        Self {
            curve: Vec::new(),
            test: NOTHING,
            parameters,
            updates: 0,
            bytes_up: 0,
            bytes_down: 0,
            staleness: Vec::new(),
            diverged: Some(reason),
            seconds: 0.0,
        }
    }

    /// The best model on the validation split; not a number of a run that diverged.
    pub(in crate::reproduce) fn best_validation(&self) -> Point {
        let best = self.curve.iter().min_by(|a, b| a.score.loss.total_cmp(&b.score.loss));
        best.copied().unwrap_or(Point { steps: 0, time: 0.0, score: NOTHING })
    }

    /// The last model on the validation split.
    pub(in crate::reproduce) fn validation(&self) -> Score {
        match (self.curve.last(), &self.diverged) {
            (Some(point), None) => point.score,
            _ => NOTHING,
        }
    }

    pub(in crate::reproduce) fn staleness_mean(&self) -> f64 {
        let (mut sum, mut count) = (0.0, 0.0);
        for (staleness, &updates) in self.staleness.iter().enumerate() {
            (sum, count) = (sum + staleness as f64 * updates as f64, count + updates as f64);
        }
        if count > 0.0 { sum / count } else { 0.0 }
    }

    /// The largest staleness.
    pub(in crate::reproduce) fn staleness_max(&self) -> usize {
        self.staleness.len().saturating_sub(1)
    }
}

/// The score of a run that diverged.
const NOTHING: Score = Score { loss: f64::NAN, accuracy: None };

/// A finished run.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub(in crate::reproduce) struct Run {
    pub(in crate::reproduce) spec: Spec,
    pub(in crate::reproduce) outcome: Outcome,
}

impl Outcome {
    /// Updates, of so many, that did not change the model, since the loss or the gradient was not finite, or too large; none of a
    /// run that diverged.
    pub(in crate::reproduce) fn skipped(&self, of: u64) -> u64 {
        if self.diverged.is_some() { 0 } else { of.saturating_sub(self.updates) }
    }

    /// The same as a sentence on the run of this name and seed, if there were any.
    pub(in crate::reproduce) fn skipped_text(&self, name: &str, seed: u64, of: u64) -> String {
        match self.skipped(of) {
            0 => String::new(),
            skipped => format!(
                "\n{name}, seed {seed}: {skipped} of {} did not change the model, since loss or gradient was not finite, or too \
                 large.\n",
                counted(of, "update")
            ),
        }
    }
}

impl Run {
    /// Updates, whether they changed the model or not.
    fn steps(&self) -> u64 {
        match self.spec.trainer {
            Trainer::Workers(_) => self.spec.training.steps,
            Trainer::AdamW => reference(&self.spec.run()).steps(),
        }
    }

    /// Whether it came to an end, and every update changed the model.
    pub(in crate::reproduce) fn is_whole(&self) -> bool {
        self.outcome.diverged.is_none() && self.outcome.skipped(self.steps()) == 0
    }

    /// A sentence on updates that did not change the model, if there were any; with the run's name in it.
    pub(in crate::reproduce) fn skipped_text(&self, name: &str) -> String {
        self.outcome.skipped_text(name, self.spec.seed, self.steps())
    }
}

impl Finished for Run {
    type Key = Spec;

    fn key(&self) -> &Spec {
        &self.spec
    }
}

/// Makes a run.
///
/// # Errors
/// If what it is made of cannot be read, or was changed; whatever [`by_workers`] and [`by_adamw`] fail with.
pub(in crate::reproduce) fn make(spec: &Spec, progress: &Progress<'_>) -> anyhow::Result<Run> {
    let run = spec.run();
    let mut task = spec.subject.task(&run, &spec.contents)?;
    let outcome = match &spec.trainer {
        Trainer::Workers(conditions) => by_workers(&run, task.as_mut(), conditions, progress)?,
        Trainer::AdamW => by_adamw(&reference(&run), task.as_mut(), progress)?.0,
    };
    Ok(Run { spec: spec.clone(), outcome })
}

/// Trains a task by asynchronous workers in virtual time.
///
/// # Errors
/// If the device fails, or the run is stopped. One that diverges is an outcome.
pub(in crate::reproduce) fn by_workers(
    run: &RunConfig,
    task: &mut dyn Task,
    conditions: &Conditions,
    progress: &Progress<'_>,
) -> anyhow::Result<Outcome> {
    let started = Instant::now();
    let evaluations = Evaluations::Aside { every: run.training.eval_every };
    let parameters = task.layout().len() as u64;
    let report = match simulate(run, task, conditions, evaluations, &|done| {
        progress.at(done * u64::from(run.training.local_steps))
    }) {
        Ok(report) => report,
        Err(error @ (SimulationError::Diverged(_) | SimulationError::Refused(Refusal::AbsurdNorm))) => {
            return Ok(Outcome::diverged(parameters, error.to_string()));
        }
        Err(error) => return Err(error.into()),
    };
    let SimulationReport { theta, curve, steps, staleness, bytes_up, bytes_down, .. } = report;
    let mut histogram = vec![0; staleness.iter().max().map_or(0, |&max| max as usize + 1)];
    staleness.iter().for_each(|&staleness| histogram[staleness as usize] += 1);
    let test = task.evaluate(&theta, Split::Test)?;
    Ok(Outcome {
        curve,
        test,
        parameters,
        updates: steps,
        bytes_up,
        bytes_down,
        staleness: histogram,
        diverged: None,
        seconds: started.elapsed().as_secs_f64(),
    })
}

/// Trains a task by AdamW; also returns the parameters with the lowest validation loss on the way.
///
/// # Errors
/// As [`by_workers`].
pub(in crate::reproduce) fn by_adamw(
    stretch: &Stretch,
    task: &mut dyn Task,
    progress: &Progress<'_>,
) -> anyhow::Result<(Outcome, Vec<f32>)> {
    let started = Instant::now();
    let parameters = task.layout().len() as u64;
    let trained = train(task, stretch, &|done| progress.at(done))?;
    if trained.last.iter().any(|value| !value.is_finite()) {
        let reason = "the parameters are not finite".to_owned();
        return Ok((Outcome::diverged(parameters, reason), trained.best));
    }
    let test = task.evaluate(&trained.last, Split::Test)?;
    let outcome = Outcome {
        curve: trained.curve,
        test,
        parameters,
        updates: stretch.steps() - trained.skipped,
        bytes_up: 0,
        bytes_down: 0,
        staleness: Vec::new(),
        diverged: None,
        seconds: started.elapsed().as_secs_f64(),
    };
    Ok((outcome, trained.best))
}

/// AdamW of a run's workers, who make every step together.
fn reference(run: &RunConfig) -> Stretch {
    let weight_decay = f64::from(run.training.weight_decay);
    let settings = AdamWSettings { weight_decay, ..AdamWSettings::default() };
    Stretch::of(&run.training, u64::from(run.run.workers), settings)
}
