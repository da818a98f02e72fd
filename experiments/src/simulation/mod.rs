//! A whole training in one thread and in virtual time: the cores of server and workers, and a real model.
//!
//! Workers have uneven speeds, answers get lost, workers vanish or leave and come back, and the server's link can be slow.
//! The same run, task and conditions give the same model, bit for bit; a real run over QUIC whose events have the same
//! order gives it too.

mod conditions;
mod script;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::sync::Arc;

use rand_chacha::ChaCha12Rng;
use sanderling_common::config::RunConfig;
use sanderling_common::ids::{BatchId, SessionId, Step, WorkerId};
use sanderling_common::init::{Purpose, stream};
use sanderling_common::wire::control::EvaluationReport;
use sanderling_common::wire::frame::{Reply, WireError};
use sanderling_common::wire::{EvaluationJob, Push, Refusal, Split, Work};
use sanderling_server::core::{Base, Log, SerialServer, ServerSettings, SessionsFull};
use sanderling_worker::core::{AnswerError, Diverged, WorkerCore, WorkerSettings, means_over_steps};
use sanderling_worker::model::ModelError;

pub use conditions::Conditions;
use conditions::{Direction, happens};
pub use script::follow;

use crate::due::Due;
use crate::task::{Score, Task};

/// How long a worker waits for a lost answer, and for work when there is none.
const RETRY_AFTER: f64 = 3.0;

/// How long the server waits for a worker that has vanished.
const LEASE: f64 = 20.0;

/// How long an evaluation takes.
const EVALUATION: f64 = 10.0;

/// What a push says of the batch that it is of.
struct Pushed {
    loss: f32,
    dropped: f32,
    samples: u32,
}

/// Takes the gradient of a batch, and before it the local steps that it has.
fn take_gradients(
    task: &mut dyn Task,
    core: &mut WorkerCore,
    batch: BatchId,
    local_steps: u32,
) -> Result<Pushed, ModelError> {
    let (mut steps, mut samples) = (Vec::new(), 0_u32);
    for step in 0..local_steps {
        let taken = task.take_gradient(core.view(), batch.of_local_step(local_steps, step))?;
        steps.push((taken.loss, taken.dropped));
        samples = samples.saturating_add(taken.samples);
        if step + 1 < local_steps {
            let Ok(()) = core.handle_local_gradient(task.gradient(), taken.loss);
        }
    }
    let (loss, dropped) = means_over_steps(&steps);
    Ok(Pushed { loss, dropped, samples })
}

/// Who evaluates the model along the way.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Evaluations {
    /// The workers, as in a real run, which takes their time.
    ByWorkers,
    /// An onlooker, who costs nothing: after every so many updates, and at the end. The simulation is over with the last
    /// batch.
    Aside {
        /// Updates between evaluations.
        every: u64,
    },
}

/// A look at the model.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Point {
    /// Updates applied; of training by one process, gradients taken.
    pub steps: u64,
    /// When, in units of a gradient of a worker of middling speed; of training by one process, in steps, whose gradients are taken
    /// side by side.
    pub time: f64,
    /// On the validation split.
    #[serde(flatten)]
    pub score: Score,
}

/// What came of a simulated run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SimulationReport {
    /// The model at the end.
    pub theta: Vec<f32>,
    /// What workers reported of evaluations, in the order of their reports.
    pub evaluations: Vec<EvaluationReport>,
    /// What an onlooker saw, from before the first update on.
    pub curve: Vec<Point>,
    /// Updates applied.
    pub steps: u64,
    /// Batches done.
    pub done: u64,
    /// The staleness of every update.
    pub staleness: Vec<u32>,
    /// Of every update, the share of choices of experts that were dropped.
    pub dropped: Vec<f32>,
    /// Frames of pushes, repeated ones included.
    pub bytes_up: u64,
    /// Frames of answers, and what sessions begin with.
    pub bytes_down: u64,
    /// Answers that were lost.
    pub lost_answers: u64,
    /// Workers that vanished.
    pub vanished: u64,
    /// Workers that left and came back.
    pub returned: u64,
    /// When the last event happened.
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
    /// A gradient that is taken while an exchange is under way is not simulated.
    #[error("`overlap` cannot be simulated; set it to false")]
    Overlap,
    /// Whoever asked for the simulation wants it no more.
    #[error("stopped")]
    Stopped,
}

/// What a worker is about to finish.
enum Stage {
    /// Waiting before it asks for work.
    Idle,
    /// A gradient.
    Computing,
    /// Its push is under way.
    Pushing,
    /// Waiting for an answer that was lost, before it sends its push again.
    Resending,
    /// The answer is under way.
    Answered(Reply),
    /// An evaluation.
    Evaluating(EvaluationJob),
    /// Away, without a session.
    Away,
    /// Gone, with a session that the server still waits for.
    Vanished,
}

struct SimulatedWorker {
    id: WorkerId,
    core: WorkerCore,
    /// Of a gradient, at the median.
    duration: f64,
    /// Since it joined.
    exchanges: u32,
    rng: ChaCha12Rng,
    stage: Stage,
}

/// Simulates a run for as long as `keep_going` says so, which is told before every event how many batches are done.
///
/// # Errors
/// A [`SimulationError`].
pub fn simulate(
    run: &RunConfig,
    task: &mut dyn Task,
    conditions: &Conditions,
    evaluations: Evaluations,
    keep_going: &dyn Fn(u64) -> bool,
) -> Result<SimulationReport, SimulationError> {
    Simulation::new(run, task, conditions, evaluations, None)?.run(keep_going)
}

/// As [`simulate`], with a log that is told every decision of the server, as the journal of a real one is.
///
/// # Errors
/// A [`SimulationError`].
pub fn simulate_logged(
    run: &RunConfig,
    task: &mut dyn Task,
    conditions: &Conditions,
    evaluations: Evaluations,
    log: Box<dyn Log>,
) -> Result<SimulationReport, SimulationError> {
    Simulation::new(run, task, conditions, evaluations, Some(log))?.run(&|_| true)
}

fn refuse_overlap(run: &RunConfig) -> Result<(), SimulationError> {
    if run.training.overlap { Err(SimulationError::Overlap) } else { Ok(()) }
}

struct Simulation<'a> {
    run: RunConfig,
    conditions: Conditions,
    evaluations: Evaluations,
    task: &'a mut dyn Task,
    /// θ0, which every worker would make of the seed.
    initial: Vec<f32>,
    server: SerialServer,
    workers: Vec<SimulatedWorker>,
    snapshots: BTreeMap<Step, Arc<[f32]>>,
    schedule: BinaryHeap<Reverse<Due<usize>>>,
    scheduled: u64,
    sessions: u64,
    up: Direction,
    down: Direction,
    report: SimulationReport,
}

impl<'a> Simulation<'a> {
    fn new(
        run: &RunConfig,
        task: &'a mut dyn Task,
        conditions: &Conditions,
        evaluations: Evaluations,
        log: Option<Box<dyn Log>>,
    ) -> Result<Self, SimulationError> {
        refuse_overlap(run)?;
        let theta = task.initial();
        let mut settings = ServerSettings::from(run);
        if let Evaluations::Aside { .. } = evaluations {
            // No worker is asked to evaluate.
            settings.work.eval_every = u64::MAX;
        }
        let mut server = SerialServer::new(task.layout(), &theta, &settings);
        if let Some(log) = log {
            server.set_log(log);
        }
        let mut simulation = Self {
            run: run.clone(),
            conditions: *conditions,
            evaluations,
            task,
            initial: theta,
            server,
            workers: Vec::new(),
            snapshots: BTreeMap::new(),
            schedule: BinaryHeap::new(),
            scheduled: 0,
            sessions: 0,
            up: Direction::default(),
            down: Direction::default(),
            report: SimulationReport::default(),
        };
        for place in 0..run.run.workers as usize {
            let worker = simulation.join(place)?;
            simulation.workers.push(worker);
            simulation.wake(place, 0.0, Stage::Idle);
        }
        simulation.look(0)?;
        Ok(simulation)
    }

    fn run(mut self, keep_going: &dyn Fn(u64) -> bool) -> Result<SimulationReport, SimulationError> {
        while !self.is_over()
            && let Some(Reverse(due)) = self.schedule.pop()
        {
            if !keep_going(self.server.core().standing().done) {
                return Err(SimulationError::Stopped);
            }
            self.report.time = due.time;
            self.advance(due.what)?;
        }
        self.finish()
    }

    /// Whether an onlooker has seen everything.
    fn is_over(&self) -> bool {
        matches!(self.evaluations, Evaluations::Aside { .. })
            && self.server.core().standing().done >= self.run.training.steps
    }

    fn finish(mut self) -> Result<SimulationReport, SimulationError> {
        let standing = self.server.core().standing();
        (self.report.steps, self.report.done) = (standing.step.0, standing.done);
        self.report.theta = self.server.theta();
        if self.report.curve.last().is_some_and(|point| point.steps != standing.step.0) {
            self.look(standing.step.0)?;
        }
        Ok(self.report)
    }

    /// The onlooker evaluates the model.
    fn look(&mut self, steps: u64) -> Result<(), SimulationError> {
        if let Evaluations::Aside { .. } = self.evaluations {
            let score = self.task.evaluate(&self.server.theta(), Split::Validation)?;
            self.report.curve.push(Point { steps, time: self.report.time, score });
        }
        Ok(())
    }

    /// A new worker, of a speed that goes with its number.
    fn join(&mut self, place: usize) -> Result<SimulatedWorker, SimulationError> {
        let session = SessionId(self.sessions);
        self.sessions += 1;
        let (id, step, base) = self.server.open_session(session)?;
        self.report.bytes_down += match &base {
            Base::Whole(model) => model.len() as u64 * 4,
            Base::Difference(payload) => payload.len() as u64,
        };
        let base = base.onto(self.task.layout(), self.initial.clone()).map_err(AnswerError::from)?;
        let mut rng = stream(self.run.run.seed, Purpose::Simulation, u64::from(id.0));
        let duration = self.conditions.duration(place, &mut rng);
        let settings = WorkerSettings::from(&self.run);
        let core = WorkerCore::new(self.task.layout().clone(), &settings, session, base, step);
        Ok(SimulatedWorker { id, core, duration, exchanges: 0, rng, stage: Stage::Idle })
    }

    /// The worker reaches the end of `stage` after `duration`.
    fn wake(&mut self, worker: usize, duration: f64, stage: Stage) {
        self.workers[worker].stage = stage;
        self.scheduled += 1;
        let time = self.report.time + duration;
        self.schedule.push(Reverse(Due { time, order: self.scheduled, what: worker }));
    }

    fn happens(&mut self, worker: usize, probability: f64) -> bool {
        happens(probability, &mut self.workers[worker].rng)
    }

    fn advance(&mut self, worker: usize) -> Result<(), SimulationError> {
        match std::mem::replace(&mut self.workers[worker].stage, Stage::Idle) {
            Stage::Idle => self.ask(worker),
            Stage::Computing => self.compute(worker),
            Stage::Pushing => self.push(worker),
            Stage::Resending => {
                self.send(worker);
                Ok(())
            }
            Stage::Answered(reply) => self.answer(worker, &reply),
            Stage::Evaluating(job) => self.evaluate(worker, job),
            Stage::Away => self.come_back(worker),
            Stage::Vanished => self.replace(worker),
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
        let SimulatedWorker { core, duration, rng, .. } = &mut self.workers[worker];
        let (session, duration) = (core.session(), *duration);
        if work.finished {
            self.server.close_session(session);
        } else if let Some(job) = work.evaluation {
            self.wake(worker, EVALUATION * duration, Stage::Evaluating(job));
        } else if core.next_batch().is_some() {
            let gradients = f64::from(self.run.training.local_steps);
            let duration = gradients * duration * self.conditions.variation(rng);
            self.wake(worker, duration, Stage::Computing);
        } else {
            self.wake(worker, RETRY_AFTER, Stage::Idle);
        }
    }

    fn compute(&mut self, worker: usize) -> Result<(), SimulationError> {
        let step = self.server.core().standing().step;
        let core = &mut self.workers[worker].core;
        let batch = core.next_batch().expect("a worker computes what it has");
        let taken = take_gradients(self.task, core, batch, self.run.training.local_steps)?;
        // A real worker hears of the server's step in datagrams that take no time to speak of.
        let staleness = u32::try_from(step.0 - core.view_step().0).unwrap_or(u32::MAX);
        let Pushed { loss, dropped, samples } = taken;
        core.handle_gradient(batch, self.task.gradient(), loss, dropped, samples, staleness)?;
        self.send(worker);
        Ok(())
    }

    /// Sends the pending push.
    fn send(&mut self, worker: usize) {
        let push = self.workers[worker].core.pending().expect("a push is pending");
        let bytes = push.frame_bytes();
        self.report.bytes_up += bytes as u64;
        let arrival = self.up.carry(self.report.time, bytes, &self.conditions);
        self.wake(worker, arrival - self.report.time, Stage::Pushing);
    }

    fn push(&mut self, worker: usize) -> Result<(), SimulationError> {
        if self.happens(worker, self.conditions.vanishing) {
            self.report.vanished += 1;
            self.wake(worker, LEASE, Stage::Vanished);
            return Ok(());
        }
        let mut frame = Vec::new();
        self.workers[worker].core.pending().expect("a push is under way").encode(&mut frame);
        let push = Push::decode(&frame)?;
        let before = self.server.core().standing().step;
        let (reply, snapshot) = self.server.handle_push(&push)?;
        let after = self.server.core().standing().step;
        if let Some(parameters) = snapshot {
            self.snapshots.insert(after, parameters.into());
        }
        if let Evaluations::Aside { every, .. } = self.evaluations
            && after != before
            && after.0.is_multiple_of(every)
        {
            self.look(after.0)?;
        }
        if self.happens(worker, self.conditions.lost_answers) {
            self.report.lost_answers += 1;
            self.wake(worker, RETRY_AFTER, Stage::Resending);
        } else {
            self.report.bytes_down += reply.len() as u64;
            let arrival = self.down.carry(self.report.time, reply.len(), &self.conditions);
            let stage = Stage::Answered(Reply::decode(&reply)?);
            self.wake(worker, arrival - self.report.time, stage);
        }
        Ok(())
    }

    fn answer(&mut self, worker: usize, reply: &Reply) -> Result<(), SimulationError> {
        let answer = match reply {
            Reply::Answer(answer) => answer,
            Reply::Refused(refusal) => return Err((*refusal).into()),
        };
        let SimulatedWorker { id, core, exchanges, .. } = &mut self.workers[worker];
        self.report.dropped.extend(core.pending().map(|push| push.dropped));
        let work = core.handle_answer(answer)?;
        *exchanges += 1;
        debug_assert_eq!(
            self.server.replica(*id),
            core.theta(),
            "the replica of {id} differs from its model"
        );
        self.report.staleness.push(answer.staleness);
        if self.conditions.leaves(worker) && *exchanges >= self.conditions.stay && !work.finished {
            let session = core.session();
            self.server.close_session(session);
            self.wake(worker, self.conditions.away, Stage::Away);
        } else {
            self.begin(worker, &work);
        }
        Ok(())
    }

    fn come_back(&mut self, worker: usize) -> Result<(), SimulationError> {
        self.report.returned += 1;
        self.workers[worker] = self.join(worker)?;
        self.ask(worker)
    }

    /// The lease of one that vanished is over.
    fn replace(&mut self, worker: usize) -> Result<(), SimulationError> {
        self.server.close_session(self.workers[worker].core.session());
        self.workers[worker] = self.join(worker)?;
        self.ask(worker)
    }

    fn evaluate(&mut self, worker: usize, job: EvaluationJob) -> Result<(), SimulationError> {
        let target = self.snapshots.get(&job.step).expect("snapshots are kept while they are wanted");
        let core = &mut self.workers[worker].core;
        let payload = self.server.aside(core.session(), target).ok_or(Refusal::UnknownSession)?;
        let Score { loss, .. } = self.task.evaluate(&core.model_aside(&payload)?, job.split)?;
        // The rest is for the books of a server.
        let report =
            EvaluationReport { job, loss, tokens: 0, expert_share: Vec::new(), router_entropy: Vec::new() };
        self.server.core().report(self.workers[worker].core.session(), &report);
        self.snapshots.retain(|&step, _| self.server.core().needs_snapshot(step));
        self.report.evaluations.push(report);
        self.ask(worker)
    }
}
