//! Who takes part, and what each was answered last.

use std::sync::atomic::{AtomicU32, Ordering};

use bytes::Bytes;
use dashmap::{DashMap, Entry};
use sanderling_common::ids::{Seq, SessionId, Step, WorkerId};
use sanderling_common::wire::{Refusal, Work};

use super::coordinator::Placement;
use super::mutation::Mutation;

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

/// A push that has its step, and no answer yet.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub(super) struct Flight {
    pub(super) placement: Placement,
    pub(super) staleness: u32,
    pub(super) replica_hash: Option<[u8; 32]>,
    /// What its answer will bring, once that is decided.
    pub(super) work: Option<Work>,
}

/// Where a worker is in its exchanges.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub(super) struct Session {
    pub(super) worker: WorkerId,
    /// The step of the base the worker started from.
    pub(super) joined: Step,
    /// The step of the last answer.
    pub(super) step: Step,
    /// The last push that was answered.
    pub(super) answered: Seq,
    /// The frame that answered it: one difference of memory per session is the price of never applying twice.
    #[serde(skip)]
    pub(super) answer: Option<Bytes>,
    /// The push after it, while it is under way.
    pub(super) flight: Option<Flight>,
}

impl Session {
    fn turn(&self, seq: Seq) -> Result<Turn, Refusal> {
        let next = Seq(self.answered.0 + 1);
        match &self.answer {
            Some(_) if seq == self.answered && Mutation::NoDeduplication.is_on() => {
                Ok(Turn::Next(self.worker))
            }
            Some(answer) if seq == self.answered => Ok(Turn::Repeat(answer.clone())),
            _ if seq == next && self.flight.is_some() => Err(Refusal::InFlight),
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
        let opened = Session { worker, joined: step, step, answered: Seq(0), answer: None, flight: None };
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

    /// The next push has its step; no other is the next one until it is answered. It must be its [turn](Self::turn), and
    /// the order of steps held since that was asked.
    pub(super) fn take_off(&self, session: SessionId, flight: Flight) {
        let mut entry = self.sessions.get_mut(&session).expect("the session was there a moment ago");
        assert!(entry.flight.is_none(), "two pushes of {session} are under way");
        entry.flight = Some(flight);
    }

    /// Notes what the answer to the push under way will bring, while the order of steps is held.
    ///
    /// # Errors
    /// [`Refusal::UnknownSession`] if the session has ended meanwhile.
    pub(super) fn decide(&self, session: SessionId, work: impl FnOnce() -> Work) -> Result<Work, Refusal> {
        let mut entry = self.sessions.get_mut(&session).ok_or(Refusal::UnknownSession)?;
        let flight = entry.flight.as_mut().expect("a push is under way until it is answered");
        Ok(*flight.work.insert(work()))
    }

    /// Stores the answer to the push under way. A session that has ended meanwhile has no use for it.
    pub(super) fn land(&self, session: SessionId, seq: Seq, answer: &Bytes) -> Result<(), Refusal> {
        let mut entry = self.sessions.get_mut(&session).ok_or(Refusal::UnknownSession)?;
        assert!(seq.0 == entry.answered.0 + 1, "{seq} of {session} is not the push under way");
        let flight = entry.flight.take().expect("a push is under way until it is answered");
        entry.answered = seq;
        entry.step = flight.placement.step;
        entry.answer = Some(answer.clone());
        Ok(())
    }

    /// All sessions as they are, in ascending order, and the number of the next worker. The order of steps is held.
    pub(super) fn image(&self) -> (Vec<(SessionId, Session)>, u32) {
        let mut all: Vec<_> =
            self.sessions.iter().map(|entry| (*entry.key(), entry.value().clone())).collect();
        all.sort_unstable_by_key(|(session, _)| *session);
        (all, self.next_worker.load(Ordering::Relaxed))
    }

    /// The sessions of an [`image`](Self::image).
    pub(super) fn restore(sessions_max: u32, sessions: Vec<(SessionId, Session)>, next_worker: u32) -> Self {
        let count = u32::try_from(sessions.len()).unwrap_or(u32::MAX);
        Self {
            sessions: sessions.into_iter().collect(),
            sessions_max,
            count: AtomicU32::new(count),
            next_worker: AtomicU32::new(next_worker),
        }
    }
}
