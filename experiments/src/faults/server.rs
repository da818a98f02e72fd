//! A server's process: the shipped core, shards, journal and checkpoints, on a simulated disk.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use sanderling_common::ids::{SessionId, Step};
use sanderling_common::layout::Layout;
use sanderling_common::wire::frame::Reply;
use sanderling_common::wire::{EvaluationJob, Push, Refusal};
use sanderling_server::core::{
    Admitted, Base, Effect, Image, Log, PushOutput, Record, Replay, ServerCore, ServerSettings, Shard,
    ShardJob, ShardOutput, Ticket, aside_bytes,
};
use sanderling_server::recorder::Books;
use sanderling_server::storage::{
    Disk, DiskFile, Journal, JournalError, Position, RestoredState, RunId, Stamp, StateCheckpoint, Writer,
};

use super::Mutation;
use super::disk::SimulatedDisk;
use super::messages::{Down, Up};
use super::oracle::Oracle;

const RUN: RunId = RunId([1; 16]);

const CHECKPOINT_PREFIX: &str = "state-";

/// Checkpoints that are kept.
const CHECKPOINTS_KEPT: usize = 2;

/// A connection, over the whole simulation.
pub(super) type ConnectionId = u64;

/// A stream of a connection: a request and its answer, which nobody takes for that to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Stream {
    pub(super) connection: ConnectionId,
    pub(super) number: u64,
}

/// What a run is like.
#[derive(Clone, Debug)]
pub(super) struct Subject {
    pub(super) layout: Arc<Layout>,
    pub(super) initial: Vec<f32>,
    pub(super) settings: ServerSettings,
    pub(super) segment_bytes: u64,
    pub(super) mutation: Option<Mutation>,
}

/// Records that were decided and not written yet.
#[derive(Clone, Debug, Default)]
struct Queue(Arc<Mutex<Vec<Vec<u8>>>>);

impl Queue {
    fn len(&self) -> usize {
        self.0.lock().expect("nothing panics while it holds the queue").len()
    }

    fn take(&self) -> Vec<Vec<u8>> {
        std::mem::take(&mut *self.0.lock().expect("nothing panics while it holds the queue"))
    }
}

impl Log for Queue {
    fn append(&self, record: &Record<'_>, _: Effect) {
        let mut body = Vec::new();
        record.encode(&mut body);
        self.0.lock().expect("nothing panics while it holds the queue").push(body);
    }
}

/// Why a server does not start.
pub(super) enum StartError {
    /// The disk is full.
    Disk,
    /// What was acknowledged cannot be recovered.
    Lost(String),
}

/// A push between its step and its answer.
struct Flight {
    stream: Stream,
    ticket: Ticket,
    output: PushOutput,
}

/// A server that runs.
pub(super) struct ServerProcess {
    subject: Subject,
    disk: SimulatedDisk,
    journal: Journal<SimulatedDisk>,
    pub(super) core: ServerCore,
    pub(super) shards: Vec<Shard>,
    queue: Queue,
    writer: Writer<SimulatedDisk>,
    /// What was written since the last sync.
    unsynced: Vec<Vec<u8>>,
    /// What that sync made safe, until the oracle is told.
    newly_synced: Vec<Vec<u8>>,
    synced: Position,
    /// Replies that wait until what they tell is synced.
    held: Vec<(Position, Stream, Down)>,
    flights: Vec<Flight>,
    bases: BTreeMap<SessionId, (Step, Base)>,
    snapshots: BTreeMap<Step, Arc<[f32]>>,
    attached: BTreeMap<SessionId, ConnectionId>,
    sessions_drawn: u64,
    /// Where the process began.
    pub(super) recovered_from: Position,
}

impl ServerProcess {
    /// A process that goes on from what is on the disk.
    pub(super) fn start(
        subject: &Subject,
        disk: &SimulatedDisk,
        oracle: &mut Oracle,
        incarnation: u64,
    ) -> Result<Self, StartError> {
        let journal = Journal::new(Arc::new(disk.clone()), RUN, subject.segment_bytes);
        let lost = |what: &dyn std::fmt::Display| StartError::Lost(what.to_string());
        let mut replay = Replay::new(&subject.layout, &subject.initial, &subject.settings);
        let mut from = 0;
        for position in checkpoints(disk).into_iter().rev() {
            let name = checkpoint_name(position);
            let bytes = disk.read(&name).map_err(|error| lost(&error))?;
            // One that was torn by a crash has a predecessor, or the whole journal.
            if let Ok(state) = RestoredState::read(RUN, &bytes[..], bytes.len() as u64) {
                let restored =
                    Replay::restore(&subject.layout, &subject.initial, &subject.settings, state.image);
                (replay, from) = (restored.map_err(|error| lost(&error))?, position);
                break;
            }
        }
        oracle.recovery_begins();
        let read = journal.read(from, |position, body| {
            oracle.recovers(position, body);
            let record = Record::decode(body).map_err(|error| ReadError::Record(error.to_string()))?;
            let applied = replay.apply(&record);
            applied.map(drop).map_err(|error| ReadError::Record(format!("record {position}: {error}")))
        });
        let read = read.map_err(|error| match error {
            ReadError::Journal(JournalError::Io { .. }) => StartError::Disk,
            other => lost(&other),
        })?;
        oracle.recovered(from, read.next).map_err(StartError::Lost)?;
        let writer = match journal.write_from(read.next) {
            Ok(writer) => writer,
            Err(JournalError::Io { .. }) => return Err(StartError::Disk),
            Err(error) => return Err(lost(&error)),
        };
        let queue = Queue::default();
        let recovered = replay.finish(Box::new(queue.clone()));
        Ok(Self {
            subject: subject.clone(),
            disk: disk.clone(),
            journal,
            core: recovered.core,
            shards: recovered.shards,
            queue,
            writer,
            unsynced: Vec::new(),
            newly_synced: Vec::new(),
            synced: read.next,
            held: Vec::new(),
            flights: Vec::new(),
            bases: BTreeMap::new(),
            snapshots: recovered.snapshots,
            attached: BTreeMap::new(),
            sessions_drawn: incarnation << 32,
            recovered_from: from,
        })
    }

    /// The position after the last decision.
    fn position(&self) -> Position {
        self.writer.next() + self.queue.len() as Position
    }

    fn hold(&mut self, stream: Stream, down: Down) {
        self.held.push((self.position(), stream, down));
    }

    /// Takes a message in. What is said to it waits for the journal.
    pub(super) fn handle(&mut self, stream: Stream, up: Up) {
        match up {
            Up::Hello(resume) => self.hello(stream, resume),
            Up::Base(session) => {
                let base = self.bases.get(&session).cloned();
                self.hold(stream, Down::Base(base));
            }
            Up::Push(session, frame) => self.push(stream, session, &frame),
            Up::Ask(session) => {
                let work = self.core.work(session);
                self.hold(stream, Down::Work(work));
            }
            Up::Aside(session, job) => {
                let aside = self.aside(session, job);
                self.hold(stream, Down::Aside(aside));
            }
            Up::Report(session, report) => {
                self.core.report(session, &report);
                self.snapshots.retain(|&step, _| self.core.needs_snapshot(step));
                let work = self.core.work(session);
                self.hold(stream, Down::Work(work));
            }
            Up::Goodbye(session) => self.close(session),
        }
    }

    fn hello(&mut self, stream: Stream, resume: Option<SessionId>) {
        if self.core.standing().finished {
            return self.hold(stream, Down::Finished);
        }
        let known = resume.filter(|&session| self.core.worker(session).is_some());
        let session = known.unwrap_or_else(|| {
            self.sessions_drawn += 1;
            let (session, mut outputs) = (SessionId(self.sessions_drawn), Vec::new());
            let shards = &mut self.shards;
            let opened = self.core.open_session(session, |job| outputs.extend(handle_all(shards, &job)));
            let (_, step) = opened.expect("the simulation keeps below the limit on sessions");
            self.bases.insert(session, (step, Base::join(outputs)));
            session
        });
        self.attached.insert(session, stream.connection);
        let base_step = self.bases.get(&session).map(|base| base.0);
        self.hold(stream, Down::Welcome { session, resumed: known.is_some(), base_step });
    }

    fn push(&mut self, stream: Stream, session: SessionId, frame: &[u8]) {
        let push = Push::decode(frame).expect("what a worker encodes can be decoded");
        assert_eq!(push.session, session, "a connection speaks for its session");
        let (shards, mut outputs) = (&mut self.shards, Vec::new());
        let admitted = self.core.admit(&push, |ticket| {
            let jobs = |shard: &mut Shard| ticket.jobs().map(|job| shard.handle(&job)).collect::<Vec<_>>();
            outputs.extend(shards.iter_mut().map(jobs));
        });
        match admitted {
            Ok(Admitted::New(ticket)) => {
                self.bases.remove(&session);
                let output = PushOutput::join(outputs);
                self.flights.push(Flight { stream, ticket, output });
            }
            Ok(Admitted::Repeat(reply)) => self.hold(stream, Down::Reply(reply)),
            Err(refusal) => self.refuse(stream, refusal),
        }
    }

    fn refuse(&mut self, stream: Stream, refusal: Refusal) {
        let mut frame = Vec::new();
        Reply::Refused(refusal).encode(&mut frame);
        self.hold(stream, Down::Reply(frame.into()));
    }

    /// Pushes that have their step and no answer.
    pub(super) fn flights(&self) -> usize {
        self.flights.len()
    }

    /// Answers one of those pushes.
    pub(super) fn land(&mut self, flight: usize) {
        let Flight { stream, ticket, mut output } = self.flights.swap_remove(flight);
        let completed = self.core.complete(&ticket, &output);
        if completed == Err(Refusal::ReplicaMismatch) {
            self.close(ticket.session());
        }
        if let Some(snapshot) = output.snapshot.take() {
            self.snapshots.insert(ticket.step(), snapshot.into());
            self.core.snapshot_ready(ticket.step());
        }
        match completed {
            Ok(reply) => self.hold(stream, Down::Reply(reply)),
            Err(refusal) => self.refuse(stream, refusal),
        }
    }

    fn aside(&mut self, session: SessionId, job: EvaluationJob) -> Option<Vec<u8>> {
        let target = self.snapshots.get(&job.step).filter(|_| self.core.evaluates(session, job))?.clone();
        let (shards, mut outputs) = (&mut self.shards, Vec::new());
        let exists = self.core.aside(session, target, |job| outputs.extend(handle_all(shards, &job)));
        exists.then(|| aside_bytes(outputs))
    }

    fn close(&mut self, session: SessionId) {
        let shards = &mut self.shards;
        self.core.close_session(session, |job| drop(handle_all(shards, &job)));
        self.bases.remove(&session);
        self.attached.remove(&session);
    }

    /// The lease of a session is over, unless it goes on over another connection than that one.
    pub(super) fn expire(&mut self, session: SessionId, connection: Option<ConnectionId>) {
        if self.attached.get(&session).copied() == connection {
            self.close(session);
        }
    }

    /// The session that a connection is attached to.
    pub(super) fn session_of(&self, connection: ConnectionId) -> Option<SessionId> {
        self.attached.iter().find(|(_, attached)| **attached == connection).map(|(session, _)| *session)
    }

    /// Writes what was decided to the disk, which is not safe before the sync.
    ///
    /// # Errors
    /// The journal cannot be written any more, and the process ends.
    pub(super) fn write(&mut self) -> Result<(), JournalError> {
        for body in self.queue.take() {
            self.writer.append(&body)?;
            self.unsynced.push(body);
        }
        Ok(())
    }

    /// The records that were synced since this was asked last.
    pub(super) fn newly_synced(&mut self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.newly_synced)
    }

    /// Syncs what was written; returns the replies that waited for it.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub(super) fn sync(&mut self) -> Result<Vec<(Stream, Down)>, JournalError> {
        self.writer.sync()?;
        self.synced = self.writer.next();
        self.newly_synced.append(&mut self.unsynced);
        Ok(self.told())
    }

    /// The replies that may leave by now.
    pub(super) fn told(&mut self) -> Vec<(Stream, Down)> {
        let (synced, hasty) = (self.synced, self.subject.mutation == Some(Mutation::AnswerBeforeJournal));
        let held = std::mem::take(&mut self.held);
        let (free, held) = held.into_iter().partition(|(position, ..)| hasty || *position <= synced);
        self.held = held;
        let free: Vec<(Position, Stream, Down)> = free;
        free.into_iter().map(|(_, stream, down)| (stream, down)).collect()
    }

    /// Records that are safe.
    pub(super) fn synced(&self) -> Position {
        self.synced
    }

    /// Whether anything waits for a sync.
    pub(super) fn is_idle(&self) -> bool {
        self.position() == self.synced
    }

    /// Writes a checkpoint of what is synced; if the disk is full, there is none. Returns whether there is one.
    pub(super) fn checkpoint(&mut self) -> bool {
        if !self.is_idle() {
            return false;
        }
        let position = self.synced;
        let shards = &mut self.shards;
        let Some((core, outputs)) = self.core.image(|job| handle_all(shards, &job)) else { return false };
        let image = Image::join(core, outputs, self.snapshots.clone());
        let (stamp, books, mut bytes) = (Stamp::default(), Books::default(), Vec::new());
        let written = StateCheckpoint { position, stamp, books, image }.write(RUN, &mut bytes);
        written.expect("a vector takes everything");
        let name = checkpoint_name(position);
        let kept = self.disk.create(&name).and_then(|mut file| {
            file.append(&bytes)?;
            file.sync()?;
            self.disk.sync_names()
        });
        if kept.is_err() {
            let _ = self.disk.remove(&name);
        }
        kept.is_ok()
    }

    /// Removes what the checkpoints make superfluous.
    pub(super) fn tidy(&mut self) {
        let positions = checkpoints(&self.disk);
        let Some(surplus) = positions.len().checked_sub(CHECKPOINTS_KEPT) else { return };
        for &position in &positions[..surplus] {
            self.disk.remove(&checkpoint_name(position)).expect("it was there a moment ago");
        }
        self.disk.sync_names().expect("the simulated disk syncs names");
        self.journal.remove_before(positions[surplus]).expect("the simulated disk removes files");
    }

    /// θ.
    pub(super) fn theta(&self) -> Vec<f32> {
        self.shards.iter().flat_map(|shard| shard.theta().iter().copied()).collect()
    }

    /// A session's replica, if there is the session.
    pub(super) fn replica(&self, session: SessionId) -> Option<Vec<f32>> {
        let worker = self.core.worker(session)?;
        Some(self.shards.iter().flat_map(|shard| shard.replica(worker).iter().copied()).collect())
    }
}

fn handle_all(shards: &mut [Shard], job: &ShardJob) -> Vec<ShardOutput> {
    shards.iter_mut().map(|shard| shard.handle(job)).collect()
}

fn checkpoint_name(position: Position) -> String {
    format!("{CHECKPOINT_PREFIX}{position:020}")
}

/// The positions of the checkpoints on a disk, whole or not, ascending.
fn checkpoints(disk: &SimulatedDisk) -> Vec<Position> {
    let names = disk.names().expect("the simulated disk has names");
    names.iter().filter_map(|name| name.strip_prefix(CHECKPOINT_PREFIX)?.parse().ok()).collect()
}

/// Why reading a journal ended.
#[derive(Debug, thiserror::Error)]
enum ReadError {
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error("{0}")]
    Record(String),
}

/// The bytes of a push, as a worker sends it.
pub(super) fn frame(push: &Push) -> Bytes {
    let mut frame = Vec::new();
    push.encode(&mut frame);
    frame.into()
}
