//! Sampling text from a model.

use ndarray::ArrayView2;
use sanderling_common::init::{Purpose, stream, uniform};
use sanderling_common::model_config::ModelConfig;
use sanderling_worker::kernels::cpu::Cpu;
use sanderling_worker::model::{Model, ModelError};

/// A model that continues a sequence, one token at a time, seeing at most its context's length of what came before.
pub struct Generator<'a> {
    model: Model<Cpu>,
    parameters: &'a [f32],
    context: usize,
}

impl<'a> Generator<'a> {
    /// A generator for a model with these flat parameters.
    ///
    /// # Errors
    /// A [`ModelError`] if the configuration makes no model.
    pub fn new(config: &ModelConfig, parameters: &'a [f32]) -> Result<Self, ModelError> {
        Ok(Self { model: Model::new(config.clone(), Cpu::default())?, parameters, context: config.context })
    }

    /// `count` tokens that follow `prompt`, drawn from the softmax of the logits over `temperature`; at temperature 0
    /// the likeliest each time. The same seed gives the same tokens.
    ///
    /// # Errors
    /// A [`ModelError`] for a prompt that is empty or has a token outside the vocabulary.
    pub fn generate(
        &mut self,
        prompt: &[u32],
        count: usize,
        temperature: f32,
        seed: u64,
    ) -> Result<Vec<u32>, ModelError> {
        let mut rng = stream(seed, Purpose::Generation, 0);
        let mut tokens = prompt.to_vec();
        for _ in 0..count {
            let seen = &tokens[tokens.len().saturating_sub(self.context)..];
            let input = ArrayView2::from_shape((1, seen.len()), seen).expect("one row of all tokens");
            let logits = self.model.logits(self.parameters, input)?;
            let last = logits.index_axis(ndarray::Axis(0), 0);
            let last = last.index_axis(ndarray::Axis(0), seen.len() - 1);
            let last: Vec<f32> = last.iter().copied().collect();
            tokens.push(draw(&last, temperature, uniform(&mut rng)));
        }
        Ok(tokens.split_off(prompt.len()))
    }
}

/// The token at which the cumulated probability passes `point` in [0, 1).
fn draw(logits: &[f32], temperature: f32, point: f64) -> u32 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if temperature <= 0.0 {
        let place = logits.iter().position(|&logit| logit == largest);
        return place.unwrap_or(0) as u32;
    }
    let weight = |logit: f32| libm::exp(f64::from((logit - largest) / temperature));
    let total: f64 = logits.iter().map(|&logit| weight(logit)).sum();
    let mut left = point * total;
    for (token, &logit) in logits.iter().enumerate() {
        left -= weight(logit);
        if left < 0.0 {
            return token as u32;
        }
    }
    (logits.len() - 1) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_by_probability() {
        let logits = [0.0, f32::NEG_INFINITY, 3.0f32.ln()];
        assert_eq!(draw(&logits, 1.0, 0.0), 0);
        assert_eq!(draw(&logits, 1.0, 0.2499), 0);
        assert_eq!(draw(&logits, 1.0, 0.2501), 2);
        assert_eq!(draw(&logits, 1.0, 0.9999), 2);
        assert_eq!(draw(&logits, 0.0, 0.0), 2);
        assert_eq!(draw(&logits, 0.1, 0.01), 2);
    }
}
