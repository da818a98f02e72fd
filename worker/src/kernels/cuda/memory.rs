//! How much memory a model needs, before any is asked for.

use sanderling_common::model_config::{ModelConfig, ModelConfigError};

use super::Precision;
use super::routing::routing_bytes;
use crate::model::step_memory;

/// Memory of a training step on a GPU, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryNeeded {
    /// The parameters, their gradient, and what products read of the parameters.
    pub model: usize,
    /// What a batch's passes hold, which grows with its tokens.
    pub step: usize,
}

impl MemoryNeeded {
    /// Of a batch of so many tokens.
    ///
    /// Scratch memory and cuBLASLt's workspace come on top, together less than a tenth.
    ///
    /// # Errors
    /// For a configuration without a layout.
    pub fn new(config: &ModelConfig, precision: Precision, rows: usize) -> Result<Self, ModelConfigError> {
        let parameters = config.layout()?.len();
        let activation = if precision == Precision::Bf16 { 2 } else { 4 };
        let twin = if precision == Precision::Bf16 { 2 } else { 0 };
        let step = step_memory(config, rows);
        let routings: usize = step.routings.iter().map(|&shape| routing_bytes(shape)).sum();
        let step = step.floats * 4 + step.factors * twin + step.activations * activation + step.tokens * 4;
        Ok(Self { model: parameters * (2 * 4 + twin), step: step + routings })
    }

    /// Both together.
    pub fn bytes(self) -> usize {
        self.model + self.step
    }
}
