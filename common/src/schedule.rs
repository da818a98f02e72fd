//! The learning rate as a function of the server's step and the gradient's staleness.

use crate::config::RunConfig;
use crate::ids::Step;
use crate::method::{Decay, RateScaling};

/// Linear warm-up and decay over server steps, times a rate that may shrink with staleness:
/// η = min(η_max, η0/√(1+τ))·s(t, τ) by default, with 1+τ or 1 in the place of the root for other [`RateScaling`]s.
///
/// With many workers the first gradients are many updates old whatever the rate, so the warm-up takes as many exchanges of
/// each worker as it would take of one: (t + 1)/(1 + τ) is about what each has made by step t. In a short run of many workers
/// that would be most of it, so it takes a quarter of the run at most.
///
/// The server's steps rather than the worker's own count drive s, so that a worker that joins late neither warms up
/// again nor lags behind the others' decay.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// η0.
    pub learning_rate: f64,
    /// How the rate depends on staleness.
    pub rate_scaling: RateScaling,
    /// η_max, the cap on a rate that is scaled; a constant rate has none.
    pub learning_rate_max: f64,
    /// The least rate at which a worker's own progress counts for itself before it is sent, times s.
    pub local_rate: f64,
    /// Steps over which s rises linearly to 1.
    pub warmup_steps: u64,
    /// Exchanges of each worker over which it does, where that takes longer.
    pub warmup_exchanges: u64,
    /// How it falls then.
    pub decay: Decay,
    /// The step at which the decay ends.
    pub total_steps: u64,
    /// Where it ends, as a fraction of the peak.
    pub final_fraction: f64,
}

/// The share of the steps after the warm-up steps for which [`Decay::Wsd`] keeps the peak. On the default model with 8 and 32 workers
/// a fall of 40 % of the run did better than the cosine, which falls all along.
const STABLE: f64 = 0.6;

impl Decay {
    /// In a sentence about a rate, which ends at that fraction of its peak.
    pub fn describe(self, final_fraction: f64) -> String {
        match self {
            Self::Cosine => format!("falls along half a cosine to {final_fraction} of its peak"),
            Self::Wsd => format!(
                "stays for {:.0} % of the steps after warmup_steps and then falls in a line to {final_fraction} of its peak",
                100.0 * STABLE
            ),
        }
    }
}

impl Schedule {
    /// s(t, τ): (t + 1)/warm-up at first, then from 1 by the [`Decay`] to `final_fraction`, and constant after that.
    pub fn factor(&self, step: Step, staleness: u32) -> f64 {
        let Step(step) = step;
        let age = 1.0 + f64::from(staleness);
        let exchanges = (self.warmup_exchanges as f64 * age).min(self.total_steps as f64 / 4.0);
        let warmup = (self.warmup_steps as f64).max(exchanges);
        let warmth = if warmup > 0.0 { ((step as f64 + 1.0) / warmup).min(1.0) } else { 1.0 };
        if step < self.warmup_steps {
            return warmth;
        }
        if step >= self.total_steps {
            return self.final_fraction.min(warmth);
        }
        let progress = (step - self.warmup_steps) as f64 / (self.total_steps - self.warmup_steps) as f64;
        let left = match self.decay {
            Decay::Cosine => 0.5 * (1.0 + libm::cos(std::f64::consts::PI * progress)),
            Decay::Wsd => ((1.0 - progress) / (1.0 - STABLE)).min(1.0),
        };
        (self.final_fraction + (1.0 - self.final_fraction) * left).min(warmth)
    }

    /// η for a gradient that enters at server step `step` with staleness τ, and the rate at which it counts for the worker
    /// itself before it is sent, which is at least that.
    pub fn rates(&self, step: Step, staleness: u32) -> (f32, f32) {
        let rate = self.rate(step, staleness);
        (rate, rate.max((self.local_rate * self.factor(step, staleness)) as f32))
    }

    /// η for a gradient that enters at server step `step` with staleness τ.
    pub fn rate(&self, step: Step, staleness: u32) -> f32 {
        let age = 1.0 + f64::from(staleness);
        let rate = match self.rate_scaling {
            RateScaling::Constant => self.learning_rate,
            RateScaling::Inverse => (self.learning_rate / age).min(self.learning_rate_max),
            RateScaling::InverseSqrt => (self.learning_rate / libm::sqrt(age)).min(self.learning_rate_max),
        };
        (rate * self.factor(step, staleness)) as f32
    }
}

impl From<&RunConfig> for Schedule {
    fn from(run: &RunConfig) -> Self {
        let training = &run.training;
        Self {
            learning_rate: training.learning_rate,
            rate_scaling: training.rate_scaling,
            learning_rate_max: training.learning_rate_max,
            local_rate: training.local_rate,
            warmup_steps: training.warmup_steps,
            warmup_exchanges: training.warmup_exchanges,
            decay: training.decay,
            total_steps: training.steps,
            final_fraction: training.final_rate_fraction,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule() -> Schedule {
        Schedule {
            learning_rate: 2e-2,
            rate_scaling: RateScaling::Inverse,
            learning_rate_max: 5e-3,
            local_rate: 0.0,
            warmup_steps: 100,
            warmup_exchanges: 0,
            decay: Decay::Cosine,
            total_steps: 1100,
            final_fraction: 0.1,
        }
    }

    #[test]
    fn factor_rises_falls_and_stays() {
        let check = |step, expected: f64| {
            let factor = schedule().factor(Step(step), 3);
            assert!((factor - expected).abs() < 1e-12, "s({step}) = {factor}, expected {expected}");
        };
        check(0, 0.01);
        check(49, 0.5);
        check(99, 1.0);
        check(100, 1.0);
        check(600, 0.55);
        check(1100, 0.1);
        check(u64::MAX, 0.1);
    }

    #[test]
    fn a_stable_rate_falls_in_a_line_at_the_end() {
        let schedule = Schedule { decay: Decay::Wsd, ..schedule() };
        let says =
            "stays for 60 % of the steps after warmup_steps and then falls in a line to 0.1 of its peak";
        assert_eq!(Decay::Wsd.describe(0.1), says);
        let check = |step, expected: f64| {
            let factor = schedule.factor(Step(step), 3);
            assert!((factor - expected).abs() < 1e-12, "s({step}) = {factor}, expected {expected}");
        };
        check(49, 0.5);
        check(100, 1.0);
        check(700, 1.0);
        check(900, 0.55);
        check(1000, 0.325);
        check(1100, 0.1);
    }

    #[test]
    fn runs_shorter_than_their_warm_up_have_a_rate() {
        let short = Schedule { total_steps: 10, ..schedule() };
        assert_eq!(short.factor(Step(9), 0), 0.1);
        let none = Schedule { warmup_steps: 0, total_steps: 0, ..schedule() };
        assert_eq!(none.factor(Step(0), 0), 0.1);
    }

    #[test]
    fn warm_up_takes_as_many_exchanges_of_each_of_many_workers() {
        let schedule = Schedule { warmup_exchanges: 16, total_steps: 8100, ..schedule() };
        let check = |step, staleness, expected: f64| {
            let factor = schedule.factor(Step(step), staleness);
            assert!(
                (factor - expected).abs() < 1e-12,
                "s({step}, {staleness}) = {factor}, expected {expected}"
            );
        };
        check(49, 0, 0.5);
        check(255, 31, 0.5);
        check(399, 99, 0.25);
        // A quarter of the run is enough.
        check(404, 999, 0.2);
        // The decay goes on meanwhile.
        check(7300, 999, 0.1 + 0.9 * 0.5 * (1.0 + (std::f64::consts::PI * 0.9).cos()));
        check(9000, 999, 0.1);
    }

    #[test]
    fn progress_of_ones_own_counts_at_a_rate_of_its_own() {
        let schedule = Schedule { local_rate: 2e-3, ..schedule() };
        assert_eq!(schedule.rates(Step(100), 3), (5e-3, 5e-3));
        assert_eq!(schedule.rates(Step(100), 19), (1e-3, 2e-3));
        assert_eq!(schedule.rates(Step(49), 19), (5e-4, 1e-3));
    }

    #[test]
    fn staleness_scales_the_rate_below_its_cap() {
        let check = |rate_scaling, staleness, expected: f64| {
            let schedule = Schedule { rate_scaling, ..schedule() };
            let rate = schedule.rate(Step(100), staleness);
            assert!((f64::from(rate) - expected).abs() < 1e-9, "{rate_scaling:?} τ = {staleness}: {rate}");
        };
        check(RateScaling::Constant, 7, 2e-2);
        check(RateScaling::Inverse, 0, 5e-3);
        check(RateScaling::Inverse, 3, 5e-3);
        check(RateScaling::Inverse, 7, 2.5e-3);
        check(RateScaling::InverseSqrt, 3, 5e-3);
        check(RateScaling::InverseSqrt, 99, 2e-3);
        assert!(schedule().rate(Step(100), u32::MAX) > 0.0);
    }
}
