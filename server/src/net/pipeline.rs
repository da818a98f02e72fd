//! The core with a thread per shard: pushes are pipelined, so one may be applied to the first shard while the one
//! before it is in the second.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use bytes::Bytes;
use sanderling_common::config::RunConfig;
use sanderling_common::ids::{SessionId, Step, WorkerId};
use sanderling_common::wire::control::EvaluationReport;
use sanderling_common::wire::{EvaluationJob, Push, Refusal, Work};
use tokio::sync::{Semaphore, oneshot};

use super::durable::{Keeper, Moment};
use super::hub::{OpenError, Opened};
use crate::core::{
    Admitted, Base, Best, CoreImage, Evaluated, Image, PushOutput, ServerCore, SessionsFull, Shard, ShardJob,
    ShardOutput, Standing, Ticket, aside_bytes,
};
use crate::storage::{Position, StoreError};

/// Jobs that one session can have queued: the three of a push, and its opening and closing.
const JOBS_PER_SESSION: usize = 5;

/// A model that is to be evaluated is on its way for a moment; a checkpoint that it keeps from being written is tried as
/// often, and then left for the next time.
const IMAGE_TRIES: u32 = 100;

const IMAGE_RETRY: Duration = Duration::from_millis(5);

/// Jobs that belong to no session: snapshots and images.
const JOBS_WITHOUT_SESSION: usize = 16;

/// Differences to models that are evaluated, in the making at a time. Whoever asks for another waits.
const ASIDE_MAX: usize = 4;

struct Task {
    job: ShardJob,
    done: oneshot::Sender<ShardOutput>,
}

/// Outputs to come: a list per shard.
type Pending = Vec<Vec<oneshot::Receiver<ShardOutput>>>;

/// The model of a step.
pub(super) struct Snapshot {
    pub(super) step: Step,
    pub(super) parameters: Vec<f32>,
}

/// What became of a push that had or got a step.
pub(super) struct Pushed {
    /// The frame that answers it, or why there is none although the push was handled.
    pub(super) reply: Result<Bytes, Refusal>,
    /// Whether it was handled for the first time.
    pub(super) is_new: bool,
    /// The model after it, if it is to be evaluated.
    pub(super) snapshot: Option<Snapshot>,
}

/// The core, and the queues of its shards. The queues are filled only by closures that the core calls while it holds
/// the order of steps, so every shard sees the same order.
pub(super) struct Pipeline {
    core: ServerCore,
    shards: Vec<SyncSender<Task>>,
    aside: Semaphore,
    keeper: Keeper,
    /// The position of the last checkpoint that this server wrote.
    written: tokio::sync::Mutex<Position>,
}

/// An image that the shards are at.
pub(super) struct PendingImage {
    core: CoreImage,
    moment: Moment,
    pending: Pending,
    snapshots: BTreeMap<Step, Arc<[f32]>>,
}

impl Pipeline {
    /// Starts the shards' threads; they end with the pipeline.
    pub(super) fn start(core: ServerCore, shards: Vec<Shard>, run: &RunConfig, keeper: Keeper) -> Self {
        let queue_max =
            JOBS_PER_SESSION * run.server.sessions_max as usize + JOBS_WITHOUT_SESSION + ASIDE_MAX;
        let start = |(number, shard): (usize, Shard)| {
            let (queue, tasks) = sync_channel(queue_max);
            let thread = std::thread::Builder::new().name(format!("shard {number}"));
            thread.spawn(move || work_off(shard, &tasks)).expect("the system has a thread for each shard");
            queue
        };
        let shards = shards.into_iter().enumerate().map(start).collect();
        let written = tokio::sync::Mutex::new(0);
        Self { core, shards, aside: Semaphore::new(ASIDE_MAX), keeper, written }
    }

    /// Queues jobs for every shard. Called while the order of steps is held, so it must not wait: the queues have
    /// room for whatever sessions can ask for.
    fn enqueue(&self, jobs: &[ShardJob], pending: &mut Pending) {
        pending.extend(self.shards.iter().map(|queue| {
            let task = |job: &ShardJob| {
                let (done, output) = oneshot::channel();
                let task = Task { job: job.clone(), done };
                queue.try_send(task).expect("a shard's queue has room for every session's jobs");
                output
            };
            jobs.iter().map(task).collect()
        }));
    }

    /// A new session and its base model.
    pub(super) async fn open(&self, session: SessionId) -> Result<(Opened, Base), OpenError> {
        let mut pending = Pending::new();
        let opened = self.core.open_session(session, |job| self.enqueue(&[job], &mut pending));
        let (worker, step) =
            opened.map_err(|SessionsFull { sessions_max }| OpenError::Full { sessions_max })?;
        let base = Base::join(outputs(pending).await.into_iter().flatten());
        self.keeper.kept().await;
        Ok((Opened { worker, step }, base))
    }

    /// Ends a session.
    pub(super) fn close(&self, session: SessionId) {
        self.core.close_session(session, |job| self.enqueue(&[job], &mut Pending::new()));
    }

    /// One exchange. A push that is refused here has changed nothing.
    pub(super) async fn push(&self, push: &Push) -> Result<Pushed, Refusal> {
        let mut pending = Pending::new();
        let queue = |ticket: &Ticket| self.enqueue(&ticket.jobs().collect::<Vec<_>>(), &mut pending);
        let ticket = match self.core.admit(push, queue)? {
            Admitted::Repeat(reply) => {
                self.keeper.kept().await;
                return Ok(Pushed { reply: Ok(reply), is_new: false, snapshot: None });
            }
            Admitted::New(ticket) => ticket,
        };
        let mut output = PushOutput::join(outputs(pending).await);
        let reply = self.core.complete(&ticket, &output);
        if reply == Err(Refusal::ReplicaMismatch) {
            self.close(push.session);
        }
        // Push and answer are kept before anybody learns of them.
        self.keeper.kept().await;
        let step = ticket.step();
        let snapshot = output.snapshot.take().map(|parameters| Snapshot { step, parameters });
        Ok(Pushed { reply, is_new: true, snapshot })
    }

    /// Waits until everything that was decided by now is kept.
    pub(super) async fn kept(&self) {
        self.keeper.kept().await;
    }

    pub(super) fn keeper(&self) -> &Keeper {
        &self.keeper
    }

    /// The state at this place in the order, as the shards will tell it, with what the keeper knows of the same moment;
    /// none while a model that is to be evaluated is on its way, or if nothing is kept.
    pub(super) fn image(&self, snapshots: &BTreeMap<Step, Arc<[f32]>>) -> Option<PendingImage> {
        let mut pending = Pending::new();
        let (core, moment) = self.core.image(|job| {
            self.enqueue(&[job], &mut pending);
            self.keeper.moment()
        })?;
        Some(PendingImage { core, moment, pending, snapshots: snapshots.clone() })
    }

    /// Writes down what `image` takes, unless nothing was decided since the last time.
    ///
    /// # Errors
    /// A [`StoreError`].
    pub(super) async fn write_checkpoint(
        &self,
        image: impl Fn() -> Option<PendingImage>,
    ) -> Result<(), StoreError> {
        // One at a time, and none while an earlier one is still being written.
        let mut written = self.written.lock().await;
        if !self.keeper.keeps() || self.keeper.position() == *written {
            return Ok(());
        }
        for _ in 0..IMAGE_TRIES {
            if let Some(PendingImage { core, moment, pending, snapshots }) = image() {
                let shards = outputs(pending).await;
                let position = moment.position();
                let image = Image::join(core, shards.into_iter().flatten(), snapshots);
                self.keeper.write(moment, image).await?;
                *written = position;
                return Ok(());
            }
            tokio::time::sleep(IMAGE_RETRY).await;
        }
        Ok(())
    }

    /// Leases nothing more; returns the current model if it is still to be evaluated.
    pub(super) async fn stop(&self) -> Option<Snapshot> {
        let mut pending = Pending::new();
        let step = self.core.stop(|job| self.enqueue(&[job], &mut pending))?;
        Some(Snapshot { step, parameters: snapshot(pending).await })
    }

    /// What turns a session's model into `target`; `None` if there is no such session.
    pub(super) async fn aside(&self, session: SessionId, target: Arc<[f32]>) -> Option<Vec<u8>> {
        let _permit = self.aside.acquire().await.expect("the semaphore is never closed");
        let mut pending = Pending::new();
        let exists = self.core.aside(session, target, |job| self.enqueue(&[job], &mut pending));
        if !exists {
            return None;
        }
        Some(aside_bytes(outputs(pending).await.into_iter().flatten()))
    }

    /// The model as it is when the queued jobs are done.
    pub(super) async fn theta(&self) -> Vec<f32> {
        let mut pending = Pending::new();
        self.core.in_order(|| self.enqueue(&[ShardJob::Snapshot], &mut pending));
        snapshot(pending).await
    }

    pub(super) fn worker(&self, session: SessionId) -> Option<WorkerId> {
        self.core.worker(session)
    }

    pub(super) fn work(&self, session: SessionId) -> Option<Work> {
        self.core.work(session)
    }

    pub(super) fn report(&self, session: SessionId, report: &EvaluationReport) -> Evaluated {
        self.core.report(session, report)
    }

    pub(super) fn evaluates(&self, session: SessionId, job: EvaluationJob) -> bool {
        self.core.evaluates(session, job)
    }

    pub(super) fn snapshot_ready(&self, step: Step) {
        self.core.snapshot_ready(step);
    }

    pub(super) fn needs_snapshot(&self, step: Step) -> bool {
        self.core.needs_snapshot(step)
    }

    pub(super) fn abandon(&self) {
        self.core.abandon();
    }

    pub(super) fn best(&self) -> Option<Best> {
        self.core.best()
    }

    pub(super) fn standing(&self) -> Standing {
        self.core.standing()
    }
}

fn work_off(mut shard: Shard, tasks: &Receiver<Task>) {
    while let Ok(Task { job, done }) = tasks.recv() {
        // Whoever asked may be gone; the job is done all the same.
        let _ = done.send(shard.handle(&job));
    }
}

async fn outputs(pending: Pending) -> Vec<Vec<ShardOutput>> {
    let mut all = Vec::with_capacity(pending.len());
    for shard in pending {
        let mut of_shard = Vec::with_capacity(shard.len());
        for output in shard {
            of_shard.push(output.await.expect("shards do every job they are given"));
        }
        all.push(of_shard);
    }
    all
}

async fn snapshot(pending: Pending) -> Vec<f32> {
    let parts = outputs(pending).await.into_iter().flatten().map(|output| match output {
        ShardOutput::Snapshot(part) => part,
        _ => unreachable!("the job was Snapshot"),
    });
    parts.flatten().collect()
}
