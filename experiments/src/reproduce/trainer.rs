//! Training by one process with AdamW, evaluated along the way.

use std::sync::Arc;

use anyhow::ensure;
use sanderling_common::config::RunConfig;
use sanderling_common::corpus::Corpus;
use sanderling_common::ids::{BatchId, Step};
use sanderling_common::method::RateScaling;
use sanderling_common::model_config::ModelConfig;
use sanderling_common::schedule::Schedule;
use sanderling_common::wire::{EvaluationJob, Split};
use sanderling_worker::core::method::clip_scale;
use sanderling_worker::engine::Engine;

use crate::adamw::{AdamW, AdamWSettings};

/// A stretch of training.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Stretch {
    /// Batches.
    pub(super) steps: u64,
    /// The first batch's number: stretches that follow one another see other windows of the text.
    pub(super) first_batch: u64,
    /// The peak rate; warm-up before it, half a cosine to a tenth of it after.
    pub(super) rate: f64,
    pub(super) warmup_steps: u64,
    /// Steps between evaluations.
    pub(super) eval_every: u64,
}

/// A point of a curve.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub(super) struct Point {
    pub(super) steps: u64,
    /// Not a number once a run has diverged, for which JSON has `null`.
    #[serde(deserialize_with = "number_or_nan")]
    pub(super) val_loss: f64,
}

fn number_or_nan<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    let number: Option<f64> = serde::Deserialize::deserialize(deserializer)?;
    Ok(number.unwrap_or(f64::NAN))
}

/// What a stretch led to.
#[derive(Clone, Debug)]
pub(super) struct Trained {
    /// From before the first step to after the last.
    pub(super) curve: Vec<Point>,
    /// The parameters with the lowest validation loss, and their loss on the test split.
    pub(super) best: Vec<f32>,
    pub(super) test_loss: f64,
}

impl Trained {
    pub(super) fn best_val_loss(&self) -> f64 {
        self.curve.iter().map(|point| point.val_loss).fold(f64::INFINITY, f64::min)
    }
}

/// Trains a model, for as long as `keep_going` says so.
pub(super) fn train(
    run: &RunConfig,
    corpus: &Arc<Corpus>,
    (config, mut parameters): (&ModelConfig, Vec<f32>),
    stretch: &Stretch,
    keep_going: &(dyn Fn() -> bool + Sync),
) -> anyhow::Result<Trained> {
    let mut engine = Engine::new(run, config.clone(), corpus.clone())?;
    let layout = engine.layout().clone();
    let mut optimizer = AdamW::new(AdamWSettings::default(), layout.len());
    let schedule = Schedule {
        learning_rate: stretch.rate,
        rate_scaling: RateScaling::Constant,
        learning_rate_max: stretch.rate,
        warmup_steps: stretch.warmup_steps,
        total_steps: stretch.steps,
        final_fraction: 0.1,
    };
    let job = |split, step| EvaluationJob { id: 0, step: Step(step), split };
    let val_loss = engine.evaluate(&parameters, job(Split::Validation, 0))?.loss;
    let mut curve = vec![Point { steps: 0, val_loss }];
    let (mut best, mut best_loss) = (parameters.clone(), val_loss);
    for step in 0..stretch.steps {
        ensure!(keep_going(), "stopped; the runs that are finished are kept");
        let batch = engine.batch(BatchId(stretch.first_batch + step));
        engine.take_gradient(&parameters, &batch)?;
        // A gradient that is not finite is left out, as workers do.
        if let Some(scale) = clip_scale(engine.gradient(), run.training.clip_norm) {
            let gradient = (engine.gradient(), scale);
            optimizer.step(&layout, &mut parameters, gradient, schedule.rate(Step(step), 0));
        }
        let steps = step + 1;
        if steps.is_multiple_of(stretch.eval_every) || steps == stretch.steps {
            let val_loss = engine.evaluate(&parameters, job(Split::Validation, steps))?.loss;
            curve.push(Point { steps, val_loss });
            if val_loss < best_loss {
                (best_loss, best) = (val_loss, parameters.clone());
            }
        }
    }
    let test_loss = engine.evaluate(&best, job(Split::Test, stretch.steps))?.loss;
    Ok(Trained { curve, best, test_loss })
}
