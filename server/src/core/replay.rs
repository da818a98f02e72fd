//! The same decisions again: a server's state as the fold over its records.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use sanderling_common::ids::{Seq, SessionId, Step};
use sanderling_common::layout::Layout;
use sanderling_common::wire::{Push, Refusal};

use super::record::{Effect, Log, Note, Record};
use super::sessions::Session;
use super::{
    Admitted, Image, ImageError, PushOutput, Restored, SerialServer, ServerCore, ServerSettings,
    SessionsFull, Shard, ShardJob, ShardOutput, Ticket,
};

/// A record that does not follow from those before it: the journal is of another run, or damaged.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// A push that is refused now.
    #[error("a push of {session} that was applied is refused: {refusal}")]
    Refused {
        /// Whose.
        session: SessionId,
        /// Why.
        refusal: Refusal,
    },
    /// A session that there is already.
    #[error("{0} is opened twice")]
    Reopened(SessionId),
    /// A push that was answered before.
    #[error("a push of {0} comes twice")]
    Repeated(SessionId),
    /// An answer to a push that there is not.
    #[error("an answer to {0} without a push")]
    Unasked(SessionId),
    /// More sessions than the run allows.
    #[error(transparent)]
    Sessions(#[from] SessionsFull),
}

/// A push whose answer has not been written down yet.
#[derive(Debug)]
struct Unanswered {
    ticket: Ticket,
    output: PushOutput,
}

impl Unanswered {
    /// The ticket of a session's push under way. Its update is in the shards already.
    fn of((session, state): &(SessionId, Session)) -> Option<(SessionId, Ticket)> {
        let (flight, seq) = (state.flight.clone()?, Seq(state.answered.0 + 1));
        Some((*session, Ticket { session: *session, seq, worker: state.worker, flight, update: None }))
    }
}

/// A server in the making, record by record.
#[derive(Debug)]
pub struct Replay {
    server: SerialServer,
    unanswered: HashMap<SessionId, Unanswered>,
    snapshots: BTreeMap<Step, Arc<[f32]>>,
}

/// What the records came to.
#[derive(Debug)]
pub struct Recovered {
    /// The part that decides.
    pub core: ServerCore,
    /// The model and the replicas.
    pub shards: Vec<Shard>,
    /// The models that are still to be evaluated, and the best.
    pub snapshots: BTreeMap<Step, Arc<[f32]>>,
    /// The sessions, all without a connection.
    pub sessions: Vec<SessionId>,
}

impl Replay {
    /// The state before the first record: see [`ServerCore::new`].
    pub fn new(layout: &Arc<Layout>, theta: &[f32], settings: &ServerSettings) -> Self {
        let server = SerialServer::new(layout, theta, settings);
        Self { server, unanswered: HashMap::new(), snapshots: BTreeMap::new() }
    }

    /// The state of an image. `initial` is the model before the first record.
    ///
    /// # Errors
    /// An [`ImageError`] for an image that is not of this run.
    pub fn restore(
        layout: &Arc<Layout>,
        initial: &[f32],
        settings: &ServerSettings,
        image: Restored,
    ) -> Result<Self, ImageError> {
        image.check(layout.len(), settings)?;
        let Restored { core, theta, replicas, under_way, snapshots } = image;
        let in_flight: Vec<_> = core.sessions.iter().filter_map(Unanswered::of).collect();
        let core = ServerCore::restore(layout, core, settings);
        let shards = Shard::restore((layout, initial), &theta, &replicas, settings);
        let mut unanswered = HashMap::new();
        for (session, ticket) in in_flight {
            let output = PushOutput::from(&under_way[&session]);
            match ticket.flight.work {
                // What it brings was decided; only the frame had not been made.
                Some(work) => {
                    let landed = core.land(&ticket, work, &output);
                    landed.expect("the session of a push under way is there");
                }
                None => drop(unanswered.insert(session, Unanswered { ticket, output })),
            }
        }
        let snapshots = snapshots.into_iter().map(|(step, model)| (step, model.into())).collect();
        Ok(Self { server: SerialServer { core, shards }, unanswered, snapshots })
    }

    /// The state so far; `None` while a model that is to be evaluated is on its way.
    pub fn image(&mut self) -> Option<Image> {
        self.server.image(self.snapshots.clone())
    }

    /// The server so far.
    pub fn server(&self) -> &SerialServer {
        &self.server
    }

    /// Takes the next record.
    ///
    /// # Errors
    /// A [`ReplayError`]; the state is of no use then.
    pub fn apply(&mut self, record: &Record<'_>) -> Result<Effect, ReplayError> {
        match record {
            Record::Pushed(push) => self.pushed(push),
            Record::Noted(note) => self.noted(note),
        }
    }

    fn pushed(&mut self, push: &Push) -> Result<Effect, ReplayError> {
        let session = push.session;
        let SerialServer { core, shards } = &mut self.server;
        let mut outputs = Vec::new();
        let admitted = core.admit(push, |ticket| {
            outputs.extend(
                shards.iter_mut().map(|s| ticket.jobs().map(|job| s.handle(&job)).collect::<Vec<_>>()),
            );
        });
        match admitted.map_err(|refusal| ReplayError::Refused { session, refusal })? {
            Admitted::Repeat(_) => Err(ReplayError::Repeated(session)),
            Admitted::New(ticket) => {
                let mut output = PushOutput::join(outputs);
                if let Some(snapshot) = output.snapshot.take() {
                    self.snapshots.insert(ticket.step(), snapshot.into());
                }
                let effect = ticket.effect();
                self.unanswered.insert(session, Unanswered { ticket, output });
                Ok(effect)
            }
        }
    }

    fn noted(&mut self, note: &Note) -> Result<Effect, ReplayError> {
        match note {
            &Note::Opened(session) if self.server.core.worker(session).is_some() => {
                return Err(ReplayError::Reopened(session));
            }
            &Note::Opened(session) => drop(self.server.open_session(session)?),
            &Note::Closed(session) => {
                self.server.close_session(session);
                self.unanswered.remove(&session);
            }
            &Note::Answered(session, seq) => {
                let unanswered = self.unanswered.remove(&session).filter(|push| push.ticket.seq == seq);
                let Unanswered { ticket, output } = unanswered.ok_or(ReplayError::Unasked(session))?;
                let completed = self.server.core.complete(&ticket, &output);
                completed.map_err(|refusal| ReplayError::Refused { session, refusal })?;
            }
            &Note::Asked(session) => drop(self.server.core.work(session)),
            &Note::SnapshotReady(step) => self.server.core.snapshot_ready(step),
            Note::Reported(session, report) => {
                self.server.core.report(*session, report);
                let core = &self.server.core;
                self.snapshots.retain(|&step, _| core.needs_snapshot(step));
            }
            Note::Stopped => {
                let SerialServer { core, shards } = &mut self.server;
                let mut parts = Vec::new();
                let step = core
                    .stop(|job: ShardJob| parts.extend(shards.iter_mut().map(|shard| shard.handle(&job))));
                if let Some(step) = step {
                    let part = |output| match output {
                        ShardOutput::Snapshot(part) => part,
                        _ => unreachable!("the job was Snapshot"),
                    };
                    self.snapshots.insert(step, parts.into_iter().flat_map(part).collect());
                }
                return Ok(Effect::Stopped { snapshot: step });
            }
        }
        Ok(Effect::Noted)
    }

    /// The state after the last record. What was decided then and not yet done is done now, and told to `log` like
    /// everything from now on: pushes without an answer get theirs, for when their workers repeat them, and snapshots
    /// can be fetched.
    pub fn finish(self, log: Box<dyn Log>) -> Recovered {
        let Self { mut server, unanswered, snapshots } = self;
        server.set_log(log);
        // In the order of steps, as they would have been answered.
        let mut unanswered: Vec<_> = unanswered.into_iter().collect();
        unanswered.sort_by_key(|(session, push)| (push.ticket.step(), *session));
        for (session, Unanswered { ticket, output }) in unanswered {
            if server.core.complete(&ticket, &output) == Err(Refusal::ReplicaMismatch) {
                server.close_session(session);
            }
        }
        for &step in snapshots.keys() {
            server.core.snapshot_ready(step);
        }
        let SerialServer { core, shards } = server;
        let sessions = core.sessions();
        Recovered { core, shards, snapshots, sessions }
    }
}
