//! Steps that come again are queued as one graph.
//!
//! The step of a small model is some two hundred kernels of a few microseconds each, and queueing one takes the host about as
//! long. Between `begin_step` and `end_step` operations are therefore written down. A sequence that comes a second time is made
//! a graph, which the device is given whole from then on.
//!
//! What is queued is what was asked for: the operations of a step are compared with those of a graph, addresses and all,
//! before it is used. Rejected: to record the first step and to replay it without running the code that asks for its operations,
//! which would save some microseconds more, and make every change of a buffer, a shape or a coefficient a bug in waiting.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;

use super::driver::{Driver, GraphHandle, Operation, Tape};
use super::{Cuda, CudaError};

/// Sequences kept; the one that was used longest ago makes room for another.
const KEPT_MAX: usize = 8;

/// Times that the driver may refuse to make a graph; then it is asked no more. Something else in the process may have spoilt a
/// first attempt.
const REFUSALS_MAX: u32 = 3;

/// Sequences shorter than this are queued one by one.
const OPERATIONS_MIN: usize = 8;

/// How often graphs were made and used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GraphCounts {
    /// Sequences that were made graphs.
    pub made: u64,
    /// Times that a graph was queued.
    pub queued: u64,
}

/// The operations of this step, and graphs of steps before it.
#[derive(Debug, Default)]
pub(super) struct Graphs {
    /// Whether operations are written down at present.
    is_open: bool,
    tape: Tape,
    /// In the order of their last use.
    kept: VecDeque<Kept>,
    /// Times that the driver refused to make one.
    refusals: u32,
    counts: GraphCounts,
}

#[derive(Debug)]
struct Kept {
    tape: Tape,
    /// From the second time on.
    graph: Option<Graph>,
}

/// A graph of the driver's, given back when it is dropped.
struct Graph {
    driver: Arc<dyn Driver>,
    handle: GraphHandle,
}

impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.handle)
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        self.driver.free_graph(self.handle);
    }
}

impl Graphs {
    /// Queues what was written down.
    fn queue(&mut self, driver: &Arc<dyn Driver>) -> Result<(), CudaError> {
        let one_by_one =
            |tape: &Tape| tape.operations().try_for_each(|operation| operation.queue(driver.as_ref()));
        if self.tape.len() < OPERATIONS_MIN || self.refusals >= REFUSALS_MAX {
            return one_by_one(&self.tape);
        }
        let found = self.kept.iter().position(|kept| kept.tape == self.tape);
        let Some(mut kept) = found.and_then(|place| self.kept.remove(place)) else {
            if self.kept.len() == KEPT_MAX {
                self.kept.pop_front();
            }
            self.kept.push_back(Kept { tape: self.tape.clone(), graph: None });
            return one_by_one(&self.tape);
        };
        if kept.graph.is_none() {
            match driver.graph(&kept.tape) {
                Ok(handle) => {
                    kept.graph = Some(Graph { driver: Arc::clone(driver), handle });
                    self.counts.made += 1;
                }
                Err(error) => {
                    tracing::debug!(
                        "operations are queued one by one, as no graph was made of them: {error}"
                    );
                    self.refusals += 1;
                }
            }
        }
        let queued = match &kept.graph {
            Some(graph) => {
                self.counts.queued += 1;
                driver.queue_graph(graph.handle)
            }
            None => one_by_one(&kept.tape),
        };
        self.kept.push_back(kept);
        queued
    }
}

impl Cuda {
    /// Queues every operation by itself from now on.
    pub fn leave_out_graphs(&mut self) {
        self.left_out.graphs = true;
    }

    /// How often graphs were made and used.
    pub fn graph_counts(&self) -> GraphCounts {
        self.graphs.counts
    }

    /// Operations are written down from here on.
    pub(super) fn open_step(&mut self) {
        self.graphs.is_open = !self.left_out.graphs && self.timing.is_none();
    }

    /// They are queued, and the next ones at once.
    pub(super) fn close_step(&mut self) {
        self.settle();
        self.graphs.is_open = false;
    }

    /// Queues an operation, or writes it down for when the step ends.
    pub(super) fn operate(&mut self, name: &'static str, operation: Operation<'_>) {
        if self.failure.is_some() {
            return;
        }
        if self.graphs.is_open {
            self.graphs.tape.push(operation);
            return;
        }
        let Self { driver, timing, .. } = self;
        let outcome = match timing {
            None => operation.queue(driver.as_ref()),
            Some(timing) => timing.around(name, driver.as_ref(), |driver| operation.queue(driver)),
        };
        self.attempt(outcome);
    }

    /// The driver, after everything that was written down is queued.
    pub(super) fn driver(&mut self) -> &dyn Driver {
        self.settle();
        self.driver.as_ref()
    }

    /// Queues what was written down. After a failure too: what was asked for before it is done.
    pub(super) fn settle(&mut self) {
        if !self.graphs.tape.is_empty() {
            let queued = self.graphs.queue(&self.driver);
            self.graphs.tape.clear();
            self.attempt(queued);
        }
    }
}
