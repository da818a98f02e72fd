//! A whole run in one thread and in virtual time: the cores of server and workers with workers of uneven speed,
//! answers that get lost and workers that vanish. The same configuration and faults give the same run, bit for bit.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::sync::Arc;

use rand_chacha::ChaCha12Rng;
use sanderling_common::config::RunConfig;
use sanderling_common::corpus::Corpus;
use sanderling_common::ids::{SessionId, Step, WorkerId};
use sanderling_common::init::{Purpose, initial_parameters, normal_pair, stream, uniform};
use sanderling_common::wire::control::EvaluationReport;
use sanderling_common::wire::frame::{Reply, WireError};
use sanderling_common::wire::{EvaluationJob, Push, Refusal, Work};
use sanderling_server::core::{SerialServer, ServerSettings, SessionsFull};
use sanderling_worker::core::{AnswerError, Diverged, WorkerCore, WorkerSettings};
use sanderling_worker::engine::Engine;
use sanderling_worker::model::ModelError;

/// How uneven the workers are and what goes wrong. Times are in units of a gradient of a worker of middling speed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Conditions {
    /// Standard deviation of the logarithm of a worker's speed.
    pub speed_spread: f64,
    /// How long a push or an answer travels.
    pub latency: f64,
    /// Probability that an answer is lost; the worker then repeats its push.
    pub lost_answers: f64,
    /// Probability that a worker vanishes instead of sending a push; another takes its place when its lease is over.
    pub vanishing: f64,
}

/// How long a worker waits for a lost answer, and for work when there is none.
const RETRY_AFTER: f64 = 3.0;

/// How long the server waits for a worker that has vanished.
const LEASE: f64 = 20.0;

/// How long an evaluation takes.
const EVALUATION: f64 = 10.0;

/// What came of a simulated run.
#[derive(Clone, Debug, PartialEq)]
pub struct SimulationReport {
    /// The model at the end.
    pub theta: Vec<f32>,
    /// All evaluations, in the order of their reports.
    pub evaluations: Vec<EvaluationReport>,
    /// Updates applied.
    pub steps: u64,
    /// Batches done.
    pub done: u64,
    /// The staleness of every update.
    pub staleness: Vec<u32>,
    /// Of every update, the share of choices of experts that were dropped.
    pub dropped: Vec<f32>,
    /// Answers that were lost.
    pub lost_answers: u64,
    /// Workers that vanished.
    pub vanished: u64,
    /// When the last worker was done.
    pub time: f64,
}

/// Why a simulation ended before its time.
#[derive(Debug, thiserror::Error)]
pub enum SimulationError {
    /// A gradient cannot be computed.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The run allows fewer sessions than workers.
    #[error(transparent)]
    Sessions(#[from] SessionsFull),
    /// The training diverged.
    #[error("the training diverged: {0}")]
    Diverged(#[from] Diverged),
    /// The server refused a push.
    #[error("a push was refused: {0}")]
    Refused(#[from] Refusal),
    /// A worker refused an answer.
    #[error("an answer makes no sense: {0}")]
    Answer(#[from] AnswerError),
    /// The two sides disagree about the format of a message.
    #[error("a message cannot be read: {0}")]
    Wire(#[from] WireError),
}

/// What a worker is about to finish.
enum Stage {
    /// Waiting before it asks for work.
    Idle,
    /// A gradient.
    Computing,
    /// Its push is under way.
    Pushing,
    /// The answer is under way.
    Answered(Reply),
    /// An evaluation.
    Evaluating(EvaluationJob),
}

struct SimulatedWorker {
    id: WorkerId,
    core: WorkerCore,
    /// Of a gradient.
    duration: f64,
    rng: ChaCha12Rng,
    stage: Stage,
}

/// A point in virtual time; ties are broken by the order of scheduling.
struct Due {
    time: f64,
    order: u64,
    worker: usize,
}

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Due {}

impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Due {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.time.total_cmp(&other.time).then(self.order.cmp(&other.order))
    }
}

/// Simulates a run from its first batch to its last evaluation.
///
/// # Errors
/// A [`SimulationError`].
pub fn simulate(
    run: &RunConfig,
    corpus: Arc<Corpus>,
    conditions: &Conditions,
) -> Result<SimulationReport, SimulationError> {
    let mut simulation = Simulation::new(run, corpus, conditions)?;
    while let Some(Reverse(due)) = simulation.schedule.pop() {
        simulation.report.time = due.time;
        simulation.advance(due.worker)?;
    }
    let standing = simulation.server.core().standing();
    (simulation.report.steps, simulation.report.done) = (standing.step.0, standing.done);
    simulation.report.theta = simulation.server.theta();
    Ok(simulation.report)
}

struct Simulation {
    run: RunConfig,
    conditions: Conditions,
    engine: Engine,
    /// θ0, which every worker would make of the seed.
    initial: Vec<f32>,
    server: SerialServer,
    workers: Vec<SimulatedWorker>,
    snapshots: BTreeMap<Step, Arc<[f32]>>,
    schedule: BinaryHeap<Reverse<Due>>,
    scheduled: u64,
    sessions: u64,
    report: SimulationReport,
}

impl Simulation {
    fn new(run: &RunConfig, corpus: Arc<Corpus>, conditions: &Conditions) -> Result<Self, SimulationError> {
        let config = run.model_config(corpus.vocabulary().len());
        let theta = initial_parameters(&config, run.run.seed).map_err(ModelError::from)?;
        let engine = Engine::new(run, config, corpus)?;
        let server = SerialServer::new(engine.layout(), &theta, &ServerSettings::from(run));
        let mut simulation = Self {
            run: run.clone(),
            conditions: *conditions,
            engine,
            initial: theta,
            server,
            workers: Vec::new(),
            snapshots: BTreeMap::new(),
            schedule: BinaryHeap::new(),
            scheduled: 0,
            sessions: 0,
            report: SimulationReport {
                theta: Vec::new(),
                evaluations: Vec::new(),
                steps: 0,
                done: 0,
                staleness: Vec::new(),
                dropped: Vec::new(),
                lost_answers: 0,
                vanished: 0,
                time: 0.0,
            },
        };
        for number in 0..run.run.workers as usize {
            let worker = simulation.join()?;
            simulation.workers.push(worker);
            simulation.wake(number, 0.0, Stage::Idle);
        }
        Ok(simulation)
    }

    /// A new worker, of a speed of its own.
    fn join(&mut self) -> Result<SimulatedWorker, SimulationError> {
        let session = SessionId(self.sessions);
        self.sessions += 1;
        let (id, step, base) = self.server.open_session(session)?;
        let base = base.onto(self.engine.layout(), self.initial.clone()).map_err(AnswerError::from)?;
        let mut rng = stream(self.run.run.seed, Purpose::Simulation, u64::from(id.0));
        let duration = libm::exp(self.conditions.speed_spread * normal_pair(&mut rng).0);
        let settings = WorkerSettings::from(&self.run);
        let core = WorkerCore::new(self.engine.layout().clone(), &settings, session, base, step);
        Ok(SimulatedWorker { id, core, duration, rng, stage: Stage::Idle })
    }

    /// The worker reaches the end of `stage` after `duration`.
    fn wake(&mut self, worker: usize, duration: f64, stage: Stage) {
        self.workers[worker].stage = stage;
        self.scheduled += 1;
        let time = self.report.time + duration;
        self.schedule.push(Reverse(Due { time, order: self.scheduled, worker }));
    }

    fn happens(&mut self, worker: usize, probability: f64) -> bool {
        uniform(&mut self.workers[worker].rng) < probability
    }

    fn advance(&mut self, worker: usize) -> Result<(), SimulationError> {
        match std::mem::replace(&mut self.workers[worker].stage, Stage::Idle) {
            Stage::Idle => self.ask(worker),
            Stage::Computing => self.compute(worker),
            Stage::Pushing => self.push(worker),
            Stage::Answered(reply) => self.answer(worker, &reply),
            Stage::Evaluating(job) => self.evaluate(worker, job),
        }
    }

    fn ask(&mut self, worker: usize) -> Result<(), SimulationError> {
        let session = self.workers[worker].core.session();
        let work = self.server.core().work(session).ok_or(Refusal::UnknownSession)?;
        self.workers[worker].core.add_work(&work)?;
        self.begin(worker, &work);
        Ok(())
    }

    /// Begins what is to be done next; a worker that is told that the run is over leaves.
    fn begin(&mut self, worker: usize, work: &Work) {
        let SimulatedWorker { core, duration, .. } = &self.workers[worker];
        let (session, duration) = (core.session(), *duration);
        if work.finished {
            self.server.close_session(session);
        } else if let Some(job) = work.evaluation {
            self.wake(worker, EVALUATION * duration, Stage::Evaluating(job));
        } else if core.next_batch().is_some() {
            self.wake(worker, duration, Stage::Computing);
        } else {
            self.wake(worker, RETRY_AFTER, Stage::Idle);
        }
    }

    fn compute(&mut self, worker: usize) -> Result<(), SimulationError> {
        let core = &mut self.workers[worker].core;
        let batch = core.next_batch().expect("a worker computes what it has");
        let tokens = self.engine.batch(batch);
        let loss = self.engine.take_gradient(core.view(), &tokens)?;
        let staleness = core.last_staleness();
        let count = u32::try_from(tokens.tokens()).expect("the configuration bounds a batch");
        let (loss, dropped) = (loss.cross_entropy as f32, loss.dropped as f32);
        core.handle_gradient(batch, self.engine.gradient(), loss, dropped, count, staleness)?;
        self.wake(worker, self.conditions.latency, Stage::Pushing);
        Ok(())
    }

    fn push(&mut self, worker: usize) -> Result<(), SimulationError> {
        if self.happens(worker, self.conditions.vanishing) {
            self.report.vanished += 1;
            self.server.close_session(self.workers[worker].core.session());
            self.workers[worker] = self.join()?;
            self.wake(worker, LEASE, Stage::Idle);
            return Ok(());
        }
        let mut frame = Vec::new();
        self.workers[worker].core.pending().expect("a push is under way").encode(&mut frame);
        let push = Push::decode(&frame)?;
        let (reply, snapshot) = self.server.handle_push(&push)?;
        if let Some(parameters) = snapshot {
            self.snapshots.insert(self.server.core().standing().step, parameters.into());
        }
        if self.happens(worker, self.conditions.lost_answers) {
            self.report.lost_answers += 1;
            self.wake(worker, RETRY_AFTER, Stage::Pushing);
        } else {
            self.wake(worker, self.conditions.latency, Stage::Answered(Reply::decode(&reply)?));
        }
        Ok(())
    }

    fn answer(&mut self, worker: usize, reply: &Reply) -> Result<(), SimulationError> {
        let answer = match reply {
            Reply::Answer(answer) => answer,
            Reply::Refused(refusal) => return Err((*refusal).into()),
        };
        let SimulatedWorker { id, core, .. } = &mut self.workers[worker];
        self.report.dropped.extend(core.pending().map(|push| push.dropped));
        let work = core.handle_answer(answer)?;
        assert_eq!(self.server.replica(*id), core.theta(), "the replica of {id} differs from its model");
        self.report.staleness.push(answer.staleness);
        self.begin(worker, &work);
        Ok(())
    }

    fn evaluate(&mut self, worker: usize, job: EvaluationJob) -> Result<(), SimulationError> {
        let target = self.snapshots.get(&job.step).expect("snapshots are kept while they are wanted");
        let core = &self.workers[worker].core;
        let payload = self.server.aside(core.session(), target).ok_or(Refusal::UnknownSession)?;
        let report = self.engine.evaluate(&core.model_aside(&payload)?, job)?;
        self.server.core().report(self.workers[worker].core.session(), &report);
        self.snapshots.retain(|&step, _| self.server.core().needs_snapshot(step));
        self.report.evaluations.push(report);
        self.ask(worker)
    }
}
