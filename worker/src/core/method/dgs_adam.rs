//! Gradient dropping of Adam-normalised gradients, taken at the local view.

use sanderling_common::method::MethodSettings;
use sanderling_common::sparse::{NonFinite, Update};

use super::{Accumulators, CompressionMethod, Direction, Sender, refill};

/// v ← β2·v + (1 − β2)·∇²; d = ∇/(√v̂ + ε) + λ·θ with v̂ = v/(1 − β2^c); u ← u + η_l·d; q = top-R of (η/η_l)·u, sent;
/// u ← u − (η_l/η)·q.
///
/// v stays with the worker, and c is the worker's own count of gradients. There is no momentum: with the gradient
/// taken at θ_k − u_k the unsent part of u already acts, and momentum on top of it was found to hurt.
///
/// The more workers there are, the smaller is the share η of each in the model's progress. What a worker has not sent yet
/// counts in its own view at η_l ≥ η all the same: all the others have accumulated something like it, and the view is where
/// the model will be once they have sent it.
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
}

impl CompressionMethod for DgsAdam {
    fn accumulate(&mut self, direction: &Direction<'_>) {
        let &Direction { gradient, scale, local_rate, theta, .. } = direction;
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
            state.for_each(|((u, v), &gradient)| *u += local_rate * normalised(v, gradient));
        } else {
            for (((u, v), &gradient), &theta) in state.zip(theta) {
                *u += local_rate * (normalised(v, gradient) + weight_decay * theta);
            }
        }
    }

    fn send(&mut self, rate: f32, local_rate: f32, payload: &mut Vec<u8>) -> Result<(), NonFinite> {
        assert!(rate <= local_rate, "a rate of {rate} is more than the worker's own of {local_rate}");
        if rate == local_rate {
            self.sender.send(&self.u, 1.0, payload)?;
            self.sender.for_each_sent(&mut self.u, |u, q| *u -= q);
        } else if rate > 0.0 {
            let share = rate / local_rate;
            self.sender.send(&self.u, share, payload)?;
            self.sender.for_each_sent(&mut self.u, |u, q| *u -= q / share);
        } else {
            // Nothing of it counts for the others, and none of it is to be lost.
            self.sender.send(&self.u, 0.0, payload)?;
        }
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use sanderling_common::layout::Layout;
    use sanderling_common::method::Method;
    use sanderling_common::sparse::{Compression, ValueFormat};

    use super::*;

    const ELEMENTS: usize = 40;

    fn method(keep: f64, format: ValueFormat) -> (Arc<Layout>, DgsAdam) {
        let layout = Arc::new(Layout::new([("matrix", vec![8, 5])]).unwrap());
        let compression = Compression { keep, dense_below: 0, format };
        let settings = MethodSettings {
            method: Method::DgsAdam,
            momentum: 0.0,
            beta2: 0.9,
            epsilon: 1e-8,
            weight_decay: 0.0,
            clip_norm: 0.0,
            compression,
        };
        (layout.clone(), DgsAdam::new(&settings, Sender::new(&layout, compression)))
    }

    fn gradient(step: usize) -> Vec<f32> {
        (0..ELEMENTS).map(|element| ((step * 31 + element * 17) % 23) as f32 - 11.5).collect()
    }

    /// Σ (η_l/η)·sent + u = Σ η_l·d, whatever the rates of each step and however values are rounded. What a method sends that
    /// keeps nothing back tells d.
    #[test]
    fn what_is_not_sent_waits_at_the_rate_of_its_own() {
        for format in [ValueFormat::F32, ValueFormat::Int8, ValueFormat::Sign] {
            let (layout, mut sparse) = method(0.1, format);
            let (_, mut dense) = method(1.0, ValueFormat::F32);
            let (mut sent, mut entered) = (vec![0.0_f64; ELEMENTS], vec![0.0_f64; ELEMENTS]);
            for step in 0..50 {
                let gradient = gradient(step);
                let (local_rate, share) = (0.02, if step % 3 == 0 { 1.0 } else { 0.125 });
                let theta = [0.0; ELEMENTS];
                let direction = Direction {
                    gradient: &gradient,
                    scale: 1.0,
                    rate: local_rate * share,
                    local_rate,
                    theta: &theta,
                };
                sparse.step(&direction, &mut Vec::new()).unwrap();
                dense.step(&Direction { rate: local_rate, ..direction }, &mut Vec::new()).unwrap();
                for element in 0..ELEMENTS {
                    sent[element] += f64::from(sparse.sent().to_dense(&layout)[element] / share);
                    entered[element] += f64::from(dense.sent().to_dense(&layout)[element]);
                }
            }
            for element in 0..ELEMENTS {
                let kept = f64::from(sparse.residual()[element]);
                let error = (sent[element] + kept - entered[element]).abs();
                assert!(error < 1e-5, "{format:?} {element}: {} {kept} {}", sent[element], entered[element]);
            }
            assert!(sent.iter().any(|&sent| sent != 0.0));
        }
    }
}
