//! What the connections of a run share.
//!
//! | what | guarded by | why |
//! | --- | --- | --- |
//! | the core and the order of shard jobs | [`Pipeline`] | a step must reach every shard in order |
//! | the books, the best model, the folder, the holders of sessions | one mutex each, held briefly and never across an await | touched once per push or evaluation |
//! | connections, bases | `DashMap` by session | many tasks look up different sessions at once; no guard lives across an await |

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use bytes::Bytes;
use dashmap::DashMap;
use quinn::Connection;
use sanderling_common::config::RunConfig;
use sanderling_common::corpus::Corpus;
use sanderling_common::ids::{SessionId, Step, WorkerId};
use sanderling_common::init::parameters_hash;
use sanderling_common::layout::{Layout, LayoutHash};
use sanderling_common::model_config::ModelConfig;
use sanderling_common::origin::Beginning;
use sanderling_common::report::one_sentence;
use sanderling_common::wire::control::{EvaluationReport, Initial, OnlineUpcycling, dense_bytes};
use sanderling_common::wire::frame::frame_bytes_max;
use sanderling_common::wire::{EvaluationJob, Push, Refusal, Work};
use sanderling_transport::{CloseCode, IDLE_MAX};
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tracing::{info, warn};

use super::admission::Admission;
use super::bulk::Blob;
use super::durable::Beginnings;
use super::pipeline::{Pipeline, Snapshot};
use crate::core::Evaluated;
use crate::progress::Progress;
use crate::recorder::Recorder;
use crate::results::{Evaluation, Summary};
use crate::storage::JournalFailed;

/// A worker is told of new steps at most this often; between two notices its estimate of its staleness lags by the
/// updates that fall between them.
pub(super) const NOTICE_EVERY: Duration = Duration::from_millis(10);

/// A connection that is silent for this part of the lease is lost; the rest of it passes before its session is.
pub(super) fn idle(run: &RunConfig) -> Duration {
    Duration::from_millis(run.server.lease_ms / 2).min(IDLE_MAX)
}

/// No session can be opened.
pub(super) enum OpenError {
    /// As many as allowed exist.
    Full {
        /// The limit.
        sessions_max: u32,
    },
}

/// A session that begins.
pub(super) struct Opened {
    /// The number people know the worker by.
    pub(super) worker: WorkerId,
    /// The step of its base model.
    pub(super) step: Step,
}

/// A worker's connection, for as long as its session is attached to it.
struct Attached {
    connection: Connection,
    worker: WorkerId,
}

/// The state of a run that is being served.
pub(crate) struct Hub {
    run: RunConfig,
    corpus: Corpus,
    model: ModelConfig,
    layout: Arc<Layout>,
    /// How workers come by the initial model.
    initial: Initial,
    /// The dense model that it was made of, if it was.
    dense: Option<Blob>,
    admission: Admission,
    pipeline: Pipeline,
    attached: DashMap<SessionId, Attached>,
    bases: DashMap<SessionId, (Step, Blob)>,
    asides: DashMap<SessionId, Arc<tokio::sync::Mutex<()>>>,
    /// Whose sessions are, where workers have tokens or certificates of their own.
    holders: Mutex<HashMap<SessionId, String>>,
    /// Sessions of an earlier server whose workers have not come back yet.
    awaited: DashMap<SessionId, ()>,
    text: Blob,
    /// The models that are to be evaluated, and the best.
    snapshots: Mutex<BTreeMap<Step, Arc<[f32]>>>,
    closed_bytes_up: AtomicU64,
    closed_bytes_down: AtomicU64,
    /// Woken when there may be work for those who wait, or the run is over.
    changed: Notify,
}

impl Hub {
    pub(super) fn new(
        run: RunConfig,
        corpus: Corpus,
        admission: Admission,
        beginning: &Beginning,
        layout: Arc<Layout>,
        beginnings: Beginnings,
    ) -> Self {
        let (model, initial) = (beginning.model.clone(), &beginning.parameters);
        let Beginnings { core, shards, snapshots, stamp, keeper, sessions: _ } = beginnings;
        Self {
            pipeline: Pipeline::start(core, shards, &run, keeper),
            initial: match &beginning.dense {
                None if run.workers_make_initial() => {
                    Initial::Seeded { sha256: parameters_hash(&layout, initial) }
                }
                None => Initial::Sent,
                Some(dense) => Initial::Upcycled(Box::new(OnlineUpcycling {
                    dense: dense.config.clone(),
                    dense_sha256: dense.sha256,
                    recipe: run.recipe(),
                    sha256: parameters_hash(&layout, initial),
                })),
            },
            dense: beginning
                .dense
                .as_ref()
                .map(|dense| Blob::of_bytes(dense_bytes(&dense.parameters).into())),
            model,
            layout,
            admission,
            attached: DashMap::new(),
            bases: DashMap::new(),
            asides: DashMap::new(),
            holders: Mutex::new(HashMap::new()),
            awaited: DashMap::new(),
            text: Blob::of_corpus(&corpus),
            snapshots: Mutex::new(snapshots),
            closed_bytes_up: AtomicU64::new(stamp.bytes_up),
            closed_bytes_down: AtomicU64::new(stamp.bytes_down),
            changed: Notify::new(),
            run,
            corpus,
        }
    }

    pub(crate) fn run(&self) -> &RunConfig {
        &self.run
    }

    pub(crate) fn corpus(&self) -> &Corpus {
        &self.corpus
    }

    pub(super) fn admission(&self) -> &Admission {
        &self.admission
    }

    pub(super) fn model(&self) -> &ModelConfig {
        &self.model
    }

    pub(super) fn initial(&self) -> &Initial {
        &self.initial
    }

    /// The dense model of an upcycled run.
    pub(super) fn dense(&self) -> Option<Blob> {
        self.dense.clone()
    }

    pub(super) fn layout_hash(&self) -> LayoutHash {
        self.layout.hash()
    }

    pub(super) fn lease(&self) -> Duration {
        Duration::from_millis(self.run.server.lease_ms)
    }

    pub(super) fn frame_bytes_max(&self) -> usize {
        usize::try_from(frame_bytes_max(&self.layout)).unwrap_or(usize::MAX)
    }

    /// Whether every batch and every evaluation is done, or the run was abandoned.
    pub(crate) fn is_finished(&self) -> bool {
        self.pipeline.standing().finished
    }

    /// Waits until [`is_finished`](Self::is_finished).
    pub(crate) async fn finished(&self) {
        loop {
            let changed = self.changed.notified();
            if self.is_finished() {
                return;
            }
            changed.await;
        }
    }

    /// Hands out no more batches; what has been applied is still evaluated, if there is anybody to do it.
    pub(crate) async fn stop_training(&self) {
        if let Some(snapshot) = self.pipeline.stop().await {
            self.keep(snapshot);
        }
        self.changed.notify_waiters();
    }

    /// Gives up on what is still to be evaluated.
    pub(crate) fn abandon(&self) {
        self.pipeline.abandon();
        self.changed.notify_waiters();
    }

    /// Seconds that the run has been served.
    pub(super) fn seconds(&self) -> f64 {
        self.pipeline.keeper().clock().seconds()
    }

    fn recorder(&self) -> MutexGuard<'_, Recorder> {
        self.pipeline.keeper().recorder()
    }
}

/// Sessions and connections.
impl Hub {
    /// A session for a new worker, under a name that nobody can guess. Whoever calls this must [`detach`](Self::detach)
    /// it, also when the future is dropped.
    pub(super) async fn open(
        &self,
        session: SessionId,
        connection: &Connection,
    ) -> Result<Opened, OpenError> {
        let (opened, base) = self.pipeline.open(session).await?;
        // Copying and hashing a large model takes a while.
        let base = tokio::task::spawn_blocking(move || Blob::of_base(base)).await;
        self.bases.insert(session, (opened.step, base.expect("making a blob does not panic")));
        self.attach(session, opened.worker, connection);
        Ok(opened)
    }

    /// Attaches a session that still exists to another connection.
    pub(super) fn resume(&self, session: SessionId, connection: &Connection) -> Option<WorkerId> {
        let worker = self.pipeline.worker(session)?;
        self.attach(session, worker, connection);
        self.came_back(session);
        Some(worker)
    }

    /// Notes whose a session is to be; returns whether that name may have another one. It is let go with the session.
    pub(super) fn claim(&self, session: SessionId, name: &str) -> bool {
        let mut holders = self.holders();
        let held = holders.iter().filter(|(of, holder)| **of != session && *holder == name).count();
        let is_room = held < self.run.sessions_per_name() as usize;
        if is_room {
            holders.insert(session, name.to_owned());
        }
        is_room
    }

    /// Notes whose a session is that an earlier server opened.
    pub(super) fn note_holder(&self, session: SessionId, name: &str) {
        self.holders().insert(session, name.to_owned());
    }

    fn holders(&self) -> MutexGuard<'_, HashMap<SessionId, String>> {
        self.holders.lock().expect("nothing panics while it holds the holders")
    }

    fn attach(&self, session: SessionId, worker: WorkerId, connection: &Connection) {
        let attached = Attached { connection: connection.clone(), worker };
        if let Some(old) = self.attached.insert(session, attached) {
            CloseCode::Replaced.close(&old.connection, "the session goes on over another connection");
            self.count_closed(&old.connection);
        }
    }

    /// A connection has ended. Its session goes on for the rest of the lease, unless the worker said goodbye or the
    /// session is attached to another connection by now.
    pub(super) fn detach(self: &Arc<Self>, session: SessionId, connection: &Connection, for_good: bool) {
        let id = connection.stable_id();
        let removed = self.attached.remove_if(&session, |_, attached| attached.connection.stable_id() == id);
        let Some((_, attached)) = removed else {
            // It goes on over another connection, or opening it was broken off.
            if for_good && !self.attached.contains_key(&session) {
                self.close(session);
            }
            return;
        };
        self.count_closed(connection);
        if for_good {
            return self.close(session);
        }
        let (hub, worker) = (self.clone(), attached.worker);
        // Where the runtime ends, so does the hub.
        let Ok(runtime) = Handle::try_current() else { return };
        runtime.spawn(async move {
            // The connection itself lasted the first part of the lease without a sign of life.
            tokio::time::sleep(hub.lease() - idle(&hub.run)).await;
            if !hub.attached.contains_key(&session) && hub.pipeline.worker(session).is_some() {
                info!("{worker} did not come back within its lease; its batches go to others");
                hub.close(session);
            }
        });
    }

    fn close(&self, session: SessionId) {
        self.bases.remove(&session);
        self.asides.remove(&session);
        self.holders().remove(&session);
        self.came_back(session);
        self.pipeline.close(session);
        self.changed.notify_waiters();
    }

    /// Closes every connection.
    pub(crate) fn disconnect_all(&self, code: CloseCode, reason: &str) {
        for attached in &self.attached {
            code.close(&attached.connection, reason);
        }
    }

    /// Workers connected.
    pub(crate) fn connected(&self) -> u32 {
        u32::try_from(self.attached.len()).unwrap_or(u32::MAX)
    }

    /// Tells every worker the newest step, so that it knows how stale its gradient is. A lost notice costs nothing:
    /// the next one says more.
    pub(super) fn announce(&self, step: Step) {
        let notice = Bytes::copy_from_slice(&step.0.to_le_bytes());
        for attached in &self.attached {
            // A worker that takes no datagrams estimates its staleness from its last answer.
            let _ = attached.connection.send_datagram(notice.clone());
        }
    }

    /// The newest step.
    pub(super) fn step(&self) -> Step {
        self.pipeline.standing().step
    }
}

/// Exchanges, evaluations and what they leave behind.
impl Hub {
    /// Applies a push and returns the reply frame. One that is refused may have made a step all the same, when its
    /// worker turns out to have another model than it should, or has left meanwhile.
    pub(super) async fn push(&self, push: Push) -> Result<Bytes, Refusal> {
        let pushed = self.pipeline.push(&push).await.inspect_err(|refusal| {
            if matches!(refusal, Refusal::BadPayload | Refusal::AbsurdNorm) {
                self.recorder().refused();
            }
        })?;
        if !pushed.is_new {
            return pushed.reply;
        }
        if pushed.reply == Err(Refusal::ReplicaMismatch) {
            // The session is closed, and its place another's.
            self.holders().remove(&push.session);
        }
        self.bases.remove(&push.session);
        if let Some(snapshot) = pushed.snapshot {
            self.keep(snapshot);
        }
        if self.is_finished() {
            self.changed.notify_waiters();
        }
        pushed.reply
    }
}

/// Evaluations and results.
impl Hub {
    /// Something to do for an idle worker; waits for it until `deadline`. `None` if the session is gone.
    pub(super) async fn wait_for_work(&self, session: SessionId, deadline: Instant) -> Option<Work> {
        loop {
            let changed = self.changed.notified();
            let work = self.pipeline.work(session)?;
            if work != Work::default() {
                self.pipeline.kept().await;
                return Some(work);
            }
            if tokio::time::timeout_at(deadline.into(), changed).await.is_err() {
                return Some(work);
            }
        }
    }

    /// Notes the result of an evaluation; one that is not the session's to do, came twice, or is not of this model changes
    /// nothing.
    pub(super) fn evaluated(&self, session: SessionId, report: &EvaluationReport) {
        if !report.fits(&self.model) {
            return warn!("{session}: an evaluation of another model was left out");
        }
        if !report.loss.is_finite() {
            warn!("the loss at {} is not finite: the model has diverged", report.job.step);
        }
        if self.pipeline.report(session, report) == Evaluated::Ignored {
            return;
        }
        self.snapshots().retain(|&step, _| self.pipeline.needs_snapshot(step));
        self.changed.notify_waiters();
    }

    /// Keeps the model of a step that is to be evaluated.
    fn keep(&self, snapshot: Snapshot) {
        let step = snapshot.step;
        self.snapshots().insert(step, snapshot.parameters.into());
        self.pipeline.snapshot_ready(step);
        self.changed.notify_waiters();
    }

    /// What turns a session's model into that of an evaluation, if the session is to do that.
    pub(super) async fn snapshot_for(&self, session: SessionId, job: EvaluationJob) -> Option<Blob> {
        let target = self.snapshot(job.step).filter(|_| self.pipeline.evaluates(session, job))?;
        let payload = self.pipeline.aside(session, target).await?;
        let blob = tokio::task::spawn_blocking(move || Blob::of_bytes(payload.into())).await;
        Some(blob.expect("making a blob does not panic"))
    }

    /// Held by whoever sends a session what it evaluates.
    pub(super) fn aside(&self, session: SessionId) -> Arc<tokio::sync::Mutex<()>> {
        self.asides.entry(session).or_default().clone()
    }

    fn snapshot(&self, step: Step) -> Option<Arc<[f32]>> {
        self.snapshots().get(&step).cloned()
    }

    fn snapshots(&self) -> MutexGuard<'_, BTreeMap<Step, Arc<[f32]>>> {
        self.snapshots.lock().expect("no holder of the snapshots panics")
    }

    /// The model a session starts from, until its first push.
    pub(super) fn base(&self, session: SessionId) -> Option<Blob> {
        self.bases.get(&session).map(|base| base.1.clone())
    }

    /// The step of that model, likewise.
    pub(super) fn base_step(&self, session: SessionId) -> Option<Step> {
        self.bases.get(&session).map(|base| base.0)
    }

    /// The text.
    pub(super) fn text(&self) -> Blob {
        self.text.clone()
    }

    /// The best model by validation so far, with its step.
    pub(crate) fn best(&self) -> Option<(Step, Arc<[f32]>)> {
        let step = self.pipeline.best()?.step;
        // It may have been replaced between the two look-ups.
        Some((step, self.snapshot(step)?))
    }

    /// The last model.
    pub(crate) async fn theta(&self) -> Vec<f32> {
        self.pipeline.theta().await
    }

    /// Whether decisions are kept, so that another server can go on from them.
    pub(crate) fn is_kept(&self) -> bool {
        self.pipeline.keeper().keeps()
    }

    /// Waits until decisions cannot be kept any more, if that ever happens.
    pub(crate) async fn failed(&self) -> JournalFailed {
        self.pipeline.keeper().failed().await
    }

    /// Waits until everything that was decided by now is kept.
    pub(crate) async fn kept(&self) {
        self.pipeline.kept().await;
    }

    /// Keeps what was decided by now, and nothing that is decided from now on.
    pub(crate) fn close_journal(&self) {
        self.pipeline.keeper().close();
    }

    /// Sessions of an earlier server that do not come back within the lease are closed.
    pub(super) fn await_return(self: &Arc<Self>, sessions: Vec<SessionId>) {
        for session in sessions {
            self.awaited.insert(session, ());
            let hub = self.clone();
            tokio::spawn(async move {
                tokio::time::sleep(hub.lease()).await;
                hub.came_back(session);
                if !hub.attached.contains_key(&session) && hub.pipeline.worker(session).is_some() {
                    info!("{session} did not come back after the server did; its batches go to others");
                    hub.close(session);
                }
            });
        }
    }

    /// A session of an earlier server need not be awaited any more.
    pub(super) fn came_back(&self, session: SessionId) {
        if self.awaited.remove(&session).is_some() {
            self.changed.notify_waiters();
        }
    }

    /// Waits until every worker of an earlier server has come back, or its lease is over. One that looks for a run that
    /// has ended meanwhile finds somebody to tell it so.
    pub(super) async fn all_came_back(&self) {
        loop {
            let changed = self.changed.notified();
            if self.awaited.is_empty() {
                return;
            }
            changed.await;
        }
    }

    /// Where the run stands.
    pub(crate) fn progress(&self) -> Progress {
        let (up, down) = self.bytes();
        self.recorder().progress(self.connected(), up, down)
    }

    /// Looks at the traffic, for what is written down of it with the decisions.
    pub(super) fn look_at_traffic(&self) {
        self.pipeline.keeper().clock().set_bytes(self.bytes());
    }

    /// Writes the whole state down, if there is anything new. A failure is told and not final: what is decided is in the
    /// journal.
    pub(super) async fn write_checkpoint(&self) {
        // While the models are held, none of those in the image can be let go.
        let image = || self.pipeline.image(&self.snapshots());
        if let Err(error) = self.pipeline.write_checkpoint(image).await {
            warn!("the state cannot be written down, and the journal grows: {}", one_sentence(&error));
        }
    }

    /// The closing figures.
    pub(crate) fn summary(&self, seconds: f64) -> Summary {
        let (up, down) = self.bytes();
        self.recorder().summary(seconds, up, down)
    }

    /// The lines of the curve after the first `known`, as they came.
    pub(crate) fn lines(&self, known: usize) -> Vec<Evaluation> {
        self.recorder().lines(known)
    }

    /// The curve, in order of step.
    pub(crate) fn evaluations(&self) -> Vec<Evaluation> {
        self.recorder().evaluations()
    }

    /// UDP payload bytes up and down, of connections past and present.
    fn bytes(&self) -> (u64, u64) {
        let closed =
            (self.closed_bytes_up.load(Ordering::Relaxed), self.closed_bytes_down.load(Ordering::Relaxed));
        self.attached.iter().fold(closed, |(up, down), attached| {
            let stats = attached.connection.stats();
            (up + stats.udp_rx.bytes, down + stats.udp_tx.bytes)
        })
    }

    /// Adds a connection that is no longer attached to the totals.
    pub(super) fn count_closed(&self, connection: &Connection) {
        let stats = connection.stats();
        self.closed_bytes_up.fetch_add(stats.udp_rx.bytes, Ordering::Relaxed);
        self.closed_bytes_down.fetch_add(stats.udp_tx.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lease_is_what_a_connection_and_its_session_last_together() {
        let mut run = RunConfig::default();
        for (lease_ms, idle_ms) in [(1000, 500), (120_000, 60_000), (86_400_000, 60_000)] {
            run.server.lease_ms = lease_ms;
            assert_eq!(idle(&run), Duration::from_millis(idle_ms));
        }
    }
}
