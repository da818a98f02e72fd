//! AdamW on one machine: the reference that asynchronous training is measured against.

use sanderling_common::layout::Layout;

/// The settings of AdamW (Loshchilov and Hutter, 2019).
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct AdamWSettings {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// λ of the decoupled decay θ ← θ − η·λ·θ, for matrices; vectors are not decayed.
    pub weight_decay: f64,
}

impl Default for AdamWSettings {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.99, epsilon: 1e-8, weight_decay: 0.1 }
    }
}

/// The moments of every parameter.
#[derive(Clone, Debug)]
pub struct AdamW {
    settings: AdamWSettings,
    first: Vec<f32>,
    second: Vec<f32>,
    steps: i32,
}

impl AdamW {
    /// Moments of zero for so many parameters.
    pub fn new(settings: AdamWSettings, parameters: usize) -> Self {
        Self { settings, first: vec![0.0; parameters], second: vec![0.0; parameters], steps: 0 }
    }

    /// m ← β1·m + (1−β1)·g; v ← β2·v + (1−β2)·g²; θ ← θ − η·(m̂/(√v̂ + ε) + λ·θ), where g is `scale` times the gradient.
    ///
    /// # Panics
    /// If the vectors are not of the layout's length.
    pub fn step(
        &mut self,
        layout: &Layout,
        parameters: &mut [f32],
        (gradient, scale): (&[f32], f32),
        rate: f32,
    ) {
        assert!([parameters.len(), gradient.len(), self.first.len()].iter().all(|&len| len == layout.len()));
        let AdamWSettings { beta1, beta2, epsilon, weight_decay } = self.settings;
        self.steps += 1;
        let first_correction = (1.0 / (1.0 - beta1.powi(self.steps))) as f32;
        let second_correction = (1.0 / (1.0 - beta2.powi(self.steps))) as f32;
        let (beta1, beta2, epsilon) = (beta1 as f32, beta2 as f32, epsilon as f32);
        for tensor in layout.tensors() {
            let decay = if tensor.shape.len() > 1 { weight_decay as f32 } else { 0.0 };
            let range = tensor.range();
            let moments = self.first[range.clone()].iter_mut().zip(&mut self.second[range.clone()]);
            let values = parameters[range.clone()].iter_mut().zip(&gradient[range]);
            for ((parameter, &gradient), (first, second)) in values.zip(moments) {
                let gradient = scale * gradient;
                *first = beta1 * *first + (1.0 - beta1) * gradient;
                *second = beta2 * *second + (1.0 - beta2) * gradient * gradient;
                let direction = *first * first_correction / ((*second * second_correction).sqrt() + epsilon);
                *parameter -= rate * (direction + decay * *parameter);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against the formulas in float64, written out.
    #[test]
    fn steps_are_those_of_the_paper() {
        let layout = Layout::new([("matrix", vec![1, 2]), ("vector", vec![1])]).unwrap();
        let settings = AdamWSettings { weight_decay: 0.5, ..AdamWSettings::default() };
        let mut optimizer = AdamW::new(settings, 3);
        let mut parameters = [1.0f32, -2.0, 3.0];
        let mut expected = [1.0f64, -2.0, 3.0];
        let (mut m, mut v) = ([0.0f64; 3], [0.0f64; 3]);
        for step in 1..=5 {
            let gradient = [0.1 * step as f32, -0.3, 2.0];
            optimizer.step(&layout, &mut parameters, (&gradient, 0.5), 0.01);
            for i in 0..3 {
                let g = 0.5 * f64::from(gradient[i]);
                m[i] = 0.9 * m[i] + 0.1 * g;
                v[i] = 0.99 * v[i] + 0.01 * g * g;
                let m_hat = m[i] / (1.0 - 0.9f64.powi(step));
                let v_hat = v[i] / (1.0 - 0.99f64.powi(step));
                let decay = if i < 2 { 0.5 * expected[i] } else { 0.0 };
                expected[i] -= 0.01 * (m_hat / (v_hat.sqrt() + 1e-8) + decay);
            }
        }
        for (parameter, expected) in parameters.iter().zip(expected) {
            assert!((f64::from(*parameter) - expected).abs() < 1e-6, "{parameter} {expected}");
        }
    }
}
