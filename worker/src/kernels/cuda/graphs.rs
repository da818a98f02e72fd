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

/// Times in a row that the driver may refuse a graph; then it is asked for no more. Something else in the process may have
/// spoilt an attempt.
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
    /// Times that the driver made none, or did not take it.
    pub refused: u64,
}

/// The operations of this step, and graphs of steps before it.
#[derive(Debug, Default)]
pub(super) struct Graphs {
    /// Whether operations are written down at present.
    is_open: bool,
    tape: Tape,
    /// In the order of their last use.
    kept: VecDeque<Kept>,
    /// Times in a row that the driver refused one.
    refusals: u32,
    /// Why it did the last time.
    refusal: Option<String>,
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
        if self.tape.len() >= OPERATIONS_MIN {
            let found = self.kept.iter().position(|kept| kept.tape == self.tape);
            match found.and_then(|place| self.kept.remove(place)) {
                Some(mut kept) => {
                    let is_queued = self.queue_as_graph(&mut kept, driver);
                    self.kept.push_back(kept);
                    if is_queued {
                        return Ok(());
                    }
                }
                None => {
                    if self.kept.len() == KEPT_MAX {
                        self.kept.pop_front();
                    }
                    self.kept.push_back(Kept { tape: self.tape.clone(), graph: None });
                }
            }
        }
        self.tape.operations().try_for_each(|operation| operation.queue(driver.as_ref()))
    }

    /// Whether a sequence that was seen before could be queued as a graph. If not, nothing of it is queued.
    fn queue_as_graph(&mut self, kept: &mut Kept, driver: &Arc<dyn Driver>) -> bool {
        if kept.graph.is_none() && self.refusals < REFUSALS_MAX {
            match driver.graph(&kept.tape) {
                Ok(handle) => {
                    kept.graph = Some(Graph { driver: Arc::clone(driver), handle });
                    self.counts.made += 1;
                }
                Err(error) => self.refuse(&error),
            }
        }
        let Some(graph) = &kept.graph else { return false };
        match driver.queue_graph(graph.handle) {
            Ok(()) => {
                self.counts.queued += 1;
                // Those that were made before it was given up are used on.
                if self.refusals < REFUSALS_MAX {
                    self.refusals = 0;
                }
                true
            }
            // It may have had no room on the device. If that is not the reason, its operations fail likewise.
            Err(error) => {
                kept.graph = None;
                self.refuse(&error);
                false
            }
        }
    }

    fn refuse(&mut self, error: &CudaError) {
        (self.counts.refused, self.refusals) = (self.counts.refused + 1, self.refusals + 1);
        self.refusal = Some(error.to_string());
        if self.refusals < REFUSALS_MAX {
            tracing::debug!("a step is queued without a graph: {error}");
        } else {
            tracing::warn!("steps are queued without graphs from now on, as the GPU refuses them: {error}");
        }
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

    /// Why the last graph that was refused was.
    pub fn graph_refusal(&self) -> Option<&str> {
        self.graphs.refusal.as_deref()
    }

    /// Operations are written down from here on.
    pub(super) fn open_step(&mut self) {
        // Of a step that panicked.
        self.graphs.tape.clear();
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
            Some(timing) => timing.around(name, driver, |driver| operation.queue(driver)),
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
