//! Gradient dropping of Adam-normalised gradients, taken at the local view.

use sanderling_common::method::MethodSettings;
use sanderling_common::sparse::{NonFinite, Update};

use super::{Accumulators, CompressionMethod, Direction, Sender, refill};

/// v ← β2·v + (1 − β2)·∇²; d = ∇/(√v̂ + ε) + λ·θ with v̂ = v/(1 − β2^c); u ← u + η·d; q = top-R of u; u ← u − q.
///
/// v stays with the worker, and c is the worker's own count of gradients. There is no momentum: with the gradient
/// taken at θ_k − u_k the unsent part of u already acts, and momentum on top of it was found to hurt.
#[derive(Debug)]
pub struct DgsAdam {
    beta2: f32,
    epsilon: f32,
    weight_decay: f32,
    /// β2^c, in float64 by repeated multiplication.
    beta2_power: f64,
    u: Vec<f32>,
    v: Vec<f32>,
    sender: Sender,
}

impl DgsAdam {
    /// # Panics
    /// If β2 lies outside [0, 1) or ε is not positive.
    pub fn new(settings: &MethodSettings, sender: Sender) -> Self {
        let &MethodSettings { beta2, epsilon, weight_decay, .. } = settings;
        assert!((0.0..1.0).contains(&beta2), "beta2 {beta2} lies outside [0, 1)");
        assert!(epsilon > 0.0, "epsilon {epsilon} is not positive");
        Self { beta2, epsilon, weight_decay, beta2_power: 1.0, u: sender.zeros(), v: sender.zeros(), sender }
    }

    fn accumulate(&mut self, direction: &Direction<'_>) {
        let &Direction { gradient, scale, rate, theta } = direction;
        assert_eq!(gradient.len(), self.u.len(), "the gradient is of another layout");
        assert_eq!(theta.len(), self.u.len(), "the parameters are of another layout");
        self.beta2_power *= f64::from(self.beta2);
        let correction = (1.0 / (1.0 - self.beta2_power)) as f32;
        let (beta2, epsilon, weight_decay) = (self.beta2, self.epsilon, self.weight_decay);
        let normalised = |v: &mut f32, gradient: f32| {
            let gradient = scale * gradient;
            *v = beta2 * *v + (1.0 - beta2) * (gradient * gradient);
            gradient / ((*v * correction).sqrt() + epsilon)
        };
        let state = self.u.iter_mut().zip(&mut self.v).zip(gradient);
        if weight_decay == 0.0 {
            state.for_each(|((u, v), &gradient)| *u += rate * normalised(v, gradient));
        } else {
            for (((u, v), &gradient), &theta) in state.zip(theta) {
                *u += rate * (normalised(v, gradient) + weight_decay * theta);
            }
        }
    }
}

impl CompressionMethod for DgsAdam {
    fn step(&mut self, direction: &Direction<'_>, payload: &mut Vec<u8>) -> Result<(), NonFinite> {
        self.accumulate(direction);
        self.sender.send(&self.u, 1.0, payload)?;
        self.sender.for_each_sent(&mut self.u, |u, q| *u -= q);
        Ok(())
    }

    fn sent(&self) -> &Update {
        &self.sender.update
    }

    fn residual(&self) -> &[f32] {
        &self.u
    }

    fn accumulators(&self) -> Accumulators<'_> {
        Accumulators { scalar: self.beta2_power, vectors: vec![&self.u, &self.v] }
    }

    fn restore(&mut self, beta2_power: f64, vectors: Vec<Vec<f32>>, sent: Update) -> bool {
        (self.beta2_power, self.sender.update) = (beta2_power, sent);
        refill([&mut self.u, &mut self.v], vectors) && (0.0..=1.0).contains(&beta2_power)
    }

    fn momentum(&self) -> &[f32] {
        &[]
    }

    fn uses_local_view(&self) -> bool {
        true
    }
}
