//! The parameter server's decisions: no IO, no clock, no randomness.
//!
//! [`ServerCore`] knows the sessions, the order of steps and who does what next; [`Shard`]s hold the model and the
//! workers' replicas. A push goes through three calls:
//!
//! 1. [`ServerCore::admit`] decides whether it is new, a repeat or refused, decodes and checks its payload, and gives
//!    it its step. The jobs of the step are handed to the caller's queue while the order of steps is held, so every
//!    shard gets the jobs of all pushes in the same order.
//! 2. [`Shard::handle`] does a job; shards work side by side.
//! 3. [`ServerCore::complete`] puts the parts of the difference together, stores the answer and returns it.
//!
//! The state is thus a fold over the sequence of jobs. [`SerialServer`] makes the three calls one after the other for
//! tests and simulation; the network driver has a thread per shard.
//!
//! Every decision that the order of steps holds is told to a [`Log`]; [`Replay`] makes the same decisions of the same
//! records again, which is how a server that was killed comes back. An [`Image`] is the state at one place in that order,
//! from which a replay can begin instead of from the first record.

mod coordinator;
mod evaluations;
mod image;
mod leases;
mod mutation;
mod norms;
mod record;
mod replay;
mod sessions;
mod shard;
mod tracker;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;
use sanderling_common::config::RunConfig;
use sanderling_common::ids::{Seq, SessionId, Step, WorkerId};
use sanderling_common::init::combine_tensor_hashes;
use sanderling_common::layout::Layout;
use sanderling_common::sparse::{Compression, Update, decode};
use sanderling_common::wire::control::EvaluationReport;
use sanderling_common::wire::frame::Reply;
use sanderling_common::wire::{Answer, EvaluationJob, Push, Refusal, UPDATE_MAGNITUDE_MAX, Work};

use coordinator::{Coordinator, Placement};
pub use coordinator::{Standing, WorkSettings};
pub use evaluations::{Best, EVALUATIONS_MAX, Evaluated, Evaluations};
pub use image::{CoreImage, Image, ImageError, Restored, UnderWay};
pub use leases::LeasePool;
pub use mutation::{Mutated, Mutation};
pub use norms::{NORMS_KEPT, NORMS_NEEDED, NormGuard};
pub use record::{Effect, Log, NoLog, Note, Record, RecordError};
pub use replay::{Recovered, Replay, ReplayError};
pub use sessions::SessionsFull;
use sessions::{Flight, SessionTable, Turn};
pub use shard::{
    BASE_MAGNITUDE_MAX, Base, LastPush, Shard, ShardImage, ShardJob, ShardOutput, aside_bytes,
    secondary_compression,
};
pub use tracker::{DifferenceTracker, Replicas};

/// What the core needs to know of a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ServerSettings {
    /// How the run is divided into work.
    pub work: WorkSettings,
    /// What is kept of the differences; `None` sends them whole.
    pub secondary: Option<Compression>,
    /// Most sessions at a time.
    pub sessions_max: u32,
    /// Parts the model is cut into.
    pub shards: usize,
    /// Whether workers make the initial model themselves, so that a session begins with what differs from it instead
    /// of with the whole model. Costs the server another model of memory.
    pub workers_have_initial: bool,
}

impl From<&RunConfig> for ServerSettings {
    fn from(run: &RunConfig) -> Self {
        Self {
            work: WorkSettings {
                total_batches: run.training.steps,
                lease_batches: run.server.lease_batches,
                eval_every: run.training.eval_every,
                norm_limit: run.server.norm_limit,
            },
            secondary: secondary_compression(run),
            sessions_max: run.server.sessions_max,
            shards: run.server.shards,
            workers_have_initial: run.workers_make_initial(),
        }
    }
}

/// What became of a push that was not refused.
#[derive(Debug)]
pub enum Admitted {
    /// It was applied before; here is the frame that answered it.
    Repeat(Bytes),
    /// It has its step, and its jobs are queued.
    New(Ticket),
}

/// A push between its step and its answer.
#[derive(Clone, Debug)]
pub struct Ticket {
    session: SessionId,
    seq: Seq,
    worker: WorkerId,
    flight: Flight,
    update: Option<Arc<Update>>,
}

impl Ticket {
    /// Whose push it is.
    pub fn session(&self) -> SessionId {
        self.session
    }

    /// The server's step after the push.
    pub fn step(&self) -> Step {
        self.flight.placement.step
    }

    /// Updates applied since the model that the gradient was taken at.
    pub fn staleness(&self) -> u32 {
        self.flight.staleness
    }

    fn effect(&self) -> Effect {
        let Placement { step, applies, snapshot } = self.flight.placement;
        Effect::Pushed { step, staleness: self.flight.staleness, applies, snapshot }
    }

    /// The jobs of the push, for every shard, in this order: the check of the replica, the update, the snapshot.
    pub fn jobs(&self) -> impl Iterator<Item = ShardJob> {
        let check = self.flight.replica_hash.map(|_| ShardJob::ReplicaHashes { worker: self.worker });
        let apply = ShardJob::Apply { worker: self.worker, update: self.update.clone() };
        let snapshot = self.flight.placement.snapshot.then_some(ShardJob::Snapshot);
        check.into_iter().chain([apply]).chain(snapshot)
    }
}

/// What the shards made of a push's jobs, put together.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PushOutput {
    /// Tensor blocks of the difference.
    pub payload: Vec<u8>,
    /// The replica's digest before the update, where it was asked for.
    pub replica_hash: Option<[u8; 32]>,
    /// The model after the update, where it was asked for.
    pub snapshot: Option<Vec<f32>>,
}

impl PushOutput {
    /// Joins the outputs of [`Ticket::jobs`], one list per shard, shards in order.
    pub fn join(shards: impl IntoIterator<Item = Vec<ShardOutput>>) -> Self {
        let mut joined = Self::default();
        let mut hashes = Vec::new();
        for output in shards.into_iter().flatten() {
            match output {
                ShardOutput::Difference(blocks) => joined.payload.extend(blocks),
                ShardOutput::Snapshot(part) => joined.snapshot.get_or_insert_default().extend(part),
                ShardOutput::ReplicaHashes(part) => hashes.extend(part),
                ShardOutput::Base(_)
                | ShardOutput::Closed
                | ShardOutput::Aside(..)
                | ShardOutput::Image(_) => unreachable!("a push has no such job"),
            }
        }
        joined.replica_hash = (!hashes.is_empty()).then(|| combine_tensor_hashes(hashes));
        joined
    }
}

/// Sessions, the order of steps, leases and evaluations of one run. Shared by all connections.
#[derive(Debug)]
pub struct ServerCore {
    layout: Arc<Layout>,
    sessions: SessionTable,
    /// One lock for everything that has an order. It is held for look-ups and for queueing jobs, never while decoding,
    /// applying or encoding, so a map of finer locks would gain nothing.
    coordinator: Mutex<Coordinator>,
    log: Box<dyn Log>,
}

impl ServerCore {
    /// The core of a run that starts from `theta`, and its shards.
    ///
    /// # Panics
    /// If `theta` does not fit the layout or the settings are zero where they must not be.
    pub fn new(layout: &Arc<Layout>, theta: &[f32], settings: &ServerSettings) -> (Self, Vec<Shard>) {
        let core = Self {
            layout: layout.clone(),
            sessions: SessionTable::new(settings.sessions_max),
            coordinator: Mutex::new(Coordinator::new(&settings.work)),
            log: Box::new(NoLog),
        };
        (core, Shard::cut(layout, theta, settings))
    }

    /// The core of an image that was checked.
    fn restore(layout: &Arc<Layout>, image: CoreImage, settings: &ServerSettings) -> Self {
        Self {
            layout: layout.clone(),
            sessions: SessionTable::restore(settings.sessions_max, image.sessions, image.next_worker),
            coordinator: Mutex::new(image.coordinator),
            log: Box::new(NoLog),
        }
    }

    /// From now on, decisions are told to `log`.
    pub fn set_log(&mut self, log: Box<dyn Log>) {
        self.log = log;
    }

    /// Called while the coordinator is held, so that records have the order of the decisions.
    fn note(&self, _order: &Coordinator, note: Note, effect: Effect) {
        self.log.append(&Record::Noted(Cow::Owned(note)), effect);
    }

    fn coordinator(&self) -> MutexGuard<'_, Coordinator> {
        self.coordinator.lock().expect("nothing panics while it holds the order of steps")
    }

    /// Opens a session under a name that was never used. `enqueue` gets the job that makes the worker's replica, while
    /// the order of steps is held; the base model is what the shards return for it.
    ///
    /// # Errors
    /// [`SessionsFull`].
    ///
    /// # Panics
    /// If the session exists.
    pub fn open_session(
        &self,
        session: SessionId,
        enqueue: impl FnOnce(ShardJob),
    ) -> Result<(WorkerId, Step), SessionsFull> {
        let mut coordinator = self.coordinator();
        let step = coordinator.step();
        let worker = self.sessions.open(session, step)?;
        coordinator.join(session);
        self.note(&coordinator, Note::Opened(session), Effect::Noted);
        enqueue(ShardJob::Open { worker });
        Ok((worker, step))
    }

    /// `enqueue` gets the job that makes what turns a session's model into `target`, which it is to evaluate; returns
    /// whether the session exists.
    ///
    /// The worker asks between exchanges, when the replica is its model, and gets the same bytes until its next push.
    pub fn aside(&self, session: SessionId, target: Arc<[f32]>, enqueue: impl FnOnce(ShardJob)) -> bool {
        // A session that is closed loses its replica in this order too, so the job cannot come after that.
        let _order = self.coordinator();
        let Some(worker) = self.sessions.worker(session) else { return false };
        enqueue(ShardJob::Aside { worker, target });
        true
    }

    /// Ends a session: what it holds goes back, its replica goes away. Unknown sessions are ignored.
    pub fn close_session(&self, session: SessionId, enqueue: impl FnOnce(ShardJob)) {
        let mut coordinator = self.coordinator();
        if let Some(worker) = self.sessions.remove(session) {
            coordinator.leave(session);
            self.note(&coordinator, Note::Closed(session), Effect::Noted);
            enqueue(ShardJob::Close { worker });
        }
    }

    /// Whether the session is to do this evaluation.
    pub fn evaluates(&self, session: SessionId, job: EvaluationJob) -> bool {
        self.coordinator().evaluates(session, job)
    }

    /// All sessions, in ascending order.
    pub fn sessions(&self) -> Vec<SessionId> {
        self.sessions.all()
    }

    /// The worker of a session, if it exists.
    pub fn worker(&self, session: SessionId) -> Option<WorkerId> {
        self.sessions.worker(session)
    }

    /// Decides what a push is. `enqueue` gets the ticket of a new one while the order of steps is held, and must queue
    /// its [`Ticket::jobs`] for every shard.
    ///
    /// # Errors
    /// A [`Refusal`]; nothing has changed then.
    pub fn admit(&self, push: &Push, enqueue: impl FnOnce(&Ticket)) -> Result<Admitted, Refusal> {
        if let Turn::Repeat(answer) = self.sessions.turn(push.session, push.seq, push.step)? {
            return Ok(Admitted::Repeat(answer));
        }
        // Decoding comes before the step, so that a malformed payload cannot have one.
        let update = if push.skipped { None } else { Some(Arc::new(self.decode(&push.payload)?)) };
        let norm = update.as_ref().map(|update| update.norm());
        let mut coordinator = self.coordinator();
        // Another call may have been faster.
        let worker = match self.sessions.turn(push.session, push.seq, push.step)? {
            Turn::Repeat(answer) => return Ok(Admitted::Repeat(answer)),
            Turn::Next(worker) => worker,
        };
        let placement = coordinator.place(push.session, push.batch, norm)?;
        let before = placement.step.0 - u64::from(placement.applies);
        let staleness = u32::try_from(before - push.step.0).unwrap_or(u32::MAX);
        let flight = Flight { placement, staleness, replica_hash: push.replica_hash, work: None };
        self.sessions.take_off(push.session, flight.clone());
        let update = update.filter(|_| placement.applies);
        let ticket = Ticket { session: push.session, seq: push.seq, worker, flight, update };
        self.log.append(&Record::Pushed(Cow::Borrowed(push)), ticket.effect());
        enqueue(&ticket);
        Ok(Admitted::New(ticket))
    }

    fn decode(&self, payload: &[u8]) -> Result<Update, Refusal> {
        let tensors = 0..self.layout.tensors().len();
        let update = decode(&self.layout, tensors, payload).map_err(|_| Refusal::BadPayload)?;
        if update.magnitude_max() <= UPDATE_MAGNITUDE_MAX { Ok(update) } else { Err(Refusal::BadPayload) }
    }

    /// Makes the answer to a push out of what its jobs returned, and stores it for a repeat. A snapshot among them is
    /// to be stored first, and announced by [`snapshot_ready`](Self::snapshot_ready).
    ///
    /// # Errors
    /// [`Refusal::ReplicaMismatch`] if the worker's model was not the server's replica of it: the update was applied,
    /// but the session cannot go on and is to be closed. [`Refusal::UnknownSession`] if it was closed meanwhile.
    pub fn complete(&self, ticket: &Ticket, output: &PushOutput) -> Result<Bytes, Refusal> {
        let replica_hash = ticket.flight.replica_hash;
        if replica_hash.is_some() && replica_hash != output.replica_hash {
            return Err(Refusal::ReplicaMismatch);
        }
        let work = {
            let mut coordinator = self.coordinator();
            // Sessions are closed in this order too; one that is gone must not be given work that nobody would do.
            let work =
                self.sessions.decide(ticket.session, || coordinator.work_with_answer(ticket.session))?;
            self.note(&coordinator, Note::Answered(ticket.session, ticket.seq), Effect::Noted);
            work
        };
        self.land(ticket, work, output)
    }

    /// Makes the frame that answers a push, once it is decided what it brings, and stores it for a repeat.
    fn land(&self, ticket: &Ticket, work: Work, output: &PushOutput) -> Result<Bytes, Refusal> {
        let (seq, step, staleness) = (ticket.seq, ticket.step(), ticket.staleness());
        let answer = Answer { seq, step, staleness, work, payload: output.payload.clone() };
        let mut frame = Vec::new();
        Reply::Answer(answer).encode(&mut frame);
        let frame = Bytes::from(frame);
        self.sessions.land(ticket.session, ticket.seq, &frame)?;
        Ok(frame)
    }

    /// What an idle session is to do; `None` if there is no such session.
    pub fn work(&self, session: SessionId) -> Option<Work> {
        self.sessions.worker(session)?;
        let mut coordinator = self.coordinator();
        let work = coordinator.work_on_request(session);
        self.note(&coordinator, Note::Asked(session), Effect::Noted);
        Some(work)
    }

    /// Takes the result of an evaluation from the session that was to do it.
    pub fn report(&self, session: SessionId, report: &EvaluationReport) -> Evaluated {
        let mut coordinator = self.coordinator();
        let evaluated = coordinator.report(session, report);
        if evaluated != Evaluated::Ignored {
            self.note(&coordinator, Note::Reported(session, Box::new(report.clone())), Effect::Noted);
        }
        evaluated
    }

    /// Whether the snapshot of a step may still be asked for.
    pub fn needs_snapshot(&self, step: Step) -> bool {
        self.coordinator().needs_snapshot(step)
    }

    /// Leases no more batches. If the current model is still to be evaluated, `enqueue` gets the snapshot job and the
    /// step is returned; [`snapshot_ready`](Self::snapshot_ready) is to be called when it is there.
    pub fn stop(&self, enqueue: impl FnOnce(ShardJob)) -> Option<Step> {
        let mut coordinator = self.coordinator();
        let step = coordinator.stop();
        self.note(&coordinator, Note::Stopped, Effect::Stopped { snapshot: step });
        if step.is_some() {
            enqueue(ShardJob::Snapshot);
        }
        step
    }

    /// The state at this place in the order of decisions, unless a model that is to be evaluated is on its way to
    /// [`snapshot_ready`](Self::snapshot_ready). `enqueue` gets the job that makes the shards' part of it, and what it
    /// returns is returned: both are called while the order is held.
    pub fn image<T>(&self, enqueue: impl FnOnce(ShardJob) -> T) -> Option<(CoreImage, T)> {
        let coordinator = self.coordinator();
        if coordinator.awaits_snapshot() {
            return None;
        }
        let (sessions, next_worker) = self.sessions.image();
        let image = CoreImage { coordinator: coordinator.clone(), sessions, next_worker };
        Some((image, enqueue(ShardJob::Image)))
    }

    /// Calls `enqueue` while the order of steps is held, for jobs that belong to no push.
    pub fn in_order(&self, enqueue: impl FnOnce()) {
        let _order = self.coordinator();
        enqueue();
    }

    /// The snapshot of a step can be fetched from now on.
    pub fn snapshot_ready(&self, step: Step) {
        let mut coordinator = self.coordinator();
        coordinator.snapshot_ready(step);
        self.note(&coordinator, Note::SnapshotReady(step), Effect::Noted);
    }

    /// Ends the run, whatever is still to be done.
    pub fn abandon(&self) {
        self.coordinator().abandon();
    }

    /// Where the run stands.
    pub fn standing(&self) -> Standing {
        self.coordinator().standing()
    }

    /// The best model so far.
    pub fn best(&self) -> Option<Best> {
        self.coordinator().best()
    }
}

/// A push between the halves of its exchange with a [`SerialServer`].
#[derive(Debug)]
pub enum Begun {
    /// It was applied before; here is the frame that answered it.
    Repeat(Bytes),
    /// It has its step, and the shards have done their part.
    New(Ticket, PushOutput),
}

/// The core and its shards in one thread: what tests and simulations drive.
#[derive(Debug)]
pub struct SerialServer {
    core: ServerCore,
    shards: Vec<Shard>,
}

impl SerialServer {
    /// A server that starts from `theta`; see [`ServerCore::new`].
    pub fn new(layout: &Arc<Layout>, theta: &[f32], settings: &ServerSettings) -> Self {
        let (core, shards) = ServerCore::new(layout, theta, settings);
        Self { core, shards }
    }

    /// A server that was made again of its records.
    pub fn from_recovered(recovered: Recovered) -> Self {
        Self { core: recovered.core, shards: recovered.shards }
    }

    /// The part that decides.
    pub fn core(&self) -> &ServerCore {
        &self.core
    }

    /// From now on, decisions are told to `log`.
    pub fn set_log(&mut self, log: Box<dyn Log>) {
        self.core.set_log(log);
    }

    /// Opens a session and returns its worker, the step and what it begins with.
    ///
    /// # Errors
    /// [`SessionsFull`].
    pub fn open_session(&mut self, session: SessionId) -> Result<(WorkerId, Step, Base), SessionsFull> {
        let mut outputs = Vec::new();
        let shards = &mut self.shards;
        let (worker, step) = self
            .core
            .open_session(session, |job| outputs.extend(shards.iter_mut().map(|shard| shard.handle(&job))))?;
        Ok((worker, step, Base::join(outputs)))
    }

    /// The whole state, with the models that are kept for evaluations; `None` while one is on its way.
    pub fn image(&mut self, snapshots: BTreeMap<Step, Arc<[f32]>>) -> Option<Image> {
        let shards = &mut self.shards;
        let handle = |job: ShardJob| shards.iter_mut().map(|shard| shard.handle(&job)).collect::<Vec<_>>();
        let (core, outputs) = self.core.image(handle)?;
        Some(Image::join(core, outputs, snapshots))
    }

    /// Ends a session.
    pub fn close_session(&mut self, session: SessionId) {
        let shards = &mut self.shards;
        self.core.close_session(session, |job| shards.iter_mut().for_each(|shard| drop(shard.handle(&job))));
    }

    /// What turns a session's model into `target`; `None` if there is no such session.
    pub fn aside(&mut self, session: SessionId, target: &Arc<[f32]>) -> Option<Vec<u8>> {
        let shards = &mut self.shards;
        let mut outputs = Vec::new();
        let exists = self.core.aside(session, target.clone(), |job| {
            outputs.extend(shards.iter_mut().map(|shard| shard.handle(&job)));
        });
        exists.then(|| aside_bytes(outputs))
    }

    /// A whole exchange: the reply frame, and the snapshot if one fell due.
    ///
    /// # Errors
    /// A [`Refusal`].
    pub fn handle_push(&mut self, push: &Push) -> Result<(Bytes, Option<Vec<f32>>), Refusal> {
        let begun = self.begin_push(push)?;
        if let Begun::New(ticket, output) = &begun
            && output.snapshot.is_some()
        {
            self.core.snapshot_ready(ticket.step());
        }
        self.finish_push(begun)
    }

    /// The first half of an exchange: the push gets its step, and the shards do its jobs.
    ///
    /// # Errors
    /// A [`Refusal`].
    pub fn begin_push(&mut self, push: &Push) -> Result<Begun, Refusal> {
        let shards = &mut self.shards;
        let mut outputs = Vec::new();
        let admitted = self.core.admit(push, |ticket| {
            outputs.extend(shards.iter_mut().map(|s| ticket.jobs().map(|job| s.handle(&job)).collect()));
        })?;
        Ok(match admitted {
            Admitted::Repeat(answer) => Begun::Repeat(answer),
            Admitted::New(ticket) => Begun::New(ticket, PushOutput::join(outputs)),
        })
    }

    /// The second half: the answer, and the snapshot if one fell due, which the caller has announced.
    ///
    /// # Errors
    /// A [`Refusal`].
    pub fn finish_push(&mut self, begun: Begun) -> Result<(Bytes, Option<Vec<f32>>), Refusal> {
        match begun {
            Begun::Repeat(answer) => Ok((answer, None)),
            Begun::New(ticket, output) => {
                let completed = self.core.complete(&ticket, &output);
                if completed == Err(Refusal::ReplicaMismatch) {
                    self.close_session(ticket.session());
                }
                Ok((completed?, output.snapshot))
            }
        }
    }

    /// θ, flat.
    pub fn theta(&self) -> Vec<f32> {
        self.shards.iter().flat_map(|shard| shard.theta().iter().copied()).collect()
    }

    /// A worker's replica, flat.
    ///
    /// # Panics
    /// If the worker is not open.
    pub fn replica(&self, worker: WorkerId) -> Vec<f32> {
        self.shards.iter().flat_map(|shard| shard.replica(worker).iter().copied()).collect()
    }
}
