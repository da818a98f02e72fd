//! Who takes part, and what each was answered last.

use std::sync::atomic::{AtomicU32, Ordering};

use bytes::Bytes;
use dashmap::{DashMap, Entry};
use sanderling_common::ids::{Seq, SessionId, Step, WorkerId};
use sanderling_common::wire::Refusal;

/// As many sessions as allowed exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there are {sessions_max} sessions already, as many as allowed")]
pub struct SessionsFull {
    /// The limit.
    pub sessions_max: u32,
}

/// What a push is to its session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// The next one.
    Next(WorkerId),
    /// The last one again; here is its answer.
    Repeat(Bytes),
}

#[derive(Debug)]
struct Session {
    worker: WorkerId,
    /// The step of the base the worker started from.
    joined: Step,
    /// The step of the last answer.
    step: Step,
    /// The last push that was answered.
    answered: Seq,
    /// The frame that answered it: one difference of memory per session is the price of never applying twice.
    answer: Option<Bytes>,
    in_flight: bool,
}

impl Session {
    fn turn(&self, seq: Seq) -> Result<Turn, Refusal> {
        let next = Seq(self.answered.0 + 1);
        match &self.answer {
            Some(answer) if seq == self.answered => Ok(Turn::Repeat(answer.clone())),
            _ if seq == next && self.in_flight => Err(Refusal::InFlight),
            _ if seq == next => Ok(Turn::Next(self.worker)),
            _ => Err(Refusal::SequenceMismatch),
        }
    }
}

/// The sessions of a run.
///
/// Pushes of different workers look their sessions up at the same time, which a map cut into separately locked parts
/// allows; one mutex would make the copying of every stored answer wait for every other. No guard leaves this module,
/// so none is ever held across an await or while another lock of the core is waited for.
#[derive(Debug)]
pub(super) struct SessionTable {
    sessions: DashMap<SessionId, Session>,
    sessions_max: u32,
    count: AtomicU32,
    next_worker: AtomicU32,
}

impl SessionTable {
    pub(super) fn new(sessions_max: u32) -> Self {
        Self {
            sessions: DashMap::new(),
            sessions_max,
            count: AtomicU32::new(0),
            next_worker: AtomicU32::new(0),
        }
    }

    /// Opens a session for a new worker, which gets a replica of the model at `step`.
    pub(super) fn open(&self, session: SessionId, step: Step) -> Result<WorkerId, SessionsFull> {
        let one_more = |count: u32| (count < self.sessions_max).then_some(count + 1);
        self.count
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, one_more)
            .map_err(|_| SessionsFull { sessions_max: self.sessions_max })?;
        let worker = WorkerId(self.next_worker.fetch_add(1, Ordering::Relaxed));
        let opened = Session { worker, joined: step, step, answered: Seq(0), answer: None, in_flight: false };
        match self.sessions.entry(session) {
            Entry::Occupied(_) => panic!("{session} was drawn twice"),
            Entry::Vacant(vacant) => drop(vacant.insert(opened)),
        }
        Ok(worker)
    }

    /// All sessions, in ascending order.
    pub(super) fn all(&self) -> Vec<SessionId> {
        let mut all: Vec<_> = self.sessions.iter().map(|entry| *entry.key()).collect();
        all.sort_unstable();
        all
    }

    /// The worker of a session.
    pub(super) fn worker(&self, session: SessionId) -> Option<WorkerId> {
        self.sessions.get(&session).map(|entry| entry.worker)
    }

    /// Ends a session; tells its worker.
    pub(super) fn remove(&self, session: SessionId) -> Option<WorkerId> {
        let (_, session) = self.sessions.remove(&session)?;
        self.count.fetch_sub(1, Ordering::AcqRel);
        Some(session.worker)
    }

    /// What a push is, and whether its model can be of the step it names.
    pub(super) fn turn(&self, session: SessionId, seq: Seq, step: Step) -> Result<Turn, Refusal> {
        let entry = self.sessions.get(&session).ok_or(Refusal::UnknownSession)?;
        let turn = entry.turn(seq)?;
        match turn {
            Turn::Next(_) if !(entry.joined..=entry.step).contains(&step) => Err(Refusal::SequenceMismatch),
            turn => Ok(turn),
        }
    }

    /// Claims the next push, so that no other call can; the same outcomes as [`Self::turn`].
    pub(super) fn claim(&self, session: SessionId, seq: Seq) -> Result<Turn, Refusal> {
        let mut entry = self.sessions.get_mut(&session).ok_or(Refusal::UnknownSession)?;
        let turn = entry.turn(seq)?;
        entry.in_flight |= matches!(turn, Turn::Next(_));
        Ok(turn)
    }

    /// Gives a claim up: the push was refused after all.
    pub(super) fn unclaim(&self, session: SessionId) {
        if let Some(mut entry) = self.sessions.get_mut(&session) {
            entry.in_flight = false;
        }
    }

    /// Stores the answer to the claimed push. A session that has ended meanwhile has no use for it.
    pub(super) fn answer(
        &self,
        session: SessionId,
        seq: Seq,
        step: Step,
        answer: &Bytes,
    ) -> Result<(), Refusal> {
        let mut entry = self.sessions.get_mut(&session).ok_or(Refusal::UnknownSession)?;
        assert!(entry.in_flight && seq.0 == entry.answered.0 + 1, "{seq} of {session} was not claimed");
        entry.in_flight = false;
        entry.answered = seq;
        entry.step = step;
        entry.answer = Some(answer.clone());
        Ok(())
    }
}
