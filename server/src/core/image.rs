//! The state at one place in the order of decisions: what would otherwise be the fold over every decision before it.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use sanderling_common::ids::{SessionId, Step, WorkerId};
use sanderling_common::init::combine_tensor_hashes;

use super::coordinator::Coordinator;
use super::sessions::Session;
use super::shard::{LastPush, ShardImage, ShardOutput};
use super::{PushOutput, ServerSettings};

/// What the core decides by.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct CoreImage {
    pub(super) coordinator: Coordinator,
    pub(super) sessions: Vec<(SessionId, Session)>,
    pub(super) next_worker: u32,
}

impl CoreImage {
    /// Updates applied.
    pub fn step(&self) -> Step {
        self.coordinator.step()
    }

    /// Sessions, in ascending order, with their workers.
    pub fn sessions(&self) -> impl Iterator<Item = (SessionId, WorkerId)> {
        self.sessions.iter().map(|(session, state)| (*session, state.worker))
    }

    /// The stored answers, in the order of sessions. They are not serialised with the rest, because they may be large.
    pub fn answers(&self) -> impl Iterator<Item = (SessionId, &Bytes)> {
        self.sessions.iter().filter_map(|(session, state)| Some((*session, state.answer.as_ref()?)))
    }

    /// Gives a session its stored answer; returns whether there is such a session.
    pub fn set_answer(&mut self, session: SessionId, answer: Bytes) -> bool {
        let place = self.sessions.binary_search_by_key(&session, |(session, _)| *session);
        place.map(|place| self.sessions[place].1.answer = Some(answer)).is_ok()
    }
}

/// What the shards had made of a push that was under way.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct UnderWay {
    /// Tensor blocks of the difference.
    pub payload: Bytes,
    /// The replica's digest before the update, where it was asked for.
    pub replica_hash: Option<[u8; 32]>,
}

/// The whole state of a server.
#[derive(Clone, Debug)]
pub struct Image {
    /// Sessions, order, leases and evaluations.
    pub core: CoreImage,
    /// Parts of θ, in the order of the layout.
    pub theta: Vec<Arc<Vec<f32>>>,
    /// Likewise of every worker's model, in ascending order of workers.
    pub replicas: BTreeMap<WorkerId, Vec<Arc<Vec<f32>>>>,
    /// Pushes that have their step and no answer.
    pub under_way: BTreeMap<SessionId, UnderWay>,
    /// The models that are still to be evaluated, and the best.
    pub snapshots: BTreeMap<Step, Arc<[f32]>>,
}

impl Image {
    /// The image that the shards' answers to [`ShardJob::Image`](super::ShardJob::Image) make with that of the core, all
    /// taken at one place in the order.
    ///
    /// # Panics
    /// If the outputs are of another job.
    pub fn join(
        core: CoreImage,
        shards: impl IntoIterator<Item = ShardOutput>,
        snapshots: BTreeMap<Step, Arc<[f32]>>,
    ) -> Self {
        let shards = shards.into_iter().map(|output| match output {
            ShardOutput::Image(image) => image,
            _ => unreachable!("the job was Image"),
        });
        let (mut theta, mut replicas) = (Vec::new(), BTreeMap::<_, Vec<_>>::new());
        let mut last = BTreeMap::<WorkerId, Vec<LastPush>>::new();
        for ShardImage { theta: part, replicas: parts, last: pushes } in shards {
            theta.push(part);
            parts.into_iter().for_each(|(worker, part)| replicas.entry(worker).or_default().push(part));
            pushes.into_iter().for_each(|(worker, push)| last.entry(worker).or_default().push(push));
        }
        let in_flight = core.sessions.iter().filter_map(|(session, state)| {
            let flight = state.flight.as_ref()?;
            let parts = last.remove(&state.worker).expect("a push with a step was handed to every shard");
            Some((*session, under_way(parts, flight.replica_hash.is_some())))
        });
        let under_way = in_flight.collect();
        Self { core, theta, replicas, under_way, snapshots }
    }
}

fn under_way(parts: Vec<LastPush>, is_hashed: bool) -> UnderWay {
    let payload: Vec<u8> = parts.iter().flat_map(|part| part.difference.iter().copied()).collect();
    let hashes = parts.into_iter().flat_map(|part| part.replica_hashes);
    UnderWay { payload: payload.into(), replica_hash: is_hashed.then(|| combine_tensor_hashes(hashes)) }
}

impl From<&UnderWay> for PushOutput {
    fn from(push: &UnderWay) -> Self {
        Self { payload: push.payload.to_vec(), replica_hash: push.replica_hash, snapshot: None }
    }
}

/// An image read back, whole.
#[derive(Clone, Debug)]
pub struct Restored {
    /// Sessions, order, leases and evaluations.
    pub core: CoreImage,
    /// θ.
    pub theta: Vec<f32>,
    /// The workers' models.
    pub replicas: Vec<(WorkerId, Vec<f32>)>,
    /// Pushes that had their step and no answer.
    pub under_way: BTreeMap<SessionId, UnderWay>,
    /// The models that were still to be evaluated, and the best.
    pub snapshots: BTreeMap<Step, Vec<f32>>,
}

/// Why an image is not one of this run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ImageError {
    /// The run is divided into work otherwise.
    #[error("its run is divided into work otherwise")]
    Work,
    /// A model of another size.
    #[error("it holds a model of {found} parameters, and the run's has {expected}")]
    Length {
        /// Its parameters.
        found: usize,
        /// The run's.
        expected: usize,
    },
    /// A model with a value that no server has.
    #[error("it holds a model with values out of range")]
    Values,
    /// Sessions and models do not go together.
    #[error("its sessions and its models do not go together")]
    Sessions,
}

impl Restored {
    /// Checks that the parts are of one run, and of this one.
    pub(super) fn check(&self, parameters: usize, settings: &ServerSettings) -> Result<(), ImageError> {
        if *self.core.coordinator.settings() != settings.work {
            return Err(ImageError::Work);
        }
        let replicas = self.replicas.iter().map(|(_, replica)| replica);
        let models = || replicas.clone().chain([&self.theta]).chain(self.snapshots.values());
        if let Some(found) = models().map(Vec::len).find(|&found| found != parameters) {
            return Err(ImageError::Length { found, expected: parameters });
        }
        if models().any(|model| model.iter().any(|value| !value.is_finite())) {
            return Err(ImageError::Values);
        }
        let workers: Vec<_> = self.replicas.iter().map(|(worker, _)| *worker).collect();
        let mut known: Vec<_> = self.core.sessions().map(|(_, worker)| worker).collect();
        known.sort_unstable();
        let is_new = |worker: &WorkerId| worker.0 < self.core.next_worker;
        let in_flight = self.core.sessions.iter().filter(|(_, state)| state.flight.is_some());
        let in_flight = in_flight.map(|(session, _)| session);
        let fits = known == workers
            && known.windows(2).all(|pair| pair[0] < pair[1])
            && known.iter().all(is_new)
            && in_flight.eq(self.under_way.keys())
            && self.core.coordinator.is_sound();
        if fits { Ok(()) } else { Err(ImageError::Sessions) }
    }
}
