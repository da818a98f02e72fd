//! Keeping a run's decisions, and going on from them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use sanderling_common::config::{Durability, RunConfig};
use sanderling_common::ids::{SessionId, Step};
use sanderling_common::layout::Layout;
use tracing::{info, warn};

use super::ServerError;
use crate::core::{Log, Note, Record, Replay, Replayed, ServerCore, ServerSettings, Shard};
use crate::recorder::{PushRecord, Recorder};
use crate::storage::{
    Commit, Directory, Journal, JournalFailed, Position, RunId, SEGMENT_BYTES, Stamp, StateFolder,
};

/// Records between two lines about a recovery that takes long.
const TELL_EVERY: Position = 10_000;

/// The time and the traffic of a run, over all servers that served it.
#[derive(Debug)]
pub(super) struct Clock {
    started: Instant,
    seconds_before: f64,
    /// The traffic when it was last looked at.
    bytes_up: AtomicU64,
    bytes_down: AtomicU64,
}

impl Clock {
    /// Goes on from where an earlier server's stopped.
    pub(super) fn after(stamp: Stamp) -> Self {
        Self {
            started: Instant::now(),
            seconds_before: stamp.seconds,
            bytes_up: AtomicU64::new(stamp.bytes_up),
            bytes_down: AtomicU64::new(stamp.bytes_down),
        }
    }

    pub(super) fn seconds(&self) -> f64 {
        self.seconds_before + self.started.elapsed().as_secs_f64()
    }

    pub(super) fn set_bytes(&self, up: u64, down: u64) {
        self.bytes_up.store(up, Ordering::Relaxed);
        self.bytes_down.store(down, Ordering::Relaxed);
    }

    fn stamp(&self) -> Stamp {
        Stamp {
            seconds: self.seconds(),
            bytes_up: self.bytes_up.load(Ordering::Relaxed),
            bytes_down: self.bytes_down.load(Ordering::Relaxed),
        }
    }
}

/// Stamps the core's records and hands them to the journal.
#[derive(Debug)]
struct JournalLog {
    commit: Arc<Commit>,
    clock: Arc<Clock>,
}

impl Log for JournalLog {
    fn append(&self, record: &Record<'_>) {
        let mut body = Vec::new();
        self.clock.stamp().encode(&mut body);
        record.encode(&mut body);
        self.commit.append(&body);
    }
}

/// What a server begins with.
pub(super) struct Beginnings {
    pub(super) core: ServerCore,
    pub(super) shards: Vec<Shard>,
    pub(super) recorder: Recorder,
    pub(super) snapshots: BTreeMap<Step, Arc<[f32]>>,
    /// Of an earlier server, all without a connection.
    pub(super) sessions: Vec<SessionId>,
    pub(super) stamp: Stamp,
    pub(super) clock: Arc<Clock>,
    pub(super) keeper: Keeper,
}

/// Knows when what was decided is kept.
#[derive(Debug, Default)]
pub(super) struct Keeper {
    /// None where nothing is kept.
    commit: Option<Arc<Commit>>,
}

impl Keeper {
    /// Waits until everything that was decided by now is kept; for ever once nothing can be kept any more, because then
    /// nobody may learn of it. The server is about to end.
    pub(super) async fn kept(&self) {
        if let Some(commit) = &self.commit
            && commit.kept().await.is_err()
        {
            std::future::pending().await
        }
    }

    /// Whether anything is kept.
    pub(super) fn keeps(&self) -> bool {
        self.commit.is_some()
    }

    /// Waits until nothing can be kept any more, if that ever happens.
    pub(super) async fn failed(&self) -> JournalFailed {
        match &self.commit {
            Some(commit) => commit.failed().await,
            None => std::future::pending().await,
        }
    }

    /// Writes what was decided by now, and takes no more.
    pub(super) fn close(&self) {
        if let Some(commit) = &self.commit {
            commit.close();
        }
    }
}

impl Beginnings {
    /// A run from its first step, of which nothing is kept.
    pub(super) fn fresh(layout: &Arc<Layout>, run: &RunConfig, initial: &[f32], recorder: Recorder) -> Self {
        let (core, shards) = ServerCore::new(layout, initial, &ServerSettings::from(run));
        Self {
            core,
            shards,
            recorder,
            snapshots: BTreeMap::new(),
            sessions: Vec::new(),
            stamp: Stamp::default(),
            clock: Arc::new(Clock::after(Stamp::default())),
            keeper: Keeper::default(),
        }
    }

    /// The run in a state folder, from its first record to its last, and the journal of what comes next.
    pub(super) fn recover(
        folder: &StateFolder,
        id: RunId,
        (layout, run, initial): (&Arc<Layout>, &RunConfig, &[f32]),
        mut recorder: Recorder,
    ) -> Result<Self, ServerError> {
        if run.server.durability == Durability::None {
            return Ok(Self::fresh(layout, run, initial, recorder));
        }
        let journal = Journal::new(Arc::new(Directory::new(folder.path())), id, SEGMENT_BYTES);
        let mut replay = Replay::new(layout, initial, &ServerSettings::from(run));
        let (mut stamp, started) = (Stamp::default(), Instant::now());
        let read = journal.read(0, |position, body| {
            let damaged = |what: String| ServerError::Record { position, what };
            let (now, record) = Stamp::split(body).ok_or_else(|| damaged("it is too short".to_owned()))?;
            let record = Record::decode(record).map_err(|error| damaged(error.to_string()))?;
            let replayed = replay.apply(&record).map_err(|error| damaged(error.to_string()))?;
            book(&mut recorder, &record, replayed, now);
            stamp = now;
            if position > 0 && position.is_multiple_of(TELL_EVERY) {
                info!("recovered {position} decisions");
            }
            Ok::<(), ServerError>(())
        })?;
        if read.torn_bytes > 0 {
            warn!("the last {} bytes of the journal were not whole, and never acknowledged", read.torn_bytes);
        }
        if read.next > 0 {
            let (steps, seconds) = (replay.server().core().standing().step, started.elapsed().as_secs_f64());
            info!("recovered {} decisions up to {steps} in {seconds:.1} s", read.next);
        }
        let commit = Commit::start(journal.write_from(read.next)?, run.server.durability);
        let (commit, clock) = (Arc::new(commit), Arc::new(Clock::after(stamp)));
        let recovered = replay.finish(Box::new(JournalLog { commit: commit.clone(), clock: clock.clone() }));
        let snapshots = recovered.snapshots.into_iter().map(|(step, model)| (step, model.into()));
        Ok(Self {
            core: recovered.core,
            shards: recovered.shards,
            recorder,
            snapshots: snapshots.collect(),
            sessions: recovered.sessions,
            stamp,
            clock,
            keeper: Keeper { commit: Some(commit) },
        })
    }
}

/// Puts into the books what the record had put there.
fn book(recorder: &mut Recorder, record: &Record<'_>, replayed: Replayed, stamp: Stamp) {
    match record {
        Record::Pushed(push) => {
            let Replayed::Pushed { step, staleness, applies, snapshot } = replayed else {
                unreachable!("a push is replayed as one")
            };
            if snapshot {
                recorder.snapshot_taken(step.0, stamp.bytes_up, stamp.bytes_down);
            }
            if applies || push.skipped {
                recorder.pushed(PushRecord::of(push, step, staleness, stamp.seconds));
            }
        }
        Record::Noted(note) => match &**note {
            Note::Opened(_) => recorder.session_opened(),
            Note::Reported(_, report) => recorder.evaluated(report),
            Note::Stopped => {
                if let Replayed::Stopped { snapshot: Some(step) } = replayed {
                    recorder.snapshot_taken(step.0, stamp.bytes_up, stamp.bytes_down);
                }
            }
            Note::Closed(_) | Note::Answered(..) | Note::Asked(_) | Note::SnapshotReady(_) => {}
        },
    }
}
