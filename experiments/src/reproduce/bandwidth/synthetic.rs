//! Workers that cost what a machine of their own would: a fixed time per step, and gradients that need no computing.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Barrier, OnceLock};
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

use super::children::{Line, tell};

/// The part of a gradient that is drawn anew in each step, so that the largest entries are others every time.
const RENEWED: usize = 64;

/// The standard deviation of its entries.
const GRADIENT_STD: f64 = 1e-3;

/// What the workers of a process have in common.
pub(super) struct Crowd {
    workers: u32,
    /// What a step takes, this process's own part of it included.
    duration: Duration,
    /// Between the beginnings of two workers.
    stagger: Duration,
    /// All begin with the model that the run begins with: one that came later would have to fetch what changed.
    all_are_there: Barrier,
    came: AtomicU32,
    begun: Instant,
    /// The same for all, so that there are not as many to be drawn.
    gradient: OnceLock<Vec<f32>>,
}

impl Crowd {
    pub(super) fn new(workers: u32, duration: Duration, stagger: Duration) -> Self {
        Self {
            workers,
            duration,
            stagger,
            all_are_there: Barrier::new(workers as usize),
            came: AtomicU32::new(0),
            begun: Instant::now(),
            gradient: OnceLock::new(),
        }
    }

    fn gradient(&self, length: usize) -> Vec<f32> {
        let draw = || {
            let mut rng = stream(0, Purpose::Simulation, 0);
            (0..length).map(|_| (GRADIENT_STD * normal_pair(&mut rng).0) as f32).collect()
        };
        self.gradient.get_or_init(draw).clone()
    }
}

/// Stands in for an engine.
pub(super) struct Synthetic {
    engine: Engine,
    crowd: Arc<Crowd>,
    number: u32,
    gradient: Vec<f32>,
    steps: usize,
}

impl Synthetic {
    pub(super) fn new(engine: Engine, crowd: Arc<Crowd>) -> Self {
        let number = crowd.came.fetch_add(1, Ordering::Relaxed);
        let mut gradient = crowd.gradient(engine.layout().len());
        // Nobody's largest entries are where another's are.
        let turn = gradient.len() / crowd.workers as usize * (number % crowd.workers) as usize;
        gradient.rotate_left(turn);
        Self { engine, crowd, number, gradient, steps: 0 }
    }

    /// A worker takes its next gradient when it has been answered to the one before.
    fn begin_step(&self) {
        if self.steps > 0 {
            let seconds = self.crowd.begun.elapsed().as_secs_f64();
            tell(&Line::Update { seconds, worker: self.number });
        } else if self.number < self.crowd.workers {
            self.crowd.all_are_there.wait();
            sleep(self.crowd.stagger * self.number);
        }
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
        self.begin_step();
        let begun = Instant::now();
        let part = self.gradient.len().div_ceil(RENEWED);
        let start = (self.steps % RENEWED) * part;
        let end = (start + part).min(self.gradient.len());
        // Turned round, an entry is as good as a new one for whoever selects.
        self.gradient[start.min(end)..end].reverse();
        self.steps += 1;
        sleep(self.crowd.duration.saturating_sub(begun.elapsed()));
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
