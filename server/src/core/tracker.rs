//! What each worker has been sent, and what it is owed.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use sanderling_common::ids::WorkerId;
use sanderling_common::layout::Layout;
use sanderling_common::sparse::{Compression, Compressor, Update};

use super::mutation::Mutation;

/// Knows the model of every worker and makes the differences that bring it nearer to the server's.
///
/// All flat vectors hold the tensors of one shard.
pub trait DifferenceTracker: Send {
    /// A worker starts from `theta`.
    ///
    /// # Panics
    /// If the worker is known already.
    fn open(&mut self, worker: WorkerId, theta: &[f32]);

    /// A worker is gone. Unknown workers are ignored.
    fn close(&mut self, worker: WorkerId);

    /// Appends the tensor blocks of everything that differs between `theta` and the worker's model to `payload`, and
    /// takes it as sent: what brings a worker that starts from an old model up to date at once.
    ///
    /// # Panics
    /// If the worker is unknown.
    fn catch_up(&mut self, worker: WorkerId, layout: &Layout, theta: &[f32], payload: &mut Vec<u8>);

    /// Appends the tensor blocks of what the worker is sent next to `payload`, and takes it as sent.
    ///
    /// # Panics
    /// If the worker is unknown.
    fn answer(&mut self, worker: WorkerId, layout: &Layout, theta: &[f32], payload: &mut Vec<u8>);

    /// Appends the tensor blocks of everything that differs between `target`, a model to be evaluated, and the worker's
    /// model to `first`, and of what its values leave over to `second`. The worker adds both to a copy, so nothing is
    /// taken as sent.
    ///
    /// # Panics
    /// If the worker is unknown.
    fn aside(
        &mut self,
        worker: WorkerId,
        layout: &Layout,
        target: &[f32],
        first: &mut Vec<u8>,
        second: &mut Vec<u8>,
    );

    /// The worker's model after the last answer, bit for bit.
    ///
    /// # Panics
    /// If the worker is unknown.
    fn replica(&self, worker: WorkerId) -> &[f32];

    /// The models of all workers, in ascending order of workers. They are shared, not copied: a model that changes while
    /// its image is still held is copied then.
    fn image(&self) -> Vec<(WorkerId, Arc<Vec<f32>>)>;

    /// A worker has this model, as an [`image`](Self::image) says.
    ///
    /// # Panics
    /// If the worker is known already.
    fn restore(&mut self, worker: WorkerId, replica: Vec<f32>);
}

/// One replica w_k per worker: one model of memory each, and a scan of it per answer.
///
/// The paper keeps v_k, what was sent so far. In floating point (θ0 + a) + b is not θ0 + (a + b), so v_k drifts away
/// from what the worker has; w_k = θ0 + v_k, updated by the same additions as the worker's own model, cannot.
#[derive(Debug)]
pub struct Replicas {
    /// The tensors of the shard.
    tensors: Range<usize>,
    compressor: Compressor,
    /// As the compressor, but it keeps everything.
    complete: Compressor,
    /// Keeps everything as it is.
    exact: Compressor,
    replicas: BTreeMap<WorkerId, Arc<Vec<f32>>>,
    /// G of one tensor at a time, so that it stays in the cache between the scan, the selection and the addition.
    difference: Vec<f32>,
    sent: Update,
}

impl Replicas {
    /// Sends the top R of each difference, as `secondary` says, or without it every entry that differs, in float32:
    /// rounding leftovers would otherwise stay in every later difference.
    pub fn new(tensors: Range<usize>, secondary: Option<Compression>) -> Self {
        let compressor = |keep: Option<f64>| match secondary {
            Some(compression) => Compressor::without_zeros(Compression {
                keep: keep.unwrap_or(compression.keep),
                format: if keep.is_some() { compression.format.at_once() } else { compression.format },
                ..compression
            }),
            None => Compressor::nonzero(),
        };
        Self {
            tensors,
            compressor: compressor(None),
            complete: compressor(Some(1.0)),
            exact: Compressor::nonzero(),
            replicas: BTreeMap::new(),
            difference: Vec::new(),
            sent: Update::default(),
        }
    }
}

fn largest(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |largest, value| largest.max(value.abs()))
}

/// How much of a difference is sent.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Extent {
    /// What secondary compression keeps.
    Top,
    /// All of it.
    Everything,
}

impl Replicas {
    /// G = θ − w_k; select and encode; w_k += decode(encode(G)), tensor by tensor.
    fn send(
        &mut self,
        extent: Extent,
        worker: WorkerId,
        (layout, theta): (&Layout, &[f32]),
        payload: &mut Vec<u8>,
    ) {
        let compressor = match extent {
            Extent::Top => &mut self.compressor,
            Extent::Everything => &mut self.complete,
        };
        let replica = self.replicas.get_mut(&worker).expect("updates come from workers that were opened");
        let replica = Arc::make_mut(replica);
        let start = layout.elements(self.tensors.clone()).start;
        for tensor in self.tensors.clone() {
            let elements = layout.elements(tensor..tensor + 1);
            let elements = elements.start - start..elements.end - start;
            let (theta, replica) = (&theta[elements.clone()], &mut replica[elements]);
            self.difference.clear();
            self.difference.extend(theta.iter().zip(&*replica).map(|(theta, replica)| theta - replica));
            let run = tensor..tensor + 1;
            compressor
                .compress_into(layout, run, &self.difference, 1.0, payload, &mut self.sent)
                .expect("the bound on updates keeps model and replicas finite");
            if !Mutation::StaleReplica.is_on() {
                self.sent.add_to(layout, replica);
            }
        }
    }
}

impl DifferenceTracker for Replicas {
    fn open(&mut self, worker: WorkerId, theta: &[f32]) {
        self.restore(worker, theta.to_vec());
    }

    fn close(&mut self, worker: WorkerId) {
        self.replicas.remove(&worker);
    }

    fn catch_up(&mut self, worker: WorkerId, layout: &Layout, theta: &[f32], payload: &mut Vec<u8>) {
        self.send(Extent::Everything, worker, (layout, theta), payload);
    }

    fn answer(&mut self, worker: WorkerId, layout: &Layout, theta: &[f32], payload: &mut Vec<u8>) {
        self.send(Extent::Top, worker, (layout, theta), payload);
    }

    fn aside(
        &mut self,
        worker: WorkerId,
        layout: &Layout,
        target: &[f32],
        first: &mut Vec<u8>,
        second: &mut Vec<u8>,
    ) {
        let replica = &self.replicas[&worker];
        let start = layout.elements(self.tensors.clone()).start;
        for tensor in self.tensors.clone() {
            let elements = layout.elements(tensor..tensor + 1);
            let elements = elements.start - start..elements.end - start;
            let (target, replica) = (&target[elements.clone()], &replica[elements]);
            self.difference.clear();
            self.difference.extend(target.iter().zip(replica).map(|(target, replica)| target - replica));
            // Where the worker is farther from the target than that is from zero, as of a model that diverged since, even
            // two parts of 8 bits would show.
            let is_far = largest(&self.difference) > largest(target);
            let compressor = if is_far { &mut self.exact } else { &mut self.complete };
            let run = tensor..tensor + 1;
            let finite = "the bound on updates keeps model and replicas finite";
            compressor
                .compress_into(layout, run.clone(), &self.difference, 1.0, first, &mut self.sent)
                .expect(finite);
            self.sent.subtract_from(layout, &mut self.difference);
            self.complete
                .compress_into(layout, run, &self.difference, 1.0, second, &mut self.sent)
                .expect(finite);
        }
    }

    fn replica(&self, worker: WorkerId) -> &[f32] {
        self.replicas.get(&worker).expect("only workers that were opened have replicas")
    }

    fn image(&self) -> Vec<(WorkerId, Arc<Vec<f32>>)> {
        self.replicas.iter().map(|(&worker, replica)| (worker, replica.clone())).collect()
    }

    fn restore(&mut self, worker: WorkerId, replica: Vec<f32>) {
        let previous = self.replicas.insert(worker, Arc::new(replica));
        assert!(previous.is_none(), "{worker} was opened twice");
    }
}
