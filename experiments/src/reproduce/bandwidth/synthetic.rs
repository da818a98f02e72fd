//! Workers that cost what a machine of their own would: a fixed time per step, and gradients that need no computing.

use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use sanderling_common::ids::BatchId;
use sanderling_common::init::{Purpose, normal_pair, stream};
use sanderling_common::layout::Layout;
use sanderling_common::wire::EvaluationJob;
use sanderling_common::wire::control::EvaluationReport;
use sanderling_worker::data::Batch;
use sanderling_worker::engine::{Compute, Engine};
use sanderling_worker::model::{ModelError, StepLoss};

/// The part of a gradient that is drawn anew in each step, so that the largest entries are others every time.
const RENEWED: usize = 64;

/// The standard deviation of its entries.
const GRADIENT_STD: f64 = 1e-3;

/// Stands in for an engine.
pub(super) struct Synthetic {
    engine: Engine,
    /// What a step takes, this process's own part of it included.
    duration: Duration,
    gradient: Vec<f32>,
    steps: usize,
}

impl Synthetic {
    pub(super) fn new(engine: Engine, duration: Duration) -> Self {
        let mut rng = stream(0, Purpose::Simulation, 0);
        let draw = |_| (GRADIENT_STD * normal_pair(&mut rng).0) as f32;
        let gradient = (0..engine.layout().len()).map(draw).collect();
        Self { engine, duration, gradient, steps: 0 }
    }
}

impl Compute for Synthetic {
    type Vector = [f32];

    fn layout(&self) -> &Arc<Layout> {
        self.engine.layout()
    }

    fn batch(&self, id: BatchId) -> Batch {
        self.engine.batch(id)
    }

    fn take_gradient(&mut self, _: &[f32], _: &Batch) -> Result<StepLoss, ModelError> {
        let begun = Instant::now();
        let part = self.gradient.len().div_ceil(RENEWED);
        let start = (self.steps % RENEWED) * part;
        let end = (start + part).min(self.gradient.len());
        // Turned round, an entry is as good as a new one for whoever selects.
        self.gradient[start.min(end)..end].reverse();
        self.steps += 1;
        sleep(self.duration.saturating_sub(begun.elapsed()));
        Ok(StepLoss { cross_entropy: 1.0, auxiliary: 1.0, dropped: 0.0 })
    }

    fn gradient(&self) -> &[f32] {
        &self.gradient
    }

    /// Nobody wants to know.
    fn evaluate_while(
        &mut self,
        _: &[f32],
        job: EvaluationJob,
        _: &dyn Fn() -> bool,
    ) -> Result<Option<EvaluationReport>, ModelError> {
        let (expert_share, router_entropy) = (Vec::new(), Vec::new());
        Ok(Some(EvaluationReport { job, loss: 1.0, tokens: 1, expert_share, router_entropy }))
    }
}
