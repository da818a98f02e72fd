//! A part of the model, and what is done to it.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use sanderling_common::checkpoint::PARAMETER_MAGNITUDE_MAX;
use sanderling_common::config::RunConfig;
use sanderling_common::ids::WorkerId;
use sanderling_common::init::tensor_hash;
use sanderling_common::layout::Layout;
use sanderling_common::sparse::{Compression, DecodeError, Update, decode, join_aside};

use super::ServerSettings;
use super::tracker::{DifferenceTracker, Replicas};

/// The largest magnitude of an initial parameter.
///
/// With [`UPDATE_MAGNITUDE_MAX`](sanderling_common::wire::UPDATE_MAGNITUDE_MAX) it is what keeps the model finite. From
/// |θ0| ≤ 2¹⁰⁰ and |g| ≤ 2⁶⁴ follows |θ_t| ≤ 2¹⁰⁰ + t·2⁶⁴, which stays below 2¹²⁷ for all of the 2⁶⁴ steps that can be
/// counted. A replica lies no further from θ than θ has moved, so that it is finite too, and so is every difference.
/// Workers that compute real gradients stay below 2⁴⁰ by far.
pub const BASE_MAGNITUDE_MAX: f32 = PARAMETER_MAGNITUDE_MAX;

/// Something to do for every shard, in the order of the server's steps.
#[derive(Clone, Debug)]
pub enum ShardJob {
    /// A worker starts from the current model.
    Open {
        /// Who.
        worker: WorkerId,
    },
    /// A worker is gone.
    Close {
        /// Who.
        worker: WorkerId,
    },
    /// Apply an update and make the answer.
    Apply {
        /// Whose.
        worker: WorkerId,
        /// What to subtract, over all shards; `None` for a push that only asks for the difference.
        update: Option<Arc<Update>>,
    },
    /// Copy the model.
    Snapshot,
    /// Make the difference that turns a worker's model into one that it evaluates. Nothing is taken as sent.
    Aside {
        /// Whose.
        worker: WorkerId,
        /// The model of an earlier step, over all shards.
        target: Arc<[f32]>,
    },
    /// Hash a worker's replica.
    ReplicaHashes {
        /// Whose.
        worker: WorkerId,
    },
    /// Tell the whole state.
    Image,
}

/// What came of a [`ShardJob`] in one shard.
#[derive(Clone, Debug, PartialEq)]
pub enum ShardOutput {
    /// Of `Open`: the part of the model the worker starts from, or of what differs there from the initial model.
    Base(Base),
    /// Of `Close`.
    Closed,
    /// Of `Apply`: the tensor blocks of the difference.
    Difference(Bytes),
    /// Of `Snapshot`: the part of the model.
    Snapshot(Vec<f32>),
    /// Of `Aside`: the tensor blocks of the difference, and of what their values leave over.
    Aside(Vec<u8>, Vec<u8>),
    /// Of `ReplicaHashes`: one hash per tensor.
    ReplicaHashes(Vec<[u8; 32]>),
    /// Of `Image`.
    Image(ShardImage),
}

/// What a shard made of a worker's last push.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LastPush {
    /// Tensor blocks of the difference.
    pub difference: Bytes,
    /// One hash per tensor, if the push came with one.
    pub replica_hashes: Vec<[u8; 32]>,
}

/// The state of a shard at one place in the order of jobs. Models are shared with the shard, which copies what it changes
/// while the image is held.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ShardImage {
    /// θ.
    pub theta: Arc<Vec<f32>>,
    /// The workers' models, in ascending order of workers.
    pub replicas: Vec<(WorkerId, Arc<Vec<f32>>)>,
    /// What may not have become an answer yet.
    pub last: BTreeMap<WorkerId, LastPush>,
}

/// What a worker is sent at the beginning of its session.
#[derive(Clone, Debug, PartialEq)]
pub enum Base {
    /// The model.
    Whole(Vec<f32>),
    /// Tensor blocks of what is to be added to the initial model, which the worker has.
    Difference(Vec<u8>),
}

impl Base {
    /// The whole of the parts that the shards returned for [`ShardJob::Open`], in their order.
    ///
    /// # Panics
    /// If they are outputs of another job.
    pub fn join(outputs: impl IntoIterator<Item = ShardOutput>) -> Self {
        let parts = outputs.into_iter().map(|output| match output {
            ShardOutput::Base(part) => part,
            _ => unreachable!("the job was Open"),
        });
        let join = |joined: Self, part| match (joined, part) {
            (Self::Whole(mut joined), Self::Whole(part)) => {
                joined.extend(part);
                Self::Whole(joined)
            }
            (Self::Difference(mut joined), Self::Difference(part)) => {
                joined.extend(part);
                Self::Difference(joined)
            }
            _ => unreachable!("all shards are of one run"),
        };
        parts.reduce(join).expect("a model has at least one shard")
    }

    /// The model that the worker has then. `initial` is the one that a difference is added to.
    ///
    /// # Errors
    /// A [`DecodeError`] for a difference that is not of this layout.
    pub fn onto(self, layout: &Layout, mut initial: Vec<f32>) -> Result<Vec<f32>, DecodeError> {
        match self {
            Self::Whole(model) => Ok(model),
            Self::Difference(payload) => {
                decode(layout, 0..layout.tensors().len(), &payload)?.add_to(layout, &mut initial);
                Ok(initial)
            }
        }
    }
}

/// A run of tensors of the model, with what the workers have of it.
///
/// The shards of a model do not know of each other. Each handles the same jobs in the same order, and since every
/// selection is per tensor, their outputs put together do not depend on how many they are.
#[derive(Debug)]
pub struct Shard<T = Replicas> {
    layout: Arc<Layout>,
    tensors: Range<usize>,
    /// θ, the elements of `tensors`.
    theta: Arc<Vec<f32>>,
    /// θ0 likewise, where the workers make it themselves.
    initial: Option<Vec<f32>>,
    tracker: T,
    last: BTreeMap<WorkerId, LastPush>,
}

impl Shard {
    /// Cuts the model into the shards that `settings` ask for, with a replica per worker.
    ///
    /// # Panics
    /// If `theta` is not of the layout's length, or holds a value that is not finite or above
    /// [`BASE_MAGNITUDE_MAX`].
    pub fn cut(layout: &Arc<Layout>, theta: &[f32], settings: &ServerSettings) -> Vec<Self> {
        assert_eq!(theta.len(), layout.len(), "the model is of another layout");
        let shard = |tensors: Range<usize>| {
            let theta = theta[layout.elements(tensors.clone())].to_vec();
            let tracker = Replicas::new(tensors.clone(), settings.secondary);
            let initial = settings.workers_have_initial.then(|| theta.clone());
            Self { initial, ..Self::new(layout.clone(), tensors, theta, tracker) }
        };
        layout.shards(settings.shards).into_iter().map(shard).collect()
    }

    /// The shards that `settings` ask for, in the state of images of the same model, however many those were of. What
    /// became of pushes that were under way is for [`Replay`](super::Replay) to see to.
    ///
    /// # Panics
    /// As [`Self::cut`], for any of the models.
    pub fn restore(
        (layout, initial): (&Arc<Layout>, &[f32]),
        theta: &[f32],
        replicas: &[(WorkerId, Vec<f32>)],
        settings: &ServerSettings,
    ) -> Vec<Self> {
        let mut shards = Self::cut(layout, theta, settings);
        for shard in &mut shards {
            let elements = layout.elements(shard.tensors.clone());
            shard.initial = settings.workers_have_initial.then(|| initial[elements.clone()].to_vec());
            for (worker, replica) in replicas {
                shard.tracker.restore(*worker, replica[elements.clone()].to_vec());
            }
        }
        shards
    }
}

/// What an evaluating worker is sent, of what the shards returned for [`ShardJob::Aside`], in their order: see
/// [`join_aside`].
///
/// # Panics
/// If they are outputs of another job.
pub fn aside_bytes(outputs: impl IntoIterator<Item = ShardOutput>) -> Vec<u8> {
    let (mut first, mut second) = (Vec::new(), Vec::new());
    for output in outputs {
        let ShardOutput::Aside(blocks, rest) = output else { unreachable!("the job was Aside") };
        first.extend(blocks);
        second.extend(rest);
    }
    join_aside(&first, &second)
}

impl<T: DifferenceTracker> Shard<T> {
    /// A shard of the given tensors.
    ///
    /// # Panics
    /// If `theta` does not hold exactly those, or a value that is not finite or above [`BASE_MAGNITUDE_MAX`].
    pub fn new(layout: Arc<Layout>, tensors: Range<usize>, theta: Vec<f32>, tracker: T) -> Self {
        assert_eq!(theta.len(), layout.elements(tensors.clone()).len(), "the shard holds other tensors");
        let in_range = theta.iter().all(|value| value.abs() <= BASE_MAGNITUDE_MAX);
        assert!(in_range, "an initial parameter is not finite, or too large to stay so");
        Self { layout, tensors, theta: Arc::new(theta), initial: None, tracker, last: BTreeMap::new() }
    }

    /// Does one job.
    ///
    /// # Panics
    /// If the job names a worker that is not open, or a target of another length than the layout's.
    pub fn handle(&mut self, job: &ShardJob) -> ShardOutput {
        match job {
            &ShardJob::Open { worker } => ShardOutput::Base(self.open(worker)),
            &ShardJob::Close { worker } => {
                self.tracker.close(worker);
                self.last.remove(&worker);
                ShardOutput::Closed
            }
            ShardJob::Apply { worker, update } => {
                ShardOutput::Difference(self.apply(*worker, update.as_deref()))
            }
            ShardJob::Snapshot => ShardOutput::Snapshot(self.theta.to_vec()),
            ShardJob::Aside { worker, target } => self.aside(*worker, target),
            &ShardJob::ReplicaHashes { worker } => {
                let hashes = self.replica_hashes(worker);
                self.last.entry(worker).or_default().replica_hashes = hashes.clone();
                ShardOutput::ReplicaHashes(hashes)
            }
            ShardJob::Image => ShardOutput::Image(ShardImage {
                theta: self.theta.clone(),
                replicas: self.tracker.image(),
                last: self.last.clone(),
            }),
        }
    }

    fn open(&mut self, worker: WorkerId) -> Base {
        match &self.initial {
            None => {
                self.tracker.open(worker, &self.theta);
                Base::Whole(self.theta.to_vec())
            }
            Some(initial) => {
                self.tracker.open(worker, initial);
                let mut payload = Vec::new();
                self.tracker.catch_up(worker, &self.layout, &self.theta, &mut payload);
                Base::Difference(payload)
            }
        }
    }

    /// θ ← θ − g; then what the worker is owed.
    fn apply(&mut self, worker: WorkerId, update: Option<&Update>) -> Bytes {
        if let Some(update) = update {
            let theta = Arc::make_mut(&mut self.theta);
            update.part(self.tensors.clone()).subtract_from(&self.layout, theta);
        }
        let mut payload = Vec::new();
        self.tracker.answer(worker, &self.layout, &self.theta, &mut payload);
        let payload = Bytes::from(payload);
        self.last.entry(worker).or_default().difference = payload.clone();
        payload
    }

    fn aside(&mut self, worker: WorkerId, target: &[f32]) -> ShardOutput {
        let part = &target[self.layout.elements(self.tensors.clone())];
        let (mut first, mut second) = (Vec::new(), Vec::new());
        self.tracker.aside(worker, &self.layout, part, &mut first, &mut second);
        ShardOutput::Aside(first, second)
    }

    fn replica_hashes(&self, worker: WorkerId) -> Vec<[u8; 32]> {
        let replica = self.tracker.replica(worker);
        let start = self.layout.elements(self.tensors.clone()).start;
        let tensors = &self.layout.tensors()[self.tensors.clone()];
        tensors.iter().map(|t| tensor_hash(&replica[t.offset - start..t.offset - start + t.len])).collect()
    }

    /// The shard's tensors.
    pub fn tensors(&self) -> Range<usize> {
        self.tensors.clone()
    }

    /// The elements of its tensors.
    pub fn theta(&self) -> &[f32] {
        &self.theta
    }

    /// The same elements of a worker's replica.
    ///
    /// # Panics
    /// If the worker is not open.
    pub fn replica(&self, worker: WorkerId) -> &[f32] {
        self.tracker.replica(worker)
    }
}

/// What a run keeps of the differences: `None` if it has no secondary compression.
pub fn secondary_compression(run: &RunConfig) -> Option<Compression> {
    let exchange = &run.exchange;
    (exchange.secondary < 1.0).then_some(Compression {
        keep: exchange.secondary,
        dense_below: exchange.dense_below,
        format: exchange.values_down,
    })
}
