//! A worker that waits for an answer, as it can be written down.

use std::borrow::Cow;
use std::sync::Arc;

use sanderling_common::ids::{SessionId, Step};
use sanderling_common::layout::{Layout, LayoutHash};
use sanderling_common::sparse::{DecodeError, Update, decode};
use sanderling_common::wire::Push;

use super::queue::BatchQueue;
use super::replica::{Contents, HostReplica, Replica};
use super::{WorkerCore, WorkerCounters, WorkerSettings};

/// Where a worker is in its exchanges; the push that is pending has session and sequence number.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct WorkerPlace {
    layout: LayoutHash,
    /// The server step of θ_k.
    step: Step,
    /// Of the last view.
    view_step: Step,
    /// Of the last answered push.
    staleness: u32,
    /// The data cursor: batches that were leased and not computed.
    queue: BatchQueue,
    counters: WorkerCounters,
    /// What the method carries beside vectors.
    scalar: f64,
}

/// A worker with a pending push.
#[derive(Clone, Debug)]
pub struct WorkerImage<'a> {
    /// Where it is.
    pub place: WorkerPlace,
    /// What it waits for the answer to.
    pub push: &'a Push,
    /// θ_k.
    pub theta: Cow<'a, [f32]>,
    /// What the method carries.
    pub vectors: Vec<Cow<'a, [f32]>>,
}

/// The same, read back.
#[derive(Clone, Debug, PartialEq)]
pub struct RestoredWorker {
    /// Where it was.
    pub place: WorkerPlace,
    /// What it had made.
    pub push: Push,
    /// θ_k.
    pub theta: Vec<f32>,
    /// What the method carried.
    pub vectors: Vec<Vec<f32>>,
}

impl RestoredWorker {
    /// Its session.
    pub fn session(&self) -> SessionId {
        self.push.session
    }
}

/// Why a worker cannot go on from what was written down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ImageError {
    /// Of another model.
    #[error("it is of a model with another layout")]
    Layout,
    /// The push cannot be decoded.
    #[error("its push cannot be decoded: {0}")]
    Push(#[from] DecodeError),
    /// Of a run with another method.
    #[error("it is of a run with another method, or damaged")]
    Method,
}

impl WorkerCore {
    /// A worker that goes on from an image, in the same session and the same run.
    ///
    /// # Errors
    /// An [`ImageError`] for one of another run.
    pub fn restore(
        layout: Arc<Layout>,
        settings: &WorkerSettings,
        image: RestoredWorker,
    ) -> Result<Self, ImageError> {
        let (of, method) = (layout.clone(), settings.method);
        Self::restore_with(layout, settings, image, |theta| Ok(HostReplica::new(of, &method, theta)))
    }
}

impl<R: Replica> WorkerCore<R> {
    /// The worker as it waits for the answer to its push; `None` while it does not.
    ///
    /// # Errors
    /// The replica's if the place where it is kept fails.
    pub fn image(&mut self) -> Result<Option<WorkerImage<'_>>, R::Error> {
        let Some(push) = self.push.as_ref().filter(|_| self.is_pending) else { return Ok(None) };
        let Contents { theta, scalar, vectors } = self.replica.contents()?;
        let place = WorkerPlace {
            layout: self.layout.hash(),
            step: self.step,
            view_step: self.view_step,
            staleness: self.staleness,
            queue: self.queue.clone(),
            counters: self.counters,
            scalar,
        };
        Ok(Some(WorkerImage { place, push, theta, vectors }))
    }

    /// A worker that goes on from an image, in the same session and the same run, with a replica that `make` makes of θ_k.
    ///
    /// # Errors
    /// An [`ImageError`] for one of another run; the replica's if the place where it is kept fails.
    pub fn restore_with(
        layout: Arc<Layout>,
        settings: &WorkerSettings,
        image: RestoredWorker,
        make: impl FnOnce(Vec<f32>) -> Result<R, R::Error>,
    ) -> Result<Self, R::Failure<ImageError>> {
        let RestoredWorker { place, push, theta, vectors } = image;
        let is_finite = theta.iter().all(|value| value.is_finite());
        if place.layout != layout.hash() || theta.len() != layout.len() || !is_finite {
            return Err(ImageError::Layout.into());
        }
        let sent = sent(&layout, &push).map_err(ImageError::Push)?;
        let mut replica = make(theta).map_err(R::failure::<ImageError>)?;
        let restored = replica.restore(place.scalar, vectors, sent).map_err(R::failure::<ImageError>)?;
        if !restored || !place.queue.is_sound() {
            return Err(ImageError::Method.into());
        }
        let mut core = Self::with(replica, layout, settings, push.session, place.step);
        (core.view_step, core.staleness) = (place.view_step, place.staleness);
        (core.queue, core.counters) = (place.queue, place.counters);
        (core.seq, core.is_pending) = (push.seq, true);
        core.push = Some(push);
        Ok(core)
    }
}

/// What a push sent.
fn sent(layout: &Layout, push: &Push) -> Result<Update, DecodeError> {
    if push.skipped {
        return Ok(Update::default());
    }
    decode(layout, 0..layout.tensors().len(), &push.payload)
}
