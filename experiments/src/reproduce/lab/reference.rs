//! Training by one process with AdamW, or data-parallel with the same arithmetic: the references of the experiments.

use anyhow::ensure;
use sanderling_common::config::TrainingSettings;
use sanderling_common::ids::{BatchId, Step};
use sanderling_common::method::{Decay, RateScaling};
use sanderling_common::schedule::Schedule;
use sanderling_common::wire::Split;
use sanderling_worker::core::method::clip_scale;

use super::jobs::STOPPED;
use crate::adamw::{AdamW, AdamWSettings};
use crate::simulation::Point;
use crate::task::Task;

/// Warm-up takes at least so many steps, however large they are.
const WARMUP_STEPS_MIN: u64 = 10;

/// How far above AdamW's the loss of so many asynchronous workers may lie that go on from an upcycled model, in per cent.
pub(in crate::reproduce) const WARM_START_GOAL: (u32, f64) = (8, 0.5);

/// Over how much the rate of AdamW rises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::reproduce) enum Warmup {
    /// As long as a single worker takes.
    Short,
    /// As long as the asynchronous workers that it is compared with take, or a quarter of the run if that is less.
    Long,
}

/// A stretch of training. All counts but [`steps`](Self::steps) are of gradient evaluations.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub(in crate::reproduce) struct Stretch {
    /// The mean gradient of so many batches makes a step.
    pub(in crate::reproduce) batches_per_step: u64,
    pub(in crate::reproduce) evaluations: u64,
    /// The peak rate; warm-up before it, decay down to a fraction of it after.
    pub(in crate::reproduce) rate: f64,
    pub(in crate::reproduce) warmup: u64,
    pub(in crate::reproduce) decay: Decay,
    pub(in crate::reproduce) final_fraction: f64,
    /// Between looks at the validation split.
    pub(in crate::reproduce) eval_every: u64,
    pub(in crate::reproduce) clip_norm: f32,
    pub(in crate::reproduce) adamw: AdamWSettings,
}

impl Stretch {
    /// As a run's settings say.
    pub(in crate::reproduce) fn of(
        training: &TrainingSettings,
        batches_per_step: u64,
        adamw: AdamWSettings,
    ) -> Self {
        Self {
            batches_per_step,
            evaluations: training.steps,
            rate: training.learning_rate,
            warmup: training.warmup_steps,
            decay: training.decay,
            final_fraction: training.final_rate_fraction,
            eval_every: training.eval_every,
            clip_norm: training.clip_norm,
            adamw,
        }
    }

    /// Updates of the model.
    pub(in crate::reproduce) fn steps(&self) -> u64 {
        (self.evaluations / self.batches_per_step).max(1)
    }

    fn schedule(&self) -> Schedule {
        let steps = self.steps();
        Schedule {
            learning_rate: self.rate,
            rate_scaling: RateScaling::Constant,
            learning_rate_max: self.rate,
            local_rate: 0.0,
            warmup_exchanges: 0,
            warmup_steps: (self.warmup / self.batches_per_step)
                .max(WARMUP_STEPS_MIN.min(self.warmup))
                .min(steps / 4),
            decay: self.decay,
            total_steps: steps,
            final_fraction: self.final_fraction,
        }
    }
}

/// What a stretch led to.
#[derive(Clone, Debug)]
pub(in crate::reproduce) struct Trained {
    /// From before the first step to after the last.
    pub(in crate::reproduce) curve: Vec<Point>,
    /// The parameters with the lowest validation loss, and those at the end.
    pub(in crate::reproduce) best: Vec<f32>,
    pub(in crate::reproduce) last: Vec<f32>,
    /// Steps whose gradient was not finite, which changed nothing.
    pub(in crate::reproduce) skipped: u64,
}

/// Trains a task from its initial parameters, for as long as `keep_going`, which is told how many gradients were taken,
/// says so.
///
/// # Errors
/// If the device fails, or a sentence if it is not to go on.
pub(in crate::reproduce) fn train(
    task: &mut dyn Task,
    stretch: &Stretch,
    keep_going: &dyn Fn(u64) -> bool,
) -> anyhow::Result<Trained> {
    let layout = task.layout().clone();
    let mut parameters = task.initial();
    let mut optimizer = AdamW::new(stretch.adamw, layout.len());
    let schedule = stretch.schedule();
    let per_step = stretch.batches_per_step;
    let share = 1.0 / per_step as f32;
    let mut mean = vec![0.0; layout.len()];
    let look = |task: &mut dyn Task, parameters: &[f32], evaluations: u64| {
        let score = task.evaluate(parameters, Split::Validation)?;
        // Gradients in the place of updates, as those of runs by workers that send each of them.
        anyhow::Ok(Point { steps: evaluations, time: (evaluations / per_step) as f64, score })
    };
    let mut curve = vec![look(task, &parameters, 0)?];
    let mut best = parameters.clone();
    let mut skipped = 0;
    for step in 0..stretch.steps() {
        mean.fill(0.0);
        for batch in step * per_step..(step + 1) * per_step {
            ensure!(keep_going(batch), "{STOPPED}");
            task.take_gradient(&parameters, BatchId(batch))?;
            mean.iter_mut().zip(task.gradient()).for_each(|(mean, gradient)| *mean += share * gradient);
        }
        // A gradient that is not finite is left out, as workers do.
        match clip_scale(&mean, stretch.clip_norm) {
            Some(scale) => {
                optimizer.step(&layout, &mut parameters, (&mean, scale), schedule.rate(Step(step), 0));
            }
            None => skipped += 1,
        }
        let evaluations = (step + 1) * per_step;
        let is_due = evaluations / stretch.eval_every > (evaluations - per_step) / stretch.eval_every;
        if is_due || step + 1 == stretch.steps() {
            let point = look(task, &parameters, evaluations)?;
            if point.score.loss < curve.iter().map(|point| point.score.loss).fold(f64::INFINITY, f64::min) {
                best.copy_from_slice(&parameters);
            }
            curve.push(point);
        }
    }
    Ok(Trained { curve, best, last: parameters, skipped })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::DigitsTask;

    fn stretch(per_step: u64, evaluations: u64) -> Stretch {
        Stretch {
            batches_per_step: per_step,
            evaluations,
            rate: 1e-2,
            warmup: 10,
            decay: Decay::Cosine,
            final_fraction: 0.1,
            eval_every: 40,
            clip_norm: 1.0,
            adamw: AdamWSettings::default(),
        }
    }

    /// A step of two batches of 8 is one of a batch that holds them both, which the digits' task cannot draw; so the
    /// mean is checked by the sums that go into it.
    #[test]
    fn a_step_takes_the_mean_gradient_of_its_batches() {
        let mut task = DigitsTask::new(1, 8, 0.0);
        let parameters = task.initial();
        let mut mean = vec![0.0; parameters.len()];
        for batch in 0..2 {
            task.take_gradient(&parameters, BatchId(batch)).unwrap();
            mean.iter_mut().zip(task.gradient()).for_each(|(mean, gradient)| *mean += 0.5 * gradient);
        }
        let one = Stretch { warmup: 0, clip_norm: 0.0, ..stretch(2, 2) };
        let trained = train(&mut task, &one, &|_| true).unwrap();
        let mut expected = parameters.clone();
        let rate = one.schedule().rate(Step(0), 0);
        AdamW::new(one.adamw, expected.len()).step(&task.layout().clone(), &mut expected, (&mean, 1.0), rate);
        assert_eq!(trained.last, expected);
    }

    #[test]
    fn it_learns_and_is_looked_at_along_the_way() {
        let mut task = DigitsTask::new(1, 16, 1e-2);
        let trained = train(&mut task, &stretch(4, 400), &|_| true).unwrap();
        let steps: Vec<u64> = trained.curve.iter().map(|point| point.steps).collect();
        assert_eq!(steps, [0, 40, 80, 120, 160, 200, 240, 280, 320, 360, 400]);
        let best = task.evaluate(&trained.best, Split::Validation).unwrap().loss;
        assert!(best < 0.5 * trained.curve[0].score.loss, "{:?}", trained.curve);
        assert!(train(&mut task, &stretch(4, 400), &|done| done < 100).is_err());
    }
}
